"""Axis-aligned boxes in 3D: corners (..., 6) are x0 y0 z0 x1 y1 z1, in metres."""

import torch


def corners(middle_and_size: torch.Tensor) -> torch.Tensor:
    """(..., 6) middle and size -> (..., 6) corners."""
    middle, half = middle_and_size[..., :3], middle_and_size[..., 3:] / 2
    return torch.cat((middle - half, middle + half), -1)


def box_iou3d(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """IoU of corners (..., 6) and (..., 6), which broadcast: (...)."""
    low, high = torch.maximum(a[..., :3], b[..., :3]), torch.minimum(a[..., 3:], b[..., 3:])
    common = (high - low).clamp(min=0).prod(-1)
    volume_a, volume_b = ((x[..., 3:] - x[..., :3]).prod(-1) for x in (a, b))
    return common / (volume_a + volume_b - common).clamp(min=1e-6)
