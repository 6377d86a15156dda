"""The play of a rendered rally: flights of the ball, strokes, what the players do, when the ball is hidden.

Metres and seconds: x to the right, y away from the camera (net at 0), z up.
Shapes: T frames, F flights in the table, K samples of a flight, R flights to choose from.
"""

import functools
from dataclasses import dataclass

import numpy as np

GRAVITY, DRAG, RESTITUTION, GRIP = (
    9.81,
    0.0196,
    0.75,
    0.72,
)  # m/s^2; 1/m (Cd 0.55); share of vertical, forward speed kept
BASELINE, SINGLES, DOUBLES, SERVICE, WALL = 11.885, 4.115, 5.485, 6.40, 19.0  # m from the centre of the court
HEIGHTS_M = np.array([0.75, 0.9, 1.05, 1.2])  # contacts happen at one of these heights
DT = 0.01  # s between samples of a flight
LONGEST_S = 1.7  # s from contact to contact, at most


@dataclass(frozen=True)
class Level:
    """How hard a rally is to read. Lengths in metres, times in seconds, picture units are shares of its height."""

    ball_m: float  # drawn radius of the ball (real: 0.033)
    figure: float  # drawn size of the players, 1 is life size
    even: float  # 0: the far player is drawn as small as perspective has him, 1: as tall as the near one
    fps: tuple[float, ...]  # frame rates to draw from
    hidden: tuple[int, int]  # fewest and most frames for which the ball is hidden
    early_late_s: float  # a swing is at most this early or late against its contact
    idle_swings: float  # probability of a swing without a ball between two own contacts
    drop_outs: float  # probability that the ball drops out once in a flight
    sway: float  # camera pan, picture units
    noise: float  # sensor noise, grey values
    step: tuple[float, float]  # of the block quantiser, grey values


NTSC = 30000 / 1001
LEVELS = {
    "easy": Level(0.5, 1.6, 0.5, (24.0, 25.0, NTSC, 30.0), (5, 8), 0.2, 0.8, 0.9, 0.004, 3.0, (4.0, 12.0)),
    "hard": Level(0.14, 1.2, 0.2, (24.0, 25.0, NTSC, 30.0, 50.0), (5, 9), 0.2, 0.8, 0.9, 0.03, 7.0, (8.0, 40.0)),
}


@functools.cache
def flight_table() -> dict[str, np.ndarray]:
    """Every flight a player can choose: launch heights x speeds x elevations, integrated once (a pure table).

    start (F,) index into HEIGHTS_M; along, height (F, K) metres; bounce (F,) metres along; meet (F, len(HEIGHTS_M), 2)
    seconds at which the ball passes each height after its first bounce, rising and falling (NaN: never).
    """
    start, speed, angle = np.meshgrid(
        np.arange(len(HEIGHTS_M)), np.linspace(15, 36, 36), np.deg2rad(np.linspace(1, 38, 38)), indexing="ij"
    )
    start, speed, angle = start.ravel(), speed.ravel(), angle.ravel()
    s, z = np.zeros(len(start)), HEIGHTS_M[start]
    vs, vz, K = speed * np.cos(angle), speed * np.sin(angle), 400
    along, height, bounces = np.empty((len(s), K)), np.empty((len(s), K)), np.zeros((len(s), K), int)
    for k in range(K):
        along[:, k], height[:, k] = s, z
        brake = DRAG * np.hypot(vs, vz) * DT
        vs, vz = vs - brake * vs, vz - brake * vz - GRAVITY * DT
        s, z = s + vs * DT, z + vz * DT
        hit = z < 0
        bounces[:, k] = bounces[:, max(k - 1, 0)] + hit
        z, vz = np.where(hit, -RESTITUTION * z, z), np.where(hit, -RESTITUTION * vz, vz)
        vs = np.where(hit, GRIP * vs, vs)
    first = (bounces == 0).sum(1)  # (F,) sample just after the first bounce
    bounce = along[np.arange(len(s)), np.minimum(first, K - 1)]
    once = bounces[:, :-1] == 1
    meet = np.full((len(s), len(HEIGHTS_M), 2), np.nan)
    for j, level in enumerate(HEIGHTS_M):
        below = height < level
        for way, cross in enumerate((below[:, :-1] & ~below[:, 1:], ~below[:, :-1] & below[:, 1:])):
            found, k = (cross & once).any(1), (cross & once).argmax(1)
            z0, z1 = height[np.arange(len(s)), k], height[np.arange(len(s)), k + 1]
            meet[:, j, way] = np.where(found, (k + (level - z0) / np.where(found, z1 - z0, 1)) * DT, np.nan)
    return {"start": start, "along": along, "height": height, "bounce": bounce, "meet": meet}


@dataclass
class Stroke:
    """One contact and the flight that follows. side 0 near, 1 far; place (x, y, z) m; end_s: when the flight ends."""

    time_s: float
    side: int
    place: tuple[float, float, float]
    flight: int  # row of the flight table
    turn: float  # angle of the flight to the long axis of the court, radians
    end_s: float
    feed: bool  # the hitter tosses the ball himself
    returned: bool


def play(rng: np.random.Generator, seconds: float) -> list[Stroke]:
    """Points of one to eight strokes with pauses until `seconds` are filled, in order of time."""
    table, strokes, time_s = flight_table(), [], float(rng.uniform(1.0, 2.0))
    while time_s < seconds:
        side, level = int(rng.integers(2)), int(rng.integers(len(HEIGHTS_M)))
        spot = (float(rng.uniform(-3, 3)), (2 * side - 1) * float(rng.uniform(11.9, 13.5)))
        count = int(rng.choice([1, 2, 3, 5, 8]))
        for k in range(count):
            last = k == count - 1
            turn = float(np.arctan2(rng.uniform(-3.2, 3.2) - spot[0], abs(spot[1]) + 8))
            cos, landing = np.cos(turn), table["bounce"] * np.cos(turn) - abs(spot[1])  # beyond the net
            rows = np.flatnonzero((table["start"] == level) & (landing > 4) & (landing < BASELINE - 0.3))
            over = table["height"][
                rows, (table["along"][rows, :250] < abs(spot[1]) / cos).sum(1)
            ]  # height above the net
            rows = rows[(over > 1.05) & (over < 4)]
            meet_s = table["meet"][rows]  # (R, heights, 2)
            sample = (np.nan_to_num(meet_s) / DT).astype(int)
            reach = table["along"][rows[:, None, None], sample] * cos - abs(spot[1])
            good = np.flatnonzero((meet_s < LONGEST_S) & (reach > 11) & (reach < 15.5))  # NaN compares as False
            row, next_level, way = np.unravel_index(rng.choice(good), meet_s.shape)
            flight, end_s = int(rows[row]), time_s + (2.2 if last else float(meet_s[row, next_level, way]))
            place = (spot[0], spot[1], float(HEIGHTS_M[level]))
            strokes.append(Stroke(time_s, side, place, flight, turn, end_s, k == 0, not last))
            spot = tuple(float(v) for v in ball_at(strokes[-1:], np.array([end_s - 1e-9]))[0][0, :2])
            time_s, side, level = end_s, 1 - side, int(next_level)
        time_s += float(rng.uniform(1.3, 2.6))
    return strokes


def ball_at(strokes: list[Stroke], times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the ball is: places (T, 3) m, and bool (T,) whether it is in play (flying or tossed)."""
    table, places, alive = flight_table(), np.zeros((len(times_s), 3)), np.zeros(len(times_s), bool)
    grid = np.arange(table["along"].shape[1]) * DT
    for stroke in strokes:
        x, y, z = stroke.place
        now = (times_s >= stroke.time_s) & (times_s < stroke.end_s)
        since, ahead = times_s[now] - stroke.time_s, 1 - 2 * stroke.side
        along = np.interp(since, grid, table["along"][stroke.flight])
        up = np.interp(since, grid, table["height"][stroke.flight])
        way = ahead * along * np.cos(stroke.turn)
        places[now] = np.stack([x + along * np.sin(stroke.turn), y + way, up], 1)
        alive[now] = np.abs(y + way) < WALL - 1
        if stroke.feed:  # tossed from the hand at 1.1 m, 0.8 s before the contact
            toss = (times_s >= stroke.time_s - 0.8) & (times_s < stroke.time_s)
            left = stroke.time_s - times_s[toss]
            up = z + left * ((1.1 - z) / 0.8 + GRAVITY / 2 * (0.8 - left))
            places[toss] = np.stack([np.full_like(up, x), np.full_like(up, y), up], 1)
            alive[toss] = True
    return places, alive


def act(rng: np.random.Generator, strokes: list[Stroke], level: Level, times_s: np.ndarray) -> list[dict]:
    """What the two players do: per side place (T, 2) m, swing (T,) seconds to the nearest swing, hand (T,) +1 or -1."""
    players = []
    for side in (0, 1):
        ahead, reach = 1 - 2 * side, 0.8 * level.figure
        ready = (float(rng.uniform(-0.8, 0.8)), -ahead * float(rng.uniform(12.3, 13.3)))
        keys, swings, own_s = [(-1e3, *ready)], [], []
        for stroke in strokes:
            mine, hand = stroke.side == side, int(rng.choice([-1, 1]))
            if mine:
                when, (x, y) = stroke.time_s, stroke.place[:2]
                swings.append((when + float(rng.uniform(-1, 1)) * level.early_late_s, hand))
            elif not stroke.returned:  # runs for the ball in vain, and may swing at it
                when = stroke.time_s + float(rng.uniform(1.0, 1.4))
                x, y = ball_at([stroke], np.array([when]))[0][0, :2]
                x, y, hand = x - np.sign(x) * 1.5, -ahead * float(np.clip(abs(y), 11, 14)), int(np.sign(x) or 1)
                if rng.random() < level.idle_swings:
                    swings.append((when, hand))
            else:
                continue
            if keys[-1][0] > -1e2:
                keys.append(((keys[-1][0] + when) / 2, *ready))
            keys += [(when - 0.1, x - hand * reach, y), (when + 0.15, x - hand * reach, y)]
            if own_s and when - own_s[-1] > 1.9 and rng.random() < level.idle_swings:
                swings.append((float(rng.uniform(own_s[-1] + 0.9, when - 0.9)), int(rng.choice([-1, 1]))))
            own_s.append(when)
        keys.append((keys[-1][0] + 1.2, *ready))
        key = np.array(keys)
        place = np.stack([np.interp(times_s, key[:, 0], key[:, i]) for i in (1, 2)], 1)  # (T, 2)
        table = np.array(swings or [(1e3, 1)])  # (number of swings, 2)
        near = np.abs(times_s[:, None] - table[:, 0]).argmin(1)
        players.append({"place": place, "swing": times_s - table[near, 0], "hand": table[near, 1]})
    return players


def hide(rng, strokes: list[Stroke], level: Level, first_s: float, fps: float, T: int) -> np.ndarray:
    """bool (T,): frames in which the ball is hidden, around every contact and once in most flights."""
    hidden, (fewest, most) = np.zeros(T, bool), level.hidden
    for stroke in strokes:
        length, contact = int(rng.integers(fewest, most + 1)), round((stroke.time_s - first_s) * fps)
        begin = contact - int(rng.integers(1, length - 1))  # at least one hidden frame on either side
        hidden[max(begin, 0) : max(begin + length, 0)] = True
        length, flight = int(rng.integers(fewest, most + 1)), int((stroke.end_s - stroke.time_s) * fps)
        begin = contact + int(rng.integers(length + 2, max(length + 3, flight - 2 * length)))
        if rng.random() < level.drop_outs:
            hidden[max(begin, 0) : max(begin + length, 0)] = True
    return hidden
