"""Score captions against references: BLEU-1..4, ROUGE-L, CIDEr-D, METEOR and SPICE.  Reads files, runs no model.

    python eval/eval_captions.py --pred runs/fsgr/val.json --labels datasets/coco/annotations/captions_val2017.json
    python eval/eval_captions.py --pred test.json --labels captions_val2014.json --images dataset_coco.json:test

Predictions are a COCO results json, [{"image_id", "caption"}]; labels are COCO caption annotations. Tokenising and all
scores are those of the coco-caption tool, in Python; its METEOR and SPICE are Java programs and run only where `java`
and the package pycocoevalcap are installed, otherwise they are n/a.

Beside the score stand two controls: one caption for every image, the commonest of the references, and the same
predictions given to other images. A caption with a bad ending stops at a word that another must follow: `a man on a`.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
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
    p.add_argument("--labels", required=True, nargs="+", help="caption annotations, one or more COCO json files")
    p.add_argument("--json", default=None, help="also write the result to this file")
    p.add_argument(
        "--images", default=None, metavar="FILE[:NAME]", help="score these only: json [ids], {NAME: [ids]}, or Karpathy"
    )
    p.add_argument("--java", default="auto", choices=["auto", "off"], help="METEOR and SPICE if there (default auto)")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


# ---- files


def read_json(flag: str, path: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{flag} {path}: cannot be read ({e.strerror}); check the path") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{flag} {path}: is not json ({e})") from e


def pairs_of(where: str, items, expected: str) -> list[tuple[str, str]]:
    """[(image id as text, caption)]. UserError unless `items` is a list of objects that hold both."""
    if not isinstance(items, list) or not items:
        raise UserError(f"{where}: holds no captions; expected {expected}")
    for k, x in enumerate(items):
        if not (isinstance(x, dict) and isinstance(x.get("image_id"), int | str) and isinstance(x.get("caption"), str)):
            raise UserError(f"{where}: item {k} lacks an image_id or a caption (text); expected {expected}")
    return [(str(x["image_id"]), x["caption"]) for x in items]


def read_labels(paths: list[str]) -> tuple[dict[str, list[str]], set[str]]:
    """References by image, and the images that the files list without a caption."""
    references, listed = {}, set()
    for path in paths:
        content, own = read_json("--labels", path), {}
        content = content if isinstance(content, dict) else {}
        expected = 'COCO annotations, {"annotations": [{"image_id", "caption"}]}'
        for i, caption in pairs_of(f"--labels {path}", content.get("annotations"), expected):
            own.setdefault(i, []).append(caption)
        for i in own.keys() & references.keys():
            raise UserError(f"--labels {path}: image {i} stands in an earlier label file too; pass each image once")
        references |= own
        listed |= {str(x["id"]) for x in content.get("images", [])}
    return references, listed - references.keys()


def read_images(value: str) -> set[str]:
    """Image ids of --images FILE[:NAME]: a json list, one of several named lists, or a split of Karpathy's json."""
    path, _, name = (value, "", "") if Path(value).is_file() else value.rpartition(":")
    content = read_json("--images", path or value)
    if isinstance(content, dict) and "images" in content:
        splits = [(str(x.get("split")), x.get("cocoid")) for x in content["images"]]
        content = {split: [i for s, i in splits if s == split and i is not None] for split, _ in splits}
    named = content if isinstance(content, dict) else {"": content}
    if not named.get(name):
        names = ", ".join(f":{k}" for k in named if k and named[k])
        raise UserError(f"--images {value}: names no image; expected {names or 'a json list of ids, without :NAME'}")
    return {str(i) for i in named[name]}


def read_files(args) -> tuple[dict, dict, dict]:
    """References and predictions of the same images, and {what was dropped: how many}. UserError if they do not fit."""
    references, uncaptioned = read_labels(args.labels)
    where = f"--pred {args.pred}"
    content = Path(args.pred).read_bytes() if Path(args.pred).is_file() else None
    for path in args.labels:
        if content == Path(path).read_bytes():
            raise UserError(f"{where}: is the label file {path}; pass what eval/infer_captions.py wrote")
    items = pairs_of(where, read_json("--pred", args.pred), 'COCO results, [{"image_id", "caption"}]')
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
    dropped["listed in the labels without a caption"] = len(pred.keys() & uncaptioned)
    missing, extra = references.keys() - pred.keys(), pred.keys() - references.keys() - uncaptioned
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
        print(
            f"{who}: {d['distinct']} distinct, {d['vocabulary']} words used, mean length {d['mean length']:.2f} words,",
            end=" ",
        )
        print(f"bad endings {100 * d['bad endings']:.2f} %, {d['empty']} empty")
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
