"""Posed RGB-D data as printed lines and refusals, and a sheet: does depth fit the poses, what do labels say.

FORMAT rgbd: a folder of posed frames (data/rgbd_folder.py). FORMAT rooms: rendered, no ROOT. FORMAT scannet: an index
of data/prepare_scannet.py. args: those of data/check_dataset.py: format, root, intrinsics, depth_scale, limit, seed,
batch_size, columns, show. The picture has a row per frame or item: colour, depth, labels or superpoints.
"""

from dataclasses import replace

import numpy as np

from data.rgbd_clips import PreparedClips
from data.rgbd_folder import RgbdFolder
from data.rgbd_frames import (
    NONE,
    Frame,
    FramePoints,
    frame_points,
    lift,
    project,
    reprojection_error,
    superpoint_map,
    thing_instances,
)
from data.rooms import CLASSES, Room
from data.superpoints import oracle, oracle_summary
from utils import overlay
from utils.run import UserError

RGBD_FORMATS = ("rgbd", "rooms", "scannet")
WITHIN = 0.5  # px by which the projection of a point may miss its source pixel

# ---- do depth and poses fit each other?

UNKNOWN = 0.95  # share of unlabelled points above which labels do not belong to the frames
CHANGES = {  # what is often wrong, and the depth and pose that would then be right
    "the poses are world-to-camera, invert them": lambda f, T: (f, np.linalg.inv(T)),
    "the poses have the camera's y up and z backwards (OpenGL), negate columns 2 and 3": lambda f, T: (
        f,
        T * (1, -1, -1, 1),
    ),
    "the depth scale is 5 times too low": lambda f, T: (f / 5, T),
    "the depth scale is 5 times too high": lambda f, T: (f * 5, T),
    "the depth scale is 2 times too low": lambda f, T: (f / 2, T),
    "the depth scale is 2 times too high": lambda f, T: (f * 2, T),
    "the poses' shifts are in millimetres, divide them by 1000": lambda f, T: (
        f,
        np.c_[T[:, :3], T[:, 3] / (1e3, 1e3, 1e3, 1)],
    ),
}


def agreement(a: Frame, b: Frame, change=lambda f, T: (f, T), every: int = 8, tolerance: float = 0.04) -> float:
    """Share of a's pixels that fall into b where b's depth is the same (within `tolerance` of it). 0..1

    change: (factor 1.0, pose) -> the factor of the depths and the pose to try.
    """
    (factor, pose_a), (_, pose_b) = change(1.0, a.pose), change(1.0, b.pose)
    thin = np.zeros_like(a.depth)
    thin[::every, ::every] = a.depth[::every, ::every] * np.float32(factor)
    points, _ = lift(thin, a.intrinsics, pose_a)
    uv, z = project(points, b.intrinsics, pose_b)
    u, v = np.rint(np.nan_to_num(uv, nan=-1, posinf=-1, neginf=-1).clip(-1, 1e6)).astype(int).T
    H, W = b.depth.shape
    inside = (u >= 0) & (v >= 0) & (u < W) & (v < H)
    there = b.depth[v[inside], u[inside]] * factor
    hit = (there > 0) & (np.abs(z[inside] - there) < tolerance * there)
    return float(hit.sum() / max(len(points), 1))


def pairs_of(poses: list[np.ndarray], count: int, turn: float = 15.0) -> list[tuple[int, int]]:
    """`count` pairs of frames, as far apart as the camera turned by at most `turn` degrees (at least neighbours)."""
    pairs = []
    for a in np.unique(np.linspace(0, max(len(poses) - 2, 0), count).astype(int)):
        b = a + 1
        for k in range(a + 1, len(poses)):
            cosine = (np.trace(poses[a][:3, :3].T @ poses[k][:3, :3]) - 1) / 2
            if np.degrees(np.arccos(np.clip(cosine, -1, 1))) > turn:
                break
            b = k
        pairs.append((int(a), int(b)))
    return [p for p in pairs if p[1] < len(poses)]


def check_geometry(frames: RgbdFolder, count: int = 8, margin: float = 0.15) -> tuple[float, int]:
    """(median agreement of `count` pairs of frames, pairs). UserError when a wrong scale or direction explains the
    depth better by `margin`, or when poses and depth do not fit at all."""
    pairs = pairs_of([e.pose for e in frames.entries], count)
    if not pairs:
        return float("nan"), 0
    cache = {k: frames[k] for k in dict.fromkeys(sum(pairs, ()))}
    share = float(np.median([agreement(cache[a], cache[b]) for a, b in pairs]))
    others = {
        why: float(np.median([agreement(cache[a], cache[b], change) for a, b in pairs]))
        for why, change in CHANGES.items()
    }
    why = max(others, key=others.get)
    if others[why] > share + margin:
        raise UserError(f"{frames.root}: depth of neighbouring frames agrees at {share:.0%} of the pixels, and at "
                        f"{others[why]:.0%} if {why}; correct that")  # fmt: skip
    if share < 0.1:
        raise UserError(f"{frames.root}: depth of neighbouring frames agrees at {share:.0%} of the pixels only; poses, "
                        "intrinsics or depth scale are wrong")  # fmt: skip
    return share, len(pairs)


def decimals(flag: str, value: str, n: int | None = None) -> tuple[float, ...]:
    """'525,525,319.5,239.5' -> numbers, n of them. UserError names the flag."""
    try:
        found = tuple(float(x) for x in value.split(","))
    except ValueError as e:
        raise UserError(f"{flag} {value}: expected numbers joined by ','") from e
    if n is not None and len(found) != n:
        raise UserError(f"{flag} {value}: expected {n} numbers joined by ','")
    return found


# ---- what data/check_dataset.py prints


def check_rgbd(args) -> np.ndarray | None:
    """The lines of one format, and the sheet if --show asks for one."""
    if args.format != "rooms" and args.root is None:
        raise UserError(
            f"FORMAT {args.format} needs ROOT: a folder of posed frames, or an index of data/prepare_scannet.py"
        )
    return {"rgbd": check_folder, "rooms": check_rooms, "scannet": check_index}[args.format](args)


def spread(n: int, count: int) -> list[int]:
    """At most `count` of n, evenly; 0: all."""
    return np.unique(np.linspace(0, n - 1, min(count or n, n)).round().astype(int)).tolist()


def with_superpoints(frame: Frame) -> FramePoints:
    """All measured pixels, with superpoints by graph segmentation."""
    return frame_points(replace(frame, segment=superpoint_map(frame)))


def checked_reprojection(points: list[FramePoints], where: str) -> float:
    """The largest error, px. UserError above WITHIN."""
    worst = max(float(reprojection_error(p).max()) for p in points)
    if worst > WITHIN:
        raise UserError(f"{where}: a point projects {worst:.2f} px from its source pixel, expected {WITHIN} at most; "
                        "pose or intrinsics are not those of the points")  # fmt: skip
    return worst


def oracle_line(frames: list[FramePoints], classes: int) -> str:
    """What masks made of these superpoints can reach at best."""
    things = [thing_instances(f.instance, f.semantic, classes) for f in frames]
    best = oracle_summary([oracle(f.superpoint, t, none=-1) for f, t in zip(frames, things, strict=True)])
    return (f"superpoints: {best['superpoints']:.0f} a frame; oracle: mean IoU {best['mIoU']:.3f}, {best['R50']:.0%} "
            f"of {best['instances']:.0f} objects above IoU 0.5, {best['accuracy']:.1%} of the points right")  # fmt: skip


def check_folder(args) -> np.ndarray | None:
    K = None if args.intrinsics is None else decimals("--intrinsics", args.intrinsics, 4)
    frames = RgbdFolder(args.root, intrinsics=K, depth_scale=args.depth_scale)
    print(frames.summary())
    looked = [frames[k] for k in spread(len(frames), args.limit)]
    share, pairs = check_geometry(frames)
    worst = checked_reprojection([frame_points(f) for f in looked], str(args.root))
    valid = [float((f.depth > 0).mean()) for f in looked]
    low, middle, high = np.percentile(np.concatenate([f.depth[f.depth > 0][::97] for f in looked]), (1, 50, 99))
    print(f"{len(looked)} frames decoded, {looked[0].depth.shape[1]}x{looked[0].depth.shape[0]} px: depth valid at "
          f"{min(valid):.0%}..{max(valid):.0%} of the pixels, {low:.2f}/{middle:.2f}/{high:.2f} m (1/50/99 %); "
          f"reprojection {worst:.3f} px at most; depth of {pairs} pairs of neighbours agrees at "
          f"{share:.0%} of the pixels")  # fmt: skip
    parts = [with_superpoints(f) for f in looked[: max(args.batch_size, 1)]]
    print(f"superpoints of {len(parts)} frames: {', '.join(str(int(p.superpoint.max()) + 1) for p in parts)}")
    rows = [(f.colour, depth_picture(f.depth), fill(p)) for f, p in zip(looked, parts, strict=False)]
    return sheet(rows, 3) if args.show else None


def check_rooms(args) -> np.ndarray | None:
    rooms = [Room(args.seed, k) for k in range(max(args.limit, 1))]
    names = [CLASSES[c] for room in rooms for c in {p.instance: p.semantic for p in room.parts}.values()]
    counts = ", ".join(f"{name} {names.count(name)}" for name in CLASSES[2:])
    looked = [room[0] for room in rooms[: max(args.batch_size, 1)]]
    worst = checked_reprojection([frame_points(f) for f in looked], "rooms")
    seen = [len(np.setdiff1d(f.instance, NONE)) for f in looked]
    print(f"{len(rooms)} rooms of {len(rooms[0])} frames: {len(names)} objects ({counts}); first frames show "
          f"{min(seen)}..{max(seen)} of them, {len(np.unique(looked[0].segment))} surfaces; "
          f"reprojection {worst:.3f} px at most")  # fmt: skip
    parts = [with_superpoints(f) for f in looked]
    print(oracle_line(parts, len(CLASSES)))
    rows = [
        (f.colour, depth_picture(f.depth), ids_colour(f.instance), fill(p)) for f, p in zip(looked, parts, strict=True)
    ]
    return sheet(rows, 4) if args.show else None


def check_index(args) -> np.ndarray | None:
    data = PreparedClips(args.root)
    looked = [data[k] for k in spread(len(data), args.limit)]
    frames = [f for clip in looked for f in clip.frames]
    worst = checked_reprojection(frames, str(args.root))
    n, known = len(data.classes), np.concatenate([f.semantic for f in frames])
    things = [len(np.setdiff1d(thing_instances(f.instance, f.semantic, n), -1)) for f in frames]
    parts = [int(f.superpoint.max()) + 1 for f in frames]
    seen = np.bincount(known, minlength=n + 1)
    common = ", ".join(f"{data.classes[c]} {seen[c] / len(known):.0%}" for c in np.argsort(-seen[:n])[:5] if seen[c])
    print(f"{args.root}: {len(data)} items ({data.views}), {len(frames)} frames of {len(looked)} looked at: "
          f"{seen[n] / len(known):.0%} of the points unlabelled, {np.count_nonzero(seen[:n])} of {n} classes "
          f"({common}); "
          f"{min(things)}..{max(things)} objects and {min(parts)}..{max(parts)} superpoints a frame, "
          f"{things.count(0)} frames without objects; "
          f"reprojection {worst:.3f} px at most")  # fmt: skip
    print(oracle_line(frames, n))
    if max(things) == 0 or seen[n] > UNKNOWN * len(known):
        raise UserError(f"{args.root}: {seen[n] / len(known):.0%} of the points are unlabelled and {things.count(0)} of "
                        f"{len(frames)} frames show no object; labels, poses or depth scale are of another scan")  # fmt: skip
    rows = [tuple(scatter(f, c) for c in (255 * f.colour, ids_colour(f.instance), ids_colour(f.superpoint)))
            for f in frames[: args.batch_size]]  # fmt: skip
    return sheet(rows, 3) if args.show else None


# ---- pictures


def sheet(rows: list[tuple[np.ndarray, ...]], columns: int) -> np.ndarray:
    cells = [cell for row in rows for cell in row]
    return overlay.grid(cells, columns, [""] * len(cells))


def depth_picture(depth: np.ndarray) -> np.ndarray:
    """(H, W) m -> near is bright, unknown black, (H, W, 3) uint8."""
    far = np.percentile(depth[depth > 0], 99)
    grey = np.where(depth > 0, 255 - 215 * np.minimum(depth / far, 1), 0)
    return np.repeat(grey[..., None], 3, 2).astype(np.uint8)


def ids_colour(ids: np.ndarray) -> np.ndarray:
    """A colour for each id, 0 and below dark: (..., 3) uint8."""
    table = np.random.default_rng(0).integers(60, 256, (1024, 3)).astype(np.uint8)
    return np.where((ids > 0)[..., None], table[ids % 1024], 40).astype(np.uint8)


def fill(points: FramePoints) -> np.ndarray:
    """Superpoints of all measured pixels as a picture (H, W, 3) uint8."""
    ids = np.full(points.size, -1, np.int64)
    u, v = points.uv.astype(int).T
    ids[v, u] = points.superpoint + 1
    return ids_colour(ids)


def scatter(points: FramePoints, colours: np.ndarray) -> np.ndarray:
    """colours (N, 3) 0..255 at the points' source pixels, about 160 px wide."""
    H, W = points.size
    step = max(1, W // 160)
    picture = np.full((-(-H // step), -(-W // step), 3), overlay.DARK, np.uint8)
    u, v = (points.uv.astype(int) // step).T
    picture[v, u] = colours.astype(np.uint8)
    return picture
