"""data/rendered_ball.py: scenes are functions of (seed, index), masks are exact, targets come and go, files are read."""

import csv

import numpy as np
import pytest

from data.rendered_ball import COLUMNS, TARGETS, RenderedBall, write_video
from data.video import VideoReader


@pytest.fixture(scope="module")
def clips() -> list[dict]:
    """Twenty clips of 60 frames without noise."""
    source = RenderedBall(5, noise=0)
    return [source.clip(i, 60) for i in range(20)]


def centroid(mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def runs(flags: np.ndarray) -> list[tuple[bool, int]]:
    """[(value, length)] of equal neighbours."""
    edges = [0, *np.flatnonzero(np.diff(flags)) + 1, len(flags)]
    return [(bool(flags[a]), int(b - a)) for a, b in zip(edges, edges[1:], strict=False)]


def same(a: dict, b: dict) -> bool:
    parts = [(a["frames"], b["frames"]), (a["status"], b["status"])]
    parts += [(a[k][name], b[k][name]) for k in ("masks", "centres") for name in TARGETS]
    return all(np.array_equal(x, y, equal_nan=x.dtype == float) for x, y in parts)


def test_a_clip_is_a_function_of_seed_and_index():
    one, other = RenderedBall(1), RenderedBall(2)
    assert same(one.clip(3, 12), RenderedBall(1).clip(3, 12))
    assert not same(one.clip(3, 12), one.clip(4, 12)) and not same(one.clip(3, 12), other.clip(3, 12))


def test_a_longer_clip_begins_like_a_short_one():
    source = RenderedBall(1, hiding=1)
    long, short = source.clip(6, 40), source.clip(6, 25)
    cut = {"frames": long["frames"][:25], "status": long["status"][:25]}
    cut |= {k: {name: v[:25] for name, v in long[k].items()} for k in ("masks", "centres")}
    assert same(cut, short)
    assert np.array_equal(source.picture(6)["image"], short["frames"][0])


def test_shapes_and_types(clips):
    x = RenderedBall(0, size=(48, 70)).clip(0, 3)
    assert x["frames"].shape == (3, 48, 70, 3) and x["frames"].dtype == np.uint8
    assert x["status"].shape == (3,) and x["status"].dtype == np.int64
    for name in TARGETS:
        assert x["masks"][name].shape == (3, 48, 70) and x["masks"][name].dtype == bool
        assert x["centres"][name].shape == (3, 2) and x["centres"][name].dtype == np.float64


def test_masks_are_where_the_colour_is(clips):
    """All pixels of a mask have one colour, and right beside it, but for another target, nothing has."""
    for x in clips:
        for name in TARGETS:
            for frame, mask in list(zip(x["frames"], x["masks"][name], strict=True))[::15]:
                if not mask.any():
                    continue
                colour = frame[mask]
                assert (colour == colour[0]).all()
                near = np.zeros_like(mask)
                near[1:] |= mask[:-1]
                near[:-1] |= mask[1:]
                rim = frame[near & ~mask]
                assert not (rim == colour[0]).all(1).any()


def test_the_ball_is_a_disc_around_its_centre_and_lies_above_all(clips):
    for x in clips:
        for mask, xy in zip(x["masks"]["ball"], x["centres"]["ball"], strict=True):
            if mask.any():
                v, u = np.nonzero(mask)
                far = np.hypot(u - xy[0], v - xy[1]).max()
                inside = np.hypot(*(np.indices(mask.shape)[::-1] - xy[:, None, None])) < far - 1e-6
                assert (mask >= inside).all() and np.hypot(*(centroid(mask) - xy)) < 0.5 and 3 < far < 5.5
        assert not (x["masks"]["ball"] & x["masks"]["racket"]).any()


def test_the_racket_is_around_its_centre_unless_the_ball_covers_a_part(clips):
    off = []
    for x in clips:
        alone = x["masks"]["racket"].any((1, 2)) & ~x["masks"]["ball"].any((1, 2))
        off += [
            np.hypot(*(centroid(x["masks"]["racket"][t]) - x["centres"]["racket"][t])) for t in np.flatnonzero(alone)
        ]
    assert len(off) > 50 and max(off) < 0.6


def test_centres_are_known_where_something_is_seen(clips):
    for x in clips:
        for name in TARGETS:
            assert np.array_equal(np.isfinite(x["centres"][name]).all(1), x["masks"][name].any((1, 2)))


def test_targets_are_absent_or_vanish_and_come_back():
    source = RenderedBall(7, size=(36, 48), absent=0.2, hiding=0.5, seen=(5, 9), hidden=(2, 4))
    seen = {name: [] for name in TARGETS}
    for i in range(120):
        flags = {name: np.array([], bool) for name in TARGETS}
        for x in source.stream(i, 24):
            for name in TARGETS:
                flags[name] = np.append(flags[name], x["masks"][name].any())
        for name in TARGETS:
            seen[name].append(flags[name])
    for name in TARGETS:
        absent = np.mean([not f.any() for f in seen[name]])
        vanishing = [f for f in seen[name] if f.any() and not f.all()]
        assert 0.1 < absent < 0.32 and 0.1 < len(vanishing) / 120 < 0.5
        for f in vanishing:
            parts = runs(f)
            assert parts[0][0], "the first frame shows it"
            assert all(5 <= n <= 9 for value, n in parts[:-1] if value)
            assert all(2 <= n <= 4 for value, n in parts[:-1] if not value)
    both = [not (a.any() or b.any()) for a, b in zip(*seen.values(), strict=True)]
    assert any(both)


def test_none_or_all_of_the_scenes():
    never, always = RenderedBall(0, absent=1), RenderedBall(0, absent=0, hiding=0)
    for i in range(10):
        assert not any(m.any() for m in never.picture(i)["masks"].values())
        assert all(m.any((1, 2)).all() for m in always.clip(i, 5)["masks"].values())


def test_the_ball_flies_on_parabolas_and_bounces():
    """Nowhere faster than 6 % of the width; away from the walls x moves evenly; status 2 at the lowest places."""
    source = RenderedBall(9, absent=0, hiding=0, noise=0)
    bounces = 0
    for i in range(8):
        x = source.clip(i, 80)
        xy = x["centres"]["ball"]
        assert np.hypot(*np.diff(xy, axis=0).T).max() < 0.06 * 128 + 1e-9
        speed = abs(np.diff(xy[:, 0]))
        assert np.isclose(speed, np.median(speed)).mean() > 0.8
        bend = np.diff(xy[:, 1], 2)
        assert np.isclose(bend, np.median(bend)).mean() > 0.8 and np.median(bend) > 0  # falls ever faster: y is down
        for t in np.flatnonzero(x["status"] == 2):
            window = xy[max(0, t - 3) : t + 4, 1]
            assert xy[t, 1] >= window.max() - 1e-9
            bounces += 1
        assert set(x["status"].tolist()) <= {0, 2}
    assert bounces > 8


def test_any_size_holds_both_targets():
    for size in ((32, 32), (40, 120), (150, 60)):
        x = RenderedBall(0, size=size, absent=0, hiding=0).clip(0, 40)
        assert x["masks"]["ball"].any((1, 2)).all() and x["masks"]["racket"].any((1, 2)).all(), size


# ---- files


def test_video_and_labels(tmp_path):
    source = RenderedBall(4, size=(64, 95), absent=0, hiding=1, seen=(3, 6), hidden=(2, 3))
    path = write_video(source, 2, 25, tmp_path / "new", "rally", rate=25)
    clip = source.clip(2, 25)
    with VideoReader(path) as video:
        assert len(video) == 25 and video.fps == 25
        decoded = video.read(range(25))[:, :64, :95]
    assert abs(decoded.astype(int) - clip["frames"]).mean() < 6
    assert sorted(p.name for p in path.parent.iterdir()) == ["rally.mp4", "rally_ball.csv", "rally_racket.csv"]
    hidden = 0
    for name in TARGETS:
        with open(path.parent / f"rally_{name}.csv", newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert list(rows[0]) == COLUMNS and [int(r["file name"].split(".")[0]) for r in rows] == list(range(25))
        for r, xy in zip(rows, clip["centres"][name], strict=True):
            if np.isnan(xy).any():
                assert (r["visibility"], r["x-coordinate"], r["y-coordinate"]) == ("0", "", "")
                hidden += 1
            else:
                assert r["visibility"] == "1"
                assert abs(np.array([float(r["x-coordinate"]), float(r["y-coordinate"])]) - xy).max() <= 0.00501
        said = [int(r["status"]) for r in rows]
        assert said == (clip["status"].tolist() if name == "ball" else [0] * 25)
    assert hidden


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    source = RenderedBall(4, size=(32, 32))

    def breaks(index, frames):
        yield source.render(source.scene(index), index, 0, set())
        raise RuntimeError("second frame")

    monkeypatch.setattr(source, "stream", breaks)
    with pytest.raises(RuntimeError, match="second frame"):
        write_video(source, 0, 9, tmp_path, "rally")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [{"size": (31, 64)}, {"absent": 1.1}, {"hiding": -0.1}, {"distractors": -1}, {"noise": -1}, {"seen": (0, 4)},
     {"seen": (5, 4)}, {"hidden": (3, 2)}],
    ids=str,
)  # fmt: skip
def test_bad_arguments(more):
    with pytest.raises(ValueError, match="expected"):
        RenderedBall(0, **more)


@pytest.mark.parametrize("index, frames", [(-1, 4), (0, 0)])
def test_bad_clips(index, frames):
    with pytest.raises(ValueError, match="clip"):
        RenderedBall(0).clip(index, frames)
