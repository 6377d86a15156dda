"""A ball without any weights: small bright things that move, before a camera that stands still.

A pixel is new where it is brighter than the frame before, the frame after and the median of the seconds around it.
Small components of new pixels are candidates; what is yellow, compact, bright and alone scores high, what belongs to a
player, where much moves, scores low.  Which candidate is the ball is decided over the whole clip, by best_path of
utils/ball_path.py.  Frames that repeat the picture before them (25 -> 30 fps) are found and left out of all
differences.

All of it fails when the camera moves: measure first (`camera_motion`, `check_camera`).  Where a camera that else
stands still moves for a while, there are no candidates.

Candidates are arrays (n, 4) float64: x px, y px (of the original frame, pixel centres at whole numbers), score (about
0 to 1), area (px of the original frame).  The green channel stands for brightness: it separates a yellow ball from
clay, grass and blue courts alike.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from scipy import ndimage

from utils.run import UserError

CELL = 8  # px, of the map of how much moves
AROUND = 4  # frames on either side that tell whether a frame is a repeat
CAMERA_WIDTH, TILE = 320, 32  # px: the camera's motion is measured on small pictures, tile by tile
LEAST = 16  # tiles that it takes: of a smaller picture, things that move fill too large a part
TEXTURE = 6.0  # grey levels: standard deviation of a tile with something to hold on to
STILL = 0.5  # px: a camera that moves no more is fixed
STEP = 4  # moments from one measurement of the camera to the next


@dataclass(frozen=True)
class MotionConfig:
    """Pixels are those of the working size; grey levels are 0 to 255."""

    width: int = 1280  # wider frames are worked on at this width
    window: int = 12  # frames on either side from which the background comes; bounds memory and delay
    samples: int = 9  # of them, for the median
    threshold: int = 18  # grey levels that make a pixel new
    min_area: int = 3  # px
    max_area: int = 220  # px
    max_side: int = 45  # px
    min_score: float = 0.05
    most: int = 20  # candidates of a frame, the best ones

    def __post_init__(self):
        least = min(self.width, self.window, self.samples, self.threshold, self.min_area, self.most)
        if least < 1 or self.max_area < self.min_area or self.max_side < 1:
            raise ValueError(f"{self}: expected positive numbers and min_area <= max_area")


@dataclass
class Moment:
    """A frame that is no repeat, and the repeats after it."""

    index: int
    image: np.ndarray  # uint8 (h, w, 3)
    green: np.ndarray  # uint8 (h, w)
    repeats: list[int] = field(default_factory=list)
    shaken: bool = False  # the camera moves


class MotionDetector:
    """Frames in, candidates out, with a delay of at most `delay` frames that are no repeats and bounded memory.

    push(frame uint8 (H, W, 3) RGB) and finish() return [(frame index, candidates (n, 4)), ...], each frame once and in
    order.  `repeats` lists the frames found to repeat the one before; they carry its candidates.
    ValueError for a frame of another type or size.
    """

    def __init__(self, cfg: MotionConfig = MotionConfig()):
        self.cfg, self.repeats = cfg, []
        self.size: tuple[int, int] | None = None  # (H, W) of the original frames
        self._count = 0
        self._pending: deque[np.ndarray] = deque()  # frames not yet known to be repeats
        self._changes: deque[float] = deque(maxlen=2 * AROUND + 1)  # of the newest frames
        self._last: np.ndarray | None = None  # thumbnail of the newest frame
        self._moments: list[Moment] = []
        self._since = -1  # moments since the first
        self._spectrum: Spectrum | None = None  # of the moment at which the camera was measured last
        self._next = 0  # the moment to answer for, in self._moments

    @property
    def delay(self) -> int:
        return AROUND + self.cfg.window

    def push(self, frame: np.ndarray) -> list[tuple[int, np.ndarray]]:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"MotionDetector: frame {frame.shape} {frame.dtype}, expected (H, W, 3) uint8")
        if self.size is not None and frame.shape[:2] != self.size:
            raise ValueError(f"MotionDetector: frame of {frame.shape[:2]}, the first one had {self.size}")
        self.size = frame.shape[:2]
        image = shrink(frame, self.cfg.width)
        last, self._last = self._last, shrink(image, 160).astype(np.int16).sum(2)  # 3 x grey
        self._changes.append(np.inf if last is None else float(np.abs(self._last - last).max()) / 3)
        self._pending.append(image)
        self._count += 1
        if len(self._pending) > AROUND:
            self._decide()
        return self._answer(self.cfg.window)

    def finish(self) -> list[tuple[int, np.ndarray]]:
        """What is left; after it the detector is done."""
        while self._pending:
            self._decide()
        return self._answer(0)

    def _decide(self) -> None:
        """Is the oldest pending frame a moment or a repeat?  A repeat changes by at most 10 grey levels at 160 px, and
        by a quarter of what the frames around it do; where these do not change either, nothing is a repeat."""
        index = self._count - len(self._pending)
        image = self._pending.popleft()
        at = len(self._changes) - len(self._pending) - 1
        change, near = self._changes[at], list(self._changes)
        around = sorted(c for c in near[max(0, at - AROUND) : at] + near[at + 1 :] if np.isfinite(c))
        if len(around) > 1 and around[-2] > 8 and change <= min(10, around[-2] / 4):
            self.repeats.append(index)
            self._moments[-1].repeats.append(index)
        else:
            self._moments.append(Moment(index, image, np.ascontiguousarray(image[..., 1])))
            self._watch_camera()

    def _watch_camera(self) -> None:
        """Every STEP moments: where the camera has moved since the last time, the moments in between are shaken."""
        self._since += 1
        if self._since % STEP:
            return
        before, self._spectrum = self._spectrum, spectrum(self._moments[-1].image)
        if before is not None and moved(before, self._spectrum) > STILL:
            for moment in self._moments[-STEP - 1 :]:
                moment.shaken = True

    def _answer(self, later: int) -> list[tuple[int, np.ndarray]]:
        """Candidates of all moments that have `later` moments after them, as have their repeats."""
        out = []
        while len(self._moments) - self._next > later:
            moment = self._moments[self._next]
            found = np.zeros((0, 4))
            if not moment.shaken:
                found = candidates(self._moments, self._next, self.size, self.cfg)
            out += [(i, found.copy()) for i in (moment.index, *moment.repeats)]
            self._next += 1
            if self._next > self.cfg.window:
                del self._moments[0]
                self._next -= 1
        return out


def shrink(image: np.ndarray, width: int) -> np.ndarray:
    """uint8 (H, W, 3) -> at most `width` wide, every pixel counted."""
    H, W = image.shape[:2]
    if W <= width:
        return image
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    x = F.interpolate(x, size=(max(1, round(H * width / W)), width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())


def median(planes: Sequence[np.ndarray]) -> np.ndarray:
    """Per pixel median of uint8 planes by sorting half of them; of an even number the upper of the middle two."""
    planes = list(planes)
    for last in range(len(planes) - 1, len(planes) // 2 - 1, -1):
        for k in range(last):
            a, b = planes[k], planes[k + 1]
            planes[k], planes[k + 1] = np.minimum(a, b), np.maximum(a, b)
    return planes[len(planes) // 2]


# ---- candidates of one frame


def candidates(moments: Sequence[Moment], at: int, size: tuple[int, int], cfg: MotionConfig) -> np.ndarray:
    """(n, 4) of moments[at], best first."""
    here, h, w = moments[at], *moments[at].green.shape
    others = [moments[k].green for k in (at - 1, at + 1) if 0 <= k < len(moments)]
    first, last = max(0, at - cfg.window), min(len(moments) - 1, at + cfg.window)
    picked = np.unique(np.linspace(first, last, min(cfg.samples, last - first + 1)).round().astype(int))
    seen_before = median([moments[k].green for k in picked])
    moving = np.zeros((h, w), bool)
    for other in others:
        seen_before = np.maximum(seen_before, other)
        moving |= np.maximum(here.green, other) - np.minimum(here.green, other) > cfg.threshold
    new = np.maximum(here.green, seen_before) - seen_before  # (h, w)
    labels, n = ndimage.label(new > cfg.threshold, np.ones((3, 3)))
    if n == 0:
        return np.zeros((0, 4))
    found = describe(labels, new, here.image, moments[at - 1 if at else 1].image, n)
    side = found["sides"].max(1)
    fits = (found["area"] >= cfg.min_area) & (found["area"] <= cfg.max_area) & (side <= cfg.max_side)
    x, y = found["x"], found["y"]
    score = score_of(found, crowding(moving)[(y // CELL).astype(int), (x // CELL).astype(int)])
    keep = np.flatnonzero(fits & (score >= cfg.min_score))
    keep = keep[np.argsort(-score[keep], kind="stable")][: cfg.most]
    fx, fy = size[1] / w, size[0] / h
    out = np.stack([(x + 0.5) * fx - 0.5, (y + 0.5) * fy - 0.5, score, found["area"] * fx * fy], 1)
    return out[keep]


def describe(labels: np.ndarray, new: np.ndarray, image: np.ndarray, other: np.ndarray, n: int) -> dict:
    """Of each component 1..n: area, weighted centre, sides (n, 2), peak, and how yellow is what came: the part of the
    change against the other image (h, w, 3) that is in green but not in blue."""
    flat = np.flatnonzero(labels)
    flat = flat[np.argsort(labels.ravel()[flat], kind="stable")]
    label = labels.ravel()[flat] - 1
    y, x = np.divmod(flat, labels.shape[1])
    weight = new.ravel()[flat].astype(np.float64)
    starts = np.searchsorted(label, np.arange(n))
    total = np.add.reduceat(weight, starts)
    sides = [np.maximum.reduceat(v, starts) - np.minimum.reduceat(v, starts) + 1 for v in (y, x)]
    change = image.reshape(-1, 3)[flat].astype(np.float64) - other.reshape(-1, 3)[flat]
    green, blue = (np.add.reduceat(change[:, c], starts) for c in (1, 2))
    return {
        "area": np.bincount(label, minlength=n),
        "x": np.add.reduceat(weight * x, starts) / total,
        "y": np.add.reduceat(weight * y, starts) / total,
        "sides": np.stack(sides, 1),
        "peak": np.maximum.reduceat(weight, starts),
        "yellow": (green - blue) / np.maximum(green, 1),
    }


def crowding(moving: np.ndarray) -> np.ndarray:
    """How much moves around: bool (h, w) -> share of moving px (ceil(h / CELL), ceil(w / CELL)) within 7 x 7 cells."""
    h, w = moving.shape
    rows, columns = -(-h // CELL), -(-w // CELL)
    whole = np.pad(moving, ((0, rows * CELL - h), (0, columns * CELL - w))).view(np.uint8)
    cells = whole.reshape(rows, CELL, columns * CELL).sum(1, dtype=np.uint8)  # rows first: much faster
    cells = cells.reshape(rows, columns, CELL).sum(2, dtype=np.float32) / CELL**2
    return ndimage.uniform_filter(cells, 7, mode="nearest")


def score_of(found: dict, crowd: np.ndarray) -> np.ndarray:
    """(n,) about 0 to 1; shoes and shirts end near 0.1, a ball before the crowd near 0.3, in the open above 0.6."""
    fill = found["area"] / found["sides"].prod(1)
    bright = np.minimum(found["peak"] / 100, 1)
    yellow = np.clip(found["yellow"] / 0.5, 0, 1)
    return 0.4 * bright + 0.4 * yellow + 0.3 * fill - 1.5 * crowd - 0.1


# ---- the camera


def camera_samples(num_frames: int, most: int = 24) -> list[int]:
    """Indices of frames, evenly spread, from which to measure the camera's motion."""
    return np.unique(np.linspace(0, num_frames - 1, min(num_frames, most)).round().astype(int)).tolist()


class Spectrum(NamedTuple):
    """Tiles of a frame. transforms complex64 (N, TILE, TILE // 2 + 1), textured bool (N,): has something to hold on to,
    scale: working px of a px of a tile."""

    transforms: np.ndarray
    textured: np.ndarray
    scale: float


def camera_motion(frames: Sequence[np.ndarray], width: int = 1280) -> float:
    """How far the picture moves from each of these frames uint8 (H, W, 3) to the next: px at the working width.

    The median over the tiles that have texture, and the median of all pairs of frames.  0 where less than half of the
    picture, or too small a picture, has texture: before a flat background nobody can tell.
    """
    spectra = [spectrum(frame, width) for frame in frames]
    moves = [moved(a, b) for a, b in zip(spectra[:-1], spectra[1:], strict=True)]
    return float(np.median(moves)) if moves else 0.0


def spectrum(frame: np.ndarray, width: int = 1280) -> Spectrum:
    """Of at most 6 x 10 square tiles, evenly spread over a frame uint8 (H, W, 3)."""
    green = shrink(frame, CAMERA_WIDTH)[..., 1]
    h, w = green.shape
    side = min(TILE, h, w)
    ys = np.unique(np.linspace(0, h - side, min(6, h // side)).astype(int))
    xs = np.unique(np.linspace(0, w - side, min(10, w // side)).astype(int))
    tiles = np.stack([green[y : y + side, x : x + side] for y in ys for x in xs]).astype(np.float32)
    tiles -= tiles.mean((1, 2), keepdims=True)
    window = np.hanning(side).astype(np.float32)
    transforms = scipy.fft.rfft2(tiles * window * window[:, None])
    return Spectrum(transforms, tiles.std((1, 2)) > TEXTURE, min(width, frame.shape[1]) / w)


def moved(before: Spectrum, after: Spectrum) -> float:
    """Median displacement of the tiles between two frames, working px; 0 with too little texture."""
    both = before.textured & after.textured
    if both.sum() < max(LEAST, len(both) / 2):
        return 0.0
    a, b = before.transforms[both], after.transforms[both]
    cross, side = b * a.conj(), a.shape[1]
    size = np.abs(cross)
    cross = cross / (size + size.mean((1, 2), keepdims=True) + 1e-6)  # what is weaker than the mean counts as noise
    peaks = scipy.fft.irfft2(cross, s=(side, side))  # (N, side, side)
    flat = peaks.reshape(len(peaks), -1)
    stays = flat[:, 0] >= 0.8 * flat.max(1)  # a line tells nothing about moves along it: then it did not move
    n, (y, x) = np.arange(len(peaks)), np.divmod(np.where(stays, 0, flat.argmax(1)), side)
    down = y + part(peaks[n, y - 1, x], peaks[n, y, x], peaks[n, (y + 1) % side, x])
    right = x + part(peaks[n, y, x - 1], peaks[n, y, x], peaks[n, y, (x + 1) % side])
    down, right = ((v + side / 2) % side - side / 2 for v in (down, right))
    return float(np.median(np.hypot(down, right))) * before.scale


def part(left: np.ndarray, top: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where between the pixels a peak lies, -0.5 to 0.5 px: the summit of a parabola; 0 where it is too flat to tell."""
    bend = left - 2 * top + right
    return np.where(-bend > 0.3 * top, np.clip(0.5 * (left - right) / np.minimum(bend, -1e-9), -0.5, 0.5), 0.0)


def check_camera(frames: Sequence[np.ndarray], name: str, limit: float = STILL) -> float:
    """camera_motion of sampled frames; UserError when it is more than `limit` px."""
    px = camera_motion(frames)
    if px > limit:
        raise UserError(
            f"{name}: the camera moves ({px:.1f} px at 1280 px width between sampled frames, at most {limit} px is "
            "taken for a fixed camera), so motion cannot find the ball; track it with --detector sam3, or try anyway "
            "with --force"
        )
    return px
