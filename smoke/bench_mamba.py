"""Time Mamba2 beside its peers in one process: transformers' torch path with the same weights, GRU, Transformer layer.

python smoke/bench_mamba.py                                            # all shapes, one thread: 8 min
python smoke/bench_mamba.py --shapes 8,64,128 1,1024,256 --threads 1 2
python smoke/bench_mamba.py --device cuda --dtype bf16 --impl mamba_ssm --shapes 8,64,128

Candidates take turns; figures are medians, of process time with one CPU thread and of wall time otherwise (several
threads spin while they wait). Behind each figure: how many times ours it is, for biGRU also how many times 2 dirs.
    hf256, hf64   transformers' Mamba2Mixer at chunk 256, its default, and at 64, its fastest
    reference     our block as composed operations under autograd (--impl reference)
    steps         our block token by token, up to T = 1024
    2 dirs        BiMamba2 of the same width, the sum of two blocks
    biGRU         bidirectional nn.GRU of the same output width
    attention     nn.TransformerEncoderLayer, 64 channels per head, 4 D in its middle: 1.5 to 1.8 times the parameters
attention is timed in training mode without dropout: its fast path of eval mode is 12 % faster at T = 64 and takes twice
as long at T = 8192. "At least": the algorithm's products in full chunks of 64 at the machine's rate, or its bytes at the
machine's bandwidth, whichever is longer, and the share of it that we reach.
CUDA in detail: smoke/bench_mamba_cuda.py.

python smoke/bench_mamba.py --memory          # 3 min: peak memory, each figure from a process of its own (Linux)

B = 1, D = 256, float32, one thread. Growth of the resident set over what the process held before the call, which had
input and weights already. The C library is told to hand freed memory back (MALLOC_* below), otherwise the figures would
depend on what it keeps. Training: the difference between 8192 and 4096 steps, by 4096. `checkpoint_blocks` is ours with
that argument.
"""

import argparse
import functools
import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import transformers
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.mamba2 import Mamba2, describe_impl
from models.temporal_heads import BiMamba2
from utils import run

SHAPES = ["8,64,128", "2,64,512", "1,1024,256", "1,8192,256", "1,32768,256"]
FORWARD_ONLY = 16384  # from this many steps on
MEASURED = ["ours", "checkpoint_blocks", "reference", "hf256", "hf64", "attention"]
HAND_BACK = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument(
        "--impl",
        default="auto",
        choices=["auto", "torch", "reference", "mamba_ssm"],
        help="Mamba2 implementation: auto takes the CUDA kernels where they import, else torch",
    )
    p.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads of torch, a table each (default 1)")
    p.add_argument("--seconds", type=float, default=20, help="for each shape and pass, at least 5 rounds (default 20)")
    p.add_argument(
        "--shapes",
        nargs="+",
        default=SHAPES,
        metavar="B,T,D",
        help="batch, steps, width; D a multiple of 64 (default: five shapes from 8,64,128 to 1,32768,256)",
    )
    p.add_argument("--memory", action="store_true", help="peak memory of ours and its peers instead of times")
    p.add_argument("--one", nargs=3, metavar=("NAME", "PASS", "STEPS"), help="print the bytes of one case; used inside")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def parse_shape(text: str) -> tuple[int, int, int]:
    """ "8,64,128" -> (8, 64, 128)"""
    parts = text.split(",")
    if len(parts) != 3 or not all(x.isdigit() and int(x) > 0 for x in parts) or int(parts[2]) % 64:
        raise run.UserError(
            f"--shapes {text}: expected B,T,D, positive integers with D a multiple of 64, as in 8,64,128"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


# ---- candidates


def make_config(block: Mamba2, chunk_size: int) -> transformers.Mamba2Config:
    """transformers' name for what our block is"""
    return transformers.Mamba2Config(
        hidden_size=block.d_model,
        num_heads=block.nheads,
        head_dim=block.headdim,
        state_size=block.d_state,
        n_groups=block.ngroups,
        chunk_size=chunk_size,
        num_hidden_layers=1,
    )


def make_mixer(block: Mamba2, chunk_size: int) -> Mamba2Mixer:
    """transformers' block with our block's weights"""
    mixer = Mamba2Mixer(make_config(block, chunk_size), layer_idx=0).to(block.D.device)
    mixer.load_state_dict(block.state_dict(), strict=True)
    return mixer


def torch_path():
    """Context in which Mamba2Mixer.forward calls transformers' PyTorch functions, on every device.

    Outside it calls wrappers around them, which take the kernels where mamba_ssm or causal_conv1d import.
    """
    names = ("causal_conv1d_fn", "causal_conv1d_update", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan")
    names += ("mamba2_selective_state_update",)
    functions = {name: inspect.unwrap(getattr(modeling_mamba2, name)) for name in names}
    assert all(inspect.getfile(f) == modeling_mamba2.__file__ for f in functions.values()), functions
    return mock.patch.multiple(modeling_mamba2, **functions)


class StepByStep(nn.Module):
    """The recurrence one token after the other: (B, T, D) -> (B, T, D)"""

    def __init__(self, block: Mamba2):
        super().__init__()
        self.block = block

    def forward(self, u):
        state, out = self.block.allocate_inference_cache(len(u)), []
        for token in u.split(1, 1):
            y, *state = self.block.step(token, *state)
            out.append(y)
        return torch.cat(out, 1)


def candidates(shape: tuple[int, int, int], impl: str, device: torch.device) -> dict[str, nn.Module]:
    _, T, D = shape
    ours, reference, both = Mamba2(D, impl=impl), Mamba2(D, impl="reference"), BiMamba2(D, impl=impl)
    for block in (reference, both.fwd, both.bwd):
        block.load_state_dict(ours.state_dict(), strict=True)
    blocks = {"ours": ours, "hf256": make_mixer(ours, 256), "hf64": make_mixer(ours, 64), "reference": reference}
    if T <= 1024:
        blocks["steps"] = StepByStep(reference)
    blocks["2 dirs"] = both
    blocks["biGRU"] = nn.GRU(D, D // 2, bidirectional=True, batch_first=True)
    blocks["attention"] = nn.TransformerEncoderLayer(D, D // 64, 4 * D, dropout=0.0, batch_first=True)
    return {name: block.to(device) for name, block in blocks.items()}


# ---- measurement


def call(block: nn.Module, u: torch.Tensor, backward: bool) -> None:
    """One forward pass, or one forward and backward pass to the input and every parameter."""
    with torch.set_grad_enabled(backward):
        y = block(u)
        y = y[0] if isinstance(y, tuple) else y
        if backward:
            torch.autograd.grad(y.float().sum(), [u, *block.parameters()])
    if u.device.type == "cuda":
        torch.cuda.synchronize(u.device)


def interleaved_ms(calls: dict, seconds: float, by_process: bool) -> dict[str, float]:
    """Median ms of each call; the calls take turns, so that a disturbance hits all of them. Two rounds warm up."""
    clock = time.process_time if by_process else time.perf_counter
    times, begun, rounds = {name: [] for name in calls}, time.perf_counter(), -2
    while rounds < 5 or time.perf_counter() - begun < seconds:
        for name, function in calls.items():
            start = clock()
            function()
            if rounds >= 0:
                times[name].append(1e3 * (clock() - start))
        rounds += 1
    return {name: sorted(mine)[len(mine) // 2] for name, mine in times.items()}


def show(r, label: str, ms: dict[str, float]) -> None:
    columns = {name: f"{name} {value:.3g} ({value / ms['ours']:.2f}x)" for name, value in ms.items()}
    if "biGRU" in ms:
        columns["biGRU"] += f", {ms['biGRU'] / ms['2 dirs']:.2f}x 2 dirs"
    run.say(r, f"{label:20s} " + " | ".join(columns.values()))


def roofline(shape: tuple[int, int, int], backward: bool) -> tuple[float, float]:
    """(GFLOP of the matrix products, MB that must pass through memory) of one call; d_state 128, chunks of 64.

    Products per step: in_proj, out_proj, C B^T, M x per head, and B^T x and C S, which the last and the first chunk do
    without; three times that with the backward pass. Memory: weights, u, in_proj's output, out_proj's input and the result written and read once;
    with the backward pass also their gradients, and in_proj's output and y once more.
    """
    b, T, D = shape
    d, N, Q = 2 * D, 128, min(64, T)
    width = 2 * d + 2 * N + d // 64
    weights = (width + d) * D
    flops = b * 2 * (T * (weights + Q * N + Q * d) + (T - Q) * 2 * N * d)
    floats = weights + b * T * 2 * (D + width + d)
    more = 2 * weights + b * T * (2 * (D + width + d) + width + 2 * d)
    return 1e-9 * flops * (3 if backward else 1), 4e-6 * (floats + (more if backward else 0))


def measure_machine(D: int) -> tuple[float, float]:
    """(GFLOP/s of a large float32 product of in_proj's shape, GB/s of a copy of 256 MB), best of ten"""
    x, w, big = torch.randn(1024, D), torch.randn(D, 4 * D + 256 + D // 32), torch.zeros(64 << 20)
    out, copy = x @ w, big.clone()
    seconds = {"mm": [], "copy": []}
    for _ in range(10):
        for name, function in (("mm", lambda: torch.mm(x, w, out=out)), ("copy", lambda: copy.copy_(big))):
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return 2e-9 * x.numel() * w.shape[1] / min(seconds["mm"]), 8e-9 * big.numel() / min(seconds["copy"])


def time_step(r, args, D: int) -> None:
    """A stream, batch 1: candidates take turns of 50 tokens, because a stream finds its weights in cache."""
    ours = Mamba2(D, impl=args.impl).to(r.device).eval()
    mixer, token = make_mixer(ours, 64).eval(), torch.randn(1, 1, D, device=r.device)
    cache = transformers.DynamicCache(config=make_config(ours, 64))

    def stream_ours():
        state = ours.allocate_inference_cache(1)
        for _ in range(50):
            _, *state = ours.step(token, *state)

    def stream_mixer():
        for _ in range(50):
            mixer(token, cache_params=cache)

    with torch.no_grad(), torch_path():
        mixer(token, cache_params=cache)
        ms = interleaved_ms({"ours": stream_ours, "hf": stream_mixer}, args.seconds / 5, r.device.type == "cpu")
    show(r, f"step D={D}", {name: value / 50 for name, value in ms.items()})


def status_kb(field: str) -> int:
    """VmRSS, the resident set now, or VmHWM, its peak"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure_here(name: str, kind: str, steps: int) -> int:
    """Growth in bytes of this process during one call of a candidate."""
    torch.manual_seed(0)
    if name == "checkpoint_blocks":
        block = Mamba2(256, impl="torch", checkpoint_blocks=True)
    else:
        block = candidates((1, 2048, 256), "torch", torch.device("cpu"))[name]
    u, backward = torch.randn(1, steps, 256, requires_grad=True), kind == "training"
    state, token = block.allocate_inference_cache(1) if kind == "stream" else None, torch.randn(1, 1, 256)

    def once(n):
        if kind != "stream":
            return call(block, u[:, :n], backward)
        with torch.no_grad():
            now = state
            for _ in range(n):
                _, *now = block.step(token, *now)

    with torch_path():
        once(128)  # libraries set themselves up
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = status_kb("VmRSS")
        once(steps)
    return 1024 * (status_kb("VmHWM") - before)


def measure(name: str, kind: str, steps: int) -> int:
    command = [sys.executable, __file__, "--one", name, kind, str(steps)]
    done = subprocess.run(command, env=os.environ | HAND_BACK, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def show_memory(r) -> str:
    """Prints the table of --memory; returns the result in one line."""
    run.say(r, f"{'':18s} forward T=32768   training per step")
    shown = []
    for name in MEASURED:
        forward = measure(name, "forward", 32768) / 1e6
        slope = (measure(name, "training", 8192) - measure(name, "training", 4096)) / 4096 / 1e3
        run.say(r, f"{name:18s} {forward:12.0f} MB {slope:16.1f} KB")
        shown.append(f"{name} {forward:.0f} MB / {slope:.1f} KB")
    grown, state = measure("ours", "stream", 5000) / 1e3, Mamba2(256).allocate_inference_cache(1)
    run.say(
        r,
        f"streaming: state {sum(t.nbytes for t in state) / 1e3:.0f} KB; 5000 steps grew the process by {grown:.0f} KB",
    )
    return f"forward T=32768 / training per step: {', '.join(shown)}; 5000 streamed steps {grown:.0f} KB"


# ---- the script


def main(argv=None) -> None:
    args = parse_args(argv)
    shapes = [parse_shape(text) for text in args.shapes]
    if min(args.threads) < 1 or args.seconds <= 0:
        raise run.UserError(f"--threads {args.threads} --seconds {args.seconds:g}: both must be positive")
    if (args.memory or args.one) and not Path("/proc/self/clear_refs").exists():
        raise run.UserError("--memory reads peaks from /proc/self, which this system does not have: use Linux")
    if args.memory and (args.device, args.dtype, args.impl, args.threads) != ("auto", "fp32", "auto", [1]):
        raise run.UserError(
            "--memory measures float32 on one CPU thread: leave --device, --dtype, --impl, --threads out"
        )
    if args.one:
        name, kind, steps = args.one
        if name not in MEASURED or kind not in ("forward", "training", "stream") or not steps.isdigit() or steps == "0":
            expected = f"one of {', '.join(MEASURED)}, then forward, training or stream, then steps >= 1"
            raise run.UserError(f"--one {' '.join(args.one)}: expected {expected}")
        print(measure_here(name, kind, int(steps)))
        return
    args.device = "cpu" if args.memory else args.device
    r = run.start(args, argv)
    if args.memory:
        run.finish(r, args, "TempoPeak", show_memory(r))
        return
    run.say(r, f"# {describe_impl(args.impl, r.device)} | transformers {transformers.__version__}, torch path | ms")
    ratios = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        run.say(r, f"# {threads} CPU threads")
        for shape in shapes:
            ratios += time_shape(r, args, shape, threads)
        for D in sorted({shape[2] for shape in shapes}):
            time_step(r, args, D)
    result = f"Mamba2 at least {min(ratios):.2f} x the speed of transformers at chunk 64, {args.dtype}"
    run.finish(r, args, "TempoPeak", f"{result}, {len(shapes)} shapes")


def time_shape(r, args, shape: tuple[int, int, int], threads: int) -> list[float]:
    """Prints the rows of one shape; returns how many times our time transformers takes at chunk 64."""
    blocks, ratios = candidates(shape, args.impl, r.device), []
    u = torch.randn(shape, device=r.device, requires_grad=True)
    by_process, on_cpu = threads == 1 and r.device.type == "cpu", r.device.type == "cpu"
    for backward in (False,) if shape[1] >= FORWARD_ONLY else (False, True):
        calls = {name: functools.partial(call, block, u, backward) for name, block in blocks.items()}
        with torch_path(), torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            ms = interleaved_ms(calls, args.seconds, by_process)
        label = ",".join(str(n) for n in shape) + (" fwd+bwd" if backward else " fwd")
        show(r, label, ms)
        ratios.append(ms["hf64"] / ms["ours"])
        if on_cpu and r.dtype == torch.float32:
            gflop, mb = roofline(shape, backward)
            rate, bandwidth = measure_machine(shape[2])
            bound = max(gflop / rate, 1e-3 * mb / bandwidth) * 1e3
            parts = f"{gflop:.2f} GFLOP at {rate:.0f} GFLOP/s, {mb:.0f} MB at {bandwidth:.0f} GB/s"
            run.say(r, f"{'':20s} at least {bound:.2f} ms ({parts}): ours is at {100 * bound / ms['ours']:.0f} %")
    return ratios


if __name__ == "__main__":
    sys.exit(run.cli(main))
