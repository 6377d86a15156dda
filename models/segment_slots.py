"""Objects that are found frame by frame, as a video goes on: which of the decoder's queries goes on with which object.

Each of N slots keeps a running mean of its kernel, and the query most like it goes on there. It counts as an object by
its class score, with hysteresis; an object that comes back within `patience` frames is the same.

Shapes: N queries and slots, K classes, D width. Source: Huang et al., MinVIS, NeurIPS 2022 (matching of queries).
"""

from dataclasses import dataclass

import torch

from models.matching import match_queries

KEEP = 0.7  # of a slot's kernel and class scores; the rest is the new frame's
BIRTH_DEATH = {"vis": (0.5, 0.25), "vps": (0.8, 0.5)}  # class scores at which a slot begins and ceases to count
PATIENCE = 30  # frames


@dataclass
class Slots:
    """Which of a frame's N queries goes on with which object, by `step`. All that is known of earlier frames."""

    countable: torch.Tensor  # bool (K,): classes that count
    birth: float
    death: float
    patience: int = PATIENCE
    number: int = 0  # ids given so far
    kernels: torch.Tensor | None = None  # (N, D) running means
    scores: torch.Tensor | None = None  # (N, K + 1) class probabilities, means since birth
    alive: torch.Tensor | None = None  # bool (N,)
    ids: torch.Tensor | None = None  # int64 (N,), 0: never born, or away too long
    away: torch.Tensor | None = None  # int64 (N,): frames since it counted last

    def step(self, queries: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """queries (N, D), class logits (N, K + 1) -> order int64 (N,): query order[i] is now slot i."""
        if self.kernels is None:
            order = torch.arange(len(queries), device=queries.device)
            self.kernels, self.scores = queries.float(), classes.float().softmax(-1)
            self.ids, self.away, self.alive = torch.zeros_like(order), torch.zeros_like(order), order < 0
        else:
            order = match_queries(self.kernels, queries)
        now, probability = queries[order].float(), classes[order].float().softmax(-1)
        mean = KEEP * self.scores + (1 - KEEP) * probability
        self.scores = torch.where(self.alive[:, None], mean, probability)
        best = self.scores[:, :-1].masked_fill(~self.countable, 0.0).amax(1)
        alive = torch.where(self.alive, best >= self.death, best >= self.birth)
        self.away = torch.where(alive, 0, self.away + 1)
        self.ids = torch.where(self.away > self.patience, 0, self.ids)
        fresh = alive & (self.ids == 0)
        self.ids = torch.where(fresh, self.number + fresh.cumsum(0), self.ids)
        self.number, self.alive = self.number + int(fresh.sum()), alive
        waits = (self.ids > 0) & ~alive  # for an object to come back: as it was
        self.kernels = torch.where(waits[:, None], self.kernels, KEEP * self.kernels + (1 - KEEP) * now)
        return order

    @property
    def labels(self) -> torch.Tensor:
        """int64 (N,): the likeliest class that counts."""
        return self.scores[:, :-1].masked_fill(~self.countable, -1.0).argmax(1)
