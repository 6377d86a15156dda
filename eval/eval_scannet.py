"""Score instances and classes of 3D scenes with ScanNet's rules.  Reads files, runs no model.

    python eval/eval_scannet.py --pred runs/scenes --labels datasets/scannet/gt --classes scannet200
    python eval/eval_scannet.py --pred runs/scenes --labels datasets/scannet/gt --classes scannet200 --agnostic

--labels holds <scene>.txt with class * 1000 + instance of every vertex. --pred holds <scene>.txt with a line 'mask.txt
class score' for each instance, best first, the masks as 0 or 1 a vertex, and may hold semantic/<scene>.txt, the class
of every vertex. Class ids are nyu40's (scannet) or ScanNet200's. A scene of the labels needs a prediction, an empty
file if there are no instances.

AP averages nine overlaps 0.50 ... 0.90; instances below 100 vertices do not count. mCov, mWCov, mPrec, mRec score
disjoint instances: a vertex goes to the best score that covers it. Classes without labelled instances are left out of
all means. --agnostic: all things are one class; wall, floor and what is unlabelled are void.
Beside the scores stands a control: the masks of another scene at the same share of its vertex list (shuffled).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils import scannet_metrics as sm
from utils.run import UserError
from utils.scannet_classes import CLASS_SETS, GROUPS_200, TRAIN_ONLY_200, things
from utils.scannet_coverage import coverage, disjoint, scene_coverage
from utils.scannet_files import SEMANTIC, ScenePrediction, read_instances, read_integers, read_semantic, scenes_of
from utils.segmentation_files import same_items

AGNOSTIC = {1: "object"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions (a folder with <scene>.txt, masks and semantic/)")
    p.add_argument("--labels", required=True, help="labels (a folder with <scene>.txt)")
    p.add_argument("--classes", default="scannet200", choices=sorted(CLASS_SETS), help="whose classes the ids are")
    p.add_argument("--agnostic", action="store_true", help="score all things as one class")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- one scene


class Scores:
    """Figures of scenes that come one by one: instances and classes."""

    def __init__(self, args: argparse.Namespace):
        self.agnostic, self.classes = args.agnostic, CLASS_SETS[args.classes]
        self.named = AGNOSTIC if args.agnostic else things(self.classes)
        self.overlaps, self.sums, self.counts = [], [], 0
        self.n = {"masks": 0, "of other classes": 0, f"below {sm.MIN_VERTICES} vertices": 0}

    def add(self, gt: np.ndarray, own: ScenePrediction) -> None:
        """Labels (N,) as in the file and the instances of the same scene."""
        ids, labels = list(self.named), own.labels
        if self.agnostic:
            gt, labels = sm.agnostic_labels(gt, list(things(self.classes))), np.ones(len(labels), np.int64)
        known, kinds = np.isin(labels, ids), gt // sm.PER_ID
        self.overlaps.append(sm.scene_overlaps(gt, own.masks, labels, own.scores, ids))
        pred_class, pred = disjoint(own.masks[known], labels[known], own.scores[known])
        places = sm.index_in(kinds, ids), np.where(np.isin(kinds, ids), gt, -1), sm.index_in(pred_class, ids), pred
        self.sums.append(scene_coverage(*places, len(ids)))
        kept = len(self.overlaps[-1].score)
        for name, k in zip(self.n, (len(labels), (~known).sum(), known.sum() - kept), strict=True):
            self.n[name] += int(k)

    def add_semantic(self, gt: np.ndarray, pred: np.ndarray) -> None:
        """Labels (N,) as in the file and the predicted class ids (N,)."""
        self.counts = self.counts + sm.confusion(gt // sm.PER_ID, pred, list(self.classes))

    def instances(self) -> dict:
        """AP and coverage, and AP of ScanNet200's groups."""
        ap = sm.instance_ap(self.overlaps, list(self.named))
        result = {n: ap[n] for n in ("AP", "AP50", "AP25")}
        for group, ids in GROUPS_200.items() if self.grouped() and not self.agnostic else ():
            result[f"AP {group}"] = sm.mean_of([ap["per_class"][i]["AP"] for i in ids if i in self.named])
        cover = coverage(self.sums)
        result |= {n: cover[n] for n in ("mCov", "mWCov", "mPrec", "mRec")}
        per_class = {
            name: ap["per_class"][i] | {n: float(cover["per_class"][n][k]) for n in cover["per_class"]}
            for k, (i, name) in enumerate(self.named.items())
        }
        return result | {"per_class": {n: row for n, row in per_class.items() if not np.isnan(row["AP"])}}

    def semantic(self) -> dict:
        """mIoU and mAcc over the classes that the validation scenes hold, and mIoU of ScanNet200's groups."""
        found = sm.semantic_iou(self.counts)
        iou, accuracy = (dict(zip(self.classes, found[n].tolist(), strict=True)) for n in ("iou", "accuracy"))
        left_out = TRAIN_ONLY_200 if self.grouped() else ()
        result = {
            name: sm.mean_of([x for i, x in row.items() if i not in left_out])
            for name, row in (("mIoU", iou), ("mAcc", accuracy))
        }
        for group, ids in GROUPS_200.items() if self.grouped() else ():
            result[f"mIoU {group}"] = sm.mean_of([iou[i] for i in ids if i not in left_out])
        return result | {"per_class": {self.classes[i]: x for i, x in iou.items() if not np.isnan(x)}}

    def grouped(self) -> bool:
        """ScanNet200 has head, common and tail."""
        return self.classes is CLASS_SETS["scannet200"]


def moved(own: ScenePrediction, vertices: int) -> ScenePrediction:
    """Masks of one scene on another with so many vertices: each vertex takes that at the same share of the list."""
    at = np.linspace(0, own.masks.shape[1] - 1, vertices).round().astype(int)
    return ScenePrediction(own.masks[:, at], own.labels, own.scores)


def score(args) -> tuple[Scores, Scores]:
    """All scenes, and the control where every scene has the masks of the one before it. UserError for bad files."""
    labels, pred = scenes_of("--labels", args.labels), scenes_of("--pred", args.pred)
    same_items(f"--pred {args.pred}", "scene", set(pred), set(labels))
    own, shuffled, semantic = Scores(args), Scores(args), Path(args.pred) / SEMANTIC
    first, last = None, None
    for name, file in labels.items():
        gt = read_integers(file)
        found = read_instances(pred[name], len(gt))
        own.add(gt, found)
        if semantic.is_dir():
            own.add_semantic(gt, read_semantic(semantic / f"{name}.txt", len(gt)))
        if last is not None:
            shuffled.add(gt, moved(last, len(gt)))
        first, last = gt if first is None else first, found
    if len(labels) > 1:
        shuffled.add(first, moved(last, len(first)))
    n = own.n
    if not any((s.gt_size >= sm.MIN_VERTICES).any() for s in own.overlaps):
        raise UserError(
            f"--labels {args.labels}: holds no instance of --classes {args.classes} with {sm.MIN_VERTICES} vertices; "
            "expected class * 1000 + instance, check --classes"
        )
    if n["masks"] and n["masks"] == n["of other classes"]:
        raise UserError(
            f"--pred {args.pred}: none of the {n['masks']} masks has a class of --classes {args.classes}; expected its "
            "ids, pass --agnostic if the network knows one class only"
        )
    return own, shuffled


def defined(x):
    """A result with None in place of nan, which json lacks."""
    if isinstance(x, dict):
        return {k: defined(v) for k, v in x.items()}
    return None if isinstance(x, float) and np.isnan(x) else x


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files, scores
    own, shuffled = score(args)
    scores = own.instances()
    control = shuffled.instances() if shuffled.overlaps else {}
    semantic = own.semantic() if not isinstance(own.counts, int) else {}
    result = {"n": len(own.overlaps), "scores": scores, "shuffled": control, "semantic": semantic}
    result |= {"predictions": own.n, "settings": vars(args)}

    # ---- result
    def cell(value: float | None) -> str:
        return f"{'n/a' if value is None or np.isnan(value) else f'{100 * value:.2f}':>10s}"

    print(f"{'n = ' + str(result['n']) + ' scenes':18s}{'score':>10s}{'shuffled':>10s}")
    for name in [n for n in scores if n != "per_class"]:
        print(f"{name:18s}{cell(scores[name])}{cell(control.get(name))}")
    for name in [n for n in semantic if n != "per_class"]:
        print(f"{name:18s}{cell(semantic[name])}{cell(None)}")
    if not semantic:
        print(f"no mIoU: --pred has no folder {SEMANTIC}/")
    if not args.agnostic:
        print(f"{'class':24s}{'AP':>10s}{'AP50':>10s}{'AP25':>10s}{'mCov':>10s}")
        for name, row in scores["per_class"].items():
            print(f"{name:24s}" + "".join(cell(row[k]) for k in ("AP", "AP50", "AP25", "mCov")))
    print(", ".join(f"{k} {name}" for name, k in own.n.items()) + "; AP takes masks in the order of their files")
    if scores["AP"] > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(defined(result), indent=1, allow_nan=False) + "\n")
    figures = ", ".join(f"{name} {100 * scores[name]:.2f}" for name in ("AP", "AP50", "AP25"))
    run.finish(r, args, "ESAM", f"{figures} (n={result['n']}, {'agnostic' if args.agnostic else args.classes})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
