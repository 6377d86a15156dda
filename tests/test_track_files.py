"""utils/track_files.py: what is written is read again, the csv is TrackNet's, a file that does not fit is refused."""

import csv
import json

import numpy as np
import pytest

from data.ball_labels import read_ball_csv
from utils.run import UserError
from utils.track_files import SOURCES, Point, Track, Tracks, read_tracks, write_ball_csv, write_tracks

VIDEO = {"path": "rally.mp4", "width": 128, "height": 96, "fps": 30.0, "num_frames": 4, "sha1": "00"}
RLE = {"size": [96, 128], "counts": "0"}


def seen(x: float, y: float, **more) -> Point:
    return Point(x, y, (x - 2, y - 2, x + 2, y + 2), 0.9, 0.9, None, 21, 1, "detector", True, **more)


def example() -> Tracks:
    gap = Point(12.5, 20.0, source="interp", x_s=12.25, y_s=20.5)
    ball = Track("tennis ball", "single", [seen(10, 20, rle=RLE), gap, seen(np.float32(15), 20.125), Point()])
    both = [seen(1, 2), seen(3, 4)]
    rackets = Track("racket", "all", [seen(1, 2, objects=both), *(Point(objects=[]) for _ in range(3))])
    event = {
        "frame": 3,
        "target": "ball",
        "reason": "no detection",
        "state": "LOST",
        "x": None,
        "y": None,
        "score": None,
    }
    return Tracks(dict(VIDEO), {"kind": "sam3_video", "path": None}, {"ball": ball, "racket": rackets}, [event])


@pytest.fixture
def written(tmp_path):
    write_tracks(tmp_path / "tracks.json", example())
    return tmp_path / "tracks.json"


def test_round_trip(written):
    """Equal to 4 digits; the file has plain numbers and every frame once."""
    assert read_tracks(written) == example()
    raw = json.loads(written.read_text())
    assert raw["version"] == 1 and [row["frame"] for row in raw["targets"]["ball"]["frames"]] == [0, 1, 2, 3]
    assert raw["targets"]["ball"]["frames"][3]["x"] is None and raw["targets"]["racket"]["frames"][1]["objects"] == []
    assert set(raw["targets"]["ball"]["frames"][3]) == {
        "frame", "x", "y", "box", "score", "det_score", "trk_score", "area", "obj_id", "source", "visible",
    }  # fmt: skip


def test_arrays():
    ball = example().targets["ball"]
    assert np.array_equal(ball.xy(), [(10, 20), (np.nan, np.nan), (15, 20.125), (np.nan, np.nan)], equal_nan=True)
    assert ball.xy(filled=True)[1].tolist() == [12.5, 20] and np.isnan(ball.scores()[1])
    assert Track("nothing").xy().shape == (0, 2)


def test_csv_is_tracknets(tmp_path):
    """Interpolated frames are not visible; the reader of labels takes the file; smoothed columns stand behind."""
    ball = example().targets["ball"]
    write_ball_csv(tmp_path / "ball.csv", ball)
    rows = list(csv.reader((tmp_path / "ball.csv").open()))
    assert rows[0] == ["file name", "visibility", "x-coordinate", "y-coordinate", "status", "x_s", "y_s"]
    assert rows[1] == ["0000.jpg", "1", "10.00", "20.00", "0", "", ""] and rows[2][:4] == ["0001.jpg", "0", "", ""]
    ball.frames[1] = Point()
    write_ball_csv(tmp_path / "ball.csv", ball)
    assert (tmp_path / "ball.csv").read_text().splitlines()[3] == "0002.jpg,1,15.00,20.12,0"
    read = read_ball_csv(tmp_path / "ball.csv", (128, 96))
    assert read.visibility.tolist() == [1, 0, 1, 0] and read.frames.tolist() == [0, 1, 2, 3]


def change(path, *keys, to):
    """Set one value of a json file; `to` ... deletes it."""
    raw = json.loads(path.read_text())
    at = raw
    for key in keys[:-1]:
        at = at[key]
    if to is ...:
        del at[keys[-1]]
    else:
        at[keys[-1]] = to
    path.write_text(json.dumps(raw))


FRAMES = ("targets", "ball", "frames")


@pytest.mark.parametrize(
    "keys, to, said",
    [
        (("version",), 2, "version"),
        (("video",), None, "video"),
        (("video", "num_frames"), True, "num_frames"),
        (("video", "width"), 0, "width"),
        (("video", "fps"), 0, "fps"),
        (("targets",), {}, "empty"),
        (("targets", "ball", "mode"), "best", "single, all"),
        (("targets", "ball"), 7, "prompt, mode and frames"),
        ((*FRAMES, 3), ..., "frame 3 is missing"),
        ((*FRAMES, 3, "frame"), 2, "every frame of 0..3 once"),
        ((*FRAMES, 3, "frame"), 4, "every frame of 0..3 once"),
        ((*FRAMES, 3), 5, "every frame of 0..3 once"),
        ((*FRAMES, 0, "x"), float("nan"), "x is nan"),
        ((*FRAMES, 0, "x"), "10", "x is '10'"),
        ((*FRAMES, 0, "y"), None, "both x and y"),
        ((*FRAMES, 0, "visible"), 1, "visible true or false"),
        ((*FRAMES, 3, "visible"), True, "what is visible has a place"),
        ((*FRAMES, 0, "source"), "guess", ", ".join(SOURCES)),
        ((*FRAMES, 1, "visible"), True, "is interpolated and visible"),
        ((*FRAMES, 0, "box"), [1, 2, 3], "four numbers"),
        (("targets", "racket", "frames", 0, "objects"), 3, "no list of objects"),
        (("targets", "racket", "frames", 0, "objects", 1, "x"), None, "object 1"),
        (("events", 0, "frame"), 4, "events"),
        (("events", 0, "target"), "net", "events"),
    ],
)
def test_refusals(written, keys, to, said):
    change(written, *keys, to=to)
    with pytest.raises(UserError, match="tracks.json") as e:
        read_tracks(written)
    assert said in str(e.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    for name, said in (("a", "not readable as json"), ("b", "version"), ("c", "not readable"), ("d", "no such file")):
        with pytest.raises(UserError, match=said):
            read_tracks(tmp_path / f"{name}.json")


def test_frames_of_another_number_are_not_written(tmp_path):
    tracks = example()
    tracks.targets["ball"].frames.pop()
    with pytest.raises(ValueError, match="3 frames, the video 4"):
        write_tracks(tmp_path / "tracks.json", tracks)
    assert not list(tmp_path.iterdir())
