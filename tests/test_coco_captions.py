"""data/caption_files.py and data/coco_captions.py on small folders made here: every layout, items, batches, labels."""

import json
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as masks
from torch.utils.data import DataLoader

from data.caption_files import CaptionSet, check_files, load_captions, read_references, read_splits
from data.caption_vocab import BOS, EOS, PAD, CaptionVocab
from data.coco_captions import (
    IGNORE,
    CaptionCollate,
    CaptionItems,
    ImageItems,
    ImageReader,
    PatchLabels,
    open_image,
    patch_labels,
)
from models import clip
from utils.run import StepBatches, UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
TRAIN, VAL = range(1000, 1006), range(2000, 2004)  # image ids; five captions each, ids from 50000 on


def picture(path: Path, seed: int, size=(40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(10, 0).repeat(10, 1)).save(path)


def annotation_ids(image_id: int) -> list[int]:
    return [50_000 + 10 * image_id + k for k in range(5)]


def name_of(part: str, image_id: int) -> str:
    return f"COCO_{part}_{image_id:012d}.jpg" if part.endswith("2014") else f"{image_id:012d}.jpg"


def coco(root: Path, year: int = 2017, folder: str = "", pictures=True, val=VAL) -> Path:
    """A COCO folder; the caption files list the images backwards."""
    for part, ids in ((f"train{year}", TRAIN), (f"val{year}", val)):
        images = [{"id": i, "file_name": name_of(part, i), "width": 40, "height": 30} for i in reversed(ids)]
        captions = [
            {"id": k, "image_id": i, "caption": f"A man {n} on a bike-{i}."}
            for i in ids for n, k in enumerate(annotation_ids(i))
        ]  # fmt: skip
        square = {"segmentation": [[0, 0, 20, 0, 20, 30, 0, 30]], "category_id": 3}
        instances = [{**square, "id": i, "image_id": i} for i in ids if i % 2 == 0]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        head = {"images": images, "categories": [{"id": 7, "name": "train"}, {"id": 3, "name": "car"}]}
        for kind, content in (("captions", captions), ("instances", instances)):
            text = json.dumps({**head, "annotations": content})
            (root / "annotations" / f"{kind}_{part}.json").write_text(text)
        for i in ids if pictures else ():
            picture(root / folder / part / name_of(part, i), i)
    return root


def write_ids(folder: Path, **parts: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for part, ids in parts.items():
        np.save(folder / f"coco_{part}_ids.npy", np.array(ids))
    return folder


def karpathy(path: Path, splits: dict[int, str], year: int = 2014) -> Path:
    images = []
    for i, split in splits.items():
        part = f"train{year}" if i in TRAIN else f"val{year}"
        texts = [{"raw": f"caption {k}", "sentid": k, "tokens": []} for k in annotation_ids(i)]
        images.append({"filename": name_of(part, i), "filepath": part, "cocoid": i, "split": split, "sentences": texts})
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def ids_of(captions: CaptionSet) -> list:
    return [x["image_id"] for x in captions.images]


def all_annotations(*image_ids: int) -> list[int]:
    return [k for i in image_ids for k in annotation_ids(i)]


# ---- readers


@pytest.mark.parametrize("year, folder", [(2014, ""), (2017, ""), (2017, "images")])
def test_coco(tmp_path, year, folder):
    train, val = load_captions(coco(tmp_path, year, folder), "train", "val")
    assert ids_of(train) == list(TRAIN) and ids_of(val) == list(VAL) and train.split == "train"
    assert train.images[0]["captions"][1] == (annotation_ids(1000)[1], "A man 1 on a bike-1000.")
    assert [p.name for p in train.instances] == [f"instances_train{year}.json"]
    assert train.summary() == f"{tmp_path}: train, 6 images, 30 captions; dropped: nothing"
    assert len(train.captions()) == 30 and train.references()[1000][0] == "a man 0 on a bike-1000"
    with pytest.raises(UserError, match="no split 'test'; expected one of train, val"):
        load_captions(tmp_path, "test")


def test_images_and_captions_that_are_dropped_are_counted(tmp_path):
    path = coco(tmp_path) / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][5:]  # none for image 2000
    content["annotations"][3]["caption"] = " \n"
    path.write_text(json.dumps(content))
    (val,) = load_captions(tmp_path, "val")
    assert ids_of(val) == [2001, 2002, 2003] and len(val.images[0]["captions"]) == 4
    assert "3 images, 14 captions; dropped: 1 empty captions, 1 images without a caption" in val.summary()


def test_missing_image_files(tmp_path):
    coco(tmp_path)
    for i in (2001, 2003):
        (tmp_path / "val2017" / name_of("val2017", i)).unlink()
    load_captions(tmp_path, "train")
    with pytest.raises(UserError, match=r"val2017/000000002001\.jpg: no such image file, and 2 of 4 images of val"):
        load_captions(tmp_path, "train", "val")


def test_both_years(tmp_path):
    coco(coco(tmp_path, 2014), 2017, pictures=False)
    assert "train2014" in str(load_captions(tmp_path, "train")[0].images[0]["file"])
    coco(tmp_path, 2017)
    with pytest.raises(UserError, match="2014 and of 2017; keep one year"):
        read_splits(tmp_path)


@pytest.mark.parametrize("year", [2014, 2017])
@pytest.mark.parametrize("packed", [True, False])
def test_m2_ids_and_karpathy_give_the_same_sets(tmp_path, year, packed):
    root, part = coco(tmp_path / "coco", year), {"restval": VAL[:1], "dev": VAL[1:3], "test": VAL[3:]}
    lists = {"train": all_annotations(*TRAIN), **{k: all_annotations(*v)[::-1] for k, v in part.items()}}
    if packed:
        np.savez(tmp_path / "ids.npz", **{k: np.array(v, np.int32) for k, v in lists.items()})
    ids = tmp_path / "ids.npz" if packed else write_ids(tmp_path / "ids", **lists)
    splits = {**dict.fromkeys(TRAIN, "train"), **{i: {"dev": "val"}.get(k, k) for k, v in part.items() for i in v}}
    file = karpathy(tmp_path / "dataset_coco.json", splits)
    for split, images in (("train", [*TRAIN, 2000]), ("val", [2001, 2002]), ("test", [2003])):
        by_ids, by_file = (load_captions(root, split, **kw)[0] for kw in ({"ids": ids}, {"karpathy": file}))
        assert ids_of(by_ids) == ids_of(by_file) == images
        assert [x["file"] for x in by_ids.images] == [x["file"] for x in by_file.images]
        assert {k for x in by_ids.images for k, _ in x["captions"]} == set(all_annotations(*images))
        assert len(by_ids.instances) == len(by_file.instances) == 2


def test_ids_choose_captions_and_absent_ones_are_counted(tmp_path):
    chosen = [*annotation_ids(1000)[:2], annotation_ids(2003)[4], 1, 2, 3]
    ids = write_ids(tmp_path / "ids", train=chosen, dev=all_annotations(2000))
    (train,) = load_captions(coco(tmp_path / "coco"), "train", ids=ids)
    assert [(x["image_id"], [k for k, _ in x["captions"]]) for x in train.images] == [
        (1000, annotation_ids(1000)[:2]), (2003, annotation_ids(2003)[4:])
    ]  # fmt: skip
    assert "dropped: 3 annotation ids that no caption file here holds" in train.summary()


def test_image_ids_by_mistake(tmp_path):
    root = coco(tmp_path / "coco")
    ids = write_ids(tmp_path / "ids", train=all_annotations(*TRAIN), dev=list(VAL))
    with pytest.raises(UserError, match=r"dev_ids\.npy: dev: these are image ids; expected annotation ids"):
        load_captions(root, "val", ids=ids)
    write_ids(ids, dev=[*VAL, annotation_ids(1000)[0]])  # by chance one of them is an annotation id too
    with pytest.raises(UserError, match="these are image ids"):
        load_captions(root, "train", ids=ids)
    write_ids(ids, dev=[1, 2, 3])
    with pytest.raises(UserError, match="holds no split 'val'; expected one of train"):
        load_captions(root, "val", ids=ids)
    write_ids(ids, train=[4, 5])
    with pytest.raises(UserError, match="none of its ids is in annotations/captions_train2017.json"):
        read_splits(root, ids=ids)


def test_ids_that_are_none(tmp_path):
    root, ids = coco(tmp_path / "coco"), tmp_path / "ids"
    ids.mkdir()
    with pytest.raises(UserError, match="holds no ids; expected coco_"):
        read_splits(root, ids=ids)
    for content in (np.array([1.5]), np.array([[1]]), np.array([], int)):
        np.save(ids / "coco_dev_ids.npy", content)
        with pytest.raises(UserError, match="expected a list of whole numbers"):
            read_splits(root, ids=ids)
    for content in (np.array([{}], object), None):
        np.save(ids / "coco_dev_ids.npy", content, allow_pickle=True)
        with pytest.raises(UserError, match="numpy cannot read"):
            read_splits(root, ids=ids)
    np.savez(tmp_path / "ids.npz", dev=np.array([{}], object))
    with pytest.raises(UserError, match="numpy cannot read"):
        read_splits(root, ids=tmp_path / "ids.npz")
    with pytest.raises(UserError, match="give one of the two"):
        read_splits(root, ids=ids, karpathy=ids)


def flickr(root: Path, names: list[str], text: str | None = None, table="captions.txt") -> Path:
    for k, name in enumerate(names):
        picture(root / "Images" / name, k)
    rows = [f'{name},"a dog, {k}"' for name in names for k in range(5)]
    (root / table).write_text("\n".join(["image,caption", *rows]) + "\n" if text is None else text)
    return root


@pytest.mark.parametrize("table", ["captions.txt", "any.csv"])
def test_flickr8k(tmp_path, table):
    names = [f"{k:04d}_ab.jpg" for k in range(40)]
    found = read_splits(flickr(tmp_path, names, table=table))
    for name in names:
        split = {0: "val", 1: "test"}.get(zlib.crc32(name.encode()) % 10, "train")
        assert name.removesuffix(".jpg") in ids_of(found[split])
    assert sum(len(x) for x in found.values()) == 40 and len(found["train"]) > 25
    for captions in found.values():
        check_files(captions)
        assert "(split by the file names)" in captions.summary() and not captions.instances
    assert found["val"].images[0]["captions"][0][1] == "a dog, 0"


def test_csv_with_splits_and_other_names(tmp_path):
    text = "\ufeffFile,Caption,split\na.png,one,train\nb.png,two,val\na.png,three,train\n"
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, 1)
    (tmp_path / "mine.csv").write_text(text, encoding="utf-8")
    train, val = load_captions(tmp_path, "train", "val")
    assert train.images == [
        {"image_id": "a", "file": tmp_path / "a.png", "captions": [(0, "one"), (2, "three")]}
    ] and ids_of(val) == ["b"]


def test_karpathy_of_flickr8k(tmp_path):
    flickr(tmp_path, ["a.jpg", "b.jpg"])
    images = [
        {"filename": f"{n}.jpg", "split": s, "sentences": [{"raw": "a dog", "sentid": 4}]}
        for n, s in (("a", "train"), ("b", "test"))
    ]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    (test,) = load_captions(tmp_path, "test", karpathy=tmp_path / "dataset_flickr8k.json")
    assert test.images == [{"image_id": "b", "file": tmp_path / "Images" / "b.jpg", "captions": [(4, "a dog")]}]


@pytest.mark.parametrize(
    "text, says",
    [
        ("image,text\na.jpg,x\n", "has 1 rows with the columns image, text; expected a row per caption with image"),
        ("", "captions.txt: is empty; expected a row per caption with image"),
        ("image,caption\n", "has 0 rows with the columns image, caption; expected a row per caption"),
        ("image,caption,split\na.jpg,x\n", "row 1 does not have 3 fields"),
        ("image,caption\na.jpg,a dog, a cat\n", "row 1 does not have 2 fields; quote"),
        ("image,caption\na.jpg\n", "row 1 does not have 2 fields"),
        ("image,caption,split\na.jpg,x,dev\n", "is of split 'dev'; expected train, val, test"),
        ("image,caption,split\na.jpg,x,val\na.jpg,y,train\n", "is in val and in train"),
        ("image,caption,split\na.jpg,x,val\na.png,y,val\n", "differ in the suffix only"),
        ("image,caption,split\na.jpg, ,val\n", "no image of val with a caption"),
    ],
)
def test_csv_that_is_wrong(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        read_splits(flickr(tmp_path, ["a.jpg"], text))


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(UserError, match="no such folder; expected annotations/captions_train2014.json"):
        read_splits(tmp_path / "absent")
    with pytest.raises(UserError, match="holds 0 csv files"):
        read_splits(tmp_path)
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    for content, says in (
        ("{", "is not json"),
        ('{"annotations": []}', "is no COCO caption file"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "x"}]}', "annotation 1 names image 2"),
        ('{"images": [], "annotations": []}', "no image of val with a caption"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            read_splits(tmp_path)
    (tmp_path / "k.json").write_text('{"images": [{"filename": "x.jpg", "split": "other", "sentences": []}]}')
    with pytest.raises(UserError, match="is not one of Karpathy's files"):
        read_splits(tmp_path, karpathy=tmp_path / "k.json")


@pytest.mark.parametrize(
    "kind, change, says",
    [
        ("annotations", {"id": "7"}, "has the id '7'; expected whole numbers"),
        ("annotations", {"image_id": [2]}, r"names image \[2\], which is not listed"),
        ("annotations", {"image_id": {}}, "which is not listed"),
        ("annotations", {"id": [7]}, "is no COCO caption file"),
        ("images", {"id": None}, "has the id None; expected whole numbers"),
    ],
)
def test_coco_ids_of_another_kind(tmp_path, kind, change, says):
    path = coco(tmp_path) / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content[kind][1].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says):
        read_splits(tmp_path)


@pytest.mark.parametrize("sentence", [{"raw": 5}, {"raw": None}, {"sentid": "4"}, {"sentid": None}])
def test_karpathy_captions_that_are_none(tmp_path, sentence):
    path = karpathy(tmp_path / "k.json", {1000: "train", 2000: "val"})
    content = json.loads(path.read_text())
    content["images"][0]["sentences"][1].update(sentence)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not one of Karpathy's files .*or a raw caption no text"):
        read_splits(coco(tmp_path / "coco", 2014), karpathy=path)


@pytest.mark.parametrize("cocoid", [None, [1000], "1000"])
def test_karpathy_images_without_a_number(tmp_path, cocoid):
    path = karpathy(tmp_path / "k.json", {1000: "train", 1001: "train"})
    content = json.loads(path.read_text())
    content["images"][0]["cocoid"] = cocoid
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not one of Karpathy's files"):
        read_splits(coco(tmp_path / "coco", 2017), karpathy=path)
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match="lists no images; expected one of Karpathy's files"):
        read_splits(tmp_path, karpathy=path)


def test_references_of_a_split_need_no_image_files(tmp_path):
    path = coco(tmp_path, pictures=False) / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][5:]  # none for image 2003, the files list them backwards
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2003]
    path.write_text(json.dumps(content))
    references, uncaptioned, others = read_references(tmp_path, "val")
    assert references["2001"][1] == "A man 1 on a bike-2001." and set(references) == {"2001", "2002"}
    assert uncaptioned == {"2000", "2003"} and others == {str(i) for i in TRAIN}
    assert read_references(tmp_path, "train")[1:] == (set(), {str(i) for i in VAL})
    with pytest.raises(UserError, match="no split 'test'; expected one of train, val"):
        read_references(tmp_path, "test")


# ---- images


@pytest.mark.parametrize("suffix, kind", [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix, kind):
    gradient = np.arange(65_536).reshape(256, 256)
    Image.fromarray(gradient.astype(kind)).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.mode in ("I;16", "I")
    got = np.array(open_image(tmp_path / f"x.{suffix}"))
    assert np.array_equal(got, np.rint(gradient / 257).astype(np.uint8)[..., None].repeat(3, 2)) and got.max() == 255


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (40, 40), (17, 300)])
def test_the_network_sees_what_clip_wants(tmp_path, resize, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    reader = ImageReader(32, resize)
    got = reader.tensor(reader.square(tmp_path / "x.png"))
    assert torch.equal(got, clip.preprocess(image, 32, resize)) and got.shape == (3, 32, 32)
    x0, y0, x1, y1 = reader.window(*size)
    assert (x1 - x0, y1 - y0) == (size if resize == "squash" else pytest.approx((min(size),) * 2, rel=0.02))


def test_images_are_turned_as_the_camera_noted_and_grey_ones_get_three_channels(tmp_path):
    pixels = np.zeros((20, 30), np.uint8)
    pixels[:, :15] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
    got = np.array(open_image(tmp_path / "x.jpg"))
    assert got.shape == (30, 20, 3) and got[:12].mean() > 250 and got[18:].mean() < 5


def test_files_that_are_no_pictures(tmp_path):
    picture(tmp_path / "x.png", 0, (400, 300))
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as a picture"):
            open_image(tmp_path / name)
    with pytest.raises(UserError, match="no such image file"):
        open_image(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="resize 'pad'"):
        ImageReader(32, "pad")


def test_cache_holds_what_fits_and_changes_nothing(tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png", k)
    plain, reader = ImageReader(16), ImageReader(16, cache_gb=2 * 16 * 16 * 3 / 1e9)
    for _ in range(2):
        for k in range(3):
            path = tmp_path / f"{k}.png"
            assert np.array_equal(reader.square(path), plain.square(path))
    assert len(reader.cache) == 2 and not plain.cache and reader.room == 0
    (tmp_path / "0.png").unlink()
    reader.square(tmp_path / "0.png")


# ---- patch labels


def by_hand(annotations, width, height, grid, class_index, window) -> list[int]:
    """Every pixel cut into grid x grid pieces, every patch counted."""
    cover = np.zeros((len(class_index), *grid))
    x0, y0, x1, y1 = window
    for k in range(len(class_index)):
        union = np.zeros((height, width), bool)
        for a in annotations:
            if class_index[a["category_id"]] == k:
                union |= masks.decode(masks.merge(masks.frPyObjects(a["segmentation"], height, width))).astype(bool)
        part = union[y0:y1, x0:x1].repeat(grid[0], 0).repeat(grid[1], 1)
        cover[k] = part.reshape(grid[0], y1 - y0, grid[1], x1 - x0).mean((1, 3))
    return np.where(cover.max(0) >= 0.25, cover.argmax(0), IGNORE).flatten().tolist()


@pytest.mark.parametrize("width, height, window", [(56, 28, None), (37, 53, None), (53, 37, (8, 0, 45, 37))])
def test_patch_labels_against_counted_pixels(width, height, window):
    rng, index, seen = np.random.default_rng(0), {5: 0, 9: 1, 70: 2}, Counter()
    for _ in range(8):
        annotations = []
        for k in rng.integers(0, 3, 5):
            corners = rng.uniform(0, 1, (4, 2)) * (width, height)
            annotations.append({"category_id": [5, 9, 70][k], "segmentation": [corners.flatten().tolist()]})
        got = patch_labels(annotations, width, height, (4, 5), index, window).tolist()
        assert got == by_hand(annotations, width, height, (4, 5), index, window or (0, 0, width, height))
        seen.update(got)
    assert set(seen) == {IGNORE, 0, 1, 2}


def test_patch_labels_at_the_limit():
    quarter = {"category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 8, 0, 8]]}  # 4 of 16 columns
    assert patch_labels([quarter], 16, 8, (1, 1), {1: 0}).tolist() == [0]  # exactly 25 %
    assert patch_labels([quarter], 17, 8, (1, 1), {1: 0}).tolist() == [IGNORE]
    twice = [{**quarter, "category_id": 2}, {**quarter, "category_id": 2}, quarter]
    assert patch_labels(twice, 16, 8, (1, 1), {1: 0, 2: 1}).tolist() == [0]  # two on top of each other count once
    runs = {"size": [8, 16], "counts": [0, 64, 64]}
    crowd = {"category_id": 2, "segmentation": runs, "iscrowd": 1}
    packed = {"category_id": 2, "segmentation": masks.frPyObjects(runs, 8, 16)}
    for a in (crowd, packed):
        assert patch_labels([a], 16, 8, (1, 2), {2: 1}).tolist() == [1, IGNORE]
    empty = {"category_id": 1, "segmentation": []}
    assert patch_labels([empty], 16, 8, (2, 2), {1: 0}).tolist() == [IGNORE] * 4
    assert patch_labels([], 16, 8, (2, 3), {1: 0}).tolist() == [IGNORE] * 6
    with pytest.raises(ValueError, match="category 1 is not among 1 classes"):
        patch_labels([quarter], 16, 8, (1, 1), {2: 0})


def test_patch_labels_of_a_data_set(tmp_path):
    train, val = load_captions(coco(tmp_path), "train", "val")
    patches = PatchLabels([*train.instances, *val.instances], ImageReader(32), (2, 4))
    assert patches.classes == ["car", "train"] and patches.class_index == {3: 0, 7: 1}
    assert patches(1000).tolist() == [0, 0, IGNORE, IGNORE] * 2 and patches(1000).dtype == torch.int64
    assert torch.equal(patches(1001), torch.full((8,), IGNORE)) and patches.size(2003) == (40, 30)
    crop = PatchLabels(train.instances, ImageReader(32, "crop"), (2, 4))
    assert crop(1000).tolist() == [0, 0, IGNORE, IGNORE] * 2  # columns 5..35, of which 15 are covered
    some = PatchLabels(train.instances, ImageReader(32), (2, 4), image_ids={1000})
    with pytest.raises(ValueError, match="image 1002 is in none"):
        some(1002)
    with pytest.raises(UserError, match="1 of 4 images are in no instance file, as 2003"):
        other = PatchLabels(val.instances, ImageReader(32), image_ids={2000, 2001, 2002})
        ImageItems(val, ImageReader(32), patches=other)
    val.instances[0].write_text(val.instances[0].read_text().replace('"car"', '"cart"'))
    with pytest.raises(UserError, match="has other categories"):
        PatchLabels([*train.instances, *val.instances], ImageReader(32))
    val.instances[0].write_text('{"images": []}')
    with pytest.raises(UserError, match="is no COCO instance file"):
        PatchLabels(val.instances, ImageReader(32))


# ---- items and batches


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[CaptionSet, CaptionVocab]:
    (train,) = load_captions(coco(tmp_path_factory.mktemp("coco")), "train")
    return train, CaptionVocab.build(train.captions(), 1)


def test_caption_items(sets):
    train, vocab = sets
    reader = ImageReader(32)
    data = CaptionItems(train, vocab, reader, patches=PatchLabels(train.instances, reader, (2, 2)))
    assert len(data) == 30
    item = data[7]
    assert set(item) == {
        "image", "image_id", "references", "raw_references", "tokens", "length", "annotation_id", "patch_labels"
    }  # fmt: skip
    assert item["image_id"] == 1001 and item["annotation_id"] == annotation_ids(1001)[2]
    assert vocab.decode(item["tokens"]) == "a man 2 on a bike 1001" and item["length"] == len(item["tokens"]) == 9
    assert item["references"][4] == "a man 4 on a bike-1001"
    assert item["raw_references"][4] == "A man 4 on a bike-1001."
    assert torch.equal(item["image"], reader.tensor(reader.square(train.images[1]["file"])))
    short = CaptionItems(train, vocab, reader, max_len=5)[7]["tokens"]
    assert len(short) == 5 and short[-1] == EOS


def test_image_items(sets):
    train, vocab = sets
    data = ImageItems(train, ImageReader(32))
    assert len(data) == 6 and set(data[0]) == {"image", "image_id", "references", "raw_references"}
    with_captions = ImageItems(train, ImageReader(32), captions_per_image=7, vocab=vocab)
    drawn = [with_captions[epoch, 2]["annotation_id"] for epoch in range(4)]
    assert all(set(x) == set(annotation_ids(1002)) and max(Counter(x).values()) == 2 for x in drawn)
    assert len({tuple(x) for x in drawn}) > 1 and drawn[3] == with_captions[3, 2]["annotation_id"]
    with pytest.raises(ValueError, match="give both or none"):
        ImageItems(train, ImageReader(32), captions_per_image=2)


def test_batches(sets):
    train, vocab = sets
    collate = CaptionCollate(len(vocab))
    items = [CaptionItems(train, vocab, ImageReader(32), max_len=n)[k] for n, k in ((54, 0), (5, 29), (54, 12))]
    batch = collate(items)
    assert batch["image"].shape == (3, 3, 32, 32) and batch["tokens"].shape == (3, 9)
    assert batch["length"].tolist() == [9, 5, 9] and batch["image_id"] == [1000, 1005, 1002]
    assert batch["tokens"][1, 5:].tolist() == [PAD] * 4 and (batch["tokens"][:, 0] == BOS).all()
    assert batch["annotation_id"].tolist() == [x["annotation_id"] for x in items]
    assert batch["references"] == [x["references"] for x in items] and "patch_labels" not in batch
    images = ImageItems(train, ImageReader(32), captions_per_image=3, vocab=vocab)
    batch = collate([images[4], images[1]])
    assert batch["tokens"].shape == (6, 9) and batch["image"].shape[0] == 2 and batch["length"].tolist() == [9] * 6
    assert [k // 10 * 10 for k in batch["annotation_id"].tolist()] == [60_040] * 3 + [60_010] * 3
    plain = collate([ImageItems(train, ImageReader(32))[0]])
    assert "tokens" not in plain and plain["image_id"] == [1000]


def test_a_word_that_the_table_lacks_stops_before_the_model(sets):
    train, vocab = sets
    data = CaptionItems(train, vocab, ImageReader(32))
    row = next(k for k in range(30) if data[k]["tokens"].max() == len(vocab) - 1)
    CaptionCollate(len(vocab))([data[row]])
    with pytest.raises(UserError, match=rf"annotation {data[row]['annotation_id']}: token .* {len(vocab) - 1} rows"):
        CaptionCollate(len(vocab) - 1)([data[0], data[row]])


def test_an_item_follows_from_seed_epoch_and_index(sets):
    train, vocab = sets
    reader = ImageReader(32, flip=0.5)
    patches = PatchLabels(train.instances, reader, (2, 4))
    data = CaptionItems(train, vocab, reader, seed=3, patches=patches)
    plain = ImageReader(32)
    flips = []
    for epoch in range(12):
        item, again = data[epoch, 0], data[epoch, 0]
        assert torch.equal(item["image"], again["image"])
        straight = plain.tensor(plain.square(train.images[0]["file"]))
        flips.append(torch.equal(item["image"], straight.flip(-1)))
        assert flips[-1] or torch.equal(item["image"], straight)
        want = [IGNORE, IGNORE, 0, 0] * 2 if flips[-1] else [0, 0, IGNORE, IGNORE] * 2
        assert item["patch_labels"].tolist() == want  # the labels turn with the image
    assert 0 < sum(flips) < 12
    other = CaptionItems(train, vocab, reader, seed=4, patches=patches)
    turned = [torch.equal(data[e, 0]["image"], other[e, 0]["image"]) for e in range(12)]
    assert not all(turned) and torch.equal(data[0]["image"], data[0, 0]["image"])


def test_workers_do_not_change_the_batches(sets):
    train, vocab = sets
    data, collate = (
        CaptionItems(train, vocab, ImageReader(32, flip=0.5, cache_gb=1), seed=1),
        CaptionCollate(len(vocab)),
    )

    def batches(workers: int) -> list[dict]:
        steps = StepBatches(len(data), 4, 0, 9, seed=1)
        return list(DataLoader(data, batch_sampler=steps, num_workers=workers, collate_fn=collate))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["tokens"], b["tokens"])
        assert a["image_id"] == b["image_id"] and torch.equal(a["annotation_id"], b["annotation_id"])
