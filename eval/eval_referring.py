"""Score referring segmentation: oIoU, mIoU and P@0.5..0.9 of RefCOCO/+/g.  Reads files, runs no model.

    python eval/eval_referring.py --pred runs/ref/val.json --labels datasets/refcoco/refs_unc.json \\
        --instances datasets/refcoco/instances.json --split val

Labels are the refs of RefCOCO as json, [{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent"}]}],
and the COCO instances that they name. Predictions are one mask for every sentence, [{"sent_id", "segmentation": RLE}].
oIoU (also called cIoU) is the sum of intersections over the sum of unions, mIoU the mean over expressions, P@X the share
of expressions with IoU > X.

Beside the score stand two controls: the whole image as every mask, and the mask of an expression that refers to another
object of the same image: where it scores as well, the words did not matter.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.masks import referring_scores, rle_area, rle_encode, rle_intersections, to_rle
from utils.run import UserError
from utils.segmentation_files import checked_rle, exchange, need, read_json, refuse_same_file, same_items


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions, one mask a sentence, as eval/infer_segment.py writes")
    p.add_argument("--labels", required=True, help="refs of RefCOCO, as json")
    p.add_argument("--instances", required=True, help="COCO instances that the refs name")
    p.add_argument("--split", default=None, help="score the refs of this split only (default: all)")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def read_refs(args) -> dict[int, dict]:
    """{ref_id: {image_id, ann_id, sentences: [sent_id]}} of the chosen split."""
    where, refs = f"--labels {args.labels}", {}
    expected = '[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id"}]}]'
    fields = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    listed = need(where, read_json("--labels", args.labels), fields, expected)
    for x in listed:
        if args.split in (None, x["split"]):
            sentences = [s["sent_id"] for s in need(where, x["sentences"], {"sent_id": int}, expected)]
            refs[x["ref_id"]] = {"image_id": x["image_id"], "ann_id": x["ann_id"], "sentences": sentences}
    if not refs:
        splits = ", ".join(sorted({x["split"] for x in listed}))
        raise UserError(
            f"{where}: has no ref of --split {args.split}; expected one of: {splits or 'none, it is empty'}"
        )
    return refs


def read_masks(args, refs: dict[int, dict]) -> tuple[dict[int, dict], dict[int, tuple]]:
    """{ref_id: code of its object} and {image_id: (H, W)} from the instances."""
    where, content = f"--instances {args.instances}", read_json("--instances", args.instances)
    content = content if isinstance(content, dict) else {}
    expected = 'COCO instances, {"images": [{"id", "height", "width"}], "annotations": [{"id", "segmentation"}]}'
    images = need(where, content.get("images"), {"id": int, "height": int, "width": int}, expected)
    annotations = need(where, content.get("annotations"), {"id": int, "segmentation": dict | list}, expected)
    sizes, known, masks = {x["id"]: (x["height"], x["width"]) for x in images}, {x["id"]: x for x in annotations}, {}
    for i, ref in refs.items():
        if ref["ann_id"] not in known or ref["image_id"] not in sizes:
            what = f"annotation {ref['ann_id']} or image {ref['image_id']}"
            raise UserError(f"{where}: lacks {what}, which ref {i} names; pass the instances of these refs")
        masks[i] = to_rle(known[ref["ann_id"]]["segmentation"], *sizes[ref["image_id"]])
    return masks, sizes


def read_pred(args, refs: dict[int, dict], sizes: dict[int, tuple]) -> dict[int, dict]:
    """{sent_id: code}. UserError unless there is one mask, of the size of its image, for every sentence."""
    where = f"--pred {args.pred}"
    expected = '[{"sent_id", "segmentation": {"size": [H, W], "counts": ...}}]'
    items = need(where, read_json("--pred", args.pred), {"sent_id": int, "segmentation": dict}, expected)
    found = {x["sent_id"]: x["segmentation"] for x in items}
    if len(found) < len(items):
        raise UserError(f"{where}: has {len(items)} masks for {len(found)} sentences; expected one for each")
    image_of = {s: ref["image_id"] for ref in refs.values() for s in ref["sentences"]}
    same_items(where, "sentence", set(found), set(image_of))
    for s, code in found.items():
        if not {"size", "counts"} <= code.keys():
            raise UserError(f"{where}: the mask of sentence {s} is no RLE; expected {expected}")
        try:
            found[s] = checked_rle(code, *sizes[image_of[s]])
        except ValueError as e:
            raise UserError(f"{where}: sentence {s}: {e}; write masks at the size of the image") from e
    return found


# ---- scores


def score(pairs: list[tuple[dict, dict]]) -> dict[str, float]:
    """Scores of (label code, predicted code) of every expression."""
    inter = np.array([rle_intersections([gt], [pred])[0, 0] for gt, pred in pairs])
    union = np.array([rle_area(gt) + rle_area(pred) for gt, pred in pairs]) - inter
    return referring_scores(inter, union)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    for labels in (args.labels, args.instances):
        refuse_same_file(args.pred, labels)
    refs = read_refs(args)
    masks, sizes = read_masks(args, refs)
    pred = read_pred(args, refs, sizes)
    pairs = [(masks[i], pred[s]) for i, ref in refs.items() for s in ref["sentences"]]
    if all(gt == own for gt, own in pairs):
        raise UserError(f"--pred {args.pred}: every mask is a label, pixel by pixel; pass what was predicted")

    # ---- scores
    source = exchange({i: ref["image_id"] for i, ref in refs.items()})
    whole = {i: rle_encode(np.ones(sizes[ref["image_id"]], bool)) for i, ref in refs.items()}
    wrong = []
    for i, other in source.items():
        theirs = refs[other]["sentences"]
        wrong += [(masks[i], pred[theirs[k % len(theirs)]]) for k in range(len(refs[i]["sentences"]))]
    result = {"n": len(pairs), "scores": score(pairs), "exchanged": len(wrong)}
    result["whole image"] = score([(masks[i], whole[i]) for i, ref in refs.items() for _ in ref["sentences"]])
    result["other object"] = score(wrong) if wrong else {}
    result |= {"refs": len(refs), "images": len({ref["image_id"] for ref in refs.values()})}
    result |= {"empty masks": sum(rle_area(code) == 0 for code in pred.values()), "settings": vars(args)}

    # ---- result
    print(f"{'n = ' + str(result['n']) + ' expressions':20s}{'score':>10s}{'whole image':>14s}{'other object':>14s}")
    for name, value in result["scores"].items():
        other = result["other object"].get(name)
        print(f"{name:20s}{100 * value:10.2f}{100 * result['whole image'][name]:14.2f}", end="")
        print(f"{'n/a':>14s}" if other is None else f"{100 * other:14.2f}")
    print(f"{result['refs']} objects on {result['images']} images, {result['empty masks']} empty masks", end="; ")
    print(f"other object: {len(wrong)} of {result['n']} expressions have the mask of another ref of their image")
    if result["scores"]["mIoU"] > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures = ", ".join(f"{name} {100 * result['scores'][name]:.2f}" for name in ("oIoU", "mIoU", "P@0.5"))
    run.finish(r, args, "FastSAM2", f"{figures} (n={result['n']})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
