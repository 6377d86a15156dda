"""Segments on their way to files and pictures.

Shapes: n points, N masks, H W image. Points are x y in px, pixel centres whole. Formats: COCO panoptic (PNG with
id = R + 256 G + 65536 B, 0 void, and segments_info), semantic PNG (the category id of each pixel, 8 or 16 bits).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from utils import overlay
from utils.click_simulator import clicked_discs, deepest
from utils.run import writing

ON, BESIDE = (90, 230, 130), (255, 92, 92)  # colours of clicks


# ---- files


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """(H, W) uint8 or uint16, or (H, W, 3) uint8 -> a PNG, in a folder that is made. OSError names the path."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, format="png")


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) in 0..2**24 - 1 -> (H, W, 3) uint8, as COCO panoptic stores them."""
    return np.stack([ids, ids >> 8, ids >> 16], -1).astype(np.uint8)


def number_segments(values: np.ndarray, found: dict[str, np.ndarray], categories: list[int]):
    """Panoptic map -> ids (H, W) int64 and segments_info, as COCO panoptic has them.

    values (H, W): the value of each pixel's segment, K = len(categories) where there is none; found: value, label, score
    (S,) of the segments, several of one value where stuff was found in parts. Ids count from 1; segments without a
    pixel are left out; score is the highest of the parts.
    """
    present, place = np.unique(values, return_inverse=True)
    segments, number = [], np.zeros(len(present), np.int64)
    for k, value in enumerate(present):
        parts = found["value"] == value
        if not parts.any():
            continue  # void
        number[k] = len(segments) + 1
        own = values == value
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]  # x y width height
        segments.append({
            "id": len(segments) + 1, "category_id": categories[found["label"][parts][0]], "area": int(own.sum()),
            "bbox": [int(x) for x in box], "iscrowd": 0, "score": round(float(found["score"][parts].max()), 6),
        })  # fmt: skip
    return number[place.reshape(values.shape)], segments


def category_map(classes: np.ndarray, categories: list[int]) -> np.ndarray:
    """Class of each pixel (H, W) -> its category id, uint8, or uint16 where an id is above 255."""
    table = np.array(categories, np.uint16 if max(categories) > 255 else np.uint8)
    return table[classes]


def with_categories(entries: list[dict], names: list[str], categories: list[int], is_thing: list[bool]) -> dict:
    """The json of results that have a PNG each: {"annotations", "categories"}."""
    rows = zip(categories, names, is_thing, strict=True)
    return {"annotations": entries, "categories": [{"id": i, "name": n, "isthing": int(t)} for i, n, t in rows]}


# ---- pictures


def draw_masks(image: np.ndarray, masks: np.ndarray, names: list[str], colours: list[int] | None = None) -> np.ndarray:
    """Tint each of masks (N, H, W) bool, in order, and write its name at its deepest point; empty ones are not drawn.
    colours: number of each one's colour, None: 0, 1, ..."""
    colours = colours or range(len(masks))
    for k, mask in zip(colours, masks, strict=True):
        image = overlay.mask(image, mask, overlay.colour(k))
    for k, mask, name in zip(colours, masks, names, strict=True):
        if name and mask.any():
            image = overlay.text(image, deepest(mask)[1], name, overlay.colour(k), anchor="mm")
    return image


def draw_prompt(image: np.ndarray, prompt: dict) -> np.ndarray:
    """What points at an object (utils/segment_inputs.py): its box, and clicks, green on the object, red beside it."""
    if "box" in prompt:
        image = overlay.box(image, prompt["box"], ON)
    radius = 4 * overlay.unit(image)
    for x, y, label in prompt.get("points", ()):
        for size, colour in ((radius + 1, overlay.BLACK), (radius, ON if label else BESIDE)):
            disc = clicked_discs(np.array([[[x, y]]]), np.ones((1, 1), int), image.shape[:2], size)[0]
            image = overlay.mask(image, disc, colour, 1.0, outline=False)
    return image
