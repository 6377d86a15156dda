"""FSGR's parts against arrays of the source code's own modules.

Reads LAB_SHARED/data/fsgr/module_cases/{fsgr_encoder_decoder_tiny,semantic_head_eval,supcon,grid_position_encodings,
m2_memory_attention}*.npz, whatever is there. Tolerance 1e-5; arrays stored as float16: 1e-3. Sizes come from the
arrays; heads from the key `heads`, where there is one, else 4.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models.caption_attention import Attention
from models.fsgr import FSGRDecoder, FSGREncoder, box_relation, sine_encoding
from models.m2_transformer import without_running
from models.semantic_head import SemanticHead, supcon_loss

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fsgr"
TOLERANCE, HALF_TOLERANCE, HEADS = 1e-5, 1e-3, 4


def cases(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted((SHARED / "module_cases").glob(f"{kind}*.npz"))
    if not files:
        pytest.skip(f"no reference cases {kind}*.npz in {SHARED / 'module_cases'}; set LAB_SHARED")
    return {f.stem: {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(f).items()} for f in files}


def heads(case) -> int:
    return int(case.get("heads", HEADS))


def below(case, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}


def depth(state) -> int:
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith("layers."))


def grid_of(name: str, N: int) -> tuple[int, int]:
    """'.._7x9' in a key says h x w; else the grid is square."""
    found = re.search(r"(\d+)x(\d+)", name)
    h, w = map(int, found.groups()) if found else (round(N**0.5),) * 2
    assert h * w == N, f"{name}: {N} patches, not {h} x {w}"
    return h, w


def report(kind: str, errors: dict[str, float], tolerance: float, capsys) -> None:
    """Print n of n and how far off, then fail for what is further off than the tolerance."""
    right = sum(e <= tolerance for e in errors.values())
    with capsys.disabled():
        print(f"\n{kind}: {right} of {len(errors)} within {tolerance:g}, largest difference {max(errors.values()):.1e}")
    assert right == len(errors), errors


def error(ours: torch.Tensor, stored: torch.Tensor) -> float:
    assert ours.shape == stored.shape, (ours.shape, stored.shape)
    return (ours.float() - stored.float()).abs().max().item()


@torch.no_grad()
def test_encoder_and_decoder(capsys):
    errors = {}
    for name, case in cases("fsgr_encoder_decoder_tiny").items():
        state = below(case, "enc.")
        state = {k: v for k, v in state.items() if not k.startswith("global_embed.")}  # the source never calls it
        N, dim = case["visual"].shape[1:]
        grid = tuple(case["grid"].tolist()) if "grid" in case else grid_of(name, N)
        d_ff = len(state["layers.0.pwff.fc1.weight"])
        encoder = FSGREncoder(
            grid, case["text_grids"].shape[2], dim, len(below(state, "WGs.")) // 2, d_ff, depth(state)
        )
        encoder.load_state_dict(state, strict=True)
        output, pos = encoder.eval()(case["visual"], case["text_grids"])
        errors |= {f"{name} pos": error(pos, case["pos"]), f"{name} encoder": error(output, case["enc_out"])}

        state = without_running(below(case, "dec."))
        V, rows = len(state["word_emb.weight"]), len(state["pos_emb.weight"])
        decoder = FSGRDecoder(V, rows - 1, dim, heads(case), d_ff, depth(state))
        decoder.load_state_dict(state, strict=True)
        logits = decoder.eval()(case["seq"], (case["enc_out"], case["pos"]))
        errors[f"{name} decoder"] = error(logits.log_softmax(-1), case["logprob"])
    report("fsgr_encoder_decoder", errors, TOLERANCE, capsys)


@torch.no_grad()
def test_semantic_head(capsys):
    errors = {}
    for name, case in cases("semantic_head_eval").items():
        top_k, count_norm = int(case.get("top_k", 20)), bool(case.get("count_norm", True))
        head = SemanticHead(case["text_embeddings"], case["log_scale"].item(), top_k, count_norm=count_norm).eval()
        found = head(case["global_feat"].flatten(1), case["patch_feats"])
        errors[f"{name} text_grids"] = error(found["text_grid"], case["text_grids"])
        errors[f"{name} index"] = (found["index"] != case["index"]).sum().item()
    report("semantic_head_eval", errors, TOLERANCE, capsys)


def test_supcon(capsys):
    errors = {}
    for name, case in cases("supcon").items():
        loss = supcon_loss(case["features"].flatten(1), case["labels"].flatten(), float(case.get("tau", 0.07)))
        errors[name] = error(loss, case["loss"])
    report("supcon", errors, TOLERANCE, capsys)


def test_grid_position_encodings(capsys):
    exact, half = {}, {}
    for name, case in cases("grid_position_encodings").items():
        for key, stored in case.items():
            if key.startswith("sine"):
                ours = sine_encoding(*grid_of(key, stored.shape[1]), stored.shape[2])
            elif key.startswith("box"):
                ours = box_relation(*grid_of(key, stored.shape[1]), stored.shape[3])[None]
            else:
                continue
            (half if stored.dtype == torch.float16 else exact)[f"{name} {key}"] = error(ours, stored)
    assert exact or half, "no array of a known kind"
    for kind, errors, tolerance in (("float32", exact, TOLERANCE), ("float16", half, HALF_TOLERANCE)):
        if errors:
            report(f"grid_position_encodings, {kind}", errors, tolerance, capsys)


@torch.no_grad()
def test_memory_attention(capsys):
    errors = {}
    for name, case in cases("m2_memory_attention").items():
        state = below(case, "sd.")
        attention = Attention(case["q"].shape[2], heads(case), state["m_k"].shape[1])
        attention.load_state_dict(state, strict=True)
        values = case.get("v", case["k"])
        errors[name] = error(attention(case["q"], case["k"], values, ~case["mask"].bool()), case["y"])
    report("m2_memory_attention", errors, TOLERANCE, capsys)
