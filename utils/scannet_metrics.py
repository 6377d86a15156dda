"""ScanNet's scores of labelled vertices: instance AP and semantic IoU.

Shapes: N vertices, P predicted masks, G labelled instances, K classes. Every score is in 0..1, nan where undefined.
Source: ScanNet/ScanNet@3830fce BenchmarkScripts/3d_evaluation (its rules, not its code).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERLAPS = np.append(np.arange(0.5, 0.95, 0.05), 0.25)  # nine values 0.50 .. 0.90, then 0.25
MIN_VERTICES = 100  # labelled instances below it are ignored, predictions below it are dropped
PER_ID = 1000  # a label is class * 1000 + number of the instance


def mean_of(values) -> float:
    """Mean of the values that are defined; nan when none is."""
    values = np.asarray(values, np.float64)
    return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else float("nan")


# ---- instance AP


@dataclass
class SceneOverlaps:
    """What AP needs of one scene; instances by ascending id, predictions in their listing order.

    gt_class, gt_size (G,) int64; pred_class, pred_size, void (P,) int64: vertices outside all valid instances;
    score (P,) float64; common (P, G) int64: vertices in both.
    """

    gt_class: np.ndarray
    gt_size: np.ndarray
    pred_class: np.ndarray
    pred_size: np.ndarray
    score: np.ndarray
    void: np.ndarray
    common: np.ndarray


def scene_overlaps(gt: np.ndarray, masks: np.ndarray, labels, scores, class_ids: Sequence[int]) -> SceneOverlaps:
    """gt (N,) int64 = class * 1000 + instance (0 or negative: none), masks (P, N) bool, labels and scores (P,).

    Predictions of a class outside `class_ids` or with fewer than 100 vertices are dropped. ValueError when the shapes
    do not fit or a score is not finite.
    """
    gt, masks = np.asarray(gt, np.int64), np.asarray(masks, bool)
    labels, scores = np.asarray(labels, np.int64), np.asarray(scores, np.float64)
    if masks.ndim != 2 or masks.shape[1] != len(gt) or len(masks) != len(labels) or len(masks) != len(scores):
        shapes = f"{masks.shape}, {labels.shape}, {scores.shape}"
        raise ValueError(f"masks, labels, scores {shapes}: expected (P, N), (P,), (P,) with N = {len(gt)} vertices")
    if not np.isfinite(scores).all():
        raise ValueError("scores: some are not finite; expected numbers")
    ids = np.unique(gt)
    ids = ids[np.isin(ids // PER_ID, class_ids) & (ids != 0)]
    at = np.searchsorted(ids, gt)  # (N,) instance of every vertex, G where there is none
    at = np.where(np.append(ids, 0)[at] == gt, at, len(ids)) if len(ids) else np.zeros(len(gt), np.int64)
    keep = np.isin(labels, class_ids) & (masks.sum(1) >= MIN_VERTICES)
    masks, labels, scores = masks[keep], labels[keep], scores[keep]
    counts = [np.bincount(at[m], minlength=len(ids) + 1) for m in masks]
    common = np.asarray(counts, np.int64).reshape(len(masks), len(ids) + 1)
    void_class = ~np.isin(gt // PER_ID, class_ids)
    void = np.asarray([np.count_nonzero(void_class & m) for m in masks], np.int64)
    size = np.bincount(at, minlength=len(ids) + 1)[: len(ids)]
    return SceneOverlaps(ids // PER_ID, size, labels, masks.sum(1), scores, void, common[:, : len(ids)])


def matched(scene: SceneOverlaps, label: int, overlap: float) -> tuple[list, list, int]:
    """Scores of the true and of the false positives of one class in one scene, and the number of missed instances.

    Labelled instances choose in order of their id, each the first prediction of the listing above `overlap` that is not
    taken; a further one of them is a false positive, the smaller score of the two counting for it. A prediction that
    meets nothing is false unless its share on void and on small instances is above `overlap`.
    """
    g, p = scene.gt_class == label, scene.pred_class == label
    common, gt_size, size, score = scene.common[p][:, g], scene.gt_size[g], scene.pred_size[p], scene.score[p]
    hit = common / (size[:, None] + gt_size - common) > overlap  # (P, G)
    small, taken = gt_size < MIN_VERTICES, np.zeros(len(size), bool)
    true, false, missed = [], [], 0
    for k in np.flatnonzero(~small):
        own = None
        for i in np.flatnonzero(hit[:, k] & ~taken):
            if own is None:
                own, taken[i] = score[i], True
            else:
                own, worse = max(own, score[i]), min(own, score[i])
                false.append(worse)
        if own is None:
            missed += 1
        else:
            true.append(own)
    ignored = (scene.void[p] + common[:, small].sum(1)) / np.maximum(size, 1)
    false += list(score[~hit.any(1) & (ignored <= overlap)])
    return true, false, missed


def average_precision(true: list, false: list, missed: int) -> float:
    """Area under the curve of precision over recall, one point for each distinct score, from `matched` of all scenes.

    Precision is weighted with half the recall between the two neighbouring points, as ScanNet does. 0 when every
    prediction was ignored.
    """
    score = np.asarray(true + false, np.float64)
    if not len(score):
        return 0.0
    order = np.argsort(score, kind="stable")
    below = np.append(0, np.cumsum(order < len(true)))  # true positives below every place
    first = np.unique(score[order], return_index=True)[1]
    tp = len(true) - below[first]
    precision = np.append(tp / (len(score) - first), 1.0)
    recall = np.append(tp / (len(true) + missed), 0.0)
    padded = np.concatenate((recall[:1], recall, [0.0]))
    return float(precision @ (0.5 * (padded[:-2] - padded[2:])))


def instance_ap(scenes: Sequence[SceneOverlaps], class_ids: Sequence[int]) -> dict:
    """AP, AP50, AP25 over the classes, per_class {id: the same three}, per_overlap (K, 10) in the order of OVERLAPS.

    A class without a labelled instance of 100 vertices is undefined (nan) and left out of the means; one without
    predictions has 0.
    """
    table = np.full((len(class_ids), len(OVERLAPS)), np.nan)
    for k, label in enumerate(class_ids):
        if not any(((s.gt_class == label) & (s.gt_size >= MIN_VERTICES)).any() for s in scenes):
            continue
        for j, overlap in enumerate(OVERLAPS):
            parts = [matched(s, label, overlap) for s in scenes]
            true, false = (sum((x[i] for x in parts), []) for i in (0, 1))
            table[k, j] = average_precision(true, false, sum(x[2] for x in parts))
    rows = np.stack([table[:, :-1].mean(1), table[:, 0], table[:, -1]], 1)  # (K, 3)
    names = ("AP", "AP50", "AP25")
    per_class = {int(c): dict(zip(names, map(float, row), strict=True)) for c, row in zip(class_ids, rows, strict=True)}
    return {n: mean_of(rows[:, i]) for i, n in enumerate(names)} | {"per_class": per_class, "per_overlap": table}


def agnostic_labels(gt: np.ndarray, thing_ids: Sequence[int]) -> np.ndarray:
    """gt (N,) -> the same with all things in class 1, instances in the same order; stuff and unlabelled become 0."""
    gt = np.asarray(gt, np.int64)
    ids = np.unique(gt)
    ids = ids[np.isin(ids // PER_ID, thing_ids)]
    if len(ids) >= PER_ID:
        raise ValueError(f"{len(ids)} instances in one scene: expected fewer than {PER_ID}")
    if not len(ids):
        return np.zeros_like(gt)
    at = np.minimum(np.searchsorted(ids, gt), len(ids) - 1)
    return np.where(ids[at] == gt, PER_ID + at, 0)


# ---- semantic IoU


def confusion(gt: np.ndarray, pred: np.ndarray, class_ids: Sequence[int]) -> np.ndarray:
    """Class ids of N vertices -> counts (K, K + 1) int64, rows labelled; the last column is predictions outside the list.

    Vertices labelled outside the list are skipped. ValueError when the lengths differ.
    """
    gt, pred, ids = np.asarray(gt, np.int64), np.asarray(pred, np.int64), np.asarray(class_ids, np.int64)
    if gt.shape != pred.shape:
        raise ValueError(f"{pred.shape} predicted and {gt.shape} labelled classes: expected the same vertices")
    row, column, K = index_in(gt, ids), index_in(pred, ids), len(ids)
    return np.bincount((row * (K + 1) + column)[row < K], minlength=K * (K + 1)).reshape(K, K + 1)


def index_in(values: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Place of every value (N,) in `ids`, which need no order; len(ids) where it is absent."""
    ids = np.asarray(ids, np.int64)
    order = np.argsort(ids)
    at = order[np.minimum(np.searchsorted(ids[order], values), len(ids) - 1)]
    return np.where(ids[at] == values, at, len(ids))


def semantic_iou(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Sum of `confusion` over the scenes -> iou, accuracy (K,) float64, and true, union (K,) int64.

    A prediction outside the list is a miss and nothing else. iou is nan where the union is empty, accuracy where the
    class has no vertex.
    """
    true, labelled = np.diagonal(counts).copy(), counts.sum(1)
    union = labelled + counts[:, :-1].sum(0) - true
    iou, accuracy = (np.where(n > 0, true / np.maximum(n, 1), np.nan) for n in (union, labelled))
    return {"iou": iou, "accuracy": accuracy, "true": true, "union": union}
