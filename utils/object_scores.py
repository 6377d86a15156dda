"""All scores of tracked objects of several prompts and videos, and the controls beside them.

HOTA and cgF1 are in utils/hota.py, AP of tracks in utils/instance_ap.py; here are mask IoU and J&F of each labelled
object, what eval/eval_ball.py prints of all of them, and predictions that know nothing.
"""

from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from utils.hota import Concept, ObjectTrack, combine, concept_counts, concept_f1, hota, hota_figures, track_iou
from utils.instance_ap import ytvis_ap
from utils.masks import boundary_f, rle_area, rle_box, rle_decode, rle_intersections
from utils.segmentation_files import exchange


def score_objects(concepts: list[Concept], kind: str, threshold: float, negatives: bool, quality: bool = True) -> dict:
    """Scores of predictions against labels.

    n objects, predicted (tracks with score >= threshold), "hota": nine figures of tracks with score > threshold, as the
    SA-Co evaluator; "concepts": what `concept_f1` says of those >= threshold; for masks and with `quality` also "ap":
    AP of tracks over prompts (phrase AP), and over categories, and "quality": means of mask IoU, J, F and J&F over the
    labelled objects.
    """
    sides = [([t.of(kind) for t in c.gt], [t.of(kind) for t in c.pred if t.score >= threshold]) for c in concepts]
    above = [[t.of(kind) for t in c.pred if t.score > threshold] for c in concepts]
    result = {"n": sum(len(gt) for gt, _ in sides), "predicted": sum(len(pred) for _, pred in sides)}
    result["hota"] = hota_figures(combine([hota(gt, own, kind) for (gt, _), own in zip(sides, above, strict=True)]))
    result["concepts"] = concept_f1([concept_counts(gt, pred, kind) for gt, pred in sides], negatives)
    if quality and kind == "mask":
        rows = [x for c, (gt, pred) in zip(concepts, sides, strict=True) for x in mask_quality(gt, pred, c.size)]
        result["quality"] = {k: float(np.mean([x[k] for x in rows])) for k in rows[0]}
        result["ap"] = track_ap(concepts)
    return result


def track_ap(concepts: list[Concept]) -> dict[str, float]:
    """AP of whole tracks by IoU of masks, all scores: "phrase_ap", "_50", "_75", each prompt of a video apart; "mAP",
    mean over categories that are labelled somewhere."""
    pairs, videos = list(range(1, len(concepts) + 1)), sorted({c.video for c in concepts})
    names = sorted({c.prompt for c in concepts if c.gt})
    found = {}
    for key, ids, categories in (
        ("phrase_ap", pairs, [1] * len(concepts)),
        ("mAP", [videos.index(c.video) + 1 for c in concepts], [names.index(c.prompt) + 1 if c.prompt in names else 0
                                                                for c in concepts]),
    ):  # fmt: skip
        shape = {i: {"id": i, "height": c.size[0], "width": c.size[1]} for i, c in zip(ids, concepts, strict=True)}
        labels = {"videos": list(shape.values()), "categories": [{"id": i} for i in sorted(set(categories) - {0})]}
        sides = {"gt": [], "pred": []}
        for video, category, c in zip(ids, categories, concepts, strict=True):
            for side, items in sides.items():
                items += [as_item(t, video, category) for t in getattr(c, side) if category]
        result = ytvis_ap(labels | {"annotations": sides["gt"]}, sides["pred"])
        found |= {"mAP": result["AP"]} if key == "mAP" else {key: result["AP"], f"{key}_50": result["AP50"],
                                                            f"{key}_75": result["AP75"]}  # fmt: skip
    return found


def as_item(track: ObjectTrack, video: int, category: int) -> dict:
    """A track in YouTube-VIS layout."""
    areas = [None if m is None else rle_area(m) for m in track.masks]
    return {"video_id": video, "category_id": category, "score": track.score, "segmentations": track.masks,
            "areas": areas}  # fmt: skip


# ---- mask IoU and J&F of each labelled object


def mask_quality(gt: list[list], pred: list[list], size: tuple[int, int]) -> list[dict[str, float]]:
    """Per labelled object, with the predicted track that `concept_counts` would match (none: empty masks):

    IoU, mean over the frames where either mask has a pixel; J and F, means over all frames as in DAVIS, where two empty
    masks have 1; F tolerates 0.8 % of the diagonal, which is wider than a ball: look at IoU and distance for balls.
    """
    iou = track_iou(gt, pred, "mask")
    partner = dict(zip(*linear_sum_assignment(-iou), strict=True))
    rows = []
    for k, track in enumerate(gt):
        other = pred[partner[k]] if k in partner and iou[k, partner[k]] > 0 else [None] * len(track)
        scores = np.array([frame_quality(a, b, size) for a, b in zip(track, other, strict=True)])  # (T, 2)
        seen = np.array([a is not None or b is not None for a, b in zip(track, other, strict=True)])
        J, F = scores.mean(0)
        rows.append({"IoU": float(scores[seen, 0].mean()), "J": float(J), "F": float(F), "J&F": float((J + F) / 2)})
    return rows


def frame_quality(a: dict | None, b: dict | None, size: tuple[int, int]) -> tuple[float, float]:
    """J and F of two codes of one frame. The boundary is looked for inside the box around both, far faster."""
    if a is None or b is None:
        return (1.0, 1.0) if a is b else (0.0, 0.0)
    inter = int(rle_intersections([a], [b])[0, 0])
    radius = int(np.ceil(0.008 * np.hypot(*size)))
    boxes = np.array([rle_box(a), rle_box(b)])
    x0, y0 = np.maximum(boxes[:, :2].min(0).astype(int) - 2, 0)
    x1, y1 = (boxes[:, :2] + boxes[:, 2:]).max(0).astype(int) + 2
    own, other = (rle_decode(code)[y0:y1, x0:x1] for code in (a, b))
    return inter / (rle_area(a) + rle_area(b) - inter), boundary_f(own, other, tolerance=radius)


# ---- controls


def first_kept(concepts: list[Concept]) -> list[Concept]:
    """Trivial baseline: each labelled object stays as it is where it first appears, in all frames."""

    def keep(items: list) -> list:
        return [next((x for x in items if x is not None), None)] * len(items)

    return [replace(c, pred=[ObjectTrack(keep(t.masks), keep(t.boxes)) for t in c.gt]) for c in concepts]


def misplaced(concepts: list[Concept]) -> tuple[list[Concept], str]:
    """Shuffled control, and how it was made: every prompt gets the tracks of another one, of the same size and length
    where there is one; where there is none, its own moved by half its length in time."""
    source = exchange({k: (c.frames, *c.size) for k, c in enumerate(concepts)})
    wrong = []
    for k, c in enumerate(concepts):
        half = c.frames // 2
        late = [
            replace(t, masks=t.masks[half:] + t.masks[:half], boxes=t.boxes[half:] + t.boxes[:half]) for t in c.pred
        ]
        wrong.append(replace(c, pred=concepts[source[k]].pred if k in source else late))
    how = f"{len(source)} of {len(concepts)} prompts have the tracks of another one"
    return wrong, how + (", the others their own, moved in time" if len(source) < len(concepts) else "")
