"""eval/eval_captions.py, called in process: its figures, controls and refusals."""

import importlib.util
import json
from pathlib import Path

import pytest

from utils import caption_metrics as cm
from utils import run
from utils.ptb_tokenizer import tokenize

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = {
    11: ["A man rides a horse.", "A man on a brown horse."],
    12: ["Two dogs play in the snow.", "Dogs playing, in snow"],
    13: ["A plate of food on a table.", "Food on a table."],
    14: ["A man rides a wave on a surfboard.", "A surfer's big wave."],
}
PRED = {11: "a man rides a horse", 12: "two dogs in the snow", 13: "a plate of food on a", 14: "a man rides a horse"}


def script():
    spec = importlib.util.spec_from_file_location("eval_captions", ROOT / "eval" / "eval_captions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, content) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def labels_of(captions: dict, more_images=()) -> dict:
    pairs = [(i, c) for i, cs in captions.items() for c in cs]
    return {
        "images": [{"id": i} for i in (*captions, *more_images)],
        "annotations": [{"id": k, "image_id": i, "caption": c} for k, (i, c) in enumerate(pairs)],
    }


def results_of(pred: dict) -> list[dict]:
    return [{"image_id": i, "caption": c} for i, c in pred.items()]


def evaluate(tmp_path, labels, pred, *flags) -> dict:
    argv = ["--pred", write(tmp_path / "p.json", pred), "--labels", write(tmp_path / "l.json", labels)]
    argv += ["--java", "off", "--json", str(tmp_path / "out" / "r.json"), *flags]
    assert run.cli(script().main, argv) == 0
    return json.loads((tmp_path / "out" / "r.json").read_text())


def refused(tmp_path, capsys, labels, pred, *flags) -> str:
    argv = ["--pred", write(tmp_path / "p.json", pred), "--labels", write(tmp_path / "l.json", labels), *flags]
    assert run.cli(script().main, argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


def test_figures(tmp_path, capsys):
    got = evaluate(tmp_path, labels_of(CAPTIONS), results_of(PRED)[::-1])
    references = {str(i): [tokenize(c) for c in cs] for i, cs in CAPTIONS.items()}
    want = cm.score_captions(references, {str(i): c for i, c in PRED.items()})
    assert {k: got[k] for k in cm.NAMES} == pytest.approx(want["corpus"])
    assert got["per_image"]["CIDEr-D"]["11"] == pytest.approx(want["per_image"]["CIDEr-D"]["11"])
    assert got["n"] == 4 and got["METEOR"] is None and got["SPICE"] is None
    assert got["predictions"] == {
        "distinct": 3, "vocabulary": 13, "mean length": 5.25, "bad endings": 0.25, "empty": 0
    }  # fmt: skip
    assert got["references"]["distinct"] == 8
    for control in ("constant", "shuffled"):
        assert 0 <= got[control]["CIDEr-D"] < got["CIDEr-D"]
    assert got["constant caption"] in sum(references.values(), [])
    out = capsys.readouterr().out
    assert "n = 4 images" in out and "METEOR                 n/a       n/a       n/a   --java off" in out
    assert f"CIDEr-D{got['CIDEr-D']:19.4f}{got['constant']['CIDEr-D']:10.4f}" in out
    assert "bad endings 25.00 %" in out and "WARNING" not in out


def test_punctuation_and_case_do_not_count(tmp_path):
    plain = evaluate(tmp_path, labels_of(CAPTIONS), results_of(PRED))
    shouted = evaluate(tmp_path, labels_of(CAPTIONS), results_of({i: c.upper() + " ." for i, c in PRED.items()}))
    assert {k: plain[k] for k in cm.NAMES} == {k: shouted[k] for k in cm.NAMES}


def test_one_image_has_no_shuffled_control(tmp_path, capsys):
    got = evaluate(tmp_path, labels_of({11: CAPTIONS[11]}), results_of({11: "a horse"}))
    assert got["shuffled"] == {} and got["CIDEr-D"] == 0


def test_empty_captions_are_scored_and_counted(tmp_path):
    got = evaluate(tmp_path, labels_of(CAPTIONS), results_of(PRED | {12: ""}))
    assert got["n"] == 4 and got["predictions"]["empty"] == 1 and got["per_image"]["ROUGE-L"]["12"] == 0


def test_images_without_a_caption_are_dropped_and_counted(tmp_path, capsys):
    got = evaluate(tmp_path, labels_of(CAPTIONS, more_images=(15, 16)), results_of(PRED | {15: "a cat"}))
    assert got["n"] == 4 and got["dropped"] == {"listed in the labels without a caption": 1, "of another split": 0}
    assert "dropped: 1 (listed in the labels without a caption), 0 (of another split)" in capsys.readouterr().out


def test_several_label_files(tmp_path, capsys):
    halves = [{i: CAPTIONS[i] for i in ids} for ids in ((11, 12), (13, 14))]
    paths = [write(tmp_path / f"{k}.json", labels_of(h)) for k, h in enumerate(halves)]
    whole = evaluate(tmp_path, labels_of(CAPTIONS), results_of(PRED))
    argv = ["--pred", str(tmp_path / "p.json"), "--java", "off", "--json", str(tmp_path / "r.json"), "--labels", *paths]
    assert run.cli(script().main, argv) == 0
    assert json.loads((tmp_path / "r.json").read_text())["CIDEr-D"] == pytest.approx(whole["CIDEr-D"])
    assert run.cli(script().main, [*argv, paths[0]]) == 2
    assert "stands in an earlier label file too" in capsys.readouterr().err


def test_a_split_of_a_folder(tmp_path, capsys):
    """csv and COCO; the image files are not looked for."""
    want = evaluate(tmp_path, labels_of({f"p{i}": c for i, c in CAPTIONS.items()}),
                    results_of({f"p{i}": c for i, c in PRED.items()}))  # fmt: skip
    rows = [f'p{i}.jpg,"{c}",val' for i, cs in CAPTIONS.items() for c in cs]
    rows += ["p20.jpg,a cat,train", "p21.jpg, ,val"]  # p21 without a caption
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "mine.csv").write_text("\n".join(["image,caption,split", *rows]) + "\n")
    pred = results_of({f"p{i}": c for i, c in PRED.items()} | {"p20": "a dog", "p21": "a man"})
    argv = ["--pred", write(tmp_path / "p.json", pred), "--java", "off", "--json", str(tmp_path / "r.json"), "--labels"]
    root = str(tmp_path / "csv")
    assert run.cli(script().main, [*argv, f"{root}:val"]) == 0
    got = json.loads((tmp_path / "r.json").read_text())
    assert {k: got[k] for k in cm.NAMES} == {k: want[k] for k in cm.NAMES} and got["n"] == 4
    assert got["dropped"] == {"listed in the labels without a caption": 1, "of another split": 1}
    assert run.cli(script().main, [*argv, f"{root}:val", f"{root}:train"]) == 0
    got = json.loads((tmp_path / "r.json").read_text())
    assert got["n"] == 5 and got["dropped"] == {"listed in the labels without a caption": 1, "of another split": 0}
    capsys.readouterr()
    for labels, says in (
        ([f"{root}:test"], "holds no split 'test'; expected one of train, val"),
        ([root], "holds no split ''; expected one of train, val"),
        ([f"{root}:val", f"{root}:val"], "stands in an earlier label file too"),
        ([f"{tmp_path / 'absent'}:val"], "cannot be read"),
        ([f"{root}/mine.csv"], "is not json"),
    ):
        assert run.cli(script().main, [*argv, *labels]) == 2
        err = capsys.readouterr().err.strip()
        assert says in err and err.startswith("error: ") and "\n" not in err
    strange = [*argv[:1], write(tmp_path / "q.json", [*pred, {"image_id": "p99", "caption": "x"}]), "--labels"]
    assert run.cli(script().main, [*strange, f"{root}:val"]) == 2
    assert "1 images are not in the labels, as p99" in capsys.readouterr().err
    write((tmp_path / "coco" / "annotations").mkdir(parents=True) or tmp_path / "coco/annotations/captions_val2017.json",
          {k: [{**x, "file_name": "x"} for x in v] for k, v in labels_of(CAPTIONS).items()})  # fmt: skip
    argv[1] = write(tmp_path / "p.json", results_of(PRED))
    assert run.cli(script().main, [*argv, f"{tmp_path / 'coco'}:val"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["CIDEr-D"] == pytest.approx(want["CIDEr-D"])


def test_lists_of_another_shape(tmp_path, capsys):
    labels, pred = labels_of(CAPTIONS), results_of(PRED)
    for images in (5, {}, None, [5], [{"file_name": "x.jpg"}], [{"id": [11]}], [None]):
        err = refused(tmp_path, capsys, labels | {"images": images}, pred)
        assert "its images are no list of objects with an id; expected COCO annotations" in err
    for images, name in (
        ({"images": 5}, ":test"), ({"images": [5]}, ":test"), ({"images": [{"cocoid": 11}]}, ":test"), ({"val": 5}, ":val"),
        ({"val": "11"}, ":val"), ({"val": [[11]]}, ":val"), ({"val": None}, ":val"), (5, ""), (None, ""), ("11", ""),
        ([{}], ""), ({"": 5}, ""),
    ):  # fmt: skip
        path = write(tmp_path / "i.json", images)
        assert "names no image; expected" in refused(tmp_path, capsys, labels, pred, "--images", path + name)


def test_a_part_of_the_images(tmp_path, capsys):
    labels, pred = labels_of(CAPTIONS), results_of(PRED)
    want = evaluate(tmp_path, labels_of({i: CAPTIONS[i] for i in (12, 13)}), results_of({i: PRED[i] for i in (12, 13)}))
    karpathy = [{"cocoid": i, "split": s} for i, s in ((11, "train"), (12, "test"), (13, "test"), (14, "val"))]
    plain, named = write(tmp_path / "ids.json", [12, 13]), write(tmp_path / "named.json", {"test": [12, 13]})
    for images in (plain, f"{named}:test", write(tmp_path / "k.json", {"images": karpathy}) + ":test"):
        got = evaluate(tmp_path, labels, pred, "--images", images)
        assert got["n"] == 2 and got["dropped"]["not in --images"] == 2
        assert {k: got[k] for k in cm.NAMES} == {k: want[k] for k in cm.NAMES}
    got = evaluate(tmp_path, labels, [p for p in pred if p["image_id"] in (12, 13)], "--images", plain)
    assert got["n"] == 2 and got["dropped"]["not in --images"] == 0
    assert "expected :test" in refused(tmp_path, capsys, labels, pred, "--images", named)
    assert "expected :test" in refused(tmp_path, capsys, labels, pred, "--images", f"{named}:val")
    assert "without :NAME" in refused(tmp_path, capsys, labels, pred, "--images", f"{plain}:test")
    beyond = write(tmp_path / "beyond.json", [12, 99])
    assert "image 99 has no caption in --labels" in refused(tmp_path, capsys, labels, pred, "--images", beyond)
    coco = refused(tmp_path, capsys, labels, pred, "--images", str(tmp_path / "l.json"))
    assert "names no image" in coco


def test_refusals(tmp_path, capsys):
    labels, pred = labels_of(CAPTIONS), results_of(PRED)
    path = write(tmp_path / "labels.json", labels)
    assert run.cli(script().main, ["--pred", path, "--labels", path]) == 2
    assert "is the label file" in capsys.readouterr().err
    assert "is the label file" in refused(tmp_path, capsys, labels, labels)  # a copy
    assert "has several captions" in refused(tmp_path, capsys, labels, labels["annotations"])
    verbatim = results_of({i: cs[-1] for i, cs in CAPTIONS.items()})
    assert "every caption is a label, letter by letter" in refused(tmp_path, capsys, labels, verbatim)
    assert "1 of 4 images lack a caption, as 14" in refused(tmp_path, capsys, labels, pred[:3])
    extra = refused(tmp_path, capsys, labels, [*pred, {"image_id": 99, "caption": "x"}])
    assert "1 images are not in the labels, as 99" in extra
    assert "image 11 has several captions" in refused(tmp_path, capsys, labels, [*pred, pred[0]])
    assert "item 4 lacks" in refused(tmp_path, capsys, labels, [*pred, {"image_id": 14}])
    assert "item 4 lacks" in refused(tmp_path, capsys, labels, [*pred, {"image_id": 14, "caption": ["x"]}])
    assert "holds no captions" in refused(tmp_path, capsys, labels, [])
    assert "holds no captions" in refused(tmp_path, capsys, labels, {"a": 1})
    assert "expected COCO annotations" in refused(tmp_path, capsys, pred, pred[:2])
    assert run.cli(script().main, ["--pred", str(tmp_path / "no.json"), "--labels", path]) == 2
    assert "no.json: cannot be read" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("[{")
    assert run.cli(script().main, ["--pred", str(tmp_path / "broken.json"), "--labels", path]) == 2
    assert "broken.json: is not json" in capsys.readouterr().err


def test_a_model_that_learned_the_labels_is_scored_with_a_warning(tmp_path, capsys):
    learned = {i: tokenize(cs[0]) for i, cs in CAPTIONS.items()}
    for labels in (CAPTIONS, {i: [c] for i, c in learned.items()}):  # also where labels are written as tokens are
        got = evaluate(tmp_path, labels_of(labels), results_of(learned))
        assert got["BLEU-4"] == pytest.approx(1) and "WARNING: a perfect score" in capsys.readouterr().out


def test_log_appends_one_row(tmp_path, monkeypatch):
    (tmp_path / "LOG.md").write_text("## FSGR\n\n| when (UTC) | why |\n|---|---|\n\nafter\n", encoding="utf-8")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    evaluate(tmp_path, labels_of(CAPTIONS), results_of(PRED), "--log", "does the row land")
    rows = [x for x in (tmp_path / "LOG.md").read_text().splitlines() if "does the row land" in x]
    assert len(rows) == 1 and "CIDEr-D" in rows[0] and "(n=4)" in rows[0]
