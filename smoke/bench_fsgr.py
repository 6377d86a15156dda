"""Time captioning: decoding with and without a cache beside transformers' generate, and a training step of each stage.

    python smoke/bench_fsgr.py                                     # laptop, one thread, ViT-B/16: 3 min
    python smoke/bench_fsgr.py --preset tiny                       # 15 s
    python smoke/bench_fsgr.py --device cuda --dtype bf16 --batch-size 64

Decoding: 32 images x 20 words, random weights, no caption may end early. Candidates take turns; figures are medians, of
process time on a CPU (one thread) and of the clock on a GPU; behind each, how many times ours it is.
    cached        FSGR's decoder, beam search of models/caption_decoding.py
    uncached      the same search, with a forward pass over all words so far at each step; called once
    transformers  generate of a BART decoder of the same width, heads, layers and vocabulary over given encoder outputs
    M2            the meshed decoder, cached: three levels of encoder to look at instead of one
Steps: forward, backward and AdamW of random images. XE: one caption of 8 to 18 words for each image. SCST: 5 beams of
each image, which a random model never ends (20 words: the longest case), rewarded with CIDEr-D against 5 references.
"""

import argparse
import functools
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.caption_attention import DecoderCache
from models.caption_decoding import beam_search
from models.caption_losses import caption_loss
from models.fsgr import FSGR, FSGRDecoder, preset
from models.m2_transformer import M2Decoder
from models.self_critical import END, self_critical_loss
from utils import run
from utils.caption_metrics import CiderReward, DocumentFrequencies

IMAGES, BEAMS, WORDS, VOCAB, CODEBOOK, LEVELS, REFERENCES = 32, 5, 20, 10_201, 80, 3, 5
BAR = 3.0  # SCST step over XE step


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--preset", default="vit_b16", choices=["vit_b16", "tiny"], help="sizes; tiny is for laptops")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--rounds", type=int, default=3, help="timed calls of each candidate (default 3)")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- candidates


class Uncached(nn.Module):
    """A decoder's protocol without its cache: each step is a forward pass over all words so far."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.pad, self.bos, self.eos, self.max_len = decoder.pad, decoder.bos, decoder.eos, decoder.max_len

    def start(self, memory):
        self.memory = memory
        words = torch.zeros(len(memory[0]), 0, 1, dtype=torch.long, device=memory[0].device)
        return DecoderCache([(words, words)], [[(memory[0], memory[0])]])  # words so far, where keys would be

    def step(self, tokens: torch.Tensor, cache: DecoderCache) -> torch.Tensor:
        words = torch.cat([cache.own[0][0], tokens[:, None, None]], 1)  # (R, t, 1)
        cache.own = [(words, words)]
        return self.decoder(words[..., 0], self.memory)[:, -1]


def make_bart(cfg) -> BartForConditionalGeneration:
    """A decoder of transformers with the sizes of ours. Its encoder is one small layer that is never called."""
    sizes = {"d_model": cfg.dim, "decoder_layers": cfg.dec_layers, "decoder_ffn_dim": cfg.d_ff}
    sizes |= {"decoder_attention_heads": cfg.heads, "encoder_attention_heads": cfg.heads}
    sizes |= {"encoder_layers": 1, "encoder_ffn_dim": 8, "vocab_size": len(cfg.vocab)}
    sizes |= {"max_position_embeddings": cfg.max_len + 1, "activation_function": "relu", "tie_word_embeddings": False}
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **ids, forced_eos_token_id=None))


def search(decoder: nn.Module, memory, beam: int, words: int) -> int:
    """Ours; returns how many words it has decoded for each caption."""
    return beam_search(decoder, memory, beam, words, min_len=words, early_exit=False).tokens.shape[2]


def generate(bart: BartForConditionalGeneration, memory, beam: int, words: int) -> int:
    lengths = {"max_new_tokens": words, "min_new_tokens": words}
    outputs = BaseModelOutput(last_hidden_state=memory[0])
    return bart.generate(encoder_outputs=outputs, num_beams=beam, do_sample=False, **lengths).shape[1] - 1


def decoding_calls(r, cfg) -> dict:
    """{candidate: call(beam, words) -> words decoded}; prints their sizes."""
    patches = (cfg.image_size // cfg.clip["patch"]) ** 2
    sizes = (VOCAB, cfg.max_len, cfg.dim)
    ours = FSGRDecoder(*sizes, cfg.heads, cfg.d_ff, cfg.dec_layers).to(r.device).eval()
    meshed = M2Decoder(*sizes, LEVELS, LEVELS, cfg.heads, cfg.d_ff).to(r.device).eval()
    bart = make_bart(cfg).to(r.device).eval()
    memory = (torch.randn(IMAGES, patches, cfg.dim, device=r.device), torch.zeros(1, patches, cfg.dim, device=r.device))
    levels = torch.randn(IMAGES, LEVELS, patches, cfg.dim, device=r.device)
    parts = {"cached": [ours], "transformers": [bart.model.decoder, bart.lm_head], "M2": [meshed]}
    counts = {name: sum(p.numel() for m in modules for p in m.parameters()) / 1e6 for name, modules in parts.items()}
    run.say(r, f"# decoders of {', '.join(f'{n:.1f} M ({name})' for name, n in counts.items())} parameters; "
               f"{IMAGES} images x {patches} patches, {WORDS} words")  # fmt: skip
    return {
        "cached": functools.partial(search, ours, memory),
        "transformers": functools.partial(generate, bart, memory),
        "M2": functools.partial(search, meshed, levels),
        "uncached": functools.partial(search, Uncached(ours).eval(), memory),
    }


# ---- training steps


def random_text(vocab: list[str]) -> str:
    return " ".join(random.choices(vocab[4:], k=random.randint(8, 18)))


class Steps:
    """One model and its optimizer; xe() and scst() are a step each. The rate is 0, so all steps are alike."""

    def __init__(self, r, cfg, images: int):
        self.r, self.vocab, self.model = r, cfg.vocab, FSGR(cfg).to(r.device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)
        self.images = torch.randn(images, 3, cfg.image_size, cfg.image_size, device=r.device)
        texts = {i: [f"{random_text(cfg.vocab)} {END}" for _ in range(REFERENCES)] for i in range(max(images, 100))}
        self.ids, self.reward = list(range(images)), CiderReward(DocumentFrequencies.of_images(texts.values()), texts)
        place = {word: i for i, word in enumerate(cfg.vocab)}
        rows = [[2, *(place[w] for w in texts[i][0].split())] for i in self.ids]
        pad, longest = self.model.decoder.pad, max(map(len, rows))
        self.tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=r.device)  # (B, L)
        self.shares: list[dict[str, float]] = []  # of the time of each SCST step, by the clock

    def update(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def xe(self) -> None:
        with torch.autocast(self.r.device.type, self.r.dtype, enabled=self.r.dtype != torch.float32):
            logits = self.model(self.images, self.tokens[:, :-1])["logits"]
        self.update(caption_loss(logits, self.tokens[:, 1:], self.model.decoder.pad))

    def scst(self) -> None:
        start = time.perf_counter()
        with torch.autocast(self.r.device.type, self.r.dtype, enabled=self.r.dtype != torch.float32):
            loss, info = self_critical_loss(
                self.model, self.model, self.images, self.ids, self.reward, "beam", BEAMS, WORDS
            )
        self.update(loss)
        wait(self.r)
        whole = time.perf_counter() - start
        self.shares.append({name: info[f"{name}_s"] / whole for name in ("decode", "reward")})


# ---- measurement


def wait(r) -> None:
    """Until the GPU has done what it was told."""
    if r.device.type == "cuda":
        torch.cuda.synchronize(r.device)


def medians(calls: dict, r, rounds: int, once: tuple[str, ...] = ()) -> dict[str, float]:
    """Median seconds of each call; they take turns, those of `once` in the first round only."""
    clock = time.process_time if r.device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            if i and name in once:
                continue
            start = clock()
            call()
            wait(r)
            times[name].append(clock() - start)
    return {name: statistics.median(took) for name, took in times.items()}


def time_decoding(r, cfg, rounds: int) -> dict[str, float]:
    """Prints a row for beams and one for greedy; returns how many times ours the others take in the first."""
    candidates, first = decoding_calls(r, cfg), {}
    low = torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32)
    for beam in (BEAMS, 1):
        with torch.no_grad(), low:
            for name, call in candidates.items():
                done = call(beam, 2)  # libraries set themselves up
                assert done == 2, f"{name} decoded {done} words, not 2"
            calls = {name: functools.partial(call, beam, WORDS) for name, call in candidates.items()}
            took = medians(calls, r, rounds, once=("uncached",))
        cells = [f"{name} {s:.3g} s ({s / took['cached']:.2f}x)" for name, s in took.items()]
        run.say(r, f"{'greedy' if beam == 1 else f'beam {beam}':8s} " + " | ".join(cells))
        first = first or {name: s / took["cached"] for name, s in took.items()}
    return first


def time_steps(r, cfg, images: int, rounds: int) -> dict[str, float]:
    """Prints a row for each stage; returns their images per second."""
    steps = Steps(r, cfg, images)
    calls = {"XE": steps.xe, "SCST": steps.scst}
    medians(calls, r, 1)
    steps.shares.clear()
    took = medians(calls, r, rounds)
    shares = {name: 100 * statistics.median(x[name] for x in steps.shares) for name in steps.shares[0]}
    shares["gradient"] = 100 - sum(shares.values())
    inside = ", ".join(f"{name} {share:.3g} %" for name, share in shares.items())
    for name, s in took.items():
        run.say(r, f"{name:8s} {s:.3g} s a step of {images} images: {images / s:.3g} images/s"
                   + (f" ({inside})" if name == "SCST" else ""))  # fmt: skip
    return {name: images / s for name, s in took.items()}


def main(argv=None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, batch_size=(1, 10_000), rounds=(1, 1000))
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{i}" for i in range(VOCAB - 4))]
    cfg = preset(args.preset, words, [f"text {i}" for i in range(CODEBOOK)])

    # ---- decoding, training steps
    times = time_decoding(r, cfg, args.rounds)
    speed = time_steps(r, cfg, args.batch_size, args.rounds)

    # ---- result
    ratio = speed["XE"] / speed["SCST"]
    run.say(r, f"SCST step {ratio:.2f} x an XE step, allowed {BAR:g}: {'ok' if ratio <= BAR else 'TOO SLOW'}")
    run.finish(
        r,
        args,
        "FSGR",
        f"{args.preset}, {args.dtype}: beam {BEAMS} {times['transformers']:.2f} x as fast as transformers, "
        f"{times['uncached']:.1f} x as fast as uncached; XE {speed['XE']:.3g}, SCST {speed['SCST']:.3g} images/s",
    )


if __name__ == "__main__":
    sys.exit(run.cli(main))
