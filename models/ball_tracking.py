"""Several prompts through one video: an engine sees, followers decide, and what they decide goes back to the tracker.

    tracker = BallTracker(engine, [Target("ball", "tennis ball")], FollowConfig(), (H, W))
    for t, frame in enumerate(frames):  # uint8 (H, W, 3)
        shown = tracker.step(t, frame)  # {"ball": Shown}
    tracker.finish()
    tracker.targets["ball"].frames, tracker.events

The engine is models.sam3_tracker.Sam3Engine or anything with its encode, detect and session. Per frame the picture
encoder runs once. What is kept of a video are the followers' few numbers, the session's bounded memory and a Point per
frame and target; never a picture.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from models.ball_candidates import Candidate
from models.ball_follow import LOST, SEARCH, TRACK, Decision, FollowConfig, Follower
from utils.masks import mask_iou, rle_encode
from utils.track_files import Point, Track
from utils.track_inputs import Click, Target

NEW_IOU = 0.1  # a detection that covers a known object more than that is not a new one
OBJECTS = 16  # most in mode all
COLUMNS = 9  # of candidates that are kept: x, y, score, area, box, 1 where it is the tracker's


class Shown(NamedTuple):
    """A target in the frame that was just seen."""

    point: Point
    state: str
    masks: list[np.ndarray]  # bool (H, W), one per object


class BallTracker:
    """Frames of one video, in order. size: (H, W) px. masks: keep the masks of points, as RLE.

    exact_memory: see models.sam3_memory. keep_candidates: collect what was seen for an offline pass, per target and
    frame an array (n, 9) of x, y, score, area, box, and 1 where it is the tracker's.
    """

    def __init__(self, engine, targets: list[Target], cfg: FollowConfig, size: tuple[int, int], clicks=(),
                 nms_iou: float = 0.1, masks=False, exact_memory=False, keep_candidates=False):  # fmt: skip
        self.engine, self.cfg, self.size, self.nms_iou, self.masks = engine, cfg, size, nms_iou, masks
        self.session = engine.session(size, exact_memory=exact_memory)
        self.prompts = {target.name: target.prompt for target in targets}
        self.targets = {target.name: Track(target.prompt, target.mode) for target in targets}
        self.clicks, self.events, self.next_id = list(clicks), [], 1
        self.followers: dict[str, list[Follower]] = {target.name: [] for target in targets}
        self.candidates = {target.name: [] for target in targets} if keep_candidates else None
        for target in targets:
            if target.mode == "single":
                self.add(target.name)

    def add(self, name: str) -> Follower:
        """A follower with a number of its own."""
        H, W = self.size
        follower = Follower(self.cfg, W, H, self.next_id, jumps=self.targets[name].mode == "single")
        self.followers[name].append(follower)
        self.next_id += 1
        return follower

    # ---- a frame

    def candidate(self, mask: np.ndarray, score: float, logits: np.ndarray | None = None) -> Candidate:
        """Of a mask bool (H, W), with its code where masks are written. logits (m, m): the model's own mask; what is
        much smaller than one of its cells counts as empty."""
        made = Candidate.from_mask(mask, score)
        if logits is not None and made.area < self.cfg.min_cells * mask.size / logits.size:
            made = Candidate(math.nan, math.nan, made.score, 0)
        if self.masks and made.area:
            made.rle = rle_encode(mask)
        return made

    def step(self, t: int, frame: np.ndarray) -> dict[str, Shown]:
        """frame uint8 (H, W, 3), the t-th."""
        seen = self.engine.encode(frame)
        lowest = self.cfg.keep * self.cfg.score_thr
        found = self.engine.detect(seen, list(self.prompts.values()), lowest, self.nms_iou)
        answers = {k: self.candidate(a.mask, a.score, a.logits) for k, a in self.session.track(seen, t).items()}
        shown = {}
        for name, detections in zip(self.prompts, found, strict=True):
            parts = zip(detections.masks, detections.scores, detections.logits, strict=True)
            candidates = [c for part in parts if (c := self.candidate(*part)).area]
            clicks = [click for click in self.clicks if click.t == t and click.target == name]
            refused = [click for click in clicks if not click.inside]
            candidates = [c for c in candidates if not any(c.covers(click.x, click.y) for click in refused)]
            step = self.step_all if self.targets[name].mode == "all" else self.step_single
            shown[name] = step(t, seen, name, candidates, answers, clicks)
            self.targets[name].frames.append(shown[name].point)
            if self.candidates is not None:
                self.candidates[name].append(rows_of(candidates, shown[name].point, self.cfg.score_thr))
        return shown

    def step_single(self, t, seen, name, candidates, answers, clicks) -> Shown:
        """The one object of a target; clicks count instead of what the follower would choose."""
        follower = self.followers[name][0]
        answer, inside = answers.get(follower.obj_id), [click for click in clicks if click.inside]
        if inside:
            made = self.correct(t, seen, follower, candidates, inside[-1])
        elif clicks:
            made = follower.refuse(t, clicks[-1].x, clicks[-1].y)
        else:
            made = follower.step(t, candidates, answer)
        self.obey(t, seen, name, follower, made)
        return Shown(made.point, made.state, masks_of(made))

    def step_all(self, t, seen, name, candidates, answers, clicks) -> Shown:
        """All objects of a target: each detection goes to at most one of them, what is left begins new ones."""
        team, decisions = self.followers[name], []
        gain = np.array([[f.evidence(c, t, answers.get(f.obj_id)) if f.fits(c, t) else -math.inf for c in candidates]
                         for f in team]).reshape(len(team), len(candidates))  # fmt: skip
        pairs = zip(*linear_sum_assignment(np.where(gain == -math.inf, -1e3, gain), maximize=True), strict=True)
        chosen = {i: k for i, k in pairs if gain[i, k] > -math.inf}
        for i, follower in enumerate(list(team)):
            own = [candidates[chosen[i]]] if i in chosen else []
            decisions.append((follower, follower.step(t, own, answers.get(follower.obj_id))))
        known = [m for _, made in decisions for m in masks_of(made)]
        known += [a.mask for f in team if (a := answers.get(f.obj_id)) is not None and a.area]
        fresh = [c for k, c in enumerate(candidates) if k not in chosen.values() and c.score >= self.cfg.new_thr]
        for c in sorted(fresh, key=lambda c: -c.score):
            free = not known or mask_iou(c.mask[None], np.stack(known)).max() <= NEW_IOU
            if free and len(team) < OBJECTS:
                follower = self.add(name)
                decisions.append((follower, follower.step(t, [c])))
                known.append(c.mask)
        for follower, made in decisions:
            self.obey(t, seen, name, follower, made)
            if follower.state == LOST and t - follower.last_t > self.cfg.forget_after:
                self.give_up(t, name, follower)
        shown = sorted((made for _, made in decisions if made.chosen), key=lambda made: -made.point.score)
        state = TRACK if shown else LOST if team else SEARCH
        return Shown(best_of([made.point for made in shown]), state, [m for made in shown for m in masks_of(made)])

    # ---- what follows from a decision

    def obey(self, t, seen, name, follower, made: Decision) -> None:
        """Seed the tracker, note events, put right earlier frames."""
        known = follower.obj_id in self.session.objects
        if made.forget and known:
            self.session.drop(follower.obj_id)
        if made.seed is not None:
            self.session.seed(seen, t, follower.obj_id, mask=made.seed.mask)
        self.events += [{**event, "target": name} for event in made.events]
        frames = self.targets[name].frames
        for k, point in made.revise.items():
            if self.targets[name].mode == "single":
                frames[k] = point
            else:
                frames[k] = best_of([p for p in frames[k].objects if p.obj_id != follower.obj_id])

    def give_up(self, t: int, name: str, follower: Follower) -> None:
        """Forget an object of mode all."""
        self.obey(t, None, name, follower, follower.finish(t))
        self.followers[name].remove(follower)
        if follower.obj_id in self.session.objects:
            self.session.drop(follower.obj_id)

    def correct(self, t, seen, follower, candidates, click: Click) -> Decision:
        """The object is where the user clicked: the detection there, else the mask that the tracker makes of the
        point, else a disc of the usual size."""
        there = [c for c in candidates if c.covers(click.x, click.y)]
        if there:
            best = max(there, key=lambda c: c.score)
            return follower.correct(t, best, "detector", best, None)
        if follower.obj_id in self.session.objects:
            self.session.drop(follower.obj_id)
        told = self.session.seed(seen, t, follower.obj_id, points=[(click.x, click.y, 1)])
        answer = self.candidate(told.mask, told.score)
        if not answer.covers(click.x, click.y):
            self.session.drop(follower.obj_id)
            y, x = np.ogrid[: self.size[0], : self.size[1]]
            usual = max(float(np.median(follower.areas)) if follower.areas else 0.0, 9.0)  # px
            disc = (y - click.y) ** 2 + (x - click.x) ** 2 <= max(usual / math.pi, 1.0)
            answer = self.candidate(disc, told.score)
            answer.x, answer.y = click.x, click.y
        made = follower.correct(t, answer, "tracker", None, answer)
        made.forget, made.seed = False, None if follower.obj_id in self.session.objects else answer
        return made

    def finish(self) -> None:
        """After the last frame."""
        for name, team in self.followers.items():
            t = len(self.targets[name].frames) - 1
            for follower in team:
                self.obey(t, None, name, follower, follower.finish(t))
        self.events.sort(key=lambda event: event["frame"])


def masks_of(made: Decision) -> list[np.ndarray]:
    """The mask behind a decision's point, if there is one."""
    return [] if made.chosen is None else [made.chosen.mask]


def best_of(points: list[Point]) -> Point:
    """The point of a frame of mode all: the best object's fields, and all objects."""
    points = sorted(points, key=lambda p: -(p.score or 0))
    return replace(points[0], objects=points) if points else Point(objects=[])


def rows_of(candidates: list[Candidate], point: Point, score_thr: float) -> np.ndarray:
    """What an offline pass chooses from in one frame: (n, 9); of weak detections only the one that was taken."""
    good = [c for c in candidates if c.score >= score_thr or (c.x, c.y) == (point.x, point.y)]
    rows = [(c.x, c.y, c.score, c.area, *c.box, 0) for c in good]
    if point.source == "tracker":
        rows.append((point.x, point.y, point.score or 1.0, point.area, *point.box, 1))
    return np.array(rows, np.float64).reshape(-1, COLUMNS)
