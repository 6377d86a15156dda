"""Train the small U-Net that every larger vessel model is compared with (the Sa2VA notes, section 11.4).

python train/train_vessel_unet.py --data datasets/chase_db1 --out runs/unet  # about 7 minutes on one core, Dice 0.81
python train/train_vessel_unet.py --data datasets/chase_db1 --val 09,10 --out runs/unet_tuning      # to compare recipes
torchrun --nproc_per_node=8 train/train_vessel_unet.py --data datasets/fives --patch-size 512 --dtype bf16 --workers 8 \\
    --widths 32,64,128,256 --steps 20000 --out runs/unet_fives

ROOT is a set in its owner's layout, or a manifest.jsonl (data/vessels.py). Only pictures of its training split are read;
CHASE_DB1's are children 1-10. --val keeps patients of the training split for validation: their Dice chooses `best` and
the threshold. Without it the threshold is chosen on the training pictures, and `best` is the last checkpoint. The
checkpoint holds averaged weights, the threshold, and name and hash of every picture it was trained on.
"""

import argparse
import gc
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.vessel_items import VesselItem
from data.vessels import FORMATS, VesselPatches, open_vessels
from models.vessel_unet import VesselUNet, VesselUNetConfig, WeightAverage, cldice_loss, standardised, vessel_losses
from utils import overlay, run, schedules
from utils.plots import curves
from utils.run import UserError
from utils.training_guards import LossGuard, check_changed, check_rate
from utils.weights import file_sha256

THRESHOLDS = np.arange(5, 96) / 100  # among which the checkpoint's own is chosen
SHOWN, SIDE = 6, 480  # pictures in val.png, and px of the middle of each


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/vessel_unet", help="run folder: checkpoints, metrics.jsonl, curves.png")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--steps", type=int, default=3000, help="optimizer steps in all, a resumed part included")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=8, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=100, help="steps between printed lines")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--val-every", type=int, default=1500, help="steps between validations, each with a checkpoint")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, metavar="ROOT", help="folder of a vessel set, or a manifest.jsonl")
    g.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="layout of --data")
    g.add_argument("--split-at", type=int, default=None, metavar="N",
                   help="chase, stare, hrf: last number that is for training (default: the set's own)")  # fmt: skip
    g.add_argument("--val", default="", metavar="P,P,..", help="patients of the training split kept for validation")
    g.add_argument("--polygons", action="store_true", help="manifest: accept polygons, and measure what they hide")
    g.add_argument("--patch-size", type=int, default=160, help="px of a side of the training patches")
    g.add_argument("--no-turns", action="store_true", help="patches are not flipped and turned")
    g.add_argument("--contrast", type=float, default=1.25, help="grey levels are spread by a factor of 1/C..C (1: off)")
    g.add_argument("--light", type=float, default=0.5, help="grey levels move by up to so many deviations (0: off)")
    g = p.add_argument_group("model")
    g.add_argument("--widths", default="16,32,64", help="channels at 1/2, 1/4, 1/8, ... of the picture's side")
    g.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights; 0: the last weights")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--dice", type=float, default=1.0, help="weight of the dice loss beside binary cross-entropy")
    g.add_argument("--cldice", type=float, default=0.0, help="weight of the soft-clDice loss")
    g.add_argument("--lr", type=float, default=8e-3, help="peak learning rate; cosine to 0")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear rise before the cosine")
    g.add_argument("--weight-decay", type=float, default=0.01, help="AdamW decay of kernels")
    g.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm is clipped here")
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = {"out", "resume", "stop_at", "log", "workers", "print_every", "save_every", "device", "data", "init"}


def check_flags(args) -> list[int]:
    """--widths as numbers; UserError for what no run can have, before anything is written."""
    counts = "steps batch_size accum print_every save_every val_every".split()
    run.check_ranges(args, **dict.fromkeys(counts, (1, 10**9)), workers=(0, 256), overfit=(0, 10**9))
    run.check_ranges(args, patch_size=(8, 8192), ema=(0, 0.99999), dice=(0, 100), cldice=(0, 100), lr=(1e-7, 1e-2))
    run.check_ranges(args, warmup=(0, 10**9), weight_decay=(0, 10), clip_grad=(1e-6, 1e6))
    run.check_ranges(args, contrast=(1, 10), light=(0, 10))
    if args.stop_at is not None and args.stop_at < 0:
        raise UserError(f"--stop-at {args.stop_at}: expected 0 or more steps")
    if args.val and args.overfit:
        raise UserError("--val: --overfit trains and evaluates on the same pictures; leave one of them out")
    widths = run.numbers("--widths", args.widths, ",", args.widths.count(",") + 1)
    if min(widths) < 1 or len(widths) > 6:
        raise UserError(f"--widths {args.widths}: expected one to six numbers of channels, each 1 or more")
    return widths


def load_items(args, r) -> tuple[list[VesselItem], list[VesselItem]]:
    """Pictures to train on, and those to validate on: of --val, else the training pictures themselves."""
    vessels = open_vessels(args.data, args.format, args.split_at, [x for x in args.val.split(",") if x], args.polygons)
    for note in vessels.notes:
        run.say(r, f"# {note}")
    train = vessels.split("train")[: args.overfit or None]
    val = vessels.split("val") if "val" in vessels.splits and not args.overfit else train
    held = f"{len(val)} of other patients to validate on" if val is not train else "none held out: validated on these"
    run.say(r, f"# {vessels.name}: {len(train)} pictures to train on, {held}")
    return train, val


def make_model(args, widths: list[int], train: list[VesselItem]) -> VesselUNet:
    """The checkpoint's model, or a new one; it will know the pictures of this training, and those of --init's."""
    model = VesselUNet.from_checkpoint(args.resume or args.init) if args.resume or args.init else None
    if model is None:
        model = VesselUNet(VesselUNetConfig(widths))
    elif model.cfg.widths != widths:
        said = ",".join(map(str, model.cfg.widths))
        raise UserError(f"--widths {args.widths}: {args.resume or args.init} has {said}; repeat that")
    seen = {x["sha256"]: x for x in model.cfg.train_images}
    seen |= {x["sha256"]: x for x in ({"name": i.name, "sha256": file_sha256(i.image_path)} for i in train)}
    model.cfg.train_images = list(seen.values())
    return model


def losses(net, batch: dict, args, r) -> tuple[torch.Tensor, dict]:
    """The weighted sum, and its detached parts."""
    image, truth, fov, mean, std = (
        batch[k].to(r.device, non_blocking=True) for k in ("image", "mask", "fov", "mean", "std")
    )
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        logits = net(standardised(image, fov, mean, std))
    values = vessel_losses(logits, truth, fov)
    loss = values["bce"] + args.dice * values["dice"]
    if args.cldice:
        values["cldice"] = cldice_loss(logits, truth, fov)
        loss = loss + args.cldice * values["cldice"]
    return loss, {"loss": loss.detach(), **{k: v.detach() for k, v in values.items()}}


def dice_curve(prob: np.ndarray, truth: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """Dice inside fov of `prob > threshold` for each of THRESHOLDS."""
    p, t = prob[fov], truth[fov]
    hits = np.array([np.count_nonzero(p[t] > x) for x in THRESHOLDS])
    found = np.array([np.count_nonzero(p > x) for x in THRESHOLDS])
    return 2 * hits / np.maximum(found + t.sum(), 1)


def validate(model: VesselUNet, items: list[VesselItem], r) -> tuple[dict, list[np.ndarray]]:
    """Mean Dice of whole pictures at 0.5 and at the best common threshold, and the first pictures with their errors."""
    found, shown = [], []
    for x in items:
        x = x.load()
        prob = model.predict(x["image"], x["fov"], dtype=r.dtype)
        found.append(dice_curve(prob, x["mask"], x["fov"]))
        if len(shown) < SHOWN:
            shown.append(draw_errors(x, prob > 0.5))
    mean = np.mean(found, 0)  # over the pictures, one per threshold
    best = int(mean.argmax())
    values = {"dice_at_half": mean[np.searchsorted(THRESHOLDS, 0.5)], "dice_at_chosen": mean[best]}
    return {k: float(v) for k, v in values.items()} | {"threshold": float(THRESHOLDS[best]), "n": len(items)}, shown


def draw_errors(x: dict, pred: np.ndarray) -> np.ndarray:
    """The middle of a picture, beside itself with vessels found (green), missed (blue) and invented (red)."""
    H, W = pred.shape
    part = np.s_[max(0, (H - SIDE) // 2) :, max(0, (W - SIDE) // 2) :]
    image, pred, truth = (a[part][:SIDE, :SIDE] for a in (x["image"], pred & x["fov"], x["mask"] & x["fov"]))
    errors = image
    for where, k in ((pred & truth, 3), (truth & ~pred, 1), (pred & ~truth, 2)):
        errors = overlay.mask(errors, where, overlay.colour(k), alpha=0.75, outline=False)
    return np.concatenate([image, errors], 1)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    widths = check_flags(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)

    # ---- data, model
    train, val = load_items(args, r)
    model = make_model(args, widths, train).to(r.device)
    train_set = VesselPatches(
        train, args.patch_size, args.seed, turns=not args.no_turns, contrast=args.contrast, light=args.light
    )

    # ---- optimizer
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # BatchNorm and biases do not decay
    groups = [{"params": kernels, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    opt, params = torch.optim.AdamW(groups, lr=args.lr), [*kernels, *others]
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    average = WeightAverage(model, args.ema)
    step, best = 0, -math.inf
    if args.resume:
        state = run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE)
        model.load_state_dict(state["weights"])  # the checkpoint itself holds the average of them
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
    stop = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    out = run.open_folder(r, args, anew)
    if r.main:
        run.rewind_metrics(out, step)
    model.train()
    net = model
    if r.ddp:  # each rank normalises its own patches, as --accum does; rank 0's statistics are saved
        ids = [r.device.index] if r.device.type == "cuda" else None
        net = DDP(model, device_ids=ids, broadcast_buffers=False)
    batches = run.StepBatches(len(train_set), args.batch_size, step, stop, args.seed, r.rank, r.world, args.accum)
    load = {"num_workers": args.workers, "worker_init_fn": run.ignore_sigterm, "pin_memory": r.device.type == "cuda"}
    loader = iter(DataLoader(train_set, batch_sampler=batches, **load))
    run.say(
        r, f"# {sum(p.numel() for p in params):,} parameters | {args.batch_size * args.accum * r.world} patches a step"
    )
    if not (args.resume or args.init):
        run.say(r, "# first loss should be about ln 2 = 0.69 for bce and 0.8 for dice: probability 1/2 everywhere")

    def save(is_best: bool = False) -> None:
        if r.main:
            if not all(p.isfinite().all() for p in params):
                raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
            state = {"optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "weights": model.state_dict()}
            state |= {"best": best, "args": vars(args), "world": r.world}
            run.save_checkpoint(out, step, average.model, average.model.config_dict(), state, best=is_best)

    # ---- loop
    run.watch_sigterm(r)
    guard, values = LossGuard(out, rank=r.rank), {}
    bar = tqdm(total=args.steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    began, since, saved = time.perf_counter(), step, step if args.resume else -1
    while step < stop and not run.should_stop(r):
        lr = check_rate(schedules.cosine(step, args.steps, args.lr, args.warmup), step)
        for group in opt.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in params] if step == 0 else None
        total: dict = {}
        for a in range(args.accum):
            batch = next(loader)
            with net.no_sync() if r.ddp and a < args.accum - 1 else nullcontext():
                loss, parts = losses(net, batch, args, r)
                scaler.scale(loss / args.accum).backward()
            total = {k: total.get(k, 0.0) + v / args.accum for k, v in parts.items()}
            warning = guard.note(step + 1, loss.detach(), batch)
            if warning:
                run.say(r, warning)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip_grad)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        average.update(model, step)
        step += 1
        bar.update()
        if before is not None and not scaler.is_enabled():
            check_changed(before, params, step)
        if step % args.print_every == 0 or step == 1:  # .item() waits for the GPU, so only here
            means = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=r.device) for v in total.values()])
            if r.ddp:
                dist.all_reduce(means)
            shown = dict(zip(total, (means / r.world).tolist(), strict=True))
            speed = (step - since) * args.batch_size * args.accum * r.world / (time.perf_counter() - began)
            run.report(r, out, step, args.steps, **shown, lr=lr, grad=norm.item(), items_per_s=speed)
            began, since = time.perf_counter(), step
        if step % args.val_every == 0 or step == args.steps:
            guard.check()
            better = False
            if r.main:
                values, pictures = validate(average.model, val, r)
                average.model.cfg.threshold = values["threshold"]
                run.report(r, out, step, args.steps, **values)
                overlay.save_png(out / "val.png", overlay.grid(pictures, 2))
                better = val is train or values["dice_at_half"] > best
                best = values["dice_at_half"] if better else best
            save(better)
            saved, began, since = step, time.perf_counter(), step
        elif step % args.save_every == 0:
            guard.check()
            save()
            saved = step
    bar.close()
    guard.check()

    # ---- result
    if saved != step:
        save()
    if r.main and run.read_metrics(out):
        run.write_metrics_csv(out)
        curves(out / "metrics.jsonl", out / "curves.png")
    if r.stop_asked:
        run.say(r, f"# SIGTERM: saved step {step} in {out}/last; continue with --resume {out}/last")
    del net  # DDP holds the process group; freed after it, its destructor can wait for ever for gloo's thread
    gc.collect()
    where = "training pictures" if val is train else "validation pictures"
    last = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
    run.finish(r, args, "Sa2VA", f"vessel U-Net, step {step}, {where}: {last or 'not validated'}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
