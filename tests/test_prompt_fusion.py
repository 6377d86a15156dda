"""Prompts to queries: padding, mixes, gradients, coordinates; and which task a batch is for."""

import pytest
import torch
import torch.nn.functional as F

from models.prompt_fusion import TASKS, PromptBatch, PromptFusion, check_task, route, squeezed

D, E = 32, 16


def fusion() -> PromptFusion:
    torch.manual_seed(0)
    return PromptFusion(D, 4, E)


def features(B: int = 2, *frames: int) -> torch.Tensor:
    return torch.randn(B, *frames, D, 8, 12, generator=torch.Generator().manual_seed(1))  # of 32 x 48 px


def clicks(Q: int, *labels: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(Q)
    return {
        "points": 30 * torch.rand(Q, len(labels), 2, generator=generator),
        "point_labels": torch.tensor([labels]).repeat(Q, 1),
    }


def box(*xyxy: float) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor([xyxy])}


def mask(x0: int, y0: int, x1: int, y1: int) -> dict[str, torch.Tensor]:
    m = torch.zeros(1, 30, 45, dtype=torch.bool)
    m[:, y0:y1, x0:x1] = True
    return {"mask_prompts": m}


def text(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"texts": torch.randn(1, E, generator=torch.Generator().manual_seed(seed))}


def query(*parts: dict) -> torch.Tensor:
    """Of one object at which all parts point, (D,)."""
    with torch.no_grad():
        return fusion().eval()(PromptBatch.pad([{k: v for p in parts for k, v in p.items()}]), features(1))[0, 0]


MIXES = {
    "nothing": [{}, {}],
    "clicks of one image": [clicks(2, 1), {}],
    "box and text": [box(1, 2, 20, 30), text()],
    "some masks": [{"mask_prompts": torch.rand(3, 32, 48), "has_mask": torch.tensor([True, False, True])}, clicks(1, 1, 0)],
    "all": [clicks(1, 1, 0) | box(1, 2, 20, 30) | mask(3, 3, 9, 9) | text(), clicks(2, 0, -1)],
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_every_parameter_has_a_gradient_whatever_is_absent(name):
    module, prompts = fusion(), PromptBatch.pad(MIXES[name])
    q = module(prompts, features())
    assert q.shape == (*prompts.valid.shape, D) and q.isfinite().all()
    q.square().sum().backward()
    assert not [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert bool(module.text.weight.grad.any()) == (name in ("box and text", "all"))
    assert bool(module.look.weight.grad.any()) == (name != "nothing")
    assert bool(module.find.out_proj.weight.grad.any()) == (name in ("box and text", "all"))


@torch.no_grad()
@pytest.mark.parametrize("look", ["all", "masks"])
def test_what_is_seen_at_a_prompt(look):
    """A click on the object, a box and a sentence see the features there, with look "masks" nothing."""
    module, f = PromptFusion(D, 4, E, look=look).eval(), torch.zeros(1, D, 8, 12)
    here, there = f.clone(), f.clone()
    here[..., 3, 5], there[..., 6, 9] = torch.randn(2, 1, D)
    at = torch.tensor([[[22.0, 14.0]]])  # px, in cell (3, 5)
    prompts = {
        "click": {"points": at, "point_labels": torch.tensor([[1]])},
        "click beside": {"points": at, "point_labels": torch.tensor([[0]])},
        "box": box(16, 10, 27, 19),
        "text": text(),
    }
    for name, one in prompts.items():
        q, seen, elsewhere = (module(PromptBatch.pad([one]), x)[0, 0] for x in (f, here, there))
        assert (not torch.equal(q, seen)) == (look == "all" and name != "click beside"), name
        assert (not torch.equal(q, elsewhere)) == (look == "all" and name == "text"), name
    full = torch.randn(1, D, 8, 12)
    torch.testing.assert_close(module.look_in_boxes(box(4, 4, 11, 7)["boxes"][None, :, None], full)[0, 0, 0],
                               module.look(full[0, :, 1, 1:3].mean(1)))  # fmt: skip


@torch.no_grad()
def test_prompts_are_each_alone():
    """An object's query does not depend on other objects, other images, padding, or what others are pointed at with."""
    module = fusion().eval()
    objects = [clicks(1, 1) | box(1, 2, 20, 30), mask(3, 3, 9, 9), text(), clicks(1, 1, 0, 0)]
    f = features(len(objects))
    together = module(PromptBatch.pad(objects), f)[:, 0]
    for b, one in enumerate(objects):
        torch.testing.assert_close(
            module(PromptBatch.pad([one]), f[b : b + 1])[0, 0], together[b], atol=1e-5, rtol=1e-4
        )
    two = {k: torch.cat([v, v.flip(1)]) for k, v in clicks(1, 1, 0).items()}  # the order of clicks does not matter
    a, b = module(PromptBatch.pad([two]), f[:1])[0]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_each_part_of_a_mix_counts():
    parts = {"click": clicks(1, 1), "box": box(1, 2, 20, 30), "mask": mask(3, 3, 9, 9), "text": text()}
    whole = query(*parts.values())
    for left_out in parts:
        other = query(*(p for k, p in parts.items() if k != left_out))
        assert (whole - other).abs().max() > 1e-3, left_out
    beside = clicks(1, 1) | {"point_labels": torch.tensor([[0]])}
    assert (query(clicks(1, 1)) - query(beside)).abs().max() > 1e-3
    assert (query(mask(3, 3, 9, 9)) - query(mask(20, 3, 26, 9))).abs().max() > 1e-3
    torch.testing.assert_close(query(text()), query({"texts": 7 * text()["texts"]}))  # of any length


def test_coordinates_are_pixels_of_the_image():
    """The image's padding to 32 changes nothing, and a mask says where as a box around it does: with pixels."""
    m = mask(3, 3, 9, 9)
    padded = torch.zeros(1, 32, 48, dtype=torch.bool)
    padded[:, :30, :45] = m["mask_prompts"]
    torch.testing.assert_close(query(m), query({"mask_prompts": padded}))
    torch.testing.assert_close(query(m), query({"mask_prompts": m["mask_prompts"].float()}))
    module, f = fusion().eval(), features(1)
    seen = []
    module.sam.encode_points = lambda points, labels, size: seen.append(size) or torch.zeros(*labels.shape, D)
    with torch.no_grad():
        module(PromptBatch.pad([clicks(1, 1)]), f)
    assert set(seen) == {(32, 48)}
    with torch.no_grad():  # the mask's look: the features' mean under it, here one cell
        share = torch.zeros(1, 1, 1, 32, 48)
        share[..., 4:8, 8:12] = 1
        torch.testing.assert_close(module.look_tokens(share, f)[0, 0, 0], module.look(f[0, :, 1, 2]))


@torch.no_grad()
def test_a_mask_token_tells_form_and_place():
    module = fusion().eval()
    masks = torch.zeros(1, 3, 1, 64, 64)
    masks[0, 0, 0, 8:24, 8:24] = masks[0, 1, 0, 8:24, 40:56] = masks[0, 2, 0, 4:28, 8:24] = 1
    here, there, taller = module.mask_tokens(masks)[0, :, 0]
    assert (here - taller).abs().max() > 0.01
    code = module.sam.grid_code((16, 16))[:, 2:6]  # rows of the cells; columns 2..5 and 10..13
    torch.testing.assert_close(there - here, (code[..., 10:14] - code[..., 2:6]).mean((1, 2)), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("H, W", [(64, 64), (32, 96), (720, 160), (13, 21), (16, 8)])
def test_masks_are_squeezed_as_adaptive_pooling_does(H, W):
    """Sharp masks bit for bit, soft ones within 1e-6; autocast or not."""
    torch.manual_seed(0)
    soft = torch.rand(2, 1, H, W)
    for masks, tolerance in (((soft > 0.5).float(), 0), (soft, 1e-6)):
        for side in (16, 64):
            want = F.adaptive_avg_pool2d(masks, side)
            torch.testing.assert_close(squeezed(masks, side), want, rtol=0, atol=tolerance)
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(squeezed(masks, side), want, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_clip_is_prompted_on_its_first_frame():
    module, f, p = fusion().eval(), features(2, 3), PromptBatch.pad([mask(3, 3, 9, 9), clicks(1, 1)])
    torch.testing.assert_close(module(p, f), module(p, f[:, 0]))
    assert not torch.allclose(module(p, f), module(p, f[:, 1]))


@torch.no_grad()
def test_bfloat16_keeps_places():
    module, p = fusion().eval(), PromptBatch.pad([MIXES["all"][0]])
    exact = module(p, features(1))
    with torch.autocast("cpu", torch.bfloat16):
        close = module(p, features(1))
    assert (exact - close).abs().max() < 0.05 * exact.abs().max()


def test_padding():
    p = PromptBatch.pad([clicks(2, 1, 0), {**box(0, 0, 4, 4), "has_box": torch.tensor([False])}, {}])
    assert p.valid.tolist() == [[True, True], [False, False], [False, False]]
    assert p.points.shape == (3, 2, 2, 2) and p.point_labels[1:].eq(-1).all() and p.boxes.shape == (3, 2, 1, 4)
    assert PromptBatch.none(3).valid.shape == (3, 0)
    mixed = PromptBatch.pad([mask(0, 0, 4, 4), {"mask_prompts": torch.full((1, 30, 45), 0.5)}]).mask_prompts
    assert mixed.dtype == torch.float32 and mixed[1].eq(0.5).all()

    batch = {"image": torch.zeros(2, 3, 32, 48), "text": [["a"], ["b", "c"]], "labels": [0, 0]}
    p = PromptBatch.of(batch, lambda said: torch.ones(len(said), E))
    assert p.has_text[..., 0].tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match="nothing embeds them"):
        PromptBatch.of(batch)


def test_wrong_prompts_are_named():
    with pytest.raises(ValueError, match="expected one length"):
        PromptBatch.pad([clicks(2, 1) | box(0, 0, 4, 4)])
    for lonely in ({"points": torch.zeros(1, 1, 2)}, {"point_labels": torch.zeros(1, 1)}, {"has_box": torch.ones(1)}):
        with pytest.raises(ValueError, match="values with marks"):
            PromptBatch.pad([lonely])
    with pytest.raises(ValueError, match="prompts of 2 images, features of 1"):
        fusion()(PromptBatch.none(2), features(1))
    with pytest.raises(ValueError, match="masks of .33, 48. px, larger than the image, 32 x 48"):
        fusion()(PromptBatch.pad([{"mask_prompts": torch.zeros(1, 33, 48)}]), features(1))
    with pytest.raises(ValueError, match="texts of width 5, expected .* 16"):
        fusion()(PromptBatch.pad([{"texts": torch.zeros(1, 5)}]), features(1))


# ---- tasks


def batch_of(frames: int = 0, **more) -> dict:
    return {"image": torch.zeros(1, *[frames] * (frames > 0), 3, 4, 4), **more}


POINTED, SAID = {"points": [], "point_labels": []}, {"text": [["the cat"]]}


@pytest.mark.parametrize("batch, task", [
    (batch_of(task="semantic"), "semantic"), (batch_of(2, task="vis"), "vis"),
    (batch_of(task="referring", **SAID, **POINTED), "referring"), (batch_of(task="interactive", **SAID), "interactive"),
    (batch_of(), "panoptic"), (batch_of(2), "vps"), (batch_of(**POINTED), "interactive"),
    (batch_of(2, **POINTED), "vos"), (batch_of(**SAID), "referring"), (batch_of(**SAID, **POINTED), "interactive"),
])  # fmt: skip
def test_the_field_decides_and_else_the_content(batch, task):
    assert route(batch) == task


@pytest.mark.parametrize("batch, said", [
    (batch_of(task="panoptics"), "expected one of panoptic, instance"),
    (batch_of(2, task="panoptic"), "about images, but the input is a clip"),
    (batch_of(task="vos", **POINTED), "about clips, but the input is an image"),
    (batch_of(task="panoptic", **POINTED), "takes no prompts, but there are some"),
    (batch_of(task="interactive"), "needs prompts, but there are none"),
    (batch_of(task="referring", **POINTED), "needs text"),
    (batch_of(2, **SAID), "about images, but the input is a clip"),
])  # fmt: skip
def test_contradictions_are_errors(batch, said):
    with pytest.raises(ValueError, match=said):
        route(batch)


def test_every_task_has_its_input():
    for task in TASKS:
        fits = [(clip, p) for clip in (False, True) for p in (False, True) if not refused(task, clip, p)]
        assert len(fits) == 1, task


def refused(task: str, clip: bool, prompts: bool) -> bool:
    try:
        check_task(task, clip, prompts)
    except ValueError:
        return True
    return False
