"""Vessel metrics against what medpy, scikit-learn, torchmetrics and the clDice reference gave for the stored cases.

Reads LAB_SHARED/data/sa2va/metric_cases*, whatever is there: cases.npz and expected.json; sizes come from the arrays.
Tolerances: 1e-6, AUC 1e-5, sums of soft skeletons 1e-6 of the sum (float32 there). Every stored value is compared
except where it is undefined (0/0, or a distance from an empty mask): the libraries then disagree, and ours must be NaN.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.mask_losses import dice_loss
from utils import vessel_metrics as vm

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "sa2va"
OURS = {  # names of the libraries -> ours
    "dc": "Dice", "f1": "Dice", "jc": "IoU", "jaccard": "IoU", "sensitivity": "sensitivity", "recall": "sensitivity",
    "specificity": "specificity", "precision": "precision", "mcc": "MCC", "roc_auc": "AUC", "auroc": "AUC",
    "average_precision": "AP", "hd95": "HD95", "assd": "ASSD", "clDice": "clDice",
}  # fmt: skip
LIBRARIES = ("medpy", "sklearn", "torchmetrics", "clDice_reference")


def defined(counts: dict) -> dict[str, bool]:
    """Which of our values have a denominator (or both borders), told from the stored counts alone."""
    p, t, n = counts["tp"] + counts["fp"], counts["tp"] + counts["fn"], counts["tn"] + counts["fp"]
    pixels = n + t
    return {
        "Dice": p + t > 0, "IoU": p + t > 0, "clDice": p + t > 0, "sensitivity": t > 0, "AP": t > 0,
        "specificity": n > 0, "precision": p > 0, "AUC": t > 0 and n > 0, "MCC": 0 < p < pixels and 0 < t < pixels,
        "HD95": p > 0 and t > 0, "ASSD": p > 0 and t > 0, "Betti-0": True,
    }  # fmt: skip


def cases():
    """(name, prob (H, W), truth, fov, expected) of every stored case."""
    found = 0
    for folder in sorted(p.parent for p in SHARED.glob("metric_cases*/expected.json")):
        expected = json.loads((folder / "expected.json").read_text())
        with np.load(folder / "cases.npz") as arrays:
            for name in sorted(k.removesuffix(".prob") for k in arrays if k.endswith(".prob")):
                prob = arrays[f"{name}.prob"]
                masks = [np.unpackbits(arrays[f"{name}.{k}"], axis=-1) for k in ("gt", "fov")]
                truth, fov = (m[:, : prob.shape[1]].astype(bool) for m in masks)
                found += 1
                yield f"{folder.name}/{name}", prob / 255, truth, fov, expected[name]
    if not found:
        pytest.skip(f"no reference cases metric_cases* in {SHARED}; set LAB_SHARED")


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


def check_values(name: str, ours: dict, expected: dict) -> tuple[int, int]:
    """Compares each stored score; returns how many were compared and how many are undefined."""
    known, compared, undefined = defined(expected), 0, 0
    for library in LIBRARIES:
        for key, want in expected[library].items():
            if key not in OURS:
                continue
            what, got = f"{name}: {key} of {library}", ours[OURS[key]]
            if not known[OURS[key]]:
                assert np.isnan(got), f"{what}: ours is {got}, where it is 0/0"
                undefined += 1
            elif key == "clDice" and want == "nan":  # the harmonic mean of 0 and 0, or of 0 and 0/0: a total miss
                assert got == 0 and expected["tp"] == 0, what
                undefined += 1
            else:
                assert got == pytest.approx(want, abs=1e-5 if OURS[key] == "AUC" else 1e-6), what
                compared += 1
    return compared, undefined


def test_scores(capsys):
    n = compared = undefined = 0
    for name, prob, truth, fov, expected in cases():
        score = vm.score_image(prob, truth, fov)
        assert list(truth.shape) == expected["shape"], name
        assert score.counts.tolist() == [expected[k] for k in ("tp", "fp", "fn", "tn")], name
        pixels = [expected["clDice_reference"][f"skeleton_{k}_pixels"] for k in ("pred", "gt")]
        assert score.skeleton[[1, 3]].tolist() == pixels, name
        assert tuple(score.values) and set(score.values) == set(vm.NAMES)
        ours = dict(score.values, ASSD=float("nan"))
        pred, truth = (prob > 0.5) & fov, truth & fov
        if pred.any() and truth.any():
            ours["ASSD"] = np.hstack(vm.surface_distances(pred, truth)).mean()
        for key, is_defined in defined(expected).items():
            assert np.isnan(ours[key]) != is_defined, f"{name}: {key}"
        a, b = check_values(name, ours, expected)
        n, compared, undefined = n + 1, compared + a, undefined + b
    tell(capsys, f"vessel metrics: {n} of {n} cases, {compared} values equal, {undefined} undefined")


def test_soft_cldice(capsys):
    n = 0
    for name, prob, truth, _, expected in cases():
        want = expected["soft_clDice_reference"]
        p, t = (torch.from_numpy(x).float()[None, None] for x in (prob, truth))
        loss = vm.soft_cldice(p, t, iterations=10, smooth=1.0).item()
        dice = dice_loss(p.reshape(1, -1).logit(), t.reshape(1, -1)).item()
        assert loss == pytest.approx(want["loss_iter10_smooth1"], abs=1e-6), name
        assert (loss + dice) / 2 == pytest.approx(want["dice_cldice_alpha0_5"], abs=1e-6), name
        for x, key in ((p, "pred"), (t, "gt")):
            total = vm.soft_skeleton(x, 10).double().sum().item()
            assert total == pytest.approx(want[f"soft_skeleton_sum_{key}"], rel=1e-6), name
        n += 1
    tell(capsys, f"soft clDice: {n} of {n} cases")
