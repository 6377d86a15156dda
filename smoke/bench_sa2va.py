"""Time Sa2VA part by part with random weights, and print the memory plan of the released sizes.

    python smoke/bench_sa2va.py                                      # tiny model on a laptop, one thread: 1 min
    python smoke/bench_sa2va.py --size 1b --device cuda --policies bf16 fp16 fp32
    python smoke/bench_sa2va.py --size 8b --device cuda --policies bf16 --plan none

One picture of 999 x 960 px and a question. Figures are medians: process time on a CPU (one thread), clock on a GPU.
    prefill       generate of one token: picture, question, first token
    decode        each of the following tokens, with the cache
    [SEG] states  one pass over question and answer, from which the prompts are read
    SAM encode    the picture through Hiera, once per picture
    SAM decode    masks of two objects from encoded features, enlarged to the picture, as probabilities
    picture       predict with a forced answer, from the picture's pixels to masks: preparation on the CPU included
Weights and peak are GiB; the plan is weights and working memory of models/sa2va_memory.py, as in the table after it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.sa2va import POLICIES, Sa2VA
from models.sa2va_memory import GIB, SIZES, memory_table, random_sa2va, weights_gib, working_gib
from models.sa2va_processor import FORCED
from models.sa2va_sizes import tiny_sa2va
from models.sa2va_video import prompted, resize_logits
from utils import run

HEIGHT, WIDTH, OBJECTS, TEXT = 960, 999, 2, "Please segment the blood vessels."
PARTS = ("prefill", "decode", "[SEG] states", "SAM encode", "SAM decode", "picture")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--size", default="tiny", choices=["tiny", *(s.lower() for s in SIZES)], help="released size, or tiny"
    )
    p.add_argument("--policies", nargs="+", default=["fp32", "bf16"], choices=list(POLICIES),
                   help="types of the language model's weights")  # fmt: skip
    p.add_argument("--plan", default="all", choices=["all", "none"], help="print the memory plan of all released sizes")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--rounds", type=int, default=5, help="timed calls of each part")
    p.add_argument("--tokens", type=int, default=16, help="tokens that are decoded after the first")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def calls(model: Sa2VA, image: np.ndarray, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed; `decode` includes the prefill, which `measure` takes off."""
    processor, device = model.processor, model.sam.no_memory_embedding.device
    item = processor.encode(image, TEXT, sam_images=[])
    inputs = model.mllm_inputs(processor.collate([item], left=True))
    said = [processor.ids(FORCED) + [processor.end_id]]
    pixels = processor.sam_image(image)[None].to(device)
    prompts = model.seg_prompts([item], said)[0].repeat(OBJECTS, 1)
    seen, picture = model.seen(image), torch.zeros(OBJECTS, dtype=torch.int64, device=device)

    def generate(n: int) -> torch.Tensor:
        return model.mllm.generate(**inputs, min_new_tokens=n, max_new_tokens=n, do_sample=False, use_cache=True,
                                   eos_token_id=processor.end_id, pad_token_id=processor.pad_id)  # fmt: skip

    def draw() -> torch.Tensor:
        logits = prompted(model.sam, seen, picture, prompts).logits
        return resize_logits(logits, (HEIGHT, WIDTH), model.sam.image_size).sigmoid()

    found = (
        lambda: generate(1), lambda: generate(1 + tokens), lambda: model.seg_prompts([item], said),
        lambda: model.sam.vision_encoder(pixels), draw, lambda: model.predict(image, TEXT, force_seg=True),
    )  # fmt: skip
    return dict(zip(PARTS, found, strict=True))


def measure(model: Sa2VA, r, rounds: int, tokens: int) -> dict[str, float]:
    """Median milliseconds of each part; of decode, of one token."""
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    clock, took = time.process_time if r.device.type == "cpu" else time.perf_counter, {}
    with model.evaluating():
        for name, call in calls(model, image, tokens).items():
            times = []
            for _ in range(rounds + 1):
                start = clock()
                call()
                if r.device.type == "cuda":
                    torch.cuda.synchronize(r.device)
                times.append(1e3 * (clock() - start))
            took[name] = statistics.median(times[1:])  # libraries set themselves up in the first
    took["decode"] = (took["decode"] - took["prefill"]) / tokens
    return took


def build(size: str, policy: str, seed: int, device: torch.device) -> Sa2VA:
    """A random model on its device."""
    if size == "tiny":
        model = tiny_sa2va(seed)
        model.mllm.to(POLICIES[policy])
        return model.to(device)
    with device:
        return random_sa2va(size.upper(), policy).to(device)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.dtype = "fp32"  # weights have types of their own
    run.check_ranges(args, rounds=(1, 1000), tokens=(1, 1000))
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)

    # ---- parts
    rows, results = ["| policy | " + " | ".join(PARTS) + " (ms) | weights | plan | peak |"], []
    rows.append("|" + " --- |" * (len(PARTS) + 4))
    for policy in args.policies:
        cuda = r.device.type == "cuda"
        model = build(args.size, policy, args.seed, r.device)
        if cuda:  # what building took does not count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(r.device)
        weights, planned = weights_gib(model), weights_gib(model) + working_gib(model)
        took = measure(model, r, args.rounds, args.tokens)
        peak = torch.cuda.max_memory_allocated(r.device) / GIB if cuda else None
        del model
        fits = "" if peak is None else f"{peak:.2f} GiB, {'ok' if peak <= planned else 'OVER THE PLAN'}"
        cells = [
            policy,
            *(f"{took[name]:.3g}" for name in PARTS),
            f"{weights:.2f} GiB",
            f"{planned:.2f} GiB",
            fits or "-",
        ]
        rows.append("| " + " | ".join(cells) + " |")
        results.append(
            f"{policy} {took['picture']:.3g} ms a picture" + (f", peak {fits} of {planned:.2f}" if fits else "")
        )
        run.say(r, rows[-1])
    run.say(r, "\n".join(["", *rows]))

    # ---- plan, result
    if args.plan == "all":
        run.say(r, f"\n{memory_table()}")
    run.finish(r, args, "Sa2VA", f"{args.size}: {'; '.join(results)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
