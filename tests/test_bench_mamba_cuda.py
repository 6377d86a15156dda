"""smoke/bench_mamba_cuda.py without a GPU: every part on the CPU, with and without a stand-in for mamba_ssm's kernels."""

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models import ssd
from models.mamba2 import Mamba2
from utils import run

SMOKE = Path(__file__).resolve().parents[1] / "smoke"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SMOKE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    """The script; what its main() sets for the whole process is put back after the test."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield load("bench_mamba_cuda")
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(change): `mamba_ssm` is to be had on this CPU, and its scan is change(y, x) of the true one's y."""
    choose = ssd._choose_impl

    def choose_kernels(impl, device_type, dtype):
        kernels = impl in ("auto", "mamba_ssm") and dtype != torch.float64
        return ("mamba_ssm", "a stand-in") if kernels else choose(impl, device_type, dtype)

    def install(change):
        def kernel(x, dt, A, B, C, chunk_size, **options):
            out = ssd.ssd_scan(x, dt, A, B, C, chunk_size=chunk_size, impl="reference", **options)
            return (change(out[0], x), out[1]) if options["return_final_states"] else change(out, x)

        monkeypatch.setattr(ssd, "_choose_impl", choose_kernels)
        monkeypatch.setattr(ssd, "load_kernel", lambda: kernel)

    return install


def right(y, x):
    return y


def rows(out: str, pattern: str) -> list[str]:
    return [line for line in out.splitlines() if re.search(pattern, line)]


def test_dry_run_runs_every_part_without_kernels(bench, capsys):
    assert run.cli(bench.main, ["--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("parity", "speed", "notebook", "train"):
        assert (
            f"## {part} | dry run: no figure here means anything\nkernels: n/a, Mamba2 impl torch (the kernels need"
            in out
        )
    verdicts = rows(out, r"^\w.* (fp32|bf16) +\| \d.*e-")
    assert len(verdicts) == 12 and all(row.endswith("ok") and row.count("n/a") == 2 for row in verdicts)
    assert len(rows(out, r"^2,16,32 .* \| +[\d.]+ +[\d.]+ +n/a +n/a +n/a \|")) == 4  # torch and compiled
    assert len(rows(out, r"^1,70,32 +fwd .* \| +[\d.]+ +n/a +n/a +n/a +n/a \|")) == 2
    assert len(rows(out, r"recorded elsewhere.* 3\.56|^torch +[\d.]+; with autograd .* \d+ launches")) == 2
    assert rows(out, r"^tiny \+ bimamba2, .* torch [\d.]+ ms/step") and "trained with" not in out
    (row,) = rows(out, r"^\| 20\d\d-")
    assert "dry run: no figure here means anything; parity 12 of 12 ok" in row and "FAIL" not in out


def test_kernels_fill_their_columns(bench, stand_in, monkeypatch, capsys):
    stand_in(right)
    monkeypatch.setattr(bench, "load_kernel", lambda: None)
    upstream = SimpleNamespace(Mamba2=Mamba2, causal_conv1d_fn=None)
    monkeypatch.setitem(sys.modules, "mamba_ssm.modules.mamba2", upstream)
    assert run.cli(bench.main, ["--dry-run"]) == 0
    out = capsys.readouterr().out
    verdicts = rows(out, r"^\w.* (fp32|bf16) +\| \d.*e-")
    assert len(verdicts) == 12 and all(row.endswith("ok") and "n/a" not in row for row in verdicts)
    assert len(rows(out, r"^2,16,32 .* \| +[\d.]+ +[\d.]+ +n/a +[\d.]+ +n/a \|")) == 4
    assert len(rows(out, r"^(kernels|mamba_ssm's own, without causal_conv1d) +[\d.]+; with autograd")) == 2
    assert len(rows(out, r"^trained with .* same frame in 2 of 2 clips, .* \| ok$")) == 2


@pytest.mark.parametrize(
    "change",
    [lambda y, x: y + 0.01 * x, lambda y, x: y * math.nan, lambda y, x: y + 0.01 * (x - x.detach())],
    ids=["outputs", "nan", "gradients"],
)
def test_wrong_kernels_fail_parity(bench, stand_in, monkeypatch, capsys, change):
    stand_in(change)
    monkeypatch.setattr(bench, "CASES", {"T 64": bench.CASES["T 64"], "states": bench.CASES["states"]})
    assert run.cli(bench.main, ["--dry-run", "--parts", "parity"]) == 2
    out, err = capsys.readouterr()
    assert len(rows(out, r"^(T 64|states) +fp32 .*FAIL$")) == 2
    assert re.search(r"error: \d checks failed: parity T 64 fp32; .*parity states fp32", err)


def test_wrong_kernels_fail_the_exchange_of_weights_and_the_notebook(bench, stand_in, monkeypatch, capsys):
    stand_in(lambda y, x: y + 0.1 * x)
    monkeypatch.setitem(sys.modules, "mamba_ssm.modules.mamba2", None)  # import raises ImportError
    assert run.cli(bench.main, ["--dry-run", "--parts", "notebook", "train"]) == 2
    out, err = capsys.readouterr()
    assert "mamba_ssm's own Mamba2: n/a, " in out
    assert len(rows(out, r"^trained with .* \| FAIL$")) == 2
    assert "3 checks failed: notebook: kernels is" in err and "weights trained with mamba_ssm predict something" in err


def test_wrong_torch_fails_parity(bench, monkeypatch, capsys):
    class Wrong(Mamba2):
        def forward(self, u, **options):
            out = super().forward(u, **options)
            return out * 1.001 if self.impl == "torch" and torch.is_tensor(out) else out

    monkeypatch.setattr(bench, "Mamba2", Wrong)
    assert run.cli(bench.main, ["--dry-run", "--parts", "parity"]) == 2
    out, err = capsys.readouterr()
    assert len(rows(out, r" fp32 .*FAIL$")) == 5 and len(rows(out, r"^states .*ok$")) == 2
    assert "5 checks failed: parity T 64 fp32; " in err


def test_tf32_allows_more(bench, stand_in, capsys):
    stand_in(lambda y, x: y + 1e-3 * x)
    assert run.cli(bench.main, ["--dry-run", "--parts", "parity", "--tf32"]) == 0
    assert "float32 products in TF32" in capsys.readouterr().out and bench.os.environ["TRITON_F32_DEFAULT"] == "tf32"
    assert run.cli(bench.main, ["--dry-run", "--parts", "parity"]) == 2
    assert bench.os.environ["TRITON_F32_DEFAULT"] == "ieee"


def test_without_gpu_and_wrong_arguments(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, sentence in (
        ([], r"error: this torch \(.*\) sees no GPU; --dry-run runs every part on the CPU"),
        (["--dry-run", "--repeats", "0"], "error: --repeats 0: expected 1.."),
        (["--parts", "memory"], "argument --parts: invalid choice: 'memory'"),
    ):
        assert run.cli(bench.main, argv) == 2
        out, err = capsys.readouterr()
        assert re.search(sentence, err) and not out


def test_gpu_check_runs_it():
    assert "smoke/bench_mamba_cuda.py" in load("smoke_gpu").COMMANDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_graph_computes_what_the_call_does(bench):
    block, u = Mamba2(64, impl="torch").cuda(), torch.randn(2, 50, 64, device="cuda")
    out = torch.empty_like(u)
    graphs = bench.capture(
        SimpleNamespace(device=u.device), "torch", lambda: out.copy_(bench.work(block, u, u.dtype, False))
    )
    u.neg_()
    graphs["torch graph"]()
    torch.testing.assert_close(out, bench.work(block, u, u.dtype, False))
