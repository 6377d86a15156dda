"""models/convert_sa2va.py: files of every layout become each other exactly, or nothing is written."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.sa2va import Sa2VA
from models.sa2va_names import from_official, to_official
from models.sa2va_processor import NEW_TOKENS
from models.sa2va_released import released_config, released_sizes
from models.sa2va_sizes import tiny_sa2va
from utils import run

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden": 32, "sam_width": 8, "neck": 64, "sam_size": 64, "max_tiles": 2}
LLM = "mllm.model.language_model.base_model.model."
spec = importlib.util.spec_from_file_location("convert_sa2va", ROOT / "models" / "convert_sa2va.py")
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


def tiny(seed: int, arch: str = "internvl", **sizes) -> Sa2VA:
    """A small random model, larger weights than at initialisation so that each of them shows in the answers."""
    model = tiny_sa2va(seed, arch, **sizes)
    if arch == "internvl":
        model.cfg.mllm["image_seq_length"] = 4  # text positions of a 56 px tile
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """lab/ (ours), released/ (converted from it by the program), sam.json, iter.safetensors, probe.safetensors."""
    root = tmp_path_factory.mktemp("sa2va")
    model = tiny(0, **SMALL)
    model.save(root / "lab")
    (root / "sam.json").write_text(json.dumps(model.cfg.sam))
    save_file(trained(model), root / "iter.safetensors")
    assert (
        tool(root, "lab", to="official", out="released", more=["--write-probe", str(root / "probe.safetensors")]) == 0
    )
    return root


def tool(root: Path, source: str, to: str | None = None, out: str = "out", more: list[str] = ()) -> int:
    """Run the program on root/source, into root/out."""
    where = ["--to", to, "--out", str(root / out)] if to else []
    return run.cli(convert.main, [str(root / source), "--sam-config", str(root / "sam.json"), *where, *more])


def trained(model: Sa2VA, seed: int = 1) -> dict[str, torch.Tensor]:
    """What xtuner would have stored of a training of `model`: LoRA of rank 2, full token matrices, projector, fcs,
    mask decoder."""
    g = torch.Generator().manual_seed(seed)
    official = to_official(model.state_dict())
    out = {}
    for name, v in official.items():
        if name.startswith("language_model.model.layers.") and name.endswith("proj.weight"):
            stem = f"{LLM}{name.removeprefix('language_model.').removesuffix('.weight')}.lora_"
            out[f"{stem}A.default.weight"] = torch.randn(2, v.shape[1], generator=g)
            out[f"{stem}B.default.weight"] = torch.randn(v.shape[0], 2, generator=g)
        for part in ("model.embed_tokens", "lm_head"):
            if name == f"language_model.{part}.weight":
                out[f"{LLM}{part}.modules_to_save.default.weight"] = v + torch.randn(v.shape, generator=g)
        if name.startswith(("text_hidden_fcs.", "grounding_encoder.sam2_model.sam_mask_decoder.", "mlp1.")):
            outer = "mllm.model." if name.startswith("mlp1.") else ""
            out[outer + name] = v + torch.randn(v.shape, generator=g)
    return out


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors under the same names and types."""
    x, y = ({k: v for f in sorted(p.glob("*.safetensors")) for k, v in load_file(f).items()} for p in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def test_ours_to_released_and_back(folders, tmp_path, capsys):
    assert tool(folders, "released", to="lab", out="again", more=["--probe", str(folders / "probe.safetensors")]) == 0
    assert "text_logits differ by 0" in capsys.readouterr().out
    assert same(folders / "again", folders / "lab")
    config = json.loads((folders / "again" / "config.json").read_text())
    assert config["model"] == json.loads((folders / "lab" / "config.json").read_text())["model"]
    before, after = (json.loads((folders / k / "preprocess.json").read_text()) for k in ("lab", "again"))
    held = ("arch", "tile", "tile_tokens", "mean", "std", "sam_size")  # the rest is not in a released folder
    assert all(before[k] == after[k] for k in held) and after["max_tiles"] == 12
    names = set(load_file(folders / "released" / "model.safetensors"))
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in names and "language_model.lm_head.weight" in names
    Sa2VA.from_checkpoint(folders / "again")


def test_shards_on_both_sides(folders, tmp_path, monkeypatch):
    shutil.copy(folders / "sam.json", tmp_path)
    tiny(0, **SMALL).save(tmp_path / "lab", shard_bytes=2e6)
    assert (tmp_path / "lab" / "model.safetensors.index.json").is_file()
    small = lambda *a: write(*a, shard_bytes=2e6)  # noqa: E731
    write = convert.write_folder
    monkeypatch.setattr(convert, "write_folder", small)
    assert tool(tmp_path, "lab", to="official", out="released") == 0
    assert len(list((tmp_path / "released").glob("model-*.safetensors"))) > 1
    assert same(tmp_path / "released", folders / "released")
    assert tool(tmp_path, "released", to="lab", out="again") == 0 and same(tmp_path / "again", folders / "lab")
    next((tmp_path / "released").glob("model-00002*")).unlink()
    assert tool(tmp_path, "released", to="lab", out="never") == 2 and not (tmp_path / "never").exists()


def test_a_training_file(folders, capsys):
    alpha = ["--base", str(folders / "lab"), "--alpha", "4"]
    assert tool(folders, "iter.safetensors", to="lab", out="tuned", more=[*alpha, "--fingerprint"]) == 0
    said = capsys.readouterr().out
    n = len(load_file(folders / "iter.safetensors"))
    assert f"{n} source tensors used, 0 unused" in said
    assert re.search(r"projector +6 of +6 tensors differ", said) and re.search(r"SAM memory +0 of", said)
    tuned, lab = (load_file(folders / k / "model.safetensors") for k in ("tuned", "lab"))
    file = load_file(folders / "iter.safetensors")
    stem = f"{LLM}model.layers.0.mlp.up_proj.lora_"
    name = "mllm.model.language_model.layers.0.mlp.up_proj.weight"
    expected = lab[name] + 4 / 2 * file[f"{stem}B.default.weight"] @ file[f"{stem}A.default.weight"]
    torch.testing.assert_close(tuned[name], expected, rtol=0, atol=1e-5)
    assert torch.equal(tuned["text_hidden_fcs.0.bias"], file["text_hidden_fcs.0.bias"])
    base = ["--base", str(folders / "released"), "--alpha", "4"]
    assert tool(folders, "iter.safetensors", to="lab", out="tuned2", more=base) == 0
    assert same(folders / "tuned2", folders / "tuned")


def test_two_training_files_have_two_fingerprints(folders, capsys):
    save_file(trained(tiny(0, **SMALL), seed=2), folders / "iter2.safetensors")
    said = []
    for file in ("iter.safetensors", "iter2.safetensors", "iter.safetensors"):
        assert tool(folders, file, more=["--base", str(folders / "lab"), "--alpha", "4", "--fingerprint"]) == 0
        said.append(
            dict(line.split("  ")[::-1] for line in re.findall(r"(?m)^[0-9a-f]{16}  .+$", capsys.readouterr().out))
        )
    assert said[0] == said[2] and len(said[0]) == 10
    differ = {group for group in said[0] if said[0][group] != said[1][group]}
    assert differ == {"language model", "token embeddings", "head", "projector", "text_hidden_fcs", "mask decoder"}


def test_a_training_file_over_a_plain_language_model_and_sam2(folders, tmp_path):
    """The base lacks text_hidden_fcs and Sa2VA's tokens; SAM 2 lies in its own file, with its own names."""
    shutil.copy(folders / "sam.json", tmp_path)
    shutil.copytree(folders / "released", tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "model.safetensors")
    sam = {k.removeprefix(convert.SAM2): v for k, v in state.items() if k.startswith(convert.SAM2)}
    sam = {k.replace(".g_weight", ".gamma"): v for k, v in sam.items()}
    torch.save({"model": sam}, tmp_path / "sam2.pt")
    words = len(NEW_TOKENS)
    plain = {k: v for k, v in state.items() if k.startswith(("vision_model.", "language_model.", "mlp1."))}
    for k in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        plain[k] = plain[k][:-words].contiguous()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    drop_new_tokens(tmp_path / "plain" / "tokenizer.json")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["llm_config"]["vocab_size"] -= words
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    (tmp_path / "iter.safetensors").write_bytes((folders / "iter.safetensors").read_bytes())
    more = ["--base", str(tmp_path / "plain"), "--sam2", str(tmp_path / "sam2.pt"), "--alpha", "4"]
    assert tool(tmp_path, "iter.safetensors", to="lab", more=more) == 0
    assert tool(folders, "iter.safetensors", to="lab", out="whole",
                more=["--base", str(folders / "lab"), "--alpha", "4"]) == 0  # fmt: skip
    assert same(tmp_path / "out", folders / "whole")
    assert tool(tmp_path, "iter.safetensors", to="lab", out="no", more=more[:2] + more[4:]) == 2


def drop_new_tokens(path: Path) -> None:
    content = json.loads(path.read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in NEW_TOKENS]
    path.write_text(json.dumps(content))
    about = path.with_name("tokenizer_config.json")
    held = json.loads(about.read_text())
    known = held.get("added_tokens_decoder", {}).items()
    held["added_tokens_decoder"] = {k: v for k, v in known if v["content"] not in NEW_TOKENS}
    about.write_text(json.dumps(held))


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "qwen3_vl"])
def test_the_qwen_lines(arch, tmp_path):
    model = tiny(0, arch, **SMALL)
    model.save(tmp_path / "lab")
    (tmp_path / "sam.json").write_text(json.dumps(model.cfg.sam))
    assert tool(tmp_path, "lab", to="official", out="released") == 0
    eyes = {"image_mean": model.processor.cfg.mean, "image_std": model.processor.cfg.std}
    assert tool(tmp_path, "released", to="lab") == 2  # a released folder of this line has this file
    (tmp_path / "released" / "preprocessor_config.json").write_text(json.dumps(eyes))
    assert tool(tmp_path, "released", to="lab") == 0 and same(tmp_path / "out", tmp_path / "lab")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"] == json.loads((tmp_path / "lab" / "config.json").read_text())["model"]


def test_the_internlm2_line(folders, tmp_path):
    """Our internvl class with a Llama text model; the released names are InternLM2's."""
    model = tiny(0, **SMALL)
    text = model.cfg.mllm["text_config"]
    text |= {"model_type": "llama", "attention_bias": False, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}  # fmt: skip
    keep = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type",
            "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "attention_bias",
            "tie_word_embeddings", "hidden_act"}  # fmt: skip
    model.cfg.mllm["text_config"] = {k: v for k, v in text.items() if k in keep}
    Sa2VA(model.cfg, model.processor).save(tmp_path / "lab")
    shutil.copy(folders / "sam.json", tmp_path)
    assert tool(tmp_path, "lab", to="official", out="released") == 0
    assert "language_model.model.layers.1.attention.wqkv.weight" in load_file(tmp_path / "released/model.safetensors")
    assert tool(tmp_path, "released", to="lab") == 0 and same(tmp_path / "out", tmp_path / "lab")
    sizes = json.loads((tmp_path / "out" / "config.json").read_text())["model"]["mllm"]["text_config"]
    assert all(sizes[k] == v for k, v in model.cfg.mllm["text_config"].items())


def test_released_sizes_of_our_config_are_ours():
    model = tiny(0, **SMALL)
    config = released_config(model.cfg, "internvl")
    assert json.loads(json.dumps(config)) == config
    again = released_sizes(config, "internvl", model.processor.image_id)
    assert again == model.cfg.mllm


# ---- refused, with nothing written


def spoil(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    fcs, decoder = "text_hidden_fcs.0.weight", convert.SAM2 + "sam_mask_decoder.iou_token.weight"
    if how == "removed":
        del state[decoder]
    elif how == "added":
        state[convert.SAM2 + "obj_ptr_tpos_proj.weight"] = torch.zeros(2, 2)
    elif how == "reshaped":
        state["mlp1.3.weight"] = state["mlp1.3.weight"].reshape(-1)
    elif how == "not finite":
        state[fcs][0, 0] = float("inf")
    elif how == "another model":
        state = to_official(tiny(0, **{**SMALL, "hidden": 48}).state_dict())
    elif how == "another vocabulary":
        state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"][:-1].contiguous()
    save_file(state, file)


@pytest.mark.parametrize("how", ["removed", "added", "reshaped", "not finite", "another model", "another vocabulary"])
def test_a_spoiled_released_folder_is_refused(how, folders, tmp_path, capsys):
    shutil.copy(folders / "sam.json", tmp_path)
    shutil.copytree(folders / "released", tmp_path / "released")
    spoil(tmp_path / "released", how)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert tool(tmp_path, "released", to="lab") == 2
    said = capsys.readouterr()
    assert "listed above; nothing is written" in said.err and re.search("unused|unfilled|conflict", said.out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_swapped_tensors_are_caught_by_the_probe(folders, tmp_path, capsys):
    """Equal shapes: names and shapes say nothing; what the model answers does."""
    shutil.copy(folders / "sam.json", tmp_path)
    shutil.copytree(folders / "released", tmp_path / "released")
    file = tmp_path / "released" / "model.safetensors"
    for a, b in (("vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model.encoder.layers.1.mlp.fc1.weight"),
                 (convert.SAM2 + "memory_attention.layers.0.linear1.weight",
                  convert.SAM2 + "memory_attention.layers.1.linear1.weight")):  # fmt: skip
        state = load_file(folders / "released" / "model.safetensors")
        save_file({**state, a: state[b], b: state[a]}, file)
        probe = ["--probe", str(folders / "probe.safetensors")]
        assert tool(tmp_path, "released", to="lab", more=probe) == 2 and not (tmp_path / "out").exists()
        assert re.search("(hidden|mask_logits) differ by .* nothing is written", capsys.readouterr().err)


def test_a_spoiled_training_file_is_refused(folders, tmp_path, capsys):
    shutil.copy(folders / "sam.json", tmp_path)
    file, base = load_file(folders / "iter.safetensors"), ["--base", str(folders / "lab")]
    one = f"{LLM}model.layers.0.mlp.up_proj.lora_A.default.weight"
    untrained = {k: torch.zeros_like(v) if ".lora_B." in k else v for k, v in file.items()}
    states = {
        "unused": {**file, "mllm.model.more.weight": torch.zeros(1)},
        "is no pair": {k: v for k, v in file.items() if k != one},
        "is not finite": {**file, one: file[one] * float("nan")},
        "the base's": {**file, "text_hidden_fcs.0.bias": torch.zeros(5)},
        "language model equal the base": untrained,
    }
    for expected, state in states.items():
        save_file(state, tmp_path / "iter.safetensors")
        assert tool(tmp_path, "iter.safetensors", to="lab", more=[*base, "--alpha", "4"]) == 2, expected
        said = capsys.readouterr()
        assert expected in said.out + said.err and not (tmp_path / "out").exists()
    save_file(states["unused"], tmp_path / "iter.safetensors")
    more = [*base, "--alpha", "4", "--waive", "mllm.model.more.weight"]
    assert tool(tmp_path, "iter.safetensors", to="lab", more=more) == 0
    assert "left out as --waive says: mllm.model.more.weight" in capsys.readouterr().out


def test_mistakes_are_one_sentence_each(folders, tmp_path, capsys):
    (tmp_path / "sam.json").write_text((folders / "sam.json").read_text())
    (tmp_path / "iter_9.pth").mkdir()
    (tmp_path / "iter_9.pth" / "mp_rank_00_model_states.pt").write_bytes(b"")
    torch.save({"state_dict": {}, "meta": Path("x")}, tmp_path / "objects.pth")
    torch.save({"state_dict": trained(tiny(0, **SMALL))}, tmp_path / "iter.pth")
    (tmp_path / "empty").mkdir()
    base = ["--base", str(folders / "lab")]
    cases = [
        ("iter_9.pth", [], "zero_to_fp32"), ("objects.pth", base, "Python objects"), ("iter.pth", [], "give --base"),
        ("iter.pth", base, "as --alpha"), ("iter.pth", [*base, "--alpha", "nan"], "as --alpha"),
        ("empty", [], "no folder with a config.json"), ("none.pth", base, "no such weight file"),
        ("iter.pth", [*base, "--sam2", "x.pt"], "leave the flag out"),
        ("iter.pth", [*base, "--out", str(tmp_path / "x")], "give both"),
        ("iter.pth", [*base, "--to", "lab", "--out", str(tmp_path / "empty")], "exists already"),
        ("iter.pth", ["--base", str(tmp_path / "empty"), "--alpha", "4"], "no folder with a config.json"),
    ]  # fmt: skip
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, more, expected in cases:
        assert tool(tmp_path, source, more=more) == 2, expected
        err = capsys.readouterr().err
        assert expected in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert run.cli(convert.main, [str(folders / "lab"), "--alpha", "4"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_tracking_decoder_has_no_place_in_the_released_layout(folders, tmp_path, capsys):
    model = tiny(0, **SMALL)
    model.set_tracking_decoder()
    model.save(tmp_path / "lab")
    (tmp_path / "sam.json").write_text((folders / "sam.json").read_text())
    assert tool(tmp_path, "lab", to="official") == 2 and not (tmp_path / "out").exists()
    assert "tracking_decoder." in capsys.readouterr().err
    assert tool(tmp_path, "lab", to="official", more=["--waive", "tracking_decoder."]) == 0
    assert same(tmp_path / "out", folders / "released")


def test_types_are_kept(folders, tmp_path, capsys):
    shutil.copy(folders / "sam.json", tmp_path)
    shutil.copytree(folders / "released", tmp_path / "released")
    file = tmp_path / "released" / "model.safetensors"
    state = {k: v.bfloat16() if k.startswith("language_model.") else v for k, v in load_file(file).items()}
    save_file(state, file)
    assert tool(tmp_path, "released", to="lab") == 0
    ours = load_file(tmp_path / "out" / "model.safetensors")
    expected = {k: v.dtype for k, v in from_official(state)[0].items()}
    assert {k: v.dtype for k, v in ours.items()} == expected and len(set(expected.values())) == 2
    more = ["--base", str(tmp_path / "out"), "--alpha", "4"]
    capsys.readouterr()
    assert tool(folders, "iter.safetensors", more=more) == 0
    assert "type changes: 14 tensors torch.float32 -> torch.bfloat16" in capsys.readouterr().out
