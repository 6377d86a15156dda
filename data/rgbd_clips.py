"""Training and evaluation items of 3D instance segmentation: one frame, or consecutive key frames of one scene.

An item is a `Clip`: points of its frames as they were recorded (so that source pixels and poses stay right), where the
augmentation put them, and the boxes of whole objects, moved alike. Sources: rendered rooms, and what
data/prepare_scannet.py wrote. Item (epoch, k) is a function of (seed, epoch, k).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.rgbd_frames import Augmentation, Frame, FramePoints, frame_points, sample, superpoint_map
from data.rooms import Room
from data.scannet import instance_boxes
from data.scannet_samples import feature_path, read_index, read_points, read_scene


@dataclass
class Clip:
    """T frames of one scene. coords: (N_t, 3) float32 a frame, augmented; matrix (4, 4): the affine part of that.
    objects (K,) int64: instances of the scene; boxes (K, 6) float32: lowest, highest corner of the whole object, moved
    as the points. images, features: files of each frame, or None; pictures: (H, W, 3) uint8 of rendered frames."""

    scene: str
    frames: list[FramePoints]
    coords: list[np.ndarray]
    matrix: np.ndarray
    objects: np.ndarray
    boxes: np.ndarray
    images: list[Path] | None = None
    features: list[Path | None] | None = None
    pictures: list[np.ndarray] | None = None


def make_clip(
    scene: str, frames: list[FramePoints], solid: tuple[np.ndarray, np.ndarray], augment: Augmentation | None,
    rng: np.random.Generator,
) -> Clip:  # fmt: skip
    """solid: points (M, 3) of the whole objects and their instance (M,), in the frames' coordinates."""
    xyz, instance = solid
    clouds, matrix = [f.xyz for f in frames] + [xyz], np.eye(4)
    if augment is not None:
        clouds, matrix = augment(clouds, rng)
    ids, low, high = instance_boxes(clouds[-1], instance)
    return Clip(scene, frames, clouds[:-1], matrix, ids, np.c_[low, high].astype(np.float32))


def adjacent(n: int, length: int, rng: np.random.Generator | None) -> list[int]:
    """`length` consecutive of n key frames from a random start, round the end; rng None: all n in order."""
    if rng is None:
        return list(range(n))
    start = int(rng.integers(n))
    return [(start + i) % n for i in range(length)]


class RoomClips:
    """Rendered rooms. clip_len 1: single views, centred. length: rooms per epoch; the k-th room is always the same, its
    frames and augmentation are drawn for every epoch. stride: frames of the lap from one key frame to the next.

    augment None: for evaluation, the lap's key frames from the first. points: of a frame. exact: surfaces as
    superpoints, else by graph segmentation.
    """

    def __init__(
        self, length: int, seed: int, clip_len: int = 8, points: int = 5000, augment: Augmentation | None = None,
        first: int = 0, stride: int = 2, exact: bool = False, **room,
    ):  # fmt: skip
        if min(length, clip_len, points, stride) < 1:
            raise ValueError(
                f"RoomClips: length {length}, clip_len {clip_len}, points {points}, stride {stride}; expected >= 1"
            )
        self.length, self.seed, self.clip_len, self.points = length, seed, clip_len, points
        self.augment, self.first, self.stride, self.exact, self.room = augment, first, stride, exact, room

    def __len__(self) -> int:
        return self.length

    def draw(self, frame: Frame, rng: np.random.Generator) -> FramePoints:
        if not self.exact:
            frame = replace(frame, segment=superpoint_map(frame))
        return sample(frame_points(frame), self.points, rng)

    def __getitem__(self, key: tuple[int, int] | int) -> Clip:
        epoch, k = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, k, 2])
        room = Room(self.seed, self.first + k, **self.room)
        start = 0 if self.augment is None else int(rng.integers(len(room)))
        chosen = [(start + self.stride * i) % len(room) for i in range(self.clip_len)]
        shots = [room[i] for i in chosen]
        frames = [self.draw(shot, rng) for shot in shots]
        xyz, instance = room.outline()
        if self.clip_len == 1:
            centred = frames[0].centred()
            xyz = (xyz + (centred.pose[:3, 3] - frames[0].pose[:3, 3])).astype(np.float32)
            frames = [centred]
        clip = make_clip(f"room{self.first + k:04d}", frames, (xyz, instance), self.augment, rng)
        clip.pictures = [shot.colour for shot in shots]
        return clip


class PreparedClips:
    """Items of an index of data/prepare_scannet.py: single views, or clips of `clip_len` adjacent key frames.

    train: `points` of a frame are drawn for every epoch, from a random start; otherwise frames are as prepared, and a
    clip is the whole scene. raw: the export, where pictures and CLIP features lie; a feature file that the index or the
    path rule names and that is missing is None. Boxes of single views are of the points of the frame.
    """

    def __init__(
        self, index: Path | str, raw: Path | str | None = None, clip_len: int = 8, points: int = 20_000,
        train: bool = False, augment: Augmentation | None = None, seed: int = 0,
    ):  # fmt: skip
        self.meta, self.rows = read_index(index)
        self.out, self.raw = Path(index).parent, None if raw is None else Path(raw)
        self.classes, self.views = self.meta["classes"], self.meta["views"]
        if clip_len < 1 or points < 1:
            raise ValueError(f"PreparedClips: clip_len {clip_len}, points {points}; expected at least 1")
        self.clip_len, self.points, self.train, self.augment, self.seed = clip_len, points, train, augment, seed

    def __len__(self) -> int:
        return len(self.rows)

    def feature_files(self, k: int) -> list[Path]:
        """Files of precomputed CLIP features of all frames of row k, there or not."""
        row = self.rows[k]
        if self.views == "sv":
            names = [row.get("clip_feat_path", feature_path(row["img_path"]))]
        else:
            names = row.get("clip_feat_paths", [feature_path(name) for name in row["img_paths"]])
        return [self.raw / name for name in names]

    def __getitem__(self, key: tuple[int, int] | int) -> Clip:
        epoch, k = key if isinstance(key, tuple) else (0, key)
        row, rng = self.rows[k], np.random.default_rng([self.seed, epoch, k])
        if self.views == "sv":
            chosen, names, images = [0], [row["frame_path"]], [row["img_path"]]
        else:
            chosen = adjacent(len(row["frame_paths"]), self.clip_len, rng if self.train else None)
            names, images = ([row[key][i] for i in chosen] for key in ("frame_paths", "img_paths"))
        frames = [read_points(self.out / name) for name in names]
        if self.train:
            frames = [sample(f, self.points, rng) for f in frames]
        if self.views == "sv":
            solid = (frames[0].xyz, frames[0].instance)
        else:
            scan = read_scene(self.out / row["scene_path"])
            solid = (scan.xyz, scan.instance)
        clip = make_clip(row["scene"], frames, solid, self.augment, rng)
        if self.raw is not None:
            clip.images = [self.raw / name for name in images]
            every = self.feature_files(k)
            clip.features = [every[i] if every[i].is_file() else None for i in chosen]
        return clip
