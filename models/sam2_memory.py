"""SAM 2's memory: what an encoder makes of a frame and its masks, and how a later frame's features attend to it.

Rotary positions are real-valued (pairs of channels turned by an angle), so the attention exports to ONNX. Grids may
have any shape. Keys can be hidden: a memory of fixed size that is not full yet is the same as a shorter one.

Shapes: B frames, P objects of each, R = B x P rows, D width of the features, C width of the memory (64 in SAM 2), h w
grid of the features, S = h w, M memories of S keys each. Source: Ravi et al., SAM 2, arXiv 2408.00714; parameter names
are those of sam2's `memory_encoder` and `memory_attention`.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from models.sam_prompt_encoder import ChannelNorm

BASE = 10000.0  # wavelengths of sines and of rotary positions grow up to this
POSITION = 0.1  # weight of the position code added to a frame's features


def sine_code(dim: int, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Position code of the cells of a grid (h, w), y in the first half of the channels -> (D, h, w) float32 on the
    device of `like`. Sides count from 1 and span 2 pi whatever the grid."""
    half = dim // 2
    wave = BASE ** (2 * (torch.arange(half, device=like.device) // 2) / half)  # (D / 2,)
    y, x = (
        torch.arange(1, n + 1, device=like.device, dtype=torch.float32) / (n + 1e-6) * 2 * math.pi / wave[:, None]
        for n in grid
    )
    odd = (torch.arange(half, device=like.device) % 2 == 1)[:, None]
    y, x = (torch.where(odd, angle.cos(), angle.sin()) for angle in (y, x))  # (D / 2, h), (D / 2, w)
    h, w = grid
    return torch.cat([y[:, :, None].expand(-1, h, w), x[:, None].expand(-1, h, w)])


# ---- encoder


class MaskDownsampler(nn.Module):
    """Maps of one channel -> (R, D, h, w) by convolutions of stride 2, channels x 4 at each."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        layers, c = [], 1
        for _ in range(int(math.log2(stride))):
            layers += [nn.Conv2d(c, 4 * c, 3, stride=2, padding=1), ChannelNorm(4 * c), nn.GELU()]
            c *= 4
        self.encoder = nn.Sequential(*layers, nn.Conv2d(c, dim, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class ConvNeXtBlock(nn.Module):
    """x + gamma MLP(LN(7 x 7 depthwise convolution of x)), (R, D, h, w)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), ChannelNorm(dim)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class Fuser(nn.Module):
    """Blocks one after the other; one level deeper in names, as released."""

    def __init__(self, dim: int, blocks: int):
        super().__init__()
        self.layers = nn.ModuleList(ConvNeXtBlock(dim) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functools.reduce(lambda x, layer: layer(x), self.layers, x)


class MemoryEncoder(nn.Module):
    """A frame's features and the mask of each object -> a map to remember per object."""

    def __init__(self, dim: int = 256, out: int = 64, mask_stride: int = 16, blocks: int = 2):
        super().__init__()
        if mask_stride < 1 or mask_stride & (mask_stride - 1):
            raise ValueError(f"MemoryEncoder: mask_stride {mask_stride}, expected a power of 2")
        self.mask_stride = mask_stride
        self.mask_downsampler = MaskDownsampler(dim, mask_stride)
        self.pix_feat_proj, self.fuser = nn.Conv2d(dim, dim, 1), Fuser(dim, blocks)
        self.out_proj = nn.Conv2d(dim, out, 1)

    def forward(self, features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """features (B, D, h, w); masks (B, P, mask_stride h, mask_stride w) as they shall be read: probabilities, which
        SAM 2 stretches to -10..10 -> (B, P, C, h, w). ValueError for masks of another size."""
        B, P = masks.shape[:2]
        want = tuple(self.mask_stride * n for n in features.shape[-2:])
        if masks.shape[-2:] != want or len(features) != B:
            raise ValueError(f"MemoryEncoder: features {tuple(features.shape)}, masks {tuple(masks.shape)}; expected "
                             f"(B, P, {want[0]}, {want[1]})")  # fmt: skip
        drawn = self.mask_downsampler(masks.flatten(0, 1)[:, None]).unflatten(0, (B, P))
        seen = self.pix_feat_proj(features)[:, None] + drawn
        return self.out_proj(self.fuser(seen.flatten(0, 1))).unflatten(0, (B, P))


# ---- attention


def rotary_angles(dim: int, grid: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Angle of each pair of channels at each cell of a grid (h, w), row by row: x in the first half of the pairs, y in
    the second -> (S, dim / 2) float32 on the device of `like`."""
    h, w = grid
    speed = BASE ** (-torch.arange(0, dim, 4, device=like.device, dtype=torch.float32) / dim)  # (dim / 4,)
    y, x = (torch.arange(n, device=like.device, dtype=torch.float32)[:, None] * speed for n in grid)
    x, y = x[None].expand(h, -1, -1), y[:, None].expand(-1, w, -1)  # (h, w, dim / 4)
    return torch.cat([x, y], -1).flatten(0, 1)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x (R, heads, S, d), neighbouring channels are one pair, turned by angles (S, d / 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (R, heads, S, d / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class RotaryAttention(nn.Module):
    """Attention with rotary positions of queries and keys. kv_dim: width of keys and values before projection."""

    def __init__(self, dim: int, heads: int, kv_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj, self.v_proj = nn.Linear(kv_dim or dim, dim), nn.Linear(kv_dim or dim, dim)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: tuple[int, int],
        unplaced: int = 0,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """q (R, S, D); k, v (R, M S + unplaced, kv_dim), the last `unplaced` of them without a place in the grid; seen
        bool (R, 1, 1, keys), None: all -> (R, S, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, heads, n, D / heads)
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        angles = rotary_angles(q.shape[-1], grid, q)
        placed = k.shape[2] - unplaced
        turned = rotate(k[:, :, :placed], angles.repeat(placed // len(angles), 1))
        k = torch.cat([turned, k[:, :, placed:]], 2) if unplaced else turned
        out = F.scaled_dot_product_attention(rotate(q, angles), k, v, attn_mask=seen)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MemoryAttentionLayer(nn.Module):
    """The features look at themselves, then at the memory; feed-forward. Norms come first."""

    def __init__(self, dim: int, memory_dim: int, hidden: int, heads: int):
        super().__init__()
        self.self_attn = RotaryAttention(dim, heads)
        self.cross_attn_image = RotaryAttention(dim, heads, memory_dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, keys, memory, grid, unplaced=0, seen=None) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, grid)
        x = x + self.cross_attn_image(self.norm2(x), keys, memory, grid, unplaced, seen)
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))


class MemoryAttention(nn.Module):
    """A frame's features after looking at memories."""

    def __init__(self, dim: int = 256, memory_dim: int = 64, layers: int = 4, hidden: int = 2048, heads: int = 1):
        super().__init__()
        if dim % (4 * heads):
            raise ValueError(f"MemoryAttention: width {dim} of {heads} heads; expected a multiple of 4 per head")
        self.layers = nn.ModuleList(MemoryAttentionLayer(dim, memory_dim, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: torch.Tensor,
        x_position: torch.Tensor,
        memory: torch.Tensor,
        memory_position: torch.Tensor,
        grid: tuple[int, int],
        unplaced: int = 0,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (R, S, D) of a grid (h, w), memory (R, M S + unplaced, C), each with its position code; the last `unplaced`
        keys have no place in the grid (object pointers). seen bool (R, keys): which exist, at least one of each row;
        None: all -> (R, S, D). ValueError for a grid or a number of keys that do not fit."""
        S, keys = grid[0] * grid[1], memory.shape[1] - unplaced
        if x.shape[1] != S or unplaced < 0 or keys < 0 or keys % S:
            raise ValueError(f"MemoryAttention: {x.shape[1]} cells for a grid {tuple(grid)}, {memory.shape[1]} keys of "
                             f"which {unplaced} have no place; expected {S}, and a multiple of it as keys")  # fmt: skip
        x = x + POSITION * x_position
        seen = None if seen is None else seen[:, None, None]
        for layer in self.layers:
            x = layer(x, memory + memory_position, memory, grid, unplaced, seen)
        return self.norm(x)
