"""Training ESAM: sizes and weights that another checkpoint brings, what is frozen, parameter groups.

Weights pass between stages and routes by name, which they share (models/esam.py).
"""

import re
from pathlib import Path

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from models.esam import ESAM
from utils import run
from utils.partial_weights import partial_load
from utils.run import UserError
from utils.weights import read_tensors

CLASS_HEADS = ("decoder.out_cls.2.", "decoder.out_sem.")  # their shapes depend on the classes
UNET_STAGES = range(9)


def known_sizes(folder: Path | str) -> dict:
    """Configuration of a checkpoint of an ESAM, or of a backbone alone as its "backbone"."""
    config = {k: v for k, v in run.read_config(folder).items() if k != "made_by"}
    kind = config.pop("model", None)
    if kind == "Res16UNet":
        return {"backbone": config}
    if kind != "ESAM":
        raise UserError(f"{folder}: holds {kind or 'no named model'}, expected an ESAM or a Res16UNet")
    return config


def initialise(model: ESAM, folder: Path | str, patch: bool = True) -> list[str]:
    """Copy what the checkpoint has and the model too -> what was copied and what was not, lines for a person.

    Heads for other classes stay new. patch: also the frozen patch convolution of the 2D branch. UserError when nothing
    fits, or a tensor other than of those heads has another shape.
    """
    tensors, state = read_tensors(Path(folder) / "model.safetensors"), model.state_dict()
    if not patch:
        tensors = {k: v for k, v in tensors.items() if k != "bi_encoder.image.conv1_weight"}
    other = [k for k in tensors if k.startswith(CLASS_HEADS) and k in state and tensors[k].shape != state[k].shape]
    kept = {k: v for k, v in tensors.items() if k not in other}
    alone = run.read_config(folder).get("model") == "Res16UNet"
    found = partial_load(model, kept, dst_prefix="backbone." if alone else "", source=f"--init {folder}")
    said = [f"--init {folder}: {line}" for line in found.lines()]
    return said + [f"--init {folder}: is of other classes; these are new: {', '.join(other)}"] * bool(other)


def unet_stage(name: str) -> int:
    """Stage of a part of Res16UNet by its name: 0 stem, 1-4 down, 5-8 up (convtr4 and bntr4 belong to block5)."""
    return int(re.search(r"\d", name).group()) + name.startswith(("convtr", "bntr"))


def freeze(model: ESAM, unfreeze: list[int] | None = None, statistics: bool = False) -> list[torch.nn.Module]:
    """Stop the U-Net's stages that are not in `unfreeze` (None: all learn) -> modules to keep in eval mode: these, and
    with `statistics` all batch norms of the U-Net."""
    still = []
    if unfreeze is not None:
        still = [m for name, m in model.backbone.named_children() if unet_stage(name) not in unfreeze]
        for module in still:
            module.requires_grad_(False)
    return still + [m for m in model.backbone.modules() if statistics and isinstance(m, BatchNorm)]


def make_groups(model: ESAM, weight_decay: float, backbone: float = 1.0, pos_embed: float = 1.0) -> list[dict]:
    """Parameter groups with a "factor" on the rate: of the U-Net, and of Tiny-SA's pos_embed, wherever it is. Matrices
    and kernels decay; norms, biases and pos_embed do not."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        embed = name.endswith("pos_embed")
        factor = pos_embed if embed else backbone if name.startswith("backbone.") else 1.0
        decay = 0.0 if embed or p.ndim < 2 else weight_decay
        if p.requires_grad:
            groups.setdefault((factor, decay), []).append(p)
    return [{"params": ps, "factor": f, "weight_decay": d} for (f, d), ps in groups.items()]
