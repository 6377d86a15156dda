"""Other scores for events in time: SoccerNet average-mAP and GolfDB PCE; control predictions that know nothing.

References: package SoccerNet 0.2.0 Evaluation/ActionSpotting.py; wmcnally/golfdb@a63b4ce8 util.py correct_preds.
"""

import random
from collections import Counter

import numpy as np

from utils.spotting_metrics import peak_errors, top_events

# ---- controls and the one-peak-per-clip report


def evenly_spaced(truth: list[dict], start: int = 0, stop: int | None = None) -> list[dict]:
    """Trivial predictions: each class at the mean rate it has in the truth's frames [start, stop), all scores 0.5."""
    ends = [min(v["num_frames"], stop or v["num_frames"]) for v in truth]
    total = sum(max(0, end - start) for end in ends)  # frames
    gaps = {label: total / n for label, n in Counter(e["label"] for v in truth for e in v["events"]).items()}
    spaced = []
    for v, end in zip(truth, ends, strict=True):
        places = [(int(start + (i + 0.5) * g), c) for c, g in gaps.items() for i in range(round((end - start) / g))]
        spaced.append({**v, "events": [{"frame": frame, "label": c, "score": 0.5} for frame, c in places]})
    return spaced


def misplaced(pred: list[dict], truth: list[dict], start: int, stop: int | None, draw: float) -> list[dict]:
    """Control: every video gets the events of another one; a single video has its own moved round in time.

    pred and truth hold the same videos in the same order; frames wrap inside [start, stop) of the receiving video.
    draw in (0, 1) seeds the exchange and is the share of the length by which a single video is moved.
    """
    order = random.Random(draw).sample(range(len(pred)), len(pred))
    source = {order[i]: order[i - 1] for i in range(len(order))}  # one cycle: nobody keeps its own
    moved = []
    for i, t in enumerate(truth):
        length = max(1, min(t["num_frames"], stop or t["num_frames"]) - start)
        shift = round(length * draw) if len(pred) == 1 else 0
        events = [{**e, "frame": start + (e["frame"] - start + shift) % length} for e in pred[source[i]]["events"]]
        moved.append({**t, "events": events})
    return moved


def peak_report(
    truth: list[dict], pred: list[dict], wrong: list[dict], tolerances: tuple = (0, 1, 2, 4)
) -> dict | None:
    """`peak_errors` of the top prediction (any score) for the classes with one true event in every video; else None.

    "constant" always says the median relative place of the class; "shuffled" scores `wrong`, the misplaced predictions.
    """
    triples = top_events(truth, pred)
    if not triples:
        return None
    size, fps = {v["video"]: v["num_frames"] for v in truth}, {v["video"]: v["fps"] for v in truth}
    places: dict[str, list[float]] = {}
    for video, t, _ in triples:
        places.setdefault(t["label"], []).append(t["frame"] / size[video])
    middle = {label: sorted(x)[len(x) // 2] for label, x in places.items()}
    constant = [(v, t, {"frame": round(middle[t["label"]] * size[v])}) for v, t, _ in triples]
    return {
        "classes": sorted(places),
        **peak_errors(triples, tolerances, fps),
        "constant": peak_errors(constant, tolerances, fps),
        "shuffled": peak_errors(top_events(truth, wrong), tolerances, fps),
    }


# ---- SoccerNet average-mAP

# The package multiplies "unshown" by this whenever it averages over tolerances, whatever the classes (seen in its
# results; 13 of the 17 SoccerNet-v2 classes can be unshown). It is kept so that figures compare.
UNSHOWN_FACTOR = 17 / 13


def soccernet_average_map(
    truth: list[dict], pred: list[dict], classes: list[str], framerate: float, seconds: tuple = (1,)
) -> dict:
    """SoccerNet's a-mAP -> {"mAP", "AP" {class: value}, "visible", "unshown"}, values in [0, 1].

    truth, pred: the same videos (a game half each) in the same order, with num_frames and frames at `framerate`; a true
    event with visibility "not shown" counts for "unshown", any other for "visible". seconds: the tolerances, each a
    whole window, so 1 means +-0.5 s; several are averaged by the trapezoid rule (tight: 1..5, loose: 5, 10 .. 60), and
    "unshown" then carries the package's factor 17/13. A class without truth has AP 0 and counts. Of predictions on one
    frame the last holds. ValueError if the videos differ.
    """
    if [v["video"] for v in truth] != [v["video"] for v in pred]:
        raise ValueError("soccernet_average_map: truth and predictions must hold the same videos in the same order")
    parts = {"all": [], "visible": [], "unshown": []}  # per tolerance: AP of every class
    for tolerance in seconds:
        rows = {
            c: [_soccer_hits(t, p, c, tolerance * framerate / 2) for t, p in zip(truth, pred, strict=True)]
            for c in classes
        }
        for name, sign in (("all", 0), ("visible", 1), ("unshown", -1)):
            parts[name].append([_eleven_points(rows[c], sign) for c in classes])
    ap = {name: _trapezoid(np.array(values), np.array(seconds, float)) for name, values in parts.items()}  # (classes,)
    return {
        "mAP": float(ap["all"].mean()),
        "AP": dict(zip(classes, map(float, ap["all"]), strict=True)),
        "visible": float(ap["visible"].mean()),
        "unshown": float(ap["unshown"].mean()) * (UNSHOWN_FACTOR if len(seconds) > 1 else 1),
    }


def _soccer_hits(t: dict, p: dict, label: str, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """One video and class -> detections (N, 3) [score, hit 0/1, sign of the nearest truth], signs (M,) of its truths.

    Truths, in time order, each take the best unused prediction at most `reach` frames away.
    """
    sign_at = {e["frame"]: -1 if e.get("visibility") == "not shown" else 1 for e in t["events"] if e["label"] == label}
    truths = sorted(sign_at)
    found = sorted({e["frame"]: e["score"] for e in p["events"] if e["label"] == label}.items())
    rows = np.array([[score, 0.0, -1.0] for _, score in found]).reshape(-1, 3)
    frames = np.array([frame for frame, _ in found], float)
    if truths:  # the frame half-way belongs to the later truth
        middles = [(a + b) // 2 for a, b in zip(truths, truths[1:], strict=False)]
        rows[:, 2] = [sign_at[truths[i]] for i in np.searchsorted(middles, frames, side="right")]
    for frame in truths:
        free = (np.abs(frames - frame) <= reach) & (rows[:, 1] == 0)
        if free.any():
            rows[np.where(free, rows[:, 0], -1.0).argmax(), 1] = 1
    return rows, np.array([sign_at[f] for f in truths])


def _eleven_points(parts: list[tuple[np.ndarray, np.ndarray]], sign: int) -> float:
    """11-point AP at 200 thresholds in [0, 1]; sign +-1: only truths, and detections near truths, of it."""
    rows, signs = np.concatenate([r for r, _ in parts]), np.concatenate([s for _, s in parts])
    if sign:
        rows, signs = rows[rows[:, 2] == sign], signs[signs == sign]
    if not len(signs):
        return 0.0
    above = rows[:, 0] >= np.linspace(0, 1, 200)[:, None]  # (200, N)
    hits, count = (above * rows[:, 1]).sum(1), above.sum(1)  # (200,)
    precision, recall = hits / np.maximum(count, 1), hits / len(signs)
    return float(np.mean([precision[recall >= r].max(initial=0.0) for r in np.arange(11) / 10]))


def _trapezoid(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Mean over the first axis by the trapezoid rule. values (tolerances, classes), at (tolerances,) -> (classes,)."""
    if len(at) == 1:
        return values[0]
    return ((values[1:] + values[:-1]) / 2 * np.diff(at)[:, None]).sum(0) / (at[-1] - at[0])


# ---- GolfDB


def golfdb_pce(probs: np.ndarray, events: np.ndarray, tolerance: int | None = None) -> dict:
    """GolfDB's share of correct events for one swing -> {"frames", "deltas", "correct" (8,) int, "tolerance", "PCE"}.

    probs: (T, >= 8) scores per frame, column i for event i (Address .. Finish); events: (8,) true frames. The frame of
    an event is the arg-max of its column. tolerance None: max(1, round((impact - address) / 30)) frames.
    """
    events = np.asarray(events)
    if tolerance is None:
        tolerance = int(max(1, round((int(events[5]) - int(events[0])) / 30)))
    frames = np.asarray(probs)[:, : len(events)].argmax(0)  # (8,)
    deltas = np.abs(frames - events)
    correct = (deltas <= tolerance).astype(int)
    return {
        "frames": frames,
        "deltas": deltas,
        "correct": correct,
        "tolerance": tolerance,
        "PCE": float(correct.mean()),
    }
