"""Everything that needs a GPU in one go: runs the smoke, overfit and bench scripts on CUDA and prints one table.

python smoke/smoke_gpu.py            # about 20 minutes, half of them compiling; paste the table into LOG.md
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.run import ROOT, UserError

TRAIN = "train/train.py --device cuda --batch-size 8 --size 112x112 --shift gsm --val-clips 16 --clips 160"
CAPTIONS = (
    "train/train_fsgr.py --device cuda --data runs/gpu/shapes --cache-gb 1 --batch-size 16 --workers 4 --epochs 2"
)
ROOMS = "train/train_esam.py --device cuda --data rooms --warmup 5 --steps 40 --val-every 40 --val-items 4"
COMMANDS = [
    "smoke/smoke_mamba.py --device cuda",
    "smoke/smoke_mamba.py --device cuda --dtype bf16",
    "smoke/smoke_tempopeak.py --device cuda",
    "smoke/smoke_tempopeak.py --device cuda --size 224 --dtype bf16",
    "smoke/overfit_tempopeak.py --device cuda",
    "smoke/overfit_tempopeak.py --device cuda --dtype bf16",
    "smoke/bench_mamba.py --device cuda",
    "smoke/bench_mamba_cuda.py",
    f"{TRAIN} --dtype bf16 --compile --workers 4 --steps 20 --out runs/gpu/bf16",
    f"{TRAIN} --dtype fp16 --steps 20 --stop-at 10 --out runs/gpu/fp16",
    f"{TRAIN} --dtype fp16 --steps 20 --resume auto --out runs/gpu/fp16",
    "data/prepare_rally.py runs/gpu/rally.mp4 --seconds 10",
    "eval/infer_peaks.py runs/gpu/rally.mp4 --ckpt runs/gpu/bf16/last --out runs/gpu/peaks --device cuda --dtype bf16",
    "-m torch.distributed.run --nproc_per_node=gpu " + f"{TRAIN} --dtype bf16 --steps 20 --out runs/gpu/ddp",
    "smoke/smoke_fsgr.py --device cuda",
    "smoke/smoke_fsgr.py --device cuda --preset vit_b16 --dtype bf16",
    "smoke/overfit_fsgr.py --device cuda --scst-steps 100",
    "smoke/bench_fsgr.py --device cuda --dtype bf16 --batch-size 64",
    "data/prepare_shape_captions.py runs/gpu/shapes",
    f"{CAPTIONS} --preset tiny --min-freq 1 --dtype bf16 --prototypes 64 --prototype-every 5 --out runs/gpu/xe",
    f"{CAPTIONS} --stage rl --init runs/gpu/xe/best --dtype fp16 --out runs/gpu/rl",
    "-m torch.distributed.run --nproc_per_node=gpu "
    + f"{CAPTIONS} --stage rl --init runs/gpu/xe/best --dtype bf16 --out runs/gpu/rl_ddp",
    "smoke/smoke_fastsam2.py --device cuda",
    "smoke/smoke_fastsam2.py --device cuda --dtype bf16",
    "smoke/bench_fastsam2.py --device cuda --backbone resnet50 --size 800x1333 --rounds 100",
    "smoke/bench_fastsam2.py --device cuda --backbone resnet50 --size 800x1333 --rounds 100 --dtype bf16 --compile",
    "train/train_fastsam2.py --device cuda --dtype bf16 --workers 4 --steps 40 --val-every 40 --out runs/gpu/fastsam2",
    "-m torch.distributed.run --nproc_per_node=gpu train/train_fastsam2.py --device cuda --dtype fp16 --own-tasks "
    "--steps 40 --val-every 40 --out runs/gpu/fastsam2_ddp",
    "train/train_fastsam2.py --device cuda --dtype bf16 --data shapes shape-clips --memory --frames 6 --workers 4 "
    "--steps 40 --val-every 40 --out runs/gpu/streams",
    "smoke/bench_streams.py --device cuda --dtype bf16 --compile --backbone resnet50 --size 720x1280 --frames 100 --long 500",
    "smoke/bench_streams.py --device cuda --backbone resnet18 resnet50 --size 1024x1024 --frames 20 --peers",
    "smoke/smoke_sam3.py --device cuda",
    "smoke/smoke_sam3.py --device cuda --dtype bf16",
    "smoke/bench_sam3.py --device cuda --dtype bf16 --models tiny real --size 1280x720 --frames 64",
    "smoke/bench_sparse.py --device cuda --dtype fp32",
    "smoke/bench_sparse.py --device cuda --dtype bf16",
    "smoke/smoke_esam.py --device cuda",
    "smoke/smoke_esam.py --device cuda --dtype bf16",
    f"{ROOMS} --dtype bf16 --workers 4 --batch-size 16 --out runs/gpu/esam_sv",
    f"{ROOMS} --dtype fp16 --stage mv --init runs/gpu/esam_sv/last --freeze-bn --batch-size 2 --out runs/gpu/esam_mv",
    "-m torch.distributed.run --nproc_per_node=gpu "
    + f"{ROOMS} --dtype bf16 --route bif --clip random --sync-bn --batch-size 8 --out runs/gpu/esam_ddp",
    "smoke/bench_scene_stream.py --device cuda --points 20000 --room-size 480x640 --published",
    "smoke/bench_scene_stream.py --device cuda --dtype bf16 --points 20000 --room-size 480x640 --published",
    "eval/infer_captions.py runs/gpu/shapes/val2017 --ckpt runs/gpu/rl/best --out runs/gpu/captions --device cuda",
    "smoke/smoke_sa2va.py --device cuda",
    "smoke/smoke_sa2va.py --device cuda --dtype bf16",
    "smoke/overfit_sa2va.py --device cuda",
    "smoke/overfit_sa2va.py --device cuda --dtype bf16",
    "smoke/bench_sa2va.py --device cuda --size 1b --policies bf16 fp16 fp32 --rounds 10",
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
    shutil.rmtree(ROOT / "runs/gpu", ignore_errors=True)
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
