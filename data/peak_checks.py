"""The checklists of peak labels with their videos and of rendered rallies as printed lines and refusals, and the
picture of clips as training sees them. args: those of data/check_dataset.py.
"""

import time
from collections import Counter
from pathlib import Path

import numpy as np

from data.peak_files import class_names, load_labels
from data.peak_labels import PeakClips, find_video
from data.rally import LABELS, Rally
from data.video import VideoReader, duplicates
from utils import overlay, run
from utils.run import UserError

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
