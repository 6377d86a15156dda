"""models/sliding_windows.py: every frame is covered and weighted right, in constant memory, for any length."""

import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.sliding_windows import candidates, fuse, score_video, windows
from models.tempopeak import TempoPeak, TempoPeakConfig

T = 6
LENGTHS = [1, 2, T - 1, T, T + 1, 2 * T - 1, 2 * T, 5 * T + 3]


def numbered(n: int):
    """n images (2, 3, 3) uint8 that show their own number."""
    for i in range(n):
        yield np.full((2, 3, 3), i, np.uint8)


@pytest.mark.parametrize("n", LENGTHS)
def test_windows_cover_every_frame(n):
    for hop in range(1, T + 1):
        found = list(windows(numbered(n), T, hop))
        for start, stack in found:
            assert stack.shape == (min(n, T), 2, 3, 3) and stack.dtype == np.uint8
            assert stack[:, 0, 0, 0].tolist() == list(range(start, start + min(n, T)))  # the right pictures
        starts = [start for start, _ in found]
        assert starts[0] == 0 and starts[-1] == max(0, n - T)  # head and tail
        assert starts[:-1] == [k * hop for k in range(len(starts) - 1)]
        seen = {t for start, stack in found for t in range(start, start + len(stack))}
        assert seen == set(range(n))
        assert len(starts) == 1 + math.ceil(max(0, n - T) / hop)  # and not one window more than needed


def test_no_images_no_windows():
    assert list(windows(iter(()), T, 2)) == []


@pytest.mark.parametrize("weighting", ["triangle", "uniform"])
@pytest.mark.parametrize("n", LENGTHS)
def test_fuse_against_a_loop(n, weighting):
    rng = np.random.default_rng(n)
    for hop in (1, 2, T - 1, T):
        parts = [(start, rng.random((len(stack), 2))) for start, stack in windows(numbered(n), T, hop)]
        got = fuse(parts, weighting)
        assert got.shape == (n, 2) and got.dtype == np.float64
        for t in range(n):
            pairs = []
            for start, p in parts:
                at, L = t - start, len(p)
                if 0 <= at < L:
                    pairs.append((min(at + 1, L - at) if weighting == "triangle" else 1, p[at]))
            want = sum(w * p for w, p in pairs) / sum(w for w, _ in pairs)
            np.testing.assert_allclose(got[t], want, rtol=1e-12)


@pytest.mark.parametrize("weighting", ["triangle", "uniform"])
def test_fuse_of_constant_windows(weighting):
    """Equal scores stay as they are, and where windows differ by a constant the plain mean lies between them."""
    same = [(start, np.full((T, 3), 0.25)) for start in (0, 2, 4, 5)]
    np.testing.assert_allclose(fuse(same, weighting), np.full((11, 3), 0.25), rtol=1e-12)
    two = fuse([(0, np.zeros((T, 1))), (0, np.ones((T, 1)))], weighting)
    np.testing.assert_allclose(two, 0.5, rtol=1e-12)  # windows over the same frames: the plain mean


# ---- score_video


class Brightness(torch.nn.Module):
    """Stands in for TempoPeak: the score of a frame is its first pixel / 255, whatever else is in the window."""

    def __init__(self, clip_len: int):
        super().__init__()
        self.cfg, self.batches, self.modes = SimpleNamespace(clip_len=clip_len), [], []

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        assert frames.dtype == torch.uint8 and frames.shape[2:] == (3, 2, 3)  # (B, L, 3, H, W)
        self.batches.append(tuple(frames.shape[:2]))
        self.modes.append(self.training)
        return frames[:, :, 0, 0, 0] / 255

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., None]


@pytest.mark.parametrize("n", LENGTHS)
def test_score_video_gives_each_frame_its_score(n):
    for overlap in (0.0, 0.5, 0.9):
        for batch_size in (1, 3):
            model = Brightness(T)
            got = score_video(model, numbered(n), overlap=overlap, batch_size=batch_size)
            np.testing.assert_allclose(got[:, 0], np.arange(n) / 255, atol=1e-6)
            assert got.shape == (n, 1) and max(B for B, _ in model.batches) <= batch_size
            hop = max(1, round(T * (1 - overlap)))
            assert sum(B for B, _ in model.batches) == len(list(windows(numbered(n), T, hop)))


def test_score_video_leaves_the_mode_as_it_was():
    for training in (True, False):
        model = Brightness(T).train(training)
        score_video(model, numbered(9))
        assert model.training is training and not any(model.modes)


def test_score_video_without_frames():
    with pytest.raises(ValueError, match="no frames"):
        score_video(Brightness(T), iter(()))


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_score_video_holds_few_images(overlap):
    """The images come from a generator, are taken once and one at a time, and are let go."""
    alive, most, taken = set(), 0, 0

    def watched(n: int):
        nonlocal most, taken
        for i in range(n):
            image = np.full((2, 3, 3), i % 256, np.uint8)
            alive.add(i)
            weakref.finalize(image, alive.discard, i)
            most, taken = max(most, len(alive)), taken + 1
            yield image

    n = 400
    images = watched(n)
    scores = score_video(Brightness(T), images, overlap=overlap, batch_size=2)
    assert len(scores) == taken == n and next(images, None) is None
    assert most <= T + 2, f"{most} images were alive at once"


@torch.no_grad()
def test_windows_of_a_real_model():
    """Without a head over time every window says the same about a frame: windows = the whole video at once."""
    torch.manual_seed(0)
    cfg = TempoPeakConfig(task="spot", classes=["a", "b"], clip_len=8, size=[16, 16], encoder="tiny", head="identity")
    model = TempoPeak(cfg).eval()
    torch.nn.init.normal_(model.classifier.weight)
    video = np.random.default_rng(0).integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
    whole = model.probabilities(model(torch.from_numpy(video).permute(0, 3, 1, 2)[None]))[0].numpy()
    for weighting in ("triangle", "uniform"):
        got = score_video(model, iter(video), overlap=0.5, weighting=weighting, batch_size=3)
        np.testing.assert_allclose(got, whole, atol=1e-5)


# ---- candidates


def test_candidates():
    scores = np.array([[0.0, 0.01], [0.5, 0.0099], [1.0000001, 1.0]])
    assert candidates(scores, ["a", "b"], floor=0.01) == [
        {"frame": 0, "label": "b", "score": 0.01},
        {"frame": 1, "label": "a", "score": 0.5},
        {"frame": 2, "label": "a", "score": 1.0},
        {"frame": 2, "label": "b", "score": 1.0},
    ]
    assert candidates(np.zeros((4, 1)), ["a"]) == []
    assert type(candidates(scores, ["a", "b"])[0]["frame"]) is int  # json knows no NumPy numbers
