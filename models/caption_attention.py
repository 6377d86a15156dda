"""Attention blocks that the caption models share: memory slots, key-value caches, post-norm residuals.

Shapes: B images, R rows (B images x k beams, image-major), L queries, N keys, D width, h heads of d_k = D / h.
Reference: aimagelab/meshed-memory-transformer@239100b, models/transformer/{attention,utils}.py; parameter names follow
it, so its weights load strictly. Its stateful buffers (running_keys, ..) are an explicit DecoderCache here.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head attention; `memory` learned slots are appended to keys and values and never masked (M2, eq. 4).

    Initialised as the source: Xavier matrices, zero biases, m_k ~ N(0, 1 / d_k), m_v ~ N(0, 1 / memory).
    """

    def __init__(self, dim: int, heads: int, memory: int = 0):
        super().__init__()
        if dim % heads:
            raise ValueError(f"Attention: {dim} channels cannot be split into {heads} heads")
        self.heads, self.memory = heads, memory
        self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(dim, dim) for _ in range(4))
        for linear in (self.fc_q, self.fc_k, self.fc_v, self.fc_o):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if memory:
            self.m_k = nn.Parameter(torch.randn(1, memory, dim) / math.sqrt(dim // heads))
            self.m_v = nn.Parameter(torch.randn(1, memory, dim) / math.sqrt(memory))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, h, N, d_k)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projections of (B, N, D) to be cached and attended to -> two (B, h, N, d_k)."""
        return self.split(self.fc_k(keys)), self.split(self.fc_v(values))

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append what every query sees beside the input: here the memory slots, scaled as in the source."""
        if not self.memory:
            return k, v
        m_k = self.split(math.sqrt(k.shape[-1]) * self.m_k).expand(len(k), -1, -1, -1)  # (B, h, memory, d_k)
        m_v = self.split(math.sqrt(self.memory) * self.m_v).expand(len(v), -1, -1, -1)
        return torch.cat([k, m_k.to(k.dtype)], 2), torch.cat([v, m_v.to(v.dtype)], 2)

    def cover(self, mask: torch.Tensor | None, N: int, extra: int) -> torch.Tensor | None:
        """The mask of N keys, widened to the `extra` ones that `extend` appended: here all may be seen."""
        if mask is None or not extra:
            return mask
        return F.pad(mask.expand(*mask.shape[:-1], N), (0, extra), value=mask.dtype == torch.bool)

    def attend(
        self, queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """queries (B, L, D) over cached k, v (B, h, N, d_k) -> (B, L, D).

        mask: bool (True: may be seen) or float (added to the scores), broadcastable to (B, h, L, N); it covers the
        input's keys, `cover` those that `extend` appends.
        """
        N = k.shape[2]
        k, v = self.extend(k, v)
        mask = self.cover(mask, N, k.shape[2] - N)
        q = self.split(self.fc_q(queries))  # (B, h, L, d_k)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.fc_o(out.transpose(1, 2).flatten(2))  # (B, L, D)

    def forward(self, queries, keys, values, mask=None) -> torch.Tensor:
        return self.attend(queries, *self.keys_values(keys, values), mask)


class AttentionLayer(nn.Module):
    """LN(q + Dropout(attention(q, k, v))): the source's MultiHeadAttention."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.1, memory: int = 0):
        super().__init__()
        self.attention = Attention(dim, heads, memory)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, queries, keys, values, mask=None) -> torch.Tensor:
        return self.layer_norm(queries + self.dropout(self.attention(queries, keys, values, mask)))

    def attend(self, queries, k, v, mask=None) -> torch.Tensor:
        """The same with projected keys and values (B, h, N, d_k)."""
        return self.layer_norm(queries + self.dropout(self.attention.attend(queries, k, v, mask)))


class FeedForward(nn.Module):
    """LN(x + Dropout(W2 Dropout(ReLU(W1 x)))): the source's PositionWiseFeedForward."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.1):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout, self.dropout_2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(x + self.dropout(self.fc2(self.dropout_2(F.relu(self.fc1(x))))))


def sinusoid_table(rows: int, dim: int) -> torch.Tensor:
    """Position table (rows, dim): sines in even, cosines in odd channels, row 0 zero because it stands for padding."""
    position = torch.arange(rows, dtype=torch.float32)[:, None]
    frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    table = torch.zeros(rows, dim)
    table[:, 0::2], table[:, 1::2] = (position * frequency).sin(), (position * frequency).cos()
    table[0] = 0
    return table


def causal_mask(tokens: torch.Tensor, pad: int) -> torch.Tensor:
    """bool (B, 1, L, L), True where a word may be seen: not later, not padding. The first word is seen by every row."""
    L = tokens.shape[1]
    earlier = torch.ones(L, L, dtype=torch.bool, device=tokens.device).tril()
    seen = tokens != pad  # (B, L)
    seen = torch.cat([torch.ones_like(seen[:, :1]), seen[:, 1:]], 1)  # a row that sees nothing would be NaN
    return earlier & seen[:, None, None, :]


@dataclass
class DecoderCache:
    """What `decoder.step` needs of the past. R = B x k rows, image-major; k may grow from 1 by `reorder`."""

    own: list[tuple[torch.Tensor, torch.Tensor] | None]  # per layer: keys, values of the words so far (R, h, t, d_k)
    cross: list[list[tuple[torch.Tensor, torch.Tensor]]]  # per layer and encoder level: keys, values (B, h, N, d_k)
    length: int = 0  # words so far
    seen: torch.Tensor | None = None  # bool (R, t): which of them may be seen (None: all); `<pad>` in a caption is not

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one word's keys and values (R, h, 1, d_k) -> those of all words so far."""
        past = self.own[layer]
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        self.own[layer] = (k, v)
        return k, v

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row rows[i] was; rows int64 (R',). The images' own keys and values stay where they are."""
        self.own = [kv and (kv[0].index_select(0, rows), kv[1].index_select(0, rows)) for kv in self.own]
        self.seen = None if self.seen is None else self.seen.index_select(0, rows)
