"""train/train_esam.py on rendered rooms: routes, stages, transfer, exact resume, presets, freezing, what is refused.

Also models/esam_training.py, models/scene_validation.py, data/esam_items.py and utils/evaluation_rows.py by hand.
"""

import csv
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.esam_items import ViewItems, index_items, room_items
from data.rgbd_clips import RoomClips
from data.rgbd_frames import Augmentation
from data.rooms import CLASSES
from data.scannet_samples import write_npz, write_points
from models.bifusion import random_patch_weights
from models.esam import ESAM, ESAMConfig
from models.esam_training import freeze, initialise, make_groups, unet_stage
from models.instance_merge import Objects
from models.res16unet import Res16UNet, Res16UNetConfig
from models.scene_segmenter import SceneResult
from models.scene_validation import SceneScores, compare_picture, evaluate
from utils import run
from utils.evaluation_rows import COLUMNS, sweep_result, write_evaluations
from utils.posed_views import View, ViewLabels

ROOT = Path(__file__).resolve().parents[1]
TINY = {"planes": (8,) * 8, "layers": (1,) * 8, "stem": 8}
SIZES = {"voxel": 0.1, "dim": 16, "heads": 8, "ffn": 16, "merge_hidden": 16}


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("train_esam", ROOT / "train" / "train_esam.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(out: Path, /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced, None: left out; a list gives several words."""
    options = {"out": out, "device": "cpu", "planes": "8,8,8,8,8,8,8,8", "layers": "1,1,1,1,1,1,1,1", "dim": 16,
               "ffn": 16, "voxel": 0.1, "points": 400, "room_size": "48x64", "room_superpoints": "exact", "frames": 2,
               "min_points": 10, "batch_size": 2, "steps": 3, "warmup": 1, "lr": "1e-3", "print_every": 1,
               "val_items": 2, "val_every": 100}  # fmt: skip
    words = []
    for name, value in (options | more).items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [] if value is None else [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def train(out: Path, /, curves: bool = False, **more) -> Path:
    """curves: the picture of them takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr(script(), "curves", lambda *_: None)
        assert run.cli(script().main, flags(out, **more)) == 0
    return out


def later(out: Path, /, **more) -> Path:
    """A run that takes the sizes of the network from --init."""
    return train(out, **{"planes": None, "layers": None, "dim": None, "ffn": None, "voxel": None} | more)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last" / "model.safetensors")


def network(route: str = "3d", stage: str = "sv", classes=CLASSES, **more) -> ESAM:
    torch.manual_seed(0)
    sizes = {"backbone": Res16UNetConfig(**TINY)} | SIZES | more
    model = ESAM(ESAMConfig(classes, route=route, stage=stage, **sizes))
    if model.bi_encoder is not None:
        random_patch_weights(model.bi_encoder.image, 0)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of single views."""
    return train(tmp_path_factory.mktemp("esam") / "sv", curves=True, swa=0.5, seed=3)


# ---- runs


def test_single_views_and_what_a_run_leaves(trained):
    rows = list(csv.DictReader(open(trained / "metrics.csv", encoding="utf-8")))
    assert list(rows[0]) == COLUMNS and [row["classes"] for row in rows] == ["classes", "agnostic"]
    first = rows[0]
    assert (first["route"], first["stage"], first["iter"], first["split"], first["n_scenes"]) == (
        "3d", "sv", "3", "val", "2"
    )  # fmt: skip
    assert all(math.isnan(float(row[k])) or 0 <= float(row[k]) <= 1 for row in rows for k in COLUMNS[7:16])
    assert float(first["iter_time_s"]) > float(first["data_time_s"]) > 0 and float(first["s_per_frame"]) > 0
    seen = {k for row in run.read_metrics(trained) for k in row}
    losses = {f"{k} loss" for k in ("class", "mask", "dice", "semantic")}
    assert losses | {"loss", "lr", "grad", "AP50", "agnostic_AP50"} <= seen
    assert not {"box loss", "merge loss"} & seen, "no boxes and no merging in single views"
    assert all((trained / name).stat().st_size > 1000 for name in ("val.png", "curves.png"))
    model = ESAM.from_checkpoint(trained / "last")
    assert model.cfg.classes == CLASSES and model.cfg.backbone.planes == (8,) * 8 and model.cfg.voxel == 0.1
    state = run.load_state(trained / "last")
    assert any(not torch.equal(v, weights(trained)[k]) for k, v in state["trained"].items()), "averages are saved"


def test_from_stage_to_stage_and_route_to_route(trained, tmp_path, capsys):
    mv = later(tmp_path / "mv", stage="mv", init=trained / "last", batch_size=1, steps=2, lr="1e-8")
    said = capsys.readouterr().out
    assert "tensors copied: backbone" in said and "left as they are: memory" in said and "merge_head" in said
    old, new = weights(trained), weights(mv)
    kernels = [k for k in old if k.endswith("kernel") or k.startswith("decoder.out_cls")]
    assert len(kernels) > 20 and all(torch.allclose(new[k], old[k], atol=1e-6) for k in kernels)
    row = run.read_metrics(mv)[0]
    assert {"box loss", "merge loss"} <= set(row) and row["merge loss"] > 0
    tsa = later(tmp_path / "tsa", route="3dtsa", stage="mv", init=mv / "last", batch_size=1, steps=2)
    assert "not in the source, left as they are: neck" in capsys.readouterr().out
    bif = later(tmp_path / "bif", route="bif", stage="mv", init=tsa / "last", clip="random", batch_size=1, steps=2)
    said = capsys.readouterr().out
    assert "left as they are: bi_encoder" in said and "gate_mean" in said
    assert weights(bif)["bi_encoder.image.conv1_weight"].isfinite().all()
    rows = list(csv.DictReader(open(bif / "metrics.csv", encoding="utf-8")))
    assert float(rows[0]["fallback_count"]) == 0 and 0 < float(rows[0]["gate_mean"]) < 1
    again = later(tmp_path / "again", route="bif", init=bif / "last", steps=2, unfreeze=[], freeze_bn=True)
    a, b = weights(bif), weights(again)  # a step back to single views is a transfer as well
    backbone = [k for k in b if k.startswith("backbone.")]
    assert all(torch.equal(a[k], b[k]) for k in backbone), "frozen: weights and statistics"
    assert any(not torch.equal(a[k], b[k]) for k in b if k.startswith("decoder."))


@pytest.mark.parametrize("more", [{}, {"stage": "mv", "batch_size": 1, "accum": 2, "swa": 0.7}], ids=str)
def test_resume_is_exact(tmp_path, more):
    more = {"val_items": 1, "route": "3dtsa", **more}
    whole = train(tmp_path / "whole", **more)
    part = train(tmp_path / "part", stop_at=2, **more)
    train(part, resume="auto", **more)
    a, b = weights(whole), weights(part)
    assert all(torch.equal(a[k], b[k]) for k in a)
    states = [run.load_state(out / "last")["optimizer"]["state"] for out in (whole, part)]
    assert all(torch.equal(v["exp_avg"], states[1][k]["exp_avg"]) for k, v in states[0].items())
    losses = [[row["loss"] for row in run.read_metrics(out) if "loss" in row] for out in (whole, part)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    tables = [list(csv.DictReader(open(out / "metrics.csv", encoding="utf-8"))) for out in (whole, part)]
    assert [len(t) for t in tables] == [2, 2] and tables[0][0]["AP"] == tables[1][0]["AP"]


def test_the_same_frames_again_and_again(tmp_path, monkeypatch):
    module, seen = script(), set()
    losses = module.clip_loss

    def looked_at(outputs, clips, labels, criterion):
        assert all(view.queries is None for clip in clips for view in clip), "all superpoints ask"
        seen.update(tuple(view.pose.flatten().tolist()) for clip in clips for view in clip)
        return losses(outputs, clips, labels, criterion)

    monkeypatch.setattr(module, "clip_loss", looked_at)
    out = train(tmp_path / "run", overfit=1, batch_size=1)
    assert len(seen) < 4, "the pose follows the mean of the points, which are drawn anew; the frame is one"
    assert list(csv.DictReader(open(out / "metrics.csv", encoding="utf-8")))[0]["split"] == "train"


def test_sweep_of_the_rate(tmp_path, capsys):
    train(tmp_path / "run", lr_sweep=["1e-5", "1e-2"], steps=5, warmup=100)
    assert "fell fastest at rate" in capsys.readouterr().out
    rates = [row["lr"] for row in run.read_metrics(tmp_path / "run")]
    assert rates == pytest.approx(np.geomspace(1e-5, 1e-2, 5).tolist())
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.slow
def test_two_ranks_are_one_process_with_accum(tmp_path):
    """Batch norm keeps each rank's own statistics, so these are left out."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"stage": "mv", "steps": 3, "lr": "1e-4", "dice_scale": "unit"}
    words = [*launcher, str(ROOT / "train" / "train_esam.py"), *flags(tmp_path / "two", **more)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    a, b = weights(train(tmp_path / "one", accum=2, **more)), weights(tmp_path / "two")
    learned = [k for k in a if "running" not in k and "num_batches" not in k]
    assert max((a[k] - b[k]).abs().max().item() for k in learned) < 1e-3


def test_bad_input_is_one_sentence_and_writes_nothing(trained, tmp_path, capsys):
    cases = [
        ({"data": "no.json"}, "no.json: no such index"),
        ({"epochs": 2}, "--steps and --epochs"),
        ({"steps": 0}, "--steps 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"frames": 1}, "--frames 1: expected 2.."),
        ({"planes": "8,8"}, "--planes 8,8: expected 8"),
        ({"dim": 20}, "multiple of heads"),
        ({"route": "bif"}, "--clip FOLDER, or random"),
        ({"route": "bif", "init": trained / "last"}, "brings no patch convolution"),
        ({"route": "bif", "clip": tmp_path / "no"}, "no"),
        ({"freeze_bn": True}, "--freeze-bn"),
        ({"sync_bn": True}, "--sync-bn"),
        ({"warmup": 3}, "--warmup 3: is all of 3 steps"),
        ({"lr_sweep": ["1e-2", "1e-3"]}, "0 < LOW < HIGH"),
        ({"overfit": 1, "val_data": "x.json"}, "leave --val-data out"),
        ({"init": trained / "last", "dim": 24}, "is (16, 8), not (24, 8)"),
        ({"init": tmp_path / "no"}, "not a checkpoint folder"),
        ({"stop_at": -1}, "--stop-at -1"),
        ({"room_size": "8x64"}, "at least 16"),
        ({"resume": trained / "last", "seed": 4, "swa": 0.5}, "that run had --seed 3"),
        ({"memory_levels": "0,x"}, "--memory-levels 0,x"),
    ]
    for more, expected in cases:
        capsys.readouterr()
        out = tmp_path / "run"
        assert run.cli(script().main, flags(out, **more)) == 2, more
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and expected in said and "\n" not in said, (more, said)
        assert not out.exists() or not list(out.iterdir()), more
    assert run.cli(script().main, flags(trained)) == 2 and "holds another run" in capsys.readouterr().err


# ---- presets, rates, groups, freezing


def settled(*words: str) -> Namespace:
    args = script().parse_args(list(words))
    script().settle(args)
    return args


def test_presets_are_the_tables():
    names = ("lr", "weight_decay", "schedule", "warmup", "epochs", "batch_size", "clip_grad")
    expected = {
        ("esam", "3d", "sv"): (1e-4, 0.05, "poly", 0, 128, 16, 10),
        ("esam", "bif", "mv"): (1e-4, 0.05, "poly", 0, 128, 4, 10),
        ("seed", "3d", "sv"): (6e-4, 0.01, "cosine", 1000, 128, 16, 10),
        ("seed", "3dtsa", "mv"): (6e-4, 0.01, "cosine", 1000, 128, 8, 10),
        ("seed", "bif", "sv"): (5e-4, 0.01, "cosine", 2000, 160, 8, 10),
        ("seed", "bif", "mv"): (5e-4, 0.01, "cosine", 2000, 160, 4, 10),
    }  # fmt: skip
    for (preset, route, stage), values in expected.items():
        args = settled("--preset", preset, "--route", route, "--stage", stage, "--clip", "random")
        assert tuple(getattr(args, name) for name in names) == values, (preset, route, stage)
    args = settled("--steps", "5", "--lr", "0.001", "--warmup", "0")
    assert (args.epochs, args.lr, args.warmup, args.weight_decay) == (None, 0.001, 0, 0.01)
    assert settled().preset == "seed"


def test_poly_falls_by_epochs_to_nothing():
    """Figures of a published log: epochs 17, 127 and 128 of 128, counted from 1."""
    args = Namespace(lr_sweep=None, schedule="poly", lr=1e-4, steps=128 * 10)
    rates = {e: script().rate(args, 10 * (e - 1) + 3, 10) for e in (1, 17, 127, 128)}
    assert rates == {1: 1e-4, 17: pytest.approx(8.8586e-5, rel=1e-4), 127: pytest.approx(1.278e-6, rel=1e-3), 128: 0}
    assert script().rate(Namespace(lr_sweep=None, schedule="poly", lr=1e-4, steps=5), 2, 10) == 1e-4  # one epoch


def test_what_decays_and_whose_rate_is_scaled():
    model = network("bif", "mv", tsa_stages=(3,))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_groups(model, 0.05, backbone=0.1, pos_embed=1.0)
    found = {names[id(p)]: (g["factor"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(found) == set(names.values()) and sum(len(g["params"]) for g in groups) == len(found)
    embeds = [n for n in found if n.endswith("pos_embed")]
    assert len(embeds) == 3 and all(found[n] == (1.0, 0.0) for n in embeds), "no decay and no scaling"
    for name, p in model.named_parameters():
        if name in embeds:
            continue
        plain = p.ndim < 2
        assert found[name] == (0.1 if name.startswith("backbone.") else 1.0, 0.0 if plain else 0.05), name
    assert found["backbone.bn0.bn.weight"][1] == 0 and found["backbone.conv0p1s1.kernel"] == (0.1, 0.05)
    assert make_groups(model, 0.05, 0.1, 0.5)[1]["factor"] in (0.1, 0.5, 1.0)
    assert {g["factor"] for g in make_groups(model, 0.05, 0.1, 0.5) if g["weight_decay"] == 0} == {0.1, 0.5, 1.0}


def test_partial_unfreezing():
    model = network()
    stages = {name: unet_stage(name) for name, _ in model.backbone.named_children()}
    assert sorted(stages.values()) == sorted([0, 0, *(3 * list(range(1, 9)))])
    assert (
        stages["conv3p4s2"] == stages["block3"] == 3 and stages["convtr4p16s2"] == stages["bntr4"] == stages["block5"]
    )
    still = freeze(model, [7, 8])
    learning = {n.split(".")[0] for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert learning == {"convtr6p4s2", "bntr6", "block7", "convtr7p2s2", "bntr7", "block8"}
    assert {id(m) for m in still} == {id(m) for n, m in model.backbone.named_children() if stages[n] < 7}
    assert all(p.requires_grad for p in model.decoder.parameters())
    assert not freeze(network()) and len(freeze(network(), None, True)) == 9 + 2 * 8 + 4  # batch norms


def test_initialise_takes_a_backbone_alone_and_refuses_what_is_not_one(tmp_path, trained):
    torch.manual_seed(5)
    backbone = Res16UNet(Res16UNetConfig(**TINY))
    run.save_checkpoint(tmp_path / "unet", 0, backbone, backbone.config_dict(), {})
    model = network()
    said = initialise(model, tmp_path / "unet" / "last")
    assert "tensors copied: backbone" in said[0] and torch.equal(
        model.backbone.conv0p1s1.kernel, backbone.conv0p1s1.kernel
    )
    out = train(tmp_path / "run", init=tmp_path / "unet" / "last", steps=2, planes=None, layers=None, val_items=1)
    assert ESAM.from_checkpoint(out / "last").cfg.backbone == backbone.cfg
    fewer = network(classes=("wall", "floor", "thing"), backbone=ESAM.from_checkpoint(trained / "last").cfg.backbone)
    said = initialise(fewer, trained / "last")
    assert "of other classes; these are new: decoder.out_cls.2." in said[-1] and "decoder.out_sem.bias" in said[-1]
    with pytest.raises(run.UserError, match="use weights of the same sizes"):
        initialise(network(dim=24), trained / "last")
    config = json.loads((trained / "last" / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"model": "Another"}))
    (other / "model.safetensors").write_bytes((trained / "last" / "model.safetensors").read_bytes())
    assert run.cli(script().main, flags(tmp_path / "no", init=other)) == 2


# ---- tables


def test_rows_after_the_step_give_way(tmp_path):
    path = tmp_path / "metrics.csv"
    write_evaluations(path, 10, [{"iter": 10, "AP": 0.1}])
    write_evaluations(path, 20, [{"iter": 20, "AP": 0.2}])
    write_evaluations(path, 20, [{"iter": 20, "AP": 0.3}, {"iter": 20, "AP": 0.4}])
    assert [row["AP"] for row in csv.DictReader(open(path, encoding="utf-8"))] == ["0.1", "0.3", "0.4"]
    write_evaluations(path, 5, [{"iter": 5, "AP": 0.5}])
    assert [row["AP"] for row in csv.DictReader(open(path, encoding="utf-8"))] == ["0.5"]


def test_a_sweep_by_hand():
    rates = np.geomspace(1e-5, 1e-1, 41)
    losses = np.interp(np.log10(rates), [-5, -3.5, -2.5, -2, -1], [5, 4.9, 2, 2.1, 9])
    said = sweep_result(rates.tolist(), losses.tolist())
    fastest, lowest = (float(word) for word in said.replace("at", "").split() if "e-" in word or word[0].isdigit())
    assert 1e-4 < fastest < 4e-3 and 2e-3 < lowest < 5e-3
    assert "too few" in sweep_result([1e-3, 1e-2], [1.0, 2.0])


# ---- scores


def result(masks: np.ndarray, labels: list[int], scores: list[float], semantic: np.ndarray) -> SceneResult:
    n, M = masks.shape
    objects = Objects(torch.arange(n), torch.tensor(labels, dtype=torch.int64), torch.ones(n, dtype=torch.int64),
                      torch.tensor(scores), *(torch.zeros(n, k) for k in (0, 6, 4, 7)))  # fmt: skip
    points = np.random.default_rng(0).uniform(0, 2, (M, 3)).astype(np.float32)
    return SceneResult(objects, masks, points, semantic, np.full((M, 3), 0.5, np.float32))


def labelled(instance: list[int], classes: list[int], C: int) -> ViewLabels:
    """Points of instance -1 are wall."""
    ids, kinds = torch.tensor(instance), torch.tensor(classes)
    semantic = torch.where(ids >= 0, kinds[ids], 0)
    return ViewLabels(ids, semantic, kinds, torch.zeros(len(classes), 6))


def test_scores_by_hand():
    """Two frames of 30 points: a box (class 2) in both, a ball (3) of 10 points in the second, and 5 points of a drum
    (4), too few to count where least is 10."""
    views = [
        labelled([0] * 20 + [-1] * 10, [2, 3, 4], 5),
        labelled([0] * 5 + [1] * 10 + [2] * 5 + [-1] * 10, [2, 3, 4], 5),
    ]
    truth = torch.cat([x.instance for x in views]).numpy()
    semantic = torch.cat([x.semantic for x in views]).numpy()
    masks = truth == np.array([[0], [1]])
    scores = SceneScores(5, 2, least=10)
    scores.add(result(masks, [0, 1], [0.9, 0.8], semantic), views)
    found = scores.score()
    assert [found[k]["AP"] for k in ("classes", "agnostic")] == [1, 1] and found["classes"]["mIoU"] == 1
    assert found["classes"]["mPrec"] == 1 and found["agnostic"]["mPrec"] == 1
    assert found["agnostic"]["mCov"] == pytest.approx(2 / 3), "coverage knows no smallest instance: the drum is missed"
    swapped = SceneScores(5, 2, least=10)
    swapped.add(result(masks, [1, 0], [0.9, 0.8], semantic), views)
    found = swapped.score()
    assert found["classes"]["AP"] == 0 and found["agnostic"]["AP"] == 1, "right things, wrong classes"
    half = SceneScores(5, 2, least=10)
    half.add(result(masks[:1], [0], [0.9], semantic), views)
    assert half.score()["classes"]["AP50"] == 0.5 and half.score()["agnostic"]["AP50"] == pytest.approx(0.5)
    strict = SceneScores(5, 2)  # ScanNet's 100 points: nothing here is an instance
    strict.add(result(masks, [0, 1], [0.9, 0.8], semantic), views)
    assert math.isnan(strict.score()["classes"]["AP"])
    wrong = SceneScores(5, 2, least=10)
    wrong.add(result(masks[:0], [], [], np.zeros(60, int)), views)
    assert wrong.score()["classes"]["AP"] == 0 and wrong.score()["classes"]["mIoU"] < 0.2
    with pytest.raises(ValueError, match="30 labels, 60 predicted"):
        scores.add(result(masks, [0, 1], [0.9, 0.8], semantic), views[:1])
    with pytest.raises(ValueError, match="least 30: expected one of"):
        SceneScores(5, 2, least=30)


class Oracle:
    """Answers with the labels: what evaluation is told to be right must get the highest scores."""

    training = False

    def __init__(self, cfg: ESAMConfig, labels: list[ViewLabels]):
        self.cfg, self.labels, self.at = cfg, labels, 0

    def eval(self):
        return self

    def parameters(self):
        return iter([torch.zeros(1)])

    def step(self, views, state):
        (view,), own = views, self.labels[self.at % len(self.labels)]
        self.at += 1
        S, K, G = int(view.superpoint.max()) + 1, len(self.cfg.classes) - 2, len(own.classes)
        first = torch.stack([own.instance[view.superpoint == s][0] for s in range(S)])
        cls = torch.full((S, K + 1), -20.0)
        asks = {int(g): int((first == g).nonzero()[0]) for g in first.unique() if g >= 0}
        masks, vectors = torch.full((S, len(view)), -20.0), torch.zeros(S, G)
        boxes = torch.zeros(S, 6)
        cls[:, K] = 20
        for g, q in asks.items():
            cls[q, own.classes[g] - 2], cls[q, K] = 20, -20
            masks[q, own.instance == g], vectors[q, g] = 20, 1
            low, high = own.boxes[g].split(3)
            boxes[q] = torch.cat([(low + high) / 2, high - low])
        kinds = torch.stack([own.semantic[view.superpoint == s][0] for s in range(S)])
        sem = torch.nn.functional.one_hot(kinds, len(self.cfg.classes) + 1).float()
        stage = Namespace(cls=[cls], masks=[masks], boxes=[boxes] if self.cfg.stage == "mv" else None, level="P")
        return Namespace(stages=[stage], sem=[sem], queries=[torch.zeros(S, 4)], figures={},
                         centres=[torch.zeros(S, 3)],
                         vectors=[vectors] if self.cfg.stage == "mv" else None), state  # fmt: skip


@pytest.mark.parametrize("stage", ["sv", "mv"])
def test_an_oracle_gets_everything(stage):
    _, val, classes = room_items(1, 1, 1 if stage == "sv" else 3, 800, 5, Augmentation(), False, exact=True)
    views, labels = val[0]
    model, pictures = Oracle(ESAMConfig(classes, stage=stage), labels), []
    scores, n, seconds = evaluate(
        model, [(views, labels)], 10, shown=lambda *x: pictures.append(compare_picture(*x[1:]))
    )
    assert n == 1 and seconds > 0
    assert scores["classes"]["AP"] == 1 and scores["agnostic"]["AP"] == 1, "merged online: one object through the clip"
    assert scores["classes"]["mIoU"] > 0.99  # unlabelled ceiling excepted
    assert pictures[0].ndim == 3 and pictures[0].dtype == np.uint8 and pictures[0].shape[1] > 600
    agnostic = Oracle(ESAMConfig(classes, stage=stage, agnostic=True), labels)
    assert set(evaluate(agnostic, [(views, labels)], 10)[0]) == {"agnostic"}


# ---- items


def test_items_of_rooms_are_functions_of_seed_epoch_and_number():
    one, val, classes = room_items(4, 2, 1, 300, 7, Augmentation(), True, exact=True, size=(48, 64))
    a, b, c = one[2, 1], one[2, 1], one[3, 1]
    assert torch.equal(a[0][0].coords, b[0][0].coords) and torch.equal(a[0][0].queries, b[0][0].queries)
    assert not torch.equal(a[0][0].coords, c[0][0].coords)
    assert a[0][0].picture.shape == (3, 48, 64) and isinstance(a[1][0], ViewLabels)
    assert classes == CLASSES and len(val) == 2 and val[0][0][0].queries is None
    with pytest.raises(IndexError):
        val[2]
    assert not torch.equal(val[0][0][0].pose, one.clips[0, 0] and val[1][0][0].pose)
    same, again, _ = room_items(4, 2, 1, 300, 7, Augmentation(), False, overfit=1, exact=True, size=(48, 64))
    assert same is again and len(same) == 1 and same[0][0][0].picture is None


def write_index(folder: Path, stage: str, classes=CLASSES) -> Path:
    """Two prepared scenes of two frames, as data/prepare_scannet.py would leave them."""
    rows = []
    for k in range(2):
        clip = RoomClips(2, 0, clip_len=2, points=500, exact=True, size=(48, 64))[k]
        names = [f"frames/{clip.scene}/{t}.npz" for t in range(2)]
        for name, frame in zip(names, clip.frames, strict=True):
            frame.superpoint = np.unique(frame.superpoint, return_inverse=True)[1]
            write_points(folder / name, frame)
        first, images = clip.frames[0], [f"2D/{clip.scene}/color/{t}.jpg" for t in range(2)]
        scan = {"xyz": first.xyz, "colour": first.colour, "instance": first.instance, "semantic": first.semantic,
                "segment": first.superpoint, "axis_align": np.eye(4)}  # fmt: skip
        if stage == "mv":
            both = [
                np.concatenate([getattr(f, n) for f in clip.frames]) for n in ("xyz", "colour", "instance", "semantic")
            ]
            scan |= dict(zip(("xyz", "colour", "instance", "semantic"), both, strict=True), segment=both[2])
            write_npz(folder / "scenes" / f"{clip.scene}.npz", **scan)
            rows.append({"scene": clip.scene, "frame_paths": names, "img_paths": images,
                         "scene_path": f"scenes/{clip.scene}.npz"})  # fmt: skip
        else:
            rows += [{"scene": clip.scene, "frame_path": n, "img_path": i} for n, i in zip(names, images, strict=True)]
    path = folder / f"{stage}.json"
    path.write_text(json.dumps({"metainfo": {"views": stage, "classes": list(classes)}, "data_list": rows}))
    return path


@pytest.mark.parametrize("stage", ["sv", "mv"])
def test_a_prepared_index_is_trained_on(tmp_path, capsys, stage):
    index = write_index(tmp_path, stage)
    more = {
        "data": index,
        "val_data": index,
        "stage": stage,
        "batch_size": 1,
        "steps": None,
        "epochs": 1,
        "val_items": 0,
    }
    out = train(tmp_path / "run", **more)
    rows = list(csv.DictReader(open(out / "metrics.csv", encoding="utf-8")))
    assert rows[0]["n_scenes"] == ("4" if stage == "sv" else "2") and rows[0]["iter"] == rows[0]["n_scenes"]
    wrong = flags(tmp_path / "no", **(more | {"stage": "mv" if stage == "sv" else "sv"}))
    assert run.cli(script().main, wrong) == 2 and f"was prepared with --views {stage}" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(index.read_text().replace("chair", "bench"))
    assert run.cli(script().main, flags(tmp_path / "no", **(more | {"val_data": other}))) == 2
    assert "has other classes than --data" in capsys.readouterr().err
    words = flags(tmp_path / "no", **(more | {"route": "bif", "clip": "random"}))
    assert run.cli(script().main, words) == 2 and "with --raw" in capsys.readouterr().err


def test_an_index_says_whether_features_were_packed(tmp_path):
    index = write_index(tmp_path, "sv")
    how = {"stage": "sv", "frames": 2, "points": 100, "seed": 0, "augment": Augmentation(), "pictures": False}
    items, val, classes, packed = index_items(index, None, None, **how)
    assert isinstance(items, ViewItems) and val is None and classes == CLASSES and not packed
    views, labels = items[0, 1]
    assert isinstance(views[0], View) and len(views[0]) == 100 and len(labels[0].instance) == 100
    content = json.loads(index.read_text())
    content["data_list"][0]["clip_feat_path"] = "clip_feat/x.pt"
    index.write_text(json.dumps(content))
    assert index_items(index, index, None, **how, val_length=1)[3]
