"""eval/infer_segment.py on videos with tiny random networks: what is written is what the eval scripts read; layouts of
folders, first masks, prompts on any frame, refusals that leave nothing."""

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.video import VideoReader, VideoWriter
from models.fastsam2 import FastSAM2, FastSAM2Config, build_vocabulary, hash_texts
from models.segment_stream import Stream
from models.streaming_memory import MemoryConfig
from utils import run
from utils.masks import rle_decode
from utils.segmentation_files import read_ids, read_objects
from utils.video_inputs import find_videos, first_masks
from utils.video_writing import davis_palette, save_palette

ROOT = Path(__file__).resolve().parents[1]
NAMES, CATEGORIES, IS_THING = ["cat", "dog", "sky"], [17, 18, 300], [True, True, False]
H, W, T = 40, 56, 4


@functools.cache
def module(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def script(name: str, *argv: object) -> int:
    return run.cli(module(name).main, [*map(str, argv)])


def infer(*argv: object) -> int:
    return script("infer_segment", *argv, "--device", "cpu")


def refused(capsys, *argv: object) -> str:
    assert infer(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err, err
    return err


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for kind, memory in (("memory", MemoryConfig(dim=16, heads=2, hidden=24)), ("plain", None)):
        torch.manual_seed(0)
        model = FastSAM2(FastSAM2Config(classes=NAMES, is_thing=IS_THING, backbone="resnet18", queries=8, stages=1, dim=16,
                                        heads=2, hidden=24, embed_dim=24, memory=memory))  # fmt: skip
        embed = build_vocabulary(NAMES, lambda texts: hash_texts(texts, 24), ("{}",))
        model.set_vocabulary(NAMES, embed, IS_THING)
        config = {**model.config_dict(), "data": {"category_ids": CATEGORIES, "image_size": [H, W]}}
        folder = tmp_path_factory.mktemp(kind)
        run.save_checkpoint(folder, 1, model, config, {})
        found[kind] = folder / "last"
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each checkpoint is read once."""
    monkeypatch.setattr(FastSAM2, "from_checkpoint", loaded)


@functools.cache
def loaded(folder: Path | str) -> FastSAM2:
    return from_checkpoint(Path(folder))


from_checkpoint = FastSAM2.from_checkpoint


def image(t: int, seed: int = 0) -> np.ndarray:
    picture = np.random.default_rng(seed).integers(0, 90, (H, W, 3), dtype=np.uint8)
    picture[10:24, 4 + t : 18 + t] = (220, 160, 40)
    return picture


@pytest.fixture(scope="module")
def davis(tmp_path_factory) -> Path:
    """Two sequences in DAVIS's layout; object 2 of the second enters on its third frame."""
    root = tmp_path_factory.mktemp("davis")
    for k, name in enumerate(("ant", "bee")):
        images, masks = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for t in range(T):
            Image.fromarray(image(t, k)).save(images / f"{t:05d}.png")
            ids = np.zeros((H, W), np.uint8)
            ids[10:24, 4 + t : 18 + t] = 1
            ids[30:38, 40:50] = 2 * (k == 1 and t > 1)
            ids[0] = 255  # not known
            save_palette(masks / f"{t:05d}.png", ids)
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "walk.mp4"
    with VideoWriter(path, 25, (W, H)) as film:
        for t in range(T):
            film.write(image(t))
    return path


# ---- vos


def test_first_masks_are_followed_and_scored(tmp_path, davis, ckpts):
    out, masks = tmp_path / "out", davis / "Annotations" / "480p"
    args = ("--ckpt", ckpts["memory"], "--task", "vos")
    assert infer(davis, *args, "--out", out, "--masks", masks) == 0
    assert sorted(p.name for p in out.iterdir()) == ["vos", "vos.json", "vos.json.meta.json", "vos_overlays"]
    for name in ("ant", "bee"):
        files = sorted((out / "vos" / name).iterdir())
        assert [p.name for p in files] == [f"{t:05d}.png" for t in range(T)]
        assert Image.open(files[0]).mode == "P" and Image.open(files[0]).getpalette() == davis_palette()
        first, given = read_objects(files[0]), read_objects(masks / name / "00000.png")
        assert np.array_equal(first, np.where(given == 255, 0, given))  # a given mask is the result
        with VideoReader(out / "vos_overlays" / f"{name}.mp4") as film:
            assert len(film) == T and film.out_size == (W, H) and film.fps == 24
    late = read_objects(out / "vos" / "bee" / "00002.png"), read_objects(masks / "bee" / "00002.png")
    assert np.array_equal(late[0] == 2, late[1] == 2)
    assert not any((read_objects(out / "vos" / "bee" / f"0000{t}.png") == 2).any() for t in (0, 1))
    [ant, bee] = read(out / "vos.json")
    assert ant["video_id"] == "ant" and [len(f["objects"]) for f in bee["annotations"]] == [1, 1, 2, 2]
    assert ant["annotations"][0]["objects"][0]["present"]
    about = read(out / "vos.json.meta.json")
    assert len(about["inputs"]) == 2 * T and about["config"]["videos"] == {"ant": "ant", "bee": "bee"}
    (tmp_path / "ant.txt").write_text("ant")
    assert script("eval_vos", "--pred", out / "vos", "--labels", masks, "--sequences", tmp_path / "ant.txt") == 0


def test_later_masks_are_not_used(tmp_path, davis, ckpts):
    """Others in their place, or none: the same."""
    frames, found = davis / "JPEGImages" / "480p" / "ant", {}
    for kind in ("all", "wrong", "one file"):
        masks = tmp_path / kind / "ant"
        masks.mkdir(parents=True)
        ids = read_objects(davis / "Annotations" / "480p" / "ant" / "00000.png")
        for t in range(T if kind in ("all", "wrong") else 1):
            save_palette(masks / f"{t:05d}.png", ids if t == 0 or kind == "all" else np.roll(ids, 7 * t, 1))
        if kind == "one file":
            (masks / "00000.png").rename(tmp_path / kind / "ant.png")
        args = (frames, "--ckpt", ckpts["memory"], "--task", "vos", "--masks", tmp_path / kind)
        assert infer(*args, "--out", tmp_path / f"{kind} out") == 0
        found[kind] = [(tmp_path / f"{kind} out" / "vos" / "ant" / f"{t:05d}.png").read_bytes() for t in range(T)]
    assert all(x == found["all"] for x in found.values())


def test_prompts_on_any_frame_of_a_file(tmp_path, clip, ckpts):
    """As a stream by hand; the file's frames are numbered from 0."""
    Image.fromarray(np.pad(np.full((10, 10), 255, np.uint8), ((5, 25), (5, 41)))).save(tmp_path / "rough.png")
    args = (
        "--ckpt",
        ckpts["memory"],
        "--out",
        tmp_path / "out",
        "--task",
        "vos",
        "--point",
        "9,14",
        "--point",
        "40,30,0",
    )
    assert infer(clip, *args, "--at", 2, "--box", "4,10,20,24", "--mask", tmp_path / "rough.png", "--text", "the cat",
                 "--object", "--text", "a dog", "--at", 1, "--mask", tmp_path / "rough.png") == 0  # fmt: skip
    mask = np.asarray(Image.open(tmp_path / "rough.png")) > 0
    prompts = {
        0: {1: {"points": [[9, 14, 1], [40, 30, 0]]}},
        2: {2: {"box": [4, 10, 20, 24], "mask": mask, "text": "the cat"}, 3: {"text": "a dog"}}, 1: {4: {"mask": mask}},
    }  # fmt: skip
    model = FastSAM2.from_checkpoint(ckpts["memory"]).eval()
    stream = Stream(model, image_size=(H, W), embed=functools.partial(hash_texts, width=24), overlap=False)
    with VideoReader(clip) as film:
        for t in range(T):
            for i, prompt in prompts.get(t, {}).items():
                stream.add(i, **prompt)
            found, ids = stream.step(film[t]), read_objects(tmp_path / "out" / "vos" / "walk" / f"{t:05d}.png")
            assert all(np.array_equal(ids == i, x.mask) for i, x in found.items())
    [entry] = read(tmp_path / "out" / "vos.json")
    assert [[x["id"] for x in f["objects"]] for f in entry["annotations"]] == [[1], [1, 4], [1, 2, 3, 4], [1, 2, 3, 4]]


def test_without_memory(tmp_path, capsys, clip, ckpts):
    args = (clip, "--out", tmp_path / "out", "--task", "vos", "--box", "4,10,18,24")
    assert "has no memory" in refused(capsys, *args, "--ckpt", ckpts["plain"]) and not (tmp_path / "out").exists()
    assert infer(*args, "--ckpt", ckpts["plain"], "--no-memory") == 0
    before = [(tmp_path / "out" / "vos" / "walk" / f"{t:05d}.png").read_bytes() for t in range(T)]
    assert len(before) == T


# ---- vis


def ytvis_labels(path: Path, ids: dict[str, int], stems: list[str]) -> Path:
    """A cat on the left of both videos."""
    left = {"size": [H, W], "counts": [0, H * W // 2, H * W // 2]}
    content = {
        "videos": [{"id": i, "width": W, "height": H, "length": len(stems), "file_names": [f"{n}/{s}.png" for s in stems]}
                   for n, i in ids.items()],
        "categories": [{"id": c, "name": n} for c, n in zip(CATEGORIES, NAMES, strict=True)],
        "annotations": [{"id": k + 1, "video_id": i, "category_id": 17, "iscrowd": 0, "segmentations": [left] * len(stems),
                         "areas": [H * W // 2] * len(stems), "bboxes": [[0, 0, W // 2, H]] * len(stems)}
                        for k, i in enumerate(ids.values())],
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_tracks_are_scored(tmp_path, davis, ckpts, stream):
    """With the ids and frames of a list (every other frame), whose annotations are not looked at, and with numbers."""
    root, settings = davis / "JPEGImages" / "480p", ("--clip-length", 0) * stream
    listed = ytvis_labels(tmp_path / "labels.json", {"bee": 31, "ant": 12}, ["00000", "00002"])
    args = ("--ckpt", ckpts["plain"], "--task", "vis", "--draw-score", 0, *settings)
    assert infer(root, *args, "--videos", listed, "--out", tmp_path / "out") == 0
    entries = read(tmp_path / "out" / "vis.json")
    for x in entries:
        assert x["video_id"] in (12, 31) and x["category_id"] in (17, 18) and len(x["segmentations"]) == 2
        assert all(m is None or rle_decode(m).shape == (H, W) for m in x["segmentations"]) and 0 <= x["score"] <= 1
    if entries:
        assert script("eval_vis", "--pred", tmp_path / "out" / "vis.json", "--labels", listed, "--missing-ok") == 0
    if stream:
        listed.write_text(json.dumps({"videos": read(listed)["videos"]}))
        assert infer(root, *args, "--videos", listed, "--out", tmp_path / "bare") == 0
        assert read(tmp_path / "bare" / "vis.json") == entries
    with VideoReader(tmp_path / "out" / "vis_overlays" / "bee.mp4") as film:
        assert len(film) == 2
    assert infer(root, *args, "--out", tmp_path / "all") == 0
    assert {x["video_id"] for x in read(tmp_path / "all" / "vis.json")} <= {1, 2}
    assert all(len(x["segmentations"]) == T for x in read(tmp_path / "all" / "vis.json"))
    about = read(tmp_path / "all" / "vis.json.meta.json")
    assert about["config"]["videos"] == {"1": "ant", "2": "bee"}
    assert stream or entries


# ---- vps


@pytest.mark.parametrize("settings", [(), ("--clip-length", 2), ("--clip-length", 0)])
def test_panoptic_tubes_are_scored(tmp_path, davis, ckpts, settings):
    out = tmp_path / "out"
    assert infer(davis, "--ckpt", ckpts["plain"], "--out", out, "--task", "vps", "--segment-score", 0.2,
                 "--segment-share", 0.1, *settings) == 0  # fmt: skip
    content, labels = read(out / "vps.json"), {"videos": [], "annotations": []}
    assert [c["id"] for c in content["categories"]] == CATEGORIES
    assert [v["video_id"] for v in content["annotations"]] == ["ant", "bee"]
    for video in content["annotations"]:
        assert [a["file_name"] for a in video["annotations"]] == [f"{t:05d}.png" for t in range(T)]
        for a in video["annotations"]:
            ids = read_ids(out / "vps" / video["video_id"] / a["file_name"])
            assert {s["id"]: s["area"] for s in a["segments_info"]} == {
                int(i): int(n) for i, n in zip(*np.unique(ids[ids > 0], return_counts=True), strict=True)
            }
    for name in ("ant", "bee"):
        (tmp_path / "gt" / name).mkdir(parents=True)
        rows = []
        for t in range(T):
            save = np.zeros((H, W, 3), np.uint8)
            save[..., 0] = np.where(np.arange(W) < W // 2, 1, 2)
            Image.fromarray(save).save(tmp_path / "gt" / name / f"{t:05d}.png")
            segments = [{"id": i, "category_id": c, "area": H * W // 2, "iscrowd": 0} for i, c in ((1, 18), (2, 300))]
            rows.append({"file_name": f"{t:05d}.png", "segments_info": segments})
        labels["videos"].append({"video_id": name})
        labels["annotations"].append({"video_id": name, "annotations": rows})
    labels["categories"] = content["categories"]
    (tmp_path / "gt.json").write_text(json.dumps(labels))
    assert script("eval_panoptic", "--pred", out / "vps.json", "--labels", tmp_path / "gt.json") == 0


# ---- files


def test_layouts(tmp_path):
    def put(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)

    put("flat/1.jpg", "vip/imgs/a/1.jpg", "vip/imgs/b/1.jpg", "one/images/1.jpg", "many/a/images/1.png", "many/b/1.png",
        "ytvis/JPEGImages/x/1.jpg", "davis/JPEGImages/480p/y/1.jpg")  # fmt: skip
    expected = {"flat": {"flat": "flat"}, "vip": {"a": "vip/imgs/a", "b": "vip/imgs/b"}, "one": {"one": "one/images"},
                "many": {"a": "many/a/images", "b": "many/b"}, "ytvis": {"x": "ytvis/JPEGImages/x"},
                "davis": {"y": "davis/JPEGImages/480p/y"}}  # fmt: skip
    for name, videos in expected.items():
        found = find_videos([str(tmp_path / name)])
        assert {k: p.relative_to(tmp_path).as_posix() for k, p in found.items()} == videos
    (tmp_path / "a.mp4").touch()
    assert set(find_videos([str(tmp_path / "flat"), str(tmp_path / "a.mp4")])) == {"flat", "a"}


def test_first_masks_by_frame(tmp_path):
    maps = {"00000": [0, 3, 3, 255], "00002": [0, 3, 5, 5], "00004": [7, 0, 5, 0]}
    for stem in maps:
        (tmp_path / f"{stem}.png").touch()
    stems = [f"{t:05d}" for t in range(5)]
    found = first_masks(str(tmp_path), "x", stems, True, lambda p: np.array([maps[p.stem]]))
    assert {t: {i: x["mask"][0].tolist() for i, x in new.items()} for t, new in found.items()} == {
        0: {3: [False, True, True, False]}, 2: {5: [False, False, True, True]}, 4: {7: [True, False, False, False]},
    }  # fmt: skip


def test_the_palette_is_that_of_davis():
    """Its first colours, and one from further on, as known from PASCAL VOC."""
    colours = np.array(davis_palette()).reshape(256, 3).tolist()
    assert colours[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colours[8] == [64, 0, 0] and colours[15] == [192, 128, 128] and colours[255] == [224, 224, 192]


# ---- refusals


def test_refusals(tmp_path, capsys, davis, clip, ckpts):
    """One sentence, exit 2, and nothing is left."""
    out, masks = tmp_path / "out", davis / "Annotations" / "480p"
    frames = davis / "JPEGImages" / "480p" / "ant"
    bad = {"sizes": [image(0), image(1)[:30]], "empty": [], "ok": [image(0), image(1)]}
    for name, pictures in bad.items():
        (tmp_path / name).mkdir()
        for t, x in enumerate(pictures):
            Image.fromarray(x).save(tmp_path / name / f"{t}.png")
    Image.fromarray(image(0)).save(tmp_path / "photo.png")
    (tmp_path / "nothing.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    ids = {
        "none": np.zeros((H, W), np.uint8),
        "small": np.ones((H // 2, W), np.uint8),
        "late": np.eye(H, W, dtype=np.uint8),
    }
    for name, x in ids.items():
        (tmp_path / f"m_{name}").mkdir()
        save_palette(tmp_path / f"m_{name}" / ("9.png" if name == "late" else "0.png"), x)
    Image.fromarray(np.ones((5, 7), np.uint8)).save(tmp_path / "rough.png")
    (tmp_path / "list.json").write_text('{"videos": [{"id": 3, "file_names": ["ant/9.png"]}]}')
    (tmp_path / "none.json").write_text('{"videos": []}')
    ckpt = ("--ckpt", ckpts["memory"], "--out", out)
    vos, ok = (*ckpt, "--task", "vos"), tmp_path / "ok"
    cases = [
        ((tmp_path / "empty", *ckpt, "--task", "vis"), "holds no frames"),
        ((tmp_path / "nothing.mp4", *ckpt, "--task", "vps"), "nothing.mp4"),
        ((tmp_path / "text.mp4", *ckpt, "--task", "vps"), "text.mp4"),
        ((tmp_path / "photo.png", *ckpt, "--task", "vps"), "is a picture"),
        ((tmp_path / "absent", *ckpt, "--task", "vps"), "no such file or folder"),
        ((clip, clip, *ckpt, "--task", "vps"), "both video 'walk'"),
        ((tmp_path / "sizes", *ckpt, "--task", "vps"), "all frames of a video have one size"),
        ((tmp_path / "sizes", *ckpt, "--task", "vis", "--clip-length", 0), "all frames of a video have one size"),
        ((tmp_path / "sizes", *vos, "--point", "9,9"), "all frames of a video have one size"),
        ((ok, *vos), "needs an object to follow"),
        ((ok, *vos, "--masks", tmp_path / "m_none"), "no object is marked on this first mask"),
        ((ok, *vos, "--masks", tmp_path / "m_small"), "is a mask of 20 x 56 px"),
        ((ok, *vos, "--masks", tmp_path / "m_late"), "is the mask of no frame"),
        ((ok, *vos, "--masks", tmp_path / "absent"), "has no mask of video 'ok'"),
        ((davis, *vos, "--masks", tmp_path / "m_small"), "has no mask of video 'ant'"),
        ((frames, *vos, "--masks", masks, "--point", "1,1"), "without other prompts"),
        ((davis, *vos, "--point", "1,1"), "2 videos, but prompts are about one"),
        ((ok, *vos, "--point", "56,1"), "outside the picture"),
        ((ok, *vos, "--mask", tmp_path / "rough.png"), "expected 56x40"),
        ((ok, *vos, "--at", 2, "--point", "1,1"), "--at 2: is not a frame of ok, which has frames 0..1"),
        ((ok, *vos, "--at", "x", "--point", "1,1"), "--at x: is not a frame"),
        ((ok, *vos, "--at", 1, "--point", "1,1,0"), "clicks beside it only"),
        ((ok, *ckpt, "--task", "vps", "--point", "1,1"), "takes no prompt"),
        ((ok, *ckpt, "--task", "vps", "--masks", masks), "--masks: is for --task vos"),
        ((ok, *ckpt, "--task", "vps", "--no-memory"), "--no-memory: is for --task vos"),
        ((ok, *ckpt, "--task", "vps", "--videos", tmp_path / "list.json"), "--videos: is for --task vis"),
        ((ok, *vos, "--point", "1,1", "--clip-length", 3), "--clip-length: is for --task vis and vps"),
        ((ok, *ckpt, "--task", "vis", "--clip-length", -1), "--clip-length -1"),
        ((tmp_path / "photo.png", *ckpt, "--task", "interactive", "--at", 1, "--point", "1,1"), "is for --task vos"),
        ((frames.parent, *ckpt, "--task", "vis", "--videos", tmp_path / "list.json"), "video 3 lacks"),
        ((frames.parent, *ckpt, "--task", "vis", "--videos", tmp_path / "none.json"), "lists no video"),
        ((clip, *ckpt, "--task", "vis", "--videos", tmp_path / "list.json"), "needs the one folder"),
    ]  # fmt: skip
    for argv, said in cases:
        assert said in refused(capsys, *argv), argv
        assert not out.exists(), argv


def test_results_are_not_overwritten(tmp_path, capsys, clip, ckpts):
    args = (clip, "--ckpt", ckpts["plain"], "--out", tmp_path)
    assert infer(*args, "--task", "vps") == 0
    assert "holds vps.json already" in refused(capsys, *args, "--task", "vps")
    assert infer(*args, "--task", "vis") == 0  # another task finds room beside it
