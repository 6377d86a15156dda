"""THE TABLE of bad input: what a user can get wrong is one sentence on stderr, exit code 2, and leaves nothing behind.

Each row is (what, script, arguments, words that the sentence must hold). In the arguments, names of the folder `world`
stand in braces; {out} is a fresh --out. Every script runs in process through run.cli, as its last line does.
"""

import builtins
import errno
import functools
import importlib.util
import io
import json
import math
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.video import VideoWriter
from models.tempopeak import TempoPeak, TempoPeakConfig
from utils import run

ROOT = Path(__file__).resolve().parents[1]
N = 40  # frames of good.mp4
TRAIN, INFER, EVAL = "train/train.py", "eval/infer_peaks.py", "eval/eval_peaks.py"


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(**changes) -> TempoPeakConfig:
    plain = {"encoder": "tiny", "head": "identity", "classes": ["turn"], "clip_len": 16, "size": [24, 16]}
    return TempoPeakConfig(**plain | changes)


def save_model(folder: Path, cfg: TempoPeakConfig, name: str = "TempoPeak") -> Path:
    """A checkpoint of a fresh model, with the optimizer state of a run that has not begun."""
    torch.manual_seed(0)
    model = TempoPeak(cfg)
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    state = {"optimizer": optimizer, "scaler": {}, "best": -1.0, "args": {}, "world": 1}
    return run.save_checkpoint(folder, 1, model, {**model.config_dict(), "class": name}, state)


def write_video(path: Path) -> None:
    with VideoWriter(path, 25, (48, 32), crf=5) as video:
        for i in range(N):
            image = np.random.default_rng(i // 4).integers(0, 255, (32, 48, 3), dtype=np.uint8)
            image[:, i : i + 8] = 255
            video.write(image)


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        for k in range(8):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 8000, 1024 * k
            file.mux(stream.encode(tone))
        file.mux(stream.encode(None))


def item(name: str, *frames: int, num_frames: int = N, label: str = "turn") -> dict:
    about = {"video": name, "num_frames": num_frames, "fps": 25.0, "width": 48, "height": 32}
    return {**about, "events": [{"frame": f, "label": label} for f in frames]}


BAD_VIDEOS = {  # name -> words of the refusal
    "zero": "is empty (0 bytes)",
    "noise": "not a readable video file",
    "cut": "not a readable video file",
    "sound": "no video stream",
    "folder": "is a folder",
    "damaged": "cannot be decoded",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Everything that the table names: videos, label files, checkpoints, all good but for what their name says."""
    w = tmp_path_factory.mktemp("world")
    (w / "v").mkdir()
    write_video(w / "v" / "good.mp4")
    good = (w / "v" / "good.mp4").read_bytes()
    (w / "v" / "zero.mp4").touch()
    (w / "v" / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (w / "v" / "cut.mp4").write_bytes(good[: len(good) // 2])
    write_sound(w / "v" / "sound.mp4")
    (w / "v" / "folder.mp4").mkdir()
    third = len(good) // 3
    (w / "v" / "damaged.mp4").write_bytes(good[:third] + bytes(third // 2) + good[third + third // 2 :])
    (w / "again").mkdir()
    write_video(w / "again" / "good.mp4")

    labels = {
        "labels": [item("good", 8, 30)],
        "two_classes": [
            {**item("good", 8), "events": [*item("good", 8)["events"], *item("g", 30, label="hit")["events"]]}
        ],
        "beyond": [item("good", 8, N)],
        "longer": [item("good", 8, N + 5, num_frames=N + 10)],
        "negative": [item("good", -1)],
        "no_events": [item("good")],
        "nothing": [],
        "no_fps": [{k: v for k, v in item("good", 8).items() if k != "fps"}],
        "absent": [item("elsewhere", 8)],
        **{f"labels_{name}": [item(name, 8, 30)] for name in BAD_VIDEOS},
    }
    for name, content in labels.items():
        (w / f"{name}.json").write_text(json.dumps(content))
    (w / "not.json").write_text("[{'video'")
    (w / "binary.json").write_bytes(bytes(range(128, 200)))

    save_model(w / "ok", config())
    save_model(w / "crop", config(crop=[40, 0, 20, 20], crop_of=[48, 32]))
    save_model(w / "bigru", config(head="bigru"))
    save_model(w / "spot", config(task="spot", classes=["turn", "hit"]))
    save_model(w / "foreign", config(), name="Sam3")
    for name in ("nan", "short", "no_state", "cut_state", "no_json"):
        save_model(w / name, config())
    tensors = load_file(w / "nan" / "last" / "model.safetensors")
    tensors["classifier.weight"][0, 0] = math.nan
    save_file(tensors, w / "nan" / "last" / "model.safetensors")
    weights, state = w / "short" / "last" / "model.safetensors", w / "cut_state" / "last" / "state.pt"
    weights.write_bytes(weights.read_bytes()[:-40])
    state.write_bytes(state.read_bytes()[:500])
    (w / "no_state" / "last" / "state.pt").unlink()
    (w / "no_json" / "last" / "config.json").write_text("{")
    torch.save({"weight": torch.zeros(2)}, w / "other.pth")

    (w / "used").mkdir()
    (w / "used" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (w / "used" / "peaks.json").write_text("[]")
    (w / "a_file").write_text("text")
    scored = [{**item("good"), "events": [{"frame": 8, "label": "turn", "score": 0.9}]}]
    (w / "pred.json").write_text(json.dumps(scored))
    (w / "pred_serve.json").write_text(
        json.dumps([{**scored[0], "events": [{**scored[0]["events"][0], "label": "serve"}]}])
    )
    (w / "pred_other.json").write_text(json.dumps([{**scored[0], "video": "other"}]))
    (w / "pred_score.json").write_text(
        json.dumps([{**scored[0], "events": [{**scored[0]["events"][0], "score": 1.5}]}])
    )
    return w


# arguments that are right: what a row adds comes later and wins
RIGHT = {
    TRAIN: "--data {labels.json} --videos {v} --out {out} --device cpu --encoder tiny --head identity --size 24x16 "
    "--clip-len 16 --batch-size 2 --clips 8 --steps 1 --event-share 1",
    INFER: "{v/good.mp4} --ckpt {ok/last} --out {out} --device cpu --no-video --no-pictures",
    EVAL: "--pred {pred.json} --labels {labels.json} --json {out}/result.json",
}

TABLE = [
    # ---- videos
    *[
        (f"{n} video", TRAIN, f"--data {{labels_{n}.json}}", f"{n}.mp4: | {w}")
        for n, w in BAD_VIDEOS.items()
        if n != "folder"  # find_video takes files only
    ],
    *[(f"{n} video", INFER, f"{{v/{n}.mp4}}", f"{n}.mp4: | {w}") for n, w in BAD_VIDEOS.items()],
    ("no such video", INFER, "{v}/none.mp4", "none.mp4: no such video file"),
    ("two videos of one stem", INFER, "{again/good.mp4}", "two videos are called good | rename"),
    ("video not in --videos", TRAIN, "--data {absent.json}", "no video elsewhere.mp4 | --videos"),
    ("no such folder of videos", TRAIN, "--videos {v}/none", "none: | no video good.mp4"),
    ("labels without --videos", TRAIN, "NOT --videos {v}", "--data needs --videos"),
    ("crop outside the video", TRAIN, "--crop 40,0,20,20", "crop x=40 y=0 w=20 h=20 does not fit in 48x32"),
    ("crop outside the video", INFER, "--ckpt {crop/last}", "crop x=40 y=0 w=20 h=20 does not fit in 48x32"),
    # ---- labels
    ("labels that are no json", TRAIN, "--data {not.json}", "not.json: is not json"),
    ("labels that are no text", TRAIN, "--data {binary.json}", "binary.json: is not json"),
    ("no such labels", TRAIN, "--data {labels.json}x", "labels.jsonx: cannot be read"),
    ("empty label file", TRAIN, "--data {nothing.json}", "nothing.json: expected a non-empty json list"),
    ("labels without fps", TRAIN, "--data {no_fps.json}", "video 'good': key 'fps' is missing"),
    ("label beyond num_frames", TRAIN, "--data {beyond.json}", f"video 'good', event 1: frame {N} is outside [0, {N})"),
    ("label beyond the video", TRAIN, "--data {longer.json}", f"good.mp4: has {N} frames | name frame {N + 5}"),
    ("negative frame", TRAIN, "--data {negative.json}", "frame -1 is outside"),
    ("labels without events", TRAIN, "--data {no_events.json}", "labels"),
    ("unknown class", TRAIN, "--classes serve", "--classes serve: not among the labels ['turn']"),
    ("PEAK with two classes", TRAIN, "--data {two_classes.json}", "--classes | --task spot"),
    ("no background", TRAIN, "--clip-len 40 --event-share 0.5 --task spot", "clip holds an event | --event-share"),
    # ---- flags
    ("--size", TRAIN, "--size 64", "--size 64: expected 2 whole numbers joined by 'x'"),
    ("--size", TRAIN, "--size 0x16", "size 0x16"),
    ("--crop", TRAIN, "--crop 1,2,3", "--crop 1,2,3: expected 4 whole numbers joined by ','"),
    ("--frames", TRAIN, "--frames a:b", "--frames a:b: expected 2 whole numbers"),
    ("--frames", TRAIN, "--frames 30:10", "--frames 30:10"),
    ("--frames outside", TRAIN, "--frames 50:90", f"--frames 50:90: | has {N} frames"),
    ("--val-frames outside", TRAIN, "--val-frames 50:90", f"--val-frames 50:90: | has {N} frames"),
    ("--batch-size", TRAIN, "--batch-size 0", "--batch-size 0"),
    ("--accum", TRAIN, "--accum 0", "--accum 0"),
    ("--steps", TRAIN, "--steps 0", "--steps 0"),
    ("--clips", TRAIN, "--clips 0", "--clips"),
    ("--clip-len", TRAIN, "--clip-len 0", "--clip-len 0"),
    ("--print-every", TRAIN, "--print-every 0", "--print-every 0"),
    ("--dropout", TRAIN, "--dropout 1.5", "--dropout 1.5"),
    ("--lr", TRAIN, "--lr -1", "--lr -1"),
    ("--head-layers", TRAIN, "--head bigru --head-layers 0", "--head-layers 0"),
    ("--no-peak with SPOT", TRAIN, "--task spot --no-peak", "--no-peak"),
    ("--splice without no-peak", TRAIN, "--splice 0.5", "--splice | --no-peak"),
    ("--overlap", INFER, "--overlap 1", "--overlap 1.0: expected 0..0.95"),
    ("--batch-size", INFER, "--batch-size 0", "--batch-size 0: expected 1.."),
    ("clips too short for rallies", TRAIN, "--data rally --clip-len 4", "--clip-len 4"),
    # ---- device
    *[("no GPU", s, "--device cuda", "--device cuda: | sees no GPU") for s in (TRAIN, INFER)],
    *[("no such GPU", s, "--device cuda:77", "--device cuda:77:") for s in (TRAIN, INFER)],
    *[("no such device", s, "--device abacus", "--device abacus: not a device") for s in (TRAIN, INFER)],
    *[("fp16 on a CPU", s, "--dtype fp16", "--dtype fp16 on --device cpu") for s in (TRAIN, INFER)],
    ("kernels without CUDA", TRAIN, "--head mamba2 --impl mamba_ssm", "--impl mamba_ssm: | --impl torch"),
    # ---- checkpoints
    *[
        (f"{what}", s, f"{flag} {{{folder}}}", words)
        for s, flag in ((INFER, "--ckpt"), (TRAIN, "--init"), (TRAIN, "--resume"))
        for what, folder, words in (
            ("no checkpoint", "v", "not a checkpoint folder (config.json is missing)"),
            ("run folder for a checkpoint", "ok", "not a checkpoint folder | ok/last"),
            ("NaN in weights", "nan/last", "classifier.weight is not finite"),
            ("cut weights", "short/last", "model.safetensors: not readable as weights"),
            ("cut config", "no_json/last", "config.json: not readable as JSON"),
        )
    ],
    *[
        ("checkpoint of another system", s, f"{flag} {{foreign/last}}", "a checkpoint of Sam3, expected one of Tempo")
        for s, flag in ((INFER, "--ckpt"), (TRAIN, "--resume"))
    ],
    *[("other config", TRAIN, f"{f} {{{c}/last}}", c) for f in ("--init", "--resume") for c in ("bigru", "spot")],
    ("--resume without state", TRAIN, "--resume {no_state/last}", "state.pt is missing | --init"),
    ("--resume with a cut state", TRAIN, "--resume {cut_state/last}", "state.pt"),
    ("no such weights", TRAIN, "--encoder resnet18 --imagenet {v}/none.pth", "none.pth: no such weight file"),
    ("weights of another network", TRAIN, "--encoder resnet18 --imagenet {other.pth}", "other.pth: does not fit"),
    ("ImageNet weights for tiny", TRAIN, "--encoder tiny --imagenet {other.pth}", "does not fit"),
    # ---- predictions
    ("labels for predictions", EVAL, "--pred {labels.json}", "is the label file"),
    ("predictions of another video", EVAL, "--pred {pred_other.json}", "lack a prediction, as 'good'"),
    ("score above 1", EVAL, "--pred {pred_score.json}", "score must be a number in [0, 1], got 1.5"),
    ("unknown class", EVAL, "--pred {pred_serve.json}", "class 'serve' is not in the labels"),
    ("unknown class", EVAL, "--classes serve", "--classes serve"),
    ("no such predictions", EVAL, "--pred {pred.json}x", "cannot be read"),
    ("--frames", EVAL, "--frames 1-2", "--frames 1-2: expected START:STOP"),
    # ---- --out
    ("--out holds a run", TRAIN, "--out {used}", "used: holds another run | --resume"),
    ("--out holds predictions", INFER, "--out {used}", "used: holds predictions already"),
    *[("--out is a file", s, "--out {a_file}", "a_file | --out") for s in (TRAIN, INFER)],
    *[("--out below a file", s, "--out {a_file}/x", "a_file | --out") for s in (TRAIN, INFER)],
]  # fmt: skip
STARTED = {"run.json", "code.diff"}  # what a training that met a damaged picture has written: what was asked of it


def fill(text: str, world: Path, out: Path) -> list[str]:
    """{name} -> path in the world or the fresh --out. 'NOT x y' takes those words out."""
    words = shlex.split(text)
    return [str(out) + w[5:] if w.startswith("{out}") else w.replace("{", f"{world}/").replace("}", "") for w in words]


def arguments(name: str, more: str, world: Path, out: Path) -> list[str]:
    words = fill(RIGHT[name], world, out)
    if more.startswith("NOT "):
        without = fill(more[4:], world, out)
        return [w for w in words if w not in without]
    more = fill(more, world, out)
    return words + more if not more or more[0].startswith("--") else more + words  # videos stand with the videos


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder with its content; empty for a folder that is not there."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refusal(name: str, argv: list[str], capfd) -> str:
    """The one line on stderr of a script that is expected to refuse."""
    capfd.readouterr()
    code = run.cli(script(name).main, argv)
    err = capfd.readouterr().err
    assert code == 2, f"exit code {code}; stderr: {err}"
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and "None" not in err, err
    return err


@pytest.mark.parametrize(
    ("what", "name", "more", "words"), TABLE, ids=[f"{Path(r[1]).stem}: {r[0]}: {r[2]}" for r in TABLE]
)
def test_one_sentence_and_nothing_left(what, name, more, words, world, tmp_path, capfd):
    if what in ("no GPU", "kernels without CUDA") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = tree(world)
    err = refusal(name, arguments(name, more, world, tmp_path / "out"), capfd)
    for part in words.split(" | "):
        assert part in err, f"{part!r} is not in: {err}"
    left = set(tree(tmp_path / "out"))
    assert left <= (STARTED if (what, name) == ("damaged video", TRAIN) else set()), f"left behind: {sorted(left)}"
    assert tree(world) == before, "an input, or a folder that was in use, has changed"


@pytest.mark.parametrize("name", RIGHT)
def test_the_same_arguments_without_a_mistake_run(name, world, tmp_path):
    """The table can fail: what its rows add to is accepted."""
    assert run.cli(script(name).main, arguments(name, "", world, tmp_path / "out")) == 0
    assert tree(tmp_path / "out")


def test_one_bad_video_among_good_ones_writes_nothing(world, tmp_path, capfd):
    """The damage shows only after the first video was scored."""
    argv = arguments(INFER, "{v/damaged.mp4}", world, tmp_path / "out")
    assert "damaged.mp4" in refusal(INFER, argv, capfd) and not tree(tmp_path / "out")


# ---- no space on the disk


class FullFile(io.BytesIO):
    """What open() gives on a full disk: the file is there, nothing can be written, and the error names no file."""

    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk_full(monkeypatch):
    """disk_full(wanted): from now on there is no space for files whose name satisfies wanted(name)."""
    plain = io.open

    def begin(wanted) -> None:
        def opened(path, mode="r", *args, **kw):
            if not isinstance(path, int) and set(mode) & set("wax+") and wanted(Path(path).name):
                plain(path, "ab").close()
                return FullFile()
            return plain(path, mode, *args, **kw)

        monkeypatch.setattr(io, "open", opened)  # pathlib's
        monkeypatch.setattr(builtins, "open", opened)

    return begin


WRITTEN = [  # script, part of the name of a file that it writes
    *[(TRAIN, name) for name in ("run.json", "metrics.jsonl", "metrics.csv", "curves.png")],
    *[(TRAIN, name) for name in ("model.safetensors", "state.pt", "config.json")],
    *[(INFER, name) for name in ("peaks.json", "peaks.csv", "meta.json")],
    *[(INFER, name) for name in ("annotated.mp4", "timeline.png", "strips_1.png")],
    (EVAL, "result.json"),
]


@pytest.mark.parametrize(("name", "part"), WRITTEN, ids=[f"{Path(s).stem}: {part}" for s, part in WRITTEN])
def test_no_space(name, part, world, tmp_path, disk_full, monkeypatch, capfd):
    out, asked = tmp_path / "out", []
    argv = arguments(name, "", world, out)
    if name == INFER:
        argv = [a for a in argv if a not in ("--no-video", "--no-pictures")] + ["--threshold", "0.0"]
    disk_full(lambda n: part in n and not asked.append(n))
    err = refusal(name, argv, capfd)
    assert asked, f"{part} is not written any more"
    assert "no space left" in err.lower() or "make room" in err, err
    assert str(out) in err, f"it does not say where: {err}"
    monkeypatch.undo()
    left = set(tree(out))
    assert name == TRAIN or not left, f"left behind: {sorted(left)}"
    assert not [x for x in left if ".tmp" in x], f"left behind: {sorted(left)}"
    for folder in out.glob("step_*"):
        assert TempoPeak.from_checkpoint(folder) and run.load_state(folder)


def test_a_full_disk_does_not_cost_the_checkpoint_before(world, tmp_path, disk_full, monkeypatch, capfd):
    out, saves = tmp_path / "out", []
    disk_full(lambda name: name == "model.safetensors" and (saves.append(name) or len(saves) == 3))
    words = arguments(TRAIN, "--steps 5 --save-every 1", world, out)
    assert "no space left" in refusal(TRAIN, words, capfd)
    monkeypatch.undo()
    assert run.load_state(out / "last")["step"] == 2 and TempoPeak.from_checkpoint(out / "last")
    assert not list(out.glob(".tmp*"))
    assert run.cli(script(TRAIN).main, [*words, "--resume", str(out / "last")]) == 0  # room was made
    assert run.load_state(out / "last")["step"] == 5
