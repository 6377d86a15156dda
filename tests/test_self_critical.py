"""One self-critical step on a tiny FSGR: who is rewarded for what, how captions are drawn, and the loss by hand."""

import contextlib
import zlib
from dataclasses import asdict

import pytest
import torch

from models.caption_decoding import beam_search, greedy, rescore
from models.clip import CLIPConfig
from models.clip_adapter import AdapterConfig
from models.fsgr import BOS, EOS, FSGR, PAD, SPECIALS, FSGRConfig
from models.self_critical import END, self_critical_loss, spell

UNK, WORDS = 0, 12
NEVER = (UNK, PAD, BOS)
IDS = [7, 3, 9]
K, MAX_LEN = 4, 12
CLIP = CLIPConfig(image_size=32, patch=16, width=32, layers=2, heads=2, mlp=64, embed_dim=16)


class Captioner:
    """FSGR without dropout or noise, whose logits get `bias` (V,); notes in which mode each part runs."""

    def __init__(self, end: float):
        torch.manual_seed(0)
        vocab = [*SPECIALS, *(f"w{i}" for i in range(WORDS))]
        self.model = FSGR(
            FSGRConfig(
                clip=asdict(CLIP), adapter=asdict(AdapterConfig(kind="none")), vocab=vocab, dim=16, heads=2, d_ff=32,
                enc_layers=1, dec_layers=1, max_len=MAX_LEN, dropout=0.0, semantic=False, image_size=32,
            )
        )  # fmt: skip
        self.images = 3 * torch.randn(len(IDS), 3, 32, 32)
        self.bias = torch.zeros(len(vocab))
        self.bias[UNK], self.bias[EOS] = 3.0, end  # <unk> would be said all the time
        self.modes = set()
        self.model.backbone.register_forward_hook(lambda *_: self.note("picture"))
        self.model.decoder.fc.register_forward_hook(lambda *io: self.note("words") or 2 * io[2] + self.bias)
        self.model.train()

    def note(self, part: str) -> None:
        self.modes.add((part, self.model.training, self.model.decoder.fc.training, torch.is_grad_enabled()))

    @contextlib.contextmanager
    def without_never(self):
        """Logits of a model that cannot say the words of NEVER: a plain softmax is then the renormalised one."""
        kept = self.bias.clone()
        self.bias[list(NEVER)] = -1e4
        try:
            yield self.model.eval()
        finally:
            self.bias = kept
            self.model.train()

    def ids(self, caption: str) -> list[int]:
        return [self.model.cfg.vocab.index(word) for word in caption.split()]


class Reward:
    """A number that follows from image and caption alone; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, image_ids: list, captions: list[str]) -> list[float]:
        self.asked.append(list(zip(image_ids, captions, strict=True)))
        return [self.of(*pair) for pair in self.asked[-1]]

    @staticmethod
    def of(image_id: int, caption: str) -> float:
        return zlib.crc32(f"{image_id}: {caption}".encode()) % 1000 / 100


def step(captioner: Captioner, estimator: str, **more) -> tuple[torch.Tensor, dict, Reward]:
    """more: of self_critical_loss."""
    reward, model = Reward(), captioner.model
    torch.manual_seed(1)
    kw = {"k": K, "max_len": MAX_LEN, "never": NEVER} | more
    loss, info = self_critical_loss(model, model, captioner.images, IDS, reward, estimator, **kw)
    return loss, info, reward


def logprobs_by_hand(captioner: Captioner, drawn: list[tuple[int, str]]) -> list[tuple[float, int]]:
    """(sum of log-probabilities, words) of every (image id, caption), each on the picture of that id, alone."""
    found = []
    with captioner.without_never() as model, torch.no_grad():
        for image_id, caption in drawn:
            at = IDS.index(image_id)
            memory, _ = model.encode(captioner.images[at : at + 1])
            words = torch.tensor(captioner.ids(caption))
            found.append((rescore(model.decoder, memory, words[None, None]).sum().item(), len(words)))
    return found


@pytest.mark.parametrize("end", [3.0, -50.0], ids=["ended", "unfinished"])
@pytest.mark.parametrize("estimator", ["beam", "beam, m2_norm", "sample", "greedy"])
def test_loss_is_the_one_of_the_papers_by_hand(estimator, end):
    captioner, m2_norm = Captioner(end), "m2" in estimator
    estimator = estimator.split(",")[0]
    loss, info, reward = step(captioner, estimator, m2_norm=m2_norm)
    drawn, k = reward.asked[0], 1 if estimator == "greedy" else K
    assert [i for i, _ in drawn] == [i for i in IDS for _ in range(k)]
    said = [caption.split() for _, caption in drawn]
    assert all(words[-1] == END for words in said) == (end > 0) and all(END not in words[:-1] for words in said)
    assert (max(map(len, said)) < MAX_LEN) == (end > 0), "padding to max_len must be seen by m2_norm"
    rewards = [Reward.of(*pair) for pair in drawn]
    if estimator == "greedy":
        base = [Reward.of(*pair) for pair in reward.asked[1]]
    else:
        of_image = [rewards[n // k * k : n // k * k + k] for n in range(len(rewards))]
        drop = estimator == "sample"
        base = [(sum(r) - drop * rewards[n]) / (k - drop) for n, r in enumerate(of_image)]
    found = logprobs_by_hand(captioner, drawn)
    gains = [-(r - b) * logp for r, b, (logp, _) in zip(rewards, base, found, strict=True)]
    words = [n for _, n in found]
    if estimator == "beam":
        by_hand = sum(g / (MAX_LEN if m2_norm else n) for g, n in zip(gains, words, strict=True)) / len(gains)
    else:
        by_hand = sum(gains) / sum(words)
    assert loss.item() == pytest.approx(by_hand, abs=1e-4) and abs(by_hand) > 4e-3
    assert info["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert info["words"] == pytest.approx(sum(words) / len(words))
    assert info["decode_s"] > 0 and info["reward_s"] > 0


@pytest.mark.parametrize("estimator", ["beam", "greedy"])
def test_captions_are_those_of_their_own_picture(estimator):
    captioner = Captioner(2.0)
    _, _, reward = step(captioner, estimator)
    asked = reward.asked[-1]  # of greedy: the baseline
    k, found = len(asked) // len(IDS), []
    model = captioner.model.eval()
    for at, image_id in enumerate(IDS):
        with torch.no_grad():
            memory, _ = model.encode(captioner.images[at : at + 1])
        if estimator == "greedy":
            one = greedy(model.decoder, memory, MAX_LEN, NEVER)
        else:
            one = beam_search(model.decoder, memory, K, MAX_LEN, out_size=K, never=NEVER)
        found += [(image_id, caption) for caption in spell(one.tokens[0], model.cfg.vocab, EOS, True)]
    assert asked == found and k == (1 if estimator == "greedy" else K)
    assert len({c for _, c in asked}) > 1, "the pictures must differ for this to say anything"


@pytest.mark.parametrize("estimator", ["beam", "sample", "greedy"])
def test_words_that_are_never_said_are_not_drawn(estimator):
    captioner = Captioner(-1.0)
    _, _, reward = step(captioner, estimator)
    assert not any(captioner.model.cfg.vocab[i] in c.split() for asked in reward.asked for _, c in asked for i in NEVER)
    _, _, reward = step(captioner, estimator, never=())
    assert all(any("<unk>" in c for _, c in asked) for asked in reward.asked), "else the test says nothing"


@pytest.mark.parametrize("estimator", ["beam", "sample", "greedy"])
def test_captions_are_drawn_in_eval_mode_without_gradient_and_scored_in_train_mode(estimator):
    captioner = Captioner(2.0)
    loss, _, _ = step(captioner, estimator)
    drawing, scoring = (False, False, False), (True, True, True)
    assert captioner.modes == {(part, *mode) for part in ("picture", "words") for mode in (drawing, scoring)}
    assert captioner.model.training and captioner.model.decoder.training
    loss.backward()
    assert captioner.model.decoder.word_emb.weight.grad[4:].any()


def test_the_teacher_sees_the_words_before_and_net_is_what_is_trained():
    captioner, seen = Captioner(2.0), []

    def net(images, tokens):
        seen.append(tokens)
        return captioner.model(images, tokens)

    reward = Reward()
    self_critical_loss(net, captioner.model, captioner.images, IDS, reward, "beam", K, MAX_LEN, never=NEVER)
    (tokens,) = seen
    for row, (_, caption) in zip(tokens.tolist(), reward.asked[0], strict=True):
        ids = captioner.ids(caption)[: len(row)]
        assert row[0] == BOS and row[1 : len(ids)] == ids[:-1]


def test_without_end_the_reward_does_not_see_where_captions_end():
    captioner = Captioner(2.0)
    _, info, reward = step(captioner, "beam", end=False)
    assert not any(END in caption for _, caption in reward.asked[0])
    with_end = step(captioner, "beam")[2].asked[0]
    assert [c.removesuffix(END).strip() for _, c in with_end] == [c for _, c in reward.asked[0]]
    mean = sum(len(c.split()) for _, c in with_end) / len(with_end)
    assert info["words"] == pytest.approx(mean), "the end is a word of the loss"


def test_spelling_of_captions():
    vocab = [*SPECIALS, "a", "dog"]
    rows = torch.tensor([[4, 5, EOS, PAD], [4, 5, 4, 5], [EOS, PAD, PAD, PAD], [4, 4, 5, EOS]])
    assert spell(rows, vocab, EOS, True) == ["a dog <eos>", "a dog a dog", "<eos>", "a a dog <eos>"]
    assert spell(rows, vocab, EOS, False) == ["a dog", "a dog a dog", "", "a a dog"]
