"""A new captioner around CLIP weights: image tower, codebook of texts and word table come from one local CLIP."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from models.clip import PRESETS, load_clip, load_tokenizer
from models.fsgr import FSGR, build_word_table, preset, vocab_sha
from models.semantic_head import build_codebook
from utils.run import UserError
from utils.weights import read_tensors


def read_table(path: Path | str) -> torch.Tensor:
    """The one tensor (K, E) of a weight file, its rows scaled to unit norm."""
    tensors = list(read_tensors(path).values())
    if len(tensors) != 1 or tensors[0].ndim != 2:
        raise UserError(f"{path}: holds {len(tensors)} tensors, expected one of shape (K, E), a row for each text")
    return F.normalize(tensors[0].float(), dim=-1)


def new_captioner(
    size: str,
    vocab: list[str],
    names: list[str],
    arch: str = "fsgr",
    clip: Path | str | None = None,
    tokenizer: Path | str | None = None,
    adapter: dict | None = None,
    word_init: str = "random",
    table: Path | str | None = None,
    **changes,
) -> FSGR:
    """size: preset of models/fsgr.py. names: texts of the codebook, used if the semantic head is on.

    clip: weights for `models.clip.load_clip`; None: tower, codebook and word table are random. tokenizer: folder of its
    vocab.json and merges.txt where they do not lie in `clip`. adapter: fields of AdapterConfig. table: file with one
    tensor (K, E), the embeddings of `names`, in place of CLIP's own of them. changes: fields of FSGRConfig.
    UserError for sizes that do not fit together.
    """
    if word_init == "clip" and clip is None:
        raise UserError("word table from CLIP: no CLIP weights are given; pass them, or start at random words")
    weights = load_clip(clip) if clip else None
    tower = weights.cfg if weights else PRESETS[size]
    side = changes.get("image_size", tower.image_size)
    if side % tower.patch:
        raise UserError(f"image size {side}: expected a multiple of the patch, {tower.patch} pixels")
    semantic = arch == "fsgr" and changes.get("semantic", True)
    cfg = preset(size, vocab, names if semantic else [], arch, **{**changes, "semantic": semantic})
    upper = {"first": tower.layers // 2, "last": tower.layers - 1}  # layers with adapters: 6..11 of ViT-B
    cfg = replace(cfg, clip=asdict(tower), adapter={**cfg.adapter, **upper, **(adapter or {})})
    model = FSGR(cfg)
    if table and semantic:
        scale = weights.logit_scale.item() if weights else model.head.log_scale.item()
        model.set_codebook(read_table(table), scale, str(table))
    if weights is None:
        return model
    model.backbone.load_vision(weights.visual.state_dict(), clip)
    if (semantic and not table) or word_init == "clip":
        encode, tokenize = weights.encode_text, load_tokenizer(tokenizer or clip, tower.context)
    if semantic and not table:
        model.set_codebook(build_codebook(encode, tokenize, names), weights.logit_scale.item(), str(clip))
    if word_init == "clip":
        model.set_word_table(build_word_table(encode, tokenize, vocab), vocab_sha(vocab))
    return model
