"""SAM 2's part of Sa2VA: features of a picture, a mask for each [SEG] vector, and memory through a video.

The vectors join SAM 2's sparse prompts, behind a point that is none. The decoder draws three masks; the one with the
highest predicted IoU is taken. The object score never blanks a mask, it only decides about the object pointer.
A frame without a prompt is decoded from its features after attention to memories: those of all prompted frames, of
the last 6 tracked ones, and object pointers of up to 16 frames.

Shapes: B pictures, n objects, T frames, C width, h x w the top features (stride 16), R the side SAM 2 sees; logits have
4h x 4w pixels. Modules are those of transformers' Sam2VideoModel with SAM 2.0's settings.
Sources: Ravi et al., SAM 2, arXiv 2408.00714; Yuan et al., Sa2VA, arXiv 2501.04001; Nekrasov et al., Sa2VA-i,
arXiv 2509.19082 (mode two_decoder).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Sam2VideoModel

MODES = ("official", "uniform", "two_decoder")
SCALE, BIAS = 20.0, -10.0  # of mask probabilities in memory, and of a given mask's logits
ABSENT = -1024.0  # logit that the original decoder gives everywhere when it sees no object
MEMORIES = 7  # one slot for prompted frames, six for tracked ones
POINTERS = 16  # frames whose pointers are attended to, the current one included


class Features(NamedTuple):
    """Of B pictures: s0 (B, C, 4h, 4w), s1 (B, C, 2h, 2w), top (B, C, h, w), position (h w, B, C) of the top."""

    s0: torch.Tensor
    s1: torch.Tensor
    top: torch.Tensor
    position: torch.Tensor


class Decoded(NamedTuple):
    """Of n objects: logits (n, 4h, 4w), token (n, C) of the mask taken, score (n,) > 0 where SAM 2 sees the object."""

    logits: torch.Tensor
    token: torch.Tensor
    score: torch.Tensor


class Memory(NamedTuple):
    """Of one frame: features (h w, n, 64) bfloat16, position (h w, n, 64), pointer (n, C)."""

    features: torch.Tensor
    position: torch.Tensor
    pointer: torch.Tensor


def image_features(sam: Sam2VideoModel, pixels: torch.Tensor) -> Features:
    """pixels (B, 3, R, R) -> float32 features. No gradient while the image encoder is frozen."""
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in sam.vision_encoder.parameters())
    with torch.set_grad_enabled(trained):
        seen = sam.vision_encoder(pixels, return_dict=True)
    s0, s1, top = (x.float() for x in seen.fpn_hidden_states)
    return Features(s0, s1, top, seen.fpn_position_encoding[-1].float().flatten(2).permute(2, 0, 1))


def blank_features(sam: Sam2VideoModel) -> Features:
    """Zeros in the place of one picture's features: a batch without masks still runs the decoder on something."""
    like = sam.no_memory_embedding
    C = like.shape[-1]
    s0, s1, top = (like.new_zeros(1, C, *size) for size in sam.backbone_feature_sizes)
    return Features(s0, s1, top, like.new_zeros(top[0, 0].numel(), 1, C))


def decode(
    sam: Sam2VideoModel,
    top: torch.Tensor,
    fine: Features,
    picture: torch.Tensor,
    prompts: torch.Tensor | None = None,
    decoder: nn.Module | None = None,
    given: torch.Tensor | None = None,
) -> Decoded:
    """Masks of n objects.

    top (n, C, h, w): what the decoder looks at, with memory or `no_memory` in it. fine: s0 and s1 of B pictures;
    picture int64 (n,): each object's own. prompts (n, C): [SEG] vectors, None while tracking. decoder: None for
    sam.mask_decoder. given (n, 1, 4h, 4w): mask prompts, which the decoder answers with its single-mask token.
    """
    decoder, n = decoder or sam.mask_decoder, len(top)
    points = top.new_zeros(n, 1, 1, 2)
    nowhere = torch.full((n, 1, 1), -1, device=top.device, dtype=torch.int32)
    sparse, dense = sam.prompt_encoder(points, nowhere, None, given)
    if prompts is not None:
        sparse = torch.cat([sparse, prompts[:, None, None]], 2)  # (n, 1, 3, C)
    masks, quality, tokens, score = decoder(
        image_embeddings=top,
        image_positional_embeddings=sam.get_image_wide_positional_embeddings().repeat(n, 1, 1, 1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=given is None,
        high_resolution_features=[decoder.conv_s0(fine.s0)[picture], decoder.conv_s1(fine.s1)[picture]],
    )  # (n, 1, 3 or 1, 4h, 4w), (n, 1, 3 or 1), (n, 1, 3 or 1, C), (n, 1, 1)
    best, rows = quality[:, 0].argmax(-1), torch.arange(n, device=top.device)
    return Decoded(masks[rows, 0, best], tokens[rows, 0, best], score[:, 0, 0])


def prompted(sam: Sam2VideoModel, seen: Features, picture: torch.Tensor, prompts: torch.Tensor) -> Decoded:
    """Masks of [SEG] vectors (n, C), each in its picture (n,), without memory: all of training and still pictures."""
    top = seen.top + sam.no_memory_embedding.view(1, -1, 1, 1)
    return decode(sam, top[picture], seen, picture, prompts)


def resize_logits(logits: torch.Tensor, size: tuple[int, int], side: int) -> torch.Tensor:
    """Logits (n, h, w) -> (n, *size), float32: bilinear to side x side (SAM 2's R) and from there, as released."""
    x = F.interpolate(logits.float()[:, None], (side, side), mode="bilinear", align_corners=False)
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)[:, 0]


# ---- memory


def pointer(sam: Sam2VideoModel, token: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Object pointers (n, C) from mask tokens (n, C); where not present (n,) the learned "no object"."""
    return torch.where(present[:, None], sam.object_pointer_proj(token), sam.no_object_pointer)


def remember(sam: Sam2VideoModel, top: torch.Tensor, logits: torch.Tensor, pointers: torch.Tensor) -> Memory:
    """Memory of a frame: top (1, C, h, w) as encoded, logits (n, h', w') of its masks, pointers (n, C)."""
    R = sam.image_size
    large = F.interpolate(logits.float()[:, None], (R, R), mode="bilinear", align_corners=False)
    mask = large.sigmoid() * SCALE + BIAS
    features, position = sam.memory_encoder(top.expand(len(logits), -1, -1, -1), mask)  # (n, 64, h, w) each
    flat = features.to(torch.bfloat16).flatten(2).permute(2, 0, 1)  # stored in bfloat16, as released
    return Memory(flat, position.expand_as(features).flatten(2).permute(2, 0, 1), pointers)


def recall(sam: Sam2VideoModel, seen: Features, t: int, start: dict, tracked: dict, step: int) -> torch.Tensor:
    """Frame t's top features after attention to memories -> (n, C, h, w). start: memories of the prompted frames,
    tracked: of the others, by frame; step: 1 forward in time, -1 backward."""
    slots = sam.memory_temporal_positional_encoding  # (7, 1, 1, 64); the last one is that of prompted frames
    found = [(slots[-1], m) for m in start.values()]
    found += [(slots[k - 1], tracked[t - k * step]) for k in range(MEMORIES - 1, 0, -1) if t - k * step in tracked]
    values = [m.features.float() for _, m in found]
    places = [m.position + slot for slot, m in found]
    pointers = [m.pointer for s, m in start.items() if (t - s) * step >= 0]  # of the past only
    pointers += [tracked[t - k * step].pointer for k in range(1, POINTERS) if t - k * step in tracked]
    tokens = 0
    if pointers:
        pieces = torch.stack(pointers).unflatten(-1, (-1, values[0].shape[-1]))  # (P, n, C / 64, 64)
        pieces = pieces.transpose(1, 2).flatten(0, 1)
        values, places, tokens = [*values, pieces], [*places, torch.zeros_like(pieces)], len(pieces)
    n, (C, h, w) = values[0].shape[1], seen.top.shape[1:]
    attended = sam.memory_attention(
        current_vision_features=seen.top.flatten(2).permute(2, 0, 1).expand(-1, n, -1),
        current_vision_position_embeddings=seen.position.expand(-1, n, -1),
        memory=torch.cat(values),
        memory_posision_embeddings=torch.cat(places),
        num_object_pointer_tokens=tokens,
    )  # (1, n, h w, C)
    return attended[0].transpose(1, 2).reshape(n, C, h, w)


def given_mask(sam: Sam2VideoModel, seen: Features, logits: torch.Tensor, tracker: nn.Module) -> Memory:
    """Memory of a prompted frame for another decoder: it gets the mask where logits (n, 4h, 4w) > 0 as if drawn by
    hand, without memory."""
    R, n = sam.image_size, len(logits)
    mask = (resize_logits(logits, (R, R), R) > 0).float()[:, None]  # (n, 1, R, R)
    picture = torch.zeros(n, dtype=torch.int64, device=mask.device)
    top = seen.top.expand(n, -1, -1, -1)
    drawn = decode(sam, top, seen, picture, decoder=tracker, given=sam.mask_downsample(mask))
    present = mask.flatten(1).any(1) & (drawn.score > 0)
    return remember(sam, seen.top, mask[:, 0] * SCALE + BIAS, pointer(sam, drawn.token, present))


# ---- videos


def prompted_frames(T: int, k: int, mode: str) -> list[int]:
    """Frames of a video of T where masks are drawn from the [SEG] vector: the first k, or k spread from end to end."""
    if mode not in MODES or T < 1 or k < 1:
        raise ValueError(f"prompted_frames: mode {mode!r}, {T} frames, {k} prompted; expected one of {MODES}")
    if mode == "official":
        return list(range(min(T, k)))
    return sorted({int(x) for x in torch.linspace(0, T - 1, k, dtype=torch.float64)})


def directions(T: int, start: list[int], both_ways: bool) -> list[tuple[list[int], int]]:
    """Tracked frames in their order and the step of time: forward, then backward. Frames before the first prompted one
    go backward; with both_ways also those nearer to the next prompted frame than to the one before."""
    forward, backward = [], []
    for t in sorted(set(range(T)) - set(start)):
        before, after = [s for s in start if s < t], [s for s in start if s > t]
        nearer = both_ways and after and before and after[0] - t < t - before[-1]
        (backward if not before or nearer else forward).append(t)
    return [(forward, 1), (backward[::-1], -1)]


@torch.no_grad()
def propagate(
    sam: Sam2VideoModel,
    features: Callable[[int], Features],
    T: int,
    prompts: torch.Tensor,
    start: list[int],
    both_ways: bool = False,
    tracker: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of n objects through T frames -> logits (n, T, 4h, 4w), object scores (n, T).

    features(t): of one frame, asked once per frame. prompts (n, C): [SEG] vectors, drawn in the frames `start` each on
    its own as in training. tracker: SAM 2's original decoder (two_decoder): it receives the drawn masks and follows
    them; its masks are blank where it sees no object. None: the one decoder does both.
    """
    n, memories = len(prompts), {}
    logits, scores = [None] * T, [None] * T
    picture = torch.zeros(n, dtype=torch.int64, device=prompts.device)
    for t in start:
        seen = features(t)
        found = prompted(sam, seen, picture, prompts)
        logits[t], scores[t] = found.logits, found.score
        if tracker is None:
            memories[t] = remember(sam, seen.top, found.logits, pointer(sam, found.token, found.score > 0))
        else:
            memories[t] = given_mask(sam, seen, found.logits, tracker)
    for order, step in directions(T, start, both_ways):
        tracked = {}
        for t in order:
            seen = features(t)
            found = decode(sam, recall(sam, seen, t, memories, tracked, step), seen, picture, decoder=tracker)
            shown = found.logits
            if tracker is not None:
                shown = torch.where((found.score > 0)[:, None, None], shown, ABSENT)
            logits[t], scores[t] = shown, found.score
            tracked[t] = remember(sam, seen.top, shown, pointer(sam, found.token, found.score > 0))
            tracked.pop(t - POINTERS * step, None)
    return torch.stack(logits, 1), torch.stack(scores, 1)
