"""Coverage of labelled instances by disjoint predictions: mCov, mWCov, mPrec, mRec of the S3DIS papers.

Shapes: N vertices, P predicted instances, G labelled ones, K classes. Scores are in 0..1, nan where undefined.
Source: Wang et al., "Associatively Segmenting Instances and Semantics in Point Clouds", CVPR 2019, and the rules of
WXinlong/ASIS@d71c3d6 eval_iou_accuracy.py.
"""

from collections.abc import Sequence

import numpy as np

from utils.scannet_metrics import MIN_VERTICES, mean_of


def classed(ids: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instances >= 0 of N vertices -> index (N,), -1 where none; class (G,) of most of its vertices, lowest when tied;
    size (G,)."""
    found, at = np.unique(ids, return_inverse=True)
    none = int((found < 0).sum())
    at, G = at - none, len(found) - none
    kinds, kind = np.unique(classes, return_inverse=True)
    inside = at >= 0
    votes = np.bincount(at[inside] * len(kinds) + kind[inside], minlength=G * len(kinds)).reshape(G, len(kinds))
    own = kinds[votes.argmax(1)] if G else np.zeros(0, np.int64)
    return np.where(inside, at, -1), own, votes.sum(1)


def scene_coverage(gt_sem, gt_ins, pred_sem, pred_ins, num_classes: int) -> np.ndarray:
    """One scene, all (N,) int64, classes 0..K-1, instances disjoint, -1 none -> per class (K, 6) float64:

    sum of the best IoU of labelled instances, the same weighted with their vertices, instances, their vertices,
    predictions with IoU >= 0.5, predictions. The best is that with instances of the same class. Vertices labelled -1
    are void: they count in the size of a prediction, and one with more than half of its vertices there is left out.
    """
    g, g_class, g_size = classed(np.asarray(gt_ins), np.asarray(gt_sem))
    p, p_class, p_size = classed(np.asarray(pred_ins), np.asarray(pred_sem))
    if not all(((0 <= c) & (c < num_classes)).all() for c in (g_class, p_class)):
        raise ValueError(f"classes of instances: expected 0..{num_classes - 1}")
    both = (g >= 0) & (p >= 0)
    common = np.bincount(g[both] * len(p_class) + p[both], minlength=len(g_class) * len(p_class))
    common = common.reshape(len(g_class), len(p_class))
    iou = common / (g_size[:, None] + p_size - common) * (g_class[:, None] == p_class)  # (G, P)
    best_g, best_p = iou.max(1, initial=0.0), iou.max(0, initial=0.0)
    counted = 2 * common.sum(0) >= p_size
    columns_g = np.stack([best_g, best_g * g_size, np.ones(len(g_size)), g_size], 1)
    columns_p = np.stack([best_p >= 0.5, np.ones(len(p_size))], 1) * counted[:, None]
    sums = np.zeros((num_classes, 6))
    np.add.at(sums[:, :4], g_class, columns_g)
    np.add.at(sums[:, 4:], p_class, columns_p)
    return sums


def coverage(scenes: Sequence[np.ndarray]) -> dict:
    """`scene_coverage` of all scenes -> mCov, mWCov, mPrec, mRec, and per_class: the four as (K,), nan where undefined.

    mCov, mWCov: mean over the scenes that hold the class. mPrec, mRec: predictions with IoU >= 0.5 over predictions
    and over labelled instances of all scenes.
    """
    sums = np.stack(scenes)  # (S, K, 6)
    n = np.where(sums[..., 2:4] > 0, sums[..., 2:4], np.nan)  # (S, K, 2) instances, vertices
    held = (sums[..., 2] > 0).sum(0)
    means = np.nansum(sums[..., :2] / n, 0) / np.where(held > 0, held, np.nan)[:, None]  # (K, 2)
    _, _, instances, _, hits, predictions = sums.sum(0).T
    shares = [hits / np.where(x > 0, x, np.nan) for x in (predictions, instances)]
    per_class = dict(zip(("mCov", "mWCov", "mPrec", "mRec"), (*means.T, *shares), strict=True))
    return {name: mean_of(value) for name, value in per_class.items()} | {"per_class": per_class}


def disjoint(masks: np.ndarray, labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Masks (P, N) bool, labels, scores (P,) -> class and instance of every vertex (N,) int64, -1 where none.

    A vertex goes to the mask of the highest score that covers it, to the first of equals; what is left of a mask is
    removed when it is below 100 vertices.
    """
    masks, labels = np.asarray(masks, bool), np.asarray(labels, np.int64)
    own = np.full(masks.shape[1], -1, np.int64)
    for i in np.argsort(-np.asarray(scores, np.float64), kind="stable")[::-1]:  # the best paints last
        own[masks[i]] = i
    size = np.bincount(own[own >= 0], minlength=len(masks))
    own[(own >= 0) & (np.append(size, 0)[own] < MIN_VERTICES)] = -1
    return np.where(own >= 0, np.append(labels, -1)[own], -1), own
