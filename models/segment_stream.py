"""FastSAM2 on frames as they come, from a camera, a generator or a file: nothing grows with their number.

    stream = Stream(model)                      # of a FastSAM2 with a memory
    stream.add("dog", points=[[310, 220, 1]])   # about the next frame; at any time
    for frame in camera:
        for name, found in stream.step(frame).items(): ...found.mask, found.score, found.present
    stream.correct("dog", points=[[300, 90, 0]])  # about the frame just seen

Task vos follows what is added. Tasks vis and vps find objects themselves: a slot of the decoder goes on where the next
frame's query is most like the running mean of its own, and counts as an object by its class score, with hysteresis.

Shapes: H W frame, h w as the network is shown it, N slots, K classes, P = BLOCK places, n objects, D width.
Source: Ravi et al., SAM 2, arXiv 2408.00714 (prompts in a stream).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from models.fastsam2 import FastSAM2
from models.panoptic_post import ImageSize, panoptic, to_original
from models.prompt_fusion import PromptBatch
from models.segment_slots import BIRTH_DEATH, Slots
from models.streaming_memory import (
    ABSENT,
    KINDS,
    Bank,
    Followed,
    MemoryState,
    advance,
    forget,
    per_object,
    spread,
    state_bytes,
)
from utils.run import UserError
from utils.segment_inputs import check_place, fit, pack, resized, resized_map

BLOCK = 8  # places that are computed together, taken or not
GIVEN = 10.0  # logit inside a mask that was given, minus that outside
TASKS = ("vos", *BIRTH_DEATH)


@dataclass
class ObjectFrame:
    """An object in one frame."""

    mask: np.ndarray  # (H, W) bool
    score: float  # vos: IoU that the network expects of the mask; vis, vps: class score, in vis times mask quality
    present: bool  # vos: it is seen, or pointed at; a mask is empty otherwise
    label: int = -1  # vis, vps: class 0..K-1
    logits: torch.Tensor | None = None  # (H, W) float32, where the stream keeps them


class FirstPrompt:
    """Stands for a StreamingMemory where there is none: in every frame an object is what its prompt's query finds."""

    def __init__(self, dim: int, device: torch.device):
        self.dim, self.device = dim, device

    def start(self, B: int, P: int, grid: tuple[int, int]) -> MemoryState:
        """As StreamingMemory.start, with room for no frame."""
        no = torch.zeros(B, P, dtype=torch.bool, device=self.device)
        tokens = torch.zeros(B, P, 0, KINDS, self.dim, device=self.device)
        return MemoryState(
            tokens.new_zeros(B, P, self.dim), no, no.clone(), Bank(tokens, no[..., None][..., :0].long()), None
        )

    def step(self, state, features, decode, prompts=None, given=None, truth=None, forced=None, again=False):
        """As StreamingMemory.step; nothing is written, so truth and forced have no effect."""
        state = state if again else advance(state)
        if given is not None:
            prompt = torch.where(given[..., None], prompts.to(state.prompt.dtype), state.prompt)
            state = state._replace(prompt=prompt, known=state.known | given, pointed=state.pointed | given)
        out = per_object(decode(features, state.prompt), *state.known.shape)
        presence = out["masks"][-1].float().flatten(2).amax(2)
        return state, Followed(out, presence, state.known & (state.pointed | (presence > 0)))


# ---- places


@dataclass
class Block:
    """P places of objects that are followed."""

    state: MemoryState
    before: MemoryState  # as the frame just seen began, for what is asked about it again
    ids: list = field(default_factory=lambda: [None] * BLOCK)


@dataclass
class Sight:
    """The frame just seen."""

    shown: np.ndarray  # (h, w, 3) uint8, as the network is shown it
    features: torch.Tensor | None = None  # (1, D, grid h, grid w), once they are needed


class Stream:
    """See the top of the file.

    image_size (h, w): px that frames are fitted into, None: as they are. embed: texts -> (n, E), for text prompts.
    dtype: of autocast. memory: False: objects are found by their first prompt alone. overlap: False: a pixel belongs to
    the object of the highest logit only. logits: whether results hold them. birth, death: class scores for tasks vis
    and vps, None: BIRTH_DEATH. UserError for task vos with a network that has no memory.
    """

    def __init__(
        self,
        model: FastSAM2,
        task: str = "vos",
        image_size: tuple[int, int] | None = None,
        embed: Callable[[list[str]], torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        memory: bool = True,
        overlap: bool = True,
        logits: bool = False,
        birth: float | None = None,
        death: float | None = None,
    ):
        if task not in TASKS or model.training:
            raise ValueError(f"Stream: task {task!r}, training {model.training}; expected one of {TASKS}, and eval()")
        if task == "vos" and memory and model.memory is None:
            raise UserError("this network has no memory to follow objects with; train one with a memory, or follow by "
                            "the first prompt alone (--no-memory)")  # fmt: skip
        self.model, self.task, self.image_size, self.embed = model, task, image_size, embed
        self.device, self.dtype, self.overlap, self.logits = model.mean.device, dtype, overlap, logits
        self.memory = model.memory if memory else FirstPrompt(model.cfg.dim, self.device)
        defaults = BIRTH_DEATH.get(task, (0.0, 0.0))
        self.birth, self.death = (d if v is None else v for v, d in zip((birth, death), defaults, strict=True))
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next frame may have another size."""
        self.size: ImageSize | None = None
        self.sight: Sight | None = None
        self.frames = 0
        self.blocks: list[Block] = []
        self.waiting: dict = {}  # {id: what points at it in the next frame}
        self.asked: dict = {}  # {id: what pointed at it in the frame just seen}
        self.last: dict = {}  # {id: (logits (H, W), score, present)} there
        things = self.model.is_thing
        self.slots = Slots(things if self.task == "vis" else torch.ones_like(things), self.birth, self.death)

    @property
    def objects(self) -> list:
        """Ids of what is followed or waits for the next frame; not for tasks vis and vps."""
        known = [i for block in self.blocks for i in block.ids if i is not None]
        return known + [i for i in self.waiting if i not in known]

    @property
    def found(self) -> dict:
        """The results of the frame just seen, with the corrections made since: {id: ObjectFrame}; of task vos."""
        return self._results()

    @property
    def state_bytes(self) -> int:
        """Bytes of all that is remembered about objects."""
        return sum(state_bytes(s) for block in self.blocks for s in (block.state, block.before))

    # ---- what is followed

    def add(self, obj_id, points=None, box=None, mask=None, text=None, now: bool = False) -> ObjectFrame | None:
        """Follow an object, or point at a known one anew: points [[x, y, label]] (1 on it, 0 beside it), box x0 y0 x1
        y1, mask (H, W) bool, text; px of the frame, pixel centres whole. It is about the next frame; with now about the
        frame just seen, and its result there is returned. A mask alone is the result itself.

        UserError for prompts that do not fit the frames. Until a first frame is seen that is found out by its step.
        """
        prompt = self._prompt(points, box, mask, text)
        if now:
            return self._again(obj_id, prompt)
        if self.size is not None:
            check_place([prompt], *self.size.original)
        self.waiting[obj_id] = prompt
        return None

    def correct(self, obj_id, points=None, box=None, mask=None, text=None) -> ObjectFrame:
        """Point again at a followed object in the frame just seen, and have its new result there. Clicks come to those
        that it got in this frame, the rest replaces; with clicks beside it only, the mask found is the prompt too."""
        if obj_id not in (i for block in self.blocks for i in block.ids):
            raise ValueError(f"Stream.correct: {obj_id!r} is not followed; expected one of {self.objects}")
        new, old = self._prompt(points, box, mask, text), self.asked.get(obj_id, {})
        prompt = {**old, **new}
        if "points" in new:
            prompt["points"] = [*old.get("points", []), *new["points"]]
        if prompt.keys() == {"points"} and not any(label for *_, label in prompt["points"]):
            found = self._results()[obj_id].mask
            if not found.any():
                raise UserError(f"object {obj_id}: is not seen and has clicks beside it only; click on it, or give "
                                "a box or mask")  # fmt: skip
            prompt["mask"] = found
        return self._again(obj_id, prompt)

    def remove(self, obj_id) -> None:
        """Follow it no more. ValueError for one that is not followed."""
        if obj_id not in self.objects:
            raise ValueError(f"Stream.remove: {obj_id!r} is not followed; expected one of {self.objects}")
        for known in (self.waiting, self.asked, self.last):
            known.pop(obj_id, None)
        for block in self.blocks:
            if obj_id in block.ids:
                place = block.ids.index(obj_id)
                block.ids[place] = None
                block.state, block.before = (forget(s, self._rows([place])) for s in (block.state, block.before))
        self.blocks = [block for block in self.blocks if any(i is not None for i in block.ids)]

    # ---- frames

    @torch.no_grad()
    def step(self, frame: np.ndarray) -> dict:
        """The next frame, uint8 (H, W, 3) RGB -> {id: ObjectFrame} of all objects; of tasks vis and vps of those that
        count in it, ids of vps being 1..K for classes of stuff, K + 1.. for things. UserError for another size."""
        self._see(frame)
        if self.task != "vos":
            return self._step_slots()
        queries = {i: self._query(prompt) for i, prompt in self.waiting.items()}
        self.asked, self.waiting, self.last = self.waiting, {}, {}
        for obj_id in self.asked:
            self._place(obj_id)
        for block in self.blocks:
            self._step_block(block, {i: x for i, x in queries.items() if i in block.ids}, again=False)
        return self._results()

    def _see(self, frame: np.ndarray) -> None:
        """Check a frame and what points into it; nothing is changed before."""
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"Stream.step: {getattr(frame, 'shape', type(frame))}, expected uint8 (H, W, 3) RGB")
        original = frame.shape[:2]
        if self.size is not None and original != self.size.original:
            sizes = [f"{w}x{h}" for h, w in (original, self.size.original)]
            raise UserError(f"frame {self.frames}: is {sizes[0]} px (W x H), those before it are {sizes[1]}; resize it, "
                            "or reset the stream")  # fmt: skip
        check_place([*self.waiting.values()], *original)
        shown = fit(original, self.image_size or original)
        self.size = ImageSize(original, shown, tuple(-(-n // 32) * 32 for n in shown))
        self.sight, self.frames = Sight(resized(frame, shown)), self.frames + 1

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _features(self) -> torch.Tensor:
        """Of the frame just seen, computed once and only if needed: (1, D, grid h, grid w)."""
        if self.sight.features is None:
            image = torch.from_numpy(np.array(self.sight.shown)).permute(2, 0, 1)[None].to(self.device)
            with self._autocast():
                self.sight.features = self.model.encode(image)
        return self.sight.features

    def _rows(self, places: list[int]) -> torch.Tensor:
        """bool (1, P), True at the places."""
        rows = torch.zeros(1, BLOCK, dtype=torch.bool)
        rows[0, places] = True
        return rows.to(self.device)

    def _place(self, obj_id) -> Block:
        """The block of an object, which gets a free place if it has none."""
        for block in self.blocks:
            if obj_id in block.ids:
                return block
        block = next((b for b in self.blocks if None in b.ids), None)
        if block is None:
            grid = tuple(n // 4 for n in self.size.padded)
            block = Block(*[self.memory.start(1, BLOCK, grid)] * 2)
            self.blocks.append(block)
        block.ids[block.ids.index(None)] = obj_id
        return block

    def _prompt(self, points, box, mask, text) -> dict:
        """What points at an object, in the form of utils.segment_inputs. ValueError when there is nothing."""
        given = {"points": points, "box": box, "mask": mask, "text": text}
        prompt = {k: v for k, v in given.items() if v is not None}
        if self.task != "vos" or not prompt or ("text" in prompt and self.embed is None):
            raise ValueError(f"Stream: task {self.task}, prompt {sorted(prompt)}, embed {self.embed}; expected "
                             "task vos, points, box, mask or text, and embed for texts")  # fmt: skip
        for kind in {"points", "box"} & prompt.keys():
            prompt[kind] = np.asarray(prompt[kind], float).tolist()
        if "mask" in prompt:
            prompt["mask"] = np.asarray(prompt["mask"], bool)
        return prompt

    @torch.no_grad()
    def _again(self, obj_id, prompt: dict) -> ObjectFrame:
        """Point at an object in the frame just seen, whose result changes."""
        if self.sight is None:
            raise ValueError(f"Stream: no frame has been seen that {obj_id!r} could be in; add it without now")
        check_place([prompt], *self.size.original)
        query = self._query(prompt)
        self.asked[obj_id] = prompt
        self._step_block(self._place(obj_id), {obj_id: query}, again=True)
        return self._results()[obj_id]

    def _query(self, prompt: dict) -> torch.Tensor:
        """Of one object, alone, so that others change no bit of it: (D,)."""
        mask, size = prompt.get("mask"), self.size
        masks = {} if mask is None else {0: resized_map(mask, size.resized)}
        packed = PromptBatch.pad([pack([prompt], masks, size.original, size.resized, self.embed)]).to(self.device)
        features = self._features()
        try:
            with self._autocast():
                return self.model.queries(packed, features)[0, 0].float()
        except ValueError as e:
            raise UserError(f"this checkpoint does not take these prompts ({e}); point in another way") from e

    def _step_block(self, block: Block, queries: dict, again: bool) -> None:
        """Run a block on the frame just seen, with queries {id: (D,)} of self.asked; results go to self.last."""
        features, given = self._features(), {block.ids.index(i): i for i in queries}
        prompts, masks = {}, {}
        if given:
            values = torch.zeros(1, BLOCK, self.model.cfg.dim, device=self.device)
            for place, i in given.items():
                values[0, place] = queries[i]
            prompts = {"prompts": values, "given": self._rows([*given])}
            masks = {p: self.asked[i]["mask"] for p, i in given.items() if self.asked[i].keys() == {"mask"}}
        if masks:
            truth = torch.full((1, BLOCK, *features.shape[-2:]), ABSENT, device=self.device)
            for place, mask in masks.items():
                truth[0, place] = grid_logits(resized_map(mask, self.size.resized), self.size).to(self.device)
            prompts |= {"truth": truth, "forced": self._rows([*masks])}
        block.before = block.before if again else advance(block.state)
        state = rows_of(block.before, block.state, prompts["given"]) if again else block.state
        with self._autocast():
            decode = partial(self.model.decode, objects=False)
            block.state, found = self.memory.step(state, features, decode, **prompts, again=again)
        places = [p for p, i in enumerate(block.ids) if (i in queries if again else i is not None)]
        logits = [to_original(found.masks[0, [p]], self.size)[0] for p in places]  # alone: no bit depends on the others
        score, present = found.out["iou"][-1][0, places, 0].tolist(), found.present[0, places].tolist()
        for k, place in enumerate(places):
            own = torch.from_numpy(masks[place]).to(self.device) if place in masks else None
            shown = logits[k] if own is None else torch.where(own, GIVEN, -GIVEN)
            self.last[block.ids[place]] = (shown, score[k] if present[k] else 0.0, present[k])

    def _results(self) -> dict:
        """self.last as {id: ObjectFrame}."""
        if not self.last:
            return {}
        logits = torch.stack([x for x, _, _ in self.last.values()])  # (n, H, W)
        inside = logits > 0
        if not self.overlap:
            inside &= logits.argmax(0) == torch.arange(len(logits), device=logits.device)[:, None, None]
        inside = inside.cpu().numpy()
        kept = logits if self.logits else [None] * len(logits)
        rows = zip(self.last.items(), inside, kept, strict=True)
        return {i: ObjectFrame(mask, score, present, -1, x) for (i, (_, score, present)), mask, x in rows}

    def _step_slots(self) -> dict:
        """Tasks vis and vps."""
        with self._autocast():
            out = self.model.decode(self._features())
        order = self.slots.step(out["queries"][0], out["classes"][-1][0])
        alive = self.slots.alive.nonzero()[:, 0]
        masks, scores, labels = out["masks"][-1][0][order[alive]], self.slots.scores[alive], self.slots.labels[alive]
        ids = self.slots.ids[alive]
        if self.task == "vps":
            return self._panoptic(masks, scores, ids)
        logits = to_original(masks, self.size)  # (n, H, W)
        inside = logits > 0
        quality = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        score = (scores.gather(1, labels[:, None])[:, 0] * quality).tolist()
        kept, inside = logits if self.logits else [None] * len(logits), inside.cpu().numpy()
        rows = zip(ids.tolist(), inside, score, labels.tolist(), kept, strict=True)
        return {i: ObjectFrame(mask, s, True, label, x) for i, mask, s, label, x in rows if mask.any()}

    def _panoptic(self, masks: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor) -> dict:
        """Masks (n, h, w), class probabilities (n, K + 1) and ids (n,) of the slots that count -> segments that do not
        overlap; parts of one class of stuff are one segment."""
        is_thing = self.model.is_thing
        found = panoptic(scores.clamp_min(1e-12).log(), masks, is_thing, self.size, threshold=0.0)
        number = torch.where(is_thing[found["label"]], len(is_thing) + ids[found["query"]], found["label"] + 1)
        rows = zip(*(found[k].tolist() for k in ("value", "label", "score")), number.tolist(), strict=True)
        segments = {}
        for value, label, score, i in sorted(rows, key=lambda row: row[2]):  # of parts the highest score stays
            segments[i] = ObjectFrame((found["map"] == value).cpu().numpy(), score, True, label)
        return {i: x for i, x in sorted(segments.items()) if x.mask.any()}


def rows_of(one: MemoryState, other: MemoryState, rows: torch.Tensor) -> MemoryState:
    """The places rows bool (1, P) of one state, the rest of the other."""

    def choose(a, b):
        return None if a is None else torch.where(spread(rows, a), a, b)

    banks = (None if a is None else Bank(*map(choose, a, b)) for a, b in zip(one[3:], other[3:], strict=True))
    return MemoryState(*map(choose, one[:3], other[:3]), *banks)


def grid_logits(mask: np.ndarray, size: ImageSize) -> torch.Tensor:
    """A mask (h, w) bool of a frame as shown -> logits (padded h / 4, padded w / 4), GIVEN where it covers half a cell
    or more, -GIVEN elsewhere; one that nowhere does is where it covers any."""
    h, w = size.padded
    padded = F.pad(torch.from_numpy(mask).float(), (0, w - mask.shape[1], 0, h - mask.shape[0]))
    share = F.avg_pool2d(padded[None], 4)[0]
    inside = share >= 0.5
    return torch.where(inside if inside.any() else share > 0, GIVEN, -GIVEN)
