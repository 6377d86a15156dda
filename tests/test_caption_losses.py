"""Cross-entropy with smoothing, word log-probabilities, and the policy gradient with its three baselines."""

import pytest
import torch
import torch.nn.functional as F

from models.caption_losses import advantages, caption_loss, scst_loss, word_logprobs

PAD = 1


def test_padding_does_not_count():
    logits, words = torch.randn(2, 5, 9), torch.tensor([[4, 5, 3, PAD, PAD], [4, 4, 4, 4, 3]])
    longer = torch.cat([logits, torch.randn(2, 3, 9)], 1), F.pad(words, (0, 3), value=PAD)
    torch.testing.assert_close(caption_loss(*longer, PAD), caption_loss(logits, words, PAD))
    by_hand = -logits.log_softmax(-1).gather(-1, words[..., None]).squeeze(-1)[words != PAD].mean()
    torch.testing.assert_close(caption_loss(logits, words, PAD), by_hand)


def test_smoothing_leaves_1_minus_e_on_the_word():
    V, e = 9, 0.1
    logits, words = torch.randn(1, 4, V), torch.tensor([[4, 5, 3, 2]])
    target = torch.full((1, 4, V), e / (V - 1)).scatter(-1, words[..., None], 1 - e)
    by_hand = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(caption_loss(logits, words, PAD, e), by_hand)


def test_word_logprobs():
    logits, words = torch.randn(2, 3, 7), torch.tensor([[4, 3, PAD], [2, 2, 3]])
    got = word_logprobs(logits.bfloat16(), words, words != PAD)
    want = logits.bfloat16().float().log_softmax(-1).gather(-1, words[..., None]).squeeze(-1)
    assert got.dtype == torch.float32 and got[0, 2] == 0
    torch.testing.assert_close(got[words != PAD], want[words != PAD])


@pytest.mark.parametrize("never", [(0,), (0, 1, 2), (2, 5)])
def test_words_that_are_never_said_leave_their_probability_to_the_others(never):
    """Oracle: log-softmax without them."""
    torch.manual_seed(0)
    logits, words = 3 * torch.randn(4, 6, 9), torch.tensor([3, 4, 6, 7, 8])[torch.randint(5, (4, 6))]
    counted = torch.rand(4, 6) < 0.7
    masked = logits.index_fill(-1, torch.tensor(never), -torch.inf).requires_grad_()
    want = masked.log_softmax(-1).gather(-1, words[..., None]).squeeze(-1).masked_fill(~counted, 0)
    logits.requires_grad_()
    got = word_logprobs(logits, words, counted, never)
    torch.testing.assert_close(got, want)
    for x in (got, want):
        x.square().sum().backward()
    torch.testing.assert_close(logits.grad, masked.grad, atol=1e-5, rtol=1e-4)
    assert (got[counted] > word_logprobs(logits, words, counted)[counted]).all()


def test_baselines():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    assert advantages(rewards, "beam").tolist() == [[-2.0, -1.0, 3.0]]
    assert advantages(rewards, "sample").tolist() == [[-3.0, -1.5, 4.5]]
    assert advantages(rewards[:, :1], "greedy", torch.tensor([[3.0]])).tolist() == [[-2.0]]
    for estimator in ("beam", "sample"):
        with pytest.raises(ValueError, match=f"{estimator} compares .* k = 1 has no baseline"):
            advantages(rewards[:, :1], estimator)
    with pytest.raises(ValueError, match="greedy_rewards"):
        advantages(rewards[:, :1], "greedy")


def test_loss_of_beams_by_hand():
    logprobs = torch.tensor([[[-1.0, -3.0, 0.0, 0.0], [-2.0, -2.0, -2.0, 0.0]]])
    lengths, advantage = torch.tensor([[2, 3]]), torch.tensor([[0.5, -0.5]])
    assert scst_loss(logprobs, lengths, advantage, "beam").item() == pytest.approx((0.5 * 2 - 0.5 * 2) / 2)
    expected = (0.5 * 4 / 4 - 0.5 * 6 / 4) / 2  # M2 divides by all T positions
    assert scst_loss(logprobs, lengths, advantage, "beam", m2_norm=True).item() == pytest.approx(expected)
    assert scst_loss(logprobs, lengths, advantage, "sample").item() == pytest.approx((0.5 * 4 - 0.5 * 6) / 5)


@pytest.mark.parametrize("estimator", ["beam", "sample"])
def test_gradient_raises_what_was_rewarded(estimator):
    """Two one-word captions of one image: the one above its baseline becomes more likely, the other less."""
    logits = torch.zeros(2, 1, 5, requires_grad=True)
    words = torch.tensor([[3], [4]])
    logprobs = word_logprobs(logits, words, words != PAD).view(1, 2, 1)
    advantage = advantages(torch.tensor([[1.0, 0.0]]), estimator)
    scst_loss(logprobs, torch.ones(1, 2, dtype=torch.long), advantage, estimator).backward()
    assert logits.grad[0, 0, 3] < 0 < logits.grad[1, 0, 4]
