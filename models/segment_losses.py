"""The losses of FastSAM2: learned queries matched to objects, prompt queries one to one, at every stage and adaptor,
objects followed through clips also in every frame.

Shapes: B images or clips, T frames, N object queries, P prompts, K classes, M or Q targets of one image, h w grid of
the masks, H W image as padded in the batch (4h x 4w, or less: the rest is padding of the network). Targets are the
fields of a batch: `masks`, B lists of bool (M, [T], H, W); `labels`, B of (M,) int64, -1 unknown; `ignore`
(B, [T], H, W) bool, neither object nor background; `first`, of vos, B of (Q,) int64, the frames of the prompts. Computed in float32 whatever autocast says; no target: no NaN.
Sources: Cheng et al., Mask2Former, CVPR 2022; Xu et al., RAP-SAM, ICLR 2025 (weights, prompts); Ravi et al., SAM 2,
arXiv 2408.00714 (presence); Tarvainen & Valpola, Mean teachers, NeurIPS 2017 (distillation from averaged weights).
"""

import torch
import torch.nn.functional as F

from models.mask_losses import (
    RIGHT,
    WEIGHTS,
    bce_loss,
    class_loss,
    dice_loss,
    iou_loss,
    mask_iou,
    mask_losses,
    mean_over,
    pixel_loss,
    sample_points,
    uncertain_points,
)
from models.matching import match
from models.prompt_fusion import OBJECT_TASKS, STRIDE

POINTS = 12544  # 112 x 112, where masks are compared
PAIRS = {"mask": bce_loss, "dice": dice_loss}
TEMPERATURE = 2.0  # at which the classes of teacher and student are compared
PRESENCE = 1.0  # weight of the presence loss


def count_masks(batch: dict) -> float:
    """Targets of a batch. Its mean over ranks is what `segment_losses` divides by: one all_reduce, done by the script."""
    return float(sum(len(m) for m in batch["masks"]))


def segment_losses(
    out: dict,
    batch: dict,
    num_masks: float | torch.Tensor | None = None,
    points: int = POINTS,
    weights: dict[str, float] = WEIGHTS,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Output of FastSAM2 for a batch of one task -> weighted sums over stages and adaptors, scalars: loss, their sum,
    and class, mask, dice of object tasks, with pixels where the output has them; mask, dice, iou of prompt tasks, with presence where the output has it
    (FastSAM2.follow). Logs may look at any; `loss` is trained.

    batch: task, masks, labels, ignore, on the output's device. num_masks: see count_masks; None: this batch alone.
    """
    targets = {"masks": batch["masks"], "ignore": batch["ignore"], "num_masks": num_masks, "points": points}
    targets |= {"weights": weights, "generator": generator}
    if batch["task"] in OBJECT_TASKS:
        losses = object_losses(out, labels=batch["labels"], **targets)
    elif "presence" in out:
        losses = follow_losses(out, first=batch["first"], **targets)
    else:
        losses = prompt_losses(out, **targets)
    return {"loss": sum(losses.values()) + untouched(out), **losses}


def untouched(out: dict) -> torch.Tensor:
    """0, with a gradient of 0 for whatever the losses left aside; no value is read, so none can spoil it."""
    return sum(v[:0].float().sum() for name in ("classes", "masks", "iou") for v in out[name])


def object_losses(
    out: dict, masks, labels, ignore, num_masks=None, points=POINTS, weights=WEIGHTS, generator=None
) -> dict[str, torch.Tensor]:
    """Every output of N object queries is matched anew -> weighted class, mask, dice, summed over the outputs.

    A query without a target learns "no object"; one whose target has no known class learns no class.
    """
    n = sum(len(m) for m in masks) if num_masks is None else num_masks
    masks = [fitted(m, out["masks"][0]) for m in masks]
    ignore = fitted(ignore, out["masks"][0])
    total = {"class": 0.0, "mask": 0.0, "dice": 0.0}
    for logits, found in zip(out["classes"], out["masks"], strict=True):
        wanted = torch.full(logits.shape[:2], logits.shape[2] - 1, device=logits.device)  # (B, N), K: no object
        for b, target in enumerate(masks):
            which, of = match(logits[b], found[b], labels[b], target, points, generator=generator)
            wanted[b, which] = labels[b][of]
            bce, dice = mask_losses(found[b][which], target[of], n, points, generator, ignore[b])
            total["mask"] = total["mask"] + weights["mask"] * bce
            total["dice"] = total["dice"] + weights["dice"] * dice
        total["class"] = total["class"] + weights["class"] * class_loss(logits, wanted)
    if "pixels" in out:
        parts = [
            pixel_loss(x, class_shares(m, y, len(x))) for x, m, y in zip(out["pixels"], masks, labels, strict=True)
        ]
        total["pixels"] = weights["pixels"] * sum(parts) / len(parts)
    return total


def class_shares(masks: torch.Tensor, labels: torch.Tensor, K: int) -> torch.Tensor:
    """How much of each cell of the features a class covers: masks bool (M, [T], 4h, 4w), labels (M,), -1 none -> (K, S)."""
    cells = masks[labels >= 0].unflatten(-1, (-1, STRIDE)).unflatten(-3, (-1, STRIDE))  # (M, [T], h, 4, w, 4)
    shares = cells.float().mean((-3, -1)).flatten(1)  # (M, S)
    return shares.new_zeros(K, shares.shape[1]).index_add_(0, labels[labels >= 0], shares)


def prompt_losses(
    out: dict, masks, ignore, num_masks=None, points=POINTS, weights=WEIGHTS, generator=None
) -> dict[str, torch.Tensor]:
    """Prompt i of an image is target i; prompts beyond the targets are padding -> weighted mask, dice, iou, summed over
    the outputs. The quality to be predicted is the IoU of the mask at image size. ValueError: more targets than prompts.
    """
    P = out["masks"][0].shape[1]
    if max(len(m) for m in masks) > P:
        raise ValueError(f"prompt_losses: {max(len(m) for m in masks)} targets of one image, but {P} prompts")
    n = sum(len(m) for m in masks) if num_masks is None else num_masks
    masks = [fitted(m, out["masks"][0]) for m in masks]
    ignore = fitted(ignore, out["masks"][0])
    total = {"mask": 0.0, "dice": 0.0, "iou": 0.0}
    count = torch.as_tensor(n, device=ignore.device).clamp_min(1)
    for found, quality in zip(out["masks"], out["iou"], strict=True):
        for b, target in enumerate(masks):
            Q = len(target)
            bce, dice = mask_losses(found[b, :Q], target, n, points, generator, ignore[b])
            reached = iou_at(found[b, :Q], target, ignore[b])
            total["mask"] = total["mask"] + weights["mask"] * bce
            total["dice"] = total["dice"] + weights["dice"] * dice
            total["iou"] = total["iou"] + weights["iou"] * iou_loss(quality[b, :Q, 0], reached).sum() / count
    return total


def follow_losses(
    out: dict, masks, ignore, first, num_masks=None, points=POINTS, weights=WEIGHTS, generator=None
) -> dict[str, torch.Tensor]:
    """Objects followed through clips, out as of FastSAM2.follow: masks (B, P, T, h, w), iou (B, P, T, 1), presence
    (B, P, T) -> weighted mask, dice, iou, presence, summed over the outputs and averaged over objects and frames.

    Object i of a clip is target i (Q, T, H, W), from its frame first on. In the frames that show it its mask and the
    IoU of it are learned, as of a picture; in all after the first one whether they do (binary cross-entropy).
    """
    T, n = ignore.shape[1], torch.as_tensor(sum(len(m) for m in masks) if num_masks is None else num_masks).clamp_min(1)
    clip = torch.cat([torch.full((len(m),), b) for b, m in enumerate(masks)]).to(ignore.device)  # of each object
    place = torch.cat([torch.arange(len(m)) for m in masks]).to(ignore.device)
    masks = torch.cat([fitted(m, out["masks"][0]) for m in masks])  # (O, T, H, W), O objects of all clips
    ignore, since = fitted(ignore, out["masks"][0]), torch.arange(T, device=ignore.device) - torch.cat(first)[:, None]
    shown = masks.flatten(2).any(2)  # (O, T)
    o, t = (shown & (since >= 0)).nonzero(as_tuple=True)  # R frames that show an object
    b, p, targets, unknown = clip[o], place[o], masks[o, t], ignore[clip[o], t]
    total = {"mask": 0.0, "dice": 0.0, "iou": 0.0}
    for found, quality in zip(out["masks"], out["iou"], strict=True):
        found = found[b, p, t]  # (R, h, w)
        xy_01 = uncertain_points(found, points, generator=generator)
        left_out = sample_points(unknown, xy_01) > 0.5
        ours = sample_points(found, xy_01).masked_fill(left_out, RIGHT)
        theirs = sample_points(targets, xy_01).masked_fill(left_out, 0.0)
        for name, loss in PAIRS.items():
            total[name] = total[name] + weights[name] * mean_over(loss(ours, theirs), n * T)
        reached = iou_at(found, targets, unknown)
        total["iou"] = total["iou"] + weights["iou"] * mean_over(iou_loss(quality[b, p, t, 0], reached), n * T)
    said = out["presence"][clip, place].float()  # (O, T)
    wrong = F.binary_cross_entropy_with_logits(said, shown.float(), reduction="none") * (since > 0)
    return total | {"presence": PRESENCE * mean_over(wrong.flatten(), n * max(1, T - 1))}


def distill_losses(
    out: dict,
    teacher: dict,
    batch: dict,
    points: int = POINTS,
    weights: dict[str, float] = WEIGHTS,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Last output of FastSAM2 against that of a teacher on the same batch -> weighted mask and dice, of object tasks
    also class, means over the pairs, scalars. No gradient reaches the teacher.

    Object tasks: the teacher's queries whose likeliest class is an object, matched with the student's as targets are.
    Prompt tasks: each prompt that has a target. Masks: the teacher's probabilities at sampled points. Class: T^2
    KL(teacher | student).
    """
    teacher = {name: teacher[name][-1].detach().float() for name in ("classes", "masks")}
    found, logits, rows = out["masks"][-1], out["classes"][-1], []
    for b, masks in enumerate(batch["masks"]):
        which = of = torch.arange(len(masks), device=found.device)
        if batch["task"] in OBJECT_TASKS:
            likeliest = teacher["classes"][b].argmax(-1)
            sure = (likeliest < logits.shape[2] - 1).nonzero()[:, 0]
            targets = teacher["masks"][b, sure].sigmoid()
            which, of = match(logits[b], found[b], likeliest[sure], targets, points, generator=generator)
            of = sure[of]
        rows.append((found[b, which], teacher["masks"][b, of], logits[b, which], teacher["classes"][b, of]))
    found, targets, logits, classes = (torch.cat(parts) for parts in zip(*rows, strict=True))
    xy_01 = uncertain_points(found, points, generator=generator)
    ours, theirs = sample_points(found, xy_01), sample_points(targets, xy_01).sigmoid()
    losses = {name: weights[name] * mean_over(loss(ours, theirs)) for name, loss in PAIRS.items()}
    if batch["task"] in OBJECT_TASKS:
        ours, theirs = ((x.float() / TEMPERATURE).log_softmax(-1) for x in (logits, classes))
        apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        losses["class"] = weights["class"] * TEMPERATURE**2 * mean_over(apart)
    return losses


def fitted(targets: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """bool (..., H, W), padded right and below with False to the area that masks (..., h, w) cover.

    ValueError where it is larger than that.
    """
    below, right = (STRIDE * n - m for n, m in zip(masks.shape[-2:], targets.shape[-2:], strict=True))
    if min(below, right) < 0:
        raise ValueError(
            f"segment_losses: targets of {tuple(targets.shape[-2:])} px, masks of {tuple(masks.shape[-2:])}"
        )
    return F.pad(targets, (0, right, 0, below))


@torch.no_grad()
def iou_at(masks: torch.Tensor, targets: torch.Tensor, ignore: torch.Tensor) -> torch.Tensor:
    """IoU at image size: logits (Q, [T], h, w), targets (Q, [T], H, W), ignored pixels ([T], H, W), or those of each,
    left out -> (Q,)."""
    H, W = targets.shape[-2:]
    frames = masks.detach().float().reshape(1, -1, *masks.shape[-2:])  # (1, Q T, h, w)
    if not frames.numel():
        return frames.new_zeros(len(masks))
    large = F.interpolate(frames, (H, W), mode="bilinear", align_corners=False).reshape(targets.shape)
    return mask_iou(large.masked_fill(ignore, -1.0), targets & ~ignore)
