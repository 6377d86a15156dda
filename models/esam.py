"""ESAM: instances of posed RGB-D frames online, one query for each superpoint; with Tiny-SA and a 2D branch by choice.

Xu et al., "EmbodiedSAM: Online Segment Any 3D Thing in Real Time", ICLR 2025. A frame's points are voxels of a sparse
U-Net; the points' features are pooled to superpoints; superpoints ask, and a decoder answers with masks, classes and
semantics. Routes: 3d that alone; 3dtsa with a Tiny-SA neck behind the U-Net; bif besides with features of the picture
fused into the points. Stages: sv single views; mv clips of one scene, with a memory between the U-Net's halves, boxes
and merge vectors by which instances find their objects (models/instance_merge.py). What a route or stage adds changes
nothing before it has learned. B items, T frames, N points, S superpoints, Q queries, C semantic classes, K things.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from models.bifusion import BiFusion
from models.res16unet import Res16UNet, Res16UNetConfig
from models.scene_memory import MemoryState, SceneMemory
from models.sparse_conv import Groups, SparseTensor, voxelise
from models.superpoint_decoder import MergeHead, Stage, SuperpointDecoder
from models.superpoint_pooling import GeometryAwarePooling
from models.tiny_sa import TinySANeck
from utils.posed_views import View
from utils.run import UserError, read_config
from utils.weights import load_strict, read_tensors

ROUTES, STAGES = ("3d", "3dtsa", "bif"), ("sv", "mv")
UNET_STAGES = (1, 2, 3, 4)  # of the encoder, at strides 2, 4, 8, 16


@dataclass
class ESAMConfig:
    """classes: semantic classes, the first n_stuff are stuff, the others things. agnostic: one class of things.

    voxel: m. dim, heads, ffn, levels: of the decoder; a level is SP or P, masks over superpoints or over points, first
    those of the fresh queries. centred: masks over points see where these are from the middle of the frame's points,
    so that neither the origin of the world nor the change from single views to clips matters; False: where they are,
    as released. memory_levels: 0..3, strides 2..16. memory_queue: frames that the memory keeps, -1 all;
    memory_radius: m around the frame beyond which it forgets, None never. tsa_modules, tsa_cell, tsa_radius (m): of the
    neck, cells are of the 2^n voxels nearest to tsa_cell; tsa_stages: stages of the U-Net's encoder that get a module
    too, where voxels are larger than cells with these as cells and the radius growing alike. fusion: residual or gate, image_*:
    of the 2D branch. colour_mean, colour_std: of colours in 0..1.
    """

    classes: tuple[str, ...]
    n_stuff: int = 2
    agnostic: bool = False
    route: str = "3d"
    stage: str = "sv"
    backbone: Res16UNetConfig = field(default_factory=Res16UNetConfig)
    voxel: float = 0.02
    dim: int = 256
    heads: int = 8
    ffn: int = 1024
    levels: tuple[str, ...] = ("SP", "SP", "P", "P")
    centred: bool = True
    merge_hidden: int = 512
    memory_levels: tuple[int, ...] = (0, 1, 2, 3)
    memory_queue: int = -1
    memory_radius: float | None = None
    tsa_modules: int = 2
    tsa_cell: float = 0.16
    tsa_radius: float = 0.3
    tsa_stages: tuple[int, ...] = ()
    fusion: str = "residual"
    image_tsa: bool = False
    colour_mean: tuple[float, ...] = (0.47793, 0.43033, 0.37496)
    colour_std: tuple[float, ...] = (0.28345, 0.27566, 0.27019)

    def __post_init__(self):
        if isinstance(self.backbone, dict):
            self.backbone = Res16UNetConfig(**self.backbone)
        for name in ("classes", "levels", "memory_levels", "tsa_stages", "colour_mean", "colour_std"):
            setattr(self, name, tuple(getattr(self, name)))
        if self.route not in ROUTES or self.stage not in STAGES:
            raise ValueError(f"route {self.route}, stage {self.stage}: expected one of {ROUTES} and of {STAGES}")
        if not 0 <= self.n_stuff < len(self.classes):
            raise ValueError(f"n_stuff {self.n_stuff} of {len(self.classes)} classes: expected at least one thing")
        if not set(self.tsa_stages) <= set(UNET_STAGES) or min(self.voxel, self.tsa_cell, self.tsa_radius) <= 0:
            raise ValueError(f"tsa_stages {self.tsa_stages}, voxel {self.voxel}, tsa_cell {self.tsa_cell}, tsa_radius "
                             f"{self.tsa_radius}: expected some of {UNET_STAGES}, and more than 0 m")  # fmt: skip

    @property
    def thing_classes(self) -> tuple[str, ...]:
        """What an instance may be, in the order of its class logits."""
        return ("object",) if self.agnostic else self.classes[self.n_stuff :]


@dataclass
class FrameOutput:
    """Of one frame of B scenes. stages: the decoder's answers, the last one counts. sem: B x (Q, C + 1) logits, the last
    column: unlabelled. queries: B x (Q, dim). vectors: B x (Q, dim) unit merge vectors, stage mv. centres: B x (Q, 3)
    mean of the query's superpoint, m. figures: of the 2D branch, scalars."""

    stages: list[Stage]
    sem: list[torch.Tensor]
    queries: list[torch.Tensor]
    vectors: list[torch.Tensor] | None
    centres: list[torch.Tensor]
    figures: dict[str, torch.Tensor]


@dataclass
class SceneState:
    """What a scene's next frame needs of those before: pass it to `ESAM.step`, drop it when the scene changes."""

    memory: MemoryState | None = None


class ESAM(nn.Module):
    """The whole network; names of parts are those that checkpoints of all routes and stages share."""

    def __init__(self, cfg: ESAMConfig):
        super().__init__()
        self.cfg, mv = cfg, cfg.stage == "mv"
        self.backbone = Res16UNet(cfg.backbone)
        C, planes = self.backbone.out_channels, cfg.backbone.planes
        cell = 2 ** max(0, round(math.log2(cfg.tsa_cell / cfg.voxel)))
        self.stage_tsa = nn.ModuleDict()
        for i in cfg.tsa_stages:
            own = max(cell, 2**i)
            self.stage_tsa[str(i)] = TinySANeck(planes[i - 1], modules=1, radius=cfg.tsa_radius * own / cell, cell=own)
        self.memory = None
        if mv:
            radius = None if cfg.memory_radius is None else cfg.memory_radius / cfg.voxel
            self.memory = SceneMemory(planes[:4], cfg.memory_levels, queue=cfg.memory_queue, radius=radius)
        self.neck = None
        if cfg.route != "3d":
            self.neck = TinySANeck(C, modules=cfg.tsa_modules, radius=cfg.tsa_radius, cell=cell)
        self.bi_encoder = BiFusion(C, fusion=cfg.fusion, tiny_sa_2d=cfg.image_tsa) if cfg.route == "bif" else None
        self.pool = GeometryAwarePooling(C)
        sizes = (C, cfg.dim, cfg.heads, cfg.ffn, len(cfg.thing_classes), len(cfg.classes))
        self.decoder = SuperpointDecoder(*sizes, levels=cfg.levels, boxes=mv)
        self.merge_head = MergeHead(cfg.dim, cfg.merge_hidden, cfg.dim) if mv else None
        for name in ("mean", "std"):
            values = torch.tensor(getattr(cfg, f"colour_{name}"), dtype=torch.float32)
            self.register_buffer(f"colour_{name}", values, persistent=False)

    def forward(self, clips: Sequence[Sequence[View]]) -> list[FrameOutput]:
        """B clips of T views each -> T outputs, in the order of the frames. Every call begins with an empty memory."""
        if len({len(clip) for clip in clips}) != 1:
            raise ValueError(f"clips of {[len(c) for c in clips]} views: expected as many in each")
        state, out = None, []
        for views in zip(*clips, strict=True):
            frame, state = self.step(views, state)
            out.append(frame)
        return out

    def step(self, views: Sequence[View], state: SceneState | None = None) -> tuple[FrameOutput, SceneState]:
        """The next frame of B scenes, and what the frame after it needs. state None: their first."""
        x, points = self.voxels(views)
        x, state = self.features(x, points, state)
        features = list(points.spread(x.features).split([len(v) for v in views]))  # (N, C) each
        figures = {}
        if self.bi_encoder is not None:
            features, figures = self.bi_encoder(features, views)
        out = self.answer([f.float() for f in features], views)
        out.figures = figures
        return out, state

    # ---- parts of a step

    def voxels(self, views: Sequence[View]) -> tuple[SparseTensor, Groups]:
        """Normalised mean colours (V, 3) and mean positions (V, 3) beside them, and the voxel of each point.

        Positions are moved by half a voxel: a floor at z = 0 would else fall into two layers by rounding.
        """
        coords = torch.cat([v.coords for v in views]) + self.cfg.voxel / 2
        colour = (torch.cat([v.colour for v in views]) - self.colour_mean) / self.colour_std
        sizes = torch.tensor([len(v) for v in views], device=coords.device)
        batch = torch.arange(len(views), device=coords.device).repeat_interleave(sizes, output_size=len(coords))
        return voxelise(coords, torch.cat([colour, coords], 1), self.cfg.voxel, batch)

    def features(self, x: SparseTensor, points: Groups, state: SceneState | None) -> tuple[SparseTensor, SceneState]:
        """(V, 6) colours and positions -> (V, C): U-Net with the memory between its halves, then the neck."""
        positions = x.features[:, 3:]
        levels = [self.backbone.stem(x.with_features(x.features[:, :3]))]
        for i in UNET_STAGES:
            level = self.backbone.down(i, levels[-1])
            if str(i) in self.stage_tsa:
                level = self.stage_tsa[str(i)](level, self.middles(level), self.cfg.voxel)
            levels.append(level)
        memory = None
        if self.memory is not None:
            levels[1:], memory = self.memory(levels[1:], None if state is None else state.memory)
        x = self.backbone.decode(levels)
        if self.neck is not None:
            x = self.neck(x, positions, self.cfg.voxel)
        return x, SceneState(memory)

    def middles(self, x: SparseTensor) -> torch.Tensor:
        """Middles of coarse voxels, (V, 3) m, as positions are"""
        return (x.coords[:, 1:].float() + x.stride / 2) * self.cfg.voxel

    def answer(self, features: list[torch.Tensor], views: Sequence[View]) -> FrameOutput:
        """Features (N, C) of the points of each view -> superpoints, queries, masks."""
        counts = (torch.stack([v.superpoint.amax() for v in views]) + 1).tolist()
        first = [sum(counts[:b]) for b in range(len(views))]
        superpoint = torch.cat([v.superpoint + start for v, start in zip(views, first, strict=True)])
        xyz = torch.cat([v.coords for v in views])
        pooled, weights, centres = self.pool(torch.cat(features), xyz, superpoint, sum(counts))
        pooled, centres = pooled.split(counts), centres.split(counts)
        weights = weights.split([len(v) for v in views])
        asking = [slice(None) if v.queries is None else v.queries for v in views]
        out = self.decoder(
            list(pooled),
            [torch.cat([self.places(v), f], 1) for v, f in zip(views, features, strict=True)],
            [p[q] for p, q in zip(pooled, asking, strict=True)],
            [v.superpoint for v in views],
            list(weights),
        )
        vectors = None if self.merge_head is None else [self.merge_head(q) for q in out.queries]
        centres = [c[q] for c, q in zip(centres, asking, strict=True)]
        return FrameOutput(out.stages, out.sem, out.queries, vectors, centres, {})

    def places(self, view: View) -> torch.Tensor:
        """(N, 3) m, what masks over points know of where these are"""
        return view.coords - view.coords.mean(0) if self.cfg.centred else view.coords

    # ---- checkpoints

    def config_dict(self) -> dict:
        return {"model": "ESAM", **asdict(self.cfg)}

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> "ESAM":
        """The network of a checkpoint folder (config.json, model.safetensors), in training mode, on the CPU."""
        config = read_config(folder)
        if config.get("model") != "ESAM":
            raise UserError(f"{folder}: holds {config.get('model', 'no named model')}, expected an ESAM; "
                            "train/train_esam.py writes one")  # fmt: skip
        try:
            cfg = ESAMConfig(**{k: v for k, v in config.items() if k not in ("model", "made_by")})
        except (TypeError, ValueError) as e:
            raise UserError(f"{folder}/config.json: no configuration of ESAM ({e}); take another folder") from e
        model = cls(cfg)
        load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
        return model
