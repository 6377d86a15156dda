"""VesselUNet: a small U-Net that outlines blood vessels, the row every larger model is compared with.

photograph -> standardised inside its field of view -> PixelUnshuffle(2) -> convolutions at 1/2, 1/4, 1/8 of the side and
back with skips -> PixelShuffle(2) -> one logit per pixel. 118,708 parameters with the widths 16, 32, 64.

Shapes: B pictures, H x W px, C channels. Any H and W: the picture is padded inside, and the logits cut back.
Source: Ronneberger et al., U-Net, MICCAI 2015; sizes of the Sa2VA notes, section 11.4.
"""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.field_of_view import fov_statistics
from utils.run import UserError, read_config
from utils.vessel_metrics import soft_cldice
from utils.weights import load_strict, read_tensors

FOLD = 2  # side of the px blocks that the stem packs into channels
VIEWS = 8  # flips and quarter turns of `predict(tta=True)`


@dataclass
class VesselUNetConfig:
    """Everything a checkpoint needs to rebuild the model and to say what it has seen."""

    widths: list[int] = field(default_factory=lambda: [16, 32, 64])  # channels at 1/2, 1/4, 1/8, ... of the side
    threshold: float | None = (
        None  # probability above which a pixel is called vessel; chosen in training, never on test
    )
    train_images: list[dict] = field(default_factory=list)  # [{name, sha256}] of all pictures seen in training

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"VesselUNetConfig: widths {self.widths}; expected one or more, each >= 1")


class Block(nn.Sequential):
    """Twice: 3x3 convolution, BatchNorm, ReLU. (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, channels_in: int, channels_out: int):
        layers = []
        for c in (channels_in, channels_out):
            conv = nn.Conv2d(c, channels_out, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class VesselUNet(nn.Module):
    """Standardised pictures (B, 3, H, W) float -> logits (B, 1, H, W). `predict` takes a photograph as it is."""

    def __init__(self, cfg: VesselUNetConfig):
        super().__init__()
        self.cfg = cfg
        widths = cfg.widths
        self.down = nn.ModuleList(Block(a, b) for a, b in zip((3 * FOLD**2, *widths), widths, strict=False))
        self.lift = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(widths, widths[1:], strict=False))
        self.up = nn.ModuleList(Block(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], FOLD**2, 1)
        self.to(memory_format=torch.channels_last)  # two to twenty times faster on CPUs at these widths

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """pictures (B, 3, H, W) of `standardised` -> logits (B, 1, H, W). ValueError for other shapes."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"VesselUNet: pictures {tuple(pictures.shape)}, expected (B, 3, H, W)")
        H, W = pictures.shape[-2:]
        step = FOLD * 2 ** (len(self.cfg.widths) - 1)
        x = F.pad(pictures, (0, -W % step, 0, -H % step))  # 0 is what lies outside the field of view
        x = F.pixel_unshuffle(x, FOLD).contiguous(memory_format=torch.channels_last)  # (B, 12, h, w)
        skips = []
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k else x)
            skips.append(x)
        for k in reversed(range(len(self.up))):
            x = self.up[k](torch.cat([skips[k], self.lift[k](x)], 1))
        return F.pixel_shuffle(self.head(x), FOLD)[..., :H, :W]  # (B, 1, H, W)

    @torch.no_grad()
    def predict(
        self,
        image: np.ndarray,
        fov: np.ndarray,
        tta: bool = False,
        dtype: torch.dtype = torch.float32,
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Probabilities (H, W) float32, 0 outside fov. image (H, W, 3) uint8 RGB, fov (H, W) bool.

        tta: mean over the eight flips and quarter turns. dtype: autocast type. statistics: mean and std (3,) of the
        photograph that image is a crop of (default: image is whole). ValueError in training mode or for an empty fov.
        """
        if self.training:
            raise ValueError("VesselUNet.predict: the model is in training mode; call eval() first")
        device = self.head.weight.device
        known = (image, fov, *(fov_statistics(image, fov) if statistics is None else statistics))
        image, fov, mean, std = (torch.from_numpy(np.ascontiguousarray(a))[None].to(device) for a in known)
        x, total = standardised(image, fov, mean, std), 0.0
        for view in range(VIEWS if tta else 1):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = self(turn(x, view))
            total = total + turn_back(logits.float().sigmoid(), view)
        prob = total[0, 0] / (VIEWS if tta else 1)
        return torch.where(fov[0], prob, 0.0).cpu().numpy()

    # ---- files

    def config_dict(self) -> dict:
        return {"model": "vessel_unet", **asdict(self.cfg)}

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> "VesselUNet":
        """The model of a checkpoint folder, in eval mode. UserError for another model, or weights that do not fit."""
        config = read_config(folder)
        if config.get("model") != "vessel_unet":
            raise UserError(f"{folder}: holds the model {config.get('model')!r}, expected 'vessel_unet'; take another")
        try:
            cfg = VesselUNetConfig(**{k: v for k, v in config.items() if k not in ("model", "made_by")})
        except (TypeError, ValueError) as e:
            raise UserError(f"{folder}/config.json: {e}; take a checkpoint of train/train_vessel_unet.py") from e
        model = cls(cfg)
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
        return model.eval()


# ---- pictures


def standardised(image: torch.Tensor, fov: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """image (B, H, W, 3) uint8, fov (B, H, W) bool -> (image - mean) / std, 0 outside fov: (B, 3, H, W) float32.

    mean, std (B, 3): of the whole photograph inside its field of view, also where image is a crop of it
    (`fov_statistics`). Training and inference both come through here.
    """
    x = (image.float() - mean[:, None, None]) / std[:, None, None]
    return torch.where(fov[..., None], x, 0.0).permute(0, 3, 1, 2)


def turn(x: torch.Tensor, view: int) -> torch.Tensor:
    """The view-th (0..7) of the flips and quarter turns of (..., H, W); 0 changes nothing."""
    x = torch.rot90(x, view % 4, (-2, -1))
    return x.flip(-1) if view >= 4 else x


def turn_back(x: torch.Tensor, view: int) -> torch.Tensor:
    """Undoes `turn`."""
    x = x.flip(-1) if view >= 4 else x
    return torch.rot90(x, -(view % 4), (-2, -1))


# ---- training


def vessel_losses(logits: torch.Tensor, truth: torch.Tensor, fov: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inside the field of view: bce (mean per pixel), dice (1 - soft Dice over the whole batch, smoothed by 1).

    logits (B, 1, H, W); truth, fov (B, H, W) bool. Scalars, computed in float32. A batch without field of view gives 0.
    """
    z, t, inside = logits.float()[:, 0], truth.float(), fov.float()
    bce = F.binary_cross_entropy_with_logits(z, t, reduction="none")
    p, t = z.sigmoid() * inside, t * inside
    dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    return {"bce": (bce * inside).sum() / inside.sum().clamp_min(1), "dice": dice}


def cldice_loss(logits: torch.Tensor, truth: torch.Tensor, fov: torch.Tensor) -> torch.Tensor:
    """1 - soft clDice over the batch (Shit et al., CVPR 2021); arguments as `vessel_losses`, a scalar."""
    inside = fov[:, None].float()
    return soft_cldice(logits.float().sigmoid() * inside, truth[:, None] * inside)


class WeightAverage:
    """Exponential moving average of a model's weights and BatchNorm statistics; `model` is the averaged copy, in eval.

    The n-th update keeps min(decay, (1 + n) / (10 + n)) of the average, so that the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAverage: decay {decay}, expected 0 <= decay < 1")
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, n: int) -> None:
        """After the n-th optimizer step, n from 0."""
        keep = min(self.decay, (1 + n) / (10 + n))
        for mean, new in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(new, 1 - keep)
            else:
                mean.copy_(new)
