"""data/davis.py, ytvis.py, vipseg.py, pseudo_video.py: clips and whole videos hold what the files say, or one sentence."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.davis import Davis, read_mask
from data.moving_shapes import MovingShapes
from data.pseudo_video import Jitter, PseudoVideo
from data.segment_batch import Prompts, Scene, SegmentCollate, SegmentItems, View, training_view
from data.video_checks import VIDEO_FORMATS
from data.video_clips import Clips, FirstMasks, VideoSource
from data.vipseg import Vipseg
from data.ytvis import YtVis
from utils import run
from utils.masks import rle_area, rle_decode, rle_encode
from utils.run import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "fastsam2"
H, W, T = 24, 32, 6


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def save_frames(folder: Path, n=T, size=(H, W)) -> None:
    """Frame t is of grey level 20 t."""
    folder.mkdir(parents=True)
    for t in range(n):
        Image.new("RGB", size[::-1], (20 * t,) * 3).save(folder / f"{t:05d}.jpg", quality=95)


def save_mask(path: Path, ids: np.ndarray, grey=False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if not grey:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def ids_of(t: int) -> np.ndarray:
    """Object 1 moves to the right, object 2 stays and is away on frames 2 and 3; a corner is unknown."""
    ids = np.zeros((H, W), int)
    ids[2:10, 2 + 3 * t : 12 + 3 * t] = 1
    ids[14:22, 4:20] = 0 if t in (2, 3) else 2
    ids[:2, :2] = 255
    return ids


def shade(clip: np.ndarray) -> list[int]:
    """Frame numbers of a clip (T, H, W, 3), from their grey levels."""
    return (clip.astype(float).mean((1, 2, 3)) / 20).round().astype(int).tolist()


def whole(source, task: str, key=(0, 0), **more) -> dict:
    return SegmentItems(source, task, View(H, W), Prompts(number=0, kinds={"mask": 1.0}), **more)[key]


# ---- clips


def test_frames_of_a_clip():
    clips, rng = Clips(4, (2, 5)), np.random.default_rng(0)
    drawn = np.array([clips.draw(50, rng) for _ in range(600)])
    step = np.diff(drawn, axis=1)
    assert set(step[:, 0]) == {2, 3, 4, 5} and (step == step[:, :1]).all()
    assert drawn.min() == 0 and drawn.max() == 49 and np.bincount(step[:, 0])[2:].min() > 100
    assert {tuple(clips.draw(7, rng)) for _ in range(50)} == {(0, 2, 4, 6)}
    assert {tuple(clips.draw(5, rng)) for _ in range(50)} == {(0, 1, 2, 3), (1, 2, 3, 4)}  # a shorter stride fits
    assert clips.draw(3, rng) == [0, 1, 2, 1] and clips.draw(1, rng) == [0] * 4 and Clips(1).draw(1, rng) == [0]
    assert Clips(6, (1, 1)).draw(2, rng) == [0, 1, 0, 1, 0, 1]
    turned = [Clips(4, (2, 5), backward=0.5).draw(50, rng) for _ in range(400)]
    assert 120 < sum(frames[0] > frames[1] for frames in turned) < 280
    assert Clips(4, (1, 1), backward=1.0).draw(4, rng) == [3, 2, 1, 0]
    for bad in ({"frames": 0}, {"stride": (3, 2)}, {"stride": (0, 2)}, {"per_video": 0}, {"backward": 2.0}):
        with pytest.raises(ValueError, match="Clips"):
            Clips(**bad)


# ---- DAVIS


@pytest.fixture
def davis(tmp_path) -> Path:
    """Sequences a (T frames) and b (2), lists of 2016, 2017 and those of DAVIS 2016's own archive."""
    root = tmp_path / "DAVIS"
    for name, n in (("a", T), ("b", 2)):
        save_frames(root / "JPEGImages" / "480p" / name, n)
        for t in range(n):
            save_mask(root / "Annotations" / "480p" / name / f"{t:05d}.png", ids_of(t))
    lines = [f"/JPEGImages/480p/b/{t:05d}.jpg /Annotations/480p/b/{t:05d}.png" for t in range(2)]
    for place, text in (("2017/train", "a\nb\n"), ("2017/val", "b\n"), ("480p/val", "\n".join(lines))):
        (root / "ImageSets" / place).parent.mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / f"{place}.txt").write_text(text)
    return root


def test_davis(davis):
    source = Davis(davis, "train", clips=Clips(3, (1, 2)), seed=4)
    assert source.names == ["a", "b"] and len(source) == 2 and source.tasks == ("vos",)
    assert "train of 2017, 2 videos, 8 frames, 8 masks; dropped from clips: 0" in source.summary()
    starts = set()
    for epoch in range(12):
        scene = source.scene(epoch, 0)
        frames = [int(t) for t in scene.image_id.removeprefix("a:").split(",")]
        assert shade(scene.image) == frames and frames[1] - frames[0] in (1, 2)
        want = np.stack([ids_of(t) for t in frames])
        assert np.array_equal(scene.masks, want) and np.array_equal(scene.void, want == 255)
        assert set(scene.ids.tolist()) == set(np.unique(want)) - {0, 255} and (scene.labels == -1).all()
        starts.add(frames[0])
    assert len(starts) >= 3
    x = whole(Davis(davis, "val", clips=Clips(3, (1, 1))), "vos")
    assert x["image"].shape == (3, 3, H, W) and x["ids"].tolist() == [1, 2] and x["ignore"].sum() == 12
    assert torch.equal(x["mask_prompts"], x["masks"][:, 0]) and x["image_id"] == "b:0,1,0"
    video = source.video(0)
    assert video.name == "a" and len(video) == T and video.size == (H, W) and video.annotated == list(range(T))
    assert shade(np.stack(list(video.frames()))) == list(range(T)) and shade(np.stack([*video.frames(2, 4)])) == [2, 3]
    assert video.timeline() == {1: list(range(T)), 2: [0, 1, 4, 5]}
    entries = video.entries()
    assert list(entries) == [0] and all(np.array_equal(m, ids_of(0) == i) for i, m in entries[0].items())
    assert [v.name for v in source.videos()] == ["a", "b"]


def test_a_clip_is_a_function_of_seed_epoch_and_index(davis):
    def clip(epoch, seed=0, index=0):
        return Davis(davis, "train", clips=Clips(3, (1, 3), per_video=4), seed=seed).scene(epoch, index)

    a, b = clip(3), clip(3)
    assert a.image_id == b.image_id and np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks)
    for varied in ([clip(e) for e in range(9)], [clip(3, s) for s in range(9)], [clip(3, index=k) for k in range(4)]):
        assert len({s.image_id for s in varied}) > 1
    assert len(Davis(davis, clips=Clips(per_video=4))) == 8 and clip(0, index=4).image_id.startswith("b:")


def test_clips_begin_with_an_object(davis):
    """Only the last frame shows one: nearly every clip of one frame finds it, where one of six would by chance."""
    for t in range(T - 1):
        save_mask(davis / "Annotations/480p/a" / f"{t:05d}.png", np.zeros((H, W)))
    source = Davis(davis, clips=Clips(1))
    found = [len(source.scene(e, 0).ids) for e in range(200)]
    assert np.mean(np.array(found) > 0) == pytest.approx(1 - (5 / 6) ** 4, abs=0.12)


def test_davis_2016_is_one_object(davis):
    source = Davis(davis, "val", 2016, Clips(2, (1, 1)))
    assert source.names == ["b"]  # of lines with a frame and its mask
    scene = source.scene(0, 0)
    want = np.stack([ids_of(t) for t in range(2)])
    assert scene.ids.tolist() == [1] and np.array_equal(scene.masks == 1, (want > 0) & (want < 255))
    assert np.array_equal(scene.void, want == 255)
    path = davis / "grey.png"
    save_mask(path, np.where(ids_of(0) == 1, 255, 0), grey=True)
    assert np.array_equal(read_mask(path, (H, W), one_object=True), ids_of(0) == 1)
    (davis / "ImageSets/2016").mkdir()
    (davis / "ImageSets/2016/val.txt").write_text("a\n")
    assert Davis(davis, "val", 2016).names == ["a"]
    with pytest.raises(ValueError, match="year 2018"):
        Davis(davis, year=2018)


def test_objects_that_enter_later(tmp_path):
    """Masks of some frames, each with what is new: no clips, but prompts on the frames where things enter."""
    save_frames(tmp_path / "judo" / "images")
    masks = tmp_path / "judo" / "masks"
    save_mask(masks / "00000.png", np.where(ids_of(0) == 1, 1, 0))
    save_mask(masks / "00004.png", np.where(ids_of(4) == 2, 7, 0)[:, : W - 1])  # one column short, as 853 of 854 px
    for root in (tmp_path, tmp_path / "judo"):
        source = Davis(root)
        assert source.names == ["judo"] and len(source) == 0 and "1 videos with masks of some" in source.summary()
    video = source.video(0)
    entries = video.entries()
    assert video.annotated == [0, 4] and {t: list(new) for t, new in entries.items()} == {0: [1], 4: [7]}
    assert np.array_equal(entries[0][1], ids_of(0) == 1) and entries[4][7].shape == (H, W)
    off = entries[4][7] != (ids_of(4) == 2)  # stretched by 1 / 31: one column more
    assert 0 < off.sum() <= 8 and np.unique(np.nonzero(off)[1]).tolist() == [20]
    with pytest.raises(ValueError, match="frame 3 has no annotation"):
        video.segments([3])
    first = FirstMasks(source)
    assert len(first) == 2 and "2 frames of 1 videos, 2 objects" in first.summary()
    scene = first.scene(0, 1)
    assert scene.image_id == "judo:4" and scene.ids.tolist() == [7] and np.array_equal(scene.masks[0], entries[4][7])
    x = whole(PseudoVideo(first, 3), "vos", (2, 0))
    assert x["masks"].shape == (1, 3, H, W) and x["ids"].tolist() == [1] and x["mask_prompts"].any()


def bad_davis(kind: str, root: Path) -> None:
    masks, images = root / "Annotations/480p/a", root / "JPEGImages/480p/a"
    if kind == "size of a mask":
        save_mask(masks / "00003.png", ids_of(3)[:, : W - 2])
    elif kind == "size of a frame":
        Image.new("RGB", (W, H + 2)).save(images / "00002.jpg")
    elif kind == "empty video":
        for path in images.iterdir():
            path.unlink()
    elif kind == "first frame":
        save_mask(masks / "00000.png", np.zeros((H, W)))
    elif kind == "no mask at all":
        for path in masks.iterdir():
            path.unlink()
    elif kind == "stray mask":
        save_mask(masks / "00099.png", ids_of(0))
    elif kind == "colours":
        Image.new("RGB", (W, H)).save(masks / "00001.png")
    elif kind == "damaged mask":
        (masks / "00001.png").write_bytes((masks / "00001.png").read_bytes()[:40])
    elif kind == "missing sequence":
        (root / "ImageSets/2017/train.txt").write_text("a\nzebra\n")
    elif kind == "empty list":
        (root / "ImageSets/2017/train.txt").write_text("\n")
    elif kind == "split":
        (root / "ImageSets/2017/train.txt").unlink()
    elif kind == "layout":
        (root / "JPEGImages").rename(root / "frames")


DAVIS_PROBLEMS = {
    "size of a mask": "00003.png: is a mask of 24 x 30 px (H x W), its frames are 24 x 32",
    "size of a frame": "00002.jpg: is 26 x 32 px (H x W), its video 24 x 32; all frames of a video have one size",
    "empty video": "sequence 'a' holds no frames; an empty video cannot be used",
    "first frame": "no object is marked on its first frame",
    "no mask at all": "no object is marked on its first frame",
    "stray mask": "00099.png: is the mask of no frame of",
    "colours": "00001.png: has mode RGB; expected a palette PNG",
    "damaged mask": "00001.png: cannot be read as a picture",
    "missing sequence": "1 of 2 sequences are missing, as zebra",
    "empty list": "the list of split 'train': empty",
    "split": "has no split 'train' of 2017 in ImageSets, found val",
    "layout": "holds no sequence; expected JPEGImages/480p/<sequence>/",
}


@pytest.mark.parametrize("kind", DAVIS_PROBLEMS)
def test_problems_of_davis(davis, kind):
    bad_davis(kind, davis)
    with pytest.raises(UserError) as caught:
        video = Davis(davis, "train").video(0)
        list(video.frames())
        video.entries()
    assert DAVIS_PROBLEMS[kind] in str(caught.value) and "\n" not in str(caught.value)


# ---- YouTube-VIS


@pytest.fixture
def ytvis(tmp_path) -> Path:
    """Video v with a dog that is away on frames 2 and 3, a crowd of cats, and a tube without a mask; and w without."""
    for name in ("v", "w"):
        save_frames(tmp_path / "train" / "JPEGImages" / name)
    videos = [{"id": 5 + k, "width": W, "height": H, "length": T, "file_names": [f"{n}/{t:05d}.jpg" for t in range(T)]}
              for k, n in enumerate("vw")]  # fmt: skip
    cats = [rle_encode(ids_of(t) == 1) for t in range(T)]
    dog = [None if t in (2, 3) else rle_encode(ids_of(t) == 2) for t in range(T)]
    runs = np.diff(np.flatnonzero(np.diff((ids_of(0) == 2).ravel("F"), prepend=0, append=0)), prepend=0).tolist()
    dog[0] = {"size": [H, W], "counts": [*runs, H * W - sum(runs)]}  # uncompressed, as in the released files
    rows = [{"id": 70, "category_id": 3, "iscrowd": 0, "segmentations": dog}]
    rows += [{"id": 71, "category_id": 1, "iscrowd": 1, "segmentations": cats}]
    rows += [{"id": 72, "category_id": 1, "iscrowd": 0, "segmentations": [None] * T}]
    content = {"videos": videos, "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]}
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**content, "annotations": [{"video_id": 5, **row} for row in rows]}))
    return path


def test_ytvis(ytvis, tmp_path):
    source = YtVis(ytvis, clips=Clips(4, (1, 1)))
    assert source.classes == ["cat", "dog"] and source.category_ids == [1, 3] and source.names == ["v", "w"]
    assert len(source) == 1 and "2 tubes, 2 classes; dropped: 1 tubes without a mask" in source.summary()
    x = whole(source, "vis")
    frames = [int(t) for t in x["image_id"].removeprefix("v:").split(",")]
    assert x["ids"].tolist() == [70] and x["labels"].tolist() == [1]
    assert np.array_equal(x["masks"][0].numpy(), [ids_of(t) == 2 for t in frames])
    assert np.array_equal(x["ignore"].numpy(), [ids_of(t) == 1 for t in frames])  # the crowd
    assert whole(source, "vos")["ids"].tolist() == [70] and len(source.video(1)) == T
    video = source.video(0)
    assert video.timeline() == {70: [0, 1, 4, 5]} and video.annotated == list(range(T))
    assert len(source.read(0, [2, 3]).ids) == 1  # the dog is not there, the crowd is
    starts = {SegmentItems(source, "vis", View(H, W))[e, 0]["image_id"] for e in range(20)}
    assert starts == {"v:0,1,2,3", "v:1,2,3,4"} | ({"v:2,3,4,5"} & starts)
    change(ytvis, lambda c: c.update(annotations=None))  # the released validation set
    source = YtVis(ytvis)
    assert (
        len(source) == 0
        and source.video(0).annotated == []
        and shade(np.stack([*source.video(0).frames()])) == [*range(T)]
    )
    with pytest.raises(UserError, match="no object is marked on any frame"):
        source.video(0).entries()


YTVIS_PROBLEMS = {
    "annotation 70 is of category 9, which the file does not name": lambda c: c["annotations"][0].update(category_id=9),
    "annotation 70 is of video 9, which the file does not name": lambda c: c["annotations"][0].update(video_id=9),
    "annotation 70 has 5 masks, its video 6 frames": lambda c: c["annotations"][0]["segmentations"].pop(),
    "video 5 has 0 file names and length 0": lambda c: c["videos"][0].update(file_names=[], length=0),
    "video 5 has 6 file names and length 7": lambda c: c["videos"][0].update(length=7),
    "names no video": lambda c: c.update(videos=[]),
    "no such frame, and 1 of 12": lambda c: c["videos"][0]["file_names"].__setitem__(3, "v/99999.jpg"),
    "write masks at the size of the video": lambda c: c["annotations"][0]["segmentations"].__setitem__(
        1, rle_encode(np.ones((H, W - 1), bool))
    ),
    "its video 24 x 33; all frames of a video have one size": lambda c: c["videos"][1].update(width=W + 1),
    "so they are damaged": lambda c: c["annotations"][0]["segmentations"][1].update(counts="0000"),
}


@pytest.mark.parametrize("problem", YTVIS_PROBLEMS)
def test_problems_of_ytvis(ytvis, problem):
    change(ytvis, YTVIS_PROBLEMS[problem])
    with pytest.raises(UserError) as caught:
        for video in YtVis(ytvis).videos():
            list(video.frames())
            video.segments(video.annotated)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_frames_of_ytvis_are_found(ytvis, tmp_path):
    (tmp_path / "annotations").mkdir()
    moved = ytvis.rename(tmp_path / "annotations" / "instances_train_sub.json")
    assert YtVis(moved).folder == tmp_path / "train" / "JPEGImages"
    assert YtVis(moved, tmp_path / "train" / "JPEGImages").folder == tmp_path / "train" / "JPEGImages"
    with pytest.raises(UserError, match="no folder of its frames at .*none"):
        YtVis(moved, tmp_path / "none")


# ---- VIPSeg

VALUES = [0, 29, 6100, 6101, 200, 61]  # void, sky, two persons, a ceiling numbered by mistake, a person without number


@pytest.fixture
def vipseg(tmp_path) -> Path:
    root = tmp_path / "VIPSeg_720P"
    save_frames(root / "images" / "v", 3)
    (root / "panomasks" / "v").mkdir(parents=True)
    for t in range(3):
        ids = np.repeat(np.array(VALUES), 5)[None].repeat(H, 0)
        ids = np.roll(np.pad(ids, ((0, 0), (0, W - ids.shape[1]))), t, 1).astype(np.uint16)
        Image.fromarray(ids).save(root / "panomasks" / "v" / f"{t:05d}.png")
    names = {1: ("ceiling", 0), 28: ("sky", 0), 60: ("person", 1)}
    categories = [{"id": i, "name": n, "isthing": thing} for i, (n, thing) in names.items()]
    (root / "panoVIPSeg_categories.json").write_text(json.dumps(categories))
    (tmp_path / "val.txt").write_text("v\n")
    return root


def test_vipseg(vipseg):
    source = Vipseg(vipseg, "val", Clips(3, (1, 1)))
    assert source.classes == ["ceiling", "sky", "person"] and source.is_thing == [False, False, True]
    assert "val, 1 videos, 3 frames, 1 + 2 classes" in source.summary()
    x = whole(source, "vps")
    assert x["ids"].tolist() == [29, 61, 6100, 6101] and x["labels"].tolist() == [1, 2, 2, 2]
    for i, mask in zip(x["ids"].tolist(), x["masks"].numpy(), strict=True):
        for t in range(3):
            at = np.flatnonzero(mask[t].all(0))
            assert at.tolist() == list(range(5 * VALUES.index(i) + t, 5 * VALUES.index(i) + 5 + t))
    assert x["ignore"].sum((1, 2)).tolist() == [H * (5 + 5 + W - 30)] * 3  # void, the ceiling, the rest
    assert whole(source, "vis")["ids"].tolist() == whole(source, "vos")["ids"].tolist() == [61, 6100, 6101]
    assert source.video(0).timeline() == {i: [0, 1, 2] for i in (61, 6100, 6101)}
    (vipseg / "images").rename(vipseg / "imgs")
    assert Vipseg(vipseg).names == ["v"]


def bad_vipseg(kind: str, root: Path) -> None:
    mask = root / "panomasks/v/00001.png"
    if kind == "category":
        Image.fromarray(np.full((H, W), 6200, np.uint16)).save(mask)
    elif kind == "size of a mask":
        Image.fromarray(np.full((H, W + 1), 6100, np.uint16)).save(mask)
    elif kind == "size of a frame":
        Image.new("RGB", (W + 1, H)).save(root / "images/v/00001.jpg")
    elif kind == "no mask":
        mask.unlink()
    elif kind == "empty video":
        for path in (root / "images/v").iterdir():
            path.unlink()
    elif kind == "split":
        (root.parent / "val.txt").write_text("v\nw\n")
    elif kind == "categories":
        (root / "panoVIPSeg_categories.json").unlink()
    elif kind == "colours":
        Image.new("RGB", (W, H)).save(mask)
    elif kind == "layout":
        (root / "panomasks").rename(root / "masks")


VIPSEG_PROBLEMS = {
    "category": "value 6200 is of category 61, which panoVIPSeg_categories.json does not name",
    "size of a mask": "00001.png: is a mask of 24 x 33 px (H x W), its frames are 24 x 32",
    "size of a frame": "00001.jpg: is 24 x 33 px (H x W), its video 24 x 32",
    "no mask": "00001.png: no such mask, and 1 of 3 are missing",
    "empty video": "holds no frames; an empty video cannot be used",
    "split": "1 of 2 videos have no masks, as w",
    "categories": "panoVIPSeg_categories.json: no such file, nor in the folder above",
    "colours": "expected one channel of whole numbers",
    "layout": "is not VIPSeg's folder; expected images/<video>/",
}


@pytest.mark.parametrize("kind", VIPSEG_PROBLEMS)
def test_problems_of_vipseg(vipseg, kind):
    bad_vipseg(kind, vipseg)
    with pytest.raises(UserError) as caught:
        video = Vipseg(vipseg, "val").video(0)
        list(video.frames())
        video.timeline()
    assert VIPSEG_PROBLEMS[kind] in str(caught.value) and "\n" not in str(caught.value)


# ---- pictures as clips


class Blobs:
    """A picture whose colour says what each pixel is: left half 1, a square 2, the rest ground; a void row below."""

    name, tasks, classes, category_ids = "blobs", ("panoptic", "instance", "interactive"), ["a", "b"], [1, 2]
    is_thing = [True, True]

    def __init__(self, as_map: bool):
        self.as_map = as_map

    def __len__(self) -> int:
        return 1

    def summary(self) -> str:
        return "blobs"

    def scene(self, epoch: int, index: int) -> Scene:
        ids = np.full((60, 80), 3)
        ids[:, :40], ids[20:45, 30:60], ids[50:] = 1, 2, 0
        image = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)[ids]
        number = np.array([1, 2, 3])
        masks = ids if self.as_map else ids == number[:, None, None]
        return Scene("x", image, masks, number, np.array([0, 0, 1]), np.zeros(3, bool), void=ids == 0)


def test_masks_move_with_the_picture():
    """Where no edge is near, the colour of a frame is that of its mask; beyond the border all is void."""
    for seed in range(6):
        scene = PseudoVideo(Blobs(True), 3, seed=seed).scene(0, 0)
        as_masks = PseudoVideo(Blobs(False), 3, seed=seed).scene(0, 0)
        assert scene.masks.shape == (3, 60, 80) and as_masks.masks.shape == (3, 3, 60, 80)
        assert np.array_equal(as_masks.masks, scene.masks == scene.ids[:, None, None, None])
        colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (124, 116, 104)])
        outside = (scene.masks == 0) & (np.abs(scene.image.astype(int) - colours[4]).sum(-1) == 0)
        seen = np.where(outside, 4, scene.masks)
        right = np.abs(scene.image - colours[seen]).sum(-1) < 30
        assert right.mean() > 0.9 and scene.void[outside].all() and np.array_equal(scene.void, scene.masks == 0)
        for k in range(5):  # the middle of every part is exact, its edge mixed by at most a pixel
            part = seen == k
            inner = np.lib.stride_tricks.sliding_window_view(part, (1, 3, 3)).all((-3, -2, -1))
            assert right[:, 1:-1, 1:-1][inner].all()
        centres = [np.argwhere(scene.masks[t] == 2).mean(0) for t in range(3)]
        assert np.abs(centres[1] - (centres[0] + centres[2]) / 2).max() < 3  # on the way from the first to the last


def test_pseudo_video_repeats_and_may_stand_still():
    source = PseudoVideo(Blobs(True), 2)
    assert (
        source.tasks == ("vis", "vps", "vos") and len(source) == 1 and "clips of 2 frames of blobs" in source.summary()
    )
    a, b, other = source.scene(3, 0), source.scene(3, 0), source.scene(4, 0)
    assert np.array_equal(a.image, b.image) and not np.array_equal(a.image, other.image)
    assert not np.array_equal(a.image[0], a.image[1])
    still, picture = PseudoVideo(Blobs(True), 2, Jitter(0, 0, 0, 0)).scene(0, 0), Blobs(True).scene(0, 0)
    assert (still.image == picture.image).all() and (still.masks == picture.masks).all()
    shapes = PseudoVideo(MovingShapes(4, 0, size=48), 4)
    for task in shapes.tasks:
        items = SegmentItems(shapes, task, training_view(task, 48, 48), Prompts(number=3, least=4))
        batch = SegmentCollate()([items[0, k] for k in range(3)])
        assert batch["image"].shape == (3, 4, 3, 64, 64) and len(batch["masks"]) == 3
    with pytest.raises(ValueError, match="expected pictures"):
        PseudoVideo(MovingShapes(4, 0, frames=2))
    with pytest.raises(ValueError, match="Jitter"):
        Jitter(shear=1.0)


# ---- check_dataset


def check(*argv: object) -> int:
    spec = importlib.util.spec_from_file_location("check_dataset", ROOT / "data" / "check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run.cli(module.main, [*map(str, argv)])


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "car"}]}
    for i in range(2):
        Image.new("RGB", (W, H)).save(root / "val2017" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": W, "height": H})
        row = {"id": i, "image_id": i, "category_id": 3, "segmentation": rle_encode(ids_of(0) == 2), "iscrowd": 0}
        content["annotations"].append(row)
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content))
    return path


COUNTS = {
    "davis": ["train of 2017, 2 videos", "val of 2017, 1 videos", "objects per video 2/2/2 (min/median/max), 0 enter",
              "1 are away for a while", "vos, 2 of 2 clips of 3 frames"],
    "ytvis": ["2 videos, 12 frames, 2 tubes", "objects per video 0/0.5/1", "vis, 1 of 1 clips"],
    "vipseg": ["val, 1 videos", "objects per video 3/3/3", "vps, 1 of 1 clips of 3 frames"],
    "pseudo_video": ["clips of 3 frames of", "2 of 2 images decoded", "vis, 2 of 2 clips", "vos, 2 of 2 clips"],
}  # fmt: skip


@pytest.mark.parametrize("kind", VIDEO_FORMATS)
def test_counts_and_sheet(davis, ytvis, vipseg, coco, tmp_path, capsys, kind):
    place = {"davis": davis, "ytvis": ytvis, "vipseg": vipseg, "pseudo_video": coco}[kind]
    sheet, size = tmp_path / "new" / "sheet.png", ["--image-size", 48, "--batch-size", 2, "--clip-len", 3]
    assert check(kind, place, *size, "--columns", 4, "--show", sheet) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    for line in (*COUNTS[kind], "picture of the first training batch", "no problem found"):
        assert line in out, f"{line!r} is not in\n{out}"
    with Image.open(sheet) as image:
        assert np.asarray(image).std() > 5
    assert check(kind, "--clip-len", 3) == 2 and "needs ROOT" in capsys.readouterr().err


def test_problems_are_one_sentence(davis, ytvis, capsys):
    for argv, problem in (
        (("davis", davis, "--stride", "3,2"), "--stride 3,2: expected LOW,HIGH"),
        (("davis", davis, "--split", "test"), "has no split 'test' of 2017 in ImageSets, found train, val"),
        (("davis", davis, "--year", 2016, "--split", "train"), "has no split 'train' of 2016"),
        (("ytvis", davis), "expected a json, here or in annotations/, found none"),
        (("vipseg", davis), "is not VIPSeg's folder"),
        (("pseudo_video", davis), "expected panoptic_*.json"),
    ):
        assert check(*argv) == 2
        err = capsys.readouterr().err.strip()
        assert problem in err and err.startswith("error: ") and "\n" not in err
    bad_davis("size of a frame", davis)
    (davis / "Annotations/480p/a/00002.png").unlink()  # so no clip shows it
    assert (
        check("davis", davis, "--clip-len", 2) == 2 and "all frames of a video have one size" in capsys.readouterr().err
    )


# ---- stored data

FOLDERS = sorted({p.parent for p in SHARED.glob("**/JPEGImages")} | {p.parent.parent for p in SHARED.glob("*/*/masks")})
TUBES = [
    p for p in sorted(SHARED.glob("**/*.json")) if (p.parent / "JPEGImages").is_dir() and '"videos"' in p.read_text()
]


def sequences(root: Path) -> dict[str, list[Path]]:
    """{sequence: its masks} of a folder, found without the reader."""
    found = [*root.glob("Annotations/*/*/*.png"), *root.glob("*/masks/*.png")]
    name = {p: p.parent.parent.name if p.parent.name == "masks" else p.parent.name for p in found}
    return {n: sorted(p for p in found if name[p] == n) for n in sorted(set(name.values()))}


@pytest.mark.skipif(not FOLDERS, reason="LAB_SHARED holds no folders of videos")
def test_reference_videos(capsys):
    """Every mask is read as it is stored (one that is a pixel off its frames: with the same objects), entries are the
    first frames that show an object, frames have one size, and clips hold the masks of the frames they name."""
    right = total = 0
    for root in FOLDERS:
        source, stored = Davis(root, clips=Clips(3, (1, 5)), seed=1), sequences(root)
        assert sorted(source.names) == sorted(stored)
        for number, name in enumerate(source.names):
            video, first = source.video(number), {}
            assert len(video.annotated) == len(stored[name]) and sum(1 for _ in video.frames(0, 3)) == min(
                3, len(video)
            )
            for t, path in zip(video.annotated, stored[name], strict=True):
                own = np.asarray(Image.open(path))
                ids = video.segments([t]).masks[0]
                same = (
                    np.array_equal(ids, own) if own.shape == video.size else set(np.unique(ids)) == set(np.unique(own))
                )
                right, total = right + same, total + 1
                for i in set(np.unique(own).tolist()) - {0, 255}:
                    first.setdefault(i, t)
            assert {i: t for t, new in video.entries().items() for i in new} == first
        for index in range(len(source)):
            scene = source.scene(0, index)
            name, _, frames = scene.image_id.partition(":")
            own = np.stack([np.asarray(Image.open(stored[name][int(t)])) for t in frames.split(",")])
            assert np.array_equal(scene.masks, own) and scene.image.shape == (*own.shape, 3)
    with capsys.disabled():
        print(f"\nmasks of {len(FOLDERS)} folders of videos as stored: {right} of {total}")
    assert right == total


@pytest.mark.skipif(not TUBES, reason="LAB_SHARED holds no YouTube-VIS json with frames")
def test_reference_tubes(capsys):
    """Every mask has the area and the box that its json says, and is one with the PNGs beside it."""
    right = total = 0
    for path in TUBES:
        source, content = YtVis(path, clips=Clips(2, (1, 4))), json.loads(path.read_text())
        pngs = {p.name: p for p in path.parent.glob("Annotations/*/*")}
        number = {v["id"]: n for n, v in enumerate(content["videos"])}
        for a in content["annotations"]:
            video = source.video(number[a["video_id"]])
            segments = video.segments(range(len(video)))
            masks = segments.masks[segments.ids.tolist().index(a["id"])]
            for t, code in enumerate(a["segmentations"]):
                want = np.zeros(video.size, bool) if code is None else rle_decode(code)
                good = np.array_equal(masks[t], want) and (
                    code is None or masks[t].sum() == rle_area(code) == a["areas"][t]
                )
                if video.name in pngs:
                    good &= bool((np.asarray(Image.open(pngs[video.name] / f"{t:05d}.png"))[masks[t]] > 0).all())
                right, total = right + good, total + 1
        for index in range(len(source)):
            x = SegmentItems(source, "vis", View(*source.size(index)))[index]
            assert len(x["ids"]) and x["masks"].flatten(1).any(1).all()
    with capsys.disabled():
        print(f"\nmasks of tubes as their json says: {right} of {total}")
    assert right == total


def test_every_source_is_one():
    assert all(issubclass(kind, VideoSource) for kind in (Davis, YtVis, Vipseg))
