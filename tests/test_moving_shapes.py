"""data/moving_shapes.py: scenes are exact and repeat, things hide and return, sentences name one object."""

import numpy as np
import pytest
import torch

from data.moving_shapes import CLASSES, COLOURS, CROWD, SHAPES, MovingShapes, inside
from data.segment_batch import CLIP_TASKS, IMAGE_TASKS, Prompts, SegmentCollate, SegmentItems, View

PICTURES, CLIPS = MovingShapes(200, 3, size=64), MovingShapes(60, 3, size=64, frames=12)


@pytest.fixture(scope="module")
def pictures():
    return [PICTURES.scene(0, i) for i in range(120)]


@pytest.fixture(scope="module")
def clips():
    return [CLIPS.scene(0, i) for i in range(60)]


def test_a_scene_is_a_function_of_seed_epoch_and_index():
    a, b = CLIPS.scene(2, 5), MovingShapes(6, 3, size=64, frames=12).scene(2, 5)
    assert np.array_equal(a.image, b.image) and np.array_equal(a.masks, b.masks) and a.text == b.text
    for other in (CLIPS.scene(1, 5), CLIPS.scene(2, 6), MovingShapes(60, 4, size=64, frames=12).scene(2, 5)):
        assert not np.array_equal(a.masks, other.masks)


def test_scenes_are_well_formed(pictures, clips):
    for scene, shape in [(s, (64, 64)) for s in pictures] + [(s, (12, 64, 64)) for s in clips]:
        assert scene.image.shape == (*shape, 3) and scene.image.dtype == np.uint8 and scene.masks.shape == shape
        assert set(np.unique(scene.masks)) - {0} == set(scene.ids.tolist())  # no segment without a pixel
        assert len(scene.ids) == len(scene.labels) == len(scene.crowd) == len(scene.text)
        assert np.array_equal(scene.void, scene.masks == 0) and 0 <= scene.labels.min() and scene.labels.max() < 8
        for i, label, crowd in zip(scene.ids, scene.labels, scene.crowd, strict=True):
            assert crowd == (i == CROWD) and PICTURES.is_thing[label] == (i >= CROWD)


def test_edge_cases_occur(pictures):
    things = [int((s.ids > CROWD).sum()) for s in pictures]
    assert min(things) == 0 and max(things) >= 4
    assert any(s.crowd.any() for s in pictures) and any(s.void.any() for s in pictures)
    assert {CLASSES[k] for s in pictures for k in s.labels} == set(CLASSES)
    none = MovingShapes(9, 0, empty=0.0, crowds=0.0, voids=0.0)
    assert not any(none.scene(0, i).void.any() or none.scene(0, i).crowd.any() for i in range(9))


def test_masks_are_where_the_colour_is():
    """Without noise a thing differs from what it was painted over exactly on its mask, but for the dark rim."""
    source = MovingShapes(40, 5, size=64, noise=0.0)
    for i in range(40):
        scene = source.scene(0, i)
        for k in np.flatnonzero(scene.ids > CROWD):
            mask = scene.masks == scene.ids[k]
            inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
            colours = np.unique(scene.image[1:-1, 1:-1][inner], axis=0)
            assert len(colours) <= 1  # one flat colour inside


def test_shapes_have_their_form():
    y, x = np.mgrid[-1:1:201j, -1:1:201j]
    area = {kind: inside(kind, x, y).mean() * 4 for kind in SHAPES}
    assert area["circle"] == pytest.approx(np.pi, rel=0.02) and area["square"] == pytest.approx(1.7**2, rel=0.02)
    assert area["bar"] == pytest.approx(1.4, rel=0.03) and area["triangle"] == pytest.approx(1.7**2 / 1.7, rel=0.02)


def absences(scene) -> list[bool]:
    """Per thing whether it is seen, then not at all, then seen again."""
    back = []
    for i in scene.ids[scene.ids > CROWD]:
        seen = np.flatnonzero((scene.masks == i).reshape(len(scene.masks), -1).any(1))
        back.append(bool((np.diff(seen) > 1).any()))
    return back


def test_things_hide_and_come_back(clips):
    """In both ways: behind another thing, and beyond the border."""
    gone = [s for s in clips if any(absences(s))]
    assert len(gone) >= 0.3 * len(clips), f"{len(gone)} of {len(clips)} clips"
    at_border = 0
    for scene in gone:
        i = scene.ids[scene.ids > CROWD][absences(scene).index(True)]
        mask = scene.masks == i
        border = np.concatenate([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1).any()
        at_border += int(border)
    assert 0.15 * len(gone) < at_border < 0.85 * len(gone), f"{at_border} of {len(gone)} left over the border"


def test_things_move_without_jumps(clips):
    for scene in clips:
        for i in scene.ids[scene.ids > CROWD]:
            mask = scene.masks == i
            whole = mask.reshape(12, -1).sum(1)
            at = np.array([np.argwhere(m).mean(0) if m.any() else [np.nan] * 2 for m in mask])
            step = np.linalg.norm(np.diff(at, axis=0), axis=1)[(whole[:-1] > 60) & (whole[1:] > 60)]
            assert not len(step) or step.max() < 0.35 * 64


# ---- sentences


def fits(sentence: str, scene) -> list[int]:
    """Indices of the things that a sentence describes, found from masks and pixels alone."""
    words = sentence.split()
    things = [k for k in range(len(scene.ids)) if scene.ids[k] > CROWD]
    masks = {k: scene.masks == scene.ids[k] for k in things}
    if words[-1] != "object":
        things = [k for k in things if CLASSES[scene.labels[k]] == words[-1]]
    if words[1] in COLOURS:
        palette = np.array([*COLOURS.values()], float)
        mean = {k: np.median(scene.image[masks[k]], 0) for k in things}
        light = {k: [np.abs(s * palette - mean[k]).sum(1).min() for s in np.linspace(0.75, 1.1, 15)] for k in things}
        shade = {k: np.linspace(0.75, 1.1, 15)[np.argmin(light[k])] for k in things}
        return [k for k in things if [*COLOURS][np.abs(shade[k] * palette - mean[k]).sum(1).argmin()] == words[1]]
    if len(words) == 2:
        return things
    key = {"leftmost": lambda k: -np.argwhere(masks[k])[:, 1].mean(), "largest": lambda k: masks[k].sum()}
    key["rightmost"] = lambda k: np.argwhere(masks[k])[:, 1].mean()
    return [max(things, key=key[words[1]])]


def test_sentences_name_one_thing():
    source, said, kinds = MovingShapes(150, 7, size=96, noise=0.0), 0, set()
    for i in range(150):
        scene = source.scene(0, i)
        for k, sentences in enumerate(scene.text):
            for number, sentence in sentences:
                assert number == scene.ids[k] and scene.ids[k] > CROWD
                assert fits(sentence, scene) == [k], f"scene {i}: {sentence!r}"
                said, kinds = said + 1, kinds | {sentence.split()[1]}
    assert said > 300 and {"leftmost", "rightmost", "largest"} <= kinds and set(COLOURS) <= kinds
    print(f"sentences that name exactly one thing: {said} of {said}")


# ---- items


@pytest.mark.parametrize("task", [*IMAGE_TASKS, *CLIP_TASKS])
def test_batches_of_every_task(task):
    source = CLIPS if task in CLIP_TASKS else PICTURES
    items = SegmentItems(source, task, View(64, 64), Prompts(number=3, least=16), seed=1)
    batch = SegmentCollate()([items[0, k] for k in range(4)])
    shape = (4, 12, 3, 64, 64) if task in CLIP_TASKS else (4, 3, 64, 64)
    assert batch["task"] == task and batch["image"].shape == shape and batch["valid"].all()
    assert torch.equal(batch["image"][2], torch.from_numpy(source.scene(0, 2).image).movedim(-1, -3))
    for masks, labels in zip(batch["masks"], batch["labels"], strict=True):
        assert len(masks) == len(labels) and masks.flatten(1).any(1).all()


def test_bad_arguments():
    for bad in ({"size": 8}, {"most": 1}, {"crowds": 2.0}, {"frames": -1}):
        with pytest.raises(ValueError, match="MovingShapes"):
            MovingShapes(4, 0, **bad)
