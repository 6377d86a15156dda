"""Score instances: average precision on COCO (images) or YouTube-VIS (videos).  Reads files, runs no model.

    python eval/eval_vis.py --pred runs/vis/results.json --labels datasets/ytvis_2019/annotations/instances_val.json
    python eval/eval_vis.py --pred runs/seg/instances.json --labels datasets/coco/annotations/instances_val2017.json

Labels with "videos" are scored as YouTube-VIS: predictions [{"video_id", "category_id", "score", "segmentations": [RLE
or null, one a frame]}]; labels with "images" as COCO, masks and boxes: [{"image_id", "category_id", "score",
"segmentation": RLE}]. Matching and curves are those of pycocotools; the IoU of tubes is that of YTVOSeval.

Beside the score stand two controls: one mask over the whole frame, of the commonest category, and the predictions of
another item of the same size and length. Items with objects but without a prediction are refused, unless --missing-ok.
"""

import argparse
import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.instance_ap import NAMES, coco_ap, ytvis_ap
from utils.masks import rle_encode
from utils.run import UserError
from utils.segmentation_files import exchange, need, read_json, refuse_same_file, tube_of

NUMBER = int | float


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions (results json), as eval/infer_segment.py writes")
    p.add_argument("--labels", required=True, help="labels (YouTube-VIS or COCO instances json)")
    p.add_argument(
        "--missing-ok", action="store_true", help="an item without a prediction means that nothing was found"
    )
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def read_labels(path: str) -> tuple[dict, str, dict[int, tuple], list[list]]:
    """Labels, "video" or "image", {item: (H, W, frames)} and the codes of every annotation."""
    where, labels = f"--labels {path}", read_json("--labels", path)
    kind = "video" if isinstance(labels, dict) and "videos" in labels else "image"
    expected = '{"videos" or "images": [{"id", "height", "width"}], "categories", "annotations"}'
    if not isinstance(labels, dict):
        raise UserError(f"{where}: expected {expected}")
    fields = {"id": int, "height": int, "width": int} | ({"length": int} if kind == "video" else {})
    items = need(where, labels.get(kind + "s"), fields, expected)
    need(where, labels.get("categories"), {"id": int}, expected)
    fields = {kind + "_id": int, "category_id": int}
    fields |= (
        {"segmentations": list, "areas": list} if kind == "video" else {"area": NUMBER, "bbox": list, "iscrowd": int}
    )
    if not need(where, labels.get("annotations"), fields, expected):
        raise UserError(f"{where}: holds no annotation; there is nothing to score")
    sizes = {x["id"]: (x["height"], x["width"], x["length"] if kind == "video" else 1) for x in items}
    for x in labels["annotations"]:
        if x[kind + "_id"] not in sizes:
            raise UserError(f"{where}: an annotation names {kind} {x[kind + '_id']}, which is not listed")
    tubes = [tube_of(where, x, kind, sizes[x[kind + "_id"]]) for x in labels["annotations"]]
    return labels, kind, sizes, tubes


def read_files(args) -> tuple[dict, list[dict], str, dict[int, tuple]]:
    """Labels, predictions, "video" or "image", sizes. UserError if they do not fit."""
    refuse_same_file(args.pred, args.labels)
    labels, kind, sizes, gt_tubes = read_labels(args.labels)
    where, item, mask = f"--pred {args.pred}", kind + "_id", "segmentations" if kind == "video" else "segmentation"
    fields = {item: int, "category_id": int, "score": NUMBER, mask: list if kind == "video" else dict | list}
    pred = need(where, read_json("--pred", args.pred), fields, f'[{{"{item}", "category_id", "score", "{mask}"}}]')
    categories, tubes = {c["id"] for c in labels["categories"]}, []
    for k, x in enumerate(pred):
        place = f"{where}: prediction {k}"
        if x[item] not in sizes:
            raise UserError(f"{place} is of {kind} {x[item]}, which is not in the labels; leave it out")
        if x["category_id"] not in categories:
            raise UserError(
                f"{place} has category {x['category_id']}, which the labels do not know; expected their ids"
            )
        box = x.get("bbox", [0] * 4) if kind == "image" else [0] * 4
        if ("bbox" in x) != ("bbox" in pred[0]) or len(box) != 4 or not all(isinstance(v, NUMBER) for v in box):
            raise UserError(f"{place}: expected a bbox of 4 numbers (x, y, width, height in px), in all or in none")
        if not math.isfinite(x["score"]):
            raise UserError(f"{place} has score {x['score']}; expected a finite number")
        tubes.append(tube_of(place, x, kind, sizes[x[item]]))
    missing = {x[item] for x in labels["annotations"]} - {x[item] for x in pred}
    if not pred:
        raise UserError(f"{where}: holds no prediction; there is nothing to score")
    if missing and not args.missing_ok:
        n = f"{len(missing)} of {len(sizes)} {kind}s"
        raise UserError(
            f"{where}: {n} have objects but no prediction, as {min(missing)}; predict them, or --missing-ok"
        )
    sides = ((x, t) for x, t in zip(pred, tubes, strict=True)), zip(labels["annotations"], gt_tubes, strict=True)
    keys = [sorted((x[item], x["category_id"], json.dumps(t)) for x, t in side) for side in sides]
    if keys[0] == keys[1]:
        raise UserError(f"{where}: every mask is a label, pixel by pixel; pass what eval/infer_segment.py wrote")
    return labels, pred, kind, sizes


# ---- scores


def score(labels: dict, pred: list[dict], kind: str) -> dict[str, dict]:
    """{"tubes"} of videos, {"masks", "boxes"} of images: the scores by NAMES, None where nothing can be found."""
    if kind == "video":
        found = {"tubes": ytvis_ap(labels, pred)}
    else:
        found = {"masks": coco_ap(labels, pred, "segm"), "boxes": coco_ap(labels, pred, "bbox")}
    return {
        part: {name: None if value == -1 else value for name, value in scores.items()} for part, scores in found.items()
    }


def constant(sizes: dict[int, tuple], category: int, kind: str) -> list[dict]:
    """Of every item one mask over the whole frame."""
    pred = []
    for i, (height, width, frames) in sizes.items():
        full = rle_encode(np.ones((height, width), bool))
        masks = {"segmentations": [full] * frames} if kind == "video" else {"segmentation": full}
        pred.append({kind + "_id": i, "category_id": category, "score": 1.0, **masks})
    return pred


def shuffled(labels: dict, pred: list[dict], kind: str, sizes: dict[int, tuple]) -> tuple[dict, list[dict], int]:
    """Labels and predictions of the items that change places, each with those of another one, and their number."""
    source, own = exchange(sizes), defaultdict(list)
    for x in pred:
        own[x[kind + "_id"]].append(x)
    moved = [{**x, kind + "_id": i} for i, other in source.items() for x in own[other]]
    kept = {kind + "s": [x for x in labels[kind + "s"] if x["id"] in source]}
    kept["annotations"] = [x for x in labels["annotations"] if x[kind + "_id"] in source]
    return {**labels, **kept}, moved, len(source)


def show(result: dict) -> None:
    """The table on standard output, in percent."""
    for part in result["scores"]:
        print(f"{part:10s}{'score':>10s}{'constant':>10s}{'shuffled':>10s}")
        for name in NAMES:
            values = [x.get(part, {}).get(name) for x in (result["scores"], result["constant"], result["shuffled"])]
            print(f"{name:10s}" + "".join(f"{'n/a':>10s}" if v is None else f"{100 * v:10.2f}" for v in values))
    what = f"n = {result['n']} {result['what']}, {result['objects']} objects, {result['predictions']} predictions"
    print(f"{what}; {result['without a prediction']} {result['what']} without a prediction")
    print(f"constant: category {result['constant category']} over the whole frame", end="; ")
    print(f"shuffled: {result['exchanged']} of {result['n']} {result['what']} have those of another one of their size")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    labels, pred, kind, sizes = read_files(args)

    # ---- scores
    commonest = Counter(x["category_id"] for x in labels["annotations"]).most_common(1)[0][0]
    others, moved, exchanged = shuffled(labels, pred, kind, sizes)
    result = {"n": len(sizes), "what": kind + "s", "scores": score(labels, pred, kind)}
    result["constant"] = score(labels, constant(sizes, commonest, kind), kind)
    result["shuffled"] = score(others, moved, kind) if exchanged else {}
    result |= {"objects": len(labels["annotations"]), "predictions": len(pred), "constant category": commonest}
    result |= {"exchanged": exchanged, "without a prediction": len(sizes.keys() - {x[kind + "_id"] for x in pred})}
    result["settings"] = vars(args)

    # ---- result
    show(result)
    scores = {part: x["AP"] for part, x in result["scores"].items()}
    if (next(iter(scores.values())) or 0) > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures = [f"AP of {part} " + ("n/a" if ap is None else f"{100 * ap:.2f}") for part, ap in scores.items()]
    run.finish(r, args, "FastSAM2", f"{', '.join(figures)} (n={result['n']})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
