"""LoRA on Sa2VA's language model: what is trained, its precision, adapter folders, merging."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.sa2va import Sa2VA
from models.sa2va_lora import (
    ABOUT,
    BESIDE_LORA,
    ROWS,
    WEIGHTS,
    LoraSpec,
    add_lora,
    base_files,
    check_precision,
    fill,
    is_adapter,
    new_rows,
    open_sa2va,
    read_adapter,
    save_adapter,
    train_groups,
)
from models.sa2va_processor import ARCHS
from models.sa2va_sizes import tiny_sa2va
from utils.run import UserError

SIZES = {"sam_size": 128, "neck": 64, "max_tiles": 1}
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
ASK = "Please segment the blood vessel."


def with_lora(model: Sa2VA, rank: int = 4) -> LoraSpec:
    spec = LoraSpec(rank, 2.0 * rank, 0.0, new_rows(model))
    add_lora(model, spec)
    return spec


def outputs(model: Sa2VA) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden-state logits of a whole sample, and its mask logits."""
    masks = np.zeros((1, 60, 80), bool)
    batch = model.processor.collate([model.processor.encode(IMAGE, ASK, "It is [SEG].", masks)])
    with model.evaluating():
        return model.mllm.lm_head(model.hidden(batch)), model(batch)["mask_logits"][0]


def disturb(model: Sa2VA) -> None:
    """Every trained tensor away from where it starts."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=g)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "ckpt"
    tiny_sa2va(**SIZES).save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """(folder of an adapter, the live model it was saved from)"""
    model, folder = Sa2VA.from_checkpoint(base), tmp_path_factory.mktemp("adapter") / "step_000001"
    spec = with_lora(model)
    train_groups(model, BESIDE_LORA)
    disturb(model)
    tensors = {k: p for k, p in model.named_parameters() if p.requires_grad}
    about = {"folder": str(base), "sha256": base_files(base)}
    save_adapter(folder, tensors, spec, about, model.config_dict(), model.processor.save)
    return folder, model


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_trained(arch):
    model = tiny_sa2va(arch=arch, **SIZES)
    before = outputs(model)
    D, vocabulary = model.mllm.get_input_embeddings().weight.shape[1], len(model.processor.tokenizer)
    spec = with_lora(model)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, outputs(model), strict=True)), "starts at zero"
    counts = train_groups(model, BESIDE_LORA)
    assert len(spec.rows) == 5 and counts["new token rows"] == 2 * 5 * D < 2 * vocabulary * D
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    layers = {re.sub(r"\.lora_.*", "", n) for n in names if ".lora_" in n}
    assert len(layers) == 7 * model.mllm.config.text_config.num_hidden_layers
    assert all(n.startswith("mllm.model.language_model.layers.") for n in layers), "not in the vision encoder"
    rest = [n for n in names if not is_adapter(n)]
    assert not any("iou_prediction_head" in n or "embed_tokens" in n or "vision" in n for n in rest)
    assert {"projector", "text_hidden_fcs", "mask decoder", "LoRA", "new token rows"} == set(counts)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_only_the_new_rows_move(base):
    model = Sa2VA.from_checkpoint(base)
    spec = with_lora(model)
    train_groups(model, ())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    batch = model.processor.collate([model.processor.encode(IMAGE, ASK, "It is [SEG].", np.ones((1, 60, 80), bool))])
    old = model.mllm.get_input_embeddings().weight.clone(), model.mllm.lm_head.weight.clone()
    for _ in range(2):
        model(batch)["loss"].backward()
        optimizer.step()
    deltas = {k: v for k, v in model.state_dict().items() if k.endswith(ROWS)}
    assert len(deltas) == 2
    for name, start in zip(sorted(deltas, key=lambda k: "lm_head" in k), old, strict=True):
        moved = (deltas[name] - start[spec.rows]).abs().amax(1) > 0
        assert moved[spec.rows.index(model.processor.seg_id)], name
        base_weight = model.state_dict()[name.replace(ROWS, ".token_adapter.base_layer.weight")]
        assert torch.equal(base_weight, start), "the table itself stays"


def test_frozen_parts_are_never_upcast(base):
    model = Sa2VA.from_checkpoint(base, "bf16")
    with_lora(model)
    train_groups(model, BESIDE_LORA)
    check_precision(model, "bf16")
    kinds = {(p.requires_grad, p.dtype) for n, p in model.named_parameters() if n.startswith("mllm.")}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    with torch.autocast("cpu", torch.bfloat16):
        batch = model.processor.collate(
            [model.processor.encode(IMAGE, ASK, "It is [SEG].", np.ones((1, 60, 80), bool))]
        )
        model(batch)["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.mllm.model.vision_tower.float()
    with pytest.raises(ValueError, match="frozen and torch.float32, expected torch.bfloat16"):
        check_precision(model, "bf16")


# ---- files


def test_merged_and_live_agree(trained):
    """Within 1e-5 at logits of about 1; names and shapes are those of the plain model."""
    folder, live = trained
    merged = open_sa2va(folder)
    assert list(merged.state_dict()) == list(tiny_sa2va(**SIZES).state_dict())
    for a, b in zip(outputs(live), outputs(merged), strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max())), "tolerance 1e-5 of the largest logit"
    plain = outputs(Sa2VA.from_checkpoint(json.loads((folder / ABOUT).read_text())["base"]["folder"]))
    assert (plain[0] - outputs(merged)[0]).abs().max() > 0.1, "the adapter does something"


def test_an_adapter_is_read_back_as_it_was(trained):
    folder, live = trained
    tensors, spec, known = read_adapter(folder)
    again = Sa2VA.from_checkpoint(known["folder"])
    add_lora(again, spec)
    train_groups(again, BESIDE_LORA)
    fill(again, tensors, folder)
    one, two = live.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert (folder / "preprocess.json").is_file() and (folder / "tokenizer").is_dir()
    small = sum(v.numel() for v in tensors.values())
    assert small == sum(p.numel() for p in live.parameters() if p.requires_grad)


def test_another_base_is_refused(trained, base, tmp_path):
    folder, _ = trained
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert read_adapter(folder, other)[2]["folder"] == str(other), "the same weights elsewhere are accepted"
    state = load_file(other / "model.safetensors")
    state["mllm.lm_head.weight"][0, 0] += 1
    save_file(state, other / "model.safetensors")
    with pytest.raises(UserError, match="trained on other weights"):
        open_sa2va(folder, base=other)
    with pytest.raises(UserError, match="is not there"):
        open_sa2va(folder, base=tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["missing", "added", "reshaped", "nan", "rank", "json"])
def test_damage_is_refused(trained, tmp_path, damage):
    folder = tmp_path / "adapter"
    shutil.copytree(trained[0], folder)
    state, about = load_file(folder / WEIGHTS), json.loads((folder / ABOUT).read_text())
    name = next(k for k in state if ".lora_A" in k)
    if damage == "missing":
        del state[name.replace(".lora_A", ".lora_B")]
    elif damage == "added":
        state["mllm.nothing.weight"] = torch.zeros(1)
    elif damage == "reshaped":
        state[name] = state[name][:, 1:].contiguous()
    elif damage == "nan":
        state[name][0, 0] = float("nan")
    elif damage == "rank":
        about["rank"] = 0
    save_file(state, folder / WEIGHTS)
    (folder / ABOUT).write_text(json.dumps(about) if damage != "json" else "{")
    with pytest.raises(UserError, match=re.escape(str(folder))):
        open_sa2va(folder)


def test_an_existing_folder_is_kept(trained):
    folder, live = trained
    with pytest.raises(UserError, match="exists already"):
        save_adapter(folder, {}, LoraSpec(), {}, {}, live.processor.save)
    with pytest.raises(ValueError, match="rank 0"):
        LoraSpec(rank=0)
    assert not list(folder.parent.glob(".tmp-*"))
