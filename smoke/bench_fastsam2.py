"""Time FastSAM2 part by part beside transformers' Mask2Former with a backbone of the same class, random weights.

    python smoke/bench_fastsam2.py                                                   # laptop, one thread: 2 min
    python smoke/bench_fastsam2.py --backbone resnet50 --size 256x256 512x512 --rounds 5             # 3 min
    python smoke/bench_fastsam2.py --device cuda --backbone resnet50 --size 800x1333 --rounds 100
    python smoke/bench_fastsam2.py --device cuda --dtype bf16 --compile --backbone resnet50 --size 800x1333 --rounds 100

One image, 133 classes, 100 queries. Both take turns call by call; CPU times (one thread) are process time, GPU times go
from the call to finished work. Each cell: p50 / p95 in ms; x: how many times FastSAM2's p50 Mask2Former's is.
    backbone         both start from the normalised image, padded to multiples of 32
    neck             LiteDFPN; Mask2Former's pixel decoder
    objects          decoder and classes from cached features; Mask2Former's transformer decoder and classes
    100 prompts      as many clicks, from clicks to masks on cached features
    post-processing  panoptic_post.panoptic; Mask2FormerImageProcessor's, which compares masks at 384 x 384 px for any
                     image. Both get FastSAM2's logits and lowest thresholds, so that every query counts: dearest case
    network          image to logits in one call, FastSAM2's from bytes
    total            network and then post-processing; in brackets images per second at p50
FastSAM2's options, each beside its row above: 50 of the queries kept after stage 1 (objects, post-processing, total);
100 prompts with keys of rank 64, with keys 16 px apart, and fused by a mean.
--compile: torch.compile of each part and of encode and decode, of FastSAM2's without a break in the graph.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig
from transformers.models.mask2former.image_processing_mask2former import Mask2FormerImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.fastsam2 import BACKBONES, STRIDE, FastSAM2, FastSAM2Config
from models.fastsam2_options import reconfigured
from models.panoptic_post import ImageSize, panoptic
from models.prompt_fusion import PromptBatch
from utils import run

THINGS, STUFF, PROMPTS, WARM_UP = 80, 53, 100, 2
LAYERS = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
}
PARTS = ("backbone", "neck", "objects", f"{PROMPTS} prompts", "post-processing")
KEPT = 50
PROMPT_OPTIONS = {"rank 64": {"key_rank": 64}, "/16": {"key_stride": 16}, "mean": {"fusion": "mean"}}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument(
        "--backbone",
        nargs="+",
        default=["resnet18", "resnet50"],
        choices=list(LAYERS),
        help="a table each (default two)",
    )
    p.add_argument("--size", nargs="+", default=["256x256"], metavar="HxW", help="pixels of the image, a table each")
    p.add_argument("--rounds", type=int, default=10, help="timed calls of each row (default 10)")
    p.add_argument("--compile", action="store_true", help="torch.compile both networks")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- candidates


@dataclass
class Candidate:
    """Calls without arguments; what one leaves for the next is cached."""

    parts: dict[str, Callable]  # of PARTS
    network: Callable  # image to logits

    def total(self) -> None:
        self.network()
        self.parts["post-processing"]()


def make_mask2former(backbone: str) -> Mask2FormerForUniversalSegmentation:
    """transformers' defaults (6 encoder layers, 9 decoder layers, 100 queries) on its own ResNet."""
    kind, depths = LAYERS[backbone]
    stages = [f"stage{i}" for i in range(1, 5)]
    resnet = ResNetConfig(depths=depths, hidden_sizes=list(BACKBONES[backbone]), layer_type=kind, out_features=stages)
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=resnet, num_labels=THINGS + STUFF))


def decode_clicks(model: FastSAM2, prompts: PromptBatch, features: torch.Tensor) -> dict:
    return model.decode(features, model.queries(prompts, features), objects=False)


def fastsam2_calls(model: FastSAM2, image: torch.Tensor, prepare: Callable) -> tuple[Candidate, dict]:
    """image uint8 (1, 3, H, W); prepare: torch.compile, or as it is. Also what the decoder makes of the image."""
    H, W = image.shape[-2:]
    points = torch.rand(PROMPTS, 1, 2, device=image.device) * torch.tensor([W, H], device=image.device)
    labels = torch.ones(PROMPTS, 1, dtype=torch.long, device=image.device)
    prompts = PromptBatch.pad([{"points": points, "point_labels": labels}])
    backbone, neck, encode, decode = (prepare(f) for f in (model.backbone, model.neck, model.encode, model.decode))
    clicks = prepare(functools.partial(decode_clicks, model, prompts))
    x = padded_noise(image)
    maps, features = backbone(x), encode(image)
    out = decode(features)
    size = ImageSize((H, W), (H, W), tuple(x.shape[-2:]))
    logits = (out["classes"][-1][0], out["masks"][-1][0])
    parts = [
        functools.partial(backbone, x),
        functools.partial(neck, maps),
        functools.partial(decode, features),
        functools.partial(clicks, features),
        functools.partial(panoptic, *logits, model.is_thing, size, threshold=0.0, overlap=0.0),
    ]
    return Candidate(dict(zip(PARTS, parts, strict=True)), lambda: decode(encode(image))), out


def option_calls(model: FastSAM2, image: torch.Tensor, prepare: Callable) -> dict[str, Callable]:
    """Rows of the options, as `fastsam2_calls` makes them: one network each, with the weights of `model`."""
    kept, _ = fastsam2_calls(reconfigured(model, keep_queries=KEPT), image, prepare)
    rows = {f"{name}, {KEPT} kept": kept.parts[name] for name in ("objects", "post-processing")}
    rows[f"total, {KEPT} kept"] = kept.total
    for name, changes in PROMPT_OPTIONS.items():
        other, _ = fastsam2_calls(reconfigured(model, **changes), image, prepare)
        rows[f"{PROMPTS} prompts, {name}"] = other.parts[f"{PROMPTS} prompts"]
    return rows


def mask2former_calls(
    model: Mask2FormerForUniversalSegmentation, image: torch.Tensor, prepare: Callable, out: dict
) -> Candidate:
    """The same for transformers; out: logits for its post-processing."""
    backbone, neck, decode, network = (
        prepare(f) for f in (model.model.pixel_level_module.encoder, model.model.pixel_level_module.decoder,
                             functools.partial(decode_objects, model), model)
    )  # fmt: skip
    x = padded_noise(image)
    maps = backbone(x).feature_maps
    pyramid = neck(maps)
    logits = SimpleNamespace(class_queries_logits=out["classes"][-1], masks_queries_logits=out["masks"][-1])
    limits = {"threshold": 0.0, "overlap_mask_area_threshold": 0.0}
    limits |= {"label_ids_to_fuse": set(range(THINGS, THINGS + STUFF)), "target_sizes": [tuple(image.shape[-2:])]}
    parts = {
        "backbone": functools.partial(backbone, x),
        "neck": functools.partial(neck, maps),
        "objects": functools.partial(decode, pyramid.multi_scale_features, pyramid.mask_features),
        "post-processing": functools.partial(
            Mask2FormerImageProcessor().post_process_panoptic_segmentation, logits, **limits
        ),
    }
    return Candidate(parts, functools.partial(network, x))


def decode_objects(model: Mask2FormerForUniversalSegmentation, maps: list[torch.Tensor], features: torch.Tensor):
    """What Mask2Former does after its pixel decoder -> classes (1, 100, K + 1), masks (1, 100, h, w)."""
    out = model.model.transformer_module(multi_scale_features=maps, mask_features=features)
    return model.class_predictor(out.intermediate_hidden_states[-1].transpose(0, 1)), out.masks_queries_logits[-1]


def padded_noise(image: torch.Tensor) -> torch.Tensor:
    """A normalised image as large as `image` is after padding."""
    sides = [-(-n // STRIDE) * STRIDE for n in image.shape[-2:]]
    return torch.randn(1, 3, *sides, device=image.device)


# ---- measurement


def timed(call: Callable, r) -> float:
    """Milliseconds until its work is done."""
    clock = time.process_time if r.device.type == "cpu" else time.perf_counter
    start = clock()
    call()
    if r.device.type == "cuda":
        torch.cuda.synchronize(r.device)
    return 1e3 * (clock() - start)


@torch.no_grad()
def measure(backbone: str, size: tuple[int, int], r, rounds: int, compiled: bool) -> dict[str, list[torch.Tensor]]:
    """{row: times (rounds,) in ms of FastSAM2 and, where it has such a part, of Mask2Former}."""
    torch.compiler.reset()
    K = THINGS + STUFF
    cfg = FastSAM2Config([f"class {k}" for k in range(K)], backbone, is_thing=[k < THINGS for k in range(K)])
    ours, theirs = FastSAM2(cfg).to(r.device).eval(), make_mask2former(backbone).to(r.device).eval()
    numbers = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (ours, theirs)]
    run.say(r, f"# {backbone}, {size[0]} x {size[1]} px: {numbers[0]:.1f} M parameters, Mask2Former {numbers[1]:.1f} M")
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, device=r.device)
    whole = functools.partial(torch.compile, fullgraph=True, dynamic=False) if compiled else as_it_is
    loose = functools.partial(torch.compile, dynamic=False) if compiled else as_it_is
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        first, out = fastsam2_calls(ours, image, whole)
        second = mask2former_calls(theirs, image, loose, out)
        rows = {name: [c.parts[name] for c in (first, second) if name in c.parts] for name in PARTS}
        rows |= {"network": [first.network, second.network], "total": [first.total, second.total]}
        rows |= {name: [call] for name, call in option_calls(ours, image, whole).items()}
        times = {name: [[] for _ in calls] for name, calls in rows.items()}
        for i in range(WARM_UP + rounds):
            for name, calls in rows.items():
                for call, took in zip(calls, times[name], strict=True):
                    ms = timed(call, r)
                    took += [ms] if i >= WARM_UP else []
    return {name: [torch.tensor(took) for took in each] for name, each in times.items()}


def as_it_is(module: nn.Module | Callable) -> nn.Module | Callable:
    return module


def median(times: torch.Tensor) -> float:
    return times.quantile(0.5).item()


def table(times: dict[str, list[torch.Tensor]]) -> str:
    """One line for each row."""
    lines = [f"{'p50 / p95 in ms':24s} | {'FastSAM2':>15s} | {'Mask2Former':>15s} | x"]
    for name, each in times.items():
        cells = [f"{median(t):6.1f} / {t.quantile(0.95).item():6.1f}" for t in each]
        ratio = f"{median(each[1]) / median(each[0]):.2f}" if len(each) == 2 else "-"
        speed = f"  ({', '.join(f'{1e3 / median(t):.3g}/s' for t in each)})" if name == "total" else ""
        lines.append(" | ".join([f"{name:24s}", *(f"{c:>15s}" for c in [*cells, "-"][:2]), ratio]) + speed)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, rounds=(1, 10_000))
    sizes = [tuple(run.numbers("--size", text, "x", 2)) for text in args.size]
    if min(map(min, sizes)) < STRIDE:
        raise run.UserError(f"--size {' '.join(args.size)}: expected at least {STRIDE} pixels to each side")
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # it says that it knows Mask2Former with Swin only

    # ---- a table for each backbone and size
    results = []
    for backbone in args.backbone:
        for text, size in zip(args.size, sizes, strict=True):
            times = measure(backbone, size, r, args.rounds, args.compile)
            run.say(r, table(times))
            p50 = {name: [median(t) for t in each] for name, each in times.items()}
            cells = [
                f"{name} {p50[name][0]:.1f} ms ({p50[name][1] / p50[name][0]:.2f} x)" for name in ("network", "total")
            ]
            results.append(f"{backbone} {text} {', '.join(cells)}, {PARTS[3]} {p50[PARTS[3]][0]:.1f} ms")

    # ---- result
    how = f"{args.dtype}{', compiled' if args.compile else ''}, p50 (Mask2Former's time over ours)"
    run.finish(r, args, "FastSAM2", f"{how}: {'; '.join(results)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
