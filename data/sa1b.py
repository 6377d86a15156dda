"""SA-1B: a json of class-agnostic masks beside every picture.

    sa_000000/sa_1.jpg, sa_1.json   {image: {image_id, width, height, file_name}, annotations: [{id, segmentation: RLE,
                                    area, predicted_iou, stability_score, ...}]}

Masks overlap: an object and its parts are masks of their own. There are no classes, so labels are -1.
"""

from pathlib import Path

import numpy as np

from data.coco_instances import find_images, open_checked
from data.segment_batch import Scene
from utils.masks import rle_decode
from utils.run import UserError
from utils.segmentation_files import checked_rle, need, read_json

ANNOTATIONS = '{"image": {...}, "annotations": [{"id", "segmentation": {"size", "counts"}}]}'


class Sa1b:
    """A source for SegmentItems (data/segment_batch.py). root: folder of sa_*.json (and of folders with them); images:
    folder of the pictures, None: beside each json, else where find_images looks.

    A json is read when its item is asked for: there are 11 million. UserError for a folder without any, a picture that
    is missing, a file that is not of this format.
    """

    name, tasks = "sa1b", ("interactive", "instance")
    classes, category_ids, is_thing = [], [], []

    def __init__(self, root: Path | str, images: Path | str | None = None):
        self.root = Path(root)
        self.paths = sorted(self.root.rglob("sa_*.json"), key=lambda p: (p.parent, len(p.name), p.name))
        if not self.paths:
            raise UserError(f"{root}: holds no sa_*.json; expected the folder that an archive of SA-1B unpacks to")
        self.folder = None
        if images is not None or not self.paths[0].with_suffix(".jpg").is_file():
            self.folder = find_images(self.paths[0], images, [self.about(0)["file_name"]])

    def __len__(self) -> int:
        return len(self.paths)

    def summary(self) -> str:
        """One line: items."""
        return f"{self.root}: {len(self)} images, masks without classes; dropped: nothing"

    def read(self, index: int) -> dict:
        """The json of a picture, its fields checked."""
        path = self.paths[index]
        content = read_json("annotations", path)
        content = content if isinstance(content, dict) else {}
        need(str(path), content.get("annotations"), {"id": int, "segmentation": dict}, ANNOTATIONS)
        fields = {"image_id": int, "file_name": str, "height": int, "width": int}
        need(str(path), [content.get("image")], fields, f'"image" with {", ".join(fields)}')
        return content

    def about(self, index: int) -> dict:
        return self.read(index)["image"]

    def scene(self, epoch: int, index: int) -> Scene:
        """The same in every epoch."""
        content, path = self.read(index), self.paths[index]
        about, annotations = content["image"], content["annotations"]
        size = about["height"], about["width"]
        try:
            codes = [checked_rle(a["segmentation"], *size) for a in annotations]
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path}: a mask cannot be read ({e}); unpack the archive again") from e
        masks = rle_decode(codes) if codes else np.zeros((0, *size), bool)
        image = open_checked((self.folder or path.parent) / about["file_name"], *size)
        ids = np.array([a["id"] for a in annotations], np.int64)
        none = np.zeros(len(ids), bool)
        return Scene(about["image_id"], image, masks, ids, np.full(len(ids), -1, np.int64), none)
