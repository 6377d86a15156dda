"""models/scene_segmenter.py: instances of frames by hand, scenes of rendered rooms with a network that is always right,
and the small real network, whose memory must go from frame to frame."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.esam_views import points_view
from data.rgbd_frames import Frame, FramePoints, frame_points
from data.rooms import Room
from models.esam import ESAM, ESAMConfig
from models.res16unet import Res16UNetConfig
from models.scene_segmenter import Filters, SceneSegmenter, frame_instances
from utils.posed_views import View

CLASSES = ("wall", "floor", "red", "green", "blue")
KINDS, STUFF, LAP, WIDTH = 3, 2, 12, 16
ROOM = Room(3, 0, (60, 80), objects=(4, 6), colour_noise=0, lap=LAP)


def view_of(superpoint: torch.Tensor, coords: torch.Tensor | None = None) -> View:
    P = len(superpoint)
    coords = torch.arange(3.0 * P).reshape(P, 3) if coords is None else coords
    return View(coords, torch.full((P, 3), 0.5), superpoint)


def output(cls, masks, level="P", boxes=None, centres=None, vectors=None) -> SimpleNamespace:
    """One item; cls (Q, K + 1) probabilities, masks logits."""
    Q = len(cls)
    stage = SimpleNamespace(cls=[cls.log()], masks=[masks], boxes=boxes, level=level)
    sem = torch.arange(Q * 4.0).reshape(Q, 4)
    return SimpleNamespace(stages=[stage], sem=[sem], queries=[torch.arange(Q * 2.0).reshape(Q, 2)], vectors=vectors,
                           centres=[torch.zeros(Q, 3) if centres is None else centres])  # fmt: skip


# ---- one frame, by hand


def test_scores_masks_and_what_belongs_to_them():
    cls = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.05, 0.05, 0.9]])  # the last column: no object
    masks = torch.full((3, 10), -4.0)
    masks[0, :4], masks[1, 4:9], masks[2, 9:] = 2.0, 1.0, 3.0
    out = output(cls, masks, vectors=[torch.eye(3)])
    found = frame_instances(out, 0, view_of(torch.zeros(10, dtype=torch.int64)), Filters(20, 0.3, 3))
    mean = torch.tensor([1.0, 2.0]).sigmoid()  # mean probability inside the mask
    torch.testing.assert_close(found.scores, torch.tensor([0.8, 0.6]) * mean)
    assert found.labels.tolist() == [0, 1] and found.masks.sum(1).tolist() == [5, 4]
    assert found.masks[0, 4:9].all() and found.queries.tolist() == [[2, 3], [0, 1]]
    assert found.vectors.tolist() == [[0, 1, 0], [1, 0, 0]] and found.logits.tolist() == [[4, 5, 6], [0, 1, 2]]
    assert found.boxes.tolist() == [[12, 13, 14, 24, 25, 26], [0, 1, 2, 9, 10, 11]]  # of the masks' points


@pytest.mark.parametrize(("filters", "left"), [
    (Filters(20, 0.3, 3), 2), (Filters(20, 0.3, 4), 1), (Filters(20, 0.3, 5), 0), (Filters(20, 0.6, 3), 0),
    (Filters(20, 0.55, 3), 1), (Filters(1, 0.3, 3), 1), (Filters(20, 0.0, 0), 4), (Filters(20, 0.3, 3, 0.8), 1),
])  # fmt: skip
def test_every_filter_filters(filters, left):
    cls = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]])
    masks = torch.full((2, 10), -4.0)
    masks[0, :4], masks[1, 4:9] = 2.0, 1.0
    assert len(frame_instances(output(cls, masks), 0, view_of(torch.zeros(10).long()), filters).labels) == left


def test_masks_over_superpoints_are_those_of_their_points():
    superpoint = torch.tensor([0, 0, 1, 1, 1, 2])
    logits = torch.tensor([[3.0, -3.0, -3.0], [-3.0, 3.0, 3.0]])
    cls = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    filters = Filters(20, 0.3, 1)
    a = frame_instances(output(cls, logits, "SP"), 0, view_of(superpoint), filters)
    b = frame_instances(output(cls, logits[:, superpoint]), 0, view_of(superpoint), filters)
    assert a.masks.tolist() == [[True, True, False, False, False, False], [False, False, True, True, True, True]]
    assert torch.equal(a.masks, b.masks) and torch.equal(a.scores, b.scores)


def test_a_repeated_mask_goes_within_its_class_only():
    masks = torch.full((2, 10), 4.0)
    masks[:, 5:] = -4
    view, filters = view_of(torch.zeros(10).long()), Filters(2, 0.3, 1)
    same = torch.tensor([[0.9, 0.02, 0.08], [0.8, 0.1, 0.1]])
    apart = torch.tensor([[0.9, 0.02, 0.08], [0.1, 0.8, 0.1]])
    assert len(frame_instances(output(same, masks), 0, view, filters).labels) == 1
    assert len(frame_instances(output(apart, masks), 0, view, filters).labels) == 2
    merged = frame_instances(output(apart, masks), 0, view, replace(filters, agnostic=True))
    assert merged.labels.tolist() == [0]


def test_jointly_a_query_is_one_instance_of_its_likeliest_class():
    masks = torch.full((2, 10), 4.0)
    masks[:, 5:] = -4
    torn = torch.tensor([[0.5, 0.45, 0.05], [0.3, 0.4, 0.3]])
    view, filters = view_of(torch.zeros(10).long()), Filters(4, 0.6, 1)
    found = frame_instances(output(torn, masks), 0, view, replace(filters, joint=True))
    assert found.labels.tolist() == [0] and found.scores[0] > 0.9  # of both classes together; one mask, one instance
    assert not len(frame_instances(output(torn, masks), 0, view, filters).labels)


class Wavering(torch.nn.Module):
    """The oracle, but in every second frame objects have the next class, less surely."""

    def __init__(self):
        super().__init__()
        self.oracle = Oracle("mv")
        self.cfg = SimpleNamespace(stage="mv", agnostic=False, n_stuff=STUFF)
        self.eval()

    def step(self, views, state):
        out, state = self.oracle.step(views, state)
        if state.frame % 2 == 0:
            out.stages[0].cls[0][:, :KINDS] = out.stages[0].cls[0][:, :KINDS].roll(1, 1)
            out.sem[0][:, STUFF : STUFF + KINDS] = out.sem[0][:, STUFF : STUFF + KINDS].roll(1, 1) / 2
        return out, state


def test_voting_heals_objects_that_change_their_class():
    voted, published = SceneSegmenter(Wavering(), "voted", FILTERS), SceneSegmenter(Wavering(), "online", FILTERS)
    steady = SceneSegmenter(Oracle("mv"), "online", FILTERS)
    for segmenter in (voted, published, steady):
        pushed(segmenter)
    right, own, twice = steady.result(), voted.result(), published.result()
    assert len(own.masks) == len(right.masks) < len(twice.masks)
    named = [
        dict(zip(map(tuple, x.objects.boxes.round(decimals=2).tolist()), x.objects.labels.tolist(), strict=True))
        for x in (right, own)
    ]
    assert named[0] == named[1]


def test_predicted_boxes_follow_the_points_into_the_world():
    boxes, centres = [torch.tensor([[1.0, 0, 0, 2, 4, 6]])], torch.tensor([[10.0, 20, 30]])
    out = output(torch.tensor([[0.9, 0.1]]), torch.full((1, 10), 4.0), boxes=boxes, centres=centres)
    view = view_of(torch.zeros(10).long())
    found = frame_instances(out, 0, view, Filters(1, 0.3, 1), view.coords + torch.tensor([0, 0, 5.0]))
    torch.testing.assert_close(found.boxes, torch.tensor([[10.0, 18, 32, 12, 22, 38]]))


def test_all_superpoints_must_ask():
    view = replace(view_of(torch.zeros(10).long()), queries=torch.tensor([0]))
    with pytest.raises(ValueError, match="expected queries None"):
        frame_instances(output(torch.tensor([[0.9, 0.1]]), torch.ones(1, 10)), 0, view, Filters())


def test_filters_are_checked():
    for bad in ({"topk": 0}, {"min_points": -1}, {"score_threshold": 1}, {"mask_threshold": 0}):
        with pytest.raises(ValueError, match="expected topk"):
            Filters(**bad)
    assert Filters.of("sv", True) == Filters(100, 0.0, agnostic=True) and Filters.of("mv", True).score_threshold == 0.25


# ---- scenes, by a network that reads the answer from the colours


class Oracle(torch.nn.Module):
    """Every superpoint of the room has the colour of its object: k -> (k + 1) / 100 in red; 0: stuff."""

    def __init__(self, stage: str):
        super().__init__()
        self.cfg, self.calls = SimpleNamespace(stage=stage, agnostic=False), []
        self.eval()

    def step(self, views, state):
        view, self.calls = views[0], [*self.calls, state]
        S = int(view.superpoint.max()) + 1
        own = torch.stack([view.superpoint == s for s in range(S)])  # (S, P)
        k = torch.tensor([round(100 * float(view.colour[m, 0].mean())) - 1 for m in own])
        cls, sem = torch.full((S, KINDS + 1), -8.0), torch.full((S, len(CLASSES) + 1), -8.0)
        rows = torch.arange(S)
        cls[rows, torch.where(k > 0, (k - 1) % KINDS, KINDS)] = 8.0
        sem[rows, torch.where(k > 0, STUFF + (k - 1) % KINDS, 0)] = 8.0
        mv = self.cfg.stage == "mv"
        centres = torch.stack([view.coords[m].mean(0) for m in own])
        whole = BOXES[k.clamp_min(0)]
        boxes = torch.cat(((whole[:, :3] + whole[:, 3:]) / 2 - centres, whole[:, 3:] - whole[:, :3]), 1)
        stage = SimpleNamespace(cls=[cls], masks=[16.0 * own - 8], level="P", boxes=[boxes] if mv else None)
        vectors = [F.one_hot(k.clamp_min(0), WIDTH).float()] if mv else None
        out = SimpleNamespace(stages=[stage], sem=[sem], queries=[sem], vectors=vectors, centres=[centres])
        return out, SimpleNamespace(memory=None, frame=len(self.calls))


def frame_cloud(k: int) -> tuple[Frame, FramePoints]:
    """Frame k of the room, its objects as superpoints and painted for the oracle."""
    frame = ROOM[k]
    ids = np.unique(frame.instance, return_inverse=True)[1].reshape(frame.instance.shape)
    colour = np.repeat(((frame.instance + 1) * 2.55)[..., None], 3, -1)
    points = frame_points(replace(frame, segment=ids))
    points.colour = (colour.reshape(-1, 3)[frame.depth.reshape(-1) > 0] / 255).astype(np.float32)
    return frame, points


CLOUDS = [frame_cloud(k)[1] for k in range(LAP)]
XYZ, OWN = np.concatenate([c.xyz for c in CLOUDS]), np.concatenate([c.instance for c in CLOUDS])
BOXES = torch.stack([  # (objects + 1, 6) of what all frames see, row 0: stuff
    torch.from_numpy(np.r_[XYZ[OWN == i].min(0), XYZ[OWN == i].max(0)]) for i in range(OWN.max() + 1)
])  # fmt: skip
FILTERS = Filters(20, 0.3, 10)


def pushed(segmenter: SceneSegmenter, frames=range(LAP)) -> list:
    centred = segmenter.model.cfg.stage == "sv"
    out = []
    for k in frames:
        points = CLOUDS[k % LAP]
        view = points_view(points.centred() if centred else points)
        out.append(segmenter.push(view, torch.from_numpy(points.xyz)))
    return out


def best_iou(found, points: np.ndarray, own: np.ndarray) -> dict[int, float]:
    """Best IoU of the found masks with each object of at least 200 labelled points."""
    at = found.masks
    sizes = {i: (own == i).sum() for i in np.unique(own[own > 0])}
    return {i: max((m & (own == i)).sum() / (m | (own == i)).sum() for m in at) for i, n in sizes.items() if n >= 200}


@pytest.mark.parametrize("stage", ["mv", "sv"])
@pytest.mark.parametrize("voxel", [0.02, None])
def test_a_room_becomes_its_objects(stage, voxel):
    segmenter = SceneSegmenter(Oracle(stage), filters=FILTERS, voxel=voxel)
    frames = pushed(segmenter)
    assert frames[0].new_ids == list(range(len(frames[0].ids)))
    found = segmenter.result(vertices=None if voxel is None else XYZ)
    assert len(found.points) == len(XYZ)
    iou = best_iou(found, XYZ, OWN)
    assert len(iou) >= 4 and min(iou.values()) > 0.9, iou
    large = [m.sum() for m in found.masks if m.sum() >= 200]
    assert len(large) == len(iou), "an object was found twice"
    for m, label in zip(found.masks, found.objects.labels.tolist(), strict=True):
        i = np.bincount(OWN[m]).argmax()
        assert label == (i - 1) % KINDS
    assert (found.semantic == np.where(OWN > 0, STUFF + (OWN - 1) % KINDS, 0)).mean() > 0.98
    for m, box in zip(found.masks, found.objects.boxes.numpy(), strict=True):
        if stage == "sv" and voxel is None:  # boxes of stage sv are those of all points
            assert np.allclose(box, np.r_[XYZ[m].min(0), XYZ[m].max(0)])
        assert (np.abs((box[:3] + box[3:]) / 2 - XYZ[m].mean(0)) < 0.6).all(), "a box is elsewhere than its points"


def test_a_further_lap_adds_nothing_and_memory_stays():
    segmenter = SceneSegmenter(Oracle("mv"), filters=FILTERS)
    pushed(segmenter)
    size, voxels = segmenter.nbytes(), len(segmenter.result().points)
    again = pushed(segmenter, range(LAP, 3 * LAP))
    assert not any(f.new_ids for f in again)
    assert segmenter.nbytes() == size and len(segmenter.result().points) == voxels
    exact = SceneSegmenter(Oracle("mv"), filters=FILTERS, voxel=None)
    pushed(exact)
    once = exact.nbytes()
    pushed(exact)
    assert exact.nbytes() > 1.9 * once, "every point was to be kept"


def test_objects_keep_their_ids_from_frame_to_frame():
    frames = pushed(SceneSegmenter(Oracle("mv"), filters=FILTERS))
    owner: dict[int, set] = {}
    for cloud, found in zip(CLOUDS, frames, strict=True):
        ids = found.point_ids().numpy()
        for i in found.ids.tolist():
            owner.setdefault(i, set()).add(int(np.bincount(cloud.instance[ids == i]).argmax()))
        assert set(np.unique(ids)) <= {-1, *found.ids.tolist()}
    assert all(len(x) == 1 for x in owner.values())
    assert [i for f in frames for i in f.new_ids] == sorted(owner)


def test_the_best_score_comes_first_and_owns_the_points():
    segmenter = SceneSegmenter(Oracle("mv"), filters=FILTERS, voxel=None)
    pushed(segmenter, range(4))
    found = segmenter.result()
    scores = found.objects.scores.numpy()
    assert (np.diff(scores) <= 0).all()
    found.masks[1] |= found.masks[0]
    own = found.point_ids()
    assert (own[found.masks[0]] == 0).all() and (own[~found.masks.any(0)] == -1).all()


def test_segments_belong_to_an_object_or_not():
    segmenter = SceneSegmenter(Oracle("mv"), filters=FILTERS)
    pushed(segmenter)
    segments = OWN * 2 + (XYZ[:, 2] > 0.5)
    found = segmenter.result(XYZ, segments)
    for s in np.unique(segments):
        rows = segments == s
        assert all(m[rows].all() or not m[rows].any() for m in found.masks)
        assert len(np.unique(found.semantic[rows])) == 1
    assert found.colour is None and min(best_iou(found, XYZ, OWN).values()) > 0.9


def test_new_scene_forgets_everything():
    segmenter = SceneSegmenter(Oracle("mv"), filters=FILTERS)
    first = pushed(segmenter, range(3))
    size = segmenter.nbytes()
    segmenter.new_scene()
    again = pushed(segmenter, range(3))
    assert [f.ids.tolist() for f in first] == [f.ids.tolist() for f in again] and segmenter.nbytes() == size
    states = [None if s is None else s.frame for s in segmenter.model.calls]
    assert states == [None, 1, 2, None, 4, 5], "the network's state does not go from frame to frame, or over scenes"


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="merge vectors"):
        SceneSegmenter(Oracle("sv"), merge="online")
    with pytest.raises(ValueError, match="training mode"):
        SceneSegmenter(Oracle("mv").train())
    segmenter = SceneSegmenter(Oracle("mv"))
    with pytest.raises(ValueError, match="no frame"):
        segmenter.result()
    view = points_view(CLOUDS[0])
    with pytest.raises(ValueError, match="expected"):
        segmenter.push(view, torch.zeros(3, 3))
    segmenter.model.step = lambda views, state: (output(torch.full((1, 4), torch.nan), torch.zeros(1, len(view))), None)
    with pytest.raises(ValueError, match="not finite"):
        segmenter.push(view)


# ---- the real network


def small(stage: str) -> ESAM:
    torch.manual_seed(0)
    backbone = Res16UNetConfig(stem=8, planes=(8,) * 8, layers=(1,) * 8, kernel_size=3)
    cfg = ESAMConfig(CLASSES, stage=stage, backbone=backbone, voxel=0.05, dim=16, heads=2, ffn=16, merge_hidden=16)
    return ESAM(cfg)


def test_the_networks_memory_goes_from_frame_to_frame():
    model = small("mv")
    for name, p in model.memory.named_parameters():
        if p.dim() > 1 or name.endswith("bn.weight"):
            torch.nn.init.normal_(p)  # as if it had learned
    model.eval()
    views = [points_view(c) for c in CLOUDS[:3]]
    with torch.no_grad():
        expected = model([views])
        alone = model([views[2:]])
    outs, step = [], model.step
    model.step = lambda *a: outs.append(step(*a)) or outs[-1]
    segmenter = SceneSegmenter(model, filters=Filters(10, 0.0, 10))
    for view in views:
        segmenter.push(view)
    for (got, _), want in zip(outs, expected, strict=True):
        torch.testing.assert_close(got.stages[-1].cls[0], want.stages[-1].cls[0], rtol=0, atol=1e-5)
    assert (outs[2][0].sem[0] - alone[0].sem[0]).abs().max() > 1e-4, "the memory changes nothing"
    assert not outs[2][0].sem[0].requires_grad


def test_a_single_view_does_not_depend_on_where_the_room_is():
    model = small("sv").eval()
    far = replace(CLOUDS[0], xyz=CLOUDS[0].xyz + np.float32(16), pose=CLOUDS[0].pose.copy())
    far.pose[:3, 3] += 16
    near = SceneSegmenter(model, filters=Filters(10, 0.0, 10))
    here = near.push(points_view(CLOUDS[0].centred()), torch.from_numpy(CLOUDS[0].xyz))
    near.new_scene()
    there = near.push(points_view(far.centred()), torch.from_numpy(far.xyz))
    assert here.labels.tolist() == there.labels.tolist()
    torch.testing.assert_close(here.boxes + 16, there.boxes, rtol=0, atol=1e-3)
