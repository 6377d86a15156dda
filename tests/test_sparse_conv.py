"""Sparse convolution is dense convolution where there are voxels: forward and both gradients, in double to 1e-12."""

import pytest
import torch
import torch.nn.functional as F

from models import sparse_conv, sparse_maps
from models.sparse_conv import (
    Groups,
    SparseBatchNorm,
    SparseConv,
    SparseConvTranspose,
    SparseTensor,
    cat,
    relu,
    sparse_convolution,
    sparse_tensor,
    voxelise,
)  # fmt: skip
from models.sparse_maps import Coordinates, coarsen, find, pack, unpack

SIZE = 16  # of the dense grid; voxels lie in -8..7


def random_voxels(N: int = 300, batches: int = 2, seed: int = 0, low: int = -8) -> torch.Tensor:
    """(n, 4) int64, sorted, each once"""
    g = torch.Generator().manual_seed(seed)
    xyz = torch.randint(low, low + SIZE, (N, 3), generator=g)
    return torch.unique(torch.cat([torch.randint(0, batches, (N, 1), generator=g), xyz], 1), dim=0)


def tensor_of(coords: torch.Tensor, channels: int, dtype=torch.float64) -> SparseTensor:
    g = torch.Generator().manual_seed(7)
    return sparse_tensor(coords, torch.randn(len(coords), channels, generator=g, dtype=dtype))


def dense_of(x: SparseTensor, low: int = -8) -> torch.Tensor:
    """(B, C, D, D, D) on the grid of the level"""
    coords, grid = x.coords, SIZE // x.stride
    at = (coords[:, 1:] - low) // x.stride
    out = x.features.new_zeros(int(coords[:, 0].max()) + 1, grid, grid, grid, x.features.shape[1])
    out = out.index_put((coords[:, 0], *at.unbind(1)), x.features)
    return out.permute(0, 4, 1, 2, 3)


def rows_of(dense: torch.Tensor, x: SparseTensor, low: int = -8) -> torch.Tensor:
    at = (x.coords[:, 1:] - low) // x.stride
    return dense.permute(0, 2, 3, 4, 1)[(x.coords[:, 0], *at.unbind(1))]


def dense_weight(layer: SparseConv) -> torch.Tensor:
    k = layer.kernel_size
    return layer.kernel.reshape(k, k, k, *layer.kernel.shape[-2:]).permute(4, 3, 2, 1, 0)


def compare(layer: SparseConv, x: SparseTensor, dense) -> None:
    """Values, gradient to the input and to the kernel."""
    x.features.requires_grad_()
    out = layer(x)
    want = rows_of(dense(dense_of(x), dense_weight(layer)), out)
    weights = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    ours = torch.autograd.grad(out.features, [x.features, layer.kernel], weights)
    theirs = torch.autograd.grad(want, [x.features, layer.kernel], weights)
    torch.testing.assert_close(out.features, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def choose_blocks(monkeypatch, rows: int) -> None:
    """Blocks of `rows` output rows; where there are many, rows are also gathered index by index."""
    monkeypatch.setattr(sparse_maps, "BLOCK_ROWS", rows)
    monkeypatch.setattr(sparse_conv, "GATHER_AT_ONCE", sparse_conv.GATHER_AT_ONCE if rows > 1000 else 0)


@pytest.mark.parametrize("rows", [8192, 37])  # one block of output rows, and many
@pytest.mark.parametrize("k, dilation", [(3, 1), (5, 1), (3, 3), (3, 2), (1, 1)])
def test_submanifold(k, dilation, rows, monkeypatch):
    choose_blocks(monkeypatch, rows)
    layer = SparseConv(3, 5, k, dilation=dilation).double()
    pad = k // 2 * dilation
    compare(layer, tensor_of(random_voxels(), 3), lambda x, w: F.conv3d(x, w, padding=pad, dilation=dilation))


@pytest.mark.parametrize("rows", [8192, 29])
@pytest.mark.parametrize("k, stride", [(2, 2), (3, 2), (4, 4)])
def test_strided(k, stride, rows, monkeypatch):
    choose_blocks(monkeypatch, rows)
    layer = SparseConv(3, 5, k, stride).double()
    pad = k // 2 if k % 2 else 0
    x = tensor_of(random_voxels(), 3)
    compare(layer, x, lambda x, w: F.conv3d(x, w, stride=stride, padding=pad))
    assert layer(x).stride == stride
    assert torch.equal(layer(x).coords, torch.unique(x.coords // torch.tensor([1, *[stride] * 3]), dim=0)
                       * torch.tensor([1, *[stride] * 3]))  # fmt: skip


@pytest.mark.parametrize("rows", [8192, 29])
def test_transposed_ends_on_the_voxels_that_were_there(rows, monkeypatch):
    choose_blocks(monkeypatch, rows)
    fine = tensor_of(random_voxels(), 3)
    half = SparseConv(3, 4, 2, 2).double()(fine)
    half = half.with_features(half.features.detach())
    layer = SparseConvTranspose(4, 5).double()
    compare(layer, half, lambda x, w: F.conv_transpose3d(x, w.transpose(0, 1), stride=2))
    assert torch.equal(layer(half).keys, fine.keys)


def test_convolution_at_a_coarse_level_counts_in_its_steps():
    coords = random_voxels()
    coords[:, 1:] = coords[:, 1:] // 4 * 4
    coords = torch.unique(coords, dim=0)
    x = sparse_tensor(coords, torch.randn(len(coords), 3, dtype=torch.float64), stride=4)
    layer = SparseConv(3, 2, 3, dilation=1).double()
    compare(layer, x, lambda x, w: F.conv3d(x, w, padding=1))
    with pytest.raises(ValueError, match="finest voxels have stride 4"):
        x.coordinates.keys(2)
    with pytest.raises(ValueError, match="no multiples of the stride 8"):
        Coordinates(x.keys, 8)


def test_gradients_by_differences():
    c = tensor_of(random_voxels(40), 2).coordinates
    for kernel_map in (c.submanifold(1, 3), c.strided(1, 2, 2), c.strided(1, 2, 2).swapped):
        features = torch.randn(kernel_map.rows_in, 2, dtype=torch.float64, requires_grad=True)
        kernel = torch.randn(kernel_map.volume, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(sparse_convolution, (features, kernel, kernel_map))


def test_a_cloud_of_several_blocks_is_the_dense_one():
    coords = random_voxels(12000, batches=4)
    assert len(coords) > sparse_maps.BLOCK_ROWS
    compare(SparseConv(2, 3).double(), tensor_of(coords, 2), lambda x, w: F.conv3d(x, w, padding=1))


# ---- keys


def test_keys_sort_like_coordinates_and_come_back():
    coords = torch.tensor([[1, -5, 0, 3], [0, 7, -64000, 64000], [0, 7, -64000, -1], [4095, 0, 0, 0], [0, -1, 9, 9]])
    keys = pack(coords)
    assert torch.equal(unpack(keys), coords)
    assert [tuple(c) for c in coords[keys.argsort()].tolist()] == sorted(tuple(c) for c in coords.tolist())
    for s in (1, 2, 16):
        want = torch.cat([coords[:, :1], torch.div(coords[:, 1:], s, rounding_mode="floor") * s], 1)
        assert torch.equal(unpack(coarsen(keys, s)), want)
    assert torch.equal(pack(coords.int()), keys)


@pytest.mark.parametrize(
    "coords, why",
    [
        ([[0, 65000, 0, 0]], "voxels from"),
        ([[0, 0, 0, -65000]], "voxels from"),
        ([[4096, 0, 0, 0]], "batch"),
        ([[-1, 0, 0, 0]], "batch"),
        ([[0, 0, 0]], r"\(N, 4\)"),
        ([[0.0, 0, 0, 0]], r"\(N, 4\)"),
    ],
)
def test_keys_that_do_not_fit_are_refused(coords, why):
    with pytest.raises(ValueError, match=why):
        pack(torch.tensor(coords))


def test_neighbours_at_the_end_of_an_axis_are_not_those_of_the_next_row():
    most = sparse_maps.CENTRE - sparse_maps.REACH
    coords = torch.tensor([[0, 0, 0, most - 1], [0, 0, 1, -most], [0, 1, -most, 0], [1, -most, 0, 0]])
    m = sparse_tensor(coords, torch.zeros(4, 1)).coordinates.submanifold(1, 5)
    assert len(m) == 4 and torch.equal(m.source, m.target)
    with pytest.raises(ValueError, match="reaches further"):
        sparse_maps.neighbours(pack(coords), pack(coords), 3, 512, 1)


def test_items_of_a_batch_do_not_meet():
    coords = torch.tensor([[b, 0, 0, 0] for b in range(3)])
    m = sparse_tensor(coords, torch.zeros(3, 1)).coordinates.submanifold(1, 3)
    assert len(m) == 3


def test_maps_are_made_once():
    x = tensor_of(random_voxels(), 2)
    c = x.coordinates
    assert c.submanifold(2, 3) is c.submanifold(2, 3) and c.submanifold(2, 3) is not c.submanifold(2, 3, 3)
    down = c.strided(1, 2, 2)
    assert down.swapped.swapped is down and c.strided(1, 2, 2) is down and c.keys(2) is c.keys(2)
    assert down.swapped.rows_in == len(c.keys(2)) and down.swapped.rows_out == len(c.keys(1))


def test_find():
    keys = torch.tensor([2, 5, 9])
    rows, found = find(keys, torch.tensor([9, 1, 5, 10]))
    assert found.tolist() == [True, False, True, False] and rows[found].tolist() == [2, 1]
    assert not find(keys[:0], keys)[1].any()


# ---- points and groups


def test_voxelise_takes_the_floor_and_the_mean():
    points = torch.tensor([[0.01, 0.01, 0.01], [-0.01, 0.0, 0.0], [0.019, 0.0, 0.0], [0.01, 0.01, 0.01]])
    batch, features = torch.tensor([0, 0, 0, 1]), torch.tensor([[1.0], [2], [5], [9]])
    x, groups = voxelise(points, features, 0.02, batch)
    assert x.coords.tolist() == [[0, -1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert x.features.tolist() == [[2], [3], [9]] and groups.rows.tolist() == [1, 0, 1, 2]
    assert groups.sizes.tolist() == [1, 2, 1]
    assert torch.equal(groups.spread(x.features), torch.tensor([[3.0], [2], [3], [9]]))
    assert torch.equal(x.batch, torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("name", ["sum", "mean", "max", "spread"])
def test_groups(name):
    g = torch.Generator().manual_seed(0)
    groups = Groups(torch.randint(0, 9, (50,), generator=g), 10)  # group 9 has no row
    x = torch.randn(10 if name == "spread" else 50, 3, generator=g, dtype=torch.float64, requires_grad=True)
    out = getattr(groups, name)(x)
    for i in range(10):
        mine = x[groups.rows == i] if name != "spread" else None
        if name == "spread":
            assert torch.equal(out[groups.rows == i], x[i].expand(int(groups.sizes[i]), 3))
        elif i == 9:
            assert (out[i] == (-torch.inf if name == "max" else 0)).all()
        else:
            want = mine.amax(0) if name == "max" else getattr(mine, name)(0)
            torch.testing.assert_close(out[i], want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: getattr(groups, name)(x)[: 50 if name == "spread" else 9], (x,))


def test_look_up_gives_zero_where_there_is_nothing_and_its_gradient():
    x = tensor_of(random_voxels(30), 2)
    x.features.requires_grad_()
    query = torch.cat([x.coords[[4, 2, 4]], torch.tensor([[0, 500, 0, 0]])])
    out = x.at(query)
    assert torch.equal(out[:3], x.features[[4, 2, 4]]) and not out[3].any()
    (grad,) = torch.autograd.grad(out.sum(), x.features)
    assert grad[4].tolist() == [2, 2] and grad[2].tolist() == [1, 1] and grad.sum() == 6


def test_cat_and_order_of_rows():
    coords = random_voxels(30)
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))
    features = torch.randn(len(coords), 2)
    x, y = sparse_tensor(coords, features), sparse_tensor(coords[order], features[order])
    assert torch.equal(x.features, y.features) and torch.equal(x.coords, coords)
    assert torch.equal(cat(x, y).features, torch.cat([features, features], 1))
    with pytest.raises(ValueError, match="cat: "):
        cat(x, sparse_tensor(coords[1:], features[1:]))
    with pytest.raises(ValueError, match="each once"):
        sparse_tensor(coords[[0, 0]], features[:2])


def test_batch_norm_and_relu():
    x = tensor_of(random_voxels(60), 3, torch.float32)
    norm = SparseBatchNorm(3, momentum=0.02)
    out = relu(norm(x))
    want = F.batch_norm(x.features, None, None, training=True)
    torch.testing.assert_close(out.features, want.relu())
    torch.testing.assert_close(norm.bn.running_mean, 0.02 * x.features.mean(0))
    assert set(norm.state_dict()) >= {"bn.weight", "bn.running_var"}


# ---- precision and order


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    x = tensor_of(random_voxels(900), 16, torch.float32)
    layer, norm = SparseConv(16, 8), SparseBatchNorm(8)
    exact = layer(x).features
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        loss = norm(out).features.float().square().sum()
    assert out.features.dtype == torch.bfloat16
    assert (out.features.float() - exact).norm() / exact.norm() < 5e-3
    loss.backward()
    assert layer.kernel.grad.dtype == torch.float32 and layer.kernel.grad.isfinite().all()
    # a sum of 27 times 1/256 next to 1: bfloat16 would have stayed at 1
    ones = torch.unique(torch.cartesian_prod(torch.tensor([0]), *[torch.arange(-1, 2)] * 3), dim=0)
    layer = SparseConv(1, 1)
    layer.kernel.data.fill_(1 / 256)
    layer.kernel.data[0] = 1
    with torch.autocast("cpu", torch.bfloat16):
        middle = layer(sparse_tensor(ones, torch.ones(27, 1))).features[13]
    assert abs(float(middle.detach()) - (1 + 26 / 256)) < 0.005


def test_the_same_in_every_run_under_deterministic_algorithms():
    coords = random_voxels(3000)
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            x = tensor_of(coords, 4, torch.float32)
            x.features.requires_grad_()
            down, up = SparseConv(4, 6, 2, 2), SparseConvTranspose(6, 4)
            out = up(down(SparseConv(4, 4)(x)))
            out.at(coords[::3]).square().sum().backward()
            results.append((out.features, x.features.grad, down.kernel.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    coords, found = random_voxels(3000), []
    down, up = SparseConv(4, 6, 2, 2).double(), SparseConvTranspose(6, 4).double()
    for device in ("cpu", "cuda"):
        down, up = down.to(device), up.to(device)
        x = tensor_of(coords, 4)
        x = sparse_tensor(x.coords.to(device), x.features.to(device).requires_grad_())
        out = up(down(x))
        grads = torch.autograd.grad(out.features.square().sum(), [down.kernel, up.kernel])
        found.append([t.cpu() for t in (out.features.detach(), out.keys, *grads)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- empty and unfit


def test_no_voxel_gives_no_row():
    x = sparse_tensor(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 3, requires_grad=True))
    out = SparseConvTranspose(5, 2)(SparseConv(4, 5, 2, 2)(SparseConv(3, 4)(x)))
    assert out.features.shape == (0, 2)
    out.features.sum().backward()


@pytest.mark.parametrize("layer", [lambda: SparseConv(1, 1, 3, 3), lambda: SparseConv(1, 1, 1, 2),
                                   lambda: SparseConv(1, 1, 0), lambda: SparseConvTranspose(1, 1, 3, 1)])  # fmt: skip
def test_impossible_layers_are_refused(layer):
    with pytest.raises(ValueError, match="expected"):
        layer()


def test_unfit_input_is_refused():
    x = tensor_of(random_voxels(30), 2, torch.float32)
    with pytest.raises(ValueError, match="C_in"):
        SparseConv(3, 1)(x)
    with pytest.raises(ValueError, match="cannot be refined"):
        SparseConvTranspose(2, 1)(x)
    with pytest.raises(ValueError, match="features are"):
        SparseTensor(x.features[1:], x.coordinates)
    with pytest.raises(ValueError, match="1 of 2 points are not finite"):
        voxelise(torch.tensor([[0, 0, 0], [0, torch.nan, 0]]), torch.zeros(2, 1), 0.02)
    with pytest.raises(ValueError, match="voxels from"):
        voxelise(torch.tensor([[0, 0, 2000.0]]), torch.zeros(1, 1), 0.02)
    with pytest.raises(ValueError, match="rows are -1"):
        Groups(torch.tensor([-1]), 3)
