"""YouTube-VIS 2019 and 2021: one json of tubes, a run-length code or null for every frame of a video.

    train.json              {videos: [{id, width, height, length, file_names}], categories: [{id, name}], annotations:
                            [{id, video_id, category_id, iscrowd, segmentations: [RLE or null, one a frame]}]}
    train/JPEGImages/<video>/00000.jpg

Classes are the categories in the order of their ids; those of 2019 and 2021 differ. The json of the validation set has
no annotations: its videos are there, but no clips. Pixels outside every object are background.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.coco_instances import read_categories
from data.video_clips import Clips, Segments, VideoSource
from utils.masks import rle_decode
from utils.run import UserError
from utils.segmentation_files import need, read_json, tube_of

VIDEOS = '{"videos": [{"id", "width", "height", "length", "file_names"}]}'
TUBES = '"annotations": [{"video_id", "category_id", "segmentations": [RLE or null, one a frame]}]'


def find_frames(annotations: Path, given: Path | str | None, names: list[str]) -> Path:
    """Folder that the file names are relative to: the given one, or the first that holds them.

    Looked at: <split>/JPEGImages, JPEGImages, JPEGImages/480p and <split>, beside the json and beside its folder, with
    <split> any word of its name. UserError when there is none, or when frames are missing in it.
    """
    words = re.split(r"[_.-]", annotations.stem)
    parts = [*(f"{w}/JPEGImages" for w in words), "JPEGImages", "JPEGImages/480p", *words]
    bases = (annotations.parent, annotations.parent.parent)
    tried = [Path(given)] if given is not None else [b / part for b in bases for part in parts]
    folders = [f for f in tried if f.is_dir()]
    if not folders:
        looked = given or ", ".join(map(str, tried[: len(words) + 1]))
        raise UserError(f"{annotations}: no folder of its frames at {looked}; name it with --images")
    folder = max(folders, key=lambda f: sum((f / n).is_file() for n in names[:20]))
    parents = {(folder / n).parent for n in names}
    there = {p for parent in parents if parent.is_dir() for p in parent.iterdir()}
    missing = [n for n in names if folder / n not in there]
    if missing:
        raise UserError(
            f"{folder / missing[0]}: no such frame, and {len(missing)} of {len(names)} of {annotations.name} are "
            "missing; name their folder with --images"
        )
    return folder


class YtVis(VideoSource):
    """A source of videos (data/video_clips.py). annotations: the json; images: folder that its file names are relative
    to, None: looked for (find_frames). Objects without a mask are left out and counted.

    UserError for a file that is not of this format, an empty video, a frame that is missing, a video or category that
    it does not name; when it is read, for a mask or frame of another size.
    """

    name, tasks = "ytvis", ("vis", "vos")

    def __init__(self, annotations: Path | str, images: Path | str | None = None, clips: Clips | None = None,
                 seed: int = 0):  # fmt: skip
        self.path, self.clips, self.seed, self.dropped = Path(annotations), clips or Clips(), seed, 0
        where, content = str(annotations), read_json("annotations", annotations)
        self.about = self.read_videos(where, content)
        self.names = [v["name"] for v in self.about]
        categories = read_categories(where, content, {})
        self.classes, self.category_ids = [c["name"] for c in categories], [c["id"] for c in categories]
        self.is_thing = [True] * len(categories)
        tubes = self.read_tubes(where, content.get("annotations") or [])
        self.count = sum(map(len, tubes.values()))
        self.tubes = {n: json.dumps(rows).encode() for n, rows in tubes.items()}  # as text: objects would take GB
        self.dense = [n for n in range(len(self.names)) if n in tubes]
        self.folder = find_frames(self.path, images, [f for v in self.about for f in v["file_names"]])

    def read_videos(self, where: str, content) -> list[dict]:
        """The videos, each with its name: the folder of its frames, or its id where folders are shared."""
        fields = {"id": int, "width": int, "height": int, "length": int, "file_names": list}
        videos = need(where, content.get("videos") if isinstance(content, dict) else None, fields, VIDEOS)
        if not videos:
            raise UserError(f"{where}: names no video; expected {VIDEOS}")
        for v in videos:
            if not v["file_names"] or len(v["file_names"]) != v["length"]:
                n = f"{len(v['file_names'])} file names and length {v['length']}"
                raise UserError(
                    f"{where}: video {v['id']} has {n}; expected at least one frame, and the length as many"
                )
        folders = [Path(v["file_names"][0]).parent.as_posix() for v in videos]
        names = folders if len(set(folders)) == len(folders) else [str(v["id"]) for v in videos]
        return [{k: v[k] for k in fields} | {"name": name} for v, name in zip(videos, names, strict=True)]

    def read_tubes(self, where: str, annotations) -> dict[int, list]:
        """{number of a video: its tubes as (annotation id, class, iscrowd, segmentations)}."""
        videos = {v["id"]: n for n, v in enumerate(self.about)}
        index = {c: k for k, c in enumerate(self.category_ids)}
        found: dict[int, list] = defaultdict(list)
        fields = {"video_id": int, "category_id": int, "segmentations": list}
        for n, a in enumerate(need(where, annotations, fields, TUBES)):
            if a["category_id"] not in index or a["video_id"] not in videos:
                what = f"category {a['category_id']}" if a["category_id"] not in index else f"video {a['video_id']}"
                raise UserError(f"{where}: annotation {a.get('id', n)} is of {what}, which the file does not name")
            number, masks = videos[a["video_id"]], a["segmentations"]
            length = self.about[number]["length"]
            if len(masks) != length:
                raise UserError(
                    f"{where}: annotation {a.get('id', n)} has {len(masks)} masks, its video {length} frames; expected "
                    "a code or null for each"
                )
            if any(m is not None for m in masks):
                found[number].append([a.get("id", n), index[a["category_id"]], a.get("iscrowd", 0), masks])
            else:
                self.dropped += 1
        return found

    def summary(self) -> str:
        """One line: videos, frames, tubes, classes, dropped and why."""
        return (
            f"{self.path}: {len(self.names)} videos, {sum(v['length'] for v in self.about)} frames, {self.count} tubes, "
            f"{len(self.classes)} classes; dropped: {self.dropped} tubes without a mask; dropped from clips: "
            f"{len(self.names) - len(self.dense)} videos without a tube"
        )

    def files(self, number: int) -> list[Path]:
        return [self.folder / f for f in self.about[number]["file_names"]]

    def size(self, number: int) -> tuple[int, int]:
        return self.about[number]["height"], self.about[number]["width"]

    def annotated(self, number: int) -> list[int]:
        """Every frame of a video that has a tube."""
        return list(range(self.about[number]["length"])) if number in self.tubes else []

    def read(self, number: int, frames: list[int]) -> Segments:
        """Tubes that are seen on none of the frames are left out."""
        H, W = self.size(number)
        rows, masks = json.loads(self.tubes.get(number, b"[]")), []
        for i, _, _, codes in rows:
            tube = {"video_id": self.about[number]["id"], "segmentations": [codes[t] for t in frames]}
            tube = tube_of(f"{self.path}: annotation {i}", tube, "video", (H, W, len(frames)))
            masks.append([np.zeros((H, W), bool) if code is None else rle_decode(code) for code in tube])
        masks = np.array(masks, bool).reshape(len(rows), len(frames), H, W)
        seen = masks.reshape(len(rows), -1).any(1)
        ids, labels, crowd = (np.array([r[k] for r in rows], np.int64)[seen] for k in range(3))
        return Segments(masks[seen], ids, labels, crowd.astype(bool))
