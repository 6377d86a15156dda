"""Decoding against a slow oracle: full forward passes without a cache, one image at a time, plain Python."""

import math

import pytest
import torch

from models import caption_decoding as cd
from models.m2_transformer import M2Decoder

V, T, LEVELS, B = 24, 9, 2, 5
PAD, BOS, EOS = 1, 2, 3


@pytest.fixture(scope="module")
def memory() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(B, LEVELS, 6, 32)


@pytest.fixture(scope="module")
def decoder(memory) -> M2Decoder:
    """Trained 25 steps on four random captions of each image, of 1 to 8 words, so that <eos> comes here and there."""
    decoder = M2Decoder(V, T, dim=32, layers=2, levels=LEVELS, heads=4, hidden=48, dropout=0.0)
    column, ends = torch.arange(T), torch.randint(1, T, (B, 4, 1))
    words = torch.randint(4, V, (B, 4, T)).where(column < ends, torch.where(column == ends, EOS, PAD))
    adam = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], 5e-3)
    for _ in range(25):
        adam.zero_grad()
        (-cd.rescore(decoder, memory, words).sum() / B).backward()
        adam.step()
    return decoder.eval()


def next_logp(decoder, memory, words: list[int]) -> list[float]:
    with torch.no_grad():
        return decoder(torch.tensor([[BOS, *words]]), memory)[0, -1].log_softmax(-1).tolist()


def slow_beams(decoder, memory, beam: int, max_len: int, penalty=0.0, ngram=0, min_len=0, never=()) -> list[tuple]:
    """[(rank, words, log-probs, finished)] of one image (1, levels, N, D), the best first."""
    beams = [(0.0, [], [], False)]
    for t in range(max_len):
        grown = []
        for rank, words, logps, done in beams:
            if done:
                grown.append((rank, [*words, PAD], [*logps, 0.0], True))
                continue
            runs = {tuple(words[i : i + ngram]) for i in range(t - ngram + 1)} if ngram else set()
            for w, p in enumerate(next_logp(decoder, memory, words)):
                if w in never or (w == EOS and t < min_len) or (ngram and tuple([*words, w][-ngram:]) in runs):
                    continue
                grown.append((sum([*logps, p]) / (t + 1) ** penalty, [*words, w], [*logps, p], w == EOS))
        beams = sorted(grown, key=lambda b: -b[0])[:beam]
    return beams


@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 0.8}, {"no_repeat_ngram": 2}, {"no_repeat_ngram": 1}, {"min_len": 4}, {"never": (7, 9)}],
    ids=str,
)
@pytest.mark.parametrize("beam", [1, 3, 4])
def test_beams_are_those_of_the_oracle(decoder, memory, beam, options):
    found = cd.beam_search(decoder, memory, beam, T, out_size=beam, **options)
    names = {"length_penalty": "penalty", "no_repeat_ngram": "ngram", "min_len": "min_len", "never": "never"}
    for i in range(B):
        slow = slow_beams(decoder, memory[i : i + 1], beam, T, **{names[k]: v for k, v in options.items()})
        assert found.tokens[i].tolist() == [words for _, words, _, _ in slow], f"image {i}"
        assert torch.allclose(found.logprobs[i], torch.tensor([logps for *_, logps, _ in slow]), atol=1e-5)
        assert torch.allclose(found.scores[i], torch.tensor([rank for rank, *_ in slow]), atol=1e-5)


def test_what_is_never_to_be_said_is_not_said(decoder, memory):
    free = cd.sample(decoder, memory, 50, T, generator=torch.Generator().manual_seed(1)).tokens
    common = int(free[free > EOS].mode().values)
    kept = cd.sample(decoder, memory, 50, T, generator=torch.Generator().manual_seed(1), never=(common,))
    assert (free == common).any() and not (kept.tokens == common).any()
    said = cd.greedy(decoder, memory, T).tokens
    word = int(said[said > EOS].mode().values)
    assert not (cd.greedy(decoder, memory, T, never=(word,)).tokens == word).any()


def test_the_oracle_case_is_not_trivial(decoder, memory):
    lengths = cd.beam_search(decoder, memory, 4, T, out_size=4).lengths
    assert lengths.min() < 4 and lengths.max() == T and len(lengths.unique()) >= 4, lengths


def test_batch_is_image_by_image_and_ends_early_alike(decoder, memory):
    whole = cd.beam_search(decoder, memory, 3, T, out_size=3)
    late = cd.beam_search(decoder, memory, 3, T, out_size=3, early_exit=False)
    assert torch.equal(whole.tokens, late.tokens) and torch.equal(whole.logprobs, late.logprobs)
    for i in range(B):
        one = cd.beam_search(decoder, memory[i : i + 1], 3, T, out_size=3)
        assert torch.equal(one.tokens[0], whole.tokens[i])
        assert torch.allclose(one.logprobs[0], whole.logprobs[i], atol=1e-5)


def test_early_exit_leaves_steps_out(decoder, memory, monkeypatch):
    steps = []
    step = M2Decoder.step
    monkeypatch.setattr(M2Decoder, "step", lambda self, *a: steps.append(1) or step(self, *a))
    ends = cd.greedy(decoder, memory, T).lengths[:, 0]
    first = ends.argmin()
    steps.clear()
    found = cd.greedy(decoder, memory[first : first + 1], T)
    assert len(steps) == ends[first] < T and found.tokens.shape == (1, 1, T)
    steps.clear()
    cd.beam_search(decoder, memory[first : first + 1], 1, T, early_exit=False)
    assert len(steps) == T


def test_greedy_takes_the_likeliest_word_and_beams_are_no_worse(decoder, memory):
    found = cd.greedy(decoder, memory, T)
    for i in range(B):
        words = []
        while len(words) < T and words[-1:] != [EOS]:
            logp = next_logp(decoder, memory[i : i + 1], words)
            words.append(logp.index(max(logp)))
        assert found.tokens[i, 0].tolist() == words + [PAD] * (T - len(words))
        assert found.lengths[i, 0] == len(words)
    for beam in (2, 3, 5, V):
        assert (cd.beam_search(decoder, memory, beam, T).scores >= found.scores - 1e-5).all(), beam


def test_nothing_after_eos_sorted_and_filler(decoder, memory):
    for found, filler in (
        (cd.beam_search(decoder, memory, 5, T, out_size=4, filler=0), 0),
        (cd.beam_search(decoder, memory, 5, T, out_size=4), PAD),
        (cd.sample(decoder, memory, 4, T, generator=torch.Generator().manual_seed(0)), PAD),
    ):
        after = ~cd.until_eos(found.tokens, EOS)
        assert after.any() and (found.tokens[after] == filler).all() and not found.logprobs[after].any()
        assert found.tokens.shape == found.logprobs.shape == (B, 4, T) and found.scores.shape == (B, 4)
        assert (found.scores.diff(dim=1) <= 0).all()
        assert torch.allclose(found.logprobs.sum(-1), found.scores, atol=1e-5)


def test_rescore_is_what_decoding_said_and_has_a_gradient(decoder, memory):
    memory = memory.clone().requires_grad_()
    random = torch.Generator().manual_seed(1)
    for found in (
        cd.beam_search(decoder, memory, 4, T, out_size=3),
        cd.beam_search(decoder, memory, 2, 5, filler=0),
        cd.sample(decoder, memory, 3, T, temperature=2.0, generator=random),
    ):
        again = cd.rescore(decoder, memory, found.tokens)
        assert not found.logprobs.requires_grad and (again - found.logprobs).abs().max() <= 1e-5
        wanted = [p for p in decoder.parameters() if p.requires_grad]
        grads = torch.autograd.grad(again.sum(), [memory, *wanted])
        assert all(g.isfinite().all() and g.any() for g in grads)
    ended = torch.tensor([[[EOS, 5, 6]]]).expand(B, 1, 3)  # one column is enough
    assert cd.rescore(decoder, memory, ended).shape == (B, 1, 3)


def test_no_ngram_comes_twice(decoder, memory):
    for n in (1, 2, 3):
        found = cd.beam_search(decoder, memory, 3, T, out_size=3, no_repeat_ngram=n, min_len=T)
        for words in found.tokens.flatten(0, 1).tolist():
            runs = [tuple(words[i : i + n]) for i in range(T - n + 1)]
            assert len(set(runs)) == len(runs), (n, words)
    free = cd.beam_search(decoder, memory, 3, T, out_size=3, min_len=T).tokens.flatten(0, 1).tolist()
    assert any(len(set(words)) < T for words in free)  # without the option words do come twice


# ---- sampling


def test_frequencies_are_the_softmax(decoder, memory):
    n, random = 20_000, torch.Generator().manual_seed(0)
    for temperature in (1.0, 1.7):
        with torch.no_grad():
            logits = decoder(torch.tensor([[BOS]]), memory[:1])[0, 0]
        found = cd.sample(decoder, memory[:1], n, 1, temperature=temperature, generator=random)
        p = (logits / temperature).softmax(-1)
        seen = found.tokens.flatten().bincount(minlength=V) / n
        assert ((seen - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()
        assert torch.allclose(found.logprobs.flatten(), logits.log_softmax(-1)[found.tokens.flatten()], atol=1e-5)


def test_words_follow_each_other_as_the_decoder_says(decoder, memory):
    """Second words: of the samples that begin with the likeliest word."""
    found = cd.sample(decoder, memory[:1], 20_000, 2, generator=torch.Generator().manual_seed(0)).tokens[0]
    first = found[:, 0].mode().values.item()
    second = found[found[:, 0] == first, 1]
    p = torch.tensor(next_logp(decoder, memory[:1], [first])).exp()
    seen = second.bincount(minlength=V) / len(second)
    assert first != EOS and ((seen - p).abs() <= 5 * (p * (1 - p) / len(second)).sqrt() + 1e-9).all()


def test_nucleus_is_the_smallest_set():
    p = torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1], [0.9, 0.025, 0.025, 0.025, 0.025]])
    for top_p, sizes in ((1e-6, (1, 1)), (0.3, (1, 1)), (0.45, (2, 1)), (0.8, (3, 1)), (0.92, (4, 2)), (1.0, (5, 5))):
        kept = cd.keep_likely(p.log(), 0, top_p).isfinite()
        assert tuple(kept.sum(1).tolist()) == sizes, top_p
        assert all(p[i][kept[i]].min() >= p[i][~kept[i]].max() - 1e-9 for i in (0, 1) if not kept[i].all())
    assert cd.keep_likely(p[:1].log(), 2, 1.0).isfinite().tolist() == [[False, True, True, False, False]]
    assert cd.keep_likely(p[:1].log(), 3, 0.5).isfinite().sum() == 2  # 0.4 of 0.85 is short of a half, 0.7 is not
    assert cd.keep_likely(p.log(), 99, 1.0).isfinite().all()


def test_samples_stay_in_the_nucleus_and_repeat_with_the_seed(decoder, memory):
    seeds = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    found = [cd.sample(decoder, memory, 40, 4, top_k=6, top_p=0.6, generator=g).tokens for g in seeds]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for i in range(B):
        for words in {tuple(w) for w in found[0][i].tolist()}:
            for t in range(words.index(EOS) + 1 if EOS in words else 4):
                logp = torch.tensor([next_logp(decoder, memory[i : i + 1], list(words[:t]))])
                assert cd.keep_likely(logp, 6, 0.6)[0, words[t]].isfinite()
    one = cd.sample(decoder, memory, 1, T, top_p=1e-6).tokens
    assert torch.equal(one, cd.greedy(decoder, memory, T).tokens)


def test_draw_never_takes_an_impossible_word(monkeypatch):
    logits = torch.full((20_000, 7), -math.inf)
    logits[:, 2], logits[:, 4] = 0.0, -3.0
    words = cd.draw(logits, torch.Generator().manual_seed(0)).flatten()
    assert set(words.tolist()) == {2, 4}
    for number, word in ((0.0, 2), (1 - 2**-24, 4)):  # the ends of what torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda *size, number=number, **_: torch.full(size, number))
        assert cd.draw(logits[:1], None).item() == word


# ---- precision and errors


def test_bfloat16_decodes_and_modules_keep_no_past(decoder, memory):
    before = cd.beam_search(decoder, memory, 3, T)
    with torch.autocast("cpu", torch.bfloat16):
        low = cd.beam_search(decoder, memory, 3, T)
    assert low.logprobs.dtype == torch.float32 and low.logprobs.isfinite().all()
    assert (low.scores - before.scores).abs().max() < 0.5
    assert torch.equal(cd.beam_search(decoder, memory, 3, T).tokens, before.tokens)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d, m: cd.beam_search(d, m, 3, T, out_size=4), "out_size 4 of 3"),
        (lambda d, m: cd.beam_search(d, m, 3, T + 1), "expected 1..9"),
        (lambda d, m: cd.beam_search(d, m, V + 1, T), f"{V + 1} beams from {V} words"),
        (lambda d, m: cd.sample(d, m, 3, 0), "expected 1..9"),
        (lambda d, m: cd.sample(d, m, 3, T, temperature=0.0), "temperature 0.0"),
        (lambda d, m: cd.sample(d, m, 3, T, top_p=0.0), "top_p 0.0"),
    ],
)
def test_sizes_that_do_not_fit(decoder, memory, call, words):
    with pytest.raises(ValueError, match=words):
        call(decoder, memory)
