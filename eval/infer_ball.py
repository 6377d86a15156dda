"""Track a ball and other things in a video by text prompt (SAM3), or a ball by its motion.  Never opens labels.

    python eval/infer_ball.py rally.mp4 --ckpt weights/sam3 --out runs/ball --prompt ball="tennis ball" \\
        --prompt racket="tennis racket" --all racket
    python eval/infer_ball.py rally.mp4 --ckpt weights/sam3 --out runs/fixed --prompt ball="tennis ball" --offline \\
        --correct 120:640,310 --correct 200:90,55:0
    python eval/infer_ball.py rally.mp4 --detector motion --out runs/motion            # fixed camera, no weights

Writes OUT/tracks.json (utils/track_files.py), NAME.csv per target in TrackNet's tennis columns, tracks.json.meta.json,
annotated.mp4 with trails and states, and frames.png with some of its frames. Coordinates are px of the frame, pixel
centres at whole numbers. One instance per prompt, the best by what is seen in each frame, or with --all every instance;
models/ball_follow.py says how detections and the tracker's masks are weighed. For small scores lower --score-thr and
--new-thr. --offline decides once more with the whole clip known: best path, gaps of up to 6 frames filled (source
interp, not visible, not in the csv), smoothed columns x_s, y_s. --detector motion always does, and looks at no weights.
--ckpt defaults to the environment variable HF_LOCAL_MODEL. --dtype is that of SAM3's weights too, of one and the same
session. Memory does not grow with the video; --exact-memory keeps all of the tracker's.
Ctrl-C or SIGTERM: the files are completed up to that frame (video.stopped_early), exit code 130 or 143.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.video import VideoReader, VideoWriter
from models.ball_follow import FollowConfig
from models.ball_motion import MotionConfig, MotionDetector, camera_motion, camera_samples, check_camera
from models.ball_offline import offline_track
from models.ball_tracking import BallTracker
from models.sam3_tracker import Sam3Engine
from utils import run
from utils.ball_path import PathConfig, detector_path
from utils.output_folder import results_into
from utils.run import UserError
from utils.track_files import Track, Tracks, describe_video, write_all
from utils.track_inputs import RULES, Target, read_clicks, read_targets, stop_signals
from utils.track_video import TrackPainter


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("video", metavar="VIDEO", help="video file")
    p.add_argument("--ckpt", default=None, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for tracks and the annotated video")
    p.add_argument("--detector", default="sam3", choices=["sam3", "motion"], help="motion: fixed camera, no weights")
    p.add_argument("--prompt", action="append", default=[], metavar="NAME=TEXT", help="a target; may be repeated")
    p.add_argument("--all", action="append", default=[], metavar="NAME", help="report every instance of this target")
    p.add_argument("--correct", action="append", default=[], metavar="FRAME:X,Y[:LABEL][:NAME]",
                   help="the object of a target, else the first, is here (1, default) or not (0), px")  # fmt: skip
    p.add_argument("--offline", action="store_true", help="decide again with the whole clip known, fill gaps, smooth")
    p.add_argument("--force", action="store_true", help="--detector motion although the camera moves")
    p.add_argument("--masks", action="store_true", help="write masks into tracks.json, as COCO's RLE")
    p.add_argument("--no-video", action="store_true", help="write no annotated mp4")
    p.add_argument("--exact-memory", action="store_true", help="prune nothing from the tracker's memory")
    p.add_argument("--nms-iou", type=float, default=0.1, help="IoU above which the worse of two detections goes")
    p.add_argument("--mask-thr", type=float, default=0.5, help="probability from which a pixel belongs to a mask")
    rules = p.add_argument_group("how a track is followed")
    for f in fields(FollowConfig):
        if f.name in RULES:
            text = f"{RULES[f.name]} (default {f.default})"
            rules.add_argument(f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, help=text)
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def check_args(args) -> list[Target]:
    """The targets; UserError for flags that do not fit together or an --out that is taken, before any work is done."""
    targets, out = read_targets(args.prompt, args.all), Path(args.out)
    shares = ("nms_iou", "score_thr", "trk_thr", "trust", "silence", "again", "keep")
    run.check_ranges(args, **{name: (0, 1) for name in shares}, mask_thr=(0.01, 0.99), new_thr=(args.score_thr, 1))
    run.check_ranges(args, gate=(0.001, 10), gate_min=(0, 10**5), area_ratio=(1, 10**6), hit_rate=(0, 2))
    run.check_ranges(args, lively=(0, 1000), min_cells=(0, 1000), persist=(0, 1000))
    run.check_ranges(args, motion_weight=(0, 100), tracker_weight=(0, 100), challenge=(0, 1000), bridge=(0, 10**9))
    run.check_ranges(args, **{name: (1, 10**9) for name in ("lost_after", "forget_after", "confirm", "min_points")})
    if args.detector == "motion":
        flags = {
            "--all": args.all,
            "--correct": args.correct,
            "--masks": args.masks,
            "--exact-memory": args.exact_memory,
        }
        if wrong := [flag for flag, value in flags.items() if value]:
            raise UserError(f"--detector motion: takes no {wrong[0]}; it finds one ball, and no masks")
        if len(targets) > 1:
            raise UserError(f"--detector motion: finds one ball, got {len(targets)} prompts; leave them out")
        targets = [Target(targets[0].name if targets else "ball", None)]
    elif not targets:
        raise UserError('no --prompt: name what to track, such as --prompt ball="tennis ball"')
    elif args.offline and args.all:
        raise UserError("--offline: follows one object per prompt; leave out --all or --offline")
    elif args.force:
        raise UserError("--force: is about a moving camera with --detector motion; leave it out")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    if (out / "tracks.json").exists():
        raise UserError(f"--out {out}: holds tracks already; choose a new folder or delete them")
    return targets


# ---- the two ways


def track_with_sam3(reader, targets, args, r, staging: Path, asked: list[int]) -> tuple[dict[str, Track], list, dict]:
    """Tracks, events, and what made them. The annotated video is written on the way, unless --offline."""
    clicks = read_clicks(args.correct, targets, len(reader), reader.out_size)
    engine = Sam3Engine.open(args.ckpt, r.dtype, r.device, args.mask_thr)
    engine.check_prompts([target.prompt for target in targets])
    cfg, (W, H) = FollowConfig(**{name: getattr(args, name) for name in RULES}), reader.out_size
    tracker = BallTracker(
        engine, targets, cfg, (H, W), clicks, args.nms_iou, args.masks, args.exact_memory, args.offline
    )
    painter = TrackPainter(list(tracker.targets), len(reader))
    with ExitStack() as stack:
        if not args.no_video and not args.offline:
            writer = stack.enter_context(VideoWriter(staging / "annotated.mp4", reader.info.rate, (W, H)))
        for frame in tqdm(reader.stream(), total=len(reader), disable=not sys.stderr.isatty(), unit="frame"):
            shown = tracker.step(frame.index, frame.image)
            if not args.no_video and not args.offline:
                writer.write(painter.paint(frame.image, *({k: s[i] for k, s in shown.items()} for i in range(3))))
            if asked:
                break
    tracker.finish()
    painter.save_sheet(staging / "frames.png")
    found = tracker.targets
    if args.offline:
        path = detector_path(birth_cost=cfg.new_thr)  # a chain needs what a track needs to begin
        found = {k: offline_track(c, W, path, found[k].prompt, found[k]) for k, c in tracker.candidates.items()}
    about = {**engine.about(), "thresholds": {**asdict(cfg), "nms_iou": args.nms_iou}, "offline": args.offline}
    return found, tracker.events, about


def track_with_motion(reader, targets, args, asked: list[int]) -> tuple[dict[str, Track], list, dict]:
    """As track_with_sam3, without weights and without a video."""
    cfg, path, rows = MotionConfig(), PathConfig(), []
    samples = reader.read(camera_samples(len(reader)))
    moved = camera_motion(samples) if args.force else check_camera(samples, args.video)
    detector = MotionDetector(cfg)
    for frame in tqdm(reader.stream(), total=len(reader), disable=not sys.stderr.isatty(), unit="frame"):
        rows += [found for _, found in detector.push(frame.image)]
        if asked:
            break
    rows += [found for _, found in detector.finish()]
    track = offline_track(rows, reader.out_size[0], path, None, repeats=detector.repeats)
    about = {"kind": "motion", "path": None, "dtype": None, "camera_motion_px": round(moved, 3), "offline": True}
    return {targets[0].name: track}, [], {**about, "thresholds": {**asdict(cfg), **asdict(path)}}


def draw(reader: VideoReader, tracks: dict[str, Track], path: Path) -> None:
    """The annotated video of tracks that are complete."""
    painter = TrackPainter(list(tracks), n := len(next(iter(tracks.values())).frames))
    with VideoWriter(path, reader.info.rate, reader.out_size) as writer:
        for frame in reader.stream(stop=n):
            points = {name: track.frames[frame.index] for name, track in tracks.items()}
            states = {k: "TRACK" if p.visible else "GAP" if p.x is not None else "LOST" for k, p in points.items()}
            writer.write(painter.paint(frame.image, points, states, {}))
    painter.save_sheet(path.with_name("frames.png"))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    targets, out = check_args(args), Path(args.out)
    with VideoReader(args.video) as reader, stop_signals() as asked:
        r = run.start(args, argv)
        with results_into(out, last="tracks.json") as staging:
            if args.detector == "sam3":
                tracks, events, model = track_with_sam3(reader, targets, args, r, staging, asked)
            else:
                tracks, events, model = track_with_motion(reader, targets, args, asked)
            if not args.no_video and not (staging / "annotated.mp4").exists():
                draw(reader, tracks, staging / "annotated.mp4")
            video = describe_video(reader.info, len(next(iter(tracks.values())).frames), len(reader))
            write_all(staging, Tracks(video, model, tracks, events), vars(args), r.command)
    seen = [f"{name} in {sum(p.visible for p in track.frames)}" for name, track in tracks.items()]
    early = f", stopped early, of {video['stopped_early']}" if asked else ""
    figures = f"{', '.join(seen)} of {video['num_frames']} frames{early}, {len(events)} events -> {out}/tracks.json"
    run.finish(r, args, "SAM3", figures)
    if asked:
        sys.exit(128 + asked[0])


if __name__ == "__main__":
    sys.exit(run.cli(main))
