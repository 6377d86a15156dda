"""Sa2VA against the released code: answers, masks, memory through video, training losses, xtuner's files.

Reference data: $LAB_SHARED/data/sa2va/parity_*, random weights of tiny models in the released layout and what the
released code printed for them in float32 on a CPU. Tolerances: logits 2e-4 (they reach 40), losses 1e-5, texts and
masks equal.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from models.sa2va import Sa2VA, Sa2VAConfig
from models.sa2va_losses import LossConfig, soft_cldice_loss
from models.sa2va_names import from_official, from_xtuner
from models.sa2va_processor import ProcessorConfig, Sa2VAProcessor
from models.sa2va_sizes import internvl_config, sam_config
from models.sa2va_video import resize_logits
from utils.weights import load_strict

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "sa2va"
FOLDERS = sorted(SHARED.glob("parity_*"))
LOGITS, LOSSES = 2e-4, 1e-5
RELEASED = LossConfig(target="grid", balance="official5")


def sam_of(state: dict) -> dict:
    """SAM 2 sizes from the tensors; heads, windows and global blocks as the folder's README has them."""
    shape = {k.removeprefix("grounding_encoder.sam2_model."): tuple(v.shape) for k, v in state.items()}
    widths = tuple(shape[f"image_encoder.neck.convs.{k}.conv.weight"][1] for k in (3, 2, 1, 0))
    depth = sum(k.endswith(".attn.proj.weight") for k in shape if k.startswith("image_encoder.trunk.blocks"))
    of_block = [shape[f"image_encoder.trunk.blocks.{k}.attn.proj.weight"][0] for k in range(depth)]
    layers = sum(k.endswith("linear1.weight") for k in shape if k.startswith("memory_attention"))
    blocks, heads = tuple(of_block.count(w) for w in widths), (1, 2, 4, 8)
    neck, hidden = shape["no_mem_embed"][-1], shape["memory_attention.layers.0.linear1.weight"][0]
    return sam_config(256, widths, heads, blocks, (8, 4, 8, 4), (3,), neck, layers, hidden)


class Case:
    """A folder: its model, inputs and what the released code made of them."""

    def __init__(self, folder: Path):
        about = json.loads((folder / "official_tiny_config.json").read_text(encoding="utf-8"))
        text, eyes = about["llm_config"], about["vision_config"]
        tokens = (eyes["image_size"] // eyes["patch_size"] // 2) ** 2
        preprocess = ProcessorConfig(tile=eyes["image_size"], tile_tokens=tokens, sam_size=256)
        self.processor = Sa2VAProcessor(preprocess, AutoTokenizer.from_pretrained(folder / "tokenizer"))
        names = "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
        sizes = tuple(text[k] for k in (*names, "num_key_value_heads"))
        vision = tuple(eyes[k] for k in names)
        mllm = internvl_config(sizes, vision, eyes["image_size"], text["vocab_size"], self.processor.image_id, 2048)
        official = {k: v.float() for k, v in load_file(folder / "official_tiny_hf.safetensors").items()}
        self.config = Sa2VAConfig("internvl", mllm, sam_of(official), self.processor.seg_id)
        self.ours = from_official(official)[0]
        self.image = picture(folder / "image.png")
        self.frames = [picture(p) for p in sorted(folder.glob("frame_*.png"))]
        self.said = json.loads((folder / "official_outputs.json").read_text(encoding="utf-8"))
        self.losses = json.loads((folder / "official_train_losses.json").read_text(encoding="utf-8"))
        self.folder, self.out, self.batch = (
            folder,
            *(read(folder / f) for f in ("official_outputs.npz", "train_batch.npz")),
        )

    def model(self, state: dict | None = None) -> Sa2VA:
        model = Sa2VA(self.config, self.processor).eval()
        load_strict(model, self.ours if state is None else state, self.folder)
        return model

    def asked(self, name: str):
        """What case `name` shows the model: the video, the picture, or nothing."""
        return (
            None
            if f"{name}.mask0" not in self.out
            else self.frames
            if len(self.out[f"{name}.mask0"]) > 1
            else self.image
        )

    def items(self) -> list[dict]:
        """The training samples, encoded by us from the texts that the stored ids spell."""
        turn = re.compile(
            r"<\|im_start\|>user\n(?:<img>.*</img>\n)?(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<\|im_end\|>"
        )
        items = []
        for k, image in enumerate((self.frames[0], self.image)):
            kept = self.batch["input_ids"][k][self.batch["attention_mask"][k]]
            asked, told = zip(*turn.findall(self.processor.tokenizer.decode(kept)), strict=True)
            items.append(self.processor.encode(image, asked, told, self.batch[f"mask{k + 1}"] > 0))
        return items


def picture(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as z:
        return dict(z)


@pytest.fixture(scope="module", params=FOLDERS or [None], ids=lambda p: p.name if p else "none")
def case(request):
    if request.param is None:
        pytest.skip(f"no reference data in {SHARED}/parity_*")
    case = Case(request.param)
    case.main = case.model()
    return case


def shown(logits: torch.Tensor, like: np.ndarray) -> float:
    """Largest difference to stored logits (F, 1, a, a), kept every 256 / a pixels of the official 256 x 256."""
    large = F.interpolate(logits[:, None], (256, 256), mode="bilinear", align_corners=False)
    step = 256 // like.shape[-1]
    return float(np.abs(large[:, :, ::step, ::step].numpy() - like).max())


def unpacked(bits: np.ndarray, width: int) -> np.ndarray:
    return np.unpackbits(bits, axis=-1)[..., :width].astype(bool)


def test_answers_masks_and_video_equal_the_released_code(case):
    for name, said in case.said.items():
        images = case.asked(name)
        found = case.main.predict(images, said["text"])
        assert found["text"] == said["prediction"], name
        n = sum(k.startswith(f"{name}.mask") for k in case.out)
        assert len(found["masks"]) == n, name
        for k in range(n):
            logits, masks = (
                found[key][k] if isinstance(images, list) else found[key][k : k + 1] for key in ("logits", "masks")
            )
            assert shown(logits, case.out[f"{name}.logits{k}"]) < LOGITS, (name, k)
            truth = unpacked(case.out[f"{name}.mask{k}"], masks.shape[-1])
            assert (truth != masks.numpy()).sum() == 0, (name, k)
        if n:
            assert np.abs(found["prompts"].numpy() - case.out[f"{name}.seg_prompt"]).max() < 1e-5, name
    print(f"{len(case.said)} of {len(case.said)} answers equal")


def test_tiles_equal_the_released_ones(case):
    for name in [k.removesuffix(".vit_in_mean") for k in case.out if k.endswith(".vit_in_mean")]:
        images = case.asked(name)
        seen = case.main.looked_at(images, "official")
        tiles = case.processor.encode(seen, case.said[name]["text"], sam_images=[])["pixel_values"]
        assert np.abs(tiles.mean((1, 2, 3)).numpy() - case.out[f"{name}.vit_in_mean"]).max() < 1e-6, name
        with torch.no_grad():
            eyes = case.main.mllm.model.get_image_features(tiles, return_dict=True).pooler_output
        assert np.abs(eyes.numpy() - case.out[f"{name}.vit_out"]).max() < 1e-5, name


def test_training_batch_is_encoded_as_released(case):
    batch = case.processor.collate(case.items())
    for name in ("input_ids", "labels", "attention_mask"):
        assert (batch[name].numpy() == case.batch[name]).all(), name


def test_training_losses_equal_the_released_ones(case):
    items, worst = case.items(), 0.0
    runs = {"official_batch2_fixnum5": (items, RELEASED)}
    runs |= {f"single{k}": ([item], LossConfig(target="grid")) for k, item in enumerate(items)}
    assert set(runs) == set(case.losses)
    for name, (samples, config) in runs.items():
        with torch.no_grad():
            found = case.main(case.processor.collate(samples), config)
        ours = {"llm_loss": found["lm"], "loss_mask": 2.0 * found["bce"], "loss_dice": 0.5 * found["dice"]}
        worst = max(worst, *(abs(float(ours[k]) - v) for k, v in case.losses[name].items()))
        assert float(found["loss"]) == pytest.approx(sum(map(float, ours.values())), abs=1e-6)
    print(f"{len(runs)} of {len(runs)} training batches, largest difference {worst:.1e}")
    assert worst < LOSSES


def test_a_training_file_of_xtuner_over_the_base(case):
    iter_state = {k: v.float() for k, v in load_file(case.folder / "official_tiny_iter.safetensors").items()}
    model, want = (
        case.model(from_xtuner(iter_state, case.ours, 8.0)[0]),
        read(case.folder / "official_iter_outputs.npz"),
    )
    with torch.no_grad():
        logits = model.mllm(input_ids=torch.from_numpy(want["input_ids"])).logits
    assert np.abs(logits.numpy() - want["text_logits"]).max() < LOGITS
    found = model.predict(case.image, case.said["image1"]["text"])
    assert found["text"] == str(want["prediction"])
    assert shown(found["logits"], want["logits0"]) < LOGITS
    assert (unpacked(want["mask0"], case.image.shape[1]) != found["masks"].numpy()).sum() == 0


def test_negative_object_score_and_another_mask(case):
    """The language model is unchanged, so the stored vectors go in: its own differ by 1e-6, and one pixel of the video
    has a logit of 1e-6."""
    want, state = read(case.folder / "official_nobj_outputs.npz"), {k: v.clone() for k, v in case.ours.items()}
    state["sam.mask_decoder.pred_obj_score_head.proj_out.bias"] -= 2.0
    state["sam.mask_decoder.iou_prediction_head.proj_out.bias"][3] += 2.0
    model = case.model(state)
    for name, images in (("image", [case.image]), ("video", case.frames)):
        prompts = torch.from_numpy(case.out[{"image": "image1", "video": "video"}[name] + ".seg_prompt"])
        follow = model.propagate if name == "video" else model.masks_from_prompts
        logits, scores = follow(images, prompts)
        assert (scores < 0).all() and shown(logits[0], want[f"{name}_logits"]) < LOGITS, name
        size = images[0].shape[:2]
        masks = resize_logits(logits[0], size, model.sam.image_size).sigmoid() > 0.5
        assert (unpacked(want[f"{name}_mask"], size[1]) != masks.numpy()).sum() == 0, name


METRICS = SHARED / "metric_cases"


@pytest.mark.skipif(not METRICS.is_dir(), reason=f"no reference data in {METRICS}")
def test_soft_cldice_equals_its_reference():
    arrays = read(METRICS / "cases.npz")
    expected = json.loads((METRICS / "expected.json").read_text(encoding="utf-8"))
    names = [k for k, v in expected.items() if "soft_clDice_reference" in v]
    for name in names:
        p = torch.from_numpy(arrays[f"{name}.prob"]).float()[None] / 255
        truth = torch.from_numpy(unpacked(arrays[f"{name}.gt"], p.shape[-1])).float()[None]
        want = expected[name]["soft_clDice_reference"]
        assert float(soft_cldice_loss(p, truth)) == pytest.approx(want["loss_iter10_smooth1"], abs=1e-5), name
    print(f"{len(names)} of {len(names)} soft clDice losses equal")
