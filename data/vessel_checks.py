"""The checklist of pictures with vessel masks as printed lines and refusals, and the sheet of a batch of patches.

args: those of data/check_dataset.py.
"""

import hashlib

import numpy as np

from data.vessel_items import VesselItem, refuse_duplicates
from data.vessels import VesselPatches, open_vessels
from utils import overlay
from utils.run import StepBatches, UserError

VESSEL_FORMATS = ("vessels", "manifest")
CELL = 224  # px that a patch of the sheet has at least
OUTSIDE = (120, 128, 138)


def check_vessels(args) -> np.ndarray | None:
    """The whole list, and the sheet if --show asks for one."""
    if args.root is None:
        raise UserError(f"FORMAT {args.format} needs ROOT: the folder of the set, or the manifest; --help says which")
    if args.format == "manifest" and args.layout not in ("auto", "manifest"):
        raise UserError(f"--layout {args.layout}: FORMAT manifest has a layout of its own; leave --layout out")
    layout = "manifest" if args.format == "manifest" else args.layout
    found = open_vessels(args.root, layout, args.split_at, polygons=args.polygons)
    splits = [args.split] if args.split else found.splits
    print(f"{found.root}: {found.name}, {len(found)} pictures, splits {', '.join(found.splits)}")
    for note in found.notes:
        print(note)
    seen: list[tuple[VesselItem, str]] = []
    for name in splits:
        seen += describe(name, found.split(name), args.limit)
    refuse_duplicates([x for x, _ in seen], [digest for _, digest in seen])
    return draw_patches(found.split(splits[0]), args) if args.show else None


def describe(split: str, items: list[VesselItem], limit: int) -> list[tuple[VesselItem, str]]:
    """Decode `limit` records (0: all), evenly spaced, print what they hold -> [(record, hash of its pixels)]. UserError
    for the first that is refused."""
    chosen = np.linspace(0, len(items) - 1, min(limit or len(items), len(items))).round().astype(int).tolist()
    sizes, share, outside, digests = [], [], [], []
    for x in (items[k] for k in chosen):
        y = x.load()
        x.second(y["mask"].shape)
        sizes.append(y["mask"].shape)
        inside, all_pixels = np.count_nonzero(y["mask"] & y["fov"]), np.count_nonzero(y["mask"])
        share.append([inside / y["fov"].sum(), y["fov"].mean()])
        outside.append(1 - inside / max(all_pixels, 1))
        digests.append((x, hashlib.sha256(repr(sizes[-1]).encode() + y["image"].tobytes()).hexdigest()))
    (vessel, fov), low, high = 100 * np.array(share).T, np.min(sizes, 0), np.max(sizes, 0)
    patients, texts = {x.person for x in items}, sorted({t for x in items for t in x.text})
    names = sorted(patients, key=lambda p: (len(p), p))
    shown = ", ".join(names[:14]) + (", ..." if len(names) > 14 else "")
    sources = sorted({x.fov_source for x in items})
    print(
        f"{split}: {len(items)} pictures of {len(patients)} patients ({shown}), {len(chosen)} decoded, "
        f"{low[1]}..{high[1]} x {low[0]}..{high[0]} px (W x H); masked {vessel.min():.2f}/{np.median(vessel):.2f}/"
        f"{vessel.max():.2f} % of the field of view (min/median/max), {100 * np.max(outside):.2f} % of a mask at most "
        f"lies outside it; field of view {fov.min():.1f}..{fov.max():.1f} % of the picture, from {', '.join(sources)}; "
        f"second observer for {sum(x.second_path is not None for x in items)}; objects: {', '.join(texts[:6])}"
        + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")
    )
    return digests


def draw_patches(items: list[VesselItem], args) -> np.ndarray:
    """The first batch that training would cut: each patch as it is, and beside it with its objects tinted."""
    patches = VesselPatches(
        items, args.image_size, args.seed, turns=not (args.no_flip or args.no_augment), objects=True,
        contrast=1.0 if args.no_augment else 1.25, light=0.0 if args.no_augment else 0.5,
    )  # fmt: skip
    keys = next(iter(StepBatches(len(patches), args.batch_size, 0, 1, args.seed)))
    batch = [patches[key] for key in keys]
    names = [
        f"{x['name']} at {x['box'][0]}, {x['box'][1]}: {100 * x['mask'][x['fov']].mean():.1f} % masked" for x in batch
    ]
    return overlay.grid([draw_patch(x) for x in batch], 4, names)


def draw_patch(patch: dict) -> np.ndarray:
    """A patch twice, side by side, enlarged by whole px: as training sees it; objects tinted, outside the FOV grey."""
    times = -(-CELL // len(patch["image"]))

    def enlarged(x: np.ndarray) -> np.ndarray:
        return x.repeat(times, 0).repeat(times, 1)

    plain = enlarged(patch["image"])
    tinted = overlay.mask(plain, enlarged(~patch["fov"]), OUTSIDE, 1.0, outline=False)
    for k, mask in enumerate(patch["masks"]):
        tinted = overlay.mask(tinted, enlarged(mask), overlay.colour(k + 1), 0.55, outline=False)
    return np.concatenate([plain, tinted], 1)
