"""Everything that needs a GPU in one go: runs the smoke, overfit and bench scripts on CUDA and prints one table.

python smoke/smoke_gpu.py            # a few minutes; paste the table into LOG.md
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.run import ROOT, UserError

COMMANDS = [
    "smoke/smoke_mamba.py --device cuda",
    "smoke/smoke_mamba.py --device cuda --dtype bf16",
    "smoke/smoke_tempopeak.py --device cuda",
    "smoke/smoke_tempopeak.py --device cuda --size 224 --dtype bf16",
    "smoke/overfit_tempopeak.py --device cuda",
    "smoke/overfit_tempopeak.py --device cuda --dtype bf16",
    "smoke/bench_mamba.py --device cuda",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--only", default="", help="run only commands that contain this text")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError(f"this torch ({torch.__version__}) sees no GPU; `make smoke` checks a CPU")
    rows, failed = [], []
    for command in (c for c in COMMANDS if args.only in c):
        print(f"$ python {command}", flush=True)
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        rows += [line for line in done.stdout.splitlines() if line.startswith("| 20")]
        failed += [command] if done.returncode else []
    print("| when (UTC) | why | command | commit | machine, time | result |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    if failed:
        raise UserError(f"{len(failed)} of {len(COMMANDS)} failed: {'; '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
