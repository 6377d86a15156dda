"""The track of one ball made whole: gaps filled and flagged, hits found, positions smoothed but never across a hit.

Coordinates are pixels (T, 2) of the original frame, centres at whole numbers, nan where there is no ball; T frames.
"""

import numpy as np


def turns(xy: np.ndarray, angle: float = 60.0, min_step: float = 1.0) -> np.ndarray:
    """bool (T,): frames where the direction of flight changes by more than `angle` degrees: hits.

    xy (T, 2) px, nan where there is no ball.  The velocities are those over two frames before and after (one or
    three next to a gap).  Slower than min_step px per frame on either side is no flight.  Of frames that are at most
    two apart, the one with the largest change of velocity counts.
    """
    T = len(xy)
    seen = np.flatnonzero(np.isfinite(xy).all(1))
    change = np.zeros(T)
    for k in range(1, len(seen) - 1):
        t = seen[k]
        into, out = side(xy, seen, k, -1), side(xy, seen, k, 1)
        if into is None or out is None:
            continue
        lengths = np.hypot(*into), np.hypot(*out)
        if min(lengths) < min_step:
            continue
        if into @ out < np.cos(np.radians(angle)) * lengths[0] * lengths[1]:
            change[t] = np.hypot(*(out - into))
    around = [change[max(0, t - 2) : t + 3] for t in range(T)]
    return np.array([c > 0 and c == a.max() and c not in change[max(0, t - 2) : t] for t, (c, a) in
                     enumerate(zip(change, around, strict=True))], bool)  # fmt: skip


def side(xy: np.ndarray, seen: np.ndarray, k: int, step: int) -> np.ndarray | None:
    """Velocity (2,) px per frame at seen[k] towards the earlier (-1) or later (1) points, None across a gap."""
    t, other = seen[k], None
    for near in (k + step, k + 2 * step):
        if 0 <= near < len(seen) and abs(seen[near] - t) <= 3:
            other = seen[near]
    return None if other is None else (xy[other] - xy[t]) / (other - t)


def fill_gaps(xy: np.ndarray, max_gap: int = 6, max_step: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
    """Missing frames between seen ones: (filled (T, 2), flags bool (T,) of the frames filled).

    xy (T, 2) px, nan where there is no ball.  A gap of at most max_gap frames is filled by a parabola through three
    points on either side where these are neighbours and the ball keeps its direction across the gap (60 degrees), else
    by a straight line.  Gaps that need more than max_step px per frame, and both ends of the clip, stay.
    """
    filled, flags = np.array(xy, np.float64), np.zeros(len(xy), bool)
    seen = np.flatnonzero(np.isfinite(filled).all(1))
    for a, b in zip(seen[:-1], seen[1:], strict=True):
        missing = b - a - 1
        if not 1 <= missing <= max_gap or np.hypot(*(filled[b] - filled[a])) > max_step * (b - a):
            continue
        t = np.arange(a + 1, b)
        near = np.r_[a - 2 : a + 1, b : b + 3]
        whole = near[0] >= 0 and near[-1] < len(xy) and np.isfinite(xy[near]).all()
        if whole and straight(xy[a] - xy[a - 2], xy[b + 2] - xy[b], xy[b] - xy[a]):
            fit = np.polynomial.polynomial.polyfit(near - a, xy[near], 2)  # (3, 2)
            filled[t] = np.polynomial.polynomial.polyval(t - a, fit).T
        else:
            share = (t - a)[:, None] / (b - a)
            filled[t] = (1 - share) * filled[a] + share * filled[b]
        flags[t] = True
    return filled, flags


def straight(*moves: np.ndarray) -> bool:
    """Whether no two of these moves (2,) differ in direction by more than 60 degrees."""
    units = [m / max(np.hypot(*m), 1e-9) for m in moves]
    return all(u @ v >= 0.5 for k, u in enumerate(units) for v in units[:k])


def smooth(xy: np.ndarray, width: int, max_gap: int = 6, noise: float = 0.001, accel: float = 0.001) -> np.ndarray:
    """Smoothed copy (T, 2) of a track: Kalman filter with constant velocity and Rauch-Tung-Striebel pass.

    xy (T, 2) px, nan where nothing was measured (leave filled frames nan).  Pieces are cut at hits (`turns`), whose
    frame ends one piece and begins the next and gets the mean of both, at gaps longer than max_gap, and where the ball
    turned while unseen; nan outside the pieces.  noise: of a measurement, accel: of the velocity per frame, both
    standard deviations in parts of the width.
    """
    xy = np.asarray(xy, np.float64)
    seen = np.flatnonzero(np.isfinite(xy).all(1))
    hit = turns(xy, min_step=0.001 * width)
    pieces: list[list[int]] = []
    for k, t in enumerate(seen):
        if k == 0 or t - seen[k - 1] - 1 > max_gap or turns_in_gap(xy, seen, k):
            pieces.append([t])
            continue
        pieces[-1].append(t)
        if hit[t]:
            pieces.append([t])
    total, count = np.zeros_like(xy), np.zeros(len(xy))
    for piece in pieces:
        a, b = piece[0], piece[-1] + 1
        total[a:b] += rts(xy[a:b], noise * width, accel * width)
        count[a:b] += 1
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], np.nan)


def turns_in_gap(xy: np.ndarray, seen: np.ndarray, k: int) -> bool:
    """Whether the ball changes its direction by more than 60 degrees while unseen between seen[k - 1] and seen[k]."""
    before, after = side(xy, seen, k - 1, -1), side(xy, seen, k, 1)
    if seen[k] - seen[k - 1] == 1 or before is None or after is None:
        return False
    return not straight(before, xy[seen[k]] - xy[seen[k - 1]], after)


def rts(xy: np.ndarray, noise: float, accel: float) -> np.ndarray:
    """Smoothed positions (T, 2) of a piece that begins and ends with a measurement; nan inside: not measured.

    Both coordinates have the same covariances, so one filter with a state (2, 2), position and velocity times x and
    y, serves both.
    """
    F = np.array([[1.0, 1.0], [0.0, 1.0]])
    Q = accel**2 * np.array([[0.25, 0.5], [0.5, 1.0]])
    state, P = np.stack([xy[0], np.zeros(2)]), np.diag([noise**2, (100 * (noise + accel)) ** 2])
    filtered, predicted = [(state, P)], [(state, P)]
    for z in xy[1:]:
        state, P = F @ state, F @ P @ F.T + Q
        predicted.append((state, P))
        if np.isfinite(z).all():
            gain = P[:, :1] / (P[0, 0] + noise**2)  # (2, 1)
            state, P = state + gain * (z - state[0]), P - gain * P[:1]
        filtered.append((state, P))
    out = [filtered[-1][0]]
    for (x, P), (x_next, P_next) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        gain = P @ F.T @ np.linalg.inv(P_next)
        out.append(x + gain @ (out[-1] - x_next))
    return np.stack([x[0] for x in out[::-1]])
