"""data/ball_labels.py: every csv dialect, several objects from json, tracks.json; data/ball_checks.py."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from data.ball_checks import check_ball
from data.ball_labels import read_ball, read_ball_csv, read_concepts
from data.video import VideoWriter
from utils.masks import rle_encode
from utils.run import UserError
from utils.track_files import Point, Track, Tracks, write_tracks

TENNIS = "file name,visibility,x-coordinate,y-coordinate,status\n"


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- ball csv


def test_dialects(tmp_path):
    a = read_ball_csv(
        write(tmp_path / "a.csv", TENNIS + "0004.jpg,1,10.5,20,1\r\n0002.jpg,0,,,0\n\n0003.jpg,3,7,8,2\n")
    )
    assert a.dialect == "tennis" and a.frames.tolist() == [2, 3, 4] and a.status.tolist() == [0, 2, 1]
    np.testing.assert_array_equal(a.xy, [[np.nan, np.nan], [7, 8], [10.5, 20]])
    np.testing.assert_array_equal(a.seen(), [[np.nan] * 2, [np.nan] * 2, [10.5, 20]])  # 3: occluded
    np.testing.assert_array_equal(a.seen((1, 2, 3)), a.xy)
    b = read_ball_csv(
        write(
            tmp_path / "b.csv",
            "\ufeffFile Name,Visibility Class,X,Y,Trajectory Pattern\n12.png,2,0.0,0.0,\n13.png,1,NaN,3,1\n",
        )
    )
    assert b.dialect == "tennis, other names" and np.isnan(b.xy).all() and b.status.tolist() == [-1, 1]
    c = read_ball_csv(write(tmp_path / "c.csv", "Frame,Visibility,X,Y,score\n7,1,0,5,0.25\n8,0,0,0,\n"))
    assert c.dialect == "badminton" and c.xy[0].tolist() == [0, 5] and c.score[0] == 0.25 and np.isnan(c.score[1])
    d = read_ball_csv(write(tmp_path / "d.csv", "frame_num,visible,x,y\n0,1,0.5,0.25\n1,0,0,0\n"), (640, 400))
    assert d.dialect == "normalised" and d.xy[0].tolist() == [320, 100] and d.score is None


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "of no known dialect"),
        ("a,b,c\n1,2,3\n", "of no known dialect"),
        (TENNIS, "has a header but no row"),
        (TENNIS + "0001.jpg,1,2,3,0\n1.png,1,2,3,0\n", "frame 1 stands in it twice"),
        (TENNIS + "first.jpg,1,2,3,0\n", "'first.jpg' names no frame"),
        (TENNIS + "0001.jpg,4,2,3,0\n", "row 2: visibility 4"),
        (TENNIS + "0001.jpg,1,2,high,0\n", "y 'high' is not a number"),
        (TENNIS + "0001.jpg,1,inf,2,0\n", "is infinite"),
        ("frame_num,visible,x,y\n0,1,0.5,7\n", "by its header x and y are shares"),
    ],
)
def test_bad_csv_is_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read_ball_csv(write(tmp_path / "x.csv", text), (100, 100))


def test_shares_need_a_size_and_files_must_exist(tmp_path):
    with pytest.raises(UserError, match="pass --size WxH"):
        read_ball_csv(write(tmp_path / "x.csv", "frame_num,visible,x,y\n0,1,0.5,0.5\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_ball_csv(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as csv"):
        read_ball_csv(tmp_path / "b.csv")


# ---- tracks.json


def tracks_file(path, names=("ball",), mode="single") -> str:
    """4 frames of 32x24: found, absent, interpolated, found by two objects (mode all)."""
    square = rle_encode(np.pad(np.ones((4, 4), bool), ((8, 12), (6, 22))))
    seen = {"box": (6.0, 8.0, 9.0, 11.0), "area": 16, "obj_id": 1, "rle": square}
    points = [
        Point(7.5, 9.5, score=0.9, source="detector", visible=True, **seen),
        Point(),
        Point(9.0, 9.0, score=0.2, source="interp"),
        Point(7.5, 9.5, score=0.7, source="tracker", visible=True, **seen),
    ]
    if mode == "all":
        for p in points:
            p.objects = [p] if p.visible else []
        other = Point(20.0, 9.5, (18.0, 8.0, 21.0, 11.0), 0.5, source="detector", visible=True, obj_id=5, area=16)
        other.rle = rle_encode(np.pad(np.ones((4, 4), bool), ((8, 12), (18, 10))))
        points[3].objects = [Point(**{k: getattr(points[3], k) for k in Point.__slots__ if k != "objects"}), other]
        points[0].objects = [Point(**{k: getattr(points[0], k) for k in Point.__slots__ if k != "objects"})]
    video = {"path": "clips/v.mp4", "width": 32, "height": 24, "fps": 25.0, "num_frames": 4, "sha1": ""}
    targets = {n: Track(f"a {n}", mode, points) for n in names}
    write_tracks(path, Tracks(video, {"kind": "test"}, targets))
    return str(path)


def test_ball_of_tracks(tmp_path):
    path = tracks_file(tmp_path / "t.json")
    track = read_ball(path)
    assert track.size == (32, 24) and track.visibility.tolist() == [1, 0, 0, 1] and track.xy[3].tolist() == [7.5, 9.5]
    np.testing.assert_array_equal(track.score, [0.9, np.nan, np.nan, 0.7])
    assert read_ball(path, interpolated=True).visibility.tolist() == [1, 0, 1, 1]
    with pytest.raises(UserError, match="holds no target racket; expected one of ball"):
        read_ball(path, target="racket")
    with pytest.raises(UserError, match="--size says 30x20"):
        read_ball(path, (30, 20))
    two = tracks_file(tmp_path / "two.json", ("shuttle", "racket"))
    with pytest.raises(UserError, match="choose one with --target"):
        read_ball(two)
    assert read_ball(two, target="racket").frames.tolist() == [0, 1, 2, 3]


# ---- several objects


def labels_json(path, change=None) -> str:
    """One video v of 4 frames, 32x24: a ball, seen in frames 0 and 3; no racket (SA-Co's absent prompt)."""
    code = rle_encode(np.pad(np.ones((4, 4), bool), ((8, 12), (6, 22))))
    empty = rle_encode(np.zeros((24, 32), bool))
    content = {
        "videos": [{"id": 1, "video_name": "v", "height": 24, "width": 32, "length": 4, "file_names": ["v/0.jpg"] * 4}],
        "categories": [{"id": 3, "name": "a ball"}, {"id": 4, "name": "a racket"}],
        "annotations": [{"id": 1, "video_id": 1, "category_id": 3, "segmentations": [code, empty, None, code]}],
        "video_np_pairs": [
            {"video_id": 1, "category_id": k, "noun_phrase": f"a {n}"} for k, n in ((3, "ball"), (4, "racket"))
        ],
    }
    if change:
        change(content)
    return write(path, json.dumps(content))


def result(category=3, **more) -> dict:
    code = rle_encode(np.pad(np.ones((4, 4), bool), ((8, 12), (7, 21))))
    item = {"video_id": 1, "category_id": category, "score": 0.8, "segmentations": [code, code, None, None]}
    return item | {"bboxes": [[7, 8, 4, 4], [0, 0, 0, 0], None, None]} | more


def test_concepts_of_results(tmp_path):
    pred = write(tmp_path / "p.json", json.dumps([result(), result(4)]))
    (ball, racket), negatives = read_concepts(labels_json(tmp_path / "l.json"), pred, "mask")
    assert negatives and (ball.video, ball.prompt, ball.frames, ball.size) == ("v", "a ball", 4, (24, 32))
    assert [m is not None for m in ball.gt[0].masks] == [True, False, False, True]  # an empty mask is none
    assert ball.gt[0].boxes[0] == [6, 8, 4, 4] and ball.gt[0].boxes[1] is None
    assert [m is not None for m in ball.pred[0].masks] == [True, False, False, False]  # and so is an empty box
    assert not racket.gt and len(racket.pred) == 1 and racket.pred[0].score == 0.8
    boxes = write(tmp_path / "b.json", json.dumps([{k: v for k, v in result().items() if k != "segmentations"}]))
    (ball, _), _ = read_concepts(labels_json(tmp_path / "l.json"), boxes, "box")
    assert ball.pred[0].boxes[0] == [7, 8, 4, 4]
    with pytest.raises(UserError, match="holds no segmentations"):
        read_concepts(labels_json(tmp_path / "l.json"), boxes, "mask")


def test_concepts_of_tracks(tmp_path):
    labels = labels_json(tmp_path / "l.json")
    for mode, n in (("single", 1), ("all", 2)):
        pred = tracks_file(tmp_path / "t.json", ("ball", "racket"), mode)
        (ball, racket), _ = read_concepts(labels, pred, "mask")
        assert len(ball.pred) == len(racket.pred) == n
        assert [m is not None for m in ball.pred[0].masks] == [True, False, False, True]
        assert ball.pred[0].boxes[0] == (6, 8, 4, 4) and ball.pred[0].score == pytest.approx(0.8)
    with pytest.raises(UserError, match="prompts are missing, as a racket"):
        read_concepts(labels, tracks_file(tmp_path / "t.json"), "mask")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.update(videos=3), "videos: expected YouTube-VIS videos"),
        (lambda c: c["annotations"][0].pop("category_id"), "lacks 'category_id'"),
        (lambda c: c["annotations"][0].update(video_id=9), "names video 9 and category 3"),
        (lambda c: c["annotations"][0]["segmentations"].pop(), "3 segmentations, its video has 4 frames"),
        (lambda c: c["annotations"][0].update(segmentations=[{"size": [2, 2], "counts": "04"}] * 4), "2 x 2"),
        (lambda c: c["videos"][0].update(height=26), "expected 26 x 32"),
    ],
)
def test_bad_labels_are_refused(tmp_path, change, said):
    pred = write(tmp_path / "p.json", json.dumps([result()]))
    with pytest.raises(UserError, match=said):
        read_concepts(labels_json(tmp_path / "l.json", change), pred, "mask")


def test_bad_results_are_refused(tmp_path):
    labels = labels_json(tmp_path / "l.json")
    for item, said in ((result(9), "category 9, not in the labels"), (result(score="high"), "lacks 'score'")):
        with pytest.raises(UserError, match=said):
            read_concepts(labels, write(tmp_path / "p.json", json.dumps([item])), "mask")
    other = labels_json(tmp_path / "o.json", lambda c: c["videos"][0].update(video_name="w"))
    with pytest.raises(UserError, match="is of the video v, the labels of w"):
        read_concepts(other, tracks_file(tmp_path / "t.json", ("ball", "racket")), "mask")
    longer = labels_json(tmp_path / "n.json", lambda c: c["videos"][0].update(file_names=["v/0.jpg"] * 5)
                         or c["annotations"][0]["segmentations"].append(None))  # fmt: skip
    with pytest.raises(UserError, match="4 frames of 32x24 px, the labels have 5"):
        read_concepts(longer, tracks_file(tmp_path / "t.json", ("ball", "racket")), "mask")


# ---- the checklist


def test_checklist_and_sheet(tmp_path, capsys):
    with VideoWriter(tmp_path / "clip.mp4", 25, size=(64, 48)) as video:
        for t in range(5):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[20:24, 10 * t + 4 : 10 * t + 8] = 255
            video.write(frame)
    rows = "".join(f"{t:04d}.jpg,{int(t != 2)},{10 * t + 5.5},21.5,{t % 3}\n" for t in range(5))
    write(tmp_path / "clip.csv", TENNIS + rows)
    args = SimpleNamespace(root=str(tmp_path), videos=None, columns=3, batch_size=2, show="x.png")
    sheet = check_ball(args)
    said = capsys.readouterr().out
    assert (
        "5 frames 0..4 (0 between them missing), visibility 0: 1, 1: 4; seen in 4" in said and "10.0/10.0/10.0" in said
    )
    assert "video of 64x48 px, 5 frames" in said and sheet.ndim == 3 and sheet.max() > 200
    (tmp_path / "clip.csv").rename(tmp_path / "clip_racket.csv")  # as data/rendered_ball.py names them
    check_ball(args)
    assert "video of 64x48 px" in capsys.readouterr().out
    (tmp_path / "clip_racket.csv").unlink()
    write(tmp_path / "clip.csv", TENNIS + "0001.jpg,1,70,20,0\n")
    with pytest.raises(UserError, match="outside the picture of 64x48 px"):
        check_ball(args)
    write(tmp_path / "clip.csv", TENNIS + "0007.jpg,1,7,20,0\n")
    with pytest.raises(UserError, match="names frame 7, its video has 5 frames"):
        check_ball(args)
    (tmp_path / "clip.mp4").unlink()
    with pytest.raises(UserError, match="pass --videos FOLDER"):
        check_ball(args)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no csv"):
        check_ball(SimpleNamespace(**vars(args) | {"root": str(tmp_path / "none")}))
