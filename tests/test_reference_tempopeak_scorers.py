"""The scorers against stored results of the reference code (E2E-Spot, T-DEED, AdaSpot).  LAB_SHARED holds the cases."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from utils.spotting_metrics import e2e_map, nms_e2e, nms_greedy, nms_soft
from utils.spotting_metrics_other import golfdb_pce, soccernet_average_map

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "tempopeak" / "scorer_cases"


def cases_of(kind: str) -> list[dict]:
    files = sorted(CASES.glob(f"*{kind}*.json"))
    if not files:
        pytest.skip(f"no reference cases *{kind}*.json below LAB_SHARED ({CASES})")
    return [case for f in files for case in json.loads(f.read_text(encoding="utf-8"))["cases"]]


def suppress(key: str, pred: list[dict]) -> list[dict]:
    """The variant a key of the case file names: e2e_spot, e2e_nms3, tdeed_nms1_thr0.01, tdeed_softnms3_thr0.01."""
    if key == "e2e_spot":
        return pred
    kind, window, floor = re.fullmatch(r"(e2e_nms|\w+_nms|\w+_softnms)([\d.]+?)(?:_thr([\d.]+))?", key).groups()
    if kind == "e2e_nms":
        return nms_e2e(pred, float(window))
    return (nms_soft if kind.endswith("softnms") else nms_greedy)(pred, float(window), float(floor or 0.01))


def same(value: float, expected: float | None) -> bool:
    """Equal to 1e-9; NaN (None in some json files) only equals NaN."""
    nan = expected is None or math.isnan(expected)
    return math.isnan(value) if nan else abs(value - expected) <= 1e-9


def faults(case: dict, key: str) -> list[str]:
    """What differs from the stored result; an empty list means agreement."""
    want, found = case[key], []
    pred = suppress(key, case["pred"])
    for video, kept in zip(pred, want.get("kept", pred), strict=True):
        events, wanted = video["events"], kept["events"]
        names = [(e["frame"], e["label"]) for e in events] == [(e["frame"], e["label"]) for e in wanted]
        if video["video"] != kept["video"] or not names:
            found.append(f"kept {events}, expected {wanted}")
        elif not all(same(e["score"], w["score"]) for e, w in zip(events, wanted, strict=True)):
            found.append(f"scores {events}, expected {wanted}")
    tolerances = tuple(case["tolerances"])
    if "raises" in want:
        assert want["raises"] == "AssertionError"
        with pytest.raises(AssertionError):
            e2e_map(case["truth"], pred, tolerances)
        return found
    got = e2e_map(case["truth"], pred, tolerances)
    if not all(same(got["mAP"][d], w) for d, w in zip(tolerances, want["mAP"], strict=True)):
        found.append(f"mAP {got['mAP']}, expected {want['mAP']}")
    if set(got["AP"]) != set(want["AP_per_class"]):
        found.append(f"classes {sorted(got['AP'])}, expected {sorted(want['AP_per_class'])}")
    for label, values in want["AP_per_class"].items():
        if not all(same(got["AP"].get(label, {}).get(d, -1.0), w) for d, w in zip(tolerances, values, strict=True)):
            found.append(f"AP of {label} {got['AP'].get(label)}, expected {values}")
    return found


def test_e2e_spot_cases():
    cases = cases_of("e2e_spot")
    runs = [(case, key) for case in cases for key in case if key == "e2e_spot" or "nms" in key]
    bad = [f"{case['name']} / {key}: {fault}" for case, key in runs for fault in faults(case, key)]
    print(
        f"e2e_spot: {len(cases)} cases, {len(runs) - len({b.split(': ')[0] for b in bad})} of {len(runs)} results agree"
    )
    assert runs and not bad, "\n".join(bad)


def test_edge_cases_the_reference_description_names():
    """Two truths on one frame, nearest truth taken, no truth at all, fractional frames, same-frame predictions."""

    def video(*frames, scores=None):
        events = [{"frame": f, "label": "hit"} for f in frames]
        for e, score in zip(events, scores or [], strict=bool(scores)):
            e["score"] = score
        return [{"video": "a", "events": events}]

    twice = e2e_map(video(10, 10), video(10, 10, scores=[0.9, 0.8]))["mAP"]
    assert twice == {0: 0.5, 1: 0.5, 2: 0.5, 4: 0.5}  # both count below the line, one can be recalled
    second = e2e_map(video(10, 20), video(11, 12, scores=[0.9, 0.8]))["mAP"]
    assert second[4] == 0.5  # the second prediction meets only the truth at 20
    assert math.isnan(e2e_map(video(), video(3, scores=[0.5]))["mAP"][0])
    assert e2e_map(video(10), video(10.5, scores=[0.5]))["mAP"] == {0: 0.0, 1: 1.0, 2: 1.0, 4: 1.0}
    same_frame = video(10, 10, scores=[0.5, 0.9])
    assert [e["score"] for e in nms_e2e(same_frame, 1)[0]["events"]] == [0.5, 0.9]
    assert [e["score"] for e in nms_greedy(same_frame, 1)[0]["events"]] == [0.9]
    assert [e["score"] for e in nms_soft(same_frame, 1)[0]["events"]] == [0.9]
    chain = video(10, 11, 12, scores=[0.9, 0.8, 0.7])
    assert [e["frame"] for e in nms_e2e(chain, 1)[0]["events"]] == [10]  # a dropped event still suppresses
    assert [e["frame"] for e in nms_greedy(chain, 1)[0]["events"]] == [10, 12]


def test_not_strict_differs_only_in_what_it_refuses():
    truth = [{"video": "a", "events": [{"frame": 10, "label": "hit"}]}]
    over = [{"video": "a", "events": [{"frame": 10, "label": "hit", "score": 1.0000001}]}]
    with pytest.raises(AssertionError):
        e2e_map(truth, over)
    assert e2e_map(truth, over, strict=False)["mAP"][0] == 1.0
    with pytest.raises(ValueError, match="'b'"):
        e2e_map(truth, [*over, {"video": "b", "events": []}], strict=False)


def soccer_videos(case: dict, scored: bool) -> list[dict]:
    """Rows [frame, class, visible 1 / -1] or [frame, class, score] of a case as videos."""
    videos = []
    for index, game in enumerate(case["games"]):
        events = [{"frame": f, "label": str(c)} for f, c, _ in game["pred" if scored else "truth"]]
        for e, (_, _, third) in zip(events, game["pred" if scored else "truth"], strict=True):
            e |= {"score": third} if scored else {"visibility": "visible" if third > 0 else "not shown"}
        videos.append({"video": str(index), "num_frames": game["num_frames"], "events": events})
    return videos


def test_soccernet_cases():
    cases, bad, results = cases_of("soccernet"), [], 0
    seconds = {"at1": (1,), "at2": (2,), "tight": (1, 2, 3, 4, 5), "half_second": (0.5,)}
    for case in cases:
        classes = [str(c) for c in range(case["num_classes"])]
        for name, want in case["results"].items():
            truth, pred = soccer_videos(case, False), soccer_videos(case, True)
            got = soccernet_average_map(truth, pred, classes, case["framerate"], seconds[name])
            pairs = [("mAP", "a_mAP"), ("visible", "a_mAP_visible"), ("unshown", "a_mAP_unshown")]
            agree = [same(got[ours], want[theirs]) for ours, theirs in pairs]
            agree += [same(got["AP"][c], w) for c, w in zip(classes, want["a_mAP_per_class"], strict=True)]
            results += 1
            if not all(agree):
                bad.append(f"{case['name']} / {name}: {got}, expected {want}")
    print(f"soccernet: {len(cases)} cases, {results - len(bad)} of {results} results agree")
    assert results and not bad, "\n".join(bad)


def test_golfdb_cases():
    cases, bad = cases_of("golfdb_pce"), []
    for case in cases:
        got = golfdb_pce(case["probs"], case["events"], None if case["tol_arg"] == -1 else case["tol_arg"])
        want = (case["pred_frames"], case["deltas"], case["correct"], case["tol_used"])
        if (*(got[k].tolist() for k in ("frames", "deltas", "correct")), got["tolerance"]) != want:
            bad.append(f"seed {case['seed']}, tolerance {case['tol_arg']}: {got}, expected {want}")
    print(f"golfdb_pce: {len(cases) - len(bad)} of {len(cases)} cases agree")
    assert cases and not bad, "\n".join(bad)
