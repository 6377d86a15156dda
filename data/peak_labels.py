"""Clips of labelled sport videos, for PEAK (one event per clip) and SPOT (any number).

The videos are read as they are (mp4, no extraction of pictures); the labels are E2E-Spot json (data/peak_files.py).
Crop and resize happen while decoding. An item is a function of (seed, epoch, index) alone.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.cutaways import cutaway, transition
from data.video import VideoInfo, VideoReader, iter_frames
from data.video_index import check_geometry
from utils.run import UserError

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")


def find_video(folder: Path | str, name: str) -> Path:
    """folder/<name>.<video suffix>. UserError names the folder and how many videos it holds."""
    for suffix in (*SUFFIXES, *(s.upper() for s in SUFFIXES)):  # cameras write .MP4
        if (Path(folder) / f"{name}{suffix}").is_file():
            return Path(folder) / f"{name}{suffix}"
    n = sum(p.suffix.lower() in SUFFIXES for p in Path(folder).glob("*"))
    raise UserError(f"{folder}: no video {name}.mp4 (or .mkv, .mov, ..) among its {n} videos; check --videos")


def scale_crop(crop, crop_of, video_size) -> tuple[int, int, int, int] | None:
    """crop (x, y, w, h) px of a video of size crop_of (W, H) -> the same part of a video of size video_size (W, H)."""
    if crop is None:
        return None
    x, y, w, h = crop
    (W, H), (w_of, h_of) = video_size, crop_of
    left, top, right, bottom = (round(v) for v in (x * W / w_of, y * H / h_of, (x + w) * W / w_of, (y + h) * H / h_of))
    return left, top, right - left, bottom - top


class PeakClips(Dataset):
    """`n` clips of T frames an epoch, cut anew from the videos in every epoch.

    labels: videos of `load_labels`; folder: where they lie; classes: names, class k+1 is classes[k], other labels are
    left out. frames: optional (start, stop), only clips inside it are cut. A share `events` of the clips holds an event
    (drawn evenly over the events, the event anywhere in the clip), the others hold none. single: clips with two or more
    events are never drawn (PEAK). augment: flip, shift, light, alike for all frames of a clip.

    Item: frames uint8 (T, 3, H, W) RGB, zero after `length`; length int64; events int64 (E, 4) rows [frame in clip,
    class 1..K, lo, hi], unused rows -1; peak, lo, hi int64 of the first event, -1 without one; video, start int64.
    """

    def __init__(
        self, labels, folder, classes, T, size, crop=None, *, n=1000, events=0.8, single=False, frames=None, seed=0,
        augment=False, flip=True, shift=0.06, light=0.3, splice=0.0, cache_gb=2.0, frames_flag="--frames",
        crop_of=None,
    ):  # fmt: skip
        self.T, self.size, self.n, self.seed = T, tuple(size), n, seed
        self.share, self.augment, self.flip, self.shift, self.light = events, augment, flip, shift, light
        self.splice = splice if augment else 0.0
        self.paths = [find_video(folder, v["video"]) for v in labels]
        self.readers: dict[int, VideoReader] = {}
        self.recent: list[int] = []
        self.store: dict[int, np.ndarray] = {}
        self.bounds, self.events = [], []  # per video: (first, stop), events as an array (E, 4) in video frames
        self.infos: list[VideoInfo] = []
        self.crops, self.crop_of = [], crop_of  # crop_of: W, H whose pixels `crop` counts (None: of the first video)
        for item, path in zip(labels, self.paths, strict=True):
            with VideoReader(path) as reader:
                count, video_size = len(reader), (reader.info.width, reader.info.height)
                self.infos.append(reader.info)
            self.crop_of = self.crop_of or video_size
            self.crops.append(scale_crop(crop, self.crop_of, video_size))
            check_geometry(reader.info, size, self.crops[-1])
            known = [e for e in item["events"] if e["label"] in classes]
            late = [e["frame"] for e in known if e["frame"] >= count]
            if late:
                raise UserError(f"{path}: has {count} frames, but its labels name frame {max(late)}; wrong file?")
            if count != item["num_frames"]:
                raise UserError(f"{path}: has {count} frames, its labels say {item['num_frames']}; wrong file?")
            start, stop = frames or (0, count)
            if not 0 <= start < min(stop, count):
                raise UserError(f"{frames_flag} {start}:{stop}: {path} has {count} frames; choose a range inside")
            self.bounds.append((start, min(stop, count)))
            rows = [(e["frame"], 1 + classes.index(e["label"]), *interval(e)) for e in known]
            rows = sorted(r for r in rows if start <= r[0] < self.bounds[-1][1])
            self.events.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
        # a video that is not fully annotated for these classes cannot tell what holds no event
        self.complete = [set(classes) <= set(v.get("complete_for", classes)) for v in labels]
        self._list_starts(single)
        W, H = self.size
        self.cached = sum(b - a for a, b in self.bounds) * W * H * 3 <= cache_gb * 2**30
        total = sum(map(len, self.events))
        print(
            f"# {len(labels)} videos, {sum(b - a for a, b in self.bounds)} frames, {total} events of {classes}; "
            f"{len(self.by_event)} can be the event of a clip, {len(self.empty)} clips hold none"
        )

    def _list_starts(self, single: bool) -> None:
        """by_event: (video, starts) of the clips that hold each event; empty: (M, 2) of (video, start) without any."""
        self.by_event, empty, self.most = [], [], 1
        for v, (rows, (first, stop)) in enumerate(zip(self.events, self.bounds, strict=True)):
            starts = np.arange(first, max(first, stop - self.T) + 1)
            inside = (rows[:, 0] >= starts[:, None]) & (rows[:, 0] < starts[:, None] + self.T)  # (S, E)
            count = inside.sum(1)
            self.most = max(self.most, int(count.max()))
            if self.complete[v]:
                empty += [(v, s) for s in starts[count == 0]]
            good = count == 1 if single else count >= 1
            chosen = [starts[inside[:, e] & good] for e in range(len(rows))]
            self.by_event += [(v, s) for s in chosen if len(s)]
        self.empty = np.array(empty, dtype=np.int64).reshape(-1, 2)
        if self.share > 0 and not self.by_event:
            raise UserError("no clip holds an event of the asked classes; check --classes, --frames and the labels")
        if self.share < 1 and not len(self.empty):
            raise UserError("every clip holds an event, so none can serve as background; use --event-share 1")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, index])
        if rng.random() < self.share:
            v, starts = self.by_event[rng.integers(len(self.by_event))]
            start = int(rng.choice(starts))
        else:
            v, start = map(int, self.empty[rng.integers(len(self.empty))])
        item = self.clip(v, start, rng if self.augment else None)
        if self.splice and rng.random() < self.splice:
            item = self._cut(item, rng)
        return item

    def clip(self, v: int, start: int, rng: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        """The clip of video number v that begins at `start`; augmented with rng if one is given."""
        length = min(self.T, self.bounds[v][1] - start)
        x = torch.from_numpy(self._frames(v, start, start + length)).permute(0, 3, 1, 2)  # (length, 3, H, W)
        x = x.contiguous() if rng is None else augment(x, rng, self.flip, self.shift, self.light)
        frames = x.new_zeros(self.T, *x.shape[1:])
        frames[:length] = x
        rows = self.events[v]
        rows = rows[(rows[:, 0] >= start) & (rows[:, 0] < start + length)] - [start, 0, start, start]
        events = torch.full((self.most, 4), -1)
        events[: len(rows)] = torch.from_numpy(rows)
        peak, _, lo, hi = events[0]
        return {
            "frames": frames, "length": torch.tensor(length), "events": events, "peak": peak, "lo": lo, "hi": hi,
            "video": torch.tensor(v), "start": torch.tensor(start),
        }  # fmt: skip

    def _cut(self, item: dict, rng: np.random.Generator) -> dict:
        """The clip with a cut to, or from, a scene without events; in a quarter of the draws nothing but that scene."""
        frames, T = item["frames"], len(item["frames"])
        if item["length"] < T:
            return item
        kind = rng.random()
        if kind < 0.3 and len(self.empty):
            other = self.clip(*map(int, self.empty[rng.integers(len(self.empty))]), rng)["frames"]
        elif kind < 0.65:
            other = self._detail(rng)
        else:
            other = cutaway(frames, rng)
        cut, first = int(rng.integers(1, T)), bool(rng.random() < 0.5)
        if rng.random() < 0.25:
            cut, first = 0, True
            shown = torch.zeros(T, 1, 1, 1)
        else:
            shown = transition(T, *frames.shape[2:], cut, first, rng)  # (T, 1, H, W)
        mixed = (shown * frames + (1 - shown) * other).round().to(torch.uint8)
        at = item["events"][:, 0]
        stays = (at >= 0) & ((at < cut) == first)
        events = torch.full_like(item["events"], -1)
        events[: int(stays.sum())] = item["events"][stays]
        peak, _, lo, hi = events[0]
        return {**item, "frames": mixed, "events": events, "peak": peak, "lo": lo, "hi": hi}

    def _detail(self, rng: np.random.Generator) -> torch.Tensor:
        """T frames of a small part of a whole picture, at least 1.7 times as large as the model sees the game."""
        v = int(rng.integers(len(self.paths)))
        info, (first, stop) = self.infos[v], self.bounds[v]
        whole = self.crops[v] or (0, 0, info.width, info.height)
        w = max(8, round(whole[2] * rng.uniform(0.12, 0.6)))
        h = min(info.height, max(8, round(w * self.size[1] / self.size[0])))
        x, y = int(rng.integers(info.width - w + 1)), int(rng.integers(info.height - h + 1))
        start = int(rng.integers(first, max(first, stop - self.T) + 1))
        pictures = iter_frames(self.paths[v], size=self.size, crop=(x, y, w, h), threads=1, start=start, stop=stop)
        images = [frame.image for frame in itertools.islice(pictures, self.T)]
        images += [images[-1]] * (self.T - len(images))
        out = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (T, 3, H, W)
        return augment(out, rng, self.flip, self.shift, self.light)

    def _frames(self, v: int, start: int, stop: int) -> np.ndarray:
        """uint8 (N, H, W, 3), from memory where the whole set fits into cache_gb, else by random access."""
        if not self.cached:
            if v not in self.readers:
                self.readers[v] = VideoReader(self.paths[v], size=self.size, crop=self.crops[v], threads=1)
            self.recent = [k for k in self.recent if k != v] + [v]
            if len(self.recent) > 16:  # open files; a closed reader keeps its index and opens again when asked
                self.readers[self.recent.pop(0)].close()
            return self.readers[v].read(range(start, stop))
        if v not in self.store:
            first, last = self.bounds[v]
            pictures = iter_frames(self.paths[v], size=self.size, crop=self.crops[v], start=first, stop=last)
            self.store[v] = np.stack([frame.image for frame in pictures])
        return self.store[v][start - self.bounds[v][0] : stop - self.bounds[v][0]].copy()


class FirstItems(Dataset):
    """The first n items of a data set, the same in every epoch (--overfit)."""

    def __init__(self, dataset: Dataset, n: int):
        self.dataset, self.n = dataset, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        return self.dataset[key[1] if isinstance(key, tuple) else key]


def interval(event: dict) -> tuple[int, int]:
    """First and last frame judged possible; the frame itself where the label has no lo, hi."""
    return event.get("lo", event["frame"]), event.get("hi", event["frame"])


def augment(x: torch.Tensor, rng: np.random.Generator, flip: bool, shift: float, light: float) -> torch.Tensor:
    """One draw for all frames. x uint8 (T, 3, H, W) -> same: mirror with probability 1/2, move by up to `shift` of the
    size (edges repeat), brightness and contrast by up to +-light, saturation likewise."""
    H, W = x.shape[2:]
    if flip and rng.random() < 0.5:
        x = x.flip(3)
    dy, dx = (int(round(rng.uniform(-shift, shift) * n)) for n in (H, W))
    x = x[:, :, (torch.arange(H) + dy).clamp(0, H - 1)][:, :, :, (torch.arange(W) + dx).clamp(0, W - 1)]
    bright, contrast, colour = 1 + rng.uniform(-light, light, 3)
    if light:
        y = x.float()
        grey = y.mean(1, keepdim=True)  # (T, 1, H, W)
        y = grey + colour * (y - grey)
        level = y.mean()
        x = (level * bright + contrast * (y - level)).round().clamp(0, 255).to(torch.uint8)
    return x.contiguous()
