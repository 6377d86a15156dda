"""SAM's mask decoder: tokens of prompts and an image look at each other; each mask token becomes a mask and its IoU.

Shapes: R objects, n tokens of prompts, T = 1 + 4 + n tokens, D width, h w grid of the features, S = h w.
Source: Kirillov et al., Segment Anything, ICCV 2023; parameter names are those of segment-anything's `mask_decoder`.
Prompt tokens and the grid's position code come from models/sam_prompt_encoder.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.sam_prompt_encoder import ChannelNorm

MASKS = 4  # the first for a prompt with one answer, the others for one with several


class Attention(nn.Module):
    """Multi-head attention with projections of its own width, dim / shrink."""

    def __init__(self, dim: int, heads: int, shrink: int = 1):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim // shrink) for _ in range(3))
        self.out_proj = nn.Linear(dim // shrink, dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (R, n, D), k and v (R, m, D) -> (R, n, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, heads, n or m, d)
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """W2 ReLU(W1 x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens look at themselves, then at the image; the image looks at the tokens. first: the tokens come without a
    position of their own and are replaced by what they see in each other."""

    def __init__(self, dim: int, heads: int, hidden: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn, self.mlp = Attention(dim, heads), FeedForward(dim, hidden)
        self.cross_attn_token_to_image = Attention(dim, heads, 2)
        self.cross_attn_image_to_token = Attention(dim, heads, 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(4))

    def forward(self, tokens, image, token_code, image_code) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens and their codes (R, T, D), image and its code (R, S, D) -> tokens, image."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_code
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        k = image + image_code
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_code, k, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        return tokens, self.norm4(image + self.cross_attn_image_to_token(k, tokens + token_code, tokens))


class TwoWayTransformer(nn.Module):
    """Blocks, and a last look of the tokens at the image. The tokens as given are also their position codes."""

    def __init__(self, dim: int, heads: int, hidden: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, heads, hidden, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image, self.norm_final_attn = Attention(dim, heads, 2), nn.LayerNorm(dim)

    def forward(self, image, image_code, tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """image and its code (R, S, D), tokens (R, T, D) -> tokens, image."""
        code = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, code, image_code)
        seen = self.final_attn_token_to_image(tokens + code, image + image_code, image)
        return self.norm_final_attn(tokens + seen), image


class MLP(nn.Module):
    """`depth` linear layers with ReLU between."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int = 3):
        super().__init__()
        widths = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class SAMMaskDecoder(nn.Module):
    """Masks of prompted objects at four times the features' grid, and the IoU that each is expected to have."""

    def __init__(
        self, dim: int = 256, heads: int = 8, hidden: int = 2048, depth: int = 2, iou_hidden: int = 256, iou_depth=3
    ):
        super().__init__()
        self.transformer = TwoWayTransformer(dim, heads, hidden, depth)
        self.iou_token, self.mask_tokens = nn.Embedding(1, dim), nn.Embedding(MASKS, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2), ChannelNorm(dim // 4), nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2), nn.GELU(),
        )  # fmt: skip
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8) for _ in range(MASKS))
        self.iou_prediction_head = MLP(dim, iou_hidden, MASKS, iou_depth)

    def forward(
        self,
        features: torch.Tensor,
        grid_code: torch.Tensor,
        sparse: torch.Tensor,
        dense: torch.Tensor,
        several: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features (R, D, h, w), or (1, D, h, w) of one image for all objects; grid_code (D, h, w); sparse (R, n, D)
        and dense (R, D, h, w) of the prompts -> mask logits (R, 3, 4h, 4w) and IoU (R, 3), or of one mask: several
        False."""
        R, (h, w) = len(sparse), features.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(R, -1, -1).to(sparse.dtype), sparse], 1)  # (R, T, D)
        image = (features + dense).flatten(2).transpose(1, 2)  # (R, S, D)
        code = grid_code.flatten(1).T.expand_as(image)
        tokens, image = self.transformer(image, code, tokens)
        large = self.output_upscaling(image.transpose(1, 2).unflatten(2, (h, w))).flatten(2)  # (R, D / 8, 16 S)
        chosen = range(1, MASKS) if several else range(1)
        kernels = torch.stack([self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen], 1)
        iou = self.iou_prediction_head(tokens[:, 0])[:, chosen.start : chosen.stop]
        return (kernels @ large).unflatten(2, (4 * h, 4 * w)), iou
