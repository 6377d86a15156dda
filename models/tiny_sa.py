"""Tiny-SA: attention among the coarse cells of a frame, added to the features of its voxels.

A cell is what a voxel of stride `cell` covers. Every occupied cell is a token: the mean feature g and the mean position
c of its voxels. With u = LN(g), q = W_q u, k = W_k u, v = W_v u, and e_mn = P (c_n - c_m) / radius of a learnable P:

    a_mn = softmax over n of q_m (k_n + e_mn) / sqrt(C / heads), n: the nearest tokens of the item within the radius
    t_m = g_m + W_o sum_n a_mn (v_n + e_mn);  t_m <- t_m + FFN(LN(t_m))
    out_i = x_i + W_z LN(y_i), y_i: mean of the 8 nearest tokens of voxel i, weighted with 1 / (d^2 + 1e-6)

W_z starts at zero, so that a new module changes nothing. Nothing is drawn at random and no token sees another item's:
a cloud gives the same result every time, alone or in a batch. Our own design; local attention with relative positions
is that of Zhao et al., 2021, "Point Transformer", section 3.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from models.sparse_conv import Groups, SparseTensor
from models.sparse_maps import AXES, AXIS_BITS, REACH, coarsen, find, group

NEAREST = 8  # tokens that a voxel takes its feature from
EPSILON = 1e-6  # m^2
AT_ONCE = 1 << 20  # distances in memory at a time

# ---- where tokens lie


@dataclass
class Interpolation:
    """rows (V, 8) int64 of tokens 0..count-1 and weights (V, 8) of sum 1, which are 0 where an item has fewer tokens."""

    rows: torch.Tensor
    weights: torch.Tensor
    count: int

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """(M, C) -> (V, C)"""
        return _Interpolate.apply(t, self)

    @cached_property
    def by_token(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Voxels (P,) int32 and weights (P,), those of token m from starts[m] (M + 1,) int32"""
        order, starts = group(self.rows.flatten(), self.count)
        return order // self.rows.shape[1], self.weights.flatten()[order.long()], starts


class _Interpolate(torch.autograd.Function):
    """Sums in a fixed order, forward and back."""

    @staticmethod
    def forward(ctx, t, up):
        ctx.up = up
        return F.embedding_bag(up.rows, t, mode="sum", per_sample_weights=up.weights.to(t.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        voxels, weights, starts = ctx.up.by_token
        to_t = F.embedding_bag(voxels, grad.contiguous(), starts, mode="sum", include_last_offset=True,
                               per_sample_weights=weights.to(grad.dtype))  # fmt: skip
        return to_t, None


@dataclass
class Tokens:
    """The M tokens of V voxels.

    cells: which token each voxel belongs to. centres: (M, 3) m. offsets: (M, K, 3), (c_n - c_m) / radius of at most K
    neighbours, oneself first, then by distance; absent: (M, K) bool, no such neighbour; sources: their rows, M x K.
    """

    cells: Groups
    centres: torch.Tensor
    offsets: torch.Tensor
    absent: torch.Tensor
    sources: Groups
    up: Interpolation


@torch.no_grad()
def find_tokens(
    x: SparseTensor, positions: torch.Tensor, voxel: float, cell: int = 8, radius: float = 0.3, neighbours: int = 32
) -> Tokens:
    """positions: (V, 3) float m of x's voxels, each inside its own. voxel: m at stride 1. cell: a power of two, >= the
    stride of x. Linear in voxels: neighbours are looked for in the cells around."""
    if positions.shape != (len(x.keys), 3):
        raise ValueError(f"positions are {tuple(positions.shape)}, expected ({len(x.keys)}, 3)")
    if x.stride > cell:
        raise ValueError(f"cells of {cell} voxels are smaller than a voxel of stride {x.stride}: take a larger cell")
    keys = x.coordinates.keys(cell)
    rows = torch.searchsorted(keys, coarsen(x.keys, cell))
    cells = Groups(rows, len(keys))
    centres = cells.mean(positions)
    reach = max(2, math.ceil(radius / (cell * voxel)))
    around, there = _cells_around(keys, reach, cell)
    offsets, absent, sources = _within(centres, around, there, radius, neighbours)
    up = _nearest(keys, centres, around, there, positions, rows, reach * cell * voxel)
    return Tokens(cells, centres, offsets, absent, Groups(sources.flatten(), len(keys)), up)


def _cells_around(keys: torch.Tensor, reach: int, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (M,) in the cells at most `reach` cells away: rows (M, L), one's own where there (M, L) is False."""
    if (2 * reach + 1) * cell > REACH:
        raise ValueError(f"{reach} cells of {cell} voxels: reaches further than {REACH} voxels; take a larger cell")
    steps = torch.arange(-reach, reach + 1, device=keys.device) * cell
    x, y, z = (steps * axis for axis in AXES)
    rows, found = find(keys, keys[:, None] + (x[:, None, None] + y[:, None] + z).flatten())
    place = found.cumsum(1) - 1
    L = int(place[:, -1].amax()) + 1
    token = found.nonzero()[:, 0]
    around = torch.arange(len(keys), device=keys.device)[:, None].repeat(1, L)
    around[token, place[found]] = rows[found]
    return around, torch.arange(L, device=keys.device) <= place[:, -1:]


def _within(centres: torch.Tensor, around: torch.Tensor, there: torch.Tensor, radius: float, most: int):
    """The `most` nearest tokens within the radius: offsets (M, K, 3) in radii, absent (M, K), rows (M, K)."""
    offsets = centres[around] - centres[:, None]
    distance = offsets.square().sum(2).masked_fill_(~there, torch.inf)
    distance.masked_fill_(distance > radius**2, torch.inf)
    distance, order = torch.sort(distance, dim=1, stable=True)
    absent = distance.isinf()
    K = min(most, int((~absent).sum(1).amax()))
    order, absent = order[:, :K], absent[:, :K]
    offsets = offsets.gather(1, order[..., None].expand(-1, -1, 3)) / radius
    return offsets, absent, around.gather(1, order)


def _nearest(keys, centres, around, there, positions, rows, sure: float) -> Interpolation:
    """The 8 tokens nearest to every voxel (V,), of cell `rows`, first among those around its cell. All tokens not among
    these are at least `sure` m away; where the eighth is no nearer, all of the item are asked."""
    L, chosen, distances = around.shape[1], [], []
    table = centres.T[:, around].masked_fill_(~there, torch.inf).transpose(0, 1).flatten(1)  # (M, 3 L)
    size = max(1, AT_ONCE // (3 * L))
    for p, r in zip(positions.split(size), rows.split(size), strict=True):
        d = table.index_select(0, r).view(-1, 3, L).sub_(p[:, :, None]).square_().sum(1)
        d, order = d.topk(min(NEAREST, d.shape[1]), dim=1, largest=False)
        chosen.append(F.pad(around[r].gather(1, order), (0, NEAREST - d.shape[1])))
        distances.append(F.pad(d, (0, NEAREST - d.shape[1]), value=torch.inf))
    chosen, distances = torch.cat(chosen), torch.cat(distances)
    unsure = (distances[:, -1] > sure**2).nonzero()[:, 0]
    if len(unsure):
        chosen[unsure], distances[unsure] = _among_all(keys, centres, positions[unsure], rows[unsure])
    weights = 1 / (distances + EPSILON)
    return Interpolation(chosen, weights / weights.sum(1, keepdim=True), len(keys))


def _among_all(keys, centres, positions, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 nearest tokens of an item for voxels (U,) of cell `rows`, and squared distances, inf where there are fewer."""
    item = keys >> 3 * AXIS_BITS
    tokens, voxels = torch.bincount(item), torch.bincount(item[rows], minlength=int(item[-1]) + 1)
    tokens, voxels = torch.stack([tokens, voxels]).tolist()
    chosen, distances, first = [], [], 0
    for c, p in zip(centres.split(tokens), positions.split(voxels), strict=True):
        for part in p.split(max(1, AT_ONCE // max(1, len(c)))):
            d = sum((a - b[:, None]).square_() for a, b in zip(c.unbind(1), part.unbind(1), strict=True))
            d, order = d.topk(min(NEAREST, len(c)), dim=1, largest=False)
            chosen.append(F.pad(order + first, (0, NEAREST - d.shape[1]), value=first))
            distances.append(F.pad(d, (0, NEAREST - d.shape[1]), value=torch.inf))
        first += len(c)
    return torch.cat(chosen), torch.cat(distances)


# ---- attention


class TinySA(nn.Module):
    """radius: m that a token sees. neighbours: at most so many of the nearest, itself included. cell: size of a token's
    cell in voxels of stride 1, at least the stride of what comes in. pos_embed: (3, channels), P."""

    def __init__(
        self, channels: int = 96, heads: int = 4, radius: float = 0.3, neighbours: int = 32, cell: int = 8, ffn: int = 4
    ):
        super().__init__()
        if channels % heads or radius <= 0 or min(heads, neighbours, cell) < 1 or cell & cell - 1:
            raise ValueError(f"channels {channels}, heads {heads}, radius {radius}, neighbours {neighbours}, cell {cell}:"
                             " expected positive, channels a multiple of heads, cell a power of two")  # fmt: skip
        C = channels
        self.heads, self.radius, self.neighbours, self.cell = heads, radius, neighbours, cell
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(C), nn.LayerNorm(C), nn.LayerNorm(C)
        self.query, self.value, self.out = (nn.Linear(C, C) for _ in range(3))
        self.key = nn.Linear(C, C, bias=False)  # a constant would cancel in the softmax
        self.pos_embed = nn.Parameter(0.02 * torch.randn(3, C))
        self.ffn = nn.Sequential(nn.Linear(C, ffn * C), nn.GELU(), nn.Linear(ffn * C, C))
        self.up = nn.Linear(C, C)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def tokens(self, x: SparseTensor, positions: torch.Tensor, voxel: float) -> Tokens:
        return find_tokens(x, positions, voxel, self.cell, self.radius, self.neighbours)

    def attend(self, u: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """(M, C) -> (M, C). The sums with e are those of its factors P and (c_n - c_m) / radius: no (M, K, C) of it."""
        (M, K), h = tokens.absent.shape, self.heads
        q = self.query(u).view(M, h, -1)
        kv = torch.cat([self.key(u), self.value(u)], 1)
        k, v = tokens.sources.spread(kv).view(M, K, 2, h, -1).permute(2, 0, 3, 1, 4)  # (M, h, K, d) each
        P = self.pos_embed.view(3, h, -1).to(q.dtype)
        offsets = tokens.offsets.to(q.dtype)
        seen = torch.einsum("mha,mka->mhk", torch.einsum("mhd,ahd->mha", q, P), offsets)
        scores = (k @ q[..., None])[..., 0] + seen  # (M, h, K)
        scores = scores.masked_fill(tokens.absent[:, None], -torch.inf) / math.sqrt(q.shape[2])
        a = scores.softmax(2).to(v.dtype)
        o = (a[:, :, None] @ v)[:, :, 0] + torch.einsum("mha,ahd->mhd", a @ offsets, P)
        return self.out(o.flatten(1))

    def forward(
        self, x: SparseTensor, positions: torch.Tensor, voxel: float, tokens: Tokens | None = None
    ) -> SparseTensor:
        """x: (V, C) at any stride up to `cell`. positions: (V, 3) float m of its voxels, each inside its own: the means
        of their points, or their middles. voxel: m at stride 1. tokens: those of these voxels, if known."""
        tokens = self.tokens(x, positions, voxel) if tokens is None else tokens
        wide = torch.promote_types(x.features.dtype, torch.float32)
        g = tokens.cells.mean(x.features.to(wide))
        t = g + self.attend(self.norm1(g), tokens)
        t = t + self.ffn(self.norm2(t))
        y = tokens.up(t.to(wide))
        return x.with_features(x.features + self.up(self.norm3(y)))


class TinySANeck(nn.Module):
    """Several Tiny-SA one after the other; where tokens lie is found once."""

    def __init__(self, channels: int = 96, modules: int = 2, **options):
        """options: of TinySA"""
        super().__init__()
        if modules < 1:
            raise ValueError(f"modules {modules}: expected at least one")
        self.layers = nn.ModuleList(TinySA(channels, **options) for _ in range(modules))

    def forward(self, x: SparseTensor, positions: torch.Tensor, voxel: float) -> SparseTensor:
        tokens = self.layers[0].tokens(x, positions, voxel)
        for layer in self.layers:
            x = layer(x, positions, voxel, tokens)
        return x
