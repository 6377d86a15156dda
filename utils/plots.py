"""Pictures of a run: training curves, score curves over a video, histogram of signed errors. PNG files, no display.

Every function writes one PNG beside its target and renames it, and closes its figure.
"""

import json
import math
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from utils.run import UserError, writing

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]  # Okabe-Ito, colour-blind safe


def curves(metrics: str | Path | list[dict], path: str | Path) -> None:
    """Panels of loss (every key with 'loss'), learning rate (lr), and the other metrics over `step`.

    metrics: a metrics.jsonl, or its rows [{step, key: number}]; a row need not hold every key. UserError when there is
    no row with a step, or a line is not json.
    """
    rows = _read_rows(metrics) if isinstance(metrics, str | Path) else metrics
    series: dict[str, tuple[list, list]] = {}  # key -> steps, values
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and "step" in row:
                series.setdefault(key, ([], []))
                series[key][0].append(row["step"])
                series[key][1].append(value)
    if not series:
        raise UserError(f"{metrics if isinstance(metrics, str | Path) else 'metrics'}: no numbers over 'step' to draw")
    panels = {"loss": [k for k in series if "loss" in k.lower()], "learning rate": [k for k in series if k == "lr"]}
    rest = [k for k in series if k not in panels["loss"] and k != "lr"]
    shares = [k for k in rest if all(0 <= v <= 1 or math.isnan(v) for v in series[k][1])]
    panels["share in [0, 1]"] = shares
    panels |= {k: [k] for k in rest if k not in shares}  # grad norm, items/s, ...: each has its own scale
    panels = {title: keys for title, keys in panels.items() if keys}
    columns = min(3, len(panels))
    figure, axes = plt.subplots(
        math.ceil(len(panels) / columns), columns, figsize=(4.6 * columns, 3.2 * math.ceil(len(panels) / columns)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        for key, colour in zip(keys, COLOURS * len(keys), strict=False):
            steps, values = series[key]
            dot = "o" if len(steps) < 40 else None
            axis.plot(steps, values, color=colour, label=key, marker=dot, markersize=3, linewidth=1.3)
        positive = [v for k in keys for v in series[k][1] if math.isfinite(v)]
        if title == "loss" and positive and min(positive) > 0 and max(positive) / min(positive) > 20:
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(keys) > 1 or keys[0] != title:
            axis.legend(fontsize=8, frameon=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    _save(figure, path)


def timeline(
    path: str | Path,
    num_frames: int,
    fps: float,
    scores: dict[str, np.ndarray],
    events: list[dict],
    truth: list[dict] | None = None,
    seconds_per_row: float = 30.0,
) -> None:
    """Score curves over a whole video in equal strips of at most `seconds_per_row`, but never more than 30 strips.

    scores: {label: (num_frames,) float in [0, 1]}; events and truth: [{frame, label, score?, lo?, hi?}]. Detected
    events are triangles at their score, true ones ticks below zero with lo..hi shaded. fps <= 0 (unknown): the axis
    counts frames, 25 to the second. ValueError when a curve has another length than num_frames.
    """
    for label, curve in scores.items():
        if np.shape(curve) != (num_frames,):
            raise ValueError(f"timeline: scores['{label}'] has shape {np.shape(curve)}, expected ({num_frames},)")
    rate = fps if fps > 0 else 25.0
    rows = min(30, max(1, math.ceil(num_frames / (seconds_per_row * rate))))
    per_row = math.ceil(num_frames / rows)
    labels = list(dict.fromkeys([*scores, *(e["label"] for e in [*events, *(truth or [])])]))
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    height = 0.9 + 1.6 * rows  # inches
    figure, axes = plt.subplots(rows, 1, figsize=(13, height), squeeze=False, sharey=True)
    figure.subplots_adjust(left=0.035, right=0.985, top=1 - 0.4 / height, bottom=0.5 / height, hspace=0.25)
    x = np.arange(num_frames) / (fps if fps > 0 else 1.0)  # (num_frames,) seconds or frames
    unit = 1 / fps if fps > 0 else 1.0
    for row, axis in enumerate(axes[:, 0]):
        first, stop = row * per_row, min((row + 1) * per_row, num_frames)
        for label, curve in scores.items():
            axis.plot(x[first:stop], np.asarray(curve)[first:stop], color=colour[label], linewidth=1.0)
            axis.fill_between(
                x[first:stop], np.asarray(curve)[first:stop], color=colour[label], alpha=0.12, linewidth=0
            )
        for e in (e for e in truth or [] if first <= e["frame"] < stop):
            axis.axvspan(
                e.get("lo", e["frame"]) * unit, e.get("hi", e["frame"]) * unit, color=colour[e["label"]], alpha=0.2
            )
            axis.plot(e["frame"] * unit, -0.09, marker="|", color=colour[e["label"]], markersize=9, markeredgewidth=2)
        for e in (e for e in events if first <= e["frame"] < stop):
            axis.plot(e["frame"] * unit, e.get("score", 1.0), marker="v", color=colour[e["label"]], markersize=7,
                      markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
        axis.set(xlim=(first * unit, (first + per_row) * unit), ylim=(-0.18, 1.12), yticks=[0, 0.5, 1])
        axis.grid(alpha=0.25)
    axes[-1, 0].set_xlabel("time (s)" if fps > 0 else "frame")
    handles = [plt.Line2D([], [], color=colour[label], label=label) for label in labels]
    handles += [plt.Line2D([], [], color="grey", marker="v", linestyle="", label=f"detected ({len(events)})")]
    if truth is not None:
        handles += [
            plt.Line2D([], [], color="grey", marker="|", markeredgewidth=2, linestyle="", label=f"true ({len(truth)})")
        ]
    figure.legend(handles=handles, loc="upper center", ncols=min(8, len(handles)), frameon=False, fontsize=9)
    _save(figure, path)


def error_histogram(path: str | Path, errors: list[float]) -> None:
    """Bars of signed errors (frames, predicted minus true; > 0 is late), one bar per whole frame, with mean and MAE."""
    d = np.array(errors, float)  # (N,)
    reach = int(max(4, math.ceil(np.abs(d).max()))) if d.size else 4
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    if d.size:
        values = np.arange(-reach, reach + 1)
        counts = np.array([(np.floor(d + 0.5) == v).sum() for v in values])
        bars = axis.bar(values, counts, width=0.85, color=np.where(values == 0, COLOURS[2], COLOURS[0]))
        if reach <= 12:
            axis.bar_label(bars, [str(c) if c else "" for c in counts], fontsize=8)
        axis.axvline(d.mean(), color=COLOURS[1], linestyle="--", linewidth=1.3, label=f"bias {d.mean():+.2f} frames")
        axis.set_title(
            f"n = {d.size}, mean |error| {np.abs(d).mean():.2f} frames, exact {np.mean(np.abs(d) < 0.5):.0%}"
        )
        axis.legend(frameon=False, fontsize=9)
        axis.set_ylim(0, counts.max() * 1.15)
    else:
        axis.set_title("n = 0: no prediction matches a truth")
    axis.set(xlabel="predicted minus true frame (late is positive)", ylabel="events", xlim=(-reach - 0.7, reach + 0.7))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    _save(figure, path)


def _read_rows(path: str | Path) -> list[dict]:
    try:
        return [json.loads(x) for x in Path(path).read_text(encoding="utf-8").splitlines() if x.strip()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a metrics.jsonl of a run") from error
    except ValueError as error:
        raise UserError(f"{path}: holds a line that is not json ({error})") from error


def _save(figure, path: str | Path) -> None:
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            figure.savefig(tmp, dpi=110, format="png")
            os.replace(tmp, path)
    finally:
        plt.close(figure)
        tmp.unlink(missing_ok=True)
