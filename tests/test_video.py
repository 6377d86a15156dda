"""data/video.py on videos made here (every awkward kind) and on the real files under LAB_SHARED."""

import errno
import gc
import json
import os
import pickle
import random
import signal
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data import video
from data.video import VideoReader, VideoWriter, duplicates, iter_frames, probe, read_all
from utils import run
from utils.run import UserError

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data/tempopeak"
N, SIZE = 60, (96, 64)  # frames, (W, H) px of the synthetic videos
UNEVEN = np.cumsum(random.Random(0).choices([20, 33, 40, 50, 120], k=N)).tolist()  # ms


def pictures(n: int = N, size: tuple[int, int] = SIZE):
    """Moving blocks and a growing bar: no two frames alike. Yields uint8 (H, W, 3)."""
    w, h = size
    base = np.random.default_rng(0).integers(0, 255, (h // 8, w // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for i in range(n):
        image = np.roll(base, 3 * i, 1)
        image[:8, : i * w // n] = 255
        yield image


def encode(path, opts=None, codec="libx264", fmt=None, mux=None, pts=None, ticks=30, turn=None, audio=False, n=N):
    """Write a test video with PyAV. pts: in 1/ticks s; turn: display rotation in degrees; audio: as stream 0."""
    with av.open(str(path), "w", format=fmt, options=mux or {}) as out:
        sound = out.add_stream("aac", rate=8000, layout="mono") if audio else None
        stream = out.add_stream(codec, rate=30, options=opts or {})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, ticks)
        stream.codec_context.thread_count = 1  # the same bytes every time
        if turn:
            stream.set_display_rotation(turn)
        for i, image in enumerate(pictures(n)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, ticks)
            out.mux(stream.encode(frame))
        if audio:
            for k in range(12):
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                tone.sample_rate, tone.pts, tone.time_base = 8000, 1024 * k, Fraction(1, 8000)
                out.mux(sound.encode(tone))
            out.mux(sound.encode(None))
        out.mux(stream.encode(None))
    return path


def plain_decode(path) -> tuple[list[np.ndarray], list[int | None]]:
    """What decoding from the first to the last packet yields, by PyAV alone: (grey pictures, pts)."""
    with av.open(str(path)) as file:
        frames = list(file.decode(file.streams.video[0]))
        return [f.to_ndarray(format="gray") for f in frames], [f.pts for f in frames]


KINDS = {
    "b_frames_long_gop.mp4": dict(opts={"g": "250", "bf": "3"}),
    "intra_only.mp4": dict(opts={"g": "1"}),
    "short_gop.mp4": dict(opts={"g": "4", "bf": "3", "x264-params": "scenecut=0"}),
    "open_gop.mp4": dict(opts={"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "open_gop.mkv": dict(opts={"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "intra_refresh.mp4": dict(opts={"g": "20", "x264-params": "intra-refresh=1"}),
    "uneven.mp4": dict(opts={"g": "20", "bf": "2"}, pts=UNEVEN, ticks=1000),
    "late.mp4": dict(opts={"g": "20", "bf": "2"}, pts=[500 + i for i in range(N)], mux={"use_editlist": "0"}),
    "audio_first.mp4": dict(opts={"g": "20", "bf": "2"}, audio=True),
    "fragments.mp4": dict(opts={"g": "20", "bf": "2"}, mux={"movflags": "frag_keyframe+empty_moov"}),
    "mpeg4.mov": dict(codec="mpeg4", opts={"g": "20", "bf": "2"}),
    "stream.ts": dict(opts={"g": "20", "bf": "2"}, fmt="mpegts"),
    "mpeg2.ts": dict(codec="mpeg2video", opts={"g": "15", "bf": "2"}, fmt="mpegts"),
    "old.avi": dict(codec="mpeg4", opts={"g": "20", "bf": "2"}),
    "no_time_stamps.h264": dict(opts={"g": "20", "bf": "2"}, fmt="h264"),
    "hidden_frames.webm": dict(codec="libvpx", opts={"g": "20", "auto-alt-ref": "1", "lag-in-frames": "8"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_random_access_equals_sequential(tmp_path, kind):
    path = encode(tmp_path / kind, **KINDS[kind])
    grey, pts = plain_decode(path)
    images = [frame.image for frame in iter_frames(path, threads=1)]
    assert len(images) == len(grey) == N
    with VideoReader(path, threads=2) as reader:
        if reader.index.mode != "count":
            assert reader.index.pts.tolist() == pts
        keys = len(reader.index.keys)
        order = random.Random(1).choices(range(N), k=N) + list(range(N))[::-1]
        assert all(np.array_equal(reader[i], images[i]) for i in order)
        assert np.array_equal(reader.read(order), np.stack(images)[order])
        assert np.array_equal(reader[-1], images[-1])
        assert len(reader.index.keys) == 1 or not reader._from_start  # by a seek, not by decoding everything
        assert len(reader.index.keys) == keys or kind.startswith(("open_gop", "intra_refresh"))  # every seek worked
    for image, plane in zip(images, grey, strict=True):  # the right picture, not only twice the same one
        assert np.abs(image.astype(float) @ (0.299, 0.587, 0.114) - (plane - 0.0)).mean() < 12
    part = list(iter_frames(path, start=33, stop=41))
    assert [frame.index for frame in part] == list(range(33, 41))
    assert all(np.array_equal(frame.image, images[frame.index]) for frame in part)


def test_times_and_rate(tmp_path):
    uneven = VideoReader(encode(tmp_path / "uneven.mp4", **KINDS["uneven.mp4"]))
    assert uneven.vfr and np.allclose(uneven.times_s, (np.array(UNEVEN) - UNEVEN[0]) / 1000, atol=1e-4)
    assert uneven.fps == pytest.approx((N - 1) / uneven.times_s[-1], rel=0.01)
    late = VideoReader(encode(tmp_path / "late.mkv", opts={"bf": "0"}, pts=[500 + i for i in range(N)]))
    assert late.info.start_pts_s == pytest.approx(500 / 30, abs=0.01) and late.times_s[0] == 0.0
    assert not late.vfr and late.fps == 30.0  # the millisecond clock of mkv is no variable rate
    assert [f.time_s for f in iter_frames(late.path)] == late.times_s
    info = probe(encode(tmp_path / "audio_first.mp4", **KINDS["audio_first.mp4"]))
    assert info.has_audio and (info.width, info.height, info.codec) == (*SIZE, "h264")
    with av.open(info.path) as file:
        assert file.streams[0].type == "audio"


@pytest.mark.parametrize("matrix", video.ORIENTATIONS)
def test_rotation_mirroring_size_and_crop(tmp_path, matrix):
    """One file, its display matrix (a, b, u, c, d, v, ... after 40 bytes of tkhd) set to each of the eight."""
    path, turned = encode(tmp_path / "plain.mp4", n=4), tmp_path / "turned.mp4"
    data, (a, b, c, d) = path.read_bytes(), matrix
    at = data.index(b"tkhd") + 44
    assert struct.unpack(">5i", data[at : at + 20]) == (65536, 0, 0, 0, 65536)
    turned.write_bytes(data[:at] + struct.pack(">5i", *(65536 * v for v in (a, b, 0, c, d))) + data[at + 20 :])

    def displayed(image):  # x' = ax + cy, y' = bx + dy
        image = image.transpose(1, 0, 2) if a == 0 else image
        return image[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]

    swap = slice(None, None, -1 if a == 0 else 1)
    info = probe(turned)
    assert (info.width, info.height) == SIZE[swap] and info.orientation == matrix
    small = VideoReader(turned, size=(48, 32)[swap])[3]
    assert np.array_equal(small, displayed(VideoReader(path, size=(48, 32))[3]))
    whole, part = VideoReader(turned)[3], VideoReader(turned, crop=(6, 18, 40, 30))[3]
    assert np.array_equal(whole, displayed(VideoReader(path)[3]))
    assert np.abs(whole[18:48, 6:46].astype(int) - part).mean() < 1  # the edge interpolates colour differently
    assert VideoReader(turned, crop=(6, 18, 40, 30), size=(20, 15))[3].shape == (15, 20, 3)


@pytest.mark.parametrize("turn, clockwise", [(90, 270), (180, 180), (270, 90)])
def test_rotation_written_by_a_muxer(tmp_path, turn, clockwise):
    assert probe(encode(tmp_path / "turned.mp4", n=2, turn=turn)).rotation == clockwise


def test_out_of_range_and_bad_geometry(tmp_path):
    path = encode(tmp_path / "a.mp4", n=5)
    reader = VideoReader(path)
    assert len(reader) == 5 and len(list(reader)) == 5
    for i in (5, -6):
        with pytest.raises(IndexError, match="5 frames"):
            reader[i]
    assert reader.read([]).shape == (0, 64, 96, 3)
    with pytest.raises(UserError, match="crop x=60 .* 96x64"):
        VideoReader(path, crop=(60, 0, 40, 10))
    with pytest.raises(UserError, match="at least 1"):
        VideoReader(path, size=(0, 10))
    frames, info, times_s = read_all(path, size=(24, 16))
    assert frames.shape == (5, 16, 24, 3) and info.frames == 5 and times_s == pytest.approx([i / 30 for i in range(5)])
    with pytest.raises(UserError, match="5 frames of 96x64"):
        read_all(path, max_bytes=5 * 96 * 64 * 3 - 1)


def test_header_count_wrong(tmp_path):
    """The stsz table is the count: it stays, but the sync table loses nothing, so cut whole samples off the end."""
    path = encode(tmp_path / "a.mp4", opts={"bf": "0", "g": "20"}, mux={"movflags": "faststart"})
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(file.streams.video[0]) if p.size]
    short = tmp_path / "short.mp4"
    short.write_bytes(path.read_bytes()[: packets[40][0]])  # ends exactly after frame 39
    with VideoReader(short) as reader:
        assert len(reader) == len(list(iter_frames(short))) == 40
        assert reader.info.header_frames == N and reader.info.header_count_wrong
        assert not VideoReader(path).info.header_count_wrong
    partial = tmp_path / "partial.mp4"
    partial.write_bytes(path.read_bytes()[: packets[40][0] + packets[40][1] // 2])  # ends inside frame 40
    seen = []
    with pytest.raises(UserError, match=r"partial.mp4: frame 40 \(1.333 s\).*cut short"):
        seen.extend(frame.index for frame in iter_frames(partial))
    assert seen == list(range(40))


def test_damage_in_the_middle_is_named(tmp_path):
    path = encode(tmp_path / "a.mp4", opts={"bf": "2", "g": "20"})
    with av.open(str(path)) as file:
        packets = {p.pts: (p.pos, p.size) for p in file.demux(file.streams.video[0]) if p.size}
    pos, size = packets[sorted(packets)[20]]  # the second key picture
    data = bytearray(path.read_bytes())
    for k in range(pos + 4, pos + size):
        data[k] ^= 0x5A
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(data)
    good = [frame.image for frame in iter_frames(path)]
    for threads in (1, 3):
        seen = []
        with pytest.raises(UserError, match=r"bad.mp4: frame (1\d|20) \(0\.\d+ s\) cannot be decoded.*damaged") as e:
            seen.extend(iter_frames(bad, threads=threads))
        assert "\n" not in str(e.value)
        assert all(np.array_equal(frame.image, good[frame.index]) for frame in seen) and len(seen) > 10
        with VideoReader(bad, threads=threads) as reader:  # what does not depend on the damage stays right
            assert np.array_equal(reader[50], good[50]) and np.array_equal(reader[5], good[5])
            with pytest.raises(UserError, match="cannot be decoded"):
                reader[30]
            assert np.array_equal(reader[59], good[59])


def test_damage_that_ffmpeg_would_patch_up_is_an_error(tmp_path):
    path = encode(tmp_path / "a.mp4", opts={"bf": "0", "g": "60", "x264-params": "scenecut=0"})
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(file.streams.video[0]) if p.size]
    patched_up = 0
    for k in range(20, 40):
        data, (pos, size) = bytearray(path.read_bytes()), packets[k]
        data[pos + size // 2 : pos + size] = bytes(b ^ 0x5A for b in data[pos + size // 2 : pos + size])
        (tmp_path / "bad.mp4").write_bytes(data)
        with av.open(str(tmp_path / "bad.mp4")) as file:
            file.streams.video[0].thread_type = "NONE"
            repaired = [f.is_corrupt for f in file.decode(file.streams.video[0])]
        if len(repaired) == N and any(repaired):  # left to itself, ffmpeg repairs the picture by guessing
            patched_up += 1
            with pytest.raises(UserError, match=rf"bad.mp4: frame {k} \({k / 30:.3f} s\) cannot be decoded"):
                list(iter_frames(tmp_path / "bad.mp4", threads=1))
    assert patched_up

    data = bytearray(encode(tmp_path / "a.ts", **KINDS["stream.ts"]).read_bytes())
    for k in range(len(data) // 2, len(data) // 2 + 400):
        data[k] ^= 0x5A
    (tmp_path / "bad.ts").write_bytes(data)
    with pytest.raises(UserError, match="bad.ts: frame .* cannot be decoded: its data is incomplete"):
        list(iter_frames(tmp_path / "bad.ts"))


def unreadable(folder: Path) -> dict[str, str]:
    """{name of a file that is no video: what the sentence must say}"""
    good = encode(folder / "good.mp4").read_bytes()
    fast = encode(folder / "fast.mp4", mux={"movflags": "faststart"}).read_bytes()
    with av.open(str(folder / "sound.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=8000, layout="mono")
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 8000
        out.mux(sound.encode(tone))
        out.mux(sound.encode(None))
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("frame,label\n1,hit\n" * 50)
    (folder / "no_moov.mp4").write_bytes(good[: len(good) // 2])
    (folder / "half_moov.mp4").write_bytes(fast[:600])
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "header_only.mp4").write_bytes(fast[: fast.index(b"mdat") + 4])
    (folder / "folder.mp4").mkdir()
    names = dict.fromkeys(["text.mp4", "no_moov.mp4", "half_moov.mp4", "random.mp4", "header_only.mp4"], "")
    return {**names, "zero.mp4": "empty", "sound.mp4": "no video", "folder.mp4": "folder", "missing.mp4": "no such"}


def test_unreadable_files_are_one_sentence_and_exit_2(tmp_path, capsys):
    for name, words in unreadable(tmp_path).items():
        for call in (probe, VideoReader, read_all, duplicates, lambda p: list(iter_frames(p))):
            assert run.cli(lambda argv, call=call: call(argv[0]) and None, [str(tmp_path / name)]) == 2, name
            text = capsys.readouterr().err
            assert text.startswith("error: ") and text.count("\n") == 1 and name in text and words in text, text


def test_false_index_is_never_a_wrong_frame(tmp_path):
    """A picture missing from the index, or one too many, is an error and not a shifted frame."""
    path = encode(tmp_path / "a.mp4", opts={"g": "20"})
    for wrong in (lambda p: np.delete(p, 30), lambda p: np.sort(np.append(p, p[30] + 1))):
        reader = VideoReader(path)
        object.__setattr__(reader.index, "pts", wrong(reader.index.pts))
        with pytest.raises(UserError, match="frame 3[01] .* cannot be decoded"):
            reader[35]


def test_pickle_and_fork(tmp_path):
    path = encode(tmp_path / "a.mp4", opts={"g": "20", "bf": "2"})
    reader = VideoReader(path, size=(48, 32), threads=2)
    images = reader.read(range(N))
    reader[10]  # a decoder with threads is open now
    again = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(again[33], images[33])
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # using or freeing the parent's decoder waits for ever on threads that are not here
        same = all(np.array_equal(reader[i], images[i]) for i in (11, 40, 3))
        gc.collect()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(reader[12], images[12])  # the child has not moved the parent's file position


@pytest.mark.parametrize(
    "rate, exact", [(Fraction(30000, 1001), None), (29.97002997, Fraction(30000, 1001)), (50.0, 50)]
)
def test_writer_keeps_rate_and_count(tmp_path, rate, exact):
    path, images = tmp_path / "out.mp4", list(pictures(37, SIZE))
    with VideoWriter(path, rate, SIZE, crf=10) as writer:
        for image in images:
            writer.write(image)
    reader = VideoReader(path)
    assert reader.info.rate == (exact or rate) and len(reader) == reader.info.header_frames == 37 and not reader.vfr
    assert (reader.info.codec, reader.info.pix_fmt, reader.times_s[0]) == ("h264", "yuv420p", 0.0)
    assert np.abs(reader.read(range(37)).astype(int) - np.stack(images)).mean() < 10  # colours at half resolution
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_writer_colours_and_odd_sizes(tmp_path):
    flat = np.zeros((33, 51, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    with VideoWriter(tmp_path / "odd.mp4", 25, (51, 33)) as writer:
        writer.write(flat)
        assert writer.written_size == (52, 34)
        with pytest.raises(ValueError, match="expected"):
            writer.write(flat[:-1])
    image = VideoReader(tmp_path / "odd.mp4")[0]
    assert image.shape == (34, 52, 3) and np.abs(image.astype(int) - [200, 40, 90]).max() <= 4


def test_writer_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"earlier result")
    with pytest.raises(RuntimeError, match="stop"), VideoWriter(path, 30, SIZE) as writer:
        writer.write(next(pictures()))
        raise RuntimeError("stop")
    assert path.read_bytes() == b"earlier result" and os.listdir(tmp_path) == ["out.mp4"]
    with pytest.raises(UserError, match="cannot be written"):
        VideoWriter(tmp_path / "no/such/folder/out.mp4", 30, SIZE)
    with pytest.raises(ValueError, match="no frame"), VideoWriter(tmp_path / "none.mp4", 30, SIZE):
        pass
    assert os.listdir(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("room", [0, 1500])
def test_writer_disk_full(tmp_path, monkeypatch, room):
    class Full:
        """A file on a disk with `room` bytes left."""

        def __init__(self, path, mode):
            self.file, self.name, self.left = open(path, mode), str(path), room
            self.seek, self.tell, self.close = self.file.seek, self.file.tell, self.file.close

        closed = property(lambda self: self.file.closed)

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return self.file.write(data)

    monkeypatch.setattr(video, "open", Full, raising=False)
    with pytest.raises(UserError, match="out.mp4: writing failed.*No space left"):
        with VideoWriter(tmp_path / "out.mp4", 30, SIZE) as writer:
            for image in pictures(60):
                writer.write(image)
    assert os.listdir(tmp_path) == []


def test_duplicates_of_a_rate_conversion(tmp_path):
    shown = [i * 5 // 6 for i in range(N)]  # 25 -> 30 frames per second
    images = list(pictures(N, (320, 192)))
    with VideoWriter(tmp_path / "converted.mp4", 30, (320, 192), crf=23) as writer:
        for i in shown:
            writer.write(images[i])
    assert duplicates(tmp_path / "converted.mp4") == [i for i in range(1, N) if shown[i] == shown[i - 1]]
    with VideoWriter(tmp_path / "still.mp4", 30, (320, 192)) as writer:
        for _ in range(20):
            writer.write(images[0])
    assert duplicates(tmp_path / "still.mp4") == []


# ---- real files


def real_videos() -> list[Path]:
    files = sorted((SHARED / "videos").glob("*"))
    if not files:
        pytest.skip(f"no videos under {SHARED}; set LAB_SHARED")
    return files


def test_real_videos_random_access_equals_sequential():
    files, same = real_videos(), 0
    for path in files:
        _, pts = plain_decode_pts(path)
        size = (32, 18)
        images = np.stack([frame.image for frame in iter_frames(path, size=size)])
        with VideoReader(path, size=size) as reader:
            order = random.Random(0).sample(range(len(reader)), len(reader))
            equal = np.array_equal(reader.read(order), images[order])
            equal &= all(np.array_equal(reader[i], images[i]) for i in order[:4])
            same += equal and reader.index.pts.tolist() == pts
    print(f"{same} of {len(files)} videos: every frame by random access equals sequential decoding")
    assert same == len(files)


def plain_decode_pts(path) -> tuple[int, list[int]]:
    with av.open(str(path)) as file:
        pts = [frame.pts for frame in file.decode(file.streams.video[0])]
    return len(pts), pts


def test_real_video_full_size():
    path = real_videos()[0]
    images = [frame.image for frame in iter_frames(path, stop=40)]
    with VideoReader(path) as reader:
        for i in random.Random(0).sample(range(40), 8):
            assert np.array_equal(reader[i], images[i])


def test_real_videos_match_annotations():
    files, right, stated = real_videos(), 0, 0
    for path in files:
        labels = SHARED / "annotations" / f"{path.stem}.json"
        if not labels.exists():
            continue
        stated += 1
        (entry,) = json.loads(labels.read_text())
        reader = VideoReader(path)
        found = (len(reader), reader.info.width, reader.info.height)
        ok = found == (entry["num_frames"], entry["width"], entry["height"])
        right += ok and abs(reader.fps - entry["fps"]) < 0.005
    print(f"{right} of {stated} videos have the size, rate and frame count of their annotations")
    assert stated and right == stated


def test_real_duplicates():
    """Clips whose note names repeats (38=39, ...) or says that there are none."""
    checked = 0
    for path in real_videos():
        labels = SHARED / "annotations" / f"{path.stem}.json"
        note = json.loads(labels.read_text())[0].get("note", "") if labels.exists() else ""
        named = [int(pair.split("=")[1]) for pair in note.replace(",", " ").replace(")", " ").split() if "=" in pair]
        if named:
            found = duplicates(path)
            assert set(named) <= set(found) and set(np.diff(found)) == {6}, (path.name, found)
        elif "no duplicates" in note:
            assert duplicates(path) == [], path.name
        checked += bool(named) or "no duplicates" in note
    print(f"{checked} of {checked} clips with a note on repeated frames agree")
    assert checked >= 2
