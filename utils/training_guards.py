"""Guards against trainings that go wrong in silence: no learning rate, no change, no progress, NaN, no end.

Each stands for a recorded failure of a caption training (README, "What differs from the original notes").
"""

import math
from pathlib import Path

import torch

from utils.run import UserError

HIGHEST_RATE = 1e-2  # of Adam on a transformer; what lies above was a multiplier taken for a rate


def check_rate(rate: float, step: int) -> float:
    """The rate itself. UserError unless 0 < rate <= 1e-2."""
    if not 0 < rate <= HIGHEST_RATE:
        raise UserError(
            f"step {step}: learning rate {rate:g} is outside (0, {HIGHEST_RATE}]; "
            "nothing would be learned, or everything lost; check --lr, --schedule and --warmup"
        )
    return rate


def check_changed(before: list[torch.Tensor], after: list[torch.Tensor], step: int) -> None:
    """UserError when an optimizer step changed no trainable tensor at all."""
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise UserError(f"step {step}: the optimizer changed none of {len(after)} tensors; check --lr and the groups")


class LossGuard:
    """Stops at the first loss that is not finite and saves its batch; notes a loss that does not move.

    The value of a step is looked at during the next one, so that a GPU is not waited for.
    """

    def __init__(self, out: Path, patience: int = 300, margin: float = 0.1, rank: int = 0):
        self.out, self.patience, self.margin, self.rank = out, patience, margin, rank
        self.first, self.lowest, self.warned, self._pending = None, math.inf, False, None

    def note(self, step: int, loss: torch.Tensor, batch: dict) -> str | None:
        """loss: detached scalar. -> a warning, once, when the loss stands still. UserError for the step before."""
        warning = self.check()
        value, event = loss, None
        if loss.is_cuda:
            value = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, value, event, batch)
        return warning

    def check(self) -> str | None:
        """Look at the step noted last, if any."""
        if self._pending is None:
            return None
        step, value, event, batch = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        value = value.item()
        if not math.isfinite(value):
            path = self.out / f"bad_batch_step_{step:06d}_rank_{self.rank}.pt"
            torch.save({k: v for k, v in batch.items() if isinstance(v, torch.Tensor | list)}, path)
            raise UserError(f"step {step}: loss is {value}; its batch is in {path}; try a lower --lr or --dtype fp32")
        self.first = value if step == 1 and self.first is None else self.first
        self.lowest = min(self.lowest, value)
        still = self.first is not None and step == self.patience and self.lowest > self.first - self.margin
        if still and not self.warned:
            self.warned = True
            return f"# warning: step {step}, and the loss is still within {self.margin} of its first {self.first:.3f}"
        return None


class EarlyStopping:
    """Ends a stage after `patience` validations in a row without a higher score, but not before `least` of them."""

    def __init__(self, patience: int = 5, least: int = 0):
        self.patience, self.least = patience, least
        self.best, self.count, self.since_best = -math.inf, 0, 0

    def update(self, score: float) -> bool:
        """Note a validation score, higher is better -> whether it is the best so far. NaN never is."""
        better = score > self.best
        self.count += 1
        self.since_best = 0 if better else self.since_best + 1
        if better:
            self.best = score
        return better

    @property
    def stop(self) -> bool:
        return self.since_best >= self.patience and self.count >= self.least

    def state_dict(self) -> dict:
        return {"best": self.best, "count": self.count, "since_best": self.since_best}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.count, self.since_best = state["best"], state["count"], state["since_best"]
