"""Rendered tennis rallies with the contact frames known exactly: the data of the main demonstration.

A ball flies with gravity, quadratic drag and bounces between two players; a broadcast-like camera looks on. What makes
the contact frame worth finding: the ball is hidden for some frames around every contact, not centred on it; it drops
out as long in mid-flight; rackets swing early or late, and also where there is no ball. So the frame follows from the
way the ball comes and goes, not from one picture. Physics in metres and seconds: x to the right, y away from
the camera (net at 0), z up. The players and the ball are drawn larger than life so that they survive 64 pixels.

Shapes: T frames, H W picture, F flights in the table, K samples of a flight.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.video import VideoWriter
from utils.run import write_text_atomic

LABELS = ("near_court_swing", "far_court_swing")
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
MARGIN = 0.08  # of the court around the picture, for the camera to sway
COURTS = (  # surface in play, surroundings (RGB)
    ((58, 98, 160), (74, 128, 92)),  # blue hard court
    ((70, 130, 90), (140, 70, 62)),  # green hard court
    ((186, 104, 64), (166, 90, 56)),  # clay
    ((104, 146, 72), (86, 126, 60)),  # grass
    ((66, 60, 110), (44, 44, 60)),  # indoor
)
SHIRTS = np.array([(200, 40, 50), (40, 70, 190), (25, 25, 30), (235, 235, 240), (150, 60, 160), (240, 120, 40)])


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
    "easy": Level(0.5, 1.6, 0.5, (24.0, 25.0, NTSC, 30.0), (5, 7), 0.12, 0.6, 0.7, 0.004, 3.0, (4.0, 12.0)),
    "hard": Level(0.14, 1.2, 0.2, (24.0, 25.0, NTSC, 30.0, 50.0), (5, 9), 0.2, 0.8, 0.9, 0.03, 7.0, (8.0, 40.0)),
}


# ---- physics


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


# ---- pictures


@dataclass
class Camera:
    """Pinhole behind the near baseline. Picture units: height 1, u to the right from 0 to `aspect`, v down from 0."""

    back_m: float  # behind the net
    height_m: float
    pitch: float  # radians below the horizon
    aspect: float
    pan: np.ndarray  # (T, 2) picture units
    zoom: np.ndarray  # (T,)
    focal: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)

    def project(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """places (N, 3) m -> points (N, 2) and scale (N,), picture units per metre there, before pan and zoom."""
        y, z = places[:, 1] + self.back_m, places[:, 2] - self.height_m
        scale = self.focal / (y * np.cos(self.pitch) - z * np.sin(self.pitch))
        up = y * np.sin(self.pitch) + z * np.cos(self.pitch)
        return np.stack([self.shift[0] + scale * places[:, 0], self.shift[1] - scale * up], 1), scale

    def see(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """places (T, 3) m, one per frame -> points (T, 2) and scale (T,) in that frame."""
        points, scale = self.project(places)
        middle = np.array([self.aspect / 2, 0.5])
        return (points - middle) * self.zoom[:, None] + middle + self.pan, scale * self.zoom


def aim_camera(rng: np.random.Generator, aspect: float, level: Level, times_s: np.ndarray) -> Camera:
    """A camera, swaying a little, that has both players in the picture."""
    back, height = float(rng.uniform(27, 33)), float(rng.uniform(15, 19))
    wave = np.sin(2 * np.pi * (rng.uniform(0.2, 1.0, (3, 1)) * times_s + rng.uniform(0, 1, (3, 1))))  # (3, T)
    pan, zoom = level.sway * wave[:2].T, 1 + 0.4 * level.sway * wave[2]
    camera = Camera(back, height, float(np.arctan2(height, back)), aspect, pan, zoom)
    corners = np.array([[-6.6, -12.5, 0], [6.6, -12.5, 0], [0, -14.5, 0], [0, 14.5, 3 * level.figure]])
    spread = np.ptp(camera.project(corners)[0], axis=0)
    camera.focal = float(min(0.98 * aspect / spread[0], 0.9 / spread[1]))
    camera.shift = (aspect / 2, 0.97 - float(camera.project(corners)[0][:, 1].max()))
    return camera


def draw_court(rng: np.random.Generator, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """The empty court, float32 (H', W', 3), MARGIN of the picture larger on every side; the mean of 2 x 2 points."""
    wide, high = (2 * round(n * (1 + 2 * MARGIN)) for n in size)
    u = camera.aspect * ((np.arange(wide) + 0.5) / wide * (1 + 2 * MARGIN) - MARGIN)
    v = ((np.arange(high) + 0.5) / high * (1 + 2 * MARGIN) - MARGIN)[:, None]
    right, up = (u - camera.shift[0]) / camera.focal, (camera.shift[1] - v) / camera.focal
    cos, sin = np.cos(camera.pitch), np.sin(camera.pitch)
    ahead, rise = cos + up * sin, up * cos - sin  # (2H', 1): the ray is (right, ahead, rise)
    far = camera.height_m / np.maximum(-rise, 1e-3)
    x, y = right * far, far * ahead - camera.back_m + 0 * right  # (2H', 2W') m, ground under every point
    ax, ay, half = np.abs(x), np.abs(y), 0.04 + 1.5 / size[1]  # half the width of a line: never lost
    inner, outer = np.clip(np.array(COURTS[rng.integers(len(COURTS))]) * rng.uniform(0.85, 1.15, 3), 0, 255)
    picture = np.where(((ax < DOUBLES) & (ay < BASELINE))[..., None], inner, outer)
    lines = ((np.abs(ax - SINGLES) < half) | (np.abs(ax - DOUBLES) < half)) & (ay < BASELINE + half)
    lines |= (np.abs(ay - BASELINE) < 1.5 * half) & (ax < DOUBLES)
    lines |= (np.abs(ay - SERVICE) < 1.5 * half) & (ax < SINGLES) | (ax < half) & (ay < SERVICE)
    picture[lines] = 235
    cells = rng.uniform(30, 190, (high // 3 + 1, wide // 3 + 1, 1)) * rng.uniform(0.6, 1.1, 3)
    crowd = np.repeat(np.repeat(cells, 3, 0), 3, 1)[:high, :wide] + rng.uniform(-25, 25, (high, wide, 3))
    wall_z = camera.height_m + rise / ahead * (camera.back_m + WALL) + 0 * right  # where the ray meets the back wall
    picture[(y > WALL) | (y <= -WALL)] = 0.55 * outer
    picture = np.where((wall_z > 4)[..., None], crowd, picture)
    to_net = camera.back_m / ahead
    net_x, net_z = right * to_net, camera.height_m + rise * to_net + 0 * right  # where the ray meets the net's plane
    net = (net_z > 0) & (net_z < 1) & (np.abs(net_x) < 6.4)
    picture[net] = 0.55 * picture[net] + 11 + 160 * (net_z > 0.85)[net][:, None]
    return picture.reshape(high // 2, 2, wide // 2, 2, 3).mean((1, 3)).clip(0, 255).astype(np.float32)


def stretch(picture: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation of a picture (H, W, 3) along one axis at fractional places."""
    low = np.clip(np.floor(places).astype(int), 0, picture.shape[axis] - 2)
    share = np.clip(places - low, 0, 1).astype(np.float32)
    share = share[:, None, None] if axis == 0 else share[:, None]
    below = picture.take(low, axis)
    return below + share * (picture.take(low + 1, axis) - below)


def court_frames(court: np.ndarray, camera: Camera, now: slice, size: tuple[int, int]) -> np.ndarray:
    """The court as the moving camera sees it: float32 (T, H + 1, W + 1, 3); the last row and column are spare."""
    W, H = size
    pan, zoom = camera.pan[now] / [camera.aspect, 1], camera.zoom[now]
    canvas = np.zeros((len(zoom), H + 1, W + 1, 3), np.float32)
    across, down = (np.arange(W) + 0.5) / W - 0.5, (np.arange(H) + 0.5) / H - 0.5
    scale = np.array(court.shape[1::-1]) / (1 + 2 * MARGIN)
    for k in range(len(zoom)):
        rows = stretch(court, ((down - pan[k, 1]) / zoom[k] + 0.5 + MARGIN) * scale[1] - 0.5, 0)
        canvas[k, :H, :W] = stretch(rows, ((across - pan[k, 0]) / zoom[k] + 0.5 + MARGIN) * scale[0] - 0.5, 1)
    return canvas


def stamp(canvas: np.ndarray, aspect: float, centre: np.ndarray, reach: float, bars: list[tuple]) -> None:
    """Paint round-ended bars into canvas (T, H + 1, W + 1, 3), in order, within `reach` of centre (T, 2).

    bar = (a (T, 2), b (T, 2), radius (T,), opacity (T,), colour (3,)), picture units. The spare row and column of the
    canvas take what falls outside the picture.
    """
    H, W = canvas.shape[1] - 1, canvas.shape[2] - 1
    unit = np.array([aspect / W, 1 / H])  # a pixel
    low = np.floor((centre - reach) / unit).astype(int)  # (T, 2)
    wide, high = np.ceil(2 * reach / unit).astype(int) + 1
    cols, rows = low[:, :1] + np.arange(wide), low[:, 1:] + np.arange(high)
    u = ((cols + 0.5) * unit[0]).astype(np.float32)[:, None, :]  # (T, 1, wide)
    v = ((rows + 0.5) * unit[1]).astype(np.float32)[:, :, None]  # (T, high, 1)
    cols, rows = np.where((cols >= 0) & (cols < W), cols, W), np.where((rows >= 0) & (rows < H), rows, H)
    where = (np.arange(len(canvas))[:, None, None], rows[:, :, None], cols[:, None, :])
    patch, pixel = canvas[where], np.float32(np.sqrt(unit[0] * unit[1]))  # (T, high, wide, 3)
    for a, b, radius, opacity, colour in bars:
        (au, av), (bu, bv) = (end.T.astype(np.float32)[:, :, None, None] for end in (a, b))  # (T, 1, 1) each
        radius, opacity = (n.astype(np.float32)[:, None, None] for n in (radius, opacity))
        share = ((u - au) * (bu - au) + (v - av) * (bv - av)) / ((bu - au) ** 2 + (bv - av) ** 2 + np.float32(1e-9))
        share = np.clip(share, 0, 1)  # of the bar, where it is nearest to the pixel
        gone = np.sqrt((u - au - share * (bu - au)) ** 2 + (v - av - share * (bv - av)) ** 2)
        cover = (np.clip((radius - gone) / pixel + 0.5, 0, 1) * opacity)[..., None]
        patch += cover * (np.asarray(colour, np.float32) - patch)
    canvas[where] = patch


def player_layer(camera: Camera, player: dict, level: Level, times_s: np.ndarray, shirt: np.ndarray) -> tuple:
    """(centre, reach (T,), bars) of one player for `stamp`."""
    feet, scale = camera.see(np.pad(player["place"], ((0, 0), (0, 1))))
    near = camera.project(np.array([[0, -BASELINE, 0]]))[1]  # scale at the near baseline
    scale = level.figure * scale ** (1 - level.even) * near**level.even
    hand, one = player["hand"], np.ones(len(scale))
    speed = np.linalg.norm(np.gradient(player["place"], times_s, axis=0), axis=1)
    gait = 0.3 * np.sin(15 * times_s) * np.minimum(speed / 3, 1)
    keys_s = [-0.75, -0.4, -0.1, 0.0, 0.12, 0.3, 0.5, 0.9]
    degrees = [-60, 75, -25, 0, 60, 140, 140, -60]  # ready, back, down, strike, through, hold, ready
    angle = np.deg2rad(np.interp(player["swing"], keys_s, degrees))
    arm_x, arm_y = hand * np.cos(angle), np.sin(angle)

    def at(x, y):
        """Picture point x metres to the right of the feet and y above them."""
        return feet + np.stack([x * scale, -y * scale], 1)

    grip, skin = at(0.15 * hand + 0.5 * arm_x, 1.3 + 0.5 * arm_y), (222, 176, 140)
    bars = [
        (at(-0.5, 0), at(0.5, 0), 0.12 * scale, 0.4 * one, (20, 30, 20)),  # shadow
        (at(0, 0.8), at(-0.2 - gait, 0), 0.11 * scale, one, skin),
        (at(0, 0.8), at(0.2 + gait, 0), 0.11 * scale, one, skin),
        (at(0, 0.85), at(0, 1.35), 0.24 * scale, one, shirt),
        (at(0, 1.72), at(0, 1.76), 0.15 * scale, one, skin),
        (at(0.15 * hand, 1.3), grip, 0.09 * scale, one, skin),
        (grip, at(0.15 * hand + 1.15 * arm_x, 1.3 + 1.15 * arm_y), 0.13 * scale, one, (250, 250, 250)),
    ]
    return at(0, 1.25), 1.55 * scale, bars


def ball_layers(camera: Camera, strokes: list, level: Level, times_s: np.ndarray, shown: np.ndarray, open_s: float):
    """[(centre, reach (T,), bars)] of the ball's shadow and of the ball, smeared over the exposure of `open_s`."""
    place, alive = ball_at(strokes, times_s)
    middle, scale = camera.see(place)
    below, _ = camera.see(place * [1, 1, 0])
    a, b = (camera.see(ball_at(strokes, times_s + way * open_s / 2)[0])[0] for way in (-1, 1))
    whole = (np.linalg.norm(b - a, axis=1) < 0.2)[:, None]  # else one end lies outside the flight
    a, b = np.where(whole, a, middle), np.where(whole, b, middle)
    radius, span, shown = level.ball_m * scale, np.linalg.norm(b - a, axis=1), shown * alive
    strength = shown * radius / (radius + 0.3 * span)
    return [
        (below, radius, [(below, below, 0.8 * radius, 0.45 * shown, (15, 20, 15))]),
        (middle, radius + span, [(a, b, radius, strength, (225, 255, 60))]),
    ]


def quantise(frames: np.ndarray, step: float) -> np.ndarray:
    """What JPEG does to brightness: 8 x 8 cosine transform, rounded to `step` (more for fine detail). (T, H, W, 3)."""
    T, H, W, _ = frames.shape
    grey = (frames[..., 0] + frames[..., 1] + frames[..., 2]) / 3
    padded = np.pad(grey, ((0, 0), (0, -H % 8), (0, -W % 8)), mode="edge")
    n = np.arange(8)
    basis = (np.cos(np.pi * n[:, None] * (n + 0.5) / 8) * np.where(n[:, None], 0.5, 0.125**0.5)).astype(np.float32)
    steps = (step * (1 + 0.35 * (n[:, None] + n))).astype(np.float32)
    blocks = padded.reshape(T, padded.shape[1] // 8, 8, -1, 8).swapaxes(2, 3)  # (T, h, w, 8, 8)
    coded = basis.T @ (np.round(basis @ blocks @ basis.T / steps) * steps) @ basis
    return frames + (coded.swapaxes(2, 3).reshape(padded.shape)[:, :H, :W] - grey)[..., None]


def draw_board(picture: np.ndarray, cells: np.ndarray, corner: int) -> None:
    """Paint a scoreboard into a corner of picture (T, H, W, 3): a dark box with two rows of bright cells (2, 12)."""
    H, W = picture.shape[1:3]
    high, wide = max(H // 10, 4), max(W // 4, 8)
    top, left = (H // 32, H - high - H // 32)[corner // 2], (W // 32, W - wide - W // 32)[corner % 2]
    box = picture[:, top : top + high, left : left + wide]
    box[:] = 0.2 * box + 20
    row, col = np.arange(high), np.arange(wide)
    box[:, cells[row * 2 // high][:, col * 12 // wide] & (row * 4 // high % 2 == 1)[:, None]] = 225


def draw(rng: np.random.Generator, strokes: list, level: Level, first_s: float, fps: float, T: int, size, aspect=None):
    """The frames first_s + k / fps of a play, uint8 (T, H, W, 3); camera, court and players' manners come from rng."""
    W, H = size
    times_s = first_s + np.arange(T) / fps
    camera = aim_camera(rng, aspect or W / H, level, times_s)
    court, (near, far) = draw_court(rng, camera, size), act(rng, strokes, level, times_s)
    shown, shirts = ~hide(rng, strokes, level, first_s, fps, T), SHIRTS[rng.choice(len(SHIRTS), 2, replace=False)]
    layers = [  # from far to near
        player_layer(camera, far, level, times_s, shirts[1]),
        *ball_layers(camera, strokes, level, times_s, shown, float(rng.uniform(0.3, 0.6)) / fps),
        player_layer(camera, near, level, times_s, shirts[0]),
    ]
    light = rng.uniform(0.8, 1.15) * (1 + 0.04 * np.sin(rng.uniform(0.5, 2) * times_s + rng.uniform(0, 6)))
    step, cells, corner = rng.uniform(*level.step), rng.random((2, 12)) < 0.6, int(rng.integers(4))
    frames = np.empty((T, H, W, 3), np.uint8)
    for start in range(0, T, 64):  # long videos piece by piece
        now = slice(start, min(start + 64, T))
        canvas = court_frames(court, camera, now, size)
        for centre, reach, bars in layers:
            bars = [(*(values[now] for values in bar[:4]), bar[4]) for bar in bars]
            stamp(canvas, camera.aspect, centre[now], float(reach[now].max()), bars)
        picture = canvas[:, :H, :W]
        draw_board(picture, cells, corner)
        picture = picture * light[now, None, None, None].astype(np.float32)
        picture += level.noise * rng.standard_normal(picture.shape[:3], np.float32)[..., None]
        frames[now] = quantise(picture, step).clip(0, 255)
    return frames


# ---- what other files use


def contacts(strokes: list[Stroke], first_s: float, fps: float, T: int) -> list[dict]:
    """The contacts in T frames: [{"frame", "label", "lo", "hi"}]; frame is nearest to it, lo..hi enclose it."""
    events = []
    for stroke in strokes:
        exact = (stroke.time_s - first_s) * fps
        if 0 <= round(exact) < T:
            lo, hi = max(int(np.floor(exact)), 0), min(int(np.ceil(exact)), T - 1)
            events.append({"frame": round(exact), "label": LABELS[stroke.side], "lo": lo, "hi": hi})
    return events


def find_level(name: str) -> Level:
    if name not in LEVELS:
        raise ValueError(f"level {name!r}: expected one of {tuple(LEVELS)}")
    return LEVELS[name]


def render_rally(seed: int, num_frames: int, size, *, fps: float | None = None, level: str = "easy", aspect=None):
    """One continuous rally video of any length, a function of the arguments only.

    size (W, H) px; fps frames per second (None: drawn from the level); aspect: width / height of the scene that is
    squeezed into size (None: W / H, square pixels). Returns frames uint8 (T, H, W, 3) RGB, and every contact of both
    players as [{"frame", "label", "lo", "hi"}] in order of time.
    """
    rng, how = np.random.default_rng([seed, 1]), find_level(level)
    fps = float(rng.choice(how.fps)) if fps is None else float(fps)
    strokes = play(rng, num_frames / fps + 1)
    return draw(rng, strokes, how, 0.0, fps, num_frames, size, aspect), contacts(strokes, 0.0, fps, num_frames)


def write_rally_video(path, seed: int, seconds: float, size: tuple[int, int], fps: float, level="easy", aspect=None):
    """Write a rally as path (mp4) and its labels beside it as <stem>.json (E2E-Spot layout); returns the labels' item.

    size (W, H) px; the file has round(seconds * fps) frames.
    """
    path, count = Path(path), round(seconds * fps)
    frames, events = render_rally(seed, count, size, fps=fps, level=level, aspect=aspect)
    with VideoWriter(path, fps, size=size) as video:
        for frame in frames:
            video.write(frame)
    item = {"video": path.stem, "num_frames": count, "fps": fps, "width": size[0], "height": size[1]}
    item |= {"num_events": len(events), "events": events, "complete_for": list(LABELS)}
    write_text_atomic(path.with_suffix(".json"), json.dumps([item], indent=1) + "\n")
    return item


class Rally(Dataset):
    """`n` clips an epoch with exactly one contact each (or none), rendered when asked for: ds[index], ds[epoch, index].

    peak: whose contact it is: "near" (the far player's may occur as well) or "any" (no second one by either player).
    Its frame is drawn evenly from 0..T-1. no_peak: share of clips without a contact of that kind. size, level, aspect:
    as in render_rally. shuffle_frames: a control, the frames of every clip in random order, labels moved with them.

    Item: frames uint8 (T, 3, H, W) RGB; length int64 (T); peak, lo, hi int64, frame of the contact and the frames that
    enclose it, -1 without one; events int64 (E, 4), all contacts as rows [frame, 1 near or 2 far, lo, hi], unused rows
    -1; fps float32.
    """

    def __init__(
        self, n, seed, num_frames=64, size=(64, 64), peak="near", no_peak=0.0, shuffle_frames=False, level="easy",
        aspect=None,
    ):  # fmt: skip
        if peak not in ("any", "near") or not 0 <= no_peak <= 1 or n < 1 or num_frames < 8:
            raise ValueError(
                f"Rally: n {n}, num_frames {num_frames}, peak {peak!r}, no_peak {no_peak}; "
                "expected n >= 1, num_frames >= 8, peak any or near, no_peak in 0..1"
            )
        self.n, self.seed, self.T, self.size, self.peak, self.no_peak = n, seed, num_frames, tuple(size), peak, no_peak
        self.shuffle_frames, self.level, self.aspect = shuffle_frames, find_level(level), aspect
        order, whose = "shuffled" if shuffle_frames else "in order", "either" if peak == "any" else "the near"
        print(
            f"# {n} rendered clips of {num_frames} frames, {size[0]}x{size[1]}, level {level}; one contact of "
            f"{whose} player ({no_peak:.0%} none); frames {order}; seed {seed}"
        )

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.n:
            raise IndexError(f"Rally: clip {index} of {self.n}")
        rng = np.random.default_rng([self.seed, epoch, index])
        fps = float(rng.choice(self.level.fps))
        peak = -1 if rng.random() < self.no_peak else int(rng.integers(self.T))
        strokes, first_s = self.find_window(rng, fps, peak)
        found = contacts(strokes, first_s, fps, self.T)
        frames = draw(rng, strokes, self.level, first_s, fps, self.T, self.size, self.aspect)
        events = np.full((2 + self.T // 12, 4), -1)
        for k, e in enumerate(found):
            events[k] = e["frame"], 1 + LABELS.index(e["label"]), e["lo"], e["hi"]
        if self.shuffle_frames:
            order = rng.permutation(self.T)
            frames, moved = frames[order], np.argsort(order)
            for k in (0, 2, 3):
                events[: len(found), k] = moved[events[: len(found), 0]]
            peak = int(moved[peak]) if peak >= 0 else -1
        lo, hi = next(((row[2], row[3]) for row in events if row[0] == peak >= 0), (-1, -1))
        return {
            "frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),  # (T, 3, H, W)
            "length": torch.tensor(self.T),
            "peak": torch.tensor(peak),
            "lo": torch.tensor(int(lo)),
            "hi": torch.tensor(int(hi)),
            "events": torch.from_numpy(events),
            "fps": torch.tensor(fps, dtype=torch.float32),
        }

    def find_window(self, rng: np.random.Generator, fps: float, peak: int) -> tuple[list[Stroke], float]:
        """A play and the time of frame 0 (s) such that the only contact of the kind is at frame `peak` (-1: none)."""
        span_s = self.T / fps
        total_s = 6 + 1.5 * span_s
        for _ in range(1000):
            strokes = play(rng, total_s)
            mine = [s for s in strokes if self.peak == "any" or s.side == 0]
            if peak < 0:
                starts = rng.uniform(0, total_s - span_s, 8)
            else:  # the contact lies anywhere within half a frame of its frame
                starts = rng.permutation([s.time_s for s in mine]) - (peak + rng.uniform(-0.49, 0.49)) / fps
            for first_s in starts[(starts > -1) & (starts + span_s < total_s)]:
                inside = [e["frame"] for e in contacts(mine, first_s, fps, self.T)]
                if inside == ([] if peak < 0 else [peak]):
                    return strokes, float(first_s)
        raise ValueError(
            f"Rally: found no clip of {self.T} frames at {fps} fps with one contact; ask for shorter clips"
        )
