"""Learning rates as functions of the step, and the guards that stop a training which goes wrong in silence."""

import math

import pytest
import torch

from utils import schedules
from utils.run import UserError
from utils.training_guards import EarlyStopping, LossGuard, check_changed, check_rate

# ---- schedules


def test_noam_is_the_formula_of_the_paper_and_peaks_at_its_warmup():
    for step in (0, 1, 99, 9_999, 50_000):
        s = step + 1
        assert schedules.noam(step) == pytest.approx(512**-0.5 * min(s**-0.5, s * 10_000**-1.5))
    rates = [schedules.noam(s) for s in range(0, 40_000, 1)]
    assert max(rates) == pytest.approx(4.42e-4, abs=1e-6) and rates.index(max(rates)) == 9_999
    assert schedules.noam(99, warmup=100, peak=1e-3) == pytest.approx(1e-3)


def test_rst_by_epoch():
    rates = [schedules.rst(e, 1.0) for e in range(1, 15)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 0.2, 0.2, 0.04, 0.04]
    with pytest.raises(ValueError, match="count from 1"):  # the recorded failure: a rate of 0 for a whole epoch
        schedules.rst(0)


def test_cosine_rises_then_falls():
    rates = [schedules.cosine(s, 100, 1.0, 10) for s in range(100)]
    assert rates[9] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0) and 0 < rates[99] < 1e-3
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_cosine_by_hand():
    """From 1 % of the peak, and the fall begins where the rise ends."""
    assert schedules.cosine(0, 2000, 1.0, 1000) == pytest.approx(0.01 + 0.99 / 1000)
    assert schedules.cosine(499, 2000, 1.0, 1000) == pytest.approx(0.01 + 0.99 / 2)
    for step, share in ((1000, 1.0), (1250, (1 + 0.5**0.5) / 2), (1500, 0.5), (1750, (1 - 0.5**0.5) / 2)):
        assert schedules.cosine(step, 2000, 4e-4, 1000) == pytest.approx(4e-4 * share)


def test_rates_that_no_flag_gives_are_those_of_the_papers():
    """RSTNet's base in stage xe, M2's, RSTNet's and PureT's constant rate on the reward; cosine is ours."""
    kw = {"steps": 100, "per_epoch": 10, "lr": None, "warmup": 0, "dim": 512}
    rates = {name: schedules.learning_rate(name, 50, **kw) for name in ("rst", "constant")}
    assert rates == {"rst": 1e-4, "constant": 5e-6}
    assert schedules.learning_rate("cosine", 0, **kw) == 4e-4
    assert set(schedules.DEFAULTS) == {"rst", "constant", "cosine"}


def test_noam_follows_the_width_of_the_model():
    kw = {"steps": 9_000, "per_epoch": 100, "lr": None, "warmup": 400}
    for dim in (64, 512):
        for step in (0, 399, 8_000):
            s = step + 1
            rate = schedules.learning_rate("noam", step, dim=dim, **kw)
            assert rate == pytest.approx(dim**-0.5 * min(s**-0.5, s * 400**-1.5))


@pytest.mark.parametrize("name", schedules.NAMES)
def test_every_schedule_is_above_0_at_every_step(name):
    kw = {"steps": 300, "per_epoch": 20, "lr": None, "warmup": 100, "dim": 512}
    rates = [schedules.learning_rate(name, s, **kw) for s in range(300)]
    assert min(rates) > 0 and max(rates) <= 1e-2
    for s, rate in enumerate(rates):
        check_rate(rate, s)


def test_learning_rate_by_epoch_changes_at_the_first_step_of_an_epoch():
    kw = {"steps": 300, "per_epoch": 20, "lr": 1e-4, "warmup": 15, "dim": 512}
    assert schedules.learning_rate("rst", 19, **kw) == pytest.approx(0.25e-4)
    assert schedules.learning_rate("rst", 20, **kw) == pytest.approx(0.5e-4)
    assert schedules.learning_rate("constant", 5, **kw) == 1e-4


# ---- guards


@pytest.mark.parametrize("rate", [0.0, -1e-4, 0.025, 0.25, math.nan])
def test_a_rate_of_zero_or_a_multiplier_taken_for_a_rate_is_refused(rate):
    with pytest.raises(UserError, match="learning rate"):
        check_rate(rate, 0)


def test_a_step_that_changes_nothing_is_refused():
    before = [torch.ones(2), torch.zeros(3)]
    check_changed(before, [torch.ones(2), torch.full((3,), 1e-9)], 1)
    with pytest.raises(UserError, match="changed none of 2"):
        check_changed(before, [x.clone() for x in before], 1)


def test_the_first_loss_that_is_not_finite_stops_and_its_batch_is_saved(tmp_path):
    guard = LossGuard(tmp_path, rank=3)
    guard.note(1, torch.tensor(3.0), {"tokens": torch.tensor([1])})
    batch = {"tokens": torch.tensor([7, 8]), "image_id": [5, "x"], "references": [["a dog"], ["a cat"]]}
    guard.note(2, torch.tensor(math.nan), batch)
    with pytest.raises(UserError, match="step 2: loss is nan"):
        guard.note(3, torch.tensor(1.0), {})
    (saved,) = tmp_path.glob("bad_batch_*")
    assert saved.name == "bad_batch_step_000002_rank_3.pt", "two ranks must not write the same file"
    found = torch.load(saved, weights_only=True)
    assert found.pop("tokens").tolist() == [7, 8] and found == {k: batch[k] for k in ("image_id", "references")}
    assert guard.check() is None, "a step is looked at once"


def test_the_last_loss_is_looked_at_too(tmp_path):
    guard = LossGuard(tmp_path)
    guard.note(1, torch.tensor(math.inf), {})
    with pytest.raises(UserError, match="step 1"):
        guard.check()


@pytest.mark.parametrize(("end", "warns"), [(9.2, True), (9.0, False)])
def test_a_loss_that_stands_still_is_noted_once(tmp_path, end, warns):
    guard = LossGuard(tmp_path, patience=30)
    losses = [9.28] * 20 + [end] * 30
    said = [guard.note(s, torch.tensor(x), {}) for s, x in enumerate(losses, 1)]
    assert sum(w is not None for w in said) == warns


def warnings_of(guard: LossGuard, losses: list[float], first: int = 1) -> list[int]:
    """Steps, counted from `first`, whose noting gave a warning."""
    return [s for s, x in enumerate(losses, first) if guard.note(s, torch.tensor(x), {})]


def test_a_loss_that_has_moved_once_stands_not_still(tmp_path):
    assert warnings_of(LossGuard(tmp_path, patience=30), [9.28] * 10 + [5.0] * 5 + [9.28] * 30) == []


def test_a_resumed_run_has_no_first_loss_to_compare_with(tmp_path):
    """Its losses are low from the start and move little."""
    assert warnings_of(LossGuard(tmp_path, patience=30), [2.0] * 40, first=11) == []


def test_the_warning_comes_once_though_micro_batches_share_a_step(tmp_path):
    guard = LossGuard(tmp_path, patience=30)
    said = [guard.note(s, torch.tensor(9.28), {}) for s in range(1, 40) for _ in range(2)]
    assert [s // 2 for s, w in enumerate(said) if w] == [29], "noted one note later, in step 30"


def stopped_at(scores, **kw) -> int | None:
    """Number of the validation after which the stage ends."""
    stopper = EarlyStopping(**kw)
    for n, score in enumerate(scores, 1):
        stopper.update(score)
        if stopper.stop:
            return n
    return None


@pytest.mark.parametrize(
    ("scores", "kw", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], {}, None),  # rising CIDEr never stops
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], {}, 6),  # five without a higher one
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1], {}, 11),  # the count begins again
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], {}, 6),  # equal is not higher
        ([0.5, 0.4, 0.3], {"patience": 2}, 3),
        ([0.5, 0.4, 0.3, 0.2, 0.1], {"patience": 2, "least": 5}, 5),
        ([math.nan] * 5, {}, 5),
        ([0.0, math.nan, 0.1], {"patience": 2}, None),
    ],
)
def test_early_stopping_on_scripted_scores(scores, kw, expected):
    assert stopped_at(scores, **kw) == expected


def test_early_stopping_goes_on_after_a_resume():
    first = EarlyStopping(patience=3)
    for score in (0.5, 0.4):
        first.update(score)
    second = EarlyStopping(patience=3)
    second.load_state_dict(first.state_dict())
    assert not second.update(0.5) and not second.stop
    assert not second.update(0.3) and second.stop
