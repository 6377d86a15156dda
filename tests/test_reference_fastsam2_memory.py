"""SAM 2's memory encoder and attention, and SAM's mask decoder, against arrays of the released code.

Reads LAB_SHARED/data/fastsam2/{ref_sam2_memory/*,ref_sam_prompt_encoder/sam_mask_decoder*}.npz, whatever is there;
sizes come from the arrays. Tolerances, absolute: memory 1e-4, mask decoder 1e-5.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models.sam2_memory import MemoryAttention, MemoryEncoder, sine_code
from models.sam_mask_decoder import SAMMaskDecoder
from models.sam_prompt_encoder import SAMPromptEncoder

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fastsam2"
MEMORY, DECODER = 1e-4, 1e-5


def cases(pattern: str, marker: str) -> dict[str, dict[str, torch.Tensor]]:
    """Arrays of each file that holds one called `marker`."""
    found = {f.stem: np.load(f) for f in sorted(SHARED.glob(pattern))}
    found = {k: {n: torch.from_numpy(np.asarray(v)) for n, v in z.items()} for k, z in found.items() if marker in z}
    if not found:
        pytest.skip(f"no reference cases {pattern} with {marker} in {SHARED}; set LAB_SHARED")
    return found


def part(case: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}


def largest(ours: torch.Tensor, stored: torch.Tensor) -> float:
    """Largest difference; NaN counts as infinite."""
    assert ours.shape == stored.shape, (ours.shape, stored.shape)
    return (ours - stored).abs().max().nan_to_num(torch.inf).item()


def report(kind: str, errors: dict[str, float], tolerance: float, capsys) -> None:
    right = sum(e <= tolerance for e in errors.values())
    with capsys.disabled():
        print(f"\n{kind}: {right} of {len(errors)} within {tolerance:g}, largest difference {max(errors.values()):.1e}")
    assert right == len(errors), errors


def count(state: dict[str, torch.Tensor], pattern: str) -> int:
    """How many numbers stand at the `*` of a name."""
    head, tail = pattern.split("*")
    return len({k.removeprefix(head).split(".")[0] for k in state if k.startswith(head) and k.endswith(tail)})


@torch.no_grad()
def test_memory_encoder(capsys):
    errors = {}
    for name, case in cases("ref_sam2_memory/*.npz", "enc_features").items():
        state = part(case, "enc.")
        out, dim = state["out_proj.weight"].shape[:2]
        stride = case["mask_logits"].shape[-1] // case["pix_feat"].shape[-1]
        encoder = MemoryEncoder(dim, out, stride, count(state, "fuser.layers.*.gamma")).eval()
        encoder.load_state_dict(state, strict=True)
        features = encoder(case["pix_feat"], case["mask_logits"].sigmoid())
        errors[f"{name} features"] = largest(features[:, 0], case["enc_features"])
        code = sine_code(out, tuple(features.shape[-2:]), features)
        errors[f"{name} position"] = largest(code.expand_as(case["enc_pos"]), case["enc_pos"])
    report("SAM 2 memory encoder", errors, MEMORY, capsys)


@torch.no_grad()
def test_memory_attention(capsys):
    errors = {}
    for name, case in cases("ref_sam2_memory/*.npz", "att_out").items():
        state = part(case, "att.")
        dim, memory_dim = state["layers.0.cross_attn_image.k_proj.weight"].shape
        hidden = len(state["layers.0.linear1.weight"])
        attention = MemoryAttention(dim, memory_dim, count(state, "layers.*.norm1.weight"), hidden).eval()
        attention.load_state_dict(state, strict=True)
        S, grid = len(case["curr"]), tuple(case["pix_feat"].shape[-2:]) if "pix_feat" in case else (0, 0)
        grid = grid if math.prod(grid) == S else (math.isqrt(S),) * 2
        inputs = [case[k].transpose(0, 1) for k in ("curr", "curr_pos", "memory", "memory_pos")]
        got = attention(*inputs, grid, int(case["num_obj_ptr_tokens"]))
        errors[name] = largest(got.transpose(0, 1), case["att_out"])
    report("SAM 2 memory attention", errors, MEMORY, capsys)


@torch.no_grad()
def test_mask_decoder(capsys):
    errors = {}
    for name, case in cases("ref_sam_prompt_encoder/*.npz", "masks_multi1").items():
        prompts, state = part(case, "pe."), part(case, "dec.")
        dim, channels = prompts["mask_downscaling.6.weight"].shape[:2]
        encoder = SAMPromptEncoder(dim, channels).eval()
        encoder.load_state_dict(prompts, strict=True)
        iou = count(state, "iou_prediction_head.layers.*.weight")
        decoder = SAMMaskDecoder(
            dim,
            heads=int(case.get("num_heads", 4)),  # not in any shape: that of the stored case
            hidden=len(state["transformer.layers.0.mlp.lin1.weight"]),
            depth=count(state, "transformer.layers.*.norm1.weight"),
            iou_hidden=len(state["iou_prediction_head.layers.0.weight"]),
            iou_depth=iou,
        ).eval()
        decoder.load_state_dict(state, strict=True)
        grid = tuple(case["image_embedding"].shape[-2:])
        size = tuple(case.get("input_image_size", 16 * torch.tensor(grid)).tolist())
        fields = {"points_px": "points", "labels": "labels", "boxes_xyxy_px": "boxes", "masks": "masks"}
        sparse, dense = encoder(size, grid, **{ours: case[k] for ours, k in fields.items() if k in case})
        for several in (1, 0):
            masks, quality = decoder(case["image_embedding"], encoder.grid_code(grid), sparse, dense, bool(several))
            errors[f"{name} masks {several}"] = largest(masks, case[f"masks_multi{several}"])
            errors[f"{name} iou {several}"] = largest(quality, case[f"iou_multi{several}"])
    report("SAM mask decoder", errors, DECODER, capsys)
