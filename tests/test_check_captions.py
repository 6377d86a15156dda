"""data/check_dataset.py captions: counts, every problem as one sentence, the picture."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.caption_checks import as_seen, draw_patches, patch_colour
from data.caption_vocab import CaptionVocab
from data.coco_captions import ImageReader
from utils import overlay, run

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
SIZE = (40, 30)  # (W, H) px
CAPTIONS = ["A dog runs.", "The dog is running!", "a dog", "a dog", "A brown dog on the grass"]


def coco(root: Path, instances=True) -> Path:
    """Three train and two val images with five captions each; the left quarter of every image is a car."""
    for part, ids in (("train2017", (1, 2, 3)), ("val2017", (4, 5))):
        (root / part).mkdir(parents=True)
        for i in ids:
            Image.new("RGB", SIZE, (30 * i, 90, 200)).save(root / part / f"{i:012d}.jpg")
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in ids]
        texts = [(10 * i + n, i, c) for i in ids for n, c in enumerate(CAPTIONS)]
        captions = [{"id": k, "image_id": i, "caption": c} for k, i, c in texts]
        car = {"segmentation": [[0, 0, 10, 0, 10, 30, 0, 30]], "category_id": 3}
        files = {"captions": {"images": images, "annotations": captions}}
        if instances:
            objects = [{**car, "id": i, "image_id": i} for i in ids]
            categories = [{"id": 3, "name": "car"}, {"id": 9, "name": "boat"}]
            files["instances"] = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        for kind, content in files.items():
            (root / "annotations" / f"{kind}_{part}.json").write_text(json.dumps(content))
    return root


def check(*argv: object) -> int:
    spec = importlib.util.spec_from_file_location("check_dataset", ROOT / "data" / "check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run.cli(module.main, ["captions", *map(str, argv)])


def refused(capsys, *argv: object) -> str:
    assert check(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and "\n" not in err
    return err


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_counts(tmp_path, capsys):
    assert check(coco(tmp_path), "--min-freq", 4) == 0
    out = capsys.readouterr().out
    for line in (
        "train, 3 images, 15 captions; dropped: nothing",
        "val, 2 images, 10 captions; dropped: nothing",
        "vocabulary: 7 entries, built from train, words that occur 4 times or more",  # dog 15, a 12, the 6
        "train: captions per image 5/5/5 (min/median/max); 11 of 15 repeat another, 3 one of the same image; "
        "commonest 6 x 'a dog'; 0 without a word",
        "val: length 3.40 words, 95 % up to 6, longest 6; 0.00 % over 20 words, 0 captions cut to 54 tokens",
        "train: 3 of 3 images decoded, 40..40 x 30..30 px",
        "val: 2 classes; patches with a class 28.6 % (of one image 29..29 %), 0 images without, 1 classes seen",
        "no problem found",
    ):
        assert line in out, out


def test_limit_split_and_vocabulary(tmp_path, capsys):
    CaptionVocab.from_freqs({"a": 5, "dog": 5}).save(tmp_path / "v.json")
    root = coco(tmp_path / "coco", instances=False)
    assert check(root, "--limit", 2, "--split", "train", "--vocab", tmp_path / "v.json") == 0
    out = capsys.readouterr().out
    assert "train: 2 of 3 images decoded" in out and "val:" not in out
    assert "vocabulary: 6 entries" in out and "unknown to the vocabulary (47.06 %)" in out
    assert "no instances_*.json, so no patch labels" in out
    assert check(root, "--limit", 0) == 0 and "train: 3 of 3 images decoded" in capsys.readouterr().out


def test_ids(tmp_path, capsys):
    root, ids = coco(tmp_path / "coco"), tmp_path / "ids"
    ids.mkdir()
    np.save(ids / "coco_train_ids.npy", np.array([10, 11, 12, 13, 14, 20]))
    np.save(ids / "coco_dev_ids.npy", np.array([50, 51, 9]))
    assert check(root, "--ids", ids) == 0
    out = capsys.readouterr().out
    assert "train, 2 images, 6 captions" in out and "1 annotation ids that no caption file here holds" in out
    np.save(ids / "coco_dev_ids.npy", np.array([4, 5]))
    assert "dev: these are image ids; expected annotation ids" in refused(capsys, root, "--ids", ids)


def test_an_image_in_two_splits(tmp_path, capsys):
    root, ids = coco(tmp_path / "coco"), tmp_path / "ids"
    ids.mkdir()
    np.save(ids / "coco_train_ids.npy", np.array([10, 11]))
    np.save(ids / "coco_test_ids.npy", np.array([12, 50]))
    assert "image 1 is in train and in test" in refused(capsys, root, "--ids", ids, "--min-freq", 1)


def test_problems_are_one_sentence(tmp_path, capsys):
    root = coco(tmp_path / "coco")
    assert "FORMAT captions needs ROOT" in refused(capsys)
    assert "no such folder; expected" in refused(capsys, tmp_path / "absent")
    assert "--split test" in refused(capsys, root, "--split", "test")
    assert "--limit -1: expected at least 0" in refused(capsys, root, "--limit", -1)
    assert "--min-freq 0" in refused(capsys, root, "--min-freq", 0)
    CaptionVocab.from_freqs({"unlike": 9}).save(tmp_path / "v.json")
    assert "most words of train are unknown to it" in refused(capsys, root, "--vocab", tmp_path / "v.json")
    photo = root / "val2017" / f"{5:012d}.jpg"
    Image.new("RGB", SIZE[::-1]).save(photo)
    assert "is 30x40 px, its instances say 40x30" in refused(capsys, root)
    photo.write_bytes(b"no picture")
    assert "cannot be read as a picture" in refused(capsys, root)
    photo.unlink()
    assert "no such image file, and 1 of 2 images of val are missing" in refused(capsys, root)
    assert check(root, "--split", "train") == 0
    path = root / "annotations" / "captions_train2017.json"
    change(path, lambda c: [a.update(caption="word " * 60) for a in c["annotations"]])
    assert "most captions of train are cut" in refused(capsys, root, "--split", "train", "--min-freq", 1)


@pytest.mark.parametrize("text", ["a dog", "..."])
def test_captions_that_give_no_word_are_the_first_problem(tmp_path, capsys, text):
    (tmp_path / "captions.csv").write_text(f"image,caption,split\na.jpg,{text},train\nb.jpg,{text},val\n")
    assert "no word occurs 5 times or more" in refused(capsys, tmp_path)  # before the image files, which are absent
    if text == "a dog":
        assert "no such image file" in refused(capsys, tmp_path, "--min-freq", 1)
    vocab = {"itos": ["<unk>", "<pad>", "<bos>", "<eos>"], "freqs": {}, "min_freq": 5, "tokenizer": "ptb"}
    (tmp_path / "v.json").write_text(json.dumps(vocab))
    assert "v.json: vocabulary: holds no word" in refused(capsys, tmp_path, "--vocab", tmp_path / "v.json")
    (tmp_path / "captions.csv").write_text("image,caption\n")
    assert "has 0 rows" in refused(capsys, tmp_path)


@pytest.mark.parametrize("resize, share", [("squash", 4 / 14), ("crop", 3 / 14)])  # columns covered by 25 % or more
def test_picture(tmp_path, capsys, resize, share):
    sheet = tmp_path / "new" / "sheet.png"
    argv = ("--show", sheet, "--batch-size", 3, "--image-size", 64, "--resize", resize, "--min-freq", 1)
    assert check(coco(tmp_path / "coco"), *argv) == 0
    pixels = np.array(Image.open(sheet))
    assert pixels.shape[1] == 3 * 324 + 4 and pixels.shape[0] > 330
    left, right = pixels[20:300, 10:60].reshape(-1, 3).mean(0), pixels[20:300, 190:300].reshape(-1, 3).mean(0)
    assert left[0] > right[0] + 30  # the left edge is a car, tinted with the first colour
    assert f"patches with a class {100 * share:.1f} %" in capsys.readouterr().out


def test_picture_without_instances(tmp_path):
    assert check(coco(tmp_path / "coco", instances=False), "--show", tmp_path / "s.png", "--batch-size", 2) == 0
    assert np.array(Image.open(tmp_path / "s.png")).shape[1] == 2 * 452 + 4


def test_what_training_sees_is_the_image():
    reader = ImageReader(16)
    square = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(as_seen(reader.tensor(square), reader), square)


def test_patches_are_tinted_where_they_are():
    labels = np.full((4, 4), -1)
    labels[0, 3], labels[2:, :2] = 1, 0
    out = draw_patches(np.zeros((40, 40, 3), np.uint8), labels, ["cat", "dog"])
    assert out.shape[1] == 320 and out.shape[0] > 320
    assert not out[0:160, 0:240].any() and not out[80:320, 160:320].any()
    assert np.allclose(out[40, 280], np.array(patch_colour(1)) / 2, atol=1)  # one patch: the second colour
    assert np.allclose(out[240, 80], np.array(patch_colour(0)) / 2, atol=1)
    assert draw_patches(np.zeros((320, 320, 3), np.uint8), np.full((1, 1), -1), []).shape[0] < 330
    assert len({patch_colour(k) for k in range(3 * len(overlay.PALETTE))}) == 24
