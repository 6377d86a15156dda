"""From mask and class logits to panoptic, instance and semantic results of one image; no loop over queries or pixels.

Shapes: N queries, K classes (K + 1 logits, the last one "no object"), h w grid of the mask logits, H W original image,
S segments. The logits come in compute precision; scores are float32.
Sources: mmdet's MaskFormerFusionHead, which RAP-SAM uses; Cheng et al., MaskFormer, NeurIPS 2021.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

INSTANCE = 1000  # a thing's value in a panoptic map: class + INSTANCE * running number


@dataclass
class ImageSize:
    """Sides of one image in pixels, (height, width) each, on its way through the network."""

    original: tuple[int, int]
    resized: tuple[int, int]  # what the network was given, without padding
    padded: tuple[int, int]  # what it saw: 4 times the grid of the masks


def to_original(masks: torch.Tensor, size: ImageSize | None) -> torch.Tensor:
    """Mask logits (N, h, w) -> (N, H, W) float32: bilinear to the padded size, crop, bilinear to the original size.

    size None: they are at the original size already.
    """
    masks = masks.float()
    if size is None or not len(masks):
        return masks if size is None else masks.new_zeros(0, *size.original)
    h, w = size.resized
    large = F.interpolate(masks[None], size.padded, mode="bilinear", align_corners=False)[..., :h, :w]
    if size.resized != size.original:
        large = F.interpolate(large, size.original, mode="bilinear", align_corners=False)
    return large[0]


def panoptic(
    logits: torch.Tensor,
    masks: torch.Tensor,
    is_thing: torch.Tensor,
    size: ImageSize | None = None,
    threshold: float = 0.8,
    overlap: float = 0.8,
    filter_low: bool = True,
) -> dict[str, torch.Tensor]:
    """logits (N, K + 1), masks (N, h, w), is_thing bool (K,) -> map, value, label, score, query.

    map (H, W) int64: class of stuff, class + 1000 * number (from 1, in query order) of things, K where nothing is.
    value, label, query (S,) int64 and score (S,) float32 describe the segments by ascending query; stuff of one class
    that several queries found shares its value. A query counts from class probability `threshold` (exclusive), and its
    segment when it wins at least `overlap` of the pixels where its own mask is at least 0.5; filter_low drops won
    pixels below 0.5.
    """
    K = logits.shape[1] - 1
    score, label = logits.float().softmax(-1).max(-1)
    query = ((label != K) & (score > threshold)).nonzero()[:, 0]
    score, label = score[query], label[query]
    inside = to_original(masks[query], size).sigmoid()  # (n, H, W)
    if not len(query):
        return {"map": torch.full(inside.shape[1:], K, device=masks.device), "value": label, "label": label,
                "score": score, "query": query}  # fmt: skip
    winner = (score[:, None, None] * inside).argmax(0)  # (H, W)
    own = inside >= 0.5
    won = torch.bincount(winner.flatten(), minlength=len(query))
    large = own.flatten(1).sum(1)
    good = (won > 0) & (large > 0) & (won / large.clamp_min(1) >= overlap)
    thing = is_thing.to(label.device)[label]
    number = (good & thing).cumsum(0)
    value = torch.where(thing, label + INSTANCE * number, label)
    at = torch.where(good, value, K)[winner]  # (H, W)
    if filter_low:
        at = at.where(own.gather(0, winner[None])[0], K)
    return {"map": at, "value": value[good], "label": label[good], "score": score[good], "query": query[good]}


def instances(
    logits: torch.Tensor, masks: torch.Tensor, is_thing: torch.Tensor, size: ImageSize | None = None, top: int = 100
) -> dict[str, torch.Tensor]:
    """logits (N, K + 1), masks (N, h, w), is_thing bool (K,) -> score, label, query (S,), mask bool (S, H, W) and
    boxes_xyxy_px (S, 4) float32, best first.

    The `top` pairs of query and class, things only; score: class probability x mean mask probability inside the mask.
    x1, y1 of a box are exclusive; an empty mask has the box 0, 0, 0, 0 and score 0.
    """
    K = logits.shape[1] - 1
    probability = logits.float().softmax(-1)[:, :-1].flatten()
    score, index = probability.topk(min(top, len(probability)))
    query, label = index // K, index % K
    keep = is_thing.to(label.device)[label]
    score, query, label = score[keep], query[keep], label[keep]
    each, place = query.unique(return_inverse=True)  # a query of several classes is resized once
    large = to_original(masks[each], size)
    inside = large > 0
    area = inside.flatten(1).sum(1)
    quality = (large.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    score, order = (score * quality[place]).sort(descending=True, stable=True)
    place = place[order]
    return {"score": score, "label": label[order], "query": query[order], "mask": inside[place],
            "boxes_xyxy_px": boxes_of(inside)[place]}  # fmt: skip


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """bool (S, H, W) -> boxes_xyxy_px (S, 4) float32, x1 and y1 exclusive; zeros for an empty mask."""
    sides = []
    for line in (masks.any(1), masks.any(2)):  # columns (S, W), rows (S, H)
        n = line.shape[1]
        first = line.byte().argmax(1)
        last = n - line.flip(1).byte().argmax(1)
        sides += [first, torch.where(line.any(1), last, 0)]
    return torch.stack([sides[0], sides[2], sides[1], sides[3]], 1).float()


def semantic(logits: torch.Tensor, masks: torch.Tensor, size: ImageSize | None = None) -> torch.Tensor:
    """Scores (K, H, W) float32 of the classes at each pixel; the class map is their argmax over dimension 0."""
    probability = logits.float().softmax(-1)[:, :-1]  # (N, K)
    return torch.einsum("nk,nhw->khw", probability, to_original(masks, size).sigmoid())
