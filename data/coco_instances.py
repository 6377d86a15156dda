"""COCO instances: polygons or run lengths of things, crowds among them.

    annotations/instances_train2017.json   {images: [{id, file_name, height, width}], categories: [{id, name}],
                                            annotations: [{image_id, category_id, iscrowd, segmentation}]}
    train2017/                             the pictures

Classes are the categories in the order of their ids, which have gaps. Pixels outside every object are background.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.coco_captions import open_image
from data.segment_batch import Scene
from utils.masks import rle_decode
from utils.run import UserError
from utils.segmentation_files import checked_rle, need, read_json

IMAGES = '{"images": [{"id", "file_name", "height", "width"}]}'
EXPECTED = 'COCO instances, {"images", "annotations": [{"image_id", "category_id", "segmentation"}], "categories"}'


# ---- what the readers of COCO's formats share


def find_images(annotations: Path, given: Path | str | None, names: list[str]) -> Path:
    """Folder of the pictures that an annotation file names: the given one, or the first that holds them.

    Looked at: images/ and <split>/ beside the file and beside its folder, and images/<split>/, with <split> the last
    part of the file's name (train2017 of instances_train2017.json). UserError when there is none, or when pictures are
    missing in it.
    """
    split = annotations.stem.split("_")[-1]
    tried = [base / part for base in (annotations.parent, annotations.parent.parent)
             for part in (split, f"images/{split}", "images")]  # fmt: skip
    folders = [f for f in ([Path(given)] if given is not None else tried) if f.is_dir()]
    if not folders:
        looked = given or ", ".join(map(str, tried[:3]))
        raise UserError(f"{annotations}: no folder of its pictures at {looked}; name it with --images")
    folder = max(folders, key=lambda f: sum((f / n).is_file() for n in names[:20]))
    there = {p.name for p in folder.iterdir()}
    missing = [n for n in names if n not in there]
    if missing:
        raise UserError(
            f"{folder / missing[0]}: no such picture, and {len(missing)} of {len(names)} of {annotations.name} are "
            "missing; name their folder with --images"
        )
    return folder


def read_images(where: str, content) -> dict[int, dict]:
    """{id: {file_name, height, width}} of the images of a COCO file. UserError when there is none."""
    fields = {"id": int, "file_name": str, "height": int, "width": int}
    images = need(where, content.get("images") if isinstance(content, dict) else None, fields, IMAGES)
    if not images:
        raise UserError(f"{where}: names no image; expected {IMAGES}")
    return {x["id"]: {k: x[k] for k in fields} for x in images}


def read_categories(where: str, content: dict, more: dict[str, type]) -> list[dict]:
    """The categories in the order of their ids; `more`: fields beside id and name. UserError when there is none."""
    fields = {"id": int, "name": str, **more}
    found = need(where, content.get("categories"), fields, f"categories with {', '.join(fields)}")
    if not found or len({c["id"] for c in found}) < len(found):
        raise UserError(f"{where}: has {'an id of a category twice' if found else 'no categories'}; fetch it again")
    return sorted(found, key=lambda c: c["id"])


def open_checked(path: Path, height: int, width: int) -> np.ndarray:
    """A picture as uint8 (H, W, 3). UserError when its size is not that of its annotations."""
    image = np.asarray(open_image(path))
    if image.shape[:2] != (height, width):
        raise UserError(
            f"{path}: is {image.shape[0]} x {image.shape[1]} px (H x W), its annotations say {height} x {width}; wrong "
            "or turned file?"
        )
    return image


# ---- instances


class CocoInstances:
    """A source for SegmentItems (data/segment_batch.py). annotations: the json; images: folder of the pictures, None:
    looked for (find_images). Images without an object stay in, objects without a mask are left out and counted.

    UserError for a file that is not of this format, a picture that is missing, a category or image it does not name.
    """

    name, tasks = "coco_instances", ("instance", "interactive")

    def __init__(self, annotations: Path | str, images: Path | str | None = None):
        self.path, self.dropped = Path(annotations), 0
        where, content = str(annotations), read_json("annotations", annotations)
        self.images = read_images(where, content)
        categories = read_categories(where, content, {})
        self.classes, self.category_ids = [c["name"] for c in categories], [c["id"] for c in categories]
        self.is_thing = [True] * len(categories)
        index = {c: k for k, c in enumerate(self.category_ids)}
        found: dict[int, list] = defaultdict(list)
        fields = {"image_id": int, "category_id": int, "segmentation": list | dict}
        for n, a in enumerate(need(where, content.get("annotations"), fields, EXPECTED)):
            if a["category_id"] not in index or a["image_id"] not in self.images:
                what = f"category {a['category_id']}" if a["category_id"] not in index else f"image {a['image_id']}"
                raise UserError(f"{where}: annotation {a.get('id', n)} is of {what}, which the file does not name")
            if a["segmentation"]:
                row = [a.get("id", n), index[a["category_id"]], a.get("iscrowd", 0), a["segmentation"]]
                found[a["image_id"]].append(row)
            else:
                self.dropped += 1
        if not found:
            raise UserError(f"{where}: holds no object; expected {EXPECTED}")
        self.objects = {i: json.dumps(rows).encode() for i, rows in found.items()}  # as text: objects would take GB
        self.image_ids, self.count = sorted(self.images), sum(map(len, found.values()))
        self.folder = find_images(self.path, images, [x["file_name"] for x in self.images.values()])

    def __len__(self) -> int:
        return len(self.image_ids)

    def summary(self) -> str:
        """One line: items, classes, dropped and why."""
        empty = len(self.images) - len(self.objects)
        return (
            f"{self.path}: {len(self)} images ({empty} without an object), {self.count} objects, {len(self.classes)} "
            f"classes; dropped: {self.dropped} objects without a mask"
        )

    def rows(self, image_id: int) -> list[tuple[int, int, int, list | dict]]:
        """Objects of an image: (annotation id, class, iscrowd, segmentation)."""
        return json.loads(self.objects.get(image_id, b"[]"))

    def masks(self, image_id: int, segmentations: list) -> np.ndarray:
        """(N, H, W) bool of segmentations of an image. UserError for damaged ones and other sizes."""
        size = self.images[image_id]["height"], self.images[image_id]["width"]
        try:
            codes = [checked_rle(s, *size) for s in segmentations]
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{self.path}: image {image_id}: a mask cannot be read ({e}); mend or remove it") from e
        return rle_decode(codes) if codes else np.zeros((0, *size), bool)

    def picture(self, image_id: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        about = self.images[image_id]
        return open_checked(self.folder / about["file_name"], about["height"], about["width"])

    def scene(self, epoch: int, index: int) -> Scene:
        """The same in every epoch."""
        image_id = self.image_ids[index]
        rows = self.rows(image_id)
        ids, labels, crowd = (np.array([r[k] for r in rows], np.int64) for k in range(3))
        masks = self.masks(image_id, [r[3] for r in rows])
        return Scene(image_id, self.picture(image_id), masks, ids, labels, crowd.astype(bool))
