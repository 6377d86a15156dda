"""utils/instance_ap.py: what the stored cases do not hold, against pycocotools' own path and slow definitions."""

import copy
import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.instance_ap import NAMES, coco_ap, tube_iou, ytvis_ap
from utils.masks import rle_encode

H, W, T = 30, 40, 4


def box(x: int, y: int, w: int, h: int) -> dict:
    mask = np.zeros((H, W), bool)
    mask[y : y + h, x : x + w] = True
    return rle_encode(mask)


def annotation(k: int, image: int, category: int, x: int, y: int, w: int, h: int, crowd: int = 0) -> dict:
    own = {"id": k, "image_id": image, "category_id": category, "iscrowd": crowd, "area": w * h}
    return own | {"segmentation": box(x, y, w, h), "bbox": [x, y, w, h]}


LABELS = {
    "images": [{"id": i, "height": H, "width": W} for i in (1, 2)],
    "categories": [{"id": 3}, {"id": 5}],
    "annotations": [
        annotation(1, 1, 3, 2, 2, 10, 10),
        annotation(2, 1, 5, 20, 5, 12, 8),
        annotation(3, 2, 3, 5, 5, 8, 8),
        annotation(4, 2, 3, 0, 20, 40, 10, crowd=1),
    ],
}
FOUND = [
    {"image_id": 1, "category_id": 3, "score": 0.9, "segmentation": box(3, 2, 10, 10)},
    {"image_id": 1, "category_id": 5, "score": 0.4, "segmentation": box(20, 5, 10, 8)},
    {"image_id": 2, "category_id": 3, "score": 0.8, "segmentation": box(10, 21, 6, 6)},  # on the crowd
    {"image_id": 2, "category_id": 3, "score": 0.7, "segmentation": box(25, 5, 8, 8)},
]


def test_masks_without_boxes_as_pycocotools_loads_them():
    for kind in ("segm", "bbox"):
        with redirect_stdout(io.StringIO()):
            index = COCO()
            index.dataset = copy.deepcopy(LABELS)
            index.createIndex()
            evaluation = COCOeval(index, index.loadRes(copy.deepcopy(FOUND)), kind)
            for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
                step()
        before = json.dumps([LABELS, FOUND])
        got = coco_ap(LABELS, FOUND, kind)
        assert [got[k] for k in NAMES] == evaluation.stats.tolist() and 0 < got["AP"] < 1
        assert json.dumps([LABELS, FOUND]) == before
        assert np.mean(list(got["per_category"].values())) == pytest.approx(got["AP"])


def test_an_annotation_numbered_0_counts():
    """pycocotools itself takes a match with annotation 0 for no match."""
    perfect = [{**a, "score": 1.0} for a in LABELS["annotations"][:3]]
    moved = {**LABELS, "annotations": [{**a, "id": a["id"] - 1} for a in LABELS["annotations"]]}
    assert coco_ap(LABELS, perfect)["AP"] == coco_ap(moved, perfect)["AP"] == pytest.approx(1)


def test_nothing_predicted_is_0_and_nothing_to_find_is_minus_1():
    assert coco_ap(LABELS, [])["AP"] == 0
    nothing = coco_ap({**LABELS, "annotations": []}, FOUND)
    assert nothing["AP"] == -1 and nothing["per_category"] == {3: -1, 5: -1}
    assert coco_ap(LABELS, [])["per_category"] == {3: 0, 5: 0}


def tubes(seed: int, n: int) -> list[np.ndarray]:
    """n tubes (T, H, W) bool, with empty frames among them."""
    rng = np.random.default_rng(seed)
    return list((rng.random((n, T, H, W)) > 0.6) & (rng.random((n, T, 1, 1)) > 0.3))


def codes(tube: np.ndarray) -> list:
    return [rle_encode(frame) if frame.any() else None for frame in tube]


def test_iou_of_tubes_is_that_of_the_volumes():
    a, b = tubes(1, 3), tubes(2, 2)
    want = [[(x & y).sum() / (x | y).sum() for y in b] for x in a]
    np.testing.assert_allclose(tube_iou([codes(x) for x in a], [codes(y) for y in b]), want, rtol=1e-12)
    assert tube_iou([[None] * T], [[None] * T]) == 0
    assert tube_iou([], [codes(b[0])]).shape == (0, 1) and tube_iou([codes(b[0])], []).shape == (1, 0)
    with pytest.raises(ValueError):
        tube_iou([codes(a[0])], [codes(b[0])[:-1]])


def video_labels(all_tubes: list, categories: list[int]) -> dict:
    return {
        "videos": [{"id": 1, "height": H, "width": W, "length": T}],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [
            {
                "id": k,
                "video_id": 1,
                "category_id": c,
                "iscrowd": 0,
                "segmentations": codes(t),
                "areas": [int(f.sum()) or None for f in t],
            }
            for k, (t, c) in enumerate(zip(all_tubes, categories, strict=True))
        ],
    }


def results(all_tubes: list, categories: list[int]) -> list[dict]:
    return [
        {"video_id": 1, "category_id": c, "score": 1 - k / 10, "segmentations": codes(t)}
        for k, (t, c) in enumerate(zip(all_tubes, categories, strict=True))
    ]


def test_video_scores():
    truth = tubes(3, 3)
    labels = video_labels(truth, [1, 1, 2])
    perfect = ytvis_ap(labels, results(truth, [1, 1, 2]))
    assert perfect["AP"] == pytest.approx(1) and perfect["per_category"] == pytest.approx({1: 1, 2: 1})
    assert perfect["APs"] == pytest.approx(1) and perfect["APm"] == perfect["APl"] == -1  # areas below 128 * 128 px
    assert ytvis_ap(labels, results(truth, [2, 2, 1]))["AP"] == 0
    assert ytvis_ap(labels, [])["AP"] == 0
    cut = [np.concatenate([t[:2], np.zeros_like(t[2:])]) for t in truth]
    assert ytvis_ap(labels, results(cut, [1, 1, 2]))["AP75"] < 1
    with pytest.raises(ValueError, match="expected 30 x 40"):
        ytvis_ap(labels, [{**results(truth[:1], [1])[0], "segmentations": [rle_encode(np.ones((W, H), bool))] * T}])


def test_size_of_a_tube_is_the_mean_of_the_frames_that_show_it():
    whole, pixels = rle_encode(np.ones((150, 150), bool)), 150 * 150  # more than 128 * 128, half of it would be less
    labels = {
        "videos": [{"id": 1, "height": 150, "width": 150, "length": 2}],
        "categories": [{"id": 1}],
        "annotations": [{"video_id": 1, "category_id": 1, "segmentations": [whole, None], "areas": [pixels, None]}],
    }
    found = [{"video_id": 1, "category_id": 1, "score": 1.0, "segmentations": [whole, None]}]
    got = ytvis_ap(labels, found)
    assert got["APm"] == pytest.approx(1) and got["APs"] == got["APl"] == -1
    extra = {**found[0], "score": 2.0, "segmentations": [None, whole]}  # of the same size, found first, wrong
    assert ytvis_ap(labels, [*found, extra])["APm"] == pytest.approx(0.5)
