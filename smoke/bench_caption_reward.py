"""Time what self-critical training asks of the caption metrics: CIDEr-D of 160 candidates, and the PTB tokeniser.

    python smoke/bench_caption_reward.py                                   # random captions, no data: 10 s
    python smoke/bench_caption_reward.py --labels captions_val2017.json    # real references

A step of 32 images with 5 beams has 160 candidates, each against the 5 references of its image. Candidates are the
references of an image with some of their words replaced. Figures are medians of process time on one core; the Java
tokeniser, where it is there, is timed by the clock with the start of its machine, as the usual wrapper calls it.
"""

import argparse
import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.caption_metrics import CiderReward, DocumentFrequencies, score_captions
from utils.ptb_tokenizer import tokenize

IMAGES, BEAMS, REFERENCES = 32, 5, 5
JAVA_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"  # inside pycocoevalcap


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--labels", default=None, help="COCO caption annotations (default: random captions of 1000 images)")
    p.add_argument("--repeats", type=int, default=20, help="timed calls of each row (default 20)")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def random_captions(images: int) -> dict[int, list[str]]:
    """Captions of 8 to 13 words; word k of 2000 comes up like 1/k, as in language."""
    words = [f"{random.choice('bdfgklmnprst')}{random.choice('aeiou')}{k:x}".replace("0", "o") for k in range(2000)]
    words = ["".join(c if c.isalpha() else "ghijklmnop"[int(c)] for c in w) for w in words]
    weights = [1 / (k + 1) for k in range(len(words))]

    def caption() -> str:
        return " ".join(random.choices(words, weights, k=random.randint(8, 13))).capitalize() + "."

    return {i: [caption() for _ in range(REFERENCES)] for i in range(images)}


def read_captions(path: str) -> dict[int, list[str]]:
    """The first REFERENCES captions of every image that has as many."""
    found: dict[int, list[str]] = {}
    try:
        for x in json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]:
            found.setdefault(x["image_id"], []).append(x["caption"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise run.UserError(f"--labels {path}: is not COCO caption annotations ({e!r}); pass captions_*.json") from e
    found = {i: c[:REFERENCES] for i, c in found.items() if len(c) >= REFERENCES}
    if len(found) < IMAGES:
        raise run.UserError(
            f"--labels {path}: {len(found)} images have {REFERENCES} captions; expected {IMAGES} or more"
        )
    return found


def milliseconds(call, repeats: int, clock=time.process_time) -> float:
    """Median over `repeats` calls, after one that is not counted."""
    took = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        took.append(1e3 * (clock() - start))
    return statistics.median(took[1:])


def java_tokenizer(captions: list[str]):
    """A call that tokenises them in Java, or None and why there is none."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not shutil.which("java"):
        return None, "no java on the PATH" if spec else "pycocoevalcap is not installed"
    jar = Path(next(iter(spec.submodule_search_locations))) / JAVA_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(captions) + "\n"
    return lambda: subprocess.run(command, input=text, text=True, capture_output=True, check=True), ""


def main(argv=None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, repeats=(1, 10_000))
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=args.seed), argv)

    # ---- captions
    raw = read_captions(args.labels) if args.labels else random_captions(1000)
    references = {i: [tokenize(c) for c in captions] for i, captions in raw.items()}
    every = [w for captions in references.values() for c in captions for w in c.split()]
    ids = [i for i in list(references)[:IMAGES] for _ in range(BEAMS)]
    candidates = [
        " ".join(w if random.random() < 0.7 else random.choice(every) for w in random.choice(references[i]).split())
        for i in ids
    ]
    source = "random captions" if args.labels is None else Path(args.labels).name
    print(f"{len(raw)} images x {REFERENCES} references ({source}); {len(ids)} candidates; median of {args.repeats}")

    # ---- times
    frequencies = DocumentFrequencies.of_images(references.values())
    reward = CiderReward(frequencies, references)
    flat = [c for captions in list(raw.values())[:1000] for c in captions]
    java, why = java_tokenizer([c.capitalize() + "." for c in candidates])
    score_of = dict(zip(ids, candidates, strict=True))
    parts = {i: references[i] for i in score_of}
    few = max(1, args.repeats // 5)
    rows = {
        "reward, cached references": milliseconds(lambda: reward(ids, candidates), args.repeats),
        "reward, references anew": milliseconds(lambda: CiderReward(frequencies, references)(ids, candidates), few),
        "tokenise the candidates": milliseconds(lambda: [tokenize(c) for c in candidates], args.repeats),
        "the same in Java, by the clock": milliseconds(java, few, time.perf_counter) if java else None,
        "all scores of 32 images": milliseconds(lambda: score_captions(parts, score_of), few),
        f"frequencies of {len(raw)} images": milliseconds(
            lambda: DocumentFrequencies.of_images(references.values()), few
        ),
    }
    speed = 1e3 * len(flat) / milliseconds(lambda: [tokenize(c) for c in flat], few)

    # ---- result
    for name, ms in rows.items():
        print(f"{name:36s}" + (f"{ms:10.1f} ms" if ms is not None else f"{'n/a':>10s}    {why}"))
    print(f"{'tokenise written captions':36s}{speed:10.0f} captions/s")
    first = rows["reward, cached references"]
    print(f"reward of {len(ids)} candidates: {first:.1f} ms, allowed 150 ms: {'ok' if first <= 150 else 'TOO SLOW'}")
    run.finish(
        r, args, "FSGR", f"reward of {len(ids)} candidates {first:.1f} ms, tokeniser {speed:.0f} captions/s ({source})"
    )


if __name__ == "__main__":
    sys.exit(run.cli(main))
