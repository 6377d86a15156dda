"""The repository's layout and habits: who imports whom, what lies where, what every script and flag must have."""

import argparse
import ast
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from utils import run

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("smoke", "train", "eval", "models", "data", "utils", "tests")
MAY_IMPORT = {"utils": {"utils"}, "data": {"data", "utils"}, "models": {"models", "utils"}}  # the others: PACKAGES
PACKAGES = {"models", "data", "utils"}
SCRIPT_PREFIXES = ("convert_", "prepare_", "check_")  # scripts wherever they lie
PATH_LINE = (
    "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere"
)
TOP_LEVEL = {
    *FOLDERS, "README.md", "LOG.md", "LICENSE", "Makefile", "requirements.txt", "requirements-cuda.txt",
    "pyproject.toml", ".ci", ".gitignore", ".gitattributes", ".pre-commit-config.yaml",
}  # fmt: skip
BELONGS = {  # folder -> the modules that live there
    "models": """ssd mamba2 mamba2_fused temporal_heads temporal_shift tempopeak sgp sliding_windows sam3_tracker ball_motion clip
        clip_adapter fsgr m2_transformer caption_decoding
        caption_attention semantic_head prototype_memory caption_losses self_critical fsgr_from_clip panoptic_post segment_losses segment_scores segment_inference lite_dfpn sam_prompt_encoder prompt_fusion streaming_memory
        fastsam2 sparse_conv res16unet scene_memory tiny_sa bifusion esam instance_merge sa2va vessel_unet convert_sa2va
        matching mask_losses mlp fastsam2_options sam2_memory sam_mask_decoder
        sa2va_processor sa2va_video sa2va_losses sa2va_files sa2va_sizes sa2va_names sa2va_released sa2va_training
        sa2va_validation sa2va_lora sa2va_memory vessel_inference
        sam3_tiny sam3_memory sam3_losses ball_follow ball_tracking ball_candidates ball_offline
        sparse_maps convert_mask3d superpoint_pooling superpoint_decoder boxes3d esam_losses scene_segmenter scene_validation esam_training
        decoder_blocks segment_slots segment_stream segment_training video_inference""",
    "data": """video video_index peak_files peak_labels cutaways rally rally_play rally_pictures ball_labels rendered_ball coco_captions caption_vocab caption_files caption_checks coco_classes shape_captions segment_batch segment_checks peak_checks coco_panoptic
        coco_instances sa1b refcoco cityscapes davis ytvis vipseg moving_shapes task_mixture rgbd_folder scannet
        superpoints rooms vessels vessel_items vessel_questions vessel_checks referring_manifest
        video_clips video_checks pseudo_video segment_sources ball_checks footage rgbd_frames rgbd_checks rgbd_clips room_files scannet_samples esam_views esam_items clip_features scene_inputs scene_results check_dataset""",
    "utils": "run weights masks overlay plots ptb_tokenizer caption_metrics caption_metrics_other schedules training_guards panoptic_quality instance_ap segmentation_files segment_writing segment_inputs picture_files click_simulator crops field_of_view probability_files vessel_metrics vessel_controls ball_metrics ball_path ball_smoothing hits hota object_scores track_files track_inputs track_video video_inputs video_writing scannet_classes scannet_metrics scannet_coverage scannet_files posed_views output_folder scene_pictures ply_files partial_weights scene_geometry evaluation_rows",
    "train": "train",
    "eval": "compare_runs",
}
PREFIXES = {"smoke": ("smoke_", "bench_", "overfit_"), "train": ("train_",), "eval": ("infer_", "eval_")}
SHARED_FLAGS = {  # one name, one meaning, one help text
    "--device": "auto | cpu | cuda | cuda:N | mps",
    "--dtype": "autocast type; weights stay fp32",
    "--seed": "seeds weights, batch order and augmentation",
    "--batch-size": "items per process and step",
    "--workers": "loader processes; does not change the numbers",
    "--log": "reason for this run; appends the result row to LOG.md",
    "--ckpt": "checkpoint folder to run with",
    "--impl": "Mamba2 implementation: auto takes the CUDA kernels where they import, else torch",
    "--json": "also write the result to this file",
    "--resume": "checkpoint to continue bit for bit; auto: OUT/last if any",
    "--init": "checkpoint whose weights to start from, with a fresh optimizer",
    "--accum": "micro-batches per optimizer step",
    "--overfit": "train and evaluate on the first N items only (0: off)",
    "--stop-at": "stop and save here; the schedule still spans --steps",
}
SAME_VALUES = {"--device", "--dtype", "--seed", "--workers", "--log", "--impl", "--json", "--accum"}
WRONG_NAMES = {
    "--checkpoint", "--weights", "--output", "--out-dir", "--output-dir", "--bs", "--batch", "--num-workers", "--gpu",
    "--precision", "--amp", "--fp16", "--bf16", "--random-seed", "--load", "--prediction", "--predictions", "--gt",
}  # fmt: skip


def is_script(path: Path) -> bool:
    return path.parent.name in ("smoke", "train", "eval") or path.name.startswith(SCRIPT_PREFIXES)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def repository() -> list[Path]:
    """Files that are tracked, or would be by `git add .`; in an unpacked archive everything outside hidden folders."""
    git = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists():
        names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    left_out = {"runs", "datasets", "weights", "__pycache__", ".venv", ".pytest_cache", ".ruff_cache"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not left_out & set(p.relative_to(ROOT).parts)]


PYTHON = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))
SCRIPTS = [p for p in PYTHON if is_script(p)]
each_file = pytest.mark.parametrize("path", PYTHON, ids=name_of)
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=name_of)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> list[str]:
    """Dotted names of all imports, also those inside functions; `from a import b` gives a.b, which may be a module."""
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (path.parent.name if node.level else "", node.module or "")
            names += [".".join(filter(None, (*base, alias.name))) for alias in node.names]
    return names


# ---- imports


@each_file
def test_import_direction(path):
    folder = path.parent.name
    allowed = PACKAGES if is_script(path) or folder == "tests" else MAY_IMPORT[folder]
    scripts = {p.stem for p in SCRIPTS}
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in FOLDERS or top in allowed, f"{name_of(path)}: {folder}/ may not import {name}"
        ours = top in FOLDERS and rest and rest[0] in scripts
        assert not ours and top not in scripts, f"{name_of(path)}: imports the script {name}; scripts are not imported"


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parent.name == "models" and not is_script(p)], ids=name_of)
def test_models_know_no_arguments_and_no_process_group(path):
    bad = [n for n in imported(path) if n == "argparse" or n.startswith("torch.distributed")]
    assert not bad, f"{name_of(path)}: imports {bad}"
    used = [ast.unparse(n) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute)]
    assert "torch.distributed" not in used, f"{name_of(path)}: uses the process group"


@each_file
def test_no_star_import(path):
    assert not [n for n in imported(path) if n.endswith(".*")], f"{name_of(path)}: import * hides where names come from"


@each_file
def test_no_broad_except(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = any(k is None or ast.unparse(k) in ("Exception", "BaseException") for k in kinds)
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or again, f"{name_of(path)}:{node.lineno}: catches everything and goes on; name the error"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            kinds = {ast.unparse(a) for a in node.args}
            assert not kinds & {"Exception", "BaseException"}, f"{name_of(path)}:{node.lineno}: suppresses everything"


# ---- files and folders


def test_top_level():
    found = {p.relative_to(ROOT).parts[0] for p in repository()}
    assert found <= TOP_LEVEL, f"DESIGN section 1 has no place for {sorted(found - TOP_LEVEL)}"


@pytest.mark.parametrize("folder", sorted(PACKAGES))
def test_packages_are_flat_with_an_empty_init(folder):
    assert (ROOT / folder / "__init__.py").read_bytes() == b""
    below = {name_of(p.parent) for p in repository() if p.relative_to(ROOT).parts[0] == folder} - {folder}
    assert not below, f"folders below {folder}/: {sorted(below)}"
    vague = {"misc.py", "common.py", "helpers.py", "utils.py"} & {p.name for p in (ROOT / folder).glob("*.py")}
    assert not vague, f"{folder}/: {vague} says nothing about what is inside"


@each_file
def test_file_is_where_it_belongs(path):
    folder = path.parent.name
    for home, names in BELONGS.items():
        assert path.stem not in names.split() or folder == home, f"{name_of(path)} belongs in {home}/"
    for home, prefixes in PREFIXES.items():
        fits = path.name.startswith(prefixes) or path.stem in BELONGS.get(home, "").split()
        assert fits == (folder == home), f"{name_of(path)}: {home}/ holds {', '.join(prefixes)} files, and only it does"
    if folder == "tests":
        assert path.name.startswith("test_") or path.name == "conftest.py", f"{name_of(path)}: pytest will not find it"


@pytest.mark.parametrize("path", [p for p in repository() if p.suffix not in (".png", ".jpg", ".mp4")], ids=name_of)
def test_names_no_path_of_a_private_machine(path):
    own = re.compile(r"(?<![\w.~}-])/(work|farm|tmp|root)/" + "|" + "bash" + "_jobs")
    text = path.read_text(encoding="utf-8")
    found = [f"line {i}: {line.strip()}" for i, line in enumerate(text.splitlines(), 1) if own.search(line)]
    assert not found, f"{name_of(path)}: {found[:3]}"


def test_no_large_file():
    large = {name_of(p): p.stat().st_size for p in repository() if p.stat().st_size > 500_000}
    assert not large, f"over 500 kB: {large}"


@pytest.mark.parametrize("document", ["README.md", "LOG.md"])
def test_commands_in_documents_exist(document):
    if not (ROOT / document).exists():
        pytest.skip(f"{document} does not exist yet")
    text = (ROOT / document).read_text(encoding="utf-8")
    commands = re.findall(r"(?:\bpython3?|\btorchrun(?: --?[\w=-]+)*) ([\w./-]+\.py)\b", text)
    absent = sorted({c for c in commands if not (ROOT / c).is_file()})
    assert not absent, f"{document} names scripts that are not there: {absent}"
    assert commands or document == "LOG.md", f"{document} shows no command"


# ---- scripts


@functools.cache
def module_of(path: Path):
    """The script as a module, executed once."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Seen(BaseException):
    """Carries the parser out of a script that was about to use it."""


def parser_of(path: Path) -> argparse.ArgumentParser:
    def hand_over(self, *_):
        raise Seen(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", hand_over)
        with pytest.raises(Seen) as seen:
            module_of(path).parse_args([])
    return seen.value.args[0]


def flags_of(path: Path) -> dict[str, argparse.Action]:
    """{long flag: its action}; positional arguments under their name."""
    actions = [a for a in parser_of(path)._actions if not isinstance(a, argparse._HelpAction)]
    return {next((o for o in a.option_strings if o.startswith("--")), a.dest): a for a in actions}


@each_script
def test_anatomy_of_a_script(path):
    tree, lines = tree_of(path), path.read_text(encoding="utf-8").splitlines()
    assert ast.get_docstring(tree), f"{name_of(path)}: has no docstring, so --help says nothing"
    assert lines.count(PATH_LINE) == 1, f"{name_of(path)}: needs this line once:\n{PATH_LINE}"
    at = lines.index(PATH_LINE) + 1
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            top = (node.names[0].name if isinstance(node, ast.Import) else node.module).split(".")[0]
            assert (top in PACKAGES) == (node.lineno > at), (
                f"{name_of(path)}:{node.lineno}: {top}, wrong side of path line"
            )
    guard = "if __name__ == '__main__':\n    sys.exit(run.cli(main))"
    assert ast.unparse(tree.body[-1]) == guard, f"{name_of(path)}: must end with\n{guard}"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for name in ("parse_args", "main"):
        assert name in functions and [a.arg for a in functions[name].args.args] == ["argv"], (
            f"{name_of(path)}: {name}(argv)"
        )


@each_script
def test_parser(path):
    parser = parser_of(path)
    assert not parser.allow_abbrev, f"{name_of(path)}: allow_abbrev lets --step pass for --steps"
    assert parser.description == module_of(path).__doc__, f"{name_of(path)}: description is not the docstring"
    assert parser.formatter_class is argparse.RawDescriptionHelpFormatter
    for flag, action in flags_of(path).items():
        where = f"{name_of(path)}: {flag}"
        assert action.help and action.help != argparse.SUPPRESS, f"{where} has no help text"
        assert action.type is not bool, f"{where}: type=bool takes 'False' for True; use store_true"
        assert "_" not in flag or not flag.startswith("--"), f"{where}: words are joined by dashes"
        assert flag not in WRONG_NAMES, f"{where}: has another name in this repository (STYLE section 4)"


@each_script
def test_help_exits_with_0(path, capsys):
    assert run.cli(module_of(path).main, ["--help"]) == 0
    out = capsys.readouterr().out
    assert module_of(path).__doc__.strip().splitlines()[0] in out
    assert run.cli(module_of(path).main, ["--no-such-flag"]) == 2


def test_shared_flags_agree():
    first: dict[str, tuple] = {}
    for path in SCRIPTS:
        for flag, action in flags_of(path).items():
            if flag not in SHARED_FLAGS:
                continue
            where = f"{name_of(path)}: {flag}"
            assert action.help == SHARED_FLAGS[flag], f"{where} says {action.help!r}, elsewhere {SHARED_FLAGS[flag]!r}"
            if flag in SAME_VALUES:
                values = (action.default, action.choices, action.type, action.metavar)
                other, known = first.setdefault(flag, (name_of(path), values))
                assert values == known, f"{where} has {values}, in {other} {known} (default, choices, type, metavar)"
    assert {"--device", "--dtype", "--seed", "--log"} <= set(first), "the shared flags were not found at all"
