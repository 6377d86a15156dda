"""Prepare ScanNet or ScanNet200 for single views (sv) or clips (mv): sampled points, labels, superpoints, an index.

    python data/prepare_scannet.py datasets/scannet datasets/scannet200_sv --views sv --workers 8
    python data/prepare_scannet.py datasets/scannet datasets/scannet200_mv --views mv --workers 8
    python data/prepare_scannet.py datasets/scannet datasets/scannet200_sv --views sv --pack-clip  # index anew
    python data/prepare_scannet.py datasets/rooms datasets/rooms_sv --rooms 4 --views sv         # rendered, no download

RAW holds 2D/<scene>/{color,depth,pose}/ (every 20th frame), 3D/<scene>/ (mesh, aggregation, segs, txt) and meta_data/
(scannetv2-labels.combined.tsv, scannetv2_train.txt, scannetv2_val.txt): data/scannet.py shows it. Single views keep
every 10th exported frame, clips every 2nd. Files that exist are kept, so a stopped run goes on where it was, and the
index can be written anew; data/scannet_samples.py says what lies in OUT. A train frame needs about 0.85 MB, others
0.42 MB (measured on real frames): ScanNet200 about 10 GB for single views, 50 GB for clips.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.room_files import write_scannet
from data.scannet import read_split
from data.scannet_samples import STRIDE, Preparation, claim, pack_features, prepare_scene, write_index
from utils import run
from utils.run import UserError
from utils.scannet_classes import CLASS_SETS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("raw", metavar="RAW", help="folder of the export: 2D/, 3D/, meta_data/")
    p.add_argument("out", metavar="OUT", help="folder to write, or to go on with")
    p.add_argument("--views", default="sv", choices=list(STRIDE), help="sv: single frames; mv: clips of a scene")
    p.add_argument("--dataset", default="scannet200", choices=list(CLASS_SETS), help="set of classes")
    p.add_argument("--split", default="train,val", help="comma-separated: scannetv2_<split>.txt each")
    p.add_argument("--stride", type=int, default=None, help="exported frames from one to the next (sv 10, mv 2)")
    p.add_argument(
        "--points", type=int, default=20_000, help="points of a frame; of train frames twice as many are kept"
    )
    p.add_argument("--superpoints", default="graph", metavar="graph|DIR",
                   help="segment depth and colour, or take DIR/<scene>/<frame>: masks of a segmenter")  # fmt: skip
    p.add_argument(
        "--no-reject", action="store_true", help="label points however far the scan is (default: 5 cm at most)"
    )
    p.add_argument("--bin", action="store_true", help="also write the flat .bin arrays of the released code")
    p.add_argument("--extra-tag", default=None, metavar="TAG",
                   help="first word of the index' name (default: <dataset>_<views>)")  # fmt: skip
    p.add_argument("--pack-clip", action="store_true", help="put the paths of precomputed CLIP features into the index")
    p.add_argument("--clip-suffix", default=".pt", help="ending of the feature files, for --pack-clip")
    p.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    p.add_argument("--rooms", type=int, default=0, metavar="N",
                   help="first render RAW: N rooms for train, half as many for val, of 20 frames")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.stride = STRIDE[args.views] if args.stride is None else args.stride
    run.check_ranges(
        args, stride=(1, 10**6), points=(1, 10**7), workers=(0, 1024), rooms=(0, 1000), seed=(0, 2**32 - 1)
    )
    if not args.clip_suffix.startswith(".") or len(args.clip_suffix) < 2:
        raise UserError(f"--clip-suffix {args.clip_suffix}: expected an ending with its dot, as .pt")
    raw, masks = Path(args.raw), None if args.superpoints == "graph" else Path(args.superpoints)
    if masks is not None and not masks.is_dir():
        raise UserError(f"--superpoints {masks}: no such folder; expected one of <scene>/<frame> masks, or graph")
    if args.rooms and raw.exists():
        raise UserError(f"{raw}: exists already; leave out --rooms to use it, or choose a new folder")
    if args.rooms:
        n, val = args.rooms, (args.rooms + 1) // 2
        names = [f"scene{k:04d}_00" for k in range(n + val)]
        write_scannet(raw, args.seed, {"train": names[:n], "val": names[n:]}, frames=20)
    splits = {split: read_split(raw, split) for split in args.split.split(",")}
    prep = Preparation(
        raw, Path(args.out), args.views, args.dataset, args.stride, args.points, 2 * args.points, masks,
        None if args.no_reject else 0.05, args.bin,
    )  # fmt: skip
    claim(prep)

    # ---- frames
    for split, scenes in splits.items():
        work = partial(prepare_scene, p=prep, split=split)
        if args.workers:
            with ProcessPoolExecutor(args.workers) as pool:
                found = list(pool.map(work, scenes))
        else:
            found = [work(scene) for scene in scenes]
        rows = [row for part, _ in found for row in part]

        # ---- index
        features = ""
        if args.pack_clip:
            there, total = pack_features(rows, raw, args.clip_suffix)
            features = f", {there} of {total} CLIP features are there" + (
                " (the others are computed online)" if there < total else ""
            )
        path = prep.out / f"{args.extra_tag or f'{args.dataset}_{args.views}'}_infos_{split}.json"
        write_index(path, prep, split, rows)
        print(f"{path}: {len(scenes)} scenes, {len(rows)} items, {sum(n for _, n in found)} files written{features}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
