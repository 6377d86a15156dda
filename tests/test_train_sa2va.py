"""train/train_sa2va.py on drawn vessels in CHASE_DB1's layout: what is trained, files, resume, ranks, refusals."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.vessel_questions import BACKGROUND, NONE, VesselQuestions
from data.vessels import VesselPatches, open_vessels
from models import sa2va_training
from models.sa2va import Sa2VA
from models.sa2va_lora import ABOUT, WEIGHTS, open_sa2va
from models.sa2va_losses import LossConfig
from models.sa2va_training import WithLosses, new_tiny
from models.sa2va_validation import crops_per_side, validate
from utils import run
from utils.weights import file_sha256

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
ROOT = Path(__file__).resolve().parents[1]
H, W = 56, 64
Y, X = np.mgrid[:H, :W]
DISC = np.hypot(Y - H / 2, X - W / 2) < 26
SMALL = {"sam_size": 128, "neck": 64, "sam_width": 16, "hidden": 64, "max_tiles": 1}


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def small_and_without_curves():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sa2va_training, "TINY", SMALL)
        patch.setattr(script("train/train_sa2va.py"), "curves", lambda *_: None)
        yield


def write_chase(root: Path, children: list[int]) -> None:
    """Dark wavy lines on a lit disc: photographs, masks of the first observer, fields of view."""
    for folder in ("images", "labels1", "masks"):
        (root / folder).mkdir(parents=True)
    for child in children:
        for k, eye in enumerate("LR"):
            rng = np.random.default_rng([child, k])
            middle = H / 2 + 8 * np.sin(X / 9 + rng.uniform(0, 6)) + rng.uniform(-8, 8)
            mask = (np.abs(Y - middle) < 2.5) & DISC
            grey = 150 - 60 * mask + rng.normal(0, 8, (H, W))
            photo = (grey[..., None] * [1, 0.6, 0.2] * DISC[..., None]).clip(0, 255).astype(np.uint8)
            Image.fromarray(photo).save(root / "images" / f"Image_{child:02d}{eye}.jpg", quality=95)
            Image.fromarray(mask).save(root / "labels1" / f"Image_{child:02d}{eye}_1stHO.png")
            Image.fromarray(DISC).save(root / "masks" / f"mask_{child:02d}{eye}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chase") / "root"
    write_chase(root, [1, 2, 3, 11])
    for path in root.glob("*/*11*"):  # the test split cannot be opened
        path.write_bytes(b"no picture " + path.name.encode())
    return root


def flags(data: Path, out: Path, /, **more) -> list[str]:
    """Arguments of a small run. more: flags that are added or replaced, as seed=1; None: left out."""
    options = {"data": data, "out": out, "device": "cpu", "tiny": True, "patch_size": 32, "batch_size": 2}
    options |= {"steps": 4, "print_every": 1, "warmup": 2, "val_images": 1, "val_every": 100, "rank": 4, "alpha": 8}
    if "init" in more or "resume" in more:
        options["tiny"] = more.get("tiny")
    words = []
    for name, value in (options | more).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(data: Path, out: Path, /, **more) -> Path:
    assert run.cli(script("train/train_sa2va.py").main, flags(data, out, **more)) == 0
    return out


def metrics(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "items_per_s"} for row in run.read_metrics(out)]


def assert_same(a: Path, b: Path, name: str = "model.safetensors") -> None:
    one, two = (load_file(out / "last" / name) for out in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert str(run.load_state(a / "last")["optimizer"]) == str(run.load_state(b / "last")["optimizer"])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run of the tiny model, all of which is trained."""
    return train(data, tmp_path_factory.mktemp("sa2va") / "run", val="03", val_every=2)


@pytest.fixture(scope="module")
def adapted(data, trained, tmp_path_factory) -> Path:
    """A run with LoRA that starts from it."""
    return train(data, tmp_path_factory.mktemp("lora") / "run", init=trained / "last", lr="1e-3", overfit=2)


# ---- runs


def test_a_run_leaves_a_checkpoint_that_predicts(data, trained):
    rows = metrics(trained)
    val = [row for row in rows if "dice_at_half" in row]
    assert [row["step"] for row in val] == [2, 4] and val[-1]["n"] == 1
    assert {"background", "swapped", "said", "threshold"} <= set(val[-1])
    for name in ("val.png", "metrics.csv", "run.json", "last/state.pt", "best/config.json", "last/preprocess.json"):
        assert (trained / name).stat().st_size > 100, name
    config = json.loads((trained / "last" / "config.json").read_text())
    seen = {x["name"]: x["sha256"] for x in config["train_images"]}
    assert sorted(seen) == ["Image_01L", "Image_01R", "Image_02L", "Image_02R"], "neither validation nor test"
    assert all(seen[n] == file_sha256(data / "images" / f"{n}.jpg") for n in seen)
    assert config["threshold"] == val[-1]["threshold"]
    best = max(val, key=lambda row: row["dice_at_half"])
    assert (trained / "best").resolve().name == f"step_{best['step']:06d}"
    found = Sa2VA.from_checkpoint(trained / "last").predict(np.zeros((H, W, 3), np.uint8), "What?", force_seg=True)
    assert found["masks"].shape == (1, H, W)


def test_lora_changes_only_what_it_should(trained, adapted):
    folder = adapted / "last"
    tensors, about = load_file(folder / WEIGHTS), json.loads((folder / ABOUT).read_text())
    assert about["rank"] == 4 and about["alpha"] == 8 and len(about["rows"]) == 5
    assert about["base"]["sha256"] == {"model.safetensors": file_sha256(trained / "last" / "model.safetensors")}
    assert not (folder / "model.safetensors").exists() and all(v.dtype == torch.float32 for v in tensors.values())
    base, merged = (load_file(x / "model.safetensors") for x in (trained / "last", adapted / "merged"))
    opened = open_sa2va(folder).state_dict()
    assert opened.keys() == merged.keys() and all(torch.equal(opened[k], merged[k]) for k in merged)
    moved = {k for k in base if not torch.equal(base[k], merged[k])}
    frozen = ("mllm.model.vision_tower.", "sam.vision_encoder.", "sam.prompt_encoder.", "sam.memory_")
    assert moved and not any(k.startswith(frozen) or "iou_prediction_head" in k or "layernorm" in k for k in moved)
    assert any(".mlp." in k for k in moved) and any("mask_decoder.conv_s0" in k for k in moved)
    rows = (base["mllm.lm_head.weight"] != merged["mllm.lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert set(rows) <= set(about["rows"]), "only rows of the new tokens"
    config = json.loads((adapted / "merged" / "config.json").read_text())
    assert len(config["train_images"]) == 4 and config["threshold"] is not None


def test_the_merged_checkpoint_runs_in_the_prediction_script(data, adapted, tmp_path):
    words = [str(data / "images" / "Image_01L.jpg"), "--ckpt", str(adapted / "merged"), "--device", "cpu"]
    words += ["--out", str(tmp_path / "pred"), "--text", "Please segment the blood vessels.", "--force-seg"]
    assert run.cli(script("eval/infer_vessels.py").main, words) == 0
    assert (tmp_path / "pred" / "Image_01L.png").is_file()


def test_recomputing_changes_no_gradient(data):
    found = []
    for recompute in (False, True):
        model = new_tiny(0, ("What?",)).train()
        model.set_trainable({"language model", "vision encoder", "mask decoder"})
        if recompute:
            model.mllm.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.mllm.is_gradient_checkpointing
        item = model.processor.encode(np.full((40, 40, 3), 99, np.uint8), "What?", "[SEG].", np.ones((1, 40, 40), bool))
        loss, _ = WithLosses(model, LossConfig())(model.processor.collate([item]))
        loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(found[0][k], g, atol=1e-6) for k, g in found[1].items())


def test_every_trained_parameter_takes_part_without_masks():
    model = new_tiny(0, ("What?",)).train()
    model.set_trainable({"SAM image encoder", "text_hidden_fcs", "mask decoder", "vision encoder", "projector", "head"})
    item = model.processor.encode(np.zeros((40, 40, 3), np.uint8), "What?", "There is no such object.")
    loss, _ = WithLosses(model, LossConfig())(model.processor.collate([item]))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_the_language_model_sees(data):
    """picture: the photograph and the patch; what is not in this patch but in the photograph has an empty mask."""
    items = open_vessels(data).split("train")
    module, processor = script("train/train_sa2va.py"), new_tiny(0, ("What?",)).processor
    questions = VesselQuestions(VesselPatches(items, 8, objects=True), {"object": 0.8, "absent": 0.2})
    said = {}
    for look in ("picture", "patch"):
        samples, found = module.Samples(questions, processor, look), []
        for k in range(60):
            item, asked = samples[(k, 0)], questions[(k, 0)]
            answer = processor.tokenizer.decode(item["labels"][item["labels"] >= 0])
            kind = "none" if NONE in answer else "empty" if not item["masks"].any() else "mask"
            found.append((asked["kind"], kind))
            assert tuple(item["size"]) == (8, 8) and item["sam_pixels"].shape[0] == 1
            shown = items[0].image() if look == "picture" else asked["image"]
            assert torch.equal(item["pixel_values"], processor.tiles(shown))
        said[look] = set(found)
    assert said["picture"] == {("object", "mask"), ("object", "empty"), ("absent", "none")}
    assert said["patch"] == {("object", "mask"), ("object", "none"), ("absent", "none")}


def test_parity_is_the_released_loss(data, tmp_path, monkeypatch):
    made, module = [], script("train/train_sa2va.py")
    monkeypatch.setattr(module, "WithLosses", lambda m, cfg: made.append(cfg) or WithLosses(m, cfg))
    train(data, tmp_path / "a", steps=1, parity=True, points=64)
    train(data, tmp_path / "b", steps=1, target="area", cldice=0.5)
    assert made[0] == LossConfig(target="grid", balance="official5", points=64)
    assert made[1] == LossConfig(target="area", cldice=0.5) and "cldice" in metrics(tmp_path / "b")[0]


# ---- validation


class Oracle:
    """Stands for find_with_sa2va: the truth where vessels are asked for, the rest for the background."""

    def __init__(self, items):
        self.truth = {item.image().tobytes(): item.load() for item in items}

    def __call__(self, model, image, text, boxes, *rest):
        x = self.truth[image.tobytes()]
        mask = x["mask"] if BACKGROUND not in text else ~x["mask"]
        return type("Found", (), {"prob": np.where(mask, 0.9, 0.2), "answer": "[SEG]" if len(boxes) > 1 else "no"})


def test_validation_of_a_perfect_model(data, monkeypatch):
    items = open_vessels(data).split("train")
    monkeypatch.setattr("models.sa2va_validation.find_with_sa2va", Oracle(items))
    ask = script("train/train_sa2va.py").asked(items)
    assert len(ask) == len(items) + 1 and BACKGROUND in ask[-1] and BACKGROUND not in ask[0]
    values, pictures = validate(None, items, ask, 32)
    assert values["dice_at_half"] == values["dice_at_chosen"] == values["background"] == values["said"] == 1
    assert values["swapped"] == 0 and values["shuffled"] < 0.6 and values["n"] == 6 and len(pictures) == 3
    assert 0.2 <= values["threshold"] < 0.9
    assert validate(None, items, ask, 0)[0]["said"] == 0, "whole pictures are one box"


def test_crops_are_at_most_a_patch():
    assert [crops_per_side((960, 999), p) for p in (0, 999, 998, 500)] == [1, 1, 2, 3]


# ---- the same again


def test_resume_is_exact(data, trained, tmp_path):
    whole = train(data, tmp_path / "whole", steps=3)
    part = train(data, tmp_path / "part", steps=3, stop_at=2)
    train(data, part, steps=3, resume="auto", tiny=True)
    assert_same(whole, part)
    assert metrics(whole) == metrics(part)


def test_resume_of_an_adapter_is_exact(data, trained, tmp_path):
    more = {"steps": 3, "lora_dropout": 0.3, "overfit": 1, "init": trained / "last"}
    whole = train(data, tmp_path / "whole", **more)
    part = train(data, tmp_path / "part", stop_at=2, **more)
    assert not (part / "merged").exists()
    train(data, part, resume="auto", **more)
    assert_same(whole, part, WEIGHTS)
    assert metrics(whole) == metrics(part)


def launch(data: Path, out: Path, **more) -> None:
    """Two processes on the CPU, with the small model."""
    start = "import sys; sys.path[:0] = sys.argv[1:3]; import test_train_sa2va as t; t.as_rank(sys.argv[3:])"
    script_file = out.with_suffix(".py")
    script_file.write_text(start)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script_file)]
    words = [*launcher, str(ROOT), str(ROOT / "tests"), *flags(data, out, **more)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)


def as_rank(argv: list[str]) -> None:
    sa2va_training.TINY = SMALL
    sys.exit(run.cli(script("train/train_sa2va.py").main, argv))


def assert_close(one: Path, two: Path, name: str = "model.safetensors") -> None:
    """Losses within 1e-4, weights within 1e-3: sums are taken in another order."""
    a, b = ([row["loss"] for row in metrics(out) if "loss" in row] for out in (one, two))
    assert a == pytest.approx(b, rel=1e-4) and len(a) == 3
    w, v = (load_file(out / "last" / name) for out in (one, two))
    assert w.keys() == v.keys() and max((w[k] - v[k]).abs().max().item() for k in w) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [None, True], ids=["ddp", "fsdp"])
def test_two_ranks_are_one_process_with_accum(data, trained, tmp_path, fsdp):
    more = {"steps": 3, "kinds": "40,30,0,30", "lr": "1e-4"}
    launch(data, tmp_path / "two", fsdp=fsdp, **more)
    one = train(data, tmp_path / "one", accum=2, **more)
    assert_close(one, tmp_path / "two")
    if fsdp:  # continued with shards, and adapters
        more |= {"steps": 3, "init": trained / "last", "overfit": 1}
        launch(data, tmp_path / "part", fsdp=True, stop_at=2, **more)
        launch(data, tmp_path / "part", fsdp=True, resume="auto", **more)
        assert_close(train(data, tmp_path / "lora", accum=2, **more), tmp_path / "part", WEIGHTS)


# ---- refusals


@pytest.mark.parametrize(
    "more, said",
    [
        ({"steps": 0}, "--steps 0"),
        ({"kinds": "1,2"}, "--kinds 1,2"),
        ({"kinds": "0,0,0,0"}, "above 0"),
        ({"tiny": None}, "--init and --tiny"),
        ({"init": "nowhere"}, "not a checkpoint folder"),
        ({"init": "nowhere", "tiny": True}, "expected one of them"),
        ({"policy": "bf16"}, "--policy bf16"),
        ({"policy": "bf16", "init": "nowhere"}, "give --dtype bf16"),
        ({"fsdp": True}, "torchrun"),
        ({"parity": True, "target": "area"}, "--parity"),
        ({"val": "03", "overfit": 1}, "--val"),
        ({"val": "11"}, "patient '11'"),
        ({"data": "nowhere"}, "nowhere"),
        ({"lr": 0.5}, "learning rate 0.2"),
    ],
    ids=str,
)
def test_flags_that_no_run_can_have(data, tmp_path, capsys, more, said):
    capsys.readouterr()
    assert run.cli(script("train/train_sa2va.py").main, flags(data, tmp_path / "run", **more)) == 2
    found = capsys.readouterr().err.strip()
    assert found.startswith("error: ") and "\n" not in found and said in found
    assert not (tmp_path / "run" / "last").exists()


def test_a_continuation_with_other_flags_is_refused(data, adapted, trained, capsys):
    more = {"resume": adapted / "last", "init": trained / "last", "lr": "1e-3", "overfit": 2}
    words = flags(data, adapted, **more, cldice=0.5)
    assert run.cli(script("train/train_sa2va.py").main, words) == 2
    assert "--cldice 0.0" in capsys.readouterr().err
    words = flags(data, adapted, **more | {"init": adapted / "merged"})
    assert run.cli(script("train/train_sa2va.py").main, words) == 2
    assert "trained on other weights" in capsys.readouterr().err
