"""Superpoints: groups of points that belong together, from depth and colour, from a mesh, or from masks of a picture.

Shapes: H W picture, h w its grid of nodes, N points, V vertices, F faces. Depth and points are metres, x right, y down,
z forward in camera coordinates; labels are int64, compact from 0, -1 where there is none.
Sources: Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image Segmentation", IJCV 2004; the rules (not the code)
of ScanNet/ScanNet@3830fce Segmentator, which the labels of ScanNet were made with.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter
from scipy.spatial import cKDTree

from utils.masks import rle_decode, to_rle
from utils.run import UserError
from utils.segmentation_files import need, read_json, read_png

SMOOTH = 9  # pixels: side of the box over which points and colours are averaged
COLOUR = 5.0  # weight of the squared difference of colours beside that of normals
GAP, GAP_SHARE = 0.03, 0.03  # metres, and share of the depth, that neighbours may differ in depth
MASK_FILES = (".json", ".npz", ".png")


def compact(labels: np.ndarray) -> np.ndarray:
    """The same groups as 0..S-1 by ascending label; negative labels stay -1."""
    found, at = np.unique(labels, return_inverse=True)
    return np.maximum(at.reshape(labels.shape) - int((found < 0).sum()), -1).astype(np.int64)


# ---- graph segmentation


def segment_graph(n: int, a: np.ndarray, b: np.ndarray, weights: np.ndarray, k: float, min_size: int) -> np.ndarray:
    """Edges a-b (M,) between n nodes with weights float32 -> compact group of every node (n,).

    By ascending weight an edge joins two groups when it is not above the threshold of either: the weight of the last
    edge inside plus k / size, k for a single node. A second pass joins groups below `min_size` along the same edges.
    Equal weights keep their order; arithmetic is float32 as in ScanNet's program."""
    order = np.argsort(weights, kind="stable")
    edges = list(zip(a[order].tolist(), b[order].tolist(), weights[order].astype(np.float32).tolist(), strict=True))
    parent, size = list(range(n)), [1] * n
    share = (np.float32(k) / np.arange(n + 1).clip(1).astype(np.float32)).tolist()  # k / size
    threshold = [share[1]] * n

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = x = parent[parent[x]]
        return x

    def join(x: int, y: int) -> int:
        if size[x] < size[y]:
            x, y = y, x
        parent[y] = x
        size[x] += size[y]
        return x

    for x, y, w in edges:
        x, y = root(x), root(y)
        if x != y and w <= threshold[x] and w <= threshold[y]:
            x = join(x, y)
            threshold[x] = float(np.float32(w + share[size[x]]))
    for x, y, _ in edges:
        x, y = root(x), root(y)
        if x != y and (size[x] < min_size or size[y] < min_size):
            join(x, y)
    return compact(np.array([root(x) for x in range(n)], np.int64))


# ---- meshes


def mesh_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Normal of every vertex (V, 3) float32: the running mean of its faces' unit normals, in the order of the faces.

    The mean is not normalised again; a face without area gives nan, as in ScanNet's program."""
    one, two, three = (vertices[faces[:, i]].astype(np.float32) for i in range(3))
    (ux, uy, uz), (vx, vy, vz) = (two - one).T, (three - one).T
    normal = np.stack([uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx], 1)
    length = np.sqrt(normal[:, 0] ** 2 + normal[:, 1] ** 2 + normal[:, 2] ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        normal = normal / length[:, None]
    corner = faces.reshape(-1)
    order = np.argsort(corner, kind="stable")
    first = np.searchsorted(corner[order], corner[order])  # place where the vertex begins
    turn = np.empty(len(corner), np.int64)
    turn[order] = np.arange(len(corner)) - first  # how many faces the vertex had before
    mean = np.zeros((len(vertices), 3), np.float32)
    for t in range(turn.max(initial=-1) + 1):
        now = np.flatnonzero(turn == t)
        v = np.float32(1) / np.float32(t + 1)
        mean[corner[now]] = v * normal[now // 3] + (np.float32(1) - v) * mean[corner[now]]
    return mean


def edge_weights(normals: np.ndarray, points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - n_a . n_b for edges a-b (M,) float32, squared where the surface is convex (n_b . (p_b - p_a) > 0)."""
    na, nb, way = normals[a], normals[b], points[b] - points[a]
    w = np.float32(1) - (na[:, 0] * nb[:, 0] + na[:, 1] * nb[:, 1] + na[:, 2] * nb[:, 2])
    length = np.sqrt(way[:, 0] ** 2 + way[:, 1] ** 2 + way[:, 2] ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        way = way / length[:, None]
    convex = nb[:, 0] * way[:, 0] + nb[:, 1] * way[:, 1] + nb[:, 2] * way[:, 2] > 0
    return np.where(convex, w * w, w)


def segment_mesh(vertices: np.ndarray, faces: np.ndarray, k: float = 0.01, min_size: int = 20) -> np.ndarray:
    """vertices (V, 3), faces (F, 3) -> compact segment of every vertex (V,), the partition of ScanNet's Segmentator."""
    vertices, faces = np.asarray(vertices, np.float32), np.asarray(faces, np.int64)
    if faces.ndim != 2 or faces.shape[1] != 3 or (len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices)):
        raise ValueError(f"faces {faces.shape}: expected (F, 3) with numbers below {len(vertices)}")
    one, two, three = faces.T
    a, b = (np.stack(x, 1).reshape(-1) for x in ((one, one, three), (two, three, two)))
    weights = edge_weights(mesh_normals(vertices, faces), vertices, a, b)
    return segment_graph(len(vertices), a, b, weights, k, min_size)


# ---- depth pictures


@dataclass
class FrameSegments:
    """Segments of one frame on its nodes: labels (h, w), points (h, w, 3) float32 in camera coordinates; node (i, j)
    is pixel (row, column) = stride * (i, j) + stride // 2."""

    labels: np.ndarray
    points: np.ndarray
    stride: int


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0..1 -> CIE Lab for D65, L / 100, a / 255, b / 255."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                       [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip
    x = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([(116 * y - 16) / 100, 500 * (x - y) / 255, 200 * (y - z) / 255], -1)


def back_project(depth: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Depth (H, W) -> points (H, W, 3) float32 in camera coordinates; intrinsics (3, 3)."""
    v, u = np.indices(depth.shape, dtype=np.float32)
    fx, fy, cx, cy = (np.float32(intrinsics[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return np.stack([(u - cx) * depth / fx, (v - cy) * depth / fy, depth], -1)


def node_normals(points: np.ndarray, valid: np.ndarray, at: tuple) -> np.ndarray:
    """Normals (h, w, 3) float32 towards the camera of the nodes `at` of points (H, W, 3): central differences between
    neighbouring nodes, one-sided beside a node without depth, of points averaged over 9 x 9 valid pixels."""
    weight = np.maximum(uniform_filter(valid.astype(np.float32), SMOOTH, mode="constant"), 1e-6)[at]
    mean = [uniform_filter(np.where(valid, points[..., c], 0), SMOOTH, mode="constant")[at] for c in range(3)]
    mean, ok = np.stack(mean, -1) / weight[..., None], valid[at]
    ways = []
    for axis in (1, 0):
        ends = []
        for step in (-1, 1):  # the next node, and itself where that has no depth or lies outside
            other, there = np.roll(mean, step, axis), np.roll(ok, step, axis)
            there[(slice(None),) * axis + (0 if step == 1 else -1,)] = False
            ends.append(np.where(there[..., None], other, mean))
        ways.append(ends[0] - ends[1])
    normal = np.cross(*ways)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    away = (normal * mean).sum(-1, keepdims=True) > 0
    return np.where(away, -normal, normal).astype(np.float32)


def segment_depth(
    depth: np.ndarray,
    rgb: np.ndarray | None,
    intrinsics: np.ndarray,
    k: float = 0.1,
    min_size: int = 20,
    stride: int = 4,
) -> FrameSegments:
    """Depth (H, W) in metres, 0 or not finite where unknown, rgb (H, W, 3) uint8 or None, intrinsics (3, 3).

    Nodes are every `stride`-th pixel, edges join the 8 neighbours of similar depth, weights are those of meshes plus 5
    times the squared difference of blurred Lab colours. Larger k gives fewer segments; those below min_size nodes are
    joined to a neighbour where they have one. ValueError without any depth.
    """
    valid = np.isfinite(depth) & (depth > 0)
    depth = np.where(valid, depth, 0).astype(np.float32)
    at = (slice(stride // 2, None, stride),) * 2
    points, ok = back_project(depth, intrinsics), valid[at]
    if not ok.any():
        raise ValueError(f"no depth at any node of {depth.shape[0]} x {depth.shape[1]} pixels: nothing to segment")
    normals, nodes = node_normals(points, valid, at).reshape(-1, 3), points[at]
    number = np.arange(ok.size).reshape(ok.shape)
    ends = []
    for first, second in (  # right, down, down right, down left
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
        ((slice(None, -1), slice(None, -1)), (slice(1, None), slice(1, None))),
        ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))),
    ):
        z = np.minimum(nodes[first][..., 2], nodes[second][..., 2])
        near = np.abs(nodes[first][..., 2] - nodes[second][..., 2]) < GAP + GAP_SHARE * z
        near &= ok[first] & ok[second]
        ends.append((number[first][near], number[second][near]))
    a, b = (np.concatenate(x) for x in zip(*ends, strict=True))
    weights = edge_weights(normals, nodes.reshape(-1, 3), a, b)
    if rgb is not None:
        blurred = [uniform_filter(rgb[..., c].astype(np.float32), SMOOTH)[at] for c in range(3)]
        colour = lab(np.stack(blurred, -1) / 255).reshape(-1, 3)
        weights = weights + COLOUR * ((colour[a] - colour[b]) ** 2).sum(-1)
    labels = segment_graph(ok.size, a, b, weights.astype(np.float32), k, min_size).reshape(ok.shape)
    return FrameSegments(compact(np.where(ok, labels, -1)), nodes, stride)


def depth_superpoints(
    depth: np.ndarray, rgb: np.ndarray | None, intrinsics: np.ndarray, k: float = 0.1, min_size: int = 20
) -> np.ndarray:
    """`segment_depth` for every pixel: (H, W) int64, -1 where there is no depth. ValueError without any depth.

    A pixel takes the label of its node, and where that has no depth the label of the nearest node that has, in 3D.
    """
    segments = segment_depth(depth, rgb, intrinsics, k, min_size)
    valid, stride = np.isfinite(depth) & (depth > 0), segments.stride
    i, j = (
        np.rint((np.arange(n) - stride // 2) / stride).astype(np.int64).clip(0, m - 1)
        for n, m in zip(depth.shape, segments.labels.shape, strict=True)
    )
    own = np.where(valid, segments.labels[i[:, None], j], -1)
    lost, labelled = valid & (own < 0), segments.labels >= 0
    if lost.any():
        points = back_project(np.where(valid, depth, 0).astype(np.float32), intrinsics)[lost]
        own[lost] = segments.labels[labelled][cKDTree(segments.points[labelled]).query(points)[1]]
    return compact(own)


# ---- masks of a picture


def paint(masks: np.ndarray) -> np.ndarray:
    """Masks (M, H, W) bool -> number of the mask of every pixel (H, W), -1 where none: smaller ones lie on top."""
    labels = np.full(masks.shape[1:], -1, np.int64)
    for i in np.argsort(-masks.reshape(len(masks), -1).sum(1), kind="stable") if len(masks) else ():
        labels[masks[i]] = i
    return labels


def group_points(features: np.ndarray, groups: int, rounds: int = 10) -> np.ndarray:
    """Rows (N, C) -> group (N,): k-means from the first row and those farthest from all chosen; repeatable. The means
    are of 5,000 rows at most, evenly spaced."""
    few = features[:: -(-len(features) // 5000)]
    chosen, far = [0], np.linalg.norm(few - few[0], axis=1)
    while len(chosen) < groups and far.max() > 0:
        chosen.append(int(far.argmax()))
        far = np.minimum(far, np.linalg.norm(few - few[chosen[-1]], axis=1))
    centres = few[chosen]
    for _ in range(rounds):
        at = cKDTree(centres).query(few)[1]
        size = np.bincount(at, minlength=len(centres))
        sums = np.stack([np.bincount(at, c, len(centres)) for c in few.T], 1)
        centres = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], centres)
    return cKDTree(centres).query(features)[1]


def mask_superpoints(
    masks: np.ndarray, depth: np.ndarray, rgb: np.ndarray, intrinsics: np.ndarray, groups: int = 20
) -> np.ndarray:
    """Painted masks (H, W), -1 where none, depth (H, W) m, rgb (H, W, 3) uint8 -> (H, W) int64, -1 without depth.

    Pixels outside all masks are grouped by position and colour, full scale of a colour like a metre; fewer than 20 are
    one group. ValueError without any depth.
    """
    valid = np.isfinite(depth) & (depth > 0)
    if not valid.any():
        raise ValueError(f"no depth at any of {depth.shape[0]} x {depth.shape[1]} pixels: nothing to group")
    own, rest = np.where(valid, masks, -1), valid & (masks < 0)
    if rest.any():
        points = back_project(np.where(valid, depth, 0).astype(np.float32), intrinsics)[rest]
        features = np.concatenate((points, rgb[rest] / 255), 1).astype(np.float64)
        own[rest] = masks.max() + 1 + (group_points(features, groups) if len(features) >= 20 else 0)
    return compact(own)


def read_masks(folder: Path | str, name: str, height: int, width: int) -> np.ndarray:
    """Painted masks (H, W) of the frame `name` in a folder: .json, a list of {"segmentation": run-length code} as SAM's
    automatic mask generator writes; .npz with "masks" (M, H, W); .png, one number a mask, 0 none. UserError else."""
    found = [p for e in MASK_FILES if (p := Path(folder) / f"{name}{e}").is_file()]
    if len(found) != 1:
        many = "several files" if found else "no file"
        raise UserError(f"{folder}: holds {many} {name}.json, .npz or .png; expected one with the masks of the frame")
    path, expected = found[0], f"masks of {height} x {width} (H x W)"
    if path.suffix == ".json":
        items = need(str(path), read_json("masks", path), {"segmentation": dict}, "a list of run-length codes")
        try:
            masks = [rle_decode(to_rle(x["segmentation"], height, width)) for x in items]
        except (ValueError, KeyError) as e:
            raise UserError(f"{path}: {e}; expected {expected}, make them from the frame's picture") from e
        return paint(np.stack(masks)) if masks else np.full((height, width), -1, np.int64)
    if path.suffix == ".png":
        numbers = read_png(path)
        labels = compact(numbers.astype(np.int64) - 1) if numbers.ndim == 2 else numbers
    else:
        try:
            with np.load(path, allow_pickle=False) as z:
                masks = np.asarray(z["masks"], bool)
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{path}: cannot be read ({e}); expected an npz with 'masks' (M, H, W)") from e
        labels = paint(masks) if masks.ndim == 3 else masks
    if labels.shape != (height, width):
        raise UserError(f"{path}: holds {labels.shape}; expected {expected}, make them from the frame's picture")
    return labels


# ---- what superpoints allow at best


def oracle(
    superpoints: np.ndarray, instances: np.ndarray, none: int = 0, min_points: int = 100
) -> dict[str, np.ndarray]:
    """Every superpoint takes the instance of most of its points: the best that masks made of superpoints can do.

    superpoints (N,) compact, instances (N,) int64, `none` and negative numbers: no instance. Returns iou (G,) of the
    instances with at least `min_points` points, right: points whose superpoint took their own label, points, count:
    superpoints.
    """
    ids, at = np.unique(np.where(np.asarray(instances) < 0, none, instances), return_inverse=True)
    joint = np.bincount(superpoints * len(ids) + at, minlength=(superpoints.max(initial=-1) + 1) * len(ids))
    joint = joint.reshape(-1, len(ids))  # (S, ids)
    won = joint.argmax(1)
    common = joint.max(1, initial=0)
    hit, taken = (np.bincount(won, x, len(ids)) for x in (common, joint.sum(1)))
    size = joint.sum(0)
    judged = (ids != none) & (size >= min_points)
    iou = (hit / np.maximum(taken + size - hit, 1))[judged]
    return {"iou": iou, "right": common.sum(), "points": size.sum(), "count": (joint.sum(1) > 0).sum()}


def oracle_summary(frames: list[dict]) -> dict[str, float]:
    """`oracle` of many frames -> mIoU, R50 and R25 (share of instances above), R: mean share above 0.50, 0.55 ... 0.90,
    accuracy of points, superpoints a frame, instances. nan where there is nothing."""
    iou = np.concatenate([f["iou"] for f in frames]) if frames else np.zeros(0)
    share = {t: float((iou > t).mean()) if len(iou) else float("nan") for t in (0.25, *np.arange(0.5, 0.95, 0.05))}
    points = sum(int(f["points"]) for f in frames)
    return {
        "mIoU": float(iou.mean()) if len(iou) else float("nan"),
        "R50": share[0.5],
        "R25": share[0.25],
        "R": float(np.mean([x for t, x in share.items() if t > 0.3])),
        "accuracy": sum(int(f["right"]) for f in frames) / points if points else float("nan"),
        "superpoints": float(np.mean([f["count"] for f in frames])) if frames else float("nan"),
        "instances": float(len(iou)),
    }
