"""data/coco_instances.py on a small set and the reference set: polygons, run lengths, crowds, bad files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco_instances import CocoInstances
from data.segment_batch import Prompts, SegmentItems, View
from utils.masks import rle_encode
from utils.run import UserError

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fastsam2"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
H, W = 30, 40


def write_set(root: Path) -> Path:
    """Image 4 has a polygon of two parts, a compressed mask, a crowd and an empty polygon; image 5 has nothing."""
    (root / "images").mkdir(parents=True)
    mask = np.zeros((H, W), bool)
    mask[3:9, 5:20] = True
    crowd = {"size": [H, W], "counts": [H * 30, H * 5, H * 5]}  # columns 30..34
    shapes = [[[0, 20, 10, 20, 10, 30, 0, 30], [20, 20, 24, 20, 24, 24, 20, 24]], rle_encode(mask), crowd, []]
    content = {"images": [], "annotations": [], "categories": [{"id": 90, "name": "cup"}, {"id": 2, "name": "dog"}]}
    for i in (5, 4):
        Image.new("RGB", (W, H), (50 * i, 0, 0)).save(root / "images" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": H, "width": W})
    for k, shape in enumerate(shapes):
        a = {
            "id": 70 + k,
            "image_id": 4,
            "category_id": (90, 2, 2, 2)[k],
            "segmentation": shape,
            "iscrowd": int(k == 2),
        }
        content["annotations"].append(a)
    (root / "instances.json").write_text(json.dumps(content))
    return root / "instances.json"


def test_objects(tmp_path):
    source = CocoInstances(write_set(tmp_path))
    assert source.classes == ["dog", "cup"] and source.category_ids == [2, 90] and source.is_thing == [True, True]
    assert "2 images (1 without an object), 3 objects, 2 classes; dropped: 1 objects without a mask" in source.summary()
    x = SegmentItems(source, "instance", View(H, W))[0]
    assert x["image_id"] == 4 and x["image"][0, 0, 0] == 200
    assert x["ids"].tolist() == [70, 71] and x["labels"].tolist() == [1, 0]
    assert x["masks"].flatten(1).sum(1).tolist() == [100 + 16, 6 * 15]
    assert x["masks"][0, 21, 21] and x["masks"][1, 3:9, 5:20].all()
    assert x["ignore"].sum() == 5 * H and x["ignore"][:, 30:35].all()
    x = SegmentItems(source, "instance", View(H, W))[1]
    assert x["image_id"] == 5 and x["masks"].shape == (0, H, W) and not x["ignore"].any()
    x = SegmentItems(source, "interactive", View(H, W), Prompts(number=8))[0]
    assert x["masks"].shape == (8, H, W) and set(x["ids"].tolist()) == {70, 71} and (x["labels"] == -1).all()


def test_problems_are_one_sentence(tmp_path):
    path = write_set(tmp_path)
    good = path.read_text()

    def refused(edit) -> str:
        content = json.loads(good)
        edit(content)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as e:
            CocoInstances(path).scene(0, 0)
        assert "\n" not in str(e.value)
        return str(e.value)

    def segmentation(value):
        return lambda c: c["annotations"][1].update(segmentation=value)

    assert "annotation 70 is of category 3" in refused(lambda c: c["annotations"][0].update(category_id=3))
    assert "annotation 71 is of image 9" in refused(lambda c: c["annotations"][1].update(image_id=9))
    assert "holds no object" in refused(lambda c: c.update(annotations=[]))
    assert "expected COCO instances" in refused(lambda c: c.pop("annotations"))
    assert "id of a category twice" in refused(lambda c: c["categories"][0].update(id=2))
    assert "expected 30 x 40" in refused(segmentation({"size": [W, H], "counts": [W * H]}))
    assert "image 4: a mask cannot be read" in refused(segmentation({"size": [H, W], "counts": "zzz"}))
    assert "image 4: a mask cannot be read" in refused(segmentation({"counts": [1]}))
    assert "30 x 40 px (H x W), its annotations say 31 x 40" in refused(
        lambda c: (c["images"][1].update(height=H + 1), c.update(annotations=[c["annotations"][0]]))
    )
    assert "no such picture" in refused(lambda c: c["images"][0].update(file_name="6.png"))
    assert "names no image" in refused(lambda c: c.update(images=[]))
    path.write_text("[")
    with pytest.raises(UserError, match="is not json"):
        CocoInstances(path)


REFERENCES = sorted(p for p in SHARED.glob("*/instances*.json") if (p.parent / "images").is_dir())


@pytest.mark.skipif(not REFERENCES, reason="LAB_SHARED holds no instances")
def test_reference_sets(capsys):
    """Real files: every object is a target with its category; its mask ends within 2 px of the sides of its box,
    because boxes and polygons are real numbers and pixels are not."""
    right = total = images = 0
    for path in REFERENCES:
        source = CocoInstances(path)
        said = {a["id"]: a for a in json.loads(path.read_text())["annotations"]}
        seen = 0
        for index, i in enumerate(source.image_ids):
            size = source.images[i]["height"], source.images[i]["width"]
            x = SegmentItems(source, "instance", View(*size))[0, index]
            seen += len(x["ids"]) + sum(a["image_id"] == i and a["iscrowd"] for a in said.values())
            for number, label, mask in zip(x["ids"].tolist(), x["labels"].tolist(), x["masks"].numpy(), strict=True):
                a = said[number]
                x0, y0, w, h = a["bbox"]
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                own = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                near = np.abs(own - [x0, y0, x0 + w, y0 + h]).max() <= 2
                right += bool(near and source.category_ids[label] == a["category_id"])
                total += 1
            images += 1
        assert seen == len(said) - source.dropped
    with capsys.disabled():
        print(f"\nobjects that fill their box, with their category: {right} of {total}, {images} images")
    assert right == total
