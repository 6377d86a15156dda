"""What a user gives for segmentation: pictures, prompts, sentences, a checkpoint's sizes and numbers; and prompts on
their way to the network.

An object is a dict of what points at it: points [[x, y, label]] (1 on the object, 0 beside it), box [x0, y0, x1, y1]
(first and last pixel), mask (path of a PNG, or (H, W) bool), text. Coordinates are px of the picture, centres whole.

Shapes: Q objects, n clicks of the most clicked one, H W picture, h w the picture as the network is shown it, E width of
text embeddings.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.run import UserError
from utils.segmentation_files import need, read_json, read_png

SENTENCES = '[{"image_id", "split", "sentences": [{"sent_id", "sent"}]}], as RefCOCO has it'
FORMS = {"point": ((2, 3), "x,y or x,y,0"), "box": ((4,), "x0,y0,x1,y1")}


# ---- pictures and checkpoint


def data_of(config: dict, ckpt: Path | str, K: int, image_size: list[int] | None) -> tuple[list[int], tuple[int, int]]:
    """(category id of each of the K classes, (height, width) in px that pictures are fitted into) of a checkpoint.

    Both stand under "data" in its config.json, as train/ writes it: {"category_ids", "image_size"}. Without it classes
    count from 1; image_size, when given, replaces the checkpoint's. UserError when neither names a size, or ids do not
    fit the classes.
    """
    data = config.get("data", {})
    ids, size = data.get("category_ids", list(range(1, K + 1))), image_size or data.get("image_size")
    if size is None:
        raise UserError(
            f"{ckpt}/config.json: names no image size under 'data'; give the one of training as --image-size"
        )
    if len(size) != 2 or min(size) < 1:
        raise UserError(
            f"{ckpt}: image size {'x'.join(map(str, size))}; expected height and width, sides of at least 1 px"
        )
    if len(ids) != K or len(set(ids)) < K or min(ids) < 1:
        raise UserError(
            f"{ckpt}/config.json: {len(ids)} category ids for {K} classes; expected a number from 1 up for each"
        )
    return ids, tuple(size)


def check_free(out: Path, names: Sequence[str]) -> None:
    """UserError unless `out` is a folder, or can be one, that holds none of these files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    for name in names:
        if (out / name).exists():
            raise UserError(f"--out {out}: holds {name} already; choose a new folder or delete it")


# ---- prompts


def coordinates(kind: str, value: str) -> list[float]:
    """A flag's '10,20.5' -> [10.0, 20.5]. UserError for something else than a point or box."""
    lengths, form = FORMS[kind]
    try:
        found = [float(x) for x in value.split(",")]
    except ValueError:
        found = []
    if len(found) not in lengths or not np.isfinite(found).all():
        raise UserError(f"--{kind} {value}: expected {form}, numbers in px of the picture")
    return found


def read_objects(prompts: Sequence[tuple[str, str]]) -> list[dict]:
    """(flag, value) in the order they were given -> objects. A second box, mask or text begins another object, and so
    do the flags "object" and "at", whose value, a frame, is kept as `at` of all that follow. UserError for what is no
    prompt, or an object that only clicks beside it describe."""
    objects: list[dict] = [{}]
    frame: dict[str, int] = {}
    for kind, value in prompts:
        if kind in ("object", "at") or kind in objects[-1]:
            objects.append({**frame})
        if kind == "at":
            if not value.isdigit():
                raise UserError(f"--at {value}: is not a frame; expected a whole number from 0 up")
            frame = {"at": int(value)}
            objects[-1] |= frame
            continue
        if kind == "text" and not value.strip():
            raise UserError("--text: is empty; say what to look for")
        if kind == "point":
            x, y, *label = coordinates(kind, value)
            if label not in ([], [0], [1]):
                raise UserError(
                    f"--point {value}: label {label[0]:g} is unknown; expected 1 on the object, 0 beside it"
                )
            objects[-1].setdefault("points", []).append([x, y, int(label[0]) if label else 1])
        elif kind != "object":
            objects[-1][kind] = coordinates(kind, value) if kind == "box" else value
    objects = [x for x in objects if x.keys() - {"at"}]
    for k, x in enumerate(objects, start=1):
        if x.keys() - {"at"} == {"points"} and not any(label for *_, label in x["points"]):
            raise UserError(f"object {k}: has clicks beside it only; click on it, or give a --box, --mask or --text")
    return objects


def check_only(args, **only: Sequence[str]) -> None:
    """UserError for a flag that is given, but not for its tasks: check_only(args, refs=("referring",))."""
    for name, tasks in only.items():
        if getattr(args, name) not in (None, False) and args.task not in tasks:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: is for --task {' and '.join(tasks)}, not {args.task}; leave it out")


def check_prompts(task: str, objects: list[dict], elsewhere: bool, prompted: Sequence[str]) -> None:
    """UserError unless tasks of `prompted`, and only they, have prompts: objects, or refs or masks elsewhere."""
    if bool(objects or elsewhere) != (task in prompted):
        hint = "needs a prompt: --text or --refs, or where it is interactive --point, --box, --mask or --text"
        hint = "needs an object to follow: --masks, or --point, --box, --mask or --text" if task == "vos" else hint
        raise UserError(f"--task {task}: {hint if task in prompted else 'takes no prompt; leave it out'}")
    if task == "referring" and any(x.keys() != {"text"} for x in objects):
        raise UserError("--task referring: takes --text only; use --task interactive to point at objects as well")
    if task != "vos" and any("at" in x for x in objects):
        raise UserError("--at: is for --task vos, where objects may be pointed at on any frame; leave it out")
    if objects and elsewhere:
        where = "--masks" if task == "vos" else "--refs"
        raise UserError(f"{where}: is without other prompts; leave one of them out")


def read_refs(path: str, split: str | None, images: set) -> dict[int, list[dict]]:
    """{image_id: objects with text and sent_id} of RefCOCO's refs as json; nothing else of the file is used.

    UserError unless all pictures that the split (None: all) talks about are among `images`.
    """
    where, asked = f"--refs {path}", {}
    for ref in need(where, read_json("--refs", path), {"image_id": int, "sentences": list}, SENTENCES):
        if split in (None, ref.get("split")):
            said = need(where, ref["sentences"], {"sent_id": int, "sent": str}, SENTENCES)
            asked.setdefault(ref["image_id"], []).extend({"text": s["sent"], "sent_id": s["sent_id"]} for s in said)
    if not asked:
        raise UserError(f"{where}: has no sentence of --split {split}; expected {SENTENCES}")
    unknown = sorted(asked.keys() - images)
    if unknown:
        raise UserError(f"{where}: is about image {unknown[0]}, which is not among the pictures ({len(unknown)} of "
                        f"{len(asked)} are not); give them all, named as in COCO, or choose with --split")  # fmt: skip
    return asked


def check_place(objects: list[dict], H: int, W: int) -> dict[int, np.ndarray]:
    """{object: mask (H, W) bool} of the objects that have one. UserError for a point or box that is not in a picture of
    H x W px, or a mask of another size or without a pixel."""
    size, masks = f"outside the picture, which is {W} x {H} px (W x H)", {}
    for k, x in enumerate(objects):
        for px, py, _ in x.get("points", ()):
            if not (0 <= px <= W - 1 and 0 <= py <= H - 1):
                raise UserError(f"--point {px:g},{py:g}: lies {size}; expected x in 0..{W - 1}, y in 0..{H - 1}")
        if "box" in x:
            x0, y0, x1, y1 = x["box"]
            if not (0 <= x0 <= x1 <= W - 1 and 0 <= y0 <= y1 <= H - 1):
                given = ",".join(f"{v:g}" for v in x["box"])
                raise UserError(
                    f"--box {given}: lies {size}, or ends before it begins; expected x0 <= x1, y0 <= y1 in it"
                )
        if "mask" in x:
            is_array = isinstance(x["mask"], np.ndarray)
            values, where = (x["mask"], "the mask") if is_array else (read_png(x["mask"]), f"--mask {x['mask']}")
            masks[k] = values[..., :3].any(2) if values.ndim == 3 else values > 0
            if masks[k].shape != (H, W) or not masks[k].any():
                about = "x".join(map(str, masks[k].shape[::-1])) + (" px" if masks[k].any() else " px, all 0")
                raise UserError(f"{where}: is {about}; expected {W}x{H} px (W x H) with the object not 0")
    return masks


def fit(size: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a picture -> (h, w) of the largest in the same shape that fits into `limit`."""
    scale = min(limit[0] / size[0], limit[1] / size[1])
    return tuple(min(max(1, round(n * scale)), m) for n, m in zip(size, limit, strict=True))


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3) -> (h, w, 3) of size (h, w), bilinear; untouched where the size stays."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resized_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) of any type -> (h, w) of size (h, w): the value under the centre of each pixel."""
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * N / n).astype(np.int64), N - 1)
        for N, n in zip(values.shape, size, strict=True)
    )
    return values[rows[:, None], columns]


def scale_points(points_px: np.ndarray, given: tuple[int, int], shown: tuple[int, int]) -> np.ndarray:
    """Points (..., 2) x y of a picture of size `given` (H, W) in the same picture resized to `shown` (h, w), float32.

    A whole coordinate is a pixel's centre, half a pixel inside its area: without the halves, points drift by up to half
    a pixel of the larger picture.
    """
    factor = np.array([shown[1] / given[1], shown[0] / given[0]])
    return ((np.asarray(points_px, np.float64) + 0.5) * factor - 0.5).astype(np.float32)


def pack(
    objects: list[dict],
    masks: dict[int, np.ndarray],
    given: tuple[int, int],
    shown: tuple[int, int],
    embed: Callable[[list[str]], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """What PromptBatch.pad takes, of one picture; coordinates and masks as in the picture that the network is shown.

    masks {object: (h, w) bool}; given (H, W), shown (h, w); embed: texts -> (n, E), None where no object has a text.
    """
    Q, found = len(objects), {}
    n = max(len(x.get("points", ())) for x in objects)
    if n:
        clicks = np.array([[*x.get("points", ()), *[[0, 0, -1]] * (n - len(x.get("points", ())))] for x in objects])
        found["points"] = torch.from_numpy(scale_points(clicks[..., :2], given, shown))  # (Q, n, 2)
        found["point_labels"] = torch.from_numpy(clicks[..., 2].astype(np.int64))
    boxes = {k: scale_points(np.reshape(x["box"], (2, 2)), given, shown) for k, x in enumerate(objects) if "box" in x}
    said = {k: x["text"] for k, x in enumerate(objects) if "text" in x}
    for name, has, of in (
        ("boxes", "has_box", boxes),
        ("mask_prompts", "has_mask", masks),
        ("texts", "has_text", said),
    ):
        if not of:
            continue
        if name == "texts":
            rows = embed([*of.values()])
        else:
            rows = torch.from_numpy(np.stack([v.reshape(4) if name == "boxes" else v for v in of.values()]))
        found[name], found[has] = rows.new_zeros(Q, *rows.shape[1:]), torch.zeros(Q, dtype=torch.bool)
        found[name][[*of]], found[has][[*of]] = rows, True
    return found
