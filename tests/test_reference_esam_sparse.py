"""Sparse convolution and the backbone against stored runs of MinkowskiEngine: all operations, forward and gradients.

Cases under LAB_SHARED/data/esam/sparse_cases: every ops*.npz and res16unet*.npz there. Tolerances are relative
to the largest value of the tensor: 3e-6 for operations, 1e-5 for the backbone, 1e-6 for running statistics (float32).
"""

import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from models.res16unet import Res16UNet
from models.sparse_conv import Groups, SparseConv, SparseConvTranspose, SparseTensor, voxelise

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
OPS, NETS = (sorted((SHARED / "sparse_cases").glob(pattern)) for pattern in ("ops*.npz", "res16unet*.npz"))
needs_cases = pytest.mark.skipif(not (OPS or NETS), reason=f"no reference cases under {SHARED}")


def relative(a, b) -> float:
    """Largest difference over the largest value of b."""
    a, b = (torch.as_tensor(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)).double() for x in (a, b))
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as z:
        return {k: torch.as_tensor(z[k]) for k in z.files if z[k].dtype.kind in "fiu"}


def voxels_of(case: dict) -> tuple[SparseTensor, Groups]:
    return voxelise(case["points"], case["point_feats"], float(case["voxel_size"]), case["batch"])


def layer_of(name: str, kernel: torch.Tensor) -> SparseConv:
    """The layer an operation is called after: subm5, subm3_dil3_stride4, down2_level2, up2, pointwise1, transpose1."""
    parts = name.split("_")
    kind, k = parts[0].rstrip("0123456789"), int(parts[0][-1])
    dilation = next((int(p[3:]) for p in parts if p.startswith("dil")), 1)
    stride = k if kind in ("down", "up") else 1
    cls = SparseConvTranspose if kind in ("up", "transpose") else SparseConv
    layer = cls(*kernel.shape[-2:], k, stride, dilation)
    layer.kernel.data = kernel
    return layer


def source_of(name: str, case: dict, x: SparseTensor) -> SparseTensor:
    """What it takes: stored features at the stride that its name tells."""
    if name in ("down2_level2", "up2"):
        return SparseTensor(case["down2.out"].clone(), x.coordinates, 2)
    if "stride4" in name or name == "up2_level2":
        return SparseTensor(case["down2_level2.out"].clone(), x.coordinates, 4)
    return SparseTensor(case["voxel_feats"].clone(), x.coordinates, 1)


@needs_cases
@pytest.mark.parametrize("path", OPS, ids=lambda p: p.stem)
def test_every_operation_forward_and_backward(path, capsys):
    case = read(path)
    x, _ = voxels_of(case)
    names = [k.removesuffix(".kernel") for k in case if k.endswith(".kernel")]
    worst = {}
    for name in names:
        layer, source = layer_of(name, case[f"{name}.kernel"]), source_of(name, case, x)
        source.features.requires_grad_()
        out = layer(source)
        assert torch.equal(out.coords, case[f"{name}.out_coords"].long()), name
        grads = torch.autograd.grad(out.features, [source.features, layer.kernel], case[f"{name}.grad_out"])
        pairs = zip((out.features, *grads), ("out", "grad_in", "grad_kernel"), strict=True)
        worst[name] = max(relative(ours, case[f"{name}.{key}"]) for ours, key in pairs)
    good = sum(e <= 3e-6 for e in worst.values())
    with capsys.disabled():
        print(f" {path.stem}: {good} of {len(names)} operations, largest difference {max(worst.values()):.1e}", end="")
    assert good == len(names), worst


@needs_cases
@pytest.mark.parametrize("path", OPS, ids=lambda p: p.stem)
def test_voxels_slices_and_looking_up(path):
    case = read(path)
    x, groups = voxels_of(case)
    assert torch.equal(x.coords, case["voxel_coords"].long())
    assert relative(x.features, case["voxel_feats"]) <= 1e-6
    assert torch.equal(groups.max(case["point_feats"].abs()), case["voxel_absfeats_maxpool"])
    stored = x.with_features(case["voxel_feats"])
    assert torch.equal(stored.at(case["at_coords.query"]), case["at_coords.out"])
    assert torch.equal(groups.spread(2 * case["voxel_feats"]), case["slice.out"])


def published(name: str, value: torch.Tensor) -> torch.Tensor:
    """The weight rule of the case."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(value)
    a = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(value.shape)).astype(np.float32)
    if name.endswith("kernel"):
        a /= 0.5 * np.sqrt(np.prod(a.shape[:-1]))
    elif name.endswith("running_var"):
        a = 0.2 * np.abs(a) + 0.9
    elif name.endswith("bn.weight"):
        a = 1 + 0.1 * a
    else:
        a = 0.1 * a
    return torch.as_tensor(a.astype(np.float32))


@needs_cases
@pytest.mark.parametrize("path", NETS, ids=lambda p: p.stem)
def test_the_backbone(path, capsys):
    case = read(path)
    with np.load(path) as z:
        names, shapes = z["state_dict_names"].tolist(), z["state_dict_shapes"].tolist()
    model = Res16UNet()
    state = {k: published(k, v) for k, v in model.state_dict().items()}
    assert sorted(state) == sorted(names)
    sums = dict(zip(names, case["weight_checksums"].tolist(), strict=True))
    fits = [list(state[k].shape) == [int(n) for n in re.findall(r"\d+", s)] for k, s in zip(names, shapes, strict=True)]
    same = [abs(float(state[k].double().sum()) - sums[k]) <= 1e-5 * max(1, abs(sums[k])) for k in names]
    assert all(fits) and all(same), f"{sum(fits)} shapes and {sum(same)} checksums of {len(names)} agree"
    model.load_state_dict(state)
    x, _ = voxelise(case["points"], case["colors"], float(case["voxel_size"]))
    assert torch.equal(x.coords, case["voxel_coords"].long())
    found = {}
    with torch.no_grad():
        found["eval_out"] = relative(model.eval()(x).features, case["eval_out"])
        found["train_out"] = relative(model.train()(x).features, case["train_out"])
    now = model.state_dict()
    statistics = {
        k: relative(now[f"{k.split('.', 1)[1]}.bn.{k.split('.')[0].removeprefix('train_')}"], v)
        for k, v in case.items()
        if k.startswith("train_running")
    }
    with capsys.disabled():
        print(f" {path.stem}: {found}, {sum(e <= 1e-6 for e in statistics.values())} of {len(statistics)} statistics",
              end="")  # fmt: skip
    assert max(found.values()) <= 1e-5 and statistics and max(statistics.values()) <= 1e-6, (found, statistics)
