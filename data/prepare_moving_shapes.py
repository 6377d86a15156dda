"""Write unseen rendered shapes as files: pictures and videos with labels in the field's formats, to predict on and score.

python data/prepare_moving_shapes.py datasets/shapes                       # 100 pictures, 24 videos of 20 frames, seconds
python eval/infer_segment.py datasets/shapes/images --ckpt runs/shapes/last --task panoptic --out runs/shapes/panoptic
python eval/eval_panoptic.py --pred runs/shapes/panoptic/panoptic.json --labels datasets/shapes/panoptic.json
python eval/infer_segment.py datasets/shapes --ckpt runs/all/last --task vos --masks datasets/shapes/Annotations/480p \\
    --out runs/all/vos
python eval/eval_vos.py --pred runs/all/vos/vos --labels datasets/shapes/Annotations/480p

OUT/images/ with panoptic.json and panoptic/ (COCO panoptic), JPEGImages/480p and Annotations/480p (DAVIS: the things of
the first frame and those that enter later), instances.json (YouTube-VIS), vps.json with vps/ (VIPSeg). Of three videos
one has a thing that is wholly hidden for a while, one a thing that leaves and comes back. The seed is another than that
of training and of validation, so no scene is shared.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.moving_shapes import THING, MovingShapes
from data.segment_batch import Scene
from utils import run
from utils.masks import rle_encode
from utils.run import UserError, new_folder
from utils.segment_writing import ids_to_rgb, save_picture, with_categories
from utils.video_writing import save_palette, segment

SEED = 2 * 10**6  # added to --seed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("out", metavar="OUT", help="folder to write; must not exist yet")
    p.add_argument("--pictures", type=int, default=100, help="pictures")
    p.add_argument("--videos", type=int, default=24, help="videos")
    p.add_argument("--frames", type=int, default=20, help="frames of a video")
    p.add_argument("--size", type=int, default=64, help="pixels of a side")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    return p.parse_args(argv)


def segments_info(scene: Scene, ids: np.ndarray, categories: list[int]) -> list[dict]:
    """COCO panoptic's segments_info of a picture or frame, ids (H, W)."""
    rows = zip(scene.ids.tolist(), scene.labels.tolist(), scene.crowd.tolist(), strict=True)
    found = [(segment(i, categories[y], ids == i, 1.0), c) for i, y, c in rows if (ids == i).any()]
    return [{**{k: v for k, v in s.items() if k != "score"}, "iscrowd": int(c)} for s, c in found]


def write_pictures(root: Path, source: MovingShapes) -> None:
    """images/, panoptic.json and panoptic/."""
    images, rows = [], []
    for k in range(len(source)):
        scene, name = source.scene(0, k), f"{k + 1:012d}"
        save_picture(root / "images" / f"{name}.png", scene.image)
        save_picture(root / "panoptic" / f"{name}_ids.png", ids_to_rgb(np.where(scene.void, 0, scene.masks)))
        H, W = scene.image.shape[:2]
        images.append({"id": k + 1, "file_name": f"{name}.png", "height": H, "width": W})
        info = segments_info(scene, scene.masks, source.category_ids)
        rows.append({"image_id": k + 1, "file_name": f"{name}_ids.png", "segments_info": info})
    write_json(root / "panoptic.json", {"images": images, **categories_of(rows, source)})


def write_videos(root: Path, source: MovingShapes) -> None:
    """DAVIS's folders, instances.json, vps.json and vps/."""
    videos, tracks, tubes, about = [], [], [], []
    for k in range(len(source)):
        scene, name = source.scene(0, k), f"video_{k:03d}"
        files = [f"{t:05d}.png" for t in range(len(scene.image))]
        rows = []
        for file, image, ids in zip(files, scene.image, scene.masks, strict=True):
            save_picture(root / "JPEGImages/480p" / name / file, image)
            objects = np.where(ids >= THING, ids - THING + 1, 0).astype(np.uint8)
            save_palette(root / "Annotations/480p" / name / file, objects)
            save_picture(root / "vps" / name / file, ids_to_rgb(ids))
            rows.append({"file_name": file, "segments_info": segments_info(scene, ids, source.category_ids)})
        T, H, W = scene.masks.shape
        paths = [f"{name}/{file}" for file in files]
        videos.append({"id": k + 1, "width": W, "height": H, "length": T, "file_names": paths})
        tubes.append({"video_id": name, "annotations": rows})
        about.append({"video_id": name, "images": [{"file_name": f, "height": H, "width": W} for f in files]})
        for i, y in zip(scene.ids.tolist(), scene.labels.tolist(), strict=True):
            if i >= THING:
                masks = scene.masks == i
                codes = [rle_encode(m) if m.any() else None for m in masks]
                areas = [int(m.sum()) if m.any() else None for m in masks]
                track = {"id": len(tracks) + 1, "video_id": k + 1, "category_id": source.category_ids[y]}
                tracks.append({**track, "iscrowd": 0, "segmentations": codes, "areas": areas, "bboxes": [None] * T})
    things = [c for c in categories_of([], source)["categories"] if c["isthing"]]
    write_json(root / "instances.json", {"videos": videos, "annotations": tracks, "categories": things})
    write_json(root / "vps.json", {"videos": about, **categories_of(tubes, source)})
    names = "".join(f"{v['video_id']}\n" for v in about)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text(names, encoding="utf-8")


def categories_of(rows: list[dict], source: MovingShapes) -> dict:
    return with_categories(rows, source.classes, source.category_ids, source.is_thing)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, pictures=(1, 10**6), videos=(1, 10**5), frames=(2, 10**4), size=(32, 1024), seed=(0, 10**6))
    root = Path(args.out)
    if root.exists():
        raise UserError(f"{root}: exists already; choose a new folder, or delete it")
    with new_folder(root) as folder:
        write_pictures(folder, MovingShapes(args.pictures, SEED + args.seed, args.size))
        write_videos(folder, MovingShapes(args.videos, SEED + args.seed + 1, args.size, frames=args.frames, empty=0.0))
    print(f"{root}: {args.pictures} pictures, {args.videos} videos of {args.frames} frames, {args.size} px")


if __name__ == "__main__":
    sys.exit(run.cli(main))
