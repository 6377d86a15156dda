"""Train TempoPeak: the peak frame of a clip (PEAK) or the events of a video (SPOT).

python train/train.py --out runs/peak                        # rendered rallies, PEAK, ResNet18 + BiMamba2
python train/train.py --data labels.json --videos videos/ --task spot --classes near_court_swing --out runs/rally
torchrun --nproc_per_node=8 train/train.py --data labels.json --videos videos/ --task spot --dtype bf16 --out runs/big
python train/train.py --out runs/peak --resume auto            # continues runs/peak/last bit for bit; same other flags
"""

import argparse
import gc
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.peak_files import class_names, keep_classes, load_labels, window
from data.peak_labels import FirstItems, PeakClips
from data.rally import LABELS, Rally
from models.mamba2 import describe_impl
from models.sliding_windows import candidates, score_video
from models.tempopeak import (
    ENCODERS,
    HEADS,
    INPUTS,
    SHIFTS,
    TASKS,
    TempoPeak,
    TempoPeakConfig,
    peak_loss,
    peak_targets,
    spot_loss,
    spot_targets,
)  # fmt: skip
from utils import overlay, run
from utils.plots import curves
from utils.run import UserError
from utils.spotting_metrics import e2e_map, match_events, nms_e2e, peak_errors
from utils.weights import load_strict, read_tensors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--out", default="runs/tempopeak", help="run folder: checkpoints, metrics.jsonl, curves.png, run.json"
    )
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--steps", type=int, default=400, help="optimizer steps in all, resumed ones included")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=20, help="steps between printed lines and finite-loss checks")
    g.add_argument("--val-every", type=int, default=200, help="steps between validations")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument(
        "--data", nargs="+", default=["rally"], help="label files (E2E-Spot json), or 'rally': rendered clips"
    )
    g.add_argument("--videos", default=None, help="folder of the videos that the label files name")
    g.add_argument("--classes", default=None, help="comma-separated labels to learn (default: all in --data)")
    g.add_argument("--frames", default=None, metavar="A:B", help="train on frames A..B-1 of every video")
    g.add_argument("--val-data", nargs="+", default=None, help="label files to validate on (default: those of --data)")
    g.add_argument("--val-frames", default=None, metavar="A:B", help="validate on these frames; off if not given")
    g.add_argument("--clips", type=int, default=1000, help="clips per epoch")
    g.add_argument("--val-clips", type=int, default=64, help="clips of a PEAK validation")
    g.add_argument("--event-share", type=float, default=0.8, help="share of the training clips that hold an event")
    g.add_argument("--clip-len", type=int, default=64, help="frames per clip, T")
    g.add_argument("--size", default="64x64", metavar="WxH", help="pixels that the network sees")
    g.add_argument("--crop", default=None, metavar="X,Y,W,H", help="pixels of the video to cut out before resizing")
    g.add_argument("--no-augment", action="store_true", help="clips as they are: no mirror, shift, light")
    g.add_argument("--no-flip", action="store_true", help="never mirror (for classes that know left and right)")
    g.add_argument(
        "--splice", type=float, default=0.0, help="share of the clips that are cut to a scene without events"
    )
    g.add_argument("--level", default="easy", choices=["easy", "hard"], help="difficulty of rendered rallies")
    g.add_argument("--shuffle-frames", action="store_true", help="control: rally clips with their frames permuted")
    g = p.add_argument_group("model")
    g.add_argument("--task", default="peak", choices=TASKS, help="peak: one frame per clip; spot: K classes per frame")
    g.add_argument("--no-peak", action="store_true", help="peak: one more logit for 'no peak in this clip'")
    g.add_argument("--encoder", default="resnet18", choices=ENCODERS, help="tiny: three blocks, for laptops")
    g.add_argument("--imagenet", default=None, help="local torchvision resnet18 weights (.pth) for the encoder")
    g.add_argument("--input", default="rgb", choices=INPUTS, help="graydiff: grey and differences to both neighbours")
    g.add_argument("--shift", default="none", choices=SHIFTS, help="temporal shift inside the encoder's blocks")
    g.add_argument("--head", default="bimamba2", choices=HEADS, help="head over time")
    g.add_argument("--head-layers", type=int, default=1, help="layers of the head")
    g.add_argument("--impl", default="auto", choices=["auto", "torch", "reference", "mamba_ssm"],
                   help="Mamba2 implementation: auto takes the CUDA kernels where they import, else torch")  # fmt: skip
    g = p.add_argument_group("loss and optimizer")
    g.add_argument(
        "--targets", default="gaussian", choices=["hard", "gaussian", "interval"], help="shape of the target"
    )
    g.add_argument("--sigma", type=float, default=1.0, help="width of gaussian and interval targets, frames")
    g.add_argument("--fg-weight", type=float, default=5.0, help="spot: weight of event classes against background")
    g.add_argument("--mixup", type=float, default=0.0, help="blend pairs of clips with lambda ~ Beta(a, a); 0: off")
    g.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (warm-up, then cosine to 0)")
    g.add_argument("--warmup", type=float, default=0.05, help="share of --steps that warms up, from 1%% of --lr")
    g.add_argument("--weight-decay", type=float, default=0.01, help="AdamW decay of matrices and kernels")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm is clipped here")
    g.add_argument("--dropout", type=float, default=0.0, help="before the classifier")
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = {"out", "resume", "stop_at", "log", "workers", "print_every", "val_every", "save_every", "device", "videos"}


def check_flags(args) -> None:
    """UserError for numbers that no run can have, before anything is written."""
    real = args.data != ["rally"]
    if not real and args.clip_len < 8:
        raise UserError(f"--clip-len {args.clip_len}: rendered rallies need at least 8 frames")
    idle = {"shuffle_frames": False, "level": "easy"}
    if not real:
        idle = {"classes": None, "frames": None, "val_data": None, "val_frames": None, "crop": None}
        idle |= {"splice": 0.0, "event_share": 0.8, "no_augment": False, "no_flip": False}
    for name, default in idle.items():
        if getattr(args, name) != default:
            what = "label files" if real else "rendered rallies"
            raise UserError(f"--{name.replace('_', '-')}: has no effect on {what}; leave it out")
    counts = "steps batch_size accum print_every val_every save_every clips val_clips clip_len head_layers".split()
    run.check_ranges(args, **dict.fromkeys(counts, (1, 10**9)), workers=(0, 256), overfit=(0, args.clips))
    run.check_ranges(args, dropout=(0, 0.999), lr=(0, 10), event_share=(0, 1), splice=(0, 1), sigma=(0.01, 100))
    run.check_ranges(args, mixup=(0, 100), clip=(1e-6, 1e6), warmup=(0, 0.999), fg_weight=(1e-3, 1e4))
    run.check_ranges(args, weight_decay=(0, 10))
    if args.no_peak and args.task == "spot":
        raise UserError("--no-peak: SPOT has a background class already; leave the flag out, or use --task peak")
    if min(run.numbers("--size", args.size, "x", 2)) < 16:
        raise UserError(f"--size {args.size}: the encoder needs at least 16 pixels to each side")


def make_data(args, size: list[int], crop: list[int] | None):
    """(training set, validation set or None, label items of the validation for SPOT, class names)."""
    if args.data == ["rally"]:
        kw = {"num_frames": args.clip_len, "size": tuple(size), "no_peak": 0.2 if args.no_peak else 0.0}
        kw |= {"level": args.level, "shuffle_frames": args.shuffle_frames}
        train = Rally(args.clips, args.seed, **kw)
        if args.task == "spot":
            return train, None, None, list(LABELS)
        return train, Rally(args.val_clips, 10**6 + 1, **kw), None, list(LABELS[:1])
    if args.videos is None:
        raise UserError("--data needs --videos, the folder of the videos that the labels name")
    items = [v for path in args.data for v in load_labels(path)]
    names = [v["video"] for v in items]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--data: video {twice[0]} is labelled in two of the files; keep one")
    classes = args.classes.split(",") if args.classes else class_names(items)
    unknown = sorted(set(classes) - set(class_names(items)))
    if unknown:
        raise UserError(f"--classes {','.join(unknown)}: not among the labels {class_names(items)}")
    frames = run.numbers("--frames", args.frames, ":", 2)
    val_frames = run.numbers("--val-frames", args.val_frames, ":", 2)
    if args.splice and args.task == "peak" and not args.no_peak:
        raise UserError("--splice can cut the peak away; it needs --task spot or --no-peak")
    kw = {"folder": args.videos, "classes": classes, "T": args.clip_len, "size": size, "crop": crop, "seed": args.seed}
    kw |= {"single": args.task == "peak"}
    train = PeakClips(
        items, n=args.clips, events=args.event_share if args.no_peak or args.task == "spot" else 1.0,
        frames=frames, augment=not args.no_augment,
        flip=not args.no_flip, splice=args.splice, **kw,
    )  # fmt: skip
    if val_frames is None and args.val_data is None:
        return train, None, None, classes
    val_items = [v for path in args.val_data or args.data for v in load_labels(path)]
    if val_frames and any(v["num_frames"] > val_frames[0] for v in val_items):
        val_items = [v for v in val_items if v["num_frames"] > val_frames[0]]
    share = args.event_share if args.no_peak else 1.0
    val = PeakClips(
        val_items, n=args.val_clips, events=share, frames=val_frames, frames_flag="--val-frames",
        crop_of=train.crop_of, **kw,
    )  # fmt: skip
    return train, val, val_items, classes


def batch_loss(net, model, batch: dict, args, r) -> torch.Tensor:
    """Loss of one micro-batch, forward in autocast, loss in float32. Same function for training and validation."""
    T, padded = batch["frames"].shape[1], bool((batch["length"] < batch["frames"].shape[1]).any())
    if args.task == "peak":
        target = peak_targets(*(batch[k] for k in ("peak", "lo", "hi")), T, args.targets, args.sigma, args.no_peak)
    else:
        target = spot_targets(batch["events"], T, len(model.cfg.classes), args.targets, args.sigma)
    # all that looks at values is done on the CPU; the GPU is never waited for
    frames, lengths, target = (x.to(r.device, non_blocking=True) for x in (batch["frames"], batch["length"], target))
    if args.mixup and net.training:
        lam = torch.distributions.Beta(args.mixup, args.mixup).sample().item()
        other = torch.randperm(len(frames)).to(r.device, non_blocking=True)
        frames = lam * (frames / 255) + (1 - lam) * (frames[other] / 255)
        target = lam * target + (1 - lam) * target[other]
        lengths = torch.maximum(lengths, lengths[other])
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        logits = net(frames, lengths if padded else None)
    batch["logits"] = logits.detach()
    return peak_loss(logits, target) if args.task == "peak" else spot_loss(logits, target, lengths, args.fg_weight)


@torch.no_grad()
def evaluate(model, val_set, val_items, args, r) -> dict:
    """PEAK: loss, acc@0, acc@1, MAE over clips with a peak. SPOT: mAP@{0,1,2,4} and MAE after NMS."""
    if args.task == "spot":
        truth, pred = [], []
        for v, item in enumerate(val_items):
            a, b = val_set.bounds[v]
            images = (image for t in range(a, b) for image in val_set._frames(v, t, t + 1))
            scores = score_video(model, images, device=r.device, dtype=r.dtype)
            truth += window([item], a, b)
            events = candidates(scores, model.cfg.classes)
            pred += [{**item, "events": [{**e, "frame": e["frame"] + a} for e in events]}]
        truth, pred, _ = keep_classes(truth, nms_e2e(pred, 8), model.cfg.classes)
        result = e2e_map(truth, pred)["mAP"]
        values = {f"mAP@{d}": v for d, v in result.items()} | {"score": sum(result[d] for d in (1, 2, 4)) / 3}
        pairs = match_events(truth, pred, threshold=0.5, radius=4)["pairs"]
        return values | ({"MAE": peak_errors(pairs)["MAE"]} if pairs else {})
    model.eval()
    loss, n, errors = 0.0, 0, []
    loader = DataLoader(
        val_set, batch_size=args.batch_size, num_workers=args.workers, worker_init_fn=run.ignore_sigterm
    )
    for batch in loader:
        loss += batch_loss(model, model, batch, args, r).item() * len(batch["peak"])
        n += len(batch["peak"])
        guess = batch["logits"][:, : args.clip_len].argmax(1).cpu()
        errors += (guess - batch["peak"]).abs()[batch["peak"] >= 0].tolist()
    model.train()
    count = len(errors) or math.nan  # no clip with a peak: no frame error to average
    acc = {f"acc@{k}": sum(e <= k for e in errors) / count for k in (0, 1)}
    return {"val_loss": loss / n, **acc, "MAE": sum(errors) / count, "n": len(errors), "score": acc["acc@1"]}


@torch.no_grad()
def draw_validation(model, val_set, path: Path, args, r, rows: int = 4) -> None:
    """PNG: a row per validation clip, the frames around the predicted (PEAK) or the true event, with their scores."""
    model.eval()
    items = [val_set[i] for i in range(min(rows, len(val_set)))]
    frames, lengths = torch.stack([x["frames"] for x in items]), torch.stack([x["length"] for x in items])
    scores = model.probabilities(model(frames.to(r.device), lengths.to(r.device))).amax(-1).cpu()  # (rows, T)
    model.train()
    images, captions = [], []
    for k, item in enumerate(items):
        truth, guess = int(item["peak"]), int(scores[k].argmax())
        for t in range(guess - 4, guess + 5):
            inside = 0 <= t < len(frames[k])
            images.append((frames[k, t] if inside else torch.zeros_like(frames[k, 0])).permute(1, 2, 0).numpy())
            mark = ("P" if t == guess else "") + ("T" if t == truth else "")  # predicted, true
            captions.append(f"{t} {scores[k, t]:.2f} {mark}" if inside else "-")
    overlay.save_png(path, overlay.grid(images, 9, captions))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)
    if "mamba2" in args.head:
        run.say(r, f"# {describe_impl(args.impl, r.device)}")
    size, crop = run.numbers("--size", args.size, "x", 2), run.numbers("--crop", args.crop, ",", 4)

    # ---- data
    train_set, val_set, val_items, classes = make_data(args, size, crop)
    if args.task == "peak" and len(classes) != 1:
        raise UserError(f"PEAK has one class, the labels have {classes}; choose with --classes, or use --task spot")
    crop_of = list(train_set.crop_of) if crop else None
    if args.overfit:
        train_set = FirstItems(train_set, args.overfit)
        val_set = train_set if args.task == "peak" else None

    # ---- model, optimizer
    cfg = TempoPeakConfig(
        task=args.task, classes=classes, no_peak=args.no_peak, clip_len=args.clip_len, size=size, crop=crop,
        crop_of=crop_of, input=args.input, encoder=args.encoder, shift=args.shift, head=args.head,
        head_layers=args.head_layers, dropout=args.dropout,
    )  # fmt: skip
    model = TempoPeak(cfg, impl=args.impl).to(r.device)
    if args.imagenet:
        model.load_imagenet(args.imagenet)
    if args.init:
        run.read_config(args.init)
        load_strict(model, read_tensors(Path(args.init) / "model.safetensors"), args.init)
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)]
    vectors = [p for p in params if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    assert len(matrices) + len(vectors) == len(params)
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=args.lr)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    step, best = 0, -1.0
    if args.resume:
        saved_model, state = TempoPeak.from_checkpoint(args.resume), run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE)
        if saved_model.cfg != cfg:
            raise UserError(f"--resume {args.resume}: the data give another configuration than its config.json holds")
        model.load_state_dict(saved_model.state_dict())
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
    out = run.open_folder(r, args, anew)
    if r.main:
        run.rewind_metrics(out, step)
    net = model
    if r.ddp:  # each rank keeps its own batch norm statistics, as each micro-batch of --accum does
        net = DDP(net, device_ids=[r.device.index] if r.device.type == "cuda" else None)
    if args.compile:
        net = torch.compile(net)
    stop = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    batches = run.StepBatches(len(train_set), args.batch_size, step, stop, args.seed, r.rank, r.world, args.accum)
    loader = DataLoader(train_set, batch_sampler=batches, num_workers=args.workers, worker_init_fn=run.ignore_sigterm,
                        pin_memory=r.device.type == "cuda")  # fmt: skip
    loader = iter(loader)
    outcomes = args.clip_len + args.no_peak if args.task == "peak" else 1 + len(classes)
    run.say(
        r, f"# {sum(p.numel() for p in params):,} parameters | {args.batch_size * r.world * args.accum} clips a step"
    )
    if args.task == "peak":
        run.say(r, f"# first loss should be ln({outcomes}) = {math.log(outcomes):.3f}")

    def save(is_best: bool = False) -> None:
        if r.main:
            if not all(p.isfinite().all() for p in params):
                raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
            state = {"optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "best": best, "args": vars(args)}
            state["world"] = r.world
            run.save_checkpoint(out, step, model, model.config_dict(), state, best=is_best)

    # ---- loop
    run.watch_sigterm(r)
    bar = tqdm(total=args.steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    clock, since = time.perf_counter(), step
    val, saved = {}, step if args.resume else -1
    while step < stop and not run.should_stop(r):
        warm = max(1, round(args.steps * args.warmup))
        progress = (step - warm) / max(1, args.steps - warm)
        rise = 0.01 + 0.99 * (step + 1) / warm
        lr = args.lr * (rise if step < warm else 0.5 * (1 + math.cos(math.pi * progress)))
        for group in opt.param_groups:
            group["lr"] = lr
        total = 0.0
        for a in range(args.accum):
            run.seed_all(run.step_seed(args.seed, step, a * r.world + r.rank))
            last_one = a == args.accum - 1
            with net.no_sync() if r.ddp and not last_one and not args.compile else nullcontext():
                loss = batch_loss(net, model, next(loader), args, r) / args.accum
                scaler.scale(loss).backward()
            total = total + loss.detach()
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if step % args.print_every == 0 or step == 1:  # .item() waits for the GPU, so only here
            if r.ddp:
                dist.all_reduce(total)
            value, speed = total.item() / r.world, (step - since) / (time.perf_counter() - clock)
            if not (math.isfinite(value) and (scaler.is_enabled() or norm.isfinite())):
                raise UserError(f"step {step}: loss is {value}, gradient {norm:.2e}; try a lower --lr or --dtype fp32")
            speed *= args.batch_size * args.accum * r.world
            run.report(r, out, step, args.steps, loss=value, lr=lr, grad=norm.item(), clips_per_s=speed)
            clock, since = time.perf_counter(), step
        if val_set is not None and r.main and (step % args.val_every == 0 or step == stop):
            val = evaluate(model, val_set, val_items, args, r)
            run.report(r, out, step, args.steps, **val)
            run.write_metrics_csv(out)
            curves(out / "metrics.jsonl", out / "curves.png")
            draw_validation(model, val_set, out / "val.png", args, r)
            if val["score"] > best:
                best, saved = val["score"], step
                save(is_best=True)
            clock, since = time.perf_counter(), step
        if step % args.save_every == 0 and saved != step:
            saved = step
            save()
    bar.close()

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
    result = ", ".join(f"{k} {v:.4f}" for k, v in val.items() if k != "score")
    run.finish(r, args, "TempoPeak", f"step {step}: " + (result or "no validation asked for"))


if __name__ == "__main__":
    sys.exit(run.cli(main))
