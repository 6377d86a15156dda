"""Pooling, decoder and merge head beside the reference cases: published sizes, what a query may look at, batches of
unequal items, order of points, gradients, mixed precision, bad sizes."""

import pytest
import torch
from torch import nn

from models.sparse_conv import Groups
from models.superpoint_decoder import DecoderOutput, MergeHead, Stage, SuperpointDecoder, pad_visible
from models.superpoint_pooling import GeometryAwarePooling

C_IN, D, K, C = 12, 16, 4, 6
LEVELS = ("SP", "SP", "P", "P")
SIZES = [(40, 5, 3), (90, 9, 9), (25, 3, 1)]  # N, S, Q of items


def decoder(levels: tuple[str, ...] = LEVELS, boxes: bool = True) -> SuperpointDecoder:
    torch.manual_seed(0)
    return SuperpointDecoder(C_IN, D, 4, 32, K, C, levels, boxes)


def item(N: int, S: int, Q: int) -> tuple[torch.Tensor, ...]:
    """Superpoints, points, queries, superpoint, weights."""
    g = torch.Generator().manual_seed(N)
    superpoints = torch.randn(S, C_IN, generator=g)
    superpoint = torch.cat([torch.arange(S), torch.randint(S, (N - S,), generator=g)])
    asking = superpoints[torch.randperm(S, generator=g)[:Q]]
    return superpoints, torch.randn(N, 3 + C_IN, generator=g), asking, superpoint, 2 * torch.rand(N, 1, generator=g)


def run(model: SuperpointDecoder, *items: tuple[torch.Tensor, ...]) -> DecoderOutput:
    return model(*(list(part) for part in zip(*items, strict=True)))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_numbers_of_parameters():
    assert size(GeometryAwarePooling(96)) == 28_896
    assert size(MergeHead(256, 512, 256)) == 264_448
    agnostic, scannet = {"n_classes": 1, "n_semantic": 200}, {"n_classes": 18, "n_semantic": 20}
    for sizes, alone, boxed in ((agnostic, 3.58, 3.64), (scannet, 3.53, 3.60)):  # millions
        assert round(size(SuperpointDecoder(**sizes)) / 1e6, 2) == alone
        assert round(size(SuperpointDecoder(**sizes, boxes=True)) / 1e6, 2) == boxed


# ---- pooling


def points(N: int = 60, S: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    superpoint = torch.cat([torch.arange(S), torch.randint(S, (N - S,), generator=g)])
    return torch.randn(N, C_IN, generator=g), 3 * torch.rand(N, 3, generator=g), superpoint


def test_pooling_sees_where_points_lie_in_their_superpoint_and_nothing_else():
    torch.manual_seed(0)
    pool = GeometryAwarePooling(C_IN)
    x, xyz, superpoint = points()
    features, weights, centres = pool(x, xyz, superpoint, 7)
    assert (weights >= 0).all() and (weights <= 2).all()
    for s in range(7):
        close(centres[s], xyz[superpoint == s].mean(0))
        moved = pool(x[superpoint == s], xyz[superpoint == s] + 5, (superpoint[superpoint == s] - s), 1)
        torch.testing.assert_close(moved[0][0], features[s], rtol=1e-4, atol=1e-4)  # positions of 8 m in float32
    order = torch.randperm(60)
    close(pool(x[order], xyz[order], superpoint[order], 7)[0], features)


def test_pooling_of_single_points_and_of_none():
    pool = GeometryAwarePooling(C_IN)
    x, xyz, _ = points()
    x.requires_grad_()
    features, _, centres = pool(x, xyz, torch.arange(60), 60)
    features.sum().backward()
    assert features.isfinite().all() and x.grad.isfinite().all() and torch.equal(centres, xyz)
    assert all(p.grad.isfinite().all() for p in pool.parameters())
    with pytest.raises(ValueError, match="1 of 61 superpoints have no point"):
        pool(x, xyz, torch.arange(60), 61)


def test_pooling_under_autocast_is_float32():
    pool = GeometryAwarePooling(C_IN)
    x, xyz, superpoint = points()
    with torch.autocast("cpu", torch.bfloat16):
        out = pool(x.bfloat16(), xyz, superpoint, 7)
    assert all(o.dtype == torch.float32 and o.isfinite().all() for o in out)
    torch.testing.assert_close(out[0], pool(x, xyz, superpoint, 7)[0], rtol=0, atol=0.1)


# ---- what a query may look at


def stage(masks: list[torch.Tensor], level: str) -> Stage:
    return Stage([torch.zeros(len(m), K + 1) for m in masks], masks, None, level)


def test_level_sp_looks_under_the_mask_or_everywhere():
    masks = torch.tensor([[1.0, -1.0, 0.0], [-1.0, -2.0, -3.0]])
    (visible,) = decoder().visible(stage([masks], "SP"), None, [])
    assert visible.tolist() == [[True, False, True], [True, True, True]]


def test_level_p_weighs_the_points_of_each_item_by_its_own_counts():
    """Items of different numbers of points, against loops; each row sees the superpoints that are least outside."""
    items = [item(*sizes) for sizes in SIZES]
    masks = [torch.randn(Q, N) - 0.7 for N, _, Q in SIZES]
    groups = [Groups(superpoint, S) for (_, S, _), (*_, superpoint, _) in zip(SIZES, items, strict=True)]
    weights = [i[-1] for i in items]
    opened = 0
    for b, visible in enumerate(decoder().visible(stage(masks, "P"), groups, weights)):
        outside = torch.zeros_like(visible, dtype=torch.float32)
        for s in range(SIZES[b][1]):
            mine = items[b][3] == s
            outside[:, s] = ((masks[b][:, mine] < 0) * weights[b][mine, 0]).sum(1) / mine.sum()
        least = outside == outside.amin(1, keepdim=True)
        expected = (outside <= 0.5) | least
        assert torch.equal(visible, expected)
        opened += int((least & (outside > 0.5)).sum())
        assert not visible.all()
    assert opened > 0  # the rule of the least had something to do


def test_padding_is_not_seen_and_no_row_is_blind():
    visible = pad_visible([torch.tensor([[False, True]]), torch.zeros(2, 3, dtype=torch.bool)])
    assert visible.tolist() == [[[[False, True, False], [True, True, True]]], [[[False] * 3] * 2]]


# ---- decoder


@pytest.mark.parametrize("levels", [LEVELS, ("P",) * 4, ("SP",) * 3, ("SP", "P")], ids="-".join)
def test_a_batch_of_unequal_items_is_the_items_alone(levels):
    model = decoder(levels)
    items = [item(*sizes) for sizes in SIZES]
    together = run(model, *items)
    assert [s.level for s in together.stages] == list(levels)
    for b, (N, S, Q) in enumerate(SIZES):
        alone = run(model, items[b])
        for one, many in zip(alone.stages, together.stages, strict=True):
            assert many.masks[b].shape == (Q, N if many.level == "P" else S)
            assert many.cls[b].shape == (Q, K + 1) and (many.boxes[b][:, 3:] > 0).all()
            for name in ("cls", "masks", "boxes"):
                close(getattr(many, name)[b], getattr(one, name)[0])
        close(together.sem[b], alone.sem[0])
        close(together.queries[b], alone.queries[0])
        assert together.sem[b].shape == (Q, C + 1) and together.queries[b].shape == (Q, D)


def test_order_of_points_and_numbers_of_superpoints_do_not_matter():
    model = decoder()
    superpoints, xyz_x, queries, superpoint, weights = item(*SIZES[1])
    out = run(model, (superpoints, xyz_x, queries, superpoint, weights))
    torch.manual_seed(1)
    rows, names = torch.randperm(len(xyz_x)), torch.randperm(len(superpoints))
    renamed = torch.argsort(names)[superpoint]
    other = run(model, (superpoints[names], xyz_x[rows], queries, renamed[rows], weights[rows]))
    for a, b in zip(out.stages, other.stages, strict=True):
        close(a.cls[0], b.cls[0])
        close(a.masks[0][:, rows if a.level == "P" else names], b.masks[0])


def test_gradients_reach_every_parameter():
    model = decoder()
    out = run(model, *(item(*sizes) for sizes in SIZES))
    parts = [*out.sem, *out.queries, *(x for s in out.stages for b in (s.cls, s.masks, s.boxes) for x in b)]
    sum((p * torch.randn_like(p)).sum() for p in parts).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_without_boxes_there_is_no_head_of_boxes():
    model = decoder(boxes=False)
    assert not any(name.startswith("out_reg") for name in model.state_dict())
    assert all(s.boxes is None for s in run(model, item(*SIZES[0])).stages)


def test_autocast():
    model, own = decoder(), item(*SIZES[1])
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, own)
    assert all(x.isfinite().all() for s in out.stages for x in (s.cls[0], s.masks[0], s.boxes[0]))


def test_merge_head():
    torch.manual_seed(0)
    for norm, Q in (("layer", 1), ("layer", 5), ("batch", 5)):
        vectors = MergeHead(D, 24, 8, norm)(torch.randn(Q, D))
        assert vectors.shape == (Q, 8)
        close(vectors.norm(dim=1), torch.ones(Q))


def test_bad_sizes():
    with pytest.raises(ValueError, match="levels"):
        SuperpointDecoder(levels=("SP", "V"))
    with pytest.raises(ValueError, match="levels"):
        SuperpointDecoder(levels=("P",))
    with pytest.raises(ValueError, match="dim 30 is no multiple of heads 8"):
        SuperpointDecoder(dim=30)
    with pytest.raises(ValueError, match="norm 'group'"):
        MergeHead(norm="group")
