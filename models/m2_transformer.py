"""Meshed-memory transformer (M2): an encoder with memory slots, a decoder that looks at all of its levels through gates.

Shapes: B images, N regions or patches, R rows (B images x k captions, image-major), L words, D width, V words.
Reference: Cornia et al., CVPR 2020; aimagelab/meshed-memory-transformer@239100b, models/transformer/{encoders,decoders}
.py; parameter names follow it, so its weights load strictly once `without_running` has dropped its stateful buffers.

The source masks an input that sums to 0; zero-padded detections do not after a bias and a LayerNorm, and a grid has no
padding, so there is no mask here (its stored masks are empty). Logits come out; the source ends in a log-softmax.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.caption_attention import AttentionLayer, DecoderCache, FeedForward, causal_mask, sinusoid_table

Projected = tuple[torch.Tensor, torch.Tensor]  # keys and values (B or R, h, N, d_k)


def without_running(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state dict less its `running_*` buffers, which hold the past of a decoding that is over."""
    return {name: t for name, t in state.items() if not name.rpartition(".")[2].startswith("running_")}


def init_as_source(module: nn.Module) -> None:
    """Xavier for everything with two or more axes: the source's last word, also for the tables and memory slots."""
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, memory: int):
        super().__init__()
        self.mhatt = AttentionLayer(dim, heads, dropout, memory)
        self.pwff = FeedForward(dim, hidden, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pwff(self.mhatt(x, x, x))


class M2Encoder(nn.Module):
    """(B, N, d_in) -> the outputs of all layers (B, levels, N, D)."""

    def __init__(
        self,
        d_in: int,
        dim: int = 512,
        layers: int = 3,
        heads: int = 8,
        hidden: int = 2048,
        memory: int = 40,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.fc = nn.Linear(d_in, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout, memory) for _ in range(layers))
        init_as_source(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer_norm(self.dropout(F.relu(self.fc(x))))  # (B, N, D)
        levels = []
        for layer in self.layers:
            x = layer(x)
            levels.append(x)
        return torch.stack(levels, 1)


class MeshedLayer(nn.Module):
    """Self-attention, then cross-attention to each encoder level with the same weights, joined by sigmoid gates."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, levels: int):
        super().__init__()
        self.self_att = AttentionLayer(dim, heads, dropout)
        self.enc_att = AttentionLayer(dim, heads, dropout)
        self.pwff = FeedForward(dim, hidden, dropout)
        for i in range(levels):
            gate = nn.Linear(2 * dim, dim)
            nn.init.zeros_(gate.bias)
            self.add_module(f"fc_alpha{i + 1}", gate)

    def forward(
        self,
        x: torch.Tensor,
        kept: torch.Tensor,
        own: Projected,
        levels: list[Projected],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (R, L, D) -> the same shape. kept bool (R, L, 1): rows of padding become 0; own: of the words, levels: of
        the images; mask: which of `own` a word sees, broadcastable to (R, h, L, t)."""
        s = self.self_att.attend(x, *own, mask) * kept  # (R, L, D)
        joined = 0
        for i, c in enumerate(self.look(s, levels)):
            c = c * kept
            gate = getattr(self, f"fc_alpha{i + 1}")
            joined = joined + c * gate(torch.cat([s, c], -1)).sigmoid()
        return self.pwff(joined / math.sqrt(len(levels))) * kept

    def look(self, s: torch.Tensor, levels: list[Projected]) -> list[torch.Tensor]:
        """Cross-attention of s (R, L, D) to each level. The queries of an image's k captions share its keys."""
        layer, attention = self.enc_att, self.enc_att.attention
        B = len(levels[0][0])
        q = attention.split(attention.fc_q(s).reshape(B, -1, s.shape[-1]))  # (B, h, k L, d_k), the same for all levels
        found = [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(s.shape) for k, v in levels]
        return [layer.layer_norm(s + layer.dropout(attention.fc_o(x))) for x in found]


class M2Decoder(nn.Module):
    """Logits of the next word from the words so far and the encoder's levels (B, levels, N, D).

    max_len: the longest input in words with `<bos>`; positions count from 1, row 0 of their frozen table is padding's.
    """

    def __init__(
        self,
        vocab_size: int,
        max_len: int = 54,
        dim: int = 512,
        layers: int = 3,
        levels: int = 3,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
        pad: int = 1,
        bos: int = 2,
        eos: int = 3,
    ):
        super().__init__()
        self.pad, self.bos, self.eos, self.max_len = pad, bos, eos, max_len
        self.word_emb = nn.Embedding(vocab_size, dim, padding_idx=pad)
        self.pos_emb = nn.Embedding.from_pretrained(sinusoid_table(max_len + 1, dim), freeze=True)
        self.layers = nn.ModuleList(MeshedLayer(dim, heads, hidden, dropout, levels) for _ in range(layers))
        self.fc = nn.Linear(dim, vocab_size, bias=False)
        init_as_source(self)

    def project(self, memory: torch.Tensor) -> list[list[Projected]]:
        """Keys and values of every level, for each layer."""
        return [[layer.enc_att.attention.keys_values(e, e) for e in memory.unbind(1)] for layer in self.layers]

    def forward(self, tokens: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """tokens int64 (R, L), teacher forcing; memory (B, levels, N, D), R a multiple of B -> logits (R, L, V)."""
        R, L = tokens.shape
        if L > self.max_len or R % len(memory):
            raise ValueError(
                f"M2Decoder: {R} rows of {L} words for {len(memory)} images; expected a multiple of the images and "
                f"at most {self.max_len} words"
            )
        kept = tokens != self.pad  # (R, L)
        positions = torch.arange(1, L + 1, device=tokens.device) * kept
        x = self.word_emb(tokens) + self.pos_emb(positions)  # (R, L, D)
        mask = causal_mask(tokens, self.pad)
        for layer, levels in zip(self.layers, self.project(memory), strict=True):
            x = layer(x, kept[..., None], layer.self_att.attention.keys_values(x, x), levels, mask)
        return self.fc(x)

    def start(self, memory: torch.Tensor) -> DecoderCache:
        """An empty past; one row per image until the cache is reordered."""
        seen = torch.zeros(len(memory), 0, dtype=torch.bool, device=memory.device)
        cross = [[(k.contiguous(), v.contiguous()) for k, v in levels] for levels in self.project(memory)]  # read often
        return DecoderCache(own=[None] * len(self.layers), cross=cross, seen=seen)

    def step(self, tokens: torch.Tensor, cache: DecoderCache) -> torch.Tensor:
        """tokens int64 (R,), the newest word of each row -> logits (R, V) of the next one; the cache grows by it."""
        if cache.length == self.max_len:
            raise ValueError(f"M2Decoder: step {cache.length + 1}, the position table ends at {self.max_len}")
        cache.length += 1
        kept = tokens != self.pad  # (R,)
        seen = kept if cache.length > 1 else torch.ones_like(kept)  # as in causal_mask
        cache.seen = torch.cat([cache.seen, seen[:, None]], 1)
        x = (self.word_emb(tokens) + self.pos_emb(cache.length * kept))[:, None]  # (R, 1, D)
        for i, (layer, levels) in enumerate(zip(self.layers, cache.cross, strict=True)):
            own = cache.append(i, *layer.self_att.attention.keys_values(x, x))
            x = layer(x, kept[:, None, None], own, levels, cache.seen[:, None, None])
        return self.fc(x[:, 0])
