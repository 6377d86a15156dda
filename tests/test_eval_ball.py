"""eval/eval_ball.py called in process; utils/ball_metrics.py, utils/hota.py and utils/object_scores.py on hand tables."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from utils import ball_metrics as bm
from utils import hota, run
from utils.hota import Concept, ObjectTrack
from utils.masks import boundary_f, rle_encode
from utils.object_scores import frame_quality, mask_quality, misplaced, score_objects
from utils.track_files import Point, Track, Tracks, write_tracks

ROOT = Path(__file__).resolve().parents[1]
NO = (np.nan, np.nan)


def evaluate(*argv) -> int:
    spec = importlib.util.spec_from_file_location("eval_ball", ROOT / "eval" / "eval_ball.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run.cli(module.main, [str(x) for x in argv])


def clip(label, pred, size=(512, 288), score=None, frames=None) -> bm.Clip:
    label, pred = np.array(label, float), np.array(pred, float)
    frames = np.arange(len(label)) if frames is None else np.array(frames)
    return bm.Clip("c", size, frames, label, pred, None if score is None else np.array(score, float))


# ---- one ball: conventions


def test_hand_table():
    c = clip([(10, 10), (10, 10), (10, 10), NO, NO, (50, 50)], [(10, 13), (10, 20), NO, (3, 3), NO, (50, 50)])
    x = bm.score_ball([c], bm.Convention("ours", 4, None))
    assert [x[k] for k in bm.NAMES] == [2, 1, 1, 1, 1]
    assert x["precision"] == 2 / 4 and x["recall"] == 2 / 3 and x["strict_recall"] == 2 / 4 and x["accuracy"] == 3 / 6
    assert x["f1"] == pytest.approx(4 / 7) and x["strict_f1"] == pytest.approx(0.5) and x["ap"] is None
    d = bm.distances([c])
    assert d["n_both"] == 3 and d["median"] == 3 and d["rmse"] == pytest.approx(np.sqrt(109 / 3))
    assert d["rmse_tp"] == pytest.approx(np.sqrt(9 / 2))


def test_conventions_differ_at_exactly_4_px_and_in_size():
    c = clip([(100, 100)], [(104, 100)])
    assert bm.outcomes(c, bm.TRACKNET_V3)[0] == 0 and bm.outcomes(c, bm.WASB)[0] == 1
    assert bm.outcomes(c, bm.Convention("ours", 4, (512, 288)))[0] == 0
    large = clip([(100, 100)], [(110, 100)], size=(1280, 720))  # 4 px at 512x288
    assert [int(bm.outcomes(large, r)[0]) for r in (bm.Convention("ours", 4, (512, 288)), bm.WASB)] == [0, 1]
    odd = clip([(100.9, 100)], [(105.1, 100)])  # 4.2 px apart, 5 once cut to whole px
    assert bm.outcomes(odd, bm.TRACKNET_V3)[0] == 1 and bm.outcomes(odd, bm.Convention("x", 4.5, None))[0] == 0


def test_published_counts_of_tracknet_v4():
    x = bm.rates({"TP": 15973, "TN": 389, "FP1": 167, "FP2": 24, "FN": 640})
    assert [round(100 * x[k], 1) for k in ("accuracy", "precision", "recall", "f1")] == [95.2, 98.8, 96.1, 97.5]


def test_average_precision():
    found = np.array([0, 1, 0, 2, 3, 4])  # TP, FP1, TP, FP2, FN, TN
    ap = bm.average_precision(found, np.array([0.9, 0.8, 0.7, 0.1, np.nan, np.nan]))
    assert ap == pytest.approx({"ap": (1 + 2 / 3) / 3, "strict_ap": (1 + 2 / 3) / 4})
    worst = bm.average_precision(found, np.array([0.1, 0.8, 0.2, 0.9, 0, 0]))
    assert worst == pytest.approx({"ap": (1 / 3 + 2 / 4) / 3, "strict_ap": (1 / 3 + 2 / 4) / 4})  # garbage ranked first
    better = np.array([0, 2, 0, 0])  # precision 1, 1/2, 2/3, 3/4: the best one at each recall
    assert bm.average_precision(better, np.array([4, 3, 2, 1.0]))["ap"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert bm.average_precision(np.array([4, 3]), np.zeros(2)) == {"ap": 0.0, "strict_ap": 0.0}
    assert bm.average_precision(np.array([4, 2]), np.zeros(2)) == {"ap": None, "strict_ap": None}  # nothing to find


@pytest.mark.parametrize(
    "label, pred, undefined",
    [
        (NO, NO, {"precision", "recall", "f1", "strict_recall", "strict_f1", "ap", "strict_ap"}),
        (NO, (3, 3), {"recall", "strict_recall", "ap", "strict_ap"}),
        ((3, 3), NO, {"precision"}),
        ((3, 3), (90, 3), {"recall", "ap"}),  # TrackNet's recall leaves out what was predicted at a wrong place
        ((3, 3), (3, 3), set()),
    ],
)
def test_what_has_nothing_to_divide_by_is_undefined(label, pred, undefined):
    """Not 0, which would be the worst score; what is defined is 0 here, but for the right answer."""
    x = bm.score_ball([clip([label] * 3, [pred] * 3, score=[1, 2, 3])], bm.WASB)
    for k, value in x.items():
        if k not in bm.NAMES:
            assert value == (None if k in undefined else float(label == pred)), k


def test_gaps_and_jumps():
    label = [(10 * k, 0) for k in range(9)]
    pred = [(0, 0), NO, NO, (30, 0), (99, 0), (50, 0), NO, (70, 0), NO]
    rule = bm.Convention("ours", 4, None)
    x = bm.continuity([clip(label, pred)], rule, 0.1)
    assert (x["gaps"], x["longest_gap"], x["longest_lost"], x["jumps"]) == (3, 2, 2, 1)
    assert x["jumps_per_1000"] == pytest.approx(500)  # of two steps, one of 69 px
    sparse = bm.continuity([clip(label, pred, frames=[0, 1, 3, 4, 9, 10, 12, 13, 14])], rule, 0.1)
    assert (sparse["gaps"], sparse["longest_gap"], sparse["jumps"]) == (4, 1, 0)  # frames left out end a run


def test_garbage_has_full_recall_but_no_strict_recall():
    x = bm.score_ball([clip([(100, 100)] * 9, [(300, 100)] * 8 + [(100, 100)])], bm.TRACKNET_V3)
    assert x["recall"] == 1 and x["strict_recall"] == pytest.approx(1 / 9)


def test_controls():
    path = [(8 * k, 100) for k in range(60)]
    clips = [clip(path, path, score=np.arange(60))]
    assert bm.score_ball(bm.constant(clips), bm.WASB)["TP"] <= 1
    assert bm.score_ball(bm.moved(clips, 0.382), bm.WASB)["TP"] == 0
    assert bm.moved(clips, 0.5)[0].score[0] == 30


# ---- one ball: the script

HEAD = "Frame,Visibility,X,Y\n"


def ball_csv(path, rows) -> Path:
    path.write_text(HEAD + "".join(f"{t},{int(x is not None)},{x or 0},{y or 0}\n" for t, x, y in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """20 frames of 1280x720: labels, and tracks.json 3 px off, a miss, a wild one, an interpolated one."""
    truth = [(t, 20 + 30 * t, 300) if t != 5 else (t, None, None) for t in range(20)]
    labels = ball_csv(tmp_path / "labels.csv", truth)
    points = [Point(23.0 + 30 * t, 300.0, score=0.9 - t / 100, source="detector", visible=True) for t in range(20)]
    points[5], points[7] = Point(), Point()
    points[9].x = 900.0
    points[12] = Point(383.0, 300.0, score=0.5, source="interp")
    video = {"path": "labels.mp4", "width": 1280, "height": 720, "fps": 30.0, "num_frames": 20, "sha1": ""}
    write_tracks(tmp_path / "tracks.json", Tracks(video, {"kind": "test"}, {"ball": Track("ball", "single", points)}))
    return tmp_path, labels, tmp_path / "tracks.json"


def test_script_on_tracks(files, capsys):
    tmp_path, labels, pred = files
    out = tmp_path / "new" / "r.json"
    assert evaluate("--pred", pred, "--labels", labels, "--json", out) == 0
    said, x = capsys.readouterr().out, json.loads(out.read_text())
    ours = x["scores"]["ours"]
    assert [ours[k] for k in bm.NAMES] == [16, 1, 0, 2, 1] and ours["strict_recall"] == pytest.approx(16 / 19)
    assert x["distances"]["median"] == 3 and x["continuity"]["gaps"] == 2 and 0 < ours["strict_ap"] < 1
    assert "distance <= 4 px at 512x288" in said and "distance < 4 px at the frame's own size" in said
    assert x["baseline"]["strict_recall"] < 0.1 and x["shuffled"]["strict_recall"] < 0.1 and "WARNING" not in said
    assert (
        evaluate("--pred", pred, "--labels", labels, "--json", out, "--interp", "--tol-ref", "original", "--tol", 2)
        == 0
    )
    x = json.loads(out.read_text())
    assert [x["scores"]["ours"][k] for k in bm.NAMES] == [0, 18, 0, 1, 1] and x["scores"]["TrackNetV3"]["TP"] == 17


def test_script_on_csv_and_several_clips(files, capsys):
    tmp_path, labels, _ = files
    pred = ball_csv(tmp_path / "p.csv", [(t, 20 + 30 * t, 301) for t in range(20)])
    (tmp_path / "b").mkdir()  # TrackNet's clips all have a Label.csv
    again = ball_csv(
        tmp_path / "b" / "labels.csv", [(t, 20 + 30 * t, 300) if t != 5 else (t, None, None) for t in range(20)]
    )
    argv = ["--pred", pred, pred, "--labels", labels, again, "--size", "1280x720", "--json", tmp_path / "r.json"]
    assert evaluate(*argv) == 0
    x = json.loads((tmp_path / "r.json").read_text())
    assert x["n"] == 40 and x["scores"]["ours"]["FP2"] == 2 and x["scores"]["ours"]["ap"] is None
    assert len(x["by_clip"]) == 2 and x["by_clip"][str(again)]["FP2"] == 1
    assert evaluate("--pred", pred, "--labels", labels) == 2 and "pass --size WxH" in capsys.readouterr().err
    assert evaluate(*argv[:2], *argv[3:]) == 2 and "expected pairs in order" in capsys.readouterr().err
    assert evaluate("--pred", tmp_path / "none.csv", "--labels", labels, "--size", "9x9") == 2


def test_script_where_no_ball_is_seen(tmp_path, capsys):
    """n/a, and null in json: for what a clip without a ball does not say, beside one that has scores."""
    nothing, rows = [(t, None, None) for t in range(6)], [(t, 9 * t + 1, 5) for t in range(6)]
    a, b, c = (ball_csv(tmp_path / f"{n}.csv", x) for n, x in (("a", nothing), ("b", nothing), ("c", rows)))
    d = ball_csv(tmp_path / "d.csv", [(t, x + 1, y) for t, x, y in rows])
    argv = ("--size", "64x48", "--tol-ref", "original", "--json", tmp_path / "r.json")
    assert evaluate("--pred", a, "--labels", b, *argv) == 0
    said, x = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    lines = {line[:20].strip(): line[70:].split() for line in said.splitlines()}
    for name in ("ours", "TrackNetV3", "WASB", "control: at rest", "control: shuffled"):
        assert lines[name] == ["1.000", *["n/a"] * 6], name
    for scores in (*x["scores"].values(), x["baseline"], x["shuffled"]):
        assert scores["TN"] == 6 and scores["accuracy"] == 1
        assert {scores[k] for k in ("precision", "recall", "f1", "strict_recall", "strict_f1")} == {None}
    assert "precision n/a, strict recall n/a, strict f1 n/a" in said and "WARNING" not in said
    assert evaluate("--pred", a, d, "--labels", b, c, *argv) == 0
    x = json.loads((tmp_path / "r.json").read_text())
    assert x["by_clip"][str(b)]["precision"] is None and x["scores"]["ours"]["precision"] == 1
    assert 0 <= x["shuffled"]["precision"] < 1
    assert evaluate("--pred", a, "--labels", c, *argv) == 0  # a ball, but nothing predicted
    x = json.loads((tmp_path / "r.json").read_text())["scores"]["ours"]
    assert (x["precision"], x["recall"], x["f1"]) == (None, 0, 0)


def test_script_refuses(files, capsys):
    tmp_path, labels, pred = files

    def refused(rows_pred, rows_labels, *more) -> str:
        a, b = ball_csv(tmp_path / "a.csv", rows_pred), ball_csv(tmp_path / "b.csv", rows_labels)
        assert evaluate("--pred", a, "--labels", b, "--size", "64x48", *more) == 2
        return capsys.readouterr().err

    rows, nothing = [(t, t + 1, 5) for t in range(6)], [(t, None, None) for t in range(6)]
    assert "is the label file" in refused(rows, rows)
    a, b = (ball_csv(tmp_path / name, nothing) for name in ("a.csv", "b.csv"))
    assert evaluate("--pred", a, "--labels", b, "--size", "64x48") == 0, "that no ball is there may be right"
    assert evaluate("--pred", b, "--labels", b, "--size", "64x48") == 2
    assert "the labels' own positions in every frame" in refused([*rows, (6, None, None)], rows, "--labelled-only")
    off = [(t, x + 1, y) for t, x, y in rows]
    assert "1 of 6 frames are missing, as 3" in refused(off[:3] + off[4:], rows)
    assert "frame 5 is not in" in refused(off, rows[:5])
    assert (
        evaluate("--pred", tmp_path / "a.csv", "--labels", tmp_path / "b.csv", "--size", "64x48", "--labelled-only")
        == 0
    )
    assert "dropped: 1 predictions" in capsys.readouterr().out
    assert "expected 2 whole numbers" in refused(off, rows, "--tol-ref", "big")
    assert "--tol 0.0: expected" in refused(off, rows, "--tol", "0")


# ---- several objects


def tube(*places, size=(24, 32)) -> list:
    """A 4x4 square with its corner at each (x, y); None: absent."""
    frames = []
    for place in places:
        mask = np.zeros(size, bool)
        if place is not None:
            mask[place[1] : place[1] + 4, place[0] : place[0] + 4] = True
        frames.append(rle_encode(mask) if place is not None else None)
    return frames


def test_hota_of_an_identity_switch():
    gt = [tube((2, 2), (2, 2), (2, 2), (2, 2))]
    pred = [tube((2, 2), (2, 2), None, None), tube(None, None, (2, 2), (2, 2))]
    x = hota.hota_figures(hota.hota(gt, pred, "mask"))
    assert x["DetA"] == 1 and x["LocA"] == 1 and x["AssA"] == 0.5 and x["HOTA"] == pytest.approx(np.sqrt(0.5))
    assert x["AssRe"] == 0.5 and x["AssPr"] == 1
    nothing = hota.hota_figures(hota.hota(gt, [], "mask"))
    assert nothing["HOTA"] == 0 and nothing["LocA"] == 1 and nothing["DetRe"] == 0
    false = hota.hota([], gt, "mask")
    assert false["FP"][0] == 4 and hota.hota_figures(hota.combine([false, hota.hota(gt, gt, "mask")]))["DetPr"] == 0.5
    with pytest.raises(ValueError, match="frames"):
        hota.hota(gt, [tube((2, 2))], "mask")


def test_similarity_of_boxes_and_tracks():
    a, b = [(0, 0, 4, 4), None], [(2, 0, 4, 4), (0, 0, 1, 1)]
    assert hota.frame_iou([a[0]], [b[0]], "box")[0, 0] == pytest.approx(8 / 24)
    assert hota.track_iou([a], [b], "box")[0, 0] == pytest.approx(8 / 25)
    masks = hota.track_iou([tube((0, 0), (9, 9))], [tube((2, 0), None)], "mask")
    assert masks[0, 0] == pytest.approx(8 / (24 + 16))


def test_cgf1_by_hand():
    square, away = tube((2, 2)), tube((20, 12))
    rows = [hota.concept_counts(*x, "mask") for x in (([square], [square]), ([square], []), ([], []), ([], [away]))]
    x = hota.concept_f1(rows, True)
    assert x["precision_50"] == pytest.approx(1 / 2, abs=1e-4) and x["recall_50"] == pytest.approx(1 / 2, abs=1e-4)
    assert x["positive_micro_f1_50"] == pytest.approx(
        2 / 3, abs=1e-3
    )  # the false track of an absent prompt is left out
    assert x["pmf1_50"] == pytest.approx(1, abs=1e-3) and x["pmf1_w0dt_50"] == pytest.approx(0.5, abs=1e-3)
    assert x["ilmcc_50"] == 0 and x["cgf1_micro_50_95"] == 0
    good = hota.concept_f1(rows[:1] + rows[2:3], True)
    assert good["ilmcc_50"] == pytest.approx(1, abs=1e-5) and good["cgf1_micro_75"] == pytest.approx(1, abs=1e-3)
    assert hota.concept_f1(rows, False)["cgf1_50"] is None


def test_mask_quality():
    gt = [tube((2, 2), (2, 2), None), tube((20, 12), (20, 12), (20, 12))]
    (ball, other) = mask_quality(gt, [tube((2, 2), None, None)], (24, 32))
    assert ball == pytest.approx({"IoU": 1 / 2, "J": 2 / 3, "F": 2 / 3, "J&F": 2 / 3})
    assert other == {"IoU": 0, "J": 0, "F": 0, "J&F": 0}
    rng = np.random.default_rng(0)
    for _ in range(20):  # the boundary within the box around both is that of the whole picture
        a, b = rng.random((2, 60, 90)) < 0.02
        a[:, :40] = b[:20] = False
        a[50, 70] = b[55, 88] = True
        assert frame_quality(rle_encode(a), rle_encode(b), a.shape)[1] == pytest.approx(boundary_f(a, b))


def test_shuffled_prompts_and_empty_predictions():
    track = ObjectTrack(tube((2, 2), (9, 9)), [(2, 2, 4, 4), (9, 9, 4, 4)], 0.9)
    one = Concept("v", "a ball", 2, (24, 32), [track], [track])
    wrong, how = misplaced([one])
    assert wrong[0].pred[0].masks == track.masks[::-1] and "moved in time" in how
    two, how = misplaced([one, Concept("v", "a racket", 2, (24, 32))])
    assert not two[0].pred and two[1].pred == [track] and how.startswith("2 of 2")
    none = score_objects([Concept("v", "a ball", 2, (24, 32), [track])], "mask", 0.5, False)
    assert none["n"] == 1 and none["predicted"] == 0 and none["hota"]["HOTA"] == 0 and none["ap"]["mAP"] == 0


def saco(path, shift=0, only=slice(None)) -> tuple[Path, Path]:
    """Labels of two prompts (the third is absent) of one video, and results moved by `shift` px."""
    tracks = {3: tube((2, 2), (6, 2), (10, 2)), 4: tube((20, 12), (20, 12), None)}
    moved = {3: tube(*((x + shift, 2) for x in (2, 6, 10))), 4: tube((20, 12 + shift), (20, 12), None)}
    names = {3: "a ball", 4: "a racket", 5: "a net"}
    labels = {
        "videos": [{"id": 1, "video_name": "v", "height": 24, "width": 32, "length": 3}],
        "categories": [{"id": k, "name": n} for k, n in names.items()],
        "annotations": [{"video_id": 1, "category_id": k, "segmentations": t} for k, t in tracks.items()],
        "video_np_pairs": [{"video_id": 1, "category_id": k, "noun_phrase": n} for k, n in names.items()],
    }
    results = [{"video_id": 1, "category_id": k, "score": 0.9, "segmentations": t} for k, t in moved.items()][only]
    (path / "gt.json").write_text(json.dumps(labels))
    (path / "pred.json").write_text(json.dumps(results))
    return path / "pred.json", path / "gt.json"


def test_script_on_several_objects(tmp_path, capsys):
    pred, labels = saco(tmp_path, shift=1)
    assert evaluate("--pred", pred, "--labels", labels, "--json", tmp_path / "r.json") == 0
    x, said = json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out
    assert x["n"] == 2 and x["predicted"] == 2 and 0.5 < x["hota"]["HOTA"] < 1 and x["hota"]["AssA"] > 0.5
    assert x["concepts"]["ilmcc_50"] == pytest.approx(1, abs=1e-5) and x["first label kept"]["hota"]["HOTA"] > 0
    assert x["shuffled"]["hota"]["HOTA"] < 0.1 and "J&F" in said and "mAP" in said
    assert (
        evaluate("--pred", pred, "--labels", labels, "--kind", "box") == 0
        and "compared by box" in capsys.readouterr().out
    )
    saco(tmp_path, shift=1, only=slice(0))  # nothing found at all
    assert evaluate("--pred", pred, "--labels", labels, "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["hota"]["HOTA"] == 0


def test_script_refuses_several_objects(tmp_path, capsys):
    pred, labels = saco(tmp_path, shift=0)
    assert evaluate("--pred", pred, "--labels", labels) == 2 and "the labels' own objects" in capsys.readouterr().err
    assert evaluate("--pred", labels, "--labels", labels) == 2 and "is the label file" in capsys.readouterr().err
    assert evaluate("--pred", pred, pred, "--labels", labels) == 2 and "expected one file" in capsys.readouterr().err
    empty = json.loads(labels.read_text()) | {"annotations": []}
    labels.write_text(json.dumps(empty))
    assert evaluate("--pred", pred, "--labels", labels) == 2 and "holds no object" in capsys.readouterr().err
    labels.write_text("[]")
    assert evaluate("--pred", pred, "--labels", labels) == 2 and "expected a json object" in capsys.readouterr().err
