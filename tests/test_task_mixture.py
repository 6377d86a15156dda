"""data/task_mixture.py: shares, resume, ranks, accumulation, and every item once before any comes twice."""

from collections import Counter

import pytest

from data import task_mixture
from data.moving_shapes import MovingShapes
from data.segment_batch import SegmentCollate, SegmentItems, View
from data.task_mixture import MixtureBatches, TaskMixture, temperature_shares

SIZES, SHARES = {"coco": 23, "refs": 7, "clips": 11}, {"coco": 3.0, "refs": 1.0, "clips": 2.0}


def batches(start=0, stop=60, **more) -> list[list[tuple]]:
    more = {"batch_size": 2, "seed": 5} | more
    size, seed = more.pop("batch_size"), more.pop("seed")
    return list(MixtureBatches(SIZES, SHARES, size, start, stop, seed, **more))


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(task_mixture, "BLOCK", 16)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("start", [1, 15, 16, 17, 40])
def test_a_resumed_run_goes_on_as_the_unbroken_one(short_blocks, same, start):
    for rank in range(3):
        more = {"rank": rank, "world": 3, "accum": 2, "same": same}
        assert batches(start, **more) == batches(**more)[2 * start :]


@pytest.mark.parametrize("same", [True, False])
def test_ranks_are_micro_batches_of_one_process(short_blocks, same):
    ranks = [batches(rank=r, world=4, same=same) for r in range(4)]
    one = batches(accum=4, same=same)
    assert [ranks[k % 4][k // 4] for k in range(len(one))] == one
    two = [batches(rank=r, world=2, accum=2, same=same) for r in range(2)]
    assert [two[k % 2][k // 2] for k in range(len(one))] == one


def test_the_same_data_set_on_all_ranks_or_not():
    def names(same):
        ranks = [[b[0][0] for b in batches(rank=r, world=3, same=same)] for r in range(3)]
        return list(zip(*ranks, strict=True))

    assert all(len(set(step)) == 1 for step in names(True))
    assert any(len(set(step)) == 3 for step in names(False))
    assert len({step[0] for step in names(True)}) == 3
    assert all(len({name for name, _, _ in b}) == 1 for b in batches(same=False))


@pytest.mark.parametrize("same", [True, False])
def test_every_item_comes_once_an_epoch(short_blocks, same):
    """In the order of slots, whatever ranks and steps: also where a batch lies across two epochs."""
    ranks = [batches(0, 80, batch_size=3, rank=r, world=2, accum=2, same=same) for r in range(2)]
    for name, n in SIZES.items():
        stream = [key for k in range(160) for r in range(2) for key in ranks[r][k] if key[0] == name]
        assert len(stream) > 2 * n
        for e in range(len(stream) // n):
            part = stream[e * n : (e + 1) * n]
            assert {x[1] for x in part} == {e} and sorted(x[2] for x in part) == list(range(n))
        assert [x[2] for x in stream[:n]] != [x[2] for x in stream[n : 2 * n]] != list(range(n))


@pytest.mark.parametrize("same", [True, False])
def test_shares(same):
    drawn = Counter(b[0][0] for b in batches(0, 6000, batch_size=1, accum=2, same=same))
    for name, share in SHARES.items():
        assert drawn[name] / 12000 == pytest.approx(share / 6, abs=0.02)


def test_the_task_of_a_step_is_told_without_running_it():
    sampler = MixtureBatches(SIZES, SHARES, 2, 0, 50, 5, rank=1, world=2, same=False)
    assert [b[0][0] for b in sampler] == [sampler.task(k, 1) for k in range(50)] and len(sampler) == 50
    assert batches(seed=6) != batches(seed=5)


def test_temperature():
    sizes = {"a": 100, "b": 1}
    assert temperature_shares(sizes) == {"a": pytest.approx(100 / 101), "b": pytest.approx(1 / 101)}
    assert temperature_shares(sizes, 2)["a"] == pytest.approx(10 / 11)
    assert temperature_shares(sizes, 1e9)["b"] == pytest.approx(0.5)


def test_bad_arguments():
    for sizes, shares in (({"a": 1}, {"b": 1.0}), ({}, {}), ({"a": 0}, {"a": 1.0}), ({"a": 1}, {"a": 0.0})):
        with pytest.raises(ValueError, match="expected the same names"):
            MixtureBatches(sizes, shares, 2, 0, 1, 0)
    with pytest.raises(ValueError, match="temperature_shares"):
        temperature_shares({"a": 3}, 0.0)


def test_batches_of_a_mixture_are_of_one_task():
    view = View(32, 32)
    sets = {t: SegmentItems(MovingShapes(9, 0, size=32), t, view) for t in ("panoptic", "interactive", "referring")}
    sets["vis"] = SegmentItems(MovingShapes(9, 0, size=32, frames=2), "vis", view)
    mixture = TaskMixture(sets)
    assert len(mixture) == 36 and mixture.sizes() == dict.fromkeys(sets, 9)
    shares, collate, seen = dict.fromkeys(sets, 1.0), SegmentCollate(), set()
    for keys in MixtureBatches(mixture.sizes(), shares, 2, 0, 12, 1, same=False):
        batch = collate([mixture[key] for key in keys])
        assert batch["task"] == keys[0][0]
        seen.add(batch["task"])
    assert seen == set(sets)
