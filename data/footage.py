"""Videos as a user has them, opened for inference: a file, or the frames of a folder, and what points into them.

No labels: masks are prompts (the first of each object), YouTube-VIS's json lists videos and frames.
"""

from functools import partial
from pathlib import Path

from data.coco_captions import open_image
from data.davis import read_mask
from data.video import VideoReader, iter_frames
from data.video_clips import frame_files, read_frame
from utils.run import UserError
from utils.segment_inputs import check_place
from utils.video_inputs import Footage, find_videos, first_masks, listed_videos

FOLDER_RATE = 24  # frames per second of folders, as in DAVIS


def open_videos(names: list[str], listed: str | None, numbered: bool) -> list[Footage]:
    """The videos of files and folders (utils/video_inputs.py), or those that the YouTube-VIS json `listed` lists in a
    folder, with its ids. Without it ids count from 1 by name (numbered), or are the names. UserError for what is not
    there or has no frames."""
    if listed:
        return [of_frames(name, i, files) for name, (i, files) in sorted(listed_videos(listed, names).items())]
    found = enumerate(sorted(find_videos(names).items()), start=1)
    return [open_video(name, k if numbered else name, path) for k, (name, path) in found]


def open_video(name: str, video_id: int | str, path: Path) -> Footage:
    """One file, or one folder of frames."""
    if path.is_dir():
        return of_frames(name, video_id, frame_files(path))
    with VideoReader(path) as reader:
        stems, info = [f"{t:05d}" for t in range(len(reader))], reader.info

    def frames():
        return (frame.image for frame in iter_frames(path))

    return Footage(name, video_id, stems, (info.height, info.width), info.rate, [path], frames)


def of_frames(name: str, video_id: int | str, files: list[Path]) -> Footage:
    """Pictures as frames; their size is that of the first. UserError where two are named alike."""
    stems, first = [p.stem for p in files], open_image(files[0])
    size = (first.height, first.width)
    if len(set(stems)) < len(stems):
        raise UserError(f"{files[0].parent}: two frames differ in their suffix only; take one of each out")

    def frames():
        return (read_frame(path, size) for path in files)

    return Footage(name, video_id, stems, size, FOLDER_RATE, files, frames)


def first_prompts(video: Footage, objects: list[dict], masks: str | None, videos: int) -> dict[int, dict[int, dict]]:
    """{frame: {object: what points at it}}: the first masks of a folder, or objects of utils.segment_inputs, whose
    frame is `at` (0 where they have none). UserError for what does not lie in the video, or objects for several videos."""
    if masks:
        return first_masks(masks, video.name, video.stems, videos == 1, partial(read_mask, size=video.size))
    if videos > 1:
        raise UserError(f"--task vos: {videos} videos, but prompts are about one; give that one, or --masks of all")
    maps, found = check_place(objects, *video.size), {}
    for k, x in enumerate(objects):
        prompt = {name: maps[k] if name == "mask" else value for name, value in x.items() if name != "at"}
        found.setdefault(x.get("at", 0), {})[k + 1] = prompt
    return found
