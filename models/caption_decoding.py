"""Captions out of a decoder: beam search, greedy, sampling, and the log-probabilities of given captions.

Shapes: B images, k captions of each, R = B x k rows (image-major), T words at most, V words.
A decoder has `start(memory) -> cache`, `step(tokens (R,), cache) -> logits (R, V)`, `decoder(tokens (R, L), memory) ->
logits (R, L, V)` and the ids pad, bos, eos; its cache has cross[layer][level] = (keys, values), both starting with B,
and reorder(rows). Memory is whatever its encoder returned. Dropout is as the module's mode says.
Reference: aimagelab/meshed-memory-transformer@239100b, models/beam_search/beam_search.py; nucleus: Holtzman et al. 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.caption_losses import word_logprobs

NEVER = float("-inf")


@dataclass
class Decoded:
    """k captions of each image, the best first."""

    tokens: torch.Tensor  # int64 (B, k, T), without <bos>; the filler after <eos>
    logprobs: torch.Tensor  # float32 (B, k, T) of each word, 0 after <eos>
    scores: torch.Tensor  # float32 (B, k), what they are ranked by
    eos: int

    @property
    def lengths(self) -> torch.Tensor:
        """int64 (B, k), words with <eos>; T where it did not come."""
        return until_eos(self.tokens, self.eos).sum(-1)


def until_eos(tokens: torch.Tensor, eos: int) -> torch.Tensor:
    """bool, True up to and with the first <eos> along the last axis."""
    ends = (tokens == eos).long()
    return ends.cumsum(-1) == ends


@torch.no_grad()
def beam_search(
    decoder,
    memory,
    beam: int = 5,
    max_len: int = 20,
    out_size: int = 1,
    length_penalty: float = 0.0,
    no_repeat_ngram: int = 0,
    min_len: int = 0,
    filler: int | None = None,
    early_exit: bool = True,
    never: Sequence[int] = (),
) -> Decoded:
    """The `beam` likeliest captions that the search meets, of which out_size are returned: (B, out_size, max_len).

    A finished caption stays in its beam and competes with the growing ones by its sum of log-probabilities.
    length_penalty: ranks by sum / words ** length_penalty instead. no_repeat_ngram: no run of so many words twice.
    min_len: words before <eos>. filler: after <eos>, default <pad>; the source has 0. early_exit ends the search when
    every caption is finished, with the same result. never: ids that are not said, as <unk>. ValueError for a size that
    does not fit.
    """
    if not 1 <= out_size <= beam:
        raise ValueError(f"beam_search: out_size {out_size} of {beam} beams")
    check_steps(decoder, max_len)
    filler = decoder.pad if filler is None else filler
    cache = decoder.start(memory)
    keys = cache.cross[0][0][0]
    B, device = len(keys), keys.device
    image = torch.arange(B, device=device)[:, None]
    words, logps = torch.full((B, 1, 0), filler, device=device), torch.zeros(B, 1, 0, device=device)
    sums, alive = torch.zeros(B, 1, device=device), torch.ones(B, 1, dtype=torch.bool, device=device)
    lengths, last = torch.zeros(B, 1, device=device), torch.full((B,), decoder.bos, device=device)
    for t in range(max_len):
        logp = decoder.step(last, cache).float().log_softmax(-1)  # (R, V)
        forbid(logp, words.flatten(0, 1), no_repeat_ngram, [*never, *([decoder.eos] if t < min_len else [])])
        best = logp.topk(min(beam, logp.shape[1]))  # (R, k): no more of one row can be among the image's best k
        logp, ids = (x.unflatten(0, sums.shape) for x in best)  # (B, rows, k)
        logp[..., 1:].masked_fill_(~alive[..., None], NEVER)  # a finished caption goes on in one way,
        logp[..., 0].masked_fill_(~alive, 0)  # at no cost
        grown = lengths + alive  # (B, rows)
        ranks = ((sums[..., None] + logp) / grown[..., None] ** length_penalty).flatten(1)  # (B, rows k)
        if ranks.shape[1] < beam:
            raise ValueError(f"beam_search: {beam} beams from {ranks.shape[1]} words; take fewer beams")
        scores, at = ranks.topk(beam)  # best first
        source = at // ids.shape[2]  # (B, k) which row each comes from
        rows = (image * sums.shape[1] + source).flatten()
        was_alive, logp = alive.gather(1, source), logp.flatten(1).gather(1, at)
        new = ids.flatten(1).gather(1, at).masked_fill(~was_alive, filler)
        words = torch.cat([words.flatten(0, 1)[rows].unflatten(0, (B, beam)), new[..., None]], 2)
        logps = torch.cat([logps.flatten(0, 1)[rows].unflatten(0, (B, beam)), logp[..., None]], 2)
        sums, lengths = sums.gather(1, source) + logp, grown.gather(1, source)
        alive, last = was_alive & (new != decoder.eos), new.flatten()
        if t + 1 == max_len or (early_exit and finished(alive, t)):
            break
        if beam > 1:
            cache.reorder(rows)
    return pad_to(Decoded(words, logps, scores, decoder.eos), max_len, filler, out_size)


def greedy(decoder, memory, max_len: int = 20, never: Sequence[int] = ()) -> Decoded:
    """The likeliest word at each step: (B, 1, max_len)."""
    return beam_search(decoder, memory, 1, max_len, never=never)


@torch.no_grad()
def sample(
    decoder,
    memory,
    n: int = 5,
    max_len: int = 20,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    never: Sequence[int] = (),
) -> Decoded:
    """n random captions of each image: (B, n, max_len), the likeliest first.

    Words are drawn from softmax(logits / temperature), of which top_k keeps the likeliest words and top_p the smallest
    set of likeliest words that holds so much probability; ids in `never` are left out first. logprobs and scores are
    the decoder's own, as it is.
    """
    check_steps(decoder, max_len)
    if n < 1 or temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sample: n {n}, temperature {temperature}, top_k {top_k}, top_p {top_p}")
    cache = decoder.start(memory)
    keys = cache.cross[0][0][0]
    B, device = len(keys), keys.device
    words, logps = torch.full((B * n, 0), decoder.pad, device=device), torch.zeros(B * n, 0, device=device)
    alive, last = torch.ones(B * n, dtype=torch.bool, device=device), torch.full((B,), decoder.bos, device=device)
    for t in range(max_len):
        logits = decoder.step(last, cache).float()  # (B, V), then (B n, V)
        if t == 0:
            rows = torch.arange(B, device=device).repeat_interleave(n)
            cache.reorder(rows)
            logits = logits[rows]
        likely = logits / temperature
        forbid(likely, words, 0, never)
        new = draw(keep_likely(likely, top_k, top_p), generator)  # (B n, 1)
        logp = logits.log_softmax(-1).gather(1, new)
        words = torch.cat([words, new.masked_fill(~alive[:, None], decoder.pad)], 1)
        logps = torch.cat([logps, logp * alive[:, None]], 1)
        last, alive = words[:, -1], alive & (words[:, -1] != decoder.eos)
        if finished(alive, t):
            break
    words, logps = (x.unflatten(0, (B, n)) for x in (words, logps))
    scores, order = logps.sum(-1).sort(-1, descending=True)
    words, logps = (x.take_along_dim(order[..., None], 1) for x in (words, logps))
    return pad_to(Decoded(words, logps, scores, decoder.eos), max_len, decoder.pad, n)


def rescore(decoder, memory, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 (B, k, T) of captions int64 (B, k, T) by one teacher-forced pass, with gradient.

    tokens: without <bos>; what follows <eos> does not matter and gets 0.
    """
    counted = until_eos(tokens, decoder.eos)  # (B, k, T)
    T = int(counted.sum(-1).max())  # columns that hold a word
    counted, words = counted[..., :T].flatten(0, 1), tokens[..., :T].flatten(0, 1)  # (R, T)
    begin = torch.full_like(words[:, :1], decoder.bos)
    inputs = torch.cat([begin, words[:, :-1].masked_fill(~counted[:, 1:], decoder.pad)], 1)
    logp = word_logprobs(decoder(inputs, memory), words, counted)  # (R, T)
    return F.pad(logp.view(*tokens.shape[:2], T), (0, tokens.shape[2] - T))


# ---- parts


def keep_likely(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """logits (R, V) with -inf for words outside the top_k (0: all) and outside the nucleus of mass top_p (1: all)."""
    if 0 < top_k < logits.shape[1]:
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, NEVER)
    if top_p < 1:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        p = values.softmax(-1)
        before = p.cumsum(-1) - p  # mass of the likelier words
        out = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(out, NEVER)
    return logits


def draw(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One word of each row's softmax, int64 (R, 1): the first whose cumulated probability exceeds a uniform number."""
    mass = logits.softmax(-1).cumsum(-1)  # (R, V)
    at = torch.rand(len(mass), 1, device=mass.device, generator=generator) * mass[:, -1:]  # below the whole mass
    return torch.searchsorted(mass, at, right=True)


def finished(alive: torch.Tensor, t: int) -> bool:
    """Whether no caption grows any more. Asking makes a GPU wait, so there every fourth step is asked."""
    return (alive.device.type == "cpu" or t % 4 == 3) and not alive.any()


def check_steps(decoder, max_len: int) -> None:
    if not 1 <= max_len <= decoder.max_len:
        raise ValueError(f"decoding {max_len} words: expected 1..{decoder.max_len}, the decoder's positions")


def pad_to(found: Decoded, max_len: int, filler: int, out_size: int) -> Decoded:
    """The first out_size captions, with columns up to max_len that an early end has left out."""
    more = (0, max_len - found.tokens.shape[2])
    tokens = F.pad(found.tokens[:, :out_size], more, value=filler)
    return Decoded(tokens, F.pad(found.logprobs[:, :out_size], more), found.scores[:, :out_size], found.eos)


def forbid(logp: torch.Tensor, words: torch.Tensor, ngram: int, never: Sequence[int]) -> None:
    """-inf, in place, for the word that would repeat one of the row's n-grams, and for the ids `never`.

    logp (R, V), words int64 (R, t) so far. The remaining words keep their probabilities.
    """
    for word in never:
        logp[:, word] = NEVER
    t = words.shape[1]
    if 0 < ngram <= t:
        runs = words.unfold(1, ngram, 1)  # (R, t - n + 1, n)
        again = (runs[..., :-1] == words[:, None, t - ngram + 1 :]).all(-1)  # their beginning is the caption's end
        rows, at = again.nonzero(as_tuple=True)
        logp[rows, runs[rows, at, -1]] = NEVER
