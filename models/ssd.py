"""The SSD recurrence of Mamba-2 over a whole sequence: chunked, in plain PyTorch, or through mamba_ssm's CUDA kernels.

    dt_t = clamp(softplus(dt_raw_t + dt_bias), dt_limit)          head h uses B and C of group g = h // (H/G)
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T                   [Dao & Gu 2024, "Transformers are SSMs", sec. 6]
    y_t  = S_t C_t + D x_t

Shapes: B batch, T time, H heads, P channels of a head (headdim), G groups, N state size (d_state), c chunks of Q steps,
R = H/G heads of a group. Parity: state-spaces/mamba mamba_ssm/ops/triton/ssd_combined.py@e9594ce.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import math
import re
import sys
import types

import torch
import torch.nn.functional as F

from utils.run import UserError

IMPLS = ("auto", "torch", "reference", "mamba_ssm")
TORCH_CHUNK = 64  # steps; the fastest chunk of the plain path on CPUs (32: +2 %, 128: +13 % time)
NO_LIMIT = (0.0, math.inf)
AS_IT_IS = contextlib.nullcontext()
WIDE = (torch.float32, torch.float64)
DECAY_DTYPE = {"cpu": torch.float64, "cuda": torch.float64}  # other devices may have no float64 (Metal): float32 there


@functools.cache
def load_kernel():
    """mamba_ssm's `mamba_chunk_scan_combined`. ImportError says why it cannot be had.

    Released wheels import a compiled Mamba-1 extension in __init__.py, old ones names that transformers has dropped.
    The Mamba-2 kernels need neither, so a failed import is repeated without running __init__.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        raise ImportError("mamba_ssm is not installed")
    version = importlib.metadata.version("mamba_ssm")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < (2, 2, 3):  # 2.2.4+cu12torch2.5, 2.3.0rc1
        raise ImportError(f"mamba_ssm {version} has wrong gradients for A (fixed in 2.2.3)")
    bare = types.ModuleType("mamba_ssm")
    bare.__path__, bare.__spec__ = list(spec.submodule_search_locations), spec  # without a spec find_spec raises
    before = _forget_mamba_ssm()
    for package in (before, {"mamba_ssm": bare}):
        sys.modules.update(package)
        try:
            return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        except (ImportError, OSError, RuntimeError) as e:  # missing extension or name, broken library, no GPU driver
            error = e
        _forget_mamba_ssm()
    sys.modules.update(before)
    raise ImportError(f"mamba_ssm {version} does not import: {type(error).__name__}: {error}") from error


def _forget_mamba_ssm() -> dict:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "mamba_ssm"}


@functools.cache
def _choose_impl(impl: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """("torch", "reference" or "mamba_ssm", reason)"""
    if impl not in IMPLS:
        raise UserError(f"--impl {impl}: not an implementation of Mamba2; expected one of {', '.join(IMPLS)}")
    if impl in ("torch", "reference"):
        return impl, "as asked"
    reason = "the kernels have no float64" if device_type == "cuda" else f"the kernels need CUDA, this is {device_type}"
    if device_type == "cuda" and dtype != torch.float64:
        try:
            load_kernel()
            return "mamba_ssm", "the kernels import"
        except ImportError as e:
            reason = str(e)
    if impl == "mamba_ssm":
        raise UserError(f"--impl mamba_ssm: {reason}; use --impl auto or --impl torch")
    return "torch", reason


@torch.compiler.assume_constant_result
def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """auto takes the kernels where they can run and torch elsewhere; an explicit choice is obeyed or UserError."""
    return _choose_impl(impl, device.type, dtype)[0]


def describe_impl(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The choice and its reason in one line, for scripts to print: models do not print."""
    return "Mamba2 impl {} ({})".format(*_choose_impl(impl, device.type, dtype))


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    chunk_size: int = TORCH_CHUNK,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The SSD recurrence over a sequence of any length T >= 0, differentiable in every tensor but seq_idx.

    x, z (B, T, H, P), y is multiplied by silu(z); dt (B, T, H) before bias and softplus; A (H,) negative; B, C
    (B, T, G, N), G divides H; skip D (H,) or (H, P); seq_idx (B, T) integer, the state restarts wherever it changes;
    initial_states (B, H, P, N) continue the first segment; chunk_size: steps, at most, speed only.
    Returns y (B, T, H, P) in x's dtype, with return_final_states also the last state (B, H, P, N), float32 or wider.
    Raises ValueError for shapes that do not fit, UserError for an impl that cannot run here.
    """
    b, T, H, P = x.shape
    G, N = B.shape[-2:]
    check_shapes("ssd_scan", dt=(dt, (b, T, H)), A=(A, (H,)), B=(B, (b, T, G, N)), C=(C, (b, T, G, N)))
    check_shapes("ssd_scan", z=(z, x.shape), seq_idx=(seq_idx, (b, T)), initial_states=(initial_states, (b, H, P, N)))
    if H % G or chunk_size < 1:
        raise ValueError(f"ssd_scan: {G} groups must divide {H} heads, and chunk_size {chunk_size} be at least 1")
    segment = None if seq_idx is None or T == 0 else number_segments(seq_idx)
    with no_autocast(x.device.type):  # precision is chosen here, not by the caller's autocast
        step_size = discretise(dt, dt_bias, dt_softplus, dt_limit)
        y, state = scan(x, step_size, A, B, C, D, initial_states, segment, chunk_size, return_final_states, impl)
        if z is not None:
            y = (y * F.silu(widen(z))).to(x.dtype)
    return (y, state) if return_final_states else y


def check_shapes(where: str, **expected: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")


def discretise(dt: torch.Tensor, dt_bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float]):
    """Raw dt (..., H) -> step size (..., H), float32 or wider: bias, softplus, clamp, in this order."""
    dt = widen(dt)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if softplus else dt
    return dt if softplus and tuple(limit) == NO_LIMIT else dt.clamp(*limit)


def number_segments(seq_idx: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """seq_idx (B, T) -> (B, T) int64: 0, 1, .. in order of appearance; padding (valid False) continues the last one."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return (starts if valid is None else starts & valid).cumsum(1)


def no_autocast(device_type: str):
    """Context without autocast; entering a real one costs as much as five small operations."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else AS_IT_IS


def widen(t: torch.Tensor) -> torch.Tensor:
    """t in float32; float64 stays"""
    return t if t.dtype in WIDE else t.float()


def scan(x, dt, A, B, C, D, initial_states, segment, chunk_size, want_state, impl):
    """ssd_scan with a final step size dt and numbered segments. Returns (y, state), state None unless want_state."""
    b, T, H, P = x.shape
    if T > 0 and resolve_impl(impl, x.device, x.dtype) == "mamba_ssm":
        return _scan_kernel(x, dt, A, B, C, D, initial_states, segment, chunk_size, want_state)
    any_length = isinstance(T, torch.SymInt)
    if any_length:  # one graph for every T: nothing may be decided on it
        c, Q = (T + chunk_size - 1) // chunk_size, chunk_size
    else:
        c = max(1, math.ceil(T / chunk_size))
        Q = max(1, math.ceil(T / c))  # evenly spread, so that little is padded
    wide = widen(x)
    inputs = [wide, dt.to(wide), B.to(wide), C.to(wide)]
    if any_length or c * Q > T:  # a step with dt = 0 neither decays nor feeds the state
        inputs = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, c * Q - T)) for t in inputs]
    chunks = [t.unflatten(1, (c, Q)) for t in inputs]
    if segment is not None:
        segment = segment[:, torch.arange(c * Q, device=x.device).clamp(max=T - 1)].unflatten(1, (c, Q))
    y, state = _scan_chunks(*chunks, A, initial_states, segment, want_state, any_length)
    y = y.flatten(1, 2).narrow(1, 0, T)  # (B, T, H, P)
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None])
    return y.to(x.dtype), state


def _scan_chunks(x, dt, B, C, A, initial_states, segment, want_state, any_length):
    """x (B,c,Q,H,P), dt (B,c,Q,H), B and C (B,c,Q,G,N), segment (B,c,Q) or None -> y (B,c,Q,H,P), state (B,H,P,N)."""
    b, c, Q, H, P = x.shape
    G, N = B.shape[-2:]
    R = H // G
    wide = DECAY_DTYPE.get(x.device.type, torch.float32)
    log_decay = (dt.to(wide) * A.to(wide)).transpose(2, 3)  # (B, c, H, Q)
    within, entering = decays(log_decay, segment, x.dtype)  # (B, c, H, Q, Q), (B, c, H, Q)
    B_, C_ = B.transpose(2, 3), C.transpose(2, 3)  # (B, c, G, Q, N)
    xdt = (x * dt[..., None]).unflatten(3, (G, R)).permute(0, 1, 3, 4, 2, 5)  # (B, c, G, R, Q, P)
    # inside each chunk: attention-like, scores C_l . B_s shared by the R heads of a group
    scores = (C_ @ B_.mT)[:, :, :, None] * within.unflatten(2, (G, R))  # (B, c, G, R, Q, Q)
    y = (scores @ xdt).permute(0, 1, 4, 2, 3, 5)  # (B, c, Q, G, R, P)
    if not any_length and c == 1 and initial_states is None and not want_state:
        return y.flatten(3, 4), None
    # what each chunk adds to the state, then the state that enters each chunk
    kept = xdt * within[..., -1, :].unflatten(2, (G, R))[..., None]  # (B, c, G, R, Q, P)
    added = B_.mT @ kept.permute(0, 1, 2, 4, 3, 5).flatten(4)  # (B, c, G, N, R*P)
    through = entering[..., -1].unflatten(2, (G, R)).repeat_interleave(P, dim=3)[:, :, :, None]  # (B, c, G, 1, R*P)
    state = x.new_zeros(b, H, P, N) if initial_states is None else initial_states.to(x.dtype)
    state, states = state.unflatten(1, (G, R)).permute(0, 1, 4, 2, 3).flatten(3), []  # (B, G, N, R*P)
    if any_length:  # the same recurrence with a chunk for a step, all at once: O(c^2), but no loop over a symbol
        ends = None if segment is None else segment[:, None, :, -1]  # (B, 1, c)
        between, since = (t[:, 0].unflatten(1, (G, R)) for t in decays(log_decay.sum(-1).mT[:, None], ends, x.dtype))
        after = torch.einsum("bgrij,bjgnrp->bignrp", between, added.unflatten(4, (R, P)))
        after = after + torch.einsum("bgri,bgnrp->bignrp", since, state.unflatten(3, (R, P)))
        after = after.flatten(4)  # (B, c, G, N, R*P)
        states, state = torch.cat([state[:, None], after[:, :-1]], 1), after[:, -1]
    else:
        for decay, new in zip(through.unbind(1), added.unbind(1), strict=True):  # indexing costs O(c^2) backwards
            states.append(state)
            state = decay * state + new
        states = torch.stack(states, 1)
    carried = (C_ @ states).unflatten(4, (R, P)).transpose(2, 3)  # (B, c, Q, G, R, P)
    y = y + carried * entering.unflatten(2, (G, R)).permute(0, 1, 4, 2, 3)[..., None]
    return y.flatten(3, 4), state.unflatten(3, (R, P)).permute(0, 1, 3, 4, 2).flatten(1, 2) if want_state else None


def decays(log_decay: torch.Tensor, segment: torch.Tensor | None, dtype: torch.dtype):
    """Decay factors inside each chunk from log_decay (B, c, H, Q) <= 0, float64 where the device has it.

    Returns within (B, c, H, Q, Q): from after step s to after step l, zero for s > l or another segment; and entering
    (B, c, H, Q): from before the chunk to after step l, zero when a segment started in between. Both in `dtype`.
    """
    Q = log_decay.shape[-1]
    blocked = torch.ones(Q, Q, dtype=torch.bool, device=log_decay.device).triu(1)  # s > l
    total = log_decay.cumsum(-1)  # (B, c, H, Q)
    if log_decay.dtype == torch.float64:  # sums reach hundreds: only their differences may be rounded to float32
        between = (total[..., :, None] - total[..., None, :]).to(dtype)  # (B, c, H, Q, Q)
    else:  # the difference of float32 sums would cancel: sum the steps s+1 .. l themselves
        steps = log_decay[..., :, None].expand(*log_decay.shape, Q)
        between = steps.masked_fill(blocked.logical_not().mT, 0).cumsum(-2).to(dtype)
    total = total.to(dtype)
    if segment is not None:
        before = torch.cat([torch.zeros_like(segment[:, :1, -1]), segment[:, :-1, -1]], 1)  # (B, c)
        total = total.masked_fill((segment != before[..., None])[:, :, None], -math.inf)
        blocked = blocked | (segment[..., :, None] != segment[..., None, :])[:, :, None]  # (B, c, 1, Q, Q)
    return between.masked_fill(blocked, -math.inf).exp(), total.exp()  # exp first: inf * 0 = NaN in the backward pass


@torch.compiler.disable
def _scan_kernel(x, dt, A, B, C, D, initial_states, segment, chunk_size, want_state):
    """`scan` through mamba_ssm's Triton kernels, whose chunk must be a power of two of at least 16."""
    seq_idx = None if segment is None else segment.int()
    options = {"D": D, "initial_states": initial_states, "seq_idx": seq_idx, "return_final_states": want_state}
    chunk_size = max(16, 1 << (chunk_size - 1).bit_length())
    out = load_kernel()(x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), chunk_size, **options)
    return out if want_state else (out, None)
