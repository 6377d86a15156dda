"""From points of posed frames to what the 3D network sees of them (utils/posed_views.py), and their labels apart.

N points, H x W px, G objects of the scene that are things.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.clip_features import read_features
from data.rgbd_clips import Clip
from data.rgbd_frames import FramePoints, thing_instances
from utils.posed_views import View, ViewLabels
from utils.run import UserError

N_STUFF = 2  # wall and floor


def points_view(
    points: FramePoints,
    coords: np.ndarray | None = None,
    picture: np.ndarray | None = None,
    features: torch.Tensor | None = None,
    queries: np.ndarray | None = None,
) -> View:
    """One frame. coords (N, 3): where the augmentation put the points, None: where they are. picture (H, W, 3) uint8,
    features (192, h, w): for the 2D branch. queries (Q,): superpoints that ask."""
    if points.superpoint is None:
        raise ValueError("points have no superpoints; expected those of data/superpoints.py")
    camera = (points.xyz.astype(np.float64) - points.pose[:3, 3]) @ points.pose[:3, :3]
    arrays = {
        "coords": points.xyz if coords is None else coords, "colour": points.colour, "superpoint": points.superpoint,
        "queries": queries, "uv": points.uv, "camera": camera.astype(np.float32),
        "pose": points.pose.astype(np.float32), "picture": None if picture is None else picture.transpose(2, 0, 1),
    }  # fmt: skip
    tensors = {k: None if v is None else torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
    return View(**tensors, size=tuple(points.size), features=features)


def asking(superpoint: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random half to all of the superpoints, ascending, (Q,) int64: training's queries."""
    count = int(superpoint.max()) + 1
    return np.sort(rng.permutation(count)[: int(np.ceil(rng.uniform(0.5, 1) * count))])


def clip_views(clip: Clip, rng: np.random.Generator | None = None, pictures: bool = False) -> list[View]:
    """A view per frame. rng: draws which superpoints ask, in training; None: all. pictures: with the picture, or what
    was precomputed of it."""
    views = []
    for t, (points, coords) in enumerate(zip(clip.frames, clip.coords, strict=True)):
        picture = features = None
        if pictures and clip.features is not None and clip.features[t] is not None:
            features = read_features(clip.features[t], size=points.size)
        elif pictures:
            picture = clip_picture(clip, t)
        queries = None if rng is None else asking(points.superpoint, rng)
        views.append(points_view(points, coords, picture, features, queries))
    return views


def clip_picture(clip: Clip, t: int) -> np.ndarray:
    """(H, W, 3) uint8 of frame t: rendered, or its file."""
    if clip.pictures is not None:
        return clip.pictures[t]
    if clip.images is None:
        raise UserError(f"{clip.scene}: the pictures are needed and unknown; pass --raw, the folder of the export")
    return read_picture(clip.images[t])


def read_picture(path: Path) -> np.ndarray:
    """(H, W, 3) uint8; UserError for a missing or damaged file."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a picture ({e}); the index names it") from e


def clip_labels(clip: Clip, n_classes: int, n_stuff: int = N_STUFF) -> list[ViewLabels]:
    """Labels of each frame of a clip. Objects are the clip's things, in the order of clip.objects, seen or not."""
    if any(f.instance is None or f.semantic is None for f in clip.frames):
        raise ValueError(f"{clip.scene}: a frame has no labels")
    ids = np.concatenate([f.instance for f in clip.frames])
    kinds = np.concatenate([f.semantic for f in clip.frames])
    things = thing_instances(ids, kinds, n_classes, n_stuff)  # id or -1
    seen, first = np.unique(things, return_index=True)
    seen, first = seen[seen >= 0], first[seen >= 0]
    rows = np.searchsorted(clip.objects, seen)
    if (rows >= len(clip.objects)).any() or (clip.objects[rows] != seen).any():
        raise ValueError(f"{clip.scene}: objects {seen.tolist()} in the frames, {clip.objects.tolist()} have boxes")
    classes, boxes = torch.from_numpy(kinds[first]), torch.from_numpy(clip.boxes[rows])
    out = []
    for frame in clip.frames:
        own = thing_instances(frame.instance, frame.semantic, n_classes, n_stuff)
        index = np.where(own >= 0, np.searchsorted(seen, own), -1)
        out.append(ViewLabels(torch.from_numpy(index), torch.from_numpy(frame.semantic), classes, boxes))
    return out
