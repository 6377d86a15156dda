"""data/caption_vocab.py: the word rule, encoding and decoding, files, and what is refused."""

import gzip
import json
import pickle

import pytest
import torch

from data.caption_vocab import BOS, EOS, PAD, SPECIALS, UNK, CaptionVocab, check_tokens, words
from utils.run import UserError

FREQS = {"a": 9, "man": 5, "dog": 5, "rare": 4, "zebra": 7}


def test_words_are_ptb_tokens_split_at_hyphens():
    assert words("A man's T-shirt, black/white!") == ["a", "man", "'s", "t", "shirt", "black/white"]
    assert words("3-way street -- left-hand") == ["3", "way", "street", "left", "hand"]
    assert words("  ...  ") == [] and words("") == []


def test_the_commonest_come_first_and_equals_by_the_alphabet():
    vocab = CaptionVocab.from_freqs(FREQS)
    assert vocab.itos == [*SPECIALS, "a", "zebra", "dog", "man"] and len(vocab) == 8
    assert CaptionVocab.from_freqs(FREQS, 4).itos[-1] == "rare"
    captions = ["A dog.", "a dog", "A man", "<eos> a"]
    assert CaptionVocab.build(captions, 2).itos == [*SPECIALS, "a", "dog"]
    assert CaptionVocab.build(captions, 1).itos.count("<eos>") == 1
    with pytest.raises(ValueError, match="min_freq 0"):
        CaptionVocab.from_freqs(FREQS, 0)


@pytest.mark.parametrize("captions", [["A dog.", "a dog", "A dog runs"], ["...", "!"], [], ["<eos> <pad>"] * 5])
def test_a_vocabulary_without_words_is_refused(tmp_path, captions):
    with pytest.raises(UserError, match=r"no word occurs 5 times or more \(\d words.*lower --min-freq"):
        CaptionVocab.build(captions, 5)
    with pytest.raises(UserError, match="holds no word beside the specials"):
        CaptionVocab(list(SPECIALS))
    for freqs in ({}, {"dog": 3}):
        content = {"itos": SPECIALS, "freqs": freqs, "min_freq": 5, "tokenizer": "ptb"}
        (tmp_path / "v.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"v\.json: vocabulary: holds no word beside the specials; build it anew"):
            CaptionVocab.load(tmp_path / "v.json")


def test_encode():
    vocab = CaptionVocab.from_freqs(FREQS)
    assert vocab.encode("A zebra, a rare dog.") == [BOS, 4, 5, 4, UNK, 6, EOS]
    assert vocab.encode("") == [BOS, EOS]
    long = vocab.encode("a man " * 60)
    assert len(long) == 54 and long[-1] == EOS and long.count(EOS) == 1
    assert vocab.encode("a man a dog", max_len=4) == [BOS, 4, 7, EOS]
    assert vocab.encode("a <eos> <pad> <bos> dog", 99)[1:-1] == [4, *[UNK] * 3, 6]  # text that looks like a special
    with pytest.raises(ValueError, match="max_len 2"):
        vocab.encode("a", 2)


def test_decode():
    vocab = CaptionVocab.from_freqs(FREQS)
    ids = [BOS, 4, 4, 7, 7, 7, 5, EOS, 6, PAD]
    assert vocab.decode(ids) == "a man zebra"
    assert vocab.decode(torch.tensor(ids), collapse_repeats=False) == "a a man man man zebra"
    assert vocab.decode([4, 7]) == "a man" and vocab.decode([EOS]) == "" and vocab.decode([]) == ""
    assert vocab.decode([4, PAD, PAD]) == "a" and vocab.decode([UNK]) == "<unk>"
    assert vocab.decode(vocab.encode("a man, a dog")) == "a man a dog"
    for ids in ([8], [-1]):
        with pytest.raises(ValueError, match=r"expected 0\.\.7"):
            vocab.decode(ids)


def test_unknown_words_are_counted():
    assert CaptionVocab.from_freqs(FREQS).count_unknown(["a rare dog", "A man!", ""]) == (1, 5)


def test_save_and_load(tmp_path):
    vocab = CaptionVocab.from_freqs({**FREQS, "café": 6, "\n": 8}, 5)
    vocab.save(tmp_path / "v.json")
    assert [p.name for p in tmp_path.iterdir()] == ["v.json"]
    again = CaptionVocab.load(tmp_path / "v.json")
    assert again == vocab and again.sha256 == vocab.sha256 and again.stoi == vocab.stoi
    (tmp_path / "v.json.gz").write_bytes(gzip.compress((tmp_path / "v.json").read_bytes()))
    assert CaptionVocab.load(tmp_path / "v.json.gz") == vocab
    assert set(json.loads((tmp_path / "v.json").read_text())) == {"itos", "freqs", "min_freq", "tokenizer"}
    assert CaptionVocab(vocab.itos[:-2] + vocab.itos[:-3:-1]).sha256 != vocab.sha256  # the order counts
    assert CaptionVocab(vocab.itos).sha256 == vocab.sha256  # the counts do not


def test_m2_layout_is_read_as_min_freq_5(tmp_path):
    want = CaptionVocab.from_freqs(FREQS)
    (tmp_path / "m2.json").write_text(json.dumps({"itos": want.itos, "freqs": FREQS}))
    assert CaptionVocab.load(tmp_path / "m2.json") == CaptionVocab.import_m2(tmp_path / "m2.json") == want


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c["itos"].insert(0, "a"), "starts with"),
        (lambda c: c["itos"].append("a"), "'a' stands in it twice"),
        (lambda c: c["itos"].reverse(), "starts with"),
        (lambda c: c["itos"].append("new"), "its freqs give 4"),
        (lambda c: c.update(freqs={"a": 1}), "its freqs give 0"),
        (lambda c: c["itos"].insert(4, c["itos"].pop()), "another order"),
        (lambda c: c.update(min_freq=4), "its freqs give 5"),
        (lambda c: c.update(tokenizer="spacy"), "tokenizer 'spacy'"),
        (lambda c: c.update(itos="words"), "itos is no list of words"),
        (lambda c: c.update(freqs={"a": "9"}), "freqs is no"),
        (lambda c: c.pop("freqs"), "expected itos, freqs"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, change, says):
    vocab, path = CaptionVocab.from_freqs(FREQS), tmp_path / "v.json"
    content = {"itos": vocab.itos, "freqs": FREQS, "min_freq": 5, "tokenizer": "ptb"}
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says) as e:
        CaptionVocab.load(path)
    assert str(path) in str(e.value)


def test_a_pickle_is_refused_unread(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    for name in ("vocab.pkl", "vocab.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=r"is a pickle.*json\.dump.*pass vocab\.json"):
            CaptionVocab.load(tmp_path / name)


def test_other_files(tmp_path):
    for content, says in (
        (b"", "is not a vocabulary"),
        (b"[1]", "holds a list"),
        (b"\x1f\x8b12", "is not a vocabulary"),
    ):
        (tmp_path / "v.json").write_bytes(content)
        with pytest.raises(UserError, match=says):
            CaptionVocab.load(tmp_path / "v.json")
    with pytest.raises(UserError, match="cannot be read"):
        CaptionVocab.load(tmp_path / "absent.json")


def test_check_tokens():
    tokens = torch.tensor([[BOS, 5, EOS], [BOS, 8, EOS]])
    check_tokens(tokens, 9)
    check_tokens(tokens[:, :0], 1)
    with pytest.raises(UserError, match="annotation 77: token 1 has id 8, but the word table has 8 rows"):
        check_tokens(tokens, 8, [76, 77])
    with pytest.raises(UserError, match="caption 0: token 1 has id -1"):
        check_tokens(torch.tensor([[BOS, -1]]), 8)
