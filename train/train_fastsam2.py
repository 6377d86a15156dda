"""Train FastSAM2 on several image tasks at once: panoptic (and so instance and semantic), interactive, referring.

python train/train_fastsam2.py --data shapes --backbone resnet18 --out runs/shapes              # rendered; README: settings
python train/train_fastsam2.py --data panoptic=coco/annotations/panoptic_train2017.json --imagenet resnet50.pth \\
    --clip weights/clip-vit-large-patch14 --size 736x1280 --batch-size 2 --dtype bf16 --workers 8 --out runs/coco
torchrun --nproc_per_node=8 train/train_fastsam2.py --dtype bf16 --batch-size 2 --workers 8 --imagenet resnet50.pth \\
    --clip weights/clip-vit-large-patch14 --size 736x1280 --out runs/mixture --data \\
    panoptic=coco/annotations/panoptic_train2017.json instances=coco/annotations/instances_train2017.json \\
    cityscapes=cityscapes sa1b=sa1b refcoco=refcoco/refs.json refcoco=refcoco+/refs.json refcoco=refcocog/refs.json

A source brings its own tasks, --tasks chooses among them; every task has the same share unless --share says otherwise,
and within a task sources count by size. A micro-batch has one task. Everything that is missing is listed before the
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

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.cityscapes import Cityscapes
from data.coco_instances import CocoInstances
from data.coco_panoptic import CocoPanoptic
from data.moving_shapes import MovingShapes
from data.refcoco import RefCoco
from data.sa1b import Sa1b
from data.segment_batch import IMAGE_TASKS, Prompts, SegmentCollate, SegmentItems, View, training_view
from data.task_mixture import MixtureBatches, TaskMixture
from models.clip import load_clip, load_tokenizer
from models.fastsam2 import BACKBONES, LOGIT_SCALE, TEMPERATURE, FastSAM2, FastSAM2Config, build_vocabulary, hash_texts
from models.fastsam2_options import FUSIONS, KEY_STRIDES, LOOKS, carry_over
from models.panoptic_post import INSTANCE, ImageSize, panoptic, to_original
from models.prompt_fusion import PROMPT_TASKS, PromptBatch
from models.segment_losses import count_masks, distill_losses, segment_losses
from models.segment_scores import NAMES, BatchScores
from models.semantic_head import TEMPLATES, embed_texts
from utils import overlay, run
from utils.click_simulator import next_click
from utils.plots import curves
from utils.run import UserError
from utils.weights import load_strict, read_tensors

FORMATS = {"panoptic": CocoPanoptic, "instances": CocoInstances, "cityscapes": Cityscapes, "sa1b": Sa1b}
FORMATS |= {"refcoco": functools.partial(RefCoco, split="train")}
PART_OF_PANOPTIC = ("instance", "semantic")
LIGHT = 0.2  # how much brighter or darker the averaged weights see a channel
PROMPTS = {"point": 0.5, "box": 0.3, "mask": 0.1, "point+box": 0.1}  # what points at the objects of task interactive


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
    g.add_argument("--val-items", type=int, default=48, help="pictures of each task in a validation")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["shapes"], metavar="FORMAT=PATH",
                   help=f"shapes (rendered), or {', '.join(FORMATS)} with = and a path")  # fmt: skip
    g.add_argument(
        "--val-data", nargs="+", default=None, metavar="FORMAT=PATH", help="likewise (default: shapes alone)"
    )
    g.add_argument(
        "--tasks",
        nargs="+",
        default=None,
        choices=IMAGE_TASKS,
        help="default: what the data have; with panoptic, instance and semantic are read off it",
    )
    g.add_argument(
        "--share", nargs="+", default=[], metavar="TASK=X", help="how often a task is drawn (default 1 each)"
    )
    g.add_argument("--own-tasks", action="store_true", help="ranks draw their tasks apart, not one for all")
    g.add_argument("--size", default="96x96", metavar="HxW", help="pixels that the network sees")
    g.add_argument("--scale", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"),
                   help="resize by a factor of this range (default: 0.8 2, prompted pictures 0.1 2, as RAP-SAM)")  # fmt: skip
    g.add_argument("--prompts", type=int, default=12, help="prompted objects of a picture")
    g.add_argument("--clicks", type=int, default=3, help="interactive: most clicks of an object, 1 off; spec: 7")
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
    g.add_argument("--clip", default=None, help="CLIP snapshot for names and sentences (default: hashed words)")
    g = p.add_argument_group("loss and optimizer")
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
    run.check_ranges(args, ema=(0, 0.999999), distill=(0, 1000), keep_queries=(0, args.queries), key_rank=(0, args.dim))
    run.check_ranges(args, prune_after=(1, FastSAM2Config.stages))
    run.check_ranges(args, overfit=(0, 10**9), logit_scale=(1e-3, 1e4), temperature=(1e-3, 1e3))
    if args.overfit and args.val_data:
        raise UserError("--overfit evaluates on the pictures that it trains on; leave --val-data out")
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
        if task not in IMAGE_TASKS or not value.replace(".", "", 1).isdigit() or float(value) <= 0:
            raise UserError(f"--share {word}: expected TASK=X with X above 0, TASK one of {', '.join(IMAGE_TASKS)}")
        shares[task] = float(value)
    return shares


# ---- data


def open_sources(flag: str, specs: list[str], size: int, seed: int) -> list:
    """The sources of --data. UserError that lists everything which cannot be opened, not only the first."""
    sources, missing = [], []
    for spec in specs:
        kind, _, path = spec.partition("=")
        if kind == "shapes" and not path:
            sources.append(MovingShapes(20_000, seed, size))
        elif kind in FORMATS and path:
            try:
                sources.append(FORMATS[kind](path))
            except UserError as e:
                missing.append(str(e))
        else:
            missing.append(f"{spec}: expected shapes, or FORMAT=PATH with FORMAT one of {', '.join(FORMATS)}")
    if missing:
        raise UserError(f"{flag}: {len(missing)} of {len(specs)} cannot be used: " + "; ".join(missing))
    return sources


def default_tasks(sources) -> list[str]:
    """All tasks that the data have; but with panoptic the tasks that contradict it are read off it, not trained: of
    instance stuff is background, and semantic wants one mask for all things of a class, from the same queries."""
    found = [t for t in IMAGE_TASKS if any(t in s.tasks for s in sources)]
    return [t for t in found if "panoptic" not in found or t not in PART_OF_PANOPTIC]


class Renumbered(Dataset):
    """Items of a source whose classes are `places` (K_source,) in the vocabulary of all sources."""

    def __init__(self, items: SegmentItems, places: list[int]):
        self.items, self.places = items, torch.tensor([*places, -1])  # the last is for -1, no known class

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key) -> dict:
        item = self.items[key]
        return {**item, "labels": self.places[item["labels"]]}


class First(Dataset):
    """The first n items as they are in epoch 0."""

    def __init__(self, items: Renumbered, n: int):
        self.items, self.n = items, min(n, len(items))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key) -> dict:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.n:
            raise IndexError(f"First: item {index} of {self.n}")
        return self.items[0, index]


def make_sets(sources, classes: list[str], tasks, view, prompts: Prompts, seed: int) -> dict[str, Renumbered]:
    """{"task|source number|name": items}; view(task) says how pictures are shown. UserError if a task has no source."""
    sets = {}
    for k, source in enumerate(sources):
        places = [classes.index(name) for name in source.classes]
        for task in source.tasks:
            if task in tasks:
                items = SegmentItems(source, task, view(task), prompts, seed)
                sets[f"{task}|{k}|{source.name}"] = Renumbered(items, places)
    absent = [task for task in tasks if not any(name.startswith(f"{task}|") for name in sets)]
    if absent:
        raise UserError(f"--tasks {' '.join(absent)}: none of the data has it; leave it out or give other --data")
    return sets


def set_shares(sets: dict, shares: dict[str, float]) -> dict[str, float]:
    """Of a task's share, each of its sets gets a part by its size."""
    size = {}
    for name, items in sets.items():
        size[name.split("|")[0]] = size.get(name.split("|")[0], 0) + len(items)
    return {n: shares.get(n.split("|")[0], 1.0) * len(items) / size[n.split("|")[0]] for n, items in sets.items()}


def to_device(batch: dict, device: torch.device) -> dict:
    """Tensors, and lists of tensors, of a batch."""
    moved = dict(batch)
    for k, v in batch.items():
        if isinstance(v, torch.Tensor):
            moved[k] = v.to(device, non_blocking=True)
        elif isinstance(v, list) and v and isinstance(v[0], torch.Tensor):
            moved[k] = [x.to(device, non_blocking=True) for x in v]
    return moved


@torch.no_grad()
def add_clicks(model: FastSAM2, batch: dict, rounds: int, args, r) -> dict:
    """A batch of task interactive with `rounds` more clicks on each object, each where the mask so far is most wrong."""
    batch, was_training = dict(batch), model.training
    model.eval()
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        features = model.encode(batch["image"])
    H, W = batch["image"].shape[-2:]
    for _ in range(rounds):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            prompts = PromptBatch.of(batch).to(r.device)
            found = model.decode(features, model.queries(prompts, features), objects=False)["masks"][-1].float()
        for b, target in enumerate(batch["masks"]):
            made = to_original(found[b, : len(target)], ImageSize((H, W), (H, W), (H, W))).cpu().numpy() > 0
            counts, truth = (~batch["ignore"][b]).cpu().numpy(), target.cpu().numpy()
            clicks = [next_click(t, m, counts) or (0, 0, -1) for t, m in zip(truth & counts, made, strict=True)]
            new = torch.tensor(np.array(clicks, np.float32).reshape(-1, 1, 3), device=r.device)  # (Q, 1, 3)
            batch["points"] = [*batch["points"]]
            batch["point_labels"] = [*batch["point_labels"]]
            batch["points"][b] = torch.cat([batch["points"][b], new[..., :2]], 1)
            batch["point_labels"][b] = torch.cat([batch["point_labels"][b], new[..., 2].long()], 1)
    model.train(was_training)
    return batch


def other_light(images: torch.Tensor) -> torch.Tensor:
    """Bytes (B, 3, H, W) -> floats in [0, 1]; each picture's channels are brighter or darker by up to a fifth."""
    gain = 1 + LIGHT * (2 * torch.rand(len(images), 3, 1, 1, device=images.device) - 1)
    return (gain * images / 255).clamp(0, 1)


def batch_losses(net, batch: dict, num_masks, embed, args, r, teacher: FastSAM2 | None = None) -> dict:
    """Losses of one micro-batch, scalars, forward in autocast, losses in float32; with a teacher, in evaluation, also
    distill, which is part of loss."""
    prompts = PromptBatch.of(batch, embed).to(r.device) if batch["task"] in PROMPT_TASKS else None
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = net(batch["image"], prompts, task=batch["task"])
        losses = segment_losses(out, batch, num_masks, args.points)
        if teacher is not None:
            with torch.no_grad():
                said = teacher(other_light(batch["image"]), prompts, task=batch["task"])
            losses["distill"] = args.distill * sum(distill_losses(out, said, batch, args.points).values())
            losses["loss"] = losses["loss"] + losses["distill"]
    return losses


@torch.no_grad()
def evaluate(model: FastSAM2, loaders: dict, embed, args, r) -> dict[str, float]:
    """A figure for each task, in percent, and their mean as `score`."""
    model.eval()
    values = {}
    for task, loader in loaders.items():
        scores = BatchScores(task, model.cfg.is_thing)
        for batch in loader:
            batch = to_device(batch, r.device)
            prompts = PromptBatch.of(batch, embed).to(r.device) if task in PROMPT_TASKS else None
            with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
                scores.add(model(batch["image"], prompts, task=task), batch)
        values[f"{task} {NAMES[task]}"] = scores.score()
    model.train()
    known = [v for v in values.values() if not math.isnan(v)]
    return values | {"score": sum(known) / max(1, len(known))}


@torch.no_grad()
def draw_validation(model: FastSAM2, dataset, path: Path, args, r, show: int = 12) -> None:
    """PNG of the first validation pictures with their panoptic segments, in colours of the classes."""
    model.eval()
    tiles = []
    for k in range(min(show, len(dataset))):
        image = dataset[k]["image"]
        size = ImageSize(*[tuple(image.shape[-2:])] * 3)
        out = model(image[None].to(r.device), task="panoptic")
        found = panoptic(out["classes"][-1][0], out["masks"][-1][0].float(), model.is_thing, size)["map"].cpu().numpy()
        tile = image.permute(1, 2, 0).numpy()
        for segment in np.unique(found):
            label = int(segment) % INSTANCE
            if label < len(model.cfg.classes):
                tile = overlay.mask(tile, found == segment, overlay.colour(label))
        tiles.append(tile)
    model.train()
    overlay.save_png(path, overlay.grid(tiles, 4))


def build(args, sources, r) -> tuple[FastSAM2, object]:
    """The model with the vocabulary of all sources, and what embeds sentences."""
    classes = list(dict.fromkeys(name for s in sources for name in s.classes))
    things = {name: bool(thing) for s in reversed(sources) for name, thing in zip(s.classes, s.is_thing, strict=True)}
    embed, templates, width = functools.partial(hash_texts, width=128), ("{}",), 128
    if args.clip:
        clip = load_clip(args.clip).to(r.device)
        embed = functools.partial(embed_texts, clip.encode_text, load_tokenizer(args.clip), device=r.device)
        templates, width = TEMPLATES, clip.cfg.embed_dim
    cfg = FastSAM2Config(
        classes=classes, backbone=args.backbone, queries=args.queries, dim=args.dim, hidden=8 * args.dim,
        embed_dim=width, frozen_norm=args.imagenet is not None, keep_queries=args.keep_queries,
        prune_after=args.prune_after, key_rank=args.key_rank, key_stride=args.key_stride, fusion=args.fusion,
        look=args.look, logit_scale=args.logit_scale, temperature=args.temperature,
    )  # fmt: skip
    model = FastSAM2(cfg)
    if args.imagenet:
        model.load_imagenet(args.imagenet)
    source = "clip" if args.clip else "hash"
    model.set_vocabulary(classes, build_vocabulary(classes, embed, templates), [things[c] for c in classes], source)
    return model, embed


def make_validation(args, classes: list[str], tasks: list[str], height: int, width: int, load: dict) -> dict:
    """{task: loader of its first pictures, shown whole}; with panoptic also for what is read off it."""
    val_specs = args.val_data or (["shapes"] if args.data == ["shapes"] else [])
    val_specs, seed = (args.data, args.seed) if args.overfit else (val_specs, 10**6 + args.seed)
    val_sources = open_sources("--val-data", val_specs, min(height, width), seed)
    for source in val_sources:
        strange = [name for name in source.classes if name not in classes]
        if strange:
            raise UserError(f"--val-data: class '{strange[0]}' of {source.name} is in none of --data; give others")
    kinds = Prompts(number=args.prompts, kinds={"point": 0.5, "box": 0.5})
    read_off = PART_OF_PANOPTIC if "panoptic" in tasks else ()
    val_tasks = [t for t in IMAGE_TASKS if (t in tasks or t in read_off) and any(t in s.tasks for s in val_sources)]
    val_sets = make_sets(val_sources, classes, val_tasks, lambda t: View(height, width), kinds, 0) if val_tasks else {}
    loaders = {}
    for name, items in val_sets.items():  # the first source of a task
        part = Subset(items, range(min(len(items), args.overfit or args.val_items)))
        loaders.setdefault(name.split("|")[0], DataLoader(part, batch_size=args.batch_size, **load))
    return loaders


def make_groups(model: FastSAM2, args) -> list[dict]:
    """AdamW's groups; a group's factor multiplies the rate. Norms and biases do not decay."""
    groups: dict[tuple, dict] = {}  # (backbone?, decayed?) -> group; norms and biases do not decay
    for name, p in model.named_parameters():
        key = (name.startswith("backbone."), p.ndim > 1)
        group = {"params": [], "factor": args.backbone_lr if key[0] else 1.0}
        groups.setdefault(key, group | {"weight_decay": args.weight_decay if key[1] else 0.0})["params"].append(p)
    return list(groups.values())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shares = check_flags(args)
    anew = run.find_resume(args)
    r = run.start(args, argv)
    height, width = run.numbers("--size", args.size, "x", 2)

    # ---- data
    sources = open_sources("--data", args.data, min(height, width), args.seed)
    for source in sources:
        run.say(r, f"# {source.summary()}")
    tasks = args.tasks or default_tasks(sources)
    model, embed = build(args, sources, r)
    classes = model.cfg.classes
    numbers = sources[0].category_ids if classes == list(sources[0].classes) else range(1, len(classes) + 1)
    numbers = [int(n) for n in numbers]  # of the classes in the files that prediction writes
    prompts = Prompts(number=args.prompts, kinds=PROMPTS, jitter=0.1, coarse=4)
    how = {"flip": 0.0, "scale": (1.0, 1.0)} if args.overfit else {"scale": args.scale}
    view = functools.partial(training_view, height=height, width=width, **how)
    sets = make_sets(sources, classes, tasks, view, prompts, args.seed)
    if args.overfit:
        sets = {name: First(items, args.overfit) for name, items in sets.items()}
    mixture = TaskMixture(sets)
    load = {"collate_fn": SegmentCollate(), "num_workers": args.workers, "worker_init_fn": run.ignore_sigterm}
    loaders = make_validation(args, classes, tasks, height, width, load)

    # ---- model, optimizer
    model.to(r.device)
    if args.init:
        run.read_config(args.init)
        weights = carry_over(read_tensors(Path(args.init) / "model.safetensors"), model)
        weights["head.classifier"] = model.head.classifier  # the classes are those of --data
        load_strict(model, weights, args.init)
    if r.world > 1 and r.device.type == "cuda" and not model.cfg.frozen_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    opt = torch.optim.AdamW(make_groups(model, args), lr=args.lr)
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
    batches = MixtureBatches(mixture.sizes(), set_shares(sets, shares), args.batch_size, step, stop, args.seed, r.rank,
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
    run.watch_sigterm(r)
    model.train()
    bar = tqdm(total=args.steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    began, since, shown, val, saved = time.perf_counter(), step, {}, {}, step if args.resume else -1
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
                batch = add_clicks(model, batch, int(torch.randint(args.clicks, ()).item()), args, r)
            with net.no_sync() if r.ddp and a < args.accum - 1 else nullcontext():
                teacher = averaged.eval() if args.distill and step >= warm else None
                losses = batch_losses(net, batch, num_masks, embed, args, r, teacher)
                scaler.scale(losses["loss"] / args.accum).backward()
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
            speed = (step - since) * args.batch_size * args.accum * r.world / (time.perf_counter() - began)
            run.report(r, out, step, args.steps, **values, lr=lr, grad=norm.item(), images_per_s=speed)
            began, since, shown = time.perf_counter(), step, {}
        if loaders and (step % args.val_every == 0 or step == stop):
            is_best = False
            if r.main:
                val = evaluate(averaged, loaders, embed, args, r)
                run.report(r, out, step, args.steps, **val)
                if "panoptic" in loaders:
                    draw_validation(averaged, loaders["panoptic"].dataset, out / "val.png", args, r)
                is_best, best, saved = val["score"] > best, max(best, val["score"]), step
                save(is_best)
            began, since = time.perf_counter(), step
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
