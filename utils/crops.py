"""Overlapping crops of a large picture, and one picture out of what was computed on them.

Boxes are x0, y0, x1, y1 in px, x1 and y1 exclusive; all crops of a picture have one size. Shapes: N crops of h x w px,
picture H x W. Blending by a Gaussian around each crop's centre follows nnU-Net's sliding window (sigma: an eighth of
the side): what a network says near the border of its crop, where it saw little around, counts little.
"""

import math

import numpy as np


def crop_size(height: int, width: int, n: int, overlap: float) -> tuple[int, int]:
    """(h, w) of the crops of which n x n, overlapping by the share `overlap` of their side, cover height x width px."""
    if n < 1 or not 0 <= overlap < 1:
        raise ValueError(f"crop_size: n {n}, overlap {overlap}; expected n >= 1 and 0 <= overlap < 1")
    return tuple(math.ceil(side / (n - (n - 1) * overlap)) for side in (height, width))


def crop_grid(height: int, width: int, size: int | tuple[int, int], overlap: float = 0.25) -> np.ndarray:
    """Boxes (N, 4) int64, row by row, that cover a picture: evenly spread, the fewest of which neighbours share
    `overlap` of their side (less at most 1 px, because boxes are whole px).

    size: side in px, or (h, w); a side of the picture that is shorter is covered by crops of just that length.
    """
    h, w = (size, size) if isinstance(size, int) else size
    if min(height, width, h, w) < 1 or not 0 <= overlap < 1:
        raise ValueError(f"crop_grid: {height} x {width} px, size {size}, overlap {overlap}; expected 0 <= overlap < 1")
    h, w = min(h, height), min(w, width)
    ys, xs = _starts(height, h, overlap), _starts(width, w, overlap)
    return np.array([(x, y, x + w, y + h) for y in ys for x in xs], np.int64)


def _starts(side: int, crop: int, overlap: float) -> list[int]:
    """Where crops begin along one side: the fewest that overlap enough."""
    n = math.ceil((side - crop) / max(1.0, crop * (1 - overlap)) - 1e-9) + 1
    return np.linspace(0, side - crop, n).round().astype(int).tolist()


def cut(picture: np.ndarray, boxes: np.ndarray) -> list[np.ndarray]:
    """Crops, as views, of a picture (H, W) or (H, W, C)."""
    return [picture[y0:y1, x0:x1] for x0, y0, x1, y1 in np.asarray(boxes).tolist()]


def window(h: int, w: int, sigma: float = 0.125) -> np.ndarray:
    """Weights (h, w) float64 in (0, 1]: a Gaussian around the centre; sigma is a share of each side."""
    y, x = ((np.arange(side) - (side - 1) / 2) / (sigma * side) for side in (h, w))
    return np.exp(-0.5 * (y[:, None] ** 2 + x**2))


def blend(crops: np.ndarray, boxes: np.ndarray, size: tuple[int, int], sigma: float = 0.125) -> np.ndarray:
    """Weighted mean of crops (N, ..., h, w) float where they overlap -> (..., H, W) float32.

    boxes (N, 4) as of `crop_grid`; size (H, W). ValueError when a crop has another size than its box, a box leaves the
    picture or a pixel is in no crop.
    """
    crops, boxes = np.asarray(crops), np.asarray(boxes)
    H, W = size
    h, w = crops.shape[-2:]
    fits = ((boxes[:, 2:] - boxes[:, :2] == (w, h)).all(), (boxes[:, :2] >= 0).all(), (boxes[:, 2:] <= (W, H)).all())
    if len(crops) != len(boxes) or not all(fits):
        raise ValueError(f"blend: crops {crops.shape} do not fit {len(boxes)} boxes in a picture of {H} x {W} px")
    total, weights = np.zeros((*crops.shape[1:-2], H, W)), np.zeros((H, W))
    weight = window(h, w, sigma)
    for crop, (x0, y0, x1, y1) in zip(crops, boxes.tolist(), strict=True):
        total[..., y0:y1, x0:x1] += crop * weight
        weights[y0:y1, x0:x1] += weight
    if not weights.all():
        raise ValueError(f"blend: {np.count_nonzero(weights == 0)} of {H} x {W} px lie in no crop")
    return (total / weights).astype(np.float32)
