"""data/peak_labels.py on small videos written here: an item is a function of (seed, epoch, index) and of the labels."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.peak_labels import PeakClips, augment, find_video
from data.video import VideoReader, VideoWriter
from utils.run import StepBatches, UserError

N, T, SIZE = 90, 16, (24, 16)  # frames of the videos, of a clip; (W, H) px that the clips have
EVENTS = {"one": {10: "hit", 40: "hit", 46: "bounce", 70: "hit"}, "two": {}, "short": {4: "hit"}}
LENGTH = {"one": N, "two": N, "short": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos of 48x32 px: `one` with events, `two` without, `short` with 9 frames."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(EVENTS):
        with VideoWriter(folder / f"{name}.mp4", 25, (48, 32)) as video:
            for i in range(LENGTH[name]):
                image = np.full((32, 48, 3), (60, 90, 120)[number], np.uint8)
                image[:, : 24 + (i % 24), 0] = 40 + 2 * i
                image[8:16, i % 40 : i % 40 + 8] = 230
                video.write(image)
    return folder


def labels(*names: str) -> list[dict]:
    rows = {
        name: [{"frame": f, "label": x, "lo": f - 1, "hi": f + 2} for f, x in EVENTS[name].items()] for name in names
    }
    about = {"fps": 25.0, "width": 48, "height": 32}
    return [{"video": name, "num_frames": LENGTH[name], **about, "events": rows[name]} for name in names]


def clips(folder, names=("one", "two"), classes=("bounce", "hit"), **more) -> PeakClips:
    return PeakClips(labels(*names), folder, list(classes), **{"T": T, "size": SIZE, "n": 40, "seed": 3} | more)


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def rows(item: dict) -> list[list[int]]:
    return item["events"][item["events"][:, 0] >= 0].tolist()


# ---- what an item holds


def test_item_is_the_clip_of_the_video_and_its_labels(folder):
    data = clips(folder, augment=False)
    video = {v: VideoReader(folder / f"{name}.mp4", size=SIZE) for v, name in enumerate(("one", "two"))}
    for index in range(30):
        item = data[0, index]
        assert item["frames"].shape == (T, 3, SIZE[1], SIZE[0]) and item["frames"].dtype == torch.uint8
        assert all(item[k].dtype == torch.int64 for k in item if k != "frames")
        v, start = int(item["video"]), int(item["start"])
        want = video[v].read(range(start, start + T))  # (T, H, W, 3)
        assert item["length"] == T and np.array_equal(item["frames"].permute(0, 2, 3, 1).numpy(), want)
        inside = {f: x for f, x in EVENTS[("one", "two")[v]].items() if start <= f < start + T}
        expected = [[f - start, {"bounce": 1, "hit": 2}[x], f - 1 - start, f + 2 - start] for f, x in inside.items()]
        assert rows(item) == expected
        first = expected[0] if expected else [-1, -1, -1, -1]
        assert [int(item[k]) for k in ("peak", "lo", "hi")] == [first[0], *first[2:]]
        assert (item["events"][len(expected) :] == -1).all()


def test_item_is_a_function_of_seed_epoch_and_index(folder):
    data = clips(folder, augment=True, splice=0.3)
    keys = [(e, i) for e in range(2) for i in range(6)]
    first = {key: data[key] for key in keys}
    again, other = clips(folder, augment=True, splice=0.3), clips(folder, augment=True, splice=0.3, seed=4)
    for key in reversed(keys):  # in another order, and repeated
        assert same(again[key], first[key]) and same(again[key], first[key])
    assert same(data[4], first[0, 4])  # an index alone is epoch 0
    differ = [not torch.equal(other[key]["frames"], first[key]["frames"]) for key in keys]
    assert sum(differ) >= 11  # another seed
    assert sum(not torch.equal(first[0, i]["frames"], first[1, i]["frames"]) for i in range(6)) >= 5  # another epoch
    assert len({first[key]["frames"].numpy().tobytes() for key in keys}) >= 11  # another index


@pytest.mark.parametrize("cache_gb", [0, 2.0])
def test_workers_do_not_change_items(folder, cache_gb):
    def batches(workers):
        data = clips(folder, augment=True, splice=0.3, n=7, cache_gb=cache_gb)
        return list(DataLoader(data, batch_sampler=StepBatches(7, 3, 0, 5, seed=1), num_workers=workers))

    alone, two = batches(0), batches(2)
    assert len(alone) == 5 and all(same(a, b) for a, b in zip(alone, two, strict=True))


def test_cached_equals_random_access(folder):
    for options in ({}, {"crop": [4, 2, 30, 24]}, {"frames": (20, 80)}):
        cached, direct = clips(folder, **options), clips(folder, cache_gb=0, **options)
        assert cached.cached and not direct.cached
        assert all(same(cached[i], direct[i]) for i in range(12)), options
    item = cached[0]
    item["frames"].zero_()  # an item is the caller's own: writing into it must not reach the cache
    assert cached[0]["frames"].any()


# ---- which clips are drawn


def draw(data: PeakClips, n: int, monkeypatch) -> list[dict]:
    """n items without pictures: labels only, quick enough for statistics."""
    blank = np.zeros((T, SIZE[1], SIZE[0], 3), np.uint8)
    monkeypatch.setattr(data, "_frames", lambda v, start, stop: blank[: stop - start])
    return [data[0, i] for i in range(n)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_share_of_clips_with_events(folder, monkeypatch, share):
    items = draw(clips(folder, events=share), 600, monkeypatch)
    found = sum(bool(rows(item)) for item in items) / 600
    assert abs(found - share) <= 3 * (share * (1 - share) / 600) ** 0.5


def test_events_are_drawn_evenly_and_anywhere_in_the_clip(folder, monkeypatch):
    items = draw(clips(folder, events=1.0, classes=("hit",)), 900, monkeypatch)
    frames = [int(item["start"] + item["peak"]) for item in items]
    for f in (10, 40, 70):
        assert abs(frames.count(f) / 900 - 1 / 3) < 3 * (2 / 9 / 900) ** 0.5
    inside = np.bincount([int(item["peak"]) for item in items if item["start"] + item["peak"] > 20], minlength=T)
    assert inside.min() > 0.4 * inside.mean() and inside.max() < 1.8 * inside.mean()


def test_single_never_shows_two(folder, monkeypatch):
    items = draw(clips(folder, single=True), 400, monkeypatch)
    counts = {len(rows(item)) for item in items}
    assert counts == {0, 1}
    several = draw(clips(folder, single=False), 400, monkeypatch)
    assert {len(rows(item)) for item in several} == {0, 1, 2}  # the hit at 40 and the bounce at 46 in one clip


def test_frames_bound_clips_and_labels(folder, monkeypatch):
    data = clips(folder, frames=(30, 60))
    items = draw(data, 300, monkeypatch)
    assert {(int(i["start"]) >= 30, int(i["start"]) + T <= 60) for i in items} == {(True, True)}
    assert {int(i["start"]) for i in items} >= {30, 60 - T}  # both ends are reached
    assert data.bounds == [(30, 60), (30, 60)]
    assert data.events[0][:, 0].tolist() == [40, 46]
    edge = clips(
        folder, names=("one",), frames=(41, 90), events=1.0
    )  # an event one frame before the range is not known
    assert edge.events[0][:, 0].tolist() == [46, 70]


def test_other_classes_are_left_out(folder, monkeypatch):
    data = clips(folder, classes=("bounce",), events=1.0)
    assert {tuple(r[:2]) for i in draw(data, 60, monkeypatch) for r in rows(i)} <= {(t, 1) for t in range(T)}
    assert [e[:, 0].tolist() for e in data.events] == [[46], []]


def test_video_shorter_than_a_clip(folder):
    data = clips(folder, names=("short",), events=1.0)
    item = data[0]
    assert item["length"] == 9 and item["start"] == 0 and rows(item) == [[4, 2, 3, 6]]
    assert item["frames"][:9].any() and not item["frames"][9:].any()
    with VideoReader(folder / "short.mp4", size=SIZE) as reader:
        assert np.array_equal(item["frames"][:9].permute(0, 2, 3, 1).numpy(), reader.read(range(9)))
    mixed = clips(folder, names=("short", "one"), events=1.0, augment=True, splice=1.0)
    assert {int(mixed[i]["length"]) for i in range(20)} == {9, T}


# ---- augmentation


def test_augmentation_is_the_same_for_all_frames():
    still = torch.randint(0, 256, (1, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    still = still.expand(T, -1, -1, -1)
    results = [augment(still, np.random.default_rng(i), flip=True, shift=0.1, light=0.3) for i in range(40)]
    for x in results:
        assert x.shape == still.shape and x.dtype == torch.uint8 and torch.equal(x, x[:1].expand_as(x))
    assert len({x[0].numpy().tobytes() for x in results}) == 40


def test_augmentation_does_what_is_asked():
    x = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    for i in range(20):
        rng = np.random.default_rng(i)
        assert torch.equal(augment(x, rng, flip=False, shift=0.0, light=0.0), x)
    mirrored = [augment(x, np.random.default_rng(i), flip=True, shift=0.0, light=0.0) for i in range(100)]
    assert all(torch.equal(y, x) or torch.equal(y, x.flip(3)) for y in mirrored)
    assert 30 < sum(torch.equal(y, x.flip(3)) for y in mirrored) < 70
    moved = set()
    for i in range(60):
        y = augment(x, np.random.default_rng(i), flip=False, shift=0.1, light=0.0)
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(y[:, :, 2:-2, 2:-2], x[:, :, 2 + dy : 14 + dy, 2 + dx : 22 + dx])
        ]
        moved.update(found)
        assert len(found) == 1
    assert {dx for _, dx in moved} == {-2, -1, 0, 1, 2} and {dy for dy, _ in moved} >= {-1, 0, 1}
    bright = [
        augment(x, np.random.default_rng(i), False, 0.0, 0.3).float().mean() / x.float().mean() for i in range(50)
    ]
    assert 0.65 < min(bright) < 0.85 and 1.1 < max(bright) < 1.35


def test_augmentation_leaves_labels_alone(folder):
    plain, changed = clips(folder), clips(folder, augment=True)
    for i in range(12):
        a, b = plain[0, i], changed[0, i]
        assert all(torch.equal(a[k], b[k]) for k in a if k != "frames")
        assert not torch.equal(a["frames"], b["frames"])


# ---- splice: a cut to another scene


def test_cut_clips_keep_the_events_that_are_still_seen(folder, monkeypatch):
    """With hard cuts to black: an event stays exactly where the picture of its frame is the game's."""

    def hard(T, H, W, cut, first, rng):
        shown = (torch.arange(T) < cut).float()[:, None, None, None]
        return shown if first else 1 - shown

    monkeypatch.setattr("data.peak_labels.transition", hard)
    monkeypatch.setattr("data.peak_labels.cutaway", lambda clip, rng: torch.zeros_like(clip))
    data = clips(folder, augment=True, splice=1.0, flip=False, shift=0.0, light=0.0, events=1.0)
    data.empty = data.empty[:0]  # black is the only other scene
    gone = kept = 0
    for i in range(40):
        item, whole = data[0, i], data.clip(0, int(data[0, i]["start"]))
        assert set(item) == set(whole) and item["frames"].dtype == torch.uint8
        same_picture = (item["frames"] == whole["frames"]).flatten(1).all(1)  # (T,)
        assert rows(item) == [r for r in rows(whole) if same_picture[r[0]]]
        kept, gone = kept + len(rows(item)), gone + len(rows(whole)) - len(rows(item))
        first = rows(item)[0] if rows(item) else [-1] * 4
        assert [int(item[k]) for k in ("peak", "lo", "hi")] == [first[0], first[2], first[3]]
    assert kept >= 5 and gone >= 10


def test_cuts_only_while_augmenting_and_never_in_padded_clips(folder):
    plain, asked = clips(folder), clips(folder, splice=1.0)
    assert all(same(plain[i], asked[i]) for i in range(8))
    short = clips(folder, names=("short",), augment=True, splice=1.0, flip=False, shift=0.0, light=0.0, events=1.0)
    assert same(short[0, 3], clips(folder, names=("short",), events=1.0)[0])


# ---- refusals


def test_mistakes_are_one_sentence(folder):
    late = labels("short")
    late[0]["events"][0]["frame"] = 9
    wrong = {
        "its labels name frame 9": lambda: PeakClips(late, folder, ["hit"], T, SIZE),
        "no video four.mp4": lambda: PeakClips([{**labels("one")[0], "video": "four"}], folder, ["hit"], T, SIZE),
        "--frames 80:120: .* has 9 frames": lambda: clips(folder, names=("short",), frames=(80, 120)),
        "no clip holds an event": lambda: clips(folder, names=("two",)),
        "every clip holds an event": lambda: clips(folder, names=("short",)),
        "does not fit in 48x32": lambda: clips(folder, crop=[30, 0, 20, 32])[0],
    }
    for words, call in wrong.items():
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    late[0]["events"][0].update(frame=8, lo=8, hi=8)
    PeakClips(late, folder, ["hit"], T, SIZE, events=1.0)  # the last frame is inside
    late[0]["events"][0].update(frame=9, label="serve")
    PeakClips([*late, *labels("one")], folder, ["hit"], T, SIZE)  # classes that are not asked for are not looked at


def test_find_video(folder, tmp_path):
    assert find_video(folder, "one") == folder / "one.mp4"
    (tmp_path / "a.mkv").touch()
    assert find_video(tmp_path, "a") == tmp_path / "a.mkv"
    with pytest.raises(UserError, match="no video b.mp4 .* among its 1 videos"):
        find_video(tmp_path, "b")
