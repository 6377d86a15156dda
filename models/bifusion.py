"""Bi-Fusion: what the picture shows at a point's source pixel, fused into the point's 3D features by a learned gate.

The picture goes through CLIP's frozen patch convolution alone (Radford et al. 2021, ViT-B/16; no class token, positions
or transformer), computed here or precomputed by data/prepare_clip_features.py, then through a learned 1x1 convolution,
and is sampled at the pixel that the point was measured in, so no projection can go wrong. B views, N points of all of
them, C channels of a point; a picture of H x W px gives a map of h x w cells of 8 px, its right and lower ends padded.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.clip import CLIP_MEAN, CLIP_STD, SINGLE, read_archive
from utils.posed_views import View
from utils.run import UserError
from utils.weights import read_tensors, resolve_snapshot

PATCH, WIDTH = 16, 768  # of ViT-B/16
CHANNELS, CELL = WIDTH // 4, PATCH // 2  # of the map: pixel_shuffle makes 2 x 2 cells of a patch
CODE, OCTAVES, WAVE = 64, 8, 8.0  # numbers of the geometric code; m of its longest wave, the shortest has 6 cm
NEAR = 0.01  # m: points nearer than this to the camera's plane were not measured by it
CONV1 = SINGLE["visual.conv1.weight"]  # transformers' name; without its first word where only the image tower was saved
NAMES = ("visual.conv1.weight", CONV1, CONV1.partition(".")[2])
FUSIONS = ("residual", "gate")


def by_shape(call: Callable[[torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`call` of each tensor, those of one shape stacked into one call."""
    out = [None] * len(tensors)
    for shape in dict.fromkeys(t.shape for t in tensors):
        rows = [i for i, t in enumerate(tensors) if t.shape == shape]
        for i, y in zip(rows, call(torch.stack([tensors[i] for i in rows])), strict=True):
            out[i] = y
    return out


# ---- the picture


class ImageBranch(nn.Module):
    """Views -> maps of `out` channels. The patch convolution is a buffer: nothing trains it; NaN until
    `load_clip_patch_weights`, `random_patch_weights` or a checkpoint fills it. conv_reduce learns on either path."""

    def __init__(self, out: int = 256):
        super().__init__()
        self.register_buffer("conv1_weight", torch.full((WIDTH, 3, PATCH, PATCH), torch.nan))
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)
        self.conv_reduce = nn.Conv2d(CHANNELS, out, 1)

    def fingerprint(self) -> str:
        """SHA-256 of the patch weights and the normalisation: equal where precomputed features are interchangeable."""
        weight = self.conv1_weight.detach().float().cpu().contiguous()
        if not weight.isfinite().all():
            raise ValueError("patch weights are not set; call load_clip_patch_weights or random_patch_weights first")
        constants = repr([*CLIP_MEAN, *CLIP_STD]).encode()
        return hashlib.sha256(weight.numpy().tobytes() + constants).hexdigest()

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pictures: (B, 3, H, W) uint8 RGB. Returns the map (B, 192, h, w) and its mean as patches (B, 768), float32.

        float32 under autocast too, so that it agrees with what was precomputed. Padding has CLIP's mean colour.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures are {tuple(pictures.shape)} {pictures.dtype}, expected (B, 3, H, W) uint8")
        H, W = pictures.shape[2:]
        with torch.autocast(pictures.device.type, enabled=False):
            x = (pictures.float() / 255 - self.mean) / self.std
            x = F.conv2d(F.pad(x, (0, -W % PATCH, 0, -H % PATCH)), self.conv1_weight, stride=PATCH)
            return F.pixel_shuffle(x, 2), x.mean((2, 3))

    def forward(self, views: Sequence[View]) -> tuple[list[torch.Tensor], list[tuple[float, float]], int]:
        """Maps B x (out, h, w); the part of each, (x, y) in 0..1, that is picture; how many views had no features."""
        found = [None if v.features is None else v.features.to(self.mean.dtype) for v in views]
        online = [i for i, f in enumerate(found) if f is None]
        if any(views[i].picture is None for i in online):
            raise ValueError("a view has neither a picture nor precomputed features; the 2D branch needs one of them")
        sizes = [tuple(v.size) for v in views]
        for i, pix in zip(
            online, by_shape(lambda p: self.encode(p)[0], [views[i].picture for i in online]), strict=True
        ):
            found[i], sizes[i] = pix, tuple(views[i].picture.shape[1:])
        for pix, (H, W) in zip(found, sizes, strict=True):
            want = (CHANNELS, -(-H // PATCH) * 2, -(-W // PATCH) * 2)
            if pix.shape != want:
                raise ValueError(f"features are {tuple(pix.shape)}, expected {want} of a picture of {W}x{H} px")
        parts = [
            (W / (pix.shape[2] * CELL), H / (pix.shape[1] * CELL)) for pix, (H, W) in zip(found, sizes, strict=True)
        ]
        return by_shape(self.conv_reduce, found), parts, len(online)


def load_clip_patch_weights(branch: ImageBranch, path: Path | str) -> None:
    """The patch convolution of a CLIP ViT-B/16: a transformers snapshot folder, OpenAI's .pt, a state dict of open_clip.

    UserError when there is none, or it has another shape."""
    path = Path(path).expanduser()
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        folder = resolve_snapshot(str(path), "", (" or ".join(names),))
        state = read_tensors(next(folder / name for name in names if (folder / name).is_file()))
    else:
        state = read_archive(path)
    name = next((name for name in NAMES if name in state), None)
    if name is None:
        raise UserError(f"{path}: holds none of {', '.join(NAMES)}; expected the weights of a CLIP with a ViT-B/16")
    weight = state[name]
    if weight.shape != branch.conv1_weight.shape:
        raise UserError(
            f"{path}: its patch convolution is {tuple(weight.shape)}, expected {tuple(branch.conv1_weight.shape)}; "
            "take a CLIP with a ViT-B/16"
        )
    if not weight.isfinite().all():
        raise UserError(f"{path}: its patch convolution is not finite; take an intact file")
    branch.conv1_weight.copy_(weight)


def random_patch_weights(branch: ImageBranch, seed: int) -> None:
    """Patch weights without CLIP, of about the size that keeps a normalised picture's spread: for rooms and tests."""
    shape = branch.conv1_weight.shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (3 * PATCH * PATCH) ** 0.5
    branch.conv1_weight.copy_(weight)


class MapAttention(nn.Module):
    """Self-attention over all cells of a map, added to it; adds nothing before it has learned. (B, D, h, w) -> same."""

    def __init__(self, dim: int, heads: int = 4):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # (B, hw, D)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, hw, D)
        return x + self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


# ---- the points


def seen(view: View) -> torch.Tensor:
    """(N,) bool: the source pixel lies in the picture, the point before the camera, and its place is known."""
    (H, W), (u, v) = view.size, view.uv.unbind(1)
    inside = (u >= -0.5) & (u < W - 0.5) & (v >= -0.5) & (v < H - 0.5)
    return inside & (view.camera[:, 2] > NEAR) & view.camera.isfinite().all(1) & view.pose.isfinite().all()


def sample(pixels: torch.Tensor, view: View, part: tuple[float, float], valid: torch.Tensor) -> torch.Tensor:
    """Map (D, h, w), of which `part` is picture -> (N, D) float32, bilinear between cells' middles; what is not valid
    has the first cell's. On a GPU the gradient to the map is summed in no fixed order."""
    H, W = view.size
    uv = torch.where(valid[:, None], view.uv, 0)
    x, y = (uv[:, 0] + 0.5) * (2 * part[0] / W) - 1, (uv[:, 1] + 0.5) * (2 * part[1] / H) - 1
    grid = torch.stack([x, y], 1)[None, None]  # (1, 1, N, 2)
    return F.grid_sample(pixels[None].float(), grid, padding_mode="border", align_corners=False)[0, :, 0].T


def geometric_code(camera: torch.Tensor, pose: torch.Tensor, waves: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Where a point lies: camera (N, 3) m, pose (4, 4) camera-to-world, waves (8,) rad / m, valid (N,) bool -> (N, 64).

    Camera coordinates 3, their sines and cosines in octaves 48, viewing ray 3, the first two columns of the camera's
    rotation 6, its place 3 and the point's height 1, both from the middle of the valid points: the world's origin does
    not matter.
    """
    phase = (camera[:, :, None] * waves).flatten(1)  # (N, 24)
    ray = camera / camera.norm(dim=1, keepdim=True).clamp(min=1e-6)
    turn = pose[:3, :3]
    place = -(turn @ ((camera * valid[:, None]).sum(0) / valid.sum().clamp(min=1)))
    height = (camera * turn[2]).sum(1, keepdim=True) + place[2]
    constant = torch.cat([turn[:, :2].T.flatten(), place]).expand(len(camera), 9)
    return torch.cat([camera, phase.sin(), phase.cos(), ray, constant, height], 1)


class BiFusion(nn.Module):
    """Point features and views -> point features with what the picture shows, and figures to log.

    fusion: residual, x + s W [f2, code] with W zero at first, so that nothing changes before it has learned and points
    without a valid pixel keep x. gate: the published convex form s g2 + (1 - s) g3, s = 0 without a valid pixel; it
    changes the features from the first step. s per channel in 0..1. tiny_sa_2d: self-attention over the map.
    expects_features (set it where features were precomputed): every view without counts as a fallback; otherwise only
    beside views that have some.
    """

    def __init__(self, channels: int = 96, fusion: str = "residual", tiny_sa_2d: bool = False, image_dim: int = 256):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion {fusion!r}: expected one of {FUSIONS}")
        self.fusion, self.expects_features = fusion, False
        self.image = ImageBranch(image_dim)
        self.attention = MapAttention(image_dim) if tiny_sa_2d else None
        self.image_proj, self.code_proj = nn.Linear(image_dim, 128), nn.Linear(CODE, 32)
        waves = 2 * torch.pi / WAVE * 2.0 ** torch.arange(OCTAVES)
        self.register_buffer("waves", waves, persistent=False)
        if fusion == "residual":
            self.gate = nn.Linear(128 + 32 + channels, channels)
            self.delta = nn.Linear(128 + 32, channels)
            nn.init.zeros_(self.delta.weight)
            nn.init.zeros_(self.delta.bias)
        else:
            self.point_proj = nn.Linear(channels, 128)
            self.image_head, self.point_head = nn.Linear(128 + 32, channels), nn.Linear(128 + 32, channels)
            self.gate = nn.Linear(2 * channels, channels)

    def forward(
        self, x: Sequence[torch.Tensor], views: Sequence[View]
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """x: B x (N, C). Returns B x (N, C); gate_mean over valid points, valid_ratio of points, fallback_count of views
        whose features were computed here although others have precomputed ones."""
        sizes = [len(f) for f in x]
        if sizes != [len(v) for v in views]:
            raise ValueError(f"features of {sizes} points, views of {[len(v) for v in views]}")
        maps, parts, online = self.image(views)
        if self.attention is not None:
            maps = by_shape(self.attention, maps)
        seeing = [seen(v) for v in views]
        samples = torch.cat([sample(*rows) for rows in zip(maps, views, parts, seeing, strict=True)])  # (N, D)
        valid, points = torch.cat(seeing)[:, None], torch.cat(list(x))
        code = [
            geometric_code(torch.where(ok[:, None], v.camera, 0), v.pose.nan_to_num(), self.waves, ok)
            for v, ok in zip(views, seeing, strict=True)
        ]
        seen2d = torch.cat([F.relu(self.image_proj(samples)), F.relu(self.code_proj(torch.cat(code)))], 1)  # (N, 160)
        if self.fusion == "residual":
            gate = torch.sigmoid(self.gate(torch.cat([seen2d, points], 1)))
            fused = torch.where(valid, points + gate * self.delta(seen2d), points)
        else:
            seen3d = torch.cat([F.relu(self.point_proj(points)), seen2d[:, 128:]], 1)
            flat, deep = self.image_head(seen2d), self.point_head(seen3d)
            gate = torch.sigmoid(self.gate(torch.cat([flat, deep], 1)))
            fused = torch.where(valid, gate * flat + (1 - gate) * deep, deep)
        fallback = online if self.expects_features or online < len(views) else 0
        return list(fused.split(sizes)), self.figures(gate.detach().float(), valid, fallback)

    @staticmethod
    def figures(gate: torch.Tensor, valid: torch.Tensor, fallback: int) -> dict[str, torch.Tensor]:
        """gate (N, C), valid (N, 1). Scalars on the same device."""
        mean = (gate.mean(1, keepdim=True) * valid).sum() / valid.sum().clamp(min=1)
        return {
            "gate_mean": mean, "valid_ratio": valid.float().mean(), "fallback_count": gate.new_full((), float(fallback))
        }  # fmt: skip
