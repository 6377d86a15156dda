"""Peak memory of Mamba2 and its peers on a CPU, each in a process of its own: forward, training per step, streaming.

python smoke/bench_mamba_memory.py                                # 2 min
python smoke/bench_mamba_memory.py --only ours checkpoint_blocks

B = 1, D = 256, float32. Growth of the resident set over what the process held before the call, input and weights
included in the latter. The C library is told to hand freed memory back (MALLOC_* variables below); otherwise the figures
would depend on what it keeps. Training: forward and backward to the input and every parameter, the difference between
8192 and 4096 steps by 4096. Candidates: see smoke/bench_mamba.py.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.mamba2 import Mamba2
from smoke.bench_mamba import call, candidates, torch_path
from utils import run

D, LONG, SHORTER, SHORT = 256, 32768, 8192, 4096
NAMES = ["ours", "checkpoint_blocks", "reference", "hf256", "hf64", "attention"]
HAND_BACK = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, help="candidates (default: all)")
    p.add_argument(
        "--one", nargs=3, metavar=("NAME", "PASS", "STEPS"), help="measure here and print bytes; used inside"
    )
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def status_kb(field: str) -> int:
    """VmRSS, the resident set now, or VmHWM, its peak"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure_here(name: str, kind: str, steps: int) -> int:
    """Growth in bytes of this process during one call of a candidate."""
    torch.manual_seed(0)
    if name == "checkpoint_blocks":
        block = Mamba2(D, impl="torch", checkpoint_blocks=True)
    else:
        block = candidates((1, LONG, D), "torch", torch.device("cpu"))[name]
    u, backward = torch.randn(1, steps, D, requires_grad=True), kind == "training"
    state, token = block.allocate_inference_cache(1) if kind == "stream" else None, torch.randn(1, 1, D)

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


def main(argv=None) -> None:
    args = parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        raise run.UserError(
            "bench_mamba_memory.py reads peaks from /proc/self, which this system does not have: use Linux"
        )
    if args.one:
        name, kind, steps = args.one
        print(measure_here(name, kind, int(steps)))
        return
    args.device, args.dtype, args.seed = "cpu", "fp32", 0
    r = run.start(args, argv)
    run.say(r, f"{'':18s} {f'forward T={LONG}':>18s} {'training per step':>18s}")
    shown = []
    for name in args.only:
        forward = measure(name, "forward", LONG) / 1e6
        slope = (measure(name, "training", SHORTER) - measure(name, "training", SHORT)) / (SHORTER - SHORT) / 1e3
        run.say(r, f"{name:18s} {forward:15.0f} MB {slope:15.1f} KB")
        shown.append(f"{name} {forward:.0f} MB / {slope:.1f} KB")
    grown = measure("ours", "stream", 5000) / 1e3
    held = sum(t.nbytes for t in Mamba2(D).allocate_inference_cache(1)) / 1e3
    run.say(r, f"streaming: a state of {held:.0f} KB; 5000 steps grew the process by {grown:.0f} KB")
    run.finish(
        r, args, "TempoPeak", f"forward / training per step: {', '.join(shown)}; 5000 streamed steps {grown:.0f} KB"
    )


if __name__ == "__main__":
    sys.exit(run.cli(main))
