"""ScanNet's export: meshes, labels, classes; labels of frame points by hand and on rendered rooms."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data.rgbd_frames import NONE, FramePoints, frame_points
from data.room_files import NAMES, fuse, write_ply, write_scan
from data.rooms import CLASSES, UNLABELLED, Room
from data.scannet import (
    COLUMN,
    PointLabeller,
    Reconstruction,
    axis_alignment,
    benchmark_labels,
    instance_boxes,
    read_label_map,
    read_ply,
    read_reconstruction,
    read_scan_text,
    read_split,
    scan_intrinsics,
)
from utils.run import UserError
from utils.scannet_classes import CLASS_SETS

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
ROOM_MAP = {name: k for k, name in enumerate((*CLASSES, "ceiling"))}
SIZE = (48, 64)


def write_tsv(path: Path) -> None:
    rows = [f"{i}\t{name}\t{nyu}\t{name}\n" for name, (nyu, i) in NAMES.items()]
    path.write_text("id\traw_category\tnyu40id\tnyu40class\n" + "".join(rows) + "9999\todd\t\todd\n")


@pytest.fixture
def scan(tmp_path) -> tuple[Path, Reconstruction, Room]:
    """A rendered room as 3D/scene0000_00, turned by an axis alignment."""
    room = Room(0, 0, SIZE, lap=12)
    scene = fuse([room[k] for k in range(12)], voxel=0.03)
    c, s = np.cos(0.4), np.sin(0.4)
    scene.axis_align = np.array([[c, -s, 0, 1.0], [s, c, 0, -2.0], [0, 0, 1, 0.1], [0, 0, 0, 1]])
    write_scan(tmp_path / "scene0000_00", scene)
    return tmp_path / "scene0000_00", scene, room


# ---- meshes


def test_ply_with_triangles_and_more_properties(tmp_path):
    rng = np.random.default_rng(0)
    xyz, rgb = rng.normal(size=(7, 3)).astype("<f4"), rng.integers(0, 256, (7, 4)).astype(np.uint8)
    faces = rng.integers(0, 7, (5, 3)).astype("<i4")
    head = "ply\nformat binary_little_endian 1.0\ncomment made by hand\nelement vertex 7\nproperty float x\n"
    head += "property float y\nproperty float z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\nproperty uchar alpha\n"
    head += "element face 5\nproperty list uchar int vertex_indices\nend_header\n"
    body = b"".join(a.tobytes() + b.tobytes() for a, b in zip(xyz, rgb, strict=True))
    body += b"".join(b"\x03" + f.tobytes() for f in faces)
    path = tmp_path / "mesh.ply"
    path.write_bytes(head.encode() + body)
    got, colour, triangles = read_ply(path)
    assert np.array_equal(got, xyz) and np.array_equal(triangles, faces) and np.allclose(colour, rgb[:, :3] / 255)
    for content, words in ((head.encode() + body[:-4], "expected"), (b"solid", "no binary little-endian ply"),
                           (head.encode() + body[:-13] + b"\x04" + body[-12:], "no triangles")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_ply(path)


def test_written_ply_is_read_back(tmp_path):
    xyz, colour = np.random.default_rng(0).random((2, 9, 3)).astype(np.float32)
    write_ply(tmp_path / "a.ply", xyz, colour)
    got, rgb, faces = read_ply(tmp_path / "a.ply")
    assert np.array_equal(got, xyz) and np.abs(rgb - colour).max() <= 0.5 / 255 + 1e-6 and faces.shape == (0, 3)


@pytest.mark.skipif(not (SHARED / "scannet_sample").is_dir(), reason=f"{SHARED} is not there")
def test_real_labelled_sample():
    """Raw nyu40 ids of the real sample are found in the class list or unlabelled; boxes are those of a plain loop."""
    folder, done = SHARED / "scannet_sample", 0
    for path in sorted(folder.glob("*_points.bin")):
        stem = path.name.removesuffix("_points.bin")
        xyz = np.fromfile(path, np.float32).reshape(-1, 6)[:, :3]
        instance = np.fromfile(folder / f"{stem}_instance_mask.bin", np.int64)
        semantic = np.fromfile(folder / f"{stem}_semantic_mask.bin", np.int64)
        assert len(xyz) == len(instance) == len(semantic) and 0 <= semantic.min() <= semantic.max() <= 40
        ids, low, high = instance_boxes(xyz, instance)
        assert np.array_equal(ids, np.setdiff1d(instance, NONE))
        for i, a, b in zip(ids, low, high, strict=True):
            assert np.array_equal(a, xyz[instance == i].min(0)) and np.array_equal(b, xyz[instance == i].max(0))
        done += 1
    print(f"{done} of {done} samples")
    assert done


# ---- labels of a scan


def test_reconstruction_is_read_back(scan):
    folder, scene, _ = scan
    got = read_reconstruction(folder, ROOM_MAP, UNLABELLED)
    assert np.allclose(got.xyz, scene.xyz) and np.array_equal(got.segment, scene.segment)
    assert np.array_equal(got.semantic, scene.semantic) and np.allclose(got.axis_align, scene.axis_align)
    pairs = set(zip(got.instance.tolist(), scene.instance.tolist(), scene.semantic.tolist(), strict=True))
    assert len(pairs) == len({a for a, _, _ in pairs}) == len({p[1:] for p in pairs}) and got.instance.min() == 1


def test_points_of_frames_take_the_labels_of_the_scan(scan):
    """Against the rendered truth: the classes of 98 % of the points; the rest lie within a voxel of an edge."""
    folder, _, room = scan
    label = PointLabeller(read_reconstruction(folder, ROOM_MAP, UNLABELLED), UNLABELLED)
    for k in (0, 5):
        points = frame_points(room[k])
        instance, semantic = label(points)
        assert (semantic == points.semantic).mean() > 0.98 and (instance != NONE).mean() > 0.98
        assert ((semantic == UNLABELLED) == (instance == NONE)).all()


def test_rejection_and_boxes_by_hand():
    xyz = np.array([[0, 0, 0], [1, 0, 0], [5, 0, 0]], np.float32)
    scene = Reconstruction(xyz, xyz, np.array([1, 1, 2]), np.array([3, 3, 4]), np.zeros(3, int), np.eye(4))
    near = np.array([[0, 0, 0.02], [1, 0, 0.2], [1.04, 0, 0], [1.06, 0, 0], [5, 0, 0], [0.5, 0, 0]], np.float32)
    points = FramePoints(near, near, near[:, :2], np.eye(4), np.eye(3), (1, 1))
    instance, semantic = PointLabeller(scene, 20)(points)
    assert instance.tolist() == [1, 0, 1, 0, 2, 0] and semantic.tolist() == [3, 20, 3, 20, 4, 20]
    far, _ = PointLabeller(scene, 20, reject=None, margin=0.3)(points)
    assert far.tolist() == [1, 1, 1, 1, 2, 1]  # only the box, grown by 30 cm, counts
    assert PointLabeller(scene, 20, reject=None)(points)[0].tolist() == [1, 0, 1, 0, 2, 1]  # outside the box by 20 cm


def test_points_are_aligned_before_they_are_labelled(scan):
    """A box along the axes of the aligned room excludes what the same box along the world's axes would hold."""
    folder, scene, room = scan
    read = read_reconstruction(folder, ROOM_MAP, UNLABELLED)
    points = frame_points(room[0])
    right = PointLabeller(read, UNLABELLED)(points)
    turned = Reconstruction(scene.aligned(), read.colour, read.instance, read.semantic, read.segment, np.eye(4))
    moved = FramePoints(
        (points.xyz @ scene.axis_align[:3, :3].T + scene.axis_align[:3, 3]).astype(np.float32), points.colour, points.uv,
        points.pose, points.intrinsics, points.size,
    )  # fmt: skip
    again = PointLabeller(turned, UNLABELLED)(moved)
    assert (right[0] == again[0]).mean() > 0.999  # float32 of the moved points decides ties


def test_benchmark_labels():
    xyz = np.zeros((4, 3), np.float32)
    scene = Reconstruction(xyz, xyz, np.array([7, 2, 0, 3]), np.array([1, 2, 200, 200]), np.zeros(4, int), np.eye(4))
    assert benchmark_labels(scene, "scannet200").tolist() == [3007, 2002, 0, 0]  # floor is 3, chair 2
    scene.semantic = np.array([1, 19, 20, 20])
    assert benchmark_labels(scene, "scannet").tolist() == [2007, 39002, 0, 0]


# ---- texts


def test_label_map(tmp_path):
    path = tmp_path / "labels.tsv"
    write_tsv(path)
    for classes in COLUMN:
        ids, n = list(CLASS_SETS[classes]), len(CLASS_SETS[classes])
        found = read_label_map(path, classes)
        assert found["odd"] == n and found["wall"] == 0 and found["floor"] == 1
        assert found["chair"] == ids.index(5 if classes == "scannet" else 2)
        assert found["ceiling"] == (n if classes == "scannet" else ids.index(41))
    path.write_text("id\tname\n1\twall\n")
    with pytest.raises(UserError, match="lacks the columns"):
        read_label_map(path, "scannet")


def test_scan_text(tmp_path):
    path = tmp_path / "scene.txt"
    path.write_text("axisAlignment = " + "1 0 0 2 0 1 0 3 0 0 1 4 0 0 0 1 \ncolorWidth = 1296\nfx_depth = 571.6\n"
                    "fy_depth = 571.6\nmx_depth = 319.5\nmy_depth = 239.5\ndepthWidth = 640\nsceneType = Bathroom\n")  # fmt: skip
    values = read_scan_text(path)
    assert axis_alignment(values)[:3, 3].tolist() == [2, 3, 4] and scan_intrinsics(values) == (
        571.6,
        571.6,
        319.5,
        239.5,
    )
    assert "sceneType" not in values and scan_intrinsics(values, 320) is None
    assert np.array_equal(axis_alignment({}), np.eye(4)) and scan_intrinsics({}) is None
    with pytest.raises(UserError, match="is missing"):
        read_scan_text(tmp_path / "none.txt")


BROKEN = {
    "other mesh": ("_vh_clean_2.0.010000.segs.json", '{"segIndices": [1, 2]}', "has 2 segment ids, the mesh"),
    "no json": ("_vh_clean_2.0.010000.segs.json", "{", "no readable 'segIndices'"),
    "no groups": (".aggregation.json", "[]", "no readable 'segGroups'"),
    "unknown label": (".aggregation.json", json.dumps({"segGroups": [{"objectId": 0, "label": "unicorn", "segments": []}]}),
                      "label 'unicorn' is not in the tsv"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_bad_scans_are_one_sentence(scan, what):
    ending, content, words = BROKEN[what]
    (scan[0] / f"scene0000_00{ending}").write_text(content)
    with pytest.raises(UserError, match=words) as e:
        read_reconstruction(scan[0], ROOM_MAP, UNLABELLED)
    assert "\n" not in str(e.value)


def test_missing_files_of_a_scan(scan, tmp_path):
    for name in ("scene0000_00.txt", "scene0000_00.aggregation.json", "scene0000_00_vh_clean_2.ply"):
        (scan[0] / name).unlink()
        with pytest.raises(UserError, match=f"{name}: is missing"):
            read_reconstruction(scan[0], ROOM_MAP, UNLABELLED)
    with pytest.raises(UserError, match="scannetv2_val.txt is missing"):
        read_split(tmp_path, "val")
    (tmp_path / "scannetv2_val.txt").write_text("\n")
    with pytest.raises(UserError, match="names no scene"):
        read_split(tmp_path, "val")
