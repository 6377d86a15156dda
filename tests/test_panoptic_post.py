"""Post-processing: hand-made scenes, sizes, empty results, agreement with a plain loop over the queries."""

import pytest
import torch
import torch.nn.functional as F

from models.panoptic_post import ImageSize, boxes_of, instances, panoptic, semantic, to_original

K = 5
THINGS = torch.tensor([False, True, True, True, False])  # not in front, as in Cityscapes


def scene(N: int = 30, H: int = 40, W: int = 56, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits and smooth masks of sure and unsure queries that overlap."""
    g = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(N, K + 1, generator=g)
    logits[torch.arange(N), torch.randint(0, K + 1, (N,), generator=g)] += 6 * torch.rand(N, generator=g)
    coarse = 6 * torch.randn(N, 1, 5, 7, generator=g) - 4
    return logits, F.interpolate(coarse, (H, W), mode="bilinear", align_corners=False)[:, 0]


def by_loop(logits, masks, is_thing, threshold, overlap, filter_low) -> torch.Tensor:
    """The same rules, one query after the other."""
    score, label = logits.softmax(-1).max(-1)
    kept = [i for i in range(len(score)) if label[i] != K and score[i] > threshold]
    out = torch.full(masks.shape[1:], K)
    number = 0
    if not kept:
        return out
    inside = masks[kept].sigmoid()
    winner = (score[kept][:, None, None] * inside).argmax(0)
    for n, i in enumerate(kept):
        won, own = winner == n, inside[n] >= 0.5
        if not won.any() or not own.any() or won.sum().item() / own.sum().item() < overlap:
            continue
        number += bool(is_thing[label[i]])
        value = label[i] + 1000 * number if is_thing[label[i]] else label[i]
        out[won & own if filter_low else won] = value
    return out


@pytest.mark.parametrize("threshold, overlap, filter_low", [(0.8, 0.8, True), (0.8, 0.8, False), (0.3, 0.4, True),
                                                            (0.0, 0.0, True), (0.5, 1.0, False)])  # fmt: skip
def test_panoptic_equals_a_loop_over_queries(threshold, overlap, filter_low):
    seen = set()
    for seed in range(12):
        logits, masks = scene(seed=seed)
        found = panoptic(logits, masks, THINGS, None, threshold, overlap, filter_low)
        expected = by_loop(logits, masks, THINGS, threshold, overlap, filter_low)
        assert torch.equal(found["map"], expected), seed
        seen |= set(expected.unique().tolist())
        assert set(found["map"].unique().tolist()) - {K} <= set(found["value"].tolist())
        assert torch.equal(found["value"] % 1000, found["label"]) and (found["score"] > threshold).all()
        assert torch.equal(logits.softmax(-1)[found["query"], found["label"]], found["score"])
    assert len(seen) > 5 or overlap == 1.0


def test_stuff_of_one_class_is_one_segment_and_things_are_counted():
    masks = torch.full((4, 4, 8), -9.0)
    for i in range(4):
        masks[i, i] = 9.0
    labels = torch.tensor([0, 1, 0, 1])
    logits = 20.0 * F.one_hot(labels, K + 1)
    found = panoptic(logits, masks, THINGS)
    assert found["map"][:, 0].tolist() == [0, 1001, 0, 2001] and found["value"].tolist() == [0, 1001, 0, 2001]
    swapped = panoptic(logits, masks, ~THINGS)
    assert swapped["map"][:, 0].tolist() == [1000, 1, 2000, 1]


def test_an_overlap_of_exactly_the_threshold_is_enough():
    masks = torch.full((2, 1, 10), -9.0)
    masks[0, 0, :5], masks[1, 0, 4], masks[1, 0, 5:] = 2.0, 9.0, -8.0  # query 0 wins 4 of its 5 pixels
    logits = 20.0 * F.one_hot(torch.tensor([0, 4]), K + 1)
    assert panoptic(logits, masks, THINGS)["map"].tolist() == [[0, 0, 0, 0, 4, *5 * [K]]]
    assert panoptic(logits, masks, THINGS, overlap=0.81)["map"].tolist() == [[*4 * [K], 4, *5 * [K]]]


def test_nothing_found_is_void_everywhere():
    logits, masks = scene()
    size = ImageSize((33, 47), (40, 56), (40, 56))
    for found in (panoptic(logits, masks, THINGS, size, threshold=1.0), panoptic(logits[:0], masks[:0], THINGS, size)):
        assert found["map"].shape == (33, 47) and found["map"].dtype == torch.int64 and (found["map"] == K).all()
        assert all(len(found[k]) == 0 for k in ("value", "label", "score", "query"))
    none = instances(logits, masks, torch.zeros(K, dtype=torch.bool), size)
    assert none["mask"].shape == (0, 33, 47) and none["boxes_xyxy_px"].shape == (0, 4)
    assert semantic(logits[:0], masks[:0], size).shape == (K, 33, 47)


def test_masks_go_back_to_the_original_size():
    logits, masks = scene()
    size = ImageSize(original=(75, 90), resized=(100, 120), padded=(160, 224))
    large = F.interpolate(masks[None], (160, 224), mode="bilinear", align_corners=False)[..., :100, :120]
    large = F.interpolate(large, (75, 90), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(to_original(masks, size), large)
    assert torch.equal(panoptic(logits, masks, THINGS, size, 0.3, 0.4)["map"],
                       panoptic(logits, large, THINGS, None, 0.3, 0.4)["map"])  # fmt: skip
    ours, theirs = instances(logits, masks, THINGS, size), instances(logits, large, THINGS)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    torch.testing.assert_close(semantic(logits, masks, size), semantic(logits, large))


def test_instances_one_by_one():
    logits, masks = scene()
    found = instances(logits, masks, THINGS, top=25)
    probability = logits.softmax(-1)[:, :K].flatten()
    best = [(i // K, i % K) for i in probability.argsort(descending=True)[:25].tolist() if THINGS[i % K]]
    assert sorted(best) == sorted(zip(found["query"].tolist(), found["label"].tolist(), strict=True))
    assert found["score"].tolist() == sorted(found["score"].tolist(), reverse=True)
    for i, (q, label) in enumerate(zip(found["query"], found["label"], strict=True)):
        inside = masks[q] > 0
        assert torch.equal(found["mask"][i], inside)
        quality = masks[q].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
        torch.testing.assert_close(found["score"][i], logits[q].softmax(-1)[label] * quality)


def test_boxes():
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2:4, 5:8] = True
    masks[1, 0, 0] = masks[1, 5, 8] = True
    assert boxes_of(masks).tolist() == [[5, 2, 8, 4], [0, 0, 9, 6], [0, 0, 0, 0]]


def test_semantic_is_the_class_of_the_surest_query():
    masks = torch.stack([torch.full((2, 4), 5.0), torch.full((2, 4), -5.0)])
    masks[1, :, 2:] = 9.0
    logits = 9.0 * F.one_hot(torch.tensor([3, 0]), K + 1)
    logits[0, 0] = 8.0
    assert semantic(logits, masks).argmax(0).tolist() == [[3, 3, 0, 0]] * 2


def test_half_precision_gives_float32_scores():
    logits, masks = scene()
    exact, half = (instances(logits.to(d), masks.to(d), THINGS) for d in (torch.float32, torch.bfloat16))
    assert half["score"].dtype == torch.float32
    torch.testing.assert_close(half["score"].max(), exact["score"].max(), rtol=0.02, atol=0)
    assert to_original(masks.half(), None).dtype == semantic(logits.half(), masks.half()).dtype == torch.float32
    agree = panoptic(logits, masks.half(), THINGS)["map"] == panoptic(logits, masks, THINGS)["map"]
    assert agree.float().mean() > 0.99
