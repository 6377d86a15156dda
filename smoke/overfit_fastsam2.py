"""Overfit one batch of rendered shapes with a random ResNet-18: each task to the bar of its figure.

python smoke/overfit_fastsam2.py                                   # panoptic, 2 pictures of 256 px, minutes on a CPU
python smoke/overfit_fastsam2.py --task interactive                # points, boxes, masks: IoU of clicks and of boxes
python smoke/overfit_fastsam2.py --task referring                  # every sentence to its own object
python smoke/overfit_fastsam2.py --task instance --dtype bf16 --device cuda

The batch is made once, before the loop. Words are hashed, not understood: this is about the network, not about text.
Bars: PQ 95, AP 90, mIoU 90, IoU of clicks and of boxes 90, right objects 95; all in percent, of the trained batch.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.moving_shapes import MovingShapes
from data.segment_batch import Prompts, SegmentCollate, SegmentItems, View
from models.fastsam2 import FastSAM2, FastSAM2Config, build_vocabulary, hash_texts
from models.prompt_fusion import PROMPT_TASKS, PromptBatch
from models.segment_losses import segment_losses
from models.segment_scores import NAMES, BatchScores
from utils import run
from utils.run import UserError

BARS = {"panoptic": 95, "instance": 90, "semantic": 90, "interactive": 90, "referring": 95}  # percent
E = 64  # width of the class and text embeddings
embed = functools.partial(hash_texts, width=E)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--task", default="panoptic", choices=list(BARS), help="what is overfitted")
    p.add_argument("--size", type=int, default=256, help="side of the pictures in px")
    p.add_argument("--dim", type=int, default=128, help="width of features and queries")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=2, help="items per process and step")
    p.add_argument("--steps", type=int, default=300, help="optimizer steps")
    p.add_argument("--lr", type=float, default=1e-3, help="highest learning rate; falls to 0 along a cosine")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def make_batch(source: MovingShapes, task: str, n: int, size: int, seed: int) -> dict:
    """n pictures with at least two targets each, as one batch."""
    prompts = Prompts(number=12, kinds={"point": 0.4, "box": 0.4, "mask": 0.2})
    items = SegmentItems(source, task, View(size, size), prompts, seed, all_sentences=True)
    rich = (item for item in map(items.__getitem__, range(len(items))) if len(set(item["ids"].tolist())) > 1)
    found = list(itertools.islice(rich, n))
    if len(found) < n:
        raise UserError(
            f"--size {size}: only {len(found)} of {len(items)} pictures show two targets; take a larger one"
        )
    return SegmentCollate()(found)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, size=(32, 4096), dim=(16, 1024), batch_size=(1, 64), steps=(1, 10**6), lr=(1e-8, 1.0))
    r = run.start(args, argv)

    # ---- data: one batch, made once
    source = MovingShapes(20 * args.batch_size, args.seed, args.size)
    batch = make_batch(source, args.task, args.batch_size, args.size, args.seed)
    prompted = args.task in PROMPT_TASKS
    prompts = PromptBatch.of(batch, embed).to(r.device) if prompted else None
    for k, v in batch.items():
        if isinstance(v, torch.Tensor):
            batch[k] = v.to(r.device)
        elif isinstance(v[0], torch.Tensor):
            batch[k] = [x.to(r.device) for x in v]

    # ---- model, optimizer
    sizes = {"queries": 30, "dim": args.dim, "hidden": 4 * args.dim, "embed_dim": E}
    model = FastSAM2(FastSAM2Config(backbone="resnet18", frozen_norm=False, **sizes)).to(r.device)
    model.set_vocabulary(source.classes, build_vocabulary(source.classes, embed, ("{}",)), source.is_thing, "hash")
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    falls = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, args.steps, pct_start=0.1, cycle_momentum=False)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    print(f"# {args.batch_size} pictures of {args.size} px, {sum(map(len, batch['masks']))} targets")

    # ---- loop
    first = None
    for step in range(1, args.steps + 1):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            losses = segment_losses(model(batch["image"], prompts, task=args.task), batch, points=4096)
        opt.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        falls.step()
        if step % 25 == 0 or step == 1:
            values = {k: v.item() for k, v in losses.items()}
            first = first or values["loss"]
            print(f"step {step:4d} | " + " | ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)

    # ---- result
    model.eval()
    with torch.no_grad(), torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = model(batch["image"], prompts, task=args.task)
    scores = BatchScores(args.task, source.is_thing)
    scores.add(out, batch)
    score, figures = scores.score(), ""
    if args.task == "interactive":
        kinds = {kind: 100 * float(np.mean(ious)) for kind, ious in scores.by_kind.items()}
        score, each = min(kinds.values()), " and ".join(f"{kind} {v:.1f}" for kind, v in kinds.items())
        figures = f" of {each}, the worse"
    loss = f"loss {first:.1f} -> {losses['loss'].item():.2f} in {args.steps} steps"
    result = f"{args.task}: {loss}, {NAMES[args.task]}{figures} {score:.1f}"
    run.finish(r, args, "FastSAM2", result)
    if not score >= BARS[args.task]:
        raise UserError(f"did not overfit: {result}; wanted {BARS[args.task]}; try more --steps or another --lr")


if __name__ == "__main__":
    sys.exit(run.cli(main))
