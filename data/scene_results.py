"""What was found in a scene, as files: ScanNet's, npz, ply, a picture and a film, times of the frames.

    <scene>.txt  pred_mask/  semantic/<scene>.txt  npz/<scene>.npz  ply/<scene>.ply  pictures/<scene>.png  .mp4
    timing/<scene>.csv

Shapes: M points (voxels or vertices), O objects, best score first, T frames. Ids of classes are those of the files.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.room_files import NAMES
from data.video import VideoWriter
from utils import overlay
from utils.ply_files import write_ply
from utils.scannet_classes import CLASS_SETS
from utils.scannet_files import MASKS, SEMANTIC, ScenePrediction, write_instances, write_labels
from utils.scene_pictures import Cloud, object_colour, scene_picture, turntable

FOLDERS = (MASKS, SEMANTIC, "npz", "ply", "pictures", "timing")
PARTS = ("read", "superpoints", "network", "instances", "merging")  # of a frame's time
FILM_RATE, STRETCHES = 12, 8  # frames a second; lines of a table of times


@dataclass
class FoundScene:
    """points (M, 3) m with z up, colour (M, 3) 0..1, masks (O, M) bool, own (M,): row of each point's object or -1,
    semantic (M,) class ids; kinds, labels, ids, scores, boxes (O, 6) of the objects; turn (3, 3): takes the files' world
    to that of points and boxes; eyes (T, 3): camera positions, as points."""

    name: str
    points: np.ndarray
    colour: np.ndarray
    masks: np.ndarray
    own: np.ndarray
    semantic: np.ndarray
    kinds: list[str]
    labels: np.ndarray
    ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    turn: np.ndarray
    eyes: np.ndarray

    def summary(self) -> list[dict]:
        """One row an object."""
        rows = zip(self.ids.tolist(), self.kinds, self.labels.tolist(), self.scores.tolist(), self.masks.sum(1).tolist(),
                   self.boxes.tolist(), strict=True)  # fmt: skip
        keys = ("id", "class", "class_id", "score", "points", "box")
        return [dict(zip(keys, row, strict=True)) for row in rows]


def class_ids(classes: tuple[str, ...]) -> list[int]:
    """The id of each class in the files: ScanNet's where the names are one of its sets, those of rendered rooms
    (ScanNet200's), else 1, 2, ..."""
    for known in CLASS_SETS.values():
        if tuple(known.values()) == tuple(classes):
            return list(known)
    return [NAMES[name][1] for name in classes] if set(classes) <= set(NAMES) else list(range(1, len(classes) + 1))


def write_scene(out: Path, found: FoundScene, rows: list[dict], film: bool) -> None:
    """All files of one scene into the folder `out`; rows: figures of each frame; film: also the turntable."""
    name, points = found.name, (found.points @ found.turn).astype(np.float32)
    for folder in FOLDERS:
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_instances(out, name, ScenePrediction(found.masks, found.labels, found.scores))
    write_labels(out / SEMANTIC / f"{name}.txt", found.semantic)
    np.savez_compressed(
        out / "npz" / f"{name}.npz", points=points, colour=np.rint(255 * found.colour).astype(np.uint8),
        instance=found.own, semantic=found.semantic, masks=found.masks, ids=found.ids, labels=found.labels,
        scores=found.scores, boxes=found.boxes, turn=found.turn,
    )  # fmt: skip
    table = np.array([*(object_colour(k) for k in range(len(found.kinds))), (0, 0, 0)], np.float32) / 255
    shown = np.where(found.own[:, None] >= 0, table[found.own], found.colour)
    write_ply(out / "ply" / f"{name}.ply", points, shown, instance=found.own, semantic=found.semantic)
    with open(out / "timing" / f"{name}.csv", "w", encoding="utf-8", newline="") as f:
        times = csv.DictWriter(f, list(rows[0]))
        times.writeheader()
        times.writerows(rows)
    cloud = Cloud(found.points, found.colour, found.own, found.eyes)
    names = [f"{kind} {score:.2f}" for kind, score in zip(found.kinds, found.scores, strict=True)]
    overlay.save_png(out / "pictures" / f"{name}.png", scene_picture(cloud, names, f"{name}, {len(rows)} frames"))
    if film:
        write_film(out / "pictures" / f"{name}.mp4", cloud)


def write_film(path: Path, cloud: Cloud) -> None:
    """The cloud as seen beside its objects, turning once."""
    pictures = turntable(cloud)
    first = next(pictures)
    with VideoWriter(path, FILM_RATE, first.shape[1::-1]) as writer:
        writer.write(first)
        for picture in pictures:
            writer.write(picture)


def time_table(name: str, rows: list[dict]) -> str:
    """Medians of up to eight stretches of a scene; rows hold read_s and the other PARTS, objects, memory_mb."""
    lines = [
        f"{name[:15]:16s}" + "".join(f"{k:>12s}" for k in (*PARTS, "sum", "objects", "MB")) + "  ms a frame, medians"
    ]
    for part in np.array_split(np.arange(len(rows)), min(STRETCHES, len(rows))):
        own = 1000 * np.array([[rows[i][f"{k}_s"] for k in PARTS] for i in part])
        values = (*np.median(own, 0), np.median(own.sum(1)))
        last = rows[part[-1]]
        line = f"{f'{part[0]}-{part[-1]}':16s}" + "".join(f"{x:12.0f}" for x in values)
        lines.append(line + f"{last['objects']:12d}{last['memory_mb']:12.1f}")
    return "\n".join(lines)
