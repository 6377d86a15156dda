"""Precomputed features of CLIP's patch convolution: one file a picture, {pix, global, meta}.

    pix     half (192, h, w): a cell of 8 px each, the picture padded at the right and below to multiples of 16
    global  half (768,): mean over the patches
    meta    weights (fingerprint of the patch weights and the normalisation), size (H, W) of the picture

data/prepare_clip_features.py writes them, models/bifusion.py says what they are. Of 640 x 480 px a file has 1.85 MB.
"""

import io
import os
from pathlib import Path
from pickle import UnpicklingError

import torch

from data.scannet_samples import feature_path
from utils.run import UserError, writing
from utils.weights import MALFORMED

CHANNELS, WIDTH, PATCH = 192, 768, 16
AGAIN = "delete it and run data/prepare_clip_features.py again"


def cells(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) px -> (h, w) of the map."""
    return -(-size[0] // PATCH) * 2, -(-size[1] // PATCH) * 2


def index_features(rows: list[dict]) -> dict[str, str]:
    """{picture: its feature file} of the rows of an index, each once: as the index names it, else by the rule. Paths are
    relative to the raw export."""
    found = {}
    for row in rows:
        images = [row["img_path"]] if "img_path" in row else row["img_paths"]
        named = [row.get("clip_feat_path")] if "img_path" in row else row.get("clip_feat_paths", [None] * len(images))
        found |= {image: name or feature_path(image) for image, name in zip(images, named, strict=True)}
    return found


def write_features(path: Path, pix: torch.Tensor, whole: torch.Tensor, weights: str, size: tuple[int, int]) -> None:
    """pix (192, h, w), whole (768,), of a picture of `size` (H, W). Under a temporary name, then renamed."""
    pix, whole = pix.to("cpu", torch.half).clone(), whole.to("cpu", torch.half).clone()  # no views of a larger storage
    if pix.shape != (CHANNELS, *cells(size)) or whole.shape != (WIDTH,):
        raise ValueError(f"features {tuple(pix.shape)} and {tuple(whole.shape)} of a picture of {size} px")
    if not (pix.isfinite().all() and whole.isfinite().all()):
        raise ValueError(f"features for {path} are not finite in half precision")
    packed, tmp = io.BytesIO(), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save({"pix": pix, "global": whole, "meta": {"weights": weights, "size": list(size)}}, packed)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path):
            tmp.write_bytes(packed.getvalue())
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def load(path: Path | str, mmap: bool) -> dict:
    """The file, its entries checked. mmap: tensors are read when they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        pix, whole, meta = content["pix"], content["global"], content["meta"]
        size = tuple(int(x) for x in meta["size"])
        fits = pix.shape == (CHANNELS, *cells(size)) and whole.shape == (WIDTH,) and isinstance(meta["weights"], str)
        if not fits or pix.dtype != torch.half:
            raise ValueError(f"pix {tuple(pix.shape)} {pix.dtype} of a picture of {size} px")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such feature file; run data/prepare_clip_features.py") from e
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, *MALFORMED) as e:
        raise UserError(f"{path}: is damaged or no feature file ({type(e).__name__}); {AGAIN}") from e
    return content


def check_meta(path: Path | str, meta: dict, expected: str | None, size: tuple[int, int] | None) -> None:
    """UserError where the features are of other weights, or of a picture of another size."""
    if expected is not None and meta["weights"] != expected:
        raise UserError(
            f"{path}: was made with other CLIP weights or normalisation ({meta['weights'][:12]}, not {expected[:12]}); "
            "use those weights, or write features of these into another folder"
        )
    if size is not None and tuple(meta["size"]) != tuple(size):
        H, W = meta["size"]
        raise UserError(f"{path}: is of a picture of {W}x{H} px, the frame has {size[1]}x{size[0]}; {AGAIN}")


def check_features(path: Path | str, expected: str | None = None, size: tuple[int, int] | None = None) -> None:
    """As `read_features`, without reading the numbers."""
    check_meta(path, load(path, mmap=True)["meta"], expected, size)


def read_features(path: Path | str, expected: str | None = None, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The map, half (192, h, w). expected: fingerprint that the model has; size (H, W): of the frame; None: any.
    UserError when it is missing, damaged or of other weights or another size."""
    content = load(path, mmap=False)
    check_meta(path, content["meta"], expected, size)
    return content["pix"]
