"""Geometry-aware pooling of points to superpoints: a mean weighted by where a point lies, plus what the shape says.

Shapes: N points of all items of a batch, S superpoints of all items, C channels.
Source: Xu et al., "EmbodiedSAM: Online Segment Any 3D Thing in Real Time", ICLR 2025, sec. 3.2. Parameters are named as
in the released weights.
"""

import torch
from torch import nn

from models.sparse_conv import Groups

MARGIN = 0.01  # m, added to a superpoint's extent


class GeometryAwarePooling(nn.Module):
    """p = (xyz - middle) / (extent + 1 cm), z = MLP(p), w = 2 sigmoid(MLP([z, max z])), F = mean(w x) + max z."""

    def __init__(self, channels: int):
        super().__init__()
        C = channels
        self.pts_proj1 = nn.Sequential(
            nn.Linear(3, C), nn.LayerNorm(C), nn.ReLU(), nn.Linear(C, C), nn.LayerNorm(C)
        )  # fmt: skip
        self.pts_proj2 = nn.Sequential(nn.Linear(2 * C, C), nn.LayerNorm(C), nn.ReLU(), nn.Linear(C, 1, bias=False))

    def forward(
        self, x: torch.Tensor, xyz: torch.Tensor, superpoint: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (N, C), xyz (N, 3) m, superpoint (N,) int64 in 0..count-1, numbered through the batch, each at least once
        -> features (S, C), weights of points (N, 1) in 0..2, mean xyz (S, 3). Float32."""
        points = Groups(superpoint, count)
        if count and int(points.sizes.amin()) == 0:
            raise ValueError(f"{int((points.sizes == 0).sum())} of {count} superpoints have no point")
        xyz = xyz.float()
        middle = points.mean(xyz)  # (S, 3)
        extent = (points.max(xyz) + points.max(-xyz)).amax(1, keepdim=True)  # (S, 1)
        p = (xyz - points.spread(middle)) / points.spread(extent + MARGIN)
        z = self.pts_proj1(p).float()  # (N, C)
        shape = points.max(z)  # (S, C)
        weights = 2 * self.pts_proj2(torch.cat([z, points.spread(shape)], 1)).float().sigmoid()
        return points.mean(weights * x.float()) + shape, weights, middle
