"""Train Sa2VA to outline vessels on request: LoRA on the language model, projection and mask decoder.

python train/train_sa2va.py --data datasets/chase_db1 --tiny --steps 3000 --out runs/sa2va_tiny    # random, 15 min, CPU
torchrun --nproc_per_node=8 train/train_sa2va.py --data datasets/fives --init weights/sa2va_4b --policy bf16 \\
    --dtype bf16 --patch-size 512 --batch-size 2 --accum 4 --workers 8 --recompute --out runs/sa2va_fives
torchrun --nproc_per_node=8 train/train_sa2va.py --data datasets/fives --init weights/sa2va_8b --policy bf16 \\
    --dtype bf16 --patch-size 512 --batch-size 1 --accum 8 --workers 8 --recompute --fsdp --out runs/sa2va_fives_8b

ROOT is a set in its owner's layout, or a manifest.jsonl (data/vessels.py). Each step asks about random patches: for the
vessels, for the background, for both in one answer, for things that are not there. --init is a complete checkpoint
(released ones: models/convert_sa2va.py). Checkpoints then hold what was trained and name the base by its hash; the last
step also writes OUT/merged, a complete checkpoint. With --full and --tiny every checkpoint is complete. Validation is
on whole photographs from overlapping crops of the patches' size, as eval/infer_vessels.py does it.
"""

import argparse
import gc
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.vessel_items import VesselItem
from data.vessel_questions import BACKGROUND, VesselQuestions, answer, question
from data.vessels import FORMATS, VesselPatches, open_vessels
from models.sa2va import TRAINED, Sa2VA
from models.sa2va_lora import (
    BESIDE_LORA,
    LoraSpec,
    add_lora,
    base_files,
    check_precision,
    fill,
    new_rows,
    open_sa2va,
    read_adapter,
    train_groups,
)
from models.sa2va_losses import TARGETS, LossConfig
from models.sa2va_training import WithLosses, known_of, new_tiny, write_checkpoint
from models.sa2va_validation import validate
from utils import overlay, run, schedules
from utils.plots import curves
from utils.run import UserError
from utils.training_guards import LossGuard, check_changed, check_rate
from utils.weights import file_sha256


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument("--out", default="runs/sa2va", help="run folder: checkpoints, metrics.jsonl, curves.png")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--steps", type=int, default=2000, help="optimizer steps in all, a resumed part included")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=8, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=50, help="steps between printed lines")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--val-every", type=int, default=250, help="steps between validations, each with a checkpoint")
    g.add_argument("--val-images", type=int, default=4, help="photographs of a validation at most")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, metavar="ROOT", help="folder of a vessel set, or a manifest.jsonl")
    g.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="layout of --data")
    g.add_argument("--split-at", type=int, default=None, metavar="N",
                   help="chase, stare, hrf: last number that is for training (default: the set's own)")  # fmt: skip
    g.add_argument("--val", default="", metavar="P,P,..", help="patients of the training split kept for validation")
    g.add_argument("--polygons", action="store_true", help="manifest: accept polygons, and measure what they hide")
    g.add_argument("--patch-size", type=int, default=None,
                   help="px of the training patches' sides; 0: whole pictures (default: 512, --tiny 64)")  # fmt: skip
    g.add_argument("--look", default="picture", choices=["picture", "patch"],
                   help="what the language model sees; prediction from crops shows it the picture")  # fmt: skip
    g.add_argument("--kinds", default="55,35,5,5", metavar="O,B,S,A",
                   help="shares of questions for objects, background, several at once, absent things")  # fmt: skip
    g = p.add_argument_group("model")
    g.add_argument("--tiny", action="store_true", help="a tiny random model, all of whose parts are trained")
    g.add_argument("--policy", default="fp32", choices=["fp32", "bf16", "fp16"],
                   help="type of the language model's frozen weights; what is trained is float32")  # fmt: skip
    g.add_argument("--rank", type=int, default=128, help="of LoRA on the language model")
    g.add_argument("--alpha", type=float, default=256.0, help="LoRA's scale times its rank")
    g.add_argument("--lora-dropout", type=float, default=0.05, help="on the input of the LoRA layers")
    g.add_argument("--full", action="store_true", help="train the whole language model, without LoRA")
    g.add_argument("--train-vision", action="store_true", help="train the language model's picture encoder as well")
    g.add_argument("--train-hiera", action="store_true",
                   help="train SAM 2's image encoder as well (--tiny does: a random one sees nothing)")  # fmt: skip
    g.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, a third more time")
    g.add_argument("--fsdp", action="store_true", help="torchrun: shard weights and optimizer over the processes")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--bce", type=float, default=2.0, help="weight of the masks' binary cross-entropy")
    g.add_argument("--dice", type=float, default=0.5, help="weight of the masks' dice loss")
    g.add_argument("--cldice", type=float, default=0.0, help="weight of the soft-clDice loss")
    g.add_argument("--target", default="mask", choices=TARGETS,
                   help="compare masks at the patch's resolution, or at the logits' by nearest or by area")  # fmt: skip
    g.add_argument("--points", type=int, default=0, help="compare at so many points of a mask (0: everywhere)")
    g.add_argument(
        "--parity", action="store_true", help="losses as released: --target grid, samples repeated to 5 masks"
    )
    g.add_argument("--lr", type=float, default=None, help="peak; cosine to 0 (default: 4e-5, --tiny 7e-4)")
    g.add_argument("--beta2", type=float, default=None, help="of AdamW (default: 0.999, --tiny 0.95)")
    g.add_argument("--warmup", type=int, default=None, help="steps of linear rise (default: 1/20 of the run)")
    g.add_argument("--weight-decay", type=float, default=0.05, help="AdamW decay of matrices and kernels")
    g.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm is clipped here")
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = set("out resume stop_at log workers print_every save_every device data init recompute".split())


def check_flags(args) -> dict[str, float]:
    """--kinds as shares; UserError for what no run can have, before anything is written."""
    counts = "steps batch_size accum print_every save_every val_every val_images rank".split()
    run.check_ranges(args, **dict.fromkeys(counts, (1, 10**9)), workers=(0, 256), overfit=(0, 10**9))
    if args.patch_size is None:
        args.patch_size = 64 if args.tiny else 512
    run.check_ranges(args, patch_size=(0, 8192), alpha=(1e-6, 1e6), lora_dropout=(0, 0.999), points=(0, 10**6))
    run.check_ranges(args, bce=(0, 100), dice=(0, 100), cldice=(0, 100), weight_decay=(0, 10), clip_grad=(1e-6, 1e6))
    if args.beta2 is not None:
        run.check_ranges(args, beta2=(0, 0.99999))
    for name in ("warmup", "stop_at"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more steps")
    if (args.init is None) == (not args.tiny) and not args.resume:
        raise UserError("--init and --tiny: expected one of them, a checkpoint to start from or a tiny random model")
    if args.val and args.overfit:
        raise UserError("--val: --overfit trains and evaluates on the same pictures; leave one of them out")
    if args.policy != "fp32" and (args.tiny or args.full):
        raise UserError(f"--policy {args.policy}: what is trained is float32, and here it is all; leave it out")
    if args.policy not in ("fp32", args.dtype):
        raise UserError(f"--policy {args.policy}: computes in that type; give --dtype {args.policy} as well")
    if args.fsdp and args.dtype == "fp16":
        raise UserError("--fsdp: the loss scale of --dtype fp16 does not know shards; use --dtype bf16 or fp32")
    if args.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp: there is one process only; start with torchrun --nproc_per_node=N, or leave it out")
    if args.parity and args.target == "area":
        raise UserError("--parity: the released losses have --target grid; leave --target out")
    shares = run.numbers("--kinds", args.kinds, ",", 4)
    if not sum(shares):
        raise UserError(f"--kinds {args.kinds}: expected at least one share above 0")
    return dict(zip(("object", "background", "several", "absent"), shares, strict=True))


# ---- data


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


class Samples(Dataset):
    """Questions about patches as items of Sa2VAProcessor.collate; a function of (seed, epoch, index) alone.

    look picture: the language model sees the whole photograph and SAM 2 the patch, as when crops are predicted. What
    lies elsewhere in the photograph is then answered with a mask, which is empty in this patch.
    """

    def __init__(self, questions: VesselQuestions, processor, look: str):
        self.questions, self.patches, self.processor, self.look = questions, questions.patches, processor, look
        self.tiles: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        x, encode = self.questions[key], self.processor.encode
        if self.look == "patch":
            return encode(x["image"], x["text"], x["answer"], x["masks"])
        record, said, masks = self.patches.loaded(key[1] % len(self.patches.items)), x["answer"], x["masks"]
        if not len(masks) and x["kind"] != "absent":
            elsewhere = x["phrases"] == [BACKGROUND] or record["mask"].any()
            said, masks = (answer(1), np.zeros((1, *x["fov"].shape), bool)) if elsewhere else (said, masks)
        seen = self.one_tile(key[1] % len(self.patches.items), record["image"])
        return encode(seen, x["text"], said, masks, sam_images=[x["image"]])

    def one_tile(self, k: int, image: np.ndarray) -> np.ndarray:
        """The photograph; where the language model sees one tile of it, that tile, resized once and not every time."""
        cfg = self.processor.cfg
        if cfg.arch != "internvl" or cfg.max_tiles > 1:
            return image
        if k not in self.tiles:
            self.tiles[k] = np.array(Image.fromarray(image).resize((cfg.tile, cfg.tile), Image.BICUBIC))
        return self.tiles[k]


# ---- model


def asked(items: list[VesselItem]) -> tuple[str, ...]:
    """The question for the first object of each record, and at last the one for the background."""
    return tuple(question(x) for x in [*([item.text[0]] for item in items), [BACKGROUND]])


def make_model(args, items: list[VesselItem]) -> tuple[Sa2VA, LoraSpec | None, dict, dict]:
    """Model with gradients where it is trained; LoRA's spec (None: all is trained); its base; counts per group."""
    groups = [*(TRAINED if args.full or args.tiny else BESIDE_LORA)]
    groups += ["vision encoder"] * (args.train_vision or args.tiny) + ["SAM image encoder"] * (
        args.train_hiera or args.tiny
    )
    start, spec, base, tensors = args.resume or args.init, None, {}, None
    if args.full or args.tiny:
        model = open_sa2va(start) if start else new_tiny(args.seed, asked(items))
    elif args.resume:
        tensors, spec, base = read_adapter(args.resume, args.init)
        model = Sa2VA.from_checkpoint(base["folder"], args.policy)
        add_lora(model, spec)
    else:
        model = Sa2VA.from_checkpoint(args.init, args.policy)
        base = {"folder": str(args.init), "sha256": base_files(args.init)}
        spec = LoraSpec(args.rank, args.alpha, args.lora_dropout, new_rows(model))
        add_lora(model, spec)
    counts = train_groups(model, groups)
    if tensors is not None:
        fill(model, tensors, args.resume)
    check_precision(model, args.policy)
    if args.recompute:
        model.mllm.gradient_checkpointing_enable({"use_reentrant": False})
    return model, spec, base, counts


def shard(net: WithLosses, r) -> None:
    """FSDP2: every layer of the language model and of its picture encoder is a unit, the rest is the root's."""
    mesh = init_device_mesh(r.device.type, (r.world,))
    inner = net.model.mllm.model
    eyes = inner.vision_tower.encoder.layer if hasattr(inner, "vision_tower") else inner.visual.blocks
    for layer in [*inner.language_model.layers, *eyes]:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shares = check_flags(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)

    # ---- data, model
    train, val = load_items(args, r)
    model, spec, base, counts = make_model(args, train)
    model.to(r.device)
    known = known_of(args.resume or args.init)
    seen = {x["sha256"]: x for x in known.get("train_images") or []}
    seen |= {x["sha256"]: x for x in ({"name": i.name, "sha256": file_sha256(i.image_path)} for i in train)}
    config = model.config_dict() | {"threshold": None, "train_images": list(seen.values())}
    patches = VesselPatches(train, args.patch_size or None, args.seed, objects=True)
    train_set = Samples(VesselQuestions(patches, shares), model.processor, args.look)
    for group, n in counts.items():
        run.say(r, f"# trained: {n:>13,} {group}")
    run.say(r, f"# {sum(counts.values()):,} trained of {sum(p.numel() for p in model.parameters()):,} parameters")
    shown_val = val[: args.val_images]

    # ---- optimizer
    target = "grid" if args.parity else args.target
    balance = "official5" if args.parity else "mask"
    net = WithLosses(model, LossConfig(1.0, args.bce, args.dice, args.cldice, target, args.points, balance))
    if args.fsdp:
        shard(net, r)
    elif r.ddp:
        net = DDP(net, device_ids=[r.device.index] if r.device.type == "cuda" else None, broadcast_buffers=False)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    peak, beta2 = (getattr(args, k) if getattr(args, k) is not None else (x if args.tiny else y)
                   for k, x, y in (("lr", 7e-4, 4e-5), ("beta2", 0.95, 0.999)))  # fmt: skip
    opt = torch.optim.AdamW(groups, lr=peak, betas=(0.9, beta2))
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    step, best, options = 0, -math.inf, whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if args.resume:
        state = run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE)
        if args.fsdp:
            whole.set_optimizer_state_dict(model, opt, state["optimizer"], options=options)
        else:
            opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best = state["step"], state["best"]
        config["threshold"] = known["threshold"]
    stop = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    warmup = args.steps // 20 if args.warmup is None else args.warmup
    out = run.open_folder(r, args, anew)
    if r.main:
        run.rewind_metrics(out, step)
    batches = run.StepBatches(len(train_set), args.batch_size, step, stop, args.seed, r.rank, r.world, args.accum)
    load = {"num_workers": args.workers, "worker_init_fn": run.ignore_sigterm, "collate_fn": model.processor.collate}
    loader = iter(DataLoader(train_set, batch_sampler=batches, **load))

    def save(is_best: bool = False) -> None:
        weights, moments = model.state_dict(), opt.state_dict()
        if args.fsdp:  # every rank takes part, and rank 0 gets them
            weights = whole.get_model_state_dict(model, options=options)
            moments = whole.get_optimizer_state_dict(model, opt, options=options)
        if r.main:
            if not all(v.isfinite().all() for v in weights.values()):
                raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
            state = {"optimizer": moments, "scaler": scaler.state_dict(), "best": best, "args": vars(args)}
            folder = write_checkpoint(out, step, model, weights, spec, base, config, state | {"world": r.world})
            run.publish(out, folder, is_best)

    # ---- loop
    run.watch_sigterm(r)
    model.train()
    guard, values = LossGuard(out, rank=r.rank), {}
    bar = tqdm(total=args.steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    began, since, saved = time.perf_counter(), step, step if args.resume else -1
    while step < stop and not run.should_stop(r):
        lr = check_rate(schedules.cosine(step, args.steps, peak, warmup), step)
        for group in opt.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in params] if step == 0 else None
        total: dict = {}
        for a in range(args.accum):
            run.seed_all(run.step_seed(args.seed, step, a * r.world + r.rank))
            batch, last = next(loader), a == args.accum - 1
            if args.fsdp:
                net.set_requires_gradient_sync(last)
            with net.no_sync() if r.ddp and not (args.fsdp or last) else nullcontext():
                with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
                    loss, parts = net(batch)
                scaler.scale(loss / args.accum).backward()
            total = {k: total.get(k, 0.0) + v.float() / args.accum for k, v in parts.items()}
            warning = guard.note(step + 1, loss.detach(), batch)
            if warning:
                run.say(r, warning)
        scaler.unscale_(opt)
        norm = nn.utils.clip_grad_norm_(params, args.clip_grad)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        if before is not None and not scaler.is_enabled():
            check_changed(before, params, step)
        if step % args.print_every == 0 or step == 1:  # .item() waits for the GPU, so only here
            means = torch.stack([v.to(r.device) for v in total.values()])
            if r.ddp:
                dist.all_reduce(means)
            shown = dict(zip(total, (means / r.world).tolist(), strict=True))
            speed = (step - since) * args.batch_size * args.accum * r.world / (time.perf_counter() - began)
            norm = norm.full_tensor() if args.fsdp else norm
            run.report(r, out, step, args.steps, **shown, lr=lr, grad=norm.item(), items_per_s=speed)
            began, since = time.perf_counter(), step
        if step % args.val_every == 0 or step == args.steps:
            guard.check()
            better = False
            if args.fsdp:
                net.unshard()
            if r.main or args.fsdp:  # shards of the layers lie on all ranks
                values, pictures = validate(model, shown_val, asked(shown_val), args.patch_size)
                config["threshold"] = values["threshold"]
                better = val is train or values["dice_at_half"] > best
                best = values["dice_at_half"] if better else best
            if args.fsdp:
                net.reshard()
            if r.main:
                run.report(r, out, step, args.steps, **values)
                overlay.save_png(out / "val.png", overlay.grid(pictures, 1))
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
    if r.main and step == args.steps and spec is not None:
        shutil.rmtree(out / "merged", ignore_errors=True)
        whole_model = open_sa2va(out / "last", args.policy)
        whole_model.save(out / "merged", **{k: config[k] for k in ("threshold", "train_images")})
    if r.main and run.read_metrics(out):
        run.write_metrics_csv(out)
        curves(out / "metrics.jsonl", out / "curves.png")
    if r.stop_asked:
        run.say(r, f"# SIGTERM: saved step {step} in {out}/last; continue with --resume {out}/last")
    del net  # DDP holds the process group; freed after it, its destructor can wait for ever for gloo's thread
    gc.collect()
    where = "training pictures" if val is train else "validation pictures"
    last = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
    run.finish(r, args, "Sa2VA", f"Sa2VA, step {step}, {where}: {last or 'not validated'}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
