"""models/vessel_unet.py: any size, one preprocessing, losses by hand, averaging, strict checkpoints, CHASE_DB1 if here."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.vessels import open_vessels
from models.vessel_unet import (
    VIEWS,
    VesselUNet,
    VesselUNetConfig,
    WeightAverage,
    cldice_loss,
    standardised,
    turn,
    turn_back,
    vessel_losses,
)
from utils.field_of_view import fov_statistics
from utils.run import UserError, save_checkpoint
from utils.vessel_metrics import soft_cldice

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "sa2va"
H, W = 37, 50
DISC = np.hypot(*np.mgrid[-18:19, -25:25]) < 18


@pytest.fixture
def model() -> VesselUNet:
    torch.manual_seed(0)
    net = VesselUNet(VesselUNetConfig([4, 6, 8]))
    for _ in range(3):  # BatchNorm with statistics of its own, as after training
        net(torch.randn(2, 3, 32, 32))
    return net.eval()


@pytest.fixture
def photo() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.integers(60, 220, (H, W, 3)) * DISC[..., None]).astype(np.uint8)


# ---- the network


def test_default_size_is_about_that_of_the_notes():
    net = VesselUNet(VesselUNetConfig())
    assert sum(p.numel() for p in net.parameters()) == 118_708
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (16, 24), (33, 160), (160, 161)])
@pytest.mark.parametrize("widths", [[5], [4, 6, 8], [4, 6, 8, 10]])
def test_any_size(size, widths):
    net = VesselUNet(VesselUNetConfig(widths)).eval()
    x = torch.randn(2, 3, *size)
    logits = net(x)
    assert logits.shape == (2, 1, *size) and logits.dtype == torch.float32 and logits.isfinite().all()
    torch.testing.assert_close(net(x[1:]), logits[1:], msg="a picture does not depend on the others of its batch")


def test_padding_is_what_lies_outside_the_field_of_view(model):
    """A picture of odd size, and the same with zeros around on the right and below."""
    x = torch.randn(1, 3, H, W)
    wide = torch.nn.functional.pad(x, (0, 6, 0, 3))  # 40 x 56: the next multiples of 8
    torch.testing.assert_close(model(x), model(wide)[..., :H, :W])


def test_first_loss_and_gradients():
    torch.manual_seed(0)
    net = VesselUNet(VesselUNetConfig([8, 16]))
    truth, fov = torch.rand(4, 32, 32) < 0.1, torch.ones(4, 32, 32, dtype=torch.bool)
    values = vessel_losses(net(torch.randn(4, 3, 32, 32)), truth, fov)
    assert values["bce"].item() == pytest.approx(np.log(2), abs=0.15)
    assert values["dice"].item() == pytest.approx(1 - 2 * 0.05 / (0.5 + 0.1), abs=0.05)
    sum(values.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = VesselUNet(VesselUNetConfig([8, 16]))
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[0, 10:14], truth[1, :, 5:8] = True, True
    x = torch.randn(2, 3, 32, 32) + 0.5 * truth[:, None]
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(100):
        values = vessel_losses(net(x), truth, torch.ones_like(truth))
        opt.zero_grad()
        sum(values.values()).backward()
        opt.step()
    assert values["bce"] < 0.03 and values["dice"] < 0.05


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (3, 8, 8)])
def test_other_shapes_are_refused(model, shape):
    with pytest.raises(ValueError, match="expected \\(B, 3, H, W\\)"):
        model(torch.zeros(shape))


def test_a_configuration_without_widths_is_refused():
    with pytest.raises(ValueError, match="widths"):
        VesselUNetConfig([])


# ---- preprocessing and prediction


def test_standardised_inside_the_field_of_view(photo):
    mean, std = fov_statistics(photo, DISC)
    known = [torch.from_numpy(a)[None] for a in (photo, DISC, mean, std)]
    ours = standardised(*known)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ours[DISC], ((photo - mean) / std)[DISC], atol=1e-5)
    assert not ours[~DISC].any() and np.abs(ours[DISC].mean(0)).max() < 1e-4
    np.testing.assert_allclose(ours[DISC].std(0), 1, atol=1e-3)


def test_turns_are_eight_different_ones_and_undone():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    seen = [turn(x, k) for k in range(VIEWS)]
    assert len({str(s.tolist()) for s in seen}) == VIEWS
    assert all(torch.equal(turn_back(s, k), x) for k, s in enumerate(seen))


@pytest.mark.parametrize("tta", [False, True])
def test_predict_by_hand(model, photo, tta):
    known = [torch.from_numpy(a)[None] for a in (photo, DISC, *fov_statistics(photo, DISC))]
    x, total = standardised(*known), torch.zeros(1, 1, H, W)
    for k in range(8 if tta else 1):
        total += turn_back(model(turn(x, k)).sigmoid(), k) / (8 if tta else 1)
    prob = model.predict(photo, DISC, tta)
    assert prob.dtype == np.float32 and not prob[~DISC].any()
    np.testing.assert_allclose(prob[DISC], total[0, 0].detach().numpy()[DISC], atol=1e-6)
    assert prob[DISC].std() > 0.01, "else nothing was compared"


def test_a_crop_with_its_photographs_statistics_looks_as_in_the_photograph(model, photo):
    """Far from the cut, where the same neighbourhood is seen; the cut is at a multiple of the net's step of 8."""
    big = np.tile(photo, (3, 3, 1))[:96, :144]
    fov = np.ones(big.shape[:2], bool)
    whole = model.predict(big, fov)
    part = np.s_[16:80, 16:128]
    crop = model.predict(big[part], fov[part], statistics=fov_statistics(big, fov))
    inner = np.s_[24:-24, 24:-24]
    np.testing.assert_allclose(crop[inner], whole[part][inner], atol=1e-5)
    assert np.abs(model.predict(big[part][:20, :20], fov[part][:20, :20]) - crop[:20, :20]).max() > 1e-4


def test_bf16_is_near_fp32(model, photo):
    a, b = model.predict(photo, DISC), model.predict(photo, DISC, dtype=torch.bfloat16)
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.05


def test_predict_refuses_training_mode_and_an_empty_field_of_view(model, photo):
    with pytest.raises(ValueError, match="empty|with 0 px"):
        model.predict(photo, np.zeros_like(DISC))
    with pytest.raises(ValueError, match="training mode"):
        model.train().predict(photo, DISC)


# ---- losses, averaging


def test_losses_by_hand():
    rng = np.random.default_rng(0)
    z, t, f = rng.normal(size=(3, 6, 7)), rng.random((3, 6, 7)) < 0.3, rng.random((3, 6, 7)) < 0.6
    p = 1 / (1 + np.exp(-z))
    bce = -np.log(np.where(t, p, 1 - p))[f].mean()
    dice = 1 - (2 * p[f & t].sum() + 1) / (p[f].sum() + t[f].sum() + 1)
    logits = torch.tensor(z, dtype=torch.float32)[:, None]
    found = vessel_losses(logits, torch.from_numpy(t), torch.from_numpy(f))
    assert found["bce"].item() == pytest.approx(bce, rel=1e-5) and found["dice"].item() == pytest.approx(dice, rel=1e-5)
    inside = torch.from_numpy(f)[:, None].float()
    oracle = soft_cldice(logits.sigmoid() * inside, torch.from_numpy(t)[:, None] * inside)
    assert cldice_loss(logits, torch.from_numpy(t), torch.from_numpy(f)).item() == pytest.approx(oracle.item())
    elsewhere = torch.where(torch.from_numpy(f)[:, None], logits, 50.0)
    again = vessel_losses(elsewhere, torch.from_numpy(t) | ~torch.from_numpy(f), torch.from_numpy(f))
    assert all(again[k].item() == pytest.approx(found[k].item(), rel=1e-5) for k in found), "outside counts nothing"


def test_cldice_falls_when_a_gap_is_closed():
    truth = torch.zeros(1, 24, 24, dtype=torch.bool)
    truth[0, 10:13, 2:22] = True
    gap, fov = truth.clone(), torch.ones_like(truth)
    gap[0, :, 10:14] = False
    whole, broken = (cldice_loss(20.0 * x[:, None] - 10, truth, fov).item() for x in (truth, gap))
    assert whole < 0.01 < broken - 0.05


def test_a_batch_without_field_of_view_gives_finite_losses():
    logits = torch.randn(1, 1, 8, 8, requires_grad=True)
    none = torch.zeros(1, 8, 8, dtype=torch.bool)
    values = vessel_losses(logits, none, none)
    sum(values.values()).backward()
    assert [v.item() for v in values.values()] == [0, 0] and not logits.grad.any()


def test_losses_of_half_precision_are_computed_in_float32():
    logits = 4 * torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(0)).half()
    truth = torch.ones(1, 300, 300, dtype=torch.bool)
    values, exact = vessel_losses(logits, truth, truth), vessel_losses(logits.float(), truth, truth)
    assert all(v.dtype == torch.float32 and v == exact[k] for k, v in values.items())


def test_weight_average_by_hand():
    net = torch.nn.BatchNorm1d(1)
    average, expected = WeightAverage(net, 0.2), torch.tensor([1.0])
    assert not average.model.training
    for n, value in enumerate([2.0, 4.0, -1.0, 3.0, 8.0]):
        net.weight.data.fill_(value)
        net.running_mean.fill_(10 * value)
        net.num_batches_tracked.fill_(n)
        keep = min(0.2, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
        average.update(net, n)
    torch.testing.assert_close(average.model.weight, expected)
    assert average.model.running_mean.item() > 10 and average.model.num_batches_tracked == 4
    assert not average.model.weight.requires_grad and average.model.weight is not net.weight
    with pytest.raises(ValueError, match="decay 1"):
        WeightAverage(net, 1.0)


# ---- files


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.cfg.threshold, model.cfg.train_images = 0.45, [{"name": "a", "sha256": "00"}]
    return save_checkpoint(tmp_path, 3, model, model.config_dict(), {})


def test_checkpoint_gives_the_same_model(model, photo, folder):
    again = VesselUNet.from_checkpoint(folder)
    assert not again.training and again.cfg == model.cfg and again.cfg.threshold == 0.45
    np.testing.assert_array_equal(again.predict(photo, DISC), model.predict(photo, DISC))


@pytest.mark.parametrize("damage", ["missing", "added", "reshaped", "nan"])
def test_weights_that_do_not_fit_are_refused(folder, damage):
    path = folder / "model.safetensors"
    state = load_file(path)
    if damage == "missing":
        del state["head.bias"]
    elif damage == "added":
        state["head.more"] = torch.zeros(2)
    else:
        state["head.bias"] = torch.zeros(5) if damage == "reshaped" else torch.full((4,), torch.nan)
    save_file(state, path)
    with pytest.raises(UserError, match="does not fit VesselUNet: .*head"):
        VesselUNet.from_checkpoint(folder)


@pytest.mark.parametrize(
    "change, said", [({"model": "fsgr"}, "the model 'fsgr'"), ({"depth": 3}, "depth"), ({"widths": []}, "widths")]
)
def test_configurations_of_something_else_are_refused(folder, change, said):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said):
        VesselUNet.from_checkpoint(folder)


# ---- CHASE_DB1


def test_photographs_of_chase_are_predicted_whole(model):
    """Every photograph that lies here: its size, nothing outside the field of view, statistics 0 and 1 inside."""
    root = SHARED / "chase_db1"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    items = open_vessels(root).items[::6]
    for item in items:
        image = item.image()
        fov = item.fov(image)
        prob = model.predict(image, fov)
        assert prob.shape == image.shape[:2] and np.isfinite(prob).all() and not prob[~fov].any() and prob[fov].all()
    print(f"{len(items)} of {len(items)} photographs")
