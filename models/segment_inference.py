"""FastSAM2 on one picture: texts in, the network, entries in the field's formats and what is drawn out, for each task.

Shapes: Q queries, K classes, E width of texts, D width, h w the picture as the
network is shown it, H W as it is, N masks that are drawn. categories: the number of each class in the files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from models.clip import load_clip, load_tokenizer
from models.fastsam2 import FastSAM2, FastSAM2Config, hash_texts
from models.panoptic_post import ImageSize, instances, panoptic, semantic, to_original
from models.prompt_fusion import PromptBatch
from models.semantic_head import embed_texts
from utils.masks import rle_encode
from utils.run import UserError
from utils.segment_inputs import check_place, fit, pack, resized, resized_map
from utils.segment_writing import category_map, ids_to_rgb, number_segments


@dataclass(frozen=True)
class How:
    """How pictures and videos are run on."""

    image_size: tuple[int, int]  # px that pictures and frames are fitted into
    categories: list[int]  # (K,)
    dtype: torch.dtype = torch.float32  # of autocast
    clip: int | None = None  # vis, vps: frames seen at once; 0: one by one, as a stream; None: by length
    score: float = 0.8  # panoptic, vps: class probability of a segment; frame by frame what a new one needs
    share: float = 0.8  # panoptic, vps: least share that stays of a mask; not frame by frame
    top: int = 100  # instance, vis: pairs of query and class that are looked at
    least: float = 0.3  # instance, vis: lowest score that is drawn

    def __post_init__(self):
        if self.clip is not None and self.clip < 0:
            raise UserError(f"--clip-length {self.clip}: expected a number of frames, or 0 to see them one by one")


@dataclass
class Found:
    """What the decoder says at last about one picture."""

    classes: torch.Tensor  # (Q, K + 1) logits
    masks: torch.Tensor  # (Q, grid h, grid w) logits
    iou: torch.Tensor  # (Q,) that of its mask, as the network expects it
    size: ImageSize


def text_model(
    cfg: FastSAM2Config, source: str, clip: str | None, device: torch.device
) -> Callable[[list[str]], torch.Tensor]:
    """texts -> embeddings (n, E), by the text model that a checkpoint learned with; clip: folder of a CLIP snapshot.

    UserError when it learned with none, or with another one; `source` names the checkpoint.
    """
    if cfg.text == "hash":
        return partial(hash_texts, width=cfg.embed_dim)
    if cfg.text != "clip":
        raise UserError(f"{source}: has no text model (its classes are random directions); point at objects instead")
    if not clip:
        raise UserError(f"--clip: {source} learned the texts of a CLIP; give the folder of that snapshot")
    tower = load_clip(clip).eval().to(device)
    width = tower.text_projection.shape[1]
    if width != cfg.embed_dim:
        raise UserError(
            f"--clip {clip}: texts have width {width}, {source} learned {cfg.embed_dim}; give the same CLIP"
        )
    return partial(embed_texts, tower.encode_text, load_tokenizer(clip), device=device)


@torch.no_grad()
def encode(model: FastSAM2, shown: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """shown (h, w, 3) uint8 RGB -> features (1, D, grid h, grid w); dtype: of autocast."""
    device = model.mean.device
    image = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None].to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model.encode(image)


@torch.no_grad()
def decode(
    model: FastSAM2,
    features: torch.Tensor,
    original: tuple[int, int],
    shown: tuple[int, int],
    prompts: dict[str, torch.Tensor] | None,
    dtype: torch.dtype,
) -> Found:
    """Features of `encode` and prompts of utils.segment_inputs.pack, one query each; None: all objects that are there.
    original (H, W), shown (h, w). UserError for prompts that the checkpoint cannot take (compat: masks, texts)."""
    device = features.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        queries = None
        if prompts is not None:
            try:
                queries = model.queries(PromptBatch.pad([prompts]).to(device), features)
            except ValueError as e:
                raise UserError(f"this checkpoint does not take these prompts ({e}); point in another way") from e
        out = model.decode(features, queries, objects=prompts is None)
    size = ImageSize(original, shown, tuple(4 * n for n in features.shape[-2:]))
    return Found(out["classes"][-1][0], out["masks"][-1][0], out["iou"][-1][0, :, 0], size)


# ---- results


@dataclass
class Result:
    """Of one picture."""

    entries: list[dict]  # for the json
    png: np.ndarray | None  # pixels of its own PNG: (H, W, 3) uint8 or (H, W) uint8 or uint16
    shown: np.ndarray  # (N, H, W) bool, what is drawn
    names: list[str]  # (N,)


def look(
    model: FastSAM2,
    image: np.ndarray,
    limit: tuple[int, int],
    objects: list[dict],
    embed: Callable[[list[str]], torch.Tensor] | None,
    dtype: torch.dtype,
) -> Found:
    """A picture (H, W, 3), shown whole in at most `limit` (h, w) px, and the objects that it is asked for (none: all
    that is there)."""
    original = image.shape[:2]
    shown, prompts = fit(original, limit), None
    if objects:
        masks = {k: resized_map(m, shown) for k, m in check_place(objects, *original).items()}
        prompts = pack(objects, masks, original, shown, embed)
    return decode(model, encode(model, resized(image, shown), dtype), original, shown, prompts, dtype)


def to_numpy(found: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {k: v.cpu().numpy() for k, v in found.items()}


def panoptic_result(
    x: Found, image_id: int | str, cfg: FastSAM2Config, categories: list[int], score=0.8, share=0.8
) -> Result:
    """COCO panoptic: ids as PNG, {"image_id", "segments_info"}; score and share as in panoptic_post.panoptic."""
    found = to_numpy(panoptic(x.classes, x.masks, torch.tensor(cfg.is_thing), x.size, score, share))
    ids, segments = number_segments(found["map"], found, categories)
    shown = ids == np.arange(1, len(segments) + 1)[:, None, None]
    names = dict(zip(categories, cfg.classes, strict=True))
    entry = {"image_id": image_id, "segments_info": segments}
    return Result([entry], ids_to_rgb(ids), shown, [names[s["category_id"]] for s in segments])


def instance_result(
    x: Found, image_id: int | str, cfg: FastSAM2Config, categories: list[int], top=100, least=0.3
) -> Result:
    """COCO results, best first: {"image_id", "category_id", "score", "bbox", "segmentation"} of the `top` pairs of query
    and class; empty masks are left out. Those with a score of at least `least` are drawn."""
    found = to_numpy(instances(x.classes, x.masks, torch.tensor(cfg.is_thing), x.size, top))
    found = {k: v[found["mask"].any((1, 2))] for k, v in found.items()}
    boxes, entries = found["boxes_xyxy_px"].astype(float), []
    for k, (label, score) in enumerate(zip(found["label"], found["score"], strict=True)):
        entry = {"image_id": image_id, "category_id": categories[label], "score": float(score)}
        entries.append(entry | {"bbox": [*boxes[k, :2], *(boxes[k, 2:] - boxes[k, :2])]})
    for entry, code in zip(entries, rle_encode(found["mask"]), strict=True):
        entry["segmentation"] = code
    drawn = found["score"] >= least
    names = [f"{cfg.classes[k]} {s:.2f}" for k, s in zip(found["label"][drawn], found["score"][drawn], strict=True)]
    return Result(entries, None, found["mask"][drawn], names)


def semantic_result(x: Found, image_id: int | str, cfg: FastSAM2Config, categories: list[int]) -> Result:
    """The category of each pixel as PNG."""
    classes = semantic(x.classes, x.masks, x.size).argmax(0).cpu().numpy()  # (H, W)
    present = np.unique(classes)
    shown = classes == present[:, None, None]
    entry = {"image_id": image_id, "categories": [categories[k] for k in present]}
    return Result([entry], category_map(classes, categories), shown, [cfg.classes[k] for k in present])


def prompted_result(x: Found, image_id: int | str, objects: list[dict]) -> Result:
    """One entry an object: what pointed at it, its mask (logit > 0 at the picture's size) and, as score, the IoU that
    the network expects."""
    inside = (to_original(x.masks, x.size) > 0).cpu().numpy()
    entries = [
        {"image_id": image_id, **prompt, "segmentation": code, "score": float(score)}
        for prompt, code, score in zip(objects, rle_encode(inside), x.iou.float(), strict=True)
    ]
    return Result(entries, None, inside, [x.get("text", str(k)) for k, x in enumerate(objects, start=1)])


def segment_picture(
    task: str,
    model: FastSAM2,
    image: np.ndarray,
    image_id: int | str,
    objects: list[dict],
    how: How,
    embed: Callable[[list[str]], torch.Tensor] | None,
) -> Result:
    """A picture (H, W, 3) uint8, and the objects that it is asked for (none: all that is there) -> what was found, in
    the form of the task. embed: texts -> (n, E), where an object has one."""
    x, cfg = look(model, image, how.image_size, objects, embed, how.dtype), model.cfg
    if objects:
        return prompted_result(x, image_id, objects)
    if task == "semantic":
        return semantic_result(x, image_id, cfg, how.categories)
    if task == "instance":
        return instance_result(x, image_id, cfg, how.categories, how.top, how.least)
    return panoptic_result(x, image_id, cfg, how.categories, how.score, how.share)
