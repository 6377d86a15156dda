"""The inside of a Mamba2 block, from in_proj's output to out_proj's input, worked on in blocks of a few hundred steps,
with a hand-written backward pass. The numbers are those of the composition in models/mamba2.py, which is its reference.

Why it beats autograd over the reference, with the same matrix products: nothing of full length is allocated but what
the caller gets, pointwise passes find their operands in cache, decays are powers of 2 (exp2 takes a third of exp's
time), and the backward pass recomputes what is cheap. Saved for it, per step: in_proj's output and y.

Notation as in models/mamba2.py; d = H P channels, C = d + 2 G N. The t steps of a block are c chunks of Q, and
a_l = sum_{j<=l} dt_j A restarts in every chunk: exp(a_l - a_s) is the decay from after step s to after step l.
[Dao & Gu 2024, sec. 6 and 7]
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.ssd import no_autocast

BLOCK = 512  # steps, of all sequences of a block together: 1 MB for a temporary of width 512


class Sizes(NamedTuple):
    nheads: int
    headdim: int
    ngroups: int
    d_state: int
    chunk: int  # steps, at most
    dt_limit: tuple[float, float]
    eps: float


class Weights(NamedTuple):
    conv: torch.Tensor  # (C, 1, k)
    conv_bias: torch.Tensor | None  # (C,)
    dt_bias: torch.Tensor  # (H,)
    A: torch.Tensor  # (H,) negative
    D: torch.Tensor  # (d,)
    norm: torch.Tensor | None  # (d,)


def fused_core(
    zxbcdt: torch.Tensor,
    weights: Weights,
    window: torch.Tensor | None,
    state: torch.Tensor | None,
    valid: torch.Tensor | None,
    sizes: Sizes,
    want_state: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu(conv), step sizes, SSD scan, skip, gate and norm: zxbcdt (B, T, 2 d + 2 G N + H) -> out (B, T, d).

    window (B, k-1, C), the convolution's inputs before the first step, and state (B, H, P, N), None for zeros;
    valid (B, T) bool or None, False at padding; weights.norm None for the gate alone. T >= 1; float32 or float64.
    Returns out and, with want_state, the state after the last step, else None. First derivatives only.
    """
    if torch.is_grad_enabled():
        return _Core.apply(zxbcdt, *weights, window, state, valid, sizes, want_state)
    return _forward(zxbcdt, weights, window, state, valid, sizes, want_state)[:2]


def _forward(zxbcdt, w: Weights, window, state, valid, s: Sizes, want_state, y=None, entering=None):
    """fused_core's result, and what the last block computed, with which the backward pass begins.

    For that pass y (B, T, d) takes the scan's output, and the list entering the state before each block.
    """
    b, T = zxbcdt.shape[:2]
    out = zxbcdt.new_empty(b, T, s.nheads * s.headdim)
    end = zxbcdt.new_empty(b, s.nheads, s.headdim, s.d_state) if want_state else None
    for rows, start, stop, Q in _cut(b, T, s.chunk):
        if start == 0:
            carried = None if state is None else _by_group(state[rows], s)
        if entering is not None:
            entering.append(carried)
        block = _Block(zxbcdt[rows], start, stop, Q, _of(window, rows), _of(valid, rows), w, s, once=y is None)
        here = (rows, slice(start, stop))
        scanned = out[here] if y is None else y[here]
        carried = block.scan(carried, scanned, want_state or stop < T)
        block.gate_and_norm(scanned, out[here])
        if want_state and stop == T:
            end[rows] = _by_head(carried, s)
    return out, end, block.computed


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, zxbcdt, conv, conv_bias, dt_bias, A, D, norm, window, state, valid, s, want_state):
        w, entering = Weights(conv, conv_bias, dt_bias, A, D, norm), []
        y = zxbcdt.new_empty(*zxbcdt.shape[:2], s.nheads * s.headdim)
        out, end, computed = _forward(zxbcdt, w, window, state, valid, s, want_state, y, entering)
        ctx.s, ctx.computed = s, len(computed)
        ctx.save_for_backward(zxbcdt, *w, window, state, valid, y, *computed, *entering)
        return out, end

    @staticmethod
    def backward(ctx, dout, dend):
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("Mamba2: the CPU path has first derivatives only; use Mamba2(impl='reference')")
        with no_autocast(dout.device.type):
            return _Core._backward(ctx, dout, dend)

    @staticmethod
    def _backward(ctx, dout, dend):
        saved = ctx.saved_tensors  # once: unpacking may mean computing again
        inputs = 5 + len(Weights._fields)
        zxbcdt, *w, window, state, valid, y = saved[:inputs]
        computed, entering = saved[inputs : inputs + ctx.computed], saved[inputs + ctx.computed :]
        w, s, T = Weights(*w), ctx.s, zxbcdt.shape[1]
        dzxbcdt = torch.empty_like(zxbcdt)
        dw = Weights(*(None if t is None else torch.zeros_like(t) for t in w))
        dwindow = None if window is None else torch.empty_like(window)
        dstate = None if state is None else torch.empty_like(state)
        blocks = _cut(len(zxbcdt), T, s.chunk)
        for (rows, start, stop, Q), carried in zip(reversed(blocks), reversed(entering), strict=True):
            if stop == T:
                dcarried = None if dend is None else _by_group(dend[rows], s)
                dbefore = None
            block = _Block(zxbcdt[rows], start, stop, Q, _of(window, rows), _of(valid, rows), w, s, computed)
            computed = None
            here = (rows, slice(start, stop))
            dcarried, dbefore = block.backward(carried, y[here], dout[here], dcarried, dbefore, dzxbcdt[here], dw)
            if start == 0 and window is not None:
                dwindow[rows] = dbefore
            if start == 0 and state is not None:
                dstate[rows] = _by_head(dcarried, s)
        return dzxbcdt, *dw, dwindow, dstate, None, None, None


def _cut(b: int, T: int, chunk: int) -> list[tuple[slice, int, int, int]]:
    """(sequences, start, stop, Q) of each block, in the order of the recurrence; stop - start is a multiple of Q."""
    Q = math.ceil(T / math.ceil(T / chunk))
    whole, together, length = T // Q * Q, max(1, BLOCK // T), max(1, BLOCK // Q) * Q
    blocks = []
    for first in range(0, b, together):
        rows = slice(first, min(first + together, b))
        blocks += [(rows, start, min(start + length, whole), Q) for start in range(0, whole, length)]
        if whole < T:
            blocks.append((rows, whole, T, T - whole))
    return blocks


def _of(t: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if t is None else t[rows]


def _by_group(state: torch.Tensor, s: Sizes) -> torch.Tensor:
    """(b, H, P, N) -> (b G, N, R, P), the layout of the matrix products"""
    return state.unflatten(1, (s.ngroups, -1)).permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()


def _by_head(state: torch.Tensor, s: Sizes) -> torch.Tensor:
    """(b G, N, R, P) -> (b, H, P, N)"""
    return state.permute(0, 2, 3, 1).reshape(-1, s.nheads, s.headdim, s.d_state)


class _Block:
    """Steps start..stop of some sequences: what their forward and backward pass both need.

    c chunks of b sequences lie in the order (c, b) in memory, then groups or heads: n = c b products at a time. hf marks
    a tensor or view (c, b, H, Q, ..), heads first; gf one of (c, b, G, Q, R, ..), where the heads of a group share a row.
    """

    def __init__(self, zxbcdt, start, stop, Q, window, valid, w: Weights, s: Sizes, computed=None, once=False):
        """computed: the tensors of that name of an earlier block of the same steps, to save their computation.
        once: no backward pass will follow, so what is not needed again is overwritten."""
        self.w, self.s, self.valid = w, s, None if valid is None else valid[:, start:stop, None]
        b, H, P, G, N = len(zxbcdt), s.nheads, s.headdim, s.ngroups, s.d_state
        d, c, R = H * P, (stop - start) // Q, H // G
        self.shape = b, c, Q, H, P, G, R, N
        self.z, xBC, dt = zxbcdt[:, start:stop].split([d, d + 2 * G * N, H], -1)
        if computed is None:
            before = _inputs_before(zxbcdt[..., d:-H], start, window, w.conv.shape[-1])
            rows = xBC if before is None else torch.cat([before, xBC], 1)  # (b, k-1+t, C)
            conv = depthwise(rows, w.conv, w.conv_bias)  # (b, t, C)
            computed = rows, conv, F.silu(conv, inplace=once), *self._step_sizes(dt)
        self.rows, self.conv, act, self.raw_dt, dt, self.within, self.entering = computed[:7]
        x, B, C = act.view(b, c, Q, -1).split([d, G * N, G * N], -1)
        self.x_hf = x.view(b, c, Q, H, P).permute(1, 0, 3, 2, 4)
        self.B, self.C = (m.view(b, c, Q, G, N).permute(1, 0, 3, 2, 4).reshape(-1, Q, N) for m in (B, C))  # (n G, Q, N)
        self.dt_hf = dt.view(b, c, Q, H).permute(1, 0, 3, 2)
        self.leaving = self.within[..., -1, :]  # (c, b, H, Q), from after step s to the chunk's end
        self.through = self.entering[..., -1].view(c, b * G, 1, R, 1)
        self.computed = computed if len(computed) > 7 else (*computed, *self._mix())
        self.scores, self.mixing, self.xdt = self.computed[7:]

    def _step_sizes(self, dt):
        """dt (b, t, H) before the bias -> with it, and final; decays within the chunks and from before them."""
        b, c, Q, H, *_ = self.shape
        raw_dt = dt + self.w.dt_bias  # (b, t, H)
        dt = F.softplus(raw_dt)
        dt = dt if self.s.dt_limit == (0.0, math.inf) else dt.clamp(*self.s.dt_limit)
        dt = dt if self.valid is None else dt * self.valid
        # logarithms of decays in float64, since only differences of these sums may be rounded to float32
        rate = self.w.A.double()[:, None] / math.log(2)  # exp(a) = exp2(a / ln 2)
        a = torch.mul(dt.view(b, c, Q, H).permute(1, 0, 3, 2), rate, out=rate.new_empty(c, b, H, Q)).cumsum_(-1)
        between = (a[..., :, None] - a[..., None, :]).to(dt.dtype)
        within = between.clamp_(max=0).exp2_()  # (c, b, H, Q, Q), from after step s to after step l >= s
        return raw_dt, dt, within, a.exp2_().to(dt.dtype)  # (c, b, H, Q), from before the chunk to after step l

    def _mix(self):
        """C B^T for s <= l, one per group: (n G, 1, Q, Q); M, that times the decay: (n H, Q, Q); dt x, hf"""
        b, c, Q, H, P, G, R, N = self.shape
        scores = torch.bmm(self.C, self.B.mT).tril_().view(-1, 1, Q, Q)
        mixing = (self.within.view(-1, R, Q, Q) * scores).view(-1, Q, Q)
        xdt = self.within.new_empty(c, b, H, Q, P)
        return scores, mixing, torch.mul(self.x_hf, self.dt_hf[..., None], out=xdt)

    def heads_first(self, m: torch.Tensor) -> torch.Tensor:
        """(b, t, d) -> (c, b, H, Q, P), a view"""
        b, c, Q, H, P, *_ = self.shape
        return m.view(b, c, Q, H, P).permute(1, 0, 3, 2, 4)

    def groups_first(self, m: torch.Tensor) -> torch.Tensor:
        """hf (c, b, H, Q, X) -> gf (c, b, G, Q, R, X), a view; so is (b, t, d) by way of heads_first"""
        b, c, Q, H, P, G, R, N = self.shape
        return m.unflatten(2, (G, R)).transpose(3, 4)

    def keep(self) -> torch.Tensor:
        """What of dt x is left at the chunks' ends: gf (c, b, G, Q, R, P)"""
        b, c, Q, H, P, G, R, N = self.shape
        kept = self.xdt.new_empty(c, b, G, Q, R, P)
        return torch.mul(self.groups_first(self.xdt), self.groups_first(self.leaving[..., None]), out=kept)

    def states(self, carried, kept, count) -> torch.Tensor:
        """The states that enter the first `count` chunks, chunk 0 included: (count, b G, N, R, P); [0] is carried."""
        b, c, Q, H, P, G, R, N = self.shape
        states = kept.new_empty(count, b * G, N, R, P)
        n = (count - 1) * b * G
        torch.bmm(self.B[:n].mT, kept.view(-1, Q, R * P)[:n], out=states[1:].view(n, N, R * P))
        each = states.unbind(0)
        if carried is not None:
            each[0].copy_(carried)
        for i in range(0 if carried is not None else 1, count - 1):
            each[i + 1].addcmul_(each[i], self.through[i])
        return states

    def scan(self, carried, y, want_state) -> torch.Tensor | None:
        """Writes y (b, t, d), skip included. Returns the state (b G, N, R, P) after the block if it is wanted."""
        b, c, Q, H, P, G, R, N = self.shape
        inside = torch.bmm(self.mixing, self.xdt.view(-1, Q, P)).view(c, b, H, Q, P)
        y_hf = self.heads_first(y)
        torch.addcmul(inside, self.x_hf, self.w.D.view(H, 1, P), out=y_hf)
        first = 1 if carried is None else 0  # chunk that a state enters
        if first == c and not want_state:
            return None
        states = self.states(carried, self.keep(), c + want_state)
        if first < c:
            given = torch.bmm(self.C[first * b * G :], states[first:c].view(-1, N, R * P))
            given = given.view(-1, b, G, Q, R, P)
            self.groups_first(y_hf)[first:].addcmul_(given, self.groups_first(self.entering[..., None])[first:])
        return states[-1].clone() if want_state else None

    def gate_and_norm(self, y, out) -> None:
        """y, out (b, t, d), which may be one tensor"""
        torch.mul(y, F.silu(self.z), out=out)
        if self.w.norm is not None:
            groups = out.view(*out.shape[:2], self.s.ngroups, -1)
            groups.mul_(self._norm_scale(groups))
            out.mul_(self.w.norm)

    def _norm_scale(self, groups):
        """(b, t, G, d/G) -> (b, t, G, 1), 1 / root mean square"""
        size = groups.shape[-1]
        square = torch.linalg.vector_norm(groups, dim=-1, keepdim=True).square_()
        return square.add_(self.s.eps * size).rsqrt_().mul_(math.sqrt(size))

    def backward(self, carried, y, dout, dcarried, dafter, dzxbcdt, dw: Weights):
        """Gradients of one block: writes dzxbcdt (b, t, ..) and adds to dw.

        dcarried: of the state after the block, dafter: of the last k-1 inputs of its convolution through later blocks,
        each None for zero. Returns the same two for the state and the k-1 inputs before the block.
        """
        b, c, Q, H, P, G, R, N = self.shape
        d = H * P
        dz, dxBC, draw_dt = dzxbcdt.split([d, d + 2 * G * N, H], -1)
        dy = self._gate_and_norm_backward(y, dout, dz, dw)  # (b, t, d)
        dy_hf = self.heads_first(dy)
        dxdt, dB, dC, da = self._inside_backward(dy_hf)
        dcarried = self._states_backward(carried, dcarried, dy_hf, dxdt, dB, dC, da)
        draw_dt.copy_(self._step_sizes_backward(dxdt, da, dw))
        dw.dt_bias.add_(draw_dt.sum((0, 1)))
        # x, B, C: side by side, then through silu and convolution
        dact = torch.empty_like(self.conv)
        dx, *dBC = dact.view(b, c, Q, -1).split([d, G * N, G * N], -1)
        dx, dy, x = dx.view(b, c, Q, H, P), dy.view(b, c, Q, H, P), self.x_hf.permute(1, 0, 3, 2, 4)
        torch.mul(dxdt, self.dt_hf[..., None], out=dx.permute(1, 0, 3, 2, 4))
        dx.addcmul_(dy, self.w.D.view(H, P))
        dw.D.add_((dy * x).sum((0, 1, 2)).flatten())
        for side, grad in zip(dBC, (dB, dC), strict=True):
            side.view(b, c, Q, G, N).copy_(grad.view(c, b, G, Q, N).permute(1, 0, 3, 2, 4))
        torch.ops.aten.silu_backward.grad_input(dact, self.conv, grad_input=dact)
        drows = self._depthwise_backward(dact, dw)  # (b, k-1+t, C)
        if dafter is not None:
            drows[:, c * Q :] += dafter
        before = drows.shape[1] - c * Q
        dxBC.copy_(drows[:, before:])
        return dcarried, drows[:, :before]

    def _inside_backward(self, dy_hf):
        """Inside the chunks: dy hf -> gradients of dt x hf, B and C (n G, Q, N), and a (c, b, H, Q) float64"""
        b, c, Q, H, P, G, R, N = self.shape
        dys = torch.empty_like(self.xdt).copy_(dy_hf).view(-1, Q, P)
        dmixing = torch.bmm(dys, self.xdt.view(-1, Q, P).mT)  # (n H, Q, Q)
        dxdt = torch.bmm(self.mixing.mT, dys).view(c, b, H, Q, P)
        dmixing = dmixing.mul_(self.within.view(-1, Q, Q)).view(-1, R, Q, Q)
        dscores = dmixing.sum(1).tril_()  # (n G, Q, Q)
        dC, dB = torch.bmm(dscores, self.B), torch.bmm(dscores.mT, self.C)
        exact = dmixing.mul_(self.scores).double()  # of log(within); its rows and columns cancel
        return dxdt, dB, dC, (exact.sum(-1) - exact.sum(-2)).view(c, b, H, Q)

    def _states_backward(self, carried, dcarried, dy_hf, dxdt, dB, dC, da):
        """Through the states: adds to dxdt, dB, dC, da; returns the gradient of the state before the block."""
        b, c, Q, H, P, G, R, N = self.shape
        # chunks first.. are entered by a state that is not zero, the state after chunks ..last - 1 has a gradient
        first, last = (0 if carried is not None else 1), (c if dcarried is not None else c - 1)
        if first == c and last == 0:
            return None
        kept = self.keep()
        states = self.states(carried, kept, c)
        dstates = kept.new_empty(c + 1, b * G, N, R, P)  # of the states that enter the chunks, and of the one after
        each = dstates.unbind(0)
        if dcarried is not None:
            each[c].copy_(dcarried)
        one, two, flat = first * b * G, last * b * G, (-1, N, R * P)
        if first < c:
            dgiven = kept.new_empty(c - first, b, G, Q, R, P)
            entering = self.groups_first(self.entering[..., None])[first:]
            dgiven = torch.mul(self.groups_first(dy_hf)[first:], entering, out=dgiven).view(-1, Q, R * P)
            torch.bmm(self.C[one:].mT, dgiven, out=dstates[first:c].view(flat))
            entered = states[first:].view(flat)
            dC[one:].baddbmm_(dgiven, entered.mT)
            da[first:] += self._sum_channels(torch.bmm(self.C[one:], entered).mul_(dgiven))
        for i in range(last - 1, first - 1, -1):
            each[i].addcmul_(each[i + 1], self.through[i])
        if last > 0:
            dleft = dstates[1 : last + 1].view(flat)
            dB[:two].baddbmm_(kept.view(-1, Q, R * P)[:two], dleft.mT)
            dkept = torch.bmm(self.B[:two], dleft).view(last, b, G, Q, R, P)
            self.groups_first(dxdt)[:last].addcmul_(dkept, self.groups_first(self.leaving[..., None])[:last])
            dleaving = self._sum_channels(dkept.mul_(kept[:last]))  # (last, b, H, Q)
            da[:last] -= dleaving
            da[:last, ..., -1] += dleaving.sum(-1)
        if first < last:
            dthrough = (states[first:last] * dstates[first + 1 : last + 1]).sum((2, 4))
            da[first:last, ..., -1] += dthrough.mul_(self.through[first:last, :, 0, :, 0]).view(-1, b, H)
        return None if carried is None else each[0].clone()

    def _step_sizes_backward(self, dxdt, da, dw: Weights):
        """Adds to dw.A; returns the gradient of dt before the bias (b, t, H)."""
        b, c, Q, H, *_ = self.shape
        dsteps = da.flip(-1).cumsum(-1).flip(-1)  # (c, b, H, Q), of dt A
        dw.A.add_((dsteps * self.dt_hf).sum((0, 1, 3)))
        ddt = (dxdt * self.x_hf).sum(-1) + dsteps * self.w.A[:, None]
        ddt = ddt.permute(1, 0, 3, 2).reshape(b, c * Q, H) * self.raw_dt.sigmoid()
        low, high = self.s.dt_limit
        if (low, high) != (0.0, math.inf):
            softplus = F.softplus(self.raw_dt)
            ddt = ddt * ((softplus >= low) & (softplus <= high))
        return ddt if self.valid is None else ddt * self.valid

    def _sum_channels(self, m: torch.Tensor) -> torch.Tensor:
        """(m b G, Q, R P) or gf -> (.., b, H, Q) float64: the sum over the channels of a head"""
        b, c, Q, H, P, G, R, N = self.shape
        return m.view(-1, b, G, Q, R, P).sum(-1).transpose(3, 4).flatten(2, 3).double()

    def _gate_and_norm_backward(self, y, dout, dz, dw: Weights) -> torch.Tensor:
        """Writes dz (b, t, d), adds to dw.norm, returns dy (b, t, d)."""
        gate = F.silu(self.z)
        if self.w.norm is not None:
            grouped = (*y.shape[:2], self.s.ngroups, -1)
            normed = (y * gate).view(grouped)  # (b, t, G, d/G)
            scale = self._norm_scale(normed)
            normed.mul_(scale)
            weighted = dout * normed.view_as(dout)
            dw.norm.add_(weighted.sum((0, 1)))
            shared = weighted.mul_(self.w.norm).view(grouped).mean(-1, keepdim=True)
            dout = (dout * self.w.norm).view(grouped)
            dout = dout.addcmul_(normed, shared, value=-1).mul_(scale).view(y.shape)
        torch.ops.aten.silu_backward.grad_input(dout * y, self.z, grad_input=dz)
        return gate.mul_(dout)

    def _depthwise_backward(self, dconv, dw: Weights) -> torch.Tensor:
        """dconv (b, t, C): adds to dw.conv and dw.conv_bias, returns that of the convolution's inputs (b, k-1+t, C)."""
        t, k = dconv.shape[1], self.w.conv.shape[-1]
        if dw.conv_bias is not None:
            dw.conv_bias.add_(dconv.sum((0, 1)))
        taps = [(dconv * self.rows[:, tap : tap + t]).sum((0, 1)) for tap in range(k)]
        dw.conv.add_(torch.stack(taps, 1)[:, None])
        return depthwise(F.pad(dconv, (0, 0, k - 1, k - 1)), self.w.conv.flip(-1), None)


def _inputs_before(xBC, start, window, k) -> torch.Tensor | None:
    """The k-1 inputs of the convolution before step `start`: (b, k-1, C)"""
    if k == 1:
        return None
    if start >= k - 1:
        return xBC[:, start - k + 1 : start]
    window = xBC.new_zeros(len(xBC), k - 1, xBC.shape[-1]) if window is None else window
    return torch.cat([window, xBC[:, :start]], 1)[:, 1 - k :]


def depthwise(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Depthwise convolution of rows (b, k-1+t, C) with weight (C, 1, k) -> (b, t, C)

    A channels-last image of height 1: no copy, and several times faster than conv1d.
    """
    return F.conv2d(rows.mT[:, :, None], weight[:, :, None], bias, groups=len(weight))[:, :, 0].mT.contiguous()
