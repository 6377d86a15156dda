"""SAM's prompt encoder: its matrix is state, padding, mixes of prompts, any image size, precision."""

import pytest
import torch

from models.sam_prompt_encoder import SAMPromptEncoder

SIZE, GRID = (64, 96), (4, 6)


def encoder() -> SAMPromptEncoder:
    torch.manual_seed(0)
    return SAMPromptEncoder(32, 8).eval()


def clicks(B: int = 2, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.rand(B, n, 2, generator=torch.Generator().manual_seed(1)) * 60
    return points, torch.arange(B * n).reshape(B, n) % 2


@torch.no_grad()
def test_the_gaussian_matrix_is_in_the_checkpoint():
    ours, points = encoder(), clicks()
    state = ours.state_dict()
    assert "pe_layer.positional_encoding_gaussian_matrix" in state
    torch.manual_seed(99)
    again = SAMPromptEncoder(32, 8)
    assert not torch.equal(again.encode_points(*points, SIZE), ours.encode_points(*points, SIZE))
    again.load_state_dict(state, strict=True)
    assert torch.equal(again.encode_points(*points, SIZE), ours.encode_points(*points, SIZE))


@torch.no_grad()
def test_padding_points_have_no_place():
    model, (points, labels) = encoder(), clicks()
    labels[:, 1] = -1
    elsewhere = points.clone()
    elsewhere[:, 1] = 7
    tokens = model.encode_points(points, labels, SIZE)
    torch.testing.assert_close(tokens, model.encode_points(elsewhere, labels, SIZE))
    torch.testing.assert_close(tokens[:, 1], model.not_a_point_embed.weight.expand(2, -1))
    torch.testing.assert_close(tokens, model.encode_points(points, labels.float(), SIZE))


@torch.no_grad()
def test_only_the_place_in_the_image_counts():
    model, (points, labels) = encoder(), clicks()
    twice = 2 * points + 0.5  # the centre of a pixel twice as large
    torch.testing.assert_close(
        model.encode_points(points, labels, SIZE), model.encode_points(twice, labels, (128, 192)), atol=1e-4, rtol=1e-4
    )
    swapped = model.encode_points(points, 1 - labels, SIZE) - model.encode_points(points, labels, SIZE)
    assert swapped.abs().amin((0, 1)).max() > 0


@torch.no_grad()
def test_a_click_and_a_grid_cell_at_one_place_have_one_code():
    model = encoder()
    centre = torch.tensor([[[5 * 16 + 7.5, 2 * 16 + 7.5]]])  # cell (2, 5) of a stride of 16
    token = model.encode_points(centre, torch.ones(1, 1).long(), SIZE)[0, 0] - model.point_embeddings[1].weight[0]
    torch.testing.assert_close(token, model.grid_code(GRID)[:, 2, 5], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mixes_of_prompts():
    model, (points, labels) = encoder(), clicks()
    boxes, masks = torch.tensor([[1.0, 2, 30, 40], [0, 0, 95, 63]]), torch.randn(2, 1, 16, 24)
    none, dense = model(SIZE, GRID)
    assert none.shape == (1, 0, 32) and dense.shape == (1, 32, 4, 6)
    only, _ = model(SIZE, GRID, points, labels)
    every, dense = model(SIZE, GRID, points, labels, boxes, masks)
    assert only.shape == (2, 4, 32) and every.shape == (2, 5, 32) and dense.shape == (2, 32, 4, 6)
    torch.testing.assert_close(only[:, :3], every[:, :3])
    torch.testing.assert_close(every[:, 3:], model.encode_boxes(boxes, SIZE))
    corners = model.encode_points(boxes.unflatten(1, (2, 2)), torch.tensor([[2, 3], [2, 3]]), SIZE)
    torch.testing.assert_close(every[:, 3:], corners)
    with pytest.raises(ValueError, match="come together"):
        model(SIZE, GRID, points)
    with pytest.raises(ValueError, match=r"\[1, 2\] objects"):
        model(SIZE, GRID, points, labels, boxes[:1])


def test_coordinates_are_float32_under_autocast():
    model, points = encoder(), clicks()
    exact = model.encode_points(*points, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode_points(*points, SIZE)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact)


def test_no_parameter_is_without_gradient_when_everything_is_used():
    model, (points, labels) = encoder(), clicks()
    labels[0, 0] = -1
    sparse, dense = model(SIZE, GRID, points, labels, torch.tensor([[1.0, 2, 3, 4]] * 2), torch.randn(2, 1, 16, 24))
    (sparse.square().sum() + dense.square().sum() + model.no_mask(2, GRID).square().sum()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
