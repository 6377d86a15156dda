"""Words of a captioning model: from captions or frequencies, to and from token ids, as one JSON file.

Ids 0..3 are <unk>, <pad>, <bos>, <eos>; then every word that occurs at least `min_freq` times, by (-frequency, word).
That rule rebuilds the published 10,201 words of M2 (aimagelab/meshed-memory-transformer, vocab.pkl) from its counts.
Words are PTB tokens without punctuation (utils/ptb_tokenizer.py) whose hyphens between letters or digits split them,
`t-shirt` -> t, shirt. M2 counted with spaCy: 0.48 % of our words of COCO val2017 are not in its vocabulary, against 0.44 %
of its own words of train and val.
"""

import gzip
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.ptb_tokenizer import tokenize
from utils.run import UserError, write_text_atomic

SPECIALS = ("<unk>", "<pad>", "<bos>", "<eos>")
UNK, PAD, BOS, EOS = range(4)
NEVER_SAID = (UNK, PAD, BOS)  # in a caption for people
TOKENIZER = "ptb"
HYPHEN = re.compile(r"(?<=[^\W_])-(?=[^\W_])")
MAX_LEN = 54  # tokens of a caption with <bos> and <eos>: the positions that the decoder knows


def words(caption: str) -> list[str]:
    """The words that are counted and numbered, in lower case; [] for an empty caption."""
    return HYPHEN.sub(" ", tokenize(caption)).split()


@dataclass
class CaptionVocab:
    """itos[id] is a word; freqs {word: count} of all words, also the rare ones, {} when not known."""

    itos: list[str]
    freqs: dict[str, int] = field(default_factory=dict)
    min_freq: int = 5
    tokenizer: str = TOKENIZER

    def __post_init__(self) -> None:
        if tuple(self.itos[: len(SPECIALS)]) != SPECIALS:
            raise UserError(f"vocabulary: starts with {self.itos[:4]}, expected {list(SPECIALS)}; build it anew")
        if len(self.itos) == len(SPECIALS):
            raise UserError("vocabulary: holds no word beside the specials; build it anew with a lower --min-freq")
        self.stoi = {word: i for i, word in enumerate(self.itos)}
        if len(self.stoi) < len(self.itos):
            twice = Counter(self.itos).most_common(1)[0][0]
            raise UserError(f"vocabulary: '{twice}' stands in it twice, so ids are ambiguous; build it anew")
        if self.tokenizer != TOKENIZER:
            raise UserError(f"vocabulary: tokenizer '{self.tokenizer}', expected '{TOKENIZER}'; build it anew")

    def __len__(self) -> int:
        return len(self.itos)

    @property
    def sha256(self) -> str:
        """Of the words in their order: what a word table must have been built from to fit."""
        return hashlib.sha256(json.dumps(self.itos, ensure_ascii=False).encode("utf-8")).hexdigest()

    # ---- from captions, counts and files

    @classmethod
    def build(cls, captions: Iterable[str], min_freq: int = 5) -> "CaptionVocab":
        """Count the words of raw captions."""
        return cls.from_freqs(Counter(w for caption in captions for w in words(caption)), min_freq)

    @classmethod
    def from_freqs(cls, freqs: dict[str, int], min_freq: int = 5) -> "CaptionVocab":
        """Words of at least min_freq, the commonest first, equals by the alphabet. UserError when there are none.

        ValueError for min_freq < 1.
        """
        if min_freq < 1:
            raise ValueError(f"CaptionVocab: min_freq {min_freq}, expected at least 1")
        kept = _frequent(freqs, min_freq)
        if not kept:
            every = _frequent(freqs, 1)
            most = freqs[every[0]] if every else 0
            raise UserError(
                f"vocabulary: no word occurs {min_freq} times or more ({len(every)} words, the commonest {most} times); "
                "lower --min-freq or take more captions"
            )
        return cls([*SPECIALS, *kept], dict(freqs), min_freq)

    @classmethod
    def load(cls, path: Path | str) -> "CaptionVocab":
        """A file of `save` or M2's {itos, freqs}, as .json or .json.gz. UserError unless itos is what freqs give."""
        content = _read_json(Path(path))
        if set(content) == {"itos", "freqs"}:
            return cls.import_m2(path)
        if set(content) != {"itos", "freqs", "min_freq", "tokenizer"}:
            raise UserError(
                f"{path}: holds {sorted(content)}, expected itos, freqs, min_freq, tokenizer; build it anew"
            )
        return _checked(path, content)

    @classmethod
    def import_m2(cls, path: Path | str) -> "CaptionVocab":
        """M2's vocabulary as json {itos, freqs}, where min_freq was 5. A pickle is refused: it can hold code."""
        content = _read_json(Path(path))
        if not {"itos", "freqs"} <= set(content):
            raise UserError(f"{path}: holds {sorted(content)}, expected itos and freqs of an M2 vocabulary")
        return _checked(
            path, {"itos": content["itos"], "freqs": content["freqs"], "min_freq": 5, "tokenizer": TOKENIZER}
        )

    def save(self, path: Path | str) -> None:
        """Write {itos, freqs, min_freq, tokenizer} as JSON, atomically."""
        content = {"itos": self.itos, "freqs": self.freqs, "min_freq": self.min_freq, "tokenizer": self.tokenizer}
        write_text_atomic(path, json.dumps(content, ensure_ascii=False) + "\n")

    # ---- to and from ids

    def encode(self, caption: str, max_len: int = MAX_LEN) -> list[int]:
        """[<bos>, words, <eos>], at most max_len ids; a longer caption loses words, never its <eos>."""
        if max_len < 3:
            raise ValueError(f"CaptionVocab: max_len {max_len}, expected at least 3: <bos>, a word, <eos>")
        ids = [self.stoi.get(w, UNK) for w in words(caption)[: max_len - 2]]
        return [BOS, *(i if i > EOS else UNK for i in ids), EOS]  # a caption that says "<eos>" must not end there

    def decode(self, ids: Sequence[int] | torch.Tensor, collapse_repeats: bool = True) -> str:
        """Words before the first <eos>, without <bos> and <pad>; collapse_repeats: `a a man` -> `a man`, as M2 does."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(self):
            raise ValueError(f"CaptionVocab: ids {min(ids)}..{max(ids)}, expected 0..{len(self) - 1}")
        kept = [self.itos[i] for i in itertools.takewhile(lambda i: i != EOS, ids) if i not in (BOS, PAD)]
        return " ".join([w for w, _ in itertools.groupby(kept)] if collapse_repeats else kept)

    def count_unknown(self, captions: Iterable[str]) -> tuple[int, int]:
        """(words that become <unk>, all words) of raw captions."""
        counts = Counter(w for caption in captions for w in words(caption))
        return sum(n for w, n in counts.items() if self.stoi.get(w, UNK) <= EOS), counts.total()


def check_tokens(tokens: torch.Tensor, rows: int, names: Sequence | None = None) -> None:
    """UserError when an id of tokens (B, L) long lies outside a word table of `rows` rows. names: of the B captions.

    On a GPU the same mistake is a device-side assert, after which no further batch runs; so it is looked for before.
    """
    wrong = (tokens < 0) | (tokens >= rows)  # (B, L)
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        who = f"annotation {names[b]}" if names is not None else f"caption {b}"
        raise UserError(
            f"{who}: token {t} has id {int(tokens[b, t])}, but the word table has {rows} rows; "
            "build the table and the vocabulary from the same file"
        )


# ---- files


def _read_json(path: Path) -> dict:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); expected a vocabulary as .json or .json.gz") from e
    if data[:1] == b"\x80" or path.suffix in (".pkl", ".pickle"):
        convert = 'json.dump({"itos": vocab.itos, "freqs": dict(vocab.freqs)}, open("vocab.json", "w"))'
        raise UserError(
            f"{path}: is a pickle, which can run code when it is read; with the program that wrote it, load it as "
            f"`vocab`, do {convert} and pass vocab.json"
        )
    try:
        content = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as e:
        raise UserError(f"{path}: is not a vocabulary as .json or .json.gz ({e}); check the file") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected an object with itos and freqs")
    return content


def _frequent(freqs: dict[str, int], min_freq: int) -> list[str]:
    """Words of at least min_freq in the order of their ids, without specials."""
    return [w for _, w in sorted((-n, w) for w, n in freqs.items() if n >= min_freq and w not in SPECIALS)]


def _checked(path: Path | str, content: dict) -> CaptionVocab:
    """The vocabulary of a file, if its parts agree with each other."""
    itos, freqs, min_freq = content["itos"], content["freqs"], content["min_freq"]
    if not isinstance(itos, list) or not all(isinstance(w, str) for w in itos):
        raise UserError(f"{path}: itos is no list of words; expected what CaptionVocab.save writes")
    if not isinstance(freqs, dict) or not all(type(n) is int for n in [*freqs.values(), min_freq]):
        raise UserError(f"{path}: freqs is no {{word: count}}, or min_freq no number; expected what save writes")
    try:
        vocab = CaptionVocab(itos, freqs, min_freq, content["tokenizer"])
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    if freqs and [*SPECIALS, *_frequent(freqs, max(min_freq, 1))] != itos:
        n = sum(count >= min_freq for count in freqs.values())
        raise UserError(
            f"{path}: itos holds {len(itos) - len(SPECIALS)} words, but its freqs give {n} of at least {min_freq}, or "
            "another order; word tables would be misread: build it anew"
        )
    return vocab
