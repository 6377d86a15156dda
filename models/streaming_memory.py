"""What a stream knows about each object that it follows: a few tokens of earlier frames, and maps of them if wanted.

Per object the memory holds the frames in which it was pointed at, and in a ring the last ones in which it was seen. Of
a frame it keeps two tokens, the decoder's kernel and the mean of the features under the mask; with cfg.maps also SAM
2's map of frame and mask at 16 px. The next frame's query is the object's prompt plus what it reads there; with maps,
each object gets its own features. A presence logit compares what was found with what is remembered: an object that is
not seen has an empty mask and is not written.

All that is known lies in a MemoryState of fixed size, never in the modules. Objects do not see each other: one more in
a free place (P counts places) changes no bit of the others. Once per frame: `step`, or by hand advance, point, read,
the decoder, presence, write.

Shapes: B videos, P objects (places), R = B x P, T frames, M memories of one object, D width, C width of the maps, h w
grid of the features (4 px), n tokens. Sources: Ravi et al., SAM 2, arXiv 2408.00714 (bank, maps, presence); Xu et al.,
RAP-SAM, ICLR 2025 (kernels).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.prompt_fusion import Attention, under
from models.sam2_memory import MemoryAttention, MemoryEncoder, sine_code

ABSENT = -10.0  # logit of every pixel of an object that is not seen
COARSE = 4  # cells of the features to a cell of a map, in each direction
MASK_SCALE, MASK_BIAS = 20.0, -10.0  # of mask probabilities in maps
EMPTY = 2**40  # an empty place counts as older than any frame
KINDS = 2  # tokens of a frame: kernel, features under the mask


@dataclass
class MemoryConfig:
    """dim and heads as in FastSAM2Config."""

    dim: int = 256  # D
    heads: int = 8
    hidden: int = 1024  # of the feed-forward blocks
    layers: int = 2  # of reading
    kept: int = 4  # frames with prompts: the first, and the newest of the others
    recent: int = 6  # frames without: the newest in which the object was seen
    maps: int = 0  # the newest of these of which maps are kept, and one of the newest frame with a prompt; 0: no maps
    map_dim: int = 64  # C
    map_layers: int = 1

    def __post_init__(self):
        if self.kept < 1 or self.recent < 0 or self.layers < 1 or not 0 <= self.maps <= self.recent:
            raise ValueError(f"MemoryConfig: kept {self.kept}, recent {self.recent}, layers {self.layers}, maps "
                             f"{self.maps}; expected kept and layers >= 1, 0 <= maps <= recent")  # fmt: skip


# ---- state


class Bank(NamedTuple):
    """M places per object, the first ones for frames with prompts."""

    values: torch.Tensor  # (B, P, M, ...)
    age: torch.Tensor  # int64 (B, P, M): frames since it was written, -1 empty


class MemoryState(NamedTuple):
    """All that is known about the objects. Its size depends on the configuration, B, P and the grid, not on time."""

    prompt: torch.Tensor  # (B, P, D): the query of what pointed at the object last
    known: torch.Tensor  # bool (B, P): the place is taken
    pointed: torch.Tensor  # bool (B, P): something points at it in this frame
    tokens: Bank  # values (B, P, M, 2, D)
    maps: Bank | None  # values (B, P, M, C, h / 4, w / 4)


def state_bytes(state: MemoryState) -> int:
    """Bytes of all tensors of a state."""
    tensors = (state.prompt, state.known, state.pointed, *state.tokens, *(state.maps or ()))
    return sum(t.numel() * t.element_size() for t in tensors)


def place(age: torch.Tensor, kept: int, pointed: torch.Tensor) -> torch.Tensor:
    """Where this frame goes. age (B, P, M), the first `kept` places are for frames in which the object is pointed at
    (B, P) -> bool (B, P, M), at most one of each object: that of the same frame, else an empty one, else the oldest.
    The first frame with a prompt stays where kept > 1."""
    M = age.shape[-1]
    index = torch.arange(M, device=age.device)
    rank = torch.where(age < 0, EMPTY, age)
    rank = torch.where(age == 0, 2 * EMPTY, rank)
    if kept > 1:
        rank = torch.where((index == 0) & (age > 0), -1, rank)
    ours = (index < kept) == pointed[..., None]
    order = torch.where(ours, rank, -2) * M + (M - 1 - index)  # no two are equal
    return ours & (index == order.argmax(-1, keepdim=True))


def put(bank: Bank, values: torch.Tensor, kept: int, pointed: torch.Tensor, rows: torch.Tensor) -> Bank:
    """The bank with this frame's values (B, P, ...) of the objects rows (B, P)."""
    here = place(bank.age, kept, pointed) & rows[..., None]
    values = torch.where(spread(here, bank.values), values.unsqueeze(2).to(bank.values.dtype), bank.values)
    return Bank(values, bank.age.masked_fill(here, 0))


def drop(bank: Bank, gone: torch.Tensor) -> Bank:
    """The bank without the places gone (B, P, M)."""
    return Bank(bank.values.masked_fill(spread(gone, bank.values), 0.0), bank.age.masked_fill(gone, -1))


def spread(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask with as many dimensions as `like`, whose first ones it has."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


def advance(state: MemoryState) -> MemoryState:
    """A new frame begins: everything is a frame older, nothing points anywhere."""
    older = [None if b is None else b._replace(age=b.age + (b.age >= 0)) for b in (state.tokens, state.maps)]
    return state._replace(pointed=torch.zeros_like(state.pointed), tokens=older[0], maps=older[1])


def forget(state: MemoryState, rows: torch.Tensor) -> MemoryState:
    """The places rows bool (B, P) are free again, as if they had never been taken."""
    tokens, maps = (
        None if b is None else drop(b, rows[..., None].expand_as(b.age)) for b in (state.tokens, state.maps)
    )
    prompt = state.prompt.masked_fill(rows[..., None], 0.0)
    return MemoryState(prompt, state.known & ~rows, state.pointed & ~rows, tokens, maps)


# ---- reading


class ReaderLayer(nn.Module):
    """x + attention over tokens, + feed-forward; norms come first, and at first neither adds anything."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.attn, self.attn_norm = Attention(dim, heads), nn.LayerNorm(dim)
        self.ffn, self.ffn_norm = (
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)),
            nn.LayerNorm(dim),
        )
        for last in (self.attn.out_proj, self.ffn[2]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), tokens, seen)
        return x + self.ffn(self.ffn_norm(x))


class Reader(nn.Module):
    """One query per object looks at the object's tokens, and at one that stands for nothing remembered."""

    def __init__(self, cfg: MemoryConfig, layers: int):
        super().__init__()
        self.nothing = nn.Parameter(0.02 * torch.randn(cfg.dim))
        self.layers = nn.ModuleList(ReaderLayer(cfg.dim, cfg.heads, cfg.hidden) for _ in range(layers))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """x (R, 1, D), tokens (R, n, D), seen bool (R, n) -> (R, 1, D)."""
        tokens = torch.cat([self.nothing.expand(len(x), 1, -1).to(tokens.dtype), tokens], 1)
        seen = F.pad(seen, (1, 0), value=True)[:, None, None]
        for layer in self.layers:
            x = layer(x, tokens, seen)
        return x


class MapMemory(nn.Module):
    """SAM 2's memory at 16 px: writes maps, and adds what each object reads in its own ones to the features."""

    def __init__(self, cfg: MemoryConfig):
        super().__init__()
        self.encoder = MemoryEncoder(cfg.dim, cfg.map_dim, mask_stride=COARSE)
        self.attention = MemoryAttention(cfg.dim, cfg.map_dim, cfg.map_layers, cfg.hidden)
        self.ages = nn.Embedding(cfg.maps + 1, cfg.map_dim)  # 0: frames with prompts
        self.out = nn.Linear(cfg.dim, cfg.dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def write(self, features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """features (B, D, h, w), mask logits (B, P, h, w) -> (B, P, C, h / 4, w / 4)."""
        return self.encoder(F.avg_pool2d(features, COARSE), masks.float().sigmoid() * MASK_SCALE + MASK_BIAS)

    def forward(self, features: torch.Tensor, maps: Bank) -> torch.Tensor:
        """features (B, D, h, w) -> those of each object, (R, D, h, w); unchanged for one without maps."""
        P, age = maps.age.shape[1], maps.age.flatten(0, 1)  # (R, M)
        coarse = F.avg_pool2d(features, COARSE)
        grid = tuple(coarse.shape[-2:])
        x = coarse.flatten(2).transpose(1, 2).repeat_interleave(P, 0)  # (R, S, D)
        memory = maps.values.flatten(0, 1).flatten(3).transpose(2, 3)  # (R, M, S, C)
        code = sine_code(memory.shape[-1], grid, memory).flatten(1).T
        code = code + self.ages(steps_back(age, 1, self.ages.num_embeddings - 1))[:, :, None]
        written, S = age >= 0, x.shape[1]
        some = written.any(1, keepdim=True)
        seen = (written | ~some).repeat_interleave(S, 1)  # no row without any: its result is not used
        own = sine_code(x.shape[-1], grid, x).flatten(1).T
        found = self.attention(x, own, memory.flatten(1, 2), code.flatten(1, 2), grid, seen=seen)
        change = self.out(found).transpose(1, 2).unflatten(2, grid)
        change = F.interpolate(change, features.shape[-2:], mode="bilinear", align_corners=False)
        return features.repeat_interleave(P, 0) + torch.where(some[..., None, None], change, 0.0)


def steps_back(age: torch.Tensor, kept: int, recent: int) -> torch.Tensor:
    """Ages (..., M) -> 0 for the first `kept` places, else 1..recent; what was seen longer ago counts as `recent`."""
    first = torch.arange(age.shape[-1], device=age.device) < kept
    return age.clamp(1, max(1, recent)).masked_fill(first, 0)


# ---- memory


class Reading(NamedTuple):
    """What the decoder gets: features (B, D, h, w) and queries (B, P, D); with maps (R, D, h, w) and (R, 1, D)."""

    features: torch.Tensor
    queries: torch.Tensor


class Followed(NamedTuple):
    """The objects in one frame."""

    out: dict  # the decoder's lists, of P prompts
    presence: torch.Tensor  # (B, P) logits
    present: torch.Tensor  # bool (B, P): known, and pointed at or seen

    @property
    def masks(self) -> torch.Tensor:
        """Logits (B, P, h, w), empty where the object is not seen."""
        return torch.where(self.present[..., None, None], self.out["masks"][-1], ABSENT)


class StreamingMemory(nn.Module):
    """Reads and writes a MemoryState; see the top of the file. Untrained, it changes nothing and sees every object."""

    def __init__(self, cfg: MemoryConfig):
        super().__init__()
        D, self.cfg = cfg.dim, cfg
        self.from_kernel, self.from_look, self.token_norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.kinds, self.ages = nn.Embedding(KINDS, D), nn.Embedding(cfg.recent + 1, D)  # age 0: frames with prompts
        self.followed = nn.Parameter(torch.zeros(D))  # added to a query when nothing points at the object any more
        self.reader = Reader(cfg, cfg.layers)
        self.found, self.judge = nn.Linear(KINDS * D, D), Reader(cfg, 1)
        self.presence_norm, self.presence_out = nn.LayerNorm(D), nn.Linear(D, 1)
        nn.init.zeros_(self.presence_out.weight)
        nn.init.ones_(self.presence_out.bias)
        self.map_memory = MapMemory(cfg) if cfg.maps else None

    def start(self, B: int, P: int, grid: tuple[int, int] | None = None) -> MemoryState:
        """P free places in each of B videos; grid (h, w) of the features, needed for maps."""
        cfg, like = self.cfg, self.followed
        no = torch.zeros(B, P, dtype=torch.bool, device=like.device)
        places = cfg.kept + cfg.recent
        ages = torch.full((B, P, places), -1, dtype=torch.int64, device=like.device)
        maps = None
        if cfg.maps:
            if grid is None or grid[0] % COARSE or grid[1] % COARSE:
                raise ValueError(f"StreamingMemory: maps of a grid {grid}, expected (h, w) in multiples of {COARSE}")
            size = (cfg.map_dim, grid[0] // COARSE, grid[1] // COARSE)
            maps = Bank(like.new_zeros(B, P, 1 + cfg.maps, *size), ages[:, :, : 1 + cfg.maps].clone())
        tokens = Bank(like.new_zeros(B, P, places, KINDS, cfg.dim), ages)
        return MemoryState(like.new_zeros(B, P, cfg.dim), no, no.clone(), tokens, maps)

    def point(self, state: MemoryState, prompts: torch.Tensor, given: torch.Tensor) -> MemoryState:
        """In this frame queries (B, P, D) of FastSAM2.queries point at the objects given bool (B, P), known or new.
        What was written of them in this same frame without that is dropped."""
        if prompts.shape != state.prompt.shape or given.shape != state.known.shape:
            raise ValueError(f"point: queries {tuple(prompts.shape)} for {tuple(given.shape)}, expected "
                             f"{tuple(state.prompt.shape)} for {tuple(state.known.shape)}")  # fmt: skip
        banks = []
        for bank, kept in ((state.tokens, self.cfg.kept), (state.maps, 1)):
            if bank is not None:
                ring = torch.arange(bank.age.shape[-1], device=given.device) >= kept
                bank = drop(bank, (bank.age == 0) & ring & given[..., None])
            banks.append(bank)
        prompt = torch.where(given[..., None], prompts.to(state.prompt.dtype), state.prompt)
        return MemoryState(prompt, state.known | given, state.pointed | given, *banks)

    def remembered(self, state: MemoryState) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (R, 2 M, D) with their age in them, and which exist, bool (R, 2 M)."""
        values, age = state.tokens
        values = values + self.ages(steps_back(age, self.cfg.kept, self.cfg.recent))[:, :, :, None]
        seen = (age >= 0)[..., None].expand(*age.shape, KINDS)
        return values.flatten(2, 3).flatten(0, 1), seen.flatten(2).flatten(0, 1)

    def read(self, state: MemoryState, features: torch.Tensor) -> Reading:
        """features (B, D, h, w) of this frame -> what the decoder gets. An object without memory: its prompt."""
        B, P, D = state.prompt.shape
        tokens, seen = self.remembered(state)
        prompt = state.prompt.flatten(0, 1)[:, None]
        old = ~state.pointed.flatten()[:, None, None]
        x = self.reader(prompt + old * self.followed, tokens, seen)
        queries = torch.where(seen.any(1)[:, None, None], x, prompt.to(x.dtype))
        if self.map_memory is None:
            return Reading(features, queries.reshape(B, P, D))
        return Reading(self.map_memory(features, state.maps), queries)

    def entry(self, features: torch.Tensor, masks: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """The tokens of a frame: (B, P, 2, D)."""
        look = under(masks.float().sigmoid(), features)
        pair = torch.stack([self.from_kernel(kernels.to(look.dtype)), self.from_look(look)], 2)
        return self.token_norm(pair) + self.kinds.weight

    def presence(
        self, state: MemoryState, features: torch.Tensor, masks: torch.Tensor, kernels: torch.Tensor
    ) -> torch.Tensor:
        """Is the object there? features (B, D, h, w), and of the decoder mask logits (B, P, h, w) and kernels
        (B, P, D) -> logits (B, P) float32. Before `write`."""
        tokens, seen = self.remembered(state)
        x = self.found(self.entry(features, masks, kernels).flatten(2)).flatten(0, 1)[:, None]
        x = self.presence_norm(self.judge(x, tokens, seen))
        return self.presence_out(x).float().reshape(state.known.shape)

    def write(
        self,
        state: MemoryState,
        features: torch.Tensor,
        masks: torch.Tensor,
        kernels: torch.Tensor,
        rows: torch.Tensor,
    ) -> MemoryState:
        """Remember this frame of the objects rows bool (B, P), in the same arguments as `presence`; masks may be others
        than the decoder's (teacher forcing, a mask that was given)."""
        cfg, pointed = self.cfg, state.pointed
        tokens, maps = put(state.tokens, self.entry(features, masks, kernels), cfg.kept, pointed, rows), state.maps
        if self.map_memory is not None:
            maps = put(maps, self.map_memory.write(features, masks), 1, pointed, rows)
        return state._replace(tokens=tokens, maps=maps)

    def step(
        self,
        state: MemoryState,
        features: torch.Tensor,
        decode: Callable[[torch.Tensor, torch.Tensor], dict],
        prompts: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
        truth: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
        again: bool = False,
    ) -> tuple[MemoryState, Followed]:
        """One frame of all objects.

        features (B, D, h, w); decode: partial(model.decode, objects=False). prompts (B, P, D) and given bool (B, P):
        what is pointed at in this frame. truth (B, P, h, w) mask logits and forced bool (B, P): written in place of the
        decoder's masks, if not empty. again: the frame of the step before, to add or correct the objects given; only
        they are written, and of the others the result means nothing.
        """
        if (prompts is None) != (given is None) or (truth is None) != (forced is None) or (again and given is None):
            raise ValueError("step: prompts come with given, truth with forced, and again with given")
        state = state if again else advance(state)
        state = state if prompts is None else self.point(state, prompts, given)
        B, P = state.known.shape
        out = per_object(decode(*self.read(state, features)), B, P)
        masks, kernels = out["masks"][-1], out["queries"]
        presence = self.presence(state, features, masks, kernels)
        seen = state.pointed | ((presence > 0) & (masks > 0).flatten(2).any(2))
        present = rows = state.known & seen
        if truth is not None:
            masks = torch.where(forced[..., None, None], truth.to(masks.dtype), masks)
            rows = state.known & torch.where(forced, (masks > 0).flatten(2).any(2), seen)
        state = self.write(state, features, masks, kernels, rows & given if again else rows)
        return state, Followed(out, presence, present)

    def follow(
        self,
        features: torch.Tensor,
        decode: Callable[[torch.Tensor, torch.Tensor], dict],
        prompts: torch.Tensor,
        first: torch.Tensor | None = None,
        truth: torch.Tensor | None = None,
        forced: torch.Tensor | None = None,
    ) -> list[Followed]:
        """A whole clip, frame by frame: features (B, T, D, h, w) and what `step` needs, prompts (B, P, D) about frame
        first int64 (B, P) of each object (None: 0; < 0: a place that stays free), truth (B, P, T, h, w), forced
        (B, P, T)."""
        B, T = features.shape[:2]
        state = self.start(B, prompts.shape[1], tuple(features.shape[-2:]))
        first = torch.zeros_like(state.known, dtype=torch.int64) if first is None else first
        found = []
        for t in range(T):
            taught = {} if truth is None else {"truth": truth[:, :, t], "forced": forced[:, :, t]}
            state, frame = self.step(state, features[:, t], decode, prompts, first == t, **taught)
            found.append(frame)
        return found


def per_object(out: dict, B: int, P: int) -> dict:
    """The decoder's dict with (B, P, ...) in each tensor, whether objects were queries or a batch."""

    def fold(x):
        return [fold(y) for y in x] if isinstance(x, list) else x.reshape(B, P, *x.shape[2:])

    return {k: fold(v) for k, v in out.items()}
