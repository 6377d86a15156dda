"""FSGR: image captioning by closing the semantic gap between patches and words ("fully semantic gap recovery").

image -> CLIP with adapters -> patches; a semantic head replaces each patch by the best fitting text embedding; the
encoder lets patches look at that text map, biased by where they lie; a transformer decoder writes the caption.
`arch="m2"` is the baseline: the meshed-memory transformer (models/m2_transformer.py) on the same patches.

Shapes: B images, h x w = N patches, R = B x k captions (image-major), L words, D width, E joint image-text width, V
words, K codebook texts. Sources: Gao et al., IEEE TCSVT 2025; code wxdaxx/FSGR11.15@18063bd8 and, for the grid
geometry, zhangxuying1004/RSTNet@d308459; parameter names of encoder and decoder follow them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.caption_attention import AttentionLayer, DecoderCache, FeedForward, causal_mask, sinusoid_table
from models.clip import CLIP_MEAN, CLIP_STD, CLIPConfig
from models.clip import PRESETS as CLIP_PRESETS
from models.clip_adapter import AdaptedCLIP, AdapterConfig
from models.m2_transformer import M2Decoder, M2Encoder
from models.prototype_memory import PrototypeAttention
from models.semantic_head import SemanticHead, embed_texts
from utils.run import UserError, read_config
from utils.weights import load_strict, read_tensors

ARCHS, WORD_INITS, RESIZES = ("fsgr", "m2"), ("random", "clip"), ("squash", "crop")
SPECIALS = ["<unk>", "<pad>", "<bos>", "<eos>"]  # ids 0..3
PAD, BOS, EOS = 1, 2, 3
BOX_DIM = 64  # channels of the geometry of two patches
Memory = tuple[torch.Tensor, torch.Tensor]  # encoder output (B, N, D), its positions (1, N, D)
Projected = tuple[torch.Tensor, torch.Tensor]  # keys, values


# ---- where patches lie


def sine_encoding(h: int, w: int, dim: int) -> torch.Tensor:
    """Positions of a grid as DETR's sines, normalised to 2 pi: dim/2 channels for y, then dim/2 for x -> (1, hw, dim).

    ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine_encoding: {dim} channels, expected a multiple of 4")

    def along(n: int) -> torch.Tensor:
        position = torch.arange(1, n + 1) / (n + 1e-6) * (2 * math.pi)
        angle = position[:, None] / 10000 ** (4 * torch.arange(dim // 4) / dim)  # (n, dim/4)
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # sine and cosine of each frequency in turn

    y, x = along(h)[:, None].expand(-1, w, -1), along(w)[None].expand(h, -1, -1)
    return torch.cat([y, x], 2).flatten(0, 1)[None]


def box_relation(h: int, w: int, dim: int = BOX_DIM) -> torch.Tensor:
    """How patch j lies relative to patch i -> (hw, hw, dim): sines, then cosines, of [dx, dy, dw, dh] x dim/8 waves.

    dx = log max(|x_i - x_j| / width_i, 1e-3) with x along the rows of the grid, the picture being 1 x 1; dw = log of
    the ratio of widths. A width is that of a cell plus 1, as in the source, where the 1 was meant for pixels. The order
    of operations is the source's too: the encoder takes a logarithm near 0 of this, so rounding shows.
    """
    index = torch.arange(h * w)
    x, y = (index // w).float(), (index % w).float()
    x0, y0, x1, y1 = x / h, y / w, (x + 1) / h, (y + 1) / w
    rows = []
    for low, high in ((x0, x1), (y0, y1)):
        centre, extent = (low + high) * 0.5, (high - low) + 1.0
        offset = ((centre[:, None] - centre) / extent[:, None]).abs().clamp_min(1e-3).log()  # (hw, hw)
        rows.append((offset, (extent[:, None] / extent).log()))
    (dx, dw), (dy, dh) = rows
    waves = 1 / 1000 ** (torch.arange(dim // 8) / (dim // 8))
    angle = ((100 * torch.stack([dx, dy, dw, dh], 2))[..., None] * waves).flatten(2)  # (hw, hw, dim/2)
    return torch.cat([angle.sin(), angle.cos()], 2)


# ---- encoder and decoder


def embedding(d_in: int, d_out: int, dropout: float) -> nn.Sequential:
    """Linear, CELU, Dropout, LayerNorm over the last axis."""
    return nn.Sequential(nn.Linear(d_in, d_out), nn.CELU(1.3), nn.Dropout(dropout), nn.LayerNorm(d_out))


def xavier_(module: nn.Module) -> None:
    """Xavier for every matrix of a linear layer; tables keep what they have."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)


class CrossLayer(nn.Module):
    """Patches look at the text map. The attention has a residual and a LayerNorm inside; the layer adds both again."""

    def __init__(self, dim: int, heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.mhatt = AttentionLayer(dim, heads, dropout)
        self.dropout, self.lnorm = nn.Dropout(dropout), nn.LayerNorm(dim)
        self.pwff = FeedForward(dim, d_ff, dropout)

    def forward(self, x: torch.Tensor, text: torch.Tensor, pos: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        a = self.mhatt(x + pos, text + pos, text, bias)  # (B, N, D)
        return self.pwff(self.lnorm(x + self.dropout(a)))


class FSGREncoder(nn.Module):
    """visual (B, N, D), text_grid (B, N, E) -> output (B, N, D) and positions (1, N, D).

    The text map is keys and values of every layer; with d_text None there is none, and patches look at each other.
    A head's score of two patches gets log max(ReLU(w . relation + b), 1e-6). That depends on the grid alone, so it is
    computed once per forward for all images and layers, in float32. A grid has no padding, so there is no mask.
    """

    def __init__(
        self, grid: tuple[int, int], d_text: int | None, dim=512, heads=8, d_ff=2048, layers=2, dropout: float = 0.1
    ):
        super().__init__()
        self.pixel_embed = None if d_text is None else embedding(d_text, dim, dropout)
        self.layer_norm = nn.LayerNorm(dim)  # shared by patches and texts
        self.WGs = nn.ModuleList(nn.Linear(BOX_DIM, 1) for _ in range(heads))  # shared by the layers
        self.layers = nn.ModuleList(CrossLayer(dim, heads, d_ff, dropout) for _ in range(layers))
        self.register_buffer("relation", box_relation(*grid), persistent=False)  # (N, N, 64)
        self.register_buffer("pos", sine_encoding(*grid, dim), persistent=False)
        xavier_(self)

    def geometry(self) -> torch.Tensor:
        """What is added to the attention scores: (1, heads, N, N) float32."""
        with torch.autocast(self.relation.device.type, enabled=False):
            weight, bias = torch.cat([g.weight for g in self.WGs]), torch.cat([g.bias for g in self.WGs])
            seen = F.linear(self.relation, weight, bias)  # (N, N, heads)
            return seen.relu().clamp_min(1e-6).log().permute(2, 0, 1)[None].contiguous()

    def forward(self, visual: torch.Tensor, text_grid: torch.Tensor | None = None) -> Memory:
        N = self.pos.shape[1]
        if visual.shape[1] != N or (text_grid is None) != (self.pixel_embed is None):
            text = None if text_grid is None else tuple(text_grid.shape)
            raise ValueError(f"FSGREncoder: visual {tuple(visual.shape)}, text {text}; expected {N} patches "
                             f"{'without' if self.pixel_embed is None else 'and their'} text")  # fmt: skip
        bias, x = self.geometry(), self.layer_norm(visual)
        text = None if text_grid is None else self.layer_norm(self.pixel_embed(text_grid))
        for layer in self.layers:
            x = layer(x, x if text is None else text, self.pos, bias)
        return x, self.pos


class FSGRLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; both attentions have their residual and LayerNorm twice."""

    def __init__(self, dim: int, heads: int, d_ff: int, dropout: float, prototypes: int = 0, bank: int = 0):
        super().__init__()
        self.self_att, self.enc_att = (AttentionLayer(dim, heads, dropout) for _ in range(2))
        if prototypes:
            self.self_att.attention = PrototypeAttention(dim, heads, prototypes, bank)
        self.dropout1, self.lnorm1 = nn.Dropout(dropout), nn.LayerNorm(dim)
        self.dropout2, self.lnorm2 = nn.Dropout(dropout), nn.LayerNorm(dim)
        self.pwff = FeedForward(dim, d_ff, dropout)

    def forward(self, x: torch.Tensor, own: Projected, cross: Projected, mask: torch.Tensor | None) -> torch.Tensor:
        """x (R, L, D); own, cross: keys and values of the words (R, h, t, d_k) and of the images (B, h, N, d_k).

        The words of an image's captions are queries of one sequence, so its keys are never repeated.
        """
        B = cross[0].shape[0]
        x = self.lnorm1(x + self.dropout1(self.self_att.attend(x, *own, mask)))
        a = self.enc_att.attend(x.reshape(B, -1, x.shape[2]), *cross).view_as(x)
        return self.pwff(self.lnorm2(x + self.dropout2(a)))


class FSGRDecoder(nn.Module):
    """Words so far, memory (output, positions) -> logits of the next word.

    max_len: positions 1..max_len, `<bos>` has 1; row 0 is padding's. Both tables are trained; rows of padding stay 0.
    tie_weights: the word table is the output layer too. prototypes: of the self-attention, from a bank of so many words
    (models/prototype_memory.py).
    """

    def __init__(
        self, vocab_size: int, max_len=54, dim=512, heads=8, d_ff=2048, layers=4, dropout=0.1, tie_weights=False,
        prototypes: int = 0, bank: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.pad, self.bos, self.eos, self.max_len = PAD, BOS, EOS, max_len
        self.noting = False  # set by training: whether `forward` fills the bank of words
        self.word_emb = nn.Embedding(vocab_size, dim, padding_idx=PAD)
        self.pos_emb = nn.Embedding.from_pretrained(sinusoid_table(max_len + 1, dim), freeze=False, padding_idx=0)
        self.layers = nn.ModuleList(FSGRLayer(dim, heads, d_ff, dropout, prototypes, bank) for _ in range(layers))
        self.fc = None if tie_weights else nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.word_emb.weight, std=dim**-0.5)
        nn.init.zeros_(self.word_emb.weight[PAD].data)
        xavier_(self)

    @property
    def prototypes(self) -> list[PrototypeAttention]:
        """The attentions with a prototype memory, one a layer; [] without."""
        found = [layer.self_att.attention for layer in self.layers]
        return [attention for attention in found if isinstance(attention, PrototypeAttention)]

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.word_emb.weight) if self.fc is None else self.fc(x)

    def forward(self, tokens: torch.Tensor, memory: Memory) -> torch.Tensor:
        """tokens int64 (R, L), memory of B images, R = B x k image-major -> logits (R, L, V)."""
        R, L = tokens.shape
        output, pos = memory
        if L > self.max_len or R % len(output):
            raise ValueError(f"FSGRDecoder: tokens {tuple(tokens.shape)} for {len(output)} images; expected a multiple "
                             f"of the images and at most {self.max_len} words")  # fmt: skip
        seen = tokens != self.pad  # (R, L)
        x = self.word_emb(tokens) + self.pos_emb(torch.arange(1, L + 1, device=tokens.device) * seen)  # (R, L, D)
        mask = causal_mask(tokens, self.pad)
        for layer in self.layers:
            own = layer.self_att.attention.keys_values(x, x)
            if self.noting:
                layer.self_att.attention.note(*own, seen)
            cross = layer.enc_att.attention.keys_values(output + pos, output)
            x = layer(x, own, cross, mask)
        return self.classify(x * seen[..., None])  # the source zeroes padding after each part: nothing else sees it

    def start(self, memory: Memory) -> DecoderCache:
        """An empty past, and the images' keys and values: projected once for all words and beams."""
        output, pos = memory
        projected = [layer.enc_att.attention.keys_values(output + pos, output) for layer in self.layers]
        cross = [[(k.contiguous(), v.contiguous())] for k, v in projected]  # read at every word
        seen = torch.zeros(len(output), 0, dtype=torch.bool, device=output.device)
        return DecoderCache([None] * len(self.layers), cross, seen=seen)

    def step(self, tokens: torch.Tensor, cache: DecoderCache) -> torch.Tensor:
        """The newest word of each row, int64 (R,) -> logits (R, V) of the next one; the cache grows by it.

        Equal to `forward`, also for rows in which `<pad>` was generated. ValueError beyond max_len.
        """
        if cache.length == self.max_len:
            raise ValueError(f"FSGRDecoder: word {cache.length + 1}, the position table ends at {self.max_len}")
        cache.length += 1
        kept = tokens != self.pad  # (R,)
        seen = kept if cache.length > 1 else torch.ones_like(kept)  # as in causal_mask
        cache.seen = torch.cat([cache.seen, seen[:, None]], 1)
        x = (self.word_emb(tokens) + self.pos_emb.weight[cache.length])[:, None]  # (R, 1, D)
        for i, layer in enumerate(self.layers):
            own = cache.append(i, *layer.self_att.attention.keys_values(x, x))
            x = layer(x, own, cache.cross[i][0], cache.seen[:, None, None])
        return self.classify(x[:, 0] * kept[:, None])


# ---- the whole model


@dataclass
class FSGRConfig:
    """Everything a checkpoint needs to rebuild the model and to read a photo as training did."""

    arch: str = "fsgr"  # fsgr | m2
    clip: dict = field(default_factory=lambda: asdict(CLIPConfig()))
    adapter: dict = field(default_factory=lambda: asdict(AdapterConfig()))
    vocab: list[str] = field(default_factory=lambda: list(SPECIALS))  # V words, ids are places
    codebook_names: list[str] = field(default_factory=list)  # K texts
    codebook_source: str = "random"  # random until `set_codebook`
    dim: int = 512
    heads: int = 8
    d_ff: int = 2048
    enc_layers: int = 2
    dec_layers: int = 4
    max_len: int = 54  # positions, `<bos>` included
    dropout: float = 0.1
    memory: int = 40  # m2: slots
    prototypes: int = 0  # fsgr: keys that every word also sees (PMA-Net: 1024); 0: none
    bank: int = 16384  # words from which they are made
    semantic: bool = True  # fsgr: with the semantic head
    top_k: int = 20
    tau: float = 1.0  # temperature of the Gumbel-softmax
    count_norm: bool = False
    word_init: str = "random"  # random | clip, set by `set_word_table`
    word_table_sha: str = ""  # of the vocabulary that the table was made for
    tie_weights: bool = False
    image_size: int = 224
    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    resize: str = "squash"  # squash | crop


def vocab_sha(itos: Sequence[str]) -> str:
    """Hash of the words in their order; `CaptionVocab.sha256` of data/caption_vocab.py is the same."""
    return hashlib.sha256(json.dumps(list(itos), ensure_ascii=False).encode("utf-8")).hexdigest()


class FSGR(nn.Module):
    """images (B, 3, H, W), normalised, and tokens (R, L) -> {"logits": (R, L, V), and what `encode` adds}.

    CLIP is frozen but for adapters and prompts. Codebook and word table start at random: `set_codebook`,
    `set_word_table`. ValueError for a configuration that does not fit together.
    """

    def __init__(self, cfg: FSGRConfig):
        super().__init__()
        for name, value, known in (("arch", cfg.arch, ARCHS), ("word_init", cfg.word_init, WORD_INITS),
                                   ("resize", cfg.resize, RESIZES)):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name} {value!r}: expected one of {known}")
        if list(cfg.vocab[:4]) != SPECIALS:
            raise ValueError(f"vocab starts with {cfg.vocab[:4]}, expected {SPECIALS}")
        clip = CLIPConfig(**cfg.clip)
        if cfg.image_size % clip.patch:
            raise ValueError(f"image_size {cfg.image_size}: expected a multiple of the patch, {clip.patch}")
        self.cfg, V, side = cfg, len(cfg.vocab), cfg.image_size // clip.patch
        self.backbone = AdaptedCLIP(clip, AdapterConfig(**cfg.adapter))
        self.backbone.freeze_backbone()
        if cfg.arch == "m2":
            if cfg.tie_weights:
                raise ValueError("tie_weights: arch m2 has its own output layer")
            sizes = (cfg.dim, cfg.enc_layers, cfg.heads, cfg.d_ff, cfg.memory, cfg.dropout)
            self.encoder = M2Encoder(clip.width, *sizes)
            self.decoder = M2Decoder(V, cfg.max_len, cfg.dim, cfg.dec_layers, cfg.enc_layers, cfg.heads, cfg.d_ff,
                                     cfg.dropout)  # fmt: skip
            return
        sizes = (cfg.dim, cfg.heads, cfg.d_ff)
        self.att_embed = embedding(clip.width + clip.embed_dim, cfg.dim, cfg.dropout)
        if cfg.semantic:
            if not cfg.codebook_names:
                raise ValueError("semantic: codebook_names is empty, expected the names of the texts")
            codebook = F.normalize(torch.randn(len(cfg.codebook_names), clip.embed_dim), dim=-1)
            self.head = SemanticHead(codebook, math.log(100), cfg.top_k, cfg.tau, cfg.count_norm)
        d_text = clip.embed_dim if cfg.semantic else None
        self.encoder = FSGREncoder((side, side), d_text, *sizes, cfg.enc_layers, cfg.dropout)
        self.decoder = FSGRDecoder(V, cfg.max_len, *sizes, cfg.dec_layers, cfg.dropout, cfg.tie_weights,
                                   cfg.prototypes, cfg.bank)  # fmt: skip

    def encode(self, images: torch.Tensor) -> tuple[Memory | torch.Tensor, dict[str, torch.Tensor]]:
        """images -> memory for the decoder, and for the losses on patches: features (B, N, D) unit rows; with the
        semantic head also index (B, N) codebook ids and dense_logits (B, N, K). arch m2 has none of these."""
        seen = self.backbone(images)
        if self.cfg.arch == "m2":
            return self.encoder(seen["patches"]), {}
        patches, whole = (F.normalize(seen[name].float(), dim=-1) for name in ("patches", "global"))
        visual = torch.cat([patches, whole[:, None].expand(-1, patches.shape[1], -1)], -1)  # (B, N, width + E)
        visual = self.att_embed(visual)  # (B, N, D)
        aux, text_grid = {"features": F.normalize(visual.float(), dim=-1)}, None
        if self.cfg.semantic:
            found = self.head(whole, seen["align"], dense=True)
            text_grid = found["text_grid"]
            aux |= {name: found[name] for name in ("index", "dense_logits")}
        return self.encoder(visual, text_grid), aux

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        memory, aux = self.encode(images)
        return {"logits": self.decoder(tokens, memory), **aux}

    @torch.no_grad()
    def set_codebook(self, codebook: torch.Tensor, log_scale: float, source: str) -> None:
        """codebook (K, E) unit rows of cfg.codebook_names, CLIP's log_scale; source: where they are from, for cfg."""
        if self.cfg.arch == "m2" or not self.cfg.semantic:
            raise ValueError("set_codebook: this model has no semantic head")
        if codebook.shape != self.head.codebook.shape:
            raise UserError(f"codebook of {source}: {tuple(codebook.shape)}, this model has "
                            f"{tuple(self.head.codebook.shape)}; build it for these names with this CLIP")  # fmt: skip
        self.head.codebook.copy_(codebook)
        self.head.log_scale.fill_(float(log_scale))
        self.cfg.codebook_source = source

    @torch.no_grad()
    def set_word_table(self, table: torch.Tensor, sha: str) -> None:
        """Word embeddings (V, D) made for the vocabulary of hash `sha`; a table of other words is never copied."""
        V, D = self.decoder.word_emb.weight.shape
        if len(table) != V or sha != vocab_sha(self.cfg.vocab):
            raise UserError(f"word table: {len(table)} rows for vocabulary {sha[:8]}, this model has {V} words of "
                            f"vocabulary {vocab_sha(self.cfg.vocab)[:8]}; build the table from this vocabulary")  # fmt: skip
        if table.shape[1] != D:
            raise UserError(f"word table: {table.shape[1]} channels, the decoder has {D}; take a CLIP whose text "
                            "embedding is as wide, or word_init random")  # fmt: skip
        self.decoder.word_emb.weight.copy_(table)
        self.decoder.word_emb.weight[PAD] = 0
        self.cfg.word_init, self.cfg.word_table_sha = "clip", sha

    def config_dict(self) -> dict:
        """What config.json holds; `from_checkpoint` rebuilds the model from it."""
        return {"model": asdict(self.cfg), "class": type(self).__name__}

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> "FSGR":
        """The model that train/train_fsgr.py saved. UserError for any tensor missing, added or reshaped."""
        config = read_config(folder)
        if config.get("class") != cls.__name__:
            raise UserError(f"{folder}: a checkpoint of {config.get('class')}, expected one of {cls.__name__}")
        try:
            model = cls(FSGRConfig(**config["model"]))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise UserError(f"{folder}/config.json: not a configuration of this version ({e}); train again") from e
        made_for = model.cfg.word_table_sha
        if made_for not in ("", vocab_sha(model.cfg.vocab)):
            raise UserError(f"{folder}/config.json: its word table was made for another vocabulary ({made_for[:8]}); "
                            "take the config.json that was saved with the weights")  # fmt: skip
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
        return model


def build_word_table(
    encode_text: Callable, tokenizer: Callable, itos: Sequence[str], device="cpu", generator=None
) -> torch.Tensor:
    """CLIP text embedding of each word, unit norm -> (V, E); the other specials ~ N(0, 0.02^2), `<pad>` 0.

    encode_text, tokenizer, device: see `semantic_head.embed_texts`.
    """
    n = len(SPECIALS)
    words = embed_texts(encode_text, tokenizer, itos[n:], device)  # (V - 4, E)
    specials = 0.02 * torch.randn(n, words.shape[1], generator=generator)
    specials[PAD] = 0
    return torch.cat([specials, words])


def expected_loss(model: FSGR) -> float:
    """First cross-entropy of an untrained model: ln V + s^2 / 2, s^2 = D x mean square of the output weights.

    The last layer is a LayerNorm, so a hidden state has norm sqrt(D) and its logits are near Gaussian of variance s^2.
    """
    decoder = model.decoder
    weight = (decoder.word_emb if decoder.fc is None else decoder.fc).weight  # (V, D)
    return math.log(len(weight)) + weight.shape[1] * weight.detach().float().square().mean().item() / 2


def preset(name: str, vocab: Sequence[str], codebook_names: Sequence[str], arch: str = "fsgr", **changes) -> FSGRConfig:
    """Configuration by name: vit_b16, vit_l14, or tiny for laptops. `changes` are fields of FSGRConfig."""
    if name not in CLIP_PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {tuple(CLIP_PRESETS)}")
    clip = CLIP_PRESETS[name]
    half = clip.layers // 2  # adapters in the upper half: layers 6..11 of ViT-B
    fields = {"clip": asdict(clip), "adapter": asdict(AdapterConfig(first=half, last=clip.layers - 1))}
    fields |= {"vocab": list(vocab), "codebook_names": list(codebook_names), "image_size": clip.image_size}
    if name == "tiny":
        fields |= {"dim": 64, "heads": 4, "d_ff": 128}
    if arch == "m2":
        fields |= {"enc_layers": 3, "dec_layers": 3, "semantic": False}
    return FSGRConfig(arch=arch, **{**fields, **changes})
