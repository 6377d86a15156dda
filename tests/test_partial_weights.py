"""utils/partial_weights.py: what is copied, what is listed, and that a transfer of nothing is an error."""

import pytest
import torch
import torch.nn as nn

from utils.partial_weights import Transfer, partial_load
from utils.run import UserError


def small(**sizes: int) -> nn.Module:
    """Named linear layers from width 2."""
    torch.manual_seed(sum(map(ord, "".join(sizes))))
    return nn.ModuleDict({name: nn.Linear(2, size) for name, size in sizes.items()})


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_what_both_have_is_copied_and_the_rest_is_listed():
    source, model = small(body=3, old=2).state_dict(), small(body=3, new=4)
    before = snapshot(model)
    found = partial_load(model, source)
    assert found == Transfer(["body.weight", "body.bias"], ["new.weight", "new.bias"], ["old.weight", "old.bias"], [])
    after = model.state_dict()
    assert all(torch.equal(after[k], source[k]) and not torch.equal(after[k], before[k]) for k in found.matched)
    assert all(torch.equal(after[k], before[k]) for k in found.missing)
    assert found.lines() == [
        "2 tensors copied: body (2)", "2 not in the source, left as they are: new (2)",
        "2 of the source not used: old (2)",
    ]  # fmt: skip


def test_prefixes_are_renamed_before_names_are_compared():
    """The released hook filtered by the new prefix first, so it carried nothing over and only said so in a log."""
    source = {f"backbone.{k}": v for k, v in small(body=3).state_dict().items()} | {"head.weight": torch.zeros(1)}
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"trunk": small(body=3)}), "other": nn.Linear(1, 1)})
    found = partial_load(model, source, src_prefix="backbone.", dst_prefix="encoder.trunk.")
    assert found.matched == ["encoder.trunk.body.weight", "encoder.trunk.body.bias"]
    assert not found.missing and not found.unexpected  # outside the prefixes is no part of it
    for k in ("weight", "bias"):
        assert torch.equal(model.state_dict()[f"encoder.trunk.body.{k}"], source[f"backbone.body.{k}"])
    rest = partial_load(model, {**source, "backbone.gone": torch.zeros(1)}, "backbone.", "encoder.trunk.")
    assert rest.unexpected == ["backbone.gone"]


@pytest.mark.parametrize("prefixes", [("", "backbone."), ("backbone.", ""), ("absent.", "")])
def test_nothing_matched_is_an_error(prefixes):
    model = small(body=3)
    with pytest.raises(UserError, match=r"run: none of 2 tensors \(body.weight, ...\) fits one of ModuleDict"):
        partial_load(model, small(body=3).state_dict(), *prefixes, source="run")
    with pytest.raises(UserError, match="none of 0 tensors"):
        partial_load(model, {})
    with pytest.raises(UserError, match="nothing would be carried over"):
        partial_load(model, small(body=4).state_dict(), strict_shapes=False)  # all of another shape


def test_another_shape_is_an_error_or_listed():
    source, model = small(body=3, head=5).state_dict(), small(body=3, head=4)
    before = snapshot(model)
    with pytest.raises(UserError, match=r"run: head.weight is \(5, 2\), not \(4, 2\); head.bias is .*same sizes"):
        partial_load(model, source, source="run")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # nothing half done
    found = partial_load(model, source, strict_shapes=False)
    assert found.mismatched == ["head.weight", "head.bias"] and found.matched == ["body.weight", "body.bias"]
    assert torch.equal(model["head"].weight, before["head.weight"])
    assert found.lines()[-1] == "2 of another shape, left as they are: head.weight, head.bias"


def test_weights_that_are_not_finite_are_refused():
    source, model = small(body=3, head=2).state_dict(), small(body=3, head=2)
    source["head.bias"][1] = torch.nan
    before = snapshot(model)
    with pytest.raises(UserError, match="head.bias and 0 more are not finite"):
        partial_load(model, source)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_buffers_count():
    model, other = (nn.Sequential(nn.BatchNorm1d(2)) for _ in range(2))
    other[0].running_mean += 3
    other[0].num_batches_tracked += 7
    assert len(partial_load(model, other.state_dict()).matched) == 5
    assert model[0].running_mean.tolist() == [3, 3] and model[0].num_batches_tracked == 7
