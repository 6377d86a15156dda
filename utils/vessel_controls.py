"""What stands beside the score of vessel maps: ceiling of a grid, exchanged pictures, an unlearned filter, copies.

prob (H, W) probabilities in 0..1; image (H, W, 3) uint8; pred, truth, fov (H, W) bool. Sa2VA notes, 9 and 11.3.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from utils.vessel_metrics import LEVELS, ImageScore, count, level_counts, score_counts, score_image, score_mask

ROWS = HUMAN, DARKNESS, SHUFFLED, ALL = "human, other observer", "darkness", "shuffled", "all vessel"
MANY_SHIFTS = 31  # exchanges of a set that has more pictures than this


def through_grid(truth: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """truth (H, W) bool averaged over the cells of a grid (rows, columns) and enlarged bilinearly: (H, W) float32.

    At 0.5 it is about the best that a model with logits on that grid draws when it is trained on such targets; logits
    fitted to the full mask get further (Sa2VA notes, section 9). An axis that the grid does not shrink stays as it is.
    """
    rows, columns = (_averaging(n, min(k, n)) for n, k in zip(truth.shape, grid, strict=True))
    small = torch.from_numpy(rows @ truth.astype(np.float32) @ columns.T)[None, None]
    return F.interpolate(small, size=truth.shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def _averaging(n: int, k: int) -> np.ndarray:
    """(k, n) float32: share of each of n pixels in each of k equal cells; rows sum to 1."""
    edges = np.arange(k + 1)[:, None] * (n / k)
    covered = (edges - np.arange(n)).clip(0, 1)  # share of pixel i that lies before edge j
    return (np.diff(covered, axis=0) * (k / n)).astype(np.float32)


def pack(pred: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
    """The three masks at one bit per pixel, for `shuffled`: (their shape, (3, ceil(H W / 8)) uint8)."""
    return truth.shape, np.packbits(np.stack([pred, truth, fov]).reshape(3, -1), axis=1)


def shuffled(packed: list[tuple[tuple[int, int], np.ndarray]]) -> tuple[list[np.ndarray], int]:
    """Counts of prediction i against truth j for every shift j - i, inside both fields of view, and the number of pairs
    left out because their sizes differ. packed: of `pack`. Sets of more than 32 images: 31 shifts spread evenly."""
    n = len(packed)
    shifts = np.unique(np.linspace(1, n - 1, min(n - 1, MANY_SHIFTS)).astype(int)) if n > 1 else []
    pairs = [(packed[i], packed[(i + s) % n]) for s in shifts for i in range(n)]
    same = [(a[1], b[1]) for a, b in pairs if a[0] == b[0]]
    return [_count_bits(a[0], b[1], a[2] & b[2]) for a, b in same], len(pairs) - len(same)


def _count_bits(pred: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """`count` of packed masks."""
    tp, p, t, n = (int(np.bitwise_count(m).sum()) for m in (pred & truth & fov, pred & fov, truth & fov, fov))
    return np.array([tp, p - tp, t - tp, n - p - t + tp], np.int64)


def separates(prob: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> bool:
    """Whether some threshold gives exactly the truth inside fov, or exactly its opposite: the mark of a copied mask.
    False if the field of view holds one class only."""
    inside, outside = prob[truth & fov], prob[~truth & fov]
    if not inside.size or not outside.size:
        return False
    return bool(inside.min() > outside.max() or inside.max() < outside.min())


# ---- an unlearned method


def darkness(image: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """(H, W) float32 in 0..1: how much darker than its surroundings a pixel is in the green channel, where blood shows.

    Difference of Gaussians of H / 640 and H / 125 px (1.5 and 8 px in CHASE_DB1), averaged inside fov only, divided by
    its deviation inside fov, through a sigmoid. Which value means vessel is left to `best_threshold`.
    """
    green, inside = image[..., 1].astype(np.float32), fov.astype(np.float32)
    blurred = []
    for sigma in (len(image) / 640, len(image) / 125):
        weight = ndimage.gaussian_filter(inside, sigma)
        blurred.append(ndimage.gaussian_filter(green * inside, sigma) / np.maximum(weight, 1e-6))
    contrast = (blurred[1] - blurred[0]) * fov
    return (1 / (1 + np.exp(-contrast / max(contrast[fov].std(), 1e-6)))).astype(np.float32)


def best_threshold(levels: np.ndarray) -> float:
    """Threshold with the highest pooled Dice of `level_counts`, to be called with pictures other than those scored."""
    negative, positive = levels[:, ::-1].cumsum(1)[:, ::-1]  # at each level or above
    dice = 2 * positive / np.maximum(positive + negative + positive[0], 1)
    return (int(dice.argmax()) - 0.5) / LEVELS


def darkness_threshold(pictures: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float | None:
    """`best_threshold` of `darkness` on training pictures (image, truth, fov); None if there are none."""
    parts = [level_counts(darkness(image, fov), truth, fov) for image, truth, fov in pictures]
    return best_threshold(sum(parts)) if parts else None


# ---- rows of a table


def control_scores(
    image: np.ndarray,
    truth: np.ndarray,
    fov: np.ndarray,
    other: np.ndarray | None,
    grids: dict[str, tuple[int, int]],
    dark: float | None,
) -> dict[tuple[str, float | None], ImageScore]:
    """{(row, threshold or None): score} of what needs no prediction. other: mask of another observer, dark: threshold
    of `darkness`, neither if None; grids: {name: grid (rows, columns)} whose ceilings are wanted."""
    found: dict[tuple[str, float | None], ImageScore] = {}
    if dark is not None:
        found[DARKNESS, dark] = score_image(darkness(image, fov), truth, fov, dark)
    if other is not None:
        found[HUMAN, None] = score_mask(other, truth, fov)
    for name, grid in grids.items():
        found[f"ceiling, {name} logits", 0.5] = score_image(through_grid(truth, grid), truth, fov)
    return found | {(ALL, None): score_counts(count(fov, truth, fov))}
