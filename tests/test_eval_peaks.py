"""eval/eval_peaks.py and eval/compare_runs.py, called in process; the matching and peak metrics they print."""

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest

from utils import run
from utils import spotting_metrics as sm
from utils.spotting_metrics_other import evenly_spaced, misplaced, peak_report

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"num_frames": 400, "fps": 25.0, "width": 64, "height": 48}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(*frames, label="hit", score=None) -> list[dict]:
    return [{"frame": f, "label": label} | ({"score": score} if score is not None else {}) for f in frames]


def write(path: Path, videos: list[dict]) -> str:
    path.write_text(json.dumps(videos), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Three videos, two classes; predictions: two right, one a frame late, one miss, one false alarm."""
    truth = [
        {"video": "a", **SIZE, "events": [*events(10, 100), {"frame": 200, "label": "hit", "lo": 200, "hi": 201}]},
        {"video": "b", **SIZE, "fps": 50.0, "events": events(300) + events(50, label="bounce")},
        {"video": "c", **SIZE, "events": [], "complete_for": ["hit"]},
    ]
    pred = [
        {"video": "c", **SIZE, "events": events(5, label="bounce", score=0.9)},
        {"video": "b", **SIZE, "fps": 50.004, "events": events(300, score=0.8) + events(50, label="bounce", score=0.9)},
        {"video": "a", **SIZE, "events": events(10, 201, score=0.9) + events(350, score=0.6) + events(30, score=0.1)},
    ]
    return tmp_path, truth, pred


def evaluate(tmp_path, truth, pred, *flags, capsys=None) -> dict:
    argv = ["--pred", write(tmp_path / "p.json", pred), "--labels", write(tmp_path / "l.json", truth)]
    code = run.cli(script("eval_peaks").main, [*argv, "--json", str(tmp_path / "out" / "r.json"), *flags])
    assert code == 0
    return json.loads((tmp_path / "out" / "r.json").read_text())


def refused(tmp_path, capsys, truth, pred, *flags) -> str:
    argv = ["--pred", write(tmp_path / "p.json", pred), "--labels", write(tmp_path / "l.json", truth), *flags]
    assert run.cli(script("eval_peaks").main, argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


# ---- eval_peaks.py


def test_figures_by_hand(files, capsys):
    tmp_path, truth, pred = files
    got = evaluate(tmp_path, truth, pred, "--hist", str(tmp_path / "h.png"))
    assert got["n"] == 5 and got["videos"] == 3
    # hit, 4 truths, ranked: 10 right, 201 one late, 300 right, 350 wrong, 30 wrong
    assert got["AP"]["hit"] == pytest.approx({"0": (1 + 2 / 3) / 4, "1": 3 / 4, "2": 3 / 4, "4": 3 / 4})
    assert got["AP"]["bounce"]["0"] == 1.0  # the bounce in c is dropped: c is complete for hit only
    assert got["mAP"]["1"] == pytest.approx(0.875)
    assert got["dropped"]["not complete, predictions"] == 1
    assert (got["misses"], got["false_positives"]) == (1, 1)  # 30 is below the threshold
    assert got["precision"] == got["recall"] == got["f1"] == 0.8
    assert got["MAE"] == got["bias"] == 0.25 and got["median"] == 0
    assert got["MAE_ms"] == pytest.approx(40 / 4)
    assert got["acc"] == {"0": 0.6, "1": 0.8, "2": 0.8, "4": 0.8}
    assert got["interval_acc"] == 1.0 and got["interval_n"] == 1
    assert set(got["by_fps"]) == {"25.0", "50.0"} and got["by_fps"]["50.0"]["mAP"]["0"] == 1.0
    assert got["baseline"]["mAP"]["4"] < 0.5 and got["shuffled"]["mAP"]["4"] < 0.5
    assert got["settings"]["threshold"] == 0.5 and got["peak"] is None
    out = capsys.readouterr().out
    assert "+0: 3, +1: 1" in out and "WARNING" not in out
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_options_change_what_they_name(files):
    tmp_path, truth, pred = files
    assert evaluate(tmp_path, truth, pred, "--classes", "bounce")["mAP"]["0"] == 1.0
    early = evaluate(tmp_path, truth, pred, "--frames", ":150")
    assert early["n"] == 3 and early["AP"]["hit"]["0"] == 0.5
    assert evaluate(tmp_path, truth, pred, "--frames", "150:")["n"] == 2
    assert evaluate(tmp_path, truth, pred, "--threshold", "0.05")["false_positives"] == 2
    assert evaluate(tmp_path, truth, pred, "--radius", "0")["misses"] == 2
    near = [{**v, "events": v["events"] + events(*[11] * (v["video"] == "a"), score=0.95)} for v in pred]
    ap = {}
    for nms in ("none", "e2e", "greedy", "soft"):
        ap[nms] = evaluate(tmp_path, truth, near, "--nms", nms, "--nms-window", "2")["AP"]["hit"]["0"]
    # 11 at 0.95 removes 10 at 0.9; soft leaves 10 with 0.225
    assert ap["e2e"] == ap["greedy"] == pytest.approx(1 / 3 / 4)
    assert ap["soft"] == pytest.approx((2 / 5 + 2 / 5) / 4) and ap["none"] == pytest.approx((1 / 2 + 1 / 2) / 4)


def test_several_label_files_and_one_video(tmp_path, files):
    _, truth, pred = files
    paths = [write(tmp_path / f"{v['video']}.json", [v]) for v in truth]
    argv = ["--pred", write(tmp_path / "p.json", pred), "--labels", *paths, "--json", str(tmp_path / "r.json")]
    assert run.cli(script("eval_peaks").main, argv) == 0
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 5
    assert run.cli(script("eval_peaks").main, [*argv[:2], "--labels", *paths, paths[0]]) == 2
    one = evaluate(tmp_path, truth[:1], pred[2:])
    assert one["shuffled"]["how"].startswith("moved round in time") and one["shuffled"]["mAP"]["4"] < 0.3


def test_peak_section_takes_the_top_prediction_per_video(tmp_path):
    r = random.Random(0)
    truth = [{"video": f"v{i}", **SIZE, "events": events(r.randrange(100, 300))} for i in range(12)]
    pred = [
        {**v, "events": events(v["events"][0]["frame"] - 1, score=0.3) + events(r.randrange(400), score=0.2)}
        for v in truth
    ]
    got = evaluate(tmp_path, truth, pred)["peak"]
    assert got["classes"] == ["hit"] and got["n"] == 12 and got["misses"] == 0
    assert got["MAE"] == 1.0 and got["bias"] == -1.0 and got["acc"] == {"0": 0.0, "1": 1.0, "2": 1.0, "4": 1.0}
    assert got["constant"]["MAE"] > 20 and got["shuffled"]["MAE"] > 20
    pred[0]["events"] = []
    got = evaluate(tmp_path, truth, pred)["peak"]
    assert got["misses"] == 1 and got["acc"]["1"] == pytest.approx(11 / 12) and got["MAE"] == 1.0


def test_no_truth_gives_null_not_a_number(tmp_path):
    truth = [{"video": "tail", **SIZE, "events": [], "complete_for": ["hit"]}]
    got = evaluate(tmp_path, truth, [{**truth[0], "events": events(3, score=0.9)}])
    assert got["mAP"]["0"] is None and got["false_positives"] == 1 and got["n"] == 0 and got["recall"] is None


def test_perfect_score_warns(files, capsys):
    tmp_path, truth, _ = files
    perfect = [{**v, "events": [{**e, "score": 0.99} for e in v["events"]]} for v in truth]
    evaluate(tmp_path, truth, perfect)
    assert "WARNING: a perfect score" in capsys.readouterr().out


def test_refusals(files, capsys):
    tmp_path, truth, pred = files
    labels = write(tmp_path / "l.json", truth)
    assert run.cli(script("eval_peaks").main, ["--pred", labels, "--labels", labels]) == 2
    assert "is the label file" in capsys.readouterr().err
    assert "is the label file" in refused(tmp_path, capsys, truth, truth)  # a copy
    assert "'score' is missing" in refused(tmp_path, capsys, truth, truth[::-1])
    assert "lack a prediction, as 'a'" in refused(tmp_path, capsys, truth, pred[:2])
    assert "not in the labels, as 'a'" in refused(tmp_path, capsys, truth[1:], pred)
    serve = [*pred[:2], {**pred[2], "events": events(3, label="serve", score=0.5)}]
    assert "class 'serve' is not in the labels (bounce, hit)" in refused(tmp_path, capsys, truth, serve)
    assert "the labels have bounce, hit" in refused(tmp_path, capsys, truth, pred, "--classes", "hit,net")
    assert "in the labels 400" in refused(tmp_path, capsys, truth, [*pred[:2], {**pred[2], "num_frames": 401}])
    assert "in the labels 25.0" in refused(tmp_path, capsys, truth, [*pred[:2], {**pred[2], "fps": 25.02}])
    beyond = [*pred[:2], {**pred[2], "events": events(400, score=0.5)}]
    assert "frame 400 is outside" in refused(tmp_path, capsys, truth, beyond)
    assert "START:STOP" in refused(tmp_path, capsys, truth, pred, "--frames", "12")
    assert "--threshold in [0, 1]" in refused(tmp_path, capsys, truth, pred, "--threshold", "1.5")
    assert run.cli(script("eval_peaks").main, ["--pred", str(tmp_path / "no.json"), "--labels", labels]) == 2
    assert "no.json: cannot be read" in capsys.readouterr().err


def test_frames_without_an_event_are_refused(files, capsys):
    tmp_path, truth, pred = files
    err = refused(tmp_path, capsys, truth, pred, "--frames", "390:")
    assert "--frames 390:: no event is left; expected frames with some of the 5 labelled events, in 10..300" in err
    err = refused(tmp_path, capsys, truth, pred, "--frames", "60:90", "--classes", "bounce")
    assert "--frames 60:90: no event is left; expected frames with some of the 1 labelled events, in 50..50" in err
    assert evaluate(tmp_path, truth, pred, "--frames", "300:")["n"] == 1
    tail = [{"video": "tail", **SIZE, "events": [], "complete_for": ["hit"]}]  # nothing labelled: not the range's fault
    assert evaluate(tmp_path, tail, [{**tail[0], "events": events(3, score=0.9)}], "--frames", "0:9")["n"] == 0


def test_labels_dumped_as_predictions_are_refused(files, capsys):
    tmp_path, truth, _ = files
    dump = [{"video": v["video"], "fps": v["fps"], "events": []} for v in truth[::-1]]
    for v in dump:
        known = next(t["events"] for t in truth if t["video"] == v["video"])
        v["events"] = [{"score": 1, "label": e["label"], "frame": float(e["frame"])} for e in known[::-1]]
    assert "is the labels with score 1" in refused(tmp_path, capsys, truth, dump)
    assert "is the labels" in refused(tmp_path, capsys, truth, dump, "--classes", "bounce", "--frames", "40:60")
    for change in ({"score": 0.9999}, {"frame": 51}, {"label": "hit"}):
        near = [{**v, "events": [e | change if e["frame"] == 50 else e for e in v["events"]]} for v in dump]
        evaluate(tmp_path, truth, near)
    evaluate(tmp_path, truth, [{**v, "events": v["events"][v["video"] == "a" :]} for v in dump])  # one is missing
    tail = [{"video": "tail", **SIZE, "events": [], "complete_for": ["hit"]}]
    empty = [{"video": "tail", "fps": 25.0, "events": []}]  # predicts nothing where nothing is labelled: no copy
    assert evaluate(tmp_path, tail, empty)["n"] == 0


def test_log_appends_one_row(files, monkeypatch):
    tmp_path, truth, pred = files
    (tmp_path / "LOG.md").write_text("## TempoPeak\n\n| when (UTC) | why |\n|---|---|\n\nafter\n", encoding="utf-8")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    evaluate(tmp_path, truth, pred, "--log", "does the row land")
    rows = [x for x in (tmp_path / "LOG.md").read_text().splitlines() if "does the row land" in x]
    assert len(rows) == 1 and "mAP @0" in rows[0] and "(n=5)" in rows[0]


# ---- metrics and controls


def test_matching_is_one_to_one_and_closest_first():
    truth = [{"video": "a", "events": events(10, 14)}]
    pred = [
        {"video": "a", "events": events(11, 12, score=0.9) + events(13, score=0.4) + events(10, label="x", score=0.9)}
    ]
    got = sm.match_events(truth, pred, threshold=0.5, radius=4)
    assert [(t["frame"], p["frame"]) for _, t, p in got["pairs"]] == [(10, 11), (14, 12)]
    assert [p["label"] for _, p in got["false"]] == ["x"] and not got["misses"]
    got = sm.match_events(truth, pred, threshold=0.5, radius=1)
    assert [(t["frame"], p["frame"]) for _, t, p in got["pairs"]] == [(10, 11)] and len(got["misses"]) == 1
    assert sm.f1_scores(got) == {"precision": 1 / 3, "recall": 0.5, "f1": 0.4}
    nothing = sm.match_events(truth, [{"video": "a", "events": []}], 0.5, 4)
    assert math.isnan(sm.f1_scores(nothing)["precision"]) and sm.f1_scores(nothing)["f1"] == 0


def test_peak_errors_by_hand():
    t = {"frame": 10, "lo": 9, "hi": 10}
    triples = [("a", t, {"frame": f}) for f in (10, 12, 9)] + [("a", t, None)]
    got = sm.peak_errors(triples, fps={"a": 50.0})
    assert (got["n"], got["misses"], got["MAE"], got["median"]) == (4, 1, 1.0, 1.0)
    assert got["bias"] == pytest.approx(1 / 3) and got["bias_ms"] == pytest.approx(20 / 3)
    assert got["acc"] == {0: 0.25, 1: 0.5, 2: 0.75, 4: 0.75} and got["interval_acc"] == 0.5
    assert math.isnan(sm.peak_errors([])["MAE"])


def test_nearest_is_not_one_to_one():
    truth = [{"video": "a", "events": events(10, 14)}]
    pred = [{"video": "a", "events": events(12, score=0.9) + events(10, score=0.1)}]
    assert [p["frame"] for _, _, p in sm.nearest_events(truth, pred, 0.5)] == [12, 12]


def test_controls_know_nothing_and_keep_the_counts():
    r = random.Random(1)
    truth = [{"video": f"v{i}", **SIZE, "events": events(*sorted(r.sample(range(400), 4)))} for i in range(5)]
    spaced = evenly_spaced(truth)
    assert [[e["frame"] for e in v["events"]] for v in spaced] == [[50, 150, 250, 350]] * 5
    assert all(100 <= e["frame"] < 300 for v in evenly_spaced(truth, 100, 300) for e in v["events"])
    pred = [{**v, "events": [{**e, "score": 0.9} for e in v["events"]]} for v in truth]
    for draw in (0.25, 0.5, 0.75):
        moved = misplaced(pred, truth, 0, None, draw)
        assert all(m["events"] != p["events"] for m, p in zip(moved, pred, strict=True))
        assert sorted(e["frame"] for v in moved for e in v["events"]) == sorted(
            e["frame"] for v in pred for e in v["events"]
        )
    assert [e["frame"] for e in misplaced(pred[:1], truth[:1], 0, None, 0.25)[0]["events"]] == [
        (e["frame"] + 100) % 400 for e in truth[0]["events"]
    ]
    assert peak_report(truth, pred, pred) is None  # four events per video


# ---- compare_runs.py


def make_run(folder: Path, head: str, seed: int, value: float, commit: str = "abc", ev: str = "eval.json") -> str:
    folder.mkdir()
    args = {"head": head, "seed": seed, "out": str(folder), "log": None, "lr": 0.001}
    (folder / "run.json").write_text(json.dumps({"command": "x", "args": args, "commit": commit}))
    lines = [
        {"step": 10, "loss": 4.0, "val_loss": 3.0},
        {"step": 20, "loss": value, "val_loss": value + 1},
        {"step": 30, "loss": value},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if ev:
        result = {
            "mAP": {"0": value / 2, "1": value},
            "MAE": None,
            "f1": value,
            "settings": {"pred": str(folder), "nms": "e2e"},
        }
        (folder / ev).write_text(json.dumps(result))
    return str(folder)


def compare(argv: list[str], capsys) -> tuple[int, str, str]:
    code = run.cli(script("compare_runs").main, argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_seeds_are_grouped_with_mean_and_spread(tmp_path, capsys):
    runs = [make_run(tmp_path / f"g{s}", "gru", s, v) for s, v in enumerate((0.5, 0.6, 0.7))]
    runs += [make_run(tmp_path / f"m{s}", "mamba2", s, v) for s, v in enumerate((0.8, 0.9))]
    (tmp_path / "stray").mkdir()
    code, out, _ = compare([*runs, str(tmp_path / "stray"), "--json", str(tmp_path / "c.json")], capsys)
    assert code == 0 and f"left out: {tmp_path / 'stray'}" in out
    table = [x for x in out.splitlines() if x.startswith("|")]
    assert table[0] == "| setting | n | seeds | mAP.0 | mAP.1 | f1 | commit |"  # MAE is null everywhere
    assert table[2] == (
        "| head=gru | 3 | 0, 1, 2 | 0.3 ± 0.05 (0.25..0.35) | 0.6 ± 0.1 (0.5..0.7) | 0.6 ± 0.1 (0.5..0.7) | abc |"
    )
    assert table[3].startswith("| head=mamba2 | 2 | 0, 1 |") and len(table) == 4
    groups = json.loads((tmp_path / "c.json").read_text())
    assert groups[0]["results"]["mAP.1"]["values"] == [0.5, 0.6, 0.7] and groups[1]["args"]["head"] == "mamba2"


def test_keys_from_metrics_other_evals_and_warnings(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "a", "gru", 0, 0.5, ev=""),
        make_run(tmp_path / "b", "gru", 0, 0.7, commit="def", ev=""),
    ]
    code, out, _ = compare(runs, capsys)
    assert code == 0 and "| all | 2 | 0, 0 | 1.6 ± 0.14 (1.5..1.7) | abc, def |" in out  # val_loss, its last value
    assert "a seed occurs twice" in out and "different commits" in out
    code, out, _ = compare([*runs, "--key", "loss"], capsys)
    assert "| 0.6 ± 0.14 (0.5..0.7) |" in out
    other = make_run(tmp_path / "c", "gru", 1, 0.9, ev="test.eval.json")
    code, out, _ = compare([other, make_run(tmp_path / "d", "gru", 1, 0.8), "--key", "mAP.1"], capsys)
    assert "eval=test" in out and len([x for x in out.splitlines() if x.startswith("| eval=")]) == 2


def make_train_run(folder: Path, task: str, seed: int, shift: float, ev: dict | None = None) -> str:
    """A run folder with the rows that train/train.py writes: training and validation take turns."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"args": {"task": task, "seed": seed, "out": folder.name}}))
    val = {
        "peak": {"val_loss": 2 + shift, "acc@0": shift, "acc@1": 0.25 + shift, "MAE": 3 + shift, "score": 0.25},
        "spot": {"mAP@0": shift, "mAP@1": 0.25 + shift, "mAP@2": 0.5, "mAP@4": 0.5, "score": 0.5},
    }[task]
    rows = [
        {"step": 10, "loss": 4.0, "lr": 1e-3, "grad": 1.5, "clips_per_s": 9.0},
        {"step": 10} | {k: 0.0 for k in val},
        {"step": 20, "loss": 3.0, "lr": 1e-4, "grad": 1.2, "clips_per_s": 9.0},
        {"step": 20} | val,
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    if ev:
        (folder / "eval.json").write_text(json.dumps(ev))
    return str(folder)


def table_of(out: str) -> list[dict]:
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in out.splitlines() if x.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_runs_of_train_py_are_compared_by_their_last_validation(tmp_path, capsys):
    peak = [make_train_run(tmp_path / f"p{s}", "peak", s, x) for s, x in enumerate((0.25, 0.5))]
    code, out, _ = compare(peak, capsys)
    (row,) = table_of(out)
    assert code == 0 and list(row)[3:-1] == ["val_loss", "acc@0", "acc@1", "MAE"]
    assert row["acc@1"] == "0.625 ± 0.18 (0.5..0.75)" and row["MAE"].startswith("3.375 ± ")
    spot = make_train_run(tmp_path / "s", "spot", 0, 0.125)
    code, out, _ = compare([spot], capsys)  # no MAE: nothing was matched
    assert code == 0 and list(table_of(out)[0])[3:-1] == ["mAP@0", "mAP@1", "mAP@2", "mAP@4"]
    code, out, _ = compare([*peak, spot], capsys)
    first, second = table_of(out)
    assert code == 0 and first["mAP@1"] == second["MAE"] == "-" and second["mAP@1"] == "0.375"


def test_a_column_never_mixes_an_eval_with_a_validation(tmp_path, capsys):
    ev = {"mAP": {"0": 0.5, "1": 0.75}, "MAE": 1.5, "n": 40, "settings": {"pred": "x", "nms": "e2e"}}
    runs = [
        make_train_run(tmp_path / "scored", "peak", 0, 0.25, ev),
        make_train_run(tmp_path / "null", "peak", 1, 0.25, ev | {"MAE": None}),  # an eval that matched nothing
        make_train_run(tmp_path / "unscored", "peak", 2, 0.5),
    ]
    code, out, _ = compare(runs[:2], capsys)
    (row,) = table_of(out)
    assert code == 0 and list(row)[3:-1] == ["mAP.0", "mAP.1", "MAE"] and row["MAE"] == "1.5, n=1"
    assert "metrics.jsonl" not in out
    code, out, _ = compare(runs, capsys)
    scored, unscored = table_of(out)
    assert code == 0 and list(scored)[3:-1] == ["mAP.0", "mAP.1", "MAE", "val_loss", "acc@0", "acc@1"]
    assert "eval=eval.json" in scored["setting"] and "eval=none" in unscored["setting"]
    assert (scored["MAE"], unscored["MAE"], unscored["mAP.1"]) == ("1.5, n=1", "-", "-")  # the 3.5 is no eval's
    assert unscored["acc@1"] == "0.75" and scored["acc@1"].startswith("0.5 ± 0 ")
    assert "from metrics.jsonl: val_loss, acc@0, acc@1" in out
    code, out, _ = compare([runs[0], runs[2], "--key", "MAE"], capsys)
    assert [x["MAE"] for x in table_of(out)] == ["1.5", "-"]
    other = make_train_run(tmp_path / "other", "spot", 0, 0.5, {"CIDEr": 1.25, "settings": {}})
    code, out, _ = compare([runs[0], other], capsys)
    assert list(table_of(out)[0])[3:-1] == ["mAP.0", "mAP.1", "MAE", "CIDEr"] and table_of(out)[1]["CIDEr"] == "1.25"


def test_compare_refuses(tmp_path, capsys):
    one = make_run(tmp_path / "a", "gru", 0, 0.5)
    code, _, err = compare([one, "--key", "mIoU"], capsys)
    assert code == 2 and "--key mIoU: no run has this number" in err and "val_loss" in err
    code, _, err = compare([str(tmp_path)], capsys)
    assert code == 2 and "no run folder" in err
    (tmp_path / "a" / "eval.json").write_text("{")
    code, _, err = compare([one], capsys)
    assert code == 2 and "eval.json: is not json" in err
