"""train/train_fastsam2.py on rendered shapes: all tasks, exact resume, two ranks, what is missing, bad input."""

import functools
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.moving_shapes import CLASSES, MovingShapes
from data.segment_batch import Prompts, SegmentCollate, SegmentItems, View
from models.fastsam2 import FastSAM2, FastSAM2Config
from models.segment_training import add_clicks
from utils import run

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["panoptic", "instance", "semantic", "interactive", "referring"]


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(out: Path, /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced; a list gives several words."""
    options = {"out": out, "device": "cpu", "backbone": "resnet18", "dim": 16, "queries": 6, "size": "32x32"}
    options |= {"batch_size": 2, "steps": 6, "print_every": 1, "val_items": 2, "points": 64, "prompts": 3, "lr": "1e-3"}
    words = []
    for name, value in (options | more).items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def train(out: Path, /, **more) -> Path:
    assert run.cli(script("train/train_fastsam2.py").main, flags(out, **more)) == 0
    return out


def metrics(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in run.read_metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last" / "model.safetensors")


def test_every_task_is_trained_and_validated(tmp_path):
    out = train(tmp_path / "run", steps=14, val_every=14, seed=1)
    rows = metrics(out)
    seen = {k.removesuffix(" loss") for row in rows for k in row if k.endswith(" loss")}
    assert seen == {"panoptic", "interactive", "referring"}, "instance and semantic contradict panoptic"
    assert all(math.isfinite(v) for row in rows for k, v in row.items() if k.endswith(" loss"))
    assert {"panoptic PQ", "instance AP", "semantic mIoU", "interactive IoU", "referring right"} <= set(rows[-1])
    assert (out / "val.png").stat().st_size > 1000 and (out / "curves.png").stat().st_size > 1000
    cfg = FastSAM2.from_checkpoint(out / "last").cfg
    about = run.read_config(out / "last")["data"]
    assert about == {"category_ids": list(range(1, 9)), "image_size": [32, 32]}, "what prediction needs"
    assert cfg.classes == CLASSES and cfg.is_thing == [True] * 4 + [False] * 4 and cfg.text == "hash"


@pytest.mark.parametrize("task", TASKS)
def test_no_parameter_is_without_gradient(tmp_path, monkeypatch, task):
    """DDP with other tasks on other ranks hangs or fails otherwise."""
    module, without = script("train/train_fastsam2.py"), []
    clip = torch.nn.utils.clip_grad_norm_

    def looked_at(parameters, limit):
        parameters = list(parameters)
        without.extend(i for i, p in enumerate(parameters) if p.requires_grad and p.grad is None)
        return clip(parameters, limit)

    monkeypatch.setattr(module.torch.nn.utils, "clip_grad_norm_", looked_at)
    train(tmp_path / "run", tasks=[task], steps=1, val_items=1)
    assert without == []


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "accum": 2, "own_tasks": True}], ids=str)
def test_resume_is_exact(tmp_path, more):
    more = {"steps": 3, "val_items": 1, **more}
    whole = train(tmp_path / "whole", **more)
    part = train(tmp_path / "part", stop_at=2, **more)
    train(part, resume="auto", **more)
    a, b = weights(whole), weights(part)
    assert all(torch.equal(a[k], b[k]) for k in a)
    states = [torch.load(out / "last" / "state.pt", weights_only=True) for out in (whole, part)]
    if "ema" in more:
        assert all(torch.equal(v, states[1]["trained"][k]) for k, v in states[0]["trained"].items())
        name = next(k for k, v in a.items() if v.ndim > 1)
        assert not torch.equal(a[name], states[0]["trained"][name]), "what is saved are the averaged weights"
    losses = [[row for row in metrics(out) if "lr" in row] for out in (whole, part)]
    assert losses[0] == losses[1]


def test_init_takes_weights_and_keeps_the_classes_of_the_data(tmp_path, monkeypatch):
    """And a run that was killed before its first checkpoint begins anew with --resume auto."""
    first = train(tmp_path / "first", steps=1, val_items=1, tasks=["panoptic"])
    monkeypatch.setattr(MovingShapes, "classes", [f"new {name}" for name in CLASSES])
    out = tmp_path / "second"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    more = {"steps": 1, "val_items": 1, "tasks": ["panoptic"], "lr": "1e-12", "resume": "auto"}
    train(out, init=first / "last", **more)
    a, b = weights(first), weights(out)
    name = next(k for k, v in a.items() if k.startswith("neck.") and v.ndim > 1)
    torch.testing.assert_close(a[name], b[name])
    assert not torch.allclose(a["head.classifier"], b["head.classifier"])
    assert FastSAM2.from_checkpoint(out / "last").cfg.classes[0] == "new circle"


def test_clicks_go_where_the_mask_is_wrong():
    items = SegmentItems(MovingShapes(8, 0, 64), "interactive", View(64, 64), Prompts(number=4), 0)
    batch = SegmentCollate()([items[i] for i in range(2)])
    torch.manual_seed(0)
    model = FastSAM2(FastSAM2Config(backbone="resnet18", dim=16, queries=4, hidden=32, embed_dim=8))
    more = add_clicks(model.train(), batch, 2, torch.float32)
    assert model.training and batch["points"][0].shape[1] == 2, "the batch itself stays as it was"
    for b, target in enumerate(batch["masks"]):
        assert more["points"][b].shape == (len(target), 4, 2)
        for q, mask in enumerate(target):
            for (x, y), label in zip(more["points"][b][q, 2:].tolist(), more["point_labels"][b][q, 2:], strict=True):
                assert label == -1 or bool(mask[int(y), int(x)]) == bool(label == 1)


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_two_ranks_are_one_process_with_accum(tmp_path, own):
    """Also with other tasks on the two ranks; batch norm keeps each rank's own statistics, so it is left out."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"steps": 4, "lr": "1e-4", **({"own_tasks": True} if own else {})}
    words = [*launcher, str(ROOT / "train" / "train_fastsam2.py"), *flags(tmp_path / "two", **more)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    one = train(tmp_path / "one", accum=2, **more)
    a, b = weights(one), weights(tmp_path / "two")
    trained = [k for k in a if "running" not in k and "num_batches" not in k]
    assert max((a[k] - b[k]).abs().max().item() for k in trained) < 1e-3


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys):
    cases = [
        ({"data": ["panoptic=no.json", "sa1b=nowhere", "coco"]}, "3 of 3 cannot be used"),
        ({"data": ["shapes=x"]}, "expected shapes, shape-clips, or FORMAT=PATH"),
        ({"share": ["panoptic"]}, "--share panoptic"),
        ({"share": ["panoptic=0"]}, "--share panoptic=0"),
        ({"size": "32"}, "--size 32"),
        ({"size": "16x32"}, "at least 32"),
        ({"ema": 1}, "--ema"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"stop_at": -1}, "--stop-at -1"),
        ({"imagenet": tmp_path / "no.pth"}, "no.pth"),
        ({"clip": tmp_path / "no"}, "no"),
    ]
    for more, expected in cases:
        out = tmp_path / "run"
        capsys.readouterr()
        assert run.cli(script("train/train_fastsam2.py").main, flags(out, **more)) == 2, more
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and expected in said and "\n" not in said, (more, said)
        assert not out.exists() or not list(out.iterdir()), more


def test_overfit_sees_the_same_pictures_again_and_again(tmp_path, monkeypatch):
    """The first N, whole and unchanged, in training and in validation."""
    module, seen = script("train/train_fastsam2.py"), set()
    losses = module.batch_losses

    def looked_at(net, batch, *rest):
        seen.update(int(image.long().sum()) for image in batch["image"])
        return losses(net, batch, *rest)

    monkeypatch.setattr(module, "batch_losses", looked_at)
    out = train(tmp_path / "run", tasks=["panoptic"], steps=4, overfit=2, logit_scale="16", temperature="1")
    assert len(seen) == 2
    cfg = FastSAM2.from_checkpoint(out / "last").cfg
    assert (cfg.logit_scale, cfg.temperature) == (16, 1)
    for wrong, match in (({"overfit": 2, "val_data": ["shapes"]}, "--val-data"), ({"scale": [2, 1]}, "LOW <= HIGH")):
        with pytest.raises(run.UserError, match=match):
            module.main(flags(tmp_path / "other", **wrong))
