"""Videos as training clips and whole: what the sources DAVIS, YouTube-VIS and VIPSeg have in common.

A source of videos is a source for SegmentItems (data/segment_batch.py) of the clip tasks: `scene` is a clip, a function
of (seed, epoch, index). Besides, `video(number)` is a whole one for evaluation: its name, files, frames one after the
other, its masks, and where each object is first marked. FirstMasks shows those frames as pictures.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.coco_captions import open_image
from data.segment_batch import Scene
from utils.picture_files import SUFFIXES
from utils.run import UserError

TRIES = 4  # clips that are drawn before one that begins without an object is taken


@dataclass(frozen=True)
class Clips:
    """How clips are drawn from a video.

    frames: T. stride: frames from one of the clip to the next, drawn evenly from this range, ends included. per_video:
    clips of each video an epoch. backward: share of the clips that run backward. Where a video ends too early, it runs
    back again.
    """

    frames: int = 4
    stride: tuple[int, int] = (1, 3)
    per_video: int = 1
    backward: float = 0.0

    def __post_init__(self):
        low, high = self.stride
        if self.frames < 1 or self.per_video < 1 or not 1 <= low <= high or not 0 <= self.backward <= 1:
            raise ValueError(f"{self}: expected frames and per_video >= 1, 1 <= low <= high, backward in 0..1")

    def draw(self, length: int, rng: np.random.Generator) -> list[int]:
        """T frame numbers in 0..length-1; as many draws whatever the length."""
        how, where, turn = rng.random(3)
        low, high = self.stride
        room = (length - 1) // max(1, self.frames - 1)  # the largest stride that fits
        stride = min(low + int(how * (high - low + 1)), max(1, room))
        start = int(where * max(1, length - (self.frames - 1) * stride))
        period = max(1, 2 * (length - 1))
        along = (start + stride * np.arange(self.frames)) % period  # there and back
        frames = np.minimum(along, period - along) if length > 1 else np.zeros(self.frames, np.int64)
        return (length - 1 - frames if turn < self.backward else frames).tolist()


@dataclass
class Segments:
    """Annotations of T frames: N segments; fields as in Scene (data/segment_batch.py)."""

    masks: np.ndarray  # (N, T, H, W) bool, or a map (T, H, W) of ids
    ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    void: np.ndarray | None = None

    def of(self, frame: int) -> dict[int, np.ndarray]:
        """{id: mask (H, W) bool} of the segments that have a pixel on a frame and are no crowd."""
        found = {}
        for k in np.flatnonzero(~self.crowd):
            mask = self.masks[k, frame] if self.masks.ndim == 4 else self.masks[frame] == self.ids[k]
            if mask.any():
                found[int(self.ids[k])] = mask
        return found


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of the numbers in their names."""

    def key(path: Path) -> list:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES), key=key)


def read_frame(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A frame of a video of size (H, W) as uint8 (H, W, 3). UserError for another size."""
    image = np.asarray(open_image(path))
    if image.shape[:2] != tuple(size):
        own, other = (" x ".join(map(str, s)) for s in (image.shape[:2], size))
        raise UserError(f"{path}: is {own} px (H x W), its video {other}; all frames of a video have one size")
    return image


@dataclass(frozen=True)
class Video:
    """A whole video. files: one per frame; size: (H, W) px; annotated: numbers of the frames that have masks."""

    source: "VideoSource"
    number: int
    name: str
    files: list[Path]
    size: tuple[int, int]
    annotated: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Frames start..stop-1 as uint8 (H, W, 3), one at a time. UserError for one of another size."""
        for path in self.files[start:stop]:
            yield read_frame(path, self.size)

    def segments(self, frames: Sequence[int]) -> Segments:
        """Annotations of some of the annotated frames. ValueError for another frame."""
        other = sorted(set(frames) - set(self.annotated))
        if other:
            raise ValueError(
                f"{self.name}: frame {other[0]} has no annotation, {len(self.annotated)} of {len(self)} do"
            )
        return self.source.read(self.number, list(frames))

    def timeline(self) -> dict[int, list[int]]:
        """{id of a thing: the frames on which it is seen}, of all annotated frames; reads every one of them.

        UserError when there is no thing, and where the format wants one on the first frame (DAVIS) when that has none.
        """
        seen: dict[int, list[int]] = {}
        for t in self.annotated:
            for i in self.source.things(self.segments([t])).of(0):
                seen.setdefault(i, []).append(t)
        first = self.source.first_has_objects
        if not seen or (first and min(map(min, seen.values())) > 0):
            where = "its first frame" if first else "any frame"
            raise UserError(f"{self.files[0].parent}: no object is marked on {where}; expected one to follow")
        return seen

    def entries(self) -> dict[int, dict[int, np.ndarray]]:
        """{frame: {id: mask (H, W) bool}}: where each thing is first marked, as prompts to follow it from. UserError
        as of `timeline`."""
        found: dict[int, dict] = {}
        for i, (t, *_) in self.timeline().items():
            found.setdefault(t, {})[i] = None
        for t, new in found.items():
            masks = self.segments([t]).of(0)
            new.update({i: masks[i] for i in new})
        return found


class VideoSource:
    """Base of the sources of videos. A subclass sets name, tasks, classes, category_ids, is_thing, clips, seed, names
    (of all videos), dense (numbers of the videos that clips are drawn from) and has

    files(number) -> paths of the frames, size(number) -> (H, W), annotated(number) -> frames that have masks,
    read(number, frames) -> Segments, summary().
    """

    first_has_objects = False  # whether a video without an object on its first frame is wrong

    def __len__(self) -> int:
        return len(self.dense) * self.clips.per_video

    def video(self, number: int) -> Video:
        """One of the videos 0..len(names)-1."""
        size = self.size(number)
        return Video(self, number, self.names[number], self.files(number), size, self.annotated(number))

    def videos(self) -> Iterator[Video]:
        """All of them, in the order of names."""
        return map(self.video, range(len(self.names)))

    def things(self, segments: Segments) -> Segments:
        """Without stuff; what has no class counts as a thing."""
        keep = np.append(self.is_thing, True)[segments.labels].astype(bool)
        masks = segments.masks[keep] if segments.masks.ndim == 4 else segments.masks
        return Segments(masks, segments.ids[keep], segments.labels[keep], segments.crowd[keep], segments.void)

    def scene(self, epoch: int, index: int) -> Scene:
        """A clip; one that begins with a thing in view, unless the video shows none in TRIES draws."""
        number = self.dense[index // self.clips.per_video]
        rng = np.random.default_rng([self.seed, epoch, index, 2])
        files, size = self.files(number), self.size(number)
        for _ in range(TRIES):
            frames = self.clips.draw(len(files), rng)
            segments = self.read(number, frames)
            if self.things(segments).of(0):
                break
        image = np.stack([read_frame(files[t], size) for t in frames])  # (T, H, W, 3)
        name = f"{self.names[number]}:{','.join(map(str, frames))}"
        return Scene(name, image, segments.masks, segments.ids, segments.labels, segments.crowd, segments.void)


class FirstMasks:
    """The frames on which objects of a source of videos are first marked, as pictures with these masks: a source for
    SegmentItems, and with data/pseudo_video.py one of clips, to learn a video from what is given to follow.

    numbers: of the videos, None: all. Looks through all masks when it is made.
    """

    name, tasks = "first_masks", ("interactive",)

    def __init__(self, source: VideoSource, numbers: Sequence[int] | None = None):
        self.source, self.classes, self.is_thing = source, source.classes, source.is_thing
        self.category_ids = source.category_ids
        numbers = range(len(source.names)) if numbers is None else numbers
        self.items = [(n, t, sorted(new)) for n in numbers for t, new in source.video(n).entries().items()]

    def __len__(self) -> int:
        return len(self.items)

    def summary(self) -> str:
        """One line: items."""
        videos, objects = len({n for n, _, _ in self.items}), sum(len(ids) for _, _, ids in self.items)
        return f"first masks of {self.source.name}: {len(self)} frames of {videos} videos, {objects} objects"

    def scene(self, epoch: int, index: int) -> Scene:
        """The same in every epoch."""
        number, t, wanted = self.items[index]
        video = self.source.video(number)
        segments = video.segments([t])
        masks, label = segments.of(0), dict(zip(segments.ids.tolist(), segments.labels.tolist(), strict=True))
        ids, labels = np.array(wanted, np.int64), np.array([label[i] for i in wanted], np.int64)
        void = None if segments.void is None else segments.void[0]
        image, none = next(video.frames(t, t + 1)), np.zeros(len(ids), bool)
        return Scene(f"{video.name}:{t}", image, np.stack([masks[i] for i in wanted]), ids, labels, none, void)
