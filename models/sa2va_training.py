"""What training Sa2VA needs beside the loop: a tiny random model that can learn, one forward for DDP and FSDP, and
checkpoint folders, complete ones or adapters (models/sa2va_lora.py), under the links `last` and `best`.
"""

from pathlib import Path

import torch
from torch import nn

from models.sa2va import Sa2VA
from models.sa2va_files import write_folder
from models.sa2va_lora import WEIGHTS as ADAPTER
from models.sa2va_lora import save_adapter
from models.sa2va_losses import LossConfig
from models.sa2va_sizes import tiny_sa2va
from utils import run

TINY = {"sam_size": 128, "neck": 64, "sam_width": 16, "hidden": 64, "max_tiles": 1}


def new_tiny(seed: int, questions: tuple[str, ...]) -> Sa2VA:
    """A tiny random model that knows the questions' words. So narrow a text model with transformers' initial weights
    (0.02) says nearly the same whatever is asked, and no mask would ever tell two questions apart; wider ones do."""
    model = tiny_sa2va(seed, words=questions, **TINY)
    generator = torch.Generator().manual_seed(seed)
    for m in model.mllm.model.language_model.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5, generator=generator)
    with torch.no_grad():
        model.text_hidden_fcs[2].weight *= 4  # prompts as long as SAM 2's own tokens
    return model


class WithLosses(nn.Module):
    """The model and its losses as one forward, for DDP and FSDP: each trained parameter takes part in every batch."""

    def __init__(self, model: Sa2VA, cfg: LossConfig):
        super().__init__()
        self.model, self.cfg = model, cfg

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        out = self.model(batch, self.cfg)
        encoder = [p for p in self.model.sam.vision_encoder.parameters() if p.requires_grad]
        loss = out["loss"] + sum(0 * p.sum() for p in encoder)  # a batch without masks does not run it
        return loss, {k: out[k].detach() for k in ("loss", "lm", "bce", "dice", "cldice") if k in out}


# ---- checkpoints


def write_checkpoint(out: Path, step: int, model: Sa2VA, weights: dict, spec, base, config: dict, state: dict) -> Path:
    """out/step_NNNNNN, complete or the adapter alone, with state.pt; a folder of the same step is replaced."""

    def more(tmp: Path) -> None:
        model.processor.save(tmp)
        (tmp / "state.pt").write_bytes(run.pack_state(state, step))

    folder = out / f"step_{step:06d}"
    if spec is None:
        write_folder(folder, weights, config, more, replace=True)
    else:
        made_by = {"commit": run.commit(), "torch": str(torch.__version__)}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        tensors = {k: v for k, v in weights.items() if k in trained}
        save_adapter(folder, tensors, spec, base, {**config, "made_by": made_by}, more, replace=True)
    return folder


def known_of(start: str | None) -> dict:
    """config.json of the checkpoint that this run starts from, complete or an adapter; {} without one."""
    if start is None:
        return {}
    return run.read_config(start, ADAPTER if (Path(start) / ADAPTER).is_file() else "model.safetensors")
