"""data/check_dataset.py on segmented data: counts, every problem as one sentence, the sheet of a batch."""

import functools
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco_panoptic import CocoPanoptic
from data.segment_batch import SegmentCollate, SegmentItems, View
from data.segment_checks import FORMATS, IGNORED, draw_item, spread
from utils import run
from utils.masks import rle_encode

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "fastsam2"
H, W = 40, 60
CATEGORIES = [{"id": 3, "name": "car", "isthing": 1}, {"id": 187, "name": "sky", "isthing": 0}]
IDS = {300: (3, 0), 7: (187, 0), 8: (3, 1)}  # number: category, crowd; 15 columns each after 15 of void


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("check_dataset", ROOT / "data" / "check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(*argv: object) -> int:
    return run.cli(script().main, [*map(str, argv)])


def refused(capsys, *argv: object) -> str:
    assert check(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def ids_of(columns=15) -> np.ndarray:
    ids = np.zeros((H, W), int)
    for k, i in enumerate(IDS, 1):
        ids[:, columns * k : columns * k + columns] = i
    return ids


def save_ids(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """All formats in one folder: COCO with panoptic, instances and refs, SA-1B, Cityscapes; three grey pictures."""
    notes = tmp_path / "annotations"
    for folder in ("val2017", "annotations/panoptic_val2017", "sa", "leftImg8bit/val/ulm", "gtFine/val/ulm"):
        (tmp_path / folder).mkdir(parents=True)
    images, panoptic, objects, refs = [], [], [], []
    car = ids_of() == 300
    for i in (1, 2, 3):
        picture, about = Image.new("RGB", (W, H), (70, 70, 70)), {"width": W, "height": H}
        picture.save(tmp_path / "val2017" / f"{i}.png")
        picture.save(tmp_path / "sa" / f"sa_{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.png", **about})
        save_ids(notes / "panoptic_val2017" / f"{i}.png", ids_of())
        segments = [{"id": n, "category_id": c, "iscrowd": crowd, "area": 15 * H} for n, (c, crowd) in IDS.items()]
        panoptic.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
        objects.append({"id": 10 * i, "image_id": i, "category_id": 3, "iscrowd": 0, "segmentation": rle_encode(car)})
        said = [{"sent_id": i, "sent": f"grey car {i}"}]
        split = "testA" if i == 3 else "train"
        refs.append({"ref_id": i, "ann_id": 10 * i, "image_id": i, "split": split, "sentences": said})
        about |= {"image_id": i, "file_name": f"sa_{i}.jpg"}
        masks = [{"id": 1, "segmentation": rle_encode(car)}, {"id": 2, "segmentation": rle_encode(ids_of() > 7)}]
        (tmp_path / "sa" / f"sa_{i}.json").write_text(json.dumps({"image": about, "annotations": masks}))
    common = {"images": images, "categories": CATEGORIES}
    (notes / "panoptic_val2017.json").write_text(json.dumps({**common, "annotations": panoptic}))
    (notes / "instances_val2017.json").write_text(json.dumps({**common, "annotations": objects}))
    (tmp_path / "refs_unc.json").write_text(json.dumps(refs))
    (tmp_path / "instances.json").write_text(json.dumps({**common, "annotations": objects}))
    picture.save(tmp_path / "leftImg8bit/val/ulm/ulm_0_leftImg8bit.png")
    numbers = np.where(car, 26001, 23).astype(np.uint16)
    Image.fromarray(numbers).save(tmp_path / "gtFine/val/ulm/ulm_0_gtFine_instanceIds.png")
    return tmp_path


COUNTS = {
    "panoptic": [
        "3 images, 9 segments, 1 + 1 classes (things + stuff); dropped: 0 images without annotation",
        "3 of 3 images decoded, 60..60 x 40..40 px (W x H)",
        "segments per image 3/3/3 (min/median/max), 3 crowds, 25.0 % void",
        "classes: 2 of 2 seen; commonest: car 6, sky 3",
        "panoptic, shown whole at 64 px: 2/2/2 targets (min/median/max), 0 images without",
        "instance, shown whole at 64 px: 1/1/1 targets",
        "interactive, shown whole at 64 px: 2/2/2 targets",
    ],
    "instances": ["3 images (0 without an object), 3 objects, 2 classes", "classes: 1 of 2 seen; commonest: car 3"],
    "cityscapes": ["val, 1 images of 1 cities", "2 of 19 seen", "panoptic, shown whole at 64 px: 2/2/2 targets"],
    "sa1b": ["3 images, masks without classes", "interactive, shown whole at 64 px: 2/2/2 targets"],
    "refcoco": ["train, 2 images, 2 objects, 2 sentences", "testA, 1 images", "referring, shown whole at 64 px: 1/1/1"],
    "moving_shapes": ["5 rendered pictures of 64 px", "5 of 5 images decoded", "8 classes", "clips of 6 frames"],
}


@pytest.mark.parametrize("kind", FORMATS)
def test_counts_and_sheet(root, tmp_path, capsys, kind):
    place = {"sa1b": [root / "sa"], "refcoco": [root, "--images", root / "val2017"], "moving_shapes": []}
    argv = [kind, *place.get(kind, [root]), "--image-size", 64, "--batch-size", 2, "--clips", 5, "--clip-len", 6]
    assert check(*argv, "--show", tmp_path / "new" / "sheet.png") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    for line in (*COUNTS[kind], "picture of the first training batch", "no problem found"):
        assert line in out, f"{line!r} is not in\n{out}"
    tasks = {"panoptic": 4, "cityscapes": 4, "instances": 2, "sa1b": 2, "refcoco": 2, "moving_shapes": 6}[kind]
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:  # cells of 4 x 64 px; moving_shapes: 6 frames in a row
        assert sheet.width == tasks * (256 + 4) + 4 and np.asarray(sheet).std() > 5
    assert check(*argv) == 0


def test_split_and_limit(root, capsys):
    assert check("refcoco", root, "--images", root / "val2017", "--split", "testA") == 0
    assert "train," not in capsys.readouterr().out
    assert check("panoptic", root, "--split", "val", "--limit", 2) == 0
    assert "2 of 3 images decoded" in capsys.readouterr().out
    assert check("instances", root / "annotations" / "instances_val2017.json", "--limit", 0) == 0
    assert "3 of 3 images decoded" in capsys.readouterr().out
    assert spread(10, 3) == [0, 4, 9] and spread(3, 0) == [0, 1, 2] and spread(2, 32) == [0, 1]


def test_problems_are_one_sentence(root, capsys):
    png = root / "annotations" / "panoptic_val2017" / "2.png"
    assert "FORMAT panoptic needs ROOT" in refused(capsys, "panoptic")
    assert "it takes neither ROOT" in refused(capsys, "moving_shapes", root)
    assert "at least 32 px" in refused(capsys, "moving_shapes", "--image-size", 20)
    assert "expected panoptic_*.json of split train" in refused(capsys, "panoptic", root, "--split", "train")
    assert "expected one refs*.json" in refused(capsys, "refcoco", root / "sa")
    assert "has no split 'val'" in refused(capsys, "refcoco", root, "--images", root / "val2017", "--split", "val")
    assert "is a pickle" in refused(capsys, "refcoco", root / "refs(unc).p")
    assert "no picture of split 'train'" in refused(capsys, "cityscapes", root, "--split", "train")
    assert "holds no sa_*.json" in refused(capsys, "sa1b", root / "val2017")
    assert "no folder of its pictures" in refused(capsys, "panoptic", root, "--images", root / "none")
    for ids, problem in (
        (ids_of(14), "2.png: segment 300 has 560 px, its json says 600"),
        (np.where(ids_of() == 8, 0, ids_of()), "2.png: lacks id 8, which the json lists"),
        (np.where(ids_of() == 8, 9, ids_of()), "2.png: holds id 9, which the json does not list"),
        (ids_of()[:, :50], "2.png: is 40 x 50 px (H x W), its picture 40 x 60"),
    ):
        save_ids(png, ids)
        assert problem in refused(capsys, "panoptic", root)
    Image.new("L", (W, H)).save(png)
    assert "expected an RGB PNG" in refused(capsys, "panoptic", root)
    Image.new("RGB", (H, W)).save(root / "val2017" / "3.png")
    assert "is 60 x 40 px (H x W), its annotations say 40 x 60" in refused(capsys, "instances", root)
    (root / "val2017" / "3.png").unlink()
    assert "1 of 3 of instances_val2017.json are missing" in refused(capsys, "instances", root)
    change(root / "annotations" / "instances_val2017.json", lambda c: c.update(annotations=[]))
    assert "holds no object" in refused(capsys, "instances", root)


def test_the_sheet_shows_what_a_batch_holds(root):
    """Targets are tinted where their masks are, crowds and void grey, padding is left alone."""
    source = CocoPanoptic(root / "annotations" / "panoptic_val2017.json")
    batch = SegmentCollate((64, 64))([SegmentItems(source, "panoptic", View(64, 64))[0]])
    times = 4
    picture = draw_item(batch, 0, source.classes)
    assert picture.shape == (64 * times, 64 * times, 3)
    plain = batch["image"][0].permute(1, 2, 0).numpy()
    changed = (picture[::times, ::times] != plain).any(2)
    targets, ignore = batch["masks"][0].any(0).numpy(), batch["ignore"][0].numpy()
    inner = np.zeros((64, 64), bool)
    inner[25:42] = True  # rows without text
    assert not changed[~batch["valid"][0].numpy()].any() and (changed | ~(targets | ignore) | ~inner).all()
    grey = picture[::times, ::times][ignore & inner].astype(int)
    assert np.abs(grey - (0.3 * 70 + 0.7 * np.array(IGNORED))).max() <= 1


REFERENCES = [
    ("panoptic", "coco_mini", ()),
    ("instances", "coco_mini", ()),
    ("refcoco", "coco_mini", ()),
    ("panoptic", "ref_panoptic_pq/gt.json", ()),
    ("sa1b", "coco_mini/sa1b_style", ("coco_mini/images",)),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="LAB_SHARED is not there")
@pytest.mark.parametrize("kind, place, images", REFERENCES)
def test_reference_sets_have_no_problem(capsys, kind, place, images):
    more = ("--images", SHARED / images[0]) if images else ()
    assert check(kind, SHARED / place, *more, "--limit", 6, "--image-size", 64) == 0, capsys.readouterr().err
    assert "no problem found" in capsys.readouterr().out
