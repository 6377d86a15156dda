"""utils/caption_metrics.py and caption_metrics_other.py, by hand. Stored scores: tests/test_reference_fsgr.py."""

import math
import random
import time

import pytest

from utils import caption_metrics as cm
from utils import caption_metrics_other as other

REFERENCES = {
    1: ["a man rides a horse", "a man on a brown horse"],
    2: ["two dogs play in the snow", "dogs in snow"],
    3: ["a plate of food on a table"],
}
CANDIDATES = {1: "a man rides a brown horse", 2: "two cats sleep", 3: "a plate of food on a table"}


def test_bleu_by_hand():
    corpus, images = cm.bleu({1: ["the cat sat on the mat"]}, {1: "the the cat"})
    # 3 of 3 words (the reference has "the" twice), 1 of 2 bigrams, 0 of 1 trigrams; 3 words against 6
    brevity = math.exp(1 - 6 / 3)
    assert corpus[:2] == pytest.approx([brevity, brevity * math.sqrt(1 / 2)])
    assert corpus[2] == pytest.approx(0, abs=1e-5) and images[1] == corpus
    corpus, _ = cm.bleu({1: ["the the the cat"]}, {1: "the the the the"})
    assert corpus[0] == pytest.approx(3 / 4)  # clipped
    clipped, _ = cm.bleu({1: ["the cat", "the the dog"]}, {1: "the the the"})
    assert clipped[0] == pytest.approx(2 / 3)  # the most in one reference, not their sum


def test_bleu_takes_the_closest_length_and_of_equals_the_shorter():
    for references, closest in ((["a", "a b c d e"], 1), (["a b c d", "a b"], 2), (["a b c d", "a b c d e f"], 4)):
        corpus, _ = cm.bleu({1: references}, {1: "a b c"})
        assert corpus[0] == pytest.approx(1.0 if closest <= 3 else math.exp(1 - closest / 3))


def test_bleu_of_a_corpus_pools_counts():
    corpus, images = cm.bleu({1: ["a b c d"], 2: ["w x y z"]}, {1: "a b c d", 2: "w q q q q q"})
    assert images[1][0] == pytest.approx(1) and images[2][0] == pytest.approx(1 / 6)
    assert corpus[0] == pytest.approx(5 / 10)


def test_rouge_by_hand():
    # best precision 3/4 from the first, best recall 2/2 from the second
    p, r, b = 3 / 4, 1.0, 1.2
    got = cm.rouge_l(["a b c d e f", "a c"], "a x b c")
    assert got == pytest.approx((1 + b**2) * p * r / (r + b**2 * p))
    assert cm.rouge_l(["a b"], "b a") == pytest.approx(0.5)  # order counts
    assert cm.rouge_l(["a b"], "") == cm.rouge_l(["a b"], "x") == 0
    assert cm.rouge_l(["a b"], "a b") == pytest.approx(1)


def test_cider_by_hand():
    frequencies = cm.DocumentFrequencies.of_images([["red dog"], ["red cat"]])
    assert frequencies.documents == 2 and frequencies.counts[("red",)] == 2 and frequencies.counts[("dog",)] == 1
    references = [frequencies.vectorise("red dog")]
    same = frequencies.vectorise("red dog")
    assert cm.cider(same, references) == pytest.approx(10 * 2 / 4)  # words and bigrams agree, longer ones do not exist
    twice = frequencies.vectorise("dog dog")
    # words: weights 2 log 2 against log 2, clipped to half the cosine; bigram "dog dog" is unknown
    assert cm.cider(twice, references) == pytest.approx(10 * 0.5 / 4)
    assert cm.cider(twice, references, plain=True) == pytest.approx(10 / 4)
    longer = frequencies.vectorise("red dog red")
    assert cm.cider(longer, references, plain=True) == pytest.approx(10 * (1 + 1 / math.sqrt(2)) / 4)
    assert cm.cider(longer, references) == pytest.approx(10 * (1 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))


def test_cider_of_one_image_is_zero_and_empty_is_finite():
    one = cm.score_captions({1: REFERENCES[1]}, {1: CANDIDATES[1]})["corpus"]
    assert one["CIDEr-D"] == one["CIDEr-plain"] == 0 and one["BLEU-1"] > 0.8
    got = cm.score_captions(REFERENCES, CANDIDATES | {2: ""})
    assert all(v[2] == 0 for v in got["per_image"].values()) and all(math.isfinite(v) for v in got["corpus"].values())


def test_both_idf_modes():
    images = cm.DocumentFrequencies.of_images(REFERENCES.values())
    captions = cm.DocumentFrequencies.of_captions(REFERENCES.values())
    assert (images.documents, captions.documents) == (3, 5)
    assert (images.counts[("horse",)], captions.counts[("horse",)]) == (1, 2)
    assert images.counts[("a", "man")] == 1 and captions.counts[("a", "man")] == 2
    assert images.counts[("a",)] == 2 and captions.counts[("a",)] == 3  # once in a caption, however often


def test_frequencies_saved_and_loaded(tmp_path):
    frequencies = cm.DocumentFrequencies.of_images(REFERENCES.values())
    frequencies.save(tmp_path / "df.json")
    assert cm.DocumentFrequencies.load(tmp_path / "df.json") == frequencies


def test_the_reward_is_the_score():
    frequencies = cm.DocumentFrequencies.of_images(REFERENCES.values())
    reward = cm.CiderReward(frequencies, REFERENCES)
    want = cm.score_captions(REFERENCES, CANDIDATES)["per_image"]["CIDEr-D"]
    for _ in range(2):  # the second time from cached references
        assert reward([3, 1, 2, 1], [CANDIDATES[i] for i in (3, 1, 2, 1)]) == [want[i] for i in (3, 1, 2, 1)]
    assert reward([1], ["nothing of it"]) == [0]


def test_the_reward_is_fast():
    """160 candidates against 5 references each in 0.15 s of processor time; it takes about 0.01 s."""
    r = random.Random(0)
    words = [f"w{k}" for k in range(400)]

    def caption() -> str:
        return " ".join(r.choices(words, k=r.randint(8, 14)))

    references = {i: [caption() for _ in range(5)] for i in range(32)}
    reward = cm.CiderReward(cm.DocumentFrequencies.of_images(references.values()), references)
    ids, captions = [i for i in references for _ in range(5)], [caption() for _ in range(160)]
    reward(ids, captions)
    start = time.process_time()
    reward(ids, captions)
    assert time.process_time() - start < 0.15


def test_images_must_agree():
    for references, candidates in (
        (REFERENCES, {1: "a", 2: "b"}),
        ({1: ["a"]}, {1: "a", 2: "b"}),
        ({}, {}),
        ({1: []}, {1: "a"}),
        ({1: "a b"}, {1: "a"}),
    ):
        with pytest.raises(ValueError, match="images"):
            cm.score_captions(references, candidates)


# ---- caption_metrics_other.py


def test_java_is_absent_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(other.shutil, "which", lambda name: None)
    assert other.find_jar("METEOR") == (None, "no java on the PATH")
    monkeypatch.setattr(other.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(other.importlib.util, "find_spec", lambda name: None)
    assert other.find_jar("SPICE") == (None, "pycocoevalcap is not installed")
    found = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(other.importlib.util, "find_spec", lambda name: found)
    for name, files in other.JARS.items():
        for k, file in enumerate(files):
            assert other.find_jar(name) == (None, f"{files[k]} is missing in pycocoevalcap")
            path = tmp_path / name.lower() / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        assert other.find_jar(name) == (tmp_path / name.lower() / files[0], "")


def test_meteor_on_this_machine():
    jar, why = other.find_jar("METEOR")
    if jar is None:
        pytest.skip(f"METEOR: {why}")
    corpus, images = other.meteor(jar, REFERENCES, CANDIDATES)
    assert images[3] == pytest.approx(1) and images[2] < images[1] < 1 and images[2] < corpus < 1


def test_descriptions():
    got = other.describe(["men on a", "men on a", "the two dogs", ""])
    assert got == {"distinct": 3, "vocabulary": 6, "mean length": 2.25, "bad endings": 0.5, "empty": 1}


def test_controls():
    references = {1: ["a b c", "x"], 2: ["a b c", "y"], 3: ["x z", "z"], 4: ["x z", "a b d"]}
    assert other.commonest(references) == "a b c"  # as often as "x z", but its bigrams are in more images
    pred = {i: f"caption {i}" for i in range(7)}
    for seed in range(3):
        moved = other.shuffled(pred, seed)
        assert sorted(moved.values()) == sorted(pred.values()) and not any(moved[i] == pred[i] for i in pred)
