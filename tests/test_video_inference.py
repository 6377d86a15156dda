"""Whole videos: clips linked by their queries, frames read as pictures are, tracks, ids that last, objects followed."""

import functools
import itertools

import numpy as np
import pytest
import torch

from models.fastsam2 import FastSAM2, FastSAM2Config
from models.matching import clip_ends
from models.panoptic_post import ImageSize, instances, panoptic
from models.segment_inference import How
from models.segment_stream import Stream
from models.streaming_memory import MemoryConfig
from models.video_inference import (
    follow_frames,
    link_clips,
    panoptic_frames,
    show_tracks,
    tracks_of_clips,
    tracks_of_stream,
    vis_entries,
)
from utils.masks import rle_decode
from utils.run import UserError
from utils.segmentation_files import runs_of
from utils.video_inputs import Footage

H, W, N, K = 40, 56, 6, 3
CATEGORIES = [4, 9, 7]


@functools.cache
def network() -> FastSAM2:
    """Small, random; masks have something inside."""
    torch.manual_seed(0)
    cfg = FastSAM2Config(classes=["cat", "sky", "dog"], is_thing=[True, False, True], backbone="resnet18", queries=N,
                         stages=1, dim=16, heads=2, hidden=24, embed_dim=12,
                         memory=MemoryConfig(dim=16, heads=2, hidden=24))  # fmt: skip
    model = FastSAM2(cfg).eval()

    def centred(*args, **settings):
        out = FastSAM2.decode(model, *args, **settings)
        return out | {"masks": [m - m.mean((-2, -1), keepdim=True) for m in out["masks"]]}

    model.decode = centred
    return model


def footage(T: int, reads: list | None = None) -> Footage:
    """A square that moves over noise; reads: gets the number of every frame that is read."""
    images = np.random.default_rng(0).integers(0, 90, (T, H, W, 3), dtype=np.uint8)
    for t in range(T):
        images[t, 10:24, 4 + t : 18 + t] = (220, 160, 40)

    def frames():
        for t, image in enumerate(images):
            if reads is not None:
                reads.append(t)
            yield image

    return Footage("film", 7, [f"{t:05d}" for t in range(T)], (H, W), 24, [], frames)


def how(**settings) -> How:
    return How(**{"image_size": (H, W), "categories": CATEGORIES, "score": 0.0, "share": 0.3, "least": 0.0, **settings})


SIZE = ImageSize((H, W), (H, W), (64, 64))


# ---- clips


@torch.no_grad()
@pytest.mark.parametrize("T, lengths", [(3, [3]), (15, [3] * 5), (17, [5, 4, 4, 4]), (23, [5, 5, 5, 4, 4])])
def test_clips_are_linked_by_their_queries(monkeypatch, T, lengths):
    """Against the same by hand, one clip after the other; queries of every clip are shuffled on the way."""
    model, video, seen, g = network(), footage(T), [], torch.Generator().manual_seed(0)
    decode = model.decode

    def shuffled(features, *rest, **settings):
        out, order = decode(features, *rest, **settings), torch.randperm(N, generator=g)
        seen.append((features.shape[1], out))
        masks, classes = ([*out[k][:-1], out[k][-1][:, order]] for k in ("masks", "classes"))
        return out | {"masks": masks, "classes": classes, "queries": out["queries"][:, order]}

    monkeypatch.setattr(model, "decode", shuffled)
    tubes = link_clips(model, video, how())
    assert [n for n, _ in seen] == lengths == np.diff([0, *clip_ends(T, 3 if T <= 15 else 5)]).tolist()
    assert len(tubes.masks) == T and tubes.size == SIZE
    # the first clip's shuffle is undone by comparing kernels, the rest must follow it
    start = 0
    first = tubes.masks[0]
    place = [int((first - m).flatten(1).abs().sum(1).argmin()) for m in seen[0][1]["masks"][-1][0][:, 0]]
    before, total, slot = seen[0][1]["queries"][0], 0.0, torch.tensor(place).argsort()  # slot i is query slot[i]
    before = before[slot]
    for n, out in seen:
        similar = torch.cosine_similarity(before[:, None], out["queries"][0][None], dim=-1)
        best = max(itertools.permutations(range(N)), key=lambda p: sum(similar[i, j].item() for i, j in enumerate(p)))
        order = list(best)
        before, total = out["queries"][0][order], total + out["classes"][-1][0][order]
        for k in range(n):
            torch.testing.assert_close(tubes.masks[start + k], out["masks"][-1][0][order, k])
        start += n
    torch.testing.assert_close(tubes.classes, total / len(lengths))


def test_a_clip_length_can_be_given_and_frames_are_read_once():
    for clip in (2, 4, 50):
        reads: list[int] = []
        tubes = link_clips(network(), footage(6, reads), how(clip=clip))
        assert reads == list(range(6)) and len(tubes.masks) == 6


# ---- vis


@torch.no_grad()
def test_tracks_are_instances_of_every_frame_under_one_number():
    model, video = network(), footage(7)
    tubes, tracks = link_clips(model, video, how()), tracks_of_clips(model, video, how(top=9))
    entries = vis_entries(tracks, video, how())
    assert tracks and len(entries) == len(tracks) and {x["category_id"] for x in entries} <= {4, 7}
    assert [x["score"] for x in entries] == sorted((x["score"] for x in entries), reverse=True)
    found = [instances(tubes.classes, m, torch.tensor([True, False, True]), SIZE, 9) for m in tubes.masks]
    keys = list(zip(found[0]["query"].tolist(), found[0]["label"].tolist(), strict=True))
    for number, (query, label) in enumerate(keys, start=1):
        scores, masks = [], []
        for x in found:
            [k] = ((x["query"] == query) & (x["label"] == label)).nonzero()[:, 0].tolist()
            scores.append(x["score"][k].item())
            masks.append(x["mask"][k].numpy())
        own = [x for x in tracks if x.number == number]
        assert bool(own) == any(m.any() for m in masks)
        for x in own:
            assert x.label == label and x.scores == scores
            assert all(
                (c is None and not m.any()) or np.array_equal(rle_decode(c), m)
                for c, m in zip(x.codes, masks, strict=True)
            )
            assert any(e["score"] == pytest.approx(np.mean(scores)) and e["segmentations"] == x.codes for e in entries)
    assert all(e["video_id"] == 7 and len(e["segmentations"]) == 7 for e in entries)


@pytest.mark.parametrize("clip", [None, 0])
def test_drawn_tracks(clip):
    model, video = network(), footage(4)
    tracks = (tracks_of_stream if clip == 0 else tracks_of_clips)(model, video, how())
    limit = float(np.median([np.mean(x.scores) for x in tracks]))
    shown = list(show_tracks(tracks, video, how(least=limit), model.cfg.classes))
    drawn = [x for x in tracks if np.mean(x.scores) >= limit]
    assert len(shown) == 4 and 0 < len(drawn)
    for t, x in enumerate(shown):
        assert x.shown.shape == (len(drawn), H, W) and x.png is None and x.colours == [d.number - 1 for d in drawn]
        assert all(np.array_equal(m, rle_decode(d.codes[t])) for m, d in zip(x.shown, drawn, strict=True) if d.codes[t])
    nothing = list(show_tracks([], video, how(), model.cfg.classes))
    assert [x.shown.shape for x in nothing] == [(0, H, W)] * 4


def test_tracks_of_a_stream_are_the_streams():
    model, video = network(), footage(5)
    tracks, stream = tracks_of_stream(model, video, how()), Stream(model, "vis", (H, W))
    frames = [stream.step(f) for f in video.frames()]
    assert {x.number for x in tracks} == {i for found in frames for i in found} != set()
    for x in tracks:
        for found, score, code in zip(frames, x.scores, x.codes, strict=True):
            assert (x.number in found) == (code is not None) and score == (found[x.number].score if code else 0.0)
            assert code is None or (
                np.array_equal(rle_decode(code), found[x.number].mask) and runs_of(code["counts"]).sum() == H * W
            )


# ---- vps


@torch.no_grad()
def test_panoptic_frames_are_pictures_with_ids_that_last():
    model, video = network(), footage(7)
    tubes, results = link_clips(model, video, how()), list(panoptic_frames(model, video, how()))
    category, owner = {}, {}
    for masks, x in zip(tubes.masks, results, strict=True):
        want = panoptic(tubes.classes, masks, torch.tensor([True, False, True]), SIZE, 0.0, 0.3)
        ids = x.png.astype(int) @ [1, 256, 65536]
        assert ((ids > 0) == (want["map"] != K).numpy()).all()
        segments = x.entry["segments_info"]
        assert {s["id"]: s["area"] for s in segments} == {
            int(i): int((ids == i).sum()) for i in np.unique(ids[ids > 0])
        }
        for value, label, query in zip(*(want[k].tolist() for k in ("value", "label", "query")), strict=True):
            mask = (want["map"] == value).numpy()
            if mask.any():
                [i] = np.unique(ids[mask]).tolist()
                assert (i <= K) == (label == 1) and (i == label + 1 or label != 1)
                assert category.setdefault(i, CATEGORIES[label]) == CATEGORIES[label]
                assert label == 1 or owner.setdefault(i, query) == query
                assert next(s for s in segments if s["id"] == i)["category_id"] == CATEGORIES[label]
        assert x.shown.sum(0).max() <= 1 and len(x.names) == len(x.shown) == len(segments)
    assert len(owner) == len(set(owner.values())) > 0


def test_panoptic_frames_of_a_stream():
    model, video = network(), footage(5)
    results, stream = (
        list(panoptic_frames(model, video, how(clip=0, score=0.4))),
        Stream(model, "vps", (H, W), birth=0.4, death=0.4),
    )
    for frame, x in zip(video.frames(), results, strict=True):
        found, ids = stream.step(frame), x.png.astype(int) @ [1, 256, 65536]
        assert [s["id"] for s in x.entry["segments_info"]] == list(found)
        assert all(np.array_equal(ids == i, f.mask) for i, f in found.items())
    assert any(x.entry["segments_info"] for x in results)


# ---- vos


@pytest.mark.parametrize("memory", [True, False])
def test_followed_frames_are_the_streams_without_overlap(memory):
    model, video, reads = network(), footage(6), []
    first = {0: {2: {"points": [[8, 14, 1]]}}, 3: {1: {"box": [7, 10, 20, 23]}, 200: {"points": [[40, 30, 1]]}}}
    results = list(follow_frames(model, footage(6, reads), how(), first, memory=memory))
    assert reads == list(range(6))
    stream = Stream(model, "vos", (H, W), memory=memory, overlap=False)
    for t, (frame, x) in enumerate(zip(video.frames(), results, strict=True)):
        for i, prompt in first.get(t, {}).items():
            stream.add(i, **prompt)
        found = stream.step(frame)
        assert [r["id"] for r in x.entry["objects"]] == ([2] if t < 3 else [1, 2, 200]) and x.png.dtype == np.uint8
        assert all(np.array_equal(x.png == i, f.mask) for i, f in found.items())
        assert all(r["present"] == found[r["id"]].present for r in x.entry["objects"])
        assert x.colours == [i - 1 for i in sorted(found)]


def test_frames_that_a_video_does_not_have_are_refused():
    for first, said in (({6: {1: {"box": [0, 0, 5, 5]}}}, r"--at 6: is not a frame of film, which has frames 0..5"),
                        ({}, "no object is pointed at")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            list(follow_frames(network(), footage(6), how(), first))
