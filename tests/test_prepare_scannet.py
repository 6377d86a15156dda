"""data/prepare_scannet.py on a rendered export: samples, index, flags, going on, refusals; clips; the checker."""

import functools
import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.rgbd_checks import RGBD_FORMATS, check_rgbd
from data.rgbd_clips import PreparedClips, adjacent
from data.rgbd_folder import RgbdFolder
from data.rgbd_frames import Augmentation, reprojection_error
from data.room_files import write_scannet
from data.scannet_samples import feature_path, read_index, read_points, read_scene
from utils import run
from utils.run import UserError
from utils.scannet_classes import CLASS_SETS
from utils.scannet_files import read_integers

ROOT = Path(__file__).resolve().parents[1]
SCENES = {"train": ["scene0000_00", "scene0001_00"], "val": ["scene0002_00"]}
FRAMES, SIZE = 8, (48, 64)


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("prepare_scannet", ROOT / "data" / "prepare_scannet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(*argv: object) -> int:
    return run.cli(script().main, [*map(str, argv)])


def refused(capsys, *argv: object) -> str:
    assert prepare(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("export") / "scannet"
    write_scannet(root, 0, SCENES, FRAMES, SIZE)
    return root


@pytest.fixture(scope="module")
def single(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "sv"
    assert prepare(raw, out, "--stride", 4, "--points", 600, "--bin") == 0
    return out


@pytest.fixture(scope="module")
def clips(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "mv"
    assert prepare(raw, out, "--views", "mv", "--points", 600, "--dataset", "scannet", "--extra-tag", "rooms") == 0
    return out


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what is written


def test_single_views(raw, single):
    meta, rows = read_index(single / "scannet200_sv_infos_train.json")
    assert meta["views"] == "sv" and meta["classes"] == list(CLASS_SETS["scannet200"].values())
    assert [(r["scene"], Path(r["img_path"]).stem) for r in rows] == [
        (s, f) for s in SCENES["train"] for f in ("0", "80")
    ]
    for row in rows:
        points = read_points(single / row["frame_path"])
        folder = RgbdFolder(raw / "2D" / row["scene"])
        frame = folder[folder.names.index(Path(row["img_path"]).stem)]
        assert len(points) == 1200 and points.size == SIZE and np.allclose(row["pose"], points.pose)
        assert reprojection_error(points).max() < 0.5 and np.abs(points.xyz.mean(0)).max() < 1e-4
        assert np.allclose(points.pose[:3, :3], frame.pose[:3, :3])
        v, u = points.uv[:, 1].astype(int), points.uv[:, 0].astype(int)
        assert np.abs(points.colour - frame.colour[v, u] / 255).max() < 1e-6
        world = points.xyz - points.pose[:3, 3] + frame.pose[:3, 3]
        camera = (world - frame.pose[:3, 3]) @ frame.pose[:3, :3]
        assert np.abs(camera[:, 2] - frame.depth[v, u]).max() < 1e-4
        assert set(points.superpoint) == set(range(points.superpoint.max() + 1))
        assert (points.semantic < 200).mean() > 0.95 and (points.instance > 0).mean() > 0.95
        assert (raw / row["img_path"]).is_file()
    assert len(read_points(single / "frames/scene0002_00/0.npz")) == 600  # of val: no more than a step takes


def test_flat_arrays(single):
    for row in read_index(single / "scannet200_sv_infos_val.json")[1]:
        points = read_points(single / row["frame_path"])
        flat = np.fromfile(single / row["pts_path"], np.float32).reshape(-1, 6)
        assert np.array_equal(flat[:, :3], points.xyz) and np.allclose(flat[:, 3:], 255 * points.colour, atol=1e-4)
        for key, name in (("super_pts_path", "superpoint"), ("pts_instance_mask_path", "instance"),
                          ("pts_semantic_mask_path", "semantic")):  # fmt: skip
            assert np.array_equal(np.fromfile(single / row[key], np.int64), getattr(points, name))


def test_clips(raw, clips):
    meta, rows = read_index(clips / "rooms_infos_train.json")
    assert meta["dataset"] == "scannet" and [r["scene"] for r in rows] == SCENES["train"]
    for row in rows:
        assert [Path(p).stem for p in row["img_paths"]] == ["0", "40", "80", "120"] and len(row["poses"]) == 4
        scan = read_scene(clips / row["scene_path"])
        assert np.allclose(row["axis_align_matrix"], scan.axis_align)
        labels = read_integers(clips / "labels" / "train" / f"{row['scene']}.txt")
        assert len(labels) == len(scan.xyz) and (labels % 1000 == np.where(labels > 0, scan.instance, 0)).all()
        for name, pose in zip(row["frame_paths"], row["poses"], strict=True):
            points = read_points(clips / name)
            assert np.allclose(points.pose, pose) and reprojection_error(points).max() < 0.5
            low, high = scan.xyz.min(0) - 0.1, scan.xyz.max(0) + 0.1
            assert ((points.xyz > low) & (points.xyz < high)).all()  # in the world, not centred


# ---- flags


def test_what_exists_is_kept_and_what_is_missing_made(raw, single, capsys):
    before = snapshot(single)
    (single / "frames/scene0001_00/80.npz").unlink()
    assert prepare(raw, single, "--stride", 4, "--points", 600, "--bin") == 0
    out = capsys.readouterr().out
    assert "2 scenes, 4 items, 1 files written" in out and "1 scenes, 2 items, 0 files written" in out
    assert snapshot(single) == before  # the draw depends on scene, frame and split alone


def test_workers_do_not_change_the_files(raw, clips, tmp_path):
    argv = ["--views", "mv", "--points", 600, "--dataset", "scannet", "--extra-tag", "rooms", "--workers", 2]
    assert prepare(raw, tmp_path / "mv", *argv) == 0
    assert snapshot(tmp_path / "mv") == snapshot(clips)


def test_packed_feature_paths(raw, single, clips, capsys):
    feature = raw / "clip_feat" / "scene0002_00" / "color" / "0.half"
    feature.parent.mkdir(parents=True)
    feature.write_bytes(b"")
    argv = [raw, single, "--stride", 4, "--points", 600, "--pack-clip", "--clip-suffix", ".half", "--split", "val"]
    assert prepare(*argv, "--extra-tag", "packed") == 0
    assert "1 of 2 CLIP features are there (the others are computed online)" in capsys.readouterr().out
    rows = read_index(single / "packed_infos_val.json")[1]
    assert [r["clip_feat_path"] for r in rows] == [f"clip_feat/scene0002_00/color/{i}.half" for i in (0, 80)]
    assert PreparedClips(single / "packed_infos_val.json", raw)[0].features == [feature]
    assert PreparedClips(single / "packed_infos_val.json", raw)[1].features == [None]
    assert (
        prepare(raw, clips, "--views", "mv", "--points", 600, "--dataset", "scannet", "--pack-clip", "--split", "train")
        == 0
    )
    row = read_index(clips / "scannet_mv_infos_train.json")[1][0]
    assert row["clip_feat_paths"] == [feature_path(p) for p in row["img_paths"]] and len(row["clip_feat_paths"]) == 4


def test_only_the_first_part_of_a_path_changes():
    assert feature_path("2D/scene2D/color/0.jpg.2D.jpg") == "clip_feat/scene2D/color/0.jpg.2D.pt"
    assert feature_path("other/2D/0.jpg") == "other/2D/0.pt"


def test_superpoints_of_masks(raw, tmp_path):
    for scene in SCENES["val"]:
        (tmp_path / "masks" / scene).mkdir(parents=True)
        left = np.zeros(SIZE, np.uint8)
        left[:, :32] = 1
        for name in ("0", "80"):
            Image.fromarray(left).save(tmp_path / "masks" / scene / f"{name}.png")
    argv = ["--stride", 4, "--points", 300, "--split", "val", "--superpoints", tmp_path / "masks"]
    assert prepare(raw, tmp_path / "out", *argv) == 0
    for row in read_index(tmp_path / "out" / "scannet200_sv_infos_val.json")[1]:
        points = read_points(tmp_path / "out" / row["frame_path"])
        assert len(set(points.superpoint[points.uv[:, 0] < 32])) == 1
        assert points.superpoint[points.uv[:, 0] >= 32].min() > points.superpoint[points.uv[:, 0] < 32].max()


def test_rendered_export_from_the_command_line(tmp_path, capsys):
    assert prepare(tmp_path / "rooms", tmp_path / "sv", "--rooms", 1, "--points", 500) == 0
    assert "1 scenes, 2 items, 2 files written" in capsys.readouterr().out
    assert "exists already" in refused(capsys, tmp_path / "rooms", tmp_path / "sv", "--rooms", 1)


# ---- refusals


def test_another_setting_in_the_same_folder_is_refused(raw, single, capsys):
    err = refused(capsys, raw, single, "--stride", 4, "--points", 700, "--bin")
    assert "was prepared with points 600, now 700" in err


@pytest.mark.parametrize(
    "argv, words",
    [(["--clip-suffix", "pt"], "expected an ending with its dot"), (["--stride", "0"], "--stride 0: expected 1"),
     (["--superpoints", "nowhere"], "no such folder"), (["--split", "test"], "scannetv2_test.txt is missing")],
)  # fmt: skip
def test_bad_flags(raw, tmp_path, capsys, argv, words):
    assert words in refused(capsys, raw, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_bad_scene_leaves_no_index(tmp_path, capsys):
    write_scannet(tmp_path / "raw", 0, {"val": ["scene0000_00"]}, 2, SIZE)
    (tmp_path / "raw/2D/scene0000_00/depth/20.png").unlink()
    for workers in (0, 1):
        err = refused(capsys, tmp_path / "raw", tmp_path / "out", "--stride", 1, "--split", "val", "--workers", workers)
        assert "20.jpg: its frame has no depth" in err
    assert not list((tmp_path / "out").glob("*_infos_*"))


# ---- items


def test_training_items(raw, clips):
    data = PreparedClips(clips / "rooms_infos_train.json", raw, 3, 400, True, Augmentation(elastic=0), seed=5)
    clip, again, later = data[(0, 1)], data[(0, 1)], data[(1, 1)]
    assert [len(c) for c in clip.coords] == [400] * 3 and clip.scene == "scene0001_00" and len(clip.images) == 3
    assert all(np.array_equal(a, b) for a, b in zip(clip.coords, again.coords, strict=True))
    assert not np.array_equal(clip.coords[0], later.coords[0])
    for frame, coords in zip(clip.frames, clip.coords, strict=True):
        assert np.allclose(coords, frame.xyz @ clip.matrix[:3, :3].T + clip.matrix[:3, 3], atol=1e-4)
        assert reprojection_error(frame).max() < 0.5
        row = np.searchsorted(clip.objects, frame.instance[frame.instance > 0])
        inside = coords[frame.instance > 0]
        assert (inside > clip.boxes[row, :3] - 0.1).all() and (inside < clip.boxes[row, 3:] + 0.1).all()


def test_evaluation_items_are_whole_scenes(clips):
    clip = PreparedClips(clips / "rooms_infos_val.json")[0]
    assert len(clip.frames) == 4 and np.array_equal(clip.coords[2], clip.frames[2].xyz) and clip.images is None


def test_adjacent_frames_go_round_the_end():
    starts = {tuple(adjacent(5, 3, np.random.default_rng(k))) for k in range(60)}
    assert starts == {(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 0), (4, 0, 1)}
    assert adjacent(2, 3, np.random.default_rng(0)) in ([0, 1, 0], [1, 0, 1]) and adjacent(4, 3, None) == [0, 1, 2, 3]


def test_bad_index_and_samples(single, tmp_path):
    with pytest.raises(UserError, match="no such index"):
        PreparedClips(tmp_path / "none.json")
    (tmp_path / "a.json").write_text(json.dumps({"metainfo": {}, "data_list": []}))
    with pytest.raises(UserError, match="has no rows or no metainfo"):
        PreparedClips(tmp_path / "a.json")
    (tmp_path / "b.npz").write_bytes((single / "frames/scene0000_00/0.npz").read_bytes()[:500])
    with pytest.raises(UserError, match="is damaged"):
        read_points(tmp_path / "b.npz")


# ---- the checker


def arguments(**values) -> Namespace:
    return Namespace(**{"root": None, "limit": 4, "batch_size": 2, "show": "x", "seed": 0, "intrinsics": None,
                        "depth_scale": None} | values)  # fmt: skip


def test_checker_prints_and_draws(raw, single, clips, capsys):
    roots = {"rooms": [None], "rgbd": [raw / "2D" / "scene0000_00"],
             "scannet": [single / "scannet200_sv_infos_train.json", clips / "rooms_infos_val.json"]}  # fmt: skip
    assert set(roots) == set(RGBD_FORMATS)
    for name, some in roots.items():
        for root in some:
            picture = check_rgbd(arguments(format=name, root=root))
            out = capsys.readouterr().out
            assert (
                picture.dtype == np.uint8 and picture.std() > 10 and "reprojection 0.0" in out and "superpoints" in out
            )
            assert ("oracle: mean IoU" in out) == (name != "rgbd")
    assert check_rgbd(arguments(format="rooms", show=None)) is None


def test_checker_refuses_foreign_poses(single, tmp_path, capsys):
    for name in ("preparation.json", "frames/scene0002_00/0.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((single / name).read_bytes())
    content = json.loads((single / "scannet200_sv_infos_val.json").read_text())
    content["data_list"] = content["data_list"][:1]
    (tmp_path / "index.json").write_text(json.dumps(content))
    path = tmp_path / "frames/scene0002_00/0.npz"
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "pose": np.linalg.inv(arrays["pose"])})
    with pytest.raises(UserError, match="px from its source pixel"):
        check_rgbd(arguments(format="scannet", root=tmp_path / "index.json"))
    with pytest.raises(UserError, match="FORMAT rgbd needs ROOT"):
        check_rgbd(arguments(format="rgbd"))
