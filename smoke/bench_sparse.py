"""Time sparse convolution layer by layer and the whole Res16UNet34C: beside spconv on the same kernel maps and conv3d.

    python smoke/bench_sparse.py                                        # a 20 000 point frame, one thread: 1 min
    python smoke/bench_sparse.py --points frame.npy --rounds 9          # (P, 3) float32 in metres
    python smoke/bench_sparse.py --device cuda --dtype bf16 --rounds 50

The frame: pixels of a 640 x 480 depth picture of a rendered room with balls, voxels of 2 cm. Each distinct layer of the
backbone is called on the voxels of its level, all candidates in turn; figures are medians, on a CPU of process time
with one thread, on a GPU from the call to finished work. `maps` are made once a frame and are in no layer's time.
    spconv     its Native algorithm on our pairs, CPU only, forward only (its backward asks for a GPU); "left out" where
               it is not installed. Its result is compared with ours
    conv3d     torch's, dense on the box around the voxels, called once; left out above 5 GFLOP
    train      one forward and backward pass, batch norm in training mode, gradients to all parameters
Fewer and more points of the same frame show whether time is linear in voxels.
"""

import argparse
import functools
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.res16unet import Res16UNet
from models.sparse_conv import SparseConv, SparseConvTranspose, SparseTensor, sparse_convolution, voxelise
from models.sparse_maps import KernelMap
from utils import run
from utils.run import UserError

VOXEL, DENSE_GFLOP = 0.02, 5
SPCONV = importlib.util.find_spec("spconv") is not None


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--points", default=None, help=".npy with a frame's points (P, 3) in metres (default: rendered)")
    p.add_argument("--rounds", type=int, default=5, help="timed calls of each figure (default 5)")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def render_frame(rng: np.random.Generator) -> np.ndarray:
    """(640 * 480, 3) float32: what a camera in the corner of a room of 4.6 x 4 x 2.4 m with twelve balls sees"""
    v, u = np.mgrid[:480, :640].reshape(2, -1)
    d = np.stack([(u - 319.5) / 577.87, np.ones(u.size), (239.5 - v) / 577.87 - 0.2], 1)  # y ahead, z up
    with np.errstate(divide="ignore"):
        t = (np.array([2.3, 2.0, 1.2]) / np.abs(d) + np.array([0, 1.5, 0.2]) / d).min(1)
    for _ in range(12):
        centre, radius = rng.uniform([-1.2, 1.2, -1.3], [1.2, 3.2, 0.4]), rng.uniform(0.1, 0.35)
        b, a = d @ centre, (d**2).sum(1)
        inside = b**2 - a * (centre @ centre - radius**2)
        t = np.where(inside > 0, np.minimum(t, (b - np.sqrt(inside.clip(0))) / a), t)
    return (d * t[:, None]).astype(np.float32)


def read_points(path: str) -> np.ndarray:
    try:
        points = np.load(path)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"--points {path}: not readable as .npy ({type(e).__name__}); save a float array (P, 3)") from e
    if not isinstance(points, np.ndarray) or points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise UserError(f"--points {path}: holds {getattr(points, 'shape', 'no array')}, expected finite (P, 3) metres")
    return points.astype(np.float32)


def milliseconds(calls: dict, r, rounds: int) -> dict[str, float]:
    """Median of each call, by turns, each second round in the other order; one round warms up."""
    clock, times = time.process_time if r.device.type == "cpu" else time.perf_counter, {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if i % 2 else -1]:
            start = clock()
            call()
            if r.device.type == "cuda":
                torch.cuda.synchronize(r.device)
            times[name] += [1e3 * (clock() - start)] if i else []
    return {name: statistics.median(mine) for name, mine in times.items()}


# ---- layers


def layers_of(model: Res16UNet, x: SparseTensor) -> dict[tuple, list]:
    """{(kind, kernel, stride in, channels in, out): [layer, its input, its kernel map, how many of them]}"""
    found, hooks = {}, []

    def seen(layer, inputs, out):
        (x,) = inputs
        kind = "up" if isinstance(layer, SparseConvTranspose) else "down" if layer.stride > 1 else "same"
        name = (kind, layer.kernel_size, x.stride, x.features.shape[1], out.features.shape[1])
        fine = min(x.stride, out.stride)
        kernel_map = x.coordinates.strided(fine, layer.kernel_size, layer.stride, layer.dilation)
        found.setdefault(name, [layer, x, kernel_map.swapped if kind == "up" else kernel_map, 0])[-1] += 1

    for module in model.modules():
        if isinstance(module, SparseConv) and module.kernel_size > 1:
            hooks.append(module.register_forward_hook(seen))
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def spconv_call(kernel_map: KernelMap, x: torch.Tensor, kernel: torch.Tensor):
    """spconv's forward with our pairs: a call that returns (N_out, C_out)"""
    from spconv.core import ConvAlgo
    from spconv.pytorch import ops

    counts = torch.bincount(kernel_map.offset, minlength=kernel_map.volume)
    pairs = torch.full((2, kernel_map.volume, max(kernel_map.rows_in, kernel_map.rows_out)), -1, dtype=torch.int32)
    place = torch.arange(len(kernel_map)) - (counts.cumsum(0) - counts)[kernel_map.offset]
    pairs[0, kernel_map.offset, place] = kernel_map.source.int()
    pairs[1, kernel_map.offset, place] = kernel_map.target.int()
    k = round(kernel_map.volume ** (1 / 3))
    filters = kernel.detach().permute(2, 0, 1).reshape(kernel.shape[2], k, k, k, kernel.shape[1]).contiguous()
    x, counts, rows = x.detach(), counts.int(), kernel_map.rows_out
    symmetric = kernel_map.symmetric
    return lambda: ops.indice_conv(x, filters, pairs, counts, rows, False, symmetric, ConvAlgo.Native)


def dense_call(name: tuple, layer: SparseConv, x: SparseTensor):
    """torch's dense convolution on the box around the voxels, or None if that is too much"""
    kind, k, stride, C_in, C_out = name
    low, high = x.coords.amin(0)[1:], x.coords.amax(0)[1:]
    size = [s + s % 2 for s in ((high - low) // stride + 1).tolist()]
    cells = size[0] * size[1] * size[2] // (8 if kind == "down" else 1)
    if 2e-9 * cells * C_in * C_out * k**3 > DENSE_GFLOP:
        return None
    weight = layer.kernel.detach().reshape(k, k, k, C_in, C_out).permute(4, 3, 2, 1, 0)
    grid = torch.zeros(1, C_in, *size, device=layer.kernel.device)
    if kind == "up":
        return functools.partial(F.conv_transpose3d, grid, weight.transpose(0, 1).contiguous(), stride=2)
    return functools.partial(F.conv3d, grid, weight.contiguous(), stride=layer.stride, padding=k // 2 if k % 2 else 0)


@torch.no_grad()
def time_layers(model: Res16UNet, x: SparseTensor, r, rounds: int) -> list[float]:
    """Prints the table; returns how many times spconv's time ours is, for each layer."""
    there = SPCONV and r.device.type == "cpu" and r.dtype == torch.float32
    why = "" if there else " (left out: " + ("not installed)" if not SPCONV else "CPU and fp32 only)")
    run.say(r, f"layer{'':29s} voxels in -> out  pairs/voxel  ours ms  spconv ms{why}  conv3d ms")
    ratios, worst = [], 0.0
    for name, (layer, source, kernel_map, count) in sorted(layers_of(model, x).items()):
        features, kernel = source.features, layer.kernel
        calls = {"ours": functools.partial(sparse_convolution, features, kernel, kernel_map)}
        if there:
            calls["spconv"] = spconv_call(kernel_map, features, kernel)
            ours, theirs = calls["ours"](), calls["spconv"]()
            worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max()))
        dense = dense_call(name, layer, source)
        ms = milliseconds(calls, r, rounds) | (milliseconds({"conv3d": dense}, r, 1) if dense else {})
        ratios += [ms["ours"] / ms["spconv"]] if there else []
        shown = f"{ms['spconv']:8.2f} ({ratios[-1]:.2f}x)" if there else "left out"
        kind, k, stride, C_in, C_out = name
        run.say(r, f"{count} x {kind:4s} k{k} at {stride:2d}, {C_in:3d} -> {C_out:3d} {kernel_map.rows_in:9d} -> "
                f"{kernel_map.rows_out:6d} {len(kernel_map) / max(1, kernel_map.rows_out):8.1f} {ms['ours']:12.2f} "
                f"{shown:>16s} " + (f"{ms['conv3d']:10.1f}" if dense else "  left out"))  # fmt: skip
    if there:
        run.say(r, f"ours / spconv: median {statistics.median(ratios):.2f}, largest {max(ratios):.2f} over "
                f"{len(ratios)} layers; results differ by {worst:.0e} of the largest value")  # fmt: skip
    return ratios


# ---- the whole backbone


def time_backbone(model: Res16UNet, points: torch.Tensor, r, rounds: int) -> dict[str, float]:
    """ms of maps, forward (maps made before) and training step (maps included), and the number of voxels."""
    colours = torch.rand_like(points) * 2 - 1
    x, _ = voxelise(points, colours, VOXEL)

    def forward(fresh: bool):
        with torch.no_grad():
            model.eval()(voxelise(points, colours, VOXEL)[0] if fresh else x)

    def train():
        model.train()(voxelise(points, colours, VOXEL)[0]).features.float().square().mean().backward()
        model.zero_grad()

    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        ms = milliseconds({"fresh": lambda: forward(True), "cached": lambda: forward(False)}, r, rounds)
        ms |= milliseconds({"train": train}, r, max(1, rounds // 3))
    return {"voxels": len(x.keys), "maps": ms["fresh"] - ms["cached"], "forward": ms["fresh"], "train": ms["train"]}


def main(argv=None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, rounds=(1, 10_000))
    frame = read_points(args.points) if args.points else None
    r = run.start(args, argv)
    if r.device.type == "cpu":
        torch.set_num_threads(1)

    # ---- frame, network
    rng = np.random.default_rng(args.seed)
    frame = render_frame(rng) if frame is None else frame
    frame = torch.as_tensor(frame[rng.permutation(len(frame))], device=r.device)
    model = Res16UNet().to(r.device).eval()
    points = frame[:20_000]
    x, _ = voxelise(points, torch.rand_like(points) * 2 - 1, VOXEL)
    levels = [len(x.coordinates.keys(s)) for s in (1, 2, 4, 8, 16)]
    run.say(r, f"{len(points)} points, voxels at strides 1, 2, 4, 8, 16: {levels}; median of {args.rounds}")

    # ---- times
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        ratios = time_layers(model, x, r, args.rounds)
    rows = {}
    for P in [n for n in (5_000, 10_000, 20_000, 40_000) if n <= len(frame)] or [len(frame)]:
        rows[P] = row = time_backbone(model, frame[:P], r, args.rounds)
        run.say(r, f"backbone, {P} points, {row['voxels']} voxels: maps {row['maps']:.0f} ms, forward with maps "
                f"{row['forward']:.0f} ms ({1e3 * P / row['forward']:.0f} points/s), train {row['train']:.0f} ms "
                f"({1e3 * row['train'] / row['voxels']:.0f} us per voxel)")  # fmt: skip

    # ---- result
    row = rows[max(P for P in rows if P <= 20_000)] if min(rows) <= 20_000 else rows[min(rows)]
    against = f"median {statistics.median(ratios):.2f}x spconv, largest {max(ratios):.2f}x" if ratios else "no spconv"
    run.finish(r, args, "ESAM", f"Res16UNet34C, {row['voxels']} voxels: forward {row['forward']:.0f} ms (maps "
               f"{row['maps']:.0f}), training step {row['train']:.0f} ms; layers {against}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.cli(main))
