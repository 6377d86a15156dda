"""Mamba2 in plain PyTorch against mamba_ssm's CUDA kernels, everything in one call.

python smoke/bench_mamba_cuda.py                       # one GPU; most of the time goes to torch.compile and autotuning
python smoke/bench_mamba_cuda.py --parts speed --tf32  # float32 in TF32, as the kernels do by default
python smoke/bench_mamba_cuda.py --dry-run             # every part on a CPU with tiny shapes: does this script work?

parity    same weights, other implementation: outputs and gradients against float64 on the CPU and each other
speed     eager, compiled, captured graph and kernels take turns: median ms, and peak MB above what lay there before
notebook  one layer at (8,64,128), recorded as 3.56 ms on an H100: where does the time go?
train     TempoPeak's training step with both; then each one's trained weights predict with the other

Without mamba_ssm the kernels' columns say n/a and everything else runs. Without --tf32 both sides multiply float32 in
IEEE precision, in every part: Triton asks once, when it compiles a kernel, so a process has one setting.
"""

import argparse
import importlib
import importlib.metadata
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.mamba2 import Mamba2, describe_impl, resolve_impl
from models.ssd import load_kernel
from models.tempopeak import TempoPeak, TempoPeakConfig, peak_loss, peak_targets
from utils import run
from utils.run import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16: autocast, weights stay float32
# allowed difference of outputs and of gradients, relative to the tensor's largest entry
TOLERANCE = {"fp32": (1e-5, 1e-4), "tf32": (1e-2, 5e-2), "bf16": (2e-2, 5e-2)}
CASES = {  # steps, arguments of Mamba2, of its forward; batch 2, width 128, chunks of 64
    "T 64": (64, {}, ()),
    "T 200": (200, {}, ()),
    "ngroups 2": (130, {"ngroups": 2}, ()),
    "seq_idx": (200, {}, ("seq_idx",)),
    "lengths": (150, {}, ("lengths",)),
    "states": (100, {}, ("initial_state", "return_final_state")),
}
# (B, T, D): also backward and compiled? torch.compile unrolls the chunks, 1024 of them in the last shape
SHAPES = {(8, 64, 128): True, (2, 64, 512): True, (8, 1024, 256): True, (1, 8192, 256): True, (1, 65536, 256): False}
DRY_SHAPES = {(2, 16, 32): True, (1, 70, 32): False}
COLUMNS = ("torch", "compiled", "torch graph", "kernels", "kernels graph")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to run (default: all)")
    p.add_argument("--repeats", type=int, default=30, help="timed calls of each candidate, after 3 warm-ups")
    p.add_argument("--tf32", action="store_true", help="both implementations may multiply float32 in TF32")
    p.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, 2 repeats: checks this script only")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest entry."""
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()


# ---- parity


def outputs_and_gradients(case: str, impl: str, device: torch.device, dtype: torch.dtype, half: torch.dtype):
    """Two dicts of float64 tensors on the CPU: outputs, gradients. Weights and inputs depend on `case` alone."""
    T, arguments, wanted = CASES[case]
    torch.manual_seed(0)
    block = Mamba2(128, d_state=64, chunk_size=64, impl=impl, **arguments)
    empty = block.allocate_inference_cache(2)
    leaves = [torch.randn(2, T, 128), *(torch.randn_like(s) for s in empty if "initial_state" in wanted)]
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
    options = {"seq_idx": (torch.arange(T, device=device) // 70).expand(2, T), "initial_state": leaves[1:]}
    options |= {"lengths": torch.tensor([T, T // 3], device=device), "return_final_state": True}
    block = block.to(device, dtype)
    with autocast(device, half):
        out = block(leaves[0], **{name: options[name] for name in wanted})
    outs = [out[0], *out[1]] if "return_final_state" in wanted else [out]
    loss = sum((o.double() * torch.randn(o.shape).to(device)).sum() for o in outs)
    named = dict(zip(("u", "conv_state", "ssm_state"), leaves, strict=False)) | dict(block.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    outs = dict(zip(("y", "conv_state", "ssm_state"), outs, strict=False))
    return tuple({name: t.detach().cpu().double() for name, t in d.items()} for d in (outs, grads))


def parity(r, args, kernels: bool) -> tuple[str, list[str]]:
    pairs = ("torch - float64", "kernels - float64", "kernels - torch")
    run.say(r, f"{'case':9s} dtype | " + " | ".join(f"{pair:31s}" for pair in pairs))
    failed, worst = [], 0.0
    for case in CASES:
        exact = outputs_and_gradients(case, "reference", torch.device("cpu"), torch.float64, torch.float32)
        for name, half in DTYPES.items():
            got = [outputs_and_gradients(case, "torch", r.device, torch.float32, half)]
            got += [outputs_and_gradients(case, "mamba_ssm", r.device, torch.float32, half)] if kernels else []
            cells, good = [], True
            for mine, other in [(g, exact) for g in got] + [tuple(got[::-1])] * kernels:
                outs, grads = ({k: error(m[k], w) for k, w in o.items()} for m, o in zip(mine, other, strict=True))
                for errors, allowed in zip((outs, grads), args.allowed[name], strict=True):
                    good = good and all(e <= allowed for e in errors.values())  # NaN is no pass
                where = max(grads, key=grads.get)
                cells.append(f"{max(outs.values()):.1e} {grads[where]:.1e} {where:15s}")
                worst = max(worst, *outs.values()) if name == "fp32" else worst
            cells += [f"{'n/a':31s}"] * (len(pairs) - len(cells))
            run.say(r, f"{case:9s} {name:5s} | {' | '.join(cells)} | {'ok' if good else 'FAIL'}")
            failed += [] if good else [f"parity {case} {name}"]
    allowed = "; ".join(f"{name} {args.allowed[name][0]:g} and {args.allowed[name][1]:g}" for name in DTYPES)
    run.say(r, f"errors of outputs, of gradients, the worst gradient; allowed: {allowed} of the largest entry")
    n = len(CASES) * len(DTYPES)
    return f"parity {n - len(failed)} of {n} ok, fp32 outputs within {worst:.0e}", failed


# ---- speed


def work(block, u: torch.Tensor, dtype: torch.dtype, backward: bool):
    """A forward pass without gradients, or a forward and backward pass to the input and every parameter."""
    with torch.set_grad_enabled(backward), autocast(u.device, dtype):
        y = block(u)
    return torch.autograd.grad(y.float().sum(), [u, *block.parameters()]) if backward else y


def capture(r, name: str, call) -> dict:
    """{"NAME graph": replay of `call` as one captured CUDA graph}, or a line why not and {}."""
    if r.device.type != "cuda":
        return {}
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # libraries set themselves up and kernels are tuned before the capture
        for _ in range(3):
            want = call()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            got = call()
    except RuntimeError as e:  # something in the call waits for the GPU
        torch.cuda.set_stream(current)  # the failed capture leaves its own
        run.say(r, f"{name} does not capture: {str(e).splitlines()[0]}")
        return {}
    graph.replay()
    assert error(got.float(), want.float()) < 1e-2, f"the captured graph of {name} computes something else"
    return {f"{name} graph": graph.replay}


def twins(D: int, kernels: bool, device: torch.device) -> dict[str, Mamba2]:
    """One block per implementation, same weights."""
    blocks = {"torch": Mamba2(D, impl="torch").to(device)}
    if kernels:
        blocks["kernels"] = Mamba2(D, impl="mamba_ssm").to(device)
        blocks["kernels"].load_state_dict(blocks["torch"].state_dict())
    return blocks


def timed(call, device: torch.device) -> tuple[float, float]:
    """Wall ms, and peak MB above what was allocated before (0 on a CPU)."""
    cuda, before = device.type == "cuda", 0
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    ms = 1e3 * (time.perf_counter() - start)
    return ms, (torch.cuda.max_memory_allocated(device) - before) / 1e6 if cuda else 0.0


def interleaved(calls: dict, repeats: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Median (ms, MB) of each call; they take turns, so that a disturbance hits all. Compiling falls into 3 warm-ups."""
    rounds = [{name: timed(call, device) for name, call in calls.items()} for _ in range(3 + repeats)][3:]
    return {name: tuple(median(one[name][i] for one in rounds) for i in (0, 1)) for name in calls}


def speed(r, args, kernels: bool) -> tuple[str, list[str]]:
    backend, compiler, summary = "aot_eager" if args.dry_run else "inductor", os.environ.get("CXX", "g++"), ""
    can_compile = args.dry_run or shutil.which(compiler) is not None
    run.say(r, f"compiled: {backend}" if can_compile else f"compiled: n/a, {compiler}, a C++ compiler, is not there")
    run.say(r, "graph: of the forward pass" if r.device.type == "cuda" else "graph: n/a, CUDA graphs need CUDA")
    run.say(r, f"{'(B,T,D)':11s} {'pass':7s} dtype | {' '.join(f'{c:>13s}' for c in COLUMNS)} | MB of each")
    for (B, T, D), everything in (DRY_SHAPES if args.dry_run else SHAPES).items():
        for name, dtype in DTYPES.items():
            torch.compiler.reset()  # an empty cache: no dynamic shapes, and the limit of recompilations is not met
            blocks = twins(D, kernels, r.device)
            if everything and can_compile:
                blocks["compiled"] = torch.compile(blocks["torch"], dynamic=False, backend=backend)
            u = torch.randn(B, T, D, device=r.device, requires_grad=True)
            for backward in (False, True)[: 1 + everything]:
                calls = {key: partial(work, block, u, dtype, backward) for key, block in blocks.items()}
                for key in ("torch", "kernels")[: 0 if backward else 1 + kernels]:
                    calls |= capture(r, key, calls[key])
                found, label = interleaved(calls, args.repeats, r.device), "fwd+bwd" if backward else "fwd"
                ms = " ".join(f"{found[c][0]:13.3f}" if c in found else f"{'n/a':>13s}" for c in COLUMNS)
                mb = " ".join(f"{c} {found[c][1]:.0f}" for c in COLUMNS if c in found and "graph" not in c)
                run.say(r, f"{f'{B},{T},{D}':11s} {label:7s} {name:5s} | {ms} | {mb}")
                first = ", ".join(f"{key} {value:.3f}" for key, (value, _) in found.items())
                summary = summary or f"ms {label} {name} ({B},{T},{D}): {first}"
    return summary, []


# ---- the notebook's benchmark


def upstream_block(r, block: Mamba2) -> dict:
    """mamba_ssm's own Mamba2, as the notes had it, with the weights of `block`; or a line why not and {}."""
    try:
        load_kernel()  # finds the package also where its __init__ does not import
        module = importlib.import_module("mamba_ssm.modules.mamba2")
    except ImportError as e:
        run.say(r, f"mamba_ssm's own Mamba2: n/a, {e}")
        return {}
    fused = module.causal_conv1d_fn is not None
    upstream = module.Mamba2(block.d_model, use_mem_eff_path=fused)
    upstream.load_state_dict(block.state_dict(), strict=True)
    return {f"mamba_ssm's own, {'fused' if fused else 'without causal_conv1d'}": upstream.to(r.device)}


def launches(call, device: torch.device) -> tuple[int, float]:
    """How many kernels and copies a call starts and the ms that they keep the GPU busy; on a CPU its operators."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, acc_events=True) as prof:
        timed(call, device)
    events = [e for e in prof.events() if e.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)]
    return len(events), sum(e.time_range.elapsed_us() for e in events) / 1e3


def notebook(r, args, kernels: bool) -> tuple[str, list[str]]:
    warm, n = (2, 3) if args.dry_run else (10, 100)
    blocks, u = twins(128, kernels, r.device), torch.randn(8, 64, 128, device=r.device)
    blocks |= upstream_block(r, blocks["torch"]) if kernels else {}
    run.say(r, f"one layer, forward of (8,64,128), fp32, ms: mean of {n} calls, {warm} warm-ups, one synchronise")
    run.say(r, f"{'recorded elsewhere, H100, mamba-ssm 2.2.6.post3':47s} 3.56")
    summary, failed = [], []
    for name, block in blocks.items():
        calls = [partial(work, block, u, torch.float32, False), partial(block, u)]  # the second records gradients
        apart = error(calls[0](), work(blocks["torch"], u, torch.float32, False))
        failed += [] if apart <= args.allowed["fp32"][0] else [f"notebook: {name} is {apart:.1e} off torch"]
        ms = []
        for call in calls:
            several = [timed(lambda call=call, k=k: [call() for _ in range(k)], r.device)[0] / k for k in (warm, n)]
            ms.append(several[1])
        count, busy = launches(calls[0], r.device)
        graph = [found for found, _ in interleaved(capture(r, name, calls[0]), args.repeats, r.device).values()]
        share = f"{graph[0]:.3f}, so {100 * (1 - graph[0] / ms[0]):.0f} % is launching" if graph else "n/a"
        about = f"with autograd {ms[1]:.3f}, {count} launches, GPU busy {busy:.3f}, captured graph {share}"
        run.say(r, f"{name:47s} {ms[0]:.3f}; {about}")
        summary.append(f"{name} {ms[0]:.2f}")
    return f"3.56 ms of the notes: {', '.join(summary)}", failed


# ---- TempoPeak's training step


def make_step(model: TempoPeak, frames: torch.Tensor, target: torch.Tensor):
    """A function that does one step as train/train.py does, at the peak learning rate."""
    matrices = [p for p in model.parameters() if p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)]
    vectors = [p for p in model.parameters() if p.ndim < 2 or getattr(p, "_no_weight_decay", False)]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=1e-3)

    def step() -> None:
        with autocast(frames.device, torch.bfloat16):
            logits = model(frames)
        peak_loss(logits, target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def predict(cfg: TempoPeakConfig, impl: str, weights: dict, frames: torch.Tensor) -> torch.Tensor:
    model = TempoPeak(cfg, impl=impl).to(frames.device).eval()
    model.load_state_dict(weights)
    return model(frames)


def train(r, args, kernels: bool) -> tuple[str, list[str]]:
    B, T, S = (2, 8, 16) if args.dry_run else (8, 64, 112)
    cfg = TempoPeakConfig(encoder="tiny" if args.dry_run else "resnet18", size=[S, S], clip_len=T)
    frames = torch.randint(0, 256, (B, T, 3, S, S), dtype=torch.uint8, device=r.device)
    peak = torch.randint(0, T, (B,), device=r.device)
    target = peak_targets(peak, peak, peak, T, "gaussian", 1.0, no_peak=False)  # (B, T)
    first = TempoPeak(cfg, impl="torch").state_dict()
    models = {impl: TempoPeak(cfg, impl=impl).to(r.device) for impl in ["torch"] + ["mamba_ssm"] * kernels}
    for model in models.values():
        model.load_state_dict(first)
    steps = {impl: make_step(model, frames, target) for impl, model in models.items()}
    found, failed = interleaved(steps, args.repeats, r.device), []
    about = ", ".join(f"{impl} {ms:.2f} ms/step, {mb:.0f} MB" for impl, (ms, mb) in found.items())
    run.say(r, f"{cfg.encoder} + {cfg.head}, batch {B}, T {T}, {S}x{S}, bf16, {3 + args.repeats} steps: {about}")
    for impl, other in (("torch", "mamba_ssm"), ("mamba_ssm", "torch")) if kernels else ():
        want, got = (predict(cfg, i, models[impl].state_dict(), frames) for i in (impl, other))  # (B, T), fp32
        same, apart = (got.argmax(1) == want.argmax(1)).sum().item(), error(got, want)
        good = same == B and apart <= args.allowed["fp32"][1]
        about = f"same frame in {same} of {B} clips, logits differ by {apart:.1e} of the largest"
        run.say(r, f"trained with {impl}, predicted with {other}: {about} | {'ok' if good else 'FAIL'}")
        failed += [] if good else [f"weights trained with {impl} predict something else with {other}"]
    return "TempoPeak " + ", ".join(f"{impl} {ms:.1f} ms/step" for impl, (ms, _) in found.items()), failed


PARTS = {"parity": parity, "speed": speed, "notebook": notebook, "train": train}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, repeats=(1, 10**6))
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError(f"this torch ({torch.__version__}) sees no GPU; --dry-run runs every part on the CPU")
    args.device, args.dtype = "cpu" if args.dry_run else "cuda:0", "fp32"
    args.repeats = min(args.repeats, 2) if args.dry_run else args.repeats
    os.environ["TRITON_F32_DEFAULT"] = "tf32" if args.tf32 else "ieee"  # read when the first kernel is compiled
    args.allowed = TOLERANCE | {"fp32": TOLERANCE["tf32" if args.tf32 else "fp32"]}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    r = run.start(args, argv)
    about = [f"{name} {version(name)}" for name in ("triton", "mamba_ssm", "causal_conv1d")]
    about += [describe_impl("auto", r.device), f"float32 products in {'TF32' if args.tf32 else 'IEEE precision'}"]
    run.say(r, f"# {' | '.join(about)}")
    kernels = resolve_impl("auto", r.device) == "mamba_ssm"
    results, failed = ["dry run: no figure here means anything"] * args.dry_run, []
    for part in args.parts:
        run.say(r, " | ".join([f"\n## {part}", *results[: args.dry_run]]))
        if not kernels:
            run.say(r, f"kernels: n/a, {describe_impl('auto', r.device)}")
        result, bad = PARTS[part](r, args, kernels)
        results, failed = [*results, result], [*failed, *bad]
    run.finish(r, args, "TempoPeak", "; ".join([*results, *(f"FAIL {x}" for x in failed)]))
    if failed:
        raise UserError(f"{len(failed)} checks failed: {'; '.join(failed)}; see the lines above")


if __name__ == "__main__":
    sys.exit(run.cli(main))
