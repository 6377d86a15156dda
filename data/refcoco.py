"""RefCOCO, RefCOCO+ and RefCOCOg: sentences that name one object of a COCO picture.

    refs_unc.json     [{ref_id, ann_id, image_id, split, sentences: [{sent_id, sent}]}], the json twin of refs(unc).p
    instances.json    COCO instances of the pictures (train2014)

The sets are handed out as pickles, and reading a foreign pickle runs whatever code is in it, so this reader refuses
them unread. Make the twin once, where that does no harm (a container without your files); it needs only Python:

    python -c "import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], 'rb')), open(sys.argv[2], 'w'))" \\
        "refs(unc).p" refs_unc.json

Splits: train, val, and testA, testB (unc) or test (google has none, umd has).
"""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data.coco_instances import CocoInstances
from data.segment_batch import Scene
from utils.run import UserError
from utils.segmentation_files import need, read_json

PICKLES = (".p", ".pkl", ".pickle")
EXPECTED = '[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent"}]}]'


def read_refs(path: Path | str) -> list[dict]:
    """The refs of a json twin. UserError for pickles, other content, an object or sentence without its fields."""
    if Path(path).suffix in PICKLES:
        raise UserError(
            f"{path}: is a pickle, and reading one runs the code in it; make its json twin as data/refcoco.py says"
        )
    fields = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
    refs = need(str(path), read_json("refs", path), fields, EXPECTED)
    for ref in refs:
        need(f"{path}: ref {ref['ref_id']}", ref["sentences"], {"sent_id": int, "sent": str}, EXPECTED)
    if not refs:
        raise UserError(f"{path}: holds no ref; expected {EXPECTED}")
    return refs


class RefCoco:
    """A source for SegmentItems (data/segment_batch.py): a picture with all its objects of `split` that have sentences.

    refs: the json twin; instances: COCO instances, None: instances.json beside it; images: see CocoInstances.
    UserError for a split that is not there, or a ref whose object or image the instances lack.
    """

    name, tasks = "refcoco", ("referring",)

    def __init__(self, refs: Path | str, split: str, instances=None, images=None):
        self.path, self.split = Path(refs), split
        listed = read_refs(refs)
        self.splits = Counter(ref["split"] for ref in listed)
        if split not in self.splits:
            raise UserError(f"{refs}: has no split '{split}'; expected one of {', '.join(self.splits)}")
        self.objects = CocoInstances(instances or self.path.with_name("instances.json"), images)
        self.classes, self.category_ids = self.objects.classes, self.objects.category_ids
        self.is_thing, found, self.sentences, self.dropped = self.objects.is_thing, defaultdict(list), 0, 0
        for ref in (r for r in listed if r["split"] == split):
            said = [(s["sent_id"], s["sent"].strip()) for s in ref["sentences"] if s["sent"].strip()]
            self.dropped += len(ref["sentences"]) - len(said)
            self.sentences += len(said)
            found[ref["image_id"]].append((ref["ref_id"], ref["ann_id"], said))
        self.refs, self.image_ids = dict(found), sorted(found)
        self.check()

    def check(self) -> None:
        """UserError for the first ref whose object is not among those of its image."""
        for i, refs in self.refs.items():
            known = {row[0] for row in self.objects.rows(i)}
            for number, annotation, _ in refs:
                if annotation not in known:
                    what = f"annotation {annotation} of image {i}, which ref {number} names"
                    raise UserError(f"{self.objects.path}: lacks {what}; pass the instances of these refs")

    def __len__(self) -> int:
        return len(self.image_ids)

    def summary(self) -> str:
        """One line: items, what they hold, dropped and why."""
        splits = ", ".join(f"{name} {n}" for name, n in self.splits.items())
        return (
            f"{self.path}: {self.split}, {len(self)} images, {sum(map(len, self.refs.values()))} objects, "
            f"{self.sentences} sentences (objects of all splits: {splits}); dropped: {self.dropped} empty sentences"
        )

    def scene(self, epoch: int, index: int) -> Scene:
        """The same in every epoch; ids are those of the refs."""
        image_id = self.image_ids[index]
        row = {r[0]: r for r in self.objects.rows(image_id)}
        numbers, annotations, said = zip(*self.refs[image_id], strict=True)
        masks = self.objects.masks(image_id, [row[a][3] for a in annotations])
        labels = np.array([row[a][1] for a in annotations], np.int64)
        none = np.zeros(len(labels), bool)
        image = self.objects.picture(image_id)
        return Scene(image_id, image, masks, np.array(numbers, np.int64), labels, none, text=list(said))
