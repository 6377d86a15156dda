"""SAM3 snapshots: the tiny one loads everywhere and offline, and every broken folder ends in one sentence."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.sam3_video import modeling_sam3_video

from models.sam3_memory import MaskKernels
from models.sam3_tiny import save_tiny_snapshot, tiny_config, tiny_tokenizer
from models.sam3_tracker import ENV, KERNELS, Sam3Engine, load_processor, read_snapshot
from utils.run import UserError, cli

FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny_snapshot(tmp_path_factory.mktemp("sam3") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A folder with the snapshot's files as links, of which `change` may replace each."""
    return Path(shutil.copytree(tiny, tmp_path / "copy", copy_function=os.link))


def change(path: Path, content: str | bytes) -> None:
    path.unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def change_json(path: Path, *where: str, value) -> None:
    """Set one entry of a json file."""
    whole = inner = json.loads(path.read_text())
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    change(path, json.dumps(whole))


def change_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(snapshot) -> str:
    """The sentence with which it is refused."""
    with pytest.raises(UserError) as error:
        Sam3Engine.open(snapshot, torch.float32, "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def connect(*_):
        raise AssertionError("something wanted to connect")

    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.setattr(socket.socket, "connect", connect)


# ---- the tiny snapshot


def test_three_classes_load_it_completely(tiny):
    assert {p.name for p in tiny.iterdir()} == FILES
    for kind in (transformers.Sam3VideoModel, transformers.Sam3Model, transformers.Sam3TrackerVideoModel):
        model, found = kind.from_pretrained(tiny, dtype=torch.float32, local_files_only=True, output_loading_info=True)
        assert not any(found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (kind, found)
        assert not model.training
    for kind in (transformers.Sam3VideoProcessor, transformers.Sam3Processor, transformers.Sam3TrackerVideoProcessor):
        assert kind.from_pretrained(tiny, local_files_only=True).image_processor.size["height"] == 112


def test_names_are_those_of_the_released_model(tiny):
    parts = {re.match(r"(\w+\.\w+)", name)[1] for name in load_file(tiny / "model.safetensors")}
    assert {"tracker_model.mask_decoder", "tracker_model.memory_attention", "tracker_neck.fpn_layers"} <= parts
    assert {"detector_model.vision_encoder", "detector_model.text_encoder"} <= parts
    assert not {p for p in parts if p.endswith((".tracker_model", ".detector_model"))}


@pytest.mark.parametrize("save", ["ours", "transformers"])
def test_round_trip(tiny, tmp_path, save):
    """What training and saving again writes; save_pretrained of transformers 5.23 doubles a part of the names."""
    engine = Sam3Engine.open(tiny, torch.float32, "cpu")
    if save == "transformers":
        engine.model.save_pretrained(tmp_path / "again")
        engine.processor.save_pretrained(tmp_path / "again")
    else:
        save_tiny_snapshot(tmp_path / "again")
    again = Sam3Engine.open(tmp_path / "again", torch.float32, "cpu")
    old, new = engine.model.state_dict(), again.model.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert again.processor.tokenizer.get_vocab() == engine.processor.tokenizer.get_vocab()


def test_seed_decides_and_the_callers_random_state_stays(tiny, tmp_path):
    state = torch.random.get_rng_state()
    other = save_tiny_snapshot(tmp_path / "other", seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    a, b = (load_file(folder / "model.safetensors") for folder in (tiny, other))
    assert a.keys() == b.keys() and not all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UserError, match="other: exists already"):
        save_tiny_snapshot(tmp_path / "other")


def test_tokenizer(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert len(tokenizer) == 527 and tokenizer("ball")["input_ids"] == [begin, 514, end]
    padded = tokenizer("ball", padding="max_length", max_length=32)
    assert padded["input_ids"][3:] == [end] * 29 and sum(padded["attention_mask"]) == 3
    assert tokenizer("Tennis  RACKET")["input_ids"] == [begin, 524, 519, end]
    assert len(tokenizer("cat")["input_ids"]) == 5, "letters"
    assert tokenizer.decode(tokenizer("tennis ball")["input_ids"], skip_special_tokens=True) == "tennis ball"
    many = tiny_tokenizer(("racket", "rally", "shuttlecock", "ball"))
    assert [len(many(word)["input_ids"]) for word in ("rally", "shuttlecock")] == [3, 3]
    with pytest.raises(ValueError, match="'banana' is not one token"):
        tiny_tokenizer(("nan", "banana"))


def test_sizes():
    for size in (48, 100, 0):
        with pytest.raises(ValueError, match=f"size {size}: expected a multiple of 56"):
            tiny_config(tiny_tokenizer(), size)
    assert tiny_config(tiny_tokenizer(), 168).image_size == 168


# ---- opening


def test_environment_variable(tiny, monkeypatch):
    assert ENV == "HF_LOCAL_MODEL"
    assert f"set {ENV}=" in refused(None)
    monkeypatch.setenv(ENV, str(tiny))
    engine = Sam3Engine.open(None, torch.bfloat16, "cpu")
    assert engine.image_size == 112 and engine.dtype == torch.bfloat16 and engine.device.type == "cpu"
    assert not engine.model.training and {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    about = engine.about()
    assert json.loads(json.dumps(about)) == about and about["dtype"] == "bfloat16" and about["path"] == str(tiny)
    assert about["kernels"] == KERNELS and isinstance(modeling_sam3_video.cv_utils_kernel, MaskKernels)
    with pytest.raises(ValueError, match="mask_threshold 1.0"):
        Sam3Engine(engine.model, engine.processor, tiny, mask_threshold=1.0)


def hub_cache(copy: Path, main: str | None, snapshots=("abc",)) -> Path:
    """models--facebook--sam3 with its snapshots, of which refs/main names one."""
    root = copy.parent / "models--facebook--sam3"
    for name in snapshots:
        shutil.copytree(copy, root / "snapshots" / name)
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


@pytest.mark.parametrize("main, snapshots", [("abc", ("abc",)), ("def", ("abc", "def")), (None, ("abc",))])
def test_cache_folder_of_a_hub(copy, main, snapshots):
    root = hub_cache(copy, main, snapshots)
    assert read_snapshot(root)[0] == root / "snapshots" / (main or "abc")


@pytest.mark.parametrize(
    "main, snapshots, words",
    [(None, ("abc", "def"), "no refs/main, and snapshots/ holds abc, def"), ("xyz", ("abc",), "refs/main names xyz")],
)
def test_cache_folder_that_names_no_snapshot(copy, main, snapshots, words):
    assert words in refused(hub_cache(copy, main, snapshots))


def test_linked_weights(copy, tmp_path):
    weights = copy / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to("../blob")
    assert Sam3Engine.open(copy, torch.float32, "cpu").folder == copy
    (tmp_path / "blob").unlink()
    assert re.search(r"model.safetensors: a link to ../blob, which does not exist; .*cp -rL", refused(copy))


def split(folder: Path) -> None:
    """Weights in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(tensors)}
    for shard in set(where.values()):
        part = {k: v for k, v in tensors.items() if where[k] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def test_shards(copy):
    split(copy)
    assert Sam3Engine.open(copy, torch.float32, "cpu").folder == copy
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which model.safetensors.index.json names, is missing" in refused(copy)
    change(copy / "model.safetensors.index.json", "{}")
    assert "model.safetensors.index.json: not readable as an index" in refused(copy)


def test_tokenizer_of_two_files(copy):
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json or vocab.json + merges.txt is missing" in refused(copy), "merges.txt is not there"
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (copy / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    assert load_processor(*read_snapshot(copy)).tokenizer("racket")["input_ids"][1] == 519
    change(copy / "merges.txt", "#version: 0.2\n")
    assert "makes 'ball' 6 tokens, the model expects 527 and 3" in refused(copy)


@pytest.mark.parametrize(
    "name, words",
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "model.safetensors or model.safetensors.index.json is missing"),
        ("tokenizer.json", "tokenizer.json or vocab.json + merges.txt is missing"),
        ("processor_config.json", "processor_config.json or preprocessor_config.json is missing"),
    ],
)
def test_missing_file(copy, name, words):
    (copy / name).unlink()
    said = refused(copy)
    assert words in said and str(copy) in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_broken_json(copy, name):
    for content in ("{", "\xff"):
        change(copy / name, content.encode("latin-1"))
        assert f"{name}: not readable as JSON" in refused(copy)
    change(copy / name, "{}")
    assert "'sam3_video'" in refused(copy) if name == "config.json" else "cannot be built" in refused(copy)


def test_a_name_of_the_hub_is_no_folder():
    assert refused("facebook/sam3").startswith("facebook/sam3: no such folder; expected a local snapshot holding")


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("model_type",), "sam2_video", "a model of type 'sam2_video', expected 'sam3_video'"),
        (("low_res_mask_size",), "x", "config.json: no configuration of SAM3"),
        (("hotstart_delay",), 2, "config.json: no configuration of SAM3"),
        (("detector_config",), 3, "config.json: no configuration of SAM3"),
        (("detector_config", "text_config", "vocab_size"), 49408, "527 entries and makes 'ball' 3 tokens, the model"),
        (
            ("detector_config", "detr_decoder_config", "num_queries"),
            11,
            "query_embed.weight is (10, 128), not (11, 128",
        ),
        (("tracker_config", "memory_attention_num_layers"), 3, "missing tracker_model.memory_attention.layers.2."),
        (("tracker_config", "memory_attention_num_layers"), 1, "unexpected tracker_model.memory_attention.layers.1."),
    ],
)
def test_configuration_that_does_not_fit(copy, where, value, words):
    change_json(copy / "config.json", *where, value=value)
    assert words in refused(copy)


def test_processor_of_another_size(copy):
    change_json(copy / "processor_config.json", "image_processor", "size", value={"height": 56, "width": 56})
    assert "makes pictures of 56 px, the model expects 112" in refused(copy)


NAME = "tracker_model.mask_decoder.conv_s1.weight"


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda tensors: tensors.pop(NAME), f"missing {NAME};"),
        (lambda tensors: tensors.update(surplus=torch.zeros(2)), "unexpected surplus;"),
        (lambda tensors: tensors.update({NAME: torch.zeros(3)}), f"{NAME} is (3,), not"),
        (lambda tensors: tensors[NAME].fill_(float("nan")), f"not finite {NAME};"),
    ],
)
def test_tensors_that_do_not_fit(copy, edit, words):
    change_tensors(copy, edit)
    said = refused(copy)
    assert "does not fit SAM3" in said and words in said


def test_damaged_weights(copy):
    whole = (copy / "model.safetensors").read_bytes()
    for content in (whole[:100_000], b"version https://git-lfs.github.com/spec/v1\n"):
        change(copy / "model.safetensors", content)
        assert "the weights cannot be loaded (SafetensorError" in refused(copy)


def test_old_transformers(tiny, monkeypatch, capsys):
    monkeypatch.setattr("models.sam3_tracker.transformers.__version__", "4.57.1")
    assert refused(tiny) == "SAM3 needs transformers >= 5.0, found 4.57.1; install requirements.txt again"
    assert cli(lambda argv: Sam3Engine.open(tiny, torch.float32, "cpu")) == 2
    assert capsys.readouterr().err.startswith("error: SAM3 needs transformers")


# ---- prompts


def test_prompts(tiny):
    engine = Sam3Engine.open(tiny, torch.float32, "cpu")
    engine.check_prompts(["ball", "tennis ball", "racket"])
    with pytest.raises(UserError, match="'ball' and 'Ball' are the same text"):
        engine.check_prompts(["ball", "racket", "Ball"])
    for prompt, n in (("", 0), ("  ", 0), ("abcdefghij " * 4, 40)):
        with pytest.raises(UserError, match=f"has {n} tokens, expected 1 to 30"):
            engine.check_prompts([prompt])
    seen = engine.encode(np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(UserError, match="has 40 tokens"):
        engine.detect(seen, ["abcdefghij " * 4], 0.2)
    assert len(engine.detect(seen, ["tennis " * 30], 0.2)) == 1, "the longest prompt"
