"""data/vessels.py: six sets in their owners' layouts, splits by patient, every refusal, patches; CHASE_DB1 if it is here."""

import functools
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import default_collate

from data.vessel_checks import OUTSIDE, draw_patch
from data.vessel_items import read_mask
from data.vessels import FORMATS, VesselPatches, open_vessels, turned
from utils import run
from utils.field_of_view import estimate_fov, fov_statistics
from utils.run import StepBatches, UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "sa2va" / "chase_db1"
H, W = 48, 60
Y, X = np.mgrid[:H, :W]
DISC = (Y - 24) ** 2 + (X - 30) ** 2 < 22**2


def save(path: Path, array: np.ndarray, **how) -> None:
    """uint8 or bool array as the picture its suffix names; .gz: a gzipped ppm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        image.save(buffer, format="ppm")
        path.write_bytes(gzip.compress(buffer.getvalue()))
    else:
        image.save(path, **how)


def photo(seed: int) -> np.ndarray:
    """A lit disc on black, with noise that makes every photograph another one."""
    rng = np.random.default_rng(seed)
    grey = rng.integers(90, 200, (H, W, 3))
    return (grey * DISC[..., None]).astype(np.uint8)


def lines(seed: int) -> np.ndarray:
    """A mask (H, W) bool: a row and a column inside the disc."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((H, W), bool)
    mask[rng.integers(10, 38), 12:48] = mask[10:38, rng.integers(14, 46)] = True
    return mask


def grey(mask: np.ndarray) -> np.ndarray:
    return mask.astype(np.uint8) * 255


def chase(root: Path, flat=False, children=range(1, 13), eyes="LR") -> None:
    for k in children:
        for eye in eyes:
            name, seed = f"Image_{k:02d}{eye}", 2 * k + (eye == "R")
            folders = ["."] * 3 if flat else ["images", "labels1", "labels2"]
            save(root / folders[0] / f"{name}.jpg", photo(seed))
            save(root / folders[1] / f"{name}_1stHO.png", lines(seed))
            save(root / folders[2] / f"{name}_2ndHO.png", lines(seed + 1000))
            if not flat:
                save(root / "masks" / f"mask_{k:02d}{eye}.png", grey(DISC))


def drive(root: Path) -> None:
    for part, split, numbers in (("training", "training", (21, 22)), ("test", "test", (1, 2))):
        for k in numbers:
            folder = root / part
            save(folder / "images" / f"{k:02d}_{split}.tif", photo(k))
            save(folder / "1st_manual" / f"{k:02d}_manual1.gif", grey(lines(k)))
            save(folder / "mask" / f"{k:02d}_{split}_mask.gif", grey(DISC))
            if split == "test":
                save(folder / "2nd_manual" / f"{k:02d}_manual2.gif", grey(lines(k + 1000)))


def stare(root: Path, flat=False, zipped=True, n=12) -> None:
    z = ".gz" if zipped else ""
    for k in range(1, n + 1):
        folders = ["."] * 3 if flat else ["stare-images", "labels-ah", "labels-vk"]
        save(root / folders[0] / f"im{k * 10:04d}.ppm{z}", photo(k))
        for folder, observer, seed in ((folders[1], "ah", k), (folders[2], "vk", k + 1000)):
            save(root / folder / f"im{k * 10:04d}.{observer}.ppm{z}", np.repeat(grey(lines(seed))[..., None], 3, 2))


def hrf(root: Path) -> None:
    for g, group in enumerate(("h", "dr", "g")):
        for k in range(1, 8):
            name, seed = f"{k:02d}_{group}", 10 * g + k
            save(root / "images" / (name + (".JPG" if group == "dr" else ".jpg")), photo(seed))
            save(root / "manual1" / f"{name}.tif", grey(lines(seed)))
            save(root / "mask" / f"{name}_mask.tif", np.repeat(grey(DISC)[..., None], 3, 2))


def fives(root: Path) -> None:
    for part, seed in (("train", 0), ("test", 100)):
        for k, kind in enumerate("ADGN", 1):
            save(root / part / "Original" / f"{k}_{kind}.png", photo(seed + k))
            save(root / part / "Ground truth" / f"{k}_{kind}.png", grey(lines(seed + k)))


def box(x0, y0, x1, y1) -> list[float]:
    """A polygon around the pixels x0..x1-1, y0..y1-1."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def arcade(root: Path, tasks=("syntax", "stenosis")) -> None:
    for t, task in enumerate(tasks):
        for s, split in enumerate(("train", "val", "test")):
            images, annotations = [], []
            for k in (1, 2):
                save(root / task / split / "images" / f"{k}.png", photo(100 * t + 10 * s + k)[..., 0])
                images.append({"id": k, "file_name": f"{k}.png", "width": W, "height": H})
                parts = [box(5, 5, 25, 9), box(20, 7, 24, 40)] if task == "syntax" else [box(30, 30, 34, 33)][: k - 1]
                annotations += [
                    {"id": len(annotations) + j, "image_id": k, "category_id": 1 + 7 * j, "segmentation": [p], "area": 1,
                     "bbox": [0, 0, 1, 1], "iscrowd": 0} for j, p in enumerate(parts)
                ]  # fmt: skip
            content = {"images": images, "categories": [{"id": i, "name": str(i)} for i in range(1, 27)],
                       "annotations": annotations}  # fmt: skip
            path = root / task / split / "annotations" / f"{split}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))


LAYOUTS = {  # name: (writer, format, pictures per split, seed of the truth of a named record, second observer, FOV)
    "chase": (chase, "chase", {"train": 20, "test": 4}, ("Image_11R", 23), "all", "file"),
    "chase flat": (functools.partial(chase, flat=True), "chase", {"train": 20, "test": 4}, ("Image_03L", 6), "all", "est"),
    "drive": (drive, "drive", {"train": 2, "test": 2}, ("02_test", 2), "test", "file"),
    "stare": (stare, "stare", {"train": 10, "test": 2}, ("im0110", 11), "all", "est"),
    "stare flat": (functools.partial(stare, flat=True, zipped=False), "stare", {"train": 10, "test": 2}, ("im0010", 1), "all", "est"),
    "hrf": (hrf, "hrf", {"train": 15, "test": 6}, ("06_dr", 16), "none", "file"),
    "fives": (fives, "fives", {"train": 4, "test": 4}, ("3_G", 3), "none", "est"),
}  # fmt: skip


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("check_dataset", ROOT / "data" / "check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(*argv: object) -> int:
    return run.cli(script().main, [*map(str, argv)])


# ---- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(tmp_path, layout):
    write, kind, counts, (name, seed), second, fov = LAYOUTS[layout]
    write(tmp_path)
    found = open_vessels(tmp_path)
    assert found.name == kind and [x.name for x in open_vessels(tmp_path, kind).items] == [x.name for x in found.items]
    assert Counter(x.split for x in found.items) == counts and found.splits == list(counts)
    for x in found.items:
        y = x.load()
        assert y["image"].shape == (H, W, 3) and y["image"].dtype == np.uint8
        assert y["mask"].shape == y["fov"].shape == (H, W) and y["mask"].dtype == y["fov"].dtype == bool
        assert y["masks"].shape == (1, H, W) and (y["masks"][0] == y["mask"]).all() and x.text == ("the blood vessels",)
        assert (y["fov"] == DISC).mean() > (0.99 if fov == "file" else 0.98)  # jpg blurs the edge
        assert (x.second_path is not None) == (second == "all" or second == x.split)
        assert x.fov_source.startswith(fov)
    chosen = next(x for x in found.items if x.name == name)
    assert (chosen.load()["mask"] == lines(seed)).all()
    if second != "none":
        assert (chosen.second((H, W)) == lines(seed + 1000)).all()
    assert any("estimated" in note for note in found.notes) == (fov == "est")


@pytest.mark.parametrize("inside", [False, True])
def test_arcade_joins_the_classes_of_a_task(tmp_path, inside):
    arcade(tmp_path)
    tree = open_vessels(tmp_path / "syntax" if inside else tmp_path)
    spots = open_vessels(tmp_path / "stenosis", *(() if inside else ("arcade_stenosis",)))
    assert Counter(x.split for x in tree.items) == {"train": 2, "val": 2, "test": 2}
    truth = np.zeros((H, W), bool)
    truth[5:9, 5:25] = truth[7:40, 20:24] = True
    for x in tree.items:
        y = x.load()
        assert (y["mask"] == truth).all() and y["fov"].all() and x.fov_source == "whole picture"
    assert [np.count_nonzero(x.load()["mask"]) for x in spots.items] == [0, 12] * 3  # a picture may have no stenosis
    assert {x.text for x in spots.items} == {("the stenoses",)} and any("no patients" in note for note in tree.notes)


def test_arcade_refuses(tmp_path):
    arcade(tmp_path, ["syntax"])
    path = tmp_path / "syntax" / "val" / "annotations" / "val.json"
    content = json.loads(path.read_text())

    def refused(change, pattern):
        broken = json.loads(json.dumps(content))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=pattern):
            [x.load() for x in open_vessels(tmp_path).items]

    refused(lambda c: c["annotations"][0].update(segmentation=[box(5, 5, 80, 9)]), r"val.json \(1\).*x 5..80.*0..60")
    refused(lambda c: c["annotations"][0].update(image_id=9), "names image 9")
    refused(lambda c: c["annotations"].clear(), "the mask is empty")
    refused(lambda c: c.pop("images"), 'expected {"images"')
    refused(lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "polygon of 4 numbers")
    path.write_text("{")
    with pytest.raises(UserError, match="is not json"):
        open_vessels(tmp_path)


def test_drive_without_the_truth_of_its_test_split(tmp_path):
    drive(tmp_path)
    shutil.rmtree(tmp_path / "test" / "1st_manual")
    found = open_vessels(tmp_path)
    assert found.splits == ["train"] and any("left out" in note for note in found.notes)
    with pytest.raises(UserError, match="no split 'test', expected one of train"):
        found.split("test")


# ---- splits


def test_splits_are_by_patient(tmp_path):
    chase(tmp_path, children=(1, 2, 9, 10, 11, 13, 14))
    of = lambda **how: {s: {x.patient for x in open_vessels(tmp_path, **how).split(s)}  # noqa: E731
                        for s in open_vessels(tmp_path, **how).splits}  # fmt: skip
    assert of() == {"train": {"01", "02", "09", "10"}, "test": {"11", "13", "14"}}
    assert of(split_at=2) == {"train": {"01", "02"}, "test": {"09", "10", "11", "13", "14"}}
    assert of(val=["09", "10"]) == {"train": {"01", "02"}, "val": {"09", "10"}, "test": {"11", "13", "14"}}
    with pytest.raises(UserError, match="patient '11' for val is not in split train"):
        open_vessels(tmp_path, val=["11"])


def test_sets_with_their_own_split_refuse_another(tmp_path):
    drive(tmp_path)
    with pytest.raises(UserError, match="drive has splits of its own"):
        open_vessels(tmp_path, split_at=3)


def test_patient_in_two_splits_and_picture_in_two_splits(tmp_path):
    chase(tmp_path)
    shutil.copy(tmp_path / "images" / "Image_02L.jpg", tmp_path / "images" / "Image_12R.jpg")
    with pytest.raises(UserError, match=r"Image_12R.jpg: is the picture .*Image_02L.jpg again.* remove one"):
        open_vessels(tmp_path)
    chase(tmp_path)
    copied = open_vessels(tmp_path)
    copied.items = [x if x.name != "Image_01R" else type(x)(**{**vars(x), "split": "test"}) for x in copied.items]
    with pytest.raises(UserError, match="patient '01' is in split test, and in train"):
        copied.check()


def test_pixels_that_were_saved_again_are_found_by_the_check(tmp_path, capsys):
    stare(tmp_path, zipped=False)
    data = (tmp_path / "stare-images" / "im0020.ppm").read_bytes()
    other = tmp_path / "stare-images" / "im0120.ppm"
    other.write_bytes(data.replace(b"P6\n", b"P6\n# saved again\n", 1))
    open_vessels(tmp_path)  # the files differ
    assert check("vessels", tmp_path) == 2
    assert re.search(r"im0120.ppm: is the picture \S*im0020.ppm again", capsys.readouterr().err)


# ---- refusals of files


def test_masks_that_are_refused(tmp_path):
    chase(tmp_path, children=[1])
    path, x = tmp_path / "labels1" / "Image_01L_1stHO.png", open_vessels(tmp_path).items[0]
    good = lines(2)

    def refused(array, pattern, **how):
        save(path, array, **how)
        with pytest.raises(UserError, match=pattern) as e:
            x.load()
        assert str(path) in str(e.value) and "expected" in str(e.value) and "\n" not in str(e.value)

    refused(grey(good)[:, 1:], r"is 59 x 48 px \(W x H\), expected 60 x 48 as .*Image_01L.jpg")
    refused(good.astype(np.uint8) * 7, "holds the values 0, 7, expected 0 and 1, or 0 and 255")
    refused(np.where(good, 255, good[::-1].astype(np.uint8)).astype(np.uint8), "holds the values 0, 1, 255")
    refused(photo(1)[..., 0], r"\(\d+ values\)")
    refused(photo(1), "has colours")
    refused(np.zeros((H, W), np.uint8), "the mask is empty")
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        x.load()
    path.unlink()
    with pytest.raises(UserError, match="Image_01L.jpg: has no mask, expected .*labels1"):
        open_vessels(tmp_path)


def test_field_of_view_that_is_refused(tmp_path):
    chase(tmp_path, children=[1])
    for array, pattern in ((grey(DISC)[1:], "is 60 x 47 px"), (grey(DISC & False), "field of view is empty")):
        save(tmp_path / "masks" / "mask_01L.png", array)
        with pytest.raises(UserError, match=pattern):
            open_vessels(tmp_path).items[0].load()


def test_encodings_of_one_mask(tmp_path):
    mask = lines(5)
    palette = Image.fromarray(mask.astype(np.uint8), mode="L").convert("P")
    palette.putpalette([0, 0, 0, 0, 128, 0] + [0] * 762)  # as in VOC: the indices are the labels, here green
    palette.save(tmp_path / "palette.png")
    save(tmp_path / "ones.png", mask.astype(np.uint8))
    save(tmp_path / "bits.png", mask)
    save(tmp_path / "grey.gif", grey(mask))
    save(tmp_path / "colour.tif", np.repeat(grey(mask)[..., None], 3, 2))
    save(tmp_path / "zipped.ppm.gz", grey(mask))
    save(tmp_path / "alpha.png", np.dstack([grey(mask)] * 3 + [grey(DISC | True)]))
    for path in sorted(tmp_path.iterdir()):
        assert (read_mask(path, (H, W), "a.png") == mask).all(), path.name
    assert not read_mask(tmp_path / "ones.png", (H, W), "a.png").all()


@pytest.mark.parametrize(
    "make, pattern",
    [
        (lambda p: None, "looks like none of the known layouts"),
        (lambda p: (chase(p, children=[1]), fives(p)), "looks like chase and fives"),
        (lambda p: shutil.rmtree(p), "no such folder"),
    ],
)
def test_folders_that_are_refused(tmp_path, make, pattern):
    make(tmp_path)
    with pytest.raises(UserError, match=pattern):
        open_vessels(tmp_path)
    (tmp_path / "images").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="expected auto, chase"):
        open_vessels(tmp_path, "chase_db1")
    with pytest.raises(UserError, match="holds no file named like"):
        open_vessels(tmp_path, "hrf")


# ---- field of view


def test_estimated_field_of_view():
    picture = photo(3)
    picture[20:24, 20:40] = 0  # a dark vessel inside
    picture[2:5, 2:5] = 200  # a label beside the disc
    assert (estimate_fov(picture) == DISC).all()
    assert estimate_fov(np.full((9, 9, 3), 120, np.uint8)).all() and estimate_fov(np.zeros((9, 9, 3), np.uint8)).all()
    with pytest.raises(ValueError, match="expected"):
        estimate_fov(picture[..., 0])
    mean, std = fov_statistics(picture, DISC)
    np.testing.assert_allclose(mean, picture[DISC].mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, picture[DISC].std(0), rtol=1e-5)
    with pytest.raises(ValueError, match="with 0 px"):
        fov_statistics(picture, DISC & False)


# ---- patches


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("chase")
    chase(root, children=(1, 2))
    return open_vessels(root).items


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_patches_depend_on_seed_epoch_and_index_alone(records):
    first, again = (VesselPatches(records, 16, seed=3, per_epoch=40) for _ in range(2))
    want = {key: first[key] for key in [(0, 5), (2, 39), (1, 0)]}
    assert all(same(want[key], again[key]) for key in reversed(want)) and same(first[5], want[0, 5])
    assert not np.array_equal(first[0, 5]["image"], first[1, 5]["image"])
    assert not np.array_equal(first[5]["image"], VesselPatches(records, 16, seed=4, per_epoch=40)[5]["image"])
    none = VesselPatches(records, 16, seed=3, per_epoch=40, cache_gb=0)
    assert same(none[2, 39], want[2, 39]) and not none.cache and len(first.cache) == 3
    with pytest.raises(IndexError):
        first[40]
    batch = default_collate([first[k] for k in next(iter(StepBatches(len(first), 6, 0, 1, 0)))])
    assert batch["image"].shape == (6, 16, 16, 3) and batch["mean"].shape == (6, 3) and len(batch["name"]) == 6
    assert Counter(first[k]["name"] for k in range(40)) == {x.name: 10 for x in records}


def test_patches_show_what_the_photograph_shows(records):
    plain = VesselPatches(records, 16, per_epoch=64, turns=False, contrast=1, light=0, objects=True)
    by_name = {x.name: x.load() for x in records}
    covered = np.zeros((H, W), bool)
    for k in range(64):
        p, whole = plain[k], by_name[plain[k]["name"]]
        x0, y0, x1, y1 = p["box"]
        assert min(x0, y0) >= 0 and x1 <= W and y1 <= H and p["fov"].any()
        for layer in ("image", "mask", "fov"):
            assert np.array_equal(p[layer], whole[layer][y0:y1, x0:x1])
        assert np.array_equal(p["masks"][0], p["mask"])
        covered[y0:y1, x0:x1] = True
        np.testing.assert_allclose(p["mean"], whole["image"][whole["fov"]].mean(0), rtol=1e-5)
    assert covered[DISC].mean() > 0.95
    pixels = VesselPatches(records, 1, per_epoch=64)
    assert all(pixels[k]["fov"].all() for k in range(64))  # drawn inside the field of view


def test_flips_turns_and_light(records):
    plain = VesselPatches(records[:1], 16, per_epoch=200, turns=False, contrast=1, light=0)
    turning = VesselPatches(records[:1], 16, per_epoch=200, contrast=1, light=0)
    seen = Counter()
    for k in range(200):
        a, b = plain[k], turning[k]
        fits = [t for t in range(8) if np.array_equal(turned(a["image"], t), b["image"])]
        assert len(fits) == 1 and np.array_equal(turned(a["mask"], fits[0]), b["mask"])
        assert np.array_equal(turned(a["fov"], fits[0]), b["fov"]) and np.array_equal(a["box"], b["box"])
        seen[fits[0]] += 1
    assert sorted(seen) == list(range(8)) and min(seen.values()) > 8
    bright = VesselPatches(records[:1], 16, per_epoch=200, turns=False)
    change = []
    for k in range(60):
        a, b = plain[k], bright[k]
        assert np.array_equal(a["image"][~a["fov"]], b["image"][~a["fov"]])
        change.append((b["image"][a["fov"]].mean() - a["image"][a["fov"]].mean()) / a["std"].mean())
    assert min(change) < -0.2 and max(change) > 0.2 and np.abs(change).max() < 0.8 and abs(np.mean(change)) < 0.15


def test_patches_of_small_and_of_whole_pictures(records):
    large = VesselPatches(records, 64, turns=False, contrast=1, light=0)[0]
    whole = records[0].load()
    assert large["image"].shape == (64, 64, 3) and np.array_equal(large["image"][:H, :W], whole["image"])
    assert not large["fov"][H:].any() and not large["mask"][:, W:].any() and not large["image"][H:].any()
    shapes = {VesselPatches(records, None, per_epoch=16)[k]["image"].shape for k in range(16)}
    assert shapes == {(H, W, 3), (W, H, 3)}
    for how in ({"size": 0}, {"size": 8, "per_epoch": 0}, {"size": 8, "contrast": 0.5}, {"size": 8, "light": -1}):
        with pytest.raises(ValueError, match="VesselPatches"):
            VesselPatches(records, **how)


# ---- check_dataset


def test_check_prints_counts_and_draws_patches(tmp_path, capsys):
    chase(tmp_path / "set")
    sheet = tmp_path / "sheet.png"
    assert check("vessels", tmp_path / "set", "--image-size", 16, "--batch-size", 6, "--show", sheet) == 0
    out = capsys.readouterr().out
    assert "chase, 24 pictures, splits train, test" in out and "no problem found" in out
    assert (
        "train: 20 pictures of 10 patients (01, 02" in out and "test: 4 pictures of 2 patients (11, 12), 4 dec" in out
    )
    share = 100 * np.mean([lines(2 * k + e)[DISC].mean() for k in (11, 12) for e in (0, 1)])
    low, middle, high = map(float, re.search(r"test: .* masked ([\d.]+)/([\d.]+)/([\d.]+) %", out).groups())
    assert low <= round(share, 2) <= high and low <= middle <= high
    width, height = Image.open(sheet).size
    assert width > 4 * 2 * 224 and height > 2 * 224
    assert check("vessels", tmp_path / "set", "--split-at", 11, "--split", "test", "--limit", 1) == 0
    assert "test: 2 pictures of 1 patients (12), 1 decoded" in capsys.readouterr().out


def test_a_drawn_patch_shows_vessels_and_surround(records):
    patch = VesselPatches(records, 16, objects=True)[0]
    drawn = draw_patch(patch)
    left, right = drawn[:, : drawn.shape[1] // 2], drawn[:, drawn.shape[1] // 2 :]
    times = len(drawn) // 16
    mask, fov = (patch[k].repeat(times, 0).repeat(times, 1) for k in ("mask", "fov"))
    assert np.array_equal(left[::times, ::times], patch["image"])
    assert (right[~fov & ~mask] == OUTSIDE).all() and np.array_equal(right[fov & ~mask], left[fov & ~mask])
    assert (right[mask] != left[mask]).any(-1).all() and mask.any()


@pytest.mark.parametrize(
    "argv, pattern",
    [
        (["vessels"], "FORMAT vessels needs ROOT"),
        (["manifest", "x", "--layout", "drive"], "leave --layout out"),
        (["vessels", "{}", "--split", "val"], "no split 'val', expected one of train, test"),
        (["vessels", "{}", "--layout", "fives"], "holds no file named like"),
    ],
)
def test_check_refuses(tmp_path, capsys, argv, pattern):
    chase(tmp_path, children=(1, 11))
    assert check(*[str(tmp_path) if a == "{}" else a for a in argv]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err and re.search(pattern, err), err


def test_every_format_is_documented():
    import data.vessels

    assert all(re.search(rf"\b{name}\b", data.vessels.__doc__) for name in FORMATS)


# ---- the real set


@pytest.mark.skipif(not SHARED.is_dir(), reason="no CHASE_DB1 beside the repository")
def test_chase_db1_as_it_is_here():
    found = open_vessels(SHARED)
    done = 0
    for x in found.items:
        child = int(x.patient)
        assert x.split == ("train" if child <= 10 else "test") and x.name == f"Image_{child:02d}{x.name[-1]}"
        y = x.load()
        second = x.second(y["mask"].shape)
        estimate = estimate_fov(y["image"])
        assert 0.03 < y["mask"][y["fov"]].mean() < 0.2 and second is not None and second.any()
        iou = (estimate & y["fov"]).sum() / (estimate | y["fov"]).sum()
        assert iou > 0.9, f"{x.name}: estimated field of view has IoU {iou:.3f}"  # its files lack dark patches
        assert not (y["mask"] & ~estimate).sum() > 0.02 * y["mask"].sum()
        done += 1
    pictures = len(list((SHARED / "images").glob("*.jpg")))
    assert done == pictures > 0
    print(f"CHASE_DB1: {done} of {pictures} pictures")
