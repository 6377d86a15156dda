"""Weights of one model into another that shares only parts with it: what fits is copied, what does not is listed.

For stages and routes of training, where a later model has parts that an earlier one lacks. Where every tensor must fit,
utils/weights.py has load_strict.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn

from utils.run import UserError


@dataclass
class Transfer:
    """Names of tensors. matched: of the model, now with the source's values; missing: of the model, as they were;
    unexpected: of the source, without a place in the model; mismatched: of the model, of another shape in the source,
    as they were."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def lines(self) -> list[str]:
        """What a person wants to know, a line each; parts of a model stand for their tensors."""
        said = [f"{len(self.matched)} tensors copied: {parts(self.matched)}"]
        said += [f"{len(self.missing)} not in the source, left as they are: {parts(self.missing)}"] * bool(self.missing)
        said += [f"{len(self.unexpected)} of the source not used: {parts(self.unexpected)}"] * bool(self.unexpected)
        other = f"{len(self.mismatched)} of another shape, left as they are: {', '.join(self.mismatched)}"
        return said + [other] * bool(self.mismatched)


def parts(names: list[str]) -> str:
    """First words of dotted names with how often: 'backbone (372), pool (20)'."""
    words = [name.split(".")[0] for name in names]
    return ", ".join(f"{word} ({words.count(word)})" for word in dict.fromkeys(words))


def partial_load(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    src_prefix: str = "",
    dst_prefix: str = "",
    strict_shapes: bool = True,
    source: str = "the weights",
) -> Transfer:
    """Copy every tensor `src_prefix + x` whose counterpart is `dst_prefix + x` in the model. source: for messages.

    Source names outside src_prefix and model names outside dst_prefix are no part of it. UserError, and the model left
    as it was, when nothing matches, when a tensor that matches is not finite and, unless strict_shapes is False, when
    one has another shape. Buffers such as running statistics count as tensors.
    """
    state = model.state_dict()
    mine = {dst_prefix + k.removeprefix(src_prefix): v for k, v in tensors.items() if k.startswith(src_prefix)}
    wanted = [k for k in state if k.startswith(dst_prefix)]
    matched = [k for k in wanted if k in mine and mine[k].shape == state[k].shape]
    mismatched = [k for k in wanted if k in mine and mine[k].shape != state[k].shape]
    unexpected = [src_prefix + k.removeprefix(dst_prefix) for k in mine if k not in state]
    if not matched:
        theirs, ours = (f"{n[0]}, ..." if n else "none" for n in (list(tensors), wanted))
        raise UserError(
            f"{source}: none of {len(tensors)} tensors ({theirs}) fits one of {type(model).__name__} ({ours}) by name "
            f"and shape, '{src_prefix}' becoming '{dst_prefix}'; nothing would be carried over, check the weights"
        )
    if strict_shapes and mismatched:
        pairs = [f"{k} is {tuple(mine[k].shape)}, not {tuple(state[k].shape)}" for k in mismatched[:3]]
        more = f" and {len(mismatched) - 3} more" if len(mismatched) > 3 else ""
        raise UserError(f"{source}: {'; '.join(pairs)}{more}; use weights of the same sizes, or the flags they had")
    bad = [k for k in matched if mine[k].is_floating_point() and not mine[k].isfinite().all()]
    if bad:
        raise UserError(f"{source}: {bad[0]} and {len(bad) - 1} more are not finite; use another checkpoint")
    with torch.no_grad():
        for k in matched:
            state[k].copy_(mine[k])
    return Transfer(matched, [k for k in wanted if k not in mine], unexpected, mismatched)
