"""data/referring_manifest.py: every way to write a mask, every refusal, what polygons hide; data/vessel_questions.py."""

import functools
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.referring_manifest import read_manifest
from data.vessel_items import VesselItem
from data.vessel_questions import ABSENT, BACKGROUND, NONE, VesselQuestions, answer, question
from data.vessels import VesselPatches, open_vessels
from utils import run
from utils.masks import rle_encode
from utils.run import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
H, W = 40, 60


def square(y0, y1, x0, x1) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


RING = square(5, 25, 5, 25) & ~square(9, 21, 9, 21)
BAR = square(28, 34, 10, 50)
OUTER, INNER = [5, 5, 25, 5, 25, 25, 5, 25], [9, 9, 21, 9, 21, 21, 9, 21]


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def write(folder: Path, *lines: dict) -> Path:
    """A manifest of pictures 0.png, 1.png, ... and the mask files that the lines may name."""
    for k in range(max(3, len(lines))):
        noise = np.random.default_rng(k).integers(60, 200, (H, W, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    for name, mask in {"ring": RING, "bar": BAR, "none": RING & False, "fov": square(2, 38, 2, 58)}.items():
        Image.fromarray(grey(mask)).save(folder / f"{name}.png")
    Image.fromarray(grey(RING[1:])).save(folder / "short.png")
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(json.dumps({"image": f"{k}.png", **x}) for k, x in enumerate(lines)) + "\n\n")
    return path


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("check_dataset", ROOT / "data" / "check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what can be written


def test_masks_as_files_codes_and_lists(tmp_path):
    runs = {"size": [H, W], "counts": [0, 3, H * W - 3]}
    path = write(
        tmp_path,
        {"mask": "ring.png", "patient": "p1", "split": "train"},
        {"mask": rle_encode(BAR), "patient": "p2", "split": "val", "fov": "fov.png", "text": "the bar", "second": "ring.png"},
        {"mask": ["ring.png", rle_encode(BAR), runs], "text": ["the ring", "the bar", "the corner"], "patient": "p3",
         "split": "test", "fov": "all", "name": "third"},
    )  # fmt: skip
    for found in (read_manifest(path), read_manifest(tmp_path), open_vessels(tmp_path), open_vessels(path)):
        assert found.splits == ["train", "val", "test"] and [x.name for x in found.items] == ["0", "1", "third"]
    a, b, c = found.items
    assert a.text == ("the blood vessels",) and a.mask_path == tmp_path / "ring.png" and a.fov_source.startswith("est")
    assert (a.load()["mask"] == RING).all() and (b.load()["mask"] == BAR).all()
    assert (
        b.fov_source == "file" and (b.load()["fov"] == square(2, 38, 2, 58)).all() and (b.second((H, W)) == RING).all()
    )
    corner = square(0, 3, 0, 1)  # runs go down the columns
    y = c.load()
    assert (y["masks"] == [RING, BAR, corner]).all() and (y["mask"] == RING | BAR | corner).all() and y["fov"].all()
    assert c.text == ("the ring", "the bar", "the corner") and c.fov_source == "whole picture"
    assert [note for note in found.notes if "field of view" in note and "1 of 3" in note]


def test_absent_patients_splits_and_declared_empty_masks(tmp_path):
    path = write(tmp_path, {"mask": "none.png", "empty": True}, {"mask": rle_encode(RING & False), "empty": True},
                 {"mask": ["ring.png", "none.png"], "text": ["a", "b"], "empty": [False, True]})  # fmt: skip
    found = read_manifest(path)
    assert found.splits == ["train"] and [
        note for note in found.notes if note.startswith("3 of 3 lines name no patient")
    ]
    assert [x.load()["masks"].sum((1, 2)).tolist() for x in found.items] == [[0], [0], [RING.sum(), 0]]
    assert len({x.person for x in found.items}) == 3


def test_polygons_need_a_word_and_are_measured(tmp_path):
    lines = {"mask": [OUTER, INNER], "fov": "all"}, {"mask": [[OUTER], [INNER]], "text": ["a", "b"], "fov": "all"}
    path = write(tmp_path, *lines)
    with pytest.raises(
        UserError, match=r"line 1: the mask is of polygons.*or allow polygons explicitly \(--polygons\)"
    ):
        read_manifest(path)
    found = open_vessels(path, polygons=True)
    filled, hole = square(5, 25, 5, 25), square(9, 21, 9, 21)
    assert (found.items[0].load()["mask"] == filled).all()  # not the ring: polygons cannot express the hole
    assert (found.items[1].load()["masks"] == [filled, hole]).all()
    note = next(n for n in found.notes if n.startswith("WARNING"))
    drawn = 2 * (filled.sum() + hole.sum())
    assert (
        f"2 pictures have polygons for masks: their areas sum to {drawn / (2 * filled.sum() + hole.sum()):.3f}" in note
    )
    assert "144 px lie in more than one" in note and "1 polygons lie wholly inside" in note and "measures 20 px" in note


# ---- refusals

LINES = [  # a second line beside a good one; what it says
    ({"mask": "short.png"}, r"short.png: is 60 x 39 px \(W x H\), expected 60 x 40"),
    ({"mask": "0.png"}, r"0.png: has colours"),
    ({"mask": "none.png"}, "none.png: the mask is empty"),
    ({"mask": "absent.png"}, "line 2: names .*absent.png, which is no file"),
    ({"mask": "ring.png", "fov": "absent.png"}, "line 2: names .*absent.png"),
    ({"mask": "ring.png", "second": "absent.png"}, "line 2: names .*absent.png"),
    ({"mask": "ring.png", "image": "absent.png"}, "absent.png: no such file, which .*line 2 names, expected"),
    ({"mask": ["ring.png"], "text": ["a", "b"]}, "line 2: 1 masks for 2 texts, expected as many"),
    ({"mask": ["ring.png", "bar.png"], "text": ["a"]}, "line 2: 2 masks for 1 texts"),
    ({"mask": ["ring.png", "bar.png"]}, "a list of masks only with a list of texts"),
    ({"mask": ["ring.png", "bar.png"], "text": ["a", "a"]}, "without repeats"),
    ({"mask": rle_encode(BAR.T)}, r"line 2 \(1\): mask of 60 x 40 \(H x W\), expected 40 x 60"),
    ({"mask": {"size": [H, W], "counts": [5, 5]}}, "line 2 .*damaged"),
    ({"mask": {"size": [H, W], "counts": [-5, H * W + 5]}}, "line 2: the mask is"),
    ({"mask": {"size": [H], "counts": "abc"}}, "line 2: the mask is"),
    ({"mask": {"size": [H, W], "counts": "abc"}}, "line 2 .*damaged"),
    ({"mask": rle_encode(RING & False)}, r"line 2 \(1\): the mask is empty"),
    ({"mask": [[5, 5, 30, 5, 70, 25]]}, r"line 2.*x 5..70, y 5..25, expected 0..60 and 0..40 px"),
    ({"mask": [[5, 5, 30, -9, 30, 25]]}, r"y -9..25"),
    ({"mask": [[5, 5, 30, float("nan"), 30, 25]]}, r"y nan..nan"),
    ({"mask": [[5, 5, 30, 5, 30]]}, "a polygon of 5 numbers"),
    ({"mask": 3}, "line 2: the mask is 3"),
    ({"mask": "ring.png", "split": "training"}, "line 2: split 'training', expected one of train, val, test"),
    ({"mask": "ring.png", "patient": 7}, "line 2: patient is 7, expected text in quotes"),
    ({"mask": "ring.png", "text": ""}, 'line 2: text is ""'),
    ({"mask": "ring.png", "empty": "yes"}, 'line 2: empty is "yes"'),
    ({"mask": "ring.png", "masks": []}, "line 2: has keys image, mask, masks, expected"),
    ({}, "line 2: has keys image, expected image and mask"),
    ({"mask": "ring.png", "name": "../x"}, "line 2: name '../x', expected"),
    ({"mask": "ring.png", "name": "0"}, r"1.png: is called '0' like .*0.png of the split train"),
    ({"mask": "ring.png", "patient": "p0", "split": "test"}, "patient 'p0' is in split test, and in train"),
    ({"mask": "ring.png", "image": "0.png", "patient": "p9", "split": "test"}, "is the picture .*0.png again"),
]


@pytest.mark.parametrize("line, pattern", LINES, ids=[str(k) for k in range(len(LINES))])
def test_refusals_name_file_found_expected_and_remedy(tmp_path, line, pattern):
    path = write(tmp_path, {"mask": "bar.png", "patient": "p0"}, line)
    with pytest.raises(UserError, match=pattern) as e:
        [x.load() for x in open_vessels(path, polygons=True).items]
    said = str(e.value)
    assert "\n" not in said and ("expected" in said or "take the mask" in said) and re.search(r"; \w+", said), said


def test_files_that_are_no_manifest(tmp_path):
    path = write(tmp_path, {"mask": "bar.png"})
    for text, pattern in (("{", "line 1: is not json"), ("[]", "line 1: has list"), ("\n", "holds no picture")):
        path.write_text(text)
        with pytest.raises(UserError, match=pattern):
            open_vessels(path)
    path.write_bytes(b"\xff\xff")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path / "absent.jsonl")


# ---- check_dataset


def test_check_dataset_counts_and_draws(tmp_path, capsys):
    path = write(tmp_path, {"mask": ["ring.png", "bar.png"], "text": ["the ring", "the bar"], "fov": "fov.png"},
                 {"mask": [[OUTER]], "text": ["the ring"], "split": "test"})  # fmt: skip
    assert run.cli(script().main, ["manifest", str(path)]) == 2
    assert "--polygons" in capsys.readouterr().err
    sheet = tmp_path / "sheet.png"
    flags = ["--polygons", "--image-size", "16", "--batch-size", "2", "--show", str(sheet)]
    assert run.cli(script().main, ["manifest", str(path), *flags]) == 0
    out = capsys.readouterr().out
    assert "WARNING 1 pictures have polygons" in out and "objects: the bar, the ring" in out
    assert f"masked {100 * (RING | BAR).sum() / (36 * 56):.2f}/" in out and "from file" in out and sheet.is_file()


# ---- questions


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    path = write(folder, {"mask": ["ring.png", "bar.png"], "text": ["the ring", "the bar"], "fov": "fov.png"},
                 {"mask": "ring.png", "fov": "all"})  # fmt: skip
    return VesselPatches(open_vessels(path).items, 24, seed=1, per_epoch=200, objects=True)


def test_answers_have_a_mask_per_seg_and_masks_are_those_of_the_patch(patches):
    questions, kinds, absent = VesselQuestions(patches), Counter(), Counter()
    for k in range(200):
        x, patch = questions[1, k], patches[1, k]
        texts = patches.items[k % 2].text
        truth = {**dict(zip(texts, patch["masks"], strict=True)), BACKGROUND: patch["fov"] & ~patch["mask"]}
        there = [p for p in x["phrases"] if p in truth and truth[p].any()]
        assert x["answer"] == answer(len(there)) and x["answer"].count("[SEG]") == len(x["masks"]) == len(there)
        assert x["masks"].shape[1:] == (24, 24) and x["masks"].dtype == bool
        for phrase, mask in zip(there, x["masks"], strict=True):
            assert np.array_equal(mask, truth[phrase]) and phrase in x["text"]
        assert np.array_equal(x["image"], patch["image"]) and x["text"] == question(x["phrases"])
        kinds[x["kind"]] += 1
        absent[x["kind"]] += x["answer"] == NONE
        assert x["kind"] != "several" or len(there) == len(x["phrases"])
        assert (x["kind"] == "absent") == (x["phrases"][0] in ABSENT)
    assert kinds["object"] > 60 and kinds["background"] > 40 and min(kinds["several"], kinds["absent"]) > 5
    assert absent["absent"] == kinds["absent"] and absent["object"] > 0 and not absent["several"]


def test_questions_repeat_exactly_and_follow_the_shares(patches):
    again = VesselQuestions(patches)
    for key in ((0, 3), (1, 7), 3):
        a, b = VesselQuestions(patches)[key], again[key]
        assert a["text"] == b["text"] and np.array_equal(a["masks"], b["masks"])
    only = VesselQuestions(patches, {"background": 2.0})
    assert {only[k]["text"] for k in range(20)} == {f"Please segment {BACKGROUND}."} and len(only) == 200
    whole = VesselQuestions(VesselPatches(patches.items[:1], None, per_epoch=60, objects=True), {"several": 1})
    orders = {tuple(whole[k]["phrases"]) for k in range(60)}
    assert len(orders) == 6 and {frozenset(o) for o in orders} == {frozenset(["the ring", "the bar", BACKGROUND])}


def test_words():
    assert question(["the blood vessels"]) == "Please segment the blood vessels."
    assert question(["a", "b"]) == "Please segment (1) a (2) b."
    assert [answer(n) for n in range(3)] == [NONE, "It is [SEG].", "(1) [SEG] (2) [SEG]."]
    assert VesselItem("a", Path("a.png")).text == ("the blood vessels",)


@pytest.mark.parametrize("kinds", [{"vessel": 1.0}, {"object": -1.0, "absent": 2.0}, {"object": 0.0}])
def test_questions_refuse_unknown_shares(patches, kinds):
    with pytest.raises(ValueError, match="VesselQuestions: kinds"):
        VesselQuestions(patches, kinds)
    with pytest.raises(ValueError, match="objects=True"):
        VesselQuestions(VesselPatches(patches.items, 8))
