"""Rendered rallies: the labels are the physics, nothing else than (seed, epoch, index) decides a clip."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data import rally, rally_play
from data.peak_files import load_labels
from data.rally import Rally, contacts, render_rally, write_rally_video
from data.rally_play import LEVELS, ball_at, hide, play
from data.video import VideoReader


@pytest.fixture
def undrawn(monkeypatch):
    """Rally without pictures: labels only, quick enough for statistics."""
    monkeypatch.setattr(
        rally, "draw", lambda rng, strokes, level, first_s, fps, T, *_: np.zeros((T, 2, 2, 3), np.uint8)
    )


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_item_and_determinism():
    clips = Rally(5, seed=3, size=(48, 40))
    item = clips[2]
    assert item["frames"].shape == (64, 3, 40, 48) and item["frames"].dtype == torch.uint8
    assert all(item[key].dtype == torch.int64 for key in ("peak", "lo", "hi", "length", "events"))
    assert item["fps"].dtype == torch.float32 and item["length"] == 64 and len(clips) == 5
    assert 0 <= item["hi"] - item["lo"] <= 1 and item["lo"] <= item["peak"] <= item["hi"]
    assert item["frames"].float().std() > 20  # not an empty picture
    assert same(item, Rally(5, seed=3, size=(48, 40))[(0, 2)])
    for other in (clips[(1, 2)], clips[3], Rally(5, seed=4, size=(48, 40))[2]):
        assert not torch.equal(item["frames"], other["frames"])
    with pytest.raises(IndexError):
        clips[5]


def test_workers_do_not_change_numbers():
    batches = [list(DataLoader(Rally(4, seed=1, size=(24, 24)), 2, num_workers=w)) for w in (0, 2)]
    assert all(same(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_contact_is_where_the_ball_turns_round(seed):
    strokes = play(np.random.default_rng(seed), 60)
    assert len(strokes) > 20 and all(b.time_s > a.time_s for a, b in zip(strokes, strokes[1:], strict=False))
    fps, step = 25.0, 1e-3
    events = contacts(strokes, 0.0, fps, 10**6)
    for stroke, event in zip(strokes, events, strict=True):
        times = stroke.time_s + np.array([-2, -1, 0, 1]) * step + 1e-6
        (before, touch, leave, after), alive = ball_at(strokes, times)
        assert alive.all() and abs(event["frame"] - stroke.time_s * fps) <= 0.5
        assert event["label"] == ("near_court_swing", "far_court_swing")[stroke.side]
        assert np.abs(touch - stroke.place).max() < 0.1 and np.abs(leave - stroke.place).max() < 0.1  # no jump
        came, went = (touch - before)[1] / step, (after - leave)[1] / step  # m/s along the court
        assert abs(went) > 8 and np.sign(went) == 1 - 2 * stroke.side  # towards the other side
        assert came == 0 if stroke.feed else np.sign(came) == -np.sign(went)
    for stroke in strokes:  # between contacts: over the net, down on the other half, never below ground
        path, alive = ball_at([stroke], np.arange(stroke.time_s, stroke.end_s, 0.005))
        path = path[alive]  # (N, 3)
        assert path[:, 2].min() > -1e-6
        assert path[np.abs(path[:, 1]).argmin(), 2] > 0.914
        first = np.flatnonzero(path[:, 2] < 0.15)[0]
        assert 4 < path[first, 1] * (1 - 2 * stroke.side) < rally_play.BASELINE


def test_flight_obeys_gravity_and_drag():
    table = rally_play.flight_table()
    speed = np.hypot(np.diff(table["along"][:, :3]), np.diff(table["height"][:, :3])) / rally_play.DT  # (F, 2) m/s
    along = np.diff(table["along"][:, :3]) / rally_play.DT
    rise = np.diff(table["height"][:, :3]) / rally_play.DT
    np.testing.assert_allclose(
        np.diff(along) / rally_play.DT, -rally_play.DRAG * speed[:, :1] * along[:, :1], rtol=0.05
    )
    fall = -rally_play.GRAVITY - rally_play.DRAG * speed[:, :1] * rise[:, :1]
    np.testing.assert_allclose(np.diff(rise) / rally_play.DT, fall, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("kind", ["any", "near"])
def test_one_contact_anywhere_in_the_clip(undrawn, kind):
    clips, peaks = Rally(240, seed=7, peak=kind), []
    for item in (clips[i] for i in range(240)):
        rows = item["events"][item["events"][:, 0] >= 0]
        mine = rows if kind == "any" else rows[rows[:, 1] == 1]
        assert len(mine) == 1 and mine[0, 0] == item["peak"]
        assert mine[0, 2] == item["lo"] and mine[0, 3] == item["hi"]
        peaks.append(int(item["peak"]))
    share = np.bincount(np.array(peaks) // 8, minlength=8) / 240
    assert share.min() > 0.06 and share.max() < 0.2  # evenly over the clip (0.125 +- 3 standard errors)
    assert min(peaks) <= 1 and max(peaks) >= 62


@pytest.mark.parametrize("kind", ["any", "near"])
def test_share_without_contact(undrawn, kind):
    clips = Rally(150, seed=9, peak=kind, no_peak=0.3)
    items = [clips[i] for i in range(150)]
    none = [item for item in items if item["peak"] == -1]
    assert 0.19 < len(none) / 150 < 0.41
    for item in none:
        assert item["lo"] == item["hi"] == -1
        assert not (item["events"][:, 1] > 0 if kind == "any" else item["events"][:, 1] == 1).any()


def test_shuffled_frames_take_their_label_along():
    plain, mixed = Rally(3, seed=5, size=(24, 24)), Rally(3, seed=5, size=(24, 24), shuffle_frames=True)
    for i in range(3):
        a, b = plain[i], mixed[i]
        assert torch.equal(a["frames"][a["peak"]], b["frames"][b["peak"]])
        assert not torch.equal(a["frames"], b["frames"])
        assert torch.equal(a["frames"].sum((1, 2, 3)).sort().values, b["frames"].sum((1, 2, 3)).sort().values)
        assert b["peak"] in b["events"][:, 0] and (a["events"][:, 1] == b["events"][:, 1]).all()


def test_ball_is_hidden_around_contacts_and_elsewhere():
    level, offsets, elsewhere = LEVELS["easy"], [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        strokes = play(rng, 20)
        hidden = hide(rng, strokes, level, 0.0, 25.0, 600)
        near = np.zeros(600, bool)
        for event in contacts(strokes, 0.0, 25.0, 590):
            begin = end = event["frame"]
            while hidden[begin - 1]:
                begin -= 1
            while hidden[end + 1]:
                end += 1
            assert hidden[event["frame"]] and level.hidden[0] <= end - begin + 1 <= level.hidden[1]
            offsets.append(event["frame"] - (begin + end) / 2)
            near[begin : end + 1] = True
        elsewhere += (hidden & ~near).sum()
    assert np.abs(offsets).max() >= 2 and np.std(offsets) > 0.7 and abs(np.mean(offsets)) < 0.3  # not in the middle
    assert elsewhere > 0.4 * 6 * len(offsets)


def test_hidden_ball_leaves_no_trace_in_the_picture(monkeypatch):
    """A larger ball changes the frames that show it, and no hidden one."""
    small = render_rally(2, 64, (48, 48), fps=25)[0].astype(int)
    monkeypatch.setitem(LEVELS, "easy", replace(LEVELS["easy"], ball_m=0.6))
    large, events = render_rally(2, 64, (48, 48), fps=25)
    changed = np.abs(small - large).max((1, 2, 3)) > 0
    assert len(events) > 0 and changed.mean() > 0.3
    assert not any(changed[event["frame"] - 1 : event["frame"] + 2].any() for event in events)


def test_swings_are_early_or_late_and_some_meet_no_ball():
    rng = np.random.default_rng(0)
    strokes, times_s = play(rng, 200), np.arange(0, 200, 0.005)
    players = rally_play.act(rng, strokes, LEVELS["easy"], times_s)
    for side, player in enumerate(players):
        strikes = times_s[1:][(player["swing"][:-1] < 0) & (player["swing"][1:] >= 0)]
        strikes = strikes[np.diff(strikes, prepend=-1) > 0.3]
        own = np.array([s.time_s for s in strokes if s.side == side and s.time_s < 199])
        gap = np.abs(own[:, None] - strikes).min(1)
        limit = LEVELS["easy"].early_late_s
        assert gap.max() < limit + 0.02 and gap.max() > 0.7 * limit
        assert (np.abs(strikes[:, None] - own).min(1) > 0.5).mean() > 0.15  # swings without a ball


def test_video_and_labels_agree(tmp_path):
    item = write_rally_video(tmp_path / "rally.mp4", seed=4, seconds=4, size=(64, 48), fps=25)
    frames, events = render_rally(4, 100, (64, 48), fps=25)
    assert events and item["events"] == events and item["num_frames"] == 100 == len(frames)
    assert events == sorted(events, key=lambda e: e["frame"]) and {e["label"] for e in events} <= set(rally.LABELS)
    assert load_labels(tmp_path / "rally.json")[0]["events"] == events
    with VideoReader(tmp_path / "rally.mp4") as video:
        assert len(video) == 100
        seen = video.read([0, 99])
    assert np.abs(seen.astype(int) - frames[[0, 99]]).mean() < 6  # lossy, but the same pictures


def test_odd_sizes_aspect_and_the_hard_level():
    frames, _ = render_rally(1, 70, (50, 33), level="hard", aspect=16 / 9)
    assert frames.shape == (70, 33, 50, 3) and frames.dtype == np.uint8
    assert frames.std() > 15


@pytest.mark.parametrize("wrong", [{"peak": "far"}, {"no_peak": 1.5}, {"level": "medium"}, {"n": 0}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Rally(**{"n": 4, "seed": 0, **wrong})
