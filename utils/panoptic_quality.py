"""Panoptic quality of images (panopticapi, deeplab2) and videos (VPQ, STQ), and mean IoU, from counts of common pixels.

Pixels are read once: `joint_counts` turns two id maps into {(label id, predicted id): pixels}; every score is made from
such counts, and those of several frames are added. Segments are {id: {"category_id", "area", "iscrowd"}}.
References: cocodataset/panopticapi@7bb4655 evaluation.py; google-research/deeplab2@64bc1c1 evaluation/; VIPSeg-Dataset
@92e1459 eval_vpq_vspw.py.
"""

from collections import Counter, defaultdict

import numpy as np

VOID = 0  # id of unlabelled pixels in COCO's maps
LARGEST_ID = 2**31 - 1
Counts = dict[int, dict[str, float]]  # category -> iou (sum over tp), tp, fp, fn


def joint_counts(gt: np.ndarray, pred: np.ndarray) -> Counter:
    """{(gt id, predicted id): pixels} of two integer maps of one shape, ids 0..2**31-1. ValueError otherwise."""
    if gt.shape != pred.shape:
        raise ValueError(f"label map {gt.shape} and predicted map {pred.shape} differ in size")
    ids = [x.ravel().astype(np.int64) for x in (gt, pred)]
    if any(x.size and (x.min() < 0 or x.max() > LARGEST_ID) for x in ids):
        raise ValueError(f"ids must lie in 0..{LARGEST_ID}")
    key = (ids[0] << 31) + ids[1]
    # neighbours mostly agree: sort one pixel of each run instead of all pixels
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    unique, inverse = np.unique(key[starts], return_inverse=True)
    pixels = np.bincount(inverse, np.diff(starts, append=key.size), minlength=len(unique)).astype(np.int64)
    return Counter({(k >> 31, k & LARGEST_ID): n for k, n in zip(unique.tolist(), pixels.tolist(), strict=True)})


def add_joint_counts(frames: list[Counter]) -> Counter:
    """Sum of the counts of several maps, in the order of ids."""
    total = defaultdict(int)
    for frame in frames:
        for pair, n in frame.items():
            total[pair] += n
    return Counter(dict(sorted(total.items())))


def areas(joint: Counter, side: int) -> dict[int, int]:
    """{id: pixels} of the labels (side 0) or of the predictions (side 1) of `joint_counts`."""
    total = defaultdict(int)
    for pair, n in joint.items():
        total[pair[side]] += n
    return dict(total)


# ---- PQ


def match_segments(joint: Counter, gt: dict[int, dict], pred: dict[int, dict], void: int = VOID) -> Counts:
    """TP (IoU > 0.5), FP, FN and the sum of IoU by category, of one image, or of one window of a video.

    gt: {id: {category_id, area, iscrowd}}; pred: {id: {category_id, area}}. The union leaves out predicted pixels on
    void; crowds are not matched; an unmatched prediction with more than half its area on void or on the crowd of its
    category is no FP.
    """
    counts = defaultdict(lambda: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0})
    found_gt, found_pred = set(), set()
    for (g, p), inter in joint.items():
        if g not in gt or p not in pred or gt[g]["iscrowd"] or gt[g]["category_id"] != pred[p]["category_id"]:
            continue
        iou = inter / (pred[p]["area"] + gt[g]["area"] - inter - joint[void, p])
        if iou > 0.5:
            own = counts[gt[g]["category_id"]]
            own["tp"] += 1
            own["iou"] += iou
            found_gt.add(g)
            found_pred.add(p)
    for g in gt.keys() - found_gt:
        if not gt[g]["iscrowd"]:
            counts[gt[g]["category_id"]]["fn"] += 1
    crowd = {s["category_id"]: g for g, s in gt.items() if s["iscrowd"]}  # one a category, the last, as in panopticapi
    for p in pred.keys() - found_pred:
        category = pred[p]["category_id"]
        ignored = joint[void, p] + (joint[crowd[category], p] if category in crowd else 0)
        if ignored / pred[p]["area"] <= 0.5:
            counts[category]["fp"] += 1
    return dict(counts)


def add_counts(parts: list[Counts]) -> Counts:
    """Sum of the counts of several images or windows."""
    total = {}
    for part in parts:
        for category, own in part.items():
            known = total.setdefault(category, dict.fromkeys(own, 0))
            for k, v in own.items():
                known[k] += v
    return total


def quality(own: dict[str, float]) -> dict[str, float]:
    """PQ, SQ and RQ of one category's counts; all 0 where there is nothing to count."""
    half = own["tp"] + 0.5 * own["fp"] + 0.5 * own["fn"]
    sq = own["iou"] / own["tp"] if own["tp"] else 0.0
    return {"pq": own["iou"] / half if half else 0.0, "sq": sq, "rq": own["tp"] / half if half else 0.0}


def panoptic_quality(counts: Counts, is_thing: dict[int, bool]) -> dict:
    """Means over the categories that occur: {"All", "Things", "Stuff": {pq, sq, rq, n}, "per_class": {id: {...}}}.

    is_thing: {category id: bool}, every category that counts. pq, sq and rq are None where n = 0.
    """
    per_class = {c: quality(own) for c, own in sorted(counts.items()) if own["tp"] + own["fp"] + own["fn"]}
    groups = {"All": (True, False), "Things": (True,), "Stuff": (False,)}
    result = {}
    for name, kinds in groups.items():
        rows = [q for c, q in per_class.items() if is_thing[c] in kinds]
        means = {k: sum(q[k] for q in rows) / len(rows) if rows else None for k in ("pq", "sq", "rq")}
        result[name] = {**means, "n": len(rows)}
    return {**result, "per_class": per_class}


def match_label_maps(gt: np.ndarray, pred: np.ndarray, divisor: int, ignored: int) -> Counts:
    """Counts of deeplab2's form: two maps of category * divisor + instance; category `ignored` does not count.

    In gt, instance 0 of the ignored category is void and its other instances are crowds.
    """
    joint = joint_counts(gt, pred)
    sides = []
    for side in (0, 1):
        segments = {i: {"category_id": i // divisor, "area": n} for i, n in areas(joint, side).items()}
        sides.append({i: {**s, "iscrowd": s["category_id"] == ignored} for i, s in segments.items()})
    counted = {i: s for i, s in sides[1].items() if not s["iscrowd"]}
    return match_segments(joint, sides[0], counted, ignored * divisor)


# ---- videos


def match_tubes(frames: list[tuple[Counter, dict, dict]], window: int) -> Counts:
    """Counts of VPQ over all windows of so many consecutive frames (step 1); none for a shorter video.

    frames: (joint counts, gt segments, predicted segments) of each frame; an id is one tube through the video.
    """
    parts = []
    for first in range(len(frames) - window + 1):
        joints, gts, preds = zip(*frames[first : first + window], strict=True)
        parts.append(match_segments(add_joint_counts(joints), merge_segments(gts), merge_segments(preds)))
    return add_counts(parts)


def merge_segments(frames: tuple[dict, ...]) -> dict[int, dict]:
    """Segments of several frames as tubes: areas are added, the rest is that of the first frame with the id."""
    tubes = {}
    for segments in frames:
        for i, s in segments.items():
            if i in tubes:
                tubes[i]["area"] += s["area"]
            else:
                tubes[i] = dict(s)
    return tubes


def video_panoptic_quality(videos: list[list], is_thing: dict[int, bool], windows=(1, 2, 4, 6)) -> dict:
    """VPQ: {window: panoptic_quality(...)} and "VPQ": means over windows of pq, {"All", "Things", "Stuff"}.

    videos: lists of frames as in `match_tubes`. A mean is None where a window has no segment to count.
    """
    result = {}
    for k in windows:
        counts = add_counts([match_tubes(frames, k) for frames in videos])
        result[k] = {**panoptic_quality(counts, is_thing), "counts": counts}
    means = {}
    for name in ("All", "Things", "Stuff"):
        values = [result[k][name]["pq"] for k in windows]
        means[name] = None if None in values else sum(values) / len(values)
    return {**result, "VPQ": means}


def segmentation_tracking_quality(
    videos: dict[object, Counter], num_classes: int, things: list[int], ignore: int, bits: int = 16
) -> dict:
    """STQ = sqrt(AQ * IoU), over all videos and of each: {"STQ", "AQ", "IoU", "videos": {name: {...}}}.

    videos: joint counts, added over the frames of each, of maps (class << bits) + instance. Instance 0 of a thing in
    the labels is a crowd and left out of AQ, so real instances start at 1. Labels of class `ignore` do not count. As in
    deeplab2, a predicted `ignore` is a miss and, where the labels hold a class, one more class of IoU 0.
    """
    parts = {name: tube_sums(joint, num_classes, set(things), ignore, bits) for name, joint in videos.items()}

    def score(aq: float, tubes: int, confusion: np.ndarray) -> dict[str, float]:
        aq, iou = aq / tubes if tubes else 0.0, mean_iou(confusion)["mIoU"]
        return {"STQ": float(np.sqrt(aq * iou)), "AQ": aq, "IoU": iou}

    total = [sum(column) for column in zip(*parts.values(), strict=True)]
    return {**score(*total), "videos": {name: score(*part) for name, part in parts.items()}}


def tube_sums(joint: Counter, num_classes: int, things: set[int], ignore: int, bits: int) -> tuple:
    """Of one video: sum of AQ over its tubes, number of tubes, confusion matrix (num_classes + 1, num_classes + 1)."""
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)  # last: ignored
    kept, gt_area, pred_area = [], defaultdict(int), defaultdict(int)
    for (g, p), n in joint.items():
        classes = [num_classes if x >> bits == ignore else x >> bits for x in (g, p)]
        if max(classes) > num_classes:
            raise ValueError(f"class {g >> bits} or {p >> bits}: expected 0..{num_classes - 1} or {ignore}")
        if classes[0] < num_classes:
            confusion[*classes] += n
        gt_thing, instance = classes[0] in things, g & ((1 << bits) - 1)
        if gt_thing and instance == 0:
            continue  # a crowd
        if gt_thing:
            gt_area[g] += n
        if classes[1] in things:
            pred_area[p] += n
            if gt_thing:
                kept.append((g, p, n))
    aq = sum(n / gt_area[g] * n / (gt_area[g] + pred_area[p] - n) for g, p, n in kept)
    return aq, len(gt_area), confusion


def mean_iou(confusion: np.ndarray) -> dict:
    """Mean IoU over the classes that occur in labels or predictions, from pixels (K, >= K) by label and prediction.

    Further columns are predictions that are no class, such as void. {"mIoU", "IoU" (K,) with nan where a class occurs
    nowhere, "absent": classes without a labelled pixel}; mIoU is nan when no class occurs.
    """
    inter = np.diagonal(confusion)
    labelled = confusion.sum(1)
    union = labelled + confusion.sum(0)[: len(confusion)] - inter
    iou = np.divide(inter, union, out=np.full(len(inter), np.nan), where=union > 0)
    mean = float(np.nanmean(iou)) if (union > 0).any() else float("nan")
    return {"mIoU": mean, "IoU": iou, "absent": np.flatnonzero(labelled == 0).tolist()}
