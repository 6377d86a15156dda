"""Captioned images as training items: one per caption (cross-entropy) or one per image (CIDEr reward, evaluation).

Items and batches are dicts. Of an item; in a batch the tensors have B in front, and what is no tensor is a list:

    image            (3, S, S) float, normalised
    image_id         int, or str where the files have no numbers
    references       all captions of the image as PTB tokens, list[str]; raw_references: as they were written
    tokens           (L,) long, <bos> words <eos>; in a batch (R, L), <pad> behind the shorter ones
    length           tokens with <bos> and <eos>; in a batch (R,) long
    annotation_id    int; in a batch (R,) long
    patch_labels     (N,) long, class of each patch of the square, row by row, -1: none; only with `patches`

R = B, but for ImageItems with k captions per image it is B*k, image-major; with k = 0 tokens, length and annotation_id
are absent.
References keep hyphens (`t-shirt`) that `tokens` split (`t shirt`): such words cannot match, see data/caption_files.py.
An item is a function of (seed, epoch, index); a plain index is one of epoch 0.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as masks
from torch.utils.data import Dataset

from data.caption_files import CaptionSet
from data.caption_vocab import MAX_LEN, PAD, CaptionVocab, check_tokens
from utils.ptb_tokenizer import tokenize
from utils.run import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IGNORE = -1  # patch label: no class covers enough of it
MIN_COVER = 0.25  # share of a patch that its class must cover


# ---- images


def open_image(path: Path | str) -> Image.Image:
    """RGB, turned as the camera's note (EXIF) says; 16 bits scaled to 8. UserError for no picture or one cut off."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            if turned.mode == "I" or turned.mode.startswith("I;16"):  # `convert` would clip them at 255
                turned = Image.fromarray(np.rint(np.asarray(turned) / 257).clip(0, 255).astype(np.uint8))
            return turned.convert("RGB")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such image file; check the path") from e
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({e}); replace or remove it") from e


class ImageReader:
    """File -> square uint8 (S, S, 3), and from there to what the network sees.

    resize: squash (the default: borders stay, the aspect does not) or crop (OpenAI's: short side to S, centre cut out).
    flip: share of the training images that are mirrored; 0, because captions name left and right. cache_gb: decoded
    squares that this process keeps, GB; a loader worker has its own.
    """

    def __init__(self, size=224, resize="squash", mean=CLIP_MEAN, std=CLIP_STD, flip=0.0, cache_gb=0.0):
        if resize not in ("squash", "crop") or size < 1 or not 0 <= flip <= 1:
            raise ValueError(f"ImageReader: size {size}, resize {resize!r}, flip {flip}; expected squash or crop, 0..1")
        self.size, self.resize, self.flip = size, resize, flip
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))  # (3, 1, 1)
        self.room = int(cache_gb * 1e9)  # bytes
        self.cache: dict[Path, np.ndarray] = {}

    def square(self, path: Path) -> np.ndarray:
        """uint8 RGB (S, S, 3), from the cache where it is in it; not to be written to."""
        if path in self.cache:
            return self.cache[path]
        square = self.fit(open_image(path))
        if square.nbytes <= self.room:
            self.cache[path], self.room = square, self.room - square.nbytes
        return square

    def fit(self, image: Image.Image) -> np.ndarray:
        """An RGB picture of any size -> uint8 (S, S, 3), bicubic."""
        S, (w, h) = self.size, image.size
        if self.resize == "squash":
            return np.array(image.resize((S, S), Image.Resampling.BICUBIC))
        w, h = S * w // min(image.size), S * h // min(image.size)
        left, top = round((w - S) / 2), round((h - S) / 2)
        return np.array(image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + S, top + S)))

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a width x height image that the square shows, xyxy px."""
        if self.resize == "squash":
            return 0.0, 0.0, float(width), float(height)
        S, short = self.size, min(width, height)
        w, h = S * width // short, S * height // short
        left, top = round((w - S) / 2), round((h - S) / 2)
        return left * width / w, top * height / h, (left + S) * width / w, (top + S) * height / h

    def tensor(self, square: np.ndarray) -> torch.Tensor:
        """uint8 (S, S, 3) -> (3, S, S) float32, normalised."""
        pixels = torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


# ---- patch labels


def _weights(low: float, high: float, cells: int, pixels: int) -> np.ndarray:
    """(cells, pixels) float32: the share of each of `cells` equal parts of low..high that lies in each pixel."""
    edges = np.linspace(low, high, cells + 1)[:, None]  # (cells + 1, 1) px
    inside = np.clip(edges - np.arange(pixels)[None], 0, 1)  # (cells + 1, pixels): how far an edge reaches into a pixel
    return ((inside[1:] - inside[:-1]) * cells / (high - low)).astype(np.float32)


def patch_labels(
    annotations: list[dict],
    width: int,
    height: int,
    grid: tuple[int, int],
    class_index: dict[int, int],
    window: tuple[float, float, float, float] | None = None,
) -> torch.Tensor:
    """Class of every patch of a (rows, columns) grid over the window (xyxy px, None: the image) -> (rows*columns,) long.

    annotations: COCO instances of the image, polygons or run lengths; those of one class are joined. The class with
    the largest area in a patch wins, the first of equals, if it covers MIN_COVER of it; else the label is IGNORE.
    class_index: {category_id: class}. ValueError for a category that it lacks.
    """
    x0, y0, x1, y1 = window or (0.0, 0.0, float(width), float(height))
    down, across = _weights(y0, y1, grid[0], height), _weights(x0, x1, grid[1], width)  # (h, H), (w, W)
    parts: dict[int, list] = {}
    for a in annotations:
        if a["category_id"] not in class_index:
            raise ValueError(f"patch_labels: category {a['category_id']} is not among {len(class_index)} classes")
        shape = a["segmentation"]
        if isinstance(shape, list):
            runs = masks.frPyObjects(shape, height, width) if shape else []  # some converters write empty ones
        else:
            runs = [masks.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape]
        parts.setdefault(class_index[a["category_id"]], []).extend(runs)
    labels, best = np.full(grid, IGNORE, np.int64), np.full(grid, MIN_COVER - 1e-6, np.float32)
    for k in sorted(k for k in parts if parts[k]):
        cover = down @ masks.decode(masks.merge(parts[k])).astype(np.float32) @ across.T  # (h, w) in [0, 1]
        labels, best = np.where(cover > best, k, labels), np.maximum(cover, best)
    return torch.from_numpy(labels).flatten()


class PatchLabels:
    """Patch labels of the images of COCO instance files, which are read once. classes: names in the order of the ids.

    image_ids: keep these only. The annotations of an image stay packed as text until they are asked for, because the
    objects of 118,287 images would take gigabytes; labels once made are kept, a byte or two per patch.
    """

    def __init__(self, paths: list[Path], reader: ImageReader, grid=(14, 14), image_ids=None):
        self.reader, self.grid, self.packed, self.made = reader, tuple(grid), {}, {}
        categories: dict[int, str] = {}
        for path in paths:
            try:
                content = json.loads(Path(path).read_text(encoding="utf-8"))
                sizes = {x["id"]: (x["width"], x["height"]) for x in content["images"]}
                names = {c["id"]: c["name"] for c in content["categories"]}
                found: dict[int, list] = {i: [] for i in sizes if image_ids is None or i in image_ids}
                for a in content["annotations"]:
                    if a["image_id"] in found:
                        found[a["image_id"]].append({k: a[k] for k in ("category_id", "segmentation")})
            except OSError as e:
                raise UserError(f"{path}: cannot be read ({e.strerror}); expected COCO instances") from e
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}: is no COCO instance file ({type(e).__name__} {e}); fetch it again") from e
            if categories and categories != names:
                raise UserError(f"{path}: has other categories than {paths[0]}; give files of one data set")
            categories = names
            self.packed |= {i: json.dumps((*sizes[i], found[i])).encode() for i in found}
        self.class_index = {i: k for k, i in enumerate(sorted(categories))}
        self.classes = [categories[i] for i in sorted(categories)]

    def __call__(self, image_id: int) -> torch.Tensor:
        """(rows*columns,) long; IGNORE everywhere for an image without instances. ValueError for an unknown image."""
        if image_id not in self.made:
            width, height, annotations = self._unpack(image_id)
            window = self.reader.window(width, height)
            labels = patch_labels(annotations, width, height, self.grid, self.class_index, window)
            self.made[image_id] = labels.to(torch.int16)
        return self.made[image_id].long()

    def size(self, image_id: int) -> tuple[int, int]:
        """(width, height) px that the instance file notes."""
        return tuple(self._unpack(image_id)[:2])

    def _unpack(self, image_id: int) -> list:
        if image_id not in self.packed:
            raise ValueError(f"PatchLabels: image {image_id} is in none of the instance files")
        return json.loads(self.packed[image_id])


# ---- items


class _Captioned(Dataset):
    """What both kinds of items share: the image, its references, the generator of (seed, epoch, index)."""

    def __init__(self, captions: CaptionSet, reader: ImageReader, seed: int, patches: PatchLabels | None):
        self.captions, self.reader, self.seed, self.patches = captions, reader, seed, patches
        if patches is not None:
            absent = [x["image_id"] for x in captions.images if x["image_id"] not in patches.packed]
            if absent:
                raise UserError(
                    f"{captions.source}: {len(absent)} of {len(captions)} images are in no instance file, as {absent[0]}; "
                    "patch labels need instances_*.json of the same images"
                )

    def _start(self, key: int | tuple[int, int]) -> tuple[int, torch.Generator]:
        """The index and the generator of this item."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        seed = (self.seed * 1_000_003 + epoch) * 1_000_003 + index
        return index, torch.Generator().manual_seed(seed % 2**63)

    def _item(self, x: dict, g: torch.Generator) -> dict:
        square = self.reader.square(x["file"])
        mirrored = self.reader.flip > 0 and torch.rand((), generator=g).item() < self.reader.flip
        raw = [text for _, text in x["captions"]]
        item = {"image": self.reader.tensor(square[:, ::-1] if mirrored else square), "image_id": x["image_id"]}
        item |= {"references": [tokenize(text) for text in raw], "raw_references": raw}
        if self.patches is not None:
            labels = self.patches(x["image_id"]).view(self.patches.grid)  # (h, w)
            item["patch_labels"] = (labels.flip(1) if mirrored else labels).flatten()
        return item


class CaptionItems(_Captioned):
    """One item per caption."""

    def __init__(self, captions: CaptionSet, vocab: CaptionVocab, reader: ImageReader,
                 max_len: int = MAX_LEN, seed: int = 0, patches: PatchLabels | None = None):  # fmt: skip
        super().__init__(captions, reader, seed, patches)
        self.vocab, self.max_len = vocab, max_len
        self.at = [(i, j) for i, x in enumerate(captions.images) for j in range(len(x["captions"]))]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, g = self._start(key)
        i, j = self.at[index]
        x = self.captions.images[i]
        annotation_id, text = x["captions"][j]
        tokens = torch.tensor(self.vocab.encode(text, self.max_len))
        return {**self._item(x, g), "tokens": tokens, "length": len(tokens), "annotation_id": annotation_id}


class ImageItems(_Captioned):
    """One item per image. captions_per_image=k: with k of its captions, none twice while there are enough; `tokens` of
    an item is then a list of k (L,), `length` and `annotation_id` are lists of k."""

    def __init__(self, captions: CaptionSet, reader: ImageReader, seed: int = 0, patches: PatchLabels | None = None,
                 captions_per_image: int = 0, vocab: CaptionVocab | None = None, max_len: int = MAX_LEN):  # fmt: skip
        super().__init__(captions, reader, seed, patches)
        if (captions_per_image > 0) != (vocab is not None):
            raise ValueError(f"ImageItems: captions_per_image {captions_per_image}, vocab {vocab}; give both or none")
        self.vocab, self.k, self.max_len = vocab, captions_per_image, max_len

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, g = self._start(key)
        x = self.captions.images[index]
        item = self._item(x, g)
        if self.k:
            n = len(x["captions"])
            order = [int(j) for _ in range(-(-self.k // n)) for j in torch.randperm(n, generator=g)][: self.k]
            chosen = [x["captions"][j] for j in sorted(order)]
            tokens = [torch.tensor(self.vocab.encode(text, self.max_len)) for _, text in chosen]
            item |= {"tokens": tokens, "length": [len(t) for t in tokens], "annotation_id": [k for k, _ in chosen]}
        return item


class CaptionCollate:
    """Items -> batch. rows: of the word table; UserError names the annotation whose token id is not below it."""

    def __init__(self, rows: int):
        self.rows = rows

    def __call__(self, items: list[dict]) -> dict:
        batch = {k: [x[k] for x in items] for k in ("image_id", "references", "raw_references")}
        batch["image"] = torch.stack([x["image"] for x in items])  # (B, 3, S, S)
        if "patch_labels" in items[0]:
            batch["patch_labels"] = torch.stack([x["patch_labels"] for x in items])  # (B, N)
        if "tokens" in items[0]:
            many = isinstance(items[0]["tokens"], list)
            flat = {k: [y for x in items for y in (x[k] if many else [x[k]])] for k in ("tokens", "annotation_id")}
            tokens = torch.nn.utils.rnn.pad_sequence(flat["tokens"], batch_first=True, padding_value=PAD)  # (R, L)
            check_tokens(tokens, self.rows, flat["annotation_id"])
            batch |= {"tokens": tokens, "length": torch.tensor([len(t) for t in flat["tokens"]])}
            batch["annotation_id"] = torch.tensor(flat["annotation_id"])
        return batch
