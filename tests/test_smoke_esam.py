"""The commands smoke_esam.py and overfit_esam.py: exit codes, that what they check can fail, and in the slow tests the
promise of overfitting."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from models.tiny_sa import TinySANeck
from utils import run

ROOT = Path(__file__).resolve().parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "smoke" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke(capsys):
    assert run.cli(script("smoke_esam").main, ["--device", "cpu", "--points", "600", "--batch-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "PASS small: 3d, 3dtsa, bif, sv and mv, each adds nothing at first" in said
    rows = [line for line in said.splitlines() if re.match(r"\w+ +(sv|mv) \|", line)]
    assert len(rows) == 6 and all(("merge" in row) == (" mv |" in row) for row in rows)


def test_smoke_sees_a_part_that_changes_what_was_learned(monkeypatch):
    forward = TinySANeck.forward
    monkeypatch.setattr(TinySANeck, "forward", lambda self, x, *rest: forward(self, x.map(lambda f: f * 2), *rest))
    with pytest.raises(AssertionError, match="3d sv -> 3dtsa sv: answers differ"):
        script("smoke_esam").main(["--device", "cpu", "--points", "300", "--batch-size", "1"])


def test_smoke_sees_a_parameter_without_gradient(monkeypatch):
    smoke = script("smoke_esam")
    make = smoke.make

    def with_more(*rest):
        model = make(*rest)
        model.unused = torch.nn.Parameter(torch.zeros(2))
        return model

    monkeypatch.setattr(smoke, "make", with_more)
    with pytest.raises(AssertionError, match="no finite gradient on \\['unused'\\]"):
        smoke.main(["--device", "cpu", "--points", "300", "--batch-size", "1"])


def test_too_few_steps_do_not_overfit_and_that_is_an_error(capsys):
    argv = ["--device", "cpu", "--steps", "2", "--stage", "mv", "--frames", "2", "--points", "300"]
    assert run.cli(script("overfit_esam").main, argv) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: did not overfit: 3d mv, 1 items of 2 frames: [^\n]*wanted AP50 1[^\n]*\n", said), said
    assert run.cli(script("overfit_esam").main, ["--frames", "1"]) == 2
    assert capsys.readouterr().err == "error: --frames 1: expected 2..100\n"


@pytest.mark.slow
@pytest.mark.parametrize("argv", [["--stage", "sv"], ["--stage", "mv"], ["--stage", "sv", "--route", "bif"]], ids=str)
def test_a_batch_is_overfitted(capsys, argv):
    assert run.cli(script("overfit_esam").main, ["--device", "cpu", *argv]) == 0, capsys.readouterr().err
