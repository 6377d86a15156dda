"""models/tempopeak.py with its heads and shifts: shapes, first loss, padding, leaks, targets, losses, checkpoints."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file

from models.tempopeak import (
    HEADS,
    INPUTS,
    SHIFTS,
    TASKS,
    FrameEncoder,
    TempoPeak,
    TempoPeakConfig,
    bump,
    peak_loss,
    peak_targets,
    spot_loss,
    spot_targets,
)
from models.temporal_heads import make_head
from utils import run
from utils.run import UserError

SIZE = 16  # px; 96 features of a 1x1 map with the tiny encoder


def config(**changes) -> TempoPeakConfig:
    cfg = TempoPeakConfig(encoder="tiny", size=[SIZE, SIZE], headdim=32, d_state=16)
    if changes.get("task") == "spot":
        changes = {"classes": ["bounce", "swing"], **changes}
    return replace(cfg, **changes)


def lively(cfg: TempoPeakConfig, seed: int = 0) -> TempoPeak:
    """A model in eval mode in which nothing is at its neutral start: gates open, statistics and classifier at work."""
    torch.manual_seed(seed)
    model = TempoPeak(cfg).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.1, 0.2)
        elif isinstance(module, torch.nn.Conv3d):
            torch.nn.init.normal_(module.weight, 0, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    for name in ("classifier", "attend", "none"):
        if hasattr(model, name):
            torch.nn.init.normal_(getattr(model, name).weight, 0, 0.3)
            torch.nn.init.normal_(getattr(model, name).bias, 0, 0.3)
    return model


def movie(B: int, T: int, seed: int = 0, size: int = SIZE) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, T, 3, size, size), dtype=torch.uint8, generator=g)


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---- shapes and first loss


@torch.no_grad()
@pytest.mark.parametrize("task", ["peak", "peak, no peak", "spot"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_first_loss(head, shift, task):
    torch.manual_seed(1)
    no_peak, spot = task == "peak, no peak", task == "spot"
    model = TempoPeak(config(task=task[:4], head=head, shift=shift, no_peak=no_peak))  # as made: training mode
    for T in (1, 7, 64, 100):
        logits = model(movie(2, T))
        assert logits.shape == ((2, T, 3) if spot else (2, T + no_peak)) and logits.dtype == torch.float32
        p = model.probabilities(logits)
        assert p.shape == (2, T, 2 if spot else 1) and bool(((p >= 0) & (p <= 1)).all())
        if spot:
            events = torch.tensor([[[0, 1, 0, 0]], [[T // 2, 2, T // 2, T // 2]]])
            target = spot_targets(events, T, 2, "hard", 1.0)
            got = spot_loss(logits, target, torch.tensor([T, T]), fg_weight=1.0)
            want = math.log(3)
        else:
            assert_near(p.sum((1, 2)), logits.softmax(1)[:, :T].sum(1))
            peak = torch.tensor([0, T // 2])
            got = peak_loss(logits, peak_targets(peak, peak, peak, T, "hard", 1.0, no_peak))
            want = math.log(T + no_peak)
        assert abs(got.item() - want) < 0.05, f"T {T}: first loss {got:.4f}, expected {want:.4f}"


def test_resnet18_first_loss_and_gradients():
    torch.manual_seed(0)
    model = TempoPeak(TempoPeakConfig(no_peak=True, shift="gsm", size=[32, 32]))
    peak = torch.tensor([40])
    loss = peak_loss(model(movie(1, 64, size=32)), peak_targets(peak, peak, peak, 64, "hard", 1.0, True))
    assert abs(loss.item() - math.log(65)) < 0.05
    loss.backward()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad, bad


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_is_used(head):
    """DDP runs with find_unused_parameters=False, so each parameter needs a gradient."""
    for task, no_peak in (("peak", False), ("peak", True), ("spot", False)):
        model = TempoPeak(config(head=head, task=task, no_peak=no_peak, shift="gsf", head_layers=2))
        model(movie(2, 6)).logsumexp(1).sum().backward()
        unused = [n for n, p in model.named_parameters() if p.grad is None]
        assert not unused, (task, unused)


@torch.no_grad()
@pytest.mark.parametrize("kind", INPUTS)
def test_uint8_equals_float(kind):
    model, frames = lively(config(input=kind)), movie(2, 9)
    assert_near(model(frames), model(frames / 255), 1e-6)
    assert model.to_input(frames).shape == frames.shape


@torch.no_grad()
def test_graydiff_against_a_loop():
    frames = movie(1, 5).float() / 255
    got = TempoPeak(config(input="graydiff")).to_input(frames)[0]  # (T, 3, H, W)
    grey = [0.299 * f[0] + 0.587 * f[1] + 0.114 * f[2] for f in frames[0]]
    for t in range(5):
        before = (grey[t] - grey[t - 1]) / 0.1 if t else torch.zeros(SIZE, SIZE)
        after = (grey[t + 1] - grey[t]) / 0.1 if t < 4 else torch.zeros(SIZE, SIZE)
        assert_near(got[t], torch.stack([(grey[t] - 0.45) / 0.225, before, after]))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 2, 1, 8, 8), (1, 2, 8, 8, 3)])
def test_other_frames_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(B, T, 3, H, W\)"):
        TempoPeak(config())(torch.zeros(shape))


def test_impossible_configurations_are_refused():
    for change, words in (
        ({"task": "both"}, "task"),
        ({"input": "hsv"}, "input"),
        ({"head": "lstm"}, "head"),
        ({"shift": "left"}, "shift"),
        ({"encoder": "resnet5"}, "encoder"),
        ({"classes": ["a", "b"]}, "one class"),
    ):
        with pytest.raises(ValueError, match=words):
            TempoPeak(config(**change))
    with pytest.raises(ValueError, match="head"):
        make_head("transformer", 8)


# ---- invariances (eval mode)


@torch.no_grad()
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("head", HEADS)
def test_batch_of_two_is_two_of_one(head, shift):
    for changes in ({"no_peak": True}, {"task": "spot"}):
        model, frames = lively(config(head=head, shift=shift, **changes)), movie(2, 11)
        assert_near(model(frames), torch.cat([model(frames[:1]), model(frames[1:])]))


@torch.no_grad()
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("head", HEADS)
def test_padding_changes_nothing(head, shift, kind):
    """A short clip alone = the same clip beside a longer one, whatever stands in its padding."""
    frames, lengths = movie(3, 13), torch.tensor([8, 13, 1])
    for changes in ({"no_peak": True}, {"task": "spot"}):
        model = lively(config(head=head, shift=shift, input=kind, head_layers=2, **changes))
        together = model(frames, lengths)
        for b, n in enumerate(lengths.tolist()):
            alone = model(frames[b : b + 1, :n])[0]
            assert_near(together[b, :n], alone[:n])
            if model.cfg.task == "peak":
                assert (together[b, n:13] == -math.inf).all()
                assert_near(together[b, 13], alone[n])  # no peak
                assert not model.probabilities(together)[b, n:].any()
        other = frames.clone()
        other[0, 8:], other[2, 1:] = 255 - other[0, 8:], 7
        again = model(other, lengths)
        assert all(torch.equal(again[b, :n], together[b, :n]) for b, n in enumerate(lengths.tolist()))
        assert_near(model(frames, torch.tensor([13, 13, 13])), model(frames), 1e-6)


def reach(model: TempoPeak, T: int = 15, at: int = 7) -> list[int]:
    """Distances t - at of the frames whose logits change with frame `at`."""
    frames = movie(1, T)
    other = frames.clone()
    other[:, at] = 255 - other[:, at]
    moved = (model(frames) - model(other)).abs()[0].reshape(T, -1).amax(1)  # (T,)
    assert moved[at] > 1e-3
    return [t - at for t in range(T) if moved[t] > 0]


@torch.no_grad()
def test_who_sees_whom():
    """A perturbed frame: identity keeps it to itself, heads that see both ways spread it, mamba2 only forwards."""
    everywhere, after = list(range(-7, 8)), list(range(8))
    for task in TASKS:
        seen = {head: reach(lively(config(head=head, task=task))) for head in HEADS}
        both_ways = dict.fromkeys(("bigru", "bimamba2", "sgp"), everywhere)
        assert seen == {"identity": [0], "mamba2": after, **both_ways}, task


@torch.no_grad()
def test_reach_of_shift_and_input():
    """Frames to either side per block: 1 by the shift, 1 by the 3x3x3 gate, 1 by GSF's weights. Three blocks.

    The farthest effects of the gates drown in rounding, so `sure` asks for less than `most`.
    """
    for shift, sure, most in (("tsm", 3, 3), ("gsm", 4, 6), ("gsf", 4, 9)):
        found = set(reach(lively(config(head="identity", shift=shift)), T=25, at=12))
        assert set(range(-sure, sure + 1)) <= found <= set(range(-most, most + 1)), (shift, sorted(found))
    assert reach(lively(config(head="identity", input="graydiff"))) == [-1, 0, 1]


@torch.no_grad()
def test_number_of_frames_comes_from_the_input():
    """One model, any T; nothing of an earlier call stays behind."""
    model = lively(config(shift="gsf", head="bimamba2"))
    first = model(movie(2, 5))
    assert model(movie(1, 40)).shape == (1, 40) and model(movie(3, 1)).shape == (3, 1)
    assert torch.equal(model(movie(2, 5)), first)


@torch.no_grad()
def test_no_peak_logit_looks_at_the_clip():
    model = lively(config(no_peak=True, head="identity"))
    logits = model(torch.cat([movie(1, 9), movie(1, 9, seed=5)]))
    assert logits.shape == (2, 10) and logits[0, 9] != logits[1, 9]
    frames, order = movie(1, 9), torch.tensor([3, 1, 8, 0, 2, 7, 6, 5, 4])
    assert_near(model(frames[:, order])[:, :9], model(frames)[:, order])  # pooled: the order does not matter
    assert_near(model(frames[:, order])[:, 9], model(frames)[:, 9])
    p = model.probabilities(logits)
    assert_near(p.sum((1, 2)), 1 - logits.softmax(1)[:, 9])


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_bf16_autocast_is_near_fp32(head):
    model, frames = lively(config(head=head, shift="gsf", no_peak=True)), movie(2, 32)
    want = model(frames)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(frames, torch.tensor([32, 32]))
    assert got.dtype == torch.float32 and got.isfinite().all()
    assert (got - want).abs().max() < 0.05 * want.abs().max()


# ---- targets


def test_hard_targets():
    peak = torch.tensor([3, 0, 9])
    got = peak_targets(peak, peak, peak, 10, "hard", 1.0, no_peak=False)
    assert torch.equal(got, F.one_hot(peak, 10).float())


@pytest.mark.parametrize("kind", ["hard", "gaussian", "interval"])
@pytest.mark.parametrize("no_peak", [False, True])
def test_targets_are_probabilities(kind, no_peak):
    peak, lo, hi = torch.tensor([0, 5, 9]), torch.tensor([0, 4, 7]), torch.tensor([1, 6, 9])
    q = peak_targets(peak, lo, hi, 10, kind, 1.5, no_peak)
    assert q.shape == (3, 10 + no_peak) and bool((q >= 0).all())
    assert_near(q.sum(1), torch.ones(3), 1e-6)
    if kind != "interval":
        assert q[:, :10].argmax(1).tolist() == peak.tolist()


def test_gaussian_target_formula():
    peak = torch.tensor([4])
    got = peak_targets(peak, peak, peak, 9, "gaussian", 1.3, False)[0]
    raw = [math.exp(-((t - 4) ** 2) / (2 * 1.3**2)) for t in range(9)]
    assert_near(got, torch.tensor(raw) / sum(raw), 1e-6)
    hard = peak_targets(peak, peak, peak, 9, "hard", 1.0, False)
    for sigma, gap in ((0.5, 0.22), (0.3, 8e-3), (0.1, 1e-12), (1e-3, 0.0)):  # 2 exp(-1 / 2 sigma^2) to either side
        near = peak_targets(peak, peak, peak, 9, "gaussian", sigma, False)
        assert (near - hard).abs().max() <= gap, sigma


def test_interval_target_is_flat_inside():
    """sigma -> 0: even over lo..hi; else the same, blurred by the Gaussian; a single frame is the Gaussian."""
    peak, lo, hi = torch.tensor([5]), torch.tensor([3]), torch.tensor([6])
    sharp = peak_targets(peak, lo, hi, 10, "interval", 1e-3, False)[0]
    assert_near(sharp, torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 0]) / 4, 1e-6)
    got = peak_targets(peak, lo, hi, 10, "interval", 0.8, False)[0]
    raw = [sum(math.exp(-((t - c) ** 2) / (2 * 0.8**2)) for c in range(3, 7)) for t in range(10)]
    assert_near(got, torch.tensor(raw) / sum(raw), 1e-6)
    one = peak_targets(peak, peak, peak, 10, "interval", 0.8, False)
    assert_near(one, peak_targets(peak, peak, peak, 10, "gaussian", 0.8, False), 1e-6)
    with pytest.raises(ValueError, match="expected hard, gaussian or interval"):
        bump(peak, lo, hi, 10, "box", 1.0)


def test_absent_peaks():
    peak = torch.tensor([2, -1])
    for kind in ("hard", "gaussian", "interval"):
        q = peak_targets(peak, peak, peak, 6, kind, 1.0, no_peak=True)
        assert torch.equal(q[1], torch.tensor([0.0, 0, 0, 0, 0, 0, 1])) and q[0, 6] == 0
        with pytest.raises(ValueError, match="no_peak"):
            peak_targets(peak, peak, peak, 6, kind, 1.0, no_peak=False)


def test_spot_targets_against_loops():
    """Two near events of one class, two classes that overlap, unused rows; hard, gaussian and interval."""
    events = torch.tensor([
        [[3, 1, 2, 4], [5, 1, 5, 5], [4, 2, 4, 6], [-1, -1, -1, -1]],
        [[0, 2, 0, 0], [-1, -1, -1, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]],
        [[-1, -1, -1, -1]] * 4,
    ])  # fmt: skip
    T, K, sigma = 12, 3, 0.9
    for kind in ("hard", "gaussian", "interval"):
        got = spot_targets(events, T, K, kind, sigma)
        assert got.shape == (3, T, K + 1) and bool((got >= 0).all())
        assert_near(got.sum(-1), torch.ones(3, T), 1e-6)
        want = torch.zeros(3, T, K + 1)
        for b in range(3):
            for t in range(T):
                for frame, label, lo, hi in events[b].tolist():
                    if label < 1:
                        continue
                    spread = range(lo, hi + 1) if kind == "interval" else [frame]
                    value = {u: sum(math.exp(-((u - c) ** 2) / (2 * sigma**2)) for c in spread) for u in range(T)}
                    each = float(t == frame) if kind == "hard" else value[t] / max(value.values())
                    want[b, t, label] = max(want[b, t, label].item(), each)
                want[b, t] /= max(1.0, want[b, t].sum().item())
                want[b, t, 0] = 1 - want[b, t].sum()
        assert_near(got, want)
    assert torch.equal(spot_targets(events, T, K, "hard", 1.0)[2, :, 0], torch.ones(T))  # background only


# ---- losses


def test_peak_loss_formula():
    g = torch.Generator().manual_seed(0)
    logits, peak = 3 * torch.randn(4, 9, generator=g), torch.tensor([0, 3, 8, 5])
    target = peak_targets(peak, peak, peak, 9, "gaussian", 1.0, False)
    want = 0.0
    for b in range(4):
        norm = math.log(sum(math.exp(z) for z in logits[b].tolist()))
        want -= sum(q * (z - norm) for q, z in zip(target[b].tolist(), logits[b].tolist(), strict=True)) / 4
    assert abs(peak_loss(logits, target).item() - want) < 1e-5
    hard = peak_targets(peak, peak, peak, 9, "hard", 1.0, False)
    assert_near(peak_loss(logits, hard), F.cross_entropy(logits, peak))
    perfect = 50 * F.one_hot(peak, 9).float()
    assert peak_loss(perfect, hard) < 1e-6


@pytest.mark.parametrize("kind", ["hard", "gaussian", "interval"])
def test_peak_loss_does_not_see_padding(kind):
    """A clip of 6 frames alone = the same padded to 9: no part of the target may fall on padding and be lost."""
    g, peak = torch.Generator().manual_seed(1), torch.tensor([5])
    logits = torch.randn(1, 6, generator=g)
    padded = torch.cat([logits, torch.full((1, 3), -math.inf)], dim=1).requires_grad_()
    alone = peak_loss(logits, peak_targets(peak, peak, peak, 6, kind, 1.0, False))
    got = peak_loss(padded, peak_targets(peak, peak, peak, 9, kind, 1.0, False))
    got.backward()
    assert padded.grad[:, :6].isfinite().all() and not padded.grad[:, 6:].any()
    assert_near(got.detach(), alone)


def test_spot_loss_formula():
    g = torch.Generator().manual_seed(2)
    logits, lengths = 2 * torch.randn(2, 7, 3, generator=g), torch.tensor([7, 4])
    events = torch.tensor([[[1, 1, 1, 1], [5, 2, 5, 5]], [[2, 2, 2, 2], [-1, -1, -1, -1]]])
    for kind in ("hard", "gaussian"):
        target, want = spot_targets(events, 7, 2, kind, 1.0), 0.0
        for b in range(2):
            for t in range(lengths[b]):
                norm = math.log(sum(math.exp(z) for z in logits[b, t].tolist()))
                for k in range(3):
                    weight = 1.0 if k == 0 else 5.0
                    want -= weight * target[b, t, k].item() * (logits[b, t, k].item() - norm) / 11  # 7 + 4 real frames
        assert abs(spot_loss(logits, target, lengths, fg_weight=5.0).item() - want) < 1e-5, kind
    hard = spot_targets(events, 7, 2, "hard", 1.0)
    plain = F.cross_entropy(logits.flatten(0, 1), hard.argmax(-1).flatten())
    assert_near(spot_loss(logits, hard, torch.tensor([7, 7]), fg_weight=1.0), plain)
    other = logits.clone()
    other[1, 4:] = 99.0
    assert torch.equal(spot_loss(other, hard, lengths, 5.0), spot_loss(logits, hard, lengths, 5.0))


# ---- encoder


def test_encoder_names_are_torchvisions():
    ours = set(FrameEncoder("resnet18").state_dict())
    theirs = {k for k in torchvision.models.resnet18(weights=None).state_dict() if not k.startswith("fc.")}
    assert ours == theirs
    shifted = set(FrameEncoder("resnet18", "gsf").state_dict())
    assert theirs < shifted and all(k.startswith("shifts.") for k in shifted - theirs)
    assert len(FrameEncoder("resnet18", "tsm").shifts) == 8  # every residual block


@torch.no_grad()
def test_encoder_computes_what_torchvision_does():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    net.fc = torch.nn.Identity()
    encoder = FrameEncoder("resnet18").eval()
    encoder.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(4, 3, 40, 56)
    assert_near(encoder(x, T=2), net(x))


def test_load_imagenet(tmp_path):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(theirs, tmp_path / "resnet18.pth")
    for shift in ("none", "gsm"):
        model = TempoPeak(TempoPeakConfig(shift=shift, head="identity"))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_imagenet(tmp_path / "resnet18.pth")
        after = model.state_dict()
        assert all(torch.equal(after[f"encoder.{k}"], v) for k, v in theirs.items() if not k.startswith("fc."))
        ours = [k for k in after if k.removeprefix("encoder.") not in theirs]
        assert all(torch.equal(after[k], before[k]) for k in ours)  # shifts, head and classifier stay
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match=r"resnet34.pth: does not fit FrameEncoder: unexpected"):
        model.load_imagenet(tmp_path / "resnet34.pth")
    assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())  # refused, not half loaded
    with pytest.raises(UserError, match="does not fit"):
        TempoPeak(config()).load_imagenet(tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match="no such weight file"):
        model.load_imagenet(tmp_path / "none.pth")


# ---- checkpoints


def save(model: TempoPeak, folder):
    state = {"optimizer": {}, "args": {"lr": 0.1}}
    return run.save_checkpoint(folder, 7, model, model.config_dict(), state)


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_checkpoint_round_trip(tmp_path, head):
    model = lively(
        config(head=head, shift="gsf", no_peak=True, crop=[1, 2, 30, 20], crop_of=[48, 32], input="graydiff")
    )
    folder = save(model, tmp_path)
    assert folder.name == "step_000007" and (tmp_path / "last").resolve() == folder.resolve()
    again = TempoPeak.from_checkpoint(tmp_path / "last").eval()
    assert asdict(again.cfg) == asdict(model.cfg)
    frames = movie(2, 9)
    assert torch.equal(again(frames), model(frames))
    assert run.load_state(folder) == {"optimizer": {}, "args": {"lr": 0.1}, "step": 7}


@torch.no_grad()
def test_state_dict_round_trip():
    model, other = lively(config(shift="gsm", no_peak=True)), lively(config(shift="gsm", no_peak=True), seed=1)
    frames = movie(1, 6)
    assert not torch.equal(other(frames), model(frames))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(frames), model(frames))
    assert not {"mean", "std"} & set(model.state_dict())  # constants are no weights


def drop(folder, name):
    (folder / name).unlink()


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content["model"].update(changes.pop("model", {}))
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


SPOILED = {  # what was done to the folder -> words of the refusal
    "another head": (lambda d: change_config(d, model={"head": "bigru"}), "does not fit TempoPeak: missing head.forth"),
    "more layers": (lambda d: change_config(d, model={"head_layers": 2}), "missing head.mixers.1"),
    "wider state": (lambda d: change_config(d, model={"d_state": 32}), r"in_proj.weight is \(\d+, 96\), not"),
    "no-peak logit": (lambda d: change_config(d, model={"no_peak": True}), "missing attend.weight"),
    "unknown key": (lambda d: change_config(d, model={"colour": 1}), "not a configuration of this version"),
    "unknown head": (lambda d: change_config(d, model={"head": "lstm"}), "not a configuration of this version"),
    "another class": (lambda d: change_config(d, **{"class": "Sam3"}), "a checkpoint of Sam3, expected one of TempoP"),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), "config.json"),
    "config is cut": (lambda d: (d / "config.json").write_text('{"model": '), "not readable as JSON"),
    "no config": (lambda d: drop(d, "config.json"), r"not a checkpoint folder \(config.json is missing\)"),
    "no weights": (lambda d: drop(d, "model.safetensors"), r"not a checkpoint folder \(model.safetensors is missing\)"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "not readable as weights"),
    "cut weights": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "not readable as weights",
    ),
    "NaN": (
        lambda d: change_weights(d, lambda t: t["classifier.weight"].view(-1)[3:4].fill_(math.nan)),
        "classifier.weight is not finite",
    ),
    "infinity": (
        lambda d: change_weights(d, lambda t: t["encoder.bn1.running_var"][:1].fill_(math.inf)),
        "encoder.bn1.running_var is not finite",
    ),
    "tensor missing": (lambda d: change_weights(d, lambda t: t.pop("classifier.bias")), "missing classifier.bias"),
    "tensor added": (
        lambda d: change_weights(d, lambda t: t.update(extra=torch.zeros(2))),
        r"unexpected extra \(2,\)",
    ),
    "tensor reshaped": (
        lambda d: change_weights(d, lambda t: t.update({"classifier.bias": torch.zeros(2)})),
        r"classifier.bias is \(2,\), not \(1,\)",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_checkpoints_are_refused(tmp_path, what):
    spoil, words = SPOILED[what]
    folder = save(TempoPeak(config()), tmp_path)
    TempoPeak.from_checkpoint(folder)  # it is good before
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        TempoPeak.from_checkpoint(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_gpu_equals_cpu(head):
    model, frames = lively(config(head=head, shift="gsf", no_peak=True)), movie(2, 20)
    lengths = torch.tensor([20, 11])
    want = model(frames, lengths)
    on_gpu = TempoPeak(model.cfg, impl="torch").eval().cuda()
    on_gpu.load_state_dict(model.state_dict())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = on_gpu(frames.cuda(), lengths.cuda()).cpu()
    real = want.isfinite()
    assert torch.equal(real, got.isfinite())
    assert (got - want)[real].abs().max() < 1e-3 * want[real].abs().max()
