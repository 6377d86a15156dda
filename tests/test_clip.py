"""CLIP: equal to transformers' CLIPModel both ways, every file layout, strict loading, text, pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms

from models import clip
from models.clip import CLIP, CLIPConfig
from utils.run import UserError

SMALL = CLIPConfig(
    image_size=32, patch=8, width=64, layers=2, heads=2, mlp=96, embed_dim=24, text_width=48, text_layers=3,
    text_heads=3, text_mlp=80, context=12, vocab_size=60, eot=59,
)  # fmt: skip
SHAPED = replace(SMALL, width=128, text_width=64, text_heads=1)  # heads of 64, as a bare state dict is read


def transformers_model(cfg: CLIPConfig, eos: int, seed: int = 0) -> transformers.CLIPModel:
    """CLIPModel of the same shape; its biases and norms are random too, so that none can be swapped unseen."""
    vision = {
        "image_size": cfg.image_size, "patch_size": cfg.patch, "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers, "num_attention_heads": cfg.heads, "intermediate_size": cfg.mlp,
    }  # fmt: skip
    text = {
        "vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.context, "hidden_size": cfg.text_width,
        "num_hidden_layers": cfg.text_layers, "num_attention_heads": cfg.text_heads,
        "intermediate_size": cfg.text_mlp, "eos_token_id": eos, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    both = {"hidden_act": cfg.activation, "layer_norm_eps": cfg.eps}
    config = transformers.CLIPConfig(
        vision_config={**vision, **both}, text_config={**text, **both}, projection_dim=cfg.embed_dim
    )
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def words(cfg: CLIPConfig) -> torch.Tensor:
    """(3, context) ids: end tokens at the last place, in the middle, twice."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, cfg.eot, (3, cfg.context), generator=g)
    tokens[0, -1] = tokens[1, 4] = tokens[2, 2] = tokens[2, 7] = cfg.eot
    return tokens


def pictures(cfg: CLIPConfig, rows: int = 2, **size: int) -> torch.Tensor:
    shape = (rows, 3, size.get("h", cfg.image_size), size.get("w", cfg.image_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    clip.save_tiny_snapshot(folder)
    return folder


# ---- transformers


@pytest.mark.parametrize(("activation", "eos"), [("quick_gelu", 59), ("gelu", 59), ("quick_gelu", 2)])
@torch.no_grad()
def test_equals_transformers_through_a_snapshot(tmp_path, activation, eos):
    cfg = replace(SMALL, activation=activation)
    theirs = transformers_model(cfg, eos)
    theirs.save_pretrained(tmp_path)
    ours = clip.load_clip(tmp_path)
    assert ours.cfg == cfg
    images, tokens = pictures(cfg), words(cfg)
    out = theirs(input_ids=tokens, pixel_values=images)
    pairs = [
        (ours.visual(images), out.vision_model_output.last_hidden_state),
        (torch.nn.functional.normalize(ours.encode_image(images)), out.image_embeds),
        (torch.nn.functional.normalize(ours.encode_text(tokens)), out.text_embeds),
    ]
    worst = [float((a - b).abs().max()) for a, b in pairs]
    print(f"\n{activation}, eos {eos}: tokens, image, text off by at most {worst}", end="")
    assert max(worst) <= 1e-5


def test_state_dict_goes_to_transformers_and_back():
    torch.manual_seed(3)
    model = CLIP(SMALL)
    state = clip.to_transformers(model.state_dict(), SMALL)
    transformers_model(SMALL, 59).load_state_dict(state, strict=True)
    back = clip.from_transformers(state, SMALL)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


@torch.no_grad()
def test_other_image_sizes_interpolate_as_transformers_does():
    theirs = transformers_model(SMALL, 59)
    ours = CLIP(SMALL)
    ours.load_state_dict(clip.from_transformers(theirs.state_dict(), SMALL))
    images = pictures(SMALL, h=48, w=64)
    want = theirs.vision_model(pixel_values=images, interpolate_pos_encoding=True).last_hidden_state
    assert (ours.visual(images) - want).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="multiples of 8"):
        ours.visual(pictures(SMALL, h=44))


def test_half_precision_and_position_ids_of_old_snapshots(tmp_path):
    theirs = transformers_model(SMALL, 59)
    theirs.half().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(SMALL.context)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = clip.load_clip(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    want = theirs.vision_model.embeddings.class_embedding.float()
    assert torch.equal(model.visual.class_embedding, want)


# ---- OpenAI's and open_clip's files


class Archive(CLIP):
    """What OpenAI's TorchScript archives hold: half precision and three numbers."""

    def __init__(self, cfg: CLIPConfig):
        super().__init__(cfg)
        for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 60)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.logit_scale


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive(tmp_path):
    torch.manual_seed(4)
    model = Archive(SHAPED).half()
    torch.jit.trace(model, torch.ones(1).half()).save(tmp_path / "ViT.pt")
    ours = clip.load_clip(tmp_path / "ViT.pt")
    assert ours.cfg == SHAPED and not ours.training
    assert all(torch.equal(p, model.get_parameter(name).float()) for name, p in ours.named_parameters())


@pytest.mark.parametrize("kind", ["plain", "buffer", "wrapped", "safetensors"])
def test_state_dict_files(tmp_path, kind):
    torch.manual_seed(5)
    model = CLIP(SHAPED)
    state, path = model.state_dict(), tmp_path / "weights.pt"
    if kind == "buffer":
        state["attn_mask"] = torch.zeros(12, 12)
    if kind == "wrapped":
        state = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save(state, path)
    ours = clip.load_clip(path, activation="gelu")
    assert ours.cfg == replace(SHAPED, activation="gelu")
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in ours.named_parameters())


@pytest.mark.parametrize("preset", ["vit_b16", "vit_l14"])
def test_shapes_tell_the_configuration(preset):
    cfg = clip.PRESETS[preset]
    with torch.device("meta"):
        model = CLIP(cfg)
    assert clip.config_of_shapes(model.state_dict(), "quick_gelu", "here") == cfg
    count = sum(p.numel() for p in model.visual.parameters())
    assert count == {"vit_b16": 86_192_640, "vit_l14": 303_966_208}[preset]  # 85.80 M and the projection's 0.39 M


# ---- what does not fit is refused


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    if how == "missing":
        return {k: v for k, v in state.items() if k != key}
    if how == "unexpected":
        return {**state, "extra.weight": torch.ones(2)}
    if how == "reshaped":
        return {**state, key: state[key][:8]}
    return {**state, key: state[key] * torch.nan}


@pytest.mark.parametrize(
    ("how", "says"),
    [("missing", "missing visual.transformer.resblocks.1.attn.in_proj_weight"), ("unexpected", "unexpected extra"),
     ("reshaped", "k_proj.weight"), ("nan", "not finite")],
)  # fmt: skip
def test_snapshot_that_does_not_fit(tiny, tmp_path, how, says):
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    save_file(broken(load_file(tiny / "model.safetensors"), how), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=says):
        clip.load_clip(tmp_path)


def test_files_that_are_no_clip(tiny, tmp_path):
    with pytest.raises(UserError, match="no such weight file"):
        clip.load_clip(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="config.json: not readable"):
        clip.load_clip(tmp_path)
    config = json.loads((tiny / "config.json").read_text())
    for change, says in (
        ({"model_type": "clip_vision_model"}, "a whole CLIPModel"),
        ({"vision_config": {**config["vision_config"], "hidden_act": "relu"}}, "hidden_act"),
        ({k: {**config[k], "hidden_act": "relu"} for k in ("vision_config", "text_config")}, "'relu': expected one of"),
        ({"vision_config": {**config["vision_config"], "num_attention_heads": 7}}, "7 heads"),
        ({}, "no model.safetensors"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        if change:
            (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
        else:
            (tmp_path / "model.safetensors").unlink()
        with pytest.raises(UserError, match=says):
            clip.load_clip(tmp_path)
    torch.save({"visual.conv1.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "resnet.pt")
    with pytest.raises(UserError, match="with a ViT"):
        clip.load_clip(tmp_path / "resnet.pt")


def test_text_that_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="vocab.json and merges.txt missing"):
        clip.load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=": merges.txt missing"):
        clip.load_tokenizer(tmp_path)
    model = clip.load_clip(tiny)
    ids = clip.load_tokenizer(tiny)(["a dog"])
    for tokens, says in (
        (ids.clamp(max=model.cfg.eot - 1), "end token"),
        (ids + 1, "end token"),
        (torch.cat([ids, ids], 1), "L <= 77"),
        (torch.cat([ids[:, 1:], torch.full((1, 1), 514)], 1), "0..513"),
    ):
        with pytest.raises(ValueError, match=says):
            model.encode_text(tokens)


# ---- text, pictures


@torch.no_grad()
def test_tokenizer_and_text_tower(tiny):
    model, tokenizer = clip.load_clip(tiny), clip.load_tokenizer(tiny)
    ids = tokenizer(["A dog's  caf\u00e9", "a dog's caf\u00e9", "", "x" * 200])
    assert ids.shape == (4, 77) and ids.dtype == torch.int64
    assert torch.equal(ids[0], ids[1]), "case and blanks do not count"
    assert (ids[:, 0] == 512).all() and (ids == 513).any(1).all() and ids[3, -1] == 513 and ids[3, -2] != 513
    assert len({tuple(row) for row in tokenizer(list("abcdefghijklmnopqrstuvwxyz 0123456789")).tolist()}) == 37
    text = model.encode_text(ids)
    assert text.shape == (4, model.cfg.embed_dim)
    alone = model.encode_text(tokenizer(["a dog's caf\u00e9"])[:, :20])  # neither padding nor neighbours are seen
    assert (text[1:2] - alone).abs().max() <= 1e-6


def test_tokenizer_json_alone_is_enough(tiny, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(tiny, local_files_only=True).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "vocab.json").exists()
    texts = ["two zebras", "it's 3 o'clock!"]
    assert torch.equal(clip.load_tokenizer(tmp_path)(texts), clip.load_tokenizer(tiny)(texts))


def test_tiny_snapshot_is_read_by_transformers_and_does_not_touch_the_random_state(tiny, tmp_path):
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    clip.save_tiny_snapshot(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (tmp_path / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    theirs, ours = transformers.CLIPModel.from_pretrained(tiny).eval(), clip.load_clip(tiny)
    assert ours.cfg == clip.PRESETS["tiny"]
    images, ids = pictures(ours.cfg, 1), clip.load_tokenizer(tiny)(["a photo of a dog"])
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=images)
        assert (torch.nn.functional.normalize(ours.encode_text(ids)) - out.text_embeds).abs().max() <= 1e-5
        assert (torch.nn.functional.normalize(ours.encode_image(images)) - out.image_embeds).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="expected 514 and 513"):
        clip.save_tiny_snapshot(tmp_path, clip.PRESETS["vit_b16"])


@torch.no_grad()
def test_batch_equals_single_images_and_bf16_is_close(tiny):
    model, images = clip.load_clip(tiny), pictures(clip.PRESETS["tiny"], 3)
    batch = model.encode_image(images)
    single = torch.cat([model.encode_image(image[None]) for image in images])
    assert (batch - single).abs().max() <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode_image(images)
    assert torch.nn.functional.cosine_similarity(batch, low.float()).min() > 0.999


@pytest.mark.parametrize("size", [(60, 91), (91, 60), (48, 48), (301, 77), (48, 51), (51, 48)])
def test_preprocess_equals_torchvision(size):
    image = np.random.default_rng(7).integers(0, 256, (*size, 3), dtype=np.uint8)
    resize = {"squash": [transforms.Resize((48, 48), transforms.InterpolationMode.BICUBIC)],
              "crop": [transforms.Resize(48, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(48)]}  # fmt: skip
    for mode, steps in resize.items():
        theirs = [*steps, transforms.ToTensor(), transforms.Normalize(clip.CLIP_MEAN, clip.CLIP_STD)]
        want = transforms.Compose(theirs)(Image.fromarray(image))
        got = clip.preprocess(image, 48, mode)
        assert got.shape == (3, 48, 48) and (got - want).abs().max() <= 1e-6


def test_preprocess_takes_every_pil_mode_and_refuses_the_rest():
    grey = Image.new("L", (20, 30), 100)
    assert torch.equal(clip.preprocess(grey, 16), clip.preprocess(grey.convert("RGB"), 16))
    for bad in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            clip.preprocess(bad, 16)
    with pytest.raises(ValueError, match="squash or crop"):
        clip.preprocess(grey, 16, "pad")


def test_clip_score():
    image, text = torch.tensor([[2.0, 0], [1, 0], [1, 1]]), torch.tensor([[1.0, 0], [-1, 0], [1, 0]])
    assert torch.allclose(clip.clip_score(image, text), torch.tensor([2.5, 0, 2.5 / 2**0.5]))
