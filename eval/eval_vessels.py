"""Score vessel probabilities against masks drawn by people, inside the field of view.  Reads files, runs no model.

    python eval/eval_vessels.py --pred runs/vessels/test --labels datasets/CHASE_DB1
    python eval/eval_vessels.py --pred runs/sa2va/test --labels datasets/CHASE_DB1 --compare unet=runs/vessels/test
    python eval/eval_vessels.py --pred runs/vessels/train --labels datasets/CHASE_DB1 --split train --train-images

Predictions are what eval/infer_vessels.py writes: 16-bit PNGs with sidecars. Every picture of the split needs one, made
from the very same file; a failed one scores 0. Refused are predictions without provenance, equal to a label (at any
threshold, also inverted), or of pictures that their model was trained on, unless --train-images.

Rows: the predictions at --threshold and at the one chosen in training; other predictions (--compare: the small U-Net);
darkness: a difference of Gaussians, only its threshold learned, from training pictures; the other human observer;
ceiling: the truth averaged to the grid of the model's logits and enlarged again; the whole field of view called vessel;
shuffled: predictions against the truth of other pictures. 0/0 is undefined: left out of the mean and counted below.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.vessels import FORMATS, open_vessels
from utils import run
from utils import vessel_controls as vc
from utils import vessel_metrics as vm
from utils.probability_files import Prediction, check_source, read_predictions
from utils.run import UserError
from utils.weights import file_sha256

SUSPICIOUS = 0.98  # Dice that no vessel method reaches: two people agree to about 0.8
SAM_GRID = (256, 256)  # logits of SAM 2's mask decoder
TRIED = 10  # training pictures that the threshold of `darkness` is chosen on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="folder of predictions, as eval/infer_vessels.py writes")
    p.add_argument("--labels", required=True, metavar="ROOT", help="folder of a vessel set, or a manifest.jsonl")
    p.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="layout of --labels")
    p.add_argument("--split", default="test", choices=["train", "val", "test"], help="pictures to score (default test)")
    p.add_argument("--split-at", type=int, default=None, metavar="N",
                   help="chase, stare, hrf: last number that is for training (default: the set's own)")  # fmt: skip
    p.add_argument("--val", default="", metavar="P,P,..", help="patients of the training split kept for validation")
    p.add_argument("--polygons", action="store_true", help="manifest: accept polygons, and measure what they hide")
    p.add_argument("--observer", type=int, default=1, choices=[1, 2], help="whose masks are the truth (default 1)")
    p.add_argument("--threshold", type=float, default=0.5, help="vessel where the probability is above (default 0.5)")
    p.add_argument("--compare", action="append", default=[], metavar="NAME=FOLDER", help="more predictions, as a row")
    p.add_argument("--train-images", action="store_true", help="score pictures that the model was trained on")
    p.add_argument("--per-image", action="store_true", help="also print the predictions' values of each picture")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def read_methods(args, hashes: dict[str, str]) -> tuple[dict[str, dict[str, Prediction]], dict[str, list[str]]]:
    """{row: predictions}, those of --pred first, and {row: pictures seen in training}. UserError for refusals."""
    folders, methods, trained = [f"prediction={args.pred}", *args.compare], {}, {}
    for name, _, folder in (x.partition("=") for x in folders):
        if not name or not folder or name in (*methods, *vc.ROWS):
            raise UserError(f"--compare {name}={folder}: expected NAME=FOLDER, names differing, as unet=runs/unet/test")
        methods[name] = read_predictions(folder)
        trained[name] = check_source(folder, methods[name], hashes, args.train_images)
    return methods, trained


def read_labels(item, observer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """A picture (H, W, 3) uint8, its truth and field of view (H, W) bool, the other observer's mask or None."""
    x = item.load()
    masks = [x["mask"], item.second(x["mask"].shape)]
    if masks[observer - 1] is None:
        raise UserError(f"--observer {observer}: {item.image_path} has no mask of a second observer; use --observer 1")
    return x["image"], masks[observer - 1], x["fov"], masks[2 - observer]


def read_probability(p: Prediction, truth: np.ndarray, fov: np.ndarray, other: np.ndarray | None) -> np.ndarray | None:
    """prob (H, W), None if failed. UserError for another size than the truth's, or for a copied mask."""
    prob = p.prob
    if prob is not None and prob.shape != truth.shape:
        sizes = f"is {prob.shape[0]} x {prob.shape[1]} px (H x W), its mask {truth.shape[0]} x {truth.shape[1]}"
        raise UserError(f"{p.path}: {sizes}; predict at the size of the picture")
    for mask in (truth, other) if prob is not None else ():
        if mask is not None and vc.separates(prob, mask, fov):
            raise UserError(f"{p.path}: is a copy of a mask of --labels; pass what eval/infer_vessels.py wrote")
    return prob


# ---- scores


def score_picture(rows: dict, methods: dict, name: str, labels: tuple, fixed: float, dark: float | None) -> tuple:
    """Append one picture to every row {(row, threshold): scores}. Returns its masks, packed for the shuffled row."""
    image, truth, fov, other = labels
    own, probs = methods["prediction"], {}
    for method, found in methods.items():
        probs[method] = read_probability(found[name], truth, fov, other)
        for t in {fixed: 0, found[name].meta["threshold"]: 0}:  # once if they are equal
            if t is not None:
                rows[method, t].append(vm.score_image(probs[method], truth, fov, t))
    sizes = {tuple(p.meta["grid"]) for p in own.values() if p.meta["grid"]}
    grid = tuple(own[name].meta["grid"] or min(sizes, default=truth.shape))  # a failed picture has none
    grids = {"{} x {}".format(*grid) if len(sizes) == 1 else "their own": grid}
    grids |= {"256 x 256": SAM_GRID} if own[name].meta["kind"] == "sa2va" else {}
    for row, score in vc.control_scores(image, truth, fov, other, grids, dark).items():
        rows[row].append(score)
    pred = probs["prediction"]
    return vc.pack(truth & False if pred is None else pred > fixed, truth, fov)


def score_set(items: list, training: list, methods: dict, args) -> tuple[dict, dict[str, str]]:
    """{(row, threshold): scores by picture} and {row that is absent: why}."""
    rows, absent, packed = defaultdict(list), {}, []
    dark = vc.darkness_threshold(read_labels(x, args.observer)[:3] for x in training[:TRIED])
    for x in items:
        packed.append(score_picture(rows, methods, x.name, read_labels(x, args.observer), args.threshold, dark))
    counts, unequal = vc.shuffled(packed)
    rows[vc.SHUFFLED, args.threshold] = [vm.score_counts(c) for c in counts]
    metas = [found[items[0].name].meta for found in methods.values()]
    if metas[0]["threshold"] is None:
        absent["prediction, chosen threshold"] = "its checkpoint holds none"
    if not any(m["kind"] == "vessel_unet" for m in metas[1:]):
        itself = ", but the prediction is one" * (metas[0]["kind"] == "vessel_unet")
        absent["small U-Net"] = "no --compare unet=FOLDER" + itself
    if dark is None:
        absent[vc.DARKNESS] = "the set has no training pictures to choose a threshold on"
    if (n := len(rows[vc.HUMAN, None])) < len(items):
        del rows[vc.HUMAN, None]
        absent[vc.HUMAN] = f"{n} of {len(items)} pictures have a mask of a second observer"
    if not counts:
        del rows[vc.SHUFFLED, args.threshold]
        absent[vc.SHUFFLED] = f"{len(items)} pictures, {unequal} pairs of unequal size: none to exchange"
    return rows, absent


def report(rows: dict, absent: dict, methods: dict, names: list[str], args) -> list[dict]:
    """Prints the tables. Returns a dict per row: what it is, `summarise`, and the values of each picture."""
    result, shown = [], {}
    for (row, t), scores in rows.items():
        chosen = row in methods and t == methods[row][names[0]].meta["threshold"]
        label = row + (f" > {t:.4g}" if t is not None else "") + " chosen" * chosen
        shown[label], values = vm.summarise(scores), [vm.plain(s.values) for s in scores]
        each = {} if row == vc.SHUFFLED else dict(zip(names, values, strict=True))
        result.append({"row": row, "threshold": t, "chosen": chosen, **shown[label], "per_image": each})
        shown[label]["per_image"] = each if args.per_image and row == "prediction" else {}
    print(*vm.table(shown), *(f"{row:36s}    n/a: {why}" for row, why in absent.items()), sep="\n")
    return result


def remarks(rows: dict, methods: dict, trained: dict[str, list[str]], names: list[str], said: list[str]) -> list[str]:
    """said, and sentences about failed pictures, pictures seen in training, and scores too good to be true."""
    for method, seen in trained.items():
        said += [f"FAILED, scored 0: {method} of {k}: {p.failed}" for k, p in methods[method].items() if p.failed]
        if seen:
            said.append(f"NO TEST: {method} was trained on {len(seen)} of these pictures: {', '.join(seen)}")
        if methods[method][names[0]].meta["train_images"] is None:
            said.append(f"note: the checkpoint of {method} does not say which pictures it was trained on")
        own = [zip(names, scores, strict=True) for (row, _), scores in rows.items() if row == method]
        if high := sorted({k for pairs in own for k, s in pairs if s.values["Dice"] > SUSPICIOUS}):
            said.append(f"WARNING: {method}: Dice above {SUSPICIOUS} on {', '.join(high)}; people agree to about 0.8; "
                        "find out whether masks reached the model before believing it")  # fmt: skip
    return said


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, threshold=(0, 1))
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    val = [x for x in args.val.split(",") if x]
    found = open_vessels(args.labels, args.format, args.split_at, val, args.polygons)
    items, training = found.split(args.split), [x for x in found.items if x.split == "train"]
    hashes = {x.name: file_sha256(x.image_path) for x in items}
    methods, trained = read_methods(args, hashes)

    # ---- scores
    rows, absent = score_set(items, training, methods, args)
    print(f"n = {len(items)} pictures, split {args.split} of {found.name}; observer {args.observer} is the truth")
    table = report(rows, absent, methods, list(hashes), args)
    notes = remarks(rows, methods, trained, list(hashes), list(found.notes))
    print("\n".join(notes), end="\n" * bool(notes))
    if args.json:
        failed = {method: {k: p.failed for k, p in own.items() if p.failed} for method, own in methods.items()}
        result = {"n": len(items), "rows": table, "not available": absent, "failed": failed, "trained on": trained}
        result |= {"notes": notes, "settings": vars(args)}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    best = ", ".join(f"{k} {vm.cell(table[0]['mean'][k], k).strip()}" for k in ("Dice", "clDice", "AUC"))
    run.finish(r, args, "Sa2VA", f"{best} (n={len(items)}, {args.split})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
