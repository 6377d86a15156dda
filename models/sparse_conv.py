"""Sparse convolution on voxels in plain PyTorch: submanifold, strided, transposed, dilated; exact gradients.

The operations, kernel order and parameter names are those of MinkowskiEngine (Choy et al., 2019, "4D Spatio-Temporal
ConvNets", section 4); an equal nn.Conv3d has weight kernel.reshape(k, k, k, C_in, C_out).permute(4, 3, 2, 1, 0).

    y_j = sum over kernel indices i and pairs (r, j) of i of  x_r W_i

On the way: the rows of each kernel index are gathered and multiplied into one table of products, and every output row
sums its own. Nothing is added into memory by several threads, so that results and gradients are the same in every run,
on every device (deterministic). Under autocast products are of its type, sums float32.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from models.sparse_maps import Coordinates, KernelMap, find, group, pack, unpack

GATHER_AT_ONCE = 1 << 19  # numbers that stay in a CPU's cache

# ---- groups of rows


class Groups:
    """Which group each row belongs to: sums, means and maxima over groups and back. Points and voxels, or superpoints.

    rows: (P,) int64 in 0..count-1. Gradients are exact and summed in a fixed order.
    """

    def __init__(self, rows: torch.Tensor, count: int):
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"rows are {tuple(rows.shape)} {rows.dtype}, expected (P,) int64")
        if len(rows) and (int(rows.amin()) < 0 or int(rows.amax()) >= count):
            raise ValueError(f"rows are {int(rows.amin())} to {int(rows.amax())}, expected 0 to {count - 1}")
        self.rows, self.count = rows, count
        self.order, self.starts = group(rows, count)

    @property
    def sizes(self) -> torch.Tensor:
        """(G,) int64"""
        return self.starts.diff().long()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """(P, C) -> (G, C); 0 for a group without rows"""
        self._check(x, len(self.rows))
        return _GroupSum.apply(x, self)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """(P, C) -> (G, C); 0 for a group without rows"""
        return self.sum(x) / self.sizes.clamp(min=1)[:, None].to(x.dtype)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """(P, C) -> (G, C); -inf for a group without rows. Rows that share the maximum share the gradient."""
        self._check(x, len(self.rows))
        ordered = _Permute.apply(x, self.order.long())
        return torch.segment_reduce(ordered, "max", offsets=self.starts.long(), axis=0)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(G, C) -> (P, C): every row gets what its group has (MinkowskiEngine's slice)"""
        self._check(x, self.count)
        return _GroupSpread.apply(x, self)

    def _check(self, x: torch.Tensor, rows: int) -> None:
        if x.ndim != 2 or len(x) != rows:
            raise ValueError(f"features are {tuple(x.shape)}, expected ({rows}, C)")


def sum_rows(x: torch.Tensor, order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """x (P, C), order (P,) and starts (R + 1,) int32 -> (R, C): row i sums x[order[starts[i]:starts[i + 1]]]."""
    if not len(order):
        return x.new_zeros(len(starts) - 1, x.shape[1])
    return F.embedding_bag(order, x, starts, mode="sum", include_last_offset=True)


class _GroupSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups):
        ctx.groups = groups
        return sum_rows(x, groups.order, groups.starts)

    @staticmethod
    def backward(ctx, grad):
        return _GroupSpread.apply(grad, ctx.groups), None


class _GroupSpread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups):
        ctx.groups = groups
        return x.index_select(0, groups.rows)

    @staticmethod
    def backward(ctx, grad):
        return _GroupSum.apply(grad.contiguous(), ctx.groups), None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order):
        ctx.save_for_backward(order)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return _Permute.apply(grad, torch.argsort(order)), None


# ---- sparse tensors


@dataclass(frozen=True)
class SparseTensor:
    """features: (N, C), one row for each voxel of `coordinates` at `stride`, in the order of (batch, x, y, z)."""

    features: torch.Tensor
    coordinates: Coordinates
    stride: int = 1

    def __post_init__(self):
        N = len(self.coordinates.keys(self.stride))
        if self.features.ndim != 2 or len(self.features) != N:
            raise ValueError(f"features are {tuple(self.features.shape)}, expected ({N}, C) at stride {self.stride}")

    @property
    def keys(self) -> torch.Tensor:
        """(N,) int64, see sparse_maps"""
        return self.coordinates.keys(self.stride)

    @property
    def coords(self) -> torch.Tensor:
        """(N, 4) int64: batch x y z, in units of the finest voxel"""
        return unpack(self.keys)

    @property
    def batch(self) -> torch.Tensor:
        """(N,) int64"""
        return self.coords[:, 0]

    def with_features(self, features: torch.Tensor) -> "SparseTensor":
        return replace(self, features=features)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "SparseTensor":
        """function: (N, C) -> (N, C')"""
        return self.with_features(function(self.features))

    def at(self, coords: torch.Tensor) -> torch.Tensor:
        """Features (M, C) at integer coords (M, 4), batch x y z; zero where there is no voxel."""
        rows, found = find(self.keys, pack(coords))
        rows = torch.where(found, rows, len(self.keys))
        return Groups(rows, len(self.keys) + 1).spread(F.pad(self.features, (0, 0, 0, 1)))


def sparse_tensor(coords: torch.Tensor, features: torch.Tensor, stride: int = 1) -> SparseTensor:
    """coords: integers (N, 4), batch x y z, each once, multiples of `stride`, in any order; features: (N, C) likewise.

    Rows of the result are sorted. ValueError where a voxel comes twice.
    """
    if len(features) != len(coords):
        raise ValueError(f"features are {tuple(features.shape)} for {len(coords)} coordinates")
    keys, order = torch.sort(pack(coords))
    return SparseTensor(_Permute.apply(features, order), Coordinates(keys, stride), stride)


def voxelise(
    points: torch.Tensor, features: torch.Tensor, voxel_size: float, batch: torch.Tensor | None = None
) -> tuple[SparseTensor, Groups]:
    """Mean of the features of the points in each voxel floor(points / voxel_size), and which voxel each point is in.

    points: (P, 3) in metres. features: (P, C). batch: (P,) integers (default: one item). `groups.spread` takes features
    of voxels back to the points. ValueError for points that are not finite or further out than the keys reach.
    """
    if points.ndim != 2 or points.shape[1] != 3 or len(features) != len(points):
        raise ValueError(f"points are {tuple(points.shape)}, features {tuple(features.shape)}: expected (P, 3), (P, C)")
    if not bool(torch.isfinite(points).all()):
        raise ValueError(f"{int((~torch.isfinite(points)).any(1).sum())} of {len(points)} points are not finite")
    batch = torch.zeros(len(points), dtype=torch.int64, device=points.device) if batch is None else batch.long()
    voxels = torch.floor(points / voxel_size).long()
    keys, rows = torch.unique(pack(torch.cat([batch[:, None], voxels], 1)), return_inverse=True)
    groups = Groups(rows, len(keys))
    return SparseTensor(groups.mean(features), Coordinates(keys)), groups


def cat(*tensors: SparseTensor) -> SparseTensor:
    """Channels side by side. ValueError unless all have the same voxels."""
    first = tensors[0]
    for x in tensors[1:]:
        same = x.stride == first.stride and (x.keys is first.keys or torch.equal(x.keys, first.keys))
        if not same:
            raise ValueError(f"cat: {len(first.keys)} voxels of stride {first.stride} and {len(x.keys)} of {x.stride}")
    return first.with_features(torch.cat([x.features for x in tensors], 1))


# ---- convolution


def _multiply_and_sum(x: torch.Tensor, weights: list[torch.Tensor], kernel_map: KernelMap) -> torch.Tensor:
    """x (N_in, C_in), weights: volume x (C_in, C_out) -> (N_out, C_out)"""
    C_in, C_out, out = x.shape[1], weights[0].shape[1], []
    table = x.new_empty(max(len(block.source) for block in kernel_map.blocks), C_out)
    most = max(max(block.counts) for block in kernel_map.blocks)
    gathered = x.new_empty(most, C_in)
    for block in kernel_map.blocks:
        products = table[: len(block.source)]
        if x.device.type != "cpu" or len(block.source) * C_in <= GATHER_AT_ONCE:
            parts = x.index_select(0, block.source).split(block.counts)
        else:
            sources = enumerate(block.source.split(block.counts))
            parts = (x[block.first : block.last] if i == block.identity
                     else torch.index_select(x, 0, rows, out=gathered[: len(rows)]) for i, rows in sources)  # fmt: skip
        for part, product, weight in zip(parts, products.split(block.counts), weights, strict=True):
            if len(part):
                torch.mm(part, weight, out=product)
        out.append(sum_rows(products, block.order, block.starts))
    return out[0] if len(out) == 1 else torch.cat(out)


def _kernel_gradient(x: torch.Tensor, grad: torch.Tensor, kernel_map: KernelMap) -> torch.Tensor:
    """x (N_in, C_in), grad (N_out, C_out) -> (volume, C_in, C_out); float32 or wider"""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(kernel_map.volume, x.shape[1], grad.shape[1], dtype=wide, device=x.device)
    for block in kernel_map.blocks:
        mine = grad[block.first : block.last]
        parts = zip(block.source.split(block.counts), block.target.split(block.counts), out, strict=True)
        for rows_in, rows_out, total in parts:
            if len(rows_in):
                total += x.index_select(0, rows_in).T @ mine.index_select(0, rows_out)
    return out


class _SparseConvolution(torch.autograd.Function):
    """Keeps x, the kernel and the map; backward to x is the convolution with the swapped map."""

    @staticmethod
    def forward(ctx, x, kernel, kernel_map):
        ctx.save_for_backward(x, kernel)
        ctx.kernel_map = kernel_map
        return _multiply_and_sum(x, list(kernel.to(x.dtype)), kernel_map)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, kernel = ctx.saved_tensors
        grad, kernel_map, to_x, to_kernel = grad.contiguous(), ctx.kernel_map, None, None
        if ctx.needs_input_grad[0]:
            weights = [w.T for w in kernel.to(x.dtype)]
            if kernel_map.symmetric:
                to_x = _multiply_and_sum(grad, weights[::-1], kernel_map)
            else:
                to_x = _multiply_and_sum(grad, weights, kernel_map.swapped)
        if ctx.needs_input_grad[1]:
            to_kernel = _kernel_gradient(x, grad, kernel_map).to(kernel.dtype)
        return to_x, to_kernel, None


def sparse_convolution(x: torch.Tensor, kernel: torch.Tensor, kernel_map: KernelMap) -> torch.Tensor:
    """x (N_in, C_in), kernel (volume, C_in, C_out) -> (N_out, C_out), of x's type or autocast's."""
    if kernel.ndim != 3 or kernel.shape[:2] != (kernel_map.volume, x.shape[1]) or len(x) != kernel_map.rows_in:
        raise ValueError(
            f"x is {tuple(x.shape)}, kernel {tuple(kernel.shape)}, expected ({kernel_map.rows_in}, C_in) and "
            f"({kernel_map.volume}, C_in, C_out)"
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _SparseConvolution.apply(x, kernel, kernel_map)


# ---- modules


class SparseConv(nn.Module):
    """Convolution without bias, of a level onto itself (stride 1) or onto the level `stride` times as coarse.

    kernel: (kernel_size^3, C_in, C_out), of size 1 (C_in, C_out); x fastest. Output voxels: those that are there, and
    their floor(c / stride) * stride. kernel_size 3 and dilation 3 reach as far as 7. With stride: a power of two.
    """

    transposed = False

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1):
        super().__init__()
        if kernel_size < 1 or dilation < 1 or stride < 1 or stride & stride - 1:
            raise ValueError(
                f"kernel_size {kernel_size}, stride {stride}, dilation {dilation}: expected positive, stride 2^n"
            )
        if kernel_size == 1 and stride > 1:
            raise ValueError(f"kernel_size 1 with stride {stride}: expected kernel_size >= 2 where voxels change")
        if self.transposed and kernel_size > 1 and stride == 1:
            raise ValueError(f"transposed with stride 1 and kernel_size {kernel_size}: expected stride >= 2")
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        shape = (in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape if kernel_size == 1 else (kernel_size**3, *shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(n), n = kernel_size^3 times the inputs, if transposed the outputs."""
        bound = 1 / math.sqrt(self.kernel_size**3 * self.kernel.shape[-1 if self.transposed else -2])
        nn.init.uniform_(self.kernel, -bound, bound)

    def extra_repr(self) -> str:
        return f"{tuple(self.kernel.shape)}, stride={self.stride}, dilation={self.dilation}"

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.kernel_size == 1:
            return x.map(lambda features: features @ self.kernel)
        kernel_map = x.coordinates.strided(x.stride, self.kernel_size, self.stride, self.dilation)
        out = sparse_convolution(x.features, self.kernel, kernel_map)
        return SparseTensor(out, x.coordinates, x.stride * self.stride)


class SparseConvTranspose(SparseConv):
    """The way back: onto the voxels of the finer level that are there; never new ones."""

    transposed = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 2, stride: int = 2, dilation: int = 1):
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation)

    def forward(self, x: SparseTensor) -> SparseTensor:
        if self.kernel_size == 1:
            return super().forward(x)
        if x.stride % self.stride:
            raise ValueError(f"a tensor of stride {x.stride} cannot be refined {self.stride} times")
        finer = x.stride // self.stride
        kernel_map = x.coordinates.strided(finer, self.kernel_size, self.stride, self.dilation).swapped
        return SparseTensor(sparse_convolution(x.features, self.kernel, kernel_map), x.coordinates, finer)


class SparseBatchNorm(nn.Module):
    """Batch norm over the rows. In training it needs two voxels or more."""

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, eps=eps, momentum=momentum)

    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.map(self.bn)


def relu(x: SparseTensor) -> SparseTensor:
    return x.map(F.relu)
