"""Scores of a network on single views or on whole clips, merged online as a stream would be: AP, mIoU, coverage.

Shapes: M points of all frames of a scene, O predicted objects, C semantic classes, the first n_stuff of them stuff.
Rules of the scores: utils/scannet_metrics.py, utils/scannet_coverage.py. Labels are opened here, after prediction.
"""

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from models.scene_segmenter import Filters, SceneResult, SceneSegmenter
from utils import overlay
from utils.posed_views import View, ViewLabels
from utils.scannet_coverage import coverage, disjoint, scene_coverage
from utils.scannet_metrics import (
    MIN_VERTICES,
    PER_ID,
    agnostic_labels,
    confusion,
    instance_ap,
    mean_of,
    scene_overlaps,
    semantic_iou,
)
from utils.scene_pictures import Cloud, axes_of, view_pictures

LEAST = tuple(n for n in range(10, MIN_VERTICES + 1) if MIN_VERTICES % n == 0)  # what least may be
KINDS = ("classes", "agnostic")
SURE = 0.3  # score from which a prediction is drawn


class SceneScores:
    """Collects scenes, then scores them: with classes, and with all things as one class.

    least: points below which labelled instances are ignored and predictions dropped. ScanNet's 100 are meant for scans
    and frames of 20,000 points; every point counts 100 / least times, which changes no overlap.
    """

    def __init__(self, n_classes: int, n_stuff: int = 2, least: int = MIN_VERTICES):
        if least not in LEAST:
            raise ValueError(f"least {least}: expected one of {LEAST}")
        self.C, self.n_stuff, self.times = n_classes, n_stuff, MIN_VERTICES // least
        self.things = list(range(n_stuff, n_classes))
        self.overlaps: dict[str, list] = {kind: [] for kind in KINDS}
        self.covered: dict[str, list] = {kind: [] for kind in KINDS}
        self.counts = np.zeros((n_classes, n_classes + 1), np.int64)

    def add(self, found: SceneResult, labels: list[ViewLabels]) -> None:
        """found: of all points of all frames, in their order, as SceneSegmenter gives it with voxel None. ValueError
        when the labels are of other points."""
        instance, semantic = (
            torch.cat([getattr(x, k) for x in labels]).cpu().numpy() for k in ("instance", "semantic")
        )
        if len(instance) != len(found.points):
            raise ValueError(f"{len(instance)} labels, {len(found.points)} predicted points: expected the same points")
        if instance.max(initial=0) + 1 >= PER_ID:
            raise ValueError(f"{instance.max() + 1} objects in one scene: expected fewer than {PER_ID - 1}")
        own = np.append(labels[0].classes.cpu().numpy(), 0)[instance]  # class of each point's object
        truth = np.where(instance >= 0, PER_ID * own + instance + 1, 0).repeat(self.times)
        masks = found.masks.repeat(self.times, axis=1)
        kinds, scores = found.objects.labels.cpu().numpy() + self.n_stuff, found.objects.scores.cpu().numpy()
        self.counts += confusion(semantic, found.semantic, range(self.C))
        one = agnostic_labels(truth, self.things)
        for kind, gt, ids, classes in (
            ("classes", truth, self.things, kinds),
            ("agnostic", one, [1], np.ones_like(kinds)),
        ):
            self.overlaps[kind].append(scene_overlaps(gt, masks, classes, scores, ids))
            where, mine = disjoint(masks, classes - ids[0], scores)
            true = np.where(gt > 0, gt // PER_ID - ids[0], -1)
            self.covered[kind].append(scene_coverage(true, np.where(gt > 0, gt % PER_ID, -1), where, mine, len(ids)))

    def score(self) -> dict[str, dict[str, float]]:
        """For each of KINDS AP, AP50, AP25, mCov, mWCov, mPrec, mRec, and mIoU and mAcc of the points; 0..1, or nan."""
        pixels = semantic_iou(self.counts)
        same = {"mIoU": mean_of(pixels["iou"]), "mAcc": mean_of(pixels["accuracy"])}
        out = {}
        for kind, ids in (("classes", self.things), ("agnostic", [1])):
            ap, cover = instance_ap(self.overlaps[kind], ids), coverage(self.covered[kind])
            out[kind] = same | {k: ap[k] for k in ("AP", "AP50", "AP25")}
            out[kind] |= {k: cover[k] for k in ("mCov", "mWCov", "mPrec", "mRec")}
        return out


def evaluate(
    model,
    items: Iterable[tuple[list[View], list[ViewLabels]]],
    least: int = MIN_VERTICES,
    filters: Filters | None = None,
    merge: str | None = None,
    dtype: torch.dtype = torch.float32,
    shown: Callable[[int, list[View], list[ViewLabels], SceneResult], None] | None = None,
) -> tuple[dict[str, dict[str, float]], int, float]:
    """The network, put into eval mode, on single views (a list of one) or clips -> scores of both KINDS, the number of
    scenes, and seconds per frame without reading the data.

    filters: as released for the network's stage, but with `least` points and more. merge: how frames become a scene, as
    SceneSegmenter has it. shown: called with (number, views, labels, result) of every scene. A network that knows one
    class of things has no scores with classes: they are left out.
    """
    cfg, device = model.cfg, next(model.parameters()).device
    base = Filters.of(cfg.stage, cfg.agnostic)
    filters = filters or Filters(base.topk, base.score_threshold, least - 1, agnostic=cfg.agnostic)
    scene = SceneSegmenter(model.eval(), merge, filters, voxel=None, top=100, dtype=dtype)
    scores, n, frames, seconds = SceneScores(len(cfg.classes), cfg.n_stuff, least), 0, 0, 0.0
    for views, labels in items:
        views = [view.to(device) for view in views]
        began = time.perf_counter()
        scene.new_scene()
        for view in views:
            scene.push(view)
        result = scene.result(least=least)
        seconds += time.perf_counter() - began
        scores.add(result, labels)
        if shown is not None:
            shown(n, views, labels, result)
        n, frames = n + 1, frames + len(views)
    values = scores.score()
    return {k: v for k, v in values.items() if k == "agnostic" or not cfg.agnostic}, n, seconds / max(1, frames)


def compare_picture(views: list[View], labels: list[ViewLabels], found: SceneResult, height: int = 240) -> np.ndarray:
    """The cloud as seen, its labelled and its predicted things side by side, aslant: (height, W, 3) uint8. Predictions
    are those of score SURE or more; one has the colour of the labelled thing that it shares most with, one of its own
    if that is taken."""
    truth = torch.cat([x.instance for x in labels]).cpu().numpy()
    colour = torch.cat([v.colour for v in views]).cpu().numpy()
    ids, said, taken = found.point_ids(), np.full(len(truth), -1), set()
    sure = int((found.objects.scores >= SURE).sum())
    for k in range(sure):  # the best score first
        inside = truth[ids == k]
        votes = np.bincount(inside[inside >= 0], minlength=1)
        own = int(votes.argmax()) if votes.any() else -1
        own = own if own >= 0 and own not in taken else truth.max(initial=0) + 1 + k
        taken.add(own)
        said[ids == k] = own
    poses = [v.pose for v in views if v.pose is not None]
    eyes = torch.stack([p[:3, 3] for p in poses]).cpu().numpy() if poses else found.points.mean(0)[None] + (0, 0, 2)
    way = eyes.mean(0) - np.median(found.points, axis=0)
    axes, size = axes_of(np.degrees(np.arctan2(way[1], way[0])), 40.0), (height, round(1.25 * height))
    tiles = []
    for i in (truth, said):
        cloud = Cloud(found.points, colour, i, eyes)
        tiles += view_pictures(cloud, axes, size)[0]
    return overlay.grid([tiles[0], tiles[1], tiles[3]], 3, ["points", "labelled", f"{sure} predicted"])
