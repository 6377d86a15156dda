"""Res16UNet34C, the 3D backbone of ESAM, OneFormer3D and Mask3D: a sparse U-Net of residual blocks over four strides.

Choy et al., 2019, "4D Spatio-Temporal ConvNets", section 5, in the form of Mask3D (Schult et al., 2023) without its
last convolution. Names and shapes of parameters are the published ones, so released weights load: convert_mask3d.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch.nn as nn

from models.sparse_conv import SparseBatchNorm, SparseConv, SparseConvTranspose, SparseTensor, cat, relu
from utils.run import UserError, read_config
from utils.weights import load_strict, read_tensors

MOMENTUM = 0.02  # of batch norm, inside residual blocks 0.1


@dataclass
class Res16UNetConfig:
    """planes, layers: channels and residual blocks of block1..4 at strides 2, 4, 8, 16, of block5..8 at 8, 4, 2, 1.
    stem: channels at stride 1 before the first stride. The defaults are Res16UNet34C."""

    in_channels: int = 3
    stem: int = 32
    planes: tuple[int, ...] = (32, 64, 128, 256, 256, 128, 96, 96)
    layers: tuple[int, ...] = (2, 3, 4, 6, 2, 2, 2, 2)
    kernel_size: int = 5  # of the first convolution

    def __post_init__(self):
        self.planes, self.layers = tuple(self.planes), tuple(self.layers)
        if len(self.planes) != 8 or len(self.layers) != 8 or min(*self.planes, *self.layers) < 1:
            raise ValueError(f"planes {self.planes}, layers {self.layers}: expected eight positive numbers each")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0 or min(self.in_channels, self.stem) < 1:
            raise ValueError(f"in_channels {self.in_channels}, stem {self.stem}, kernel_size {self.kernel_size}: "
                             "expected positive, the kernel odd and at least 3")  # fmt: skip


class BasicBlock(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + x), x through a 1x1 convolution and norm where channels change."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1, self.norm1 = SparseConv(in_channels, channels), SparseBatchNorm(channels)
        self.conv2, self.norm2 = SparseConv(channels, channels), SparseBatchNorm(channels)
        self.downsample = None
        if in_channels != channels:
            norm = SparseBatchNorm(channels, momentum=MOMENTUM)
            self.downsample = nn.Sequential(SparseConv(in_channels, channels, kernel_size=1), norm)

    def forward(self, x: SparseTensor) -> SparseTensor:
        out = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return out.map(lambda features: (features + shortcut.features).relu())


class Res16UNet(nn.Module):
    """(N, in_channels) normalised colours of voxels at stride 1 -> (N, planes[-1]) features of the same voxels."""

    def __init__(self, cfg: Res16UNetConfig | None = None):
        super().__init__()
        self.cfg = cfg = cfg or Res16UNetConfig()
        width, skips = cfg.stem, [cfg.stem, *cfg.planes[:3]]
        self.conv0p1s1 = SparseConv(cfg.in_channels, cfg.stem, cfg.kernel_size)
        self.bn0 = SparseBatchNorm(cfg.stem, momentum=MOMENTUM)
        for i in range(1, 5):  # stride 2^i
            self.add_module(f"conv{i}p{2 ** (i - 1)}s2", SparseConv(width, width, kernel_size=2, stride=2))
            self.add_module(f"bn{i}", SparseBatchNorm(width, momentum=MOMENTUM))
            self.add_module(f"block{i}", self._blocks(i, width))
            width = cfg.planes[i - 1]
        for i in range(4, 8):  # stride 2^(7 - i)
            planes = cfg.planes[i]
            self.add_module(f"convtr{i}p{2 ** (8 - i)}s2", SparseConvTranspose(width, planes))
            self.add_module(f"bntr{i}", SparseBatchNorm(planes, momentum=MOMENTUM))
            self.add_module(f"block{i + 1}", self._blocks(i + 1, planes + skips[7 - i]))
            width = planes
        self.out_channels = width

    def _blocks(self, i: int, in_channels: int) -> nn.Sequential:
        planes, layers = self.cfg.planes[i - 1], self.cfg.layers[i - 1]
        return nn.Sequential(*(BasicBlock(in_channels if j == 0 else planes, planes) for j in range(layers)))

    def stem(self, x: SparseTensor) -> SparseTensor:
        """Colours -> (N, stem) at stride 1"""
        return relu(self.bn0(self.conv0p1s1(x)))

    def down(self, i: int, x: SparseTensor) -> SparseTensor:
        """i = 1..4: from stride 2^(i-1) to stride 2^i and through block i"""
        conv, norm, block = (getattr(self, name) for name in (f"conv{i}p{2 ** (i - 1)}s2", f"bn{i}", f"block{i}"))
        return block(relu(norm(conv(x))))

    def up(self, i: int, x: SparseTensor, skip: SparseTensor) -> SparseTensor:
        """i = 4..7: from stride 2^(8-i) to stride 2^(7-i), beside the encoder's features there, through block i+1"""
        names = (f"convtr{i}p{2 ** (8 - i)}s2", f"bntr{i}", f"block{i + 1}")
        conv, norm, block = (getattr(self, name) for name in names)
        return block(cat(relu(norm(conv(x))), skip))

    def encode(self, x: SparseTensor) -> list[SparseTensor]:
        """Features at strides 1, 2, 4, 8, 16: the stem and blocks 1 to 4"""
        levels = [self.stem(x)]
        for i in range(1, 5):
            levels.append(self.down(i, levels[-1]))
        return levels

    def decode(self, levels: list[SparseTensor]) -> SparseTensor:
        """Features at stride 1 from those of `encode`, as they are or changed on the way, by a memory say"""
        *skips, x = levels
        for i in range(4, 8):
            x = self.up(i, x, skips.pop())
        return x

    def forward(self, x: SparseTensor) -> SparseTensor:
        if x.stride != 1 or x.features.shape[1] != self.cfg.in_channels:
            raise ValueError(f"features are {tuple(x.features.shape)} at stride {x.stride}, "
                             f"expected (N, {self.cfg.in_channels}) at stride 1")  # fmt: skip
        return self.decode(self.encode(x))

    def config_dict(self) -> dict:
        return {"model": "Res16UNet", **asdict(self.cfg)}

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> "Res16UNet":
        """The network of a checkpoint folder (config.json, model.safetensors), in training mode, on the CPU."""
        config = read_config(folder)
        if config.get("model") != "Res16UNet":
            raise UserError(f"{folder}: holds {config.get('model', 'no named model')}, expected a Res16UNet; "
                            "write one with models/convert_mask3d.py")  # fmt: skip
        try:
            cfg = Res16UNetConfig(**{k: v for k, v in config.items() if k not in ("model", "made_by")})
        except (TypeError, ValueError) as e:
            raise UserError(f"{folder}/config.json: no configuration of Res16UNet ({e}); take another folder") from e
        model = cls(cfg)
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
        return model
