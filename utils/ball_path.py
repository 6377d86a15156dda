"""One ball through a whole clip: the best path over candidates of every frame.

A path is a row of chains that do not overlap in time.  Dynamic programming over pairs of candidates finds the path
with the largest sum of scores minus what it costs to begin a chain, to miss a frame and to change the velocity.  The
last cost is capped, so a chain may break at a hit.  Short, small or slow chains are taken out and the rest is solved
again.  What comes after, gaps and smoothing, is utils/ball_smoothing.py.

Coordinates are pixels of the original frame, centres at whole numbers; lengths in configurations are fractions of its
width, so they hold for every size.  T frames, n candidates of one frame, K candidates of the frames before it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from utils.ball_smoothing import fill_gaps, smooth, turns

__all__ = ["PathConfig", "best_path", "detector_path", "fill_gaps", "positions", "smooth", "turns"]
NONE = -np.inf  # value of a pair that cannot be


@dataclass(frozen=True)
class PathConfig:
    """Costs are in units of a candidate's score (about 0 to 1); defaults are for candidates from motion."""

    max_speed: float = 0.075  # of the width per frame
    max_gap: int = 5  # frames that a chain may miss in a row
    accel_cost: float = 60.0  # per change of velocity by one width per frame
    accel_free: float = 1.5  # px per frame: change of velocity that costs nothing (pixel noise)
    accel_cap: float = 2.0  # the most that a change of velocity costs: a hit
    gap_cost: float = 0.3  # per missing frame
    birth_cost: float = 2.5  # per chain
    min_points: int = 4  # of a chain, as the next two
    min_extent: float = 0.031  # diagonal of its bounding box, of the width
    min_speed: float = 0.001  # median, of the width per frame

    def __post_init__(self):
        costs = (self.accel_cost, self.accel_free, self.accel_cap, self.gap_cost, self.birth_cost)
        if self.max_speed <= 0 or self.max_gap < 0 or self.min_points < 1 or min(costs) < 0:
            raise ValueError(f"{self}: expected max_speed > 0, max_gap >= 0, min_points >= 1, costs >= 0")


def detector_path(**changes) -> PathConfig:
    """For candidates of a detector that knows the ball: few, trusted, and a resting ball is a ball."""
    given = dict(accel_cap=0.6, gap_cost=0.05, birth_cost=0.1, min_points=1, min_extent=0.0, min_speed=0.0)
    return PathConfig(**given | changes)


# ---- the best path


def best_path(
    candidates: Sequence[np.ndarray], width: int, cfg: PathConfig = PathConfig(), repeats: Collection[int] = ()
) -> list[int | None]:
    """Which candidate of each frame is the ball; None: no one.

    candidates: per frame (n, >= 3) x px, y px, score; n may be 0.  width: of the frame, px.  repeats: frames that show
    the picture before them again and carry its candidates; they take no time and get the index of the frame before.
    ValueError for arrays of another shape or values that are not finite.
    """
    checked = [check(c, t) for t, c in enumerate(candidates)]
    moments = [t for t in range(len(checked)) if t == 0 or t not in repeats]
    rows = [checked[t] for t in moments]
    left = [np.ones(len(c), bool) for c in rows]
    while True:
        kept = [np.flatnonzero(m) for m in left]
        chains = solve([c[k] for c, k in zip(rows, kept, strict=True)], width, cfg)
        chains = [[(t, int(kept[t][i])) for t, i in chain] for chain in chains]
        bad = [chain for chain in chains if not plausible(chain, rows, width, cfg)]
        if not bad:
            break
        for t, i in (node for chain in bad for node in chain):
            left[t][i] = False
    found = {moments[t]: i for chain in chains for t, i in chain}
    path: list[int | None] = []
    for t in range(len(checked)):
        again = t in repeats and t > 0
        path.append(path[-1] if again else found.get(t))
        if again and path[-1] is not None and path[-1] >= len(checked[t]):
            raise ValueError(f"best_path: frame {t} repeats the one before, but has {len(checked[t])} candidates")
    return path


def check(candidates: np.ndarray, t: int) -> np.ndarray:
    """(n, 3) float64 x, y, score."""
    c = np.asarray(candidates, np.float64)
    if c.ndim != 2 or c.shape[1] < 3 or not np.isfinite(c[:, :3]).all():
        raise ValueError(f"best_path: frame {t} has candidates {c.shape}, expected (n, 3 or more), finite")
    return c[:, :3]


def plausible(chain: list[tuple[int, int]], rows: list[np.ndarray], width: int, cfg: PathConfig) -> bool:
    """Whether a chain has enough points, extent and speed."""
    if len(chain) < cfg.min_points:
        return False
    t = np.array([node[0] for node in chain])
    xy = np.array([rows[a][i, :2] for a, i in chain])
    speed = np.hypot(*np.diff(xy, axis=0).T) / np.diff(t)
    median = np.median(speed) if len(speed) else 0.0
    return np.hypot(*np.ptp(xy, axis=0)) >= cfg.min_extent * width and median >= cfg.min_speed * width


def solve(rows: list[np.ndarray], width: int, cfg: PathConfig) -> list[list[tuple[int, int]]]:
    """Chains of (frame, candidate) of the best path, in time order.

    value[t] (n, 1 + K): the best sum up to candidate i of frame t whose predecessor is column k; column 0: it begins a
    chain.  prefix[t]: the best sum of chains that end before t.
    """
    T = len(rows)
    value: list[np.ndarray] = []
    velocity: list[np.ndarray] = []  # (n, 1 + K, 2) px per frame
    columns: list[np.ndarray] = []  # (1 + K, 2) frame and candidate of a column
    back: list[np.ndarray] = []  # (n, 1 + K) column in the predecessor's frame
    prefix, ends = np.zeros(T + 1), [None] * (T + 1)
    for t, row in enumerate(rows):
        n = len(row)
        first = prefix[t] + row[:, 2] - cfg.birth_cost
        blocks = [(first[:, None], np.zeros((n, 1, 2)), np.array([[-1, -1]]), np.zeros((n, 1), np.int32))]
        for s in range(t - 1, max(t - cfg.max_gap - 2, -1), -1):
            if len(rows[s]) and n:
                blocks.append(extend(rows[s], value[s], velocity[s], row, s, t, width, cfg))
        value.append(np.concatenate([b[0] for b in blocks], 1))
        velocity.append(np.concatenate([b[1] for b in blocks], 1))
        columns.append(np.concatenate([b[2] for b in blocks], 0))
        back.append(np.concatenate([b[3] for b in blocks], 1))
        if t > cfg.max_gap:  # no longer reached
            value[t - cfg.max_gap - 1] = velocity[t - cfg.max_gap - 1] = np.empty(0)
        prefix[t + 1], ends[t + 1] = prefix[t], ends[t]
        if n and value[t].max() > prefix[t]:
            i, k = np.unravel_index(value[t].argmax(), value[t].shape)
            prefix[t + 1], ends[t + 1] = value[t][i, k], (t, int(i), int(k))
    chains, end = [], ends[T]
    while end is not None:
        chain, (t, i, k) = [], end
        while True:
            chain.append((t, i))
            if k == 0:
                break
            before, j = columns[t][k]
            t, i, k = int(before), int(j), int(back[t][i, k])
        chains.append(chain[::-1])
        end = ends[t]
    return chains[::-1]


def extend(before: np.ndarray, value: np.ndarray, velocity: np.ndarray, row: np.ndarray, s: int, t: int, width: int,
           cfg: PathConfig):  # fmt: skip
    """Chains that end at frame s go on at t: values (n, m) of pairs, velocities (n, m, 2), columns (m, 2), back (n, m);
    m candidates at s, n at t."""
    step = (row[:, None, :2] - before[None, :, :2]) / (t - s)  # (n, m, 2)
    change = step[:, :, None] - velocity[None]  # (n, m, 1 + K, 2)
    change = np.maximum(np.sqrt((change**2).sum(-1)) - cfg.accel_free, 0)
    cost = np.minimum(change * (cfg.accel_cost / width), cfg.accel_cap)
    cost[:, :, 0] = 0  # the second point of a chain may have any velocity
    total = value[None] - cost  # (n, m, 1 + K)
    back = total.argmax(-1)
    best = np.take_along_axis(total, back[..., None], -1)[..., 0] + row[:, None, 2] - cfg.gap_cost * (t - s - 1)
    best[np.hypot(step[..., 0], step[..., 1]) > cfg.max_speed * width] = NONE
    column = np.stack([np.full(len(before), s), np.arange(len(before))], 1)
    return best, step, column, back.astype(np.int32)


def positions(candidates: Sequence[np.ndarray], path: Sequence[int | None]) -> np.ndarray:
    """(T, 2) float64 px of the chosen candidates, nan where there is none."""
    xy = np.full((len(path), 2), np.nan)
    for t, (c, i) in enumerate(zip(candidates, path, strict=True)):
        if i is not None:
            xy[t] = c[i][:2]
    return xy
