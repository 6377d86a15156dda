"""Posed RGB-D frames and the points in them: back-projection, source pixels, sampling, augmentation of whole clips.

A camera looks along +z, x to the right, y down. A pose (4, 4) float64 takes camera coordinates to the world, metres.
Intrinsics (3, 3) float64 are in pixels of the depth picture; the centre of the top left pixel is (0, 0). Pixel (u, v)
of depth z lies at pose @ [(u - cx) z / fx, (v - cy) z / fy, z, 1]. Points are float32 (N, 3) in the world unless said
otherwise, colours float32 (N, 3) in 0..1, ids int64 (N,).

A point knows its source pixel, so what a picture says about it is looked up there, however the point is moved since.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates, uniform_filter1d

from data.superpoints import compact, depth_superpoints, mask_superpoints, read_masks
from utils.run import UserError

ENOUGH = 320  # px of width that superpoints need
NONE = 0  # of instances: not on an object; objects are numbered from 1 within their scene


@dataclass
class Frame:
    """One posed RGB-D frame; maps have the depth's size. semantic: index of the class, number of classes: unlabelled.
    segment: a partition of the pixels by surface, -1: in none."""

    name: str
    colour: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray  # (H, W) float32 m along the camera's axis, 0: not measured
    pose: np.ndarray  # (4, 4) float64
    intrinsics: np.ndarray  # (3, 3) float64
    instance: np.ndarray | None = None  # (H, W) int64
    semantic: np.ndarray | None = None  # (H, W) int64
    segment: np.ndarray | None = None  # (H, W) int64


@dataclass
class FramePoints:
    """Points of one frame. size: (H, W) of its pictures. The labels and superpoints are None where nothing is known."""

    xyz: np.ndarray  # (N, 3) float32
    colour: np.ndarray  # (N, 3) float32
    uv: np.ndarray  # (N, 2) float32, source pixel
    pose: np.ndarray  # (4, 4) float64
    intrinsics: np.ndarray  # (3, 3) float64
    size: tuple[int, int]
    instance: np.ndarray | None = None  # (N,) int64
    semantic: np.ndarray | None = None  # (N,) int64
    superpoint: np.ndarray | None = None  # (N,) int64

    def __len__(self) -> int:
        return len(self.xyz)

    def take(self, index: np.ndarray) -> "FramePoints":
        """The points of `index` (M,)."""
        rows = {"xyz", "colour", "uv", "instance", "semantic", "superpoint"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in rows}
        return replace(self, **{k: None if v is None else v[index] for k, v in values.items()})

    def centred(self) -> "FramePoints":
        """Axes of the world, origin in the points' mean: the single views of ScanNet-SV. The pose moves along."""
        mean, pose = self.xyz.mean(0, dtype=np.float64), self.pose.copy()
        pose[:3, 3] -= mean
        return replace(self, xyz=(self.xyz - mean).astype(np.float32), pose=pose)


# ---- geometry


def intrinsic_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """(3, 3) float64."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def lift(depth: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every measured pixel of depth (H, W) -> points (N, 3) float32, their pixels (N, 2) float32, row by row."""
    v, u = np.nonzero(depth > 0)
    z = depth[v, u].astype(np.float64)
    camera = np.stack(
        [(u - intrinsics[0, 2]) * z / intrinsics[0, 0], (v - intrinsics[1, 2]) * z / intrinsics[1, 1], z], -1
    )
    return (camera @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32), np.stack([u, v], -1).astype(np.float32)


def project(points: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """points (N, 3) -> pixels (N, 2) float64 and depth (N,) m. A point that is not before the camera has NaN pixels."""
    camera = (points.astype(np.float64) - pose[:3, 3]) @ pose[:3, :3]  # R is a rotation: its inverse is R^T
    z = camera[:, 2]
    safe = np.where(z > 0, z, np.nan)
    u = camera[:, 0] / safe * intrinsics[0, 0] + intrinsics[0, 2]
    v = camera[:, 1] / safe * intrinsics[1, 1] + intrinsics[1, 2]
    return np.stack([u, v], -1), z


def reprojection_error(points: FramePoints) -> np.ndarray:
    """Distance of each point's projection from its source pixel, (N,) px; inf behind the camera."""
    uv, _ = project(points.xyz, points.intrinsics, points.pose)
    return np.nan_to_num(np.linalg.norm(uv - points.uv, axis=1), nan=np.inf)


def check_intrinsics(K: np.ndarray, size: tuple[int, int], source: str) -> None:
    """UserError unless the principal point is near the middle of a picture (H, W) and the focal lengths suit it."""
    (H, W), (fx, fy, cx, cy) = size, (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
    if not np.isfinite(K).all() or min(fx, fy) <= 0:
        raise UserError(f"{source}: intrinsics fx {fx:g} fy {fy:g}; expected positive numbers of pixels")
    if abs(cx - W / 2) > 0.2 * W or abs(cy - H / 2) > 0.2 * H or not 0.25 < fx / W < 4 or not 0.5 < fx / fy < 2:
        raise UserError(
            f"{source}: intrinsics fx {fx:g} fy {fy:g} cx {cx:g} cy {cy:g} do not suit depth of {W}x{H} px; they are "
            "of another resolution, multiply them by the ratio of the widths"
        )


def colour_at_depth(colour: np.ndarray, size: tuple[int, int], K: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    """Colour (h, w, 3) at the pixels of a depth of another size (H, W): nearest. own: the colour's intrinsics (3, 3);
    None: both pictures show the same."""
    (h, w), (H, W) = colour.shape[:2], size
    if (h, w) == (H, W) and own is None:
        return colour
    u, v = np.arange(W), np.arange(H)
    if own is None:
        x, y = (u + 0.5) * w / W - 0.5, (v + 0.5) * h / H - 0.5
    else:
        x = (u - K[0, 2]) / K[0, 0] * own[0, 0] + own[0, 2]
        y = (v - K[1, 2]) / K[1, 1] * own[1, 1] + own[1, 2]
    x, y = np.rint(x).clip(0, w - 1).astype(int), np.rint(y).clip(0, h - 1).astype(int)
    return colour[y[:, None], x]


# ---- points of a frame


def stable_seed(*words: str | int) -> np.random.Generator:
    """Random numbers that depend on the words alone, as (scene, frame, split): the same in every run and process."""
    return np.random.default_rng([zlib.crc32(str(w).encode()) for w in words])


def frame_points(frame: Frame) -> FramePoints:
    """All measured pixels of a frame. frame.segment becomes the superpoint. ValueError when nothing is measured."""
    xyz, uv = lift(frame.depth, frame.intrinsics, frame.pose)
    if not len(xyz):
        raise ValueError(f"frame {frame.name}: no pixel has a depth")
    u, v = uv.astype(int).T
    at = {
        k: None if (m := getattr(frame, k)) is None else m[v, u].astype(np.int64)
        for k in ("instance", "semantic", "segment")
    }
    return FramePoints(
        xyz, (frame.colour[v, u] / np.float32(255)).astype(np.float32), uv, frame.pose, frame.intrinsics,
        frame.depth.shape, at["instance"], at["semantic"], at["segment"],
    )  # fmt: skip


def sample(points: FramePoints, count: int, rng: np.random.Generator) -> FramePoints:
    """`count` points: each at most once where there are as many, otherwise all of them and some again. ids of
    superpoints become 0..S-1."""
    n = len(points)
    index = rng.choice(n, count, replace=False) if n >= count else np.r_[:n, rng.integers(0, n, count - n)]
    picked = points.take(index)
    return picked if picked.superpoint is None else replace(picked, superpoint=compact(picked.superpoint))


def superpoint_map(frame: Frame, masks: Path | None = None) -> np.ndarray:
    """(H, W) int64, -1 without depth: by graph segmentation of depth and colour, or of the masks of the picture
    `frame.name` in the folder `masks`. The segmentation looks at every 4th pixel, so small pictures are enlarged."""
    if masks is not None:
        painted = read_masks(masks, frame.name, *frame.depth.shape)
        return mask_superpoints(painted, frame.depth, frame.colour, frame.intrinsics)
    n = max(1, round(ENOUGH / frame.depth.shape[1]))
    depth, colour = (m.repeat(n, 0).repeat(n, 1) for m in (frame.depth, frame.colour))
    K = np.diag([n, n, 1.0]) @ frame.intrinsics
    K[:2, 2] += (n - 1) / 2  # pixel u covers n u .. n u + n - 1
    return compact(depth_superpoints(depth, colour, K)[n // 2 :: n, n // 2 :: n])


def thing_instances(instance: np.ndarray, semantic: np.ndarray, n_classes: int, n_stuff: int = 2) -> np.ndarray:
    """Targets of instances: the id, -1 outside objects and on stuff (classes below n_stuff) and unlabelled points."""
    thing = (instance != NONE) & (semantic >= n_stuff) & (semantic < n_classes)
    return np.where(thing, instance, -1)


# ---- augmentation


@dataclass(frozen=True)
class Augmentation:
    """Moves the clouds of one clip (frames, and the reconstruction when boxes are needed) by one and the same change.

    flip: chance of mirroring x, and y. rotation: about z, up to +- radians. scale: lowest, highest. shift: deviation,
    m. elastic: chance of a smooth warp, once per (granularity, amplitude) of `fields`, in voxels of `voxel` m.
    """

    flip: float = 0.5
    rotation: float = 3.14
    scale: tuple[float, float] = (0.8, 1.2)
    shift: float = 0.1
    elastic: float = 0.5
    fields: tuple[tuple[int, float], ...] = ((6, 40.0), (20, 160.0))
    voxel: float = 0.02

    def __call__(self, clouds: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
        """clouds: (N_i, 3) float32 each -> the same moved, and the affine part (4, 4) float64 of what was done."""
        matrix = self.draw(rng)
        sizes = np.cumsum([len(c) for c in clouds])[:-1]
        xyz = np.concatenate(clouds).astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        if rng.random() < self.elastic:
            xyz = xyz / self.voxel
            for granularity, amplitude in self.fields:
                xyz = elastic(xyz, granularity, amplitude, rng)
            xyz = xyz * self.voxel
        return np.split(xyz.astype(np.float32), sizes), matrix

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Mirror, then turn, then scale, then shift: (4, 4) float64."""
        mirror = np.where(rng.random(2) < self.flip, -1.0, 1.0)
        a, scale = rng.uniform(-self.rotation, self.rotation), rng.uniform(*self.scale)
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        matrix = np.eye(4)
        matrix[:3, :3] = scale * turn @ np.diag([*mirror, 1.0])
        matrix[:3, 3] = rng.normal(0, self.shift, 3)
        return matrix


def elastic(xyz: np.ndarray, granularity: float, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """xyz (N, 3) in voxels, moved by smooth noise of `amplitude`: nodes 2 x granularity apart, as the released training
    has them; here they span the points only, so that far from the origin costs no memory."""
    step, low = 2.0 * granularity, xyz.min(0)
    nodes = (np.ceil((xyz.max(0) - low) / step)).astype(int) + 5
    at = (xyz - low) / step + 2  # 2 nodes around the points: the blur is whole there
    moved = np.empty_like(xyz)
    for k in range(3):
        noise = rng.standard_normal(nodes)
        for axis in (0, 1, 2, 0, 1, 2):
            noise = uniform_filter1d(noise, 3, axis=axis, mode="constant")
        moved[:, k] = xyz[:, k] + amplitude * map_coordinates(noise, at.T, order=1)
    return moved
