"""Candidates from motion on rendered frames: the ball is found, repeats are, the camera is measured; and real clips.

Reference clips and labels: LAB_SHARED/data (skipped without).  Tolerance on them: 4 px at 512x288, 15 px at 1920x1080.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from data.video import VideoReader, iter_frames
from models.ball_motion import (
    MotionConfig,
    MotionDetector,
    camera_motion,
    camera_samples,
    check_camera,
    median,
    score_of,
    shrink,
)
from utils.ball_path import best_path, positions
from utils.run import UserError

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
CLIPS, LABELS = SHARED / "tempopeak" / "videos", SHARED / "sam3" / "tennis_clips"
H, W = 180, 320
DEFAULT = MotionConfig()


def ground(seed: int = 0, h: int = H, w: int = W, low: int = 40, high: int = 150) -> np.ndarray:
    """A picture full of texture, uint8 (h, w, 3), of grey levels low..high."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(low, high, (h // 6 + 1, w // 6 + 1, 3))
    return np.kron(coarse, np.ones((6, 6, 1)))[:h, :w].astype(np.uint8)


def play(T: int = 60, seed: int = 0, noise: float = 2.0, **levels):
    """A yellow ball of 2.5 px on a parabola, a white player that walks, grain: frames uint8 (T, H, W, 3), centres."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W]
    t = np.arange(T)
    centres = np.stack([20 + 4.5 * t, 60 + 0.08 * (t - 30.0) ** 2], 1)
    frames = np.repeat(ground(seed, **levels)[None], T, 0).astype(np.float32)
    for k, (cx, cy) in enumerate(centres):
        frames[k][(abs(x - 150 - k) < 9) & (abs(y - 130) < 25)] = 220 - 30 * (k % 2)
        frames[k][(x - cx) ** 2 + (y - cy) ** 2 <= 2.5**2] = (230, 240, 60)
    frames += rng.normal(0, noise, frames.shape)
    return frames.clip(0, 255).astype(np.uint8), centres


def detect(frames, cfg: MotionConfig = DEFAULT):
    """Candidates of all frames, the detector, and after how many frames each answer came."""
    detector, out, late = MotionDetector(cfg), [], []
    for k, frame in enumerate(frames):
        new = detector.push(frame)
        late += [k - i for i, _ in new]
        out += new
    out += detector.finish()
    assert [i for i, _ in out] == list(range(len(frames)))
    return [c for _, c in out], detector, late


def test_the_ball_is_found_on_rendered_frames():
    frames, centres = play()
    rows, detector, late = detect(frames)
    xy = positions(rows, best_path(rows, W, repeats=detector.repeats))
    error = np.hypot(*(xy - centres).T)
    assert (error[np.isfinite(error)] < 2).all() and np.isfinite(error).sum() >= 57
    best = np.array([r[0] for r in rows if len(r)])
    assert np.median(best[:, 2]) > 0.6 and 8 < np.median(best[:, 3]) < 25  # the ball covers 21 px
    assert detector.repeats == [] and max(late) <= detector.delay


def test_nothing_moves_nothing_is_found():
    still = np.repeat(ground()[None], 20, 0)
    rows, detector, _ = detect(still)
    assert all(r.shape == (0, 4) for r in rows) and detector.repeats == []
    assert [r.shape for r in detect(still[:1])[0]] == [(0, 4)] and MotionDetector().finish() == []


def test_repeated_frames_are_found_and_carry_the_same_candidates():
    frames, centres = play()
    order = [k for k in range(60) for _ in range(2 if k % 5 == 4 else 1)]  # 25 -> 30 fps
    again = [i for i in range(1, len(order)) if order[i] == order[i - 1]]
    rng = np.random.default_rng(0)
    coded = [np.clip(frames[k] + rng.integers(-2, 3, frames[k].shape), 0, 255).astype(np.uint8) for k in order]
    rows, detector, _ = detect(coded)
    assert detector.repeats == again
    assert all(np.array_equal(rows[i], rows[i - 1]) for i in again)
    xy = positions(rows, best_path(rows, W, repeats=again))
    error = np.hypot(*(xy - centres[order]).T)
    assert (error[np.isfinite(error)] < 2).all() and np.isfinite(error).mean() > 0.9


def test_memory_is_bounded_and_the_past_does_not_depend_on_the_future():
    frames, _ = play(120)
    cfg = MotionConfig(window=4, samples=5)
    whole, detector, _ = detect(frames, cfg)
    part, kept = MotionDetector(cfg), []
    early = [new for frame in frames[:50] for new in part.push(frame)]
    for _, c in early:
        kept.append(len(c))
        assert len(part._moments) <= 2 * cfg.window + 1 and len(part._pending) <= 4
    assert len(early) == 50 - detector.delay
    assert all(np.array_equal(c, whole[i]) for i, c in early)


def test_positions_are_those_of_the_original_frame():
    frames, _ = play(20)
    big = frames.repeat(2, 1).repeat(2, 2)
    small, _, _ = detect(frames)
    large, _, _ = detect(big, MotionConfig(width=W))
    assert [len(r) for r in small] == [len(r) for r in large]
    a, b = np.concatenate(small), np.concatenate(large)
    np.testing.assert_allclose(b[:, :2], 2 * a[:, :2] + 0.5, atol=0.3)  # shrinking blurs a little
    assert np.median(b[:, 3] / a[:, 3]) == pytest.approx(4, rel=0.4)


def test_yellow_bright_round_and_alone_scores_high():
    ball = dict(area=np.array([20]), sides=np.array([[5, 5]]), peak=np.array([90.0]), yellow=np.array([0.4]))
    best = score_of(ball, np.array([0.02]))
    worse = [dict(area=np.array([8])), dict(peak=np.array([30.0])), dict(yellow=np.array([0.0]))]
    assert best > 0.6 and all(score_of(ball | w, np.array([0.02])) < best - 0.1 for w in worse)
    assert score_of(ball, np.array([0.4])) < 0.3


def test_wrong_frames_are_refused():
    detector = MotionDetector()
    with pytest.raises(ValueError, match=r"\(4, 4\) uint8"):
        detector.push(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        detector.push(np.zeros((4, 4, 3)))
    detector.push(np.zeros((5, 7, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(6, 7\).*\(5, 7\)"):
        detector.push(np.zeros((6, 7, 3), np.uint8))
    with pytest.raises(ValueError, match="min_area"):
        MotionConfig(min_area=9, max_area=3)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9])
def test_median_by_sorting(n):
    planes = np.random.default_rng(n).integers(0, 256, (n, 6, 7)).astype(np.uint8)
    np.testing.assert_array_equal(median(list(planes)), np.sort(planes, 0)[n // 2])


# ---- the camera


def window_on(picture: np.ndarray, x: float) -> np.ndarray:
    """What a camera sees x px further right, (H, W, 3); x in quarters."""
    k = int(x * 4)
    return shrink(picture[: 4 * H, k : k + 4 * W], W)


@pytest.mark.parametrize("px", [0.0, 1.0, 3.25, 9.0])
def test_camera_motion_is_measured(px):
    rng = np.random.default_rng(0)
    wide = np.kron(ground(1, H // 2, W // 2 + 20), np.ones((8, 8, 1), np.uint8))
    frames = [window_on(wide, px * k) + rng.integers(0, 6, (H, W, 3), np.uint8) for k in range(4)]
    assert camera_motion(frames) == pytest.approx(px, rel=0.08, abs=0.05)
    if px > 1:  # twice the size, twice the way; shorter ones are measured too short where shrinking blurs
        assert camera_motion([f.repeat(2, 0).repeat(2, 1) for f in frames]) == pytest.approx(2 * px, rel=0.2)


def test_objects_grain_and_flat_pictures_are_no_camera_motion():
    frames, _ = play(24, noise=8)
    assert camera_motion(frames) < 0.1
    y, x = np.mgrid[:H, :W]
    stripes = 100 + 30 * np.sin(x / 9)[..., None] * np.ones(3)  # they tell nothing about moves up and down
    grain = np.random.default_rng(0).normal(0, 8, (6, H, W, 3))
    assert camera_motion(list((stripes + grain / 4).clip(0, 255).astype(np.uint8))) < 0.1
    assert camera_motion(list(np.clip(90 + grain / 2, 0, 255).astype(np.uint8))) == 0.0
    assert camera_motion(frames[:1]) == 0.0 and camera_motion([]) == 0.0


def test_a_moving_camera_is_refused_in_one_sentence():
    wide = np.kron(ground(1, H // 2, W // 2 + 40), np.ones((8, 8, 1), np.uint8))
    frames = [window_on(wide, 4 * k) for k in range(5)]
    with pytest.raises(UserError, match=r"clip.mp4: the camera moves \([34]\.. px.*--force"):
        check_camera(frames, "clip.mp4")
    assert check_camera([frames[0]] * 5, "clip.mp4") < 0.1


def test_while_the_camera_moves_there_are_no_candidates():
    frames, _ = play(60, noise=1, low=85, high=108)  # so faint that the ball alone is new
    shaken = [np.roll(f, -min(max(k - 24, 0), 16), 1) for k, f in enumerate(frames)]  # moves from 24 to 40
    rows, _, _ = detect(shaken)
    assert not any(len(r) for r in rows[26:40])
    assert all(len(r) for r in rows[2:20] + rows[46:58])


def test_sampled_frames_are_spread():
    assert camera_samples(1) == [0] and camera_samples(3) == [0, 1, 2]
    many = camera_samples(1000)
    assert len(many) == 24 and many[0] == 0 and many[-1] == 999


# ---- real clips


def labelled() -> list[tuple[Path, np.ndarray]]:
    """Clips with ball labels: video, (T, 2) px, nan where the ball is not visible."""
    found = []
    for path in sorted(LABELS.glob("*_ball.csv")):
        video = CLIPS / f"artlabss_{path.name.removesuffix('_ball.csv')}.mp4"
        if video.is_file():
            with open(path, newline="") as f:
                rows = list(csv.DictReader(f))
            seen = [r["visibility"] not in ("0", "") for r in rows]
            xy = [[float(r["x-coordinate"]), float(r["y-coordinate"])] if s else [np.nan] * 2
                  for r, s in zip(rows, seen, strict=True)]  # fmt: skip
            found.append((video, np.array(xy)))
    return found


@pytest.mark.slow
def test_real_clips():
    """Precision >= 0.85 on each labelled clip, precision and strict recall >= 0.95 on video_input6 (107 frames)."""
    cases = labelled()
    if not cases:
        pytest.skip(f"no labelled clips under {LABELS}")
    for video, truth in cases:
        rows, detector, _ = detect([f.image for f in iter_frames(video)])
        width = VideoReader(video).out_size[0]
        xy = positions(rows, best_path(rows, width, repeats=detector.repeats))
        hit = np.hypot(*(xy - truth).T) <= 4 * width / 512
        precision = hit.sum() / np.isfinite(xy[:, 0]).sum()
        strict = hit.sum() / np.isfinite(truth[:, 0]).sum()
        print(f"{video.name}: precision {precision:.3f}, strict recall {strict:.3f}, n = {len(truth)}")
        least = 0.95 if "video_input6" in video.name else 0.85
        assert precision >= least and (least < 0.95 or strict >= 0.95)
    print(f"{len(cases)} of {len(cases)}")


@pytest.mark.slow
def test_real_cameras():
    """The tennis clips are taken, the handball clips are refused."""
    fixed, moving = sorted(CLIPS.glob("artlabss_*.mp4")), sorted((SHARED / "sam3" / "handball").glob("*.mp4"))
    if not fixed or not moving:
        pytest.skip(f"no clips under {SHARED}")
    for path in fixed + moving:
        with VideoReader(path) as reader:
            frames = [shrink(f, 1280) for f in map(reader.__getitem__, camera_samples(len(reader)))]
        px = camera_motion(frames)
        print(f"{path.name}: {px:.2f} px")
        assert (px > 0.5) == (path in moving)
    print(f"{len(fixed) + len(moving)} of {len(fixed) + len(moving)}")
