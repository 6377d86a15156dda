"""A camera that goes round a room for hundreds of frames: time per frame and memory, after the room has been seen, flat?

    python smoke/bench_scene_stream.py                                          # random weights, 500 frames: 3 min
    python smoke/bench_scene_stream.py --ckpt runs/3d_mv/last --points 5000 --log "500 rendered frames online"
    python smoke/bench_scene_stream.py --device cuda --dtype bf16 --points 20000 --published

Frames of a rendered room, 5 objects to 9, a lap of --lap frames, what eval/infer_scene.py does with each: points, superpoints
by graph segmentation, network with its memory, instances, merging with voxels. Medians over every fifth of the frames,
in ms (process time on a CPU), objects, and MB of all that is remembered. What grows: the last fifth beside the fourth.
Exit code 1 when time grew by a quarter or memory by 2 % between them, though the room has been seen by then.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.esam_views import points_view
from data.rgbd_frames import frame_points, sample, stable_seed, superpoint_map
from data.rooms import CLASSES, Room
from models.esam import ESAM, ESAMConfig
from models.res16unet import Res16UNetConfig
from models.scene_segmenter import Filters, SceneSegmenter
from utils import run

PARTS, SLOWER, LARGER = 5, 1.25, 1.02
SMALL = {"backbone": Res16UNetConfig(stem=16, planes=(16, 32, 48, 64, 64, 48, 32, 32), layers=(1,) * 8),
         "voxel": 0.04, "dim": 128, "ffn": 256}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--ckpt", default=None, help="checkpoint folder to run with")
    p.add_argument(
        "--published", action="store_true", help="random weights of the published size (default: a small one)"
    )
    p.add_argument("--frames", type=int, default=500, help="of the stream")
    p.add_argument("--lap", type=int, default=72, help="frames until the camera is back")
    p.add_argument("--points", type=int, default=5000, help="of a frame")
    p.add_argument("--room-size", default="120x160", metavar="HxW", help="px of the rendered frames")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, frames=(PARTS, 10**6), lap=(1, 10**6), points=(100, 10**6))
    r = run.start(args, argv)

    # ---- network, room
    if args.ckpt:
        model = ESAM.from_checkpoint(args.ckpt)
    else:
        model = ESAM(ESAMConfig(CLASSES, stage="mv", **({} if args.published else SMALL)))
    filters = None if args.ckpt else Filters(score_threshold=0.0, min_points=20)
    scene = SceneSegmenter(model.to(r.device).eval(), filters=filters, dtype=r.dtype)
    size = tuple(run.numbers("--room-size", args.room_size, "x", 2))
    room = Room(args.seed + 1, 0, size, lap=args.lap)
    clock = time.process_time if r.device.type == "cpu" else time.perf_counter

    # ---- stream
    rows = []
    for k in range(args.frames):
        shot = room[k]
        before = clock()
        segments = superpoint_map(shot)
        points = sample(frame_points(replace(shot, segment=segments)), args.points, stable_seed("stream", k))
        view = points_view(points if model.cfg.stage == "mv" else points.centred(), picture=shot.colour).to(r.device)
        ready = clock()
        found = scene.push(view, torch.from_numpy(points.xyz).to(r.device))
        rows.append((ready - before, clock() - ready, len(found.ids), scene.nbytes() / 2**20))
        if (k + 1) % max(1, args.frames // PARTS) == 0:
            own = rows[-(args.frames // PARTS) :]
            ready_ms, push_ms, n, _ = (statistics.median(x) for x in zip(*own, strict=True))
            run.say(r, f"frames {k + 2 - len(own):4d} to {k + 1:4d}: points and superpoints {1e3 * ready_ms:6.1f} ms, "
                       f"network and merging {1e3 * push_ms:6.1f} ms, {n:.0f} instances a frame, "
                       f"{len(scene.merge.objects)} objects, {own[-1][3]:.2f} MB")  # fmt: skip

    # ---- result
    part = args.frames // PARTS
    fourth, last = rows[3 * part : 4 * part], rows[-part:]
    ms = [1e3 * statistics.median(sum(x[:2]) for x in rows_of) for rows_of in (fourth, last)]
    mb = [rows_of[-1][3] for rows_of in (fourth, last)]
    time_ratio, memory_ratio = ms[1] / ms[0], mb[1] / mb[0]
    text = f"{args.frames} frames of {args.points} points, lap {args.lap}: {ms[0]:.0f} -> {ms[1]:.0f} ms a frame "
    text += f"({time_ratio:.2f}x), {mb[0]:.2f} -> {mb[1]:.2f} MB ({memory_ratio:.3f}x), fourth to last fifth"
    run.finish(r, args, "ESAM", text)
    if time_ratio > SLOWER or memory_ratio > LARGER:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run.cli(main))
