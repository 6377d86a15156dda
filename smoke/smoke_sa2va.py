"""Does Sa2VA run here?  First losses, a gradient on just what is trained, prediction, eight frames of video in all modes.

python smoke/smoke_sa2va.py                                     # tiny random models of the three lines, 20 s on a CPU
python smoke/smoke_sa2va.py --arch qwen3_vl --device cuda --dtype bf16
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.moving_shapes import MovingShapes
from data.vessel_questions import answer, question
from models.sa2va import Sa2VA
from models.sa2va_processor import ARCHS
from models.sa2va_sizes import tiny_sa2va
from models.sa2va_video import MODES, prompted_frames
from utils import run

FRAMES, SIDE, OBJECTS = 8, 96, 2
AGREE = 1e-3  # of the largest logit, CPU and GPU
SAME = 1e-4  # of the largest logit, the same mask from a batch of another size


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--arch", default="all", choices=["all", *ARCHS], help="line of the language model")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def check_training(model: Sa2VA, frames: list[np.ndarray], masks: np.ndarray, r) -> str:
    """Forward and backward of a picture with two objects, a video, an answer without [SEG] and a text."""
    encode = model.processor.encode
    text, several = question(["the bar"]), question(["the bar", "the circle"])
    batch = model.processor.collate([
        encode(frames[0], several, answer(OBJECTS), masks[:, 0]), encode(frames[:3], text, answer(1), masks[:1, :3]),
        encode(frames[1], text, answer(0)), encode(None, "What is a bar?", "A shape."),
    ])  # fmt: skip
    model.train().zero_grad(set_to_none=True)
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = model(batch)
    want = math.log(model.mllm.config.text_config.vocab_size)
    assert abs(out["lm"].item() - want) < 0.3, f"first language loss {out['lm'].item():.3f}, expected ln V = {want:.3f}"
    assert out["masks"] == OBJECTS + 3 and [x is None for x in out["mask_logits"]] == [False, False, True, True]
    assert 0.2 < out["bce"].item() < 2 and 0 < out["dice"].item() < 1, (out["bce"].item(), out["dice"].item())
    out["loss"].backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert with_gradient == trained, f"gradient or none, against expectation: {sorted(with_gradient ^ trained)[:4]}"
    return (f"lm {out['lm'].item():.3f} (want {want:.3f}), bce {out['bce'].item():.3f}, dice {out['dice'].item():.3f}, "
            f"gradients on {len(trained)} tensors")  # fmt: skip


def check_prediction(model: Sa2VA, frames: list[np.ndarray]) -> str:
    """Generated and forced answers, alone and in a batch."""
    asked = [(frames[0], question(["the bar"])), (frames[3][:, : SIDE // 2], question(["the circle"]))]
    said = model.predict_many(asked, max_new_tokens=4)
    forced = model.predict_many(asked, force_seg=True)
    for (image, text), one, many in zip(asked, said, forced, strict=True):
        assert one["text"] == model.predict(image, text, max_new_tokens=4)["text"]
        alone = model.predict(image, text, force_seg=True)
        assert many["masks"].shape == many["probs"].shape == (1, *image.shape[:2]) and many["answer"] == "It is [SEG]."
        error = off(many["logits"], alone["logits"])
        assert error < SAME, f"a picture in a batch and alone: mask logits differ by {error:.1e} of the largest"
    return f"says '{said[0]['text'][:24]}', draws {forced[0]['masks'].float().mean().item():.0%}"


def check_video(model: Sa2VA, frames: list[np.ndarray]) -> str:
    """All modes: shapes, prompted frames as still pictures, objects apart as together; the rest follows by memory."""
    width, took = model.text_hidden_fcs[2].out_features, []
    prompts = 10 * torch.randn(OBJECTS, width, generator=torch.Generator().manual_seed(0))
    model.set_tracking_decoder()
    still, _ = model.masks_from_prompts(frames, prompts)
    for mode in MODES:
        t = time.perf_counter()
        logits, scores = model.propagate(frames, prompts, mode)
        took.append(f"{mode} {1e3 * (time.perf_counter() - t) / FRAMES:.0f} ms")
        side = model.sam.image_size // 4
        assert logits.shape == (OBJECTS, FRAMES, side, side) and scores.shape == (OBJECTS, FRAMES), logits.shape
        assert logits.isfinite().all() and scores.isfinite().all()
        start = prompted_frames(FRAMES, model.processor.cfg.frames, mode)
        rest = sorted(set(range(FRAMES)) - set(start))
        error = off(logits[:, start], still[:, start])
        assert error < SAME, f"{mode}: prompted frames differ from still pictures by {error:.1e}"
        assert rest and off(logits[:, rest], still[:, rest]) > SAME, f"{mode}: frames without a prompt ignore memory"
        apart = torch.cat([model.propagate(frames, p[None], mode)[0] for p in prompts])
        error = off(apart, logits)
        assert error < SAME, f"{mode}: objects apart and together differ by {error:.1e}"
    return ", ".join(took) + " a frame"


def agree(arch: str, model: Sa2VA, image: np.ndarray, seed: int) -> str:
    """CPU = GPU on the same weights, in float32; AssertionError unless to AGREE of the largest logit."""
    on_cpu = tiny_sa2va(seed, arch, sam_size=128, neck=64, max_tiles=4)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = (m.predict(image, question(["the bar"]), force_seg=True)["logits"] for m in (model, on_cpu))
    error = off(here, there)
    assert error < AGREE, f"CPU and GPU differ by {error:.1e} of the largest mask logit"
    return f", CPU = GPU within {error:.1e}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(args, argv)
    scene = MovingShapes(1, args.seed, SIDE, frames=FRAMES, empty=0, crowds=0, voids=0).scene(0, 0)
    frames, masks = list(scene.image), np.stack([scene.masks == i for i in scene.ids[-OBJECTS:]])  # (n, T, H, W)
    archs, more = (ARCHS if args.arch == "all" else [args.arch]), ""
    for arch in archs:
        model = tiny_sa2va(args.seed, arch, sam_size=128, neck=64, max_tiles=4).to(r.device)
        parts = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{arch:10s} | {parts:.2f} M | {check_training(model, frames, masks, r)}", flush=True)
        model.eval()
        print(f"{'':10s} | {check_prediction(model, frames)} | {check_video(model, frames)}", flush=True)
        more = agree(arch, model, frames[0], args.seed) if r.device.type == "cuda" else ""
    run.finish(r, args, "Sa2VA", f"PASS {', '.join(archs)}, {FRAMES} frames in {len(MODES)} modes{more}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
