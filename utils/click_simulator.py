"""A user who corrects masks by clicks, for interactive evaluation: sees the labels, hands over points only.

The next click goes where the error is deepest: of the missing pixels and of the wrongly marked ones, the point that is
farthest from the end of its region (exact Euclidean distance transform; outside the picture counts as an end); on the
object (1) where pixels are missing, beside it (0) where they are too many. The first click is thus the deepest point of
the object, as in COCO-SAM. A pixel is clicked once.
Sources: Xu et al., RAP-SAM, ICLR 2025 (first click); Sofiiuk et al., RITM, ICIP 2022 (next clicks, NoC); without their
approximations of the distance.

Shapes: P objects of one image, n clicks of each, H W image, R rounds. Points are x y in px, pixel centres whole.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage

POINT, BESIDE, NO_POINT = 1, 0, -1  # labels of clicks; -1: the mask was perfect, nothing to click
ROUNDS, LEVELS = (1, 3, 5), (85, 90)  # clicks after which IoU is reported; percent of NoC


def deepest(region: np.ndarray, clicked: list[tuple[int, int]] = ()) -> tuple[float, tuple[int, int]]:
    """(depth in px, (x, y)) of the innermost pixel of region (H, W) bool that is not clicked; the first in reading
    order of several; depth 0 when there is none."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return 0.0, (0, 0)
    top, left = rows[0], columns[0]
    part = np.pad(region[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    depth = ndimage.distance_transform_edt(part)[1:-1, 1:-1]
    for x, y in clicked:
        if 0 <= y - top < depth.shape[0] and 0 <= x - left < depth.shape[1]:
            depth[y - top, x - left] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(depth[y, x]), (int(x + left), int(y + top))


def next_click(
    target: np.ndarray, pred: np.ndarray, counts: np.ndarray | None = None, clicked: list[tuple[int, int]] = ()
) -> tuple[int, int, int] | None:
    """(x, y, label) of the click that corrects pred to target, both (H, W) bool; None when no pixel to click is left.

    counts (H, W) bool: pixels that count (not void); clicked: points that are not taken again.
    """
    counts = True if counts is None else counts
    missing, point = deepest(target & ~pred & counts, clicked)
    surplus, beside = deepest(pred & ~target & counts, clicked)
    if max(missing, surplus) == 0:
        return None
    return (*point, POINT) if missing > surplus else (*beside, BESIDE)


def drawn(region: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int]:
    """(x, y, POINT): one of the pixels of region (H, W) bool, each as likely."""
    y, x = np.nonzero(region)
    k = rng.integers(len(y))
    return int(x[k]), int(y[k]), POINT


class ClickSimulator:
    """Clicks on the objects of one image. targets (P, H, W) bool; counts (H, W) bool: pixels that count; rng: draws the
    first click evenly from the pixels of the object, instead of taking its deepest point.

    `points()` gives the clicks so far, `show(pred)` returns the IoU of each mask and adds a click to each object,
    `keep(which)` goes on with these objects only. ValueError for an object without a pixel that counts.
    """

    def __init__(self, targets: np.ndarray, counts: np.ndarray | None = None, rng: np.random.Generator | None = None):
        self._counts = np.ones(targets.shape[1:], bool) if counts is None else counts
        self._targets = targets & self._counts
        empty = np.flatnonzero(~self._targets.any((1, 2)))
        if len(empty):
            raise ValueError(f"ClickSimulator: object {empty[0]} of {len(targets)} has no pixel that counts")
        self._clicks = [[next_click(t, np.zeros_like(t)) if rng is None else drawn(t, rng)] for t in self._targets]

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """x y (P, n, 2) float32 and labels (P, n) int64 of all clicks so far."""
        filled = [[(0, 0, NO_POINT) if c is None else c for c in clicks] for clicks in self._clicks]
        every = np.array(filled, np.int64)  # (P, n, 3)
        return every[..., :2].astype(np.float32), every[..., 2]

    def show(self, pred: np.ndarray) -> np.ndarray:
        """pred (P, H, W) bool, an answer to `points()` -> IoU (P,); then each object has one click more."""
        if pred.shape != self._targets.shape:
            raise ValueError(f"ClickSimulator: masks {pred.shape}, expected {self._targets.shape}")
        inter = (pred & self._targets).sum((1, 2))
        union = ((pred & self._counts) | self._targets).sum((1, 2))
        for target, mask, clicks in zip(self._targets, pred, self._clicks, strict=True):
            clicks.append(next_click(target, mask, self._counts, [c[:2] for c in clicks if c is not None]))
        return inter / union

    def keep(self, which: np.ndarray) -> None:
        """which (P,) bool, at least one True."""
        self._targets = self._targets[which]
        self._clicks = [clicks for clicks, stays in zip(self._clicks, which, strict=True) if stays]


def click_rounds(simulator: ClickSimulator, answer: Callable, rounds: int) -> np.ndarray:
    """IoU (P, rounds) of each object after 1..rounds clicks. answer: points (P, n, 2), labels (P, n) -> masks (P, H, W)
    bool. From the largest of ROUNDS on, who has reached the highest of LEVELS is left as it is: no score depends on it."""
    ious = np.zeros((len(simulator.points()[0]), rounds))
    todo = np.arange(len(ious))
    for k in range(rounds):
        ious[todo, k:] = simulator.show(answer(*simulator.points()))[:, None]
        going = (ious[todo, k] < max(LEVELS) / 100) | (k + 1 < max(ROUNDS))
        if not going.any():
            break
        todo = todo[going]
        simulator.keep(going)
    return ious


def interactive_scores(ious: np.ndarray) -> dict[str, float]:
    """ious (P, R): of each object after 1..R clicks -> mIoU@1, @3, @5 (those <= R), NoC@85, NoC@90: mean number of
    clicks to reach that IoU, R where it is never reached, and the share of such objects, failed@85, failed@90.
    ValueError for no object."""
    P, R = ious.shape
    if not P or not R:
        raise ValueError(f"interactive_scores: {P} objects, {R} clicks; expected at least one of each")
    scores = {f"mIoU@{k}": float(ious[:, k - 1].mean()) for k in ROUNDS if k <= R}
    for level in LEVELS:
        reached = ious >= level / 100
        scores[f"NoC@{level}"] = float(np.where(reached.any(1), reached.argmax(1) + 1, R).mean())
        scores[f"failed@{level}"] = float(1 - reached.any(1).mean())
    return scores


def clicked_discs(points_px: np.ndarray, labels: np.ndarray, size: tuple[int, int], radius: float) -> np.ndarray:
    """Trivial baseline: the pixels at most `radius` px from a click on the object and nearer to it than to any click
    beside it. points_px (P, n, 2), labels (P, n), size (H, W) -> (P, H, W) bool."""
    y, x = np.mgrid[: size[0], : size[1]]
    far = np.hypot(*size) + radius
    masks = np.zeros((len(points_px), *size), bool)
    for mask, points, kinds in zip(masks, points_px, labels, strict=True):
        near = {POINT: np.full(size, far), BESIDE: np.full(size, far)}  # px to the nearest click of a kind
        for (px, py), kind in zip(points, kinds, strict=True):
            if kind != NO_POINT:
                np.minimum(near[kind], np.hypot(x - px, y - py), out=near[kind])
        mask[:] = (near[POINT] <= radius) & (near[POINT] < near[BESIDE])
    return masks
