"""CLIP and the adapted image tower against arrays that the original code computed, all within 1e-5.

Reads LAB_SHARED/data/fsgr/module_cases: openai_clip*.npz (image, text, patch_tokens_before_ln_post, image_embed,
text_embed, sd.* in OpenAI's layout) and fsgr_backbone*.npz (img, att_feats, global_feat, align_feats, sd.* of FSGR's
backbone). Every size is read off the arrays; heads are the key `heads` (`text_heads`) if it is there.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import clip
from models.clip_adapter import AdaptedCLIP, AdapterConfig
from utils.weights import load_strict

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fsgr"
CASES = SHARED / "module_cases"
TOLERANCE = 1e-5
BACKBONE_HEADS = 4


def cases(pattern: str) -> list[tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """(file, arrays, state dict) of every case; skips where there is none."""
    found = sorted(CASES.glob(pattern))
    if not found:
        pytest.skip(f"no reference cases {pattern} in {CASES}; set LAB_SHARED")
    out = []
    for path in found:
        with np.load(path) as z:
            arrays = {k: torch.from_numpy(np.asarray(z[k])) for k in z.files}
        state = {k[3:]: arrays.pop(k) for k in list(arrays) if k.startswith("sd.")}
        out.append((path, arrays, state))
    return out


def agree(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], where: str) -> None:
    worst = {name: float((got - want).abs().max()) for name, (got, want) in pairs.items()}
    print(f"\n{where}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()), end="")
    for name, (got, want) in pairs.items():
        assert got.shape == want.shape, f"{where}: {name} is {tuple(got.shape)}, stored {tuple(want.shape)}"
    assert max(worst.values()) <= TOLERANCE, f"{where}: off by {worst}"


def heads_of(arrays: dict[str, torch.Tensor], key: str, default: int) -> int:
    return int(arrays[key]) if key in arrays else default


@torch.no_grad()
def test_clip_equals_openai(capsys, tmp_path):
    found = cases("openai_clip*.npz")
    for path, arrays, state in found:
        derived = clip.config_of_shapes(state, "quick_gelu", path)
        cfg = replace(
            derived,
            heads=heads_of(arrays, "heads", derived.heads),
            text_heads=heads_of(arrays, "text_heads", derived.text_heads),
        )
        there_and_back = clip.from_transformers(clip.to_transformers(state, cfg), cfg)
        models = {"OpenAI layout": clip.CLIP(cfg), "through transformers' layout": clip.CLIP(cfg)}
        for model, weights in zip(models.values(), (state, there_and_back), strict=True):
            load_strict(model.eval(), weights, path)
        if cfg == derived:  # a file alone cannot tell other heads
            save_file(state, tmp_path / "openai.safetensors")
            models["from a file"] = clip.load_clip(tmp_path / "openai.safetensors")
        for layout, model in models.items():
            tokens = model.visual(arrays["image"])
            pairs = {
                "patches": (tokens[:, 1:], arrays["patch_tokens_before_ln_post"]),
                "image": (model.encode_image(arrays["image"]), arrays["image_embed"]),
                "text": (model.encode_text(arrays["text"]), arrays["text_embed"]),
            }
            with capsys.disabled():
                agree(pairs, f"{path.name}, {layout}")
    with capsys.disabled():
        print(f"\nopenai_clip: {len(found)} of {len(found)} cases within {TOLERANCE}", end="")


def adapted_of(arrays: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> AdaptedCLIP:
    """The tower that the case's state dict belongs to, in the source's output convention."""
    width, _, patch, _ = state["conv1.weight"].shape
    layers = sum(k.endswith("attn.in_proj_weight") for k in state)
    with_adapter = sorted(int(k.split(".")[2]) for k in state if k.endswith("S_Adapter.D_fc1.weight"))
    clip_cfg = clip.CLIPConfig(
        image_size=round((len(state["positional_embedding"]) - 1) ** 0.5) * patch, patch=patch, width=width,
        layers=layers, heads=heads_of(arrays, "heads", BACKBONE_HEADS), embed_dim=state["proj"].shape[1],
        mlp=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
    )  # fmt: skip
    hidden = [state[f"transformer.resblocks.{i}.S_Adapter.D_fc1.weight"].shape[0] for i in with_adapter]
    cfg = AdapterConfig(
        kind="sequential" if with_adapter else "none", output_norm="prompt_norm.weight" in state, compat=True,
        first=min(with_adapter, default=0), last=max(with_adapter, default=0), ratio=max(hidden, default=width) / width,
        prompts=state["prompt_embeddings"].shape[1] if "prompt_embeddings" in state else 0,
    )  # fmt: skip
    model = AdaptedCLIP(clip_cfg, cfg).eval()
    load_strict(model, state, "the case")
    return model


@torch.no_grad()
def test_adapted_tower_equals_fsgr(capsys):
    found = cases("fsgr_backbone*.npz")
    for path, arrays, state in found:
        out = adapted_of(arrays, state)(arrays["img"])
        names = {"patches": "att_feats", "global": "global_feat", "align": "align_feats"}
        with capsys.disabled():
            agree({ours: (out[ours], arrays[theirs]) for ours, theirs in names.items()}, path.name)
    with capsys.disabled():
        print(f"\nfsgr_backbone: {len(found)} of {len(found)} cases within {TOLERANCE}", end="")
