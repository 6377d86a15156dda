"""What a training of FastSAM2 does with a batch: prompts and clicks, teacher forcing, losses, validation, pictures of it.

Shapes: B images or clips, T frames, P prompts, Q targets of one image, H W image, h w grid of the masks. Batches are
those of data/segment_batch.py. Sources: Xu et al., RAP-SAM, ICLR 2025; Ravi et al., SAM 2, arXiv 2408.00714 (clicks
where the mask is wrong, clips); Williams & Zipser, Neural Computation 1989 (teacher forcing).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from models.fastsam2 import STRIDE as PADDED_TO
from models.fastsam2 import FastSAM2
from models.fastsam2_options import carry_over
from models.mask_losses import WEIGHTS
from models.panoptic_post import INSTANCE, ImageSize, panoptic, to_original
from models.prompt_fusion import MASK_LOGIT, PROMPT_TASKS, STRIDE, PromptBatch, padded
from models.segment_losses import segment_losses
from models.segment_scores import NAMES, BatchScores, clip_masks, seen_masks
from utils import overlay
from utils.click_simulator import next_click
from utils.weights import read_tensors

LIGHT = 0.2  # how much brighter or darker the averaged weights see a channel
FORCED = 0.5  # how often the memory is given the true mask in training
SHOWN = 12
DRAWN = ("panoptic", "vps", "vos")  # tasks that `draw_validation` can show

OPTIONAL = ("memory.", "head.pixel_cls.")  # parts that not every network has

Embed = Callable[[list[str]], torch.Tensor]  # sentences -> (Q, E)


def to_device(batch: dict, device: torch.device) -> dict:
    """Tensors, and lists of tensors, of a batch."""
    moved = dict(batch)
    for k, v in batch.items():
        if isinstance(v, torch.Tensor):
            moved[k] = v.to(device, non_blocking=True)
        elif isinstance(v, list) and v and isinstance(v[0], torch.Tensor):
            moved[k] = [x.to(device, non_blocking=True) for x in v]
    return moved


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- weights


def initial_weights(folder: str, model: FastSAM2) -> dict[str, torch.Tensor]:
    """Those of a checkpoint, for a model of other classes and options, see `carry_over`; of OPTIONAL what only one of them
    has is left out, or stays untrained."""
    weights = carry_over(read_tensors(Path(folder) / "model.safetensors"), model)
    for part in OPTIONAL:
        ours, theirs = ({k: v for k, v in x.items() if k.startswith(part)} for x in (model.state_dict(), weights))
        if not (ours and theirs):
            weights = {k: v for k, v in weights.items() if k not in theirs} | ours
    return weights | {"head.classifier": model.head.classifier}


def make_groups(model: FastSAM2, backbone_lr: float, weight_decay: float) -> list[dict]:
    """AdamW's groups; a group's factor multiplies the rate. Norms and biases do not decay."""
    groups: dict[tuple, dict] = {}  # (backbone?, decayed?) -> group
    for name, p in model.named_parameters():
        key = (name.startswith("backbone."), p.ndim > 1)
        group = {"params": [], "factor": backbone_lr if key[0] else 1.0}
        groups.setdefault(key, group | {"weight_decay": weight_decay if key[1] else 0.0})["params"].append(p)
    return list(groups.values())


# ---- one batch


def prompts_of(batch: dict, embed: Embed | None = None) -> PromptBatch | None:
    """The prompts of a batch on its device; None for tasks without."""
    return PromptBatch.of(batch, embed).to(batch["image"].device) if batch["task"] in PROMPT_TASKS else None


def predict(net, batch: dict, prompts: PromptBatch | None, memory: bool, forced: float | None = None) -> dict:
    """FastSAM2, or DDP around it, on a batch of any task -> its output. memory: whether it has one, so that vos follows
    each object from its frame `first`; forced: share of the frames of which the memory gets the true mask, None: as in
    inference. No memory: a clip's masks are one tube, read from prompts of its first frame."""
    if batch["task"] != "vos" or not memory:
        return net(batch["image"], prompts, task=batch["task"])
    more = {"first": padded(batch["first"], -1)}  # (B, P)
    if forced is not None:
        truth = truth_logits(batch["masks"])
        more |= {"truth": truth, "forced": torch.rand(truth.shape[:3], device=truth.device) < forced}
    return net(batch["image"], prompts, task="vos", **more)


def truth_logits(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """True tubes, B of bool (Q, T, H, W) -> logits (B, P, T, h, w) at the grid of the masks, P the most that a clip has:
    MASK_LOGIT inside, minus that outside, between them on the border."""
    full = padded([m.float() for m in masks], 0.0)
    B, P, T, H, W = full.shape
    full = F.pad(full.reshape(B * P, T, H, W), (0, -W % PADDED_TO, 0, -H % PADDED_TO))
    share = F.avg_pool2d(full, STRIDE)
    return ((2 * share - 1) * MASK_LOGIT).reshape(B, P, *share.shape[1:])


def batch_losses(
    net,
    batch: dict,
    prompts: PromptBatch | None,
    num_masks,
    dtype: torch.dtype,
    points: int,
    memory: bool,
    weights=WEIGHTS,
) -> tuple[dict, dict]:
    """Losses of one micro-batch, scalars, and the output; forward in autocast, losses in float32."""
    with autocast(batch["image"].device, dtype):
        out = predict(net, batch, prompts, memory, FORCED)
        return segment_losses(out, batch, num_masks, points, weights), out


def other_light(images: torch.Tensor) -> torch.Tensor:
    """Bytes (B, [T], 3, H, W) -> floats in [0, 1]; each picture's channels are brighter or darker by up to a fifth."""
    gain = 1 + LIGHT * (2 * torch.rand(len(images), 3, 1, 1, device=images.device) - 1)
    return (gain.reshape(len(images), *[1] * (images.ndim - 4), 3, 1, 1) * images / 255).clamp(0, 1)


@torch.no_grad()
def add_clicks(model: FastSAM2, batch: dict, rounds: int, dtype: torch.dtype) -> dict:
    """A batch of task interactive with `rounds` more clicks on each object, each where the mask so far is most wrong."""
    batch, was_training, device = dict(batch), model.training, batch["image"].device
    model.eval()
    with autocast(device, dtype):
        features = model.encode(batch["image"])
    H, W = batch["image"].shape[-2:]
    for _ in range(rounds):
        with autocast(device, dtype):
            prompts = prompts_of(batch)
            found = model.decode(features, model.queries(prompts, features), objects=False)["masks"][-1].float()
        for b, target in enumerate(batch["masks"]):
            made = to_original(found[b, : len(target)], ImageSize((H, W), (H, W), (H, W))).cpu().numpy() > 0
            counts, truth = (~batch["ignore"][b]).cpu().numpy(), target.cpu().numpy()
            clicks = [next_click(t, m, counts) or (0, 0, -1) for t, m in zip(truth & counts, made, strict=True)]
            new = torch.tensor(np.array(clicks, np.float32).reshape(-1, 1, 3), device=device)  # (Q, 1, 3)
            batch["points"] = [*batch["points"]]
            batch["point_labels"] = [*batch["point_labels"]]
            batch["points"][b] = torch.cat([batch["points"][b], new[..., :2]], 1)
            batch["point_labels"][b] = torch.cat([batch["point_labels"][b], new[..., 2].long()], 1)
    model.train(was_training)
    return batch


# ---- validation


@torch.no_grad()
def evaluate(model: FastSAM2, loaders: dict, embed: Embed, dtype: torch.dtype) -> dict[str, float]:
    """{task: batches} -> a figure for each task, in percent, their mean as `score`, and the other figures of BatchScores.
    Memories are run as in inference."""
    model.eval()
    values, more = {}, {}
    for task, loader in loaders.items():
        scores = BatchScores(task, model.cfg.is_thing)
        for batch in loader:
            batch = to_device(batch, model.mean.device)
            with autocast(model.mean.device, dtype):
                scores.add(predict(model, batch, prompts_of(batch, embed), model.memory is not None), batch)
        values[f"{task} {NAMES[task]}"] = scores.score()
        more |= {f"{task} {name}": value for name, value in scores.others().items()}
    model.train()
    known = [v for v in values.values() if not math.isnan(v)]
    return values | more | {"score": sum(known) / max(1, len(known))}


@torch.no_grad()
def draw_validation(model: FastSAM2, loader, path: Path, embed: Embed, dtype: torch.dtype) -> None:
    """PNG of the first SHOWN validation pictures of a task of DRAWN, or frames of a clip in a row: panoptic segments in
    colours of the classes, followed objects in one of their own."""
    model.eval()
    rows = []
    for batch in loader:
        batch = to_device(batch, model.mean.device)
        with autocast(model.mean.device, dtype):
            out = predict(model, batch, prompts_of(batch, embed), model.memory is not None)
        masks = seen_masks(out) if batch["task"] == "vos" else out["masks"][-1].float()
        masks = masks if masks.ndim == 5 else masks[:, :, None]  # (B, Q, T, h, w)
        images = batch["image"] if batch["image"].ndim == 5 else batch["image"][:, None]  # (B, T, 3, H, W)
        for b, frames in enumerate(images):
            large = clip_masks(masks[b], tuple(frames.shape[-2:]))  # (Q, T, H, W)
            if batch["task"] == "vos":
                large = large[: len(batch["masks"][b])]  # the others are padding
                rows.append(draw_frames(frames, (large > 0).cpu().numpy(), range(len(large))))
            else:
                tall = panoptic(out["classes"][-1][b], large.flatten(1, 2), model.is_thing)["map"]
                maps = tall.unflatten(0, large.shape[1:3]).cpu().numpy()  # (T, H, W)
                kinds = [v for v in np.unique(maps) if v % INSTANCE < len(model.cfg.classes)]
                segments = np.array([maps == v for v in kinds], bool).reshape(len(kinds), *maps.shape)
                rows.append(draw_frames(frames, segments, [int(v) % INSTANCE for v in kinds]))
        if len(rows) * len(rows[0]) >= SHOWN:
            break
    model.train()
    T = len(rows[0])
    tiles = [tile for row in rows[: -(-SHOWN // T)] for tile in row]
    overlay.save_png(path, overlay.grid(tiles, T if T > 1 else 4))


def draw_frames(frames: torch.Tensor, masks: np.ndarray, colours: Sequence[int]) -> list[np.ndarray]:
    """Frames uint8 (T, 3, H, W) with masks bool (Q, T, H, W) in a colour each -> T pictures."""
    tiles = []
    for t, tile in enumerate(frames.permute(0, 2, 3, 1).cpu().numpy()):
        for mask, number in zip(masks[:, t], colours, strict=True):
            tile = overlay.mask(tile, mask, overlay.colour(number))
        tiles.append(tile)
    return tiles
