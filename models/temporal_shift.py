"""Temporal shift inside a 2-D network: TSM, GSM and GSF. Each mixes a frame's channels with its two neighbours'.

Shapes: B clips, T frames, C channels, H W feature map; frames are folded into the batch: (B*T, C, H, W). T is an
argument of `forward`, so any clip length runs. `valid` (B, T) bool, True at real frames, keeps padding out of its
neighbours; None means that all frames are real.

Sources: TSM, Lin et al. 2019; GSM, Sudhakaran et al. 2020; GSF, Sudhakaran et al. 2023, as used in E2E-Spot
(jhong93/spot@edec4201 model/impl) and T-DEED (arturxe2/T-DEED@ec1ad556 model/impl/gsf.py); parameter names follow them.
"""

import math

import torch
import torch.nn as nn


def from_next(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, T, H, W): frame t takes frame t+1, zero at the end."""
    return torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], dim=2)


def from_previous(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, T, H, W): frame t takes frame t-1, zero at the start."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], dim=2)


def unfold(x: torch.Tensor, T: int) -> torch.Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W)"""
    return x.unflatten(0, (-1, T)).transpose(1, 2)


def fold(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W)"""
    return x.transpose(1, 2).flatten(0, 1)


def interleave(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) with channels [a0, a1, .., b0, b1, ..] -> [a0, b0, a1, b1, ..]"""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class TemporalShift(nn.Module):
    """TSM: 1/div of the channels from frame t+1, 1/div from t-1, the rest stay; `causal` shifts from t-1 only."""

    def __init__(self, div: int = 8, causal: bool = False):
        super().__init__()
        self.div, self.causal = div, causal

    def forward(self, x: torch.Tensor, T: int, valid: torch.Tensor | None = None) -> torch.Tensor:
        n = x.shape[1] // self.div
        clip = unfold(x, T)  # (B, C, T, H, W)
        moved = clip[:, : 2 * n] if valid is None else clip[:, : 2 * n] * valid[:, None, :, None, None]
        first = from_previous(moved[:, :n]) if self.causal else from_next(moved[:, :n])
        return fold(torch.cat([first, from_previous(moved[:, n:]), clip[:, 2 * n :]], dim=1))  # (B*T, C, H, W)


class GatedShift(nn.Module):
    """GSM (`fuse=False`) or GSF (`fuse=True`) on all `channels` (a multiple of 4) of its input.

    A 3x3x3 convolution gates each half of the channels; the gated part is shifted in time (first half from t+1, second
    from t-1) and joined with the rest: by addition (GSM) or by learned channel weights (GSF). GSM gates start at 0.
    `shuffle` interleaves the channels of each half, as the originals do; even with gates at 0 it permutes channels.
    """

    def __init__(self, channels: int, fuse: bool = False, shuffle: bool = True):
        super().__init__()
        if channels % 4:
            raise ValueError(f"GatedShift: {channels} channels; the two halves are interleaved, so a multiple of 4")
        self.channels, self.fuse, self.shuffle = channels, fuse, shuffle
        self.conv3D = nn.Conv3d(channels, 2, 3, padding=1, groups=2)
        self.bn = nn.BatchNorm3d(channels)
        if fuse:
            self.channel_conv1 = nn.Conv2d(2, 1, 3, padding=1)
            self.channel_conv2 = nn.Conv2d(2, 1, 3, padding=1)
        else:
            nn.init.zeros_(self.conv3D.weight)
            nn.init.zeros_(self.conv3D.bias)

    def forward(self, x: torch.Tensor, T: int, valid: torch.Tensor | None = None) -> torch.Tensor:
        clip = unfold(x, T)  # (B, C, T, H, W)
        real = None if valid is None else valid[:, None, :, None, None].to(x.dtype)  # (B, 1, T, 1, 1)
        act = torch.relu(self.bn(clip))
        gate = torch.tanh(self.conv3D(act if real is None else act * real))  # (B, 2, T, H, W)
        halves = []
        for i, (part, shift) in enumerate(zip(clip.chunk(2, dim=1), (from_next, from_previous), strict=True)):
            gated = gate[:, i : i + 1] * part  # (B, C/2, T, H, W)
            moved, rest = shift(gated if real is None else gated * real), part - gated
            out = self._fuse(i, moved, rest, real) if self.fuse else moved + rest
            halves.append(interleave(out) if self.shuffle else out)
        return fold(torch.cat(halves, dim=1))  # (B*T, C, H, W)

    def _fuse(self, i: int, moved: torch.Tensor, rest: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """GSF: a weight per channel and frame from the two pooled maps, seen as a 2-channel (C/2) x T image."""
        pooled = torch.stack([moved.mean((3, 4)), rest.mean((3, 4))], dim=1)  # (B, 2, C/2, T)
        if real is not None:
            pooled = pooled * real[..., 0, 0][:, None]
        conv = self.channel_conv2 if i else self.channel_conv1
        w = torch.sigmoid(conv(pooled))[:, 0, :, :, None, None]  # (B, C/2, T, 1, 1)
        return moved * w + rest * (1 - w)


class PartialShift(nn.Module):
    """A GatedShift on the first quarter of the channels (rounded up to a multiple of 4); the others pass."""

    def __init__(self, channels: int, fuse: bool = False, shuffle: bool = True):
        super().__init__()
        self.gated = math.ceil(channels // 4 / 4) * 4
        self.shift = GatedShift(self.gated, fuse, shuffle)

    def forward(self, x: torch.Tensor, T: int, valid: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([self.shift(x[:, : self.gated], T, valid), x[:, self.gated :]], dim=1)


def make_shift(kind: str, channels: int, shuffle: bool = True) -> nn.Module | None:
    """none | tsm | gsm | gsf -> the module for a feature map of `channels`, or None."""
    if kind == "none":
        return None
    if kind == "tsm":
        return TemporalShift()
    if kind in ("gsm", "gsf"):
        return PartialShift(channels, fuse=kind == "gsf", shuffle=shuffle)
    raise ValueError(f"shift {kind!r}: expected none, tsm, gsm or gsf")
