"""Heads over time: they turn per-frame features into features that know their neighbours. (B, T, D) -> (B, T, D)

identity   the baseline of the notes: nothing
bigru      bidirectional GRU, hidden D, projected back to D: the reference head of the field (E2E-Spot)
bimamba2   x + BiMamba2(norm(x)), 1..n layers, two directions with separate weights
mamba2     x + Mamba2(norm(x)), 1..n layers, causal: frame t sees frames <= t
sgp        encoder-decoder over time of T-DEED, as many levels as layers (models/sgp.py)

Shapes: B clips, T frames (any number), D width. `lengths` (B,) int64: real frames of each clip, the rest is padding;
None means that every frame is real. Outputs at padded frames are meaningless unless stated; nothing leaks out of them.
"""

import torch
import torch.nn as nn

from models.mamba2 import Mamba2
from models.sgp import SGPHead


def reverse(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """x (B, T, D): each clip's real frames in reverse order, its padding left in place. Its own inverse."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
    last = lengths[:, None] - 1  # (B, 1)
    index = torch.where(t <= last, last - t, t)  # (B, T)
    return x.gather(1, index[..., None].expand_as(x))  # (B, T, D)


class Identity(nn.Module):
    """x (B, T, D) -> x"""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return x


class BiGRU(nn.Module):
    """Bidirectional GRU with hidden size D, then a linear map 2D -> D. (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, layers: int = 1):
        super().__init__()
        self.forth = nn.ModuleList(nn.GRU(dim, dim, batch_first=True) for _ in range(layers))
        self.back = nn.ModuleList(nn.GRU(dim, dim, batch_first=True) for _ in range(layers))
        self.join = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(layers))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        for forth, back, join in zip(self.forth, self.back, self.join, strict=True):
            ahead = forth(x)[0]  # (B, T, D)
            behind = reverse(back(reverse(x, lengths))[0], lengths)  # (B, T, D), starts at each clip's last frame
            x = join(torch.cat([ahead, behind], dim=-1))  # (B, T, D)
        return x


class BiMamba2(nn.Module):
    """Two Mamba2 with separate weights, the second over the reversed clip, summed. (B, T, D) -> (B, T, D)

    Each of `fwd` and `bwd` loads a mamba_ssm Mamba2 state dict. The backward direction starts at each clip's own last
    frame, so padding changes nothing.
    """

    def __init__(self, dim: int, **mamba2):
        super().__init__()
        self.fwd = Mamba2(dim, **mamba2)
        self.bwd = Mamba2(dim, **mamba2)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        ahead = self.fwd(x, lengths=lengths)
        behind = reverse(self.bwd(reverse(x, lengths), lengths=lengths), lengths)
        return ahead + behind  # (B, T, D)


class MambaHead(nn.Module):
    """Pre-norm residual layers, x + mixer(norm(x)), then a last norm. (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, layers: int = 1, bidirectional: bool = True, **mamba2):
        super().__init__()
        mixer = BiMamba2 if bidirectional else Mamba2
        self.mixers = nn.ModuleList(mixer(dim, **mamba2) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(layers))
        self.last_norm = nn.RMSNorm(dim)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), lengths=lengths)
        return self.last_norm(x)


def make_head(kind: str, dim: int, layers: int = 1, **mamba2) -> nn.Module:
    """identity | bigru | bimamba2 | mamba2 | sgp; `mamba2` holds keywords of Mamba2 (d_state, headdim, expand, impl)."""
    if kind == "identity":
        return Identity()
    if kind == "bigru":
        return BiGRU(dim, layers)
    if kind in ("bimamba2", "mamba2"):
        return MambaHead(dim, layers, bidirectional=kind == "bimamba2", **mamba2)
    if kind == "sgp":
        return SGPHead(dim, levels=layers)
    raise ValueError(f"head {kind!r}: expected identity, bigru, bimamba2, mamba2 or sgp")
