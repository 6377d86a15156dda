"""Videos that a user names on the command line: files, folders of frames, folders of such folders; and first masks.

Layouts of folders: <frames>, <video>/<frames>, <video>/images/<frames>, and DAVIS's, YouTube-VIS's and VIPSeg's:
JPEGImages[/480p]/<video>/<frames>, images/<video>/<frames>, imgs/<video>/<frames>.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from utils.picture_files import SUFFIXES
from utils.run import UserError
from utils.segmentation_files import need, read_json

INNER = ("JPEGImages/480p", "JPEGImages", "images", "imgs")
VOID = 255
VIDEOS = '{"videos": [{"id", "file_names"}]}, as YouTube-VIS has it'


@dataclass(frozen=True)
class Footage:
    """A video to run on."""

    name: str
    video_id: int | str  # in the results
    stems: list[str]  # of each frame, what its files are called
    size: tuple[int, int]  # (H, W)
    rate: Fraction | float  # frames per second
    files: list[Path]  # what it is read from
    frames: Callable[[], Iterator[np.ndarray]]  # from the first on, uint8 (H, W, 3) each

    def __len__(self) -> int:
        return len(self.stems)


def has_pictures(folder: Path) -> bool:
    return any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())


def folders_of(root: Path) -> dict[str, Path]:
    """{video: its folder of frames} in a folder. UserError where there is none, or one without frames."""
    if has_pictures(root):
        return {root.resolve().name: root}
    inner = next((root / name for name in INNER if (root / name).is_dir()), None)
    if inner is not None and has_pictures(inner):
        return {root.resolve().name: inner}
    below = sorted(p for p in (inner or root).iterdir() if p.is_dir())
    found = {p.name: p / "images" if (p / "images").is_dir() else p for p in below}
    if not found:
        raise UserError(f"{root}: holds no frames ({', '.join(SUFFIXES)}), so its video is empty; give a video file, a "
                        "folder of frames or a folder of such folders")  # fmt: skip
    for folder in found.values():
        if not has_pictures(folder):
            raise UserError(f"{folder}: holds no frames ({', '.join(SUFFIXES)}); take this empty video out")
    return found


def find_videos(names: list[str]) -> dict[str, Path]:
    """{video: its file, or its folder of frames}, by name. UserError for a name that is neither, a picture, two videos
    of one name."""
    videos: dict[str, Path] = {}
    for path in map(Path, names):
        if path.is_dir():
            new = folders_of(path)
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            raise UserError(f"{path}: is a picture; give a video file or a folder of frames")
        elif path.is_file():
            new = {path.stem: path}
        else:
            raise UserError(f"{path}: no such file or folder; give video files or folders of frames")
        for name in new.keys() & videos.keys():
            raise UserError(f"{new[name]} and {videos[name]}: are both video '{name}'; rename or leave out one")
        videos |= new
    return videos


def listed_videos(path: str, names: list[str]) -> dict[str, tuple[int, list[Path]]]:
    """{video: (id, files of its frames)} of the "videos" of a YouTube-VIS json, in folder names[0] or its JPEGImages;
    nothing else of the json is used. UserError for what is not there."""
    where = f"--videos {path}"
    if len(names) != 1 or not Path(names[0]).is_dir():
        raise UserError(f"{where}: needs the one folder that its frames lie in, not {' '.join(names)}; give that")
    root = Path(names[0])
    root = next((root / k for k in ("JPEGImages",) if (root / k).is_dir()), root)
    content = read_json("--videos", path)
    rows = content.get("videos") if isinstance(content, dict) else None
    found = {}
    for x in need(where, rows, {"id": int, "file_names": list}, VIDEOS):
        files = [root / str(name) for name in x["file_names"]]
        missing = next((p for p in files if not p.is_file()), None)
        if missing is not None or not files:
            raise UserError(
                f"{where}: video {x['id']} " + (f"lacks {missing}; get it" if files else "has no frames; leave it out")
            )
        name = files[0].parent.name
        if name in found:
            raise UserError(f"{where}: video '{name}' is there twice; leave out one")
        found[name] = x["id"], files
    if not found:
        raise UserError(f"{where}: lists no video; expected {VIDEOS}")
    return found


def first_masks(
    folder: str, name: str, stems: list[str], alone: bool, read: Callable[[Path], np.ndarray]
) -> dict[int, dict[int, dict]]:
    """{frame: {object: {"mask": (H, W) bool}}}: of each object the first palette PNG that holds it, of
    folder/<video>/<frame>.png, folder/<video>.png (of frame 0), or where there is one video folder/<frame>.png.

    read: a PNG -> object numbers (H, W), 255: not known. UserError for masks of no frame, no object on the first one.
    """
    where, number = Path(folder), {stem: t for t, stem in enumerate(stems)}
    if (where / f"{name}.png").is_file():
        files = {0: where / f"{name}.png"}
    else:
        inside = where / name if (where / name).is_dir() or not alone else where
        paths = sorted(inside.glob("*.png")) if inside.is_dir() else []
        if not paths:
            raise UserError(
                f"--masks {folder}: has no mask of video '{name}'; expected {name}/<frame>.png or {name}.png"
            )
        for path in paths:
            if path.stem not in number:
                raise UserError(
                    f"{path}: is the mask of no frame of video '{name}'; expected one named alike, as {stems[0]}"
                )
        files = dict(sorted((number[p.stem], p) for p in paths))
    seen, found = {0, VOID}, {}
    for t, path in files.items():
        ids = read(path)
        new = [int(i) for i in np.unique(ids) if int(i) not in seen]
        if not new and not found:
            raise UserError(f"{path}: no object is marked on this first mask; expected one to follow")
        seen |= set(new)
        if new:
            found[t] = {i: {"mask": ids == i} for i in new}
    return found
