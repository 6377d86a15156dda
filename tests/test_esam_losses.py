"""ESAM's targets, matching and losses beside the reference cases: against loops, and where something is missing."""

from types import SimpleNamespace

import pytest
import torch

from models import esam_losses as el
from models.boxes3d import box_iou3d, corners
from models.superpoint_decoder import Stage
from utils.posed_views import View, ViewLabels

C, STUFF = 6, 2  # semantic classes
K = C - STUFF
LEVELS = ("SP", "P")


def scene(seed: int = 0, N: int = 80, S: int = 9, G: int = 4, asking: int | None = 7) -> tuple[View, ViewLabels]:
    """Superpoints of one object each, or of none."""
    g = torch.Generator().manual_seed(seed)
    superpoint = torch.cat([torch.arange(S), torch.randint(S, (N - S,), generator=g)])
    classes = torch.randint(STUFF, C, (G,), generator=g)
    owner = torch.cat([torch.arange(G), torch.randint(-1, G, (S,), generator=g)])[:S] if G else torch.full((S,), -1)
    instance = owner[superpoint]
    padded = torch.cat([classes, torch.tensor([C])])  # the last: of no object
    low = torch.rand(G, 3, generator=g)
    boxes = torch.cat([low, low + 0.5 + torch.rand(G, 3, generator=g)], 1)
    queries = None if asking is None else torch.randperm(S, generator=g)[:asking]
    xyz = torch.rand(N, 3, generator=g)
    return View(xyz, xyz, superpoint, queries), ViewLabels(instance, padded[instance], classes, boxes)


def answers(views: list[View], seed: int = 0, boxes: bool = True, vectors: bool = False) -> SimpleNamespace:
    """Random outputs that ask for gradients; leaves lists them."""
    g, leaves = torch.Generator().manual_seed(seed), []

    def leaf(*shape: int) -> torch.Tensor:
        leaves.append(torch.randn(*shape, generator=g).requires_grad_())
        return leaves[-1]

    sizes = [(len(v), int(v.superpoint.max()) + 1) for v in views]
    Q = [S if v.queries is None else len(v.queries) for v, (_, S) in zip(views, sizes, strict=True)]
    stages = []
    for level in LEVELS:
        masks = [leaf(q, N if level == "P" else S) for q, (N, S) in zip(Q, sizes, strict=True)]
        found = [torch.cat([leaf(q, 3), leaf(q, 3).exp()], 1) for q in Q] if boxes else None
        stages.append(Stage([leaf(q, K + 1) for q in Q], masks, found, level))
    return SimpleNamespace(
        stages=stages,
        sem=[leaf(q, C + 1) for q in Q],
        centres=[torch.rand(q, 3, generator=g) for q in Q],
        vectors=[torch.nn.functional.normalize(leaf(q, 8), dim=1) for q in Q] if vectors else None,
        leaves=leaves,
    )


def losses(views: list[View], labels: list[ViewLabels], out: SimpleNamespace, **options) -> dict[str, torch.Tensor]:
    criterion = el.ESAMCriterion(C, STUFF, **options)
    return criterion(out, [criterion.targets(v, own) for v, own in zip(views, labels, strict=True)])


# ---- targets


def test_majority_is_more_than_half():
    superpoint = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    ids = torch.tensor([4, 4, 1, 2, 3, -1, -1, 0, 0])
    assert el.majority(superpoint, ids, 5, -1).tolist() == [4, -1, -1, 0]
    order = torch.randperm(9)
    assert el.majority(superpoint[order], ids[order], 5, 7).tolist() == [4, 7, 7, 0]
    assert el.majority(superpoint, torch.full((9,), -1), 0, -1).tolist() == [-1] * 4


@pytest.mark.parametrize("asking", [None, 5])
def test_frame_targets_against_loops(asking):
    view, labels = scene(1, asking=asking)
    labels.instance[:30] = torch.randint(-1, 4, (30,))  # superpoints of several objects
    labels.semantic[:30] = torch.randint(0, C + 1, (30,))
    t = el.frame_targets(view, labels, C, STUFF)
    queries = range(9) if asking is None else view.queries.tolist()
    owners = []
    for s in range(9):
        own = labels.instance[view.superpoint == s].tolist()
        owners.append(next((g for g in range(4) if own.count(g) > len(own) / 2), -1))
    objects = sorted({owners[q] for q in queries} - {-1})
    assert el.query_instances(view, labels).tolist() == [owners[q] for q in queries]
    assert t.labels.tolist() == [int(labels.classes[g]) - STUFF for g in objects]
    assert t.superpoints.tolist() == [[owner == g for owner in owners] for g in objects]
    assert t.queries.tolist() == [[owners[q] == g for q in queries] for g in objects]
    assert t.points.tolist() == [[i == g for i in labels.instance.tolist()] for g in objects]
    torch.testing.assert_close(t.boxes[:, :3] - t.boxes[:, 3:] / 2, labels.boxes[objects, :3])
    torch.testing.assert_close(t.boxes[:, :3] + t.boxes[:, 3:] / 2, labels.boxes[objects, 3:])
    for row, q in enumerate(queries):
        own = labels.semantic[view.superpoint == q].tolist()
        assert int(t.semantic[row]) == next((c for c in range(C) if own.count(c) > len(own) / 2), C)
    agnostic = el.frame_targets(view, labels, C, STUFF, agnostic=True)
    assert agnostic.labels.tolist() == [0] * len(objects)


# ---- matching


def match(cost_masks: torch.Tensor, targets: torch.Tensor, admissible: torch.Tensor) -> list[int | None]:
    """The query of each object, by masks alone."""
    Q, G = len(cost_masks), len(targets)
    labels = torch.zeros(G, dtype=torch.int64)
    query, found = el.match_objects(torch.zeros(Q, 2), cost_masks, labels, targets, admissible)
    return [int(q) if f else None for q, f in zip(query, found, strict=True)]


def test_an_object_takes_its_cheapest_admissible_query():
    torch.manual_seed(0)
    Q, G, P = 9, 3, 50
    cls, masks, labels = torch.randn(Q, K + 1), torch.randn(Q, P), torch.tensor([2, 0, 2])
    targets, owner = torch.rand(G, P) > 0.5, torch.tensor([0, 0, 0, 1, 1, 1, 1, -1, -1])
    admissible = owner == torch.arange(G)[:, None]
    query, found = el.match_objects(cls, masks, labels, targets, admissible)
    assert found.tolist() == [True, True, False]  # nobody may answer for the last
    for g in range(2):
        cost = {}
        for q in admissible[g].nonzero()[:, 0].tolist():
            s, t = masks[q].sigmoid(), targets[g].float()
            bce = torch.nn.functional.binary_cross_entropy(s, t)
            cost[q] = float(bce + 1 - (2 * s @ t + 1) / (s.sum() + t.sum() + 1) - 0.5 * cls[q].softmax(0)[labels[g]])
        assert int(query[g]) == min(cost, key=cost.get)


def test_matching_at_the_edges():
    good, bad = torch.tensor([9.0, 9.0, -9.0]), torch.tensor([-9.0, -9.0, 9.0])
    target, yes = torch.tensor([[True, True, False]]), torch.ones(1, 2, dtype=torch.bool)
    assert match(torch.stack([bad, good]), target, yes) == [1]
    assert match(torch.stack([good, good]), target, yes) == [None]  # two are equally cheap
    assert match(good[None], target, yes[:, :1]) == [0]  # one query
    assert match(bad[None], target, yes[:, :1]) == [0]
    assert match(good[None], target, ~yes[:, :1]) == [None]
    assert match(good[None], target[:0], yes[:0, :1]) == []


# ---- losses of one frame


def test_box_iou():
    a = torch.tensor([[0.0, 0, 0, 2, 2, 2]])
    for other, iou in (([0.0, 0, 0, 2, 2, 2], 1), ([5.0, 0, 0, 2, 2, 2], 0), ([1.0, 0, 0, 2, 2, 2], 1 / 3),
                       ([0.0, 0, 0, 1, 1, 1], 1 / 8), ([2.0, 0, 0, 2, 2, 2], 0)):  # fmt: skip
        assert float(box_iou3d(corners(a), corners(torch.tensor([other])))) == pytest.approx(iou)


def test_right_answers_cost_nothing():
    (view, labels), criterion = scene(asking=None), el.ESAMCriterion(C, STUFF)
    out, t = answers([view]), criterion.targets(view, labels)
    of_query = [int(t.queries[:, q].int().argmax()) if t.queries[:, q].any() else None for q in range(9)]
    for stage in out.stages:
        wanted = t.points if stage.level == "P" else t.superpoints
        query = [next(q for q in range(9) if of_query[q] == g) for g in range(len(t.labels))]  # its first one answers
        stage.masks[0] = torch.full_like(stage.masks[0], -30.0)
        stage.cls[0] = torch.zeros(9, K + 1).index_fill_(1, torch.tensor([K]), 30.0)
        for g, q in enumerate(query):
            stage.masks[0][q] = wanted[g].float() * 60 - 30
            stage.cls[0][q] = torch.zeros(K + 1).index_fill_(0, t.labels[g], 30.0)
            stage.boxes[0] = stage.boxes[0].detach()
            stage.boxes[0][q] = t.boxes[g] - torch.cat([out.centres[0][q], torch.zeros(3)])
    out.sem = [torch.zeros(9, C + 1).scatter_(1, t.semantic[:, None], 30.0)]
    found = criterion(out, [t])
    assert all(float(value) < 1e-4 for value in found.values()), found


@pytest.mark.parametrize("missing", ["objects", "labels", "queries of objects"])
def test_nothing_to_match_is_no_nan(missing):
    """Beside an item that has objects, and alone; every leaf has a finite gradient."""
    view, labels = scene(0, G=0 if missing == "objects" else 4)
    if missing == "labels":
        labels.semantic.fill_(C)
    if missing == "queries of objects":
        view.queries = (el.majority(view.superpoint, labels.instance, 4, -1) == -1).nonzero()[:1, 0]
        assert len(view.queries) == 1
    for views, own in (([view], [labels]), zip(*(scene(3), (view, labels)), strict=True)):
        out = answers(list(views))
        found = losses(list(views), list(own), out)
        found["loss"].backward()
        assert all(v.isfinite() for v in found.values())
        assert all(x.grad is not None and x.grad.isfinite().all() for x in out.leaves)
        if len(out.sem) == 1 and missing != "labels":
            assert found["mask"] == found["dice"] == found["box"] == 0 and found["class"] > 0
        if len(out.sem) == 1 and missing in ("labels", "objects"):
            assert found["semantic"] == 0


def test_a_batch_is_the_mean_of_its_items():
    """All but dice at the first stage, which the authors divide by the size of the batch too."""
    items = [scene(0), scene(1, N=50, S=6, asking=4)]
    views, labels = (list(x) for x in zip(*items, strict=True))
    out = answers(views)
    alone = []
    for b in range(2):
        stages = [Stage([s.cls[b]], [s.masks[b]], [s.boxes[b]], s.level) for s in out.stages]
        one = SimpleNamespace(stages=stages, sem=[out.sem[b]], centres=[out.centres[b]])
        alone.append({scale: losses([views[b]], [labels[b]], one, dice_scale=scale) for scale in el.DICE_SCALES})
    for scale in el.DICE_SCALES:
        together = losses(views, labels, out, dice_scale=scale)
        for name, value in together.items():
            if scale == "unit" or name in ("class", "mask", "box", "semantic"):
                torch.testing.assert_close(value, sum(a[scale][name] for a in alone) / 2)
    criterion = el.ESAMCriterion(C, STUFF)
    targets = [criterion.targets(*item) for item in items]
    for i, (last, factor) in enumerate(((False, 4 / 2), (True, 4))):
        upstream = criterion.stage_losses(out.stages[i], out.centres, targets, last)["dice"]
        unit = el.ESAMCriterion(C, STUFF, dice_scale="unit").stage_losses(out.stages[i], out.centres, targets, last)
        torch.testing.assert_close(upstream, factor * unit["dice"])


def test_box_term_only_with_boxes():
    view, labels = scene()
    assert "box" in losses([view], [labels], answers([view]))
    assert "box" not in losses([view], [labels], answers([view], boxes=False))


def test_losses_are_float32_under_autocast():
    view, labels = scene()
    out = answers([view])
    expected = losses([view], [labels], out)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses([view], [labels], out)
        for stage in out.stages:
            stage.cls[0], stage.masks[0] = stage.cls[0].bfloat16(), stage.masks[0].bfloat16()
        half = losses([view], [labels], out)
    for name, value in found.items():
        assert value.dtype == half[name].dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
        torch.testing.assert_close(half[name], value, rtol=0.02, atol=0.02)


def test_agnostic_has_one_class_of_things():
    view, labels = scene()
    out = answers([view])
    for stage in out.stages:
        stage.cls[0] = stage.cls[0][:, :2]
    assert losses([view], [labels], out, agnostic=True)["loss"].isfinite()


def test_unknown_dice_scale():
    with pytest.raises(ValueError, match="dice_scale 'none'"):
        el.ESAMCriterion(C, dice_scale="none")


# ---- losses of a clip


def test_merge_loss_against_loops():
    torch.manual_seed(0)
    T, B, Q, G = 4, 2, 6, 5
    vectors = [[torch.nn.functional.normalize(torch.randn(Q, 8), dim=1) for _ in range(B)] for _ in range(T)]
    instances = [[torch.randint(-1, G, (Q,)) for _ in range(B)] for _ in range(T)]
    total = 0.0
    for b in range(B):
        middles = [
            {g: vectors[t][b][instances[t][b] == g].mean(0) for g in instances[t][b].tolist() if g >= 0}
            for t in range(T)
        ]
        for t in range(T - 1):
            for a, c in ((middles[t], middles[t + 1]), (middles[t + 1], middles[t])):
                shared = [g for g in a if g in c]
                rows = [torch.stack([a[g] @ c[h] / 0.07 for h in c]).log_softmax(0)[list(c).index(g)] for g in shared]
                total -= float(sum(rows)) / max(len(rows), 1)
    assert float(el.merge_loss(vectors, instances, [G] * B)) == pytest.approx(2 * total / B, rel=1e-5)


def test_merge_loss_of_frames_that_share_nothing_is_zero():
    for G, first, second in ((4, [0, 1], [2, 3]), (4, [-1, -1], [-1, -1]), (0, [-1, -1], [-1, -1])):
        vectors = [[torch.randn(2, 8, requires_grad=True)] for _ in range(2)]
        loss = el.merge_loss(vectors, [[torch.tensor(first)], [torch.tensor(second)]], [G])
        loss.backward()
        assert loss == 0 and all(v.grad.isfinite().all() and (v.grad == 0).all() for (v,) in vectors)


def test_merge_loss_tells_objects_apart():
    ids = [[torch.tensor([0, 1])], [torch.tensor([1, 0])]]
    a, b = torch.eye(8)[0], torch.eye(8)[1]
    right, wrong = [[torch.stack([a, b])], [torch.stack([b, a])]], [[torch.stack([a, b])], [torch.stack([a, b])]]
    assert float(el.merge_loss(right, ids, [2])) < 1e-4
    assert float(el.merge_loss(wrong, ids, [2])) == pytest.approx(2 * 2 / 0.07, rel=1e-4)


def test_clip_loss_is_frames_and_merging():
    T, criterion = 3, el.ESAMCriterion(C, STUFF)
    clips = [[scene(10 * b + t)[0] for t in range(T)] for b in range(2)]
    labels = [[scene(10 * b + t)[1] for t in range(T)] for b in range(2)]
    outputs = [answers([clip[t] for clip in clips], seed=t, vectors=True) for t in range(T)]
    found = el.clip_loss(outputs, clips, labels, criterion)
    frames = [losses([c[t] for c in clips], [own[t] for own in labels], outputs[t]) for t in range(T)]
    for name in frames[0]:
        if name != "loss":
            torch.testing.assert_close(found[name], sum(f[name] for f in frames).detach())
            assert not found[name].requires_grad
    vectors = [out.vectors for out in outputs]
    instances = [[el.query_instances(c[t], own[t]) for c, own in zip(clips, labels, strict=True)] for t in range(T)]
    torch.testing.assert_close(found["merge"], el.merge_loss(vectors, instances, [4, 4]).detach())
    torch.testing.assert_close(found["loss"], sum(f["loss"] for f in frames) + found["merge"])
    found["loss"].backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for out in outputs for x in out.leaves)
    single = el.clip_loss(outputs[:1], [c[:1] for c in clips], [own[:1] for own in labels], criterion)
    assert "merge" not in single
    torch.testing.assert_close(single["loss"], frames[0]["loss"])
