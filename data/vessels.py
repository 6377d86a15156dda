"""Vessel sets in the layouts that their owners hand out, as records, and the patches of them that training sees.

    chase   images/Image_01L.jpg labels1/Image_01L_1stHO.png labels2/..._2ndHO.png masks/mask_01L.png, or as handed out:
            Image_01L.jpg Image_01L_1stHO.png Image_01L_2ndHO.png in one folder. Children 1-10 train, the others test
    drive   training/ and test/, each with images/21_training.tif 1st_manual/21_manual1.gif mask/21_training_mask.gif,
            test also 2nd_manual/01_manual2.gif
    stare   im0001.ppm(.gz) im0001.ah.ppm(.gz) im0001.vk.ppm(.gz), in one folder or stare-images/ labels-ah/ labels-vk/.
            The first 10 train, the others test
    hrf     images/01_h.jpg manual1/01_h.tif mask/01_h_mask.tif; 01..05 of the healthy (h), the diabetic (dr) and the
            glaucomatous (g) train, the others test
    fives   train/ and test/, each with Original/1_A.png and "Ground truth"/1_A.png
    arcade  train/ val/ test/ of syntax/ (or the folder above it), each with images/1.png annotations/train.json: all
            classes of the arterial tree joined; arcade_stenosis: the same of stenosis/, where a picture may have none
    manifest   anybody's pictures: data/referring_manifest.py

Owners differ in how they name patients: CHASE's two eyes of a child are one patient; DRIVE, STARE, HRF, FIVES have a
picture per person as far as they say; ARCADE does not say, so there its own split is believed.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.referring_manifest import read_manifest
from data.vessel_items import VesselItem, VesselSet
from utils.field_of_view import fov_statistics
from utils.run import UserError
from utils.segmentation_files import need, read_json

FORMATS = ("chase", "drive", "stare", "hrf", "fives", "arcade", "arcade_stenosis", "manifest")
SPLIT_AT = {"chase": 10, "stare": 10, "hrf": 5}  # last training number; the other sets have splits of their own
COCO = '{"images": [{"id", "file_name", "height", "width"}], "annotations": [{"image_id", "segmentation"}]}'


def open_vessels(
    root: Path | str,
    format: str = "auto",
    split_at: int | None = None,
    val: Sequence[str] = (),
    polygons: bool = False,
) -> VesselSet:
    """The records of a set, checked: no patient and no picture file in two splits.

    format: one of FORMATS, auto: what the folder looks like. split_at: chase, stare, hrf: the last child, number among
    the sorted pictures, or number within its group that is for training. val: patients of the training split that make
    the split val. polygons: a manifest's polygons are accepted. UserError in one sentence for whatever is wrong.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder, expected a set of vessel pictures; check the path")
    kind = guess(root) if format == "auto" else format
    if kind not in FORMATS:
        raise UserError(f"format {format}: no such layout, expected auto, {', '.join(FORMATS)}; choose one")
    if kind == "manifest":
        found = read_manifest(root, polygons)
    else:
        read = {"chase": chase, "drive": drive, "stare": stare, "hrf": hrf, "fives": fives}.get(kind, arcade)
        found = VesselSet([], kind, root)
        read(found, SPLIT_AT.get(kind) if split_at is None else split_at)
    if split_at is not None and kind not in SPLIT_AT:
        raise UserError(f"{root}: {kind} has splits of its own, so none is made at {split_at}; leave --split-at out")
    train = {x.person for x in found.items if x.split == "train"}
    if set(val) - train:
        raise UserError(
            f"{root}: patient '{sorted(set(val) - train)[0]}' for val is not in split train, expected some of "
            f"{', '.join(sorted(train)[:12])}; name patients of train"
        )
    found.items = [replace(x, split="val") if x.person in val else x for x in found.items]
    missing = sum(x.fov_path is None and not x.whole for x in found.items)
    if missing:
        found.notes.append(f"no field of view in a file for {missing} of {len(found)} pictures: estimated from them")
    return found.check()


def guess(root: Path) -> str:
    """The format that a folder (or manifest file) has. UserError when it looks like none, or like several."""
    below = {str(p.relative_to(root)) for p in (*root.glob("*"), *root.glob("*/*"))}
    looks = {
        "manifest": root.is_file() or "manifest.jsonl" in below,
        "chase": any(re.fullmatch(r"(images/)?Image_\d+[LR]\.jpg", p) for p in below),
        "drive": {"training/1st_manual", "test/1st_manual"} & below,
        "stare": any(re.fullmatch(r"([\w-]+/)?im\d{4}\.ppm(\.gz)?", p) for p in below),
        "hrf": {"images", "manual1"} <= below,
        "fives": {"train/Original", "test/Original"} & below,
        "arcade": "syntax" in below or ({"train/annotations", "val/annotations"} & below and root.name != "stenosis"),
        "arcade_stenosis": {"train/annotations", "val/annotations"} & below and root.name == "stenosis",
    }
    found = [name for name, yes in looks.items() if yes]
    if len(found) != 1:
        what = f"looks like {' and '.join(found)}" if found else "looks like none of the known layouts"
        raise UserError(f"{root}: {what}, expected one of {', '.join(FORMATS)}; name it, or the folder inside")
    return found[0]


def listed(folder: Path, pattern: str) -> dict[str, Path]:
    """{whole first group of pattern: file} of a folder, sorted by name. UserError without one."""
    hits = [(m, p) for p in sorted(folder.glob("*")) if (m := re.fullmatch(pattern, p.name, re.IGNORECASE))]
    if not hits:
        raise UserError(f"{folder}: holds no file named like {pattern}, expected the pictures of the set; check it")
    return {m[1]: p for m, p in hits}


def beside(image: Path, *candidates: Path, needed: bool = True) -> Path | None:
    """The first candidate that is there. UserError, if it is needed, when there is none."""
    there = next((p for p in candidates if p.is_file()), None)
    if there is None and needed:
        raise UserError(f"{image}: has no mask, expected {candidates[0]}; complete the copy of the set")
    return there


# ---- layouts


def chase(found: VesselSet, last: int) -> None:
    """CHASE_DB1: both eyes of 14 children, two observers."""
    root, flat = found.root, not (found.root / "images").is_dir()
    for name, image in listed(root if flat else root / "images", r"(Image_\d+[LR])\.jpg").items():
        key = name.removeprefix("Image_")
        first, second = (
            (root if flat else root / f"labels{k}") / f"{name}_{o}HO.png" for k, o in ((1, "1st"), (2, "2nd"))
        )
        fov = beside(image, root / "masks" / f"mask_{key}.png", needed=False)
        split = "train" if int(key[:-1]) <= last else "test"
        found.items.append(VesselItem(name, image, beside(image, first), (), fov, beside(image, second, needed=False),
                                      key[:-1], split))  # fmt: skip


def drive(found: VesselSet, _: None) -> None:
    """DRIVE. The challenge site hands its test pictures out without truth: they are left out, and a note says so."""
    for split, folder in (("train", found.root / "training"), ("test", found.root / "test")):
        if split == "test" and not (folder / "1st_manual").is_dir():
            found.notes.append(f"{folder} has no 1st_manual: the test split is left out")
            continue
        for name, image in listed(folder / "images", r"(\d+_\w+)\.tif").items():
            k = name.split("_")[0]
            mask = beside(image, folder / "1st_manual" / f"{k}_manual1.gif")
            second = beside(image, folder / "2nd_manual" / f"{k}_manual2.gif", needed=False)
            fov = beside(image, folder / "mask" / f"{name}_mask.gif")
            found.items.append(VesselItem(name, image, mask, (), fov, second, k, split))


def stare(found: VesselSet, last: int) -> None:
    """STARE: observers Adam Hoover (1) and Valentina Kouznetsova (2)."""
    root = found.root
    flat = any(root.glob("im*.ppm*"))
    folders = (root,) * 3 if flat else (root / "stare-images", root / "labels-ah", root / "labels-vk")
    images = listed(folders[0], r"(im\d{4})\.ppm(?:\.gz)?")
    for k, (name, image) in enumerate(images.items(), 1):
        names = [
            [f / f"{name}.{o}.ppm{z}" for z in ("", ".gz")] for f, o in zip(folders[1:], ("ah", "vk"), strict=True)
        ]
        first, second = beside(image, *names[0]), beside(image, *names[1], needed=False)
        found.items.append(VesselItem(name, image, first, (), None, second, name, "train" if k <= last else "test"))


def hrf(found: VesselSet, last: int) -> None:
    """HRF: 15 healthy, 15 diabetic, 15 glaucomatous people, numbered within their group."""
    for name, image in listed(found.root / "images", r"(\d+_(?:h|dr|g))\.jpe?g").items():
        mask = beside(image, *(found.root / "manual1" / f"{name}.{s}" for s in ("tif", "tiff")))
        fov = beside(image, *(found.root / "mask" / f"{name}_mask.{s}" for s in ("tif", "tiff")))
        split = "train" if int(name.split("_")[0]) <= last else "test"
        found.items.append(VesselItem(name, image, mask, (), fov, None, name, split))


def fives(found: VesselSet, _: None) -> None:
    """FIVES: numbers begin anew in each split, so the split is part of the patient's name."""
    for split in ("train", "test"):
        for name, image in listed(found.root / split / "Original", r"(\d+_[ADGN])\.png").items():
            mask = beside(image, found.root / split / "Ground truth" / image.name)
            found.items.append(VesselItem(name, image, mask, patient=f"{split} {name}", split=split))


def arcade(found: VesselSet, _: None) -> None:
    """ARCADE: X-ray pictures, COCO polygons; the field of view is the whole picture."""
    task = "stenosis" if found.name == "arcade_stenosis" else "syntax"
    root = found.root / task if (found.root / task).is_dir() else found.root
    found.notes.append("ARCADE names no patients, so its own splits are believed; its masks are polygons")
    splits = [s for s in ("train", "val", "test") if (root / s / "annotations" / f"{s}.json").is_file()]
    for split in splits:
        path = root / split / "annotations" / f"{split}.json"
        content = read_json("ARCADE", path)
        part = {k: content.get(k) if isinstance(content, dict) else None for k in ("images", "annotations")}
        images = need(str(path), part["images"], {"id": int, "file_name": str}, COCO)
        shapes: dict[int, list] = {x["id"]: [] for x in images}
        for a in need(str(path), part["annotations"], {"image_id": int, "segmentation": list}, COCO):
            if a["image_id"] not in shapes:
                raise UserError(
                    f"{path}: an annotation names image {a['image_id']}, which is not in it; replace the file"
                )
            shapes[a["image_id"]] += a["segmentation"]
        text = ("the stenoses",) if task == "stenosis" else VesselItem.text
        for x in images:
            name = Path(x["file_name"]).stem
            found.items.append(
                VesselItem(name, root / split / "images" / x["file_name"], None, (shapes[x["id"]],),
                           patient=f"{split} {name}", split=split, text=text, whole=True,
                           empty=(task == "stenosis",), where=str(path))
            )  # fmt: skip


# ---- training patches


class VesselPatches:
    """Square patches of records, or whole pictures (size None), each a function of (seed, epoch, index) alone.

    Patch `index` is cut from record index mod the number of records, around a pixel drawn evenly from the field of
    view (moved inwards where it would leave the picture; a smaller picture is padded with black outside the field of
    view). turns: one of the 8 flips and quarter turns; contrast c, light l: inside the field of view grey levels are
    spread about the photograph's mean by a factor of 1 / c .. c and moved by up to l deviations. objects: also the mask
    of every object, which default_collate can stack only where all records have as many. cache_gb: decoded records
    that this process keeps, GB.

    patches[index] or patches[epoch, index] -> dict:
        image (S, S, 3) uint8, mask (S, S) bool: all objects, fov (S, S) bool, with objects: masks (n, S, S) bool,
        mean, std (3,) float32: of the whole photograph inside its field of view, before augmentation,
        name str, box (4,) int64: x0, y0, x1, y1 px in the photograph before flips
    """

    def __init__(self, items: Sequence[VesselItem], size: int, seed: int = 0, per_epoch: int | None = None,
                 turns: bool = True, contrast: float = 1.25, light: float = 0.5, objects: bool = False,
                 cache_gb: float = 2.0):  # fmt: skip
        if not items or min(1 if size is None else size, 1 if per_epoch is None else per_epoch) < 1:
            raise ValueError(f"VesselPatches: {len(items)} items, size {size}, per_epoch {per_epoch}; expected >= 1")
        if contrast < 1 or light < 0:
            raise ValueError(f"VesselPatches: contrast {contrast}, light {light}; expected >= 1 and >= 0")
        self.items, self.size, self.seed = list(items), size, seed
        self.per_epoch = len(self.items) if per_epoch is None else per_epoch
        self.turns, self.contrast, self.light, self.objects = turns, contrast, light, objects
        self.room, self.cache = int(cache_gb * 1e9), {}

    def __len__(self) -> int:
        return self.per_epoch

    def loaded(self, k: int) -> dict:
        """Record k with mean and std of its photograph. UserError when nothing of it is inside the field of view."""
        if k not in self.cache:
            x = self.items[k].load()
            x["mean"], x["std"] = fov_statistics(x["image"], x["fov"])
            self.room -= sum(a.nbytes for a in x.values())
            if self.room < 0:
                return x
            self.cache[k] = x
        return self.cache[k]

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = (0, key) if isinstance(key, int) else key
        if not 0 <= index < self.per_epoch:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, epoch, index))
        k = index % len(self.items)
        x = self.loaded(k)
        box = self.draw_box(x["fov"], rng)
        layers = {name: self.cut(x[name], box) for name in ("image", "fov", "mask")}
        if self.objects:
            layers["masks"] = np.stack([self.cut(m, box) for m in x["masks"]])
        layers = self.augmented(layers, x["mean"], x["std"], rng)
        return {**layers, "mean": x["mean"], "std": x["std"], "name": self.items[k].name, "box": np.array(box)}

    def draw_box(self, fov: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 px of a patch around an evenly drawn pixel of fov."""
        H, W = fov.shape
        if self.size is None:
            return 0, 0, W, H
        while True:  # fov has pixels, mostly more than half of all
            for y, x in rng.integers(0, (H, W), (64, 2)).tolist():
                if fov[y, x]:
                    x0 = min(max(x - self.size // 2, 0), max(W - self.size, 0))
                    y0 = min(max(y - self.size // 2, 0), max(H - self.size, 0))
                    return x0, y0, x0 + self.size, y0 + self.size

    def cut(self, layer: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """A copy of the box, zeros where it leaves the layer (H, W[, C])."""
        x0, y0, x1, y1 = box
        part = layer[y0:y1, x0:x1]
        out = np.zeros((y1 - y0, x1 - x0, *layer.shape[2:]), layer.dtype)
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def augmented(self, layers: dict, mean: np.ndarray, std: np.ndarray, rng: np.random.Generator) -> dict:
        """Light, flips, turns. Outside the field of view the picture stays as it is."""
        contrast, light = self.contrast ** rng.uniform(-1, 1), self.light * rng.uniform(-1, 1)
        turn = int(rng.integers(8)) if self.turns else 0
        if (contrast, light) != (1, 0):
            grey = (layers["image"] - mean) * contrast + mean + light * std
            changed = np.rint(grey).clip(0, 255).astype(np.uint8)
            layers["image"] = np.where(layers["fov"][..., None], changed, layers["image"])
        return {name: turned(x, turn, (1, 2) if name == "masks" else (0, 1)) for name, x in layers.items()}


def turned(x: np.ndarray, turn: int, axes: tuple[int, int] = (0, 1)) -> np.ndarray:
    """The turn-th (0..7) of the flips and quarter turns, as a contiguous copy; 0 changes nothing."""
    x = np.rot90(x, turn % 4, axes)
    return np.ascontiguousarray(np.flip(x, axes[1]) if turn >= 4 else x)
