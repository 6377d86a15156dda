"""models/instance_merge.py: suppression, merging, both memories, transfer to vertices, against plain recomputation."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import instance_merge as im

E, D, C = 5, 4, 3


def frame(rng, n: int, points: int = 60, labels=None, spread: float = 1.0, vectors=None, boxes=None, xyz=None):
    """Random instances; vectors are unit and positive, so that boxes and labels decide unless given."""
    t = torch.as_tensor
    low = rng.uniform(0, spread, (n, 3))
    boxes = np.concatenate((low, low + rng.uniform(0.2, 1, (n, 3))), 1) if boxes is None else boxes
    vectors = rng.uniform(0, 1, (n, E)) if vectors is None else np.asarray(vectors, float).reshape(n, -1)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return im.FrameInstances(
        masks=t(rng.random((n, points)) < 0.3),
        labels=t(rng.integers(0, 2, n) if labels is None else np.array(labels, np.int64)),
        scores=t(rng.random(n)).float(),
        vectors=t(vectors).float(),
        boxes=t(np.asarray(boxes)).float().reshape(n, 6),
        queries=t(rng.standard_normal((n, D))).float(),
        logits=t(rng.standard_normal((n, C))).float(),
        points=t(rng.uniform(0, 3, (points, 3)) if xyz is None else xyz).float(),
    )


def random_frames(seed: int, frames: int = 6) -> list:
    rng = np.random.default_rng(seed)
    return [frame(rng, int(rng.integers(0, 5)), points=int(rng.integers(20, 70))) for _ in range(frames)]


# ---- suppression, boxes


@pytest.mark.parametrize("kernel", ["linear", "gaussian"])
def test_matrix_nms_is_the_formula(kernel):
    rng = np.random.default_rng(0)
    masks, labels, scores = rng.random((7, 30)) ** 3, rng.integers(0, 2, 7), rng.random(7)
    order = np.argsort(-scores)

    def iou(i, j):
        common = (masks[i] * masks[j]).sum()
        return common / (masks[i].sum() + masks[j].sum() - common) * (labels[i] == labels[j])

    want = {}
    for b, j in enumerate(order):
        factors = [1.0]
        for a, i in enumerate(order[:b]):
            worst = max((iou(i, k) for k in order[:a]), default=0.0)
            x = iou(i, j)
            factors.append((1 - x) / (1 - worst) if kernel == "linear" else np.exp(-2 * (x**2 - worst**2)))
        want[j] = scores[j] * min(factors)
    got, keep = im.matrix_nms(*(torch.as_tensor(x) for x in (masks, labels, scores)), kernel=kernel)
    assert keep.tolist() == sorted(want, key=lambda k: -want[k])
    assert got.tolist() == pytest.approx([want[k] for k in keep.tolist()], abs=1e-6)


def test_matrix_nms_of_duplicates_empty_masks_and_nothing():
    masks = torch.zeros(5, 10)
    masks[:3, :4], masks[3, 6:] = 1, 1  # three times the same, another one, an empty one
    got, keep = im.matrix_nms(masks, torch.zeros(5, dtype=torch.int64), torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]))
    assert torch.isfinite(got).all()
    assert dict(zip(keep.tolist(), got.tolist(), strict=True)) == pytest.approx({0: 0.9, 1: 0, 2: 0, 3: 0.6, 4: 0.5})
    got, keep = im.matrix_nms(masks[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert got.shape == keep.shape == (0,)
    with pytest.raises(ValueError, match="kernel box"):
        im.matrix_nms(masks, masks[:, 0], masks[:, 0], kernel="box")


def test_boxes():
    corners = im.box_corners(torch.tensor([[1.0, 2, 3]]), torch.tensor([[0.5, 0, -1, 1, 2, 4]]))
    assert corners.tolist() == [[1, 1, 0, 2, 3, 4]]
    a = torch.tensor([[0.0, 0, 0, 2, 2, 2], [5, 5, 5, 6, 6, 6]])
    b = torch.tensor([[1.0, 0, 0, 3, 2, 2], [2, 2, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(im.box_iou3d(a[:, None], b), torch.tensor([[4 / 12, 0, 0], [0, 0, 0]]))


# ---- merging


class Plain:
    """Merging with lists and the best of all assignments."""

    def __init__(self):
        self.objects, self.points = [], 0

    def similarity(self, o: dict, f, k: int) -> float:
        iou = im.box_iou3d(torch.as_tensor(o["boxes"]).float(), f.boxes[k]).item()
        return max(0.0, float(o["vectors"] @ f.vectors[k].numpy())) * iou * (o["label"] == int(f.labels[k]))

    def push(self, f) -> list[int]:
        n, known = len(f.labels), len(self.objects)
        S = np.array([[self.similarity(o, f, k) for k in range(n)] for o in self.objects]).reshape(known, n)
        best, pairs = -1.0, []
        for rows in itertools.permutations(range(-n, known), n) if n else ():
            chosen = [(i, k) for k, i in enumerate(rows) if i >= 0 and S[i, k] > 0]
            total = sum(S[i, k] for i, k in chosen)
            if total > best:
                best, pairs = total, chosen
        row = {k: i for i, k in pairs}
        for k in range(n):
            values = {m: getattr(f, m)[k].numpy().astype(np.float64) for m in im.MEANS}
            where = set((self.points + np.flatnonzero(f.masks[k].numpy())).tolist())
            if k in row:
                o = self.objects[row[k]]
                for m, v in values.items():
                    o[m] = (o["n"] * o[m] + v) / (o["n"] + 1)
                o["n"] += 1
                o["points"] |= where
            else:
                self.objects.append({**values, "n": 1, "label": int(f.labels[k]), "points": where})
                row[k] = len(self.objects) - 1
        self.points += f.masks.shape[1]
        return [row[k] for k in range(n)]


@pytest.mark.parametrize("seed", range(4))
def test_online_merging_is_the_rule(seed):
    """Frames of different sizes, some without instances; ids count up in the order of appearance."""
    merge, plain = im.OnlineMerge(), Plain()
    for f in random_frames(seed, 5):
        assert merge.push(f).tolist() == plain.push(f)
    got = merge.result()
    assert got.objects.ids.tolist() == list(range(len(plain.objects)))
    assert got.objects.counts.tolist() == [o["n"] for o in plain.objects] and max(got.objects.counts) > 1
    assert got.masks.shape[1] == plain.points
    for k, o in enumerate(plain.objects):
        assert set(np.flatnonzero(got.masks[k]).tolist()) == o["points"]
        for m in im.MEANS:
            assert getattr(got.objects, m)[k].numpy() == pytest.approx(o[m], abs=1e-5)


def test_what_keeps_instances_apart():
    rng, box = np.random.default_rng(0), [[0, 0, 0, 1, 1, 1]]
    first = frame(rng, 1, labels=[0], vectors=np.ones(E), boxes=box)
    for label, vector, corners, same in (
        (0, np.ones(E), box, True),
        (1, np.ones(E), box, False),
        (0, -np.ones(E), box, False),
        (0, np.ones(E), [[2, 2, 2, 3, 3, 3]], False),
    ):
        merge = im.OnlineMerge()
        merge.push(first)
        got = merge.push(frame(rng, 1, labels=[label], vectors=vector, boxes=corners))
        assert got.tolist() == [0 if same else 1]


def test_input_is_left_alone_and_scenes_do_not_mix():
    frames = random_frames(3)
    before = [f.scores.clone() for f in frames]
    runs = []
    for _ in range(2):
        merge = im.OnlineMerge()
        runs.append([merge.push(f).tolist() for f in frames])
    assert runs[0] == runs[1] and all((f.scores == b).all() for f, b in zip(frames, before, strict=True))


def test_top_reports_the_best_and_keeps_the_others():
    frames = random_frames(5)
    every, few = im.OnlineMerge(), im.OnlineMerge(top=2)
    for f in frames:
        assert every.push(f).tolist() == few.push(f).tolist()
    want = every.result()
    best = want.objects.scores.topk(2).indices
    got = few.result()
    assert got.objects.ids.tolist() == want.objects.ids[best].tolist() and len(want.objects) > 2
    assert (got.masks == want.masks[best.numpy()]).all()


def test_concat_and_geometric_modes():
    """Two boxes of points seen twice, the second time from points 2 cm away; another box is new."""
    rng = np.random.default_rng(1)
    spots = [rng.uniform(0, 0.3, (40, 3)) + k for k in range(3)]
    xyz = [np.concatenate(spots[:2]), np.concatenate((spots[1] + 0.02, spots[2], spots[0] + 0.02))]
    frames = []
    for k, points in enumerate(xyz):
        f = frame(rng, 2 + k, points=len(points), labels=[0] * (2 + k), spread=90, xyz=points)
        f.masks[:] = torch.arange(len(points)) // 40 == torch.arange(2 + k)[:, None]
        frames.append(f)
    results = {}
    for mode in im.MODES:
        merge = im.OnlineMerge(mode)
        results[mode] = [merge.push(f).tolist() for f in frames]
    assert results["concat"] == [[0, 1], [2, 3, 4]] and results["geometric"] == [[0, 1], [1, 2, 0]]
    frames[1].labels[:] = 1
    merge = im.OnlineMerge("geometric")
    assert [merge.push(f).tolist() for f in frames] == [[0, 1], [2, 3, 4]]


def test_near_is_a_share_of_either_side():
    line = np.stack([np.arange(100) * 0.2, np.zeros(100), np.zeros(100)], 1)

    def near(points, others):
        shape = im.Shape()
        shape.add(points)
        return shape.near(others, np.stack((others.min(0), others.max(0))))

    def some(n):
        return np.concatenate((line[:1] + [0, 0.04, 0], line[: n - 1] + [0, 0, 9]))

    assert not near(line, some(20)) and not near(some(20), line)  # 1 of 100, 1 of 20
    assert not near(line, some(10)) and not near(some(10), line)  # a tenth is not more than a tenth
    assert near(line, some(9)) and near(some(9), line)
    assert not near(line, line + [0, 0.06, 0]) and not near(line[:9], line[50:])
    for step in np.eye(3):
        for way in (-1, 1):
            assert near(line[:1], line[:1] + 0.049 * way * step) and not near(line[:1], line[:1] + 0.051 * way * step)


def test_a_shape_keeps_the_first_point_of_each_cell():
    rng, shape, first = np.random.default_rng(8), im.Shape(), {}
    for n in (30, 0, 200, 200):
        points = rng.uniform(-0.1, 0.1, (n, 3)).astype(np.float32)
        shape.add(points)
        for p in points:
            first.setdefault(tuple(np.floor(p / im.GRAIN).tolist()), p)
        assert shape.keys.tolist() == sorted(set(shape.keys.tolist())) and len(shape.keys) == len(first)
        assert (shape.points == np.array([first[c] for c in sorted(first)])).all()
    assert (shape.box == (shape.points.min(0), shape.points.max(0))).all()


@pytest.mark.parametrize("seed", range(3))
def test_geometric_merging_is_the_rule(seed):
    """Blobs of two labels, some empty, against all distances; objects keep the first point of each 2 cm cell."""
    rng, merge, known, merged = np.random.default_rng(seed), im.OnlineMerge("geometric"), [], 0
    for _ in range(8):
        xyz = np.repeat(rng.uniform(-0.5, 0.5, (6, 3)), 40, 0) + rng.uniform(0.02, 0.1) * rng.standard_normal((240, 3))
        f = frame(rng, 6, points=240, xyz=xyz)
        f.masks[:] = torch.arange(240) // 40 == torch.arange(6)[:, None]
        f.masks[0] &= bool(rng.integers(0, 2))
        f.masks[1], f.labels[1] = f.masks[2], f.labels[2]  # only one of them gets the object
        ids, taken = [], set()
        for mask, label in zip(f.masks.numpy(), f.labels.tolist(), strict=True):
            own, found = f.points.numpy()[mask], None
            for i, (kind, points) in enumerate(known[: len(known) if len(own) else 0]):
                if kind == label and len(points) and i not in taken and found is None:
                    close = (
                        np.linalg.norm(np.array(list(points.values()))[:, None].astype(float) - own, axis=2) < im.NEAR
                    )
                    found = i if max(close.any(0).mean(), close.any(1).mean()) > im.SHARE else None
            taken.add(found)
            ids.append((found, own, label))
        want = []
        for found, own, label in ids:
            merged += found is not None
            want.append(len(known) if found is None else found)
            if found is None:
                known.append((label, {}))
            for p in own:
                known[want[-1]][1].setdefault(tuple(np.floor(p / im.GRAIN).tolist()), p)
        assert merge.push(f).tolist() == want
    assert merged >= 5 and len(known) > 12


def test_shapes_are_forgotten_with_their_objects():
    rng = np.random.default_rng(9)
    merge = im.OnlineMerge("geometric", memory=im.VoxelVotes(0.1), max_objects=8)
    for k in range(6):
        merge.push(frame(rng, 3, points=200, xyz=rng.uniform(0, 0.3, (200, 3)) + 5 * k))
        assert sorted(merge.shapes) == merge.objects.ids.tolist() and len(merge.shapes) <= 8
    assert merge.next_id > 8 and merge.nbytes() > sum(s.points.nbytes + s.keys.nbytes for s in merge.shapes.values())


# ---- memory


def test_voxels_vote_as_counted_one_by_one():
    rng, voxel = np.random.default_rng(2), 0.5
    memory = im.VoxelVotes(voxel, slots=8)
    votes, bare, ids = {}, Counter(), np.arange(4)
    for _ in range(6):
        points = rng.uniform(-2, 1, (80, 3))
        masks = rng.random((4, 80)) < 0.15
        memory.add(masks, ids, points)
        cells = [tuple(c) for c in np.floor(points / voxel).astype(int).tolist()]
        for c in set(cells):
            seen = {i for i in range(4) for p in range(80) if masks[i, p] and cells[p] == c}
            votes.setdefault(c, Counter()).update(seen)
            bare[c] += not seen
    centres = memory.points()
    assert (centres.astype(np.float64) == (np.array(sorted(votes)) + 0.5) * voxel).all()  # sorted by x, y, z
    for won, c in zip(memory.winners(), sorted(votes), strict=True):
        most = max(votes[c].values(), default=0)
        if most and most >= bare[c]:
            assert votes[c][won] == most
        else:
            assert won == -1
    assert (memory.masks(ids) == (memory.winners() == ids[:, None])).all()


def test_a_full_voxel_lets_a_persistent_object_in():
    memory, point = im.VoxelVotes(0.1, slots=2), np.array([[0.05, 0.05, 0.05]])
    for i in (7, 7, 8, 9, 9, 9, 9):
        memory.add(np.ones((1, 1), bool), np.array([i]), point)
    assert memory.winners().tolist() == [9] and memory.ids.shape == (1, 2)


def test_memory_is_flat_once_the_room_was_seen():
    """The same walk four times, with instances that never match: voxels stop growing, objects are forgotten."""
    rng = np.random.default_rng(4)
    room = [rng.uniform(0, 2, (200, 3)) for _ in range(5)]
    merge = im.OnlineMerge("concat", memory=im.VoxelVotes(0.1), max_objects=20)
    exact, sizes = im.OnlineMerge("concat"), []
    for _ in range(4):
        for xyz in room:
            f = frame(rng, 4, points=200, xyz=xyz)
            merge.push(f)
            exact.push(f)
            assert len(merge.objects) <= 20
        sizes.append((merge.memory.nbytes(), exact.nbytes()))
    assert sizes[0][0] == sizes[3][0] and sizes[3][1] > 3 * sizes[0][1]
    got = merge.result()
    assert got.masks.any(1).all() and got.masks.shape == (len(got.objects), len(got.points))
    assert len(set(merge.memory.winners().tolist()) - {-1}) <= 20
    assert merge.next_id == 80  # a forgotten id is not given again


def test_both_memories_agree_where_every_voxel_has_one_point():
    rng, n = np.random.default_rng(6), 50
    cells = rng.permutation(4**3 * 8)[: 4 * n].reshape(4, n)
    exact, votes = im.OnlineMerge(), im.OnlineMerge(memory=im.VoxelVotes(0.1))
    every = []
    for k in range(4):
        xyz = (np.stack(np.unravel_index(cells[k], (8, 8, 8)), 1) + 0.5) * 0.1
        f = frame(rng, 3, points=n, xyz=xyz)
        f.masks[:] = torch.as_tensor(rng.integers(0, 4, n)) == torch.arange(3)[:, None]  # disjoint
        assert exact.push(f).tolist() == votes.push(f).tolist()
        every.append(xyz)
    a, b = exact.result(), votes.result()
    order = votes.memory.keys_of(np.concatenate(every)).argsort()
    assert a.objects.ids.tolist() == b.objects.ids.tolist() and (a.masks[:, order] == b.masks).all()


# ---- to a reconstruction


def test_to_vertices_by_the_nearest_point_and_by_segments():
    rng = np.random.default_rng(7)
    points, vertices = rng.random((30, 3)), rng.random((60, 3))
    masks, semantic, segments = rng.random((3, 30)) < 0.5, rng.integers(0, 3, 30), rng.integers(0, 9, 60) * 11
    at = ((vertices[:, None] - points) ** 2).sum(-1).argmin(1)
    got, classes = im.to_vertices(masks, points, vertices, semantic)
    assert (got == masks[:, at]).all() and (classes == semantic[at]).all()
    got, classes = im.to_vertices(masks, points, vertices, semantic, segments)
    for s in np.unique(segments):
        inside = segments == s
        for m, own in zip(masks, got, strict=True):
            assert set(own[inside]) == {m[at][inside].mean() > 0.5}
        assert set(classes[inside]) == {np.bincount(semantic[at][inside]).argmax()}
    assert im.to_vertices(masks[:0], points, vertices, None, segments)[0].shape == (0, 60)


# ---- misuse


def test_misuse_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="mode fuse"):
        im.OnlineMerge("fuse")
    with pytest.raises(ValueError, match="VoxelVotes"):
        im.OnlineMerge(max_objects=5)
    with pytest.raises(ValueError, match="no frame"):
        im.OnlineMerge().result()
    with pytest.raises(ValueError, match="at least 1"):
        im.VoxelVotes(0.02, 0)
    with pytest.raises(ValueError, match="1311 m|not finite"):
        im.VoxelVotes(0.02).keys_of(np.array([[0, 0, 1400.0]]))
    with pytest.raises(ValueError, match="not finite"):
        im.VoxelVotes(0.02).keys_of(np.array([[0, np.nan, 0]]))
    with pytest.raises(ValueError, match="no points"):
        im.to_vertices(np.zeros((0, 0), bool), np.zeros((0, 3)), np.zeros((4, 3)))
    for change, says in (
        ({"scores": torch.rand(3)}, "expected n each"),
        ({"masks": torch.rand(2, 60)}, "bool"),
        ({"vectors": torch.full((2, E), torch.nan)}, "vectors"),
        ({"points": torch.rand(5, 3)}, "points"),
    ):
        f = frame(rng, 2)
        for name, value in change.items():
            setattr(f, name, value)
        with pytest.raises(ValueError, match=says):
            im.OnlineMerge().push(f)
    f = frame(rng, 2)
    f.points = None
    for merge in (im.OnlineMerge("geometric"), im.OnlineMerge(memory=im.VoxelVotes())):
        with pytest.raises(ValueError, match="need them"):
            merge.push(f)


def test_voted_merging_does_not_ask_for_the_label():
    rng = np.random.default_rng(0)
    one = frame(rng, 3, points=60, labels=[0, 0, 1], spread=1)
    other = replace(one, labels=torch.tensor([1, 0, 1]))
    published, voted = im.OnlineMerge("online"), im.OnlineMerge("voted")
    assert [m.push(one).tolist() for m in (published, voted)] == [[0, 1, 2]] * 2
    assert voted.push(other).tolist() == [0, 1, 2]
    assert published.push(other).tolist() != [0, 1, 2]
