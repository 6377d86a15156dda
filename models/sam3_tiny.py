"""A tiny SAM3 with random weights, as a complete offline snapshot: what runs where the real one is not to be had.

It has every part of the real model (Meta, SAM 3, arXiv 2511.16719; 4.1 M instead of 848 M parameters), the same tensor
names and its own tokenizer, so that nothing has to be downloaded. Untrained, it finds nothing: all scores lie near
0.25. train/train_tiny_sam3.py teaches its detector to answer text.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from utils.run import UserError, new_folder

PATCH = 14  # px of one token of the picture
WIDTH = 128  # of everything after the picture encoder; more than 64, and a multiple of it
MEMORY = 64  # channels of a memory: the tracker reads keys of 64 whatever its configuration says
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 32  # of the longest prompt, begin and end included


def tiny_tokenizer(words: tuple[str, ...] = ("ball", "racket", "tennis")) -> "transformers.CLIPTokenizer":
    """CLIP's byte-level tokenizer in which each of `words` is one token. Other text becomes single letters.

    ValueError when the pieces of one word would split another one.
    """
    letters = sorted(ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    merges = []
    for word in words:
        left = word[0]
        for i, c in enumerate(word[1:], 2):
            right = c if i < len(word) else f"{c}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            vocab.setdefault(left, len(vocab))
    for mark in (BEGIN, END):
        vocab[mark] = len(vocab)
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    for word in words:
        if len(tokenizer(word)["input_ids"]) != 3:
            raise ValueError(f"words {words}: {word!r} is not one token beside the others; change their order")
    return tokenizer


def tiny_config(tokenizer: "transformers.CLIPTokenizer", size: int = 112) -> "transformers.Sam3VideoConfig":
    """size: px of the square that every frame is resized to, a multiple of 56. ValueError for another one."""
    if size < 56 or size % (4 * PATCH):
        raise ValueError(f"size {size}: expected a multiple of {4 * PATCH}")
    grid = size // PATCH
    vision = {
        "model_type": "sam3_vision_model",
        "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
        "backbone_config": {
            "model_type": "sam3_vit_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "image_size": size, "patch_size": PATCH, "window_size": 4,
            "global_attn_indexes": [1], "pretrain_image_size": 56,
        },
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "projection_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": TOKENS,
        "hidden_act": "gelu", "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    block = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64}
    detector = {
        "model_type": "sam3", "vision_config": vision, "text_config": text,
        "geometry_encoder_config": {**block, "num_layers": 1, "roi_size": 3},
        "detr_encoder_config": {**block, "num_layers": 1},
        "detr_decoder_config": {**block, "num_layers": 2, "num_queries": 10},
        "mask_decoder_config": {"hidden_size": WIDTH, "num_upsampling_stages": 3, "num_attention_heads": 4},
    }  # fmt: skip
    tracker = {
        "model_type": "sam3_tracker_video", "vision_config": vision, "image_size": size,
        "prompt_encoder_config": {
            "hidden_size": WIDTH, "image_size": size, "patch_size": PATCH, "mask_input_channels": 8
        },
        "mask_decoder_config": {
            "hidden_size": WIDTH, "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "iou_head_hidden_dim": WIDTH,
        },
        "memory_attention_hidden_size": WIDTH, "memory_attention_num_layers": 2,
        "memory_attention_feed_forward_hidden_size": 64, "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": WIDTH, "memory_encoder_output_channels": MEMORY,
        "mask_downsampler_embed_dim": WIDTH, "memory_fuser_embed_dim": WIDTH, "memory_fuser_intermediate_dim": 64,
    }  # fmt: skip
    return transformers.Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=4 * grid)


def picture_processors(size: int) -> "tuple[transformers.Sam3ImageProcessor, transformers.Sam2VideoVideoProcessor]":
    """Of pictures and of videos, which treat a frame alike: resized to size x size, values -1..1."""
    side, half = {"height": size, "width": size}, [0.5, 0.5, 0.5]
    mask_side = {"height": 4 * (size // PATCH), "width": 4 * (size // PATCH)}
    pictures = transformers.Sam3ImageProcessor(size=side, mask_size=mask_side, image_mean=half, image_std=half)
    return pictures, transformers.Sam2VideoVideoProcessor(size=side, image_mean=half, image_std=half)


def save_weights(model: "transformers.Sam3VideoModel", folder: Path) -> None:
    """Write config.json and model.safetensors under the released model's tensor names: those that save_pretrained of
    transformers 5.23 writes have the tracker's prefix twice, and only transformers knows to take it off again."""
    model.config.architectures, model.config.dtype = ["Sam3VideoModel"], model.dtype
    model.config.save_pretrained(folder)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_tiny_snapshot(
    folder: Path | str, seed: int = 0, words: tuple[str, ...] = ("ball", "racket", "tennis"), size: int = 112
) -> Path:
    """Write config.json, model.safetensors, the processor and the tokenizer of a random model; all of it or nothing.

    seed: of the weights; the caller's random state is left alone. Returns the folder; UserError when it exists.
    """
    tokenizer = tiny_tokenizer(words)
    config = tiny_config(tokenizer, size)
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose a new folder for the tiny snapshot")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Sam3VideoModel(config)
    pictures, videos = picture_processors(size)
    with new_folder(folder) as tmp:
        save_weights(model, tmp)
        processor = transformers.Sam3VideoProcessor(
            image_processor=pictures, video_processor=videos, tokenizer=tokenizer
        )
        processor.save_pretrained(tmp)
    return folder
