"""The commands smoke_sa2va.py, overfit_sa2va.py and bench_sa2va.py: exit codes, and that what they check can fail."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models.sa2va_sizes import tiny_sa2va
from utils import run

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "smoke" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke(capsys):
    assert run.cli(script("smoke_sa2va").main, ["--device", "cpu", "--arch", "internvl"]) == 0
    said = capsys.readouterr().out
    assert "PASS internvl, 8 frames in 3 modes" in said and "two_decoder" in said


def test_smoke_sees_a_video_without_memory(monkeypatch):
    smoke, model = script("smoke_sa2va"), tiny_sa2va(sam_size=128, neck=64)
    frames = list(np.random.default_rng(0).integers(0, 256, (8, 60, 80, 3), dtype=np.uint8))
    still = model.masks_from_prompts
    monkeypatch.setattr(model, "propagate", lambda frames, prompts, mode: still(frames, prompts))
    with pytest.raises(AssertionError, match="official: frames without a prompt ignore memory"):
        smoke.check_video(model, frames)


def test_questions_of_the_overfitted_batch():
    asked = script("overfit_sa2va").make_questions(8, 96, seed=3)
    for one, another, both, absent in (asked[:4], asked[4:]):
        assert one["image"] is absent["image"] and absent["masks"] is None and "[SEG]" not in absent["answer"]
        assert np.array_equal(both["masks"], np.concatenate([another["masks"], one["masks"]]))
        assert not (one["masks"] & another["masks"]).any() and one["text"] != another["text"]
        assert [x["answer"].count("[SEG]") for x in (one, another, both)] == [1, 1, 2]


def test_too_few_steps_do_not_overfit_and_that_is_an_error(capsys):
    assert run.cli(script("overfit_sa2va").main, ["--device", "cpu", "--steps", "2", "--batch-size", "2"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: did not overfit: internvl: 2 steps, mask BCE [^\n]*wanted [^\n]*\n", said), said


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_one_batch_is_overfitted(arch, capsys):
    assert run.cli(script("overfit_sa2va").main, ["--device", "cpu", "--arch", arch]) == 0, capsys.readouterr().err


def test_bench(capsys):
    argv = ["--device", "cpu", "--rounds", "1", "--tokens", "2", "--policies", "bf16", "--plan", "none"]
    threads = torch.get_num_threads()
    assert run.cli(script("bench_sa2va").main, argv) == 0
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("| bf16"))
    assert len(row.split("|")) == 12 and all(float(x) > 0 for x in row.split("|")[2:8]), row
    assert "ms a picture" in said and "26B" not in said
    assert run.cli(script("bench_sa2va").main, ["--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds 0: expected 1..1000\n"


def test_what_bench_draws_is_what_predict_draws():
    bench, model = script("bench_sa2va"), tiny_sa2va()
    image = np.random.default_rng(1).integers(0, 256, (bench.HEIGHT, bench.WIDTH, 3), dtype=np.uint8)
    with model.evaluating():
        parts = bench.calls(model, image, 3)
        drawn, whole = parts["SAM decode"](), parts["picture"]()
        assert list(parts) == list(bench.PARTS) and drawn.shape == (2, bench.HEIGHT, bench.WIDTH)
        torch.testing.assert_close(drawn[:1], whole["probs"], atol=1e-5, rtol=0)
        lengths = [parts[name]().shape[1] for name in ("prefill", "decode")]
    assert lengths[1] - lengths[0] == 3
