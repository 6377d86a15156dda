"""Res16UNet: published names and sizes, its small form, batches, checkpoints, and the converter of released weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from models.res16unet import Res16UNet, Res16UNetConfig
from models.sparse_conv import voxelise
from utils import run
from utils.run import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"stem": 4, "planes": (4, 6, 8, 10, 10, 8, 6, 6), "layers": (1, 1, 2, 1, 1, 1, 1, 1)}
spec = importlib.util.spec_from_file_location("convert_mask3d", ROOT / "models" / "convert_mask3d.py")
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


def small(seed: int = 0) -> Res16UNet:
    torch.manual_seed(seed)
    return Res16UNet(Res16UNetConfig(**SMALL))


def cloud(P: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(P, 3, generator=g) * torch.tensor([1.0, 1.0, 0.1]), torch.randn(P, 3, generator=g)


def test_published_names_and_size():
    model = Res16UNet()
    state = model.state_dict()
    assert len(state) == 372 and sum(p.numel() for p in model.parameters()) == 37_854_112
    for name, shape in {
        "conv0p1s1.kernel": (125, 3, 32), "bn0.bn.weight": (32,), "conv4p8s2.kernel": (8, 128, 128),
        "block4.5.norm2.bn.running_var": (256,), "convtr4p16s2.kernel": (8, 256, 256),
        "block8.1.conv2.kernel": (27, 96, 96),
        "block5.0.downsample.0.kernel": (384, 256), "block5.0.downsample.1.bn.bias": (256,), "bntr7.bn.weight": (96,),
    }.items():  # fmt: skip
        assert state[name].shape == shape, name
    momenta = {k: m.momentum for k, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm1d)}
    inside = {k for k in momenta if ".norm" in k}
    assert {momenta[k] for k in inside} == {0.1} and {momenta[k] for k in momenta.keys() - inside} == {0.02}


def test_every_parameter_learns():
    model = small()
    x, groups = voxelise(*cloud(), 0.02)
    out = model(x)
    assert out.stride == 1 and out.features.shape == (groups.count, 6) and torch.equal(out.keys, x.keys)
    out.features.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_the_skips_come_from_the_encoder():
    model = small().eval()
    x, _ = voxelise(*cloud(), 0.02)
    with torch.no_grad():
        levels, whole = model.encode(x), model(x)
        assert [t.stride for t in levels] == [1, 2, 4, 8, 16]
        assert [t.features.shape[1] for t in levels] == [4, 4, 6, 8, 10]
        assert torch.equal(model.decode(levels).features, whole.features)
        for i in range(5):
            changed = [t.map(torch.zeros_like) if i == j else t for j, t in enumerate(levels)]
            assert not torch.equal(model.decode(changed).features, whole.features), i


@torch.no_grad()
def test_a_batch_of_two_is_two_singles_and_points_may_be_shuffled():
    model = small().eval().double()
    (p0, f0), (p1, f1) = (tuple(t.double() for t in cloud(n, n)) for n in (300, 450))
    singles = []
    for p, f in ((p0, f0), (p1, f1)):
        x, groups = voxelise(p, f, 0.02)
        singles.append(groups.spread(model(x).features))
    points, features = torch.cat([p0, p1]), torch.cat([f0, f1])
    batch = torch.tensor([0] * 300 + [1] * 450)
    order = torch.randperm(750, generator=torch.Generator().manual_seed(1))
    x, groups = voxelise(points[order], features[order], 0.02, batch[order])
    both = groups.spread(model(x).features)
    torch.testing.assert_close(both, torch.cat(singles)[order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", [{"planes": (1,) * 7}, {"layers": (0,) * 8}, {"kernel_size": 4}, {"in_channels": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Res16UNetConfig(**{**SMALL, **change})


def test_other_channels_are_refused():
    p, _ = cloud()
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        small()(voxelise(p, torch.ones(len(p), 4), 0.02)[0])


# ---- released weights


def released(folder: Path, prefix: str = "model.backbone.", **more) -> list[str]:
    """A released file with the backbone under `prefix`, other parts beside it, and the converter's arguments."""
    state = {prefix + k: v for k, v in small(3).state_dict().items()}
    state |= {f"{prefix}final.kernel": torch.zeros(6, 20), f"{prefix}final.bias": torch.zeros(1, 20)}
    state["decoder.query.weight"] = torch.zeros(3)
    state |= {prefix + k: v for k, v in more.items()}
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, folder / "weights.pth")
    return [str(folder / "weights.pth"), "--out", str(folder / "out")]


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone.", "bi_encoder.backbone3d."])
def test_converted_weights_are_the_released_ones(prefix, tmp_path, capsys):
    assert run.cli(convert.main, released(tmp_path, prefix)) == 0
    said, want = capsys.readouterr().out, small(3).state_dict()
    assert f"{len(want)} tensors under" in said and "final.bias and 1 outside" in said
    ours = Res16UNet.from_checkpoint(tmp_path / "out" / "last")
    assert ours.cfg == Res16UNetConfig(**SMALL)
    assert all(torch.equal(v, want[k]) for k, v in ours.state_dict().items())


BAD = {
    "missing block3.1.norm2.bn.bias": {"block3.1.norm2.bn.bias": None},
    "unexpected block1.0.more": {"block1.0.more": torch.zeros(1)},
    "is (7,), not (6,)": {"bntr6.bn.bias": torch.zeros(7)},
    "is not finite": {"bn0.bn.bias": torch.tensor([0, 0, torch.nan, 0])},
    "0 tensors are called conv0p1s1.kernel": {"conv0p1s1.kernel": None},
    "2 tensors are called conv0p1s1.kernel": {"ema.conv0p1s1.kernel": torch.zeros(1)},
    "no Res16UNet": {"block7.0.conv1.kernel": None},
    "expected positive": {"conv0p1s1.kernel": torch.zeros(8, 3, 4)},
}


@pytest.mark.parametrize("why", BAD)
def test_anything_else_is_refused_and_nothing_written(why, tmp_path, capsys):
    assert run.cli(convert.main, released(tmp_path, **BAD[why])) == 2
    said = capsys.readouterr()
    assert why in said.out + said.err and not (tmp_path / "out").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    folder = run.save_checkpoint(tmp_path, 0, small(), {"model": "FSGR"}, {})
    with pytest.raises(UserError, match="holds FSGR, expected a Res16UNet"):
        Res16UNet.from_checkpoint(folder)
    folder = run.save_checkpoint(tmp_path, 1, small(), {"model": "Res16UNet", "width": 3}, {})
    with pytest.raises(UserError, match="no configuration of Res16UNet"):
        Res16UNet.from_checkpoint(folder)
