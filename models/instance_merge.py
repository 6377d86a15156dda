"""From the instances of single frames to those of a scene: matrix suppression, online merging, memory of masks.

Shapes: n instances of a frame with P points, O objects of the scene, E width of a merge vector, M points or voxels of
the scene, Q vertices of a mesh. Points and boxes are metres in the world frame; a box is (x0, y0, z0, x1, y1, z1).
Sources: Xu et al., "EmbodiedSAM: Online Segment Any 3D Thing in Real Time", ICLR 2025, sec. 3.3 (merging); Wang et al.,
SOLOv2, NeurIPS 2020 (matrix suppression); Misra and Gries, 1982 (votes in few slots).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from models.boxes3d import box_iou3d, corners

MODES = ("online", "voted", "geometric", "concat")
NEAR, SHARE, GRAIN = 0.05, 0.1, 0.02  # geometric: metres between points, share of points, metres between kept points
LIMIT, BITS = 2**16, 17  # voxel coordinates -LIMIT .. LIMIT - 1 in BITS bits each


@dataclass
class FrameInstances:
    """Instances of one frame. masks (n, P) bool, labels (n,) int64, scores (n,), vectors (n, E) unit merge vectors,
    boxes (n, 6) corners, queries (n, D), logits (n, C), all float32; points (P, 3) where the mode or memory needs them.
    """

    masks: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    vectors: torch.Tensor
    boxes: torch.Tensor
    queries: torch.Tensor
    logits: torch.Tensor
    points: torch.Tensor | None = None


@dataclass
class Objects:
    """Running means of the scene's objects: ids, labels, counts (O,) int64, scores (O,), vectors (O, E), boxes (O, 6),
    queries (O, D), logits (O, C). counts: frames that were merged."""

    ids: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor
    scores: torch.Tensor
    vectors: torch.Tensor
    boxes: torch.Tensor
    queries: torch.Tensor
    logits: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Objects":
        return Objects(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.ids)

    def joined(self, other: "Objects") -> "Objects":
        """These and the others after them."""
        return Objects(**{f.name: torch.cat((getattr(self, f.name), getattr(other, f.name))) for f in fields(self)})


MEANS = ("scores", "vectors", "boxes", "queries", "logits")


@dataclass
class SceneInstances:
    """The scene's objects and where they are: masks (O, M) bool over the points of all frames in their order, or over
    the voxels, whose centres are points (M, 3)."""

    objects: Objects
    masks: np.ndarray
    points: np.ndarray | None = None


# ---- suppression and boxes


def matrix_nms(
    masks: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor, kernel: str = "linear", sigma: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft masks (n, P), labels and scores (n,) -> lowered scores (n,), descending, and the order (n,) int64.

    A score falls with the IoU of its mask with better ones of its label, less so where these are doubtful themselves.
    kernel: linear, or gaussian with `sigma`. Duplicates of a better mask get 0 (linear).
    """
    if kernel not in ("linear", "gaussian"):
        raise ValueError(f"kernel {kernel}: expected linear or gaussian")
    if not len(scores):
        return scores.new_zeros(0), scores.new_zeros(0, dtype=torch.int64)
    scores, order = scores.sort(descending=True)
    masks, labels = masks[order].float(), labels[order]
    area, common = masks.sum(1), masks @ masks.T
    iou = common / (area[:, None] + area - common).clamp_min(1e-6)
    iou = (iou * (labels[:, None] == labels)).triu(1)  # (n, n), row: the better one
    worst = iou.max(0).values[:, None]  # how doubtful the better one is
    if kernel == "gaussian":
        factor = torch.exp(-sigma * (iou**2 - worst**2))
    else:
        factor = (1 - iou) / (1 - worst).clamp_min(1e-6)
    scores, again = (scores * factor.min(0).values).sort(descending=True)
    return scores, order[again]


def box_corners(centers: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """centers (n, 3) of superpoints and predicted offset and size (n, 6) -> corners (n, 6)."""
    return corners(torch.cat((centers + boxes[:, :3], boxes[:, 3:]), 1))


# ---- cells of space


def cell_keys(points: np.ndarray, size: float) -> np.ndarray:
    """Points (P, 3) -> cells of `size` m, (P,) int64 >= 0, ordered by x, y, z. ValueError beyond +-65,536 or nan."""
    cell = np.floor(points / size)
    if not (np.abs(cell + 0.5) < LIMIT).all():
        raise ValueError(f"points: some are not finite or {LIMIT * size:.0f} m or more from the origin")
    x, y, z = (cell.astype(np.int64) + LIMIT).T
    return (x << 2 * BITS) + (y << BITS) + z


class Shape:
    """An object's points (A, 3), the first in each 2 cm cell, by cell: keys (A,) int64 ascending; box (2, 3) corners."""

    def __init__(self):
        self.keys, self.points = np.zeros(0, np.int64), np.zeros((0, 3), np.float32)
        self.box = np.array([[np.inf] * 3, [-np.inf] * 3])

    def add(self, points: np.ndarray) -> None:
        """Points (P, 3) of a frame."""
        keys, first = np.unique(cell_keys(points, GRAIN), return_index=True)
        where = np.searchsorted(self.keys, keys)
        new = np.append(self.keys, -1)[where] != keys  # keys are not negative
        if new.any():
            where, points = where[new], points[first[new]]
            self.keys = np.insert(self.keys, where, keys[new])
            self.points = np.insert(self.points, where, points, axis=0)
            self.box = np.stack((np.minimum(self.box[0], points.min(0)), np.maximum(self.box[1], points.max(0))))

    def near(self, points: np.ndarray, box: np.ndarray) -> bool:
        """Whether more than a tenth of the points (P, 3), whose box is (2, 3), or of its own is nearer than 5 cm to the
        other. Only those in the box of the other, grown by 5 cm, are compared."""
        slab = np.floor((box[:, 0] + (-NEAR, NEAR)) / GRAIN).astype(np.int64) + LIMIT + (-1, 2)  # cells in x
        start, end = np.searchsorted(self.keys, slab << 2 * BITS)
        a, b = inside(self.points[start:end], box), inside(points, self.box)
        sides = ((a, b, len(self.points)), (b, a, len(points)))
        return any(len(x) > SHARE * n and count_near(x, y) > SHARE * n for x, y, n in sides)


def count_near(points: np.ndarray, others: np.ndarray) -> int:
    """How many of points (P, 3) are nearer than 5 cm to one of the others (Q, 3)."""
    tree = cKDTree(others, balanced_tree=False, compact_nodes=False)  # built for one query
    return int(np.isfinite(tree.query(points, distance_upper_bound=NEAR)[0]).sum())


def inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Those of points (P, 3) in box (2, 3), grown by 5 cm."""
    for axis, (low, high) in enumerate(zip(box[0] - NEAR, box[1] + NEAR, strict=True)):
        points = points[(points[:, axis] >= low) & (points[:, axis] <= high)]
    return points


# ---- memories of masks


class FrameMasks:
    """All masks of all frames, one bit a point, and the object of each: exact, grows with the number of frames."""

    def __init__(self):
        self.frames: list[tuple[np.ndarray, np.ndarray, int]] = []  # packed (n, ceil(P / 8)) uint8, ids (n,), P

    def add(self, masks: np.ndarray, ids: np.ndarray, points: np.ndarray | None) -> None:
        """Masks (n, P) bool of one frame and their objects (n,) int64."""
        self.frames.append((np.packbits(masks, axis=1), ids.copy(), masks.shape[1]))

    def masks(self, ids: np.ndarray) -> np.ndarray:
        """(O, M) bool for objects (O,); M is the sum of the frames' points."""
        total, row = sum(n for _, _, n in self.frames), {int(i): k for k, i in enumerate(ids)}
        out, at = np.zeros((len(ids), total), bool), 0
        for packed, own, n in self.frames:
            for bits, i in zip(packed, own, strict=True):
                if int(i) in row:
                    out[row[int(i)], at : at + n] |= np.unpackbits(bits, count=n).astype(bool)
            at += n
        return out

    def forget(self, ids: np.ndarray) -> None:
        """Nothing: masks of forgotten objects stay."""

    def points(self) -> None:
        """The points are those of the frames, which the caller has."""

    def nbytes(self) -> int:
        return sum(packed.nbytes + ids.nbytes for packed, ids, _ in self.frames)


class VoxelVotes:
    """For every voxel the few objects that most frames saw there: constant memory per place, however long the scene.

    A frame gives one vote to each (voxel, object). A voxel has `slots` objects; when all are taken, a vote for another
    one takes a vote from the weakest and replaces it at zero. It counts frames without any object besides.
    """

    def __init__(self, voxel: float = 0.02, slots: int = 4):
        if not voxel > 0 or slots < 1:
            raise ValueError(f"voxel {voxel} m, {slots} slots: expected more than 0 and at least 1")
        self.voxel, self.slots = voxel, slots
        self.keys = np.zeros(0, np.int64)  # (V,) ascending
        self.ids = np.zeros((0, slots), np.int64)  # (V, slots), meaningless where votes are 0
        self.votes = np.zeros((0, slots), np.int32)
        self.empty = np.zeros(0, np.int32)  # (V,) frames in which no mask lay there

    def keys_of(self, points: np.ndarray) -> np.ndarray:
        """Points (P, 3) -> (P,) int64, ascending in x, y, z. ValueError beyond +-65,536 voxels or for nan."""
        return cell_keys(np.asarray(points, np.float64), self.voxel)

    def add(self, masks: np.ndarray, ids: np.ndarray, points: np.ndarray | None) -> None:
        """Masks (n, P) bool of one frame, their objects (n,) int64 and the points (P, 3)."""
        if points is None:
            raise ValueError("voxel memory: expected the points of the frame")
        keys, cell = np.unique(self.keys_of(points), return_inverse=True)  # (U,), (P,)
        self.grow(keys)
        rows, seen = np.searchsorted(self.keys, keys), np.zeros(len(keys), bool)
        covered = np.zeros((len(ids), len(keys)), bool)
        for own, mask in zip(covered, masks, strict=True):
            own[cell[mask]] = True
        for i in np.unique(ids):
            own = np.logical_or.reduce(covered[ids == i])
            seen |= own
            self.vote(rows[own], i)
        self.empty[rows[~seen]] += 1

    def grow(self, keys: np.ndarray) -> None:
        """Room for the voxels (U,) that are new, ascending."""
        where = np.searchsorted(self.keys, keys)
        new = np.append(self.keys, -1)[where] != keys
        if new.any():
            where = where[new]
            self.keys = np.insert(self.keys, where, keys[new])
            self.ids, self.votes = (np.insert(x, where, 0, axis=0) for x in (self.ids, self.votes))
            self.empty = np.insert(self.empty, where, 0)

    def vote(self, rows: np.ndarray, i: int) -> None:
        """One vote for object i in the voxels of `rows`, which are distinct."""
        own = (self.ids[rows] == i) & (self.votes[rows] > 0)  # (R, slots)
        known = own.any(1)
        self.votes[rows[known], own[known].argmax(1)] += 1
        rest = rows[~known]
        slot = self.votes[rest].argmin(1)
        left = self.votes[rest, slot] - 1
        free = left <= 0
        self.votes[rest, slot] = np.where(free, 1, left)
        self.ids[rest[free], slot[free]] = i

    def winners(self) -> np.ndarray:
        """Object of every voxel (V,) int64; -1 where more frames saw none."""
        best = self.votes.argmax(1)
        rows = np.arange(len(best))
        votes = self.votes[rows, best]
        return np.where((votes > 0) & (votes >= self.empty), self.ids[rows, best], -1)

    def masks(self, ids: np.ndarray) -> np.ndarray:
        """(O, V) bool for objects (O,), disjoint."""
        return self.winners() == np.asarray(ids, np.int64)[:, None]

    def forget(self, ids: np.ndarray) -> None:
        """Take all votes from objects (U,)."""
        self.votes[np.isin(self.ids, ids)] = 0

    def points(self) -> np.ndarray:
        """Centres of the voxels (V, 3) float32."""
        cell = np.stack([(self.keys >> s) & (2**BITS - 1) for s in (2 * BITS, BITS, 0)], 1) - LIMIT
        return ((cell + 0.5) * self.voxel).astype(np.float32)

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.ids, self.votes, self.empty))


# ---- merging


class OnlineMerge:
    """The objects of one scene, frame by frame.

    mode online: merge vectors, boxes and labels decide (Hungarian); voted: labels need not agree; geometric: points
    nearer than 5 cm for over a tenth of either side, first come first served; concat: nothing is merged.
    memory: FrameMasks() keeps every mask, VoxelVotes() has constant memory per place. top: objects that `result` gives.
    max_objects: with more, those that cover the least of the scene are forgotten (None: never).
    """

    def __init__(
        self, mode: str = "online", top: int = 100, memory: FrameMasks | VoxelVotes | None = None,
        max_objects: int | None = None,
    ):  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"mode {mode}: expected one of {', '.join(MODES)}")
        if max_objects is not None and not isinstance(memory, VoxelVotes):
            raise ValueError("max_objects: objects are forgotten by their voxels; expected memory VoxelVotes()")
        self.mode, self.top, self.max_objects = mode, top, max_objects
        self.memory = FrameMasks() if memory is None else memory
        self.objects: Objects | None = None
        self.shapes: dict[int, Shape] = {}  # geometric: of each object
        self.next_id = 0

    def push(self, frame: FrameInstances) -> torch.Tensor:
        """Merge one frame; returns the object of each of its instances (n,) int64. A frame may have no instance."""
        self.check(frame)
        new = Objects(
            ids=torch.full_like(frame.labels, -1),
            counts=torch.ones_like(frame.labels),
            labels=frame.labels.clone(),
            **{name: getattr(frame, name).float().clone() for name in MEANS},
        )
        if self.objects is None:
            self.objects = new[:0]
        row = self.partners(frame)  # (n,) row among the objects, -1 new
        old, fresh = row >= 0, row < 0
        new.ids[old] = self.objects.ids[row[old]]
        new.ids[fresh] = self.next_id + torch.arange(int(fresh.sum()), device=row.device)
        self.next_id += int(fresh.sum())
        count = self.objects.counts[row[old]]
        for name in MEANS:
            mean, value = getattr(self.objects, name), getattr(new, name)[old]
            c = count if value.dim() == 1 else count[:, None]
            mean[row[old]] = (c * mean[row[old]] + value) / (c + 1)
        self.objects.counts[row[old]] += 1
        self.objects = self.objects.joined(new[fresh])
        self.remember(frame, new.ids)
        return new.ids

    def check(self, frame: FrameInstances) -> None:
        """ValueError when lengths differ, a value is not finite or points are needed and absent."""
        n = {f.name: len(getattr(frame, f.name)) for f in fields(frame) if f.name != "points"}
        if len(set(n.values())) > 1 or frame.masks.dim() != 2 or frame.masks.dtype != torch.bool:
            raise ValueError(f"sizes {n}, masks {tuple(frame.masks.shape)} {frame.masks.dtype}: expected n each, bool")
        for name in MEANS:
            if not torch.isfinite(getattr(frame, name)).all():
                raise ValueError(f"{name} of a frame: some are not finite; leave such instances out")
        if frame.points is None and (self.mode == "geometric" or isinstance(self.memory, VoxelVotes)):
            raise ValueError("points of a frame: geometric merging and voxel memory need them")
        if frame.points is not None and frame.points.shape != (frame.masks.shape[1], 3):
            raise ValueError(f"points {tuple(frame.points.shape)}: expected ({frame.masks.shape[1]}, 3) as the masks")

    def partners(self, frame: FrameInstances) -> torch.Tensor:
        """Row of the object that each instance belongs to (n,) int64, -1 where it is new."""
        row = torch.full_like(frame.labels, -1)
        if self.mode == "concat" or not len(self.objects) or not len(row):
            return row
        if self.mode == "geometric":
            return self.nearest_shapes(frame, row)
        similar = (self.objects.vectors @ frame.vectors.float().T) * box_iou3d(
            self.objects.boxes[:, None], frame.boxes.float()
        )
        agree = (self.objects.labels[:, None] == frame.labels) | (self.mode == "voted")
        similar = similar.clamp_min(0) * agree  # (O, n)
        i, j = (torch.as_tensor(x, device=row.device) for x in linear_sum_assignment(similar.cpu(), maximize=True))
        good = similar[i, j] > 0
        row[j[good]] = i[good]
        return row

    def nearest_shapes(self, frame: FrameInstances, row: torch.Tensor) -> torch.Tensor:
        """Each instance takes the first object of its label, not yet taken, whose points are near its own."""
        points, masks = frame.points.detach().cpu().numpy(), frame.masks.cpu().numpy()
        labels, own_labels = self.objects.labels.cpu().numpy(), frame.labels.tolist()
        shapes = [self.shapes[i] for i in self.objects.ids.tolist()]
        low, high = np.stack([x.box for x in shapes], 1) + np.array([[[-NEAR]], [[NEAR]]])  # (O, 3) each
        free = np.ones(len(shapes), bool)
        for k in np.flatnonzero(masks.any(1)).tolist():
            own = points[masks[k]]
            box = np.stack((own.min(0), own.max(0))).astype(np.float64)
            meet = free & (labels == own_labels[k]) & (low <= box[1]).all(1) & (high >= box[0]).all(1)
            found = next((i for i in np.flatnonzero(meet).tolist() if shapes[i].near(own, box)), None)
            if found is not None:
                row[k], free[found] = found, False
        return row

    def remember(self, frame: FrameInstances, ids: torch.Tensor) -> None:
        """Masks, and in mode geometric the points; forget the smallest objects when there are too many."""
        masks, own = frame.masks.cpu().numpy(), ids.cpu().numpy()
        points = None if frame.points is None else frame.points.detach().cpu().numpy()
        self.memory.add(masks, own, points)
        for mask, i in zip(masks, own.tolist(), strict=True) if self.mode == "geometric" else ():
            self.shapes.setdefault(i, Shape()).add(points[mask])
        if self.max_objects is None or len(self.objects) <= self.max_objects:
            return
        every = self.objects.ids.cpu().numpy()
        voxels = dict(zip(*np.unique(self.memory.ids[self.memory.votes > 0], return_counts=True), strict=True))
        size = np.array([voxels.get(i, 0) for i in every])
        keep = np.sort(np.argsort(-size, kind="stable")[: self.max_objects * 3 // 4])  # room, so that this is rare
        gone = np.delete(every, keep)
        self.memory.forget(gone)
        self.objects = self.objects[torch.as_tensor(keep, device=ids.device)]
        for i in gone.tolist() if self.shapes else ():
            del self.shapes[i]

    def result(self) -> SceneInstances:
        """The `top` objects by score, best first, or all in the order of their appearance when there are fewer. With
        voxels, objects that own none are left out. ValueError before the first frame."""
        if self.objects is None:
            raise ValueError("no frame was pushed yet")
        objects = self.objects
        if isinstance(self.memory, VoxelVotes):
            alive = np.isin(objects.ids.cpu().numpy(), self.memory.winners())
            objects = objects[torch.as_tensor(alive, device=objects.ids.device)]
        rows = torch.arange(len(objects), device=objects.ids.device)
        if len(objects) > self.top:
            rows = objects.scores.topk(self.top).indices
        return SceneInstances(objects[rows], self.memory.masks(objects.ids[rows].cpu().numpy()), self.memory.points())

    def nbytes(self) -> int:
        """Bytes of objects and masks."""
        tables = [] if self.objects is None else [getattr(self.objects, f.name) for f in fields(self.objects)]
        shapes = [x for shape in self.shapes.values() for x in (shape.keys, shape.points, shape.box)]
        return sum(x.nbytes for x in (*tables, *shapes)) + self.memory.nbytes()


# ---- to a reconstruction


def to_vertices(
    masks: np.ndarray, points: np.ndarray, vertices: np.ndarray, semantic: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """Masks (O, M) bool and classes (M,) int64 of points (M, 3) -> (O, Q) and (Q,) of vertices (Q, 3), by the nearest.

    segments (Q,) int64: each segment then takes the class of most of its vertices, the lowest when tied, and an object
    has it all or not, as it covers more than half of it or not.
    """
    if not len(points):
        raise ValueError("no points: expected those of at least one frame")
    at = cKDTree(points).query(vertices)[1]
    masks = masks[:, at]
    semantic = None if semantic is None else semantic[at]
    if segments is None:
        return masks, semantic
    segment = np.unique(segments, return_inverse=True)[1]
    size = np.bincount(segment)
    own = [(2 * np.bincount(segment[m], minlength=len(size)) > size)[segment] for m in masks]
    masks = np.stack(own) if own else masks
    if semantic is not None:
        kinds, kind = np.unique(semantic, return_inverse=True)
        votes = np.bincount(segment * len(kinds) + kind, minlength=len(size) * len(kinds))
        semantic = kinds[votes.reshape(len(size), len(kinds)).argmax(1)][segment]
    return masks, semantic
