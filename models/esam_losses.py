"""Targets, matching and losses of ESAM: of one frame's instances and semantics, and of merge vectors through a clip.

An object is answered for by the cheapest of the queries whose superpoint lies in it, so that matching needs no
assignment problem and runs on the device without waiting. Everything is computed in float32, whatever autocast says.

Shapes: B items, T frames, Q queries, S superpoints, N points, G objects, K classes of things, C semantic classes, D
width of merge vectors. Source: Xu et al., "EmbodiedSAM: Online Segment Any 3D Thing in Real Time", ICLR 2025, sec. 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.boxes3d import box_iou3d, corners
from models.mask_losses import bce_loss, class_loss, dice_loss
from models.matching import bce_cost, class_cost, dice_cost
from models.superpoint_decoder import Stage
from utils.posed_views import View, ViewLabels

INADMISSIBLE = 1e8  # cost of a query whose superpoint is not in the object
NO_OBJECT = 0.1  # weight of the class "no object"
WEIGHTS = {"class": 0.5, "mask": 1.0, "dice": 1.0, "box": 0.5, "semantic": 0.5, "merge": 2.0}
DICE = 4.0  # the authors' factor beside the weight
DICE_SCALES = ("upstream", "unit")
TEMPERATURE = 0.07

# ---- targets


@dataclass
class FrameTargets:
    """What one item's queries should answer. labels (G,) int64 in 0..K-1; superpoints (G, S), points (G, N), queries
    (G, Q) bool: what of each lies in an object; boxes (G, 6) float32 middle and size, m; semantic (Q,) int64, C:
    unlabelled."""

    labels: torch.Tensor
    superpoints: torch.Tensor
    points: torch.Tensor
    queries: torch.Tensor
    boxes: torch.Tensor
    semantic: torch.Tensor


@torch.no_grad()
def majority(superpoint: torch.Tensor, ids: torch.Tensor, count: int, none: int) -> torch.Tensor:
    """superpoint (N,) in 0..S-1, ids (N,) int64 in -1..count-1 -> (S,) int64: the id that more than half of a
    superpoint's points have, or `none`, also where it is -1."""
    S, width = int(superpoint.amax()) + 1, count + 1
    points = superpoint.new_zeros(S * width).scatter_add_(0, superpoint * width + ids + 1, torch.ones_like(ids))
    points = points.view(S, width)
    most, best = points[:, 1:].max(1) if count else (points.new_zeros(S), points.new_zeros(S))
    return torch.where(2 * most > points.sum(1), best, none)


def query_instances(view: View, labels: ViewLabels) -> torch.Tensor:
    """(Q,) int64: object that has more than half of the points of each query's superpoint; -1 none."""
    instance = majority(view.superpoint, labels.instance, len(labels.classes), -1)
    return instance if view.queries is None else instance[view.queries]


@torch.no_grad()
def frame_targets(
    view: View, labels: ViewLabels, n_classes: int, n_stuff: int = 2, agnostic: bool = False
) -> FrameTargets:
    """Targets of one view; its G objects are those of the scene in which a query's superpoint lies. n_classes: C, of
    which the first n_stuff are stuff; agnostic: all things have label 0."""
    everything = torch.arange(len(labels.classes), device=labels.classes.device)
    instance = majority(view.superpoint, labels.instance, len(everything), -1)  # (S,)
    semantic = majority(view.superpoint, labels.semantic, n_classes + 1, n_classes)
    asking = instance if view.queries is None else instance[view.queries]  # (Q,)
    objects = everything[(asking == everything[:, None]).any(1)]  # (G,)
    classes, (low, high) = labels.classes[objects] - n_stuff, labels.boxes[objects].float().split(3, 1)
    return FrameTargets(
        labels=torch.zeros_like(classes) if agnostic else classes,
        superpoints=instance == objects[:, None],
        points=labels.instance == objects[:, None],
        queries=asking == objects[:, None],
        boxes=torch.cat([(low + high) / 2, high - low], 1),
        semantic=semantic if view.queries is None else semantic[view.queries],
    )


# ---- matching


@torch.no_grad()
def match_objects(
    cls: torch.Tensor, masks: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, admissible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which query answers for each object: (G,) int64, and bool (G,) whether one does.

    cls (Q, K + 1), masks (Q, P) logits; labels (G,), targets (G, P), admissible (G, Q) bool. An object takes its
    cheapest admissible query, none where two are equally cheap (as the authors do). Cost: class / 2 + BCE + dice.
    """
    cost = 0.5 * class_cost(cls, labels) + bce_cost(masks, targets) + dice_cost(masks, targets)  # (Q, G)
    cost = torch.where(admissible.T, cost, INADMISSIBLE)
    nobody = cost.new_full((1, cost.shape[1]), INADMISSIBLE)  # so that there are two to compare, also of one query
    cheapest, query = torch.cat([cost, nobody]).topk(2, dim=0, largest=False)  # (2, G)
    found = (cheapest[0] < cheapest[1]) & (cheapest[0] < INADMISSIBLE)
    return torch.where(found, query[0], 0), found


# ---- losses of one frame


class ESAMCriterion:
    """Losses of one frame of B items. dice_scale "upstream": dice counts 4 times at the last stage and 4 / B times at
    the others, as the authors do; "unit": once at all stages. The rest is for `targets`, see frame_targets.
    """

    def __init__(self, n_classes: int, n_stuff: int = 2, agnostic: bool = False, dice_scale: str = "upstream"):
        if dice_scale not in DICE_SCALES:
            raise ValueError(f"dice_scale {dice_scale!r}: expected one of {DICE_SCALES}")
        self.n_classes, self.n_stuff, self.agnostic, self.dice_scale = n_classes, n_stuff, agnostic, dice_scale

    def targets(self, view: View, labels: ViewLabels) -> FrameTargets:
        return frame_targets(view, labels, self.n_classes, self.n_stuff, self.agnostic)

    def __call__(self, out, targets: Sequence[FrameTargets]) -> dict[str, torch.Tensor]:
        """Weighted losses, stages summed, means over items: class, mask, dice, box (where the network has boxes) and
        semantic; instance: the sum of all but the last; loss: of all. An item without a match adds 0 to mask, dice and
        box. Scalars, float32. out: stages, sem and centres of models/esam.py's FrameOutput."""
        with torch.autocast(out.sem[0].device.type, enabled=False):
            parts = {}
            for i, stage in enumerate(out.stages):
                last = i == len(out.stages) - 1
                for name, loss in self.stage_losses(stage, out.centres, targets, last).items():
                    parts[name] = parts.get(name, 0) + WEIGHTS[name] * loss
            parts["instance"] = sum(parts.values())
            sem = [semantic_loss(s, t.semantic) for s, t in zip(out.sem, targets, strict=True)]
            parts["semantic"] = WEIGHTS["semantic"] * torch.stack(sem).mean()
            return {**parts, "loss": parts["instance"] + parts["semantic"]}

    def stage_losses(
        self, stage: Stage, centres: list[torch.Tensor], targets: Sequence[FrameTargets], last: bool
    ) -> dict[str, torch.Tensor]:
        found = {"class": [], "mask": [], "dice": []} | ({} if stage.boxes is None else {"box": []})
        for b, t in enumerate(targets):
            wanted = t.points if stage.level == "P" else t.superpoints
            cls, masks = stage.cls[b], stage.masks[b]
            query, matched = match_objects(cls, masks, t.labels, wanted, t.queries)
            classes = query_labels(query, matched, t.labels, len(cls), cls.shape[1] - 1)
            found["class"].append(class_loss(cls, classes, NO_OBJECT))
            ours = masks[query]
            found["mask"].append(matched_mean(bce_loss(ours, wanted), matched))
            found["dice"].append(matched_mean(dice_loss(ours, wanted), matched))
            if stage.boxes is not None:
                offset, size = stage.boxes[b][query].float().split(3, 1)
                box = torch.cat([centres[b][query].float() + offset, size], 1)
                found["box"].append(matched_mean(1 - box_iou3d(corners(box), corners(t.boxes)), matched))
        losses = {name: torch.stack(values).mean() for name, values in found.items()}
        if self.dice_scale == "upstream":
            losses["dice"] = losses["dice"] * (DICE if last else DICE / len(targets))
        return losses


def query_labels(query: torch.Tensor, matched: torch.Tensor, labels: torch.Tensor, Q: int, none: int) -> torch.Tensor:
    """query, matched, labels (G,) -> labels of queries (Q,): that of the object a query answers for, else `none`."""
    wanted = labels.new_full((Q + 1,), none)  # the last place is for objects without a query
    wanted[torch.where(matched, query, Q)] = labels
    return wanted[:Q]


def matched_mean(losses: torch.Tensor, matched: torch.Tensor) -> torch.Tensor:
    """Mean of losses (G,) where matched; 0 with a gradient of 0 where nothing is."""
    return torch.where(matched, losses, 0.0).sum() / matched.sum().clamp(min=1)


def semantic_loss(sem: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of sem (Q, C + 1), its last column unused, over labelled queries; 0 if there is none."""
    C = sem.shape[1] - 1
    loss = F.cross_entropy(sem[:, :C].float(), classes, ignore_index=C, reduction="sum")
    return loss / (classes < C).sum().clamp(min=1)


# ---- losses of a clip


def merge_loss(
    vectors: Sequence[Sequence[torch.Tensor]],
    instances: Sequence[Sequence[torch.Tensor]],
    n_objects: Sequence[int],
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """An object's mean vector in a frame should find its own in the next frame, and back, among all objects there.

    vectors[t][b] (Q, D) unit vectors, instances[t][b] (Q,) int64, -1 none; n_objects: G of each item. Cross-entropy of
    cosine / temperature over objects that both frames hold; means over objects, summed over the 2 (T - 1) ordered pairs
    of neighbouring frames, mean over items, times 2. 0 where no two frames share an object.
    """
    losses = []
    with torch.autocast(vectors[0][0].device.type, enabled=False):
        for b, G in enumerate(n_objects):
            frames = [object_centres(v[b], i[b], G) for v, i in zip(vectors, instances, strict=True)]
            centres, seen = (torch.stack(x) for x in zip(*frames, strict=True))  # (T, G, D), (T, G)
            both = seen[1:] & seen[:-1]  # (T - 1, G)
            logits = centres[:-1] @ centres[1:].mT / temperature  # (T - 1, G, G)
            there = own_loss(logits, seen[1:], both) + own_loss(logits.mT, seen[:-1], both)
            losses.append(there / len(n_objects))
    return WEIGHTS["merge"] * torch.stack(losses).sum()


def object_centres(vectors: torch.Tensor, instance: torch.Tensor, G: int) -> tuple[torch.Tensor, torch.Tensor]:
    """vectors (Q, D), instance (Q,) -> mean vector of each object (G, D), 0 where it has none; whether it has one."""
    member = (instance == torch.arange(G, device=instance.device)[:, None]).float()  # (G, Q)
    count = member.sum(1)
    return member @ vectors.float() / count.clamp(min=1)[:, None], count > 0


def own_loss(logits: torch.Tensor, there: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """logits (T - 1, G, G); bool (T - 1, G): there, objects that the frame of the columns holds, and both, that the
    frame of the rows holds too -> mean over rows `both` of minus log-softmax of the diagonal among columns `there`,
    summed over pairs of frames."""
    log = logits.masked_fill(~there[:, None], torch.finfo(logits.dtype).min).log_softmax(-1)
    own = torch.where(both, -log.diagonal(dim1=1, dim2=2), 0.0)
    return (own.sum(1) / both.sum(1).clamp(min=1)).sum()


def clip_loss(
    outputs: Sequence,
    clips: Sequence[Sequence[View]],
    labels: Sequence[Sequence[ViewLabels]],
    criterion: ESAMCriterion,
) -> dict[str, torch.Tensor]:
    """The loss of single views (T = 1) and of clips: sums over the T frames of the criterion's losses, and `merge` where
    the network has merge vectors and T > 1.

    outputs: T of models/esam.py's FrameOutput, B items each; clips, labels: B lists of T, as for its forward. All views
    of a clip number objects alike. "loss" has the gradient, the other parts are detached.
    """
    total, instances = {}, []
    for t, out in enumerate(outputs):
        items = [(clip[t], own[t]) for clip, own in zip(clips, labels, strict=True)]
        for name, value in criterion(out, [criterion.targets(*item) for item in items]).items():
            total[name] = total.get(name, 0) + value
        instances.append([query_instances(*item) for item in items])
    if len(outputs) > 1 and outputs[0].vectors is not None:
        n_objects = [len(own[0].classes) for own in labels]
        total["merge"] = merge_loss([out.vectors for out in outputs], instances, n_objects)
        total["loss"] = total["loss"] + total["merge"]
    return {name: value if name == "loss" else value.detach() for name, value in total.items()}
