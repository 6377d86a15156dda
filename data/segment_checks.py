"""The checklist of segmented data sets as printed lines and refusals, and the sheet of a batch as training sees it.

args: those of data/check_dataset.py.
"""

import time
from collections import Counter
from pathlib import Path

import numpy as np

from data.cityscapes import Cityscapes
from data.coco_instances import CocoInstances
from data.coco_panoptic import CocoPanoptic
from data.moving_shapes import MovingShapes
from data.refcoco import RefCoco, read_refs
from data.sa1b import Sa1b
from data.segment_batch import PROMPTED, Prompts, SegmentCollate, SegmentItems, View, training_view
from utils import overlay
from utils.run import StepBatches, UserError
from utils.segmentation_files import check_segments

FORMATS = ("panoptic", "instances", "cityscapes", "sa1b", "refcoco", "moving_shapes")
CELL = 224  # px that a picture of the sheet has at least
ON, BESIDE, IGNORED = (90, 230, 130), (255, 92, 92), (120, 128, 138)
SHOWN = Prompts(
    number=6, kinds={"point": 0.4, "point+negative": 0.2, "box": 0.2, "mask": 0.2}
)  # so few can be told apart


def check_segmentation(args) -> np.ndarray | None:
    """The whole list, and the sheet if --show asks for one."""
    sources = open_sources(args)
    for source in sources:
        print(source.summary())
        describe(source, args.limit, args.image_size)
    if not args.show:
        return None
    sheets = [draw_pictures(sources[0], args)]
    if args.format == "moving_shapes":
        clips = MovingShapes(args.clips, args.seed, args.image_size, args.clip_len)
        print(clips.summary())
        sheets.append(draw_clips(clips, args))
    width = max(s.shape[1] for s in sheets)
    wide = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=overlay.DARK[0]) for s in sheets]
    return np.concatenate(wide)


# ---- files


def open_sources(args) -> list:
    """The sources that FORMAT and ROOT name, one per split."""
    if args.format == "moving_shapes":
        if args.root or args.images or args.split:
            given = args.root or args.images or args.split
            raise UserError(
                f"{given}: FORMAT moving_shapes is rendered; it takes neither ROOT nor --images nor --split"
            )
        if args.image_size < 32:
            raise UserError(f"--image-size {args.image_size}: rendered shapes have at least 32 px")
        return [MovingShapes(args.clips, args.seed, args.image_size)]
    if args.root is None:
        raise UserError(f"FORMAT {args.format} needs ROOT: the annotation file or its folder; --help says which")
    root = Path(args.root)
    if args.format == "sa1b":
        return [Sa1b(root, args.images)]
    if args.format == "cityscapes":
        there = [s for s in ("train", "val", "test") if (root / "gtFine" / s).is_dir() or s == args.split]
        return [Cityscapes(root, s) for s in there if args.split in (None, s)] or [Cityscapes(root)]
    if args.format == "refcoco":
        path = annotation_files(root, "refs", None)[0]
        splits = [args.split] if args.split else sorted({r["split"] for r in read_refs(path)})
        return [RefCoco(path, s, images=args.images) for s in splits]
    kind = CocoPanoptic if args.format == "panoptic" else CocoInstances
    return [kind(path, args.images) for path in annotation_files(root, args.format, args.split)]


def annotation_files(root: Path, kind: str, split: str | None) -> list[Path]:
    """root itself if it is a file, else the <kind>*.json in its annotations/, or in itself; of refs exactly one.

    UserError when there is none, or none of the split.
    """
    if not root.is_dir():
        return [root]
    found = sorted(root.glob(f"annotations/{kind}*.json")) or sorted(root.glob(f"{kind}*.json"))
    chosen = [p for p in found if split is None or split in p.stem.removeprefix(kind)]
    if not chosen or (kind == "refs" and len(chosen) > 1):
        there = ", ".join(p.name for p in found) or "none"
        wanted = f"one {kind}*.json" if kind == "refs" else f"{kind}_*.json" + (f" of split {split}" if split else "")
        raise UserError(f"{root}: expected {wanted}, here or in annotations/, found {there}; name the file itself")
    return chosen


# ---- the checklist


def spread(n: int, limit: int) -> list[int]:
    """`limit` of the numbers 0..n-1 (0: all), evenly spaced."""
    return np.linspace(0, n - 1, n if limit == 0 else min(limit, n)).round().astype(int).tolist()


def describe(source, limit: int, side: int) -> None:
    """Decode `limit` scenes (0: all), print what they hold and what each task makes of them. UserError for the first
    that cannot be read or contradicts its annotations."""
    chosen, clock = spread(len(source), limit), time.perf_counter()
    sizes, segments, crowds, void, seen = [], [], 0, [], Counter()
    for index in chosen:
        if source.name == "coco_panoptic":
            check_numbers(source, source.image_ids[index])
        scene = source.scene(0, index)
        sizes.append(scene.image.shape[:2])
        segments.append(len(scene.ids))
        crowds += int(scene.crowd.sum())
        void.append(0.0 if scene.void is None else float(scene.void.mean()))
        seen.update(source.classes[k] for k in scene.labels.tolist() if k >= 0)
    ms = 1e3 * (time.perf_counter() - clock) / len(chosen)
    low, high = np.min(sizes, 0), np.max(sizes, 0)
    print(
        f"{len(chosen)} of {len(source)} images decoded, {low[1]}..{high[1]} x {low[0]}..{high[0]} px (W x H), "
        f"{ms:.1f} ms each; segments per image {min(segments)}/{np.median(segments):g}/{max(segments)} (min/median/max), "
        f"{crowds} crowds, {100 * np.mean(void):.1f} % void"
    )
    if source.classes:
        common = ", ".join(f"{name} {n}" for name, n in seen.most_common(8))
        print(f"classes: {len(seen)} of {len(source.classes)} seen; commonest: {common}")
    for task in source.tasks:
        items = SegmentItems(source, task, View(side, side), Prompts(number=0))
        targets = [len(items[index]["ids"]) for index in chosen]
        print(
            f"{task}, shown whole at {side} px: {min(targets)}/{np.median(targets):g}/{max(targets)} targets "
            f"(min/median/max), {targets.count(0)} images without"
        )


def check_numbers(source: CocoPanoptic, image_id: int) -> None:
    """UserError unless the PNG holds just the segments of the json, each with the area it has there."""
    png = source.pngs / source.files[image_id]
    numbers, pixels = np.unique(source.numbers(image_id), return_counts=True)
    counted = dict(zip(numbers.tolist(), pixels.tolist(), strict=True))
    table = source.tables[image_id]
    segments = {i: {"category_id": source.category_ids[k]} for i, k, _, _ in table.tolist()}
    check_segments(png, counted, segments, dict.fromkeys(source.category_ids))
    for i, _, _, area in table.tolist():
        if counted[i] != area:
            raise UserError(
                f"{png}: segment {i} has {counted[i]} px, its json says {area}; take PNG and json of one set"
            )


# ---- the sheet


def batch_of(source, task: str, args, n: int) -> dict:
    """The first batch of n items that training would make of a source and task."""
    side = args.image_size
    view = training_view(task, side, side, 0.0 if args.no_flip else 0.5)
    if args.no_augment or source.name == "moving_shapes":  # rendered scenes vary by themselves
        view = View(side, side)
    items = SegmentItems(source, task, view, SHOWN, args.seed)
    return SegmentCollate((side, side))([items[k] for k in next(iter(StepBatches(len(items), n, 0, 1, args.seed)))])


def draw_pictures(source, args) -> np.ndarray:
    """A row per picture, a column per task of the source; four pictures in a row where there is one task."""
    batches = [batch_of(source, task, args, args.batch_size) for task in source.tasks]
    cells = [draw_item(batch, b, source.classes) for b in range(args.batch_size) for batch in batches]
    names = [label(batch, b, source.classes) for b in range(args.batch_size) for batch in batches]
    return overlay.grid(cells, len(batches) if len(batches) > 1 else 4, names)


def draw_clips(source, args, n: int = 1) -> np.ndarray:
    """n rows per task of clips: frames evenly spread over the clips of its first batch."""
    columns, cells, names = min(args.columns, args.clip_len), [], []
    for task in source.tasks:
        batch = batch_of(source, task, args, n)
        for b in range(n):
            for t in spread(args.clip_len, columns):
                cells.append(draw_item(batch, b, source.classes, t))
                names.append(f"frame {t}" + (f" ({label(batch, b, source.classes)})" if t == 0 else ""))
    return overlay.grid(cells, columns, names)


def label(batch: dict, b: int, classes: list[str]) -> str:
    """What stands below a picture of the sheet."""
    said = "; ".join(batch["text"][b]) if "text" in batch else ""
    names = Counter(classes[k] for k in batch["labels"][b].tolist() if k >= 0)
    said = said or ", ".join(f"{n} {name}" if n > 1 else name for name, n in names.items())
    return f"{batch['task']} {batch['image_id'][b]}: {len(batch['ids'][b])} targets" + (f": {said}" if said else "")


def draw_item(batch: dict, b: int, classes: list[str], frame: int | None = None) -> np.ndarray:
    """One picture of a batch, padding and all: targets tinted, ignored pixels grey, prompts drawn: clicks on a target
    green, beside it red. uint8, enlarged by whole pixels. frame: of a clip, prompts on its first."""
    of = (lambda x: x) if frame is None else (lambda x: x[..., frame, :, :])
    image = batch["image"][b] if frame is None else batch["image"][b, frame]
    times = -(-CELL // image.shape[-1])

    def enlarged(mask) -> np.ndarray:
        return mask.numpy().repeat(times, 0).repeat(times, 1)

    out = image.permute(1, 2, 0).numpy().repeat(times, 0).repeat(times, 1)
    out = overlay.mask(out, enlarged(of(batch["ignore"][b])), IGNORED, 0.7, outline=False)
    for q, mask in enumerate(of(batch["masks"][b])):
        prompted = batch["task"] in PROMPTED and bool(batch["has_mask"][b][q]) and not frame
        shown = mask | batch["mask_prompts"][b][q] if prompted else mask
        out = overlay.mask(out, enlarged(shown), overlay.colour(q), 0.6 if prompted else 0.35)
    for q, mask in enumerate(of(batch["masks"][b])):
        k = int(batch["labels"][b][q])
        if k >= 0 and mask.any():
            y, x = (times * v.float().median().item() for v in mask.nonzero(as_tuple=True))
            out = overlay.text(out, (x, y), classes[k], overlay.colour(q), 10, "mm")
    return out if batch["task"] not in PROMPTED or frame else draw_prompts(out, batch, b, times)


def draw_prompts(out: np.ndarray, batch: dict, b: int, times: int) -> np.ndarray:
    """Boxes in the colour of their target, clicks as small squares."""
    for q, (x0, y0, x1, y1) in enumerate(batch["boxes"][b].tolist()):
        if batch["has_box"][b][q]:
            box = (x0 * times, y0 * times, (x1 + 1) * times - 1, (y1 + 1) * times - 1)
            out = overlay.box(out, box, overlay.colour(q))
    for points, labels in zip(batch["points"][b], batch["point_labels"][b].tolist(), strict=True):
        for (x, y), kind in zip(((points + 0.5) * times).tolist(), labels, strict=True):
            if kind >= 0:
                out = overlay.box(out, (x - 2, y - 2, x + 2, y + 2), ON if kind else BESIDE)
    return out
