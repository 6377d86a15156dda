"""train/train_fastsam2.py on clips: vis, vps and vos beside the tasks of pictures, with and without a memory; exact
resume, two ranks, overfitting, data in their formats, scores of clips, teacher forcing."""

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
from safetensors.torch import load_file, save_file

from data.moving_shapes import CLASSES, MovingShapes
from data.segment_batch import Prompts, SegmentCollate, SegmentItems, View
from data.segment_sources import default_tasks, open_sources, read_off, vocabulary
from data.task_mixture import MixtureBatches
from data.video_clips import Clips
from models.fastsam2 import FastSAM2, FastSAM2Config
from models.segment_scores import BatchScores
from models.segment_training import batch_losses, evaluate, initial_weights, predict, prompts_of, truth_logits
from models.streaming_memory import MemoryConfig
from utils import run
from utils.masks import rle_encode

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
MEMORY = MemoryConfig(16, 8, 32)
KINDS = {  # a task of clips -> the memory that follows with it
    "vis": {},
    "vps": {"memory": MEMORY},
    "vos": {"memory": MEMORY},
    "vos, maps": {"memory": MemoryConfig(16, 8, 32, maps=1)},
    "vos, no memory": {},
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(out: Path, /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced; a list gives several words."""
    options = {"out": out, "device": "cpu", "backbone": "resnet18", "dim": 16, "queries": 6, "size": "32x32"}
    options |= {"batch_size": 4, "steps": 6, "print_every": 1, "val_items": 2, "points": 64, "prompts": 3, "lr": "1e-3"}
    options |= {"data": ["shape-clips"], "frames": 3}
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


def network(memory: MemoryConfig | None = None, pixel_classes: bool = False) -> FastSAM2:
    torch.manual_seed(0)
    sizes = {"backbone": "resnet18", "dim": 16, "queries": 6, "hidden": 32, "embed_dim": 8, "frozen_norm": False}
    return FastSAM2(
        FastSAM2Config(CLASSES, **sizes, logit_scale=16, temperature=1, memory=memory, pixel_classes=pixel_classes)
    )


def clip_batch(task: str, n: int = 2, T: int = 4, S: int = 64, late: bool = True, **more) -> dict:
    prompts = Prompts(number=4, kinds={"mask": 0.5, "box": 0.5}, late=late, least=16)
    items = SegmentItems(MovingShapes(20, 2, S, frames=T, **more), task, View(S, S), prompts)
    return SegmentCollate()([items[k] for k in range(n)])


# ---- runs


def test_clips_and_pictures_are_trained_and_validated_in_one_run(tmp_path, monkeypatch):
    module, shapes = script("train/train_fastsam2.py"), {}
    losses = module.batch_losses

    def looked_at(net, batch, *rest):
        shapes[batch["task"]] = tuple(batch["image"].shape[:-3])
        return losses(net, batch, *rest)

    monkeypatch.setattr(module, "batch_losses", looked_at)
    more = {"data": ["shapes", "shape-clips"], "memory": True, "memory_recent": 5, "batch_size": 6}
    out = train(tmp_path / "run", steps=6, seed=15, **more)
    rows = metrics(out)
    seen = {k.removesuffix(" loss") for row in rows for k in row if k.endswith(" loss")}
    assert seen == {"panoptic", "interactive", "referring", "vps", "vos"}, "vis contradicts vps"
    assert all(math.isfinite(v) for row in rows for k, v in row.items() if k.endswith(" loss"))
    assert {"panoptic PQ", "vis AP", "vis IoU", "vps VPQ", "vos J&F", "vos hidden", "score"} <= set(rows[-1])
    assert shapes == {"panoptic": (6,), "interactive": (6,), "referring": (6,), "vps": (2, 3), "vos": (2, 3)}
    for name in ("val.png", "val_vps.png", "val_vos.png"):
        assert (out / name).stat().st_size > 1000
    cfg = FastSAM2.from_checkpoint(out / "last").cfg
    assert cfg.memory == MemoryConfig(16, 8, 64, recent=5) and cfg.classes == CLASSES


def learn(kind: str, steps: int) -> tuple[FastSAM2, list[dict]]:
    """A network after some steps on the same clip, and the losses of each."""
    torch.manual_seed(0)
    model, batch = network(**KINDS[kind]).train(), clip_batch(kind.split(",")[0], 1, 3, 32, "no" not in kind)
    opt, seen = torch.optim.AdamW(model.parameters()), []
    for k in range(steps):
        torch.manual_seed(k)
        opt.param_groups[0]["lr"] = 1e-3 * (1 - k / steps)
        opt.zero_grad()
        losses, _ = batch_losses(model, batch, prompts_of(batch), None, torch.float32, 256, model.memory is not None)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        seen.append({name: value.item() for name, value in losses.items()})
    return model, seen


@each_kind
def test_no_parameter_is_without_gradient(kind):
    """DDP with other tasks on other ranks hangs or fails otherwise."""
    model, _ = learn(kind, 1)
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert any(p.grad.any() for p in model.backbone.parameters())


@pytest.mark.parametrize("kind", ["vis", "vps", "vos"])
def test_the_loss_falls(kind):
    _, seen = learn(kind, 14)
    assert all(math.isfinite(v) for losses in seen for v in losses.values())
    totals = [losses["loss"] for losses in seen]
    assert np.mean(totals[-3:]) < 0.85 * totals[0], totals


def test_overfit_shows_one_clip(tmp_path, monkeypatch):
    module, seen, shown = script("train/train_fastsam2.py"), set(), {}
    losses, check = module.batch_losses, module.evaluate

    def looked_at(net, batch, *rest):
        seen.add((int(batch["image"].long().sum()), str(batch["boxes"]), str(batch["has_mask"])))
        return losses(net, batch, *rest)

    def validated(model, loaders, *rest):
        shown.update({task: [*loader] for task, loader in loaders.items()})
        return check(model, loaders, *rest)

    monkeypatch.setattr(module, "batch_losses", looked_at)
    monkeypatch.setattr(module, "evaluate", validated)
    train(tmp_path / "run", tasks=["vos"], memory=True, overfit=1, steps=2, seed=4, clip_batch=1)
    (batch,) = shown["vos"]
    assert seen == {(int(batch["image"].long().sum()), str(batch["boxes"]), str(batch["has_mask"]))}


def test_resume_is_exact(tmp_path):
    more = {"data": ["shapes", "shape-clips"], "tasks": ["panoptic", "vis", "vos"], "memory": True, "memory_maps": 1}
    more |= {"ema": 0.9, "accum": 2, "own_tasks": True, "steps": 3, "val_items": 1, "clip_batch": 1, "seed": 1}
    whole = train(tmp_path / "whole", **more)
    part = train(tmp_path / "part", stop_at=2, **more)
    train(part, resume="auto", **more)
    a, b = weights(whole), weights(part)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    losses = [[row for row in metrics(out) if "lr" in row] for out in (whole, part)]
    assert losses[0] == losses[1]
    seen = {k for row in losses[0] for k in row if k.endswith("loss")}
    assert {"vis loss", "vos loss"} <= seen, "the test says nothing about a task that was not drawn"


@pytest.mark.slow
def test_two_ranks_are_one_process_with_accum(tmp_path):
    """With clips on one rank and pictures on the other; batch norm keeps each rank's own statistics: left out."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = {"data": ["shapes", "shape-clips"], "tasks": ["panoptic", "vis", "vos"], "memory": True, "memory_maps": 1}
    more |= {"steps": 3, "lr": "1e-4", "own_tasks": True, "val_items": 1, "clip_batch": 1, "seed": 1}
    words = [*launcher, str(ROOT / "train" / "train_fastsam2.py"), *flags(tmp_path / "two", **more)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    one = train(tmp_path / "one", accum=2, **more)
    a, b = weights(one), weights(tmp_path / "two")
    trained = [k for k in a if "running" not in k and "num_batches" not in k]
    assert max((a[k] - b[k]).abs().max().item() for k in trained) < 1e-3
    seen = {k for row in metrics(one) for k in row if k.endswith("loss")}
    assert {"vis loss", "vos loss"} <= seen


def test_init_with_and_without_a_memory(tmp_path):
    """What only one of both has stays untrained, or is left out; the classes are those of the model."""
    for theirs in (network(), network(**KINDS["vos"], pixel_classes=True)):
        with torch.no_grad():
            theirs.neck.load_state_dict({k: v + 1 for k, v in theirs.neck.state_dict().items()})
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
        for ours in (network(), network(**KINDS["vos"])):
            found, own = initial_weights(tmp_path, ours), ours.state_dict()
            assert found.keys() == own.keys()
            for name, value in found.items():
                other = theirs.state_dict().get(name)
                kept = name == "head.classifier" or other is None
                assert torch.equal(value, own[name] if kept else other), name


def test_bad_flags_are_one_sentence(tmp_path, capsys):
    cases = [
        ({"frames": 1}, "--frames 1"),
        ({"clip_stride": [3, 2]}, "--clip-stride 3 2"),
        ({"memory_recent": 2, "memory_maps": 3}, "--memory-maps 3: expected 0..2"),
        ({"data": ["davis=nowhere", "ytvis=no.json", "vipseg=no", "first-masks=no", "clips"]}, "5 of 5 cannot be used"),
        ({"data": ["shapes"], "tasks": ["vos"]}, "--tasks vos: none of the data has it"),
        ({"share": ["vos=-1"]}, "--share vos=-1"),
    ]
    for more, expected in cases:
        out = tmp_path / "run"
        assert run.cli(script("train/train_fastsam2.py").main, flags(out, **more)) == 2, more
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ") and expected in said and "\n" not in said, (more, said)
        assert not out.exists() or not list(out.iterdir()), more


# ---- data


def write_davis(root: Path, names: list[str], split: dict[str, list[str]] | None = None, T: int = 4) -> Path:
    """Sequences of two squares that move; lists of ImageSets."""
    for name in names:
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for t in range(T):
            ids = np.zeros((48, 64), np.uint8)
            ids[8 + t : 24 + t, 4:20], ids[20:40, 30 + 3 * t : 46 + 3 * t] = 1, 2
            image = np.array([[30, 90, 60], [220, 40, 40], [40, 60, 220]], np.uint8)[ids]
            Image.fromarray(image).save(root / "JPEGImages" / "480p" / name / f"{t:05d}.jpg")
            mask = Image.fromarray(ids, "P")
            mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
            mask.save(root / "Annotations" / "480p" / name / f"{t:05d}.png")
    for word, listed in (split or {}).items():
        (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "2017" / f"{word}.txt").write_text("\n".join(listed) + "\n")
    return root


def write_ytvis(root: Path) -> Path:
    """One video of a square."""
    (root / "train" / "JPEGImages" / "v").mkdir(parents=True)
    names, codes = [f"v/{t:05d}.jpg" for t in range(4)], []
    for t, name in enumerate(names):
        mask = np.zeros((48, 64), bool)
        mask[10:30, 5 + t : 25 + t] = True
        codes.append(None if t == 2 else rle_encode(mask))
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(root / "train" / "JPEGImages" / name)
    video = {"id": 1, "width": 64, "height": 48, "length": 4, "file_names": names}
    tube = {"id": 1, "video_id": 1, "category_id": 5, "iscrowd": 0, "segmentations": codes}
    content = {"videos": [video], "categories": [{"id": 5, "name": "cat"}], "annotations": [tube]}
    (root / "train.json").write_text(json.dumps(content))
    return root / "train.json"


def write_vipseg(root: Path, names: list[str], splits: dict[str, list[str]]) -> Path:
    for name in names:
        for kind in ("images", "panomasks"):
            (root / kind / name).mkdir(parents=True)
        for t in range(4):
            ids = np.full((48, 64), 1, np.uint16)
            ids[20:40, 10 : 40 + t] = 201
            Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(root / "images" / name / f"{t:08d}.jpg")
            Image.fromarray(ids).save(root / "panomasks" / name / f"{t:08d}.png")
    categories = [{"id": 0, "name": "sky", "isthing": 0}, {"id": 1, "name": "cat", "isthing": 1}]
    (root / "panoVIPSeg_categories.json").write_text(json.dumps(categories))
    for split, listed in splits.items():
        (root / f"{split}.txt").write_text("\n".join(listed))
    return root


def test_sources_of_clips_in_their_formats(tmp_path):
    """Training has the train split where there are lists, validation val; classes of all are joined."""
    davis = write_davis(tmp_path / "davis", ["a", "b", "c"], {"train": ["a", "b"], "val": ["c"]})
    vipseg = write_vipseg(tmp_path / "vipseg", ["x", "y"], {"train": ["x"], "val": ["y"]})
    specs = [f"davis={davis}", f"ytvis={write_ytvis(tmp_path / 'ytvis')}", f"vipseg={vipseg}", f"first-masks={davis}"]
    clips = Clips(3, (1, 1))
    sources = open_sources("--data", [*specs, "shape-clips"], 64, 0, clips)
    assert [s.name for s in sources] == ["davis", "ytvis", "vipseg", "first_masks", "pseudo_video", "moving_shapes"]
    assert [len(s) for s in sources] == [2, 1, 1, 3, 3, 20_000]
    assert [s.name for s in open_sources("--val-data", specs[:1], 64, 0, clips, "val")] == ["davis"]
    assert open_sources("--val-data", specs[:1], 64, 0, clips, "val")[0].names == ["c"]
    assert open_sources("--val-data", specs[2:3], 64, 0, clips, "val")[0].names == ["y"]
    for source in sources:
        frames = 0 if source.name == "first_masks" else 3
        assert source.scene(0, 0).image.ndim == 3 + bool(frames)
    assert default_tasks(sources) == ["interactive", "vps", "vos"] and read_off(["vps", "vos"]) == {"vis"}
    classes, things = vocabulary(sources)
    assert classes == ["cat", "sky", *[c for c in CLASSES if c != "sky"]] and things[:3] == [True, False, True]
    assert vocabulary(sources[:1]) == (["object"], [True]), "DAVIS names no class"


def test_a_video_is_learned_from_its_first_masks(tmp_path):
    """Pictures and clips of them; nothing else of the video is opened."""
    davis = write_davis(tmp_path / "davis", ["a", "b"])
    for path in (davis / "Annotations" / "480p").glob("*/0000[123].png"):
        path.unlink()
    more = {"data": [f"first-masks={davis}"], "memory": True, "clip_batch": 1, "overfit": 2, "seed": 1}
    rows = metrics(train(tmp_path / "run", steps=3, **more))
    assert {"interactive loss", "vos loss"} <= {k for row in rows for k in row} and "vos J&F" in rows[-1]
    assert FastSAM2.from_checkpoint(tmp_path / "run" / "last").cfg.classes == ["object"]


def test_a_data_set_has_its_own_batch_size():
    """Every item of each comes once before any comes twice, on two ranks with accum 2 as on one."""
    sizes, batch = {"a": 23, "b": 7}, {"a": 4, "b": 1}
    ranks = [[*MixtureBatches(sizes, {"a": 1, "b": 1}, batch, 0, 40, 3, k, 2, 2, same=False)] for k in range(2)]
    one = [*MixtureBatches(sizes, {"a": 1, "b": 1}, batch, 0, 40, 3, accum=4, same=False)]
    assert [ranks[k % 2][k // 2] for k in range(len(one))] == one and {len(keys) for keys in one} == {4, 1}
    for name, size in sizes.items():
        seen = [key for keys in one for key in keys if key[0] == name]
        assert len(set(seen)) == len(seen) and len({key[2] for key in seen[:size]}) == size
    with pytest.raises(ValueError, match="batch size"):
        MixtureBatches(sizes, {"a": 1, "b": 1}, {"a": 4, "b": 0}, 0, 4, 3)


@pytest.mark.parametrize("T", [3, 4, 8])
def test_short_clips_hide_things_too(T):
    """Half of them at least show something, then not at all, then again."""
    source, back = MovingShapes(40, 5, 64, frames=T), 0
    for scene in map(functools.partial(source.scene, 0), range(40)):
        seen = [np.flatnonzero((scene.masks == i).any((1, 2))) for i in scene.ids]
        back += any((np.diff(frames) > 1).any() for frames in seen)
    assert back >= 18, f"{back} of 40 clips"


# ---- teacher forcing and validation


def test_the_truth_is_given_on_the_grid_of_the_masks():
    masks = torch.zeros(2, 1, 40, 64, dtype=torch.bool)
    masks[0, 0, 8:16, 4:10] = True
    logits = truth_logits([masks, masks[:1]])
    assert logits.shape == (2, 2, 1, 16, 16), "40 px are padded to 64, as the network pads"
    want = torch.full((16, 16), -10.0)
    want[2:4, 1], want[2:4, 2] = 10, 0
    assert torch.equal(logits[0, 0, 0], want) and torch.equal(logits[1, 0, 0], want)
    assert (logits[0, 1] == -10).all() and (logits[1, 1] == -10).all(), "a free place has nothing"
    assert truth_logits([masks[:0], masks[:0]]).shape == (2, 0, 1, 16, 16)


def test_the_memory_is_taught_in_training_only(monkeypatch):
    """Each frame of each object by chance; objects are pointed at where they enter; validation follows as inference."""
    model, given = network(MEMORY), []
    follow = model.memory.follow

    def looked_at(features, decode, prompts, first, truth=None, forced=None):
        given.append((first, truth, forced))
        return follow(features, decode, prompts, first, truth, forced)

    monkeypatch.setattr(model.memory, "follow", looked_at)
    batch = clip_batch("vos", n=4, T=4, S=32)
    prompts, numbers = prompts_of(batch), [*map(len, batch["masks"])]
    assert len(set(numbers)) > 1, "so that some places are free"
    for forced in (0.5, 0.0, 1.0, None):
        predict(model.train(), batch, prompts, True, forced)
    want = torch.full((4, max(numbers)), -1)
    for row, first in zip(want, batch["first"], strict=True):
        row[: len(first)] = first
    assert all(torch.equal(first, want) for first, _, _ in given)
    half, none, every = (forced for _, _, forced in given[:3])
    assert 0 < half.sum() < half.numel() == 4 * max(numbers) * 4 and not none.any() and every.all()
    assert given[3][1:] == (None, None)
    given.clear()
    values = evaluate(model, {"vos": [batch]}, None, torch.float32)
    assert given[0][1:] == (None, None) and model.training and {"vos J&F", "vos hidden", "score"} == set(values)
    assert values["score"] == values["vos J&F"]


# ---- scores


def perfect(batch: dict, P: int) -> dict:
    """What a network would say that knew every tube, in a grid as fine as the pictures."""
    B, T, H, W = len(batch["masks"]), *batch["image"].shape[1:2], *batch["image"].shape[-2:]
    masks = torch.full((B, P, T, H // 4, W // 4), -9.0)
    classes = torch.full((B, P, len(CLASSES) + 1), -9.0)
    classes[..., -1] = 9
    for b, target in enumerate(batch["masks"]):
        masks[b, : len(target)] = 18 * target[..., 1::4, 1::4].float() - 9
        for q, label in enumerate(batch["labels"][b].tolist()):
            classes[b, q, [label, -1]] = torch.tensor([9.0, -9.0])
    return {"masks": [masks], "classes": [classes]}


@pytest.mark.parametrize("task, least", [("vis", 25), ("vps", 70)])
def test_scores_of_tubes(task, least):
    """Masks at a quarter of the size lose the rims; another clip's are worth nothing, nor are tubes that swap."""
    batch = clip_batch(task, n=4, noise=0.0)
    out = perfect(batch, 12)
    is_thing = MovingShapes.is_thing
    right, swapped, empty = (BatchScores(task, is_thing) for _ in range(3))
    right.add(out, batch)
    assert least < right.score() <= 100, right.score()
    mixed = {"masks": [out["masks"][0].roll(1, 2)], "classes": out["classes"]}  # a frame late, the last comes first
    swapped.add(mixed, batch)
    assert swapped.score() < right.score()
    empty.add({"masks": [torch.full_like(out["masks"][0], -9)], "classes": out["classes"]}, batch)
    assert empty.score() == 0
    if task == "vis":
        assert right.others()["IoU"] > 60 and empty.others() == {"IoU": 0}


def test_j_and_f_of_followed_objects():
    """After the frame of the prompt; a hidden object counts by being found nowhere."""
    batch = clip_batch("vos", n=6, T=5)
    out = perfect(batch, 8)
    tubes = [(m, f) for masks, firsts in zip(batch["masks"], batch["first"], strict=True)
             for m, f in zip(masks, firsts.tolist(), strict=True)]  # fmt: skip
    frames = [m[t].any().item() for m, f in tubes for t in range(f + 1, 5)]
    assert 0 < frames.count(False) < len(frames) / 2
    scores = BatchScores("vos", MovingShapes.is_thing)
    scores.add(out, batch)
    assert len(scores.values) == len(frames) and scores.score() > 70 and scores.others() == {"hidden": 100}
    there = torch.ones(6, 8, 5, dtype=torch.bool)
    nothing, everywhere = (BatchScores("vos", MovingShapes.is_thing) for _ in range(2))
    nothing.add(out | {"present": ~there}, batch)
    share = 100 * frames.count(False) / len(frames)
    assert nothing.others() == {"hidden": 100} and nothing.score() == pytest.approx(share)
    everywhere.add({"masks": [torch.full_like(out["masks"][0], 9)], "present": there}, batch)
    assert everywhere.others() == {"hidden": 0} and everywhere.score() < 30
    none = BatchScores("vos", MovingShapes.is_thing)
    assert math.isnan(none.score()) and math.isnan(none.others()["hidden"])
