"""Tensor names of Sa2VA: the released HuggingFace layouts and xtuner's training files <-> ours, as pure functions.

A layout is a table of rules; a rule is a pair of name templates and is read in both directions, so the way back is the
exact inverse. Ours are the module names of `mllm` (transformers), `sam` (Sam2VideoModel) and `text_hidden_fcs`.
Three rules are no plain renaming: a fused qkv is three tensors, four point embeddings are one, and the Gaussian matrix
exists twice. No tensor is dropped, invented or cast here: what no rule explains is in the report. (Sa2VA, released
code; InternVL; SAM 2.)

Lines: internvl (InternViT + Qwen2), internlm2 (InternViT + InternLM2, whose text model becomes Llama classes),
qwen2_5_vl and qwen3_vl (two ages of names, told apart by presence).
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

LINES = ("internvl", "internlm2", "qwen2_5_vl", "qwen3_vl")
FIELDS = {
    "n": r"\d+", "d": r"\d", "w": "weight|bias", "p": "[qkv]", "r": r".+", "s": "conv_s0|conv_s1",
    "a": "self_attn|cross_attn_image|cross_attn_token_to_image|cross_attn_image_to_token",
}  # fmt: skip
GROUPS = (  # prefix of our names -> group of the fingerprint and of the audit; the first that fits
    ("mllm.model.vision_tower.", "vision encoder"), ("mllm.model.visual.merger.", "projector"),
    ("mllm.model.visual.deepstack_merger_list.", "projector"), ("mllm.model.visual.", "vision encoder"),
    ("mllm.model.multi_modal_projector.", "projector"), ("mllm.model.language_model.embed_tokens.", "token embeddings"),
    ("mllm.lm_head.", "head"), ("mllm.model.language_model.", "language model"),
    ("text_hidden_fcs.", "text_hidden_fcs"), ("sam.mask_decoder.", "mask decoder"),
    ("sam.vision_encoder.", "SAM image encoder"), ("sam.prompt_encoder.", "SAM prompt encoder"),
    ("sam.shared_image_embedding.", "SAM prompt encoder"), ("sam.", "SAM memory"),
    ("tracking_decoder.", "tracking decoder"),
)  # fmt: skip


@dataclass
class BijectionReport:
    """What became of the tensors; every list but `used` and `casts` must be empty for a file to be accepted."""

    used: list[str] = field(default_factory=list)  # source tensors that went somewhere, each once
    unused: list[str] = field(default_factory=list)  # source tensors that nothing explains
    unfilled: list[str] = field(default_factory=list)  # target tensors that nothing fills
    conflicts: list[str] = field(default_factory=list)  # wrong shapes, unequal copies, values that are not finite
    casts: list[str] = field(default_factory=list)  # dtype changes

    def problems(self) -> list[str]:
        """One line each; empty when the file is a bijection onto the target."""
        kinds = {"unused source": self.unused, "unfilled target": self.unfilled, "conflict": self.conflicts}
        return [f"{kind} {k}" for kind, names in kinds.items() for k in names]

    def counts(self) -> str:
        return (
            f"{len(self.used)} source tensors used, {len(self.unused)} unused, {len(self.unfilled)} targets unfilled, "
            f"{len(self.conflicts)} conflicts, {len(self.casts)} dtype changes"
        )


@dataclass(frozen=True)
class Rule:
    """Theirs <-> ours. kind: copy | thirds (1 <-> 3) | rows (4 <-> 1) | twice (1 <-> 2) | groups (wqkv: 1 <-> 3)."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    kind: str = "copy"


# ---- the tables


def renamed(prefix: str, new_prefix: str, pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    return [Rule((prefix + a,), (new_prefix + b,)) for a, b in pairs]


def mlp3(theirs: str, ours: str) -> list[tuple[str, str]]:
    """The three layers of a SAM MLP."""
    places = enumerate(("proj_in", "layers.0", "proj_out"))
    return [(f"{theirs}.layers.{i}.{{w}}", f"{ours}.{name}.{{w}}") for i, name in places]


def attention(theirs: str, ours: str) -> list[tuple[str, str]]:
    places = {"{p}_proj": "{p}_proj", "out_proj": "o_proj"}
    return [(f"{theirs}.{a}.{{w}}", f"{ours}.{b}.{{w}}") for a, b in places.items()]


def sam_rules() -> list[Rule]:
    trunk, ours = "image_encoder.trunk.", "vision_encoder.backbone."
    same = "pos_embed pos_embed_window blocks.{n}.attn.qkv.{w} blocks.{n}.attn.proj.{w} blocks.{n}.proj.{w}".split()
    pairs = [
        *((trunk + k, ours + k) for k in same),
        (trunk + "patch_embed.proj.{w}", ours + "patch_embed.projection.{w}"),
        (trunk + "blocks.{n}.norm{d}.{w}", ours + "blocks.{n}.layer_norm{d}.{w}"),
        (trunk + "blocks.{n}.mlp.layers.0.{w}", ours + "blocks.{n}.mlp.proj_in.{w}"),
        (trunk + "blocks.{n}.mlp.layers.1.{w}", ours + "blocks.{n}.mlp.proj_out.{w}"),
        ("image_encoder.neck.convs.{n}.conv.{w}", "vision_encoder.neck.convs.{n}.{w}"),
    ]
    encoder = "sam_prompt_encoder."
    masks = {0: "conv1", 1: "layer_norm1", 3: "conv2", 4: "layer_norm2", 6: "conv3"}
    pairs += [(f"{encoder}{k}.weight", f"prompt_encoder.{k}.weight") for k in ("no_mask_embed", "not_a_point_embed")]
    masks = {f"mask_downscaling.{i}": f"mask_embed.{k}" for i, k in masks.items()}
    pairs += [(f"{encoder}{a}.{{w}}", f"prompt_encoder.{b}.{{w}}") for a, b in masks.items()]
    points = tuple(f"grounding_encoder.sam2_model.{encoder}point_embeddings.{i}.weight" for i in range(4))
    gauss = f"grounding_encoder.sam2_model.{encoder}pe_layer.positional_encoding_gaussian_matrix"
    copies = tuple(
        f"sam.{k}.positional_embedding" for k in ("shared_image_embedding", "prompt_encoder.shared_embedding")
    )
    return [
        *renamed("grounding_encoder.sam2_model.", "sam.", pairs + memory_pairs() + decoder_pairs()),
        Rule(points, ("sam.prompt_encoder.point_embed.weight",), "rows"),
        Rule((gauss,), copies, "twice"),
    ]


def memory_pairs() -> list[tuple[str, str]]:
    """Memory attention, memory encoder and the single tensors of SAM 2."""
    down, fuser = "memory_encoder.mask_downsampler.", "memory_encoder.memory_fuser.layers.{n}."
    their_fuser, layer = "memory_encoder.fuser.layers.{n}.", "memory_attention.layers.{n}."
    return [
        ("no_mem_embed", "no_memory_embedding"), ("no_mem_pos_enc", "no_memory_positional_encoding"),
        ("maskmem_tpos_enc", "memory_temporal_positional_encoding"), ("no_obj_ptr", "no_object_pointer"),
        *mlp3("obj_ptr_proj", "object_pointer_proj"),
        *attention(layer + "{a}", layer + "{a}"),
        *((k, k) for k in (layer + "linear{d}.{w}", "mask_downsample.{w}")),
        (layer + "norm{d}.{w}", layer + "layer_norm{d}.{w}"),
        ("memory_attention.norm.{w}", "memory_attention.layer_norm.{w}"),
        *((f"{down}encoder.{3 * i}.{{w}}", f"{down}layers.{i}.conv.{{w}}") for i in range(4)),
        *((f"{down}encoder.{3 * i + 1}.{{w}}", f"{down}layers.{i}.layer_norm.{{w}}") for i in range(4)),
        (down + "encoder.12.{w}", down + "final_conv.{w}"),
        ("memory_encoder.pix_feat_proj.{w}", "memory_encoder.feature_projection.{w}"),
        ("memory_encoder.out_proj.{w}", "memory_encoder.projection.{w}"),
        (their_fuser + "g_weight", fuser + "scale"), (their_fuser + "dwconv.{w}", fuser + "depthwise_conv.{w}"),
        (their_fuser + "norm.{w}", fuser + "layer_norm.{w}"),
        (their_fuser + "pwconv{d}.{w}", fuser + "pointwise_conv{d}.{w}"),
    ]  # fmt: skip


def decoder_pairs() -> list[tuple[str, str]]:
    """SAM 2's mask decoder, with the two convolutions of its fine features."""
    theirs, ours = "sam_mask_decoder.", "mask_decoder."
    layer, last = "transformer.layers.{n}.", "transformer.final_attn_token_to_image"
    upscaling = {0: "upscale_conv1", 1: "upscale_layer_norm", 3: "upscale_conv2"}
    pairs = [(f"{token}.weight", f"{token}.weight") for token in ("iou_token", "mask_tokens", "obj_score_token")]
    pairs += [("{s}.{w}", "{s}.{w}"), *attention(layer + "{a}", layer + "{a}"), *attention(last, last)]
    inner = {"norm{d}": "layer_norm{d}", "mlp.layers.0": "mlp.proj_in", "mlp.layers.1": "mlp.proj_out"}
    pairs += [(f"{layer}{a}.{{w}}", f"{layer}{b}.{{w}}") for a, b in inner.items()]
    pairs += [("transformer.norm_final_attn.{w}", "transformer.layer_norm_final_attn.{w}")]
    pairs += [(f"output_upscaling.{i}.{{w}}", f"{name}.{{w}}") for i, name in upscaling.items()]
    for name in ("output_hypernetworks_mlps.{n}", "iou_prediction_head", "pred_obj_score_head"):
        pairs += mlp3(name, name)
    return [(theirs + a, ours + b) for a, b in pairs]


def intern_vit_rules() -> list[Rule]:
    """InternViT (300M: layer norms and biases; 6B: RMS norms, q and k norms, no bias of qkv) and the projector."""
    theirs, ours = "encoder.layers.{n}.", "encoder.layer.{n}."
    pairs = [
        ("embeddings.class_embedding", "embeddings.cls_token"),
        ("embeddings.position_embedding", "embeddings.position_embeddings"),
        ("embeddings.patch_embedding.{w}", "embeddings.patch_embeddings.projection.{w}"),
        (theirs + "attn.proj.{w}", ours + "attention.projection_layer.{w}"),
        (theirs + "attn.{p}_norm.{w}", ours + "attention.{p}_norm.{w}"),
        (theirs + "norm1.{w}", ours + "layernorm_before.{w}"),
        (theirs + "norm2.{w}", ours + "layernorm_after.{w}"),
        (theirs + "mlp.fc{d}.{w}", ours + "mlp.fc{d}.{w}"),
        (theirs + "ls{d}", ours + "lambda_{d}"),
    ]
    tower, projector = "mllm.model.vision_tower.", "mllm.model.multi_modal_projector."
    qkv = tuple(f"{tower}{ours}attention.{p}_proj.{{w}}" for p in "qkv")
    mlp1 = [("0.{w}", "layer_norm.{w}"), ("1.{w}", "linear_1.{w}"), ("3.{w}", "linear_2.{w}")]
    return [
        *renamed("vision_model.", tower, pairs),
        Rule((f"vision_model.{theirs}attn.qkv.{{w}}",), qkv, "thirds"),
        *renamed("mlp1.", projector, mlp1),
    ]


def internlm2_rules() -> list[Rule]:
    """InternLM2's decoder under the names of the Llama classes."""
    theirs, ours = "language_model.model.layers.{n}.", "mllm.model.language_model.layers.{n}."
    pairs = [
        ("attention.wo.{w}", "self_attn.o_proj.{w}"), ("feed_forward.w1.{w}", "mlp.gate_proj.{w}"),
        ("feed_forward.w3.{w}", "mlp.up_proj.{w}"), ("feed_forward.w2.{w}", "mlp.down_proj.{w}"),
        ("attention_norm.{w}", "input_layernorm.{w}"), ("ffn_norm.{w}", "post_attention_layernorm.{w}"),
    ]  # fmt: skip
    top = [
        ("model.tok_embeddings.weight", "mllm.model.language_model.embed_tokens.weight"),
        ("model.norm.weight", "mllm.model.language_model.norm.weight"),
        ("output.weight", "mllm.lm_head.weight"),
    ]
    qkv = tuple(f"{ours}self_attn.{p}_proj.{{w}}" for p in "qkv")
    return [
        *renamed(theirs, ours, pairs),
        *renamed("language_model.", "", top),
        Rule((theirs + "attention.wqkv.{w}",), qkv, "groups"),
    ]


def rules_of(arch: str, older: bool = False) -> list[Rule]:
    """The whole table of one line. older: Qwen names of transformers before the text model moved down."""
    if arch not in LINES:
        raise ValueError(f"arch {arch!r}: expected one of {', '.join(LINES)}")
    shared = [*renamed("", "", [("text_hidden_fcs.{n}.{w}", "text_hidden_fcs.{n}.{w}")]), *sam_rules()]
    if arch == "internvl":
        text = [("model.{r}", "mllm.model.language_model.{r}"), ("lm_head.weight", "mllm.lm_head.weight")]
        return [*shared, *intern_vit_rules(), *renamed("language_model.", "", text)]
    if arch == "internlm2":
        return [*shared, *intern_vit_rules(), *internlm2_rules()]
    places = [("visual.{r}", "model.visual.{r}"), ("model.{r}", "model.language_model.{r}")]
    if not older:
        places = [(f"model.{k}.{{r}}", f"model.{k}.{{r}}") for k in ("visual", "language_model")]
    return [*shared, *renamed("model.", "mllm.", [*places, ("lm_head.weight", "lm_head.weight")])]


# ---- one table, both directions


def pattern(template: str) -> re.Pattern:
    """'blocks.{n}.{w}' -> a pattern that binds n and w."""
    parts = re.split(r"\{(\w)\}", template)
    return re.compile("".join(re.escape(p) if i % 2 == 0 else f"(?P<{p}>{FIELDS[p]})" for i, p in enumerate(parts)))


def plan(names: Iterable[str], rules: list[Rule], forward: bool) -> tuple[list[tuple], BijectionReport]:
    """Every name to the one rule that fits it: [(kind, source names, target names)]. Names that no rule fits are
    `unused`; of a rule that wants several sources, those not there are `unfilled` and the others `unused`."""
    sides = [(rule, rule.theirs if forward else rule.ours, rule.ours if forward else rule.theirs) for rule in rules]
    known = [(pattern(t), k, i) for k, (_, source, _) in enumerate(sides) for i, t in enumerate(source)]
    report, found = BijectionReport(), {}  # (rule, bindings) -> {place in the rule: name}
    for name in names:
        fits = [(k, i, m.groupdict()) for p, k, i in known if (m := p.fullmatch(name))]
        if len(fits) != 1:
            report.unused.append(name)
            continue
        k, i, bound = fits[0]
        found.setdefault((k, tuple(sorted(bound.items()))), {})[i] = name
    moves = []
    for (k, bound), members in found.items():
        rule, source, target = sides[k]
        expected = [t.format(**dict(bound)) for t in source]
        if len(members) < len(expected):
            report.unfilled += [name for name in expected if name not in members.values()]
            report.unused += list(members.values())
            continue
        report.used += expected
        moves.append((rule.kind, expected, [t.format(**dict(bound)) for t in target]))
    return moves, report


def moved(kind: str, forward: bool, tensors: list[torch.Tensor], heads) -> list[torch.Tensor]:
    """The target tensors of one move, theirs -> ours when forward. ValueError says what is off.

    heads: (attention heads, key/value heads), for wqkv.
    """
    first = tensors[0]
    if kind == "thirds":
        if forward and first.shape[0] % 3:
            raise ValueError(f"{tuple(first.shape)} has no three equal parts")
        return [t.clone() for t in first.chunk(3)] if forward else [torch.cat(tensors)]
    if kind == "rows":
        return [torch.cat(tensors)] if forward else [t.clone() for t in first.split(1)]
    if kind == "twice":
        if not forward and not first.is_meta and not torch.equal(first, tensors[1]):
            raise ValueError("the two copies of the Gaussian matrix differ")
        return [first, first.clone()] if forward else [first]
    if kind == "groups":
        return split_wqkv(first, heads) if forward else [join_wqkv(tensors, heads)]
    return [first]


def split_wqkv(wqkv: torch.Tensor, heads: tuple[int, int]) -> list[torch.Tensor]:
    """wqkv ((H + 2K) d, D) -> q (H d, D), k (K d, D), v (K d, D): K groups of H/K queries, a key and a value."""
    H, K = heads
    if wqkv.shape[0] % (H + 2 * K):
        raise ValueError(f"wqkv {tuple(wqkv.shape)} is not made of {H} + 2 x {K} heads")
    x = wqkv.unflatten(0, (K, H // K + 2, -1))  # (K, H/K + 2, d, D)
    return [x[:, :-2].flatten(0, 2), x[:, -2].flatten(0, 1), x[:, -1].flatten(0, 1)]


def join_wqkv(qkv: list[torch.Tensor], heads: tuple[int, int]) -> torch.Tensor:
    """The inverse of `split_wqkv`."""
    H, K = heads
    q, k, v = qkv[0].unflatten(0, (K, H // K, -1)), qkv[1].unflatten(0, (K, 1, -1)), qkv[2].unflatten(0, (K, 1, -1))
    return torch.cat([q, k, v], dim=1).flatten(0, 2)  # (K, H/K + 2, d, D) -> ((H + 2K) d, D)


def translated(state: dict, rules: list[Rule], forward: bool, heads) -> tuple[dict, BijectionReport]:
    moves, report = plan(state, rules, forward)
    out = {}
    for kind, sources, targets in moves:
        try:
            values = moved(kind, forward, [state[k] for k in sources], heads)
        except (ValueError, RuntimeError) as e:
            report.conflicts.append(f"{' + '.join(sources)}: {str(e).splitlines()[0]}")
            continue
        out.update(zip(targets, values, strict=True))
    return out, report


def check_heads(arch: str, heads: tuple[int, int] | None) -> None:
    if arch == "internlm2" and (heads is None or heads[1] < 1 or heads[0] % heads[1]):
        raise ValueError(f"heads {heads}: internlm2's wqkv is split by (attention heads, key/value heads); give them")


def is_older(names: Iterable[str]) -> bool:
    """Whether Qwen's names are those from before its text and vision models moved under one more `model.`"""
    return not any(k.startswith(("model.model.language_model.", "model.model.visual.")) for k in names)


def with_g_weight(name: str) -> str:
    """The memory fuser's scale has two names in the wild, gamma and g_weight."""
    return re.sub(r"(\.memory_encoder\.fuser\.layers\.\d+)\.gamma$", r"\1.g_weight", name)


def from_official(
    state: dict[str, torch.Tensor], arch: str = "internvl", heads: tuple[int, int] | None = None
) -> tuple[dict[str, torch.Tensor], BijectionReport]:
    """A released Sa2VA's state dict -> ours, dtypes kept; meta tensors work as well.

    heads: (attention heads, key/value heads) of the language model, for internlm2 only. The caller checks
    `report.problems()` and then, with `fit`, the names and shapes of the model.
    """
    check_heads(arch, heads)
    state = {k if (new := with_g_weight(k)) in state else new: v for k, v in state.items()}
    return translated(state, rules_of(arch, is_older(state)), True, heads)


def to_official(
    state: dict[str, torch.Tensor], arch: str = "internvl", heads: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """Ours -> the released layout, the exact inverse of `from_official` (Qwen: the newer names). ValueError lists what
    has no place there."""
    check_heads(arch, heads)
    official, report = translated(state, rules_of(arch), False, heads)
    if report.problems():
        raise ValueError(f"{len(report.problems())} tensors have no place in {arch}'s layout: {report.problems()[:4]}")
    return official


# ---- training files of xtuner


def from_xtuner(
    state: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    alpha: float | None,
    arch: str = "internvl",
    heads: tuple[int, int] | None = None,
) -> tuple[dict[str, torch.Tensor], BijectionReport]:
    """An iter_*.pth state dict over `base` (our names) -> ours: LoRA merged, W + alpha / r * B A, in float32 and then
    the base's dtype; everything else replaced.

    alpha is not in the file and never guessed: ValueError without it where there is LoRA. r is A's first dimension.
    Token embeddings and head may bring another number of rows than the base; nothing else may change its shape.
    """
    check_heads(arch, heads)
    whole, pairs, names, report = {}, {}, {}, BijectionReport()
    for name, value in state.items():
        plain = released_name(name, arch)
        lora = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", plain)
        if lora:
            plain = lora[1] + ".weight"
            pairs.setdefault(plain, {})[lora[2]] = value
        elif plain in whole:
            report.conflicts.append(f"{name}: the file holds {plain} twice")
        else:
            whole[plain] = value
        names.setdefault((plain, lora is not None), []).append(name)
    if pairs and (alpha is None or not 0 < alpha < float("inf")):
        raise ValueError(
            f"alpha {alpha}: the file holds {len(pairs)} LoRA pairs and not their alpha; give a number > 0"
        )
    deltas = {}
    for plain, pair in pairs.items():
        if len(pair) < 2 or pair["A"].ndim != 2 or pair["B"].shape[1:] != pair["A"].shape[:1]:
            report.conflicts.append(
                f"{plain}: LoRA {[(k, tuple(v.shape)) for k, v in sorted(pair.items())]} is no pair"
            )
            continue
        deltas[plain] = alpha / pair["A"].shape[0] * (pair["B"].float() @ pair["A"].float())
    rules, out = rules_of(arch, is_older((*whole, *pairs))), dict(base)
    for part, is_lora in ((whole, False), (deltas, True)):
        ours, found = translated(part, rules, True, heads)
        report.unused += [n for k in found.unused for n in names[k, is_lora]]
        report.unfilled += found.unfilled
        report.conflicts += found.conflicts
        report.used += [n for k in found.used for n in names[k, is_lora]]
        for name, value in ours.items():
            put(out, name, value, is_lora, report)
    return out, report


def released_name(name: str, arch: str) -> str:
    """xtuner's name of a trained tensor -> the released name it ends up in (LoRA's own ending kept)."""
    plain = name.replace(".modules_to_save.default.", ".").replace(".base_model.model.", ".")
    outer = "mllm." if arch.startswith("qwen") else "mllm.model."
    return with_g_weight(plain.removeprefix(outer) if plain.startswith("mllm.model.") else plain)


def put(out: dict, name: str, value: torch.Tensor, add: bool, report: BijectionReport) -> None:
    """Add to, or replace, out[name]; what does not fit is a conflict. Only text_hidden_fcs may be new in a base."""
    if name not in out and (add or group_of(name) != "text_hidden_fcs"):
        report.conflicts.append(f"{name} {tuple(value.shape)}: trained, but the base has no such tensor")
        return
    if name in out:
        shape, rows = tuple(out[name].shape), group_of(name) in ("token embeddings", "head") and not add
        if tuple(value.shape)[rows:] != shape[rows:]:
            report.conflicts.append(f"{name} is {tuple(value.shape)}, the base's {shape}")
            return
    if not add:
        out[name] = value
        return
    merged = out[name].float() + value
    out[name] = merged.to(out[name].dtype)
    if merged.dtype != out[name].dtype:
        report.casts.append(f"{name}: {merged.dtype} -> {out[name].dtype}")


# ---- checks


def fit(ours: dict[str, torch.Tensor], target: dict[str, torch.Tensor], report: BijectionReport) -> None:
    """Add to the report what keeps `ours` from being a bijection onto `target` (a state dict, may lie on meta): names,
    shapes, values that are not finite."""
    report.unfilled += [f"{k} {tuple(v.shape)}" for k, v in target.items() if k not in ours]
    report.unused += [f"{k} {tuple(v.shape)}" for k, v in ours.items() if k not in target]
    for name in (k for k in target if k in ours):
        value = ours[name]
        if value.shape != target[name].shape:
            report.conflicts.append(f"{name} is {tuple(value.shape)}, expected {tuple(target[name].shape)}")
        elif value.is_floating_point() and not value.is_meta and not value.isfinite().all():
            report.conflicts.append(f"{name} is not finite")


def group_of(name: str) -> str:
    """Group of one of our names. ValueError for a name that is not Sa2VA's."""
    for prefix, group in GROUPS:
        if name.startswith(prefix):
            return group
    raise ValueError(f"{name} belongs to no group of Sa2VA")


def fingerprints(ours: dict[str, torch.Tensor]) -> dict[str, str]:
    """{group: 16 hex digits of SHA-256 over names, shapes and values}. Values count as float32, so a cast that loses
    nothing keeps the fingerprint; two tensors swapped do not."""
    digests = {}
    for name in sorted(ours):
        digest = digests.setdefault(group_of(name), hashlib.sha256())
        digest.update(f"{name} {tuple(ours[name].shape)}\n".encode())
        digest.update(ours[name].detach().float().contiguous().numpy().data)
    return {group: d.hexdigest()[:16] for group, d in digests.items()}
