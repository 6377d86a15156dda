"""Render play with a ball and a racket as videos with their labels: something to run eval/infer_ball.py on.

python data/prepare_rendered_ball.py datasets/play --videos 4     # play_0.mp4, play_0_ball.csv, play_0_racket.csv, ..

The scenes are of the kind of train/train_tiny_sam3.py (data/rendered_ball.py), but none of those that it trains on or
validates on with any --seed below 500 million: either target may be missing from a video, or hide for some frames.
Labels stand in the columns of TrackNet's tennis.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rendered_ball import RenderedBall, write_video
from utils import run
from utils.run import UserError

UNSEEN = 500_000_003  # added to the seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("folder", metavar="FOLDER", help="folder to write, new")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--videos", type=int, default=4, help="how many")
    p.add_argument("--frames", type=int, default=90, help="frames of each")
    p.add_argument("--size", default="128x96", metavar="WxH", help="pixels of the videos")
    p.add_argument("--absent", type=float, default=0.1, help="share of videos without a ball, and without a racket")
    p.add_argument("--hiding", type=float, default=0.8, help="share of videos in which a target hides for some frames")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, seed=(0, UNSEEN - 1), videos=(1, 10**4), frames=(1, 10**6), absent=(0, 1), hiding=(0, 1))
    W, H = run.numbers("--size", args.size, "x", 2)
    if min(W, H) < 32:
        raise UserError(f"--size {args.size}: expected sides of at least 32 px")
    source = RenderedBall(args.seed + UNSEEN, size=(H, W), absent=args.absent, hiding=args.hiding)
    with run.new_folder(args.folder, False) as folder:
        for k in range(args.videos):
            write_video(source, k, args.frames, folder, f"play_{k}")
    print(f"{args.folder}: {args.videos} videos of {args.frames} frames, {W}x{H} px, labels of ball and racket beside")


if __name__ == "__main__":
    sys.exit(run.cli(main))
