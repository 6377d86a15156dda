"""Does Mamba2 run here?  Shapes, finite gradients, step = forward, CPU = GPU, speed.  No data, a few seconds.

python smoke/smoke_mamba.py                                  # 5 s on a CPU
python smoke/smoke_mamba.py --device cuda --impl mamba_ssm   # the CUDA kernels, or a sentence why not
python smoke/smoke_mamba.py --dtype bf16
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.mamba2 import Mamba2, describe_impl, resolve_impl
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
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((got.cpu() - want.cpu()).abs().max() / want.abs().max().cpu()).item()


def forward_ms(block: Mamba2, u: torch.Tensor, repeats: int = 30) -> float:
    """Median time of a forward pass without gradients, in ms, after 5 warm-up calls."""
    times = []
    for _ in range(5 + repeats):
        start = time.perf_counter()
        block(u)
        if u.device.type == "cuda":
            torch.cuda.synchronize(u.device)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[5:])[repeats // 2]


def main(argv=None) -> None:
    args = parse_args(argv)
    r = run.start(args, argv)
    run.say(r, f"# {describe_impl(args.impl, r.device)}")
    impl = resolve_impl(args.impl, r.device)
    autocast = torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32)
    rounding = 1e-5 if r.dtype == torch.float32 and r.device.type == "cpu" else 2e-2  # GPUs may multiply in TF32

    # ---- shapes, gradients
    block = Mamba2(512, impl=args.impl).to(r.device)
    n = sum(p.numel() for p in block.parameters())
    u = torch.randn(2, 64, 512, device=r.device)
    with autocast:
        y = block(u)
    assert n == 1_719_600, f"{n:,} parameters, expected 1,719,600"
    assert y.shape == u.shape and y.isfinite().all(), y.shape
    y.square().mean().backward()
    bad = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad, f"no or non-finite gradient: {bad}"
    run.say(r, f"{n:,} parameters (expected 1,719,600), {tuple(u.shape)} -> {tuple(y.shape)}, gradients finite")

    # ---- step by step = forward, CPU = GPU, speed
    block = Mamba2(128, impl=args.impl).to(r.device).eval()
    u = torch.randn(8, 64, 128, device=r.device)
    with torch.no_grad(), autocast:
        y, rows, state = block(u), [], block.allocate_inference_cache(8)
        for token in u.split(1, dim=1):
            row, *state = block.step(token, *state)
            rows.append(row)
        stepped = relative_error(torch.cat(rows, 1), y)
        ms = forward_ms(block, u)
    assert stepped < rounding, f"64 steps differ from forward by {stepped:.1e}, allowed {rounding:.0e}"
    run.say(r, f"64 single steps = forward to {stepped:.1e}; {ms:.2f} ms per forward at (8, 64, 128), median of 30")
    same = "no GPU to compare"
    if r.device.type != "cpu":
        on_cpu = copy.deepcopy(block).cpu()
        on_cpu.impl = "torch"
        with torch.no_grad():
            error = relative_error(y, on_cpu(u.cpu()))
        assert error < rounding, f"{r.device} and CPU differ by {error:.1e}, allowed {rounding:.0e}"
        same = f"CPU = {r.device.type} to {error:.1e}"
    run.say(r, same)
    result = (
        f"PASS impl {impl}, shapes, gradients, step = forward to {stepped:.0e}, {same}; {ms:.2f} ms/forward (8,64,128)"
    )
    run.finish(r, args, "TempoPeak", result)


if __name__ == "__main__":
    sys.exit(run.cli(main))
