"""One query per object from whatever points at it: clicks on it and beside it, boxes, masks, texts, in any mix.

Shapes: B images or clips, P objects (prompts) of each, R = B x P, n tokens, D width, E width of texts, h w grid of the
features, H W image. Coordinates are pixels of the image given to the network, pixel centres whole. A prompt of a clip
is about its first frame. Also here: which tasks there are, and what each of them is given.
Source: Kirillov et al., Segment Anything, ICCV 2023 (tokens of points, boxes and masks).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from models.sam_prompt_encoder import SAMPromptEncoder

OBJECT_TASKS = ("panoptic", "instance", "semantic", "vis", "vps")  # learned queries find every object
PROMPT_TASKS = ("interactive", "referring", "vos")  # a query for each prompt
TASKS = (*OBJECT_TASKS, *PROMPT_TASKS)
CLIP_TASKS = ("vis", "vps", "vos")
STRIDE = 4  # of the features
POINT, BOX, MASK, LOOK, TEXT = range(5)  # kinds of tokens
KNOWN = {"points": "point_labels", "boxes": "has_box", "mask_prompts": "has_mask", "texts": "has_text"}
NOTHING = {"points": (0, 2), "boxes": (0, 4), "mask_prompts": (0, 0, 0), "texts": (0, 0)}  # what an object lacks
MASK_SIDE = 64  # a mask's form is read at this size
MASK_LOGIT = 10.0  # of a pixel inside, minus that outside: as in SAM 2


# ---- tasks


def check_task(task: str, clip: bool, prompts: bool | None = None) -> None:
    """ValueError for an unknown task, or one that does not fit what is given: a clip or an image, prompts or none
    (None: not known)."""
    if task not in TASKS:
        raise ValueError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    if (task in CLIP_TASKS) != clip:
        raise ValueError(f"task {task!r} is about {'clips' if task in CLIP_TASKS else 'images'}, but the input is "
                         f"{'a clip (B, T, 3, H, W)' if clip else 'an image (B, 3, H, W)'}")  # fmt: skip
    if prompts is not None and (task in PROMPT_TASKS) != prompts:
        raise ValueError(f"task {task!r} {'needs prompts' if task in PROMPT_TASKS else 'takes no prompts'}, but there "
                         f"{'are some' if prompts else 'are none'}")  # fmt: skip


def route(batch: dict) -> str:
    """The task of a batch: its field `task`, else what its other fields are for; text is referring, points interactive
    or, of a clip, vos, and neither is panoptic or vps. ValueError where field and content contradict each other."""
    clip, pointed = batch["image"].ndim == 5, any(k in batch for k in ("points", "boxes", "mask_prompts"))
    said = "text" in batch or "texts" in batch
    task = batch.get("task")
    if task is None:
        task = ("vos" if clip else "interactive") if pointed else "referring" if said else "vps" if clip else "panoptic"
    check_task(task, clip, pointed or said)
    if task == "referring" and not said:
        raise ValueError("task 'referring' needs text, but the batch has points, boxes or masks only")
    return task


# ---- prompts


def padded(tensors: Sequence[torch.Tensor], fill: float) -> torch.Tensor:
    """Tensors of one number of dimensions, stacked at the size of the largest in each, in a type that fits all."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    out = tensors[0].new_full((len(tensors), *shape), fill, dtype=dtype)
    for row, t in zip(out, tensors, strict=True):
        row[tuple(slice(n) for n in t.shape)] = t
    return out


@dataclass
class PromptBatch:
    """Prompts of P objects in each of B images, from `pad`. The third dimension counts what one object has of a kind:
    a kind that nobody uses has length 0 there, so it costs nothing and its parameters still have gradients."""

    points: torch.Tensor  # (B, P, clicks, 2) float, x y in px
    point_labels: torch.Tensor  # (B, P, clicks) int64: 1 on the object, 0 beside it, -1 no click
    boxes: torch.Tensor  # (B, P, 0 or 1, 4) float, x0 y0 x1 y1 in px
    has_box: torch.Tensor  # (B, P, 0 or 1) bool
    mask_prompts: torch.Tensor  # (B, P, 0 or 1, H, W) bool, or float in [0, 1]
    has_mask: torch.Tensor  # (B, P, 0 or 1) bool
    texts: torch.Tensor  # (B, P, 0 or 1, E) float, the texts' embeddings, of any length
    has_text: torch.Tensor  # (B, P, 0 or 1) bool

    @property
    def valid(self) -> torch.Tensor:
        """bool (B, P): something points at the object; the others are padding."""
        clicked = (self.point_labels >= 0).sum(2) > 0
        return clicked | (self.has_box.sum(2) + self.has_mask.sum(2) + self.has_text.sum(2) > 0)

    @classmethod
    def pad(cls, prompts: Sequence[dict[str, torch.Tensor]]) -> "PromptBatch":
        """One dict per image, of Q objects each: any of points (Q, clicks, 2) with point_labels (Q, clicks), boxes
        (Q, 4), mask_prompts (Q, H, W), texts (Q, E), and has_box, has_mask, has_text (Q,) bool where only some objects
        have one. Numbers may differ between images. ValueError for fields of different lengths.
        """
        rows: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(cls)}
        for b, given in enumerate(prompts):
            lengths = {k: len(given[k]) for pair in KNOWN.items() for k in pair if k in given}
            alone = [k for v, k in KNOWN.items() if k in given and v not in given]
            if len(set(lengths.values())) > 1 or alone or "points" in given and "point_labels" not in given:
                raise ValueError(f"PromptBatch: image {b} has {lengths}: expected one length, and values with marks")
            Q = next(iter(lengths.values()), 0)
            for value, known in KNOWN.items():
                kind = torch.bool if value == "mask_prompts" else torch.float32
                found = given.get(value, torch.zeros(Q, *NOTHING[value], dtype=kind))
                marks = given.get(known, torch.ones(Q, dtype=torch.bool))
                if value not in given:
                    marks = marks.new_zeros(Q, 0, dtype=torch.int64 if value == "points" else torch.bool)
                elif value != "points":
                    found, marks = found[:, None], marks[:, None]
                rows[value].append(found)
                rows[known].append(marks)
        device = next((v.device for given in prompts for k, v in given.items() if k in KNOWN), None)
        return cls(
            **{k: padded([v.to(device) for v in vs], -1 if k == "point_labels" else 0) for k, vs in rows.items()}
        )

    @classmethod
    def of(cls, batch: dict, embed: Callable[[list[str]], torch.Tensor] | None = None) -> "PromptBatch":
        """The prompts of a training batch, whose fields are lists of B: those that `pad` reads; embed: its sentences
        `text` -> (Q, E). ValueError for sentences without embed."""
        names = [k for pair in KNOWN.items() for k in pair if k in batch]
        rows = [{k: batch[k][b] for k in names} for b in range(len(batch["image"]))]
        if "text" in batch:
            if embed is None:
                raise ValueError("PromptBatch: the batch has sentences, but nothing embeds them")
            rows = [{**row, "texts": embed(said)} for row, said in zip(rows, batch["text"], strict=True)]
        return cls.pad(rows)

    @classmethod
    def none(cls, B: int, device: torch.device | str = "cpu") -> "PromptBatch":
        """Nothing is pointed at, in B images: P = 0."""
        return cls.pad([{}] * B).to(device)

    def to(self, device: torch.device | str) -> "PromptBatch":
        return PromptBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


# ---- queries


def under(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Averages of values (B, D, h, w) under weights (B, m, h, w) >= 0 -> (B, m, D) float32; 0 where nothing weighs."""
    with torch.autocast(values.device.type, enabled=False):
        weight = weight.flatten(2)  # (B, m, S)
        return weight @ values.float().flatten(2).transpose(1, 2) / weight.sum(2, keepdim=True).clamp_min(1e-6)


def squeezed(masks: torch.Tensor, side: int) -> torch.Tensor:
    """F.adaptive_avg_pool2d(masks, side) of masks (..., H, W) float32 -> (..., side, side), as two products of sizes
    that an export can leave open: it would keep the pooling's windows of one size."""
    windows = []
    for n in masks.shape[-2:]:
        cell, px = torch.arange(side, device=masks.device)[:, None], torch.arange(n, device=masks.device)
        inside = (px >= cell * n // side) & (px * side < (cell + 1) * n)
        windows.append(inside.float())  # (side, n)
    down, across = windows
    with torch.autocast(masks.device.type, enabled=False):
        total = down @ (masks @ across.T)
    return total / down.sum(1, keepdim=True) / across.sum(1)


class Attention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention; no dropout. width: of all heads' queries,
    keys and values together (None: dim)."""

    def __init__(self, dim: int, heads: int, width: int | None = None):
        super().__init__()
        width = width or dim
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * width, dim)),
            nn.Parameter(torch.zeros(3 * width)),
        )
        self.out_proj = nn.Linear(width, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, Q, D) looks at memory (B, S, D); visible bool (Q, S) or (B, 1, Q, S), True: may be seen -> (B, Q, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = (x, memory, memory)
        q, k, v = (
            F.linear(i, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q or S, width / heads)
            for i, w, b in zip(inputs, weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TokenMean(nn.Module):
    """The other reader of an object's tokens: an MLP of each, averaged. No query chooses, all tokens weigh the same.
    Normed, because beside the seed, which it is added to, the mean of a fresh MLP is nothing: all prompts are alike."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, query: torch.Tensor, tokens: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """As Attention: query (R, 1, D), here without effect, tokens (R, n, D), known bool (R, 1, 1, n), at least one
        of each row -> (R, 1, D)."""
        share = known[:, 0].to(query.dtype) / known[:, 0].sum(-1, keepdim=True)  # (R, 1, n)
        return self.norm(share @ self.layers(tokens))


class PromptFusion(nn.Module):
    """Prompts -> queries (B, P, D) for the decoder. What points at one object becomes tokens, which a learned seed
    reads by attention, or which are averaged (fusion "mean"); to each is added which kind it is of:

    a click; the 2 corners of a box; a mask's form and place, averaged over its cells, or "no mask", always one of the
    two; a linear map of a text's embedding at unit length; and what is seen there: the features under the mask, and with
    look "all" at a click on the object, in the box, and where the text's attention finds them.
    """

    def __init__(self, dim: int, heads: int, embed_dim: int, fusion: str = "attention", look: str = "all"):
        super().__init__()
        self.sam = SAMPromptEncoder(dim)
        self.kinds = nn.Embedding(5, dim)
        self.look, self.text = nn.Linear(dim, dim), nn.Linear(embed_dim, dim)
        self.find = Attention(dim, heads) if look == "all" else None
        self.seed = nn.Parameter(torch.randn(dim))
        self.attn = Attention(dim, heads) if fusion == "attention" else TokenMean(dim)
        self.attn_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, prompts: PromptBatch, features: torch.Tensor) -> torch.Tensor:
        """features (B, D, h, w) or of clips (B, T, D, h, w) -> (B, P, D); finite but meaningless for padding.

        ValueError for prompts of another number of images, masks larger than the image, texts of another width.
        """
        features = features[:, 0] if features.ndim == 5 else features
        B, P = prompts.valid.shape
        if B != len(features):
            raise ValueError(f"PromptFusion: prompts of {B} images, features of {len(features)}")
        size = tuple(STRIDE * n for n in features.shape[-2:])
        masks = fitted(prompts.mask_prompts, size)
        no_mask = self.sam.no_mask_embed.weight.expand(B, P, 1, -1)
        groups = (
            (POINT, self.point_tokens(prompts, size), prompts.point_labels >= 0),
            (BOX, self.box_tokens(prompts.boxes, size), prompts.has_box.repeat_interleave(2, 2)),
            (MASK, self.mask_tokens(masks), prompts.has_mask),
            (MASK, no_mask, prompts.has_mask.sum(2, keepdim=True) == 0),
            (LOOK, self.look_tokens(masks, features), prompts.has_mask),
        )
        said = self.text_tokens(prompts.texts)  # (B, P, m, D)
        groups += ((TEXT, said, prompts.has_text),)
        if self.find is not None:
            groups += (
                (LOOK, self.look_at_points(prompts.points, features), prompts.point_labels == 1),
                (LOOK, self.look_in_boxes(prompts.boxes, features), prompts.has_box),
                (LOOK, self.look_for(said, features), prompts.has_text),
            )
        tokens = torch.cat([t + self.kinds.weight[kind] for kind, t, _ in groups], 2).flatten(0, 1)  # (R, n, D)
        known = torch.cat([k for *_, k in groups], 2).flatten(0, 1)[:, None, None]  # (R, 1, 1, n)
        query = self.seed.expand(B * P, 1, -1)
        query = self.attn_norm(query + self.attn(query, tokens, known))
        return self.ffn_norm(query + self.ffn(query)).reshape(B, P, query.shape[-1])

    def point_tokens(self, prompts: PromptBatch, size: tuple[int, int]) -> torch.Tensor:
        """Of clicks in an image of size (H, W): (B, P, clicks, D)."""
        labels = prompts.point_labels
        tokens = self.sam.encode_points(prompts.points.flatten(0, 1), labels.flatten(0, 1), size)
        return tokens.reshape(*labels.shape, tokens.shape[-1])

    def box_tokens(self, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """boxes (B, P, m, 4) -> (B, P, 2 m, D)."""
        B, P, m = boxes.shape[:3]
        tokens = self.sam.encode_boxes(boxes.flatten(0, 2), size)
        return tokens.reshape(B, P, 2 * m, tokens.shape[-1])

    def mask_tokens(self, masks: torch.Tensor) -> torch.Tensor:
        """masks (B, P, m, H, W) of the padded image -> form and place (B, P, m, D): SAM's map of the mask, which is
        squeezed into a square, and the position code, both averaged over the mask."""
        whole = masks.flatten(0, 2)[:, None]  # (R m, 1, H, W)
        form = self.sam.encode_masks((2 * squeezed(whole, MASK_SIDE) - 1) * MASK_LOGIT)  # (R m, D, 16, 16)
        grid = tuple(form.shape[-2:])
        tokens = under(squeezed(whole, grid[0]), form + self.sam.grid_code(grid))
        return tokens.reshape(*masks.shape[:3], tokens.shape[-1])

    def look_tokens(self, masks: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """masks (B, P, m, H, W) -> a linear map of the mean of features (B, D, h, w) under each: (B, P, m, D)."""
        B, P, m = masks.shape[:3]
        share = F.avg_pool2d(masks.flatten(0, 2)[:, None], STRIDE)  # (R m, 1, h, w)
        tokens = self.look(under(share.reshape(B, P * m, *share.shape[2:]), features))
        return tokens.reshape(B, P, m, tokens.shape[-1])

    def look_at_points(self, points: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """points (B, P, m, 2) px -> a linear map of features (B, D, h, w) there, bilinear: (B, P, m, D)."""
        h, w = features.shape[-2:]
        x, y = (2 * (points + 0.5)).unbind(-1)
        grid = torch.stack([x / (STRIDE * w), y / (STRIDE * h)], -1) - 1
        with torch.autocast(features.device.type, enabled=False):
            found = F.grid_sample(features.float(), grid.float(), padding_mode="border", align_corners=False)
        return self.look(found.permute(0, 2, 3, 1))

    def look_in_boxes(self, boxes: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """boxes (B, P, m, 4) px, first and last pixel -> a linear map of the mean of features (B, D, h, w) in each, cells
        cut by the border counting in part: (B, P, m, D)."""
        B, P, m = boxes.shape[:3]
        h, w = features.shape[-2:]
        x0, y0, x1, y1 = (boxes / STRIDE).unbind(-1)
        one = 1 / STRIDE
        across, down = torch.arange(w, device=boxes.device), torch.arange(h, device=boxes.device)
        across = (torch.minimum(across + 1, x1[..., None] + one) - torch.maximum(across, x0[..., None])).clamp_min(0)
        down = (torch.minimum(down + 1, y1[..., None] + one) - torch.maximum(down, y0[..., None])).clamp_min(0)
        share = down[..., :, None] * across[..., None, :]  # (B, P, m, h, w)
        tokens = self.look(under(share.reshape(B, P * m, h, w), features))
        return tokens.reshape(B, P, m, tokens.shape[-1])

    def look_for(self, tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Tokens of texts (B, P, m, D) -> what each finds in features (B, D, h, w) by attention: (B, P, m, D)."""
        found = self.find(tokens.flatten(1, 2), features.flatten(2).transpose(1, 2).to(tokens.dtype))
        return found.reshape(tokens.shape)

    def text_tokens(self, texts: torch.Tensor) -> torch.Tensor:
        """(B, P, m, E) -> (B, P, m, D)."""
        E = self.text.in_features
        if texts.shape[2] and texts.shape[3] != E:
            raise ValueError(f"PromptFusion: texts of width {texts.shape[3]}, expected embeddings of width {E}")
        return self.text(F.normalize(texts.reshape(*texts.shape[:3], E).float(), dim=-1))


def fitted(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks (B, P, m, H, W), bool or float, padded right and below to (H', W') as the network pads images; float32."""
    H, W = size
    if not masks.shape[2]:
        return masks.new_zeros(*masks.shape[:3], H, W, dtype=torch.float32)
    if masks.shape[-2] > H or masks.shape[-1] > W:
        raise ValueError(f"PromptFusion: masks of {tuple(masks.shape[-2:])} px, larger than the image, {H} x {W}")
    return F.pad(masks.float(), (0, W - masks.shape[-1], 0, H - masks.shape[-2]))
