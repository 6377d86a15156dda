"""What FastSAM2 can do otherwise: keep only its best queries, let prompts read fewer or narrower keys; and weights
carried from one choice to another.

Shapes: B images or clips, T frames, N object queries, P prompts, Q = N + P, S pixels of all frames, D width, K classes,
R rank. Configuration: keep_queries, prune_after, key_rank, key_stride, fusion, look of FastSAM2Config.
Source: Xu et al., RAP-SAM, ICLR 2025 (the decoder that these change).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from utils.run import UserError

FUSIONS = ("attention", "mean")
LOOKS = ("all", "masks")
KEY_STRIDES = (4, 8, 16)  # px of the image from key to key
PIXEL_ATTENTION = "head.prompt_attn.attn."  # where key_rank has weights
READER, FINDER = "prompt_fusion.attn.", "prompt_fusion.find."  # of fusion and look


def check_options(cfg) -> None:
    """ValueError for options of a FastSAM2Config that no network has."""
    if not 0 <= cfg.keep_queries <= cfg.queries or not 1 <= cfg.prune_after <= max(1, cfg.stages):
        raise ValueError(f"keep_queries {cfg.keep_queries} after stage {cfg.prune_after}: expected 0..{cfg.queries}, "
                         f"0 for all, after stage 1..{cfg.stages}")  # fmt: skip
    if not 0 <= cfg.key_rank <= cfg.dim or cfg.key_rank % cfg.heads:
        raise ValueError(f"key_rank {cfg.key_rank}: expected a multiple of {cfg.heads} (heads) in 0..{cfg.dim}, 0: all")
    if cfg.key_stride not in KEY_STRIDES or cfg.fusion not in FUSIONS:
        raise ValueError(f"key_stride {cfg.key_stride}, fusion {cfg.fusion!r}: expected {KEY_STRIDES} and {FUSIONS}")
    if cfg.look not in LOOKS:
        raise ValueError(f"look {cfg.look!r}: expected one of {LOOKS}")
    if cfg.compat and cfg.fusion != FUSIONS[0]:
        raise ValueError(f"fusion {cfg.fusion!r} with compat: the released model has no prompt fusion")


# ---- query pruning


def best_queries(classes: torch.Tensor, N: int, keep: int) -> torch.Tensor:
    """Class logits (B, Q, K + 1) -> indices (B, keep + P), ascending: of the first N queries those most surely an
    object, and every prompt. The order is that of 1 - P(no object), in a form that does not round to 1."""
    objects = classes[:, :N].float()
    score = objects[..., :-1].logsumexp(-1) - objects[..., -1]  # (B, N)
    best = score.topk(keep, dim=1).indices.sort(1).values
    prompts = torch.arange(N, classes.shape[1], device=classes.device).expand(len(classes), -1)
    return torch.cat([best, prompts], 1)


def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """values (B, Q, n), index (B, R) -> (B, R, n)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


# ---- keys of the prompt adaptor


def coarse_pixels(pixels: torch.Tensor, grid: tuple[int, int, int], factor: int) -> torch.Tensor:
    """Pixels (B, S, D) of a grid (T, h, w), each frame averaged in blocks of factor x factor; a block cut by the border
    counts what is there -> (B, S / factor^2, D)."""
    if factor == 1:
        return pixels
    frames = pixels.unflatten(1, grid).flatten(0, 1).permute(0, 3, 1, 2)  # (B T, D, h, w)
    coarse = F.avg_pool2d(frames, factor, ceil_mode=True).flatten(2).transpose(1, 2)
    return coarse.unflatten(0, (-1, grid[0])).flatten(1, 2)


@torch.no_grad()
def low_rank(state: dict[str, torch.Tensor], heads: int, rank: int) -> dict[str, torch.Tensor]:
    """The four tensors of an Attention of any inner width -> of one of inner width `rank`: what it scores and what it
    reads, each a product of two matrices per head, to the nearest of that rank (SVD). Equal where no rank is lost."""
    query, key, value = (
        w.double().unflatten(0, (heads, -1)) for w in state["in_proj_weight"].chunk(3)
    )  # (heads, d, D)
    query_bias, _, value_bias = (b.double().unflatten(0, (heads, -1)) for b in state["in_proj_bias"].chunk(3))
    out = state["out_proj.weight"].double().unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, D, d)
    D, old, new = query.shape[2], query.shape[1], rank // heads
    query = torch.cat([query, query_bias[..., None]], 2)  # a bias of the keys moves all scores of a query alike
    to_query, to_key = halves(query.transpose(1, 2) @ key, new)  # (heads, D + 1, new), (heads, new, D)
    to_query = to_query.transpose(1, 2) * (new / old) ** 0.5  # scores are divided by the root of the head's width
    to_out, to_value = halves(out @ value, new)
    zero = to_key.new_zeros(rank)
    bias = state["out_proj.bias"].double() + (out @ value_bias[..., None]).sum((0, 2))  # the weights sum to 1
    found = {
        "in_proj_weight": torch.cat([to_query[..., :D].flatten(0, 1), to_key.flatten(0, 1), to_value.flatten(0, 1)]),
        "in_proj_bias": torch.cat([to_query[..., D].flatten(), zero, zero]),
        "out_proj.weight": to_out.transpose(0, 1).flatten(1),
        "out_proj.bias": bias,
    }
    return {k: v.to(state[k].dtype) for k, v in found.items()}


def halves(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(heads, m, n) -> (heads, m, rank) and (heads, rank, n), whose product is nearest to it."""
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]


# ---- weights of one choice for another


def carry_over(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a FastSAM2 -> for `model`, a FastSAM2 with other options: keys of another rank by `low_rank`; in place
    of another fusion's reader the model's own, untrained. Everything else stays, fit or not."""
    ours, state = model.state_dict(), dict(state)
    names = [name.removeprefix(PIXEL_ATTENTION) for name in ours if name.startswith(PIXEL_ATTENTION)]
    theirs = {name: state[PIXEL_ATTENTION + name] for name in names if PIXEL_ATTENTION + name in state}
    wanted = ours[PIXEL_ATTENTION + "in_proj_weight"].shape
    if len(theirs) == len(names) and theirs["in_proj_weight"].shape != wanted:
        found = low_rank(theirs, model.cfg.heads, wanted[0] // 3)
        state |= {PIXEL_ATTENTION + name: value for name, value in found.items()}
    reader, other = ({name for name in names if name.startswith(READER)} for names in (ours, state))
    if reader and other and reader.isdisjoint(other):
        state = {name: value for name, value in state.items() if name not in other}
        state |= {name: ours[name] for name in reader}
    if bool(finder := {name for name in ours if name.startswith(FINDER)}) != any(n.startswith(FINDER) for n in state):
        state = {name: value for name, value in state.items() if not name.startswith(FINDER)}
        state |= {name: ours[name] for name in finder}
    return state


def reconfigured(model: nn.Module, **changes) -> nn.Module:
    """A copy of a FastSAM2 with other options and the same weights, see `carry_over`. UserError for options that this
    network cannot have."""
    try:
        other = type(model)(replace(model.cfg, **changes))
    except ValueError as e:
        raise UserError(f"this network cannot run that way: {e}; choose other numbers") from e
    other.load_state_dict(carry_over(model.state_dict(), other))
    return other.to(model.mean.device).train(model.training)
