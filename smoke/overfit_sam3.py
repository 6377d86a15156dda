"""Overfit one batch: if the tiny SAM3 cannot learn four rendered pictures by heart, it will learn nothing else.

python smoke/overfit_sam3.py                        # every ball and racket found, IoU > 0.7, about a minute on a CPU
python smoke/overfit_sam3.py --part tracker         # and followed through two clips of four frames
python smoke/overfit_sam3.py --device cuda --dtype bf16

The batch is made once, before the loop, and there is no dropout, so the loss can reach 0. Each picture is asked for the
ball and the racket, and one of them lacks both.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Sam3VideoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rendered_ball import TARGETS, RenderedBall
from models.mask_losses import mask_iou
from models.sam3_losses import (
    best_masks,
    detect_pairs,
    detection_losses,
    follow_clip,
    followed_masks,
    tracking_losses,
)
from models.sam3_tiny import picture_processors, tiny_config, tiny_tokenizer
from utils import run
from utils.run import UserError

FRAMES, THRESHOLD = 4, 0.25  # of a clip to follow; score of a detection


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--part", default="detector", choices=["detector", "tracker"], help="what is trained")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--steps", type=int, default=300, help="most optimizer steps; stops early below --target")
    p.add_argument(
        "--target",
        type=float,
        default=0.18,
        help="dice loss that counts as overfitted; cells half covered keep it over 0.16",
    )
    p.add_argument("--lr", type=float, default=1e-3, help="constant learning rate")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def read_batch(args, r) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, S, S) in -1..1 and masks (B, 2, H, W) bool; the last picture has neither ball nor racket. For
    the tracker half as many clips: (B, T, 3, S, S), (B, T, 2, H, W)."""
    full, empty = RenderedBall(args.seed, absent=0, hiding=0), RenderedBall(args.seed, absent=1)
    if args.part == "tracker":
        shown = [full.clip(i, FRAMES) for i in range(max(1, args.batch_size // 2))]
    else:
        shown = [full.clip(i, 1) for i in range(args.batch_size - 1)] + [empty.clip(0, 1)]
    frames = torch.from_numpy(np.concatenate([x["frames"] for x in shown])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([np.stack([x["masks"][name] for name in TARGETS], 1) for x in shown]))
    pictures, _ = picture_processors(tiny_config(tiny_tokenizer()).image_size)
    pixels = pictures(images=frames, return_tensors="pt")["pixel_values"].to(r.device)
    pixels, masks = pixels.reshape(len(shown), -1, *pixels.shape[1:]), masks.to(r.device)
    return (pixels, masks) if args.part == "tracker" else (pixels[:, 0], masks[:, 0])


def ask(model, pixels: torch.Tensor):
    """The detector's answer to both names, picture-major."""
    tokens = tiny_tokenizer()(list(TARGETS), padding="max_length", return_tensors="pt").to(pixels.device)
    tokens = {k: tokens[k] for k in ("input_ids", "attention_mask")}
    texts = torch.arange(len(TARGETS), device=pixels.device).expand(len(pixels), -1)
    return detect_pairs(model.detector_model, pixels, tokens, texts)


def follow(model, pixels: torch.Tensor, masks: torch.Tensor):
    """The tracker's answer for every target of every clip, and their masks (T - 1, R, H, W)."""
    B, T = pixels.shape[:2]
    tokens = model.detector_model.vision_encoder.backbone(pixels.flatten(0, 1)).last_hidden_state
    clip = torch.arange(B, device=pixels.device).repeat_interleave(len(TARGETS))
    objects = masks.transpose(1, 2).flatten(0, 1)  # (R, T, H, W)
    found = follow_clip(model, tokens.reshape(B, T, *tokens.shape[1:]), clip, objects[:, 0])
    return found, objects[:, 1:].transpose(0, 1)


def batch_losses(model, args, pixels: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, dict]:
    if args.part == "tracker":
        return tracking_losses(*follow(model, pixels, masks))
    return detection_losses(ask(model, pixels), [m[None] if m.any() else m[None][:0] for m in masks.flatten(0, 1)])


@torch.no_grad()
def judge(model, args, pixels: torch.Tensor, masks: torch.Tensor) -> tuple[float, int, int]:
    """Mean IoU of what is to be seen, 0 where nothing is found; and how many of so many absent ones stay unseen."""
    if args.part == "tracker":
        found, truth = follow(model, pixels, masks)
        said, truth = followed_masks(found, truth.shape[-2:]).flatten(0, 1), truth.flatten(0, 1)
    else:
        said, truth = best_masks(ask(model, pixels), masks.shape[-2:], THRESHOLD), masks.flatten(0, 1)
    present = truth.any(2).any(1)
    return mask_iou(said[present] * 1.0, truth[present]).mean().item(), *count_empty(said[~present])


def count_empty(masks: torch.Tensor) -> tuple[int, int]:
    """masks (n, H, W) bool -> how many are empty, n."""
    return int((~masks.flatten(1).any(1)).sum()), len(masks)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, batch_size=(2, 10**4), steps=(1, 10**6), lr=(1e-8, 1e-2), target=(0, 10))
    r = run.start(args, argv)

    # ---- data: one batch, made once
    pixels, masks = read_batch(args, r)

    # ---- model, optimizer
    model = Sam3VideoModel(tiny_config(tiny_tokenizer())).to(r.device).eval()  # no dropout
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    scaler, first = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16), None
    print("# first dice loss should be about 1: a mask of logits around 0 covers everything and so nothing")

    # ---- loop
    for step in range(1, args.steps + 1):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            loss, parts = batch_losses(model, args, pixels, masks)
        opt.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        value = parts["dice"].item()
        first = value if first is None else first
        if step % 20 == 0 or step == 1 or value < args.target:
            print(f"step {step:4d} | loss {loss.item():.3f} | dice {value:.4f}", flush=True)
        if value < args.target:
            break

    # ---- result
    iou, unseen, absent = judge(model, args, pixels, masks)
    result = f"{args.part}: dice loss {first:.3f} -> {value:.3f} in {step} steps, IoU {iou:.3f}"
    result += f", {unseen}/{absent} absent ones unseen" if absent else ""
    run.finish(r, args, "SAM3", result)
    if iou < 0.7 or unseen < absent:
        raise UserError(f"did not overfit: {result}; wanted IoU 0.7 and no answer for what is absent")


if __name__ == "__main__":
    sys.exit(run.cli(main))
