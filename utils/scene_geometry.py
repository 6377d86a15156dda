"""Surfaces of point clouds: normals towards the cameras, and which way is up.

Shapes: M points in metres, T camera positions. Poses are camera-to-world, a camera looks along +z, y down.
"""

import numpy as np
from scipy.spatial import cKDTree

CAMERAS = 64  # that are asked on which side of a surface they stood
UPRIGHT = 45.0  # degrees that a camera's mean upward axis may lean from z for the world to count as upright


def point_normals(points: np.ndarray, eyes: np.ndarray, neighbours: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals (M, 3) float32 of points (M, 3): the direction in which the neighbours spread least, turned to the side
    on which most of the cameras eyes (T, 3) stood, near ones counting more; and the share of them there, (M,) 0.5..1.

    A wall has all cameras on one side, a side of a cupboard that stands free has some on either.
    """
    k = min(neighbours, len(points))
    near = points[cKDTree(points).query(points, k)[1].reshape(len(points), k)].astype(np.float32)  # (M, k, 3)
    near = near - near.mean(1, keepdims=True)
    normal = np.linalg.eigh(near.transpose(0, 2, 1) @ near)[1][:, :, 0].astype(np.float32)
    before, total = np.zeros(len(points), np.float32), np.zeros(len(points), np.float32)
    for eye in eyes[:: -(-len(eyes) // CAMERAS)].astype(np.float32):
        way = eye - points
        weight = 1 / ((way**2).sum(1) + 0.5)
        before += weight * ((way * normal).sum(1) > 0)
        total += weight
    share = before / total
    return np.where(share[:, None] < 0.5, -normal, normal), np.maximum(share, 1 - share)


def up_direction(poses: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Unit vector (3,): what people who held the cameras, poses (T, 4, 4), called up, made exact by the surfaces near it
    (floors, tables): normals (M, 3)."""
    up = -poses[:, :3, 1].mean(0)
    up = up / max(np.linalg.norm(up), 1e-9)
    for degrees in (40, 20, 10, 10):
        level = normals[normals @ up > np.cos(np.radians(degrees))]
        if len(level) > 0.02 * len(normals):
            up = level.mean(0, dtype=np.float64)
            up = up / np.linalg.norm(up)
    return up


def stands_upright(poses: np.ndarray) -> bool:
    """Whether the cameras' mean upward axis leans less than 45 degrees from the world's z."""
    up = -poses[:, :3, 1].mean(0)
    return bool(up[2] > np.cos(np.radians(UPRIGHT)) * np.linalg.norm(up))


def turn_to_z(up: np.ndarray) -> np.ndarray:
    """The smallest rotation (3, 3) that takes the unit vector up (3,) to z."""
    v, c = np.cross(up, (0, 0, 1.0)), float(up[2])
    if c < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    K = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + K + K @ K / (1 + c)
