"""Rendered play as files: videos with labels that read back; refusals leave nothing."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data.ball_labels import read_ball_csv
from data.rendered_ball import RenderedBall
from data.video import read_all
from utils import run

ROOT = Path(__file__).resolve().parents[1]


def script():
    spec = importlib.util.spec_from_file_location("prepare_rendered_ball", ROOT / "data/prepare_rendered_ball.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_videos_and_labels_read_back(tmp_path):
    module, out = script(), tmp_path / "set" / "play"
    argv = [
        str(out),
        "--videos",
        "2",
        "--frames",
        "12",
        "--size",
        "97x64",
        "--seed",
        "3",
        "--absent",
        "0",
        "--hiding",
        "1",
    ]
    assert run.cli(module.main, argv) == 0
    assert len(list(out.iterdir())) == 6
    source = RenderedBall(3 + module.UNSEEN, size=(64, 97), absent=0.0, hiding=1.0)
    for k in range(2):
        clip = source.clip(k, 12)
        frames, info, _ = read_all(out / f"play_{k}.mp4")
        assert frames.shape == (12, 64, 98, 3) and info.fps == 30  # an odd side is padded by one
        assert np.abs(frames[:, :, :97].astype(int) - clip["frames"]).mean() < 12
        for name, centres in clip["centres"].items():
            track = read_ball_csv(out / f"play_{k}_{name}.csv", (98, 64))
            assert np.allclose(track.seen((1, 2, 3)), centres, atol=0.006, equal_nan=True)
            assert np.array_equal(track.visibility > 0, np.isfinite(centres[:, 0]))


@pytest.mark.parametrize(
    "argv, words",
    [(["--size", "20x64"], "--size 20x64"), (["--videos", "0"], "--videos 0"), (["--absent", "2"], "--absent 2"),
     (["--seed", str(10**9)], "--seed 1000000000")],
)  # fmt: skip
def test_refusals(tmp_path, capsys, argv, words):
    assert run.cli(script().main, [str(tmp_path / "o"), *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}") and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("kept")
    assert run.cli(script().main, [str(tmp_path), "--frames", "2"]) == 2
    assert "exists already" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
