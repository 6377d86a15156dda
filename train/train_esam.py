"""Train ESAM, Tiny-SA or Bi-Fusion: 3D instances of posed RGB-D, first on single views (sv), then on clips (mv).

python train/train_esam.py --data rooms --planes 16,32,48,64,64,48,32,32 --layers 1,1,1,1,1,1,1,1 --dim 128 --ffn 256 \\
    --voxel 0.04 --points 3000 --min-points 25 --elastic 0 --batch-size 4 --lr 2e-3 --warmup 30 --steps 750 \\
    --out runs/rooms_sv                                                       # rendered rooms, 7 CPU minutes
python train/train_esam.py --stage mv --data rooms --init runs/rooms_sv/last --points 3000 --min-points 25 \\
    --elastic 0 --batch-size 1 --freeze-bn --lr 1e-3 --backbone-lr 0.1 --warmup 10 --steps 200 --out runs/rooms_mv
torchrun --nproc_per_node=2 train/train_esam.py --route bif --clip weights/clip-vit-base-patch16 --dtype bf16 \\
    --data datasets/scannet200_sv/scannet200_sv_infos_train.json --raw datasets/scannet --workers 8 --out runs/bif_sv \\
    --val-data datasets/scannet200_sv/scannet200_sv_infos_val.json --init runs/3dtsa_sv/best
torchrun --nproc_per_node=2 train/train_esam.py --route bif --stage mv --init runs/bif_sv/best --dtype bf16 \\
    --workers 8 --data datasets/scannet200_mv/scannet200_mv_infos_train.json --raw datasets/scannet \\
    --out runs/bif_mv --val-data datasets/scannet200_mv/scannet200_mv_infos_val.json

Routes: 3d the U-Net; 3dtsa and a Tiny-SA neck; bif and features of the picture. --init carries over what the other
checkpoint has, from sv to mv and from route to route, and says what is new; it also gives the sizes of the network, so
they need not be repeated. A backbone of models/convert_mask3d.py will do as well. Presets fill what is not given of the
optimizer, the batch and the epochs: esam is what was published, seed the plan's (its 6e-4 is untested in public; its O2
is --dtype bf16). --epochs counts passes over the data, --steps optimizer steps; an epoch of rooms is --rooms rooms.
Validation is on the index --val-data or on rooms of another seed; metrics.csv has two rows each time: with classes, and
agnostic (every thing is one class). Clips are merged online first, then compared with the labels of all their
points; a prepared clip is a whole scene then. Batches of few scenes need --freeze-bn: running statistics do not fit.
--swa averages weights and statistics as they are, without another pass over the data. --lr-sweep trains once with a
rate that rises from step to step and says where the loss fell fastest.
"""

import argparse
import gc
import math
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.esam_items import ViewItems, index_items, room_items
from data.esam_views import N_STUFF
from data.rgbd_frames import Augmentation
from models.bifusion import load_clip_patch_weights, random_patch_weights
from models.esam import ESAM, ROUTES, STAGES, ESAMConfig
from models.esam_losses import ESAMCriterion, clip_loss
from models.esam_training import UNET_STAGES, freeze, initialise, known_sizes, make_groups
from models.res16unet import Res16UNetConfig
from models.scene_segmenter import SceneResult
from models.scene_validation import LEAST, compare_picture, evaluate
from utils import overlay, run, schedules
from utils.evaluation_rows import sweep_result, write_evaluations
from utils.plots import curves
from utils.run import UserError
from utils.training_guards import LossGuard, check_changed

VAL_ROOMS = 24  # rooms to validate on
SHOWN = 6  # scenes in val.png
DRAWN = ("step", "lr", "grad", "AP", "AP50", "AP25", "mIoU", "agnostic_AP50", "gate_mean")  # in curves.png

# learning rate, decay, schedule, warm-up steps, epochs, batch of sv and mv; of route bif where it differs
PRESETS = {
    "esam": {"lr": 1e-4, "weight_decay": 0.05, "schedule": "poly", "warmup": 0, "epochs": 128, "batch_size": (16, 4)},
    "seed": {"lr": 6e-4, "weight_decay": 0.01, "schedule": "cosine", "warmup": 1000, "epochs": 128,
             "batch_size": (16, 8)},
}  # fmt: skip
BIF = {"esam": {}, "seed": {"lr": 5e-4, "warmup": 2000, "epochs": 160, "batch_size": (8, 4)}}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/esam", help="run folder: checkpoints, metrics.jsonl, metrics.csv, val.png")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--epochs", type=int, default=None, help="passes over the data in all (default: of the preset)")
    g.add_argument("--steps", type=int, default=None, help="optimizer steps in all, instead of --epochs")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=None, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=50, help="steps between printed lines")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--val-every", type=int, default=None, help="steps between validations (default: a tenth)")
    g.add_argument("--val-items", type=int, default=0, help="views or scenes of a validation (0: all; of rooms 24)")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="rooms", metavar="rooms|INDEX", help="rendered, or an index of prepare_scannet.py")
    g.add_argument("--val-data", default=None, metavar="INDEX", help="likewise, of the val split")
    g.add_argument("--raw", default=None, help="the export that an index was made of: pictures and CLIP features")
    g.add_argument("--points", type=int, default=20_000, help="of a frame")
    g.add_argument("--frames", type=int, default=8, help="mv: consecutive key frames of a clip")
    g.add_argument("--elastic", type=float, default=0.5, help="chance that a clip is warped; it is always turned")
    g.add_argument(
        "--min-points", type=int, default=100, choices=LEAST,
        help="of an instance that validation counts; ScanNet's 100 are too many for frames of few points",
    )  # fmt: skip
    g.add_argument("--rooms", type=int, default=2000, help="rooms of an epoch")
    g.add_argument("--room-size", default="120x160", metavar="HxW", help="px of the rendered frames")
    g.add_argument(
        "--room-superpoints", default="graph", choices=["graph", "exact"],
        help="segmentation of depth and colour, or the rendered surfaces themselves, in a third of the time",
    )  # fmt: skip
    g = p.add_argument_group("model; sizes default to those of --init, else to the published ones")
    g.add_argument("--route", default="3d", choices=ROUTES, help="see above")
    g.add_argument("--stage", default="sv", choices=STAGES, help="sv: single views; mv: clips with memory and merging")
    g.add_argument("--agnostic", action="store_true", help="all things are one class")
    g.add_argument("--planes", default=None, metavar="N,...", help="eight numbers of channels of the U-Net")
    g.add_argument("--layers", default=None, metavar="N,...", help="eight numbers of residual blocks of the U-Net")
    g.add_argument("--dim", type=int, default=None, help="width of the queries")
    g.add_argument("--ffn", type=int, default=None, help="hidden width of the decoder's layers")
    g.add_argument("--voxel", type=float, default=None, help="side of a voxel in m")
    g.add_argument("--memory-levels", default=None, metavar="N,...|none", help="mv: which of 0..3, strides 2..16")
    g.add_argument("--tsa-stages", type=int, nargs="*", default=None, choices=range(1, 5), metavar="N",
                   help="stages of the U-Net's encoder that get a Tiny-SA module too")  # fmt: skip
    g.add_argument("--fusion", default=None, choices=["residual", "gate"], help="bif: how the picture joins the points")
    g.add_argument("--clip", default=None, metavar="FOLDER|random", help="bif: where the patch convolution comes from")
    g = p.add_argument_group("loss and optimizer; what is not given is the preset's")
    g.add_argument("--preset", default="seed", choices=list(PRESETS), help="table of settings, see above")
    g.add_argument("--dice-scale", default="upstream", choices=["upstream", "unit"],
                   help="upstream: 4 after the last layer and 4 / batch after the others")  # fmt: skip
    g.add_argument("--lr", type=float, default=None, help="highest learning rate")
    g.add_argument("--schedule", default=None, choices=["cosine", "poly"], help="poly: by epochs, as published")
    g.add_argument("--warmup", type=int, default=None, help="cosine: steps of linear rise before it")
    g.add_argument("--weight-decay", type=float, default=None, help="AdamW decay of matrices and kernels")
    g.add_argument("--clip-grad", type=float, default=10.0, help="gradient norm is clipped here")
    g.add_argument("--backbone-lr", type=float, default=1.0, help="factor on the rate of the U-Net")
    g.add_argument("--pos-embed-lr", type=float, default=1.0, help="factor on the rate of Tiny-SA's pos_embed")
    g.add_argument("--unfreeze", type=int, nargs="*", default=None, choices=UNET_STAGES, metavar="N",
                   help="stages of the U-Net that learn: 0 stem, 1-4 down, 5-8 up; no N: none (default: all)")  # fmt: skip
    g.add_argument("--freeze-bn", action="store_true", help="the U-Net's batch norms keep the statistics of --init")
    g.add_argument("--sync-bn", action="store_true", help="batch norms see the batches of all GPUs")
    g.add_argument(
        "--swa", type=float, default=0.0, help="last share of the steps whose weights are averaged (0: none)"
    )
    g.add_argument("--lr-sweep", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
                   help="rates from LOW to HIGH over --steps instead; no validation")  # fmt: skip
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = {"out", "resume", "stop_at", "log", "workers", "print_every", "save_every", "val_every", "val_items", "device"}
FREE |= {"init", "val_data", "min_points", "raw", "clip"}


def settle(args) -> None:
    """Fill what the preset gives; UserError for what no run can have, before anything is written."""
    mv = args.stage == "mv"
    preset = PRESETS[args.preset] | (BIF[args.preset] if args.route == "bif" else {})
    for name, value in preset.items():
        if getattr(args, name) is None and not (name == "epochs" and args.steps):
            setattr(args, name, value[mv] if isinstance(value, tuple) else value)
    run.check_ranges(args, **dict.fromkeys("batch_size accum print_every save_every points rooms".split(), (1, 10**7)))
    run.check_ranges(args, lr=(1e-8, 1e-2), weight_decay=(0, 10), warmup=(0, 10**9), clip_grad=(1e-6, 1e6), swa=(0, 1),
                     backbone_lr=(0, 10), pos_embed_lr=(0, 10), elastic=(0, 1), overfit=(0, 10**7), frames=(2, 1000),
                     val_items=(0, 10**7), workers=(0, 256))  # fmt: skip
    for name in ("steps", "epochs", "val_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if (args.stop_at or 0) < 0:
        raise UserError(f"--stop-at {args.stop_at}: expected 0 or more steps")
    if args.steps and args.epochs:
        raise UserError("--steps and --epochs: give one of them")
    if args.overfit and args.val_data:
        raise UserError("--overfit evaluates on what it trains on; leave --val-data out")
    if args.route == "bif" and not (args.clip or args.init or args.resume):
        raise UserError("--route bif: the patch convolution is frozen and needs weights; give --clip FOLDER, or random")
    if args.freeze_bn and not (args.init or args.resume):
        raise UserError("--freeze-bn: statistics of an untrained U-Net say nothing; give trained weights with --init")
    if args.lr_sweep and not 0 < args.lr_sweep[0] < args.lr_sweep[1] <= 1:
        raise UserError(f"--lr-sweep {args.lr_sweep[0]:g} {args.lr_sweep[1]:g}: expected 0 < LOW < HIGH <= 1")
    if args.lr_sweep and args.resume:
        raise UserError("--lr-sweep: is short and cannot be continued; leave --resume out")


def open_data(args) -> tuple[ViewItems, ViewItems | None, tuple[str, ...], bool]:
    """Training items, validation items, names of classes, and whether there are precomputed CLIP features."""
    augment, pictures = Augmentation(elastic=args.elastic), args.route == "bif"
    if args.data != "rooms":
        return index_items(args.data, args.val_data, args.raw, args.stage, args.frames, args.points, args.seed, augment,
                           pictures, args.overfit, args.val_items)  # fmt: skip
    size = tuple(run.numbers("--room-size", args.room_size, "x", 2))
    if min(size) < 16:
        raise UserError(f"--room-size {args.room_size}: expected sides of at least 16 px")
    clip_len, exact = args.frames if args.stage == "mv" else 1, args.room_superpoints == "exact"
    rooms = room_items(args.rooms, args.val_items or VAL_ROOMS, clip_len, args.points, args.seed, augment, pictures,
                       args.overfit, size=size, exact=exact)  # fmt: skip
    return *rooms, False


def build(args, classes: tuple[str, ...]) -> ESAM:
    """Sizes: the flags', else those of --resume or --init, else the published ones. Patch weights are set by --clip."""
    source = args.resume or args.init
    sizes = known_sizes(source) if source else {}
    backbone = dict(sizes.pop("backbone", {}))
    for name in ("planes", "layers"):
        given = run.numbers(f"--{name}", getattr(args, name), ",", 8)
        backbone |= {} if given is None else {name: tuple(given)}
    flags = {k: getattr(args, k) for k in ("dim", "ffn", "voxel", "tsa_stages", "fusion")}
    if args.memory_levels is not None:
        given = "" if args.memory_levels == "none" else args.memory_levels
        flags["memory_levels"] = tuple(
            run.numbers("--memory-levels", given, ",", given.count(",") + 1) if given else ()
        )
    sizes |= {k: v for k, v in flags.items() if v is not None}
    sizes |= {"classes": tuple(classes), "route": args.route, "stage": args.stage, "n_stuff": N_STUFF}
    sizes["agnostic"] = args.agnostic or sizes.get("agnostic", False)
    try:
        model = ESAM(ESAMConfig(**sizes, backbone=Res16UNetConfig(**backbone)))
    except (TypeError, ValueError) as e:
        raise UserError(f"the network cannot be built: {e}; check the flags of the model") from e
    if model.bi_encoder is not None and args.clip:
        branch = model.bi_encoder.image
        random_patch_weights(branch, args.seed) if args.clip == "random" else load_clip_patch_weights(branch, args.clip)
    return model


def rate(args, step: int, per_epoch: int) -> float:
    """Learning rate of a step. poly reaches 0 in the last epoch, as published."""
    if args.lr_sweep:
        low, high = args.lr_sweep
        return low * (high / low) ** (step / max(1, args.steps - 1))
    if args.schedule == "poly":
        last = math.ceil(args.steps / per_epoch) - 1
        return args.lr * (1 - step // per_epoch / last) ** 0.9 if last else args.lr
    return schedules.cosine(step, args.steps, args.lr, args.warmup)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settle(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)
    if args.sync_bn and not (r.ddp and r.device.type == "cuda"):
        raise UserError("--sync-bn: is for several GPUs; start with torchrun and --device cuda, or leave it out")

    if args.workers:  # a clip is hundreds of tensors: more than a process may have open files
        torch.multiprocessing.set_sharing_strategy("file_system")

    # ---- data, model
    train, val, classes, packed = open_data(args)
    per_epoch = max(1, len(train) // (args.batch_size * args.accum * r.world))
    args.steps = args.steps or args.epochs * per_epoch
    if args.schedule == "cosine" and args.warmup >= args.steps and not args.lr_sweep:
        raise UserError(f"--warmup {args.warmup}: is all of {args.steps} steps; give fewer, or more --steps")
    model = build(args, classes)
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    still = freeze(model, args.unfreeze, args.freeze_bn)
    if args.init and not args.resume:
        for line in initialise(model, args.init, patch=not args.clip):
            run.say(r, f"# {line}")
    if model.bi_encoder is not None:
        model.bi_encoder.expects_features = packed
        if not (args.resume or model.bi_encoder.image.conv1_weight.isfinite().all()):
            raise UserError("--route bif: --init brings no patch convolution; give --clip FOLDER, or random")
    model.to(r.device)
    opt = torch.optim.AdamW(make_groups(model, args.weight_decay, args.backbone_lr, args.pos_embed_lr), lr=args.lr)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    averaged = deepcopy(model).requires_grad_(False) if args.swa else model
    criterion = ESAMCriterion(len(classes), N_STUFF, model.cfg.agnostic, args.dice_scale)
    step, best = 0, -1.0
    if args.resume:
        saved_model, state = ESAM.from_checkpoint(args.resume), run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE)
        if saved_model.cfg != model.cfg:
            raise UserError(f"--resume {args.resume}: its config.json is not what the data and flags give; repeat them")
        averaged.load_state_dict(saved_model.state_dict())
        model.load_state_dict(state["trained"] if args.swa else saved_model.state_dict())
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
    if model.bi_encoder is not None and args.data != "rooms":
        for items in [train] + [val] * (val is not None):
            items.check_features(model.bi_encoder.image.fingerprint())
    out = run.open_folder(r, args, anew)
    if r.main:
        run.rewind_metrics(out, step)
    net = model
    if r.ddp:
        net = DDP(net, device_ids=[r.device.index] if r.device.type == "cuda" else None, broadcast_buffers=False)
    stop = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    batches = run.StepBatches(len(train), args.batch_size, step, stop, args.seed, r.rank, r.world, args.accum)
    load = {"num_workers": args.workers, "worker_init_fn": run.ignore_sigterm}
    loader = iter(DataLoader(train, batch_sampler=batches, collate_fn=list, **load))
    if val is None:
        run.say(r, "# no --val-data: nothing is validated, and no checkpoint will be the best")
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(r, f"# route {args.route}, stage {args.stage}: {learn:,} of {sum(p.numel() for p in model.parameters()):,} "
               f"parameters learn; {len(train)} items, {per_epoch} steps an epoch, {args.steps} steps")  # fmt: skip

    def save(is_best: bool = False) -> None:
        if r.main:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
            state = {"optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "best": best, "args": vars(args)}
            state |= {"world": r.world} | ({"trained": model.state_dict()} if args.swa else {})
            run.save_checkpoint(out, step, averaged, averaged.config_dict(), state, best=is_best)

    def modes() -> None:
        model.train()
        for module in still:
            module.eval()

    def validate() -> dict[str, float]:
        """Scores of the weights that are saved: rows of metrics.csv, val.png; with classes if the network has them."""
        shown = []

        def draw(n: int, views: list, labels: list, found: SceneResult) -> None:
            if n < SHOWN:
                shown.append(compare_picture(views, labels, found))

        items = DataLoader(val, batch_size=None, collate_fn=tuple, **load)
        scores, n, per_frame = evaluate(averaged, items, args.min_points, dtype=r.dtype, shown=draw)
        now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        split = "train" if args.overfit else "val"
        same = {"time": now, "route": args.route, "stage": args.stage, "epoch": step // per_epoch, "iter": step,
                "split": split, "n_scenes": n, "s_per_frame": per_frame, "lr": lr, **spent}  # fmt: skip
        if r.device.type == "cuda":
            same["peak_gpu_mb"] = torch.cuda.max_memory_allocated(r.device) / 2**20
        write_evaluations(out / "metrics.csv", step, [same | {"classes": k} | v for k, v in scores.items()])
        overlay.save_png(out / "val.png", np.concatenate(shown))
        for kind, values in scores.items():
            prefix = "" if kind == "classes" else "agnostic_"
            run.report(
                r, out, step, args.steps, **{k if k in ("mIoU", "mAcc") else prefix + k: v for k, v in values.items()}
            )
        return scores.get("classes", scores["agnostic"])

    # ---- loop
    run.watch_sigterm(r)
    guard, values, swept = LossGuard(out, rank=r.rank), {}, []
    modes()
    bar = tqdm(total=args.steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    began, since, waited, total, spent = time.perf_counter(), step, 0.0, {}, {}
    saved, lr, val_every = step if args.resume else -1, 0.0, args.val_every or max(1, args.steps // 10)
    averages = args.steps - round(args.swa * args.steps)  # step after which weights are averaged
    while step < stop and not run.should_stop(r):
        lr = rate(args, step, per_epoch)
        for group in opt.param_groups:
            group["lr"] = lr * group["factor"]
        before = [p.detach().clone() for g in opt.param_groups for p in g["params"]] if step == 0 else None
        for a in range(args.accum):
            asked = time.perf_counter()
            clips, labels = zip(*next(loader), strict=True)
            waited += time.perf_counter() - asked
            clips, labels = ([[x.to(r.device) for x in clip] for clip in part] for part in (clips, labels))
            run.seed_all(run.step_seed(args.seed, step, a * r.world + r.rank))
            with net.no_sync() if r.ddp and a < args.accum - 1 else nullcontext():
                with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
                    outputs = net(clips)
                losses = clip_loss(outputs, clips, labels, criterion)
                scaler.scale(losses["loss"] / args.accum).backward()
            parts = [(k if k == "loss" else f"{k} loss", v) for k, v in losses.items()]
            for name, value in parts + [x for o in outputs for x in o.figures.items()]:
                total.setdefault(name, []).append(value.detach())
            warning = guard.note(step + 1, losses["loss"].detach(), {"coords": [v.coords for c in clips for v in c]})
            if warning:
                run.say(r, warning)
        if args.lr_sweep:
            swept.append((lr, mean(x.item() for x in total["loss"][-args.accum :])))
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if before is not None and not scaler.is_enabled() and lr > 0:
            check_changed(before, [p for g in opt.param_groups for p in g["params"]], step)
        if args.swa:
            for old, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                weight = 1 / max(1, step - averages)
                old.lerp_(new, weight) if old.is_floating_point() else old.copy_(new)
        if step % args.print_every == 0 or step == 1:  # reads from the GPU, so only here
            figures = {k: (sum if k == "fallback_count" else mean)(torch.stack(v).tolist()) for k, v in total.items()}
            seconds = (time.perf_counter() - began) / (step - since)
            spent = {"iter_time_s": seconds, "data_time_s": waited / (step - since)}
            run.report(r, out, step, args.steps, **figures, lr=lr, grad=norm.item(), **spent)
            spent |= {k: figures[k] for k in ("fallback_count", "gate_mean") if k in figures}
            began, since, waited, total = time.perf_counter(), step, 0.0, {}
        if val is not None and not args.lr_sweep and (step % val_every == 0 or step == args.steps):
            guard.check()
            is_best = False
            if r.main:
                values = validate()
                score = -1.0 if math.isnan(values["AP"]) else values["AP"]
                is_best, best = score >= best, max(best, score)
            save(is_best)
            modes()
            saved, began, since, waited, total = step, time.perf_counter(), step, 0.0, {}
        elif step % args.save_every == 0:
            guard.check()
            save()
            saved = step
    bar.close()
    guard.check()

    # ---- result
    if saved != step:
        save()
    if r.main and (rows := run.read_metrics(out)):
        kept = [{k: v for k, v in row.items() if "loss" in k or k in DRAWN} for row in rows]
        curves(kept, out / "curves.png")
    if r.stop_asked:
        run.say(r, f"# SIGTERM: saved step {step} in {out}/last; continue with --resume {out}/last")
    del net  # DDP holds the process group; freed after it, its destructor can wait for ever for gloo's thread
    gc.collect()
    result = ", ".join(f"{k} {values[k]:.3f}" for k in ("AP", "AP50", "AP25", "mIoU") if k in values)
    if args.lr_sweep:
        result = sweep_result(*zip(*swept, strict=True))
    where = f"{args.route} {args.stage}, {'training items' if args.overfit else 'unseen items'}"
    run.finish(r, args, "ESAM", f"{where}, step {step}: {result or 'not validated'}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
