"""ESAM assembled: what routes and stages add changes nothing at first, items do not see each other, streams = clips."""

import dataclasses

import numpy as np
import pytest
import torch

from data.esam_views import clip_views
from data.rgbd_clips import RoomClips
from data.rooms import CLASSES
from models.bifusion import random_patch_weights
from models.esam import ESAM, ESAMConfig
from models.res16unet import Res16UNetConfig
from utils.posed_views import View
from utils.run import UserError

SMALL = {
    "backbone": Res16UNetConfig(stem=8, planes=(8, 8, 16, 16, 16, 16, 8, 8), layers=(1,) * 8),
    "voxel": 0.05, "dim": 16, "heads": 2, "ffn": 32, "merge_hidden": 16,
}  # fmt: skip


def network(route="3d", stage="sv", **settings) -> ESAM:
    torch.manual_seed(0)
    model = ESAM(ESAMConfig(classes=CLASSES, route=route, stage=stage, **{**SMALL, **settings}))
    if model.bi_encoder is not None:
        random_patch_weights(model.bi_encoder.image, 0)
    return model


@pytest.fixture(scope="module")
def clips() -> list[list[View]]:
    """Two rooms, three frames each, of different numbers of points."""
    rooms = [RoomClips(2, 0, clip_len=3, points=n, exact=True, size=(48, 64)) for n in (700, 900)]
    return [clip_views(r[(0, k)], np.random.default_rng(k), pictures=True) for k, r in enumerate(rooms)]


def answers(out) -> list[torch.Tensor]:
    parts = [t for stage in out.stages for t in (*stage.cls, *stage.masks, *(stage.boxes or []))]
    return parts + [*out.sem, *out.queries, *(out.vectors or []), *out.centres]


def difference(a, b) -> float:
    pairs = list(zip(answers(a), answers(b), strict=True))
    assert pairs and all(x.shape == y.shape for x, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs)


def started_from(old: ESAM, new: ESAM) -> ESAM:
    """`new` with the weights that both have."""
    found = new.load_state_dict(old.state_dict(), strict=False)
    assert not found.unexpected_keys and found.missing_keys
    return new


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_longer_route_begins_where_the_shorter_one_is(clips, mode):
    plain = network("3d").train(mode == "train")
    necked = started_from(plain, network("3dtsa", tsa_stages=(3, 4))).train(mode == "train")
    fused = started_from(necked, network("bif", tsa_stages=(3, 4))).train(mode == "train")
    one = [clip[:1] for clip in clips]
    with torch.no_grad():
        base, second, third = (m(one)[0] for m in (plain, necked, fused))
    assert difference(base, second) == 0 and difference(second, third) == 0
    assert set(third.figures) == {"gate_mean", "valid_ratio", "fallback_count"} and not base.figures


def test_a_fresh_memory_is_none(clips):
    single, clip = network("3dtsa"), network("3dtsa", "mv")
    clip.load_state_dict(single.state_dict(), strict=False)
    with torch.no_grad():
        outs = clip.eval()(clips)
        for t, out in enumerate(outs):
            alone = single.eval()([[c[t]] for c in clips])[0]
            assert all(torch.equal(a, b) for a, b in zip(alone.stages[-1].masks, out.stages[-1].masks, strict=True))
    assert outs[0].vectors is not None and outs[0].stages[-1].boxes is not None


def test_the_origin_of_the_world_does_not_matter(clips):
    step = torch.tensor([64 * 0.05, 0, 0])  # a whole number of voxels, at all strides
    home = torch.eye(4)
    home[:3, 3] = step
    away = [[dataclasses.replace(v, coords=v.coords + step, pose=home @ v.pose) for v in c[:1]] for c in clips]
    for route, centred in (("3d", True), ("3d", False), ("bif", True)):
        model = learned(network(route, centred=centred)).eval()
        with torch.no_grad():
            base, moved = (model([clip[:1] for clip in c])[0] for c in (clips, away))
        far = (base.stages[-1].masks[0] - moved.stages[-1].masks[0]).abs().max()
        assert far < 1e-3 if centred else far > 1e-2


def test_a_floor_at_zero_is_one_layer_of_voxels():
    xy = torch.rand(400, 2) * 2
    floor = torch.cat([xy, 1e-6 * torch.randn(400, 1)], 1)
    model = network()
    x, points = model.voxels([View(floor, torch.rand(400, 3), torch.zeros(400, dtype=torch.int64))])
    assert set(x.coords[:, 3].tolist()) == {0}
    torch.testing.assert_close(x.features[:, 3:], points.mean(floor) + 0.025)
    inside = (model.middles(x) - x.features[:, 3:]).abs()
    assert inside.max() <= 0.05 / 2 + 1e-6


def learned(model: ESAM) -> ESAM:
    """Nothing is zero any more, as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any():
                p.copy_((5 if name.startswith("memory") else 0.1) * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("route", ["3d", "3dtsa", "bif"])
def test_a_batch_of_two_is_two_singles_and_a_stream_is_a_clip(clips, route):
    model = learned(network(route, "mv", tsa_stages=(3,))).eval()
    with torch.no_grad():
        together = model(clips)
        for b, clip in enumerate(clips):
            state = None
            for t, view in enumerate(clip):
                out, state = model.step([view], state)
                for name in ("masks", "cls", "boxes"):
                    for own, both in zip(out.stages, together[t].stages, strict=True):
                        torch.testing.assert_close(getattr(own, name)[0], getattr(both, name)[b], rtol=1e-5, atol=1e-5)
    fresh = model.step([clips[0][2]])[0]
    assert (fresh.stages[-1].masks[0] - together[2].stages[-1].masks[0]).abs().max() > 1e-4  # the memory counts


def test_the_order_of_points_and_of_items_does_not_matter(clips):
    model = learned(network("bif", "mv")).eval()
    clips = [clip[:2] for clip in clips]
    orders = [[torch.randperm(len(v)) for v in clip] for clip in clips]
    rows = ("coords", "colour", "superpoint", "uv", "camera")
    mixed = [
        [dataclasses.replace(v, **{k: getattr(v, k)[o] for k in rows}) for v, o in zip(clip, order, strict=True)]
        for clip, order in zip(clips, orders, strict=True)
    ]
    with torch.no_grad():
        base, moved = model(clips)[-1], model(mixed[::-1])[-1]
    for b in range(2):
        plain, other = base.stages[-1].masks[b][:, orders[b][-1]], moved.stages[-1].masks[1 - b]
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved.vectors[1 - b], base.vectors[b], rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(clips):
    model = learned(network("bif", "mv", tsa_stages=(3, 4))).train()
    outs = model(clips)
    loss = sum(t.float().square().mean() for out in outs for t in answers(out))
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_checkpoint_comes_back_and_a_foreign_one_is_refused(tmp_path, clips):
    import json

    from safetensors.torch import save_file

    model = network("bif", "mv", tsa_stages=(4,), agnostic=True, memory_levels=(2, 3)).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config_dict()))
    again = ESAM.from_checkpoint(tmp_path).eval()
    assert again.cfg == model.cfg and again.cfg.thing_classes == ("object",)
    with torch.no_grad():
        assert difference(model(clips)[-1], again(clips)[-1]) == 0
    for change, word in (({"model": "FSGR"}, "expected an ESAM"), ({"route": "4d"}, "no configuration")):
        (tmp_path / "config.json").write_text(json.dumps({**model.config_dict(), **change}))
        with pytest.raises(UserError, match=word):
            ESAM.from_checkpoint(tmp_path)


def test_published_sizes():
    """Parameters at full width: spec of the released network (3.58 M with one class of things, 4.96 M memory)."""
    names = tuple(map(str, range(200)))
    single, clip = ESAM(ESAMConfig(names, agnostic=True)), ESAM(ESAMConfig(names, agnostic=True, stage="mv"))
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in clip.named_children() if m is not None}
    assert count["backbone"] == 37_854_112 and count["pool"] == 28_896 and count["merge_head"] == 264_448
    assert round(count["memory"] / 1e6, 2) == 4.96 and round(count["decoder"] / 1e6, 2) == 3.64
    assert round(sum(p.numel() for p in single.decoder.parameters()) / 1e6, 2) == 3.58


@pytest.mark.parametrize("wrong", [{"route": "2d"}, {"stage": "x"}, {"n_stuff": 7}, {"tsa_stages": (5,)}, {"voxel": 0}])
def test_a_configuration_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        ESAMConfig(**{"classes": CLASSES, **wrong})


def test_clips_of_different_lengths_are_refused(clips):
    with pytest.raises(ValueError, match=r"clips of \[3, 2\] views"):
        network()([clips[0], clips[1][:2]])
