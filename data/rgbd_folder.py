"""A folder of colour, depth, poses and intrinsics as a list of posed frames: whatever records rooms, one reader.

    7scenes    frame-000000.color.png  frame-000000.depth.png  frame-000000.pose.txt     camera-intrinsics.txt
    3rscan     frame-000000.color.jpg  frame-000000.depth.pgm  frame-000000.pose.txt     _info.txt
    folders    color/0.jpg  depth/0.png  pose/0.txt     intrinsic.txt or intrinsic/intrinsic_depth.txt: exports of
               ScanNet, ESAM's demo; colour may be rgb/ or image/, poses may be poses/
    scenenn    image/image00001.png  depth/depth00001.png  trajectory.log
    tum        rgb.txt  depth.txt  groundtruth.txt  and the pictures that they name

Intrinsics: a text of 3x3, 4x4 or the four numbers fx fy cx cy, px of the depth picture; scenenn and scans of ScanNet
without such a file have their data set's average. Colour of another size is looked up at the depth's pixels: by its own
intrinsics where the folder has them (3rscan; intrinsic/intrinsic_color.txt), else both must have one aspect. Depth is
16 bits, depth_scale units a metre (5000 for tum, else 1000); the values `invalid` were not measured. Poses are
camera-to-world; frames whose pose is not finite (lost tracking) are left out and counted.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.spatial.transform import Rotation

from data.coco_captions import open_image
from data.rgbd_frames import Frame, check_intrinsics, colour_at_depth, intrinsic_matrix
from utils.run import UserError

LAYOUTS = ("auto", "7scenes", "3rscan", "folders", "scenenn", "tum")
AVERAGE = {"scenenn": (544.47329, 544.47329, 320.0, 240.0), "scannet": (577.870605, 577.870605, 319.5, 239.5)}
MATCH = 0.02  # s between the colour, the depth and the pose of a frame, as the TUM tools have it
ASPECT = 0.02  # share by which the aspects of colour and depth may differ (1296 x 968 beside 640 x 480)
PICTURES = (".jpg", ".jpeg", ".png", ".pgm")
NEAR, FAR = 0.15, 30.0  # m between which the median depth of a room lies


@dataclass
class Entry:
    """Files of one frame; pose (4, 4) float64, NaN or inf where tracking was lost."""

    name: str
    colour: Path
    depth: Path
    pose: np.ndarray


@dataclass
class Found:
    """What a layout holds. intrinsics, colour_intrinsics: (3, 3) or None; source: where the intrinsics are from."""

    layout: str
    entries: list[Entry]
    intrinsics: np.ndarray | None = None
    colour_intrinsics: np.ndarray | None = None
    scale: float = 1000.0
    source: str = ""


# ---- texts


def read_text(path: Path) -> str:
    """UserError when it is missing or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise UserError(f"{path}: is missing; expected beside the other files of its frame") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: is no text ({e}); write it again") from e


def to_numbers(words: list[str], where: Path) -> np.ndarray:
    """(n,) float64. 'nan', 'inf' and '-1.#IND' are not finite."""
    try:
        return np.array([float(re.sub(r"-?\d+\.#\w+", "nan", w)) for w in words])
    except ValueError as e:
        raise UserError(f"{where}: holds something other than numbers ({e}); write it again") from e


def read_numbers(path: Path) -> np.ndarray:
    """The numbers of a text, (n,) float64."""
    return to_numbers(read_text(path).replace(",", " ").split(), path)


def read_pose(path: Path) -> np.ndarray:
    """(4, 4) float64. UserError unless it holds 16 numbers, and when finite, is a rotation and a shift."""
    values = read_numbers(path)
    if len(values) != 16:
        raise UserError(f"{path}: holds {len(values)} numbers; expected a 4x4 camera-to-world matrix")
    return checked_pose(values.reshape(4, 4), path)


def checked_pose(pose: np.ndarray, where: Path | str) -> np.ndarray:
    """The pose itself; UserError when it is finite and does not move a rigid body."""
    R = pose[:3, :3]
    if np.isfinite(pose).all() and (np.abs(R @ R.T - np.eye(3)).max() > 0.01 or np.linalg.det(R) < 0):
        raise UserError(
            f"{where}: is no rotation with a shift (determinant {np.linalg.det(R):.3f}); expected camera-to-world"
        )
    if np.isfinite(pose).all() and np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-3:
        raise UserError(f"{where}: its last row is {pose[3].tolist()}, expected 0 0 0 1; is the matrix transposed?")
    return pose


def read_intrinsics(path: Path) -> np.ndarray:
    """(3, 3) float64 of a 3x3, a 4x4 or fx fy cx cy."""
    values = read_numbers(path)
    if len(values) == 4:
        return intrinsic_matrix(*values)
    if len(values) not in (9, 16):
        raise UserError(f"{path}: holds {len(values)} numbers; expected a 3x3 or 4x4 matrix, or fx fy cx cy")
    side = int(len(values) ** 0.5)
    return values.reshape(side, side)[:3, :3]


def first_file(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def intrinsics_nearby(root: Path) -> tuple[np.ndarray | None, str]:
    """The intrinsics of the depth in root or the folder above, and the file that says so."""
    names = ("intrinsic.txt", "intrinsics.txt", "camera-intrinsics.txt", "intrinsic_depth.txt")
    names += ("intrinsic/intrinsic_depth.txt", "intrinsics/intrinsic_depth.txt")
    path = first_file(root, names) or first_file(root.parent, names[:3])
    return (None, "") if path is None else (read_intrinsics(path), path.name)


# ---- layouts


def number_of(path: Path) -> tuple[int, str]:
    """Sorts 2.png before 10.png."""
    digits = re.findall(r"\d+", path.name)
    return (int(digits[-1]) if digits else -1, path.name)


def check_colours(entries: list[Entry], poses: list[Path], ending: str, depths: Path | None = None) -> None:
    """UserError for a pose whose frame has a depth, but no colour. depths: their folder, None: beside the poses."""
    known = {e.name for e in entries}
    for path in poses:
        stem = path.name.removesuffix(ending)
        names = (f"{stem}.png", f"{stem}.pgm") if depths else (f"{stem}.depth.png", f"{stem}.depth.pgm")
        if known and stem not in known and first_file(depths or path.parent, names) is not None:
            raise UserError(f"{path}: its frame has a depth and no colour; expected both, or none of the three files")


def find_frames(root: Path) -> Found | None:
    """7scenes and 3rscan: frame-XXXXXX.color, .depth, .pose side by side."""
    colours = sorted(p for p in root.glob("*.color.*") if p.suffix.lower() in PICTURES)
    if not colours:
        return None
    entries = []
    for colour in colours:
        stem = colour.name[: colour.name.index(".color.")]
        depth = first_file(root, (f"{stem}.depth.png", f"{stem}.depth.pgm"))
        if depth is None:
            raise UserError(f"{colour}: its frame has no depth; expected {root / stem}.depth.png or .pgm")
        entries.append(Entry(stem, colour, depth, read_pose(root / f"{stem}.pose.txt")))
    check_colours(entries, sorted(root.glob("*.pose.txt")), ".pose.txt")
    info = first_file(root, ("_info.txt",))
    if info is None:
        K, source = intrinsics_nearby(root)
        return Found("7scenes", entries, K, source=source)
    fields = dict(re.findall(r"^(\w+)\s*=\s*(.+)$", read_text(info), re.M))
    matrices = []
    for key in ("m_calibrationDepthIntrinsic", "m_calibrationColorIntrinsic"):
        values = to_numbers(fields.get(key, "").split(), info)
        if len(values) != 16:
            raise UserError(f"{info}: {key} holds {len(values)} numbers; expected a 4x4 matrix")
        matrices.append(values.reshape(4, 4)[:3, :3])
    scale = to_numbers([fields.get("m_depthShift", "1000")], info)[0]
    return Found("3rscan", entries, *matrices, scale=float(scale), source=info.name)


def find_folders(root: Path) -> Found | None:
    """color/, depth/, pose/ with files of one stem."""
    folder = {k: next((root / n for n in names if (root / n).is_dir()), None)
              for k, names in {"colour": ("color", "rgb", "image"), "pose": ("pose", "poses")}.items()}  # fmt: skip
    if None in folder.values() or not (root / "depth").is_dir():
        return None
    entries = []
    for colour in sorted((p for p in folder["colour"].iterdir() if p.suffix.lower() in PICTURES), key=number_of):
        depth = first_file(root / "depth", (f"{colour.stem}.png", f"{colour.stem}.pgm"))
        if depth is None:
            raise UserError(f"{colour}: its frame has no depth; expected {root / 'depth' / colour.stem}.png")
        entries.append(Entry(colour.stem, colour, depth, read_pose(folder["pose"] / f"{colour.stem}.txt")))
    check_colours(entries, sorted(folder["pose"].glob("*.txt")), ".txt", root / "depth")
    K, source = intrinsics_nearby(root)
    own = first_file(root, ("intrinsic_color.txt", "intrinsic/intrinsic_color.txt"))
    if K is None and re.fullmatch(r"scene\d{4}_\d\d", root.name):
        K, source = intrinsic_matrix(*AVERAGE["scannet"]), "ScanNet's average"
    return Found("folders", entries, K, None if own is None else read_intrinsics(own), source=source)


def find_scenenn(root: Path) -> Found | None:
    """image/, depth/ and trajectory.log: blocks of three whole numbers and a 4x4, one block a frame."""
    log = root / "trajectory.log"
    if not log.is_file():
        return None
    values = read_numbers(log)
    if len(values) % 19:
        raise UserError(f"{log}: holds {len(values)} numbers; expected blocks of 3 + 16, one a frame")
    poses = values.reshape(-1, 19)[:, 3:].reshape(-1, 4, 4)
    kinds = []
    for kind in ("image", "depth"):
        files = sorted(root.glob(f"{kind}/*.png"), key=number_of)
        if len(files) < len(poses):
            raise UserError(
                f"{root / kind}: holds {len(files)} pictures, trajectory.log has {len(poses)} poses; unpack all"
            )
        kinds.append(files)
    rows = zip(*kinds, poses, strict=False)  # the last pictures may have no pose
    entries = [Entry(c.stem, c, d, checked_pose(p, f"{log}: pose {k}")) for k, (c, d, p) in enumerate(rows)]
    K, source = intrinsics_nearby(root)
    if K is None:
        K, source = intrinsic_matrix(*AVERAGE["scenenn"]), "SceneNN's average"
    return Found("scenenn", entries, K, source=source)


def tum_rows(path: Path, width: int) -> tuple[np.ndarray, list[list[str]]]:
    """Times (n,) s and the words after them of a text of the TUM layout."""
    if not path.is_file():
        raise UserError(f"{path}: is missing; a folder of the TUM layout has rgb.txt, depth.txt, groundtruth.txt")
    lines = [line.split() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")]
    if not lines or any(len(line) != width for line in lines):
        raise UserError(f"{path}: expected rows of {width} words, the time in s first")
    return to_numbers([line[0] for line in lines], path), [line[1:] for line in lines]


def find_tum(root: Path) -> Found | None:
    """rgb.txt, depth.txt, groundtruth.txt: rows of a time in s and a file, or tx ty tz qx qy qz qw."""
    if not (root / "rgb.txt").is_file():
        return None
    times, files = tum_rows(root / "rgb.txt", 2)
    depth_times, depths = tum_rows(root / "depth.txt", 2)
    pose_times, poses = tum_rows(root / "groundtruth.txt", 8)
    entries = []
    for t, (name,) in zip(times, files, strict=True):
        d, p = int(np.abs(depth_times - t).argmin()), int(np.abs(pose_times - t).argmin())
        if max(abs(depth_times[d] - t), abs(pose_times[p] - t)) > MATCH:
            continue  # the recorder dropped one of the three
        x, pose = to_numbers(poses[p], root / "groundtruth.txt"), np.full((4, 4), np.nan)
        if np.isfinite(x).all() and np.linalg.norm(x[3:]) > 0:
            pose = np.eye(4)
            pose[:3, :3], pose[:3, 3] = Rotation.from_quat(x[3:]).as_matrix(), x[:3]
        entries.append(Entry(Path(name).stem, root / name, root / depths[d][0], pose))
    if not entries:
        raise UserError(f"{root}: no row of rgb.txt has depth and pose within {MATCH} s; the times are of other clocks")
    K, source = intrinsics_nearby(root)
    return Found("tum", entries, K, scale=5000.0, source=source)


FINDERS = {
    "7scenes": find_frames,
    "3rscan": find_frames,
    "scenenn": find_scenenn,
    "folders": find_folders,
    "tum": find_tum,
}


def find(root: Path, layout: str) -> Found:
    """UserError when nothing of the layout is there."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of colour, depth, poses and intrinsics")
    for name in dict.fromkeys(FINDERS.values()) if layout == "auto" else [FINDERS[layout]]:
        found = name(root)
        if found is not None and found.entries:
            return found
    raise UserError(f"{root}: holds no posed frames; expected color/ depth/ pose/ intrinsic.txt, or frame-*.color.png "
                    "with .depth.png and .pose.txt, or the layout of TUM or SceneNN")  # fmt: skip


# ---- reading


def read_depth(path: Path) -> np.ndarray:
    """(H, W) uint16 as stored. UserError for anything but one channel of 16 bits."""
    try:
        with Image.open(path) as image:
            mode, raw = image.mode, np.asarray(image)
    except FileNotFoundError as e:
        raise UserError(f"{path}: is missing; the frame needs its depth") from e
    except (UnidentifiedImageError, OSError, SyntaxError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({e}); replace or remove it") from e
    if raw.ndim != 2 or not (mode.startswith("I;16") or mode == "I"):
        raise UserError(f"{path}: has mode {mode}; expected one channel of 16 bits, whole units of depth")
    return raw.astype(np.uint16)


class RgbdFolder:
    """Posed frames of a folder, `folder[k]` -> Frame; names: one a frame; left_out: frames without a finite pose.

    intrinsics: (fx, fy, cx, cy), in place of what the folder says. depth_scale: units a metre; None: the layout's.
    invalid: values of depth that were not measured. stride: every so many-th frame.

    UserError for a folder of no known layout, no intrinsics, a frame without depth or pose, no finite pose, a pose that
    is no rigid motion; when a frame is read, for a damaged picture, depth that is not 16 bits, intrinsics of another
    resolution, no measured pixel, a depth scale that makes no room.
    """

    def __init__(
        self, root: Path | str, layout: str = "auto", intrinsics: tuple[float, float, float, float] | None = None,
        depth_scale: float | None = None, invalid: tuple[int, ...] = (0, 65535), stride: int = 1,
    ):  # fmt: skip
        if layout not in LAYOUTS or stride < 1 or (depth_scale is not None and depth_scale <= 0):
            raise ValueError(f"RgbdFolder: layout {layout!r}, stride {stride}, depth_scale {depth_scale}; expected one "
                             f"of {LAYOUTS}, at least 1, above 0")  # fmt: skip
        self.root, self.invalid = Path(root), invalid
        found = find(self.root, layout)
        self.layout, self.colour_intrinsics, self.source = found.layout, found.colour_intrinsics, found.source
        self.intrinsics = found.intrinsics
        if intrinsics is not None:
            self.intrinsics, self.source = intrinsic_matrix(*intrinsics), "given"
        if self.intrinsics is None:
            raise UserError(f"{self.root}: has no intrinsics; write intrinsic.txt with fx fy cx cy of the depth, or "
                            "pass them (7-Scenes 585 585 320 240, TUM 525 525 319.5 239.5)")  # fmt: skip
        self.depth_scale = found.scale if depth_scale is None else float(depth_scale)
        entries = found.entries[::stride]
        self.entries = [e for e in entries if np.isfinite(e.pose).all()]
        self.left_out = [e.name for e in entries if not np.isfinite(e.pose).all()]
        if not self.entries:
            raise UserError(f"{self.root}: none of its {len(entries)} poses is finite; tracking failed, record again")
        self.names = [e.name for e in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, k: int) -> Frame:
        entry = self.entries[k]
        raw = read_depth(entry.depth)
        check_intrinsics(self.intrinsics, raw.shape, f"{self.root} ({self.source})")
        measured = ~np.isin(raw, self.invalid)
        if not measured.any():
            raise UserError(f"{entry.depth}: no pixel has a valid depth; leave the frame out")
        depth = np.where(measured, raw / np.float32(self.depth_scale), 0).astype(np.float32)
        middle = float(np.median(depth[measured]))
        if not NEAR <= middle <= FAR:
            raise UserError(f"{entry.depth}: its median depth is {middle:.3g} m with {self.depth_scale:g} units a "
                            f"metre; expected {NEAR}..{FAR} m, pass the right depth scale")  # fmt: skip
        colour = np.asarray(open_image(entry.colour))
        (h, w), (H, W) = colour.shape[:2], raw.shape
        if self.colour_intrinsics is None and abs(w * H / (h * W) - 1) > ASPECT:
            raise UserError(f"{entry.colour}: is of {w}x{h} px, its depth of {W}x{H}; they show different things, give "
                            "the colour's intrinsics in intrinsic/intrinsic_color.txt")  # fmt: skip
        own = None if colour.shape[:2] == raw.shape else self.colour_intrinsics
        colour = colour_at_depth(colour, raw.shape, self.intrinsics, own)
        return Frame(entry.name, colour, depth, entry.pose, self.intrinsics)

    def summary(self) -> str:
        """One line: layout, frames, camera, depth scale."""
        K = self.intrinsics
        return (
            f"{self.root}: layout {self.layout}, {len(self)} frames ({len(self.left_out)} without a finite pose left "
            f"out), fx {K[0, 0]:g} fy {K[1, 1]:g} cx {K[0, 2]:g} cy {K[1, 2]:g} ({self.source}), "
            f"{self.depth_scale:g} units a metre"
        )
