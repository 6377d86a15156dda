"""ESAM's decoder: superpoints ask which points are theirs, of superpoints first and then of points; and the merge head.

A layer lets each query look at the superpoints under its last mask, then at the other queries. After each layer, and
before the first, one head says class, mask and box. Level SP: masks over superpoints; level P: over points.

Shapes: B items, Q queries, S superpoints and N points of an item (each item has its own), D width, K classes of things,
C semantic classes. Source: Xu et al., "EmbodiedSAM: Online Segment Any 3D Thing in Real Time", ICLR 2025, sec. 3.2 and
3.3. Parameters are named as in the released weights.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from models.prompt_fusion import Attention
from models.sparse_conv import Groups

LEVELS = ("SP", "P")


@dataclass
class Stage:
    """What the head says, one entry per item.

    cls: (Q, K + 1) logits, the last is "no object". masks: logits (Q, S) at level "SP", (Q, N) at level "P". boxes:
    (Q, 6) offset (m) of the box's middle from the mean of the query's superpoint, and sizes (m); None without boxes."""

    cls: list[torch.Tensor]
    masks: list[torch.Tensor]
    boxes: list[torch.Tensor] | None
    level: str


@dataclass
class DecoderOutput:
    """stages: the head before the first layer and after each. sem: (Q, C + 1) logits per item, the last "unlabelled".
    queries: (Q, D) per item, normed."""

    stages: list[Stage]
    sem: list[torch.Tensor]
    queries: list[torch.Tensor]


class AttentionLayer(nn.Module):
    """LN(x + attention of x (B, Q, D) over memory (B, S, D)); visible bool (B, 1, Q, S), True: may be seen."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn, self.norm = Attention(dim, heads), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        return self.norm(x + self.attn(x, memory, visible))


class FeedForwardLayer(nn.Module):
    """LN(x + W2 GELU(W1 x)); the released network has dropout of 0 at places 2 and 4."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.net(x))


def mlp(inputs: int, dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, dim), nn.ReLU(), nn.Linear(dim, outputs))


class SuperpointDecoder(nn.Module):
    """n_classes: K. n_semantic: C. levels: of the masks before the first layer and after each, so one more than layers.
    boxes: whether there is a head of boxes."""

    def __init__(
        self,
        in_channels: int = 96,
        dim: int = 256,
        heads: int = 8,
        ffn: int = 1024,
        n_classes: int = 198,
        n_semantic: int = 200,
        levels: tuple[str, ...] = ("SP", "SP", "P", "P"),
        boxes: bool = False,
    ):
        super().__init__()
        if len(levels) < 2 or not set(levels) <= set(LEVELS):
            raise ValueError(f"levels {levels}: expected two or more of {LEVELS}")
        if dim % heads:
            raise ValueError(f"dim {dim} is no multiple of heads {heads}")
        self.levels, layers = tuple(levels), len(levels) - 1
        self.input_proj = nn.Sequential(nn.Linear(in_channels, dim), nn.LayerNorm(dim), nn.ReLU())
        self.query_proj = mlp(in_channels, dim, dim)
        self.cross_attn_layers = nn.ModuleList(AttentionLayer(dim, heads) for _ in range(layers))
        self.self_attn_layers = nn.ModuleList(AttentionLayer(dim, heads) for _ in range(layers))
        self.ffn_layers = nn.ModuleList(FeedForwardLayer(dim, ffn) for _ in range(layers))
        self.out_norm = nn.LayerNorm(dim)
        self.out_cls = mlp(dim, dim, n_classes + 1)
        self.x_mask = mlp(in_channels, dim, dim)
        self.x_pts_mask = mlp(in_channels + 3, dim, dim)
        self.out_reg = mlp(dim, dim, 6) if boxes else None
        self.out_sem = nn.Linear(dim, n_semantic + 1)

    def forward(
        self,
        superpoints: list[torch.Tensor],
        points: list[torch.Tensor],
        queries: list[torch.Tensor],
        superpoint: list[torch.Tensor],
        weights: list[torch.Tensor],
    ) -> DecoderOutput:
        """Of each item: superpoints (S, C_in), points (N, 3 + C_in) xyz and features, queries (Q, C_in) features of the
        superpoints that ask, superpoint (N,) int64 in 0..S-1, weights (N, 1) of the pooling."""
        keys = {}  # (S or N, D) of each item: what a mask is the product of, with a query
        if "SP" in self.levels:
            keys["SP"] = self.x_mask(torch.cat(superpoints)).split([len(s) for s in superpoints])
        if "P" in self.levels:
            keys["P"] = self.x_pts_mask(torch.cat(points)).split([len(p) for p in points])
        groups = None
        if "P" in self.levels[:-1]:
            groups = [Groups(ids, len(s)) for ids, s in zip(superpoint, superpoints, strict=True)]
        memory = split_pad(self.input_proj(torch.cat(superpoints)), [len(s) for s in superpoints])  # (B, S, D)
        sizes = [len(q) for q in queries]
        x = split_pad(self.query_proj(torch.cat(queries)), sizes)  # (B, Q, D)
        others = pad_visible([x.new_ones(q, q, dtype=torch.bool) for q in sizes]) if len(set(sizes)) > 1 else None
        stages = [self.head(self.rows(x, sizes), keys, sizes, self.levels[0])]
        for i, level in enumerate(self.levels[1:]):
            visible = pad_visible(self.visible(stages[-1], groups, weights))
            x = self.cross_attn_layers[i](x, memory, visible)
            x = self.ffn_layers[i](self.self_attn_layers[i](x, x, others))
            normed = self.rows(x, sizes)
            stages.append(self.head(normed, keys, sizes, level))
        return DecoderOutput(stages, list(self.out_sem(normed).split(sizes)), list(normed.split(sizes)))

    def rows(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Padded queries (B, Q, D) -> those of all items one after the other, normed."""
        return self.out_norm(torch.cat([q[:n] for q, n in zip(x, sizes, strict=True)]))

    def head(self, normed: torch.Tensor, keys: dict[str, list[torch.Tensor]], sizes: list[int], level: str) -> Stage:
        """Normed queries of all items -> what they say."""
        cls, boxes = list(self.out_cls(normed).split(sizes)), None
        masks = [q @ k.T for q, k in zip(normed.split(sizes), keys[level], strict=True)]
        if self.out_reg is not None:
            offset, size = self.out_reg(normed).float().split(3, 1)
            boxes = list(torch.cat([offset, size.exp()], 1).split(sizes))
        return Stage(cls, masks, boxes, level)

    @torch.no_grad()
    def visible(self, stage: Stage, groups: list[Groups] | None, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """Which superpoints a query sees in the next layer, bool (Q, S) of each item: at level SP those in its mask, or
        all where there is none; at level P those whose points, weighed, are mostly in its mask, and the best ones."""
        if stage.level == "SP":
            inside = [masks >= 0 for masks in stage.masks]
            return [seen | ~seen.any(1, keepdim=True) for seen in inside]
        found = []
        for masks, points, w in zip(stage.masks, groups, weights, strict=True):
            outside = points.mean((masks.T < 0) * w.float()).T  # (Q, S): weighed share of points outside the mask
            found.append((outside <= 0.5) | (outside == outside.amin(1, keepdim=True)))
        return found


def split_pad(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rows (sum of sizes, D) of all items -> (B, longest, D), zeros behind."""
    return pad_sequence(x.split(sizes), batch_first=True)


def pad_visible(visible: list[torch.Tensor]) -> torch.Tensor:
    """bool (Q, S) of each item -> (B, 1, longest Q, longest S): padded columns are not seen but by padded rows, which
    see everything, so that no row sees nothing."""
    Q, S = max(len(v) for v in visible), max(v.shape[1] for v in visible)
    return torch.stack([F.pad(F.pad(v, (0, S - v.shape[1])), (0, 0, 0, Q - len(v)), value=True) for v in visible])[
        :, None
    ]


class MergeHead(nn.Module):
    """Queries (Q, dim) -> unit vectors (Q, out) by which frames' instances are told apart. norm: "layer", or "batch" as
    in the released class-agnostic network, which needs more than one query in training."""

    def __init__(self, dim: int = 256, hidden: int = 512, out: int = 256, norm: str = "layer"):
        super().__init__()
        norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        if norm not in norms:
            raise ValueError(f"norm {norm!r}: expected one of {tuple(norms)}")
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), norms[norm](hidden), nn.ReLU(), nn.Linear(hidden, out), norms[norm](out)
        )

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.net(queries).float(), dim=-1)
