"""Mamba2 and ssd_scan: properties that need no reference data. Numbers of the original are in test_reference_mamba.py."""

import functools
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

from models import mamba2, ssd
from models.mamba2 import Mamba2, describe_impl, resolve_impl, ssd_scan
from models.mamba2_fused import fused_core
from utils import run
from utils.run import UserError

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # else triton multiplies float32 as TF32, 1e-3 off
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SMALL = {"d_model": 16, "d_state": 8, "headdim": 8, "ngroups": 2}  # 4 heads, 2 groups, xBC 64 channels
VARIANTS = {
    "plain": {},
    "limit": {"dt_limit": (0.01, 0.05)},
    "D_has_hdim": {"D_has_hdim": True},
    "mlp, biases": {"d_ssm": 16, "bias": True},
    "no norm, no conv bias": {"rmsnorm": False, "conv_bias": False},
    "norm first, k=2": {"norm_before_gate": True, "d_conv": 2},
}


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs) -> Mamba2:
    """A small block whose D, norm and dt_bias are not at their initial values, so that a forgotten one shows."""
    torch.manual_seed(seed)
    block = Mamba2(**{**SMALL, **kwargs})
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name in ("D", "dt_bias", "norm.weight"):
                p.add_(torch.randn_like(p))
    return block.to(dtype)


def scan_inputs(b=2, T=11, H=4, P=3, G=2, N=5, dtype=torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = {"x": (b, T, H, P), "dt": (b, T, H), "A": (H,), "B": (b, T, G, N), "C": (b, T, G, N), "D": (H, P)}
    shapes |= {"z": (b, T, H, P), "dt_bias": (H,), "initial_states": (b, H, P, N)}
    tensors = {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}
    return tensors | {"A": -tensors["A"].exp()}


def assert_same(got, want, tolerance=1e-12):
    """Maximum error relative to the largest entry; tensors, or nested sequences of them."""
    if not isinstance(want, torch.Tensor):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w, tolerance)
        return
    assert got.shape == want.shape
    if want.numel():
        error = (got.double() - want.double()).abs().max().item()
        assert error <= tolerance * max(1e-6, want.abs().max().item()), f"error {error:.2e}"


def load_script(name: str):
    path = Path(__file__).resolve().parents[1] / "smoke" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@torch.no_grad()
def assert_steps_are_forward(block, u):
    """Outputs and final states of step() in a loop and of one forward pass, to 5e-6"""
    want, end = block(u, return_final_state=True)
    state, rows = block.allocate_inference_cache(len(u)), []
    for token in u.split(1, dim=1):
        y, *state = block.step(token, *state)
        rows.append(y)
    assert_same(torch.cat(rows, 1), want, 5e-6)
    assert_same(state, end, 5e-6)


def gradients(block, out, *others):
    return torch.autograd.grad(out, [*block.parameters(), *others], allow_unused=True, materialize_grads=True)


# ---- parameters


def test_parameter_table_and_counts():
    block = Mamba2(128)
    shapes = {name: tuple(p.shape) for name, p in block.state_dict().items()}
    assert list(shapes.items()) == [
        ("dt_bias", (4,)),
        ("A_log", (4,)),
        ("D", (4,)),
        ("in_proj.weight", (772, 128)),
        ("conv1d.weight", (512, 1, 4)),
        ("conv1d.bias", (512,)),
        ("norm.weight", (256,)),
        ("out_proj.weight", (128, 256)),
    ]
    counts = {d: sum(p.numel() for p in Mamba2(d).parameters()) for d in (128, 256, 512)}
    assert counts == {128: 134_412, 256: 465_176, 512: 1_719_600}
    every = {name: tuple(p.shape) for name, p in Mamba2(64, d_ssm=64, bias=True, D_has_hdim=True).named_parameters()}
    assert every["in_proj.bias"] == (2 * 128 + 256 + 1,) and every["out_proj.bias"] == (64,) and every["D"] == (64,)
    marked = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "A_log", "D"}


def test_initial_values():
    torch.manual_seed(0)
    block = Mamba2(4096, d_state=1, conv_init=0.25, dt_min=0.01, dt_max=0.2, A_init_range=(2, 5), headdim=4)
    step, A = torch.nn.functional.softplus(block.dt_bias), block.A_log.exp()
    assert 0.01 * 0.999 <= step.min() and step.max() <= 0.2 * 1.001
    assert abs(step.log().mean().item() - math.log(0.01 * 0.2) / 2) < 0.1  # log-uniform
    assert 2 <= A.min() and A.max() <= 5 and abs(A.mean().item() - 3.5) < 0.1  # uniform
    assert 0.24 < block.conv1d.weight.abs().max() <= 0.25
    assert torch.equal(block.D, torch.ones_like(block.D)) and block.D.dtype == torch.float32
    floor = Mamba2(64, dt_min=1e-6, dt_max=1e-5, dt_init_floor=0.05)
    assert_same(torch.nn.functional.softplus(floor.dt_bias), torch.full((2,), 0.05), 1e-5)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="headdim 64"):
        Mamba2(16)
    with pytest.raises(ValueError, match="ngroups 3"):
        Mamba2(64, ngroups=3)
    with pytest.raises(ValueError, match="chunk_size 0"):
        Mamba2(64, chunk_size=0)
    block = make()
    u = torch.zeros(2, 5, 16, dtype=torch.float64)
    for wrong in (
        {"u": u[..., :8]},
        {"seq_idx": torch.zeros(2, 4)},
        {"lengths": torch.tensor([5, 6])},
        {"lengths": torch.tensor([[5, 5]])},
        {"initial_state": block.allocate_inference_cache(3)},
    ):
        with pytest.raises(ValueError, match="Mamba2: "):
            block(**{"u": u, **wrong})
    with pytest.raises(ValueError, match="ssd_scan: C"):
        ssd_scan(**{**scan_inputs(), "C": torch.zeros(2, 11, 2, 4)})


# ---- the scan


def naive_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, limit):
    """The recurrence as it is written, one step after the other."""
    R, ys, S = x.shape[2] // B.shape[2], [], initial_states
    dt = torch.nn.functional.softplus(dt + dt_bias).clamp(*limit)
    for t in range(x.shape[1]):
        Bt, Ct = (m[:, t].repeat_interleave(R, dim=1)[:, :, None] for m in (B, C))  # (B, H, 1, N)
        S = (dt[:, t] * A).exp()[..., None, None] * S + (dt[:, t, :, None] * x[:, t])[..., None] * Bt
        ys.append(((S * Ct).sum(-1) + D * x[:, t]) * torch.nn.functional.silu(z[:, t]))
    return torch.stack(ys, 1), S


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 11, 64])
def test_scan_is_the_recurrence(chunk_size):
    """Outputs, final state and every gradient, for any chunk, with groups, gate, limit, initial state."""
    inputs = {name: t.requires_grad_() for name, t in scan_inputs().items()}
    limit = (0.1, 1.5)
    want = naive_scan(**inputs, limit=limit)
    options = {"dt_softplus": True, "dt_limit": limit, "return_final_states": True, "chunk_size": chunk_size}
    got = ssd_scan(**inputs, **options)
    assert_same(got, want)
    loss = [(y.sin().sum() + S.square().sum()) for y, S in (got, want)]
    assert_same(*(torch.autograd.grad(one, list(inputs.values())) for one in loss), tolerance=1e-10)


def test_gradcheck():
    inputs = {name: t.requires_grad_() for name, t in scan_inputs(b=1, H=2, P=2, N=2).items()}

    def scan(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return ssd_scan(**named, chunk_size=4, dt_softplus=True, return_final_states=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("decay_dtype", [torch.float64, torch.float32])
def test_strong_decay_is_finite_and_exact(monkeypatch, decay_dtype):
    """|dt A| up to 1e4 in float32, also on the path of devices without float64."""
    monkeypatch.setitem(ssd.DECAY_DTYPE, "cpu", decay_dtype)
    inputs = scan_inputs(T=50, dtype=torch.float32)
    inputs["A"] = torch.tensor([-1e4, -1e3, -30.0, -1e-3])
    inputs["dt"][:, ::2] = -12.0  # tiny steps between large ones: small differences of large sums
    options = {"dt_softplus": True, "dt_limit": (0.0, 1.0), "chunk_size": 16, "return_final_states": True}
    doubles = {name: t.double().requires_grad_() for name, t in inputs.items()}
    floats = {name: t.requires_grad_() for name, t in inputs.items()}
    want = naive_scan(**doubles, limit=(0.0, 1.0))
    got = ssd_scan(**floats, **options)
    assert_same(got, want, 3e-6)
    grads = [torch.autograd.grad(y.sum() + S.sum(), list(t.values())) for (y, S), t in ((got, floats), (want, doubles))]
    assert all(g.isfinite().all() for g in grads[0])
    assert_same(*grads, tolerance=1e-5)


def test_packed_scan_is_separate_scans():
    """Segments 4, 1, 6 of values that need not count up; the last state is that of the last segment."""
    inputs = scan_inputs(b=1)
    seq_idx = torch.tensor([[7] * 4 + [2] + [7] * 6])
    y, last = ssd_scan(**inputs, seq_idx=seq_idx, chunk_size=4, return_final_states=True, dt_softplus=True)
    first, parts = 0, []
    for n in (4, 1, 6):
        rows = {k: t[:, first : first + n] if t.ndim >= 3 and t.shape[1] == 11 else t for k, t in inputs.items()}
        rows["initial_states"] = inputs["initial_states"] * (first == 0)
        part, state = ssd_scan(**rows, return_final_states=True, dt_softplus=True)
        parts.append(part)
        first += n
    assert_same(y, torch.cat(parts, 1))
    assert_same(last, state)


# ---- the block


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("start", [False, True])
def test_hand_written_is_reference(name, start):
    """models/mamba2_fused.py against autograd over the reference: lengths of one and several chunks, blocks and
    remainders, outputs, states and every gradient, that of the initial state too."""
    for T in (1, 3, 64, 65, 130, 1100):
        results = []
        for impl in ("reference", "torch"):
            block, u = make(impl=impl, **VARIANTS[name]), torch.randn(3, T, 16, dtype=torch.float64)
            u.requires_grad_()
            torch.manual_seed(T)
            state = [torch.randn_like(s, requires_grad=True) for s in block.allocate_inference_cache(3)]
            lengths = torch.tensor([T, T // 2, 1])
            y, end = block(u, lengths=lengths, initial_state=state if start else None, return_final_state=True)
            loss = y.sin().sum() + end[0].sin().sum() + end[1].sin().sum()
            results.append((y, *end, *gradients(block, loss, u, *(state if start else ()))))
        assert_same(results[1], results[0], 1e-10)


def test_hand_written_runs_where_it_can(monkeypatch):
    """It is what a CPU runs; every case that it does not cover takes the reference."""
    called = []

    def spy(*args):
        called.append(1)
        return fused_core(*args)

    monkeypatch.setattr(mamba2, "fused_core", spy)
    u = torch.randn(2, 20, 16)
    for kwargs, fused in (
        ({}, True),
        ({"impl": "torch"}, True),
        ({"rmsnorm": False, "D_has_hdim": True}, True),
        ({"impl": "reference"}, False),
        ({"norm_before_gate": True}, False),
        ({"d_ssm": 16}, False),
    ):
        called.clear()
        make(dtype=torch.float32, **kwargs)(u)
        assert bool(called) == fused, kwargs
    called.clear()
    make(dtype=torch.float32)(u, seq_idx=torch.zeros(2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        make(dtype=torch.float32)(u)
    assert not called


def test_hand_written_over_batches_of_sequences():
    """More sequences than a block takes, with and without a remainder of sequences and of steps."""
    for b, T in ((20, 64), (9, 130), (5, 200)):
        results = []
        for impl in ("reference", "torch"):
            torch.manual_seed(T)
            block, u = make(impl=impl), torch.randn(b, T, 16, dtype=torch.float64, requires_grad=True)
            y, end = block(u, return_final_state=True)
            results.append((y, *end, *gradients(block, y.sin().sum() + end[1].sin().sum(), u)))
        assert_same(results[1], results[0], 1e-10)


@pytest.mark.filterwarnings("ignore")  # jit.trace is deprecated and warns of every constant
def test_recorded_and_transformed_calls_take_plain_operations():
    """jit.trace must not bake the blocks of one length in, torch.func needs operations that it knows."""
    block, u = make(), torch.randn(2, 100, 16, dtype=torch.float64)
    want = block(u)
    assert_same(torch.func.vmap(lambda one: block(one[None])[0])(u), want)
    _, slope = torch.func.jvp(block, (u,), (torch.ones_like(u),))
    assert slope.isfinite().all()
    with torch.no_grad():
        traced = torch.jit.trace(block, u, check_trace=False)
        assert_same(traced(u), want)
        with pytest.raises(RuntimeError):  # another length is refused
            traced(u[:, :60])


def test_second_derivatives():
    block, u = make(impl="torch"), torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(block(u).sum(), u, create_graph=True)
    block = make(impl="reference", d_model=4, headdim=2, d_state=2)
    assert torch.autograd.gradgradcheck(block, torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True))


def test_backward_where_autocast_is_on():
    """A float32 island inside autocast: the projections' gradients are then torch's business, the rest stays float32."""
    block, u = make(dtype=torch.float32), torch.randn(1, 100, 16, requires_grad=True)
    want = torch.autograd.grad(block(u).sum(), u)[0]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = block(u)
        assert_same(torch.autograd.grad(y.sum(), u)[0], want, 2e-2)


def test_hooks_see_what_the_projections_gave():
    block, u, seen = make(), torch.randn(2, 100, 16, dtype=torch.float64), []
    block.in_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        block(u)
        assert torch.equal(seen[0], torch.nn.functional.linear(u, block.in_proj.weight))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_block_gradcheck(impl):
    """Groups, chunks of 4 with a remainder, initial and final states."""
    block = make(impl=impl, chunk_size=4, d_model=4, headdim=2, d_state=2)
    u = torch.randn(2, 11, 4, dtype=torch.float64, requires_grad=True)
    state = [torch.randn_like(s, requires_grad=True) for s in block.allocate_inference_cache(2)]
    names, values = zip(*block.named_parameters(), strict=True)

    def run_block(u, conv_state, ssm_state, *values):
        options = {"initial_state": (conv_state, ssm_state), "return_final_state": True}
        y, end = torch.func.functional_call(block, dict(zip(names, values, strict=True)), (u,), options)
        return y, *end

    assert torch.autograd.gradcheck(run_block, (u, *state, *values))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_chunked_is_step_by_step_over_4096_steps(impl):
    """float32; the state of weakly decaying heads remembers most of them."""
    block, u = make(dtype=torch.float32, impl=impl, A_init_range=(0.001, 4)), torch.randn(1, 4096, 16)
    assert_steps_are_forward(block, u)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("decay, scale", [(1e2, 1), (1e4, 1), (10, 100)])
def test_strong_decay_trains(impl, decay, scale):
    """|dt A| up to 1e4 in float32, next to heads that hardly decay; and steps of any size within one head, whose
    gradients all but cancel: everything finite and near float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        block = make(dtype=dtype, impl=impl if dtype == torch.float32 else "reference")
        with torch.no_grad():
            block.A_log.copy_(torch.tensor([decay, decay / 10, 1.0, 1e-4]).log())
            block.dt_bias.fill_(1.0)
        u = torch.randn(2, 150, 16, generator=torch.Generator().manual_seed(3))
        u = (scale * u).to(dtype).requires_grad_()
        y, end = block(u, return_final_state=True)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        results.append((y, *end, *gradients(block, (weight * y).sum() + end[1].sum(), u)))
    got, want = results
    assert all(t.isfinite().all() for t in got)
    assert_same(got[:3], want[:3], 5e-6)
    assert_same(got[3:], want[3:], 2e-5)


def test_half_precision_over_8192_steps():
    """bf16 projections, float32 from the convolution to the gate: no overflow, and near float64."""
    block, u = make(dtype=torch.float32, A_init_range=(0.001, 1)), torch.randn(1, 8192, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, (_, state) = block(u, return_final_state=True)
    with torch.no_grad():
        want, (_, end) = block.double()(u.double(), return_final_state=True)
    assert got.isfinite().all() and state.isfinite().all()
    assert_same(got, want, 1e-2)
    assert_same(state, end, 1e-2)


def test_scan_of_bf16_inputs_is_near_float64():
    """Only x, B and C are rounded to bfloat16; step sizes and decays stay float32."""
    inputs = scan_inputs(T=512, N=16)
    low = {name: t.bfloat16() if name in "xBCz" else t.float() for name, t in inputs.items()}
    options = {"dt_softplus": True, "return_final_states": True}
    got, want = ssd_scan(**low, **options), ssd_scan(**inputs, **options)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert_same(got, want, 1e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_change_nothing(name, monkeypatch):
    """Inference and checkpointed training in blocks, here of 64 steps, are one pass; padded clips end inside them."""
    monkeypatch.setattr(mamba2, "BLOCK_STEPS", 64)
    u, lengths = torch.randn(3, 300, 16, dtype=torch.float64), torch.tensor([300, 128, 70])
    results = []
    for checkpoint_blocks in (False, True):
        block = make(checkpoint_blocks=checkpoint_blocks, **VARIANTS[name])
        u = u.detach().requires_grad_()
        y, end = block(u, lengths=lengths, return_final_state=True)
        grads = gradients(block, y.sin().sum() + end[0].sin().sum() + end[1].sin().sum(), u)
        with torch.no_grad():
            inferred, inferred_end = block(u, lengths=lengths, return_final_state=True)
        assert_same((inferred, *inferred_end), (y, *end))
        assert_same(block(u), block(u, seq_idx=torch.zeros(3, 300)))  # packed input goes through whole
        results.append((y, *end, *grads))
    assert_same(results[1], results[0], 1e-10)


def test_memory_stays_within_its_bars():
    """(1, T, 256), growth of the process: forward at T = 32768 at most 200 MB, training 60 KB a step, 12 in blocks."""
    bench = load_script("bench_mamba")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks are read from /proc/self")
    assert bench.measure("ours", "forward", 32768) <= 200e6
    assert bench.measure("reference", "forward", 32768) <= 200e6  # in blocks as well
    for name, bar in (("ours", 60e3), ("checkpoint_blocks", 12e3)):
        assert bench.measure(name, "training", 8192) - bench.measure(name, "training", 4096) <= 4096 * bar
    assert bench.measure("ours", "stream", 2000) <= 3e6


@pytest.mark.parametrize("name", VARIANTS)
def test_step_is_forward(name):
    block, u = make(dtype=torch.float32, **VARIANTS[name]), torch.randn(3, 70, 16)
    assert_steps_are_forward(block, u)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("s", [0, 1, 3, 4, 63, 64, 65, 130])
def test_split_anywhere(s, impl):
    """Two calls with the state in between are one call, forwards and backwards."""
    block, u = make(impl=impl), torch.randn(2, 130, 16, dtype=torch.float64, requires_grad=True)
    whole, end = block(u, return_final_state=True)
    first, middle = block(u[:, :s], return_final_state=True)
    second, end_of_two = block(u[:, s:], initial_state=middle, return_final_state=True)
    both = torch.cat([first, second], 1)
    assert_same((both, end_of_two), (whole, end))
    losses = [y.sin().sum() + S.sin().sum() for y, (_, S) in ((whole, end), (both, end_of_two))]
    assert_same(gradients(block, losses[1], u), gradients(block, losses[0], u), 1e-9)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_chunk_size_changes_nothing(impl):
    u = torch.randn(2, 100, 16, dtype=torch.float64)
    want = make()(u)
    for chunk_size in (1, 7, 16, 64, 256):
        assert_same(make(chunk_size=chunk_size, impl=impl)(u), want)


def test_batch_permutation():
    block, u, lengths = make(), torch.randn(4, 20, 16, dtype=torch.float64), torch.tensor([3, 20, 0, 9])
    order = torch.tensor([2, 0, 3, 1])
    assert_same(block(u[order], lengths=lengths[order]), block(u, lengths=lengths)[order])


def flip_valid(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Reverse the first lengths[i] rows of x[i] (B, T, D), keep the padding where it is."""
    t, n = torch.arange(x.shape[1]), lengths[:, None]
    return x.gather(1, torch.where(t < n, n - 1 - t, t)[..., None].expand_as(x))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_changes_nothing(name, reverse):
    """A padded batch is its clips one by one, in both directions of time: outputs, states, gradients; whatever the
    padding holds and however long it is."""
    block, n = make(**VARIANTS[name]), [13, 70, 1, 0]
    clips = [torch.randn(1, k, 16, dtype=torch.float64, requires_grad=True) for k in n]
    lengths, dims = torch.tensor(n), [1] if reverse else []
    singles = [(y.flip(dims), end) for y, end in (block(c.flip(dims), return_final_state=True) for c in clips)]
    want = gradients(block, sum(y.sin().sum() + S.sin().sum() for y, (_, S) in singles), *clips)
    for fill, T in ((0.0, 70), (100.0, 75), (float("nan"), 133)):
        u = torch.cat([torch.nn.functional.pad(c, (0, 0, 0, T - c.shape[1]), value=fill) for c in clips])
        y, state = block(flip_valid(u, lengths) if reverse else u, lengths=lengths, return_final_state=True)
        y = flip_valid(y, lengths) if reverse else y
        for i, (alone, end) in enumerate(singles):
            assert_same(y[i : i + 1, : n[i]], alone)
            assert torch.equal(y[i, n[i] :], torch.zeros(T - n[i], 16, dtype=torch.float64))
            assert_same([s[i : i + 1] for s in state], end)
        assert_same(gradients(block, y.sin().sum() + state[1].sin().sum(), *clips), want, 1e-9)


@pytest.mark.parametrize("lengths", [None, torch.tensor([30, 17])])
def test_packed_is_separate(lengths):
    """Convolution and state restart at each change of seq_idx; an initial state goes to the first segment only."""
    block, u = make(), torch.randn(2, 30, 16, dtype=torch.float64)
    state = [torch.randn_like(s, dtype=torch.float64) for s in block.allocate_inference_cache(2)]
    seq_idx = torch.tensor([[0] * 2 + [1] * 26 + [2] * 2, [5] * 10 + [3] * 7 + [0] * 13])
    got, end = block(u, seq_idx=seq_idx, lengths=lengths, initial_state=state, return_final_state=True)
    for i, segments in enumerate([(2, 26, 2), (10, 7, 13) if lengths is None else (10, 7)]):
        rows, first = [], 0
        for n in segments:
            before = None if first else [s[i : i + 1] for s in state]
            y, last = block(u[i : i + 1, first : first + n], initial_state=before, return_final_state=True)
            rows.append(y)
            first += n
        assert_same(got[i : i + 1, :first], torch.cat(rows, 1))
        assert_same([s[i : i + 1] for s in end], last)


@pytest.mark.parametrize("T", [0, 1])
def test_shortest_sequences(T):
    block, u = make(), torch.randn(2, T, 16, dtype=torch.float64)
    start = [torch.randn_like(s, requires_grad=True) for s in block.allocate_inference_cache(2)]
    seq_idx, lengths = torch.zeros(2, T, dtype=torch.int32), torch.full((2,), T)
    y, end = block(u, seq_idx, lengths, initial_state=start, return_final_state=True)
    assert y.shape == (2, T, 16)
    if T == 0:
        assert_same(end, start, 0)
    else:
        nobody = block.step(u[:0], *block.allocate_inference_cache(0))
        assert [len(t) for t in nobody] == [0, 0, 0]
    assert all(g.isfinite().all() for g in gradients(block, y.sum() + end[0].sum() + end[1].sum(), *start))
    assert ssd_scan(**scan_inputs(T=T)).shape == (2, T, 4, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """float32 weights under autocast: finite, near float32; states float32, output in the input's dtype."""
    block, u = make(dtype=torch.float32), torch.randn(2, 100, 16)
    want = block(u)
    with torch.autocast("cpu", dtype):
        got, (_, state) = block(u, return_final_state=True)
        low = block(u.to(dtype))
        stepped = block.allocate_inference_cache(2)
        for token in u.split(1, dim=1):
            _, *stepped = block.step(token, *stepped)
    assert got.dtype == torch.float32 and low.dtype == dtype and state.dtype == torch.float32
    assert_same(stepped[1], state, 1e-5)  # both kept in float32: products of the scan are not in half precision
    assert_same(got, want, 2e-2)
    assert_same(low, want, 2e-2)
    got_grads, want_grads = (gradients(block, y.sum()) for y in (got, want))
    assert all(g.isfinite().all() for g in got_grads)
    assert_same(got_grads, want_grads, 6e-2)


def test_half_precision_module():
    """A whole block in bfloat16 still decays and accumulates in float32."""
    block, u = make(dtype=torch.float32), torch.randn(2, 100, 16)
    want = block(u)
    got, (_, state) = block.bfloat16()(u.bfloat16(), return_final_state=True)
    assert got.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_same(got, want, 4e-2)


def test_transformers_has_the_same_block():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=16)
    mixer, block = Mamba2Mixer(config, layer_idx=0), Mamba2(64, d_state=16, headdim=16, ngroups=2)
    block.load_state_dict(mixer.state_dict(), strict=True)
    u = torch.randn(2, 50, 64, requires_grad=True)
    results = []
    for module in (block, mixer):
        y = module(u)
        named = {"u": u, **dict(module.named_parameters())}
        results.append((y, dict(zip(named, torch.autograd.grad(y.sin().sum(), list(named.values())), strict=True))))
    (got, got_grads), (want, want_grads) = results
    assert_same(got, want, 1e-5)
    for name, grad in want_grads.items():
        assert_same(got_grads[name], grad, 1e-4)


def test_bench_times_the_torch_path_where_kernels_import(monkeypatch, capsys):
    from transformers.models.mamba2 import modeling_mamba2

    bench = load_script("bench_mamba")
    block, u = Mamba2(64), torch.randn(2, 50, 64)
    mixer = bench.make_mixer(block, 16)
    want = mixer(u)
    for name in ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan"):

        @functools.wraps(getattr(modeling_mamba2, name))
        def kernel(*args, **kwargs):
            raise AssertionError("a kernel was called")

        monkeypatch.setattr(modeling_mamba2, name, kernel)
    with pytest.raises(AssertionError, match="a kernel was called"):
        mixer(u)
    with bench.torch_path():
        assert torch.equal(mixer(u), want)
    argv = ["--device", "cpu", "--shapes", "1,8,64", "--seconds", "0.1"]
    assert run.cli(bench.main, argv) == 0 and "torch path" in capsys.readouterr().out


# ---- implementations


def test_an_explicit_impl_is_obeyed_or_refused():
    cpu = torch.device("cpu")
    assert resolve_impl("auto", cpu) == resolve_impl("torch", cpu) == "torch"
    assert describe_impl("torch", cpu) == "Mamba2 impl torch (as asked)"
    assert "Mamba2 impl torch (the kernels need CUDA" in describe_impl("auto", cpu)
    with pytest.raises(UserError, match="--impl mamba_ssm: the kernels need CUDA, this is cpu"):
        make(impl="mamba_ssm")(torch.zeros(1, 3, 16, dtype=torch.float64))
    with pytest.raises(UserError, match="--impl triton: .*expected one of auto, torch, reference, mamba_ssm"):
        resolve_impl("triton", cpu)
    with pytest.raises(ValueError, match="'fast'"):
        make(impl="fast")


def fake_package(folder, monkeypatch, init: str, kernel: str, version: str):
    """An installed package of mamba_ssm's layout, found first."""
    (folder / "mamba_ssm/ops/triton").mkdir(parents=True)
    (folder / "mamba_ssm/__init__.py").write_text(init)
    (folder / "mamba_ssm/ops/triton/ssd_combined.py").write_text(kernel)
    (folder / f"mamba_ssm-{version}.dist-info").mkdir()
    (folder / f"mamba_ssm-{version}.dist-info/METADATA").write_text(f"Name: mamba_ssm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(folder))
    ssd._forget_mamba_ssm()
    ssd.load_kernel.cache_clear()
    ssd._choose_impl.cache_clear()


@pytest.fixture
def clean_kernel_cache():
    before = ssd._forget_mamba_ssm()
    yield
    ssd._forget_mamba_ssm()
    ssd.sys.modules.update(before)
    ssd.load_kernel.cache_clear()
    ssd._choose_impl.cache_clear()


KERNEL = "def mamba_chunk_scan_combined(): pass"


@pytest.mark.parametrize("version", ["2.3.2.post1", "2.2.4+cu12torch2.5", "2.3.0rc1", "3.0"])
def test_kernels_import_without_the_compiled_extension(tmp_path, monkeypatch, clean_kernel_cache, version):
    """Released wheels fail in __init__ when their CUDA extension is absent; the kernels are found all the same."""
    fake_package(tmp_path, monkeypatch, "import no_such_extension_abc", KERNEL, version)
    assert ssd.load_kernel().__name__ == "mamba_chunk_scan_combined"
    assert importlib.util.find_spec("mamba_ssm") is not None  # others may still ask
    assert resolve_impl("auto", torch.device("cuda")) == "mamba_ssm"
    assert resolve_impl("auto", torch.device("cuda"), torch.float64) == "torch"


@pytest.mark.parametrize(
    "kernel, version, why",
    [("import no_such_triton_abc", "2.3.2", "No module named 'no_such_triton_abc'"), (KERNEL, "2.2.2", "wrong grad")],
)
def test_unusable_kernels_say_why(tmp_path, monkeypatch, clean_kernel_cache, kernel, version, why):
    fake_package(tmp_path, monkeypatch, "", kernel, version)
    assert why in describe_impl("auto", torch.device("cuda"))
    assert resolve_impl("auto", torch.device("cuda")) == "torch"
    with pytest.raises(UserError, match="--impl mamba_ssm: mamba_ssm 2"):
        resolve_impl("mamba_ssm", torch.device("cuda"))
    assert not [name for name in ssd.sys.modules if name.startswith("mamba_ssm")]


def test_compiles_without_graph_break():
    block, u = make(dtype=torch.float32), torch.randn(2, 100, 16)
    with torch.no_grad():
        assert_same(torch.compile(block, fullgraph=True, backend="aot_eager")(u), block(u), 1e-5)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_equals_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the convolution, else 1e-3 off
    u, lengths, results = torch.randn(3, 150, 16), torch.tensor([150, 64, 9]), []
    for device in ("cpu", "cuda"):
        block = make(dtype=torch.float32, impl="torch", **VARIANTS[name]).to(device)
        y, state = block(u.to(device), lengths=lengths, return_final_state=True)
        grads = gradients(block, y.sin().sum() + state[1].sum())
        results.append([t.cpu() for t in (y, *state, *grads)])
    assert_same(results[1], results[0], 2e-5)


@gpu
@needs_cuda
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("T", [1, 100, 300])
def test_kernels_equal_torch(name, T):
    if resolve_impl("auto", torch.device("cuda")) == "torch":
        pytest.skip(describe_impl("auto", torch.device("cuda")))
    sizes = {"d_model": 64, "d_state": 16, "headdim": 16} | ({"d_ssm": 64} if "d_ssm" in VARIANTS[name] else {})
    torch.manual_seed(1)
    u, seq_idx = torch.randn(2, T, 64, device="cuda"), (torch.arange(T, device="cuda") > T // 3).int().expand(2, T)
    start, results = [torch.randn(2, 64 * 2 + 64, 4), torch.randn(2, 8, 16, 16)], []
    for impl in ("torch", "mamba_ssm"):
        block = make(dtype=torch.float32, impl=impl, **{**VARIANTS[name], **sizes}).cuda()
        empty = block.allocate_inference_cache(2)
        state = [s[:, : e.shape[1], ..., : e.shape[-1]].cuda() for s, e in zip(start, empty, strict=True)]
        for kwargs in ({}, {"lengths": torch.tensor([T, T // 2])}, {"seq_idx": seq_idx, "initial_state": state}):
            y, end = block(u, return_final_state=True, **kwargs)
            results.append([y, *end, *gradients(block, y.sin().sum() + end[1].sum())])
    assert_same(results[3:], results[:3], 1e-4)
