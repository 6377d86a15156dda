"""eval/infer_segment.py with tiny random networks: files that the eval scripts read, prompts, refusals, nothing partial."""

import functools
import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.segment_batch import View, draw_window, show_map
from models import segment_inference as net
from models.clip import PRESETS, CLIPConfig, load_clip, load_tokenizer, save_tiny_snapshot
from models.fastsam2 import FastSAM2, FastSAM2Config, build_vocabulary, hash_texts
from models.panoptic_post import panoptic
from utils import run
from utils.masks import rle_area, rle_decode
from utils.segment_inputs import check_place, pack, read_objects, scale_points
from utils.segment_writing import ids_to_rgb, number_segments
from utils.segmentation_files import read_ids, read_png

ROOT = Path(__file__).resolve().parents[1]
NAMES, CATEGORIES, IS_THING = ["cat", "dog", "grass", "sky"], [17, 18, 193, 300], [True, True, False, False]
CFG = FastSAM2Config(
    classes=NAMES, is_thing=IS_THING, backbone="resnet18", queries=12, dim=32, heads=4, hidden=48, embed_dim=24
)  # fmt: skip
SIZES = {"000000000009.png": (70, 50), "COCO_val2014_000000000012.jpg": (40, 64)}  # width, height


@functools.cache
def module(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def infer(*argv: object) -> int:
    return run.cli(module("infer_segment").main, [*map(str, argv), "--device", "cpu"])


def refused(capsys, *argv: object) -> str:
    assert infer(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err, err
    return err


def save(folder: Path, cfg: FastSAM2Config, **data) -> Path:
    torch.manual_seed(0)
    model = FastSAM2(cfg)
    if cfg.text == "hash":
        embed = build_vocabulary(NAMES, lambda texts: hash_texts(texts, cfg.embed_dim), ("{}",))
        model.set_vocabulary(NAMES, embed, cfg.is_thing)
    run.save_checkpoint(folder, 1, model, {**model.config_dict(), **data}, {})
    return folder / "last"


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory) -> dict[str, Path]:
    data = {"data": {"category_ids": CATEGORIES, "image_size": [48, 64]}}
    kinds = {"hash": {"text": "hash"}, "random": {}, "compat": {"compat": True}, "stuff": {"is_thing": [False] * 4},
             "clip": {"text": "clip"}}  # fmt: skip
    found = {k: save(tmp_path_factory.mktemp(k), replace(CFG, **v), **data) for k, v in kinds.items()}
    return found | {"bare": save(tmp_path_factory.mktemp("bare"), CFG)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for k, (name, (w, h)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(k).integers(0, 255, (h, w, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture, not looked at")
    return folder


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- where a prompt lies


@pytest.mark.parametrize("given, shown", [((50, 70), (48, 67)), ((480, 640), (96, 128)), ((30, 40), (91, 122))])
def test_points_map_as_pixels_do(given, shown):
    """The pixel that the network is shown at a mapped point's place is the one that was clicked."""
    H, W = given
    window = draw_window(View(*shown), H, W, np.random.default_rng(0))
    h, w = window.h, window.w
    numbers = show_map(np.arange(H * W).reshape(H, W), window)  # which px of the picture each shown px is of
    y, x = np.divmod(numbers, W)
    rows, columns = np.mgrid[:h, :w]
    mapped = scale_points(np.stack([x, y], -1).reshape(-1, 2), (H, W), (h, w)).reshape(h, w, 2)
    # a shown px takes the value under its centre, so the clicked centre is at most half a px of the picture away
    assert np.abs(mapped[..., 0] - columns).max() <= 0.5 * w / W + 1e-4
    assert np.abs(mapped[..., 1] - rows).max() <= 0.5 * h / H + 1e-4


def test_points_map_exactly():
    """Centres to centres: corners keep half a px of distance to the border, in their own px."""
    assert scale_points([[0, 0], [69, 49]], (50, 70), (100, 210)).tolist() == [[1.0, 0.5], [208.0, 98.5]]
    points = np.random.default_rng(0).uniform(0, 40, (20, 2)).astype(np.float32)
    back = scale_points(scale_points(points, (50, 70), (37, 91)), (37, 91), (50, 70))
    np.testing.assert_allclose(back, points, atol=1e-4)
    assert scale_points(points, (50, 70), (50, 70)).tolist() == points.tolist()


def test_prompts_are_read_from_left_to_right():
    given = [("point", "1,2"), ("point", "3,4,0"), ("box", "0,0,9,9"), ("box", "5,5,6,6"), ("point", "5,6,1"),
             ("object", []), ("text", "a dog"), ("text", "a cat")]  # fmt: skip
    assert read_objects(given) == [
        {"points": [[1, 2, 1], [3, 4, 0]], "box": [0, 0, 9, 9]}, {"box": [5, 5, 6, 6], "points": [[5, 6, 1]]},
        {"text": "a dog"}, {"text": "a cat"},
    ]  # fmt: skip


def test_packed_prompts(tmp_path):
    Image.fromarray(np.eye(20, 40, dtype=np.uint8)).save(tmp_path / "m.png")
    given = [("point", "1,2"), ("point", "3,4,0"), ("object", []), ("box", "0,0,39,19"), ("text", "dog"),
             ("mask", str(tmp_path / "m.png"))]  # fmt: skip
    objects = read_objects(given)
    masks = check_place(objects, 20, 40)
    assert masks[1].sum() == 20
    found = pack(objects, masks, (20, 40), (10, 20), lambda texts: hash_texts(texts, 6))
    assert found["points"].tolist() == [[[0.25, 0.75], [1.25, 1.75]], [[-0.25, -0.25]] * 2]
    assert found["point_labels"].tolist() == [[1, 0], [-1, -1]]
    assert found["boxes"][1].tolist() == [-0.25, -0.25, 19.25, 9.25] and found["has_box"].tolist() == [False, True]
    assert torch.equal(found["texts"][1], hash_texts(["dog"], 6)[0]) and found["has_text"].tolist() == [False, True]
    assert found["mask_prompts"][1].sum() == 20 and not found["mask_prompts"][0].any()


# ---- files


def test_numbered_segments_are_what_is_read_back(tmp_path):
    values = np.array([[0, 0, 1001, 4], [2, 2, 2001, 2001]])
    found = {"value": np.array([1001, 0, 2, 0, 2001, 3001]), "label": np.array([1, 0, 2, 0, 1, 1]),
             "score": np.array([0.9, 0.8, 0.7, 0.85, 0.6, 0.5])}  # fmt: skip
    ids, segments = number_segments(values, found, [7, 8, 9, 10])
    assert ids.tolist() == [[1, 1, 3, 0], [2, 2, 4, 4]]
    assert [(s["id"], s["category_id"], s["area"], s["bbox"], s["score"]) for s in segments] == [
        (1, 7, 2, [0, 0, 2, 1], 0.85), (2, 9, 2, [0, 1, 2, 1], 0.7), (3, 8, 1, [2, 0, 1, 1], 0.9), (4, 8, 2, [2, 1, 2, 1], 0.6),
    ]  # fmt: skip
    large = ids + 70000 * (ids > 0)
    Image.fromarray(ids_to_rgb(large)).save(tmp_path / "x.png")
    assert read_ids(tmp_path / "x.png").tolist() == large.tolist()


def labels_of(photos: Path, folder: Path) -> Path:
    """COCO panoptic labels of the photos: a dog on the left, sky on the right."""
    (folder / "labels").mkdir()
    content = {"images": [], "annotations": [], "categories": [
        {"id": c, "name": n, "isthing": int(t)} for c, n, t in zip(CATEGORIES, NAMES, IS_THING, strict=True)
    ]}  # fmt: skip
    for i, (name, (w, h)) in zip((9, 12), SIZES.items(), strict=True):
        ids = np.ones((h, w), np.int64)
        ids[:, w // 2 :] = 2
        Image.fromarray(ids_to_rgb(ids)).save(folder / "labels" / f"{i}.png")
        segments = [
            {"id": k, "category_id": c, "area": int((ids == k).sum()), "iscrowd": 0} for k, c in ((1, 18), (2, 300))
        ]
        content["images"].append({"id": i, "file_name": name, "height": h, "width": w})
        content["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def test_panoptic_files_are_scored(tmp_path, photos, ckpts):
    out = tmp_path / "out"
    assert infer(photos, "--ckpt", ckpts["hash"], "--out", out, "--task", "panoptic", "--segment-score", 0.3) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "panoptic", "panoptic.json", "panoptic.json.meta.json", "panoptic_overlays",
    ]  # fmt: skip
    content = read(out / "panoptic.json")
    assert [c["id"] for c in content["categories"]] == CATEGORIES
    assert [a["image_id"] for a in content["annotations"]] == [9, 12]
    for a, (name, (w, h)) in zip(content["annotations"], SIZES.items(), strict=True):
        ids = read_ids(out / "panoptic" / a["file_name"])
        assert ids.shape == (h, w) and a["file_name"] == f"{Path(name).stem}.png"
        assert {s["id"]: s["area"] for s in a["segments_info"]} == {
            int(i): int(n) for i, n in zip(*np.unique(ids[ids > 0], return_counts=True), strict=True)
        }
        assert read_png(out / "panoptic_overlays" / a["file_name"]).shape == (h, w, 3)
    about = read(out / "panoptic.json.meta.json")
    assert about["config"]["segment_score"] == 0.3 and about["config"]["segment_share"] == 0.8
    assert about["config"]["image_size"] == [48, 64] and len(about["inputs"]) == 2
    labels = labels_of(photos, tmp_path)
    assert run.cli(module("eval_panoptic").main, ["--pred", str(out / "panoptic.json"), "--labels", str(labels)]) == 0


def test_panoptic_is_what_the_model_says(tmp_path, photos, ckpts):
    """The picture at the size of training, whole, through encode, decode and the post-processing of the reference."""
    name, (w, h) = next(iter(SIZES.items()))
    assert infer(photos / name, "--ckpt", ckpts["hash"], "--out", tmp_path / "o", "--task", "panoptic",
                 "--segment-score", 0.3, "--image-size", f"{h}x{w}") == 0  # fmt: skip
    model = FastSAM2.from_checkpoint(ckpts["hash"]).eval()
    with torch.no_grad():
        image = torch.from_numpy(np.array(Image.open(photos / name))).permute(2, 0, 1)[None]
        found = model(image)
    size = net.ImageSize((h, w), (h, w), (64, 96))
    x = panoptic(found["classes"][-1][0], found["masks"][-1][0], model.is_thing, size, threshold=0.3)
    [entry] = read(tmp_path / "o" / "panoptic.json")["annotations"]
    ids = read_ids(tmp_path / "o" / "panoptic" / entry["file_name"])
    assert ((ids > 0) == (x["map"].numpy() != len(NAMES))).all()
    category = np.array([0, *(s["category_id"] for s in entry["segments_info"])])[ids]
    label = np.where(x["map"] < len(NAMES), x["map"], x["map"] % 1000)
    assert (category[ids > 0] == np.array(CATEGORIES)[label[ids > 0]]).all()


def test_instances_are_scored(tmp_path, photos, ckpts):
    out = tmp_path / "out"
    args = ("--ckpt", ckpts["hash"], "--out", out, "--task", "instance", "--top", 48, "--draw-score", 0)
    assert infer(photos, *args) == 0
    entries = read(out / "instance.json")
    assert entries and {x["image_id"] for x in entries} <= {9, 12} and {x["category_id"] for x in entries} <= {17, 18}
    for x in entries:
        w, h = dict(zip((9, 12), SIZES.values(), strict=True))[x["image_id"]]
        mask = rle_decode(x["segmentation"])
        assert mask.shape == (h, w) and 0 <= x["score"] <= 1
        ys, xs = np.nonzero(mask)
        assert x["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    images = [{"id": i, "width": w, "height": h} for i, (w, h) in zip((9, 12), SIZES.values(), strict=True)]
    truth = [{"id": i, "image_id": i, "category_id": 18, "iscrowd": 0, "area": 400, "bbox": [5, 5, 20, 20],
              "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]} for i in (9, 12)]  # fmt: skip
    categories = [{"id": c, "name": n} for c, n in zip(CATEGORIES, NAMES, strict=True)]
    (tmp_path / "gt.json").write_text(json.dumps({"images": images, "annotations": truth, "categories": categories}))
    args = ["--pred", str(out / "instance.json"), "--labels", str(tmp_path / "gt.json"), "--missing-ok"]
    assert run.cli(module("eval_vis").main, args) == 0


def test_semantic_files(tmp_path, photos, ckpts):
    out = tmp_path / "out"
    assert infer(photos, "--ckpt", ckpts["random"], "--out", out, "--task", "semantic") == 0
    for a, (w, h) in zip(read(out / "semantic.json")["annotations"], SIZES.values(), strict=True):
        classes = read_png(out / "semantic" / a["file_name"])
        assert classes.shape == (h, w) and np.unique(classes).tolist() == a["categories"]
        assert set(a["categories"]) <= set(CATEGORIES)


def test_interactive_objects(tmp_path, photos, ckpts):
    photo, out = photos / "000000000009.png", tmp_path / "out"
    Image.fromarray(np.pad(np.full((10, 10), 255, np.uint8), ((5, 35), (5, 55)))).save(tmp_path / "rough.png")
    prompts = ("--point", "10,12", "--point", "40,30,0", "--box", "2,3,30,40", "--object", "--point", "69,49",
               "--box", "1,1,9,9", "--text", "the dog", "--object", "--mask", tmp_path / "rough.png")  # fmt: skip
    assert infer(photo, "--ckpt", ckpts["hash"], "--out", out, "--task", "interactive", *prompts) == 0
    entries = read(out / "interactive.json")
    assert [x["object"] for x in entries] == [1, 2, 3] and {x["image_id"] for x in entries} == {9}
    assert entries[0]["points"] == [[10, 12, 1], [40, 30, 0]] and entries[1]["text"] == "the dog"
    assert all(rle_decode(x["segmentation"]).shape == (50, 70) and np.isfinite(x["score"]) for x in entries)
    about = read(out / "interactive.json.meta.json")
    assert about["config"]["prompts"][0] == ["point", "10,12"]
    assert [Path(x["path"]).name for x in about["inputs"]] == ["000000000009.png", "rough.png"]
    assert infer(photo, "--ckpt", ckpts["hash"], "--out", tmp_path / "moved", "--task", "interactive",
                 "--point", "60,45", "--object", *prompts[9:]) == 0  # fmt: skip
    moved = read(tmp_path / "moved" / "interactive.json")
    assert moved[0]["segmentation"] != entries[0]["segmentation"]  # a prompt decides its own mask
    assert moved[-1]["segmentation"] == entries[2]["segmentation"]  # and no other
    assert infer(photo, "--ckpt", ckpts["compat"], "--out", tmp_path / "old", "--task", "interactive",
                 "--point", "60,45", "--object", "--box", "1,1,9,9") == 0  # fmt: skip


def test_referring_files_are_scored(tmp_path, photos, ckpts):
    refs = [{"ref_id": k, "ann_id": 50 + k, "image_id": i, "split": s, "category_id": 18,
             "sentences": [{"sent_id": 10 * k + n, "sent": t} for n, t in enumerate(said)]}
            for k, (i, s, said) in enumerate([(9, "val", ["the dog", "left dog"]), (12, "val", ["a cat"]),
                                              (9, "test", ["the dog"]), (77, "test", ["elsewhere"])])]  # fmt: skip
    (tmp_path / "refs.json").write_text(json.dumps(refs))
    out, args = tmp_path / "out", ("--ckpt", ckpts["hash"], "--task", "referring", "--refs", tmp_path / "refs.json")
    assert infer(photos, *args, "--out", out, "--split", "val") == 0
    entries = read(out / "referring.json")
    assert [(x["sent_id"], x["image_id"]) for x in entries] == [(0, 9), (1, 9), (10, 12)]
    assert entries[0]["segmentation"] != entries[1]["segmentation"] or not rle_area(entries[0]["segmentation"])
    images = [{"id": i, "width": w, "height": h} for i, (w, h) in zip((9, 12), SIZES.values(), strict=True)]
    truth = [{"id": 50 + k, "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]]} for k in range(2)]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": truth}))
    scored = ["--pred", out / "referring.json", "--labels", tmp_path / "refs.json", "--split", "val",
              "--instances", tmp_path / "instances.json"]  # fmt: skip
    assert run.cli(module("eval_referring").main, [*map(str, scored)]) == 0
    assert infer(photos, *args[:4], "--out", tmp_path / "t", "--text", "the dog", "--text", "a cat") == 0
    typed = read(tmp_path / "t" / "referring.json")
    assert [(x["sent_id"], x["image_id"], x["text"]) for x in typed] == [
        (1, 9, "the dog"), (2, 9, "a cat"), (3, 12, "the dog"), (4, 12, "a cat"),
    ]  # fmt: skip
    assert typed[0]["segmentation"] == entries[0]["segmentation"]


def test_texts_of_a_clip(tmp_path, capsys, photos, ckpts):
    tower = CLIPConfig(**{**asdict(PRESETS["tiny"]), "embed_dim": CFG.embed_dim})
    save_tiny_snapshot(tmp_path / "clip", tower)
    save_tiny_snapshot(tmp_path / "wide", CLIPConfig(**{**asdict(tower), "embed_dim": 40}))
    photo = photos / "000000000009.png"
    args = (photo, "--ckpt", ckpts["clip"], "--task", "referring", "--text", "the dog", "--text", "a cat")
    assert "learned the texts of a CLIP" in refused(capsys, *args, "--out", tmp_path / "o")
    assert "give the same CLIP" in refused(capsys, *args, "--out", tmp_path / "o", "--clip", tmp_path / "wide")
    assert infer(*args, "--out", tmp_path / "o", "--clip", tmp_path / "clip") == 0
    assert len(read(tmp_path / "o" / "referring.json")) == 2
    embed = net.text_model(
        FastSAM2.from_checkpoint(ckpts["clip"]).cfg, "x", str(tmp_path / "clip"), torch.device("cpu")
    )
    expected = load_clip(tmp_path / "clip").encode_text(load_tokenizer(tmp_path / "clip")(["a cat"]))
    torch.testing.assert_close(embed(["a cat"]), torch.nn.functional.normalize(expected, dim=-1).detach())


# ---- refusals


def test_refusals(tmp_path, capsys, photos, ckpts):
    """One sentence, exit 2, and nothing is left: the folder did not exist before and does not after."""
    photo, out = photos / "000000000009.png", tmp_path / "out"
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((50, 70), np.uint8)).save(tmp_path / "empty.png")
    Image.fromarray(np.ones((5, 7), np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "refs.json").write_text('[{"image_id": 5, "split": "val", "sentences": [{"sent_id": 1, "sent": "x"}]}]')
    random, hashed = ("--ckpt", ckpts["random"], "--out", out), ("--ckpt", ckpts["hash"], "--out", out)
    click = (photo, *hashed, "--task", "interactive")
    cases = [
        ((*click, "--point", "70,10"), "outside the picture"),
        ((*click, "--point=-1,10"), "outside the picture"),
        ((*click, "--point", "1,2,3"), "label 3"),
        ((*click, "--point", "1;2"), "expected x,y"),
        ((*click, "--point", "1,nan"), "expected x,y"),
        ((*click, "--point", "1,2,0"), "clicks beside it only"),
        ((*click, "--box", "5,5,80,9"), "outside the picture"),
        ((*click, "--box", "9,9,5,5"), "ends before it begins"),
        ((*click, "--box", "9,9,5"), "expected x0,y0,x1,y1"),
        ((*click, "--mask", tmp_path / "empty.png"), "all 0"),
        ((*click, "--mask", tmp_path / "small.png"), "expected 70x50"),
        ((*click, "--mask", tmp_path / "text.png"), "cannot be read as a picture"),
        ((*click, "--text", " "), "is empty"),
        (click, "needs a prompt"),
        ((*click, "--object"), "needs a prompt"),
        ((photos, *hashed, "--task", "interactive", "--point", "1,1"), "prompts are about one"),
        ((photo, *hashed, "--task", "panoptic", "--point", "1,1"), "takes no prompt"),
        ((photo, *random, "--task", "interactive", "--text", "a dog"), "no text model"),
        ((photo, *random, "--task", "referring", "--text", "a dog"), "no text model"),
        ((photo, *hashed, "--task", "referring", "--point", "1,1"), "takes --text only"),
        ((photo, *hashed, "--task", "referring"), "needs a prompt"),
        ((photos, *hashed, "--task", "referring", "--refs", tmp_path / "refs.json"), "image 5"),
        ((photos, *hashed, "--task", "referring", "--refs", tmp_path / "refs.json", "--split", "test"), "no sentence"),
        ((photos, *hashed, "--task", "referring", "--refs", tmp_path / "text.png"), "is not json"),
        ((tmp_path / "text.png", *hashed, "--task", "panoptic"), "cannot be read as a picture"),
        ((photo, tmp_path / "text.png", *hashed, "--task", "panoptic"), "cannot be read as a picture"),
        ((tmp_path / "nothing", *hashed, "--task", "panoptic"), "no such file"),
        ((photo, photos, *hashed, "--task", "panoptic"), "both are image"),
        ((photo, "--ckpt", ckpts["stuff"], "--out", out, "--task", "instance"), "no class of things"),
        ((photo, "--ckpt", ckpts["bare"], "--out", out, "--task", "panoptic"), "names no image size"),
        ((photo, "--ckpt", tmp_path, "--out", out, "--task", "panoptic"), "not a checkpoint folder"),
        ((photo, *hashed, "--task", "panoptic", "--image-size", "10"), "--image-size"),
        ((photo, *hashed, "--task", "panoptic", "--image-size", "0x32"), "sides of at least 1 px"),
        ((photo, *hashed, "--task", "panoptic", "--segment-score", "2"), "--segment-score"),
        ((photo, "--ckpt", ckpts["compat"], "--out", out, "--task", "interactive", "--point", "1,1", "--box", "1,1,2,2"),
         "does not take these prompts"),
    ]  # fmt: skip
    for argv, said in cases:
        assert said in refused(capsys, *argv), argv
        assert not out.exists(), argv
    assert infer(photo, *hashed, "--task", "vis") == 2  # argparse: not a task
    assert not out.exists()


def test_results_are_not_overwritten(tmp_path, capsys, photos, ckpts):
    photo, args = photos / "000000000009.png", ("--ckpt", ckpts["bare"], "--image-size", "32x32", "--out", tmp_path)
    assert infer(photo, *args, "--task", "semantic") == 0
    before = (tmp_path / "semantic.json").read_bytes()
    assert [c["id"] for c in json.loads(before)["categories"]] == [1, 2, 3, 4]  # the checkpoint names no numbers
    assert "holds semantic.json already" in refused(capsys, photo, *args, "--task", "semantic")
    assert (tmp_path / "semantic.json").read_bytes() == before
    assert infer(photo, *args, "--task", "panoptic") == 0  # another task finds room beside it
    (tmp_path / "instance_overlays").mkdir()
    assert "holds instance_overlays already" in refused(capsys, photo, *args, "--task", "instance")


def test_a_failure_while_writing_leaves_nothing(tmp_path, photos, ckpts, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "panoptic.json")

    monkeypatch.setattr("utils.run.write_text_atomic", full)
    assert infer(photos, "--ckpt", ckpts["hash"], "--out", tmp_path / "out", "--task", "panoptic") == 2
    assert not (tmp_path / "out").exists()
