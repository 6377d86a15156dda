"""eval/infer_vessels.py: both models through one program, no masks, crops, failures that stay failures, refusals."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.sa2va import Sa2VA
from models.sa2va_lora import LORA_A, LORA_B, LoraSpec, base_files, open_sa2va, save_adapter
from models.sa2va_sizes import tiny_sa2va
from models.vessel_inference import boxes_of
from models.vessel_unet import VesselUNet, VesselUNetConfig
from utils import run
from utils.field_of_view import estimate_fov, fov_statistics
from utils.probability_files import read_predictions
from utils.weights import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
H, W = 90, 102
Y, X = np.mgrid[:H, :W]
DISC, NARROW = (np.hypot(Y - H / 2, X - W / 2) < r for r in (42, 30))  # what is lit, and what --fov says
NAMES = ["Image_11L", "Image_11R", "Image_12L"]


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> Path:
    """Three photographs in CHASE_DB1's layout, with masks and fields of view."""
    root = tmp_path / "chase"
    for folder in ("images", "labels1", "masks"):
        (root / folder).mkdir(parents=True)
    for k, name in enumerate(NAMES):
        rng = np.random.default_rng(k)
        mask = (np.abs(Y - H / 2 - 9 * np.sin(X / 9 + k)) < 3) & DISC
        grey = 110 + X / 2 - 60 * mask + rng.normal(0, 8, (H, W))
        photo = (grey[..., None] * [1, 0.6, 0.2] * DISC[..., None]).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "labels1" / f"{name}_1stHO.png")
        Image.fromarray(NARROW).save(root / "masks" / f"mask_{name.removeprefix('Image_')}.png")
    return root


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = VesselUNet(VesselUNetConfig([4, 8], threshold=0.45, train_images=[{"name": "a", "sha256": "00"}]))
    for _ in range(3):
        model(torch.randn(2, 3, 32, 32))
    return run.save_checkpoint(tmp_path_factory.mktemp("unet"), 1, model, model.config_dict(), {})


@pytest.fixture(scope="module")
def sa2va(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sa2va") / "tiny"
    tiny_sa2va(0).save(folder)
    return folder


def infer(pictures, ckpt: Path, out: Path, /, **more) -> int:
    """Exit code. more: flags, as tta=True."""
    words = [*map(str, pictures if isinstance(pictures, list) else [pictures]), "--ckpt", str(ckpt), "--out", str(out)]
    for name, value in ({"device": "cpu"} | more).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return run.cli(script("eval/infer_vessels.py").main, words)


def refused(capsys, *args, **more) -> str:
    """The sentence of a run that must be refused."""
    capsys.readouterr()
    assert infer(*args, **more) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    assert not args[2].exists() or not list(args[2].iterdir())
    return said


def image(data: Path, name: str) -> np.ndarray:
    return np.array(Image.open(data / "images" / f"{name}.png"))


# ---- the small U-Net


def test_probabilities_provenance_and_overlays(data, unet, tmp_path):
    out = tmp_path / "pred"
    assert infer(data / "images", unet, out) == 0
    found, model = read_predictions(out), VesselUNet.from_checkpoint(unet)
    assert list(found) == NAMES
    for name, p in found.items():
        photo = image(data, name)
        np.testing.assert_allclose(p.prob, model.predict(photo, estimate_fov(photo)), atol=1 / 65535)
        assert p.prob.std() > 0.01 and p.failed is None
        meta = p.meta
        assert meta["kind"] == "vessel_unet" and meta["threshold"] == 0.45 and meta["grid"] == [H, W]
        assert meta["checkpoint_sha256"] == file_sha256(unet / "model.safetensors")
        assert meta["image_sha256"] == file_sha256(data / "images" / f"{name}.png")
        assert meta["train_images"] == [{"name": "a", "sha256": "00"}] and meta["config"]["widths"] == [4, 8]
        assert meta["text"] is None and meta["answer"] is None and meta["config"]["flags"]["crops"] == 1
        overlay = np.array(Image.open(out / f"{name}.overlay.png"))
        np.testing.assert_array_equal((overlay != photo).any(-1), p.prob > 0.45, "tinted above the checkpoint's own")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{n}{s}" for n in NAMES for s in (".png", ".png.meta.json", ".overlay.png")
    )


def test_masks_are_never_opened(data, unet, tmp_path):
    """The same numbers with the mask folder there, with other masks in it, and without it."""
    assert infer(data / "images", unet, tmp_path / "a") == 0
    for path in (data / "labels1").iterdir():
        path.write_bytes(b"no picture")
    assert infer(data / "images", unet, tmp_path / "b") == 0
    shutil.rmtree(data / "labels1")
    shutil.rmtree(data / "masks")
    assert infer(data / "images", unet, tmp_path / "c") == 0
    for name in NAMES:
        a, b, c = ((tmp_path / k / f"{name}.png").read_bytes() for k in "abc")
        assert a == b == c


@pytest.mark.parametrize("flag", ["fov", "tta", "policy", "threshold"])
def test_flags_of_the_unet(data, unet, tmp_path, flag):
    value = {"fov": data / "masks", "tta": True, "policy": "bf16", "threshold": 0.6}[flag]
    assert infer(data / "images", unet, tmp_path / "pred", **{flag: value}) == 0
    model, p = VesselUNet.from_checkpoint(unet), read_predictions(tmp_path / "pred")[NAMES[0]]
    photo = image(data, NAMES[0])
    fov, more = estimate_fov(photo), {"tta": {"tta": True}, "policy": {"dtype": torch.bfloat16}}.get(flag, {})
    expected = model.predict(photo, NARROW if flag == "fov" else fov, **more)
    np.testing.assert_allclose(p.prob, expected, atol=1 / 65535)
    plain = model.predict(photo, fov)
    assert flag == "threshold" or np.abs(p.prob - plain).max() > 1e-4, "the flag does something"
    if flag == "threshold":
        overlay = np.array(Image.open(tmp_path / "pred" / f"{NAMES[0]}.overlay.png"))
        np.testing.assert_array_equal((overlay != photo).any(-1), p.prob > 0.6)
        assert p.meta["threshold"] == 0.45, "the checkpoint's own stays what evaluation reads"


def test_crops_of_the_unet_are_standardised_as_the_whole_picture(data, unet, tmp_path):
    assert infer(data / "images", unet, tmp_path / "pred", crops=2, overlap=0) == 0
    model, found = VesselUNet.from_checkpoint(unet), read_predictions(tmp_path / "pred")
    for name in NAMES:
        photo = image(data, name)
        fov, part = estimate_fov(photo), np.s_[: H // 2, : W // 2]
        expected = model.predict(photo[part], fov[part], statistics=fov_statistics(photo, fov))
        np.testing.assert_allclose(found[name].prob[part], expected, atol=1 / 65535)
        assert np.abs(model.predict(photo[part], fov[part]) - expected).max() > 1e-3, "its own statistics differ"
        assert found[name].meta["grid"] == [H, W]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(960, 999), (584, 565), (2336, 3504), (90, 102)])
def test_as_many_crops_as_asked_for(n, size):
    assert len(boxes_of(np.zeros((*size, 3), np.uint8), n, 0.25)) == n**2


def test_a_photograph_that_fails_is_reported_and_nothing_stands_in(data, unet, tmp_path, capsys):
    broken = data / "images" / f"{NAMES[1]}.png"
    broken.write_bytes(broken.read_bytes()[:300])
    assert infer(data / "images", unet, tmp_path / "pred") == 1
    said = capsys.readouterr()
    assert f"failed: {NAMES[1]}" in said.err and "1 of 3 pictures failed" in said.err and NAMES[1] in said.out
    found = read_predictions(tmp_path / "pred")
    assert [n for n in NAMES if found[n].failed] == [NAMES[1]] and "cannot be read" in found[NAMES[1]].failed
    assert not (tmp_path / "pred" / f"{NAMES[1]}.png").exists() and found[NAMES[0]].prob.any()


def test_probabilities_that_are_not_finite_are_a_failure(data, unet, tmp_path, monkeypatch):
    predict = VesselUNet.predict
    monkeypatch.setattr(VesselUNet, "predict", lambda *a, **kw: predict(*a, **kw) * np.nan)
    assert infer(data / "images", unet, tmp_path / "pred") == 1
    assert all("not finite" in p.failed for p in read_predictions(tmp_path / "pred").values())


# ---- Sa2VA


def test_sa2va_through_the_same_program(data, sa2va, tmp_path):
    photo, out = data / "images" / f"{NAMES[0]}.png", tmp_path / "pred"
    text = "Please segment the blood vessels."
    assert infer(photo, sa2va, out, text=text, force_seg=True) == 0
    (p,) = read_predictions(out).values()
    said = Sa2VA.from_checkpoint(sa2va).predict(image(data, NAMES[0]), text, force_seg=True)
    np.testing.assert_allclose(p.prob, said["probs"][0].numpy(), atol=1 / 65535)
    assert p.meta["kind"] == "sa2va" and p.meta["text"] == text and p.meta["answer"] == said["text"]
    assert p.meta["grid"] == list(said["logits"].shape[-2:]) and p.meta["threshold"] is None
    assert p.meta["train_images"] is None and "[SEG]" in p.meta["answer"] and p.prob.std() > 0


def test_crops_of_sa2va_come_from_one_answer(data, sa2va, tmp_path, monkeypatch):
    told, predict = [], Sa2VA.predict
    monkeypatch.setattr(Sa2VA, "predict", lambda self, *a, **kw: told.append(predict(self, *a, **kw)) or told[-1])
    photo, more = data / "images" / f"{NAMES[0]}.png", {"text": "vessels", "force_seg": True}
    assert infer(photo, sa2va, tmp_path / "pred", crops=2, overlap=0, **more) == 0
    (p,), (said,) = read_predictions(tmp_path / "pred").values(), told
    model, picture = Sa2VA.from_checkpoint(sa2va), image(data, NAMES[0])
    corner = np.ascontiguousarray(picture[: H // 2, : W // 2])
    logits, _ = model.masks_from_prompts([corner], said["prompts"])
    size, side = corner.shape[:2], model.sam.image_size
    wide = torch.nn.functional.interpolate(logits[:, 0][None], (side, side), mode="bilinear")
    expected = torch.nn.functional.interpolate(wide, size, mode="bilinear")[0, 0].sigmoid().numpy()
    np.testing.assert_allclose(p.prob[: H // 2, : W // 2], expected, atol=2 / 65535)
    assert p.meta["grid"] == [2 * n for n in said["logits"].shape[-2:]]


def test_an_answer_without_seg_found_nothing(data, sa2va, tmp_path, monkeypatch):
    monkeypatch.setattr(Sa2VA, "generate", lambda self, items, *_: [self.processor.ids("no vessels")] * len(items))
    assert infer(data / "images" / f"{NAMES[0]}.png", sa2va, tmp_path / "pred", text="vessels", crops=2) == 0
    (p,) = read_predictions(tmp_path / "pred").values()
    assert p.failed is None and not p.prob.any() and p.meta["answer"] and "[SEG]" not in p.meta["answer"]


def test_an_adapter_is_merged_into_its_base(data, sa2va, tmp_path):
    model, layer = Sa2VA.from_checkpoint(sa2va), "mllm.model.language_model.layers.0.mlp.up_proj"
    rows, columns = model.get_submodule(layer).weight.shape
    pair = {layer + LORA_A: torch.randn(2, columns), layer + LORA_B: torch.randn(rows, 2)}
    base, config = {"folder": str(sa2va), "sha256": base_files(sa2va)}, model.config_dict() | {"threshold": 0.3}
    save_adapter(tmp_path / "adapter", pair, LoraSpec(2, 4.0), base, config, model.processor.save)
    more = {"text": "vessels", "force_seg": True}
    for name, ckpt in (("merged", tmp_path / "adapter"), ("base", sa2va)):
        assert infer(data / "images" / f"{NAMES[0]}.png", ckpt, tmp_path / name, **more) == 0
    (merged,), (plain,) = (read_predictions(tmp_path / k).values() for k in ("merged", "base"))
    expected = open_sa2va(tmp_path / "adapter").predict(image(data, NAMES[0]), "vessels", force_seg=True)["probs"][0]
    np.testing.assert_allclose(merged.prob, expected.numpy(), atol=1 / 65535)
    assert np.abs(merged.prob - plain.prob).max() > 1e-3 and merged.meta["threshold"] == 0.3
    assert merged.meta["checkpoint_sha256"] == file_sha256(tmp_path / "adapter" / "adapter.safetensors")


def test_a_device_map_is_printed_and_changes_no_number(data, sa2va, tmp_path, monkeypatch, capsys):
    """cpu and cpu:0 stand for two GPUs."""
    module, start = script("eval/infer_vessels.py"), run.start
    photo, more = data / "images" / f"{NAMES[0]}.png", {"text": "vessels", "force_seg": True}
    assert infer(photo, sa2va, tmp_path / "one", **more) == 0

    def started(*args):
        r = start(*args)
        r.device = torch.device("cuda")
        return r

    monkeypatch.setattr(run, "start", started)
    monkeypatch.setattr(run, "finish", lambda *_: None)  # it names the GPU
    monkeypatch.setattr(module, "free_memory", lambda kind: {"cpu": 2.0, "cpu:0": 2.0} if kind == "cuda" else {})
    capsys.readouterr()
    assert infer(photo, sa2va, tmp_path / "two", device="auto", device_map="auto", **more) == 0
    assert "# device map\ncpu: " in capsys.readouterr().out
    assert (tmp_path / "one" / f"{NAMES[0]}.png").read_bytes() == (tmp_path / "two" / f"{NAMES[0]}.png").read_bytes()


# ---- refusals


@pytest.mark.parametrize(
    "kind, more, said",
    [
        ("unet", {"text": "vessels"}, "--text"),
        ("unet", {"force_seg": True}, "--force-seg"),
        ("unet", {"max_new_tokens": 9}, "--max-new-tokens"),
        ("sa2va", {}, "--text"),
        ("sa2va", {"text": "vessels", "tta": True}, "--tta"),
        ("sa2va", {"text": "vessels", "fov": "masks"}, "--fov"),
        ("unet", {"device_map": "auto"}, "--device-map"),
        ("sa2va", {"text": "vessels", "device_map": "auto"}, "spreads over all GPUs"),
        ("unet", {"overlap": 0.5}, "--overlap"),
        ("unet", {"crops": 0}, "--crops 0"),
        ("unet", {"threshold": 1.5}, "--threshold 1.5"),
        ("unet", {"policy": "fp16"}, "half precision needs a GPU"),
        ("unet", {"fov": "nowhere"}, "--fov nowhere"),
        ("nowhere", {}, "not a checkpoint folder"),
    ],
    ids=str,
)
def test_flags_that_no_run_can_have(data, unet, sa2va, tmp_path, capsys, kind, more, said):
    ckpt = {"unet": unet, "sa2va": sa2va, "nowhere": tmp_path / "nowhere"}[kind]
    assert said in refused(capsys, data / "images", ckpt, tmp_path / "pred", **more)


def test_masks_given_as_photographs_are_refused(data, unet, tmp_path, capsys):
    assert "named like a mask" in refused(capsys, data / "labels1", unet, tmp_path / "pred")
    assert "named like a mask" in refused(capsys, data / "masks", unet, tmp_path / "pred")


def test_two_pictures_of_one_name_and_a_used_folder_are_refused(data, unet, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    shutil.copy(data / "images" / f"{NAMES[0]}.png", tmp_path / "more")
    both = [data / "images", tmp_path / "more"]
    assert "rename or leave out one" in refused(capsys, both, unet, tmp_path / "pred")
    assert infer(tmp_path / "more", unet, tmp_path / "pred") == 0
    before = {p: p.read_bytes() for p in (tmp_path / "pred").iterdir()}
    assert infer(tmp_path / "more", unet, tmp_path / "pred") == 2
    assert "holds predictions already" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "pred").iterdir()}


def test_a_checkpoint_of_another_system_is_refused(data, unet, tmp_path, capsys):
    folder = shutil.copytree(unet, tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"model": "fsgr"}))
    assert "holds neither a vessel U-Net nor a Sa2VA" in refused(capsys, data / "images", folder, tmp_path / "pred")
