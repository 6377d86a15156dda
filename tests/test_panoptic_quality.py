"""utils/panoptic_quality.py: the rules of PQ, VPQ and STQ on grids small enough to count by hand."""

from collections import Counter

import numpy as np
import pytest

from utils import panoptic_quality as pq


def segment(category: int, area: int, crowd: int = 0) -> dict:
    return {"category_id": category, "area": area, "iscrowd": crowd}


def matched(gt, pred, gt_categories: dict, pred_categories: dict, crowds=()) -> dict:
    """Counts of two small maps; categories by id."""
    joint = pq.joint_counts(np.array(gt), np.array(pred))
    pixels = [pq.areas(joint, side) for side in (0, 1)]
    sides = [
        {i: segment(c, pixels[side][i], side == 0 and i in crowds) for i, c in known.items()}
        for side, known in enumerate((gt_categories, pred_categories))
    ]
    return pq.match_segments(joint, *sides)


def test_joint_counts_are_the_counts():
    rng = np.random.default_rng(0)
    gt = np.repeat(rng.integers(0, 5, (20, 6)), 4, axis=1) * 400_000_000
    pred = rng.integers(0, 3, (20, 24)).astype(np.uint8)
    want = Counter(zip(gt.ravel().tolist(), pred.ravel().tolist(), strict=True))
    joint = pq.joint_counts(gt, pred)
    assert joint == want and list(joint) == sorted(want)
    assert pq.areas(joint, 1) == Counter(pred.ravel().tolist())
    halves = [pq.joint_counts(gt[:7], pred[:7]), pq.joint_counts(gt[7:], pred[7:])]
    assert pq.add_joint_counts(halves) == joint
    with pytest.raises(ValueError, match="differ in size"):
        pq.joint_counts(gt, pred.T)
    with pytest.raises(ValueError, match="must lie in"):
        pq.joint_counts(gt - 1, gt)


def test_match_needs_category_and_more_than_half():
    gt, pred = [[1, 1, 1, 1, 2, 2]], [[7, 7, 7, 8, 9, 9]]
    counts = matched(gt, pred, {1: 10, 2: 20}, {7: 10, 8: 10, 9: 30})
    assert counts == {
        10: {"iou": 0.75, "tp": 1, "fp": 1, "fn": 0},
        20: {"iou": 0, "tp": 0, "fp": 0, "fn": 1},
        30: {"iou": 0, "tp": 0, "fp": 1, "fn": 0},
    }
    half = matched([[1, 1]], [[7, 8]], {1: 10}, {7: 10, 8: 10})
    assert half[10]["tp"] == 0  # exactly 0.5 is no match


def test_void_is_left_out_of_unions_and_forgiven():
    counts = matched([[1, 1, 0, 0]], [[7, 7, 7, 7]], {1: 10}, {7: 10})
    assert counts[10] == {"iou": 1, "tp": 1, "fp": 0, "fn": 0}
    counts = matched([[1, 0, 0, 2]], [[0, 7, 7, 7]], {1: 10, 2: 20}, {7: 10})
    assert counts[10]["fp"] == 0  # two of three pixels on void
    counts = matched([[1, 0, 2, 2]], [[0, 7, 7, 7]], {1: 10, 2: 20}, {7: 10})
    assert counts[10]["fp"] == 1


def test_crowds_are_not_found_and_forgive_their_category():
    gt, pred = [[1, 1, 1, 2]], [[7, 7, 7, 0]]
    assert matched(gt, pred, {1: 10, 2: 20}, {7: 10}, crowds=[1]) == {20: {"iou": 0, "tp": 0, "fp": 0, "fn": 1}}
    assert matched(gt, pred, {1: 10, 2: 20}, {7: 30}, crowds=[1])[30]["fp"] == 1


def test_averages():
    counts = {
        1: {"iou": 1.6, "tp": 2, "fp": 0, "fn": 2},
        2: {"iou": 0.9, "tp": 1, "fp": 0, "fn": 0},
        3: {"iou": 0, "tp": 0, "fp": 0, "fn": 0},
    }
    got = pq.panoptic_quality(counts, {1: True, 2: False, 3: False, 4: True})
    assert got["per_class"][1] == pytest.approx({"pq": 1.6 / 3, "sq": 0.8, "rq": 2 / 3}) and 3 not in got["per_class"]
    assert got["All"] == pytest.approx({"pq": (1.6 / 3 + 0.9) / 2, "sq": 0.85, "rq": 5 / 6, "n": 2})
    assert got["All"]["pq"] != pytest.approx(got["All"]["sq"] * got["All"]["rq"])
    assert got["Things"]["n"] == got["Stuff"]["n"] == 1
    nothing = pq.panoptic_quality({}, {1: True})
    assert nothing["All"] == {"pq": None, "sq": None, "rq": None, "n": 0}


def test_tubes_are_matched_as_wholes():
    """An object whose id changes is found in every frame, and in no window across the change."""
    gt, pred = np.ones((4, 1, 4), int), np.array([7, 7, 8, 8])[:, None, None] * np.ones((1, 4), int)
    frames = []
    for g, p in zip(gt, pred, strict=True):
        joint = pq.joint_counts(g, p)
        frames.append((joint, {1: segment(5, 4)}, {p.max(): segment(5, 4)}))
    assert pq.match_tubes(frames, 1) == {5: {"iou": 4, "tp": 4, "fp": 0, "fn": 0}}
    assert pq.match_tubes(frames, 2) == {5: {"iou": 2, "tp": 2, "fp": 2, "fn": 1}}
    assert pq.match_tubes(frames, 5) == {}
    got = pq.video_panoptic_quality([frames, frames], {5: True}, (1, 2))
    assert got["VPQ"]["All"] == pytest.approx((1 + 2 / (2 + 1.5)) / 2) and got["VPQ"]["Stuff"] is None
    assert frames[0][1][1]["area"] == 4  # inputs are as they were


def test_stq_crowds_ignored_pixels_and_errors():
    def label(c, i=0):
        return (c << 16) + i

    def score(*pred):
        joint = pq.joint_counts(np.array(gt), np.array(pred))
        return pq.segmentation_tracking_quality({"a": joint}, 2, [0], 255)

    gt = [label(0, 1), label(0, 1), label(0, 0), label(255), label(1)]
    # on the crowd nothing counts; on ignored pixels only the area of the predicted tube: IoU 2/3 of the only tube
    got = score(label(0, 9), label(0, 9), label(0, 9), label(0, 9), label(1))
    assert got["IoU"] == 1 and got["AQ"] == pytest.approx(2 / 3) and got["STQ"] == pytest.approx((2 / 3) ** 0.5)
    assert got["videos"] == {"a": {k: got[k] for k in ("STQ", "AQ", "IoU")}}
    # two halves of the tube, one of them with the ignored pixel too: (1 * 1/2 + 1 * 1/3) / 2
    got = score(label(0, 8), label(0, 9), label(0, 9), label(0, 9), label(1))
    assert got["IoU"] == 1 and got["AQ"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    got = score(label(255), label(0, 9), label(0, 9), label(1), label(1))
    assert got["IoU"] == pytest.approx((2 / 3 + 1 + 0) / 3)  # predicting ignored is one more class
    assert got["AQ"] == pytest.approx(1 / 2 * 1 / 2)  # one pixel of two, IoU 1/2
    with pytest.raises(ValueError, match="class 7"):
        pq.segmentation_tracking_quality({"a": Counter({(label(7, 1), 0): 1})}, 2, [0], 255)


def test_mean_iou_names_absent_classes():
    got = pq.mean_iou(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]))
    assert got["mIoU"] == pytest.approx(0.375) and got["absent"] == [1, 2] and np.isnan(got["IoU"][2])
    assert np.isnan(pq.mean_iou(np.zeros((2, 2)))["mIoU"])
