"""What smoke/bench_streams.py times is a stream: parts make up a step, peers have their real sizes and remember, what is
held is counted once, growth is reported, peers that cannot be built are named."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils import run

SIZE = (64, 96)
R = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[1] / "smoke" / "bench_streams.py"
    spec = importlib.util.spec_from_file_location("bench_streams", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model(bench):
    torch.manual_seed(0)
    return bench.make_fastsam2("resnet18", 0, R, False)


@pytest.fixture(scope="module")
def frames():
    return [np.random.default_rng(k).integers(0, 256, (*SIZE, 3), dtype=np.uint8) for k in range(2)]


# ---- parts


@torch.no_grad()
def test_parts_make_up_a_step(bench, model):
    torch.manual_seed(1)
    image, prompts = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8), torch.randn(1, 3, 256)
    state = model.memory.start(1, 3)
    state = model.memory.point(state, prompts, torch.ones(1, 3, dtype=torch.bool))
    got, took = bench.step_parts(model, image, state, R)
    want, found = model.memory.step(state, model.encode(image), partial(model.decode, objects=False))
    assert list(took) == list(bench.PARTS) and min(took.values()) >= 0 < took["encode"]
    assert torch.equal(got.tokens.values, want.tokens.values) and torch.equal(got.tokens.age, want.tokens.age)
    assert found.present.all() and (got.tokens.age >= 0).any(-1).all(), "nothing is written, so nothing is timed"


def test_every_part_is_timed_for_each_number_of_objects(bench, model, frames):
    times = bench.time_parts(model, frames, 2, 3, R)
    assert list(times) == [*bench.PARTS, "frame", "stream"] and {len(t) for t in times.values()} == {3}
    parts = np.sum([times[name] for name in bench.PARTS], axis=0)
    np.testing.assert_allclose(times["frame"], parts)


def test_the_table_has_the_cost_of_an_object(bench):
    head, line = bench.parts_table({1: {"frame": [10.0, 10, 10]}, 8: {"frame": [17.0, 17, 20]}}).splitlines()
    assert [c.strip() for c in head.split("|")] == [
        "p50 / p95 in ms",
        "1 object",
        "8 objects",
        "ms per extra object, x",
    ]
    assert [c.strip() for c in line.split("|")] == ["frame", "10.0 / 10.0", "17.0 / 19.7", "1.00, 1.70"]
    assert bench.parts_table({2: {"frame": [10.0]}}).splitlines()[1].endswith("| -")


def test_compiled_parts_are_those_of_the_stream(bench, model, frames, monkeypatch):
    """Without a break, and each part once; the graphs run as they are."""
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch.manual_seed(0)
    compiled = bench.make_fastsam2("resnet18", 0, R, True)
    streams = [bench.start_stream(m, 2, SIZE, R) for m in (model, compiled)]
    for frame in [*frames, frames[0]]:
        want, got = (s.step(frame) for s in streams)
        assert [*got] == [0, 1] and all(np.array_equal(got[k].mask, want[k].mask) for k in got)
    assert len(graphs) == 5  # encode, read, decode, presence, write


# ---- what is held


def test_what_is_held_is_counted_once(bench):
    x = torch.zeros(10)
    thing = SimpleNamespace(a=x, b=[x[:3], np.zeros(4)], c={"d": (torch.ones(2), nn.Linear(50, 50), "text")}, e=None)
    thing.itself = thing
    assert bench.held(thing) == 40 + 32 + 8


def test_a_stream_holds_its_state(bench, model, frames):
    stream = bench.start_stream(model, 1, SIZE, R)
    held = []
    for frame in [*frames, *frames]:
        stream.step(frame)
        held.append(bench.held(stream))
    assert held[1] == held[3] > stream.state_bytes > 0


def test_growth_after_the_first_frames_is_reported(bench, model, frames, monkeypatch):
    monkeypatch.setattr(bench, "SETTLED", 2)
    monkeypatch.setattr(bench, "HUNDRED", 2)
    monkeypatch.setattr(bench, "resident", lambda: 100 * bench.MIB)
    kept, times = bench.long_stream(model, frames, 2, 5, R)
    assert "5 frames, 2 objects" in kept and "process 100.00 MiB (+0.00 %); bar of 1 % kept" in kept
    assert times.startswith("first 2 frames ")
    sizes = iter([100, 102])
    monkeypatch.setattr(bench, "held", lambda stream: next(sizes))
    assert "(+2.00 %)" in (grown := bench.long_stream(model, frames, 2, 5, R)[0]) and "bar of 1 % MISSED" in grown


# ---- peers


@pytest.mark.parametrize("name, millions", [("SAM 2.1 tiny", (38.9, 39.0)), ("EdgeTAM", (13.8, 14.0))])
def test_peers_have_their_real_sizes(bench, name, millions):
    if name == "EdgeTAM":
        pytest.importorskip("timm")
    with torch.device("meta"):
        model, _ = bench.make_peer(name, 512)
    assert millions[0] < sum(p.numel() for p in model.parameters()) / 1e6 < millions[1]


def test_a_peer_remembers_and_keeps_every_frame(bench):
    """Random frames give masks at their size; the second one depends on the first; a frame more is held."""
    torch.manual_seed(0)
    network, session = bench.make_peer("SAM 2.1 tiny", bench.PEER_SIDE)
    network.eval()
    side = bench.PEER_SIDE
    frames = [np.random.default_rng(k).integers(0, 256, (side, side, 3), dtype=np.uint8) for k in range(2)]
    seen = []
    hook = network.memory_attention.register_forward_hook(lambda module, inputs, out: seen.append(out))
    stream = bench.PeerStream(network, session, 1, (side, side), R)
    masks = stream.step(frames[0])
    assert masks.shape == (1, side, side) and masks.dtype == bool and not seen
    first = bench.held(stream)
    stream.step(frames[1])
    hook.remove()
    assert len(seen) == 1 and bench.held(stream) - first > 4 * 3 * side * side


def test_peers_that_cannot_be_built_are_named(bench, model, monkeypatch):
    def missing(name, side):
        raise ImportError(f"{name}\n needs timm")

    monkeypatch.setattr(bench, "make_peer", missing)
    monkeypatch.setattr(bench, "FULL", 3)
    square = [np.zeros((64, 64, 3), np.uint8)]
    _, ours, *left_out = bench.peers_table({"resnet18": model}, square, [1], 2, R)
    assert ours.startswith("FastSAM2 resnet18") and ours.endswith("0.000")
    assert left_out == [f"{name}: left out: {name} needs timm" for name in bench.PEERS]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "256"], "whole numbers joined by 'x'"),
        (["--size", "64x31"], "at least 32"),
        (["--size", "256x512", "--peers"], "a square of a multiple of 256"),
        (["--objects", "8", "1"], "ascending numbers"),
        (["--objects", "0", "2"], "ascending numbers"),
        (["--long", "100"], "at least 200"),
        (["--memory-maps", "7"], "expected 0..6"),
        (["--frames", "0"], "expected 1.."),
    ],
)
def test_flags_that_do_not_fit_are_named(bench, capsys, flags, message):
    assert run.cli(bench.main, flags) == 2
    assert message in capsys.readouterr().err
