"""Mask losses: sampling, importance, empty targets, unknown classes, precision, gradients."""

import pytest
import torch
import torch.nn.functional as F

from models import mask_losses
from models.mask_losses import (
    bce_loss,
    class_loss,
    dice_loss,
    iou_loss,
    mask_iou,
    mean_over,
    sample_points,
    uncertain_points,
)


def blobs(R: int = 3, T: int | None = None, seed: int = 0) -> torch.Tensor:
    shape = (R, 12, 20) if T is None else (R, T, 12, 20)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pixel_centres_are_read_exactly():
    masks = blobs()
    y, x = torch.meshgrid(torch.arange(12), torch.arange(20), indexing="ij")
    centres = torch.stack([(x + 0.5) / 20, (y + 0.5) / 12], -1).flatten(0, 1)[None]
    torch.testing.assert_close(sample_points(masks, centres), masks.flatten(1))
    own = centres.repeat(3, 1, 1)
    torch.testing.assert_close(sample_points(masks, own), masks.flatten(1))
    torch.testing.assert_close(sample_points(masks > 0, centres), (masks > 0).flatten(1).float())
    between = torch.tensor([[[1 / 20, 0.5 / 12]]])  # between the first two pixels
    torch.testing.assert_close(sample_points(masks, between)[:, 0], masks[:, 0, :2].mean(1))


def test_a_clip_is_read_as_a_taller_image():
    masks, xy = blobs(T=4), torch.rand(3, 50, 2, generator=generator())
    torch.testing.assert_close(sample_points(masks, xy), sample_points(masks.flatten(1, 2), xy))


def test_importance_sampling_looks_where_the_model_is_unsure():
    line = torch.linspace(-10, 10, 100).expand(2, 100, 100)  # logit 0 in the middle column
    xy = uncertain_points(line, 200, generator=generator())
    assert xy.shape == (2, 200, 2) and xy.min() >= 0 and xy.max() < 1
    near = (xy[..., 0] - 0.5).abs()
    assert near[:, :150].max() < 0.2  # a quarter of 600 candidates is kept: about 1/8 of the width on either side
    assert near[:, 150:].max() > 0.4
    assert torch.equal(xy, uncertain_points(line, 200, generator=generator()))
    with pytest.raises(ValueError, match="oversample 0.5, importance 0.75"):
        uncertain_points(line, 200, oversample=0.5)


@pytest.mark.parametrize("T", [None, 2])
def test_right_masks_cost_little_and_wrong_ones_a_lot(T):
    targets = torch.zeros((2, 64, 64) if T is None else (2, T, 64, 64))
    targets[..., 8:40, 16:60] = 1
    for factor, low, high in ((40, 0, 0.3), (-40, 0.7, 40)):  # not 0: most points lie on the border
        bce, dice = mask_losses.mask_losses(
            factor * (targets.float() - 0.5), targets, points=2000, generator=generator()
        )
        assert low <= dice.item() <= min(high, 1) and low <= bce.item() <= high


def test_without_targets_the_losses_are_0_with_a_gradient_of_0():
    everything = torch.full((4, 8, 8), float("inf")).requires_grad_()  # even predictions that are not finite
    chosen = everything[torch.zeros(0, dtype=torch.int64)]
    bce, dice = mask_losses.mask_losses(chosen, torch.zeros(0, 32, 32, dtype=torch.bool), points=64)
    quality = mean_over(iou_loss(chosen.sum((1, 2)), mask_iou(chosen, chosen)))
    total = bce + dice + quality
    total.backward()
    assert total.item() == 0 and not everything.grad.any()
    logits = torch.randn(2, 3, 5, generator=generator()).requires_grad_()
    class_loss(logits, torch.full((2, 3), 4)).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()
    assert class_loss(logits, torch.full((2, 3), -1)).item() == 0


def test_an_empty_mask_is_a_target_too():
    masks = blobs().requires_grad_()
    bce, dice = mask_losses.mask_losses(masks, torch.zeros(3, 24, 40), points=64, generator=generator())
    (bce + dice).backward()
    assert bce > 0 and dice > 0.9 and masks.grad.isfinite().all()


def test_the_divisor_is_at_least_one():
    losses = torch.tensor([1.0, 3.0])
    assert [mean_over(losses, n).item() for n in (None, 4, 0.25, torch.tensor(8.0))] == [2, 1, 4, 0.5]


def test_classes_are_weighted_and_unknown_ones_left_out():
    logits, labels = torch.randn(2, 6, 5, generator=generator()), torch.tensor([[0, 4, 1, 3, 4, 4], [2, 2, 4, 4, 4, 0]])
    weights = torch.tensor([1.0, 1, 1, 1, 0.1])
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights)
    torch.testing.assert_close(class_loss(logits, labels), expected)
    unknown = labels.clone()
    unknown[0, 0] = -1
    expected = F.cross_entropy(logits.flatten(0, 1)[1:], labels.flatten()[1:], weights)
    torch.testing.assert_close(class_loss(logits, unknown), expected)


def test_float16_and_autocast_give_float32_losses():
    masks, targets = 30 * blobs(), blobs(seed=1) > 0
    xy = torch.rand(3, 5000, 2, generator=generator())
    exact = dice_loss(sample_points(masks.half(), xy), sample_points(targets, xy))
    with torch.autocast("cpu", torch.bfloat16):
        half = dice_loss(sample_points(masks.half(), xy), sample_points(targets, xy))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact)
    sure, nothing = torch.full((1, 70_000), 30.0).half(), torch.zeros(1, 70_000)  # float16 ends at 65,504
    assert dice_loss(sure, nothing).item() == pytest.approx(1 - 1 / 70_001) and bce_loss(sure, nothing).item() == 30
    assert class_loss(torch.tensor([[1000.0, 0, -1000]]).half(), torch.tensor([2])).item() == pytest.approx(2000)


def test_iou_of_masks():
    masks = torch.tensor([[[1.0, -1, 1]], [[-1, -1, -1]], [[-1, -1, -1]]])
    targets = torch.tensor([[[1, 1, 0]], [[0, 0, 0]], [[0, 1, 0]]])
    torch.testing.assert_close(mask_iou(masks, targets), torch.tensor([1 / 3, 1, 0]))
    predicted = torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    assert iou_loss(predicted, torch.tensor([0.0, 1, 1])).tolist() == [0.25, 0, 1]
