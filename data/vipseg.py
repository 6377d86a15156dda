"""VIPSeg: a PNG of class and instance for every frame of a video, 124 classes of which 58 are things.

    images/<video>/00000001.jpg (or imgs/)     panomasks/<video>/00000001.png, one channel     train.txt, val.txt
    panoVIPSeg_categories.json                 [{id: 0..123, name, isthing}]

A pixel is 0 (void), category id + 1, or for an instance (category id + 1) * 100 + its number; the value itself is the
number of the segment throughout the video. The released masks hold a few instances of stuff (200), which is an error of
theirs; such pixels are void here. The lists and the categories lie in the folder or in the one above, as the official
resizing to 720 px leaves them.
"""

from pathlib import Path

import numpy as np

from data.coco_captions import open_image
from data.video_clips import Clips, Segments, VideoSource, frame_files
from utils.run import UserError
from utils.segmentation_files import need, read_json, read_png

INSTANCES = 100  # values per class
STUFF = 125  # values below it are classes, others instances
LAYOUT = "images/<video>/*.jpg (or imgs/), panomasks/<video>/*.png and panoVIPSeg_categories.json"


class Vipseg(VideoSource):
    """A source of videos (data/video_clips.py). split: a list such as val.txt; None: every video that has masks.

    UserError for a folder of another layout, an unknown split, a video that is missing or empty, a frame without mask;
    when it is read, for frames and masks of another size, and a class that the categories do not name.
    """

    name, tasks = "vipseg", ("vps", "vis", "vos")

    def __init__(self, root: Path | str, split: str | None = None, clips: Clips | None = None, seed: int = 0):
        self.root, self.split, self.clips, self.seed = Path(root), split, clips or Clips(), seed
        images = next((self.root / k for k in ("images", "imgs") if (self.root / k).is_dir()), None)
        masks = self.root / "panomasks"
        if images is None or not masks.is_dir():
            raise UserError(f"{root}: is not VIPSeg's folder; expected {LAYOUT}")
        path = self.beside("panoVIPSeg_categories.json")
        fields = {"id": int, "name": str, "isthing": int}
        categories = sorted(
            need(str(path), read_json("categories", path), fields, '[{"id", "name", "isthing"}]'), key=lambda c: c["id"]
        )
        self.classes, self.category_ids = [c["name"] for c in categories], [c["id"] for c in categories]
        self.is_thing = [bool(c["isthing"]) for c in categories]
        there = sorted(p.name for p in masks.iterdir() if p.is_dir())
        self.names = there if split is None else self.listed(split, set(there))
        self.frames = [self.files_of(images / name) for name in self.names]
        self.masks = [self.masks_of(masks / n, files) for n, files in zip(self.names, self.frames, strict=True)]
        if not self.names:
            raise UserError(f"{masks}: holds no video; expected {LAYOUT}")
        self.dense, self.sizes = list(range(len(self.names))), {}

    def beside(self, name: str) -> Path:
        """A file of the folder, or of the one above."""
        found = [p for p in (self.root / name, self.root.parent / name) if p.is_file()]
        if not found:
            raise UserError(f"{self.root / name}: no such file, nor in the folder above; copy it there from VIPSeg")
        return found[0]

    def listed(self, split: str, there: set[str]) -> list[str]:
        """Videos of a split."""
        path = self.beside(f"{split}.txt")
        names = path.read_text(encoding="utf-8").split()
        missing = [name for name in names if name not in there]
        if missing or not names:
            n = f"{len(missing)} of {len(names)} videos have no masks, as {missing[0]}" if missing else "is empty"
            raise UserError(f"{path}: {n}; unpack the archive again")
        return names

    def files_of(self, folder: Path) -> list[Path]:
        files = frame_files(folder) if folder.is_dir() else []
        if not files:
            raise UserError(f"{folder}: holds no frames; an empty video cannot be used")
        return files

    def masks_of(self, folder: Path, files: list[Path]) -> list[Path]:
        """One for each frame."""
        there = {p.stem: p for p in folder.glob("*.png")}
        missing = [p.stem for p in files if p.stem not in there]
        if missing:
            raise UserError(f"{folder / missing[0]}.png: no such mask, and {len(missing)} of {len(files)} are missing")
        return [there[p.stem] for p in files]

    def summary(self) -> str:
        """One line: videos, frames, classes."""
        part, things = "" if self.split is None else f" {self.split},", sum(self.is_thing)
        return (
            f"{self.root}:{part} {len(self.names)} videos, {sum(map(len, self.frames))} frames, {things} + "
            f"{len(self.classes) - things} classes (things + stuff); dropped: nothing"
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
        return list(range(len(self.masks[number])))

    def values(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """A mask as stored, (H, W) int64."""
        ids = read_png(path)
        if ids.ndim != 2 or ids.dtype.kind not in "ui":
            raise UserError(f"{path}: has shape {ids.shape}, {ids.dtype}; expected one channel of whole numbers")
        if ids.shape != tuple(size):
            own, other = (" x ".join(map(str, s)) for s in (ids.shape, size))
            raise UserError(
                f"{path}: is a mask of {own} px (H x W), its frames are {other}; take the mask of this video"
            )
        return ids.astype(np.int64)

    def read(self, number: int, frames: list[int]) -> Segments:
        size, index = self.size(number), {c: k for k, c in enumerate(self.category_ids)}
        ids = np.stack([self.values(self.masks[number][t], size) for t in frames])  # (T, H, W)
        numbers = np.setdiff1d(ids, [0])
        categories = np.where(numbers < STUFF, numbers, numbers // INSTANCES) - 1
        unknown = [(v, c) for v, c in zip(numbers.tolist(), categories.tolist(), strict=True) if c not in index]
        if unknown:
            v, c = unknown[0]
            folder = self.masks[number][0].parent
            raise UserError(f"{folder}: value {v} is of category {c}, which panoVIPSeg_categories.json does not name")
        labels = np.array([index[c] for c in categories.tolist()], np.int64)
        wrong = (numbers >= STUFF) & ~np.array(self.is_thing, bool)[labels]
        ids[np.isin(ids, numbers[wrong])] = 0
        numbers, labels = numbers[~wrong], labels[~wrong]
        return Segments(ids, numbers, labels, np.zeros(len(numbers), bool), ids == 0)
