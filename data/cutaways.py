"""What a broadcast shows when it does not show the game: close-ups, moving graphics, panned pictures; and the cuts to it.

Training clips are cut to these scenes (data/peak_labels.py, --splice), so that a spotter stays silent on pictures that
its labelled videos do not contain. Every function draws from the generator it is given and from nothing else.

Shapes: T frames, H W pixels; clips are uint8 (T, 3, H, W).
"""

import numpy as np
import torch
import torch.nn.functional as F


def cutaway(clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A scene as long and as large as `clip` uint8 (T, 3, H, W): a close-up of it, a panned texture, or graphics."""
    return (close_up, texture, graphics)[rng.integers(3)](clip, rng)


def close_up(clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The clip magnified 1.8 to 5 times around a point that drifts: players and crowd as large as never in the game."""
    T = len(clip)
    zoom = np.linspace(*rng.uniform(1.8, 5, 2), T) if rng.random() < 0.5 else np.full(T, rng.uniform(1.8, 5))
    path = np.linspace(rng.uniform(-0.8, 0.8, 2), rng.uniform(-0.8, 0.8, 2), T)  # (T, 2) centre, -1..1
    theta = torch.zeros(T, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.from_numpy(1 / zoom)
    theta[:, :, 2] = torch.from_numpy(path * (1 - 1 / zoom)[:, None])  # stay inside the picture
    grid = F.affine_grid(theta, list(clip.shape), align_corners=False)  # (T, H, W, 2)
    out = F.grid_sample(clip.float(), grid, padding_mode="border", align_corners=False)  # (T, 3, H, W)
    if rng.random() < 0.5:
        out = out.flip(3)
    grain = torch.from_numpy(rng.standard_normal((1, 3, *clip.shape[2:]), np.float32)) * float(rng.uniform(0, 25))
    return (out + grain).round().clamp(0, 255).to(torch.uint8)  # fixed grain: detail that magnification has lost


def texture(clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A random picture with structure at every scale (a crowd, a face, a wall), panned and shaken."""
    T, _, H, W = clip.shape
    big, side = torch.zeros(3, 3 * H, 3 * W), 2
    while side < 3 * max(H, W):
        noise = torch.from_numpy(rng.standard_normal((1, 3, side, side), np.float32)) * float(rng.uniform(0.3, 1))
        big += F.interpolate(noise, size=big.shape[1:], mode="bilinear")[0] / (1 + 0.02 * side)
        side *= 2
    big = (128 + 60 * rng.uniform(0.4, 1.2) * big / big.std() + torch.from_numpy(rng.uniform(-60, 60, (3, 1, 1)))).clip(
        0, 255
    )
    pan = np.linspace(rng.uniform(0, 2, 2), rng.uniform(0, 2, 2), T) if rng.random() < 0.7 else np.ones((T, 2))
    shake = np.cumsum(rng.normal(0, 0.004, (T, 2)), axis=0)
    ys, xs = (((pan + shake).clip(0, 2) * [H, W]).round().astype(int)).T
    return torch.stack([big[:, y : y + H, x : x + W] for y, x in zip(ys, xs, strict=True)]).to(torch.uint8)


def graphics(clip: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A plain ground and one to five straight-edged areas of colour that slide across it: end cards, wipes, banners."""
    T, _, H, W = clip.shape
    out = torch.from_numpy(rng.uniform(0, 255, (1, 3, 1, 1)).astype(np.float32)).expand(T, 3, H, W).clone()
    for _ in range(rng.integers(1, 6)):
        inside = sliding(T, H, W, rng, speed=rng.choice([0, 0.01, 0.05, 0.2]))  # (T, 1, H, W)
        colour = torch.from_numpy(rng.uniform(0, 255, (1, 3, 1, 1)).astype(np.float32))
        out = torch.where(inside, colour, out)
    return out.to(torch.uint8)


def sliding(T: int, H: int, W: int, rng: np.random.Generator, speed: float) -> torch.Tensor:
    """bool (T, 1, H, W): one side of a straight edge of random direction that moves by `speed` of the picture a frame."""
    angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(-0.6, 0.6)
    y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
    edge = place + rng.choice([-1, 1]) * speed * (np.arange(T) - rng.uniform(0, T))
    return torch.from_numpy(x * np.cos(angle) + y * np.sin(angle) > edge[:, None, None])[:, None]


def transition(T: int, H: int, W: int, cut: int, first: bool, rng: np.random.Generator) -> torch.Tensor:
    """How much of the clip is shown, float (T, 1, H, W) in 0..1; the rest is the other scene. `first`: before the cut.

    A hard cut at frame `cut`, or a fade or wipe of up to 20 frames around it.
    """
    t, kind, width = np.arange(T), rng.integers(3), rng.integers(4, 21)
    if kind == 0:
        shown = (t < cut).astype(np.float32)[:, None, None, None] * np.ones((1, 1, H, W), np.float32)
    else:
        progress = np.clip((t - cut) / width + 0.5, 0, 1)  # 0 before, 1 after
        if kind == 1:
            shown = (1 - progress)[:, None, None, None] * np.ones((1, 1, H, W))
        else:
            angle = rng.uniform(0, 2 * np.pi)
            y, x = np.meshgrid(np.linspace(-1, 1, H), np.linspace(-1, 1, W), indexing="ij")
            where = x * np.cos(angle) + y * np.sin(angle)  # -1.42..1.42
            shown = (where > (progress * 3 - 1.5)[:, None, None]).astype(np.float32)[:, None]
    shown = torch.from_numpy(np.asarray(shown, np.float32))
    return shown if first else 1 - shown
