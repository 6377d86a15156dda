"""Released backbones of Mask3D, OneFormer3D or ESAM -> a checkpoint folder of Res16UNet: a renaming, or nothing.

python models/convert_mask3d.py mask3d_scannet200.pth --out runs/backbone
python models/convert_mask3d.py ESAM_sv_scannet200_CA.pth --out runs/backbone

WEIGHTS: a state dict, or a file whose "state_dict" or "model" is one. The backbone is what lies under the prefix of
conv0p1s1.kernel (backbone., model.backbone., bi_encoder.backbone3d. or none); sizes are read from the shapes. Every
tensor under that prefix must fit one of ours and the other way round, and be finite, or it is listed and nothing is
written (exit code 2); only Mask3D's last convolution (final.*), which the backbone goes without, is left out, as is
what lies outside the prefix: the converted network is the backbone alone, OUT/last.

A file with pickled objects beside the tensors is refused; where its program is installed, write the tensors alone:
torch.save(torch.load(path, weights_only=False)["state_dict"], new).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.res16unet import Res16UNet, Res16UNetConfig
from utils import run
from utils.run import UserError
from utils.weights import compare, read_tensors

FIRST, LEFT_OUT = "conv0p1s1.kernel", "final."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("weights", metavar="WEIGHTS", help="released file, .pth, .pt or .safetensors")
    p.add_argument("--out", required=True, help="run folder; the checkpoint is OUT/last")
    return p.parse_args(argv)


def backbone_of(state: dict[str, torch.Tensor], source: str) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """The backbone's tensors under our names, their prefix, and the names under it that are left out."""
    prefixes = sorted(k.removesuffix(FIRST) for k in state if k == FIRST or k.endswith(f".{FIRST}"))
    if len(prefixes) != 1:
        raise UserError(f"{source}: {len(prefixes)} tensors are called {FIRST}, expected one; "
                        "give the weights of one model with a Res16UNet backbone")  # fmt: skip
    mine = {k.removeprefix(prefixes[0]): v for k, v in state.items() if k.startswith(prefixes[0])}
    parts = {k.split(".")[0] for k in Res16UNet(Res16UNetConfig(stem=1, planes=(1,) * 8, layers=(1,) * 8)).state_dict()}
    inside = {k: v for k, v in mine.items() if prefixes[0] or k.split(".")[0] in parts or k.startswith(LEFT_OUT)}
    left_out = [k for k in inside if k.startswith(LEFT_OUT)]
    return {k: v for k, v in inside.items() if k not in left_out}, prefixes[0], left_out


def config_of(state: dict[str, torch.Tensor], source: str) -> Res16UNetConfig:
    """Sizes from shapes. UserError where those that tell are missing."""
    try:
        volume, in_channels, stem = state[FIRST].shape
        planes = [state[f"block{i}.0.conv1.kernel"].shape[-1] for i in range(1, 9)]
    except (KeyError, ValueError, IndexError) as e:
        raise UserError(f"{source}: no Res16UNet ({e} is missing or malformed); give the released file") from e
    layers = [len({k.split(".")[1] for k in state if k.startswith(f"block{i}.")}) for i in range(1, 9)]
    size = round(volume ** (1 / 3))
    try:
        return Res16UNetConfig(in_channels, stem, tuple(planes), tuple(layers), size)
    except ValueError as e:
        raise UserError(f"{source}: {e}; give the released file") from e


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    everything = read_tensors(args.weights)
    state, prefix, left_out = backbone_of(everything, args.weights)
    model = Res16UNet(config_of(state, args.weights)).eval()
    problems = compare(state, model)
    if problems:
        print("\n".join(problems))
        raise UserError(f"{args.weights}: {len(problems)} tensors do not fit, listed above; nothing is written")
    model.load_state_dict(state)
    folder = run.save_checkpoint(Path(args.out), 0, model, model.config_dict(), {})
    outside = len(everything) - len(state) - len(left_out)
    print(f"{len(state)} tensors under {prefix or 'no prefix'}, each fits one of ours and the other way round; "
          f"left out: {', '.join(left_out) or 'none'} and {outside} outside the backbone")  # fmt: skip
    print(f"Res16UNet {model.cfg.planes}, layers {model.cfg.layers}, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters -> {folder}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.cli(main))
