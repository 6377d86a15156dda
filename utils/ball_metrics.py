"""Scores of one ball per frame: TP, FP1, FP2, FN, TN by three conventions, distances, gaps, jumps, average precision.

    label \\ prediction   there                         absent
    seen                 TP (close) or FP1 (far off)   FN
    not seen             FP2                           TN

precision = TP / (TP + FP1 + FP2), recall = TP / (TP + FN), accuracy = (TP + TN) / all, as in TrackNet. That recall
ignores FP1: garbage in every frame reaches 1. Strict recall = TP / frames where the ball is seen; strict F1 with it.
References: qaz812345/TrackNetV3@77c123a test.py; nttcom/WASB-SBDT@923462c src/utils/evaluator.py.

Positions are (N, 2) float64 px of the original frame with NaN where there is none; frames are (N,) int64, ascending.
"""

from dataclasses import dataclass

import numpy as np

NAMES = ("TP", "FP1", "FP2", "FN", "TN")
MOVES = (0.382, 0.764, 0.146)  # shares of its length by which the shuffled control moves a clip


@dataclass(frozen=True)
class Convention:
    """What counts as close."""

    name: str
    tol: float  # px of the reference size
    ref: tuple[int, int] | None  # W, H px that both positions are scaled to; None: the frame itself
    whole: bool = False  # cut coordinates to whole numbers first
    below: bool = False  # distance < tol, not <=

    def __str__(self) -> str:
        size = f"{self.ref[0]}x{self.ref[1]}" if self.ref else "the frame's own size"
        return f"distance {'<' if self.below else '<='} {self.tol:g} px at {size}{', whole px' if self.whole else ''}"


TRACKNET_V3 = Convention("TrackNetV3", 4, (512, 288), whole=True)
WASB = Convention("WASB", 4, None, below=True)


@dataclass
class Clip:
    """One labelled clip and what was predicted for its frames."""

    name: str
    size: tuple[int, int]  # W, H px
    frames: np.ndarray  # (N,) frame numbers
    label: np.ndarray  # (N, 2) px, NaN: not seen
    pred: np.ndarray  # (N, 2) px, NaN: nothing predicted
    score: np.ndarray | None = None  # (N,) of the predictions


# ---- outcomes


def outcomes(clip: Clip, rule: Convention) -> np.ndarray:
    """Index into NAMES for every frame, (N,) int64."""
    scale = np.divide(rule.ref, clip.size) if rule.ref else np.ones(2)
    label, pred = clip.label * scale, clip.pred * scale
    if rule.whole:
        label, pred = np.trunc(label), np.trunc(pred)
    d = np.hypot(*(pred - label).T)
    close = d < rule.tol if rule.below else d <= rule.tol
    seen, there = np.isfinite(label[:, 0]), np.isfinite(pred[:, 0])
    return np.where(seen & there, np.where(close, 0, 1), np.where(there, 2, np.where(seen, 3, 4)))


def rates(counts: dict[str, int]) -> dict[str, float | None]:
    """The shares that follow from TP, FP1, FP2, FN, TN. None where there is nothing to divide by: precision where
    nothing is predicted, recall where nothing is seen, F1 where both; F1 is 2 TP / (what both divide by)."""
    TP, FP1, FP2, FN, TN = (counts[k] for k in NAMES)
    predicted, answered, seen = TP + FP1 + FP2, TP + FN, TP + FP1 + FN
    return {
        "accuracy": share(TP + TN, predicted + FN + TN), "precision": share(TP, predicted),
        "recall": share(TP, answered), "f1": share(2 * TP, predicted + answered),
        "strict_recall": share(TP, seen), "strict_f1": share(2 * TP, predicted + seen),
    }  # fmt: skip


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def average_precision(found: np.ndarray, score: np.ndarray) -> dict[str, float | None]:
    """AP of all predictions ranked by score: area under the best precision at every recall reached.

    found (N,) as of `outcomes`, score (N,). "ap": as WASB, recall without FP1; "strict_ap": of all frames where the
    ball is seen; None where there is no such frame. Equal scores keep the order of frames.
    """
    order = np.argsort(-score[found <= 2], kind="stable")
    hits = np.cumsum(found[found <= 2][order] == 0)  # TP among the best k + 1
    precision = hits / np.arange(1, len(hits) + 1)
    best = [precision[hits == n].max() for n in range(1, hits[-1] + 1)] if len(hits) else []
    n = {"ap": np.isin(found, (0, 3)).sum(), "strict_ap": np.isin(found, (0, 1, 3)).sum()}
    return {k: share(float(sum(best)), int(total)) for k, total in n.items()}


# ---- distances, gaps, jumps


def distances(clips: list[Clip]) -> dict[str, float | int | None]:
    """px of the original frames, over the frames where label and prediction both are: n_both, rmse (one outlier
    dominates it; WASB's), median; rmse_tp over WASB's true positives alone. None where there is no such frame."""
    d = np.concatenate([np.hypot(*(c.pred - c.label).T) for c in clips])
    tp = np.concatenate([outcomes(c, WASB) == 0 for c in clips])
    both = np.isfinite(d)
    return {
        "n_both": int(both.sum()), "rmse": root_mean(d[both]), "rmse_tp": root_mean(d[tp]),
        "median": float(np.median(d[both])) if both.any() else None,
    }  # fmt: skip


def root_mean(d: np.ndarray) -> float | None:
    return float(np.sqrt(np.mean(d**2))) if len(d) else None


def runs(holds: np.ndarray, frames: np.ndarray) -> list[int]:
    """Lengths of the runs of neighbouring frames where `holds` (N,) is true; a number that is left out ends a run."""
    lengths, last = [], None
    for frame in frames[holds]:
        if last is not None and frame == last + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = frame
    return lengths


def continuity(clips: list[Clip], rule: Convention, max_speed: float) -> dict[str, float | int]:
    """gaps: runs of frames where the ball is seen and nothing predicted; longest_gap in frames; longest_lost: the
    longest run of seen frames without a true positive; jumps: steps between neighbouring predicted frames above
    max_speed (share of the width a frame), jumps_per_1000: of 1000 such steps."""
    gaps, lost, jumps, steps = [], [], 0, 0
    for c in clips:
        found = outcomes(c, rule)
        gaps += runs(found == 3, c.frames)
        lost += runs(np.isin(found, (1, 3)), c.frames)
        step = np.hypot(*np.diff(c.pred, axis=0).T)[np.diff(c.frames) == 1]
        steps += int(np.isfinite(step).sum())
        jumps += int((step > max_speed * c.size[0]).sum())
    return {
        "gaps": len(gaps), "longest_gap": max(gaps, default=0), "longest_lost": max(lost, default=0),
        "jumps": jumps, "jumps_per_1000": 1000 * jumps / max(steps, 1),
    }  # fmt: skip


# ---- everything, and the controls


def score_ball(clips: list[Clip], rule: Convention) -> dict:
    """Counts, rates and AP (None also without scores) of all clips together under one convention."""
    found = np.concatenate([outcomes(c, rule) for c in clips])
    counts = {name: int((found == k).sum()) for k, name in enumerate(NAMES)}
    ap = {"ap": None, "strict_ap": None}
    if all(c.score is not None for c in clips):
        ap = average_precision(found, np.concatenate([c.score for c in clips]))
    return {**counts, **rates(counts), **ap}


def constant(clips: list[Clip]) -> list[Clip]:
    """Trivial baseline: the median of each clip's labelled positions in every frame."""
    known = [c.label[np.isfinite(c.label[:, 0])] for c in clips]
    middle = [np.median(k, axis=0) if len(k) else np.full(2, np.nan) for k in known]
    return [
        Clip(c.name, c.size, c.frames, c.label, np.tile(m, (len(c.frames), 1)))
        for c, m in zip(clips, middle, strict=True)
    ]


def moved(clips: list[Clip], share: float) -> list[Clip]:
    """Shuffled control: the predictions of each clip moved round in time by that share of its length."""
    by = [round(len(c.frames) * share) for c in clips]
    return [
        Clip(
            c.name,
            c.size,
            c.frames,
            c.label,
            np.roll(c.pred, n, axis=0),
            None if c.score is None else np.roll(c.score, n),
        )
        for c, n in zip(clips, by, strict=True)
    ]
