"""Render a rally as a video file with its labels beside it: something to run eval/infer_peaks.py on.

python data/prepare_rally.py datasets/rally_7.mp4 --seed 7 --seconds 30     # + datasets/rally_7.json, a few seconds
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rally import LEVELS, write_rally_video
from utils import run
from utils.run import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("video", help="mp4 file to write; its labels get the suffix .json")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--seconds", type=float, default=30.0, help="length of the video")
    p.add_argument("--fps", type=float, default=25.0, help="frames per second")
    p.add_argument("--size", default="256x256", metavar="WxH", help="pixels of the video")
    p.add_argument("--level", default="easy", choices=list(LEVELS), help="difficulty of rendered rallies")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    size = run.numbers("--size", args.size, "x", 2)
    if min(*size, args.seconds, args.fps) <= 0:
        raise UserError(f"--size {args.size} --seconds {args.seconds} --fps {args.fps}: expected positive numbers")
    Path(args.video).parent.mkdir(parents=True, exist_ok=True)
    item = write_rally_video(args.video, args.seed, args.seconds, tuple(size), args.fps, args.level)
    print(f"{args.video}: {item['num_frames']} frames, {len(item['events'])} contacts, labels beside it")


if __name__ == "__main__":
    sys.exit(run.cli(main))
