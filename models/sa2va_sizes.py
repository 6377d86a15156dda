"""Sizes of Sa2VA models as transformers configurations, and a tiny random model that needs no file.

The released line: InternViT-300M or 6B, Qwen2 or InternLM2 text models (these as Llama), SAM 2.0 large at 1024 px.
Source: configurations of the released models (Sa2VA, arXiv 2501.04001; InternVL; SAM 2).
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    InternVLConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    Sam2VideoConfig,
)

from models.sa2va import Sa2VA, Sa2VAConfig
from models.sa2va_processor import (
    ABSENT_ANSWERS,
    ANSWERS,
    BLOCKS,
    END,
    NEW_TOKENS,
    QUESTIONS,
    ProcessorConfig,
    Sa2VAProcessor,
)

TEXT_SIZES = {  # hidden, feed-forward, layers, heads, key/value heads of the text models by released size
    "1B": (896, 4864, 24, 14, 2), "4B": (2048, 11008, 36, 16, 2), "2B": (1536, 8960, 28, 12, 2),
    "8B": (3584, 18944, 28, 28, 4), "14B": (5120, 13824, 48, 40, 8),
}  # fmt: skip
VISION_300M = (1024, 4096, 24, 16)  # hidden, feed-forward, layers, heads


def sam_config(
    image: int = 1024,
    widths: tuple[int, ...] = (144, 288, 576, 1152),
    heads: tuple[int, ...] = (2, 4, 8, 16),
    blocks: tuple[int, ...] = (2, 6, 36, 4),
    windows: tuple[int, ...] = (8, 4, 16, 8),
    global_blocks: tuple[int, ...] = (23, 33, 43),
    neck: int = 256,
    memory_layers: int = 4,
    memory_hidden: int = 2048,
    decoder_hidden: int = 2048,
    iou_hidden: int = 256,
) -> dict:
    """SAM 2.0 with the settings Sa2VA uses, for Sam2VideoConfig; the default is SAM 2.0 large. image: R, px."""
    sizes = [[image // s, image // s] for s in (4, 8, 16)]
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": widths[0], "num_attention_heads": heads[0],
        "image_size": [image, image], "blocks_per_stage": list(blocks), "embed_dim_per_stage": list(widths),
        "num_attention_heads_per_stage": list(heads), "window_size_per_stage": list(windows),
        "global_attention_blocks": list(global_blocks), "window_positional_embedding_background_size": [7, 7],
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "backbone_config": backbone, "backbone_feature_sizes": sizes,
        "backbone_channel_list": list(widths[::-1]), "fpn_hidden_size": neck,
    }  # fmt: skip
    config = Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": neck, "image_size": image, "patch_size": 16},
        mask_decoder_config={"hidden_size": neck, "mlp_dim": decoder_hidden, "iou_head_hidden_dim": iou_hidden},
        image_size=image, enable_occlusion_spatial_embedding=False,
        enable_temporal_pos_encoding_for_object_pointers=False, memory_attention_hidden_size=neck,
        memory_attention_num_layers=memory_layers, memory_attention_feed_forward_hidden_size=memory_hidden,
        memory_attention_rope_feat_sizes=sizes[-1], memory_encoder_hidden_size=neck, memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=neck, memory_fuser_embed_dim=neck, memory_fuser_intermediate_dim=4 * neck,
    )  # fmt: skip
    return config.to_dict()


def text_config(size: tuple[int, ...], vocabulary: int, **more) -> dict:
    """hidden, feed-forward, layers, heads, key/value heads -> what the text models of all lines share; head untied."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shared = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": vocabulary}
    return dict(zip(names, size, strict=True)) | shared | more


def internvl_config(
    text: tuple[int, ...] = TEXT_SIZES["8B"],
    vision: tuple[int, ...] = VISION_300M,
    tile: int = 448,
    vocabulary: int = 151679,
    image_token_id: int = 151667,
    max_position_embeddings: int = 32768,
    **more_text,
) -> dict:
    """InternViT (300M kind) + Qwen2, for InternVLConfig; tile: px. more_text: other fields of the text model."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision_config = dict(zip(names, vision, strict=True)) | {
        "model_type": "internvl_vision", "attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6, "image_size": [tile, tile], "patch_size": [14, 14],
        "use_absolute_position_embeddings": True, "use_mean_pooling": True,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6}
    fields = {"model_type": "qwen2", "rope_parameters": rope, "max_position_embeddings": max_position_embeddings}
    text_fields = text_config(text, vocabulary, **fields | more_text)
    return InternVLConfig(
        vision_config=vision_config, text_config=text_fields, image_token_id=image_token_id, tie_word_embeddings=False
    ).to_dict()


def qwen_config(
    arch: str, text: tuple[int, ...], vision: tuple[int, ...], vocabulary: int, ids: dict, patch: int
) -> dict:
    """Qwen2.5-VL or Qwen3-VL of any size; vision: hidden, feed-forward, layers, heads; ids: image_token_id, ..."""
    head = text[0] // text[3]
    thirds = [head // 2 - 2 * (head // 6), head // 6, head // 6]  # of the rotary channels: time, height, width
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": thirds}
    no_ids = {"bos_token_id": None, "eos_token_id": None}  # the processor's tokenizer has them
    fields = text_config(text, vocabulary, rope_parameters=rope, max_position_embeddings=4096, **no_ids)
    names = ("hidden_size", "intermediate_size", "depth", "num_heads")
    eyes = dict(zip(names, vision, strict=True)) | {"out_hidden_size": text[0], "patch_size": patch}
    if arch == "qwen2_5_vl":
        eyes |= {"window_size": 4 * patch, "fullatt_block_indexes": [vision[2] - 1]}
        config = Qwen2_5_VLConfig(text_config=fields, vision_config=eyes, tie_word_embeddings=False, **ids)
    else:
        eyes |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        fields |= {"head_dim": head}
        config = Qwen3VLConfig(text_config=fields, vision_config=eyes, tie_word_embeddings=False, **ids)
    return config.to_dict()


def tiny_tokenizer(arch: str = "internvl", words: tuple[str, ...] = (), merges: int = 64) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer made here: any text can be written, common pieces of the templates and of `words` (object
    names, whole questions) are one token. The special tokens are those of the released models."""
    special = ["<|endoftext|>", "<|im_start|>", END]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + merges, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    names = [*words, "blood vessel", "background"]
    asked = [q.format(name) for q in (*QUESTIONS, *ABSENT_ANSWERS) for name in names]
    tokenizer.train_from_iterator([*words, *asked, *ANSWERS, "user\n", "assistant\n"] * 4, trainer)
    tokenizer.add_special_tokens([*BLOCKS[arch], *NEW_TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=END)


def tiny_sa2va(
    seed: int = 0,
    arch: str = "internvl",
    hidden: int = 64,
    layers: int = 2,
    sam_size: int = 256,
    sam_width: int = 16,
    neck: int = 128,
    tile: int = 56,
    max_tiles: int = 12,
    words: tuple[str, ...] = (),
) -> Sa2VA:
    """A random Sa2VA of about 3 M parameters with its own tokenizer, in evaluation mode; the same for the same seed.

    hidden, layers: of the language model; sam_size: R, px (a multiple of 32); sam_width: of Hiera's first stage; neck:
    C, a multiple of 64; tile: px (a multiple of 28); words: texts the tokenizer should know.
    """
    tokenizer = tiny_tokenizer(arch, words)
    id_of = tokenizer.convert_tokens_to_ids
    patch = 14 if arch != "qwen3_vl" else 16
    eyes = {"mean": [0.5] * 3, "std": [0.5] * 3} if arch == "qwen3_vl" else {}
    processor = Sa2VAProcessor(
        ProcessorConfig(
            arch=arch, tile=tile, tile_tokens=(tile // 28) ** 2, max_tiles=max_tiles, patch=patch, sam_size=sam_size,
            min_pixels=(2 * patch) ** 2, max_pixels=16 * (2 * patch) ** 2, max_length=2048, **eyes,
        ),
        tokenizer,
    )  # fmt: skip
    text, vocabulary = (hidden, 2 * hidden, layers, 4, 2), len(tokenizer)
    if arch == "internvl":
        mllm = internvl_config(text, (32, 64, 2, 4), tile, vocabulary, processor.image_id, 2048)
    else:
        ids = {"image_token_id": processor.image_id, "vision_start_token_id": id_of(processor.begin),
               "vision_end_token_id": id_of(processor.end), "video_token_id": 0}  # fmt: skip
        mllm = qwen_config(arch, text, (32, 64, 2, 4), vocabulary, ids, patch)
    sam = sam_config(
        sam_size, tuple(sam_width * 2**k for k in range(4)), (1, 2, 4, 8), (1, 1, 2, 1), (8, 4, 8, 4), (3,), neck, 2, 96
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Sa2VA(Sa2VAConfig(arch, mllm, sam, processor.seg_id), processor)
        wake(model.sam)
    return model.eval()


def wake(sam: torch.nn.Module) -> None:
    """torch's own initial weights in the place of transformers' (0.02 everywhere), which leave so narrow a SAM 2 with
    mask logits of 1e-9 and nothing to learn from."""
    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Embedding)
    for m in sam.modules():
        if isinstance(m, layers):
            m.reset_parameters()
