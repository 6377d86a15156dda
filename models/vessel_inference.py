"""Vessel probabilities of one picture, with the small U-Net or with Sa2VA, whole or from overlapping crops.

Shapes: picture (H, W, 3) uint8 RGB, boxes (N, 4) px of equal crops that cover it (`utils.crops.crop_grid`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.sa2va import Sa2VA
from models.sa2va_files import INDEX, WEIGHTS
from models.sa2va_lora import WEIGHTS as ADAPTER
from models.sa2va_video import resize_logits
from models.vessel_unet import VesselUNet
from utils import crops
from utils.field_of_view import fov_statistics
from utils.run import UserError, read_config


@dataclass
class Found:
    """Of one picture. prob (H, W) float32 in 0..1; answer: what Sa2VA said; grid: (rows, columns) of the logits over the
    whole picture before they were enlarged, None: one per pixel."""

    prob: np.ndarray
    answer: str | None = None
    grid: tuple[int, int] | None = None


def read_about(folder: Path | str) -> tuple[str, dict, Path]:
    """What a checkpoint folder holds: kind (vessel_unet or sa2va), config.json, and the file whose hash names its weights
    (an index of shards, an adapter). UserError for anything else."""
    folder, adapter = Path(folder), Path(folder) / ADAPTER
    config = read_config(folder, ADAPTER if adapter.is_file() else WEIGHTS)
    kinds = {"vessel_unet": config.get("model") == "vessel_unet", "sa2va": config.get("class") == Sa2VA.__name__}
    if True not in kinds.values():
        raise UserError(f"{folder}: holds neither a vessel U-Net nor a Sa2VA; take a checkpoint of one of them")
    files = (adapter, folder / INDEX, folder / WEIGHTS)
    return next(k for k, yes in kinds.items() if yes), config, next(f for f in files if f.is_file())


def boxes_of(image: np.ndarray, n: int, overlap: float) -> np.ndarray:
    """(n^2, 4) px: n x n crops of the picture that overlap by this share of their side; of 1 the whole picture."""
    H, W = image.shape[:2]
    return crops.crop_grid(H, W, crops.crop_size(H, W, n, overlap), overlap)


def find_with_unet(
    model: VesselUNet, image: np.ndarray, fov: np.ndarray, boxes: np.ndarray, tta: bool, dtype: torch.dtype
) -> Found:
    """Every crop is standardised as the whole photograph is. fov (H, W) bool; tta, dtype: as `VesselUNet.predict`."""
    known = fov_statistics(image, fov)
    parts = zip(crops.cut(image, boxes), crops.cut(fov, boxes), strict=True)
    probs = [model.predict(part, inside, tta, dtype, known) for part, inside in parts]
    return Found(probs[0] if len(boxes) == 1 else crops.blend(np.stack(probs), boxes, image.shape[:2]))


def find_with_sa2va(
    model: Sa2VA, image: np.ndarray, text: str, boxes: np.ndarray, force_seg: bool, max_new_tokens: int
) -> Found:
    """All objects of the answer to the whole picture together: the largest of their probabilities. Crops are drawn from
    the same [SEG] vectors, each at SAM 2's full input. An answer without [SEG] found nothing: probability 0."""
    said = model.predict(image, text, force_seg=force_seg, max_new_tokens=max_new_tokens)
    (H, W), side = image.shape[:2], said["logits"].shape[-1]
    if not said["seg_spans"]:
        return Found(np.zeros((H, W), np.float32), said["text"], (side, side))
    if len(boxes) == 1:
        return Found(said["probs"].amax(0).numpy(), said["text"], (side, side))
    w, h = (boxes[0, 2:] - boxes[0, :2]).tolist()
    logits, _ = model.masks_from_prompts(crops.cut(image, boxes), said["prompts"])  # (n, N, side, side)
    enlarged = (resize_logits(x, (h, w), model.sam.image_size) for x in logits.unbind(1))  # each (n, h, w)
    probs = np.stack([x.sigmoid().amax(0).cpu().numpy() for x in enlarged])
    return Found(crops.blend(probs, boxes, (H, W)), said["text"], (round(side * H / h), round(side * W / w)))
