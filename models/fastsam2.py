"""FastSAM2: one network that segments everything in an image or clip, and whatever is pointed at.

image -> ResNet -> LiteDFPN -> one feature map F at stride 4. Queries (kernels) k become masks <k, F>; three stages pool
F under the masks and rewrite the queries; an adaptor for objects or one for prompts ends the decoder.
A clip is a taller image: T maps are read as one of T h rows, so a query gives one tube and one class.

Shapes: B images or clips, T frames, N object queries, P prompts, Q = N + P, S pixels of all frames, D width,
K classes, E width of the class embeddings, V embeddings (synonyms) per class.
Source: Xu et al., RAP-SAM, ICLR 2025, eq. 2-6. Parameter names are those of the released weights (`neck.`, `head.`)
and of torchvision's ResNet (`backbone.`).
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.lite_dfpn import LiteDFPN
from utils.run import UserError, read_config
from utils.weights import load_strict, read_tensors

BACKBONES = {"resnet18": (64, 128, 256, 512), "resnet34": (64, 128, 256, 512), "resnet50": (256, 512, 1024, 2048)}
LOGIT_SCALE = math.exp(4.6052)  # of the cosine, as released: 100.003
TEMPERATURE = 0.1  # of the stages' classes; the object adaptor has none
BOX_EPS = 1e-5  # the released box encoding keeps this far from 0 and 1
STRIDE = 32  # of the backbone's last map


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


class KernelUpdate(nn.Module):
    """New queries from pooled features and queries, both (B, Q, D), through two gates; no residual."""

    def __init__(self, dim: int):
        super().__init__()
        self.dynamic_layer, self.input_layer = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim)
        self.input_gate, self.update_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.input_norm_in, self.input_norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc_layer, self.fc_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, pooled: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pooled.device.type, enabled=False):  # a sum over the pixels does not fit float16
            p_in, p_out = self.dynamic_layer(pooled.float()).chunk(2, -1)
            i_in, i_out = self.input_layer(k.float()).chunk(2, -1)
            gate = i_in * p_in
            a = self.input_norm_in(self.input_gate(gate)).sigmoid()
            u = self.norm_in(self.update_gate(gate)).sigmoid()
            new = u * self.norm_out(p_out) + a * self.input_norm_out(i_out)
            return F.relu(self.fc_norm(self.fc_layer(new)))


class Attention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention; no dropout."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * dim, dim)),
            nn.Parameter(torch.zeros(3 * dim)),
        )
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, Q, D) looks at memory (B, S, D); visible bool (Q, S), True: may be seen -> (B, Q, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        inputs = (x, memory, memory)
        q, k, v = (
            F.linear(i, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q or S, D / heads)
            for i, w, b in zip(inputs, weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class PixelAttention(nn.Module):
    """k + attention of the queries over all pixels; one level deeper in names, as released."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = Attention(dim, heads)

    def forward(self, k: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return k + self.attn(k, pixels)


class FeedForward(nn.Module):
    """x + W2 ReLU(W1 x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.ReLU()), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def mlp(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


def branch(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU())


def pool(logits: torch.Tensor, pixels: torch.Tensor, mean: bool) -> torch.Tensor:
    """Features under the masks: sum, or mean, of pixels (B, S, D) where logits (B, Q, S) > 0 -> (B, Q, D) float32.

    No gradient reaches the masks. An empty mask pools 0.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        hard = (logits.detach() > 0).float()
        total = hard @ pixels.float()
        return total / hard.sum(-1, keepdim=True).clamp_min(1) if mean else total


class Stage(nn.Module):
    """One decoder stage: pool, update the queries, let them see each other, read classes, masks and quality."""

    def __init__(self, cfg: FastSAM2Config):
        super().__init__()
        D = cfg.dim
        self.mean = not cfg.compat
        self.kernel_update = KernelUpdate(D)
        self.s_atten, self.s_atten_norm = Attention(D, cfg.heads), nn.LayerNorm(D)
        self.ffn, self.ffn_norm = FeedForward(D, cfg.hidden), nn.LayerNorm(D)
        self.cls_fcs, self.cls_proj = branch(D), mlp(D, cfg.embed_dim)
        self.mask_fcs, self.fc_mask, self.iou_embed = branch(D), nn.Linear(D, D), mlp(D, 1)

    def forward(self, k, masks, pixels, visible=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """k (B, Q, D), masks (B, Q, S) logits, pixels (B, S, D) -> k, class embeddings
        (B, Q, E), masks, IoU (B, Q, 1)."""
        k = self.kernel_update(pool(masks, pixels, self.mean), k)
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
        self.prompt_attn, self.prompt_norm = PixelAttention(D, cfg.heads), nn.LayerNorm(D)
        self.prompt_iou = nn.Linear(D, 1)
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
            return F.pad(best, (0, 1)) * (LOGIT_SCALE / temperature)

    def box_queries(self, boxes_xyxy_px: torch.Tensor, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Prompt queries as released (compat): boxes (B, P, 4) in pixels of an image of size (H, W); labels int64
        (B, P), 1 for a point turned into a box of 6 x 6 pixels, 0 for a box -> (B, P, D)."""
        H, W = size
        boxes_01 = boxes_xyxy_px.float() / boxes_xyxy_px.new_tensor([W, H, W, H], dtype=torch.float32)
        kind = self.mask_tokens.weight[0] + self.pb_embedding(labels)
        return kind + self.pos_linear(box_encoding(boxes_01, self.cfg.dim))

    def forward(
        self, features: torch.Tensor, prompts: torch.Tensor | None = None, objects: bool = True
    ) -> dict[str, list[torch.Tensor] | torch.Tensor]:
        """features (B, D, h, w) of images or (B, T, D, h, w) of clips; prompts (B, P, D); objects: N queries first.

        -> classes: logits (B, Q, K + 1), masks: logits (B, Q, h, w) or (B, Q, T, h, w), iou: (B, Q, 1), each a list
        over the stages and then the adaptors; queries (B, Q, D). Prompts change neither the objects nor each other.
        In training the adaptor that has nothing to do runs on no query, so each of its parameters has a gradient of 0.
        """
        if prompts is None and not objects:
            raise ValueError("DynamicDecoder: neither objects nor prompts to decode")
        N, image = self.cfg.queries if objects else 0, features.ndim == 4
        frames = features.unsqueeze(1) if image else features  # (B, T, D, h, w)
        B, T, D, h, w = frames.shape
        pixels = frames.permute(0, 1, 3, 4, 2).reshape(B, T * h * w, D)  # (B, S, D)
        k = self.kernels.weight[:N].expand(B, -1, -1)
        visible = None
        if prompts is not None:
            k, visible = torch.cat([k, prompts.to(k.dtype)], 1), visibility(N, prompts.shape[1], k.device)
        masks = k @ pixels.transpose(1, 2)  # (B, Q, S)
        outputs = []
        for stage in self.mask_heads:
            k, embedding, masks, iou = stage(k, masks, pixels, visible)
            outputs.append((self.classify(embedding, TEMPERATURE), masks, iou))
        k, last = self.adapt(k, outputs[-1], pixels, N)
        classes, masks, iou = (list(values) for values in zip(*outputs, last, strict=True))
        masks = [m.unflatten(2, (h, w) if image else (T, h, w)) for m in masks]
        return {"classes": classes, "masks": masks, "iou": iou, "queries": k}

    def adapt(self, k, stage: tuple, pixels, N: int) -> tuple[torch.Tensor, tuple]:
        """Queries (B, Q, D), N of them objects, and what the last stage made of them -> the same after the adaptors."""
        classes, masks, iou = (value.split([N, k.shape[1] - N], 1) for value in stage)
        objects, prompts = k.split([N, k.shape[1] - N], 1)
        if N or self.training:
            objects = self.panoptic_attn(pool(masks[0], pixels, not self.cfg.compat), objects)
            classes = (self.classify(self.panoptic_cls(objects)), classes[1])
        if prompts.shape[1] or self.training:
            seen = pixels if prompts.shape[1] else pixels[:, :1]
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

    def decode(self, features: torch.Tensor, prompts: torch.Tensor | None = None, objects: bool = True) -> dict:
        """Masks, classes and mask quality of objects, prompts or both: DynamicDecoder.forward."""
        return self.head(features, prompts, objects)

    def forward(self, images: torch.Tensor, prompts: torch.Tensor | None = None, objects: bool = True) -> dict:
        return self.decode(self.encode(images), prompts, objects)

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
