"""Peak labels and predictions on disk: the E2E-Spot json, our CSV, OSL json v2, SoccerNet json.

Label file (E2E-Spot, jhong93/spot data/*/*.json): a list of videos
    {video, num_frames, fps, width, height, events: [{frame, label, lo?, hi?, comment?}], complete_for?}
`frame` counts decoded frames from 0; `lo..hi` is the first and last frame judged possible (both inclusive);
`complete_for` names the classes that are fully annotated in this video (absent: all); fps -1 is unknown (FineDiving).
A prediction file is the same with `score` in [0, 1] per event; its frames may be fractional, and num_frames, width and
height may be absent there, because E2E-Spot's own prediction files hold only {video, fps, events}.
Keys that are not named here are kept as they are. `num_events` is ignored when read and written anew.
"""

import csv
import io
import json
import math
from pathlib import Path

from utils import run
from utils.run import UserError

CSV_COLUMNS = ["video", "frame", "time_s", "label", "score"]


# ---- E2E-Spot json


def load_labels(path: str | Path) -> list[dict]:
    """Read and check a label file; every video has num_frames, fps, width, height, events. UserError on a fault."""
    return check_videos(_read_json(path), str(path), scored=False)


def load_predictions(path: str | Path) -> list[dict]:
    """Read and check a prediction file: as labels, every event with a `score` in [0, 1]. UserError on a fault."""
    return check_videos(_read_json(path), str(path), scored=True)


def write_predictions(path: str | Path, preds: list[dict]) -> None:
    """Write predictions (or labels: events without `score`) as E2E-Spot json, atomically. UserError on a fault."""
    scored = any("score" in e for v in preds for e in v["events"])
    preds = check_videos(preds, str(path), scored)
    _write_json(path, [{**v, "num_events": len(v["events"])} for v in preds])


def check_videos(videos: list[dict], where: str, scored: bool) -> list[dict]:
    """The list, without `num_events`, of a correct label (scored=False) or prediction file; UserError names `where`."""
    if not isinstance(videos, list) or not videos:
        raise UserError(f"{where}: expected a non-empty json list of videos (E2E-Spot layout), got {_brief(videos)}")
    seen, checked = set(), []
    for index, video in enumerate(videos):
        name = video.get("video") if isinstance(video, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: item {index} has no key 'video' holding a name; got {_brief(video)}")
        if name in seen:
            raise UserError(f"{where}: video '{name}' stands in the file twice; merge its events into one item")
        seen.add(name)
        _check_video(video, f"{where}: video '{name}'", scored)
        checked.append({k: v for k, v in video.items() if k != "num_events"})
    return checked


def _check_video(video: dict, where: str, scored: bool) -> None:
    optional = {"num_frames", "width", "height"} if scored else set()
    for key in ("num_frames", "width", "height"):
        if key not in video and key in optional:
            continue
        if not _is_int(_need(video, key, where)) or video[key] < 1:
            raise UserError(f"{where}: {key} must be an integer >= 1, got {_brief(video[key])}")
    fps = _need(video, "fps", where)
    if not _is_number(fps) or (fps <= 0 and fps != -1):
        raise UserError(f"{where}: fps must be frames per second > 0, or -1 for unknown, got {_brief(fps)}")
    if not isinstance(_need(video, "events", where), list):
        raise UserError(f"{where}: events must be a list, got {_brief(video['events'])}")
    complete = video.get("complete_for", [])
    if not isinstance(complete, list) or not all(isinstance(c, str) for c in complete):
        raise UserError(f"{where}: complete_for must be a list of class names, got {_brief(complete)}")
    for index, event in enumerate(video["events"]):
        _check_event(event, video.get("num_frames", math.inf), f"{where}, event {index}", scored)


def _check_event(event: dict, num_frames: float, where: str, scored: bool) -> None:
    if not isinstance(event, dict):
        raise UserError(f"{where}: expected an object with frame and label, got {_brief(event)}")
    frame, label = _need(event, "frame", where), _need(event, "label", where)
    if not isinstance(label, str) or not label:
        raise UserError(f"{where}: label must be a class name, got {_brief(label)}")
    if not (_is_number(frame) if scored else _is_int(frame)):
        raise UserError(f"{where}: frame must be {'a number' if scored else 'an integer'}, got {_brief(frame)}")
    if not 0 <= frame < num_frames:
        raise UserError(f"{where}: frame {frame} is outside [0, {num_frames}), the frames of this video")
    if "lo" in event or "hi" in event:
        lo, hi = _need(event, "lo", where), _need(event, "hi", where)
        if not (_is_number(lo) and _is_number(hi) and 0 <= lo <= frame <= hi < num_frames):
            raise UserError(
                f"{where}: needs 0 <= lo <= frame <= hi < num_frames, got {_brief(lo)}, {frame}, {_brief(hi)}"
            )
    if "comment" in event and not isinstance(event["comment"], str):
        raise UserError(f"{where}: comment must be text, got {_brief(event['comment'])}")
    if scored:
        score = _need(event, "score", where, " (a prediction file has one per event; is this a label file?)")
        if not _is_number(score) or not 0 <= score <= 1:
            raise UserError(f"{where}: score must be a number in [0, 1], got {_brief(score)}")


def class_names(labels: list[dict]) -> list[str]:
    """Sorted class names that occur in events or complete_for. Background is not among them."""
    return sorted(
        {e["label"] for v in labels for e in v["events"]} | {c for v in labels for c in v.get("complete_for", [])}
    )


def window(items: list[dict], start: int, stop: int | None = None) -> list[dict]:
    """Labels or predictions with only the events in frames [start, stop) of each video; stop None means to the end.

    Frame numbers and num_frames stay those of the whole video. `lo..hi` is not cut.
    """
    if start < 0 or (stop is not None and stop <= start):
        raise UserError(f"frames {start}:{stop}: expected 0 <= START < STOP")
    end = math.inf if stop is None else stop
    return [{**v, "events": [e for e in v["events"] if start <= e["frame"] < end]} for v in items]


def pair_with_labels(preds: list[dict], labels: list[dict], where: str) -> list[dict]:
    """The predictions in the order of the labels. UserError unless both hold the same videos, frame counts and fps."""
    found, names = {v["video"]: v for v in preds}, {v["video"] for v in labels}
    for kind, some in (("lack a prediction", names - set(found)), ("are not in the labels", set(found) - names)):
        if some:
            raise UserError(
                f"{where}: {len(some)} videos {kind}, as '{min(some)}'; both files must hold the same split"
            )
    for t in labels:
        p, size, this = found[t["video"]], t["num_frames"], f"{where}: video '{t['video']}'"
        if p.get("num_frames", size) != size:
            raise UserError(f"{this} has {p['num_frames']} frames, in the labels {size}; predict on the labelled file")
        if min(p["fps"], t["fps"]) > 0 and abs(p["fps"] - t["fps"]) > 0.01:
            raise UserError(f"{this} has {p['fps']} fps, in the labels {t['fps']}; predict on the labelled file")
        late = [e["frame"] for e in p["events"] if e["frame"] >= size]
        if late:
            raise UserError(f"{this} has an event at frame {late[0]}, the video ends at {size}")
    return [found[t["video"]] for t in labels]


def keep_classes(
    labels: list[dict], preds: list[dict], chosen: list[str]
) -> tuple[list[dict], list[dict], dict[str, int]]:
    """Both lists (same videos, same order) with only the chosen classes that each video's `complete_for` names.

    The third value counts the events left out: {"other classes", "not complete, labels", "not complete, predictions"}.
    """
    dropped = {"other classes": 0, "not complete, labels": 0, "not complete, predictions": 0}
    sides = {"labels": [], "predictions": []}
    for side, videos in (("labels", labels), ("predictions", preds)):
        for v, complete in zip(videos, [t.get("complete_for", chosen) for t in labels], strict=True):
            in_class = [e for e in v["events"] if e["label"] in chosen]
            sides[side].append({**v, "events": [e for e in in_class if e["label"] in complete]})
            dropped["other classes"] += len(v["events"]) - len(in_class)
            dropped[f"not complete, {side}"] += len(in_class) - len(sides[side][-1]["events"])
    return sides["labels"], sides["predictions"], dropped


# ---- CSV


def write_csv(path: str | Path, preds: list[dict]) -> None:
    """One row per event: video,frame,time_s,label,score. time_s is the event's own, else frame / fps, else empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(CSV_COLUMNS)
    for v in preds:
        for e in v["events"]:
            time_s = e.get("time_s", e["frame"] / v["fps"] if v["fps"] > 0 else "")
            table.writerow([v["video"], e["frame"], time_s, e["label"], e.get("score", "")])
    run.write_text_atomic(path, text.getvalue())


def read_csv(path: str | Path) -> list[dict]:
    """[{video, events: [{frame, time_s?, label, score?}]}] in file order; a video without events is not in a CSV."""
    try:
        with open(path, encoding="utf-8", newline="") as f:  # newline="": csv itself knows line ends inside quotes
            rows = list(csv.reader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from error
    if not rows or rows[0] != CSV_COLUMNS:
        raise UserError(
            f"{path}: first line must be {','.join(CSV_COLUMNS)}, got {','.join(rows[0]) if rows else 'nothing'}"
        )
    videos: dict[str, dict] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(CSV_COLUMNS) or not row[0] or not row[3]:
            raise UserError(f"{path}: row {number} must hold {','.join(CSV_COLUMNS)}, got {row}")
        frame = _number(row[1], f"{path}: row {number}: frame")
        event = {"frame": frame, "time_s": row[2], "label": row[3], "score": row[4]}
        for key in ("time_s", "score"):
            if event[key] == "":
                del event[key]
            else:
                event[key] = float(_number(event[key], f"{path}: row {number}: {key}"))
        if frame < 0 or not 0 <= event.get("score", 0) <= 1:
            raise UserError(f"{path}: row {number}: expected frame >= 0 and score in [0, 1], got {row}")
        videos.setdefault(row[0], {"video": row[0], "events": []})["events"].append(event)
    return list(videos.values())


# ---- formats of others: times in milliseconds, frame = round(position * fps / 1000)


def load_osl(path: str | Path, sizes: dict[str, dict] | None = None) -> list[dict]:
    """OSL JSON v2 (OpenSportsLib, task action_spotting) -> labels, or predictions when events have a confidence.

    OSL does not hold num_frames, width and height (write_osl puts them into a sample's metadata) and its fps may be
    that of a feature file: sizes {id: {num_frames, fps, width, height}} supplies them and wins. UserError where they
    lack.
    """
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path}: expected OSL json, an object with a list 'data', got {_brief(content)}")
    videos = []
    for index, sample in enumerate(_objects(content["data"], f"{path}: data")):
        where = f"{path}: data[{index}]"
        inputs = _objects(sample.get("inputs", []), f"{where}: inputs")
        source = next((x for x in inputs if x.get("type") == "video"), {})
        name = sample.get("id", Path(source.get("path", "")).stem)
        known = {"fps": source.get("fps"), **sample.get("metadata", {}), **(sizes or {}).get(name, {})}
        known = {k: known.get(k) for k in ("num_frames", "fps", "width", "height")}
        if not all(_is_number(x) and x > 0 for x in known.values()):
            raise UserError(
                f"{where} ('{name}'): needs num_frames, fps, width and height of the video, got {_brief(known)}"
            )
        rows = _objects(sample.get("events", []), f"{where}: events")
        events = [_from_ms(e, known["fps"], "position_ms", "confidence", where) for e in rows]
        videos.append({"video": name, **known, "events": events})
    return check_videos(videos, str(path), scored=any("score" in e for v in videos for e in v["events"]))


def write_osl(path: str | Path, videos: list[dict], suffix: str = ".mp4") -> None:
    """Labels or predictions as OSL JSON v2. Needs a known fps per video; a fractional frame is rounded to the ms."""
    head = {"action": {"type": "single_label", "labels": class_names(videos)}}
    data = []
    for v in videos:
        events = []
        for e in v["events"]:
            ms = _to_ms(e, v)
            events.append({"head": "action", "label": e["label"], "position_ms": ms, "gameTime": _game_time(ms, 1)})
            events[-1] |= {"confidence": e["score"]} if "score" in e else {}
        source = {"type": "video", "path": v["video"] + suffix, "fps": v["fps"]}
        metadata = {k: v[k] for k in ("num_frames", "width", "height") if k in v}
        data.append({"id": v["video"], "inputs": [source], "metadata": metadata, "events": events})
    _write_json(
        path, {"version": "2.0", "task": "action_spotting", "modalities": ["video"], "labels": head, "data": data}
    )


def load_soccernet(path: str | Path, video: dict, half: int = 1) -> list[dict]:
    """SoccerNet labels {annotations: [...]} or results {predictions: [...]} of one half -> a list of one video.

    video: {video, num_frames, fps, width, height}, which the SoccerNet files do not hold. visibility and team are kept.
    """
    content = _read_json(path)
    key = "annotations" if isinstance(content, dict) and "annotations" in content else "predictions"
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(
            f"{path}: expected SoccerNet json with a list 'annotations' or 'predictions', got {_brief(content)}"
        )
    rows = _objects(content[key], f"{path}: {key}")
    rows = [r for r in rows if str(r.get("half", r.get("gameTime", "1")))[:1] == str(half)]
    events = [_from_ms(r, video["fps"], "position", "confidence", f"{path}: '{key}'") for r in rows]
    return check_videos([{**video, "events": events}], str(path), scored=key == "predictions")


def write_soccernet(path: str | Path, video: dict, url: str, half: int = 1) -> None:
    """Predictions of one half as SoccerNet's results_spotting.json; url is the game's UrlLocal."""
    rows = []
    for e in video["events"]:
        ms = _to_ms(e, video)
        row = {"gameTime": _game_time(ms, half), "label": e["label"], "position": str(ms)}
        rows.append({**row, "half": str(half), "confidence": str(e["score"])})
    _write_json(path, {"UrlLocal": url, "predictions": rows})


def _from_ms(row: dict, fps: float, time_key: str, score_key: str, where: str) -> dict:
    ms = _number(str(_need(row, time_key, where)), f"{where}: {time_key}")
    event = {"frame": round(ms * fps / 1000), "label": _need(row, "label", where)}
    if score_key in row:
        event["score"] = float(_number(str(row[score_key]), f"{where}: {score_key}"))
    return {**event, **{k: row[k] for k in ("visibility", "team") if k in row}}


def _to_ms(event: dict, video: dict) -> int:
    if video["fps"] <= 0:
        raise UserError(f"video '{video['video']}': its fps is unknown (-1), so its frames have no time; set fps first")
    return round(event["frame"] * 1000 / video["fps"])


def _game_time(ms: int, half: int) -> str:
    return f"{half} - {ms // 60_000:02d}:{ms // 1000 % 60:02d}"


# ---- helpers


def _read_json(path: str | Path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not json, or not utf-8
        raise UserError(f"{path}: is not json ({error})") from error


def _write_json(path: str | Path, content) -> None:
    run.write_text_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _need(item: dict, key: str, where: str, hint: str = ""):
    if key not in item:
        raise UserError(f"{where}: key '{key}' is missing{hint}")
    return item[key]


def _objects(items, where: str) -> list[dict]:
    if not isinstance(items, list) or not all(isinstance(x, dict) for x in items):
        raise UserError(f"{where}: expected a list of objects, got {_brief(items)}")
    return items


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _number(text: str, where: str) -> int | float:
    """int where the text is one, else a finite float."""
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{where} must be a number, got '{text}'") from error
    if not math.isfinite(value):
        raise UserError(f"{where} must be finite, got '{text}'")
    return int(text) if text.lstrip("-").isdigit() else value


def _brief(value) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
