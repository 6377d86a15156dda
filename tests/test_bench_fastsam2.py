"""What smoke/bench_fastsam2.py compares is comparable: backbones of one size, parts that make up the whole network."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from models.fastsam2 import BACKBONES, Backbone, FastSAM2, FastSAM2Config
from utils import run


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[1] / "smoke" / "bench_fastsam2.py"
    spec = importlib.util.spec_from_file_location("bench_fastsam2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_backbones_have_one_size(bench, kind):
    with torch.device("meta"):
        ours, theirs = Backbone(kind), bench.make_mask2former(kind).model.pixel_level_module.encoder
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@torch.no_grad()
def test_parts_make_up_the_network(bench):
    """What is timed part by part gives what the whole call gives, and the post-processing of both has work to do."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 64, 90), dtype=torch.uint8)
    cfg = FastSAM2Config([f"class {k}" for k in range(133)], "resnet18", is_thing=[k < 80 for k in range(133)])
    model, theirs = FastSAM2(cfg).eval(), bench.make_mask2former("resnet18").eval()
    ours, out = bench.fastsam2_calls(model, image, bench.as_it_is)
    assert list(ours.parts) == list(bench.PARTS)
    assert torch.equal(ours.network()["masks"][-1], out["masks"][-1])
    assert torch.equal(ours.parts["objects"]()["masks"][-1], out["masks"][-1])
    assert ours.parts["100 prompts"]()["masks"][-1].shape == (1, 100, 16, 24)
    assert ours.parts["neck"]().shape == (1, 256, 16, 24)
    other = bench.mask2former_calls(theirs, image, bench.as_it_is, out)
    classes, masks = other.parts["objects"]()
    whole = other.network()
    assert torch.equal(whole.masks_queries_logits, masks) and torch.equal(whole.class_queries_logits, classes)
    found, other_found = ours.parts["post-processing"](), other.parts["post-processing"]()[0]
    assert found["map"].shape == other_found["segmentation"].shape == (64, 90)
    assert len(found["value"]) > 5 and len(other_found["segments_info"]) > 5


def test_the_table_has_a_ratio_where_both_have_the_part(bench):
    times = {"neck": [torch.tensor([2.0, 2, 9]), torch.tensor([4.0, 6, 5])], "100 prompts": [torch.tensor([1.0])]}
    times["total"] = [torch.tensor([10.0]), torch.tensor([5.0])]
    head, neck, prompts, total = bench.table(times).splitlines()
    assert [c.strip() for c in neck.split("|")] == ["neck", "2.0 /    8.3", "5.0 /    5.9", "2.50"]
    assert [c.strip() for c in prompts.split("|")][2:] == ["-", "-"]
    assert total.endswith("0.50  (100/s, 200/s)")


def test_sizes_that_are_none_are_named(bench, capsys):
    for size, message in (("256", "whole numbers joined by 'x'"), ("64x31", "at least 32")):
        assert run.cli(bench.main, ["--size", size]) == 2
        assert message in capsys.readouterr().err
