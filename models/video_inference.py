"""FastSAM2 on whole videos: tubes of objects and stuff in clips that are linked, and objects that are followed.

Offline (tasks vis, vps) the decoder sees clips; the queries of each are put in the order of those of the clip before,
class logits are averaged over the clips, and each frame is read as a picture is. Frame by frame, and for task vos, it
is models/segment_stream.py that sees the frames.

Shapes: T frames, N queries, K classes, H W frame, h w grid of the masks, S segments or tracks. categories: the number
of each class in the files. Sources: Huang et al., MinVIS, NeurIPS 2022; Xu et al., RAP-SAM, ICLR 2025.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from models.fastsam2 import FastSAM2
from models.matching import clip_ends, match_queries
from models.panoptic_post import ImageSize, instances, panoptic
from models.segment_inference import How
from models.segment_stream import Stream
from utils.masks import rle_decode, rle_encode
from utils.run import UserError
from utils.segment_inputs import fit, resized
from utils.segment_writing import ids_to_rgb
from utils.video_inputs import Footage
from utils.video_writing import FrameResult, segment, track

SHORT, CLIPS = 15, (3, 5)  # frames of clips in videos of up to SHORT frames, and in longer ones


@dataclass
class Tubes:
    """What the decoder says about a whole video; query n is the same throughout."""

    classes: torch.Tensor  # (N, K + 1) logits, mean over the clips
    masks: list[torch.Tensor]  # T of (N, h, w) logits, on the CPU
    size: ImageSize


# ---- clips


@torch.no_grad()
def link_clips(model: FastSAM2, video: Footage, how: How) -> Tubes:
    """Run on the clips of a video and link their queries. Keeps all mask logits: 4 N h w bytes a frame."""
    T, shown = len(video), fit(video.size, how.image_size)
    device, clip = model.mean.device, how.clip or CLIPS[T > SHORT]
    before, total, masks, stream = None, 0.0, [], video.frames()
    ends = clip_ends(T, clip)
    for start, end in zip([0, *ends], ends, strict=False):
        frames = np.stack([resized(frame, shown) for frame in islice(stream, end - start)])
        images = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].to(device)  # (1, t, 3, h, w)
        with torch.autocast(device.type, how.dtype, enabled=how.dtype != torch.float32):
            out = model.decode(model.encode(images))
        queries = out["queries"][0]
        order = torch.arange(len(queries), device=device) if before is None else match_queries(before, queries)
        before, total = queries[order], total + out["classes"][-1][0][order].float()
        masks += out["masks"][-1][0][order].transpose(0, 1).cpu()
    padded = tuple(4 * n for n in masks[0].shape[1:])
    return Tubes(total.cpu() / len(ends), masks, ImageSize(video.size, shown, padded))


# ---- vis


@dataclass
class Track:
    """An object in a video."""

    number: int
    label: int  # class
    scores: list[float]  # of each frame, 0 where it is not seen
    codes: list[dict | None]  # RLE of each frame


def tracks_of_clips(model: FastSAM2, video: Footage, how: How) -> list[Track]:
    """Each of the `top` pairs of query and class is a track; its score in a frame is that of an instance there."""
    tubes, is_thing = link_clips(model, video, how), model.is_thing.cpu()
    tracks: dict[tuple[int, int], Track] = {}
    for masks in tubes.masks:
        found = instances(tubes.classes, masks, is_thing, tubes.size, how.top)
        codes = rle_encode(found["mask"].numpy())
        keys = zip(found["query"].tolist(), found["label"].tolist(), strict=True)
        for key, score, code, seen in zip(
            keys, found["score"].tolist(), codes, found["mask"].any((1, 2)).tolist(), strict=True
        ):
            own = tracks.setdefault(key, Track(len(tracks) + 1, key[1], [], []))
            own.scores.append(score)
            own.codes.append(code if seen else None)
    return [x for x in tracks.values() if any(x.codes)]


def tracks_of_stream(model: FastSAM2, video: Footage, how: How) -> list[Track]:
    """Frame by frame; the class of a track is the one with the largest sum of scores."""
    stream, tracks, votes = Stream(model, "vis", how.image_size, dtype=how.dtype), {}, {}
    for t, frame in enumerate(video.frames()):
        for i, x in stream.step(frame).items():
            own = tracks.setdefault(i, Track(i, 0, [0.0] * len(video), [None] * len(video)))
            own.scores[t], [own.codes[t]] = x.score, rle_encode(x.mask[None])
            votes.setdefault(i, {}).setdefault(x.label, 0.0)
            votes[i][x.label] += x.score
    for i, own in tracks.items():
        own.label = max(votes[i], key=votes[i].get)
    return list(tracks.values())


def vis_entries(tracks: list[Track], video: Footage, how: How) -> list[dict]:
    """As YouTube-VIS has them, best first."""
    entries = [track(video.video_id, how.categories[x.label], x.scores, x.codes) for x in tracks]
    return sorted(entries, key=lambda x: -x["score"])


def show_tracks(tracks: list[Track], video: Footage, how: How, classes: list[str]) -> Iterator[FrameResult]:
    """What is drawn of each frame: the tracks with a score of at least `least`."""
    drawn = [x for x in tracks if np.mean(x.scores) >= how.least]
    names = [f"{classes[x.label]} {x.number}" for x in drawn]
    for t in range(len(video)):
        masks = [rle_decode(x.codes[t]) if x.codes[t] else np.zeros(video.size, bool) for x in drawn]
        yield FrameResult(np.array(masks, bool).reshape(-1, *video.size), names, [x.number - 1 for x in drawn])


# ---- vps


def segments_result(found: dict[int, tuple], video: Footage, how: How, classes: list[str]) -> FrameResult:
    """{id: (mask (H, W) bool, label, score)} -> PNG of ids and segments_info."""
    ids, rows = np.zeros(video.size, np.int64), []
    for i, (mask, label, score) in found.items():
        ids[mask] = i
        rows.append(segment(i, how.categories[label], mask, score))
    masks = np.array([m for m, _, _ in found.values()], bool).reshape(-1, *video.size)
    names = [classes[label] for _, label, _ in found.values()]
    return FrameResult(masks, names, [i - 1 for i in found], ids_to_rgb(ids), {"segments_info": rows})


def panoptic_frames(model: FastSAM2, video: Footage, how: How) -> Iterator[FrameResult]:
    """A panoptic map of every frame. Ids are the same on all frames: 1..K are classes of stuff, K + 1.. things."""
    classes, is_thing = model.cfg.classes, model.is_thing.cpu()
    if how.clip == 0:
        stream = Stream(model, "vps", how.image_size, dtype=how.dtype, birth=how.score, death=min(0.5, how.score))
        for frame in video.frames():
            found = {i: (x.mask, x.label, x.score) for i, x in stream.step(frame).items()}
            yield segments_result(found, video, how, classes)
        return
    tubes = link_clips(model, video, how)
    for masks in tubes.masks:
        x = panoptic(tubes.classes, masks, is_thing, tubes.size, how.score, how.share)
        found: dict[int, tuple] = {}
        rows = zip(*(x[k].tolist() for k in ("value", "label", "score", "query")), strict=True)
        for value, label, score, query in rows:
            mask = (x["map"] == value).numpy()
            i = len(classes) + 1 + query if is_thing[label] else label + 1
            if mask.any():  # parts of one class of stuff are one segment
                found[i] = mask, label, max(score, found[i][2] if i in found else 0.0)
        yield segments_result(found, video, how, classes)


# ---- vos


def follow_frames(
    model: FastSAM2,
    video: Footage,
    how: How,
    first: dict[int, dict[int, dict]],
    embed: Callable[[list[str]], torch.Tensor] | None = None,
    memory: bool = True,
) -> Iterator[FrameResult]:
    """Objects 1..254 through a video. first {frame: {object: what points at it, as Stream.add takes it}}; memory False:
    by their first prompt alone. No pixel belongs to two objects. UserError for frames that the video does not have."""
    late = [t for t in first if not 0 <= t < len(video)]
    if late or not first:
        what = f"--at {late[0]}: is not a frame" if late else "no object is pointed at on any frame"
        raise UserError(f"{what} of {video.name}, which has frames 0..{len(video) - 1}; point at one on one of them")
    stream = Stream(model, "vos", how.image_size, embed, how.dtype, memory, overlap=False)
    for t, frame in enumerate(video.frames()):
        for i, prompt in first.get(t, {}).items():
            stream.add(i, **prompt)
        found = dict(sorted(stream.step(frame).items()))
        ids = np.zeros(video.size, np.uint8)
        for i, x in found.items():
            ids[x.mask] = i
        rows = [{"id": i, "present": x.present, "score": round(x.score, 6)} for i, x in found.items()]
        masks = np.array([x.mask for x in found.values()], bool).reshape(-1, *video.size)
        yield FrameResult(masks, [str(i) for i in found], [i - 1 for i in found], ids, {"objects": rows})


def segment_video(
    task: str,
    model: FastSAM2,
    video: Footage,
    how: How,
    first: dict[int, dict[int, dict]],
    embed: Callable[[list[str]], torch.Tensor] | None,
    memory: bool,
) -> tuple[list[dict], Iterator[FrameResult]]:
    """A video's results as a whole (task vis), and those of its frames one after the other; first, embed, memory: of
    task vos, see `follow_frames`."""
    if task == "vos":
        return [], follow_frames(model, video, how, first, embed, memory)
    if task == "vps":
        return [], panoptic_frames(model, video, how)
    tracks = (tracks_of_stream if how.clip == 0 else tracks_of_clips)(model, video, how)
    return vis_entries(tracks, video, how), show_tracks(tracks, video, how, model.cfg.classes)
