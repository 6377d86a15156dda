"""SGP head of T-DEED: an encoder-decoder over time of scalable-granularity blocks, and its displacement decoding.

Shapes: B clips, T frames (any number >= 1), C = D channels (a multiple of 16), K classes; inside the head time is the
last axis, (B, C, T). `lengths` (B,) int64 >= 1: real frames of each clip, the rest is padding; None: every frame is
real. Means, norms, pooling and upsampling go over each clip's own frames, so nothing leaks out of padding; outputs at
padded frames are meaningless.

Sources: T-DEED, Xarles et al. 2024; SGP from TriDet, Shi et al. 2023. Parity: arturxe2/T-DEED@ec1ad556
model/modules.py; parameter names follow it, so its weights load with strict=True.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

GROUPS = 16  # of the GroupNorm before each MLP


def real_frames(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """x (B, C, T) -> (B, 1, T) bool, True at real frames."""
    t = torch.arange(x.shape[-1], device=x.device)
    return (t < (len(t) if lengths is None else lengths[:, None, None])).expand(len(x), 1, -1)


def halve(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive max-pooling of each clip to half its length, rounded up. x (B, C, T) -> (B, C, ceil(T/2)), its lengths.

    An even length pools pairs; an odd one has overlapping windows of 3 that end at its first and its last frame.
    """
    x = x.masked_fill(~real_frames(x, lengths), -torch.inf)
    pairs = F.max_pool1d(x, 2, ceil_mode=True)  # (B, C, ceil(T/2))
    threes = F.max_pool1d(x, 3, stride=2, padding=1)  # (B, C, ceil(T/2))
    x = torch.where(lengths[:, None, None] % 2 == 0, pairs, threes)
    lengths = (lengths + 1) // 2
    return x.masked_fill(~real_frames(x, lengths), 0), lengths


def stretch(x: torch.Tensor, lengths: torch.Tensor, T: int) -> torch.Tensor:
    """Linear upsampling, first frame to first, last to last, from ceil(length/2) to length. (B, C, T/2) -> (B, C, T)"""
    short, steps = ((lengths + 1) // 2 - 1)[:, None], (lengths - 1).clamp(min=1)[:, None]  # last index, intervals
    place = torch.arange(T, device=x.device) * short  # (B, T), in units of 1/steps: whole numbers, so no rounding
    left = torch.minimum(place // steps, short)[:, None].expand(-1, x.shape[1], -1)  # (B, C, T)
    right = torch.minimum(left + 1, short[:, None])
    weight = ((place % steps) / steps).to(x.dtype)[:, None]  # (B, 1, T)
    return torch.lerp(x.gather(2, left), x.gather(2, right), weight)


def group_norm(gn: nn.GroupNorm, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """gn(x) in float32 with the statistics of real frames only. x (B, C, T), real (B, 1, T) bool."""
    grouped, real = x.float().unflatten(1, (gn.num_groups, -1)), real[:, None]  # (B, G, C/G, T), (B, 1, 1, T)
    n = real.sum(-1, keepdim=True) * grouped.shape[2]
    mean = grouped.masked_fill(~real, 0).sum((2, 3), keepdim=True) / n  # (B, G, 1, 1)
    centred = (grouped - mean).masked_fill(~real, 0)
    var = centred.square().sum((2, 3), keepdim=True) / n
    normed = (centred * torch.rsqrt(var + gn.eps)).flatten(1, 2)  # (B, C, T)
    return normed * gn.weight[:, None] + gn.bias[:, None]


def conv(in_dim: int, dim: int, kernel: int = 1, groups: int = 1) -> nn.Conv1d:
    """Convolution over time that keeps T, with the start values of the original: N(0, 0.1), bias 0."""
    if kernel % 2 == 0:
        raise ValueError(f"SGP: kernel {kernel}; an even kernel has no middle frame, so an odd number")
    layer = nn.Conv1d(in_dim, dim, kernel, padding=kernel // 2, groups=groups)
    nn.init.normal_(layer.weight, 0, 0.1)
    nn.init.zeros_(layer.bias)
    return layer


def depthwise(dim: int, kernel: int = 1) -> nn.Conv1d:
    return conv(dim, dim, kernel, groups=dim)


def wide_kernel(kernel: int, factor: float) -> int:
    """Size of the second window: (kernel + 1) * factor, rounded, then made odd."""
    return round((kernel + 1) * factor) // 2 * 2 + 1


def mlp(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(dim, 4 * dim, 1), nn.GELU(), nn.Conv1d(4 * dim, dim, 1))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each frame, 0 at padding. x (B, C, T), real (B, 1, T) bool -> (B, C, T)"""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dim, 1))
        self.bias = nn.Parameter(torch.zeros(1, dim, 1))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.transpose(1, 2), x.shape[1:2], self.weight.flatten(), self.bias.flatten())
        return normed.transpose(1, 2).masked_fill(~real, 0)


def instant(o: torch.Tensor, real: torch.Tensor, fc: nn.Conv1d, global_fc: nn.Conv1d) -> torch.Tensor:
    """Each frame weighted by the clip's mean. o (B, C, T), 0 at padding -> (B, C, T)"""
    mean = o.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)  # (B, C, 1)
    return fc(o) * torch.relu(global_fc(mean))


def window(o: torch.Tensor, narrow: nn.Conv1d, wide: nn.Conv1d, psi: nn.Conv1d) -> torch.Tensor:
    """Two window sizes, gated by the neighbourhood. o (B, C, T), 0 at padding -> (B, C, T)"""
    return (narrow(o) + wide(o)) * psi(o)


class SGPBlock(nn.Module):
    """x + instant(o) + window(o) + o with o = LN(x), then + MLP(GN). x (B, C, T) -> (B, C, T)

    `kernel` (odd): frames of the small window; the large one has about `factor` times as many.
    """

    def __init__(self, dim: int, kernel: int = 9, factor: float = 4):
        super().__init__()
        self.ln, self.gn = ChannelNorm(dim), nn.GroupNorm(GROUPS, dim)
        self.psi, self.convw = depthwise(dim, kernel), depthwise(dim, kernel)
        self.convkw = depthwise(dim, wide_kernel(kernel, factor))
        self.fc, self.global_fc = depthwise(dim), depthwise(dim)
        self.mlp = mlp(dim)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        real = real_frames(x, lengths)
        o = self.ln(x, real)  # (B, C, T)
        x = x + instant(o, real, self.fc, self.global_fc) + window(o, self.convw, self.convkw, self.psi) + o
        return x + self.mlp(group_norm(self.gn, x, real))


class SGPMixer(nn.Module):
    """Joins a level with the next deeper one: six terms -> 1x1 convolution -> GELU, then + MLP(GN).

    skip (B, C, T), deep (B, C, ceil(T/2)), lengths (B,) of `skip` or None -> (B, C, T)
    """

    def __init__(self, dim: int, kernel: int = 9, factor: float = 4):
        super().__init__()
        wide = wide_kernel(kernel, factor)
        self.ln1, self.ln2, self.gn = ChannelNorm(dim), ChannelNorm(dim), nn.GroupNorm(GROUPS, dim)
        self.psi1, self.convw1, self.convkw1 = depthwise(dim, kernel), depthwise(dim, kernel), depthwise(dim, wide)
        self.psi2, self.convw2, self.convkw2 = depthwise(dim, kernel), depthwise(dim, kernel), depthwise(dim, wide)
        self.fc1, self.global_fc1 = depthwise(dim), depthwise(dim)
        self.fc2, self.global_fc2 = depthwise(dim), depthwise(dim)
        self.concat_fc = conv(6 * dim, dim)
        self.mlp = mlp(dim)

    def forward(self, skip: torch.Tensor, deep: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        B, _, T = skip.shape
        lengths = torch.full((B,), T, device=skip.device) if lengths is None else lengths
        real = real_frames(skip, lengths)
        a = self.ln1(skip, real)  # (B, C, T)
        b = self.ln2(deep, real_frames(deep, (lengths + 1) // 2))  # (B, C, ceil(T/2))
        b = stretch(b, lengths, T).masked_fill(~real, 0)  # (B, C, T)
        terms = [window(a, self.convw1, self.convkw1, self.psi1), window(b, self.convw2, self.convkw2, self.psi2)]
        terms += [instant(a, real, self.fc1, self.global_fc1), instant(b, real, self.fc2, self.global_fc2), a, b]
        x = F.gelu(self.concat_fc(torch.cat(terms, dim=1))).float()  # (B, C, T), the residual path stays float32
        return x + self.mlp(group_norm(self.gn, x, real))


class SGPHead(nn.Module):
    """Down `levels` times by 2 (block, pool), a block, up again (mixer with the skip, block). (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, levels: int = 2, kernel: int = 9, factor: float = 4):
        super().__init__()
        self.levels = levels
        self._sgp = nn.ModuleList(SGPBlock(dim, kernel, factor) for _ in range(2 * levels + 1))
        self._sgpMixer = nn.ModuleList(SGPMixer(dim, kernel, factor) for _ in range(levels))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        B, T, _ = x.shape
        lengths = torch.full((B,), T, device=x.device) if lengths is None else lengths
        x = x.transpose(1, 2)  # (B, C, T)
        x = x.masked_fill(~real_frames(x, lengths), 0)  # else a NaN in the padding becomes a NaN in the gradients
        skips = []
        for block in self._sgp[: self.levels]:
            x = block(x, lengths)
            skips.append((x, lengths))
            x, lengths = halve(x, lengths)
        x = self._sgp[self.levels](x, lengths)  # (B, C, T / 2^levels)
        for mixer, block in zip(reversed(self._sgpMixer), self._sgp[self.levels + 1 :], strict=True):
            skip, lengths = skips.pop()
            x = block(mixer(skip, x, lengths), lengths)
        return x.transpose(1, 2)  # (B, T, D)


def move_scores(logits: torch.Tensor, displacement: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Class probabilities moved to the frame that each frame points at, combined by maximum; 0 where none points.

    logits (B, T, K+1), background first; displacement (B, T) frames, d = t - event -> (B, T, K+1) float32 in [0, 1].
    The target t - round(d) is clamped to the clip's real frames; padded frames point nowhere. The background moves
    with its frame, so a row need not add up to 1.
    """
    probs = logits.float().softmax(-1)  # (B, T, K+1)
    t = torch.arange(probs.shape[1], device=probs.device)
    target = (t - displacement.round().long()).clamp(0, len(t) - 1)  # (B, T)
    if lengths is not None:
        target = torch.minimum(target, lengths[:, None] - 1)
        probs = probs.masked_fill((t >= lengths[:, None])[..., None], 0)
    return torch.zeros_like(probs).scatter_reduce(1, target[..., None].expand_as(probs), probs, "amax")
