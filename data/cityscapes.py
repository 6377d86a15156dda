"""Cityscapes: streets, 19 classes, a 16-bit PNG of instance numbers for every picture.

    leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
    gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png    (gtCoarse likewise)

A number below 1000 is a label of its own: stuff, or a group of things that are not told apart, which is a crowd.
Otherwise it is label * 1000 + k, one thing. Labels that the benchmark leaves out are void.
Classes are in the order of the benchmark's trainIds (road 0 .. bicycle 18), not of sets that put things first.
"""

from pathlib import Path

import numpy as np

from data.coco_captions import open_image
from data.segment_batch import Scene
from utils.run import UserError
from utils.segmentation_files import read_png

STUFF = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"}
STUFF |= {20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky"}
THINGS = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
LABELS = [*STUFF, *THINGS]
LAST_LABEL = 33
LICENCE_PLATE = 65535  # label -1 in 16 bits
PICTURE, NUMBERS = "_leftImg8bit.png", "_instanceIds.png"


def segments_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map (H, W) of instance numbers -> the numbers that are no void (N,), their classes, whether they are crowds.

    ValueError for a number whose label Cityscapes does not have.
    """
    found = np.unique(numbers).astype(np.int64)
    label = np.where(found < 1000, found, found // 1000)
    unknown = found[((label > LAST_LABEL) | (found < 0)) & (found != LICENCE_PLATE)]
    if len(unknown):
        raise ValueError(
            f"instance number {unknown[0]} is of label {label[found == unknown[0]][0]}, of 0..{LAST_LABEL}"
        )
    kept = np.isin(label, LABELS)
    found, label = found[kept], label[kept]
    return found, np.array([LABELS.index(i) for i in label], np.int64), (found < 1000) & np.isin(label, list(THINGS))


class Cityscapes:
    """A source for SegmentItems (data/segment_batch.py). root holds leftImg8bit/ and gtFine/; fine False: gtCoarse/.

    UserError for a root without that split, or a picture without its instance numbers.
    """

    name, tasks = "cityscapes", ("panoptic", "instance", "semantic", "interactive")
    classes, category_ids = [*STUFF.values(), *THINGS.values()], LABELS
    is_thing = [i in THINGS for i in LABELS]

    def __init__(self, root: Path | str, split: str = "train", fine: bool = True):
        self.root, self.split = Path(root), split
        kind = "gtFine" if fine else "gtCoarse"
        self.pictures = sorted((self.root / "leftImg8bit" / split).glob(f"*/*{PICTURE}"))
        if not self.pictures:
            expected = f"leftImg8bit/{split}/<city>/*{PICTURE} and {kind}/{split}/<city>/*_{kind}{NUMBERS}"
            raise UserError(f"{root}: holds no picture of split '{split}'; expected {expected}")
        self.numbers = [
            self.root / kind / split / p.parent.name / p.name.replace(PICTURE, f"_{kind}{NUMBERS}")
            for p in self.pictures
        ]
        absent = [p for p in self.numbers if not p.is_file()]
        if absent:
            raise UserError(
                f"{absent[0]}: no such file, and {len(absent)} of {len(self)} are missing; unpack {kind} there"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def summary(self) -> str:
        """One line: items and classes."""
        cities = len({p.parent for p in self.pictures})
        what = f"{len(self)} images of {cities} cities, 8 + 11 classes (things + stuff)"
        return f"{self.root}: {self.split}, {what}; dropped: nothing"

    def scene(self, epoch: int, index: int) -> Scene:
        """The same in every epoch."""
        path, picture = self.numbers[index], self.pictures[index]
        image, numbers = np.asarray(open_image(picture)), read_png(path)
        if numbers.shape != image.shape[:2]:
            raise UserError(
                f"{path}: has shape {numbers.shape}, its picture {image.shape[:2]} (H, W); fetch both again"
            )
        try:
            ids, labels, crowd = segments_of(numbers)
        except ValueError as e:
            raise UserError(f"{path}: {e}; expected the instanceIds of Cityscapes") from e
        return Scene(
            picture.name.removesuffix(PICTURE), image, numbers, ids, labels, crowd, void=~np.isin(numbers, ids)
        )
