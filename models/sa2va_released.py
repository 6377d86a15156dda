"""Configurations of released Sa2VA models <-> ours: config.json of the remote-code lines and transformers' classes.

The names of their tensors are in models/sa2va_names.py. Source: config.json of the released folders (Sa2VA, arXiv
2501.04001; InternVL; InternLM2; Qwen-VL).
"""

from transformers import InternVLConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from models.sa2va import Sa2VAConfig
from models.sa2va_names import LINES
from models.sa2va_processor import ProcessorConfig
from utils.run import UserError

LLM_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings"
).split()
VIT_KEYS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels hidden_act norm_type".split()
)
TEXT_MODELS = {"qwen2": "qwen2", "internlm2": "llama"}  # released model_type -> transformers'
QWEN_KEYS = (
    "text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip


def text_config(llm: dict) -> dict:
    """A released llm_config -> the keyword arguments of transformers' Qwen2Config or LlamaConfig."""
    if llm.get("model_type") not in TEXT_MODELS:
        raise UserError(f"llm_config: model_type {llm.get('model_type')}, expected one of {', '.join(TEXT_MODELS)}")
    out = {k: llm[k] for k in LLM_KEYS} | {"model_type": TEXT_MODELS[llm["model_type"]], "tie_word_embeddings": False}
    scaling = llm.get("rope_scaling") or {"type": "default"}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind not in ("default", "dynamic", "linear"):
        raise UserError(
            f"llm_config: rope_scaling {scaling}, expected none, dynamic or linear; not this line of models"
        )
    out["rope_parameters"] = {"rope_type": kind, "rope_theta": float(llm["rope_theta"])}
    if kind != "default":
        out["rope_parameters"]["factor"] = float(scaling["factor"])
    if out["model_type"] == "llama":
        return out | {"attention_bias": llm["bias"]}
    if llm["use_sliding_window"]:
        raise UserError("llm_config: use_sliding_window is on, expected full attention; not this line of models")
    return out


def internvl_config(config: dict, image_id: int) -> dict:
    """A released config.json of the InternVL lines -> the keyword arguments of InternVLConfig."""
    if config["ps_version"] != "v2" or config["select_layer"] != -1:
        what = f"ps_version {config['ps_version']}, select_layer {config['select_layer']}"
        raise UserError(f"config.json: {what}, expected v2 and -1; not this line of models")
    vit, ratio = config["vision_config"], config["downsample_ratio"]
    side = config.get("force_image_size") or vit["image_size"]
    vision = {k: vit[k] for k in VIT_KEYS} | {
        "layer_norm_eps": vit["layer_norm_eps"], "attention_bias": vit["qkv_bias"],
        "use_qk_norm": vit["qk_normalization"], "image_size": [side, side], "patch_size": [vit["patch_size"]] * 2,
        "layer_scale_init_value": vit["initializer_factor"],
    }  # fmt: skip
    return {
        "vision_config": vision, "text_config": text_config(config["llm_config"]), "image_token_id": image_id,
        "image_seq_length": int((side // vit["patch_size"] * ratio) ** 2), "downsample_ratio": ratio,
        "tie_word_embeddings": False,
    }  # fmt: skip


def released_config(cfg: Sa2VAConfig, line: str) -> dict:
    """Ours -> what the released config.json holds; the inverse of `released_sizes`."""
    mllm, qwen = cfg.mllm, line.startswith("qwen")
    kind = "Sa2VAChatModelQwen" if qwen else "Sa2VAChatModel"
    module = "modeling_sa2va_qwen" if qwen else "modeling_sa2va_chat"
    config = "Sa2VAChatConfigQwen" if qwen else "Sa2VAChatConfig"
    out = {
        "architectures": [kind], "model_type": "sa2va_chat", "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": f"configuration_sa2va_chat.{config}", "AutoModel": f"{module}.{kind}",
                     "AutoModelForCausalLM": f"{module}.{kind}"},
    }  # fmt: skip
    if qwen:
        return out | {k: mllm[k] for k in QWEN_KEYS if k in mllm}
    text, vit, rope = mllm["text_config"], mllm["vision_config"], mllm["text_config"]["rope_parameters"]
    scaling = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], "factor": rope["factor"]}
    model_type = "internlm2" if line == "internlm2" else "qwen2"
    name = "InternLM2ForCausalLM" if line == "internlm2" else "Qwen2ForCausalLM"
    llm = {k: text[k] for k in LLM_KEYS} | {
        "architectures": [name], "model_type": model_type, "rope_theta": rope["rope_theta"], "rope_scaling": scaling,
        "tie_word_embeddings": False,
    }  # fmt: skip
    llm |= {"bias": text["attention_bias"]} if line == "internlm2" else {"use_sliding_window": False}
    side, patch = vit["image_size"][0], vit["patch_size"][0]
    vision = {k: vit[k] for k in (*VIT_KEYS, "layer_norm_eps")} | {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "qkv_bias": vit["attention_bias"],
        "qk_normalization": vit["use_qk_norm"], "image_size": side, "patch_size": patch,
        "initializer_factor": vit["layer_scale_init_value"], "use_flash_attn": False,
    }  # fmt: skip
    return out | {
        "llm_config": llm, "vision_config": vision, "hidden_size": text["hidden_size"], "force_image_size": side,
        "downsample_ratio": mllm["downsample_ratio"], "ps_version": "v2", "select_layer": -1, "use_thumbnail": True,
        "dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 12,
        "template": "internlm2_chat" if line == "internlm2" else "qwen_chat",
    }  # fmt: skip


def line_of(config: dict, arch: str | None) -> str:
    """Line of a released config.json; arch: --arch, which wins."""
    if arch:
        return arch
    if "llm_config" in config:
        return "internlm2" if config["llm_config"].get("model_type") == "internlm2" else "internvl"
    kinds = {config.get("model_type"), *(config.get(k, {}).get("model_type") for k in QWEN_KEYS[:2])}
    found = [line for line in LINES if any(str(k).startswith(line.removesuffix("_vl")) for k in kinds)]
    if len(found) != 1:
        raise UserError(
            f"config.json: model types {sorted(map(str, kinds))} name no line; give --arch {'|'.join(LINES)}"
        )
    return found[0]


def heads_of(text: dict, line: str) -> tuple[int, int] | None:
    """(attention heads, key/value heads) where the line's fused tensors are cut by them, else None."""
    return (text["num_attention_heads"], text["num_key_value_heads"]) if line == "internlm2" else None


def released_sizes(config: dict, line: str, image_id: int) -> dict:
    """A released config.json -> the whole configuration of transformers' class, as Sa2VAConfig.mllm holds it.
    KeyError or TypeError where it is not of this line."""
    if not line.startswith("qwen"):
        return InternVLConfig(**internvl_config(config, image_id)).to_dict()
    fields = {k: config[k] for k in QWEN_KEYS if k in config} | {"tie_word_embeddings": False}
    fields["text_config"] = fields["text_config"] | {"tie_word_embeddings": False}
    return (Qwen2_5_VLConfig if line == "qwen2_5_vl" else Qwen3VLConfig)(**fields).to_dict()


def released_preprocessing(config: dict, line: str, sam_size: int, eyes: dict) -> ProcessorConfig:
    """Preprocessing of a released model; eyes: its preprocessor_config.json (Qwen). KeyError for what is missing.

    InternVL takes 1 to 12 tiles whatever config.json says: the released program sets them so.
    """
    vit = config["vision_config"]
    if not line.startswith("qwen"):
        side = config.get("force_image_size") or vit["image_size"]
        tokens = int((side // vit["patch_size"] * config["downsample_ratio"]) ** 2)
        return ProcessorConfig("internvl", tile=side, tile_tokens=tokens, sam_size=sam_size)
    sizes = {"patch": vit["patch_size"], "merge": vit["spatial_merge_size"], "sam_size": sam_size}
    return ProcessorConfig(line, mean=eyes["image_mean"], std=eyes["image_std"], **sizes)
