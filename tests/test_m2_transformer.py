"""M2 without reference data: shapes, decoding step by step, padding, several captions of an image, first loss."""

import math

import pytest
import torch

from models.m2_transformer import M2Decoder, M2Encoder, without_running

PAD, BOS, EOS = 1, 2, 3


def tiny(V: int = 30, levels: int = 2, max_len: int = 9, **more) -> tuple[M2Encoder, M2Decoder]:
    torch.manual_seed(0)
    encoder = M2Encoder(12, dim=32, layers=levels, heads=4, hidden=48, memory=3, **more)
    return encoder, M2Decoder(V, max_len, dim=32, layers=2, levels=levels, heads=4, hidden=48, **more)


def captions(rows: int, L: int, V: int = 30) -> torch.Tensor:
    """Random words after <bos>, without padding."""
    words = torch.randint(4, V, (rows, L))
    words[:, 0] = BOS
    return words


def test_shapes_names_and_frozen_positions():
    encoder, decoder = tiny()
    memory = encoder(torch.randn(3, 7, 12))
    assert memory.shape == (3, 2, 7, 32)
    assert decoder(captions(3, 5), memory).shape == (3, 5, 30)
    assert [n for n, p in decoder.named_parameters() if not p.requires_grad] == ["pos_emb.weight"]
    names = {*decoder.state_dict()}
    assert {"layers.1.fc_alpha2.weight", "layers.0.self_att.attention.fc_q.bias", "fc.weight"} <= names
    assert "fc.bias" not in names and "layers.0.enc_att.attention.m_k" not in names
    with_past = decoder.state_dict() | {"running_seq": 0, "layers.0.self_att.running_keys": 0}
    assert without_running(with_past).keys() == names


def test_every_trained_tensor_has_a_gradient():
    encoder, decoder = tiny()
    decoder(captions(4, 5), encoder(torch.randn(2, 7, 12))).logsumexp(-1).sum().backward()
    for name, p in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert not p.requires_grad or (p.grad.isfinite().all() and p.grad.any()), name


def test_first_loss_is_that_of_equal_words():
    """ln V + s^2 / 2, s^2 the variance of logits of normalised features under a Xavier matrix: D x 2 / (V + D)."""
    torch.manual_seed(0)
    V, D = 3000, 64
    encoder, decoder = M2Encoder(12, D, 2, 4, 64, 3), M2Decoder(V, 9, D, 2, 2, 4, 64)
    tokens = captions(16, 9, V)
    logits = decoder(tokens[:, :-1], encoder(torch.randn(16, 7, 12)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert abs(loss - math.log(V) - D / (V + D)) < 0.1


@torch.no_grad()
def test_step_by_step_is_teacher_forcing_also_behind_padding():
    encoder, decoder = tiny(dropout=0.0)
    memory, tokens = encoder(torch.randn(3, 7, 12)), captions(3, 9)
    tokens[1, 4] = PAD  # a decoder may say so
    tokens[2, 6:] = PAD
    whole, cache = decoder(tokens, memory), decoder.start(memory)
    steps = torch.stack([decoder.step(word, cache) for word in tokens.unbind(1)], 1)
    assert (steps - whole).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="ends at 9"):
        decoder.step(tokens[:, 0], cache)
    with pytest.raises(ValueError, match="10 words"):
        decoder(captions(3, 10), memory)
    with pytest.raises(ValueError, match="4 rows"):
        decoder(captions(4, 5), memory)


@torch.no_grad()
def test_captions_of_one_image_are_as_one_by_one():
    encoder, decoder = tiny(dropout=0.0)
    memory, tokens = encoder(torch.randn(2, 7, 12)), captions(6, 5)
    together = decoder(tokens, memory)
    single = torch.cat([decoder(tokens[i : i + 1], memory[i // 3 : i // 3 + 1]) for i in range(6)])
    assert (together - single).abs().max() <= 1e-5
    cache = decoder.start(memory)
    decoder.step(tokens[::3, 0], cache)
    cache.reorder(torch.tensor([0, 0, 0, 1, 1, 1]))
    assert (decoder.step(tokens[:, 1], cache) - together[:, 1]).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_and_later_words_change_nothing():
    encoder, decoder = tiny(dropout=0.0)
    memory, tokens = encoder(torch.randn(3, 7, 12)), captions(3, 6)
    short = decoder(tokens, memory)
    padded = torch.cat([tokens, torch.full((3, 3), PAD)], 1)
    assert (decoder(padded, memory)[:, :6] - short).abs().max() <= 1e-5
    assert not decoder(padded, memory)[:, 6:].any()  # rows of padding are 0
    later = torch.cat([tokens[:, :4], captions(3, 5)[:, 3:]], 1)
    assert (decoder(later, memory)[:, :4] - short[:, :4]).abs().max() <= 1e-5


@torch.no_grad()
def test_every_level_and_the_image_count():
    encoder, decoder = tiny(dropout=0.0)
    memory, tokens = encoder(torch.randn(3, 7, 12)), captions(3, 5)
    before = decoder(tokens, memory)
    for level in range(memory.shape[1]):
        other = memory.clone()
        other[:, level] = torch.randn_like(other[:, level])
        assert ((decoder(tokens, other) - before).abs().amax((1, 2)) > 1e-3).all(), f"level {level} is not looked at"


@torch.no_grad()
def test_bfloat16_autocast_is_close():
    encoder, decoder = tiny(dropout=0.0)
    x, tokens = torch.randn(3, 7, 12), captions(3, 5)
    exact = decoder(tokens, encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        memory = encoder(x)
        low, cache = decoder(tokens, memory), decoder.start(memory)
        step = decoder.step(tokens[:, 0], cache)
    for name, found, wanted in (("forward", low, exact), ("step", step, exact[:, 0])):
        assert found.isfinite().all() and (found.float() - wanted).abs().max() < 0.1, name
