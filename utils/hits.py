"""Racket contacts and bounces from the path of a tennis ball, seen from behind one baseline.

A turn is a moment at which the velocity jumps: two short parabolas, fitted before and after it, disagree. Naming the
turns uses what holds for every such camera (near is low in the picture, y points down):
  - a contact reverses the way across the net, a bounce does not; the way is the change of y from turn to turn;
  - the ground pushes up, so a bounce lowers the speed in y; so does a near contact, a far contact raises it;
  - a bounce keeps most of the sideways speed, slows the ball and happens once between two contacts.
The cheapest row of names is found by dynamic programming over (way, bounced already).
Not told apart: serves and strokes; not found: net cords, and a contact right after a bounce (half volley).

Positions are (T, 2) float64 px with NaN where the ball is not known; velocities are in widths of the picture per s.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

NAMES = ("near_court_swing", "far_court_swing", "near_court_bounce", "far_court_bounce")
NEAR, FAR = 0, 1  # the way of the ball: towards the camera, away from it


@dataclass(frozen=True)
class HitConfig:
    """Times in s, velocities in widths per s, places as shares of the height range of the path."""

    window_s: float = 0.18  # length of each parabola
    min_change: float = 0.07  # of velocity, smallest turn
    relative: float = 0.15  # the same as a share of the larger speed at the turn
    noises: float = 2.7  # the same in standard deviations of what noise of the positions alone makes
    apart_s: float = 0.12  # between two turns
    max_speed: float = 3.0  # of any ball; a faster step leads to another thing
    pause_s: float = 0.8  # without a ball: what follows is another rally
    flight_s: float = 0.5  # from contact to contact, at least
    again: float = 2.5  # cost of a second bounce in one flight
    ignore: float = 1.2  # cost of a turn without a name, for one of twice the smallest change


@dataclass
class Turn:
    """One jump of the velocity."""

    frame: float  # moment at which both parabolas are closest
    xy: np.ndarray  # (2,) px there
    before: np.ndarray  # (2,) velocity
    after: np.ndarray  # (2,)
    strength: float  # |after - before| over the smallest that counts


# ---- turns


@dataclass
class Path:
    """The frames of a ball's path that show a new position, n of T."""

    frames: np.ndarray  # (n,) frame numbers
    t: np.ndarray  # (n,) float64 moments, frames without the repeated ones
    xy: np.ndarray  # (n, 2) px
    piece: np.ndarray  # (n,) number of the rally it belongs to
    noise: float  # standard deviation of a position, px


def as_path(xy: np.ndarray, width: int, fps: float, cfg: HitConfig, repeats: Collection[int]) -> Path:
    """repeats: frames that show the picture before them again, as every sixth of 25 fps shown at 30; they, and frames
    that repeat a position exactly, take no time. A pause, or a step faster than any ball, begins another piece."""
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"xy has shape {xy.shape}, expected (T, 2)")
    same = np.zeros(len(xy), bool)
    same[1:] = np.hypot(*(xy[1:] - xy[:-1]).T) < 1e-6
    same[[t for t in repeats if 0 < t < len(xy)]] = True
    frames = np.flatnonzero(np.isfinite(xy[:, 0]) & ~same)
    t, places = (np.arange(len(xy)) - np.cumsum(same))[frames].astype(float), xy[frames]
    wait = np.diff(t)
    speed = np.hypot(*np.diff(places, axis=0).T) / np.maximum(wait, 1) * fps / width
    piece = np.append(0, np.cumsum((wait > cfg.pause_s * fps) | (speed > cfg.max_speed))) if len(t) else frames
    third = np.diff(places, n=3, axis=0)[(t[3:] - t[:-3]) == 3] if len(t) > 4 else np.zeros((0, 2))
    noise = (
        np.median(np.abs(third)) / 0.6745 / math.sqrt(20) if len(third) else 0.0
    )  # 20: variance of a third difference
    return Path(frames, t, places, piece, float(noise))


def parabola(t: np.ndarray, xy: np.ndarray, at: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Least squares fit of xy (n, 2) over t (n,) -> its place and slope at `at`, (2,) each, the squared error, and the
    variance of the slope for positions of variance 1. A straight line for fewer than 4 positions."""
    basis = np.vander(t - at, 3 if len(t) > 3 else 2, increasing=True)
    solve = np.linalg.pinv(basis)  # (3, n)
    coefficients = solve @ xy
    error = float(((basis @ coefficients - xy) ** 2).sum())
    return coefficients[0], coefficients[1], error, float((solve[1] ** 2).sum())


def find_turns(path: Path, width: int, fps: float, cfg: HitConfig) -> list[Turn]:
    """All turns of a path, in order of time."""
    n, found = max(4, round(cfg.window_s * fps)), []
    index = np.arange(len(path.t))
    for k in range(2, len(path.t) - 2):
        near = (np.abs(path.t - path.t[k] - 0.5) <= 2 * n) & (path.piece == path.piece[k])
        old, new = index[near & (index <= k)][-n:], index[near & (index > k)][:n]
        if len(old) > 2 and len(new) > 2 and path.t[new[0]] - path.t[old[-1]] <= n:
            found.append(jump(path, old, new, fps / width, cfg))
    return strongest(found, cfg.apart_s * fps, n)


def jump(path: Path, old: np.ndarray, new: np.ndarray, per_s: float, cfg: HitConfig) -> tuple[float, Turn]:
    """How badly two parabolas fit (px^2), and the turn between them. old, new: indices into the path."""
    t, xy = path.t, path.xy
    middle = (t[old[-1]] + t[new[0]]) / 2
    p0, v0, e0, q0 = parabola(t[old], xy[old], middle)
    p1, v1, e1, q1 = parabola(t[new], xy[new], middle)
    before, after = v0 * per_s, v1 * per_s
    by_noise = cfg.noises * path.noise * per_s * math.sqrt(q0 + q1)
    least = max(cfg.min_change, by_noise, cfg.relative * max(np.hypot(*before), np.hypot(*after)))
    apart, bend = p1 - p0, v1 - v0
    s = float(np.clip(-(apart @ bend) / max(bend @ bend, 1e-12), -1.5, 1.5))  # frames after the middle
    error = (e0 + e1) / (len(old) + len(new)) + 0.1 * float(((apart + s * bend) ** 2).sum())
    place = (p0 + p1 + s * (v0 + v1)) / 2
    moment = float(np.interp(middle + s, t, path.frames))
    return error, Turn(moment, place, before, after, float(np.hypot(*(after - before)) / least))


def strongest(found: list[tuple[float, Turn]], apart: float, reach: float) -> list[Turn]:
    """Turns that count: at least `apart` frames from a stronger one, and `reach`, the length of a parabola, from one
    more than 2.5 times as strong, which bends every parabola near it. Of neighbours that show the same turn, the one
    whose parabolas fit best gives the moment."""
    good, kept = sorted((x for x in found if x[1].strength >= 1), key=lambda x: -x[1].strength), []
    while good:
        top = good[0][1]
        rivals = [x for x in good if abs(x[1].frame - top.frame) < apart]
        best = min((x for x in rivals if x[1].strength > 0.6 * top.strength), key=lambda x: x[0])[1]
        kept.append(best)
        good = [
            x
            for x in good
            if not any(
                abs(x[1].frame - k.frame) < (reach if x[1].strength < 0.4 * top.strength else apart)
                for k in (top, best)
            )
        ]
    return sorted(kept, key=lambda turn: turn.frame)


# ---- names


def name_turns(
    xy: np.ndarray, width: int, fps: float, cfg: HitConfig = HitConfig(), repeats: Collection[int] = ()
) -> list[dict]:
    """Contacts and bounces of a path (T, 2): [{"frame", "label", "score"}] in order of time.

    frame: the nearest whole one; label: one of NAMES; score in (0, 1): how sharp the turn is and how well it fits.
    """
    path = as_path(xy, width, fps, cfg, repeats)
    turns = find_turns(path, width, fps, cfg)
    if not turns:
        return []
    low, high = np.percentile(path.xy[:, 1], [2, 98])
    events = []
    for piece in np.unique(path.piece):
        frames, y = path.frames[path.piece == piece], path.xy[path.piece == piece, 1]
        own = [turn for turn in turns if frames[0] <= turn.frame <= frames[-1]]
        heights = np.array([y[0], *(turn.xy[1] for turn in own), y[-1]])
        events += cheapest(own, (heights - low) / max(high - low, 1e-9), fps, cfg)
    return events


def cheapest(turns: list[Turn], y: np.ndarray, fps: float, cfg: HitConfig) -> list[dict]:
    """The cheapest row of names for the turns of one piece. y (len(turns) + 2,): shares of the height range at its
    begin, at the turns and at its end. States: the way, whether the ball has bounced, and the last contact."""
    best = {(way, False, None): (segment_cost(way, y[1] - y[0]), []) for way in (NEAR, FAR)}
    for k, turn in enumerate(turns):
        after: dict[tuple, tuple[float, list]] = {}
        for (way, bounced, last), (cost, row) in best.items():
            swing, bounce = (NAMES[0], NAMES[2]) if way == NEAR else (NAMES[1], NAMES[3])
            flight = 0.0
            if last is not None:
                flight = flight_cost(way, y[k + 1] - y[last + 1], (turn.frame - turns[last].frame) / fps, cfg)
            for state, name, more in (
                ((1 - way, False, k), swing, flight),
                ((way, True, last), bounce, cfg.again * bounced),
                ((way, bounced, last), None, 0.0),
            ):
                own = name_cost(name, turn, y[k + 1], cfg) + more
                total = cost + own + segment_cost(state[0], y[k + 2] - y[k + 1])
                if state not in after or total < after[state][0]:
                    after[state] = (total, row + ([] if name is None else [as_event(turn, name, own)]))
        best = after
    return min(best.values(), key=lambda x: x[0])[1]


def as_event(turn: Turn, name: str, cost: float) -> dict:
    sharp = turn.strength / (turn.strength + 1)
    return {"frame": max(0, round(turn.frame)), "label": name, "score": round(sharp * math.exp(-0.25 * cost), 4)}


def segment_cost(way: int, dy: float) -> float:
    """Cost of a flight that moves by dy (share of the height range, down is positive) on this way."""
    return min(5.0, 12 * max(0.0, -dy if way == NEAR else dy))


def flight_cost(way: int, dy: float, wait_s: float, cfg: HitConfig) -> float:
    """Cost of a flight from contact to contact that moves by dy and takes wait_s: it crosses the court, in time."""
    crossed = dy if way == NEAR else -dy
    return 12 * max(0.0, 0.25 - crossed) + 5 * max(0.0, 1 - wait_s / cfg.flight_s)


def name_cost(name: str | None, turn: Turn, y: float, cfg: HitConfig) -> float:
    """Cost of calling a turn at height y (0 far end, 1 near end) by this name; None: by no name."""
    if name is None:
        return cfg.ignore * turn.strength / 2
    (vx0, vy0), (vx1, vy1) = turn.before, turn.after
    speed0, speed1 = max(np.hypot(vx0, vy0), 1e-6), np.hypot(vx1, vy1)
    place = 5 * max(0.0, 0.45 - y if name.startswith("near") else y - 0.55)
    up = (vy0 - vy1) / max(abs(vy0), abs(vy1), 1e-6)  # > 0: pushed up in the picture
    if name == "far_court_swing":
        return place + 1.8 * max(0.0, up) + (0.8 if vy1 < 0 else 0.0)
    if name == "near_court_swing":
        slower = max(0.0, 1 - speed1 / speed0)
        return place + 3 * max(0.0, -up) + (2.0 if vy1 > 0 else 0.0) + 1.5 * slower
    sideways = abs(vx1 - 0.8 * vx0) / max(speed0, speed1)
    faster = max(0.0, speed1 / speed0 - 1) if name == "near_court_bounce" else 0.0
    return place + 4 * max(0.0, -up) + 3 * max(0.0, sideways - 0.25) + 2 * min(faster, 2.0)
