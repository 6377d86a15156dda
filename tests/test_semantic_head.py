"""The semantic head, its losses and the codebook: what the stored cases cannot show."""

import pytest
import torch
import torch.nn.functional as F

from models import semantic_head
from models.semantic_head import SemanticHead, build_codebook, dense_ce_loss, embed_texts, supcon_loss


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- head


def test_index_is_the_best_text_when_all_are_kept():
    codebook, whole, align = unit(9, 6), unit(2, 6), unit(2, 15, 6)
    found = SemanticHead(codebook, 2.0, top_k=50).eval()(whole, align, dense=True)
    assert found["logits"].shape == (2, 15, 9), "top_k is clamped to K"
    assert torch.equal(found["index"], (align @ codebook.T).argmax(-1))
    assert torch.equal(found["text_grid"], codebook[found["index"]]), "a patch gets its text, whole"
    assert torch.allclose(found["dense_logits"], torch.tensor(2.0).exp() * align @ codebook.T, atol=1e-5)


def test_only_preselected_texts_are_used():
    codebook, whole, align = unit(30, 6), unit(3, 6), unit(3, 50, 6)
    for head in (SemanticHead(codebook, 2.0, top_k=4).eval(), SemanticHead(codebook, 2.0, top_k=4).train()):
        found = head(whole, align)
        kept = (whole @ codebook.T).topk(4).indices
        assert (found["index"][..., None] == kept[:, None]).any(-1).all()
        assert torch.allclose(found["text_grid"], codebook[found["index"]], atol=1e-5)
        assert "dense_logits" not in found


def test_count_norm_divides_by_one_more_than_the_patches_of_a_text():
    codebook, whole, align = unit(5, 6), unit(2, 6), unit(2, 40, 6)
    plain = SemanticHead(codebook, 2.0, 5).eval()(whole, align)
    normed = SemanticHead(codebook, 2.0, 5, count_norm=True).eval()(whole, align)
    shared = F.one_hot(plain["index"], 5).sum(1).gather(1, plain["index"])  # (B, N)
    assert torch.allclose(normed["text_grid"], plain["text_grid"] / (shared[..., None] + 1), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_goes_straight_through(training):
    align = unit(2, 12, 6).requires_grad_()
    head = SemanticHead(unit(9, 6), 1.0, 5).train(training)
    (head(unit(2, 6), align)["text_grid"] * torch.randn(2, 12, 6)).sum().backward()
    assert align.grad.isfinite().all() and (align.grad.abs().sum(-1) > 0).all()
    assert not list(head.parameters()), "codebook and scale are frozen"
    assert set(head.state_dict()) == {"codebook", "log_scale"}, "and saved"


def test_training_draws_texts_as_their_softmax_says():
    codebook, whole = unit(4, 6), unit(1, 6)
    align = unit(1, 1, 6).expand(1, 20_000, 6)
    found = SemanticHead(codebook, 0.5, 4).train()(whole, align)
    share = torch.bincount(found["index"].flatten(), minlength=4) / 20_000
    want = (torch.tensor(0.5).exp() * align[0, 0] @ codebook.T).softmax(-1)
    assert torch.allclose(share, want, atol=0.02)


def test_autocast_does_not_round_the_logits():
    head, whole, align = SemanticHead(unit(9, 6), 4.6, 5).eval(), unit(2, 6), unit(2, 12, 6)
    want = head(whole, align, dense=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(whole, align, dense=True)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_head_refuses_what_makes_no_sense():
    for changes in ({"top_k": 0}, {"tau": 0.0}, {"codebook": unit(4)}):
        with pytest.raises(ValueError, match="SemanticHead"):
            SemanticHead(**{"codebook": unit(4, 3), "log_scale": 1.0, **changes})


# ---- losses


def supcon_by_hand(features, labels, tau, ignore=-1):
    """The definition, pair by pair."""
    kept = [i for i in range(len(labels)) if labels[i] != ignore]
    total = 0.0
    for i in kept:
        others = [a for a in kept if a != i]
        positive = [p for p in others if labels[p] == labels[i]]
        if positive:
            denominator = torch.stack([(features[i] @ features[a] / tau).exp() for a in others]).sum().log()
            total += sum(denominator - features[i] @ features[p] / tau for p in positive) / len(positive)
    return total / len(kept)


def test_supcon_is_its_definition_and_leaves_ignored_patches_out():
    features, labels = unit(24, 5), torch.randint(-1, 4, (24,))
    labels[0] = 99  # no second one: counts 0
    want = supcon_by_hand(features, labels, 0.2)
    assert torch.allclose(supcon_loss(features, labels, 0.2), want, atol=1e-5)
    moved = features.clone()
    moved[labels == -1] = unit(int((labels == -1).sum()), 5)
    assert torch.allclose(supcon_loss(moved, labels, 0.2), want, atol=1e-5)


def test_supcon_pulls_patches_of_one_label_together():
    features, labels = unit(40, 8).requires_grad_(), torch.arange(40) % 4
    supcon_loss(features, labels).backward()
    after = F.normalize(features.detach() - features.grad, dim=-1)

    def contrast(x):
        same = labels[:, None] == labels
        return (x @ x.T)[same].mean() - (x @ x.T)[~same].mean()

    assert contrast(after) > contrast(features.detach()) + 0.01


def test_supcon_with_sampled_anchors_is_unbiased_and_repeatable():
    features, labels = unit(60, 8), torch.randint(-1, 5, (60,))
    full = supcon_loss(features, labels, 0.2)
    g = torch.Generator().manual_seed(1)
    few = torch.stack([supcon_loss(features, labels, 0.2, max_anchors=20, generator=g) for _ in range(400)])
    assert few.std() > 0, "anchors are drawn"
    assert abs(few.mean() - full) < 4 * few.std() / 20, (few.mean(), full)
    labels[12:] = -1
    assert torch.allclose(supcon_loss(features, labels, 0.2, 12), supcon_loss(features, labels, 0.2)), (
        "no place is lost"
    )
    again = [supcon_loss(features, labels, 0.2, 20, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("labels", [[-1] * 6, [-1, -1, 4, -1, -1, -1], [0, 1, 2, 3, 4, 5]])
def test_supcon_without_pairs_is_0_with_a_gradient(labels):
    features = unit(6, 4).requires_grad_()
    loss = supcon_loss(features, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0 and torch.equal(features.grad, torch.zeros_like(features))


def test_dense_ce_is_the_mean_over_labelled_patches():
    logits, labels = torch.randn(2, 7, 5), torch.randint(-1, 5, (2, 7))
    kept = labels >= 0
    assert torch.allclose(dense_ce_loss(logits, labels), F.cross_entropy(logits[kept], labels[kept]))
    logits.requires_grad_()
    nothing = dense_ce_loss(logits, torch.full((2, 7), -1))
    nothing.backward()
    assert nothing.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_losses_refuse_other_shapes():
    with pytest.raises(ValueError, match="supcon_loss"):
        supcon_loss(unit(6, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="dense_ce_loss"):
        dense_ce_loss(torch.randn(2, 7, 5), torch.zeros(2, 6, dtype=torch.long))


# ---- codebook


END, CONTEXT = 300, 32
TABLE = torch.randn(END + 1, 6, generator=torch.Generator().manual_seed(0))


def tokenizer(texts):
    """Bytes, an end token, and the end token again as padding."""
    rows = [[*t.encode(), *[END] * CONTEXT][: CONTEXT - 1] + [END] for t in texts]
    return torch.tensor(rows)


def encode_text(tokens):
    """Bag of the words before the first end token: like a causal tower, blind for what follows it."""
    before = (tokens == END).int().cumsum(1) == 0
    return (TABLE[tokens] * before[..., None]).sum(1) * 7


def test_codebook_is_the_mean_of_unit_embeddings():
    names, templates = ["cat", "traffic light"], ["a {}.", "the {}"]
    found = build_codebook(encode_text, tokenizer, names, templates)
    for name, row in zip(names, found, strict=True):
        each = [F.normalize(encode_text(tokenizer([t.format(name)]))[0], dim=0) for t in templates]
        assert torch.allclose(row, F.normalize(torch.stack(each).mean(0), dim=0), atol=1e-6)
    assert all("{}" in t for t in semantic_head.TEMPLATES)


def test_texts_are_embedded_in_batches_and_cut_after_the_longest():
    texts, lengths = ["a", "abc", "to and fro", "x y", "last"], []

    def noting(tokens):
        lengths.append(tuple(tokens.shape))
        return encode_text(tokens)

    whole = embed_texts(encode_text, tokenizer, texts)
    assert torch.equal(embed_texts(noting, tokenizer, texts, batch=2), whole)
    assert lengths == [(2, 4), (2, 11), (1, 5)], "the longest text of a batch and its end token"
    assert torch.allclose(whole.norm(dim=1), torch.ones(5))


def test_codebook_refuses_doubled_names():
    for names in (["cat", "cat"], []):
        with pytest.raises(ValueError, match="build_codebook"):
            build_codebook(encode_text, tokenizer, names)
