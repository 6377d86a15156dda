"""Weights and provenance: find a local snapshot, load strictly, compare names, hash files, write the sidecar.

Nothing is ever downloaded. A tensor that is missing, unexpected, reshaped or not finite is an error, never a warning.
"""

import fnmatch
import hashlib
import json
import os
import shlex
import struct
import sys
import time
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.run import UserError, commit, write_text_atomic

MALFORMED = (LookupError, AttributeError, TypeError, struct.error)  # what torch's unpickler raises on other files


def resolve_snapshot(folder: str | None, env: str, needs: tuple[str, ...] = ("config.json",)) -> Path:
    """A local model folder: the flag's value, else the environment variable `env`. UserError names the missing file.

    A hub's cache folder of one model (models--owner--name) leads to the snapshot that refs/main names, or to its only
    one. needs: file patterns, also "a or b + c"; links and the shards of an index must lead to files.
    """
    value = folder or os.environ.get(env)
    if not value:
        raise UserError(f"no model folder: give one on the command line or set {env}=/path/to/snapshot")
    path = Path(value).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a local snapshot holding {', '.join(needs)}")
    if (path / "snapshots").is_dir():
        path = newest_snapshot(path)
    names = sorted(p.name for p in path.iterdir())
    for need in needs:
        choices = [choice.split(" + ") for choice in need.split(" or ")]
        for name in [x for choice in choices for pattern in choice for x in fnmatch.filter(names, pattern)]:
            if not (path / name).exists():
                raise UserError(
                    f"{path / name}: a link to {os.readlink(path / name)}, which does not exist; copy the snapshot "
                    "again, following links (cp -rL)"
                )
        if not any(all(fnmatch.filter(names, pattern) for pattern in choice) for choice in choices):
            raise UserError(f"{path}: {need} is missing from this snapshot; copy the complete folder")
    for index in sorted(path.glob("*.safetensors.index.json")):
        check_shards(index)
    return path


def newest_snapshot(cache: Path) -> Path:
    """The snapshot of a hub's cache folder that refs/main names, or its only one."""
    found = sorted(p.name for p in (cache / "snapshots").iterdir() if p.is_dir())
    main = cache / "refs" / "main"
    name = main.read_text(encoding="utf-8").strip() if main.is_file() else found[0] if len(found) == 1 else None
    if name not in found:
        what = f"refs/main names {name}" if name else "there is no refs/main"
        raise UserError(
            f"{cache}: {what}, and snapshots/ holds {', '.join(found) or 'nothing'}; give the folder of one snapshot"
        )
    return cache / "snapshots" / name


def check_shards(index: Path) -> None:
    """UserError unless every file that a *.safetensors.index.json names lies beside it."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, *MALFORMED) as e:
        raise UserError(f"{index}: not readable as an index of weights ({type(e).__name__}); copy it again") from e
    for name in shards:
        if not (index.parent / name).exists():
            raise UserError(f"{index.parent}: {name}, which {index.name} names, is missing; copy the complete folder")


def read_tensors(path: Path | str) -> dict[str, torch.Tensor]:
    """State dict of a .safetensors, .pt or .pth file, on the CPU. Pickles with code in them are refused."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; give a local .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError, *MALFORMED) as e:
        raise UserError(f"{path}: not readable as weights ({type(e).__name__}); expected an intact file") from e
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no plain state dict; expected a mapping from names to tensors")
    return state


def compare(state: dict[str, torch.Tensor], model: torch.nn.Module) -> list[str]:
    """What keeps `state` from being a bijection onto the model's state dict, one line each; empty when it is one."""
    want, found = model.state_dict(), []
    found += [f"missing {k} {tuple(want[k].shape)}" for k in want if k not in state]
    found += [f"unexpected {k} {tuple(state[k].shape)}" for k in state if k not in want]
    both = [k for k in want if k in state]
    found += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(want[k].shape)}" for k in both if state[k].shape != want[k].shape
    ]
    found += [f"{k} is not finite" for k in both if state[k].is_floating_point() and not state[k].isfinite().all()]
    return found


def load_strict(model: torch.nn.Module, state: dict[str, torch.Tensor], source: Path | str) -> None:
    """Copy `state` into the model, or raise UserError and leave the model as it was."""
    problems = compare(state, model)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{source}: does not fit {type(model).__name__}: {'; '.join(problems[:4])}{more}; "
            "use weights of the same configuration"
        )
    model.load_state_dict(state, strict=True)


def file_sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_sidecar(path: Path | str, ckpt: Path | str, config: dict, inputs: list[Path | str], **more) -> None:
    """<path>.meta.json beside a prediction file: which weights, which configuration, which inputs, which command."""
    about = {
        "checkpoint": str(ckpt),
        "checkpoint_sha256": file_sha256(Path(ckpt) / "model.safetensors"),
        "config": config,
        "inputs": [{"path": str(p), "sha256": file_sha256(p)} for p in inputs],
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **more,
    }
    write_text_atomic(f"{path}.meta.json", json.dumps(about, indent=1, default=str) + "\n")
