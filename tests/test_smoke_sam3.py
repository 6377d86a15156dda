"""The commands smoke_sam3.py, bench_sam3.py and bench_sam3_memory.py: exit codes, what they write and say."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.rendered_ball import RenderedBall, write_video
from data.video import VideoWriter
from models.sam3_tiny import save_tiny_snapshot
from models.sam3_tracker import ENV
from utils import run

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "smoke" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv(ENV, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_snapshot(tmp_path_factory.mktemp("sam3") / "tiny")


def test_smoke_without_anything(tmp_path, capsys):
    out = tmp_path / "pictures"
    assert run.cli(script("smoke_sam3").main, ["--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"all.png", *(f"frame_{t:04d}.png" for t in (0, 5, 10, 15, 20))}
    assert "PASS tiny, random, 128x96 px" in said and "torch.float32 on cpu" in said and "cleaned by scipy" in said
    assert len(re.findall(r"^frame +\d+ \| +\d+ px \| score", said, re.M)) == 8
    assert len(re.findall(r"^frame +\d+ \| \d+ x 'tennis ball' above 0.2 ", said, re.M)) == 5


def test_smoke_with_a_snapshot_and_a_short_video(tiny, tmp_path, capsys, monkeypatch):
    video = write_video(RenderedBall(3, size=(65, 97)), 0, 7, tmp_path, "short")
    argv = [str(video), "--snapshot", str(tiny), "--device", "cpu", "--out", str(tmp_path / "o"), "--prompt", "racket"]
    assert run.cli(script("smoke_sam3").main, [*argv, "--dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "PASS tiny, 98x66 px: 0 x 'racket' above 0.5 in 2 frames" in said and "torch.bfloat16 on cpu" in said
    monkeypatch.setenv(ENV, str(tiny))
    argv = [str(video), "--device", "cpu", "--out", str(tmp_path / "o"), "--score-thr", "0.1"]
    assert run.cli(script("smoke_sam3").main, argv) == 0
    assert re.search(r"PASS tiny, 98x66 px: [1-9]\d* x 'tennis ball' above 0.1", capsys.readouterr().out)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--snapshot", "facebook/sam3"], "facebook/sam3: no such folder; expected a local snapshot"),
        (["--score-thr", "1.5"], "--score-thr 1.5: expected 0..1"),
        (["--prompt", ""], "prompt '' has 0 tokens"),
        (["nowhere.mp4"], "nowhere.mp4"),
    ],
)
def test_smoke_says_what_is_wrong(argv, words, tmp_path, capsys):
    assert run.cli(script("smoke_sam3").main, [*argv, "--device", "cpu", "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_bench(tiny, capsys, monkeypatch):
    bench = script("bench_sam3")
    monkeypatch.setattr(bench, "missing_memory", lambda r: "needs 6.2 GiB, 1.0 are free")
    argv = ["--device", "cpu", "--frames", "4", "--size", "128x96", "--models", "tiny", "real", "--snapshot", str(tiny)]
    assert run.cli(bench.main, argv) == 0
    said = capsys.readouterr().out
    assert "real: left out, needs 6.2 GiB, 1.0 are free" in said
    table = said[said.index("| model |") :].splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table[2:4]]
    assert [row[0] for row in rows] == ["tiny", "tiny"]
    for row in rows:
        parts = [float(x) for x in row[1:6]]
        assert all(x >= 0 for x in parts) and float(row[6]) == pytest.approx(sum(parts), rel=0.02, abs=0.1)
        assert all(float(x) > 0 for x in row[8].split(", ")) and row[9] == "-"


@pytest.mark.parametrize(
    "argv, words",
    [(["--frames", "0"], "--frames 0: expected 1..100000"), (["--size", "640"], "--size 640: expected 2 whole numbers"),
     (["--size", "10x96"], "--size 10x96: expected sides of at least 32 px")],
)  # fmt: skip
def test_bench_says_what_is_wrong(argv, words, capsys):
    assert run.cli(script("bench_sam3").main, [*argv, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_bench_of_a_video_that_is_too_short(tmp_path, capsys):
    with VideoWriter(tmp_path / "two.mp4", 30, (64, 64)) as video:
        for _ in range(2):
            video.write(np.zeros((64, 64, 3), np.uint8))
    assert run.cli(script("bench_sam3").main, ["--device", "cpu", "--video", str(tmp_path / "two.mp4")]) == 2
    assert "two.mp4: 2 frames; expected more than the 2 that are not timed" in capsys.readouterr().err


def test_bench_of_memory(tiny, capsys, monkeypatch):
    """Both parts, made short; what grows, or differs where it must not, is exit code 1."""
    bench = script("bench_sam3_memory")
    monkeypatch.setattr(bench, "SETTLED", 8)
    monkeypatch.setattr(bench, "WINDOW", 4)
    argv = ["--device", "cpu", "--frames", "22", "--pruned-frames", "42", "--snapshot", str(tiny)]
    assert run.cli(bench.main, argv) == 0
    said = capsys.readouterr().out
    assert "up to 4 given masks bit for bit the same; with 5 to 6, 10 frames" in said and "PASS 22 frames" in said
    held = [float(x) for x in re.findall(r"resident ([\d.]+) MiB \|", said)]
    assert len(held) == 11 and min(held) > 100
    assert bench.resident() == pytest.approx(held[-1], rel=0.2)
    sizes = iter([100.0] * 10 + [103.0])
    monkeypatch.setattr(bench, "resident", lambda: next(sizes))
    assert run.cli(bench.main, [*argv[:-4], "--pruned-frames", "2", *argv[-2:]]) == 1
    assert "FAIL 22 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words", [(["--frames", "11"], "--frames 11: expected 164.."), (["--size", "9x96"], "--size 9x96")]
)
def test_bench_of_memory_says_what_is_wrong(argv, words, capsys):
    assert run.cli(script("bench_sam3_memory").main, [*argv, "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_smoke_on_a_gpu(tmp_path, capsys, dtype):
    argv = ["--device", "cuda", "--dtype", dtype, "--out", str(tmp_path / "o")]
    assert run.cli(script("smoke_sam3").main, argv) == 0
    assert "PASS tiny" in capsys.readouterr().out
