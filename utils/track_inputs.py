"""What a user of eval/infer_ball.py asks for: targets, clicks, and to stop."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from utils.run import UserError

NAME = r"[A-Za-z][A-Za-z0-9_-]*"
NUMBER = r"\d+(?:\.\d*)?|\.\d+"
RULES = {  # of models.ball_follow.FollowConfig: what each is, for --help
    "score_thr": "lowest score of a detection",
    "new_thr": "lowest score that begins a track",
    "persist": "frames in a row from --score-thr on that begin one too, if it moves; 0: never",
    "keep": "share of --score-thr that is enough near where the object is tracked; 1: no less",
    "trk_thr": "lowest object score of a tracker's mask",
    "min_cells": "smallest mask, in cells of the model's own masks",
    "gate": "how far an object may move in a frame, of the width",
    "gate_min": "and at least so many px",
    "motion_weight": "what lying where it is expected adds to a detection's score",
    "tracker_weight": "what agreeing with a trusted tracker adds to it",
    "area_ratio": "largest change of an object's area",
    "lost_after": "frames without evidence until LOST",
    "forget_after": "lost frames until the gate is the whole picture",
    "confirm": "frames in a row outside the gate that make a new start",
    "challenge": "frames in which another thing scores better until it takes over; 0: never",
    "lively": "gates that another thing moves in these frames to take over from one at rest; 0: never",
    "min_points": "a start seen in fewer frames is taken back (hot start)",
    "trust": "share of the last frames with a detection in which the tracker must have agreed, to carry alone",
    "hit_rate": "share of frames found from which the detector's silence is believed; above 1: never",
    "silence": "probability of so many misses in a row below which the detector's silence is believed; 0: never",
    "again": "share of its usual score that a detection needs to take a lost track up",
    "bridge": "most frames in a row that a trusted tracker carries alone; 0: none",
}


@dataclass(frozen=True)
class Target:
    """name: in files; prompt: for the detector; mode: single (the best instance) or all."""

    name: str
    prompt: str | None
    mode: str = "single"


@dataclass(frozen=True)
class Click:
    """A user's correction: in frame t the object of `target` is at x, y px, or (inside False) it is not."""

    t: int
    x: float
    y: float
    inside: bool
    target: str


def read_targets(prompts: list[str], every: list[str]) -> list[Target]:
    """NAME=TEXT of --prompt, and the NAMEs of --all. UserError for what does not fit together."""
    targets = []
    for text in prompts:
        name, equals, prompt = text.partition("=")
        if not equals or not prompt.strip() or not re.fullmatch(NAME, name):
            raise UserError(
                f'--prompt {text}: expected NAME=TEXT, such as ball="tennis ball"; a NAME is letters and digits'
            )
        if name in [target.name for target in targets]:
            raise UserError(f"--prompt {text}: a second target called {name}; give each a NAME of its own")
        targets.append(Target(name, prompt.strip(), "all" if name in every else "single"))
    names = [target.name for target in targets]
    if unknown := [name for name in every if name not in names]:
        raise UserError(f"--all {unknown[0]}: no such target; expected one of {', '.join(names) or '--prompt'}")
    return targets


def read_clicks(texts: list[str], targets: list[Target], frames: int, size: tuple[int, int]) -> list[Click]:
    """FRAME:X,Y[:LABEL][:NAME] of --correct for a video of so many frames and (W, H) px. UserError outside of it."""
    clicks, modes = [], {target.name: target.mode for target in targets}
    for text in texts:
        found = re.fullmatch(rf"(\d+):({NUMBER}),({NUMBER})(?::([01]))?(?::({NAME}))?", text)
        if not found:
            raise UserError(f"--correct {text}: expected FRAME:X,Y, or with :0 (not here) or :1, and :NAME, behind it")
        t, x, y, name = int(found[1]), float(found[2]), float(found[3]), found[5] or targets[0].name
        if t >= frames or x > size[0] - 1 or y > size[1] - 1:
            raise UserError(f"--correct {text}: outside the video, it has {frames} frames of {size[0]}x{size[1]} px, "
                            "both counted from 0")  # fmt: skip
        if modes.get(name) != "single":
            raise UserError(f"--correct {text}: {name} is no target with one object; name a --prompt that is not --all")
        if any(c.t == t and c.target == name for c in clicks):
            raise UserError(f"--correct {text}: a second click for {name} in frame {t}; give one")
        clicks.append(Click(t, x, y, found[4] != "0", name))
    return clicks


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM put their number into the list; the second time they end the program."""
    asked: list[int] = []

    def note(number, _):
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
