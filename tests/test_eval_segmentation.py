"""eval/eval_panoptic.py, eval_vis.py, eval_vos.py and eval_referring.py, called in process: figures, controls, refusals."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import run
from utils import segmentation_files as files
from utils.masks import rle_encode

ROOT = Path(__file__).resolve().parents[1]
H, W = 24, 32


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def evaluate(name: str, argv: list) -> dict:
    out = Path(argv[1]).parent / "out" / "r.json"
    assert run.cli(script(name).main, [*map(str, argv), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refused(capsys, name: str, argv: list) -> str:
    assert run.cli(script(name).main, [*map(str, argv)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


def box(x: int, y: int, w: int, h: int, size=(H, W)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = True
    return mask


# ---- panoptic


def picture(parts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Id map of (id, mask), later ones on top."""
    ids = np.zeros((H, W), np.int64)
    for i, mask in parts:
        ids[mask] = i
    return ids


def save_ids(path: Path, ids: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)


def entry(name: str, ids: np.ndarray, categories: dict, full: bool) -> dict:
    segments = []
    for i, c in categories.items():
        if (ids == i).any():
            extra = {"area": int((ids == i).sum()), "iscrowd": 0} if full else {}
            segments.append({"id": i, "category_id": c, **extra})
    return {"file_name": f"{name}.png", "segments_info": segments}


CATEGORIES = [{"id": 1, "isthing": 1}, {"id": 5, "isthing": 1}, {"id": 90, "isthing": 0}]


def panoptic_images(folder: Path) -> tuple[dict, dict]:
    """Three images, a thing and a background each; the prediction misses 4 columns of the thing, and one image's."""
    gt, pred = {"images": [], "annotations": [], "categories": CATEGORIES}, {"annotations": []}
    for k in range(3):
        category, columns = (1, 5, 1)[k], 16 if k == 2 else 4
        truth = picture([(70_000, box(0, 0, W, H)), (300, box(4 + k, 4, 12, 12))])
        found = picture([(1, box(0, 0, W, H)), (2, box(4 + k + columns, 4, 12 - min(columns, 11), 12))])
        for side, ids, ids_of in ((gt, truth, {70_000: 90, 300: category}), (pred, found, {1: 90, 2: category})):
            save_ids(folder / ("gt" if side is gt else "pred") / f"{k}.png", ids)
            side["annotations"].append({"image_id": k, **entry(str(k), ids, ids_of, side is gt)})
    return gt, pred


def panoptic_argv(folder: Path, gt: dict, pred: dict) -> list:
    return ["--pred", write(folder / "pred.json", pred), "--labels", write(folder / "gt.json", gt)]


def test_panoptic_images(tmp_path, capsys):
    got = evaluate("eval_panoptic", panoptic_argv(tmp_path, *panoptic_images(tmp_path)))
    stuff = [(W * H - 144) / (W * H - 96)] * 2 + [(W * H - 144 - 12) / (W * H)]  # the last also has a stray column
    assert got["n"] == 3 and got["scores"]["PQ Stuff"] == pytest.approx(np.mean(stuff), abs=0.02)
    # things: 96 of 144 px twice, the third is missed: category 1 has PQ (2/3) / 2, category 5 has 2/3
    assert got["scores"]["PQ Things"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert got["scores"]["SQ Things"] == pytest.approx(2 / 3)
    assert got["per_class"]["1"] == pytest.approx(
        {"pq": 1 / 3, "sq": 2 / 3, "rq": 0.5, "iou": 2 / 3, "tp": 1, "fp": 1, "fn": 1}
    )
    assert got["constant category"] == 90 and 0 < got["constant"]["PQ All"] < got["scores"]["PQ All"]
    assert got["exchanged"] == 3 and got["shuffled"]["PQ Things"] < got["scores"]["PQ Things"]
    out = capsys.readouterr().out
    assert "n = 3 images" in out and "0 of 3 categories have no labelled pixel" in out and "WARNING" not in out


def test_panoptic_mean_iou_does_not_count_void_as_a_class(tmp_path):
    gt, pred = panoptic_images(tmp_path)
    for k in range(3):  # nothing predicted on the left half
        ids = files.read_ids(tmp_path / "pred" / f"{k}.png")
        ids[:, : W // 2] = 0
        save_ids(tmp_path / "pred" / f"{k}.png", ids)
        known = {s["id"]: s["category_id"] for s in pred["annotations"][k]["segments_info"]}
        pred["annotations"][k] = {"image_id": k, **entry(str(k), ids, known, False)}
    got = evaluate("eval_panoptic", panoptic_argv(tmp_path, gt, pred))
    classes = []  # of both sides (3, H, W), 0 = void
    for side, content in (("gt", gt), ("pred", pred)):
        classes.append(np.zeros((3, H, W), np.int64))
        for k, a in enumerate(content["annotations"]):
            for segment in a["segments_info"]:
                classes[-1][k][files.read_ids(tmp_path / side / f"{k}.png") == segment["id"]] = segment["category_id"]
    iou = [
        ((classes[0] == c) & (classes[1] == c)).sum() / ((classes[0] == c) | (classes[1] == c)).sum()
        for c in (1, 5, 90)
    ]
    assert got["scores"]["mIoU"] == pytest.approx(np.mean(iou)) and 0.1 < np.mean(iou) < 0.6


def test_panoptic_renumbered_labels_are_scored_with_a_warning(tmp_path, capsys):
    gt, _ = panoptic_images(tmp_path)
    pred = {"annotations": []}
    for k, a in enumerate(gt["annotations"]):
        ids = files.read_ids(tmp_path / "gt" / f"{k}.png")
        renumbered = np.where(ids == 300, 7, 8)
        save_ids(tmp_path / "pred" / f"{k}.png", renumbered)
        category = next(s["category_id"] for s in a["segments_info"] if s["id"] == 300)
        pred["annotations"].append({"image_id": k, **entry(str(k), renumbered, {7: category, 8: 90}, False)})
    got = evaluate("eval_panoptic", panoptic_argv(tmp_path, gt, pred))
    assert got["scores"]["PQ All"] == got["scores"]["mIoU"] == 1
    assert "WARNING: a perfect score" in capsys.readouterr().out


def test_panoptic_refusals(tmp_path, capsys):
    gt, pred = panoptic_images(tmp_path)

    def says(change_pred=None, change_gt=None):
        sides = copy.deepcopy([gt, pred])
        for change, side in ((change_gt, sides[0]), (change_pred, sides[1])):
            if change:
                change(side)
        return refused(capsys, "eval_panoptic", panoptic_argv(tmp_path, *sides))

    assert "1 of 3 images are missing, as 1" in says(lambda p: p["annotations"].pop(1))
    assert "1 images are not in the labels, as 2" in says(None, lambda g: g["annotations"].pop())
    assert "is there twice" in says(lambda p: p["annotations"].append(p["annotations"][0]))
    assert "category 77, which the labels do not know" in says(
        lambda p: p["annotations"][0]["segments_info"][0].update(category_id=77)
    )
    assert "holds id 2, which the json does not list" in says(lambda p: p["annotations"][0]["segments_info"].pop())
    assert "lacks id 9, which the json lists" in says(
        lambda p: p["annotations"][0]["segments_info"].append({"id": 9, "category_id": 1})
    )
    assert "lacks 'area'" in says(None, lambda g: g["annotations"][0]["segments_info"][0].pop("area"))
    assert "cannot be read" in says(lambda p: p["annotations"][0].update(file_name="none.png"))
    assert '"isthing"' in says(None, lambda g: g.pop("categories"))
    assert "is the label file" in says(lambda p: (p.clear(), p.update(gt)))
    assert "COCO panoptic" in says(lambda p: p.pop("annotations"))
    copied = [
        "--pred",
        write(tmp_path / "copy.json", {"annotations": gt["annotations"]}),
        "--pred-png",
        tmp_path / "gt",
    ]
    labels = ["--labels", write(tmp_path / "gt.json", gt)]
    assert "is a copy of the labels" in refused(capsys, "eval_panoptic", [*copied, *labels])
    save_ids(tmp_path / "pred" / "0.png", np.ones((H, W + 1), np.int64))
    assert "is 24 x 33 (H x W), its labels are 24 x 32" in says()
    Image.fromarray(np.zeros((H, W), np.uint8)).save(tmp_path / "pred" / "0.png")
    assert "expected an RGB PNG" in says()
    (tmp_path / "pred.json").write_text("{")
    assert "is not json" in refused(
        capsys, "eval_panoptic", ["--pred", tmp_path / "pred.json", "--labels", tmp_path / "gt.json"]
    )


def panoptic_videos(folder: Path) -> tuple[dict, dict]:
    """Two videos of 7 frames: a thing moves over stuff; in video b its predicted id changes after frame 3."""
    gt, pred = {"videos": [], "annotations": [], "categories": CATEGORIES}, {"annotations": []}
    for video in "ab":
        sides = [], []
        for t in range(7):
            ids = picture([(70_000, box(0, 0, W, H)), (300, box(t, 4, 12, 12))])
            found = np.where(ids == 300, 2 if video == "a" or t < 3 else 3, 1)
            for side, m, known in ((0, ids, {70_000: 90, 300: 1}), (1, found, {1: 90, 2: 1, 3: 1})):
                save_ids(folder / ("gt", "pred")[side] / video / f"{t}.png", m)
                sides[side].append(entry(str(t), m, known, side == 0))
        gt["videos"].append({"video_id": video})
        gt["annotations"].append({"video_id": video, "annotations": sides[0]})
        pred["annotations"].append({"video_id": video, "annotations": sides[1]})
    return gt, pred


def test_panoptic_videos(tmp_path, capsys):
    gt, pred = panoptic_videos(tmp_path)
    got = evaluate("eval_panoptic", panoptic_argv(tmp_path, gt, pred))
    scores = got["scores"]
    assert got["n"] == 2 and got["frames"] == 14 and scores["PQ All"] == scores["VPQ 1 frames"] == 1
    # video b, windows of 2: one of 6 holds the change; neither half is more than half of the tube
    assert scores["VPQ 2 frames"] == pytest.approx((11 / (11 + 0.5 * 2 + 0.5) + 1) / 2)
    assert scores["VPQ Stuff"] == 1 and scores["VPQ All"] < 1
    assert scores["AQ"] == pytest.approx((1 + (3**2 + 4**2) / 49) / 2) and scores["IoU"] == 1
    assert scores["STQ"] == pytest.approx(scores["AQ"] ** 0.5)
    assert got["exchanged"] == 2 and got["constant"]["STQ"] == 0
    pred["annotations"][1]["annotations"].pop()
    assert "video b does not hold the frames" in refused(capsys, "eval_panoptic", panoptic_argv(tmp_path, gt, pred))


# ---- instances


def tube(x: int, frames: int = 3) -> list[dict]:
    return [rle_encode(box(x + t, 5, 10, 10)) for t in range(frames)]


def vis_sets() -> tuple[dict, list]:
    videos = [{"id": i, "height": H, "width": W, "length": 3} for i in (1, 2)]
    annotations = [
        {"id": k, "video_id": v, "category_id": c, "iscrowd": 0, "segmentations": tube(x), "areas": [100] * 3}
        for k, (v, c, x) in enumerate([(1, 4, 0), (1, 7, 15), (2, 4, 8)])
    ]
    labels = {"videos": videos, "categories": [{"id": 4}, {"id": 7}], "annotations": annotations}
    pred = [
        {"video_id": 1, "category_id": 4, "score": 0.9, "segmentations": tube(1)},
        {"video_id": 1, "category_id": 7, "score": 0.8, "segmentations": [*tube(15)[:2], None]},
        {"video_id": 2, "category_id": 4, "score": 0.7, "segmentations": tube(9)},
    ]
    return labels, pred


def as_images(labels: dict, pred: list) -> tuple[dict, list]:
    """The first frame of every video as a COCO image."""
    images = [{**v, "id": v["id"]} for v in labels["videos"]]
    found = []
    for side in (labels["annotations"], pred):
        items = [{k: v for k, v in x.items() if k not in ("segmentations", "areas", "video_id")} for x in side]
        for x, own in zip(side, items, strict=True):
            own |= {"image_id": x["video_id"], "segmentation": x["segmentations"][0]}
        found.append(items)
    for x, old in zip(found[0], labels["annotations"], strict=True):
        x |= {"area": 100, "bbox": [(0, 15, 8)[old["id"]], 5, 10, 10]}
    return {"images": images, "categories": labels["categories"], "annotations": found[0]}, found[1]


def vis_argv(folder: Path, labels, pred) -> list:
    return ["--pred", write(folder / "p.json", pred), "--labels", write(folder / "l.json", labels)]


def test_vis_videos(tmp_path, capsys):
    labels, pred = vis_sets()
    got = evaluate("eval_vis", vis_argv(tmp_path, labels, pred))
    # category 4: IoU 90/110 twice, found at 7 of 10 thresholds; category 7: IoU 200/300, at 4 of 10
    assert got["scores"]["tubes"]["AP"] == pytest.approx((0.7 + 0.4) / 2)
    assert got["scores"]["tubes"]["per_category"] == pytest.approx({"4": 0.7, "7": 0.4})
    assert got["scores"]["tubes"]["APl"] is None and got["n"] == 2 and got["objects"] == got["predictions"] == 3
    assert got["constant category"] == 4 and got["constant"]["tubes"]["AP"] == 0
    assert got["exchanged"] == 2 and got["shuffled"]["tubes"]["AP"] < 0.1
    out = capsys.readouterr().out
    assert "n = 2 videos, 3 objects, 3 predictions; 0 videos without a prediction" in out and "WARNING" not in out


def test_vis_images(tmp_path, capsys):
    labels, pred = as_images(*vis_sets())
    got = evaluate("eval_vis", vis_argv(tmp_path, labels, pred))
    assert got["scores"]["masks"]["AP"] == pytest.approx((0.7 + 1) / 2) == got["scores"]["boxes"]["AP"]
    assert "2 of 2 images have those of another one" in capsys.readouterr().out


def test_vis_refusals(tmp_path, capsys):
    labels, pred = vis_sets()

    def says(change=None, new=None, flags=()):
        own = copy.deepcopy(pred) if new is None else new
        if change:
            change(own)
        return refused(capsys, "eval_vis", [*vis_argv(tmp_path, labels, own), *flags])

    assert "1 of 2 videos have objects but no prediction, as 2" in says(lambda p: p.pop())
    assert "is of video 3, which is not in the labels" in says(lambda p: p[0].update(video_id=3))
    assert "category 5, which the labels do not know" in says(lambda p: p[0].update(category_id=5))
    assert "has 2 masks, video 1 has 3 frames" in says(lambda p: p[0]["segmentations"].pop())
    assert "expected 24 x 32" in says(lambda p: p[0].update(segmentations=[rle_encode(np.ones((W, H), bool))] * 3))
    assert "are damaged" in says(lambda p: p[0]["segmentations"][0].update(counts="PP2"))
    assert "no RLE" in says(lambda p: p[0]["segmentations"].__setitem__(0, "PP2"))
    assert "score nan" in says(lambda p: p[0].update(score=float("nan")))
    assert "lacks 'score'" in says(lambda p: p[0].pop("score"))
    assert "every mask is a label" in says(new=[{**a, "score": 1.0} for a in labels["annotations"]])
    assert "holds no prediction" in says(new=[], flags=["--missing-ok"])
    assert "is the label file" in says(new=labels)
    images, found = as_images(labels, pred)
    found[1]["bbox"] = [1, 2, 3, 4]
    assert "in all or in none" in refused(capsys, "eval_vis", vis_argv(tmp_path, images, found))
    assert "holds no annotation" in refused(
        capsys, "eval_vis", vis_argv(tmp_path, {**images, "annotations": []}, found)
    )


def test_vis_nothing_found_is_allowed_when_said(tmp_path):
    labels, pred = vis_sets()
    got = evaluate("eval_vis", [*vis_argv(tmp_path, labels, pred[:2]), "--missing-ok"])
    assert got["without a prediction"] == 1 and got["scores"]["tubes"]["AP"] < 0.55


# ---- video objects


def save_sequence(folder: Path, stack: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for t, ids in enumerate(stack):
        image = Image.fromarray(ids)
        image.putpalette(list(range(256)) * 3)  # makes it a palette image
        image.save(folder / f"{t:05d}.png")


def vos_sets(folder: Path) -> list:
    """Sequences a (two objects move) and b (one object); predictions are one pixel off, object 2 of a is elsewhere."""
    for name, start in (("a", 2), ("b", 16)):
        gt, pred = np.zeros((2, 6, H, W), np.uint8)
        for t in range(6):
            gt[t][box(start + t, 2, 9, 9)] = 1
            pred[t][box(start + t + 1, 2, 9, 9)] = 1
            if name == "a":
                gt[t][box(2, 14, 8, 8)] = 2
                pred[t][box(22, 14, 8, 8)] = 2
        save_sequence(folder / "gt" / name, gt)
        save_sequence(folder / "pred" / name, pred)
    return ["--pred", folder / "pred", "--labels", folder / "gt"]


def test_vos(tmp_path, capsys):
    got = evaluate("eval_vos", vos_sets(tmp_path))
    assert got["scores"]["J mean"] == pytest.approx((0.8 + 0 + 0.8) / 3)  # 72 of 90 px, over three objects
    assert got["objects"]["a_2"]["J"]["mean"] == 0 and list(got["objects"]) == ["a_1", "a_2", "b_1"]
    assert got["frames"] == 8 and got["n"] == 2 and got["exchanged"] == 2
    assert got["scores"]["J&F"] == pytest.approx((got["scores"]["J mean"] + got["scores"]["F mean"]) / 2)
    # kept first masks: moved by 1..4 of 9 columns, and right for the one that stands still
    moved = np.mean([(9 - k) / (9 + k) for k in (1, 2, 3, 4)])
    assert got["first mask"]["J mean"] == pytest.approx((2 * moved + 1) / 3)
    assert got["shuffled"]["J mean"] == 0
    assert "shuffled: 2 of 2 sequences" in capsys.readouterr().out


def test_vos_list_and_frames_that_are_not_scored(tmp_path):
    argv = vos_sets(tmp_path)
    whole = evaluate("eval_vos", argv)
    (tmp_path / "val.txt").write_text("b\n")
    (tmp_path / "pred/b/00000.png").unlink()
    shutil.copy(tmp_path / "pred/b/00001.png", tmp_path / "pred/b/00005.png")
    got = evaluate("eval_vos", [*argv, "--sequences", tmp_path / "val.txt"])
    assert got["objects"] == {"b_1": whole["objects"]["b_1"]} and got["dropped"] == {"not in --sequences": 1}
    assert got["exchanged"] == 0 and got["shuffled"] == {}


def test_vos_refusals(tmp_path, capsys):
    def says(*flags, name="eval_vos"):
        return refused(capsys, name, [*argv, *flags])

    argv = vos_sets(tmp_path)
    (tmp_path / "val.txt").write_text("c")
    assert "c is not in --labels" in says("--sequences", tmp_path / "val.txt")
    assert "is not a folder" in refused(capsys, "eval_vos", [*argv[:3], tmp_path / "none"])
    assert "copy of the labels" in refused(capsys, "eval_vos", ["--pred", tmp_path / "gt", *argv[2:]])
    shutil.copy(tmp_path / "pred/b/00001.png", tmp_path / "pred/b/00009.png")
    assert "00009.png is not among the frames" in says()
    (tmp_path / "pred/b/00009.png").unlink()
    shutil.copy(tmp_path / "gt/a/00002.png", tmp_path / "pred/b/00002.png")
    assert "sequence b: pred has object 2, the first frame of gt has 1" in says()
    Image.fromarray(np.zeros((H, W + 2), np.uint8)).save(tmp_path / "pred/b/00002.png")
    assert "is 24 x 34 (H x W), the labels are 24 x 32" in says()
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(tmp_path / "pred/b/00002.png")
    assert "expected a palette PNG" in says()
    (tmp_path / "pred/b/00002.png").write_text("no picture")
    assert "cannot be read as a picture" in says()
    (tmp_path / "pred/b/00002.png").unlink()
    assert "lacks 00002.png" in says()
    shutil.rmtree(tmp_path / "pred/b")
    assert "1 of 2 sequences are missing, as b" in says()
    shutil.rmtree(tmp_path / "gt/a")
    shutil.copytree(tmp_path / "pred/a", tmp_path / "pred/b")
    assert "1 sequences are not in the labels, as a" in says()


# ---- referring


def referring_sets(folder: Path) -> tuple[list, list, dict]:
    """Two objects in image 1, one in image 2; two sentences each."""
    places = {10: (1, 2), 11: (1, 20), 12: (2, 9)}
    refs = [
        {"ref_id": k, "ann_id": a, "image_id": i, "split": "test" if k == 2 else "val", "category_id": 1}
        | {"sentences": [{"sent_id": 10 * k + s, "sent": "it"} for s in (0, 1)], "sent_ids": []}
        for k, (a, (i, _)) in enumerate(places.items())
    ]
    instances = {
        "images": [{"id": i, "height": H, "width": W} for i in (1, 2)],
        "annotations": [{"id": a, "segmentation": rle_encode(box(x, 4, 10, 10))} for a, (_, x) in places.items()],
    }
    pred = []
    for k, (_, x) in enumerate(places.values()):
        pred.append({"sent_id": 10 * k, "segmentation": rle_encode(box(x, 4, 10, 10))})
        pred.append({"sent_id": 10 * k + 1, "segmentation": rle_encode(box(x, 4, 4, 10))})
    return refs, pred, instances


def referring_argv(folder: Path, refs, pred, instances) -> list:
    argv = ["--pred", write(folder / "p.json", pred), "--labels", write(folder / "l.json", refs)]
    return [*argv, "--instances", write(folder / "i.json", instances)]


def test_referring(tmp_path, capsys):
    got = evaluate("eval_referring", referring_argv(tmp_path, *referring_sets(tmp_path)))
    assert got["scores"]["oIoU"] == pytest.approx(0.7) == got["scores"]["mIoU"]
    assert got["scores"]["P@0.5"] == got["scores"]["P@0.9"] == 0.5
    assert got["whole image"]["oIoU"] == pytest.approx(100 / (H * W)) and got["other object"]["mIoU"] == 0
    assert got["n"] == 6 and got["exchanged"] == 4 and got["refs"] == 3 and got["empty masks"] == 0
    assert "4 of 6 expressions have the mask of another ref" in capsys.readouterr().out


def test_referring_split(tmp_path):
    refs, pred, instances = referring_sets(tmp_path)
    pred[4]["segmentation"] = rle_encode(np.zeros((H, W), bool))
    got = evaluate("eval_referring", [*referring_argv(tmp_path, refs, pred[4:], instances), "--split", "test"])
    assert got["n"] == 2 and got["scores"]["oIoU"] == pytest.approx(40 / 200) and got["empty masks"] == 1
    assert got["other object"] == {}


def test_referring_refusals(tmp_path, capsys):
    refs, pred, instances = referring_sets(tmp_path)

    def says(new_pred=None, new_refs=None, new_instances=None, flags=()):
        sides = (refs if new_refs is None else new_refs, pred if new_pred is None else new_pred)
        return refused(
            capsys, "eval_referring", [*referring_argv(tmp_path, *sides, new_instances or instances), *flags]
        )

    assert "1 of 6 sentences are missing, as 0" in says(pred[1:])
    assert "1 sentences are not in the labels, as 99" in says([*pred, {**pred[0], "sent_id": 99}])
    assert "7 masks for 6 sentences" in says([*pred, pred[0]])
    assert "expected 24 x 32" in says([{**pred[0], "segmentation": rle_encode(np.ones((W, H), bool))}, *pred[1:]])
    assert "is no RLE" in says([{**pred[0], "segmentation": {}}, *pred[1:]])
    assert "no ref of --split train; expected one of: test, val" in says(flags=["--split", "train"])
    assert "lacks annotation 10" in says(new_instances={**instances, "annotations": instances["annotations"][1:]})
    assert "is the label file" in says(refs)
    assert "lacks 'sent_id'" in says([{"segmentation": {}}])
    copied = [{**p, "segmentation": pred[k // 2 * 2]["segmentation"]} for k, p in enumerate(pred)]
    assert "every mask is a label" in says(copied)


# ---- what they share


def test_exchange_leaves_nobody_in_place():
    groups = dict.fromkeys(range(7), "x") | {"lonely": "y", "p": "z", "q": "z"}
    source = files.exchange(groups)
    assert source.keys() == groups.keys() - {"lonely"} and all(i != j for i, j in source.items())
    assert sorted(map(str, source.values())) == sorted(map(str, source)) and source["p"] == "q"


def test_runs_of_any_code():
    rng = np.random.default_rng(0)
    for height, width, share in [(1, 1, 0.0), (7, 5, 0.5), (300, 200, 0.01), (60, 900, 1.0)]:
        mask = rng.random((height, width)) < share
        flat = mask.ravel(order="F").astype(int)
        ends = np.flatnonzero(np.diff(flat, append=1 - flat[-1])) + 1
        want = np.diff(ends, prepend=0).tolist()
        code = rle_encode(mask)
        assert files.runs_of(code["counts"]).tolist() == ([0] if flat[0] else []) + want
        assert files.checked_rle(code, height, width) == code
    for damaged in ("", "PP2", "\x01", "é", "o", "oooooooooooooooooooooooo0"):
        with pytest.raises(ValueError, match="damaged"):
            files.checked_rle({"size": [24, 32], "counts": damaged}, 24, 32)
