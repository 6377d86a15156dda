"""Clicks, boxes and masks as tokens: SAM's prompt encoder, for images of any size.

Shapes: B objects, n points of each, D width (even, 256), h w grid of the features, H W image.
Coordinates are pixels, x first; a pixel's centre is 0.5 further. Source: Kirillov et al., Segment Anything, ICCV 2023;
parameter names are those of segment-anything's `prompt_encoder`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

NOT_A_POINT, TOP_LEFT, BOTTOM_RIGHT = -1, 2, 3  # labels of points; clicks are 0 (negative) and 1 (positive)


class RandomFourier(nn.Module):
    """Points in [0, 1]^2 -> sines and cosines at random frequencies. The matrix is state: other frequencies, other
    points, so a checkpoint without it would be useless."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, xy_01: torch.Tensor) -> torch.Tensor:
        """(..., 2) -> (..., D) float32."""
        with torch.autocast(xy_01.device.type, enabled=False):  # an angle in bfloat16 is off by several degrees
            angle = 2 * math.pi * ((2 * xy_01.float() - 1) @ self.positional_encoding_gaussian_matrix.float())
            return torch.cat([angle.sin(), angle.cos()], -1)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return x.permute(0, 3, 1, 2)


class SAMPromptEncoder(nn.Module):
    """Sparse tokens of points and boxes, a dense map of a mask, and the position code of a feature grid."""

    def __init__(self, dim: int = 256, mask_channels: int = 16):
        super().__init__()
        c = mask_channels
        self.pe_layer = RandomFourier(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))  # by label, 0..3
        self.not_a_point_embed, self.no_mask_embed = nn.Embedding(1, dim), nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, c // 4, 2, stride=2), ChannelNorm(c // 4), nn.GELU(),
            nn.Conv2d(c // 4, c, 2, stride=2), ChannelNorm(c), nn.GELU(),
            nn.Conv2d(c, dim, 1),
        )  # fmt: skip

    def encode_points(self, points_px: torch.Tensor, labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """points_px (B, n, 2), labels (B, n) int64 or float in -1..3, of an image of size (H, W) -> (B, n, D) float32.

        A point of label -1 is padding: its token is one learned vector, whatever its coordinates.
        """
        H, W = size
        x, y = (points_px.float() + 0.5).unbind(-1)
        code = self.pe_layer(torch.stack([x / W, y / H], -1))  # no tensor of W and H: an export would keep their values
        code = code.masked_fill((labels == NOT_A_POINT)[..., None], 0.0)
        kinds = torch.cat([self.not_a_point_embed.weight, *(e.weight for e in self.point_embeddings)])  # (5, D)
        return code + F.embedding(labels.long() + 1, kinds)

    def encode_boxes(self, boxes_xyxy_px: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """One box per object, (B, 4) -> its two corners' tokens (B, 2, D)."""
        corners = boxes_xyxy_px.unflatten(-1, (2, 2))
        labels = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=corners.device).expand(len(corners), 2)
        return self.encode_points(corners, labels, size)

    def encode_masks(self, masks: torch.Tensor) -> torch.Tensor:
        """Mask logits (B, 1, 4h, 4w) -> (B, D, h, w)."""
        return self.mask_downscaling(masks)

    def no_mask(self, B: int, grid: tuple[int, int]) -> torch.Tensor:
        """The dense map of objects without a mask, (B, D, h, w)."""
        return self.no_mask_embed.weight[0, :, None, None].expand(B, -1, *grid)

    def grid_code(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position code of the cell centres of a grid (h, w) -> (D, h, w) float32."""
        h, w = grid
        device = self.pe_layer.positional_encoding_gaussian_matrix.device
        y, x = ((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n for n in (h, w))
        xy_01 = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (h, w, 2)
        return self.pe_layer(xy_01).permute(2, 0, 1)

    def forward(
        self,
        size: tuple[int, int],
        grid: tuple[int, int],
        points_px: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        boxes_xyxy_px: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Any mix of prompts of B objects in an image of size (H, W) -> sparse (B, tokens, D), dense (B, D, h, w).

        Tokens: the points, one padding point where there are points but no boxes, two corners per box. No prompt at
        all: B = 1 and no token. ValueError for points without labels or batches of different lengths.
        """
        if (points_px is None) != (labels is None):
            raise ValueError("SAMPromptEncoder: points and labels come together")
        lengths = {len(p) for p in (points_px, labels, boxes_xyxy_px, masks) if p is not None}
        if len(lengths) > 1:
            raise ValueError(f"SAMPromptEncoder: prompts of {sorted(lengths)} objects, expected one number")
        B, tokens = max(lengths, default=1), []
        if points_px is not None:
            if boxes_xyxy_px is None:
                points_px, labels = F.pad(points_px, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=NOT_A_POINT)
            tokens.append(self.encode_points(points_px, labels, size))
        if boxes_xyxy_px is not None:
            tokens.append(self.encode_boxes(boxes_xyxy_px, size))
        nothing = self.no_mask_embed.weight.new_zeros(B, 0, self.no_mask_embed.embedding_dim)
        sparse = torch.cat(tokens, 1) if tokens else nothing
        dense = self.encode_masks(masks) if masks is not None else self.no_mask(B, grid)
        return sparse, dense
