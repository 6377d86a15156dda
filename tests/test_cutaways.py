"""data/cutaways.py: scenes without the game and the cuts to them."""

import numpy as np
import pytest
import torch

from data.cutaways import close_up, cutaway, graphics, texture, transition

T, H, W = 20, 24, 40


def game() -> torch.Tensor:
    """A dark court with a bright square that moves to the right, uint8 (T, 3, H, W)."""
    clip = torch.full((T, 3, H, W), 40, dtype=torch.uint8)
    for t in range(T):
        clip[t, :, 10:14, t : t + 4] = 220
    return clip


@pytest.mark.parametrize("scene", [cutaway, close_up, texture, graphics])
def test_scenes_depend_on_the_generator_alone(scene):
    clip = game()
    again = [scene(clip, np.random.default_rng(3)) for _ in range(2)]
    assert again[0].shape == clip.shape and again[0].dtype == torch.uint8 and torch.equal(*again)
    others = [scene(clip, np.random.default_rng(seed)) for seed in range(4, 10)]
    assert all(not torch.equal(a, again[0]) for a in others)
    assert torch.equal(clip, game())  # the source stays as it is


def test_close_ups_magnify():
    areas = []
    for seed in range(60):
        bright = close_up(game(), np.random.default_rng(seed)).float().mean(1) > 140  # (T, H, W)
        areas.append(bright.flatten(1).sum(1).max().item())
    assert max(areas) > 3 * 16 and min(areas) == 0  # the square grows, or lies outside the picture


def test_textures_and_graphics_move_or_stand():
    def motion(scene, seed):
        return (scene(game(), np.random.default_rng(seed)).float().diff(dim=0).abs().mean()).item()

    for scene in (texture, graphics):
        moved = [motion(scene, seed) for seed in range(30)]
        assert max(moved) > 2 and min(moved) < max(moved) / 3


@pytest.mark.parametrize("first", [True, False])
def test_transitions_change_sides_at_the_cut(first):
    kinds = set()
    for seed in range(40):
        cut = 1 + seed % (T - 1)
        shown = transition(T, H, W, cut, first, np.random.default_rng(seed))
        assert shown.shape == (T, 1, H, W) and shown.dtype == torch.float32 and 0 <= shown.min() <= shown.max() <= 1
        share = shown.mean((1, 2, 3)) if first else 1 - shown.mean((1, 2, 3))  # (T,) of the scene before the cut
        assert (share.diff() <= 1e-6).all() and (share[: cut - 10 if cut > 10 else 0] == 1).all()
        assert (share[cut + 10 :] == 0).all()
        soft = ((shown > 0) & (shown < 1)).any()
        kinds.add("fade" if soft else "wipe" if ((shown.amax((1, 2, 3)) - shown.amin((1, 2, 3))) > 0).any() else "hard")
    assert kinds == {"fade", "wipe", "hard"}
