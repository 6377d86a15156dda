"""Losses of mask prediction at sampled points: classes, binary cross-entropy, dice and mask quality.

Shapes: B images or clips, N predictions, R matched pairs of the whole batch, P points, K classes. A clip's masks
(R, T, h, w) are read as one image of T h rows. Everything is computed in float32, whatever autocast says; without any
target each loss is 0 with a gradient of 0, never NaN.
Sources: Kirillov et al., PointRend, CVPR 2020 (points); Cheng et al., Mask2Former, CVPR 2022 (losses and weights).
"""

import torch
import torch.nn.functional as F

RIGHT = -100.0  # logit of a point that counts as right where the target is 0: loss 0, probability 0
WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0, "iou": 10.0, "pixels": 1.0}  # of RAP-SAM; pixels: of K-Net


def sample_points(masks: torch.Tensor, xy_01: torch.Tensor) -> torch.Tensor:
    """masks (R, h, w) or (R, T, h, w), bool or float; points xy_01 (R, P, 2), or (1, P, 2) shared by all -> (R, P).

    Bilinear; (0, 0) is the outer corner of the first pixel, and beyond the border is 0. Float32.
    """
    masks = masks.flatten(1, -2).float()  # (R, T h, w)
    shared = xy_01.shape[0] == 1
    masks = masks[None] if shared else masks[:, None]  # points shared: one image of R channels
    with torch.autocast(masks.device.type, enabled=False):
        found = F.grid_sample(masks, 2 * xy_01.float()[:, :, None] - 1, align_corners=False)  # (1 or R, R or 1, P, 1)
    return found[0, :, :, 0] if shared else found[:, 0, :, 0]


@torch.no_grad()
def uncertain_points(
    masks: torch.Tensor,
    points: int,
    oversample: float = 3.0,
    importance: float = 0.75,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Where to look: of oversample x points uniform places, the importance x points with the smallest |logit|, and
    fresh uniform ones for the rest. masks (R, h, w) or (R, T, h, w) logits -> xy_01 (R, points, 2)."""
    R, candidates, chosen = len(masks), int(points * oversample), int(points * importance)
    if oversample < importance or not 0 <= importance <= 1:
        raise ValueError(f"uncertain_points: oversample {oversample}, importance {importance}")
    xy_01 = torch.rand(R, candidates, 2, generator=generator, device=masks.device)
    nearest = sample_points(masks, xy_01).abs().topk(chosen, dim=1, largest=False).indices  # (R, chosen)
    kept = xy_01.gather(1, nearest[..., None].expand(-1, -1, 2))
    rest = torch.rand(R, points - chosen, 2, generator=generator, device=masks.device)
    return torch.cat([kept, rest], 1)


def class_loss(logits: torch.Tensor, labels: torch.Tensor, no_object: float = 0.1) -> torch.Tensor:
    """Cross-entropy of logits (..., K + 1) and labels (...) in 0..K, mean by weight; K: no object, weight `no_object`.

    Label -1 (an object of unknown class) has weight 0.
    """
    logits, labels = logits.float().flatten(0, -2), labels.flatten()
    K = logits.shape[-1] - 1
    weight = (labels >= 0).float() * torch.where(labels == K, no_object, 1.0)
    loss = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
    return (weight * loss).sum() / weight.sum().clamp_min(1e-6)


def pixel_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of cells that have a class, mean by share: logits (K, S), shares (K, S) of each cell in 0..1."""
    return -(shares * logits.float().log_softmax(0)).sum() / shares.sum().clamp_min(1)


def bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each pair: logits (R, P), targets (R, P) in [0, 1] -> (R,)."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(1)


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - (2 <s, t> + 1) / (|s| + |t| + 1), s = sigmoid, of each pair: (R, P), (R, P) -> (R,)."""
    s, targets = logits.float().sigmoid(), targets.float()
    return 1 - (2 * (s * targets).sum(1) + 1) / (s.sum(1) + targets.sum(1) + 1)


def mask_losses(
    masks: torch.Tensor,
    targets: torch.Tensor,
    num_masks: float | torch.Tensor | None = None,
    points: int = 12544,
    generator: torch.Generator | None = None,
    ignore: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matched pairs: logits (R, h, w) or (R, T, h, w) and targets of any size, bool or float -> BCE and dice, scalars.

    Sums over the pairs, divided by num_masks: the number of targets, averaged over ranks; None: R. Masks and targets
    cover the same area, padding included. ignore (H, W) or (T, H, W) bool, for all pairs: a point there counts as right.
    """
    xy_01 = uncertain_points(masks, points, generator=generator)
    ours, theirs = sample_points(masks, xy_01), sample_points(targets, xy_01)
    if ignore is not None:
        unknown = sample_points(ignore[None], xy_01.reshape(1, -1, 2)).reshape(ours.shape) > 0.5
        ours, theirs = ours.masked_fill(unknown, RIGHT), theirs.masked_fill(unknown, 0.0)
    return mean_over(bce_loss(ours, theirs), num_masks), mean_over(dice_loss(ours, theirs), num_masks)


def mean_over(losses: torch.Tensor, num_masks: float | torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the pairs' losses (R,) divided by num_masks, at least 1; None: by R."""
    n = torch.as_tensor(len(losses) if num_masks is None else num_masks, device=losses.device)
    return losses.sum() / n.clamp_min(1)


def iou_loss(predicted: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Squared error of the IoU head, predicted (R,), against what the masks reached, quality (R,) in [0, 1] -> (R,)."""
    return (predicted.float() - quality.detach().float()).square()


def mask_iou(masks: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of logits (R, ..., h, w) > 0 and targets of the same shape, bool or float; 1 where both are empty -> (R,)."""
    ours, theirs = (masks > 0).flatten(1), (targets > 0.5).flatten(1)
    both, either = (ours & theirs).sum(1), (ours | theirs).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)
