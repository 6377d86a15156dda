"""Candidate hit frames from a ball track: where its path turns. Reads tracks, no model and never labels.

    python eval/infer_hits.py runs/ball/tracks.json --out runs/hits                      # tracks of eval/infer_ball.py
    python eval/infer_hits.py clip6.csv --video clip6.mp4 --out runs/hits --contacts     # a ball csv, racket contacts
    python eval/eval_peaks.py --pred runs/hits/peaks.json --labels clip6.json            # how good they are

For tennis seen from behind a baseline (utils/hits.py): near_court_swing, far_court_swing, near_court_bounce and
far_court_bounce; serves count as swings. Writes OUT/peaks.json in the E2E-Spot layout (`video` is the video's stem),
so that TempoPeak's labelling, training and scoring read it, peaks.csv, and peaks.json.meta.json.
With --video, frames that repeat the picture before them (25 fps shown at 30) are found and take no time.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.ball_labels import BallTrack, read_ball
from data.peak_files import write_csv, write_predictions
from data.video import VideoReader, duplicates
from utils import run
from utils.hits import NAMES, HitConfig, name_turns
from utils.run import UserError
from utils.track_files import read_tracks
from utils.weights import file_sha256


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("tracks", nargs="+", metavar="TRACK", help="tracks.json, or a ball csv of any TrackNet dialect")
    p.add_argument("--out", required=True, help="folder for peaks.json and peaks.csv")
    p.add_argument("--video", nargs="+", default=None, help="the videos, in order; needed where TRACK is a csv")
    p.add_argument("--target", default=None, help="target of tracks.json (default ball, or the only one)")
    p.add_argument("--contacts", action="store_true", help="write racket contacts only, no bounces")
    p.add_argument("--floor", type=float, default=0.01, help="lowest score that is written")
    p.add_argument("--threshold", type=float, default=0.5, help="lowest score that is listed")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def read_input(path: str, video: str | None, target: str | None) -> tuple[BallTrack, dict, list[int]]:
    """The ball of one input, {video, num_frames, fps, width, height} of its video, and the repeated frames."""
    is_json = Path(path).suffix.lower() == ".json"
    if video is None and not is_json:
        raise UserError(f"{path}: a csv does not know its video's frame rate and size; pass the file with --video")
    if video is None:
        about = read_tracks(path).video
        item = {"video": Path(about["path"]).stem} | {k: about[k] for k in ("num_frames", "fps", "width", "height")}
        return read_ball(path, None, target), item, []
    with VideoReader(video) as reader:
        item = {"video": Path(video).stem, "num_frames": len(reader), "fps": reader.info.fps}
        item |= {"width": reader.info.width, "height": reader.info.height}
    track = read_ball(path, (item["width"], item["height"]), target)
    if track.frames[-1] >= item["num_frames"]:
        raise UserError(
            f"{path}: names frame {track.frames[-1]}, {video} has {item['num_frames']} frames; wrong video?"
        )
    return track, item, duplicates(video)


def find_hits(track: BallTrack, item: dict, repeats: list[int], args) -> dict:
    """The prediction item of one video."""
    xy = np.full((item["num_frames"], 2), np.nan)
    xy[track.frames] = track.seen((1, 2, 3))
    events = name_turns(xy, item["width"], item["fps"], repeats=repeats)
    wanted = NAMES[:2] if args.contacts else NAMES
    return item | {"events": [e for e in events if e["label"] in wanted and e["score"] >= args.floor]}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, floor=(0, 1), threshold=(0, 1))
    videos = args.video or [None] * len(args.tracks)
    if len(videos) != len(args.tracks):
        raise UserError(f"--video names {len(videos)} files for {len(args.tracks)} tracks; expected one each, in order")
    if Path(args.out).exists():
        raise UserError(f"--out {args.out}: exists already; choose a new folder")
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- hits
    items = []
    for path, video in zip(args.tracks, videos, strict=True):
        track, item, repeats = read_input(path, video, args.target)
        items.append(find_hits(track, item, repeats, args))
        known = int(np.isfinite(track.seen((1, 2, 3))[:, 0]).sum())
        print(
            f"{item['video']}: ball known in {known} of {item['num_frames']} frames, {len(repeats)} repeated pictures"
        )
        for e in items[-1]["events"]:
            if e["score"] >= args.threshold:
                print(f"  frame {e['frame']:5d}  {e['frame'] / item['fps']:8.3f} s  {e['score']:.2f}  {e['label']}")

    # ---- result
    about = {"command": r.command, "settings": vars(args) | {"turns": asdict(HitConfig())}}
    about |= {"inputs": [{"path": p, "sha256": file_sha256(p)} for p in args.tracks]}
    about |= {"commit": run.commit(), "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with run.new_folder(args.out) as folder:
        write_predictions(folder / "peaks.json", items)
        write_csv(folder / "peaks.csv", items)
        run.write_text_atomic(folder / "peaks.json.meta.json", json.dumps(about, indent=1) + "\n")
    total = sum(e["score"] >= args.threshold for item in items for e in item["events"])
    run.finish(r, args, "SAM3", f"{total} hits above {args.threshold} in {len(items)} videos -> {args.out}/peaks.json")


if __name__ == "__main__":
    sys.exit(run.cli(main))
