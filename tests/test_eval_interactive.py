"""eval/eval_interactive.py: what the model is given, the scores of known answers, labels in each form, refusals."""

import functools
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.segment_batch import Scene, View
from models.fastsam2 import FastSAM2, FastSAM2Config
from models.panoptic_post import ImageSize
from models.segment_inference import Found
from utils import run
from utils.click_simulator import ClickSimulator
from utils.segment_writing import ids_to_rgb

ROOT = Path(__file__).resolve().parents[1]
MINI = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "fastsam2" / "coco_mini"


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("eval_interactive", ROOT / "eval" / "eval_interactive.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def evaluate(*argv: object) -> int:
    return run.cli(script().main, [*map(str, argv), "--device", "cpu"])


def refused(capsys, *argv: object) -> str:
    assert evaluate(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err, err
    return err


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    cfg = FastSAM2Config(classes=["a", "b"], backbone="resnet18", queries=4, dim=32, heads=4, hidden=48, embed_dim=16)
    model, out = FastSAM2(cfg), tmp_path_factory.mktemp("run")
    run.save_checkpoint(out, 1, model, {**model.config_dict(), "data": {"image_size": [64, 64]}}, {})
    return out / "last"


def scene_of(masks: np.ndarray, crowd=None, void=None) -> Scene:
    H, W = masks.shape[1:]
    image = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    crowd = np.zeros(len(masks), bool) if crowd is None else np.array(crowd)
    return Scene("x", image, masks, np.arange(len(masks)) + 1, np.zeros(len(masks), np.int64), crowd, void)


def boxes(*xyxy, size=(40, 60)) -> np.ndarray:
    masks = np.zeros((len(xyxy), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, xyxy, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def settings(*more: object):
    return script().parse_args(["--ckpt", "x", "--labels", "y", *map(str, more)])


def test_crowd_void_and_small_segments_are_no_objects():
    masks = boxes((0, 0, 20, 20), (30, 0, 50, 20), (0, 30, 3, 33), (30, 30, 40, 40))
    void = boxes((0, 0, 5, 20), (30, 30, 40, 40)).any(0)
    found, counts = script().objects_of(scene_of(masks, [False, True, False, False], void), 10)
    assert found.tolist() == masks[:1].tolist()  # a crowd, 9 px, all in the void
    assert (~counts == (void | masks[1])).all()
    as_map = scene_of((masks * np.arange(1, 5)[:, None, None]).sum(0)[None])
    as_map.masks, as_map.ids, as_map.crowd = as_map.masks[0], np.arange(1, 5), np.array([False, True, False, False])
    assert script().objects_of(as_map, 10)[0].tolist() == masks[[0, 3]].tolist()


def test_the_model_is_given_clicks_where_it_sees_the_picture(monkeypatch):
    """A network that marks a spot of its own picture around the click: the mask lies around the click at full size."""
    seen = []

    def mark(model, features, given, shown, prompts, dtype):
        assert sorted(prompts) == ["point_labels", "points"]  # points, and nothing of the labels
        seen.append(len(prompts["points"]))
        y, x = torch.meshgrid(torch.arange(shown[0]), torch.arange(shown[1]), indexing="ij")
        at = prompts["points"][:, -1, :, None, None]  # (P, 2, 1, 1)
        masks = 3 - torch.hypot(x - at[:, 0], y - at[:, 1])
        return Found(torch.zeros(0), masks, torch.zeros(0), ImageSize(given, shown, shown))

    monkeypatch.setattr(script(), "decode", mark)
    points = np.array([[[13, 14]], [[47, 29]], [[30, 17]], [[0, 0]], [[59, 39]]], np.float32)
    for shown in ((40, 60), (64, 96), (20, 30)):
        args = settings("--batch-size", 2)
        found = script().answer(None, None, (40, 60), shown, args, torch.float32, points, np.ones((5, 1), np.int64))
        assert found[np.arange(5), points[:, 0, 1].astype(int), points[:, 0, 0].astype(int)].all(), shown
        for mask, (x, y) in zip(found[:3], points[:3, 0], strict=True):
            assert np.abs(np.argwhere(mask).mean(0) - (y, x)).max() < 0.2, shown
    assert seen[:3] == [2, 2, 1]


def test_scores_of_known_answers(monkeypatch):
    """Who answers each click with the object itself has IoU 1 and NoC 1; with the left half of the picture, neither."""
    masks = boxes((0, 0, 30, 20), (30, 10, 60, 40))
    monkeypatch.setattr(script(), "encode", lambda *_: None)

    def truth(*args):
        points = args[-2][:, 0].astype(int)
        return np.stack([masks[masks[:, y, x].argmax()] for x, y in points])

    def half(*args):
        return np.repeat(boxes((0, 0, 30, 40)), len(args[-2]), 0)

    monkeypatch.setattr(script(), "answer", truth)
    found = script().score_scene(None, scene_of(masks), View(64, 64), settings(), torch.float32, 0)
    assert (found["score"] == 1).all() and found["score"].shape == (2, 20) and (found["other object"] == 0).all()
    monkeypatch.setattr(script(), "answer", half)
    found = script().score_scene(None, scene_of(masks), View(64, 64), settings("--clicks", 7), torch.float32, 0)
    assert found["score"].tolist() == [[0.5] * 7, [0.0] * 7] and found["other object"].tolist() == [[0.5], [0.0]]
    assert found["discs"][:, 0].min() > 0 and found["discs"].shape == (2, 7)
    alone = script().score_scene(None, scene_of(masks[:1]), View(64, 64), settings(), torch.float32, 0)
    assert alone["score"].shape == (1, 20) and alone["other object"].shape == (0, 1)
    nothing = script().score_scene(None, scene_of(masks[:0]), View(64, 64), settings(), torch.float32, 0)
    assert nothing["score"].shape == (0, 20) and nothing["other object"].shape == (0, 1)


def test_first_click_at_random(monkeypatch):
    masks, first = boxes((0, 0, 30, 20)), []
    monkeypatch.setattr(script(), "encode", lambda *_: None)

    def note(*args):
        first.append(tuple(args[-2][0, 0]))
        return masks

    monkeypatch.setattr(script(), "answer", note)
    args = settings("--first", "random")
    for index in (0, 0, 1):
        script().score_scene(None, scene_of(masks), View(64, 64), args, torch.float32, index)
    assert len(set(first)) == 2  # the same for the same picture, on the object
    assert all(x < 30 and y < 20 for x, y in first)
    assert ClickSimulator(masks).points()[0][0, 0].tolist() not in [list(p) for p in first]


def panoptic_labels(folder: Path) -> Path:
    (folder / "labels").mkdir()
    (folder / "images").mkdir()
    ids = np.zeros((40, 60), np.int64)
    ids[:20, :30], ids[20:, 20:] = 1, 2
    Image.fromarray(ids_to_rgb(ids)).save(folder / "labels" / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(
        folder / "images" / "a.png"
    )
    segments = [{"id": k, "category_id": 5, "area": int((ids == k).sum()), "iscrowd": 0} for k in (1, 2)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 5, "name": "dog", "isthing": 1}],
    }
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def test_panoptic_labels(tmp_path, ckpt, capsys):
    labels, out = panoptic_labels(tmp_path), tmp_path / "result.json"
    args = ("--ckpt", ckpt, "--labels", labels, "--images", tmp_path / "images", "--clicks", 6)
    assert evaluate(*args, "--json", out) == 0
    result = json.loads(out.read_text())
    assert (result["n"], result["images"], result["exchanged"], result["partial"]) == (2, 1, 2, False)
    assert list(result["score"]) == ["mIoU@1", "mIoU@3", "mIoU@5", "NoC@85", "failed@85", "NoC@90", "failed@90"]
    assert list(result["other object"]) == ["mIoU@1"] and result["settings"]["first"] == "deepest"
    assert all(0 <= v <= 6 for k in ("score", "discs") for v in result[k].values())
    assert "n = 2 objects" in capsys.readouterr().out
    assert evaluate(*args, "--json", tmp_path / "again.json", "--batch-size", 1) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["score"] == pytest.approx(result["score"])  # objects do not see each other


def test_rendered_shapes(tmp_path, ckpt):
    out = tmp_path / "result.json"
    assert evaluate("--ckpt", ckpt, "--labels", "moving_shapes", "--limit", 2, "--clicks", 3, "--json", out) == 0
    result = json.loads(out.read_text())
    assert result["n"] > 2 and result["images"] == 2 and "mIoU@3" in result["score"]


@pytest.mark.parametrize("name", ["panoptic.json", "instances.json"])
def test_real_labels(tmp_path, ckpt, name):
    if not (MINI / name).exists():
        pytest.skip(f"no {name} in {MINI}; set LAB_SHARED")
    out = tmp_path / "result.json"
    args = ("--labels", MINI / name, "--limit", 2, "--clicks", 2, "--least", 32, "--json", out)
    assert evaluate("--ckpt", ckpt, *args) == 0
    result = json.loads(out.read_text())
    assert result["partial"] and result["n"] > 3 and "mIoU@3" not in result["score"]


def test_refusals(tmp_path, capsys, ckpt):
    labels = panoptic_labels(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    args = ("--ckpt", ckpt, "--images", tmp_path / "images")
    cases = [
        ((*args, "--labels", tmp_path / "empty.json"), "has no annotations"),
        ((*args, "--labels", tmp_path / "nothing.json"), "cannot be read"),
        ((*args, "--labels", labels, "--least", 5000), "no object of at least 5000 px"),
        ((*args, "--labels", labels, "--clicks", 0), "--clicks 0"),
        ((*args, "--labels", labels, "--image-size", "8"), "--image-size"),
        (("--ckpt", tmp_path, "--labels", labels), "not a checkpoint folder"),
        (("--ckpt", ckpt, "--labels", labels, "--images", tmp_path / "elsewhere"), "--images"),
    ]
    for argv, said in cases:
        assert said in refused(capsys, *argv), argv
