"""Rendered shapes as files: what is written reads back as it was drawn, in every format."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from data.coco_panoptic import CocoPanoptic
from data.davis import Davis
from data.moving_shapes import THING, MovingShapes
from data.ytvis import YtVis
from utils import run

ROOT = Path(__file__).resolve().parents[1]


def script():
    spec = importlib.util.spec_from_file_location("prepare_moving_shapes", ROOT / "data/prepare_moving_shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "set"
    flags = ["--pictures", "3", "--videos", "3", "--frames", "5", "--size", "48", "--seed", "7"]
    assert run.cli(script().main, [str(out), *flags]) == 0
    return out


def test_pictures_read_back(root):
    source, ours = CocoPanoptic(root / "panoptic.json"), MovingShapes(3, script().SEED + 7, 48)
    assert len(source) == 3
    for k in range(3):
        read, drawn = source.scene(0, k), ours.scene(0, k)
        assert np.array_equal(read.image, drawn.image)
        for i, label, crowd in zip(drawn.ids, drawn.labels, drawn.crowd, strict=True):
            mask = read.masks == i if read.masks.ndim == 2 else read.masks[list(read.ids).index(i)]
            at = list(read.ids).index(i)
            assert np.array_equal(mask, drawn.masks == i) and read.crowd[at] == crowd
            assert crowd or source.classes[read.labels[at]] == ours.classes[label]


def test_videos_read_back(root):
    ours = MovingShapes(3, script().SEED + 8, 48, frames=5, empty=0.0)
    davis, tubes = Davis(root, split="val"), YtVis(root / "instances.json")
    assert len(davis.names) == len(tubes.names) == 3
    for k in range(3):
        drawn = ours.scene(0, k)
        for video in (davis.video(k), tubes.video(k)):
            found = video.segments(range(5))
            assert np.array_equal(np.stack(list(video.frames())), drawn.image)
            things = [int(i) for i in drawn.ids if i >= THING]
            assert len(found.ids) == len(things)
            for t in range(5):
                masks = list(found.of(t).values())
                wanted = [drawn.masks[t] == i for i in things if (drawn.masks[t] == i).any()]
                assert len(masks) == len(wanted) and all(map(np.array_equal, masks, wanted)), (k, t)


def test_a_folder_that_exists_is_left_alone(root, capsys):
    assert run.cli(script().main, [str(root)]) == 2
    assert "exists already" in capsys.readouterr().err
