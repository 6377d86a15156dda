"""Scores of vessel maps inside the field of view, of one image and of a set, and the table of them.

prob (H, W) probabilities in 0..1; truth, fov, pred (H, W) bool; a pixel is vessel where prob > threshold. Nothing
outside the field of view counts: masks are cut to it before skeletons, components and distances are taken.
Definitions: AUC is the rank statistic with half weight for ties, AP scikit-learn's step sum, both on the 65536 levels
that probability files hold. clDice (Shit et al., CVPR 2021) on scikit-image's `skeletonize`. HD95 as in medpy: the 95th
percentile of the distances (px) from each border pixel of either mask to the other's border. Betti-0 error: difference
of the numbers of connected components, pixels joined over corners too (8-connectivity).

0/0 is undefined and NaN, never 0 or 1: Dice, IoU and clDice of two empty masks, sensitivity and AP without truth, AUC
and MCC with one class only, HD95 with one empty mask. `summarise` leaves NaN out of the mean and counts it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.morphology import skeletonize

NAMES = ("Dice", "IoU", "sensitivity", "specificity", "precision", "MCC", "AUC", "AP", "clDice", "Betti-0", "HD95")
RATES = NAMES[:9]  # 1 is perfect; the other two count and measure errors
LEVELS = 65535
SHORT = {"sensitivity": "sens", "specificity": "spec", "precision": "prec", "Betti-0": "B0 err"}


@dataclass(frozen=True)
class ImageScore:
    """values: NAMES -> float or NaN. The rest are sums that add up over images: counts (tp, fp, fn, tn), skeleton
    pixels (of the prediction inside the truth, of the prediction, of the truth inside the prediction, of the truth),
    levels (2, 65536) int64: pixels of background and vessel at each level, None where no probability was given."""

    values: dict[str, float]
    counts: np.ndarray
    skeleton: np.ndarray
    levels: np.ndarray | None


# ---- one image


def ratio(a: float, b: float) -> float:
    return float(a / b) if b else float("nan")


def count(pred: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """(tp, fp, fn, tn) int64 pixels inside fov."""
    tp, p, t, n = ((pred & truth & fov).sum(), (pred & fov).sum(), (truth & fov).sum(), fov.sum())
    return np.array([tp, p - tp, t - tp, n - p - t + tp], np.int64)


def overlap(counts: np.ndarray) -> dict[str, float]:
    """Dice, IoU, sensitivity, specificity, precision and MCC of (tp, fp, fn, tn)."""
    tp, fp, fn, tn = (int(n) for n in counts)  # Python's integers: the product below passes 2**63
    root = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return {
        "Dice": ratio(2 * tp, 2 * tp + fp + fn),
        "IoU": ratio(tp, tp + fp + fn),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "precision": ratio(tp, tp + fp),
        "MCC": ratio(tp * tn - fp * fn, root),
    }


def level_counts(prob: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """(2, 65536) int64: how many background and vessel pixels inside fov have each level of probability."""
    levels = np.rint(prob[fov].astype(np.float64) * LEVELS).astype(np.int64)
    return np.bincount(levels + (LEVELS + 1) * truth[fov], minlength=2 * (LEVELS + 1)).reshape(2, LEVELS + 1)


def ranking(levels: np.ndarray) -> dict[str, float]:
    """AUC and AP of `level_counts`."""
    negative, positive = levels[:, ::-1].astype(np.float64)  # from the highest level down
    below = negative.sum() - negative.cumsum()
    auc = ratio((positive * (below + negative / 2)).sum(), positive.sum() * negative.sum())
    precision = positive.cumsum() / np.maximum((positive + negative).cumsum(), 1)
    return {"AUC": auc, "AP": ratio((positive * precision).sum(), positive.sum())}


def skeleton_counts(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(4,) int64 pixels: pred's skeleton inside truth, pred's skeleton, truth's skeleton inside pred, truth's."""
    p, t = skeletonize(pred), skeletonize(truth)
    return np.array([(p & truth).sum(), p.sum(), (t & pred).sum(), t.sum()], np.int64)


def cldice(skeleton: np.ndarray) -> float:
    """Harmonic mean of the two shares of `skeleton_counts`. It is 0 where nothing meets, also if one mask is empty (the
    reference gives NaN there, which would leave a total miss out of the mean); NaN only for two empty masks."""
    if not skeleton[1] or not skeleton[3]:
        return 0.0 if skeleton[1] + skeleton[3] else float("nan")
    precision, sensitivity = skeleton[0] / skeleton[1], skeleton[2] / skeleton[3]
    return float(2 * precision * sensitivity / (precision + sensitivity)) if precision + sensitivity else 0.0


def components(mask: np.ndarray) -> int:
    return ndimage.label(mask, np.ones((3, 3)))[1]


def surface_distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances (px) of a's border pixels to b's border, and of b's to a's. A border pixel has a neighbour over an edge
    outside its mask, or lies at the picture's rim. ValueError for an empty mask."""
    if not a.any() or not b.any():
        raise ValueError("surface_distances: an empty mask has no border")
    rim_a, rim_b = (m & ~ndimage.binary_erosion(m) for m in (a, b))
    return ndimage.distance_transform_edt(~rim_b)[rim_a], ndimage.distance_transform_edt(~rim_a)[rim_b]


def hd95(a: np.ndarray, b: np.ndarray) -> float:
    """95th percentile of both directions together, in px; NaN if a mask is empty."""
    return float(np.percentile(np.hstack(surface_distances(a, b)), 95)) if a.any() and b.any() else float("nan")


def score_mask(pred: np.ndarray, truth: np.ndarray, fov: np.ndarray, prob: np.ndarray | None = None) -> ImageScore:
    """Score of a mask; AUC and AP are those of `prob`, NaN without it. ValueError for shapes that differ."""
    if not pred.shape == truth.shape == fov.shape:
        raise ValueError(f"prediction {pred.shape}, truth {truth.shape} and field of view {fov.shape} differ in size")
    counts, levels = count(pred, truth, fov), None
    pred, truth = pred & fov, truth & fov
    skeleton = skeleton_counts(pred, truth)
    ranks = dict.fromkeys(("AUC", "AP"), float("nan"))
    if prob is not None:
        levels = level_counts(prob, truth, fov)
        ranks = ranking(levels)
    betti = float(abs(components(pred) - components(truth)))
    values = overlap(counts) | ranks | {"clDice": cldice(skeleton), "Betti-0": betti, "HD95": hd95(pred, truth)}
    return ImageScore(values, counts, skeleton, levels)


def score_image(prob: np.ndarray | None, truth: np.ndarray, fov: np.ndarray, threshold: float = 0.5) -> ImageScore:
    """Score of a probability map at a threshold.

    None, an image that could not be predicted: 0 in every rate, all its components missed, HD95 undefined; in the
    pooled figures it counts as one where no vessel was found.
    """
    if prob is None:
        empty = score_image(np.zeros(truth.shape, np.float32), truth, fov)
        return ImageScore(empty.values | dict.fromkeys(RATES, 0.0), empty.counts, empty.skeleton, empty.levels)
    return score_mask(prob > threshold, truth, fov, prob)


def score_counts(counts: np.ndarray) -> ImageScore:
    """Score that pixel counts alone give: the overlap; the rest is NaN."""
    return ImageScore(dict.fromkeys(NAMES, float("nan")) | overlap(counts), counts, np.zeros(4, np.int64), None)


# ---- a set


def summarise(scores: list[ImageScore]) -> dict[str, dict[str, float | int | None]]:
    """{n, mean, lowest, highest, undefined, pooled}, all but n NAMES -> number; None where nothing is defined.

    mean, lowest, highest: over the images where the value is defined; undefined: how many are not. pooled: of all
    pixels together; Betti-0 and HD95 have none.
    """
    columns = {name: np.array([s.values[name] for s in scores]) for name in NAMES}
    known = {name: v[~np.isnan(v)] for name, v in columns.items()}
    pooled = overlap(sum(s.counts for s in scores)) | {"clDice": cldice(sum(s.skeleton for s in scores))}
    if all(s.levels is not None for s in scores):
        pooled |= ranking(sum(s.levels for s in scores))
    kinds = {"mean": np.mean, "lowest": np.min, "highest": np.max}
    result = {kind: {n: float(f(v)) if len(v) else None for n, v in known.items()} for kind, f in kinds.items()}
    result["n"], result["undefined"] = len(scores), {n: len(scores) - len(v) for n, v in known.items()}
    result["pooled"] = plain(pooled)
    return result


def plain(values: dict[str, float]) -> dict[str, float | None]:
    """The values under NAMES, in that order, ready for json: None for NaN or what is not there."""
    return {n: None if np.isnan(values.get(n, np.nan)) else values[n] for n in NAMES}


def cell(value: float | None, name: str) -> str:
    """Seven characters of a table."""
    return f"{'-':>7s}" if value is None or np.isnan(value) else f"{value:7.{3 if name in RATES else 1}f}"


def table(rows: dict[str, dict]) -> list[str]:
    """Lines of text: what `summarise` gave for each named row, per picture and pooled, and what is undefined. A row
    that also holds per_image {image: values} shows each of them."""
    lines, head = [], "".join(f"{SHORT.get(name, name):>7s}" for name in NAMES)
    lines.append(f"{'per picture, mean':36s}{head}   Dice lowest..highest")
    for label, r in rows.items():
        span = "..".join(cell(r[kind]["Dice"], "Dice").strip() for kind in ("lowest", "highest"))
        lines.append(f"{label:36s}{''.join(cell(r['mean'][name], name) for name in NAMES)}   {span}")
        for image, own in r.get("per_image", {}).items():
            lines.append(f"  {image:34s}{''.join(cell(own[name], name) for name in NAMES)}")
    lines.append(f"{'all pixels together':36s}{head}")
    lines += [f"{label:36s}{''.join(cell(r['pooled'][n], n) for n in NAMES)}".rstrip() for label, r in rows.items()]
    for label, r in rows.items():
        some = [f"{name} {k}" for name, k in r["undefined"].items() if 0 < k < r["n"] or name == "Dice" and k]
        lines += [f"undefined (0/0), not in the mean of '{label}': {', '.join(some)} of {r['n']}"] if some else []
    return lines


# ---- soft clDice


def soft_skeleton(x: torch.Tensor, iterations: int = 10) -> torch.Tensor:
    """Differentiable skeleton of x (B, 1, H, W) float in 0..1: what openings of ever more eroded x lose."""
    skeleton = F.relu(x - _opened(x))
    for _ in range(iterations):
        x = _eroded(x)
        lost = F.relu(x - _opened(x))
        skeleton = skeleton + F.relu(lost - skeleton * lost)
    return skeleton


def _eroded(x: torch.Tensor) -> torch.Tensor:
    """Least value of each pixel and its four neighbours."""
    return -torch.maximum(F.max_pool2d(-x, (3, 1), 1, (1, 0)), F.max_pool2d(-x, (1, 3), 1, (0, 1)))


def _opened(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(_eroded(x), 3, 1, 1)


def soft_cldice(prob: torch.Tensor, truth: torch.Tensor, iterations: int = 10, smooth: float = 1.0) -> torch.Tensor:
    """1 - soft clDice of prob and truth (B, 1, H, W) float over the whole batch, a scalar (Sa2VA notes, 11.2)."""
    p, t = soft_skeleton(prob, iterations), soft_skeleton(truth, iterations)
    precision = ((p * truth).sum() + smooth) / (p.sum() + smooth)
    sensitivity = ((t * prob).sum() + smooth) / (t.sum() + smooth)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)
