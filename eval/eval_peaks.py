"""Score predicted events against labels: mAP at 0, 1, 2, 4 frames, F1, frame errors.  Reads files, runs no model.

    python eval/eval_peaks.py --pred runs/demo/peaks.json --labels datasets/rally/val.json          # seconds
    python eval/eval_peaks.py --pred peaks.json --labels match.json --frames 1500: --nms greedy --nms-window 8

mAP is E2E-Spot's (arXiv 2207.10213, util/score.py). Beside it stand two controls: events spread evenly at the truth's
mean rate, and the same predictions given to the wrong video (or moved in time when there is one video).
Classes that a video's `complete_for` does not name are left out for that video, in truth and predictions.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.peak_files import class_names, keep_classes, load_labels, load_predictions, pair_with_labels, window
from utils import plots, run
from utils import spotting_metrics as sm
from utils.run import UserError
from utils.spotting_metrics_other import evenly_spaced, misplaced, peak_report

TOLERANCES = (0, 1, 2, 4)  # frames, E2E-Spot
MOVES = (0.382, 0.764, 0.146)  # seeds of the shuffled control, and by what share of its length one video is moved


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions with scores (json), as eval/infer_peaks.py writes them")
    p.add_argument("--labels", required=True, nargs="+", help="label file or files (E2E-Spot json)")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--classes", default=None, metavar="A,B", help="score these classes only (default: all labelled)")
    p.add_argument("--frames", default=None, metavar="START:STOP", help="score frames [START, STOP) (default: all)")
    p.add_argument(
        "--nms", default="none", choices=["e2e", "greedy", "soft", "none"], help="suppression (default none)"
    )
    p.add_argument("--nms-window", type=float, default=1, help="radius of the suppression, frames (default 1)")
    p.add_argument("--floor", type=float, default=0.01, help="greedy and soft stop at this score (default 0.01)")
    p.add_argument("--threshold", type=float, default=0.5, help="score of a detection for F1 and errors (default 0.5)")
    p.add_argument("--radius", type=float, default=4, help="farthest match for F1 and errors, frames (default 4)")
    p.add_argument("--hist", default=None, metavar="PNG", help="also draw the histogram of signed errors here")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def read_files(args) -> tuple[list[dict], list[dict]]:
    """Checked truth, and predictions in its order. UserError when they do not belong together."""
    truth = [v for path in args.labels for v in load_labels(path)]
    video, times = Counter(v["video"] for v in truth).most_common(1)[0]
    if times > 1:
        raise UserError(f"--labels: video '{video}' stands in more than one label file; pass each video once")
    content = Path(args.pred).read_bytes() if Path(args.pred).is_file() else None
    for path in args.labels:
        if content == Path(path).read_bytes():
            raise UserError(f"--pred {args.pred}: is the label file {path}; pass what eval/infer_peaks.py wrote")
    pred = pair_with_labels(load_predictions(args.pred), truth, f"--pred {args.pred}")
    both = [Counter((v["video"], e["frame"], e["label"]) for v in x for e in v["events"]) for x in (truth, pred)]
    if both[0] and both[0] == both[1] and all(e["score"] == 1 for v in pred for e in v["events"]):
        raise UserError(f"--pred {args.pred}: is the labels with score 1; pass what eval/infer_peaks.py wrote")
    return truth, pred


def restrict(truth: list[dict], pred: list[dict], args) -> tuple[list[dict], list[dict], dict]:
    """Apply --classes, `complete_for` and --frames -> truth, predictions, {what was dropped: how many}."""
    known = class_names(truth)
    chosen = [c.strip() for c in args.classes.split(",")] if args.classes else known
    if not set(chosen) <= set(known):
        raise UserError(f"--classes {args.classes}: the labels have {', '.join(known)}")
    foreign = sorted(set(class_names(pred)) - set(known))
    if foreign and not args.classes:
        raise UserError(
            f"--pred {args.pred}: class '{foreign[0]}' is not in the labels ({', '.join(known)}); choose with --classes"
        )
    truth, pred, dropped = keep_classes(truth, pred, chosen)
    start, stop = frame_range(args.frames)
    frames = sorted(e["frame"] for v in truth for e in v["events"])
    if frames and not any(v["events"] for v in window(truth, start, stop)):
        span = f"{len(frames)} labelled events, in {frames[0]}..{frames[-1]}"
        raise UserError(f"--frames {args.frames}: no event is left; expected frames with some of the {span}")
    return window(truth, start, stop), window(pred, start, stop), dropped


def frame_range(text: str | None) -> tuple[int, int | None]:
    """'1500:' -> (1500, None), '0:99' -> (0, 99), None -> (0, None)."""
    start, colon, stop = (text or ":").partition(":")
    if not colon or not all(x == "" or x.isdecimal() for x in (start, stop)):
        raise UserError(f"--frames {text}: expected START:STOP with frame numbers, as 0:1500 or 1500:")
    return int(start or 0), int(stop) if stop else None


def score(truth: list[dict], pred: list[dict], args) -> dict:
    """Everything that is measured on one set of videos."""
    fps = {v["video"]: v["fps"] for v in truth}
    matched = sm.match_events(truth, pred, args.threshold, args.radius)
    errors = sm.peak_errors(matched["pairs"] + matched["misses"], TOLERANCES, fps)
    return {
        **errors,
        "videos": len(truth),
        **sm.e2e_map(truth, pred, TOLERANCES, strict=False),
        "acc": sm.peak_errors(sm.nearest_events(truth, pred, args.threshold), TOLERANCES)["acc"],
        **sm.f1_scores(matched),
        "false_positives": len(matched["false"]),
        "errors": [p["frame"] - t["frame"] for _, t, p in matched["pairs"]],
    }


def show(result: dict) -> None:
    """The table on standard output; percentages unless a unit is given."""

    def row(name: str, values: dict, n: str = "") -> str:
        return f"{name:28s}" + "".join(f"{100 * values[d]:9.2f}" for d in TOLERANCES) + f"   {n}"

    print(f"{'average precision (%) at':28s}" + "".join(f"{f'+-{d}':>9s}" for d in TOLERANCES) + "   events")
    for label in sorted(result["AP"]):
        print(row(label, result["AP"][label], result["counts"][label]))
    print(row("mAP", result["mAP"], f"{result['n']} in {result['videos']} videos"))
    print(row("control: evenly spaced", result["baseline"]["mAP"]))
    print(row("control: shuffled", result["shuffled"]["mAP"], result["shuffled"]["how"]))
    print(row("nearest within (acc)", result["acc"]))
    print(
        f"score >= {result['settings']['threshold']}: precision {result['precision']:.3f}, "
        f"recall {result['recall']:.3f}, F1 {result['f1']:.3f}; {result['misses']} misses, "
        f"{result['false_positives']} false positives"
    )
    print(
        f"matched errors: mean {result['MAE']:.2f} frames ({result['MAE_ms']:.1f} ms), median {result['median']:.1f}, "
        f"bias {result['bias']:+.2f} frames ({result['bias_ms']:+.1f} ms)"
    )
    if result["interval_n"]:
        print(f"truths matched within their lo..hi: {100 * result['interval_acc']:.1f} % of {result['interval_n']}")
    bars = Counter(math.floor(e + 0.5) for e in result["errors"])
    print("signed errors (frames: events): " + ", ".join(f"{e:+d}: {bars[e]}" for e in sorted(bars)))
    for fps, part in result["by_fps"].items():
        print(row(f"mAP at {fps} fps", part["mAP"], f"{part['n']} in {part['videos']} videos"))
    if result["peak"]:
        for name in ("top 1", "constant", "shuffled"):
            e = result["peak"].get(name, result["peak"])
            print(row(f"peak, {name} (acc)", e["acc"], f"MAE {e['MAE']:.2f} frames, {e['misses']} of {e['n']} missing"))


def plain(value):
    """json-ready: keys as text, NaN as null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not (0 <= args.threshold <= 1 and args.radius >= 0 and args.nms_window > 0 and args.floor > 0):
        raise UserError("expected --threshold in [0, 1], --radius >= 0, --nms-window > 0 and --floor > 0")
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    truth, pred, dropped = restrict(*read_files(args), args)
    if args.nms == "e2e":
        pred = sm.nms_e2e(pred, args.nms_window)
    elif args.nms != "none":
        nms = sm.nms_greedy if args.nms == "greedy" else sm.nms_soft
        pred = nms(pred, args.nms_window, args.floor)

    # ---- scores
    start, stop = frame_range(args.frames)
    result = score(truth, pred, args)
    wrong = [misplaced(pred, truth, start, stop, share) for share in MOVES]
    maps = [sm.e2e_map(truth, w, TOLERANCES, strict=False)["mAP"] for w in wrong]
    how = "other videos' predictions" if len(truth) > 1 else "moved round in time"
    result["counts"] = Counter(e["label"] for v in truth for e in v["events"])
    result["baseline"] = {"mAP": sm.e2e_map(truth, evenly_spaced(truth, start, stop), TOLERANCES)["mAP"]}
    mean = {d: sum(m[d] for m in maps) / len(MOVES) for d in TOLERANCES}
    result["shuffled"] = {"mAP": mean, "how": f"{how}, mean of {len(MOVES)}"}
    rates = sorted({round(v["fps"], 2) for v in truth})
    result["by_fps"] = {}
    for fps in rates if len(rates) > 1 else []:
        pairs = [(t, p) for t, p in zip(truth, pred, strict=True) if round(t["fps"], 2) == fps]
        result["by_fps"][fps] = {k: v for k, v in score(*zip(*pairs, strict=True), args).items() if k != "errors"}
    result["peak"] = peak_report(truth, pred, wrong[0], TOLERANCES)
    result["dropped"], result["settings"] = dropped, vars(args)

    # ---- result
    show(result)
    print("dropped: " + ", ".join(f"{n} events ({what})" for what, n in dropped.items()))
    if all(v == 1 for v in result["mAP"].values()):
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    for path in filter(None, (args.json, args.hist)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        run.write_text_atomic(args.json, json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    if args.hist:
        plots.error_histogram(args.hist, result["errors"])
    figures = ", ".join(f"@{d} {100 * result['mAP'][d]:.1f}" for d in TOLERANCES)
    run.finish(r, args, "TempoPeak", f"mAP {figures} (n={result['n']}), MAE {result['MAE']:.2f} frames")


if __name__ == "__main__":
    sys.exit(run.cli(main))
