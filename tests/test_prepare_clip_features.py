"""data/prepare_clip_features.py on a rendered export: what is written, going on, --verify, refusals; into training."""

import functools
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.clip_features import check_features, index_features, read_features, write_features
from data.esam_views import clip_views, read_picture
from data.rgbd_clips import PreparedClips
from data.room_files import write_scannet
from data.scannet_samples import pack_features, read_index
from models.bifusion import BiFusion, ImageBranch, random_patch_weights
from utils import run
from utils.run import UserError

ROOT = Path(__file__).resolve().parents[1]
SIZE = (40, 64)  # 40 is no multiple of 16


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """raw/, and sv/ and mv/ with their indices."""
    root = tmp_path_factory.mktemp("rooms")
    write_scannet(root / "raw", 0, {"train": ["scene0000_00"], "val": ["scene0001_00"]}, 6, SIZE)
    for views in ("sv", "mv"):
        argv = [root / "raw", root / views, "--views", views, "--stride", 2, "--points", 300, "--pack-clip"]
        assert run.cli(script("prepare_scannet").main, [*map(str, argv)]) == 0
    return root


@pytest.fixture
def rooms(prepared, tmp_path) -> Path:
    """The same, in a folder that a test may change."""
    for name in ("raw", "sv", "mv"):
        for path in (p for p in (prepared / name).rglob("*") if p.is_file()):
            target = tmp_path / path.relative_to(prepared)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    return tmp_path


def indices(rooms: Path, views: str = "sv") -> list[Path]:
    return sorted((rooms / views).glob("*_infos_*.json"))


def prepare(rooms: Path, *argv: object, views: str = "sv") -> int:
    fixed = ["--index", *indices(rooms, views), "--raw", rooms / "raw", "--clip", "random"]
    return run.cli(script("prepare_clip_features").main, [*map(str, (*fixed, *argv))])


def refused(capsys, rooms: Path, *argv: object) -> str:
    assert prepare(rooms, *argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


def files(rooms: Path) -> dict[str, bytes]:
    return {p.relative_to(rooms).as_posix(): p.read_bytes() for p in sorted((rooms / "raw/clip_feat").rglob("*.*"))}


def branch(seed: int = 0) -> ImageBranch:
    made = ImageBranch()
    random_patch_weights(made, seed)
    return made


# ---- writing


def test_every_picture_once(rooms, capsys):
    assert prepare(rooms, views="mv") == 0 and prepare(rooms) == 0
    out = capsys.readouterr().out.splitlines()
    assert "6 files written" in out[0] and "0 files written, 6 kept" in out[1]  # frames 0, 2, 4 of two scenes
    image = branch()
    names = index_features([row for path in indices(rooms) for row in read_index(path)[1]])
    assert len(names) == len(files(rooms)) == 6
    for picture, feature in names.items():
        assert feature == picture.replace("2D/", "clip_feat/").replace(".jpg", ".pt")
        content = torch.load(rooms / "raw" / feature, weights_only=True)
        assert content["meta"] == {"weights": image.fingerprint(), "size": list(SIZE)}
        pixels = torch.from_numpy(read_picture(rooms / "raw" / picture)).permute(2, 0, 1)
        pix, whole = image.encode(pixels[None])
        assert content["pix"].shape == (192, 6, 8) and content["global"].shape == (768,)
        assert torch.equal(content["pix"], pix[0].half()) and torch.equal(content["global"], whole[0].half())
        assert (rooms / "raw" / feature).stat().st_size < 192 * 6 * 8 * 2 + 768 * 2 + 4096  # and no larger storage


def test_goes_on_and_workers_and_devices_change_nothing(rooms, capsys):
    assert prepare(rooms) == 0
    before = files(rooms)
    for name in list(before)[1:3]:
        (rooms / name).unlink()
    assert prepare(rooms, "--workers", 2, "--device-list", "cpu, cpu") == 0
    assert "2 files written" in capsys.readouterr().out.splitlines()[-1] and files(rooms) == before
    assert prepare(rooms, "--out", rooms / "elsewhere") == 0
    again = {p.relative_to(rooms / "elsewhere").as_posix(): p.read_bytes() for p in (rooms / "elsewhere").rglob("*.pt")}
    assert again == {name.removeprefix("raw/"): content for name, content in before.items()}


def test_nothing_half_written(rooms, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert prepare(rooms) == 2
    assert not files(rooms) and not list((rooms / "raw").rglob("*.tmp"))


def test_names_of_the_index(rooms):
    rows = [row for path in indices(rooms) for row in read_index(path)[1]]
    pack_features(rows, rooms / "raw", ".half.pt")
    assert all(name.endswith(".half.pt") for name in index_features(rows).values())
    mv = [{"img_paths": ["2D/a/color/2D.jpg", "2D/a/color/1.jpg"]}]
    assert index_features(mv) == {  # the first part of the path only
        "2D/a/color/2D.jpg": "clip_feat/a/color/2D.pt", "2D/a/color/1.jpg": "clip_feat/a/color/1.pt"
    }  # fmt: skip


# ---- verify


def test_verify(rooms, capsys):
    assert prepare(rooms) == 0 and prepare(rooms, "--verify", 20) == 0
    assert "6 of 6 files verified: relative L2 at most 0.000" in capsys.readouterr().out
    before = files(rooms)
    image, name = branch(), next(iter(before))
    pixels = torch.zeros(1, 3, *SIZE)  # not normalised, as in the released precomputation
    pixels += torch.from_numpy(read_picture(rooms / "raw/2D/scene0000_00/color" / f"{Path(name).stem}.jpg")).permute(
        2, 0, 1
    )
    conv = torch.conv2d(torch.nn.functional.pad(pixels, (0, 0, 0, 8)), image.conv1_weight, stride=16)
    pix = torch.pixel_shuffle(conv, 2)
    write_features(rooms / name, pix[0], conv.mean((2, 3))[0], image.fingerprint(), SIZE)
    err = refused(capsys, rooms, "--verify", 20)
    assert "differs from what the network computes" in err and name in err
    (rooms / name).unlink()
    assert "no such feature file" in refused(capsys, rooms, "--verify", 20) and len(files(rooms)) == 5


# ---- refusals


def test_features_of_other_weights(rooms, capsys):
    assert prepare(rooms) == 0
    before = files(rooms)
    assert "other CLIP weights" in refused(capsys, rooms, "--seed", 1)
    assert "other CLIP weights" in refused(capsys, rooms, "--seed", 1, "--verify", 3)
    assert files(rooms) == before
    path = rooms / next(iter(before))
    read_features(path, branch().fingerprint(), SIZE)
    check_features(path, branch().fingerprint(), SIZE)
    with pytest.raises(UserError, match="picture of 64x40 px, the frame has 64x48"):
        read_features(path, size=(48, 64))


def test_damaged_files(rooms, capsys):
    assert prepare(rooms) == 0
    path = rooms / next(iter(files(rooms)))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.unlink()
        path.write_bytes(content)
        err = refused(capsys, rooms)
        assert "damaged or no feature file" in err and str(path) in err
    for content in ({"pix": 1}, [1], {"pix": torch.zeros(192, 6, 8), "global": torch.zeros(768), "meta": {}}):
        torch.save(content, path)
        with pytest.raises(UserError, match="no feature file"):
            read_features(path)


def test_refusals(rooms, capsys):
    assert "no such folder" in refused(capsys, rooms, "--raw", rooms / "absent")
    assert "no such weight file" in refused(capsys, rooms, "--clip", rooms / "absent")
    assert "no such index" in refused(capsys, rooms, "--index", rooms / "absent.json")
    assert "not a device" in refused(capsys, rooms, "--device-list", "cpu,abacus")
    assert "--workers -1" in refused(capsys, rooms, "--workers", "-1")
    image = next((rooms / "raw/2D/scene0000_00/color").glob("0.jpg"))
    image.unlink()
    assert "cannot be read as a picture" in refused(capsys, rooms)
    image.write_bytes(b"text")
    assert "cannot be read as a picture" in refused(capsys, rooms, "--workers", 1)
    with pytest.raises(ValueError, match="not finite"):
        write_features(rooms / "a.pt", torch.full((192, 6, 8), 1e6), torch.zeros(768), "w", SIZE)
    with pytest.raises(ValueError, match="of a picture of"):
        write_features(rooms / "a.pt", torch.zeros(192, 5, 8), torch.zeros(768), "w", SIZE)
    assert not (rooms / "a.pt").exists()


# ---- into training


@pytest.mark.parametrize("views", ["sv", "mv"])
def test_training_reads_them(rooms, views):
    """Features where there are files, pictures elsewhere; the fused features agree within 1e-3; fallbacks are counted."""
    assert prepare(rooms, views=views) == 0
    clips = PreparedClips(indices(rooms, views)[0], rooms / "raw", points=300)
    full = clip_views(clips[0], pictures=True)
    assert all(v.features is not None and v.picture is None for v in full)
    torch.manual_seed(0)
    model = BiFusion(8)
    random_patch_weights(model.image, 0)
    torch.nn.init.normal_(model.delta.weight, std=0.1)
    model.expects_features = True
    x = [torch.randn(len(v), 8) for v in full]
    want, figures = model(x, full)
    assert figures["fallback_count"] == 0 and figures["valid_ratio"] == 1
    for path in list((rooms / "raw/clip_feat/scene0000_00").rglob("0.pt")):
        path.unlink()
    some = clip_views(clips[0], pictures=True)
    assert sum(v.features is None for v in some) == 1 and sum(v.picture is not None for v in some) == 1
    got, figures = model(x, some)
    assert figures["fallback_count"] == 1
    for a, b in zip(want, got, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


def test_clip_snapshot_names_its_size(rooms, capsys, tmp_path):
    torch.save({"visual.conv1.weight": torch.zeros(64, 3, 32, 32)}, tmp_path / "b32.pt")
    assert "take a CLIP with a ViT-B/16" in refused(capsys, rooms, "--clip", tmp_path / "b32.pt")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")  # an index that is none
    (tmp_path / "index.json").write_text(json.dumps({"a": 1}))
    assert "is no index" in refused(capsys, rooms, "--index", tmp_path / "index.json")
