"""Rendered play with one ball, one racket and things that are neither, with exact masks: what a tiny SAM3 learns from.

A yellow ball bounces on parabolas from wall to wall, a red elliptic racket swings, and up to four distractors drift:
discs, squares, triangles and ellipses of other colours, as large as a ball, as a racket, or larger. The grounds are grass,
clay, hard court and wood with stripes, lines and noise. Either target is missing from a share of the clips; in others
the ball, the racket or both vanish for some frames and come back. The ball covers the racket, the racket the rest.

A clip is a function of (seed, index); its first frames are those of any longer clip of that index. A pixel belongs to
what covers its centre; centres of pixels are whole numbers. Shapes: T frames, H x W px.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.moving_shapes import inside
from data.video import VideoWriter
from utils.run import write_text_atomic

TARGETS = ("ball", "racket")
YELLOW, RED = (235, 225, 45), (205, 35, 45)
GROUNDS = {"grass": (80, 125, 70), "clay": (150, 95, 70), "hard": (70, 100, 140), "wood": (165, 140, 110)}
GROUNDS |= {"grey": (115, 118, 120), "dark": (45, 55, 50)}
DISTRACTORS = [  # shape, colour, half width and half height as shares of the picture's width (lowest, highest)
    ("square", (40, 60, 215), (0.04, 0.08), (0.04, 0.08)),
    ("square", (60, 190, 200), (0.03, 0.06), (0.03, 0.06)),
    ("circle", (30, 170, 70), (0.025, 0.06), (0.025, 0.06)),
    ("circle", (240, 240, 240), (0.02, 0.04), (0.02, 0.04)),
    ("circle", (45, 60, 200), (0.025, 0.035), (0.025, 0.035)),
    ("circle", (140, 50, 160), (0.08, 0.11), (0.05, 0.07)),  # as large as a racket
    ("triangle", (20, 20, 25), (0.04, 0.08), (0.04, 0.08)),
]
STATUS_FLYING, STATUS_BOUNCE = 0, 2  # of the tennis labels
COLUMNS = ["file name", "visibility", "x-coordinate", "y-coordinate", "status"]


@dataclass
class Thing:
    """One shape and its way. half: half width and height, px. start, speed (2,): px, px per frame, reflected so that
    the centre stays in low..high (2,), px. swing: amplitude (2,) px, period in frames, phase. angle, turn: radians, per
    frame. height, period: of a ball's jumps above its lowest place, px and frames; 0: it does not jump."""

    shape: str
    colour: np.ndarray
    half: np.ndarray
    start: np.ndarray
    speed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    swing: tuple[np.ndarray, float, float] = field(default_factory=lambda: (np.zeros(2), 1.0, 0.0))
    angle: float = 0.0
    turn: float = 0.0
    height: float = 0.0
    period: float = 0.0
    phase: float = 0.0  # of the jumps, in periods

    def at(self, t: int) -> np.ndarray:
        """Centre (2,) px in frame t."""
        length = np.maximum(self.high - self.low, 1e-9)
        along = (self.start - self.low + self.speed * t) % (2 * length)
        xy = self.low + np.minimum(along, 2 * length - along)
        amplitude, period, phase = self.swing
        xy = xy + amplitude * np.sin(2 * np.pi * t / period + np.array([phase, 1.7 * phase]))
        if self.height:
            p = (t / self.period + self.phase) % 1
            xy[1] -= 4 * self.height * p * (1 - p)
        return xy

    def bounces(self, t: int) -> bool:
        """Whether frame t is the one nearest to a touch of the ground."""
        p = (t / self.period + self.phase + 0.5) % 1 - 0.5  # periods since the nearest touch
        return bool(-0.5 <= p * self.period < 0.5)

    def cover(self, t: int, H: int, W: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """The window (rows, columns) around the thing in frame t, and which of its pixels it covers."""
        x, y = self.at(t)
        reach = 1.5 * self.half.max() + 1
        rows = slice(max(0, int(y - reach)), max(0, min(H, int(y + reach) + 2)))
        columns = slice(max(0, int(x - reach)), max(0, min(W, int(x + reach) + 2)))
        v, u = np.mgrid[rows, columns].astype(np.float32)
        u, v = u - np.float32(x), v - np.float32(y)
        c, s = np.cos(self.angle + self.turn * t), np.sin(self.angle + self.turn * t)
        return (rows, columns), inside(self.shape, (c * u + s * v) / self.half[0], (c * v - s * u) / self.half[1])


@dataclass
class Scene:
    """What is drawn over ground (H, W, 3) float32, the lowest first; targets: name -> place in things, or none."""

    ground: np.ndarray
    things: list[Thing]
    targets: dict[str, int]
    hides: list[str]  # targets that vanish for a while
    light: float


class RenderedBall:
    """Clips and pictures, each a function of (seed, index); any index from 0.

    size (H, W) px. absent: share of clips without a ball, and, drawn for itself, without a racket. hiding: share of
    clips in which a target vanishes; seen, hidden: fewest and most frames that it is to be seen and not, in turns, the
    first frames seen. distractors: most of them. noise: deviation in grey levels.
    """

    def __init__(
        self, seed: int, size=(96, 128), absent=0.2, hiding=0.5, seen=(8, 24), hidden=(4, 9), distractors: int = 4,
        noise: float = 5.0,
    ):  # fmt: skip
        if min(size) < 32 or not 0 <= absent <= 1 or not 0 <= hiding <= 1 or distractors < 0 or noise < 0:
            raise ValueError(
                f"RenderedBall: size {size}, absent {absent}, hiding {hiding}, distractors {distractors}, noise {noise}; "
                "expected sides >= 32, shares in 0..1, the others >= 0"
            )
        if not (1 <= seen[0] <= seen[1] and 1 <= hidden[0] <= hidden[1]):
            raise ValueError(f"RenderedBall: seen {seen}, hidden {hidden}; expected 1 <= fewest <= most frames")
        self.seed, self.size, self.absent, self.hiding = seed, tuple(size), absent, hiding
        self.seen, self.hidden, self.distractors, self.noise = seen, hidden, distractors, noise

    def picture(self, index: int) -> dict:
        """The first frame of a clip: image uint8 (H, W, 3), masks {name: bool (H, W)}, centres {name: (2,) px}, status;
        of a target that is not there the mask is empty and the centre NaN."""
        return next(self.stream(index, 1))

    def clip(self, index: int, frames: int) -> dict:
        """frames uint8 (T, H, W, 3), masks {name: bool (T, H, W)}, centres {name: float64 (T, 2) px, NaN where it is not
        to be seen}, status int64 (T,): 2 where the ball bounces, else 0."""
        shown = list(self.stream(index, frames))
        of_each = {
            key: {name: np.stack([x[key][name] for x in shown]) for name in TARGETS} for key in ("masks", "centres")
        }
        return {
            "frames": np.stack([x["image"] for x in shown]),
            **of_each,
            "status": np.array([x["status"] for x in shown]),
        }

    def stream(self, index: int, frames: int) -> Iterator[dict]:
        """The frames of a clip one after the other, each like picture(), in constant memory. ValueError below 1."""
        if frames < 1 or index < 0:
            raise ValueError(f"RenderedBall: {frames} frames of clip {index}; expected at least 1, of clip 0 or above")
        scene = self.scene(index)
        phases = {name: hidden_phases(np.random.default_rng([self.seed, index, 2, k]), self.seen, self.hidden)
                  for k, name in enumerate(TARGETS) if name in scene.hides}  # fmt: skip
        for t in range(frames):
            unseen = {name for name, hidden in phases.items() if next(hidden)}
            yield self.render(scene, index, t, unseen)

    def scene(self, index: int) -> Scene:
        """What clip `index` shows and how it moves."""
        rng = np.random.default_rng([self.seed, index])
        H, W = self.size
        ground = draw_ground(H, W, rng)
        missing = rng.random(2) < self.absent
        vanishing = rng.random() < self.hiding
        hides = [("ball",), ("racket",), ("ball", "racket")][rng.choice(3, p=[0.6, 0.2, 0.2])] if vanishing else ()
        things = [draw_distractor(H, W, rng) for _ in range(rng.integers(0, self.distractors + 1))]
        targets = {}
        for name, gone, draw in (("racket", missing[1], draw_racket), ("ball", missing[0], draw_ball)):
            thing = draw(H, W, rng)
            if not gone:
                targets[name] = len(things)
                things.append(thing)
        return Scene(ground, things, targets, list(hides), rng.uniform(0.75, 1.1))

    def render(self, scene: Scene, index: int, t: int, unseen: set[str]) -> dict:
        """Frame t of a scene without the targets in `unseen`."""
        H, W = self.size
        image, above = scene.ground.copy(), np.full((H, W), -1)  # above: place of the thing that is seen
        left_out = {scene.targets[name] for name in unseen if name in scene.targets}
        for k, thing in enumerate(scene.things):
            if k in left_out:
                continue
            window, covered = thing.cover(t, H, W)
            image[window][covered] = thing.colour
            above[window][covered] = k
        noise = np.random.default_rng([self.seed, index, 1, t]).standard_normal((H, W, 3), np.float32)
        image = (image * np.float32(scene.light) + np.float32(self.noise) * noise).round().clip(0, 255)
        shown = {name: k for name, k in scene.targets.items() if k not in left_out}
        masks = {name: above == shown.get(name, len(scene.things)) for name in TARGETS}
        ball = scene.things[shown["ball"]] if "ball" in shown else None
        nowhere = np.full(2, np.nan)
        return {
            "image": image.astype(np.uint8),
            "masks": masks,
            "centres": {name: scene.things[shown[name]].at(t) if masks[name].any() else nowhere for name in TARGETS},
            "status": STATUS_BOUNCE if ball is not None and ball.bounces(t) else STATUS_FLYING,
        }


def hidden_phases(rng: np.random.Generator, seen: tuple[int, int], hidden: tuple[int, int]) -> Iterator[bool]:
    """Frame by frame whether a target is hidden, for ever: seen for so many frames (fewest, most), then hidden."""
    while True:
        yield from [False] * int(rng.integers(seen[0], seen[1] + 1))
        yield from [True] * int(rng.integers(hidden[0], hidden[1] + 1))


class RenderedScenes(Dataset):
    """`items` clips an epoch for a loader: of key (epoch, k) image uint8 (T, H, W, 3), masks bool (T, 2, H, W) of
    TARGETS. No two epochs share a clip unless `fixed`: then each is the first again. T = 1: pictures."""

    def __init__(self, source: RenderedBall, items: int, frames: int = 1, fixed: bool = False):
        self.source, self.items, self.frames, self.fixed = source, items, frames, fixed

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, k = key
        x = self.source.clip(k if self.fixed else epoch * self.items + k, self.frames)
        masks = np.stack([x["masks"][name] for name in TARGETS], 1)
        return {"image": torch.from_numpy(x["frames"]), "masks": torch.from_numpy(masks)}


# ---- what is drawn


def draw_ground(H: int, W: int, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: two grounds that meet at a line, stripes on each, and white lines."""
    y, x = np.mgrid[:H, :W].astype(np.float32) / W
    above, below = (np.array(list(GROUNDS.values()), np.float32)[k] for k in rng.choice(len(GROUNDS), 2, replace=False))
    slope, level = rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.6) * H / W
    picture = np.where((y < level + slope * (x - 0.5))[..., None], above, below)
    picture = picture * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    a, b = rng.uniform(-14, 14, 2)
    picture += (rng.uniform(0, 12) * np.sin(2 * np.pi * (a * x + b * y)))[..., None]
    picture += (rng.uniform(-25, 25) * x + rng.uniform(-25, 25) * y)[..., None]  # light from one side
    for _ in range(rng.integers(0, 4)):
        angle, offset = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)]), rng.uniform(0, 1)
        far = abs(np.cos(angle) * (x - offset) + np.sin(angle) * (y - offset * H / W))
        picture[far < rng.uniform(0.004, 0.008)] = rng.uniform(190, 235)
    return picture.astype(np.float32)


def tinted(colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) + rng.uniform(-15, 15, 3), 0, 255).astype(np.float32)


def draw_distractor(H: int, W: int, rng: np.random.Generator) -> Thing:
    shape, colour, wide, high = DISTRACTORS[rng.integers(len(DISTRACTORS))]
    half, far = np.array([rng.uniform(*wide), rng.uniform(*high)]) * W, np.array([W - 1.0, H - 1.0])
    return Thing(
        shape, tinted(colour, rng), half, start=rng.uniform(0, far), speed=rng.uniform(-0.012, 0.012, 2) * W,
        low=np.zeros(2), high=far, angle=rng.uniform(0, 2 * np.pi), turn=rng.uniform(-0.04, 0.04),
    )  # fmt: skip


def draw_racket(H: int, W: int, rng: np.random.Generator) -> Thing:
    """An ellipse that swings around a place and turns."""
    half = np.array([rng.uniform(0.075, 0.105), rng.uniform(0.045, 0.062)]) * W
    edge = half.max() + 1
    amplitude = rng.uniform(0.02, 0.1, 2) * W
    low, high = amplitude + edge, np.array([W - 1.0, H - 1.0]) - amplitude - edge
    start = rng.uniform(np.minimum(low, high), np.maximum(low, high))
    swing = (amplitude, rng.uniform(25, 60), rng.uniform(0, 2 * np.pi))
    return Thing(
        "circle", tinted(RED, rng), half, start, np.zeros(2), start, start, swing,
        angle=rng.uniform(0, np.pi), turn=rng.uniform(-0.05, 0.05),
    )  # fmt: skip


def draw_ball(H: int, W: int, rng: np.random.Generator) -> Thing:
    """A disc that jumps on a ground of its own and goes from wall to wall, at most 6 % of the width a frame."""
    r = rng.uniform(0.028, 0.04) * W
    ground = rng.uniform(0.7, 0.95) * (H - 1) - r
    height = rng.uniform(0.4, 0.95) * (ground - r - 1)
    period = 4 * height / (rng.uniform(0.02, 0.048) * W)  # the fastest way down, px a frame
    low, high = np.array([r + 1, ground]), np.array([W - 2 - r, ground])
    speed = np.array([rng.uniform(0.008, 0.035) * rng.choice([-1, 1]) * W, 0.0])
    start = np.array([rng.uniform(low[0], high[0]), ground])
    return Thing(
        "circle", tinted(YELLOW, rng), np.array([r, r]), start, speed, low, high, height=height, period=period,
        phase=rng.random(),
    )  # fmt: skip


# ---- files


def write_video(source: RenderedBall, index: int, frames: int, folder: Path | str, name: str, rate: float = 30) -> Path:
    """Clip `index` as FOLDER/NAME.mp4, and for each target FOLDER/NAME_TARGET.csv in the columns of the tennis labels.

    x and y are empty where the target is not to be seen (visibility 0). Returns the path of the mp4; memory does not
    grow with `frames`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {target: io.StringIO() for target in TARGETS}
    rows = {target: csv.writer(text, lineterminator="\n") for target, text in texts.items()}
    for writer in rows.values():
        writer.writerow(COLUMNS)
    H, W = source.size
    with VideoWriter(folder / f"{name}.mp4", rate, (W, H)) as video:
        for t, shown in enumerate(source.stream(index, frames)):
            video.write(shown["image"])
            for target, writer in rows.items():
                xy = shown["centres"][target]
                seen = bool(np.isfinite(xy).all())
                where = [f"{v:.2f}" for v in xy] if seen else ["", ""]
                status = shown["status"] if seen and target == "ball" else STATUS_FLYING
                writer.writerow([f"{t:04d}.jpg", int(seen), *where, status])
    for target, text in texts.items():
        write_text_atomic(folder / f"{name}_{target}.csv", text.getvalue())
    return folder / f"{name}.mp4"
