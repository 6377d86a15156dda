"""Anybody's pictures with named objects: manifest.jsonl, one picture per line, and the questions training asks of them.

    {"image": "a.png", "mask": "a_vessels.png", "fov": "a_fov.png", "patient": "p1", "split": "train"}
    {"image": "b.png", "mask": ["b1.png", {"size": [H, W], "counts": "..."}], "text": ["the artery", "the vein"]}

image    file, relative to the manifest's folder, as all files
mask     one per text: a mask file (grey, 0 and 1 or 0 and 255), a COCO RLE code (size [H, W]), or, where polygons are
         allowed explicitly, a list of polygons [[x1, y1, x2, y2, ...], ...] in px. A list of masks needs a list of texts
text     what the mask shows, a noun phrase or a list of them; absent: "the blood vessels"
fov      mask file of the field of view; "all": the whole picture; absent: estimated from the picture
second   mask file of a second observer;  name: of the prediction file (absent: the picture's name without suffix)
patient  absent: a patient per picture;  split: train, val or test (absent: train)
empty    true (or a list, one per mask): the mask may have no pixel, the object is not in the picture

Polygons cannot hold holes, and loops of a vessel tree get filled: masks made back from outer contours had Dice
0.47..0.60 with the true masks (Sa2VA on vessels, section 9). What they hide is measured and noted.
"""

import json
from pathlib import Path

import numpy as np
from scipy import ndimage

from data.vessel_items import SPLITS, VESSELS, VesselItem, VesselSet, coded_mask, open_picture
from utils.run import UserError

KEYS = {"image", "mask", "text", "fov", "second", "name", "patient", "split", "empty"}


def read_manifest(path: Path | str, polygons: bool = False) -> VesselSet:
    """The records of a manifest, or of the manifest.jsonl in a folder; pictures and masks are read when a record loads.

    polygons: accept them, and note what they hide. UserError in one sentence with file and line for the first problem.
    """
    path = Path(path)
    path = path / "manifest.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e}), expected a manifest; check the path") from e
    found = VesselSet([], "manifest", path)
    for k, line in enumerate(lines, 1):
        if line.strip():
            found.items.append(record(path, f"{path}, line {k}", line, polygons))
    unnamed = sum(not x.patient for x in found.items)
    if unnamed:
        found.notes.append(f"{unnamed} of {len(found)} lines name no patient: each of them counts as a patient")
    outlined = [x for x in found.items if any(isinstance(m, list) for m in x.annotation)]
    if outlined:
        found.notes.append(measure(outlined))
    return found


def record(path: Path, where: str, line: str, polygons: bool) -> VesselItem:
    """One line as a record. UserError for keys, types or numbers that are not as above."""
    try:
        x = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: is not json ({e}), expected an object per line; correct it") from e
    if not isinstance(x, dict) or not isinstance(x.get("image"), str) or "mask" not in x or set(x) - KEYS:
        said = f"keys {', '.join(sorted(x))}" if isinstance(x, dict) else type(x).__name__
        raise UserError(f"{where}: has {said}, expected image and mask, and of {', '.join(sorted(KEYS))}; correct it")
    for key in ("fov", "second", "name", "patient", "split"):
        if not isinstance(x.get(key, ""), str):
            raise UserError(f"{where}: {key} is {json.dumps(x[key])}, expected text in quotes; correct it")
    if x.get("name", "x") in ("", ".", "..") or set(x.get("name", "")) & {"/", "\\"}:
        raise UserError(f"{where}: name '{x['name']}', expected one that a file can have; rename it")
    if x.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: split '{x['split']}', expected one of {', '.join(SPLITS)}; rename it")
    text, masks = x.get("text", VESSELS), x["mask"]
    several = isinstance(text, list)
    texts = text if several else [text]
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts) or len({*texts}) < len(texts):
        raise UserError(f"{where}: text is {json.dumps(text)}, expected words, or a list without repeats; correct it")
    if several and not isinstance(masks, list):
        masks = [masks]
    masks = masks if several else [masks]
    if len(masks) != len(texts):
        raise UserError(
            f"{where}: {len(masks)} masks for {len(texts)} texts, expected as many; complete or remove some"
        )
    empty = x.get("empty", False)
    empties = empty if isinstance(empty, list) else [empty] * len(texts)
    if len(empties) != len(texts) or not all(isinstance(e, bool) for e in empties):
        raise UserError(f"{where}: empty is {json.dumps(empty)}, expected true or false, or one per mask; correct it")
    folder, fov = path.parent, x.get("fov")
    sources = tuple(source(m, folder, where, polygons) for m in masks)
    return VesselItem(
        x.get("name", Path(x["image"]).stem), folder / x["image"],
        mask_path=sources[0] if len(sources) == 1 and isinstance(sources[0], Path) else None, annotation=sources,
        fov_path=None if fov in (None, "all") else present(folder / fov, where),
        second_path=present(folder / x["second"], where) if "second" in x else None, patient=x.get("patient", ""),
        split=x.get("split", "train"), text=tuple(t.strip() for t in texts), whole=fov == "all", empty=tuple(empties),
        where=where,
    )  # fmt: skip


def present(file: Path, where: str) -> Path:
    """The path itself. UserError when it is no file."""
    if not file.is_file():
        raise UserError(f"{where}: names {file}, which is no file, expected a mask; correct the name")
    return file


def counted(code) -> bool:
    """Whether this is a COCO RLE code by its form: two sides, runs as text or as whole numbers."""
    if not isinstance(code, dict) or not isinstance(code.get("size"), list):
        return False
    numbers = [*code["size"], *(code["counts"] if isinstance(code.get("counts"), list) else ())]
    whole = all(type(n) is int and 0 <= n < 2**31 for n in numbers)
    return len(code["size"]) == 2 and whole and isinstance(code.get("counts"), str | list)


def source(mask, folder: Path, where: str, polygons: bool) -> Path | dict | list:
    """A mask of a line: its file, its code, its polygons. UserError for anything else."""
    if isinstance(mask, str):
        return present(folder / mask, where)
    if counted(mask):
        return {"size": mask["size"], "counts": mask["counts"]}
    numbers = isinstance(mask, list) and all(
        isinstance(p, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in p) for p in mask
    )
    if not numbers:
        raise UserError(
            f"{where}: the mask is {json.dumps(mask)[:60]}, expected a file, an RLE code or polygons, and a list of "
            "masks only with a list of texts; correct it"
        )
    if not polygons:
        raise UserError(
            f"{where}: the mask is of polygons, which fill the loops of a vessel tree, expected a mask file or RLE; "
            "write those, or allow polygons explicitly (--polygons)"
        )
    return mask


def measure(items: list[VesselItem]) -> str:
    """A sentence with what the polygons of these records hide. UserError for one that is refused."""
    drawn, united, double, nested, widest = 0, 0, 0, 0, 0.0
    for x in items:
        size = open_picture(x.image_path).size[::-1]
        for code in (m for m in x.annotation if isinstance(m, list)):
            whole = coded_mask(code, size, x.where, empty=True)
            each = [coded_mask([p], size, x.where, empty=True) for p in code]
            count = np.sum(each, 0) if each else np.zeros(size, int)
            drawn, united, double = drawn + count.sum(), united + whole.sum(), double + (count > 1).sum()
            nested += sum(bool(m.any()) and bool((count[m] > 1).all()) for m in each)
            widest = max(widest, 2 * ndimage.distance_transform_edt(np.pad(whole, 1)).max())
    return (
        f"WARNING {len(items)} pictures have polygons for masks: their areas sum to {drawn / max(united, 1):.3f} times "
        f"the united masks, {double} px lie in more than one (values above 1 where they are added), {nested} polygons "
        f"lie wholly inside others (holes that polygons cannot express), the widest place measures {widest:.0f} px "
        "(filled loops, if vessels are thinner)"
    )
