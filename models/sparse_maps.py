"""Voxel keys, levels and kernel maps of sparse convolution: integers only, sorted, the same on every device.

A voxel is one int64: ((b * 2^17 + x + 2^16) * 2^17 + y + 2^16) * 2^17 + z + 2^16, so keys sort by (b, x, y, z), the
order of rows everywhere, and a neighbour is an addition: key(c + d) = key(c) + (dx * 2^34 + dy * 2^17 + dz). Coordinates
stay in units of the finest voxel; those of a level of stride s are multiples of s.
Kernel index i = ix + k iy + k^2 iz, x fastest; offset along an axis: (i - k // 2) * dilation * stride for odd k, i *
dilation * stride for even k. The centre is not shared by the others: a kernel of even size begins at its own voxel.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

AXIS_BITS, CENTRE, BATCHES = 17, 1 << 16, 1 << 12
REACH = 1024  # voxels at either end of an axis that no point may lie in, so that no neighbour leaves the axis's bits
AXES = (1 << 2 * AXIS_BITS, 1 << AXIS_BITS, 1)  # what a step of one along x, y, z adds to a key
BLOCK_ROWS = 8192  # output rows at a time on a CPU: their products stay near its cache
BLOCK_ROWS_GPU = 1 << 17  # on other devices: bounds the memory of the products


def pack(coords: torch.Tensor) -> torch.Tensor:
    """coords: integers (N, 4), batch x y z. Returns keys (N,) int64. ValueError where they do not fit."""
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point():
        raise ValueError(f"coords are {tuple(coords.shape)} {coords.dtype}, expected integers (N, 4): batch, x, y, z")
    coords, most = coords.long(), CENTRE - REACH
    if len(coords):
        low, high = coords.amin(0).tolist(), coords.amax(0).tolist()
        if low[0] < 0 or high[0] >= BATCHES:
            raise ValueError(f"batch indices {low[0]} to {high[0]}, expected 0 to {BATCHES - 1}")
        if min(low[1:]) < -most or max(high[1:]) >= most:
            raise ValueError(f"voxels from {low[1:]} to {high[1:]}, expected -{most} to {most - 1} along each axis")
    b, x, y, z = (coords + coords.new_tensor([0, CENTRE, CENTRE, CENTRE])).unbind(1)
    return ((b << AXIS_BITS | x) << AXIS_BITS | y) << AXIS_BITS | z


def unpack(keys: torch.Tensor) -> torch.Tensor:
    """keys (N,) int64 -> coords (N, 4) int64: batch x y z"""
    ones = (1 << AXIS_BITS) - 1
    axes = [(keys >> shift & ones) - CENTRE for shift in (2 * AXIS_BITS, AXIS_BITS, 0)]
    return torch.stack([keys >> 3 * AXIS_BITS, *axes], 1)


def coarsen(keys: torch.Tensor, stride: int) -> torch.Tensor:
    """floor(c / stride) * stride of every key (N,), row by row; stride a power of two. Not sorted."""
    check_stride(stride)
    return keys & ~((stride - 1) * sum(AXES))


def check_stride(stride: int) -> None:
    if stride < 1 or stride & stride - 1 or stride > CENTRE:
        raise ValueError(f"stride {stride}: expected a power of two up to {CENTRE}")


def find(keys: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `wanted` (M,) among sorted `keys` (N,): rows (M,) int64, valid only where found (M,) bool."""
    rows = torch.searchsorted(keys, wanted)
    return rows, _hit(keys, rows, wanted)


def _hit(keys: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if not len(keys):
        return torch.zeros_like(rows, dtype=torch.bool)
    return keys[rows.clamp(max=len(keys) - 1)] == wanted


def neighbours(
    keys: torch.Tensor, at: torch.Tensor, kernel_size: int, dilation: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows among `keys` of what each kernel index reaches from `at`: rows (K, M) int64 and found (K, M) bool.

    keys: sorted (N,), multiples of `stride`. at: sorted (M,), multiples of `stride`. K = kernel_size^3.
    One search for each (x, y): from z to z + stride the place in the sorted list moves by one if z was found.
    """
    k, first = kernel_size, -(kernel_size // 2) if kernel_size % 2 else 0
    if k * dilation * stride > REACH:
        raise ValueError(f"kernel {k} x dilation {dilation} x stride {stride}: reaches further than {REACH} voxels")
    rows = torch.empty(k, k, k, len(at), dtype=torch.int64, device=at.device)  # z, y, x: x fastest
    found = torch.empty(k, k, k, len(at), dtype=torch.bool, device=at.device)
    step = dilation * stride
    for ix in range(k):
        for iy in range(k):
            wanted = at + step * ((ix + first) * AXES[0] + (iy + first) * AXES[1] + first * AXES[2])
            place = torch.searchsorted(keys, wanted)
            for iz in range(k):
                rows[iz, iy, ix], found[iz, iy, ix] = place, _hit(keys, place, wanted)
                for _ in range(dilation if iz < k - 1 else 0):
                    place = place + _hit(keys, place, wanted)
                    wanted = wanted + stride
    return rows.flatten(0, 2), found.flatten(0, 2)


@dataclass(frozen=True)
class Block:
    """Output rows first..last-1 and the pairs that lead to them, P in all, sorted by kernel index, then by row.

    source, target: (P,) int32, input row and output row less `first`. counts: pairs of each kernel index. order (P,)
    int32 sorts the pairs by target, those of row i at starts[i]..starts[i + 1]-1 (R + 1,) int32. identity: a kernel
    index whose pairs are the rows first..last-1 in turn, or -1.
    """

    first: int
    last: int
    source: torch.Tensor
    target: torch.Tensor
    counts: list[int]
    order: torch.Tensor
    starts: torch.Tensor
    identity: int = -1


@dataclass
class KernelMap:
    """Pairs (input row, output row) of every kernel index: offset, source, target (P,) int64, by offset, then row.

    symmetric: rows in and out are the same and the pairs of index volume-1-i are those of i swapped.
    """

    volume: int
    rows_in: int
    rows_out: int
    offset: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    symmetric: bool = False
    _swapped: "KernelMap | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def swapped(self) -> "KernelMap":
        """The map of the transposed convolution, with the same kernel indices."""
        if self._swapped is None:
            self._swapped = KernelMap(
                self.volume, self.rows_out, self.rows_in, self.offset, self.target, self.source, _swapped=self
            )
        return self._swapped

    @cached_property
    def blocks(self) -> list[Block]:
        most = BLOCK_ROWS if self.source.device.type == "cpu" else BLOCK_ROWS_GPU
        parts = max(1, -(-self.rows_out // most))
        rows = max(1, -(-self.rows_out // parts))  # of every block but the last, which has about as many
        part = self.target // rows
        by_part = torch.argsort(part, stable=True)
        counts = torch.bincount(part * self.volume + self.offset, minlength=parts * self.volume)
        counts = counts.view(parts, self.volume).tolist()
        source, target = self.source[by_part], self.target[by_part]
        blocks, begin = [], 0
        for i, mine in enumerate(counts):
            pairs = slice(begin, begin + sum(mine))
            begin, first = pairs.stop, i * rows
            last, local = min(first + rows, self.rows_out), target[pairs] - first
            order, starts = group(local, last - first)
            middle = self.volume // 2 if self.symmetric else -1
            blocks.append(Block(first, last, source[pairs].int(), local.int(), mine, order, starts, middle))
        return blocks


def group(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (P,) in 0..count-1 -> order (P,) int32, stable, and starts (count + 1,) int32 of each row's part of it"""
    starts = rows.new_zeros(count + 1)
    torch.cumsum(torch.bincount(rows, minlength=count), 0, out=starts[1:])
    return torch.argsort(rows, stable=True).int(), starts.int()


class Coordinates:
    """The voxels of one forward pass: sorted keys of each level and the kernel maps between them, each made once."""

    def __init__(self, keys: torch.Tensor, stride: int = 1):
        """keys: (N,) int64, sorted, each once, multiples of `stride`: the finest level there is."""
        check_stride(stride)
        if keys.ndim != 1 or keys.dtype != torch.int64 or (len(keys) and not bool((keys[1:] > keys[:-1]).all())):
            raise ValueError(f"keys are {tuple(keys.shape)} {keys.dtype}, expected (N,) int64, sorted, each once")
        if not torch.equal(coarsen(keys, stride), keys):
            raise ValueError(f"coordinates are no multiples of the stride {stride}")
        self.finest = stride
        self._levels, self._maps = {stride: keys}, {}

    def keys(self, stride: int) -> torch.Tensor:
        """(N_stride,) int64, sorted."""
        if stride not in self._levels:
            check_stride(stride)
            if stride < self.finest:
                raise ValueError(f"no level of stride {stride}: the finest voxels have stride {self.finest}")
            self._levels[stride] = torch.unique(coarsen(self.keys(stride // 2), stride))
        return self._levels[stride]

    def submanifold(self, stride: int, kernel_size: int, dilation: int = 1) -> KernelMap:
        """From a level to itself."""
        return self.strided(stride, kernel_size, 1, dilation)

    def strided(self, stride: int, kernel_size: int, factor: int, dilation: int = 1) -> KernelMap:
        """From the level `stride` to the level stride * factor; `.swapped` is the way back."""
        name = (stride, kernel_size, factor, dilation)
        if name not in self._maps:
            keys, at = self.keys(stride), self.keys(stride * factor)
            rows, found = neighbours(keys, at, kernel_size, dilation, stride)
            offset, target = found.nonzero(as_tuple=True)
            both = factor == 1 and kernel_size % 2 == 1
            self._maps[name] = KernelMap(
                kernel_size**3, len(keys), len(at), offset, rows[found], target, symmetric=both
            )
        return self._maps[name]
