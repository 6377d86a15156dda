"""Tracks on disk: tracks.json (one file per video), read and written, and NAME.csv in the columns of TrackNet's tennis.

    {"version": 1,
     "video": {"path", "width", "height", "fps", "num_frames", "sha1", ...},
     "model": {"kind", "path", "dtype", "thresholds", ...},
     "targets": {"ball": {"prompt": "tennis ball", "mode": "single", "frames": [
         {"frame": 0, "x", "y", "box": [x0, y0, x1, y1], "score", "det_score", "trk_score", "area", "obj_id",
          "source": "detector", "visible": true, "rle"?, "x_s"?, "y_s"?, "objects"?: [...]}, ...]}},
     "events": [{"frame", "target", "reason", "state", "x", "y", "score"}, ...]}

Coordinates are px of the original frame, pixel centres at whole numbers; x, y is the centre of the mask, box its first
and last column and row. Every frame 0 .. num_frames - 1 stands in `frames` once; x and y are null where nothing is
reported. source: detector (a detection of that frame), tracker (its mask alone), classical (motion), interp (a gap
filled afterwards: visible is false, and the csv leaves it out). x_s, y_s: smoothed, beside the raw values.
mode all: `objects` lists every object of the frame, and the fields beside it repeat the best one. A run that was
stopped has video.stopped_early, the number of frames of the whole video; num_frames is what was tracked.
"""

import csv
import hashlib
import io
import json
import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from utils.run import UserError, commit, write_text_atomic
from utils.weights import file_sha256

VERSION = 1
SOURCES = ("detector", "tracker", "interp", "classical")
MODES = ("single", "all")
CSV_COLUMNS = ["file name", "visibility", "x-coordinate", "y-coordinate", "status"]
DIGITS = 4  # behind the point, of px and scores


@dataclass(slots=True)
class Point:
    """One object in one frame; without a place (x None) it is not reported."""

    x: float | None = None  # px
    y: float | None = None
    box: tuple[float, float, float, float] | None = None  # xyxy px
    score: float | None = None  # of what was taken
    det_score: float | None = None  # of the detection of this frame
    trk_score: float | None = None  # of the tracker's answer in this frame
    area: int | None = None  # px
    obj_id: int | None = None
    source: str | None = None  # one of SOURCES
    visible: bool = False
    rle: dict | None = None  # mask, in COCO's code
    x_s: float | None = None  # smoothed, px
    y_s: float | None = None
    objects: "list[Point] | None" = None  # mode all


OPTIONAL = ("rle", "x_s", "y_s", "objects")  # left out of the file where None


@dataclass
class Track:
    """What one prompt gave: frames[t] is frame t."""

    prompt: str | None
    mode: str = "single"
    frames: list[Point] = field(default_factory=list)

    def xy(self, filled: bool = False) -> np.ndarray:
        """(T, 2) float64 px, nan where nothing is reported. filled: interpolated frames too."""
        shown = [p if p.x is not None and (filled or p.visible) else None for p in self.frames]
        return np.array([(math.nan, math.nan) if p is None else (p.x, p.y) for p in shown]).reshape(-1, 2)

    def scores(self) -> np.ndarray:
        """(T,) float64, nan where there is none."""
        return np.array([math.nan if p.score is None else p.score for p in self.frames])


@dataclass
class Tracks:
    """The content of tracks.json."""

    video: dict
    model: dict
    targets: dict[str, Track]
    events: list[dict] = field(default_factory=list)


# ---- writing


def plain(value):
    """Numbers of numpy as Python's, floats rounded; tuples as lists."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    return round(float(value), DIGITS) if isinstance(value, float | np.floating) else value


def point_dict(p: Point) -> dict:
    """A point as it stands in the file, without its frame."""
    found = {f.name: getattr(p, f.name) for f in fields(Point)}
    objects = found["objects"]
    found["objects"] = None if objects is None else [point_dict(o) for o in objects]
    return {k: plain(v) if k != "objects" else v for k, v in found.items() if k not in OPTIONAL or v is not None}


def write_tracks(path: str | Path, tracks: Tracks) -> None:
    """Write tracks.json atomically, a line per frame. ValueError when a target's frames are not video.num_frames."""
    n, blocks = tracks.video["num_frames"], []
    for name, track in tracks.targets.items():
        if len(track.frames) != n:
            raise ValueError(f"target {name} has {len(track.frames)} frames, the video {n}")
        rows = ",\n".join("   " + json.dumps({"frame": t, **point_dict(p)}) for t, p in enumerate(track.frames))
        head = f'"prompt": {json.dumps(track.prompt)}, "mode": {json.dumps(track.mode)}'
        blocks.append(f'  {json.dumps(name)}: {{{head}, "frames": [\n{rows}\n  ]}}')
    events = ",\n".join("  " + json.dumps({k: plain(v) for k, v in e.items()}) for e in tracks.events)
    parts = [f'"version": {VERSION}', f'"video": {json.dumps(tracks.video)}', f'"model": {json.dumps(tracks.model)}']
    parts += ['"targets": {\n' + ",\n".join(blocks) + "\n }", f'"events": [\n{events}\n ]']
    write_text_atomic(path, "{" + ",\n ".join(parts) + "}\n")


def write_ball_csv(path: str | Path, track: Track) -> None:
    """Write a track in TrackNet's tennis columns, a row per frame; x and y are empty where visibility is 0.

    Interpolated frames are not visible. Where a track is smoothed, two columns x_s, y_s stand behind.
    """
    text, smoothed = io.StringIO(), any(p.x_s is not None for p in track.frames)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS + ["x_s", "y_s"] * smoothed)
    for t, p in enumerate(track.frames):
        values = [p.x, p.y] if p.visible else [None, None]
        more = [p.x_s, p.y_s] * smoothed if p.visible else [None, None] * smoothed
        cells = ["" if v is None else f"{v:.2f}" for v in [*values, *more]]
        writer.writerow([f"{t:04d}.jpg", int(p.visible), *cells[:2], 0, *cells[2:]])
    write_text_atomic(path, text.getvalue())


def describe_video(info, num_frames: int, of: int) -> dict:
    """The file's `video`. info: data.video.VideoInfo; num_frames: tracked, of: in the video."""
    with open(info.path, "rb") as f:
        sha1 = hashlib.file_digest(f, "sha1").hexdigest()
    about = {"path": info.path, "width": info.width, "height": info.height, "fps": info.fps, "num_frames": num_frames}
    return about | {"sha1": sha1} | ({"stopped_early": of} if num_frames < of else {})


def write_all(folder: Path, tracks: Tracks, flags: dict, command: str) -> None:
    """tracks.json, a csv for each target, and tracks.json.meta.json: weights, flags, video, command, time."""
    path = tracks.model["path"]
    weights = [] if path is None else sorted(Path(path).glob("*.safetensors"))
    about = {"checkpoint": path, "checkpoint_sha256": {p.name: file_sha256(p) for p in weights}, "config": flags}
    about["inputs"] = [{"path": tracks.video["path"], "sha256": file_sha256(tracks.video["path"])}]
    about |= {"command": command, "commit": commit(), "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    write_text_atomic(folder / "tracks.json.meta.json", json.dumps(about, indent=1, default=str) + "\n")
    for name, track in tracks.targets.items():
        write_ball_csv(folder / f"{name}.csv", track)
    write_tracks(folder / "tracks.json", tracks)


# ---- reading


def read_tracks(path: str | Path) -> Tracks:
    """Read and check tracks.json. UserError names what does not fit."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a tracks.json of eval/infer_ball.py")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not readable as json ({e}); expected a tracks.json") from e
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise UserError(f'{path}: expected a json object with "version": {VERSION}; make it with eval/infer_ball.py')
    video, targets = need(found, "video", dict, path), need(found, "targets", dict, path)
    model, events = need(found, "model", dict, path), need(found, "events", list, path)
    n = need(video, "num_frames", int, f"{path}: video")
    for key in ("width", "height"):
        if need(video, key, int, f"{path}: video") < 1:
            raise UserError(f"{path}: video: {key} is {video[key]}, expected at least 1")
    if not number(video.get("fps")) or video["fps"] <= 0 or n < 1:
        raise UserError(f"{path}: video: expected fps > 0 and num_frames >= 1, got {video.get('fps')} and {n}")
    if not targets:
        raise UserError(f"{path}: targets is empty; expected at least one")
    read = {name: read_track(target, n, f"{path}: {name}") for name, target in targets.items()}
    for event in events:
        known = isinstance(event, dict) and event.get("target") in targets and isinstance(event.get("frame"), int)
        if not known or not 0 <= event["frame"] < n:
            raise UserError(f"{path}: events: expected a frame of 0..{n - 1} and a target of the file, got {event}")
    return Tracks(video, model, read, events)


def read_track(target: dict, n: int, where: str) -> Track:
    """One target of the file; its n frames may stand in any order."""
    if not isinstance(target, dict):
        raise UserError(f"{where}: expected an object with prompt, mode and frames")
    if target.get("mode") not in MODES:
        raise UserError(f"{where}: mode is {target.get('mode')!r}, expected one of {', '.join(MODES)}")
    rows, points = need(target, "frames", list, where), {}
    for row in rows:
        t = need(row, "frame", int, f"{where}: frames") if isinstance(row, dict) else None
        if t is None or not 0 <= t < n or t in points:
            raise UserError(f"{where}: frame {t}: expected every frame of 0..{n - 1} once")
        points[t] = read_point(row, f"{where}: frame {t}")
    if len(points) != n:
        absent = next(t for t in range(n) if t not in points)
        raise UserError(f"{where}: {len(points)} frames, the video has {n}; frame {absent} is missing")
    return Track(target.get("prompt"), target["mode"], [points[t] for t in range(n)])


def read_point(row: dict, where: str) -> Point:
    """One frame, or one of its objects."""
    names = {f.name for f in fields(Point)} - {"objects"}
    for key in ("x", "y", "score", "det_score", "trk_score", "area", "x_s", "y_s"):
        if row.get(key) is not None and not number(row[key]):
            raise UserError(f"{where}: {key} is {row[key]!r}, expected a number or null")
    p = Point(**{k: v for k, v in row.items() if k in names})
    if (p.x is None) != (p.y is None) or not isinstance(p.visible, bool):
        raise UserError(f"{where}: expected both x and y or none, and visible true or false")
    if p.x is None and p.visible or p.x is not None and p.source not in SOURCES:
        raise UserError(f"{where}: x {p.x}, visible {p.visible}, source {p.source!r}; what is visible has a place, and "
                        f"what has a place has a source: {', '.join(SOURCES)}")  # fmt: skip
    if p.source == "interp" and p.visible:
        raise UserError(f"{where}: is interpolated and visible; interpolated frames have visible false")
    if p.box is not None:
        if not isinstance(p.box, list) or len(p.box) != 4 or not all(number(v) for v in p.box):
            raise UserError(f"{where}: box is {p.box!r}, expected four numbers x0, y0, x1, y1")
        p.box = tuple(p.box)
    if row.get("objects") is not None:
        if not isinstance(row["objects"], list) or not all(isinstance(o, dict) for o in row["objects"]):
            raise UserError(f"{where}: objects is no list of objects")
        p.objects = [read_point(o, f"{where}, object {k}") for k, o in enumerate(row["objects"])]
    return p


def need(parent: dict, key: str, kind: type, where):
    """parent[key], of that type. UserError otherwise."""
    value = parent.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key} is {str(value)[:60]!r}, expected {kind.__name__}; is this a tracks.json?")
    return value


def number(value) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
