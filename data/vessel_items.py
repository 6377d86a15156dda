"""Pictures with vessel masks as records, whatever the layout of their set: reading, refusals, splits by patient.

Shapes: H x W picture, n objects of a record (1 in the vessel sets). Masks are true where the object is.
A mask file is a picture of one grey channel that holds 0 and 1, or 0 and 255: PNG, GIF, TIFF, PPM, also gzipped.
"""

import gzip
import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.field_of_view import estimate_fov
from utils.masks import rle_decode
from utils.run import UserError
from utils.segmentation_files import checked_rle

SPLITS = ("train", "val", "test")
VESSELS = "the blood vessels"


# ---- files


def open_picture(path: Path | str) -> Image.Image:
    """A picture as stored, turned as its camera says (EXIF), loaded; .gz is unpacked. UserError for none, or damage."""
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file, expected a picture; check the path or the copy of the set") from e
    except (UnidentifiedImageError, OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        said = str(e).replace("\n", " ").split(" <_io")[0]
        raise UserError(f"{path}: cannot be read as a picture ({said}), expected an image file; replace it") from e


def read_image(path: Path | str) -> np.ndarray:
    """(H, W, 3) uint8 RGB; 16 bits are scaled to 8. UserError as `open_picture`."""
    image = open_picture(path)
    if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would clip them at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return np.array(image.convert("RGB"))


def read_mask(path: Path | str, size: tuple[int, int], image_path: Path | str, empty: bool = False) -> np.ndarray:
    """(H, W) bool of a mask file. UserError for colours, values other than 0 and 1 or 0 and 255, another size than
    `size` (H, W) of the picture at image_path, or no pixel unless `empty` says that this is meant."""
    picture = open_picture(path)
    grey = np.asarray(picture)
    if picture.mode not in ("1", "L", "I", "I;16", "I;16B"):
        rgb = np.asarray(picture.convert("RGB"))
        grey = rgb[..., 0]
        if (rgb != grey[..., None]).any():
            if picture.mode != "P":
                raise UserError(f"{path}: has colours, expected one grey channel of 0 and 255; convert it to grey")
            grey = np.asarray(picture)  # a coloured palette: its indices are the labels
    if grey.shape != tuple(size):
        raise UserError(
            f"{path}: is {grey.shape[1]} x {grey.shape[0]} px (W x H), expected {size[1]} x {size[0]} as "
            f"{image_path}; take the mask of this picture, at its size"
        )
    values = np.flatnonzero(np.bincount(grey.ravel())).tolist() if grey.dtype == np.uint8 else np.unique(grey).tolist()
    if not (set(values) <= {0, 1} or set(values) <= {0, 255}):
        shown = ", ".join(map(str, values[:6])) + (f", ... ({len(values)} values)" if len(values) > 6 else "")
        raise UserError(f"{path}: holds the values {shown}, expected 0 and 1, or 0 and 255; write it as two values")
    return declared(grey > 0, path, empty)


def declared(mask: np.ndarray, where: Path | str, empty: bool) -> np.ndarray:
    """The mask, unless it has no pixel and nobody declared that."""
    if not empty and not mask.any():
        raise UserError(f'{where}: the mask is empty, expected some pixels; correct it, or declare "empty": true in a '
                        "manifest")  # fmt: skip
    return mask


def coded_mask(code: dict | list, size: tuple[int, int], where: str, empty: bool = False) -> np.ndarray:
    """(H, W) bool of a COCO RLE code, or of polygons [[x1, y1, x2, y2, ...], ...] in px, united. UserError for another
    size, damaged runs, a polygon of less than 3 points or one beyond the picture by more than 1 px."""
    H, W = size
    for points in code if isinstance(code, list) else ():
        if len(points) < 6 or len(points) % 2:
            raise UserError(
                f"{where}: a polygon of {len(points)} numbers, expected x, y of 3 points or more; correct it"
            )
        xy = np.asarray(points, float).reshape(-1, 2)
        low, high = xy.min(0), xy.max(0)
        if not ((low >= -1).all() and (high <= (W + 1, H + 1)).all()):  # also NaN
            raise UserError(
                f"{where}: a polygon spans x {low[0]:g}..{high[0]:g}, y {low[1]:g}..{high[1]:g}, expected 0..{W} and "
                f"0..{H} px of the picture; scale the coordinates to the picture"
            )
    try:
        mask = rle_decode(checked_rle(code, H, W))
    except ValueError as e:
        raise UserError(f"{where}: {e}; take the mask of this picture") from e
    return declared(mask, where, empty)


# ---- records


@dataclass(frozen=True)
class VesselItem:
    """One picture and what is known about it. Truth is mask_path, or else one entry of `annotation` per object: a mask
    file, a COCO RLE code, or a list of polygons. `text` names the objects, in the same order."""

    name: str  # of its prediction file; unique within a split
    image_path: Path
    mask_path: Path | None = None
    annotation: tuple[Path | dict | list, ...] = ()
    fov_path: Path | None = None
    second_path: Path | None = None  # the same picture outlined by another person
    patient: str = ""  # both eyes of a child have one
    split: str = "train"
    text: tuple[str, ...] = (VESSELS,)
    whole: bool = False  # without fov_path: the field of view is the whole picture, not estimated
    empty: tuple[bool, ...] = (False,)  # one per object, or one for all: the mask may have no pixel
    where: str = ""  # file and line that says all this

    @property
    def person(self) -> str:
        """The patient; a picture whose patient nobody names is taken for a patient of its own."""
        return self.patient or self.name

    @property
    def fov_source(self) -> str:
        return "file" if self.fov_path else "whole picture" if self.whole else "estimated from the picture"

    def image(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return read_image(self.image_path)

    def fov(self, image: np.ndarray) -> np.ndarray:
        """(H, W) bool: from its file, else the whole picture or an estimate, as `fov_source` says."""
        if self.fov_path:
            mask = read_mask(self.fov_path, image.shape[:2], self.image_path, empty=True)
            if not mask.any():
                raise UserError(f"{self.fov_path}: the field of view is empty, expected some pixels; replace the file")
            return mask
        return np.ones(image.shape[:2], bool) if self.whole else estimate_fov(image)

    def masks(self, size: tuple[int, int]) -> np.ndarray:
        """(n, H, W) bool, one per text. UserError for the first that is refused."""
        sources = (self.mask_path,) if self.mask_path else self.annotation
        if not sources:
            raise UserError(f"{self.where or self.image_path}: names no mask, expected one; add it or leave it out")
        empty = self.empty if len(self.empty) == len(sources) else self.empty[:1] * len(sources)
        return np.stack([self._mask(*of, size) for of in zip(sources, empty, strict=True)])

    def _mask(self, source: Path | dict | list, empty: bool, size: tuple[int, int]) -> np.ndarray:
        if isinstance(source, Path):
            return read_mask(source, size, self.image_path, empty)
        return coded_mask(source, size, f"{self.where or self.image_path} ({self.name})", empty)

    def second(self, size: tuple[int, int]) -> np.ndarray | None:
        """(H, W) bool of the second observer, or None."""
        return read_mask(self.second_path, size, self.image_path) if self.second_path else None

    def load(self) -> dict[str, np.ndarray]:
        """image (H, W, 3) uint8, masks (n, H, W) bool, mask (H, W) bool: all objects together, fov (H, W) bool."""
        image = self.image()
        masks = self.masks(image.shape[:2])
        return {"image": image, "masks": masks, "mask": masks.any(0), "fov": self.fov(image)}


@dataclass
class VesselSet:
    """The records of a set; `notes` say what was left out, assumed or is missing."""

    items: list[VesselItem]
    name: str
    root: Path
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def splits(self) -> list[str]:
        return [s for s in SPLITS if any(x.split == s for x in self.items)]

    def split(self, name: str) -> list[VesselItem]:
        """Records of a split, ordered as in the set. UserError when there are none."""
        if name not in self.splits:
            there = ", ".join(self.splits)
            raise UserError(
                f"{self.root}: {self.name} has no split '{name}', expected one of {there}; name one of them"
            )
        return [x for x in self.items if x.split == name]

    def check(self) -> "VesselSet":
        """Itself, when no name is twice in a split, and no patient and no picture file is in two splits."""
        if not self.items:
            raise UserError(f"{self.root}: holds no picture of {self.name}, expected at least one; check the folder")
        names, patients, sizes = {}, {}, defaultdict(list)
        for x in self.items:
            other = names.setdefault((x.split, x.name), x)
            if other is not x:
                raise UserError(
                    f"{x.image_path}: is called '{x.name}' like {other.image_path} of the split {x.split}, expected a "
                    "name of its own; rename one"
                )
            other = patients.setdefault(x.person, x)
            if other.split != x.split:
                raise UserError(
                    f"{x.image_path}: patient '{x.person}' is in split {x.split}, and in {other.split} with "
                    f"{other.image_path}, expected one split per patient; move one"
                )
            try:
                sizes[x.image_path.stat().st_size].append(x)
            except OSError as e:
                named = f", which {x.where} names" if x.where else ""
                raise UserError(f"{x.image_path}: no such file{named}, expected a picture; check the path") from e
        for same in sizes.values():  # equal files have equal sizes: hardly any needs to be read
            if len({x.split for x in same}) > 1:
                refuse_duplicates(same, [hashlib.sha256(x.image_path.read_bytes()).hexdigest() for x in same])
        return self


def refuse_duplicates(items: list[VesselItem], digests: list[str]) -> None:
    """UserError for the first two records of different splits with equal digests, of files or of pixels."""
    seen: dict[str, VesselItem] = {}
    for x, digest in zip(items, digests, strict=True):
        other = seen.setdefault(digest, x)
        if other.split != x.split:
            raise UserError(
                f"{x.image_path}: is the picture {other.image_path} again, in split {x.split} and in {other.split}, "
                "expected a picture in one split only; remove one"
            )
