"""SAM3 on one video: one pass of the picture encoder per frame feeds the detector, which answers text, and the tracker.

    engine = Sam3Engine.open("weights/sam3", torch.bfloat16, torch.device("cuda"))
    session = engine.session((H, W))
    for t, frame in enumerate(frames):  # uint8 (H, W, 3) RGB
        seen = engine.encode(frame)
        (balls,) = engine.detect(seen, ["tennis ball"], score_thr=0.5)
        objects = session.track(seen, t)  # {number: Tracked}
        if 1 not in objects and len(balls.scores):
            session.seed(seen, t, 1, mask=balls.masks[0])

Snapshots are folders on disk; nothing is ever downloaded. The weights lie in the type that `open` is given, and a
session has the same one. Suppression of duplicate masks, filling of holes and removal of specks are code of this
repository: transformers takes them from a package that downloads a compiled kernel, and leaves them out without it.

All results are numpy arrays in px of the original frame, pixel centres at whole numbers. Shapes: N objects, H W frame,
m side of the model's own masks. Source: Meta, SAM 3, arXiv 2511.16719.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from scipy import ndimage
from transformers.utils import logging as transformers_logging

from models.sam3_tiny import save_tiny_snapshot
from utils.masks import mask_nms
from utils.run import UserError, read_config
from utils.weights import resolve_snapshot

__all__ = ["Detections", "Features", "Sam3Engine", "Tracked", "clean_logits", "component_areas", "save_tiny_snapshot"]

ENV = "HF_LOCAL_MODEL"
NEEDS = (
    "config.json", "model.safetensors or model.safetensors.index.json", "tokenizer.json or vocab.json + merges.txt",
    "processor_config.json or preprocessor_config.json",
)  # fmt: skip
UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
UNREADABLE += (SafetensorError, StrictDataclassError)  # what broken files make transformers raise
WORD = "ball"  # one token of every vocabulary that has it
HOLE, SPECK = 0.1, -0.1  # logits of a filled hole and of a removed speck
KERNELS = "scipy"  # what suppresses duplicates and cleans masks, for records
AT_ONCE = 8  # masks that are enlarged together


# ---- results


class Features(NamedTuple):
    """A frame after the picture encoder, on the model's device."""

    size: tuple[int, int]  # (H, W) of the frame
    vision: object  # what the detector takes
    maps: list[torch.Tensor]  # what the tracker takes: (h w, 1, D) at 4, 2 and 1 cells per patch side
    positions: list[torch.Tensor]


@dataclass(frozen=True)
class Detections:
    """What answers one prompt in one frame, best first."""

    scores: np.ndarray  # (N,) float32 in 0..1
    boxes: np.ndarray  # (N, 4) float32 x0, y0, x1, y1: the outermost pixels of the mask
    masks: np.ndarray  # (N, H, W) bool, none empty
    logits: np.ndarray  # (N, m, m) float32, as the model gave them


@dataclass(frozen=True)
class Tracked:
    """One followed object in one frame."""

    mask: np.ndarray  # (H, W) bool, empty when the object is not seen
    logits: np.ndarray  # (m, m) float32, as the model gave them; -1024 when the object is not seen
    score: float  # sigmoid of object_logit
    object_logit: float  # > 0: the object is in the frame


# ---- masks


def component_areas(mask: np.ndarray) -> np.ndarray:
    """mask (H, W) bool -> for each of its pixels the px of its component, 8-connected; 0 elsewhere. int64 (H, W)."""
    labels, n = ndimage.label(mask, np.ones((3, 3), bool))
    area = np.bincount(labels.ravel(), minlength=n + 1)
    area[0] = 0
    return area[labels]


def clean_logits(logits: np.ndarray, largest: int) -> np.ndarray:
    """logits (N, m, m) with background parts of at most `largest` px filled, then foreground parts of at most
    min(largest, half of the mask) px removed: a mask that is small as a whole stays. 0 changes nothing."""
    if largest <= 0:
        return logits
    out = logits.copy()
    for one in out:
        empty = component_areas(one <= 0)
        one[(empty > 0) & (empty <= largest)] = HOLE
        full = component_areas(one > 0)
        one[(full > 0) & (full <= min(largest, np.count_nonzero(full) // 2))] = SPECK
    return out


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) bool, none empty -> (N, 4) float32 x0, y0, x1, y1 of their outermost pixels."""
    across, down = masks.any(1), masks.any(2)  # (N, W), (N, H)
    ends = [across.argmax(1), down.argmax(1)]
    ends += [x.shape[1] - 1 - x[:, ::-1].argmax(1) for x in (across, down)]
    return np.stack(ends, 1).astype(np.float32)


# ---- snapshots


def check_transformers() -> None:
    """UserError for a version without SAM3."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(
            f"SAM3 needs transformers >= 5.0, found {transformers.__version__}; install requirements.txt again"
        )


def read_snapshot(snapshot: Path | str | None) -> "tuple[Path, transformers.Sam3VideoConfig]":
    """The folder, or that of the environment variable HF_LOCAL_MODEL, and its configuration. UserError for what is
    missing from it, is no JSON, or belongs to another model."""
    check_transformers()
    folder = resolve_snapshot(None if snapshot is None else str(snapshot), ENV, NEEDS)
    values = read_config(folder)
    if values.get("model_type") != "sam3_video":
        raise UserError(
            f"{folder / 'config.json'}: a model of type {values.get('model_type')!r}, expected 'sam3_video' "
            "(facebook/sam3); take another snapshot"
        )
    try:
        config = transformers.Sam3VideoConfig(**values)
    except UNREADABLE as e:
        raise UserError(f"{folder / 'config.json'}: no configuration of SAM3 ({in_short(e)}); copy it again") from e
    for path in [folder / name for name in ("tokenizer.json", "processor_config.json", "preprocessor_config.json")]:
        try:
            if path.exists():
                json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: not readable as JSON ({e}); copy it again") from e
    return folder, config


def load_processor(folder: Path, config: "transformers.Sam3VideoConfig") -> "transformers.Sam3VideoProcessor":
    """The processor, whose tokenizer and picture size fit the model. UserError when they do not."""
    try:
        processor = transformers.Sam3VideoProcessor.from_pretrained(folder, local_files_only=True)
    except UNREADABLE as e:
        raise UserError(f"{folder}: the processor cannot be built ({in_short(e)}); copy the complete folder") from e
    tokenizer, detector = processor.tokenizer, config.detector_config
    known, ids = tokenizer.get_vocab(), tokenizer(WORD)["input_ids"]
    want = 3 if f"{WORD}</w>" in known else 2 + len(WORD)  # begin and end, and a token or one for each letter
    if len(tokenizer) != detector.text_config.vocab_size or len(ids) != want or len({ids[0], ids[-1], *ids[1:2]}) != 3:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} entries and makes {WORD!r} {len(ids)} tokens, the model "
            f"expects {detector.text_config.vocab_size} and {want}; copy the tokenizer's files again"
        )
    side = processor.image_processor.size["height"]
    if side != detector.image_size:
        raise UserError(
            f"{folder}: its processor makes pictures of {side} px, the model expects {detector.image_size}; "
            "copy processor_config.json again"
        )
    return processor


def load_model(
    folder: Path, config: "transformers.Sam3VideoConfig", dtype: torch.dtype
) -> "transformers.Sam3VideoModel":
    """The model on the CPU. UserError for a tensor that is missing, unexpected, reshaped or not finite."""
    from models.sam3_memory import FixedVideoModel  # here: versions that check_transformers refuses lack its base

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what its report would say becomes an error below
    transformers_logging.disable_progress_bar()
    try:
        model, found = FixedVideoModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except UNREADABLE as e:
        raise UserError(f"{folder}: the weights cannot be loaded ({in_short(e)}); copy the folder again") from e
    finally:
        transformers_logging.set_verbosity(verbosity)
    wrong = [f"{kind} {k}" for kind in ("missing", "unexpected") for k in sorted(found[f"{kind}_keys"])]
    wrong += [f"{k} is {tuple(was)}, not {tuple(wants)}" for k, was, wants in sorted(found["mismatched_keys"])]
    wrong += [f"not finite {k}" for k, v in model.state_dict().items() if not v.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{folder}: does not fit SAM3: {'; '.join(wrong[:4])}{more}; take a complete snapshot")
    return model


def in_short(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# ---- engine


class Sam3Engine:
    """The model of a snapshot. Keeps the text features of the prompts that it has seen, nothing of a video."""

    def __init__(self, model, processor, folder: Path, mask_threshold: float = 0.5):
        if not 0 < mask_threshold < 1:
            raise ValueError(f"mask_threshold {mask_threshold}: expected a probability between 0 and 1")
        self.model, self.processor, self.folder = model, processor, folder
        self.mask_threshold, self.cut = mask_threshold, math.log(mask_threshold / (1 - mask_threshold))
        self.image_size = model.config.image_size  # px of the square that frames are resized to
        self._texts = {}

    @classmethod
    def open(
        cls, snapshot: Path | str | None, dtype: torch.dtype, device: torch.device | str, mask_threshold: float = 0.5
    ) -> "Sam3Engine":
        """snapshot: a folder, or a hub's cache folder of one model; None: the environment variable HF_LOCAL_MODEL.

        dtype: of weights, features and sessions. mask_threshold: probability above which a pixel belongs to a mask.
        UserError names what is missing from the folder or does not fit.
        """
        folder, config = read_snapshot(snapshot)
        processor = load_processor(folder, config)
        return cls(load_model(folder, config, dtype).to(device).eval(), processor, folder, mask_threshold)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def about(self) -> dict:
        """What made the results, for their record."""
        kind = {"kind": "sam3_video", "path": str(self.folder), "dtype": str(self.dtype).removeprefix("torch.")}
        return kind | {
            "image_size": self.image_size, "mask_threshold": self.mask_threshold, "kernels": KERNELS,
            "transformers": transformers.__version__,
        }  # fmt: skip

    @torch.inference_mode()
    def encode(self, frame: np.ndarray) -> Features:
        """uint8 (H, W, 3) RGB -> its features: one pass of the picture encoder. ValueError for another array."""
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"frame {getattr(frame, 'shape', type(frame))}: expected uint8 (H, W, 3)")
        pixels = self.processor.image_processor(images=frame, return_tensors="pt", device=self.device).pixel_values
        vision = self.model.detector_model.get_vision_features(pixel_values=pixels.to(self.device, self.dtype))
        maps, positions = self.model.get_vision_features_for_tracker(vision)
        return Features(frame.shape[:2], vision, list(maps), list(positions))

    def check_prompts(self, prompts: list[str]) -> None:
        """UserError for an empty prompt, one that the text encoder cannot take, or two that mean the same to it."""
        seen = {}
        for prompt in prompts:
            ids = self.text_ids(prompt)
            if ids in seen:
                raise UserError(f"prompts {seen[ids]!r} and {prompt!r} are the same text; give each prompt once")
            seen[ids] = prompt

    def text_ids(self, prompt: str) -> tuple[int, ...]:
        """Tokens of a prompt with begin and end. UserError when it is empty or too long."""
        longest = self.model.config.detector_config.text_config.max_position_embeddings
        ids = tuple(self.processor.tokenizer(prompt, verbose=False)["input_ids"])
        if not 2 < len(ids) <= longest:
            raise UserError(
                f"prompt {prompt!r} has {len(ids) - 2} tokens, expected 1 to {longest - 2}; name the object in few words"
            )
        return ids

    def text(self, prompt: str) -> tuple[object, torch.Tensor]:
        """Text features and attention mask (1, L) of a prompt."""
        if prompt not in self._texts:
            ids = self.text_ids(prompt)
            longest = self.model.config.detector_config.text_config.max_position_embeddings
            pad = longest - len(ids)
            tokens = torch.tensor([[*ids, *[self.processor.tokenizer.pad_token_id] * pad]], device=self.device)
            mask = torch.tensor([[1] * len(ids) + [0] * pad], device=self.device)
            found = self.model.detector_model.get_text_features(input_ids=tokens, attention_mask=mask, return_dict=True)
            self._texts[prompt] = found, mask
        return self._texts[prompt]

    @torch.inference_mode()
    def detect(
        self, features: Features, prompts: list[str], score_thr: float, nms_iou: float = 0.1
    ) -> list[Detections]:
        """What answers each prompt, scores above score_thr; of masks whose IoU is above nms_iou the best stays.

        UserError for a prompt that the text encoder cannot take.
        """
        return [self._detect(features, prompt, score_thr, nms_iou) for prompt in prompts]

    def _detect(self, features: Features, prompt: str, score_thr: float, nms_iou: float) -> Detections:
        text, attention = self.text(prompt)
        out = self.model.detector_model(vision_embeds=features.vision, text_embeds=text, attention_mask=attention)
        scores = out.pred_logits[0].float().sigmoid() * out.presence_logits[0].float().sigmoid()  # (Q,)
        good = scores > score_thr
        scores, logits = scores[good].cpu().numpy(), out.pred_masks[0][good].float().cpu().numpy()
        cleaned = clean_logits(logits - self.cut, self.model.fill_hole_area)
        kept = np.flatnonzero((cleaned > 0).any((1, 2)))  # an empty mask is no answer, whatever its score
        kept = kept[mask_nms(cleaned[kept] > 0, scores[kept], nms_iou)]
        masks = self.enlarge(cleaned[kept], features.size)
        full = masks.any((1, 2))  # coarser than the model's masks, a frame may have no pixel in a small one
        kept, masks = kept[full], masks[full]
        return Detections(scores[kept], boxes_of(masks), masks, logits[kept])

    def enlarge(self, logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """logits (N, m, m) float32, > 0 inside -> masks (N, H, W) bool of size (H, W)."""
        masks = np.zeros((len(logits), *size), bool)
        for i in range(0, len(logits), AT_ONCE):
            some = torch.from_numpy(logits[i : i + AT_ONCE])[:, None].to(self.device)
            large = F.interpolate(some, size, mode="bilinear", align_corners=False)[:, 0]
            masks[i : i + AT_ONCE] = (large > 0).cpu().numpy()
        return masks

    def session(self, size: tuple[int, int], exact_memory: bool = False):
        """A models.sam3_memory.Session for one video of size (H, W)."""
        from models.sam3_memory import Session

        return Session(self, size, exact_memory)
