"""Draw results onto pictures: text, boxes, masks, trails, captions, score curves, contact sheets.

Every function takes uint8 RGB (H, W, 3) and returns a new array. Fonts and lines follow the picture (`unit`), so the
same call suits a 112 px clip and a 4K frame. Points are (x, y) px, boxes xyxy px; what lies outside is cut off.
"""

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from utils.run import writing

WHITE, BLACK, DARK, GREY = (255, 255, 255), (0, 0, 0), (22, 26, 32), (120, 128, 138)
PALETTE = [  # apart for colour-blind eyes too, and from grass, clay and ice
    (255, 196, 0),
    (0, 200, 255),
    (255, 92, 92),
    (90, 230, 130),
    (205, 130, 255),
    (255, 140, 30),
    (120, 160, 255),
    (255, 150, 200),
]
FINE = 3  # shapes with slanted edges are drawn this many times larger, then reduced

Colour = tuple[int, int, int]


def colour(k: int) -> Colour:
    """The k-th colour, repeating."""
    return PALETTE[k % len(PALETTE)]


def unit(image: np.ndarray) -> float:
    """Line width in px that looks thin but clear on this picture: 1 at 360 px, 3 at 1080 px of the shorter side."""
    return max(1.0, min(image.shape[:2]) / 360)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _checked(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"overlay: image {image.shape} {image.dtype}, expected (H, W, 3) uint8")
    return image


def _blend(image: np.ndarray, colour: Colour, alpha: np.ndarray) -> np.ndarray:
    """image * (1 - alpha) + colour * alpha, computed where alpha (H, W) in [0, 1] is not 0."""
    out, rows, columns = image.copy(), np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if len(rows):
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        weight = alpha[part].astype(np.float32)[..., None]
        out[part] = image[part] * (1 - weight) + np.asarray(colour, np.float32) * weight + 0.5
    return out


def text(
    image: np.ndarray,
    xy: tuple[float, float],
    string: str,
    colour: Colour = WHITE,
    size: int | None = None,
    anchor: str = "la",
    outline: Colour = BLACK,
) -> np.ndarray:
    """Text with an outline, moved so that it lies inside the picture. anchor: PIL's ("la": xy is its top left, "mm":
    its middle, "rs": right end of its base line); size: font px, None: 13 at 360 px of height."""
    size = size or max(9, round(13 * unit(image)))
    stroke = max(1, round(size / 9))
    canvas = Image.fromarray(_checked(image))
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = draw.textbbox(xy, string, _font(size), anchor=anchor, stroke_width=stroke)
    dx = max(-left, 0) or min(canvas.width - right, 0)
    dy = max(-top, 0) or min(canvas.height - bottom, 0)
    where = (xy[0] + dx, xy[1] + dy)
    draw.text(where, string, colour, _font(size), anchor=anchor, stroke_width=stroke, stroke_fill=outline)
    return np.array(canvas)


def box(
    image: np.ndarray, xyxy: Sequence[float], colour: Colour = PALETTE[0], label: str = "", width: int | None = None
) -> np.ndarray:
    """Frame around xyxy px with a dark line outside it, so that it shows on any ground; label above its top left."""
    width = width or max(1, round(1.5 * unit(image)))
    canvas = Image.fromarray(_checked(image))
    draw = ImageDraw.Draw(canvas)
    x0, y0, x1, y1 = xyxy
    x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=BLACK, width=width + 2)
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=width)
    out = np.array(canvas)
    return text(out, (x0, y0 - width - 1), label, colour, anchor="ld") if label else out


def mask(
    image: np.ndarray, mask: np.ndarray, colour: Colour = PALETTE[1], alpha: float = 0.45, outline: bool = True
) -> np.ndarray:
    """Tint where mask (H, W) bool is true; outline: its inner edge in full colour."""
    if mask.shape != _checked(image).shape[:2] or mask.dtype != bool:
        raise ValueError(f"overlay.mask: mask {mask.shape} {mask.dtype}, expected {image.shape[:2]} bool")
    weight = mask * np.float32(alpha)
    if outline:
        inner = mask
        for _ in range(max(1, round(unit(image)))):
            wide = np.pad(inner, 1)
            inner = inner & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
        weight[mask & ~inner] = 1.0
    return _blend(image, colour, weight)


def trail(
    image: np.ndarray,
    points: Sequence[tuple[float, float] | None],
    colour: Colour = PALETTE[0],
    radius: float | None = None,
) -> np.ndarray:
    """Path of a ball: points oldest first, None where it was not seen (the line breaks there). Older parts fade; the
    newest point, when seen, gets a ring. radius: px of that ring."""
    radius = radius or 4 * unit(_checked(image))
    H, W = image.shape[:2]
    seen = [p for p in points if p is not None]
    if not seen:
        return image.copy()
    low, high = np.min(seen, 0) - 2 * radius, np.max(seen, 0) + 2 * radius  # only this part is drawn
    x0, y0 = np.clip(np.floor(low), 0, (W - 1, H - 1)).astype(int)
    x1, y1 = np.clip(np.ceil(high), (x0, y0), (W - 1, H - 1)).astype(int) + 1
    alpha = Image.new("L", ((x1 - x0) * FINE, (y1 - y0) * FINE))
    draw = ImageDraw.Draw(alpha)
    at = [None if p is None else ((p[0] + 0.5 - x0) * FINE, (p[1] + 0.5 - y0) * FINE) for p in points]
    for k, (a, b) in enumerate(zip(at, at[1:], strict=False), start=1):
        age = k / max(len(at) - 1, 1)  # 1: newest
        if a is not None and b is not None:
            draw.line((*a, *b), fill=round(255 * (0.1 + 0.8 * age)), width=round(FINE * radius * (0.2 + 0.35 * age)))
    if at[-1] is not None:
        draw.circle(at[-1], radius * FINE, outline=255, width=round(FINE * radius * 0.35))
    alpha = alpha.reduce(FINE)  # (h, w)
    weight, shade = (np.asarray(a, np.float32) / 255 for a in (alpha, alpha.filter(ImageFilter.MaxFilter(3))))
    out = image.copy()
    out[y0:y1, x0:x1] = _blend(_blend(image[y0:y1, x0:x1], BLACK, 0.6 * shade), colour, weight)
    return out


def flash(image: np.ndarray, colour: Colour = PALETTE[2], strength: float = 1.0) -> np.ndarray:
    """Glowing border that marks an event; strength 1 at the event, less on the frames around it, 0: nothing."""
    H, W = _checked(image).shape[:2]
    d = min(max(3, round(0.06 * min(H, W))), (min(H, W) + 1) // 2)
    y, x = np.arange(H)[:, None], np.arange(W)[None]
    edge = np.minimum(np.minimum(y, H - 1 - y), np.minimum(x, W - 1 - x))  # (H, W) px to the nearest border
    out = image.copy()
    for part in (np.s_[:d], np.s_[H - d :], np.s_[d : H - d, :d], np.s_[d : H - d, W - d :]):
        out[part] = _blend(image[part], colour, strength * np.clip(1 - edge[part] / d, 0, 1) ** 1.5)
    return out


def caption_bar(image: np.ndarray, string: str, size: int | None = None) -> np.ndarray:
    """Add a dark bar with the text, wrapped to the picture's width, below the picture. -> (H + bar, W, 3)"""
    size = size or max(9, round(13 * unit(_checked(image))))
    W, pad = image.shape[1], max(2, size // 2)
    letters = max(1, int((W - 2 * pad) / (_font(size).getlength("abcdefghij nostr") / 16)))
    lines = textwrap.wrap(string, letters) or [""]
    bar = Image.new("RGB", (W, round(1.3 * size) * len(lines) + pad), DARK)
    draw = ImageDraw.Draw(bar)
    for k, line in enumerate(lines):
        draw.text((pad, pad // 2 + k * round(1.3 * size)), line, WHITE, _font(size))
    return np.concatenate([image, np.array(bar)])


def score_strip(
    image: np.ndarray,
    curve: Sequence[float] | np.ndarray,
    position: int,
    events: Sequence[int | tuple[int, str]] = (),
    height: int | None = None,
    window: int | None = None,
    colour: Colour = PALETTE[1],
) -> np.ndarray:
    """Add a strip with scores over time below the picture. -> (H + height, W, 3)

    curve: (T,) scores in [0, 1] (values outside are clipped, NaN leaves a gap). position: current frame, in the middle
    when `window` frames are shown, wandering when window is None (whole video). events: frames, or (frame, label);
    those of the current frame are bright, labels are written where they fit.
    """
    W = _checked(image).shape[1]
    height = height or max(24, round(46 * unit(image)))
    values = np.clip(np.asarray(curve, np.float32), 0, 1)  # (T,)
    first, last = (0, max(len(values) - 1, 1)) if window is None else (position - window / 2, position + window / 2)
    size = max(8, round(10 * unit(image)))
    top, bottom = size * 1.5 * FINE, (height - 3) * FINE
    strip = Image.new("RGB", (W * FINE, height * FINE), DARK)
    draw = ImageDraw.Draw(strip)

    def x(frame: float) -> float:
        return (frame - first) / (last - first) * (W - 1) * FINE

    for level in (0.0, 0.5, 1.0):
        draw.line((0, bottom - level * (bottom - top), W * FINE, bottom - level * (bottom - top)), (52, 58, 66), FINE)
    shown = range(max(0, int(first) - 1), min(len(values), int(last) + 2))
    points = [(x(k), bottom - float(values[k]) * (bottom - top)) for k in shown]
    fill = tuple(round(0.35 * c + 0.65 * d) for c, d in zip(colour, DARK, strict=True))
    for a, b in zip(points, points[1:], strict=False):
        if np.isfinite([a[1], b[1]]).all():
            draw.polygon([(a[0], bottom), a, b, (b[0], bottom)], fill)
            draw.line((a, b), colour, round(1.5 * FINE))
    marks = [(e, "") if isinstance(e, int | np.integer) else e for e in events]
    for frame, _ in marks:
        now = frame == position
        draw.line((x(frame), top / 2, x(frame), bottom), WHITE if now else PALETTE[0], (2 if now else 1) * FINE)
    here = x(position)
    draw.line((here, 0, here, height * FINE), PALETTE[2], FINE)
    draw.polygon([(here - 4 * FINE, 0), (here + 4 * FINE, 0), (here, 5 * FINE)], PALETTE[2])
    out, free = np.array(strip.reduce(FINE)), 0.0
    for frame, label in sorted(marks):
        left = x(frame) / FINE + 3
        if label and first <= frame <= last and left >= free:
            out = text(out, (left, 1), label, WHITE if frame == position else PALETTE[0], size)
            free = left + _font(size).getlength(label) + 6
    return np.concatenate([image, out])


def grid(images: Sequence[np.ndarray], columns: int, captions: Sequence[str] | None = None, pad: int = 4) -> np.ndarray:
    """Contact sheet: pictures in rows, each centred in a cell of the largest size, captions below them."""
    if not len(images) or columns < 1 or (captions is not None and len(captions) != len(images)):
        raise ValueError(f"overlay.grid: {len(images)} images, {columns} columns, captions {captions}")
    cells = [
        _checked(i) if captions is None else caption_bar(i, c) for i, c in zip(images, captions or images, strict=True)
    ]
    h, w = max(c.shape[0] for c in cells), max(c.shape[1] for c in cells)
    columns, rows = min(columns, len(cells)), -(-len(cells) // columns)
    sheet = np.empty((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), np.uint8)
    sheet[:] = DARK
    for k, cell in enumerate(cells):
        y, x = pad + k // columns * (h + pad), pad + k % columns * (w + pad) + (w - cell.shape[1]) // 2
        sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return sheet


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Write atomically: a temporary file beside `path`, then renamed. OSError when that cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            Image.fromarray(_checked(image)).save(temporary, format="png")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
