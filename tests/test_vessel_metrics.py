"""utils/vessel_metrics.py on small masks whose scores are known by counting."""

import numpy as np
import pytest
import torch

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


# ---- one image


def test_counts_and_overlap_by_hand():
    counts = np.array([3, 1, 2, 14])
    got = vm.overlap(counts)
    assert got["Dice"] == 6 / 9 and got["IoU"] == 3 / 6
    assert got["sensitivity"] == 3 / 5 and got["specificity"] == 14 / 15 and got["precision"] == 3 / 4
    assert got["MCC"] == pytest.approx(np.corrcoef([1] * 4 + [0] * 16, [1] * 3 + [0] + [1] * 2 + [0] * 14)[0, 1])
    large = vm.overlap(counts * 10**7)  # the product of the four margins passes 2**63
    assert large["MCC"] == pytest.approx(got["MCC"])


def test_nothing_outside_the_field_of_view_counts():
    prob, truth, fov = random_case()
    other_prob, other_truth = np.where(fov, prob, 1 - prob), np.where(fov, truth, ~truth)
    a, b = vm.score_image(prob, truth, fov), vm.score_image(other_prob, other_truth, fov)
    assert a.values == b.values and np.array_equal(a.skeleton, b.skeleton) and np.array_equal(a.levels, b.levels)
    assert a.counts.sum() == fov.sum() == a.levels.sum()


@pytest.mark.parametrize("ties", [True, False])
def test_ranking_by_pairs_and_by_thresholds(ties):
    prob, truth, fov = random_case(ties=ties)
    prob = np.rint(prob * vm.LEVELS) / vm.LEVELS
    got = vm.ranking(vm.level_counts(prob, truth, fov))
    p, n = prob[truth & fov], prob[~truth & fov]
    wins = (p[:, None] > n).mean() + (p[:, None] == n).mean() / 2
    assert got["AUC"] == pytest.approx(wins, abs=1e-12)
    ap, before = 0.0, 0
    for t in np.unique(prob[fov])[::-1]:
        tp, fp = (p >= t).sum(), (n >= t).sum()
        ap, before = ap + (tp - before) / len(p) * tp / (tp + fp), tp
    assert got["AP"] == pytest.approx(ap, abs=1e-12)


def test_cldice_of_lines():
    thick, thin = line(8, 5), line(10)
    assert vm.cldice(vm.skeleton_counts(thin, thick)) > 0.9
    assert vm.overlap(vm.count(thin, thick, everywhere()))["Dice"] < 0.4
    assert vm.cldice(np.array([2, 8, 3, 6])) == pytest.approx(2 / (8 / 2 + 6 / 3))
    assert vm.cldice(np.array([0, 8, 0, 6])) == 0 == vm.cldice(np.array([0, 0, 0, 6]))
    assert np.isnan(vm.cldice(np.zeros(4)))


def test_components_join_over_corners():
    assert vm.components(np.eye(5, dtype=bool)) == 1
    assert vm.components(line(2) | line(6) | line(8)) == 3
    two = vm.score_mask(line(2), line(2) | line(9), everywhere())
    assert two.values["Betti-0"] == 1


def test_hd95_of_shifted_lines():
    assert vm.hd95(line(4), line(11)) == 7
    assert vm.hd95(line(4), line(4)) == 0
    assert np.isnan(vm.hd95(line(4), line(4) & False))
    there, back = vm.surface_distances(line(4), line(4) | line(20))
    assert there.max() == 0 and len(back) == 48 and back.max() == 16
    with pytest.raises(ValueError, match="empty"):
        vm.surface_distances(line(4), line(4) & False)


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in size"):
        vm.score_image(np.zeros((H, W)), line(2), np.ones((H, W + 1), bool))


# ---- a set


def test_summary_counts_what_is_undefined():
    empty = vm.score_image(np.zeros((H, W)), line(2) & False, everywhere())
    good = vm.score_image(line(2) * 0.9, line(2), everywhere())
    half = vm.score_image(line(2) * 0.9, line(2) | line(9), everywhere())
    got = vm.summarise([good, empty, half])
    assert got["undefined"]["Dice"] == 1 and got["undefined"]["specificity"] == 0
    assert got["mean"]["Dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert got["lowest"]["Dice"] == pytest.approx(2 / 3) and got["highest"]["Dice"] == 1
    assert got["pooled"]["Dice"] == pytest.approx(2 * 48 / (48 + 72))
    assert got["pooled"]["clDice"] == pytest.approx(
        vm.cldice(vm.skeleton_counts(line(2), line(2)) + vm.skeleton_counts(line(2), line(2) | line(9)))
    )
    assert got["pooled"]["HD95"] is None and got["pooled"]["AUC"] is not None
    nothing = vm.summarise([empty])
    assert nothing["mean"]["Dice"] is None and nothing["pooled"]["Dice"] is None


def test_pooled_ranking_is_that_of_all_pixels_together():
    images = [random_case(seed) for seed in range(3)]
    got = vm.summarise([vm.score_image(*x) for x in images])["pooled"]
    joined = [np.hstack([x[k] for x in images]) for k in range(3)]
    assert {k: got[k] for k in ("AUC", "AP")} == pytest.approx(vm.ranking(vm.level_counts(*joined)), abs=1e-12)
    masks = vm.summarise([vm.score_mask(p > 0.5, t, f) for p, t, f in images])
    assert masks["pooled"]["AUC"] is None and masks["undefined"]["AUC"] == 3
    assert masks["pooled"]["Dice"] == got["Dice"]


def test_a_failed_image_scores_0():
    failed = vm.score_image(None, line(2) | line(9), everywhere())
    assert all(failed.values[k] == 0 for k in vm.RATES) and failed.values["Betti-0"] == 2
    good = vm.score_image(line(2) * 0.9, line(2), everywhere())
    got = vm.summarise([good, failed])
    assert got["mean"]["Dice"] == 0.5 and got["undefined"]["Dice"] == 0
    assert got["pooled"]["sensitivity"] == pytest.approx(24 / 72)


# ---- soft clDice


def test_soft_skeleton_of_masks_lies_on_the_middle():
    thick = torch.from_numpy(line(8, 5)).float()[None, None]
    skeleton = vm.soft_skeleton(thick)[0, 0]
    assert skeleton[10, 5:25].sum() == 20 and skeleton[[8, 9, 11, 12], 10].sum() == 0


def test_soft_cldice_prefers_an_unbroken_line_and_has_gradients():
    truth = torch.from_numpy(line(8, 3)).float()[None, None]
    broken = truth.clone()
    broken[..., 12:16] = 0
    assert vm.soft_cldice(truth, truth).item() == pytest.approx(0, abs=1e-6)
    assert vm.soft_cldice(broken, truth) > 0.05
    logits = (2 * broken - 1).requires_grad_()
    vm.soft_cldice(logits.sigmoid(), truth).backward()
    assert logits.grad.isfinite().all() and (logits.grad[..., 9, 13] < 0).all()
