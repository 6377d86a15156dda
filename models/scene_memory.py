"""The memory of a scene: what earlier frames left in each voxel, and how a new frame's features take it in.

ESAM (Xu et al., 2025, "EmbodiedSAM", section 3), after Online3D (Xu et al., 2024): adapters between the encoder and the
decoder of a sparse U-Net, one for each of the strides 2, 4, 8, 16. For the features X of a frame and the history H:

    H <- channel-wise maximum of H and X, on the voxels of both
    near = voxels of H in the frame's axis-aligned box, `scale` times as large
    d1, d3 = relu(norm(convolution 3 of H near)), with dilation 1 and 3;  g = mean of H near
    out = relu(X + norm([d1, d3, g] W)), on the voxels of X

The first frame of a scene is its own history, and what it leaves there is `out`; later frames leave X: so published.
Names of parameters are the published ones. Every item of a batch has its own history and its own box. Everything known
of a scene is in the state: one state in, another out; gradients pass through all frames of a clip.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from models.sparse_conv import SparseBatchNorm, SparseConv, SparseTensor, sparse_convolution
from models.sparse_maps import AXIS_BITS, CENTRE, Coordinates, KernelMap, neighbours, unpack

LEVELS = 4


@dataclass
class LevelHistory:
    """Voxels of one level. keys: (H,) int64, sorted (sparse_maps). features: (H, C). last: (H,) int32, the frame that
    last had the voxel."""

    keys: torch.Tensor
    features: torch.Tensor
    last: torch.Tensor

    def take(self, rows: torch.Tensor) -> "LevelHistory":
        """rows: (H,) bool or increasing indices."""
        return LevelHistory(self.keys[rows], self.features[rows], self.last[rows])


@dataclass
class MemoryState:
    """levels: one history for each of the four levels, None where the memory has no adapter. frame: how many there were."""

    levels: list[LevelHistory | None]
    frame: int

    def nbytes(self) -> int:
        histories = [h for h in self.levels if h is not None]
        return sum(t.numel() * t.element_size() for h in histories for t in (h.keys, h.features, h.last))

    def detach(self) -> "MemoryState":
        """The same without the graph of the frames so far."""
        cut = [h and replace(h, features=h.features.detach()) for h in self.levels]
        return MemoryState(cut, self.frame)

    def to(self, device: torch.device | str) -> "MemoryState":
        moved = [h and LevelHistory(h.keys.to(device), h.features.to(device), h.last.to(device)) for h in self.levels]
        return MemoryState(moved, self.frame)


class SceneMemory(nn.Module):
    """channels: of the levels at strides 2, 4, 8, 16. levels: those that get an adapter, the others pass as they are.

    scale: size of the neighbourhood, in boxes of the frame. What bounds the memory: queue keeps voxels seen in the last
    queue - 1 frames, this one included (published; -1: all); radius keeps voxels that lie at most that many voxels of
    stride 1 outside the frame's box along every axis (None: all).

    The last norm of every adapter starts with weight zero, so that a new memory changes nothing. The published one has
    zero in all kernels, which leaves d1 and d3 at zero with zero gradient for good; and a norm in training mode makes
    a kernel that has just left zero as loud as any, so that the memory is there at once, but not in eval mode.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64, 128, 256),
        levels: tuple[int, ...] = (0, 1, 2, 3),
        scale: float = 2.5,
        queue: int = -1,
        radius: float | None = None,
    ):
        super().__init__()
        if len(channels) != LEVELS or min(channels) < 1 or not set(levels) <= set(range(LEVELS)):
            raise ValueError(f"channels {channels}, levels {levels}: expected four positive numbers, levels among 0-3")
        if scale < 1 or queue != -1 and queue < 2 or radius is not None and radius < 0:
            raise ValueError(f"scale {scale}, queue {queue}, radius {radius}: expected scale >= 1, queue -1 or >= 2, "
                             "radius >= 0 or None")  # fmt: skip
        self.channels, self.levels = tuple(channels), tuple(sorted(set(levels)))
        self.scale, self.queue, self.radius = scale, queue, radius
        self.conv_d1, self.conv_d3, self.conv_convert = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, C in enumerate(channels):
            used = i in self.levels
            self.conv_d1.append(_adapter(SparseConv(C, C), C) if used else nn.Identity())
            self.conv_d3.append(_adapter(SparseConv(C, C, dilation=3), C) if used else nn.Identity())
            self.conv_convert.append(_adapter(SparseConv(3 * C, C, kernel_size=1), C) if used else nn.Identity())
            if used:
                nn.init.zeros_(self.conv_convert[i][1].bn.weight)

    def forward(
        self, levels: list[SparseTensor], state: MemoryState | None = None
    ) -> tuple[list[SparseTensor], MemoryState]:
        """levels: features (N_i, C_i) of a frame of each item, at strides 2, 4, 8, 16. state: None at a scene's start.

        Returns features (N_i, C_i) of the same voxels, with the same `coordinates`, and the next state.
        """
        if len(levels) != LEVELS:
            raise ValueError(f"{len(levels)} levels, expected {LEVELS}")
        frame = 0 if state is None else state.frame
        out, histories = list(levels), [None] * LEVELS
        for i in self.levels:
            if levels[i].features.shape[1] != self.channels[i]:
                raise ValueError(f"level {i} has {levels[i].features.shape[1]} channels, expected {self.channels[i]}")
            if state is not None and state.levels[i] is None:
                raise ValueError(f"the state has no history of level {i}: it comes from a memory of other levels")
            past = None if state is None else state.levels[i]
            out[i], histories[i] = self._level(i, levels[i], past, frame)
        return out, MemoryState(histories, frame + 1)

    def _level(self, i: int, x: SparseTensor, past: LevelHistory | None, frame: int):
        """One level of one frame: (features at x's voxels, history)"""
        last = torch.full_like(x.keys, frame, dtype=torch.int32)
        if past is None:
            out = self._adapt(i, x, x, None)
            return out, LevelHistory(x.keys, out.features.to(x.features.dtype), last)
        history, rows, begins = merge(past, LevelHistory(x.keys, x.features, last))
        items = _items(history.keys)
        box = _Box(x.coords, items)
        history, rows = self._forget(history, rows, box, frame)
        near, at = self._near(history, rows, box, x.stride)
        out = self._adapt(i, near, x, at)
        own = torch.where(begins[:, None], out.features.to(x.features.dtype), history.features[rows])
        return out, replace(history, features=history.features.index_copy(0, rows, own))

    def _forget(self, history: LevelHistory, rows: torch.Tensor, box: "_Box", frame: int):
        """Without what is too old or too far away. The frame's own voxels, at `rows`, always stay."""
        if self.queue < 0 and self.radius is None:
            return history, rows
        keep = torch.ones_like(history.keys, dtype=torch.bool)
        if self.queue > 0:
            keep &= frame - history.last < self.queue - 1
        if self.radius is not None:
            coords = unpack(history.keys)
            keep &= box.contains(coords, torch.full_like(box.low, int(self.radius))) | box.empty[coords[:, 0]]
        return history.take(keep), (keep.cumsum(0) - 1)[rows]

    def _near(self, history: LevelHistory, rows: torch.Tensor, box: "_Box", stride: int):
        """The neighbourhood (M, C), and the rows of the frame's own voxels there (N,)."""
        margin = torch.floor((box.high - box.low).clamp(min=0).double() * ((self.scale - 1) / 2)).long()
        inside = box.contains(unpack(history.keys), margin)
        near = history.take(inside)
        return SparseTensor(near.features, Coordinates(near.keys, stride), stride), (inside.cumsum(0) - 1)[rows]

    def _adapt(self, i: int, near: SparseTensor, x: SparseTensor, at: torch.Tensor | None) -> SparseTensor:
        """near (M, C), x (N, C) at rows `at` of near (None: the same voxels) -> (N, C).

        Batch norm in training takes its statistics from the whole neighbourhood, as published. Otherwise nothing but x's
        voxels is computed: it costs the same however much is near.
        """
        layers = [sequence[i] for sequence in (self.conv_d1, self.conv_d3, self.conv_convert)]
        whole = at is None or any(norm.bn.training for _, norm in layers)
        target, parts = near if whole else x, []
        for conv, norm in layers[:2]:
            parts.append(sparse_convolution(near.features, conv.kernel, _kernel_map(near, target, conv)))
            parts[-1] = norm.bn(parts[-1]).relu()
        mean = item_means(near, target).to(parts[0].dtype)
        conv, norm = layers[2]
        a = norm.bn(torch.cat([*parts, mean], 1) @ conv.kernel)
        if whole and at is not None:
            a = a.index_select(0, at)
        return x.with_features((a + x.features).relu())


def _adapter(conv: SparseConv, C: int) -> nn.Sequential:
    return nn.Sequential(conv, SparseBatchNorm(C))


def _items(keys: torch.Tensor) -> int:
    """How many items sorted keys (N,) speak of."""
    return int(keys[-1] >> 3 * AXIS_BITS) + 1 if len(keys) else 0


def _kernel_map(near: SparseTensor, target: SparseTensor, conv: SparseConv) -> KernelMap:
    """From the voxels of `near` to those of `target`, of the same stride, all of them among `near`'s."""
    k, dilation = conv.kernel_size, conv.dilation
    if target is near:
        return near.coordinates.submanifold(near.stride, k, dilation)
    rows, found = neighbours(near.keys, target.keys, k, dilation, near.stride)
    offset, to = found.nonzero(as_tuple=True)
    return KernelMap(k**3, len(near.keys), len(target.keys), offset, rows[found], to)


def item_means(near: SparseTensor, target: SparseTensor) -> torch.Tensor:
    """near (M, C), target with N voxels -> (N, C): the mean over the voxels of near of the same item."""
    items = max(_items(near.keys), _items(target.keys))
    counts = torch.stack([torch.bincount(x.batch, minlength=items) for x in (near, target)]).tolist()
    parts = zip(near.features.split(counts[0]), *counts, strict=True)
    return torch.cat([(part.sum(0) / max(m, 1)).expand(n, -1) for part, m, n in parts])


def merge(past: LevelHistory, new: LevelHistory) -> tuple[LevelHistory, torch.Tensor, torch.Tensor]:
    """Voxels of both; features are the maximum, `last` that of new.

    Returns the history (U,), the rows of new's voxels in it (N,), and for each of them whether its item is not in past
    (N,) bool.
    """
    place = torch.searchsorted(past.keys, new.keys)
    known = torch.zeros_like(place, dtype=torch.bool)
    if len(past.keys):
        known = past.keys[place.clamp(max=len(past.keys) - 1)] == new.keys
    added = (~known).long()
    rows = place + added.cumsum(0) - added
    fresh = new.keys[~known]
    old_rows = torch.arange(len(past.keys), device=rows.device) + torch.searchsorted(fresh, past.keys)
    U = len(past.keys) + len(fresh)
    keys = past.keys.new_empty(U).index_copy(0, old_rows, past.keys).index_copy(0, rows, new.keys)
    last = past.last.new_empty(U).index_copy(0, old_rows, past.last).index_copy(0, rows, new.last)
    features = new.features.new_full((U, new.features.shape[1]), -torch.inf)
    features = features.index_copy(0, old_rows, past.features.to(features.dtype))
    features = features.index_copy(0, rows, torch.maximum(features.index_select(0, rows), new.features))
    seen = torch.bincount(past.keys >> 3 * AXIS_BITS, minlength=_items(new.keys)) > 0
    begins = ~seen[new.keys >> 3 * AXIS_BITS]
    return LevelHistory(keys, features, last), rows, begins


class _Box:
    """The axis-aligned box of every item: low, high (B, 3) int64 in voxels of stride 1, empty (B,) bool."""

    def __init__(self, coords: torch.Tensor, items: int):
        """coords: (N, 4), batch x y z"""
        item = coords[:, :1].expand(-1, 3)
        self.low = coords.new_full((items, 3), CENTRE).scatter_reduce(0, item, coords[:, 1:], "amin")
        self.high = coords.new_full((items, 3), -CENTRE).scatter_reduce(0, item, coords[:, 1:], "amax")
        self.empty = self.low[:, 0] > self.high[:, 0]

    def contains(self, coords: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        """coords (H, 4), margin (B, 3) -> (H,) bool: at most that far outside, the border included"""
        item, xyz = coords[:, 0], coords[:, 1:]
        return ((xyz >= (self.low - margin)[item]) & (xyz <= (self.high + margin)[item])).all(1)
