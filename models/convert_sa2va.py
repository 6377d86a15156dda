"""Released Sa2VA weights and xtuner's training files <-> a checkpoint folder of ours: every tensor, or nothing.

python models/convert_sa2va.py Sa2VA-InternVL3-8B --to lab --out weights/sa2va-8b
python models/convert_sa2va.py iter_12000.pth --base Sa2VA-InternVL3-8B --alpha 256 --to lab --out weights/vessels
python models/convert_sa2va.py iter_12000.pth --base InternVL3-8B --sam2 sam2_hiera_large.pt --alpha 256 --to lab \\
    --out weights/vessels
python models/convert_sa2va.py weights/vessels --to official --out exported
python models/convert_sa2va.py weights/vessels --fingerprint

SOURCE: a released folder (config.json, safetensors, tokenizer files), a checkpoint folder of ours, or a training file
iter_*.pth | .safetensors of mmengine / xtuner, which holds only what was trained: the rest comes from --base, and the
alpha of its LoRA, which is not in the file, from --alpha. Sizes are read from config.json, of SAM 2 they are those of
2.0 large unless --sam-config says otherwise. Types stay as they are; what LoRA is merged into keeps the type of --base.
Files are mapped, not read whole: beside them the conversion holds one shard and what a training file changes.

Every tensor must fit one of ours and the other way round, and be finite; else it is listed and nothing is written
(exit code 2). After a training file each group it trained must differ from the base. Fingerprints of two files are
equal when their weights are. A probe holds what a model answered (text logits; hidden states and mask logits of a
clip): write one with the model that is right, and hand it to every later conversion of the same weights.

A .pth with Python objects beside the tensors is refused; where you trust it, write the tensors alone:
torch.save({"state_dict": torch.load(path, weights_only=False)["state_dict"]}, new). The released layout's programs
(modeling_*.py) are not written by --to official: copy them from the released folder of the same line.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.initialization import no_init_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.sa2va import Sa2VA, Sa2VAConfig
from models.sa2va_files import weight_files, write_folder
from models.sa2va_names import (
    LINES,
    BijectionReport,
    fingerprints,
    fit,
    from_official,
    from_xtuner,
    group_of,
    to_official,
)
from models.sa2va_processor import END, NEW_TOKENS, Sa2VAProcessor
from models.sa2va_released import heads_of, line_of, released_config, released_preprocessing, released_sizes
from models.sa2va_sizes import sam_config
from utils import run
from utils.run import UserError, read_config
from utils.weights import read_tensors

SAM2 = "grounding_encoder.sam2_model."
ROWS = "mllm.model.language_model.embed_tokens.weight"
TOLERANCE = 2e-4  # of a probe's logits, float32


@dataclass
class Opened:
    """A source under our names: state, the line it comes from, what rebuilds the model, and what became of it."""

    state: dict[str, torch.Tensor]
    line: str
    cfg: Sa2VAConfig
    processor: Sa2VAProcessor
    report: BijectionReport
    config: dict = field(default_factory=dict)  # of config.json, once the model was built


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("source", metavar="SOURCE", help="released folder, checkpoint folder, or training file")
    p.add_argument("--to", choices=["lab", "official"], default=None, help="layout to write; needs --out")
    p.add_argument("--out", default=None, help="new folder to write")
    p.add_argument("--base", default=None, help="folder of the model that a training file began from")
    p.add_argument("--sam2", default=None, help="SAM 2's own weight file, where --base is a language model alone")
    p.add_argument("--alpha", type=float, default=None, help="lora_alpha of the training file's run")
    p.add_argument("--arch", choices=LINES, default=None, help="line of the released names (default: config.json's)")
    p.add_argument("--sam-config", default=None, help="json of a Sam2VideoConfig (default: SAM 2.0 large)")
    p.add_argument(
        "--waive", action="append", default=[], help="tensor to leave out, or a prefix with its dot; repeats"
    )
    p.add_argument("--fingerprint", action="store_true", help="print a hash for each group of tensors")
    p.add_argument("--probe", default=None, help="stored probe that the converted model must answer within 2e-4")
    p.add_argument("--write-probe", default=None, help="file for a probe of the converted model")
    return p.parse_args(argv)


# ---- sources


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, mapped from disk: memory is taken as they are used."""
    state = {}
    for file in weight_files(folder):
        tensors = read_tensors(file)
        twice = state.keys() & tensors.keys()
        if twice:
            raise UserError(f"{file}: {sorted(twice)[0]} lies in two shards; copy the folder anew")
        state |= tensors
    return state


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as json ({type(e).__name__}); give an intact file") from e


def processor_of(folder: Path, config: dict, line: str, sam_size: int, add: bool) -> Sa2VAProcessor:
    """Tokenizer and preprocessing of a released folder. add: append Sa2VA's tokens where they are not yet."""
    hint = "copy the complete folder"
    if line == "internlm2":
        hint = "InternLM2's needs its own program; convert it to a tokenizer.json once"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"{folder}: no tokenizer that transformers reads ({type(e).__name__}); {hint}") from e
    if add:
        tokenizer.add_tokens([t for t in NEW_TOKENS if t not in tokenizer.get_vocab()], special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = END
    eyes = read_json(folder / "preprocessor_config.json") if line.startswith("qwen") else {}
    return Sa2VAProcessor(released_preprocessing(config, line, sam_size, eyes), tokenizer)


def open_released(folder: Path, config: dict, args: argparse.Namespace) -> Opened:
    """A released folder; with --sam2 a language model alone, and SAM 2 from there."""
    line, sam = line_of(config, args.arch), read_json(Path(args.sam_config)) if args.sam_config else sam_config()
    state = read_folder(folder)
    if args.sam2:
        state |= {SAM2 + k: v for k, v in read_tensors(args.sam2).items()}
    try:
        processor = processor_of(folder, config, line, sam["image_size"], args.sam2 is not None)
        mllm = released_sizes(config, line, processor.image_id)
        heads = heads_of(config.get("llm_config", {}), line)
    except (KeyError, TypeError, AttributeError, StrictDataclassError) as e:
        raise UserError(f"{folder}/config.json: not of the {line} line ({type(e).__name__}: {e}); see --arch") from e
    ours, report = from_official(state, line, heads)
    cfg = Sa2VAConfig(line if line.startswith("qwen") else "internvl", mllm, sam, processor.seg_id)
    return Opened(ours, line, cfg, processor, report)


def open_folder(folder: Path, args: argparse.Namespace) -> Opened:
    """A folder of either layout. UserError for anything else."""
    if not (folder / "config.json").is_file():
        if any(folder.rglob("*mp_rank_*")) or (folder / "zero_to_fp32.py").is_file():
            raise UserError(
                f"{folder}: DeepSpeed's pieces; merge them with its zero_to_fp32.py and give the merged file"
            )
        raise UserError(f"{folder}: no folder with a config.json; expected a released or a checkpoint folder")
    config = read_config(folder)
    if config.get("class") != Sa2VA.__name__:
        return open_released(folder, config, args)
    if args.sam2:
        raise UserError(f"--sam2 {args.sam2}: {folder} holds SAM 2 already; leave the flag out")
    try:
        cfg = Sa2VAConfig(**config["model"])
        llama = cfg.mllm["text_config"]["model_type"] == "llama"
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder}/config.json: not a configuration of this version ({e}); convert again") from e
    state = read_folder(folder)
    line = cfg.arch if cfg.arch != "internvl" else "internlm2" if llama else "internvl"
    return Opened(state, line, cfg, Sa2VAProcessor.load(folder), BijectionReport(used=list(state)))


def open_training(path: Path, args: argparse.Namespace) -> tuple[Opened, dict[str, torch.Tensor]]:
    """A training file over its base -> what it makes, and the base's state."""
    if args.base is None:
        raise UserError(f"{path}: a training file holds only what was trained; give --base, the model it began from")
    try:
        trained = read_tensors(path)
    except UserError as e:
        if isinstance(e.__cause__, UnpicklingError):
            raise UserError(f"{path}: holds Python objects beside its tensors; write these alone, see --help") from e
        raise
    base = open_folder(Path(args.base), args)
    stop_at(base.report, args, args.base)
    heads = heads_of(base.cfg.mllm["text_config"], base.line)
    try:
        state, report = from_xtuner(trained, base.state, args.alpha, base.line, heads)
    except ValueError as e:
        raise UserError(f"{path}: {e} as --alpha") from e
    if args.sam2 and ROWS in state:
        base.cfg.mllm["text_config"]["vocab_size"] = rows = len(state[ROWS])
        if rows != len(base.processor.tokenizer):
            raise UserError(f"{path}: {rows} token embeddings, the tokenizer of {args.base} with Sa2VA's tokens has "
                            f"{len(base.processor.tokenizer)}; take the base that the training began from")  # fmt: skip
    return Opened(state, base.line, base.cfg, base.processor, report), base.state


# ---- checks


def is_waived(name: str, args: argparse.Namespace) -> bool:
    return any(name == w or w.endswith(".") and name.startswith(w) for w in args.waive)


def stop_at(report: BijectionReport, args: argparse.Namespace, source: str) -> None:
    """UserError, with every problem listed before, unless the report is clean but for --waive."""
    waived = [k for k in report.unused if is_waived(k.split(" ")[0], args)]
    report.unused = [k for k in report.unused if k not in waived]
    for name in waived:
        print(f"left out as --waive says: {name}")
    if report.problems():
        print("\n".join(report.problems()))
        raise UserError(f"{source}: {len(report.problems())} tensors do not fit, listed above; nothing is written")


def check_against_model(found: Opened, args: argparse.Namespace) -> None:
    """UserError unless the state is a bijection onto the model of its configuration."""
    try:
        with torch.device("meta"), no_init_weights():
            model = Sa2VA(found.cfg, found.processor)
    except ValueError as e:
        raise UserError(f"{args.source}: {e}") from e
    target, found.config = model.state_dict(), model.config_dict()
    fit(found.state, target, found.report)
    stop_at(found.report, args, args.source)
    found.state = {k: found.state[k] for k in target}  # without what was waived


def audit(base: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, tuple[int, int, float]]:
    """{group: (tensors that differ from the base, tensors, norm of the difference)}; a new shape: its own norm."""
    out = {}
    for name, value in ours.items():
        before = base.get(name)
        same = before is not None and before.shape == value.shape
        norm = (value.float() - before.float() if same else value.float()).norm().item()
        changed, total, square = out.get(group_of(name), (0, 0, 0.0))
        out[group_of(name)] = (changed + (not same or norm > 0), total + 1, square + norm**2)
    return {group: (changed, total, square**0.5) for group, (changed, total, square) in out.items()}


def check_trained(found: Opened, base: dict[str, torch.Tensor], trained: set[str], source: str) -> None:
    """Print the audit; UserError when a group that the file trained is still the base's."""
    table = audit(base, found.state)
    for group, (changed, total, norm) in table.items():
        print(f"{group:18s} {changed:5d} of {total:5d} tensors differ from the base, norm {norm:.4g}")
    still = sorted(g for g in trained if not table[g][0])
    if still:
        raise UserError(f"{source}: {', '.join(still)} equal the base after it; the file was not trained, or --base is "
                        "its result already; nothing is written")  # fmt: skip


def answers(found: Opened, ids: torch.Tensor, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a probe stores: text_logits (l, V) of ids (l,); of a clip (T, H, W, 3) and a question hidden (L, D), the
    last states at pictures and words, and mask_logits (1, T, h, w)."""
    with no_init_weights():
        model = Sa2VA(found.cfg, found.processor)
    model.load_state_dict(found.state)
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    with model.evaluating():
        text = model.mllm.lm_head(model.hidden(batch))[0]
        clip, question = list(frames.numpy()), "Please segment the object."
        item = model.processor.encode(model.looked_at(clip, "official"), question, sam_images=[])
        hidden = model.hidden(model.processor.collate([item]))[0]
        masks = model.predict(clip, question, force_seg=True, return_prob=False)["logits"]
    return {"text_logits": text, "hidden": hidden, "mask_logits": masks}


def check_probe(found: Opened, path: str) -> None:
    probe = read_tensors(path)
    wanted = {"ids", "frames", "text_logits", "hidden", "mask_logits"}
    if probe.keys() != wanted:
        raise UserError(
            f"--probe {path}: holds {sorted(probe)}, expected {sorted(wanted)}; write one with --write-probe"
        )
    for name, value in answers(found, probe["ids"], probe["frames"]).items():
        before = probe[name]
        off = (value - before).abs().max().item() if value.shape == before.shape else float("inf")
        print(f"probe: {name} differ by {off:.2g}")
        if not off < TOLERANCE:
            raise UserError(f"--probe {path}: {name} differ by {off:.2g}, expected < {TOLERANCE}; these are other "
                            "weights than the probe's, or two tensors are swapped; nothing is written")  # fmt: skip


def write_probe(found: Opened, path: str) -> None:
    """Random ids and a random clip, longer than the frames that masks start from, so that the memory answers too."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, found.processor.seg_id, (16,), generator=g)
    blobs = torch.rand(1, 3, found.processor.cfg.frames + 2, 6, 6, generator=g)
    frames = torch.nn.functional.interpolate(blobs, size=(blobs.shape[2], 96, 96), mode="trilinear")[0]
    frames = (frames.permute(1, 2, 3, 0) * 255).to(torch.uint8).contiguous()
    file = {"ids": ids, "frames": frames, **answers(found, ids, frames)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with run.writing(path):
        save_file({k: v.contiguous() for k, v in file.items()}, path)


# ---- the conversion


def write(found: Opened, args: argparse.Namespace) -> None:
    if args.to == "lab":
        write_folder(args.out, found.state, found.config, found.processor.save)
        return
    state = {k: v for k, v in found.state.items() if not is_waived(k, args)}
    for name in found.state.keys() - state.keys():
        print(f"left out as --waive says: {name}")
    try:
        official = to_official(state, found.line, heads_of(found.cfg.mllm["text_config"], found.line))
    except ValueError as e:
        raise UserError(f"--to official: {e}; nothing is written") from e
    config = released_config(found.cfg, found.line)
    write_folder(args.out, official, config, lambda folder: found.processor.tokenizer.save_pretrained(folder))


def check_args(args: argparse.Namespace) -> None:
    if (args.to is None) != (args.out is None):
        raise UserError(f"--to {args.to} --out {args.out}: give both, or none to look only")
    if args.out and Path(args.out).exists():
        raise UserError(f"--out {args.out}: exists already; choose a new folder")
    if Path(args.source).is_dir() and (args.base or args.alpha):
        raise UserError(f"{args.source}: a complete model; --base and --alpha belong to a training file")
    if args.sam2 and not args.base:
        raise UserError("--sam2: SAM 2's weights belong beside --base, the language model that the training began from")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    source, base = Path(args.source), None
    if source.is_dir():
        found = open_folder(source, args)
    else:
        found, base = open_training(source, args)
    trained = {group_of(k) for k, v in found.state.items() if base is not None and base.get(k) is not v}
    check_against_model(found, args)
    print(f"{args.source}: {found.line}, {found.report.counts()}")
    for change, n in Counter(line.split(": ")[-1] for line in found.report.casts).items():
        print(f"type changes: {n} tensors {change}")
    if base is not None:
        check_trained(found, base, trained, args.source)
    count = sum(v.numel() for k, v in found.state.items() if not k.endswith(".positional_embedding"))
    print(f"{len(found.state)} tensors, {count:,} parameters")
    if args.fingerprint:
        for group, digest in fingerprints(found.state).items():
            print(f"{digest}  {group}")
    if args.probe:
        check_probe(found, args.probe)
    if args.write_probe:
        write_probe(found, args.write_probe)
    if args.out:
        write(found, args)
        print(f"-> {args.out}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
