"""Rendered rooms: exact depth, labels and poses; frames in any order; files that readers understand."""

import numpy as np
import pytest

from data.rgbd_checks import check_geometry
from data.rgbd_clips import RoomClips
from data.rgbd_folder import RgbdFolder
from data.rgbd_frames import NONE, Augmentation, frame_points, project, reprojection_error
from data.room_files import fuse, write_room
from data.rooms import CLASSES, UNLABELLED, Part, Room
from data.scannet import instance_boxes

SIZE = (48, 64)


def distance_to(part: Part, points: np.ndarray) -> np.ndarray:
    """How far points (N, 3) of the world are from the surface of a part, m."""
    c, s = np.cos(part.turn), np.sin(part.turn)
    p = (points - part.centre) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    if part.kind == "ball":
        return np.abs(np.linalg.norm(p, axis=1) - part.half[0])
    if part.kind == "drum":
        q = np.stack([np.linalg.norm(p[:, :2], axis=1), np.abs(p[:, 2])], -1) - part.half[[0, 2]]
    else:
        q = np.abs(p) - part.half
    return np.abs(q.max(1))


@pytest.mark.parametrize("index", range(4))
def test_points_of_an_object_lie_on_its_surface(index):
    room = Room(1, index, SIZE)
    for k in (0, 7):
        frame = room[k]
        points = frame_points(frame)
        for i in np.setdiff1d(frame.instance, NONE):
            own = [p for p in room.parts if p.instance == i]
            seen = points.xyz[points.instance == i]
            assert np.min([distance_to(p, seen) for p in own], 0).max() < 1e-5  # m; float32
            assert {p.semantic for p in own} == set(points.semantic[points.instance == i])
        rest = points.xyz[points.instance == NONE]
        walls = np.abs(np.abs(rest[:, :2]) - room.half).min(1)
        assert np.minimum(walls, np.minimum(np.abs(rest[:, 2]), np.abs(rest[:, 2] - 2.6))).max() < 1e-5
        floor = points.semantic == CLASSES.index("floor")
        assert floor.any() and np.abs(points.xyz[floor, 2]).max() < 1e-5
        assert set(np.unique(points.semantic[points.instance == NONE])) <= {0, 1, UNLABELLED}


def test_a_nearer_object_hides_a_farther_one():
    """No seen point lies behind a surface: every part's first hit is at or beyond the depth."""
    room = Room(1, 2, SIZE)
    frame = room[3]
    v, u = np.mgrid[: SIZE[0], : SIZE[1]].reshape(2, -1)
    K = room.intrinsics
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(u.size)], -1) @ frame.pose[:3, :3].T
    for part in room.parts:
        t, _, _ = part.hit(frame.pose[:3, 3], rays.astype(np.float32))
        assert (frame.depth.reshape(-1) <= t + 1e-5).all()


def test_surfaces_are_of_one_object_and_flat_or_round():
    frame = Room(1, 0, SIZE)[5]
    for s in np.unique(frame.segment):
        assert len(np.unique(frame.instance[frame.segment == s])) == 1
        assert len(np.unique(frame.semantic[frame.segment == s])) == 1


def test_frames_depend_on_seed_index_and_number_alone():
    a, b = Room(3, 1, SIZE), Room(3, 1, SIZE)
    b[0], b[9]
    for name in ("colour", "depth", "instance", "segment"):
        assert np.array_equal(getattr(a[4], name), getattr(b[4], name))
    assert not np.array_equal(a[4].colour, Room(3, 2, SIZE)[4].colour)
    lap = len(a)
    assert np.array_equal(a[lap + 4].depth, a[4].depth) and np.allclose(a.pose(lap + 4), a.pose(4))


def test_reprojection_and_the_next_frame():
    room = Room(0, 0, SIZE)
    points = frame_points(room[0])
    assert reprojection_error(points).max() < 0.5  # px
    uv, z = project(points.xyz, room.intrinsics, room.pose(1))
    u, v = np.rint(np.nan_to_num(uv, nan=-1)).astype(int).T
    inside = (u >= 0) & (v >= 0) & (u < SIZE[1]) & (v < SIZE[0])
    close = np.abs(z[inside] - room[1].depth[v[inside], u[inside]]) < 0.1
    assert inside.mean() > 0.5 and close.mean() > 0.8  # the rest is hidden there


def test_noise_and_holes():
    clean, noisy = Room(0, 0, SIZE)[2], Room(0, 0, SIZE, depth_noise=0.01, holes=0.2)[2]
    known = noisy.depth > 0
    error = (noisy.depth - clean.depth)[known] / clean.depth[known] ** 2
    assert abs(known.mean() - 0.8) < 0.05 and abs(error.std() - 0.01) < 0.002
    assert len(frame_points(noisy)) == known.sum()
    with pytest.raises(ValueError, match="holes 1.0"):
        Room(0, 0, holes=1.0)


def test_every_class_occurs():
    seen = {p.semantic for k in range(12) for p in Room(0, k, SIZE).parts}
    assert seen == set(range(2, len(CLASSES)))


def test_fused_room_has_one_point_a_voxel_and_its_labels():
    room = Room(0, 1, SIZE)
    scene = fuse([room[k] for k in (0, 6)], voxel=0.05)
    keys = np.floor(scene.xyz / 0.05).astype(int)
    assert len(np.unique(keys, axis=0)) == len(keys)
    for i in np.setdiff1d(scene.instance, NONE):
        own = [p for p in room.parts if p.instance == i]
        assert np.min([distance_to(p, scene.xyz[scene.instance == i]) for p in own], 0).max() < 1e-5


def test_written_room_is_read_back(tmp_path):
    room = Room(0, 1, SIZE, colour_noise=0)
    write_room(tmp_path / "room", room, 4)
    frames = RgbdFolder(tmp_path / "room")
    assert len(frames) == 4 and frames.layout == "folders" and frames.names == ["0", "1", "2", "3"]
    for k, frame in enumerate(frames[k] for k in range(4)):
        assert np.abs(frame.depth - room[k].depth).max() <= 0.0005 + 1e-6  # millimetres on disk
        assert np.allclose(frame.pose, room.pose(k)) and np.allclose(frame.intrinsics, room.intrinsics)
        assert np.abs(frame.colour.astype(int) - room[k].colour).mean() < 6  # jpg
    share, pairs = check_geometry(frames)
    assert share > 0.5 and pairs > 0


# ---- clips


def test_boxes_hold_the_objects_and_follow_the_augmentation():
    data = RoomClips(2, 0, clip_len=3, points=1500, augment=Augmentation(elastic=0), size=SIZE)
    clip = data[(4, 1)]
    for frame, coords in zip(clip.frames, clip.coords, strict=True):
        assert coords.shape == frame.xyz.shape == (1500, 3) and coords.dtype == np.float32
        assert np.allclose(coords, frame.xyz @ clip.matrix[:3, :3].T + clip.matrix[:3, 3], atol=1e-5)
        ids, low, high = instance_boxes(coords, frame.instance)
        rows = np.searchsorted(clip.objects, ids)
        assert np.array_equal(clip.objects[rows], ids)
        # 64 points stand for a circle, so a box may be 0.12 % of a radius too small
        assert (low > clip.boxes[rows, :3] - 2e-3).all() and (high < clip.boxes[rows, 3:] + 2e-3).all()
        assert reprojection_error(frame).max() < 0.5


def test_clips_repeat_for_a_key_and_differ_between_epochs():
    data = RoomClips(2, 0, clip_len=2, points=300, augment=Augmentation(), size=SIZE)
    first, again, other = data[(0, 1)], data[(0, 1)], data[(1, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(first.coords, again.coords, strict=True))
    assert not np.array_equal(first.coords[0], other.coords[0])


def test_single_views_are_centred():
    clip = RoomClips(1, 0, clip_len=1, points=500, size=SIZE)[0]
    assert np.abs(clip.frames[0].xyz.mean(0)).max() < 1e-3 and reprojection_error(clip.frames[0]).max() < 0.5
    ids, low, _ = instance_boxes(clip.coords[0], clip.frames[0].instance)
    assert (low > clip.boxes[np.searchsorted(clip.objects, ids), :3] - 2e-3).all()
