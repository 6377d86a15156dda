"""Losses of captioning: cross-entropy, and self-critical sequence training with the three baselines of the field.

Shapes: B images, k captions each, R = B k rows, T words (end token included), V vocabulary.
Sources: Rennie et al. 2017 (greedy); M2, eq. 9 (beam); Luo 2020, "A better variant of self-critical training" (sample).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

ESTIMATORS = ("beam", "sample", "greedy")


def caption_loss(logits: torch.Tensor, words: torch.Tensor, pad: int, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy over the words that are not padding. logits (R, T, V) of words (R, T) int64.

    smoothing e: 1 - e on the word and e / (V - 1) on every other, the form of PureT.
    """
    V = logits.shape[-1]
    smoothing *= V / (V - 1)  # torch spreads its e over all V words, the right one included
    return F.cross_entropy(
        logits.float().flatten(0, 1), words.flatten(), ignore_index=pad, label_smoothing=min(1.0, smoothing)
    )


def word_logprobs(
    logits: torch.Tensor, words: torch.Tensor, counted: torch.Tensor, never: Sequence[int] = ()
) -> torch.Tensor:
    """Log-probabilities of words (R, T) under logits (R, T, V), 0 where not counted (R, T) bool -> (R, T) float32.

    never: ids that are not drawn, so the others share their probability.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)  # (R, T)
    chosen = logits.gather(-1, words[..., None]).squeeze(-1) - total
    if never:
        unsaid = sum((logits[..., i] - total).exp() for i in never)
        chosen = chosen - torch.log1p(-unsaid.clamp(max=1 - 1e-6))
    return chosen.masked_fill(~counted, 0.0)


def advantages(rewards: torch.Tensor, estimator: str, greedy_rewards: torch.Tensor | None = None) -> torch.Tensor:
    """rewards (B, k) minus their baseline -> (B, k).

    beam: the mean of the k captions. sample: the mean of the other k - 1. greedy: greedy_rewards (B, 1).
    """
    k = rewards.shape[1]
    if estimator != "greedy" and k < 2:
        raise ValueError(f"advantages: {estimator} compares the captions of an image, so k = {k} has no baseline")
    if estimator == "beam":
        return rewards - rewards.mean(1, keepdim=True)
    if estimator == "sample":
        return rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    if greedy_rewards is None or greedy_rewards.shape != (len(rewards), 1):
        raise ValueError("advantages: greedy needs greedy_rewards (B, 1)")
    return rewards - greedy_rewards


def scst_loss(
    logprobs: torch.Tensor, lengths: torch.Tensor, advantage: torch.Tensor, estimator: str, m2_norm: bool = False
) -> torch.Tensor:
    """logprobs (B, k, T) with gradient, 0 after the end; lengths (B, k) with end token; advantage (B, k) -> scalar.

    beam: the mean over captions of -advantage times the mean log-probability of the caption's words; m2_norm divides
    by T instead of the caption's own length, as M2 does. sample, greedy: the mean over all words.
    """
    weighted = -advantage.to(logprobs.dtype)[..., None] * logprobs.float()  # (B, k, T)
    if estimator != "beam":
        return weighted.sum() / lengths.sum()
    words = logprobs.shape[2] if m2_norm else lengths
    return (weighted.sum(2) / words).mean()
