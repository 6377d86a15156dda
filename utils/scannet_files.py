"""ScanNet's benchmark files: instances and classes of a scene's vertices, read with errors of one sentence, written.

    LABELS/<scene>.txt                 one integer a vertex: class * 1000 + number of the instance, 0 none
    PRED/<scene>.txt                   one line a mask: pred_mask/<scene>_000.txt class score, the best score first
    PRED/pred_mask/<scene>_000.txt     0 or 1 a vertex, one a line
    PRED/semantic/<scene>.txt          the class of every vertex, one a line; may be absent

The listing order counts: a labelled instance takes the first mask that fits, so files are written by falling score.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.run import UserError, write_text_atomic

MASKS, SEMANTIC = "pred_mask", "semantic"


@dataclass
class ScenePrediction:
    """Instances in the order of the file: masks (P, N) bool, labels (P,) int64, scores (P,) float64."""

    masks: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


# ---- reading


def read_integers(path: Path | str) -> np.ndarray:
    """A text file of one integer a line -> (N,) int64. UserError when it is absent, empty or holds anything else."""
    try:
        text = Path(path).read_text(encoding="ascii")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); expected one integer a vertex, check the path") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: is not text; expected one integer a vertex") from e
    if not text.strip():
        raise UserError(f"{path}: is empty; expected one integer a vertex")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy's way of saying that it stopped half-way
            return np.fromstring(text, np.int64, sep=" ")
    except (DeprecationWarning, ValueError) as e:
        raise UserError(f"{path}: holds something that is no integer; expected one integer a vertex") from e


def scenes_of(flag: str, folder: Path | str) -> dict[str, Path]:
    """{scene: its text file} of a folder, sorted. UserError when there is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: is not a folder; expected one with a <scene>.txt for each scene")
    found = {p.stem: p for p in sorted(Path(folder).glob("*.txt"))}
    if not found:
        raise UserError(f"{flag} {folder}: holds no <scene>.txt; expected one for each scene")
    return found


def read_listing(path: Path) -> list[tuple[Path, int, float]]:
    """Mask file, class and score of every line, in order. UserError names the line that does not fit."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as text; expected lines 'mask.txt class score'") from e
    rows, root = [], path.parent.resolve()
    for k, line in enumerate(lines, 1):
        where, parts = f"{path} line {k}", line.split()
        if not parts:
            continue
        try:
            name, label, score = parts[0], float(parts[1]), float(parts[2])
        except (IndexError, ValueError) as e:
            raise UserError(f"{where}: is '{line[:60]}'; expected 'mask.txt class score' divided by spaces") from e
        mask = (root / name).resolve()
        if len(parts) != 3 or not label.is_integer() or not np.isfinite(score):
            raise UserError(f"{where}: is '{line[:60]}'; expected 'mask.txt class score' divided by spaces")
        if Path(name).is_absolute() or not mask.is_relative_to(root):
            raise UserError(f"{where}: {name} lies outside {path.parent}; name a file below it")
        if any(mask == other for other, _, _ in rows):
            raise UserError(f"{where}: {name} is listed twice; give every mask a file of its own")
        rows.append((mask, int(label), score))
    return rows


def read_instances(path: Path | str, vertices: int) -> ScenePrediction:
    """The instances of one scene with N = `vertices` vertices; an empty file is a scene without instances."""
    rows = read_listing(Path(path))
    masks = np.zeros((len(rows), vertices), bool)
    for k, (file, _, _) in enumerate(rows):
        values = read_integers(file)
        if len(values) != vertices:
            raise UserError(f"{file}: has {len(values)} lines, the labels of the scene {vertices}; write one a vertex")
        masks[k] = values != 0
    labels, scores = (np.array([r[i] for r in rows], dtype=t) for i, t in ((1, np.int64), (2, np.float64)))
    return ScenePrediction(masks, labels, scores)


def read_semantic(path: Path | str, vertices: int) -> np.ndarray:
    """Class of every vertex (N,) int64."""
    values = read_integers(path)
    if len(values) != vertices:
        raise UserError(f"{path}: has {len(values)} lines, the labels of the scene {vertices}; write one a vertex")
    return values


# ---- writing


def lines_of(values: np.ndarray) -> str:
    """One integer a line."""
    return "\n".join(map(str, np.asarray(values, np.int64).tolist())) + "\n"


def write_labels(path: Path | str, values: np.ndarray) -> None:
    """One integer a vertex, as LABELS and SEMANTIC have it; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, lines_of(values))


def write_instances(folder: Path | str, scene: str, prediction: ScenePrediction) -> Path:
    """Masks, then the listing by falling score; returns the listing. Masks of an older listing of the scene go.

    ValueError when the three lengths differ or a score is not finite.
    """
    masks, labels = np.asarray(prediction.masks, bool), np.asarray(prediction.labels, np.int64)
    scores = np.asarray(prediction.scores, np.float64)
    if masks.ndim != 2 or not len(masks) == len(labels) == len(scores) or not np.isfinite(scores).all():
        shapes = f"{masks.shape}, {labels.shape}, {scores.shape}"
        raise ValueError(f"masks, labels, scores {shapes}: expected (P, N), (P,), (P,) with finite scores")
    folder, rows = Path(folder), []
    for k, i in enumerate(np.argsort(-scores, kind="stable")):
        name = f"{MASKS}/{scene}_{k:03d}.txt"
        write_labels(folder / name, masks[i])
        rows.append(f"{name} {labels[i]} {float(scores[i])!r}\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / f"{scene}.txt", "".join(rows))
    for stale in (folder / MASKS).glob(f"{scene}_*.txt"):
        number = stale.stem.removeprefix(f"{scene}_")
        if number.isdigit() and int(number) >= len(rows):
            stale.unlink()
    return folder / f"{scene}.txt"
