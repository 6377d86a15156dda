"""One picture as a short video: it turns, grows, slants and shifts a little from frame to frame, and its masks with it.

RAP-SAM shows COCO twice with other crops; here the two views are drawn affine maps, with frames between them on the way
from one to the other. What a view shows beyond the border of the picture is void.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.segment_batch import PAD_COLOUR, Scene

CLIPS_OF = {"vis": "instance", "vps": "panoptic", "vos": "interactive"}  # task of clips: what the pictures must have


@dataclass(frozen=True)
class Jitter:
    """How far a view may be from the picture: turned by up to `degrees`, its sides times 1 / (1 + scale) to 1 + scale,
    slanted by up to `shear` px per px, shifted by up to `shift` of its sides."""

    degrees: float = 10.0
    scale: float = 0.15
    shear: float = 0.08
    shift: float = 0.08

    def __post_init__(self):
        if min(self.degrees, self.scale, self.shear, self.shift) < 0 or self.degrees > 180 or self.shear >= 1:
            raise ValueError(f"{self}: expected numbers >= 0, degrees <= 180, shear < 1")


def affine(jitter: Jitter, drawn: np.ndarray, H: int, W: int) -> np.ndarray:
    """Map (2, 3) from places x y of a view to those of the picture, px, about its middle. drawn: (5,) in -1..1, of
    angle, scale, shear, shift across and down; zeros leave the picture as it is."""
    angle = np.deg2rad(jitter.degrees * drawn[0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.array([[1, jitter.shear * drawn[2]], [0, 1]]) * (1 + jitter.scale) ** drawn[1]
    middle = np.array([W, H]) / 2
    return np.c_[linear, middle - linear @ middle + jitter.shift * drawn[3:] * (W, H)]


def source_pixels(map: np.ndarray, H: int, W: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column (H, W) of the picture under the centre of each pixel of a view, and whether it lies inside."""
    y, x = np.mgrid[:H, :W] + 0.5
    column, row = (np.floor(a * x + b * y + c).astype(np.int64) for a, b, c in map)
    inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
    return row.clip(0, H - 1), column.clip(0, W - 1), inside


class PseudoVideo:
    """A source for SegmentItems (data/segment_batch.py): clips of `frames` frames of the pictures of another source, a
    function of (seed, epoch, index). ValueError for a source whose pictures have none of the tasks."""

    name = "pseudo_video"

    def __init__(self, source, frames: int = 2, jitter: Jitter | None = None, seed: int = 0):
        self.tasks = tuple(clip for clip, task in CLIPS_OF.items() if task in source.tasks)
        if not self.tasks or frames < 1:
            raise ValueError(
                f"PseudoVideo: {source.name} with tasks {source.tasks}, {frames} frames; expected pictures"
            )
        self.source, self.frames, self.jitter, self.seed = source, frames, jitter or Jitter(), seed
        self.classes, self.category_ids, self.is_thing = source.classes, source.category_ids, source.is_thing

    def __len__(self) -> int:
        return len(self.source)

    def summary(self) -> str:
        """One line: items, and those of the pictures."""
        return f"pseudo_video: clips of {self.frames} frames of {self.source.summary()}"

    def scene(self, epoch: int, index: int) -> Scene:
        picture = self.source.scene(epoch, index)
        H, W = picture.image.shape[:2]
        first, last = np.random.default_rng([self.seed, epoch, index, 3]).uniform(-1, 1, (2, 5))
        image = np.empty((self.frames, H, W, 3), np.uint8)
        masks = np.zeros((*picture.masks.shape[:-2], self.frames, H, W), picture.masks.dtype)
        void = np.empty((self.frames, H, W), bool)
        for t, share in enumerate(np.linspace(0, 1, self.frames)):
            map = affine(self.jitter, (1 - share) * first + share * last, H, W)
            view = Image.fromarray(picture.image).transform(
                (W, H), Image.Transform.AFFINE, map.ravel(), Image.Resampling.BILINEAR, fillcolor=PAD_COLOUR
            )
            row, column, inside = source_pixels(map, H, W)
            image[t], masks[..., t, :, :] = view, picture.masks[..., row, column] * inside
            void[t] = ~inside if picture.void is None else ~inside | picture.void[row, column]
        return Scene(picture.image_id, image, masks, picture.ids, picture.labels, picture.crowd, void)
