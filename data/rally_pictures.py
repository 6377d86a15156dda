"""The pictures of a rendered rally: camera, court, players, ball, light, noise and compression, in numpy alone.

Shapes: T frames, H W picture. Picture units: the height of the picture is 1.
"""

from dataclasses import dataclass

import numpy as np

from data.rally_play import BASELINE, DOUBLES, SERVICE, SINGLES, WALL, Level, Stroke, act, ball_at, hide

MARGIN = 0.08  # of the court around the picture, for the camera to sway
COURTS = (  # surface in play, surroundings (RGB)
    ((58, 98, 160), (74, 128, 92)),  # blue hard court
    ((70, 130, 90), (140, 70, 62)),  # green hard court
    ((186, 104, 64), (166, 90, 56)),  # clay
    ((104, 146, 72), (86, 126, 60)),  # grass
    ((66, 60, 110), (44, 44, 60)),  # indoor
)
SHIRTS = np.array([(200, 40, 50), (40, 70, 190), (25, 25, 30), (235, 235, 240), (150, 60, 160), (240, 120, 40)])


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


def ball_layers(
    camera: Camera, strokes: list[Stroke], level: Level, times_s: np.ndarray, shown: np.ndarray, open_s: float
):
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


def draw(
    rng: np.random.Generator, strokes: list[Stroke], level: Level, first_s: float, fps: float, T: int, size, aspect=None
):
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
