"""Caption pictures with a trained FSGR.  Reads pictures and a checkpoint, never labels.

    python eval/infer_captions.py photo.jpg holiday/ --ckpt runs/fsgr/best --out runs/fsgr/holiday --sheet html
    python eval/infer_captions.py datasets/coco/val2017 --ckpt runs/fsgr/best --out pred --device cuda --batch-size 64
    python eval/infer_captions.py photo.jpg --ckpt runs/fsgr/best --out pred --semantic-map

Writes OUT/captions.json (COCO results, [{"image_id", "caption"}]), captions.json.meta.json and a sheet of the pictures
with their captions: sheet_1.png, ... or one sheet.html. --semantic-map adds IMAGE.semantic.png: the text of the
codebook that each patch was given. image_id is the number where every file is named as in COCO (12 digits at the end),
else the file's name without suffix.
"""

import argparse
import base64
import html
import io
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.caption_checks import draw_patches
from data.caption_vocab import NEVER_SAID, CaptionVocab
from data.coco_captions import ImageReader, open_image
from models.caption_decoding import beam_search, greedy, sample
from models.fsgr import FSGR
from utils import overlay, run
from utils.caption_metrics_other import describe
from utils.output_folder import results_into
from utils.picture_files import find_images
from utils.run import UserError
from utils.weights import write_sidecar

CELL, PER_SHEET, COLUMNS = 320, 24, 6  # px of a picture in a sheet; pictures
HEAD = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>captions</title><style>body {{font: 15px sans-serif}}
figure {{display: inline-block; width: {CELL}px; margin: 8px; vertical-align: top}}</style>
"""
FIGURE = '<figure><img src="{0}" alt="{2}"><figcaption>{1}<br><small>{2}</small></figcaption></figure>'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, or folders of them")
    p.add_argument("--ckpt", required=True, help="checkpoint folder to run with")
    p.add_argument("--out", required=True, help="folder for captions, sheets and maps")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=16, help="items per process and step")
    p.add_argument("--method", default="beam", choices=["beam", "greedy", "sample"], help="how words are chosen")
    p.add_argument("--beam", type=int, default=5, help="beams of --method beam")
    p.add_argument("--max-len", type=int, default=20, help="words of a generated caption, its end included")
    p.add_argument("--top-p", type=float, default=0.9, help="--method sample: words that hold this much probability")
    p.add_argument("--allow-unk", action="store_true", help="let captions say <unk>, as M2 does")
    p.add_argument("--keep-repeats", action="store_true", help="do not shorten 'a a man' to 'a man', as M2 does")
    p.add_argument("--sheet", default="png", choices=["png", "html", "none"], help="pictures with their captions")
    p.add_argument("--semantic-map", action="store_true", help="a picture per image: which text each patch was given")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="caption the first N pictures (0: all)")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- inputs


def check_inputs(args) -> tuple[list[Path], list[int | str]]:
    """Pictures and their ids; UserError before any work is done."""
    run.check_ranges(args, batch_size=(1, 4096), beam=(1, 99), max_len=(2, 999), top_p=(1e-6, 1), limit=(0, 10**9))
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    if (out / "captions.json").exists():
        raise UserError(f"--out {out}: holds captions already; choose a new folder or delete them")
    images = list(find_images(args.images).items())[: args.limit or None]
    return [path for _, path in images], [i for i, _ in images]


# ---- captions


@torch.no_grad()
def caption(model: FSGR, images: torch.Tensor, args, r) -> tuple[list[list[int]], torch.Tensor]:
    """images (B, 3, S, S) -> (token ids of the best caption of each, codebook ids (B, N), empty if there are none)."""
    never = () if args.allow_unk else NEVER_SAID
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        memory, aux = model.encode(images.to(r.device))
        if args.method == "beam":
            found = beam_search(model.decoder, memory, args.beam, args.max_len, never=never)
        elif args.method == "greedy":
            found = greedy(model.decoder, memory, args.max_len, never)
        else:
            found = sample(model.decoder, memory, 1, args.max_len, top_p=args.top_p, never=never)  # global generator
    return found.tokens[:, 0].tolist(), aux.get("index", torch.empty(len(images), 0)).cpu()


def write_sheets(folder: Path, kind: str, paths: list[Path], captions: list[str]) -> None:
    """png: sheets of 24 pictures; html: one page that holds the pictures in itself."""
    figures = []
    for first in range(0, len(paths), PER_SHEET):
        part = list(zip(paths, captions, strict=True))[first : first + PER_SHEET]
        small = [open_image(path) for path, _ in part]
        for image in small:
            image.thumbnail((CELL, CELL))
        if kind == "png":
            sheet = overlay.grid([np.array(x) for x in small], COLUMNS, [text or "(no words)" for _, text in part])
            overlay.save_png(folder / f"sheet_{first // PER_SHEET + 1}.png", sheet)
        for image, (path, text) in zip(small, part, strict=True) if kind == "html" else ():
            image.save(packed := io.BytesIO(), "jpeg", quality=85)
            source = "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
            figures.append(FIGURE.format(source, html.escape(text), html.escape(path.name)))
    if kind == "html":
        run.write_text_atomic(folder / "sheet.html", HEAD + "\n".join(figures) + "\n</html>\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    paths, ids = check_inputs(args)
    model = FSGR.from_checkpoint(args.ckpt).eval()
    cfg, r = model.cfg, run.start(args, argv)
    if args.semantic_map and (cfg.arch == "m2" or not cfg.semantic):
        raise UserError(f"--semantic-map: {args.ckpt} has no semantic head; leave it out or take another checkpoint")
    words = len(cfg.vocab) - (0 if args.allow_unk else len(NEVER_SAID))
    if args.method == "beam" and args.beam > words:
        raise UserError(f"--beam {args.beam}: this model can say {words} words; choose at most that")
    if args.max_len > cfg.max_len:
        raise UserError(f"--max-len {args.max_len}: this model knows {cfg.max_len} positions; choose at most that")
    model, vocab = model.to(r.device), CaptionVocab(cfg.vocab)
    reader = ImageReader(cfg.image_size, cfg.resize, cfg.mean, cfg.std)
    grid = (cfg.image_size // cfg.clip["patch"],) * 2

    # ---- captions: all pictures, before anything is written
    captions, maps, t = [], [], time.perf_counter()
    for first in range(0, len(paths), args.batch_size):
        squares = [reader.square(p) for p in paths[first : first + args.batch_size]]
        tokens, index = caption(model, torch.stack([reader.tensor(s) for s in squares]), args, r)
        captions += [vocab.decode(row, collapse_repeats=not args.keep_repeats) for row in tokens]
        maps += list(index)
    speed = len(paths) / (time.perf_counter() - t)
    for i, text in list(zip(ids, captions, strict=True))[:5]:
        print(f"{i}: {text}")

    # ---- result
    out, results = Path(args.out), [{"image_id": i, "caption": c} for i, c in zip(ids, captions, strict=True)]
    with results_into(out) as staging:
        run.write_text_atomic(staging / "captions.json", json.dumps(results, indent=0) + "\n")
        write_sidecar(staging / "captions.json", args.ckpt, {**asdict(cfg), **vars(args)}, paths)
        if args.sheet != "none":
            write_sheets(staging, args.sheet, paths, captions)
        for path, index in zip(paths, maps, strict=True) if args.semantic_map else ():
            picture = draw_patches(reader.square(path), index.unflatten(0, grid).numpy(), cfg.codebook_names)
            overlay.save_png(staging / f"{path.stem}.semantic.png", picture)
    d, part = describe(captions), ", partial (--limit)" if args.limit else ""
    figures = f"{d['distinct']} distinct, mean length {d['mean length']:.2f} words, {d['empty']} empty"
    result = f"{len(captions)} captions{part}: {figures}, {speed:.1f} images/s -> {out}/captions.json"
    run.finish(r, args, "FSGR", result)


if __name__ == "__main__":
    sys.exit(run.cli(main))
