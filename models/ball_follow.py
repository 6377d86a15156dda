"""Which of the candidates of a frame is the ball: states SEARCH, TRACK and LOST, a motion gate, and whom to believe.

A Follower knows no network. It gets the detections of a frame and what a tracker says about its object, and answers
with the frame's Point, the mask that the tracker shall be seeded with, and events. A track begins with a detection of
at least new_thr, or where one thing has at least score_thr in `persist` frames in a row and moves; the frames before
are reported belatedly. From then on, in this order:

1. A detection of this frame inside the gate carries the track, whatever the tracker says. Of several the one with the
   highest evidence counts: score + motion_weight * exp(-(d / gate)^2), d px from where a Kalman filter expects the
   object, + tracker_weight where a trusted tracker agrees. The score of the birth plays no part. Where none is, one of
   at least keep * score_thr will do, near the object's last place or the expected one (ByteTrack, arXiv 2110.06864).
2. Without a detection the tracker's mask counts only when its object score is above trk_thr, it lies in the gate with a
   likely area, and the tracker is trusted: in at least `trust` of the last frames in which a detection was taken it
   said the same. And the detector's silence must be a miss rather than the truth: either it finds the object in less
   than `hit_rate` of the frames, and so often not that n misses in a row have a probability of at least `silence`; or
   the tracker has shown in earlier gaps that it says when the object is gone. A gap counts as missed by the detector
   when it is as probable, the tracker was there all along on a straight path, and the next detection agrees with it.
   At most `bridge` such frames in a row.
3. Otherwise nothing is reported. The gate grows with each frame of the gap; a detection inside takes the track up
   again. One outside does so when it is seen `confirm` frames in a row: a single jump is rejected. After
   `forget_after` frames the gate is the whole picture. What was seen beside the object before is not taken for it,
   but what scores clearly better for `challenge` frames, fewer after a start, and does not move less, replaces it; so
   does what moves by `lively` gates in them, while the object rests.

Lengths in px; gates are parts of the frame's width with a lower limit in px, so they hold for 128 and for 3840 px.
Sources: WASB (arXiv 2311.05237, gate around the prediction), SAMURAI (arXiv 2411.11922, motion and tracker scores).
"""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from models.ball_candidates import Candidate, Motion, Other, distance, extent, match_others
from utils.track_files import Point

SEARCH, TRACK, LOST = "SEARCH", "TRACK", "LOST"
LONGEST = 32  # frames that the hit rate of the detector looks back
FEW = 3  # frames after which a weak detection no longer counts
BESIDE = 5  # frames seen beside the object that make a thing another one
OTHERS = 64  # most that are remembered
BETTER = 1.25  # ratio of mean scores from which another thing is better


@dataclass(frozen=True)
class FollowConfig:
    """Rules of a Follower. Scores in 0..1; the defaults of score_thr and new_thr are SAM 3's."""

    score_thr: float = 0.5  # lowest score of a detection that counts
    new_thr: float = 0.7  # lowest score that begins a track
    keep: float = 0.5  # share of score_thr that is enough within a gate of where the object is tracked; 1: no less
    trk_thr: float = 0.5  # lowest object score of a tracker's mask that counts
    min_cells: float = 0.5  # smallest mask, in cells of the model's own masks: an answer that is all but empty is none
    gate: float = 0.075  # of the width per frame: how far the object may move
    gate_min: float = 12.0  # px per frame: the gate is at least this
    motion_weight: float = 0.5
    tracker_weight: float = 0.25
    area_ratio: float = 4.0  # largest change of the area against the median of the last ones
    lost_after: int = 1  # frames without evidence until LOST
    forget_after: int = 30  # frames until the gate is the whole picture
    persist: int = 4  # frames in a row of at least score_thr that begin a track too, if they move; 0: never
    confirm: int = 2  # frames in a row outside the gate that make a new start
    challenge: int = 8  # frames in a row in which another thing scores better until it takes over; 0: never
    lively: float = 1.0  # gates that it moves in them, to take over from what rests; 0: never
    min_points: int = 2  # a start that was seen in fewer frames is taken back
    trust: float = 0.75  # share of agreement from which the tracker is trusted
    trust_frames: int = 12  # that this share looks back
    trust_min: int = 4  # fewer comparisons: not trusted
    hit_rate: float = 0.9  # of the detector, from which its silence is believed; above 1: never
    silence: float = 0.01  # probability of so many misses in a row below which it is believed; 0: never
    again: float = 0.33  # share of the usual score that a detection needs to take a lost track up
    bridge: int = 30  # frames in a row that the tracker alone may carry; 0: none

    def __post_init__(self):
        shares = (self.score_thr, self.new_thr, self.trk_thr, self.trust, self.silence, self.again, self.keep)
        if not all(0 <= s <= 1 for s in shares) or self.new_thr < self.score_thr:
            raise ValueError(f"FollowConfig: {self}: expected scores and shares in 0..1, and score_thr <= new_thr")
        counts = (self.lost_after, self.confirm, self.min_points, self.trust_min, self.trust_frames)
        if min(counts) < 1 or min(self.bridge, self.challenge, self.lively, self.persist) < 0 or self.forget_after < 1:
            raise ValueError(f"FollowConfig: {self}: frame counts are at least 1, bridge, challenge, persist 0")
        if self.gate <= 0 or min(self.gate_min, self.min_cells) < 0 or self.area_ratio < 1:
            raise ValueError(f"FollowConfig: gate {self.gate}, gate_min {self.gate_min}, area_ratio {self.area_ratio}")


@dataclass
class Decision:
    """What a Follower makes of a frame."""

    point: Point
    state: str
    chosen: Candidate | None = None  # what the point is made of
    seed: Candidate | None = None  # what the tracker is to be seeded with in this frame
    forget: bool = False  # the tracker's memory of the object is to go first
    events: list[dict] = field(default_factory=list)
    revise: dict[int, Point] = field(default_factory=dict)  # earlier frames that are known better now


# ---- one object


class Follower:
    """One object through a video. width, height: of the frame, px. obj_id: as the tracker knows it.

    jumps: whether a detection outside the gate may become the object's new start (mode single); else it only stays.
    """

    def __init__(self, cfg: FollowConfig, width: int, height: int, obj_id: int = 1, jumps: bool = True):
        self.cfg, self.width, self.height, self.obj_id, self.jumps = cfg, width, height, obj_id, jumps
        self.step_px = max(cfg.gate * width, cfg.gate_min)
        self.near_px = max(2.0, 0.004 * width)  # two things nearer than this are one
        self.state, self.motion, self.last, self.last_t = SEARCH, None, None, -1
        self.areas: deque[int] = deque(maxlen=8)
        self.checks: deque[bool] = deque(maxlen=cfg.trust_frames)  # tracker said the same as the detection
        self.hits: deque[bool] = deque(maxlen=LONGEST)  # detector found what was there
        self.absences: deque[bool] = deque(maxlen=LONGEST)  # in gaps: the tracker said that the object is gone
        self.scores: deque[float] = deque(maxlen=LONGEST)  # of detections that were taken
        self.claims: dict[int, Candidate] = {}  # tracker's masks in the frames since the last detection
        self.detected: Candidate | None = None  # last detection that was taken, and its frame
        self.detected_t, self.chain = -1, []
        self.recent: deque[Candidate] = deque(maxlen=max(cfg.challenge, 1))  # last detections that were taken
        self.others: list[Other] = []

    # -- what a frame says

    def reach(self, t: int) -> float:
        """px that the object may have moved since it was seen last."""
        gap = t - self.last_t
        return math.inf if gap > self.cfg.forget_after else self.step_px * gap

    def expected(self, t: int) -> Candidate:
        """Where the object is expected, inside the picture."""
        x, y = self.motion.place(t)
        return Candidate(min(max(x, 0), self.width - 1), min(max(y, 0), self.height - 1), 0.0, 0)

    def fits(self, c: Candidate, t: int) -> bool:
        """Whether the object may be here: near its last or its expected place, with an area like before."""
        far = min(distance(c, self.last), distance(c, self.expected(t))) > self.reach(t)
        return not far and self.sized(c, self.cfg.area_ratio, 9)

    def sized(self, c: Candidate, ratio: float, few: int) -> bool:
        """Whether the area is as usual, up to this ratio; below `few` px areas say nothing."""
        usual = float(np.median(self.areas))
        return max(c.area, usual, few) <= ratio * max(min(c.area, usual), few)

    def evidence(self, c: Candidate, t: int, tracked: Candidate | None = None) -> float:
        """What speaks for this detection in this frame."""
        found = c.score
        if len(self.areas) >= 3:
            reach = min(self.reach(t), self.step_px * self.cfg.forget_after)
            found += self.cfg.motion_weight * math.exp(-((distance(c, self.expected(t)) / reach) ** 2))
        if self.trusted() and self.agree(c, tracked):
            found += self.cfg.tracker_weight
        return found

    def agree(self, c: Candidate, tracked: Candidate | None) -> bool:
        """Whether the tracker's mask is that of the detection: centres within half a radius, or near_px."""
        if tracked is None or not self.claimed(tracked):
            return False
        near = max(self.near_px, 0.5 * math.sqrt(c.area / math.pi))
        large, small = max(c.area, tracked.area), max(min(c.area, tracked.area), 1)
        return distance(c, tracked) <= near and large <= self.cfg.area_ratio * small

    def claimed(self, tracked: Candidate | None) -> bool:
        """Whether the tracker says that the object is there."""
        return tracked is not None and tracked.area > 0 and tracked.score >= self.cfg.trk_thr

    # -- whom to believe

    def trusted(self) -> bool:
        return len(self.checks) >= self.cfg.trust_min and np.mean(self.checks) >= self.cfg.trust

    def missed(self, n: int) -> float:
        """Probability of n misses in a row by a detector that has found what it has found."""
        return ((self.hits.count(False) + 1) / (len(self.hits) + 2)) ** n

    def believed(self, n: int) -> bool:
        """Whether n frames without a detection mean that the object is gone, not that the detector missed it."""
        rare = False not in self.hits or self.missed(1) <= 1 - self.cfg.hit_rate
        return rare and self.cfg.hit_rate <= 1 or self.missed(n) < self.cfg.silence

    def honest(self) -> bool:
        """Whether the tracker has shown that it says so when the object is gone."""
        return self.absences.count(True) >= self.cfg.trust_min and np.mean(self.absences) >= self.cfg.trust

    def doubt(self, t: int, tracked: Candidate | None) -> str | None:
        """Why the tracker's mask does not count in a frame without a detection; None: it does."""
        if tracked is None or not self.claimed(tracked):
            return "no detection, and the tracker finds nothing"
        if not self.fits(tracked, t):
            return "no detection, and the tracker left the gate"
        if not self.trusted():
            return f"no detection; tracker not trusted, agrees in {sum(self.checks)} of {len(self.checks)} frames"
        if self.believed(t - self.detected_t) and not self.honest():
            return f"no detection; detector believed, found {sum(self.hits)} of the last {len(self.hits)}"
        if t - self.detected_t > self.cfg.bridge:
            return f"no detection for {self.cfg.bridge} frames"
        return None

    def learn(self, c: Candidate, t: int, tracked: Candidate | None) -> None:
        """A detection was taken: was the tracker right, here and in the frames before without one?"""
        gap, agree, n = t - self.detected_t, self.agree(c, tracked), len(self.claims)
        if tracked is not None and (gap == 1 or self.claimed(tracked)):
            self.checks.append(agree)
        if n and not agree and self.claimed(tracked):
            self.checks.extend([False] * min(n, self.cfg.trust_min))
        if n and agree and n == gap - 1 and self.missed(n) >= self.cfg.silence and self.straight(c, t):
            self.hits.extend([False] * n)
        elif gap > 1 and tracked is not None:
            self.absences.extend([True] * min(gap - 1 - n, LONGEST) + [False] * n)
        self.scores.append(c.score)
        self.hits.append(True)
        self.detected, self.detected_t, self.claims = c.bare(), t, {}
        self.recent.append(self.detected)

    def straight(self, c: Candidate, t: int) -> bool:
        """Whether the tracker's masks lie near the line from the last detection to c in frame t."""
        a, span = self.detected, t - self.detected_t
        line = {k: (k - self.detected_t) / span for k in self.claims}
        off = [math.hypot(m.x - a.x - line[k] * (c.x - a.x), m.y - a.y - line[k] * (c.y - a.y))
               for k, m in self.claims.items()]  # fmt: skip
        return max(off) <= self.step_px / 2

    # -- what else is there

    def watch(self, t: int, candidates: list[Candidate], taken: Candidate | None) -> None:
        """Follow what is not the object. taken: the object's detection in this frame."""
        if taken is not None:
            apart = max(self.near_px, math.sqrt(taken.area))
            candidates = [c for c in candidates if distance(c, taken) > apart]
        found = match_others(self.others, candidates, t, self.step_px, self.near_px)
        for o in self.others:
            o.row[o.t].mask = None  # of an earlier frame
        for k, c in enumerate(candidates):
            other = found.get(k)
            if other is None:
                other = Other({})
                self.others.append(other)
            keep = max(self.cfg.challenge, self.cfg.confirm, self.cfg.persist)
            other.row = {k: v for k, v in other.row.items() if k > t - keep and other.t == t - 1}
            other.row[t] = c
            if taken is not None:
                other.beside, other.beside_t = other.beside + 1, t
        kept = [o for o in self.others if t - o.t <= self.cfg.forget_after]
        self.others = sorted(kept, key=lambda o: o.t)[-OTHERS:]

    def stranger(self, o: Other | None, t: int) -> bool:
        """Whether this is known as another thing."""
        return o is not None and o.beside >= BESIDE and t - o.beside_t <= self.cfg.forget_after

    def enough(self, row: Collection[Candidate], t: int) -> bool:
        """Whether one thing's detections in a row can begin a track: one is of new_thr; or there are many, they move,
        and there is no track to lose, or one whose detections did not score clearly better."""
        scores = [c.score for c in row]
        many = 0 < self.cfg.persist <= sum(s >= self.cfg.score_thr for s in scores)
        if many and self.state != SEARCH and self.reach(t) < math.inf:
            many = len(self.scores) > 0 and BETTER * np.mean(scores) >= np.median(self.scores)
        return max(scores, default=-1) >= self.cfg.new_thr or many and extent(row) >= 2 * self.near_px

    def jump(self, t: int) -> dict[int, Candidate] | None:
        """{frame: detection} of what was seen in `confirm` frames in a row since the object was seen last."""
        for o in sorted((o for o in self.others if o.t == t), key=lambda o: -o.row[t].score):
            row = {k: c for k, c in o.row.items() if k > self.last_t}
            likely = self.enough(row.values(), t) and self.sized(o.row[t], 2 * self.cfg.area_ratio, 1)
            if len(row) >= self.cfg.confirm and likely and not self.stranger(o, t):
                return row
        return None

    def challenger(self, t: int) -> tuple[dict[int, Candidate], str] | None:
        """({t: detection}, reason) of what has scored clearly better than the object, and moves as much, for
        `challenge` frames, soon after a start for as many as the object was seen since; or moves while it rests."""
        own = list(self.recent)
        n = max(self.cfg.confirm, len(own))
        if not self.cfg.challenge or len(own) < self.cfg.confirm:
            return None
        usual, moved = np.mean([c.score for c in own]), extent(own)
        rests = len(own) >= self.cfg.challenge and moved <= 2 * self.near_px and self.cfg.lively > 0
        for o in self.others:
            row = list(o.row.values())[-n:]
            if o.t < t or len(row) < n or o.row[t].score < self.cfg.new_thr:
                continue
            moves, score = extent(row), np.mean([c.score for c in row])
            if score > BETTER * usual and moves >= moved / 2 - self.near_px:
                return {t: o.row[t]}, f"has scored better than the last one for {n} frames"
            if rests and score > usual / 2 and moves >= self.cfg.lively * self.step_px:
                return {t: o.row[t]}, f"moves, while the last one rested for {n} frames"
        return None

    # -- a frame

    def step(self, t: int, candidates: list[Candidate], tracked: Candidate | None = None) -> Decision:
        """Frame t, each once and in order. candidates: detections with masks; tracked: the tracker's answer, None when
        it does not know the object."""
        everything = [c for c in candidates if c.area]
        candidates = [c for c in everything if c.score >= self.cfg.score_thr]
        if self.state == SEARCH:
            return self.search(t, everything, tracked)
        best = max(self.possible(t, candidates, tracked), key=lambda c: self.evidence(c, t, tracked), default=None)
        best = self.weak(t, everything) if best is None else best
        self.watch(t, candidates, best)
        if best is not None:
            better = self.challenger(t) if self.jumps else None
            return self.take(t, best, tracked) if better is None else self.begin(t, better[0], tracked, better[1])
        if self.jumps and (begun := self.jump(t)):
            return self.begin(t, begun, tracked, f"{len(begun)} frames in a row outside the gate")
        reason = self.doubt(t, tracked)
        if self.claimed(tracked) and self.fits(tracked, t) and t - self.detected_t <= LONGEST:
            self.claims[t] = Candidate(tracked.x, tracked.y, tracked.score, tracked.area)
        return self.carry(t, tracked) if reason is None else self.miss(t, reason, tracked)

    def possible(self, t: int, candidates: list[Candidate], tracked: Candidate | None) -> list[Candidate]:
        """Detections that may be the object: in the gate, no stranger, and for a lost track not much weaker than
        usual."""
        known = match_others(self.others, candidates, t, self.step_px, self.near_px)
        lost, expected = self.state == LOST, self.expected(t)
        least = self.cfg.again * float(np.median(self.scores)) if lost and self.scores else 0.0
        least = self.cfg.new_thr if self.reach(t) == math.inf else least
        found = []
        for k, c in enumerate(candidates):
            strange = self.stranger(known.get(k), t) and (lost or distance(c, expected) > self.step_px / 4)
            if c.score >= least and self.fits(c, t) and (not strange or self.agree(c, tracked)):
                found.append(c)
        return found

    def weak(self, t: int, candidates: list[Candidate]) -> Candidate | None:
        """The best detection below score_thr that still carries the track, a few frames after it was seen."""
        if t - self.last_t > FEW:
            return None
        low, high = self.cfg.keep * self.cfg.score_thr, self.cfg.score_thr
        near = [c for c in candidates if low <= c.score < high and self.fits(c, t)]
        near = [c for c in near if min(distance(c, self.last), distance(c, self.expected(t))) <= self.step_px]
        return max(near, key=lambda c: self.evidence(c, t), default=None)

    def search(self, t: int, candidates: list[Candidate], tracked: Candidate | None) -> Decision:
        """Nothing is known yet: the best detection that may begin a track. It is reported in the frames before, too,
        from its first good one on; weak ones between do not end a row."""
        self.watch(t, candidates, None)
        ready = (o for o in self.others if o.t == t and self.enough(o.row.values(), t))
        best = max(ready, key=lambda o: o.row[t].score, default=None)
        if best is None:
            return Decision(Point(), SEARCH)
        first = min(k for k, c in best.row.items() if c.score >= self.cfg.score_thr)
        return self.begin(t, {k: c for k, c in best.row.items() if k >= first}, tracked, "found")

    def take(self, t: int, c: Candidate, tracked: Candidate | None) -> Decision:
        """The track goes on with a detection."""
        back, agree, gap = self.state == LOST, self.agree(c, tracked), t - self.last_t
        if back:
            self.recent.clear()
        self.learn(c, t, tracked)
        self.place(t, c)
        made = Decision(self.point(c, "detector", c, tracked), TRACK, c, seed=None if agree and not back else c)
        self.state = TRACK
        if back:
            made.events.append(self.event(t, f"found again after {gap - 1} frame{'s' * (gap > 2)}", c))
        return made

    def carry(self, t: int, tracked: Candidate) -> Decision:
        """The track goes on with the tracker alone."""
        made, lost = Decision(self.point(tracked, "tracker", None, tracked), TRACK, tracked), self.state == LOST
        self.state = TRACK
        if lost:
            made.events.append(self.event(t, "taken up by the tracker", tracked))
        self.place(t, tracked)
        return made

    def miss(self, t: int, reason: str, tracked: Candidate | None) -> Decision:
        """Nothing is reported."""
        made = Decision(Point(trk_score=None if tracked is None else tracked.score), self.state)
        if self.state == TRACK and t - self.last_t >= self.cfg.lost_after:
            self.state = made.state = LOST
            made.events.append(self.event(t, reason, None))
        return made

    def begin(self, t: int, row: dict[int, Candidate], tracked: Candidate | None, reason: str) -> Decision:
        """A new start; its frames before t are reported belatedly."""
        made = Decision(Point(), TRACK, revise=self.withdrawn(), forget=self.state != SEARCH)
        if made.revise:
            made.events.append(self.event(t, f"a start seen in {len(made.revise)} frame only is taken back", None))
        self.areas.clear(), self.claims.clear(), self.chain.clear(), self.recent.clear()
        self.motion, self.others = None, [o for o in self.others if o.row.get(t) is not row[t]]
        for k, c in row.items():
            self.place(k, c)
            made.revise[k] = self.point(c, "detector", c, None)
        self.state, c = TRACK, row[t]
        self.detected, self.detected_t = c.bare(), t
        made.point, made.chosen, made.seed = self.point(c, "detector", c, tracked), c, c
        del made.revise[t]
        made.events.append(self.event(t, reason, c))
        return made

    def withdrawn(self) -> dict[int, Point]:
        """Frames of the present start when they are too few to count."""
        few = len(self.chain) < self.cfg.min_points
        return {k: Point() for k in self.chain} if few else {}

    def finish(self, t: int) -> Decision:
        """After the last frame t, or when the object is given up."""
        made = Decision(Point(), self.state, revise=self.withdrawn() if self.state == LOST else {})
        if made.revise:
            made.events.append(self.event(t, f"a start seen in {len(made.revise)} frame only is taken back", None))
        return made

    # -- a user's clicks

    def correct(self, t: int, c: Candidate, source: str, det: Candidate | None, tracked: Candidate | None) -> Decision:
        """The user says that the object is c in frame t: a new start that is never taken back."""
        made = self.begin(t, {t: c}, tracked, "corrected by the user")
        made.point, made.forget = self.point(c, source, det, tracked), True
        made.point.score = c.score if det is not None else None
        self.chain = [t] * self.cfg.min_points
        return made

    def refuse(self, t: int, x: float, y: float) -> Decision:
        """The user says that x, y is not the object in frame t: nothing is reported, and what stands there is another
        thing for `forget_after` frames."""
        made = Decision(Point(), self.state, forget=self.state != SEARCH)
        if self.state != SEARCH:
            self.state = made.state = LOST
            self.others.append(Other({t: Candidate(x, y, 0.0, 0)}, BESIDE, t))
        self.checks.clear(), self.claims.clear()
        made.events.append(self.event(t, "refused by the user", Candidate(x, y, 0.0, 0)))
        return made

    # -- what is known

    def place(self, t: int, c: Candidate) -> None:
        """The object was here."""
        if self.motion is None or t - self.last_t > self.cfg.forget_after:
            self.motion = Motion(c.x, c.y, t, 0.5, 0.01 * self.width, self.step_px)
        else:
            self.motion.update(c.x, c.y, t)
        self.last, self.last_t = c.bare(), t
        self.areas.append(c.area)
        if len(self.chain) < self.cfg.min_points:
            self.chain.append(t)

    def point(self, c: Candidate, source: str, det: Candidate | None, tracked: Candidate | None) -> Point:
        scores = (None if det is None else det.score, None if tracked is None else tracked.score)
        return Point(c.x, c.y, c.box, c.score, *scores, c.area, self.obj_id, source, True, c.rle)

    def event(self, t: int, reason: str, c: Candidate | None) -> dict:
        where = {"x": None, "y": None, "score": None} if c is None else {"x": c.x, "y": c.y, "score": c.score}
        return {"frame": t, "reason": reason, "state": self.state, **where}
