"""TempoPeak: which frame of a clip is the peak (PEAK), and which frames of a video hold an event (SPOT)?

frames -> a ResNet per frame, with temporal shift inside its blocks -> a head over time -> logits per frame.
PEAK: one logit per frame of the clip, softmax over time outside the model; `no_peak` adds one for "no peak here".
SPOT: K+1 logits per frame, class 0 is background [E2E-Spot, Hong et al. 2022, sec. 3].

Shapes: B clips, T frames (any number), H W pixels, D feature width, K classes, E events per clip.
`lengths` (B,) int64: real frames of each clip; None: all. Parameter names of the encoder are torchvision's.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock

from models.temporal_heads import make_head
from models.temporal_shift import make_shift
from utils.run import UserError, read_config
from utils.weights import load_strict, read_tensors

TASKS, ENCODERS, INPUTS = ("peak", "spot"), ("resnet18", "tiny"), ("rgb", "graydiff")
SHIFTS, HEADS = ("none", "tsm", "gsm", "gsf"), ("identity", "bigru", "bimamba2", "mamba2", "sgp")


@dataclass
class TempoPeakConfig:
    """Everything a checkpoint needs to rebuild the model and to read a video as training did."""

    task: str = "peak"  # peak | spot
    classes: list[str] = field(default_factory=lambda: ["peak"])  # K names; class index k+1 is classes[k]
    no_peak: bool = False  # peak: one more logit for "no peak in this clip"
    clip_len: int = 64  # T of training and of inference windows
    size: list[int] = field(default_factory=lambda: [224, 224])  # W, H that the network sees
    crop: list[int] | None = None  # x, y, w, h cut before resizing, in pixels of a video of size crop_of
    crop_of: list[int] | None = None  # W, H; other videos are cut at the same part of their picture
    input: str = "rgb"  # rgb | graydiff: grey, difference to the frame before, difference to the frame after
    encoder: str = "resnet18"  # resnet18 | tiny (three blocks, for laptops)
    shift: str = "none"  # none | tsm | gsm | gsf
    shuffle: bool = True  # gsm, gsf: interleave channels as the originals do
    head: str = "bimamba2"  # identity | bigru | bimamba2 | mamba2 | sgp
    head_layers: int = 1
    d_state: int = 64  # mamba2
    headdim: int = 64
    expand: int = 2
    dropout: float = 0.0  # before the classifier


class FrameEncoder(nn.Module):
    """(N, 3, H, W) with N = B*T -> (N, D). D is 512 for resnet18 and 96 for tiny."""

    def __init__(self, kind: str, shift: str = "none", shuffle: bool = True):
        super().__init__()
        if kind == "resnet18":
            net = torchvision.models.resnet18(weights=None)
            self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
            self.stages = ("layer1", "layer2", "layer3", "layer4")
            for name in self.stages:
                setattr(self, name, getattr(net, name))
        elif kind == "tiny":
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16)
            self.maxpool, self.stages, width = nn.Identity(), ("layer1", "layer2", "layer3"), 16
            for name, out in zip(self.stages, (32, 64, 96), strict=True):
                down = nn.Sequential(nn.Conv2d(width, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))
                setattr(self, name, nn.Sequential(BasicBlock(width, out, stride=2, downsample=down)))
                width = out
        else:
            raise ValueError(f"encoder {kind!r}: expected one of {ENCODERS}")
        blocks = self.blocks()
        shifts = [make_shift(shift, block.conv1.in_channels, shuffle) for block in blocks]
        self.shifts = nn.ModuleList(s for s in shifts if s is not None)
        self.dim = blocks[-1].conv2.out_channels

    def blocks(self) -> list[BasicBlock]:
        return [block for name in self.stages for block in getattr(self, name)]

    def forward(self, x: torch.Tensor, T: int, valid: torch.Tensor | None = None) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (N, 64, H/4, W/4)
        for i, block in enumerate(self.blocks()):
            h = self.shifts[i](x, T, valid) if len(self.shifts) else x  # only the block's branch sees neighbours
            h = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(h)))))
            x = F.relu(h + (x if block.downsample is None else block.downsample(x)))
        return x.mean((2, 3))  # (N, D)


class TempoPeak(nn.Module):
    """frames (B, T, 3, H, W), uint8 0..255 or float 0..1, RGB -> logits, unbounded, float32.

    peak: (B, T), or (B, T+1) with cfg.no_peak, the last one for "no peak"; -inf at padded frames.
    spot: (B, T, K+1). ValueError for frames of another shape.
    """

    def __init__(self, cfg: TempoPeakConfig, impl: str = "auto"):
        super().__init__()
        for name, value, known in (("task", cfg.task, TASKS), ("input", cfg.input, INPUTS)):
            if value not in known:
                raise ValueError(f"{name} {value!r}: expected one of {known}")
        if cfg.task == "peak" and len(cfg.classes) != 1:
            raise ValueError(f"task peak has one class, got {cfg.classes}; several classes need task spot")
        self.cfg = cfg
        self.encoder = FrameEncoder(cfg.encoder, cfg.shift, cfg.shuffle)
        D = self.encoder.dim
        mamba2 = {"d_state": cfg.d_state, "headdim": cfg.headdim, "expand": cfg.expand, "impl": impl}
        self.head = make_head(cfg.head, D, cfg.head_layers, **mamba2 if "mamba2" in cfg.head else {})
        self.dropout = nn.Dropout(cfg.dropout)
        self.classifier = nn.Linear(D, 1 if cfg.task == "peak" else 1 + len(cfg.classes))
        if cfg.no_peak:
            self.attend, self.none = nn.Linear(D, 1), nn.Linear(D, 1)
        for layer in [self.classifier, *([self.attend, self.none] if cfg.no_peak else [])]:
            nn.init.normal_(layer.weight, std=0.001)  # first loss = that of a uniform guess
            nn.init.zeros_(layer.bias)
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114])[:, None, None], persistent=False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        if frames.ndim != 5 or frames.shape[2] != 3:
            raise ValueError(f"TempoPeak: frames {tuple(frames.shape)}, expected (B, T, 3, H, W)")
        B, T = frames.shape[:2]
        valid = None
        if lengths is not None:
            valid = torch.arange(T, device=frames.device)[None] < lengths[:, None]  # (B, T)
        x = self.to_input(frames, valid).flatten(0, 1)  # (B*T, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.encoder(x, T, valid).unflatten(0, (B, T))  # (B, T, D)
        x = self.head(x, lengths)  # (B, T, D)
        return self.classify(x, valid)

    def to_input(self, frames: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """frames (B, T, 3, H, W) -> what the encoder sees, same shape, float32; padding becomes 0."""
        x = frames / 255.0 if frames.dtype == torch.uint8 else frames
        if self.cfg.input == "rgb":
            x = (x - self.mean) / self.std
        else:
            grey = (x * self.luma).sum(2, keepdim=True)  # (B, T, 1, H, W)
            step = (grey[:, 1:] - grey[:, :-1]) / 0.1  # (B, T-1, 1, H, W), of the order of 1 where something moves
            if valid is not None:
                step = step * valid[:, 1:, None, None, None]
            nothing = torch.zeros_like(grey[:, :1])
            before, after = torch.cat([nothing, step], dim=1), torch.cat([step, nothing], dim=1)
            x = torch.cat([(grey - 0.45) / 0.225, before, after], dim=2)
        return x if valid is None else x * valid[:, :, None, None, None]

    def classify(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Features over time (B, T, D) -> logits."""
        logits = self.classifier(self.dropout(x)).float()  # (B, T, 1 or K+1)
        if self.cfg.task == "spot":
            return logits
        logits = logits.squeeze(-1)  # (B, T)
        if valid is not None:
            logits = logits.masked_fill(~valid, float("-inf"))
        if self.cfg.no_peak:
            score = self.attend(x).float().squeeze(-1)  # (B, T)
            score = score if valid is None else score.masked_fill(~valid, float("-inf"))
            pooled = (score.softmax(1)[..., None] * x.float()).sum(1)  # (B, D)
            logits = torch.cat([logits, self.none(pooled).float()], dim=1)  # (B, T+1)
        return logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits -> (B, T, K): probability that the frame is the peak, or holds an event of each class."""
        if self.cfg.task == "spot":
            return logits.softmax(-1)[..., 1:]
        p = logits.softmax(1)
        return (p[:, :-1] if self.cfg.no_peak else p)[..., None]

    def config_dict(self) -> dict:
        """What config.json holds; `from_checkpoint` rebuilds the model from it."""
        return {"model": asdict(self.cfg), "class": type(self).__name__}

    @classmethod
    def from_checkpoint(cls, folder: Path | str, impl: str = "auto") -> "TempoPeak":
        """The model that train/train.py saved in `folder`. UserError for any tensor missing, added or reshaped."""
        config = read_config(folder)
        if config.get("class") != cls.__name__:
            raise UserError(f"{folder}: a checkpoint of {config.get('class')}, expected one of {cls.__name__}")
        try:
            model = cls(TempoPeakConfig(**config["model"]), impl=impl)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder}/config.json: not a configuration of this version ({e}); train again") from e
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
        return model

    def load_imagenet(self, path: Path | str) -> None:
        """Encoder weights from a local torchvision resnet18 file; its classifier `fc` is the only thing left out.

        Shift modules keep their own weights, as do the batch counters, which torchvision's oldest files do not hold.
        """
        state = {k: v for k, v in read_tensors(path).items() if k not in ("fc.weight", "fc.bias")}
        own = self.encoder.state_dict()
        own = {k: v for k, v in own.items() if k.startswith("shifts.") or "num_batches" in k and k not in state}
        load_strict(self.encoder, {**state, **own}, path)


# ---- targets and losses


def bump(centre: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, T: int, kind: str, sigma: float) -> torch.Tensor:
    """How much each frame is the event, 0..1, 1 at its best. centre, lo, hi (...) int64 -> (..., T) float32.

    hard: 1 at `centre`. gaussian: exp(-d^2 / 2 sigma^2) around it. interval: lo..hi alike, blurred by the Gaussian.
    """
    t = torch.arange(T, device=centre.device)
    if kind == "hard":
        return (t == centre[..., None]).float()
    if kind == "gaussian":
        return torch.exp(-((t - centre[..., None]) ** 2) / (2 * sigma**2))
    if kind != "interval":
        raise ValueError(f"targets {kind!r}: expected hard, gaussian or interval")
    kernel = torch.exp(-((t[:, None] - t[None]) ** 2) / (2 * sigma**2))  # (T, T)
    inside = ((t >= lo[..., None]) & (t <= hi[..., None])).float()  # (..., T)
    wide = inside @ kernel  # (..., T)
    return wide / wide.amax(-1, keepdim=True).clamp_min(1e-12)


def peak_targets(
    peak: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, T: int, kind: str, sigma: float, no_peak: bool
):
    """peak, lo, hi (B,) int64, -1: no peak -> probabilities (B, T), or (B, T+1) with no_peak. Rows sum to 1.

    ValueError when a clip has no peak and the model has no logit for that.
    """
    absent = peak < 0
    if not no_peak and bool(absent.any()):
        raise ValueError("a clip without a peak needs a model with no_peak")
    q = bump(peak, lo, hi, T, kind, sigma) * ~absent[:, None]  # (B, T)
    q = torch.cat([q, absent[:, None].float()], dim=1) if no_peak else q
    return q / q.sum(1, keepdim=True)


def peak_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over a clip's frames, mean over clips. logits, target (B, T or T+1); -inf logits are padding.

    What of a target lies on padding goes to the real frames, so that a clip's loss does not depend on its padding.
    """
    padding = logits == float("-inf")
    target = target.masked_fill(padding, 0)
    target = target / target.sum(1, keepdim=True)
    return -(target * logits.float().log_softmax(1).masked_fill(padding, 0)).sum(1).mean()


def spot_targets(events: torch.Tensor, T: int, K: int, kind: str, sigma: float) -> torch.Tensor:
    """events (B, E, 4) int64 [frame, class 1..K, lo, hi], -1 rows are padding -> class probabilities (B, T, K+1).

    Near two events of one class the larger bump counts; where bumps of several classes add up to more than 1 they are
    scaled to sum to 1.
    """
    frame, label, lo, hi = events.unbind(-1)  # (B, E)
    each = bump(frame, lo, hi, T, kind, sigma) * (label > 0)[..., None]  # (B, E, T)
    which = F.one_hot(label.clamp_min(0), K + 1)[..., 1:].float()  # (B, E, K)
    out = (each[..., None] * which[:, :, None]).amax(1)  # (B, T, K)
    out = out / out.sum(-1, keepdim=True).clamp_min(1)
    return torch.cat([1 - out.sum(-1, keepdim=True), out], dim=-1)  # (B, T, K+1)


def spot_loss(logits: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor, fg_weight: float) -> torch.Tensor:
    """Cross-entropy per frame, events weighted by fg_weight, mean over real frames. logits, target (B, T, K+1)."""
    weight = torch.full_like(target[0, 0], fg_weight)
    weight[0] = 1.0
    loss = -(weight * target * logits.float().log_softmax(-1)).sum(-1)  # (B, T)
    valid = torch.arange(loss.shape[1], device=loss.device)[None] < lengths[:, None]
    return (loss * valid).sum() / valid.sum()
