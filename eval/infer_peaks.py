"""Find the peak frames in videos with a trained TempoPeak. Reads videos and a checkpoint, never labels.

python eval/infer_peaks.py match.mp4 --ckpt runs/rally/last --out runs/rally/pred
python eval/infer_peaks.py *.mp4 --ckpt runs/rally/last --out pred --device cuda --dtype bf16 --batch-size 16 --no-video

Writes OUT/peaks.json (E2E-Spot layout, `video` is the file's stem), peaks.csv, peaks.json.meta.json, and per video an
annotated mp4 with a score strip, a timeline and strips of +-4 frames around every event above --threshold.
score: spot, probability of the class at that frame; peak, probability that the peak lies within 2 frames of it.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.peak_files import write_csv, write_predictions
from data.peak_labels import scale_crop
from data.video import VideoReader, VideoWriter, iter_frames, probe
from models.mamba2 import describe_impl
from models.sliding_windows import candidates, score_video, within
from models.tempopeak import TempoPeak
from utils import overlay, run
from utils.output_folder import results_into
from utils.plots import timeline
from utils.run import UserError
from utils.spotting_metrics import nms_e2e, nms_greedy, nms_soft
from utils.weights import write_sidecar

NMS = {"e2e": nms_e2e, "greedy": nms_greedy, "soft": nms_soft}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for predictions, videos and pictures")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--impl", default="auto", choices=["auto", "torch", "reference", "mamba_ssm"],
                   help="Mamba2 implementation: auto takes the CUDA kernels where they import, else torch")  # fmt: skip
    p.add_argument("--overlap", type=float, default=0.5, help="share of a window that the next one sees again, 0..0.95")
    p.add_argument("--fusion", default="triangle", choices=["triangle", "uniform"], help="weights within a window")
    p.add_argument("--floor", type=float, default=0.01, help="lowest score that is written")
    p.add_argument("--nms", default="e2e", choices=[*NMS, "none"], help="suppression of neighbours, per class")
    p.add_argument("--nms-window", type=int, default=8, help="frames to each side that a better event suppresses")
    p.add_argument("--threshold", type=float, default=0.5, help="lowest score that is drawn and listed")
    p.add_argument("--no-video", action="store_true", help="write no annotated mp4")
    p.add_argument("--no-pictures", action="store_true", help="write no timelines and strips")
    p.add_argument("--width", type=int, default=960, help="widest annotated mp4, pixels")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def check_inputs(args) -> list[Path]:
    """The videos as paths; UserError before any work is done."""
    paths = [Path(v) for v in args.videos]
    stems = [p.stem for p in paths]
    twice = sorted({s for s in stems if stems.count(s) > 1})
    if twice:
        raise UserError(f"two videos are called {twice[0]}: predictions go by the file's stem; rename one of them")
    run.check_ranges(args, batch_size=(1, 4096), nms_window=(1, 10**6), floor=(1e-9, 1), threshold=(0, 1))
    run.check_ranges(args, width=(16, 8192), overlap=(0, 0.95))
    for path in paths:
        probe(path)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: is a file; give the name of a folder")
    if (Path(args.out) / "peaks.json").exists():
        raise UserError(f"--out {args.out}: holds predictions already; choose a new folder or delete them")
    return paths


def predict(model: TempoPeak, path: Path, args, r) -> tuple[dict, np.ndarray]:
    """(prediction item of one video, scores (n, K))."""
    cfg, shown = model.cfg, probe(path)
    crop = scale_crop(cfg.crop, cfg.crop_of, (shown.width, shown.height))
    with VideoReader(path, size=tuple(cfg.size), crop=crop) as reader:
        return score_reader(model, reader, path.stem, args, r)


def score_reader(model: TempoPeak, reader: VideoReader, name: str, args, r) -> tuple[dict, np.ndarray]:
    """As `predict`, for an open video at the model's size and crop."""
    cfg, info = model.cfg, reader.info
    images = (frame.image for frame in reader.stream())
    scores = score_video(model, images, overlap=args.overlap, weighting=args.fusion,
                         batch_size=args.batch_size, device=r.device, dtype=r.dtype)  # fmt: skip
    item = {"video": name, "num_frames": len(scores), "fps": info.fps, "width": info.width, "height": info.height}
    item["vfr"] = reader.vfr
    item["events"] = candidates(scores, cfg.classes, args.floor)
    if args.nms != "none":
        floor = () if args.nms == "e2e" else (args.floor,)
        item = NMS[args.nms]([item], args.nms_window, *floor)[0]
    if cfg.task == "peak":  # one softmax over the window: what a user wants to know is whether the peak is about here
        scores = within(scores)
        item["events"] = [{**e, "score": float(scores[e["frame"], 0])} for e in item["events"]]
    item["events"] = [{**e, "time_s": round(reader.times_s[e["frame"]], 6)} for e in item["events"]]
    return item, scores


def draw_video(path: Path, target: Path, item: dict, scores: np.ndarray, args) -> None:
    """Annotated copy: same rate and frame count, events above the threshold flash, the scores run along below."""
    with VideoReader(path) as reader:
        info = reader.info  # with the rate checked against the pictures' own times
    window = round(20 * info.fps) if len(scores) > 60 * info.fps else None  # long videos: the strip moves along
    width = min(args.width, info.width) // 2 * 2
    size = (width, round(info.height * width / info.width / 2) * 2)
    shown = [e for e in item["events"] if e["score"] >= args.threshold]
    curve, writer = scores.max(1), None
    for frame in iter_frames(path, size=size):
        image = frame.image
        for e in shown:
            since_s = (frame.index - e["frame"]) / info.fps
            if 0 <= since_s < 0.3:  # lights up at the event, fades
                image = overlay.flash(image, strength=1 - since_s / 0.3)
                image = overlay.text(image, (12, 12), f"{e['label']}  frame {e['frame']}  {e['score']:.2f}")
        marks = [e["frame"] for e in shown if window is None or abs(e["frame"] - frame.index) <= window]
        image = overlay.score_strip(image, curve, frame.index, marks, window=window)
        if writer is None:
            writer = VideoWriter(target, info.rate, (image.shape[1], image.shape[0]))
            writer.__enter__()
        writer.write(image)
    writer.close()


def draw_strips(path: Path, folder: Path, item: dict, cfg, args, reach: int = 4, rows: int = 9) -> None:
    """PNG sheets, a row per event above the threshold: the frames around it, cut as the model sees them."""
    info = probe(path)
    crop = scale_crop(cfg.crop, cfg.crop_of, (info.width, info.height))
    w, h = crop[2:] if crop else (info.width, info.height)
    size = (280, round(h * 280 / w))
    shown = [e for e in item["events"] if e["score"] >= args.threshold]
    with VideoReader(path, size=size, crop=crop) as reader:
        for sheet in range(0, len(shown), rows):
            images, captions = [], []
            for e in shown[sheet : sheet + rows]:
                for d in range(-reach, reach + 1):
                    t = e["frame"] + d
                    inside = 0 <= t < len(reader)
                    images.append(reader[t] if inside else np.zeros((size[1], size[0], 3), np.uint8))
                    captions.append(f"{t}" + (f"  {e['label']} {e['score']:.2f}" if d == 0 else ""))
            picture = overlay.grid(images, columns=2 * reach + 1, captions=captions)
            overlay.save_png(folder / f"{path.stem}.strips_{sheet // rows + 1}.png", picture)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    paths = check_inputs(args)
    model = TempoPeak.from_checkpoint(args.ckpt, impl=args.impl)
    r = run.start(args, argv)
    model = model.to(r.device)
    if "mamba2" in model.cfg.head:
        print(f"# {describe_impl(args.impl, r.device)}")

    # ---- scores: all videos, before anything is written
    found = []
    for path in paths:
        t = time.perf_counter()
        item, scores = predict(model, path, args, r)
        speed = len(scores) / (time.perf_counter() - t)
        n = sum(e["score"] >= args.threshold for e in item["events"])
        vfr = ", variable frame rate" if item["vfr"] else ""
        print(f"{path.name}: {len(scores)} frames{vfr}, {n} events above {args.threshold}, {speed:.0f} frames/s")
        found.append((path, item, scores))

    # ---- result
    out = Path(args.out)
    with results_into(out) as staging:
        items = [item for _, item, _ in found]
        write_predictions(staging / "peaks.json", items)
        write_csv(staging / "peaks.csv", items)
        write_sidecar(staging / "peaks.json", args.ckpt, {**asdict(model.cfg), **vars(args)}, paths)
        for path, item, scores in found:
            if not args.no_video:
                draw_video(path, staging / f"{path.stem}.annotated.mp4", item, scores, args)
            if not args.no_pictures:
                curves = {name: scores[:, k] for k, name in enumerate(model.cfg.classes)}
                shown = [e for e in item["events"] if e["score"] >= args.threshold]
                timeline(staging / f"{path.stem}.timeline.png", len(scores), item["fps"], curves, shown)
                draw_strips(path, staging, item, model.cfg, args)
    total = sum(e["score"] >= args.threshold for item in items for e in item["events"])
    run.finish(
        r, args, "TempoPeak", f"{total} events above {args.threshold} in {len(items)} videos -> {out}/peaks.json"
    )


if __name__ == "__main__":
    sys.exit(run.cli(main))
