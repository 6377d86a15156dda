"""Render a small caption data set in COCO's layout: coloured shapes, five sentences each, exact instance masks.

    python data/prepare_shape_captions.py datasets/shapes                       # 400 + 100 pictures, some seconds
    python train/train_fsgr.py --data datasets/shapes --preset tiny --train-backbone --lr 1e-3 --out runs/shapes

The folder reads like COCO 2017 (train2017/, val2017/, annotations/{captions,instances}_*.json), so it tries the whole
path without any download: what a caption must say is on the picture, and no two splits share a picture.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.run import UserError

COLOURS = {"red": (214, 40, 40), "green": (60, 160, 70), "blue": (40, 80, 200), "yellow": (240, 200, 40)}
COLOURS |= {"white": (245, 245, 245), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "bar")
TEMPLATES = (
    "a {0} {1} {2} a {3} {4}",
    "there is a {0} {1} {2} a {3} {4}",
    "a picture of a {0} {1} {2} a {3} {4}",
    "one {0} {1} that is {2} one {3} {4}",
    "a {3} {4} and a {0} {1}",
)


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


def outline(shape: str, x: float, y: float, r: float) -> list[float]:
    """Polygon [x0, y0, x1, y1, ..] px of a shape around (x, y) with half size r px."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        points = np.stack([x + r * np.cos(angles), y + r * np.sin(angles)], 1)
    elif shape == "triangle":
        points = np.array([(x, y - r), (x + r, y + r), (x - r, y + r)])
    else:
        low = r / 3 if shape == "bar" else r
        points = np.array([(x - r, y - low), (x + r, y - low), (x + r, y + low), (x - r, y + low)])
    return [round(float(v), 2) for v in points.ravel()]


def draw(rng: random.Random, size: int) -> tuple[Image.Image, list[tuple[str, list[float]]], list[str]]:
    """One picture, its objects (shape, polygon) and its five captions."""
    colours = rng.sample(sorted(COLOURS), 2)
    shapes = [rng.choice(SHAPES) for _ in colours]
    upright = rng.random() < 0.5
    where = "above" if upright else "left of"
    grey = rng.randint(90, 160)
    image = Image.new("RGB", (size, size), (grey, grey, grey + rng.randint(0, 30)))
    pen, objects = ImageDraw.Draw(image), []
    for k, (colour, shape) in enumerate(zip(colours, shapes, strict=True)):
        along, across = (0.27 + 0.46 * k + rng.uniform(-0.04, 0.04)) * size, rng.uniform(0.3, 0.7) * size
        x, y = (across, along) if upright else (along, across)
        polygon = outline(shape, x, y, rng.uniform(0.12, 0.19) * size)
        pen.polygon(polygon, fill=COLOURS[colour])
        objects.append((shape, polygon))
    words = (colours[0], shapes[0], where, colours[1], shapes[1])
    return image, objects, [t.format(*words) for t in TEMPLATES]


def write_split(root: Path, name: str, ids: range, size: int, seed: int) -> None:
    """Pictures and both annotation files of one split; a picture depends on (seed, its id) alone."""
    (root / name).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, captions, instances = [], [], []
    for i in ids:
        picture, objects, texts = draw(random.Random(seed * 1_000_003 + i), size)
        file_name = f"{i:012d}.png"
        picture.save(root / name / file_name)
        images.append({"id": i, "file_name": file_name, "width": size, "height": size})
        captions += [{"id": 10 * i + k, "image_id": i, "caption": text} for k, text in enumerate(texts)]
        for k, (shape, polygon) in enumerate(objects):
            box = [min(polygon[0::2]), min(polygon[1::2]), max(polygon[0::2]), max(polygon[1::2])]
            box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            instances.append({"id": 10 * i + k, "image_id": i, "category_id": SHAPES.index(shape) + 1, "iscrowd": 0,
                              "segmentation": [polygon], "bbox": box, "area": box[2] * box[3]})  # fmt: skip
    categories = [{"id": k + 1, "name": shape, "supercategory": "shape"} for k, shape in enumerate(SHAPES)]
    for kind, annotations in (("captions", captions), ("instances", instances)):
        content = {"images": images, "annotations": annotations}
        content |= {"categories": categories} if kind == "instances" else {}
        run.write_text_atomic(root / "annotations" / f"{kind}_{name}.json", json.dumps(content) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, train=(1, 10**6), val=(1, 10**6), size=(32, 1024))
    root = Path(args.out)
    if root.exists():
        raise UserError(f"{root}: exists already; choose a new folder, or delete it")
    write_split(root, "train2017", range(1, args.train + 1), args.size, args.seed)
    write_split(root, "val2017", range(args.train + 1, args.train + args.val + 1), args.size, args.seed)
    print(f"{root}: {args.train} + {args.val} pictures of {args.size} px, 5 captions each")


if __name__ == "__main__":
    sys.exit(run.cli(main))
