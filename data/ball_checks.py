"""The checklist of ball labels as printed lines and refusals, and a sheet of pictures with the labelled place.

args: those of data/check_dataset.py: root (a ball csv or a folder of them), videos (a folder, else beside the csv),
size, columns, batch_size, show.
"""

from pathlib import Path

import numpy as np

from data.ball_labels import BallTrack, read_ball_csv
from data.peak_labels import SUFFIXES
from data.video import VideoReader
from utils import overlay
from utils.run import UserError

BALL_FORMATS = ("ball",)
HALF = 48  # px of the original frame around the ball that a cell shows
TWICE = 3  # a cell's enlargement


def check_ball(args) -> np.ndarray | None:
    """The whole list, and the sheet if --show asks for one: a row per csv, frames evenly spread over those with a ball."""
    if args.root is None:
        raise UserError("FORMAT ball needs ROOT: a ball csv or a folder of them; --help says which dialects")
    found = sorted(Path(args.root).rglob("*.csv")) if Path(args.root).is_dir() else [Path(args.root)]
    if not found:
        raise UserError(f"{args.root}: holds no csv; expected ball labels, as Label.csv")
    cells, names = [], []
    for path in found:
        video = video_of(path, args.videos)
        size, frames = (None, None) if video is None else video_size(video)
        track = read_ball_csv(path, size)
        describe(path, track, size, frames)
        if args.show and video is not None and len(names) < args.batch_size * args.columns:
            row = draw(track, video, args.columns)
            cells += [cell for cell, _ in row]
            names += [f"{path.stem} {text}" for _, text in row]
    if args.show and not cells:
        raise UserError(f"--show {args.show}: no csv of {args.root} has a video beside it; pass --videos FOLDER")
    return overlay.grid(cells, args.columns, names) if args.show else None


def video_of(path: Path, folder: str | None) -> Path | None:
    """The video of a csv: NAME.mp4 of NAME.csv or NAME_ball.csv, the longest such NAME; else the only video beside the
    only csv; None: none."""
    files = [p for p in sorted((Path(folder) if folder else path.parent).glob("*")) if p.suffix.lower() in SUFFIXES]
    same = [p for p in files if f"{path.stem}_".startswith(f"{p.stem}_")]
    alone = len(files) == 1 and len(list(path.parent.glob("*.csv"))) == 1
    return max(same, key=lambda p: len(p.stem)) if same else files[0] if alone else None


def video_size(video: Path) -> tuple[tuple[int, int], int]:
    """(W, H) px and the number of frames."""
    with VideoReader(video) as reader:
        return (reader.info.width, reader.info.height), len(reader)


def describe(path: Path, track: BallTrack, size: tuple[int, int] | None, frames: int | None) -> None:
    """Print what a csv holds. UserError for a frame that its video lacks and a seen ball outside the picture."""
    seen = track.seen()
    known = np.isfinite(seen[:, 0])
    if frames is not None and track.frames[-1] >= frames:
        raise UserError(f"{path}: names frame {track.frames[-1]}, its video has {frames} frames; wrong video?")
    limit = (
        np.full(2, np.inf) if size is None else np.array(size) - 0.5
    )  # px; a pixel reaches half a px around its centre
    outside = np.flatnonzero(((seen < -0.5) | (seen > limit)).any(1))
    if len(outside):
        k = outside[0]
        picture = "picture" if size is None else f"picture of {size[0]}x{size[1]} px"
        raise UserError(f"{path}: frame {track.frames[k]}: the ball is seen at {seen[k].tolist()}, outside the {picture}; "
                        "correct the labels")  # fmt: skip
    step = np.hypot(*np.diff(seen, axis=0).T)[np.diff(track.frames) == 1]
    step = step[np.isfinite(step)]
    kinds = ", ".join(f"{v}: {np.count_nonzero(track.visibility == v)}" for v in np.unique(track.visibility))
    names = {0: "flying", 1: "hit", 2: "bounce"}
    status = ", ".join(f"{names[s]} {n}" for s in names if (n := np.count_nonzero(track.status == s)))
    speed = "no two frames in a row"
    if len(step):
        speed = f"{np.median(step):.1f}/{np.percentile(step, 95):.1f}/{step.max():.1f} px a frame (median/95 %/max)"
    missing = track.frames[-1] - track.frames[0] + 1 - len(track.frames)
    without = np.count_nonzero(np.isin(track.visibility, (1, 2)) & ~known)
    print(
        f"{path}: dialect {track.dialect}, {len(track.frames)} frames {track.frames[0]}..{track.frames[-1]} "
        f"({missing} between them missing), visibility {kinds}; seen in {known.sum()}"
        + (f", {without} said to be visible without a position" if without else "")
        + f"; {speed}" + (f"; status {status}" if status else "")
        + ("; no video" if size is None else f"; video of {size[0]}x{size[1]} px, {frames} frames")
    )  # fmt: skip


def draw(track: BallTrack, video: Path, columns: int) -> list[tuple[np.ndarray, str]]:
    """`columns` cells cut from the frames around the labelled ball, enlarged, a cross on the label."""
    known = np.flatnonzero(np.isfinite(track.seen()[:, 0]))
    chosen = (
        known[np.linspace(0, len(known) - 1, min(columns, len(known))).round().astype(int)] if len(known) else known
    )
    cells = []
    with VideoReader(video) as reader:
        for k in chosen:
            t, (x, y) = int(track.frames[k]), track.xy[k].round().astype(int)
            image = np.pad(reader[t], ((HALF, HALF), (HALF, HALF), (0, 0)))[y : y + 2 * HALF, x : x + 2 * HALF]
            image = np.ascontiguousarray(image.repeat(TWICE, 0).repeat(TWICE, 1))
            c, arm = HALF * TWICE + TWICE // 2, 8 * TWICE
            for a, b in (
                (c - arm, c - arm // 2),
                (c + arm // 2, c + arm),
            ):  # open in the middle: the ball stays visible
                image[a:b, c] = image[c, a:b] = overlay.colour(1)
            cells.append((image, f"{t} ({track.visibility[k]})"))
    empty = np.full((2 * HALF * TWICE, 2 * HALF * TWICE, 3), overlay.DARK, np.uint8)
    return cells + [(empty, "")] * (columns - len(cells))
