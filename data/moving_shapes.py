"""Rendered shapes that move, hide behind each other, leave and come back, with exact masks: the set to try FastSAM2 on.

Coloured circles, squares, triangles and bars (things) over two textured grounds (stuff), as one picture or a clip. A
pixel belongs to what covers its centre, so masks have no error. Some scenes have a crowd (many small circles as one
segment), an unlabelled patch (void), or no thing at all. The sentences of an object name no other one of its scene.

In a clip an object drifts and bounces off the border, or passes behind a bar that hides it whole, or leaves the
picture and comes back; it keeps its number throughout.

Shapes: T frames, S side of the picture in px, n shapes.
"""

from dataclasses import dataclass

import numpy as np

from data.segment_batch import CLIP_TASKS, IMAGE_TASKS, Scene

SHAPES = ("circle", "square", "triangle", "bar")
GROUNDS = {"sky": (135, 185, 230), "sand": (215, 195, 150), "grass": (95, 150, 75), "water": (40, 110, 130)}
CLASSES = [*SHAPES, *GROUNDS]
COLOURS = {"red": (214, 40, 40), "green": (20, 220, 90), "blue": (40, 60, 220), "yellow": (250, 215, 20)}
COLOURS |= {"white": (250, 250, 250), "black": (15, 15, 15)}
FIRST_GROUND, CROWD, THING = 1, 3, 4  # ids: two grounds, the crowd, then the things; 0 is void
BAR = 0.35  # half thickness of a bar / its half length
WAIT = 0.35  # share of a clip that a thing spends behind another, so clips of 3 or more frames show nothing of it
CLEAR = 0.12  # of S: how far one must be from the next to be called "left"
LEAST = 12  # px that an object must show to be spoken of
LARGER = 1.4  # times the area of the next to be called "largest"


@dataclass
class Shape:
    """One thing. kind and colour: names; r: half size, px; xy: (T, 2) centre px; angle: (T,) radians."""

    kind: str
    colour: str
    r: float
    xy: np.ndarray
    angle: np.ndarray


# ---- shapes and paths


def inside(kind: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape of half size 1 around the origin; u to the right, v down -> bool."""
    if kind == "circle":
        return u**2 + v**2 <= 1
    if kind == "square":
        return np.maximum(abs(u), abs(v)) <= 0.85
    if kind == "bar":
        return (abs(u) <= 1) & (abs(v) <= BAR)
    return (v <= 0.7) & (1.7 * abs(u) <= v + 1)


def bounce(start: np.ndarray, speed: np.ndarray, T: int, low: float, high: float) -> np.ndarray:
    """Straight paths that are reflected at low and high: start and speed (2,) -> (T, 2)."""
    length = high - low
    along = (start - low + speed * np.arange(T)[:, None]) % (2 * length)
    return low + np.minimum(along, 2 * length - along)


def leave(start: np.ndarray, r: float, T: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """From start out over the nearest border and back, wholly outside for a while in the middle: (T, 2)."""
    beyond = np.array([start[0], S - start[0], start[1], S - start[1]])  # to the left, right, top, bottom
    side = int(beyond.argmin())
    way = np.zeros(2)
    way[side // 2] = (beyond[side] + 2.5 * r) * (-1, 1)[side % 2]
    phase = np.linspace(0, np.pi, T) + rng.uniform(-0.2, 0.2)
    return start + way * np.clip(1.6 * np.sin(phase) ** 2 - 0.2, 0, None)[:, None]


def path(how: str, r: float, T: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (T, 2) px of one thing: how is drift or leave."""
    start = rng.uniform(1.2 * r, S - 1.2 * r, 2)
    if how == "leave":
        return leave(start, r, T, S, rng)
    return bounce(start, rng.uniform(-0.035, 0.035, 2) * S, T, 0.8 * r, S - 0.8 * r)


def hidden_pair(T: int, S: int, rng: np.random.Generator) -> list[Shape]:
    """A small thing that runs behind a resting bar, waits there, wholly hidden, in the middle of the clip, and runs on."""
    small = rng.uniform(0.06, 0.08) * S
    half = 1.35 * small / BAR  # so thick that the small thing fits behind it
    centre = rng.uniform(0.4, 0.6, 2) * S
    reach = max(S - centre[0], centre[0]) - 1.3 * small
    time = np.linspace(-1, 1, T)
    way = np.sign(time) * np.clip(abs(time) - WAIT, 0, None) / (1 - WAIT)  # -1..1
    x = centre[0] + way * reach * rng.choice([-1, 1])
    runner = np.stack([np.clip(x, 1.1 * small, S - 1.1 * small), np.full(T, centre[1])], 1)
    kind, colours = SHAPES[rng.integers(3)], rng.permutation(list(COLOURS))[:2]
    upright = np.full(T, np.pi / 2)
    rest = np.repeat(centre[None], T, 0)
    bar = Shape("bar", colours[1], half, rest, upright)
    return [Shape(kind, colours[0], small, runner, np.linspace(0, rng.uniform(-2, 2), T)), bar]


def draw_things(T: int, S: int, most: int, rng: np.random.Generator) -> list[Shape]:
    """1..most things, the lowest first; in clips one of three scenes has a hidden one and one of three a leaver."""
    n, story = int(rng.integers(1, most + 1)), rng.integers(3) if T > 1 else 2
    things = []
    for k in range(n):
        kind, colour = SHAPES[rng.integers(4)], str(rng.choice(list(COLOURS)))
        r = rng.uniform(0.09, 0.2) * S
        how = "leave" if story == 1 and k == 0 else "drift"
        turn = rng.uniform(-0.12, 0.12) * np.arange(T) + rng.uniform(-0.5, 0.5)
        things.append(Shape(kind, colour, r, path(how, r, T, S, rng), turn))
    return [*things[: max(0, most - 2)], *hidden_pair(T, S, rng)] if story == 0 else things


# ---- pictures


def paint_ids(things: list[Shape], ground: np.ndarray, T: int) -> np.ndarray:
    """Map of ids (T, S, S) int32: the things over ground (S, S), which holds the ids below them."""
    S = len(ground)
    ids = np.repeat(ground[None], T, 0)
    y, x = np.mgrid[:S, :S] + 0.5
    for k, thing in enumerate(things):
        for t in range(T):
            dx, dy = (x - thing.xy[t, 0]) / thing.r, (y - thing.xy[t, 1]) / thing.r
            c, s = np.cos(thing.angle[t]), np.sin(thing.angle[t])
            ids[t][inside(thing.kind, c * dx + s * dy, c * dy - s * dx)] = THING + k
    return ids


def draw_ground(S: int, crowd: bool, void: bool, rng: np.random.Generator) -> np.ndarray:
    """Ids below the things (S, S) int32: the upper ground, the lower one under a wavy line, crowd and void patch."""
    x = np.arange(S) / S
    wave = rng.uniform(0.02, 0.07) * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * x + rng.random()))
    line = (rng.uniform(0.35, 0.65) + wave) * S  # (S,) px
    ground = np.where(np.arange(S)[:, None] + 0.5 < line, FIRST_GROUND, FIRST_GROUND + 1).astype(np.int32)
    y, x = np.mgrid[:S, :S] + 0.5
    if void:
        top, left = rng.uniform(0, 0.8, 2) * S
        ground[int(top) : int(top + 0.15 * S) + 1, int(left) : int(left + 0.2 * S) + 1] = 0
    if crowd:
        centre = rng.uniform(0.2, 0.8, 2) * S
        for _ in range(9):
            cx, cy = centre + rng.uniform(-0.12, 0.12, 2) * S
            ground[(x - cx) ** 2 + (y - cy) ** 2 <= (0.03 * S) ** 2] = CROWD
    return ground


def paint(ids: np.ndarray, colours: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """ids (T, S, S) and the colour of each id (I, 3) -> pictures (T, S, S, 3) uint8 with texture, light and noise."""
    S = ids.shape[-1]
    y, x = np.mgrid[:S, :S] / S
    kinds = np.array(
        [np.sin(2 * np.pi * (a * x + b * y)) for a, b in ((0, 14), (11, 11), (17, 0), (9, -9))]
    )  # (4, S, S)
    texture = 9 * kinds[rng.permutation(4)]
    patch = np.where(ids == 0, 128 + 60 * np.sign(texture[2] * texture[0]), 0)  # void: a grey check
    image = colours[ids].astype(np.float32) + patch[..., None]
    for k in (FIRST_GROUND, FIRST_GROUND + 1):
        image += np.where(ids == k, texture[k], 0)[..., None]
    wide = np.pad(ids, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rim = (wide[:, 1:-1, 2:] != ids) | (wide[:, 1:-1, :-2] != ids) | (wide[:, 2:, 1:-1] != ids)
    image -= 45 * ((rim | (wide[:, :-2, 1:-1] != ids)) & (ids >= THING))[..., None]  # white before white must show
    image = image * rng.uniform(0.75, 1.1) + rng.normal(0, noise, image.shape)
    return image.round().clip(0, 255).astype(np.uint8)


# ---- sentences


def sentences(things: list[Shape], ids: np.ndarray) -> list[list[str]]:
    """Per thing what is said about it in a picture, (S, S) of its ids: nothing that fits another visible one, and
    nothing at all about one of fewer than LEAST px."""
    S = len(ids)
    area = np.array([(ids == THING + k).sum() for k in range(len(things))])
    seen = np.flatnonzero(area)
    at = np.array([np.nonzero(ids == THING + k)[1].mean() if k in seen else 0 for k in range(len(things))])
    said: list[list[str]] = [[] for _ in things]
    for k in np.flatnonzero(area >= LEAST):
        kind, colour = things[k].kind, things[k].colour
        others = [j for j in seen if j != k]
        alike = [j for j in others if things[j].kind == kind]
        if not alike:
            said[k].append(f"the {kind}")
        if not any(things[j].colour == colour for j in alike):
            said[k].append(f"the {colour} {kind}")
        for name, group in ((kind, alike), ("object", others)):
            if group and at[k] < at[group].min() - CLEAR * S:
                said[k].append(f"the leftmost {name}")
            if group and at[k] > at[group].max() + CLEAR * S:
                said[k].append(f"the rightmost {name}")
            if group and area[k] > LARGER * area[group].max():
                said[k].append(f"the largest {name}")
    return said


# ---- the source


class MovingShapes:
    """`n` scenes an epoch, a function of (seed, epoch, index): a source for SegmentItems (data/segment_batch.py).

    frames: 0 gives pictures and their tasks, else clips of so many frames and theirs. size: S. most: things per scene,
    at least 2. empty, crowds, voids: share of the scenes without a thing, with a crowd, with an unlabelled patch.
    """

    name, classes, category_ids = "moving_shapes", CLASSES, list(range(1, len(CLASSES) + 1))
    is_thing = [c in SHAPES for c in CLASSES]

    def __init__(self, n, seed, size=96, frames=0, most=5, empty=0.03, crowds=0.1, voids=0.15, noise=5.0):
        if n < 1 or size < 32 or frames < 0 or most < 2 or not all(0 <= p <= 1 for p in (empty, crowds, voids)):
            raise ValueError(
                f"MovingShapes: n {n}, size {size}, frames {frames}, most {most}, empty {empty}, crowds {crowds}, "
                f"voids {voids}; expected n >= 1, size >= 32, frames >= 0, most >= 2, shares in 0..1"
            )
        self.n, self.seed, self.size, self.frames, self.most = n, seed, size, frames, most
        self.empty, self.crowds, self.voids, self.noise = empty, crowds, voids, noise
        self.tasks = CLIP_TASKS if frames else IMAGE_TASKS

    def __len__(self) -> int:
        return self.n

    def summary(self) -> str:
        """One line: items and classes."""
        what = f"clips of {self.frames} frames" if self.frames else "pictures"
        what = f"{self.n} rendered {what} of {self.size} px an epoch, {len(CLASSES)} classes"
        return f"moving_shapes: {what}; seed {self.seed}"

    def scene(self, epoch: int, index: int) -> Scene:
        rng = np.random.default_rng([self.seed, epoch, index])
        S, T = self.size, max(1, self.frames)
        empty, crowd, void = rng.random(3) < (self.empty, self.crowds, self.voids)
        things = [] if empty else draw_things(T, S, self.most, rng)
        ids = paint_ids(things, draw_ground(S, crowd, void, rng), T)  # (T, S, S)
        grounds = rng.choice(len(GROUNDS), 2, replace=False)
        colours = np.zeros((THING + len(things), 3))
        colours[FIRST_GROUND : FIRST_GROUND + 2] = np.array([*GROUNDS.values()])[grounds]
        colours[CROWD] = rng.uniform(60, 220, 3)
        for k, thing in enumerate(things):
            colours[THING + k] = np.clip(np.array(COLOURS[thing.colour]) + rng.uniform(-14, 14, 3), 0, 255)
        image = paint(ids, colours, rng, self.noise)
        labels = [*(len(SHAPES) + grounds), 0, *(SHAPES.index(t.kind) for t in things)]
        present = np.isin(np.arange(1, THING + len(things)), ids)  # of the ids 1, 2, ..
        text = [[], [], [], *([(THING + k, s) for s in said] for k, said in enumerate(sentences(things, ids[0])))]
        image, ids = (image, ids) if self.frames else (image[0], ids[0])
        kept = np.flatnonzero(present)
        return Scene(
            image_id=f"{self.seed}-{epoch}-{index}", image=image, masks=ids, ids=kept + 1,
            labels=np.array(labels, np.int64)[kept], crowd=kept + 1 == CROWD, void=ids == 0,
            text=[text[k] for k in kept],
        )  # fmt: skip
