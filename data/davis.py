"""DAVIS 2016 and 2017, and other folders of frames with a palette PNG of object numbers for some or all of them.

    JPEGImages/480p/<sequence>/00000.jpg     Annotations/480p/<sequence>/00000.png     ImageSets/2017/val.txt
    <sequence>/images/00000.jpg              <sequence>/masks/00000.png                one folder or a folder of them

A pixel is 0, the number of its object, or 255 (nothing is known there). In 2016 everything marked is one object, and
grey PNGs (0 and 255) mean it as well. The folder 480p may be absent, as in YouTube-VOS. ImageSets hold names of
sequences, or in DAVIS 2016's own archive (ImageSets/480p) a frame and its mask on each line.

Objects have no class. Clips are drawn from sequences with a mask for every frame; others have masks of the frames where
objects enter, and are there as whole videos. A mask that is up to 1 px larger or smaller than its frames (854 px of
width are a rounded number) is stretched to them; any other size is an error.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from data.coco_captions import open_image
from data.segment_batch import Window, show_map
from data.video_clips import Clips, Segments, VideoSource, frame_files
from utils.run import UserError

VOID = 255
NEAR = 1  # px by which a side of a mask may differ from its frames
LAYOUT = "JPEGImages/480p/<sequence>/ with Annotations/480p/<sequence>/, or <sequence>/images/ with <sequence>/masks/"


def read_mask(path: Path, size: tuple[int, int], one_object: bool = False) -> np.ndarray:
    """A palette or grey PNG -> object of every pixel, (H, W) uint8, VOID kept. one_object: as in DAVIS 2016.

    UserError for colours, 16 bits, and a size that is not (H, W) within NEAR.
    """
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.asarray(image)
    except (OSError, SyntaxError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({e}); replace or remove it") from e
    if mode not in ("P", "L", "1"):
        raise UserError(f"{path}: has mode {mode}; expected a palette PNG, one object number a pixel")
    if max(abs(a - b) for a, b in zip(ids.shape, size, strict=True)) > NEAR:
        own, other = (" x ".join(map(str, s)) for s in (ids.shape, size))
        raise UserError(f"{path}: is a mask of {own} px (H x W), its frames are {other}; take the mask of this video")
    if ids.shape != tuple(size):
        ids = show_map(ids, Window(0, 0, ids.shape[1], ids.shape[0], *size))
    ids = ids.astype(np.uint8)
    if not one_object:
        return ids
    return np.where(ids == VOID, VOID, ids > 0).astype(np.uint8) if mode == "P" else (ids > 0).astype(np.uint8)


def find_sequences(root: Path, resolution: str) -> dict[str, tuple[Path, Path]]:
    """{sequence: its folders of frames and of masks}, by name. UserError when there is none."""
    if (root / "JPEGImages").is_dir():
        images, masks = (root / kind for kind in ("JPEGImages", "Annotations"))
        if (images / resolution).is_dir():
            images, masks = images / resolution, masks / resolution
        found = {p.name: (p, masks / p.name) for p in sorted(images.iterdir()) if p.is_dir()}
    else:
        folders = [root, *sorted(p for p in root.iterdir() if p.is_dir())] if root.is_dir() else []
        found = {p.resolve().name: (p / "images", p / "masks") for p in folders if (p / "images").is_dir()}
    if not found:
        raise UserError(f"{root}: holds no sequence; expected {LAYOUT}")
    return found


def read_splits(root: Path, year: int) -> dict[str, list[str]]:
    """{split: its sequences} of the lists of a year; empty when there are none."""
    folders = [root / "ImageSets" / str(year), root / "ImageSets"]
    folders[1:1] = [root / "ImageSets" / "480p"] if year == 2016 else []
    lists = next((found for folder in folders if (found := sorted(folder.glob("*.txt")))), [])
    splits = {}
    for path in lists:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: cannot be read as text; fetch it again") from e
        first = [line.split()[0] for line in lines if line.strip()]
        names = [name.split("/")[-2] if name.count("/") else name for name in first]
        splits[path.stem] = list(dict.fromkeys(names))
    return splits


class Davis(VideoSource):
    """A source of videos (data/video_clips.py). split: a list of ImageSets; None: every sequence that is there.

    UserError for a folder of another layout, an unknown split, a sequence that is missing or has no frames, a mask that
    belongs to no frame; when it is read, for a mask of another size, frames of changing size, no object on the first
    frame.
    """

    name, tasks = "davis", ("vos",)
    classes, category_ids, is_thing = [], [], []
    first_has_objects = True

    def __init__(self, root: Path | str, split: str | None = None, year: int = 2017, clips: Clips | None = None,
                 seed: int = 0, resolution: str = "480p"):  # fmt: skip
        if year not in (2016, 2017):
            raise ValueError(f"Davis: year {year}, expected 2016 or 2017")
        self.root, self.split, self.year, self.seed = Path(root), split, year, seed
        self.clips = clips or Clips()
        found = find_sequences(self.root, resolution)
        self.names = list(found) if split is None else self.listed(split, found)
        self.frames = [self.files_of(name, found[name][0]) for name in self.names]
        self.masks = [self.masks_of(found[n][1], files) for n, files in zip(self.names, self.frames, strict=True)]
        self.sizes: dict[int, tuple[int, int]] = {}
        pairs = zip(self.masks, self.frames, strict=True)
        self.dense = [k for k, (masks, files) in enumerate(pairs) if len(masks) == len(files)]

    def listed(self, split: str, found: dict) -> list[str]:
        """Sequences of a split."""
        splits = read_splits(self.root, self.year)
        if split not in splits:
            there = ", ".join(splits) or "none"
            raise UserError(f"{self.root}: has no split '{split}' of {self.year} in ImageSets, found {there}")
        missing = [name for name in splits[split] if name not in found]
        if missing or not splits[split]:
            n = f"{len(missing)} of {len(splits[split])} sequences are missing, as {missing[0]}" if missing else "empty"
            raise UserError(f"{self.root}: the list of split '{split}': {n}; unpack the archive again")
        return splits[split]

    def files_of(self, name: str, folder: Path) -> list[Path]:
        files = frame_files(folder)
        if not files:
            raise UserError(f"{folder}: sequence '{name}' holds no frames; an empty video cannot be used")
        return files

    def masks_of(self, folder: Path, files: list[Path]) -> dict[int, Path]:
        """{frame: its mask}."""
        number = {p.stem: t for t, p in enumerate(files)}
        paths = sorted(folder.glob("*.png")) if folder.is_dir() else []
        for path in paths:
            if path.stem not in number:
                raise UserError(f"{path}: is the mask of no frame of {files[0].parent}; expected one named alike")
        return dict(sorted((number[p.stem], p) for p in paths))

    def summary(self) -> str:
        """One line: videos, frames, masks."""
        n, sparse = len(self.names), len(self.names) - len(self.dense)
        part = "" if self.split is None else f" {self.split} of {self.year},"
        return (
            f"{self.root}:{part} {n} videos, {sum(map(len, self.frames))} frames, {sum(map(len, self.masks))} masks; "
            f"dropped from clips: {sparse} videos with masks of some frames only"
        )

    def files(self, number: int) -> list[Path]:
        return self.frames[number]

    def size(self, number: int) -> tuple[int, int]:
        """Of the first frame."""
        if number not in self.sizes:
            image = open_image(self.frames[number][0])
            self.sizes[number] = (image.height, image.width)
        return self.sizes[number]

    def annotated(self, number: int) -> list[int]:
        return list(self.masks[number])

    def read(self, number: int, frames: list[int]) -> Segments:
        size, paths = self.size(number), self.masks[number]
        ids = np.stack([read_mask(paths[t], size, self.year == 2016) for t in frames])  # (T, H, W)
        objects = np.setdiff1d(ids, (0, VOID)).astype(np.int64)
        none = np.zeros(len(objects), bool)
        return Segments(ids, objects, np.full(len(objects), -1, np.int64), none, ids == VOID)
