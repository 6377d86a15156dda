"""Sa2VA's released names against the real lists, the official tiny files and transformers' classes."""

import functools
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Sam2VideoConfig,
    Sam2VideoModel,
)

from models.sa2va_names import BijectionReport, fingerprints, fit, from_official, from_xtuner, group_of, to_official
from models.sa2va_released import internvl_config
from models.sa2va_sizes import sam_config as sam_sizes

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "sa2va"
TINY = sorted(SHARED.glob("*/official_*_hf.safetensors"))
LISTS = sorted(SHARED.glob("key_lists/*.json"))
SIZES = {  # hidden, MLP, layers, heads, key/value heads, published parameters (Sa2VA, released configurations)
    "1B": (896, 4864, 24, 14, 2, 1.163665), "2B": (1536, 8960, 28, 12, 2, 2.316157),
    "4B": (2048, 11008, 36, 16, 2, 3.941809), "8B": (3584, 18944, 28, 28, 4, 8.182606),
    "14B": (5120, 13824, 48, 40, 8, 15.369269),
}  # fmt: skip


def sam_config(state: dict[str, torch.Tensor]) -> Sam2VideoConfig:
    """The sizes that a released file's shapes tell; names and shapes need no others."""
    at = {k.removeprefix("grounding_encoder.sam2_model."): tuple(v.shape) for k, v in state.items()}
    trunk = "image_encoder.trunk."
    blocks = 1 + max(int(k.split(".")[3]) for k in at if k.startswith(f"{trunk}blocks."))
    out = [at[f"{trunk}blocks.{n}.attn.proj.weight"][0] for n in range(blocks)]
    widths = sorted(set(out))
    memory = 1 + max(int(k.split(".")[2]) for k in at if k.startswith("memory_attention.layers."))
    D = at["no_mem_embed"][-1]
    windows = [at[f"{trunk}pos_embed_window"][-1], 4, 8, 4]
    return Sam2VideoConfig(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": widths[0], "embed_dim_per_stage": widths,
                "blocks_per_stage": [out.count(w) for w in widths], "num_attention_heads_per_stage": [1, 2, 4, 8],
                "window_positional_embedding_background_size": list(at[f"{trunk}pos_embed"][-2:]),
                "window_size_per_stage": windows,
            },
            "backbone_channel_list": widths[::-1], "fpn_hidden_size": D,
        },
        prompt_encoder_config={"hidden_size": D},
        mask_decoder_config={
            "hidden_size": D, "iou_head_hidden_dim": at["sam_mask_decoder.iou_prediction_head.layers.0.weight"][0],
            "mlp_dim": at["sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight"][0],
        },
        memory_attention_hidden_size=D, memory_attention_num_layers=memory, memory_encoder_hidden_size=D,
        memory_attention_feed_forward_hidden_size=at["memory_attention.layers.0.linear1.weight"][0],
        mask_downsampler_embed_dim=D, memory_fuser_embed_dim=D,
        memory_fuser_intermediate_dim=at["memory_encoder.fuser.layers.0.pwconv1.weight"][0],
        enable_occlusion_spatial_embedding=False, enable_temporal_pos_encoding_for_object_pointers=False,
    )  # fmt: skip


def sa2va(mllm: torch.nn.Module, sam: Sam2VideoConfig, hidden: int) -> dict[str, torch.Tensor]:
    """The state dict of Sa2VA's three parts on meta."""
    with torch.device("meta"):
        fcs = torch.nn.Sequential(
            torch.nn.Linear(hidden, hidden), torch.nn.ReLU(),
            torch.nn.Linear(hidden, sam.prompt_encoder_config.hidden_size), torch.nn.Dropout(0.0),
        )  # fmt: skip
        return torch.nn.ModuleDict({"mllm": mllm, "sam": Sam2VideoModel(sam), "text_hidden_fcs": fcs}).state_dict()


def internvl(config: InternVLConfig, sam: Sam2VideoConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return sa2va(InternVLForConditionalGeneration(config), sam, config.text_config.hidden_size)


@pytest.fixture(scope="module")
def tiny():
    """[(folder, official state, target state dict)] of every tiny file."""
    if not TINY:
        pytest.skip(f"no official_*_hf.safetensors under {SHARED}")
    out = []
    for path in TINY:
        state = load_file(path)
        config = json.loads(Path(str(path).replace("_hf.safetensors", "_config.json")).read_text())
        target = internvl(InternVLConfig(**internvl_config(config, 1)), sam_config(state))
        out.append((path, state, target))
    return out


def test_the_official_tiny_files_are_a_bijection_onto_transformers_classes(tiny):
    for path, state, target in tiny:
        ours, report = from_official(state)
        fit(ours, target, report)
        assert not report.problems(), f"{path}: {report.problems()[:4]}"
        assert sorted(report.used) == sorted(state) and set(ours) == set(target)
        back = to_official(ours)
        assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)
        assert from_official(back)[0].keys() == ours.keys()
    print(f"{len(tiny)} of {len(TINY)} official files")


def test_fused_tensors_are_cut_where_the_official_code_cuts_them(tiny):
    for _, state, _ in tiny:
        ours, _ = from_official(state)
        fused = state["vision_model.encoder.layers.0.attn.qkv.weight"]
        D = fused.shape[1]
        for i, p in enumerate("qkv"):
            part = ours[f"mllm.model.vision_tower.encoder.layer.0.attention.{p}_proj.weight"]
            assert torch.equal(part, fused[i * D : (i + 1) * D])
        for i in range(4):
            point = state[f"grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.{i}.weight"]
            assert torch.equal(ours["sam.prompt_encoder.point_embed.weight"][i], point[0])


def test_training_files_are_used_whole_and_change_what_they_trained(tiny):
    seen = 0
    for path, state, target in tiny:
        base, _ = from_official({k: v.float() for k, v in state.items()})
        for file in sorted(path.parent.glob("official_*_iter.safetensors")):
            trained, seen = load_file(file), seen + 1
            ours, report = from_xtuner(trained, base, alpha=8)
            fit(ours, {k: v.float() for k, v in target.items()}, report)
            assert not report.problems() and sorted(report.used) == sorted(trained)
            touched = {group_of(k) for k in ours if not torch.equal(ours[k], base[k])}
            assert touched == {"language model", "token embeddings", "head", "projector", "text_hidden_fcs",
                               "mask decoder"}  # fmt: skip
            name = "mllm.model.language_model.layers.1.self_attn.q_proj"
            lora = "mllm.model.language_model.base_model.model.model.layers.1.self_attn.q_proj.lora_{}.default.weight"
            A, B = (trained[lora.format(x)].float() for x in "AB")
            expected = base[f"{name}.weight"] + 8 / len(A) * B @ A
            torch.testing.assert_close(ours[f"{name}.weight"], expected, rtol=0, atol=1e-6)  # one float32 product
            assert torch.equal(ours[f"{name}.bias"], base[f"{name}.bias"])
            twice, _ = from_xtuner(trained, base, alpha=16)
            assert fingerprints(twice)["language model"] != fingerprints(ours)["language model"]
            with pytest.raises(ValueError, match="alpha None"):
                from_xtuner(trained, base, alpha=None)
    print(f"{seen} training files")


@functools.cache
def real_target(size: str) -> dict[str, torch.Tensor]:
    hidden, mlp, layers, heads, kv, _ = SIZES[size]
    text = {"model_type": "qwen2", "vocab_size": 151679, "hidden_size": hidden, "intermediate_size": mlp,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
            "tie_word_embeddings": False}  # fmt: skip
    config = InternVLConfig(vision_config={"attention_bias": True}, text_config=text, tie_word_embeddings=False)
    return internvl(config, Sam2VideoConfig(**sam_sizes()))


def parameters(target: dict[str, torch.Tensor]) -> int:
    """Without the Gaussian matrix, a buffer that lies there twice."""
    return sum(v.numel() for k, v in target.items() if not k.endswith(".positional_embedding"))


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes(size):
    assert f"{parameters(real_target(size)) / 1e9:.6f}" == f"{SIZES[size][5]:.6f}"


@pytest.mark.parametrize("path", LISTS or [None], ids=lambda p: p.stem if p else "none")
def test_real_name_lists(path):
    if path is None:
        pytest.skip(f"no key_lists under {SHARED}")
    content = json.loads(path.read_text())
    names = content["names"]
    layers = len({n.split(".")[3] for n in names if n.startswith("language_model.model.layers.")})
    fits = [real_target(s) for s in SIZES if SIZES[s][2] == layers]
    fits = [t for t in fits if parameters(t) == content["total_parameters"]]
    assert len(fits) == 1, f"{path.name}: {layers} layers and {content['total_parameters']:,} parameters fit no size"
    target = fits[0]
    official = to_official(target)
    assert sorted(official) == sorted(names)
    ours, report = from_official(official)
    fit(ours, target, report)
    assert not report.problems() and sorted(report.used) == sorted(names)
    print(f"{path.name}: {len(names):,} -> {len(ours):,} tensors, {parameters(ours):,} parameters")


# ---- lines without a real file here: synthetic layouts

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip


def random_like(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=g) for k, v in target.items()}
    state["sam.prompt_encoder.shared_embedding.positional_embedding"] = state[
        "sam.shared_image_embedding.positional_embedding"
    ].clone()
    return state


def qwen(arch: str) -> dict[str, torch.Tensor]:
    text = {
        **TEXT,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    with torch.device("meta"):
        if arch == "qwen2_5_vl":
            vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
            config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
            model = Qwen2_5_VLForConditionalGeneration(config)
        else:
            vision = {"depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32,
                      "deepstack_visual_indexes": [0, 1]}  # fmt: skip
            config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
            model = Qwen3VLForConditionalGeneration(config)
    return random_like(sa2va(model, small_sam(), 32))


def small_sam() -> Sam2VideoConfig:
    return Sam2VideoConfig(
        vision_config={"backbone_config": {"model_type": "sam2_hiera_det_model", "hidden_size": 8,
                                           "embed_dim_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1, 1, 1, 1]},
                       "backbone_channel_list": [64, 32, 16, 8]},
        enable_occlusion_spatial_embedding=False, enable_temporal_pos_encoding_for_object_pointers=False,
    )  # fmt: skip


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_names_of_both_ages(arch):
    ours = qwen(arch)
    newer = to_official(ours, arch)
    assert {k.split(".")[0] for k in newer} == {"model", "text_hidden_fcs", "grounding_encoder"}
    older = {k.replace("model.model.visual.", "model.visual.").replace("model.model.language_model.", "model.model."): v
             for k, v in newer.items()}  # fmt: skip
    assert older.keys() != newer.keys() and len(older) == len(newer)
    for state in (newer, older):
        back, report = from_official(state, arch)
        assert not report.problems() and back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)
    mixed = {**older, **{k: v for k, v in newer.items() if ".language_model.layers.0." in k}}
    assert from_official(mixed, arch)[1].problems()
    lora = "mllm.model.base_model.model.model.language_model.layers.0.self_attn.v_proj.lora_{}.default.weight"
    trained = {lora.format("A"): torch.ones(2, 32), lora.format("B"): torch.ones(16, 2)}
    merged, report = from_xtuner(trained, ours, 4.0, arch)
    name = "mllm.model.language_model.layers.0.self_attn.v_proj.weight"
    assert not report.problems() and torch.equal(merged[name], ours[name] + 4 / 2 * 2)
    assert [k for k in ours if not torch.equal(ours[k], merged[k])] == [name]


def test_internlm2_becomes_llama():
    text = {**TEXT, "model_type": "llama", "tie_word_embeddings": False}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "norm_type": "rms_norm", "use_qk_norm": True}  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    ours = random_like(internvl(config, small_sam()))
    official = to_official(ours, "internlm2", heads=(4, 2))
    wqkv = official["language_model.model.layers.0.attention.wqkv.weight"]
    assert wqkv.shape == (64, 32) and "language_model.output.weight" in official
    own = "mllm.model.language_model.layers.0.self_attn.{}_proj.weight"
    heads = wqkv.reshape(2, 4, 8, 32)  # two groups of two queries, a key and a value, each 8 rows
    assert torch.equal(ours[own.format("q")][8:16], heads[0, 1]) and torch.equal(ours[own.format("k")][8:], heads[1, 2])
    assert torch.equal(ours[own.format("v")][:8], heads[0, 3])
    back, report = from_official(official, "internlm2", heads=(4, 2))
    assert not report.problems() and back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)
    with pytest.raises(ValueError, match="heads None"):
        from_official(official, "internlm2")
    assert from_official(official, "internlm2", heads=(5, 5))[1].conflicts
    lora = "mllm.model.language_model.base_model.model.model.layers.0.attention.wqkv.lora_{}.default.weight"
    trained = {lora.format("A"): torch.ones(1, 32), lora.format("B"): torch.arange(64.0)[:, None]}
    merged, report = from_xtuner(trained, ours, 1.0, "internlm2", heads=(4, 2))
    assert not report.problems()
    keys = torch.cat([torch.arange(16.0, 24), torch.arange(48.0, 56)])[:, None].expand(16, 32)  # wqkv's rows of keys
    torch.testing.assert_close(merged[own.format("k")], ours[own.format("k")] + keys)


# ---- what must not pass


def spoiled(state: dict, how: str) -> dict:
    state, decoder = dict(state), "grounding_encoder.sam2_model.sam_mask_decoder."
    if how == "missing":
        del state[f"{decoder}iou_token.weight"]
    elif how == "one of four":
        del state["grounding_encoder.sam2_model.sam_prompt_encoder.point_embeddings.2.weight"]
    elif how == "added":
        state["grounding_encoder.sam2_model.obj_ptr_tpos_proj.weight"] = torch.zeros(4, 4)
    elif how == "one more layer":
        state["language_model.model.layers.9.input_layernorm.weight"] = torch.ones(4)
    elif how == "twice":
        state["grounding_encoder.sam2_model.memory_encoder.fuser.layers.0.gamma"] = torch.ones(4)
    elif how == "reshaped":
        state["mlp1.1.weight"] = state["mlp1.1.weight"].T.contiguous()
    elif how == "uncuttable":
        state["vision_model.encoder.layers.0.attn.qkv.bias"] = torch.zeros(95)
    elif how == "not finite":
        state["text_hidden_fcs.0.bias"] = torch.full_like(state["text_hidden_fcs.0.bias"], float("nan"))
    elif how == "misspelt":
        state["language_model.model.norm.wieght"] = state.pop("language_model.model.norm.weight")
    return state


HOW = ["one more layer", "missing", "one of four", "added", "twice", "reshaped", "uncuttable", "not finite", "misspelt"]


@pytest.mark.parametrize("how", HOW)
def test_a_spoiled_file_is_in_the_report(tiny, how):
    for _, state, target in tiny:
        ours, report = from_official(spoiled(state, how))
        assert (
            how in ("one more layer", "missing", "misspelt", "reshaped", "not finite") or report.problems()
        )  # already by the names
        fit(ours, target, report)
        assert report.problems(), how


def test_swapped_tensors_change_the_fingerprint_of_their_group_alone(tiny):
    for _, state, _ in tiny:
        shape_of = {k: tuple(v.shape) for k, v in state.items()}
        common = Counter(shape_of[k] for k in state if re.search(r"memory_attention.layers.0.*proj.weight", k))
        a, b = [k for k in state if k.startswith("grounding_encoder.sam2_model.memory_attention.layers.0.")
                and shape_of[k] == common.most_common(1)[0][0]][:2]  # fmt: skip
        one, two = (fingerprints(from_official(s)[0]) for s in (state, {**state, a: state[b], b: state[a]}))
        assert {g for g in one if one[g] != two[g]} == {"SAM memory"}
        assert fingerprints({k: v.float() for k, v in from_official(state)[0].items()}) == one


def test_two_copies_that_differ_have_no_way_back(tiny):
    for _, state, _ in tiny:
        ours, _ = from_official(state)
        ours["sam.prompt_encoder.shared_embedding.positional_embedding"] = (
            ours["sam.prompt_encoder.shared_embedding.positional_embedding"] + 1
        )
        with pytest.raises(ValueError, match="two copies"):
            to_official(ours)
        with pytest.raises(ValueError, match="no place"):
            to_official({**from_official(state)[0], "sam.more": torch.zeros(1)})


LLM = "mllm.model.language_model.base_model.model."
TRAINED = {
    "unexplained": (f"{LLM}model.layers.0.self_attn.q_proj.lora_C.default.weight", (4, 4)),
    "frozen elsewhere": ("ema.text_hidden_fcs.0.weight", (4, 4)),
    "half a pair": (f"{LLM}model.layers.9.mlp.up_proj.lora_A.default.weight", (4, 4)),
    "another width": ("text_hidden_fcs.0.weight", (5, 5)),
    "another vocabulary's width": (f"{LLM}lm_head.modules_to_save.default.weight", (328, 65)),
}


@pytest.mark.parametrize("how", TRAINED)
def test_a_training_file_with_anything_else_is_in_the_report(tiny, how):
    name, shape = TRAINED[how]
    for path, state, _ in tiny:
        base, _ = from_official(state)
        for file in sorted(path.parent.glob("official_*_iter.safetensors")):
            _, report = from_xtuner({**load_file(file), name: torch.zeros(shape)}, base, 8)
            assert report.problems(), how


def test_a_report_counts(capsys):
    report = BijectionReport(used=["a"], unused=["b"], conflicts=["c", "d"])
    assert report.counts().startswith("1 source tensors used, 1 unused, 0 targets unfilled, 2 conflicts")
    assert report.problems() == ["unused source b", "conflict c", "conflict d"]
