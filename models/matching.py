"""Who is whom: Hungarian matching of predictions to targets, and of one clip's queries to those of the clip before.

Shapes: N predictions, M targets, P points, K classes, D width. Everything is computed in float32 without gradient.
Sources: Cheng et al., Mask2Former, CVPR 2022 (costs at sampled points); Huang et al., MinVIS, NeurIPS 2022 (queries).
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from models.mask_losses import sample_points

NO_MATCH = 1e6  # stands for a cost that is not finite


def class_cost(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits (N, K + 1), labels (M,) int64 in 0..K-1, or -1 where the class is unknown -> minus the probability (N, M),
    0 for an unknown class."""
    probability = logits.float().softmax(-1)[:, labels.clamp_min(0)]
    return -probability.masked_fill(labels < 0, 0.0)


def bce_cost(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy of logits (N, P) and targets (M, P) in [0, 1], all pairs: (N, M)."""
    logits, targets = logits.float(), targets.float()
    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    return (F.softplus(logits).sum(1, keepdim=True) - logits @ targets.T) / logits.shape[1]


def dice_cost(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - (2 <s, t> + 1) / (|s| + |t| + 1), s = sigmoid, all pairs of logits (N, P) and targets (M, P): (N, M)."""
    s, targets = logits.float().sigmoid(), targets.float()
    return 1 - (2 * s @ targets.T + 1) / (s.sum(1)[:, None] + targets.sum(1) + 1)


def assign(cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cost (N, M) -> the cheapest pairs: rows and columns (min(N, M),) int64, rows ascending, on the cost's device.

    Entries that are not finite count as 1e6: one bad prediction must not stop a training.
    """
    cost = torch.where(cost.isfinite(), cost, NO_MATCH)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


@torch.no_grad()
def match(
    logits: torch.Tensor,
    masks: torch.Tensor,
    labels: torch.Tensor,
    target_masks: torch.Tensor,
    points: int = 12544,
    weights: tuple[float, float, float] = (2.0, 5.0, 5.0),
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which prediction answers for which target of one image or clip: indices of predictions and of targets.

    logits (N, K + 1), masks (N, h, w) logits or (N, T, h, w); labels (M,), target_masks (M, H, W) or (M, T, H, W) bool
    or float of any size. Masks are compared at `points` places drawn uniformly; weights of class, BCE and dice.
    """
    xy_01 = torch.rand(1, points, 2, generator=generator, device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):
        ours, theirs = sample_points(masks, xy_01), sample_points(target_masks, xy_01)
        by_class, by_bce, by_dice = weights
        cost = by_class * class_cost(logits, labels) + by_bce * bce_cost(ours, theirs)
        return assign(cost + by_dice * dice_cost(ours, theirs))


# ---- clips of a video


@torch.no_grad()
def match_queries(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Final queries of two clips, (N, D) each -> order (N,) int64: now[order] continues before, by cosine."""
    cosine = F.normalize(before.float(), dim=-1) @ F.normalize(now.float(), dim=-1).T
    return assign(1 - cosine)[1]


def clip_ends(frames: int, clip: int, overlap: int = 0) -> list[int]:
    """Ends (exclusive) of the clips that cover a video; each starts `overlap` frames before the end of the last one.

    What the last clip would have too much is taken from the last clips, one frame each, where there are enough of
    them; else the last clip alone is shorter. ValueError if clips would not advance or the video is shorter than the
    overlap.
    """
    step = clip - overlap
    if overlap < 0 or step < 1 or frames <= overlap:
        raise ValueError(f"clip_ends: {frames} frames, clips of {clip} with overlap {overlap}")
    n = -(-(frames - overlap) // step)
    surplus = n * step - (frames - overlap)
    ends = [overlap + (i + 1) * step - max(0, surplus - (n - 1 - i)) for i in range(n)]
    return ends if surplus < n else [*(overlap + (i + 1) * step for i in range(n - 1)), frames]
