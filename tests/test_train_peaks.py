"""train/train.py, eval/infer_peaks.py and eval/eval_peaks.py on small videos written here.

A run repeats itself: resumed, with other workers, stopped by SIGTERM, killed at any point of a save, on two ranks.
What has to die runs in processes forked from a clean one (forkserver) that has imported the script already.
"""

import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.peak_files import load_predictions, read_csv
from data.video import VideoReader, VideoWriter, probe
from models.tempopeak import TempoPeak
from utils import run

ROOT = Path(__file__).resolve().parents[1]
N = 120  # frames of a video
CLEAN = multiprocessing.get_context("forkserver")


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_video(path: Path, seed: int) -> dict:
    """48x32 px: a square that turns round and flashes at every event, 12 to 24 frames apart; returns its labels."""
    rng = np.random.default_rng(seed)
    events = [e for e in np.cumsum(rng.integers(12, 25, N)).tolist() if e < N - 3]
    x, y, step = int(rng.integers(40)), int(rng.integers(24)), 3
    with VideoWriter(path, 25, (48, 32), crf=10) as video:
        for i in range(N):
            step = -step if i in events else step
            x, y = (x + step) % 40, (y + int(rng.integers(-4, 5))) % 24
            image = np.full((32, 48, 3), 50, np.uint8)
            image[y : y + 8, x : x + 8] = 255 if i in events else 140
            video.write(image)
    rows = [{"frame": f, "label": "turn", "lo": f, "hi": f} for f in events]
    return {"video": path.stem, "num_frames": N, "fps": 25.0, "width": 48, "height": 32, "events": rows}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder with a.mp4, b.mp4, labels.json of both and b.json of the second."""
    folder = tmp_path_factory.mktemp("data")
    items = [write_video(folder / "a.mp4", 1), write_video(folder / "b.mp4", 2)]
    (folder / "labels.json").write_text(json.dumps(items))
    (folder / "b.json").write_text(json.dumps(items[1:]))
    return folder


@pytest.fixture(autouse=True)
def signals():
    """The script's own SIGTERM handler must not outlive the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def quick(monkeypatch):
    """Without curves.png and without asking git: half of the time of a small run, and not what these tests look at."""
    monkeypatch.setattr(script("train/train.py"), "curves", lambda *paths: None)
    monkeypatch.setattr(run, "commit", lambda: "no-git")


KINDS = {
    "peak": ["--no-peak", "--head", "bimamba2", "--shift", "gsm", "--mixup", "0.3", "--splice", "0.2"],
    "spot": ["--task", "spot", "--head", "bigru", "--input", "graydiff", "--dropout", "0.2", "--accum", "2"],
}
SMALL = ["--head", "identity", "--event-share", "1"]


def flags(folder: Path, out: Path, kind: str = "spot", /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced, as save_every=1."""
    options = {"data": folder / "labels.json", "videos": folder, "out": out, "device": "cpu", "encoder": "tiny"}
    options |= {"size": "24x16", "clip_len": 16, "batch_size": 2, "clips": 20, "steps": 9, "print_every": 1, "seed": 5}
    words = [*(KINDS | {"small": SMALL, "bare": []})[kind]]
    for name, value in (options | more).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(folder: Path, out: Path, kind: str = "spot", /, **more) -> Path:
    assert run.cli(script("train/train.py").main, flags(folder, out, kind, **more)) == 0
    return out


def metrics(out: Path) -> list[dict]:
    """Rows of metrics.jsonl without the speed, which is not repeatable."""
    return [{k: v for k, v in row.items() if k != "clips_per_s"} for row in run.read_metrics(out)]


def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, optimizer, scaler and step of both `last` checkpoints, and the metrics rows."""
    assert equal(load_file(a / "last" / "model.safetensors"), load_file(b / "last" / "model.safetensors"))
    states = [{k: v for k, v in run.load_state(x / "last").items() if k != "args"} for x in (a, b)]
    assert equal(*states)
    assert metrics(a) == metrics(b)


# ---- a run repeats itself


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(quick, data, tmp_path, kind):
    whole = train(data, tmp_path / "whole", kind)
    part = train(data, tmp_path / "part", kind, stop_at=4)
    assert (part / "last").resolve().name == "step_000004" and len(metrics(part)) == 4
    train(data, part, kind, resume=part / "last")
    assert len(metrics(whole)) == 9
    assert_same_end(whole, part)
    start = load_file(part / "step_000004" / "model.safetensors")
    assert not equal(start, load_file(part / "last" / "model.safetensors"))  # it went on


def test_resume_repeats_the_losses_after_the_checkpoint(quick, data, tmp_path):
    """A killed run has reported more steps than it saved: they are dropped, and come again."""
    whole = train(data, tmp_path / "whole")
    part = train(data, tmp_path / "part", stop_at=6, save_every=4)
    shutil.rmtree(part / "step_000006")
    (part / "last").unlink()
    with open(part / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')  # cut by a kill
    train(data, part, resume=part / "step_000004")
    assert_same_end(whole, part)


def test_resume_auto_is_the_same_command_again(quick, data, tmp_path):
    """What a queue does: it repeats the command, whether the run is new, half done or finished."""
    whole, out = train(data, tmp_path / "whole"), tmp_path / "part"
    for stop_at, end_at in ((4, 4), (7, 7), (9, 9), (9, 9)):
        train(data, out, resume="auto", stop_at=stop_at)
        assert run.load_state(out / "last")["step"] == end_at
    assert_same_end(whole, out)


def test_resume_auto_of_a_run_killed_before_its_first_checkpoint(quick, data, tmp_path):
    out = tmp_path / "part"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "clips_per_s": 1.0}\n')
    train(data, out, resume="auto")
    assert_same_end(train(data, tmp_path / "whole"), out)


@pytest.mark.parametrize("more", [{"lr": 0.5}, {"batch_size": 3}, {"seed": 6}, {"no_augment": True}, {"steps": 10}])
def test_resume_refuses_other_flags(quick, data, tmp_path, capsys, more):
    part = train(data, tmp_path / "part", stop_at=1)
    before = {p.name: p.stat().st_mtime_ns for p in part.iterdir()}
    argv = flags(data, part, resume=part / "last", **more)
    assert run.cli(script("train/train.py").main, argv) == 2
    assert f"--{next(iter(more)).replace('_', '-')}" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in part.iterdir()} == before


def test_resume_does_not_write_into_another_run(quick, data, tmp_path, capsys):
    """--resume A --out B, where B holds a run of its own: its metrics and checkpoints stay."""
    a, b = train(data, tmp_path / "a", stop_at=1), train(data, tmp_path / "b", stop_at=3, seed=6)
    rows = metrics(b)
    assert run.cli(script("train/train.py").main, flags(data, b, resume=a / "last")) == 2
    assert str(b) in capsys.readouterr().err and metrics(b) == rows


def test_peak_on_labels_with_the_default_flags(quick, data, tmp_path):
    """PEAK without a no-peak logit learns from clips that hold a peak."""
    out = train(data, tmp_path / "run", "bare", clips=40, steps=8, head="identity")
    assert all(row["loss"] < 10 for row in metrics(out))


@pytest.mark.parametrize("kind", KINDS)
def test_workers_do_not_change_numbers(quick, data, tmp_path, kind):
    alone = train(data, tmp_path / "w0", kind, steps=5)
    assert_same_end(alone, train(data, tmp_path / "w2", kind, steps=5, workers=2))


def test_seed_decides(quick, data, tmp_path):
    """The comparisons above can fail: another seed gives other numbers from the first step on."""
    a, b = (train(data, tmp_path / str(s), steps=2, seed=s) for s in (1, 2))
    assert metrics(a)[0]["loss"] != metrics(b)[0]["loss"]


def test_rendered_rallies(tmp_path):
    words = ["--encoder", "tiny", "--size", "24x24", "--batch-size", "1", "--steps", "2", "--clips", "4"]
    words += ["--val-clips", "2", "--device", "cpu", "--print-every", "1", "--head", "identity", "--clip-len", "24"]
    assert run.cli(script("train/train.py").main, [*words, "--out", str(tmp_path / "run")]) == 0
    assert "val_loss" in metrics(tmp_path / "run")[-1]
    assert TempoPeak.from_checkpoint(tmp_path / "run" / "best").cfg.classes == ["near_court_swing"]


def test_overfit_stop_at_and_init(quick, data, tmp_path):
    words = {"overfit": 2, "steps": 60, "lr": "3e-3", "targets": "hard", "head": "bigru", "print_every": 10}
    out = train(data, tmp_path / "one", "bare", event_share=1, no_augment=True, **words)
    last = metrics(out)[-1]
    assert last["val_loss"] < 0.05 and last["acc@0"] == 1 and last["MAE"] == 0, last
    more = {**words, "init": out / "last", "stop_at": 1, "lr": "1e-9", "event_share": 1, "no_augment": True}
    again = train(data, tmp_path / "two", "bare", **more | {"print_every": 1})
    assert metrics(again)[0]["loss"] < 0.05  # starts where the other ended
    assert run.load_state(again / "last")["step"] == 1
    assert run.load_state(again / "last")["optimizer"]["state"][0]["step"] == 1  # a fresh optimizer


def test_validation_without_a_peak(quick, data, tmp_path):
    """Clips that hold no peak have a loss, but no frame error to average."""
    out = train(data, tmp_path / "run", "bare", no_peak=True, event_share=0, overfit=2, steps=2, head="identity")
    assert metrics(out)[-1]["val_loss"] > 0


def test_imagenet_weights(quick, data, tmp_path):
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(theirs, tmp_path / "resnet18.pth")
    more = {"encoder": "resnet18", "imagenet": tmp_path / "resnet18.pth", "steps": 1, "lr": "1e-12"}
    out = train(data, tmp_path / "run", "small", **more)
    ours = load_file(out / "last" / "model.safetensors")
    torch.testing.assert_close(ours["encoder.layer4.1.conv2.weight"], theirs["layer4.1.conv2.weight"])


# ---- runs that die


def child(argv: list[str], env: dict[str, str] | None = None, own_group: bool = False, die_at: int | None = None):
    """Body of a forked process: train.py with argv. die_at: SIGKILL at that many-th touch of the disk (from 0)."""
    torch.set_num_threads(1)
    os.environ.update(env or {})
    if own_group:
        os.setsid()
    if die_at is not None:
        count_down(die_at)
    sys.exit(run.cli(script("train/train.py").main, argv))


def count_down(left: int) -> None:
    """Wrap everything that a save does to the disk: the process is killed just before, or in the middle of, one."""

    def wrap(owner, name: str, half=None):
        original = getattr(owner, name)

        def counted(*args, **kw):
            nonlocal left
            if left == 0:
                if half is not None:
                    half(*args, **kw)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(*args, **kw)

        setattr(owner, name, counted)

    def half(path, content, *_, **__):
        with open(path, "wb") as f:
            f.write(bytes(content, "utf-8")[: len(content) // 2] if isinstance(content, str) else bytes(content)[:100])

    wrap(Path, "write_bytes", half)
    wrap(Path, "write_text", half)
    wrap(Path, "mkdir")
    wrap(Path, "symlink_to")
    wrap(os, "rename")
    wrap(os, "replace")
    wrap(shutil, "rmtree", half=lambda folder, *_, **__: [p.unlink() for p in list(Path(folder).glob("*"))[:1]])


def begin(argv: list[str], **more) -> multiprocessing.Process:
    CLEAN.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot", "av", "utils.run", "models.tempopeak"])
    process = CLEAN.Process(target=child, args=(argv,), kwargs=more)
    process.start()
    return process


def end(process, seconds: float = 120) -> int:
    """Exit code; a process that hangs is killed and fails the test."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"still running after {seconds} s")
    return process.exitcode


def wait_for(condition, process, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None and time.monotonic() < until, "the run ended, or never came that far"
        time.sleep(0.02)


def step_of_last(out: Path) -> int:
    """Step of the `last` checkpoint, which must load completely; -1 without one."""
    if not (out / "last").is_symlink():
        return -1
    model, state = TempoPeak.from_checkpoint(out / "last"), run.load_state(out / "last")
    assert len(state["optimizer"]["state"]) == len(list(model.parameters()))
    return state["step"]


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_the_rest_is_the_same(quick, data, tmp_path, workers):
    """A queue signals every process of the job, loader workers too."""
    out, steps = tmp_path / "stopped", 100_000
    process = begin(flags(data, out, steps=steps, workers=workers, save_every=steps), own_group=True)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(run.read_metrics(out)) > 1, process)
    os.killpg(process.pid, signal.SIGTERM) if workers else os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 0
    step = step_of_last(out)
    assert step >= 2 and metrics(out)[-1]["step"] == step
    train(data, out, resume=out / "last", steps=steps, stop_at=step + 2)
    assert_same_end(train(data, tmp_path / "whole", steps=steps, stop_at=step + 2), out)


def test_kill_at_every_touch_of_the_disk(quick, data, tmp_path):
    """kill -9 at the 1st, 2nd, 3rd .. thing that a resumed run with one more save does to the disk, then resume it."""
    more = {"save_every": 1, "steps": 5, "data": data / "b.json"}
    base = train(data, tmp_path / "base", "small", **more, stop_at=4)
    whole = train(data, tmp_path / "whole", "small", **more)
    for die_at in range(100):
        out = tmp_path / f"killed_{die_at}"
        shutil.copytree(base, out, symlinks=True)
        code = end(begin(flags(data, out, "small", **more, resume="auto"), die_at=die_at))
        if code == 0:
            break
        assert code == -signal.SIGKILL and step_of_last(out) >= 4
        train(data, out, "small", **more, resume="auto")
        assert_same_end(whole, out)
        assert not list(out.glob(".tmp-*")) and len(list(out.glob("step_*"))) in (3, 4)  # 4: killed while deleting one
        shutil.rmtree(out)
    assert code == 0 and die_at > 10


def test_kill_at_random_moments(quick, data, tmp_path):
    out, rng, reached = tmp_path / "killed", np.random.default_rng(0), -1
    more = {"steps": 30, "save_every": 1, "data": data / "b.json"}
    for _ in range(5):
        process = begin(flags(data, out, "small", **more, resume="auto"))
        wait_for(lambda low=reached, p=process: step_quick(out) > low or p.exitcode == 0, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert end(process) in (-signal.SIGKILL, 0)
        assert step_of_last(out) >= max(reached, 1)
        reached = min(step_of_last(out), 29)
    train(data, out, "small", **more, resume="auto")
    assert_same_end(train(data, tmp_path / "whole", "small", **more), out)


def step_quick(out: Path) -> int:
    """Step in the name that the link `last` points to; -1 without one."""
    return int(os.readlink(out / "last").removeprefix("step_")) if (out / "last").is_symlink() else -1


# ---- two ranks


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def assert_near_losses(a: Path, b: Path) -> None:
    rows = [[row["loss"] for row in metrics(x)] for x in (a, b)]
    assert len(rows[0]) == len(rows[1]) > 1
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process_with_accum(quick, data, tmp_path, kind):
    two, accum = tmp_path / "two", 4 if kind == "spot" else 2  # spot accumulates 2 on each rank already
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = flags(data, two, kind, steps=4, lr="1e-4")
    ranks = [begin(words, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [end(process) for process in ranks] == [0, 0]
    one = train(data, tmp_path / "one", kind, steps=4, lr="1e-4", accum=accum)
    assert_near_losses(one, two)
    assert step_of_last(two) == 4
    a, b = (load_file(x / "last" / "model.safetensors") for x in (one, two))
    trained = [k for k in a if "running" not in k and "num_batches" not in k]
    assert max((a[k] - b[k]).abs().max().item() for k in trained) < 1e-3


@pytest.mark.slow
def test_torchrun(data, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = flags(data, tmp_path / "two", steps=4, lr="1e-4")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(ROOT / "train" / "train.py"), *words], check=True, env=env, timeout=300)
    assert_near_losses(train(data, tmp_path / "one", steps=4, lr="1e-4", accum=4), tmp_path / "two")


# ---- train -> infer -> evaluate


def test_spot_chain(data, tmp_path):
    """Learn on one video, spot the turns of the other; files, figures, and no look at the labels."""
    words = {"steps": 30, "clips": 200, "lr": "3e-3", "batch_size": 4, "no_flip": True, "head": "bigru", "task": "spot"}
    (data / "a.json").write_text(json.dumps(json.loads((data / "labels.json").read_text())[:1]))
    more = {**words, "data": data / "a.json", "val_data": data / "b.json", "val_frames": "0:120", "print_every": 10}
    out = train(data, tmp_path / "run", "bare", **more)
    last = metrics(out)[-1]
    assert last["mAP@1"] > 0.8 and {"mAP@0", "mAP@2", "mAP@4"} <= set(last)
    assert (out / "curves.png").stat().st_size > 1000 and (out / "metrics.csv").read_text().count("\n") > 3

    pred = tmp_path / "pred"
    argv = [str(data / "b.mp4"), "--ckpt", str(out / "last"), "--out", str(pred), "--device", "cpu"]
    assert run.cli(script("eval/infer_peaks.py").main, argv) == 0
    check_files(pred, data / "b.mp4", "turn", 0.5)

    result = tmp_path / "result.json"
    argv_eval = ["--pred", str(pred / "peaks.json"), "--labels", str(data / "b.json"), "--json", str(result)]
    assert run.cli(script("eval/eval_peaks.py").main, argv_eval) == 0
    figures = json.loads(result.read_text())
    assert figures["mAP"]["1"] == pytest.approx(last["mAP@1"], abs=0.1)  # windows overlap alike, fusion too
    assert figures["shuffled"]["mAP"]["1"] < 0.5 < figures["mAP"]["1"]

    alone = tmp_path / "alone"  # the video, and nothing else
    alone.mkdir()
    shutil.copy(data / "b.mp4", alone)
    argv = [str(alone / "b.mp4"), "--ckpt", str(out / "last"), "--out", str(alone / "pred"), "--device", "cpu"]
    assert run.cli(script("eval/infer_peaks.py").main, [*argv, "--no-video", "--no-pictures"]) == 0
    assert (alone / "pred" / "peaks.json").read_bytes() == (pred / "peaks.json").read_bytes()
    assert sorted(p.name for p in (alone / "pred").iterdir()) == ["peaks.csv", "peaks.json", "peaks.json.meta.json"]


def test_peak_chain(data, tmp_path):
    words = {"steps": 40, "clips": 200, "lr": "3e-3", "batch_size": 4, "no_flip": True, "head": "bimamba2"}
    more = {"no_peak": True, "val_frames": "0:120", "val_clips": 16, "print_every": 20, "val_every": 20}
    out = train(data, tmp_path / "run", "bare", **words, **more)
    rows = [row for row in metrics(out) if "val_loss" in row]
    assert len(rows) == 2 and rows[-1]["acc@1"] > 0.8, rows
    assert (out / "best").is_symlink()
    pred = tmp_path / "pred"
    videos = [str(data / f"{x}.mp4") for x in "ab"]
    argv = [*videos, "--ckpt", str(out / "best"), "--out", str(pred), "--device", "cpu", "--threshold", "0.3"]
    assert run.cli(script("eval/infer_peaks.py").main, argv) == 0
    for name in "ab":
        check_files(pred, data / f"{name}.mp4", "turn", 0.3)
    assert [v["video"] for v in load_predictions(pred / "peaks.json")] == ["a", "b"]
    argv = [
        "--pred",
        str(pred / "peaks.json"),
        "--labels",
        str(data / "labels.json"),
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert run.cli(script("eval/eval_peaks.py").main, argv) == 0
    assert json.loads((tmp_path / "r.json").read_text())["mAP"]["2"] > 0.5


def check_files(pred: Path, video: Path, label: str, threshold: float) -> None:
    """All that infer_peaks.py promises for one video."""
    items = {v["video"]: v for v in load_predictions(pred / "peaks.json")}
    item = items[video.stem]
    assert (item["num_frames"], item["fps"], item["width"], item["height"]) == (N, 25.0, 48, 32)
    assert {e["label"] for e in item["events"]} == {label} and max(e["score"] for e in item["events"]) >= threshold
    table = {v["video"]: v["events"] for v in read_csv(pred / "peaks.csv")}[video.stem]
    assert [(e["frame"], e["score"]) for e in table] == [(e["frame"], e["score"]) for e in item["events"]]
    assert all(e["time_s"] == pytest.approx(e["frame"] / 25) for e in table)
    about = json.loads((pred / "peaks.json.meta.json").read_text())
    assert len(about["checkpoint_sha256"]) == 64 and str(video) in [x["path"] for x in about["inputs"]]
    assert about["config"]["classes"] == [label] and "command" in about and "commit" in about
    source, copy = probe(video), VideoReader(pred / f"{video.stem}.annotated.mp4")
    assert len(copy) == N and copy.info.rate == source.rate and copy.info.width >= 48
    for picture in (f"{video.stem}.timeline.png", f"{video.stem}.strips_1.png"):
        assert (pred / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", picture
    assert not list(pred.glob(".*"))  # nothing half-written
