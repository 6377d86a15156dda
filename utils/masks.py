"""Binary masks: run-length codes, IoU, boundary F, J&F, suppression, hole filling, referring scores.

Shapes: N masks, T frames, H W image. A code is COCO's {"size": [H, W], "counts": str}, columns first (Fortran order),
made and read by pycocotools. Boxes are x, y, width, height in pixels.
J, F and the DAVIS statistics follow davisvideochallenge/davis2017-evaluation@ac7c43f metrics.py, utils.py,
evaluation.py.
"""

import math

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

NAMES_DAVIS = ("mean", "recall", "decay")


# ---- run-length codes


def rle_encode(mask: np.ndarray) -> dict | list[dict]:
    """mask (H, W) bool -> its code, ready for json; (N, H, W) -> a list of codes."""
    if mask.ndim == 3:
        return [rle_encode(m) for m in mask]
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}


def rle_decode(code: dict | list[dict]) -> np.ndarray:
    """A code -> (H, W) bool; a list of N codes of one size -> (N, H, W). ValueError for an empty list."""
    if isinstance(code, dict):
        return coco_mask.decode(code).astype(bool)
    if not code:
        raise ValueError("rle_decode: an empty list has no mask size; decode masks one by one")
    return np.moveaxis(coco_mask.decode(code), -1, 0).astype(bool)  # (H, W, N) -> (N, H, W)


def to_rle(segmentation: dict | list, height: int, width: int) -> dict:
    """COCO segmentation (polygons in px, uncompressed or compressed runs) -> code. ValueError for another size."""
    if isinstance(segmentation, list):
        if not segmentation:
            return rle_encode(np.zeros((height, width), bool))
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    else:
        code = dict(segmentation)
    if list(code["size"]) != [height, width]:
        raise ValueError(f"mask of {code['size'][0]} x {code['size'][1]} (H x W), expected {height} x {width}")
    if isinstance(code["counts"], bytes):
        code["counts"] = code["counts"].decode("ascii")
    return code


def rle_area(code: dict | list[dict]) -> int | np.ndarray:
    """Pixels of a code, or of each of a list (N,)."""
    return coco_mask.area(code) if isinstance(code, list) else int(coco_mask.area(code))


def rle_box(code: dict) -> list[float]:
    """x, y, width, height in px of the smallest box around a code; zeros for an empty mask."""
    return coco_mask.toBbox(code).tolist()


def rle_intersections(codes_a: list[dict], codes_b: list[dict]) -> np.ndarray:
    """Common pixels of every pair, (N, M) int64, without decoding.

    pycocotools gives quotients only: with crowd flags it divides by the area of the first, which is multiplied back.
    """
    if not codes_a or not codes_b:
        return np.zeros((len(codes_a), len(codes_b)), np.int64)
    if len({tuple(code["size"]) for code in (*codes_a, *codes_b)}) > 1:
        raise ValueError("rle_intersections: masks of different sizes")
    share = np.asarray(coco_mask.iou(codes_a, codes_b, [1] * len(codes_b)))  # (N, M)
    return np.rint(share * coco_mask.area(codes_a)[:, None]).astype(np.int64)


# ---- IoU


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every pair of a (N, H, W) and b (M, H, W), bool -> (N, M) float64; two empty masks have 0, as in COCO.

    Counts are sums in float32, exact up to 2**24 pixels. J of DAVIS, where two empty masks have 1, is `jaccard`.
    """
    rows_a, rows_b = (
        x.reshape(len(x), x.shape[1] * x.shape[2]).astype(np.float32) for x in (a, b)
    )  # (N, H * W), (M, H * W)
    inter = (rows_a @ rows_b.T).astype(np.float64)
    union = rows_a.sum(1, dtype=np.float64)[:, None] + rows_b.sum(1, dtype=np.float64) - inter
    return inter / np.maximum(union, 1)


def mask_nms(masks: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Indices of kept masks, best first: a mask falls when its IoU with a better kept one is above the threshold.

    masks (N, H, W) bool, scores (N,); equal scores keep their order.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    iou = mask_iou(masks, masks)
    alive, kept = np.ones(len(order), bool), []
    for i in order:
        if alive[i]:
            kept.append(i)
            alive &= iou[i] <= threshold
    return np.array(kept, np.int64)


# ---- DAVIS: J, F and their statistics


def jaccard(gt: np.ndarray, pred: np.ndarray, void: np.ndarray | None = None) -> np.ndarray:
    """J: IoU over the last two axes of gt and pred (..., H, W) bool -> (...); 1 where both are empty.

    void (..., H, W) bool: pixels that do not count.
    """
    valid = True if void is None else ~void
    inter = np.count_nonzero(gt & pred & valid, axis=(-2, -1))
    union = np.count_nonzero((gt | pred) & valid, axis=(-2, -1))
    return np.where(union == 0, 1.0, inter / np.maximum(union, 1))


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of mask (H, W) bool that differ from their right, lower or lower right neighbour -> (H, W) bool.

    The last row looks right only, the last column down only, and the last pixel is never boundary.
    """
    edge = np.zeros_like(mask)
    edge[:, :-1] = mask[:, :-1] ^ mask[:, 1:]
    edge[:-1] |= mask[:-1] ^ mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def matched(points: np.ndarray, near: np.ndarray, radius: int) -> int:
    """How many True pixels of `points` (H, W) lie at most `radius` px (Euclidean) from one of `near` (H, W).

    A dilation of `near` by a disk, painted around its few pixels only: far less work than a filter of the image.
    """
    H, W = near.shape
    step = W + 2 * radius  # width with a margin, so that a disk never wraps
    y, x = np.nonzero(near)
    centres = ((y + radius) * step + x + radius)[:, None]
    grown = np.zeros((H + 2 * radius) * step, bool)
    for dy in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - dy**2)  # row dy of the disk
        grown[centres + np.arange(dy * step - half, dy * step + half + 1)] = True
    y, x = np.nonzero(points)
    return int(np.count_nonzero(grown[(y + radius) * step + x + radius]))


def boundary_f(gt: np.ndarray, pred: np.ndarray, void: np.ndarray | None = None, tolerance: float = 0.008) -> float:
    """F: harmonic mean of boundary precision and recall of gt and pred (H, W) bool; 1 when neither has a boundary.

    tolerance: share of the image diagonal, rounded up to px; a value >= 1 is in px.
    """
    radius = int(tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*gt.shape)))
    valid = True if void is None else ~void
    edge_gt, edge_pred = boundary(gt & valid), boundary(pred & valid)
    n_gt, n_pred = np.count_nonzero(edge_gt), np.count_nonzero(edge_pred)
    if n_gt == 0 or n_pred == 0:
        return float(n_gt == n_pred)  # one is empty: precision 1 and recall 0, or the reverse
    precision = matched(edge_pred, edge_gt, radius) / n_pred
    recall = matched(edge_gt, edge_pred, radius) / n_gt
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def sequence_statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, recall (share above 0.5) and decay (first minus last quarter; quarters share their end frames) of (T,).

    The official program keeps frame numbers in 8 bits, so its decay is wrong beyond 256 frames; this one's is not.
    """
    bins = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    quarters = [values[bins[i] : bins[i + 1] + 1] for i in range(4)]
    return float(np.mean(values)), float(np.mean(values > 0.5)), float(quarters[0].mean() - quarters[3].mean())


def davis_objects(gt: np.ndarray, pred: np.ndarray, void_id: int = 255) -> tuple[np.ndarray, np.ndarray]:
    """J and F (O, T - 2) of a sequence, semi-supervised: objects of the first frame, without first and last frame.

    gt and pred (T, H, W) integer: 0 background, k object k, void_id in gt does not count. An object that is not
    predicted has empty masks; one that gt shows later only is background, as in the official program. ValueError for
    fewer than 3 frames, a size that differs, no object, or a predicted object that is none of them.
    """
    if gt.shape != pred.shape or len(gt) < 3:
        raise ValueError(f"gt {gt.shape} and pred {pred.shape}: expected equal shapes of at least 3 frames")
    void = gt == void_id
    objects = int(np.where(void[0], 0, gt[0]).max())
    gt, pred, void = gt[1:-1], pred[1:-1], void[1:-1]
    if objects < 1 or pred.max() > objects:
        raise ValueError(f"pred has object {pred.max()}, the first frame of gt has {objects} objects")
    J, F = np.zeros((2, objects, len(gt)))
    for k in range(objects):
        own_gt, own_pred = gt == k + 1, pred == k + 1
        J[k] = jaccard(own_gt, own_pred, void)
        F[k] = [boundary_f(*masks) for masks in zip(own_gt, own_pred, void, strict=True)]
    return J, F


def davis_summary(sequences: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict:
    """{sequence: (J, F) of davis_objects} -> J&F, statistics of J and F as means over objects, and by object.

    Keys: "J&F"; "J" and "F": {mean, recall, decay}; "objects": {sequence_k: {"J": {...}, "F": {...}}}, k from 1.
    """
    objects = {}
    for name, scores in sequences.items():
        for k in range(len(scores[0])):
            rows = {m: sequence_statistics(s[k]) for m, s in zip("JF", scores, strict=True)}
            objects[f"{name}_{k + 1}"] = {m: dict(zip(NAMES_DAVIS, row, strict=True)) for m, row in rows.items()}
    result = {m: {s: float(np.mean([o[m][s] for o in objects.values()])) for s in NAMES_DAVIS} for m in "JF"}
    return {"J&F": (result["J"]["mean"] + result["F"]["mean"]) / 2, **result, "objects": objects}


# ---- cleaning and referring


def fill_holes(mask: np.ndarray, largest: int | None = None) -> np.ndarray:
    """mask (H, W) bool with its holes filled: 4-connected background that does not touch the image border.

    largest: fill holes of at most so many px; None fills all.
    """
    labels, n = ndimage.label(~mask)
    area = np.bincount(labels.ravel(), minlength=n + 1)
    fill = area <= (mask.size if largest is None else largest)
    fill[np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = False
    fill[0] = True  # the mask itself
    return fill[labels]


def referring_scores(inter: np.ndarray, union: np.ndarray) -> dict[str, float]:
    """Scores of E expressions from common and united pixels (E,): oIoU (= cIoU, sums over sums), mIoU, P@0.5..0.9.

    Two empty masks have IoU 1: "no target" predicted rightly. P@X is the share of expressions with IoU > X.
    """
    iou = np.where(union == 0, 1.0, inter / np.maximum(union, 1))
    scores = {"oIoU": float(inter.sum() / union.sum()) if union.sum() else 1.0, "mIoU": float(iou.mean())}
    return scores | {f"P@{x / 10}": float(np.mean(iou > x / 10)) for x in range(5, 10)}
