"""Caption scores of the COCO evaluation without Java: BLEU-1..4, ROUGE-L, CIDEr-D, plain CIDEr; CIDEr-D as a reward.

References are {image_id: [captions]} and candidates {image_id: caption}, all tokenised by utils/ptb_tokenizer.py: words
joined by blanks. METEOR and SPICE, which exist in Java only, are in utils/caption_metrics_other.py.
Reference: pycocoevalcap 1.2 (BLEU, ROUGE-L, CIDEr = CIDEr-D), ruotianluo/cider@dbb3960 (plain CIDEr).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.run import write_text_atomic

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0  # of CIDEr-D's length penalty, words
TINY, SMALL = 1e-15, 1e-9  # what the reference adds to numerators and denominators of BLEU
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "CIDEr-plain")


def count_ngrams(caption: str) -> list[Counter]:
    """How often each n-gram occurs, one Counter for each n of ORDERS; an n-gram is a tuple of words."""
    words = caption.split()
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in ORDERS]


def score_captions(references: dict, candidates: dict) -> dict:
    """All of NAMES -> {"corpus": {name: value}, "per_image": {name: {image_id: value}}}; CIDEr is not times 100.

    Document frequencies come from the references given, so CIDEr depends on the set and is 0 for a single image.
    ValueError unless both name the same images, each with a reference.
    """
    check_images(references, candidates)
    bleu_corpus, bleu_images = bleu(references, candidates)
    frequencies = DocumentFrequencies.of_images(references.values())
    per_image = {name: {} for name in NAMES}
    for i, caption in candidates.items():
        per_image["ROUGE-L"][i] = rouge_l(references[i], caption)
        vectors = [frequencies.vectorise(r) for r in references[i]]
        per_image["CIDEr-D"][i] = cider(frequencies.vectorise(caption), vectors)
        per_image["CIDEr-plain"][i] = cider(frequencies.vectorise(caption), vectors, plain=True)
        for n in ORDERS:
            per_image[f"BLEU-{n}"][i] = bleu_images[i][n - 1]
    corpus = {name: sum(values.values()) / len(values) for name, values in per_image.items()}
    corpus |= {f"BLEU-{n}": bleu_corpus[n - 1] for n in ORDERS}
    return {"corpus": corpus, "per_image": per_image}


def check_images(references: dict, candidates: dict) -> None:
    """ValueError unless both have the same images, at least one, and every image has a reference."""
    if references.keys() != candidates.keys() or not references:
        differing = sorted(map(str, references.keys() ^ candidates.keys()))
        raise ValueError(f"{len(differing)} images only in references or in candidates, as {differing[:1]}")
    empty = [i for i, captions in references.items() if isinstance(captions, str) or not captions]
    if empty:
        raise ValueError(f"{len(empty)} images without a list of references, as {empty[0]}")


# ---- BLEU and ROUGE-L


def bleu(references: dict, candidates: dict) -> tuple[list[float], dict[object, list[float]]]:
    """BLEU-1..4 of the corpus and of every image. Effective reference length: the closest, of equals the shorter."""
    totals, per_image = [[0] * 4, [0] * 4, 0, 0], {}
    for i, caption in candidates.items():
        most = [Counter() for _ in ORDERS]  # n-gram -> its largest count in one reference
        for reference in references[i]:
            for n, counts in enumerate(count_ngrams(reference)):
                most[n] |= counts
        length = len(caption.split())
        closest = min((len(r.split()) for r in references[i]), key=lambda x: (abs(x - length), x))
        correct = [sum((c & m).values()) for c, m in zip(count_ngrams(caption), most, strict=True)]
        guessed = [max(0, length - n + 1) for n in ORDERS]
        per_image[i] = _bleu_of_counts(correct, guessed, length, closest)
        for total, own in zip(totals[:2], (correct, guessed), strict=True):
            total[:] = [a + b for a, b in zip(total, own, strict=True)]
        totals[2:] = [totals[2] + length, totals[3] + closest]
    return _bleu_of_counts(*totals), per_image


def _bleu_of_counts(correct: list[int], guessed: list[int], length: int, reference_length: int) -> list[float]:
    ratio = (length + TINY) / (reference_length + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n, c, g in zip(ORDERS, correct, guessed, strict=True):
        product *= (c + TINY) / (g + SMALL)
        scores.append(product ** (1 / n) * brevity)
    return scores


def rouge_l(references: list[str], candidate: str, beta: float = 1.2) -> float:
    """F-score of the longest common subsequence; best precision and best recall may come from different references."""
    words = candidate.split(" ")  # as the reference splits: "" is one empty word
    common = [(_lcs_length(words, r.split(" ")), len(r.split(" "))) for r in references]
    precision = max(c for c, _ in common) / len(words)
    recall = max(c / length for c, length in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _lcs_length(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)  # row[j]: of the words of a so far and b[:j]
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


# ---- CIDEr


@dataclass
class Vector:
    """tf-idf of one caption: weights and their norm for each n of ORDERS, and its length in words."""

    weights: list[dict[tuple, float]]
    norms: list[float]
    words: int


@dataclass
class DocumentFrequencies:
    """In how many documents each n-gram occurs, and how many documents there are."""

    counts: Counter
    documents: int

    @classmethod
    def of_images(cls, references: Iterable[list[str]]) -> "DocumentFrequencies":
        """idf=image: a document is all captions of one image, as in the COCO evaluation."""
        counts, documents = Counter(), 0
        for captions in references:
            counts.update({ngram for c in captions for per_n in count_ngrams(c) for ngram in per_n})
            documents += 1
        return cls(counts, documents)

    @classmethod
    def of_captions(cls, references: Iterable[list[str]]) -> "DocumentFrequencies":
        """idf=caption: each caption is a document, as in the reward of the M2 transformer."""
        return cls.of_images([c] for captions in references for c in captions)

    def save(self, path: Path | str) -> None:
        """As json: the train set of COCO takes a minute to count."""
        counts = {" ".join(ngram): n for ngram, n in self.counts.items()}
        write_text_atomic(path, json.dumps({"documents": self.documents, "counts": counts}))

    @classmethod
    def load(cls, path: Path | str) -> "DocumentFrequencies":
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(Counter({tuple(k.split(" ")): n for k, n in stored["counts"].items()}), stored["documents"])

    def vectorise(self, caption: str) -> Vector:
        log_documents, counts = math.log(self.documents), self.counts
        weights = [
            {ngram: tf * (log_documents - math.log(counts.get(ngram, 0) or 1)) for ngram, tf in per_n.items()}
            for per_n in count_ngrams(caption)
        ]
        norms = [math.sqrt(sum(w * w for w in per_n.values())) for per_n in weights]
        return Vector(weights, norms, len(caption.split()))


def cider(candidate: Vector, references: list[Vector], plain: bool = False) -> float:
    """CIDEr-D of one caption, which the coco-caption tool calls CIDEr. plain: neither clipped nor length-penalised."""
    total = 0.0
    for r in references:
        penalty = 1.0 if plain else math.exp(-((candidate.words - r.words) ** 2) / (2 * SIGMA**2))
        for n in range(len(ORDERS)):
            own, other, norms = candidate.weights[n], r.weights[n], candidate.norms[n] * r.norms[n]
            if norms:
                common = own.keys() & other.keys()
                dot = sum((own[g] if plain else min(own[g], other[g])) * other[g] for g in common)
                total += penalty * dot / norms
    return 10 * total / (len(ORDERS) * len(references))


class CiderReward:
    """CIDEr-D of generated captions against references that are vectorised once, on first use.

    references: {image_id: [captions]}; prepare: what makes a reference of such a caption on first use, as a tokeniser
    (None: nothing). Whatever ends a candidate (an end token, say) must end references too, and must have been counted
    in `frequencies`. Vectors stay in memory, 31 kB an image.
    """

    def __init__(
        self,
        frequencies: DocumentFrequencies,
        references: dict[object, list[str]],
        prepare: Callable[[str], str] | None = None,
    ):
        self.frequencies, self.references, self._vectors = frequencies, references, {}
        self.prepare = prepare or str

    def __call__(self, image_ids: list, captions: list[str]) -> list[float]:
        """One reward per caption; an image may come several times, as with 5 beams."""
        rewards = []
        for i, caption in zip(image_ids, captions, strict=True):
            if i not in self._vectors:
                self._vectors[i] = [self.frequencies.vectorise(self.prepare(r)) for r in self.references[i]]
            rewards.append(cider(self.frequencies.vectorise(caption), self._vectors[i]))
        return rewards
