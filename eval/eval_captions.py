"""Score captions against references: BLEU-1..4, ROUGE-L, CIDEr-D, METEOR and SPICE.  Reads files, runs no model.

    python eval/eval_captions.py --pred runs/fsgr/val.json --labels datasets/coco/annotations/captions_val2017.json
    python eval/eval_captions.py --pred test.json --labels captions_val2014.json --images dataset_coco.json:test
    python eval/eval_captions.py --pred runs/mine/captions.json --labels datasets/flickr8k:val

Predictions are a COCO results json, [{"image_id", "caption"}]. Labels are COCO caption annotations, or ROOT:SPLIT: train,
val or test of a folder as in training (COCO, Flickr8k, csv: an image is its file's name without suffix), of which other
splits are not scored. Tokenising and scores are those of the coco-caption tool, in Python; its METEOR and SPICE are
Java programs and run only where `java` and the package pycocoevalcap are installed, otherwise they are n/a.

Beside the score stand two controls: one caption for every image, the commonest of the references, and the same
predictions given to other images. A caption with a bad ending stops at a word that another must follow: `a man on a`.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.caption_files import read_json, read_references
from utils import caption_metrics as cm
from utils import run
from utils.caption_metrics_other import JARS, commonest, describe, find_jar, meteor, shuffled, spice
from utils.ptb_tokenizer import tokenize
from utils.run import UserError

SHUFFLES = 3  # exchanges of the shuffled control


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--pred", required=True, help="predictions (COCO results json), as eval/infer_captions.py writes")
    p.add_argument("--labels", required=True, nargs="+", metavar="FILE", help="COCO caption json files, or ROOT:val")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument("--images", metavar="FILE[:NAME]", help="score these only: json [ids], {NAME: [ids]}, or Karpathy")
    p.add_argument("--java", default="auto", choices=["auto", "off"], help="METEOR and SPICE if there (default auto)")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def pairs_of(where: str, items, expected: str) -> list[tuple[str, str]]:
    """[(image id as text, caption)]. UserError unless `items` is a list of objects that hold both."""
    if not isinstance(items, list) or not items:
        raise UserError(f"{where}: holds no captions; expected {expected}")
    for k, x in enumerate(items):
        if not (isinstance(x, dict) and isinstance(x.get("image_id"), int | str) and isinstance(x.get("caption"), str)):
            raise UserError(f"{where}: item {k} lacks an image_id or a caption (text); expected {expected}")
    return [(str(x["image_id"]), x["caption"]) for x in items]


def read_labels(paths: list[str]) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """References by image, and {why they are not scored: images} of what the labels hold besides."""
    references, uncaptioned, others = {}, set(), set()
    for path in paths:
        root, _, split = (f"{path}:" if Path(path).is_dir() else path).rpartition(":")
        if root and Path(root).is_dir():
            own, *beside = read_references(root, split)
        else:
            own, content = {}, read_json(Path(path))
            content = content if isinstance(content, dict) else {}
            expected = 'COCO annotations, {"images": [{"id"}], "annotations": [{"image_id", "caption"}]}, or ROOT:SPLIT'
            for i, caption in pairs_of(f"--labels {path}", content.get("annotations"), expected):
                own.setdefault(i, []).append(caption)
            images = content.get("images", [])
            if not is_list(images, dict) or not is_list([x.get("id") for x in images], int | str):
                raise UserError(f"--labels {path}: its images are no list of objects with an id; expected {expected}")
            beside = {str(x["id"]) for x in images}, set()
        for i in own.keys() & references.keys():
            raise UserError(f"--labels {path}: image {i} stands in an earlier label file too; pass each image once")
        references |= own
        uncaptioned, others = uncaptioned | beside[0], others | beside[1]
    return references, {"listed in the labels without a caption": uncaptioned, "of another split": others - uncaptioned}


def is_list(items, kind) -> bool:
    return isinstance(items, list) and all(isinstance(x, kind) for x in items)


def read_images(value: str) -> set[str]:
    """Image ids of --images FILE[:NAME]: a json list, one of several named lists, or a split of Karpathy's json."""
    path, _, name = (value, "", "") if Path(value).is_file() else value.rpartition(":")
    named = read_json(Path(path or value))
    if isinstance(named, dict) and is_list(named.get("images"), dict):
        splits = [(str(x.get("split")), x.get("cocoid")) for x in named["images"]]
        named = {split: [i for s, i in splits if s == split and i is not None] for split, _ in splits}
    named = named if isinstance(named, dict) else {"": named}
    if not is_list(named.get(name), int | str) or not named[name]:
        names = ", ".join(f":{k}" for k, ids in named.items() if k and ids and is_list(ids, int | str))
        raise UserError(f"--images {value}: names no image; expected {names or 'a json list of ids, without :NAME'}")
    return {str(i) for i in named[name]}


def read_files(args) -> tuple[dict, dict, dict]:
    """References and predictions of the same images, and {what was dropped: how many}. UserError if they do not fit."""
    where, (references, beside) = f"--pred {args.pred}", read_labels(args.labels)
    content = Path(args.pred).read_bytes() if Path(args.pred).is_file() else None
    same = [path for path in args.labels if Path(path).is_file() and content == Path(path).read_bytes()]
    if same:
        raise UserError(f"{where}: is the label file {same[0]}; pass what eval/infer_captions.py wrote")
    items = pairs_of(where, read_json(Path(args.pred)), 'COCO results, [{"image_id", "caption"}]')
    pred, dropped = dict(items), {}
    if len(pred) < len(items):
        twice = Counter(i for i, _ in items).most_common(1)[0][0]
        raise UserError(f"{where}: image {twice} has several captions; expected one for each image")
    if args.images:
        chosen = read_images(args.images)
        for i in sorted(chosen - references.keys()):
            raise UserError(f"--images {args.images}: image {i} has no caption in --labels; add its label file")
        dropped["not in --images"] = len(pred.keys() - chosen)
        pred, references = ({i: x for i, x in y.items() if i in chosen} for y in (pred, references))
    unscored = pred.keys() - references.keys()
    dropped |= {why: len(unscored & ids) for why, ids in beside.items()}
    missing, extra = references.keys() - pred.keys(), unscored.difference(*beside.values())
    if missing:
        n = f"{len(missing)} of {len(references)} images"
        raise UserError(f"{where}: {n} lack a caption, as {min(missing)}; caption them, or choose images with --images")
    if extra:
        raise UserError(f"{where}: {len(extra)} images are not in the labels, as {min(extra)}; add their label file")
    pred = {i: pred[i] for i in references}
    if all(pred[i] in references[i] for i in pred) and any(c != tokenize(c) for c in pred.values()):
        raise UserError(f"{where}: every caption is a label, letter by letter; pass what eval/infer_captions.py wrote")
    return references, pred, dropped


# ---- scores


def score(references: dict, pred: dict, java: str) -> dict:
    """Every metric of the predictions and the controls; METEOR and SPICE are None where java is off or not there."""
    own, absent = cm.score_captions(references, pred), {}
    for name, run_jar in (("METEOR", meteor), ("SPICE", spice)):
        jar, why = find_jar(name) if java == "auto" else (None, "--java off")
        if jar:
            own["corpus"][name], own["per_image"][name] = run_jar(jar, references, pred)
        else:
            own["corpus"][name], absent[name] = None, why
    constant = commonest(references)
    wrong = [cm.score_captions(references, shuffled(pred, seed))["corpus"] for seed in range(SHUFFLES)]
    return {
        "n": len(pred),
        **own["corpus"],
        "constant": cm.score_captions(references, dict.fromkeys(pred, constant))["corpus"],
        "shuffled": {name: sum(w[name] for w in wrong) / SHUFFLES for name in cm.NAMES} if len(pred) > 1 else {},
        "constant caption": constant,
        "not available": absent,
        "predictions": describe(list(pred.values())),
        "references": describe([c for captions in references.values() for c in captions]),
        "per_image": own["per_image"],
    }


def show(result: dict) -> None:
    """The table on standard output; CIDEr is printed as the others are, not times 100."""
    print(f"{'n = ' + str(result['n']) + ' images':16s}{'score':>10s}{'constant':>10s}{'shuffled':>10s}")
    for name in (*cm.NAMES, *JARS):
        values = [column.get(name) for column in (result, result["constant"], result["shuffled"])]
        row = "".join(f"{'n/a':>10s}" if v is None else f"{v:10.4f}" for v in values)
        print(f"{name:16s}{row}   {result['not available'].get(name, '')}".rstrip())
    print(f"constant: every image '{result['constant caption']}'; shuffled: mean of {SHUFFLES} exchanges")
    for who in ("predictions", "references"):
        d = result[who]
        used = f"{d['distinct']} distinct, {d['vocabulary']} words used, mean length {d['mean length']:.2f} words"
        print(f"{who}: {used}, bad endings {100 * d['bad endings']:.2f} %, {d['empty']} empty")
    print("dropped: " + ", ".join(f"{n} ({what})" for what, n in result["dropped"].items()))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    r = run.start(argparse.Namespace(device="cpu", dtype="fp32", seed=0), argv)

    # ---- files
    references, pred, dropped = read_files(args)
    references = {i: [tokenize(c) for c in captions] for i, captions in references.items()}
    pred = {i: tokenize(c) for i, c in pred.items()}

    # ---- scores
    result = score(references, pred, args.java)
    result["dropped"], result["settings"] = dropped, vars(args)

    # ---- result
    show(result)
    if result["BLEU-4"] > 0.9999:
        print("WARNING: a perfect score; check that the predictions do not come from the labels before believing it")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")
    figures = ", ".join(f"{name} {100 * result[name]:.2f}" for name in ("CIDEr-D", "BLEU-4", "ROUGE-L"))
    run.finish(r, args, "FSGR", f"{figures} (n={result['n']})")


if __name__ == "__main__":
    sys.exit(run.cli(main))
