"""utils/scene_pictures.py, utils/scene_geometry.py, utils/ply_files.py: what is seen, what hides what, which way is up."""

import numpy as np
import pytest

from data.rgbd_frames import frame_points
from data.rooms import Room
from data.scannet import read_ply
from utils.ply_files import write_ply
from utils.scene_geometry import point_normals, stands_upright, turn_to_z, up_direction
from utils.scene_pictures import (
    GROUND,
    ROWS,
    Cloud,
    Frustum,
    axes_of,
    legend,
    object_colour,
    scene_picture,
    splat,
    turntable,
    view_pictures,
)

ROOM = Room(0, 0, (60, 80), colour_noise=0, lap=12)


def plate(z: float, half: float = 1.0, step: float = 0.05) -> np.ndarray:
    x, y = np.mgrid[-half : half + 1e-9 : step, -half : half + 1e-9 : step].reshape(2, -1)
    return np.stack([x, y, np.full(len(x), z)], 1).astype(np.float32)


def cloud_of(*parts: tuple[np.ndarray, tuple, int], eyes=((0, 0, 5.0),)) -> Cloud:
    """parts: points, colour 0..1, object."""
    points = np.concatenate([p for p, _, _ in parts])
    colour = np.concatenate([np.tile(np.float32(c), (len(p), 1)) for p, c, _ in parts])
    ids = np.concatenate([np.full(len(p), i) for p, _, i in parts])
    return Cloud(points, colour, ids, np.array(eyes, np.float32))


def room_cloud(frames: int = 12) -> Cloud:
    clouds = [frame_points(ROOM[k]) for k in range(frames)]
    xyz, colour, ids = (np.concatenate([getattr(c, k) for c in clouds]) for k in ("xyz", "colour", "instance"))
    return Cloud(xyz, colour, ids - 1, np.stack([c.pose[:3, 3] for c in clouds])).thinned(0.05)


# ---- splatting


def test_the_nearer_surface_hides_the_farther_one():
    low, high = plate(0), plate(1, 0.5)
    axes = axes_of(0, 90)
    frustum = Frustum.around(low, axes, (100, 100))
    colours = np.r_[np.tile((255.0, 0, 0), (len(low), 1)), np.tile((0, 0, 255.0), (len(high), 1))]
    (picture,), depth = splat(np.r_[low, high], [colours], frustum, 0.05)
    assert tuple(picture[50, 50]) == (0, 0, 255) and picture[10, 50, 0] > 200 and picture[10, 50, 2] == 0
    assert tuple(picture[0, 0]) == GROUND and not np.isfinite(depth[0, 0])
    assert depth[50, 50] == pytest.approx(-1) and depth[10, 50] == pytest.approx(0)
    (same,), _ = splat(np.r_[high, low], [np.r_[colours[len(low) :], colours[: len(low)]]], frustum, 0.05)
    assert np.array_equal(picture, same), "the order of the points shows"
    inside = np.isfinite(depth)[6:-6, 6:-6]
    assert inside.mean() > 0.99, "holes between splats"


def test_axes_look_where_they_say():
    for azimuth, elevation in ((0, 35), (120, 10), (-60, 89)):
        axes = axes_of(azimuth, elevation)
        assert np.allclose(axes @ axes.T, np.eye(3)) and np.linalg.det(axes) == pytest.approx(1)
        assert axes[1, 2] < 0 and axes[0, 2] == 0, "up is not up in the picture"
    viewer = -axes_of(90, 30)[2]
    assert viewer[1] > 0.8 and viewer[2] == pytest.approx(0.5)


def test_everything_lies_inside_the_picture():
    points = room_cloud(3).points
    frustum = Frustum.around(points, axes_of(30, 35), (90, 120))
    x, y = frustum.pixels(points).T
    assert ((x >= 0) & (x < 120) & (y >= 0) & (y < 90)).mean() > 0.99
    assert np.ptp(x) > 0.8 * 120 or np.ptp(y) > 0.8 * 90


def test_one_looks_through_the_ceiling_and_not_through_the_floor():
    floor, ceiling = plate(0), plate(2.5)
    cloud = cloud_of((floor, (0, 1, 0), 0), (ceiling, (1, 0, 0), 1), eyes=[(0, 0, 1.2)])
    (seen, objects), _ = view_pictures(cloud, axes_of(0, 89.9), (80, 80))
    assert seen[40, 40, 1] > 200 and seen[40, 40, 0] == 0
    off = np.abs(objects[40, 40].astype(int) - object_colour(0)).sum()
    assert off < np.abs(objects[40, 40].astype(int) - object_colour(1)).sum()


def test_what_cameras_saw_from_both_sides_is_not_cut_away():
    board = plate(0.5)[:, [2, 0, 1]]  # stands at x = 0.5
    cloud = cloud_of((board, (0, 1, 0), 0), eyes=[(3, 0, 0), (-2, 0, 0)])
    wall = cloud_of((board, (0, 1, 0), 0), eyes=[(-3, 0, 0), (-2, 0, 0)])
    assert cloud.front(axes_of(0, 10)).all() and cloud.front(axes_of(180, 10)).all()
    assert wall.front(axes_of(180, 10)).all() and not wall.front(axes_of(0, 10)).any()


# ---- colours, sheets


def test_objects_keep_their_colour_and_others_are_grey():
    cloud = cloud_of((plate(0, 0.5), (0.2, 0.5, 0.5), 3), (plate(1, 0.5), (0.5, 0.5, 0.5), -1))
    _, objects = cloud.shades()
    own, grey = objects[cloud.ids == 3], objects[cloud.ids == -1]
    assert np.abs(own - own.mean(0)).max() < 1e-3
    assert np.argmax(own[0]) == np.argmax(object_colour(3)) and np.ptp(grey[0]) < 15


def test_colours_of_neighbours_in_the_list_differ():
    colours = np.array([object_colour(k) for k in range(60)])
    assert len(np.unique(colours, axis=0)) == 60
    assert np.abs(np.diff(colours, axis=0)).sum(1).min() > 90
    assert object_colour(200) != GROUND


def test_the_sheet_shows_every_object_once():
    cloud = room_cloud()
    names = [f"thing {k}" for k in range(cloud.ids.max() + 1)]
    sheet = scene_picture(cloud, names, "a room", height=200)
    assert sheet.dtype == np.uint8 and sheet.ndim == 3
    strip = legend(names, sheet.shape[0], "a room")
    assert np.array_equal(sheet[:, -strip.shape[1] :], strip)
    for k in range(len(names)):
        assert (strip == object_colour(k)).all(-1).sum() >= 80
    many = legend([f"n {k}" for k in range(ROWS + 9)], 600)
    assert not (many == object_colour(ROWS + 1)).all(-1).sum() >= 80
    empty = Cloud(cloud.points, cloud.colour, np.full(len(cloud.points), -1), cloud.eyes)
    assert scene_picture(empty, [], "nothing found", height=120).shape[0] > 240


def test_the_turntable_goes_round():
    frames = list(turntable(room_cloud(4), frames=4, height=96))
    assert len(frames) == 4 and {f.shape for f in frames} == {frames[0].shape} and frames[0].shape[1] % 2 == 0
    assert all((f != GROUND).any(-1).mean() > 0.05 for f in frames)
    assert not np.array_equal(frames[0], frames[2])


def test_clouds_are_checked():
    points = plate(0)
    grey, ids, eye = np.zeros_like(points), np.zeros(len(points), np.int64), np.zeros((1, 3))
    for bad in ((points[:0], grey[:0], ids[:0], eye), (points, grey, ids[1:], eye), (points, grey, ids, eye[:0]),
                (points * np.nan, grey, ids, eye)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            Cloud(*bad)


# ---- geometry


def test_normals_point_to_the_camera():
    cloud = frame_points(ROOM[0])
    normals, share = point_normals(cloud.xyz, cloud.pose[None, :3, 3])
    assert (share == 1).all()
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-3)
    assert (((cloud.pose[:3, 3] - cloud.xyz) * normals).sum(1) >= 0).all()
    floor = cloud.semantic == 1
    assert np.median(normals[floor][:, 2]) > 0.99
    assert point_normals(plate(0)[:3], np.ones((1, 3)))[0].shape == (3, 3)
    _, share = point_normals(plate(0), np.array([(0, 0, 1), (0, 0, -1), (0, 0.1, 1)]))
    assert np.allclose(share, 2 / 3, atol=0.05)


@pytest.mark.parametrize("axis", [(0, 0, 1), (0, 0, -1), (0, 1, 0), (1, 0, 0), (0.5, -0.7, -0.3)])
def test_up_is_found_and_turned_to_z(axis):
    """Cameras of the room look down by some 20 degrees; the floor says it exactly."""
    z = np.array(axis) / np.linalg.norm(axis)
    back = turn_to_z(z).T  # z -> axis
    assert np.allclose(back @ back.T, np.eye(3)) and np.allclose(back @ (0, 0, 1), z)
    clouds = [frame_points(ROOM[k]) for k in range(3)]
    poses = np.stack([c.pose for c in clouds])
    poses[:, :3] = back @ poses[:, :3]
    points = clouds[0].xyz @ back.T
    up = up_direction(poses, point_normals(points, poses[:1, :3, 3])[0])
    assert np.degrees(np.arccos(min(1.0, up @ z))) < 1
    assert stands_upright(poses) == (z[2] > 0.8)


# ---- ply


def test_ply_holds_what_was_given(tmp_path):
    cloud = room_cloud(2)
    write_ply(tmp_path / "a.ply", cloud.points, cloud.colour, instance=cloud.ids)
    xyz, colour, faces = read_ply(tmp_path / "a.ply")
    assert (
        np.array_equal(xyz, cloud.points) and not len(faces) and np.abs(colour - cloud.colour).max() <= 0.5 / 255 + 1e-6
    )
    content = (tmp_path / "a.ply").read_bytes()
    assert b"property int instance\n" in content
    rows = np.frombuffer(
        content.split(b"end_header\n", 1)[1], np.dtype([("xyz", "<f4", 3), ("c", "u1", 4), ("i", "<i4")])
    )
    assert np.array_equal(rows["i"], cloud.ids)
    with pytest.raises(ValueError, match="differ"):
        write_ply(tmp_path / "b.ply", cloud.points, cloud.colour, instance=cloud.ids[1:])
    assert not (tmp_path / "b.ply").exists()
