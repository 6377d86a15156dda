"""Prepared frames of ScanNet on disk: what data/prepare_scannet.py writes and data/rgbd_clips.py reads.

    OUT/frames/<scene>/<frame>.npz       xyz, colour (N, 3) uint8, uv, instance, semantic, superpoint, pose,
                                         intrinsics, size
    OUT/scenes/<scene>.npz               clips only: xyz, colour, instance, semantic, segment, axis_align of the scan
    OUT/labels/<split>/<scene>.txt       clips only: the benchmark's labels of its vertices, for eval/eval_scannet.py
    OUT/<tag>_infos_<split>.json         metainfo, data_list: a row per frame (sv) or per scene (mv, plural lists)
    OUT/preparation.json                 the settings; a later run into the same folder must have the same

Single views (sv) have the axes of the world and the origin in the frame's mean, and so has their pose; clips (mv) are
in the world. Of train frames more points are kept than a step takes; of the others a draw that (scene, frame, split)
fix.
Paths in the index are relative to OUT, but those of pictures and CLIP features to the raw export.
"""

import io
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile

import numpy as np

from data.rgbd_folder import RgbdFolder
from data.rgbd_frames import Frame, FramePoints, frame_points, sample, stable_seed, superpoint_map
from data.scannet import (
    TSV,
    PointLabeller,
    Reconstruction,
    benchmark_labels,
    find_file,
    read_label_map,
    read_reconstruction,
    read_scan_text,
    scan_intrinsics,
)  # fmt: skip
from utils.run import UserError, write_text_atomic
from utils.scannet_classes import CLASS_SETS
from utils.scannet_files import write_labels

STRIDE = {"sv": 10, "mv": 2}  # exported frames, which are 20 frames of the recording apart
BINS = {  # upstream's flat arrays: key of the index -> folder
    "pts_path": "points", "super_pts_path": "super_points", "pts_instance_mask_path": "instance_mask",
    "pts_semantic_mask_path": "semantic_mask",
}  # fmt: skip


@dataclass(frozen=True)
class Preparation:
    """views: sv or mv. stride: of exported frames. points: of a frame, outside train. kept: at most so many of a train
    frame. masks: folder of <scene>/<frame> for the superpoints, None: graph segmentation. reject: m, see
    PointLabeller. bins: also write flat arrays."""

    raw: Path
    out: Path
    views: str = "sv"
    classes: str = "scannet200"
    stride: int = 10
    points: int = 20_000
    kept: int = 40_000
    masks: Path | None = None
    reject: float | None = 0.05
    bins: bool = False

    def settings(self) -> dict:
        """What files on disk depend on."""
        return {k: None if v is None else str(v) for k, v in asdict(self).items() if k not in ("raw", "out", "bins")}


def claim(p: Preparation) -> None:
    """Write preparation.json, or UserError when the folder was prepared with other settings."""
    path = p.out / "preparation.json"
    if path.exists() and any((p.out / name).is_dir() for name in ("frames", "scenes")):
        was = json.loads(path.read_text(encoding="utf-8"))
        for key, value in p.settings().items():
            if was.get(key) != value:
                raise UserError(f"{p.out}: was prepared with {key} {was.get(key)}, now {value}; choose another folder")
    p.out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(p.settings(), indent=1) + "\n")


# ---- files


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Under a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed, tmp = io.BytesIO(), path.with_name(f".{path.name}.tmp")
    np.savez_compressed(packed, **arrays)
    try:
        tmp.write_bytes(packed.getvalue())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """UserError when the file is missing, damaged or lacks a key."""
    try:
        with np.load(path) as f:
            return {k: f[k] for k in keys}
    except FileNotFoundError as e:
        raise UserError(f"{path}: is missing, the index names it; run data/prepare_scannet.py again") from e
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as e:
        raise UserError(
            f"{path}: is damaged ({type(e).__name__}: {e}); delete it, run data/prepare_scannet.py again"
        ) from e


IDS = ("instance", "semantic", "superpoint")
FRAME_KEYS = ("xyz", "colour", "uv", *IDS, "pose", "intrinsics", "size")
SCENE_KEYS = ("xyz", "colour", "instance", "semantic", "segment", "axis_align")


def write_points(path: Path, points: FramePoints) -> None:
    """All fields; colours in 8 bits, ids in 32."""
    ids = {k: getattr(points, k).astype(np.int32) for k in IDS}
    colour = np.rint(255 * points.colour).astype(np.uint8)
    write_npz(path, xyz=points.xyz, colour=colour, uv=points.uv, **ids, pose=points.pose, intrinsics=points.intrinsics,
              size=np.array(points.size))  # fmt: skip


def read_points(path: Path) -> FramePoints:
    a = read_npz(path, FRAME_KEYS)
    ids = {k: a[k].astype(np.int64) for k in IDS}
    colour = (a["colour"] / np.float32(255)).astype(np.float32)
    return FramePoints(a["xyz"], colour, a["uv"], a["pose"], a["intrinsics"], tuple(a["size"].tolist()), **ids)


def read_scene(path: Path) -> Reconstruction:
    a = read_npz(path, SCENE_KEYS)
    ids = {k: a[k].astype(np.int64) for k in ("instance", "semantic", "segment")}
    return Reconstruction(a["xyz"], a["colour"], **ids, axis_align=a["axis_align"])


def write_bins(out: Path, name: str, points: FramePoints) -> None:
    """points float32 (N, 6) xyz and rgb 0..255, the others int64 (N,), as the released loaders read them."""
    arrays = {"points": np.c_[points.xyz, 255 * points.colour].astype(np.float32), "super_points": points.superpoint}
    arrays |= {"instance_mask": points.instance, "semantic_mask": points.semantic}
    for folder, values in arrays.items():
        path = out / folder / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.tmp")
        tmp.write_bytes(values.tobytes())
        os.replace(tmp, path)


# ---- a scene


def open_frames(p: Preparation, scene: str) -> RgbdFolder:
    """Every `stride`-th exported frame; the scan's own intrinsics where <scene>.txt has them and no file does."""
    folder = p.raw / "2D" / scene
    frames = RgbdFolder(folder, "folders", stride=p.stride)
    if frames.source == "ScanNet's average":
        own = scan_intrinsics(read_scan_text(p.raw / "3D" / scene / f"{scene}.txt"))
        if own is not None:
            return RgbdFolder(folder, "folders", intrinsics=own, stride=p.stride)
    return frames


def make_points(p: Preparation, scene: str, split: str, frame: Frame, label: PointLabeller) -> FramePoints:
    """Superpoints of the picture, then the draw of points, then their labels; centred for single views."""
    masks = None if p.masks is None else p.masks / scene
    points = frame_points(replace(frame, segment=superpoint_map(frame, masks)))
    count = min(p.kept, len(points)) if split == "train" else p.points
    points = sample(points, count, stable_seed(scene, frame.name, split))
    points.instance, points.semantic = label(points)
    return points.centred() if p.views == "sv" else points


def prepare_scene(scene: str, p: Preparation, split: str) -> tuple[list[dict], int]:
    """Write what is not there yet -> rows of the index (one a frame, or one for the scene), files written."""
    label_map = read_label_map(find_file(p.raw, TSV), p.classes)
    frames, made = open_frames(p, scene), 0
    scan = p.out / "scenes" / f"{scene}.npz"
    paths = [p.out / "frames" / scene / f"{name}.npz" for name in frames.names]
    todo = [k for k, path in enumerate(paths) if not path.is_file()]
    if todo or (p.views == "mv" and not scan.is_file()):
        room = read_reconstruction(p.raw / "3D" / scene, label_map, len(CLASS_SETS[p.classes]))
        label = PointLabeller(room, len(CLASS_SETS[p.classes]), p.reject)
        for k in todo:
            write_points(paths[k], make_points(p, scene, split, frames[k], label))
            made += 1
        if p.views == "mv" and not scan.is_file():
            write_labels(p.out / "labels" / split / f"{scene}.txt", benchmark_labels(room, p.classes))
            write_npz(scan, **{k: getattr(room, k) for k in SCENE_KEYS})
            made += 1
    rows = []
    for entry, path in zip(frames.entries, paths, strict=True):
        name = path.relative_to(p.out).as_posix()
        row = {"frame_path": name, **dict.fromkeys(BINS, name)}
        if p.bins:
            stem = f"{scene}/{entry.name}"
            row |= {key: f"{folder}/{stem}.bin" for key, folder in BINS.items()}
            if not all((p.out / row[key]).is_file() for key in BINS):
                write_bins(p.out, stem, read_points(path))
        pose = read_npz(path, ("pose",))["pose"]
        rows.append(row | {"img_path": entry.colour.relative_to(p.raw).as_posix(), "pose": pose.tolist()})
    return ([{"scene": scene, **row} for row in rows] if p.views == "sv" else [clip_row(p, scene, rows)]), made


def clip_row(p: Preparation, scene: str, rows: list[dict]) -> dict:
    """The rows of a scene's frames as one, names in the plural."""
    scan = p.out / "scenes" / f"{scene}.npz"
    align = read_npz(scan, ("axis_align",))["axis_align"]
    plural = {f"{k}s": [row[k] for row in rows] for k in rows[0]}
    return {"scene": scene, **plural, "scene_path": f"scenes/{scene}.npz", "axis_align_matrix": align.tolist()}


# ---- the index


def feature_path(img_path: str, suffix: str = ".pt") -> str:
    """2D/<scene>/color/0.jpg -> clip_feat/<scene>/color/0.pt: the first part of the path only, and the ending."""
    first, *rest = PurePosixPath(img_path).parts
    return PurePosixPath("clip_feat" if first == "2D" else first, *rest).with_suffix(suffix).as_posix()


def pack_features(rows: list[dict], raw: Path, suffix: str) -> tuple[int, int]:
    """Add clip_feat_path (sv) or clip_feat_paths (mv) to the rows -> files that exist, all."""
    found = total = 0
    for row in rows:
        images = [row["img_path"]] if "img_path" in row else row["img_paths"]
        paths = [feature_path(name, suffix) for name in images]
        row |= {"clip_feat_path": paths[0]} if "img_path" in row else {"clip_feat_paths": paths}
        found, total = found + sum((raw / path).is_file() for path in paths), total + len(paths)
    return found, total


def write_index(path: Path, p: Preparation, split: str, rows: list[dict]) -> None:
    classes = CLASS_SETS[p.classes]
    meta = {
        "dataset": p.classes,
        "views": p.views,
        "split": split,
        "classes": list(classes.values()),
        "ids": list(classes),
    }
    write_text_atomic(path, json.dumps({"metainfo": meta, "data_list": rows}) + "\n")


def read_index(path: Path | str) -> tuple[dict, list[dict]]:
    """metainfo, data_list. UserError when the file is no index or has no rows."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        meta, rows = content["metainfo"], content["data_list"]
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such index; data/prepare_scannet.py writes it") from e
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise UserError(
            f"{path}: is no index of data/prepare_scannet.py ({type(e).__name__}); expected a json of it"
        ) from e
    if not rows or not {"views", "classes"} <= set(meta):
        raise UserError(f"{path}: has no rows or no metainfo; run data/prepare_scannet.py again")
    return meta, rows
