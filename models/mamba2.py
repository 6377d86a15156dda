"""Mamba-2 in plain PyTorch: a drop-in for mamba_ssm's `Mamba2` that runs, trains and streams on any device.

Which implementation (`impl`) runs when; the numbers are the same, to rounding:

    torch      the default wherever the CUDA kernels are missing. On CPUs, in float32 and float64, the inside of the
               block is models/mamba2_fused.py: up to 1.4 times the speed of `reference` and a third of its memory. It
               is `reference` for packed sequences, norm_before_gate, d_ssm < d_inner, autocast and half precision, on
               other devices, and under torch.compile, export, jit.trace and torch.func.
    reference  autograd over the operations as they are written below: to read, and for second derivatives
    mamba_ssm  mamba_ssm's Triton kernels: NVIDIA, float32 and lower; torch.compile leaves them out of its graph
    auto       mamba_ssm where it can run, else torch

On CPUs long inputs are worked on in blocks of 1024 steps when no gradient is wanted (not with seq_idx), so the memory of
inference is that of its input and output; `checkpoint_blocks` does it in training, where each block is computed again.
Shapes: B batch, T time, D model width, H heads, P channels of a head (headdim), G groups, N state size (d_state),
k taps of the convolution (d_conv), C = d_ssm + 2 G N its channels. Recurrence: models/ssd.py.
Parity: state-spaces/mamba mamba_ssm/modules/mamba2.py@e9594ce: argument and parameter names, shapes, numbers and
initialisation; state dicts load with strict=True both ways, and into transformers' Mamba2Mixer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.mamba2_fused import Sizes, Weights, fused_core
from models.ssd import (
    IMPLS,
    NO_LIMIT,
    TORCH_CHUNK,
    WIDE,
    check_shapes,
    discretise,
    no_autocast,
    number_segments,
    resolve_impl,
    scan,
    widen,
)
from models.ssd import describe_impl as describe_impl
from models.ssd import ssd_scan as ssd_scan

BLOCK_STEPS = 1024  # of the whole batch together, worked on at a time without gradients or with checkpoint_blocks


def _being_recorded() -> bool:
    """torch.compile, export, jit.trace or a transform of torch.func is looking: plain operations only."""
    transformed = torch._C._are_functorch_transforms_active()
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed


class GatedRMSNorm(nn.RMSNorm):
    """RMS norm over groups of channels, gated by silu(z): y, z (..., C) -> (..., C), in float32 or wider."""

    def forward(self, y: torch.Tensor, z: torch.Tensor, group_size: int, norm_before_gate: bool) -> torch.Tensor:
        y, gate, weight = widen(y), F.silu(widen(z)), widen(self.weight)
        y = y if norm_before_gate else y * gate
        if group_size == y.shape[-1]:
            y = torch.rms_norm(y, (group_size,), weight, self.eps)
        else:
            groups = y.view(*y.shape[:-1], y.shape[-1] // group_size, group_size)  # (..., G, C/G)
            y = F.rms_norm(groups, (group_size,), eps=self.eps).view_as(y) * weight
        return y * gate if norm_before_gate else y


class Mamba2(nn.Module):
    """Mamba-2 block: u (B, T, d_model) -> (B, T, d_model), causal in T; `step` runs the same block token by token.

    Arguments are upstream's; use_mem_eff_path and layer_idx change nothing here. impl: see the top of this file.
    chunk_size changes the speed, never the result: the kernels take it rounded up to a power of two, plain PyTorch
    takes min(chunk_size, 64) and spreads the chunks evenly over the sequence. checkpoint_blocks: train in blocks of
    1024 steps that the backward pass computes again, a seventh of the memory for a third more time (not with seq_idx).
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
        checkpoint_blocks: bool = False,
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
        self.checkpoint_blocks = checkpoint_blocks
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
        # what padding holds, NaN perhaps, must not reach the gradients of in_proj either
        u = u if valid is None else u.masked_fill(~valid[..., None], 0)
        out, state = self._run(u, valid, seq_idx, initial_state, return_final_state)
        out = out if valid is None else out.masked_fill(~valid[..., None], 0)
        return (out, state) if return_final_state else out

    def _run(self, u, valid, seq_idx, state, want_state):
        """Whole, or block by block with the state carried. Returns (out, state), state None unless want_state."""
        fused, training = self._can_fuse(u, seq_idx), torch.is_grad_enabled()
        run = self._run_fused if fused else self._run_reference
        in_blocks = self.checkpoint_blocks if training else u.device.type == "cpu" and not _being_recorded()
        if not in_blocks or seq_idx is not None:
            return run(u, valid, seq_idx, state, want_state)
        T, steps = u.shape[1], max(TORCH_CHUNK, BLOCK_STEPS // max(1, len(u)) // TORCH_CHUNK * TORCH_CHUNK)
        if T <= steps:
            return run(u, valid, seq_idx, state, want_state)
        out = None if training else torch.empty_like(u)
        outs = []
        for start in range(0, T, steps):
            here = slice(start, min(start + steps, T))
            args = (u[:, here], None if valid is None else valid[:, here], None, state, want_state or start + steps < T)
            if training:
                part, state = checkpoint(run, *args, use_reentrant=False)
                outs.append(part)
            else:
                out[:, here], state = run(*args)
        return (torch.cat(outs, 1) if training else out), state

    def _can_fuse(self, u, seq_idx) -> bool:
        by_gate = self.d_mlp == 0 and (self.norm is None or not self.norm_before_gate)
        exact = u.dtype in WIDE and not torch.is_autocast_enabled(u.device.type)
        here = u.device.type == "cpu" and u.numel() > 0 and seq_idx is None and not _being_recorded()
        return by_gate and exact and here and resolve_impl(self.impl, u.device, u.dtype) == "torch"

    def _run_fused(self, u, valid, seq_idx, state, want_state):
        """One hand-written function between the projections: models/mamba2_fused.py."""
        conv_state, ssm_state = state or (None, None)
        zxbcdt = self.in_proj(u)  # (B, T, 2 d_ssm + 2 G N + H)
        A = self.decay_rate()
        D = self.D if self.D_has_hdim else self.D.repeat_interleave(self.headdim)  # (d_ssm,)
        norm, eps = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.eps)
        weights = Weights(self.conv1d.weight, self.conv1d.bias, self.dt_bias, A, D.to(A), norm)
        chunk = min(self.chunk_size, TORCH_CHUNK)
        sizes = Sizes(self.nheads, self.headdim, self.ngroups, self.d_state, chunk, self.dt_limit, eps)
        window = None if conv_state is None else conv_state[..., 1:].mT.to(zxbcdt)  # (B, k-1, C)
        ssm_state = None if ssm_state is None else ssm_state.to(zxbcdt)
        y, ssm_state = fused_core(zxbcdt, weights, window, ssm_state, valid, sizes, want_state)
        out = self.out_proj(y)
        if not want_state:
            return out, None
        xBC = zxbcdt[..., self.d_ssm : -self.nheads]
        rows = self._with_inputs_before(xBC if valid is not None else xBC[:, -self.d_conv :], conv_state)
        return out, (self._last_inputs(rows, None, valid), ssm_state)

    def _run_reference(self, u, valid, seq_idx, state, want_state):
        """The block as it is written: projection, convolution, scan, gate and norm, projection."""
        impl = resolve_impl(self.impl, u.device, u.dtype)
        chunk_size = self.chunk_size if impl == "mamba_ssm" else min(self.chunk_size, TORCH_CHUNK)
        conv_state, ssm_state = state or (None, None)
        segment = None if seq_idx is None or u.shape[1] == 0 else number_segments(seq_idx, valid)
        z0, x0, z, xBC, dt = self._project(u)
        # the kernels take x, B, C in autocast's dtype; here everything up to the gate is float32 or wider
        rows = self._with_inputs_before(xBC if impl == "mamba_ssm" else widen(xBC), conv_state)
        with no_autocast(u.device.type):
            x, B, C = self._split_xbc(F.silu(self._convolve(rows, segment)))
            dt = discretise(dt, self.dt_bias, True, self.dt_limit)  # (B, T, H)
            dt = dt if valid is None else dt.masked_fill(~valid[..., None], 0)  # padding leaves the state as it is
            D = self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D
            y, ssm_state = scan(x, dt, self.decay_rate(), B, C, D, ssm_state, segment, chunk_size, want_state, impl)
        out = self._gate_and_project(y.flatten(2), z0, x0, z).to(u.dtype)
        return out, (self._last_inputs(rows, segment, valid), ssm_state) if want_state else None

    def _with_inputs_before(self, xBC, conv_state) -> torch.Tensor:
        """(B, t, C) -> (B, k+t, C): the k inputs of the convolution before, then xBC"""
        before = xBC.new_zeros(xBC.shape[0], self.d_conv, self.xbc_dim) if conv_state is None else conv_state.mT
        return torch.cat([before.to(xBC.dtype), xBC], 1)

    def step(self, hidden_states: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor):
        """One token (B, 1, d_model) and the states before it -> (B, 1, d_model) and, as new tensors, those after it."""
        # at one token the number of operations is what costs, beside reading the weights
        b, G, H, P, N, conv = hidden_states.shape[0], self.ngroups, self.nheads, self.headdim, self.d_state, self.conv1d
        z0, x0, z, xBC, dt = self._project(hidden_states)  # (B, 1, ..)
        conv_state = torch.cat([conv_state[..., 1:], xBC.mT.to(conv_state)], 2)  # (B, C, k)
        # products and sums keep float32 under autocast; a call of conv1d would take five times longer to set up
        xBC = (conv_state * conv.weight[:, 0]).sum(-1)  # (B, C)
        xBC = F.silu(xBC if conv.bias is None else xBC + conv.bias)
        x, B, C = xBC.split([self.d_ssm, G * N, G * N], -1)
        dt = discretise(dt, self.dt_bias, True, self.dt_limit)  # (B, 1, H)
        decay = torch.exp(dt * self.decay_rate()).view(b, H, 1, 1)
        x, D = x.view(b, H, P), self.D.view(H, -1)
        new = (x * dt.view(b, H, 1)).view(b, G, H // G, P, 1) * B.view(b, G, 1, 1, N)  # (B, G, R, P, N)
        ssm_state = torch.addcmul(new.view(b, H, P, N), ssm_state, decay)
        y = (ssm_state.view(b, G, H // G * P, N) * C.view(b, G, 1, N)).sum(-1)  # (B, G, R P)
        y = torch.addcmul(y.view(b, H, P), x, D).view(b, 1, H * P)
        out = self._gate_and_project(y, z0, x0, z)
        return out.to(hidden_states), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int = 0, dtype: torch.dtype | None = None):
        """Zero conv_state (B, xbc_dim, k) and ssm_state (B, H, P, N), float32 or wider; max_seqlen changes nothing."""
        conv_state = self.conv1d.weight.new_zeros(batch_size, self.xbc_dim, self.d_conv, dtype=dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state, widen(conv_state.new_zeros(shape))

    def _check_inputs(self, u, seq_idx, lengths, initial_state) -> torch.Tensor | None:
        """Returns valid (B, T) bool, False at padding, or None without lengths."""
        b, T = u.shape[:2]
        conv_state, ssm_state = initial_state or (None, None)
        check_shapes("Mamba2", u=(u, (b, T, self.d_model)), seq_idx=(seq_idx, (b, T)), lengths=(lengths, (b,)))
        check_shapes("Mamba2", conv_state=(conv_state, (b, self.xbc_dim, self.d_conv)))
        check_shapes("Mamba2", ssm_state=(ssm_state, (b, self.nheads, self.headdim, self.d_state)))
        if lengths is None:
            return None
        on_cpu = lengths.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a check would wait
        if on_cpu and b and not (0 <= lengths.min() and lengths.max() <= T):
            raise ValueError(f"Mamba2: lengths {lengths.tolist()} must lie in 0..{T}, the length of u")
        return torch.arange(T, device=u.device) < lengths.to(u.device)[:, None]

    def _project(self, u: torch.Tensor):
        """u (..., d_model) -> z0, x0 (..., d_mlp) or None, z (..., d_ssm), xBC (..., d_ssm + 2 G N), dt (..., H)"""
        zxbcdt, mlp, rest = self.in_proj(u), [self.d_mlp, self.d_mlp], [self.d_ssm, self.xbc_dim, self.nheads]
        return zxbcdt.split(mlp + rest, dim=-1) if self.d_mlp else (None, None, *zxbcdt.split(rest, dim=-1))

    def _split_xbc(self, xBC: torch.Tensor):
        """(..., d_ssm + 2 G N) -> x (..., H, P), B and C (..., G, N)"""
        x, B, C = xBC.split([self.d_ssm, self.ngroups * self.d_state, self.ngroups * self.d_state], dim=-1)
        return x.unflatten(-1, (-1, self.headdim)), *(t.unflatten(-1, (self.ngroups, -1)) for t in (B, C))

    def decay_rate(self) -> torch.Tensor:
        """A (H,), negative; float32 or wider whatever the module's dtype: exp would round badly."""
        return -torch.exp(widen(self.A_log))

    def _convolve(self, rows: torch.Tensor, segment: torch.Tensor | None) -> torch.Tensor:
        """Causal depthwise convolution: rows (B, k+T, C), the k inputs before first -> (B, T, C)."""
        weight = self.conv1d.weight.to(rows.dtype)  # (C, 1, k)
        bias = None if self.conv1d.bias is None else self.conv1d.bias.to(rows.dtype)  # (C,)
        if segment is None:  # a channels-last image of height 1: no copy, and several times faster than conv1d
            image = rows.mT[:, :, None]  # (B, C, 1, k+T)
            return F.conv2d(image, weight[:, :, None], bias, groups=self.xbc_dim)[:, :, 0, 1:].mT
        T, k = segment.shape[1], self.d_conv
        owner = F.pad(segment, (k, 0))  # (B, k+T); what came before belongs to segment 0
        out = 0 if bias is None else bias
        for i in range(k):
            same = owner[:, i + 1 : i + 1 + T] == segment  # (B, T)
            out = out + rows[:, i + 1 : i + 1 + T].masked_fill(~same[..., None], 0) * weight[:, 0, i]
        return out

    def _last_inputs(self, rows, segment, valid) -> torch.Tensor:
        """conv_state (B, C, k) of rows (B, k+T, C): the last k valid inputs, zero before the last segment's start."""
        k = self.d_conv
        if segment is not None:
            owner = F.pad(segment, (k, 0))
            rows = rows.masked_fill((owner != owner[:, -1:])[..., None], 0)
        if valid is None:
            return rows[:, -k:].mT
        index = valid.sum(1)[:, None] + torch.arange(k, device=rows.device)  # (B, k)
        return rows.gather(1, index[..., None].expand(-1, -1, self.xbc_dim)).mT

    def _gate_and_project(self, y, z0, x0, z) -> torch.Tensor:
        """y and z (..., d_ssm), z0 and x0 (..., d_mlp) -> (..., d_model)"""
        y = y * F.silu(z) if self.norm is None else self.norm(y, z, self.d_ssm // self.ngroups, self.norm_before_gate)
        if self.d_mlp > 0:
            y = torch.cat([F.silu(z0) * x0, y], -1)
        return self.out_proj(y.to(z))
