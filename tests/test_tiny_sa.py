"""Tiny-SA: against the definition written out token by token, items independent, a new one changes nothing, gradients,
strides, isolated voxels."""

import pytest
import torch
import torch.nn.functional as F

from models import tiny_sa
from models.sparse_conv import Groups, SparseTensor, voxelise
from models.sparse_maps import Coordinates, coarsen, pack
from models.tiny_sa import TinySA, TinySANeck, find_tokens

C, VOXEL = 8, 0.02


def cloud(seed: int, n: int = 400, size: float = 1.2) -> torch.Tensor:
    """(n, 3) float64 m on the three walls of a corner"""
    xyz = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size - 0.39
    xyz[torch.arange(n), torch.arange(n) % 3] = -0.39
    return xyz


def frame(clouds: list[torch.Tensor], stride: int = 1, dtype=torch.float64) -> tuple[SparseTensor, torch.Tensor]:
    """Features (V, C) that follow from the place, and the mean positions (V, 3) of what is in every voxel."""
    batch = torch.cat([torch.full((len(p),), b) for b, p in enumerate(clouds)])
    xyz = torch.cat(clouds)
    fine, _ = voxelise(xyz, xyz, VOXEL, batch)
    keys = fine.coordinates.keys(stride)
    positions = Groups(torch.searchsorted(keys, coarsen(fine.keys, stride)), len(keys)).mean(fine.features)
    waves = torch.linspace(2.0, 9.0, 3 * C, dtype=torch.float64).view(3, C)
    return SparseTensor((positions @ waves).sin().to(dtype), fine.coordinates, stride), positions.to(dtype)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """With weights that are nowhere zero, in double."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return module.double()


def sa(**options) -> TinySA:
    torch.manual_seed(0)
    return filled(TinySA(C, heads=2, **options))


# ---- the definition, written out


def attended(m: TinySA, g: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Tokens (M, C) of one item at (M, 3) after attention and feed-forward"""
    u = m.norm1(g)
    q, k, v = m.query(u), m.key(u), m.value(u)
    distances, d = torch.cdist(c, c), C // m.heads
    out = []
    for i in range(len(g)):
        near = torch.argsort(distances[i])
        near = near[distances[i][near] <= m.radius][: m.neighbours]
        e = ((c[near] - c[i]) / m.radius) @ m.pos_embed
        o = []
        for h in range(m.heads):
            part = slice(h * d, (h + 1) * d)
            a = (((k[near] + e)[:, part] @ q[i, part]) / d**0.5).softmax(0)
            o.append(a @ (v[near] + e)[:, part])
        out.append(torch.cat(o))
    t = g + m.out(torch.stack(out))
    return t + m.ffn(m.norm2(t))


def written_out(m: TinySA, x: SparseTensor, positions: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x.features)
    for b in x.batch.unique():
        mine = (x.batch == b).nonzero()[:, 0]
        f, p = x.features[mine], positions[mine]
        cells, rows = torch.unique(torch.div(x.coords[mine, 1:], m.cell, rounding_mode="floor"), dim=0,
                                   return_inverse=True)  # fmt: skip
        g = torch.stack([f[rows == j].mean(0) for j in range(len(cells))])
        c = torch.stack([p[rows == j].mean(0) for j in range(len(cells))])
        t = attended(m, g, c)
        d2, near = ((p[:, None] - c) ** 2).sum(2).topk(min(8, len(c)), largest=False)
        w = 1 / (d2 + 1e-6)
        y = (t[near] * (w / w.sum(1, keepdim=True))[..., None]).sum(1)
        out[mine] = f + m.up(m.norm3(y))
    return out


FAR = torch.tensor([[3.0, 3.0, 3.0], [3.0, 3.0, 3.5], [-4.0, 0.5, 0.5]], dtype=torch.float64)
OPTIONS = ({}, {"neighbours": 4}, {"radius": 0.1}, {"radius": 0.55}, {"cell": 4, "radius": 0.2}, {"cell": 16})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_definition(options):
    """With items of very different size, one of a single voxel, and voxels far from all others."""
    m = sa(**options)
    x, positions = frame([torch.cat([cloud(0), FAR]), cloud(1, 60), FAR[:1], FAR])
    with torch.no_grad():
        torch.testing.assert_close(m(x, positions, VOXEL).features, written_out(m, x, positions), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_at_the_strides_of_a_network(stride):
    m = sa()
    x, positions = frame([cloud(0), cloud(1, 100)], stride)
    with torch.no_grad():
        out = m(x, positions, VOXEL)
        assert out.stride == stride and out.coordinates is x.coordinates
        torch.testing.assert_close(out.features, written_out(m, x, positions), rtol=0, atol=1e-12)


def test_neighbours_and_memory_in_parts(monkeypatch):
    """At most K within the radius, the token itself first; the same if distances are computed a few at a time."""
    x, positions = frame([cloud(0), FAR, cloud(1, 50)])
    tokens = find_tokens(x, positions, VOXEL, radius=0.3, neighbours=6)
    M = len(tokens.centres)
    offsets, rows = tokens.offsets, tokens.sources.rows.view(M, -1)
    assert rows.shape[1] == 6 and torch.equal(rows[:, 0], torch.arange(M)) and not bool(tokens.absent[:, 0].any())
    assert float(offsets.norm(dim=2)[~tokens.absent].max()) <= 1
    moved = tokens.centres[:, None] + 0.3 * offsets
    torch.testing.assert_close(moved[~tokens.absent], tokens.centres[rows][~tokens.absent])
    monkeypatch.setattr(tiny_sa, "AT_ONCE", 100)
    again = find_tokens(x, positions, VOXEL, radius=0.3, neighbours=6)
    assert torch.equal(tokens.up.rows, again.up.rows) and torch.equal(tokens.up.weights, again.up.weights)


# ---- items, order, repetition


def test_a_batch_is_its_items():
    neck, clouds = filled(TinySANeck(C, heads=2)), [cloud(0), cloud(1, 80), FAR]
    x, positions = frame(clouds)
    both = neck(x, positions, VOXEL).features
    for b, p in enumerate(clouds):
        torch.testing.assert_close(both[x.batch == b], neck(*frame([p]), VOXEL).features, rtol=0, atol=1e-12)


def test_the_order_of_points_and_items_does_not_matter():
    neck, clouds = filled(TinySANeck(C, heads=2)).float(), [cloud(0), cloud(1, 80)]
    x, positions = frame(clouds, dtype=torch.float32)
    y, moved = frame([clouds[1].flip(0), clouds[0][torch.randperm(400)]], dtype=torch.float32)
    a, b = neck(x, positions, VOXEL).features, neck(y, moved, VOXEL).features
    for i in range(2):
        torch.testing.assert_close(a[x.batch == i], b[y.batch == 1 - i], rtol=0, atol=1e-5)


def test_an_item_does_not_see_another():
    """Not even one in the very same place."""
    neck, mine = filled(TinySANeck(C, heads=2)), cloud(0)
    outs = []
    for other in (cloud(1), mine + 0.01, FAR):
        x, positions = frame([mine, other])
        outs.append(neck(x, positions, VOXEL).features[x.batch == 0])
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(outs[0], outs[2], rtol=0, atol=1e-12)


def test_every_run_is_the_same():
    neck = filled(TinySANeck(C, heads=2)).float()
    found = []
    for _ in range(2):
        x, positions = frame([cloud(0), cloud(1)], dtype=torch.float32)
        x.features.requires_grad_()
        out = neck(x, positions, VOXEL).features
        found.append([out, *torch.autograd.grad(out.square().sum(), [x.features, *neck.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_moved_by_whole_cells_it_is_the_same():
    m, shift = sa(), torch.tensor([4 * 0.16, -9 * 0.16, 2 * 0.16], dtype=torch.float64)
    x, positions = frame([cloud(0)])
    coords = x.coords + torch.tensor([0, 32, -72, 16])
    moved = SparseTensor(x.features, Coordinates(pack(coords)), 1)
    a, b = m(x, positions, VOXEL).features, m(moved, positions + shift, VOXEL).features
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# ---- beginning, training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_one_changes_nothing(dtype):
    torch.manual_seed(0)
    neck = TinySANeck(C, heads=2).to(dtype)
    x, positions = frame([cloud(0), FAR], dtype=dtype)
    assert torch.equal(neck(x, positions, VOXEL).features, x.features)


def test_gradients():
    """Finite differences in double along random directions of features and all weights."""
    neck = filled(TinySANeck(C, heads=2))
    x, positions = frame([cloud(0, 100), FAR])
    x.features.requires_grad_()
    leaves, g = [x.features, *neck.parameters()], torch.Generator().manual_seed(1)
    probe = torch.randn(x.features.shape, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad((neck(x, positions, VOXEL).features * probe).sum(), leaves)
    for _ in range(4):
        ways, found = [torch.randn(leaf.shape, generator=g, dtype=torch.float64) for leaf in leaves], []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for leaf, way in zip(leaves, ways, strict=True):
                    leaf += step * way
                found.append(float((neck(x, positions, VOXEL).features * probe).sum()))
            for leaf, way in zip(leaves, ways, strict=True):
                leaf += 1e-6 * way
        slope = sum(float((a * b).sum()) for a, b in zip(grads, ways, strict=True))
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_every_weight_learns_after_one_step():
    torch.manual_seed(0)
    neck = TinySANeck(C, heads=2)
    x, positions = frame([cloud(0)], dtype=torch.float32)
    optimiser = torch.optim.SGD(neck.parameters(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        F.mse_loss(neck(x, positions, VOXEL).features, x.features.roll(1, 1)).backward()
        optimiser.step()
    still = [n for n, p in neck.named_parameters() if not float(p.grad.abs().max())]
    assert still == [], still


def test_under_autocast():
    m = sa().float()
    x, positions = frame([cloud(0)], dtype=torch.float32)
    expected = m(x, positions, VOXEL).features
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x, positions, VOXEL).features
    assert float((out.float() - expected).detach().abs().mean()) < 0.05


def test_size_names_and_sharing(monkeypatch):
    neck = TinySANeck(96)
    assert [sum(p.numel() for p in layer.parameters()) for layer in neck.layers] == [121_536] * 2
    assert neck.layers[0].pos_embed.shape == (3, 96) and 0.01 < float(neck.layers[0].pos_embed.detach().std()) < 0.03
    calls, real = [], tiny_sa.find_tokens
    monkeypatch.setattr(tiny_sa, "find_tokens", lambda *a: calls.append(1) or real(*a))
    TinySANeck(C, modules=3, heads=2)(*frame([cloud(0)], dtype=torch.float32), VOXEL)
    assert len(calls) == 1


def test_errors():
    x, positions = frame([cloud(0)], 16)
    with pytest.raises(ValueError, match="cells of 8 voxels are smaller than a voxel of stride 16"):
        find_tokens(x, positions, VOXEL)
    with pytest.raises(ValueError, match=r"positions are \(3, 3\)"):
        find_tokens(x, positions[:3], VOXEL, cell=16)
    with pytest.raises(ValueError, match="reaches further than"):
        find_tokens(x, positions, VOXEL, cell=16, radius=20.0)
    for wrong in ({"heads": 3}, {"radius": 0.0}, {"cell": 6}, {"neighbours": 0}):
        with pytest.raises(ValueError, match="expected positive"):
            TinySA(C, **{"heads": 2} | wrong)
    with pytest.raises(ValueError, match="at least one"):
        TinySANeck(C, modules=0)
