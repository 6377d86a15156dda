"""Average precision of instances in images (COCO) and videos (YouTube-VIS), with pycocotools' own matching and curves.

For videos the IoU of two tubes is the sum of common pixels over the sum of united pixels of all frames; a frame without
a mask (null) counts the other's area. Reference: facebookresearch/Mask2Former@9b0651c ytvis_api/ytvoseval.py.
Scores are those of pycocotools: -1 where the labels hold nothing to find.
"""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.masks import rle_area, rle_box, rle_intersections, to_rle

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
VIDEO_AREAS = [[0, 1e10], [0, 128**2], [128**2, 256**2], [256**2, 1e10]]  # px: all, small, medium, large


class TubeIndex(COCO):
    """COCO's index over annotations whose segmentation is a list of codes or None, one a frame."""

    def annToRLE(self, ann: dict) -> list:
        return ann["segmentation"]


class TubeEval(COCOeval):
    """COCOeval with the IoU of tubes in place of that of masks."""

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray | list:
        gt, dt = self._gts[imgId, catId], self._dts[imgId, catId]
        best = np.argsort([-d["score"] for d in dt], kind="mergesort")[: self.params.maxDets[-1]]
        return tube_iou([dt[i]["segmentation"] for i in best], [g["segmentation"] for g in gt])


def tube_iou(a: list[list], b: list[list]) -> np.ndarray:
    """IoU of every pair of tubes, (N, M): each a list of T codes or None. Two tubes without a pixel have 0."""
    inter, area_a, area_b = np.zeros((len(a), len(b))), np.zeros((len(a), 1)), np.zeros((1, len(b)))
    for frame_a, frame_b in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True) if a and b else ():
        rows, cols = ([i for i, code in enumerate(f) if code is not None] for f in (frame_a, frame_b))
        codes_a, codes_b = [frame_a[i] for i in rows], [frame_b[j] for j in cols]
        inter[np.ix_(rows, cols)] += rle_intersections(codes_a, codes_b)
        area_a[rows, 0] += rle_area(codes_a)
        area_b[0, cols] += rle_area(codes_b)
    return inter / np.maximum(area_a + area_b - inter, 1)


def index_of(kind: type[COCO], images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    """An index in memory. Annotations are numbered from 1: pycocotools takes id 0 for 'unmatched'."""
    index = kind()
    numbered = [{**a, "id": k} for k, a in enumerate(annotations, 1)]
    index.dataset = {"images": images, "categories": categories, "annotations": numbered}
    index.createIndex()
    return index


def summary(evaluation: COCOeval) -> dict:
    """Run an evaluation: {12 scores by NAMES, "per_category": {id: AP}}."""
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    result = dict(zip(NAMES, map(float, evaluation.stats), strict=True))
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, K), all areas, most detections
    known = {c: precision[:, :, k] for k, c in enumerate(evaluation.params.catIds)}
    per_category = {int(c): float(p[p > -1].mean()) if (p > -1).any() else -1.0 for c, p in known.items()}
    return {**result, "per_category": per_category}


def coco_ap(labels: dict, predictions: list[dict], kind: str = "segm") -> dict:
    """AP of COCO results [{image_id, category_id, score, segmentation (code) and/or bbox (xywh px)}] on COCO labels.

    kind "segm" or "bbox"; a bbox that is not given is that of the mask. Sizes are judged by the box for "bbox" and, as
    in pycocotools, also for "segm" where predictions bring a box. Returns what `summary` does. Inputs are not changed.
    """
    boxed = bool(predictions) and bool(predictions[0].get("bbox"))
    sizes = {x["id"]: (x["height"], x["width"]) for x in labels["images"]}
    detections = []
    for d in predictions:
        own = {**d, "iscrowd": 0}
        if "segmentation" in d:
            own["segmentation"] = to_rle(d["segmentation"], *sizes[d["image_id"]])
        if not boxed:
            own["bbox"], own["area"] = rle_box(own["segmentation"]), rle_area(own["segmentation"])
        else:
            own["area"] = own["bbox"][2] * own["bbox"][3]
        detections.append(own)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        sides = [index_of(COCO, labels["images"], labels["categories"], a) for a in (labels["annotations"], detections)]
        return summary(COCOeval(*sides, kind))


def ytvis_ap(labels: dict, predictions: list[dict]) -> dict:
    """AP of YouTube-VIS results [{video_id, category_id, score, segmentations: [code | None] * length}] on its labels.

    Sizes are judged by the mean area of the frames with a mask. Returns what `summary` does. Inputs are not changed.
    """
    sizes = {v["id"]: (v["height"], v["width"]) for v in labels["videos"]}
    sides = [], []
    for side, items in zip(sides, (labels["annotations"], predictions), strict=True):
        for x in items:
            height, width = sizes[x["video_id"]]
            tube = [None if s is None else to_rle(s, height, width) for s in x["segmentations"]]
            pixels = x["areas"] if side is sides[0] else [rle_area(s) for s in tube if s is not None]
            seen = [n for n in pixels if n]
            own = {"image_id": x["video_id"], "category_id": x["category_id"], "segmentation": tube}
            own |= {"area": float(np.mean(seen)) if seen else 0.0, "iscrowd": x.get("iscrowd", 0)}
            side.append(own | ({} if side is sides[0] else {"score": x["score"]}))
    with contextlib.redirect_stdout(io.StringIO()):
        videos = [{"id": v["id"]} for v in labels["videos"]]
        evaluation = TubeEval(*(index_of(TubeIndex, videos, labels["categories"], side) for side in sides), "segm")
        evaluation.params.areaRng = VIDEO_AREAS
        return summary(evaluation)
