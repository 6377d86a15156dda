"""Run plumbing shared by every script: device, process group, batch order, run folder, checkpoints, notebook row.

A script stays a recipe: its arguments, model, optimizer and loop are written out in the script. What is here is what
forty copies would get wrong in forty ways.
"""

import csv
import errno
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save

ROOT = Path(__file__).resolve().parents[1]
NO_WRITE = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EROFS: "read-only file system"}
NO_WRITE |= {errno.EACCES: "permission denied", errno.ENOTDIR: "a part of the path is a file", errno.EEXIST: "exists"}
NO_WRITE |= {errno.EISDIR: "is a folder", errno.ENAMETOOLONG: "name too long"}


class UserError(ValueError):
    """A mistake of the user: one sentence that says what, where, what was expected and what to do."""


def cli(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)`; a UserError, or a path that cannot be written, is one sentence on stderr and exit code 2."""
    try:
        main(argv)
    except UserError as e:
        sentence = str(e).strip()
        if "Traceback" in sentence:  # from a loader worker, which sends its whole traceback along
            sentence = sentence.splitlines()[-1].removeprefix("utils.run.UserError: ")
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except OSError as e:
        if e.errno not in NO_WRITE:
            raise
        what = f"{e.filename or 'a file of this run'}: {NO_WRITE[e.errno]}"
        print(f"error: {what}; check the path, choose another --out or make room", file=sys.stderr)
        return 2
    except SystemExit as e:  # argparse: --help is 0, a bad flag is 2
        return 0 if e.code is None else e.code if isinstance(e.code, int) else 1
    return 0


def numbers(flag: str, value: str | None, sep: str, n: int) -> list[int] | None:
    """A flag's '64x64' -> [64, 64]; None stays None. UserError names the flag."""
    if value is None:
        return None
    parts = value.split(sep)
    if len(parts) != n or not all(x.strip().isdigit() for x in parts):
        raise UserError(f"{flag} {value}: expected {n} whole numbers joined by '{sep}'")
    return [int(x) for x in parts]


def check_ranges(args, **limits: tuple[float, float]) -> None:
    """UserError for the first flag outside its (lowest, highest) value: check_ranges(args, dropout=(0, 0.999))."""
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {low}..{high}")


# ---- device, process group, header


def start(args, argv: list[str] | None = None) -> SimpleNamespace:
    """Choose device and dtype, join torchrun's process group if there is one, seed, print the header.

    Reads args.device, args.dtype, args.seed. Returns device, dtype, rank, world, main (rank 0), ddp, t0 (s), command.
    Raises UserError for a device or dtype that is not to be had: an explicit choice is never replaced by another.
    """
    ddp = "RANK" in os.environ
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = choose_device(args.device, local if ddp else None)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    if dtype == torch.float16 and device.type == "cpu":
        raise UserError(f"--dtype fp16 on --device {device}: half precision needs a GPU; use --dtype bf16 or fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ddp and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: expected 0 <= seed < 2**32")
    seed_all(args.seed)
    words = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    if Path(words[0]).is_absolute() and Path(words[0]).is_relative_to(ROOT):
        words[0] = str(Path(words[0]).relative_to(ROOT))
    launcher = f"torchrun --nproc_per_node={world}" if ddp else "python"
    r = SimpleNamespace(device=device, dtype=dtype, rank=rank, world=world, main=rank == 0, ddp=ddp, t0=time.time())
    r.command = f"{launcher} {shlex.join(words)}"
    r.stop_asked, r.control = (
        False,
        (
            # patient: the other ranks wait here while rank 0 validates
            dist.new_group(backend="gloo", timeout=timedelta(hours=12)) if ddp else None
        ),
    )
    say(r, f"# {r.command}")
    say(r, f"# commit {commit()} | torch {torch.__version__} | {machine(r)} | {args.dtype} | seed {args.seed}")
    return r


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """'auto' takes cuda, then mps, then cpu; a named device is used or refused."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: not a device; expected auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Metal device; use --device cpu")
    if local_rank is not None and re.fullmatch(r"cuda:\d+", name):
        raise UserError(f"--device {name} under torchrun: all processes would share one GPU; use --device cuda")
    device = torch.device(f"cuda:{local_rank or 0}" if name == "cuda" else name)  # set_device wants a number
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: only {torch.cuda.device_count()} GPUs are visible; choose a lower number")
    return device


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (every device). Scripts call it again per micro-batch with `step_seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_seed(seed: int, step: int, slot: int) -> int:
    """Seed of one micro-batch: dropout and mixup depend on (seed, step, slot) alone, slot = accumulation index x world
    + rank. So a resumed run repeats the unbroken one, and 2 ranks repeat 1 process with --accum 2."""
    return ((seed * 1_000_003 + step) * 4099 + slot) % 2**63


def machine(r: SimpleNamespace) -> str:
    """Short name of what computes: GPU model or CPU model with the cores this process may use."""
    if r.device.type == "cuda":
        return f"{torch.cuda.get_device_name(r.device)} x{r.world}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found.group(1).strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads x{r.world}" + (" (mps)" if r.device.type == "mps" else "")


def commit() -> str:
    """Short hash of the checkout, '+dirty' when tracked files other than LOG.md differ, 'no-git' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        sha = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        what = [*git, "status", "--porcelain", "-uno", "--", ".", ":!LOG.md"]
        dirty = subprocess.run(what, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "no-git"
    return sha.strip() + ("+dirty" if dirty.strip() else "")


def say(r: SimpleNamespace, line: str) -> None:
    """Print on the main rank only."""
    if r.main:
        print(line, flush=True)


def watch_sigterm(r: SimpleNamespace) -> None:
    """From here on SIGTERM (a queue that takes its node back) only sets a flag; ask `should_stop` once per step."""

    def note(signum, frame):
        r.stop_asked = True

    signal.signal(signal.SIGTERM, note)


def ignore_sigterm(worker: int) -> None:
    """worker_init_fn of loaders: a queue signals every process of a job, and the main one still needs its workers."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def should_stop(r: SimpleNamespace) -> bool:
    """True on every rank as soon as one rank got SIGTERM. The ranks agree over gloo on the CPU: no GPU sync."""
    if r.ddp:
        flag = torch.tensor(int(r.stop_asked))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=r.control)
        r.stop_asked = r.stop_asked or bool(flag)  # a signal that came during the all_reduce counts at the next step
        return bool(flag)
    return r.stop_asked


# ---- batches


class StepBatches:
    """Batch sampler that yields lists of (epoch, index) keys for the steps [start, stop), `accum` micro-batches a step.

    The global batch of step k depends on (seed, k) alone; slot `a * world + rank` of it goes to micro-batch a of this
    rank. So a resumed run sees what the unbroken run would have seen, with any number of workers, and two ranks see
    what one process sees with accum 2. A dataset makes its item from (its seed, epoch, index). The last, incomplete
    batch of an epoch is left out; a data set smaller than one step is repeated within the step.
    """

    def __init__(self, n: int, batch_size: int, start: int, stop: int, seed: int, rank=0, world=1, accum=1):
        if n < 1:
            raise UserError("the training set has no items; check --data, --frames and --classes")
        self.n, self.batch_size, self.start, self.stop = n, batch_size, start, stop
        self.seed, self.rank, self.world, self.accum = seed, rank, world, accum

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accum

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size * self.world * self.accum
        per_epoch, epoch, order = max(1, self.n // size), -1, []
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                rounds = math.ceil(size / self.n)  # 1, or more when one step needs an item several times: each time
                draws = [(epoch * rounds + i, torch.randperm(self.n, generator=g).tolist()) for i in range(rounds)]
                order = [(e, k) for e, draw in draws for k in draw]  # under another epoch, so augmented differently
            for a in range(self.accum):
                first = step % per_epoch * size + (a * self.world + self.rank) * self.batch_size
                yield order[first : first + self.batch_size]


# ---- run folder and checkpoints


def find_resume(args) -> bool:
    """Turn `--resume auto` into OUT/last, or None if there is none. True when OUT is what a run left that was killed
    before its first checkpoint, so that `open_folder` may begin it anew."""
    if args.resume != "auto":
        return False
    last = Path(args.out) / "last"
    args.resume = str(last) if last.exists() else None
    return args.resume is None and not list(Path(args.out).glob("step_*"))


def check_continuation(r: SimpleNamespace, args, state: dict, free: set[str]) -> None:
    """UserError unless the run of `state` (state.pt of --resume) had the same flags, but for those in `free`, and as
    many processes."""
    changed = [k for k, v in vars(args).items() if k not in free and state["args"].get(k, v) != v]
    if changed:
        was = ", ".join(f"--{k.replace('_', '-')} {state['args'][k]}" for k in changed)
        raise UserError(f"--resume {args.resume}: that run had {was}; repeat them, or start anew with --init")
    if state["world"] != r.world:
        raise UserError(
            f"--resume {args.resume}: made by {state['world']} processes, these are {r.world}; the global batch "
            "would change; start as many, or start anew with --init"
        )


def open_folder(r: SimpleNamespace, args, anew: bool = False) -> Path:
    """Make --out and write what repeats the run: run.json, and code.diff when the checkout is dirty.

    anew: what `find_resume` said. UserError when --out holds another run and this is not its continuation (--resume).
    """
    out = Path(args.out)
    if anew:  # on every rank, before each looks whether the folder is free; rank 0 writes only after DDP has met
        (out / "metrics.jsonl").unlink(missing_ok=True)
    resume = getattr(args, "resume", None)
    continued = resume is not None and Path(resume).resolve().parent == out.resolve()
    if not continued and (out / "metrics.jsonl").exists():
        raise UserError(f"--out {out}: holds another run already; choose a new folder, or continue it with --resume")
    if r.main:
        out.mkdir(parents=True, exist_ok=True)
        for aside in out.glob(".tmp-old-*"):  # killed between the two renames of save_checkpoint
            if not (out / aside.name.removeprefix(".tmp-old-")).exists():
                os.rename(aside, out / aside.name.removeprefix(".tmp-old-"))
        for stale in out.glob(".tmp-*"):  # what a killed process left half-written
            stale.unlink() if stale.is_symlink() else shutil.rmtree(stale)
        about = {"command": r.command, "args": vars(args), "commit": commit(), "machine": machine(r)}
        about |= {"torch": str(torch.__version__), "python": sys.version, "world": r.world}
        write_text_atomic(out / "run.json", json.dumps(about, indent=1, default=str) + "\n")
        if about["commit"].endswith("+dirty"):
            diff = subprocess.run(["git", "-C", str(ROOT), "diff", "HEAD"], capture_output=True, text=True, check=True)
            write_text_atomic(out / "code.diff", diff.stdout)
    return out


def report(r: SimpleNamespace, out: Path, step: int, steps: int, **values: float) -> None:
    """One aligned line on the main rank and the same numbers as one JSON object in out/metrics.jsonl."""
    if r.main:
        print(f"step {step:6d}/{steps} | " + " | ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
        with writing(out / "metrics.jsonl"), open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(out: Path) -> list[dict]:
    """Rows of out/metrics.jsonl, oldest first; none before the first report."""
    if not (out / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rewind_metrics(out: Path, step: int) -> None:
    """Drop the rows after `step`: what a killed run reported after the checkpoint that is now continued."""
    if (out / "metrics.jsonl").exists():
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        whole = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= step]  # a kill may cut the last line
        write_text_atomic(out / "metrics.jsonl", "".join(x + "\n" for x in whole))


def write_metrics_csv(out: Path) -> None:
    """out/metrics.csv: the rows of metrics.jsonl under the union of their columns, for a spreadsheet."""
    rows = read_metrics(out)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(out / "metrics.csv", text.getvalue())


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write beside the target and rename, so that no reader and no crash ever meets half a file."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            tmp.write_text(text, encoding="utf-8")
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """An OSError inside names `path`: those of write() name no file."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


@contextmanager
def new_folder(folder: Path | str, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when all is written, and goes when it is not. replace: a folder
    of that name gives way, but not before the new one is complete; otherwise UserError when there is one."""
    folder = Path(folder)
    if folder.exists() and not replace:
        raise UserError(f"{folder}: exists already; choose a new folder")
    tmp, aside = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".tmp-old-{folder.name}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        if folder.exists():
            os.rename(folder, aside)
        os.rename(tmp, folder)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # still there only if something above failed


def publish(out: Path, folder: Path, best: bool, keep: int = 3) -> None:
    """Point the links `last` (and `best`) at a complete folder; delete all but the newest `keep` and the best."""
    for name in ["last", "best"] if best else ["last"]:
        link = out / f".tmp-link-{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, out / name)
    kept = {(out / name).resolve().name for name in ("last", "best") if (out / name).exists()}
    for old in sorted(out.glob("step_*"), key=lambda p: (p.stat().st_mtime_ns, p.name))[:-keep]:
        if old.name not in kept:
            shutil.rmtree(old)


def pack_state(state: dict, step: int) -> bytes:
    """state.pt. As bytes, because on a full disk torch and safetensors raise no OSError, which cli would explain."""
    packed = io.BytesIO()
    torch.save({**state, "step": step}, packed)
    return packed.getvalue()


def save_checkpoint(
    out: Path, step: int, model: torch.nn.Module, config: dict, state: dict, best=False, keep=3
) -> Path:
    """Write out/step_NNNNNN (model.safetensors, config.json, state.pt) under a temporary name, rename it, point the
    link `last` (and `best`) at it, and delete all but the newest `keep` and the best.

    model: unwrapped and uncompiled. config: what `from_checkpoint` rebuilds it from. state: optimizer, step, args, ...:
    tensors and plain Python values only, so that `torch.load(weights_only=True)` reads it.
    """
    folder = out / f"step_{step:06d}"
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    made_by = {"commit": commit(), "torch": str(torch.__version__), "command": shlex.join(sys.argv)}
    with new_folder(folder, replace=True) as tmp:  # the same step may have been saved before a resume
        text = json.dumps({**config, "made_by": made_by}, indent=1) + "\n"
        with writing(tmp):
            (tmp / "model.safetensors").write_bytes(save(tensors))
            (tmp / "state.pt").write_bytes(pack_state(state, step))
            (tmp / "config.json").write_text(text, encoding="utf-8")
    publish(out, folder, best, keep)
    return folder


def read_config(folder: Path | str, weights: str = "model.safetensors") -> dict:
    """config.json of a checkpoint folder. UserError names what is missing and the checkpoints that do exist nearby."""
    folder = Path(folder)
    for name in ("config.json", weights):
        if not (folder / name).is_file() and not (folder / f"{name}.index.json").is_file():  # or shards
            near = sorted({str(p.parent) for base in (folder, folder.parent) for p in base.glob("*/config.json")})
            hint = f"checkpoints nearby: {', '.join(near[:4])}" if near else "expected a folder that train/ wrote"
            raise UserError(f"{folder}: not a checkpoint folder ({name} is missing); {hint}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{folder / 'config.json'}: not readable as JSON ({e}); take another checkpoint") from e
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: holds no JSON object; take another checkpoint")
    return config


def load_state(folder: Path | str) -> dict:
    """state.pt of a checkpoint folder, on the CPU."""
    path = Path(folder) / "state.pt"
    if not path.is_file():
        raise UserError(f"--resume {folder}: state.pt is missing, so only the weights can be used; pass it to --init")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, LookupError) as e:
        raise UserError(
            f"{path}: not readable ({type(e).__name__}), so it is damaged; resume from another step_*"
        ) from e


# ---- notebook


def finish(r: SimpleNamespace, args, system: str, result: str) -> None:
    """Print this run's notebook row; with --log WHY append it to the table of `system` in LOG.md. Leaves the group."""
    if r.main:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        cells = [when, args.log or "", f"`{r.command}`", commit(), f"{machine(r)}, {time.time() - r.t0:.0f} s", result]
        row = "| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |"
        print(row)
        if args.log:
            append_row(ROOT / "LOG.md", system, row)
    if r.ddp:
        dist.destroy_process_group()


def append_row(log: Path, system: str, row: str) -> None:
    """Insert `row` after the last row of the process table (header 'when (UTC)') under the heading '## system'."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    heads = [i for i, line in enumerate(lines) if line.startswith("## ")] + [len(lines)]
    section = next(
        (range(a, b) for a, b in zip(heads, heads[1:], strict=False) if lines[a].strip() == f"## {system}"), ()
    )
    table = [i for i in section if lines[i].startswith("| when (UTC)")]
    if not table:
        raise UserError(f"{log}: no heading '## {system}' with a table '| when (UTC) | ...' below it; add them")
    end = table[0]
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    write_text_atomic(log, "\n".join([*lines[:end], row, *lines[end:]]) + "\n")
