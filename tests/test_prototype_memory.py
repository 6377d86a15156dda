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


def filled(keys, values, prototypes: int, start=None) -> PrototypeAttention:
    """A layer whose bank holds exactly these (S, d_k) in every head; start (P, d_k): the prototypes there are."""
    layer = PrototypeAttention(D, H, prototypes, len(keys)).eval()
    layer.bank_k.copy_(keys), layer.bank_v.copy_(values)
    layer.noted.fill_(len(keys))
    if start is not None:
        layer.prototype_k.copy_(start), layer.ready.fill_(True)
    return layer


def test_a_value_is_the_mean_of_the_nearest_values_weighted_by_nearness():
    """By hand: softmax(-distance^2 / sqrt(d_k)) over the 8 nearest keys."""
    torch.manual_seed(0)
    keys, values = torch.randn(40, 4).half().float(), torch.randn(40, 4).half().float()
    layer = filled(keys, values, 5)
    assert layer.refresh(torch.Generator().manual_seed(0))
    for centre, value in zip(layer.prototype_k[0], layer.prototype_v[0], strict=True):
        squared = (keys - centre).square().sum(-1)  # (40,)
        near = squared.argsort()[:8]
        weights = (-squared[near] / 4**0.5).exp()
        torch.testing.assert_close(value, (weights[:, None] * values[near]).sum(0) / weights.sum())


def test_clustering_goes_on_from_the_prototypes_there_are():
    """Each stays with the cluster that it lies next to, in the order they had."""
    centres = torch.tensor([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5]])
    keys = centres.repeat(8, 1)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        layer = filled(keys, keys, 4, start=centres[order] * 0.9)
        assert layer.refresh(torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer.prototype_k, centres[order].expand(H, -1, -1))


def test_clustering_takes_as_many_rounds_as_it_needs():
    """0 and 1 among 0..9 on a line reach 2 and 7 in five rounds."""
    keys = torch.zeros(10, 4)
    keys[:, 0] = torch.arange(10)
    layer = filled(keys, keys, 2, start=keys[:2])
    layer.refresh()
    assert layer.prototype_k[:, :, 0].tolist() == [[2.0, 7.0]] * H


def test_a_prototype_to_which_no_key_belongs_stays_where_it_is():
    start = torch.tensor([[0.0, 0, 0, 0], [50.0, 50, 50, 50]])
    layer = filled(torch.randn(16, 4), torch.randn(16, 4), 2, start=start)
    layer.refresh()
    assert (layer.prototype_k[:, 1] == 50).all() and (layer.prototype_k[:, 0].abs() < 3).all()
    assert layer.prototype_v.isfinite().all()


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
