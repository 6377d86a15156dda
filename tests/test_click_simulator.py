"""Simulated clicks: where they fall, what the user may know, and the scores that are read from the rounds."""

import numpy as np
import pytest

from utils.click_simulator import ClickSimulator, click_rounds, clicked_discs, deepest, interactive_scores, next_click


def brute_depth(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel of region to the nearest pixel outside it, the ring around the picture included."""
    wide = np.pad(region, 1)
    ends = np.argwhere(~wide)
    depth = np.zeros(wide.shape)
    for y, x in np.argwhere(wide):
        depth[y, x] = np.hypot(ends[:, 0] - y, ends[:, 1] - x).min()
    return depth[1:-1, 1:-1]


def blob(seed: int, size=(13, 17)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = sum(np.roll(rng.random(size), k, axis) for k in (-1, 0, 1) for axis in (0, 1))
    return smooth > np.median(smooth)


def square(x0, y0, x1, y1, size=(20, 30)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_deepest_equals_brute_force():
    for seed in range(20):
        region = blob(seed)
        depth = brute_depth(region)
        found, (x, y) = deepest(region)
        assert found == pytest.approx(depth.max()) and (y, x) == np.unravel_index(depth.argmax(), depth.shape)
        second, (u, v) = deepest(region, [(x, y)])
        depth[y, x] = 0
        assert second == pytest.approx(depth.max()) and (v, u) == np.unravel_index(depth.argmax(), depth.shape)


def test_border_of_the_picture_is_an_end():
    assert deepest(np.ones((5, 9), bool)) == (3.0, (2, 2))
    assert deepest(np.zeros((5, 9), bool))[0] == 0


def test_first_click_is_on_the_object_at_its_deepest_point():
    assert next_click(square(10, 5, 15, 10), np.zeros((20, 30), bool)) == (12, 7, 1)


def test_next_click_goes_to_the_deeper_error():
    target = square(0, 0, 10, 10)
    assert next_click(target, target | square(20, 3, 29, 12)) == (24, 7, 0)  # too much: beside the object
    assert next_click(target, square(0, 0, 3, 10))[2] == 1  # too little
    both = square(0, 0, 9, 10) | square(20, 3, 25, 8)  # one column is missing, 5 x 5 px are too many
    assert next_click(target, both) == (22, 5, 0)
    assert next_click(target, target) is None


def test_void_is_never_clicked_and_never_counts():
    target, pred = square(0, 0, 10, 10), square(0, 0, 10, 10) | square(20, 3, 29, 12)
    counts = ~square(20, 3, 29, 12)
    assert next_click(target, pred, counts) is None
    simulator = ClickSimulator(target[None], counts)
    assert simulator.show(pred[None]).tolist() == [1.0]
    hidden = square(0, 0, 8, 10)  # what is left of the object is clicked, where it is deepest
    assert next_click(target, np.zeros_like(target), ~hidden) == (8, 0, 1)


def test_no_point_twice():
    target = square(4, 4, 5, 6)  # two pixels
    simulator = ClickSimulator(target[None])
    for _ in range(3):
        simulator.show(np.zeros((1, 20, 30), bool))
    points, labels = simulator.points()
    assert labels.tolist() == [[1, 1, -1, -1]]
    assert points[0, :2].tolist() == [[4, 4], [4, 5]]


def test_simulator_hands_over_points_and_iou_only():
    targets = np.stack([square(0, 0, 10, 10), square(10, 10, 16, 20)])
    simulator = ClickSimulator(targets)
    points, labels = simulator.points()
    assert points.shape == (2, 1, 2) and points.dtype == np.float32 and labels.tolist() == [[1], [1]]
    assert targets[[0, 1], points[:, 0, 1].astype(int), points[:, 0, 0].astype(int)].all()
    ious = simulator.show(np.stack([targets[0], square(10, 10, 13, 20)]))
    assert ious.tolist() == [1.0, 0.5]
    points, labels = simulator.points()
    assert labels.tolist() == [[1, -1], [1, 1]] and 13 <= points[1, 1, 0] < 16
    assert [name for name in vars(simulator) if not name.startswith("_")] == []
    with pytest.raises(ValueError, match="expected"):
        simulator.show(np.zeros((1, 20, 30), bool))


def test_clicks_lead_a_perfect_answerer_to_the_object():
    """Who fills the marked cells of a 5 px grid is corrected click by click until nothing is wrong."""
    target = square(5, 5, 20, 15)
    simulator = ClickSimulator(target[None])
    rounds = []
    for _ in range(10):
        points, labels = simulator.points()
        pred = np.zeros((20, 30), bool)
        for (x, y), label in zip(points[0].astype(int), labels[0], strict=True):
            if label != -1:
                pred[y // 5 * 5 : y // 5 * 5 + 5, x // 5 * 5 : x // 5 * 5 + 5] = label
        rounds.append(simulator.show(pred[None])[0])
    assert rounds[5] == 1.0 and rounds == sorted(rounds)


def test_an_object_in_the_void_is_refused():
    with pytest.raises(ValueError, match="object 1 of 2"):
        ClickSimulator(np.stack([square(0, 0, 3, 3), square(5, 5, 8, 8)]), ~square(5, 5, 8, 8))


def test_scores():
    ious = np.array([[0.5, 0.86, 0.86, 0.91, 0.7, 0.95], [0.9, 0.2, 0.3, 0.4, 0.5, 0.6], [0.1] * 6])
    scores = interactive_scores(ious)
    assert scores["mIoU@1"] == pytest.approx(0.5) and scores["mIoU@3"] == pytest.approx((0.86 + 0.3 + 0.1) / 3)
    assert scores["mIoU@5"] == pytest.approx((0.7 + 0.5 + 0.1) / 3)
    assert scores["NoC@85"] == pytest.approx((2 + 1 + 6) / 3) and scores["NoC@90"] == pytest.approx((4 + 1 + 6) / 3)
    assert scores["failed@85"] == pytest.approx(1 / 3)
    assert "mIoU@5" not in interactive_scores(ious[:, :4])
    with pytest.raises(ValueError, match="0 objects"):
        interactive_scores(ious[:0])


def test_discs_keep_away_from_clicks_beside():
    points = np.array([[[10, 10], [14, 10], [0, 0]]], np.float32)
    mask = clicked_discs(points, np.array([[1, 0, -1]]), (20, 30), 4)[0]
    assert mask[10, 10] and mask[10, 6] and mask[10, 11] and mask[6, 10]
    assert not mask[10, 5] and not mask[10, 12] and not mask[10, 14] and not mask[0, 0]


def test_first_click_drawn_evenly():
    target = square(4, 4, 6, 6)
    drawn = [tuple(ClickSimulator(target[None], rng=np.random.default_rng(k)).points()[0][0, 0]) for k in range(200)]
    counts = [drawn.count(p) for p in ((4, 4), (5, 4), (4, 5), (5, 5))]
    assert sum(counts) == 200 and min(counts) > 25


def test_rounds_leave_an_object_alone_once_no_score_depends_on_it():
    """One object is found at the second click, the other never is."""
    targets, asked = np.stack([square(0, 0, 10, 10), square(12, 0, 22, 10)]), []

    def answer(points, labels):
        asked.append(len(points))
        right = square(0, 0, 10, 10) if labels.shape[1] > 1 else square(0, 0, 5, 10)
        return np.stack([right, square(12, 0, 14, 10)])[-len(points) :]

    ious = click_rounds(ClickSimulator(targets), answer, 8)
    assert asked == [2] * 5 + [1] * 3
    assert ious.tolist() == [[0.5] + [1.0] * 7, [0.2] * 8]
    asked.clear()
    alone = click_rounds(ClickSimulator(targets[1:]), lambda p, _: [asked.append(len(p)), targets[1:]][1], 8)
    assert alone.tolist() == [[1.0] * 8] and asked == [1] * 5
