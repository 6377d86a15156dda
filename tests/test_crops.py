"""utils/crops.py: crops cover every picture, and blending gives back what they were cut from."""

import numpy as np
import pytest

from utils.crops import blend, crop_grid, crop_size, cut, window

SIZES = [(960, 999), (584, 565), (40, 300), (7, 5), (64, 64), (65, 64)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 16, 64, (48, 80)])
@pytest.mark.parametrize("H, W", SIZES)
def test_crops_cover_the_picture_and_overlap(H, W, size, overlap):
    if size == 1:
        H, W = min(H, 12), min(W, 12)  # not a million crops of one pixel
    boxes = crop_grid(H, W, size, overlap)
    h, w = (min(a, b) for a, b in zip((size, size) if isinstance(size, int) else size, (H, W), strict=True))
    assert {(y1 - y0, x1 - x0) for x0, y0, x1, y1 in boxes.tolist()} == {(h, w)}
    for side, crop, starts in ((W, w, boxes[:, 0]), (H, h, boxes[:, 1])):
        starts = np.unique(starts)
        assert starts[0] == 0 and starts[-1] + crop == side
        shared = crop - np.diff(starts)
        assert (shared >= overlap * crop - 1).all() or crop == 1  # starts are whole px
        step = max(1, crop * (1 - overlap))
        assert (len(starts) - 2) * step < side - crop or len(starts) == 1  # one crop less would overlap too little


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("H, W", SIZES)
def test_n_by_n_crops(H, W, n, overlap):
    size = crop_size(H, W, n, overlap)
    assert len(crop_grid(H, W, size, overlap)) == n * n or min(H, W) < 16  # tiny sides are rounded up to more overlap
    assert n > 1 or size == (H, W)


@pytest.mark.parametrize("H, W", SIZES)
def test_blending_cut_crops_gives_the_picture_back(H, W):
    picture = np.random.default_rng(0).standard_normal((H, W)).astype(np.float32)
    boxes = crop_grid(H, W, crop_size(H, W, 3, 0.25), 0.25)
    np.testing.assert_allclose(blend(np.stack(cut(picture, boxes)), boxes, (H, W)), picture, atol=1e-5)


def test_blending_leading_axes_and_values():
    boxes = np.array([[0, 0, 6, 4], [4, 0, 10, 4]])
    crops = np.stack([np.zeros((2, 4, 6)), np.ones((2, 4, 6))])
    crops[:, 1] += 5
    out = blend(crops, boxes, (4, 10))
    assert out.shape == (2, 4, 10) and out.dtype == np.float32
    np.testing.assert_allclose(out[1], out[0] + 5, atol=1e-5)
    assert (out[0, :, :4] == 0).all() and (out[0, :, 6:] == 1).all()
    left, right = window(4, 6)[0, 4], window(4, 6)[0, 0]
    np.testing.assert_allclose(out[0, :, 4], right / (left + right), atol=1e-6)
    assert (np.diff(out[0, 0, 3:7]) > 0).all()  # from one crop to the other without a step back


def test_window_peaks_at_the_centre_of_each_side():
    w = window(5, 9, 0.25)
    assert w.argmax() == w.size // 2 and (w > 0).all() and w.max() == 1
    np.testing.assert_allclose(w, w[::-1, ::-1])
    np.testing.assert_allclose(w[2, 4 + 2], np.exp(-0.5 * (2 / (0.25 * 9)) ** 2))


@pytest.mark.parametrize(
    "boxes, size",
    [
        ([[0, 0, 4, 4]], (4, 5)),  # a column in no crop
        ([[0, 0, 5, 4]], (4, 5)),  # another width than the crop
        ([[1, 0, 5, 4]], (4, 4)),  # beyond the picture
        ([[-1, 0, 3, 4]], (4, 3)),
        ([[0, 0, 4, 4], [0, 0, 4, 4]], (4, 4)),  # more boxes than crops
    ],
)
def test_blend_refuses_what_does_not_fit(boxes, size):
    with pytest.raises(ValueError, match="blend: "):
        blend(np.zeros((1, 4, 4)), np.array(boxes), size)


@pytest.mark.parametrize("args", [(10, 10, 4, 1.0), (10, 10, 4, -0.1), (0, 10, 4, 0.0), (10, 10, 0, 0.0)])
def test_grid_refuses_impossible_sizes(args):
    with pytest.raises(ValueError, match="crop_grid"):
        crop_grid(*args)
    with pytest.raises(ValueError, match="crop_size"):
        crop_size(10, 10, 0, 0.25)
