"""Does SAM3 run here?  A text prompt on five frames, with pictures; then shapes, types and times of eight tracked ones.

python smoke/smoke_sam3.py                                            # tiny random weights, rendered clip, 15 s on a CPU
python smoke/smoke_sam3.py rally.mp4 --snapshot weights/sam3 --prompt "tennis ball" --device cuda --dtype bf16

Without --snapshot the folder in the environment variable HF_LOCAL_MODEL is taken; without that a tiny SAM3 with random
weights is written, and the same path runs (untrained, it answers anything with a score near 0.25). --dtype is
that of SAM3's weights too: weights, features and sessions have one and the same.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rendered_ball import RenderedBall
from data.video import iter_frames
from models.sam3_tracker import ENV, Sam3Engine, save_tiny_snapshot
from utils import overlay, run

DETECTED = (0, 5, 10, 15, 20)  # frames
TRACKED = 8
UNTRAINED_THR = 0.2


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("video", nargs="?", default=None, help="video file; without one a rendered clip of 128 x 96 px")
    p.add_argument("--snapshot", default=None, metavar="DIR", help="local folder of facebook/sam3")
    p.add_argument("--prompt", default="tennis ball", help="what to look for")
    p.add_argument("--score-thr", type=float, default=None, help="lowest score (0.5; 0.2 for the tiny random weights)")
    p.add_argument("--out", default="runs/smoke_sam3", help="folder for the pictures")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def open_engine(args: argparse.Namespace, r) -> tuple[Sam3Engine, str]:
    """The engine of the snapshot, or of tiny random weights; and what it is."""
    if args.snapshot or os.environ.get(ENV):
        engine = Sam3Engine.open(args.snapshot, r.dtype, r.device)
        return engine, engine.folder.name
    with tempfile.TemporaryDirectory() as folder:
        return Sam3Engine.open(save_tiny_snapshot(Path(folder) / "tiny", args.seed), r.dtype, r.device), "tiny, random"


def read_frames(args: argparse.Namespace) -> list[np.ndarray]:
    """The first frames, uint8 (H, W, 3) each."""
    if args.video is None:
        return list(RenderedBall(args.seed, absent=0.0).clip(0, DETECTED[-1] + 1)["frames"])
    return [frame.image for frame in iter_frames(args.video, stop=DETECTED[-1] + 1)]


def now(r) -> float:
    """Seconds, after all work given to the device is done."""
    if r.device.type == "cuda":
        torch.cuda.synchronize(r.device)
    return time.perf_counter()


def detect(engine: Sam3Engine, frames: list[np.ndarray], args: argparse.Namespace, r) -> tuple[int, np.ndarray | None]:
    """Text only, frame by frame; writes a picture of each and of all. Returns the number of detections, and the best
    mask of the first frame if any."""
    cells, captions, found, first = [], [], 0, None
    for t in [t for t in DETECTED if t < len(frames)]:
        start = now(r)
        (seen,) = engine.detect(engine.encode(frames[t]), [args.prompt], args.score_thr)
        took, n, (H, W) = now(r) - start, len(seen.scores), frames[t].shape[:2]
        assert seen.masks.shape == (n, H, W) and seen.masks.dtype == bool, seen.masks.shape
        assert seen.boxes.shape == (n, 4) and seen.masks.any((1, 2)).all() and (np.diff(seen.scores) <= 0).all()
        best = ", ".join(f"{s:.2f}" for s in seen.scores[:3])
        print(
            f"frame {t:2d} | {n} x {args.prompt!r} above {args.score_thr:g} | {best} | {1e3 * took:.0f} ms", flush=True
        )
        image = frames[t]
        for k in reversed(range(n)):  # the best on top
            image = overlay.box(overlay.mask(image, seen.masks[k]), seen.boxes[k], label=f"{seen.scores[k]:.2f}")
        overlay.save_png(Path(args.out) / f"frame_{t:04d}.png", image)
        cells, captions, found = [*cells, image], [*captions, f"frame {t}"], found + n
        first = seen.masks[0] if t == 0 and n else first
    overlay.save_png(Path(args.out) / "all.png", overlay.grid(cells, 3, captions))
    return found, first


def track(engine: Sam3Engine, frames: list[np.ndarray], mask: np.ndarray | None, r) -> float:
    """Follow one object, by its mask or a point in the middle; prints shapes, types and times. Returns the median ms."""
    H, W = frames[0].shape[:2]
    session, times = engine.session((H, W)), []
    for t, frame in enumerate(frames[:TRACKED]):
        start = now(r)
        seen = engine.encode(frame)
        if t == 0:
            session.seed(seen, t, 1, mask=mask, points=[(W // 2, H // 2, 1)] if mask is None else None)
        one = session.track(seen, t)[1]
        times.append(now(r) - start)
        side = one.logits.shape[-1]
        assert one.mask.shape == (H, W) and one.mask.dtype == bool and one.logits.shape == (side, side)
        assert np.isfinite(one.logits).all() and 0 <= one.score <= 1
        if t == 0:
            maps = ", ".join(str(tuple(m.shape)) for m in seen.maps)
            print(f"features {maps} {seen.maps[0].dtype} on {seen.maps[0].device}")
            print(f"mask {one.mask.shape} {one.mask.dtype}, logits {one.logits.shape} {one.logits.dtype}, numpy")
        print(f"frame {t} | {one.mask.sum():6d} px | score {one.score:.3f} | {1e3 * times[-1]:.0f} ms"
              f" | session {session.bytes() / 2**20:.2f} MiB", flush=True)  # fmt: skip
    return 1e3 * float(np.median(times[1:] or times))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(args, argv)
    start = now(r)
    engine, name = open_engine(args, r)
    if args.score_thr is None:
        args.score_thr = UNTRAINED_THR if name == "tiny, random" else 0.5
    run.check_ranges(args, score_thr=(0, 1))
    engine.check_prompts([args.prompt])
    frames = read_frames(args)
    about = engine.about()
    n = sum(p.numel() for p in engine.model.parameters())
    print(f"SAM3 {name}: {n / 1e6:.1f} M parameters, {about['dtype']} on {engine.device}, {about['image_size']} px, "
          f"transformers {about['transformers']}, masks cleaned by {about['kernels']}, opened in {now(r) - start:.1f} s")  # fmt: skip
    Path(args.out).mkdir(parents=True, exist_ok=True)
    found, mask = detect(engine, frames, args, r)
    median = track(engine, frames, mask, r)
    print(f"pictures in {args.out}")
    H, W = frames[0].shape[:2]
    run.finish(r, args, "SAM3", f"PASS {name}, {W}x{H} px: {found} x {args.prompt!r} above {args.score_thr:g} in "
               f"{len([t for t in DETECTED if t < len(frames)])} frames, {median:.0f} ms per tracked frame")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.cli(main))
