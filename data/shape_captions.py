"""Pictures of two coloured shapes with five sentences each: a small caption data set in COCO's layout.

What a caption must say is on the picture, so a captioner that learns nothing from pixels shows it. The folder reads
like COCO 2017: train2017/, val2017/, annotations/{captions,instances}_*.json, with exact instance masks.
"""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.run import write_text_atomic

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


def area(polygon: list[float]) -> float:
    """Of a polygon [x0, y0, ..], px^2 (shoelace formula)."""
    x, y = np.array(polygon[0::2]), np.array(polygon[1::2])
    return round(float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2), 2)


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
                              "segmentation": [polygon], "bbox": box, "area": area(polygon)})  # fmt: skip
    categories = [{"id": k + 1, "name": shape, "supercategory": "shape"} for k, shape in enumerate(SHAPES)]
    for kind, annotations in (("captions", captions), ("instances", instances)):
        content = {"images": images, "annotations": annotations}
        content |= {"categories": categories} if kind == "instances" else {}
        write_text_atomic(root / "annotations" / f"{kind}_{name}.json", json.dumps(content) + "\n")


def write_shapes(root: Path, train: int, val: int, size: int = 64, seed: int = 0) -> None:
    """Both splits; ids count on from train to val, so no two splits share a picture."""
    write_split(root, "train2017", range(1, train + 1), size, seed)
    write_split(root, "val2017", range(train + 1, train + val + 1), size, seed)
