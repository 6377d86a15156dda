"""mamba_ssm's own Triton kernels and its Mamba2 class, unmodified and on CPU tensors, against our plain PyTorch.

They run in Triton's interpreter, in one process of their own, because it must be chosen before triton is imported.
Needs mamba_ssm >= 2.3 on the path (its Python files are enough), triton and einops; no GPU. `pytest -s` prints errors.

Measured with mamba_ssm 2.3.2.post1, triton 3.7.1, torch 2.12.1 (2 minutes on one core): worst of outputs / gradients,
relative to the largest entry: scan 8.6e-7 / 1.9e-6, class 2.9e-7 / 3.7e-6, our dispatch to the kernels 2.4e-7 / 1.4e-6
(float16 autocast 8.0e-4 / 1.7e-3), step 1.6e-6.
"""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from models import ssd
from models.mamba2 import Mamba2, ssd_scan

ROOT = Path(__file__).resolve().parents[1]
# interpreted; one configuration per kernel, since autotuning needs a GPU; float32 products that are not TF32
INTERPRETER = {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1", "TRITON_F32_DEFAULT": "ieee"}
FLOAT32, FLOAT16 = (1e-5, 2e-5), (4e-3, 4e-3)  # tolerances of outputs and of gradients
B, T, H, P, N = 2, 70, 4, 16, 16  # the kernels' chunks have 32 steps: two whole ones and a part
SMALL = {"d_model": 32, "d_state": N, "headdim": P, "chunk_size": 32}
SEGMENTS = [(32, 38), (5, 45, 20)]  # steps of packed sequences; one begins with a chunk
LIMIT = (0.01, 0.05)  # some of SMALL's step sizes are below, some above


def what_is_missing() -> str:
    absent = [name for name in ("mamba_ssm", "triton", "einops") if importlib.util.find_spec(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    places = importlib.util.find_spec("mamba_ssm").submodule_search_locations
    new = any(Path(place, "utils", "determinism.py").exists() for place in places)
    return "" if new else "mamba_ssm is older than 2.3: its kernels cannot do without autotuning on a GPU"


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing())]


# ---- in the interpreter's process: each check returns {quantity: (error relative to its largest entry, tolerance)}


def compare(got, want, whose="", tolerances=FLOAT32) -> dict[str, tuple[float, float]]:
    """got, want: (outputs, gradients), as with_gradients returns them"""
    errors = {}
    for g, w, tolerance in zip(got, want, tolerances, strict=True):
        assert g.keys() == w.keys()
        for name in w:
            assert g[name].shape == w[name].shape and w[name].abs().max() > 0, name
            errors[whose + name] = ((g[name] - w[name]).abs().max() / w[name].abs().max()).item(), tolerance
    return errors


def with_gradients(outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]):
    """The outputs, and the gradients of a weighted sum of them: linear, so that rounded outputs do not enter them."""
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=g).to(t.dtype) for t in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights, materialize_grads=True)
    return outputs, {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def packed(names: str) -> torch.Tensor:
    """seq_idx (B, T) int32 of SEGMENTS, called by the digits of `names` in turn"""
    rows = [[int(name) for name, n in zip(names, row, strict=False) for _ in range(n)] for row in SEGMENTS]
    return torch.tensor(rows, dtype=torch.int32)


def check_scan(impls=("reference", "torch"), want="upstream", G=1, more=None, **options):
    """ssd_scan's implementations against another one of them, or upstream's mamba_chunk_scan_combined."""
    shapes = {"x": (B, T, H, P), "dt": (B, T, H), "A": (H,), "B": (B, T, G, N), "C": (B, T, G, N)} | (more or {})
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].exp()
    results = {}
    for impl in (want, *impls):
        scan = functools.partial(ssd_scan, impl=impl, chunk_size=20)  # the kernels' is the next power of two
        scan = functools.partial(ssd.load_kernel(), chunk_size=32) if impl == "upstream" else scan
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y, state = scan(**leaves, return_final_states=True, **options)
        results[impl] = with_gradients({"y": y, "state": state}, leaves)
    return {k: v for impl in impls for k, v in compare(results[impl], results[want], f"{impl}: ").items()}


def make(impl: str, options: dict) -> Mamba2:
    """A block whose D, norm and dt_bias are not at their initial values, so that a forgotten one shows."""
    torch.manual_seed(0)
    block = Mamba2(**SMALL | options, impl=impl)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name in ("D", "dt_bias", "norm.weight"):
                p.add_(torch.randn_like(p))
    return block


def make_upstream(options: dict) -> torch.nn.Module:
    """Upstream's class with the weights of `make`, loaded strictly."""
    ssd.load_kernel()  # puts a mamba_ssm that imports into sys.modules
    upstream = importlib.import_module("mamba_ssm.modules.mamba2").Mamba2
    block = upstream(**SMALL | options, use_mem_eff_path=False, layer_idx=0)
    block.load_state_dict(make("reference", options).state_dict(), strict=True)
    return block


def check_class(**options):
    """Our Mamba2, `reference` and `torch`, with upstream's weights against upstream's."""
    upstream, u, results = make_upstream(options), torch.randn(B, T, SMALL["d_model"], requires_grad=True), []
    for block in (upstream, *(Mamba2(**SMALL | options, impl=impl) for impl in ("reference", "torch"))):
        block.load_state_dict(upstream.state_dict(), strict=True)
        results.append(with_gradients({"y": block(u)}, {"u": u, **dict(block.named_parameters())}))
    want, reference, torch_ = results
    return compare(reference, want, "reference: ") | compare(torch_, want, "torch: ")


@torch.no_grad()
def check_step(**options):
    """A prompt, then token by token with the states it leaves; upstream's step has no dt_limit and no D_has_hdim."""
    upstream, ours, u = make_upstream(options), make("torch", options), torch.randn(B, 42, SMALL["d_model"])
    prompt, tokens = u[:, :37], u[:, 37:].split(1, dim=1)
    cache = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
    want_rows = [upstream(prompt, inference_params=cache)]
    y, states = ours(prompt, return_final_state=True)
    want_states, rows = cache.key_value_memory_dict[0], [y]
    for token in tokens:
        want, *want_states = upstream.step(token, *want_states)
        y, *states = ours.step(token, *states)
        want_rows.append(want)
        rows.append(y)
    got, want = (
        {"y": torch.cat(ys, 1), "conv_state": conv_state, "ssm_state": ssm_state}
        for ys, (conv_state, ssm_state) in ((rows, states), (want_rows, want_states))
    )
    return compare((got, {}), (want, {}))


def check_dispatch(steps=T, lengths=None, seq_idx=None, carried=False, half=False, **options):
    """Our Mamba2 through the kernels against its `reference`."""
    u, results, start = torch.randn(B, steps, SMALL["d_model"], requires_grad=True), [], None
    for impl in ("mamba_ssm", "reference"):
        block = make(impl, options)
        if carried and start is None:
            start = [torch.randn_like(t, requires_grad=True) for t in block.allocate_inference_cache(B)]
        with torch.autocast("cpu", torch.float16, enabled=half):
            y, end = block(u, seq_idx, lengths, start, return_final_state=True)
        assert y.dtype == end[1].dtype == torch.float32
        inputs = {"u": u, **dict(zip(("conv_state", "ssm_state"), start or (), strict=False))}
        outputs = {"y": y, "conv_state": end[0].float(), "ssm_state": end[1]}
        results.append(with_gradients(outputs, inputs | dict(block.named_parameters())))
    return compare(*results, tolerances=FLOAT16 if half else FLOAT32)


MORE = {"D": (H,), "z": (B, T, H, P), "dt_bias": (H,), "initial_states": (B, H, P, N)}
PER_CHANNEL = MORE | {"D": (H, P)}
DISPATCH = {"impls": ("mamba_ssm",), "want": "reference", "G": 2, "more": PER_CHANNEL, "dt_limit": (0.1, 1.5)}
CHECKS = {
    "scan": (check_scan, {"dt_softplus": True}),
    "scan: all, packed": (check_scan, {"G": 2, "more": MORE, "seq_idx": packed("012"), "dt_softplus": True}),
    "scan: D per channel, limit": (check_scan, {"more": PER_CHANNEL, "dt_limit": (0.1, 1.5), "dt_softplus": True}),
    "scan: no softplus, dt below 0": (check_scan, {"G": 4}),
    "class": (check_class, {}),
    "class: groups": (check_class, {"ngroups": 2}),
    "class: no norm, no conv bias": (check_class, {"rmsnorm": False, "conv_bias": False}),
    "class: D_has_hdim": (check_class, {"D_has_hdim": True}),
    "class: limit": (check_class, {"dt_limit": LIMIT}),
    "class: mlp, biases": (check_class, {"d_ssm": 32, "bias": True}),
    "class: norm first, groups": (check_class, {"norm_before_gate": True, "ngroups": 2}),
    "dispatch: scan": (check_scan, DISPATCH | {"seq_idx": packed("737"), "dt_softplus": True}),
    "dispatch: padded": (check_dispatch, {"lengths": torch.tensor([T, 33])}),
    "dispatch: packed, carried": (check_dispatch, {"ngroups": 2, "seq_idx": packed("737"), "carried": True}),
    "dispatch: no norm": (check_dispatch, {"rmsnorm": False, "D_has_hdim": True, "dt_limit": LIMIT, "chunk_size": 20}),
    "dispatch: one step": (check_dispatch, {"steps": 1, "carried": True}),
    "dispatch: float16": (check_dispatch, {"ngroups": 2, "half": True}),  # interpreted bfloat16 is wrong
    "step": (check_step, {}),
    "step: groups": (check_step, {"ngroups": 2}),
    "step: no norm, no conv bias": (check_step, {"rmsnorm": False, "conv_bias": False}),
    "step: mlp, biases": (check_step, {"d_ssm": 32, "bias": True}),
}


def main() -> None:
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=1)
    sys.modules["causal_conv1d"] = None  # where it is installed upstream's class would call it; it needs CUDA tensors
    ssd._choose_impl = lambda impl, device_type, dtype: (impl, "in the interpreter")  # kernels for CPU tensors too
    for seed, (name, (check, options)) in enumerate(CHECKS.items()):
        torch.manual_seed(seed)
        print(json.dumps([name, check(**options)]), flush=True)


# ---- in pytest's process


@pytest.fixture(scope="module")
def interpreted() -> tuple[dict[str, dict[str, tuple[float, float]]], str]:
    """{check: {quantity: (error, tolerance)}} of one run of this file in the interpreter, and why it ended early"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | INTERPRETER | {"PYTHONPATH": path}
    out = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=900)
    return dict(json.loads(line) for line in out.stdout.splitlines()), out.stderr[-5000:]


@pytest.mark.parametrize("name", CHECKS)
def test_upstream_kernels_in_the_interpreter(interpreted, name):
    results, stderr = interpreted
    assert name in results, f"it or one before it ended with\n{stderr}"
    errors = results[name]
    bad = {quantity: error for quantity, (error, tolerance) in errors.items() if not error <= tolerance}
    worst = {}  # of outputs and of gradients
    for quantity, (error, _) in errors.items():
        kind = "gradient" if "gradient" in quantity else "output"
        worst[kind] = max(worst.get(kind, (0.0, "")), (error, quantity))
    print(f"\n{name}: {len(errors) - len(bad)} of {len(errors)}, worst", end=" ")
    print(", ".join(f"{kind} {error:.1e} ({quantity})" for kind, (error, quantity) in worst.items()), end=" ")
    assert not bad, f"errors relative to the largest entry: {bad}"


if __name__ == "__main__":
    main()
