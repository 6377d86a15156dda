"""Scores of tracked objects: HOTA and concept-gated F1 (cgF1).

HOTA: Luiten et al., IJCV 2021, as TrackEval and facebookresearch/sam3@99d02f2 sam3/eval/saco_veval_evaluators.py
compute it. cgF1: SAM 3 paper, section "metrics", and sam3/eval/cgf1_eval.py there. A concept is one prompt in one
video; scores are made for each concept and then combined.

A track is a list over the T frames of its video: a code of utils/masks.py (kind "mask"), a box x, y, width, height in
px (kind "box"), or None where the object is absent.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from utils.instance_ap import tube_iou
from utils.masks import rle_area, rle_intersections

ALPHAS = np.arange(0.05, 0.99, 0.05)  # (19,) similarities from which a match counts, HOTA
IOUS = np.linspace(0.5, 0.95, 10)  # COCO's, cgF1
SLACK = np.finfo(float).eps
FIGURES = ("HOTA", "DetA", "AssA", "DetRe", "DetPr", "AssRe", "AssPr", "LocA", "OWTA")


@dataclass
class ObjectTrack:
    """One object through a video."""

    masks: list  # T codes or None
    boxes: list  # T boxes x, y, width, height px, or None
    score: float = 1.0

    def of(self, kind: str) -> list:
        return self.masks if kind == "mask" else self.boxes


@dataclass
class Concept:
    """One prompt in one video: what is there and what was found; both may be empty."""

    video: str
    prompt: str
    frames: int  # T
    size: tuple[int, int]  # H, W
    gt: list[ObjectTrack] = field(default_factory=list)
    pred: list[ObjectTrack] = field(default_factory=list)


# ---- similarity


def box_overlap(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Common and united area of every pair of boxes (..., N, 4) and (..., M, 4), x y width height px -> (..., N, M)."""
    low = np.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = np.minimum((a[..., :2] + a[..., 2:])[..., :, None, :], (b[..., :2] + b[..., 2:])[..., None, :, :])
    inter = np.maximum(high - low, 0).prod(-1)
    return inter, a[..., 2:].prod(-1)[..., :, None] + b[..., 2:].prod(-1)[..., None, :] - inter


def frame_iou(gt: list, pred: list, kind: str) -> np.ndarray:
    """IoU of every pair of one frame, (n, m); no entry is None. float64, of boxes float32 as in the official tool."""
    if not gt or not pred:
        return np.zeros((len(gt), len(pred)))
    if kind == "box":
        inter, union = box_overlap(np.array(gt, np.float32), np.array(pred, np.float32))
    else:
        inter = rle_intersections(gt, pred).astype(float)
        union = rle_area(gt)[:, None].astype(float) + rle_area(pred) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def track_iou(gt: list[list], pred: list[list], kind: str) -> np.ndarray:
    """IoU of every pair of tracks over all frames, (n, m): sums of common over sums of united pixels."""
    if kind == "mask":
        return tube_iou(gt, pred)
    if not gt or not pred:
        return np.zeros((len(gt), len(pred)))
    a, b = (np.array([[box or (0, 0, 0, 0) for box in t] for t in side], float).swapaxes(0, 1) for side in (gt, pred))
    inter, union = (x.sum(0).astype(np.float32) for x in box_overlap(a, b))  # (T, n, m) -> (n, m)
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


# ---- HOTA


def hota(gt: list[list], pred: list[list], kind: str) -> dict[str, np.ndarray]:
    """Counts of one concept, each (19,) by alpha: TP, FN, FP, and AssA, AssRe, AssPr, LocA of its matches."""
    frames = []  # (tracks of gt, tracks of pred, IoU of every pair) of each frame
    for t in range(frames_of(gt, pred)):
        g, p = ([i for i, track in enumerate(side) if track[t] is not None] for side in (gt, pred))
        iou = frame_iou([gt[i][t] for i in g], [pred[j][t] for j in p], kind)
        frames.append((np.array(g, int), np.array(p, int), iou))
    length_gt, length_pred = np.zeros(len(gt)), np.zeros(len(pred))  # frames of each track
    shared = np.zeros((len(gt), len(pred)))  # what two tracks could have in common
    for g, p, iou in frames:
        length_gt[g] += 1
        length_pred[p] += 1
        rivals = iou.sum(0) + iou.sum(1)[:, None] - iou
        shared[np.ix_(g, p)] += np.divide(iou, rivals, out=np.zeros_like(iou), where=rivals > SLACK)
    alignment = shared / np.maximum(length_gt[:, None] + length_pred - shared, SLACK)
    TP, FN, FP, near = np.zeros((4, len(ALPHAS)))
    matches = np.zeros((len(ALPHAS), len(gt), len(pred)))
    for g, p, iou in frames:
        i, j = linear_sum_assignment(-alignment[np.ix_(g, p)] * iou)
        found = iou[i, j]  # (matches of the frame,)
        good = found >= (ALPHAS - SLACK).astype(found.dtype)[:, None]  # (19, matches)
        n = good.sum(1)
        TP, FN, FP = TP + n, FN + len(g) - n, FP + len(p) - n
        near += (good * found.astype(float)).sum(1)
        matches[:, g[i], p[j]] += good
    return association(matches, length_gt, length_pred, TP) | {"TP": TP, "FN": FN, "FP": FP, "LocA": ratio(near, TP)}


def frames_of(*sides: list[list]) -> int:
    """T of the tracks; ValueError when they differ."""
    lengths = {len(t) for side in sides for t in side}
    if len(lengths) > 1:
        raise ValueError(f"tracks have {sorted(lengths)} frames; expected one length")
    return max(lengths, default=0)


def association(matches: np.ndarray, length_gt: np.ndarray, length_pred: np.ndarray, TP: np.ndarray) -> dict:
    """AssA, AssRe and AssPr, (19,) each, from matches (19, n, m) and the frames of each track."""
    either = length_gt[:, None] + length_pred - matches
    pairs = {"AssA": either, "AssRe": length_gt[:, None], "AssPr": length_pred}
    return {k: (matches * matches / np.maximum(1, n)).sum((1, 2)) / np.maximum(1, TP) for k, n in pairs.items()}


def ratio(near: np.ndarray, TP: np.ndarray) -> np.ndarray:
    """Mean similarity of matches; 1 where there is none, as in TrackEval."""
    return np.maximum(1e-10, near) / np.maximum(1e-10, TP)


def combine(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Counts of several concepts as those of one: detections are summed, association is weighted by TP."""
    total = {k: sum(x[k] for x in parts) for k in ("TP", "FN", "FP")}
    weighted = {k: sum(x[k] * x["TP"] for x in parts) for k in ("AssA", "AssRe", "AssPr", "LocA")}
    TP = total["TP"]
    mean = {k: weighted[k] / np.maximum(1, TP) for k in ("AssA", "AssRe", "AssPr")}
    return total | mean | {"LocA": ratio(weighted["LocA"], TP)}


def hota_figures(counts: dict[str, np.ndarray]) -> dict[str, float]:
    """The nine figures, means over alpha, of what `hota` or `combine` returned."""
    TP, FN, FP = counts["TP"], counts["FN"], counts["FP"]
    DetA, DetRe, DetPr = (TP / np.maximum(1, n) for n in (TP + FN + FP, TP + FN, TP + FP))
    rows = counts | {"DetA": DetA, "DetRe": DetRe, "DetPr": DetPr}
    rows |= {"HOTA": np.sqrt(DetA * counts["AssA"]), "OWTA": np.sqrt(DetRe * counts["AssA"])}
    return {k: float(np.mean(rows[k])) for k in FIGURES}


# ---- cgF1


def concept_counts(gt: list[list], pred: list[list], kind: str) -> dict:
    """Whole tracks matched by IoU (Hungarian): n_gt, n_pred and TP, FP, FN, (10,) each by IoU 0.5:0.05:0.95."""
    iou = track_iou(gt, pred, kind)  # (n, m)
    i, j = linear_sum_assignment(-iou)
    TP = (iou[i, j] >= IOUS.astype(iou.dtype)[:, None]).sum(1)
    return {"n_gt": len(gt), "n_pred": len(pred), "TP": TP, "FP": len(pred) - TP, "FN": len(gt) - TP}


def concept_f1(rows: list[dict], negatives: bool) -> dict[str, float | None]:
    """What the SA-Co evaluator reports of `concept_counts` of all concepts, each figure at IoU 50_95, 50 and 75.

    precision, recall, f1; positive_micro_f1 (without false tracks of absent concepts), pmf1 (mean over concepts that
    are there and were answered), pmf1_w0dt (over all that are there); ilmcc, Matthews' correlation of "is there" and
    "was answered"; cgf1, cgf1_w0dt and cgf1_micro, the product with it. negatives: the labels also name concepts that
    are absent; otherwise ilmcc means nothing and it and the products are None. The small constants are the tool's.
    """
    there = [x for x in rows if x["n_gt"]]
    TP, FP, FN = (sum(x[k] for x in rows) if rows else np.zeros(len(IOUS)) for k in ("TP", "FP", "FN"))
    own_FP = sum((x["FP"] for x in there), np.zeros(len(IOUS)))
    recall = TP / (TP + FN + 1e-4)
    precision, own_precision = TP / (TP + FP + 1e-4), TP / (TP + own_FP + 1e-4)
    alone = [f1(x["TP"] / (x["TP"] + x["FP"] + 1e-4), x["TP"] / (x["TP"] + x["FN"] + 1e-4)) for x in there]
    total, answered = sum(alone, np.zeros(len(IOUS))), sum(x["n_pred"] > 0 for x in there)
    tp, fn = answered, len(there) - answered
    fp = sum(x["n_pred"] > 0 for x in rows) - tp
    tn = len(rows) - tp - fn - fp
    mcc = (tp * tn - fp * fn) / (float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5 + 1e-6)
    parts = {"precision": precision, "recall": recall, "f1": f1(precision, recall)}
    parts |= {"positive_micro_f1": f1(own_precision, recall), "pmf1": total / max(answered, 1)}
    parts |= {"pmf1_w0dt": total / max(len(there), 1), "ilmcc": np.full(len(IOUS), mcc)}
    for name, source in (("cgf1", "pmf1"), ("cgf1_w0dt", "pmf1_w0dt"), ("cgf1_micro", "positive_micro_f1")):
        parts[name] = parts[source] * mcc
    gone = () if negatives else ("ilmcc", "cgf1", "cgf1_w0dt", "cgf1_micro")
    at = {"50_95": slice(None), "50": slice(0, 1), "75": slice(5, 6)}
    return {f"{k}_{x}": None if k in gone else float(np.mean(v[s])) for k, v in parts.items() for x, s in at.items()}


def f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    return 2 * precision * recall / (precision + recall + 1e-4)
