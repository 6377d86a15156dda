"""Overfit one batch of single views, or one clip of 8 frames with memory and merging, to AP50 = 1.

python smoke/overfit_esam.py                      # two single views of rendered rooms, 1 minute of a CPU core
python smoke/overfit_esam.py --stage mv           # a clip, merged online and compared with all its points: 3 minutes
python smoke/overfit_esam.py --stage mv --route bif --network full --points 20000 --device cuda --dtype bf16

The batch is rendered once, before the loop, with exact superpoints. AP50 is of things by class, on the trained batch.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.esam_items import room_items
from data.rgbd_frames import Augmentation
from models.bifusion import random_patch_weights
from models.esam import ESAM, ROUTES, STAGES, ESAMConfig
from models.esam_losses import ESAMCriterion, clip_loss
from models.esam_training import make_groups
from models.res16unet import Res16UNetConfig
from models.scene_validation import evaluate
from utils import run, schedules
from utils.run import UserError

SMALL = {
    "backbone": Res16UNetConfig(planes=(16, 32, 48, 64, 64, 48, 32, 32), layers=(1,) * 8),
    "voxel": 0.05, "dim": 128, "ffn": 256, "merge_hidden": 128,
}  # fmt: skip
STEPS = {"sv": 250, "mv": 100}  # the slow batch norms need so many: 8 frames are 8 updates of their statistics
LEAST = {"small": 20, "full": 100}  # points of an instance that counts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--route", default="3d", choices=ROUTES, help="3dtsa: with Tiny-SA; bif: with the picture besides")
    p.add_argument("--stage", default="sv", choices=STAGES, help="sv: single views; mv: clips with memory and merging")
    p.add_argument("--network", default="small", choices=["small", "full"], help="full: the published sizes")
    p.add_argument("--points", type=int, default=2000, help="of a frame")
    p.add_argument("--frames", type=int, default=8, help="mv: frames of the clip")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=None, help="items per process and step")
    p.add_argument("--steps", type=int, default=None, help="optimizer steps (default: sv 250, mv 100)")
    p.add_argument("--lr", type=float, default=2e-3, help="highest learning rate; falls to 0 along a cosine")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.steps = STEPS[args.stage] if args.steps is None else args.steps
    args.batch_size = (2 if args.stage == "sv" else 1) if args.batch_size is None else args.batch_size
    run.check_ranges(args, points=(100, 10**6), frames=(2, 100), batch_size=(1, 64), steps=(1, 10**6), lr=(1e-8, 1e-2))
    r = run.start(args, argv)

    # ---- data: one batch, made once
    B, frames = args.batch_size, args.frames if args.stage == "mv" else 1
    kinds = {"pictures": args.route == "bif", "augment": Augmentation(), "exact": True, "objects": (4, 6)}
    items, _, classes = room_items(B, 1, frames, args.points, args.seed, overfit=B, **kinds)
    batch = [items[k] for k in range(B)]
    clips, labels = ([[x.to(r.device) for x in item[i]] for item in batch] for i in (0, 1))

    # ---- model, optimizer
    sizes = SMALL if args.network == "small" else {}
    model = ESAM(ESAMConfig(classes, route=args.route, stage=args.stage, **sizes))
    if model.bi_encoder is not None:
        random_patch_weights(model.bi_encoder.image, args.seed)
    model.to(r.device)
    criterion = ESAMCriterion(len(classes), model.cfg.n_stuff)
    opt = torch.optim.AdamW(make_groups(model, 0.01), lr=args.lr)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    things = sum(len(x[0].classes) for x in labels)
    print(f"# {B} items of {frames} frames of {args.points} points, {things} things", flush=True)

    # ---- loop
    first = None
    for step in range(args.steps):
        for group in opt.param_groups:
            group["lr"] = schedules.cosine(step, args.steps, args.lr, args.steps // 10) * group["factor"]
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            outputs = model(clips)
        losses = clip_loss(outputs, clips, labels, criterion)
        opt.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(opt)
        scaler.update()
        if (step + 1) % 25 == 0 or step == 0:
            values = {k: v.item() for k, v in losses.items()}
            first = first or values["loss"]
            print(f"step {step + 1:4d} | " + " | ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)

    # ---- result
    scores, n, _ = evaluate(model, batch, LEAST[args.network], dtype=r.dtype)
    found = scores["classes"]
    loss = f"loss {first:.1f} -> {losses['loss'].item():.2f} in {args.steps} steps"
    figures = f"AP50 {found['AP50']:.3f}, AP {found['AP']:.3f}"
    result = f"{args.route} {args.stage}, {n} items of {frames} frames: {loss}, {figures}"
    run.finish(r, args, "ESAM", result)
    if not found["AP50"] == 1:
        raise UserError(f"did not overfit: {result}; wanted AP50 1; try more --steps or another --lr")


if __name__ == "__main__":
    sys.exit(run.cli(main))
