"""Released RAP-SAM weights -> a checkpoint folder of FastSAM2 (compat): a renaming, or nothing.

python models/convert_rapsam.py rapsam_r50_12e.pth --classes panoptic_val2017.json --classifier coco.pth --out runs/rapsam
python eval/infer_segment.py photo.jpg --ckpt runs/rapsam/last --task panoptic --out runs/rapsam/pictures

WEIGHTS: a state dict, or a file whose "state_dict" is one. Names are ours, but for the head: panoptic_head. -> head.
Sizes, ResNet and number of stages are read from the shapes; heads are 8. --classes: a json list of {name, isthing}, or a
json with such a list as "categories", in the order of the classifier: of the released one, all things before all stuff.
--classifier: the text embeddings (K, V, E), a .safetensors or .pth with one tensor; the released weights do not hold
them. Without: random, so prompts work and classes mean nothing. Every tensor must fit one of ours and the other way
round, or it is refused with the list of what does not, and nothing is written.

A file with pickled objects beside the tensors is refused; where its program is installed, write the tensors alone:
torch.save(torch.load(path, weights_only=False)["state_dict"], new).
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.fastsam2 import BACKBONES, FastSAM2, FastSAM2Config
from utils import run
from utils.run import UserError
from utils.weights import compare, read_tensors

RENAMED = {"panoptic_head.": "head."}  # prefixes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("weights", metavar="WEIGHTS", help="released file, .pth or .safetensors")
    p.add_argument("--classes", required=True, help="json of the classes' names and whether they are things")
    p.add_argument("--classifier", default=None, help="file of the text embeddings (K, V, E) (default: random)")
    p.add_argument("--out", required=True, help="run folder; the checkpoint is OUT/last")
    return p.parse_args(argv)


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Released names -> ours. UserError if two would become one."""
    out = {}
    for name, value in state.items():
        ours = next((new + name.removeprefix(old) for old, new in RENAMED.items() if name.startswith(old)), name)
        if ours in out:
            raise UserError(f"two tensors would be {ours}; expected the weights of one model")
        out[ours] = value
    return out


def read_classes(path: str) -> tuple[list[str], list[bool]]:
    """Names and whether they are things."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = content["categories"] if isinstance(content, dict) else content
        names, things = [str(row["name"]) for row in rows], [bool(row["isthing"]) for row in rows]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError) as e:
        raise UserError(f"--classes {path}: expected a json list of name and isthing ({type(e).__name__}: {e})") from e
    if not names:
        raise UserError(f"--classes {path}: holds no class; expected one for each row of the classifier")
    return names, things


def read_classifier(path: str, K: int, E: int) -> torch.Tensor:
    """(K, V, E) float32."""
    tensors = list(read_tensors(path).values())
    if len(tensors) != 1 or tensors[0].ndim != 3 or tensors[0].shape[::2] != (K, E):
        raise UserError(
            f"--classifier {path}: holds {[tuple(t.shape) for t in tensors][:4]}, expected one tensor (K, V, E) with "
            f"K = {K} classes, as in --classes, and E = {E}, as in the weights"
        )
    return tensors[0].float()


def config_of(state: dict[str, torch.Tensor], names: list[str], things: list[bool], source: str) -> FastSAM2Config:
    """Sizes from shapes. UserError where those that tell are missing."""
    try:
        channels = state["neck.deconv.lateral_conv0.weight"].shape[1]
        N, D = state["head.kernels.weight"].shape
        hidden = state["head.mask_heads.0.ffn.layers.0.0.weight"].shape[0]
        E = state["head.panoptic_cls.0.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{source}: no weights of RAP-SAM ({e} is missing or malformed); give the released file") from e
    fits = [k for k, c in BACKBONES.items() if c[-1] == channels]
    if not fits:
        raise UserError(f"{source}: its backbone ends in {channels} channels; expected that of {', '.join(BACKBONES)}")
    deep = "backbone.layer1.2.conv1.weight" in state  # a third block: not ResNet-18
    kind = fits[-1] if deep else fits[0]
    stages = len({k.split(".")[2] for k in state if k.startswith("head.mask_heads.")})
    return FastSAM2Config(classes=names, is_thing=things, backbone=kind, queries=N, dim=D, hidden=hidden, embed_dim=E,
                          stages=stages, compat=True)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    state = renamed(read_tensors(args.weights))
    names, things = read_classes(args.classes)
    cfg = config_of(state, names, things, args.weights)
    model = FastSAM2(cfg).eval()
    if args.classifier:
        embeddings = read_classifier(args.classifier, len(names), cfg.embed_dim)
        model.set_vocabulary(names, embeddings, things, "clip")
    if "head.classifier" in state:
        raise UserError(
            f"{args.weights}: holds head.classifier already: a checkpoint of this repository, not converted"
        )
    problems = compare({**state, "head.classifier": model.head.classifier}, model)
    if problems:
        print("\n".join(problems))
        raise UserError(f"{args.weights}: {len(problems)} tensors do not fit, listed above; nothing is written")
    model.load_state_dict({**state, "head.classifier": model.head.classifier})
    folder = run.save_checkpoint(Path(args.out), 0, model, model.config_dict(), {})
    parts = Counter(name.split(".")[0] for name in state)
    print(f"{len(state)} tensors, each fits one of ours and the other way round: "
          + ", ".join(f"{n} {part}" for part, n in parts.items()))  # fmt: skip
    print(f"{cfg.backbone}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} classes, "
          f"{'text embeddings of ' + args.classifier if args.classifier else 'random class embeddings'} -> {folder}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.cli(main))
