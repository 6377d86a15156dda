"""Rendered tennis rallies with the contact frames known exactly: the data of the main demonstration.

A ball flies with gravity, quadratic drag and bounces between two players; a broadcast-like camera looks on. What makes
the contact frame worth finding: the ball is hidden for some frames around every contact, not centred on it; it drops
out as long in mid-flight; rackets swing early or late, and also where there is no ball. So the frame follows from the
way the ball comes and goes, not from one picture. The players and the ball
are drawn larger than life so that they survive 64 pixels. The play is in rally_play.py, the drawing in
rally_pictures.py.

Shapes: T frames, H W picture.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.rally_pictures import draw
from data.rally_play import LEVELS, Level, Stroke, play
from data.video import VideoWriter
from utils.run import write_text_atomic

LABELS = ("near_court_swing", "far_court_swing")


def contacts(strokes: list[Stroke], first_s: float, fps: float, T: int) -> list[dict]:
    """The contacts in T frames: [{"frame", "label", "lo", "hi"}]; frame is nearest to it, lo..hi enclose it."""
    events = []
    for stroke in strokes:
        exact = (stroke.time_s - first_s) * fps
        if 0 <= round(exact) < T:
            lo, hi = max(int(np.floor(exact)), 0), min(int(np.ceil(exact)), T - 1)
            events.append({"frame": round(exact), "label": LABELS[stroke.side], "lo": lo, "hi": hi})
    return events


def find_level(name: str) -> Level:
    if name not in LEVELS:
        raise ValueError(f"level {name!r}: expected one of {tuple(LEVELS)}")
    return LEVELS[name]


def render_rally(seed: int, num_frames: int, size, *, fps: float | None = None, level: str = "easy", aspect=None):
    """One continuous rally video of any length, a function of the arguments only.

    size (W, H) px; fps frames per second (None: drawn from the level); aspect: width / height of the scene that is
    squeezed into size (None: W / H, square pixels). Returns frames uint8 (T, H, W, 3) RGB, and every contact of both
    players as [{"frame", "label", "lo", "hi"}] in order of time.
    """
    rng, how = np.random.default_rng([seed, 1]), find_level(level)
    fps = float(rng.choice(how.fps)) if fps is None else float(fps)
    strokes = play(rng, num_frames / fps + 1)
    return draw(rng, strokes, how, 0.0, fps, num_frames, size, aspect), contacts(strokes, 0.0, fps, num_frames)


def write_rally_video(path, seed: int, seconds: float, size: tuple[int, int], fps: float, level="easy", aspect=None):
    """Write a rally as path (mp4) and its labels beside it as <stem>.json (E2E-Spot layout); returns the labels' item.

    size (W, H) px; the file has round(seconds * fps) frames.
    """
    path, count = Path(path), round(seconds * fps)
    frames, events = render_rally(seed, count, size, fps=fps, level=level, aspect=aspect)
    with VideoWriter(path, fps, size=size) as video:
        for frame in frames:
            video.write(frame)
    item = {"video": path.stem, "num_frames": count, "fps": fps, "width": size[0], "height": size[1]}
    item |= {"num_events": len(events), "events": events, "complete_for": list(LABELS)}
    write_text_atomic(path.with_suffix(".json"), json.dumps([item], indent=1) + "\n")
    return item


class Rally(Dataset):
    """`n` clips an epoch with exactly one contact each (or none), rendered when asked for: ds[index], ds[epoch, index].

    peak: whose contact it is: "near" (the far player's may occur as well) or "any" (no second one by either player).
    Its frame is drawn evenly from 0..T-1. no_peak: share of clips without a contact of that kind. size, level, aspect:
    as in render_rally. shuffle_frames: a control, the frames of every clip in random order, labels moved with them.

    Item: frames uint8 (T, 3, H, W) RGB; length int64 (T); peak, lo, hi int64, frame of the contact and the frames that
    enclose it, -1 without one; events int64 (E, 4), all contacts as rows [frame, 1 near or 2 far, lo, hi], unused rows
    -1; fps float32.
    """

    def __init__(
        self, n, seed, num_frames=64, size=(64, 64), peak="near", no_peak=0.0, shuffle_frames=False, level="easy",
        aspect=None,
    ):  # fmt: skip
        if peak not in ("any", "near") or not 0 <= no_peak <= 1 or n < 1 or num_frames < 8:
            raise ValueError(
                f"Rally: n {n}, num_frames {num_frames}, peak {peak!r}, no_peak {no_peak}; "
                "expected n >= 1, num_frames >= 8, peak any or near, no_peak in 0..1"
            )
        self.n, self.seed, self.T, self.size, self.peak, self.no_peak = n, seed, num_frames, tuple(size), peak, no_peak
        self.shuffle_frames, self.level, self.aspect = shuffle_frames, find_level(level), aspect
        order, whose = "shuffled" if shuffle_frames else "in order", "either" if peak == "any" else "the near"
        print(
            f"# {n} rendered clips of {num_frames} frames, {size[0]}x{size[1]}, level {level}; one contact of "
            f"{whose} player ({no_peak:.0%} none); frames {order}; seed {seed}"
        )

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < self.n:
            raise IndexError(f"Rally: clip {index} of {self.n}")
        rng = np.random.default_rng([self.seed, epoch, index])
        fps = float(rng.choice(self.level.fps))
        peak = -1 if rng.random() < self.no_peak else int(rng.integers(self.T))
        strokes, first_s = self.find_window(rng, fps, peak)
        found = contacts(strokes, first_s, fps, self.T)
        frames = draw(rng, strokes, self.level, first_s, fps, self.T, self.size, self.aspect)
        events = np.full((2 + self.T // 12, 4), -1)
        for k, e in enumerate(found):
            events[k] = e["frame"], 1 + LABELS.index(e["label"]), e["lo"], e["hi"]
        if self.shuffle_frames:
            order = rng.permutation(self.T)
            frames, moved = frames[order], np.argsort(order)
            for k in (0, 2, 3):
                events[: len(found), k] = moved[events[: len(found), 0]]
            peak = int(moved[peak]) if peak >= 0 else -1
        lo, hi = next(((row[2], row[3]) for row in events if row[0] == peak >= 0), (-1, -1))
        return {
            "frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),  # (T, 3, H, W)
            "length": torch.tensor(self.T),
            "peak": torch.tensor(peak),
            "lo": torch.tensor(int(lo)),
            "hi": torch.tensor(int(hi)),
            "events": torch.from_numpy(events),
            "fps": torch.tensor(fps, dtype=torch.float32),
        }

    def find_window(self, rng: np.random.Generator, fps: float, peak: int) -> tuple[list[Stroke], float]:
        """A play and the time of frame 0 (s) such that the only contact of the kind is at frame `peak` (-1: none)."""
        span_s = self.T / fps
        total_s = 6 + 1.5 * span_s
        for _ in range(1000):
            strokes = play(rng, total_s)
            mine = [s for s in strokes if self.peak == "any" or s.side == 0]
            if peak < 0:
                starts = rng.uniform(0, total_s - span_s, 8)
            else:  # the contact lies anywhere within half a frame of its frame
                starts = rng.permutation([s.time_s for s in mine]) - (peak + rng.uniform(-0.49, 0.49)) / fps
            for first_s in starts[(starts > -1) & (starts + span_s < total_s)]:
                inside = [e["frame"] for e in contacts(mine, first_s, fps, self.T)]
                if inside == ([] if peak < 0 else [peak]):
                    return strokes, float(first_s)
        raise ValueError(
            f"Rally: found no clip of {self.T} frames at {fps} fps with one contact; ask for shorter clips"
        )
