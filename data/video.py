"""Exact frames from video files (PyAV): random access by pts that equals sequential decoding, streaming, mp4 writing.

How frames are counted, found and converted stands at the head of data/video_index.py.  Images are uint8 RGB (H, W, 3),
turned as displayed; crop and size are applied while decoding.  UserError names file and frame of what cannot be read.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data.video_index import (
    FROM_FILE_START,
    ORIENTATIONS,
    Decoder,
    Mismatch,
    VideoInfo,
    build_index,
    check_geometry,
    probe,
    undecodable,
)
from utils.run import UserError

__all__ = [
    "ORIENTATIONS",
    "Frame",
    "VideoInfo",
    "VideoReader",
    "VideoWriter",
    "duplicates",
    "iter_frames",
    "probe",
    "read_all",
]


@dataclass(frozen=True)
class Frame:
    index: int
    time_s: float  # since the first frame
    image: np.ndarray  # uint8 (H, W, 3)


class VideoReader:
    """Random access to the frames of one file; `reader[i]` is bit for bit the i-th image of `iter_frames`.

    size (W, H): output size in px, None keeps the (cropped) source size. crop (x, y, w, h): displayed source px, cut
    out before resizing (odd x or y shifts the colour of 4:2:0 video by half a colour sample). threads: decoder threads,
    None lets ffmpeg choose; use 1 in loader workers; the pictures do not depend on it.
    May be pickled and used after a fork: each process opens the file for itself. Not for several threads at once.
    """

    def __init__(self, path: str | Path, size=None, crop=None, threads: int | None = None):
        self.path, self.size, self.crop, self.threads = str(path), size, crop, threads
        self._decoder = self._run = None
        self.info, self.index = build_index(self.path)
        check_geometry(self.info, size, crop)

    def __len__(self) -> int:
        return len(self.index.pts)

    @property
    def fps(self) -> float:
        return self.info.fps

    @property
    def vfr(self) -> bool:
        """Whether the frame spacing varies."""
        return self.index.vfr

    @property
    def out_size(self) -> tuple[int, int]:
        """(W, H) of the images."""
        return tuple(self.size or (self.crop[2:] if self.crop else (self.info.width, self.info.height)))

    @property
    def times_s(self) -> list[float]:
        """Time of every frame since the first."""
        return [self._time_s(i) for i in range(len(self))]

    def __getitem__(self, i: int) -> np.ndarray:
        """Frame i (negative: from the end) -> uint8 (H, W, 3). IndexError outside the video."""
        return self.read([i])[0]

    def read(self, indices: Iterable[int]) -> np.ndarray:
        """Frames in the order asked for, repeats allowed -> uint8 (N, H, W, 3). Decodes each run of frames once."""
        wanted = [int(i) for i in indices]
        for i in wanted:
            if not -len(self) <= i < len(self):
                raise IndexError(f"{self.path}: frame {i} of a video with {len(self)} frames")
        wanted = [i % len(self) for i in wanted]
        w, h = self.out_size
        out, places = np.empty((len(wanted), h, w, 3), np.uint8), {}
        for place, i in enumerate(wanted):
            places.setdefault(i, []).append(place)
        for i in sorted(places):
            out[places[i]] = self._image(self._picture(i))
        return out

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames start..stop-1 one after the other, in constant memory."""
        for i in range(start, len(self) if stop is None else min(stop, len(self))):
            yield Frame(i, self._time_s(i), self._image(self._picture(i)))

    def close(self) -> None:
        if self._run is not None and self._decoder.pid == os.getpid():
            self._run.close()
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = self._run = None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_decoder": None, "_run": None}

    def _time_s(self, i: int) -> float:
        return float(int(self.index.pts[i] - self.index.pts[0]) * self.index.time_base)

    def _image(self, picture: av.VideoFrame) -> np.ndarray:
        return self._decoder.image(picture, self.size, self.crop, self.info.orientation)

    def _picture(self, i: int) -> av.VideoFrame:
        """Picture i: from the decoding under way when no key lies between, else after a seek."""
        if self._decoder is not None and self._decoder.pid != os.getpid():
            self._decoder = self._run = None
        keys = self.index.keys
        near = self._run is not None and self._next <= i and not ((keys > self._next) & (keys <= i)).any()
        key = self._key if near else int(np.searchsorted(keys, i, "right")) - 1
        for attempt in range(2):
            if not near or attempt:
                self._begin(0 if attempt else key, reopen=attempt == 1)
            try:
                picture = self._advance(i)
            except (Mismatch, av.error.FFmpegError) as e:
                # after a seek this may be the seek's fault: decoding from the start of the file decides
                at, error = self._next, e
                if self._from_start:
                    break
            else:
                if attempt and key > 0:  # not a place to start from (open GOP, intra refresh): do not try it again
                    keys, seeks = np.delete(keys, key), np.delete(self.index.seeks, key)
                    self.index = replace(self.index, keys=keys, seeks=seeks)
                return picture
        self.close()
        raise UserError(undecodable(self.path, at, self._time_s(at), error)) from error

    def _begin(self, key: int, reopen: bool) -> None:
        """Start decoding at the key-th entry of index.keys, or at the start of the file."""
        seek = int(self.index.seeks[key])
        if self._run is not None:
            self._run.close()
        self._from_start = reopen or seek == FROM_FILE_START
        if self._from_start or self._decoder is None:
            self.close()
            self._decoder = Decoder(self.path, self.threads)
        position = int(self.index.keys[key])
        if self._from_start:
            self._run = self._decoder.pictures()
        else:
            self._run = self._decoder.pictures(seek, int(self.index.pts[position]))
        self._next, self._key = position, key

    def _advance(self, i: int) -> av.VideoFrame:
        """Decode up to picture i, checking every pts on the way."""
        while True:
            picture = next(self._run, None)
            if picture is None:
                raise Mismatch("the video ends before it")
            if self.index.mode != "count" and picture.pts != self.index.pts[self._next]:
                raise Mismatch("decoding skipped it")
            self._next += 1
            if self._next == i + 1:
                return picture


def iter_frames(path, size=None, crop=None, threads=None, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
    """Stream frames start..stop-1 in constant memory; arguments as VideoReader."""
    with VideoReader(path, size, crop, threads) as reader:
        yield from reader.stream(start, stop)


def read_all(path, size=None, crop=None, max_bytes: int = 2**31) -> tuple[np.ndarray, VideoInfo, list[float]]:
    """Whole clip: (uint8 (T, H, W, 3), info, times_s). UserError when the array would exceed max_bytes."""
    with VideoReader(path, size, crop) as reader:
        w, h = reader.out_size
        need = len(reader) * h * w * 3
        if need > max_bytes:
            raise UserError(
                f"{path}: {len(reader)} frames of {w}x{h} px need {need / 2**30:.1f} GiB, more than the limit of "
                f"{max_bytes / 2**30:.1f} GiB; ask for a smaller size or stream the file"
            )
        return reader.read(range(len(reader))), reader.info, reader.times_s


def duplicates(path) -> list[int]:
    """Frames that repeat the picture before them, as rate conversion (25 -> 30 fps) leaves them.

    Measured on 160x90 grey pictures by the largest absolute difference to the frame before: repeats coded anew differ
    by at most 5 (broadcast clips) to 8 (golf clip) of 255, moving scenes by more than 20, a still, grainy end card by
    11 to 20. A frame counts as repeat when that is at most 10 and at most a quarter of the second largest of its 8
    neighbours (4 on each side), which must exceed 8: a still scene, where nothing differs, is not a row of repeats.
    """
    largest, before = [], None
    for frame in iter_frames(path, size=(160, 90)):
        grey = frame.image.astype(np.int16).sum(2)  # (90, 160), 3 x grey
        largest.append(255.0 if before is None else np.abs(grey - before).max() / 3)
        before = grey
    found = []
    for i in range(1, len(largest)):
        around = sorted(largest[max(1, i - 4) : i] + largest[i + 1 : i + 5])
        if len(around) > 1 and around[-2] > 8 and largest[i] <= min(10, around[-2] / 4):
            found.append(i)
    return found


class VideoWriter:
    """H.264 (yuv420p, BT.709) in mp4, one frame per write(), at exactly `rate` frames per second.

    rate: Fraction kept as it is; a float becomes the nearest fraction with a denominator <= 1001 (29.97003:
    30000/1001).
    size (W, H) px of the images; an odd side is padded by one repeated row or column (`written_size`). crf: 0 best ..
    51. The file is written under a temporary name beside `path`, renamed when closed, and deleted when the block raises
    or has written nothing. UserError when the file cannot be written.
    """

    def __init__(self, path: str | Path, rate: Fraction | float, size: tuple[int, int], crf: int = 18):
        self.path, self.size, self.frames = Path(path), tuple(size), 0
        self.written_size = tuple(side + side % 2 for side in self.size)
        self.rate = rate if isinstance(rate, Fraction) else Fraction(rate).limit_denominator(1001)
        if self.rate <= 0 or min(self.size) < 1:
            raise ValueError(f"VideoWriter: rate {rate}, size {size}; both must be positive")
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self._file = open(self.temporary, "wb")  # a Python file: its errors (disk full) reach us
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written ({e.strerror}); choose another folder") from e
        self._container = av.open(self._file, "w", format="mp4")
        self._stream = self._container.add_stream(
            "libx264", rate=self.rate, options={"crf": str(crf), "preset": "fast"}
        )
        self._stream.width, self._stream.height = self.written_size
        self._stream.pix_fmt, context = "yuv420p", self._stream.codec_context
        context.time_base = 1 / self.rate
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited

    def write(self, image: np.ndarray) -> None:
        """image uint8 (H, W, 3) RGB."""
        w, h = self.size
        if image.shape != (h, w, 3) or image.dtype != np.uint8:
            raise ValueError(f"VideoWriter: image {image.shape} {image.dtype}, expected {(h, w, 3)} uint8")
        if self.written_size != self.size:
            image = np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = self.frames, 1 / self.rate
        self._mux(picture)
        self.frames += 1

    def _mux(self, picture: av.VideoFrame | None) -> None:
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
            if picture is None:
                self._container.close()
                self._file.close()
        except (OSError, av.error.FFmpegError) as e:
            self.discard()
            raise UserError(f"{self.path}: writing failed at frame {self.frames} ({e.strerror}); make room") from e

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self.frames == 0:
            self.discard()
            raise ValueError(f"VideoWriter: {self.path}: no frame was written")
        self._mux(None)
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Delete what has been written."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self.close()
        elif not self._file.closed:
            self.discard()
