"""SAM3 on a long video: do memory and time per frame stay as they are, and what does pruning the memory change.

    python smoke/bench_sam3_memory.py                                           # tiny random weights: 2 min on a laptop
    python smoke/bench_sam3_memory.py --frames 3000 --snapshot runs/sam3_tiny/snapshot
    python smoke/bench_sam3_memory.py --frames 3000 --device cuda --dtype bf16 --snapshot weights/sam3 --size 1280x720

Two parts, both on rendered play with a ball and a racket that hide at times.
    long       what eval/infer_ball.py does with a frame: decode, detect, follow, seed, track, prune, draw, write. Resident
               memory of the process after frame 64 and every tenth of the rest: it may grow by less than 2 %. Medians
               of the time per frame (process time on a CPU) over the first hundred frames after frame 64 and the last.
    pruning    the ball's true mask is given to the tracker every 8th frame; the same features go to a pruned session and
               to one that keeps everything. With up to four such frames not a bit may differ; with more, which frames
               differ, by how many px of the mask (IoU), and by how much in the logits, is what this prints.
Exit code 1 when memory grows by 2 % or more, or a bit differs that may not. Resident memory is read from /proc, so on
Linux only.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rendered_ball import RenderedBall, write_video
from data.video import VideoReader, VideoWriter
from models.ball_follow import FollowConfig
from models.ball_tracking import BallTracker
from models.sam3_tiny import save_tiny_snapshot
from models.sam3_tracker import Sam3Engine
from utils import run
from utils.track_inputs import Target
from utils.track_video import TrackPainter

SETTLED, WINDOW, PARTS = 64, 100, 10
TARGETS = [Target("ball", "ball"), Target("racket", "racket")]
LOW = FollowConfig(score_thr=0.2, new_thr=0.25)  # tiny models score low
EVERY, EXACT = 8, 4  # frames between masks that are given; how many of them no pruning touches
MOST = 1.02  # growth of memory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--snapshot", default=None, metavar="DIR", help="local folder of facebook/sam3, or a tiny one")
    p.add_argument("--frames", type=int, default=600, help="frames of the long video")
    p.add_argument("--pruned-frames", type=int, default=80, help="frames of the second part")
    p.add_argument("--size", default="128x96", help="WIDTHxHEIGHT of the rendered clip in px")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def resident() -> float:
    """Resident memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def long_run(engine: Sam3Engine, video: Path, folder: Path, r) -> tuple[float, str]:
    """The whole path over a video: growth of memory after frame 64 as a ratio, and the figures as text."""
    with VideoReader(video, threads=1) as reader:
        n, (W, H) = len(reader), reader.out_size
        tracker, painter = BallTracker(engine, TARGETS, LOW, (H, W)), TrackPainter([t.name for t in TARGETS], n)
        clock = time.process_time if r.device.type == "cpu" else time.perf_counter
        times, held, marks = [], [], [SETTLED + k * (n - 1 - SETTLED) // PARTS for k in range(PARTS + 1)]
        with VideoWriter(folder / "out.mp4", reader.info.rate, (W, H)) as writer:
            before = clock()
            for frame in reader.stream():
                shown = tracker.step(frame.index, frame.image)
                writer.write(painter.paint(frame.image, *({k: s[i] for k, s in shown.items()} for i in range(3))))
                now = clock()
                times.append(1e3 * (now - before))
                before = now
                if frame.index in marks:
                    held.append(resident())
                    run.say(r, f"frame {frame.index:5d} | resident {held[-1]:.1f} MiB | session "
                               f"{tracker.session.bytes() / 2**20:.2f} MiB | {statistics.median(times[-WINDOW:]):.1f} ms")  # fmt: skip
    first, last = (statistics.median(part) for part in (times[SETTLED : SETTLED + WINDOW], times[-WINDOW:]))
    seen = ", ".join(f"{k} {sum(p.visible for p in track.frames)}" for k, track in tracker.targets.items())
    growth = max(held) / held[0]
    text = f"{n} frames: resident memory {held[0]:.0f} -> {held[-1]:.0f} MiB, at most {100 * (growth - 1):+.2f} %"
    return growth, f"{text}; {first:.1f} -> {last:.1f} ms a frame; seen: {seen}"


def pruning(engine: Sam3Engine, source: RenderedBall, frames: int) -> tuple[bool, str]:
    """Pruned against complete memory: whether it is the same where it must be, and the figures as text."""
    H, W = source.size
    sessions = [engine.session((H, W)), engine.session((H, W), exact_memory=True)]
    same, apart, overlaps, given, there = True, [], [], 0, 0
    for t, shown in enumerate(source.stream(0, frames)):
        seen, mask = engine.encode(shown["image"]), shown["masks"]["ball"]
        give = t % EVERY == 0 and mask.any()
        given += give
        if given == 0:
            continue
        for session in sessions:
            if give:
                session.seed(seen, t, 1, mask=mask)
        a, b = (session.track(seen, t)[1] for session in sessions)
        if given <= EXACT:
            same &= np.array_equal(a.logits, b.logits) and a.object_logit == b.object_logit
            continue
        apart.append(max(float(abs(a.logits - b.logits).max()), abs(a.object_logit - b.object_logit)))
        there += bool(b.mask.any())
        union = np.count_nonzero(a.mask | b.mask)
        overlaps.append(np.count_nonzero(a.mask & b.mask) / union if union else 1.0)
    head = f"up to {EXACT} given masks {'bit for bit the same' if same else 'NOT the same'}"
    if not overlaps:
        return same, f"{head}; never more in {frames} frames"
    text = f"{head}; with 5 to {given}, {len(apart)} frames, the object in {there}: {sum(x < 1 for x in overlaps)} masks differ, IoU "
    text += f"{np.mean(overlaps):.4f} on average, lowest {min(overlaps):.3f}; largest difference of a logit {max(apart):.3g}"
    return same, f"{text}; memory {sessions[0].bytes() / 2**20:.2f} against {sessions[1].bytes() / 2**20:.2f} MiB"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, frames=(SETTLED + WINDOW, 10**6), pruned_frames=(2, 10**4))
    W, H = run.numbers("--size", args.size, "x", 2)
    if min(W, H) < 32:
        raise run.UserError(f"--size {args.size}: expected sides of at least 32 px")
    if sys.platform != "linux":
        raise run.UserError("bench_sam3_memory: reads resident memory from /proc; run it on Linux")
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        snapshot = args.snapshot or save_tiny_snapshot(folder / "tiny", seed=args.seed)
        engine = Sam3Engine.open(snapshot, r.dtype, r.device)
        same, pruned = pruning(engine, RenderedBall(args.seed, size=(H, W), absent=0.0, hiding=0.0), args.pruned_frames)
        run.say(r, f"pruning: {pruned}")
        source = RenderedBall(args.seed, size=(H, W), absent=0.0, hiding=1.0)
        growth, figures = long_run(engine, write_video(source, 0, args.frames, folder, "clip"), folder, r)
    good = same and growth < MOST
    run.finish(r, args, "SAM3", f"{'PASS' if good else 'FAIL'} {figures}; pruning: {pruned}")
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run.cli(main))
