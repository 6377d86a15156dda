"""Weights of Sa2VA in a checkpoint folder: one safetensors file, or shards with an index; names are the module's own.

    config.json   model.safetensors | model-0000K-of-0000N.safetensors + model.safetensors.index.json
    preprocess.json   tokenizer/

Nothing is dropped, renamed or initialised anew: a tensor that is missing, unexpected, reshaped, twice there or not
finite is an error. Tensors are read shard by shard, so that no second copy of a large model is held.
"""

import errno
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils.run import UserError, commit, new_folder, writing
from utils.weights import read_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def shards_of(sizes: dict[str, int], largest: float) -> list[list[str]]:
    """Names in their order, cut into shards of at most `largest` bytes; a larger tensor is a shard of its own."""
    shards, room = [[]], largest
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = largest
        shards[-1].append(name)
        room -= size
    return shards


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """One safetensors file. OSError, as any writing, where safetensors would raise its own error on a full disk."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(errno.EIO, str(e), str(path)) from e


def write_weights(state: dict[str, torch.Tensor], folder: Path, shard_bytes: float) -> None:
    """model.safetensors, or shards and their index, into an existing folder."""
    sizes = {k: v.numel() * v.element_size() for k, v in state.items()}
    shards = shards_of(sizes, shard_bytes)
    n, places = len(shards), {}
    for k, names in enumerate(shards, 1):
        file = WEIGHTS if n == 1 else f"model-{k:05d}-of-{n:05d}.safetensors"
        save_tensors({name: state[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    if n > 1:
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_folder(
    folder: Path | str,
    state: dict[str, torch.Tensor],
    config: dict,
    save_more: Callable[[Path], None],
    shard_bytes: float = 5e9,
    replace: bool = False,
) -> None:
    """A complete checkpoint folder, all or nothing (`utils.run.new_folder`). save_more: writes what else belongs there,
    as the processor."""
    made_by = {"commit": commit(), "torch": str(torch.__version__), "command": shlex.join(sys.argv)}
    with new_folder(folder, replace) as tmp, writing(tmp):
        write_weights(state, tmp, shard_bytes)
        text = json.dumps({**config, "made_by": {**made_by, **config.get("made_by", {})}}, indent=1) + "\n"
        (tmp / "config.json").write_text(text, encoding="utf-8")
        save_more(tmp)


def weight_files(folder: Path | str) -> list[Path]:
    """The weight files of a checkpoint folder; every shard that its index names."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in dict.fromkeys(places.values())]
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{folder}/{INDEX}: not an index of shards ({type(e).__name__}); copy the folder anew") from e
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise UserError(f"{folder}: {', '.join(absent)} missing, which {INDEX} names; copy the complete folder")
    return files


def load_weights(model: torch.nn.Module, folder: Path | str) -> None:
    """Fill the model from a checkpoint folder; types become the model's. UserError, before anything is read, unless
    names and shapes are a bijection, and for values that are not finite."""
    want, found, problems = model.state_dict(), {}, []
    files = weight_files(folder)
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: not readable as weights ({type(e).__name__}); copy the file anew") from e
        problems += [f"{name} lies in two shards" for name in shapes if name in found]
        found |= shapes
    problems += [f"missing {k} {tuple(v.shape)}" for k, v in want.items() if k not in found]
    problems += [f"unexpected {k} {shape}" for k, shape in found.items() if k not in want]
    reshaped = [k for k in want if k in found and found[k] != tuple(want[k].shape)]
    problems += [f"{k} is {found[k]}, not {tuple(want[k].shape)}" for k in reshaped]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{folder}: does not fit its config.json: {'; '.join(problems[:4])}{more}; use weights of the "
                        "same configuration")  # fmt: skip
    with torch.no_grad():
        for file in files:
            for name, value in read_tensors(file).items():
                if value.is_floating_point() and not value.isfinite().all():
                    raise UserError(f"{file}: {name} is not finite; take another checkpoint")
                want[name].copy_(value)
