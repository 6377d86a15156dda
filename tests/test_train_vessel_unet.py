"""train/train_vessel_unet.py on drawn vessels in CHASE_DB1's layout: what it reads, exact resume, ranks, refusals."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.vessels import open_vessels
from models.vessel_unet import VesselUNet
from utils import run
from utils.weights import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
H, W = 56, 64
Y, X = np.mgrid[:H, :W]
DISC = np.hypot(Y - H / 2, X - W / 2) < 26


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_chase(root: Path, children: list[int]) -> None:
    """Dark wavy lines on a lit disc: photographs, masks of the first observer, fields of view."""
    for folder in ("images", "labels1", "masks"):
        (root / folder).mkdir(parents=True)
    for child in children:
        for k, eye in enumerate("LR"):
            rng = np.random.default_rng([child, k])
            middle = H / 2 + 8 * np.sin(X / 9 + rng.uniform(0, 6)) + rng.uniform(-8, 8)
            mask = (np.abs(Y - middle) < 2.5) & DISC
            grey = 150 - 60 * mask + rng.normal(0, 8, (H, W))
            photo = (grey[..., None] * [1, 0.6, 0.2] * DISC[..., None]).clip(0, 255).astype(np.uint8)
            Image.fromarray(photo).save(root / "images" / f"Image_{child:02d}{eye}.jpg", quality=95)
            Image.fromarray(mask).save(root / "labels1" / f"Image_{child:02d}{eye}_1stHO.png")
            Image.fromarray(DISC).save(root / "masks" / f"mask_{child:02d}{eye}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chase") / "root"
    write_chase(root, [1, 2, 3, 11])
    for path in root.glob("*/*11*"):  # the test split cannot be opened
        path.write_bytes(b"no picture " + path.name.encode())
    return root


def flags(data: Path, out: Path, /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced, as seed=1; None: left out."""
    options = {"data": data, "out": out, "device": "cpu", "widths": "4,8", "patch_size": 32, "batch_size": 3}
    options |= {"steps": 6, "print_every": 1, "warmup": 2}
    words = []
    for name, value in (options | more).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(data: Path, out: Path, /, **more) -> Path:
    assert run.cli(script("train/train_vessel_unet.py").main, flags(data, out, **more)) == 0
    return out


def refused(capsys, data: Path, out: Path, /, **more) -> str:
    """The sentence of a run that must be refused."""
    capsys.readouterr()
    assert run.cli(script("train/train_vessel_unet.py").main, flags(data, out, **more)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.fixture
def no_curves(monkeypatch):
    """Runs without curves.png, which takes longer than a few steps."""
    monkeypatch.setattr(script("train/train_vessel_unet.py"), "curves", lambda *_: None)


def metrics(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "items_per_s"} for row in run.read_metrics(out)]


def assert_same(a: Path, b: Path) -> None:
    """Averaged weights, and all that a continuation needs."""
    one, two = (load_file(out / "last" / "model.safetensors") for out in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    s, t = (run.load_state(out / "last") for out in (a, b))
    assert all(torch.equal(s["weights"][k], t["weights"][k]) for k in s["weights"]) and s["best"] == t["best"]
    assert str(s["optimizer"]) == str(t["optimizer"])


# ---- a run


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    return train(
        data, tmp_path_factory.mktemp("unet") / "run", steps=80, val="03", val_every=40, ema=0.9, print_every=20
    )


def test_it_learns_from_the_training_split_and_says_what_it_saw(data, trained):
    rows = metrics(trained)
    losses = [row["loss"] for row in rows if "loss" in row]
    val = [row for row in rows if "dice_at_half" in row]
    assert losses[-1] < 0.5 * losses[0] and [row["step"] for row in val] == [40, 80] and val[-1]["n"] == 2
    assert val[-1]["dice_at_half"] > 0.6 and val[-1]["dice_at_chosen"] >= val[-1]["dice_at_half"]
    assert not (trained / "test.png").exists()
    for name in ("curves.png", "val.png", "metrics.csv", "run.json", "last/state.pt", "best/config.json"):
        assert (trained / name).stat().st_size > 100, name
    cfg = VesselUNet.from_checkpoint(trained / "last").cfg
    seen = {x["name"]: x["sha256"] for x in cfg.train_images}
    assert sorted(seen) == ["Image_01L", "Image_01R", "Image_02L", "Image_02R"], "neither validation nor test"
    assert all(seen[n] == file_sha256(data / "images" / f"{n}.jpg") for n in seen)
    assert cfg.threshold == val[-1]["threshold"]
    best = max(val, key=lambda row: row["dice_at_half"])
    assert (trained / "best").resolve().name == f"step_{best['step']:06d}"


def test_validation_is_dice_inside_the_field_of_view(data, trained):
    """The reported values are those of whole pictures, computed anew from the checkpoint."""
    model, found = VesselUNet.from_checkpoint(trained / "last"), []
    for item in open_vessels(data, val=["03"]).split("val"):
        x = item.load()
        prob = model.predict(x["image"], x["fov"])
        at = [(prob > t) & x["fov"] for t in np.arange(5, 96) / 100]
        truth = x["mask"] & x["fov"]
        found.append([2 * (p & truth).sum() / (p.sum() + truth.sum()) for p in at])
    mean, row = np.mean(found, 0), metrics(trained)[-1]
    assert row["dice_at_half"] == pytest.approx(mean[45]) and row["dice_at_chosen"] == pytest.approx(mean.max())
    assert row["threshold"] == pytest.approx((5 + mean.argmax()) / 100)


@pytest.mark.parametrize("val, best", [("", 6), ("03", 4)])
def test_best_is_chosen_on_held_out_patients_only(data, tmp_path, no_curves, monkeypatch, val, best):
    """Without them it is the last."""
    module, scores = script("train/train_vessel_unet.py"), iter([0.3, 0.5, 0.4])
    validate = module.validate

    def scored(*args):
        values, pictures = validate(*args)
        return values | {"dice_at_half": next(scores)}, pictures

    monkeypatch.setattr(module, "validate", scored)
    out = train(data, tmp_path / "run", val_every=2, val=val)
    assert (out / "best").resolve().name == f"step_{best:06d}" and (out / "last").resolve().name == "step_000006"
    assert metrics(out)[-1]["n"] == (2 if val else 6)


def test_overfit_trains_and_validates_on_the_same_pictures(data, tmp_path, no_curves):
    out = train(data, tmp_path / "run", overfit=1, steps=60, ema=0.8, no_turns=True, contrast=1, light=0, batch_size=2)
    rows = metrics(out)
    assert rows[-1]["n"] == 1 and rows[-1]["dice_at_half"] > 0.85
    assert [x["name"] for x in VesselUNet.from_checkpoint(out / "last").cfg.train_images] == ["Image_01L"]


@pytest.mark.parametrize("more", [{"cldice": 0.5, "dice": 0}, {"dtype": "bf16"}, {"widths": "4", "ema": 0}], ids=str)
def test_variants(data, tmp_path, more, no_curves):
    rows = metrics(train(data, tmp_path / "run", steps=2, **more))
    loss = rows[0]
    parts = loss["bce"] + more.get("dice", 1) * loss["dice"] + more.get("cldice", 0) * loss.get("cldice", 0)
    assert loss["loss"] == pytest.approx(parts, rel=1e-5) and math.isfinite(rows[-1]["dice_at_half"])
    assert ("cldice" in loss) == ("cldice" in more)


def test_no_average_is_the_last_weights(data, tmp_path, no_curves):
    out = train(data, tmp_path / "run", ema=0)
    saved, state = load_file(out / "last" / "model.safetensors"), run.load_state(out / "last")
    assert all(torch.equal(saved[k], state["weights"][k]) for k in saved)
    out = train(data, tmp_path / "averaged", ema=0.9)
    saved = load_file(out / "last" / "model.safetensors")
    assert not torch.equal(saved["head.weight"], run.load_state(out / "last")["weights"]["head.weight"])


def test_micro_batches_are_averaged(data, tmp_path, no_curves):
    """Twice the same whole picture: loss and gradient of once."""
    rows, more = [], {"overfit": 1, "batch_size": 1, "patch_size": 64, "no_turns": True, "contrast": 1, "light": 0}
    for accum in (1, 2):
        rows.append(metrics(train(data, tmp_path / str(accum), accum=accum, steps=1, **more))[0])
    assert [rows[1][k] for k in ("loss", "grad")] == pytest.approx([rows[0][k] for k in ("loss", "grad")], rel=1e-4)


def test_init_takes_weights_and_remembers_their_pictures(data, trained, tmp_path, no_curves):
    out = train(data, tmp_path / "run", init=trained / "last", steps=1, overfit=1, lr="1e-7", split_at=1)
    a, b = (load_file(x / "last" / "model.safetensors") for x in (trained, out))
    assert (a["head.weight"] - b["head.weight"]).abs().max() < 1e-5
    assert len(VesselUNet.from_checkpoint(out / "last").cfg.train_images) == 4


def test_kernels_decay_and_nothing_else(data, tmp_path, monkeypatch, no_curves):
    made, adamw = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **kw: made.append(adamw(*a, **kw)) or made[-1])
    train(data, tmp_path / "run", steps=1, weight_decay=0.3)
    decayed, rest = made[0].param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {4} and {p.ndim for p in rest["params"]} == {1}
    count = sum(1 for _ in VesselUNet.from_checkpoint(tmp_path / "run" / "last").parameters())
    assert len(decayed["params"]) + len(rest["params"]) == count


# ---- the same again


def test_resume_is_exact(data, tmp_path, no_curves):
    more = {"val": "03", "val_every": 2, "steps": 7}
    whole = train(data, tmp_path / "whole", **more)
    part = train(data, tmp_path / "part", stop_at=3, **more)
    train(data, part, resume="auto", **more)
    assert_same(whole, part)
    assert metrics(whole) == metrics(part)
    train(data, part, resume="auto", **more)  # a finished run stays as it is
    assert_same(whole, part)


def test_sigterm_saves_and_the_run_goes_on_from_there(data, tmp_path, monkeypatch, no_curves, capsys):
    whole, calls = train(data, tmp_path / "whole"), []
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "should_stop", lambda r: calls.append(r) or len(calls) > 3 and setattr(r, "stop_asked", True) is None
        )
        part = train(data, tmp_path / "part")
    assert "SIGTERM: saved step 3" in capsys.readouterr().out
    train(data, part, resume="auto")
    assert_same(whole, part)


def test_workers_do_not_change_numbers(data, tmp_path, no_curves):
    assert_same(train(data, tmp_path / "a", steps=3), train(data, tmp_path / "b", steps=3, workers=2))


@pytest.mark.slow
def test_two_ranks_are_one_process_with_accum(data, tmp_path, no_curves):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, str(ROOT / "train" / "train_vessel_unet.py"), *flags(data, tmp_path / "two", batch_size=2)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    one = train(data, tmp_path / "one", batch_size=2, accum=2)
    a, b = ([row["loss"] for row in metrics(out) if "loss" in row] for out in (one, tmp_path / "two"))
    assert a == pytest.approx(b, rel=1e-4) and len(a) == 6
    w, v = (run.load_state(out / "last")["weights"] for out in (one, tmp_path / "two"))
    trained = [k for k in w if "running" not in k and "num_batches" not in k]  # statistics are each rank's own
    assert max((w[k] - v[k]).abs().max().item() for k in trained) < 1e-3


# ---- refusals


@pytest.mark.parametrize(
    "more, said",
    [
        ({"widths": "4,x"}, "--widths 4,x"),
        ({"widths": "4,0"}, "1 or more"),
        ({"lr": 0.1}, "--lr 0.1"),
        ({"steps": 0}, "--steps 0"),
        ({"ema": 1}, "--ema 1"),
        ({"contrast": 0.5}, "--contrast 0.5"),
        ({"val": "03", "overfit": 1}, "--val"),
        ({"val": "11"}, "patient '11'"),
        ({"stop_at": -1}, "--stop-at -1"),
        ({"data": "nowhere"}, "nowhere"),
        ({"init": "nowhere"}, "not a checkpoint folder"),
        ({"dtype": "fp16"}, "half precision needs a GPU"),
    ],
    ids=str,
)
def test_flags_that_no_run_can_have(data, tmp_path, capsys, more, said):
    assert said in refused(capsys, data, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_a_continuation_with_other_flags_is_refused(data, trained, tmp_path, capsys):
    more = {"steps": 80, "val": "03", "val_every": 40, "ema": 0.9, "resume": trained / "last"}
    assert "--cldice 0.0" in refused(capsys, data, trained, **more, cldice=0.5)
    assert "--widths 4,8,16" in refused(capsys, data, trained, **more | {"widths": "4,8,16"})
    assert "holds another run" in refused(capsys, data, trained)


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, capsys, monkeypatch):
    module = script("train/train_vessel_unet.py")
    losses, calls = module.vessel_losses, []

    def second_is_nan(*args):
        calls.append(args)
        return {k: v * (math.nan if len(calls) == 2 else 1) for k, v in losses(*args).items()}

    monkeypatch.setattr(module, "vessel_losses", second_is_nan)
    assert "step 2: loss is nan" in refused(capsys, data, tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()


def test_a_damaged_training_mask_is_named(data, tmp_path, capsys):
    write_chase(tmp_path / "root", [1, 11])
    (tmp_path / "root" / "labels1" / "Image_01R_1stHO.png").write_bytes(b"no picture")
    assert "Image_01R_1stHO.png" in refused(capsys, tmp_path / "root", tmp_path / "run")


def test_config_of_the_checkpoint_is_plain_json(trained):
    config = json.loads((trained / "last" / "config.json").read_text())
    assert config["model"] == "vessel_unet" and config["widths"] == [4, 8] and 0 < config["threshold"] < 1
    assert {"commit", "torch", "command"} <= set(config["made_by"])
