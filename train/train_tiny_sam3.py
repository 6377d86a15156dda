"""Train the tiny SAM3 on rendered play until it answers "ball" and "racket": the pipeline is shown working, not only run.

python train/train_tiny_sam3.py --out runs/sam3_tiny      # the detector, 7 minutes of one core: both recalls over 0.95
python train/train_tiny_sam3.py --out runs/sam3_tracker --part tracker --init runs/sam3_tiny/snapshot --steps 300
python eval/infer_ball.py V.mp4 --ckpt runs/sam3_tracker/snapshot --out O --prompt ball=ball --prompt racket=racket \\
    --score-thr 0.2 --new-thr 0.25

OUT/snapshot is a complete offline snapshot of the last validated step; step_* are checkpoints to --resume. The detector
(picture and text encoder, DETR, masks) learns by set matching; then, with all of it frozen, the tracker learns to follow
a mask through clips of --frames frames, on the detector's maps. Validation is on scenes of another seed: precision and
strict recall at 4 px, with the score threshold THRESHOLD, fixed beforehand, and mean IoU. One process; no torchrun.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as packed
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Sam3VideoModel, Sam3VideoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.rendered_ball import TARGETS, RenderedBall, RenderedScenes
from models.mask_losses import mask_iou
from models.sam3_losses import (
    Questions,
    best_masks,
    detect_pairs,
    detection_losses,
    follow_clip,
    followed_masks,
    tracking_losses,
)
from models.sam3_tiny import picture_processors, tiny_config, tiny_tokenizer
from utils import overlay, run, schedules
from utils.plots import curves
from utils.run import UserError
from utils.training_guards import LossGuard, check_changed, check_rate
from utils.weights import load_strict, read_tensors

TEXTS = {"ball": ("ball", "tennis ball"), "racket": ("racket", "tennis racket")}  # what a target is called
THRESHOLD, NEAR = 0.25, 4.0  # score of a detection, and px within which it is right, both fixed before training
EPOCH = 10_000  # pictures or clips before the order is drawn anew; no two epochs share one
SHOWN = 12  # pictures in val.png
HELD_OUT = 1_000_000_007  # added to the seed, modulo 2**32: another set of scenes to validate on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--out", default="runs/tiny_sam3", help="run folder: snapshot, checkpoints, metrics.jsonl, curves.png"
    )
    g.add_argument("--part", default="detector", choices=["detector", "tracker"], help="what is trained")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--steps", type=int, default=1500, help="optimizer steps in all, a resumed part included")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=50, help="steps between printed lines")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--val-every", type=int, default=500, help="steps between validations, each with a checkpoint")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--size", default="96x128", metavar="HxW", help="px of the rendered frames")
    g.add_argument("--frames", type=int, default=6, help="tracker: frames of a clip")
    g.add_argument("--val-items", type=int, default=100, help="pictures or clips to validate on")
    g = p.add_argument_group("optimizer")
    g.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate; cosine to 0")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear rise before the cosine")
    g.add_argument("--weight-decay", type=float, default=0.01, help="AdamW decay of kernels")
    g.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm is clipped here")
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = {"out", "resume", "stop_at", "log", "workers", "print_every", "save_every", "device", "init"}


def check_flags(args) -> list[int]:
    """--size as numbers; UserError for what no run can have, before anything is written."""
    counts = "steps batch_size accum print_every save_every val_every val_items".split()
    run.check_ranges(args, **dict.fromkeys(counts, (1, 10**9)), workers=(0, 256), overfit=(0, EPOCH), frames=(2, 64))
    run.check_ranges(args, lr=(1e-7, 1e-2), warmup=(0, 10**9), weight_decay=(0, 10), clip_grad=(1e-6, 1e6))
    if args.stop_at is not None and args.stop_at < 0:
        raise UserError(f"--stop-at {args.stop_at}: expected 0 or more steps")
    if args.part == "tracker" and not (args.init or args.resume):
        raise UserError("--part tracker: needs the picture encoder of a trained detector; give its folder with --init")
    size = run.numbers("--size", args.size, "x", 2)
    if not 32 <= min(size) <= max(size) <= 1024:
        raise UserError(f"--size {args.size}: expected sides of 32..1024 px")
    return size


def make_model(args) -> tuple[Sam3VideoModel, Sam3VideoProcessor]:
    """The weights of --resume or --init, a checkpoint or snapshot of the tiny architecture, or new ones."""
    tokenizer = tiny_tokenizer()
    config, folder = tiny_config(tokenizer), args.resume or args.init
    model = Sam3VideoModel(config)
    if folder:
        run.read_config(folder)  # says what is wrong with a folder that is none
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
    pictures, videos = picture_processors(config.image_size)
    return model, Sam3VideoProcessor(image_processor=pictures, video_processor=videos, tokenizer=tokenizer)


def choose(part: str, model: Sam3VideoModel) -> list[torch.nn.Parameter]:
    """The parameters that learn; all others are frozen.

    The whole model is in eval mode, that is, without dropout: the tiny one's queries are so alike that dropout alone
    would decide which of them answers, and nothing without it.
    """
    model.requires_grad_(False).eval()
    learns = [model.tracker_model]
    if part == "detector":  # but for the encoder of boxes as prompts
        learns = [m for name, m in model.detector_model.named_children() if name != "geometry_encoder"]
    for module in learns:
        module.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


# ---- losses of a batch


def detector_losses(model, batch: dict, ask: Questions, r) -> tuple[torch.Tensor, dict]:
    """Pictures in one pass, each asked for both targets under names drawn at random."""
    image, masks = batch["image"][:, 0], batch["masks"][:, 0].to(r.device)  # (B, H, W, 3), (B, 2, H, W)
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = detect_pairs(model.detector_model, ask.pixels(image), ask.tokens, ask.draw(len(image)))
    return detection_losses(out, [m[None] if m.any() else m[None][:0] for m in masks.flatten(0, 1)])


def tracker_losses(model, batch: dict, ask: Questions, r) -> tuple[torch.Tensor, dict]:
    """Both targets of each clip are followed; the first frame shows them."""
    objects = batch["masks"].to(r.device).transpose(1, 2).flatten(0, 1)  # (2 B, T, H, W)
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        tokens = ask.picture_tokens(model, batch["image"])
        found = follow_clip(model, tokens, torch.arange(len(objects), device=r.device) // len(TARGETS), objects[:, 0])
    return tracking_losses(found, objects[:, 1:].transpose(0, 1))


# ---- validation


@torch.no_grad()
def found_by_detector(model, x: dict, ask: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks found in one picture, and true ones: (1, 2, H, W) bool."""
    out = detect_pairs(model.detector_model, ask.pixels(x["image"]), ask.tokens, ask.plain(1))
    return best_masks(out, x["masks"].shape[2:], THRESHOLD).cpu()[None], x["masks"]


@torch.no_grad()
def found_by_tracker(model, x: dict, ask: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the frames of one clip after the first, (T - 1, 2, H, W) bool."""
    seeds = x["masks"][0].to(ask.device)
    tokens = ask.picture_tokens(model, x["image"][None])
    found = follow_clip(model, tokens, torch.zeros(len(seeds), dtype=torch.int64, device=ask.device), seeds)
    return followed_masks(found, seeds.shape[1:]).cpu(), x["masks"][1:]


def validate(model, items: RenderedScenes, found_by, ask: Questions) -> tuple[dict, list[np.ndarray]]:
    """Of each target precision and strict recall within NEAR px of the true centre, and mean IoU where it is to be
    seen; the first pictures, or last frames of clips, with what was found."""
    rows, shown = [], []
    for i in range(len(items)):
        x = items[0, i]
        found, truth = found_by(model, x, ask)
        for said, true in zip(found, truth, strict=True):  # a frame: (2, H, W)
            far = [(centre(a) - centre(b)).norm().item() for a, b in zip(said, true, strict=True)]
            rows.append(
                [said.any(2).any(1).tolist(), true.any(2).any(1).tolist(), far, mask_iou(said * 1.0, true).tolist()]
            )
        drawn = x["image"][-1].numpy()
        for k, mask in enumerate(found[-1].numpy()):
            drawn = overlay.mask(drawn, mask, overlay.colour(k)) if mask.any() else drawn
        shown += [drawn] * (len(shown) < SHOWN)
    values = {}
    for name, (said, visible, far, iou) in zip(TARGETS, np.array(rows, float).transpose(2, 1, 0), strict=True):
        right = (far <= NEAR).sum()  # NaN where one of the two masks is empty
        values[f"{name}_precision"] = float(right / max(1, said.sum()))
        values[f"{name}_recall"] = float(right / max(1, visible.sum()))
        values[f"{name}_iou"] = float((iou * visible).sum() / max(1, visible.sum()))
    return values, shown


def centre(mask: torch.Tensor) -> torch.Tensor:
    """y and x of the middle of a mask (H, W), px."""
    return mask.nonzero().float().mean(0)


PARTS = {"detector": (detector_losses, found_by_detector), "tracker": (tracker_losses, found_by_tracker)}


def share_neck(model: Sam3VideoModel) -> None:
    """The tracker's maps of a picture, of the same shape as the detector's, get the detector's weights: it need not
    learn them. In the released model they are trained apart."""
    model.tracker_neck.load_state_dict(model.detector_model.vision_encoder.neck.state_dict())


def write_snapshot(out: Path, model: Sam3VideoModel, processor: Sam3VideoProcessor) -> None:
    """OUT/snapshot: config.json, model.safetensors, processor and tokenizer; the last one gives way to a complete one.

    Weights under the model's own names, as released: save_pretrained doubles "tracker_model." of a model not loaded.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with run.new_folder(out / "snapshot", replace=True) as tmp, run.writing(tmp):
        model.config.save_pretrained(tmp)
        (tmp / "model.safetensors").write_bytes(packed(tensors, {"format": "pt"}))
        processor.save_pretrained(tmp)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    size = check_flags(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)
    if r.ddp:
        raise UserError("torchrun: the tiny SAM3 is trained by one process; start it with python")
    losses_of, found_by = PARTS[args.part]

    # ---- data, model
    frames = args.frames if args.part == "tracker" else 1
    # the clips of the tracker begin with both targets, which vanish soon
    scenes = {"absent": 0, "hiding": 0.7, "seen": (2, frames), "hidden": (1, 4)} if frames > 1 else {}
    train_set = RenderedScenes(RenderedBall(args.seed, size, **scenes), args.overfit or EPOCH, frames, args.overfit > 0)
    val_set = train_set
    if not args.overfit:
        other = RenderedBall((args.seed + HELD_OUT) % 2**32, size, **scenes)
        val_set = RenderedScenes(other, args.val_items, frames, fixed=True)
    model, processor = make_model(args)
    params = choose(args.part, model.to(r.device))
    ask = Questions(processor, [TEXTS[name] for name in TARGETS], r.device)

    # ---- optimizer
    kernels = [p for p in params if p.ndim > 1]
    others = [p for p in params if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=args.lr)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    step, best = 0, -math.inf
    if args.resume:
        state = run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE)
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
    stop = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    out = run.open_folder(r, args, anew)
    run.rewind_metrics(out, step)
    batches = run.StepBatches(len(train_set), args.batch_size, step, stop, args.seed, accum=args.accum)
    loader = iter(
        DataLoader(train_set, batch_sampler=batches, num_workers=args.workers, worker_init_fn=run.ignore_sigterm)
    )
    run.say(
        r, f"# {sum(p.numel() for p in params):,} of {sum(p.numel() for p in model.parameters()):,} parameters learn"
    )

    def save(is_best: bool = False) -> None:
        share_neck(model)
        if not all(p.isfinite().all() for p in params):
            raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
        state = {"optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "best": best, "args": vars(args)}
        run.save_checkpoint(out, step, model, model.config.to_dict(), state | {"world": r.world}, best=is_best)

    # ---- loop
    run.watch_sigterm(r)
    guard, values = LossGuard(out), {}
    bar = tqdm(total=args.steps, initial=step, disable=not sys.stderr.isatty(), leave=False)
    began, since, saved = time.perf_counter(), step, step if args.resume else -1
    while step < stop and not run.should_stop(r):
        lr = check_rate(schedules.cosine(step, args.steps, args.lr, args.warmup), step)
        for group in opt.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in params] if step == 0 else None
        total: dict = {}
        for a in range(args.accum):
            batch = next(loader)
            run.seed_all(run.step_seed(args.seed, step, a))
            loss, parts = losses_of(model, batch, ask, r)
            scaler.scale(loss / args.accum).backward()
            for k, v in {"loss": loss, **parts}.items():
                total[k] = total.get(k, 0.0) + v.detach() / args.accum
            warning = guard.note(step + 1, loss.detach(), batch)
            if warning:
                run.say(r, warning)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip_grad)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if before is not None and not scaler.is_enabled():
            check_changed(before, params, step)
        if step % args.print_every == 0 or step == 1:  # .item() waits for the GPU, so only here
            shown = dict(zip(total, torch.stack(list(total.values())).tolist(), strict=True))
            speed = (step - since) * args.batch_size * args.accum / (time.perf_counter() - began)
            run.report(r, out, step, args.steps, **shown, lr=lr, grad=norm.item(), items_per_s=speed)
            began, since = time.perf_counter(), step
        if step % args.val_every == 0 or step == args.steps:
            guard.check()
            values, pictures = validate(model, val_set, found_by, ask)
            run.report(r, out, step, args.steps, **values)
            overlay.save_png(out / "val.png", overlay.grid(pictures, 4))
            score = min(values.values())
            better, best = score >= best, max(best, score)
            save(better)
            write_snapshot(out, model, processor)
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
    if run.read_metrics(out):
        run.write_metrics_csv(out)
        curves(out / "metrics.jsonl", out / "curves.png")
    if r.stop_asked:
        run.say(r, f"# SIGTERM: saved step {step} in {out}/last; continue with --resume {out}/last")
    where = "training scenes" if args.overfit else f"{len(val_set)} unseen scenes"
    last = ", ".join(f"{k} {v:.3f}" for k, v in values.items())
    run.finish(r, args, "SAM3", f"tiny SAM3's {args.part}, step {step}, {where}: {last or 'not validated'}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
