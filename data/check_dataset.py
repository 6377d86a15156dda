"""Look at a data set before training on it: counts, the first problem as one sentence, and a picture of a batch.

python data/check_dataset.py peaks labels.json --videos videos/                         # decodes every video once
python data/check_dataset.py peaks labels/ --videos videos/ --size 224x224 --task spot --show sheet.png
python data/check_dataset.py rally --level hard --show sheet.png                        # rendered clips, seconds
python data/check_dataset.py captions datasets/coco --ids m2_annotations/ --show sheet.png --batch-size 16

FORMAT peaks: E2E-Spot json, one file or a folder of them. FORMAT rally: rendered when asked for, so it has no ROOT.
FORMAT captions: a COCO folder (2014 or 2017), or a folder with a csv of columns image,caption, as of Flickr8k.
The picture holds the first batch of training with the same flags: a row per clip, the frames around its peak; captions:
images as the network sees them, with the labels of their patches, and the captions after encoding.
Flags that both scripts have mean the same and have the same defaults.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.caption_checks import check_captions
from data.caption_files import SPLITS
from data.coco_captions import ImageReader
from data.peak_files import class_names, load_labels
from data.peak_labels import PeakClips, find_video
from data.rally import LABELS, Rally
from data.video import VideoReader, duplicates
from utils import overlay, run
from utils.run import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("format", metavar="FORMAT", choices=["peaks", "rally", "captions"], help="peaks, rally or captions")
    p.add_argument("root", metavar="ROOT", nargs="?",
                   help="peaks: label file (E2E-Spot json) or folder of label files; captions: folder")  # fmt: skip
    p.add_argument("--videos", default=None, help="folder of the videos that the label files name")
    p.add_argument("--show", default=None, metavar="PNG", help="write a picture of the first training batch here")
    p.add_argument("--columns", type=int, default=9, help="frames per clip in the picture")
    p.add_argument("--limit", type=int, default=32,
                   help="rally: clips rendered and counted; captions: images decoded per split (0: all)")  # fmt: skip
    p.add_argument(
        "--no-duplicates", action="store_true", help="do not decode whole videos to look for repeated frames"
    )
    g = p.add_argument_group("captions; the first four as in train/train_fsgr.py")
    g.add_argument("--ids", default=None, help="folder of coco_{train,restval,dev,test}_ids.npy: annotation ids")
    g.add_argument("--karpathy", default=None, metavar="JSON", help="dataset_coco.json of the Karpathy splits")
    g.add_argument("--vocab", default=None, metavar="JSON", help="vocabulary file (default: words of the train split)")
    g.add_argument("--min-freq", type=int, default=5, help="a word of a new vocabulary occurs at least so often")
    g.add_argument("--split", default=None, choices=SPLITS, help="check this split only (default: all that exist)")
    g.add_argument("--image-size", type=int, default=224, help="side of the square that the network sees, pixels")
    g.add_argument("--resize", default="squash", choices=["squash", "crop"], help="squash it, or cut its centre out")
    g = p.add_argument_group("as in train/train.py")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    g.add_argument("--classes", default=None, help="comma-separated labels to learn (default: all in --data)")
    g.add_argument("--frames", default=None, metavar="A:B", help="train on frames A..B-1 of every video")
    g.add_argument("--clips", type=int, default=1000, help="clips per epoch")
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
    g.add_argument("--task", default="peak", choices=["peak", "spot"],
                   help="peak: one frame per clip; spot: K classes per frame")  # fmt: skip
    g.add_argument("--no-peak", action="store_true", help="peak: one more logit for 'no peak in this clip'")
    return p.parse_args(argv)


# ---- peaks: the labels


def read_root(root: str | None) -> list[dict]:
    """The videos of a label file, or of all *.json in a folder. UserError for a video that occurs in two files."""
    if root is None:
        raise UserError("FORMAT peaks needs ROOT: a label file (E2E-Spot json) or a folder of label files")
    paths = sorted(Path(root).glob("*.json")) if Path(root).is_dir() else [Path(root)]
    if not paths:
        raise UserError(f"{root}: this folder holds no *.json; give the label file or the folder of the label files")
    items, source = [], {}
    for path in paths:
        for video in load_labels(path):
            other = source.setdefault(video["video"], path)
            if other != path:
                raise UserError(
                    f"{path}: video '{video['video']}' stands in {other} as well; give one of the two files"
                )
            items.append(video)
    return items


def choose_classes(items: list[dict], text: str | None) -> list[str]:
    known = class_names(items)
    chosen = text.split(",") if text else known
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise UserError(f"--classes {','.join(unknown)}: not among the labels {', '.join(known)}")
    if not chosen:
        raise UserError("the labels name no class, in no event and in no complete_for; there is nothing to learn")
    return chosen


def event_frames(items: list[dict], classes: list[str], frames: list[int] | None) -> list[tuple[np.ndarray, int, int]]:
    """Per video: sorted frames of the chosen classes inside [first, stop), first, stop."""
    found = []
    for item in items:
        first, stop = frames or (0, item["num_frames"])
        stop = min(stop, item["num_frames"])
        if first >= stop:
            raise UserError(f"--frames {first}:{stop}: video '{item['video']}' has {item['num_frames']} frames")
        at = sorted(e["frame"] for e in item["events"] if e["label"] in classes and first <= e["frame"] < stop)
        found.append((np.array(at, np.int64), first, stop))
    return found


def windows_by_events(found: list[tuple[np.ndarray, int, int]], T: int) -> np.ndarray:
    """How many of all windows of T frames hold 0, 1, 2 and 3 or more events -> int64 (4,)."""
    total = np.zeros(4, np.int64)
    for at, first, stop in found:
        starts = np.arange(first, max(first, stop - T) + 1)  # (S,), as in PeakClips
        count = np.searchsorted(at, starts + T) - np.searchsorted(at, starts)  # (S,)
        total += np.bincount(count.clip(max=3), minlength=4)
    return total


def never_alone(found: list[tuple[np.ndarray, int, int]], T: int) -> int:
    """Events that no window of T frames holds without another event: PEAK never sees them."""
    n = 0
    for at, first, stop in found:
        starts = np.arange(first, max(first, stop - T) + 1)
        low, high = np.searchsorted(at, starts), np.searchsorted(at, starts + T)  # (S,)
        n += len(at) - len(set(low[high - low == 1].tolist()))
    return n


def verdict(found: list[tuple[np.ndarray, int, int]], T: int) -> str:
    """Whether one peak per clip of T frames (PEAK) is a sound question for these events."""
    windows = windows_by_events(found, T)
    if windows[1:].sum() == 0:
        return "there are no events of these classes: nothing to learn"
    if windows[2:].sum():
        share = 100 * windows[2:].sum() / windows[1:].sum()
        gaps = [int(g) for at, _, _ in found for g in np.diff(at)]
        shorter = f"; PEAK would need --clip-len {min(gaps)} or less" if min(gaps) > 1 else ""
        return (
            f"--task spot: {share:.1f} % of the windows with events hold two or more, and {never_alone(found, T)} of "
            f"{sum(len(at) for at, _, _ in found)} events are never alone in one{shorter}"
        )
    if windows[0]:
        return "--task peak --no-peak (or spot): no window holds two events, but some hold none"
    return "--task peak: every window holds exactly one event"


def describe_labels(items: list[dict], classes: list[str], found: list, T: int) -> None:
    """Counts, gaps, windows and the verdict on standard output."""
    seconds = sum(v["num_frames"] / v["fps"] for v in items if v["fps"] > 0)
    frames = sum(v["num_frames"] for v in items)
    print(f"{len(items)} videos, {frames} frames, {seconds:.1f} s, {sum(len(v['events']) for v in items)} events")
    sizes = [f"{v['width']}x{v['height']}" for v in items]
    for key, values in (("fps", [f"{v['fps']:.6g}" for v in items]), ("size", sizes)):
        print(f"{key}: " + ", ".join(f"{value} ({n} videos)" for value, n in Counter(values).most_common()))
    print(f"{'class':28s} {'events':>7s} {'videos':>7s} {'with lo..hi':>12s}")
    for name in class_names(items):
        mine = [(v["video"], e) for v in items for e in v["events"] if e["label"] == name]
        row = f"{name:28s} {len(mine):7d} {len({v for v, _ in mine}):7d} {sum('lo' in e for _, e in mine):12d}"
        print(row + ("" if name in classes else "   left out (--classes)"))
    for v in items:
        lacks = sorted(set(classes) - set(v.get("complete_for", classes)))
        if lacks:
            print(f"note: '{v['video']}' is not complete for {', '.join(lacks)}; clips without these may hold them")
    gaps = np.concatenate([np.diff(at) for at, _, _ in found])
    if len(gaps):
        low, mid, high = np.percentile(gaps, [0, 50, 100])
        print(f"gaps between events (frames): smallest {low:.0f}, median {mid:.0f}, largest {high:.0f}, n {len(gaps)}")
    windows = windows_by_events(found, T)
    shares = ", ".join(
        f"{k}: {100 * n / windows.sum():.1f} %" for k, n in zip("0 1 2 3+".split(), windows, strict=True)
    )
    print(f"windows of {T} frames by number of events: {shares} (n {windows.sum()})")
    print(f"verdict: {verdict(found, T)}")


# ---- peaks: the videos


def check_video(item: dict, path: Path, look_for_duplicates: bool) -> str:
    """One line about the file. UserError where it contradicts its labels."""
    with VideoReader(path) as reader:
        info, count, vfr = reader.info, len(reader), reader.vfr
    late = [e["frame"] for e in item["events"] if e["frame"] >= count]
    if late:
        raise UserError(f"{path}: has {count} frames, but its labels name frame {max(late)}; wrong file?")
    if count != item["num_frames"]:
        raise UserError(f"{path}: has {count} frames, its labels say num_frames {item['num_frames']}; wrong file?")
    if (info.width, info.height) != (item["width"], item["height"]):
        said = f"{item['width']}x{item['height']}"
        raise UserError(f"{path}: is {info.width}x{info.height} px, its labels say {said}; wrong file or wrong labels")
    if item["fps"] > 0 and abs(info.fps - item["fps"]) > 0.01:
        raise UserError(
            f"{path}: runs at {info.fps:.6g} fps, its labels say {item['fps']:.6g}; wrong file or wrong labels"
        )
    line = f"{path.name}: {count} frames, {info.width}x{info.height}, {info.fps:.6g} fps"
    line += f"{' VARIABLE (vfr)' if vfr else ''}, {info.codec}, {len(item['events'])} events"
    if look_for_duplicates:
        twice = duplicates(path)
        some = ", ".join(map(str, twice[:5])) + (", .." if len(twice) > 5 else "")
        line += f", {len(twice)} duplicated frames" + (f" ({some})" if twice else "")
    return line


def peaks_data(args, size: list[int], crop: list[int] | None) -> tuple[PeakClips | None, list[str]]:
    """Check and describe labels and videos -> (training set if --show asks for one, class names)."""
    items = read_root(args.root)
    classes = choose_classes(items, args.classes)
    frames = run.numbers("--frames", args.frames, ":", 2)
    describe_labels(items, classes, event_frames(items, classes, frames), args.clip_len)
    if args.videos is None:
        if args.show:
            raise UserError("--show needs --videos, the folder of the videos that the labels name")
        print("videos: not looked at (no --videos)")
        return None, classes
    paths = [find_video(args.videos, v["video"]) for v in items]
    for item, path in zip(items, paths, strict=True):
        print(check_video(item, path, not args.no_duplicates), flush=True)
    if not args.show:
        return None, classes
    if args.splice and args.task == "peak" and not args.no_peak:
        raise UserError("--splice can cut the peak away; it needs --task spot or --no-peak")
    data = PeakClips(
        items, args.videos, classes, args.clip_len, size, crop, n=args.clips, events=args.event_share,
        single=args.task == "peak", frames=frames, seed=args.seed, augment=not args.no_augment, flip=not args.no_flip,
        splice=args.splice,
    )  # fmt: skip
    return data, classes


# ---- rally


def rally_data(args, size: list[int]) -> tuple[Rally, list[str]]:
    """Render and count some clips -> (training set, class names)."""
    if args.root or args.videos:
        raise UserError(f"{args.root or args.videos}: FORMAT rally is rendered; it takes neither ROOT nor --videos")
    if args.clip_len < 8:
        raise UserError(f"--clip-len {args.clip_len}: rendered clips have at least 8 frames")
    data = Rally(
        args.clips, args.seed, num_frames=args.clip_len, size=tuple(size), no_peak=0.2 if args.no_peak else 0.0,
        level=args.level, shuffle_frames=args.shuffle_frames,
    )  # fmt: skip
    n = min(args.limit, args.clips)
    kinds, contacts, rates, peaks, times_s = Counter(), Counter(), Counter(), [], []
    for index in range(n):
        clock = time.perf_counter()
        item = data[index]
        times_s.append(time.perf_counter() - clock)
        rows = item["events"][item["events"][:, 0] >= 0]
        kinds.update(LABELS[k - 1] for k in rows[:, 1].tolist())
        contacts[min(len(rows), 3)] += 1
        rates[f"{item['fps'].item():.6g}"] += 1
        peaks += [item["peak"].item()] if item["peak"] >= 0 else []
    print(f"{n} of {args.clips} clips rendered: " + ", ".join(f"{kinds[name]} {name}" for name in LABELS))
    print("contacts in a clip: " + ", ".join(f"{k}: {contacts[i]}" for i, k in enumerate("0 1 2 3+".split())))
    quarters = np.bincount(np.array(peaks, np.int64) * 4 // args.clip_len, minlength=4)
    print(f"clips without a peak: {n - len(peaks)}; peaks in the four quarters of the clip: {quarters.tolist()}")
    print("fps: " + ", ".join(f"{rate} ({k} clips)" for rate, k in sorted(rates.items())))
    mid, high = 1e3 * np.median(times_s), 1e3 * max(times_s)
    print(
        f"time per rendered clip: median {mid:.0f} ms, longest {high:.0f} ms ({1e3 / mid:.1f} clips/s in one process)"
    )
    return data, list(LABELS)


# ---- picture


def first_batch(data: PeakClips | Rally, args) -> list[dict]:
    """The items of the first training step, in the order of its batch."""
    keys = next(iter(run.StepBatches(len(data), args.batch_size, 0, 1, args.seed)))
    return [data[key] for key in keys]


def frames_to_show(item: dict, columns: int) -> list[int]:
    """Consecutive frames around the peak (else the first event); without any, spread evenly over the clip."""
    T = int(item["length"])
    columns, centre = min(columns, T), int(item["peak"])
    if centre < 0 and item["events"][0, 0] >= 0:
        centre = int(item["events"][0, 0])
    if centre < 0:
        return np.linspace(0, T - 1, columns).round().astype(int).tolist()
    first = min(max(centre - columns // 2, 0), T - columns)
    return list(range(first, first + columns))


def draw_batch(items: list[dict], classes: list[str], names: list[str] | None, columns: int, task: str) -> np.ndarray:
    """Contact sheet uint8 (H, W, 3), a row per clip; frames with an event glow. names: of the videos, or None."""
    scale = max(1, -(-128 // items[0]["frames"].shape[-1]))  # whole pixels, so that nothing is smoothed
    columns = min([columns, *(int(item["length"]) for item in items)])
    images, captions = [], []
    for k, item in enumerate(items):
        labels: dict[int, list[str]] = {}
        for frame, label, *_ in item["events"].tolist():
            if frame >= 0:
                labels.setdefault(frame, []).append(classes[label - 1])
        whole = f"clip {k}: {sum(map(len, labels.values()))} events"
        if names:
            whole += f", {names[int(item['video'])]} from frame {int(item['start'])}"
        for column, t in enumerate(frames_to_show(item, columns)):
            image = item["frames"][t].permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)  # (H, W, 3)
            words = [str(t), *["PEAK"] * (task == "peak" and t == int(item["peak"])), *labels.get(t, [])]
            words += [f"({whole})"] * (column == 0)
            images.append(overlay.flash(image) if t in labels else image)
            captions.append(" ".join(words))
    return overlay.grid(images, columns, captions)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for flag in ("columns", "limit", "batch_size", "clips", "clip_len"):
        least = 0 if flag == "limit" and args.format == "captions" else 1
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least {least}")
    run.check_ranges(args, min_freq=(1, 10**9), image_size=(16, 8192))
    size, crop = run.numbers("--size", args.size, "x", 2), run.numbers("--crop", args.crop, ",", 4)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected at least 0")
    if min(size) < 1:
        raise UserError(f"--size {args.size}: both sides must be at least 1 pixel")
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=args.seed), argv)

    # ---- data
    if args.format == "captions":
        reader, show = ImageReader(args.image_size, args.resize), args.batch_size if args.show else 0
        picture = check_captions(args.root, args.split, args.ids, args.karpathy, args.vocab, args.min_freq,
                                 args.limit, reader, show, args.seed)  # fmt: skip
    elif args.format == "rally":
        data, classes = rally_data(args, size)
    else:
        data, classes = peaks_data(args, size, crop)

    # ---- result
    if args.show:
        names = [path.name for path in data.paths] if args.format == "peaks" else None
        if args.format != "captions":
            picture = draw_batch(first_batch(data, args), classes, names, args.columns, args.task)
        Path(args.show).parent.mkdir(parents=True, exist_ok=True)
        overlay.save_png(args.show, picture)
        run.say(r, f"picture of the first training batch: {args.show}")
    print("no problem found")


if __name__ == "__main__":
    sys.exit(run.cli(main))
