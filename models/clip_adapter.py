"""CLIP's image tower with trainable adapters and prompts, and patch features that live in the text's space.

The tower itself stays frozen; only names with `S_Adapter` or `prompt` are trained (FSGR). At step 0 the adapters add
nothing, so the tower is CLIP's. The names are those of FSGR's source, whose state dict loads strictly.

Shapes: B images, N = h w patches, W width of the tower, E of the embedding space, P prompts per layer.
Dense features: MaskCLIP, Zhou et al. 2022; CSA, correlative self-attention, SCLIP, Wang et al. 2024.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from models.clip import Block, CLIPConfig, CLIPVision
from utils.run import UserError
from utils.weights import load_strict

KINDS, DENSE = ("sequential", "parallel", "none"), ("plain", "maskclip", "csa")
TRAINED = ("S_Adapter", "prompt")  # parts of the names that are not CLIP's
PARALLEL_SCALE = 0.1  # AdaptFormer, Chen et al. 2022


@dataclass(frozen=True)
class AdapterConfig:
    """What is added to the tower, and how patches reach the text's space."""

    first: int = 6  # layers with an adapter, counted from 0, both included
    last: int = 11
    ratio: float = 0.25  # bottleneck of an adapter / width
    kind: str = "sequential"  # sequential: on the attention's output | parallel: beside the MLP (AdaptFormer) | none
    prompts: int = 0  # P learned tokens per layer, fresh ones in each (VPT-deep); 0: none
    prompt_dropout: float = 0.1
    dense: str = "plain"  # last block for `align` | plain: its output | maskclip: no mixing | csa: q q^T + k k^T
    residual: bool = True  # maskclip, csa: False leaves out the last block's residual, adapter and MLP
    compat: bool = False  # the source's outputs: align = patches @ proj without ln_post, nothing normalised
    output_norm: bool = True  # a LayerNorm `prompt_norm` over all final tokens


class Adapter(nn.Module):
    """W2 act(W1 x), (B, N, W) -> (B, N, W); W2 starts at zero, so nothing is added at step 0."""

    def __init__(self, width: int, hidden: int, act: nn.Module):
        super().__init__()
        self.D_fc1, self.D_fc2, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width), act
        nn.init.trunc_normal_(self.D_fc1.weight, std=0.02)
        for zero in (self.D_fc1.bias, self.D_fc2.weight, self.D_fc2.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.D_fc2(self.act(self.D_fc1(x)))


class SequentialBlock(Block):
    """a = attention(LN x); x + a + adapter(a); then the MLP."""

    def __init__(self, cfg: CLIPConfig, hidden: int):
        super().__init__(cfg.width, cfg.heads, cfg.mlp, cfg.activation, cfg.eps)
        self.S_Adapter = Adapter(cfg.width, hidden, nn.GELU())

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return super().finish(x, attended + self.S_Adapter(attended))


class ParallelBlock(Block):
    """x + MLP(LN x) + 0.1 adapter(LN x) after the attention."""

    def __init__(self, cfg: CLIPConfig, hidden: int):
        super().__init__(cfg.width, cfg.heads, cfg.mlp, cfg.activation, cfg.eps)
        self.S_Adapter = Adapter(cfg.width, hidden, nn.ReLU())

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + attended
        y = self.ln_2(x)
        return x + self.mlp(y) + PARALLEL_SCALE * self.S_Adapter(y)


class AdaptedCLIP(CLIPVision):
    """Images (B, 3, H, W), normalised as CLIP's -> dict of

    patches (B, N, W)   final tokens, for the captioner; neither class token nor prompts
    global  (B, E)      embedding of the image, unit length
    align   (B, N, E)   embeddings of the patches, unit length
    grid    (h, w)      N = h w, row by row
    """

    def __init__(self, clip_cfg: CLIPConfig, cfg: AdapterConfig):
        super().__init__(clip_cfg)
        check(clip_cfg, cfg)
        self.cfg, width = cfg, clip_cfg.width
        for i in range(cfg.first, cfg.last + 1) if cfg.kind != "none" else ():
            adapted = SequentialBlock if cfg.kind == "sequential" else ParallelBlock
            block, plain = adapted(clip_cfg, int(cfg.ratio * width)), self.transformer.resblocks[i]
            block.load_state_dict(plain.state_dict(), strict=False)  # keeps the tower's initialisation
            self.transformer.resblocks[i] = block
        if cfg.prompts:
            v = math.sqrt(6 / (3 * clip_cfg.patch**2 + width))
            self.prompt_embeddings = nn.Parameter(torch.empty(1, cfg.prompts, width).uniform_(-v, v))
            deep = torch.empty(clip_cfg.layers - 1, cfg.prompts, width).uniform_(-v, v)
            self.deep_prompt_embeddings = nn.Parameter(deep)
            self.prompt_proj, self.prompt_dropout = nn.Linear(width, width), nn.Dropout(cfg.prompt_dropout)
            nn.init.kaiming_normal_(self.prompt_proj.weight, mode="fan_out")
        self.prompt_norm = nn.LayerNorm(width, eps=1e-6) if cfg.output_norm else nn.Identity()

    def insert(self, x: torch.Tensor, prompts: torch.Tensor, ahead: int) -> torch.Tensor:
        """Tokens with `ahead` before the first patch, prompts (P, W) -> class token, prompts, patches (B, 1+P+N, W)."""
        prompts = self.prompt_dropout(prompts.expand(len(x), -1, -1))
        return torch.cat([x[:, :1], prompts, x[:, ahead:]], 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor | tuple[int, int]]:
        cfg, last = self.cfg, self.transformer.resblocks[-1]
        x, grid = self.embed(images)  # (B, 1+N, W)
        ahead = 1  # tokens before the first patch
        if cfg.prompts:
            prompts = self.prompt_proj(
                torch.cat([self.prompt_embeddings, self.deep_prompt_embeddings])
            )  # (layers, P, W)
        for i, block in enumerate(self.transformer.resblocks):
            if cfg.prompts:
                x, ahead = self.insert(x, prompts[i], ahead), 1 + cfg.prompts
            if block is not last:
                x = block(x)
        qkv = last.attn.qkv(last.ln_1(x))
        out = self.prompt_norm(last.finish(x, last.attn.merge(F.scaled_dot_product_attention(*qkv))))
        patches = out[:, ahead:]
        if cfg.compat:
            return {"patches": patches, "global": self.project(out[:, 0]), "align": patches @ self.proj, "grid": grid}
        dense = patches if cfg.dense == "plain" else self.dense(x[:, ahead:], [t[:, :, ahead:] for t in qkv])
        embedded = self.project(torch.cat([out[:, :1], dense], 1))  # (B, 1+N, E)
        unit = F.normalize(embedded.float(), dim=-1)
        return {"patches": patches, "global": unit[:, 0], "align": unit[:, 1:], "grid": grid}

    def dense(self, x: torch.Tensor, qkv: list[torch.Tensor]) -> torch.Tensor:
        """Last block with another attention. Its input (B, N, W), q, k, v (B, heads, N, W / heads), patches only."""
        q, k, v = qkv
        last = self.transformer.resblocks[-1]
        if self.cfg.dense == "csa":
            v = F.scaled_dot_product_attention(q, q, v) + F.scaled_dot_product_attention(k, k, v)
        v = last.attn.merge(v)
        return self.prompt_norm(last.finish(x, v) if self.cfg.residual else v)

    def freeze_backbone(self) -> None:
        """Only adapters and prompts (with their projection and norm) stay trainable."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(added(name))

    def load_vision(self, state: dict[str, torch.Tensor], source: Path | str = "CLIP's image tower") -> None:
        """Take CLIPVision's state dict, strictly; adapters and prompts keep their values. `source` is for errors."""
        wrong = [name for name in state if added(name)]
        if wrong:
            raise UserError(f"{source}: holds {wrong[0]}; expected CLIP's own weights, without adapters and prompts")
        own = {name: value for name, value in self.state_dict().items() if added(name)}
        load_strict(self, {**own, **state}, source)


def added(name: str) -> bool:
    """Whether a parameter is not CLIP's own."""
    return any(part in name for part in TRAINED)


def check(clip_cfg: CLIPConfig, cfg: AdapterConfig) -> None:
    """ValueError for settings that do not go together."""
    if cfg.kind not in KINDS or cfg.dense not in DENSE:
        raise ValueError(f"kind {cfg.kind!r}, dense {cfg.dense!r}: expected one of {KINDS} and one of {DENSE}")
    if cfg.kind != "none" and not 0 <= cfg.first <= cfg.last < clip_cfg.layers:
        raise ValueError(f"adapters in layers {cfg.first}..{cfg.last}: expected layers of 0..{clip_cfg.layers - 1}")
    if cfg.kind != "none" and int(cfg.ratio * clip_cfg.width) < 1:
        raise ValueError(f"ratio {cfg.ratio}: leaves an adapter of {clip_cfg.width} channels without a channel")
    if cfg.dense == "plain" and not cfg.residual:
        raise ValueError("residual=False is for dense maskclip and csa; plain is the block as it is")
    if cfg.compat and cfg.dense != "plain":
        raise ValueError(f"compat gives the source's align, which is plain; dense is {cfg.dense!r}")
