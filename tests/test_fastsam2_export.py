"""FastSAM2 under torch.compile without a break, and exported to ONNX and run in onnxruntime, against PyTorch.

Three graphs: an image -> features, features -> objects, features and any mix of prompts -> masks. Exported with
torch.onnx.export(dynamo=True) under torch.no_grad(), from two images, else the batch is closed. What can stay open:
the batch; of the objects also the features' sides; of the prompts also their number and that of clicks, at three times
the time to export. The image's sides are fixed: coordinates and pooled mask prompts become constants of that size.
A kind of prompt that is not used is marked as absent, or left at length 0.
"""

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from models.fastsam2 import FastSAM2, FastSAM2Config
from models.lite_dfpn import DeformUp, LiteDFPN, sampled_deform_conv2d
from models.prompt_fusion import PromptBatch

SMALL = {"classes": ["cat", "sky", "car"], "synonyms": 2, "queries": 5, "stages": 2, "backbone": "resnet18"}
SMALL |= {"dim": 32, "heads": 4, "hidden": 48, "embed_dim": 16}
H, W, TOLERANCE = 64, 96, 1e-3  # px; of a logit


@pytest.fixture(scope="module")
def model() -> FastSAM2:
    """Small, with offsets that are not 0 and statistics of its own."""
    torch.manual_seed(0)
    model = FastSAM2(FastSAM2Config(**SMALL)).eval()
    with torch.no_grad():
        bend(model)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def bend(model: nn.Module) -> None:
    """Offsets of about a cell."""
    for m in model.modules():
        if isinstance(m, DeformUp):
            m.dcn_offset.bias.normal_()
            m.dcn_offset.weight.normal_(0, 0.05)


def prompts(B: int, P: int, clicks: int) -> tuple[torch.Tensor, ...]:
    """Fields of a PromptBatch, in its order: clicks, boxes, masks and texts, each of some objects only."""
    some = [torch.rand(B, P, 1) > 0.5 for _ in range(3)]
    corner = torch.rand(B, P, 1, 2) * 40
    boxes = torch.cat([corner, corner + 20], -1)
    points, labels = torch.rand(B, P, clicks, 2) * 60, torch.randint(-1, 2, (B, P, clicks))
    return points, labels, boxes, some[0], torch.rand(B, P, 1, H, W) > 0.6, some[1], torch.randn(B, P, 1, 16), some[2]


def features(B: int) -> torch.Tensor:
    return torch.randn(B, 32, H // 4, W // 4)


class Encode(nn.Module):
    def __init__(self, model: FastSAM2):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.encode(images)


class Objects(Encode):
    def forward(self, features):
        out = self.model.decode(features)
        return out["classes"][-1], out["masks"][-1], out["iou"][-1]


class Prompts(Encode):
    def forward(self, features, *fields):
        out = self.model.decode(features, self.model.queries(PromptBatch(*fields), features), objects=False)
        return out["classes"][-1], out["masks"][-1], out["iou"][-1]


class Maps(nn.Module):
    """The neck, with its maps one by one."""

    def __init__(self, neck: LiteDFPN):
        super().__init__()
        self.neck = neck

    def forward(self, *maps):
        return self.neck(list(maps))


# ---- the exportable deformable convolution


@pytest.mark.parametrize("B, C, out, h, w", [(2, 4, 6, 9, 7), (1, 32, 16, 1, 5), (1, 64, 8, 20, 33)])
def test_sampled_convolution_is_torchvisions(B, C, out, h, w):
    """Values within 1e-5 and gradients within 1e-4 of the largest, also where taps leave the map."""
    torch.manual_seed(0)
    inputs = (
        torch.randn(B, C, h, w),
        3 * torch.randn(B, 18, h, w),
        torch.randn(out, C, 3, 3) / C,
        torch.rand(B, 9, h, w),
    )
    inputs = [t.requires_grad_() for t in inputs]
    x, offset, weight, mask = inputs
    want, got = deform_conv2d(x, offset, weight, padding=1, mask=mask), sampled_deform_conv2d(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    gradients = (torch.autograd.grad(y.sin().sum(), inputs) for y in (got, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
def test_a_neck_that_samples_is_the_same_neck(model):
    """Within 1e-5 of the largest feature, also under autocast, and back again bit for bit."""
    images, neck = torch.rand(2, 3, H, W), model.neck
    want = model.encode(images)
    assert neck.sample() is neck
    got = model.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode(images)
    neck.sample(False)
    with torch.autocast("cpu", torch.bfloat16):
        low_want = model.encode(images)
    assert not torch.equal(got, want), "it did not sample"
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    torch.testing.assert_close(low, low_want, rtol=0, atol=0.02 * want.abs().max().item())
    assert torch.equal(model.encode(images), want)


# ---- torch.compile


@torch.no_grad()
@pytest.mark.parametrize("graph", [Encode, Objects, Prompts])
def test_compiled_without_a_break(model, graph):
    torch.compiler.reset()
    torch.manual_seed(1)
    module = graph(model)
    inputs = (torch.rand(2, 3, 60, 90),) if graph is Encode else (features(2),)
    inputs += prompts(2, 3, 2) if graph is Prompts else ()
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, module(*inputs), rtol=1e-5, atol=1e-4)


# ---- ONNX


BATCH, SIDES = {0: "batch"}, {0: "batch", 2: "h", 3: "w"}
PROMPTED, CLICKED = {0: "batch", 1: "prompts"}, {0: "batch", 1: "prompts", 2: "clicks"}


def export(module: nn.Module, inputs: tuple, axes: tuple):
    """Session of `module`, exported with these inputs and their `axes` {number: name} left open (*args: a tuple of
    them), and its operators."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    with torch.no_grad():
        program = torch.onnx.export(module.eval(), inputs, dynamo=True, dynamic_shapes=axes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    flat = [axis for group in axes for axis in (group if isinstance(group, tuple) else (group,))]
    for node, axis, tensor in zip(session.get_inputs(), flat, inputs, strict=True):
        assert node.shape == [axis.get(number, size) for number, size in enumerate(tensor.shape)], node.name
    return session, {node.op_type for node in program.model_proto.graph.node}


@torch.no_grad()
def assert_runs_the_same(session, inputs: tuple, want: torch.Tensor | tuple) -> None:
    """Each output within TOLERANCE; of more queries than `want` has, the first ones."""
    feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), inputs, strict=True)}
    got = session.run(None, feed)
    for a, b in zip(got, [want] if isinstance(want, torch.Tensor) else want, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(torch.from_numpy(a)[:, : b.shape[1]], b, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_onnx_neck_keeps_the_deformable_convolution_as_an_operator():
    torch.manual_seed(0)
    channels, sides = (8, 12, 16, 20), [(24, 16), (12, 8), (6, 4), (3, 2)]
    neck = LiteDFPN(channels, dim=32, width=16).eval()
    bend(neck)
    cases = [[torch.randn(B, c, *s) for c, s in zip(channels, sides, strict=True)] for B in (2, 1)]
    session, operators = export(Maps(neck), tuple(cases[0]), ((BATCH,) * 4,))
    assert "DeformConv" in operators
    for maps in cases:
        assert_runs_the_same(session, maps, neck(maps))


@torch.no_grad()
def test_onnx_encode_without_deformable_convolutions(model):
    """From bytes, against the network that does not sample."""
    torch.manual_seed(0)
    cases = [torch.randint(0, 256, (B, 3, 60, W), dtype=torch.uint8) for B in (2, 1, 3)]  # one side is padded
    model.neck.sample()
    session, operators = export(Encode(model), (cases[0],), (BATCH,))
    model.neck.sample(False)
    assert "GridSample" in operators and "DeformConv" not in operators
    for images in cases:
        assert_runs_the_same(session, (images,), model.encode(images))


@torch.no_grad()
def test_onnx_objects(model):
    torch.manual_seed(0)
    cases = [torch.randn(B, 32, h, w) for B, h, w in [(2, 16, 24), (1, 16, 24), (3, 8, 40)]]
    session, _ = export(Objects(model), (cases[0],), (SIDES,))
    for f in cases:
        assert_runs_the_same(session, (f,), Objects(model)(f))


@torch.no_grad()
def test_onnx_prompts_of_a_fixed_number(model):
    """One image and four prompts, the last ones padding where there are fewer."""
    torch.manual_seed(0)
    f, fields = features(1), prompts(1, 4, 3)
    session, _ = export(Prompts(model), (f, *fields), ({}, ({},) * 8))
    assert_runs_the_same(session, (f, *fields), Prompts(model)(f, *fields))
    for n in (1, 3):
        f, fewer = features(1), prompts(1, n, 3)
        padded = [torch.zeros(1, 4, *t.shape[2:], dtype=t.dtype) for t in fewer]
        padded[1].fill_(-1)
        for whole, part in zip(padded, fewer, strict=True):
            whole[:, :n] = part
        assert_runs_the_same(session, (f, *padded), Prompts(model)(f, *fewer))


class Clicks(Encode):
    """Kinds of prompts that nobody uses have length 0."""

    def forward(self, features, points, labels):
        B, P = labels.shape[:2]
        none = torch.zeros(B, P, 0, dtype=torch.bool)
        fields = (points, labels, none[..., None].expand(-1, -1, -1, 4).float(), none)
        fields += (none[..., None, None].expand(-1, -1, -1, H, W), none, torch.zeros(B, P, 0, 16), none)
        out = self.model.decode(features, self.model.queries(PromptBatch(*fields), features), objects=False)
        return out["masks"][-1], out["iou"][-1]


@torch.no_grad()
def test_onnx_clicks_alone(model):
    """Sums, not `any`, of kinds of length 0: over nothing, onnxruntime's `any` is true."""
    torch.manual_seed(0)
    inputs = (features(1), *prompts(1, 4, 3)[:2])
    session, _ = export(Clicks(model), inputs, ({}, {}, {}))
    assert_runs_the_same(session, inputs, Clicks(model)(*inputs))


@torch.no_grad()
@pytest.mark.slow
def test_onnx_prompts_of_any_number(model):
    torch.manual_seed(0)
    cases = [(features(B), *prompts(B, P, clicks)) for B, P, clicks in [(2, 3, 2), (1, 1, 1), (3, 9, 5)]]
    session, _ = export(Prompts(model), cases[0], (BATCH, (CLICKED, CLICKED, *[PROMPTED] * 6)))
    for inputs in cases:
        assert_runs_the_same(session, inputs, Prompts(model)(*inputs))
