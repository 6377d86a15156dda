"""FastSAM2's network, prompt encoder, matching, losses and post-processing against arrays of the released code.

Reads LAB_SHARED/data/fastsam2/{ref_rapsam_head/rapsam_head_case,ref_sam_prompt_encoder/sam_prompt_encoder,
ref_m2f_post_loss/cases}*.npz, whatever is there; sizes come from the arrays. Tolerances, of an array's largest value:
neck and head 1e-4 (four decoder stages on weights drawn from parameter names), the rest 1e-5; labels exactly.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.fastsam2 import DynamicDecoder, FastSAM2Config, box_encoding
from models.lite_dfpn import LiteDFPN
from models.mask_losses import WEIGHTS, bce_loss, class_loss, dice_loss, iou_loss, mean_over
from models.matching import assign, bce_cost, class_cost, clip_ends, dice_cost, match_queries
from models.panoptic_post import INSTANCE, boxes_of, instances, panoptic, semantic
from models.sam_prompt_encoder import SAMPromptEncoder

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fastsam2"
NETWORK, TOLERANCE = 1e-4, 1e-5


def cases(pattern: str) -> dict[Path, dict[str, torch.Tensor]]:
    files = sorted(SHARED.glob(pattern))
    if not files:
        pytest.skip(f"no reference cases {pattern} in {SHARED}; set LAB_SHARED")
    return {f: {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(f).items()} for f in files}


def report(kind: str, errors: dict[str, float], tolerance: float, capsys) -> None:
    """Print n of n and how far off, then fail for what is further off than the tolerance."""
    right = sum(e <= tolerance for e in errors.values())
    with capsys.disabled():
        print(f"\n{kind}: {right} of {len(errors)} within {tolerance:g}, largest difference {max(errors.values()):.1e}")
    assert right == len(errors), errors


def error(ours: torch.Tensor, stored: torch.Tensor) -> float:
    """Largest difference as a part of the largest value; NaN counts as infinite."""
    assert ours.shape == stored.shape, (ours.shape, stored.shape)
    if not stored.numel():
        return 0.0
    largest = (ours.float() - stored.float()).abs().max() / stored.float().abs().max().clamp_min(1e-12)
    return largest.nan_to_num(torch.inf).item()


def differing(ours: torch.Tensor, stored: torch.Tensor) -> float:
    assert ours.shape == stored.shape, (ours.shape, stored.shape)
    return (ours != stored).sum().item()


# ---- RAP-SAM's neck and head


def from_name(name: str, shape: torch.Size) -> torch.Tensor:
    """The weight that the stored outputs were made with; the rule of the cases' README."""
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("running_var"):
        w = 1 + 0.1 * abs(r)
    elif name.endswith("running_mean"):
        w = 0.1 * r
    elif r.ndim == 1 or name.endswith(".bias"):
        scale = name.endswith("weight") and any(s in name for s in ("norm", "_bn", "cls_fcs.1", "mask_fcs.1"))
        w = 1 + 0.1 * r if scale else 0.05 * r
    else:
        s = (0.5 if "dcn_offset" in name else 1.0) / np.sqrt(np.prod(shape[1:]))
        w = (1.0 if any(k in name for k in ("kernels", "mask_tokens", "pb_embedding")) else s) * r
    return torch.from_numpy(np.asarray(w, dtype=np.float32))


def fill(module: torch.nn.Module, prefix: str, **given: torch.Tensor) -> dict[str, list[int]]:
    """Weights by name; returns {full name: shape} of what was filled."""
    state = module.state_dict()
    named = [k for k in state if k not in given and not k.endswith("num_batches_tracked")]
    module.load_state_dict({**state, **given, **{k: from_name(prefix + k, state[k].shape) for k in named}})
    module.eval()
    return {prefix + k: list(state[k].shape) for k in named}


def neck_of(case) -> tuple[LiteDFPN, dict[str, list[int]]]:
    neck = LiteDFPN(tuple(case[f"c{i}"].shape[1] for i in range(2, 6)), case["neck_out"].shape[1])
    return neck, fill(neck, "neck.")


def head_of(case) -> tuple[DynamicDecoder, dict[str, list[int]]]:
    K, V, E = case["classifier"].shape
    N, D = case["img_kernels"].shape[1:]
    stages = sum(k.startswith("img_cls") for k in case) - 1
    cfg = FastSAM2Config(
        classes=[str(i) for i in range(K)], queries=N, dim=D, stages=stages, embed_dim=E, synonyms=V, compat=True
    )
    head = DynamicDecoder(cfg)
    return head, fill(head, "head.", classifier=case["classifier"])


def of_output(name: str, out: dict, case, prefix: str) -> dict[str, float]:
    keys = {"classes": "cls", "masks": "mask", "iou": "iou"}
    errors = {
        f"{name} {prefix} {ours} {i}": error(value, case[f"{prefix}_{stored}{i}"])
        for ours, stored in keys.items()
        for i, value in enumerate(out[ours])
    }
    return errors | {f"{name} {prefix} kernels": error(out["queries"], case[f"{prefix}_kernels"])}


@torch.no_grad()
def test_rapsam_neck_and_head(capsys):
    errors = {}
    for path, case in cases("ref_rapsam_head/rapsam_head_case*.npz").items():
        neck, _ = neck_of(case)
        found = neck([case[f"c{i}"].float() for i in range(2, 6)])
        errors[f"{path.stem} neck"] = error(found, case["neck_out"])

        head, _ = head_of(case)
        features = case["feat"].float()
        errors |= of_output(path.stem, head(features), case, "img")
        T = case["vid_mask0"].shape[2]
        errors |= of_output(path.stem, head(features.unflatten(0, (-1, T))), case, "vid")

        H, W = (4 * n for n in features.shape[2:])
        boxes = case["prompt_boxes_xyxy"]
        encoding = box_encoding(boxes / torch.tensor([W, H, W, H]), features.shape[1])
        errors[f"{path.stem} box encoding"] = error(encoding, case["prompt_coord_encoding"])
        queries = head.box_queries(boxes, case["prompt_pb"], (H, W))
        errors |= of_output(path.stem, head(features, queries, objects=False), case, "prm")
    report("RAP-SAM neck and head, relative", errors, NETWORK, capsys)


def test_released_weights_need_no_renaming(capsys):
    """Names and shapes of the released state equal ours, so a converter copies; only the classifier comes extra."""
    errors = {}
    for path, case in cases("ref_rapsam_head/rapsam_head_case*.npz").items():
        listed = path.with_name(path.name.replace("rapsam_head_case", "param_names_shapes")).with_suffix(".json")
        if not listed.is_file():
            continue
        released = {name: tuple(shape) for name, shape in json.loads(listed.read_text())["params"]}
        ours = {k: tuple(v) for k, v in {**neck_of(case)[1], **head_of(case)[1]}.items()}
        errors[path.stem] = len(set(released.items()) ^ set(ours.items()))
    report("RAP-SAM names and shapes, different ones", errors, 0, capsys)


# ---- SAM's prompt encoder


@torch.no_grad()
def test_sam_prompt_encoder(capsys):
    errors = {}
    for path, case in cases("ref_sam_prompt_encoder/sam_prompt_encoder*.npz").items():
        state = {k.removeprefix("w."): v for k, v in case.items() if k.startswith("w.")}
        dim, channels = state["mask_downscaling.6.weight"].shape[:2]
        encoder = SAMPromptEncoder(dim, channels).eval()
        encoder.load_state_dict(state, strict=True)
        grid = tuple(case["dense_pe"].shape[2:])
        size = tuple(case.get("input_image_size", 16 * torch.tensor(grid)).tolist())
        clicks = {"points_px": case["points"], "labels": case["labels"]}
        box, mask = {"boxes_xyxy_px": case["boxes"]}, {"masks": case["masks"]}
        mixes = {"point": clicks, "box": box, "point_box": clicks | box, "mask": mask, "all": clicks | box | mask}
        for name, prompts in mixes.items():
            sparse, dense = encoder(size, grid, **prompts)
            stored = case["mask_dense"] if "masks" in prompts else case["no_mask_dense_value"][:, None, None]
            errors[f"{path.stem} {name} sparse"] = error(sparse, case[f"{name}_sparse"])
            errors[f"{path.stem} {name} dense"] = error(dense, stored.expand_as(dense))
        errors[f"{path.stem} grid code"] = error(encoder.grid_code(grid)[None], case["dense_pe"])
    report("SAM prompt encoder, relative", errors, TOLERANCE, capsys)


# ---- post-processing, matching, losses


def things_of(case) -> torch.Tensor:
    """bool (K,): things come first; their number is one more than the largest class seen as an instance."""
    K = case["post_cls"].shape[1] - 1
    maps = torch.cat([v.flatten() for k, v in case.items() if k.startswith("panoptic_")])
    seen = torch.cat([case["ins_labels"], (maps % INSTANCE)[maps >= INSTANCE].long()])
    return torch.arange(K) < int(case.get("num_things", seen.max() + 1))


@torch.no_grad()
def test_post_processing(capsys):
    labels, numbers = {}, {}
    for path, case in cases("ref_m2f_post_loss/cases*.npz").items():
        logits, masks, things, name = case["post_cls"], case["post_mask"], things_of(case), path.stem
        ways = {"filter": {}, "nofilter": {"filter_low": False}, "loose": {"threshold": 0.3, "overlap": 0.4}}
        for way, settings in ways.items():
            stored = case[f"panoptic_{way}"]
            labels[f"{name} {way}"] = differing(panoptic(logits, masks, things, **settings)["map"], stored)
        found = instances(logits, masks, things, top=int(case.get("max_per_image", 20)))
        stored = torch.from_numpy(np.unpackbits(case["ins_masks"].numpy(), axis=-1)[..., : masks.shape[2]]).bool()
        labels[f"{name} instance labels"] = differing(found["label"], case["ins_labels"])
        labels[f"{name} instance masks"] = differing(found["mask"], stored)
        labels[f"{name} instance boxes"] = differing(found["boxes_xyxy_px"], case["ins_boxes"])
        labels[f"{name} boxes"] = differing(boxes_of(stored), case["ins_boxes"])
        numbers[f"{name} instance scores"] = error(found["score"], case["ins_scores"])
        numbers[f"{name} semantic"] = error(semantic(logits, masks), case["semantic"])
    report("post-processing, different labels", labels, 0, capsys)
    report("post-processing, scores", numbers, TOLERANCE, capsys)


@torch.no_grad()
def test_matching_and_losses(capsys):
    exact, numbers = {}, {}
    for path, case in cases("ref_m2f_post_loss/cases*.npz").items():
        name, logits, labels = path.stem, case["match_cls"], case["match_gt_labels"]
        masks, targets = case["match_mask"], case["match_gt_mask"]
        costs = {
            "cls": WEIGHTS["class"] * class_cost(logits, labels),
            "bce": WEIGHTS["mask"] * bce_cost(masks, targets),
            "dice": WEIGHTS["dice"] * dice_cost(masks, targets),
        }
        numbers |= {f"{name} cost {k}": error(v, case[f"cost_{k}"]) for k, v in costs.items()}
        rows, columns = assign(sum(costs.values()))
        given = torch.zeros_like(case["assigned_gt_index_1based"])
        given[rows] = columns + 1
        exact[f"{name} assignment"] = differing(given, case["assigned_gt_index_1based"])
        order = match_queries(case["emb_prev"][0], case["emb_cur"][0])
        exact[f"{name} queries"] = differing(order, case["emb_indices"])

        expected = path.with_name(path.name.replace("cases", "expected")).with_suffix(".json")
        if not expected.is_file():
            continue
        expected = json.loads(expected.read_text())
        wanted = torch.full((len(logits),), logits.shape[1] - 1).scatter(0, rows, labels[columns])
        dice = dice_loss(masks[rows], targets[columns])
        mask, whole = WEIGHTS["mask"] * mean_over(bce_loss(masks[rows], targets[columns])), mean_over(dice)
        iou = WEIGHTS["iou"] * mean_over(iou_loss(case["prompt_iou_pred"], 1 - dice))
        ours = {"loss_cls": WEIGHTS["class"] * class_loss(logits, wanted), "loss_mask": mask, "prompt_loss_mask": mask}
        ours |= {"loss_dice": WEIGHTS["dice"] * whole, "prompt_loss_dice": WEIGHTS["dice"] * whole}
        for key, value in {**ours, "prompt_loss_iou": iou}.items():
            numbers[f"{name} {key}"] = error(value, torch.tensor(expected[key]))
        for key, ends in expected["video_split"].items():
            exact[f"{name} clips {key}"] = float(clip_ends(*map(int, key.split("_"))) != ends)
    report("matching, clips: different entries", exact, 0, capsys)
    report("costs and losses, relative", numbers, TOLERANCE, capsys)


def test_costs_are_the_losses_of_each_pair():
    """The pairwise costs and the losses are one formula written twice; no stored array needed."""
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, 64), torch.rand(5, 64)
    torch.testing.assert_close(bce_cost(logits, targets).diagonal(), bce_loss(logits, targets))
    torch.testing.assert_close(dice_cost(logits, targets).diagonal(), dice_loss(logits, targets))
    stable = F.binary_cross_entropy_with_logits(logits[:1].expand(5, -1), targets, reduction="none").mean(1)
    torch.testing.assert_close(bce_cost(logits, targets)[0], stable)
