"""Segmentation metrics against what the official programs printed.

Reads LAB_SHARED/data/fastsam2, whatever is there: ref_panoptic_pq*, ref_pq_deeplab2*, ref_coco_ap*, ref_davis_jf*,
ref_stq_vpq*, ref_ytvis_ap*. Every size comes from the files. Tolerances: PQ, AP and F 1e-9, J equal, STQ 1e-7 (deeplab2
computes AQ in float32), deeplab2's PQ 1e-4 (asserted there to four places).
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import instance_ap, masks
from utils import panoptic_quality as pq

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fastsam2"


def folders(kind: str) -> list[Path]:
    found = sorted(p for p in SHARED.glob(f"{kind}*") if (p / "expected.json").is_file())
    if not found:
        pytest.skip(f"no reference cases {kind}* in {SHARED}; set LAB_SHARED")
    return found


def read(path: Path):
    return json.loads(path.read_text())


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n{text}", end="")


def id_map(path: Path) -> np.ndarray:
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
    return rgb @ [1, 256, 65536]


def grey(path: Path) -> np.ndarray:
    """Grey level as it is stored; deeplab2's pictures are grey, some with an alpha channel or three equal ones."""
    array = np.asarray(Image.open(path))
    return (array if array.ndim == 2 else array[..., 0]).astype(np.int64)


# ---- PQ


def image_counts(folder: Path, labels: dict, name: str) -> list:
    categories, parts = {c["id"] for c in labels["categories"]}, []
    predicted = {a["image_id"]: a for a in read(folder / f"{name}.json")["annotations"]}
    for a in labels["annotations"]:
        own = predicted[a["image_id"]]
        joint = pq.joint_counts(id_map(folder / "gt" / a["file_name"]), id_map(folder / name / own["file_name"]))
        pixels = pq.areas(joint, 1)
        pred = {s["id"]: {**s, "area": pixels[s["id"]]} for s in own["segments_info"]}
        assert {s["category_id"] for s in pred.values()} <= categories
        parts.append(pq.match_segments(joint, {s["id"]: s for s in a["segments_info"]}, pred))
    return parts


def assert_quality(got: dict, want: dict) -> None:
    for group in ("All", "Things", "Stuff"):
        assert got[group] == pytest.approx(want[group], abs=1e-9)
    for c, own in want.get("per_class", {}).items():
        assert got["per_class"].get(int(c), {"pq": 0, "sq": 0, "rq": 0}) == pytest.approx(own, abs=1e-9)


def assert_counts(got: dict, want: dict) -> None:
    assert {str(c) for c in got} == {c for c, own in want.items() if own["tp"] + own["fp"] + own["fn"]}
    for c, own in got.items():
        assert own == pytest.approx(want[str(c)], abs=1e-9)


def test_panoptic_quality_as_panopticapi(capsys):
    n = 0
    for folder in folders("ref_panoptic_pq"):
        labels = read(folder / "gt.json")
        is_thing = {c["id"]: bool(c["isthing"]) for c in labels["categories"]}
        for name, want in read(folder / "expected.json").items():
            counts = pq.add_counts(image_counts(folder, labels, name))
            assert_counts(counts, want["counts"])
            assert_quality(pq.panoptic_quality(counts, is_thing), want)
            n += 1
    tell(capsys, f"panopticapi: {n} of {n} prediction sets, PQ, SQ, RQ and every count")


def deeplab_maps(folder: Path, name: str, divisor: int, colors: dict, to_class: dict) -> tuple:
    """Label and predicted map of one of deeplab2's pictures, class * divisor + instance."""
    instance = grey(next(folder.glob(f"{name}_gt*.png")))
    known = {int(k): c for k, c in to_class.items()}
    gt = np.vectorize(known.get, otypes=[np.int64])(instance) * divisor + instance
    rgb = np.asarray(Image.open(folder / f"{name}_pred_class.png").convert("RGB"))
    classes = np.zeros(rgb.shape[:2], np.int64)
    for color, c in colors.items():
        classes[(rgb == [int(x) for x in color.split(",")]).all(-1)] = c
    return gt, classes * divisor + grey(folder / f"{name}_pred_instance.png")


def test_panoptic_quality_as_deeplab2(capsys):
    n = 0
    for folder in folders("ref_pq_deeplab2"):
        expected = read(folder / "expected.json")
        for case, want in expected.items():
            if not (isinstance(want, dict) and "pq" in want):
                continue
            names = [x for x in expected["gt_instance_to_class"] if x in case.split("_")]
            pairs = [
                deeplab_maps(folder, x, 256, expected["color_to_class"], expected["gt_instance_to_class"][x])
                for x in names
            ]
            counts = pq.add_counts([pq.match_label_maps(*p, divisor=256, ignored=want["ignored"]) for p in pairs])
            got = {k: v for k, v in pq.panoptic_quality(counts, dict.fromkeys(counts, True))["All"].items() if k != "n"}
            got |= {k: np.mean([own[k] for own in counts.values()]) for k in ("tp", "fn", "fp")}
            assert got == pytest.approx({k: want[k] for k in got}, abs=1e-4), case
            n += 1
    assert n
    tell(capsys, f"deeplab2 PQ: {n} of {n} cases")


# ---- STQ, VPQ


def as_segments(joint: Counter, things: list[int], ignore: int) -> tuple:
    """(joint counts, label segments, predicted segments) of grids of (class << 16) + instance; ignored is void, id 0."""
    ids = {x: 0 if x >> 16 == ignore else x + 1 for pair in joint for x in pair}
    frame = Counter()
    for (g, p), k in joint.items():
        frame[ids[g], ids[p]] += k
    sides = []
    for side in (0, 1):
        pixels = pq.areas(frame, side)
        sides.append(
            {
                i: {
                    "category_id": x >> 16,
                    "area": pixels[i],
                    "iscrowd": side == 0 and x >> 16 in things and x & 0xFFFF == 0,
                }
                for x, i in ids.items()
                if i and i in pixels
            }
        )
    return frame, *sides


def grids(cases, name: str) -> list[list[Counter]]:
    """Joint counts by video and frame; grids are (T, H, W) of one video or (V, T, H, W)."""
    pair = [cases[f"{name}_{side}"] for side in ("gt", "pred")]
    pair = [x[None] if x.ndim == 3 else x for x in pair]
    return [[pq.joint_counts(*frame) for frame in zip(*video, strict=True)] for video in zip(*pair, strict=True)]


def test_stq_as_deeplab2(capsys):
    n = 0
    for folder in folders("ref_stq_vpq"):
        cases = np.load(folder / "cases.npz")
        for k, case in enumerate(read(folder / "expected.json")["stq"]):
            videos = {v: pq.add_joint_counts(f) for v, f in enumerate(grids(cases, case.get("name", str(k))))}
            settings = case["num_classes"], case["things"], case["ignore"], case["bit_shift"]
            got = pq.segmentation_tracking_quality(videos, *settings)
            assert {x: got[x] for x in case["expected"]} == pytest.approx(case["expected"], abs=1e-7), f"case {k}"
            for name, values in case.get("per_seq", {}).items():
                own = [got["videos"][v][name.removesuffix("_per_seq")] for v in range(len(values))]
                assert own == pytest.approx(values, abs=1e-7), f"case {k}"
            n += 1
    tell(capsys, f"STQ: {n} of {n} cases")


def test_vpq_as_vipseg(capsys):
    n = 0
    for folder in folders("ref_stq_vpq"):
        cases, expected = np.load(folder / "cases.npz"), read(folder / "expected.json")
        for key, want in expected.items():
            if not key.startswith("vpq_on_"):
                continue
            case = next(c for c in expected["stq"] if c.get("name") == key.removeprefix("vpq_on_"))
            is_thing = {c: c in case["things"] for c in range(case["num_classes"])}
            videos = [
                [as_segments(frame, case["things"], case["ignore"]) for frame in video]
                for video in grids(cases, case["name"])
            ]
            windows = [int(k) for k in want if k.isdigit()]
            got = pq.video_panoptic_quality(videos, is_thing, windows)
            for k in windows:
                assert_quality(got[k], want[str(k)])
                assert_counts(got[k]["counts"], want[str(k)]["counts"])
                n += 1
            assert got["VPQ"]["All"] == pytest.approx(want["VPQ_mean_all"], abs=1e-9)
    tell(capsys, f"VPQ: {n} of {n} windows, every count, and their means")


# ---- AP


def assert_scores(got: dict, want: dict, what: str) -> None:
    assert want and {k: got[k] for k in want} == pytest.approx(want, abs=1e-9), what


def test_coco_ap_as_pycocotools(capsys):
    n = 0
    for folder in folders("ref_coco_ap"):
        own = folder / "instances.json"
        labels = read(own if own.is_file() else SHARED / "coco_mini" / "instances.json")
        for kind, want in read(folder / "expected.json").items():
            assert_scores(instance_ap.coco_ap(labels, read(folder / "predictions.json"), kind), want, kind)
            n += len(want)
    tell(capsys, f"COCO AP: {n} of {n} scores")


def test_ytvis_ap_as_ytvoseval(capsys):
    n = pairs = 0
    for folder in folders("ref_ytvis_ap"):
        labels, predictions, want = (read(folder / f"{x}.json") for x in ("gt", "predictions", "expected"))
        assert_scores(instance_ap.ytvis_ap(labels, predictions), want, folder.name)
        n += len(want)
        for key, iou in read(folder / "ious_by_video_category.json").items():
            sides = [
                [x for x in side if f"{x['video_id']}_{x['category_id']}" == key]
                for side in (predictions, labels["annotations"])
            ]
            sides[0].sort(key=lambda x: -x["score"])
            got = instance_ap.tube_iou(*([x["segmentations"] for x in side] for side in sides))
            np.testing.assert_allclose(got, np.array(iou).reshape(got.shape), rtol=0, atol=1e-12)
            pairs += got.size
    tell(capsys, f"YouTube-VIS AP: {n} of {n} scores, IoU of {pairs} of {pairs} pairs of tubes")


# ---- J and F


def unpacked(arrays, name: str) -> np.ndarray | None:
    """A stack of masks (T, H, W) bool from packed bits; None when it is not there."""
    if name not in arrays:
        return None
    return np.unpackbits(arrays[name], axis=-1)[..., : arrays[f"{name}_shape"][-1]].astype(bool)


def test_j_and_f_as_davis(capsys):
    n = frames = 0
    for folder in folders("ref_davis_jf"):
        arrays = np.load(folder / "masks.npz")
        for name, want in read(folder / "expected.json").items():
            if not isinstance(want.get("J"), list):
                continue
            base = name if f"{name}_gt" in arrays else name.removesuffix("_void")
            gt, pred = unpacked(arrays, f"{base}_gt"), unpacked(arrays, f"{base}_pred")
            void = unpacked(arrays, f"{name}_void") if f"{name}_void" in arrays else unpacked(arrays, name)
            J = masks.jaccard(gt, pred, void)
            F = [masks.boundary_f(*m) for m in zip(gt, pred, [None] * len(gt) if void is None else void, strict=True)]
            assert J.tolist() == want["J"], name  # the same integers divided
            assert pytest.approx(want["F"], abs=1e-9) == F, name
            for values, stored in ((J, "J_stats"), (np.array(F), "F_stats")):
                if stored in want:
                    assert masks.sequence_statistics(values) == pytest.approx(want[stored], abs=1e-9), name
            n, frames = n + 1, frames + len(J)
    tell(capsys, f"J and F: {n} of {n} sequences, {frames} frames")


def test_protocol_as_davis(capsys):
    n = 0
    for folder in folders("ref_davis_jf"):
        for key, want in read(folder / "expected.json").items():
            root = folder / key.removesuffix("_semi_supervised")
            if "J&F-Mean" not in want or not root.is_dir():
                continue
            sequences = {}
            for name in (root / "ImageSets/2017/val.txt").read_text().split():
                names = sorted(p.name for p in (root / "Annotations/480p" / name).glob("*.png"))
                sides = root / "Annotations/480p" / name, root / "results" / name
                stacks = [np.stack([np.asarray(Image.open(side / x)) for x in names]) for side in sides]
                sequences[name] = masks.davis_objects(*stacks)
            got = masks.davis_summary(sequences)
            assert got["J&F"] == pytest.approx(want["J&F-Mean"], abs=1e-9)
            for m in "JF":
                assert [o[m]["mean"] for o in got["objects"].values()] == pytest.approx(want[m]["M"], abs=1e-9)
                assert [o[m]["recall"] for o in got["objects"].values()] == pytest.approx(want[m]["R"], abs=1e-9)
                assert [o[m]["decay"] for o in got["objects"].values()] == pytest.approx(want[m]["D"], abs=1e-9)
                assert {k: o[m]["mean"] for k, o in got["objects"].items()} == pytest.approx(want[m]["M_per_object"])
            n += len(got["objects"])
    assert n
    tell(capsys, f"DAVIS protocol: {n} of {n} objects")
