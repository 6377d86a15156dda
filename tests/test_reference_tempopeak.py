"""Temporal shift modules against stored outputs of their originals; clips of the real, labelled videos.

Reads LAB_SHARED/data/tempopeak/module_cases/*.npz, whatever is there (kind_*.npz: in_x, out, sd.<state dict>, cfg_*),
and LAB_SHARED/data/tempopeak/{annotations,videos}.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.peak_files import class_names, load_labels
from data.peak_labels import SUFFIXES, PeakClips, interval
from data.video import VideoReader, iter_frames
from models.temporal_shift import GatedShift, TemporalShift

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "tempopeak"
CASES = sorted((SHARED / "module_cases").glob("*.npz"))
BUILDERS = {  # kind -> module from the cfg_* numbers of a case
    "gsm": lambda cfg: GatedShift(cfg["fPlane"], fuse=False),
    "gsf": lambda cfg: GatedShift(cfg["fPlane"], fuse=True),
    "tsm": lambda cfg: TemporalShift(cfg["fold_div"]),
}
CONFIG_KEYS = {"fPlane", "n_segment", "fold_div"}


def of_kind(kind: str) -> list[Path]:
    files = [f for f in CASES if f.name.startswith(f"{kind}_")]
    if not files:
        pytest.skip(f"no reference cases {kind}_*.npz in {SHARED / 'module_cases'}; set LAB_SHARED")
    return files


def read(path: Path) -> tuple[dict[str, int], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """cfg_* numbers, state dict, input and output (B*T, C, H, W) of a case."""
    with np.load(path) as z:
        cfg = {k.removeprefix("cfg_"): z[k].item() for k in z.files if k.startswith("cfg_")}
        state = {k.removeprefix("sd."): torch.from_numpy(z[k]) for k in z.files if k.startswith("sd.")}
        x, want = torch.from_numpy(z["in_x"]), torch.from_numpy(z["out"])
    assert set(cfg) <= CONFIG_KEYS, f"{path.name}: this test does not know {sorted(set(cfg) - CONFIG_KEYS)}"
    return cfg, state, x, want


@torch.no_grad()
@pytest.mark.parametrize("kind", BUILDERS)
def test_module_equals_the_original(kind):
    files, worst = of_kind(kind), 0.0
    for path in files:
        cfg, state, x, want = read(path)
        module = BUILDERS[kind](cfg).eval()
        module.load_state_dict(state, strict=True)
        got = module(x, cfg["n_segment"])
        assert got.shape == want.shape, f"{path.name}: shape {tuple(got.shape)}, reference {tuple(want.shape)}"
        error = (got - want).abs().max().item()
        assert error <= 1e-5, f"{path.name}: error {error:.1e}"
        worst = max(worst, error)
    print(f"\n{kind}: {len(files)} of {len(files)} cases equal the original, largest error {worst:.1e}")


@torch.no_grad()
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_case_sees_its_neighbours(kind):
    """The cases can fail: with the frames of each clip in another order the stored output is missed by far."""
    for path in of_kind(kind):
        cfg, state, x, want = read(path)
        module = BUILDERS[kind](cfg).eval()
        module.load_state_dict(state, strict=True)
        back = x.unflatten(0, (-1, cfg["n_segment"])).flip(1)  # (B, T, C, H, W)
        got = module(back.flatten(0, 1), cfg["n_segment"]).unflatten(0, (-1, cfg["n_segment"])).flip(1).flatten(0, 1)
        assert (got - want).abs().max() > 1e-2, path.name


def test_every_case_has_a_test():
    rest = [f.name for f in CASES if f.name.split("_")[0] not in (*BUILDERS, "tdeed")]  # tdeed: tests/test_sgp.py
    assert not rest, f"{len(rest)} of {len(CASES)} reference cases are of modules not built here: {', '.join(rest)}"


# ---- real videos


def labelled_videos() -> list[tuple[Path, list[dict]]]:
    """(label file, its videos that are there) for every label file of which at least one video is there."""
    there = {p.stem for p in (SHARED / "videos").glob("*") if p.suffix in SUFFIXES}
    found = []
    for path in sorted((SHARED / "annotations").glob("*.json")):
        items = [v for v in load_labels(path) if v["video"] in there]
        if items:
            found.append((path, items))
    if not found:
        pytest.skip(f"no labelled videos in {SHARED}; set LAB_SHARED")
    return found


def test_clips_of_real_videos(capsys):
    T, size, seen, events = 12, (64, 36), set(), 0
    files = labelled_videos()
    for path, items in files:
        fresh = [v for v in items if v["video"] not in seen]  # one file lists the videos of the others once more
        seen |= {v["video"] for v in fresh}
        for item in fresh:
            share = 1.0 if item["events"] else 0.0
            clips = PeakClips([item], SHARED / "videos", class_names([item]), T, size, events=share, cache_gb=0)
            assert not clips.cached
            with VideoReader(clips.paths[0], size=size) as reader:
                n = len(reader)
                assert n == item["num_frames"], f"{path.name}: {item['num_frames']} frames, the video has {n}"
                for e in item["events"]:
                    lo, hi = interval(e)
                    assert 0 <= lo <= e["frame"] <= hi < n, f"{path.name}: {e} in {n} frames"
                centres = sorted(e["frame"] for e in item["events"])[:: max(1, len(item["events"]) // 2)]
                for start in {0, n - T, *(min(max(0, c - T // 2), n - T) for c in centres)}:
                    clip = clips.clip(0, start)
                    want = reader.read(range(start, start + T))  # (T, H, W, 3)
                    assert np.array_equal(clip["frames"].permute(0, 2, 3, 1).numpy(), want), (item["video"], start)
                    inside = sorted(e["frame"] - start for e in item["events"] if start <= e["frame"] < start + T)
                    rows = clip["events"]
                    assert rows[rows[:, 1] > 0][:, 0].tolist() == inside
            events += len(item["events"])
    with capsys.disabled():
        print(f"\nclips of {len(seen)} of {len(seen)} real videos ({len(files)} label files, {events} events) agree")


def test_cached_clips_equal_sequential_decoding_of_a_real_video():
    path, items = min(labelled_videos(), key=lambda f: f[1][0]["num_frames"] * f[1][0]["width"])
    item, size = items[0], (48, 40)
    clips = PeakClips([item], SHARED / "videos", class_names([item]), 16, size, events=float(bool(item["events"])))
    assert clips.cached
    start = item["num_frames"] // 2
    want = [f.image for f in iter_frames(clips.paths[0], size=size, start=start, stop=start + 16)]
    assert np.array_equal(clips.clip(0, start)["frames"].permute(0, 2, 3, 1).numpy(), np.stack(want)), path.name
