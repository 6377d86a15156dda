"""eval/infer_captions.py with a tiny random model: results, sheets, maps, refusals, nothing left half-written."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.caption_vocab import NEVER_SAID
from data.coco_captions import ImageReader
from models.caption_decoding import beam_search
from models.fsgr import FSGR, preset
from utils import run

ROOT = Path(__file__).resolve().parents[1]
VOCAB = ["<unk>", "<pad>", "<bos>", "<eos>", *"a man dog cat on the in street rides sleeps & red".split()]
NAMES = ["person", "dog", "cat"]


def infer(*argv: object) -> int:
    spec = importlib.util.spec_from_file_location("infer_captions", ROOT / "eval" / "infer_captions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run.cli(module.main, [*map(str, argv), "--device", "cpu"])


def refused(capsys, *argv: object) -> str:
    assert infer(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for arch in ("fsgr", "m2"):
        torch.manual_seed(1)
        model = FSGR(preset("tiny", VOCAB, NAMES, arch, image_size=64))
        out = tmp_path_factory.mktemp(arch)
        run.save_checkpoint(out, 1, model, model.config_dict(), {})
        found[arch] = out / "last"
    return found


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, (name, size) in enumerate({"b.png": (90, 40), "a.jpg": (40, 90), "c & d.JPG": (64, 64)}.items()):
        pixels = np.random.default_rng(k).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture, not looked at")
    return folder


def results(out: Path) -> dict:
    items = json.loads((out / "captions.json").read_text())
    assert all(set(x) == {"image_id", "caption"} for x in items)
    return {x["image_id"]: x["caption"] for x in items}


@pytest.mark.parametrize("arch", ["fsgr", "m2"])
def test_captions_are_those_of_the_model(tmp_path, photos, ckpts, arch):
    out = tmp_path / "out"
    assert infer(photos, "--ckpt", ckpts[arch], "--out", out, "--batch-size", 2, "--beam", 3, "--max-len", 7) == 0
    model, reader, want = FSGR.from_checkpoint(ckpts[arch]).eval(), ImageReader(64), {}
    for path in sorted(photos.glob("*.[jpJ]*")):
        with torch.no_grad():
            memory, _ = model.encode(reader.tensor(reader.square(path))[None])
        ids = beam_search(model.decoder, memory, 3, 7, never=NEVER_SAID).tokens[0, 0].tolist()
        words = [VOCAB[i] for i in ids[: ids.index(3) if 3 in ids else None] if i not in (1, 2)]
        want[path.stem] = " ".join(w for k, w in enumerate(words) if k == 0 or w != words[k - 1])
    got = results(out)
    assert got == want and list(got) == ["a", "b", "c & d"] and any(got.values())
    assert sorted(p.name for p in out.iterdir()) == ["captions.json", "captions.json.meta.json", "sheet_1.png"]
    about = json.loads((out / "captions.json.meta.json").read_text())
    assert len(about["inputs"]) == 3 and about["config"]["beam"] == 3 and about["config"]["arch"] == arch
    assert np.array(Image.open(out / "sheet_1.png")).shape[1] == 3 * (90 + 4) + 4


def test_methods_and_repeats(tmp_path, photos, ckpts):
    found = {}
    for name, flags in {
        "beam 1": ("--beam", 1), "greedy": ("--method", "greedy"), "sample": ("--method", "sample"),
        "again": ("--method", "sample"), "other": ("--method", "sample", "--seed", 1),
        "repeats": ("--method", "sample", "--keep-repeats"),
    }.items():  # fmt: skip
        argv = (photos, "--ckpt", ckpts["m2"], "--out", tmp_path / name, "--sheet", "none")
        assert infer(*argv, *flags) == 0
        found[name] = results(tmp_path / name)
        assert len(list((tmp_path / name).iterdir())) == 2
    assert found["beam 1"] == found["greedy"] and found["sample"] == found["again"] != found["other"]
    assert found["repeats"] != found["sample"]
    for i, text in found["repeats"].items():
        words = text.split()
        assert found["sample"][i] == " ".join(w for k, w in enumerate(words) if k == 0 or w != words[k - 1])


def test_coco_names_give_numbers(tmp_path, photos, ckpts):
    names = ("COCO_val2014_000000000042.jpg", "000000581929.jpg")
    for name in names:
        shutil.copy(photos / "a.jpg", photos.parent / name)
    paths = [photos.parent / name for name in names]
    assert infer(*paths, "--ckpt", ckpts["fsgr"], "--out", tmp_path / "out") == 0
    assert list(results(tmp_path / "out")) == [42, 581929]
    assert infer(*paths, photos / "a.jpg", "--ckpt", ckpts["fsgr"], "--out", tmp_path / "mixed") == 0
    assert list(results(tmp_path / "mixed")) == ["COCO_val2014_000000000042", "000000581929", "a"]


def test_html_and_maps(tmp_path, photos, ckpts):
    out = tmp_path / "out"
    assert infer(photos, "--ckpt", ckpts["fsgr"], "--out", out, "--sheet", "html", "--semantic-map") == 0
    page = (out / "sheet.html").read_text()
    assert page.count("<figure>") == 3 and page.count("data:image/jpeg;base64,") == 3 and "c &amp; d.JPG" in page
    assert {p.name for p in out.glob("*.png")} == {f"{x}.semantic.png" for x in ("a", "b", "c & d")}
    pixels = np.array(Image.open(out / "a.semantic.png"))
    assert pixels.shape[1] == 320 and pixels.shape[0] > 320


def test_limit_is_partial(tmp_path, photos, ckpts, capsys):
    assert infer(photos, "--ckpt", ckpts["fsgr"], "--out", tmp_path / "out", "--limit", 2) == 0
    assert "2 captions, partial (--limit)" in capsys.readouterr().out and len(results(tmp_path / "out")) == 2


def test_refusals_leave_nothing(tmp_path, photos, ckpts, capsys):
    out, ckpt = tmp_path / "out", ("--ckpt", ckpts["fsgr"], "--out", tmp_path / "out")
    (tmp_path / "z.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    assert "z.jpg: cannot be read as a picture" in refused(capsys, photos, tmp_path / "z.jpg", *ckpt)
    assert "notes.txt: cannot be read" in refused(capsys, photos / "notes.txt", *ckpt)
    assert "no such file or folder" in refused(capsys, tmp_path / "absent.jpg", *ckpt)
    assert "holds no pictures" in refused(capsys, tmp_path / "empty", *ckpt)
    assert "both are image 'a'" in refused(capsys, photos, photos / "a.jpg", *ckpt)
    assert "--beam 0" in refused(capsys, photos, *ckpt, "--beam", 0)
    assert "knows 54 positions" in refused(capsys, photos, *ckpt, "--max-len", 55)
    assert "not a checkpoint folder" in refused(capsys, photos, "--ckpt", tmp_path, "--out", out)
    m2 = ("--ckpt", ckpts["m2"], "--out", out)
    assert "has no semantic head" in refused(capsys, photos, *m2, "--semantic-map")
    assert not out.exists()
    out.write_text("a file")
    assert "is a file" in refused(capsys, photos, *ckpt)
    out.unlink()
    assert infer(photos, *ckpt) == 0
    before = (out / "captions.json").read_bytes()
    assert "holds captions already" in refused(capsys, photos, *ckpt)
    assert (out / "captions.json").read_bytes() == before


def test_more_beams_than_words_are_refused_before_any_work(tmp_path, photos, ckpts, capsys):
    broken, most = tmp_path / "z.jpg", len(VOCAB) - 3
    broken.write_text("no picture")  # would be refused as soon as it is opened
    for flags in (("--beam", most + 1), ("--beam", len(VOCAB) + 1, "--allow-unk")):
        argv = (broken, "--ckpt", ckpts["fsgr"], "--out", tmp_path / "out", *flags)
        n = len(VOCAB) if "--allow-unk" in flags else most
        assert f"this model can say {n} words; choose at most that" in refused(capsys, *argv)
    for name, flags in {"a": ("--beam", most), "b": ("--beam", len(VOCAB), "--allow-unk")}.items():
        assert infer(photos, "--ckpt", ckpts["fsgr"], "--out", tmp_path / name, "--sheet", "none", *flags) == 0
    argv = (photos, "--ckpt", ckpts["fsgr"], "--out", tmp_path / "c", "--sheet", "none", "--beam", most + 1)
    assert infer(*argv, "--method", "greedy") == 0  # which has no beams


@pytest.mark.parametrize("change", [{"heads": 0}, {"clip": {"patch": 0}}])
def test_sizes_of_zero_in_a_config(tmp_path, photos, ckpts, capsys, change):
    shutil.copytree(ckpts["fsgr"], tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        config["model"][key] = config["model"][key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    err = refused(capsys, photos, "--ckpt", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert "config.json: not a configuration of this version" in err and not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path, photos, ckpts, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "sheet_1.png")

    monkeypatch.setattr("utils.overlay.save_png", full)
    assert infer(photos, "--ckpt", ckpts["fsgr"], "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
