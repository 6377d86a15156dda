"""Segment pictures and videos with a trained FastSAM2.  Reads pictures, videos and a checkpoint, never labels.

    python eval/infer_segment.py photo.jpg street/ --ckpt runs/seg/best --out runs/seg/street --task panoptic
    python eval/infer_segment.py photo.jpg --ckpt runs/seg/best --out clicks --task interactive \\
        --point 310,220 --point 300,90,0 --box 20,30,180,260 --text "the red car" --object --point 50,60
    python eval/infer_segment.py datasets/coco/train2014 --ckpt runs/seg/best --out ref --task referring \\
        --refs refs_unc.json --split val --clip weights/clip-vit-large-patch14
    python eval/infer_segment.py ytvis_2019/valid --ckpt runs/seg/best --out runs/vis --task vis --videos valid.json
    python eval/infer_segment.py street.mp4 --ckpt runs/seg/best --out runs/vps --task vps --clip-length 0
    python eval/infer_segment.py DAVIS --ckpt runs/seg/best --out runs/vos --task vos --masks DAVIS/Annotations/480p
    python eval/infer_segment.py walk.mp4 --ckpt runs/seg/best --out walk --task vos --point 31,22 --at 40 --box 5,9,80,60

Writes OUT/TASK.json, TASK.json.meta.json, a picture or mp4 of the result for every input in TASK_overlays/, and
    panoptic     COCO panoptic: the json, PNGs in panoptic/          instance     COCO results: boxes, masks, scores
    semantic     PNGs of category ids in semantic/                   interactive  mask, score and prompts of each object
    referring    [{"sent_id", "segmentation"}] for each sentence of --refs, or each --text on each picture
    vis          YouTube-VIS results: tracks                         vps          VIPSeg's json, PNGs in vps/VIDEO/
    vos          palette PNGs of object numbers in vos/VIDEO/, and in the json each object's presence and score
Masks have the size of their picture. image_id is the number where every file is named as in COCO, else the file's name;
video_id of vis that of --videos, else the number of the video by name, of vps and vos its name.

Prompts are read from left to right, in px of the picture: a second --box, --mask or --text begins another object, and
so does --object; clicks belong to the object begun last. Interactive takes one picture. Vos takes one video and prompts
about frame 0, or that of the --at before them, or videos and --masks: an object's first mask is used and no later one.
Vis and vps see clips of 5 frames, 3 in videos of up to 15. A video is a file or a folder, also in a folder of them.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.coco_captions import open_image
from data.footage import first_prompts, open_videos
from data.video import VideoWriter
from models import segment_inference as net
from models import video_inference as films
from models.fastsam2 import FastSAM2
from models.fastsam2_options import reconfigured
from utils import overlay, run
from utils import segment_inputs as user
from utils import segment_writing as files
from utils.output_folder import results_into
from utils.picture_files import find_images
from utils.run import UserError
from utils.video_writing import write_frames
from utils.weights import write_sidecar

PROMPTED, VIDEO = ("interactive", "referring", "vos"), ("vis", "vps", "vos")
TASKS = ("panoptic", "instance", "semantic", "interactive", "referring", *VIDEO)
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
    p.add_argument("inputs", nargs="+", metavar="INPUT", help="pictures or videos: files, or folders")
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for predictions and pictures")
    p.add_argument("--task", required=True, choices=TASKS, help="what is asked of the pictures or videos")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    prompt = partial(p.add_argument, dest="prompts", action=Prompt, default=[])
    prompt("--point", metavar="X,Y[,0]", help="a click on the object, with ,0 beside it; px, pixel centres whole")
    prompt("--box", metavar="X0,Y0,X1,Y1", help="a box around the object; px of its first and last pixel")
    prompt("--mask", metavar="PNG", help="a rough mask of the object, as large as the picture; 0 is outside")
    prompt("--text", help="what the object is")
    prompt("--object", nargs=0, help="the next prompt is about another object")
    prompt("--at", metavar="FRAME", help="vos: the objects that follow are pointed at on this frame")
    p.add_argument("--masks", default=None, metavar="DIR", help="vos: first masks, DIR/VIDEO/FRAME.png or /VIDEO.png")
    p.add_argument("--no-memory", action="store_true", help="vos: find objects by their first prompt alone")
    p.add_argument("--videos", default=None, metavar="JSON", help="vis: YouTube-VIS json that lists videos and frames")
    p.add_argument(
        "--clip-length", type=int, default=None, metavar="N", help="vis, vps: frames seen at once, 0: a stream"
    )
    p.add_argument("--refs", default=None, metavar="JSON", help="sentences, each with the picture that it is about")
    p.add_argument("--split", default=None, help="only the refs of this split (default: all)")
    p.add_argument("--clip", default=None, metavar="DIR", help="snapshot of the CLIP it learned texts of")
    p.add_argument("--image-size", default=None, metavar="HxW", help="px to fit pictures into (default: trained)")
    p.add_argument("--segment-score", type=float, default=0.8, help="panoptic, vps: class probability of a segment")
    p.add_argument("--segment-share", type=float, default=0.8, help="panoptic, vps: least share that stays of a mask")
    p.add_argument("--top", type=int, default=100, help="instance, vis: pairs of query and class that are looked at")
    p.add_argument("--draw-score", type=float, default=0.3, help="instance, vis: lowest score that is drawn")
    for name, text in OPTIONS.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=text)
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- inputs


def check_inputs(args) -> tuple[dict[int | str, Path], dict[int | str, list[dict]]]:
    """Pictures by image_id, and the objects that each is asked for; of videos none, and under None those to follow.
    UserError before any work is done."""
    run.check_ranges(args, segment_score=(0, 1), segment_share=(0, 1), draw_score=(0, 1), top=(1, 10**6))
    task, video, objects = args.task, args.task in VIDEO, user.read_objects(args.prompts)
    images = {} if video else find_images(args.inputs)
    user.check_free(Path(args.out), [f"{task}.json", f"{task}_overlays", task])
    user.check_only(args, refs=["referring"], masks=["vos"], no_memory=["vos"], videos=["vis"], clip_length=VIDEO[:2])
    user.check_prompts(task, objects, bool(args.refs or args.masks), PROMPTED)
    if video:
        return {}, {None: objects}
    if task == "interactive" and len(images) > 1:
        raise UserError(f"--task interactive: {len(images)} pictures, but prompts are about one; give that one")
    if args.refs:
        wanted = user.read_refs(args.refs, args.split, set(images))
        return {i: images[i] for i in wanted}, wanted
    Q, number = len(objects), "sent_id" if task == "referring" else "object"
    return images, {i: [{number: k * Q + n + 1, **x} for n, x in enumerate(objects)] for k, i in enumerate(images)}


# ---- results


def run_images(args, how: net.How, model: FastSAM2, images: dict, objects: dict, embed, staging: Path):
    """Content of the json, and what was drawn."""
    entries, n = [], 0
    for i, path in images.items():
        image = np.array(open_image(path))
        x = net.segment_picture(args.task, model, image, i, objects[i], how, embed)
        n, picture = n + len(x.shown), files.draw_masks(image, x.shown, x.names)
        for prompt in objects[i]:
            picture = files.draw_prompt(picture, prompt)
        overlay.save_png(staging / f"{args.task}_overlays" / f"{path.stem}.png", picture)
        if x.png is not None:
            files.save_picture(staging / args.task / f"{path.stem}.png", x.png)
            x.entries[0]["file_name"] = f"{path.stem}.png"
        entries += x.entries
    return entries, f"{n} masks drawn on {len(images)} images"


def run_videos(args, how: net.How, model: FastSAM2, videos: list, objects: list[dict], embed, staging: Path):
    """Content of the json, and what was drawn."""
    entries, n = [], 0
    for video in videos:
        first = first_prompts(video, objects, args.masks, len(videos)) if args.task == "vos" else {}
        own, results = films.segment_video(args.task, model, video, how, first, embed, not args.no_memory)
        with VideoWriter(staging / f"{args.task}_overlays" / f"{video.name}.mp4", video.rate, video.size[::-1]) as film:
            rows, masks = write_frames(staging / args.task / video.name, video, results, film.write)
        entries, n = entries + (own or [{"video_id": video.video_id, "annotations": rows}] * bool(rows)), n + masks
    return entries, f"{n} masks drawn on {sum(map(len, videos))} frames of {len(videos)} videos"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images, objects = check_inputs(args)
    videos = open_videos(args.inputs, args.videos, args.task == "vis") if args.task in VIDEO else []
    model, r = FastSAM2.from_checkpoint(args.ckpt).eval(), run.start(args, argv)
    changes = {name: vars(args)[name] for name in OPTIONS if vars(args)[name] is not None}
    model = (reconfigured(model, **changes) if changes else model).to(r.device)
    cfg, size = model.cfg, run.numbers("--image-size", args.image_size, "x", 2)
    categories, size = user.data_of(run.read_config(args.ckpt), args.ckpt, len(cfg.classes), size)
    every = [x for of_one in objects.values() for x in of_one]
    embed = net.text_model(cfg, args.ckpt, args.clip, r.device) if any("text" in x for x in every) else None
    if args.task in ("instance", "vis") and not any(cfg.is_thing):
        raise UserError(f"--task {args.task}: {args.ckpt} has no class of things; use another task or checkpoint")
    how = net.How(size, categories, r.dtype, args.clip_length, args.segment_score, args.segment_share, args.top,
                    args.draw_score)  # fmt: skip
    given = [*filter(None, [args.refs, args.videos]), *dict.fromkeys(x["mask"] for x in every if "mask" in x)]

    with results_into(Path(args.out)) as staging:
        (staging / f"{args.task}_overlays").mkdir()
        t = time.perf_counter()
        if videos:
            entries, what = run_videos(args, how, model, videos, objects[None], embed, staging)
        else:
            entries, what = run_images(args, how, model, images, objects, embed, staging)
        if args.task in ("panoptic", "semantic", "vps"):
            entries = files.with_categories(entries, cfg.classes, categories, cfg.is_thing)
        speed = (sum(map(len, videos)) or len(images)) / (time.perf_counter() - t)
        run.write_text_atomic(staging / f"{args.task}.json", json.dumps(entries) + "\n")
        about = {**vars(args), **asdict(cfg), "category_ids": categories, "image_size": size}
        about |= {"videos": {v.video_id: v.name for v in videos}} if videos else {}
        inputs = [*(p for v in videos for p in v.files), *images.values(), *given]
        write_sidecar(staging / f"{args.task}.json", args.ckpt, about, inputs)
    run.finish(r, args, "FastSAM2", f"{args.task}: {what}, {speed:.1f} a second -> {args.out}/{args.task}.json")


if __name__ == "__main__":
    sys.exit(run.cli(main))
