"""What SAM3's tracker remembers of a video, in bounded memory, and a SAM3 video model without two of its faults.

transformers keeps every frame and every mask for ever. Nothing of that is read again but, per object, the memory maps
of the last frames, the pointers of some more, and the frames in which the object was pointed at. `prune` deletes the
rest: no mask changes by a bit as long as an object was pointed at in no more frames than its attention takes (4); of
more, the first and the newest stay.

Each object has a transformers session of its own. So pointing at one leaves the others' memories alone (in a common
session all memories of such a frame are written as if every object had been pointed at), and any can be dropped.

Shapes: N objects, H W frame, m side of the model's own masks, S side of the model's pictures.
Sources: Meta, SAM 3, arXiv 2511.16719; Ravi et al., SAM 2, arXiv 2408.00714.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.models.sam3_video import modeling_sam3_video

from models.sam3_tracker import Features, Sam3Engine, Tracked, clean_logits, component_areas

# ---- memory of one object


class ObjectMemory(transformers.Sam3TrackerVideoInferenceSession):
    """The transformers session of one object, which gets the features of frames and keeps no frame."""

    @property
    def num_frames(self) -> int:
        """No limit, as in a stream: how far back pointers go and how their age is coded depends on it."""
        return sys.maxsize

    @property
    def outputs(self) -> tuple[dict, dict]:
        """{frame: what is stored of it} of the frames in which the object was pointed at, and of the others."""
        stored = self.output_dict_per_obj[0]
        return stored["cond_frame_outputs"], stored["non_cond_frame_outputs"]


def prune(memory: ObjectMemory, t: int, config: "transformers.Sam3TrackerVideoConfig") -> None:
    """Delete what frame t, if asked for again, and all later frames do not read."""
    pointed, others = memory.outputs
    for out in (*pointed.values(), *others.values()):
        out.pop("high_res_masks", None)
    for frame in list(others):
        if frame < t - (config.num_maskmem - 1):
            for name in ("maskmem_features", "maskmem_pos_enc", "pred_masks"):
                others[frame].pop(name, None)
        if frame < t - (config.max_object_pointers_in_encoder - 1):
            del others[frame]
    surplus = len(pointed) - config.max_cond_frame_num
    for frame in sorted(pointed)[1 : 1 + max(0, surplus)]:
        del pointed[frame]
    tracked = memory.frames_tracked_per_obj[0]
    for frame in [frame for frame in tracked if frame < t]:
        del tracked[frame]
    for inputs in (memory.mask_inputs_per_obj[0], memory.point_inputs_per_obj[0]):
        inputs.clear()  # read once, by the pass that follows them


# ---- session


class Session:
    """The objects followed in one video. Frames come in order of time; a frame may be asked for again until the next.

    exact_memory: keep everything, as transformers does; then any frame may be asked for again, and memory grows.
    """

    def __init__(self, engine: Sam3Engine, size: tuple[int, int], exact_memory: bool = False):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"session: size {size}, expected (H, W) in px")
        self.engine, self.size, self.exact_memory = engine, (int(size[0]), int(size[1])), exact_memory
        self.tracker, self.newest = engine.model.tracker_model, -1
        pictures, videos = engine.processor.image_processor, engine.processor.video_processor
        self.processor = transformers.Sam3TrackerVideoProcessor(image_processor=pictures, video_processor=videos)
        self.memories: dict[int, ObjectMemory] = {}

    @property
    def objects(self) -> list[int]:
        return list(self.memories)

    @torch.inference_mode()
    def seed(self, features: Features, t: int, obj_id: int, mask=None, box=None, points=None) -> Tracked:
        """Point at an object in frame t, a new one or one that is followed already: a fresh look at the frame that
        does not read the memory, and stays in it as a frame in which the object was pointed at.

        One of mask (H, W) bool, box (x0, y0, x1, y1) px, points [(x, y, label)] px with label 1 inside, 0 outside.
        What is remembered of a mask is the mask at S px; what is returned is what the model's coarser logits hold of it,
        which of an object smaller than about half of their cells is nothing.
        ValueError for none or several of these, an empty mask, something outside the frame, or a frame in the past.
        """
        inputs = self.inputs(mask, box, points)
        self.advance(features, t)
        memory = self.memories.get(obj_id)
        if memory is None:
            device, dtype = self.engine.device, self.engine.dtype
            memory = ObjectMemory(None, *self.size, device, device, device, dtype)
            memory.obj_id_to_idx(0)
            self.memories[obj_id] = memory
        memory.outputs[1].pop(t, None)  # frame t counts as not tracked, else the seed would not be one for long
        memory.frames_tracked_per_obj[0].pop(t, None)
        self.processor.add_inputs_to_inference_session(
            memory, frame_idx=t, obj_ids=[0], original_size=self.size, **inputs
        )
        return self.look(memory, features, t)

    @torch.inference_mode()
    def track(self, features: Features, t: int) -> dict[int, Tracked]:
        """Every object in frame t, {obj_id: Tracked}; {} without objects. An object pointed at in this frame answers
        what `seed` answered, one that is first pointed at in a later frame is left out. ValueError as in `seed`."""
        self.advance(features, t)
        known = {k: m for k, m in self.memories.items() if min(m.outputs[0]) <= t}
        return {obj_id: self.look(memory, features, t) for obj_id, memory in known.items()}

    def drop(self, obj_id: int) -> None:
        """Forget an object. KeyError for an unknown one."""
        del self.memories[obj_id]

    def bytes(self) -> int:
        """Bytes of all tensors that the session holds, each storage once."""
        found = {}

        def count(value):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            elif isinstance(value, dict):
                for inner in value.values():
                    count(inner)

        for memory in self.memories.values():
            for held in (memory.output_dict_per_obj, memory.mask_inputs_per_obj, memory.point_inputs_per_obj):
                count(held)
        return sum(found.values())

    def advance(self, features: Features, t: int) -> None:
        """Check that frame t may follow, and note it."""
        if t < 0 or (t < self.newest and not self.exact_memory):
            raise ValueError(f"frame {t} after frame {self.newest}: expected frames in order, or exact_memory")
        if tuple(features.size) != self.size:
            raise ValueError(f"frame {t} is {features.size} (H, W), the session has {self.size}")
        self.newest = max(self.newest, t)

    def inputs(self, mask, box, points) -> dict:
        """The arguments of `seed` as the processor takes them."""
        if sum(x is not None for x in (mask, box, points)) != 1:
            raise ValueError("seed: expected one of mask, box and points")
        H, W = self.size
        if mask is not None:
            mask = torch.as_tensor(np.asarray(mask), dtype=torch.float32)
            if tuple(mask.shape) != self.size or not mask.any():
                raise ValueError(
                    f"seed: mask {tuple(mask.shape)} with {int(mask.sum())} px, expected some of {self.size}"
                )
            S = self.engine.image_size
            small = F.interpolate(mask[None, None], (S, S), mode="bilinear", align_corners=False, antialias=True)
            return {"input_masks": [small >= min(0.5, small.max().item())]}  # the smallest object keeps a pixel
        if box is not None:
            x0, y0, x1, y1 = (float(v) for v in box)
            if not (x0 <= x1 and y0 <= y1 and x1 >= 0 and y1 >= 0 and x0 < W and y0 < H):
                raise ValueError(f"seed: box {tuple(box)} in a frame of {W} x {H} px, expected x0, y0, x1, y1 in it")
            return {"input_boxes": [[[x0, y0, x1, y1]]]}
        rows = [(float(x), float(y), int(label)) for x, y, label in points]
        if not rows or any(not (0 <= x < W and 0 <= y < H and k in (0, 1)) for x, y, k in rows):
            raise ValueError(f"seed: points {rows} in a frame of {W} x {H} px, expected (x, y, label 0 or 1) in it")
        return {"input_points": [[[[x, y] for x, y, _ in rows]]], "input_labels": [[[k for _, _, k in rows]]]}

    def look(self, memory: ObjectMemory, features: Features, t: int) -> Tracked:
        """One object in frame t; what it found goes into its memory."""
        memory.cache.cache_vision_features(t, {"vision_feats": features.maps, "vision_pos_embeds": features.positions})
        out = self.tracker(memory, frame_idx=t)
        memory.cache.clear_all()
        if not self.exact_memory:
            prune(memory, t, self.tracker.config)
        logits = out.pred_masks[0, :1].float().cpu().numpy()  # (1, m, m)
        logit = float(out.object_score_logits.reshape(-1)[0])
        cleaned = clean_logits(logits - self.engine.cut, self.engine.model.fill_hole_area)
        mask = self.engine.enlarge(cleaned, self.size)[0]
        return Tracked(mask, logits[0], float(torch.tensor(logit).sigmoid()), logit)


# ---- the whole video model


class MaskKernels:
    """What SAM3's video model takes from the package `kernels`, in numpy and scipy."""

    @staticmethod
    def generic_nms(
        ious: torch.Tensor, scores: torch.Tensor, iou_threshold: float, use_iou_matrix: bool = True
    ) -> torch.Tensor:
        """ious (N, N), scores (N,) -> indices of kept masks, best first."""
        order = scores.argsort(descending=True, stable=True).tolist()
        near, kept = (ious > iou_threshold).cpu().numpy(), []
        for i in order:
            if not near[i, kept].any():
                kept.append(i)
        return torch.tensor(kept, dtype=torch.int64, device=ious.device)

    @staticmethod
    def cc_2d(masks: torch.Tensor, get_counts: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """masks uint8 (N, 1, H, W) -> for each pixel 1 where it is set, and the px of its component, 8-connected."""
        areas = [component_areas(m) for m in masks[:, 0].bool().cpu().numpy()]
        areas = torch.from_numpy(np.stack(areas)[:, None]).to(masks.device, torch.int32)
        return (areas > 0).int(), areas


class FixedVideoModel(transformers.Sam3VideoModel):
    """transformers' SAM3 for whole videos, same weights, with two repairs and one addition.

    Duplicate masks are suppressed and masks are cleaned, also without the package `kernels`. In the frame in which an
    object is removed, the others keep their masks and scores (upstream attaches those of the old list to the new
    one). The detections of the newest frame are in session.detections: {prompt: {bbox, mask, scores}}.
    """

    def __init__(self, config: "transformers.Sam3VideoConfig"):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = set()  # the parts' lists: each ignores the others' tensors
        modeling_sam3_video.cv_utils_kernel = MaskKernels()

    def run_detection(self, inference_session, vision_embeds):
        inference_session.detections = super().run_detection(inference_session, vision_embeds)
        return inference_session.detections

    def run_tracker_update_execution_phase(self, inference_session, *args, **kwargs):
        inference_session.ids_of_masks = list(inference_session.obj_ids)
        return super().run_tracker_update_execution_phase(inference_session, *args, **kwargs)

    def build_outputs(self, inference_session, det_out, tracker_low_res_masks_global, tracker_update_plan, **kwargs):
        # masks and scores of this frame belong to the list from before removals; forward sets the new one afterwards
        inference_session.obj_ids = inference_session.ids_of_masks
        masks = super().build_outputs(
            inference_session, det_out, tracker_low_res_masks_global, tracker_update_plan, **kwargs
        )
        return {k: v for k, v in masks.items() if k not in tracker_update_plan["obj_ids_newly_removed"]}
