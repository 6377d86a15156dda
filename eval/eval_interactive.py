"""Score interactive segmentation: mean IoU after 1, 3 and 5 clicks, and clicks to 85 and 90 % IoU.  Runs a model.

    python eval/eval_interactive.py --ckpt runs/seg/best --labels datasets/coco/annotations/panoptic_val2017.json
    python eval/eval_interactive.py --ckpt runs/seg/best --labels datasets/coco/annotations/instances_val2017.json \\
        --first random --clicks 5 --device cuda
    python eval/eval_interactive.py --ckpt runs/seg/best --labels moving_shapes --limit 20      # rendered, no data

The one eval script that runs a model: a click simulator (utils/click_simulator.py) sees the labels and hands over points
only; the model answers with masks, at the size of the picture. Labels are COCO panoptic (every segment, things and
stuff, as COCO-SAM has it) or COCO instances; crowds are no objects, and crowd and void pixels do not count.

mIoU@k: mean over objects of the IoU after k clicks. NoC@85, NoC@90: mean number of clicks to reach that IoU, --clicks
where it is never reached; failed: the share of those. Beside the score stand two controls: discs around the clicks on
the object, without a model, and the mask of another object's first click: where it scores as well, clicks did not
matter.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.coco_instances import CocoInstances
from data.coco_panoptic import CocoPanoptic
from data.moving_shapes import MovingShapes
from data.segment_batch import Scene, View, draw_window, show_image
from models.fastsam2 import FastSAM2
from models.panoptic_post import to_original
from models.segment_inference import decode, encode
from utils import run
from utils.click_simulator import ClickSimulator, click_rounds, clicked_discs, interactive_scores
from utils.run import UserError
from utils.segment_inputs import data_of, scale_points
from utils.segmentation_files import read_json

RADIUS = 0.12  # of the discs, as a share of the picture's shorter side


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--labels", required=True, help="COCO panoptic or instances json, or moving_shapes")
    p.add_argument(
        "--images", default=None, metavar="DIR", help="folder of the pictures (default: found near --labels)"
    )
    p.add_argument("--label-png", default=None, metavar="DIR", help="PNGs of the labels (default --labels less .json)")
    p.add_argument("--clicks", type=int, default=20, help="most clicks an object gets")
    p.add_argument("--first", default="deepest", choices=["deepest", "random"], help="where the first click goes")
    p.add_argument("--least", type=int, default=1, metavar="PX", help="objects with fewer pixels are left out")
    p.add_argument(
        "--image-size", default=None, metavar="HxW", help="px that pictures are fitted into (default: trained)"
    )
    p.add_argument("--limit", type=int, default=0, metavar="N", help="score the first N pictures (0: all)")
    p.add_argument("--batch-size", type=int, default=64, help="items per process and step")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def open_labels(args) -> CocoPanoptic | CocoInstances | MovingShapes:
    """The source of scenes that --labels names."""
    if args.labels == "moving_shapes":
        return MovingShapes(args.limit or 20, args.seed)
    content = read_json("--labels", args.labels)
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise UserError(f"--labels {args.labels}: has no annotations; expected COCO panoptic or instances json")
    if "segments_info" in rows[0]:
        return CocoPanoptic(args.labels, args.images, args.label_png)
    return CocoInstances(args.labels, args.images)


def objects_of(scene: Scene, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (P, H, W) bool of the objects with at least `least` (1 or more) px that count, and what counts (H, W) bool."""
    masks = scene.masks if scene.masks.dtype == bool else scene.masks == scene.ids[:, None, None]  # (N, H, W)
    counts = ~masks[scene.crowd].any(0)
    if scene.void is not None:
        counts &= ~scene.void
    return masks[(masks & counts).sum((1, 2)) >= least], counts


def answer(model, features, given: tuple, shown: tuple, args, dtype, points_px: np.ndarray, labels: np.ndarray):
    """Clicks (P, n, 2) in px of the picture, labels (P, n) -> masks (P, H, W) bool at the size of the picture."""
    points, kinds = torch.from_numpy(scale_points(points_px, given, shown)), torch.from_numpy(labels)
    masks = []
    for own, kind in zip(points.split(args.batch_size), kinds.split(args.batch_size), strict=True):
        found = decode(model, features, given, shown, {"points": own, "point_labels": kind}, dtype)
        masks.append((to_original(found.masks, found.size) > 0).cpu().numpy())
    return np.concatenate(masks)


def score_scene(model, scene: Scene, view: View, args, dtype: torch.dtype, index: int) -> dict[str, np.ndarray]:
    """IoU (P, clicks) of the model and of the discs, and (P, 1) of the mask of another object's first click; P may be 0,
    and the last is of no object where there is one only."""
    targets, counts = objects_of(scene, args.least)
    given = scene.image.shape[:2]
    window = draw_window(view, *given, np.random.default_rng(0))
    features = encode(model, show_image(scene.image, window), dtype)
    ask = partial(answer, model, features, given, (window.h, window.w), args, dtype)
    discs = partial(clicked_discs, size=given, radius=RADIUS * min(given))

    def clicks() -> ClickSimulator:
        rng = np.random.default_rng([args.seed, index]) if args.first == "random" else None
        return ClickSimulator(targets, counts, rng)

    if not len(targets):
        nothing = np.zeros((0, args.clicks))
        return {"score": nothing, "discs": nothing, "other object": nothing[:, :1]}
    others = np.roll(ask(*clicks().points()), 1, 0)
    other = clicks().show(others)[:, None] if len(targets) > 1 else np.zeros((0, 1))
    return {"score": click_rounds(clicks(), ask, args.clicks), "discs": click_rounds(clicks(), discs, args.clicks),
            "other object": other}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, clicks=(1, 1000), least=(1, 10**9), limit=(0, 10**9), batch_size=(1, 4096))
    source = open_labels(args)
    model, r = FastSAM2.from_checkpoint(args.ckpt).eval(), run.start(args, argv)
    model = model.to(r.device)
    size = run.numbers("--image-size", args.image_size, "x", 2)
    view = View(*data_of(run.read_config(args.ckpt), args.ckpt, len(model.cfg.classes), size)[1])
    print(source.summary())

    # ---- clicks
    images, t = min(args.limit or len(source), len(source)), time.perf_counter()
    parts = [score_scene(model, source.scene(0, k), view, args, r.dtype, k) for k in range(images)]
    seconds = time.perf_counter() - t
    ious = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n = len(ious["score"])
    if not n:
        raise UserError(f"--labels {args.labels}: no object of at least {args.least} px in {images} images")
    result = {"n": n, "images": images, "partial": images < len(source), "exchanged": len(ious["other object"])}
    result |= {name: interactive_scores(x) if len(x) else {} for name, x in ious.items()}
    result["other object"] = {k: v for k, v in result["other object"].items() if k == "mIoU@1"}

    # ---- result
    print(f"{'n = ' + str(n) + ' objects':20s}{'score':>10s}{'discs':>10s}{'other object':>14s}")
    for name, value in result["score"].items():
        factor = 1 if name.startswith("NoC") else 100
        shown = [value, result["discs"][name], result["other object"].get(name)]
        cells = ["n/a" if v is None else f"{factor * v:.2f}" for v in shown]
        print(f"{name:20s}{cells[0]:>10s}{cells[1]:>10s}{cells[2]:>14s}")
    print(f"{images} images, {seconds / images:.2f} s each with the simulator; at most {args.clicks} clicks, the first "
          f"{args.first}; other object: {result['exchanged']} of {n} share their image with one")  # fmt: skip
    if result["score"]["mIoU@1"] > 0.9999:
        print("WARNING: a perfect score; check that the labels do not reach the model before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        content = {**result, "settings": vars(args), "seconds": seconds}
        run.write_text_atomic(args.json, json.dumps(content, indent=1, allow_nan=False) + "\n")
    part = ", partial (--limit)" if result["partial"] else ""
    figures = [
        f"{k} {v if k.startswith('NoC') else 100 * v:.2f}" for k, v in result["score"].items() if "fail" not in k
    ]
    run.finish(r, args, "FastSAM2", f"{', '.join(figures)} (n={n}{part})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
