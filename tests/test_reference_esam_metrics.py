"""Scores of labelled scenes against what ScanNet's and ASIS's own programs printed.

Reads LAB_SHARED/data/esam/eval_cases: instance_ap, semantic_iou, coverage, whatever cases lie there. Tolerance 1e-9.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from utils import scannet_coverage as cov
from utils import scannet_metrics as sm
from utils.scannet_classes import SCANNET20

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
AP_NAMES = {"AP": "ap", "AP50": "ap50%", "AP25": "ap25%"}


def cases(kind: str) -> list[tuple[str, np.lib.npyio.NpzFile, dict]]:
    """(name, arrays, expected) of every case of one kind; skips when there is none."""
    found = sorted((SHARED / "eval_cases" / kind).glob("*.npz"))
    if not found:
        pytest.skip(f"no reference cases {kind} in {SHARED}; set LAB_SHARED")
    return [(p.stem, np.load(p), json.loads(p.with_suffix(".json").read_text())) for p in found]


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


def undefined(value: float | None) -> float:
    """null of a json file is nan."""
    return float("nan") if value is None else value


def same(got, want) -> None:
    np.testing.assert_allclose(np.asarray(got, float), np.asarray(want, float), rtol=0, atol=1e-9)


def test_instance_ap(capsys):
    """AP, AP50, AP25, of every class, at every overlap; where ScanNet's own script stops, mmdetection3d's figures."""
    index = json.loads((SHARED / "eval_cases" / "instance_ap" / "index.json").read_text()) if SHARED.is_dir() else {}
    found = cases("instance_ap")
    same(sm.OVERLAPS, index["overlaps"])
    for name, z, want in found:
        official = want["expected"]["official"]
        expected = official if isinstance(official, dict) else want["expected"]["mmdet3d"]
        names = list(expected["classes"])
        given = re.search(r"valid_class_ids=\[(\d+)\]", want["note"])
        if given:
            ids = [int(given[1])]
        else:
            ids = index["scannet20"]["ids"] if len(names) == 18 else index["scannet200_inst_ids"]
        assert len(ids) == len(names), name
        scenes = []
        for s in range(int(z["n_scenes"])):
            gt = z[f"gt_{s}"]
            masks = np.zeros((0, len(gt)), bool)
            if len(z[f"labels_{s}"]):
                masks = np.unpackbits(z[f"masks_{s}"], axis=1)[:, : len(gt)].astype(bool)
            scenes.append(sm.scene_overlaps(gt, masks, z[f"labels_{s}"], z[f"conf_{s}"], ids))
        got = sm.instance_ap(scenes, ids)
        same([got[k] for k in AP_NAMES], [undefined(expected[k]) for k in ("all_ap", "all_ap_50%", "all_ap_25%")])
        for c, own in zip(ids, expected["classes"].values(), strict=True):
            same([got["per_class"][c][k] for k in AP_NAMES], [undefined(own[v]) for v in AP_NAMES.values()])
        rows = dict(zip(names, got["per_overlap"], strict=True))
        for c, row in want["expected"].get("per_class_per_threshold", {}).items():
            same(rows[c], row)
    tell(capsys, f"instance AP: {len(found)} of {len(found)} cases to 1e-9")


def test_semantic_iou(capsys):
    found = cases("semantic_iou")
    for _, z, want in found:
        scenes = range(int(z["n_scenes"]))
        got = sm.semantic_iou(sum(sm.confusion(z[f"gt_{s}"], z[f"pred_{s}"], list(SCANNET20)) for s in scenes))
        for k, name in enumerate(SCANNET20.values()):
            own = want["per_class_iou_tp_union"][name]
            if own is None:
                assert np.isnan(got["iou"][k]) and got["union"][k] == 0
            else:
                same([got["iou"][k], got["true"][k], got["union"][k]], own)
        same(sm.mean_of(got["iou"]), undefined(want["mean_over_classes_with_nonzero_union"]))
    tell(capsys, f"semantic IoU: {len(found)} of {len(found)} cases to 1e-9")


def test_coverage(capsys):
    found = cases("coverage")
    names = {"mCov": "MUCov", "mWCov": "MWCov", "mPrec": "precision", "mRec": "recall"}
    for _, z, want in found:
        K, want = int(z["num_classes"]), want["expected"]
        arrays = ("gt_sem", "gt_ins", "pred_sem", "pred_ins")
        scenes = [cov.scene_coverage(*(z[f"{a}_{s}"] for a in arrays), K) for s in range(int(z["n_scenes"]))]
        got = cov.coverage(scenes)
        for ours, theirs in names.items():
            same(got["per_class"][ours], [undefined(x) for x in want[theirs]])
            same(got[ours], undefined(want[f"nanmean_{theirs}"]))
        counts = sum(sm.confusion(z[f"gt_sem_{s}"], z[f"pred_sem_{s}"], range(K)) for s in range(int(z["n_scenes"])))
        same(sm.semantic_iou(counts)["iou"], [undefined(x) for x in want["mIoU_list"]])
    tell(capsys, f"coverage: {len(found)} of {len(found)} cases to 1e-9")
