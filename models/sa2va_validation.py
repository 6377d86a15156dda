"""Sa2VA asked for vessels and for the background in whole photographs while it is trained: Dice, controls, pictures.

Shapes: photograph (H, W, 3) uint8, truth, fov (field of view) and masks (H, W) bool, probabilities (H, W).
"""

from collections.abc import Sequence

import numpy as np

from models.sa2va import Sa2VA
from models.vessel_inference import boxes_of, find_with_sa2va
from utils import overlay
from utils.crops import crop_size

THRESHOLDS = np.arange(5, 96) / 100  # among which a checkpoint's own is chosen
SHOWN, SIDE, OVERLAP = 3, 480, 0.25  # rows of the picture, px of the middle of each; of crops with the next
LONGEST = 32  # tokens of an answer


def dice_curve(prob: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """Dice inside fov of `prob > threshold` for each of THRESHOLDS."""
    p, t = prob[fov], truth[fov]
    hits = np.array([np.count_nonzero(p[t] > x) for x in THRESHOLDS])
    found = np.array([np.count_nonzero(p > x) for x in THRESHOLDS])
    return 2 * hits / np.maximum(found + t.sum(), 1)


def crops_per_side(size: tuple[int, int], patch: int) -> int:
    """The fewest crops per side that are at most a patch large; 1 for whole pictures."""
    n = 1
    while patch and max(crop_size(*size, n, OVERLAP)) > patch:
        n += 1
    return n


def validate(model: Sa2VA, items: Sequence, ask: Sequence[str], patch: int) -> tuple[dict, list[np.ndarray]]:
    """Mean Dice of whole pictures asked for their first object, and for the background; controls; pictures.

    items: records with load() (data/vessel_items.py); ask: each one's question for its first object, and at last the
    question for the background; patch: px, crops are at most as large.
    swapped: the background's mask against the object. shuffled: the object's mask against the next picture's truth.
    said: share of questions that were answered with [SEG]; an answer without is a mask without a pixel.
    """
    half, found, shown, last = int(np.searchsorted(THRESHOLDS, 0.5)), [], [], None
    rows: dict[str, list] = {"background": [], "swapped": [], "shuffled": [], "said": []}
    for k, item in enumerate([*items, items[0]]):  # the first truth again, for the last picture's shuffled control
        x = item.load()
        truth, fov = x["masks"][0], x["fov"]
        if last is not None and len(items) > 1 and last.shape == truth.shape:
            rows["shuffled"].append(dice_curve(last, truth, fov)[half])
        if k == len(items):
            break
        boxes = boxes_of(x["image"], crops_per_side(fov.shape, patch), OVERLAP)
        asked = [find_with_sa2va(model, x["image"], text, boxes, False, LONGEST) for text in (ask[k], ask[-1])]
        last, other = (f.prob for f in asked)
        found.append(dice_curve(last, truth, fov))
        rows["background"].append(dice_curve(other, ~x["mask"], fov)[half])
        rows["swapped"].append(dice_curve(other, truth, fov)[half])
        rows["said"] += ["[SEG]" in f.answer for f in asked]
        if len(shown) < SHOWN:
            shown.append(draw(x["image"], truth, fov, last > 0.5, other > 0.5))
    mean = np.mean(found, 0)  # over the pictures, one per threshold
    best = int(mean.argmax())
    values = {"dice_at_half": mean[half], "dice_at_chosen": mean[best], "threshold": THRESHOLDS[best]}
    return {k: float(np.mean(v)) for k, v in (values | rows).items() if np.size(v)} | {"n": len(items)}, shown


def draw(image: np.ndarray, truth: np.ndarray, fov: np.ndarray, pred: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The middle of a picture; the object found (green), missed (blue), invented (red); the background's mask."""
    H, W = truth.shape
    part = np.s_[max(0, (H - SIDE) // 2) :, max(0, (W - SIDE) // 2) :]
    image, pred, truth, other = (a[part][:SIDE, :SIDE] for a in (image, pred & fov, truth & fov, other))
    errors = image
    for where, k in ((pred & truth, 3), (truth & ~pred, 1), (pred & ~truth, 2)):
        errors = overlay.mask(errors, where, overlay.colour(k), alpha=0.75, outline=False)
    return np.concatenate([image, errors, overlay.mask(image, other, overlay.colour(4), alpha=0.6, outline=False)], 1)
