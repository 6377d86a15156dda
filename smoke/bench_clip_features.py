"""Does reading precomputed CLIP features beat computing them? Cost of a frame by parts, then training iterations.

    python smoke/bench_clip_features.py                                          # rendered 640 x 480 px, about 30 s on an idle core
    python smoke/bench_clip_features.py --folder datasets/scannet/bench --workers 8 --device cuda   # that disk, that GPU

Writes --frames pictures and their features into --folder, which must not exist and is removed at the end; the disk it
lies on is what is measured. Medians a frame, one process:
    picture    the jpg is read and decoded; its bytes
    conv       on the device: copy, normalise, patch convolution (together with `picture`: online)
    features   the file is read; warm: it is in memory already; cold: it was dropped from memory first (Linux)
Then, both ways, frames a second through a DataLoader alone, and iterations of models/bifusion.py (forward, backward) on
--points points a frame behind it: time of one, the part of it spent waiting for the loader; the rest the device is
busy. In a real run the 3D network comes on top, so that a loader that is fast enough is hidden.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.clip_features import read_features, write_features
from data.esam_views import read_picture
from data.rooms import Room
from models.bifusion import BiFusion, ImageBranch, random_patch_weights
from utils import run
from utils.posed_views import View

SIZE, CHANNELS, ITERATIONS = (480, 640), 96, 6


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--folder", default=None, help="new folder on the disk to measure (default: a temporary one)")
    p.add_argument("--frames", type=int, default=24, help="files of each kind (default 24)")
    p.add_argument("--points", type=int, default=20_000, help="points of a frame (default 20000)")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def write_files(folder: Path, frames: int, seed: int, branch: ImageBranch) -> None:
    """0.jpg, 0.pt, ...: views of one room."""
    room = Room(seed, 0, SIZE, lap=frames)
    for k in range(frames):
        Image.fromarray(room[k].colour).save(folder / f"{k}.jpg", quality=90)
        picture = torch.from_numpy(read_picture(folder / f"{k}.jpg")).permute(2, 0, 1)[None]
        pix, whole = branch.encode(picture)
        write_features(folder / f"{k}.pt", pix[0], whole[0], branch.fingerprint(), SIZE)


def picture_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(read_picture(path).transpose(2, 0, 1)))


class Frames(Dataset):
    """Views of random points; with their picture, or its features."""

    def __init__(self, folder: Path, frames: int, points: int, length: int, offline: bool):
        self.folder, self.frames, self.length, self.offline = folder, frames, length, offline
        g = torch.Generator().manual_seed(0)
        uv = torch.rand((points, 2), generator=g) * torch.tensor([SIZE[1] - 1.0, SIZE[0] - 1.0])
        zeros, camera = torch.zeros(points, 3), torch.rand((points, 3), generator=g) * 3 + 0.5
        which = torch.zeros(points, dtype=torch.int64)
        self.view = View(zeros, zeros, which, uv=uv, size=SIZE, camera=camera, pose=torch.eye(4))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> View:
        stem = self.folder / str(k % self.frames)
        extra = {"features": read_features(stem.with_suffix(".pt"))} if self.offline else {}
        extra |= {} if self.offline else {"picture": picture_of(stem.with_suffix(".jpg"))}
        return View(**{**vars(self.view), **extra})


def synchronise(r) -> None:
    if r.device.type == "cuda":
        torch.cuda.synchronize(r.device)


def milliseconds(call, items: list, r, before=None) -> float:
    """Median of call(item) over the items; before(item) is not timed."""
    times = []
    for item in items:
        if before:
            before(item)
        start = time.perf_counter()
        call(item)
        synchronise(r)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def drop(path: Path) -> None:
    """Ask the system to forget a file that is on the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parts(folder: Path, frames: int, branch: ImageBranch, r) -> dict[str, float]:
    """ms a frame"""
    jpgs, features = ([folder / f"{k}.{kind}" for k in range(frames)] for kind in ("jpg", "pt"))
    pictures = [picture_of(p) for p in jpgs]

    def conv(picture: torch.Tensor) -> None:
        branch.encode(picture[None].to(r.device))

    milliseconds(conv, pictures[:3], r)  # warms up
    out = {"picture": milliseconds(picture_of, jpgs, r), "conv": milliseconds(conv, pictures, r)}
    out["features warm"] = milliseconds(read_features, features, r)
    if hasattr(os, "posix_fadvise"):
        out["picture cold"] = milliseconds(picture_of, jpgs, r, drop)
        out["features cold"] = milliseconds(read_features, features, r, drop)
    return out


def iterate(loader: DataLoader, model: BiFusion, r) -> tuple[float, float]:
    """Seconds of one iteration, and how much of it was waiting for the loader; the first one is not counted."""
    times, waits, start = [], [], time.perf_counter()
    for views in loader:
        arrived = time.perf_counter()
        views = [v.to(r.device) for v in views]
        x = [torch.ones((len(v), CHANNELS), device=r.device) for v in views]
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            out, _ = model(x, views)
        torch.cat(out).float().square().mean().backward()
        synchronise(r)
        times.append(time.perf_counter() - start)
        waits.append(arrived - start)
        start = time.perf_counter()
    return statistics.mean(times[1:]), statistics.mean(waits[1:])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, frames=(3, 10**5), points=(1, 10**6), batch_size=(1, 4096), workers=(0, 1024))
    r = run.start(args, argv)
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=args.folder is None)
    try:
        # ---- files, model
        model = BiFusion(CHANNELS)
        random_patch_weights(model.image, args.seed)
        write_files(folder, args.frames, args.seed, model.image)
        model.to(r.device)
        kb = {
            kind: sum(p.stat().st_size for p in folder.glob(f"*.{kind}")) / args.frames / 1e3 for kind in ("jpg", "pt")
        }
        print(f"a picture {kb['jpg']:.0f} kB, its features {kb['pt']:.0f} kB")

        # ---- by parts
        cost = parts(folder, args.frames, model.image, r)
        print("ms a frame: " + ", ".join(f"{name} {ms:.1f}" for name, ms in cost.items()))

        # ---- loader, iterations
        length, result = args.batch_size * ITERATIONS, []
        for name, offline in (("online", False), ("offline", True)):
            frames = Frames(folder, args.frames, args.points, length, offline)
            loader = DataLoader(frames, args.batch_size, num_workers=args.workers, collate_fn=list)
            start = time.perf_counter()
            rate = sum(len(views) for views in loader) / (time.perf_counter() - start)
            step, wait = iterate(loader, model, r)
            result.append(
                f"{name} {rate:.0f} frames/s, iteration {1e3 * step:.0f} ms (loader {100 * wait / step:.0f} %)"
            )
            print(f"{result[-1]}, device busy {100 * (1 - wait / step):.0f} %")
    finally:
        shutil.rmtree(folder)

    # ---- result
    online = cost["picture"] + cost["conv"]
    words = f"online {online:.1f} ms a frame, offline {cost['features warm']:.1f} warm"
    if "features cold" in cost:
        words += f", {cost['features cold']:.1f} cold (online cold {cost['picture cold'] + cost['conv']:.1f})"
    run.finish(r, args, "ESAM", f"{words}; {'; '.join(result)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
