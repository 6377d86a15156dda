"""Memory of Sa2VA: GiB by size and precision, and one model spread over several devices.

Weights follow the precision policy: the language model in bfloat16 or float16, the projection and SAM 2 in float32.
Spreading puts whole layers on devices in the order of computation; what leaves the language model (its last norm, the
head, the projection, SAM 2) stays together on the last one, so that one copy of the hidden states crosses per layer
boundary and SAM 2 never crosses. Parameters get their storage on their device; nothing passes through another one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import InternVLConfig

from models.sa2va import POLICIES, Sa2VA, Sa2VAConfig
from models.sa2va_processor import ProcessorConfig, Sa2VAProcessor
from models.sa2va_sizes import TEXT_SIZES, internvl_config, sam_config, tiny_tokenizer
from utils.run import UserError

GIB = 2**30
SIZES = ("1B", "2B", "4B", "8B", "14B", "26B")
INTERNLM2_20B, VOCABULARY_20B = (6144, 16384, 48, 48, 8), 92558  # of 26B, here under the Llama classes
VISION_6B = {  # InternViT-6B, of 26B
    "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25,
    "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm",
}  # fmt: skip
TILES, TOKENS = 13, 4096  # of the largest picture: 12 tiles and a thumbnail; its tokens with question and answer
WHOLE = (  # modules that stay on one device
    "InternVLVisionLayer", "InternVLMultiModalProjector", "Qwen2DecoderLayer", "LlamaDecoderLayer",
    "Qwen2_5_VLDecoderLayer", "Qwen3VLTextDecoderLayer", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel",
)  # fmt: skip


# ---- released sizes, random weights


def released_config(size: str, image_token_id: int = 151667) -> dict:
    """Sizes of a released InternVL-line model, for Sa2VAConfig.mllm; 26B with InternLM2 as Llama."""
    if size not in SIZES:
        raise ValueError(f"released_config: size {size!r}, expected one of {SIZES}")
    if size != "26B":
        return internvl_config(TEXT_SIZES[size], image_token_id=image_token_id)
    llama = {"model_type": "llama", "attention_bias": False}
    config = internvl_config(INTERNLM2_20B, vocabulary=VOCABULARY_20B, image_token_id=image_token_id, **llama)
    return InternVLConfig(**config | {"vision_config": config["vision_config"] | VISION_6B}).to_dict()


def random_sa2va(size: str, policy: str = "bf16") -> Sa2VA:
    """A model of a released size with random weights and a small local tokenizer, on the current default device, in
    evaluation mode: for timing. It knows no word; its vocabulary has the released number of rows."""
    tokenizer = tiny_tokenizer()
    processor = Sa2VAProcessor(ProcessorConfig(), tokenizer)
    cfg = Sa2VAConfig("internvl", released_config(size, processor.image_id), sam_config(), processor.seg_id)
    return Sa2VA(cfg, processor, POLICIES[policy]).eval()


def planned_sa2va(size: str, policy: str = "bf16") -> Sa2VA:
    """The same without storage for its parameters, to count and to plan."""
    with init_empty_weights(include_buffers=False):
        return random_sa2va(size, policy)


# ---- GiB


def weights_gib(module: nn.Module) -> float:
    """Parameters and buffers of a module, with or without storage."""
    every = [*module.parameters(), *module.buffers()]
    return sum(x.numel() * x.element_size() for x in every) / GIB


def working_gib(model: Sa2VA, tiles: int = TILES, tokens: int = TOKENS) -> float:
    """An estimate, meant to be high, of what prediction needs beside the weights: keys and values of `tokens`, and the
    largest of the activations of the three networks, which do not live at the same time. Attention is counted without
    its matrix (fused kernels); InternVL's picture encoder is counted with the outputs of all its layers."""
    text, eyes, sam = model.mllm.config.text_config, model.mllm.config.vision_config, model.sam.config
    low = model.mllm.lm_head.weight.element_size()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head * tokens * low
    reading = tokens * (8 * text.hidden_size + 4 * text.intermediate_size) * low
    internvl = model.cfg.arch == "internvl"
    patches, kept = (tiles * 1025, eyes.num_hidden_layers) if internvl else (4 * tokens, 0)
    looking = patches * ((6 + kept) * eyes.hidden_size + 2 * eyes.intermediate_size) * low
    fine = (model.sam.image_size // 4) ** 2  # positions of Hiera's first stage and of the mask logits
    width = sam.vision_config.backbone_config.embed_dim_per_stage[0]
    drawing = fine * (32 * width + 2 * sam.vision_config.fpn_hidden_size) * 4
    return (cache + max(reading, looking, drawing)) / GIB


def memory_table(sizes: Sequence[str] = SIZES, card: float = 24.0) -> str:
    """GiB of the released sizes as markdown: weights by policy, working memory, cards of `card` GiB that hold it."""
    head = ("size", "parameters", "weights, bf16 or fp16", "weights, fp32", "working", f"cards of {card:g} GiB, bf16")
    rows = [" | ".join(head), " | ".join(["---"] * len(head))]
    for size in sizes:
        low = planned_sa2va(size)
        count, full = (sum(scale * p.numel() for p in low.parameters()) for scale in (1e-9, 4 / GIB))
        cells = (
            f"{count:.3f} B",
            *(f"{x:.2f} GiB" for x in (weights_gib(low), full, working_gib(low))),
            cards(low, card),
        )
        rows.append(" | ".join([size, *map(str, cells)]))
    return "\n".join(f"| {row} |" for row in rows)


def cards(model: Sa2VA, card: float, most: int = 64) -> int:
    """Fewest devices of `card` GiB that hold weights and working memory, 0 if `most` do not."""
    room, parts = card - working_gib(model), units(model)
    return next((n for n in range(1, most) if filled(parts, [room] * n) is not None), 0)


# ---- a plan


@dataclass
class Plan:
    """places: device of each unit's modules, in the order of computation; gib: weights on each device; budgets: GiB a
    device may hold of weights; reserve: GiB kept free on each for prediction."""

    places: dict[str, str]
    gib: dict[str, float]
    budgets: dict[str, float]
    reserve: float

    def __str__(self) -> str:
        """A line per device: GiB of its budget, and the first and last of its modules."""
        lines = []
        for device, gib in self.gib.items():
            names = [name for name, place in self.places.items() if place == device]
            held = f"{names[0]} .. {names[-1]} ({len(names)} modules)" if names else "nothing"
            lines.append(
                f"{device}: {gib:.2f} of {self.budgets[device]:.2f} GiB (+ {self.reserve:.2f} kept free): {held}"
            )
        return "\n".join(lines)


def pieces(name: str, module: nn.Module) -> Iterator[str]:
    """Names of the modules that are placed one by one."""
    if type(module).__name__ in WHOLE or module._parameters or not any(True for _ in module.children()):
        yield name
        return
    for child, inner in module.named_children():
        yield from pieces(f"{name}.{child}", inner)


def units(model: Sa2VA) -> list[tuple[list[str], float]]:
    """(modules that stay together, their GiB), in the order of computation."""
    text = "mllm.model.language_model"
    last = [f"{text}.norm", "mllm.lm_head", "text_hidden_fcs", "sam"]
    last += ["tracking_decoder"] if model.tracking_decoder is not None else []
    groups: list[list[str]] = []
    for name in pieces("mllm", model.mllm):
        if name in last or name == f"{text}.rotary_emb":
            continue
        joins = groups and not any(True for _ in model.get_submodule(name).parameters())
        groups[-1].append(name) if joins else groups.append([name])
        groups[-1] += [f"{text}.rotary_emb"] if name == f"{text}.embed_tokens" else []
    groups.append(last)
    return [(names, sum(weights_gib(model.get_submodule(n)) for n in names)) for names in groups]


def filled(parts: list[tuple[list[str], float]], room: list[float]) -> list[int] | None:
    """The device of each part when devices are filled one after the other; None when they do not fit."""
    device, used, places = 0, 0.0, []
    for _, gib in parts:
        while device < len(room) and used + gib > room[device]:
            device, used = device + 1, 0.0
        if device == len(room):
            return None
        used += gib
        places.append(device)
    return places


def plan(model: Sa2VA, free: dict[str, float], reserve: float | None = None) -> Plan:
    """Devices filled in order and evenly: each to the same share of what it may hold, as small as will do.

    free: GiB of each device, in order; reserve: GiB kept free on each (default: `working_gib`). UserError when the
    weights do not fit.
    """
    reserve = working_gib(model) if reserve is None else reserve
    budgets = {device: max(gib - reserve, 0.0) for device, gib in free.items()}
    parts, total = units(model), sum(budgets.values())
    need = sum(gib for _, gib in parts)
    least = min(1.0, need / total) if total else 1.0
    for k in range(101):
        share = least + (1 - least) * k / 100
        found = filled(parts, [share * b for b in budgets.values()])
        if found is not None:
            break
    else:
        has = ", ".join(f"{device} {gib:.2f}" for device, gib in free.items())
        raise UserError(f"device map: {need:.2f} GiB of weights in whole layers, and {reserve:.2f} GiB to work with on "
                        f"each device, do not fit into {has} GiB; take more devices or a policy of 16 bits")  # fmt: skip
    devices = list(budgets)
    places = {name: devices[k] for (names, _), k in zip(parts, found, strict=True) for name in names}
    gib = {d: sum(g for (_, g), k in zip(parts, found, strict=True) if devices[k] == d) for d in devices}
    return Plan(places, gib, budgets, reserve)


# ---- placement


def free_memory(kind: str) -> dict[str, float]:
    """Free GiB of every device of a kind, as torch.device names it; 5 % are left to the allocator."""
    module = torch.get_device_module(kind)
    return {f"{kind}:{i}": 0.95 * module.mem_get_info(i)[0] / GIB for i in range(module.device_count())}


def moved(x, device: torch.device):
    """Tensors in nested tuples, lists and dicts to a device; anything else (a cache) as it is."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {k: moved(v, device) for k, v in x.items()}
    return type(x)(moved(v, device) for v in x) if type(x) in (tuple, list) else x


def bring(device: torch.device) -> Callable:
    """A forward pre-hook that brings a module's inputs to its device."""
    return lambda _, args, kwargs: (moved(args, device), moved(kwargs, device))


def place(model: Sa2VA, places: dict[str, str]) -> None:
    """Give the parameters of a model without storage their devices (uninitialised) and move its buffers; the language
    model's modules bring their inputs along from then on. ValueError for a tensor that no place covers."""
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            path = f"{name}.{key}".split(".")
            above = [".".join(path[:n]) for n in range(len(path), 0, -1)]
            device = next((torch.device(places[a]) for a in above if a in places), None)
            if device is None:
                raise ValueError(f"place: no device for {name}.{key}")
            if key in module._buffers:
                module._buffers[key] = tensor.to(device)
            else:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                module._parameters[key] = nn.Parameter(new, tensor.requires_grad)
    for name, device in places.items():
        if name.startswith("mllm."):
            model.get_submodule(name).register_forward_pre_hook(bring(torch.device(device)), with_kwargs=True)


def spread(model: Sa2VA, free: dict[str, float], say: Callable[[str], None] = print) -> None:
    """Plan, say the plan, place: for `Sa2VA.from_checkpoint(..., place=...)`, which reads the weights afterwards."""
    found = plan(model, free)
    say(f"# device map\n{found}")
    place(model, found.places)
