"""Score ball tracks, or tracks of several objects, against labels.  Reads files, runs no model.

    python eval/eval_ball.py --pred runs/ball/tracks.json --labels Clip1/Label.csv                    # seconds
    python eval/eval_ball.py --pred a.csv b.csv --labels Clip1.csv Clip2.csv --size 1280x720 --tol-ref original
    python eval/eval_ball.py --pred results.json --labels saco_veval_gt.json --kind mask               # HOTA, cgF1

One ball: --pred is tracks.json or a ball csv, --labels a ball csv of any TrackNet dialect (data/ball_labels.py), paired
in order. Three conventions stand side by side: ours (--tol, --tol-ref), TrackNetV3 (4 px at 512x288, whole px, <=) and
WASB (4 px of the frame itself, <). TrackNet's recall leaves out predictions at a wrong place: read strict recall too.
Several objects: --labels is YouTube-VIS or SA-Co json; --pred their results or a tracks.json with masks. HOTA and cgF1
as the SA-Co evaluator, mask AP as YouTube-VIS, mask IoU and J&F of each labelled object.
Controls: the ball resting at its median place, the first label kept; predictions moved in time or to another prompt.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.ball_labels import read_ball, read_ball_csv, read_concepts
from utils import ball_metrics as bm
from utils import hota, run
from utils.object_scores import first_kept, misplaced, score_objects
from utils.run import UserError
from utils.segmentation_files import same_items


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, nargs="+", help="predictions: tracks.json, ball csv, or results json")
    p.add_argument("--labels", required=True, nargs="+", help="labels: ball csv, or one YouTube-VIS or SA-Co json")
    p.add_argument("--json", default=None, help="also write the result to this file")
    g = p.add_argument_group("one ball")
    g.add_argument("--tol", type=float, default=4, help="farthest correct position, px of --tol-ref (default 4)")
    g.add_argument("--tol-ref", default="512x288", metavar="WxH", help="size that --tol counts px of, or original")
    g.add_argument("--size", default=None, metavar="WxH", help="size of the video, px; needed where --pred is a csv")
    g.add_argument("--target", default=None, help="target of tracks.json (default ball, or the only one)")
    g.add_argument("--visible", default="1,2", metavar="A,B", help="visibilities that count as seen (default 1,2)")
    g.add_argument("--interp", action="store_true", help="count interpolated positions as predicted")
    g.add_argument("--labelled-only", action="store_true", help="leave out predicted frames that have no label")
    g.add_argument("--max-speed", type=float, default=0.075, help="a faster step is a jump, widths per frame")
    g = p.add_argument_group("several objects")
    g.add_argument("--kind", default="mask", choices=["mask", "box"], help="what is compared (default mask)")
    g.add_argument("--threshold", type=float, default=0.5, help="lowest score of a track for HOTA, cgF1, J&F")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def refuse_same_file(pred: str, labels: str) -> None:
    """UserError when the predictions are the label file itself or a copy of it."""
    files = [Path(x) for x in (pred, labels)]
    if all(x.is_file() for x in files) and files[0].read_bytes() == files[1].read_bytes():
        raise UserError(f"--pred {pred}: is the label file {labels}; pass what eval/infer_ball.py wrote")


# ---- one ball


def reference(text: str) -> tuple[int, int] | None:
    """--tol-ref as W, H; None for the frame itself."""
    return None if text == "original" else tuple(run.numbers("--tol-ref", text, "x", 2))


def read_clips(args) -> tuple[list[bm.Clip], int]:
    """The clips, and how many predictions stand on frames without a label (--labelled-only)."""
    if len(args.pred) != len(args.labels):
        raise UserError(f"--pred names {len(args.pred)} files, --labels {len(args.labels)}; expected pairs in order")
    size = args.size and tuple(run.numbers("--size", args.size, "x", 2))
    visible = tuple(run.numbers("--visible", args.visible, ",", args.visible.count(",") + 1))
    clips, dropped = [], 0
    for pred_path, label_path in zip(args.pred, args.labels, strict=True):
        pred, where = read_ball(pred_path, size, args.target, args.interp), f"--pred {pred_path}"
        own = pred.size or size
        if own is None:
            raise UserError(f"{where}: a csv does not say how large its video is; pass --size WxH")
        label = read_ball_csv(label_path, own)
        extra = ~np.isin(pred.frames, label.frames)
        if args.labelled_only:
            dropped += int(np.isfinite(pred.xy[extra, 0]).sum())
        elif extra.any():
            raise UserError(f"{where}: frame {pred.frames[extra][0]} is not in {label_path} ({extra.sum()} such "
                            "frames); leave them out, or pass --labelled-only")  # fmt: skip
        same_items(where, "frame", set(pred.frames[~extra].tolist()), set(label.frames.tolist()))
        xy, truth = pred.seen((1, 2, 3))[~extra], label.seen(visible)
        if np.isfinite(truth).any() or Path(pred_path).resolve() == Path(label_path).resolve():
            refuse_same_file(pred_path, label_path)  # where no ball is seen, to have said so is no copy
        if np.isfinite(truth).any() and np.array_equal(xy, truth, equal_nan=True):
            raise UserError(f"{where}: holds the labels' own positions in every frame; pass what was predicted")
        score = None if pred.score is None else pred.score[~extra]
        clips.append(bm.Clip(str(label_path), own, label.frames, truth, xy, score))
    return clips, dropped


def ball(args) -> tuple[dict, str]:
    """Score one ball: the result, and its line for the notebook."""
    clips, dropped = read_clips(args)
    ours = bm.Convention("ours", args.tol, reference(args.tol_ref))
    rules = {rule.name: rule for rule in (ours, bm.TRACKNET_V3, bm.WASB)}
    result = {"n": sum(len(c.frames) for c in clips), "clips": len(clips), "dropped": dropped}
    result["conventions"] = {k: str(rule) for k, rule in rules.items()}
    result["scores"] = {k: bm.score_ball(clips, rule) for k, rule in rules.items()}
    result |= {"distances": bm.distances(clips), "continuity": bm.continuity(clips, ours, args.max_speed)}
    result["baseline"] = bm.score_ball(bm.constant(clips), ours)
    wrong = [bm.score_ball(bm.moved(clips, share), ours) for share in bm.MOVES]
    result["shuffled"] = {k: mean_of([x[k] for x in wrong]) for k in (*bm.NAMES, *bm.rates(wrong[0]))}
    if len(clips) > 1:
        result["by_clip"] = {c.name: bm.score_ball([c], ours) for c in clips}
    show_ball(result, args)
    best = result["scores"]["ours"]
    figures = ", ".join(f"{k.replace('_', ' ')} {shown(best[k])}" for k in ("precision", "strict_recall", "strict_f1"))
    return result, f"{figures} ({ours}; n={result['n']})"


def mean_of(values: list[float | None]) -> float | None:
    """Of those that are defined; None where none is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def shown(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def show_ball(result: dict, args) -> None:
    rows = {**result["scores"], "control: at rest": result["baseline"], "control: shuffled": result["shuffled"]}
    print(f"n = {result['n']} frames of {result['clips']} clips; positions in px of the original frame")
    print(f"{'':20s}" + "".join(f"{k:>10s}" for k in (*bm.NAMES, "acc", "P", "R", "F1", "strict R", "strict F1", "AP")))
    for name, x in (rows | result.get("by_clip", {})).items():
        shares = [x[k] for k in bm.rates(dict.fromkeys(bm.NAMES, 0))] + [x.get("strict_ap")]
        cells = [f"{x[k]:10.4g}" for k in bm.NAMES] + [f"{shown(v):>10s}" for v in shares]
        print(f"{name[-20:]:20s}" + "".join(cells))
    print("; ".join(f"{k}: {rule}" for k, rule in result["conventions"].items()) + "; controls: as ours; AP: strict")
    d, c = result["distances"], result["continuity"]
    if d["n_both"]:
        print(f"distance over {d['n_both']} frames with both: median {d['median']:.2f} px, RMSE {d['rmse']:.2f} px; "
              f"RMSE of WASB's TP {shown(d['rmse_tp'], 2)} px")  # fmt: skip
    print(f"gaps {c['gaps']}, longest {c['longest_gap']} frames; longest run without a correct position "
          f"{c['longest_lost']}; jumps (> {args.max_speed} widths a frame) {c['jumps_per_1000']:.1f} of 1000 steps")  # fmt: skip
    if args.labelled_only:
        print(f"dropped: {result['dropped']} predictions on frames without a label")


# ---- several objects


def objects(args) -> tuple[dict, str]:
    """Score several objects: the result, and its line for the notebook."""
    if len(args.pred) > 1 or len(args.labels) > 1:
        raise UserError("--labels is json of several objects: expected one file there and one in --pred")
    refuse_same_file(args.pred[0], args.labels[0])
    concepts, negatives = read_concepts(args.labels[0], args.pred[0], args.kind)
    if not any(c.gt for c in concepts):
        raise UserError(f"--labels {args.labels[0]}: holds no object; expected at least one to score against")
    tracks = [[[t.of(args.kind) for t in side] for side in (c.gt, c.pred)] for c in concepts]
    if all(g == p for g, p in tracks):
        raise UserError(f"--pred {args.pred[0]}: holds the labels' own objects; pass what was predicted")
    result = score_objects(concepts, args.kind, args.threshold, negatives)
    wrong, how = misplaced(concepts)
    rows = {"": result}
    for name, other in (("first label kept", first_kept(concepts)), ("shuffled", wrong)):
        rows[name] = result[name] = score_objects(other, args.kind, args.threshold, negatives, quality=False)
    result["how"] = how
    print(f"n = {result['n']} objects in {len(concepts)} (video, prompt) pairs, {result['predicted']} predicted at score "
          f">= {args.threshold}; compared by {args.kind}")  # fmt: skip
    print(f"{'':18s}" + "".join(f"{k:>8s}" for k in (*hota.FIGURES, "cgF1", "F1")))
    for name, x in rows.items():
        cells = [*x["hota"].values(), x["concepts"]["cgf1_micro_50_95"], x["concepts"]["f1_50_95"]]
        print(
            f"{name or 'predictions':18s}" + "".join(f"{'n/a':>8s}" if v is None else f"{100 * v:8.2f}" for v in cells)
        )
    more = {**result.get("ap", {}), **result.get("quality", {})}
    if more:
        print(", ".join(f"{k} {100 * v:.2f}" for k, v in more.items()) + f"; shuffled: {how}")
    figures = f"HOTA {100 * result['hota']['HOTA']:.2f}, F1 {100 * result['concepts']['f1_50_95']:.2f}"
    return result, f"{figures} ({args.kind}; n={result['n']} objects)"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, tol=(1e-9, 1e6), max_speed=(1e-9, 1e3), threshold=(0, 1))
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)
    json_labels = any(Path(x).suffix.lower() == ".json" for x in args.labels)
    result, figures = objects(args) if json_labels else ball(args)
    perfect = result["hota"]["HOTA"] if json_labels else result["scores"]["ours"]["strict_f1"]
    if perfect is not None and perfect > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    result["settings"] = vars(args)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    run.finish(r, args, "SAM3", figures)


if __name__ == "__main__":
    sys.exit(run.cli(main))
