"""What train/train_esam.py reads: clips of rendered rooms or of prepared indices as views and labels.

An item is (T views, T labels) of one scene; single views have T = 1.
"""

from pathlib import Path

import numpy as np

from data.clip_features import check_features
from data.esam_views import N_STUFF, clip_labels, clip_views
from data.rgbd_clips import PreparedClips, RoomClips
from data.rgbd_frames import Augmentation
from data.rooms import CLASSES
from data.scannet_samples import read_index
from utils.posed_views import View, ViewLabels
from utils.run import UserError

HELD_OUT = 1_000_000_007  # added to the seed, modulo 2**32: other rooms to validate on


class ViewItems:
    """Clips as tensors. seed: draws which superpoints ask, in training; None: all do. pictures: for the 2D branch.
    limit: only the first so many, 0 all."""

    def __init__(self, clips, n_classes: int, pictures: bool = False, seed: int | None = None, limit: int = 0):
        self.clips, self.n_classes, self.pictures, self.seed = clips, n_classes, pictures, seed
        self.length = min(limit, len(clips)) if limit else len(clips)

    def __len__(self) -> int:
        return self.length

    def check_features(self, weights: str) -> None:
        """UserError when the first precomputed features that are there are not of these weights (a fingerprint)."""
        for k in range(self.length):
            there = [path for path in self.clips.feature_files(k) if path.is_file()]
            if there:
                check_features(there[0], weights)
                return

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[list[View], list[ViewLabels]]:
        if (key[1] if isinstance(key, tuple) else key) >= self.length:
            raise IndexError(f"item {key} of {self.length}")
        clip = self.clips[key]
        rng = None if self.seed is None else np.random.default_rng([self.seed, *key, 3])
        return clip_views(clip, rng, self.pictures), clip_labels(clip, self.n_classes, N_STUFF)


def room_items(
    length: int, val_length: int, clip_len: int, points: int, seed: int, augment: Augmentation, pictures: bool,
    overfit: int = 0, **room,
) -> tuple[ViewItems, ViewItems, tuple[str, ...]]:  # fmt: skip
    """Training rooms, rooms of another seed, and the names of the classes. overfit: the first so many rooms, as they
    are, for both. room: of RoomClips and Room."""
    shared = {"clip_len": clip_len, "points": points, **room}
    if overfit:
        rooms = ViewItems(RoomClips(overfit, seed, **shared), len(CLASSES), pictures)
        return rooms, rooms, CLASSES
    train = RoomClips(length, seed, augment=augment, **shared)
    val = RoomClips(val_length, (seed + HELD_OUT) % 2**32, **shared)
    return ViewItems(train, len(CLASSES), pictures, seed), ViewItems(val, len(CLASSES), pictures), CLASSES


def index_items(
    index: Path | str, val_index: Path | str | None, raw: Path | str | None, stage: str, frames: int, points: int,
    seed: int, augment: Augmentation, pictures: bool, overfit: int = 0, val_length: int = 0,
) -> tuple[ViewItems, ViewItems | None, tuple[str, ...], bool]:  # fmt: skip
    """Items of an index and of one to validate on (None: none), names of classes, whether there are precomputed CLIP
    features. UserError when an index was prepared for the other stage or the two have other classes."""
    if pictures and raw is None:
        raise UserError("--route bif: pictures and CLIP features lie in the export; give its folder with --raw")
    clips = {}
    for flag, path in (("--data", index), ("--val-data", val_index)):
        if path is None:
            continue
        train = flag == "--data" and not overfit
        clips[flag] = PreparedClips(path, raw, frames, points, train, augment if train else None, seed)
        if clips[flag].views != stage:
            raise UserError(
                f"{flag} {path}: was prepared with --views {clips[flag].views}; --stage {stage} needs {stage}"
            )
        if clips[flag].classes != clips["--data"].classes:
            raise UserError(f"{flag} {path}: has other classes than --data; prepare both alike")
    classes = tuple(clips["--data"].classes)
    packed = any(key.startswith("clip_feat_path") for key in read_index(index)[1][0])
    items = ViewItems(clips["--data"], len(classes), pictures, None if overfit else seed, overfit)
    if overfit:
        return items, items, classes, packed
    val = ViewItems(clips["--val-data"], len(classes), pictures, None, val_length) if "--val-data" in clips else None
    return items, val, classes, packed
