"""COCO panoptic: a PNG of segment numbers for every picture, and what each number is.

    annotations/panoptic_train2017.json   {images, categories: [{id, name, isthing}], annotations: [{image_id,
                                           file_name, segments_info: [{id, category_id, area, iscrowd}]}]}
    annotations/panoptic_train2017/       RGB PNGs, number = R + 256 G + 65536 B, 0 void
    train2017/                            the pictures

Classes are the categories in the order of their ids (133: things 1..90, stuff 92..200, with gaps).
"""

from pathlib import Path

import numpy as np

from data.coco_instances import find_images, open_checked, read_categories, read_images
from data.segment_batch import Scene
from utils.run import UserError
from utils.segmentation_files import read_ids, read_json, read_panoptic

FIELDS = ("id", "category_id", "area", "iscrowd")


class CocoPanoptic:
    """A source for SegmentItems (data/segment_batch.py). annotations: the json; its PNGs lie in the folder of the same
    name (or `pngs`), its pictures in `images` or where find_images looks.

    UserError for a file that is not of this format, a picture or PNG that is missing, an unknown category.
    """

    name, tasks = "coco_panoptic", ("panoptic", "instance", "semantic", "interactive")

    def __init__(self, annotations: Path | str, images: Path | str | None = None, pngs: Path | str | None = None):
        self.path = Path(annotations)
        self.pngs = Path(pngs) if pngs is not None else self.path.with_suffix("")
        where, content = str(annotations), read_json("annotations", annotations)
        self.images = read_images(where, content)
        categories = read_categories(where, content, {"isthing": int})
        self.classes, self.category_ids = [c["name"] for c in categories], [c["id"] for c in categories]
        self.is_thing = [bool(c["isthing"]) for c in categories]
        found = read_panoptic(where, content, self.pngs, FIELDS, False)
        named = {str(i): i for i in self.images}
        if found.keys() - named.keys():
            raise UserError(f"{where}: annotates image {min(found.keys() - named.keys())}, which it does not name")
        self.image_ids = sorted(named[i] for i in found)
        frames = {named[i]: frames[0] for i, frames in found.items()}
        self.files = {i: name for i, (name, _, _) in frames.items()}
        self.tables = {i: self.table(where, i, segments) for i, (_, _, segments) in frames.items()}
        self.folder = find_images(self.path, images, [self.images[i]["file_name"] for i in self.image_ids])
        there = {p.name for p in self.pngs.iterdir()} if self.pngs.is_dir() else set()
        absent = [name for name in self.files.values() if name not in there]
        if absent:
            raise UserError(
                f"{self.pngs / absent[0]}: no such PNG, and {len(absent)} of {len(self)} are missing; unpack the PNGs "
                f"of {self.path.name} there"
            )

    def table(self, where: str, image_id: int, segments: dict[int, dict]) -> np.ndarray:
        """(N, 4) int64: number, class, iscrowd and area (px) of the segments of an image."""
        index = {c: k for k, c in enumerate(self.category_ids)}
        unknown = [s["category_id"] for s in segments.values() if s["category_id"] not in index]
        if unknown:
            raise UserError(f"{where}: image {image_id} has category {unknown[0]}, which the file does not name")
        rows = [(i, index[s["category_id"]], s["iscrowd"], s["area"]) for i, s in segments.items()]
        return np.array(rows, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self.image_ids)

    def summary(self) -> str:
        """One line: items, classes, dropped and why."""
        n, things = sum(map(len, self.tables.values())), sum(self.is_thing)
        return (
            f"{self.path}: {len(self)} images, {n} segments, {things} + {len(self.classes) - things} classes (things + "
            f"stuff); dropped: {len(self.images) - len(self)} images without annotation"
        )

    def numbers(self, image_id: int) -> np.ndarray:
        """Segment of every pixel, (H, W) int64, 0 void. UserError for a PNG of another size than its picture."""
        ids, about = read_ids(self.pngs / self.files[image_id]), self.images[image_id]
        if ids.shape != (about["height"], about["width"]):
            sizes = f"{ids.shape[0]} x {ids.shape[1]} px (H x W), its picture {about['height']} x {about['width']}"
            raise UserError(f"{self.pngs / self.files[image_id]}: is {sizes}; take the PNG of this picture")
        return ids

    def picture(self, image_id: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        about = self.images[image_id]
        return open_checked(self.folder / about["file_name"], about["height"], about["width"])

    def scene(self, epoch: int, index: int) -> Scene:
        """The same in every epoch."""
        image_id = self.image_ids[index]
        number, label, crowd, _ = self.tables[image_id].T
        ids = self.numbers(image_id)
        return Scene(image_id, self.picture(image_id), ids, number, label, crowd.astype(bool), void=ids == 0)
