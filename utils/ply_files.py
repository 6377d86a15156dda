"""Clouds of coloured points as binary PLY files, which MeshLab, CloudCompare and Open3D open."""

from pathlib import Path

import numpy as np

from utils.run import writing


def write_ply(path: Path, xyz: np.ndarray, colour: np.ndarray, **more: np.ndarray) -> None:
    """Vertices (N, 3) m with colours (N, 3) 0..1, binary, no faces; more: whole numbers (N,) by the name of their
    property, as instance=ids. ValueError when lengths differ; OSError names the path."""
    lengths = {len(x) for x in (xyz, colour, *more.values())}
    if len(lengths) > 1:
        raise ValueError(f"vertices, colours, {', '.join(more) or 'nothing more'}: lengths {sorted(lengths)} differ")
    names = [*((k, "<f4") for k in "xyz"), *((k, "u1") for k in ("red", "green", "blue", "alpha"))]
    rows = np.zeros(len(xyz), names + [(k, "<i4") for k in more])
    for k, column in zip("xyz", np.asarray(xyz).T, strict=True):
        rows[k] = column
    for k, column in zip(("red", "green", "blue"), np.rint(255 * np.asarray(colour)).T, strict=True):
        rows[k] = column
    for k, column in more.items():
        rows[k] = column
    kinds = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    types = "".join(f"property {kinds[t]} {k}\n" for k, t in names + [(k, "<i4") for k in more])
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n{types}element face 0\n"
    head += "property list uchar int vertex_indices\nend_header\n"
    with writing(path):
        path.write_bytes(head.encode() + rows.tobytes())
