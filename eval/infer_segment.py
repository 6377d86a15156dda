"""Segment pictures with a trained FastSAM2.  Reads pictures and a checkpoint, never labels.

    python eval/infer_segment.py photo.jpg street/ --ckpt runs/seg/best --out runs/seg/street --task panoptic
    python eval/infer_segment.py photo.jpg --ckpt runs/seg/best --out clicks --task interactive \\
        --point 310,220 --point 300,90,0 --box 20,30,180,260 --text "the red car" --object --point 50,60
    python eval/infer_segment.py street/ --ckpt runs/seg/best --out runs/seg/fast --task panoptic --keep-queries 50
    python eval/infer_segment.py datasets/coco/train2014 --ckpt runs/seg/best --out ref --task referring \\
        --refs refs_unc.json --split val --clip weights/clip-vit-large-patch14

Writes OUT/TASK.json, TASK.json.meta.json, a picture of the result for every input in TASK_overlays/, and
    panoptic     COCO panoptic: the json, PNGs in panoptic/          instance     COCO results: boxes, masks, scores
    semantic     PNGs of category ids in semantic/                   interactive  mask, score and prompts of each object
    referring    [{"sent_id", "segmentation"}] for each sentence of --refs, or each --text on each picture
Masks have the size of their picture. image_id is the number where every file is named as in COCO, else the file's name.

Prompts are read from left to right, in px of the picture: a second --box, --mask or --text begins another object, and
so does --object; clicks belong to the object begun last. Interactive takes one picture.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.coco_captions import open_image
from data.segment_batch import View, draw_window, show_image, show_map
from models import segment_inference as net
from models.fastsam2 import FastSAM2
from models.fastsam2_options import reconfigured
from utils import overlay, run
from utils import segment_inputs as user
from utils import segment_writing as files
from utils.picture_files import find_images
from utils.run import UserError
from utils.weights import write_sidecar

PROMPTED = ("interactive", "referring")
TASKS = ("panoptic", "instance", "semantic", *PROMPTED)
OPTIONS = {  # of the network, by default as it was trained
    "keep_queries": "queries that go on after --prune-after (0: all)",
    "prune_after": "stage after which queries are left out, 1..3",
    "key_rank": "width of the keys that prompts look at (0: full)",
    "key_stride": "px from key to key",
}


class Prompt(argparse.Action):
    """Appends (flag, value) to args.prompts, whatever the flag, so that the order stays."""

    def __call__(self, parser, args, value, flag=None):
        args.prompts = [*args.prompts, (flag[2:], value)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for predictions and pictures")
    p.add_argument("--task", required=True, choices=TASKS, help="what is asked of the pictures")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    prompt = partial(p.add_argument, dest="prompts", action=Prompt, default=[])
    prompt("--point", metavar="X,Y[,0]", help="a click on the object, with ,0 beside it; px, pixel centres whole")
    prompt("--box", metavar="X0,Y0,X1,Y1", help="a box around the object; px of its first and last pixel")
    prompt("--mask", metavar="PNG", help="a rough mask of the object, as large as the picture; 0 is outside")
    prompt("--text", help="what the object is")
    prompt("--object", nargs=0, help="the next prompt is about another object")
    p.add_argument("--refs", default=None, metavar="JSON", help="sentences, each with the picture that it is about")
    p.add_argument("--split", default=None, help="only the refs of this split (default: all)")
    p.add_argument("--clip", default=None, metavar="DIR", help="snapshot of the CLIP it learned texts of")
    p.add_argument("--image-size", default=None, metavar="HxW", help="px to fit pictures into (default: trained)")
    p.add_argument("--segment-score", type=float, default=0.8, help="panoptic: class probability of a segment")
    p.add_argument("--segment-share", type=float, default=0.8, help="panoptic: least share that stays of a mask")
    p.add_argument("--top", type=int, default=100, help="instance: pairs of query and class that are looked at")
    p.add_argument("--draw-score", type=float, default=0.3, help="instance: lowest score that is drawn")
    for name, text in OPTIONS.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=text)
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- inputs


def check_inputs(args) -> tuple[dict[int | str, Path], dict[int | str, list[dict]]]:
    """Pictures by image_id, and the objects that each is asked for; UserError before any work is done."""
    run.check_ranges(args, segment_score=(0, 1), segment_share=(0, 1), draw_score=(0, 1), top=(1, 10**6))
    out, images, objects = Path(args.out), find_images(args.images), user.read_objects(args.prompts)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    for name in (f"{args.task}.json", f"{args.task}_overlays", args.task):
        if (out / name).exists():
            raise UserError(f"--out {out}: holds {name} already; choose a new folder or delete it")
    if args.refs and (args.task != "referring" or objects):
        raise UserError("--refs: is for --task referring, without other prompts; leave one of them out")
    if bool(objects or args.refs) != (args.task in PROMPTED):
        hint = "needs a prompt: --text or --refs, or where it is interactive --point, --box, --mask or --text"
        raise UserError(f"--task {args.task}: {hint if args.task in PROMPTED else 'takes no prompt; leave it out'}")
    if args.task == "referring" and any(x.keys() != {"text"} for x in objects):
        raise UserError("--task referring: takes --text only; use --task interactive to point at objects as well")
    if args.task == "interactive" and len(images) > 1:
        raise UserError(f"--task interactive: {len(images)} pictures, but prompts are about one; give that one")
    if args.refs:
        wanted = user.read_refs(args.refs, args.split, set(images))
        return {i: images[i] for i in wanted}, wanted
    Q, number = len(objects), "sent_id" if args.task == "referring" else "object"
    return images, {i: [{number: k * Q + n + 1, **x} for n, x in enumerate(objects)] for k, i in enumerate(images)}


# ---- results


def look(model: FastSAM2, image: np.ndarray, view: View, objects: list[dict], embed: Callable | None, r) -> net.Found:
    """A picture (H, W, 3), shown whole, and the objects that it is asked for (none: all that is there)."""
    H, W = image.shape[:2]
    window, prompts = draw_window(view, H, W, np.random.default_rng(0)), None
    if objects:
        masks = {k: show_map(m, window) for k, m in user.check_place(objects, H, W).items()}
        prompts = user.pack(objects, masks, (H, W), (window.h, window.w), embed)
    features = net.encode(model, show_image(image, window), r.dtype)
    return net.decode(model, features, (H, W), (window.h, window.w), prompts, r.dtype)


def result_of(
    args, found: net.Found, image_id: int | str, objects: list[dict], cfg, categories: list[int]
) -> net.Result:
    """What was found, in the form of the task."""
    if objects:
        return net.prompted_result(found, image_id, objects)
    if args.task == "semantic":
        return net.semantic_result(found, image_id, cfg, categories)
    if args.task == "instance":
        return net.instance_result(found, image_id, cfg, categories, args.top, args.draw_score)
    return net.panoptic_result(found, image_id, cfg, categories, args.segment_score, args.segment_share)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images, objects = check_inputs(args)
    model, r = FastSAM2.from_checkpoint(args.ckpt).eval(), run.start(args, argv)
    changes = {name: vars(args)[name] for name in OPTIONS if vars(args)[name] is not None}
    model = (reconfigured(model, **changes) if changes else model).to(r.device)
    cfg = model.cfg
    size = run.numbers("--image-size", args.image_size, "x", 2)
    categories, size = user.data_of(run.read_config(args.ckpt), args.ckpt, len(cfg.classes), size)
    every = [x for of_one in objects.values() for x in of_one]
    embed = net.text_model(cfg, args.ckpt, args.clip, r.device) if any("text" in x for x in every) else None
    given = [*filter(None, [args.refs]), *dict.fromkeys(x["mask"] for x in every if "mask" in x)]
    if args.task == "instance" and not any(cfg.is_thing):
        raise UserError(f"--task instance: {args.ckpt} has no class of things; use --task semantic or panoptic")

    # ---- pictures, into a folder beside; renamed at the end
    out, staging, entries, n = Path(args.out), Path(args.out) / ".tmp-infer", [], 0
    existed = out.exists()
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed run
        (staging / f"{args.task}_overlays").mkdir(parents=True)
        t = time.perf_counter()
        for i, path in images.items():
            image = np.array(open_image(path))
            x = result_of(args, look(model, image, View(*size), objects[i], embed, r), i, objects[i], cfg, categories)
            n, picture = n + len(x.shown), files.draw_masks(image, x.shown, x.names)
            for prompt in objects[i]:
                picture = files.draw_prompt(picture, prompt)
            overlay.save_png(staging / f"{args.task}_overlays" / f"{path.stem}.png", picture)
            if x.png is not None:
                (staging / args.task).mkdir(exist_ok=True)
                files.save_picture(staging / args.task / f"{path.stem}.png", x.png)
                x.entries[0]["file_name"] = f"{path.stem}.png"
            entries += x.entries
        speed = len(images) / (time.perf_counter() - t)
        if x.png is not None:
            entries = files.with_categories(entries, cfg.classes, categories, cfg.is_thing)
        run.write_text_atomic(staging / f"{args.task}.json", json.dumps(entries) + "\n")
        about = {**vars(args), **asdict(cfg), "category_ids": categories, "image_size": size}
        write_sidecar(staging / f"{args.task}.json", args.ckpt, about, [*images.values(), *given])
        for file in sorted(staging.iterdir()):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and out.exists() and not any(out.iterdir()):
            out.rmdir()
    result = f"{args.task}: {n} masks drawn on {len(images)} images, {speed:.1f} images/s -> {out}/{args.task}.json"
    run.finish(r, args, "FastSAM2", result)


if __name__ == "__main__":
    sys.exit(run.cli(main))
