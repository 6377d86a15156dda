"""What a 3D network sees of one posed RGB-D frame, and the labels of it, kept apart.

N points, S superpoints, Q queries, G objects of the scene, H x W px. Everything is a tensor on one device.
"""

from dataclasses import dataclass, fields

import torch


class _Tensors:
    def to(self, device: torch.device | str):
        """The same on another device; copies from pinned memory do not wait."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        return type(self)(**moved)


@dataclass
class View(_Tensors):
    """One frame of one scene.

    coords (N, 3) float32 m: where the points are for the network, augmented in training. colour (N, 3) float32 0..1.
    superpoint (N,) int64 in 0..S-1, each at least once. queries (Q,) int64: superpoints that ask, None: all.
    The rest is for pictures: uv (N, 2) float32, source pixels in a picture of `size` (H, W), camera (N, 3) float32 m in
    camera coordinates, pose (4, 4) float32 camera-to-world, both as recorded; picture (3, H, W) uint8; features: what
    was precomputed of it (models/bifusion.py), then the picture may be absent.
    """

    coords: torch.Tensor
    colour: torch.Tensor
    superpoint: torch.Tensor
    queries: torch.Tensor | None = None
    uv: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    camera: torch.Tensor | None = None
    pose: torch.Tensor | None = None
    picture: torch.Tensor | None = None
    features: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.coords)


@dataclass
class ViewLabels(_Tensors):
    """instance (N,) int64: index of the object, -1: stuff or unlabelled. semantic (N,) int64, number of classes:
    unlabelled. classes (G,) int64: semantic class of each object of the scene, a thing. boxes (G, 6) float32 m: lowest
    and highest corner of the whole object, moved as coords. All views of a clip number objects alike; an object may
    have no point in a view."""

    instance: torch.Tensor
    semantic: torch.Tensor
    classes: torch.Tensor
    boxes: torch.Tensor
