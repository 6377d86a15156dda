"""Prototype memory: no effect before the first refresh, clusters found, values from the nearest, state in the file."""

import pytest
import torch

from models.caption_attention import Attention
from models.prototype_memory import PrototypeAttention

R, L, D, H = 3, 6, 16, 4


def made(prototypes=4, bank=64) -> PrototypeAttention:
    torch.manual_seed(0)
    return PrototypeAttention(D, H, prototypes, bank).eval()


def note_clusters(layer, centres, rounds=2, spread=0.01):
    """Words whose keys lie around `centres` (P, d_k) in every head and whose values are the cluster's number."""
    for _ in range(rounds):
        k = centres.repeat(8, 1) + spread * torch.randn(8 * len(centres), centres.shape[1])
        v = torch.arange(len(centres)).repeat(8)[:, None].expand_as(k).float()
        k, v = (x[None, None].expand(1, H, -1, -1) for x in (k, v))
        layer.note(k, v, torch.ones(1, k.shape[2], dtype=torch.bool), count=32)


def test_before_the_first_refresh_it_is_plain_attention():
    layer, plain = made(), Attention(D, H)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("fc_")})
    x = torch.randn(R, L, D)
    causal = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    for mask in (None, causal, causal.expand(R, 1, L, L)):
        torch.testing.assert_close(layer(x, x, x, mask), plain(x, x, x, mask))


def test_refresh_waits_for_enough_keys():
    layer = made(prototypes=48)
    layer.note(torch.randn(R, H, L, 4), torch.randn(R, H, L, 4), torch.ones(R, L, dtype=torch.bool), count=32)
    assert not layer.refresh() and not layer.ready and not layer.prototype_k.any()


def test_clusters_and_their_values_are_found():
    layer = made()
    centres = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5]])
    note_clusters(layer, centres)
    for seed in range(20):  # Lloyd's algorithm may settle in a worse place; some start must find all four
        layer.ready.fill_(False)
        assert layer.refresh(torch.Generator().manual_seed(seed))
        far = torch.cdist(layer.prototype_k, centres.expand(H, -1, -1))  # (H, P, 4)
        if far.min(1).values.max() < 0.1:
            break
    assert far.min(1).values.max() < 0.1
    torch.testing.assert_close(layer.prototype_v[..., 0], far.argmin(-1).float())
    x = torch.randn(R, L, D)
    assert not torch.allclose(layer(x, x, x), made()(x, x, x)), "prototypes must be attended to"


def test_only_words_that_are_seen_are_noted():
    layer = made()
    k = torch.cat([torch.ones(2, H, 1, 4), torch.full((2, H, 2, 4), 9.0)], 2)
    layer.note(k, k, torch.tensor([[True, False, False], [True, False, False]]), count=40)
    assert (layer.bank_k[:, :40] == 1).all() and not layer.bank_k[:, 40:].any() and layer.noted == 40
    layer.note(k, k, torch.tensor([[False, True, True], [False, False, False]]), count=40)
    assert (layer.bank_k[:, 40:] == 9).all() and (layer.bank_k[:, :16] == 9).all(), "the bank is a ring"


def test_all_of_it_lies_in_the_state_dict():
    layer = made()
    note_clusters(layer, torch.eye(4) * 3)
    layer.refresh()
    other = made()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(R, L, D)
    assert torch.equal(other(x, x, x), layer(x, x, x))
    layer.refresh(), other.refresh()
    assert torch.equal(other.prototype_k, layer.prototype_k)


def test_gradients_reach_the_segments_before_and_after():
    layer = made()
    for ready in (False, True):
        if ready:
            note_clusters(layer, torch.eye(4) * 3)
            layer.refresh()
        x = torch.randn(R, L, D, requires_grad=True)
        layer(x, x, x).square().sum().backward()
        assert layer.segment.grad is not None and layer.segment.grad[1].any() == ready
        layer.zero_grad(set_to_none=True)


def test_more_prototypes_than_keys_are_refused():
    with pytest.raises(ValueError, match="cannot come from a bank"):
        PrototypeAttention(D, H, 65, 64)
