"""utils/vessel_controls.py: what stands beside a score is what its name says."""

import numpy as np
import pytest

from utils import vessel_controls as vc
from utils import vessel_metrics as vm

H, W = 24, 30


def everywhere():
    return np.ones((H, W), bool)


def line(row: int, thick: int = 1) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[row : row + thick, 3:27] = True
    return mask


def random_case(seed=0, ties=True):
    g = np.random.default_rng(seed)
    truth, fov = g.random((H, W)) < 0.2, g.random((H, W)) < 0.8
    prob = (0.3 * truth + 0.7 * g.random((H, W))).clip(0, 1)
    return np.round(prob, 1) if ties else prob, truth, fov


def test_through_grid():
    mask = random_case()[1]
    assert np.array_equal(vc.through_grid(mask, (H, W)), mask)
    assert np.array_equal(vc.through_grid(mask, (H + 7, 3 * W - 5)), mask)  # a grid never sharpens
    assert vc.through_grid(mask, (1, 1)) == pytest.approx(mask.mean())
    assert vc.through_grid(mask, (12, 15)).shape == (H, W)
    uneven = vc.through_grid(mask, (7, 1))[0, 0]  # 24 rows in 7 cells: the first covers 3 rows and 3/7 of the fourth
    assert uneven == pytest.approx((mask[:3].sum() + mask[3].sum() * 3 / 7) / (24 / 7 * W), rel=1e-5)
    thick = vc.through_grid(line(8, 6), (12, 15)) > 0.5
    assert vm.overlap(vm.count(thick, line(8, 6), everywhere()))["Dice"] > 0.95


def test_shuffled_pairs():
    def shuffled(preds, truths, fovs):
        return vc.shuffled([vc.pack(*x) for x in zip(preds, truths, fovs, strict=True)])

    truths, fovs = [line(k) for k in (1, 5, 9)], [everywhere()] * 3
    counts, left_out = shuffled(truths, truths, fovs)
    assert len(counts) == 6 and left_out == 0 and sum(c[0] for c in counts) == 0
    counts, _ = shuffled(truths, [truths[k] for k in (2, 0, 1)], fovs)  # each prediction meets its truth once
    assert sum(c[0] for c in counts) == 3 * 24
    fovs[0] = line(1)
    assert sorted(c.sum() for c in shuffled(truths, truths, fovs)[0]) == [24] * 4 + [H * W] * 2
    assert shuffled(truths[:1], truths[:1], fovs[:1]) == ([], 0)
    small = [*truths[:2], truths[2][:5]]
    assert shuffled(small, small, [everywhere(), everywhere(), everywhere()[:5]])[1] == 4
    many = [np.eye(3, dtype=bool)] * 40  # 9 pixels: the last byte is not full
    counts = shuffled(many, many, many)[0]
    assert len(counts) == 31 * 40 and counts[0].tolist() == [3, 0, 0, 0]


def test_shuffled_counts_equal_those_of_masks():
    images = [random_case(seed) for seed in range(3)]
    counts, _ = vc.shuffled([vc.pack(p > 0.5, t, f) for p, t, f in images])
    want = [(i, (i + s) % 3) for s in (1, 2) for i in range(3)]
    for got, (i, j) in zip(counts, want, strict=True):
        assert got.tolist() == vm.count(images[i][0] > 0.5, images[j][1], images[i][2] & images[j][2]).tolist()


def test_separates_copies_and_nothing_else():
    prob, truth, fov = random_case(ties=False)
    assert not vc.separates(prob, truth, fov)
    for copy in (truth * 1.0, 1.0 - truth, 0.2 + 0.1 * truth, truth * 0.5 + prob / 10):
        assert vc.separates(copy, truth, fov)
        assert vc.separates(np.where(fov, copy, prob), truth, fov)
    assert not vc.separates(prob, truth & False, fov) and not vc.separates(prob, truth | True, fov)
    constant = np.zeros_like(prob)
    assert not vc.separates(constant, truth, fov)


# ---- an unlearned method


def test_darkness_finds_dark_lines_and_no_rim():
    image, fov = np.full((200, 200, 3), 120, np.uint8), np.zeros((200, 200), bool)
    fov[20:180, 20:180] = True
    image[~fov] = 0
    image[100:103, 20:180] = 80
    dark = vc.darkness(image, fov)
    assert dark.shape == (200, 200) and dark.dtype == np.float32
    assert dark[101, 100] > 0.9 and abs(dark[50, 100] - 0.5) < 0.01
    assert np.abs(dark[21:60, 21:179] - 0.5).max() < 0.01  # the black outside does not reach in


def test_best_threshold_by_trying_all():
    prob, truth, fov = random_case(ties=False)
    prob = np.rint(prob * vm.LEVELS) / vm.LEVELS
    t = vc.best_threshold(vm.level_counts(prob, truth, fov))

    def dice(threshold):
        return vm.overlap(vm.count(prob > threshold, truth, fov))["Dice"]

    assert dice(t) == pytest.approx(max(dice(x - 0.5 / vm.LEVELS) for x in prob[fov]), abs=1e-12)
    assert dice(t) > dice(0.5)
    levels = np.zeros((2, vm.LEVELS + 1), np.int64)
    levels[0, 10], levels[1, 11] = 5, 3
    assert vc.best_threshold(levels) * vm.LEVELS == pytest.approx(10.5)
