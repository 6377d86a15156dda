"""Compare run folders in one table: seeds of the same setting are grouped, with mean, spread and n.  Runs no model.

    python eval/compare_runs.py runs/*                                   # markdown, ready for LOG.md
    python eval/compare_runs.py runs/gru_s* runs/mamba2_s* --key mAP.1 --key MAE --json runs/heads.json

A run folder holds run.json (from train/), metrics.jsonl and maybe eval.json or *.eval.json (from eval_* --json).
Runs are one group when all arguments but seed, out, log, resume and stop_at agree, and their eval files have one name
and one setting. A key that one of the eval files has (dots go down: mAP.1) is read from eval files alone; any other is
the last value in metrics.jsonl. So no column mixes evaluations with validations during training.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from utils import run
from utils.run import UserError

PER_RUN = {"seed", "out", "log", "resume", "stop_at"}  # arguments in which runs of one group may differ
PER_EVAL = {"pred", "json", "hist", "log", "out"}  # settings of an eval file in which they may differ
PEAK_KEYS = ["mAP.0", "mAP.1", "mAP.2", "mAP.4", "MAE", "f1"]  # the default where eval_peaks.py was used
NO_RESULT = {"step", "loss", "lr", "grad", "clips_per_s", "score"}  # keys of metrics.jsonl that describe the training
MISSING = object()  # a key that is not there, other than null


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders; what has no run.json is named and left out")
    p.add_argument(
        "--key",
        action="append",
        metavar="KEY",
        help="result to compare, may be repeated (default: mAP.0 .1 .2 .4, MAE, f1 of eval files; for runs without "
        "these all single numbers of their eval file; for runs without one the validation results of metrics.jsonl)",
    )
    p.add_argument("--json", default=None, help="also write the result to this file")
    return p.parse_args(argv)


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not json ({error}); remove it or write it anew") from error


def read_run(folder: Path) -> list[dict]:
    """One entry per eval file of the run, or one in all. main() fills in its `values`, the numbers to compare."""
    about = read_json(folder / "run.json")
    if not isinstance(about, dict) or not isinstance(about.get("args"), dict):
        raise UserError(f"{folder / 'run.json'}: has no 'args'; expected the file that a train script wrote")
    last: dict = {}
    if (folder / "metrics.jsonl").is_file():
        for number, line in enumerate((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(), 1):
            try:
                last |= json.loads(line)
            except ValueError as error:
                raise UserError(f"{folder / 'metrics.jsonl'}: line {number} is not json ({error})") from error
    base = {"run": str(folder), "args": about["args"], "commit": about.get("commit", "unknown"), "last": last}
    evals = sorted({*folder.glob("*.eval.json"), *folder.glob("eval.json")})
    entries = []
    for path in evals or [None]:
        content = read_json(path) if path else {}
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a json object of results, as eval_* --json writes it")
        setting = {k: v for k, v in content.pop("settings", {}).items() if k not in PER_EVAL}
        name = path.name if path else "none"
        entries.append({**base, "eval": name, "setting": setting, "numbers": content, "values": {}})
    return entries


def finite(value) -> float | None:
    """None for what is no finite number: missing, text, a list, or null (what an eval writes for not-a-number)."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def in_eval(entry: dict, key: str):
    """What the eval file has under `key`, null (None) included; MISSING where it does not have the key."""
    value = entry["numbers"]
    for part in key.split("."):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    return value


def column(entries: list[dict], key: str) -> list[float | None]:
    """One number per entry, from the eval files where one of them has the key, else from metrics.jsonl."""
    found = [in_eval(e, key) for e in entries]
    if all(value is MISSING for value in found):
        found = [e["last"].get(key) for e in entries]
    return [finite(value) for value in found]


def default_keys(entries: list[dict]) -> list[str]:
    """Per run: the peak results of its eval file, else that file's single numbers, else the run's last validation."""
    peaks = [k for k in PEAK_KEYS if any(finite(in_eval(e, k)) is not None for e in entries)]
    rest = []
    for e in entries:
        if all(finite(in_eval(e, k)) is None for k in peaks):
            single = [k for k in e["numbers"] if finite(in_eval(e, k)) is not None]
            rest += single or [k for k in e["last"] if k not in NO_RESULT]
    return [k for k in dict.fromkeys(peaks + rest) if any(x is not None for x in column(entries, k))]


def group_runs(entries: list[dict], keys: list[str]) -> list[dict]:
    """Groups in order of appearance: args, eval, runs, seeds, commits, {key: {mean, std, min, max, n, values}}."""
    groups: dict[str, list[dict]] = {}
    for e in entries:
        same = {k: v for k, v in e["args"].items() if k not in PER_RUN}
        groups.setdefault(json.dumps([same, e["eval"], e["setting"]], sort_keys=True), []).append(e)
    table = []
    for text, members in groups.items():
        results = {}
        for key in keys:
            values = [e["values"][key] for e in members if e["values"][key] is not None]
            results[key] = {"n": len(values), "values": values}
            if values:
                std = statistics.stdev(values) if len(values) > 1 else None
                results[key] |= {"mean": statistics.fmean(values), "std": std, "min": min(values), "max": max(values)}
        table.append(
            {
                "args": json.loads(text)[0],
                "eval": members[0]["eval"],
                "setting": members[0]["setting"],
                "runs": [e["run"] for e in members],
                "seeds": [e["args"].get("seed") for e in members],
                "commits": sorted({e["commit"] for e in members}),
                "results": results,
            }
        )
    return table


def differences(table: list[dict]) -> list[str]:
    """Per group, the arguments and eval settings in which the groups differ, as 'head=gru, dim=128'."""
    flat = [{**g["args"], **{f"eval {k}": v for k, v in g["setting"].items()}, "eval": g["eval"]} for g in table]
    names = [k for k in dict.fromkeys(k for f in flat for k in f) if len({json.dumps(f.get(k)) for f in flat}) > 1]
    return [", ".join(f"{k}={f[k]}" for k in names if k in f) or "all" for f in flat]


def cell(result: dict, n: int) -> str:
    """'0.812 ± 0.011 (0.800..0.823)'; the n is added where it is not the group's."""
    if not result["n"]:
        return "-"
    text = f"{result['mean']:.4g}"
    if result["n"] > 1:
        text += f" ± {result['std']:.2g} ({result['min']:.4g}..{result['max']:.4g})"
    return text if result["n"] == n else f"{text}, n={result['n']}"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # ---- read
    entries = []
    for folder in map(Path, args.runs):
        if (folder / "run.json").is_file():
            entries += read_run(folder)
        else:
            print(f"left out: {folder} (no run.json)")
    if not entries:
        raise UserError(f"{args.runs[0]}: no run folder among the {len(args.runs)} given; expected what train/ writes")
    keys = args.key or default_keys(entries)
    for key in keys:
        for e, value in zip(entries, column(entries, key), strict=True):
            e["values"][key] = value
        if all(e["values"][key] is None for e in entries):
            known = sorted({k for e in entries for k in [*e["numbers"], *e["last"]]})
            raise UserError(f"--key {key}: no run has this number; there are {', '.join(known) or 'none'}")
    if not keys:
        raise UserError(f"{args.runs[0]}: no results in the {len(entries)} runs; run eval_* --json RUN/eval.json first")

    # ---- table
    table = group_runs(entries, keys)
    print("| setting | n | seeds | " + " | ".join(keys) + " | commit |")
    print("|---" * (len(keys) + 4) + "|")
    for group, what in zip(table, differences(table), strict=True):
        n, seeds = len(group["runs"]), ", ".join(str(s) for s in group["seeds"])
        cells = [cell(group["results"][k], n) for k in keys]
        print(f"| {what} | {n} | {seeds} | " + " | ".join(cells) + f" | {', '.join(group['commits'])} |")
    print("\nmean ± sample standard deviation over seeds (smallest..largest)")
    if trained := [k for k in keys if all(in_eval(e, k) is MISSING for e in entries)]:
        print(f"last values, from metrics.jsonl: {', '.join(trained)}")
    for group in table:
        if len(set(group["seeds"])) < len(group["seeds"]):
            print(f"WARNING: a seed occurs twice in {group['runs']}: that is no spread over seeds")
        if len(group["commits"]) > 1:
            print(f"WARNING: runs of different commits in one row: {group['runs']}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        run.write_text_atomic(args.json, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run.cli(main))
