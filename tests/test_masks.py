"""utils/masks.py against slow definitions, and its edge cases."""

import numpy as np
import pytest
from scipy import ndimage

from utils import masks as m

rng = np.random.default_rng(0)


def blobs(n: int, height: int, width: int) -> np.ndarray:
    """n smooth random masks (n, H, W)."""
    noise = np.random.default_rng(n + height).normal(size=(n, height, width))
    return ndimage.gaussian_filter(noise, (0, 3, 3)) > 0.05


def test_codes_are_cocos_and_come_back():
    masks = blobs(3, 20, 31)
    codes = m.rle_encode(masks)
    assert codes[0]["size"] == [20, 31] and isinstance(codes[0]["counts"], str)
    np.testing.assert_array_equal(m.rle_decode(codes), masks)
    np.testing.assert_array_equal(m.rle_decode(codes[1]), masks[1])
    np.testing.assert_array_equal(m.rle_area(codes), masks.sum((1, 2)))
    column_first = np.zeros((2, 3), bool)
    column_first[0, 1] = True
    # runs of 0s and 1s down the columns: 2 zeros, 1 one, 3 zeros
    assert m.to_rle({"size": [2, 3], "counts": [2, 1, 3]}, 2, 3) == m.rle_encode(column_first)
    assert m.rle_box(m.rle_encode(column_first)) == [1, 0, 1, 1]
    with pytest.raises(ValueError, match="empty list"):
        m.rle_decode([])


def test_polygons_and_foreign_codes():
    square = m.rle_decode(m.to_rle([[2, 1, 6, 1, 6, 4, 2, 4]], 8, 10))
    assert square.sum() == 12 and square[1:4, 2:6].all()
    two = m.to_rle([[0, 0, 2, 0, 2, 2, 0, 2], [5, 5, 7, 5, 7, 7, 5, 7]], 8, 10)
    assert m.rle_area(two) == 8
    assert m.rle_area(m.to_rle([], 8, 10)) == 0
    as_bytes = {"size": [8, 10], "counts": two["counts"].encode("ascii")}
    assert m.to_rle(as_bytes, 8, 10) == two and isinstance(as_bytes["counts"], bytes)
    with pytest.raises(ValueError, match="8 x 10 .* expected 10 x 8"):
        m.to_rle(two, 10, 8)


def test_iou_and_intersections_are_exact():
    a, b = blobs(4, 37, 41), blobs(3, 37, 41)
    a[2] = False
    inter = (a[:, None] & b).sum((2, 3))
    union = (a[:, None] | b).sum((2, 3))
    np.testing.assert_array_equal(m.mask_iou(a, b), inter / union)
    np.testing.assert_array_equal(m.rle_intersections(m.rle_encode(a), m.rle_encode(b)), inter)
    assert m.rle_intersections([], m.rle_encode(b)).shape == (0, 3)
    empty = np.zeros((1, 5, 5), bool)
    assert m.mask_iou(empty, empty) == 0 and m.jaccard(empty, empty) == 1
    with pytest.raises(ValueError, match="different sizes"):
        m.rle_intersections(m.rle_encode(a), m.rle_encode(empty))


def test_nms_keeps_the_best_of_what_overlaps():
    masks = np.zeros((4, 10, 10), bool)
    masks[0, :5], masks[1, :6], masks[2, 7:], masks[3, :4] = True, True, True, True  # IoU 0|1 5/6, 0|3 4/5, 1|3 4/6
    assert m.mask_nms(masks, np.array([0.5, 0.9, 0.1, 0.7]), 0.7).tolist() == [1, 3, 2]
    assert m.mask_nms(masks, np.array([0.9, 0.5, 0.1, 0.7]), 0.7).tolist() == [0, 2]
    assert m.mask_nms(masks, np.array([0.9, 0.9, 0.9, 0.9]), 1.0).tolist() == [0, 1, 2, 3]
    assert m.mask_nms(masks[:0], np.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize("height, width, radius", [(30, 40, 1), (23, 57, 4), (9, 9, 12)])
def test_matched_is_a_dilation_by_a_disk(height, width, radius):
    points, near = rng.random((2, height, width)) > np.array([0.5, 0.98])[:, None, None]
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    grown = ndimage.binary_dilation(near, y**2 + x**2 <= radius**2) if near.any() else near
    assert m.matched(points, near, radius) == (points & grown).sum()


def test_boundary_of_a_square():
    mask = np.zeros((5, 5), bool)
    mask[1:3, 1:3] = True
    drawn = [[1, 1, 1, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(m.boundary(mask), np.array(drawn, bool))
    assert not m.boundary(np.ones((4, 6), bool)).any()  # a full image has no boundary


def test_f_of_empty_masks_and_void():
    a, b = blobs(2, 60, 80)
    empty = np.zeros_like(a)
    assert m.boundary_f(a, a) == 1 and m.boundary_f(empty, empty) == 1
    assert m.boundary_f(a, empty) == 0 and m.boundary_f(empty, a) == 0
    assert 0 < m.boundary_f(a, b) < 1
    assert m.boundary_f(a, b, tolerance=100) == 1  # px: everything is near
    void = np.ones_like(a)
    assert m.jaccard(a, b, void) == 1 and m.boundary_f(a, b, void) == 1
    half = np.zeros_like(a)
    half[:, 40:] = True
    changed = np.where(half, ~b, b)
    assert m.jaccard(a, b, half) == m.jaccard(a, changed, half) != m.jaccard(a, changed)


def test_statistics():
    mean, recall, decay = m.sequence_statistics(np.array([1, 1, 0.8, 0.6, 0.6, 0.4, 0.2, 0.2]))
    assert (mean, recall) == pytest.approx((0.6, 5 / 8))
    assert decay == pytest.approx((1 + 1 + 0.8) / 3 - (0.4 + 0.2 + 0.2) / 3)
    values = np.linspace(1, 0, 1000)  # frame numbers beyond 8 bits
    assert m.sequence_statistics(values)[2] == pytest.approx(0.75, abs=0.01)


def test_davis_sequence_and_its_means():
    gt = np.zeros((5, 40, 40), np.uint8)
    gt[:, 5:20, 5:20], gt[:, 25:35, 5:30] = 1, 2
    gt[2:, :3] = 3  # later than the first frame: background
    pred = np.where(gt == 1, 1, 0).astype(np.uint8)
    J, F = m.davis_objects(gt, pred)
    assert J.tolist() == [[1, 1, 1], [0, 0, 0]] == F.tolist()
    pred[0], pred[-1] = 2, 2  # neither is scored
    summary = m.davis_summary({"a": m.davis_objects(gt, pred), "b": (J[:1], F[:1])})
    assert summary["J&F"] == pytest.approx(2 / 3)  # mean over three objects, not over two sequences
    assert (
        summary["objects"]["a_2"]["J"] == {"mean": 0, "recall": 0, "decay": 0} and list(summary["objects"])[2] == "b_1"
    )
    gt[:, :4, 20:] = 255
    pred[:, :4, 20:] = 1  # on void
    J, F = m.davis_objects(gt, pred)
    assert J[0].tolist() == F[0].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="has object 4, the first frame of gt has 2"):
        m.davis_objects(gt, np.full_like(gt, 4))
    with pytest.raises(ValueError, match="at least 3 frames"):
        m.davis_objects(gt[:2], pred[:2])
    with pytest.raises(ValueError, match="equal shapes"):
        m.davis_objects(gt, pred[:, 1:])


def test_holes_are_filled_and_bays_are_not():
    mask = np.zeros((12, 12), bool)
    mask[2:10, 2:10] = True
    mask[4:6, 4:6] = False  # a hole of 4 px
    mask[8, 8] = False  # a hole of 1 px
    mask[2:4, 6] = False  # a bay
    filled = m.fill_holes(mask)
    assert filled.sum() == mask.sum() + 5 and not filled[2, 6] and filled[8, 8] and filled[4, 4]
    assert m.fill_holes(mask, 3).sum() == mask.sum() + 1
    assert m.fill_holes(mask, 0).sum() == mask.sum()
    frame = np.ones((5, 6), bool)
    for place in ((0, 2), (4, 2), (2, 0), (2, 5)):  # a gap at each side of the image is no hole
        gap = frame.copy()
        gap[place] = False
        assert not m.fill_holes(gap)[place]
    for full in (True, False):
        np.testing.assert_array_equal(m.fill_holes(np.full((4, 5), full)), np.full((4, 5), full))


def test_referring_scores():
    scores = m.referring_scores(np.array([10, 0, 90]), np.array([10, 20, 100]))
    assert scores["oIoU"] == pytest.approx(100 / 130) and scores["mIoU"] == pytest.approx(1.9 / 3)
    assert scores["P@0.5"] == pytest.approx(2 / 3) and scores["P@0.9"] == pytest.approx(1 / 3)
    assert m.referring_scores(np.array([0]), np.array([0])) == dict.fromkeys(scores, 1.0)
