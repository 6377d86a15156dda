"""Questions and answers about patches, for a model that answers with [SEG]: vessels, background, both, absent things.

What is asked for and is not in the patch is answered by NONE, without [SEG] (Sa2VA notes, section 6.6).
"""

from collections.abc import Sequence

import numpy as np

from data.vessels import VesselPatches

BACKGROUND = "everything that is not a blood vessel, inside the eye"
ABSENT = ("the dog", "the car", "the bicycle", "the traffic light", "the chair", "the tree", "the person", "the bottle")
NONE = "There is no such object."
KINDS = {"object": 0.45, "background": 0.35, "several": 0.1, "absent": 0.1}


def question(phrases: Sequence[str]) -> str:
    """ "Please segment the blood vessels."; several phrases are numbered, so that the order of the answer is clear."""
    if len(phrases) == 1:
        return f"Please segment {phrases[0]}."
    return "Please segment " + " ".join(f"({k}) {p}" for k, p in enumerate(phrases, 1)) + "."


def answer(n: int) -> str:
    """The answer with n [SEG]: "It is [SEG]."; "(1) [SEG] (2) [SEG]."; NONE for 0."""
    if n == 0:
        return NONE
    return "It is [SEG]." if n == 1 else " ".join(f"({k}) [SEG]" for k in range(1, n + 1)) + "."


class VesselQuestions:
    """Patches with a question about each, a function of (patches' seed, epoch, index) alone.

    kinds: {"object", "background", "several", "absent": share}. object: one of the record's texts; background: what is
    none of the objects, inside the field of view; several: all texts and the background in one answer, in random order;
    absent: a thing no photograph of an eye shows. An object without a pixel in the patch is answered NONE where it is
    asked for alone, and is left out of several.

    questions[index] or [epoch, index] -> {"image" (S, S, 3) uint8, "fov" (S, S) bool, "text" str, "answer" str,
    "masks" (n, S, S) bool: of the answer's n [SEG], "phrases": those asked for, "kind", "name" str}.
    """

    def __init__(self, patches: VesselPatches, kinds: dict[str, float] = KINDS):
        if set(kinds) - set(KINDS) or min(kinds.values()) < 0 or not sum(kinds.values()) > 0:
            raise ValueError(f"VesselQuestions: kinds {kinds}, expected shares of {', '.join(KINDS)}")
        if not patches.objects:
            raise ValueError(
                "VesselQuestions: the patches lack the masks of single objects; make them with objects=True"
            )
        self.patches, self.names = patches, list(kinds)
        self.shares = np.array(list(kinds.values()), float) / sum(kinds.values())

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = (0, key) if isinstance(key, int) else key
        patch = self.patches[key]
        rng = np.random.default_rng((self.patches.seed, epoch, index, 1))  # the patch has drawn from another one
        kind = str(rng.choice(self.names, p=self.shares))
        texts = self.patches.items[index % len(self.patches.items)].text
        known = {**dict(zip(texts, patch["masks"], strict=True)), BACKGROUND: patch["fov"] & ~patch["mask"]}
        if kind == "object":
            phrases = [texts[rng.integers(len(texts))]]
        elif kind == "background":
            phrases = [BACKGROUND]
        elif kind == "absent":
            phrases = [ABSENT[rng.integers(len(ABSENT))]]
        else:
            there = [p for p, mask in known.items() if mask.any()]
            phrases = [there[k] for k in rng.permutation(len(there))] or [texts[0]]
        masks = [known[p] for p in phrases if p in known and known[p].any()]
        return {
            "image": patch["image"], "fov": patch["fov"], "text": question(phrases), "answer": answer(len(masks)),
            "masks": np.array(masks).reshape(-1, *patch["fov"].shape).astype(bool), "phrases": phrases, "kind": kind,
            "name": patch["name"],
        }  # fmt: skip
