"""utils/scannet_files.py, utils/scannet_classes.py and eval/eval_scannet.py in process: figures, controls, refusals."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from utils import run
from utils import scannet_metrics as sm
from utils.scannet_classes import CLASS_SETS, GROUPS_200, SCANNET20, SCANNET200, TRAIN_ONLY_200, things
from utils.scannet_coverage import coverage, disjoint, scene_coverage
from utils.scannet_files import (
    ScenePrediction,
    read_instances,
    read_integers,
    read_semantic,
    write_instances,
    write_labels,
)

ROOT = Path(__file__).resolve().parents[1]
KINDS = (5, 5, 7, 4, 39)  # chair, chair, table, bed, otherfurniture


def script():
    spec = importlib.util.spec_from_file_location("eval_scannet", ROOT / "eval" / "eval_scannet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scene(seed: int) -> tuple[np.ndarray, ScenePrediction]:
    """Labels (N,) of wall, void and five things in random places, and their exact masks with falling scores."""
    sizes = np.random.default_rng(seed).integers(150, 600, 7)
    codes = [1001, 0, *(c * 1000 + k for k, c in enumerate(KINDS, 2))]
    gt = np.repeat(np.random.default_rng(seed).permutation(codes), sizes)
    masks = np.stack([gt == c for c in codes[2:]])
    return gt, ScenePrediction(masks, np.array(KINDS), np.linspace(0.9, 0.5, 5))


@pytest.fixture
def folders(tmp_path):
    """Two scenes: labels, exact predictions, exact classes."""
    for k, name in enumerate(("scene0000_00", "scene0001_00")):
        gt, own = scene(k)
        write_labels(tmp_path / "gt" / f"{name}.txt", gt)
        write_instances(tmp_path / "pred", name, own)
        write_labels(tmp_path / "pred" / "semantic" / f"{name}.txt", gt // 1000)
    return tmp_path


def evaluate(folder: Path, *more: str) -> dict:
    argv = ["--pred", str(folder / "pred"), "--labels", str(folder / "gt"), "--classes", "scannet"]
    out = folder / "out" / "r.json"
    assert run.cli(script().main, [*argv, *more, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refused(capsys, folder: Path, *more: str) -> str:
    argv = ["--pred", str(folder / "pred"), "--labels", str(folder / "gt"), "--classes", "scannet", *more]
    assert run.cli(script().main, argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


# ---- figures


def test_exact_predictions_score_one_and_those_of_another_scene_do_not(folders, capsys):
    got = evaluate(folders)
    names = ("AP", "AP50", "AP25", "mCov", "mWCov", "mPrec", "mRec")
    assert [got["scores"][n] for n in names] == pytest.approx([1.0] * 7)
    assert got["shuffled"]["AP50"] < 0.5 and got["n"] == 2
    assert got["semantic"]["mIoU"] == 1 and got["semantic"]["mAcc"] == 1
    assert set(got["scores"]["per_class"]) == {"chair", "table", "bed", "otherfurniture"}
    assert "perfect score" in capsys.readouterr().out


def test_figures_are_those_of_the_functions(folders):
    rng, scenes, sums = np.random.default_rng(5), [], []
    ids = list(things(SCANNET20))
    for k, name in enumerate(("scene0000_00", "scene0001_00")):
        gt, own = scene(k)
        own.masks ^= rng.random(own.masks.shape) < 0.04
        own.scores = rng.random(5).round(1)  # written best first, the first of equals first
        write_instances(folders / "pred", name, own)
        best = np.argsort(-own.scores, kind="stable")
        scenes.append(sm.scene_overlaps(gt, own.masks[best], own.labels[best], own.scores[best], ids))
        c, p = disjoint(own.masks[best], own.labels[best], own.scores[best])
        thing = np.isin(gt // 1000, ids)
        place = {i: n for n, i in enumerate(ids)} | {-1: len(ids), 0: len(ids), 1: len(ids)}
        gt_class, pred_class = (np.array([place[i] for i in x]) for x in ((gt // 1000).tolist(), c.tolist()))
        sums.append(scene_coverage(gt_class, np.where(thing, gt, -1), pred_class, p, len(ids)))
    got, want = evaluate(folders)["scores"], sm.instance_ap(scenes, ids)
    assert [got[n] for n in ("AP", "AP50", "AP25")] == pytest.approx([want[n] for n in ("AP", "AP50", "AP25")])
    assert 0 < got["AP"] < 1
    names = ("mCov", "mWCov", "mPrec", "mRec")
    assert [got[n] for n in names] == pytest.approx([coverage(sums)[n] for n in names])


def test_agnostic_is_a_flag_not_a_guess(folders, capsys):
    """A network of one class writes label 0: refused as classes, scored as one class; walls stay void."""
    for k, name in enumerate(("scene0000_00", "scene0001_00")):
        gt, own = scene(k)
        masks = np.concatenate((own.masks, [gt == 1001, gt == 0]))  # a wall and void besides: ignored
        own = ScenePrediction(masks[1:], np.zeros(6, int), np.linspace(0.5, 0.9, 6))  # one of five things is missed
        write_instances(folders / "pred", name, own)
    got = evaluate(folders, "--agnostic")
    assert list(got["scores"]["per_class"]) == ["object"] and got["scores"]["AP"] == pytest.approx(0.8)
    assert got["scores"]["mRec"] == pytest.approx(0.8) and got["scores"]["mPrec"] == pytest.approx(1.0)
    assert "--agnostic" in refused(capsys, folders)


def test_a_scene_without_instances_and_without_classes(folders):
    write_instances(folders / "pred", "scene0001_00", ScenePrediction(np.zeros((0, 9), bool), [], []))
    assert not list((folders / "pred" / "pred_mask").glob("scene0001_00_*"))  # the older masks went
    for file in (folders / "pred" / "semantic").iterdir():
        file.unlink()
    (folders / "pred" / "semantic").rmdir()
    got = evaluate(folders)
    assert got["semantic"] == {} and got["scores"]["mRec"] == pytest.approx(0.5)
    assert got["scores"]["AP50"] == pytest.approx(0.5)  # half of the instances found, nothing false


# ---- rules that the reference programs do not show


@pytest.mark.parametrize(("on_void", "counted"), [(100, 1), (101, 0)])
def test_a_prediction_mostly_on_void_does_not_lower_the_precision(on_void, counted):
    gt = np.repeat([0, -1], [200, 400])
    pred = np.full(600, -1)
    pred[100 : 200 + on_void] = 1  # 100 vertices are labelled
    sums = scene_coverage(np.zeros(600, int), gt, np.zeros(600, int), pred, 1)
    assert sums[0].tolist() == pytest.approx([100 / (200 + on_void), 20000 / (200 + on_void), 1, 200, 0, counted])


def test_disjoint_gives_a_vertex_to_the_best_score_and_drops_rests():
    masks = np.zeros((3, 400), bool)
    masks[0, :300], masks[1, 150:400], masks[2, 290:395] = True, True, True
    sem, ins = disjoint(masks, [7, 8, 9], [0.5, 0.9, 0.9])
    assert (ins[:150] == 0).all() and (ins[150:] == 1).all()  # 2 ties with 1, which comes first, and keeps nothing
    assert set(sem) == {7, 8}
    sem, ins = disjoint(masks, [7, 8, 9], [0.5, 0.9, 0.95])
    assert (ins[290:395] == 2).all() and (ins[395:] == 1).all()
    assert (disjoint(np.zeros((0, 5), bool), [], [])[1] == -1).all()


def test_agnostic_labels_keep_the_order_of_instances():
    got = sm.agnostic_labels(np.array([0, -1, 1002, 39001, 5003, 5001, 5003]), [5, 39])
    assert got.tolist() == [0, 0, 0, 1002, 1001, 1000, 1001]
    assert sm.agnostic_labels(np.array([0, 1001]), [5]).tolist() == [0, 0]


def test_predicted_classes_outside_the_list_are_misses_only():
    counts = sm.confusion([1, 1, 2, 0], [1, -1, 999, 1], [1, 2])
    got = sm.semantic_iou(counts)
    assert got["iou"].tolist() == [0.5, 0.0] and got["union"].tolist() == [2, 1]


def test_classes():
    assert list(SCANNET200)[:4] == [1, 3, 2, 4] and len(SCANNET200) == len(set(SCANNET200.values())) == 200
    assert len(things(SCANNET20)) == 18 and len(things(SCANNET200)) == 198 and 2 in things(SCANNET200)
    assert [len(ids) for ids in GROUPS_200.values()] == [66, 68, 66] and set(TRAIN_ONLY_200) < set(SCANNET200)
    assert all(name == name.strip() and name for classes in CLASS_SETS.values() for name in classes.values())


def test_scannet200_prints_head_common_and_tail(folders):
    argv = ["--pred", str(folders / "pred"), "--labels", str(folders / "gt"), "--classes", "scannet200"]
    assert run.cli(script().main, [*argv, "--json", str(folders / "r.json")]) == 0
    got = json.loads((folders / "r.json").read_text())
    assert got["scores"]["AP head"] == 1 and got["scores"]["AP common"] == 1 and got["scores"]["AP tail"] is None
    assert got["semantic"]["mIoU head"] == 1 and got["semantic"]["mIoU tail"] is None


# ---- files


def test_files_round_trip_and_are_listed_by_score(tmp_path):
    gt, own = scene(3)
    own.scores = np.array([0.1, 0.7, 0.3, 1 / 3, 0.2])
    path = write_instances(tmp_path, "s", own)
    got = read_instances(path, len(gt))
    best = np.argsort(-own.scores)
    assert (got.masks == own.masks[best]).all() and (got.labels == own.labels[best]).all()
    assert (got.scores == own.scores[best]).all()  # every digit
    assert path.read_text().splitlines()[0].startswith("pred_mask/s_000.txt 5 0.7")
    write_labels(tmp_path / "semantic" / "s.txt", gt)
    assert (read_semantic(tmp_path / "semantic" / "s.txt", len(gt)) == gt).all()


def test_misuse_of_the_functions():
    with pytest.raises(ValueError, match="expected"):
        sm.scene_overlaps(np.zeros(5), np.zeros((1, 4), bool), [3], [0.5], [3])
    with pytest.raises(ValueError, match="finite"):
        sm.scene_overlaps(np.zeros(5), np.zeros((1, 5), bool), [3], [np.nan], [3])
    with pytest.raises(ValueError, match="same vertices"):
        sm.confusion(np.zeros(5), np.zeros(4), [1])
    with pytest.raises(ValueError, match="0..1"):
        scene_coverage([2], [0], [0], [0], 2)
    with pytest.raises(ValueError, match="finite"):
        write_instances("unused", "s", ScenePrediction(np.zeros((1, 4), bool), [1], [np.inf]))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("pred/scene0000_00.txt", "pred_mask/scene0000_00_000.txt 5\n", "line 1"),
        ("pred/scene0000_00.txt", "pred_mask/scene0000_00_000.txt 5 0.5 7\n", "line 1"),
        ("pred/scene0000_00.txt", "pred_mask/scene0000_00_000.txt 5 nan\n", "line 1"),
        ("pred/scene0000_00.txt", "../gt/scene0000_00.txt 5 0.5\n", "outside"),
        ("pred/scene0000_00.txt", "pred_mask/absent.txt 5 0.5\n", "absent.txt"),
        ("pred/scene0000_00.txt", 2 * "pred_mask/scene0000_00_000.txt 5 0.5\n", "listed twice"),
        ("pred/pred_mask/scene0000_00_000.txt", "1\n0\n", "2 lines"),
        ("pred/semantic/scene0000_00.txt", "1\n0\n", "2 lines"),
        ("gt/scene0000_00.txt", "1001\n1.5\n", "no integer"),
        ("gt/scene0000_00.txt", "\n", "empty"),
        ("gt/scene0002_00.txt", "1001\n", "scene0002_00"),
        ("pred/scene0002_00.txt", "", "scene0002_00"),
    ],
)
def test_bad_files_are_one_sentence(folders, capsys, name, text, says):
    (folders / name).write_text(text)
    assert says in refused(capsys, folders)


def test_bad_folders_and_labels_are_one_sentence(folders, capsys):
    (folders / "pred" / "semantic" / "scene0001_00.txt").unlink()
    assert "scene0001_00.txt" in refused(capsys, folders)
    for file in (folders / "gt").iterdir():
        write_labels(file, read_integers(file) * 0)
    (folders / "pred" / "semantic" / "scene0000_00.txt").unlink()
    (folders / "pred" / "semantic").rmdir()
    assert "no instance of --classes scannet" in refused(capsys, folders)
    for file in (folders / "gt").iterdir():
        file.unlink()
    assert "holds no <scene>.txt" in refused(capsys, folders)
    (folders / "gt").rmdir()
    assert "is not a folder" in refused(capsys, folders)
