"""FastSAM2 under torch.compile without a break, and exported to ONNX and run in onnxruntime, against PyTorch.

Four graphs: an image -> features, features -> objects, features and any mix of prompts -> masks, and a step of the
memory: features, what points at objects in this frame, and the state -> masks, presence and the next state. Exported
with torch.onnx.export(dynamo=True) under torch.no_grad(), from two images, else the batch is closed. What can stay open:
the batch; the image's sides, in multiples of 32, and with them those of features and mask prompts; of the prompts also
their number and that of clicks, at three times the time to export. The sides of a memory's maps are fixed, and so are
its places. A kind of prompt that is not used is marked as absent, or left at length 0.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from models.fastsam2 import FastSAM2, FastSAM2Config
from models.lite_dfpn import DeformUp, LiteDFPN, sampled_deform_conv2d
from models.prompt_fusion import PromptBatch
from models.streaming_memory import Bank, MemoryConfig, MemoryState

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


def prompts(B: int, P: int, clicks: int, H: int = H, W: int = W) -> tuple[torch.Tensor, ...]:
    """Fields of a PromptBatch, in its order: clicks, boxes, masks and texts, each of some objects only."""
    some = [torch.rand(B, P, 1) > 0.5 for _ in range(3)]
    size = torch.tensor([W, H])
    corner = torch.rand(B, P, 1, 2) * 0.6 * size
    boxes = torch.cat([corner, corner + 0.3 * size], -1)
    points, labels = torch.rand(B, P, clicks, 2) * 0.9 * size, torch.randint(-1, 2, (B, P, clicks))
    return points, labels, boxes, some[0], torch.rand(B, P, 1, H, W) > 0.6, some[1], torch.randn(B, P, 1, 16), some[2]


def features(B: int, H: int = H, W: int = W) -> torch.Tensor:
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


class Step(Encode):
    """One frame of all objects. The state comes and goes as a row of tensors, in MemoryState's order."""

    def forward(self, features, prompts, given, *tensors):
        prompt, known, pointed, *banks = tensors
        state = MemoryState(prompt, known, pointed, Bank(*banks[:2]), Bank(*banks[2:]) if banks[2:] else None)
        decode = partial(self.model.decode, objects=False)
        state, found = self.model.memory.step(state, features, decode, prompts, given)
        return found.masks, found.presence, found.present, found.out["iou"][-1], *tensors_of(state)


def tensors_of(state: MemoryState) -> tuple[torch.Tensor, ...]:
    return (state.prompt, state.known, state.pointed, *state.tokens, *(state.maps or ()))


@torch.no_grad()
def follower(maps: int) -> FastSAM2:
    """Small, with a memory whose weights are nowhere 0."""
    torch.manual_seed(0)
    small = {"dim": 32, "heads": 4, "hidden": 48, "layers": 1, "kept": 2, "recent": 2, "map_dim": 8, "maps": maps}
    model = FastSAM2(FastSAM2Config(**SMALL, memory=MemoryConfig(**small))).eval()
    for p in model.memory.parameters():
        p.add_(0.1 * torch.randn_like(p))
    model.memory.presence_out.bias.fill_(0.0 if maps else -0.8)  # object 0 of `film` is seen in some frames only
    return model


def film(T: int, h: int = H // 4, w: int = W // 4) -> list[tuple[torch.Tensor, ...]]:
    """Per frame what a step is given but for the state: object 0 is pointed at in frames 0 and 3, object 1 in frame 2,
    and place 2 stays free."""
    g, given = torch.Generator().manual_seed(0), torch.zeros(T, 1, 3, dtype=torch.bool)
    given[0, 0, 0] = given[2, 0, 1] = given[3, 0, 0] = True
    return [(torch.randn(1, 32, h, w, generator=g), torch.randn(1, 3, 32, generator=g), given[t]) for t in range(T)]


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


@torch.no_grad()
def test_a_step_of_the_memory_compiled_without_a_break():
    """One graph for all frames, whether something points at objects or not."""
    torch.compiler.reset()
    step, graphs = Step(follower(maps=1)), []
    state = tensors_of(step.model.memory.start(1, 3, (H // 4, W // 4)))

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for inputs in film(5):
        want = step(*inputs, *state)
        torch.testing.assert_close(compiled(*inputs, *state), want, rtol=1e-5, atol=1e-4)
        state = want[4:]
    assert len(graphs) == 1


# ---- ONNX


BATCH, SIDES = {0: "batch"}, {0: "batch", 2: "h", 3: "w"}
PROMPTED, CLICKED = {0: "batch", 1: "prompts"}, {0: "batch", 1: "prompts", 2: "clicks"}
BLOCKS = [torch.export.Dim(name, min=1, max=64) for name in ("h", "w")]  # of 32 px


def open_sides(first: int, px: int) -> dict:
    """Axes `first` and the next, of `px` to a block."""
    return {first + k: px * block for k, block in enumerate(BLOCKS)}


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
        want = [axis.get(number, size) for number, size in enumerate(tensor.shape)]
        assert node.shape == [x if isinstance(x, int | str) else x.__name__ for x in want], node.name
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
@pytest.mark.slow
def test_onnx_encode_of_any_sides(model):
    """Multiples of 32, against the network that does not sample."""
    torch.manual_seed(0)
    cases = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((2, 3, H, W), (1, 3, 128, 32))]
    model.neck.sample()
    session, _ = export(Encode(model), (cases[0],), (BATCH | open_sides(2, 32),))
    model.neck.sample(False)
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
def test_onnx_prompts_of_a_fixed_number_in_images_of_any_sides(model):
    """One image, larger, smaller or of another form than the exported one, and four prompts: clicks, boxes, masks and
    texts, the last ones padding where there are fewer."""
    torch.manual_seed(0)
    sides = [(4, H, W), (4, 128, 32), (4, 160, 224), (4, 32, 32), (1, H, W), (3, 64, 160)]
    cases = [(features(1, *size), *prompts(1, n, 3, *size)) for n, *size in sides]
    axes = [{}] * 4 + [open_sides(3, 32)] + [{}] * 3
    session, _ = export(Prompts(model), cases[0], (open_sides(2, 8), tuple(axes)))
    for f, *fields in cases:
        padded = [torch.zeros(1, 4, *t.shape[2:], dtype=t.dtype) for t in fields]
        padded[1].fill_(-1)
        for whole, part in zip(padded, fields, strict=True):
            whole[:, : part.shape[1]] = part
        assert_runs_the_same(session, (f, *padded), Prompts(model)(f, *fields))


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
def test_onnx_prompts_of_any_number_and_sides(model):
    torch.manual_seed(1)
    sizes = [(2, 3, 2, H, W), (1, 1, 1, 96, 32), (3, 9, 5, 64, 160)]
    cases = [(features(B, *size), *prompts(B, P, clicks, *size)) for B, P, clicks, *size in sizes]
    axes = [CLICKED] * 2 + [PROMPTED] * 2 + [PROMPTED | open_sides(3, 32)] + [PROMPTED] * 3
    session, _ = export(Prompts(model), cases[0], (BATCH | open_sides(2, 8), tuple(axes)))
    for inputs in cases:
        assert_runs_the_same(session, inputs, Prompts(model)(*inputs))


# ---- ONNX of a step of the memory


@torch.no_grad()
def assert_follows_the_same(session, step: Step, grids: list[tuple[int, int]]) -> None:
    """Both through a film of each grid without a break, each with its own state: floats within TOLERANCE, the same
    objects present and the same places taken."""
    ours = theirs = tensors_of(step.model.memory.start(1, 3, grids[0]))
    seen = []
    for t, inputs in enumerate(frame for grid in grids for frame in film(7, *grid)):
        want = step(*inputs, *ours)
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), (*inputs, *theirs), strict=True)}
        got = [torch.from_numpy(x) for x in session.run(None, feed)]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE if b.is_floating_point() else 0, msg=f"frame {t}")
        ours, theirs = want[4:], got[4:]
        seen.append(want[2][0, 0].item())
    assert {True, False} == {*seen}, "object 0 is always there, or never"


def step_inputs(step: Step) -> tuple[torch.Tensor, ...]:
    return (*film(4)[3], *tensors_of(step.model.memory.start(1, 3, (H // 4, W // 4))))


@torch.no_grad()
def test_onnx_step_of_a_memory_of_tokens():
    """The grid of the features is open, and may change from frame to frame."""
    step = Step(follower(maps=0))
    session, _ = export(step, step_inputs(step), ({2: "h", 3: "w"}, {}, {}, ({},) * 5))
    assert_follows_the_same(session, step, [(16, 24), (8, 40)])


@torch.no_grad()
def test_onnx_step_of_a_memory_with_maps():
    step = Step(follower(maps=1))
    session, _ = export(step, step_inputs(step), ({}, {}, {}, ({},) * 7))
    assert_follows_the_same(session, step, [(16, 24)])
