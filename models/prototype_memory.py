"""Prototypical memory: words also attend to cluster centres of the keys of earlier training steps.

Replaces a decoder's self-attention [PMA-Net, Barraco et al., ICCV 2023, sec. 3.2]. A bank keeps the newest keys and
values of the layer; every few steps K-Means turns the keys into P prototype keys, and a prototype's value is the
similarity-weighted mean of the values of its nearest keys in the bank. Between two refreshes, in evaluation and in
stage rl prototypes are constants; bank and prototypes are buffers, so a checkpoint holds them.

Shapes: R rows, h heads, d_k channels of a head, L words, S bank slots, P prototypes.
"""

import torch
from torch import nn

from models.caption_attention import Attention

ROUNDS = 8  # of Lloyd's algorithm in one refresh
NEAREST = 8  # keys of the bank whose values make a prototype's value


class PrototypeAttention(Attention):
    """Attention over [own keys + segment 0; prototype keys + segment 1]; without effect until the first `refresh`."""

    def __init__(self, dim: int, heads: int, prototypes: int, bank: int):
        super().__init__(dim, heads)
        if not 1 <= prototypes <= bank:
            raise ValueError(f"PrototypeAttention: {prototypes} prototypes cannot come from a bank of {bank} keys")
        d_k = dim // heads
        self.segment = nn.Parameter(torch.zeros(2, heads, 1, d_k))  # own words, prototypes
        self.register_buffer("prototype_k", torch.zeros(heads, prototypes, d_k))
        self.register_buffer("prototype_v", torch.zeros(heads, prototypes, d_k))
        self.register_buffer("bank_k", torch.zeros(heads, bank, d_k, dtype=torch.float16))
        self.register_buffer("bank_v", torch.zeros(heads, bank, d_k, dtype=torch.float16))
        self.register_buffer("noted", torch.zeros((), dtype=torch.long))  # keys ever put into the bank
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))  # whether there are prototypes

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own, other = (k + self.segment[0]).to(k.dtype), (self.prototype_k + self.segment[1]).to(k.dtype)
        other, other_v = (x.expand(len(k), -1, -1, -1) for x in (other, self.prototype_v.to(v.dtype)))
        return torch.cat([own, other], 2), torch.cat([v, other_v], 2)

    def cover(self, mask: torch.Tensor | None, N: int, extra: int) -> torch.Tensor:
        """Prototypes are hidden until there are some. A mask, not an `if` on a buffer, for which a GPU would wait."""
        if mask is None:
            mask = self.ready.new_ones(1, 1, 1, N)
        mask = mask.expand(*mask.shape[:-1], N)
        return torch.cat([mask, self.ready.expand(*mask.shape[:-1], extra)], -1)

    @torch.no_grad()
    def note(self, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, count: int = 64) -> None:
        """Put `count` words' keys and values (R, h, L, d_k), drawn among those that seen (R, L) names, into the bank."""
        drawn = torch.multinomial(seen.flatten().float(), count, replacement=True)  # (count,)
        slots = (self.noted + torch.arange(count, device=k.device)) % self.bank_k.shape[1]
        for bank, new in ((self.bank_k, k), (self.bank_v, v)):
            words = new.transpose(1, 2).flatten(0, 1)[drawn]  # (count, h, d_k)
            bank.index_copy_(1, slots, words.transpose(0, 1).to(bank.dtype))
        self.noted += count

    @torch.no_grad()
    def refresh(self, generator: torch.Generator | None = None) -> bool:
        """Cluster the bank anew, from the prototypes there are. False, and nothing changed, while it is too empty."""
        S, P = min(int(self.noted), self.bank_k.shape[1]), self.prototype_k.shape[1]
        if S < P:
            return False
        keys, values = self.bank_k[:, :S].float(), self.bank_v[:, :S].float()  # (h, S, d_k)
        centres = self.prototype_k
        if not self.ready:
            centres = keys[:, torch.randperm(S, generator=generator)[:P].to(keys.device)]
        for _ in range(ROUNDS):
            owner = torch.cdist(keys, centres).argmin(-1)  # (h, S)
            total = torch.zeros_like(centres).scatter_add_(1, owner[..., None].expand_as(keys), keys)
            size = torch.zeros_like(centres[..., 0]).scatter_add_(1, owner, torch.ones_like(keys[..., 0]))  # (h, P)
            centres = torch.where(size[..., None] > 0, total / size.clamp(min=1)[..., None], centres)
        far, near = torch.cdist(centres, keys).topk(min(NEAREST, S), largest=False)  # (h, P, NEAREST)
        weights = (-far.square() / keys.shape[-1] ** 0.5).softmax(-1)
        chosen = values[torch.arange(len(values), device=values.device)[:, None, None], near]  # (h, P, NEAREST, d_k)
        self.prototype_k.copy_(centres)
        self.prototype_v.copy_((weights[..., None] * chosen).sum(2))
        self.ready.fill_(True)
        return True
