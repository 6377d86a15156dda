"""ScanNet and ScanNet200 as exported for single views and clips: classes, labelled reconstruction, labels of frames.

    2D/<scene>/color/<i>.jpg  depth/<i>.png  pose/<i>.txt     i = 0, 20, 40, ...; read by data/rgbd_folder.py
    3D/<scene>/<scene>_vh_clean_2.ply  <scene>.aggregation.json  <scene>_vh_clean_2.0.010000.segs.json  <scene>.txt
    meta_data/scannetv2-labels.combined.tsv  scannetv2_train.txt  scannetv2_val.txt      (also looked for in the root)

Classes: wall and floor are indices 0 and 1, the things follow; the number of classes stands for unlabelled. ScanNet's
20 are ids of the column nyu40id, ScanNet200's of the column id. Instances are numbered from 1
(objectId + 1), 0: none; also walls and floors have one. Points are in the world of
the poses; `axis_align` turns them so that walls follow the axes.
"""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from data.rgbd_frames import NONE, FramePoints
from utils.run import UserError
from utils.scannet_classes import CLASS_SETS

COLUMN = {"scannet": "nyu40id", "scannet200": "id"}  # of the tsv: id of a class
TSV = "scannetv2-labels.combined.tsv"
PLY_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
}
PLY_TYPES |= {
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
}
PLY_TYPES |= {"float64": "f8"}


@dataclass
class Reconstruction:
    """A labelled room of N vertices, world frame, not aligned. semantic: class index; segment: of the mesh
    segmentation; axis_align (4, 4) float64."""

    xyz: np.ndarray  # (N, 3) float32 m
    colour: np.ndarray  # (N, 3) float32 0..1
    instance: np.ndarray  # (N,) int64
    semantic: np.ndarray  # (N,) int64
    segment: np.ndarray  # (N,) int64
    axis_align: np.ndarray

    def aligned(self) -> np.ndarray:
        """Vertices with walls along the axes, (N, 3) float32."""
        return aligned(self.xyz, self.axis_align)


def aligned(xyz: np.ndarray, axis_align: np.ndarray) -> np.ndarray:
    return (xyz.astype(np.float64) @ axis_align[:3, :3].T + axis_align[:3, 3]).astype(np.float32)


# ---- classes


def find_file(root: Path, name: str) -> Path:
    """In the root, meta_data/ or 3D/meta_data/."""
    places = [root / name, root / "meta_data" / name, root / "3D" / "meta_data" / name]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(f"{root}: {name} is missing; put it into the folder or its meta_data/")
    return path


def read_label_map(path: Path, classes: str) -> dict[str, int]:
    """{raw category: class index} of the labels' tsv; index n: in none of the n classes. classes: of CLASS_SETS."""
    index, column = {i: k for k, i in enumerate(CLASS_SETS[classes])}, COLUMN[classes]
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    if not rows or not {"raw_category", column} <= set(rows[0]):
        raise UserError(f"{path}: lacks the columns raw_category and {column}; fetch ScanNet's {TSV} again")
    number = {row["raw_category"]: int(row[column]) if (row[column] or "").isdigit() else -1 for row in rows}
    return {name: index.get(i, len(index)) for name, i in number.items()}


def read_split(root: Path, split: str) -> list[str]:
    """Scenes of scannetv2_<split>.txt."""
    path = find_file(root, f"scannetv2_{split}.txt")
    names = path.read_text(encoding="utf-8").split()
    if not names:
        raise UserError(f"{path}: names no scene; fetch it again")
    return names


# ---- files of a scan


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices (N, 3) float32, colours (N, 3) float32 0..1 (zeros when it has none), triangles (F, 3) int64."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"{path}: is missing; expected the mesh of the scan") from e
    end = content.find(b"end_header\n")
    lines = content[: max(end, 0)].decode("ascii", "replace").split("\n")
    if end < 0 or lines[0].strip() != "ply" or "format binary_little_endian 1.0" not in [x.strip() for x in lines]:
        raise UserError(f"{path}: is no binary little-endian ply; convert it")
    count, fields, element = {}, {"vertex": [], "face": []}, ""
    for words in (x.split() for x in lines):
        if words[:1] == ["element"]:
            element, count[words[1]] = words[1], int(words[2])
        elif words[:1] == ["property"] and element in fields:
            fields[element].append(words[1:])
    body, kind = content[end + 11 :], np.dtype([(w[1], "<" + PLY_TYPES[w[0]]) for w in fields["vertex"]])
    n, faces = count.get("vertex", 0), np.zeros((0, 3), np.int64)
    triangle = np.dtype([("n", "u1"), ("v", "<i4", 3), *((w[1], "<" + PLY_TYPES[w[0]]) for w in fields["face"][1:])])
    need = n * kind.itemsize + count.get("face", 0) * triangle.itemsize
    if not n or len(body) < need:
        raise UserError(f"{path}: holds {len(body)} bytes after its head, {need} expected (triangles); fetch it again")
    rows = np.frombuffer(body, kind, n)
    if count.get("face"):
        found = np.frombuffer(body, triangle, count["face"], n * kind.itemsize)
        if (found["n"] != 3).any():
            raise UserError(f"{path}: has faces that are no triangles; split them")
        faces = found["v"].astype(np.int64)
    xyz = np.stack([rows[k] for k in "xyz"], -1).astype(np.float32)
    has = {"red", "green", "blue"} <= set(kind.names)
    colour = np.stack([rows[k] for k in ("red", "green", "blue")], -1) / np.float32(255) if has else np.zeros_like(xyz)
    return xyz, colour.astype(np.float32), faces


def read_scan_text(path: Path) -> dict[str, np.ndarray]:
    """{key: its numbers} of <scene>.txt ('axisAlignment = 0.9 ...'); rows of words are left out."""
    if not path.is_file():
        raise UserError(f"{path}: is missing; it holds the scan's axisAlignment")
    pairs = re.findall(r"^\s*(\w+)\s*=\s*([-+\d.eE \t]+?)\s*$", path.read_text(encoding="utf-8"), re.M)
    return {key: np.array(values.split(), np.float64) for key, values in pairs}


def read_json(path: Path, key: str) -> list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except FileNotFoundError as e:
        raise UserError(f"{path}: is missing; it belongs to the labels of the scan") from e
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        raise UserError(f"{path}: has no readable '{key}' ({type(e).__name__}); fetch it again") from e


def axis_alignment(values: dict[str, np.ndarray]) -> np.ndarray:
    """(4, 4) float64; scans of the test split have none: identity."""
    return values["axisAlignment"].reshape(4, 4) if "axisAlignment" in values else np.eye(4)


def scan_intrinsics(values: dict[str, np.ndarray], width: int = 640) -> tuple[float, float, float, float] | None:
    """fx fy cx cy of the depth camera that <scene>.txt states, when its depth is `width` px wide."""
    keys = ("fx_depth", "fy_depth", "mx_depth", "my_depth")
    if not set(keys) <= set(values) or int(values.get("depthWidth", [width])[0]) != width:
        return None
    return tuple(float(values[k][0]) for k in keys)


def read_reconstruction(folder: Path, label_map: dict[str, int], n_classes: int) -> Reconstruction:
    """folder: 3D/<scene>. UserError for missing or contradicting files and labels that the tsv lacks."""
    name = folder.name
    xyz, colour, _ = read_ply(folder / f"{name}_vh_clean_2.ply")
    segs = folder / f"{name}_vh_clean_2.0.010000.segs.json"
    segment = np.asarray(read_json(segs, "segIndices"), np.int64)
    if len(segment) != len(xyz):
        raise UserError(
            f"{segs}: has {len(segment)} segment ids, the mesh {len(xyz)} vertices; they are of other scans"
        )
    instance, semantic = np.full(len(xyz), NONE, np.int64), np.full(len(xyz), n_classes, np.int64)
    groups = folder / f"{name}.aggregation.json"
    for group in read_json(groups, "segGroups"):
        if group["label"] not in label_map:
            raise UserError(f"{groups}: label '{group['label']}' is not in the tsv; take the tsv of this release")
        rows = np.isin(segment, group["segments"])
        instance[rows], semantic[rows] = group["objectId"] + 1, label_map[group["label"]]
    align = axis_alignment(read_scan_text(folder / f"{name}.txt"))
    return Reconstruction(xyz, colour, instance, semantic, segment, align)


# ---- labels of points


def benchmark_labels(scene: Reconstruction, classes: str) -> np.ndarray:
    """class id * 1000 + instance of every vertex (N,) int64, 0: none, as eval/eval_scannet.py reads them."""
    ids = np.array([*CLASS_SETS[classes], 0])[scene.semantic]
    return np.where((ids > 0) & (scene.instance != NONE), ids * 1000 + scene.instance, 0)


def instance_boxes(xyz: np.ndarray, instance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids (K,) other than NONE, lowest and highest corner (K, 3) of their points. One pass over the sorted points."""
    order = np.argsort(instance, kind="stable")
    order = order[np.searchsorted(instance[order], NONE, side="right") :]  # ids are not negative
    ids, start = np.unique(instance[order], return_index=True)
    if not len(ids):
        return ids, np.zeros((0, 3), xyz.dtype), np.zeros((0, 3), xyz.dtype)
    return ids, np.minimum.reduceat(xyz[order], start), np.maximum.reduceat(xyz[order], start)


class PointLabeller:
    """Labels of frame points from the reconstruction: those of the nearest vertex, unless it is farther than `reject` m
    (None: however far, as the released converters have it) or the point lies outside the instance's aligned box grown
    by `margin` m."""

    def __init__(self, scene: Reconstruction, n_classes: int, reject: float | None = 0.05, margin: float = 0.05):
        self.scene, self.n_classes, self.margin = scene, n_classes, margin
        self.limit = np.inf if reject is None else reject
        xyz = scene.aligned()
        self.tree = cKDTree(xyz)
        self.ids, low, high = instance_boxes(xyz, scene.instance)
        self.low, self.high = low - margin, high + margin

    def __call__(self, points: FramePoints) -> tuple[np.ndarray, np.ndarray]:
        """-> instance, semantic (N,) int64."""
        xyz = aligned(points.xyz, self.scene.axis_align)
        distance, nearest = self.tree.query(xyz)
        instance = self.scene.instance[nearest].copy()
        k = np.searchsorted(self.ids, instance).clip(0, max(len(self.ids) - 1, 0))
        if len(self.ids):
            outside = (xyz < self.low[k]).any(1) | (xyz > self.high[k]).any(1)
            instance[outside] = NONE
        instance[distance > self.limit] = NONE
        return instance, np.where(instance == NONE, self.n_classes, self.scene.semantic[nearest])
