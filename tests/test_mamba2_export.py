"""Mamba2 and BiMamba2 under torch.compile, and exported to ONNX and run in onnxruntime, against PyTorch.

Both take the composition of models/mamba2.py, never the hand-written function of models/mamba2_fused.py. Exported with
torch.onnx.export(dynamo=True) under torch.no_grad(), the axes opened by name, one file serves every batch and length.
"""

import pytest
import torch
import torch.nn as nn

from models.mamba2 import Mamba2
from models.temporal_heads import BiMamba2

# decays slow enough that each chunk of 64 steps feels the chunks before it
SMALL = {"d_state": 8, "headdim": 8, "ngroups": 2, "A_init_range": (0.02, 0.5)}
D = 16


def make(kind: type = Mamba2, dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    """A small block whose D, norm and convolution bias are not at their initial values, so that a lost one shows."""
    torch.manual_seed(0)
    block = kind(D, **SMALL, **kwargs)
    with torch.no_grad():
        for p in block.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) / 4)
    return block.to(dtype).eval()


def states(block: Mamba2, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    conv_state, ssm_state = block.allocate_inference_cache(b)
    return torch.randn_like(conv_state), torch.randn_like(ssm_state)


def flat(out) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in flat(part)]


def assert_same(got, want, tolerance: float):
    """Maximum error relative to the largest entry; tensors, or nested sequences of them."""
    for g, w in zip(flat(got), flat(want), strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype and w.abs().max() > 0
        assert (g - w).abs().max() <= tolerance * w.abs().max()


# ---- torch.compile


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs(list):
    """A backend that keeps each graph and runs it as it is."""

    def __call__(self, graph, example_inputs):
        self.append(graph)
        return graph.forward


def with_gradients(run, block: nn.Module, u: torch.Tensor, **kwargs) -> list[torch.Tensor]:
    u = u.clone().requires_grad_()
    out = flat(run(u, **kwargs))
    return out + list(torch.autograd.grad(sum(t.sin().sum() for t in out), [u, *block.parameters()]))


@pytest.mark.parametrize("kind", [Mamba2, BiMamba2])
@pytest.mark.parametrize("dtype, impl, tolerance", [(torch.float32, "reference", 1e-6), (torch.float64, "auto", 1e-12)])
def test_compiled_equals_eager(kind, dtype, impl, tolerance):
    """Outputs and gradients, whole and padded. The hand-written function differs from the composition by 2e-6 in
    float32, so there `reference` is the eager side."""
    block, eager, u = make(kind, dtype), make(kind, dtype, impl=impl), torch.randn(3, 150, D, dtype=dtype)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for lengths in (None, torch.tensor([150, 64, 9])):
        want = with_gradients(eager, eager, u, lengths=lengths)
        assert_same(with_gradients(compiled, block, u, lengths=lengths), want, tolerance)


def test_compiled_states_and_packing():
    block = make()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    u, seq_idx = torch.randn(2, 100, D).double(), (torch.arange(100) > 70).int().expand(2, 100)
    for kwargs in ({"return_final_state": True, "lengths": torch.tensor([100, 40])}, {"seq_idx": seq_idx}):
        kwargs["initial_state"] = states(block, 2)
        assert_same(with_gradients(compiled, block, u, **kwargs), with_gradients(block, block, u, **kwargs), 1e-12)


def test_compiled_when_the_length_changes():
    """A new graph at the second length, and at each new number of chunks (64 steps at most), padded or not."""
    block, graphs = make(BiMamba2), Graphs()
    compiled, counts = torch.compile(block, fullgraph=True, backend=graphs), []
    for T in (40, 30, 64, 7, 100, 128, 130):
        u = torch.randn(2, T, D).double()
        assert_same(with_gradients(compiled, block, u), with_gradients(block, block, u), 1e-12)
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2, 3, 3, 4]


@torch.no_grad()  # else the first states need no gradient and the next ones do: two graphs
def test_compiled_step_is_compiled_once():
    block, graphs, u = make(), Graphs(), torch.randn(2, 5, D).double()
    step = torch.compile(block.step, fullgraph=True, backend=graphs)
    conv_state, ssm_state = states(block, 2)
    want = block(u, initial_state=(conv_state, ssm_state), return_final_state=True)
    outs = []
    for t in range(5):
        out, conv_state, ssm_state = step(u[:, t : t + 1], conv_state, ssm_state)
        outs.append(out)
    assert_same([torch.cat(outs, 1), conv_state, ssm_state], want, 1e-12)
    assert len(graphs) == 1
    u, *before = torch.randn(3, 1, D).double(), *states(block, 3)  # another batch size
    assert_same(step(u, *before), block.step(u, *before), 1e-12)


# ---- ONNX


class Piece(Mamba2):
    """One piece of a longer sequence: (u, lengths, states before it) -> (out, states after it)"""

    def forward(self, u, lengths, conv_state, ssm_state):
        return super().forward(u, lengths=lengths, initial_state=(conv_state, ssm_state), return_final_state=True)


class Step(Mamba2):
    def forward(self, u, conv_state, ssm_state):
        return self.step(u, conv_state, ssm_state)


def export(module: nn.Module, inputs: tuple, axes: tuple[dict[int, str], ...]):
    """Session of `module`, exported with these float32 `inputs` and their `axes` {number: name} left open."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    with torch.no_grad():
        program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=axes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    # a torch.export.Dim instead of a name may be closed without an error
    for node, axis, tensor in zip(session.get_inputs(), axes, inputs, strict=True):
        assert node.shape == [axis.get(number, size) for number, size in enumerate(tensor.shape)]
    return session


@torch.no_grad()
def assert_runs_the_same(session, module: nn.Module, inputs: tuple):
    feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs, strict=True)}
    assert_same([torch.from_numpy(out) for out in session.run(None, feed)], module(*inputs), 1e-5)


BATCH, BATCH_AND_TIME = {0: "batch"}, {0: "batch", 1: "time"}
SIZES = [(2, 128), (1, 1), (3, 64), (2, 65), (1, 100), (12, 500)]  # the first is exported


def test_onnx_forward_with_states_and_lengths():
    module = make(Piece, torch.float32)
    cases = [(torch.randn(b, T, D), torch.randint(1, T + 1, (b,)), *states(module, b)) for b, T in SIZES]
    session = export(module, cases[0], (BATCH_AND_TIME, BATCH, BATCH, BATCH))
    for inputs in cases:
        assert_runs_the_same(session, module, inputs)


def test_onnx_bidirectional():
    module = make(BiMamba2, torch.float32)
    cases = [(torch.randn(b, T, D), torch.randint(1, T + 1, (b,))) for b, T in SIZES]
    session = export(module, cases[0], (BATCH_AND_TIME, BATCH))
    assert session.get_outputs()[0].shape == ["batch", "time", D]
    for inputs in cases:
        assert_runs_the_same(session, module, inputs)


def test_onnx_step():
    module = make(Step, torch.float32)
    session = export(module, (torch.randn(2, 1, D), *states(module, 2)), (BATCH, BATCH, BATCH))
    for b in (2, 1, 5):
        assert_runs_the_same(session, module, (torch.randn(b, 1, D), *states(module, b)))
