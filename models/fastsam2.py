"""FastSAM2: one network that segments everything in an image or clip, and whatever is pointed at.

image -> ResNet -> LiteDFPN -> one feature map F at stride 4. Queries (kernels) k become masks <k, F>; three stages pool
F under the masks and rewrite the queries; an adaptor for objects or one for prompts ends the decoder.
A clip is a taller image: T maps are read as one of T h rows, so a query gives one tube and one class.

Shapes: B images or clips, T frames, N object queries, P prompts, Q = N + P, S pixels of all frames, D width,
K classes, E width of the class embeddings, V embeddings (synonyms) per class.
Source: Xu et al., RAP-SAM, ICLR 2025, eq. 2-6; the auxiliary classes of pixels: Zhang et al., K-Net, NeurIPS 2021.
Parameter names are those of the released weights (`neck.`, `head.`)
and of torchvision's ResNet (`backbone.`).
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.decoder_blocks import FeedForward, KernelUpdate, PixelAttention, branch, mlp, pool
from models.fastsam2_options import best_queries, check_options, coarse_pixels, take
from models.lite_dfpn import LiteDFPN
from models.prompt_fusion import OBJECT_TASKS, Attention, PromptBatch, PromptFusion, check_task
from models.semantic_head import TEMPLATES
from models.streaming_memory import Followed, MemoryConfig, StreamingMemory
from utils.run import UserError, read_config
from utils.weights import load_strict, read_tensors

TEXTS = ("random", "hash", "clip")
BACKBONES = {"resnet18": (64, 128, 256, 512), "resnet34": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}
LOGIT_SCALE = math.exp(4.6052)  # of the cosine, as released: 100.003
TEMPERATURE = 0.1  # of the stages' classes; the object adaptor has none
BOX_EPS = 1e-5  # the released box encoding keeps this far from 0 and 1
STRIDE = 32  # of the backbone's last map
CLICK_RADIUS = 3  # px; the released model takes a click for a box of this half side


@dataclass
class FastSAM2Config:
    """Everything a checkpoint needs to rebuild the model."""

    classes: list[str] = field(default_factory=lambda: ["object"])  # K names, in the order of the class embeddings
    backbone: str = "resnet50"  # resnet18 | resnet34 | resnet50
    queries: int = 100  # N
    dim: int = 256
    heads: int = 8
    hidden: int = 2048  # of the feed-forward blocks
    stages: int = 3
    embed_dim: int = 768  # E
    synonyms: int = 1  # V
    compat: bool = False  # as released: masks pool a sum instead of a mean, prompts are boxes
    is_thing: list[bool] = field(default_factory=list)  # per class; filled with True
    text: str = "random"  # where class and text embeddings come from: random | hash (hash_texts) | clip
    frozen_norm: bool = True  # the backbone's BatchNorm keeps ImageNet's statistics; False: trained from random weights
    keep_queries: int = 0  # object queries that go on after stage prune_after, those most surely an object; 0: all
    prune_after: int = 1
    key_rank: int = 0  # width of keys and values when prompts look at the pixels, a multiple of heads; 0: dim
    key_stride: int = 4  # px; those keys are features averaged to stride 4 (as they are), 8 or 16
    fusion: str = "attention"  # what reads an object's prompt tokens: attention | mean
    look: str = "all"  # what else brings features along: all (clicks, boxes, masks, texts) | masks
    logit_scale: float = LOGIT_SCALE  # of the cosines of the last output's classes
    temperature: float = TEMPERATURE  # of the stages' classes, whose scale is logit_scale / temperature
    residual: bool = True  # stages add to a query; compat, or False: they replace it, as released
    pixel_classes: bool = False  # training also asks each pixel for its class (K-Net's auxiliary segmentation)
    memory: MemoryConfig | None = None  # of the objects followed through a video, of the same dim and heads; None: none

    def __post_init__(self):
        self.memory = MemoryConfig(**self.memory) if isinstance(self.memory, dict) else self.memory
        self.is_thing = self.is_thing or [True] * len(self.classes)
        if len(self.is_thing) != len(self.classes) or self.text not in TEXTS:
            raise ValueError(f"FastSAM2Config: {len(self.is_thing)} is_thing for {len(self.classes)} classes, text "
                             f"{self.text!r}; expected one each, and one of {TEXTS}")  # fmt: skip
        if self.memory is not None and (self.memory.dim, self.memory.heads) != (self.dim, self.heads):
            raise ValueError(f"FastSAM2Config: memory of dim {self.memory.dim}, {self.memory.heads} heads; expected "
                             f"those of the network, {self.dim} and {self.heads}")  # fmt: skip
        check_options(self)


class Backbone(nn.Module):
    """torchvision's ResNet up to its four stages: (B, 3, H, W) -> maps of stride 4, 8, 16, 32."""

    def __init__(self, kind: str):
        super().__init__()
        net = getattr(torchvision.models, kind)(weights=None)
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        c2 = self.layer1(self.maxpool(F.relu(self.bn1(self.conv1(x)))))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)]


class Stage(nn.Module):
    """One decoder stage: pool, update the queries, let them see each other, read classes, masks and quality."""

    def __init__(self, cfg: FastSAM2Config):
        super().__init__()
        D = cfg.dim
        self.mean, self.residual = not cfg.compat, cfg.residual and not cfg.compat
        self.kernel_update = KernelUpdate(D)
        self.s_atten, self.s_atten_norm = Attention(D, cfg.heads), nn.LayerNorm(D)
        self.ffn, self.ffn_norm = FeedForward(D, cfg.hidden), nn.LayerNorm(D)
        self.cls_fcs, self.cls_proj = branch(D), mlp(D, cfg.embed_dim)
        self.mask_fcs, self.fc_mask, self.iou_embed = branch(D), nn.Linear(D, D), mlp(D, 1)

    def forward(self, k, masks, pixels, visible=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """k (B, Q, D), masks (B, Q, S) logits, pixels (B, S, D) -> k, class embeddings
        (B, Q, E), masks, IoU (B, Q, 1)."""
        new = self.kernel_update(pool(masks, pixels, self.mean), k)
        k = k + new if self.residual else new
        k = self.s_atten_norm(k + self.s_atten(k, k, visible))
        k = self.ffn_norm(self.ffn(k))
        m = self.mask_fcs(k)
        return k, self.cls_proj(self.cls_fcs(k)), self.fc_mask(m) @ pixels.transpose(1, 2), self.iou_embed(m)


class DynamicDecoder(nn.Module):
    """Queries -> masks, classes and mask quality; objects and prompts share the stages and part at the adaptors.

    `classifier` (K, V, E) holds unit text embeddings and belongs to the state: a checkpoint runs without a text model.
    Until `set_classifier` is called it holds random directions.
    """

    def __init__(self, cfg: FastSAM2Config):
        super().__init__()
        D = cfg.dim
        self.cfg = cfg
        self.kernels = nn.Embedding(cfg.queries, D)
        self.mask_heads = nn.ModuleList(Stage(cfg) for _ in range(cfg.stages))
        self.panoptic_attn, self.panoptic_cls = KernelUpdate(D), nn.Sequential(nn.Linear(D, cfg.embed_dim))
        self.prompt_attn, self.prompt_norm = PixelAttention(D, cfg.heads, cfg.key_rank or D), nn.LayerNorm(D)
        self.prompt_iou = nn.Linear(D, 1)
        self.pixel_cls = nn.Linear(D, cfg.embed_dim) if cfg.pixel_classes else None
        if cfg.compat:
            self.mask_tokens, self.pb_embedding = nn.Embedding(1, D), nn.Embedding(2, D)
            self.pos_linear = nn.Linear(2 * D, D)
        random = torch.randn(len(cfg.classes), cfg.synonyms, cfg.embed_dim)
        self.register_buffer("classifier", F.normalize(random, dim=-1))

    def set_classifier(self, embeddings: torch.Tensor) -> None:
        """embeddings (K, V, E) of the cfg.classes, any length; a class with fewer than V texts repeats one."""
        if embeddings.shape != self.classifier.shape:
            raise ValueError(
                f"set_classifier: {tuple(embeddings.shape)}, expected (K, V, E) = {tuple(self.classifier.shape)}"
            )
        self.classifier.copy_(F.normalize(embeddings.float(), dim=-1))

    def classify(self, embedding: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(B, Q, E) -> logits (B, Q, K + 1) float32, the last one "no object", always 0."""
        with torch.autocast(embedding.device.type, enabled=False):  # logits reach 1000, where bfloat16 has steps of 4
            cosine = F.normalize(embedding.float(), dim=-1) @ self.classifier.float().flatten(0, 1).T  # (B, Q, K * V)
            best = cosine.unflatten(-1, self.classifier.shape[:2]).amax(-1)  # (B, Q, K)
            return F.pad(best, (0, 1)) * (self.cfg.logit_scale / temperature)

    def box_queries(self, boxes_xyxy_px: torch.Tensor, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Prompt queries as released (compat): boxes (B, P, 4) in pixels of an image of size (H, W); labels int64
        (B, P), 1 for a point turned into a box of 6 x 6 pixels, 0 for a box -> (B, P, D)."""
        H, W = size
        x0, y0, x1, y1 = boxes_xyxy_px.float().unbind(-1)
        boxes_01 = torch.stack([x0 / W, y0 / H, x1 / W, y1 / H], -1)  # exports keep the sides open
        kind = self.mask_tokens.weight[0] + self.pb_embedding(labels)
        return kind + self.pos_linear(box_encoding(boxes_01, self.cfg.dim))

    def forward(
        self, features: torch.Tensor, prompts: torch.Tensor | None = None, objects: bool = True
    ) -> dict[str, list[torch.Tensor] | torch.Tensor]:
        """features (B, D, h, w) of images or (B, T, D, h, w) of clips; prompts (B, P, D); objects: N queries first.

        -> classes: logits (B, Q, K + 1), masks: logits (B, Q, h, w) or (B, Q, T, h, w), iou: (B, Q, 1), each a list
        over the stages and then the adaptors; queries (B, Q, D). Prompts change neither the objects nor each other.
        With cfg.keep_queries the outputs after stage cfg.prune_after have fewer objects, prompts are never left out.
        In training the adaptor that has nothing to do runs on no query, so each of its parameters has a gradient of 0;
        and with cfg.pixel_classes the dict of objects has pixels: class logits (B, K, S) of each cell of the features.
        """
        if prompts is None and not objects:
            raise ValueError("DynamicDecoder: neither objects nor prompts to decode")
        N, image = self.cfg.queries if objects else 0, features.ndim == 4
        frames = features.unsqueeze(1) if image else features  # (B, T, D, h, w)
        B, T, D, h, w = frames.shape
        pixels = frames.permute(0, 1, 3, 4, 2).reshape(B, T * h * w, D)  # (B, S, D)
        taught = self.pixel_cls if self.training else None
        k = self.kernels.weight[:N].expand(B, -1, -1) + (0.0 if taught is None else no_effect(taught))
        visible = None
        if prompts is not None:
            k, visible = torch.cat([k, prompts.to(k.dtype)], 1), visibility(N, prompts.shape[1], k.device)
        masks = k @ pixels.transpose(1, 2)  # (B, Q, S)
        outputs = []
        for number, stage in enumerate(self.mask_heads, start=1):
            k, embedding, masks, iou = stage(k, masks, pixels, visible)
            classes = self.classify(embedding, self.cfg.temperature)
            outputs.append((classes, masks, iou))
            if number == self.cfg.prune_after and 0 < self.cfg.keep_queries < N:
                best = best_queries(classes, N, self.cfg.keep_queries)
                k, classes, masks, iou = (take(values, best) for values in (k, classes, masks, iou))
                N = self.cfg.keep_queries
                visible = None if prompts is None else visibility(N, prompts.shape[1], k.device)
        k, last = self.adapt(k, (classes, masks, iou), pixels, (T, h, w), N)
        classes, masks, iou = (list(values) for values in zip(*outputs, last, strict=True))
        masks = [m.unflatten(2, (h, w) if image else (T, h, w)) for m in masks]
        out = {"classes": classes, "masks": masks, "iou": iou, "queries": k}
        if taught is not None and objects:
            out["pixels"] = self.classify(taught(pixels))[..., :-1].transpose(1, 2)
        return out

    def adapt(self, k, stage: tuple, pixels, grid: tuple[int, int, int], N: int) -> tuple[torch.Tensor, tuple]:
        """Queries (B, Q, D), N of them objects, and what the last stage made of them -> the same after the adaptors."""
        classes, masks, iou = (value.split([N, k.shape[1] - N], 1) for value in stage)
        objects, prompts = k.split([N, k.shape[1] - N], 1)
        if N or self.training:
            objects = self.panoptic_attn(pool(masks[0], pixels, not self.cfg.compat), objects)
            classes = (self.classify(self.panoptic_cls(objects)), classes[1])
        if prompts.shape[1] or self.training:
            seen = coarse_pixels(pixels, grid, self.cfg.key_stride // 4) if prompts.shape[1] else pixels[:, :1]
            prompts = self.prompt_norm(self.prompt_attn(prompts, seen))
            iou = (iou[0], self.prompt_iou(prompts))
        k = torch.cat([objects, prompts], 1)
        return k, (torch.cat(classes, 1), k @ pixels.transpose(1, 2), torch.cat(iou, 1))


def visibility(N: int, P: int, device: torch.device) -> torch.Tensor:
    """bool (N + P, N + P): an object query sees the objects, a prompt sees itself."""
    index = torch.arange(N + P, device=device)
    is_object = index < N
    return (is_object[:, None] & is_object) | (index[:, None] == index)


def box_encoding(boxes_xyxy_01: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines and cosines of a box's (y, x, w, h), dim / 2 features each: (B, P, 4) -> (B, P, 2 dim) float32."""
    x0, y0, x1, y1 = boxes_xyxy_01.float().unbind(-1)
    values = torch.stack([(y0 + y1) / 2, (x0 + x1) / 2, x1 - x0, y1 - y0], -1).clamp(BOX_EPS, 1 - BOX_EPS)
    half = dim // 4
    wave = 10000 ** (-torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angle = 2 * math.pi * values[..., None] * wave  # (B, P, 4, dim / 4)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


class FastSAM2(nn.Module):
    """The whole network: `encode` images once, `decode` any number of times."""

    def __init__(self, cfg: FastSAM2Config):
        super().__init__()
        if cfg.backbone not in BACKBONES:
            raise ValueError(f"backbone {cfg.backbone!r}: expected one of {sorted(BACKBONES)}")
        if not cfg.classes or cfg.queries < 1 or cfg.stages < 1:
            raise ValueError(
                f"FastSAM2: {len(cfg.classes)} classes, {cfg.queries} queries, {cfg.stages} stages: at least 1 of each"
            )
        self.cfg = cfg
        self.backbone = Backbone(cfg.backbone)
        self.neck = LiteDFPN(BACKBONES[cfg.backbone], cfg.dim)
        self.head = DynamicDecoder(cfg)
        self.prompt_fusion = (
            None if cfg.compat else PromptFusion(cfg.dim, cfg.heads, cfg.embed_dim, cfg.fusion, cfg.look)
        )
        self.memory = None if cfg.memory is None else StreamingMemory(cfg.memory)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """RGB images (B, 3, H, W) or clips (B, T, 3, H, W), uint8 or float in [0, 1] -> features (B, D, h, w) or
        (B, T, D, h, w). Sides are padded right and below to multiples of 32 with the mean colour; h = padded H / 4."""
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise ValueError(f"encode: images {tuple(images.shape)}, expected (B, 3, H, W) or (B, T, 3, H, W)")
        x = images.flatten(0, -4)
        x = (x / 255.0 if x.dtype == torch.uint8 else x).sub(self.mean).div(self.std)
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % STRIDE, 0, -H % STRIDE))
        return self.neck(self.backbone(x)).unflatten(0, images.shape[:-3])

    def queries(self, prompts: PromptBatch, features: torch.Tensor) -> torch.Tensor:
        """Prompts of B images or clips -> queries (B, P, D) for `decode`."""
        if self.prompt_fusion is not None:
            return self.prompt_fusion(prompts, features)
        h, w = features.shape[-2:]
        return self.head.box_queries(*released_prompts(prompts), (4 * h, 4 * w))

    def decode(self, features: torch.Tensor, prompts: torch.Tensor | None = None, objects: bool = True) -> dict:
        """Masks, classes and mask quality of objects, prompts or both: DynamicDecoder.forward."""
        return self.head(features, prompts, objects)

    def follow(
        self,
        features: torch.Tensor,
        prompts: PromptBatch,
        first: torch.Tensor | None = None,
        truth: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
    ) -> dict:
        """Objects through clips with the memory, frame by frame: features (B, T, D, h, w), prompts of frame first int64
        (B, P) of each object (None: 0; < 0: none), truth and forced as in StreamingMemory.follow -> the decoder's dict
        with one more dimension, T after P, so masks are (B, P, T, h, w), and presence (B, P, T) logits, present (B, P,
        T) bool. ValueError without a memory."""
        if self.memory is None:
            raise ValueError("follow: this network has no memory (FastSAM2Config.memory)")
        first = torch.zeros_like(prompts.valid, dtype=torch.int64) if first is None else first
        queries = torch.zeros(*first.shape, self.cfg.dim, device=first.device)
        for t in sorted({0, *first.clamp_min(0).unique().tolist()}):  # frame 0 always: its parameters get a gradient
            queries = torch.where((first == t)[..., None], self.queries(prompts, features[:, t]), queries)
        decode = partial(self.decode, objects=False)
        return stacked(self.memory.follow(features, decode, queries, first, truth, forced))

    def forward(
        self,
        images: torch.Tensor,
        prompts: PromptBatch | None = None,
        objects: bool = True,
        task: str | None = None,
        **taught: torch.Tensor | None,
    ) -> dict:
        """Images or clips -> DynamicDecoder.forward's dict; with a memory and task vos that of `follow`, whose first,
        truth, forced are `taught`. A task decides whether objects are decoded; ValueError if it contradicts the rest.
        In training every parameter has a gradient whatever the task."""
        if task is not None:
            check_task(task, images.ndim == 5, prompts is not None)
            objects = task in OBJECT_TASKS
        features = self.encode(images)
        if self.memory is not None and self.training:
            features = features + no_effect(self.memory)
        if self.memory is not None and task == "vos":
            return self.follow(features, prompts, **taught)
        if taught:
            raise ValueError(f"forward: {', '.join(taught)} are for task 'vos' of a network with a memory")
        if prompts is None and objects and self.training:
            prompts = PromptBatch.none(len(images), images.device)
        return self.decode(features, None if prompts is None else self.queries(prompts, features), objects)

    def train(self, mode: bool = True) -> "FastSAM2":
        """As nn.Module.train, but with cfg.frozen_norm the backbone's BatchNorm stays in evaluation."""
        super().train(mode)
        for m in self.backbone.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.train(mode and not self.cfg.frozen_norm)
        return self

    @property
    def is_thing(self) -> torch.Tensor:
        """bool (K,) on the model's device."""
        return torch.tensor(self.cfg.is_thing, device=self.mean.device)

    def set_vocabulary(
        self, names: Sequence[str], embeddings: torch.Tensor, is_thing: Sequence[bool], text: str = "hash"
    ) -> None:
        """From now on the classes are these K: embeddings (K, V, E) of any length, from `build_vocabulary`; text: which
        text model made them. All of it belongs to the checkpoint. ValueError for sizes that do not fit together."""
        K, E = len(names), self.cfg.embed_dim
        if not K or embeddings.ndim != 3 or embeddings.shape[::2] != (K, E) or not embeddings.shape[1]:
            raise ValueError(f"set_vocabulary: {K} names, embeddings {tuple(embeddings.shape)}; expected (K, V, {E})")
        new = replace(self.cfg, classes=list(names), synonyms=embeddings.shape[1], text=text,
                      is_thing=[bool(t) for t in is_thing])  # fmt: skip
        self.head.classifier = F.normalize(embeddings.float(), dim=-1).to(self.head.classifier.device)
        self.cfg = self.head.cfg = new

    def load_imagenet(self, path: Path | str) -> None:
        """Backbone weights from a local torchvision file of the same ResNet; its classifier `fc` is the only thing left
        out, and batch counters, which torchvision's oldest files do not hold, stay. UserError for anything else."""
        state = {k: v for k, v in read_tensors(path).items() if k not in ("fc.weight", "fc.bias")}
        counters = {k: v for k, v in self.backbone.state_dict().items() if "num_batches" in k and k not in state}
        load_strict(self.backbone, {**state, **counters}, path)

    def config_dict(self) -> dict:
        """What config.json holds; `from_checkpoint` rebuilds the model from it."""
        return {"model": asdict(self.cfg), "class": type(self).__name__}

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> "FastSAM2":
        """The model saved in `folder`. UserError for any tensor missing, added or reshaped."""
        config = read_config(folder)
        if config.get("class") != cls.__name__:
            raise UserError(f"{folder}: a checkpoint of {config.get('class')}, expected one of {cls.__name__}")
        try:
            model = cls(FastSAM2Config(**config["model"]))
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder}/config.json: not a configuration of this version ({e}); train again") from e
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
        return model


def no_effect(module: nn.Module) -> torch.Tensor:
    """0, whatever the parameters hold, of which each gets a gradient of 0: what is not used has no gradient of None."""
    return sum(p.flatten()[:0].float().sum() for p in module.parameters())


def stacked(frames: Sequence[Followed]) -> dict:
    """Objects in T frames one after the other -> the decoder's dict, presence and present, all (B, P, T, ...)."""

    def along(values):
        lists = isinstance(values[0], list)
        return [along(stage) for stage in zip(*values, strict=True)] if lists else torch.stack(values, 2)

    found = {k: along([f.out[k] for f in frames]) for k in frames[0].out}
    return found | {k: along([getattr(f, k) for f in frames]) for k in ("presence", "present")}


def released_prompts(prompts: PromptBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the released model can read: boxes_xyxy_px (B, P, 4) and labels (B, P), 1 for a click and 0 for a box.

    ValueError for masks, texts, clicks beside the object, or an object with more than one click or box.
    """
    clicked = prompts.point_labels == 1
    number = clicked.sum(2) + prompts.has_box.sum(2)  # (B, P)
    if prompts.has_mask.any() or prompts.has_text.any() or (prompts.point_labels == 0).any() or (number > 1).any():
        raise ValueError("compat: the released model takes one positive click or one box per object, nothing else")
    click = (prompts.points * clicked[..., None]).sum(2)  # (B, P, 2)
    around = torch.cat([click - CLICK_RADIUS, click + CLICK_RADIUS], -1)
    is_click = clicked.any(2)
    return torch.where(is_click[..., None], around, prompts.boxes.sum(2)), is_click.long()


# ---- texts


def hash_texts(texts: Sequence[str], width: int) -> torch.Tensor:
    """Embeddings (n, width) of unit length without a text model: each word, and each pair of neighbours, is a fixed
    random direction, a text the sum of its own. Texts that share words are alike; nothing is known about meaning."""
    rows = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        parts = words + [" ".join(pair) for pair in zip(words, words[1:], strict=False)]
        seeds = [torch.Generator().manual_seed(zlib.crc32(p.encode())) for p in parts or [""]]
        rows.append(sum(torch.randn(width, generator=g) for g in seeds))
    return F.normalize(torch.stack(rows), dim=-1) if rows else torch.zeros(0, width)


def build_vocabulary(
    names: Sequence[str | Sequence[str]], embed: Callable[[list[str]], torch.Tensor], templates=TEMPLATES
) -> torch.Tensor:
    """Embeddings (K, V, E) for `set_vocabulary`. A name is a text or a list of synonyms; V: the most that one has, the
    others repeat their first. Of each synonym: the mean of the unit embeddings of its templates, at unit length.

    embed: texts -> (n, E): partial(embed_texts, clip.encode_text, tokenizer), or partial(hash_texts, width=E) with
    templates ("{}",).
    """
    every = [[name] if isinstance(name, str) else list(name) for name in names]
    V = max(map(len, every), default=0)
    if not V or not all(every):
        raise ValueError(f"build_vocabulary: {len(every)} names, expected at least one and no empty list of synonyms")
    texts = [t.format(word) for words in every for word in words + words[:1] * (V - len(words)) for t in templates]
    each = F.normalize(embed(texts).float(), dim=-1).unflatten(0, (len(every), V, len(templates)))
    return F.normalize(each.mean(2), dim=-1)
