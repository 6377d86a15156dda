"""data/check_dataset.py on small videos made here: counts, verdicts, every problem as one sentence, the picture."""

import argparse
import functools
import importlib.util
import json
import os
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data import peak_checks
from data.peak_labels import PeakClips
from data.video import VideoWriter
from utils import overlay, run

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data/tempopeak"
SIZE = (64, 48)  # (W, H) px


@functools.cache
def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = functools.partial(script, "data/check_dataset.py")


def pictures(n: int, repeat: tuple[int, ...] = ()):
    """Moving blocks, uint8 (H, W, 3); the frames in `repeat` equal those before them."""
    blocks = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    at = 0
    for i in range(n):
        at += 0 if i in repeat else 5
        yield np.roll(blocks, at, 1)


def item(video: str, num_frames: int, *events: tuple[int, str], **more) -> dict:
    about = {"video": video, "num_frames": num_frames, "fps": 25.0, "width": SIZE[0], "height": SIZE[1]}
    return {**about, "events": [{"frame": f, "label": label} for f, label in events], **more}


def labels() -> list[dict]:
    return [item("a", 60, (10, "hit"), (40, "hit"), (45, "bounce")), item("b", 30, (20, "hit"), complete_for=["hit"])]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, n, repeat in (("a", 60, ()), ("b", 30, (7, 14, 21))):
        with VideoWriter(folder / f"{name}.mp4", 25.0, SIZE) as writer:
            for image in pictures(n, repeat):
                writer.write(image)
    return folder


@pytest.fixture
def ask(tmp_path, videos, capsys):
    """Run FORMAT peaks on label items -> (exit code, standard output, standard error)."""

    def call(items: list[dict], *flags: str) -> tuple[int, str, str]:
        path = tmp_path / "labels.json"
        path.write_text(json.dumps(items))
        code = run.cli(check().main, ["peaks", str(path), "--videos", str(videos), *flags])
        return code, *capsys.readouterr()

    return call


# ---- what it counts


def test_counts(ask):
    code, out, err = ask(labels(), "--clip-len", "16")
    assert (code, err) == (0, "") and out.rstrip().endswith("no problem found")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for want in (
        "2 videos, 90 frames, 3.6 s, 4 events",
        "fps: 25 (2 videos)",
        "size: 64x48 (2 videos)",
        "bounce 1 1 0",
        "hit 3 2 0",
        "note: 'b' is not complete for bounce; clips without these may hold them",
        "gaps between events (frames): smallest 5, median 18, largest 30, n 2",
        "a.mp4: 60 frames, 64x48, 25 fps, h264, 3 events, 0 duplicated frames",
        "b.mp4: 30 frames, 64x48, 25 fps, h264, 1 events, 3 duplicated frames (7, 14, 21)",
    ):
        assert want in lines, f"{want!r} is not in\n{out}"


def test_chosen_classes_and_frames_are_counted(ask):
    _, out, _ = ask(labels(), "--clip-len", "16", "--classes", "hit", "--no-duplicates")
    assert "gaps between events (frames): smallest 30, median 30, largest 30, n 1" in out
    assert "left out (--classes)" in out and "note:" not in out and "duplicated" not in out
    _, out, _ = ask(labels(), "--clip-len", "16", "--frames", "0:30", "--no-duplicates")
    assert "gaps between" not in out and "(n 30)" in out  # 15 windows in each video


@pytest.mark.parametrize("T", [1, 5, 6, 16, 60, 64])
def test_windows_are_those_that_peak_clips_draws_from(videos, T):
    events = peak_checks.event_frames(labels(), ["bounce", "hit"], None)
    count = [[sum(s <= f < s + T for f in at) for s in range(max(0, stop - T) + 1)] for at, _, stop in events]
    want = [sum(min(n, 3) == k for video in count for n in video) for k in range(4)]
    assert peak_checks.windows_by_events(events, T).tolist() == want
    single = functools.partial(PeakClips, labels(), videos, ["bounce", "hit"], T, SIZE, single=True)
    if T == 64:  # whole videos: only b has one event, nothing is without
        assert len(single(events=1.0).by_event) == 1
    clips = single(events=1.0)
    assert peak_checks.never_alone(events, T) == 4 - len(clips.by_event)
    assert len(clips.empty) == count[0].count(0)  # b is not fully annotated for bounces, so it proves no absence


@pytest.mark.parametrize(
    "T, frames, verdict",
    [
        (
            16,
            (10, 40, 45),
            "--task spot: .* 0 of 3 events are never alone in one; PEAK would need --clip-len 5 or less",
        ),
        (
            50,
            (10, 40, 45),
            "--task spot: .* 3 of 3 events are never alone in one; PEAK would need --clip-len 5 or less",
        ),
        (5, (10, 40, 45), "--task peak --no-peak"),
        (60, (10,), "--task peak: every window holds exactly one event"),
        (40, (30,), "--task peak: every window holds exactly one event"),
        (30, (10, 10), "--task spot: .* 2 of 2 events are never alone in one$"),
        (30, (), "nothing to learn"),
    ],
)
def test_verdict(T, frames, verdict):
    found = [(np.array(frames, np.int64), 0, 60)]
    assert re.search(verdict, peak_checks.verdict(found, T)), peak_checks.verdict(found, T)


def test_a_folder_of_label_files_and_no_videos(tmp_path, capsys):
    for k, one in enumerate(labels()):
        (tmp_path / f"{k}.json").write_text(json.dumps([one]))
    assert run.cli(check().main, ["peaks", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 videos, 90 frames" in out and "videos: not looked at (no --videos)" in out


def test_variable_frame_rate_is_reported(tmp_path, capsys):
    times_ms = np.cumsum([0] + [20, 60, 40] * 9).tolist()
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, t in zip(pictures(28), times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    (tmp_path / "v.json").write_text(json.dumps([item("v", 28, (3, "hit"), fps=-1)]))
    assert run.cli(check().main, ["peaks", str(tmp_path / "v.json"), "--videos", str(tmp_path)]) == 0
    assert "VARIABLE (vfr)" in capsys.readouterr().out


# ---- problems


PROBLEMS = {
    "a.mp4: has 60 frames, but its labels name frame 70": item("a", 90, (70, "hit")),
    "a.mp4: has 60 frames, its labels say num_frames 61": item("a", 61, (10, "hit")),
    "a.mp4: is 64x48 px, its labels say 640x480": item("a", 60, (10, "hit"), width=640, height=480),
    "a.mp4: runs at 25 fps, its labels say 50": item("a", 60, (10, "hit"), fps=50.0),
    "no video c.mp4": item("c", 60, (10, "hit")),
    "frame 60 is outside [0, 60)": item("a", 60, (60, "hit")),
    "the labels name no class": item("a", 60),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_first_problem_is_one_sentence(ask, problem):
    code, out, err = ask([PROBLEMS[problem]])
    assert code == 2 and err.startswith("error: ") and problem in err and err.count("\n") == 1, err
    assert "no problem found" not in out


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--classes", "hit,smash"], "--classes smash: not among the labels bounce, hit"),
        (["--frames", "0-30"], "--frames 0-30: expected 2 whole numbers joined by ':'"),
        (["--frames", "70:80"], "video 'a' has 60 frames"),
        (["--size", "0x10"], "--size 0x10"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--batch-size", "0"], "--batch-size 0: expected at least 1"),
        (["--show", "x.png", "--clip-len", "12", "--crop", "0,0,99,9"], "crop x=0 y=0 w=99 h=9 does not fit in 64x48"),
        (["--show", "x.png", "--splice", "0.5"], "--splice can cut the peak away"),
    ],
)
def test_bad_flags(ask, tmp_path, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    code, _, err = ask(labels(), *flags, "--no-duplicates")
    assert code == 2 and problem in err and err.count("\n") == 1, err
    assert not list(tmp_path.glob("*.png"))


def test_bad_roots(tmp_path, capsys):
    def refused(*argv: str) -> str:
        assert run.cli(check().main, list(argv)) == 2
        return capsys.readouterr().err

    assert "needs ROOT" in refused("peaks")
    assert "holds no *.json" in refused("peaks", str(tmp_path))
    assert "cannot be read" in refused("peaks", str(tmp_path / "none.json"))
    assert "invalid choice" in refused("balls", str(tmp_path))
    assert "takes neither ROOT nor --videos" in refused("rally", str(tmp_path))
    assert "at least 8 frames" in refused("rally", "--clip-len", "4")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(labels()))
    assert "video 'a' stands in" in refused("peaks", str(tmp_path))
    assert "--show needs --videos" in refused("peaks", str(tmp_path / "a.json"), "--show", str(tmp_path / "x.png"))


# ---- the picture


def training_batch(flags: list[str]) -> list[dict]:
    """The items of the first step as train/train.py makes them."""
    train = script("train/train.py")
    args = train.parse_args(flags)
    size, crop = run.numbers("--size", args.size, "x", 2), run.numbers("--crop", args.crop, ",", 4)
    data = train.make_data(args, size, crop)[0]
    keys = next(iter(run.StepBatches(len(data), args.batch_size, 0, 5, args.seed)))
    return [data[key] for key in keys]


@pytest.mark.parametrize(
    "flags",
    [
        ["--task", "spot", "--clip-len", "12", "--crop", "8,0,48,40", "--size", "32x24", "--seed", "3"],
        [
            "--task",
            "spot",
            "--clip-len",
            "12",
            "--classes",
            "bounce",
            "--frames",
            "5:55",
            "--splice",
            "0.9",
            "--no-flip",
        ],
        ["--no-peak", "--clip-len", "12", "--event-share", "0.5", "--no-augment", "--clips", "7", "--batch-size", "3"],
    ],
)
def test_the_picture_holds_what_training_sees(ask, tmp_path, videos, monkeypatch, flags):
    items = labels()[:1] if "--frames" in flags else labels()
    drawn = []
    monkeypatch.setattr(check(), "draw_batch", lambda batch, *_: drawn.extend(batch) or np.zeros((2, 2, 3), np.uint8))
    code, _, err = ask(items, "--no-duplicates", "--show", str(tmp_path / "x.png"), *flags)
    assert code == 0, err
    want = training_batch(["--data", str(tmp_path / "labels.json"), "--videos", str(videos), *flags])
    assert len(drawn) == len(want)
    for mine, theirs in zip(drawn, want, strict=True):
        assert set(mine) == set(theirs) and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_rally_picture_holds_what_training_sees(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(check(), "draw_batch", lambda batch, *_: drawn.extend(batch) or np.zeros((2, 2, 3), np.uint8))
    flags = ["--size", "24x24", "--clip-len", "16", "--level", "hard", "--no-peak", "--batch-size", "2", "--seed", "5"]
    show = ["--limit", "3", "--show", str(tmp_path / "x.png")]
    assert run.cli(check().main, ["rally", *flags, *show]) == 0
    want = training_batch(flags)
    assert len(drawn) == 2 and all(torch.equal(a[k], b[k]) for a, b in zip(drawn, want, strict=True) for k in a)
    out = capsys.readouterr().out
    assert (
        "3 of 1000 clips rendered: " in out and "time per rendered clip: median" in out and "contacts in a clip" in out
    )


def test_shared_flags_are_those_of_train():
    """Same name, default, choices and help as in train/train.py, for every flag that both have."""

    def actions(module) -> dict[str, tuple]:
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: seen.append(self))
            module.parse_args([])
        return {a.dest: (a.option_strings, a.default, a.help, a.type, list(a.choices or [])) for a in seen[0]._actions}

    mine, theirs = actions(check()), actions(script("train/train.py"))
    same = [name for name in mine if name in theirs and name not in ("help", "videos")]
    assert len(same) >= 15 and [(k, mine[k]) for k in same] == [(k, theirs[k]) for k in same]


def test_draw_batch(monkeypatch):
    captions = []
    grid = overlay.grid
    monkeypatch.setattr(check().overlay, "grid", lambda i, columns, c: captions.extend(c) or grid(i, columns, c))
    none = torch.full((2, 4), -1)
    events = torch.tensor([[4, 2, 3, 5], [6, 1, 6, 6]])
    rest = {"length": torch.tensor(20), "video": torch.tensor(0), "start": torch.tensor(100)}
    frames = torch.randint(0, 256, (20, 3, 24, 32), dtype=torch.uint8)
    batch = [
        {"frames": frames, "events": events, "peak": torch.tensor(4), **rest},
        {"frames": frames, "events": none, "peak": torch.tensor(-1), **rest},
    ]
    sheet = check().draw_batch(batch, ["bounce", "hit"], ["a.mp4"], 5, "peak")
    assert captions[0] == "2 (clip 0: 2 events, a.mp4 from frame 100)" and captions[1] == "3"
    assert captions[2] == "4 PEAK hit" and captions[4] == "6 bounce"
    assert [c.split()[0] for c in captions[5:]] == ["0", "5", "10", "14", "19"]
    pixels = frames[2].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)  # (96, 128, 3), enlarged by whole pixels
    assert np.array_equal(sheet[4:100, 4:132], pixels)
    captions.clear()
    check().draw_batch(batch, ["bounce", "hit"], None, 5, "spot")
    assert captions[2] == "4 hit" and captions[0] == "2 (clip 0: 2 events)"


@pytest.mark.parametrize(
    "peak, columns, want",
    [(0, 3, [0, 1, 2]), (5, 3, [4, 5, 6]), (9, 3, [7, 8, 9]), (5, 99, list(range(10)))],
)
def test_frames_to_show_stay_inside_the_clip(peak, columns, want):
    item = {"length": torch.tensor(10), "peak": torch.tensor(peak), "events": torch.full((1, 4), -1)}
    assert peak_checks.frames_to_show(item, columns) == want


def test_the_picture_is_written(ask, tmp_path):
    target = tmp_path / "new/sheet.png"
    code, out, _ = ask(labels(), "--task", "spot", "--clip-len", "12", "--show", str(target), "--no-duplicates")
    assert code == 0 and f"picture of the first training batch: {target}" in out
    with Image.open(target) as picture:
        assert picture.size[0] == 9 * (128 + 4) + 4 and np.asarray(picture).std() > 20


def test_real_annotations(capsys):
    files = sorted((SHARED / "annotations").glob("*.json"))
    if not files:
        pytest.skip("LAB_SHARED is not there")
    for path in files:
        argv = ["peaks", str(path), "--videos", str(SHARED / "videos"), "--no-duplicates"]
        assert run.cli(check().main, argv) == 0, f"{path.name}: {capsys.readouterr().err}"
    with capsys.disabled():
        print(f"\nreal annotation files that agree with their videos: {len(files)} of {len(files)}")
