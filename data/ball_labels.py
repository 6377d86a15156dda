"""Where the ball is, from label files of every TrackNet dialect, and tracked objects from YouTube-VIS and SA-Co json.

Dialects of ball csv, told apart by their header (further columns are kept out of the way):
    file name,visibility,x-coordinate,y-coordinate,status          TrackNet tennis; status 0 flying, 1 hit, 2 bounce
    File Name,Visibility Class,X,Y,Trajectory Pattern              the same by other names
    Frame,Visibility,X,Y                                           TrackNetV2/V3 badminton
    frame_num,visible,x,y                                          normalised: x, y are shares of width and height
A frame's number is the integer stem of its file name; numbers need not be contiguous. Visibility 0 out of sight, 1 easy,
2 hard, 3 occluded. Empty coordinates, NaN or 0,0 mean that there is no position. A column `score` is kept if there is.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.hota import Concept, ObjectTrack
from utils.masks import rle_area, rle_box
from utils.run import UserError
from utils.segmentation_files import checked_rle, need, read_json, same_items
from utils.track_files import read_tracks

DIALECTS = {  # name -> header of frame, visibility, x, y and, where there is one, status
    "tennis": ("file name", "visibility", "x-coordinate", "y-coordinate", "status"),
    "tennis, other names": ("file name", "visibility class", "x", "y", "trajectory pattern"),
    "badminton": ("frame", "visibility", "x", "y"),
    "normalised": ("frame_num", "visible", "x", "y"),
}
VISIBLE = (1, 2)  # visibilities that count as seen, as in WASB: 0 and 3 (occluded) do not


@dataclass
class BallTrack:
    """The ball in N frames of one clip, in order of frame numbers."""

    frames: np.ndarray  # (N,) int64 frame numbers
    xy: np.ndarray  # (N, 2) float64 px of the original frame, pixel centres at whole numbers; NaN: no position
    visibility: np.ndarray  # (N,) int64 0..3
    status: np.ndarray  # (N,) int64 0 flying, 1 hit, 2 bounce; -1 not annotated
    score: np.ndarray | None  # (N,) float64, NaN where absent; None: the file holds none
    size: tuple[int, int] | None  # W, H px where known
    dialect: str

    def seen(self, visible: tuple = VISIBLE) -> np.ndarray:
        """xy with NaN wherever the visibility is none of `visible`, (N, 2)."""
        return np.where(np.isin(self.visibility, visible)[:, None], self.xy, np.nan)


# ---- ball csv


def read_ball_csv(path: str | Path, size: tuple[int, int] | None = None) -> BallTrack:
    """A ball csv of any dialect. size W, H px: needed by the normalised dialect alone. UserError names the row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = [row for row in csv.reader(f) if any(cell.strip() for cell in row)]
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check the path") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read as csv ({e}); expected a ball csv") from e
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    dialect = next((d for d, names in DIALECTS.items() if set(names[:4]) <= set(header)), None)
    if dialect is None:
        known = "; ".join(",".join(names) for names in DIALECTS.values())
        raise UserError(f"{path}: header '{','.join(header)[:80]}' is of no known dialect; expected one of {known}")
    if dialect == "normalised" and size is None:
        raise UserError(f"{path}: x and y are shares of the frame, so its size is needed; pass --size WxH")
    names = DIALECTS[dialect]
    at = [header.index(n) if n in header else None for n in (*names, *("",) * (5 - len(names)), "score")]
    cells = [read_row(row, at, f"{path}: row {k}") for k, row in enumerate(rows[1:], 2)]
    if not cells:
        raise UserError(f"{path}: has a header but no row; expected one row per frame")
    table = np.array(sorted(cells))  # (N, 6) frame, visibility, x, y, status, score
    twice = table[1:, 0][np.diff(table[:, 0]) == 0]
    if len(twice):
        raise UserError(f"{path}: frame {int(twice[0])} stands in it twice; expected one row per frame")
    return BallTrack(
        frames=table[:, 0].astype(np.int64), xy=scale_positions(table[:, 2:4], dialect, size, path),
        visibility=table[:, 1].astype(np.int64), status=table[:, 4].astype(np.int64),
        score=table[:, 5] if "score" in header else None, size=size, dialect=dialect,
    )  # fmt: skip


def read_row(row: list[str], at: list[int | None], where: str) -> tuple[float, ...]:
    """One row -> frame, visibility, x, y (NaN without position), status (-1 without), score (NaN without)."""

    def cell(k: int) -> str:
        column = at[k]
        return "" if column is None or column >= len(row) else row[column].strip()

    def number(k: int, name: str, empty: float) -> float:
        try:
            return float(cell(k)) if cell(k) else empty
        except ValueError as e:
            raise UserError(f"{where}: {name} '{cell(k)}' is not a number; correct the file") from e

    stem = Path(cell(0)).stem if not cell(0).replace(".", "").isdigit() else cell(0).split(".")[0]
    if not (stem.isascii() and stem.isdigit()):
        raise UserError(f"{where}: '{cell(0)}' names no frame; expected a number, as 12 or 0012.jpg")
    visibility, x, y = number(1, "visibility", 0.0), number(2, "x", math.nan), number(3, "y", math.nan)
    if visibility not in (0, 1, 2, 3):
        raise UserError(f"{where}: visibility {cell(1)} is none of 0, 1, 2, 3; correct the file")
    if math.isinf(x) or math.isinf(y):
        raise UserError(f"{where}: x or y is infinite; expected pixels, or nothing where the ball is not seen")
    if math.isnan(x) or math.isnan(y) or (x == 0 and y == 0):
        x = y = math.nan
    status = number(4, "status", -1.0)
    return int(stem), visibility, x, y, -1.0 if math.isnan(status) else status, number(5, "score", math.nan)


def scale_positions(xy: np.ndarray, dialect: str, size: tuple[int, int] | None, path: str | Path) -> np.ndarray:
    """xy (N, 2) in px. UserError when shares of the frame are not in 0..1."""
    if dialect != "normalised":
        return xy
    if np.nanmax(np.abs(xy), initial=0) > 1:
        raise UserError(
            f"{path}: by its header x and y are shares in 0..1, but it holds {np.nanmax(xy):g}; for pixels use the "
            "header Frame,Visibility,X,Y"
        )
    return xy * np.array(size, float)


def read_ball(path: str | Path, size=None, target: str | None = None, interpolated: bool = False) -> BallTrack:
    """The ball of a tracks.json (its target: `target`, else "ball", else the only one) or of a ball csv.

    interpolated: count positions that were filled in (visible false) as predicted. UserError for a wrong size.
    """
    if Path(path).suffix.lower() != ".json":
        return read_ball_csv(path, size)
    tracks = read_tracks(path)
    names, own = sorted(tracks.targets), (tracks.video["width"], tracks.video["height"])
    if target is None and "ball" not in names and len(names) > 1:
        raise UserError(f"{path}: holds the targets {', '.join(names)}; choose one with --target")
    name = target or ("ball" if "ball" in names else names[0])
    if name not in names:
        raise UserError(f"{path}: holds no target {name}; expected one of {', '.join(names)}")
    if size is not None and tuple(size) != own:
        raise UserError(
            f"{path}: is of a video of {own[0]}x{own[1]} px, --size says {size[0]}x{size[1]}; correct --size"
        )
    track = tracks.targets[name]
    xy = track.xy(filled=interpolated)
    here = np.isfinite(xy[:, 0])
    return BallTrack(
        frames=np.arange(len(xy)), xy=xy, visibility=here.astype(np.int64), status=np.full(len(xy), -1),
        score=np.where(here, track.scores(), np.nan), size=own, dialect="tracks.json",
    )  # fmt: skip


# ---- several objects: YouTube-VIS and SA-Co json, tracks.json


def read_concepts(labels: str | Path, pred: str | Path, kind: str) -> tuple[list[Concept], bool]:
    """Every prompt of every video, with what is there and what was found -> concepts, whether absent prompts are named.

    labels: YouTube-VIS json {videos, annotations, categories}, or SA-Co's, whose video_np_pairs also name the prompts
    that are absent. pred: their results [{video_id, category_id, score, segmentations, bboxes?}], or a tracks.json of
    one of the videos, found by its name; its prompts are noun phrases or names of categories. kind mask | box: what
    has to be there. UserError for files that do not belong together.
    """
    content, where = read_json("--labels", labels), f"--labels {labels}"
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a json object with videos, annotations and categories (YouTube-VIS, SA-Co)")
    videos = need(f"{where}: videos", content.get("videos"), {"id": int, "height": int, "width": int},
                  "YouTube-VIS videos with id, height, width")  # fmt: skip
    videos = {v["id"]: v | {"T": len(v.get("file_names", ())) or v.get("length", 0)} for v in videos}
    items = need(f"{where}: annotations", content.get("annotations"), {"video_id": int, "category_id": int},
                 "YouTube-VIS annotations with video_id, category_id and segmentations or bboxes")  # fmt: skip
    names = {c["id"]: c["name"] for c in content.get("categories", ())}
    pairs = content.get("video_np_pairs", [])
    names |= {x["category_id"]: x["noun_phrase"] for x in (*items, *pairs) if "noun_phrase" in x}
    concepts = {}
    for x in (*items, *pairs):
        key = x["video_id"], x["category_id"]
        if key[0] not in videos or key[1] not in names:
            raise UserError(f"{where}: names video {key[0]} and category {key[1]}, which it does not list")
        v = videos[key[0]]
        title = str(v.get("video_name") or Path(v.get("file_names", [str(v["id"])])[0]).parts[0])
        concepts.setdefault(key, Concept(title, names[key[1]], v["T"], (v["height"], v["width"])))
    for k, x in enumerate(items):
        one = concepts[x["video_id"], x["category_id"]]
        one.gt.append(object_track(x, one, kind, f"{where}: annotation {k}"))
    if Path(pred).suffix.lower() == ".json" and isinstance(found := read_json("--pred", pred), list):
        fill_results(concepts, found, videos, names, kind, f"--pred {pred}")
    else:
        fill_tracks(list(concepts.values()), pred, kind)
    return list(concepts.values()), bool(pairs)


def fill_results(concepts: dict, found: list, videos: dict, names: dict, kind: str, where: str) -> None:
    """Put results in YouTube-VIS layout into the concepts; a prompt that the labels lack is a new, absent one."""
    fields = {"video_id": int, "category_id": int, "score": (int, float)}
    for k, x in enumerate(need(where, found, fields, "results with video_id, category_id, score and segmentations")):
        key = x["video_id"], x["category_id"]
        if key[0] not in videos or key[1] not in names:
            raise UserError(
                f"{where}: item {k} is of video {key[0]}, category {key[1]}, not in the labels; leave it out"
            )
        v = videos[key[0]]
        any_of = next((c for (video, _), c in concepts.items() if video == key[0]), None)
        title = any_of.video if any_of else str(key[0])
        one = concepts.setdefault(key, Concept(title, names[key[1]], v["T"], (v["height"], v["width"])))
        one.pred.append(object_track(x, one, kind, f"{where}: item {k}"))


def object_track(x: dict, one: Concept, kind: str, where: str) -> ObjectTrack:
    """One item of YouTube-VIS json. Frames with an empty mask or box have none."""
    codes, boxes = x.get("segmentations"), x.get("bboxes")
    if (codes if kind == "mask" else boxes or codes) is None:
        raise UserError(f"{where}: holds no {'segmentations' if kind == 'mask' else 'bboxes'}; choose another --kind")
    for name, side in (("segmentations", codes), ("bboxes", boxes)):
        if side is not None and (not isinstance(side, list) or len(side) != one.frames):
            n = len(side) if isinstance(side, list) else 0
            raise UserError(f"{where}: {n} {name}, its video has {one.frames} frames; expected one a frame")
    try:
        masks = [None if s is None else checked_rle(s, *one.size) for s in codes or [None] * one.frames]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{where}: a segmentation cannot be read ({e}); expected COCO run-length codes") from e
    masks = [m if m is not None and rle_area(m) else None for m in masks]
    boxes = [None if m is None else rle_box(m) for m in masks] if boxes is None else boxes
    boxes = [
        b if b is not None and any(b) and (codes is None or m) else None for b, m in zip(boxes, masks, strict=True)
    ]
    if codes is not None:  # as the official tool: where one is missing, the object is absent
        masks = [m if b is not None else None for b, m in zip(boxes, masks, strict=True)]
    return ObjectTrack(masks, boxes, float(x.get("score", 1.0)))


def fill_tracks(concepts: list[Concept], path: str | Path, kind: str) -> None:
    """Put a tracks.json into the concepts of its video. Mode single is one object, mode all one for each obj_id."""
    tracks = read_tracks(path)
    stem = Path(tracks.video["path"]).stem
    own = [c for c in concepts if Path(c.video).stem == stem]
    if not own or len(own) < len(concepts):
        there = ", ".join(sorted({c.video for c in concepts})[:4])
        raise UserError(f"--pred {path}: is of the video {stem}, the labels of {there}; expected labels of that video")
    H, W, T = (tracks.video[k] for k in ("height", "width", "num_frames"))
    if (own[0].frames, *own[0].size) != (T, H, W):
        raise UserError(f"--pred {path}: {T} frames of {W}x{H} px, the labels have {own[0].frames} of "
                        f"{own[0].size[1]}x{own[0].size[0]}; predict on the labelled video")  # fmt: skip
    asked = {name: t.prompt or name for name, t in tracks.targets.items()}
    same_items(f"--pred {path}", "prompt", set(asked.values()), {c.prompt for c in own})
    for name, track in tracks.targets.items():
        one = next(c for c in own if c.prompt == asked[name])
        found: dict[int, list] = {}
        for t, point in enumerate(track.frames):
            for p in [point] if track.mode == "single" else point.objects or ():
                if p.visible:
                    found.setdefault(p.obj_id if track.mode == "all" else 0, [None] * T)[t] = p
        for points in found.values():
            seen = [p for p in points if p is not None]
            if any((p.rle if kind == "mask" else p.box) is None for p in seen):
                raise UserError(f"--pred {path}: {name} has frames without a {kind}; predict with --masks")
            boxes = [p and (p.box[0], p.box[1], p.box[2] - p.box[0] + 1, p.box[3] - p.box[1] + 1) for p in points]
            masks = [p and p.rle for p in points]
            one.pred.append(ObjectTrack(masks, boxes, float(np.mean([p.score or 0.0 for p in seen]))))
