"""How well a batch is segmented, in percent, for validation and overfitting: PQ, AP, mIoU, IoU of prompts.

The figures of papers come from files, eval/eval_panoptic.py and its neighbours; these here are of padded batches.
Batches are those of data/segment_batch.py, outputs those of FastSAM2.
"""

import numpy as np
import torch

from models.mask_losses import mask_iou
from models.panoptic_post import INSTANCE, ImageSize, instances, panoptic, semantic, to_original
from models.prompt_fusion import OBJECT_TASKS
from utils.instance_ap import coco_ap
from utils.masks import rle_area, rle_box, rle_encode
from utils.panoptic_quality import add_counts, match_label_maps, mean_iou, panoptic_quality

NAMES = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU", "interactive": "IoU", "referring": "right"}


class BatchScores:
    """Collects batches of one image task, one `add` each; `score()` is the figure of NAMES, NaN of nothing.

    interactive also has `by_kind`: the IoUs of clicks and of boxes. right: share of sentences whose mask fits their own
    object better than any other that is spoken of.
    """

    def __init__(self, task: str, is_thing: list[bool]):
        self.task, self.is_thing, K = task, is_thing, len(is_thing)
        self.parts, self.confusion, self.found, self.wanted = [], np.zeros((K, K)), [], []
        self.images, self.values, self.by_kind = [], [], {"click": [], "box": []}

    @torch.no_grad()
    def add(self, out: dict, batch: dict) -> None:
        H, W = batch["image"].shape[-2:]
        size = ImageSize((H, W), (H, W), (H, W))
        for b, masks in enumerate(out["masks"][-1].float()):
            if self.task in OBJECT_TASKS:
                self._add_objects(out["classes"][-1][b], masks, batch, b, size)
            else:
                self._add_prompts(masks, batch, b, size)

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

    def score(self) -> float:
        if self.task == "panoptic":
            if not self.parts:
                return float("nan")
            return 100 * panoptic_quality(add_counts(self.parts), dict(enumerate(self.is_thing)))["All"]["pq"]
        if self.task == "semantic":
            return 100 * mean_iou(self.confusion)["mIoU"]
        if self.task == "instance":
            categories = [{"id": k + 1, "name": str(k)} for k in range(len(self.is_thing))]
            labels = {"images": self.images, "categories": categories, "annotations": self.wanted}
            return 100 * coco_ap(labels, self.found)["AP"] if self.found else 0.0
        return 100 * float(np.mean(self.values)) if self.values else float("nan")
