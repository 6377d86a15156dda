"""The criterion: what is matched, what is counted once, what is left out, and that nothing of it is ever NaN."""

import pytest
import torch

from models.fastsam2 import FastSAM2, FastSAM2Config
from models.mask_losses import mask_losses
from models.prompt_fusion import PromptBatch
from models.segment_losses import count_masks, iou_at, prompt_losses, segment_losses, untouched
from models.segment_training import batch_losses
from models.streaming_memory import MemoryConfig

K, H, W = 3, 32, 64
SMALL = {"classes": ["cat", "sky", "car"], "queries": 6, "dim": 32, "heads": 4, "hidden": 48, "embed_dim": 16}


def squares(*corners: int, frames: int = 0) -> torch.Tensor:
    """One mask of 8 x 8 px for each corner (x = y), (Q, [T], H, W)."""
    masks = torch.zeros(len(corners), H, W, dtype=torch.bool)
    for m, c in zip(masks, corners, strict=True):
        m[c : c + 8, c : c + 8] = True
    return masks[:, None].expand(-1, frames, -1, -1).clone() if frames else masks


def batch_of(task: str, masks: list[torch.Tensor], labels: list[list[int]] | None = None) -> dict:
    labels = labels or [list(range(len(m))) for m in masks]
    ignore = torch.zeros(len(masks), *squares(frames=masks[0].ndim - 3 and masks[0].shape[1]).shape[1:]).bool()
    return {
        "task": task,
        "masks": masks,
        "labels": [torch.tensor(x, dtype=torch.long) for x in labels],
        "ignore": ignore,
    }


def perfect(masks: list[torch.Tensor], labels: list[list[int]], Q: int, stages: int = 2) -> dict:
    """What a network would say that knew everything: target m by query Q - 1 - m."""
    B = len(masks)
    classes = torch.full((B, Q, K + 1), -30.0)
    classes[..., K] = 30
    found = torch.full((B, Q, *masks[0].shape[1:-2], H // 4, W // 4), -30.0)
    for b, (target, label) in enumerate(zip(masks, labels, strict=True)):
        for m, (one, c) in enumerate(zip(target, label, strict=True)):
            found[b, Q - 1 - m] = 60 * one[..., ::4, ::4].float() - 30
            classes[b, Q - 1 - m, [c, K]] = torch.tensor([30.0, -30.0])
    iou = torch.ones(B, Q, 1)
    out = {"classes": classes, "masks": found, "iou": iou}
    return {k: [v.clone().requires_grad_() for _ in range(stages)] for k, v in out.items()}


def prompts_of(masks: list[torch.Tensor]) -> PromptBatch:
    rows = [{"points": torch.rand(len(m), 1, 2) * 30, "point_labels": torch.ones(len(m), 1).long()} for m in masks]
    return PromptBatch.pad(rows)


def network() -> FastSAM2:
    torch.manual_seed(0)
    return FastSAM2(FastSAM2Config(**SMALL, backbone="resnet18")).train()


@pytest.mark.parametrize("frames", [0, 2])
def test_what_is_right_costs_nothing_and_what_is_wrong_does(frames):
    masks, labels = [squares(0, 16, frames=frames), squares(8, frames=frames)], [[2, 0], [1]]
    batch, out = batch_of("panoptic", masks, labels), perfect(masks, labels, 5)
    right = segment_losses(out, batch)
    assert right["class"] < 1e-6 and right["mask"] < 5 and right["dice"] < 5  # the rims: masks are at a quarter
    assert set(right) == {"loss", "class", "mask", "dice"}
    torch.testing.assert_close(right["loss"], right["class"] + right["mask"] + right["dice"])
    wrong = segment_losses(out, batch_of("panoptic", masks, [[2, 1], [1]]))
    assert wrong["class"] > 10 and abs(wrong["dice"] - right["dice"]) < 0.5
    moved = segment_losses(out, batch_of("panoptic", [m.flip(-1) for m in masks], labels))
    assert moved["mask"] > 4 * right["mask"] and moved["dice"] > right["dice"] + 4


@pytest.mark.parametrize("frames", [0, 2])
def test_pixels_learn_the_class_that_covers_them(frames):
    masks, labels = [squares(0, 8, frames=frames), squares(frames=frames)], [[1, -1], []]
    batch, out = batch_of("panoptic", masks, labels), perfect(masks, labels, 4)
    plain = segment_losses(out, batch, generator=torch.Generator().manual_seed(0))
    shape = (max(1, frames), H // 4, W // 4)
    right = torch.zeros(2, K, *shape)
    right[0, 1, :, :2, :2] = 30  # the square at 0; that of no known class may say anything
    right[0, 2, :, 2:4, 2:4] = 30
    found = {}
    for name, logits in (("right", right), ("wrong", -right)):
        out["pixels"] = logits.flatten(2).requires_grad_()
        losses = segment_losses(out, batch, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(losses["loss"], plain["loss"] + losses["pixels"])
        found[name] = losses["pixels"].item()
        losses["loss"].backward()
        assert out["pixels"].grad.isfinite().all()
    assert "pixels" not in plain and found["right"] < 1e-6
    assert found["wrong"] == pytest.approx(15, abs=1), "30 of one of two pictures"


def test_the_order_of_targets_and_of_queries_does_not_matter():
    masks, labels = [squares(0, 8, 16), squares(4)], [[2, 0, 1], [1]]
    torch.manual_seed(0)
    out = {k: [v + torch.randn_like(v) for v in values] for k, values in perfect(masks, labels, 5).items()}
    shuffled = {k: [v[:, [3, 0, 4, 2, 1]] for v in values] for k, values in out.items()}
    turned = batch_of("instance", [m.flip(0) for m in masks], [x[::-1] for x in labels])
    first = segment_losses(out, batch_of("instance", masks, labels), points=50_000)
    for other in (segment_losses(shuffled, batch_of("instance", masks, labels), points=50_000),
                  segment_losses(out, turned, points=50_000)):  # fmt: skip
        torch.testing.assert_close(other["class"], first["class"])
        torch.testing.assert_close(other["loss"], first["loss"], rtol=0.02, atol=0)


def test_unknown_classes_teach_masks_only():
    masks = [squares(0, 16)]
    out = perfect(masks, [[2, 0]], 5)
    segment_losses(out, batch_of("instance", masks, [[-1, -1]]))["loss"].backward()
    assert not out["classes"][0].grad[0, 3:].any() and out["classes"][0].grad[0, :3].any()
    assert out["masks"][0].grad[0, 3:].any() and not out["masks"][0].grad[0, :3].any()


@pytest.mark.parametrize("task", ["panoptic", "interactive"])
def test_ignored_pixels_are_neither_object_nor_background(task):
    masks = [squares(0)]
    batch, out = batch_of(task, masks), perfect(masks, [[0]], 1)
    with torch.no_grad():
        for m in out["masks"]:
            m[..., 8:] = 30  # also claims the right half
    claimed = segment_losses(out, batch)
    batch["ignore"][..., 28:] = True
    assert claimed["mask"] > 20 and segment_losses(out, batch)["mask"] < 5
    if task == "interactive":
        assert claimed["iou"] > 10 and segment_losses(out, batch)["iou"] < 5


def test_prompts_are_not_matched():
    masks = [squares(0, 16), squares(8)]
    out = perfect(masks, [[0, 0], [0]], 2)  # query 1 - m knows target m
    right = {"masks": [m.flip(0) for m in masks][:1] + [masks[1]], "ignore": torch.zeros(2, H, W).bool()}
    with torch.no_grad():
        for m in out["masks"]:
            m[1, 0] = m[1, 1]
    good, bad = prompt_losses(out, **right), prompt_losses(out, **{**right, "masks": masks})
    assert bad["mask"] > 10 * good["mask"]
    assert good["iou"] < 5
    wrong = 10 * 2 * 2 / 3  # weight, stages; the heads say 1, but two of three masks reach 0
    assert bad["iou"].item() == pytest.approx(wrong + good["iou"].item() / 3, abs=0.5)
    padding = torch.autograd.grad(good["mask"] + good["iou"], [out["masks"][0], out["iou"][0]])
    assert not padding[0][1, 1].any() and not padding[1][1, 1].any() and padding[1][0].any()
    with pytest.raises(ValueError, match="3 targets of one image, but 2 prompts"):
        prompt_losses(out, [squares(0, 8, 16), squares(8)], right["ignore"])


def test_quality_is_the_iou_at_image_size():
    target = squares(8)
    found = torch.full((1, H // 4, W // 4), -9.0)
    found[0, 2:4, 2:5] = 9  # 8 x 12 px around 8 x 8
    nothing = torch.zeros(H, W, dtype=torch.bool)
    assert iou_at(found, target, nothing).item() == pytest.approx(64 / 96, abs=0.03)
    nothing[:, 16:] = True
    assert iou_at(found, target, nothing).item() > 0.95
    assert iou_at(found[:0], target[:0], nothing).shape == (0,)


@pytest.mark.parametrize("task", ["panoptic", "interactive"])
def test_two_ranks_make_one(task):
    """Losses divided by the mean number of targets, averaged over ranks, are those of all images together."""
    masks, labels = [squares(0, 8, 16), squares(4)], [[2, 0, 1], [1]]
    torch.manual_seed(0)
    out = {k: [v.detach() + torch.randn_like(v) for v in vs] for k, vs in perfect(masks, labels, 5).items()}
    whole = batch_of(task, masks, labels)
    n, settings = count_masks(whole) / 2, {"points": 100_000}
    halves = [
        segment_losses({k: [v[b : b + 1] for v in vs] for k, vs in out.items()},
                       batch_of(task, masks[b : b + 1], labels[b : b + 1]), n, **settings) for b in (0, 1)
    ]  # fmt: skip
    together = segment_losses(out, whole, **settings)
    for name in ("mask", "dice"):
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, together[name], rtol=0.02, atol=0)
    if task == "interactive":
        torch.testing.assert_close((halves[0]["iou"] + halves[1]["iou"]) / 2, together["iou"])


@pytest.mark.parametrize("task", ["panoptic", "semantic", "interactive", "referring"])
@pytest.mark.parametrize("corners", [[(0, 16), ()], [(), ()], [(0,), (8, 16)]])
def test_no_parameter_without_gradient_and_nothing_is_nan(task, corners):
    model, masks = network(), [squares(*c) for c in corners]
    prompts = prompts_of(masks) if task in ("interactive", "referring") else None
    with torch.autocast("cpu", torch.bfloat16):
        losses = segment_losses(model(torch.rand(2, 3, H, W), prompts, task=task), batch_of(task, masks), points=64)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    losses["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    moved = any(p.grad.any() for p in model.prompt_fusion.parameters())
    assert moved == (prompts is not None and any(map(len, corners)))


def test_what_no_loss_uses_keeps_a_gradient_of_0():
    values = {"classes": [torch.full((1, 2), torch.inf, requires_grad=True)], "masks": [], "iou": []}
    zero = untouched(values)
    zero.backward()
    assert zero.item() == 0 and not values["classes"][0].grad.any()


def test_an_image_smaller_than_what_the_network_saw():
    """30 x 60 px are padded to 32 x 64: targets grow with them; larger ones are refused."""
    masks = [squares(0, 16)]
    batch, out = batch_of("panoptic", masks), perfect(masks, [[0, 1]], 4)
    cut = {**batch, "masks": [masks[0][..., :30, :60]], "ignore": batch["ignore"][..., :30, :60]}
    torch.manual_seed(0)
    whole = segment_losses(out, batch)
    torch.manual_seed(0)
    torch.testing.assert_close(segment_losses(out, cut), whole)
    with pytest.raises(ValueError, match="targets of .32, 80. px, masks of .8, 16."):
        segment_losses(out, {**batch, "masks": [torch.zeros(1, 32, 80, dtype=torch.bool)]})


def test_mask_losses_at_ignored_points():
    masks, target = torch.full((2, 8, 8), 5.0), torch.zeros(2, 8, 8, dtype=torch.bool)
    ignore = torch.ones(8, 8, dtype=torch.bool)
    bce, _ = mask_losses(masks, target, ignore=ignore)
    assert bce < 0.1 and mask_losses(masks, target)[0] > 4  # not 0: half a pixel around the image is not ignored


# ---- objects followed through clips


def followed(masks: list[torch.Tensor], P: int, stages: int = 2) -> dict:
    """What a network with a memory would say that knew everything, of P prompts: tubes, their quality, presence."""
    B, T = len(masks), masks[0].shape[1]
    found, presence = torch.full((B, P, T, H // 4, W // 4), -30.0), torch.full((B, P, T), -30.0)
    for b, target in enumerate(masks):
        found[b, : len(target)] = 60 * target[..., ::4, ::4].float() - 30
        presence[b, : len(target)] = 60 * target.flatten(2).any(2).float() - 30
    out = {"classes": torch.zeros(B, P, T, K + 1), "masks": found, "iou": torch.ones(B, P, T, 1)}
    out = {k: [v.clone().requires_grad_() for _ in range(stages)] for k, v in out.items()}
    return out | {"presence": presence.requires_grad_()}


def clip_batch(masks: list[torch.Tensor], first: list[list[int]]) -> dict:
    return batch_of("vos", masks) | {"first": [torch.tensor(f, dtype=torch.long) for f in first]}


def test_objects_are_learned_where_they_are_seen_and_their_presence_everywhere_after_the_first_frame():
    tubes = squares(0, 16, frames=4)
    tubes[0, 2] = False  # hidden
    tubes[1, :1] = False  # enters on frame 1
    out, batch = followed([tubes], 3), clip_batch([tubes], [[0, 1]])
    losses = segment_losses(out, batch)
    assert set(losses) == {"loss", "mask", "dice", "iou", "presence"}
    assert losses["mask"] < 5 and losses["dice"] < 5 and losses["iou"] < 3 and losses["presence"] < 1e-6
    losses["loss"].backward()
    moved = out["masks"][0].grad[0].flatten(2).any(2)
    assert moved.tolist() == [[True, True, False, True], [False, True, True, True], [False] * 4]
    assert out["iou"][0].grad[0, :, :, 0].bool().tolist() == moved.tolist()
    wrong = followed([tubes], 3)
    with torch.no_grad():
        wrong["presence"].neg_()
    loss = segment_losses(wrong, batch)["presence"]
    assert loss.item() == pytest.approx(30 * 5 / (2 * 3)), (
        "5 of the 8 frames lie after the first ones; 2 objects, 3 steps"
    )
    loss.backward()
    assert wrong["presence"].grad[0].bool().tolist() == [
        [False, True, True, True],
        [False, False, True, True],
        [False] * 4,
    ]


def test_a_clip_of_equal_frames_costs_as_much_as_its_frame():
    masks = [squares(0, 16), squares(8)]
    clips = [m[:, None].expand(-1, 3, -1, -1) for m in masks]
    torch.manual_seed(0)
    out = {k: v for k, v in followed(clips, 2).items() if k != "classes"}
    noise = 9 * torch.randn(2, 2, 1, H // 4, W // 4)
    out["masks"], out["iou"] = [m.detach() / 10 + noise for m in out["masks"]], [q.detach() - 0.5 for q in out["iou"]]
    whole = segment_losses(out | {"classes": []}, clip_batch(clips, [[0, 0], [0]]), points=50_000)
    frame = {"classes": [], "masks": [m[:, :, 0] for m in out["masks"]], "iou": [q[:, :, 0] for q in out["iou"]]}
    alone = segment_losses(frame, batch_of("interactive", masks), points=50_000)
    for name in ("mask", "dice", "iou"):
        torch.testing.assert_close(whole[name], alone[name], rtol=0.02, atol=0)


def test_followed_objects_at_ignored_pixels():
    tubes = squares(0, frames=2)
    out, batch = followed([tubes], 1), clip_batch([tubes], [[0]])
    with torch.no_grad():
        for m in out["masks"]:
            m[..., 8:] = 30  # also claims the right half
    claimed = segment_losses(out, batch)
    batch["ignore"][:, 1, :, 28:] = True
    half = segment_losses(out, batch)
    batch["ignore"][..., 28:] = True
    assert claimed["mask"] > 20 and segment_losses(out, batch)["mask"] < 5
    assert half["mask"].item() == pytest.approx(claimed["mask"].item() / 2, rel=0.15), "each frame has its own"


def test_followed_objects_of_two_ranks_make_one():
    masks = [squares(0, 8, 16, frames=3), squares(4, frames=3)]
    masks[0][1, 2] = False
    torch.manual_seed(0)
    out = followed(masks, 3)
    out = {k: [x.detach() + torch.randn_like(x) for x in v] if isinstance(v, list) else v.detach() / 30
           for k, v in out.items()}  # fmt: skip
    together = segment_losses(out, clip_batch(masks, [[0, 1, 0], [0]]), points=100_000)
    halves = [
        segment_losses({k: [x[b : b + 1] for x in v] if isinstance(v, list) else v[b : b + 1] for k, v in out.items()},
                       clip_batch(masks[b : b + 1], [[[0, 1, 0], [0]][b]]), 2.0, points=100_000) for b in (0, 1)
    ]  # fmt: skip
    for name, rtol in (("mask", 0.02), ("dice", 0.02), ("iou", 1e-5), ("presence", 1e-5)):
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, together[name], rtol=rtol, atol=0)


@pytest.mark.parametrize("objects", [(2, 1), (1, 0), (0, 0)], ids=str)
def test_following_leaves_no_parameter_without_gradient_and_nothing_is_nan(objects):
    torch.manual_seed(0)
    memory = MemoryConfig(dim=32, heads=4, hidden=48, maps=1)
    model = FastSAM2(FastSAM2Config(**SMALL, backbone="resnet18", memory=memory)).train()
    masks = [squares(*range(0, 8 * n, 8), frames=3) for n in objects]
    with torch.no_grad():
        model.memory.presence_out.weight.normal_(std=0.1)  # at first it is 0: nothing behind it would move
    batch = clip_batch(masks, [[0] * n for n in objects]) | {"image": torch.rand(2, 3, 3, H, W)}
    losses, _ = batch_losses(model, batch, prompts_of(masks), None, torch.bfloat16, 64, memory=True)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    losses["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert any(p.grad.any() for p in model.memory.judge.parameters()) == any(objects)
