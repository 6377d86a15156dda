"""Train FastSAM2 on several tasks at once: panoptic (and so instance and semantic), interactive, referring; vis, vps, vos.

python train/train_fastsam2.py --data shapes --backbone resnet18 --out runs/shapes              # rendered; README: settings
python train/train_fastsam2.py --data shapes shape-clips --memory --backbone resnet18 --out runs/all     # and their clips
python train/train_fastsam2.py --data first-masks=DAVIS --init runs/all/last --memory --out runs/davis   # of its objects
python train/train_fastsam2.py --data panoptic=coco/annotations/panoptic_train2017.json --imagenet resnet50.pth \\
    --clip weights/clip-vit-large-patch14 --size 736x1280 --batch-size 2 --dtype bf16 --workers 8 --out runs/coco
torchrun --nproc_per_node=8 train/train_fastsam2.py --dtype bf16 --batch-size 2 --workers 8 --imagenet resnet50.pth \\
    --clip weights/clip-vit-large-patch14 --size 736x1280 --out runs/mixture --data \\
    panoptic=coco/annotations/panoptic_train2017.json instances=coco/annotations/instances_train2017.json \\
    cityscapes=cityscapes sa1b=sa1b refcoco=refcoco/refs.json refcoco=refcoco+/refs.json refcoco=refcocog/refs.json \\
    panoptic-clips=coco/annotations/panoptic_train2017.json ytvis=ytvis_2019/train.json davis=DAVIS vipseg=VIPSeg --memory

A source brings its own tasks, --tasks chooses among them; every task has the same share unless --share says otherwise,
and within a task sources count by size. A micro-batch has one task. Clips are vis (tubes of things), vps (and stuff)
and vos: objects followed from a prompt, with --memory frame by frame, where half of the time the memory is given the true
mask, else as one tube; validation follows without help. Everything that is missing is listed before the
first step. With --ema the averaged weights are what is validated, saved and predicted with; with --distill they also teach:
they see the same pictures in other light, and after the warm-up their soft masks and classes are learned besides the
targets. --init carries weights over to another --key-rank (nearest product) and another --fusion (its reader anew).
"""

import argparse
import copy
import functools
import gc
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.segment_batch import CLIP_TASKS, TASKS, SegmentCollate, training_view
from data.segment_sources import (
    FORMATS,
    RENDERED,
    First,
    default_tasks,
    make_sets,
    open_sources,
    set_shares,
    task_of,
    task_prompts,
    validation_sets,
    vocabulary,
)
from data.task_mixture import MixtureBatches, TaskMixture
from data.video_clips import Clips
from models.clip import load_clip, load_tokenizer
from models.fastsam2 import BACKBONES, LOGIT_SCALE, TEMPERATURE, FastSAM2, FastSAM2Config, build_vocabulary, hash_texts
from models.fastsam2_options import FUSIONS, KEY_STRIDES, LOOKS
from models.mask_losses import WEIGHTS
from models.segment_losses import count_masks, distill_losses
from models.segment_training import (
    DRAWN,
    add_clicks,
    autocast,
    batch_losses,
    draw_validation,
    evaluate,
    initial_weights,
    make_groups,
    other_light,
    prompts_of,
    to_device,
)
from models.semantic_head import TEMPLATES, embed_texts
from models.streaming_memory import MemoryConfig
from utils import run
from utils.plots import curves
from utils.run import UserError
from utils.weights import load_strict


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--out", default="runs/fastsam2", help="run folder: checkpoints, metrics.jsonl, curves.png, run.json"
    )
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--steps", type=int, default=3000, help="optimizer steps in all, resumed ones included")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=8, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=50, help="steps between printed lines and finite-loss checks")
    g.add_argument("--val-every", type=int, default=1000, help="steps between validations")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--val-items", type=int, default=48, help="pictures, or clips, of each task in a validation")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["shapes"], metavar="FORMAT=PATH",
                   help=f"{', '.join(RENDERED)} (rendered), or {', '.join(FORMATS)} with = and a path")  # fmt: skip
    g.add_argument("--val-data", nargs="+", default=None, metavar="FORMAT=PATH",
                   help="likewise (default: --data if all of it is rendered)")  # fmt: skip
    g.add_argument("--tasks", nargs="+", default=None, choices=TASKS,
                   help="default: what the data have; panoptic makes instance and semantic too, vps makes vis")  # fmt: skip
    g.add_argument(
        "--share", nargs="+", default=[], metavar="TASK=X", help="how often a task is drawn (default 1 each)"
    )
    g.add_argument("--own-tasks", action="store_true", help="ranks draw their tasks apart, not one for all")
    g.add_argument("--size", default="96x96", metavar="HxW", help="pixels that the network sees")
    g.add_argument("--scale", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
                   help="resize by a factor of this range (default: 0.8 2, prompted pictures 0.1 2, as RAP-SAM)")  # fmt: skip
    g.add_argument("--prompts", type=int, default=12, help="prompted objects of a picture")
    g.add_argument("--clicks", type=int, default=3, help="interactive: most clicks of an object, 1 off")
    g.add_argument("--frames", type=int, default=4, help="T, frames of a clip")
    g.add_argument("--clip-stride", type=int, nargs=2, default=[1, 3], metavar=("LOW", "HIGH"),
                   help="clips of videos take every so manieth frame, drawn from this range")  # fmt: skip
    g.add_argument(
        "--clip-batch", type=int, default=0, help="clips in a batch (0: --batch-size / --frames, at least 1)"
    )
    g = p.add_argument_group("model")
    g.add_argument("--backbone", default="resnet50", choices=list(BACKBONES), help="of torchvision")
    g.add_argument("--imagenet", default=None, help="local torchvision weights of that backbone (.pth)")
    g.add_argument("--queries", type=int, default=100, help="object queries")
    g.add_argument("--dim", type=int, default=256, help="width of features and queries")
    g.add_argument("--keep-queries", type=int, default=0, help="queries that go on after --prune-after (0: all)")
    g.add_argument("--prune-after", type=int, default=1, help="stage after which queries are left out, 1..3")
    g.add_argument("--key-rank", type=int, default=0, help="width of the keys that prompts look at (0: full)")
    g.add_argument("--key-stride", type=int, default=4, choices=KEY_STRIDES, help="px from key to key")
    g.add_argument("--fusion", default="attention", choices=FUSIONS, help="how what points at an object is made one")
    g.add_argument("--look", default="all", choices=LOOKS, help="prompts that bring features along: all, or masks only")
    g.add_argument("--logit-scale", type=float, default=LOGIT_SCALE, help="of the cosine of object and class name")
    g.add_argument("--temperature", type=float, default=TEMPERATURE, help="stages' classes have --logit-scale over it")
    g.add_argument(
        "--update", default="add", choices=["add", "replace"], help="what stages do to a query; RAP-SAM: replace"
    )
    g.add_argument("--memory", action="store_true", help="vos: a memory of each object, frame by frame, not one tube")
    g.add_argument("--memory-recent", type=int, default=6, help="frames that it holds besides those with prompts")
    g.add_argument("--memory-maps", type=int, default=0, help="how many of these it holds as maps too (0: tokens only)")
    g.add_argument("--clip", default=None, help="CLIP snapshot for names and sentences (default: hashed words)")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--class-weight", type=float, default=WEIGHTS["class"], help="of an object's class in the loss")
    g.add_argument(
        "--pixel-weight", type=float, default=0.0, help="of each pixel's class besides, as in K-Net (0: none)"
    )
    g.add_argument("--points", type=int, default=12544, help="where masks are compared")
    g.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (warm-up, then cosine to 0)")
    g.add_argument("--backbone-lr", type=float, default=0.1, help="factor on the rate of the backbone")
    g.add_argument("--warmup", type=float, default=0.05, help="share of --steps that warms up, from 1%% of --lr")
    g.add_argument("--weight-decay", type=float, default=0.05, help="AdamW decay of matrices and kernels")
    g.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm is clipped here (RAP-SAM: 0.01)")
    g.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, as 0.999 (0: none)")
    g.add_argument("--distill", type=float, default=0.0, help="weight of learning from the averaged weights (0: none)")
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = {"out", "resume", "stop_at", "log", "workers", "print_every", "val_every", "save_every", "val_items", "device"}
FREE |= {"init", "val_data"}


def check_flags(args) -> dict[str, float]:
    """Shares by task; UserError for numbers that no run can have, before anything is written."""
    counts = "steps batch_size accum print_every val_every save_every val_items prompts clicks queries points".split()
    run.check_ranges(args, **dict.fromkeys(counts, (1, 10**9)), workers=(0, 256), dim=(16, 4096), lr=(1e-12, 0.1))
    run.check_ranges(args, backbone_lr=(0, 10), warmup=(0, 0.999), weight_decay=(0, 10), clip_grad=(1e-6, 1e6))
    run.check_ranges(
        args,
        ema=(0, 0.999999),
        class_weight=(0, 1000),
        pixel_weight=(0, 1000),
        distill=(0, 1000),
        keep_queries=(0, args.queries),
        key_rank=(0, args.dim),
    )
    run.check_ranges(args, prune_after=(1, FastSAM2Config.stages), frames=(2, 1000), clip_batch=(0, 10**6),
                     memory_recent=(0, 1000), memory_maps=(0, args.memory_recent))  # fmt: skip
    run.check_ranges(args, overfit=(0, 10**9), logit_scale=(1e-3, 1e4), temperature=(1e-3, 1e3))
    if args.overfit and args.val_data:
        raise UserError("--overfit evaluates on the pictures that it trains on; leave --val-data out")
    if not 1 <= args.clip_stride[0] <= args.clip_stride[1]:
        raise UserError(f"--clip-stride {args.clip_stride[0]} {args.clip_stride[1]}: expected 1 <= LOW <= HIGH")
    if args.scale and not 0 < args.scale[0] <= args.scale[1]:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: expected 0 < LOW <= HIGH")
    if args.key_rank % FastSAM2Config.heads:
        raise UserError(f"--key-rank {args.key_rank}: expected a multiple of {FastSAM2Config.heads}, one part a head")
    if args.distill and not args.ema:
        raise UserError(f"--distill {args.distill}: the averaged weights teach; give --ema as well, as 0.999")
    if (args.stop_at or 0) < 0:
        raise UserError(f"--stop-at {args.stop_at}: expected 0 or more steps")
    if min(run.numbers("--size", args.size, "x", 2)) < 32:
        raise UserError(f"--size {args.size}: expected at least 32 pixels to each side")
    shares = {}
    for word in args.share:
        task, _, value = word.partition("=")
        if task not in TASKS or not value.replace(".", "", 1).isdigit() or float(value) <= 0:
            raise UserError(f"--share {word}: expected TASK=X with X above 0, TASK one of {', '.join(TASKS)}")
        shares[task] = float(value)
    return shares


def build(args, sources, r) -> tuple[FastSAM2, object]:
    """The model with the vocabulary of all sources, and what embeds sentences."""
    classes, is_thing = vocabulary(sources)
    embed, templates, width = functools.partial(hash_texts, width=128), ("{}",), 128
    if args.clip:
        clip = load_clip(args.clip).to(r.device)
        embed = functools.partial(embed_texts, clip.encode_text, load_tokenizer(args.clip), device=r.device)
        templates, width = TEMPLATES, clip.cfg.embed_dim
    kept = {"recent": args.memory_recent, "maps": args.memory_maps}
    memory = MemoryConfig(args.dim, FastSAM2Config.heads, 4 * args.dim, **kept)
    cfg = FastSAM2Config(
        classes=classes, backbone=args.backbone, queries=args.queries, dim=args.dim, hidden=8 * args.dim,
        embed_dim=width, frozen_norm=args.imagenet is not None, keep_queries=args.keep_queries,
        prune_after=args.prune_after, key_rank=args.key_rank, key_stride=args.key_stride, fusion=args.fusion,
        look=args.look, logit_scale=args.logit_scale, temperature=args.temperature,
        residual=args.update == "add", pixel_classes=args.pixel_weight > 0,
        memory=memory if args.memory else None,
    )  # fmt: skip
    model = FastSAM2(cfg)
    if args.imagenet:
        model.load_imagenet(args.imagenet)
    source = "clip" if args.clip else "hash"
    model.set_vocabulary(classes, build_vocabulary(classes, embed, templates), is_thing, source)
    return model, embed


def make_validation(args, classes: list[str], tasks, size: tuple[int, int], clips: Clips, load: dict) -> dict:
    """{task: loader of its first pictures or clips, shown whole}."""
    specs, seed, split = args.val_data or args.data, 10**6 + args.seed, "val"
    if args.overfit:
        seed, split = args.seed, "train"
    elif not args.val_data and not set(args.data) <= set(RENDERED):
        return {}
    sources = open_sources("--val-data", specs, min(size), seed, clips, split)
    prompts = functools.partial(task_prompts, number=args.prompts, late=args.memory, overfit=bool(args.overfit))
    loaders = {}
    for task, items in validation_sets(sources, classes, tasks, *size, prompts, args.seed * bool(args.overfit)).items():
        part = Subset(items, range(min(len(items), args.overfit or args.val_items)))
        loaders[task] = DataLoader(part, batch_size=batch_size_of(args, task), **load)
    return loaders


def batch_size_of(args, task: str) -> int:
    """Pictures, or clips, of a micro-batch."""
    return args.batch_size if task not in CLIP_TASKS else args.clip_batch or max(1, args.batch_size // args.frames)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shares = check_flags(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)
    height, width = run.numbers("--size", args.size, "x", 2)

    # ---- data
    clips = Clips(args.frames, tuple(args.clip_stride))
    sources = open_sources("--data", args.data, min(height, width), args.seed, clips)
    for source in sources:
        run.say(r, f"# {source.summary()}")
    tasks = args.tasks or default_tasks(sources)
    model, embed = build(args, sources, r)
    classes = model.cfg.classes
    numbers = sources[0].category_ids if classes == list(sources[0].classes) else range(1, len(classes) + 1)
    numbers = [int(n) for n in numbers]  # of the classes in the files that prediction writes
    how = {"flip": 0.0, "scale": (1.0, 1.0)} if args.overfit else {"scale": args.scale}
    view = functools.partial(training_view, height=height, width=width, **how)
    prompts = functools.partial(task_prompts, number=args.prompts, late=args.memory, training=True)
    sets = make_sets(sources, classes, tasks, view, prompts, args.seed)
    if args.overfit:
        sets = {name: First(items, args.overfit) for name, items in sets.items()}
    mixture = TaskMixture(sets)
    load = {"collate_fn": SegmentCollate(), "num_workers": args.workers, "worker_init_fn": run.ignore_sigterm}
    loaders = make_validation(args, classes, tasks, (height, width), clips, load)

    # ---- model, optimizer
    model.to(r.device)
    if args.init:
        run.read_config(args.init)
        load_strict(model, initial_weights(args.init, model), args.init)
    if r.world > 1 and r.device.type == "cuda" and not model.cfg.frozen_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    opt = torch.optim.AdamW(make_groups(model, args.backbone_lr, args.weight_decay), lr=args.lr)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    averaged = copy.deepcopy(model).requires_grad_(False) if args.ema else model
    step, best = 0, -1.0
    if args.resume:
        saved_model, state = FastSAM2.from_checkpoint(args.resume), run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE)
        if saved_model.cfg != model.cfg:
            raise UserError(f"--resume {args.resume}: the data give another configuration than its config.json holds")
        averaged.load_state_dict(saved_model.state_dict())
        model.load_state_dict(state["trained"] if args.ema else saved_model.state_dict())
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
    out = run.open_folder(r, args, anew)
    if r.main:
        run.rewind_metrics(out, step)
    net = model
    if r.ddp:
        net = DDP(net, device_ids=[r.device.index] if r.device.type == "cuda" else None, broadcast_buffers=False)
    stop = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    batch_sizes = {name: batch_size_of(args, task_of(name)) for name in sets}
    batches = MixtureBatches(mixture.sizes(), set_shares(sets, shares), batch_sizes, step, stop, args.seed, r.rank,
                             r.world, args.accum, same=not args.own_tasks)  # fmt: skip
    loader = iter(DataLoader(mixture, batch_sampler=batches, pin_memory=r.device.type == "cuda", **load))
    run.say(r, f"# {sum(p.numel() for p in model.parameters()):,} parameters, {len(classes)} classes, tasks {tasks}")

    def save(is_best: bool = False) -> None:
        if r.main:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
            state = {"optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "best": best, "args": vars(args)}
            state |= {"world": r.world} | ({"trained": model.state_dict()} if args.ema else {})
            about = {**averaged.config_dict(), "data": {"category_ids": numbers, "image_size": [height, width]}}
            run.save_checkpoint(out, step, averaged, about, state, best=is_best)

    # ---- loop
    weights = WEIGHTS | {"class": args.class_weight, "pixels": args.pixel_weight}
    run.watch_sigterm(r)
    model.train()
    bar = tqdm(total=args.steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    began, images, shown, val, saved = time.perf_counter(), 0, {}, {}, step if args.resume else -1
    while step < stop and not run.should_stop(r):
        warm = max(1, round(args.steps * args.warmup))
        progress = (step - warm) / max(1, args.steps - warm)
        lr = args.lr * (0.01 + 0.99 * (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * progress)))
        for group in opt.param_groups:
            group["lr"] = lr * group["factor"]
        parts = [to_device(next(loader), r.device) for _ in range(args.accum)]
        num_masks = torch.tensor(sum(map(count_masks, parts)) / args.accum, device=r.device)
        if r.ddp:
            dist.all_reduce(num_masks)
        num_masks = num_masks / r.world
        for a, batch in enumerate(parts):
            run.seed_all(run.step_seed(args.seed, step, a * r.world + r.rank))
            if batch["task"] == "interactive" and args.clicks > 1:
                batch = add_clicks(model, batch, int(torch.randint(args.clicks, ()).item()), r.dtype)
            prompts = prompts_of(batch, embed)
            with net.no_sync() if r.ddp and a < args.accum - 1 else nullcontext():
                losses, found = batch_losses(net, batch, prompts, num_masks, r.dtype, args.points, args.memory, weights)
                if args.distill and step >= warm and batch["task"] != "vos":
                    with torch.no_grad(), autocast(r.device, r.dtype):
                        said = averaged.eval()(other_light(batch["image"]), prompts, task=batch["task"])
                    losses["distill"] = args.distill * sum(distill_losses(found, said, batch, args.points).values())
                    losses["loss"] = losses["loss"] + losses["distill"]
                scaler.scale(losses["loss"] / args.accum).backward()
            images += batch["image"].shape[:-3].numel()
            for name, value in ((batch["task"], losses["loss"]), ("distill", losses.get("distill"))):
                if value is not None:
                    total, n = shown.get(name, (0.0, 0))
                    shown[name] = (total + value.detach(), n + 1)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if args.ema:
            for old, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                old.lerp_(new, 1 - args.ema) if old.is_floating_point() else old.copy_(new)
        if step % args.print_every == 0 or step == 1:  # .item() waits for the GPU, so only here
            values = {f"{task} loss": (total / n).item() for task, (total, n) in shown.items()}
            bad = [name for name, value in values.items() if not math.isfinite(value)]
            if bad or not (scaler.is_enabled() or norm.isfinite()):
                raise UserError(f"step {step}: {bad or 'gradient'} is not finite; try a lower --lr or --dtype fp32")
            speed = images * r.world / (time.perf_counter() - began)
            run.report(r, out, step, args.steps, **values, lr=lr, grad=norm.item(), images_per_s=speed)
            began, images, shown = time.perf_counter(), 0, {}
        if loaders and (step % args.val_every == 0 or step == stop):
            is_best = False
            if r.main:
                val = evaluate(averaged, loaders, embed, r.dtype)
                run.report(r, out, step, args.steps, **val)
                for task in [t for t in DRAWN if t in loaders]:
                    name = "val.png" if task == "panoptic" else f"val_{task}.png"
                    draw_validation(averaged, loaders[task], out / name, embed, r.dtype)
                is_best, best, saved = val["score"] > best, max(best, val["score"]), step
                save(is_best)
            began, images = time.perf_counter(), 0
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
    result = ", ".join(f"{k} {v:.1f}" for k, v in val.items() if k != "score")
    run.finish(r, args, "FastSAM2", f"step {step}: " + (result or "no validation asked for"))


if __name__ == "__main__":
    sys.exit(run.cli(main))
