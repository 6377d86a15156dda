"""The ball of a whole clip at once: the best path over what was seen in every frame, its gaps filled, smoothed beside.

What a Follower decides frame by frame is decided again with the future known. Gaps of a few frames are interpolated and
say so; smoothed coordinates stand beside the raw ones and never cross a hit. See utils/ball_path.py.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from utils.ball_path import PathConfig, best_path, fill_gaps, positions, smooth
from utils.track_files import Point, Track

KINDS = ("detector", "tracker")  # last column of candidates


def offline_track(candidates: Sequence[np.ndarray], width: int, cfg: PathConfig, prompt: str | None,
                  online: Track | None = None, repeats: Collection[int] = (), max_gap: int = 6) -> Track:  # fmt: skip
    """candidates: per frame (n, 9) of x, y, score, area, box, 1 where it is the tracker's; or (n, 4), from motion.

    width: of the frame, px. online: the track of the first pass, whose scores and masks are kept where both agree.
    repeats: frames that repeat the one before (`best_path`). max_gap: longest gap that is filled, frames.
    """
    path = best_path(candidates, width, cfg, repeats)
    found = positions(candidates, path)
    points = []
    for t, (rows, k) in enumerate(zip(candidates, path, strict=True)):
        before = None if online is None else online.frames[t]
        if k is None:
            points.append(Point(trk_score=None if before is None else before.trk_score))
        elif before is not None and before.visible and np.hypot(before.x - rows[k][0], before.y - rows[k][1]) < 1e-6:
            points.append(replace(before))
        else:
            points.append(point_of(rows[k]))
    filled, gaps = fill_gaps(found, max_gap, cfg.max_speed * width)
    smoothed = smooth(found, width, max_gap)
    for t, point in enumerate(points):
        if gaps[t]:
            point.x, point.y, point.source = *filled[t].tolist(), "interp"
        if np.isfinite(smoothed[t]).all():
            point.x_s, point.y_s = smoothed[t].tolist()
    return Track(prompt, "single", points)


def point_of(row: np.ndarray) -> Point:
    """A candidate (9,) or (4,) as the object of its frame."""
    x, y, score, area = (float(v) for v in row[:4])
    if len(row) == 4:
        return Point(x, y, None, score, None, None, round(area), 1, "classical", True)
    scores = (None, score) if row[8] else (score, None)
    box = tuple(float(v) for v in row[4:8])
    return Point(x, y, box, score, *scores, round(area), 1, KINDS[int(row[8])], True)
