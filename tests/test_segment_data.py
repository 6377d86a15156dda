"""data/segment_batch.py: windows, targets of every task, prompts, batches; Cityscapes, SA-1B and RefCOCO below."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.cityscapes import Cityscapes
from data.refcoco import RefCoco
from data.sa1b import Sa1b
from data.segment_batch import (
    PAD_COLOUR,
    TASKS,
    Prompts,
    Scene,
    SegmentCollate,
    SegmentItems,
    View,
    Window,
    draw_prompts,
    draw_window,
    show_image,
    show_map,
)
from utils.masks import rle_encode
from utils.run import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fastsam2"
H, W = 40, 60


class Blocks:
    """One picture of four columns: sky, two cars, a crowd of cars, and one column of void."""

    name, tasks = "blocks", TASKS
    classes, category_ids, is_thing = ["car", "sky"], [3, 187], [True, False]

    def __init__(self, frames=0):
        self.map = np.zeros((H, W), np.int64)
        for k, i in enumerate((7, 1000, 70000, 9)):  # sky, car, car, crowd
            self.map[:, 12 * k : 12 * k + 12] = i
        self.frames = frames

    def __len__(self):
        return 1

    def scene(self, epoch, index):
        image = np.stack([self.map % 251, *np.mgrid[:H, :W]], -1).astype(np.uint8)
        masks, void = self.map, self.map == 0
        if self.frames:
            image, masks, void = (np.repeat(x[None], self.frames, 0) for x in (image, masks, void))
        text = [[], [(1, "left car"), (2, "the first car")], [(3, "right car")], []]
        ids = np.array([7, 1000, 70000, 9])
        crowd = np.array([False, False, False, True])
        return Scene("blocks", image, masks, ids, np.array([1, 0, 0, 0]), crowd, void, text)


PLAIN = View(H, W)


def item(task, view=PLAIN, key=(0, 0), source=None, **more):
    return SegmentItems(source or Blocks(), task, view, **more)[key]


# ---- windows


def test_the_whole_picture_is_untouched():
    window = draw_window(PLAIN, H, W, np.random.default_rng(0))
    assert window == Window(0, 0, W, H, H, W)
    image = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    assert np.array_equal(show_image(image, window), image)
    assert np.array_equal(show_map(image[..., 0], window), image[..., 0])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_cut_without_resize_is_exact(mirrored):
    image = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    window = Window(5, 3, 37, 19, 16, 32, mirrored)
    want = image[3:19, 5:37][:, :: -1 if mirrored else 1]
    assert np.array_equal(show_image(image, window), want)
    assert np.array_equal(show_map(image[..., 1], window), want[..., 1])


@pytest.mark.parametrize("seed", range(6))
def test_picture_and_masks_stay_together(seed):
    """A picture that shows its own mask: after resize, cut and mirror both agree but for pixels on an edge."""
    y, x = np.mgrid[:200, :300]
    mask = ((x - 120) ** 2 + (y - 90) ** 2 < 70**2) | ((x > 200) & (y > 120))
    image = np.repeat(255 * mask[..., None], 3, 2).astype(np.uint8)
    view = View(96, 128, scale=(0.5, 2.5), flip=0.5)
    window = draw_window(view, 200, 300, np.random.default_rng(seed))
    shown, found = show_image(image, window)[..., 0] > 127, show_map(mask, window)
    assert shown.shape == found.shape == (window.h, window.w) and window.h <= 96 and window.w <= 128
    edge = sum(np.abs(np.diff(found.astype(int), axis=a)).sum() for a in (0, 1))
    assert (shown != found).sum() <= 0.1 * edge + 2, f"{(shown != found).sum()} px differ, edges {edge}"


def test_windows_use_their_range():
    view = View(96, 128, scale=(0.5, 2.0), flip=0.5)
    rng = np.random.default_rng(0)
    windows = [draw_window(view, 200, 300, rng) for _ in range(300)]
    scale = [w.h / (w.y1 - w.y0) / min(96 / 200, 128 / 300) for w in windows]
    assert 0.49 < min(scale) < 0.55 and 1.9 < max(scale) < 2.05
    assert 0.4 < np.mean([w.mirrored for w in windows]) < 0.6
    assert all(0 <= w.y0 < w.y1 <= 200 + 1e-6 and 0 <= w.x0 < w.x1 <= 300 + 1e-6 for w in windows)
    assert min(w.x0 for w in windows) == 0 and max(w.x1 for w in windows) == pytest.approx(300)


def test_bad_views_and_prompts():
    for bad in ({"scale": (2.0, 1.0)}, {"scale": (0.0, 1.0)}, {"flip": 1.5}):
        with pytest.raises(ValueError, match="expected sides"):
            View(8, 8, **bad)
    for bad in ({"kinds": {"point+line": 1.0}}, {"kinds": {}}, {"least": 0}, {"number": -1}):
        with pytest.raises(ValueError, match="Prompts"):
            Prompts(**bad)


# ---- targets


@pytest.mark.parametrize(
    "task, labels, ids",
    [("panoptic", [1, 0, 0], [7, 1000, 70000]), ("instance", [0, 0], [1000, 70000]), ("semantic", [0, 1], [0, 1])],
)
def test_targets(task, labels, ids):
    x = item(task)
    assert x["task"] == task and x["labels"].tolist() == labels and x["ids"].tolist() == ids
    assert x["masks"].dtype == torch.bool and x["labels"].dtype == torch.long and x["image"].dtype == torch.uint8
    want = [12 * H] * len(ids) if task != "semantic" else [36 * H, 12 * H]  # cars with their crowd, sky
    assert x["masks"].flatten(1).sum(1).tolist() == want
    ignored = x["ignore"].sum(0).tolist()  # (W,) rows of each column
    crowd = H if task != "semantic" else 0
    assert ignored == [0] * 36 + [crowd] * 12 + [H] * 12
    assert x["original"].tolist() == [H, W] and x["shape"].tolist() == [H, W] and x["image"].shape == (3, H, W)


def test_a_segment_outside_the_window_is_no_target():
    items = SegmentItems(Blocks(), "panoptic", View(20, 20, scale=(3.0, 3.0)))
    sizes = {len(items[e, 0]["ids"]) for e in range(30)}
    for e in range(30):
        x = items[e, 0]
        assert x["masks"].flatten(1).any(1).all() and x["masks"].shape[1:] == x["image"].shape[1:]
    assert 0 in sizes and max(sizes) >= 2  # void and crowd only: no target at all


def test_referring():
    x = item("referring")
    assert x["ids"][0].item() in (1, 2) and x["ids"][1].item() == 3 and x["labels"].tolist() == [-1, -1]
    assert x["text"][0] in ("left car", "the first car") and x["text"][1] == "right car"
    assert len({item("referring", key=(e, 0))["text"][0] for e in range(20)}) == 2
    x = item("referring", all_sentences=True)
    assert x["ids"].tolist() == [1, 2, 3] and x["text"] == ["left car", "the first car", "right car"]
    assert torch.equal(x["masks"][0], x["masks"][1]) and not torch.equal(x["masks"][0], x["masks"][2])
    for view in (View(H, W, flip=0.5), View(H, W, scale=(1.0, 2.0))):
        with pytest.raises(ValueError, match="'left' is said"):
            SegmentItems(Blocks(), "referring", view)


def test_an_item_is_a_function_of_seed_epoch_and_index():
    view = View(H, W, (0.5, 2.0), 0.5)
    a, b = (item("interactive", view, (4, 0), seed=2) for _ in range(2))
    assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
    assert not torch.equal(a["points"], item("interactive", view, (5, 0), seed=2)["points"])
    assert not torch.equal(a["points"], item("interactive", view, (4, 0), seed=3)["points"])
    assert torch.equal(item("panoptic", key=0)["image"], item("panoptic", key=(0, 0))["image"])
    with pytest.raises(IndexError):
        item("panoptic", key=1)
    with pytest.raises(ValueError, match="has no task"):
        SegmentItems(Blocks(), "peaks", PLAIN)


# ---- prompts


def test_prompts_of_every_kind():
    kinds = {"point": 1.0, "point+negative": 1.0, "box": 1.0, "point+box+mask": 1.0}
    x = item("interactive", prompts=Prompts(number=200, kinds=kinds))
    assert x["masks"].shape[0] == 200 and (x["labels"] == -1).all() and set(x["ids"].tolist()) == {7, 1000, 70000}
    point, beside = x["point_labels"].unbind(1)
    seen = set(zip(point.tolist(), beside.tolist(), x["has_box"].tolist(), x["has_mask"].tolist(), strict=True))
    assert seen == {(1, -1, False, False), (1, 0, False, False), (-1, -1, True, False), (1, -1, True, True)}
    q = torch.arange(200)
    column, row = x["points"].long().unbind(-1)  # (Q, 2)
    on = x["masks"][q[:, None], row, column]
    assert on[point == 1, 0].all() and not on[beside == 0, 1].any()
    first = 12 * torch.tensor([{7: 0, 1000: 1, 70000: 2}[i] for i in x["ids"].tolist()])
    want = torch.stack([first, torch.zeros_like(first), first + 11, torch.full_like(first, H - 1)], 1).float()
    assert torch.equal(x["boxes"][x["has_box"]], want[x["has_box"]]) and not x["boxes"][~x["has_box"]].any()
    assert torch.equal(x["mask_prompts"][x["has_mask"]], x["masks"][x["has_mask"]])
    assert not x["mask_prompts"][~x["has_mask"]].any()


def test_clicks_are_spread_over_the_segment():
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 2:6, 3:15] = True
    drawn = draw_prompts(mask.repeat(4000, 0), Prompts(), np.random.default_rng(0))
    assert drawn["points"][:, 0].mean(0).tolist() == pytest.approx([8.5, 3.5], abs=0.2)
    assert len(drawn["points"][:, 0].unique(dim=0)) == 48


def test_noise_of_boxes_and_masks():
    mask = np.zeros((300, 64, 64), bool)
    mask[:, 10:40, 21:50] = True
    rng = np.random.default_rng(0)
    drawn = draw_prompts(mask, Prompts(kinds={"box+mask": 1.0}, jitter=0.1, coarse=8), rng)
    off = drawn["boxes"] - torch.tensor([21.0, 10, 49, 39])
    assert off.abs().max() <= 3.0 and off.std() > 1 and drawn["boxes"].max() <= 63
    coarse = drawn["mask_prompts"][0]
    assert torch.equal(coarse, coarse[::8, ::8].repeat_interleave(8, 0).repeat_interleave(8, 1))
    assert 0 < (coarse.numpy() != mask[0]).sum() < 0.5 * mask[0].sum()


def test_small_segments_are_not_prompted():
    assert len(item("interactive", prompts=Prompts(least=12 * H + 1))["ids"]) == 0
    x = item("interactive", prompts=Prompts(number=0))
    assert sorted(x["ids"].tolist()) == [7, 1000, 70000]
    assert len(item("interactive", prompts=Prompts(number=2))["ids"].unique()) == 2  # not the same one twice


# ---- clips and batches


def test_clips():
    x = item("vps", source=Blocks(frames=3))
    assert x["image"].shape == (3, 3, H, W) and x["masks"].shape == (3, 3, H, W) and x["ignore"].shape == (3, H, W)
    assert item("vis", source=Blocks(frames=3))["ids"].tolist() == [1000, 70000]
    x = item("vos", source=Blocks(frames=3), prompts=Prompts(number=5, kinds={"mask": 1.0}))
    assert sorted(x["ids"].tolist()) == [1000, 70000]  # things, none twice
    assert x["mask_prompts"].shape == (2, H, W) and torch.equal(x["mask_prompts"], x["masks"][:, 0])
    assert x["first"].tolist() == [0, 0]
    batch = SegmentCollate(multiple=32)([item("vps", source=Blocks(frames=3))] * 2)
    assert batch["image"].shape == (2, 3, 3, 64, 64) and batch["masks"][1].shape == (3, 3, 64, 64)
    assert batch["ignore"].shape == (2, 3, 64, 64) and batch["valid"].shape == (2, 64, 64)


def test_objects_that_enter_later():
    """With late they are pointed at where they are first large enough, but not on the last frame."""
    source = Blocks(frames=4)
    scene = source.scene(0, 0)
    scene.masks = np.stack([scene.masks == i for i in scene.ids])
    scene.masks[1, :2] = False  # a car that enters on frame 2, of which 20 px are seen on frame 1
    scene.masks[1, 1, :2, 12:22] = True
    scene.masks[2, :3] = False  # and one that enters on the last
    source.scene = lambda epoch, index: scene
    kinds = {"kinds": {"point+box+mask": 1.0}, "least": 32}
    assert item("vos", source=source, prompts=Prompts(**kinds))["ids"].tolist() == []
    x = item("vos", source=source, prompts=Prompts(**kinds, late=True))
    assert x["ids"].tolist() == [1000] and x["first"].tolist() == [2]
    assert torch.equal(x["mask_prompts"][0], x["masks"][0, 2]) and x["boxes"][0].tolist() == [12, 0, 23, H - 1]
    (px, py), _ = x["points"][0].long()
    assert x["masks"][0, 2, py, px]
    assert item("vos", source=source, prompts=Prompts(**kinds | {"least": 20}, late=True))["first"].tolist() == [1]
    batch = SegmentCollate()([x, item("vos", source=source, prompts=Prompts(**kinds))])
    assert [f.tolist() for f in batch["first"]] == [[2], []]


def test_batch():
    items = [item("interactive", View(20, 30)), item("interactive", prompts=Prompts(least=10**6))]
    batch = SegmentCollate()(items)
    assert batch["task"] == "interactive" and batch["image"].shape == (2, 3, 64, 64)
    assert batch["valid"].flatten(1).sum(1).tolist() == [20 * 30, H * W] and batch["valid"][0, :20, :30].all()
    assert torch.equal(batch["image"][0, :, :20, :30], items[0]["image"])
    assert batch["image"][0, :, 30, 3].tolist() == list(PAD_COLOUR)
    assert batch["masks"][0].shape == (30, 64, 64) and batch["masks"][1].shape == (0, 64, 64)
    assert not (batch["masks"][0] & ~batch["valid"][0]).any() and not (batch["ignore"] & ~batch["valid"]).any()
    assert torch.equal(batch["masks"][0][:, :20, :30], items[0]["masks"])
    assert batch["shape"].tolist() == [[20, 30], [H, W]] and batch["original"].tolist() == [[H, W]] * 2
    assert SegmentCollate((96, 128))(items)["image"].shape == (2, 3, 96, 128)
    assert [len(p) for p in batch["points"]] == [30, 0] and batch["image_id"] == ["blocks"] * 2
    with pytest.raises(ValueError, match="H x W"):
        SegmentCollate((32, 128))(items)
    with pytest.raises(ValueError, match="in one batch"):
        SegmentCollate()([items[0], item("panoptic")])


# ---- Cityscapes


def cityscapes(root: Path, numbers: np.ndarray) -> Path:
    for kind in ("leftImg8bit", "gtFine"):
        (root / kind / "val" / "ulm").mkdir(parents=True)
    Image.new("RGB", numbers.shape[::-1], (1, 2, 3)).save(
        root / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png"
    )
    path = root / "gtFine/val/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    Image.fromarray(numbers.astype(np.uint16)).save(path)
    return path


def test_cityscapes(tmp_path):
    columns = [7, 26, 26000, 26001, 33005, 29001, 3, 65535]  # road, cars, car, car, bicycle; caravan, void, plate
    path = cityscapes(tmp_path, np.repeat([columns], 6, 0))
    source = Cityscapes(tmp_path, "val")
    assert len(source.classes) == 19 and source.classes[0] == "road" and source.classes[18] == "bicycle"
    assert sum(source.is_thing) == 8 and source.category_ids[13] == 26 and "1 images of 1 cities" in source.summary()
    x = SegmentItems(source, "panoptic", View(6, 8))[0]
    assert x["image_id"] == "ulm_000000_000019" and x["ids"].tolist() == [7, 26000, 26001, 33005]
    assert x["labels"].tolist() == [0, 13, 13, 18]
    assert x["ignore"].all(0).tolist() == [False, True, False, False, False, True, True, True]
    assert SegmentItems(source, "instance", View(6, 8))[0]["ids"].tolist() == [26000, 26001, 33005]
    x = SegmentItems(source, "semantic", View(6, 8))[0]
    assert x["labels"].tolist() == [0, 13, 18] and x["masks"].flatten(1).sum(1).tolist() == [6, 18, 6]
    Image.fromarray(np.full((6, 8), 34000, np.uint16)).save(path)
    with pytest.raises(UserError, match="34000 is of label 34"):
        source.scene(0, 0)
    Image.fromarray(np.full((6, 9), 7, np.uint16)).save(path)
    with pytest.raises(UserError, match="has shape"):
        source.scene(0, 0)
    with pytest.raises(UserError, match="no picture of split 'train'"):
        Cityscapes(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match="1 of 1 are missing"):
        Cityscapes(tmp_path, "val")


# ---- SA-1B


def test_sa1b(tmp_path):
    mask = np.zeros((2, 10, 12), bool)
    mask[0, 2:8, 1:9] = mask[1, 3:5, 2:5] = True  # an object and a part of it
    annotations = [{"id": 5 + k, "segmentation": rle_encode(m), "area": int(m.sum())} for k, m in enumerate(mask)]
    about = {"image_id": 7, "width": 12, "height": 10, "file_name": "sa_7.jpg"}
    Image.new("RGB", (12, 10)).save(tmp_path / "sa_7.jpg")
    path = tmp_path / "sa_7.json"
    path.write_text(json.dumps({"image": about, "annotations": annotations}))
    source = Sa1b(tmp_path)
    x = SegmentItems(source, "instance", View(10, 12))[0]
    assert (
        x["ids"].tolist() == [5, 6] and x["labels"].tolist() == [-1, -1] and torch.equal(x["masks"], torch.tensor(mask))
    )
    assert SegmentItems(source, "interactive", View(10, 12), Prompts(number=0))[0]["ids"].tolist() == [5]  # 6: < 32 px
    path.write_text(json.dumps({"image": {**about, "width": 13}, "annotations": annotations}))
    with pytest.raises(UserError, match="expected 10 x 13"):
        source.scene(0, 0)
    path.write_text(json.dumps({"image": {**about, "width": 13}, "annotations": []}))
    with pytest.raises(UserError, match="annotations say 10 x 13"):
        source.scene(0, 0)
    path.write_text(json.dumps({"image": about}))
    with pytest.raises(UserError, match="expected {"):
        source.scene(0, 0)
    (tmp_path / "sa_7.jpg").unlink()
    path.write_text(json.dumps({"image": about, "annotations": annotations}))
    with pytest.raises(UserError, match="no folder of its pictures|no such picture"):
        Sa1b(tmp_path)
    with pytest.raises(UserError, match="holds no sa_"):
        Sa1b(tmp_path / "none")


SA1B = sorted({p.parent for p in SHARED.glob("*/sa1b*/sa_*.json")})


@pytest.mark.skipif(not SA1B, reason="LAB_SHARED holds no SA-1B files")
def test_reference_sa1b(capsys):
    """Every mask has exactly the area that its json says."""
    right = total = 0
    for folder in SA1B:
        source = Sa1b(folder)
        for index in range(len(source)):
            content = source.read(index)
            said = {a["id"]: a["area"] for a in content["annotations"]}
            size = content["image"]["height"], content["image"]["width"]
            x = SegmentItems(source, "instance", View(*size))[index]
            assert len(x["ids"]) == len(said)
            right += sum(int(m.sum()) == said[i] for i, m in zip(x["ids"].tolist(), x["masks"], strict=True))
            total += len(said)
    with capsys.disabled():
        print(f"\nSA-1B masks with the area of their json: {right} of {total}")
    assert right == total


# ---- RefCOCO


def refs(root: Path) -> Path:
    """Picture 4 with two objects in train, one of them with two sentences, and one in testA."""
    content = {"images": [{"id": 4, "file_name": "4.png", "height": 10, "width": 20}], "annotations": []}
    content["categories"] = [{"id": 3, "name": "car"}]
    (root / "images").mkdir()
    Image.new("RGB", (20, 10)).save(root / "images/4.png")
    for k in range(3):
        polygon = [5 * k, 0, 5 * k + 5, 0, 5 * k + 5, 10, 5 * k, 10]
        content["annotations"].append({"id": 50 + k, "image_id": 4, "category_id": 3, "segmentation": [polygon]})
    (root / "instances.json").write_text(json.dumps(content))
    said = [["left car", "first car"], [" "], ["right car"]]
    listed = []
    for k, split in enumerate(("train", "train", "testA")):
        sentences = [{"sent_id": 100 * k + j, "sent": s} for j, s in enumerate(said[k])]
        listed.append({"ref_id": k, "ann_id": 50 + k, "image_id": 4, "split": split, "sentences": sentences})
    (root / "refs_unc.json").write_text(json.dumps(listed))
    return root / "refs_unc.json"


def test_refcoco(tmp_path):
    path = refs(tmp_path)
    source = RefCoco(path, "train")
    assert "train, 1 images, 2 objects, 2 sentences" in source.summary() and "1 empty sentences" in source.summary()
    x = SegmentItems(source, "referring", View(10, 20), all_sentences=True)[0]
    assert x["text"] == ["left car", "first car"] and x["ids"].tolist() == [0, 1]
    assert x["masks"].shape == (2, 10, 20) and x["masks"][0].sum() == 50
    assert SegmentItems(RefCoco(path, "testA"), "referring", View(10, 20))[0]["ids"].tolist() == [200]
    with pytest.raises(UserError, match="no split 'val'; expected one of train, testA"):
        RefCoco(path, "val")
    for name in ("refs(unc).p", "refs.pkl"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'echo run > ran'\ntR.")
        with pytest.raises(UserError, match="reading one runs the code in it; make its json twin"):
            RefCoco(tmp_path / name, "train")
    listed = json.loads(path.read_text())
    for edit, problem in (
        ({"ann_id": 99}, "lacks annotation 99 of image 4, which ref 0"),
        ({"sentences": [{}]}, "ref 0"),
    ):
        path.write_text(json.dumps([{**listed[0], **edit}]))
        with pytest.raises(UserError, match=problem):
            RefCoco(path, "train")
    path.write_text("[]")
    with pytest.raises(UserError, match="holds no ref"):
        RefCoco(path, "train")


REFS = [p for p in sorted(SHARED.glob("*/refs*.json")) if p.with_name("instances.json").is_file()]


@pytest.mark.skipif(not REFS, reason="LAB_SHARED holds no refs")
def test_reference_refs(capsys):
    """Every sentence has a target, and it is the mask of the object that its ref names."""
    right = total = 0
    for path in REFS:
        listed = json.loads(path.read_text())
        for split in sorted({r["split"] for r in listed}):
            source = RefCoco(path, split)
            by_sentence = {s["sent_id"]: (r, s["sent"]) for r in listed if r["split"] == split for s in r["sentences"]}
            found = 0
            for index, i in enumerate(source.image_ids):
                about = source.objects.images[i]
                items = SegmentItems(source, "referring", View(about["height"], about["width"]), all_sentences=True)
                x = items[index]
                row = {r[0]: r[3] for r in source.objects.rows(i)}
                for number, text, mask in zip(x["ids"].tolist(), x["text"], x["masks"].numpy(), strict=True):
                    ref, said = by_sentence[number]
                    own = source.objects.masks(i, [row[ref["ann_id"]]])[0]
                    right += bool(text == said.strip() and ref["image_id"] == i and np.array_equal(mask, own))
                    found += 1
            assert found == len(by_sentence)
            total += found
    with capsys.disabled():
        print(f"\nsentences with the mask of their object: {right} of {total}")
    assert right == total
