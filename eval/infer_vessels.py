"""Outline blood vessels in photographs, with the small U-Net or with Sa2VA.  Never opens masks of vessels.

    python eval/infer_vessels.py datasets/chase_db1/images/Image_1[1-4]*.jpg --ckpt runs/unet/best --out runs/unet/test
    python eval/infer_vessels.py photo.png --ckpt weights/sa2va --out pred --text "Please segment the blood vessels." \\
        --policy bf16 --crops 3 --force-seg

Writes NAME.png, the probability of every pixel in 16 bits; NAME.png.meta.json, its provenance and what Sa2VA answered;
NAME.overlay.png, the photograph with the vessels tinted. What --ckpt holds decides which model runs. The U-Net looks at
the field of view alone, estimated from the photograph or read from --fov. A Sa2VA that answers without [SEG] found
nothing: probability 0. --crops N: N x N overlapping crops, each seen at the model's full resolution, all drawn from the
one answer to the whole photograph, blended. A photograph that fails is reported, and the exit code is 1.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.vessel_items import read_image, read_mask
from models.sa2va import Sa2VA
from models.sa2va_lora import WEIGHTS as ADAPTER
from models.sa2va_lora import open_sa2va
from models.sa2va_memory import free_memory, spread
from models.vessel_inference import Found, boxes_of, find_with_sa2va, find_with_unet, read_about
from models.vessel_unet import VesselUNet
from utils import overlay, run
from utils.field_of_view import estimate_fov
from utils.output_folder import results_into
from utils.picture_files import find_images
from utils.probability_files import write_failure, write_probability
from utils.run import UserError
from utils.weights import file_sha256

TINT = overlay.colour(1)
MASK_NAME = re.compile(r"_(1st|2nd)HO$|_manual\d*$|\.(ah|vk)$|_mask$|^mask_")  # of the sets that data/vessels.py reads


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for probabilities, sidecars and overlays")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--policy", default="fp32", choices=["fp32", "bf16", "fp16"],
                   help="Sa2VA: type of the language model's weights; U-Net: autocast type")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument(
        "--fov", default=None, metavar="DIR", help="U-Net: NAME.*, NAME_mask.* or mask_NAME.* of each picture"
    )
    p.add_argument("--tta", action="store_true", help="U-Net: mean over the eight flips and quarter turns")
    p.add_argument("--text", default=None, help="Sa2VA: the question")
    p.add_argument("--force-seg", action="store_true", help='Sa2VA: no generation, the answer is "It is [SEG]."')
    p.add_argument("--max-new-tokens", type=int, default=256, help="Sa2VA: longest answer")
    p.add_argument("--device-map", default="one", choices=["one", "auto"],
                   help="Sa2VA: auto spreads its layers over all GPUs by a plan that is printed first")  # fmt: skip
    p.add_argument("--crops", type=int, default=1, metavar="N", help="N x N overlapping crops (1: the whole picture)")
    p.add_argument(
        "--overlap", type=float, default=0.25, help="share of its side that a crop has in common with the next"
    )
    p.add_argument("--threshold", type=float, default=None,
                   help="the overlay is tinted above this probability (default: the checkpoint's, else 0.5)")  # fmt: skip
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- inputs


def check_inputs(args) -> dict[str, Path]:
    """Pictures by the name of their result; UserError before any work is done."""
    run.check_ranges(args, crops=(1, 64), overlap=(0, 0.9), max_new_tokens=(1, 10**5))
    if args.threshold is not None:
        run.check_ranges(args, threshold=(0, 1))
    out, images = Path(args.out), {}
    for path in find_images(args.images).values():
        stem = Path(path.stem).stem if path.suffix == ".gz" else path.stem
        if MASK_NAME.search(stem):
            raise UserError(
                f"{path}: is named like a mask; name the photographs alone, for instance {path.parent}/*.jpg"
            )
        if stem in images:
            raise UserError(f"{images[stem]} and {path}: both are '{stem}' in the results; rename or leave out one")
        images[stem] = path
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    if out.exists() and any(out.glob("*.png.meta.json")):
        raise UserError(f"--out {out}: holds predictions already; choose a new folder or delete them")
    return images


def find_fov(folder: str, name: str) -> Path:
    """The field of view of picture `name`. CHASE_DB1 calls that of Image_11L mask_11L."""
    wanted = {name, f"{name}_mask", f"mask_{name}", f"mask_{name.removeprefix('Image_')}"}
    found = sorted(p for p in Path(folder).glob("*") if p.stem in wanted)
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file"
        raise UserError(f"--fov {folder}: {what} for picture {name}; expected one of {', '.join(sorted(wanted))}")
    return found[0]


# ---- the two models


def refuse(args, names: list[str], why: str) -> None:
    """UserError for the first of the flags that was given."""
    defaults = vars(parse_args(["x", "--ckpt", "x", "--out", "x"]))
    for name in names:
        if getattr(args, name) != defaults[name]:
            raise UserError(f"--{name.replace('_', '-')}: {why}; leave it out")


def open_unet(args, r, names: list[str]) -> Callable[[str, np.ndarray], Found]:
    """What finds vessels in (name, picture uint8 (H, W, 3))."""
    refuse(
        args, ["text", "force_seg", "max_new_tokens", "device_map"], f"{args.ckpt} is a U-Net, small and without text"
    )
    fovs = {name: find_fov(args.fov, name) for name in names} if args.fov else {}
    model = VesselUNet.from_checkpoint(args.ckpt).to(r.device)

    def find(name: str, image: np.ndarray) -> Found:
        fov = read_mask(fovs[name], image.shape[:2], name) if args.fov else estimate_fov(image)
        return find_with_unet(model, image, fov, boxes_of(image, args.crops, args.overlap), args.tta, r.dtype)

    return find


def open_language_model(args, r) -> Callable[[str, np.ndarray], Found]:
    """What finds in (name, picture uint8 (H, W, 3)) what --text asks for."""
    refuse(args, ["fov", "tta"], f"{args.ckpt} is a Sa2VA, which has no such step")
    if not args.text:
        raise UserError(f"--text: {args.ckpt} is a Sa2VA and needs a question, as 'Please segment the blood vessels.'")
    if args.device_map == "one":
        model = open_sa2va(args.ckpt, args.policy).to(r.device)
    elif r.device.type != "cuda" or args.device not in ("auto", "cuda"):
        raise UserError(f"--device-map auto: spreads over all GPUs, this run is on {r.device}; use --device cuda")
    elif (Path(args.ckpt) / ADAPTER).is_file():
        raise UserError(f"--device-map auto: {args.ckpt} is an adapter; take a complete folder, as the merged one")
    else:
        free, say = free_memory(r.device.type), partial(run.say, r)
        model = Sa2VA.from_checkpoint(args.ckpt, args.policy, lambda empty: spread(empty, free, say))

    def find(name: str, image: np.ndarray) -> Found:
        return find_with_sa2va(
            model, image, args.text, boxes_of(image, args.crops, args.overlap), args.force_seg, args.max_new_tokens
        )

    return find


# ---- results


def provenance(args, kind: str, config: dict, weights: Path) -> dict:
    """What every sidecar says about the model; `probability_files` adds command, commit and time."""
    known = {"kind": kind, "checkpoint": args.ckpt, "checkpoint_sha256": file_sha256(weights), "text": args.text}
    known |= {key: config.get(key) for key in ("threshold", "train_images")}  # null where the checkpoint does not say
    return known | {"config": {k: v for k, v in config.items() if k not in known} | {"flags": vars(args)}}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images = check_inputs(args)
    kind, config, weights = read_about(args.ckpt)
    args.dtype = args.policy if kind == "vessel_unet" else "fp32"
    refuse(args, ["overlap"] if args.crops == 1 else [], "has no effect without --crops")
    r = run.start(args, argv)
    find = open_unet(args, r, list(images)) if kind == "vessel_unet" else open_language_model(args, r)
    about = provenance(args, kind, config, weights)
    level = next(x for x in (args.threshold, about["threshold"], 0.5) if x is not None)

    # ---- pictures
    out, failed, t = Path(args.out), [], time.perf_counter()
    with results_into(out) as staging:
        for name, path in images.items():
            meta = about | {"image": str(path), "image_sha256": file_sha256(path), "answer": None, "grid": None}
            try:
                image = read_image(path)
                found = find(name, image)
                if not np.isfinite(found.prob).all():
                    raise UserError(f"{path}: the model's probabilities are not finite; try --policy fp32")
            except (UserError, torch.OutOfMemoryError) as e:
                failed.append(name)
                write_failure(staging, name, str(e), meta)
                print(f"failed: {name}: {e}", file=sys.stderr)
                continue
            write_probability(staging, name, found.prob, meta | {"answer": found.answer, "grid": found.grid})
            tinted = overlay.mask(image, found.prob > level, TINT, alpha=0.6, outline=False)
            overlay.save_png(staging / f"{name}.overlay.png", tinted)
            said = "" if found.answer is None else f" | {found.answer}"
            print(f"{name}: {np.mean(found.prob > level):.1%} above {level:g}{said}", flush=True)
    speed = (time.perf_counter() - t) / len(images)
    lost = f", {len(failed)} failed: {', '.join(failed[:8])}" if failed else ""
    run.finish(r, args, "Sa2VA", f"{kind}: {len(images)} pictures{lost}, {speed:.2f} s each -> {out}")
    if failed:
        print(f"error: {len(failed)} of {len(images)} pictures failed; their sidecars say why", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run.cli(main))
