"""The memory of a scene: against the definition written out, items independent, a new one changes nothing, gradients
through frames, what queue and radius keep, the network around it."""

import pytest
import torch
import torch.nn.functional as F

from models.res16unet import Res16UNet, Res16UNetConfig
from models.scene_memory import LEVELS, SceneMemory
from models.sparse_conv import SparseTensor, cat, sparse_tensor, voxelise
from models.sparse_maps import Coordinates, unpack

CHANNELS, STRIDES = (3, 4, 5, 6), (2, 4, 8, 16)


def points(seed: int, n: int = 150, shift: float = 0.0, size: float = 0.5) -> torch.Tensor:
    """(n, 3) m within a box of `size`, moved along x: about 25 voxels of 2 cm wide"""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, generator=g) * size + torch.tensor([shift, -0.2, 0.0])


def frame(clouds: list[torch.Tensor], dtype=torch.float32) -> list[SparseTensor]:
    """Levels of one frame of several items; features are smooth functions of the place, as if after a ReLU."""
    batch = torch.cat([torch.full((len(p),), b) for b, p in enumerate(clouds)])
    xyz = torch.cat(clouds)
    x, _ = voxelise(xyz, xyz, 0.02, batch)
    levels = []
    for stride, C in zip(STRIDES, CHANNELS, strict=True):
        coords = unpack(x.coordinates.keys(stride))[:, 1:].to(dtype)
        waves = torch.linspace(0.02, 0.11, 3 * C, dtype=dtype).view(3, C)
        levels.append(SparseTensor((coords @ waves).sin().relu(), x.coordinates, stride))
    return levels


def memory(seed: int = 0, **options) -> SceneMemory:
    """With weights that are nowhere zero."""
    torch.manual_seed(seed)
    model = SceneMemory(CHANNELS, **options).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if name.endswith("kernel") else 0.1))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0, 0.1)
    return model


def run(model: SceneMemory, clip: list[list[SparseTensor]]):
    """All frames: outputs [t][level], states [t]"""
    outs, states, state = [], [], None
    for levels in clip:
        out, state = model(levels, state)
        outs.append(out)
        states.append(state)
    return outs, states


def of_item(x: SparseTensor, b: int) -> torch.Tensor:
    return x.features[x.batch == b]


# ---- the definition, written out


def written_out(model, i, clip):
    """One level of one item, frame after frame, by the operations of sparse_conv on whole tensors and by dictionaries."""
    history, outs = {}, []
    for t, levels in enumerate(clip):
        x = levels[i]
        coords, rows = x.coords, x.features
        for c, f in zip(coords.tolist(), rows, strict=True):
            history[tuple(c)] = torch.maximum(history[tuple(c)], f) if tuple(c) in history else f
        low, high = coords[:, 1:].amin(0), coords[:, 1:].amax(0)
        margin = (model.scale - 1) / 2 * (high - low)
        keys = torch.tensor(list(history))
        near = ((keys[:, 1:] >= low - margin) & (keys[:, 1:] <= high + margin)).all(1)
        features = torch.stack(list(history.values()))[near]
        H = sparse_tensor(keys[near], features, x.stride)
        d1, d3 = (norm(conv(H)).map(F.relu) for conv, norm in (model.conv_d1[i], model.conv_d3[i]))
        g = H.with_features(H.features.mean(0, keepdim=True).expand_as(H.features))
        conv, norm = model.conv_convert[i]
        out = (norm(conv(cat(d1, d3, g))).at(coords) + rows).relu()
        outs.append(out)
        if t == 0:
            history = dict(zip(map(tuple, coords.tolist()), out, strict=True))
    return outs, history


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("scale", [1.0, 1.6, 2.5])
def test_is_the_definition(scale, training):
    clip = [frame([points(t, shift=0.3 * t, size=0.3)], torch.float64) for t in range(4)]
    ours, theirs = (memory(scale=scale).double().train(training) for _ in range(2))
    outs, states = run(ours, clip)
    cut = [bool(len(unpack(s.levels[0].keys)) > len(o[0].keys)) for s, o in zip(states, outs, strict=True)]
    assert cut == [False, True, True, True]  # there is something to choose from
    for i in range(LEVELS - training):  # one voxel of the coarsest level may be alone: no batch norm in training
        expected, history = written_out(theirs, i, clip)
        for t in range(len(clip)):
            torch.testing.assert_close(outs[t][i].features, expected[t], rtol=0, atol=1e-12)
        assert list(map(tuple, unpack(states[-1].levels[i].keys).tolist())) == sorted(history)
        kept = torch.stack([history[k] for k in sorted(history)])
        torch.testing.assert_close(states[-1].levels[i].features, kept, rtol=0, atol=1e-12)
    for i in range(LEVELS - training):
        for a, b in zip(ours.conv_convert[i].buffers(), theirs.conv_convert[i].buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- items


def two_items(T: int = 3) -> list[list[torch.Tensor]]:
    """clouds[b][t]"""
    return [[points(10 * b + t, n=100 + 50 * b, shift=0.15 * t - b) for t in range(T)] for b in range(2)]


def test_a_batch_of_two_is_two_singles():
    clouds, model = two_items(), memory()
    outs, states = run(model, [frame([a, b]) for a, b in zip(*clouds, strict=True)])
    for b in range(2):
        alone, alone_states = run(model, [frame([p]) for p in clouds[b]])
        for t, i in ((t, i) for t in range(3) for i in range(LEVELS)):
            torch.testing.assert_close(of_item(outs[t][i], b), alone[t][i].features, rtol=0, atol=1e-6)
            both, one = states[t].levels[i], alone_states[t].levels[i]
            mine = unpack(both.keys)[:, 0] == b
            assert torch.equal(unpack(both.keys)[mine][:, 1:], unpack(one.keys)[:, 1:])
            torch.testing.assert_close(both.features[mine], one.features, rtol=0, atol=1e-6)


def test_an_item_may_begin_later_or_pause():
    """The second is not there in the first frame, the first not in the third: each as it would be alone."""
    (a0, a1, _, a3), (_, b1, b2, b3) = two_items(4)
    none, model = torch.zeros(0, 3), memory()
    outs, _ = run(model, [frame(pair) for pair in ([a0, none], [a1, b1], [none, b2], [a3, b3])])
    alone = {0: run(model, [frame([p]) for p in (a0, a1, a3)])[0], 1: run(model, [frame([p]) for p in (b1, b2, b3)])[0]}
    for b, times in ((0, (0, 1, 3)), (1, (1, 2, 3))):
        for k, t in enumerate(times):
            for i in range(LEVELS):
                torch.testing.assert_close(of_item(outs[t][i], b), alone[b][k][i].features, rtol=0, atol=1e-6)


def test_an_item_does_not_see_the_other_ones_history():
    (a0, a1), (b0, b1) = two_items(2)
    model = memory()
    first, _ = run(model, [frame([a0, b0]), frame([a1, b1])])
    other, _ = run(model, [frame([a0, points(99, n=100)]), frame([a1, b1])])
    near, _ = run(model, [frame([a0, a1]), frame([a1, b1])])  # the very voxels that the first asks for
    for i in range(LEVELS):
        assert torch.equal(of_item(first[1][i], 0), of_item(other[1][i], 0))
        assert torch.equal(of_item(first[1][i], 0), of_item(near[1][i], 0))
        assert not torch.allclose(of_item(first[1][i], 1), of_item(other[1][i], 1))


def test_the_order_of_points_and_items_does_not_matter():
    clouds, model = two_items(), memory()
    outs, _ = run(model, [frame([a, b]) for a, b in zip(*clouds, strict=True)])
    swapped, _ = run(model, [frame([b.flip(0), a[torch.randperm(len(a))]]) for a, b in zip(*clouds, strict=True)])
    for t, i, b in ((t, i, b) for t in range(3) for i in range(LEVELS) for b in range(2)):
        torch.testing.assert_close(of_item(outs[t][i], b), of_item(swapped[t][i], 1 - b), rtol=0, atol=1e-5)


def test_an_item_of_one_voxel():
    model, one = memory(), torch.tensor([[5.0, 5.0, 5.0]])
    clip = [frame([points(t), one]) for t in range(3)]
    outs, states = run(model, clip)
    alone, _ = run(model, [frame([one]) for _ in range(3)])
    for t, i in ((t, i) for t in range(3) for i in range(LEVELS)):
        torch.testing.assert_close(of_item(outs[t][i], 1), alone[t][i].features, rtol=0, atol=1e-6)
    assert all(int((unpack(h.keys)[:, 0] == 1).sum()) == 1 for h in states[-1].levels)
    for out in run(model.train(), clip)[0]:
        assert all(bool(torch.isfinite(x.features).all()) for x in out)


# ---- beginning, training


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_new_memory_changes_nothing(training):
    torch.manual_seed(0)
    model = SceneMemory(CHANNELS).train(training)
    clip = [frame([a, b]) for a, b in zip(*two_items(), strict=True)]
    for levels, out in zip(clip, run(model, clip)[0], strict=True):
        for x, y in zip(levels, out, strict=True):
            assert torch.equal(x.features, y.features)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_through_three_frames(training):
    """Finite differences in double, along random directions of all inputs and weights; from the last frame alone too."""
    model = memory().double().train(training)
    clip = [frame([points(t, 60, 0.1 * t), points(t + 9, 40, 0.1 * t)], torch.float64) for t in range(3)]
    clip = [
        [x.with_features((x.features + 0.01 * torch.rand_like(x.features)).requires_grad_()) for x in f] for f in clip
    ]
    inputs = [x.features for levels in clip for x in levels]
    leaves = [*inputs, *model.parameters()]
    g = torch.Generator().manual_seed(3)
    probes = [[torch.randn(x.features.shape, generator=g, dtype=torch.float64) for x in levels] for levels in clip]

    def loss(frames: range) -> torch.Tensor:
        outs, _ = run(model, clip)
        return sum((o.features * p).sum() for t in frames for o, p in zip(outs[t], probes[t], strict=True))

    for frames in (range(3), range(2, 3)):
        grads = torch.autograd.grad(loss(frames), leaves)
        assert all(float(gradient.abs().max()) > 0 for gradient in grads[: len(inputs)])
        for _ in range(3):
            ways = [torch.randn(leaf.shape, generator=g, dtype=torch.float64) for leaf in leaves]
            slope = sum(float((a * b).sum()) for a, b in zip(grads, ways, strict=True))
            found, eps = [], 1e-7
            for sign in (1, -2):
                with torch.no_grad():
                    for leaf, way in zip(leaves, ways, strict=True):
                        leaf += sign * eps * way
                    found.append(float(loss(frames)))
            with torch.no_grad():
                for leaf, way in zip(leaves, ways, strict=True):
                    leaf += eps * way
            assert (found[0] - found[1]) / (2 * eps) == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_every_weight_learns_after_one_step():
    torch.manual_seed(0)
    model = SceneMemory(CHANNELS)
    clip = [frame([points(t, shift=0.1 * t), points(t + 5)]) for t in range(2)]
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        sum(x.features.square().sum() for out in run(model, clip)[0] for x in out).backward()
        optimiser.step()
    assert [n for n, p in model.named_parameters() if not float(p.grad.abs().max())] == []


def test_fixed_batch_norm_computes_less_and_the_same():
    """In training with batch norm held: no statistics are needed, and results are those of evaluation."""
    model, clip = memory(), [frame([p]) for p in two_items()[0]]
    expected, _ = run(model, clip)
    model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm1d):
            m.eval()
    for out, wanted in zip(run(model, clip)[0], expected, strict=True):
        assert all(torch.equal(a.features, b.features) for a, b in zip(out, wanted, strict=True))


def test_under_autocast():
    model, clip = memory().train(), [frame([a, b]) for a, b in zip(*two_items(), strict=True)]
    expected, _ = run(model, clip)
    with torch.autocast("cpu", torch.bfloat16):
        outs, states = run(model, clip)
    for out, wanted in zip(outs, expected, strict=True):
        for a, b in zip(out[:3], wanted[:3], strict=True):  # the coarsest has few voxels, batch norm magnifies
            assert float((a.features.detach().float() - b.features.detach()).abs().mean()) < 0.05
    assert states[-1].levels[0].features.dtype == torch.float32


# ---- state


def test_state_in_state_out():
    """A state is not changed by what follows; cut from its graph or moved it gives the same."""
    model, clip = memory(), [frame([p]) for p in two_items()[0]]
    _, states = run(model, clip[:2])
    before = [h.features.clone() for h in states[1].levels]
    first, after = model(clip[2], states[1])
    assert all(torch.equal(h.features, b) for h, b in zip(states[1].levels, before, strict=True))
    assert (states[1].frame, after.frame) == (2, 3)
    assert after.levels[0].features.requires_grad and not after.detach().levels[0].features.requires_grad
    again, _ = model(clip[2], states[1].detach().to("cpu"))
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again, strict=True))
    sizes = sum(len(h.keys) * (8 + 4 + 4 * C) for h, C in zip(after.levels, CHANNELS, strict=True))
    assert after.nbytes() == sizes


def test_queue_keeps_the_last_frames():
    clip = [frame([points(t, shift=0.25 * t)]) for t in range(6)]
    _, states = run(memory(queue=3), clip)
    for t, i in ((t, i) for t in range(6) for i in range(LEVELS)):
        recent = torch.cat([levels[i].keys for levels in clip[max(0, t - 1) : t + 1]]).unique()
        assert torch.equal(states[t].levels[i].keys, recent)
    _, unbounded = run(memory(), clip)
    assert unbounded[-1].nbytes() > 2 * states[-1].nbytes()


def test_a_radius_bounds_the_memory():
    clip = [frame([points(t, shift=0.25 * t), points(t, shift=-0.5 * t)]) for t in range(8)]
    _, states = run(memory(radius=10), clip)
    _, unbounded = run(memory(), clip)
    for i in range(LEVELS):
        kept, all_of_them = unpack(states[-1].levels[i].keys), unpack(unbounded[-1].levels[i].keys)
        inside = torch.zeros(len(all_of_them), dtype=torch.bool)
        for b in range(2):
            own = clip[-1][i].coords[clip[-1][i].batch == b][:, 1:]
            far = torch.maximum(own.amin(0) - all_of_them[:, 1:], all_of_them[:, 1:] - own.amax(0)).amax(1)
            inside |= (all_of_them[:, 0] == b) & (far <= 10)
        assert torch.equal(kept, all_of_them[inside])
    sizes = [s.nbytes() for s in states]
    assert max(sizes[4:]) < 1.2 * max(sizes[1:4]) and unbounded[-1].nbytes() > 2 * sizes[-1]


def test_an_item_that_pauses_is_not_forgotten_by_the_radius():
    model, none = memory(radius=10), torch.zeros(0, 3)
    _, states = run(model, [frame([points(0), points(1)]), frame([points(2), none])])
    assert all(bool((unpack(h.keys)[:, 0] == 1).any()) for h in states[-1].levels)


# ---- the network around


def test_two_levels_only():
    model, clip = memory(levels=(2, 3)), [frame([p]) for p in two_items()[0]]
    outs, states = run(model, clip)
    everywhere, _ = run(memory(), clip)
    assert {n.split(".")[1] for n, _ in model.named_parameters()} == {"2", "3"}
    for levels, out, state in zip(clip, outs, states, strict=True):
        assert out[0] is levels[0] and out[1] is levels[1] and state.levels[:2] == [None, None]
        assert not torch.equal(out[2].features, levels[2].features)
    assert states[-1].detach().to("cpu").nbytes() > 0
    model.load_state_dict({k: v for k, v in memory().state_dict().items() if k.split(".")[1] in "23"})
    for out, wanted in zip(run(model, clip)[0], everywhere, strict=True):
        assert all(torch.equal(a.features, b.features) for a, b in zip(out[2:], wanted[2:], strict=True))


def test_between_encoder_and_decoder():
    """Voxels stay the frame's own, so the decoder works; with a new memory the network is the one without."""
    torch.manual_seed(0)
    net = Res16UNet(Res16UNetConfig(stem=3, planes=(*CHANNELS, 6, 5, 4, 4), layers=(1,) * 8)).eval()
    new, model, state, fresh = SceneMemory(CHANNELS).eval(), memory(), None, None
    for t in range(3):
        xyz = points(t, shift=0.1 * t)
        x, _ = voxelise(xyz, xyz, 0.02)
        stem, *levels = net.encode(x)
        out, state = model(levels, state)
        same, fresh = new(levels, fresh)
        assert all(a.coordinates is b.coordinates and a.stride == b.stride for a, b in zip(out, levels, strict=True))
        assert torch.equal(net.decode([stem, *same]).features, net(x).features)
        assert net.decode([stem, *out]).features.shape == net(x).features.shape
        assert not torch.equal(net.decode([stem, *out]).features, net(x).features)


def test_published_size():
    assert sum(p.numel() for p in SceneMemory().parameters()) == 4_964_160


def test_errors():
    model, levels = memory(), frame([points(0)])
    with pytest.raises(ValueError, match="3 levels"):
        model(levels[:3])
    with pytest.raises(ValueError, match="level 0 has 4 channels, expected 3"):
        model(levels[1:] + levels[:1])
    _, state = memory(levels=(2, 3))(levels)
    with pytest.raises(ValueError, match="no history of level 0"):
        model(levels, state)
    for wrong in ({"queue": 1}, {"queue": 0}, {"scale": 0.5}, {"radius": -1}, {"levels": (4,)}):
        with pytest.raises(ValueError, match="expected"):
            SceneMemory(CHANNELS, **wrong)
    with pytest.raises(ValueError, match="no multiples"):
        SparseTensor(torch.zeros(len(levels[0].keys), 3), Coordinates(levels[0].keys, 4), 4)


def test_after_a_step_the_memory_is_as_quiet_in_training_as_in_use():
    """A zero kernel before a norm in training mode would be loud at once, and in training mode only."""
    torch.manual_seed(0)
    model = SceneMemory(CHANNELS).train()
    levels = frame([torch.rand(300, 3) * 0.6])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    out, _ = model(levels)
    sum(o.features.sin().sum() for o in out).backward()
    optimiser.step()
    with torch.no_grad():
        for training in (True, False):
            out, _ = model.train(training)(levels)
            for before, after in zip(levels, out, strict=True):
                assert (after.features - before.features).abs().max() < 0.05
