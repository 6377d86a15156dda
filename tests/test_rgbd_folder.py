"""Folders of posed RGB-D frames: every layout, the real 7-Scenes frames, bad input; points of frames."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from data.rgbd_checks import CHANGES, agreement, check_geometry, pairs_of
from data.rgbd_folder import RgbdFolder
from data.rgbd_frames import (
    Augmentation,
    colour_at_depth,
    elastic,
    frame_points,
    intrinsic_matrix,
    lift,
    project,
    reprojection_error,
    sample,
    stable_seed,
    thing_instances,
)
from data.room_files import write_room
from data.rooms import Room
from utils.run import UserError

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
SIZE, N = (48, 64), 3
ROOM = Room(0, 0, SIZE, colour_noise=0, lap=24)
FRAMES = [ROOM[k] for k in range(N)]
K = ROOM.intrinsics


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def depth16(frame, scale=1000) -> np.ndarray:
    return np.rint(frame.depth * scale).astype(np.uint16)


def write_7scenes(root: Path) -> None:
    for k, f in enumerate(FRAMES):
        save(root / f"frame-{k:06d}.color.png", f.colour)
        save(root / f"frame-{k:06d}.depth.png", depth16(f))
        np.savetxt(root / f"frame-{k:06d}.pose.txt", f.pose)
    np.savetxt(root / "camera-intrinsics.txt", K)


def write_3rscan(root: Path) -> None:
    """Colour of twice the size, seen by a camera of its own."""
    own = intrinsic_matrix(2 * K[0, 0], 2 * K[1, 1], 2 * K[0, 2] + 0.5, 2 * K[1, 2] + 0.5)
    for k, f in enumerate(FRAMES):
        save(root / f"frame-{k:06d}.color.png", f.colour.repeat(2, 0).repeat(2, 1))
        save(root / f"frame-{k:06d}.depth.pgm", depth16(f))
        np.savetxt(root / f"frame-{k:06d}.pose.txt", f.pose)
    rows = {"m_sensorName": "Tango", "m_depthShift": "1000"}
    for name, matrix in (("Depth", K), ("Color", own)):
        wide = np.eye(4)
        wide[:3, :3] = matrix
        rows[f"m_calibration{name}Intrinsic"] = " ".join(map(str, wide.reshape(-1)))
    (root / "_info.txt").write_text("".join(f"{k} = {v}\n" for k, v in rows.items()))


def write_folders(root: Path) -> None:
    for k, f in enumerate(FRAMES):
        save(root / "color" / f"{20 * k}.png", f.colour)
        save(root / "depth" / f"{20 * k}.png", depth16(f))
        (root / "pose").mkdir(exist_ok=True)
        np.savetxt(root / "pose" / f"{20 * k}.txt", f.pose)
    (root / "intrinsic").mkdir()
    wide = np.eye(4)
    wide[:3, :3] = K
    np.savetxt(root / "intrinsic" / "intrinsic_depth.txt", wide)


def write_scenenn(root: Path) -> None:
    lines = []
    for k, f in enumerate(FRAMES):
        save(root / "image" / f"image{k + 1:05d}.png", f.colour)
        save(root / "depth" / f"depth{k + 1:05d}.png", depth16(f))
        lines += [f"{k} {k} {k + 1}", *(" ".join(map(str, row)) for row in f.pose)]
    (root / "trajectory.log").write_text("\n".join(lines) + "\n")
    (root / "intrinsic.txt").write_text(f"{K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]}\n")


def write_tum(root: Path) -> None:
    texts = {
        "rgb": ["# timestamp file"],
        "depth": ["# timestamp file"],
        "groundtruth": ["# timestamp tx ty tz qx qy qz qw"],
    }
    for k, f in enumerate(FRAMES):
        t = 1305031102.1 + k / 30
        save(root / "rgb" / f"{t:.6f}.png", f.colour)
        save(root / "depth" / f"{t + 0.004:.6f}.png", depth16(f, 5000))
        texts["rgb"].append(f"{t:.6f} rgb/{t:.6f}.png")
        texts["depth"].append(f"{t + 0.004:.6f} depth/{t + 0.004:.6f}.png")
        q = Rotation.from_matrix(f.pose[:3, :3]).as_quat()
        texts["groundtruth"].append(" ".join(map(str, [t - 0.003, *f.pose[:3, 3], *q])))
    texts["rgb"].append("1305031109.0 rgb/without_depth.png")
    for name, lines in texts.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "intrinsic.txt").write_text(f"{K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]}\n")


WRITERS = {
    "7scenes": write_7scenes,
    "3rscan": write_3rscan,
    "folders": write_folders,
    "scenenn": write_scenenn,
    "tum": write_tum,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    write_room(tmp_path / "room", ROOM, N)
    return tmp_path / "room"


# ---- layouts


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("named", [False, True])
def test_every_layout_gives_the_same_frames(tmp_path, layout, named):
    WRITERS[layout](tmp_path)
    frames = RgbdFolder(tmp_path, layout if named else "auto")
    assert frames.layout == layout and len(frames) == N and not frames.left_out
    for k, (frame, expected) in enumerate(zip(map(frames.__getitem__, range(N)), FRAMES, strict=True)):
        assert np.abs(frame.depth - expected.depth).max() <= 0.0005 + 1e-6 and frame.depth.dtype == np.float32
        assert np.array_equal(frame.colour, expected.colour), k
        assert np.allclose(frame.pose, expected.pose, atol=1e-9) and np.allclose(frame.intrinsics, K)
    assert f"{N} frames (0 without" in frames.summary()


def test_the_frame_number_orders_files(tmp_path):
    write_folders(tmp_path)
    assert RgbdFolder(tmp_path).names == ["0", "20", "40"] and RgbdFolder(tmp_path, stride=2).names == ["0", "40"]


def test_scannet_scans_without_intrinsics_take_the_average(tmp_path):
    root = tmp_path / "scene0011_01"
    root.mkdir()
    write_folders(root)
    (root / "intrinsic" / "intrinsic_depth.txt").unlink()
    frames = RgbdFolder(root)
    assert frames.intrinsics[0, 0] == 577.870605 and "average" in frames.summary()


def test_given_intrinsics_and_scale_win(folder):
    frames = RgbdFolder(folder, intrinsics=(60.0, 61.0, 31.0, 23.0), depth_scale=500)
    assert np.allclose(frames.intrinsics, intrinsic_matrix(60, 61, 31, 23)) and "(given)" in frames.summary()
    assert np.allclose(frames[0].depth, 2 * RgbdFolder(folder)[0].depth, rtol=1e-6)


def test_invalid_values_are_not_depth(folder):
    path = folder / "depth" / "0.png"
    raw = np.asarray(Image.open(path)).copy()
    raw[:5], raw[5:9] = 65535, 0
    save(path, raw)
    assert (RgbdFolder(folder)[0].depth[:9] == 0).all() and (RgbdFolder(folder)[0].depth[9:] > 0).all()


def test_colour_of_another_size_is_looked_up():
    small = np.arange(48 * 64).reshape(48, 64)
    colour = np.repeat(small[..., None], 3, 2).astype(np.uint16)
    big = colour.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(colour_at_depth(big, (48, 64), K, None)[..., 0], small)


def test_lost_tracking_is_left_out_and_counted(folder):
    (folder / "pose" / "1.txt").write_text("-inf " * 16)
    frames = RgbdFolder(folder)
    assert frames.names == ["0", "2"] and frames.left_out == ["1"] and "1 without a finite pose" in frames.summary()


# ---- bad input


def break_folder(folder: Path, what: str) -> dict:
    """Damages the folder; returns further arguments of the reader."""
    pose, depth = folder / "pose" / "1.txt", folder / "depth" / "1.png"
    blank = np.zeros(SIZE, np.uint16)
    actions = {
        "nan pose": lambda: [p.write_text("nan " * 16) for p in (folder / "pose").glob("*.txt")],
        "missing depth": depth.unlink,
        "missing colour": (folder / "color" / "1.jpg").unlink,
        "missing pose": pose.unlink,
        "short pose": lambda: pose.write_text("1 0 0 0"),
        "words": lambda: pose.write_text("one two"),
        "no rotation": lambda: np.savetxt(pose, np.diag([2.0, 1, 1, 1])),
        "transposed": lambda: np.savetxt(pose, np.loadtxt(pose).T),
        "no intrinsics": (folder / "intrinsic.txt").unlink,
        "other resolution": lambda: np.savetxt(folder / "intrinsic.txt", 10 * K),
        "no valid depth": lambda: save(depth, blank),
        "8 bits": lambda: save(depth, blank.astype(np.uint8)),
        "damaged": lambda: depth.write_bytes(depth.read_bytes()[:60]),
        "wrong scale": lambda: None,
        "square colour": lambda: save(folder / "color" / "1.jpg", np.zeros((64, 64, 3), np.uint8)),
        "no frames": lambda: [p.unlink() for p in (folder / "color").iterdir()],
    }
    actions[what]()
    return {"depth_scale": 1.0} if what == "wrong scale" else {}


BROKEN = {
    "nan pose": "none of its 3 poses is finite", "missing depth": "its frame has no depth; expected .*1.png",
    "missing colour": "1.txt: its frame has a depth and no colour",
    "missing pose": "1.txt: is missing", "short pose": "holds 4 numbers", "words": "something other than numbers",
    "no rotation": "no rotation with a shift", "transposed": "transposed", "no intrinsics": "has no intrinsics",
    "other resolution": "of another resolution", "no valid depth": "1.png: no pixel has a valid depth",
    "8 bits": "expected one channel of 16 bits", "damaged": "cannot be read as a picture",
    "wrong scale": "pass the right depth scale", "square colour": "64x64 px, its depth of 64x48",
    "no frames": "holds no posed frames",
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_bad_input_is_one_sentence(folder, what):
    more = break_folder(folder, what)
    with pytest.raises(UserError, match=BROKEN[what]) as e:
        frames = RgbdFolder(folder, **more)
        for k in range(len(frames)):
            frames[k]
    assert "\n" not in str(e.value) and ";" in str(e.value)


def test_bad_tum_folders(tmp_path):
    write_tum(tmp_path)
    with pytest.raises(UserError, match="the times are of other clocks"):
        lines = (tmp_path / "groundtruth.txt").read_text().replace("13050", "23050")
        (tmp_path / "groundtruth.txt").write_text(lines)
        RgbdFolder(tmp_path)
    (tmp_path / "depth.txt").unlink()
    with pytest.raises(UserError, match="depth.txt: is missing"):
        RgbdFolder(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        RgbdFolder(tmp_path / "nothing")


WRONG = {  # change of the poses or of the scale -> words of the complaint
    "inverted": ("world-to-camera", lambda T: np.linalg.inv(T), 1000),
    "OpenGL": ("OpenGL", lambda T: T @ np.diag([1.0, -1, -1, 1]), 1000),
    "millimetres": ("millimetres", lambda T: np.c_[T[:, :3], T[:, 3] * (1e3, 1e3, 1e3, 1)], 1000),
    "scale low": ("5 times too low", lambda T: T, 200),
    "scale high": ("5 times too high", lambda T: T, 5000),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_pose_direction_and_scale_are_named(tmp_path, what):
    words, change, scale = WRONG[what]
    write_room(tmp_path / "room", ROOM, 8)
    frames = RgbdFolder(tmp_path / "room", depth_scale=scale)
    for e in frames.entries:
        e.pose = change(e.pose)
    with pytest.raises(UserError, match=words):
        check_geometry(frames, 4)


# ---- the real frames


@pytest.mark.skipif(not (SHARED / "rgbd_7scenes").is_dir(), reason=f"{SHARED} is not there")
def test_real_frames():
    """Source pixels within 0.5 px of the projection for every point; depth fits the poses better than a wrong one."""
    roots = sorted(SHARED.glob("rgbd_*"))
    for root in roots:
        frames = RgbdFolder(root)
        looked = np.linspace(0, len(frames) - 1, 6).astype(int)
        worst = max(reprojection_error(frame_points(frames[int(k)])).max() for k in looked)
        share, pairs = check_geometry(frames, 4)
        sets = [(frames[i], frames[j]) for i, j in pairs_of([e.pose for e in frames.entries], 4)]
        wrong = [float(np.median([agreement(a, b, change) for a, b in sets])) for change in CHANGES.values()]
        print(
            f"{root.name}: {len(frames)} frames, error {worst:.3f} px, {pairs} pairs agree {share:.2f}, changed {wrong}"
        )
        assert worst < 0.5 and share > max(wrong) + 0.1
    print(f"{len(roots)} of {len(roots)} folders")


# ---- points


def test_lift_by_hand():
    depth = np.zeros((4, 6), np.float32)
    depth[1, 5], depth[3, 0] = 2.0, 1.0
    pose = np.eye(4)
    pose[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # x to y
    pose[:3, 3] = (10, 20, 30)
    xyz, uv = lift(depth, intrinsic_matrix(2, 4, 3, 1), pose)
    assert np.array_equal(uv, [[5, 1], [0, 3]])
    assert np.allclose(xyz, [[10 - 0, 20 + 2, 32], [10 - 0.5, 20 - 1.5, 31]])
    back, z = project(xyz, intrinsic_matrix(2, 4, 3, 1), pose)
    assert np.allclose(back, uv) and np.allclose(z, [2, 1])
    behind, _ = project(np.array([[10.0, 20, 29]]), intrinsic_matrix(2, 4, 3, 1), pose)
    assert np.isnan(behind).all()


def test_sampling():
    points = frame_points(FRAMES[0])
    few = sample(points, 100, stable_seed("scene", "1", "val"))
    same = sample(points, 100, stable_seed("scene", "1", "val"))
    other = sample(points, 100, stable_seed("scene", "2", "val"))
    assert np.array_equal(few.uv, same.uv) and not np.array_equal(few.uv, other.uv)
    assert len(np.unique(few.uv, axis=0)) == 100  # without replacement
    many = sample(points, len(points) + 50, np.random.default_rng(0))
    assert len(many) == len(points) + 50 and len(np.unique(many.uv, axis=0)) == len(points)
    assert set(few.superpoint) == set(range(few.superpoint.max() + 1))
    v, u = few.uv[:, 1].astype(int), few.uv[:, 0].astype(int)
    assert np.array_equal(few.instance, FRAMES[0].instance[v, u])
    assert np.allclose(few.colour, FRAMES[0].colour[v, u] / 255)


def test_centred_points_keep_their_pixels():
    points = frame_points(FRAMES[1]).centred()
    assert np.abs(points.xyz.mean(0, dtype=np.float64)).max() < 1e-5 and reprojection_error(points).max() < 0.5
    assert np.allclose(points.pose[:3, :3], FRAMES[1].pose[:3, :3])


def test_targets_of_things():
    instance, semantic = np.array([0, 3, 4, 5, 6]), np.array([2, 0, 1, 2, 7])
    assert thing_instances(instance, semantic, 7).tolist() == [-1, -1, -1, 5, -1]


def test_frame_without_depth_is_refused():
    frame = Room(0, 0, SIZE)[0]
    frame.depth[:] = 0
    with pytest.raises(ValueError, match="no pixel has a depth"):
        frame_points(frame)


# ---- augmentation


def test_one_change_for_all_clouds():
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(50, 3)).astype(np.float32), rng.normal(size=(30, 3)).astype(np.float32)]
    for elastic_share in (0.0, 1.0):
        (a, b), matrix = Augmentation(elastic=elastic_share)(clouds, np.random.default_rng(3))
        (both,), _ = Augmentation(elastic=elastic_share)([np.concatenate(clouds)], np.random.default_rng(3))
        assert np.array_equal(np.concatenate([a, b]), both) and a.dtype == np.float32
        rigid = clouds[0] @ matrix[:3, :3].T + matrix[:3, 3]
        assert np.allclose(a, rigid, atol=1e-5) == (elastic_share == 0)


def test_ranges_of_the_affine_part():
    matrices = np.stack([Augmentation().draw(np.random.default_rng(k)) for k in range(400)])
    scale = np.cbrt(np.abs(np.linalg.det(matrices[:, :3, :3])))
    assert scale.min() > 0.8 - 1e-9 and scale.max() < 1.2 + 1e-9 and scale.max() - scale.min() > 0.35
    assert np.allclose(matrices[:, 2, :2], 0) and (matrices[:, 2, 2] > 0).all()  # up stays up
    mirrored = (np.linalg.det(matrices[:, :3, :3]) < 0).mean()
    assert 0.4 < mirrored < 0.6 and 0.08 < matrices[:, :3, 3].std() < 0.12


def test_elastic_is_smooth_and_of_the_published_size():
    """Deviation of noise blurred twice by 3-boxes along each axis: (19 / 81) ** 1.5 of the amplitude at the nodes."""
    grid = 12.0 * np.stack(np.meshgrid(*[np.arange(24)] * 3), -1).reshape(-1, 3)
    moves = elastic(grid, 6, 40, np.random.default_rng(0)) - grid
    assert abs(moves.std() / (40 * (19 / 81) ** 1.5) - 1) < 0.15
    near = np.array([[100.0, 100, 100], [101, 100, 100]]) + 1e6  # far from the origin costs nothing
    a, b = elastic(near, 6, 40, np.random.default_rng(0)) - near
    assert np.abs(a - b).max() < 1.5
