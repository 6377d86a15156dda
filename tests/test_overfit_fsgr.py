"""The commands smoke_fsgr.py and overfit_fsgr.py: their exit codes, and in the slow tests what they promise."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from utils import run

ROOT = Path(__file__).resolve().parents[1]
MINI = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "fsgr" / "coco_mini"


def command(name: str, *argv) -> int:
    spec = importlib.util.spec_from_file_location(name, ROOT / "smoke" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run.cli(module.main, [str(x) for x in argv])


def test_smoke(capsys):
    assert command("smoke_fsgr", "--device", "cpu", "--batch-size", 1) == 0
    said = capsys.readouterr().out
    assert "PASS tiny" in said and "fsgr: first loss" in said and "m2: first loss" in said


def test_smoke_says_what_is_wrong_with_a_flag(capsys):
    assert command("smoke_fsgr", "--device", "cpu", "--batch-size", 0) == 2
    assert capsys.readouterr().err == "error: --batch-size 0: expected 1..4096\n"


def test_too_few_steps_do_not_overfit_and_that_is_an_error(capsys):
    assert command("overfit_fsgr", "--device", "cpu", "--steps", 3, "--batch-size", 4) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: did not overfit: XE .* in 3 steps, \d/4 captions reproduced; wanted [^\n]*\n", said)


@pytest.mark.slow
def test_shapes_are_overfitted(capsys):
    assert command("overfit_fsgr", "--device", "cpu") == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not MINI.is_dir(), reason="LAB_SHARED is not there")
def test_photos_are_overfitted_and_the_reward_rises(capsys):
    code = command("overfit_fsgr", "--device", "cpu", "--data", MINI, "--scst-steps", 100)
    said = capsys.readouterr()
    assert code == 0, said.err
    loss, right, n, before, after = re.search(
        r"XE \S+ -> (\S+) in \d+ steps, (\d+)/(\d+) captions.*reward (\S+) -> (\S+?)[ |]", said.out
    ).groups()
    assert float(loss) < 0.1 and int(right) >= int(n) - 1 and float(after) >= 1.2 * float(before)
    with capsys.disabled():
        print(f"\nphotos: XE {loss}, {right} of {n} captions, reward {before} -> {after}")
