"""data/coco_panoptic.py on a small set made here and on the reference sets: segments, crowds, void, bad files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.coco_panoptic import CocoPanoptic
from data.segment_batch import SegmentItems, View
from utils.run import UserError

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fastsam2"
H, W = 30, 40
CATEGORIES = [{"id": 200, "name": "rug", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1}]
IDS = {9: (1, 0), 256: (200, 0), 65536 + 5: (1, 1)}  # number: category, iscrowd


def write_set(root: Path, n=2) -> Path:
    """COCO 2017's folders; every picture has 10 columns each of void, a person, a rug, a crowd."""
    (root / "val2017").mkdir(parents=True)
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    ids = np.zeros((H, W), int)
    for k, i in enumerate(IDS, 1):
        ids[:, 10 * k : 10 * k + 10] = i
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    segments = [{"id": i, "category_id": c, "iscrowd": crowd, "area": 10 * H} for i, (c, crowd) in IDS.items()]
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for i in range(1, n + 1):
        Image.fromarray(np.full((H, W, 3), 20 * i, np.uint8)).save(root / "val2017" / f"{i:012d}.png")
        Image.fromarray(rgb).save(root / "annotations" / "panoptic_val2017" / f"{i:012d}.png")
        content["images"].append({"id": i, "file_name": f"{i:012d}.png", "height": H, "width": W})
        content["annotations"].append({"image_id": i, "file_name": f"{i:012d}.png", "segments_info": segments})
    path = root / "annotations" / "panoptic_val2017.json"
    path.write_text(json.dumps(content))
    return path


def change(path: Path, edit) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_segments(tmp_path):
    source = CocoPanoptic(write_set(tmp_path))
    assert source.classes == ["person", "rug"] and source.category_ids == [1, 200] and source.is_thing == [True, False]
    assert "2 images, 6 segments, 1 + 1 classes" in source.summary() and source.folder == tmp_path / "val2017"
    x = SegmentItems(source, "panoptic", View(H, W))[0, 1]
    assert x["image_id"] == 2 and x["image"].unique().tolist() == [40]
    assert x["ids"].tolist() == [9, 256] and x["labels"].tolist() == [0, 1]
    assert [m.any(0).nonzero()[0].item() for m in x["masks"]] == [10, 20]
    assert x["ignore"].all(0).tolist() == [True] * 10 + [False] * 20 + [True] * 10  # void and crowd
    x = SegmentItems(source, "semantic", View(H, W))[0]
    assert x["masks"].flatten(1).sum(1).tolist() == [20 * H, 10 * H] and x["ignore"].sum() == 10 * H


def test_annotations_without_segments_stay(tmp_path):
    path = write_set(tmp_path)
    Image.new("RGB", (W, H)).save(path.with_suffix("") / f"{1:012d}.png")
    source = CocoPanoptic(change(path, lambda c: c["annotations"][0].update(segments_info=[])))
    for task in source.tasks:
        x = SegmentItems(source, task, View(H, W))[0]
        assert x["masks"].shape == (0, H, W) and x["ignore"].all() and x["labels"].shape == (0,)
    change(path, lambda c: c["annotations"].pop(0))
    assert "1 images without annotation" in CocoPanoptic(path).summary()


def test_problems_are_one_sentence(tmp_path):
    path = write_set(tmp_path)
    good = path.read_text()

    def refused(edit) -> str:
        path.write_text(good)
        with pytest.raises(UserError) as e:
            source = CocoPanoptic(change(path, edit))
            source.scene(0, 0)
        assert "\n" not in str(e.value)
        return str(e.value)

    def category(c):
        c["annotations"][1]["segments_info"][0]["category_id"] = 77

    assert "holds no annotation" in refused(lambda c: c.update(annotations=[]))
    assert "names no image" in refused(lambda c: c.update(images=[]))
    assert "no categories" in refused(lambda c: c.update(categories=[]))
    assert "'isthing'" in refused(lambda c: c["categories"][0].pop("isthing"))
    assert "image 2 has category 77, which the file does not name" in refused(category)
    assert "annotates image 3" in refused(lambda c: c["annotations"][1].update(image_id=3))
    assert "1 of 2 are missing" in refused(lambda c: c["annotations"][1].update(file_name="no.png"))
    assert "its picture 30 x 41" in refused(lambda c: c["images"][0].update(width=W + 1))
    path.write_text(good)
    with pytest.raises(UserError, match="no folder of its pictures"):
        CocoPanoptic(path, tmp_path / "absent")
    (tmp_path / "val2017" / f"{2:012d}.png").unlink()
    with pytest.raises(UserError, match="no such picture, and 1 of 2"):
        CocoPanoptic(path)
    with pytest.raises(UserError, match="cannot be read"):
        CocoPanoptic(tmp_path / "none.json")


REFERENCES = [p for p in sorted(SHARED.glob("*/panoptic*.json")) + sorted(SHARED.glob("*/gt.json"))
              if p.with_suffix("").is_dir() and (p.parent / "images").is_dir()]  # fmt: skip


@pytest.mark.skipif(not REFERENCES, reason="LAB_SHARED holds no panoptic set")
def test_reference_sets(capsys):
    """Real files: every target has the area and the box that the json says, exactly; the rest is void or crowd."""
    right = total = images = 0
    for path in REFERENCES:
        source = CocoPanoptic(path)
        content = json.loads(path.read_text())
        said = {a["image_id"]: {s["id"]: s for s in a["segments_info"]} for a in content["annotations"]}
        assert len(source) == len(said)
        for index in range(len(source)):
            i = source.image_ids[index]
            size = source.images[i]["height"], source.images[i]["width"]
            x = SegmentItems(source, "panoptic", View(*size))[0, index]
            wanted = [s for s in said[i].values() if not s["iscrowd"]]
            assert len(x["ids"]) == len(wanted) and torch.equal(
                x["masks"].sum(0) + x["ignore"].long(), torch.ones(size)
            )
            for number, label, mask in zip(x["ids"].tolist(), x["labels"].tolist(), x["masks"], strict=True):
                s = said[i][number]
                y, c = np.nonzero(mask.numpy())
                box = [c.min(), y.min(), np.ptp(c) + 1, np.ptp(y) + 1]
                total += 1
                same = mask.sum() == s["area"] and source.category_ids[label] == s["category_id"]
                right += bool(same and np.abs(np.array(box) - s["bbox"]).max() == 0)
            images += 1
    with capsys.disabled():
        print(f"\npanoptic segments with the area, box and category of their json: {right} of {total}, {images} images")
    assert right == total
