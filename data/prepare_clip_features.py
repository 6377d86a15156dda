"""Precompute CLIP's patch convolution of every picture that an index names, for route bif of train/train_esam.py.

    python data/prepare_clip_features.py --index datasets/sv/scannet200_sv_infos_*.json --raw datasets/scannet \\
        --clip weights/clip-vit-b16 --workers 8 --device-list cuda:0,cuda:1
    python data/prepare_clip_features.py --index datasets/rooms_sv/*_infos_*.json --raw datasets/rooms --clip random
    python data/prepare_clip_features.py ... --verify 20       # 20 files against what the network computes

RAW/2D/<scene>/color/0.jpg gives RAW/clip_feat/<scene>/color/0.pt, unless the index names another file (--pack-clip of
data/prepare_scannet.py). Files that exist are kept, if they are of the same weights; a missing one is no error in
training, the network computes it and counts it. Numbers are kept in half precision, computed in fp32. With --out, link
RAW/clip_feat to OUT/clip_feat, because that is where training looks.

Whether it pays: a file has 1.85 MB (640 x 480 px), the picture 0.05 to 0.1 MB: ScanNet200 has 24 GB for single views,
115 GB for clips. One CPU core takes 25 ms for the convolution and 2 ms to decode, 1 ms to read a file that is in memory
and 4 to 6 ms from a local disk (measured), of seconds for a training step there. On a GPU the convolution is 0.7 GMAC,
so decoding against reading decides, and a slow or shared disk loses: smoke/bench_clip_features.py tells on yours.
"""

import argparse
import random
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.clip_features import check_features, index_features, read_features, write_features
from data.esam_views import read_picture
from data.scannet_samples import read_index
from models.bifusion import ImageBranch, load_clip_patch_weights, random_patch_weights
from utils import run
from utils.run import UserError

LIMIT = 1e-3  # relative L2 between precomputed and computed, behind conv_reduce


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--index", nargs="+", required=True, help="json files that data/prepare_scannet.py wrote")
    p.add_argument("--raw", required=True, help="folder of the export, where the pictures are")
    p.add_argument("--clip", required=True, metavar="DIR|random",
                   help="CLIP ViT-B/16: transformers snapshot, OpenAI .pt, open_clip file; random: weights of --seed")  # fmt: skip
    p.add_argument("--out", default=None, help="folder for clip_feat/ (default: RAW)")
    p.add_argument("--verify", type=int, default=0, metavar="N", help="write nothing, compare N files with the network")
    p.add_argument("--device-list", default="auto", help="devices in turn, as cuda:0,cuda:1")
    p.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    return p.parse_args(argv)


class Pictures(Dataset):
    """Files -> uint8 (3, H, W)."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, k: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(read_picture(self.paths[k]).transpose(2, 0, 1)))


def make_branches(args: argparse.Namespace) -> list[ImageBranch]:
    """One for each device, all of the same weights."""
    devices = [run.choose_device(name.strip()) for name in args.device_list.split(",")]
    torch.manual_seed(args.seed)  # of conv_reduce, for --verify
    branch = ImageBranch()
    if args.clip == "random":
        random_patch_weights(branch, args.seed)
    else:
        load_clip_patch_weights(branch, args.clip)
    branches = []
    for device in devices:
        branches.append(ImageBranch().to(device))
        branches[-1].load_state_dict(branch.state_dict())
    return branches


def write_all(todo: dict[Path, Path], branches: list[ImageBranch], weights: str, workers: int) -> None:
    """{picture: file}. The devices take turns; a result is fetched when each has got its next picture."""
    pending: deque = deque()

    def finish() -> None:
        target, pix, whole, size = pending.popleft()
        write_features(target, pix[0], whole[0], weights, size)

    loader = DataLoader(Pictures(list(todo)), batch_size=None, num_workers=workers)
    for k, (target, picture) in enumerate(zip(todo.values(), loader, strict=True)):
        branch = branches[k % len(branches)]
        pending.append((target, *branch.encode(picture[None].to(branch.mean.device)), tuple(picture.shape[1:])))
        if len(pending) > len(branches):
            finish()
    while pending:
        finish()


@torch.no_grad()
def verify(files: dict[Path, Path], branch: ImageBranch, weights: str, count: int, seed: int) -> None:
    """Prints the largest relative L2 of `count` random files; UserError at 1e-3."""
    chosen = random.Random(seed).sample(list(files), min(count, len(files)))
    worst = 0.0
    for k, picture in enumerate(DataLoader(Pictures(chosen), batch_size=None)):
        path, device = files[chosen[k]], branch.mean.device
        stored = read_features(path, weights, tuple(picture.shape[1:])).to(device).float()
        a, b = branch.conv_reduce(stored[None]), branch.conv_reduce(branch.encode(picture[None].to(device))[0])
        error = float((a - b).norm() / b.norm())
        if not error < LIMIT:
            raise UserError(f"{path}: differs from what the network computes by {error:.2g} of its norm, expected below "
                            f"{LIMIT:g}; delete the files and write them again")  # fmt: skip
        worst = max(worst, error)
    print(f"{len(chosen)} of {len(files)} files verified: relative L2 at most {worst:.2g} (limit {LIMIT:g})")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, verify=(0, 10**9), workers=(0, 1024), seed=(0, 2**32 - 1))
    raw, out = Path(args.raw), Path(args.out or args.raw)
    if not raw.is_dir():
        raise UserError(f"--raw {raw}: no such folder; expected the export that the index was made of")
    names = index_features([row for path in args.index for row in read_index(path)[1]])
    files = {raw / image: out / feature for image, feature in names.items()}
    branches = make_branches(args)
    weights = branches[0].fingerprint()
    if args.verify:
        verify(files, branches[0], weights, args.verify, args.seed)
        return

    # ---- write what is not there
    there = [target for target in files.values() if target.exists()]
    for target in there:
        check_features(target, weights)
    todo = {image: target for image, target in files.items() if not target.exists()}
    start = time.perf_counter()
    write_all(todo, branches, weights, args.workers)
    seconds = time.perf_counter() - start
    size = sum(target.stat().st_size for target in files.values()) / 1e9
    rate = f" in {seconds:.1f} s ({len(todo) / seconds:.1f} a second)" if todo else ""
    print(f"{out}: {len(todo)} files written{rate}, {len(there)} kept, {size:.3f} GB, weights {weights[:12]}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
