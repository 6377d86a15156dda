"""Losses of Sa2VA: language, and binary cross-entropy + dice (+ clDice) of each mask.

Shapes: n masks, h x w the grid of the logits, H x W that of the truth. Everything is computed in float32.
Sources: Yuan et al., Sa2VA, arXiv 2501.04001 (weights); Kirillov et al., PointRend, CVPR 2020 (points); Shit et al.,
clDice, CVPR 2021 (soft skeleton).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.mask_losses import bce_loss, dice_loss, sample_points, uncertain_points
from models.sa2va_processor import IGNORE
from models.sa2va_video import resize_logits
from utils.vessel_metrics import soft_skeleton

TARGETS, BALANCES = ("mask", "grid", "area"), ("mask", "official5")
OBJECTS = 5  # that the released training brings each sample to


@dataclass
class LossConfig:
    """Weights and where the masks are compared. `LossConfig(target="grid", balance="official5")` is as released."""

    lm: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    cldice: float = 0.0  # for vessels; as strong as dice in its paper
    target: str = "mask"  # mask: at the truth's size | grid: truth cut down to the logits by nearest | area: by means
    points: int = 0  # > 0: BCE and dice at so many points (released: 12544), three quarters where it is uncertain
    balance: str = "mask"  # mask: every mask counts alike | official5: every sample's objects repeated to 5

    def __post_init__(self):
        if self.target not in TARGETS or self.balance not in BALANCES or self.points < 0:
            raise ValueError(f"LossConfig: target {self.target!r}, balance {self.balance!r}, {self.points} points; "
                             f"expected one of {TARGETS}, one of {BALANCES}, and 0 or more")  # fmt: skip


def language_loss(head: torch.nn.Module, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the labelled tokens, their mean over the batch; 0 without any. h (B, L, D), labels (B, L).
    The head runs on labelled positions only."""
    follows = labels[:, 1:]
    kept = follows != IGNORE
    logits = head(h[:, :-1][kept]).float()  # (labelled, vocabulary)
    return F.cross_entropy(logits, follows[kept], reduction="sum") / kept.sum().clamp_min(1)


def each_mask(logits: torch.Tensor, masks: torch.Tensor, cfg: LossConfig, side: int) -> dict[str, torch.Tensor]:
    """Losses of each mask, each (n,): logits (n, h, w), masks bool (n, H, W) of any size; side: SAM 2's R."""
    if cfg.target == "mask":
        x, truth = resize_logits(logits, masks.shape[-2:], side), masks.float()
    else:
        mode = {"grid": "nearest", "area": "area"}[cfg.target]
        x, truth = logits.float(), F.interpolate(masks.float()[:, None], logits.shape[-2:], mode=mode)[:, 0]
    found = {"cldice": soft_cldice_loss(x.sigmoid(), truth)} if cfg.cldice else {}
    if cfg.points:
        xy_01 = uncertain_points(x.detach(), cfg.points)
        x, truth = sample_points(x, xy_01), sample_points(truth, xy_01)
    x, truth = x.flatten(1), truth.flatten(1)
    return found | {"bce": bce_loss(x, truth), "dice": dice_loss(x, truth)}


def repeated(objects: int) -> list[int]:
    """Which of a sample's masks count, and how often: 5 of them, cyclically repeated, or 5 drawn at random."""
    if objects > OBJECTS:
        return torch.randperm(objects)[:OBJECTS].tolist()
    return [k % objects for k in range(OBJECTS)] if objects else []


def soft_cldice_loss(p: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 - clDice of probabilities and truth, both (n, H, W) in 0..1 -> (n,). Smoothing 1."""
    ours, theirs = (soft_skeleton(x[:, None])[:, 0] for x in (p, truth))
    precision = ((ours * truth).sum((1, 2)) + 1) / (ours.sum((1, 2)) + 1)
    sensitivity = ((theirs * p).sum((1, 2)) + 1) / (theirs.sum((1, 2)) + 1)
    return 1 - 2 * precision * sensitivity / (precision + sensitivity)
