"""The checklist of a captioned data set as printed lines and refusals, and pictures of what training sees."""

import time
from collections import Counter

import numpy as np
import torch

from data.caption_files import CaptionSet, check_files, read_splits
from data.caption_vocab import MAX_LEN, CaptionVocab, words
from data.coco_captions import IGNORE, CaptionItems, ImageReader, PatchLabels, open_image
from utils import overlay
from utils.run import StepBatches, UserError

STEPS = 20  # words that decoding writes at most


# ---- the checklist


def check_captions(
    root: str | None, split: str | None, ids: str | None, karpathy: str | None, vocab: str | None, min_freq: int,
    limit: int, reader: ImageReader, show: int, seed: int,
) -> np.ndarray | None:  # fmt: skip
    """The whole list, and the sheet of a first batch of `show` captions (0: none). Arguments: data/check_dataset.py."""
    found, own = check_splits(root, split, ids, karpathy, vocab, min_freq)
    patches = {name: check_images(captions, reader, limit) for name, captions in found.items()}
    first = next(iter(found))
    return draw_batch(found[first], own, reader, patches[first], show, seed) if show else None


def check_splits(
    root: str | None, split: str | None, ids: str | None, karpathy: str | None, vocab: str | None, min_freq: int
) -> tuple[dict[str, CaptionSet], CaptionVocab]:
    """Files, splits, captions and words on standard output; UserError for the first problem. split: None is all."""
    if root is None:
        raise UserError("FORMAT captions needs ROOT: a COCO folder, or a folder with a csv of captions")
    found = read_splits(root, ids, karpathy)
    if split is not None and split not in found:
        raise UserError(f"--split {split}: {root} holds {', '.join(found)}")
    own = CaptionVocab.load(vocab) if vocab else CaptionVocab.build(next(iter(found.values())).captions(), min_freq)
    kind = "annotation ids (as wanted)" if ids else "none given"
    print(f"splits: {', '.join(found)}; ids: {kind}; image files: all that the splits name are looked for")
    for name, captions in found.items():
        if split in (None, name):
            print(captions.summary())
            check_files(captions)
    check_apart(found)
    source = vocab or f"built from {next(iter(found))}, words that occur {own.min_freq} times or more"
    print(f"vocabulary: {len(own)} entries, {source}")
    found = {name: captions for name, captions in found.items() if split in (None, name)}
    for captions in found.values():
        describe_captions(captions, own, vocab)
    return found, own


def check_apart(found: dict[str, CaptionSet]) -> None:
    """UserError when an image is in two splits."""
    home: dict = {}
    for name, captions in found.items():
        for x in captions.images:
            other = home.setdefault(x["image_id"], name)
            if other != name:
                raise UserError(
                    f"{captions.source}: image {x['image_id']} is in {other} and in {name}; scores would lie"
                )


def describe_captions(captions: CaptionSet, vocab: CaptionVocab, given: str | None) -> None:
    """Counts, repeats, lengths and unknown words of one split. given: the file of the vocabulary, if it was not built.

    UserError when most captions would be cut, or most words are unknown to the given file.
    """
    raw, per_image = captions.captions(), [len(x["captions"]) for x in captions.images]
    split = [words(text) for text in raw]
    length = np.array([len(w) for w in split])  # (R,) words
    texts = [" ".join(w) for w in split]
    within = sum(len(x["captions"]) - len({text.strip().lower() for _, text in x["captions"]}) for x in captions.images)
    common, times = Counter(texts).most_common(1)[0]
    print(
        f"{captions.split}: captions per image {min(per_image)}/{np.median(per_image):g}/{max(per_image)} "
        f"(min/median/max); {len(raw) - len(set(texts))} of {len(raw)} repeat another, {within} one of the same image; "
        f"commonest {times} x '{common}'; {int((length == 0).sum())} without a word"
    )
    cut = int((length > MAX_LEN - 2).sum())
    print(
        f"{captions.split}: length {length.mean():.2f} words, 95 % up to {np.percentile(length, 95):.0f}, longest "
        f"{length.max()}; {100 * (length > STEPS).mean():.2f} % over {STEPS} words, {cut} captions cut to {MAX_LEN} tokens"
    )
    unknown, total = vocab.count_unknown(raw)
    print(
        f"{captions.split}: {unknown} of {total} words unknown to the vocabulary ({100 * unknown / max(total, 1):.2f} %)"
    )
    if cut > len(raw) / 2:
        raise UserError(f"{captions.source}: most captions of {captions.split} are cut; is it the right file?")
    if given and unknown > total / 2:
        raise UserError(f"--vocab {given}: most words of {captions.split} are unknown to it; is it the right file?")


def check_images(captions: CaptionSet, reader: ImageReader, limit: int) -> PatchLabels | None:
    """Decode `limit` images spread over the split (0: all) and compare them with their instances, where these exist.

    Returns the patch labels, None without instances. UserError for a file that cannot be read or has another size.
    """
    n = len(captions) if limit == 0 else min(limit, len(captions))
    chosen = [captions.images[i] for i in np.linspace(0, len(captions) - 1, n).round().astype(int)]
    t, sizes = time.perf_counter(), {}
    for x in chosen:
        image = open_image(x["file"])
        sizes[x["image_id"]] = image.size
        reader.fit(image)
    ms = 1e3 * (time.perf_counter() - t) / n
    sides = np.array([*sizes.values()])  # (n, 2) px
    low, high = sides.min(0), sides.max(0)
    print(
        f"{captions.split}: {n} of {len(captions)} images decoded, {low[0]}..{high[0]} x {low[1]}..{high[1]} px, "
        f"{ms:.1f} ms each with the resize"
    )
    if not captions.instances:
        print(f"{captions.split}: no instances_*.json, so no patch labels")
        return None
    patches = PatchLabels(captions.instances, reader, image_ids={x["image_id"] for x in captions.images})
    for x in chosen:
        size = patches.size(x["image_id"])
        if size != sizes[x["image_id"]]:
            seen = "{}x{}".format(*sizes[x["image_id"]])
            raise UserError(f"{x['file']}: is {seen} px, its instances say {size[0]}x{size[1]}; wrong or turned file?")
    labels = torch.stack([patches(i) for i in sizes])  # (n, N)
    share = (labels != IGNORE).float().mean(1)  # (n,)
    seen = labels.unique().tolist()
    print(
        f"{captions.split}: {len(patches.classes)} classes; patches with a class {100 * share.mean():.1f} % "
        f"(of one image {100 * share.min():.0f}..{100 * share.max():.0f} %), {int((share == 0).sum())} images without, "
        f"{len(set(seen) - {IGNORE})} classes seen, in {n} images"
    )
    return patches


# ---- pictures


def patch_colour(k: int) -> tuple[int, int, int]:
    """The palette, then its colours darker: 24 that differ."""
    return tuple(round(c * (1, 0.6, 0.35)[k // len(overlay.PALETTE) % 3]) for c in overlay.colour(k))


def draw_patches(square: np.ndarray, labels: np.ndarray, names: list[str], size: int = 13) -> np.ndarray:
    """A square image uint8 (S, S, 3), enlarged to 320 px or more, its patches tinted by class, with a legend below.

    labels: (h, w) index into names, negative: none. The commonest class has the first colour. size: of the letters, px.
    """
    times, (h, w) = -(-320 // len(square)), labels.shape
    image = square.repeat(times, 0).repeat(times, 1)
    S = len(image)
    rows, columns = np.arange(S) * h // S, np.arange(S) * w // S
    wide = labels[rows][:, columns]  # (S, S)
    counts = Counter(labels[labels >= 0].tolist()).most_common()
    legend = np.full(((len(counts) + 1) // 2 * (size + 7) + 4, S, 3), overlay.DARK, np.uint8)
    for k, (label, n) in enumerate(counts):
        image = overlay.mask(image, wide == label, patch_colour(k), alpha=0.5)
        x, y = 4 + k % 2 * (S // 2), 4 + k // 2 * (size + 7)
        legend[y : y + size, x : x + size] = patch_colour(k)
        legend = overlay.text(legend, (x + size + 5, y - 2), f"{names[label]} ({n})", size=size)
    return np.concatenate([image, legend])


def as_seen(image: torch.Tensor, reader: ImageReader) -> np.ndarray:
    """A normalised (3, S, S) back to uint8 (S, S, 3)."""
    return ((image * reader.std + reader.mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def draw_batch(
    captions: CaptionSet, vocab: CaptionVocab, reader: ImageReader, patches: PatchLabels | None,
    batch_size: int, seed: int, columns: int = 4,
) -> np.ndarray:  # fmt: skip
    """Sheet of the first batch of captions: the image as the network sees it, the caption after encode and decode."""
    data = CaptionItems(captions, vocab, reader, seed=seed, patches=patches)
    cells, below = [], []
    for key in next(iter(StepBatches(len(data), batch_size, 0, 1, seed))):
        item = data[key]
        labels, names = np.full((1, 1), IGNORE), []
        if patches is not None:
            labels, names = item["patch_labels"].view(patches.grid).numpy(), patches.classes
        text = " ".join(vocab.itos[i] for i in item["tokens"].tolist())
        cells.append(draw_patches(as_seen(item["image"], reader), labels, names))
        below.append(f"{item['image_id']}/{item['annotation_id']}: {text}")
    return overlay.grid(cells, columns, below)
