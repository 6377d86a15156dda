"""Sa2VA as a whole on tiny random models of the three lines: losses, prediction, video modes, checkpoint folders."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import sa2va_video
from models.sa2va import TRAINED, Sa2VA
from models.sa2va_losses import LossConfig, repeated
from models.sa2va_processor import ARCHS, ProcessorConfig, tile_grid
from models.sa2va_sizes import tiny_sa2va
from utils.run import UserError

SIZES = {"sam_size": 128, "neck": 64, "max_tiles": 4}


def picture(seed: int, H: int = 60, W: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def boxes(n: int, H: int = 60, W: int = 80) -> np.ndarray:
    masks = np.zeros((n, H, W), bool)
    for k in range(n):
        masks[k, 5 * k : 5 * k + 20, 10 : 30 + k] = True
    return masks


IMAGE, ASK = picture(0), "Please segment the blood vessel."


@pytest.fixture(scope="module")
def tiny() -> Sa2VA:
    return tiny_sa2va(**SIZES)


@pytest.fixture(scope="module", params=ARCHS)
def any_arch(request, tiny) -> Sa2VA:
    return tiny if request.param == "internvl" else tiny_sa2va(arch=request.param, **SIZES)


def samples(model: Sa2VA) -> dict[str, dict]:
    encode = model.processor.encode
    return {
        "one": encode(IMAGE, ASK, "It is [SEG].", boxes(1)),
        "two": encode(picture(1, 50, 40), ASK, "Sure, [SEG] and [SEG].", boxes(2, 50, 40)),
        "absent": encode(IMAGE, "Where is the horse?", "There is no horse."),
        "text": encode(None, "What is a vessel?", "A tube."),
    }


# ---- preprocessing


@pytest.mark.parametrize(
    ("width", "height", "grid"), [(400, 400, (1, 1)), (999, 960, (3, 3)), (640, 320, (2, 1)), (100, 1300, (1, 12))]
)
def test_tile_grid(width, height, grid):
    assert tile_grid(width, height, ProcessorConfig(max_tiles=12)) == grid


def test_labels_are_the_answers_and_their_ends(tiny):
    p = tiny.processor
    item = p.encode(IMAGE, [ASK, "And the disc?"], ["It is [SEG].", "No disc."])
    said = item["labels"][item["labels"] >= 0]
    assert p.tokenizer.decode(said) == "It is [SEG].<|im_end|>No disc.<|im_end|>"
    assert torch.equal(said, item["input_ids"][item["labels"] >= 0])
    asked = p.encode(IMAGE, [ASK, "And the disc?"], ["It is [SEG].", None])["input_ids"]
    assert torch.equal(asked, item["input_ids"][: len(asked)])  # what is asked at prediction is what was trained on
    assert (asked == p.image_id).sum() == len(item["pixel_values"]) * p.cfg.tile_tokens


@pytest.mark.parametrize(
    ("images", "text", "sentence"),
    [(IMAGE, "The [SEG]?", "special token"), (None, "<image> What?", "no picture"), (IMAGE, "<image><image>", "once"),
     (IMAGE, "why " * 2000, "tokens")],
)  # fmt: skip
def test_texts_that_cannot_be_asked(tiny, images, text, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny.processor.encode(images, text)


def test_masks_must_fit_the_answer_and_the_picture(tiny):
    encode = tiny.processor.encode
    for masks in (boxes(2), boxes(1)[:, :-1], boxes(1).astype(np.uint8)):
        with pytest.raises(ValueError, match=r"1 \[SEG\] in the answers"):
            encode(IMAGE, ASK, "It is [SEG].", masks)
    with pytest.raises(ValueError, match="uint8"):
        encode(IMAGE / 255, ASK)


def test_a_tokenizer_without_the_tokens_is_refused(tiny):
    with pytest.raises(UserError, match="image_pad"):
        type(tiny.processor)(ProcessorConfig(arch="qwen3_vl"), tiny.processor.tokenizer)


# ---- training


@pytest.mark.parametrize("names", [["one", "two", "absent", "text"], ["absent"], ["text"], ["text", "one"]])
def test_every_trained_parameter_has_a_gradient(any_arch, names):
    model = any_arch
    model.zero_grad(set_to_none=True)
    out = model(model.processor.collate([samples(model)[n] for n in names]))
    assert out["masks"] == sum({"one": 1, "two": 2}.get(n, 0) for n in names)
    out["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.grad is None or p.grad.isfinite().all(), name
    heads = [n for n, p in model.named_parameters() if "iou_prediction_head" in n or "pred_obj_score_head" in n]
    assert heads and not any(dict(model.named_parameters())[n].requires_grad for n in heads)
    convolutions = model.sam.mask_decoder.conv_s0.weight, model.sam.mask_decoder.conv_s1.weight
    assert all((p.grad != 0).any() == (out["masks"] > 0) for p in convolutions)
    assert not any(p.requires_grad for p in model.sam.vision_encoder.parameters())


def test_a_batch_is_the_mean_of_its_masks_and_tokens(any_arch):
    model, all_samples = any_arch, samples(any_arch)
    parts = [all_samples[n] for n in ("one", "two", "absent")]
    loss = LossConfig(cldice=0.5)
    with torch.no_grad():
        alone = [model(model.processor.collate([s]), loss) for s in parts]
        out = model(model.processor.collate(parts), loss)
    tokens = [(s["labels"] >= 0).sum() for s in parts]
    want = sum(float(a["lm"]) * float(t) for a, t in zip(alone, tokens, strict=True)) / float(sum(tokens))
    assert float(out["lm"]) == pytest.approx(want, abs=1e-5)
    for name in ("bce", "dice", "cldice"):
        mean = (float(alone[0][name]) + 2 * float(alone[1][name])) / 3
        assert float(out[name]) == pytest.approx(mean, abs=1e-5), name
    total = out["lm"] + 2 * out["bce"] + 0.5 * out["dice"] + 0.5 * out["cldice"]
    assert float(out["loss"]) == pytest.approx(float(total), abs=1e-5)
    assert [None if x is None else len(x) for x in out["mask_logits"]] == [1, 2, None]


def test_loss_options(tiny):
    batch, found = tiny.processor.collate([samples(tiny)["two"]]), {}
    options = {"mask": {}, "grid": {"target": "grid"}, "area": {"target": "area"}, "points": {"points": 4000}}
    with torch.no_grad():
        for name, fields in options.items():
            torch.manual_seed(0)
            found[name] = float(tiny(batch, LossConfig(**fields))["dice"])
    assert len(set(found.values())) == 4 and max(found.values()) - min(found.values()) < 0.1, found
    assert repeated(2) == [0, 1, 0, 1, 0] and len(set(repeated(9))) == 5
    with pytest.raises(ValueError, match="target"):
        LossConfig(target="nearest")


def test_masks_that_do_not_match_the_answer_are_refused(tiny):
    item = samples(tiny)["two"]
    with pytest.raises(ValueError, match="1 masks for 2"):
        tiny(tiny.processor.collate([{**item, "masks": item["masks"][:1]}]))


def test_a_video_sample_is_trained_frame_by_frame(tiny):
    frames = [picture(k) for k in range(3)]
    masks = np.stack([boxes(3)] * 2)  # (n, F, H, W)
    item = tiny.processor.encode(frames, ASK, "Sure, [SEG] and [SEG].", masks)
    out = tiny(tiny.processor.collate([samples(tiny)["one"], item]))
    assert out["mask_logits"][1].shape == (2, 3, 32, 32) and out["masks"] == 1 + 6
    prompts = tiny.seg_prompts([tiny.processor.encode(frames, ASK, sam_images=[])],
                               [tiny.processor.ids("Sure, [SEG] and [SEG].<|im_end|>")])[0]  # fmt: skip
    each, _ = tiny.masks_from_prompts(frames, prompts)
    torch.testing.assert_close(out["mask_logits"][1], each, atol=1e-6, rtol=0)


def test_set_trainable_counts_what_it_trains(tiny):
    counts = tiny.set_trainable(["text_hidden_fcs", "mask decoder"])
    on = {n for n, p in tiny.named_parameters() if p.requires_grad}
    assert sum(counts.values()) == sum(p.numel() for n, p in tiny.named_parameters() if n in on)
    assert all(n.startswith(("text_hidden_fcs.", "sam.mask_decoder.")) for n in on)
    with pytest.raises(ValueError, match="everything"):
        tiny.set_trainable(["everything"])
    assert set(tiny.set_trainable(TRAINED)) == set(TRAINED)


# ---- prediction


def test_several_pictures_at_once_are_predicted_as_alone(any_arch):
    asked = [(IMAGE, ASK), (picture(1, 50, 90), "Please segment the background, and nothing else."), (None, "Why?")]
    for options in ({"max_new_tokens": 5}, {"force_seg": True}, {"max_new_tokens": 4, "num_beams": 2}):
        together = any_arch.predict_many(asked, **options)
        for found, sample in zip(together, asked, strict=True):
            alone = any_arch.predict(*sample, **options)
            assert found["text"] == alone["text"]
            torch.testing.assert_close(found["prompts"], alone["prompts"], atol=1e-5, rtol=0)
            torch.testing.assert_close(found["logits"], alone["logits"], atol=1e-5, rtol=0)


def test_forced_answers_are_what_training_reads(any_arch):
    """The mask of `predict(force_seg=True)` is the mask that `forward` trains."""
    item = samples(any_arch)["one"]
    with torch.no_grad():
        trained = any_arch(any_arch.processor.collate([item, samples(any_arch)["text"]]))["mask_logits"][0]
    found = any_arch.predict(IMAGE, ASK, force_seg=True)
    assert found["answer"] == "It is [SEG]." and not found["truncated"]
    torch.testing.assert_close(found["logits"], trained, atol=1e-5, rtol=0)


def told(model: Sa2VA, monkeypatch, answer: str) -> None:
    monkeypatch.setattr(model, "generate", lambda items, *_: [model.processor.ids(answer) for _ in items])


def test_seg_as_the_last_token_is_not_lost(tiny, monkeypatch):
    told(tiny, monkeypatch, "It is [SEG]")
    found = tiny.predict(IMAGE, ASK)
    assert found["truncated"] and found["masks"].shape == (1, 60, 80) and found["text"] == "It is [SEG]"
    assert found["seg_spans"] == [len(tiny.processor.ids("It is [SEG]")) - 1]


def test_two_objects_encode_the_picture_once(tiny, monkeypatch):
    told(tiny, monkeypatch, "Sure, [SEG] and [SEG].<|im_end|>")
    calls = []
    handle = tiny.sam.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    found = tiny.predict(IMAGE, ASK, threshold=0.5001)
    handle.remove()
    assert len(calls) == 1 and found["masks"].shape == found["probs"].shape == (2, 60, 80)
    assert torch.equal(found["masks"], found["probs"] > 0.5001) and found["scores"].shape == (2,)
    assert not torch.equal(found["probs"][0], found["probs"][1])
    assert "probs" not in tiny.predict(IMAGE, ASK, return_prob=False)


def test_an_answer_without_seg_has_no_mask(tiny, monkeypatch):
    told(tiny, monkeypatch, "There is no horse.<|im_end|>")
    found = tiny.predict(IMAGE, "Where is the horse?")
    assert found["masks"].shape == (0, 60, 80) and found["logits"].shape == (0, 32, 32) and found["answer"][-1] == "."
    video = tiny.predict([IMAGE] * 3, "Where is the horse?")
    assert video["masks"].shape == (0, 3, 60, 80)
    assert tiny.chat("Where?", IMAGE) == "There is no horse."


def test_prediction_leaves_the_model_as_it_was(tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    tiny.train()
    tiny.sam.eval()
    tiny.predict(IMAGE, ASK, force_seg=True)
    assert tiny.training and tiny.mllm.training and not tiny.sam.mask_decoder.training
    tiny.eval()
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_gets_its_picture_positions(arch):
    """transformers' Qwen2.5-VL silently falls back to text positions without mm_token_type_ids."""
    model = tiny_sa2va(arch=arch, **SIZES)
    batch = model.processor.collate([samples(model)["one"]])
    model.mllm.model.rope_deltas = torch.ones(1, 1)  # as left by another sample
    inputs = model.mllm_inputs(batch)
    assert model.mllm.model.rope_deltas is None
    assert inputs["mm_token_type_ids"].sum() == (batch["input_ids"] == model.processor.image_id).sum() > 0
    tall = model.predict(picture(3, 200, 60), ASK, force_seg=True)
    model.predict(picture(4, 60, 200), "Something else.", max_new_tokens=3)
    again = model.predict(picture(3, 200, 60), ASK, force_seg=True)
    assert torch.equal(tall["logits"], again["logits"])


# ---- video


def test_directions_and_prompted_frames():
    assert sa2va_video.prompted_frames(8, 5, "official") == [0, 1, 2, 3, 4]
    assert sa2va_video.prompted_frames(9, 5, "uniform") == [0, 2, 4, 6, 8]
    assert sa2va_video.prompted_frames(3, 5, "two_decoder") == [0, 1, 2]
    assert sa2va_video.directions(6, [2], False) == [([3, 4, 5], 1), ([1, 0], -1)]
    assert sa2va_video.directions(10, [0, 9], True) == [([1, 2, 3, 4], 1), ([8, 7, 6, 5], -1)]
    with pytest.raises(ValueError, match="mode"):
        sa2va_video.prompted_frames(3, 5, "random")


@pytest.fixture(scope="module")
def clip(tiny) -> tuple[list[np.ndarray], torch.Tensor]:
    """Eight frames and two [SEG] vectors, large enough to matter."""
    g = torch.Generator().manual_seed(3)
    return [picture(k) for k in range(8)], 20 * torch.randn(2, 64, generator=g)


def test_backward_in_time_is_forward_in_the_reversed_video(tiny, clip):
    frames, prompts = clip
    there, _ = tiny.propagate(frames, prompts, start=[0])
    back, _ = tiny.propagate(frames[::-1], prompts, start=[7])
    torch.testing.assert_close(there, back.flip(1), atol=1e-6, rtol=0)
    assert (there[:, 7] - tiny.masks_from_prompts(frames[7:], prompts)[0][:, 0]).abs().max() > 1e-4  # memory matters


def test_what_is_remembered(tiny, clip):
    """The prompted frame, the last 6 tracked ones, and pointers of the 16 last frames; C = 64 is one token each."""
    seen, T = [], 20
    handle = tiny.sam.memory_attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(kwargs["memory"]), kwargs["num_object_pointer_tokens"])),
        with_kwargs=True,
    )
    tiny.propagate(clip[0][:1] * T, clip[1][:1], start=[0])
    tiny.propagate(clip[0][:1] * 4, clip[1][:1], start=[0, 3])
    handle.remove()
    pixels = 8 * 8
    assert seen[: T - 1] == [(pixels * (1 + min(t - 1, 6)) + min(t, 16), min(t, 16)) for t in range(1, T)]
    assert seen[T - 1 :] == [(pixels * 2 + 1, 1), (pixels * 3 + 2, 2)]  # no pointer from the future


def test_objects_and_prompted_frames_are_independent(tiny, clip):
    frames, prompts = clip
    both, scores = tiny.propagate(frames, prompts, "uniform")
    one, _ = tiny.propagate(frames, prompts[1:], "uniform")
    assert both.shape == (2, 8, 32, 32) and scores.shape == (2, 8)
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=0)
    start = sa2va_video.prompted_frames(8, 5, "uniform")
    still, _ = tiny.masks_from_prompts([frames[t] for t in start], prompts)
    torch.testing.assert_close(both[:, start], still, atol=1e-6, rtol=0)


def test_two_decoders(clip, tmp_path):
    model = tiny_sa2va(**SIZES)
    frames, prompts = clip
    with pytest.raises(UserError, match="two_decoder"):
        model.propagate(frames, prompts, "two_decoder")
    model.set_tracking_decoder()
    with torch.no_grad():
        for p in model.sam.mask_decoder.parameters():
            p.mul_(1.2)  # as training would, after the original was set aside
    model.sam.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)
    first, _ = model.propagate(frames, prompts, "two_decoder")
    model.tracking_decoder.pred_obj_score_head.proj_out.bias.data.fill_(-50.0)
    gone, scores = model.propagate(frames, prompts, "two_decoder")
    start = sa2va_video.prompted_frames(8, 5, "two_decoder")
    followed = sorted(set(range(8)) - set(start))
    assert torch.equal(first[:, start], gone[:, start])
    assert (gone[:, followed] == sa2va_video.ABSENT).all() and (scores[:, followed] < 0).all()
    assert not any(p.requires_grad for p in model.tracking_decoder.parameters())
    model.save(tmp_path / "two")
    again, _ = Sa2VA.from_checkpoint(tmp_path / "two").propagate(frames, prompts, "two_decoder")
    assert torch.equal(again, gone)


# ---- files


@pytest.mark.parametrize("shard_bytes", [5e9, 1e6], ids=["one file", "shards"])
def test_saved_and_loaded_is_the_same_model(any_arch, tmp_path, shard_bytes):
    any_arch.save(tmp_path / "ckpt", shard_bytes, made_by={"train_images": ["a"]})
    files = sorted(p.name for p in (tmp_path / "ckpt").glob("*.safetensors"))
    names = [k for f in files for k in load_file(tmp_path / "ckpt" / f)]
    assert sorted(names) == sorted(any_arch.state_dict()) and (len(files) > 1) == (shard_bytes < 5e9)
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    assert config["made_by"]["train_images"] == ["a"] and config["class"] == "Sa2VA"
    again = Sa2VA.from_checkpoint(tmp_path / "ckpt")
    assert all(torch.equal(v, any_arch.state_dict()[k]) for k, v in again.state_dict().items())
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in any_arch.named_parameters() if p.requires_grad
    ]
    ours, theirs = (m.predict(IMAGE, ASK, max_new_tokens=4) for m in (any_arch, again))
    assert ours["text"] == theirs["text"]
    ours, theirs = (m.predict(IMAGE, ASK, force_seg=True) for m in (any_arch, again))
    assert torch.equal(ours["probs"], theirs["probs"])
    with pytest.raises(UserError, match="exists"):
        any_arch.save(tmp_path / "ckpt")


@pytest.mark.parametrize("damage", ["missing", "added", "reshaped", "nan", "cut", "shard"])
def test_damaged_checkpoints_are_refused(tiny, tmp_path, damage):
    folder = tmp_path / "ckpt"
    tiny.save(folder, 3e6 if damage == "shard" else 5e9)
    name, state = "text_hidden_fcs.0.weight", dict(tiny.state_dict())
    changed = {"missing": {}, "added": {name: state[name], "extra": state[name].clone()},
               "reshaped": {name: state[name][:-1].contiguous()}, "nan": {name: state[name] * torch.nan}}  # fmt: skip
    if damage in changed:
        del state[name]
        save_file(state | changed[damage], folder / "model.safetensors")
    elif damage == "cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(UserError):
        Sa2VA.from_checkpoint(folder)


def test_a_failed_save_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "no space left")

    monkeypatch.setattr(tiny.processor, "save", full)
    with pytest.raises(OSError, match="space"):
        tiny.save(tmp_path / "ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_policies_cast_the_language_model_only(any_arch, tmp_path, policy):
    any_arch.save(tmp_path / "ckpt")
    model = Sa2VA.from_checkpoint(tmp_path / "ckpt", policy)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[policy]
    for name, p in model.named_parameters():
        assert p.dtype == (low if name.startswith("mllm.") else torch.float32), name
    found, exact = (m.predict(IMAGE, ASK, force_seg=True)["probs"] for m in (model, any_arch))
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 0.01
    out = model(model.processor.collate([samples(model)["one"], samples(model)["text"]]))
    assert out["lm"].dtype == out["bce"].dtype == torch.float32 and out["loss"].isfinite()
    with pytest.raises(UserError, match="fp8"):
        Sa2VA.from_checkpoint(tmp_path / "ckpt", "fp8")
