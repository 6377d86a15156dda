"""Memory of Sa2VA: published sizes, plans of devices, and a model spread over two of them."""

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from models import sa2va_memory
from models.sa2va import Sa2VA
from models.sa2va_memory import GIB, cards, filled, place, plan, planned_sa2va, spread, units, weights_gib
from models.sa2va_processor import ARCHS
from models.sa2va_sizes import tiny_sa2va
from utils.run import UserError

PARAMETERS = {"1B": 1.163665e9, "8B": 8182606130}  # as published for the InternVL line
GIVEN_GIB = {"1B": (2.59, 4.33), "8B": (15.66, 30.48)}  # Sa2VA, notes on memory: bf16 policy, fp32
SIZES = {"sam_size": 128, "neck": 64, "max_tiles": 4}
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
ASK = "Please segment the blood vessel."


@pytest.fixture(scope="module")
def planned() -> dict[str, Sa2VA]:
    return {size: planned_sa2va(size) for size in PARAMETERS}


@pytest.fixture(scope="module", params=ARCHS)
def tiny(request) -> Sa2VA:
    return tiny_sa2va(arch=request.param, **SIZES)


# ---- counts


@pytest.mark.parametrize("size", sorted(PARAMETERS))
def test_sizes_are_the_published_ones(planned, size):
    count = sum(p.numel() for p in planned[size].parameters())
    assert count == pytest.approx(PARAMETERS[size], rel=1e-6)
    low, full = GIVEN_GIB[size]
    assert weights_gib(planned[size]) == pytest.approx(low, abs=0.04)
    assert 4 * count / GIB == pytest.approx(full, abs=0.01)


def test_nothing_is_held_and_the_policy_shows(planned):
    model = planned["1B"]
    assert all(p.is_meta for p in model.parameters())
    kinds = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert kinds == {"mllm": torch.bfloat16, "sam": torch.float32, "text_hidden_fcs": torch.float32}


def test_the_table_has_a_row_for_each_size():
    head, line, row = sa2va_memory.memory_table(["1B"]).splitlines()
    assert row.startswith("| 1B | 1.164 B | 2.59 GiB | 4.33 GiB |") and row.endswith("| 1 |")
    assert head.count("|") == line.count("|") == row.count("|")
    with pytest.raises(ValueError, match="7B"):
        planned_sa2va("7B")


def test_the_largest_size_is_no_single_card():
    assert cards(planned_sa2va("26B"), 24.0) == 3


# ---- plans


def test_units_hold_every_parameter_once(tiny):
    names = [name for part, _ in units(tiny) for name in part]
    held = [p for name in names for p in tiny.get_submodule(name).parameters()]
    assert len(held) == len(set(held)) == len(list(tiny.parameters()))
    assert sum(gib for _, gib in units(tiny)) == pytest.approx(weights_gib(tiny))
    assert units(tiny)[-1][0] == ["mllm.model.language_model.norm", "mllm.lm_head", "text_hidden_fcs", "sam"]


def test_the_original_decoder_lies_beside_the_trained_one():
    model = tiny_sa2va(**SIZES)
    model.set_tracking_decoder()
    names = [name for part, _ in units(model) for name in part]
    assert names[-2:] == ["sam", "tracking_decoder"] and len(names) == len(set(names))
    assert sum(gib for _, gib in units(model)) == pytest.approx(weights_gib(model))


def test_8b_on_two_devices_is_even(planned):
    model = planned["8B"]
    found = plan(model, {"a": 12.0, "b": 12.0})
    assert list(found.gib) == ["a", "b"] and sum(found.gib.values()) == pytest.approx(weights_gib(model), abs=1e-3)
    assert abs(found.gib["a"] - found.gib["b"]) < 0.5  # one layer
    layers = [found.places[f"mllm.model.language_model.layers.{k}"] for k in range(28)]
    assert layers == sorted(layers) and set(layers) == {"a", "b"}
    assert found.places["sam"] == found.places["text_hidden_fcs"] == found.places["mllm.lm_head"] == "b"
    assert "a: 7." in str(found) and "layers" in str(found)
    larger = plan(model, {"a": 6.0, "b": 20.0})
    assert larger.gib["a"] < 6.0 - larger.reserve and larger.gib["b"] > 2 * larger.gib["a"]


def test_what_does_not_fit_is_said(planned):
    with pytest.raises(UserError, match=r"device map: 15\.\d+ GiB .* do not fit into a 8\.00, b 8\.00 GiB"):
        plan(planned["8B"], {"a": 8.0, "b": 8.0})
    with pytest.raises(UserError, match="do not fit"):
        plan(planned["1B"], {"a": 0.5})
    assert filled([(["x"], 3.0), (["y"], 2.0)], [2.0, 4.0]) is None  # the second cannot hold both
    assert filled([(["x"], 3.0), (["y"], 2.0)], [3.0, 2.0]) == [0, 1]


# ---- placement


def halves(model: Sa2VA) -> dict[str, float]:
    """GiB of two devices such that the language model's layers are cut between them."""
    parts = units(model)
    cut = next(k for k, (names, _) in enumerate(parts) if names[0].endswith("language_model.layers.1"))
    first = sum(gib for _, gib in parts[:cut])
    return {"cuda:0": first * 1.001, "cuda:1": (sum(gib for _, gib in parts[cut:])) * 1.001}


def empty(tiny: Sa2VA) -> Sa2VA:
    with init_empty_weights(include_buffers=False):
        return Sa2VA(tiny.cfg, tiny.processor).eval()


def test_two_fake_devices(tiny):
    """Every operation that mixes devices raises under FakeTensorMode, which needs no GPU."""
    model, chosen = empty(tiny), plan(tiny, halves(tiny), reserve=0.0)
    devices = {d: [n for n, place in chosen.places.items() if place == d] for d in chosen.gib}
    assert all(any("language_model.layers" in n for n in names) for names in devices.values())
    p = model.processor
    asked = p.encode(IMAGE, ASK, sam_images=[])
    words = p.collate([p.encode(None, "Why?")])
    step = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1 + words["input_ids"].shape[1])}
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        place(model, chosen.places)
        assert {str(x.device) for x in model.parameters()} == {"cuda:0", "cuda:1"}
        if model.cfg.arch == "internvl":  # Qwen-VL cuts its patches by values, which fake tensors do not have
            h = model.hidden(p.collate([asked]))
            assert str(h.device) == "cuda:1"
            found = model.predict(IMAGE, ASK, force_seg=True)
            assert found["masks"].shape == (1, 60, 80)
        h = model.hidden(words)
        prompts = model.project(h[0, :2])
        logits, scores = model.propagate([IMAGE] * 2, prompts, start=[0])
        assert str(h.device) == str(logits.device) == "cuda:1" and logits.shape == (2, 2, 32, 32)
        first = model.mllm(**model.mllm_inputs(words), use_cache=True)
        keys = first.past_key_values.layers
        assert [str(layer.keys.device) for layer in keys] == ["cuda:0", "cuda:1"]
        more = {k: v.to("cuda:0") for k, v in step.items()}
        if model.cfg.arch != "internvl":
            more["mm_token_type_ids"] = torch.zeros(1, 1, dtype=torch.int32, device="cuda:0")
        second = model.mllm(**more, past_key_values=first.past_key_values, use_cache=True)
        assert str(second.logits.device) == "cuda:1"


def test_without_the_hooks_the_devices_would_mix(tiny, monkeypatch):
    model, chosen = empty(tiny), plan(tiny, halves(tiny), reserve=0.0)
    monkeypatch.setattr(sa2va_memory, "moved", lambda x, device: x)
    words = model.processor.collate([model.processor.encode(None, "Why?")])
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.no_grad():
        place(model, chosen.places)
        with pytest.raises(RuntimeError, match="devices"):
            model.hidden(words)


def test_a_spread_checkpoint_predicts_the_same(tiny, tmp_path):
    """cpu and cpu:0 are one device under two names, so the numbers of a cut model can be compared."""
    tiny.save(tmp_path / "ckpt", 1e6)
    free, said = dict(zip(("cpu", "cpu:0"), halves(tiny).values(), strict=True)), []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(sa2va_memory, "working_gib", lambda model: 0.0)
    try:
        model = Sa2VA.from_checkpoint(tmp_path / "ckpt", place=lambda m: spread(m, free, said.append))
    finally:
        monkey.undo()
    assert len(said) == 1 and "cpu:0" in said[0]
    state = tiny.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(b, dict(tiny.named_buffers())[k]) for k, b in model.named_buffers())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in tiny.parameters()]
    for options in ({"force_seg": True}, {"max_new_tokens": 4}):
        ours, theirs = (m.predict(IMAGE, ASK, **options) for m in (model, tiny))
        assert ours["text"] == theirs["text"] and torch.equal(ours["logits"], theirs["logits"])


def test_a_place_for_everything(tiny):
    chosen = plan(tiny, halves(tiny), reserve=0.0).places
    with pytest.raises(ValueError, match=r"no device for sam\."):
        place(empty(tiny), {k: "cpu" for k in chosen if k != "sam"})


def test_a_plan_that_fails_reads_nothing(tiny, tmp_path):
    tiny.save(tmp_path / "ckpt")
    with pytest.raises(UserError, match="do not fit"):
        Sa2VA.from_checkpoint(tmp_path / "ckpt", place=lambda m: spread(m, {"cpu": 0.001}))
