"""Does FastSAM2 run here?  Shapes, first losses, a gradient on every parameter for every task, post-processing.

python smoke/smoke_fastsam2.py                                        # ResNet-18, 128 px, 20 s on a CPU, no data
python smoke/smoke_fastsam2.py --backbone resnet50 --size 640 --device cuda --dtype bf16
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.fastsam2 import FastSAM2, FastSAM2Config
from models.mask_losses import WEIGHTS
from models.panoptic_post import ImageSize, panoptic
from models.prompt_fusion import CLIP_TASKS, PROMPT_TASKS, TASKS, PromptBatch
from models.segment_losses import segment_losses
from utils import run

K, FRAMES = 20, 2
OUTPUTS = 4  # three stages and an adaptor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--backbone", default="resnet18", choices=["resnet18", "resnet34", "resnet50"], help="torchvision's")
    p.add_argument("--size", type=int, default=128, help="side of the pictures in px")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=2, help="items per process and step")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def make_batch(task: str, B: int, S: int, device: torch.device) -> tuple[dict, PromptBatch | None]:
    """Noise with three rectangles of each image as targets; the last image has none. Prompts mix every kind."""
    frames = (FRAMES,) if task in CLIP_TASKS else ()
    masks = torch.zeros(3, *frames, S, S, dtype=torch.bool)
    for q in range(3):
        masks[q, ..., q * S // 4 : (q + 1) * S // 4, S // 8 : S // 2] = True
    every = [masks] * (B - 1) + [masks[:0]]
    batch = {"task": task, "image": torch.rand(B, *frames, 3, S, S), "masks": every,
             "labels": [torch.arange(len(m)) for m in every], "ignore": torch.zeros(B, *frames, S, S).bool()}  # fmt: skip
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    batch |= {k: [x.to(device) for x in batch[k]] for k in ("masks", "labels")}
    if task not in PROMPT_TASKS:
        return batch, None
    mix = {"points": torch.rand(3, 2, 2) * S, "point_labels": torch.tensor([[1, 0], [1, -1], [-1, -1]])}
    mix |= {"boxes": torch.tensor([[1.0, 2, S / 2, S / 3]]).repeat(3, 1), "texts": torch.randn(3, 64)}
    mix |= {"mask_prompts": masks[:, 0] if frames else masks, "has_mask": torch.tensor([False, True, False])}
    rows = [{k: v[: len(m)] for k, v in mix.items()} for m in every]
    return batch, PromptBatch.pad(rows).to(device)


def check(task: str, model: FastSAM2, B: int, S: int, r) -> str:
    """A training step's forward and backward: shapes, first losses, gradients. Returns what it found."""
    batch, prompts = make_batch(task, B, S, r.device)
    Q = 3 if prompts is not None else model.cfg.queries
    model.train().zero_grad(set_to_none=True)
    t0 = time.perf_counter()
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = model(batch["image"], prompts, task=task)
        losses = segment_losses(out, batch)
    padded = -(-S // 32) * 8  # a quarter of the next multiple of 32
    frames = (FRAMES,) if task in CLIP_TASKS else ()
    assert [m.shape for m in out["masks"]] == OUTPUTS * [(B, Q, *frames, padded, padded)], out["masks"][0].shape
    assert [c.shape for c in out["classes"]] == OUTPUTS * [(B, Q, K + 1)], out["classes"][0].shape
    want = OUTPUTS * WEIGHTS["mask"] * math.log(2)  # points are sampled where a mask is undecided
    assert B < 2 or abs(losses["mask"].item() - want) < 0.35 * want, f"first mask loss {losses['mask']:.2f}, {want:.2f}"
    losses["loss"].backward()
    wrong = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not wrong, f"{task}: no finite gradient on {wrong[:4]}"
    seconds = time.perf_counter() - t0
    parts = " | ".join(f"{k} {v.item():.2f}" for k, v in losses.items() if k != "loss")
    return f"{task:11s} | {Q:3d} queries | {parts} (mask: want about {want:.2f}) | {1e3 * seconds:.0f} ms"


def agree(model: FastSAM2, S: int, r) -> str:
    """CPU = GPU on the same weights, in float32; AssertionError unless to 1e-3 of the largest mask logit."""
    on_cpu = FastSAM2(model.cfg).eval()
    on_cpu.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, S, S)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = (m(x)["masks"][0].cpu() for m, x in ((model, images.to(r.device)), (on_cpu, images)))
    error = (here - there).abs().max().item() / there.abs().max().item()
    assert error < 1e-3, f"CPU and GPU differ by {error:.1e} of the largest mask logit of the first stage"
    return f", CPU = GPU within {error:.1e}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, batch_size=(1, 64), size=(32, 4096))
    r = run.start(args, argv)
    cfg = FastSAM2Config(classes=[f"class {k}" for k in range(K)], backbone=args.backbone, embed_dim=64)
    model = FastSAM2(cfg).to(r.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {K} classes")
    for task in TASKS:
        print(check(task, model, args.batch_size, args.size, r), flush=True)

    model.eval()
    S, image = args.size, torch.randint(0, 256, (1, 3, args.size, args.size), dtype=torch.uint8, device=r.device)
    size = ImageSize((S, S), (S, S), tuple(-(-S // 32) * 32 for _ in range(2)))
    t0 = time.perf_counter()
    with torch.no_grad(), torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = model(image, task="panoptic")
        found = panoptic(out["classes"][-1][0], out["masks"][-1][0], model.is_thing, size, threshold=0.0, overlap=0.0)
    assert found["map"].shape == (S, S)
    seconds = time.perf_counter() - t0
    more = agree(model, S, r) if r.device.type == "cuda" else ""
    print(f"an image of noise: {len(found['value'])} segments, {1e3 * seconds:.0f} ms with post-processing")
    run.finish(r, args, "FastSAM2", f"PASS {args.backbone}, {len(TASKS)} tasks, {args.batch_size} x {S} px{more}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
