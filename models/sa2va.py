"""Sa2VA: a multimodal language model whose [SEG] tokens become masks through SAM 2; one class to train and to predict.

The language model answers a question about a picture or a video. The last hidden state at each [SEG] of the answer, two
linear layers further, is a prompt of SAM 2's mask decoder. Nothing else connects the two.

Shapes: B samples, L tokens, D width of the language model, C of SAM 2, n objects ([SEG] tokens) of a sample, F pictures
of a sample, h x w the grid of the mask logits (a quarter of SAM 2's side R), H x W a picture.
Source: Yuan et al., Sa2VA, arXiv 2501.04001. Names are those of transformers' classes (`mllm.`, `sam.`) and of the
released projection (`text_hidden_fcs.`). Precision: `mllm` in any type; the projection and SAM 2 always in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import nn
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
from transformers.initialization import no_init_weights

from models.sa2va_files import load_weights, write_folder
from models.sa2va_losses import LossConfig, each_mask, language_loss, repeated
from models.sa2va_names import GROUPS, group_of
from models.sa2va_processor import FORCED, Sa2VAProcessor
from models.sa2va_video import (
    blank_features,
    image_features,
    prompted,
    prompted_frames,
    propagate,
    resize_logits,
)
from utils.run import UserError, read_config

CLASSES = {
    "internvl": (InternVLConfig, InternVLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
}
POLICIES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the language model's weights
TRAINED = ("projector", "language model", "token embeddings", "head", "text_hidden_fcs", "mask decoder")
NEVER_TRAINED = (  # no loss reaches the two heads, and the original decoder stays as it is
    "sam.mask_decoder.iou_prediction_head.", "sam.mask_decoder.pred_obj_score_head.", "tracking_decoder.",
)  # fmt: skip


@dataclass
class Sa2VAConfig:
    """Everything config.json holds; the sizes are whole transformers configurations as dictionaries."""

    arch: str = "internvl"  # one of CLASSES
    mllm: dict = field(default_factory=dict)
    sam: dict = field(default_factory=dict)  # Sam2VideoConfig with SAM 2.0's settings
    seg_token_id: int = 0
    tracking_decoder: bool = False  # SAM 2's original mask decoder lies beside the trained one (mode two_decoder)

    def __post_init__(self):
        if self.arch not in CLASSES:
            raise ValueError(f"Sa2VAConfig: arch {self.arch!r}, expected one of {sorted(CLASSES)}")


class Sa2VA(nn.Module):
    """cfg and its preprocessing; dtype: of the language model's weights.

    After construction the groups TRAINED have gradients, everything else is frozen: `set_trainable` changes that.
    """

    def __init__(self, cfg: Sa2VAConfig, processor: Sa2VAProcessor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.processor = cfg, processor
        config_class, model_class = CLASSES[cfg.arch]
        config = config_class(**cfg.mllm)
        D, sam = config.text_config.hidden_size, Sam2VideoConfig(**cfg.sam)
        if config.tie_word_embeddings or config.text_config.tie_word_embeddings:
            raise ValueError("Sa2VA: tie_word_embeddings must be False in mllm and in its text_config (two places)")
        if sam.enable_occlusion_spatial_embedding or sam.enable_temporal_pos_encoding_for_object_pointers:
            raise ValueError("Sa2VA: SAM 2.0 expected, without occlusion embedding and temporal pointer encoding")
        ids, vocabulary = (cfg.seg_token_id, config.image_token_id), config.text_config.vocab_size
        if ids != (processor.seg_id, processor.image_id) or max(ids) >= vocabulary or processor.cfg.arch != cfg.arch:
            raise ValueError(f"Sa2VA: [SEG] and picture tokens {ids} of {cfg.arch}, the tokenizer has "
                             f"{(processor.seg_id, processor.image_id)} of {processor.cfg.arch}, the language model "
                             f"{vocabulary} tokens")  # fmt: skip
        self.mllm = model_class._from_config(config, dtype=dtype)
        self.sam = Sam2VideoModel._from_config(sam, dtype=torch.float32)
        gaussian = self.sam.prompt_encoder.shared_embedding.positional_embedding  # kept twice, one in released files
        gaussian.copy_(self.sam.shared_image_embedding.positional_embedding)
        C = sam.prompt_encoder_config.hidden_size
        self.text_hidden_fcs = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C), nn.Dropout(0.0))
        self.tracking_decoder = self.new_decoder() if cfg.tracking_decoder else None
        self.set_trainable(TRAINED)

    def new_decoder(self) -> nn.Module:
        return type(self.sam.mask_decoder)(self.sam.config.mask_decoder_config)

    def set_tracking_decoder(self, state: dict[str, torch.Tensor] | None = None) -> None:
        """Put SAM 2's original mask decoder beside the trained one, for mode two_decoder; frozen. state: its tensors
        (names inside `sam.mask_decoder.`), None: what the mask decoder is now, before any training."""
        decoder = self.new_decoder()
        decoder.load_state_dict(self.sam.mask_decoder.state_dict() if state is None else state)
        self.tracking_decoder = decoder.to(self.sam.no_memory_embedding.device).requires_grad_(False)
        self.cfg.tracking_decoder = True

    def set_trainable(self, groups: Iterable[str]) -> dict[str, int]:
        """Gradients for these groups (models/sa2va_names.py) and nothing else -> trained parameters per group."""
        groups, counts = set(groups), {}
        unknown = groups - {group for _, group in GROUPS}
        if unknown:
            raise ValueError(f"set_trainable: {sorted(unknown)}, expected some of {[g for _, g in GROUPS]}")
        for name, p in self.named_parameters():
            never = name.startswith(NEVER_TRAINED)
            group = "" if never else group_of(name)
            p.requires_grad_(group in groups)
            if p.requires_grad:
                counts[group] = counts.get(group, 0) + p.numel()
        return counts

    # ---- language model

    def mllm_inputs(self, batch: dict) -> dict[str, torch.Tensor]:
        """What transformers' forward and generate take, on the language model's device."""
        device = self.mllm.get_input_embeddings().weight.device
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
        inputs = {k: batch[k].to(device) for k in names if batch.get(k) is not None}
        if self.cfg.arch != "internvl":
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.processor.image_id).int()
            self.mllm.model.rope_deltas = None  # left by the sample before
        return inputs

    def hidden(self, batch: dict) -> torch.Tensor:
        """Last hidden states (B, L, D) of a batch."""
        return self.mllm.model(**self.mllm_inputs(batch), use_cache=False).last_hidden_state

    def project(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, D) -> prompts (n, C) float32 on SAM 2's device."""
        weight = self.text_hidden_fcs[0].weight
        with torch.autocast(h.device.type, enabled=False):
            return self.text_hidden_fcs(h.to(weight.device, weight.dtype)).to(self.sam.no_memory_embedding.device)

    # ---- training

    def forward(self, batch: dict, loss: LossConfig | None = None) -> dict:
        """Losses of a batch from Sa2VAProcessor.collate, and the masks they were computed from.

        -> loss (weighted sum), lm, bce, dice (and cldice with its weight > 0): scalars, means over labelled tokens and
        over masks, 0 without any; mask_logits: per sample (n, h, w), of a video (n, F, h, w), None without masks;
        masks: how many there were. Every trained parameter has a gradient, also in a batch without masks or pictures.
        ValueError when a sample has more or fewer masks than [SEG] in its answers.
        """
        cfg = loss or LossConfig()
        h = self.hidden(batch)
        labels = batch["labels"].to(h.device)
        lm = language_loss(self.mllm.lm_head, h, labels)
        logits, blank = self.draw(h, labels, batch)
        found = {name: [] for name in ("bce", "dice", *(["cldice"] if cfg.cldice else []))}
        for x, masks in zip(logits, batch["masks"], strict=True):
            if x is None or not len(x):
                continue
            with torch.autocast(x.device.type, enabled=False):
                n, masks = len(x), masks.to(x.device)
                values = each_mask(x.reshape(-1, *x.shape[-2:]), masks.reshape(-1, *masks.shape[-2:]), cfg,
                                   self.sam.image_size)  # fmt: skip
            rows = repeated(n) if cfg.balance == "official5" else slice(None)
            for name in found:
                found[name].append(values[name].reshape(n, -1)[rows].flatten())
        means = {k: torch.cat(v).mean() if v else lm.detach().new_zeros(()) for k, v in found.items()}
        device = lm.device
        total = cfg.lm * lm + sum(getattr(cfg, k) * v.to(device) for k, v in means.items()) + blank.to(device)
        counted = sum(len(v) for v in found["bce"])
        return {"loss": total, "lm": lm, **means, "mask_logits": logits, "masks": counted}

    def draw(self, h: torch.Tensor, labels: torch.Tensor, batch: dict) -> tuple[list, torch.Tensor]:
        """Mask logits of each sample (None where it has no masks) and a term of 0 that reaches what had no work."""
        where = labels == self.cfg.seg_token_id
        counts, frames, masks = where.sum(1).tolist(), batch["frames"], batch["masks"]
        drawn = [i for i, m in enumerate(masks) if m is not None]
        for i in drawn:
            if len(masks[i]) != counts[i]:
                raise ValueError(f"Sa2VA: sample {i} has {len(masks[i])} masks for {counts[i]} [SEG] in its answers")
        drawn = [i for i in drawn if counts[i]]
        blank = h.new_zeros(()) if batch["pixel_values"] is not None else self.blank_picture()
        device, side = self.sam.no_memory_embedding.device, self.sam.image_size // 4
        logits = [None if m is None else torch.zeros(0, *m.shape[1:-2], side, side, device=device) for m in masks]
        with torch.autocast(device.type, enabled=False):
            if not drawn:  # a [SEG] vector that nobody asked for, drawn into an empty picture
                zero = torch.zeros(1, dtype=torch.int64, device=device)
                nothing = prompted(self.sam, blank_features(self.sam), zero, self.project(h[:1, 0]))
                return logits, blank + 0 * nothing.logits.sum().to(blank.device)
            prompts = self.project(h[where]).split(counts)
            first = np.cumsum([0, *frames])  # of each sample's pictures in sam_pixels
            pixels = torch.cat([batch["sam_pixels"][first[i] : first[i + 1]] for i in drawn]).to(device)
        seen = image_features(self.sam, pixels)  # under the caller's autocast
        with torch.autocast(device.type, enabled=False):
            picture, k = [], 0
            for i in drawn:  # objects of a sample in order, each in all of the sample's pictures
                picture += list(range(k, k + frames[i])) * counts[i]
                k += frames[i]
            every = torch.cat([prompts[i].repeat_interleave(frames[i], 0) for i in drawn])
            found = prompted(self.sam, seen, torch.tensor(picture, device=device), every)
        for i, x in zip(drawn, found.logits.split([counts[i] * frames[i] for i in drawn]), strict=True):
            logits[i] = x if masks[i].ndim == 3 else x.unflatten(0, (counts[i], frames[i]))
        return logits, blank

    def blank_picture(self) -> torch.Tensor:
        """0, through the picture encoder if a part of it is trained: for batches of text only."""
        model, cfg = self.mllm.model, self.processor.cfg
        vision = [m for m in ("vision_tower", "multi_modal_projector", "visual") if hasattr(model, m)]
        like = self.mllm.lm_head.weight
        if not any(p.requires_grad for m in vision for p in getattr(model, m).parameters()):
            return like.new_zeros(())
        if self.cfg.arch == "internvl":
            found = model.get_image_features(like.new_zeros(1, 3, cfg.tile, cfg.tile), return_dict=True)
            return 0 * found.pooler_output.float().sum()
        patch = model.visual.patch_embed.proj.weight[0].numel()
        pixels, grid = like.new_zeros(cfg.merge**2, patch), torch.tensor([[1, cfg.merge, cfg.merge]])
        found = model.get_image_features(pixels, grid.to(like.device), return_dict=True)
        deep = [x for level in found.get("deepstack_features") or [] for x in level]
        return 0 * sum(x.float().sum() for x in [*found.pooler_output, *deep])

    # ---- prediction

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradients; afterwards every module is as before."""
        before = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for m, training in before:
                m.training = training

    def generate(self, items: Sequence[dict], max_new_tokens: int, num_beams: int = 1) -> list[list[int]]:
        """Answers to encoded questions, greedy or by beams -> token ids of each, its end token included if it came."""
        batch = self.processor.collate(items, left=True)
        ids = self.mllm.generate(
            **self.mllm_inputs(batch), max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams,
            eos_token_id=self.processor.end_id, pad_token_id=self.processor.pad_id, use_cache=True,
        )  # fmt: skip
        rows, end = ids[:, batch["input_ids"].shape[1] :].tolist(), self.processor.end_id
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def seg_prompts(self, items: Sequence[dict], answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """Prompts (n, C) of each answer's [SEG] tokens, read from one pass over questions and answers."""
        seg, none = self.cfg.seg_token_id, self.sam.no_memory_embedding.new_zeros
        counts = [row.count(seg) for row in answers]
        if not any(counts):
            return [none(0, self.text_hidden_fcs[2].out_features) for _ in answers]
        whole = []
        for item, row in zip(items, answers, strict=True):
            ids = torch.cat([item["input_ids"], torch.tensor(row, dtype=torch.int64)])
            said = torch.cat([torch.full_like(item["input_ids"], -100), ids[len(item["input_ids"]) :]])
            whole.append({**item, "input_ids": ids, "labels": said})
        batch = self.processor.collate(whole)
        h = self.hidden(batch)
        return list(self.project(h[batch["labels"].to(h.device) == seg]).split(counts))

    def predict(self, images, text: str, **options) -> dict:
        """`predict_many` of one sample."""
        return self.predict_many([(images, text)], **options)[0]

    def predict_many(self, samples: Sequence[tuple], threshold: float = 0.5, force_seg: bool = False,
                     return_prob: bool = True, max_new_tokens: int = 2048, num_beams: int = 1,
                     mode: str = "official") -> list[dict]:  # fmt: skip
        """Answers and masks. samples: (images, text) each; images: a picture uint8 (H, W, 3), a list of frames of a
        video, or None. force_seg: no generation, the answer is "It is [SEG]."; mode: of videos, see `propagate`.

        -> per sample, tensors on the CPU: text (with its end token, as released), answer (without), truncated (no end
        token within max_new_tokens), masks bool (n, H, W) where prob > threshold, probs float32 (n, H, W) (absent
        with return_prob False), logits (n, h, w), scores (n,): > 0 where SAM 2 sees the object, prompts (n, C),
        seg_spans: places of the [SEG] among the answer's tokens. An answer without [SEG] has n = 0.
        Of videos masks, probs and logits are (n, T, ...), scores (n, T).
        """
        with self.evaluating():
            items = [self.processor.encode(self.looked_at(x, mode), text, sam_images=[]) for x, text in samples]
            if force_seg:
                answers = [self.processor.ids(FORCED) + [self.processor.end_id]] * len(items)
            else:
                answers = self.generate(items, max_new_tokens, num_beams)
            results = []
            prompts = self.seg_prompts(items, answers)
            for (images, _), row, p in zip(samples, answers, prompts, strict=True):
                found = self.masks_of(images, p, mode, threshold, return_prob)
                results.append(found | self.told(row) | {"prompts": p.cpu()})
            return results

    def told(self, row: list[int]) -> dict:
        """What `predict` says about an answer's tokens."""
        text = self.processor.tokenizer.decode(row, skip_special_tokens=False).strip()
        ended = row[-1:] == [self.processor.end_id]
        answer = self.processor.tokenizer.decode(row[:-1] if ended else row, skip_special_tokens=False).strip()
        spans = [k for k, token in enumerate(row) if token == self.cfg.seg_token_id]
        return {"text": text, "answer": answer, "truncated": not ended, "seg_spans": spans}

    def looked_at(self, images, mode: str):
        """What the language model sees: a picture, or the frames of a video where masks start."""
        if not isinstance(images, list | tuple):
            return images
        return [images[t] for t in prompted_frames(len(images), self.processor.cfg.frames, mode)]

    def masks_of(self, images, prompts: torch.Tensor, mode: str, threshold: float, return_prob: bool) -> dict:
        """masks, probs, logits and scores of prompts (n, C) in a picture or a video."""
        video = isinstance(images, list | tuple)
        if images is None:
            return {"masks": torch.zeros(0, 0, 0, dtype=torch.bool), "logits": prompts.new_zeros(0, 0, 0).cpu(),
                    "scores": prompts.new_zeros(0).cpu()}  # fmt: skip
        if video and len({x.shape for x in images}) > 1:
            raise ValueError(f"Sa2VA: frames of sizes {sorted({x.shape[:2] for x in images})}; expected one size")
        if video:
            logits, scores = self.propagate(images, prompts, mode)
        else:
            logits, scores = (x[:, 0] for x in self.masks_from_prompts([images], prompts))
        size = (images[0] if video else images).shape[:2]
        masks = torch.zeros(*scores.shape, *size, dtype=torch.bool)
        found = {"masks": masks, "logits": logits.cpu(), "scores": scores.cpu()}
        if return_prob:
            found["probs"] = torch.zeros(masks.shape)
        for k in np.ndindex(*scores.shape):
            prob = resize_logits(logits[k][None], size, self.sam.image_size)[0].sigmoid()
            masks[k] = (prob > threshold).cpu()
            if return_prob:
                found["probs"][k] = prob.cpu()
        return found

    def masks_from_prompts(self, images: Sequence[np.ndarray], prompts: torch.Tensor) -> tuple:
        """Logits (n, F, h, w) and scores (n, F) of prompts (n, C) in F pictures (crops, say), each encoded once."""
        with self.evaluating(), torch.autocast(prompts.device.type, enabled=False):
            n, F, side = len(prompts), len(images), self.sam.image_size // 4
            prompts = prompts.to(self.sam.no_memory_embedding.device)
            logits, scores = prompts.new_zeros(n, F, side, side), prompts.new_zeros(n, F)
            for f, image in enumerate(images if n else []):
                seen = self.seen(image)
                found = prompted(self.sam, seen, torch.zeros(n, dtype=torch.int64, device=prompts.device), prompts)
                logits[:, f], scores[:, f] = found.logits, found.score
            return logits, scores

    def seen(self, image: np.ndarray):
        """SAM 2's features of one picture."""
        return image_features(self.sam, self.processor.sam_image(image)[None].to(self.sam.no_memory_embedding.device))

    def propagate(self, frames: Sequence[np.ndarray], prompts: torch.Tensor, mode: str = "official",
                  start: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Masks of prompts (n, C) through a video -> logits (n, T, h, w), object scores (n, T).

        mode: official (drawn in the first frames, followed forward), uniform (drawn in frames spread over the video,
        followed from the nearest one, forward and backward), two_decoder (drawn in spread frames, followed forward by
        SAM 2's original decoder: set_tracking_decoder). start: draw in these frames instead.
        """
        if mode == "two_decoder" and self.tracking_decoder is None:
            raise UserError("mode two_decoder: this checkpoint has no original mask decoder; add one with "
                            "set_tracking_decoder before training, or use mode uniform")  # fmt: skip
        T, side = len(frames), self.sam.image_size // 4
        start = sorted(start or prompted_frames(T, self.processor.cfg.frames, mode))
        with self.evaluating(), torch.autocast(prompts.device.type, enabled=False):
            if not len(prompts):
                return prompts.new_zeros(0, T, side, side), prompts.new_zeros(0, T)
            tracker = self.tracking_decoder if mode == "two_decoder" else None
            prompts = prompts.to(self.sam.no_memory_embedding.device)
            return propagate(self.sam, lambda t: self.seen(frames[t]), T, prompts, start, mode == "uniform", tracker)

    def chat(self, text: str, images=None, max_new_tokens: int = 512) -> str:
        """The answer alone, without masks."""
        with self.evaluating():
            items = [self.processor.encode(self.looked_at(images, "official"), text, sam_images=[])]
            return self.told(self.generate(items, max_new_tokens)[0])["answer"]

    # ---- files

    def config_dict(self) -> dict:
        """What config.json holds; `from_checkpoint` rebuilds the model from it."""
        return {"class": type(self).__name__, "model": asdict(self.cfg)}

    def save(self, folder: Path | str, shard_bytes: float = 5e9, **more) -> None:
        """A complete checkpoint folder: config.json (with `more` beside), weights in shards of at most shard_bytes,
        preprocess.json, tokenizer/. UserError when the folder exists; nothing partial is left."""
        write_folder(folder, self.state_dict(), self.config_dict() | more, self.processor.save, shard_bytes)

    @classmethod
    def from_checkpoint(
        cls, folder: Path | str, policy: str = "fp32", place: Callable[["Sa2VA"], None] | None = None
    ) -> "Sa2VA":
        """The model saved in `folder`, on the CPU, in evaluation mode. policy: type of the language model's weights,
        fp32, bf16 or fp16; the projection and SAM 2 are float32. place: receives the model while its parameters have no
        storage, and gives them theirs on the devices it chooses (`models.sa2va_memory.spread`); they are read straight
        to there. UserError for any tensor missing, added or reshaped.
        """
        if policy not in POLICIES:
            raise UserError(f"policy {policy}: expected one of {', '.join(POLICIES)}")
        config = read_config(folder)
        if config.get("class") != cls.__name__:
            raise UserError(f"{folder}: a checkpoint of {config.get('class')}, expected one of {cls.__name__}")
        processor = Sa2VAProcessor.load(folder)
        try:
            with no_init_weights(), init_empty_weights(include_buffers=False) if place else nullcontext():
                model = cls(Sa2VAConfig(**config["model"]), processor, POLICIES[policy])
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{folder}/config.json: not a configuration of this version ({e}); convert again") from e
        if place is not None:
            place(model)
        load_weights(model, folder)
        return model.eval()
