"""Rendered rooms as files: an RGB-D folder that anything reads, and a small ScanNet export with labelled scans.

    color/0.jpg  depth/0.png  pose/0.txt  intrinsic.txt  instance/0.png  label/0.png       write_room
    2D/<scene>/...  3D/<scene>/...  meta_data/                                              write_scannet

Depth is in millimetres. instance/ holds numbers of objects, label/ the class index (data/rooms.py). The scans of the
export are the surfaces that the frames saw, a vertex per voxel, without triangles; classes get ScanNet's ids of the
same or a similar name (NAMES), and vertices the segment of their surface.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from data.rgbd_frames import Frame, frame_points
from data.rooms import CLASSES, Room
from data.scannet import TSV, Reconstruction
from utils.ply_files import write_ply
from utils.run import new_folder

NAMES = {"wall": (1, 1), "floor": (2, 3), "box": (29, 26), "ball": (40, 168), "drum": (39, 120), "table": (7, 4)}
NAMES |= {"chair": (5, 2), "ceiling": (22, 41)}  # nyu40id, id
EVERY = 20  # frames are numbered in steps of 20, as in ScanNet's export


def fuse(frames: list[Frame], voxel: float = 0.04) -> Reconstruction:
    """The first point in each voxel of `voxel` m that the frames saw, with its labels."""
    clouds = [frame_points(frame) for frame in frames]
    xyz = np.concatenate([c.xyz for c in clouds])
    x, y, z = np.floor(xyz / voxel).astype(np.int64).T
    first = np.sort(np.unique((x << 40) + (y << 20) + z, return_index=True)[1])
    rows = (
        np.concatenate([getattr(c, k) for c in clouds])[first] for k in ("colour", "instance", "semantic", "superpoint")
    )
    return Reconstruction(xyz[first], *rows, np.eye(4))


def write_frame(folder: Path, name: str, frame: Frame, labels: bool) -> None:
    """One frame in the layout 'folders'."""
    for kind in ("color", "depth", "pose", *(("instance", "label") if labels else ())):
        (folder / kind).mkdir(exist_ok=True, parents=True)
    Image.fromarray(frame.colour).save(folder / "color" / f"{name}.jpg", quality=95)
    maps = {"depth": np.rint(frame.depth * 1000)}
    maps |= {"instance": frame.instance, "label": frame.semantic} if labels else {}
    for kind, values in maps.items():
        Image.fromarray(values.astype(np.uint16)).save(folder / kind / f"{name}.png")
    np.savetxt(folder / "pose" / f"{name}.txt", frame.pose)


def write_room(folder: Path, room: Room, frames: int) -> None:
    """The first `frames` frames of a room; UserError when the folder is there already."""
    with new_folder(folder) as tmp:
        for k in range(frames):
            write_frame(tmp, str(k), room[k], labels=True)
        np.savetxt(tmp / "intrinsic.txt", room.intrinsics)


def write_scan(folder: Path, scene: Reconstruction) -> None:
    """3D/<scene>: mesh, segments, aggregation, and the alignment."""
    folder.mkdir(parents=True)
    name, groups = folder.name, []
    write_ply(folder / f"{name}_vh_clean_2.ply", scene.xyz, scene.colour)
    (folder / f"{name}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": scene.segment.tolist()}))
    rooms = scene.semantic * 1000 + scene.instance  # walls and floor are groups too, as in ScanNet
    for k, key in enumerate(np.unique(rooms)):
        rows = rooms == key
        label = (*CLASSES, "ceiling")[key // 1000]
        groups.append({"objectId": k, "label": label, "segments": np.unique(scene.segment[rows]).tolist()})
    (folder / f"{name}.aggregation.json").write_text(json.dumps({"segGroups": groups}))
    align = " ".join(f"{x:.9g}" for x in scene.axis_align.reshape(-1))
    (folder / f"{name}.txt").write_text(f"axisAlignment = {align} \nsceneType = rendered\n")


def write_scannet(
    root: Path, seed: int, scenes: dict[str, list[str]], frames: int, size: tuple[int, int] = (120, 160)
) -> None:
    """A whole export. scenes: {split: names, as scene0000_00}; room n is the n-th of all. UserError if root exists."""
    with new_folder(root) as tmp:
        meta = tmp / "meta_data"
        meta.mkdir()
        rows = [f"{i}\t{name}\t{nyu}\t{name}\n" for name, (nyu, i) in NAMES.items()]
        (meta / TSV).write_text("id\traw_category\tnyu40id\tnyu40class\n" + "".join(rows))
        number = 0
        for split, names in scenes.items():
            (meta / f"scannetv2_{split}.txt").write_text("\n".join(names) + "\n")
            for name in names:
                room = Room(seed, number, size, lap=frames)
                shots = [room[k] for k in range(frames)]
                for k, frame in enumerate(shots):
                    write_frame(tmp / "2D" / name, str(EVERY * k), frame, labels=False)
                np.savetxt(tmp / "2D" / name / "intrinsic.txt", room.intrinsics)
                write_scan(tmp / "3D" / name, fuse(shots))
                number += 1
