"""eval/infer_scene.py in process: files that the scorer reads, meshes, turned worlds, sentences about bad input."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data.room_files import NAMES, write_room, write_scannet
from data.rooms import CLASSES, Room
from data.scannet import benchmark_labels, read_label_map, read_ply, read_reconstruction
from data.scene_results import class_ids
from models.bifusion import random_patch_weights
from models.esam import ESAM, ESAMConfig
from models.res16unet import Res16UNetConfig
from utils import run
from utils.ply_files import write_ply
from utils.scannet_classes import SCANNET20, SCANNET200
from utils.scannet_files import read_instances, read_semantic, write_labels

ROOT = Path(__file__).resolve().parents[1]
SIZE, N = (48, 64), 3
ROOM = Room(0, 0, SIZE, colour_noise=0, lap=24)
EASY = ("--device", "cpu", "--points", "1500", "--score", "0", "--min-points", "5")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INFER = script("infer_scene").main


def checkpoint(folder: Path, **changes) -> Path:
    """A small network that learned nothing."""
    torch.manual_seed(0)
    backbone = Res16UNetConfig(stem=8, planes=(8,) * 8, layers=(1,) * 8, kernel_size=3)
    cfg = {"classes": CLASSES, "stage": "mv", "voxel": 0.05, "dim": 16, "heads": 2, "ffn": 16, "merge_hidden": 16}
    model = ESAM(ESAMConfig(backbone=backbone, **{**cfg, **changes}))
    for p in model.decoder.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)  # sure enough of itself to find something
    if model.bi_encoder is not None:
        random_patch_weights(model.bi_encoder.image, 0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config_dict()))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """room/, and networks of stage mv and sv."""
    base = tmp_path_factory.mktemp("made")
    write_room(base / "room", ROOM, N)
    checkpoint(base / "mv")
    checkpoint(base / "sv", stage="sv", route="bif", agnostic=True)
    return base


def infer(made: Path, out: Path, *more, folder="room", ckpt="mv") -> dict:
    """-> the only scene of summary.json"""
    argv = [str(made / folder), "--ckpt", str(made / ckpt), "--out", str(out), *EASY, *map(str, more)]
    assert run.cli(INFER, argv) == 0
    return json.loads((out / "summary.json").read_text())["scenes"][Path(folder).name]


def files_of(folder: Path) -> dict[str, bytes]:
    """Content by name, without times and pictures of times."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "timing" not in p.parts and not p.name.endswith("meta.json")
    }


# ---- files


def test_all_files_tell_the_same(made, tmp_path, capsys):
    out = tmp_path / "out"
    scene = infer(made, out, "--turntable")
    assert "ms a frame" in capsys.readouterr().out
    with np.load(out / "npz" / "room.npz") as f:
        z = dict(f)
    M = z["masks"].shape[1]
    assert len(z["ids"]) > 1 and len(z["points"]) == M and scene["frames"] == N
    found = read_instances(out / "room.txt", M)
    assert np.array_equal(found.masks, z["masks"]) and (np.diff(found.scores) <= 0).all()
    assert found.labels.tolist() == z["labels"].tolist() and np.allclose(found.scores, z["scores"])
    assert set(found.labels) <= {NAMES[c][1] for c in CLASSES[2:]}
    assert np.array_equal(read_semantic(out / "semantic" / "room.txt", M), z["semantic"])
    assert set(z["semantic"]) <= {NAMES[c][1] for c in CLASSES}
    xyz, colour, _ = read_ply(out / "ply" / "room.ply")
    assert np.array_equal(xyz, z["points"]) and colour.max() > 0
    assert [o["id"] for o in scene["objects"]] == z["ids"].tolist()
    assert [o["points"] for o in scene["objects"]] == z["masks"].sum(1).tolist()
    rows = list(csv.DictReader(open(out / "timing" / "room.csv", encoding="utf-8")))
    assert [r["frame"] for r in rows] == ["0", "1", "2"] and all(float(r["network_s"]) > 0 for r in rows)
    assert Image.open(out / "pictures" / "room.png").size[0] > 600
    assert (out / "pictures" / "room.mp4").stat().st_size > 1000
    meta = json.loads((out / "summary.json.meta.json").read_text())
    assert len(meta["inputs"]) == 2 * N and meta["checkpoint_sha256"] and meta["config"]["filters"]["min_points"] == 5
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [
            "npz",
            "pictures",
            "ply",
            "pred_mask",
            "room.txt",
            "semantic",
            "summary.json",
            "summary.json.meta.json",
            "timing",
        ]
    )


def test_the_same_again_and_labels_are_never_opened(made, tmp_path):
    shutil.copytree(made / "room", tmp_path / "room")
    for kind in ("instance", "label"):
        for path in (tmp_path / "room" / kind).iterdir():
            path.write_bytes(b"no picture")
    infer(made, tmp_path / "a")
    infer(tmp_path, tmp_path / "b", ckpt=made / "mv")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_single_views_with_pictures(made, tmp_path):
    scene = infer(made, tmp_path / "out", ckpt="sv")
    assert {o["class"] for o in scene["objects"]} == {"object"} and {o["class_id"] for o in scene["objects"]} == {1}


def test_a_scene_without_objects_is_no_error(made, tmp_path):
    assert infer(made, tmp_path / "out", "--score", "0.999")["objects"] == []
    assert (tmp_path / "out" / "room.txt").read_text() == "" and (tmp_path / "out" / "pictures" / "room.png").is_file()


def test_every_limit_and_all_points(made, tmp_path):
    scene = infer(made, tmp_path / "out", "--every", 2, "--limit", 1, "--points", 0)
    rows = list(csv.DictReader(open(tmp_path / "out" / "timing" / "room.csv", encoding="utf-8")))
    assert scene["frames"] == 1 and [(r["frame"], r["points"]) for r in rows] == [("0", str(SIZE[0] * SIZE[1]))]


def test_superpoints_from_masks(made, tmp_path):
    own = tmp_path / "masks" / "room"
    own.mkdir(parents=True)
    for k in range(N):
        stripes = np.repeat(np.arange(SIZE[1])[None] // 16 + 1, SIZE[0], 0)
        Image.fromarray(stripes.astype(np.uint8)).save(own / f"{k}.png")
    scene = infer(made, tmp_path / "out", "--superpoints", tmp_path / "masks")
    assert scene["superpoints_per_frame"] == 4


def test_a_mesh_is_labelled_and_scored(made, tmp_path, capsys):
    names = ["scene0000_00", "scene0001_00"]
    write_scannet(tmp_path / "raw", 0, {"val": names}, frames=4, size=SIZE)
    label_map = read_label_map(tmp_path / "raw" / "meta_data" / "scannetv2-labels.combined.tsv", "scannet200")
    for name in names:
        scan = read_reconstruction(tmp_path / "raw" / "3D" / name, label_map, 200)
        write_labels(tmp_path / "gt" / f"{name}.txt", benchmark_labels(scan, "scannet200"))
    scan = str(tmp_path / "raw" / "3D" / "{scene}" / "{scene}_vh_clean_2")
    argv = [
        *(str(tmp_path / "raw" / "2D" / n) for n in names),
        "--ckpt",
        str(made / "mv"),
        "--out",
        str(tmp_path / "out"),
    ]
    argv += [*EASY, "--mesh", f"{scan}.ply", "--segments", f"{scan}.0.010000.segs.json"]
    assert run.cli(INFER, argv) == 0
    assert (
        run.cli(script("eval_scannet").main, ["--pred", str(tmp_path / "out"), "--labels", str(tmp_path / "gt")]) == 0
    )
    assert "mIoU" in capsys.readouterr().out
    with np.load(tmp_path / "out" / "npz" / f"{names[1]}.npz") as z:
        assert np.array_equal(z["points"], read_ply(Path(f"{scan}.ply".replace("{scene}", names[1])))[0])
    argv[argv.index("--out") + 1] = str(tmp_path / "none")
    argv[argv.index("--mesh") + 1] = f"{scan}.ply".replace("{scene}", names[0])
    assert "put {scene}" in refused(capsys, argv)
    argv[argv.index("--mesh") + 1] = f"{scan}.ply"
    path = Path(f"{scan}.0.010000.segs.json".replace("{scene}", names[0]))
    path.write_text('{"segIndices": [1, 2]}')
    assert "vertices" in refused(capsys, argv)
    xyz, colour, _ = read_ply(Path(f"{scan}.ply".replace("{scene}", names[0])))
    write_ply(tmp_path / "elsewhere.ply", xyz + np.float32([9, 0, 0]), colour)
    err = refused(capsys, [argv[0], *argv[2:-4], "--mesh", str(tmp_path / "elsewhere.ply")])
    assert "only 0% of what the frames of scene0000_00 saw" in err and not (tmp_path / "none" / "summary.json").exists()


def test_worlds_that_lie_on_their_side_are_turned(made, tmp_path):
    tilt = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # z becomes -y
    shutil.copytree(made / "room", tmp_path / "side")
    for path in (tmp_path / "side" / "pose").iterdir():
        np.savetxt(path, np.linalg.inv(tilt) @ np.loadtxt(path))
    side = infer(tmp_path, tmp_path / "a", folder="side", ckpt=made / "mv")
    straight = infer(made, tmp_path / "b")
    assert straight["turn"] == np.eye(3).tolist()
    up = np.array(side["turn"]) @ np.linalg.inv(tilt)[:3, :3] @ (0, 0, 1)
    assert np.degrees(np.arccos(up[2])) < 3
    a, b = (np.load(p)["points"] for p in (tmp_path / "a" / "npz" / "side.npz", tmp_path / "b" / "npz" / "room.npz"))
    for x, y in ((a @ tilt[:3, :3].T, b), (b, a @ tilt[:3, :3].T)):
        gap = np.linalg.norm(x[::17, None] - y[None], axis=-1).min(1)
        assert np.median(gap) < 0.05, "points of a turned world did not come back"
    kept = infer(tmp_path, tmp_path / "c", "--up", "z", folder="side", ckpt=made / "mv")
    assert kept["turn"] == np.eye(3).tolist()


def test_ids_of_classes():
    assert class_ids(tuple(SCANNET20.values())) == list(SCANNET20)
    assert class_ids(tuple(SCANNET200.values())) == list(SCANNET200)
    assert class_ids(CLASSES) == [NAMES[c][1] for c in CLASSES] and class_ids(("a", "b", "c")) == [1, 2, 3]


# ---- bad input


def refused(capsys, argv: list[str]) -> str:
    out = Path(argv[argv.index("--out") + 1])
    before = sorted(out.rglob("*")) if out.exists() else None
    capsys.readouterr()
    assert run.cli(INFER, argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err, err
    assert (sorted(out.rglob("*")) if out.exists() else None) == before, "something partial was left"
    return err


def no_depth(room: Path) -> None:
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(room / "depth" / "1.png")


def hidden_depth(room: Path) -> None:
    """Measured between the nodes of the segmentation only: no superpoint."""
    depth = np.zeros((480, 640), np.uint16)
    depth[0, 0] = 1000
    Image.fromarray(depth).save(room / "depth" / "1.png")
    Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(room / "color" / "1.jpg")
    (room / "intrinsic.txt").write_text("570 570 320 240")


def first_only(room: Path, which: int = 1) -> None:
    for kind in ("color", "depth", "pose"):
        for path in (room / kind).iterdir():
            if path.stem != str(which):
                path.unlink()


def lost(room: Path) -> None:
    for path in (room / "pose").iterdir():
        np.savetxt(path, np.full((4, 4), np.nan))


def metres(room: Path) -> None:
    for path in (room / "pose").iterdir():
        pose = np.loadtxt(path)
        pose[:3, 3] *= 1000
        np.savetxt(path, pose)


def zero_superpoints(room: Path) -> None:
    hidden_depth(room)
    first_only(room)


BAD = {  # name: (what is broken, further flags, what the sentence must name)
    "no valid depth": (no_depth, [], ("depth/1.png", "no pixel has a valid depth")),
    "no finite pose": (lost, [], ("none of its 3 poses is finite",)),
    "poses in millimetres": (metres, [], ("m from the origin", "positions in m")),
    "depth scale": (None, ["--depth-scale", "100000"], ("median depth", "depth scale")),
    "depth scale of nothing": (None, ["--depth-scale", "-5"], ("--depth-scale",)),
    "depth is missing": (lambda room: (room / "depth" / "1.png").unlink(), [], ("its frame has no depth",)),
    "pose is missing": (lambda room: (room / "pose" / "2.txt").unlink(), [], ("2.txt", "is missing")),
    "picture is damaged": (lambda room: (room / "color" / "1.jpg").write_bytes(b"x"), [], ("1.jpg",)),
    "other resolution": (None, ["--intrinsics", "577,577,319,239"], ("do not suit depth of 64x48",)),
    "no numbers": (None, ["--intrinsics", "577,577"], ("--intrinsics", "4 numbers")),
    "no frames": (lambda room: shutil.rmtree(room / "color"), [], ("holds no posed frames",)),
    "no superpoint": (zero_superpoints, [], ("frame 1 has no superpoint", "leave the frame out")),
    "no masks": (None, ["--superpoints", "nowhere"], ("nowhere", "no file")),
    "online from single views": (None, ["--merge", "online", "--ckpt", "sv"], ("--merge online", "geometric")),
    "segments of nothing": (None, ["--segments", "a.json"], ("--segments", "--mesh")),
    "no mesh": (None, ["--mesh", "nowhere.ply"], ("nowhere.ply", "missing")),
    "no checkpoint": (None, ["--ckpt", "nothing"], ("nothing", "checkpoint")),
    "every": (None, ["--every", "0"], ("--every",)),
    "score": (None, ["--score", "1.5"], ("--score",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(made, tmp_path, capsys, name):
    broken, more, words = BAD[name]
    shutil.copytree(made / "room", tmp_path / "room")
    if broken:
        broken(tmp_path / "room")
    argv = [str(tmp_path / "room"), "--ckpt", str(made / "mv"), "--out", str(tmp_path / "out"), *EASY]
    more = [str(made / "sv") if m == "sv" else m for m in more]
    err = refused(capsys, argv + more)
    assert all(w in err for w in words), err


def test_one_lost_pose_is_left_out_and_said(made, tmp_path, capsys):
    shutil.copytree(made / "room", tmp_path / "room")
    np.savetxt(tmp_path / "room" / "pose" / "1.txt", np.full((4, 4), np.nan))
    scene = infer(tmp_path, tmp_path / "out", ckpt=made / "mv")
    assert scene["frames"] == 2 and scene["left_out"] == ["1"] and "1 without a finite pose" in capsys.readouterr().out


def test_results_are_not_overwritten_and_names_are_unique(made, tmp_path, capsys):
    argv = [str(made / "room"), "--ckpt", str(made / "mv"), "--out", str(tmp_path / "out"), *EASY]
    (tmp_path / "out" / "npz").mkdir(parents=True)
    assert "holds npz already" in refused(capsys, argv)
    assert "several are called room" in refused(capsys, [str(made / "room"), *argv])
