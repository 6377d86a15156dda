"""Released weights become a checkpoint, exactly, or nothing is written."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from models.fastsam2 import FastSAM2, FastSAM2Config
from utils import run

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAB_SHARED", ROOT.parent / "shared")) / "data" / "fastsam2"
SMALL = {"queries": 5, "dim": 32, "hidden": 48, "embed_dim": 16, "compat": True}
spec = importlib.util.spec_from_file_location("convert_rapsam", ROOT / "models" / "convert_rapsam.py")
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


def released(folder: Path, backbone: str = "resnet18") -> tuple[FastSAM2, dict[str, torch.Tensor], list[str]]:
    """A small model, its weights under the released names, and the converter's arguments."""
    torch.manual_seed(0)
    model = FastSAM2(FastSAM2Config(classes=["cat", "sky"], backbone=backbone, **SMALL)).eval()
    names = {k: k.replace("head.", "panoptic_head.", 1) if k.startswith("head.") else k for k in model.state_dict()}
    state = {names[k]: v for k, v in model.state_dict().items() if k != "head.classifier"}
    classes = {"categories": [{"name": "cat", "isthing": 1}, {"name": "sky", "isthing": 0}]}
    (folder / "classes.json").write_text(json.dumps(classes))
    torch.save({"classifier": model.head.classifier}, folder / "classifier.pth")
    torch.save({"state_dict": state}, folder / "weights.pth")
    argv = [str(folder / "weights.pth"), "--classes", str(folder / "classes.json"), "--out", str(folder / "out")]
    return model, state, [*argv, "--classifier", str(folder / "classifier.pth")]


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
def test_the_converted_model_is_the_released_one(backbone, tmp_path, capsys):
    model, state, argv = released(tmp_path, backbone)
    assert run.cli(convert.main, argv) == 0
    said = capsys.readouterr().out
    assert f"{len(state)} tensors, each fits one of ours" in said and backbone in said
    ours = FastSAM2.from_checkpoint(tmp_path / "out" / "last").eval()
    assert ours.cfg.is_thing == [True, False] and ours.cfg.compat and ours.cfg.text == "clip"
    with torch.no_grad():
        a, b = (m(torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)) for m in (ours, model))
    torch.testing.assert_close(a["masks"][-1], b["masks"][-1], rtol=0, atol=0)
    torch.testing.assert_close(a["classes"][-1], b["classes"][-1], rtol=1e-6, atol=1e-4)  # normalised once more


def test_without_a_classifier_it_says_so(tmp_path, capsys):
    assert run.cli(convert.main, released(tmp_path)[2][:-2]) == 0
    assert "random class embeddings" in capsys.readouterr().out
    assert FastSAM2.from_checkpoint(tmp_path / "out" / "last").cfg.text == "random"


def change(state: dict, how: str) -> None:
    if how == "missing":
        del state["panoptic_head.prompt_iou.bias"]
    elif how == "unexpected":
        state["panoptic_head.more.weight"] = torch.zeros(1)
    elif how == "not (1, 128":
        state["neck.deconv.bias"] = torch.zeros(1, 64, 1, 1)
    elif how == "not finite":
        state["backbone.bn1.weight"][3] = torch.nan
    elif how == "two tensors would be head.kernels.weight":
        state["head.kernels.weight"] = torch.zeros(5, 32)
    elif how == "holds head.classifier already":
        state["head.classifier"] = torch.zeros(2, 1, 16)
    else:
        del state["panoptic_head.kernels.weight"]


@pytest.mark.parametrize("how", ["missing", "unexpected", "not (1, 128", "not finite", "holds head.classifier already",
                                 "two tensors would be head.kernels.weight", "no weights of RAP-SAM"])  # fmt: skip
def test_anything_else_is_refused_and_nothing_written(how, tmp_path, capsys):
    _, state, argv = released(tmp_path)
    change(state, how)
    torch.save(state, tmp_path / "weights.pth")
    assert run.cli(convert.main, argv) == 2
    said = capsys.readouterr()
    assert how in said.out + said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, said", [("{", "JSONDecodeError"), ("[]", "holds no class"), ("[3]", "TypeError"),
                                           ('[{"name": "cat", "isthing": 1}]', "K = 1 classes")])  # fmt: skip
def test_wrong_classes_are_refused(content, said, tmp_path, capsys):
    argv = released(tmp_path)[2]
    (tmp_path / "classes.json").write_text(content)
    assert run.cli(convert.main, argv) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_released_names_become_ours(capsys):
    """Names and shapes of the released neck and head, as listed, onto ours: a bijection."""
    files = sorted(SHARED.glob("ref_rapsam_head/param_names_shapes*.json"))
    if not files:
        pytest.skip(f"no name lists in {SHARED}; set LAB_SHARED")
    right = 0
    for path in files:
        listed = {name: torch.empty(shape, device="meta") for name, shape in json.loads(path.read_text())["params"]}
        theirs = {k.replace("head.", "panoptic_head.", 1) if k.startswith("head.") else k: v for k, v in listed.items()}
        state = convert.renamed(theirs)
        backbone = {"backbone.layer1.2.conv1.weight": None}  # ours to choose: not listed
        with torch.device("meta"):
            ours = FastSAM2(convert.config_of({**state, **backbone}, ["a"], [True], path.name)).state_dict()
        own = {
            k: v.shape
            for k, v in ours.items()
            if not k.startswith(("backbone.", "head.classifier")) and "num_batches" not in k
        }
        right += own == {k: v.shape for k, v in state.items()}
    with capsys.disabled():
        print(f"\nreleased names and shapes: {right} of {len(files)} lists fit")
    assert right == len(files)
