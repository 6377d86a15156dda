"""Matching: the cheapest pairs, bad numbers, unknown classes, no targets; queries of two clips; clips of a video."""

import itertools

import pytest
import torch

from models.mask_losses import sample_points
from models.matching import assign, bce_cost, class_cost, clip_ends, dice_cost, match, match_queries


def scene(N: int = 6, M: int = 3, K: int = 4) -> tuple[torch.Tensor, ...]:
    """Logits, masks, labels and targets where prediction 2j + 1 is target j."""
    g = torch.Generator().manual_seed(0)
    targets = torch.zeros(M, 16, 24, dtype=torch.bool)
    for j in range(M):
        targets[j, 4 * j : 4 * j + 4, 3 * j : 3 * j + 12] = True
    labels, wanted = torch.arange(M) % K, 2 * torch.arange(M) + 1
    logits, masks = torch.randn(N, K + 1, generator=g), torch.randn(N, 16, 24, generator=g) - 2
    logits[wanted, labels] += 3
    masks[wanted] = 8.0 * targets - 4
    return logits, masks, labels, targets


def test_the_cheapest_pairs_of_all():
    cost = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    rows, columns = assign(cost)
    best = min(sum(cost[r, c] for c, r in enumerate(p)) for p in itertools.permutations(range(5), 3))
    torch.testing.assert_close(cost[rows, columns].sum(), best)
    assert rows.tolist() == sorted(rows.tolist()) and sorted(columns.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_prediction_is_not_matched(bad):
    logits, masks, labels, targets = scene()
    masks[0] = bad
    assert [v.tolist() for v in match(logits, masks, labels, targets, 500)] == [[1, 3, 5], [0, 1, 2]]
    masks[:] = bad
    rows, columns = match(logits, masks, labels, targets, 500)  # no choice is good, yet there is one
    assert len(rows) == len(columns) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_targets_of_another_size_in_any_order_and_precision(dtype):
    logits, masks, labels, targets = scene()
    large = targets.repeat_interleave(4, 1).repeat_interleave(4, 2)
    order = torch.tensor([2, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        rows, columns = match(logits.to(dtype), masks.to(dtype), labels[order], large[order], 500)
    assert rows.tolist() == [1, 3, 5] and order[columns].tolist() == [0, 1, 2]


def test_points_come_from_the_generator():
    def pairs(seed):
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(9, 20, 20, generator=g), torch.randn(7, 20, 20, generator=g) > 0
        order = torch.Generator().manual_seed(seed)
        return match(torch.zeros(9, 3), noise[0], torch.zeros(7).long(), noise[1], 5, generator=order)[1].tolist()

    assert pairs(1) == pairs(1) != pairs(2)


@pytest.mark.parametrize("i", range(3))
def test_each_weight_weighs_its_own_cost(i):
    def generator():
        return torch.Generator().manual_seed(0)

    logits, masks = torch.randn(9, 4, generator=generator()), torch.randn(9, 6, 6, generator=generator())
    labels, targets = torch.tensor([0, 2]), torch.randn(2, 6, 6, generator=generator()) > -0.5
    xy = torch.rand(1, 40, 2, generator=generator())
    ours, theirs = sample_points(masks, xy), sample_points(targets, xy)
    costs = (class_cost(logits, labels), bce_cost(ours, theirs), dice_cost(ours, theirs))
    answers = [assign(c)[0].tolist() for c in costs]
    weights = tuple(float(i == j) for j in range(3))
    found = match(logits, masks, labels, targets, 40, weights, generator())
    assert found[0].tolist() == answers[i] and answers.count(answers[i]) == 1


def test_a_clip_has_one_answer_for_all_frames():
    logits, masks, labels, targets = scene()
    swapped = masks[[0, 3, 2, 1, 4, 5]]
    clip = torch.stack([masks, swapped, swapped], 1)  # prediction 3 is target 0 in two of three frames
    tubes = torch.stack([targets] * 3, 1)
    rows, columns = match(torch.zeros_like(logits), clip, labels, tubes, 2000)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {1: 1, 3: 0, 5: 2}


def test_no_target_and_more_targets_than_predictions():
    logits, masks, labels, targets = scene()
    rows, columns = match(logits, masks, labels[:0], targets[:0], 50)
    assert rows.dtype == columns.dtype == torch.int64 and len(rows) == len(columns) == 0
    rows, columns = match(logits[1:3], masks[1:3], labels, targets, 500)
    assert rows.tolist() == [0, 1] and columns[0] == 0


def test_an_unknown_class_costs_the_same_everywhere():
    logits, labels = scene()[0], torch.tensor([-1, 2])
    cost = class_cost(logits, labels)
    assert not cost[:, 0].any()
    torch.testing.assert_close(cost[:, 1], -logits.softmax(-1)[:, 2])


def test_costs_of_half_precision_are_computed_in_float32():
    logits, targets = torch.full((1, 4000), 30.0, dtype=torch.float16), torch.zeros(1, 4000)
    assert bce_cost(logits, targets).item() == pytest.approx(30)  # a sum of 120,000 does not fit float16
    assert dice_cost(logits, targets).item() == pytest.approx(1 - 1 / 4001)


def test_queries_are_followed_through_a_permutation():
    before = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    now = torch.empty_like(before)
    now[order] = before
    assert match_queries(before, now).tolist() == order.tolist()
    before = torch.tensor([[1.0, 0], [0.9, 0.1]])  # the largest sum of products would swap the two
    now = torch.tensor([[1.0, 0], [9, 1]])
    assert match_queries(before, now).tolist() == [0, 1]


def test_clips_cover_the_video():
    for frames, clip, overlap in itertools.product(range(2, 30), range(2, 7), range(2)):
        ends = clip_ends(frames, clip, overlap)
        starts = [0, *(e - overlap for e in ends[:-1])]
        assert ends[-1] == frames and all(0 < e - s <= clip for s, e in zip(starts, ends, strict=True))
    assert clip_ends(3, 5) == [3]
    for bad in ((5, 2, 2), (5, 3, -1), (1, 3, 1)):
        with pytest.raises(ValueError, match=f"{bad[0]} frames, clips of {bad[1]} with overlap {bad[2]}"):
            clip_ends(*bad)
