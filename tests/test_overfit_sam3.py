"""The command overfit_sam3.py: its exit codes, and in the slow tests what it promises."""

import importlib.util
import re
from pathlib import Path

import pytest

from utils import run

ROOT = Path(__file__).resolve().parents[1]


def command(*argv) -> int:
    spec = importlib.util.spec_from_file_location("overfit_sam3", ROOT / "smoke" / "overfit_sam3.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run.cli(module.main, [str(x) for x in argv])


@pytest.mark.parametrize("part", ["detector", "tracker"])
def test_too_few_steps_do_not_overfit_and_that_is_an_error(capsys, part):
    assert command("--device", "cpu", "--steps", 2, "--batch-size", 2, "--part", part) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: did not overfit: {part}: dice loss .* in 2 steps, IoU [^\n]*; wanted [^\n]*\n", said)


def test_what_is_wrong_with_a_flag_is_said(capsys):
    assert command("--device", "cpu", "--batch-size", 1) == 2
    assert capsys.readouterr().err == "error: --batch-size 1: expected 2..10000\n"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["detector", "tracker"])
def test_a_batch_is_overfitted(capsys, part):
    assert command("--device", "cpu", "--part", part) == 0, capsys.readouterr().err
