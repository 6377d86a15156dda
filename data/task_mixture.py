"""Several data sets in one training: which one a step takes, which of its items, the same on every rank or not.

A micro-batch comes from one data set. Step k has world * accum micro-batches, its slots; slot a * world + rank is
micro-batch a of that rank. The data set of a slot is a function of (seed, k, slot), or of (seed, k) when all ranks are
to have the same, so a resumed run goes on as the unbroken one would have, and two ranks see what one process sees with
accum 2. Each data set has its own endless stream of items, a new order every epoch; its slots take from it in turn, so
no item comes twice before all have come once, whatever the number of ranks.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

BLOCK = 4096  # steps whose draws are made together


def temperature_shares(sizes: dict[str, int], temperature: float = 1.0) -> dict[str, float]:
    """Shares of data sets by size ** (1 / temperature): 1 in proportion, larger ones more even. Sum 1."""
    if min(sizes.values(), default=0) < 1 or temperature <= 0:
        raise ValueError(f"temperature_shares: sizes {sizes}, temperature {temperature}; expected sizes >= 1, > 0")
    weights = {name: n ** (1 / temperature) for name, n in sizes.items()}
    return {name: w / sum(weights.values()) for name, w in weights.items()}


class TaskMixture(Dataset):
    """Named data sets behind one: mixture[name, epoch, index] is sets[name][epoch, index]."""

    def __init__(self, sets: dict[str, Dataset]):
        self.sets = sets

    def __len__(self) -> int:
        return sum(len(s) for s in self.sets.values())

    def __getitem__(self, key: tuple[str, int, int]) -> dict:
        name, epoch, index = key
        return self.sets[name][epoch, index]

    def sizes(self) -> dict[str, int]:
        return {name: len(s) for name, s in self.sets.items()}


class MixtureBatches:
    """Batch sampler: lists of (name, epoch, index) for this rank's micro-batches of the steps [start, stop).

    sizes: items of each data set; shares: how often each is drawn, any positive scale. batch_size: items of a
    micro-batch, one number or one for each data set. same: all slots of a step have one data set. ValueError for names
    that differ, an empty set, a share that is not positive, a batch of nothing.
    """

    def __init__(self, sizes: dict[str, int], shares: dict[str, float], batch_size: int | dict[str, int],
                 start: int, stop: int, seed: int, rank=0, world=1, accum=1, same=True):  # fmt: skip
        batch_sizes = batch_size if isinstance(batch_size, dict) else dict.fromkeys(sizes, batch_size)
        tables = (sizes, shares, batch_sizes)
        if not sizes or any(t.keys() != sizes.keys() or min(t.values()) <= 0 for t in tables):
            raise ValueError(f"MixtureBatches: sizes {sizes}, shares {shares}, batch size {batch_size}; expected the same "
                             "names, all above 0")  # fmt: skip
        self.names, self.sizes = list(sizes), sizes
        self.edges = np.cumsum([shares[name] for name in self.names]) / sum(shares.values())  # the last is 1
        self.batch_sizes, self.start, self.stop, self.seed, self.same = batch_sizes, start, stop, seed, same
        self.rank, self.world, self.accum = rank, world, accum
        self.orders: dict[str, tuple[int, np.ndarray]] = {}  # name -> epoch and its order, the latest

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accum

    def block(self, number: int) -> np.ndarray:
        """Data sets (BLOCK, slots) of the steps from number * BLOCK on, as indices into names."""
        slots = self.world * self.accum
        columns = [
            np.random.default_rng([self.seed, number, s]).random(BLOCK) for s in range(1 if self.same else slots)
        ]
        drawn = np.searchsorted(self.edges[:-1], np.stack(columns, 1), side="right")
        return np.repeat(drawn, slots, 1) if self.same else drawn

    def task(self, step: int, slot: int = 0) -> str:
        """Name of the data set of a slot of a step."""
        return self.names[self.block(step // BLOCK)[step % BLOCK, slot]]

    def item(self, name: str, position: int) -> tuple[str, int, int]:
        """The key at a position of the endless stream of a data set."""
        epoch, at = divmod(position, self.sizes[name])
        if self.orders.get(name, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, self.names.index(name), epoch, 1])
            self.orders[name] = (epoch, rng.permutation(self.sizes[name]))
        return name, epoch, int(self.orders[name][1][at])

    def __iter__(self) -> Iterator[list[tuple[str, int, int]]]:
        taken, kinds = np.zeros(len(self.names), np.int64), np.arange(len(self.names))
        for number in range(self.start // BLOCK):
            taken += np.bincount(self.block(number).ravel(), minlength=len(kinds))
        for step in range(self.start // BLOCK * BLOCK, self.stop):
            if step % BLOCK == 0:
                block = self.block(step // BLOCK)
            row = block[step % BLOCK]  # (slots,)
            before = taken + (np.cumsum(row[:, None] == kinds, 0) - (row[:, None] == kinds))  # (slots, K)
            taken += np.bincount(row, minlength=len(kinds))
            for a in range(self.accum if step >= self.start else 0):
                slot = a * self.world + self.rank
                name = self.names[row[slot]]
                first = int(before[slot, row[slot]]) * self.batch_sizes[name]
                yield [self.item(name, p) for p in range(first, first + self.batch_sizes[name])]
