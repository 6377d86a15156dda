"""LiteDFPN: sizes, initial behaviour of its parts, deformable convolution, coordinates, precision."""

import pytest
import torch
import torch.nn.functional as F

from models.lite_dfpn import DeformUp, LiteDFPN, ModulatedDeformConv

CHANNELS = (8, 12, 16, 20)


def maps(H: int = 16, W: int = 24, B: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, c, H >> i, W >> i, generator=g) for i, c in enumerate(CHANNELS)]


def neck() -> LiteDFPN:
    torch.manual_seed(0)
    return LiteDFPN(CHANNELS, dim=32, width=16).eval()


@torch.no_grad()
def test_one_map_at_the_size_of_the_first():
    model, inputs = neck(), maps()
    out = model(inputs)
    assert out.shape == (2, 32, 16, 24) and out.isfinite().all()
    torch.testing.assert_close(model([m[1:] for m in inputs]), out[1:])


@pytest.mark.parametrize("R50", [True, False])
def test_parameter_count_of_the_anchor(R50):
    with torch.device("meta"):
        model = LiteDFPN((256, 512, 1024, 2048) if R50 else (64, 128, 256, 512))
    assert sum(p.numel() for p in model.parameters()) == (15_351_505 if R50 else 1_258_225)


@torch.no_grad()
def test_deformable_convolution_moves_and_weighs_its_taps():
    torch.manual_seed(0)
    conv, x = ModulatedDeformConv(4, 6), torch.randn(1, 4, 9, 9)
    offset_mask = torch.zeros(1, 27, 9, 9)
    offset_mask[:, 18:] = 50  # sigmoid 1
    plain = F.conv2d(x, conv.weight, padding=1)
    torch.testing.assert_close(conv(x, offset_mask), plain)
    offset_mask[:, 18:] = 0  # sigmoid 1/2
    torch.testing.assert_close(conv(x, offset_mask), plain / 2)
    offset_mask[:, 18:], offset_mask[:, 1:18:2] = 50, 1.0  # every tap one cell to the right
    torch.testing.assert_close(conv(x, offset_mask)[..., 1:-2], plain[..., 2:-1])


@torch.no_grad()
def test_a_new_block_is_a_convolution_and_a_bilinear_doubling():
    torch.manual_seed(0)
    up, x = DeformUp(4, 6).eval(), torch.randn(1, 4, 8, 10)
    middle = F.relu(up.dcn_bn(F.conv2d(x, up.dcn.weight, padding=1) / 2))
    expected = up.up_bn(F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=False))
    torch.testing.assert_close(up(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # borders see zeros instead


@torch.no_grad()
def test_coordinates_are_x_then_y_from_minus_1_to_1():
    model, y = neck(), torch.zeros(1, 16, 5, 7)
    model.loc_conv.bias.zero_()
    model.loc_conv.weight.zero_()
    model.loc_conv.weight[0, 16], model.loc_conv.weight[1, 17] = 1.0, 1.0
    out = model.locate(y)
    torch.testing.assert_close(out[0, 0], torch.linspace(-1, 1, 7).expand(5, 7))
    torch.testing.assert_close(out[0, 1], torch.linspace(-1, 1, 5)[:, None].expand(5, 7))


def test_every_parameter_has_a_gradient_also_in_bfloat16():
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = neck().train(), maps()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(inputs)
        out.float().square().mean().backward()
        assert out.isfinite().all()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert all(m.dcn_offset.weight.grad.any() for m in model.modules() if isinstance(m, DeformUp))


def test_maps_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"sizes .*\(7, 12\).*each half"):
        neck()([*maps()[:1], *(m[..., :-1, :] for m in maps()[1:2]), *maps()[2:]])
    with pytest.raises(ValueError, match="four even numbers"):
        LiteDFPN((8, 12, 15, 20))
