"""Draw tracks onto the frames of their video: mask, trail of the last frames, state and scores; a sheet of some."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils import overlay
from utils.track_files import Point

TAIL = 24  # frames of a trail
COLUMNS, ROWS = 4, 2  # of the sheet
WIDE = 320  # px: a cell of the sheet is about as wide, or wider up to twice


class TrackPainter:
    """Frames in order. names: of the targets, each with a colour of its own. frames: how many there will be."""

    def __init__(self, names: list[str], frames: int, tail: int = TAIL):
        self.wanted = set(np.linspace(0, frames - 1, COLUMNS * ROWS).round().astype(int).tolist())
        self.cells, self.painted = [], 0
        self.colours = {name: overlay.colour(k) for k, name in enumerate(names)}
        self.trails: dict[str, deque] = {name: deque(maxlen=tail) for name in names}

    def paint(self, image: np.ndarray, points: Mapping[str, Point], states: Mapping[str, str],
              masks: Mapping[str, list[np.ndarray]]) -> np.ndarray:  # fmt: skip
        """uint8 (H, W, 3) -> a new picture of that size. Per target: its Point, a word for its state, and the masks
        bool (H, W) of its objects, none where they are not known."""
        out, size = image, max(9, round(13 * overlay.unit(image)))
        for row, (name, colour) in enumerate(self.colours.items()):
            point = points[name]
            for mask in masks.get(name, ()):
                out = overlay.mask(out, mask, colour)
            for other in point.objects or ():
                if other.box is not None:
                    out = overlay.box(out, other.box, colour)
            self.trails[name].append(None if point.x is None else (point.x, point.y))
            out = overlay.trail(out, list(self.trails[name]), colour)
            score = "" if point.score is None else f" {point.score:.2f}"
            words = [f"{name} {states[name]}"]
            words = [f"{words[0]}{score} {point.source or ''}", f"{words[0]}{score}", words[0], name]
            fits = [w for w in words if 0.6 * size * len(w) <= image.shape[1]]
            out = overlay.text(out, (3, 2 + row * round(1.3 * size)), fits[0] if fits else name, colour, size)
        if self.painted in self.wanted:
            large, small = max(1, round(WIDE / out.shape[1])), max(1, out.shape[1] // WIDE)
            self.cells.append((out.repeat(large, 0).repeat(large, 1)[::small, ::small], f"frame {self.painted}"))
        self.painted += 1
        return out

    def save_sheet(self, path: Path) -> None:
        """Some of the painted frames, evenly spread, as one PNG; nothing where none was painted."""
        if self.cells:
            images, captions = zip(*self.cells, strict=True)
            overlay.save_png(path, overlay.grid(images, COLUMNS, captions))
