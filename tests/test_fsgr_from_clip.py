"""A new captioner around a local CLIP: tower, codebook and word table are that CLIP's, or the run is refused."""

import pytest
import torch
import torch.nn.functional as F

from models.clip import load_clip, load_tokenizer, save_tiny_snapshot
from models.fsgr_from_clip import new_captioner
from utils.run import UserError

VOCAB = ["<unk>", "<pad>", "<bos>", "<eos>", "dog", "a", "runs"]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_snapshot(folder)
    return folder


def test_words_start_as_their_text_embeddings(snapshot):
    torch.manual_seed(0)
    model = new_captioner("tiny", VOCAB, ["dog", "cat"], clip=snapshot, word_init="clip", dim=32)
    clip, tokenizer = load_clip(snapshot), load_tokenizer(snapshot)
    with torch.no_grad():
        want = F.normalize(clip.encode_text(tokenizer(VOCAB[4:])), dim=-1)
    table = model.decoder.word_emb.weight
    torch.testing.assert_close(table[4:], want, atol=1e-6, rtol=1e-5)
    assert not table[1].any() and model.cfg.word_init == "clip" and len(model.cfg.word_table_sha) == 64
    assert 0 < table[[0, 2, 3]].abs().max() < 0.2


def test_a_table_of_another_width_is_refused(snapshot):
    with pytest.raises(UserError, match="32 channels, the decoder has 64"):
        new_captioner("tiny", VOCAB, ["dog", "cat"], clip=snapshot, word_init="clip")


def test_a_table_file_gives_the_codebook(snapshot, tmp_path):
    rows = torch.randn(2, 32)
    torch.save({"embeds": rows}, tmp_path / "table.pt")
    model = new_captioner("tiny", VOCAB, ["dog", "cat"], clip=snapshot, table=tmp_path / "table.pt")
    torch.testing.assert_close(model.head.codebook, F.normalize(rows, dim=-1))
    torch.save({"a": rows, "b": rows}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="2 tensors, expected one"):
        new_captioner("tiny", VOCAB, ["dog", "cat"], table=tmp_path / "two.pt")


@pytest.mark.parametrize(
    ("more", "words"),
    [({"word_init": "clip"}, "no CLIP weights are given"), ({"image_size": 100}, "multiple of the patch")],
)
def test_what_does_not_fit_is_refused(more, words):
    with pytest.raises(UserError, match=words):
        new_captioner("tiny", VOCAB, ["dog", "cat"], **more)
