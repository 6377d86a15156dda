"""Mamba2 and ssd_scan against numbers of state-spaces/mamba: its float64 references and its own Triton kernels.

Reads LAB_SHARED/data/mamba/ssd_cases/*.npz, whatever is there: NN_name.npz are whole blocks, core_*.npz the scan alone.
Errors are max|a - b| / max|b|, with an absolute floor of 1e-7 (at T = 1 the gradient of A_log is exactly 0).
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.mamba2 import Mamba2, ssd_scan

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared"))
CASES = SHARED / "data" / "mamba" / "ssd_cases"
FILES = sorted(CASES.glob("*.npz"))
MODULES, CORES = ([f for f in FILES if f.name.startswith("core_") == core] for core in (False, True))
UPSTREAM_ONLY = {"d_ssm", "D_has_hdim", "rmsnorm", "norm_before_gate"}  # options that transformers does not have
# upstream's float32 kernels have rounding errors of their own: outputs get twice the tolerance towards them, gradients
TRITON_GRAD = 6e-5  # (4e-5 is the worst distance between those kernels and float64)

IMPLS = ("torch", "reference")  # the hand-written function of CPUs, and autograd over the composition

pytestmark = pytest.mark.skipif(not FILES, reason=f"no reference cases in {CASES}; set LAB_SHARED")


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config with "inf" as a float, and every array as a tensor."""
    with np.load(path) as z:
        arrays = {name: z[name] for name in z.files}
    config = json.loads(str(arrays.pop("config")))
    if "dt_limit" in config:
        config["dt_limit"] = tuple(float(v) for v in config["dt_limit"])
    return config, {name: torch.from_numpy(a) for name, a in arrays.items()}


def part(arrays: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, reference {tuple(want.shape)}"
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    scale = want.abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * scale + 1e-7 * (scale == 0), (
        f"{what}: error {error:.2e} on {scale:.2e}, {tolerance:.0e}"
    )


def output_tolerance(path: Path) -> float:
    return 1e-5 if "large_input" in path.name else 3e-6


def build(path: Path, dtype: torch.dtype, impl: str = "torch") -> tuple[Mamba2, dict[str, torch.Tensor]]:
    config, arrays = read(path)
    block = Mamba2(**config, impl=impl)
    block.load_state_dict(part(arrays, "param/"), strict=True)
    return block.to(dtype), arrays


def run_block(block: Mamba2, arrays: dict, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """y and the gradients of sum(y * g) for u and every parameter."""
    u = arrays["u"].to(dtype).requires_grad_()
    y = block(u)
    (y * arrays["g"].to(dtype)).sum().backward()
    return y.detach(), {"u": u.grad} | {name: p.grad for name, p in block.named_parameters()}


def run_core(path: Path, dtype: torch.dtype):
    """y, final state (None for a packed case), gradients, arrays."""
    config, arrays = read(path)
    inputs = {name: a.to(dtype).requires_grad_() for name, a in part(arrays, "in/").items()}
    y, final = ssd_scan(
        **inputs,
        chunk_size=config["chunk_size"],
        seq_idx=arrays.get("seq_idx"),
        dt_softplus=True,
        return_final_states=True,
    )
    loss = (y * arrays["g_y"].to(dtype)).sum() + (final * arrays["g_final"].to(dtype)).sum()
    loss.backward()
    return y.detach(), final.detach(), {name: t.grad for name, t in inputs.items()}, arrays


def assert_gradients(got: dict, arrays: dict, kind: str, tolerance: float, name: str) -> None:
    want = part(arrays, f"grad{kind}/")
    assert want.keys() == got.keys(), f"{name}: gradients of {sorted(want.keys() ^ got.keys())} on one side only"
    for key, reference in want.items():
        assert_near(got[key], reference, tolerance, f"{name} grad{kind}/{key}")


@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_float64(impl):
    for path in MODULES:
        block, arrays = build(path, torch.float64, impl)
        y, grads = run_block(block, arrays, torch.float64)
        assert_near(y, arrays["y64"], 1e-12, path.name)
        assert_gradients(grads, arrays, "64", 1e-10, path.name)
    print(f"\nMamba2 ({impl}) = upstream in float64, outputs and gradients: {len(MODULES)} of {len(MODULES)} cases")


@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_float32(impl):
    for path in MODULES:
        block, arrays = build(path, torch.float32, impl)
        y, grads = run_block(block, arrays, torch.float32)
        assert_near(y, arrays["y64"], output_tolerance(path), f"{path.name} y64")
        assert_near(y, arrays["y32_triton"], 2 * output_tolerance(path), f"{path.name} y32_triton")
        assert_gradients(grads, arrays, "64", 1e-5, path.name)
        assert_gradients(grads, arrays, "32_triton", TRITON_GRAD, path.name)
    print(f"\nMamba2 ({impl}) = upstream in float32, outputs and gradients: {len(MODULES)} of {len(MODULES)} cases")


def test_cores_float64():
    for path in CORES:
        y, final, grads, arrays = run_core(path, torch.float64)
        assert_near(y, arrays["y64"], 1e-12, path.name)
        assert_near(final, arrays["final64"], 1e-12, f"{path.name} final state")
        assert_gradients(grads, arrays, "64", 1e-10, path.name)
    print(f"\nssd_scan = reference in float64, outputs, states, gradients: {len(CORES)} of {len(CORES)} cases")


def test_cores_float32():
    for path in CORES:
        y, final, grads, arrays = run_core(path, torch.float32)
        for kind, tolerance in (("64", 3e-6), ("32_triton", 6e-6)):
            assert_near(y, arrays[f"y{kind}"], tolerance, f"{path.name} y{kind}")
            if f"final{kind}" in arrays:
                assert_near(final, arrays[f"final{kind}"], tolerance, f"{path.name} final{kind}")
        assert_gradients(grads, arrays, "64", 1e-5, path.name)
        assert_gradients(grads, arrays, "32_triton", TRITON_GRAD, path.name)
    print(f"\nssd_scan = reference in float32, outputs, states, gradients: {len(CORES)} of {len(CORES)} cases")


@torch.no_grad()
def test_steps_and_end_states():
    ends = 0
    for path in MODULES:
        block, arrays = build(path, torch.float32)
        state, rows = block.allocate_inference_cache(len(arrays["u"])), []
        for token in arrays["u"].split(1, dim=1):
            y, *state = block.step(token, *state)
            rows.append(y)
        tolerance = max(5e-6, output_tolerance(path))
        assert_near(torch.cat(rows, 1), arrays["y64"], tolerance, f"{path.name} step by step")
        _, whole = block(arrays["u"], return_final_state=True)
        for name, stepped, forward in zip(("conv_state_end", "ssm_state_end"), state, whole, strict=True):
            assert_near(forward, stepped, tolerance, f"{path.name} {name}, forward and steps")
            if name in arrays:
                assert_near(stepped, arrays[name], tolerance, f"{path.name} {name}")
                ends += 1
    print(f"\nstep by step = reference: {len(MODULES)} of {len(MODULES)} cases, {ends} end states")


@torch.no_grad()
def test_same_weights_in_transformers():
    """The mixer of transformers loads each state dict with strict=True, gives the same output, and hands it back."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    done = 0
    for path in MODULES:
        config, arrays = read(path)
        if UPSTREAM_ONLY & config.keys():
            continue
        block, arrays = build(path, torch.float32)
        names = {"d_model": "hidden_size", "d_state": "state_size", "headdim": "head_dim", "d_conv": "conv_kernel"}
        names |= {"dt_limit": "time_step_limit", "bias": "use_bias", "conv_bias": "use_conv_bias"}
        names |= {"ngroups": "n_groups", "chunk_size": "chunk_size", "expand": "expand"}
        options = {names[key]: value for key, value in config.items() if key in names}
        options = {"n_groups": 1, "num_heads": block.nheads, "head_dim": block.headdim, **options}
        mixer = Mamba2Mixer(Mamba2Config(**options, num_hidden_layers=1), layer_idx=0).eval()
        mixer.load_state_dict(block.state_dict(), strict=True)
        block.load_state_dict(mixer.state_dict(), strict=True)
        assert_near(mixer(arrays["u"]), arrays["y64"], 1e-5, f"{path.name} transformers itself")
        assert_near(block(arrays["u"]), mixer(arrays["u"]), 1e-5, f"{path.name} ours and transformers")
        done += 1
    assert done > 0
    print(f"\nstate dicts exchanged with transformers, equal outputs: {done} of {done} cases it can express")
