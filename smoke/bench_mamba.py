"""Time Mamba2 against the torch path of transformers' Mamba2Mixer, same weights, interleaved in one process.

python smoke/bench_mamba.py                                            # 1 min on one core
python smoke/bench_mamba.py --shapes 1,8192,256 --repeats 9
python smoke/bench_mamba.py --device cuda --dtype bf16 --impl mamba_ssm

CPU figures are process time (use one thread: several threads spin while they wait), CUDA figures are wall time with
synchronisation. The ratio says how many times faster ours is than transformers at chunk 256, its default, and 64.
"""

import argparse
import inspect
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.mamba2 import Mamba2, describe_impl
from utils import run


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
    p.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    p.add_argument(
        "--repeats", type=int, default=21, help="timed calls of each candidate, after 3 warm-ups (default 21)"
    )
    p.add_argument(
        "--shapes",
        nargs="+",
        default=["8,64,128", "2,64,512", "1,1024,256"],
        metavar="B,T,D",
        help="batch, steps, width; D a multiple of 32 (default 8,64,128 2,64,512 1,1024,256)",
    )
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def parse_shape(text: str) -> tuple[int, int, int]:
    """ "8,64,128" -> (8, 64, 128)"""
    parts = text.split(",")
    if len(parts) != 3 or not all(x.isdigit() and int(x) > 0 for x in parts) or int(parts[2]) % 32:
        raise run.UserError(
            f"--shapes {text}: expected B,T,D, positive integers with D a multiple of 32, as in 8,64,128"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


def make_mixer(block: Mamba2, chunk_size: int) -> Mamba2Mixer:
    """transformers' block with our block's weights."""
    config = transformers.Mamba2Config(
        hidden_size=block.d_model,
        num_heads=block.nheads,
        head_dim=block.headdim,
        state_size=block.d_state,
        n_groups=block.ngroups,
        chunk_size=chunk_size,
    )
    mixer = Mamba2Mixer(config, layer_idx=0).to(block.D.device)
    mixer.load_state_dict(block.state_dict(), strict=True)
    return mixer


def torch_path():
    """Context in which Mamba2Mixer.forward calls transformers' PyTorch functions, on every device.

    Outside it calls wrappers around them, which take the kernels where mamba_ssm or causal_conv1d import.
    """
    names = ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan")
    functions = {name: inspect.unwrap(getattr(modeling_mamba2, name)) for name in names}
    assert all(inspect.getfile(f) == modeling_mamba2.__file__ for f in functions.values()), functions
    return mock.patch.multiple(modeling_mamba2, **functions)


def call(block: torch.nn.Module, u: torch.Tensor, backward: bool) -> None:
    """One forward pass, or one forward and backward pass to the input and every parameter."""
    with torch.set_grad_enabled(backward):
        y = block(u)
        if backward:
            torch.autograd.grad(y.float().sum(), [u, *block.parameters()])
    if u.device.type == "cuda":
        torch.cuda.synchronize(u.device)


def interleaved_ms(blocks: list[torch.nn.Module], u: torch.Tensor, backward: bool, repeats: int) -> list[float]:
    """Median ms of each block; the blocks take turns, so that a disturbance hits all of them."""
    clock = time.process_time if u.device.type == "cpu" else time.perf_counter
    times = [[] for _ in blocks]
    for i in range(3 + repeats):
        for block, mine in zip(blocks, times, strict=True):
            start = clock()
            call(block, u, backward)
            if i >= 3:
                mine.append(1e3 * (clock() - start))
    return [sorted(mine)[repeats // 2] for mine in times]


def main(argv=None) -> None:
    args = parse_args(argv)
    shapes = [parse_shape(text) for text in args.shapes]
    if args.threads < 1 or args.repeats < 1:
        raise run.UserError(f"--threads {args.threads} --repeats {args.repeats}: both must be at least 1")
    torch.set_num_threads(args.threads)
    r = run.start(args, argv)
    run.say(r, f"# {describe_impl(args.impl, r.device)} | transformers {transformers.__version__}, torch path")
    run.say(r, f"{'(B,T,D)':14s} {'pass':8s} {'ours ms':>8s} {'hf256 ms':>9s} {'hf64 ms':>8s} {'x256':>6s} {'x64':>6s}")

    slowest = float("inf")
    for shape in shapes:
        ours = Mamba2(shape[2], impl=args.impl).to(r.device)
        blocks = [ours, make_mixer(ours, 256), make_mixer(ours, 64)]
        u = torch.randn(shape, device=r.device, requires_grad=True)
        for name, backward in (("fwd", False), ("fwd+bwd", True)):
            with torch_path(), torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
                ms, hf256, hf64 = interleaved_ms(blocks, u, backward, args.repeats)
            label = ",".join(str(n) for n in shape)
            run.say(r, f"{label:14s} {name:8s} {ms:8.2f} {hf256:9.2f} {hf64:8.2f} {hf256 / ms:6.2f} {hf64 / ms:6.2f}")
            slowest = min(slowest, hf64 / ms)
    result = (
        f"Mamba2 at least {slowest:.2f} x the speed of transformers at chunk 64, {args.dtype}, {len(shapes)} shapes"
    )
    run.finish(r, args, "TempoPeak", result)


if __name__ == "__main__":
    sys.exit(run.cli(main))
