"""Ball labels, HOTA, cgF1 and hits against what others made.

Reads LAB_SHARED/data/sam3, whatever is there: SA-Co results (*_gt.json, *_pred.json, *_eval_res.json), ball csv of every
dialect, and ball tracks of clips whose events are labelled in LAB_SHARED/data/tempopeak/annotations. Tolerance of the
SA-Co figures: 1e-9 (they agree to 1e-15).
"""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from data.ball_labels import DIALECTS, read_ball_csv, read_concepts
from data.peak_files import load_labels
from utils.hits import NAMES, name_turns
from utils.hota import IOUS, combine, concept_counts, concept_f1, hota, hota_figures
from utils.object_scores import track_ap

DATA = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
SHARED = DATA / "sam3"


def cases(pattern: str) -> list[Path]:
    found = sorted(SHARED.rglob(pattern))
    if not found:
        pytest.skip(f"no {pattern} in {SHARED}; set LAB_SHARED")
    return found


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


# ---- SA-Co


def sides(concept, kind: str, keep) -> tuple[list, list]:
    return [t.of(kind) for t in concept.gt], [t.of(kind) for t in concept.pred if keep(t.score)]


def computed(gt: Path, pred: Path) -> tuple[dict, dict]:
    """Our figures by the names of the official result file: of the data set, and by (video, category)."""
    concepts, negatives = read_concepts(gt, pred, "mask")
    content, results = json.loads(gt.read_text()), json.loads(pred.read_text())
    rows = (*content["annotations"], *content.get("video_np_pairs", ()), *results)
    keys = list(dict.fromkeys((x["video_id"], x["category_id"]) for x in rows))
    total, single = {}, {key: {} for key in keys}
    for kind, name in (("mask", "mask"), ("box", "bbox")):
        counts = [hota(*sides(c, kind, lambda s: s > 0.5), kind) for c in concepts]
        whole = [concept_counts(*sides(c, kind, lambda s: s >= 0.5), kind) for c in concepts]
        total |= {f"video_{name}_all_phrase_{k}": v for k, v in hota_figures(combine(counts)).items()}
        total |= {f"video_{name}_demo_{k}": v for k, v in concept_f1(whole, negatives).items()}
        for key, one, tracks in zip(keys, counts, whole, strict=True):
            single[key] |= {f"{name}_{k}": v for k, v in hota_figures(one).items()}
            both = 2 * tracks["TP"] + tracks["FP"] + tracks["FN"]
            F1 = np.where(both > 0, 2 * tracks["TP"] / np.maximum(both, 1), 1.0)
            for k, v in {**tracks, "F1": F1}.items():
                if np.shape(v) == IOUS.shape:
                    single[key] |= {f"{name}_{k}_50_95": v.mean(), f"{name}_{k}_50": v[0], f"{name}_{k}_75": v[5]}
    ap = track_ap(concepts)
    total["video_mask_mAP_50_95"] = ap["mAP"]
    total |= {
        f"video_mask_phrase_ap_{k}": ap[f"phrase_ap{x}"] for k, x in (("50_95", ""), ("50", "_50"), ("75", "_75"))
    }
    return total, single


def test_saco_figures(capsys):
    n = left = 0
    for result in cases("*_eval_res.json"):
        stem = str(result).removesuffix("_eval_res.json")
        want = json.loads(result.read_text())
        total, single = computed(Path(f"{stem}_gt.json"), Path(f"{stem}_pred.json"))
        for name, value in want["dataset_results"].items():
            if "_teta" in name or name.split("_", 2)[2].startswith(("loc_", "assoc_", "cls_")) or "bbox_mAP" in name:
                left += 1  # TETA and AP of boxes are not computed here
            elif "bbox_phrase_ap" in name:
                left += 1
            else:
                assert total[name] == pytest.approx(value, abs=1e-9), name
                n += 1
        for row in want["video_np_results"]:
            own = single[row["video_id"], row["category_id"]]
            for name in row.keys() - {"video_id", "category_id"}:
                assert own[name] == pytest.approx(row[name], abs=1e-9), (row["category_id"], name)
                n += 1
    tell(capsys, f"SA-Co evaluator: {n} of {n} figures to 1e-9 ({left} of TETA and box AP are not computed)")


# ---- ball csv


def test_every_ball_csv_is_read_as_it_stands(capsys):
    found, kinds, n = cases("*.csv"), set(), 0
    for path in found:
        with open(path, newline="") as f:
            rows = list(csv.reader(f))
        normalised = rows[0][0] == "frame_num"
        track = read_ball_csv(path, (1920, 1080))
        kinds.add(track.dialect)
        assert len(track.frames) == len(rows) - 1 and track.dialect in DIALECTS
        for cells, frame, v, xy, status in zip(
            rows[1:], track.frames, track.visibility, track.xy, track.status, strict=True
        ):
            assert frame == int(Path(cells[0]).stem) and v == int(cells[1])
            place = [float(c) if c else np.nan for c in cells[2:4]]
            if np.isnan(place).any() or place == [0, 0]:
                assert np.isnan(xy).all()
            else:
                np.testing.assert_allclose(xy, np.multiply(place, (1920, 1080) if normalised else 1))
            assert status == (int(cells[4]) if len(cells) > 4 and cells[4] else -1)
            n += 1
    tell(capsys, f"ball csv: {n} of {n} rows of {len(found)} files, dialects: {', '.join(sorted(kinds))}")


# ---- hits


def test_hits_of_labelled_clips(capsys):
    """Contacts of all clips with a ball csv and labelled events: found within 2 frames of lo..hi, near told from far."""
    n = right = predicted = bounces = right_bounces = 0
    for path in cases("tennis_clips/*_ball.csv"):
        found = sorted((DATA / "tempopeak" / "annotations").glob(f"*{path.stem.removesuffix('_ball')}.json"))
        if not found:
            continue
        item = load_labels(found[0])[0]
        track = read_ball_csv(path)
        xy = np.full((item["num_frames"], 2), np.nan)
        xy[track.frames] = track.seen()
        events = name_turns(xy, item["width"], item["fps"])
        for e in item["events"]:
            label = e["label"].replace("serve", "swing")
            good = any(p["label"] == label and e["lo"] - 2 <= p["frame"] <= e["hi"] + 2 for p in events)
            n, right = n + ("swing" in label), right + (good and "swing" in label)
            bounces, right_bounces = bounces + ("bounce" in label), right_bounces + (good and "bounce" in label)
        predicted += sum(p["label"] in NAMES[:2] for p in events)
    if not n:
        pytest.skip("no ball csv has labelled events")
    tell(capsys, f"hits: {right} of {n} contacts, {right_bounces} of {bounces} bounces; {predicted} contacts predicted")
    assert right / n >= 0.6 and right / max(predicted, 1) >= 0.6
