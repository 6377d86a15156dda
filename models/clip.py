"""CLIP: an image tower and a text tower with one embedding space; local weights of transformers, OpenAI or open_clip.

Shapes: B images or texts, H W pixels, N = (H / patch) (W / patch) patches, L words of context, E embedding width;
W is also the width of a tower where no pixel is meant. Reference: Radford et al. 2021; the parameter names are
OpenAI's (openai/CLIP@main, clip/model.py), so `CLIP.state_dict()` is their layout, which open_clip keeps.
"""

import functools
import json
import math
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from utils.run import UserError
from utils.weights import load_strict, read_tensors

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = ("quick_gelu", "gelu")
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers; the defaults are ViT-B/16."""

    image_size: int = 224  # pixels that the stored position embedding was made for
    patch: int = 16
    width: int = 768  # image tower
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    embed_dim: int = 512
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    text_mlp: int = 2048
    context: int = 77
    vocab_size: int = 49408
    eot: int = 49407  # id of the end token; the text embedding is read at its first place
    activation: str = "quick_gelu"  # quick_gelu (OpenAI's weights) | gelu (open_clip's own)
    eps: float = 1e-5


PRESETS = {
    "vit_b16": CLIPConfig(),
    "vit_l14": CLIPConfig(
        patch=14, width=1024, layers=24, heads=16, mlp=4096, embed_dim=768, text_width=768, text_heads=12, text_mlp=3072
    ),
    "tiny": CLIPConfig(  # for laptops; its words are bytes, see `save_tiny_snapshot`
        width=64, layers=2, heads=2, mlp=256, embed_dim=32, text_width=64, text_layers=2, text_heads=2, text_mlp=256,
        vocab_size=514, eot=513,
    ),
}  # fmt: skip


# ---- layers


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention, in pieces that dense features need."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"SelfAttention: {width} channels cannot be split into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, N, W) -> queries, keys, values, each (B, h, N, W / h)."""
        x = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """(B, h, N, W / h) -> (B, N, W)."""
        return self.out_proj(x.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.qkv(x), is_causal=causal))


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x); OpenAI's ResidualAttentionBlock."""

    def __init__(self, width: int, heads: int, mlp: int, activation: str, eps: float):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: expected one of {ACTIVATIONS}")
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = SelfAttention(width, heads)
        act = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        layers = [("c_fc", nn.Linear(width, mlp)), ("act", act), ("c_proj", nn.Linear(mlp, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Input and attention output, both (B, N, W) -> the block's output."""
        x = x + attended
        return x + self.mlp(self.ln_2(x))

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        return self.finish(x, self.attn(self.ln_1(x), causal))


class Transformer(nn.Module):
    """A stack of blocks, initialised as OpenAI's: depth enters the std of what is added to the residual stream."""

    def __init__(self, width: int, layers: int, heads: int, mlp: int, activation: str, eps: float):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, activation, eps) for _ in range(layers))
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.zeros_(block.attn.out_proj.bias)

    def forward(self, x: torch.Tensor, causal: bool = False) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


# ---- towers


class CLIPVision(nn.Module):
    """Images (B, 3, H, W) float, normalised by CLIP_MEAN and CLIP_STD -> tokens (B, 1+N, W) before `ln_post`."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.clip_cfg, width, side = cfg, cfg.width, cfg.image_size // cfg.patch
        self.conv1 = nn.Conv2d(3, width, cfg.patch, stride=cfg.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + side * side, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width, cfg.eps), nn.LayerNorm(width, cfg.eps)
        self.transformer = Transformer(width, cfg.layers, cfg.heads, cfg.mlp, cfg.activation, cfg.eps)
        self.proj = nn.Parameter(torch.randn(width, cfg.embed_dim) * width**-0.5)

    def positions(self, h: int, w: int) -> torch.Tensor:
        """Position embedding (1+N, W) of an h x w grid; another grid than the stored one is interpolated, bicubic."""
        side = self.clip_cfg.image_size // self.clip_cfg.patch
        if (h, w) == (side, side):
            return self.positional_embedding
        grid = self.positional_embedding[1:].T.unflatten(1, (side, side))[None]  # (1, W, side, side)
        grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)[0].flatten(1).T  # (N, W)
        return torch.cat([self.positional_embedding[:1], grid])

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, 3, H, W) -> what the first block reads (B, 1+N, W), the class token first, and the grid (h, w)."""
        patch = self.clip_cfg.patch
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(f"images {tuple(images.shape)}: expected (B, 3, H, W) with H, W multiples of {patch}")
        x = self.conv1(images)  # (B, W, h, w)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
        return self.ln_pre(x + self.positions(*grid)), grid

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of the last block (.., W) -> embedding space (.., E), not normalised."""
        return self.ln_post(tokens) @ self.proj

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.transformer(self.embed(images)[0])


class CLIPText(nn.Module):
    """The text tower; its names carry no prefix because OpenAI's do not."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__()
        self.cfg, width = cfg, cfg.text_width
        self.token_embedding = nn.Embedding(cfg.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(cfg.context, width) * 0.01)
        self.transformer = Transformer(width, cfg.text_layers, cfg.text_heads, cfg.text_mlp, cfg.activation, cfg.eps)
        self.ln_final = nn.LayerNorm(width, cfg.eps)
        self.text_projection = nn.Parameter(torch.randn(width, cfg.embed_dim) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) int64, L <= context, each row with an end token -> (B, E), not normalised."""
        cfg = self.cfg
        if tokens.ndim != 2 or tokens.shape[1] > cfg.context:
            raise ValueError(f"tokens {tuple(tokens.shape)}: expected (B, L) with L <= {cfg.context}")
        ends = tokens == cfg.eot
        if not ends.any(1).all() or tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
            raise ValueError(f"tokens: every row needs the end token {cfg.eot} and ids in 0..{cfg.vocab_size - 1}")
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.transformer(x, causal=True)
        first = ends.int().argmax(1)  # what comes after the end token was never seen
        return self.ln_final(x[torch.arange(len(x), device=x.device), first]) @ self.text_projection


class CLIP(CLIPText):
    """Both towers, in OpenAI's layout: the text tower at the top level, the image tower as `visual`."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__(cfg)
        self.visual = CLIPVision(cfg)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float, normalised by CLIP_MEAN and CLIP_STD -> (B, E), not normalised."""
        return self.visual.project(self.visual(images)[:, 0])


def clip_score(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIPScore 2.5 max(cos, 0) of paired embeddings (B, E) -> (B,) [Hessel et al. 2021]."""
    return 2.5 * F.cosine_similarity(image.float(), text.float(), dim=-1).clamp(min=0)


def preprocess(image: Image.Image | np.ndarray, size: int = 224, mode: str = "squash") -> torch.Tensor:
    """A picture, PIL or uint8 (H, W, 3) RGB -> (3, size, size) float32, normalised.

    squash: resized without regard to its aspect, so that the borders stay. crop: OpenAI's transform, the short side is
    resized and the centre is cut out. Both bicubic.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {image.dtype} {image.shape}: expected uint8 (H, W, 3)")
        image = Image.fromarray(image)
    image, (w, h) = image.convert("RGB"), image.size
    if mode == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif mode == "crop":
        short = min(w, h)
        w, h = size * w // short, size * h // short
        left, top = round((w - size) / 2), round((h - size) / 2)
        image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    else:
        raise ValueError(f"mode {mode!r}: expected squash or crop")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (3, size, size)
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


# ---- weights

LAYER = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
NORMS = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm",
         "ln_final": "text_model.final_layer_norm"}  # fmt: skip
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
SINGLE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    **TRANSPOSED,
}
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in archives of OpenAI and open_clip
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # open_clip's ViT-H, g, bigG; every other tower has heads of 64


def transformers_names(cfg: CLIPConfig) -> dict[str, list[str]]:
    """Our tensors -> transformers' CLIPModel; three names where queries, keys and values lie apart there."""
    kinds, names = ("weight", "bias"), {ours: [theirs] for ours, theirs in SINGLE.items()}
    names |= {f"{ours}.{kind}": [f"{theirs}.{kind}"] for ours, theirs in NORMS.items() for kind in kinds}
    towers = (("visual.", "vision_model", cfg.layers), ("", "text_model", cfg.text_layers))
    for prefix, model, layers in towers:
        for i in range(layers):
            a, b = f"{prefix}transformer.resblocks.{i}", f"{model}.encoder.layers.{i}"
            for kind in kinds:
                names[f"{a}.attn.in_proj_{kind}"] = [f"{b}.self_attn.{x}_proj.{kind}" for x in "qkv"]
                names |= {f"{a}.{ours}.{kind}": [f"{b}.{theirs}.{kind}"] for ours, theirs in LAYER.items()}
    return names


def from_transformers(state: dict[str, torch.Tensor], cfg: CLIPConfig) -> dict[str, torch.Tensor]:
    """CLIPModel's state dict -> ours. What does not fit keeps its name, for `load_strict` to complain about."""
    state = {k: v for k, v in state.items() if not k.endswith("embeddings.position_ids")}  # a buffer of old versions
    for ours, theirs in transformers_names(cfg).items():
        parts = [state[name] for name in theirs if name in state]
        if len(parts) == len(theirs) and len({part.shape for part in parts}) == 1:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            for name in theirs:
                del state[name]
            state[ours] = whole.T.contiguous() if ours in TRANSPOSED else whole
    return state


def to_transformers(state: dict[str, torch.Tensor], cfg: CLIPConfig) -> dict[str, torch.Tensor]:
    """Our state dict -> CLIPModel's."""
    out = {}
    for ours, theirs in transformers_names(cfg).items():
        whole = state[ours].T if ours in TRANSPOSED else state[ours]
        parts = whole.chunk(len(theirs)) if len(theirs) > 1 else [whole]
        out |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return out


def config_of_snapshot(folder: Path) -> CLIPConfig:
    """config.json of a transformers snapshot; what it leaves out is transformers' default, ViT-B/32."""
    path = folder / "config.json"
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
        if root.get("model_type") != "clip":
            raise UserError(f"{path}: model_type is {root.get('model_type')!r}, expected 'clip', a whole CLIPModel")
        image, text = (root.get(f"{x}_config_dict") or root.get(f"{x}_config") or {} for x in ("vision", "text"))
        activations = {c.get("hidden_act", "quick_gelu") for c in (image, text)}
        eps = {c.get("layer_norm_eps", 1e-5) for c in (image, text)}
        vocab, eot = text.get("vocab_size", 49408), text.get("eos_token_id", 49407)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as e:
        raise UserError(f"{path}: not readable ({type(e).__name__}); expected transformers' CLIP config") from e
    if len(activations) > 1 or len(eps) > 1:
        raise UserError(f"{path}: hidden_act {activations}, layer_norm_eps {eps}: expected the same in both towers")
    return CLIPConfig(
        image_size=image.get("image_size", 224), patch=image.get("patch_size", 32),
        width=image.get("hidden_size", 768), layers=image.get("num_hidden_layers", 12),
        heads=image.get("num_attention_heads", 12), mlp=image.get("intermediate_size", 3072),
        embed_dim=root.get("projection_dim", 512), text_width=text.get("hidden_size", 512),
        text_layers=text.get("num_hidden_layers", 12), text_heads=text.get("num_attention_heads", 8),
        text_mlp=text.get("intermediate_size", 2048), context=text.get("max_position_embeddings", 77),
        vocab_size=vocab, activation=activations.pop(), eps=eps.pop(),
        eot=vocab - 1 if eot == 2 else eot,  # 2 in old configs means: the largest id of the row
    )  # fmt: skip


def config_of_shapes(state: dict[str, torch.Tensor], activation: str, source: Path | str) -> CLIPConfig:
    """Configuration of a bare state dict in OpenAI's layout. UserError where it is not a ViT's."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise UserError(f"{source}: no tensor {name}; expected CLIP weights with a ViT, in OpenAI's layout")
        return state[name].shape

    def depth(prefix: str) -> int:
        return sum(k.startswith(prefix) and k.endswith(".attn.in_proj_weight") for k in state)

    width, _, patch, _ = shape("visual.conv1.weight")
    side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
    context, text_width = shape("positional_embedding")
    vocab = shape("token_embedding.weight")[0]
    return CLIPConfig(
        image_size=side * patch, patch=patch, width=width, layers=depth("visual.transformer."),
        heads=width // HEAD_WIDTHS.get(width, 64), mlp=shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
        embed_dim=shape("visual.proj")[1], text_width=text_width, text_layers=depth("transformer."),
        text_heads=text_width // 64, text_mlp=shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        context=context, vocab_size=vocab, eot=vocab - 1, activation=activation,
    )  # fmt: skip


def read_archive(path: Path) -> dict[str, torch.Tensor]:
    """State dict in OpenAI's layout: OpenAI's TorchScript archive, or a plain state dict (also safetensors)."""
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        try:
            state = torch.jit.load(path, map_location="cpu").state_dict()  # reads tensors, runs nothing
        except RuntimeError as e:
            raise UserError(f"{path}: not readable as a TorchScript archive; expected OpenAI's intact .pt") from e
    else:
        state = read_tensors(path)
    state = {k.removeprefix("module."): v for k, v in state.items()}  # open_clip saves what DDP wraps
    return {k: v for k, v in state.items() if k not in NO_WEIGHTS}


def load_clip(path: Path | str, activation: str = "quick_gelu") -> CLIP:
    """A local CLIP, fp32, in eval mode; UserError for every tensor that is missing, unexpected or reshaped.

    path: a transformers snapshot folder (config.json and model.safetensors or pytorch_model.bin of a CLIPModel),
    OpenAI's .pt, or a state dict of OpenAI or open_clip. activation: what a file cannot tell (a snapshot can, and
    does): quick_gelu for weights that OpenAI trained, gelu for most that open_clip trained.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        cfg = config_of_snapshot(path)
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: no model.safetensors or pytorch_model.bin; copy the complete snapshot")
        state = from_transformers(read_tensors(files[0]), cfg)
    else:
        state = read_archive(path)
        cfg = config_of_shapes(state, activation, path)
    try:
        with torch.device("meta"):  # no time for random numbers that are overwritten
            model = CLIP(cfg)
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{path}: no CLIP of this kind ({e}); expected a ViT of OpenAI's family") from e
    model = model.to_empty(device="cpu")
    load_strict(model, state, path)  # copies, so half precision becomes fp32
    return model.eval()


# ---- text


def tokenize(tokenizer, context: int, texts: list[str]) -> torch.Tensor:
    """Texts -> ids (B, context) int64: start, words, end, padding; a longer text is cut and still ends in the end."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=context, return_tensors="pt")
    return tokens["input_ids"]


def load_tokenizer(folder: Path | str, context: int = 77):
    """Function list[str] -> (B, context) int64, from a local snapshot: vocab.json and merges.txt, or tokenizer.json."""
    from transformers import CLIPTokenizer  # here: the import takes seconds, and only text needs it

    folder = Path(folder).expanduser()
    absent = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if absent and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: {' and '.join(absent)} missing; copy them from a CLIP snapshot of transformers")
    return functools.partial(tokenize, CLIPTokenizer.from_pretrained(folder, local_files_only=True), context)


def save_tiny_snapshot(folder: Path | str, cfg: CLIPConfig = PRESETS["tiny"], seed: int = 0) -> None:
    """Write a complete snapshot with random weights, for runs without data: config, weights, a tokenizer of bytes.

    Its vocabulary is CLIP's without merges: 256 bytes, the same at the end of a word, start, end; it knows any text.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # here: see load_tokenizer

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), START, END]
    if (cfg.vocab_size, cfg.eot) != (len(words), len(words) - 1):
        raise ValueError(f"vocab_size {cfg.vocab_size}, eot {cfg.eot}: expected {len(words)} and {len(words) - 1}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(cfg)
    save_file(to_transformers(model.state_dict(), cfg), folder / "model.safetensors", {"format": "pt"})
    shared = {"hidden_act": cfg.activation, "layer_norm_eps": cfg.eps, "projection_dim": cfg.embed_dim}
    image = {"image_size": cfg.image_size, "patch_size": cfg.patch, "hidden_size": cfg.width, "num_hidden_layers":
             cfg.layers, "num_attention_heads": cfg.heads, "intermediate_size": cfg.mlp}  # fmt: skip
    text = {"vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.context, "hidden_size": cfg.text_width,
            "num_hidden_layers": cfg.text_layers, "num_attention_heads": cfg.text_heads, "intermediate_size":
            cfg.text_mlp, "bos_token_id": cfg.eot - 1, "eos_token_id": cfg.eot, "pad_token_id": cfg.eot}  # fmt: skip
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": cfg.embed_dim,
              "vision_config": {**image, **shared}, "text_config": {**text, **shared}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    vocab = json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocab + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
