"""Score panoptic segmentation: PQ of images, VPQ and STQ of videos, and mean IoU.  Reads files, runs no model.

    python eval/eval_panoptic.py --pred runs/seg/panoptic.json --labels datasets/coco/annotations/panoptic_val2017.json
    python eval/eval_panoptic.py --pred runs/vps/pred.json --pred-png runs/vps/pan_pred \\
        --labels VIPSeg_720P/panoptic_gt_VIPSeg.json --label-png VIPSeg_720P/panomasksRGB

Both sides are COCO panoptic: a json with segments_info and PNGs with id = R + 256 G + 65536 B, 0 = void. Videos are in
VIPSeg's form: annotations hold video_id and their own list of annotations, one a frame; PNGs lie in a folder of each
video. Without --pred-png and --label-png the PNGs lie in a folder that is called like the json.

Figures are those of panopticapi (PQ = sum of IoU / (TP + FP/2 + FN/2), mean over the categories that occur), of VIPSeg's
script (VPQ: mean over windows of 1, 2, 4, 6 frames) and of deeplab2 (STQ). Beside them stand two controls: every pixel
is the category with the largest area, and every item gets the prediction of another item of its size.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import panoptic_quality as pq
from utils import run
from utils.run import UserError
from utils.segmentation_files import (
    compare_panoptic,
    exchange,
    need,
    png_size,
    read_json,
    read_panoptic,
    refuse_same_file,
    same_items,
)

WINDOWS = (1, 2, 4, 6)  # frames
GROUPS = ("All", "Things", "Stuff")
IGNORE, BITS = 2**14, 16  # class of void pixels and bits of the instance in the maps of STQ


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions (COCO panoptic json), as eval/infer_segment.py writes")
    p.add_argument("--labels", required=True, help="labels (COCO panoptic json, of images or videos)")
    p.add_argument(
        "--pred-png", default=None, metavar="DIR", help="PNGs of the predictions (default --pred less .json)"
    )
    p.add_argument("--label-png", default=None, metavar="DIR", help="PNGs of the labels (default --labels less .json)")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def read_categories(where: str, labels: dict) -> dict[int, bool]:
    """{category id: is it a thing}."""
    expected = 'COCO panoptic labels with "categories": [{"id", "isthing"}]'
    categories = need(where, labels.get("categories"), {"id": int, "isthing": int}, expected)
    return {c["id"]: bool(c["isthing"]) for c in categories}


def read_files(args) -> tuple[dict, dict, dict[int, bool], bool]:
    """Label items, predicted items of the same images or videos, categories, and whether they are videos."""
    refuse_same_file(args.pred, args.labels)
    labels, pred = read_json("--labels", args.labels), read_json("--pred", args.pred)
    where = f"--pred {args.pred}"
    is_video = isinstance(labels, dict) and "videos" in labels
    folders = args.label_png or Path(args.labels).with_suffix(""), args.pred_png or Path(args.pred).with_suffix("")
    needed = ("id", "category_id", "area", "iscrowd")
    gt_items = read_panoptic(f"--labels {args.labels}", labels, Path(folders[0]), needed, is_video)
    pred_items = read_panoptic(where, pred, Path(folders[1]), needed[:2], is_video)
    same_items(where, "video" if is_video else "image", set(pred_items), set(gt_items))
    for name, frames in gt_items.items() if is_video else ():
        if [f[0] for f in frames] != [f[0] for f in pred_items[name]]:
            raise UserError(
                f"{where}: video {name} does not hold the frames of its labels; expected {len(frames)} of them"
            )
    return gt_items, pred_items, read_categories(f"--labels {args.labels}", labels), is_video


# ---- scores


def is_copy(frames: list) -> bool:
    """Whether every pixel of an item has the id of its label and every id its category."""
    same = all(g == p for joint, _, _ in frames for g, p in joint)
    return same and all(s["category_id"] == gt[i]["category_id"] for _, gt, pred in frames for i, s in pred.items())


def constant(frames: list, category: int) -> list:
    """An item with one segment of `category` over the whole frame as prediction."""
    wrong = []
    for joint, gt, _ in frames:
        pixels = pq.areas(joint, 0)
        whole = {1: {"category_id": category, "area": sum(pixels.values())}}
        wrong.append((Counter({(g, 1): n for g, n in pixels.items()}), gt, whole))
    return wrong


def as_classes(frames: list, categories: dict[int, bool], order: dict[int, int]) -> Counter:
    """Joint counts of an item in STQ's maps, (class << BITS) + instance: 1, 2, ... for things, 0 for stuff and crowds."""
    numbers, total = ({}, {}), Counter()

    def label(side: int, i: int, segments: dict) -> int:
        if i == pq.VOID:
            return IGNORE << BITS
        category = segments[i]["category_id"]
        uncounted = not categories[category] or segments[i].get("iscrowd", 0)
        instance = 0 if uncounted else numbers[side].setdefault((i, category), len(numbers[side]) + 1)
        return (order[category] << BITS) + instance

    for joint, gt, pred in frames:
        for (g, p), n in joint.items():
            total[label(0, g, gt), label(1, p, pred)] += n
    return total


def score(items: dict[str, list], categories: dict[int, bool], is_video: bool) -> dict:
    """PQ of frames, mean IoU and, for videos, VPQ and STQ of {name: frames of `compare_panoptic`}. None where undefined."""
    windows = WINDOWS if is_video else WINDOWS[:1]
    order = {c: k for k, c in enumerate(sorted(categories))}
    quality = pq.video_panoptic_quality(list(items.values()), categories, windows)
    joints = {name: as_classes(frames, categories, order) for name, frames in items.items()}
    settings = len(order), {order[c] for c, thing in categories.items() if thing}, IGNORE, BITS
    confusion = sum(pq.tube_sums(joint, *settings)[2] for joint in joints.values())
    iou = pq.mean_iou(confusion[:-1])
    result = {f"{k.upper()} {g}": quality[1][g][k] for g in GROUPS for k in ("pq", "sq", "rq")}
    if is_video:
        result |= {f"VPQ {g}": v for g, v in quality["VPQ"].items()}
        result |= {f"VPQ {k} frames": quality[k]["All"]["pq"] for k in windows}
        stq = pq.segmentation_tracking_quality(joints, *settings)
        result |= {k: stq[k] for k in ("STQ", "AQ", "IoU")}
    result = {name: None if v is None or v != v else v for name, v in {**result, "mIoU": iou["mIoU"]}.items()}
    per_class = {c: {**q, **quality[1]["counts"][c]} for c, q in quality[1]["per_class"].items()}
    unlabelled = [sorted(categories)[k] for k in iou["absent"]]
    return {"scores": result, "per_class": per_class, "categories without a labelled pixel": unlabelled}


def show(result: dict) -> None:
    """The table on standard output, in percent."""
    controls = [result["constant"], result["shuffled"]]
    print(f"{'n = ' + str(result['n']) + ' ' + result['what']:20s}{'score':>10s}{'constant':>10s}{'shuffled':>10s}")
    for name, value in result["scores"].items():
        values = [value, *(c.get(name) for c in controls)]
        print(f"{name:20s}" + "".join(f"{'n/a':>10s}" if v is None else f"{100 * v:10.2f}" for v in values))
    print(f"constant: category {result['constant category']} everywhere", end="; ")
    print(f"shuffled: {result['exchanged']} of {result['n']} {result['what']} have another one of their size")
    unlabelled = len(result["categories without a labelled pixel"])
    print(f"{result['frames']} frames; {unlabelled} of {result['categories']} categories have no labelled pixel")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    gt_items, pred_items, categories, is_video = read_files(args)
    items = {name: compare_panoptic(frames, pred_items[name], categories) for name, frames in gt_items.items()}
    if all(is_copy(frames) for frames in items.values()):
        raise UserError(f"--pred {args.pred}: is a copy of the labels; pass what eval/infer_segment.py wrote")
    area = Counter()
    for _, gt, _ in (frame for frames in items.values() for frame in frames):
        for segment in gt.values():
            area[segment["category_id"]] += segment["area"]
    if not area:
        raise UserError(f"--labels {args.labels}: hold no segment; there is nothing to score")

    # ---- scores
    commonest = area.most_common(1)[0][0]
    source = exchange({name: (*png_size(frames[0][1]), len(frames)) for name, frames in gt_items.items()})
    swapped = {name: compare_panoptic(gt_items[name], pred_items[other], categories) for name, other in source.items()}
    result = {"n": len(items), "what": "videos" if is_video else "images", **score(items, categories, is_video)}
    result["constant"] = score({k: constant(v, commonest) for k, v in items.items()}, categories, is_video)["scores"]
    result["shuffled"] = score(swapped, categories, is_video)["scores"] if swapped else {}
    result |= {"constant category": commonest, "exchanged": len(swapped), "categories": len(categories)}
    result |= {"frames": sum(map(len, items.values())), "settings": vars(args)}

    # ---- result
    show(result)
    if result["scores"]["PQ All"] > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    names = ("VPQ All", "STQ", "PQ All", "mIoU") if is_video else ("PQ All", "PQ Things", "PQ Stuff", "mIoU")
    figures = ((name, result["scores"][name]) for name in names)
    line = ", ".join(f"{name} n/a" if v is None else f"{name} {100 * v:.2f}" for name, v in figures)
    run.finish(r, args, "FastSAM2", f"{line} (n={result['n']})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
