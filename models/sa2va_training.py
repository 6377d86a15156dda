"""What training Sa2VA needs beside the loop: a tiny random model that can learn, one forward for DDP and FSDP, and
checkpoint folders, complete ones or adapters (models/sa2va_lora.py), under the links `last` and `best`.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from models.sa2va import Sa2VA
from models.sa2va_files import config_of, write_folder
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


def publish(out: Path, folder: Path, best: bool, keep: int = 3) -> None:
    """Point the links `last` (and `best`) at a complete folder; delete all but the newest `keep` and the best."""
    for name in ["last", "best"] if best else ["last"]:
        link = out / f".tmp-link-{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, out / name)
    kept = {(out / name).resolve().name for name in ("last", "best") if (out / name).exists()}
    for old in sorted(out.glob("step_*"), key=lambda p: (p.stat().st_mtime_ns, p.name))[:-keep]:
        if old.name not in kept:
            shutil.rmtree(old)


def write_checkpoint(out: Path, step: int, model: Sa2VA, weights: dict, spec, base, config: dict, state: dict) -> Path:
    """out/step_NNNNNN, complete or the adapter alone, with state.pt; a folder of the same step is replaced."""

    def more(tmp: Path) -> None:
        model.processor.save(tmp)
        torch.save({**state, "step": step}, tmp / "state.pt")

    folder, aside = out / f"step_{step:06d}", out / f".tmp-old-step_{step:06d}"
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():  # the same step, saved before a resume
        os.rename(folder, aside)
    if spec is None:
        write_folder(folder, weights, config, more)
    else:
        made_by = {"commit": run.commit(), "torch": str(torch.__version__)}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        tensors = {k: v for k, v in weights.items() if k in trained}
        save_adapter(folder, tensors, spec, base, {**config, "made_by": made_by}, more)
    shutil.rmtree(aside, ignore_errors=True)
    return folder


def known_of(start: str | None) -> dict:
    """config.json of the checkpoint that this run starts from, complete or an adapter; {} without one."""
    path = Path(start or ".") / "config.json"
    if start is None or not path.is_file():
        return {} if start is None else config_of(start)
    return json.loads(path.read_text(encoding="utf-8"))
