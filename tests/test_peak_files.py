"""data/peak_files.py: reading, refusing, writing; the statistics of the real label files (LAB_SHARED)."""

import copy
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from data import peak_files
from utils.run import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "tempopeak"


def label_list() -> list[dict]:
    one = {"video": "a", "num_frames": 100, "fps": 29.97, "width": 64, "height": 48, "complete_for": ["hit"]}
    events = [{"frame": 10, "label": "hit", "lo": 9, "hi": 11, "comment": "x"}, {"frame": 50, "label": "bounce"}]
    return [{**one, "events": events}, {**one, "video": "b", "fps": -1, "events": []}]


def prediction_list() -> list[dict]:
    r = random.Random(0)
    videos = copy.deepcopy(label_list())
    for v in videos:
        v["events"] = [{"frame": r.randrange(100), "label": "hit", "score": r.random()} for _ in range(20)]
    videos[0]["events"][3]["frame"] = 12.25  # sub-frame
    videos[0]["events"][4]["time_s"] = 1 / 3  # a video of varying frame spacing
    return videos


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_labels_come_back_as_written(tmp_path):
    labels = label_list()
    labels[0]["num_events"] = 2
    got = peak_files.load_labels(write(tmp_path / "l.json", labels))
    assert got == label_list()
    assert peak_files.class_names(got) == ["bounce", "hit"]


FAULTS = {  # what is changed -> words of the sentence
    "not json": ("[{", "is not json"),
    "not a list": ({"video": "a"}, "non-empty json list"),
    "empty": ([], "non-empty json list"),
    "no name": ([{"num_frames": 3}], "item 0 has no key 'video'"),
    "key missing": ("del num_frames", "video 'a': key 'num_frames' is missing"),
    "events missing": ("del events", "video 'a': key 'events' is missing"),
    "fps zero": ({"fps": 0}, "video 'a': fps must be"),
    "fps nan": ({"fps": float("nan")}, "video 'a': fps must be"),
    "frames as text": ({"num_frames": "100"}, "num_frames must be an integer"),
    "events no list": ({"events": {}}, "events must be a list"),
    "complete_for": ({"complete_for": "hit"}, "complete_for must be a list"),
    "frame negative": ({"frame": -1}, "event 0: frame -1 is outside [0, 100)"),
    "frame at end": ({"frame": 100, "hi": 100}, "event 0: frame 100 is outside [0, 100)"),
    "frame fraction": ({"frame": 9.5}, "event 0: frame must be an integer"),
    "frame bool": ({"frame": True}, "event 0: frame must be an integer"),
    "label empty": ({"label": ""}, "event 0: label must be a class name"),
    "lo above": ({"lo": 11}, "event 0: needs 0 <= lo <= frame <= hi"),
    "hi below": ({"hi": 9}, "event 0: needs 0 <= lo <= frame <= hi"),
    "hi beyond": ({"hi": 100}, "event 0: needs 0 <= lo <= frame <= hi"),
    "twice": ("twice", "video 'a' stands in the file twice"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_labels_are_named(tmp_path, name):
    change, words = FAULTS[name]
    content = label_list()
    if isinstance(change, str) and change.startswith("del "):
        del content[0][change[4:]]
    elif change == "twice":
        content[1]["video"] = "a"
    elif isinstance(change, dict) and name != "not a list":
        (content[0] if set(change) <= set(content[0]) else content[0]["events"][0]).update(change)
    else:
        content = change
    path = write(tmp_path / "faulty.json", content)
    with pytest.raises(UserError) as error:
        peak_files.load_labels(path)
    assert str(path) in str(error.value) and words in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("score", [1.0000001, -0.1, float("nan"), float("inf"), None, "0.5"])
def test_score_outside_0_1_is_refused(tmp_path, score):
    content = prediction_list()
    content[0]["events"][2]["score"] = score
    with pytest.raises(UserError, match=r"video 'a', event 2: score must be a number in \[0, 1\]"):
        peak_files.load_predictions(write(tmp_path / "p.json", content))


def test_missing_files_and_labels_as_predictions_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: cannot be read"):
        peak_files.load_labels(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="event 0: key 'score' is missing .* is this a label file"):
        peak_files.load_predictions(write(tmp_path / "l.json", label_list()))


def test_predictions_as_e2e_spot_writes_them(tmp_path):
    """Only video, fps, events: no num_frames, width, height."""
    content = [{"video": "a", "fps": 25.0, "events": [{"frame": 3, "label": "hit", "score": 1.0}]}]
    assert peak_files.load_predictions(write(tmp_path / "p.json", content)) == content


def test_json_csv_json_loses_nothing(tmp_path):
    preds = prediction_list()
    preds[0]["events"][0]["label"] = 'odd, "quoted"\r\nlabel\u2028é'
    peak_files.write_predictions(tmp_path / "p.json", preds)
    again = peak_files.load_predictions(tmp_path / "p.json")
    assert again == preds
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))[0]["num_events"] == 20
    peak_files.write_csv(tmp_path / "p.csv", again)
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[0] == "video,frame,time_s,label,score"
    rows = peak_files.read_csv(tmp_path / "p.csv")
    assert [v["video"] for v in rows] == ["a", "b"]
    for got, want in zip(rows, preds, strict=True):
        assert [(e["frame"], e["label"], e["score"]) for e in got["events"]] == [
            (e["frame"], e["label"], e["score"]) for e in want["events"]
        ]
        assert [type(e["frame"]) for e in got["events"]] == [type(e["frame"]) for e in want["events"]]
    assert rows[0]["events"][4]["time_s"] == 1 / 3
    assert rows[0]["events"][5]["time_s"] == preds[0]["events"][5]["frame"] / 29.97
    assert "time_s" not in rows[1]["events"][0]  # fps unknown
    for v, r in zip(preds, rows, strict=True):  # and back: the same csv, byte for byte
        r |= {"fps": v["fps"]}
    peak_files.write_csv(tmp_path / "q.csv", rows)
    assert (tmp_path / "q.csv").read_bytes() == (tmp_path / "p.csv").read_bytes()


@pytest.mark.parametrize(
    "text, words",
    [
        ("frame,label\n1,hit\n", "first line must be"),
        ("video,frame,time_s,label,score\na,x,,hit,0.5\n", "row 2: frame must be a number"),
        ("video,frame,time_s,label,score\na,1,,hit,nan\n", "row 2: score must be finite"),
        ("video,frame,time_s,label,score\na,1,,hit,1.5\n", "score in"),
        ("video,frame,time_s,label,score\na,1,,hit\n", "row 2 must hold"),
    ],
)
def test_faulty_csv_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        peak_files.read_csv(write(tmp_path / "f.csv", text))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    peak_files.write_predictions(tmp_path / "p.json", prediction_list())
    before = (tmp_path / "p.json").read_bytes()
    bad = prediction_list()
    bad[0]["events"][0]["score"] = float("nan")
    with pytest.raises(UserError, match="score"):
        peak_files.write_predictions(tmp_path / "p.json", bad)
    assert (tmp_path / "p.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_window_keeps_frame_numbers_and_half_open_borders():
    labels = label_list()
    assert [e["frame"] for e in peak_files.window(labels, 10, 50)[0]["events"]] == [10]
    assert [e["frame"] for e in peak_files.window(labels, 11)[0]["events"]] == [50]
    assert len(labels[0]["events"]) == 2 and peak_files.window(labels, 0)[0]["num_frames"] == 100
    with pytest.raises(UserError, match="START < STOP"):
        peak_files.window(labels, 5, 5)


def test_keep_classes_respects_complete_for():
    labels, preds = label_list(), prediction_list()
    preds[0]["events"][0]["label"] = "bounce"
    kept, kept_preds, dropped = peak_files.keep_classes(labels, preds, ["bounce", "hit"])
    assert [e["label"] for e in kept[0]["events"]] == ["hit"] and len(kept_preds[0]["events"]) == 19
    assert dropped == {"other classes": 0, "not complete, labels": 1, "not complete, predictions": 1}


def test_pairing_refuses_what_does_not_belong_together():
    labels, preds = label_list(), prediction_list()
    assert peak_files.pair_with_labels(preds[::-1], labels, "p") == preds
    for change, words in (
        ({"num_frames": 99}, "has 99 frames, in the labels 100"),
        ({"fps": 29.95}, "has 29.95 fps, in the labels 29.97"),
        ({"video": "c"}, "1 videos lack a prediction, as 'a'"),
    ):
        with pytest.raises(UserError, match=words):
            peak_files.pair_with_labels([{**preds[0], **change}, preds[1]], labels, "p")
    with pytest.raises(UserError, match="are not in the labels, as 'b'"):
        peak_files.pair_with_labels(preds, labels[:1], "p")
    assert peak_files.pair_with_labels([{**preds[0], "fps": 29.965}], labels[:1], "p")  # a header rounds
    late = {"video": "a", "fps": 29.97, "events": [{"frame": 100, "label": "hit", "score": 0.5}]}
    with pytest.raises(UserError, match="an event at frame 100, the video ends at 100"):
        peak_files.pair_with_labels([late], labels[:1], "p")


@pytest.mark.parametrize("fps", [25.0, 29.97002997, 119.88, 239.76])
def test_osl_and_soccernet_round_trip_every_frame(tmp_path, fps):
    size = {"num_frames": 5000, "fps": fps, "width": 64, "height": 48}
    events = [{"frame": f, "label": "hit", "score": f / 5000} for f in range(0, 5000, 7)]
    videos = [{"video": "a", **size, "events": events}, {"video": "b", **size, "events": []}]
    peak_files.write_osl(tmp_path / "o.json", videos)
    assert peak_files.load_osl(tmp_path / "o.json") == videos
    osl = json.loads((tmp_path / "o.json").read_text())
    assert osl["labels"]["action"]["labels"] == ["hit"] and osl["data"][0]["events"][0]["head"] == "action"
    del osl["data"][0]["metadata"]  # as OpenSportsLab itself writes it
    with pytest.raises(UserError, match="needs num_frames, fps, width and height"):
        peak_files.load_osl(write(tmp_path / "bare.json", osl))
    assert peak_files.load_osl(tmp_path / "bare.json", {"a": size}) == videos
    peak_files.write_soccernet(tmp_path / "s.json", videos[0], "league/game")
    results = json.loads((tmp_path / "s.json").read_text())
    assert set(results["predictions"][0]) == {"gameTime", "label", "position", "half", "confidence"}
    assert all(isinstance(x, str) for row in results["predictions"] for x in row.values())
    assert peak_files.load_soccernet(tmp_path / "s.json", {"video": "a", **size}) == videos[:1]


def test_soccernet_labels_take_the_half_asked_for(tmp_path):
    rows = [
        {"gameTime": "1 - 00:04", "label": "PASS", "position": "4320", "visibility": "visible", "team": "left"},
        {"gameTime": "2 - 00:01", "label": "DRIVE", "position": "1000", "visibility": "not shown", "team": "right"},
    ]
    video = {"video": "g", "num_frames": 500, "fps": 25.0, "width": 64, "height": 48}
    got = peak_files.load_soccernet(write(tmp_path / "Labels-ball.json", {"annotations": rows}), video)
    assert got[0]["events"] == [{"frame": 108, "label": "PASS", "visibility": "visible", "team": "left"}]
    got = peak_files.load_soccernet(tmp_path / "Labels-ball.json", video, half=2)
    assert got[0]["events"][0]["visibility"] == "not shown" and got[0]["events"][0]["frame"] == 25


# ---- real files


def real(pattern: str) -> list[Path]:
    files = sorted(SHARED.glob(pattern))
    if not files:
        pytest.skip(f"no {pattern} below LAB_SHARED ({SHARED})")
    return files


def test_every_real_label_file_loads():
    files = [f for p in ("labels/e2espot_*.json", "annotations/*.json") for f in real(p)]
    loaded = [peak_files.load_labels(f) for f in files]
    print(f"label files: {len(loaded)} of {len(files)} load, {sum(map(len, loaded))} videos")
    assert all(loaded)


SIZES = {"train": (1368, 10976), "val": (455, 3642), "test": (1622, 19173)}  # videos, events; spec of the data set
WINDOWS = {  # share (%) of 64-frame windows, stride 1, with 0, 1, 2, .. events, tennis train
    "": (33.4, 12.4, 14.5, 24.5, 14.0),
    "serve swing": (39.7, 29.0, 30.2, 1.1),
    "near_court_serve near_court_swing": (54.2, 45.2, 0.5),
    "near_court_swing": (64.7, 35.1, 0.2),
}


@pytest.mark.parametrize("split", SIZES)
def test_sizes_of_the_tennis_labels(split):
    labels = peak_files.load_labels(real(f"labels/e2espot_tennis_{split}.json")[0])
    assert (len(labels), sum(len(v["events"]) for v in labels)) == SIZES[split]
    places = {"far_court", "near_court"}
    assert peak_files.class_names(labels) == sorted(f"{p}_{k}" for p in places for k in ("bounce", "serve", "swing"))
    density = sum(len(v["events"]) for v in labels) / sum(v["num_frames"] for v in labels)
    assert 0.0225 <= density <= 0.0295
    for v in labels:  # the name ends in _start_end
        start, end = map(int, v["video"].split("_")[-2:])
        assert end - start == v["num_frames"]


def test_statistics_of_the_tennis_training_labels():
    labels = peak_files.load_labels(real("labels/e2espot_tennis_train.json")[0])
    assert sum(v["num_frames"] for v in labels) == 483_071
    for words, expected in WINDOWS.items():
        counts = np.zeros(20)
        for v in labels:
            hits = np.zeros(v["num_frames"])
            for e in v["events"]:
                hits[e["frame"]] += not words or any(e["label"].endswith(w) for w in words.split())
            total = np.concatenate([[0], hits.cumsum()])
            inside = (total[64:] - total[:-64]).astype(int)  # events in each window
            counts += np.bincount(inside, minlength=20)
        share = 100 * counts / counts.sum()
        print(f"windows with k events, '{words or 'all'}': {share.round(1)[:5]}")
        assert np.allclose(share[: len(expected)], expected, atol=0.0500001), words
    gaps = np.concatenate([np.diff(sorted(e["frame"] for e in v["events"])) for v in labels])
    assert np.median(gaps) == 15 and 6 <= np.percentile(gaps, 5) <= 7 and gaps.min() == 1
    within = []
    for v in labels:
        for c in peak_files.class_names([v]):
            within += list(np.diff(sorted(e["frame"] for e in v["events"] if e["label"] == c)))
    assert min(within) == 28 and 57 <= np.percentile(within, 5) <= 62
