"""models/ball_follow.py on scripted candidates: gate, duplicates, jumps, whom to believe, clicks, several scales."""

import numpy as np
import pytest

from models.ball_candidates import Candidate, Motion
from models.ball_follow import LOST, SEARCH, TRACK, FollowConfig, Follower
from models.ball_offline import offline_track
from utils.ball_path import detector_path

W, H = 1280, 720


def ball(x, y, score=0.9, area=80) -> Candidate:
    return Candidate(x, y, score, area, (x - 5, y - 5, x + 5, y + 5))


GONE = Candidate(float("nan"), float("nan"), 0.01, 0)  # what a tracker answers for an object that is not there


def flight(t: int) -> tuple[float, float]:
    return 200 + 14 * t, 300 - 9 * t + 0.5 * t * t


def follow(frames, tracked=None, **changes):
    """frames: per frame a list of candidates -> (follower, decisions, points with what was put right later)."""
    follower, made = Follower(FollowConfig(**changes), W, H), []
    for t, candidates in enumerate(frames):
        made.append(follower.step(t, candidates, None if tracked is None else tracked[t]))
    points = [m.point for m in made]
    for m in [*made, follower.finish(len(frames) - 1)]:
        for k, point in m.revise.items():
            points[k] = point
    return follower, made, points


def places(points):
    return [None if p.x is None else (p.x, p.y) for p in points]


def test_a_better_distractor_outside_the_gate_is_not_chosen():
    """Not even in turn with other ones; inside the gate the one near the expected place wins."""
    frames = [[ball(*flight(t), 0.6)] for t in range(20)]
    for t in range(6, 20, 2):
        frames[t].insert(0, ball(1000 - 40 * t, 600, 0.99))
    frames[11].append(ball(flight(11)[0] + 60, flight(11)[1], 0.7))
    _, made, points = follow(frames, new_thr=0.6)
    assert places(points) == [flight(t) for t in range(20)] and all(m.state == TRACK for m in made)


def test_duplicates_give_one_track():
    frames = [[ball(*flight(t), 0.8), ball(*flight(t), 0.79), ball(*flight(t), 0.78)] for t in range(12)]
    _, _, points = follow(frames)
    assert places(points) == [flight(t) for t in range(12)] and {p.obj_id for p in points} == {1}


def test_a_jump_of_one_frame_is_rejected_and_filled_offline():
    frames = [[ball(*flight(t))] for t in range(15)]
    frames[7] = [ball(1100, 650, 0.95)]
    _, made, points = follow(frames)
    assert points[7].x is None and made[7].state == LOST and made[8].state == TRACK
    rows = [np.array([[c.x, c.y, c.score, c.area, *c.box, 0] for c in f]) for f in frames]
    track = offline_track(rows, W, detector_path(birth_cost=0.97), "tennis ball")
    assert (track.frames[7].source, track.frames[7].visible) == ("interp", False)
    assert np.hypot(*(track.xy(filled=True)[7] - flight(7))) < 2 and np.isnan(track.xy()[7]).all()
    assert sum(p.source == "interp" for p in track.frames) == 1 and track.frames[6].x_s is not None


def test_thresholds_and_empty_masks():
    """Begins at new_thr, goes on at score_thr; the frames that led there are reported belatedly."""
    scores = [0.3, 0.55, 0.6, 0.75, 0.55, 0.45, 0.55]
    _, made, points = follow([[ball(*flight(t), s)] for t, s in enumerate(scores)], keep=1.0)
    assert [m.state for m in made] == [SEARCH, SEARCH, SEARCH, TRACK, TRACK, LOST, TRACK]
    assert [p.score for p in points] == [None, 0.55, 0.6, 0.75, 0.55, None, 0.55]
    _, made, _ = follow([[Candidate.from_mask(np.zeros((H, W), bool), 0.99)]] * 3)
    assert {m.state for m in made} == {SEARCH}


def test_weak_detections_carry_a_track_but_begin_none():
    """Half of score_thr is enough near the object, up to 3 frames after it was seen; a better one goes before."""
    frames = [[ball(*flight(t), 0.8 if t < 6 else 0.3)] for t in range(12)]
    assert places(follow(frames)[2]) == [flight(t) for t in range(12)]
    assert {m.state for m in follow(frames[6:])[1]} == {SEARCH}
    assert places(follow([*frames[:6], [], [], [], [], *frames[10:]])[2])[-1] is None
    assert places(follow([*frames[:6], [], [], *frames[8:]])[2])[-1] == flight(11)
    x, y = flight(8)
    frames[8] = [ball(x, y, 0.3), ball(x + 40, y, 0.6)]
    assert follow(frames)[2][8].x == x + 40
    frames[8] = [ball(x + 150, y, 0.3)]
    assert follow(frames)[2][8].x is None


def test_the_gate_grows_with_the_gap():
    """Hidden for 6 frames, then seen where only a grown gate reaches: taken in the first frame, the tracker seeded."""
    frames = [[ball(*flight(t))] if not 10 <= t < 16 else [] for t in range(20)]
    frames[16:] = [[ball(flight(9)[0] + 200 + 5 * k, 500)] for k in range(4)]
    _, made, points = follow(frames)
    assert [p.x is None for p in points[9:17]] == [False] + 6 * [True] + [False]
    assert made[16].seed is frames[16][0] and made[16].events[0]["reason"] == "found again after 6 frames"
    assert made[16].events[0]["state"] == TRACK
    assert made[10].events[0]["state"] == LOST and all(m.seed is None or m.state == TRACK for m in made)


def test_outside_the_gate_two_frames_in_a_row_make_a_new_start():
    frames = [[ball(*flight(t))] for t in range(10)] + [[ball(1100 - 5 * k, 80, 0.8)] for k in range(5)]
    _, made, points = follow(frames)
    assert places(made[k].point for k in (10, 11)) == [None, (1095, 80)] and made[11].forget
    assert places(points)[10:] == [(1100 - 5 * k, 80) for k in range(5)]  # its first frame, belatedly
    weak = [[ball(c.x, c.y, 0.6) for c in f] if t >= 10 else f for t, f in enumerate(frames)]
    assert places(follow(weak)[2])[10:] == 5 * [None]  # below new_thr it begins nothing
    alike = [[ball(c.x, c.y, 0.6) for c in f] for f in frames]  # unless the object scored no better
    assert places(follow(alike)[2])[9:] == [flight(9)] + [(1100 - 5 * k, 80) for k in range(5)]
    assert places(follow(alike[:13])[2])[10:] == 3 * [None]


def test_after_a_long_gap_the_gate_is_the_picture():
    frames = [[ball(*flight(t))] for t in range(10)] + [[]] * 30 + [[ball(1200, 700, 0.6)], [ball(1200, 700, 0.8)]]
    _, _, points = follow(frames)
    assert places(points)[-3:] == [None, None, (1200, 700)]


def test_many_weak_detections_on_a_way_begin_a_track():
    """Scores between score_thr and new_thr for 4 frames, reported from the first one on; what rests begins nothing."""
    frames = [[ball(*flight(t), 0.5 + 0.04 * (t % 5))] for t in range(12)]
    _, made, points = follow(frames)
    assert places(points) == [flight(t) for t in range(12)] and [m.state for m in made[:4]] == 3 * [SEARCH] + [TRACK]
    frames[2] = [ball(*flight(2), 0.3)]  # half of score_thr: the row goes on
    assert places(follow(frames)[2]) == [flight(t) for t in range(12)] and follow(frames)[1][3].state == SEARCH
    frames[0] = [ball(*flight(0), 0.3)]  # but does not begin with it
    assert places(follow(frames)[2]) == [None] + [flight(t) for t in range(1, 12)]
    assert places(follow([[ball(900, 600, 0.6)]] * 12)[2]) == 12 * [None]
    assert places(follow(frames, persist=0)[2]) == 12 * [None]
    far = [[ball(*flight(t))] for t in range(6)] + [[]] * 31 + [[ball(900 + 9 * t, 80, 0.6)] for t in range(6)]
    _, made, points = follow(far)
    assert places(points)[-6:] == [(900 + 9 * t, 80) for t in range(6)] and made[40].events[0]["state"] == TRACK


def test_what_stood_beside_is_not_taken_for_the_object():
    """A ball lies on the court, in reach; the played ball vanishes behind a player for 8 frames."""

    def lying(t):
        return [ball(420, 210, 0.95)] if t else []

    frames = [([ball(*flight(t))] if not 12 <= t < 20 else []) + lying(t) for t in range(26)]
    _, _, points = follow(frames, challenge=0)
    assert [p.x is None for p in points] == [12 <= t < 20 for t in range(26)]
    alone = [[c for c in f if c.x != 420] if t < 12 else f for t, f in enumerate(frames)]
    assert follow(alone, challenge=0)[2][12].x == 420  # never seen beside: it may be the ball


def test_a_wrong_start_gives_way_to_what_scores_better():
    still = [[ball(900, 600, 0.72)] for _ in range(6)]
    frames = still + [[ball(900, 600, 0.72), ball(*flight(t), 0.95)] for t in range(6, 24)]
    _, made, points = follow(frames)
    assert places(points)[13:] == [flight(t) for t in range(13, 24)] and any(m.forget for m in made)
    assert places(follow(frames, challenge=0)[2])[-1] == (900, 600)


def test_a_resting_ball_gives_way_to_a_flying_one_but_not_the_reverse():
    frames = [[ball(*flight(t), 0.7), ball(900, 600, 0.95)] for t in range(40)]
    assert places(follow([[frames[0][0]], *frames[1:]])[2]) == [flight(t) for t in range(40)]
    points = follow(frames)[2]  # the resting one is seen better, so it comes first
    assert places(points)[0] == (900, 600) and places(points)[30:] == [flight(t) for t in range(30, 40)]
    assert set(places(follow(frames, lively=0.0)[2])) == {(900, 600)}


def test_areas_that_jump_are_rejected():
    frames = [[ball(*flight(t), area=2000 if t == 8 else 80)] for t in range(12)]
    assert [p.x is None for p in follow(frames)[2]] == [t == 8 for t in range(12)]
    tiny = [[ball(*flight(t), area=1 if t % 2 else 9)] for t in range(12)]  # of few pixels areas say nothing
    assert not [p for p in follow(tiny)[2] if p.x is None]


def test_a_start_of_one_frame_is_taken_back():
    frames = [[ball(100, 100)], *[[]] * 3, *[[ball(*flight(t))] for t in range(4, 30)]]
    frames[4:] = [[ball(c[0].x + 500, c[0].y)] for c in frames[4:]]
    _, made, points = follow(frames, gate=0.02)
    assert made[0].point.x == 100 and points[0].x is None and "taken back" in str([m.events for m in made])
    assert follow(frames, gate=0.02, min_points=1)[2][0].x == 100
    assert follow([[ball(100, 100)]])[2][0].x == 100  # the last frame of a video proves nothing


# ---- the tracker's word


def gaps(missing, n=60, right=True):
    """Frames with a detection except in `missing`, and a tracker that is right, or stays where it is."""
    frames = [[] if t in missing else [ball(*flight(t))] for t in range(n)]
    tracked = [ball(*(flight(t) if right else (300, 300)), 0.98) for t in range(n)]
    return frames, tracked


def test_a_trusted_tracker_carries_where_the_detector_is_known_to_miss():
    """Single misses are learnt; from then on the tracker fills gaps, and says so."""
    missing = {t for t in range(8, 60, 4)} | {41, 42}
    frames, tracked = gaps(missing)
    _, made, points = follow(frames, tracked)
    assert points[8].x is None  # nothing was known of the detector's misses yet
    assert {points[t].source for t in missing if t > 20} == {"tracker"}
    assert places(points)[20:] == [flight(t) for t in range(20, 60)]
    assert points[24].score == 0.98 and points[24].det_score is None and points[24].trk_score == 0.98
    always = follow(frames, tracked, hit_rate=1.5, silence=0.0)[2]
    assert places(always) == [flight(t) for t in range(60)]
    assert {t for t, p in enumerate(follow(frames, tracked, bridge=0)[2]) if p.x is None} == missing


def test_a_tracker_that_was_wrong_carries_nothing():
    frames, tracked = gaps({t for t in range(8, 60, 4)}, right=False)
    _, made, points = follow(frames, tracked, hit_rate=1.5, silence=0.0)
    assert {p.source for p in points} == {"detector", None}
    assert any("not trusted" in e["reason"] for m in made for e in m.events)


def test_silence_of_a_detector_that_never_missed_is_believed():
    """The tracker stays where the object vanished and says it is there, in four gaps: nothing is reported in any."""
    hidden = {t for k in range(4) for t in range(14 + 20 * k, 20 + 20 * k)}
    frames = [[] if t in hidden else [ball(400 + t / 4, 300)] for t in range(100)]  # slow: agrees when it is back
    tracked = [ball(400 + t / 4, 300, 0.95) for t in range(100)]
    _, made, points = follow(frames, tracked)
    assert {t for t, p in enumerate(points) if p.x is None} == hidden
    assert any("detector believed" in e["reason"] for m in made for e in m.events)


def test_a_tracker_that_says_when_the_object_is_gone_is_believed_later():
    """It was silent in a first gap, so its word counts in the next one, where the detector fails for 9 frames."""
    gone, missed = set(range(20, 28)), set(range(50, 59))
    frames = [[] if t in gone | missed else [ball(*flight(t))] for t in range(70)]
    tracked = [GONE if t in gone else ball(*flight(t), 0.98) for t in range(70)]
    points = follow(frames, tracked)[2]
    assert {t for t, p in enumerate(points) if p.x is None} == gone
    assert {points[t].source for t in missed} == {"tracker"}
    assert {t for t, p in enumerate(follow(frames, tracked, bridge=4)[2]) if p.x is None} == gone | set(range(54, 59))


def test_a_trusted_tracker_votes_between_detections():
    """Two in the gate: the tracker's choice wins unless the other scores clearly better."""
    frames = [[ball(*flight(t))] for t in range(12)]
    x, y = flight(12)
    frames.append([ball(x - 30, y, 0.80), ball(x + 30, y, 0.70)])
    tracked = [ball(*flight(t), 0.98) for t in range(12)] + [ball(x + 30, y, 0.98)]
    assert follow(frames, tracked)[2][12].x == x + 30 and follow(frames)[2][12].x == x - 30


def test_seeds_only_where_the_tracker_disagrees():
    frames, tracked = gaps(set(), 20)
    tracked[0] = None
    seeds = [t for t, m in enumerate(follow(frames, tracked)[1]) if m.seed is not None]
    assert seeds == [0]
    tracked[10] = ball(10, 10, 0.9)
    assert [t for t, m in enumerate(follow(frames, tracked)[1]) if m.seed is not None] == [0, 10]


# ---- clicks


def test_a_click_makes_a_new_start():
    follower, _, _ = follow([[ball(*flight(t))] for t in range(10)])
    other = ball(1000, 100, 0.4)
    made = follower.correct(10, other, "detector", other, None)
    assert (made.point.x, made.forget, made.seed) == (1000, True, other) and made.events[0]["reason"].startswith("corr")
    assert follower.step(11, [ball(*flight(11)), ball(1004, 104, 0.6)]).point.x == 1004


def test_a_refusal_ends_the_track_and_is_remembered():
    follower, _, _ = follow([[ball(300, 300), ball(900, 500, 0.72)] for _ in range(4)])
    made = follower.refuse(4, 300, 300)
    assert made.point.x is None and made.state == LOST and made.forget
    points = [follower.step(t, [ball(300, 300), ball(900, 500, 0.72)]).point for t in range(5, 8)]
    assert [p.x for p in points] == [None, 900, 900]


# ---- parts


@pytest.mark.parametrize("width", [128, 640, 1280, 3840])
def test_every_width_is_followed_alike(width):
    """The same flight, distractor and gap at other sizes: the same frames are reported."""
    scale = width / W
    follower = Follower(FollowConfig(gate_min=0), width, round(H * scale))
    found = []
    for t in range(30):
        candidates = [ball(v[0] * scale, v[1] * scale) for v in ([flight(t)] if not 12 <= t < 17 else [])]
        candidates += [ball(1150 * scale, 20 * scale, 0.95)] if t == 14 else []
        found.append(follower.step(t, candidates).point.x is None)
    assert found == [12 <= t < 17 for t in range(30)]


def test_small_frames_keep_a_gate_that_a_ball_cannot_leave():
    """128 px wide, 8 px a frame, and a wall that turns it round: every frame is reported."""
    xs = [10 + 8 * t for t in range(12)]
    xs += xs[-2::-1]
    follower = Follower(FollowConfig(), 128, 96)
    assert all(follower.step(t, [ball(x, 40, area=20)]).point.x == x for t, x in enumerate(xs))


def test_motion_foresees_a_parabola():
    """After 8 frames of free fall the next place is known to 0.5 px; far ahead it is not extrapolated without end."""
    motion = Motion(100, 100, 0, noise=0.5, jerk=12.8, speed=96)
    for t in range(1, 9):
        motion.update(100 + 12 * t, 100 - 20 * t + t * t, t)
    assert np.hypot(*np.subtract(motion.place(9), (208, 1))) < 0.5
    assert motion.place(8 + Motion.LIMIT) == motion.place(500)


def test_candidates_of_masks():
    mask = np.zeros((20, 30), bool)
    mask[4:7, 10:15] = True
    c = Candidate.from_mask(mask, np.float32(0.5))
    assert (c.x, c.y, c.area, c.box) == (12, 5, 15, (10, 4, 14, 6)) and type(c.score) is float
    assert c.covers(14.4, 6.4) and not c.covers(15, 6) and not c.covers(-3, 5) and c.bare().mask is None
    assert Candidate.from_mask(mask & False, 0.5).area == 0


@pytest.mark.parametrize("wrong", [{"score_thr": 0.8}, {"trust": 1.5}, {"confirm": 0}, {"gate": 0}, {"bridge": -1}])
def test_rules_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="FollowConfig"):
        FollowConfig(**wrong)


def test_memory_is_bounded():
    """600 frames with 30 things that come and go: what a follower keeps does not grow, and holds no old masks."""
    follower, rng, sizes = Follower(FollowConfig(), W, H), np.random.default_rng(0), []
    mask = np.ones((4, 4), bool)
    for t in range(600):
        candidates = [ball(640 + 300 * np.sin(t / 40), 360)] * (t % 50 < 40)
        candidates += [ball(*rng.uniform(0, 700, 2)) for _ in range(30)]
        for c in candidates:
            c.mask = mask
        follower.step(t, candidates)
        rows = [c for o in follower.others for c in o.row.values()]
        sizes.append(len(rows) + len(follower.others) + len(follower.claims) + len(follower.chain))
        assert sum(c.mask is not None for c in rows) <= 31
    assert max(sizes[300:]) <= max(sizes[100:300]) * 1.1
