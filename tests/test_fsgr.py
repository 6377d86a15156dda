"""FSGR as a whole: encodings, decoder protocol, checkpoints, word table. Stored arrays: test_reference_fsgr_modules.py."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from data.caption_vocab import CaptionVocab
from data.coco_classes import COCO_80
from models import fsgr
from models.caption_losses import caption_loss
from models.clip import CLIPConfig, load_clip, load_tokenizer, save_tiny_snapshot
from models.clip_adapter import AdaptedCLIP, AdapterConfig
from models.fsgr import FSGR, FSGRDecoder, FSGREncoder, build_word_table, expected_loss, preset, vocab_sha
from models.semantic_head import build_codebook, dense_ce_loss, supcon_loss
from utils import run
from utils.run import UserError

VOCAB = [*fsgr.SPECIALS, *(f"word{i}" for i in range(46))]
NAMES = [f"thing {i}" for i in range(7)]
SMALL = asdict(CLIPConfig(image_size=64, width=64, layers=2, heads=2, mlp=128, embed_dim=32, text_width=64,
                          text_layers=1, text_heads=2, text_mlp=128, vocab_size=514, eot=513))  # fmt: skip
EACH = pytest.mark.parametrize("changes", [{}, {"semantic": False}, {"tie_weights": True}, {"arch": "m2"}], ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def config(arch: str = "fsgr", **changes) -> fsgr.FSGRConfig:
    """4 x 4 patches."""
    return preset(
        "tiny", arch=arch, **{"vocab": VOCAB, "codebook_names": NAMES, "clip": SMALL, "image_size": 64, **changes}
    )


def make(**changes) -> FSGR:
    """A model without symmetry: adapters and norms are no longer what they start as."""
    model = FSGR(config(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def inputs(B: int = 2, k: int = 1, L: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and captions of which every second ends early."""
    tokens = torch.randint(4, len(VOCAB), (B * k, L))
    tokens[:, 0] = fsgr.BOS
    tokens[::2, -3], tokens[::2, -2:] = fsgr.EOS, fsgr.PAD
    return torch.randn(B, 3, 64, 64), tokens


# ---- geometry


def test_sine_encoding_tells_rows_from_columns():
    pos = fsgr.sine_encoding(3, 5, 16).view(3, 5, 16)
    assert torch.equal(pos[:, 0, :8], pos[:, 4, :8]), "the first half is y alone"
    assert torch.equal(pos[0, :, 8:], pos[2, :, 8:]), "the second half is x alone"
    assert len(pos.flatten(0, 1).unique(dim=0)) == 15
    assert torch.allclose(pos[2, 0, 0], torch.tensor(2 * math.pi).sin(), atol=1e-5), "the last row is at 2 pi"
    with pytest.raises(ValueError, match="multiple of 4"):
        fsgr.sine_encoding(3, 5, 18)


def test_box_relation_is_the_formula():
    h, w, i, j = 3, 4, 1 * 4 + 3, 2 * 4 + 1  # (row 1, column 3) to (row 2, column 1)
    found = fsgr.box_relation(h, w)
    offsets = [math.log((1 / h) / (1 / h + 1)), math.log((2 / w) / (1 / w + 1)), 0.0, 0.0]
    angles = torch.tensor([[100 * o / 1000 ** (f / 8) for f in range(8)] for o in offsets]).flatten()
    assert found.shape == (12, 12, 64)
    assert torch.allclose(found[i, j], torch.cat([angles.sin(), angles.cos()]), atol=1e-3)
    assert torch.allclose(found, found.transpose(0, 1), atol=1e-3), "cells are alike, so the relation is mutual"


def test_geometry_has_no_batch_dimension_and_is_shared_by_the_layers():
    encoder = FSGREncoder((4, 4), 32, 64, 4, 128, 3)
    assert encoder.geometry().shape == (1, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.geometry().dtype == torch.float32
    calls = []
    encoder.geometry = lambda whole=encoder.geometry: calls.append(1) or whole()
    encoder(torch.randn(5, 16, 64), torch.randn(5, 16, 32))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="16 patches"):
        encoder(torch.randn(5, 15, 64), torch.randn(5, 15, 32))
    with pytest.raises(ValueError, match="text None"):
        encoder(torch.randn(5, 16, 64))


def test_geometry_changes_what_patches_look_at():
    model = make().eval()
    images, tokens = inputs()
    before = model(images, tokens)["logits"]
    with torch.no_grad():
        for gate in model.encoder.WGs:
            gate.weight.add_(torch.randn_like(gate.weight))
    assert not torch.allclose(model(images, tokens)["logits"], before, atol=1e-3)


# ---- the whole model


@EACH
@torch.no_grad()
def test_shapes_and_what_the_output_depends_on(changes):
    model = make(**changes)
    images, tokens = inputs()
    out = model(images, tokens)
    assert out["logits"].shape == (2, 7, len(VOCAB))
    want = {"features": (2, 16, 64), "index": (2, 16), "dense_logits": (2, 16, 7)}
    want = {} if "arch" in changes else {"features": (2, 16, 64)} if "semantic" in changes else want
    assert {name: tuple(t.shape) for name, t in out.items() if name != "logits"} == want
    if "features" in want:
        assert torch.allclose(out["features"].norm(dim=-1), torch.ones(2, 16), atol=1e-5)
    changed = model(torch.cat([images[:1], torch.randn(1, 3, 64, 64)]), tokens)["logits"]
    assert torch.allclose(changed[0], out["logits"][0], atol=1e-5), "the other image does not matter"
    assert (changed[1] - out["logits"][1]).abs().max() > 1e-2, "its own image does"
    assert torch.allclose(model(images.flip(0), tokens.flip(0))["logits"].flip(0), out["logits"], atol=1e-5)
    words = tokens.clone()
    words[:, 3] = 4 + (words[:, 3] + 1 - 4) % 46
    later = model(images, words)["logits"]
    assert torch.allclose(later[:, :3], out["logits"][:, :3], atol=1e-5), "a word is not seen by earlier ones"
    assert (later[:, 3] - out["logits"][:, 3]).abs().max() > 1e-2


@torch.no_grad()
def test_each_input_of_the_encoder_is_used():
    encoder = FSGREncoder((4, 4), 32, 64, 4, 128).eval()
    visual, text = torch.randn(2, 16, 64), torch.randn(2, 16, 32)
    out, pos = encoder(visual, text)
    for other in ((torch.randn(2, 16, 64), text), (visual, torch.randn(2, 16, 32))):
        assert (encoder(*other)[0] - out).abs().max() > 0.1
    swapped = encoder(visual.flip(1), text.flip(1))[0]
    assert (swapped.flip(1) - out).abs().max() > 1e-3, "places matter"
    assert pos.shape == (1, 16, 64)


@EACH
@torch.no_grad()
def test_steps_equal_teacher_forcing(changes):
    model = make(**changes)
    images, tokens = inputs(3)
    tokens[1, 3] = fsgr.PAD  # an untrained model may say so in the middle
    memory, _ = model.encode(images)
    want, cache = model.decoder(tokens, memory), model.decoder.start(memory)
    for t in range(tokens.shape[1]):
        assert torch.allclose(model.decoder.step(tokens[:, t], cache), want[:, t], atol=1e-5), t
    assert cache.length == tokens.shape[1]


@EACH
@torch.no_grad()
def test_captions_of_an_image_equal_one_by_one(changes):
    model = make(**changes)
    images, tokens = inputs(2, k=3)
    together = model(images, tokens)["logits"]
    alone = model(images.repeat_interleave(3, 0), tokens)["logits"]
    assert torch.allclose(together, alone, atol=1e-5)
    memory, _ = model.encode(images)
    cache = model.decoder.start(memory)
    model.decoder.step(torch.full((2,), fsgr.BOS), cache)
    cache.reorder(torch.arange(2).repeat_interleave(3))
    assert torch.allclose(model.decoder.step(tokens[:, 1], cache), alone[:, 1], atol=1e-5)
    with pytest.raises(ValueError, match="3 images|for 2 images"):
        model.decoder(tokens[:5], memory)


@EACH
@torch.no_grad()
def test_padding_changes_nothing(changes):
    model = make(**changes)
    images, tokens = inputs()
    longer = F.pad(tokens, (0, 4), value=fsgr.PAD)
    assert torch.allclose(model(images, longer)["logits"][:, :7], model(images, tokens)["logits"], atol=1e-5)


@torch.no_grad()
def test_padding_within_a_caption_is_not_seen():
    model = make()
    images, tokens = inputs()
    tokens[:, 2] = fsgr.PAD
    before, real = model(images, tokens)["logits"], tokens != fsgr.PAD
    model.decoder.word_emb.weight[fsgr.PAD] += 1
    assert torch.allclose(model(images, tokens)["logits"][real], before[real], atol=1e-5)


@EACH
@torch.no_grad()
def test_bf16_is_finite_and_close(changes):
    model = make(**changes)
    images, tokens = inputs()
    want = model(images, tokens)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        memory, _ = model.encode(images)
        found = model(images, tokens)["logits"]
        model.decoder.step(tokens[:, 0], model.decoder.start(memory))
    assert found.isfinite().all()
    assert (found.float() - want).abs().mean() < 0.05 * want.abs().mean(), "on average a few per cent"


def test_positions_end_where_the_table_does():
    decoder = FSGRDecoder(len(VOCAB), 5, 64, 4, 128, 1).eval()
    memory = (torch.randn(1, 16, 64), torch.randn(1, 16, 64))
    with pytest.raises(ValueError, match="at most 5"):
        decoder(torch.full((1, 6), 4), memory)
    cache = decoder.start(memory)
    for _ in range(5):
        decoder.step(torch.tensor([4]), cache)
    with pytest.raises(ValueError, match="ends at 5"):
        decoder.step(torch.tensor([4]), cache)


# ---- training


@EACH
def test_every_trainable_parameter_gets_a_gradient_and_clip_none(changes):
    model = make(**changes).train()
    images, tokens = inputs(k=2)
    out = model(images, tokens[:, :-1])
    caption_loss(out["logits"], tokens[:, 1:], fsgr.PAD).backward()
    for name, p in model.named_parameters():
        own = not name.startswith("backbone.") or "S_Adapter" in name or "prompt" in name
        assert p.requires_grad == (own and name != "decoder.pos_emb.weight" or own and "arch" not in changes), name
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or p.grad.isfinite().all(), name
    assert not model.decoder.word_emb.weight.grad[fsgr.PAD].any() or "tie_weights" in changes, "padding is not trained"


def test_losses_on_patches_reach_adapters():
    model = make().train()
    images, tokens = inputs()
    labels = torch.randint(-1, 7, (2, 16))
    for loss in (lambda out: supcon_loss(out["features"].flatten(0, 1), labels.flatten()),
                 lambda out: dense_ce_loss(out["dense_logits"], labels)):  # fmt: skip
        model.zero_grad()
        loss(model(images, tokens)).backward()
        grads = [p.grad for name, p in model.named_parameters() if "S_Adapter" in name]
        assert all(g is not None and g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("tied", [False, True])
def test_first_loss_is_the_expected_one(tied):
    V, D = 10_201, 512
    decoder = FSGRDecoder(V, dim=D, d_ff=512, layers=1, tie_weights=tied).eval()
    model = torch.nn.Module()
    model.decoder = decoder
    want = expected_loss(model)
    assert abs(want - (9.730 if tied else 9.278)) < 0.005, want
    tokens = torch.randint(4, V, (2, 16, 40))  # 640 words: a logit's spread of 1 moves their mean by 0.04
    with torch.no_grad():
        logits = decoder(tokens[0], (torch.randn(16, 9, D), torch.randn(1, 9, D)))
    measured = caption_loss(logits, tokens[1], fsgr.PAD).item()
    assert abs(measured - want) < 0.1, (measured, want)


@pytest.mark.parametrize("arch", ["fsgr", "m2"])
def test_parameter_counts_of_the_full_size(arch):
    with torch.device("meta"):
        model = FSGR(preset("vit_b16", [*fsgr.SPECIALS, *map(str, range(10_197))], COCO_80, arch))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    trained = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert trained == 1_775_232 + 1_536, "six adapters, the output norm"
    if arch == "fsgr":
        captioner = sum(n for name, n in count.items() if name != "backbone")
        assert abs(captioner / 34.8e6 - 1) < 0.02, count
        assert abs((count["encoder"] + count["att_embed"]) / 7.5e6 - 1) < 0.05, count
        assert set(count) == {"backbone", "att_embed", "head", "encoder", "decoder"}


# ---- configuration and checkpoints


@EACH
@torch.no_grad()
def test_checkpoint_round_trip_is_exact(changes, tmp_path):
    model = make(**changes)
    if model.cfg.semantic:
        model.set_codebook(F.normalize(torch.randn(7, 32), dim=1), 3.5, "here")
    folder = run.save_checkpoint(tmp_path, 1, model, model.config_dict(), {})
    again = FSGR.from_checkpoint(folder).eval()
    assert again.cfg == model.cfg
    images, tokens = inputs()
    for name, t in model(images, tokens).items():
        assert torch.equal(again(images, tokens)[name], t), name


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    model = FSGR(config())
    folder = run.save_checkpoint(tmp_path, 1, model, model.config_dict(), {})
    config_file = folder / "config.json"
    text = config_file.read_text()
    for edit, sentence in (
        (lambda c: c.update({"class": "TempoPeak"}), "a checkpoint of TempoPeak"),
        (lambda c: c["model"].update(dim=32), "does not fit FSGR"),
        (lambda c: c["model"].update(dim=30), "not a configuration"),
        (lambda c: c["model"].update(colour=1), "not a configuration"),
        (lambda c: c["model"].update(vocab=VOCAB[:-1]), "does not fit FSGR"),
        (lambda c: c["model"].update(word_table_sha="0" * 64), "another vocabulary"),
    ):
        broken = json.loads(text)
        edit(broken)
        config_file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=sentence):
            FSGR.from_checkpoint(folder)


def test_configurations_that_do_not_fit_together_are_refused():
    for changes, sentence in (
        ({"arch": "lstm"}, "arch 'lstm'"),
        ({"vocab": VOCAB[4:]}, "vocab starts with"),
        ({"codebook_names": []}, "codebook_names"),
        ({"image_size": 70}, "multiple of the patch"),
        ({"arch": "m2", "tie_weights": True}, "tie_weights"),
        ({"resize": "stretch"}, "resize"),
    ):
        with pytest.raises(ValueError, match=sentence):
            FSGR(config(**changes))
    with pytest.raises(ValueError, match="preset 'huge'"):
        preset("huge", VOCAB, NAMES)


def test_configuration_reaches_the_parts():
    model = FSGR(config(top_k=3, tau=0.5, count_norm=True, max_len=9, dropout=0.3, enc_layers=1, dec_layers=2))
    assert (model.head.top_k, model.head.tau, model.head.count_norm) == (3, 0.5, True)
    assert (len(model.encoder.layers), len(model.decoder.layers), model.decoder.max_len) == (1, 2, 9)
    rates = {m.p for part in (model.att_embed, model.encoder, model.decoder) for m in part.modules()
             if isinstance(m, torch.nn.Dropout)}  # fmt: skip
    assert rates == {0.3}
    m2 = FSGR(config("m2", memory=6, enc_layers=2, dec_layers=1, max_len=9))
    assert m2.encoder.layers[0].mhatt.attention.memory == 6
    assert (len(m2.encoder.layers), len(m2.decoder.layers), m2.decoder.max_len) == (2, 1, 9)


def test_a_larger_picture_has_more_patches():
    model = make(image_size=96)
    assert model.encode(torch.randn(1, 3, 96, 96))[1]["index"].shape == (1, 36)
    with pytest.raises(ValueError, match="36 patches"):
        model.encode(torch.randn(1, 3, 64, 64))


# ---- codebook and word table


def test_word_table_of_another_vocabulary_is_refused():
    model = FSGR(config())
    before, sha = model.decoder.word_emb.weight.clone(), vocab_sha(VOCAB)
    table = F.normalize(torch.randn(50, 64), dim=1)
    for wrong in ((table[:49], sha), (F.pad(table, (0, 0, 0, 1)), sha), (table, vocab_sha(VOCAB[::-1])),
                  (table[:, :63], sha)):  # fmt: skip
        with pytest.raises(UserError, match="word table"):
            model.set_word_table(*wrong)
        assert torch.equal(model.decoder.word_emb.weight, before), "nothing is copied"
        assert model.cfg.word_init == "random"
    model.set_word_table(table, sha)
    assert torch.equal(model.decoder.word_emb.weight[2:], table[2:]) and torch.equal(
        model.decoder.word_emb.weight[0], table[0]
    )
    assert not model.decoder.word_emb.weight[fsgr.PAD].any(), "the row of padding is zero"
    assert (model.cfg.word_init, model.cfg.word_table_sha) == ("clip", sha)


def test_vocabulary_hash_is_that_of_the_vocabulary_file():
    words = [*fsgr.SPECIALS, "a", "caf\u00e9", 'quote"']
    assert vocab_sha(words) == CaptionVocab(words).sha256


def test_codebook_of_other_names_is_refused():
    model = FSGR(config())
    for wrong in (torch.randn(6, 32), torch.randn(7, 31)):
        with pytest.raises(UserError, match="codebook"):
            model.set_codebook(wrong, 4.6, "there")
    assert model.cfg.codebook_source == "random"
    with pytest.raises(ValueError, match="no semantic head"):
        FSGR(config("m2")).set_codebook(torch.randn(7, 32), 4.6, "there")


def test_codebook_and_table_from_a_local_text_tower(tmp_path):
    clip = CLIPConfig(**{**SMALL, "embed_dim": 64})
    save_tiny_snapshot(tmp_path, clip)
    tower, tokenizer = load_clip(tmp_path), load_tokenizer(tmp_path)
    model = FSGR(config(clip=asdict(clip)))
    model.backbone.load_vision(tower.visual.state_dict())
    model.set_codebook(build_codebook(tower.encode_text, tokenizer, NAMES), tower.logit_scale.item(), "a tiny snapshot")
    generator = torch.Generator().manual_seed(0)
    table = build_word_table(tower.encode_text, tokenizer, VOCAB, generator=generator)
    model.set_word_table(table, vocab_sha(VOCAB))
    assert torch.allclose(table[4:].norm(dim=1), torch.ones(46)), "unit rows"
    assert not table[fsgr.PAD].any() and 0.005 < table[[0, 2, 3]].std() < 0.05
    word = F.normalize(tower.encode_text(tokenizer(["word7"])).detach(), dim=-1)[0]
    assert torch.allclose(table[VOCAB.index("word7")], word, atol=1e-5), "each row is its own word's"
    assert torch.allclose(model.head.log_scale, tower.logit_scale)
    plain = AdaptedCLIP(clip, AdapterConfig(**model.cfg.adapter))
    plain.load_vision(tower.visual.state_dict())
    images, _ = inputs()
    _, aux = model.eval().encode(images)
    align = plain.eval()(images)["align"]
    assert torch.allclose(aux["dense_logits"], tower.logit_scale.exp() * align @ model.head.codebook.T, atol=1e-4)
