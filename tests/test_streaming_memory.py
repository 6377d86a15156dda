"""The streaming memory: which frames are kept, its size, objects independent to the bit, step by step as offline,
presence, corrections, gradients, ONNX; SAM 2's attention on other grids, and SAM's decoder for several objects."""

import pytest
import torch
from torch import nn

from models.fastsam2 import FastSAM2, FastSAM2Config
from models.sam2_memory import MemoryAttention, MemoryEncoder, rotary_angles, rotate
from models.sam_mask_decoder import SAMMaskDecoder
from models.streaming_memory import (
    ABSENT,
    Followed,
    MemoryConfig,
    MemoryState,
    StreamingMemory,
    advance,
    forget,
    per_object,
    state_bytes,
)

D, GRID = 16, (8, 16)
KINDS = pytest.mark.parametrize("maps", [0, 2], ids=["tokens", "maps"])


def memory(maps: int = 0, seed: int = 0, **changes) -> StreamingMemory:
    """Small, with weights that are nowhere 0."""
    torch.manual_seed(seed)
    cfg = MemoryConfig(
        **{"dim": D, "heads": 2, "hidden": 24, "kept": 3, "recent": 4, "map_dim": 8} | changes, maps=maps
    )
    model = StreamingMemory(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.presence_out.weight.mul_(0.1)
        model.presence_out.bias.fill_(3.0)
    return model


def decode(features: torch.Tensor, queries: torch.Tensor) -> dict:
    """Stands for the decoder: a query finds what is like it."""
    kernels = queries.tanh()
    return {"masks": [torch.einsum("bpd,bdhw->bphw", kernels, features)], "queries": kernels}


def video(B: int, T: int, P: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, T, D, h, w) and prompts (B, P, D)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, D, *GRID, generator=g), torch.randn(B, P, D, generator=g)


def rows(*numbers: int, P: int = 4) -> torch.Tensor:
    """bool (1, P)."""
    return torch.tensor([[p in numbers for p in range(P)]])


def leaves(state: MemoryState) -> list[torch.Tensor]:
    return [state.prompt, state.known, state.pointed, *state.tokens, *(state.maps or ())]


def assert_same(a: MemoryState, b: MemoryState, place: int | slice = slice(None)) -> None:
    """Bit for bit, of the objects at these places."""
    assert all(torch.equal(x[:, place], y[:, place]) for x, y in zip(leaves(a), leaves(b), strict=True))


def assert_near(a: Followed, b: Followed) -> None:
    """Masks within 1e-5 of the largest logit, presence within 1e-5, objects there or not alike."""
    ours, theirs = (x.out["masks"][-1] for x in (a, b))
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)
    torch.testing.assert_close(a.presence, b.presence, atol=1e-5, rtol=0)
    assert torch.equal(a.present, b.present)


# ---- which frames are kept


@torch.no_grad()
def test_first_prompt_newest_prompts_and_a_ring_of_seen_frames(monkeypatch):
    """Against lists, over 60 frames of random events of four objects; an entry is told by the frame it is of."""
    model, state = memory(), None
    monkeypatch.setattr(
        model, "entry", lambda features, masks, kernels: kernels.new_full((1, 4, 2, D), features.item())
    )
    state, g = model.start(1, 4), torch.Generator().manual_seed(0)
    kept, ring = [[] for _ in range(4)], [[] for _ in range(4)]
    for t in range(1, 61):
        state = advance(state)
        pointed, seen = torch.rand(1, 4, generator=g) < 0.15, torch.rand(1, 4, generator=g) < 0.6
        state = model.point(state, torch.zeros(1, 4, D), pointed)
        written = state.known & (pointed | seen)
        state = model.write(state, torch.tensor(float(t)), None, state.prompt, written)
        for p in range(4):
            if pointed[0, p]:
                kept[p] = kept[p][:1] + (kept[p][1:] + [t])[-2:] if kept[p] else [t]
            elif written[0, p]:
                ring[p] = (ring[p] + [t])[-4:]
            age, found = state.tokens.age[0, p], state.tokens.values[0, p, :, 0, 0]
            assert sorted(found[:3][age[:3] >= 0].tolist()) == kept[p]
            assert sorted(found[3:][age[3:] >= 0].tolist()) == ring[p]
            assert torch.equal(age[age >= 0], t - found[age >= 0].long())
    assert all(len(k) == 3 and len(r) == 4 for k, r in zip(kept, ring, strict=True))


@torch.no_grad()
def test_one_kept_frame_is_the_newest_prompt_and_no_ring_is_possible():
    model = memory(kept=1, recent=0)
    features, prompts = video(1, 4, 4)
    state = model.start(1, 4)
    for t, given in enumerate([rows(0, 1), rows(1), rows(), rows()]):
        state, _ = model.step(state, features[:, t], decode, prompts, given)
    assert state.tokens.age[0, :, 0].tolist() == [3, 2, -1, -1] and state.tokens.age.shape[2] == 1


@KINDS
@torch.no_grad()
def test_size_is_flat_over_500_frames(maps):
    model = memory(maps)
    features, prompts = video(1, 10, 4)
    state = model.start(1, 4, GRID)
    empty = state_bytes(state)
    for t in range(500):
        state, found = model.step(state, features[:, t % 10], decode, prompts, rows(0, 1, 2) if t % 50 == 0 else rows())
        assert state_bytes(state) == empty
        assert found.masks.isfinite().all() and found.presence.isfinite().all()
    assert (state.tokens.age[0, :3] >= 0).all() and (state.tokens.age[0, 3] == -1).all()
    assert all(x.isfinite().all() for x in leaves(state))


# ---- what is read


@KINDS
@torch.no_grad()
def test_without_memory_the_prompt_decodes_as_ever(maps):
    model = memory(maps)
    features, prompts = video(2, 2, 3)
    state = model.point(model.start(2, 3, GRID), prompts, torch.ones(2, 3, dtype=torch.bool))
    reading = model.read(state, features[:, 0])
    assert torch.equal(reading.queries.reshape(2, 3, D), prompts)
    assert torch.equal(reading.features, features[:, 0].repeat_interleave(3, 0) if maps else features[:, 0])


@KINDS
@torch.no_grad()
def test_an_untrained_memory_changes_nothing(maps):
    torch.manual_seed(0)
    cfg = MemoryConfig(dim=D, heads=2, hidden=24, map_dim=8, maps=maps)
    model = StreamingMemory(cfg)
    features, prompts = video(1, 4, 3)
    for t, found in enumerate(model.follow(features, decode, prompts)):
        alone = decode(features[:, t], prompts)["masks"][-1]
        torch.testing.assert_close(found.masks, alone, atol=1e-5, rtol=1e-5)
        assert found.present.all()


@KINDS
@torch.no_grad()
def test_age_kind_mask_and_kernel_of_what_is_remembered_matter(maps):
    model = memory(maps)
    features, prompts = video(1, 3, 2)
    everyone = torch.ones(1, 2, dtype=torch.bool)
    state = model.point(model.start(1, 2, GRID), prompts, everyone)
    masks, kernels = torch.randn(1, 2, *GRID), torch.randn(1, 2, D)

    def then(masks, kernels, pointed=True, wait=1):
        s = model.write(state._replace(pointed=everyone & pointed), features[:, 0], masks, kernels, everyone)
        for _ in range(wait):
            s = advance(s)
        return torch.cat([x.flatten() for x in model.read(s, features[:, 1])])

    first = then(masks, kernels)
    others = [then(-masks, kernels), then(masks, -kernels), then(masks, kernels, pointed=False)]
    others += [then(masks, kernels, pointed=False, wait=2)]
    results = [first, *others]
    assert all(not torch.allclose(a, b) for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(first, then(masks, kernels, wait=3))  # frames with prompts do not age
    last = then(masks, kernels, pointed=False, wait=4)
    assert torch.equal(last, then(masks, kernels, pointed=False, wait=9))  # older than the ring is one age


# ---- objects are independent


SMALL = {"classes": ["cat", "sky"], "queries": 4, "stages": 2, "backbone": "resnet18", "dim": D, "heads": 2}
SMALL |= {"hidden": 24, "embed_dim": 8}


@pytest.fixture(scope="module")
def network() -> FastSAM2:
    torch.manual_seed(0)
    return FastSAM2(FastSAM2Config(**SMALL)).eval()


def decoder_of(network: FastSAM2):
    """Its decoder; every mask has something inside, else an untrained network sees nothing."""

    def run(features: torch.Tensor, queries: torch.Tensor) -> dict:
        out = network.decode(features, queries, objects=False)
        return out | {"masks": [m - m.mean((2, 3), keepdim=True) for m in out["masks"]]}

    return run


@KINDS
@torch.no_grad()
def test_another_object_changes_no_bit_of_the_others(maps, network):
    """Objects 0 and 2 alone, and with 1, which comes in frame 2, is corrected in frame 3 and removed before frame 5."""
    model, run = memory(maps), decoder_of(network)
    features, prompts = video(1, 7, 4)
    alone = crowd = model.start(1, 4, GRID)
    for t in range(7):
        first = rows(0, 2) if t == 0 else rows()
        crowd = forget(crowd, rows(1)) if t == 5 else crowd
        alone, a = model.step(alone, features[:, t], run, prompts, first)
        crowd, b = model.step(crowd, features[:, t], run, prompts, first | (rows(1) if t == 2 else rows()))
        if t == 3:
            crowd, _ = model.step(crowd, features[:, t], run, -prompts, rows(1), again=True)
        for k in (0, 2):
            for name in ("masks", "iou"):
                assert torch.equal(a.out[name][-1][:, k], b.out[name][-1][:, k])
            assert torch.equal(a.presence[:, k], b.presence[:, k])
            assert_same(alone, crowd, k)
        assert a.present[0].tolist() == [True, False, True, False]
        assert b.present[0].tolist() == [True, 2 <= t < 5, True, False]
    assert_same(alone, crowd)  # a place that is free again is as new


@KINDS
@torch.no_grad()
def test_the_number_of_places_changes_nothing(maps, network):
    model, run = memory(maps), decoder_of(network)
    features, prompts = video(2, 4, 5)
    wide, narrow = model.follow(features, run, prompts), model.follow(features, run, prompts[:, :2])
    for a, b in zip(wide, narrow, strict=True):
        assert_near(Followed({"masks": [a.out["masks"][-1][:, :2]]}, a.presence[:, :2], a.present[:, :2]), b)


@torch.no_grad()
def test_an_object_added_later_is_as_in_a_stream_that_begins_there():
    model = memory()
    features, prompts = video(1, 8, 4)
    late = model.follow(features, decode, prompts, torch.tensor([[0, 3, -1, -1]]))
    fresh = model.follow(features[:, 3:], decode, prompts, torch.tensor([[-1, 0, -1, -1]]))
    for a, b in zip(late[3:], fresh, strict=True):
        assert torch.equal(a.masks[:, 1], b.masks[:, 1]) and torch.equal(a.presence[:, 1], b.presence[:, 1])
    assert not late[2].present[0, 1] and (late[2].masks[0, 1] == ABSENT).all() and late[3].present[0, 1]
    assert not torch.stack([f.present[0, 2:] for f in late]).any()


# ---- step by step and offline


@KINDS
@torch.no_grad()
def test_step_by_step_is_offline(maps, network):
    """Frames encoded one by one, against a clip encoded and followed at once."""
    model, run = memory(maps), decoder_of(network)
    torch.manual_seed(3)
    clip = torch.rand(1, 5, 3, 4 * GRID[0], 4 * GRID[1])
    prompts, first = torch.randn(1, 3, D), torch.tensor([[0, 2, 0]])
    offline = model.follow(network.encode(clip), run, prompts, first)
    state = model.start(1, 3, GRID)
    for t, want in enumerate(offline):
        state, got = model.step(state, network.encode(clip[:, t]), run, prompts, first == t)
        assert_near(got, want)
        assert torch.equal(got.present, first <= t)


@torch.no_grad()
def test_all_that_is_known_is_in_the_state():
    """The same state twice gives the same, and a state is not changed by what is done with it."""
    model = memory(2)
    features, prompts = video(1, 3, 4)
    before = [v.clone() for v in model.state_dict().values()]
    state, _ = model.step(model.start(1, 4, GRID), features[:, 0], decode, prompts, rows(0, 1))
    copy = [x.clone() for x in leaves(state)]
    one, a = model.step(state, features[:, 1], decode)
    model.step(one, features[:, 2], decode, prompts, rows(2))
    forget(one, rows(0))
    two, b = model.step(state, features[:, 1], decode)
    assert_same(one, two)
    assert torch.equal(a.masks, b.masks)
    assert all(torch.equal(x, y) for x, y in zip(leaves(state), copy, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), before, strict=True))


# ---- presence, corrections, given masks


@KINDS
@torch.no_grad()
def test_an_object_that_is_not_seen_has_an_empty_mask_and_is_not_written(maps):
    model = memory(maps)
    features, prompts = video(1, 4, 4)
    state, found = model.step(model.start(1, 4, GRID), features[:, 0], decode, prompts, rows(0, 1))
    model.presence_out.bias.fill_(-100.0)
    for t in (1, 2, 3):
        state, found = model.step(state, features[:, t], decode, prompts, rows(1) if t == 3 else rows())
        assert found.present[0].tolist() == [False, t == 3, False, False]
        assert (found.masks[0, 0] == ABSENT).all() and (found.presence < 0).all()
    assert state.tokens.age[0, 0].tolist() == [3, *[-1] * 6]
    assert state.tokens.age[0, 1].tolist() == [3, 0, *[-1] * 5]
    assert not maps or state.maps.age[0, :2].tolist() == [[3, -1, -1], [0, -1, -1]]


@torch.no_grad()
def test_an_empty_mask_is_absence():
    model = memory()
    features, prompts = video(1, 2, 4)
    state, _ = model.step(model.start(1, 4), features[:, 0], decode, prompts, rows(0))

    def nothing(features, queries):
        return decode(features, queries) | {"masks": [-torch.ones(1, 4, *GRID)]}

    state, found = model.step(state, features[:, 1], nothing)
    assert found.presence[0, 0] > 0 and not found.present[0, 0] and state.tokens.age[0, 0].tolist() == [1, *[-1] * 6]


@KINDS
@torch.no_grad()
def test_a_correction_replaces_what_was_written_of_its_frame(maps):
    """Corrected in its frame, twice, the object remembers that frame once, with the last prompt; others stay."""
    model = memory(maps)
    features, prompts = video(1, 3, 4)
    state, _ = model.step(model.start(1, 4, GRID), features[:, 0], decode, prompts, rows(0, 1))
    before, _ = model.step(state, features[:, 1], decode)
    assert before.tokens.age[0, 0].tolist() == [1, -1, -1, 0, -1, -1, -1]
    once, _ = model.step(before, features[:, 1], decode, -prompts, rows(0), again=True)
    twice, _ = model.step(once, features[:, 1], decode, 2 * prompts, rows(0), again=True)
    for state in (once, twice):
        assert state.tokens.age[0, 0].tolist() == [1, 0, *[-1] * 5]
        assert not maps or state.maps.age[0, 0].tolist() == [0, -1, -1]
        assert_same(state, before, 1)
    assert torch.equal(twice.prompt[:, 0], 2 * prompts[:, 0])
    assert not torch.equal(once.tokens.values[0, 0], twice.tokens.values[0, 0])


@KINDS
@torch.no_grad()
def test_given_masks_are_written_in_place_of_found_ones(maps):
    """Teacher forcing: what is remembered is the truth; an object that is truly gone is not written."""
    model = memory(maps)
    features, prompts = video(1, 1, 4)
    truth = torch.where(torch.rand(1, 4, *GRID) > 0.6, 10.0, -10.0)
    truth[:, 1] = -10.0
    start = model.start(1, 4, GRID)
    args = (features[:, 0], decode, prompts, rows(0, 1, 2))
    own, found = model.step(start, *args)
    taught, same = model.step(start, *args, truth, rows(0, 1))
    assert torch.equal(found.masks, same.masks)
    assert_same(own, taught, 2)
    assert (taught.tokens.age[0, 1] == -1).all() and taught.tokens.age[0, 0, 0] == 0
    want = model.entry(features[:, 0], truth, found.out["queries"])
    assert torch.equal(taught.tokens.values[0, 0, 0], want[0, 0])
    assert not torch.equal(own.tokens.values[0, 0, 0], want[0, 0])


# ---- training


@KINDS
def test_every_parameter_has_a_gradient(maps):
    """Of masks and presence in clips of six frames, through what was written before."""
    model = memory(maps).train()
    features, prompts = video(2, 6, 3)
    prompts.requires_grad_()
    found = model.follow(features.requires_grad_(), decode, prompts, torch.tensor([[0, 0, -1], [0, 1, 2]]))
    loss = sum(f.out["masks"][-1].sin().mean() + f.presence.sin().mean() for f in found[1:])
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert prompts.grad[0, 0].any() and features.grad[:, 0].any()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@KINDS
def test_autocast_and_no_object_at_all(maps):
    model = memory(maps)
    features, prompts = video(1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.follow(features, decode, prompts)
    assert found[-1].presence.dtype == torch.float32 and found[-1].masks.isfinite().all()
    exact = model.follow(features, decode, prompts)[-1].out["queries"]
    assert (found[-1].out["queries"] - exact).abs().max() < 0.2
    assert model.follow(features, decode, prompts[:, :0])[-1].masks.shape == (1, 0, *GRID)


def test_wrong_use_is_told():
    with pytest.raises(ValueError, match="kept 0"):
        MemoryConfig(kept=0)
    with pytest.raises(ValueError, match="maps 7"):
        MemoryConfig(maps=7)
    model = memory(1)
    for grid in ((6, 8), (8, 6), None):
        with pytest.raises(ValueError, match="multiples of 4"):
            model.start(1, 2, grid)
    with pytest.raises(ValueError, match=r"queries \(1, 3, 16\)"):
        model.point(model.start(1, 2, GRID), torch.zeros(1, 3, D), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="again with given"):
        model.step(model.start(1, 2, GRID), torch.zeros(1, D, *GRID), decode, again=True)


# ---- ONNX, torch.compile


class Step(nn.Module):
    """What comes before the decoder, and what comes after it, in one graph."""

    def __init__(self, model: StreamingMemory):
        super().__init__()
        self.model = model

    def forward(self, features, state, masks, kernels):
        state = advance(state)
        reading = self.model.read(state, features)
        presence = self.model.presence(state, features, masks, kernels)
        rows = state.known & (presence > 0)
        return *reading, presence, *leaves(self.model.write(state, features, masks, kernels, rows))


@torch.no_grad()
def example(maps: int) -> tuple[Step, tuple]:
    model = memory(maps, kept=2, recent=2, layers=1).eval()
    features, prompts = video(1, 4, 2)
    state = model.start(1, 2, GRID)
    for t, given in enumerate([rows(0, P=2), rows(1, P=2), rows(P=2)]):
        state, found = model.step(state, features[:, t], decode, prompts, given)
    return Step(model).eval(), (features[:, 3], state, found.masks, found.out["queries"])


@torch.no_grad()
def test_onnx_of_a_memory_step():
    """The state goes in and out as tensors of fixed size. Within 1e-4."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    module, inputs = example(maps=1)
    program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = [inputs[0], *leaves(inputs[1]), *inputs[2:]]
    given = {node.name: x.numpy() for node, x in zip(program.model.graph.inputs, tensors, strict=True)}
    used = {node.name for node in session.get_inputs()}
    got = session.run(None, {name: x for name, x in given.items() if name in used})
    for a, b in zip(got, module(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-4, rtol=0)


@torch.no_grad()
def test_compiled_without_a_break():
    torch.compiler.reset()
    module, inputs = example(maps=1)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, module(*inputs), atol=1e-5, rtol=1e-5)


# ---- SAM 2's and SAM's modules beyond the stored cases


@torch.no_grad()
def test_hidden_keys_are_as_if_they_were_not_there():
    torch.manual_seed(0)
    grid, S = (3, 5), 15
    model = MemoryAttention(16, 8, layers=2, hidden=24).eval()
    x, code = torch.randn(2, 1, S, 16)
    keys, places = torch.randn(2, 1, 2 * S + 4, 8)
    want = model(x, code, keys[:, S:], places[:, S:], grid, unplaced=4)
    seen = torch.arange(2 * S + 4)[None] >= S
    got = model(x, code, keys, places, grid, 4, seen)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"15 cells for a grid \(4, 4\)"):
        model(x, code, keys, places, (4, 4))


def test_rotary_scores_depend_on_the_way_from_cell_to_cell():
    """A grid that is not square: scores of one query and one key, moved together, stay."""
    torch.manual_seed(0)
    h, w = 4, 7
    q, k = torch.randn(2, 8).double()
    angles = rotary_angles(8, (h, w), q)
    turned = [rotate(x.float().expand(1, 1, h * w, 8), angles)[0, 0].unflatten(0, (h, w)) for x in (q, k)]
    score = torch.einsum("yxd,vud->yxvu", *turned)
    torch.testing.assert_close(score[0, 0, 1, 2], score[2, 4, 3, 6])
    for other in (score[0, 0, 2, 1], score[0, 0, 1, 3], score[0, 0, 2, 2]):
        assert (score[0, 0, 1, 2] - other).abs() > 1e-3
    torch.testing.assert_close(score[0, 0, 0, 0], (q * k).sum().float())


def test_objects_of_a_frame_share_its_features():
    torch.manual_seed(0)
    encoder, features, masks = MemoryEncoder(8, 4, 4).eval(), torch.randn(2, 8, 4, 6), torch.randn(2, 3, 16, 24)
    got = encoder(features, masks)
    want = encoder(features[1:], masks[1:, 2:])
    assert got.shape == (2, 3, 4, 4, 6)
    torch.testing.assert_close(got[1:, 2:], want)
    with pytest.raises(ValueError, match="expected"):
        encoder(features, masks[..., :20])


def test_sam_decoder_takes_one_image_for_all_objects():
    torch.manual_seed(0)
    decoder = SAMMaskDecoder(32, heads=4, hidden=48, iou_hidden=16).eval()
    image, code = torch.randn(1, 32, 4, 6), torch.randn(32, 4, 6)
    sparse, dense = torch.randn(3, 2, 32), torch.randn(3, 32, 4, 6)
    masks, iou = decoder(image, code, sparse, dense, True)
    single, quality = decoder(image.expand(3, -1, -1, -1), code, sparse, dense, False)
    assert masks.shape == (3, 3, 16, 24) and iou.shape == (3, 3)
    assert single.shape == (3, 1, 16, 24) and quality.shape == (3, 1)
    alone, _ = decoder(image, code, sparse[1:2], dense[1:2], True)
    torch.testing.assert_close(masks[1:2], alone, atol=1e-5, rtol=1e-5)
    (masks.sum() + iou.sum() + single.sum()).backward()
    assert not [n for n, p in decoder.named_parameters() if p.grad is None]


def test_per_object_folds_a_batch_of_objects():
    out = {"masks": [torch.arange(24.0).reshape(6, 1, 2, 2)], "queries": torch.zeros(6, 1, 5)}
    folded = per_object(out, 2, 3)
    assert folded["masks"][0].shape == (2, 3, 2, 2) and folded["queries"].shape == (2, 3, 5)
    assert torch.equal(folded["masks"][0][1, 0], out["masks"][0][3, 0])
