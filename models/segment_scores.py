"""How well a batch is segmented, in percent, for validation and overfitting: PQ, AP, mIoU, IoU of prompts; of clips AP of
tubes, VPQ, J&F.

The figures of papers come from files, eval/eval_panoptic.py and its neighbours; these here are of padded batches.
Batches are those of data/segment_batch.py, outputs those of FastSAM2. A clip counts as a video of its own.
"""

import numpy as np
import torch
import torch.nn.functional as F

from models.mask_losses import mask_iou
from models.panoptic_post import INSTANCE, ImageSize, instances, panoptic, semantic, to_original
from models.prompt_fusion import CLIP_TASKS, OBJECT_TASKS, STRIDE
from models.streaming_memory import ABSENT
from utils.instance_ap import coco_ap, ytvis_ap
from utils.masks import boundary_f, jaccard, rle_area, rle_box, rle_encode
from utils.panoptic_quality import (
    add_counts,
    areas,
    joint_counts,
    match_label_maps,
    match_tubes,
    mean_iou,
    panoptic_quality,
)

NAMES = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU", "interactive": "IoU", "referring": "right"}
NAMES |= {"vis": "AP", "vps": "VPQ", "vos": "J&F"}
WINDOWS = (1, 2, 4, 6)  # frames of VPQ, as far as a clip has so many
SURE = 0.5
NOTHING = float("nan")


class BatchScores:
    """Collects batches of one task, one `add` each; `score()` is the figure of NAMES, NaN of nothing.

    interactive also has `by_kind`: the IoUs of clicks and of boxes. right: share of sentences whose mask fits their own
    object better than any other that is spoken of. J&F: mean over objects and frames after that of the prompt, where an
    object that is hidden counts 1 if its mask is empty, else 0.
    `others()` has more of clips. vos, hidden: the share of such frames in which nothing is found. vis, IoU: mean over the
    true tubes of the best IoU of a tube of the same class with a score of at least SURE.
    """

    def __init__(self, task: str, is_thing: list[bool]):
        self.task, self.is_thing, K = task, is_thing, len(is_thing)
        self.parts, self.confusion, self.found, self.wanted = [], np.zeros((K, K)), [], []
        self.images, self.values, self.by_kind = [], [], {"click": [], "box": []}
        self.windows, self.hidden, self.tubes = {k: [] for k in WINDOWS}, [], []

    @torch.no_grad()
    def add(self, out: dict, batch: dict) -> None:
        H, W = batch["image"].shape[-2:]
        size = ImageSize((H, W), (H, W), (H, W))
        masks = seen_masks(out) if self.task == "vos" else out["masks"][-1].float()
        for b, found in enumerate(masks):
            if self.task in CLIP_TASKS:
                large = clip_masks(found, (H, W))  # (Q, T, H, W)
                if self.task == "vos":
                    self._add_followed(large, batch, b)
                else:
                    self._add_clip(out["classes"][-1][b], large, batch, b)
            elif self.task in OBJECT_TASKS:
                self._add_objects(out["classes"][-1][b], found, batch, b, size)
            else:
                self._add_prompts(found, batch, b, size)

    def _add_objects(self, logits, masks, batch, b: int, size: ImageSize) -> None:
        target, labels, ignore = (batch[k][b].cpu() for k in ("masks", "labels", "ignore"))
        things = torch.tensor(self.is_thing, device=logits.device)
        K = len(things)
        if self.task == "panoptic":
            truth = torch.full(size.original, K * INSTANCE)
            for k, (mask, label) in enumerate(zip(target, labels, strict=True), 1):
                truth[mask] = label * INSTANCE + k * self.is_thing[label]
            made = panoptic(logits, masks, things, size)["map"].cpu()
            made = made % INSTANCE * INSTANCE + made // INSTANCE  # class first
            self.parts.append(match_label_maps(truth.numpy(), made.numpy(), INSTANCE, K))
        elif self.task == "semantic":
            best = semantic(logits, masks, size).argmax(0).cpu()
            for mask, label in zip(target, labels.tolist(), strict=True):
                self.confusion[label] += np.bincount(best[mask & ~ignore].numpy(), minlength=K)
        else:
            self.images.append({"id": len(self.images) + 1, "height": size.original[0], "width": size.original[1]})
            number, one = len(self.images), instances(logits, masks, things, size)
            for mask, label, score in zip(one["mask"].cpu(), one["label"].tolist(), one["score"].tolist(), strict=True):
                self.found.append({"image_id": number, "category_id": label + 1, "score": score,
                                   "segmentation": rle_encode(mask.numpy())})  # fmt: skip
            for mask, label in zip(target, labels.tolist(), strict=True):
                code = rle_encode(mask.numpy())
                self.wanted.append({"image_id": number, "category_id": label + 1, "segmentation": code, "iscrowd": 0,
                                    "area": int(rle_area(code)), "bbox": rle_box(code)})  # fmt: skip

    def _add_prompts(self, masks, batch, b: int, size: ImageSize) -> None:
        target = batch["masks"][b].to(masks.device)
        if not len(target):
            return
        made = to_original(masks[: len(target)], size)
        if self.task == "interactive":
            iou = mask_iou(made, target).cpu()
            self.values += iou.tolist()
            self.by_kind["click"] += iou[(batch["point_labels"][b] == 1).any(1).cpu()].tolist()
            self.by_kind["box"] += iou[batch["has_box"][b].cpu()].tolist()
            return
        table = torch.stack([mask_iou(one.expand_as(target), target) for one in made]).cpu()  # (Q, Q)
        ids = batch["ids"][b].cpu()
        own = ids[:, None] == ids
        self.values += ((table * own).amax(1) > (table * ~own).amax(1)).float().tolist()

    def _add_clip(self, logits, masks, batch, b: int) -> None:
        """masks (N, T, H, W) logits."""
        target, labels = batch["masks"][b].cpu(), batch["labels"][b].tolist()
        things, (T, H, W) = torch.tensor(self.is_thing, device=logits.device), masks.shape[1:]
        tall = masks.flatten(1, 2)  # (N, T H, W)
        if self.task == "vps":
            made = panoptic(logits, tall, things)["map"].cpu().unflatten(0, (T, H)).numpy()
            made = np.where(made == len(things), 0, made + 1)
            truth = (target * torch.arange(1, len(target) + 1)[:, None, None, None]).sum(0).numpy()  # 0: void
            self._add_tubes(truth, made, dict(enumerate(labels, 1)))
            return
        self.images.append({"id": len(self.images) + 1, "height": H, "width": W, "length": T})
        number, one = {"video_id": len(self.images)}, instances(logits, tall, things)
        for tube, label, score in zip(one["mask"].cpu(), one["label"].tolist(), one["score"].tolist(), strict=True):
            codes = tube_codes(tube.unflatten(0, (T, H)))
            self.found.append({**number, "category_id": label + 1, "score": score, "segmentations": codes})
        for tube, label in zip(target, labels, strict=True):
            codes = tube_codes(tube)
            pixels = [None if c is None else int(rle_area(c)) for c in codes]
            self.wanted.append({**number, "category_id": label + 1, "segmentations": codes, "areas": pixels})
            alike = one["mask"][(one["label"] == label) & (one["score"] >= SURE)]
            iou = mask_iou(alike, tube.flatten(0, 1).to(alike.device).expand_as(alike))
            self.tubes.append(iou.max().item() if len(iou) else 0.0)

    def _add_tubes(self, truth, made, labels: dict[int, int]) -> None:
        """VPQ: ids (T, H, W), 0 nothing or void; labels: class of each true id. A found id is value of `panoptic` + 1."""
        frames = []
        for pair in zip(truth, made, strict=True):
            joint = joint_counts(*pair)
            gt = {i: {"category_id": labels[i], "area": n, "iscrowd": False} for i, n in areas(joint, 0).items() if i}
            found = {i: {"category_id": (i - 1) % INSTANCE, "area": n} for i, n in areas(joint, 1).items() if i}
            frames.append((joint, gt, found))
        for k in WINDOWS:
            if k <= len(frames):
                self.windows[k].append(match_tubes(frames, k))

    def _add_followed(self, masks, batch, b: int) -> None:
        """masks (P, T, H, W) logits; P: at least as many as targets."""
        ignore = batch["ignore"][b].cpu().numpy()
        targets, firsts = batch["masks"][b].cpu().numpy(), batch["first"][b].tolist()
        made = (masks[: len(targets)] > 0).cpu().numpy()
        for target, mask, first in zip(targets, made, firsts, strict=True):
            for t in range(first + 1, len(target)):
                J, there = float(jaccard(target[t], mask[t], ignore[t])), bool((target[t] & ~ignore[t]).any())
                value = (J + boundary_f(target[t], mask[t], ignore[t])) / 2 if there else J
                self.values.append(value)
                self.hidden += [] if there else [J]

    def score(self) -> float:
        if self.task == "panoptic":
            return 100 * self._quality(self.parts) if self.parts else NOTHING
        if self.task == "vps":
            each = [self._quality(parts) for parts in self.windows.values() if parts]
            return 100 * float(np.mean(each)) if each else NOTHING
        if self.task == "semantic":
            return 100 * mean_iou(self.confusion)["mIoU"]
        if self.task in ("instance", "vis"):
            categories = [{"id": k + 1, "name": str(k)} for k in range(len(self.is_thing))]
            labels = {"images": self.images, "videos": self.images, "categories": categories}
            labels["annotations"] = self.wanted
            ap = coco_ap if self.task == "instance" else ytvis_ap
            return 100 * ap(labels, self.found)["AP"] if self.found else 0.0
        return 100 * float(np.mean(self.values)) if self.values else NOTHING

    def others(self) -> dict[str, float]:
        """Further figures of clips, in percent."""
        kinds = {"vos": {"hidden": self.hidden}, "vis": {"IoU": self.tubes}}.get(self.task, {})
        return {name: 100 * float(np.mean(values)) if values else NOTHING for name, values in kinds.items()}

    def _quality(self, parts: list) -> float:
        pq = panoptic_quality(add_counts(parts), dict(enumerate(self.is_thing)))["All"]["pq"]
        return NOTHING if pq is None else pq


def seen_masks(out: dict) -> torch.Tensor:
    """Mask logits (B, P, T, h, w) of task vos; where a memory says that an object is not there, nothing."""
    masks = out["masks"][-1].float()
    return torch.where(out["present"][..., None, None], masks, ABSENT) if "present" in out else masks


def clip_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mask logits (Q, T, h, w) at the size of the batch, (Q, T, H, W): frame by frame, without the network's padding."""
    h, w = masks.shape[-2:]
    if not len(masks):
        return masks.new_zeros(0, masks.shape[1], *size)
    large = F.interpolate(masks, (STRIDE * h, STRIDE * w), mode="bilinear", align_corners=False)
    return large[..., : size[0], : size[1]]


def tube_codes(tube: torch.Tensor) -> list[dict | None]:
    """bool (T, H, W) on the CPU -> a code for each frame, None where it is empty."""
    return [rle_encode(mask.numpy()) if mask.any() else None for mask in tube]
