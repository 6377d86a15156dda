"""Overfit one batch: if TempoPeak cannot drive the loss from ln 64 = 4.16 to 0 on four clips, nothing else can work.

python smoke/overfit_tempopeak.py                 # 4.16 -> < 0.01 and acc 1.0, about a minute on a CPU
python smoke/overfit_tempopeak.py --device cuda --dtype bf16 --encoder resnet18 --size 112

The batch is made once, before the loop; targets are hard, so the loss can reach 0. [notes: 4.15 -> 0.00, acc 1.0]
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.mamba2 import describe_impl
from models.tempopeak import ENCODERS, HEADS, TempoPeak, TempoPeakConfig, peak_loss, peak_targets
from utils import run
from utils.run import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--steps", type=int, default=120, help="most optimizer steps; stops early below --target")
    p.add_argument("--target", type=float, default=0.01, help="loss that counts as overfitted")
    p.add_argument("--encoder", default="resnet18", choices=ENCODERS, help="tiny: three blocks, for laptops")
    p.add_argument("--head", default="bimamba2", choices=HEADS, help="head over time")
    p.add_argument("--size", type=int, default=48, help="pixels to each side of a frame")
    p.add_argument("--lr", type=float, default=5e-4, help="constant learning rate")
    p.add_argument("--impl", default="auto", choices=["auto", "torch", "reference", "mamba_ssm"],
                   help="Mamba2 implementation: auto takes the CUDA kernels where they import, else torch")  # fmt: skip
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(args, argv)

    # ---- data: one batch, made once; noise that differs from frame to frame, a peak drawn per clip
    B, T, S = args.batch_size, 64, args.size
    frames = torch.randint(0, 256, (B, T, 3, S, S), dtype=torch.uint8).to(r.device)
    peak = torch.randint(0, T, (B,)).to(r.device)
    target = peak_targets(peak, peak, peak, T, "hard", 1.0, no_peak=False)  # (B, T)

    # ---- model, optimizer
    model = TempoPeak(TempoPeakConfig(encoder=args.encoder, head=args.head, size=[S, S]), impl=args.impl).to(r.device)
    print(f"# {describe_impl(args.impl, r.device)}")
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    print(f"# first loss should be ln({T}) = {math.log(T):.3f}")

    # ---- loop
    first = None
    for step in range(1, args.steps + 1):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            logits = model(frames)
        loss = peak_loss(logits, target)
        opt.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        value, acc = loss.item(), (logits.argmax(1) == peak).float().mean().item()
        first = value if first is None else first
        if step % 10 == 0 or step == 1 or value < args.target:
            print(f"step {step:4d} | loss {value:.4f} | acc {acc:.2f}", flush=True)
        if value < args.target:
            break

    # ---- result
    result = f"loss {first:.3f} -> {value:.4f}, acc {acc:.2f} in {step} steps"
    run.finish(r, args, "TempoPeak", result)
    if value >= args.target or acc < 1:
        raise UserError(f"did not overfit: {result}, wanted loss < {args.target}, acc 1; try another --lr or --steps")


if __name__ == "__main__":
    sys.exit(run.cli(main))
