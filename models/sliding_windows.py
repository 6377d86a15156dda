"""Scores for every frame of a video of any length, from a model that sees T frames at a time.

Windows overlap, the head and the tail of the video are covered, a video shorter than T is one short window. Images are
held for one batch of windows only; what grows with the video is one number per frame and class.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from utils.run import UserError


def windows(images: Iterable[np.ndarray], T: int, hop: int) -> Iterator[tuple[int, np.ndarray]]:
    """images (H, W, 3) in order -> (first frame, stack (L, H, W, 3)); L = T, or the video's length if that is less.

    Windows start at 0, hop, 2 hop, ..; the last one ends at the last frame.
    """
    if not 1 <= hop <= T:
        raise ValueError(f"windows: hop {hop}, expected 1..{T}, or frames between windows are never seen")
    recent, n = deque(maxlen=T), 0
    for image in images:
        recent.append(image)
        n += 1
        if n >= T and (n - T) % hop == 0:
            yield n - T, np.stack(recent)
    if 0 < n < T:
        yield 0, np.stack(recent)
    elif n > T and (n - T) % hop:
        yield n - T, np.stack(recent)


def fuse(parts: list[tuple[int, np.ndarray]], weighting: str = "triangle") -> np.ndarray:
    """Weighted mean of overlapping windows. parts: (first frame, scores (L, K)) -> (n, K) float64.

    triangle: a frame counts more where a window sees both its sides; uniform: all alike [E2E-Spot].
    """
    n = max(start + len(p) for start, p in parts)
    total, weight = np.zeros((n, parts[0][1].shape[1])), np.zeros((n, 1))
    for start, p in parts:
        L = len(p)
        w = (
            np.minimum(np.arange(1, L + 1), np.arange(L, 0, -1))[:, None]
            if weighting == "triangle"
            else np.ones((L, 1))
        )
        total[start : start + L] += w * p
        weight[start : start + L] += w
    return total / weight


@torch.no_grad()
def score_video(model, images, *, overlap=0.5, weighting="triangle", batch_size=4, device="cpu", dtype=torch.float32):
    """Probabilities (n, K) of each class at each frame. images: iterable of uint8 (H, W, 3) at model.cfg.size.

    model: a TempoPeak; it is put into eval mode and back. ValueError for a video without frames.
    """
    T = model.cfg.clip_len
    device, was_training = torch.device(device), model.training
    model.eval()
    parts, batch = [], []

    def flush():
        x = torch.from_numpy(np.stack([clip for _, clip in batch])).permute(0, 1, 4, 2, 3)  # (B, L, 3, H, W)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            p = model.probabilities(model(x.to(device)))  # (B, L, K)
        parts.extend((start, q) for (start, _), q in zip(batch, p.cpu().double().numpy(), strict=True))
        batch.clear()

    for item in windows(images, T, max(1, round(T * (1 - overlap)))):
        batch.append(item)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    model.train(was_training)
    if not parts:
        raise ValueError("score_video: no frames")
    scores = fuse(parts, weighting)
    if not np.isfinite(scores).all():
        raise UserError("the model's scores are not finite; use --dtype fp32, or another checkpoint")
    return scores


def within(scores: np.ndarray, reach: int = 2) -> np.ndarray:
    """(n, K) probabilities of "the peak is here" -> of "the peak is at most `reach` frames from here", at most 1."""
    kernel = np.ones(2 * reach + 1)
    near = [np.convolve(s, kernel)[reach : reach + len(s)] for s in scores.T]  # K arrays (n,)
    return np.stack(near, axis=1).clip(max=1.0)


def candidates(scores: np.ndarray, classes: list[str], floor: float = 0.01) -> list[dict]:
    """Every frame and class with a score of at least `floor`, as events {frame, label, score}, before NMS."""
    frames, labels = np.nonzero(scores >= floor)
    return [
        {"frame": int(f), "label": classes[k], "score": min(1.0, float(scores[f, k]))}
        for f, k in zip(frames, labels, strict=True)
    ]
