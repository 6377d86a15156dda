"""Pooling, decoder, merge head, matching and losses (with all gradients) against ESAM's own modules.

Reads LAB_SHARED/data/esam/module_cases: pooling*, decoder_*, merge_head_*, losses_b*, merge_loss*, whatever lies there;
sizes come from the arrays. Tolerance: 1e-5 of the largest number of each array (float32); matches are equal.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.esam_losses import ESAMCriterion, FrameTargets, match_objects, merge_loss
from models.superpoint_decoder import MergeHead, Stage, SuperpointDecoder
from models.superpoint_pooling import GeometryAwarePooling

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "esam"
HEADS = 4  # of the cases' decoders; no array shows it
Case = dict[str, torch.Tensor]


def cases(kind: str) -> list[tuple[str, Case]]:
    found = sorted((SHARED / "module_cases").glob(f"{kind}*.npz"))
    if not found:
        pytest.skip(f"no reference cases {kind}* in {SHARED}; set LAB_SHARED")
    return [(p.stem, {k: torch.from_numpy(v) for k, v in np.load(p).items()}) for p in found]


class Tally:
    """Compares arrays, remembers how many and how far the worst is off."""

    def __init__(self):
        self.arrays, self.worst = 0, 0.0

    def close(self, got: torch.Tensor, want: torch.Tensor, name: str) -> None:
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        off = float((got.detach() - want).abs().max() / want.abs().max().clamp(min=1e-3))
        assert off <= 1e-5, f"{name}: off by {off:.1e} of its largest number"
        self.arrays, self.worst = self.arrays + 1, max(self.worst, off)

    def tell(self, capsys, what: str, n: int) -> None:
        with capsys.disabled():
            print(f"\n{what}: {n} of {n} cases, {self.arrays} arrays, worst {self.worst:.1e}", end="")


def load(module: torch.nn.Module, z: Case) -> torch.nn.Module:
    module.load_state_dict({k.removeprefix("w."): v for k, v in z.items() if k.startswith("w.")})
    return module.eval()


def numbered(z: Case, prefix: str) -> list[str]:
    """prefix0, prefix1, ... as far as there are keys that begin so."""
    names, i = [], 0
    while any(k.startswith(f"{prefix}{i}") for k in z):
        names.append(f"{prefix}{i}")
        i += 1
    return names


def test_pooling(capsys):
    found, tally = cases("pooling"), Tally()
    for name, z in found:
        pool = load(GeometryAwarePooling(z["x"].shape[1]), z)
        xyz = torch.cat([z[k] for k in numbered(z, "xyz")])
        features, weights, centres = pool(z["x"], xyz, z["sp_index_flat"], len(z["out"]))
        tally.close(features, z["out"], f"{name} out")
        tally.close(weights, z["weights"], f"{name} weights")
        tally.close(torch.cat([features, centres], 1), z["out_with_xyz"], f"{name} out_with_xyz")
    tally.tell(capsys, "geometry-aware pooling", len(found))


def reference_decoder(z: Case) -> tuple[SuperpointDecoder, list[str]]:
    """The case's decoder, and what its stages are called there."""
    stages = [f"{name}." for name in numbered(z, "aux")] + ["out."]
    levels = tuple("SP" if z[f"{s}masks"].shape[1] == len(z["sp_feats"]) else "P" for s in stages)
    dim, in_channels = z["w.input_proj.0.weight"].shape
    ffn, K, C = (len(z[f"w.{k}"]) for k in ("ffn_layers.0.net.0.bias", "out_cls.2.bias", "out_sem.bias"))
    boxes = "w.out_reg.0.weight" in z
    return load(SuperpointDecoder(in_channels, dim, HEADS, ffn, K - 1, C - 1, levels, boxes), z), stages


def test_decoder(capsys):
    found, tally = cases("decoder_"), Tally()
    for name, z in found:
        decoder, stages = reference_decoder(z)
        out = decoder([z["sp_feats"]], [z["p_feats"]], [z["queries"]], [z["sp"]], [z["xyz_w"]])
        assert len(out.stages) == len(stages)
        for stage, prefix in zip(out.stages, stages, strict=True):
            tally.close(stage.cls[0], z[f"{prefix}cls_preds"], f"{name} {prefix}cls_preds")
            tally.close(stage.masks[0], z[f"{prefix}masks"], f"{name} {prefix}masks")
            assert (stage.boxes is not None) == (f"{prefix}bboxes" in z)
            if stage.boxes is not None:
                tally.close(stage.boxes[0], z[f"{prefix}bboxes"], f"{name} {prefix}bboxes")
        tally.close(out.sem[0], z["out.sem_preds"], f"{name} sem_preds")
        tally.close(out.queries[0], z["out.queries"], f"{name} queries")
    tally.tell(capsys, "query decoder", len(found))


def test_decoder_among_other_items(capsys):
    """The same beside an item of another size, so that everything is padded."""
    found, tally = cases("decoder_"), Tally()
    for name, z in found:
        decoder, stages = reference_decoder(z)
        torch.manual_seed(0)
        S, N = len(z["sp_feats"]) + 5, len(z["sp"]) + 7
        (C_in, C_points), Q = (z[k].shape[1] for k in ("sp_feats", "p_feats")), len(z["queries"]) + 3
        out = decoder(
            [torch.randn(S, C_in), z["sp_feats"], z["sp_feats"][:1]],
            [torch.randn(N, C_points), z["p_feats"], z["p_feats"][:9]],
            [torch.randn(Q, C_in), z["queries"], z["queries"][:1]],
            [torch.arange(N) % S, z["sp"], torch.zeros(9, dtype=torch.int64)],
            [torch.rand(N, 1), z["xyz_w"], z["xyz_w"][:9]],
        )
        for stage, prefix in zip(out.stages, stages, strict=True):
            tally.close(stage.cls[1], z[f"{prefix}cls_preds"], f"{name} {prefix}cls_preds")
            tally.close(stage.masks[1], z[f"{prefix}masks"], f"{name} {prefix}masks")
        tally.close(out.sem[1], z["out.sem_preds"], f"{name} sem_preds")
        tally.close(out.queries[1], z["out.queries"], f"{name} queries")
    tally.tell(capsys, "query decoder in a batch of unequal items", len(found))


def test_merge_head(capsys):
    found, tally = cases("merge_head_"), Tally()
    for name, z in found:
        hidden, dim = z["w.net.0.weight"].shape
        norm = "batch" if "w.net.1.running_mean" in z else "layer"
        head = load(MergeHead(dim, hidden, z["out"].shape[1], norm), z)
        tally.close(head(z["q"]), z["out"], f"{name} out")
    tally.tell(capsys, "merge head", len(found))


def reference_targets(z: Case, b: int) -> FrameTargets:
    """The case lists the objects and behind them, in the same arrays, the semantic classes."""
    G = len(z[f"{b}.p_masks"])
    queries = z[f"{b}.query_masks"].bool()
    return FrameTargets(
        labels=z[f"{b}.labels"][:G],
        superpoints=z[f"{b}.sp_masks"][:G].bool(),
        points=z[f"{b}.p_masks"].bool(),
        queries=queries[:G],
        boxes=z[f"{b}.boxes"][:G, :6],
        semantic=queries[G:].int().argmax(0),
    )


def reference_outputs(z: Case, targets: list[FrameTargets]) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    """What the criterion reads, and its leaves by the names of their gradients in the case."""
    leaves, items = {}, range(len(targets))

    def leaf(b: int, prefix: str, key: str) -> torch.Tensor:
        leaves[f"{b}.{prefix}grad.{key}"] = x = z[f"{b}.{prefix}{key}"].clone().requires_grad_()
        return x

    stages = []
    for prefix in [*(f"{k.removeprefix('0.')}." for k in numbered(z, "0.aux")), ""]:
        cls, masks = ([leaf(b, prefix, key) for b in items] for key in ("cls_preds", "masks"))
        boxes = [leaf(b, prefix, "bboxes") for b in items] if f"0.{prefix}bboxes" in z else None
        level = "P" if masks[0].shape[1] == targets[0].points.shape[1] else "SP"
        stages.append(Stage(cls, masks, boxes, level))
    sem = [leaf(b, "", "sem_preds") for b in items]
    return SimpleNamespace(stages=stages, sem=sem, centres=[z[f"{b}.centers"] for b in items]), leaves


def test_losses_and_matches(capsys):
    found, tally, objects = cases("losses_b"), Tally(), 0
    for name, z in found:
        targets = [reference_targets(z, b) for b in range(int(z["batch"]))]
        out, leaves = reference_outputs(z, targets)
        losses = ESAMCriterion(n_classes=out.sem[0].shape[1] - 1)(out, targets)
        losses["loss"].backward()
        tally.close(losses["instance"], z["inst_loss"], f"{name} inst_loss")
        tally.close(losses["semantic"], z["seg_loss"], f"{name} seg_loss")
        for key, x in leaves.items():
            tally.close(x.grad, z[key], f"{name} {key}")
        last = out.stages[-1]
        for b, t in enumerate(targets):
            wanted = t.points if last.level == "P" else t.superpoints
            query, matched = match_objects(last.cls[b], last.masks[b], t.labels, wanted, t.queries)
            pairs = sorted((int(query[g]), int(g)) for g in matched.nonzero())
            theirs = zip(z[f"{b}.match_q"].tolist(), z[f"{b}.match_gt"].tolist(), strict=True)
            assert pairs == sorted(theirs), f"{name}: matches of item {b}"
            objects += len(pairs)
    tally.tell(capsys, f"losses and gradients, {objects} of {objects} matches", len(found))


def test_merge_loss(capsys):
    found, tally = cases("merge_loss"), Tally()
    for name, z in found:
        scenes = range(len(numbered(z, "")))
        frames = range(len(numbered(z, "0.")))
        vectors = [[z[f"{b}.{t}.feat"].clone().requires_grad_() for b in scenes] for t in frames]
        instances = [[z[f"{b}.{t}.instance_of_query"] for b in scenes] for t in frames]
        loss = merge_loss(vectors, instances, [int(z["n_instances"])] * len(scenes))
        loss.backward()
        tally.close(loss, z["loss"], f"{name} loss")
        for t in frames:
            for b in scenes:
                tally.close(vectors[t][b].grad, z[f"{b}.{t}.grad"], f"{name} {b}.{t}.grad")
    tally.tell(capsys, "merge loss and gradients", len(found))
