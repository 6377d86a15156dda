"""What a SAM3 detector is trained on: set matching of its queries to the objects of a prompt, presence, and masks.

Shapes: B pairs of picture and prompt, Q queries, M objects of one pair, h x w the model's mask size, H x W any size.
Boxes are xyxy in 0..1 of the picture, outer edges of their pixels. Everything is computed in float32; without any
object each loss is 0 with a gradient of 0, never NaN.
Sources: Meta, SAM 3, arXiv 2511.16719 (presence, semantic mask); Carion et al., DETR, ECCV 2020 (matching, boxes).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from models.mask_losses import bce_loss, dice_loss, iou_loss, mask_iou, mean_over
from models.matching import assign, bce_cost, dice_cost

LEAST_CELLS = 4  # of the model's masks; about one ball of the tiny model
GIVEN, ABSENT = 10.0, -1024.0  # logits of a given mask (+ and -), and of every pixel of an object that is not seen


@dataclass(frozen=True)
class DetectionWeights:
    """Factor of each loss. The same factors (but presence and semantic) weigh the costs of the matching."""

    score: float = 3.0
    mask: float = 1.0
    dice: float = 2.0
    box: float = 2.0  # L1
    giou: float = 1.0
    presence: float = 3.0
    semantic_mask: float = 1.0  # of the one mask of all objects
    semantic_dice: float = 2.0


class DetectorOutput(Protocol):
    """What is read of the model's answer, all logits: pred_logits (B, Q), pred_boxes (B, Q, 4) xyxy in 0..1,
    pred_masks (B, Q, h, w), presence_logits (B, 1), semantic_seg (B, 1, h, w)."""

    pred_logits: torch.Tensor
    pred_boxes: torch.Tensor
    pred_masks: torch.Tensor
    presence_logits: torch.Tensor
    semantic_seg: torch.Tensor


def shrink(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """masks (M, H, W) bool -> (M, h, w) float32: the covered share of each cell."""
    if not len(masks):
        return masks.new_zeros((0, *size), dtype=torch.float32)
    return F.interpolate(masks[:, None].float(), size, mode="area")[:, 0]


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """masks (M, H, W) bool -> (M, 4) float32 in 0..1. ValueError for an empty mask."""
    H, W = masks.shape[1:]
    columns, rows = masks.any(1), masks.any(2)  # (M, W), (M, H)
    if not bool(columns.any(1).all()):
        raise ValueError(f"boxes_of: of {len(masks)} masks {int((~columns.any(1)).sum())} are empty")
    x, y = torch.arange(W, device=masks.device), torch.arange(H, device=masks.device)
    edges = [torch.where(seen, at, side).amin(1) for seen, at, side in ((columns, x, W), (rows, y, H))]
    edges += [torch.where(seen, at + 1, 0).amax(1) for seen, at in ((columns, x), (rows, y))]
    return torch.stack(edges, 1).float() / masks.new_tensor([W, H, W, H], dtype=torch.float32)


def generalized_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU minus the share of the common hull that neither covers, -1..1: a (..., 4), b (..., 4) broadcast -> (...).

    Rezatofighi et al., CVPR 2019. Finite also for boxes without area.
    """
    a, b = a.float(), b.float()
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).clamp_min(0).prod(-1) for x in (a, b))
    either = area_a + area_b - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    return overlap / either.clamp_min(1e-9) - (hull - either) / hull.clamp_min(1e-9)


@torch.no_grad()
def match_queries_to_objects(
    logits: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor, target_boxes: torch.Tensor,
    target_masks: torch.Tensor, weights: DetectionWeights,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One pair: logits (Q,), boxes (Q, 4), masks (Q, h, w) logits; target_boxes (M, 4), target_masks (M, h, w) in 0..1
    -> the cheapest pairs, indices of queries and of objects."""
    flat, target_flat = masks.flatten(1), target_masks.flatten(1)
    cost = -weights.score * logits.float().sigmoid()[:, None]  # (Q, 1)
    cost = cost + weights.box * torch.cdist(boxes.float(), target_boxes, p=1)
    cost = cost - weights.giou * generalized_iou(boxes[:, None], target_boxes)
    per_object = flat.shape[1] / (target_flat.sum(1) + LEAST_CELLS)  # (M,), as in bce_per_object
    cost = cost + weights.mask * bce_cost(flat, target_flat) * per_object + weights.dice * dice_cost(flat, target_flat)
    return assign(cost)


def detection_losses(
    out: DetectorOutput, targets: list[torch.Tensor], weights: DetectionWeights | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum, and its parts before weighting. targets: of each of the B pairs the objects' masks (M, H, W)
    bool, none of them empty; M = 0 where the prompt names nothing in the picture.

    Scores are learned on all pairs: of a query 1 if it answers for an object, else 0, the queries' ones and zeros
    weighing the same in a pair.
    """
    weights = weights or DetectionWeights()
    B, Q, size = *out.pred_logits.shape, out.pred_masks.shape[-2:]
    if len(targets) != B:
        raise ValueError(f"detection_losses: {len(targets)} targets for {B} pairs")
    small = [shrink(m, size) for m in targets]
    boxes = [boxes_of(m) for m in targets]
    found = [
        match_queries_to_objects(*one, weights)
        for one in zip(out.pred_logits, out.pred_boxes, out.pred_masks, boxes, small, strict=True)
    ]
    pair = torch.cat([torch.full_like(q, b) for b, (q, _) in enumerate(found)])
    query = torch.cat([q for q, _ in found])
    at = (pair, query)
    target_masks = torch.cat([m[k] for m, (_, k) in zip(small, found, strict=True)])  # (R, h, w)
    target_boxes = torch.cat([x[k] for x, (_, k) in zip(boxes, found, strict=True)])  # (R, 4)
    ours, our_boxes = out.pred_masks[at].flatten(1), out.pred_boxes[at].float()

    answer = torch.zeros(B, Q, device=ours.device)
    answer[at] = 1
    present = torch.tensor([float(len(m) > 0) for m in targets], device=ours.device)
    whole = torch.stack([m.amax(0) if len(m) else m.new_zeros(size) for m in small]).flatten(1)  # (B, h w)
    semantic = out.semantic_seg.flatten(1)
    losses = {
        "score": score_loss(out.pred_logits, answer),
        "mask": mean_over(bce_per_object(ours, target_masks.flatten(1))),
        "dice": mean_over(dice_loss(ours, target_masks.flatten(1))),
        "box": mean_over((our_boxes - target_boxes).abs().sum(1)),
        "giou": mean_over(1 - generalized_iou(our_boxes, target_boxes)),
        "presence": F.binary_cross_entropy_with_logits(out.presence_logits.float().flatten(), present),
        "semantic_mask": bce_per_object(semantic, whole).mean(),
        "semantic_dice": mean_over(dice_loss(semantic, whole) * present, present.sum()),
    }
    return sum(getattr(weights, name) * value for name, value in losses.items()), losses


def bce_per_object(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits (R, P) and targets (R, P) in 0..1, summed over the cells and divided by those of
    the object and LEAST_CELLS more -> (R,). A mean over all cells would say nothing about a ball of four."""
    return bce_loss(logits, targets) * logits.shape[1] / (targets.sum(1) + LEAST_CELLS)


def score_loss(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of logits (B, Q), answer (B, Q) 0 or 1; in each row ones and zeros weigh one half each."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), answer, reduction="none")
    ones, zeros = answer.sum(1, keepdim=True), (1 - answer).sum(1, keepdim=True)
    weight = torch.where(answer > 0, 0.5 / ones.clamp_min(1), 0.5 / zeros.clamp_min(1))
    return (weight * loss).sum(1).mean()


# ---- the model's answer, differentiable


class Questions:
    """What targets are called, in tokens, and frames as the picture encoder takes them.

    processor: of the snapshot. names: of each of K targets what it may be called.
    """

    def __init__(self, processor, names: list[tuple[str, ...]], device: torch.device):
        self.processor, self.device = processor, device
        tokens = processor.tokenizer([text for own in names for text in own], padding="max_length", return_tensors="pt")
        self.tokens = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}  # (P, L) each
        self.count = torch.tensor([len(own) for own in names])
        self.first = self.count.cumsum(0) - self.count

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> (N, 3, S, S) in -1..1."""
        found = self.processor.image_processor(images=image.permute(0, 3, 1, 2), return_tensors="pt")
        return found["pixel_values"].to(self.device)

    def draw(self, N: int) -> torch.Tensor:
        """For N pictures a name of each target, drawn at random: (N, K) int64, places in tokens."""
        return (self.first + (torch.rand(N, len(self.count)) * self.count).long()).to(self.device)

    def plain(self, N: int) -> torch.Tensor:
        """The first name of each target: (N, K) int64."""
        return self.first.expand(N, -1).to(self.device)

    @torch.no_grad()
    def picture_tokens(self, model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        """Clips uint8 (N, T, H, W, 3) -> tokens of the picture encoder (N, T, hw, D), without gradient."""
        tokens = model.detector_model.vision_encoder.backbone(self.pixels(image.flatten(0, 1))).last_hidden_state
        return tokens.unflatten(0, image.shape[:2])


def detect_pairs(
    detector: torch.nn.Module, pixels: torch.Tensor, tokens: dict[str, torch.Tensor], texts: torch.Tensor
) -> DetectorOutput:
    """One pass of the picture encoder for all prompts of a picture: pixels (N, 3, S, S) in -1..1; tokens of P texts,
    input_ids and attention_mask (P, L) int64; texts (N, K) int64, of each picture K of the P -> N K pairs, picture-major.
    """
    N, K = texts.shape
    seen = detector.get_vision_features(pixel_values=pixels)
    for name in ("fpn_hidden_states", "fpn_position_encoding"):
        seen[name] = tuple(level.repeat_interleave(K, 0) for level in seen[name])
    said = detector.get_text_features(**tokens)
    said.pooler_output = said.pooler_output[texts.flatten()]  # (N K, L, D)
    return detector(vision_embeds=seen, text_embeds=said, attention_mask=tokens["attention_mask"][texts.flatten()])


@torch.no_grad()
def best_masks(out: DetectorOutput, size: tuple[int, int], threshold: float) -> torch.Tensor:
    """Of each pair the mask (B, H, W) bool with the best score above threshold, of those that are not empty; an empty
    one when there is none. size: (H, W)."""
    scores = out.pred_logits.float().sigmoid() * out.presence_logits.float().sigmoid()  # (B, Q)
    masks = F.interpolate(out.pred_masks.float(), size, mode="bilinear") > 0
    scores = torch.where(masks.flatten(2).any(2), scores, 0)
    best, query = scores.max(1)
    return masks[torch.arange(len(best), device=best.device), query] & (best > threshold)[:, None, None]


# ---- the tracker, unrolled through clips: many objects at once, and differentiable, unlike the model's own sessions


def follow_clip(
    model: torch.nn.Module, vision: torch.Tensor, clip: torch.Tensor, seeds: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What the tracker says of R objects in frames 1..T-1 when their masks in frame 0 are given.

    vision (N, T, hw, D): tokens of the picture encoder of N clips. clip (R,) int64: in which clip an object is. seeds
    (R, H, W) bool, none empty. The numbers are those of models/sam3_memory.py, one object and frame at a time.
    Returns masks (T - 1, R, 3, m, m) logits, iou (T - 1, R, 3) in 0..1, object_logit (T - 1, R), and the index of the
    mask that a session would take, chosen (T - 1, R).
    """
    T, tracker = vision.shape[1], model.tracker_model
    keeps, reaches = model.config.tracker_config.num_maskmem, model.config.tracker_config.max_object_pointers_in_encoder
    seen = [FrameMaps.of(model, vision[:, t], clip) for t in range(T)]
    past, found = [seed_memory(tracker, seen[0], seeds)], []
    for t in range(1, T):
        offsets = [(0, past[0]), *((t - s, past[s]) for s in range(max(1, t - keeps + 1), t))]
        memory, places = tracker._build_memory_attention_inputs(offsets, vision.device)
        ages = [t, *range(1, min(t, reaches))]
        pointers, pointer_places = tracker._process_object_pointers(
            ages,
            [past[t - age]["object_pointer"] for age in ages],
            reaches,
            len(clip),
            tracker.hidden_dim,
            vision.device,
        )
        fused = tracker.memory_attention(
            current_vision_features=seen[t].tokens,
            current_vision_position_embeddings=seen[t].places,
            memory=torch.cat([*memory, pointers]).float(),
            memory_posision_embeddings=torch.cat([*places, pointer_places]).float(),
            num_object_pointer_tokens=len(pointers),
        )[0]  # (R, hw, D)
        answer = decode_masks(tracker, fused.transpose(1, 2).reshape(seen[t].coarse.shape), seen[t].fine)
        best = answer["iou"].argmax(1)  # (R,)
        rows = torch.arange(len(clip), device=vision.device)
        past.append(remember(tracker, seen[t], answer["masks"][rows, best], answer["tokens"][rows, best],
                             answer["object_logit"], given=False))  # fmt: skip
        found.append({k: answer[k] for k in ("masks", "iou", "object_logit")} | {"chosen": best})
    return {k: torch.stack([f[k] for f in found]) for k in found[0]}


@torch.no_grad()
def followed_masks(found: dict[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """What a session would show: (T - 1, R, H, W) bool, empty where it takes the object for hidden. size: (H, W)."""
    at = found["chosen"][:, :, None, None, None].expand(-1, -1, -1, *found["masks"].shape[-2:])
    masks = found["masks"].float().gather(2, at)[:, :, 0]  # (T - 1, R, m, m)
    return (F.interpolate(masks, size, mode="bilinear") > 0) & (found["object_logit"] > 0)[:, :, None, None]


@dataclass
class FrameMaps:
    """One frame as the tracker takes it, once for each of R objects."""

    tokens: torch.Tensor  # (hw, R, D)
    places: torch.Tensor  # (hw, R, D)
    coarse: torch.Tensor  # (R, D, h, w), the same as tokens
    fine: list[torch.Tensor]  # (R, D / 8, 4 h, 4 w), (R, D / 4, 2 h, 2 w)

    @classmethod
    def of(cls, model: torch.nn.Module, vision: torch.Tensor, clip: torch.Tensor) -> "FrameMaps":
        """vision (N, hw, D of the encoder), clip (R,)."""
        maps, places = model.get_vision_features_for_tracker(Tokens(vision))
        sizes = model.tracker_model.backbone_feature_sizes
        spread = [x[:, clip] for x in maps]
        shaped = [x.permute(1, 2, 0).reshape(len(clip), -1, *size) for x, size in zip(spread, sizes, strict=True)]
        return cls(spread[-1], places[-1].expand_as(maps[-1])[:, clip], shaped[-1], shaped[:-1])


@dataclass
class Tokens:
    """Stands for the picture encoder's output where only its tokens are read."""

    last_hidden_state: torch.Tensor  # (N, hw, D)


def decode_masks(
    tracker: torch.nn.Module, fused: torch.Tensor, fine: list[torch.Tensor], prompt: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """fused (R, D, h, w), fine: see FrameMaps; prompt (R, 1, m, m) or None -> masks (R, 3, m, m), iou (R, 3), tokens
    (R, 3, D), object_logit (R,)."""
    R = len(fused)
    nowhere = fused.new_zeros(R, 1, 1, 2)  # no click: one of label -1
    labels = torch.full((R, 1, 1), -1, dtype=torch.int32, device=fused.device)
    sparse, dense = tracker.prompt_encoder(
        input_points=nowhere, input_labels=labels, input_boxes=None, input_masks=prompt
    )
    masks, iou, tokens, logit = tracker.mask_decoder(
        image_embeddings=fused,
        image_positional_embeddings=tracker.get_image_wide_positional_embeddings().expand(R, -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        high_resolution_features=fine,
    )
    return {"masks": masks[:, 0], "iou": iou[:, 0], "tokens": tokens[:, 0], "object_logit": logit.flatten()}


def seed_memory(tracker: torch.nn.Module, seen: FrameMaps, seeds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Memory of a frame in which the masks (R, H, W) bool are given, none of them empty."""
    S = tracker.image_size
    mask = F.interpolate(seeds[:, None].float(), (S, S), mode="bilinear", antialias=True)
    mask = (mask >= mask.amax((2, 3), keepdim=True).clamp_max(0.5)).float()  # the smallest object keeps a pixel
    prompt = F.interpolate(
        tracker.mask_downsample(mask), tracker.prompt_encoder.mask_input_size, mode="bilinear", antialias=True
    )
    answer = decode_masks(tracker, seen.coarse, seen.fine, prompt)
    best, rows = answer["iou"].argmax(1), torch.arange(len(seeds), device=seeds.device)
    given = torch.full_like(answer["object_logit"], GIVEN)
    appears = (answer["object_logit"] > 0).float()[:, None]  # of the decoder, although the mask is given
    pointer = appears * tracker.object_pointer_proj(answer["tokens"][rows, best])
    memory = remember(tracker, seen, 2 * GIVEN * mask[:, 0] - GIVEN, None, given, given=True)
    return memory | {"object_pointer": pointer + (1 - appears) * tracker.no_object_pointer}


def remember(
    tracker: torch.nn.Module, seen: FrameMaps, masks: torch.Tensor, tokens: torch.Tensor | None,
    object_logit: torch.Tensor, given: bool,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """What later frames read of this one: masks (R, m, m) logits, tokens (R, D) of the chosen masks or None."""
    appears = object_logit > 0
    masks = torch.where(appears[:, None, None], masks, ABSENT)[:, None]  # (R, 1, m, m)
    large = F.interpolate(masks.float(), (tracker.image_size,) * 2, mode="bilinear")
    features, places = tracker._encode_new_memory(seen.tokens, large, object_logit[:, None, None], given)
    memory = {"maskmem_features": features, "maskmem_pos_enc": places}
    if tokens is not None:
        weight = appears.float()[:, None]
        memory["object_pointer"] = (
            weight * tracker.object_pointer_proj(tokens) + (1 - weight) * tracker.no_object_pointer
        )
    return memory


def tracking_losses(
    found: dict[str, torch.Tensor], targets: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """found: of follow_clip; targets (T - 1, R, H, W) bool, empty where the object is hidden -> sum of the parts, parts.

    Of the three masks of a frame only the best one learns its form; all three learn to say their IoU.
    """
    size, present = found["masks"].shape[-2:], targets.flatten(0, 1).flatten(1).any(1)
    masks, iou = (found[name].flatten(0, 1)[present] for name in ("masks", "iou"))  # (V, 3, m, m), (V, 3)
    truth = shrink(targets.flatten(0, 1)[present], size).repeat_interleave(3, 0)  # (3 V, m, m)
    flat, flat_truth = masks.flatten(0, 1).flatten(1), truth.flatten(1)
    bce, dice = (loss(flat, flat_truth).reshape(-1, 3) for loss in (bce_per_object, dice_loss))
    best = (bce + dice).argmin(1, keepdim=True)
    quality = mask_iou(masks.flatten(0, 1), truth).reshape(-1, 3)
    losses = {
        "mask": mean_over(bce.gather(1, best)[:, 0]),
        "dice": mean_over(dice.gather(1, best)[:, 0]),
        "iou": mean_over(iou_loss(iou, quality).mean(1)),
        "object": F.binary_cross_entropy_with_logits(found["object_logit"].float().flatten(), present.float()),
    }
    return sum(losses.values()), losses
