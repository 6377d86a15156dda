"""LiteDFPN: a feature pyramid of deformable convolutions that ends in one map at stride 4, image coordinates included.

Shapes: B images, C_i channels of the backbone, h_i = C_i / 2, A width of the aggregation, D output width.
Sources: Hu et al., YOSO, CVPR 2023 (lite deformable convolution, aggregation); Xu et al., RAP-SAM, ICLR 2025, whose
released neck has these parameter names. Offsets start at 0 and transposed convolutions as bilinear interpolation.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d


def bilinear_kernel(channels: int) -> torch.Tensor:
    """Weight (C, C, 4, 4) with which ConvTranspose2d(C, C, 4, stride 2, padding 1) doubles a map bilinearly."""
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    return torch.eye(channels)[:, :, None, None] * (line[:, None] * line)


def scaled(x: torch.Tensor, factor: int) -> torch.Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def sampled_deform_conv2d(
    x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """torchvision's deform_conv2d(x, offset, weight, padding=1, mask=mask) for 3x3 weights and one group, of
    operations that every runtime has: one grid_sample of nine readings per cell, then a product. It keeps all of them,
    9 times x, and its value differs by rounding only.

    x (B, C, H, W), offset (B, 18, H, W), weight (out, C, 3, 3), mask (B, 9, H, W), float32 -> (B, out, H, W).
    """
    B, C, H, W = x.shape
    tap = torch.arange(-1, 2, device=x.device, dtype=x.dtype)
    rows = torch.arange(H, device=x.device, dtype=x.dtype)[:, None]  # (H, 1)
    columns = torch.arange(W, device=x.device, dtype=x.dtype)  # (W,)
    dy, dx = offset.reshape(B, 9, 2, H, W).unbind(2)  # (B, 9, H, W)
    row = dy + tap.repeat_interleave(3)[:, None, None] + rows
    column = dx + tap.repeat(3)[:, None, None] + columns
    grid = torch.stack([(2 * column + 1) / W - 1, (2 * row + 1) / H - 1], -1).reshape(B, 9 * H, W, 2)
    read = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B, C, 9 H, W)
    read = (read.reshape(B, C, 9, H, W) * mask[:, None]).reshape(B, C * 9, H * W)
    return (weight.flatten(1) @ read).reshape(B, len(weight), H, W)


class ModulatedDeformConv(nn.Module):
    """3x3 deformable convolution without bias, one group. `weight` and the offset layer are trained; float32 always.

    forward(x (B, C, H, W), offset_mask (B, 27, H, W)) -> (B, out, H, W): 18 offsets in torchvision's order (dy, dx per
    tap, in cells), then the logits of 9 modulation factors. `sampled`: by sampled_deform_conv2d (LiteDFPN.sample).
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.sampled = False
        self.weight = nn.Parameter(torch.empty(out, channels, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor, offset_mask: torch.Tensor) -> torch.Tensor:
        offset, mask = offset_mask.float().split([18, 9], 1)  # torchvision's kernel refuses autocast's mixed types
        if not self.sampled:
            return deform_conv2d(x.float(), offset, self.weight.float(), padding=1, mask=mask.sigmoid())
        with torch.autocast(x.device.type, enabled=False):
            return sampled_deform_conv2d(x.float(), offset, self.weight.float(), mask.sigmoid())


class DeformUp(nn.Module):
    """Deformable convolution, then a transposed one that doubles the size: (B, C, H, W) -> (B, out, 2H, 2W)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.dcn_offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.dcn, self.dcn_bn = ModulatedDeformConv(channels, out), nn.BatchNorm2d(out)
        self.up_sample = nn.ConvTranspose2d(out, out, 4, stride=2, padding=1, bias=False)
        self.up_bn = nn.BatchNorm2d(out)
        nn.init.zeros_(self.dcn_offset.weight)
        nn.init.zeros_(self.dcn_offset.bias)
        with torch.no_grad():
            self.up_sample.weight.copy_(bilinear_kernel(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.dcn_bn(self.dcn(x, self.dcn_offset(x))))
        return F.relu(self.up_bn(self.up_sample(x)))


class Pyramid(nn.Module):
    """Top-down path over four maps and their sum at stride 4, (B, A, H, W)."""

    def __init__(self, channels: tuple[int, int, int, int], width: int):
        super().__init__()
        c2, c3, c4, c5 = channels
        self.lateral_conv0 = nn.Conv2d(c5, c5 // 2, 1)
        self.deform_conv1, self.lateral_conv1 = DeformUp(c5 // 2, c4 // 2), nn.Conv2d(c4, c4 // 2, 1)
        self.deform_conv2, self.lateral_conv2 = DeformUp(c4 // 2, c3 // 2), nn.Conv2d(c3, c3 // 2, 1)
        self.deform_conv3, self.lateral_conv3 = DeformUp(c3 // 2, c2 // 2), nn.Conv2d(c2, c2 // 2, 1)
        self.conv_a5 = nn.Conv2d(c5 // 2, width, 1, bias=False)
        self.conv_a4 = nn.Conv2d(c4 // 2, width, 1, bias=False)
        self.conv_a3 = nn.Conv2d(c3 // 2, width, 1, bias=False)
        self.conv_a2 = nn.Conv2d(c2 // 2, width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.output_conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, c2: torch.Tensor, c3: torch.Tensor, c4: torch.Tensor, c5: torch.Tensor) -> torch.Tensor:
        x5 = self.lateral_conv0(c5)
        x4 = self.lateral_conv1(c4) + self.deform_conv1(x5)
        x3 = self.lateral_conv2(c3) + self.deform_conv2(x4)
        x2 = self.lateral_conv3(c2) + self.deform_conv3(x3)
        a5, a4, a3 = self.conv_a5(x5), self.conv_a4(x4), self.conv_a3(x3)
        total = scaled(a5, 8) + scaled(a4, 4) + scaled(a3, 2) + self.conv_a2(x2) + self.bias
        return self.output_conv(total)  # (B, A, H, W)


class LiteDFPN(nn.Module):
    """Backbone maps C2..C5 -> one map (B, D, H, W) at the size of C2.

    channels: C_2..C_5, all even. Each map must have exactly half the sides of the one before, so the image's sides are
    multiples of 32; ValueError otherwise.
    """

    def __init__(self, channels: tuple[int, int, int, int], dim: int = 256, width: int = 128):
        super().__init__()
        if len(channels) != 4 or any(c % 2 for c in channels):
            raise ValueError(f"LiteDFPN: channels {tuple(channels)}, expected four even numbers")
        self.deconv = Pyramid(channels, width)
        self.loc_conv = nn.Conv2d(width + 2, dim, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        sizes = [tuple(m.shape[-2:]) for m in maps]
        if len(maps) != 4 or any((2 * b[0], 2 * b[1]) != a for a, b in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(f"LiteDFPN: maps of sizes {sizes}, expected four, each half as large as the one before")
        return self.locate(self.deconv(*maps))

    def sample(self, on: bool = True) -> "LiteDFPN":
        """From now on the deformable convolutions read by grid_sample, for runtimes without one (on=False: no more).
        The same weights, the same values but for rounding, more memory."""
        for m in self.modules():
            if isinstance(m, ModulatedDeformConv):
                m.sampled = on
        return self

    def locate(self, y: torch.Tensor) -> torch.Tensor:
        """y (B, A, H, W) with two channels more, x and y from -1 to 1 over the map, through a 1x1 convolution; H, W > 1.
        By arange: an exported linspace would keep its length."""
        B, _, H, W = y.shape
        places = [(2 * torch.arange(n, device=y.device, dtype=torch.float32) - (n - 1)) / (n - 1) for n in (H, W)]
        down, across = (p.to(y.dtype) for p in places)
        maps = [y, across.expand(B, 1, H, W), down[:, None].expand(B, 1, H, W)]
        return self.loc_conv(torch.cat(maps, 1))  # (B, D, H, W)
