"""How data/video.py opens a file: what it says about itself, the index of its frames, decoding, conversion to images.

A frame's index is its place in presentation order among the frames that decoding the whole file yields; its time is
pts * time_base minus the first pts.  Header counts are never used.  How the index is made (`Index.mode`):

packets  demuxing only, no decoding: codecs and containers where one packet is one picture, every packet has a pts of
         its own, none is discarded by an edit list, and the first picture decoded is the first of the index.
decoded  one pass of decoding (pictures are not converted), where any of that does not hold (AVI, TS, edit lists, ...).
count    as decoded, but the file has no usable pts: every access decodes from the start of the file.

Seeking goes to a key picture at or before the wanted one and decodes forward; every picture on the way must carry the
pts that the index has for it, otherwise the run is repeated from the start of the file (so it goes with intra refresh
and most open GOPs of H.264: slow, but exact), and if that differs too, or the decoder reports an error, UserError names
the frame.  Nothing is skipped and nothing is guessed.  Beyond reach is damage that decodes without an error, and what a
container hides: Matroska resumes after a hole, which shows only as vfr and as fewer frames than duration_s * fps.

Images are uint8 RGB (H, W, 3), turned as displayed.  Crop and size are applied while decoding (libavfilter).  Pixels
count as coded: a sample aspect ratio other than 1 is reported in VideoInfo, not applied.
"""

import gc
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from utils.run import UserError

ONE_PACKET_ONE_PICTURE = {"h264", "hevc", "av1", "vp9", "mjpeg", "prores", "ffv1", "dnxhd"}
INDEXED_FORMATS = ("mov,mp4", "matroska")  # prefixes of ffmpeg's demuxer names
CLEAN_KEYS = {
    *ONE_PACKET_ONE_PICTURE,
    "vp8",
    "mpeg1video",
    "mpeg2video",
    "mpeg4",
    "rawvideo",
    "png",
}  # key = safe start
FROM_FILE_START = np.iinfo(np.int64).min  # in place of a time stamp to seek to
ORIENTATIONS = {  # signs (a, b, c, d) of the display matrix: x' = ax + cy, y' = bx + dy (y down) -> filters
    (1, 0, 0, 1): [],
    (-1, 0, 0, -1): [("hflip", None), ("vflip", None)],
    (-1, 0, 0, 1): [("hflip", None)],
    (1, 0, 0, -1): [("vflip", None)],
    (0, 1, -1, 0): [("transpose", "clock")],
    (0, -1, 1, 0): [("transpose", "cclock")],
    (0, 1, 1, 0): [("transpose", "cclock_flip")],
    (0, -1, -1, 0): [("transpose", "clock_flip")],
}


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about itself; width and height (px) as displayed, after rotation."""

    path: str
    width: int
    height: int
    rate: Fraction  # frames per second; header value from probe, checked against the pts by VideoReader
    header_frames: int  # 0: the header has none; not to be trusted
    duration_s: float  # header value, 0.0 when absent
    orientation: tuple[int, int, int, int]  # key of ORIENTATIONS
    codec: str
    pix_fmt: str
    has_audio: bool
    start_pts_s: float  # time of the first decoded picture on the file's own clock
    sample_aspect: Fraction
    frames: int | None = None  # counted; None from probe

    @property
    def fps(self) -> float:
        return float(self.rate)

    @property
    def rotation(self) -> int:
        """Degrees clockwise that the coded picture is turned for display: 0, 90, 180 or 270 (mirroring not counted)."""
        a, b, _, _ = self.orientation
        return {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[a, b]

    @property
    def header_count_wrong(self) -> bool:
        return self.frames is not None and self.header_frames not in (0, self.frames)


@dataclass(frozen=True)
class Index:
    """pts of every frame in presentation order, and where decoding may start."""

    pts: np.ndarray  # (N,) int64, strictly increasing; 0..N-1 in mode count
    keys: np.ndarray  # (K,) int64 frame positions that decoding can start from
    seeks: np.ndarray  # (K,) int64 time stamp to seek to for each key
    mode: str  # packets | decoded | count
    time_base: Fraction
    vfr: bool


class Mismatch(Exception):
    """Decoding did not give the pictures of the index."""


_OPEN: weakref.WeakSet = weakref.WeakSet()  # decoders of this process


def _after_fork() -> None:
    """A forked child must neither use nor free its parent's decoders: it would wait for threads that it does not have.
    The list that holds itself is never freed by counting, and frozen objects (also closed decoders that the parent's
    garbage collector had still to find) are never freed by the collector."""
    kept: list = list(_OPEN)
    kept.append(kept)
    _OPEN.clear()
    gc.freeze()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Decoder:
    """One open file in one process: raw pictures in presentation order, and their conversion to arrays."""

    def __init__(self, path: str, threads: int | None = None):
        if not Path(path).is_file():
            what = "is a folder, not a video file" if Path(path).is_dir() else "no such video file"
            raise UserError(f"{path}: {what}")
        if Path(path).stat().st_size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes); copy or download it again")
        try:  # "file:" keeps names with a colon from being taken for a protocol
            self.container = av.open(f"file:{path}", metadata_errors="replace")
        except av.error.FFmpegError as e:
            raise UserError(f"{path}: not a readable video file ({e.strerror}); it may be damaged or cut short") from e
        streams = [s for s in self.container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            self.container.close()
            raise UserError(f"{path}: has no video stream; give a file that has pictures")
        self.path, self.pid, self.stream, self.graph, self.source = path, os.getpid(), streams[0], None, None
        context = self.stream.codec_context
        if context is None:
            raise UserError(f"{path}: this installation of PyAV has no decoder for its video; re-encode it to H.264")
        context.options = {"err_detect": "explode"}  # damaged data is an error, never a picture patched up
        context.thread_type, context.thread_count = "AUTO", threads or 0
        _OPEN.add(self)

    def pictures(self, seek: int | None = None, key_pts: int | None = None) -> Iterator[av.VideoFrame]:
        """All pictures from the key picture `key_pts` on (seek: time stamp to seek to), else from where the file is.
        Packets before the key, and pictures that follow it in the file but precede it in time, are not decoded."""
        found = seek is None
        if seek is not None:
            self.container.seek(seek, stream=self.stream)
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:  # cut short, or a gap in a transport stream: what came before it is still good
                yield from self.stream.codec_context.decode(None)
                raise Mismatch("its data is incomplete")
            found = found or packet.pts == key_pts
            if found and (seek is None or packet.pts is None or packet.pts >= key_pts):
                for picture in packet.decode():
                    if picture.is_corrupt:
                        raise Mismatch("its data is damaged")
                    yield picture

    def image(self, picture: av.VideoFrame, size, crop, orientation) -> np.ndarray:
        """picture -> uint8 (H, W, 3) after crop (x, y, w, h displayed px), size (W, H) and turning."""
        source = (picture.width, picture.height, picture.format.name, picture.colorspace, picture.color_range)
        if self.source is not None and source[:2] != self.source[:2]:
            raise UserError(
                f"{self.path}: picture size changes from {self.source[:2]} to {source[:2]} at {picture.time} s"
            )
        if source != self.source:
            self.graph, self.source = _filter_graph(picture, self.stream.time_base, size, crop, orientation), source
        self.graph.vpush(picture)
        return self.graph.vpull().to_ndarray()  # (H, W, 3)

    def close(self) -> None:
        if self.pid == os.getpid():
            self.container.close()


def _filter_graph(picture, time_base, size, crop, orientation) -> av.filter.Graph:
    """crop (in coded pixels, before anything else) -> scale to RGB -> turn. One thread, so that threads change nothing.

    Resizing averages over areas with exact rounding, the same on every CPU type. Unresized pictures take ffmpeg's quick
    converter: 0.7 instead of 10 ms for 1080p, on average 1 of 255 darker.
    """
    a, b, c, d = orientation
    turned, steps = a == 0, []
    w, h = W, H = (picture.height, picture.width) if turned else (picture.width, picture.height)  # displayed
    if crop is not None:
        x, y, w, h = crop
        # where the displayed x (y) axis runs backwards along the coded one, count from the other end
        x, y = (W - x - w if a + c < 0 else x), (H - y - h if b + d < 0 else y)
        at, extent = ((y, x), (h, w)) if turned else ((x, y), (w, h))  # coded
        steps.append(("crop", f"w={extent[0]}:h={extent[1]}:x={at[0]}:y={at[1]}:exact=1"))
    if size is None or tuple(size) == (w, h):
        steps.append(("scale", None))
    else:
        w, h = size[::-1] if turned else size
        steps.append(("scale", f"w={w}:h={h}:flags=area+accurate_rnd+full_chroma_int+bitexact"))
    steps += [("format", "rgb24"), *ORIENTATIONS[orientation]]
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=picture.width, height=picture.height, format=picture.format, time_base=time_base)
    graph.link_nodes(source, *(graph.add(name, args) for name, args in steps), graph.add("buffersink")).configure()
    return graph


def _info(decoder: Decoder, first: av.VideoFrame) -> VideoInfo:
    stream, orientation = decoder.stream, (1, 0, 0, 1)
    for side in first.side_data:
        if side.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(side)[:20], np.int32).tolist()
            orientation = tuple((v > 0) - (v < 0) for v in (a, b, c, d))
    if orientation not in ORIENTATIONS:
        raise UserError(
            f"{decoder.path}: turned by an angle that is not a multiple of 90 degrees; re-encode it upright"
        )
    rate = stream.average_rate or stream.guessed_rate or Fraction(0)
    if rate <= 0:
        raise UserError(f"{decoder.path}: the file states no frame rate; re-encode it to mp4")
    span = stream.duration * stream.time_base if stream.duration else (decoder.container.duration or 0) / av.time_base
    return VideoInfo(
        path=decoder.path,
        width=first.width if orientation[0] else first.height,
        height=first.height if orientation[0] else first.width,
        rate=Fraction(rate),
        header_frames=stream.frames,
        duration_s=float(span),
        orientation=orientation,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=first.format.name,
        has_audio=bool(decoder.container.streams.audio),
        start_pts_s=float((first.pts or 0) * stream.time_base),
        sample_aspect=Fraction(stream.sample_aspect_ratio or 1),
    )


def probe(path: str | Path) -> VideoInfo:
    """Sizes, rate, codec. Decodes one picture. UserError when the file cannot be read as a video."""
    decoder = Decoder(str(path), threads=1)
    try:
        for packet in decoder.container.demux(decoder.stream):
            for first in packet.decode():
                return _info(decoder, first)
    except av.error.FFmpegError as e:
        raise UserError(f"{path}: frame 0 cannot be decoded ({e.strerror}); the file is damaged") from e
    finally:
        decoder.close()
    raise UserError(f"{path}: the video stream has no pictures; the file is damaged or cut short")


def _scan(decoder: Decoder) -> tuple[VideoInfo, list[int | None], dict[int, int], bool]:
    """Demux the whole file, decoding until the first picture comes out: (info, pts of the packets in file order,
    {pts of a key packet that decoding can start from: time stamp to seek to}, packets are stamped and kept)."""
    stream, info, pts, keys, clean = decoder.stream, None, [], {}, True
    codec, by_pts = stream.codec_context.codec, decoder.container.format.name.startswith("matroska")
    try:
        for packet in decoder.container.demux(stream):
            if info is None:
                info = next((_info(decoder, picture) for picture in packet.decode()), None)
            if packet.size == 0:  # the flush at the end
                continue
            stamped = packet.pts is not None and (by_pts or packet.dts is not None)
            clean = clean and stamped and not packet.is_discard
            pts.append(packet.pts)
            if packet.is_keyframe and stamped and codec.canonical_name in CLEAN_KEYS:
                keys[packet.pts] = packet.pts if by_pts else packet.dts
    except av.error.FFmpegError as e:
        raise UserError(f"{decoder.path}: damaged at packet {len(pts)} of the video stream ({e.strerror})") from e
    if info is None:
        raise UserError(f"{decoder.path}: the video stream has no pictures; the file is damaged or cut short")
    return info, pts, keys, clean


def build_index(path: str) -> tuple[VideoInfo, Index]:
    """See the head of this file."""
    decoder = Decoder(path, threads=1)
    try:
        info, pts, keys, clean = _scan(decoder)
        base, name = decoder.stream.time_base, decoder.container.format.name
    finally:
        decoder.close()
    mode, pts = "packets", sorted(pts) if clean else pts
    if not (
        clean
        and info.codec in ONE_PACKET_ONE_PICTURE
        and name.startswith(INDEXED_FORMATS)
        and pts[0] == round(info.start_pts_s / base)
        and pts[0] in keys
        # steps of half the usual length: fields in packets of their own; of length 0: two pictures at one time
        and (len(pts) == 1 or np.diff(pts).min() > 0.6 * np.median(np.diff(pts)))
    ):
        mode, pts = "decoded", _decoded_pts(path)
        if None in pts or (np.diff(pts) <= 0).any():
            mode, pts, keys, base = "count", list(range(len(pts))), {}, 1 / info.rate
    at = [i for i, p in enumerate(pts) if p in keys]
    seeks = [keys[pts[i]] for i in at]
    if at[:1] != [0]:
        at, seeks = [0, *at], [FROM_FILE_START, *seeks]
    pts = np.array(pts, np.int64)
    rate, vfr = _rate(pts, base, info.rate)
    index = Index(pts, np.array(at, np.int64), np.array(seeks, np.int64), mode, base, vfr)
    return replace(info, frames=len(pts), rate=rate), index


def _decoded_pts(path: str) -> list[int | None]:
    decoder, pts = Decoder(path), []
    try:
        for picture in decoder.pictures():
            pts.append(picture.pts)
    except (Mismatch, av.error.FFmpegError) as e:
        raise UserError(undecodable(path, len(pts), None, e)) from e
    finally:
        decoder.close()
    return pts


def _rate(pts: np.ndarray, base: Fraction, header: Fraction) -> tuple[Fraction, bool]:
    """(frames per second, vfr). The header's rate stands when the mean or the median step agrees within 1 % (or one
    tick of the clock), else the mean. vfr: some step is off the median by more than 2 % and 1.5 ticks."""
    if len(pts) < 2:
        return header, False
    steps = np.diff(pts)
    mean, median = Fraction(int(pts[-1] - pts[0]), len(steps)), Fraction(float(np.median(steps)))
    vfr = bool((np.abs(steps - float(median)) > max(1.5, 0.02 * float(median))).any())
    if min(abs(1 / header / base - step) for step in (mean, median)) <= max(1, mean / 100):
        return header, vfr
    return (1 / (mean * base)).limit_denominator(1001), vfr


def undecodable(path: str, frame: int, time_s: float | None, error: Exception) -> str:
    when = "" if time_s is None else f" ({time_s:.3f} s)"
    reason = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
    return f"{path}: frame {frame}{when} cannot be decoded: {reason}; the file is damaged or cut short there"


def check_geometry(info: VideoInfo, size, crop) -> None:
    if size is not None and min(size) < 1:
        raise UserError(f"{info.path}: output size {size[0]}x{size[1]} px; both sides must be at least 1")
    if crop is not None:
        x, y, w, h = crop
        if x < 0 or y < 0 or w < 1 or h < 1 or x + w > info.width or y + h > info.height:
            raise UserError(f"{info.path}: crop x={x} y={y} w={w} h={h} does not fit in {info.width}x{info.height} px")
