"""Learning rates of the caption literature as functions of the global step: no state, so nothing to call too late.

Every function returns the learning rate itself, never a factor of another rate. Steps count from 0: the first update
uses step 0, and no schedule is 0 there.
"""

import math

NAMES = ("noam", "rst", "cosine", "constant")
DEFAULTS = {"rst": 1e-4, "cosine": 4e-4, "constant": 5e-6}  # --lr where none is given; noam's follows from its width


def noam(step: int, dim: int = 512, warmup: int = 10_000, peak: float | None = None) -> float:
    """Rise to `peak` at step `warmup`, then 1 / sqrt.  Without peak: dim^-0.5 min(s^-0.5, s warmup^-1.5), s = step + 1,
    which is 4.42e-4 at its highest (M2, PureT)."""
    s = step + 1
    highest = (dim * warmup) ** -0.5 if peak is None else peak
    return highest * min((warmup / s) ** 0.5, s / warmup)


def rst(epoch: int, base: float = 1e-4) -> float:
    """By epoch, from 1: base e / 4 to epoch 3, base to 10, 0.2 base to 12, then 0.04 base (RSTNet)."""
    if epoch < 1:
        raise ValueError(f"rst: epoch {epoch}; they count from 1, and epoch 0 would have learning rate 0")
    return base * (epoch / 4 if epoch <= 3 else 1 if epoch <= 10 else 0.2 if epoch <= 12 else 0.04)


def cosine(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear rise from 1 % over `warmup` steps, then half a cosine that would reach 0 at `steps`."""
    if step < warmup:
        return peak * (0.01 + 0.99 * (step + 1) / warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def learning_rate(
    name: str, step: int, *, steps: int, per_epoch: int, lr: float | None, warmup: int, dim: int
) -> float:
    """Rate of the main group at `step` of `steps`, `per_epoch` steps an epoch; lr None is the schedule's own value."""
    if name == "noam":
        return noam(step, dim, max(1, warmup), lr)
    peak = DEFAULTS[name] if lr is None else lr
    if name == "rst":
        return rst(step // per_epoch + 1, peak)
    return cosine(step, steps, peak, warmup) if name == "cosine" else peak
