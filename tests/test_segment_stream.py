"""The stream: step by step as offline, objects added, corrected and removed at any frame without effect on others,
given masks, fixed size, features once per frame, slots of vis and vps, refusals."""

import functools

import numpy as np
import pytest
import torch

from data.segment_batch import View, draw_window, show_image, show_map
from models.fastsam2 import FastSAM2, FastSAM2Config, hash_texts
from models.panoptic_post import panoptic, to_original
from models.prompt_fusion import PromptBatch
from models.segment_slots import Slots
from models.segment_stream import BLOCK, Stream, grid_logits
from models.streaming_memory import MemoryConfig
from utils.run import UserError
from utils.segment_inputs import fit, pack, resized, resized_map

H, W = 40, 56
MEMORY = {"dim": 16, "heads": 2, "hidden": 24, "layers": 1, "kept": 2, "recent": 3, "map_dim": 8}
KINDS = pytest.mark.parametrize("maps", [0, 1], ids=["tokens", "maps"])


@functools.cache
def network(maps: int | None = 0, seed: int = 0) -> FastSAM2:
    """Small, with a memory of weights that are nowhere 0, whose masks have something inside. maps None: no memory."""
    torch.manual_seed(seed)
    cfg = FastSAM2Config(classes=["cat", "sky", "dog"], is_thing=[True, False, True], backbone="resnet18", queries=6,
                         stages=1, dim=16, heads=2, hidden=24, embed_dim=12, text="hash",
                         memory=None if maps is None else MemoryConfig(**MEMORY, maps=maps))  # fmt: skip
    model = FastSAM2(cfg).eval()
    if maps is not None:
        with torch.no_grad():
            for p in model.memory.parameters():
                p.add_(0.2 * torch.randn_like(p))
            model.memory.presence_out.weight.mul_(0.1)
            model.memory.presence_out.bias.fill_(3.0)

    def centred(*args, **settings):
        out = FastSAM2.decode(model, *args, **settings)
        return out | {"masks": [m - m.mean((-2, -1), keepdim=True) for m in out["masks"]]}

    model.decode = centred
    return model


def film(T: int, seed: int = 0) -> np.ndarray:
    """A square that moves over noise: (T, H, W, 3) uint8."""
    frames = np.random.default_rng(seed).integers(0, 90, (T, H, W, 3), dtype=np.uint8)
    for t in range(T):
        frames[t, 10:24, 4 + t % 30 : 18 + t % 30] = (220, 160, 40)
    return frames


def square(t: int = 0) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[10:24, 4 + t : 18 + t] = True
    return mask


def stream(maps: int | None = 0, **settings) -> Stream:
    return Stream(network(maps), **{"embed": functools.partial(hash_texts, width=12), **settings})


def same(a, b) -> None:
    """Bit for bit."""
    assert np.array_equal(a.mask, b.mask) and (a.score, a.present, a.label) == (b.score, b.present, b.label)
    assert (a.logits is None) == (b.logits is None) and (a.logits is None or torch.equal(a.logits, b.logits))


PROMPTS = [{"points": [[8, 14, 1], [40, 30, 0]]}, {"box": [4, 10, 17, 23]}, {"text": "a red square"},
           {"points": [[30, 20, 1]], "box": [20, 5, 50, 35]}, {"box": [0, 0, 55, 39], "text": "all"}]  # fmt: skip


# ---- as offline


@KINDS
@torch.no_grad()
@pytest.mark.parametrize("image_size", [None, (64, 64)])
def test_step_by_step_is_offline(maps, image_size):
    """Against FastSAM2.follow of the whole clip, objects entering at frames 0, 0, 2, 3: logits within 1e-5 of the
    largest, presence the same."""
    T, model, frames = 6, network(maps), film(6)
    first = torch.tensor([[0, 0, 2, 3]])
    s = stream(maps, image_size=image_size, logits=True)
    steps = []
    for t in range(T):
        for k in (first[0] == t).nonzero()[:, 0].tolist():
            s.add(k, **PROMPTS[k])
        steps.append(s.step(frames[t]))
    size = s.size
    clip = torch.from_numpy(np.stack([resized(f, size.resized) for f in frames])).permute(0, 3, 1, 2)[None]
    packed = [pack([x], {}, (H, W), size.resized, s.embed) for x in PROMPTS[:4]]
    features = model.encode(clip)
    queries = torch.stack(
        [model.queries(PromptBatch.pad([p]), features[:, t])[0, 0] for p, t in zip(packed, first[0], strict=True)]
    )
    offline = model.memory.follow(features, functools.partial(model.decode, objects=False), queries[None], first)
    for t, found in enumerate(offline):
        want = to_original(found.masks[0], size)
        assert [*steps[t]] == (first[0] <= t).nonzero()[:, 0].tolist()
        for k, x in steps[t].items():
            torch.testing.assert_close(x.logits, want[k], atol=1e-5 * want.abs().max().item(), rtol=0)
            assert x.present == bool(found.present[0, k]) and x.present
            assert abs(x.score - found.out["iou"][-1][0, k, 0].item()) < 1e-5
            assert np.array_equal(x.mask, (x.logits > 0).numpy())


@torch.no_grad()
def test_without_memory_it_is_the_first_prompts_query_on_every_frame():
    model, frames, s = network(None), film(3), stream(None, memory=False, logits=True)
    s.add(1, **PROMPTS[0])
    query = None
    for frame in frames:
        [x] = s.step(frame).values()
        features = model.encode(torch.from_numpy(frame).permute(2, 0, 1)[None])
        if query is None:
            query = model.queries(PromptBatch.pad([pack([PROMPTS[0]], {}, (H, W), (H, W), None)]), features)
        want = to_original(model.decode(features, query, objects=False)["masks"][-1][0], s.size)[0]
        torch.testing.assert_close(x.logits, want, atol=1e-5 * want.abs().max().item(), rtol=0)
    assert not hasattr(s.memory, "state_dict") and s.state_bytes > 0


# ---- objects


@KINDS
def test_other_objects_change_no_bit(maps):
    """Object a alone, and with more than a block of others, added before and after steps, corrected, removed."""
    frames = film(8)
    alone, crowd = stream(maps, logits=True), stream(maps, logits=True)
    for s in (alone, crowd):
        s.add("a", **PROMPTS[0])
    for t, frame in enumerate(frames):
        if t == 0:
            crowd.add("b", **PROMPTS[1])
        if t == 2:
            for k in range(BLOCK + 2):
                crowd.add(k, **PROMPTS[k % 5])
        if t == 5:
            for k in ("b", *range(BLOCK)):
                crowd.remove(k)
        a, b = alone.step(frame), crowd.step(frame)
        same(a["a"], b["a"])
        if t == 3:
            crowd.correct("b", points=[[50, 30, 0]])
            crowd.add("late", text="a square", now=True)
            same(crowd.found["a"], a["a"])
        if t == 4:
            c, d = (s.correct("a", points=[[9, 15, 1]]) for s in (alone, crowd))
            same(c, d)
        assert len(crowd.objects) == [2, 2, 12, 13, 13, 4, 4, 4][t] and len(alone.blocks) == 1
    assert len(crowd.blocks) == 2 and set(b) == {"a", 8, 9, "late"}


@KINDS
def test_a_place_that_is_free_again_is_as_new(maps):
    """Also when it is taken in the frame in which it was given up."""
    frames, fresh, used = film(5), stream(maps, logits=True), stream(maps, logits=True)
    for t, frame in enumerate(frames[:3]):
        if t == 0:
            used.add("old", **PROMPTS[1])
            used.add("other", **PROMPTS[2])
        used.step(frame)
    used.remove("old")
    fresh.step(frames[2])
    for s in (fresh, used):
        s.add("new", **PROMPTS[3], now=True)
    assert used.blocks[0].ids[:2] == ["new", "other"]
    same(fresh.found["new"], used.found["new"])
    for frame in frames[3:]:
        same(fresh.step(frame)["new"], used.step(frame)["new"])


@KINDS
def test_an_object_added_later_is_as_in_a_stream_that_begins_there(maps):
    """Before the step, or after it with now: the same."""
    frames = film(6)
    late, now, fresh = stream(maps, logits=True), stream(maps, logits=True), stream(maps, logits=True)
    for s in (late, now):
        s.add("other", **PROMPTS[1])
    for t, frame in enumerate(frames):
        if t == 3:
            late.add("new", **PROMPTS[3])
            fresh.add("new", **PROMPTS[3])
        a, b = late.step(frame), now.step(frame)
        assert ("new" in a) == (t >= 3) and "new" not in b or t > 3
        if t == 3:
            b = b | {"new": now.add("new", **PROMPTS[3], now=True)}
        if t >= 3:
            c = fresh.step(frame)
            same(a["new"], c["new"])
            same(b["new"], c["new"])


def test_a_correction_is_as_if_asked_so_at_once():
    frames = film(4)
    clicks = [[8, 14, 1], [30, 30, 0]]
    corrected, at_once = stream(logits=True), stream(logits=True)
    corrected.add(1, points=clicks[:1])
    at_once.add(1, points=clicks)
    corrected.step(frames[0])
    first = at_once.step(frames[0])[1]
    same(corrected.correct(1, points=clicks[1:]), first)
    for frame in frames[1:]:
        same(corrected.step(frame)[1], at_once.step(frame)[1])
    changed = corrected.correct(1, box=[20, 20, 50, 35])
    assert not torch.equal(changed.logits, at_once.found[1].logits)
    same(corrected.found[1], changed)


def test_a_click_beside_it_alone_is_read_with_the_mask_found():
    s, frames = stream(logits=True), film(3)
    s.add(1, mask=square())
    s.step(frames[0])
    found = s.step(frames[1])[1].mask
    if not found.any():
        found = s.correct(1, mask=square(1)).mask
    x = s.correct(1, points=[[10, 12, 0]])
    assert np.array_equal(s.asked[1]["mask"], found) and s.asked[1]["points"] == [[10, 12, 0]]
    assert x.logits.abs().max() != 10 and x.present  # decoded, not the mask itself


@KINDS
def test_a_given_mask_is_the_result_and_what_is_remembered(maps):
    frames, s, t = film(3), stream(maps, image_size=(80, 80)), stream(maps, image_size=(80, 80))
    s.add(7, mask=square())
    t.add(7, mask=square(), points=[[8, 14, 1]])
    x, y = s.step(frames[0])[7], t.step(frames[0])[7]
    assert np.array_equal(x.mask, square()) and x.present and not np.array_equal(y.mask, x.mask)
    values = s.blocks[0].state.tokens.values[0, 0, 0]
    want = s.memory.entry(s._features(), grid_logits(resized_map(square(), (57, 80)), s.size)[None, None],
                          torch.zeros(1, 1, 16))[0, 0]  # fmt: skip
    torch.testing.assert_close(values[1], want[1], atol=1e-5, rtol=1e-5)  # the token of what is seen under the mask
    again = s.correct(7, mask=square(5))
    assert np.array_equal(again.mask, square(5)) and np.array_equal(s.found[7].mask, square(5))
    s.step(frames[1])
    assert s.asked == {} and s.blocks[0].state.tokens.age[0, 0, 0] == 1


def test_a_mask_on_the_grid():
    s = stream()
    s.step(film(1)[0])
    tiny = np.zeros((H, W), bool)
    tiny[9, 13] = True
    grid = grid_logits(tiny, s.size)
    assert grid.shape == (16, 16) and (grid > 0).nonzero().tolist() == [[2, 3]]
    assert (grid_logits(np.ones((H, W), bool), s.size) > 0).sum() == 10 * 14


def test_without_overlap_a_pixel_belongs_to_the_highest_logit():
    frames, both = film(3), [stream(overlap=o, logits=True) for o in (True, False)]
    for s in both:
        for k, x in enumerate(PROMPTS):
            s.add(k, **x)
    for frame in frames:
        a, b = (s.step(frame) for s in both)
        logits = torch.stack([x.logits for x in a.values()])
        want = torch.where(logits.amax(0) > 0, logits.argmax(0), -1).numpy()
        for k in a:
            assert np.array_equal(b[k].mask, want == k) and torch.equal(a[k].logits, b[k].logits)
    assert sum(x.mask.sum() for x in a.values()) > sum(x.mask.sum() for x in b.values()) > 0


# ---- size and cost


@KINDS
def test_nothing_grows_over_100_frames(maps):
    frames, s, sizes = film(20)[:, :32, :32], stream(maps), set()
    s.add(0, points=[[8, 14, 1]])
    for t in range(100):
        if t % 10 == 5:
            s.add(t % 3, points=[[t % 32, 14, 1]])
        s.step(frames[t % 20])
        if t >= 30:
            sizes.add((s.state_bytes, len(s.blocks), len(s.last), len(s.asked) <= 1, len(s.waiting)))
    assert len(sizes) == 1 and s.frames == 100
    s.reset()
    assert (s.state_bytes, s.objects, s.frames, s.found) == (0, [], 0, {})
    s.step(np.zeros((20, 24, 3), np.uint8))  # another size
    s.add("x", points=[[1, 1, 1]], now=True)


def test_features_are_computed_once_and_only_for_somebody(monkeypatch):
    s, calls = stream(), []
    encode = s.model.encode
    monkeypatch.setattr(s.model, "encode", lambda x: calls.append(1) or encode(x))
    frames = film(3)
    assert s.step(frames[0]) == {} and not calls
    s.add(0, **PROMPTS[0], now=True)
    for k in range(1, BLOCK + 3):
        s.add(k, **PROMPTS[k % 5], now=True)
    s.correct(0, **PROMPTS[1])
    assert len(calls) == 1
    assert len(s.step(frames[1])) == BLOCK + 3 and len(calls) == 2


@pytest.mark.parametrize("limit", [(48, 64), (480, 640), (33, 200), (40, 56)])
def test_frames_are_shown_as_pictures_are(limit):
    rng = np.random.default_rng(0)
    for H, W in ((40, 56), (37, 91), (480, 854), (64, 31)):
        window = draw_window(View(*limit), H, W, rng)
        image, mask = rng.integers(0, 255, (H, W, 3), dtype=np.uint8), rng.random((H, W)) > 0.5
        size = fit((H, W), limit)
        assert size == (window.h, window.w)
        assert np.array_equal(resized(image, size), show_image(image, window))
        assert np.array_equal(resized_map(mask, size), show_map(mask, window))


# ---- slots


def test_slots_follow_their_kernels_and_count_with_hysteresis():
    """Two objects and background as orthogonal kernels; queries come in another order every frame."""
    slots = Slots(torch.tensor([True, False]), birth=0.5, death=0.25, patience=1)
    kernels, g = torch.eye(4)[:3] * 5, torch.Generator().manual_seed(0)
    scores = {  # of class 0 for kernel 0, 1, 2; the rest is no object
        0: (0.9, 0.4, 0.0), 1: (0.9, 0.55, 0.0), 2: (0.1, 0.3, 0.0), 3: (0.0, 0.3, 0.0), 4: (0.0, 0.0, 0.0),
        5: (0.0, 0.0, 0.0), 6: (0.9, 0.0, 0.0), 7: (0.0, 0.9, 0.0), 8: (0.0, 0.9, 0.9),
    }  # fmt: skip
    seen = []
    for row in scores.values():
        shuffle = torch.randperm(3, generator=g)
        p = torch.tensor(row)
        logits = torch.stack([p, torch.zeros(3), 1 - p], 1).clamp_min(1e-9).log()
        before = None if slots.kernels is None else slots.kernels.clone()
        order = slots.step((kernels + 0.1 * torch.randn(3, 4, generator=g))[shuffle], logits[shuffle])
        back = shuffle[order]  # the kernel that each slot goes on with
        if before is not None:  # what waits for its object stays as it was, the rest moves on
            waits = (slots.ids > 0) & ~slots.alive
            assert torch.equal((slots.kernels == before).all(1), waits)
        seen.append({int(back[i]): int(slots.ids[i]) for i in slots.alive.nonzero()[:, 0]})
    # 0 is born; 1 as soon as it reaches 0.5; both last while their means do; 0 goes (0.66, 0.46, 0.32, 0.23)
    assert [x.get(0) for x in seen[:6]] == [1, 1, 1, 1, 1, None]
    assert [x.get(1) for x in seen[:7]] == [None, 2, 2, 2, 2, None, None]
    assert seen[6] == {0: 1}  # back in time: the same
    assert seen[7][1] == 3 and seen[8][2] == 4  # too late: another; ids are never given twice
    assert slots.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("task", ["vis", "vps"])
def test_frame_by_frame_objects(task):
    frames = film(5)
    s = Stream(network(None), task, birth=0.3, death=0.1, logits=task == "vis")
    seen = [s.step(f) for f in frames]
    assert any(seen) and s.objects == []
    labels = {}
    for found in seen:
        for i, x in found.items():
            assert x.mask.shape == (H, W) and x.mask.any() and 0 <= x.score <= 1 and x.present
            assert labels.setdefault(i, x.label) == x.label or task == "vis"
            assert task == "vps" or network(None).cfg.is_thing[x.label]
        if task == "vps":
            assert sum((x.mask.astype(int) for x in found.values()), np.zeros((H, W), int)).max() <= 1
            assert all((i <= 3) == (not network(None).cfg.is_thing[x.label]) for i, x in found.items())
            assert all(i == x.label + 1 for i, x in found.items() if i <= 3)
    again = Stream(network(None), task, birth=0.3, death=0.1, logits=task == "vis")
    for f, found in zip(frames, seen, strict=True):
        other = again.step(f)
        assert other.keys() == found.keys()
        for i in found:
            same(other[i], found[i])


def test_one_frame_of_vps_is_the_picture():
    """Thresholds alike, nothing before: the panoptic map of the picture."""
    model, [frame] = network(None), film(1)
    s = Stream(model, "vps", birth=0.5, death=0.5)
    found = s.step(frame)
    with torch.no_grad():
        out = model(torch.from_numpy(frame).permute(2, 0, 1)[None])
    want = panoptic(out["classes"][-1][0], out["masks"][-1][0], model.is_thing, s.size, threshold=0.5)
    ids = np.zeros((H, W), int)
    for i, x in found.items():
        ids[x.mask] = i
    assert ((want["map"].numpy() != 3) == (ids > 0)).all()
    label = np.where(want["map"].numpy() < 3, want["map"].numpy(), want["map"].numpy() % 1000)
    assert all((label[x.mask] == x.label).all() for x in found.values()) and found


# ---- types, refusals


def test_bfloat16_is_near():
    frames = film(3)
    exact, rough = stream(logits=True), stream(logits=True, dtype=torch.bfloat16)
    for s in (exact, rough):
        s.add(0, **PROMPTS[0])
    for frame in frames:
        a, b = exact.step(frame)[0].logits, rough.step(frame)[0].logits
        assert b.dtype == torch.float32 and (a - b).abs().max() < 0.1 * a.abs().max()


def test_refusals_leave_the_stream_as_it_was():
    frames, s = film(3), stream()
    s.add(0, **PROMPTS[0])
    s.step(frames[0])
    for prompt, said in (({"points": [[56, 3, 1]]}, "outside the picture"), ({"box": [5, 5, 3, 9]}, "ends before"),
                         ({"mask": np.ones((H, W + 1), bool)}, r"57x40 px; expected 56x40"),
                         ({"mask": np.zeros((H, W), bool)}, "all 0")):  # fmt: skip
        for call in (s.add, s.correct, functools.partial(s.add, now=True)):
            with pytest.raises(UserError, match=said):
                call(0, **prompt)
    with pytest.raises(UserError, match=r"frame 1: is 56x41 px \(W x H\), those before it are 56x40"):
        s.step(np.zeros((41, 56, 3), np.uint8))
    assert s.frames == 1 and s.objects == [0] and len(s.step(frames[1])) == 1
    fresh = stream()
    fresh.add(0, mask=np.ones((9, 9), bool))
    with pytest.raises(UserError, match="9x9 px; expected 56x40"):
        fresh.step(frames[0])
    assert fresh.frames == 0
    fresh.remove(0)
    assert fresh.step(frames[0]) == {}


def test_wrong_use_is_told():
    with pytest.raises(UserError, match="has no memory"):
        Stream(network(None))
    with pytest.raises(ValueError, match="task 'panoptic'"):
        Stream(network(), "panoptic")
    s = stream(embed=None)
    for call, said in ((lambda: s.add(1), "expected task vos"), (lambda: s.add(1, text="x"), "embed for texts"),
                       (lambda: s.remove(3), "3 is not followed"), (lambda: s.correct(3, box=[0, 0, 1, 1]), "followed"),
                       (lambda: s.add(1, box=[0, 0, 1, 1], now=True), "no frame has been seen"),
                       (lambda: s.step(np.zeros((4, 4), np.uint8)), "expected uint8"),
                       (lambda: Stream(network(), "vis").add(1, box=[0, 0, 1, 1]), "expected task vos")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()
