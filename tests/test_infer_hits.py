"""utils/hits.py on paths by hand and on rendered rallies, and eval/infer_hits.py called in process."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from data.peak_files import load_predictions
from data.rally import contacts
from data.rally_pictures import aim_camera
from data.rally_play import LEVELS, ball_at, play
from data.video import VideoWriter
from utils import run
from utils.hits import NAMES, HitConfig, as_path, find_turns, name_turns
from utils.track_files import Point, Track, Tracks, write_tracks

ROOT = Path(__file__).resolve().parents[1]
WIDTH, FPS = 1280, 30.0


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turns(xy: np.ndarray, repeats=()) -> list:
    return find_turns(as_path(xy, WIDTH, FPS, HitConfig(), repeats), WIDTH, FPS, HitConfig())


def flight(*legs: tuple[int, float, float], start=(640.0, 600.0), gravity=1.2) -> np.ndarray:
    """Legs of (frames, vx, vy) px a frame, each a parabola; the first point is `start`."""
    points = [np.array(start)]
    for n, vx, vy in legs:
        k = np.arange(1, n + 1)
        points += list(points[-1] + np.stack([vx * k, vy * k + gravity * k**2 / 2], 1))
    return np.array(points)


RALLY = flight((20, 8, -24), (12, 6, -11), (20, -7, 5), (11, -6, 2), (20, 4, -34))


def names(events: list[dict]) -> list[tuple[int, str]]:
    return [(e["frame"], e["label"]) for e in events]


def test_rally_by_hand():
    """Near player hits, bounce far, far player returns, bounce near, near player hits."""
    xy = RALLY
    want = [(20, NAMES[3]), (32, NAMES[1]), (52, NAMES[2]), (63, NAMES[0])]
    assert names(name_turns(xy, WIDTH, FPS)) == want
    assert all(0 < e["score"] < 1 for e in name_turns(xy, WIDTH, FPS))
    assert names(name_turns(1.5 * xy, 1920, FPS)) == want  # another size, the same play
    mirrored = xy * [-1, 1] + [WIDTH, 0]
    assert names(name_turns(mirrored, WIDTH, FPS)) == want
    holes = xy.copy()
    holes[[5, 19, 20, 33, 41, 62]] = np.nan
    assert [n for _, n in names(name_turns(holes, WIDTH, FPS))] == [n for _, n in want]
    slow = np.repeat(xy, 2, axis=0)[::2]
    assert names(name_turns(slow, WIDTH, FPS)) == want


def test_repeated_pictures_take_no_time():
    """25 fps shown at 30: every sixth frame is the one before, copied or found again with an error."""
    source = np.arange(len(RALLY) * 6 // 5) * 5 // 6
    shown, repeats = RALLY[source], [t for t in range(1, len(source)) if source[t] == source[t - 1]]
    want = [NAMES[3], NAMES[1], NAMES[2], NAMES[0]]
    copied = name_turns(shown, WIDTH, FPS)
    assert [e["label"] for e in copied] == want
    assert [abs(source[e["frame"]] - t) <= 1 for e, t in zip(copied, (20, 32, 52, 63), strict=True)] == [True] * 4
    noisy = shown + np.random.default_rng(0).normal(0, 0.3, shown.shape)
    assert [e["label"] for e in name_turns(noisy, WIDTH, FPS, repeats=repeats)] == want


def test_smooth_paths_have_no_turn():
    assert turns(flight((60, 5, -14))) == []
    still = np.full((60, 2), 300.0) + np.random.default_rng(1).normal(0, 1, (60, 2))
    assert turns(still) == [] and name_turns(still, WIDTH, FPS) == []
    assert name_turns(np.full((9, 2), np.nan), WIDTH, FPS) == name_turns(np.zeros((0, 2)), WIDTH, FPS) == []
    assert name_turns(np.zeros((1, 2)), WIDTH, FPS) == []
    with pytest.raises(ValueError, match="expected"):
        name_turns(np.zeros((3, 3)), WIDTH, FPS)


def test_a_contact_needs_a_flight_across_the_court():
    """A kink on the way (wind, a wrong position) and the bounce after it are no two contacts 10 frames apart."""
    xy = flight((22, 2, -24), (10, 1, 6), (10, 1, -10), (24, -7, 5), (10, -6, 2), (18, 4, -34))
    assert names(name_turns(xy, WIDTH, FPS)) == [(32, NAMES[3]), (42, NAMES[1]), (66, NAMES[2]), (76, NAMES[0])]


def test_a_jump_to_another_thing_is_no_hit():
    xy = flight((40, 5, -14))
    xy[20:] += [500, 0]  # no ball is that fast
    assert name_turns(xy, WIDTH, FPS) == []


def rally(seed: int, fps: float, noise: float, seconds: float = 30) -> tuple[np.ndarray, list[dict]]:
    """A rally as a tracker would see it at 1280x720: path with noise and drop-outs, and its contacts."""
    rng = np.random.default_rng([seed, 11])
    strokes, T = play(rng, seconds), int(seconds * fps)
    times = np.arange(T) / fps
    places, alive = ball_at(strokes, times)
    xy = aim_camera(rng, 16 / 9, LEVELS["easy"], times).see(places)[0] * 720 + rng.normal(0, noise, (T, 2))
    xy[~alive | (rng.random(T) < 0.05)] = np.nan
    return xy, contacts(strokes, 0.0, fps, T)


@pytest.mark.parametrize("fps, noise, least", [(30.0, 0.3, 0.75), (50.0, 0.5, 0.75), (25.0, 0.3, 0.7)])
def test_contacts_of_unseen_rallies(fps, noise, least, capsys):
    """Precision and recall of contacts, near told from far, within 2 frames."""
    right = predicted = there = 0
    for seed in range(300, 303):
        xy, truth = rally(seed, fps, noise)
        found = [e for e in name_turns(xy, WIDTH, fps) if e["label"] in NAMES[:2]]
        free = list(found)
        for t in truth:
            near = [e for e in free if e["label"] == t["label"] and abs(e["frame"] - t["frame"]) <= 2]
            right += bool(near)
            free = [e for e in free if e not in near[:1]]
        predicted, there = predicted + len(found), there + len(truth)
    with capsys.disabled():
        print(
            f"\ncontacts at {fps:g} fps: precision {right / predicted:.2f}, recall {right / there:.2f} of {there}",
            end="",
        )
    assert right / predicted >= least and right / there >= least


# ---- the script


def ball_csv(path: Path) -> Path:
    rows = [f"{t:04d}.jpg,1,{x:.2f},{y:.2f},0" for t, (x, y) in enumerate(RALLY / 4)]
    path.write_text("\n".join(["file name,visibility,x-coordinate,y-coordinate,status", *rows]))
    return path


def video(path: Path, n: int) -> Path:
    with VideoWriter(path, 30, size=(320, 180)) as out:
        for t in range(n):
            frame = np.zeros((180, 320, 3), np.uint8)
            frame[:, 3 * t : 3 * t + 20] = 200
            out.write(frame)
    return path


def test_script_on_tracks_and_scoring(tmp_path, capsys):
    points = [Point(float(x), float(y), source="detector", visible=True, score=0.9) for x, y in RALLY]
    about = {"path": "clips/m.mp4", "width": 1280, "height": 720, "fps": 30.0, "num_frames": len(RALLY), "sha1": ""}
    write_tracks(tmp_path / "tracks.json", Tracks(about, {"kind": "test"}, {"ball": Track("ball", "single", points)}))
    main = script("infer_hits").main
    assert run.cli(main, [str(tmp_path / "tracks.json"), "--out", str(tmp_path / "hits")]) == 0
    (item,) = load_predictions(tmp_path / "hits" / "peaks.json")
    assert item["video"] == "m" and names(item["events"])[1] == (32, "far_court_swing") and len(item["events"]) == 4
    assert "far_court_swing" in (tmp_path / "hits" / "peaks.csv").read_text()
    meta = json.loads((tmp_path / "hits" / "peaks.json.meta.json").read_text())
    assert meta["settings"]["turns"]["window_s"] == HitConfig().window_s and len(meta["inputs"][0]["sha256"]) == 64
    truth = [{k: v for k, v in item.items() if k != "events"} | {"events": [{"frame": 32, "label": "far_court_swing"}]}]
    (tmp_path / "labels.json").write_text(json.dumps(truth))
    argv = ["--pred", str(tmp_path / "hits" / "peaks.json"), "--labels", str(tmp_path / "labels.json")]
    assert run.cli(script("eval_peaks").main, [*argv, "--classes", "far_court_swing"]) == 0
    assert "recall 1.000" in capsys.readouterr().out
    assert run.cli(main, [str(tmp_path / "tracks.json"), "--out", str(tmp_path / "hits")]) == 2  # never overwritten
    assert run.cli(main, [str(tmp_path / "tracks.json"), "--out", str(tmp_path / "c"), "--contacts"]) == 0
    assert [n for _, n in names(load_predictions(tmp_path / "c" / "peaks.json")[0]["events"])] == [NAMES[1], NAMES[0]]


def test_script_on_csv(tmp_path, capsys):
    main, track = script("infer_hits").main, str(ball_csv(tmp_path / "b.csv"))
    out = ["--out", str(tmp_path / "hits")]
    assert run.cli(main, [track, *out]) == 2 and "pass the file with --video" in capsys.readouterr().err
    assert run.cli(main, [track, *out, "--video", str(video(tmp_path / "short.mp4", 5))]) == 2
    assert "names frame 83, " in capsys.readouterr().err and not (tmp_path / "hits").exists()
    assert (
        run.cli(main, [track, track, *out, "--video", "a.mp4"]) == 2 and "expected one each" in capsys.readouterr().err
    )
    assert run.cli(main, [track, *out, "--video", str(video(tmp_path / "long.mp4", len(RALLY) + 3))]) == 0
    (item,) = load_predictions(tmp_path / "hits" / "peaks.json")
    assert item["video"] == "long" and item["num_frames"] == len(RALLY) + 3 and len(item["events"]) == 4
