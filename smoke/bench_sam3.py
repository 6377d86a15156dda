"""Time SAM3's video path part by part: frames from a file, two prompts and two followed objects, an annotated mp4.

    python smoke/bench_sam3.py                                                  # tiny random weights on a laptop: 15 s
    python smoke/bench_sam3.py --device cuda --dtype bf16 --models tiny real --size 1280x720 --frames 64
    python smoke/bench_sam3.py --device cuda --dtype bf16 --models --snapshot weights/sam3 --video rally.mp4

Figures are medians over the frames after the first two: process time on a CPU (one thread), clock on a GPU.
    decode     one frame of the file, RGB
    backbone   Sam3Engine.encode: resizing, picture encoder, both necks; once for detector and tracker
    detector   two prompts on these features, masks of what scores above 0.5 at the frame's size
    tracker    two objects, their masks at the frame's size, their memories, pruning
    write      two masks drawn, H.264
Session: MiB held for the two objects after half of the frames and after all; flat from frame 17 on. Peak: of the GPU.
real has the released model's sizes with random weights (848 M parameters); it is left out, with a line that says so,
where memory does not suffice. Its ViT takes minutes a frame on one CPU core. --dtype is
that of SAM3's weights too: weights, features and sessions have one and the same.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rendered_ball import RenderedBall, write_video
from data.video import VideoReader, VideoWriter
from models.sam3_memory import FixedVideoModel
from models.sam3_tiny import picture_processors, tiny_config, tiny_tokenizer
from models.sam3_tracker import Sam3Engine
from utils import overlay, run

PARTS = ("decode", "backbone", "detector", "tracker", "write")
PROMPTS, WARM_UP = ["tennis ball", "tennis racket"], 2
PARAMETERS = 848e6
GIB = 2**30


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--models", nargs="*", default=["tiny"], choices=["tiny", "real"], help="sizes with random weights")
    p.add_argument("--snapshot", default=None, metavar="DIR", help="also local folder of facebook/sam3")
    p.add_argument("--video", default=None, help="video file; without one a rendered clip")
    p.add_argument("--size", default="640x360", help="WIDTHxHEIGHT of the rendered clip in px")
    p.add_argument("--frames", type=int, default=40, help="frames that are timed, and two before")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def build(name: str, r) -> Sam3Engine:
    """Random weights of a size, on the device."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer) if name == "tiny" else transformers.Sam3VideoConfig()
    with r.device:
        model = FixedVideoModel(config).to(r.dtype).eval()
    pictures, videos = picture_processors(config.image_size)
    processor = transformers.Sam3VideoProcessor(image_processor=pictures, video_processor=videos, tokenizer=tokenizer)
    return Sam3Engine(model, processor, Path(name))


def missing_memory(r) -> str:
    """Why the real size does not fit, or nothing: weights are made in float32, then a frame's features and work."""
    need = 4 * PARAMETERS + 3 * GIB
    if r.device.type == "cuda":
        free = torch.cuda.mem_get_info(r.device)[0]
    else:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
        kib = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
        free = 1024 * int(kib[0]) if kib else need
    return f"needs {need / GIB:.1f} GiB, {free / GIB:.1f} are free" if free < need else ""


def measure(engine: Sam3Engine, video: Path, folder: Path, frames: int, r) -> dict:
    """Medians of the parts in ms, and the session's bytes after half of the frames and after all."""
    took, held = {name: [] for name in PARTS}, []
    clock = time.process_time if r.device.type == "cpu" else time.perf_counter

    def now() -> float:
        if r.device.type == "cuda":
            torch.cuda.synchronize(r.device)
        return clock()

    with VideoReader(video, threads=1) as reader:
        n, (W, H) = min(frames + WARM_UP, len(reader)), reader.out_size
        if n <= WARM_UP:
            raise run.UserError(f"{video}: {n} frames; expected more than the {WARM_UP} that are not timed")
        stream, session = reader.stream(0, n), engine.session((H, W))
        with VideoWriter(folder / "out.mp4", reader.fps, (W, H)) as writer:
            for t in range(n):
                marks = [now()]
                frame = next(stream).image
                marks.append(now())
                seen = engine.encode(frame)
                marks.append(now())
                engine.detect(seen, PROMPTS, 0.5)
                marks.append(now())
                if t == 0:
                    for k in (1, 2):
                        session.seed(seen, t, k, box=(k * W / 8, k * H / 8, (k + 1) * W / 8, (k + 1) * H / 8))
                objects = session.track(seen, t)
                marks.append(now())
                for k, one in objects.items():
                    frame = overlay.mask(frame, one.mask, overlay.colour(k))
                writer.write(frame)
                marks.append(now())
                if t >= WARM_UP:
                    for name, a, b in zip(PARTS, marks, marks[1:], strict=False):
                        took[name].append(1e3 * (b - a))
                    held.append(session.bytes())
    found = {name: statistics.median(values) for name, values in took.items()}
    return found | {"sum": sum(found.values()), "held": (held[len(held) // 2], held[-1])}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, frames=(1, 100_000))
    W, H = run.numbers("--size", args.size, "x", 2)
    if min(W, H) < 32:
        raise run.UserError(f"--size {args.size}: expected sides of at least 32 px")
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)
    cuda, rows, results = r.device.type == "cuda", [], []
    rows.append("| model | " + " | ".join(PARTS) + " | sum (ms) | frames/s | session (MiB) | peak |")
    rows.append("|" + " --- |" * (len(PARTS) + 5))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = RenderedBall(args.seed, size=(H, W), absent=0.0)
        video = args.video or write_video(source, 0, args.frames + WARM_UP, folder, "clip")
        for name in [*args.models, *([args.snapshot] if args.snapshot else [])]:
            if name == "real" and (why := missing_memory(r)):
                run.say(r, f"real: left out, {why}")
                continue
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(r.device)
            snapshot = name == args.snapshot
            engine = Sam3Engine.open(name, r.dtype, r.device) if snapshot else build(name, r)
            found = measure(engine, Path(video), folder, args.frames, r)
            del engine
            half, whole = (b / 2**20 for b in found["held"])
            peak = f"{torch.cuda.max_memory_allocated(r.device) / GIB:.2f} GiB" if cuda else "-"
            cells = [Path(name).name, *(f"{found[part]:.3g}" for part in (*PARTS, "sum"))]
            cells += [f"{1e3 / found['sum']:.3g}", f"{half:.2f}, {whole:.2f}", peak]
            rows.append("| " + " | ".join(cells) + " |")
            results.append(
                f"{Path(name).name} {args.dtype} {found['sum']:.3g} ms a frame, backbone {found['backbone']:.3g}"
            )
            run.say(r, rows[-1])
    run.say(r, "\n".join(["", *rows]))
    run.finish(r, args, "SAM3", "; ".join(results) or "nothing timed")


if __name__ == "__main__":
    sys.exit(run.cli(main))
