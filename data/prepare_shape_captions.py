"""Render a small caption data set in COCO's layout: coloured shapes, five sentences each, exact instance masks.

    python data/prepare_shape_captions.py datasets/shapes                       # 400 + 100 pictures, some seconds
    python train/train_fsgr.py --data datasets/shapes --preset tiny --train-backbone --lr 1e-3 --out runs/shapes

The folder reads like COCO 2017 (train2017/, val2017/, annotations/{captions,instances}_*.json), so it tries the whole
path without any download: what a caption must say is on the picture, and no two splits share a picture.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.shape_captions import write_shapes
from utils import run
from utils.run import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("out", metavar="OUT", help="folder to write; must not exist yet")
    p.add_argument("--train", type=int, default=400, help="training pictures")
    p.add_argument("--val", type=int, default=100, help="validation pictures")
    p.add_argument("--size", type=int, default=64, help="pixels of a side")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, train=(1, 10**6), val=(1, 10**6), size=(32, 1024))
    root = Path(args.out)
    if root.exists():
        raise UserError(f"{root}: exists already; choose a new folder, or delete it")
    write_shapes(root, args.train, args.val, args.size, args.seed)
    print(f"{root}: {args.train} + {args.val} pictures of {args.size} px, 5 captions each")


if __name__ == "__main__":
    sys.exit(run.cli(main))
