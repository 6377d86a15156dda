"""Caption tokens and scores against what the Java and Python tools of the field printed.

Reads LAB_SHARED/data/fsgr/metric_cases, whatever is there: tokenizer/*.tsv.gz and *.json (caption, java_no_punct),
scores*.json.gz ({set: gts, res, corpus, per_image}), cider_precomputed_df*.json.
"""

import gzip
import json
import os
from pathlib import Path

import pytest

from utils import caption_metrics as cm
from utils import caption_metrics_other as other
from utils.ptb_tokenizer import tokenize

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fsgr"
CASES = SHARED / "metric_cases"
NAMES = {  # names in the stored scores -> ours
    **{f"Bleu_{n}": f"BLEU-{n}" for n in cm.ORDERS},
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr-D",
    "CIDErD": "CIDEr-D",
    "CIDEr_plain": "CIDEr-plain",
}
BARS = {  # file -> share of captions that must agree; another file: ANY
    "val2017": 25_000 / 25_014,
    "abstract48S": 23_990 / 24_000,
    "pascal_candsB": 3_990 / 4_000,
    "puret_karpathy_test": 1.0,
    "coco_caption_fakecap": 1.0,
    "probe": 185 / 225,  # adversarial
}
ANY = 0.999


def files(pattern: str) -> list[Path]:
    found = sorted(CASES.glob(pattern))
    if not found:
        pytest.skip(f"no reference cases {pattern} in {CASES}; set LAB_SHARED")
    return found


def read_json(path: Path):
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def read_table(path: Path) -> list[dict[str, str]]:
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[:-1]  # splitlines() knows more line ends
    head = lines[0].split("\t")
    return [dict(zip(head, line.split("\t"), strict=True)) for line in lines[1:]]


def test_tokens_equal_the_java_tokens(capsys):
    for path in [*files("tokenizer/*.tsv.gz"), *files("tokenizer/*.json")]:
        rows = read_json(path) if path.suffix == ".json" else read_table(path)
        wrong = [r for r in rows if tokenize(r["caption"]) != r["java_no_punct"]]
        share = 1 - len(wrong) / len(rows)
        with capsys.disabled():
            print(f"\n{path.name}: {len(rows) - len(wrong)} of {len(rows)} captions as Java tokenises them", end="")
        first = wrong[0]["caption"] if wrong else ""
        assert share >= BARS.get(path.name.split(".")[0], ANY), (
            f"{path.name}: {len(wrong)} of {len(rows)} differ, as {first!r}"
        )


def test_scores_equal_the_stored_scores(capsys):
    sets = [(path, name, s) for path in files("scores*.json.gz") for name, s in read_json(path).items()]
    compared, worst = 0, 0.0
    for path, name, s in sets:
        got = cm.score_captions(s["gts"], {i: c[0] for i, c in s["res"].items()})
        stored = {*s["corpus"]} - {"n_images", "METEOR", "SPICE"}
        assert stored <= NAMES.keys(), f"{path.name}: this test does not know {sorted(stored - NAMES.keys())}"
        for theirs in stored:
            ours = NAMES[theirs]
            errors = [abs(got["corpus"][ours] - s["corpus"][theirs])]
            errors += [abs(got["per_image"][ours][i] - v[theirs]) for i, v in s["per_image"].items()]
            assert max(errors) <= 1e-6, f"{path.name}, {name}: {ours} is off by {max(errors):.1e}"
            worst, compared = max(worst, *errors), compared + len(errors)
    with capsys.disabled():
        print(f"\n{len(sets)} of {len(sets)} sets, {compared} scores equal the stored ones, largest error {worst:.1e}")


def test_scores_are_of_these_captions():
    """The cases can fail: with the candidates of two images exchanged the stored scores are missed by far."""
    for path in files("scores*.json.gz"):
        for name, s in read_json(path).items():
            ids, candidates = list(s["res"]), [c[0] for c in s["res"].values()]
            if len(ids) > 1:
                got = cm.score_captions(s["gts"], dict(zip(ids, candidates[1:] + candidates[:1], strict=True)))
                assert abs(got["corpus"]["CIDEr-D"] - s["corpus"]["CIDErD"]) > 0.1, f"{path.name}, {name}"


def test_meteor_equals_the_stored_scores(capsys):
    jar, why = other.find_jar("METEOR")
    sets = [(name, s) for path in files("scores*.json.gz") for name, s in read_json(path).items()]
    sets = [(name, s) for name, s in sets if "METEOR" in s["corpus"] and len(s["res"]) <= 200]
    if jar is None:
        pytest.skip(f"METEOR: {why}")
    for name, s in sets:
        corpus, images = other.meteor(jar, s["gts"], {i: c[0] for i, c in s["res"].items()})
        errors = [abs(images[i] - v["METEOR"]) for i, v in s["per_image"].items()]
        assert max(errors) <= 1e-6 and abs(corpus - s["corpus"]["METEOR"]) <= 1e-6, name
    with capsys.disabled():
        print(f"\nMETEOR of {len(sets)} of {len(sets)} sets (those of up to 200 images) equals the stored one")


def captions_by_image(name: str) -> dict[str, list[str]]:
    found = {}
    for row in read_table(files(f"tokenizer/{name}.tsv.gz")[0]):
        found.setdefault(row["image_id"], []).append(row["caption"])
    return found


def test_rewards_with_precomputed_frequencies(capsys):
    """Frequencies of all val2017 captions, both idf modes, from text to reward."""
    stored = [(k, v) for path in files("cider_precomputed_df*.json") for k, v in read_json(path).items()]
    references = {i: [tokenize(c) for c in cs] for i, cs in captions_by_image("val2017").items()}
    candidates = {i: tokenize(cs[0]) for i, cs in captions_by_image("puret_karpathy_test").items()}
    count = {"image": cm.DocumentFrequencies.of_images, "caption": cm.DocumentFrequencies.of_captions}
    worst = 0.0
    for name, want in stored:
        reward = cm.CiderReward(count[name.split("_")[0]](references.values()), references)
        ids = list(want["per_image"])
        got = reward(ids, [candidates[i] for i in ids])
        errors = [abs(g - want["per_image"][i]) for g, i in zip(got, ids, strict=True)]
        assert max(errors) <= 1e-6 and abs(sum(got) / len(got) - want["mean"]) <= 1e-6, f"{name}: {max(errors):.1e}"
        worst = max(worst, *errors)
    with capsys.disabled():
        print(f"\n{len(stored)} of {len(stored)} idf modes equal the stored rewards, largest error {worst:.1e}")


def test_from_text_to_score(capsys):
    """Raw captions to the stored CIDEr and BLEU-4 of the model's and the human set, tokenised here."""
    stored = {name: s for path in files("scores*.json.gz") for name, s in read_json(path).items()}
    human, model = captions_by_image("val2017"), captions_by_image("puret_karpathy_test")
    done = []
    for name, first, tolerance in (("puret_karpathytest_in_val2017", 0, 1e-4), ("human_loo_val2017", 1, 1e-3)):
        if name in stored:
            s = stored[name]
            source = {i: human[i][0] if first else model[i][0] for i in s["res"]}
            references = {i: [tokenize(c) for c in human[i][first:]] for i in source}
            references = {i: r[: len(s["gts"][i])] for i, r in references.items()}
            got = cm.score_captions(references, {i: tokenize(c) for i, c in source.items()})["corpus"]
            for ours, theirs in (("CIDEr-D", "CIDEr"), ("BLEU-4", "Bleu_4")):
                assert abs(got[ours] - s["corpus"][theirs]) <= tolerance, f"{name}: {ours} {got[ours]}"
            done.append(f"{name} CIDEr-D {got['CIDEr-D']:.6f}")
    with capsys.disabled():
        print("\nfrom text to score: " + ", ".join(done))
