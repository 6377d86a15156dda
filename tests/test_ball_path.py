"""The best path against trying everything, its filter, repeats; gaps, hits and smoothing of a track."""

import itertools

import numpy as np
import pytest

from utils.ball_path import PathConfig, best_path, detector_path, fill_gaps, positions, smooth, solve, turns

W = 1280
NO_FILTER = dict(min_points=1, min_extent=0.0, min_speed=0.0)
EMPTY = np.zeros((0, 3))


def total(chains, rows, cfg: PathConfig) -> float:
    """What a path is worth, said anew: scores minus costs; -inf for a step that is too long or too far."""
    worth = 0.0
    for chain in chains:
        worth += sum(rows[t][i, 2] for t, i in chain) - cfg.birth_cost
        steps = []
        for (s, i), (t, j) in zip(chain[:-1], chain[1:], strict=True):
            step = (rows[t][j, :2] - rows[s][i, :2]) / (t - s)
            if t - s - 1 > cfg.max_gap or np.linalg.norm(step) > cfg.max_speed * W:
                return -np.inf
            worth -= cfg.gap_cost * (t - s - 1)
            steps.append(step)
        for a, b in itertools.pairwise(steps):
            change = max(np.linalg.norm(b - a) - cfg.accel_free, 0)
            worth -= min(change / W * cfg.accel_cost, cfg.accel_cap)
    return worth


def everything(rows):
    """All paths: each frame takes a candidate or none, and each but the first begins a new chain or not."""
    options = [[None, *[(i, new) for i in range(len(r)) for new in (False, True)]] for r in rows]
    for choice in itertools.product(*options):
        chains = []
        for t, c in enumerate(choice):
            if c is not None and (c[1] or not chains):
                chains.append([(t, c[0])])
            elif c is not None:
                chains[-1].append((t, c[0]))
        yield chains


@pytest.mark.parametrize("seed", range(8))
def test_no_path_is_worth_more(seed):
    rng = np.random.default_rng(seed)
    cfg = PathConfig(max_gap=1, birth_cost=rng.uniform(0.5, 2), accel_cap=0.5, accel_cost=20, gap_cost=0.2, **NO_FILTER)
    rows = [np.c_[rng.uniform(0, 120, (n, 2)), rng.uniform(0.2, 1.2, n)] for n in rng.integers(0, 3, 6)]
    best = max(total(chains, rows, cfg) for chains in everything(rows))
    assert total(solve(rows, W, cfg), rows, cfg) == pytest.approx(best, abs=1e-9)


def rally(T: int = 90, seed: int = 0, clutter: int = 8, missed: float = 0.1):
    """A ball that is hit at frame 40, seen with 0.5 px noise, among clutter: candidates, truth (T, 2)."""
    rng = np.random.default_rng(seed)
    t = np.arange(T)
    x = np.where(t < 40, 100 + 14 * t, 660 - 12 * (t - 40))
    truth = np.stack([x, 300 - 6.0 * (t % 40) + 0.15 * (t % 40) ** 2], 1)
    rows = []
    for k in range(T):
        noise = np.c_[rng.uniform(0, W, clutter), rng.uniform(0, 720, clutter), rng.uniform(0, 0.5, clutter)]
        ball = [[*truth[k] + rng.normal(0, 0.5, 2), 0.7]] if rng.random() > missed else np.zeros((0, 3))
        rows.append(rng.permutation(np.concatenate([noise, ball])))
    return rows, truth


def test_ball_is_found_among_clutter_and_through_a_hit():
    rows, truth = rally()
    xy = positions(rows, best_path(rows, W))
    error = np.hypot(*(xy - truth).T)
    there = np.array([(np.hypot(*(r[:, :2] - p).T) < 4).any() for r, p in zip(rows, truth, strict=True)])
    assert (error[np.isfinite(error)] < 4).all() and np.isfinite(error).sum() >= there.sum() - 1


def test_everything_scales_with_the_width():
    rows, _ = rally(40, clutter=3)
    half = [r * [0.5, 0.5, 1] for r in rows]
    assert best_path(rows, W, PathConfig(accel_free=2)) == best_path(half, W // 2, PathConfig(accel_free=1))


def test_what_rests_or_is_short_gives_way_to_the_ball():
    lamp = [[900, 100, 2.0]]
    ball = [np.array([[100 + 10 * t, 300, 0.6], *lamp]) for t in range(20)]
    assert best_path(ball, W) == [0] * 20
    assert best_path(ball, W, PathConfig(min_extent=0, min_speed=0)) == [1] * 20
    flash = [r[1:] if t < 8 else EMPTY for t, r in enumerate(ball)]
    assert best_path(flash, W) == [None] * 20
    three = [r[:1] if t < 3 else EMPTY for t, r in enumerate(ball)]
    assert best_path(three, W, PathConfig(birth_cost=0.1, min_extent=0)) == [None] * 20
    assert best_path(three, W, PathConfig(birth_cost=0.1, min_extent=0, min_points=3)) == [0] * 3 + [None] * 17


def test_a_detector_may_see_a_ball_once_or_at_rest():
    assert best_path([EMPTY, np.array([[5.0, 5.0, 0.4]]), EMPTY], 128, detector_path()) == [None, 0, None]
    assert best_path([np.array([[5.0, 5.0, 0.4]])] * 9, 128, detector_path()) == [0] * 9
    assert best_path([], W) == [] and best_path([EMPTY] * 3, W) == [None] * 3


def test_repeats_take_no_time():
    rows = [np.array([[100 + 40 * t, 300, 0.5]]) for t in range(12)]
    doubled = [r for r in rows for _ in range(2)]
    cfg = PathConfig(accel_cap=5)
    assert best_path(doubled, W, cfg, range(1, 24, 2)) == [0] * 24
    assert best_path(doubled, W, cfg) != [0] * 24  # as a ball that stops and goes
    with pytest.raises(ValueError, match="frame 1 repeats"):
        best_path([rows[0], EMPTY, *rows[1:]], W, cfg, [1])


def test_wrong_candidates_are_refused():
    with pytest.raises(ValueError, match=r"frame 1 .*\(2, 2\)"):
        best_path([EMPTY, np.zeros((2, 2))], W)
    with pytest.raises(ValueError, match="finite"):
        best_path([np.array([[np.nan, 0, 1]])], W)
    with pytest.raises(ValueError, match="max_speed"):
        PathConfig(max_speed=0)


# ---- gaps


def parabola(T: int = 24) -> np.ndarray:
    t = np.arange(T, dtype=float)
    return np.stack([100 + 9 * t, 300 - 8 * t + 0.3 * t**2], 1)


def holes(xy: np.ndarray, *frames: int) -> np.ndarray:
    out = xy.copy()
    out[list(frames)] = np.nan
    return out


def test_a_gap_in_a_parabola_is_filled_exactly():
    xy = parabola()
    filled, flags = fill_gaps(holes(xy, 5, 6, 7, 8, 9, 10))
    assert np.flatnonzero(flags).tolist() == [5, 6, 7, 8, 9, 10]
    np.testing.assert_allclose(filled, xy, atol=1e-6)


def test_long_gaps_ends_and_jumps_stay():
    xy = parabola()
    assert not fill_gaps(holes(xy, *range(5, 12)))[1].any()  # seven
    assert not fill_gaps(holes(xy, 0, 1, 22, 23))[1].any()
    jump = holes(xy, 9)
    jump[10:] += 500
    assert not fill_gaps(jump, max_step=96)[1].any() and fill_gaps(jump)[1][9]
    assert fill_gaps(np.full((3, 2), np.nan))[1].tolist() == [False] * 3


def test_a_gap_is_straight_where_the_ball_turns_or_little_is_known():
    xy = parabola()
    xy[12:, 0] = xy[11, 0] - 9 * np.arange(1, 13)  # hit at 11
    filled, flags = fill_gaps(holes(xy, 11, 12))
    assert flags.sum() == 2
    np.testing.assert_allclose(filled[11], (2 * xy[10] + xy[13]) / 3)
    filled, _ = fill_gaps(holes(parabola(), 1))
    np.testing.assert_allclose(filled[1], parabola()[[0, 2]].mean(0))


# ---- hits and smoothing


def test_hits_are_sharp_turns():
    xy = np.concatenate([parabola(12), parabola(12)[-1] + np.stack([-8, 5] * np.ones((12, 1)), 0) * np.c_[1:13]])
    noisy = xy + np.random.default_rng(0).normal(0, 0.3, xy.shape)
    assert np.flatnonzero(turns(noisy)).tolist() == [11]
    bounce = np.stack([10.0 * np.arange(20), 4.0 * np.abs(np.arange(20) - 10)], 1)  # turns by 44 degrees
    assert not turns(bounce).any() and np.flatnonzero(turns(bounce, angle=40)).tolist() == [10]
    rest = np.random.default_rng(0).normal(0, 0.2, (20, 2))
    assert not turns(rest).any()


def test_smoothing_helps_and_does_not_cross_a_hit():
    rng = np.random.default_rng(1)
    there = np.stack([12.0 * np.arange(30), 5.0 * np.arange(30)], 1)
    truth = np.concatenate([there, there[-2::-1]])  # back at frame 29
    xy = truth + rng.normal(0, 1.5, truth.shape)
    xy[[10, 11, 40]] = np.nan
    out = smooth(xy, W)
    assert np.isfinite(out).all()
    seen = np.isfinite(xy[:, 0])
    raw, after = (np.hypot(*(v - truth)[seen].T) for v in (xy, out))
    assert after.mean() < 0.8 * raw.mean() and after[25:33].max() < 5  # across the hit it would be off by 10
    np.testing.assert_allclose(out[:29], smooth(xy[:30], W)[:29], atol=1e-9)  # what comes after says nothing
    np.testing.assert_allclose(out[30:], smooth(xy[29:], W)[1:], atol=1e-9)


def test_smoothing_does_not_cross_a_turn_that_was_not_seen():
    there = np.stack([12.0 * np.arange(30), np.zeros(30)], 1)
    xy = np.concatenate([there, there[-2::-1]])
    xy[27:32] = np.nan
    out = smooth(xy, W)
    assert np.isnan(out[27:32]).all()
    np.testing.assert_allclose(out[[26, 32]], xy[[26, 32]], atol=0.1)


def test_smoothing_keeps_what_is_straight_and_knows_its_ends():
    line = np.stack([3.0 * np.arange(20), 100 - 2.0 * np.arange(20)], 1)
    xy = holes(line, 0, 1, 10, 19)
    out = smooth(xy, W)
    np.testing.assert_allclose(out[2:19], line[2:19], atol=0.05)
    assert np.isnan(out[[0, 1, 19]]).all()
    far = holes(line, *range(5, 13))
    assert np.isnan(smooth(far, W)[5:13]).all()
    assert np.isnan(smooth(np.full((4, 2), np.nan), W)).all() and smooth(line[:1], W).tolist() == line[:1].tolist()
