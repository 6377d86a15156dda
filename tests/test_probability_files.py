"""utils/probability_files.py: what is written is what is read; anything without provenance is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from utils import probability_files as pf
from utils.run import UserError

META = {
    "checkpoint": "runs/unet/best",
    "checkpoint_sha256": "ab" * 32,
    "kind": "vessel_unet",
    "config": {"widths": [16, 32, 64]},
    "image": "images/a.jpg",
    "image_sha256": "cd" * 32,
    "text": None,
    "answer": None,
    "grid": None,
    "threshold": 0.45,
    "train_images": [{"name": "b", "sha256": "ef" * 32}],
}


def noise(h=13, w=17):
    return np.random.default_rng(0).random((h, w))


def refused(folder, *words) -> None:
    with pytest.raises(UserError) as e:
        pf.read_predictions(folder)
    assert all(word in str(e.value) for word in words) and "\n" not in str(e.value)


def edit(folder, **changes) -> None:
    path = folder / "a.png.meta.json"
    meta = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in meta.items() if v != "drop"}))


def test_round_trip(tmp_path):
    prob = noise()
    path = pf.write_probability(tmp_path / "new" / "out", "a", prob, META)
    with Image.open(path) as image:
        assert image.mode == "I;16" and image.size == (17, 13)
    read = pf.read_predictions(tmp_path / "new" / "out")
    assert list(read) == ["a"] and read["a"].failed is None
    assert read["a"].prob.dtype == np.float32 and np.abs(read["a"].prob - prob).max() < 1 / pf.LEVELS
    meta = read["a"].meta
    assert {k: meta[k] for k in META} == META | {"grid": [13, 17]}
    assert (meta["height"], meta["width"], meta["name"]) == (13, 17, "a")
    assert meta["command"] and meta["commit"] and meta["time_utc"].endswith("Z")
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.png", "a.png.meta.json"]


def test_a_decision_at_one_half_survives_the_rounding(tmp_path):
    near = 0.5 + np.array([-1, -1e-3, -1e-5, -1e-9, 0, 1e-9, 1e-5, 1e-3, 1]) / 2
    prob = np.concatenate([near, noise(1, 90)[0]]).reshape(9, 11)
    pf.write_probability(tmp_path, "a", prob, META)
    assert np.array_equal(pf.read_predictions(tmp_path)["a"].prob > 0.5, prob > 0.5)
    ends = np.array([[0.0, 1.0]], np.float32)
    pf.write_probability(tmp_path, "a", ends, META)
    assert np.array_equal(pf.read_predictions(tmp_path)["a"].prob, ends)


@pytest.mark.parametrize(("grid", "want"), [(256, [256, 256]), ((512, 480), [512, 480]), (None, [13, 17])])
def test_grid(tmp_path, grid, want):
    pf.write_probability(tmp_path, "a", noise(), META | {"grid": grid})
    assert pf.read_predictions(tmp_path)["a"].meta["grid"] == want


def test_failure_replaces_a_prediction(tmp_path):
    pf.write_probability(tmp_path, "a", noise(), META)
    pf.write_failure(tmp_path, "a", "the model did not say [SEG]", META)
    read = pf.read_predictions(tmp_path)["a"]
    assert read.prob is None and read.path is None and read.failed == "the model did not say [SEG]"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png.meta.json"]
    pf.write_probability(tmp_path, "a", noise(), META)
    assert pf.read_predictions(tmp_path)["a"].failed is None


def test_overlays_and_folders_below_are_passed_over(tmp_path):
    pf.write_probability(tmp_path, "a", noise(), META)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.overlay.png")
    pf.write_probability(tmp_path / "below", "b", noise(), META)
    assert list(pf.read_predictions(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("prob", "name", "meta"),
    [
        (np.zeros((3, 4), np.uint8), "a", META),
        (np.zeros((1, 3, 4)), "a", META),
        (np.full((3, 4), 1.01), "a", META),
        (np.full((3, 4), np.nan), "a", META),
        (np.zeros((3, 4)), "b/a", META),
        (np.zeros((3, 4)), "a.overlay", META),
        (np.zeros((3, 4)), "a", {k: v for k, v in META.items() if k != "image_sha256"}),
        (np.zeros((3, 4)), "a", META | {"kind": "unet"}),
        (np.zeros((3, 4)), "a", META | {"failed": "no memory"}),
        (np.zeros((3, 4)), "a", META | {"grid": [0, 4]}),
    ],
)
def test_misuse_writes_nothing(tmp_path, prob, name, meta):
    with pytest.raises(ValueError):
        pf.write_probability(tmp_path, name, prob, meta)
    assert not list(tmp_path.rglob("*.*"))


def test_refusals(tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "holds no predictions")
    path = pf.write_probability(tmp_path, "a", noise(), META)
    good = (tmp_path / "a.png.meta.json").read_text()

    def again() -> None:
        pf.write_probability(tmp_path, "a", noise(), META)
        (tmp_path / "a.png.meta.json").write_text(good)

    (tmp_path / "a.png.meta.json").unlink()
    refused(tmp_path, "a.png", "a.png.meta.json", "which model")
    for changes, words in [
        ({"checkpoint_sha256": "drop"}, ("does not say checkpoint_sha256",)),
        ({"name": "b"}, ("is about 'b'",)),
        ({"checkpoint_sha256": ""}, ("hashes",)),
        ({"height": 14}, ("13 x 17", "14 x 17")),
        ({"failed": "no memory"}, ("its PNG is there",)),
        ({"grid": "fine"}, ("grid is fine",)),
        ({"threshold": 2}, ("threshold is 2",)),
        ({"train_images": 20}, ("train_images is 20",)),
    ]:
        again()
        edit(tmp_path, **changes)
        refused(tmp_path, "a.png", *words)
    again()
    path.unlink()
    refused(tmp_path, "has no PNG")
    Image.fromarray(np.zeros((13, 17), np.uint8)).save(path)
    refused(tmp_path, "mode L", "16 bits")
    path.write_bytes(b"no picture")
    refused(tmp_path, "not readable")
    (tmp_path / "a.png.meta.json").write_text("{")
    refused(tmp_path, "not readable as JSON")


def test_a_cut_file_is_one_sentence(tmp_path):
    path = pf.write_probability(tmp_path, "a", noise(), META)
    path.write_bytes(path.read_bytes()[:120])
    prediction = pf.read_predictions(tmp_path)["a"]
    with pytest.raises(UserError, match="predict this image again"):
        _ = prediction.prob
