"""Pictures of a segmented scene without a window: the coloured cloud beside its instances, from above and aslant.

Points are splatted as squares into a depth buffer, orthographically; surfaces that face away from the viewer are left
out, so one looks through the ceiling and the near walls into the room; edges of depth are darkened (eye-dome lighting:
Boucheny 2009). Shapes: M points in metres with z up, O objects, H x W px; pictures are uint8 RGB.
"""

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.spatial import cKDTree

from utils import overlay
from utils.scene_geometry import point_normals

GROUND, GREY = (250, 250, 248), (206, 209, 214)  # background; points of no object
AWAY = -0.1  # cosine to the viewer below which a surface faces away
SURE = 0.9  # share of the cameras on one side from which it is the front
LIGHT = np.array([0.35, 0.2, 0.91])
MARGIN = 0.04  # of the picture's side around the scene
ROWS = 30  # of a legend, more are summed up


@dataclass
class Cloud:
    """points (M, 3) float32, colour (M, 3) float32 0..1, ids (M,) int64: number of the object 0..O-1, -1 none. eyes
    (T, 3): camera positions, by which surfaces know their front."""

    points: np.ndarray
    colour: np.ndarray
    ids: np.ndarray
    eyes: np.ndarray

    def __post_init__(self):
        M = len(self.points)
        if not M or self.points.shape != (M, 3) or self.colour.shape != (M, 3) or self.ids.shape != (M,):
            raise ValueError(f"cloud {self.points.shape}, {self.colour.shape}, {self.ids.shape}: expected M > 0 points")
        if not np.isfinite(self.points).all() or not len(self.eyes):
            raise ValueError("cloud: expected finite points and at least one camera")

    @cached_property
    def surface(self) -> tuple[np.ndarray, np.ndarray]:
        """Normals (M, 3) to the cameras' side and how many of them stood there, (M,) 0.5..1."""
        return point_normals(self.points, self.eyes)

    def front(self, axes: np.ndarray) -> np.ndarray:
        """Points (M,) that a viewer is to see: all but those that surely face away, as near walls and the ceiling do."""
        normals, share = self.surface
        return (normals @ axes[2] < -AWAY) | (share < SURE)

    @cached_property
    def spacing(self) -> float:
        """m between neighbouring points, that of four in five is not larger."""
        few = self.points[:: -(-len(self.points) // 4000)]
        gap = cKDTree(self.points).query(few, min(2, len(self.points)))[0].reshape(len(few), -1)[:, -1]
        return float(np.clip(np.percentile(gap, 80), 0.005, 0.08))

    def thinned(self, spacing: float) -> "Cloud":
        """The first point of every cell of `spacing` m."""
        x, y, z = np.floor((self.points - self.points.min(0)) / spacing).astype(np.int64).T
        rows = np.sort(np.unique((x << 40) + (y << 20) + z, return_index=True)[1])
        return Cloud(self.points[rows], self.colour[rows], self.ids[rows], self.eyes)

    def shades(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours as seen and colours of the objects, (M, 3) float32 0..255 each; objects keep a trace of the light and of
        their own brightness, points of none are grey."""
        lit = 0.72 + 0.28 * np.abs(self.surface[0] @ LIGHT)[:, None]
        bright = 0.85 + 0.3 * (self.colour.mean(1, keepdims=True) - 0.5)
        table = np.array([*(object_colour(k) for k in range(self.ids.max(initial=-1) + 1)), GREY], np.float32)
        seen = 255 * self.colour
        return seen, np.clip(table[self.ids] * lit * bright, 0, 255).astype(np.float32)


def object_colour(k: int) -> tuple[int, int, int]:
    """The k-th of many colours that differ from those before: golden steps round the circle of hues."""
    strong, light = ((0.85, 0.92), (0.55, 0.98), (0.95, 0.66))[k // 7 % 3]
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb((0.02 + 0.618034 * k) % 1, strong, light))


# ---- views


def axes_of(azimuth: float, elevation: float) -> np.ndarray:
    """Degrees -> rows right, down, forward (3, 3) of a viewer that looks at the middle from azimuth, so far above."""
    a, e = np.radians(azimuth), np.radians(elevation)
    forward = -np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0])
    return np.stack([right, np.cross(forward, right), forward])


@dataclass
class Frustum:
    """axes (3, 3): right, down, forward; scale: px a metre; shift (2,): px; size (H, W)."""

    axes: np.ndarray
    scale: float
    shift: np.ndarray
    size: tuple[int, int]

    @classmethod
    def around(cls, points: np.ndarray, axes: np.ndarray, size: tuple[int, int]) -> "Frustum":
        """Fits all but the farthest six thousandths of the points."""
        at = points @ axes[:2].T
        low, high = np.percentile(at, (0.3, 99.7), axis=0)
        H, W = size
        scale = (1 - 2 * MARGIN) * (np.array([W, H]) / np.maximum(high - low, 0.2)).min()
        return cls(axes, float(scale), np.array([W, H]) / 2 - scale * (low + high) / 2, size)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """(M, 2) float px."""
        return points @ self.axes[:2].T * self.scale + self.shift


def splat(
    points: np.ndarray, colours: Sequence[np.ndarray], frustum: Frustum, spacing: float
) -> tuple[list[np.ndarray], np.ndarray]:
    """points (M, 3) and some colourings (M, 3) 0..255 -> a picture of each and the depth (H, W) m, inf where nothing is.

    A point covers a square as wide as `spacing` m; the nearest to the viewer wins.
    """
    (H, W), depth = frustum.size, points @ frustum.axes[2]
    order = np.argsort(-depth)  # the farthest first: what is written later wins
    side = max(1, int(np.ceil(1.3 * spacing * frustum.scale)))
    x, y = np.floor(frustum.pixels(points[order]) - (side - 1) / 2).astype(np.int64).T
    dy, dx = np.mgrid[:side, :side].reshape(2, -1)
    x, y = x[:, None] + dx, y[:, None] + dy  # (M, side * side)
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    pixel, row = (y * W + x)[inside], np.broadcast_to(order[:, None], x.shape)[inside]
    winner = np.full(H * W, -1)
    winner[pixel] = row
    pictures = []
    for colour in colours:
        table = np.concatenate((colour, [GROUND])).astype(np.float32)
        pictures.append(table[winner].reshape(H, W, 3))
    buffer = np.append(depth, np.inf)[winner].reshape(H, W)
    return [np.clip(p * edge_light(buffer) + 0.5, 0, 255).astype(np.uint8) for p in pictures], buffer


def edge_light(depth: np.ndarray) -> np.ndarray:
    """Depth (H, W) m, inf where nothing is -> brightness (H, W, 1) in 0..1: dark beside what is nearer."""
    wide, hidden = np.pad(depth, 2, mode="edge"), np.zeros(depth.shape)
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (3, 3), (1, 3), (3, 1)):
        other = wide[dy : dy + depth.shape[0], dx : dx + depth.shape[1]]
        step = np.subtract(depth, other, out=np.zeros(depth.shape), where=np.isfinite(depth) & np.isfinite(other))
        hidden += np.clip(step - 0.02, 0, 0.3)
    return np.exp(-0.9 * hidden)[..., None]


def view_pictures(cloud: Cloud, axes: np.ndarray, size: tuple[int, int]) -> tuple[list[np.ndarray], Frustum]:
    """The cloud as seen and its objects (H, W, 3) from one side, without surfaces that face away."""
    front = cloud.front(axes)
    frustum = Frustum.around(cloud.points, axes, size)
    return splat(cloud.points[front], [c[front] for c in cloud.shades()], frustum, cloud.spacing)[0], frustum


# ---- sheets


def number_objects(image: np.ndarray, cloud: Cloud, frustum: Frustum) -> np.ndarray:
    """The number of every object at the middle of its points, but for those too small to hold it."""
    size = max(10, round(0.024 * image.shape[0]))
    for k in np.unique(cloud.ids[cloud.ids >= 0]):
        at = frustum.pixels(cloud.points[cloud.ids == k])
        if np.ptp(at, axis=0).max() > size:
            image = overlay.text(image, np.median(at, axis=0), str(k), size=size, anchor="mm")
    return image


def legend(names: Sequence[str], height: int, title: str = "") -> np.ndarray:
    """A strip (height, W, 3): a square of the colour, the number and the name of each object."""
    rows = list(names[:ROWS]) + ([f"and {len(names) - ROWS} more"] if len(names) > ROWS else [])
    size = int(np.clip(height / (1.5 * (ROWS + 4)), 10, 18))
    step, wide = round(1.5 * size), round(0.62 * size * max([12, len(title), *(len(r) + 6 for r in rows)]))
    image = np.full((height, wide, 3), overlay.DARK, np.uint8)
    image = overlay.text(image, (size // 2, size // 2), title, size=size)
    for k, name in enumerate(rows):
        y = (k + 2) * step
        if k < ROWS:
            image[y : y + size, size // 2 : size // 2 + size] = object_colour(k)
            name = f"{k} {name}"
        image = overlay.text(image, (2 * size, y + size / 2), name, size=size, anchor="lm")
    return image


def scene_picture(cloud: Cloud, names: Sequence[str], title: str, height: int = 560) -> np.ndarray:
    """Left the cloud as seen, right its objects with their numbers; above from the top, below aslant from the side that
    the cameras stood on; at the right the legend. names (O,): class and score of each object."""
    size = (height, round(1.25 * height))
    middle = np.median(cloud.points, axis=0)
    way = cloud.eyes.mean(0) - middle
    azimuth = np.degrees(np.arctan2(way[1], way[0])) if np.hypot(*way[:2]) > 0.3 else -60.0
    tiles, captions = [], []
    for name, elevation in (("from above", 89.9), ("aslant", 38.0)):
        (seen, objects), frustum = view_pictures(cloud, axes_of(azimuth, elevation), size)
        tiles += [seen, number_objects(objects, cloud, frustum)]
        captions += [f"{name}, colours", f"{name}, {len(names)} objects"]
    sheet = overlay.grid(tiles, 2, captions)
    return np.concatenate([sheet, legend(names, sheet.shape[0], title)], 1)


def turntable(cloud: Cloud, frames: int = 72, height: int = 360, spacing: float = 0.03) -> Iterator[np.ndarray]:
    """Pictures (height, W, 3), the cloud as seen beside its objects, the viewer going once round; W is even."""
    cloud, size = cloud.thinned(spacing), (height, height * 5 // 8 * 2)
    scale = min(Frustum.around(cloud.points, axes_of(a, 35), size).scale for a in range(0, 360, 30))
    middle = (cloud.points.min(0) + cloud.points.max(0)) / 2
    shades = cloud.shades()
    for k in range(frames):
        axes = axes_of(360 * k / frames, 35)
        shift = np.array(size[::-1]) / 2 - scale * (axes[:2] @ middle)
        front = cloud.front(axes)
        frustum = Frustum(axes, scale, shift, size)
        pair, _ = splat(cloud.points[front], [c[front] for c in shades], frustum, cloud.spacing)
        yield np.concatenate(pair, 1)
