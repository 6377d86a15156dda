"""Results of videos on their way to files: DAVIS's palette PNGs, tracks as YouTube-VIS has them, VIPSeg's segments."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from utils.run import writing
from utils.segment_writing import draw_masks, save_picture
from utils.video_inputs import Footage


@dataclass
class FrameResult:
    """Of one frame: what is written and drawn."""

    shown: np.ndarray  # (S, H, W) bool
    names: list[str]
    colours: list[int]  # numbers of colours, those of an object the same on all frames
    png: np.ndarray | None = None  # (H, W, 3) uint8 of ids, or (H, W) uint8 of objects
    entry: dict = field(default_factory=dict)  # of the json, less its file's name


def davis_palette() -> list[int]:
    """256 colours R G B, as DAVIS and PASCAL VOC have them: bits of a number, three by three, from the highest on."""
    number, bits = np.arange(256), np.arange(8)
    channels = [((number[:, None] >> (3 * bits + c) & 1) << (7 - bits)).sum(1) for c in range(3)]  # 3 x (256,)
    return np.stack(channels, 1).flatten().tolist()


def save_palette(path: Path, ids: np.ndarray) -> None:
    """Object of every pixel (H, W) uint8 -> a palette PNG, in a folder that is made. OSError names the path."""
    image = Image.fromarray(ids, mode="P")
    image.putpalette(davis_palette())
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="png")


def segment(i: int, category: int, mask: np.ndarray, score: float) -> dict:
    """One of COCO panoptic's segments_info; mask (H, W) bool with a pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]  # x y width height
    return {"id": i, "category_id": category, "area": int(mask.sum()), "bbox": [int(x) for x in box], "iscrowd": 0,
            "score": round(float(score), 6)}  # fmt: skip


def track(video_id: int | str, category: int, scores: list[float], codes: list[dict | None]) -> dict:
    """A result of YouTube-VIS: codes: RLE of each frame, None where it is not seen; score: the mean of the frames'."""
    return {"video_id": video_id, "category_id": category, "score": float(np.mean(scores)), "segmentations": codes}


def write_frames(
    folder: Path, video: Footage, results: Iterable[FrameResult], film: Callable[[np.ndarray], None]
) -> tuple[list[dict], int]:
    """Draw every frame, hand it to `film`, and write its PNG, if there is one, into `folder`, objects with DAVIS's
    palette -> the json's entry of each of these, and the number of masks that were drawn."""
    rows, n = [], 0
    for stem, frame, x in zip(video.stems, video.frames(), results, strict=True):
        film(draw_masks(frame, x.shown, x.names, x.colours))
        n += int(x.shown.any((1, 2)).sum())
        if x.png is not None:
            (save_palette if x.png.ndim == 2 else save_picture)(folder / f"{stem}.png", x.png)
            rows.append({"file_name": f"{stem}.png", **x.entry})
    return rows, n
