"""Predictions of vessels on disk: a 16-bit probability PNG per image, with a sidecar that says where it comes from.

FOLDER/NAME.png holds round(65535 p) of every pixel, FOLDER/NAME.png.meta.json its provenance (KEYS below). An image
that could not be predicted has the sidecar alone, with the reason under "failed"; nothing else stands in for it (Sa2VA
notes, section 11.3). FOLDER/NAME.overlay.png and folders below are pictures to look at, which the reader passes over.
"""

import io
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils.run import UserError, commit, write_text_atomic, writing

LEVELS = 65535  # the stored value of probability 1
META, OVERLAY = ".png.meta.json", ".overlay.png"
KINDS = ("vessel_unet", "sa2va")
KEYS = {  # what the writer of a prediction must say; a dict may hold more
    "checkpoint": "folder of the weights",
    "checkpoint_sha256": "hash of its model.safetensors, or of the index if sharded",
    "kind": "vessel_unet or sa2va",
    "config": "the model's configuration, a dict",
    "image": "path of the picture",
    "image_sha256": "hash of that file",
    "text": "the question, or null",
    "answer": "what the model said, or null",
    "grid": "[rows, columns] of the logits over the whole picture, before they are enlarged; null: one per pixel",
    "threshold": "chosen on training or validation images, from the checkpoint; null if there is none",
    "train_images": "[{name, sha256}] of all images seen in training; null if the checkpoint does not say",
}


@dataclass(frozen=True)
class Prediction:
    """One image of a folder of predictions.

    path: the PNG, None if failed. meta: the sidecar. failed: why there is no probability, or None.
    """

    name: str
    path: Path | None
    meta: dict
    failed: str | None

    @property
    def prob(self) -> np.ndarray | None:
        """Probabilities (H, W) float32 in 0..1, read from the file at every call; None if failed."""
        if self.path is None:
            return None
        try:
            with Image.open(self.path) as image:
                levels = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as e:
            raise UserError(f"{self.path}: not readable as a picture ({e}); predict this image again") from e
        return levels.astype(np.float32) / LEVELS


# ---- writing


def write_probability(folder: Path | str, name: str, prob: np.ndarray, meta: dict) -> Path:
    """Write folder/name.png and its sidecar, each under a temporary name that is then renamed; returns the PNG.

    prob: (H, W) float in 0..1. Its decision `prob > 0.5` survives the rounding exactly: exactly half is rounded down.
    meta: KEYS; name, height, width, command, commit and time_utc are added. ValueError for values that are no
    probabilities, a key that is missing, or a name that is no plain file name.
    """
    prob = np.asarray(prob)
    if prob.ndim != 2 or not prob.size or not np.issubdtype(prob.dtype, np.floating):
        raise ValueError(f"{name}: expected probabilities (H, W) as floating point, got {prob.shape} {prob.dtype}")
    if not (prob.min() >= 0 and prob.max() <= 1):  # also false for NaN
        raise ValueError(f"{name}: probabilities span {prob.min()}..{prob.max()}, expected 0..1")
    path, about = _describe(folder, name, meta)
    about |= {"height": prob.shape[0], "width": prob.shape[1]}
    about["grid"] = _check_grid(name, meta["grid"], prob.shape)
    levels = np.ceil(prob.astype(np.float64) * LEVELS - 0.5).clip(0, LEVELS).astype(np.uint16)
    Image.fromarray(levels).save(packed := io.BytesIO(), "png")
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            tmp.write_bytes(packed.getbuffer())
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    write_text_atomic(f"{path}.meta.json", json.dumps(about, indent=1, default=str) + "\n")
    return path


def write_failure(folder: Path | str, name: str, reason: str, meta: dict) -> None:
    """Write only the sidecar of an image that could not be predicted, and remove an older PNG of it. meta: KEYS."""
    path, about = _describe(folder, name, meta)
    if not reason:
        raise ValueError(f"{name}: a failure needs a reason")
    path.unlink(missing_ok=True)
    write_text_atomic(f"{path}.meta.json", json.dumps(about | {"failed": reason}, indent=1, default=str) + "\n")


def _describe(folder: Path | str, name: str, meta: dict) -> tuple[Path, dict]:
    """(folder/name.png, the sidecar's contents); makes the folder."""
    name = str(name)
    if not name or Path(name).name != name or name.startswith(".") or name.endswith(".overlay"):
        raise ValueError(f"{name!r}: expected a plain file name without folder, leading dot or the ending .overlay")
    absent = [key for key in KEYS if key not in meta]
    if absent or "failed" in meta:
        raise ValueError(f"{name}: the provenance lacks {', '.join(absent) or 'nothing, but already says failed'}")
    if meta["kind"] not in KINDS:
        raise ValueError(f"{name}: kind {meta['kind']!r}, expected {' or '.join(KINDS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"command": shlex.join(sys.argv), "commit": commit()}
    made["time_utc"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return folder / f"{name}.png", {**made, **meta, "name": name}


def _check_grid(name: str, grid, shape: tuple[int, int]) -> list[int]:
    """[rows, columns]; None is one logit per pixel, a whole number a square grid."""
    rows_columns = shape if grid is None else (grid, grid) if isinstance(grid, int) else tuple(grid)
    if len(rows_columns) != 2 or not all(int(n) == n and n >= 1 for n in rows_columns):
        raise ValueError(f"{name}: grid {grid!r}, expected [rows, columns], a whole number or None")
    return [int(n) for n in rows_columns]


# ---- reading


def read_predictions(folder: Path | str) -> dict[str, Prediction]:
    """{name: Prediction} of all images of a folder, by name. Reads headers; pixels come with `Prediction.prob`.

    UserError for a folder without predictions, a PNG without sidecar or of another depth or size than it says, a
    sidecar without its PNG (unless failed), or one that lacks a key or belongs to another file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that eval/infer_vessels.py wrote")
    sidecars = {p.name.removesuffix(META): p for p in sorted(folder.glob(f"*{META}"))}
    pictures = {p.stem: p for p in sorted(folder.glob("*.png")) if not p.name.endswith(OVERLAY)}
    for name in pictures:
        if name not in sidecars:
            raise UserError(f"{pictures[name]}: has no {name}{META} that says which model and picture it is from; "
                            "give what eval/infer_vessels.py wrote")  # fmt: skip
    if not sidecars:
        raise UserError(f"{folder}: holds no predictions (NAME.png with NAME{META}); run eval/infer_vessels.py first")
    return {name: _read_one(name, path, pictures.get(name)) for name, path in sidecars.items()}


def _read_one(name: str, sidecar: Path, picture: Path | None) -> Prediction:
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{sidecar}: not readable as JSON ({e}); predict this image again") from e
    wanted = ("name", *KEYS, "command", "commit", "time_utc")
    absent = [key for key in wanted if key not in meta] if isinstance(meta, dict) else list(wanted)
    if absent:
        raise UserError(f"{sidecar}: does not say {', '.join(absent)}; give what eval/infer_vessels.py wrote")
    if meta["name"] != name or meta["kind"] not in KINDS or not meta["checkpoint_sha256"] or not meta["image_sha256"]:
        raise UserError(f"{sidecar}: is about {meta['name']!r} ({meta['kind']!r}), expected {name!r} by "
                        f"{' or '.join(KINDS)}, with the hashes of weights and picture; predict it again")  # fmt: skip
    grid, chosen, seen = meta["grid"], meta["threshold"], meta["train_images"]
    for what, good in {
        "grid": grid is None or isinstance(grid, list) and len(grid) == 2 and all(isinstance(n, int) for n in grid),
        "threshold": chosen is None or isinstance(chosen, int | float) and 0 <= chosen <= 1,
        "train_images": seen is None or isinstance(seen, list) and all(isinstance(x, dict) for x in seen),
    }.items():
        if not good:
            raise UserError(f"{sidecar}: {what} is {str(meta[what])[:60]}, expected {KEYS[what]}; predict it again")
    failed = meta.get("failed")
    if (picture is None) != (failed is not None):
        found = "is called failed, yet its PNG is there" if failed else "has no PNG beside it"
        raise UserError(f"{sidecar}: {found}; predict this image again")
    if picture is not None:
        _check_picture(picture, meta)
    return Prediction(name, picture, meta, failed)


def _check_picture(path: Path, meta: dict) -> None:
    """UserError unless the PNG is grey with 16 bits and of the size in its sidecar."""
    try:
        with Image.open(path) as image:
            mode, size = image.mode, [image.height, image.width]
    except (OSError, UnidentifiedImageError) as e:
        raise UserError(f"{path}: not readable as a picture ({e}); predict this image again") from e
    if mode not in ("I;16", "I;16B", "I"):
        raise UserError(f"{path}: a PNG of mode {mode}, expected grey of 16 bits ({LEVELS} = probability 1)")
    said = [meta.get("height"), meta.get("width")]
    if size != said:
        raise UserError(f"{path}: {size[0]} x {size[1]} px (H x W), its sidecar says {said[0]} x {said[1]}; "
                        "predict this image again")  # fmt: skip


# ---- before scoring


def check_source(where: str, found: dict[str, Prediction], hashes: dict[str, str], allowed: bool) -> list[str]:
    """Names of the pictures that the model of these predictions was trained on.

    hashes: {name: SHA-256 of its file} of the labelled pictures. where: what error messages begin with. UserError for
    missing or extra predictions, those of another file or of several models, or of trained pictures unless `allowed`.
    """
    missing, extra = hashes.keys() - found.keys(), found.keys() - hashes.keys()
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(hashes)} pictures have no prediction, as {min(missing)}; "
                        "predict them, or choose another --split")  # fmt: skip
    if extra:
        raise UserError(f"{where}: {len(extra)} predictions are of no picture of this split, as {min(extra)}; leave "
                        "them out, or choose another --split")  # fmt: skip
    for name, p in found.items():
        if p.meta["image_sha256"] != hashes[name]:
            raise UserError(f"{where}: {name} was predicted from another file ({p.meta['image']}) than the labelled "
                            "picture; predict the labelled one")  # fmt: skip
    models = {(p.meta["checkpoint_sha256"], p.meta["kind"], p.meta["threshold"]) for p in found.values()}
    if len(models) > 1:
        which = ", ".join(sorted({p.meta["checkpoint"] for p in found.values()}))
        raise UserError(f"{where}: mixes predictions of {len(models)} models or thresholds ({which}); score each "
                        "folder by itself")  # fmt: skip
    seen = [x for p in found.values() for x in p.meta["train_images"] or ()]
    known = {x.get("sha256") or x.get("name") for x in seen}
    trained = sorted(name for name in found if {hashes[name], name} & known)
    if trained and not allowed:
        raise UserError(f"{where}: {len(trained)} of {len(found)} pictures were seen in training ({', '.join(trained)})"
                        "; score others, or say --train-images")  # fmt: skip
    return trained
