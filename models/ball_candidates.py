"""What may be the ball, how it moves, and what else is in the picture: the parts of models/ball_follow.py.

Lengths in px of the original frame, time in frames.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(slots=True, eq=False)
class Candidate:
    """A mask with a score: a detection, or a tracker's answer, whose area 0 says that the object is not there."""

    x: float  # px, centre of the mask; nan without one
    y: float
    score: float
    area: int  # px
    box: tuple[float, float, float, float] | None = None  # first and last column and row
    mask: np.ndarray | None = None  # bool (H, W)
    rle: dict | None = None  # its code, where masks are written

    @classmethod
    def from_mask(cls, mask: np.ndarray, score: float) -> "Candidate":
        """mask bool (H, W), may be empty."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return cls(math.nan, math.nan, float(score), 0)
        y0, y1, x0, x1 = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
        ys, xs = np.nonzero(mask[y0 : y1 + 1, x0 : x1 + 1])
        return cls(float(xs.mean()) + x0, float(ys.mean()) + y0, float(score), len(xs), (x0, y0, x1, y1), mask)

    def bare(self) -> "Candidate":
        """Without the mask, for keeping."""
        return Candidate(self.x, self.y, self.score, self.area, self.box, None, self.rle)

    def covers(self, x: float, y: float) -> bool:
        """Whether the mask has this pixel."""
        if self.mask is None or not self.area:
            return False
        row, column = round(y), round(x)
        return 0 <= row < self.mask.shape[0] and 0 <= column < self.mask.shape[1] and bool(self.mask[row, column])


def distance(a, b) -> float:
    """px between two things with x and y."""
    return math.hypot(a.x - b.x, a.y - b.y)


# ---- motion


class Motion:
    """Kalman filter with constant acceleration. x and y share their covariance: state (3, 2), P (3, 3).

    noise: of a measurement, jerk: of the acceleration per frame, standard deviations in px.
    """

    LIMIT = 6  # frames: beyond, an extrapolated parabola says nothing

    def __init__(self, x: float, y: float, t: int, noise: float, jerk: float, speed: float):
        self.state, self.t, self.noise = np.array([[x, y], [0, 0], [0, 0]]), t, noise
        self.P = np.diag([noise**2, speed**2, (speed / 4) ** 2])
        self.Q = jerk**2 * np.outer([1 / 6, 1 / 2, 1], [1 / 6, 1 / 2, 1])

    def ahead(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """State and covariance at frame t."""
        state, P, F = self.state, self.P, np.array([[1, 1, 0.5], [0, 1, 1], [0, 0, 1]])
        for _ in range(min(t - self.t, self.LIMIT)):
            state, P = F @ state, F @ P @ F.T + self.Q
        return state, P

    def place(self, t: int) -> tuple[float, float]:
        """Expected x, y px at frame t."""
        return tuple(self.ahead(t)[0][0].tolist())

    def update(self, x: float, y: float, t: int) -> None:
        """Take in a measurement of frame t."""
        state, P = self.ahead(t)
        gain = P[:, :1] / (P[0, 0] + self.noise**2)  # (3, 1)
        self.state, self.P, self.t = state + gain * (np.array([x, y]) - state[0]), P - gain * P[:1], t


# ---- what else is there


@dataclass
class Other:
    """A thing that is not the object, so far."""

    row: dict[int, Candidate]  # the last frames in a row in which it was seen
    beside: int = 0  # frames in which the object was seen too
    beside_t: int = -1  # the last of them

    @property
    def t(self) -> int:
        return max(self.row)

    def expected(self) -> tuple[float, float]:
        """x, y px in the next frame."""
        c, before = self.row[self.t], self.row.get(self.t - 1)
        return (c.x, c.y) if before is None else (2 * c.x - before.x, 2 * c.y - before.y)


def match_others(others: list[Other], candidates: list[Candidate], t: int, step_px: float, near_px: float) -> dict:
    """{place of a candidate: Other}, nearest pairs first, each once."""
    if not others or not candidates:
        return {}
    last = np.array([o.expected() if o.t == t - 1 else (o.row[o.t].x, o.row[o.t].y) for o in others])
    limit = [near_px if o.t < t - 1 else step_px if len(o.row) == 1 else max(step_px / 3, near_px) for o in others]
    apart = np.linalg.norm(np.array([(c.x, c.y) for c in candidates])[:, None] - last, axis=-1)  # (n, others)
    pairs = np.argwhere(apart <= limit)
    found: dict[int, Other] = {}
    taken = set()
    for k, j in pairs[np.argsort(apart[tuple(pairs.T)], kind="stable")].tolist():
        if k not in found and j not in taken:
            found[k] = others[j]
            taken.add(j)
    return found


def extent(points: list) -> float:
    """px: diagonal of the box around these."""
    return math.hypot(*np.ptp([(p.x, p.y) for p in points], axis=0))
