"""The memory of a scene against stored runs of ESAM's adapter: features of every frame and level, and what is kept.

Cases under LAB_SHARED/data/esam/sparse_cases: every memory*.npz there. Tolerance 2e-6 absolute (float32); voxels exact.
"""

import os
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import pytest
import torch

from models.scene_memory import LEVELS, SceneMemory
from models.sparse_conv import SparseTensor, sparse_tensor
from models.sparse_maps import unpack

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
CASES = sorted((SHARED / "sparse_cases").glob("memory*.npz"))


def read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as z:
        return {k: torch.as_tensor(z[k]) for k in z.files if z[k].dtype.kind in "fiu"}


def memory_of(case: dict) -> SceneMemory:
    """With the weights of the case; levels without weights have no adapter. Scale and queue are those of the run."""
    state = {k.removeprefix("w."): v for k, v in case.items() if k.startswith("w.")}
    channels = tuple(case[f"f0.l{i}.in"].shape[1] for i in range(LEVELS))
    levels = tuple(i for i in range(LEVELS) if f"conv_d1.{i}.0.kernel" in state)
    model = SceneMemory(channels, levels, float(case.get("scale", 2.5)), int(case.get("queue", -1)))
    model.load_state_dict(state)
    return model.eval()


def stored(case: dict, frame: int, level: int, coords: str, features: str) -> SparseTensor:
    name = f"f{frame}.l{level}"
    return sparse_tensor(case[f"{name}.{coords}"].long(), case[f"{name}.{features}"], 2 << level)


@pytest.mark.skipif(not CASES, reason=f"no reference cases under {SHARED}")
@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_every_frame_and_level(path, gradients, capsys):
    case = read(path)
    model, state, worst = memory_of(case), None, {}
    frames = sum(1 for _ in takewhile(lambda t: f"f{t}.l0.in" in case, count()))
    for t in range(frames):
        levels = [stored(case, t, i, "coords", "in") for i in range(LEVELS)]
        with torch.set_grad_enabled(gradients):
            out, state = model(levels, state)
        for i in range(LEVELS):
            expected = stored(case, t, i, "coords", "out")
            assert torch.equal(out[i].coords, expected.coords), f"frame {t}, level {i}"
            worst[f"f{t}.l{i}.out"] = float((out[i].features.detach() - expected.features).abs().max())
            if state.levels[i] is not None:
                history = stored(case, t, i, "acc_coords", "acc")
                assert torch.equal(unpack(state.levels[i].keys), history.coords), f"frame {t}, level {i}"
                worst[f"f{t}.l{i}.acc"] = float((state.levels[i].features.detach() - history.features).abs().max())
    good = sum(e <= 2e-6 for e in worst.values())
    with capsys.disabled():
        print(f" {path.stem}: {good} of {len(worst)} tensors, largest difference {max(worst.values()):.1e}", end="")
    assert frames and good == len(worst), worst
