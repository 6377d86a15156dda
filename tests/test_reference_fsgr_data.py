"""Vocabulary, readers and patch labels against stored files of COCO, M2 and Karpathy's splits.

Reads LAB_SHARED/data/fsgr, whatever is there: vocab/*.json.gz (itos, freqs), metric_cases/tokenizer/val2017*.tsv.gz,
karpathy/*.npz and *.json, coco_*classes.json, and the COCO folders coco*/ with captions, instances and images.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.caption_files import CaptionSet, check_files, read_splits
from data.caption_vocab import MAX_LEN, CaptionVocab, words
from data.coco_captions import IGNORE, CaptionCollate, CaptionItems, ImageItems, ImageReader, PatchLabels
from utils.run import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "fsgr"
PARTS = {"restval": "train", "dev": "val", "test": "test"}  # of the val2014 images, and with them of val2017


def files(pattern: str) -> list[Path]:
    found = sorted(SHARED.glob(pattern))
    if not found:
        pytest.skip(f"no reference files {pattern} in {SHARED}; set LAB_SHARED")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[:-1]
    head = lines[0].split("\t")
    return [dict(zip(head, line.split("\t"), strict=True)) for line in lines[1:]]


@pytest.fixture(scope="module")
def val2017(tmp_path_factory) -> Path:
    """A COCO folder with the stored captions of val2017, without images."""
    tables = [read_table(path) for path in files("metric_cases/tokenizer/val2017*.tsv.gz")]
    rows = {row["annotation_id"]: row for table in tables for row in table}.values()
    root = tmp_path_factory.mktemp("val2017")
    (root / "annotations").mkdir()
    images = [{"id": int(i), "file_name": f"{int(i):012d}.jpg"} for i in sorted({row["image_id"] for row in rows})]
    captions = [
        {"id": int(row["annotation_id"]), "image_id": int(row["image_id"]), "caption": row["caption"]} for row in rows
    ]
    content = {"images": images, "annotations": captions}
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    return root


# ---- words


def test_the_published_words_follow_from_their_counts(capsys):
    for path in files("vocab/*.json.gz"):
        content = json.loads(gzip.decompress(path.read_bytes()))
        vocab = CaptionVocab.from_freqs(content["freqs"], 5)
        assert vocab.itos == content["itos"] == CaptionVocab.load(path).itos
        with capsys.disabled():
            print(f"\n{path.name}: {len(vocab)} words rebuilt from {len(content['freqs'])} counts")


def test_few_words_of_val2017_are_unknown_to_m2(val2017, capsys):
    vocab = CaptionVocab.load(files("vocab/m2_vocab.json.gz")[0])
    captions = read_splits(val2017)["val"].captions()
    unknown, total = vocab.count_unknown(captions)
    lengths = np.array([len(words(c)) for c in captions])
    with capsys.disabled():
        print(f"\nval2017: {unknown} of {total} words unknown ({100 * unknown / total:.3f} %), longest {lengths.max()}")
    assert 100 * unknown / total == pytest.approx(0.48, abs=0.02)
    assert lengths.max() + 2 <= MAX_LEN


# ---- splits


def test_m2_ids_find_their_captions(val2017, capsys):
    """Each id that the caption file holds is found under its split, the five lowest of every image and no other."""
    chosen = {path: np.load(path) for path in files("karpathy/*.npz")}
    every = {i: sorted(k for k, _ in x["captions"]) for i, x in by_id(read_splits(val2017)["val"]).items()}
    for path, ids in chosen.items():
        found = read_splits(val2017, ids=path)
        for part, split in PARTS.items():
            here = set(ids[part].tolist()) & {k for ks in every.values() for k in ks}
            got = by_id(found[split])
            assert {k for x in got.values() for k, _ in x["captions"]} == here and found[split].dropped
            five = [i for i, x in got.items() if [k for k, _ in x["captions"]] == every[i][:5]]
            with capsys.disabled():
                print(
                    f"\n{path.name} {part}: {len(here)} captions, {len(five)} of {len(got)} images with the lowest five"
                )
            assert len(five) == len(got)


def by_id(captions: CaptionSet) -> dict:
    return {x["image_id"]: x for x in captions.images}


def test_the_ids_give_the_stored_images_of_each_split(val2017):
    ids = files("karpathy/*.npz")[0]
    found = read_splits(val2017, ids=ids)
    for path in files("karpathy/karpathy_split*.json"):
        stored = json.loads(path.read_text())
        for part, split in PARTS.items():
            assert sorted(by_id(found[split])) == sorted(stored[part])


def test_image_ids_are_refused_in_every_split_and_every_data_set(val2017, tmp_path, capsys):
    """Lists of image ids, as long as the real ones, against all of val2017 and against the few images of coco*/."""
    stored = json.loads(files("karpathy/karpathy_split*.json")[0].read_text())
    roots, n = [val2017, *[p.parent.parent for p in files("coco*/annotations/captions_val2017.json")]], 0
    for root in roots:
        held = {i for captions in read_splits(root).values() for i in by_id(captions)}
        for part in PARTS:
            for ids in (stored[part], sorted(set(stored[part]) | held)):
                np.savez(tmp_path / "ids.npz", **{part: np.array(ids)})
                if held & set(ids):
                    with pytest.raises(UserError, match=f"{part}: these are image ids; expected annotation ids"):
                        read_splits(root, ids=tmp_path / "ids.npz")
                    n += 1
    with capsys.disabled():
        print(f"\nlists of image ids refused: {n} of {n}")


# ---- images and instances


def coco_roots() -> list[Path]:
    return sorted({p.parent.parent for p in files("coco*/annotations/captions_*.json")})


def test_coco_folders_are_complete_and_make_batches(capsys):
    for root in coco_roots():
        for captions in read_splits(root).values():
            check_files(captions)
            vocab, reader = CaptionVocab.build(captions.captions(), 1), ImageReader(64)
            chosen = captions.images[:4]
            some = CaptionSet(captions.source, captions.split, chosen)
            data = CaptionItems(some, vocab, reader)
            batch = CaptionCollate(len(vocab))([data[k] for k in range(len(data))])
            assert batch["image"].isfinite().all() and batch["tokens"].max() < len(vocab)
            texts = [vocab.decode(row, collapse_repeats=False) for row in batch["tokens"]]
            assert texts == [" ".join(words(text)) for x in chosen for _, text in x["captions"]]
            assert len(ImageItems(captions, reader)) == len(captions)
            with capsys.disabled():
                print(f"\n{captions.summary()}")


def test_patch_labels_of_coco(capsys):
    """The classes are the stored ones in the order of their ids, and the labels are theirs: where a box of pycocotools
    does not reach, no patch has its class."""
    names = [c["name"] for c in json.loads(files("coco_*classes.json")[0].read_text())]
    reader, grid = ImageReader(224), (14, 14)
    for root in coco_roots():
        for captions in (x for x in read_splits(root).values() if x.instances):
            patches = PatchLabels(captions.instances, reader, grid)
            assert patches.classes == names
            content = json.loads(captions.instances[0].read_text())
            labelled, right = 0, 0
            for x in captions.images[:40]:
                i = x["image_id"]
                labels, (width, height) = patches(i).view(grid), patches.size(i)
                for row, column in (labels != IGNORE).nonzero().tolist():
                    left, top, right_, bottom = (
                        column * width / 14, row * height / 14, (column + 1) * width / 14, (row + 1) * height / 14
                    )  # fmt: skip
                    boxes = [
                        a["bbox"] for a in content["annotations"]
                        if a["image_id"] == i and patches.class_index[a["category_id"]] == labels[row, column]
                    ]  # fmt: skip
                    labelled += 1
                    right += any(
                        bx < right_ and bx + bw > left and by < bottom and by + bh > top for bx, by, bw, bh in boxes
                    )
            with capsys.disabled():
                print(
                    f"\n{root.name} {captions.split}: {right} of {labelled} labelled patches touch a box of their class"
                )
            assert right == labelled > 0
            share = torch.stack([patches(x["image_id"]) for x in captions.images]) != IGNORE
            assert 0.1 < share.float().mean() < 0.9
