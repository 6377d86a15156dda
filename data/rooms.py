"""Rendered rooms: boxes, balls, drums, tables and chairs ray-cast to colour, depth and exact labels, the camera moving.

A room is a function of (seed, index). Its floor is z = 0, its middle the origin, z points up. The camera goes round it
before the walls, above the objects, looking across and swaying; frame k of any room is the same whatever was read
before, and laps repeat. Colours are drawn for every object, so shape tells the class. Objects stand apart, some on
tables.

Classes: CLASSES, wall and floor first (stuff, instance 0); the ceiling is unlabelled (index len(CLASSES)). Objects are
numbered from 1. segment: one id for each face of a part of an object, walls, floor and ceiling: exact superpoints.
H x W px, N points, M rays.
"""

from dataclasses import dataclass

import numpy as np

from data.rgbd_frames import Frame, intrinsic_matrix

CLASSES = ("wall", "floor", "box", "ball", "drum", "table", "chair")
UNLABELLED = len(CLASSES)
HEIGHT = 2.6  # m, of the ceiling
FACES = 6  # segments that a part can have
ROOM = 6  # segments of the room itself: walls -x +x -y +y, floor, ceiling


@dataclass
class Part:
    """A convex piece. kind: box, ball or drum (upright). centre (3,) m; half (3,): half sizes, of a ball and a drum its
    radius, radius, half height. turn: radians about z."""

    kind: str
    centre: np.ndarray
    half: np.ndarray
    turn: float
    colour: np.ndarray  # (3,) 0..1
    instance: int
    semantic: int

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rays (M, 3) from origin (3,) -> distance in ray lengths (M,), inf: missed; normal (M, 3); face (M,)."""
        c, s = np.cos(self.turn), np.sin(self.turn)
        R = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)  # the part's axes as columns
        o, d = ((origin - self.centre) @ R).astype(np.float32), rays @ R
        cast = {"box": cast_box, "ball": cast_ball, "drum": cast_drum}[self.kind]
        t, normal, face = cast(o, d, self.half.astype(np.float32))
        return t, normal @ R.T, face


def cast_box(o: np.ndarray, d: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box around 0, rays in its axes. Faces -x +x -y +y -z +z."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (-half - o) / d, (half - o) / d  # (M, 3)
    x, y, z = np.fmin(a, b).T
    t = np.maximum(np.maximum(x, y), z)
    axis = np.where(t == x, 0, np.where(t == y, 1, 2))
    last = np.fmax(a, b)
    t = np.where((t <= np.minimum(np.minimum(last[:, 0], last[:, 1]), last[:, 2])) & (t > 0), t, np.inf)
    up = np.take_along_axis(d, axis[:, None], 1)[:, 0] < 0
    normal = np.eye(3, dtype=np.float32)[axis] * np.where(up, 1, -1).astype(np.float32)[:, None]
    return t, normal, 2 * axis + up


def cast_ball(o: np.ndarray, d: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ball around 0 of radius half[0]."""
    a, b, c = (d * d).sum(1), d @ o, o @ o - half[0] ** 2
    root = b * b - a * c
    t = (-b - np.sqrt(np.maximum(root, 0))) / a
    t = np.where((root > 0) & (t > 0), t, np.inf)
    return t, (o + np.where(np.isfinite(t), t, 0)[:, None] * d) / half[0], np.zeros(len(d), int)


def cast_drum(o: np.ndarray, d: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An upright cylinder around 0 of radius half[0], half height half[2]. Faces side, bottom, top."""
    a, b, c = (d[:, :2] ** 2).sum(1), d[:, :2] @ o[:2], o[:2] @ o[:2] - half[0] ** 2
    root = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        side = (-b - np.sqrt(np.maximum(root, 0))) / a
        cap = (np.where(d[:, 2] < 0, half[2], -half[2]) - o[2]) / d[:, 2]  # of the cap that faces the ray
    on_side = (root > 0) & (side > 0) & (np.abs(o[2] + side * d[:, 2]) <= half[2])
    p = o[:2] + np.where(np.isfinite(cap), cap, 0)[:, None] * d[:, :2]
    on_cap = np.isfinite(cap) & (cap > 0) & ((p**2).sum(1) <= half[0] ** 2)
    t = np.where(on_side, side, np.where(on_cap, cap, np.inf))
    at = o + np.where(np.isfinite(t), t, 0)[:, None] * d
    flat = np.stack([0 * cap, 0 * cap, np.where(d[:, 2] < 0, 1, -1)], -1)
    normal = np.where(on_side[:, None], at * (1, 1, 0) / half[0], flat)
    return t, normal.astype(np.float32), np.where(on_side, 0, np.where(d[:, 2] < 0, 2, 1))


# ---- what stands in a room


def pieces(name: str, rng: np.random.Generator) -> list[tuple[str, tuple, tuple]]:
    """Parts of an object that stands on z = 0 around the origin: (kind, centre, half)."""
    if name == "box":
        x, y, z = rng.uniform(0.15, 0.32), rng.uniform(0.15, 0.32), rng.uniform(0.15, 0.45)
        return [("box", (0, 0, z), (x, y, z))]
    if name == "ball":
        r = rng.uniform(0.15, 0.3)
        return [("ball", (0, 0, r), (r, r, r))]
    if name == "drum":
        r, z = rng.uniform(0.14, 0.28), rng.uniform(0.2, 0.5)
        return [("drum", (0, 0, z), (r, r, z))]
    if name == "table":
        x, y, z = rng.uniform(0.35, 0.55), rng.uniform(0.3, 0.4), rng.uniform(0.5, 0.75)
    else:  # chair
        x, y, z = rng.uniform(0.2, 0.25), rng.uniform(0.2, 0.25), rng.uniform(0.38, 0.48)
    legs = [
        ("box", (i * (x - 0.04), j * (y - 0.04), z / 2 - 0.02), (0.03, 0.03, z / 2 - 0.02))
        for i in (-1, 1)
        for j in (-1, 1)
    ]
    back = [("box", (-x + 0.03, 0, z + 0.22), (0.03, y, 0.22))] if name == "chair" else []
    return [("box", (0, 0, z - 0.02), (x, y, 0.03)), *legs, *back]


def furnish(rng: np.random.Generator, half: np.ndarray, objects: tuple[int, int]) -> list[Part]:
    """Objects on the floor, apart from each other, and small ones on some tables."""
    parts: list[Part] = []
    taken: list[tuple[np.ndarray, float]] = []
    wanted, number, tries = int(rng.integers(objects[0], objects[1] + 1)), 0, 0

    def put(name: str, where: np.ndarray, shapes: list, turn: float) -> None:
        c, s = np.cos(turn), np.sin(turn)
        colour = rng.uniform(0.15, 0.95, 3)
        for kind, (x, y, z), size in shapes:
            centre = where + (c * x - s * y, s * x + c * y, z)
            parts.append(Part(kind, centre, np.array(size), turn, colour, number, CLASSES.index(name)))

    while tries < 2 * wanted and number < wanted:
        tries += 1
        name = CLASSES[2 + int(rng.integers(len(CLASSES) - 2))]
        shapes, turn = pieces(name, rng), rng.uniform(0, 2 * np.pi)
        reach = max(np.hypot(abs(c[0]) + h[0], abs(c[1]) + h[1]) for _, c, h in shapes)
        spots = rng.uniform(-1, 1, (60, 2)) * (half - 0.6 - reach)  # the camera's way runs outside
        apart = [all(np.linalg.norm(spot - p) > reach + r + 0.05 for p, r in taken) for spot in spots]
        if not any(apart):
            continue
        spot = spots[apart.index(True)]
        taken.append((spot, reach))
        number += 1
        put(name, np.r_[spot, 0], shapes, turn)
        if name == "table" and number < wanted and rng.random() < 0.6:
            number += 1
            small = ("box", "ball", "drum")[int(rng.integers(3))]
            shapes = [(kind, tuple(0.55 * np.array(c)), tuple(0.55 * np.array(h))) for kind, c, h in pieces(small, rng)]
            put(small, np.r_[spot, parts[-5].centre[2] + 0.03], shapes, turn)  # parts[-5]: the top of the table
    return parts


# ---- a room


class Room:
    """Frames of one room, `room[k]` -> Frame for any k >= 0; len(room): frames of a lap.

    size (H, W) px, the focal length 0.9 W as ScanNet's. objects: fewest and most. lap: frames until the camera is back.
    depth_noise: deviation at 1 m, m, growing with the square of the depth. holes: share of pixels without depth.
    colour_noise: deviation in grey levels.
    """

    def __init__(
        self, seed: int, index: int, size: tuple[int, int] = (120, 160), objects: tuple[int, int] = (5, 9),
        lap: int = 36, depth_noise: float = 0.0, holes: float = 0.0, colour_noise: float = 4.0,
    ):  # fmt: skip
        if (
            min(size) < 16
            or not 0 <= objects[0] <= objects[1]
            or lap < 1
            or min(depth_noise, colour_noise) < 0
            or not 0 <= holes < 1
        ):
            raise ValueError(f"Room: size {size}, objects {objects}, lap {lap}, depth_noise {depth_noise}, holes "
                             f"{holes}, colour_noise {colour_noise}; expected sides >= 16, 0 <= fewest <= most, a lap, "
                             "no negative noise, holes in 0..1")  # fmt: skip
        self.seed, self.index, self.size, self.lap = seed, index, tuple(size), lap
        self.depth_noise, self.holes, self.colour_noise = depth_noise, holes, colour_noise
        rng = np.random.default_rng([seed, index])
        self.half = rng.uniform(1.7, 2.4, 2)  # m, of the floor
        self.wall, self.ground = rng.uniform(0.5, 0.9, 3), rng.uniform(0.25, 0.7, 3)
        self.parts = furnish(rng, self.half, objects)
        self.start, self.way = rng.uniform(0, 2 * np.pi), float(rng.choice([-1, 1]))
        self.height, self.sway = rng.uniform(1.5, 1.8), rng.uniform(0, 2 * np.pi)
        H, W = self.size
        self.intrinsics = intrinsic_matrix(0.9 * W, 0.9 * W, (W - 1) / 2, (H - 1) / 2)

    def __len__(self) -> int:
        return self.lap

    def pose(self, k: int) -> np.ndarray:
        """Camera-to-world of frame k."""
        a = self.start + self.way * 2 * np.pi * k / self.lap
        ring = self.half - 0.35
        eye = np.r_[ring * (np.cos(a), np.sin(a)), self.height + 0.1 * np.sin(2 * a)]
        target = np.r_[0.5 * np.cos(3 * a + self.sway), 0.5 * np.sin(3 * a + self.sway), 0.3]
        forward = (target - eye) / np.linalg.norm(target - eye)
        right = np.cross(forward, (0, 0, 1.0))
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
        pose[:3, 3] = eye
        return pose

    def outline(self) -> tuple[np.ndarray, np.ndarray]:
        """Points (M, 3) float32 on the rims of all parts, and their instance (M,): they span the boxes of whole
        objects, however turned; 64 directions of a ball and a drum."""
        a = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        ring = np.stack([np.cos(a), np.sin(a), 0 * a], -1)
        corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        ends = {
            "box": corners,
            "drum": np.r_[ring - (0, 0, 1), ring + (0, 0, 1)],
            "ball": np.r_[ring, [[0, 0, -1], [0, 0, 1]]],
        }
        points, owners = [np.zeros((0, 3))], [np.zeros(0, np.int64)]
        for part in self.parts:
            c, s = np.cos(part.turn), np.sin(part.turn)
            at = ends[part.kind] * part.half @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
            points.append(at + part.centre)
            owners.append(np.full(len(at), part.instance))
        return np.concatenate(points).astype(np.float32), np.concatenate(owners)

    def __getitem__(self, k: int) -> Frame:
        if k < 0:
            raise IndexError(f"frame {k} of a room; expected at least 0")
        H, W = self.size
        pose, K = self.pose(k), self.intrinsics
        v, u = np.mgrid[:H, :W].reshape(2, -1)
        camera = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(H * W)], -1)
        rays = (camera @ pose[:3, :3].T).astype(np.float32)  # (M, 3); their length is the depth's unit
        depth, normal, owner, segment = self.cast(pose, rays)
        colour = self.shade(pose[:3, 3], rays, depth, normal, owner, segment)
        rng = np.random.default_rng([self.seed, self.index, k, 1])
        if self.colour_noise:
            colour = colour + rng.normal(0, self.colour_noise, (H * W, 1)).astype(np.float32)
        if self.depth_noise:
            depth = depth + (self.depth_noise * depth**2 * rng.standard_normal(H * W)).astype(np.float32)
        if self.holes:
            depth = np.where(rng.random(H * W) < self.holes, 0, depth)
        instance = np.array([0, *(p.instance for p in self.parts)])[owner + 1]
        semantic = np.array([0, *(p.semantic for p in self.parts)])[owner + 1]
        semantic = np.where(owner >= 0, semantic, np.where(segment == 4, 1, np.where(segment == 5, UNLABELLED, 0)))
        maps = [m.reshape(H, W).astype(np.int64) for m in (instance, semantic, segment)]
        image = np.clip(colour + 0.5, 0, 255).astype(np.uint8).reshape(H, W, 3)
        return Frame(f"{k:06d}", image, depth.reshape(H, W).astype(np.float32), pose, K, *maps)

    def cast(self, pose: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, ...]:
        """First hits: depth (M,) m, normal (M, 3), owner (M,) index of the part or -1: the room, segment (M,)."""
        origin = pose[:3, 3].astype(np.float32)
        box = np.array([*self.half, HEIGHT / 2], np.float32)
        o = origin - np.array([0, 0, HEIGHT / 2], np.float32)
        with np.errstate(divide="ignore"):
            x, y, z = ((np.where(rays > 0, box, -box) - o) / rays).T  # (M,) each, from inside
        depth = np.minimum(np.minimum(x, y), z)
        axis = np.where(depth == x, 0, np.where(depth == y, 1, 2))
        up = np.take_along_axis(rays, axis[:, None], 1)[:, 0] > 0
        normal = np.eye(3, dtype=np.float32)[axis] * np.where(up, -1, 1).astype(np.float32)[:, None]
        segment, owner = 2 * axis + up, np.full(len(rays), -1)
        for n, part in enumerate(self.parts):
            rows = self.window(part, pose)
            if not len(rows):
                continue
            t, turned, face = part.hit(origin, rays[rows])
            first = t < depth[rows]
            rows = rows[first]
            depth[rows], normal[rows], owner[rows] = t[first], turned[first], n
            segment[rows] = ROOM + FACES * n + face[first]
        return depth, normal, owner, segment

    def window(self, part: Part, pose: np.ndarray) -> np.ndarray:
        """Rays that can meet the part: those of a rectangle around its bounding sphere, indices into H * W."""
        (H, W), K = self.size, self.intrinsics
        r = float(part.half[0] if part.kind == "ball" else np.linalg.norm(part.half))
        x, y, z = (part.centre - pose[:3, 3]) @ pose[:3, :3]
        if z < -r:
            return np.zeros(0, int)
        near = z - r
        if near < 0.05:  # the camera is beside it: look everywhere
            return np.arange(H * W)
        ends = []
        for c, f, p, n in ((x, K[0, 0], K[0, 2], W), (y, K[1, 1], K[1, 2], H)):
            low = p + f * min((c - r) / near, (c - r) / (z + r))
            high = p + f * max((c + r) / near, (c + r) / (z + r))
            ends.append(np.arange(int(np.clip(np.floor(low), 0, n)), int(np.clip(np.ceil(high) + 1, 0, n))))
        return (ends[1][:, None] * W + ends[0]).reshape(-1)

    def shade(self, eye: np.ndarray, rays: np.ndarray, depth, normal, owner, segment) -> np.ndarray:
        """Colours (M, 3) float32 0..255: a lamp under the ceiling, light from all sides, tiles on floor and walls."""
        at = eye.astype(np.float32) + rays * depth[:, None]
        own = np.array([self.wall, *(p.colour for p in self.parts)], np.float32)[owner + 1]
        own = np.where((segment == 4)[:, None], self.ground.astype(np.float32), own)
        tile = np.floor((at + 0.01 * normal) / 0.5).astype(np.int64) @ (1, 1, 1) % 2
        own = own * np.where((owner < 0) & (tile == 0), 0.85, 1.0).astype(np.float32)[:, None]
        lamp = np.array([0.4, -0.3, HEIGHT - 0.1], np.float32) - at
        lit = np.maximum((lamp * normal).sum(1) / np.linalg.norm(lamp, axis=1), 0)
        return 255 * own * (0.45 + 0.55 * lit)[:, None]
