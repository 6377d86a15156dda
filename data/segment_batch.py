"""Segmented pictures as training items: what an item and a batch hold, the part of a picture that is shown, prompts.

A source reads one format and has `name`, `tasks`, `classes` (K names), `category_ids` (K, as in its files), `is_thing`
(K bools), `summary()`, `len()`, `scene(epoch, index)`. SegmentItems turns its scenes into items of one task. Items and
batches are dicts. Of an item; clips have T frames where `[T]` stands:

    task          what is asked: one of TASKS
    image_id      int or str
    image         ([T], 3, H, W) uint8 RGB
    masks         (Q, [T], H, W) bool, one target each; a clip's target has the same place in all frames
    labels        (Q,) long, class 0..K-1; -1: of no known class, or the task does not ask for it
    ids           (Q,) long, number of the target in its file: segment, annotation, sentence; the class of semantic
    ignore        ([T], H, W) bool: void or crowd, so neither target nor background
    original      (2,) long, height and width of the file in px; shape: (2,) long, those of the shown part
    text          list of Q sentences; only of task referring
    first         (Q,) long, frame that the prompt of a target is about; only of task vos
    points        (Q, 2, 2) float32, x y in px, pixel centres whole: a click on the target, one beside it; only of tasks
                  with prompts, interactive and vos
    point_labels  (Q, 2) long: 1 on the target, 0 beside it, -1 no click
    boxes         (Q, 4) float32, x0 y0 x1 y1 in px, first and last pixel; has_box: (Q,) bool
    mask_prompts  (Q, H, W) bool; has_mask: (Q,) bool

In a batch `task` is one for all; image, ignore, original, shape have B in front, the rest are lists of B. Pictures are
padded right and below with the mean colour, masks and ignore with False; `valid` (B, H, W) is True on the picture.

panoptic: things and stuff. instance: things. semantic: one mask per class, crowds too. interactive: any segments, class
dropped, with prompts. referring: objects with a sentence, class dropped. vis, vps: instance and panoptic of clips. vos:
things of the first frame, or of later ones too, with prompts on the frame where each is first large enough, class
dropped. A crowd is a target of semantic only; void is no target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

IMAGE_TASKS = ("panoptic", "instance", "semantic", "interactive", "referring")
CLIP_TASKS = ("vis", "vps", "vos")
TASKS = (*IMAGE_TASKS, *CLIP_TASKS)
THINGS_ONLY, PROMPTED = ("instance", "vis", "vos"), ("interactive", "vos")
PARTS = ("point", "negative", "box", "mask")  # of a prompt
PAD_COLOUR = (124, 116, 104)  # mean of ImageNet, RGB
POINT, BESIDE, NO_POINT = 1, 0, -1


@dataclass
class Scene:
    """A picture or clip as annotated: N segments.

    masks: bool (N, [T], H, W), or an integer map ([T], H, W) that holds `ids`. text: per segment its sentences as
    (number, words). void: ([T], H, W) bool, nothing is known there; None: nowhere.
    """

    image_id: int | str
    image: np.ndarray  # ([T], H, W, 3) uint8
    masks: np.ndarray
    ids: np.ndarray  # (N,) int64
    labels: np.ndarray  # (N,) int64 class, -1 unknown
    crowd: np.ndarray  # (N,) bool
    void: np.ndarray | None = None
    text: list[list[tuple[int, str]]] | None = None


# ---- the part of a picture that is shown


@dataclass(frozen=True)
class View:
    """How a picture is shown: at most height x width px, larger ones cut at random.

    scale: the factor to resize by is drawn from this range; at 1 the picture just fits. flip: share mirrored. The
    default shows every picture whole.
    """

    height: int
    width: int
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def __post_init__(self):
        low, high = self.scale
        if min(self.height, self.width) < 1 or not 0 < low <= high or not 0 <= self.flip <= 1:
            raise ValueError(f"{self}: expected sides of at least 1 px, 0 < low <= high, flip in 0..1")


def training_view(
    task: str, height: int, width: int, flip: float = 0.5, scale: tuple[float, float] | None = None
) -> View:
    """How training shows pictures: resized by a factor in `scale`, None: 0.8 to 2, of task interactive 0.1 to 2 (RAP-
    SAM), cut to height x width; pictures that sentences are about whole and never mirrored."""
    if task == "referring":
        return View(height, width)
    return View(height, width, tuple(scale or (0.1 if task == "interactive" else 0.8, 2.0)), flip)


@dataclass(frozen=True)
class Window:
    """The part x0..x1, y0..y1 (px of the file, real numbers), shown as h x w px, mirrored or not."""

    x0: float
    y0: float
    x1: float
    y1: float
    h: int
    w: int
    mirrored: bool = False


def draw_window(view: View, H: int, W: int, rng: np.random.Generator) -> Window:
    """The window of a picture of H x W px; as many draws whatever the view."""
    factor, down, across, mirror = rng.random(4)
    scale = min(view.height / H, view.width / W) * (view.scale[0] + factor * (view.scale[1] - view.scale[0]))
    whole_h, whole_w = max(1, round(H * scale)), max(1, round(W * scale))
    h, w = min(whole_h, view.height), min(whole_w, view.width)
    top, left = int(down * (whole_h - h + 1)), int(across * (whole_w - w + 1))
    y, x = H / whole_h, W / whole_w  # px of the file per px shown
    return Window(left * x, top * y, (left + w) * x, (top + h) * y, h, w, mirror < view.flip)


def show_image(image: np.ndarray, window: Window) -> np.ndarray:
    """uint8 (H, W, 3) -> (h, w, 3), bilinear; untouched where the size stays."""
    box = (window.x0, window.y0, window.x1, window.y1)
    shown = np.asarray(
        Image.fromarray(image).resize((window.w, window.h), Image.Resampling.BILINEAR, box=box)
        if box != (0, 0, window.w, window.h)
        else image[: window.h, : window.w]
    )
    return shown[:, ::-1] if window.mirrored else shown


def show_map(values: np.ndarray, window: Window) -> np.ndarray:
    """(..., H, W) of any type -> (..., h, w): the value under the centre of each pixel."""
    rows, columns = (
        np.minimum((low + (np.arange(n) + 0.5) * (high - low) / n).astype(np.int64), size - 1)
        for low, high, n, size in (
            (window.y0, window.y1, window.h, values.shape[-2]),
            (window.x0, window.x1, window.w, values.shape[-1]),
        )
    )
    return values[..., rows[:, None], columns[::-1] if window.mirrored else columns]


# ---- prompts


@dataclass(frozen=True)
class Prompts:
    """What points at a segment.

    number: prompts per picture, segments repeat when there are fewer, but not in vos (0: every segment once). kinds:
    share of each kind, parts joined by "+", as {"point": 0.5, "point+box": 0.5}. least: segments of fewer px are left
    out. jitter: corners of a box move by up to this share of its sides. coarse: mask prompts are made of squares of so
    many px (1: exact). late: of vos also what enters after the first frame and before the last.
    """

    number: int = 30
    kinds: dict[str, float] = field(default_factory=lambda: {"point": 1.0})
    least: int = 32
    jitter: float = 0.0
    coarse: int = 1
    late: bool = False

    def __post_init__(self):
        parts = {part for kind in self.kinds for part in kind.split("+")}
        if not self.kinds or parts - set(PARTS) or min(self.kinds.values()) < 0 or sum(self.kinds.values()) <= 0:
            raise ValueError(f"Prompts: kinds {self.kinds}, expected shares of {', '.join(PARTS)}, joined by '+'")
        if self.number < 0 or self.least < 1 or self.jitter < 0 or self.coarse < 1:
            raise ValueError(f"{self}: expected number >= 0, least >= 1, jitter >= 0, coarse >= 1")


def box_of(mask: np.ndarray) -> np.ndarray:
    """First and last column and row of a mask (H, W) with a True -> x0 y0 x1 y1 float32 px."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


def draw_prompts(masks: np.ndarray, prompts: Prompts, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """One prompt for each of masks (Q, H, W) bool, none empty -> points, point_labels, boxes, has_box, mask_prompts,
    has_mask as in an item. A click is drawn evenly from the pixels of the segment; one beside it evenly from its box,
    grown by half its sides, where there is such a pixel."""
    Q, H, W = masks.shape
    names, share = list(prompts.kinds), np.array([*prompts.kinds.values()])
    points, labels = np.zeros((Q, 2, 2), np.float32), np.full((Q, 2), NO_POINT, np.int64)
    boxes, has_box = np.zeros((Q, 4), np.float32), np.zeros(Q, bool)
    shown, has_mask = np.zeros((Q, H, W), bool), np.zeros(Q, bool)
    square = prompts.coarse
    rows, columns = (np.minimum(np.arange(n) // square * square + square // 2, n - 1) for n in (H, W))
    for q, mask in enumerate(masks):
        parts, box = names[rng.choice(len(names), p=share / share.sum())].split("+"), box_of(mask)
        side = box[2:] - box[:2] + 1
        if "point" in parts:
            y, x = np.nonzero(mask)
            k = rng.integers(len(y))
            points[q, 0], labels[q, 0] = (x[k], y[k]), POINT
        if "negative" in parts:
            x0, y0 = np.maximum(box[:2] - side / 2, 0).astype(int)
            y, x = np.nonzero(~mask[y0 : int(box[3] + side[1] / 2) + 1, x0 : int(box[2] + side[0] / 2) + 1])
            if len(y):
                k = rng.integers(len(y))
                points[q, 1], labels[q, 1] = (x[k] + x0, y[k] + y0), BESIDE
        if "box" in parts:
            moved = box + rng.uniform(-prompts.jitter, prompts.jitter, 4) * np.tile(side, 2)
            boxes[q], has_box[q] = np.clip(moved, 0, (W - 1, H - 1, W - 1, H - 1)), True
        if "mask" in parts:
            shown[q], has_mask[q] = mask[rows[:, None], columns], True
    arrays = {"points": points, "point_labels": labels, "boxes": boxes, "has_box": has_box}
    return {k: torch.from_numpy(v) for k, v in {**arrays, "mask_prompts": shown, "has_mask": has_mask}.items()}


# ---- items


def by_class(masks: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks (N, ...) of the same class joined -> (C, ...), their classes (C,) ascending; unknown ones are left out."""
    classes = np.unique(labels[labels >= 0])
    return np.array([masks[labels == c].any(0) for c in classes], bool).reshape(len(classes), *masks.shape[1:]), classes


def pixels(masks: np.ndarray) -> np.ndarray:
    """Pixels of each mask (N, ...) -> (N,) int64."""
    return masks.sum(tuple(range(1, masks.ndim)))


def large_enough(masks: np.ndarray, least: int) -> np.ndarray:
    """On which frames tubes (N, T, H, W) have at least so many px -> (N, T) bool."""
    return masks.sum((2, 3)) >= least


def choose(scene: Scene, masks: np.ndarray, task: str, is_thing: np.ndarray, prompts: Prompts, rng) -> np.ndarray:
    """Indices (Q,) of the segments that are targets of a task, prompted ones drawn; masks (N, [T], h, w) as shown.

    A segment without a pixel in the window is none, nor is one without a sentence where sentences are asked for.
    """
    keep = (pixels(masks) > 0) & ~scene.crowd
    if task in THINGS_ONLY:
        keep &= (scene.labels < 0) | is_thing[scene.labels]
    if task == "referring":
        keep &= np.array([len(said) > 0 for said in scene.text], bool)
    if task not in PROMPTED:
        return np.flatnonzero(keep)
    large = large_enough(masks if task == "vos" else masks[:, None], prompts.least)  # (N, T or 1)
    until = max(1, large.shape[1] - 1) if prompts.late else 1
    found = np.flatnonzero(keep & large[:, :until].any(1))
    if prompts.number == 0 or not len(found):
        return found
    number = min(prompts.number, len(found)) if task == "vos" else prompts.number
    return rng.choice(found, number, replace=len(found) < number)


class SegmentItems(Dataset):
    """Items of one task: items[index] or items[epoch, index], a function of (seed, epoch, index).

    all_sentences: referring has a target for every sentence (evaluation); else one for each object, its sentence drawn.
    ValueError for a task that the source does not have, or a view that mirrors or cuts what "left" is said about.
    """

    def __init__(self, source, task: str, view: View, prompts: Prompts | None = None, seed=0, all_sentences=False):
        if task not in source.tasks:
            raise ValueError(f"SegmentItems: {source.name} has no task {task!r}; expected one of {source.tasks}")
        if task == "referring" and (view.flip > 0 or view.scale[1] > 1):
            raise ValueError(f"SegmentItems: {view} would mirror or cut pictures of which 'left' is said; use flip 0")
        self.source, self.task, self.view, self.seed = source, task, view, seed
        self.prompts, self.all_sentences = prompts or Prompts(), all_sentences
        self.is_thing = np.array([*source.is_thing, False], bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.source):
            raise IndexError(f"SegmentItems: item {index} of {len(self.source)}")
        rng = np.random.default_rng([self.seed, epoch, index, 1])
        scene = self.source.scene(epoch, index)
        frames = scene.image if scene.image.ndim == 4 else scene.image[None]  # (T, H, W, 3)
        H, W = frames.shape[1:3]
        window = draw_window(self.view, H, W, rng)
        image = np.stack([show_image(f, window) for f in frames]).transpose(0, 3, 1, 2)  # (T, 3, h, w)
        masks, labels, ids, ignore, text = self.targets(scene, window, rng)
        item = {"task": self.task, "image_id": scene.image_id, "original": torch.tensor([H, W])}
        item |= {"image": image if scene.image.ndim == 4 else image[0], "masks": masks, "labels": labels, "ids": ids}
        item |= {"ignore": ignore, "shape": np.array([window.h, window.w])}
        item = {
            k: torch.from_numpy(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for k, v in item.items()
        }
        if self.task == "vos":
            first = large_enough(masks, self.prompts.least).argmax(1)  # (Q,)
            masks, item["first"] = masks[np.arange(len(masks)), first], torch.from_numpy(first)
        if self.task in PROMPTED:
            item |= draw_prompts(masks, self.prompts, rng)
        return item | ({"text": text} if self.task == "referring" else {})

    def targets(self, scene: Scene, window: Window, rng: np.random.Generator) -> tuple:
        """masks, labels, ids, ignore, text of an item, as arrays."""
        shown = show_map(scene.masks, window)
        if shown.dtype != bool:
            shown = shown == scene.ids.reshape(-1, *[1] * shown.ndim)  # (N, [T], h, w)
        ignore = np.zeros(shown.shape[1:], bool) if scene.void is None else show_map(scene.void, window)
        if self.task == "semantic":
            masks, labels = by_class(shown, np.where(pixels(shown) > 0, scene.labels, -1))
            return masks, labels, labels, ignore, []
        ignore = ignore | shown[scene.crowd].any(0)
        chosen, text = choose(scene, shown, self.task, self.is_thing, self.prompts, rng), []
        ids, labels = scene.ids[chosen], scene.labels[chosen]
        if self.task == "referring":
            said = [scene.text[k] for k in chosen]
            pick = [range(len(s)) if self.all_sentences else [rng.integers(len(s))] for s in said]
            chosen = np.array([k for k, p in zip(chosen, pick, strict=True) for _ in p], np.int64)
            ids, text = (
                zip(*[s[j] for s, p in zip(said, pick, strict=True) for j in p], strict=True) if said else ((), ())
            )
        if self.task in (*PROMPTED, "referring"):
            labels = np.full(len(chosen), -1, np.int64)
        return shown[chosen], labels, np.array(ids, np.int64), ignore, list(text)


class SegmentCollate:
    """Items of one task -> batch (see above). size: (height, width) px to pad to; None: the largest item, rounded up
    to multiples of `multiple`, as the network pads. ValueError for mixed tasks, or a picture larger than size."""

    def __init__(self, size: tuple[int, int] | None = None, multiple: int = 32):
        self.size, self.multiple = size, multiple

    def __call__(self, items: Sequence[dict]) -> dict:
        if len({x["task"] for x in items}) != 1:
            raise ValueError(f"SegmentCollate: tasks {sorted({x['task'] for x in items})} in one batch, expected one")
        largest = [max(x["image"].shape[d] for x in items) for d in (-2, -1)]
        H, W = self.size or (-(-n // self.multiple) * self.multiple for n in largest)
        if H < largest[0] or W < largest[1]:
            raise ValueError(f"SegmentCollate: a picture of {largest[0]} x {largest[1]} px (H x W), size is {H} x {W}")
        colour = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None]
        batch = {k: [x[k] for x in items] for k in items[0] if k != "task"}
        batch |= {"task": items[0]["task"], "image": [], "valid": torch.zeros(len(items), H, W, dtype=torch.bool)}
        for b, x in enumerate(items):
            h, w = x["image"].shape[-2:]
            padded = colour.repeat(*x["image"].shape[:-3], 1, H, W)
            padded[..., :h, :w] = x["image"]
            batch["image"].append(padded)
            batch["valid"][b, :h, :w] = True
            for name in ("masks", "ignore", "mask_prompts"):
                if name in x:
                    batch[name][b] = F.pad(x[name], (0, W - w, 0, H - h))
        return batch | {k: torch.stack(batch[k]) for k in ("image", "ignore", "original", "shape")}
