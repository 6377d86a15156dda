"""Beside the Python caption scores: METEOR and SPICE through Java, descriptions, controls that know nothing.

METEOR and SPICE are Java programs that the package pycocoevalcap ships; they run where `java` and that package are.
References are {image_id: [captions]} and candidates {image_id: caption}, all tokenised by utils/ptb_tokenizer.py.
"""

import importlib.util
import json
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from utils.caption_metrics import DocumentFrequencies, count_ngrams
from utils.run import UserError

JARS = {  # what pycocoevalcap must hold; SPICE fetches its models on its first use there
    "METEOR": ("meteor-1.5.jar", "data/paraphrase-en.gz"),
    "SPICE": ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"),
}
BAD_ENDINGS = frozenset("a an the in for at of with before after on upon near to is are am".split())


# ---- METEOR and SPICE, in Java


def find_jar(name: str) -> tuple[Path | None, str]:
    """The jar of METEOR or SPICE, or None and why it cannot run."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if not shutil.which("java"):
        return None, "no java on the PATH"
    if spec is None:
        return None, "pycocoevalcap is not installed"
    folder = Path(next(iter(spec.submodule_search_locations))) / name.lower()
    absent = [f for f in JARS[name] if not (folder / f).is_file()]
    return (None, f"{absent[0]} is missing in pycocoevalcap") if absent else (folder / JARS[name][0], "")


def meteor(jar: Path, references: dict, candidates: dict) -> tuple[float, dict[object, float]]:
    """METEOR 1.5 of the corpus and of every image. Starts in 10 s and takes 2 GB."""
    command = ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8") as java:

        def ask(*parts: str) -> str:
            java.stdin.write(" ||| ".join(parts) + "\n")
            java.stdin.flush()
            answer = java.stdout.readline().strip()
            if not answer:
                raise UserError(f"{jar}: java ended early; it needs 2 GB of memory, or leave METEOR out (--java off)")
            return answer

        statistics = [
            ask("SCORE", *references[i], " ".join(c.replace("|||", "").split())) for i, c in candidates.items()
        ]
        values = [float(ask("EVAL", *statistics))] + [float(java.stdout.readline()) for _ in statistics]
        java.stdin.close()
    return values[-1], dict(zip(candidates, values, strict=False))


def spice(jar: Path, references: dict, candidates: dict) -> tuple[float, dict[object, float]]:
    """SPICE, mean and of every image. Takes 8 GB and minutes."""
    items = [{"image_id": k, "test": c, "refs": references[i]} for k, (i, c) in enumerate(candidates.items())]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "in.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(items), encoding="utf-8")
        command = ["java", "-Xmx8G", "-jar", str(jar), str(asked), "-cache", folder, "-out", str(answered), "-silent"]
        if subprocess.run(command, cwd=jar.parent).returncode:
            raise UserError(f"{jar}: java failed; it needs 8 GB of memory, or leave SPICE out (--java off)")
        found = {x["image_id"]: x["scores"]["All"]["f"] for x in json.loads(answered.read_text(encoding="utf-8"))}
    values = {i: float(found[k]) for k, i in enumerate(candidates)}
    return sum(values.values()) / len(values), values


# ---- descriptions and controls


def commonest(references: dict[str, list[str]]) -> str:
    """The reference that most images have; of equals the one whose bigrams most images have."""
    images = Counter(c for captions in references.values() for c in set(captions))
    pairs = DocumentFrequencies.of_images(references.values()).counts

    def rank(caption: str) -> tuple:
        bigrams = list(count_ngrams(caption)[1])
        return images[caption], sum(pairs[b] for b in bigrams) / max(1, len(bigrams)), caption

    return max(images, key=rank)


def shuffled(pred: dict[str, str], seed: int) -> dict[str, str]:
    """Every image gets the caption of another one, in one cycle."""
    order = random.Random(seed).sample(list(pred), len(pred))
    return {i: pred[order[k - 1]] for k, i in enumerate(order)}


def describe(captions: list[str]) -> dict:
    """What tokenised captions look like: distinct ones, words used, mean length in words, share of bad endings."""
    words = [c.split() for c in captions]
    return {
        "distinct": len(set(captions)),
        "vocabulary": len({w for x in words for w in x}),
        "mean length": sum(map(len, words)) / len(words),
        "bad endings": sum(bool(x) and x[-1] in BAD_ENDINGS for x in words) / len(words),
        "empty": sum(not x for x in words),
    }
