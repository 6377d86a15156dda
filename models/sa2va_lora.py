"""LoRA on Sa2VA's language model, rows of its new tokens, and the small checkpoint folder of what was trained alone.

    adapter.safetensors   every trained tensor, float32: LoRA pairs, rows of the new tokens, projector, projection, ...
    adapter.json          rank, alpha, dropout, rows; folder and SHA-256 of the weight files it was trained on
    config.json   preprocess.json   tokenizer/   (as in a complete folder)

The layers trained by LoRA are all linear ones of the text model; token embeddings and head get no full matrices: only
the rows of NEW_TOKENS are trained. Merging: W + alpha / rank * B A, computed in float32.
Sources: Hu et al., LoRA, arXiv 2106.09685, in peft's implementation; Yuan et al., Sa2VA, arXiv 2501.04001.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model

from models.sa2va import POLICIES, Sa2VA
from models.sa2va_files import INDEX, save_tensors, weight_files
from models.sa2va_processor import NEW_TOKENS
from utils.run import UserError, new_folder, writing
from utils.weights import file_sha256, read_tensors

WEIGHTS, ABOUT = "adapter.safetensors", "adapter.json"
LAYERS = r"mllm\.model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
TABLES = ("mllm.model.language_model.embed_tokens", "mllm.lm_head")
LORA_A, LORA_B, ROWS = (
    ".lora_A.default.weight",
    ".lora_B.default.weight",
    ".token_adapter.trainable_tokens_delta.default",
)
BESIDE_LORA = ("projector", "text_hidden_fcs", "mask decoder")  # groups trained as a whole


@dataclass
class LoraSpec:
    """What adapter.json says about the layers; the released training has rank 128 or 256."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    rows: list[int] = field(default_factory=list)  # token ids whose rows are trained

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoraSpec: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; expected rank "
                             ">= 1, alpha > 0 and 0 <= dropout < 1")  # fmt: skip


def new_rows(model: Sa2VA) -> list[int]:
    """Ids of NEW_TOKENS that the model's tokenizer has. UserError when the row of [SEG] is all zeros."""
    known = model.processor.tokenizer.get_vocab()
    if not model.mllm.get_input_embeddings().weight[model.processor.seg_id].any():
        raise UserError("[SEG]: its token embedding is all zeros, so it was never set; convert the checkpoint again")
    return sorted(known[t] for t in NEW_TOKENS if t in known)


# ---- what is trained


def add_lora(model: Sa2VA, spec: LoraSpec) -> None:
    """Put LoRA layers and trainable rows into the model, in place. At first they change no output."""
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=LAYERS, bias="none",
        trainable_token_indices={name.rpartition(".")[2]: spec.rows for name in TABLES},
    )  # fmt: skip
    inject_adapter_in_model(config, model)


def is_adapter(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B, ROWS))


def train_groups(model: Sa2VA, groups: Iterable[str]) -> dict[str, int]:
    """Gradients for LoRA layers and rows, where there are any, and for these groups -> trained parameters per group.
    What is trained becomes float32, and nothing else changes its type."""
    counts = model.set_trainable(groups)
    for name, p in model.named_parameters():
        if is_adapter(name):
            p.requires_grad_(True)
            group = "new token rows" if name.endswith(ROWS) else "LoRA"
            counts[group] = counts.get(group, 0) + p.numel()
        if p.requires_grad:
            p.data = p.data.float()
    return counts


def check_precision(model: Sa2VA, policy: str) -> None:
    """ValueError unless all trained parameters are float32, and the language model's frozen ones `policy`'s type."""
    for name, p in model.named_parameters():
        want = POLICIES[policy] if name.startswith("mllm.") and not p.requires_grad else torch.float32
        if p.dtype != want:
            state = "trained" if p.requires_grad else "frozen"
            raise ValueError(f"{name} is {state} and {p.dtype}, expected {want} with policy {policy}")


# ---- files


def base_files(base: Path | str) -> dict[str, str]:
    """{file name: SHA-256} of the weights of a complete checkpoint folder."""
    files = weight_files(base)
    index = Path(base) / INDEX
    for f in files:
        if not f.is_file():
            raise UserError(f"{base}: {f.name} is missing; expected the complete checkpoint that was trained on")
    return {f.name: file_sha256(f) for f in [*([index] if index.is_file() else []), *files]}


def save_adapter(folder: Path | str, tensors: dict[str, torch.Tensor], spec: LoraSpec, base: dict, config: dict,
                 save_more: Callable[[Path], None], replace: bool = False) -> None:  # fmt: skip
    """A folder as above, under a temporary name and renamed. tensors: those trained, by the names of the model with
    LoRA; base: {"folder", "sha256": of `base_files`}; save_more: writes what else belongs there, as the processor."""
    with new_folder(folder, replace) as tmp, writing(tmp):
        save_tensors(tensors, tmp / WEIGHTS)
        (tmp / ABOUT).write_text(json.dumps({**asdict(spec), "base": base}, indent=1) + "\n", encoding="utf-8")
        (tmp / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_more(tmp)


def read_adapter(folder: Path | str, base: Path | str | None = None) -> tuple[dict, LoraSpec, dict]:
    """Tensors, spec and base of a folder; base["folder"] is `base` if given. UserError for damage, or a base whose
    weights are not those it was trained on."""
    folder = Path(folder)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        known = about.pop("base")
        spec, wanted = LoraSpec(**about), dict(known["sha256"])
        known["folder"] = str(base or known["folder"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}/{ABOUT}: not readable ({type(e).__name__}); take another checkpoint") from e
    if not (Path(known["folder"]) / "config.json").is_file():
        raise UserError(f"{folder}: was trained on {known['folder']}, which is not there; give that folder")
    if base_files(known["folder"]) != wanted:
        raise UserError(f"{folder}: was trained on other weights than those of {known['folder']} (SHA-256 differs); "
                        "give the checkpoint that it was trained on")  # fmt: skip
    tensors = read_tensors(folder / WEIGHTS)
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise UserError(f"{folder}/{WEIGHTS}: {bad[0]} is not finite; take another checkpoint")
    return tensors, spec, known


def fill(model: Sa2VA, tensors: dict[str, torch.Tensor], source: Path | str) -> None:
    """Copy an adapter's tensors into a model with LoRA, on which `train_groups` was called. UserError unless they are
    exactly what is trained there."""
    want = {k: p for k, p in model.named_parameters() if p.requires_grad}
    off = [f"missing {k}" for k in want if k not in tensors] + [f"unexpected {k}" for k in tensors if k not in want]
    off += [f"{k} is {tuple(v.shape)}, not {tuple(want[k].shape)}" for k, v in tensors.items()
            if k in want and v.shape != want[k].shape]  # fmt: skip
    if off:
        raise UserError(f"{source}: does not fit what this run trains: {'; '.join(off[:3])}; repeat its flags")
    with torch.no_grad():
        for name, p in want.items():
            p.copy_(tensors[name])


def merge(model: Sa2VA, tensors: dict[str, torch.Tensor], spec: LoraSpec, source: Path | str = WEIGHTS) -> None:
    """Add an adapter to a plain model, in place; its names stay as they are. UserError for what has no place in it."""
    state, left = model.state_dict(), dict(tensors)
    pairs = {k.removesuffix(LORA_A) for k in left if k.endswith(LORA_A)}
    tables = [t for t in TABLES if t + ROWS in left]
    try:
        changes = {}
        for name in sorted(pairs):
            B, A = left.pop(name + LORA_B).float(), left.pop(name + LORA_A).float()
            weight = state[f"{name}.weight"]
            changes[f"{name}.weight"] = weight.float() + spec.alpha / spec.rank * (B @ A).to(weight.device)
        for name in tables:
            rows = torch.tensor(spec.rows, device=state[f"{name}.weight"].device)
            new = left.pop(name + ROWS).to(state[f"{name}.weight"])
            changes[f"{name}.weight"] = state[f"{name}.weight"].index_copy(0, rows, new)
        changes |= left
        shapes = [k for k, v in changes.items() if state[k].shape != v.shape]
    except (KeyError, RuntimeError, IndexError) as e:
        raise UserError(f"{source}: does not fit the model it is added to ({e}); give the one it was trained on") from e
    if shapes:
        raise UserError(f"{source}: {shapes[0]} has another shape than in the model; give the one it was trained on")
    with torch.no_grad():
        for name, value in changes.items():
            state[name].copy_(value)


def open_sa2va(folder: Path | str, policy: str = "fp32", base: Path | str | None = None) -> Sa2VA:
    """The model of a complete checkpoint folder, or of an adapter folder merged into its base; in evaluation mode.
    base: where the base of an adapter lies now, if not where it was."""
    if not (Path(folder) / ABOUT).is_file():
        return Sa2VA.from_checkpoint(folder, policy)
    tensors, spec, known = read_adapter(folder, base)
    model = Sa2VA.from_checkpoint(known["folder"], policy)
    merge(model, tensors, spec, folder)
    return model
