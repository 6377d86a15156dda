"""Score video object segmentation: J, F and J&F of DAVIS, semi-supervised.  Reads files, runs no model.

    python eval/eval_vos.py --pred runs/vos --labels datasets/DAVIS/Annotations/480p \\
        --sequences datasets/DAVIS/ImageSets/2017/val.txt

Both sides are folders with one folder of palette PNGs for each sequence; a pixel is 0 or the number of its object, 255
in the labels does not count. Figures are those of davis2017-evaluation: the objects of the first frame, without the
first and the last frame, means over objects; J is IoU, F the agreement of boundaries within 0.8 % of the diagonal.

Beside the score stand two controls: the first mask kept through the sequence, and the masks of another sequence of the
same image size, at the same share of its length.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.masks import davis_objects, davis_summary
from utils.run import UserError
from utils.segmentation_files import exchange, read_objects, same_items

VOID = 255


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions (a folder of PNGs for each sequence)")
    p.add_argument("--labels", required=True, help="labels (a folder of PNGs for each sequence)")
    p.add_argument("--sequences", default=None, metavar="FILE", help="text file of sequences to score, one a line")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def frames_of(flag: str, folder: str) -> dict[str, list[Path]]:
    """{sequence: its PNGs in order} of a folder. UserError when there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: is not a folder; expected one with a folder of PNGs for each sequence")
    found = {p.name: sorted(p.glob("*.png")) for p in sorted(Path(folder).iterdir()) if p.is_dir()}
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise UserError(f"{flag} {folder}: holds no folder with PNGs; expected one for each sequence")
    return found


def read_sequence(gt_files: list[Path], pred_files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions (T, H, W) uint8; the first and the last prediction, never scored, may be absent (0)."""
    gt = [read_objects(p) for p in gt_files]
    scored, stray = {p.name for p in gt_files[1:-1]}, sorted(p.name for p in gt_files)
    own = {p.name: p for p in pred_files}
    where = f"--pred {pred_files[0].parent}"
    for name in sorted(scored - own.keys()):
        raise UserError(f"{where}: lacks {name}, which the labels have; write one PNG for each frame")
    for name in sorted(own.keys() - set(stray)):
        raise UserError(f"{where}: {name} is not among the frames of the labels; leave it out")
    pred = np.zeros((len(gt), *gt[0].shape), np.uint8)
    for k, file in enumerate(gt_files):
        if gt[k].shape != gt[0].shape:
            raise UserError(f"--labels {file}: differs in size from the first frame of its sequence")
        if file.name in scored:
            mask = read_objects(own[file.name])
            if mask.shape != gt[0].shape:
                sizes = [" x ".join(map(str, x.shape)) for x in (mask, gt[0])]
                raise UserError(
                    f"{own[file.name]}: is {sizes[0]} (H x W), the labels are {sizes[1]}; resize it to them"
                )
            pred[k] = mask
    return np.stack(gt), pred


def read_files(args) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], int]:
    """{sequence: (labels, predictions)} and the number of predicted sequences that are not asked for."""
    labels, pred = frames_of("--labels", args.labels), frames_of("--pred", args.pred)
    asked, dropped = set(labels), 0
    if args.sequences:
        try:
            asked = set(Path(args.sequences).read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--sequences {args.sequences}: cannot be read as text; check the path") from e
        for name in sorted(asked - labels.keys()):
            raise UserError(f"--sequences {args.sequences}: {name} is not in --labels {args.labels}; correct the list")
        if not asked:
            raise UserError(f"--sequences {args.sequences}: names no sequence; expected one a line")
        dropped, pred = len(pred.keys() - asked), {name: files for name, files in pred.items() if name in asked}
    same_items(f"--pred {args.pred}", "sequence", set(pred), asked)
    sequences = {name: read_sequence(labels[name], pred[name]) for name in sorted(asked)}
    if all(np.array_equal(gt[1:-1], own[1:-1]) for gt, own in sequences.values()):
        raise UserError(f"--pred {args.pred}: is a copy of the labels, pixel by pixel; pass what was predicted")
    return sequences, dropped


# ---- scores


def score(sequences: dict[str, tuple]) -> dict:
    """What `davis_summary` says of {sequence: (labels, predictions)}. UserError names the sequence that does not fit."""
    found = {}
    for name, (gt, pred) in sequences.items():
        try:
            found[name] = davis_objects(gt, pred, VOID)
        except ValueError as e:
            raise UserError(f"sequence {name}: {e}; expected objects numbered as in the first frame") from e
    return davis_summary(found)


def first_kept(gt: np.ndarray) -> np.ndarray:
    """The first label on every frame, (T, H, W)."""
    return np.broadcast_to(np.where(gt[0] == VOID, 0, gt[0]), gt.shape)


def moved(gt: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Scored masks of another sequence on the frames of this one; objects that this one lacks become background."""
    scored = other[1:-1][np.linspace(0, len(other) - 3, len(gt)).round().astype(int)]  # (T, H, W)
    return np.where(scored > first_kept(gt)[0].max(), 0, scored)


def table(summary: dict) -> dict[str, float]:
    """The figures that are printed, by name."""
    rows = {f"{m} {name}": summary[m][name] for m in "JF" for name in summary[m]}
    return {"J&F": summary["J&F"], **rows}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    sequences, dropped = read_files(args)

    # ---- scores
    own = score(sequences)
    kept = score({name: (gt, first_kept(gt)) for name, (gt, _) in sequences.items()})
    source = exchange({name: gt.shape[1:] for name, (gt, _) in sequences.items()})
    wrong = {name: (sequences[name][0], moved(sequences[name][0], sequences[x][1])) for name, x in source.items()}
    result = {"n": len(sequences), "scores": table(own), "first mask": table(kept)}
    result |= {"shuffled": table(score(wrong)) if wrong else {}, "exchanged": len(wrong), "objects": own["objects"]}
    result |= {"frames": sum(len(gt) - 2 for gt, _ in sequences.values()), "settings": vars(args)}
    result["dropped"] = {"not in --sequences": dropped}

    # ---- result
    print(f"{'n = ' + str(result['n']) + ' sequences':18s}{'score':>10s}{'first mask':>12s}{'shuffled':>10s}")
    for name, value in result["scores"].items():
        other = result["shuffled"].get(name)
        print(f"{name:18s}{100 * value:10.2f}{100 * result['first mask'][name]:12.2f}", end="")
        print(f"{'n/a':>10s}" if other is None else f"{100 * other:10.2f}")
    print(
        f"{len(own['objects'])} objects, {result['frames']} frames scored; first mask: kept through the sequence",
        end="; ",
    )
    print(f"shuffled: {len(wrong)} of {result['n']} sequences have the masks of another one of their size")
    if args.sequences:
        print(f"dropped: {dropped} predicted sequences that are not in --sequences")
    if own["J&F"] > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures = ", ".join(f"{name} {100 * result['scores'][name]:.2f}" for name in ("J&F", "J mean", "F mean"))
    run.finish(r, args, "FastSAM2", f"{figures} (n={result['n']})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
