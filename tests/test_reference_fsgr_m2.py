"""M2 against what its own code computed and decoded: LAB_SHARED/data/fsgr/module_cases/m2_tiny*.npz.

float32, eval mode; features and log-probabilities within 1e-5, tokens identical. After <eos> the source leaves id 0 in
its beams, and its greedy decoding talks on. Head count: key `heads`, else 4.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models.caption_decoding import beam_search, greedy, rescore, until_eos
from models.m2_transformer import M2Decoder, M2Encoder, without_running

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fsgr"
TOLERANCE = 1e-5
FILLER = 0  # of the source


def cases() -> list[tuple[str, dict[str, torch.Tensor]]]:
    found = sorted((SHARED / "module_cases").glob("m2_tiny*.npz"))
    if not found:
        pytest.skip(f"no m2_tiny*.npz in {SHARED / 'module_cases'}; set LAB_SHARED")
    return [(p.name, {k: torch.from_numpy(v) for k, v in np.load(p).items()}) for p in found]


def count(state: dict, pattern: str) -> int:
    return len({m[1] for m in (re.match(pattern, name) for name in state) if m})


def build(case: dict[str, torch.Tensor]) -> tuple[M2Encoder, M2Decoder]:
    """Both halves in the sizes of the arrays, with the case's weights, strictly."""
    state = without_running({k.removeprefix("sd."): v for k, v in case.items() if k.startswith("sd.")})
    dim, d_in = state["encoder.fc.weight"].shape
    heads, hidden = int(case.get("heads", 4)), len(state["encoder.layers.0.pwff.fc1.bias"])
    slots = state["encoder.layers.0.mhatt.attention.m_k"].shape[1]
    layers, levels = count(state, r"encoder\.layers\.(\d+)"), count(state, r"decoder\.layers\.0\.fc_alpha(\d+)")
    encoder = M2Encoder(d_in, dim, layers, heads, hidden, slots)
    decoder = M2Decoder(
        vocab_size=len(state["decoder.word_emb.weight"]),
        max_len=len(state["decoder.pos_emb.weight"]) - 1,
        dim=dim,
        layers=count(state, r"decoder\.layers\.(\d+)"),
        levels=levels,
        heads=heads,
        hidden=len(state["decoder.layers.0.pwff.fc1.bias"]),
    )
    for name, module in (("encoder.", encoder), ("decoder.", decoder)):
        module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
        module.eval()
    return encoder, decoder


def say(capsys, done: int, what: str, worst: float) -> None:
    with capsys.disabled():
        print(f"\nm2_tiny: {done} of {done} {what}; largest difference {worst:.1e}", end="")


@torch.no_grad()
def test_features_and_teacher_forcing(capsys):
    worst, compared = 0.0, 0
    for name, case in cases():
        encoder, decoder = build(case)
        memory = encoder(case["x"])
        logp = decoder(case["seq"], case["enc_out"]).log_softmax(-1)
        errors = [(memory - case["enc_out"]).abs().max(), (logp - case["xe_logprob"]).abs().max()]
        assert max(errors) <= TOLERANCE, f"{name}: encoder off by {errors[0]:.1e}, log-probs by {errors[1]:.1e}"
        worst, compared = max(worst, *map(float, errors)), compared + 2
    say(capsys, compared, "arrays of encoder and teacher forcing equal", worst)


@torch.no_grad()
def test_beams_and_greedy(capsys):
    worst, compared = 0.0, 0
    for name, case in cases():
        _, decoder = build(case)
        for key in sorted(k for k in case if re.fullmatch(r"beam\d+_tokens", k)):
            tokens, logprobs = case[key], case[key.replace("tokens", "logprobs")]
            k, T = tokens.shape[1:]
            found = beam_search(decoder, case["enc_out"], k, T, out_size=k, filler=FILLER)
            assert torch.equal(found.tokens, tokens), f"{name}: {key} differ"
            again = rescore(decoder, case["enc_out"], tokens)
            error = max((x - logprobs).abs().max().item() for x in (found.logprobs, again))
            assert error <= TOLERANCE, f"{name}: log-probs of {key} off by {error:.1e}"
            worst, compared = max(worst, error), compared + len(tokens) * k
        stored = case["greedy_tokens"]
        ours = greedy(decoder, case["enc_out"], stored.shape[1]).tokens[:, 0]
        counted = until_eos(stored, decoder.eos)
        assert torch.equal(ours, stored.masked_fill(~counted, decoder.pad)), f"{name}: greedy tokens differ"
        compared += len(stored)
    say(capsys, compared, "captions identical", worst)
