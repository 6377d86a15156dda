"""What scenes are inferred from: frames of a folder turned so that z is up, their points and superpoints, and a mesh.

Nothing here opens labels. Shapes: N points of a frame, V vertices. A mesh lies in the world of the folder's poses; a
scene hands it out turned like the frames.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from data.rgbd_checks import check_geometry
from data.rgbd_folder import RgbdFolder
from data.rgbd_frames import Frame, FramePoints, frame_points, sample, stable_seed, superpoint_map
from data.scannet import read_json, read_ply
from utils.run import UserError
from utils.scene_geometry import point_normals, stands_upright, turn_to_z, up_direction

REACH = 500.0  # m from the origin that a camera may be
NEAR, SHARE = 0.1, 0.5  # m between what was seen and the mesh's vertices, and how much must be so near
PAIRS = 4  # of neighbouring frames whose depth must agree


@dataclass
class Scene:
    """frames: numbers of those that are read; masks: folder of superpoints or None; turn (3, 3): takes the folder's world
    to one with z up; mesh: vertices (V, 3) float32 m, turned, and colours (V, 3) 0..1; segments (V,) int64; files: what
    mesh and segments were read from."""

    name: str
    folder: RgbdFolder
    frames: range
    masks: Path | None
    turn: np.ndarray
    mesh: tuple[np.ndarray, np.ndarray] | None = None
    segments: np.ndarray | None = None
    files: tuple[Path, ...] = ()

    def sources(self) -> list[Path]:
        """Pictures, depth, mesh: the files that the result is made from."""
        entries = [self.folder.entries[k] for k in self.frames]
        return [x for e in entries for x in (e.colour, e.depth)] + list(self.files)

    def eyes(self) -> np.ndarray:
        """Camera positions (T, 3), turned."""
        return np.stack([self.folder.entries[k].pose[:3, 3] for k in self.frames]) @ self.turn.T

    def read(self, points: int) -> Iterator[tuple[Frame, FramePoints, dict[str, float]]]:
        """Frame after frame with at most so many points (0: all), always the same ones, and the seconds that it took to
        read it and to find its superpoints. UserError names the frame that has none."""
        move = np.eye(4)
        move[:3, :3] = self.turn
        for k in self.frames:
            t0 = time.perf_counter()
            frame = self.folder[k]
            frame = replace(frame, pose=move @ frame.pose)
            t1 = time.perf_counter()
            cloud = frame_points(replace(frame, segment=self.superpoints(frame)))
            count = min(points or len(cloud), len(cloud))
            cloud = sample(cloud, count, stable_seed(self.name, frame.name, "infer"))
            yield frame, cloud, {"read": t1 - t0, "superpoints": time.perf_counter() - t1}

    def superpoints(self, frame: Frame) -> np.ndarray:
        """(H, W) int64"""
        try:
            return superpoint_map(frame, self.masks)
        except UserError:
            raise
        except ValueError as e:
            raise UserError(
                f"{self.folder.root}: frame {frame.name} has no superpoint ({e}); leave the frame out"
            ) from e


def open_scene(
    root: Path, layout: str = "auto", intrinsics: tuple[float, ...] | None = None, depth_scale: float | None = None,
    invalid: tuple[float, ...] = (0, 65535), every: int = 1, limit: int = 0, masks: Path | None = None, up: str = "auto",
) -> Scene:  # fmt: skip
    """A folder of frames (data/rgbd_folder.py), every so many-th, the first `limit` (0: all). masks: folder of superpoints,
    DIR/<scene>/ or DIR/. up: auto turns a world in which cameras do not stand upright, z does not.

    UserError as RgbdFolder has it, for camera positions that are no metres, and where another depth scale or pose
    direction explains the depth of neighbouring frames better.
    """
    name = root.resolve().name
    folder = RgbdFolder(root, layout, intrinsics, depth_scale, invalid, every)
    frames = range(min(limit or len(folder), len(folder)))
    poses = np.stack([folder.entries[k].pose for k in frames])
    reach = np.abs(poses[:, :3, 3]).max()
    if reach > REACH:
        raise UserError(
            f"{root}: cameras are up to {reach:.0f} m from the origin, expected below {REACH:.0f} m; give positions in m"
        )
    check_geometry(folder, PAIRS)
    own = masks / name if masks is not None and (masks / name).is_dir() else masks
    scene = Scene(name, folder, frames, own, np.eye(3))
    if up == "auto" and not stands_upright(poses):
        points = frame_points(folder[0])
        points = sample(points, min(5000, len(points)), stable_seed(name, "up")).xyz
        scene.turn = turn_to_z(up_direction(poses, point_normals(points, poses[:1, :3, 3])[0]))
    return scene


def add_mesh(scene: Scene, mesh: str | None, segments: str | None) -> None:
    """Read mesh and segments for a scene; {scene} in the paths stands for its name. UserError when they do not fit."""
    paths = [None if x is None else Path(x.replace("{scene}", scene.name)) for x in (mesh, segments)]
    scene.files = tuple(p for p in paths if p is not None)
    if paths[0] is not None:
        xyz, colour, _ = read_ply(paths[0])
        scene.mesh = (xyz @ scene.turn.T).astype(np.float32), colour
    if paths[1] is not None:
        scene.segments = np.asarray(read_json(paths[1], "segIndices"), np.int64)
        V = len(scene.mesh[0])
        if len(scene.segments) != V:
            raise UserError(
                f"{paths[1]}: has {len(scene.segments)} ids, the mesh {V} vertices; they are of other scans"
            )


def check_mesh(scene: Scene, points: np.ndarray, mesh: str) -> None:
    """UserError unless the scene's mesh lies where points (M, 3) of the frames do. mesh: as it was named."""
    step = max(1, len(points) // 5000)
    near = np.isfinite(cKDTree(scene.mesh[0]).query(points[::step], distance_upper_bound=NEAR)[0]).mean()
    if near < SHARE:
        raise UserError(
            f"--mesh {mesh}: only {near:.0%} of what the frames of {scene.name} saw lies within {100 * NEAR:.0f} cm of it; "
            "expected the mesh of this scene, in the world of its poses"
        )
