"""The checklist of videos with masks as printed lines and refusals, and the sheet of clips and of whole videos.

args: those of data/check_dataset.py.
"""

import time
from pathlib import Path

import numpy as np

from data.coco_instances import CocoInstances
from data.coco_panoptic import CocoPanoptic
from data.davis import Davis, read_splits
from data.pseudo_video import PseudoVideo
from data.segment_batch import Prompts, SegmentItems, View
from data.segment_checks import annotation_files, describe, draw_clips, spread
from data.video_clips import Clips, Video, VideoSource, read_frame
from data.vipseg import Vipseg
from data.ytvis import YtVis
from utils import overlay
from utils.run import UserError, numbers
from utils.segmentation_files import png_size

VIDEO_FORMATS = ("davis", "ytvis", "vipseg", "pseudo_video")
DECODED = 8  # clips of a task that are counted


def check_videos(args) -> np.ndarray | None:
    """The whole list, and the sheet if --show asks for one."""
    sources = open_sources(args)
    for source in sources:
        print(source.summary())
        if args.format == "pseudo_video":
            describe(source.source, args.limit, args.image_size)
        else:
            describe_videos(source, args.limit)
        describe_clips(source, args)
    if not args.show:
        return None
    sheets = [draw_clips(sources[0], args, args.batch_size)] if len(sources[0]) else []
    if args.format != "pseudo_video":
        sheets.append(draw_videos(sources[0], args))
    width = max(s.shape[1] for s in sheets)
    wide = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=overlay.DARK[0]) for s in sheets]
    return np.concatenate(wide)


# ---- files


def open_sources(args) -> list:
    """The sources that FORMAT and ROOT name, one per split."""
    if args.root is None:
        raise UserError(f"FORMAT {args.format} needs ROOT: the annotation file or its folder; --help says which")
    stride = numbers("--stride", args.stride, ",", 2)
    if not 1 <= stride[0] <= stride[1]:
        raise UserError(f"--stride {args.stride}: expected LOW,HIGH with 1 <= LOW <= HIGH")
    root, clips, one = Path(args.root), Clips(args.clip_len, stride), args.split
    if args.format == "davis":
        splits = [one] if one else sorted(read_splits(root, args.year)) or [None]
        return [Davis(root, split, args.year, clips, args.seed) for split in splits]
    if args.format == "vipseg":
        there = [s for s in ("train", "val") if any((f / f"{s}.txt").is_file() for f in (root, root.parent))]
        return [Vipseg(root, split, clips, args.seed) for split in ([one] if one else there or [None])]
    if args.format == "ytvis":
        return [YtVis(path, args.images, clips, args.seed) for path in ytvis_files(root, one)]
    kinds = {"panoptic": CocoPanoptic, "instances": CocoInstances}
    found = "instances" if root.stem.startswith("instances") else "panoptic"
    paths = annotation_files(root, found, one)
    return [PseudoVideo(kinds[found](p, args.images), args.clip_len, seed=args.seed) for p in paths]


def ytvis_files(root: Path, split: str | None) -> list[Path]:
    """root itself if it is a file, else the json files in it or its annotations/; UserError when there is none."""
    if not root.is_dir():
        return [root]
    found = sorted(root.glob("annotations/*.json")) or sorted(root.glob("*.json"))
    chosen = [p for p in found if split is None or split in p.stem]
    if not chosen:
        there = ", ".join(p.name for p in found) or "none"
        wanted = "a json" + (f" of split {split}" if split else "")
        raise UserError(f"{root}: expected {wanted}, here or in annotations/, found {there}; name the file itself")
    return chosen


# ---- the checklist


def same_size(video: Video) -> None:
    """UserError for a frame of another size than its video, from the heads of the files alone."""
    for path in video.files:
        if png_size(path) != video.size:
            read_frame(path, video.size)


def describe_videos(source: VideoSource, limit: int) -> None:
    """Look at the sizes of all frames and read the masks of `limit` videos (0: all), print what they hold. UserError
    for the first that cannot be read."""
    chosen = [source.video(n) for n in spread(len(source.names), limit)]
    clock, objects, late, back, off = time.perf_counter(), [], 0, 0, []
    for video in chosen:
        same_size(video)
        if source.name == "davis":
            off += [path for path in source.masks[video.number].values() if png_size(path) != video.size]
        seen = video.timeline() if video.annotated else {}
        order = {t: k for k, t in enumerate(video.annotated)}
        objects.append(len(seen))
        late += sum(frames[0] > 0 for frames in seen.values())
        back += sum(any(order[b] - order[a] > 1 for a, b in zip(f, f[1:], strict=False)) for f in seen.values())
    sizes, lengths = sorted({v.size for v in chosen}), [len(v) for v in chosen]
    print(
        f"{len(chosen)} of {len(source.names)} videos read, {min(lengths)}..{max(lengths)} frames of "
        f"{sizes[0][1]}..{max(s[1] for s in sizes)} x {sizes[0][0]}..{sizes[-1][0]} px (W x H), "
        f"{time.perf_counter() - clock:.1f} s; objects per video {min(objects)}/{np.median(objects):g}/{max(objects)} "
        f"(min/median/max), {late} enter after the first frame, {back} are away for a while"
    )
    if off:
        print(f"{len(off)} masks are 1 px off the size of their frames and are stretched to it, as {off[0]}")


def describe_clips(source, args) -> None:
    """Decode DECODED clips at most and print what each task makes of them."""
    if not len(source):
        print("no clips: no video has a mask for every frame")
        return
    chosen, side = spread(len(source), DECODED), args.image_size
    for task in source.tasks:
        clock, items = time.perf_counter(), SegmentItems(source, task, View(side, side), Prompts(number=0))
        targets = [len(items[index]["ids"]) for index in chosen]
        ms = 1e3 * (time.perf_counter() - clock) / len(chosen)
        print(
            f"{task}, {len(chosen)} of {len(source)} clips of {args.clip_len} frames, shown whole at {side} px: "
            f"{min(targets)}/{np.median(targets):g}/{max(targets)} targets (min/median/max), {targets.count(0)} clips "
            f"without, {ms:.1f} ms each"
        )


# ---- the sheet


def draw_videos(source: VideoSource, args) -> np.ndarray:
    """A row per video, --batch-size of them: frames on which things are first marked, and others evenly spread."""
    cells, names = [], []
    for n in spread(len(source.names), args.batch_size):
        video = source.video(n)
        seen = video.timeline() if video.annotated else {}
        entries = sorted({frames[0] for frames in seen.values()})[: args.columns]
        others = [t for t in spread(len(video), args.columns) if t not in entries]
        shown = sorted([*entries, *others[: args.columns - len(entries)]])
        for t in shown + [None] * (args.columns - len(shown)):
            cell, name = draw_frame(video, t, sorted(seen), args.image_size)
            new = [i for i, frames in seen.items() if frames[0] == t]
            cells.append(cell)
            names.append(name + (f", first of {', '.join(map(str, new))}" if new else ""))
    return overlay.grid(cells, args.columns, names)


def draw_frame(video: Video, t: int | None, ids: list[int], side: int) -> tuple[np.ndarray, str]:
    """A frame, its larger side at most `side` px, with its things in the colours of their places in ids, and what
    stands below it. t None: an empty cell."""
    H, W = video.size
    step = -(-max(H, W) // side)
    if t is None:
        return np.full((-(-H // step), -(-W // step), 3), overlay.DARK, np.uint8), ""
    image = np.ascontiguousarray(next(video.frames(t, t + 1))[::step, ::step])
    masks = video.source.things(video.segments([t])).of(0) if t in video.annotated else {}
    for i, mask in masks.items():
        image = overlay.mask(image, np.ascontiguousarray(mask[::step, ::step]), overlay.colour(ids.index(i)))
    return image, f"{video.name} {t}" + ("" if t in video.annotated else " (no mask)")
