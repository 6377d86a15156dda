"""From what the network says about single frames to the instances of a scene: post-processing, streaming, results.

Shapes: P points of a frame, S superpoints, Q queries, K classes of things, C semantic classes, n instances of a frame,
O objects of the scene, M points or voxels of the scene. Points and boxes are metres, a box is (x0, y0, z0, x1, y1, z1).
`out` is what models/esam.py returns for one frame of a batch: stages, sem, queries, vectors, centres.
Source: Xu et al., "EmbodiedSAM: Online Segment Any 3D Thing in Real Time", ICLR 2025, sec. 3.3 and its released
configurations (numbers of `Filters`).
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from models.instance_merge import (
    FrameInstances,
    FrameMasks,
    Objects,
    OnlineMerge,
    VoxelVotes,
    box_corners,
    matrix_nms,
    to_vertices,
)
from utils.posed_views import View

OBJECTS = 1000  # most objects of a scene; beyond it those that cover the least are forgotten


@dataclass(frozen=True)
class Filters:
    """Which instances of a frame are kept. topk: pairs of query and class that are looked at; score_threshold,
    min_points: more than these; mask_threshold: probability from which a point belongs; agnostic: all things are one class. joint:
    scores and suppression as if they were, the label is the likeliest: a query then is one instance at most."""

    topk: int = 20
    score_threshold: float = 0.3
    min_points: int = 100
    mask_threshold: float = 0.4
    agnostic: bool = False
    joint: bool = False

    def __post_init__(self):
        if self.topk < 1 or self.min_points < 0 or not 0 <= self.score_threshold < 1 or not 0 < self.mask_threshold < 1:
            raise ValueError(f"{self}: expected topk >= 1, min_points >= 0, thresholds in 0..1")

    @classmethod
    def of(cls, stage: str, agnostic: bool) -> "Filters":
        """As released: single views keep everything that is large enough, streams what is sure enough."""
        if stage == "sv":
            return cls(topk=100, score_threshold=0.0, agnostic=agnostic)
        return cls(score_threshold=0.25 if agnostic else 0.3, agnostic=agnostic)


# ---- one frame


def frame_instances(out, b: int, view: View, filters: Filters, points: Tensor | None = None) -> FrameInstances:
    """Instances of item b of a frame, the best score first; labels are 0..K-1 (agnostic: 0).

    view: that item's; all its superpoints must have asked. points (P, 3) float32: the points of the view in the world,
    None: view.coords are; they may differ by a shift only. Boxes are predicted, or where the network has none (stage
    sv) those of the masks' points; without merge vectors `vectors` is (n, 0).
    """
    if view.queries is not None:
        raise ValueError(f"{len(view.queries)} of the superpoints ask: expected queries None, all of them")
    points, stage = view.coords if points is None else points, out.stages[-1]
    classes = stage.cls[b].float().softmax(-1)[:, :-1]  # (Q, K), the last is "no object"
    likeliest = classes.argmax(1) if filters.joint else None
    classes = classes.sum(1, keepdim=True) if filters.agnostic or filters.joint else classes
    K = classes.shape[1]
    scores, pair = classes.flatten().topk(min(filters.topk, classes.numel()))
    query, labels = pair // K, pair % K
    logits = stage.masks[b][query].float()
    logits = logits[:, view.superpoint] if stage.level == "SP" else logits  # (n, P)
    soft, inside = logits.sigmoid(), logits > 0
    scores = scores * (soft * inside).sum(1) / (inside.sum(1) + 1e-6)
    scores, order = matrix_nms(soft, labels, scores)
    masks = soft[order] > filters.mask_threshold
    keep = (scores > filters.score_threshold) & (masks.sum(1) > filters.min_points)
    order, masks = order[keep], masks[keep]
    query = query[order]
    if stage.boxes is None:
        boxes = mask_boxes(masks, points)
    else:
        boxes = box_corners(out.centres[b][query].float(), stage.boxes[b][query].float())
        boxes = boxes + (points - view.coords).mean(0).repeat(2)
    vectors = scores.new_zeros(len(query), 0) if out.vectors is None else out.vectors[b][query].float()
    queries, logits = out.queries[b][query].float(), out.sem[b][query, :-1].float()
    labels = labels[order] if likeliest is None else likeliest[query]
    return FrameInstances(masks, labels, scores[keep], vectors, boxes, queries, logits, points)


def mask_boxes(masks: Tensor, points: Tensor) -> Tensor:
    """Corners (n, 6) of the points (P, 3) in each of masks (n, P) bool, none of which is empty."""
    ends = [points[mask].aminmax(dim=0) for mask in masks]
    return torch.stack([torch.cat((e.min, e.max)) for e in ends]) if ends else points.new_zeros(0, 6)


def point_classes(out, b: int, view: View) -> Tensor:
    """Semantic class of every point of item b, (P,) int64 in 0..C-1: that of its superpoint."""
    return out.sem[b][:, :-1].argmax(1)[view.superpoint]


# ---- a scene


@dataclass
class FrameResult:
    """What one frame added: points (P, 3), masks (n, P) bool, ids (n,) int64 of the scene's objects, labels (n,), scores
    (n,), boxes (n, 6), semantic (P,) int64, new_ids: objects first seen here, timings: s of each part."""

    points: Tensor
    masks: Tensor
    ids: Tensor
    labels: Tensor
    scores: Tensor
    boxes: Tensor
    semantic: Tensor
    new_ids: list[int]
    timings: dict[str, float]

    def point_ids(self) -> Tensor:
        """Object of every point (P,) int64, -1 none; where masks overlap that of the best score."""
        ids = torch.full((len(self.points),), -1, dtype=torch.int64, device=self.ids.device)
        for k in self.scores.argsort().tolist():
            ids[self.masks[k]] = self.ids[k]
        return ids


@dataclass
class SceneResult:
    """The objects of a scene, best score first, and where they are: masks (O, M) bool over points (M, 3) float32;
    semantic (M,) int64; colour (M, 3) float32 0..1, None on given vertices."""

    objects: Objects
    masks: np.ndarray
    points: np.ndarray
    semantic: np.ndarray
    colour: np.ndarray | None

    def point_ids(self) -> np.ndarray:
        """Row of the object of every point (M,) int64, -1 none; where masks overlap that of the best score."""
        return (
            np.where(self.masks.any(0), self.masks.argmax(0), -1) if len(self.masks) else np.full(len(self.points), -1)
        )


class VoxelClouds:
    """Class and colour of every voxel: few classes with votes, and the mean colour. Constant memory per place."""

    def __init__(self, voxel: float):
        self.classes = VoxelVotes(voxel)
        self.colours, self.counts = np.zeros((0, 3), np.float32), np.zeros(0, np.float32)  # (V, 3) means, (V,) frames

    def add(self, points: np.ndarray, semantic: np.ndarray, colour: np.ndarray) -> None:
        """points (P, 3), semantic (P,), colour (P, 3) of one frame."""
        known, found = self.classes.keys, np.unique(semantic)
        self.classes.add(semantic == found[:, None], found, points)
        every = self.classes.keys
        if len(every) > len(known):
            at = np.searchsorted(every, known)
            colours, counts = np.zeros((len(every), 3), np.float32), np.zeros(len(every), np.float32)
            colours[at], counts[at] = self.colours, self.counts
            self.colours, self.counts = colours, counts
        keys, cell = np.unique(self.classes.keys_of(points), return_inverse=True)
        rows, size = np.searchsorted(every, keys), np.bincount(cell)
        mean = np.stack([np.bincount(cell, c) for c in colour.T], 1) / size[:, None]
        self.counts[rows] += 1
        self.colours[rows] += (mean - self.colours[rows]) / self.counts[rows, None]

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """points (V, 3), semantic (V,), colour (V, 3)."""
        return self.classes.points(), self.classes.winners(), self.colours

    def nbytes(self) -> int:
        return self.classes.nbytes() + self.colours.nbytes + self.counts.nbytes


class PointClouds:
    """Points, classes and colours of all frames as they came: exact, grows with the number of frames."""

    def __init__(self):
        self.frames: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, points: np.ndarray, semantic: np.ndarray, colour: np.ndarray) -> None:
        self.frames.append((points, semantic, colour))

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """points (M, 3), semantic (M,), colour (M, 3), frame after frame."""
        return tuple(np.concatenate(x) for x in zip(*self.frames, strict=True))

    def nbytes(self) -> int:
        return sum(x.nbytes for frame in self.frames for x in frame)


class SceneSegmenter:
    """The instances of a scene, frame by frame, with a trained network in eval mode; it never sees labels.

    merge: online (needs merge vectors: stage mv); voted: the same, but the instances of an object may differ in label,
    its own is the likeliest by their mean semantics; geometric, concat; None: online, or geometric for stage sv. filters:
    None: those released for streams, whatever the stage. voxel: m of the scene's memory, which is constant per place;
    None keeps every point of every frame. top: objects that `result` gives. dtype: of autocast.

    ValueError for a network in training mode, for online merging without vectors, for a bad frame.
    """

    def __init__(
        self, model, merge: str | None = None, filters: Filters | None = None, voxel: float | None = 0.02,
        top: int = 200, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        stage = model.cfg.stage
        merge = merge or ("online" if stage == "mv" else "geometric")
        if merge in ("online", "voted") and stage == "sv":
            raise ValueError(f"merge {merge}: a network of stage sv has no merge vectors; expected geometric or concat")
        if model.training:
            raise ValueError("the network is in training mode: expected model.eval()")
        self.model, self.merge_mode, self.voxel, self.top, self.dtype = model, merge, voxel, top, dtype
        self.filters = filters or Filters.of("mv", model.cfg.agnostic or merge == "voted")
        if merge == "voted" and not model.cfg.agnostic:
            self.filters = replace(self.filters, agnostic=False, joint=True)
        self.new_scene()

    def new_scene(self) -> None:
        """Forget everything about the scene before."""
        self.state, self.frames, self.predicted = None, 0, True
        if self.voxel is None:
            self.merge, self.cloud = OnlineMerge(self.merge_mode, self.top, FrameMasks()), PointClouds()
        else:
            memory, limit = VoxelVotes(self.voxel), max(OBJECTS, self.top)
            self.merge, self.cloud = OnlineMerge(self.merge_mode, self.top, memory, limit), VoxelClouds(self.voxel)

    @torch.no_grad()
    def push(self, view: View, world_points: Tensor | None = None) -> FrameResult:
        """One frame; view on the network's device, world_points (P, 3) as in `frame_instances`: needed where the view
        is centred, as networks of stage sv are trained."""
        points = view.coords if world_points is None else world_points
        if points.shape != view.coords.shape or not torch.isfinite(points).all():
            raise ValueError(f"points {tuple(points.shape)}: expected {tuple(view.coords.shape)}, finite")
        times = [time.perf_counter()]
        with torch.autocast(view.coords.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out, self.state = self.model.step([view], self.state)
        if not torch.isfinite(out.stages[-1].cls[0]).all():  # waits for the device, too
            raise ValueError(
                f"frame {self.frames}: the network's classes are not finite; expected other weights or dtype"
            )
        times.append(time.perf_counter())
        found = frame_instances(out, 0, view, self.filters, points)
        semantic = point_classes(out, 0, view)
        self.predicted = out.stages[-1].boxes is not None
        times.append(time.perf_counter())
        before = self.merge.next_id
        ids = self.merge.push(found)
        self.cloud.add(*(x.cpu().numpy() for x in (points, semantic, view.colour)))
        self.frames += 1
        times.append(time.perf_counter())
        spent = np.diff(times).tolist()
        return FrameResult(points, found.masks, ids, found.labels, found.scores, found.boxes, semantic,
                           list(range(before, self.merge.next_id)),
                           dict(zip(("network", "instances", "merging"), spent, strict=True)))  # fmt: skip

    def result(
        self, vertices: np.ndarray | None = None, segments: np.ndarray | None = None, least: int = 20
    ) -> SceneResult:
        """The scene so far, on its voxels (or points), or on vertices (V, 3) of a reconstruction by the nearest; with its
        segments (V,) int64 each is in an object or not. Objects with fewer than `least` points there are left out.
        ValueError before the first frame."""
        found = self.merge.result()
        points, semantic, colour = self.cloud.read()
        objects, masks = found.objects, found.masks
        if self.filters.joint:
            objects = replace(objects, labels=objects.logits[:, self.model.cfg.n_stuff :].argmax(1))
        if not self.predicted and len(masks):
            boxes = mask_boxes(torch.from_numpy(masks), torch.from_numpy(points))
            objects = replace(objects, boxes=boxes.to(objects.boxes))
        if vertices is not None:
            masks, semantic = to_vertices(masks, points, vertices, semantic, segments)
            points, colour = vertices, None
        order = objects.scores.argsort(descending=True, stable=True)
        order = order[torch.from_numpy(masks.sum(1) >= max(least, 1)).to(order.device)[order]]
        return SceneResult(objects[order], masks[order.cpu().numpy()], points, semantic, colour)

    def nbytes(self) -> int:
        """Bytes of what is remembered of the scene, with the network's own memory."""
        own = 0 if self.state is None or self.state.memory is None else self.state.memory.nbytes()
        return own + self.merge.nbytes() + self.cloud.nbytes()
