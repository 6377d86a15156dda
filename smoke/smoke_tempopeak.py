"""Does TempoPeak run here?  Shapes, first loss ln 64 (ln 65 with no-peak), finite gradients, and where the time goes.

python smoke/smoke_tempopeak.py                                  # every head, 64 px, under a minute on a CPU, no data
python smoke/smoke_tempopeak.py --size 224 --device cuda --dtype bf16
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.video import VideoWriter, read_all
from models.mamba2 import describe_impl, resolve_impl
from models.tempopeak import HEADS, TempoPeak, TempoPeakConfig, peak_loss, peak_targets
from utils import run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=2, help="items per process and step")
    p.add_argument("--size", type=int, default=64, help="pixels to each side of a frame")
    p.add_argument("--repeats", type=int, default=5, help="timed forwards; the median is printed")
    p.add_argument("--impl", default="auto", choices=["auto", "torch", "reference", "mamba_ssm"],
                   help="Mamba2 implementation: auto takes the CUDA kernels where they import, else torch")  # fmt: skip
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def median_ms(call, repeats: int, device: torch.device) -> float:
    """Median wall time of `call` in ms, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        t = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - t))
    return sorted(times[1:])[repeats // 2]


def check(cfg: TempoPeakConfig, frames: torch.Tensor, r, impl: str) -> TempoPeak:
    """One forward and backward: shape, first loss, gradients; with CUDA also CPU = GPU. Returns the model."""
    B, T = frames.shape[:2]
    model = TempoPeak(cfg, impl=impl).to(r.device)
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        logits = model(frames)
    outcomes = T + cfg.no_peak
    assert logits.shape == (B, outcomes), logits.shape
    peak = torch.arange(B, device=r.device) * 7 % T
    loss = peak_loss(logits, peak_targets(peak, peak, peak, T, "hard", 1.0, cfg.no_peak))
    want = math.log(outcomes)
    assert abs(loss.item() - want) < 0.05, f"first loss {loss.item():.4f}, expected ln({outcomes}) = {want:.4f}"
    loss.backward()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad, f"no or non-finite gradient: {bad}"
    note = ""
    if r.device.type == "cuda":
        on_cpu = TempoPeak(cfg, impl="torch").eval()
        on_cpu.load_state_dict(model.eval().state_dict())
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            here, there = model(frames).cpu(), on_cpu(frames.cpu())
        error = (here - there).abs().max().item() / there.abs().max().item()
        bar = 1e-2 if resolve_impl(impl, r.device) == "mamba_ssm" else 1e-3  # those kernels multiply in TF32
        assert error < bar, f"CPU and GPU differ by {error:.1e} of the largest logit"
        note = f", CPU = GPU within {error:.1e}"
    about = f"{cfg.head:9s} no_peak {cfg.no_peak:d} shift {cfg.shift}"
    print(f"{about} | logits {tuple(logits.shape)} | loss {loss:.4f} (want {want:.4f}){note}")
    return model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(args, argv)
    B, T, S = args.batch_size, 64, args.size
    print(f"# {describe_impl(args.impl, r.device)}")
    frames = torch.randint(0, 256, (B, T, 3, S, S), dtype=torch.uint8, device=r.device)
    for head in HEADS:
        model = check(TempoPeakConfig(head=head, size=[S, S]), frames, r, args.impl)
    model = check(TempoPeakConfig(head="bimamba2", no_peak=True, shift="gsm", size=[S, S]), frames, r, args.impl).eval()

    # ---- where does the forward time go? decode + backbone + head, for the same B*T frames
    autocast = torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), autocast:
        path = Path(folder) / "noise.mp4"
        smooth = torch.nn.functional.interpolate(torch.rand(T, 3, 9, 16), size=(360, 640), mode="bilinear")
        with VideoWriter(path, 30, (640, 360)) as writer:
            for image in (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy():
                writer.write(image)
        x = model.to_input(frames).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = model.encoder(x, T).unflatten(0, (B, T))
        parts = {
            f"decode {B}x{T} frames 640x360": lambda: [read_all(path, size=(S, S)) for _ in range(B)],
            "backbone": lambda: model.encoder(x, T),
            "head": lambda: model.classify(model.head(features)),
        }
        ms = {name: median_ms(call, args.repeats, r.device) for name, call in parts.items()}
    share = ", ".join(f"{name} {t:.1f} ms ({100 * t / sum(ms.values()):.0f} %)" for name, t in ms.items())
    print(f"forward of ({B},{T},3,{S},{S}), {r.dtype}: {share}")
    run.finish(r, args, "TempoPeak", f"PASS shapes, first loss, gradients; {share}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
