"""Scores for events in time: E2E-Spot mAP, non-maximum suppression, one-to-one matching, peak errors.

Videos are dicts {video, events: [{frame, label, score}]} as data/peak_files.py reads them; truths have no score.
Frames may be fractional in predictions. All distances are in frames, all scores and shares in [0, 1].
Reference: jhong93/spot@edec4201 util/score.py, util/eval.py; arturxe2/T-DEED@ec1ad556 util/eval.py (greedy, soft NMS).
"""

import math
from bisect import bisect_left, bisect_right

import numpy as np

# ---- mAP


def e2e_map(truth: list[dict], pred: list[dict], tolerances: tuple = (0, 1, 2, 4), strict: bool = True) -> dict:
    """E2E-Spot's mean average precision -> {"mAP": {delta: value}, "AP": {label: {delta: value}}}, values in [0, 1].

    Classes are those of the truth, in order of appearance; a class that only predictions name is ignored with all its
    false positives. No class in the truth: mAP is NaN. Predictions go by falling score, ties in file order; each may
    only take the nearest truth not yet recalled (first in the list wins a tie), never a second-nearest one.

    strict: AssertionError where the reference asserts, i.e. when the video sets differ or a score of a scored class
    exceeds 1. Otherwise ValueError for differing videos, and scores have no upper bound.
    """
    if {v["video"] for v in truth} != {v["video"] for v in pred}:
        only_one_side = sorted({v["video"] for v in truth} ^ {v["video"] for v in pred})
        error = AssertionError if strict else ValueError
        raise error(f"videos differ: {len(only_one_side)} only in truth or in predictions, as '{only_one_side[0]}'")
    truths, preds = _by_label(truth), _by_label(pred)
    ap = {}
    for label, by_video in truths.items():
        ranked = [(e["score"], video, e["frame"]) for video, events in preds.get(label, {}).items() for e in events]
        ranked.sort(key=lambda p: p[0], reverse=True)  # stable
        if strict and not all(score <= 1 for score, _, _ in ranked):
            raise AssertionError(f"class '{label}': a score exceeds 1")
        frames = {video: np.array([e["frame"] for e in events], float) for video, events in by_video.items()}
        ap[label] = {delta: average_precision(frames, ranked, delta) for delta in tolerances}
    mean = {delta: float(np.mean([a[delta] for a in ap.values()])) if ap else math.nan for delta in tolerances}
    return {"mAP": mean, "AP": ap}


def average_precision(truth_frames: dict, ranked: list[tuple], delta: float) -> float:
    """Area under the right-maximum envelope of precision, for one class.

    truth_frames: {video: (N,) float64 frames, file order}; ranked: [(score, video, frame)], best first.
    A frame is recalled at most once, so two truths on one frame count twice in the denominator and once above it.
    """
    total = sum(len(f) for f in truth_frames.values())
    open_frames = {video: f.copy() for video, f in truth_frames.items()}  # a recalled truth becomes inf
    precisions = []
    for rank, (_, video, frame) in enumerate(ranked, 1):
        left = open_frames.get(video)
        if left is None:
            continue
        distance = np.abs(left - frame)
        nearest = int(distance.argmin())  # the first of equals
        if distance[nearest] <= delta:
            left[left == left[nearest]] = np.inf
            precisions.append((len(precisions) + 1) / rank)
    envelope = np.maximum.accumulate(np.array(precisions[::-1], float))
    return float(envelope.sum() / total)


def _by_label(videos: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{label: {video: events in file order}}, labels and videos in order of appearance."""
    groups: dict = {}
    for v in videos:
        for e in v["events"]:
            groups.setdefault(e["label"], {}).setdefault(v["video"], []).append(e)
    return groups


# ---- non-maximum suppression: per video and class; events come back sorted by frame (ties: class, then keep order)


def nms_e2e(pred: list[dict], window: float) -> list[dict]:
    """E2E-Spot: drop an event when another one, 0 < |distance| <= window, has a strictly higher score.

    All are compared with the original list: a dropped event still suppresses others, equal plateaus and events on the
    same frame survive.
    """

    def keep(events: list[dict]) -> list[dict]:
        order = sorted(events, key=lambda e: e["frame"])
        frames = [e["frame"] for e in order]
        kept = []
        for e in events:
            near = order[bisect_left(frames, e["frame"] - window) : bisect_right(frames, e["frame"] + window)]
            if not any(o["score"] > e["score"] and o["frame"] != e["frame"] for o in near):
                kept.append(dict(e))
        return kept

    return _suppress(pred, keep)


def nms_greedy(pred: list[dict], window: float, floor: float = 0.01) -> list[dict]:
    """T-DEED: take the maximum (first of equals), remove all within `window` of it, repeat until below `floor`."""

    def keep(events: list[dict]) -> list[dict]:
        kept, frames = [], np.array([e["frame"] for e in events], float)  # (N,)
        gone = np.zeros(len(events), bool)
        for i in sorted(range(len(events)), key=lambda i: -events[i]["score"]):  # stable
            if not gone[i] and events[i]["score"] >= floor:
                kept.append(dict(events[i]))
                gone |= np.abs(frames - frames[i]) <= window
        return kept

    return _suppress(pred, keep)


def nms_soft(pred: list[dict], window: float, floor: float = 0.01) -> list[dict]:
    """T-DEED soft NMS: take the maximum, multiply scores within `window` by (distance / window)^2, until below `floor`.

    Events on the same frame get score 0. The kept events carry the lowered scores.
    """
    if window <= 0 or floor <= 0:
        raise ValueError(
            f"soft NMS divides by the window and stops at the floor: both must be > 0, got {window}, {floor}"
        )

    def keep(events: list[dict]) -> list[dict]:
        kept, frames = [], np.array([e["frame"] for e in events], float)  # (N,)
        scores = np.array([e["score"] for e in events], float)  # (N,)
        while scores.size and scores.max() >= floor:
            best = int(scores.argmax())  # the first of equals
            kept.append({**events[best], "score": float(scores[best])})
            distance = np.abs(frames - frames[best])
            near = distance <= window
            scores[near] = scores[near] * distance[near] ** 2 / window**2
        return kept

    return _suppress(pred, keep)


def _suppress(pred: list[dict], keep) -> list[dict]:
    groups = [(v, _by_label([v])) for v in pred]
    kept = [(v, [e for by_video in labels.values() for e in keep(by_video[v["video"]])]) for v, labels in groups]
    return [{**v, "events": sorted(events, key=lambda e: e["frame"])} for v, events in kept]


# ---- one-to-one matching at a threshold, and errors of peaks


def match_events(truth: list[dict], pred: list[dict], threshold: float, radius: float) -> dict:
    """Match truths and predictions (score >= threshold) one to one, per video and class, at most `radius` frames off.

    Closest pairs first; ties: higher score, then earlier truth. Returns {"pairs": [(video, truth event, predicted
    event)], "misses": [(video, truth, None)], "false": [(video, predicted)]}; pairs + misses suit `peak_errors`.
    """
    pairs, misses, false = [], [], []
    truths, preds = _by_label(truth), _by_label(pred)
    for label in dict.fromkeys([*truths, *preds]):
        by_video, found_by_video = truths.get(label, {}), preds.get(label, {})
        for video in dict.fromkeys([*by_video, *found_by_video]):
            ts = by_video.get(video, [])
            ps = [e for e in found_by_video.get(video, []) if e["score"] >= threshold]
            taken = _closest_first(ts, ps, radius)
            pairs += [(video, ts[i], ps[j]) for i, j in taken]
            used_t, used_p = {i for i, _ in taken}, {j for _, j in taken}
            misses += [(video, t, None) for i, t in enumerate(ts) if i not in used_t]
            false += [(video, p) for j, p in enumerate(ps) if j not in used_p]
    return {"pairs": pairs, "misses": misses, "false": false}


def _closest_first(ts: list[dict], ps: list[dict], radius: float) -> list[tuple[int, int]]:
    order = sorted(range(len(ps)), key=lambda j: ps[j]["frame"])
    frames = [ps[j]["frame"] for j in order]
    candidates = []
    for i, t in enumerate(ts):
        for k in range(bisect_left(frames, t["frame"] - radius), bisect_right(frames, t["frame"] + radius)):
            j = order[k]
            candidates.append((abs(ps[j]["frame"] - t["frame"]), -ps[j]["score"], t["frame"], i, j))
    pairs, used_t, used_p = [], set(), set()
    for *_, i, j in sorted(candidates):
        if i not in used_t and j not in used_p:
            pairs.append((i, j))
            used_t.add(i)
            used_p.add(j)
    return sorted(pairs)


def f1_scores(matched: dict) -> dict[str, float]:
    """precision, recall, f1 of `match_events`; NaN where the denominator is empty (nothing predicted, no truth)."""
    hits, misses, false = len(matched["pairs"]), len(matched["misses"]), len(matched["false"])
    return {
        "precision": hits / (hits + false) if hits + false else math.nan,
        "recall": hits / (hits + misses) if hits + misses else math.nan,
        "f1": 2 * hits / (2 * hits + misses + false) if hits + misses + false else math.nan,
    }


def nearest_events(truth: list[dict], pred: list[dict], threshold: float) -> list[tuple]:
    """(video, truth, nearest prediction of its class with score >= threshold, or None) per truth; not one to one."""
    preds = _by_label(pred)
    triples = []
    for v in truth:
        for t in v["events"]:
            near = [p for p in preds.get(t["label"], {}).get(v["video"], []) if p["score"] >= threshold]
            best = min(near, key=lambda p: (abs(p["frame"] - t["frame"]), -p["score"]), default=None)
            triples.append((v["video"], t, best))
    return triples


def top_events(truth: list[dict], pred: list[dict]) -> list[tuple]:
    """(video, truth, highest prediction of its class or None) for the classes with exactly one truth in every video."""
    singles = [label for label, by in _by_label(truth).items() if all(len(by.get(v["video"], [])) == 1 for v in truth)]
    preds = _by_label(pred)
    triples = []
    for v in truth:
        for t in (e for e in v["events"] if e["label"] in singles):
            found = preds.get(t["label"], {}).get(v["video"], [])
            triples.append((v["video"], t, max(found, key=lambda e: e["score"], default=None)))  # first of equals
    return triples


def peak_errors(triples: list[tuple], tolerances: tuple = (0, 1, 2, 4), fps: dict[str, float] | None = None) -> dict:
    """Errors d = predicted - true frame over (video, truth, prediction or None) triples; None is a truth without one.

    n and misses count triples. MAE mean|d|, median |d|, bias mean d (frames; > 0 is late), MAE_ms and bias_ms (videos
    whose fps is known, i.e. > 0) leave misses out; acc {k: share |d| <= k} and interval_acc (share with
    lo <= prediction <= hi among the interval_n truths with lo and hi) count a miss as wrong. NaN where nothing is left.
    """
    found = [(v, t, p) for v, t, p in triples if p is not None]
    d = np.array([p["frame"] - t["frame"] for _, t, p in found], float)  # (N,)
    ms = [1000 * e / fps[v] for (v, _, _), e in zip(found, d, strict=True) if fps and fps[v] > 0]
    bounded = [(t, p) for _, t, p in triples if "lo" in t and "hi" in t]
    inside = [p is not None and t["lo"] <= p["frame"] <= t["hi"] for t, p in bounded]
    return {
        "n": len(triples),
        "misses": len(triples) - len(found),
        "MAE": _mean(np.abs(d)),
        "median": float(np.median(np.abs(d))) if len(d) else math.nan,
        "bias": _mean(d),
        "MAE_ms": _mean(np.abs(ms)),
        "bias_ms": _mean(ms),
        "acc": {k: float((np.abs(d) <= k).sum() / len(triples)) if triples else math.nan for k in tolerances},
        "interval_acc": _mean(inside),
        "interval_n": len(inside),
    }


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else math.nan
