"""Files of segmentation scores: json and PNG with errors of one sentence, and the exchange behind shuffled controls."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from utils.masks import to_rle
from utils.panoptic_quality import VOID, areas, joint_counts
from utils.run import UserError


def read_json(flag: str, path: str | Path):
    """Content of a json file; UserError names the flag and what is wrong with the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be read ({e.strerror}); check the path") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} {path}: is not json ({e})") from e


def refuse_same_file(pred: str | Path, labels: str | Path) -> None:
    """UserError when the predictions are the label file itself or a copy of it."""
    pred, labels = Path(pred), Path(labels)
    if pred.is_file() and labels.is_file() and pred.read_bytes() == labels.read_bytes():
        raise UserError(f"--pred {pred}: is the label file {labels}; pass what eval/infer_segment.py wrote")


def need(where: str, items, fields: dict[str, type], expected: str) -> list[dict]:
    """`items`, when it is a list of objects that hold `fields` of these types; UserError otherwise."""
    if not isinstance(items, list):
        raise UserError(f"{where}: expected {expected}")
    for k, x in enumerate(items):
        for name, kind in fields.items():
            if not (isinstance(x, dict) and isinstance(x.get(name), kind)):
                raise UserError(f"{where}: item {k} lacks '{name}' or it is of another type; expected {expected}")
    return items


def same_items(where: str, what: str, pred: set, labels: set) -> None:
    """UserError unless predictions and labels hold the same items; `what` names one, such as 'image'."""
    missing, extra = sorted(map(str, labels - pred)), sorted(map(str, pred - labels))
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(labels)} {what}s are missing, as {missing[0]}; predict them")
    if extra:
        raise UserError(f"{where}: {len(extra)} {what}s are not in the labels, as {extra[0]}; leave them out")


def read_png(path: str | Path) -> np.ndarray:
    """A PNG as stored: (H, W) of palette indices or grey levels, (H, W, C) of colours. UserError if unreadable."""
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a picture ({e.strerror or e}); check the path") from e


def png_size(path: str | Path) -> tuple[int, int]:
    """(H, W) of a picture, from its header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a picture ({e.strerror or e}); check the path") from e


def read_ids(path: str | Path) -> np.ndarray:
    """COCO's panoptic PNG -> ids (H, W) int64, R + 256 G + 65536 B, 0 = void. UserError unless RGB."""
    rgb = read_png(path)
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise UserError(f"{path}: has shape {rgb.shape}; expected an RGB PNG with id = R + 256 G + 65536 B")
    return rgb.astype(np.int64) @ np.array([1, 256, 65536])


def read_objects(path: str | Path) -> np.ndarray:
    """A palette or grey PNG -> object of every pixel, (H, W) uint8. UserError for colours."""
    ids = read_png(path)
    if ids.ndim != 2:
        raise UserError(f"{path}: has shape {ids.shape}; expected a palette PNG, one object id a pixel")
    return ids.astype(np.uint8)


def runs_of(counts: str) -> np.ndarray:
    """Run lengths (R,) int64 of a compressed code, whatever it holds: 5 bits a character, differences from the third."""
    chunk = np.frombuffer(counts.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not len(chunk) or chunk.min() < 0 or chunk.max() > 63 or chunk[-1] & 32:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.append(True, ~(chunk & 32).astype(bool))[:-1])  # a number ends where bit 6 is not set
    sizes = np.diff(starts, append=len(chunk))
    place = 5 * (np.arange(len(chunk)) - np.repeat(starts, sizes))  # bits
    values = np.add.reduceat((chunk & 31) << np.minimum(place, 55), starts)
    runs = values - np.where(chunk[starts + sizes - 1] & 16, 1 << np.minimum(5 * sizes, 60), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def checked_rle(segmentation: dict | list, height: int, width: int) -> dict:
    """`to_rle` for masks of a file. ValueError also for damaged counts, of which pycocotools would make some mask."""
    code = to_rle(segmentation, height, width)
    runs = runs_of(code["counts"])
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"counts do not describe {height} x {width} pixels, so they are damaged")
    return code


def tube_of(where: str, x: dict, kind: str, size: tuple) -> list[dict | None]:
    """Codes of an annotation or prediction, one a frame. UserError for another size, length or form."""
    masks = x["segmentations"] if kind == "video" else [x["segmentation"]]
    if len(masks) != size[2]:
        raise UserError(
            f"{where}: has {len(masks)} masks, {kind} {x[kind + '_id']} has {size[2]} frames; expected one each"
        )
    for s in masks:
        form = isinstance(s, list) or (isinstance(s, dict) and {"size", "counts"} <= s.keys())
        if not form and not (s is None and kind == "video"):
            raise UserError(f'{where}: holds a mask that is no RLE; expected {{"size": [H, W], "counts": ...}}')
    try:
        return [None if s is None else checked_rle(s, *size[:2]) for s in masks]
    except ValueError as e:
        raise UserError(f"{where}: {e}; write masks at the size of the {kind}") from e


# ---- COCO panoptic


def read_panoptic(where: str, content, folder: Path, needed: tuple, is_video: bool) -> dict[str, list]:
    """{image or video: [(file name, PNG, {id: segment}) of each frame]}; segments hold `needed`. UserError otherwise."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    expected = '{"annotations": [{"image_id", "file_name", "segments_info"}]}, as COCO panoptic has it'
    if is_video:
        expected = '{"annotations": [{"video_id", "annotations": [{"file_name", "segments_info"}]}]}, as VIPSeg has it'
    named = {"video_id": int | str, "annotations": list} if is_video else {"image_id": int | str}
    items = {}
    for entry in need(where, annotations, named, expected):
        name = str(entry["video_id" if is_video else "image_id"])
        if name in items:
            raise UserError(f"{where}: {name} is there twice; expected one entry for each image or video")
        items[name] = []
        frames = entry["annotations"] if is_video else [entry]
        for a in need(f"{where}: {name}", frames, {"file_name": str, "segments_info": list}, expected):
            place = f"{where}: {a['file_name']}"
            kinds = {name: int | float if name == "area" else int for name in needed}
            listed = need(place, a["segments_info"], kinds, f"segments with {', '.join(needed)}")
            segments = {s["id"]: {k: s[k] for k in needed} for s in listed}
            png = folder / name / a["file_name"] if is_video else folder / a["file_name"]
            items[name].append((a["file_name"], png, segments))
    if not items:
        raise UserError(f"{where}: holds no annotation; expected {expected}")
    return items


def check_segments(png: Path, pixels: dict[int, int], segments: dict, categories: dict) -> None:
    """UserError unless the ids of a PNG are those of its json and the categories are known."""
    for i in sorted(pixels.keys() - segments.keys() - {VOID}):
        raise UserError(f"{png}: holds id {i}, which the json does not list; write PNG and json together")
    for i in sorted(segments.keys() - pixels.keys()):
        raise UserError(f"{png}: lacks id {i}, which the json lists; leave segments without pixels out")
    for i, s in segments.items():
        if s["category_id"] not in categories:
            raise UserError(f"{png}: segment {i} has category {s['category_id']}, which the labels do not know")


def compare_panoptic(gt_frames: list, pred_frames: list, categories: dict) -> list[tuple[Counter, dict, dict]]:
    """(joint counts, label segments, predicted segments) of each frame of an item. UserError if they do not fit."""
    frames = []
    for (_, gt_png, gt), (_, pred_png, pred) in zip(gt_frames, pred_frames, strict=True):
        maps = read_ids(gt_png), read_ids(pred_png)
        if maps[0].shape != maps[1].shape:
            sizes = [" x ".join(map(str, x.shape)) for x in maps]
            raise UserError(f"{pred_png}: is {sizes[1]} (H x W), its labels are {sizes[0]}; resize it to them")
        joint = joint_counts(*maps)
        pixels = areas(joint, 1)
        check_segments(gt_png, areas(joint, 0), gt, categories)
        check_segments(pred_png, pixels, pred, categories)
        frames.append((joint, gt, {i: {**s, "area": pixels[i]} for i, s in pred.items()}))
    return frames


# ---- controls


def exchange(groups: dict, seed: int = 0) -> dict:
    """{item: another item of its group} for every item that is not alone in its group; nobody keeps its own.

    groups: {item: what must agree between items that change places, such as the image size}.
    """
    members = defaultdict(list)
    for item, group in groups.items():
        members[group].append(item)
    rng, source = random.Random(seed), {}
    for items in members.values():
        order = rng.sample(items, len(items))
        if len(order) > 1:
            source |= {order[i]: order[i - 1] for i in range(len(order))}
    return source
