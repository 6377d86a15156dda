"""The parts that FastSAM2's decoder is made of: pooling under masks, gated update of queries, attention, feed-forward.

Shapes: B images or clips, Q queries, S pixels of all frames, D width. Parameters are named as in the released weights.
Source: Xu et al., RAP-SAM, ICLR 2025, eq. 2-4.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.prompt_fusion import Attention


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


class PixelAttention(nn.Module):
    """k + attention of the queries over all pixels; one level deeper in names, as released."""

    def __init__(self, dim: int, heads: int, rank: int):
        super().__init__()
        self.attn = Attention(dim, heads, rank)

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
