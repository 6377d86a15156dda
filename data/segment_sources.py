"""The data of a FastSAM2 training: sources by name, the tasks that they have, their items with one vocabulary for all.

A source is named `shapes`, `shape-clips`, or FORMAT=PATH, see RENDERED, PICTURES and CLIPS. Sets are {"task|number of
its source|name": items}, so the task of a set is what stands before the first bar.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from data.cityscapes import Cityscapes
from data.coco_instances import CocoInstances
from data.coco_panoptic import CocoPanoptic
from data.davis import Davis
from data.moving_shapes import MovingShapes
from data.pseudo_video import PseudoVideo
from data.refcoco import RefCoco
from data.sa1b import Sa1b
from data.segment_batch import CLIP_TASKS, TASKS, Prompts, SegmentItems, View
from data.video_clips import Clips, FirstMasks
from data.vipseg import Vipseg
from data.ytvis import YtVis
from utils.run import UserError

RENDERED = ("shapes", "shape-clips")  # pictures and clips of data/moving_shapes.py
PICTURES = {"panoptic": CocoPanoptic, "instances": CocoInstances, "cityscapes": Cityscapes, "sa1b": Sa1b}
WITH_SPLITS = ("refcoco", "davis", "vipseg")  # of which training has the split train, validation val
CLIPS = ("davis", "ytvis", "vipseg", "panoptic-clips", "first-masks")  # the last two are pictures as pseudo video
FORMATS = (*PICTURES, "refcoco", *CLIPS)
TAUGHT = {  # what points at objects in training
    "interactive": {"point": 0.5, "box": 0.3, "mask": 0.1, "point+box": 0.1},
    "vos": {"mask": 0.5, "point": 0.25, "box": 0.25},
}
ASKED = {"interactive": {"point": 0.5, "box": 0.5}, "vos": {"mask": 1.0}}  # in validation; vos: a mask, as in DAVIS
EPOCH = 20_000  # rendered scenes
READ_OFF = {"panoptic": ("instance", "semantic"), "vps": ("vis",)}  # results of a task that have all of another one's


def open_source(kind: str, path: str, split: str, clips: Clips, seed: int) -> list:
    """The sources of one FORMAT=PATH. DAVIS and VIPSeg without lists of splits: all that is there."""
    if kind in PICTURES:
        return [PICTURES[kind](path)]
    if kind == "refcoco":
        return [RefCoco(path, split=split)]
    if kind == "davis":
        return [Davis(path, split if (Path(path) / "ImageSets").is_dir() else None, clips=clips, seed=seed)]
    if kind == "ytvis":
        return [YtVis(path, clips=clips, seed=seed)]
    if kind == "vipseg":
        listed = any((folder / f"{split}.txt").is_file() for folder in (Path(path), Path(path).parent))
        return [Vipseg(path, split if listed else None, clips=clips, seed=seed)]
    if kind == "panoptic-clips":
        return [PseudoVideo(CocoPanoptic(path), clips.frames, seed=seed)]
    first = FirstMasks(Davis(path, clips=clips))
    return [first, PseudoVideo(first, clips.frames, seed=seed)]


def open_sources(flag: str, specs: Sequence[str], size: int, seed: int, clips: Clips, split: str = "train") -> list:
    """The sources of --data. size: side of rendered pictures, px; split: of WITH_SPLITS.

    UserError that lists everything which cannot be opened, not only the first.
    """
    sources, missing = [], []
    for spec in specs:
        kind, _, path = spec.partition("=")
        if kind in RENDERED and not path:
            sources.append(MovingShapes(EPOCH, seed, size, frames=clips.frames if kind == "shape-clips" else 0))
        elif kind in FORMATS and path:
            try:
                sources += open_source(kind, path, split, clips, seed)
            except UserError as e:
                missing.append(str(e))
        else:
            known = f"{', '.join(RENDERED)}, or FORMAT=PATH with FORMAT one of {', '.join(FORMATS)}"
            missing.append(f"{spec}: expected {known}")
    if missing:
        raise UserError(f"{flag}: {len(missing)} of {len(specs)} cannot be used: " + "; ".join(missing))
    return sources


# ---- tasks and classes


def default_tasks(sources) -> list[str]:
    """All tasks that the data have; but with panoptic the tasks that contradict it are read off it, not trained: of
    instance stuff is background, and semantic wants one mask for all things of a class, from the same queries. So is
    vis with vps."""
    found = [t for t in TASKS if any(t in s.tasks for s in sources)]
    return [t for t in found if t not in read_off(found)]


def read_off(tasks: Sequence[str]) -> set[str]:
    """Tasks whose results are part of those of the given ones."""
    return {part for task in tasks for part in READ_OFF.get(task, ())}


def vocabulary(sources) -> tuple[list[str], list[bool]]:
    """The classes of all sources and whether each is a thing; of two that have a class, the first says so. Where no
    source has classes there is one, "object", that nothing is of."""
    classes = list(dict.fromkeys(name for s in sources for name in s.classes)) or ["object"]
    things = {name: bool(thing) for s in reversed(sources) for name, thing in zip(s.classes, s.is_thing, strict=True)}
    return classes, [things.get(name, True) for name in classes]


# ---- items


def task_prompts(task: str, number: int, late: bool, training: bool = False, overfit: bool = False) -> Prompts:
    """What points at the objects of a task; clips that are overfitted are validated with the prompts of training."""
    taught = training or (overfit and task in CLIP_TASKS)
    kinds = (TAUGHT if taught else ASKED).get(task, {"point": 1.0})
    return Prompts(number, kinds, late=late, **({"jitter": 0.1, "coarse": 4} if taught else {}))


class Renumbered(Dataset):
    """Items of a source whose classes are `places` (K_source,) in the vocabulary of all sources."""

    def __init__(self, items: SegmentItems, places: list[int]):
        self.items, self.places = items, torch.tensor([*places, -1])  # the last is for -1, no known class

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key) -> dict:
        item = self.items[key]
        return {**item, "labels": self.places[item["labels"]]}


class First(Dataset):
    """The first n items as they are in epoch 0."""

    def __init__(self, items: Renumbered, n: int):
        self.items, self.n = items, min(n, len(items))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key) -> dict:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.n:
            raise IndexError(f"First: item {index} of {self.n}")
        return self.items[0, index]


def make_sets(
    sources,
    classes: list[str],
    tasks: Sequence[str],
    view: Callable[[str], View],
    prompts: Callable[[str], Prompts],
    seed: int,
) -> dict[str, Renumbered]:
    """{"task|source number|name": items}; view(task) says how pictures are shown, prompts(task) what points at objects.

    UserError if a task has no source, or a source no item.
    """
    sets = {}
    for k, source in enumerate(sources):
        places = [classes.index(name) for name in source.classes]
        for task in source.tasks:
            if task in tasks:
                if not len(source):
                    raise UserError(f"{source.summary()}: has no item of task {task}; leave it out or mend it")
                items = SegmentItems(source, task, view(task), prompts(task), seed)
                sets[f"{task}|{k}|{source.name}"] = Renumbered(items, places)
    absent = [task for task in tasks if not any(task_of(name) == task for name in sets)]
    if absent:
        raise UserError(f"--tasks {' '.join(absent)}: none of the data has it; leave it out or give other --data")
    return sets


def task_of(name: str) -> str:
    """The task of a set."""
    return name.split("|")[0]


def set_shares(sets: dict, shares: dict[str, float]) -> dict[str, float]:
    """Of a task's share, each of its sets gets a part by its size."""
    size: dict[str, int] = {}
    for name, items in sets.items():
        size[task_of(name)] = size.get(task_of(name), 0) + len(items)
    return {name: shares.get(task_of(name), 1.0) * len(items) / size[task_of(name)] for name, items in sets.items()}


def validation_sets(
    sources, classes: list[str], tasks: Sequence[str], height: int, width: int, prompts: Callable, seed: int = 0
) -> dict[str, Renumbered]:
    """{task: its items, shown whole} of the first source of each task, also of what is read off the tasks. UserError
    for a source with a class that is not among `classes`."""
    for source in sources:
        strange = [name for name in source.classes if name not in classes]
        if strange:
            raise UserError(f"--val-data: class '{strange[0]}' of {source.name} is in none of --data; give others")
    wanted = [t for t in TASKS if t in {*tasks, *read_off(tasks)} and any(t in s.tasks for s in sources)]
    sets = make_sets(sources, classes, wanted, lambda task: View(height, width), prompts, seed)
    found: dict[str, Renumbered] = {}
    for name, items in sets.items():
        found.setdefault(task_of(name), items)
    return found
