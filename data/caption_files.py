"""Captioned images on disk, as one list: COCO 2014 and 2017, Karpathy's splits, M2's annotation ids, csv, Flickr8k.

    annotations/captions_train2014.json + train2014/    COCO, either year; or the folders inside images/
    coco_train_ids.npy, coco_restval_ids.npy, ...       M2: ids of caption annotations (not of images) in those files
    dataset_coco.json                                   Karpathy: {images: [{filename, filepath, cocoid, split, ...}]}
    captions.txt or one *.csv + Images/                 columns image (or file), caption, and split if there is one

Splits are train, val, test. COCO files have train and val; of the ids and of Karpathy's file train is train + restval,
and M2's dev is val. M2's ids name the five lowest annotation ids of an image, Karpathy's file holds all captions. A csv
without a split column is split by the file names: checksum (CRC-32) mod 10 is 0: val, 1: test, else train.

References keep their hyphens (`t-shirt`) and a vocabulary splits them (`t shirt`, data/caption_vocab.py), so a caption
never matches such a word, neither in the reward nor in the scores: a ceiling, as in M2.
"""

import csv
import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np

from utils.ptb_tokenizer import tokenize
from utils.run import UserError

SPLITS = ("train", "val", "test")
PARTS = {"train": "train", "restval": "train", "dev": "val", "val": "val", "test": "test"}  # of Karpathy and M2
LAST_IMAGE = 581_929  # the highest image id of COCO; annotation ids go up to 829,719
LAYOUTS = (
    "annotations/captions_train2014.json (or val, 2017) beside train2014/, or captions.txt or a csv with columns "
    "image,caption beside Images/"
)


@dataclass
class CaptionSet:
    """The images of one split. images: [{image_id: int (csv: str), file: Path, captions: [(annotation_id, text)]}]."""

    source: str
    split: str
    images: list[dict]
    dropped: dict[str, int] = field(default_factory=dict)  # {why: how many}
    instances: list[Path] = field(default_factory=list)  # COCO instance files of the same images, as far as they exist
    note: str = ""
    uncaptioned: list[int | str] = field(default_factory=list)  # ids of the images that were dropped

    def __len__(self) -> int:
        return len(self.images)

    def captions(self) -> list[str]:
        """All raw captions."""
        return [text for x in self.images for _, text in x["captions"]]

    def references(self) -> dict[int | str, list[str]]:
        """{image_id: captions as PTB tokens}: what the metrics and the CIDEr reward take. 80 us per caption."""
        return {x["image_id"]: [tokenize(text) for _, text in x["captions"]] for x in self.images}

    def summary(self) -> str:
        """One line: items, what was dropped and why."""
        n = sum(len(x["captions"]) for x in self.images)
        why = ", ".join(f"{k} {what}" for what, k in self.dropped.items() if k) or "nothing"
        return f"{self.source}: {self.split}, {len(self)} images, {n} captions{self.note}; dropped: {why}"


def load_captions(
    root: Path | str, *splits: str, ids: Path | str | None = None, karpathy: Path | str | None = None
) -> list[CaptionSet]:
    """The named splits, in this order, each file read once. UserError when a split or an image file is missing."""
    found = read_splits(root, ids, karpathy)
    for split in splits:
        check_files(_named(found, root, split))
    return [found[split] for split in splits]


def read_references(root: Path | str, split: str) -> tuple[dict[str, list[str]], set[str], set[str]]:
    """({image id as text: raw captions}, images without a caption, images of other splits); no image file is needed."""
    found = read_splits(root)
    references = {str(x["image_id"]): [t for _, t in x["captions"]] for x in _named(found, root, split).images}
    uncaptioned = {name: {str(i) for i in s.uncaptioned} for name, s in found.items()}
    others = {str(x["image_id"]) for name, s in found.items() if name != split for x in s.images}
    return references, uncaptioned[split], others.union(*uncaptioned.values()) - references.keys() - uncaptioned[split]


def _named(found: dict[str, CaptionSet], root: Path | str, split: str) -> CaptionSet:
    if split not in found:
        raise UserError(f"{root}: holds no split '{split}'; expected one of {', '.join(found)}")
    return found[split]


def read_splits(
    root: Path | str, ids: Path | str | None = None, karpathy: Path | str | None = None
) -> dict[str, CaptionSet]:
    """{split: its images} of everything below `root`; whether the image files exist is not looked at.

    ids: folder with coco_*_ids.npy, or an .npz with train, restval, dev, test. karpathy: dataset_coco.json. UserError
    says what was expected when the files are not understood.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected {LAYOUTS}")
    if ids is not None and karpathy is not None:
        raise UserError("ids and karpathy both choose the splits; give one of the two")
    if karpathy is not None:
        return _read_karpathy(root, Path(karpathy))
    if ids is not None:
        return _read_by_ids(root, Path(ids))
    if any((root / "annotations").glob("captions_*.json")):
        return _read_coco(root)
    tables = [root / "captions.txt"] if (root / "captions.txt").is_file() else sorted(root.glob("*.csv"))
    if len(tables) != 1:
        raise UserError(f"{root}: holds {len(tables)} csv files and no captions to choose by name; expected {LAYOUTS}")
    return _read_table(root, tables[0])


def check_files(captions: CaptionSet) -> None:
    """UserError with the first missing image file and their number."""
    folders = {x["file"].parent for x in captions.images}
    there = {folder / name for folder in folders if folder.is_dir() for name in os.listdir(folder)}
    missing = [x["file"] for x in captions.images if x["file"] not in there]
    if missing:
        n = f"{len(missing)} of {len(captions)} images of {captions.split}"
        raise UserError(f"{missing[0]}: no such image file, and {n} are missing; expected {LAYOUTS}")


def _build(source: str, split: str, images: dict, dropped: Counter, **more) -> CaptionSet:
    """The set of {image_id: {file, captions}}, images and captions by their ids. UserError when nothing is left."""
    kept, uncaptioned = [], []
    for i in sorted(images, key=lambda i: (isinstance(i, str), i)):
        captions = sorted((k, text) for k, text in images[i]["captions"] if text.strip())
        dropped["empty captions"] += len(images[i]["captions"]) - len(captions)
        dropped["images without a caption"] += not captions
        uncaptioned += [] if captions else [i]
        kept += [{"image_id": i, "file": images[i]["file"], "captions": captions}] if captions else []
    if not kept:
        why = ", ".join(f"{n} {what}" for what, n in dropped.items() if n) or "nothing was read"
        raise UserError(f"{source}: no image of {split} with a caption ({why}); check that the files belong together")
    return CaptionSet(source, split, kept, dict(dropped), uncaptioned=uncaptioned, **more)


def read_json(path: Path):
    """What a json file holds. UserError for a file that cannot be read or is something else."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: is not json ({e}); fetch it again") from e


# ---- COCO


def _folder(root: Path, name: str) -> Path:
    """root/NAME, or root/images/NAME where only that exists."""
    inside = root / "images" / name
    return inside if inside.is_dir() and not (root / name).is_dir() else root / name


def _coco_parts(root: Path) -> list[str]:
    """Names as train2017 of the caption files of one year. UserError when both years are complete enough to be used."""
    parts = [f"{s}{y}" for y in (2014, 2017) for s in ("train", "val")]
    parts = [p for p in parts if (root / "annotations" / f"captions_{p}.json").is_file()]
    if len({p[-4:] for p in parts}) == 2:
        years = {p[-4:] for p in parts if _folder(root, p).is_dir()}
        if len(years) != 1:
            raise UserError(f"{root}: holds the captions of 2014 and of 2017; keep one year, they are the same images")
        parts = [p for p in parts if p[-4:] in years]
    if not parts:
        raise UserError(f"{root}: holds no annotations/captions_*.json; expected {LAYOUTS}")
    return parts


def _coco_captions(root: Path, part: str) -> tuple[dict[int, dict], dict[int, tuple[int, str]]]:
    """({image_id: {file, captions: []}}, {annotation_id: (image_id, text)}) of one caption file."""
    path = root / "annotations" / f"captions_{part}.json"
    content, folder = read_json(path), _folder(root, part)
    try:
        images = {x["id"]: {"file": folder / x["file_name"], "captions": []} for x in content["images"]}
        annotations = {a["id"]: (a["image_id"], a["caption"]) for a in content["annotations"]}
    except (KeyError, TypeError) as e:
        raise UserError(
            f"{path}: is no COCO caption file ({type(e).__name__} {e}); expected images [{{id, file_name}}] and "
            "annotations [{id, image_id, caption}]"
        ) from e
    if len(annotations) < len(content["annotations"]):
        raise UserError(f"{path}: annotation ids stand in it twice; every caption needs an id of its own")
    wrong = [i for i in images if not isinstance(i, int | str)] + [k for k in annotations if not isinstance(k, int)]
    if wrong:
        raise UserError(f"{path}: an image or annotation has the id {wrong[0]!r}; expected whole numbers")
    for k, (i, text) in annotations.items():
        if not isinstance(i, int | str) or i not in images or not isinstance(text, str):
            raise UserError(f"{path}: annotation {k} names image {i}, which is not listed, or its caption is no text")
    return images, annotations


def _instances(root: Path, parts: list[str]) -> list[Path]:
    paths = [root / "annotations" / f"instances_{part}.json" for part in parts]
    return [p for p in paths if p.is_file()]


def _read_coco(root: Path) -> dict[str, CaptionSet]:
    found = {}
    for part in _coco_parts(root):
        images, annotations = _coco_captions(root, part)
        for k, (i, text) in annotations.items():
            images[i]["captions"].append((k, text))
        found[part[:-4]] = _build(str(root), part[:-4], images, Counter(), instances=_instances(root, [part]))
    return found


# ---- M2's annotation ids


def _read_ids(path: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """{train, restval, dev, test, as far as they exist: (file, ids (n,))} of a folder of .npy files or an .npz."""
    expected = "expected coco_{train,restval,dev,test}_ids.npy, or an .npz that holds train, restval, dev, test"
    packed = [path] if path.suffix == ".npz" else sorted(path.glob("*.npz"))
    single = {part: path / f"coco_{part}_ids.npy" for part in ("train", "restval", "dev", "test")}
    single = {part: p for part, p in single.items() if p.is_file()}
    try:
        if not single and len(packed) == 1:
            with np.load(packed[0], allow_pickle=False) as z:
                found = {part: (packed[0], z[part]) for part in ("train", "restval", "dev", "test") if part in z}
        else:
            found = {part: (p, np.load(p, allow_pickle=False)) for part, p in single.items()}
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{path}: holds ids that numpy cannot read ({e}); {expected}") from e
    if not found:
        raise UserError(f"{path}: holds no ids; {expected}")
    for part, (p, ids) in found.items():
        if ids.dtype.kind not in "iu" or ids.ndim != 1 or not len(ids):
            raise UserError(f"{p}: {part} is {ids.dtype} {ids.shape}; expected a list of whole numbers, annotation ids")
    return found


def _check_kind(path: Path, part: str, ids: np.ndarray, images: dict, annotations: dict) -> None:
    """UserError when `ids` are image ids. Both kinds are numbers below a million, so by chance many are in both lists.

    In COCO, annotation ids are found 6.7 times as often among the annotations as among the images, image ids 1.1 times,
    with all the files as well as with some of the images. With the files of another split neither is found, but only
    annotation ids go beyond LAST_IMAGE.
    """
    ids = set(ids.tolist())
    in_images, in_annotations = len(ids & images.keys()), len(ids & annotations.keys())
    if in_annotations < min(len(ids), 2.5 * in_images) and max(ids) <= LAST_IMAGE:
        raise UserError(
            f"{path}: {part}: these are image ids; expected annotation ids (annotations[].id of the caption files)"
        )


def _read_by_ids(root: Path, path: Path) -> dict[str, CaptionSet]:
    """Captions whose annotation id is listed. Ids of caption files that are not there are counted and left out."""
    images, annotations, parts = {}, {}, _coco_parts(root)
    for part in parts:
        own_images, own_annotations = _coco_captions(root, part)
        images, annotations = images | own_images, annotations | own_annotations
    chosen: dict[str, dict] = {}
    dropped: dict[str, Counter] = {}
    for part, (file, ids) in _read_ids(path).items():
        _check_kind(file, part, ids, images, annotations)
        split = chosen.setdefault(PARTS[part], {})
        known = [k for k in ids.tolist() if k in annotations]
        dropped.setdefault(PARTS[part], Counter())["annotation ids that no caption file here holds"] += len(ids) - len(
            known
        )
        for k in known:
            i, text = annotations[k]
            split.setdefault(i, {"file": images[i]["file"], "captions": []})["captions"].append((k, text))
    if not any(chosen.values()):
        raise UserError(f"{path}: none of its ids is in annotations/captions_{parts[0]}.json or its like; wrong files?")
    instances = _instances(root, parts)
    return {s: _build(str(path), s, chosen[s], dropped[s], instances=instances) for s in chosen if chosen[s]}


# ---- Karpathy's json


def _read_karpathy(root: Path, path: Path) -> dict[str, CaptionSet]:
    """Karpathy's file for COCO (cocoid), Flickr8k or Flickr30k (image_id: the file's stem). annotation_id: sentid."""
    content = read_json(path)
    names = {p: set(os.listdir(_folder(root, p))) for p in ("train2017", "val2017") if _folder(root, p).is_dir()}
    chosen: dict[str, dict] = {}
    try:
        for x in content["images"]:
            if "cocoid" in x:
                i, file = x["cocoid"], _folder(root, x["filepath"]) / x["filename"]
                if names and not file.parent.is_dir():  # the folders of 2017: other names, other division
                    name = f"{i:012d}.jpg"
                    file = _folder(root, next((p for p in names if name in names[p]), "train2017")) / name
            else:
                i, file = PurePath(x["filename"]).stem, _picture_folder(root) / x["filename"]
            captions = [(s["sentid"], s["raw"]) for s in x["sentences"]]
            if not (isinstance(i, int | str) and all(isinstance(k, int) and isinstance(t, str) for k, t in captions)):
                raise TypeError("an id is no whole number, or a raw caption no text")
            chosen.setdefault(PARTS[x["split"]], {})[i] = {"file": file, "captions": captions}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{path}: is not one of Karpathy's files ({type(e).__name__} {e}); expected images [{{filename, split in "
            "train|restval|val|test, sentences [{raw, sentid}]}], for COCO with filepath and cocoid"
        ) from e
    if not chosen:
        raise UserError(f"{path}: lists no images; expected one of Karpathy's files")
    parts = [p for p in ("train2014", "val2014", "train2017", "val2017") if _folder(root, p).is_dir()]
    instances = _instances(root, parts)
    return {s: _build(str(path), s, chosen[s], Counter(), instances=instances) for s in SPLITS if s in chosen}


# ---- csv


def _picture_folder(root: Path) -> Path:
    return next((root / name for name in ("Images", "images") if (root / name).is_dir()), root)


def _read_table(root: Path, path: Path) -> dict[str, CaptionSet]:
    """image_id: the file's name without suffix. annotation_id: the row, from 0."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.DictReader(f, strict=True)
            columns = {(name or "").strip().lower(): name for name in reader.fieldnames or []}
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read as csv ({e}); expected columns image,caption in UTF-8") from e
    image = columns.get("image", columns.get("file"))
    if image is None or "caption" not in columns or not rows:
        has = f"has {len(rows)} rows with the columns {', '.join(columns)}" if columns else "is empty"
        raise UserError(f"{path}: {has}; expected a row per caption with image (or file) and caption, or split")
    folder, chosen, split_of = _picture_folder(root), {}, {}
    for k, row in enumerate(rows):
        name, text = row[image], row[columns["caption"]]
        if None in row or None in row.values() or not name:
            raise UserError(f"{path}: row {k + 1} does not have {len(columns)} fields; quote captions with commas")
        split = SPLITS[{0: 1, 1: 2}.get(zlib.crc32(name.encode("utf-8")) % 10, 0)]
        if "split" in columns:
            split = row[columns["split"]].strip()
        if split not in SPLITS:
            raise UserError(f"{path}: row {k + 1} is of split '{split}'; expected {', '.join(SPLITS)}")
        if split_of.setdefault(name, split) != split:
            raise UserError(f"{path}: image {name} is in {split_of[name]} and in {split}; put it into one split")
        i = str(PurePath(name).with_suffix(""))
        item = chosen.setdefault(split, {}).setdefault(i, {"file": folder / name, "captions": []})
        if item["file"] != folder / name:
            raise UserError(f"{path}: {name} and {item['file'].name} differ in the suffix only; rename one of them")
        item["captions"].append((k, text))
    note = "" if "split" in columns else " (split by the file names)"
    return {s: _build(str(path), s, chosen[s], Counter(), note=note) for s in SPLITS if s in chosen}
