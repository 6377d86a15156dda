"""Mamba-2 (state space duality, SSD) in plain PyTorch: a drop-in for mamba_ssm's `Mamba2` that runs on any device.

Recurrence of head h, whose B and C belong to group g = h // (H/G):  [Dao & Gu 2024, "Transformers are SSMs", sec. 6]

    dt_t = clamp(softplus(dt_raw_t + dt_bias), dt_limit)
    S_t  = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          A = -exp(A_log) < 0
    y_t  = S_t C_t + D x_t

Shapes: B batch, T time, D model width, H heads, P channels of a head (headdim), G groups, N state size (d_state),
k taps of the convolution (d_conv), c chunks of Q steps, R = H/G heads of a group.
Parity: state-spaces/mamba mamba_ssm/modules/mamba2.py@e9594ce: argument and parameter names, shapes, numbers and
initialisation; state dicts load with strict=True both ways, and into transformers' Mamba2Mixer.
"""

import functools
import importlib.metadata
import importlib.util
import math
import sys
import types

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.run import UserError

IMPLS = ("auto", "torch", "mamba_ssm")
TORCH_CHUNK = 64  # steps; the fastest chunk of the plain path on CPUs (32: +2 %, 128: +13 % time)
NO_LIMIT = (0.0, math.inf)
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
    if tuple(int(part) for part in version.split(".")[:3]) < (2, 2, 3):
        raise ImportError(f"mamba_ssm {version} has wrong gradients for A (fixed in 2.2.3)")
    bare = types.ModuleType("mamba_ssm")
    bare.__path__ = list(spec.submodule_search_locations)
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
    """("torch" or "mamba_ssm", reason)"""
    if impl not in IMPLS:
        raise UserError(f"--impl {impl}: not an implementation of Mamba2; expected one of {', '.join(IMPLS)}")
    if impl == "torch":
        return "torch", "as asked"
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
    """ "torch" or "mamba_ssm": auto takes the kernels where they can run, an explicit choice is obeyed or UserError."""
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
    _check_shapes("ssd_scan", dt=(dt, (b, T, H)), A=(A, (H,)), B=(B, (b, T, G, N)), C=(C, (b, T, G, N)))
    _check_shapes("ssd_scan", z=(z, x.shape), seq_idx=(seq_idx, (b, T)), initial_states=(initial_states, (b, H, P, N)))
    if H % G or chunk_size < 1:
        raise ValueError(f"ssd_scan: {G} groups must divide {H} heads, and chunk_size {chunk_size} be at least 1")
    segment = None if seq_idx is None or T == 0 else number_segments(seq_idx)
    with torch.autocast(x.device.type, enabled=False):  # precision is chosen here, not by the caller's autocast
        step_size = discretise(dt, dt_bias, dt_softplus, dt_limit)
        y, state = _scan(x, step_size, A, B, C, D, initial_states, segment, chunk_size, return_final_states, impl)
        if z is not None:
            y = (y * F.silu(z.to(_at_least_float32(z)))).to(x.dtype)
    return (y, state) if return_final_states else y


def _check_shapes(where: str, **expected: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")


def discretise(dt: torch.Tensor, dt_bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float]):
    """Raw dt (..., H) -> step size (..., H), float32 or wider: bias, softplus, clamp, in this order."""
    dt = dt.to(_at_least_float32(dt))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if softplus else dt
    return dt if softplus and tuple(limit) == NO_LIMIT else dt.clamp(*limit)


def number_segments(seq_idx: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """seq_idx (B, T) -> (B, T) int64: 0, 1, .. in order of appearance; padding (valid False) continues the last one."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return (starts if valid is None else starts & valid).cumsum(1)


def _at_least_float32(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _scan(x, dt, A, B, C, D, initial_states, segment, chunk_size, want_state, impl):
    """ssd_scan with a final step size dt and numbered segments. Returns (y, state), state None unless want_state."""
    b, T, H, P = x.shape
    work = _at_least_float32(x)
    if T > 0 and resolve_impl(impl, x.device, x.dtype) == "mamba_ssm":
        return _scan_kernel(x, dt, A, B, C, D, initial_states, segment, chunk_size, want_state)
    c = max(1, math.ceil(T / chunk_size))
    Q = max(1, math.ceil(T / c))  # evenly spread, so that little is padded
    inputs = [x.to(work), dt.to(work), B.to(work), C.to(work)]
    if c * Q > T:  # a step with dt = 0 neither decays nor feeds the state
        inputs = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, c * Q - T)) for t in inputs]
    chunks = [t.unflatten(1, (c, Q)) for t in inputs]
    if segment is not None:
        segment = segment[:, torch.arange(c * Q, device=x.device).clamp(max=T - 1)].unflatten(1, (c, Q))
    y, state = _scan_chunks(*chunks, A, initial_states, segment, want_state)
    y = y.flatten(1, 2)[:, :T]  # (B, T, H, P)
    if D is not None:
        y = y + x * (D if D.ndim == 2 else D[:, None])
    return y.to(x.dtype), state


def _scan_chunks(x, dt, B, C, A, initial_states, segment, want_state):
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
    if c == 1 and initial_states is None and not want_state:
        return y.flatten(3, 4), None
    # what each chunk adds to the state, then the state that enters each chunk
    kept = xdt * within[..., -1, :].unflatten(2, (G, R))[..., None]  # (B, c, G, R, Q, P)
    added = B_.mT @ kept.permute(0, 1, 2, 4, 3, 5).flatten(4)  # (B, c, G, N, R*P)
    through = entering[..., -1].unflatten(2, (G, R)).repeat_interleave(P, dim=3)[:, :, :, None]  # (B, c, G, 1, R*P)
    state = x.new_zeros(b, H, P, N) if initial_states is None else initial_states.to(x.dtype)
    state, states = state.unflatten(1, (G, R)).permute(0, 1, 4, 2, 3).flatten(3), []  # (B, G, N, R*P)
    for decay, new in zip(through.unbind(1), added.unbind(1), strict=True):  # indexing instead costs O(c^2) backwards
        states.append(state)
        state = decay * state + new
    carried = (C_ @ torch.stack(states, 1)).unflatten(4, (R, P)).transpose(2, 3)  # (B, c, Q, G, R, P)
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
    """`_scan` through mamba_ssm's Triton kernels, whose chunk must be a power of two of at least 16."""
    seq_idx = None if segment is None else segment.int()
    options = {"D": D, "initial_states": initial_states, "seq_idx": seq_idx, "return_final_states": want_state}
    chunk_size = max(16, 1 << (chunk_size - 1).bit_length())
    out = load_kernel()(x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), chunk_size, **options)
    return out if want_state else (out, None)


class GatedRMSNorm(nn.RMSNorm):
    """RMS norm over groups of channels, gated by silu(z): y, z (..., C) -> (..., C), in float32 or wider."""

    def forward(self, y: torch.Tensor, z: torch.Tensor, group_size: int, norm_before_gate: bool) -> torch.Tensor:
        work = _at_least_float32(y)
        y, gate = y.to(work), F.silu(z.to(work))
        groups = (y if norm_before_gate else y * gate).unflatten(-1, (-1, group_size))  # (..., G, C/G)
        y = F.rms_norm(groups, (group_size,), eps=self.eps).flatten(-2) * self.weight
        return y * gate if norm_before_gate else y


class Mamba2(nn.Module):
    """Mamba-2 block: u (B, T, d_model) -> (B, T, d_model), causal in T; `step` runs the same block token by token.

    Arguments are upstream's; use_mem_eff_path and layer_idx change nothing here. impl: auto | torch | mamba_ssm.
    chunk_size changes the speed, never the result: the kernels take it rounded up to a power of two, plain PyTorch
    takes min(chunk_size, 64) and spreads the chunks evenly over the sequence.
    dt_bias, A_log and D carry `_no_weight_decay = True` for the optimizer's parameter groups.
    Raises ValueError when headdim does not divide d_ssm, or ngroups the number of heads.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        impl: str = "auto",
    ):
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.d_mlp = self.d_inner - self.d_ssm
        self.nheads, self.xbc_dim = self.d_ssm // headdim, self.d_ssm + 2 * ngroups * d_state
        self.conv_init, self.A_init_range, self.norm_before_gate = conv_init, A_init_range, norm_before_gate
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        self.dt_limit, self.D_has_hdim, self.chunk_size, self.impl = tuple(dt_limit), D_has_hdim, chunk_size, impl
        self._check_arguments()
        factory = {"device": device, "dtype": dtype}
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **factory))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **factory))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))  # never half
        for p in (self.dt_bias, self.A_log, self.D):
            p._no_weight_decay = True
        # modules in upstream's order: it decides the state-dict order and what a seed draws
        self.in_proj = nn.Linear(d_model, self.d_inner + self.d_mlp + self.xbc_dim + self.nheads, bias, **factory)
        self.conv1d = nn.Conv1d(self.xbc_dim, self.xbc_dim, d_conv, groups=self.xbc_dim, bias=conv_bias, **factory)
        self.reset_parameters()
        self.norm = GatedRMSNorm(self.d_ssm, eps=1e-5, **factory) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias, **factory)

    def _check_arguments(self) -> None:
        if self.d_mlp < 0 or self.nheads < 1 or self.d_ssm % self.headdim or self.nheads % self.ngroups:
            sizes = f"d_inner {self.d_inner}, d_ssm {self.d_ssm}, headdim {self.headdim}, ngroups {self.ngroups}"
            raise ValueError(f"Mamba2: {sizes}: d_ssm <= d_inner, a multiple of headdim; heads a multiple of ngroups")
        if self.chunk_size < 1 or self.impl not in IMPLS:
            raise ValueError(f"Mamba2: chunk_size {self.chunk_size} must be >= 1 and impl {self.impl!r} one of {IMPLS}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw dt_bias, A_log and D (and the taps, with conv_init) as upstream does; modules inside draw their own."""
        if self.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -self.conv_init, self.conv_init)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = torch.exp(torch.rand_like(self.dt_bias) * (high - low) + low).clamp(min=self.dt_init_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*self.A_init_range).log())
        self.D.fill_(1.0)

    def forward(
        self,
        u: torch.Tensor,
        seq_idx: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
        return_final_state: bool = False,
    ):
        """u (B, T, d_model), any T >= 0 -> (B, T, d_model) in u's dtype; with return_final_state (out, state).

        seq_idx (B, T) integer: packed sequences, convolution and state restart where it changes. lengths (B,) int64:
        steps from there on are padding; they change nothing, and their output is 0. state = (conv_state, ssm_state):
        conv_state (B, d_ssm + 2 G N, k), the last k inputs of the convolution, oldest first, and ssm_state
        (B, H, P, N); with lengths, those after the last valid step. Passed back as initial_state the sequence goes on
        (its first segment, with seq_idx). Differentiable. Raises ValueError for shapes and lengths that do not fit.
        """
        valid = self._check_inputs(u, seq_idx, lengths, initial_state)
        impl = resolve_impl(self.impl, u.device, u.dtype)
        chunk_size = self.chunk_size if impl == "mamba_ssm" else min(self.chunk_size, TORCH_CHUNK)
        window, ssm_state = initial_state or (None, None)
        segment = None if seq_idx is None or u.shape[1] == 0 else number_segments(seq_idx, valid)
        # what padding holds, NaN perhaps, must not reach the gradients of in_proj either
        z0, x0, z, xBC, dt = self._project(u if valid is None else u.masked_fill(~valid[..., None], 0))
        before = xBC.new_zeros(len(u), self.d_conv, self.xbc_dim) if window is None else window.mT.to(xBC.dtype)
        rows = torch.cat([before, xBC], 1)  # (B, k+T, C)
        x, B, C = self._split_xbc(F.silu(self._convolve(rows, segment)))
        with torch.autocast(u.device.type, enabled=False):
            dt = discretise(dt, self.dt_bias, True, self.dt_limit)  # (B, T, H)
            dt = dt if valid is None else dt.masked_fill(~valid[..., None], 0)  # padding leaves the state as it is
            A, D = self._decay_and_skip()
            y, ssm_state = _scan(x, dt, A, B, C, D, ssm_state, segment, chunk_size, return_final_state, impl)
        out = self._gate_and_project(y.flatten(2), z0, x0, z).to(u.dtype)
        out = out if valid is None else out.masked_fill(~valid[..., None], 0)
        return (out, (self._last_inputs(rows, segment, lengths), ssm_state)) if return_final_state else out

    def step(self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor):
        """One token (B, 1, d_model) and the states before it -> (B, 1, d_model) and, as new tensors, those after it."""
        z0, x0, z, xBC, dt = self._project(hidden_states.squeeze(1))  # (B, ..)
        rows = torch.cat([conv_state.mT, xBC[:, None].to(conv_state.dtype)], 1)  # (B, k+1, xbc_dim)
        xBC = F.silu(self._convolve(rows, None))[:, 0]
        x, B, C = self._split_xbc(xBC.to(ssm_state.dtype))  # (B, H, P), (B, G, N), (B, G, N)
        with torch.autocast(xBC.device.type, enabled=False):
            dt = discretise(dt, self.dt_bias, True, self.dt_limit)  # (B, H)
            A, D = self._decay_and_skip()
            new = (x * dt[..., None]).unflatten(1, (self.ngroups, -1))[..., None] * B[
                :, :, None, None
            ]  # (B, G, R, P, N)
            ssm_state = ssm_state * torch.exp(dt * A)[..., None, None] + new.flatten(1, 2)  # (B, H, P, N)
            y = ssm_state.unflatten(1, (self.ngroups, -1)).flatten(2, 3) @ C[..., None]  # (B, G, R*P, 1)
            y = y.view_as(x) + x * (D if D.ndim == 2 else D[:, None])
        out = self._gate_and_project(y.flatten(1).to(z.dtype), z0, x0, z).to(hidden_states.dtype)
        return out[:, None], rows[:, 1:].mT, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 0, dtype: torch.dtype | None = None):
        """Zero conv_state (B, xbc_dim, k) and ssm_state (B, H, P, N), float32 or wider; max_seqlen changes nothing."""
        conv_state = self.conv1d.weight.new_zeros(batch_size, self.xbc_dim, self.d_conv, dtype=dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state, conv_state.new_zeros(shape, dtype=_at_least_float32(conv_state))

    def _check_inputs(self, u, seq_idx, lengths, initial_state) -> torch.Tensor | None:
        """Returns valid (B, T) bool, False at padding, or None without lengths."""
        b, T = u.shape[:2]
        conv_state, ssm_state = initial_state or (None, None)
        _check_shapes("Mamba2", u=(u, (b, T, self.d_model)), seq_idx=(seq_idx, (b, T)), lengths=(lengths, (b,)))
        _check_shapes("Mamba2", conv_state=(conv_state, (b, self.xbc_dim, self.d_conv)))
        _check_shapes("Mamba2", ssm_state=(ssm_state, (b, self.nheads, self.headdim, self.d_state)))
        if lengths is None:
            return None
        on_cpu = lengths.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a check would wait
        if on_cpu and b and not (0 <= lengths.min() and lengths.max() <= T):
            raise ValueError(f"Mamba2: lengths {lengths.tolist()} must lie in 0..{T}, the length of u")
        return torch.arange(T, device=u.device) < lengths.to(u.device)[:, None]

    def _project(self, u: torch.Tensor):
        """u (..., d_model) -> z0, x0 (..., d_mlp), z (..., d_ssm), xBC (..., d_ssm + 2 G N), dt (..., H)"""
        return self.in_proj(u).split([self.d_mlp, self.d_mlp, self.d_ssm, self.xbc_dim, self.nheads], dim=-1)

    def _split_xbc(self, xBC: torch.Tensor):
        """(..., d_ssm + 2 G N) -> x (..., H, P), B and C (..., G, N)"""
        x, B, C = xBC.split([self.d_ssm, self.ngroups * self.d_state, self.ngroups * self.d_state], dim=-1)
        return x.unflatten(-1, (-1, self.headdim)), *(t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))

    def _decay_and_skip(self):
        """A (H,) and D (H,) or (H, P), float32 or wider whatever the module's dtype: exp would round badly."""
        A = -torch.exp(self.A_log.to(_at_least_float32(self.A_log)))
        return A, self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D

    def _convolve(self, rows: torch.Tensor, segment: torch.Tensor | None) -> torch.Tensor:
        """Causal depthwise convolution: rows (B, k+T, C), the k inputs before first -> (B, T, C)."""
        weight, bias = self.conv1d.weight, self.conv1d.bias  # (C, 1, k), (C,)
        if segment is None:  # a channels-last image of height 1: no copy, and several times faster than conv1d
            image = rows.mT[:, :, None]  # (B, C, 1, k+T)
            return F.conv2d(image, weight[:, :, None], bias, groups=self.xbc_dim)[:, :, 0, 1:].mT
        T, k = segment.shape[1], self.d_conv
        owner = F.pad(segment, (k, 0))  # (B, k+T); what came before belongs to segment 0
        out = 0 if bias is None else bias
        for i in range(k):
            same = owner[:, i + 1 : i + 1 + T] == segment  # (B, T)
            out = out + rows[:, i + 1 : i + 1 + T].masked_fill(~same[..., None], 0) * weight[:, 0, i]
        return out.to(rows.dtype)

    def _last_inputs(self, rows, segment, lengths) -> torch.Tensor:
        """conv_state (B, C, k) of rows (B, k+T, C): the last k valid inputs, zero before the last segment's start."""
        k = self.d_conv
        if segment is not None:
            owner = F.pad(segment, (k, 0))
            rows = rows.masked_fill((owner != owner[:, -1:])[..., None], 0)
        if lengths is None:
            return rows[:, -k:].mT
        index = lengths.to(rows.device)[:, None] + torch.arange(k, device=rows.device)  # (B, k)
        return rows.gather(1, index[..., None].expand(-1, -1, self.xbc_dim)).mT

    def _gate_and_project(self, y, z0, x0, z) -> torch.Tensor:
        """y and z (..., d_ssm), z0 and x0 (..., d_mlp) -> (..., d_model)"""
        y = y * F.silu(z) if self.norm is None else self.norm(y, z, self.d_ssm // self.ngroups, self.norm_before_gate)
        if self.d_mlp > 0:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y.to(z.dtype))
