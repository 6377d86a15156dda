"""FastSAM2's network: size and cost, objects and prompts in one pass, clips, gradients, precision, checkpoints."""

import functools
import json

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models.fastsam2 import (
    DynamicDecoder,
    FastSAM2,
    FastSAM2Config,
    box_encoding,
    build_vocabulary,
    hash_texts,
    pool,
    released_prompts,
)
from models.fastsam2_options import reconfigured
from models.lite_dfpn import ModulatedDeformConv
from models.prompt_fusion import PromptBatch
from models.streaming_memory import MemoryConfig
from utils.run import UserError

SMALL = {"classes": ["cat", "sky", "car"], "queries": 5, "dim": 32, "heads": 4, "hidden": 48, "embed_dim": 16}


def head(**settings) -> DynamicDecoder:
    torch.manual_seed(0)
    return DynamicDecoder(FastSAM2Config(**{**SMALL, "synonyms": 2, **settings})).eval()


def network(**settings) -> FastSAM2:
    torch.manual_seed(0)
    return FastSAM2(FastSAM2Config(**{**SMALL, "backbone": "resnet18", **settings})).eval()


def features(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def parts(out: dict, N: int, first: bool) -> list[torch.Tensor]:
    """The objects' part of every output, or the prompts'."""
    every = [*out["classes"], *out["masks"], *out["iou"], out["queries"]]
    return [v[:, :N] if first else v[:, N:] for v in every]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Equal up to 1e-5 of the largest value: class logits reach 1000."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def released(**settings) -> FastSAM2:
    """The anchor's configuration; called where tensors have a shape but no memory."""
    return FastSAM2(FastSAM2Config(classes=["a"] * 133, compat=True, **settings)).eval()


@pytest.mark.parametrize("backbone, embed_dim, total", [("resnet50", 768, 47_252_245), ("resnet50", 1024, 47_515_413),
                                                        ("resnet18", 768, 20_827_445)])  # fmt: skip
def test_parameter_count_of_the_released_model(backbone, embed_dim, total):
    with torch.device("meta"):
        model = released(backbone=backbone, embed_dim=embed_dim)
    assert sum(p.numel() for p in model.parameters()) == total


def test_multiply_accumulates_of_the_released_model():
    """As counted for the anchor, within 1 %: torch's counter plus the deformable convolutions, by hand."""
    deformable = []

    def count(module, inputs, output):
        deformable.append(module.weight.numel() * output.shape[-1] * output.shape[-2])

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = released().requires_grad_(False)
        for m in model.modules():
            if isinstance(m, ModulatedDeformConv):
                m.register_forward_hook(count)
        model(torch.empty(1, 3, 800, 1344))
    assert len(deformable) == 3
    assert (counter.get_total_flops() / 2 + sum(deformable)) / 1e9 == pytest.approx(156.89, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("compat", [False, True])
def test_objects_and_prompts_in_one_pass_are_each_alone(compat):
    decoder, f, prompts = head(compat=compat), features(2, 32, 6, 8), features(2, 3, 32)
    both = decoder(f, prompts)
    assert [m.shape for m in both["masks"]] == 4 * [(2, 8, 6, 8)] and both["classes"][0].shape == (2, 8, 4)
    same(parts(both, 5, True), parts(decoder(f), 5, True))
    same(parts(both, 5, False), parts(decoder(f, prompts, objects=False), 0, False))
    alone = decoder(f, prompts[:, 1:2], objects=False)
    same([v[:, 1:2] for v in parts(both, 5, False)], parts(alone, 0, False))


@torch.no_grad()
def test_a_clip_is_a_taller_image():
    decoder, f = head(), features(2, 3, 32, 4, 5)  # two clips of three frames
    clip, tall = decoder(f), decoder(f.transpose(1, 2).flatten(2, 3))
    same(clip["masks"], [m.unflatten(2, (3, 4)) for m in tall["masks"]])
    same(clip["classes"] + clip["iou"], tall["classes"] + tall["iou"])
    same(parts(clip, 5, True), [v.flip(0) for v in parts(decoder(f.flip(0)), 5, True)])


@torch.no_grad()
def test_a_mean_does_not_depend_on_the_number_of_frames_but_the_released_sum_does():
    f = features(1, 32, 4, 5)
    for compat in (False, True):
        decoder = head(compat=compat)
        once, thrice = decoder(f)["queries"], decoder(f[:, None].expand(-1, 3, -1, -1, -1))["queries"]
        assert torch.allclose(once, thrice, atol=1e-4) != compat


def test_pooling():
    logits = torch.tensor([[[1.0, -1, 2, 0], [-1, -1, -1, -1]]], requires_grad=True)  # 0 is not inside
    pixels = torch.arange(8.0).reshape(1, 4, 2).requires_grad_()
    total = pool(logits, pixels, mean=False)
    assert total.tolist() == [[[4, 6], [0, 0]]] and pool(logits, pixels, mean=True).tolist() == [[[2, 3], [0, 0]]]
    total.sum().backward()
    assert logits.grad is None and pixels.grad[0, :, 0].tolist() == [1, 0, 1, 0]
    large = torch.full((1, 117_760, 2), 1.5, dtype=torch.float16)  # two frames of 184 x 320: inf when summed in float16
    with torch.autocast("cpu", torch.bfloat16):
        assert pool(torch.ones(1, 1, 117_760), large, mean=False).tolist() == [[[176_640, 176_640]]]


def clicks(*numbers: int) -> PromptBatch:
    """So many objects of each image, a click on each."""
    rows = [{"points": 30 * features(n, 1, 2).sigmoid(), "point_labels": torch.ones(n, 1).long()} for n in numbers]
    return PromptBatch.pad(rows)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("objects, P", [(True, None), (True, 2), (False, 2), (True, 0), (False, 0)])
def test_no_parameter_is_without_gradient(objects, P, compat):
    model = network(compat=compat, pixel_classes=True).train()
    prompts = None if P is None else clicks(P, 0)
    out = model(torch.rand(2, 3, 64, 32), prompts, objects)
    sum(v.float().square().sum() for v in parts(out, 0, False)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    moved = {name for name, p in model.named_parameters() if p.grad.any()}
    assert ("head.panoptic_cls.0.weight" in moved) == objects
    assert ("head.prompt_iou.weight" in moved) == bool(P)
    fused = {"head.pos_linear.weight"} if compat else {"prompt_fusion.seed", "prompt_fusion.attn.in_proj_weight"}
    assert (fused <= moved) == bool(P)
    if not (objects or P):
        return
    assert {"backbone.conv1.weight", "neck.deconv.deform_conv1.dcn.weight", "head.mask_heads.0.fc_mask.weight"} <= moved


@torch.no_grad()
def test_stages_add_to_a_query_unless_as_released():
    """With an update of 0 a stage hands its query on; the released one forgets it."""
    F = features(1, 32, 4, 4)
    for settings, kept in (({}, True), ({"residual": False}, False), ({"compat": True}, False)):
        model = head(**settings)
        with torch.no_grad():
            for stage in model.mask_heads:
                stage.kernel_update.fc_norm.weight.zero_()
                stage.kernel_update.fc_norm.bias.zero_()
            model.panoptic_attn.fc_norm.weight.zero_()
            found = model(F)["masks"][-2][0].flatten(1)
            assert (found.std(0).max() > 1e-3) == kept, settings


def test_pixels_say_their_class_in_training_only():
    model = head(pixel_classes=True)
    F = features(2, 3, 32, 4, 6)
    assert "pixels" not in model(F)
    model.train()
    assert "pixels" not in model(F, features(2, 1, 32), objects=False)
    pixels = model(F)["pixels"]
    assert pixels.shape == (2, 3, 3 * 4 * 6)
    one = model(F[:, 1])["pixels"]
    torch.testing.assert_close(pixels.unflatten(2, (3, 24))[:, :, 1], one)


def test_any_image_size_and_type():
    model, images = network(), torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    f = model.encode(images)
    assert f.shape == (2, 32, 16, 24)  # 64 x 96 after padding
    torch.testing.assert_close(f, model.encode(images / 255))
    padded = model.mean.expand(2, 3, 64, 96).clone()
    padded[..., :50, :70] = images / 255
    torch.testing.assert_close(f, model.encode(padded), atol=1e-5, rtol=1e-5)
    clip = model.encode(images[None])
    assert clip.shape == (1, 2, 32, 16, 24)
    torch.testing.assert_close(clip[0], f)
    assert model.decode(clip)["masks"][-1].shape == (1, 5, 2, 16, 24)
    with pytest.raises(ValueError, match="expected .B, 3, H, W."):
        model.encode(images[:, :1])


@torch.no_grad()
def test_bfloat16_is_finite_and_classes_stay_float32():
    model, images = network(), torch.rand(1, 2, 3, 64, 64)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert all(v.isfinite().all() for v in parts(out, 0, False))
    assert out["classes"][-1].dtype == torch.float32
    difference = (out["masks"][0].float() - exact["masks"][0]).abs().max() / exact["masks"][0].abs().max()
    assert difference < 0.05


def test_classes_are_cosines_with_the_best_synonym():
    decoder = head()
    E = decoder.classifier
    logits = decoder.classify(7 * E[:, 1][None])
    assert torch.allclose(logits[0, :, :3].diagonal(), torch.tensor(100.0), atol=0.01)
    assert not logits[..., 3].any()
    torch.testing.assert_close(decoder.classify(E[:1], 0.1), 10 * decoder.classify(E[:1]))
    kept = E.clone()
    decoder.set_classifier(3 * kept.flip(0))
    torch.testing.assert_close(decoder.classify(7 * kept[:, 1][None])[..., :3], logits[..., :3].flip(2))
    with pytest.raises(ValueError, match=r"\(3, 1, 16\), expected .* \(3, 2, 16\)"):
        decoder.set_classifier(E[:, :1])


def test_a_checkpoint_runs_alone(tmp_path):
    model, images = network(), torch.rand(1, 3, 32, 32)
    model.head.set_classifier(torch.randn(3, 1, 16))
    state = model.state_dict()
    assert "head.classifier" in state
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config_dict()))
    again = FastSAM2.from_checkpoint(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = model(images), again(images)
    assert all(torch.equal(a, b) for a, b in zip(parts(ours, 0, False), parts(theirs, 0, False), strict=True))

    save_file({k: v for k, v in state.items() if k != "head.classifier"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing head.classifier"):
        FastSAM2.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "TempoPeak", "model": {}}))
    with pytest.raises(UserError, match="a checkpoint of TempoPeak"):
        FastSAM2.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"class": "FastSAM2", "model": {"width": 3}}))
    with pytest.raises(UserError, match="not a configuration of this version"):
        FastSAM2.from_checkpoint(tmp_path)


# ---- classes, tasks, weights from elsewhere

embed = functools.partial(hash_texts, width=16)


def test_hashed_texts_are_alike_where_they_share_words():
    a, b, c, again = hash_texts(["the red circle", "The red square.", "a bird", "the  red circle!"], 256)
    torch.testing.assert_close(a, again)
    assert a @ b > 0.3 > abs(a @ c).item() + 0.1 and a.norm() == pytest.approx(1)
    forth, back = hash_texts(["red left of blue", "blue left of red"], 256)
    assert forth @ back < 0.95  # neighbours count
    assert hash_texts([], 8).shape == (0, 8) and hash_texts(["..."], 8).isfinite().all()


def test_a_vocabulary_averages_templates_and_pads_synonyms():
    seen = []
    names = ["cat", ["car", "auto"], ["bus", "coach", "tram"]]
    found = build_vocabulary(names, lambda t: seen.extend(t) or embed(t), ("a {}", "the {}"))
    assert found.shape == (3, 3, 16)
    padded = ["cat", "cat", "cat", "car", "auto", "car", "bus", "coach", "tram"]
    assert seen == [t for name in padded for t in (f"a {name}", f"the {name}")]
    mean = torch.nn.functional.normalize(embed(["a auto", "the auto"]).mean(0), dim=-1)
    torch.testing.assert_close(found[1, 1], mean)
    torch.testing.assert_close(found[0, 0], found[0, 1])
    for names in ([], [[]], ["cat", []]):
        with pytest.raises(ValueError, match="build_vocabulary"):
            build_vocabulary(names, embed)


def test_the_vocabulary_belongs_to_the_checkpoint(tmp_path):
    model, images = network(), torch.rand(1, 3, 32, 32)
    names = ["sea", "dog", "cow", "bus"]
    vocabulary = build_vocabulary([*names[:3], ["bus", "coach"]], embed, ("{}",))
    model.set_vocabulary(names, 5 * vocabulary, [False, True, True, True], "hash")
    assert model(images)["classes"][0].shape == (1, 5, 5)
    torch.testing.assert_close(model.head.classifier, vocabulary)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config_dict()))
    again = FastSAM2.from_checkpoint(tmp_path).eval()
    assert (
        model.head.cfg is model.cfg
        and again.cfg == model.cfg
        and again.cfg.text == "hash"
        and again.head.cfg.classes == names
    )
    assert again.is_thing.tolist() == [False, True, True, True]
    with torch.no_grad():
        assert torch.equal(again(images)["classes"][-1], model(images)["classes"][-1])
    for wrong, things in ((["sea"], [True]), (names, [True])):
        with pytest.raises(ValueError, match="set_vocabulary|is_thing"):
            model.set_vocabulary(wrong, vocabulary, things)
    assert again.cfg == model.cfg  # refused as a whole
    with pytest.raises(ValueError, match="text 'words'; expected"):
        model.set_vocabulary(names, vocabulary, [True] * 4, "words")
    assert network().is_thing.all() and network().cfg.text == "random"


@torch.no_grad()
def test_a_task_says_what_is_decoded():
    model, images, clip = network(), torch.rand(1, 3, 32, 32), torch.rand(1, 2, 3, 32, 32)
    assert model(images, task="semantic")["masks"][0].shape == (1, 5, 8, 8)
    assert model(images, clicks(2), task="interactive")["masks"][0].shape == (1, 2, 8, 8)
    assert model(images, clicks(2))["masks"][0].shape == (1, 7, 8, 8)
    assert model(clip, clicks(2), task="vos")["masks"][0].shape == (1, 2, 2, 8, 8)
    for given, said in (((images, clicks(2), True, "panoptic"), "takes no prompts"),
                        ((images, None, True, "interactive"), "needs prompts"),
                        ((clip, None, True, "panoptic"), "about images")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            model(*given)


@pytest.mark.parametrize("frozen", [True, False])
def test_only_the_backbones_norms_are_frozen(frozen):
    model = network(frozen_norm=frozen).train()
    assert model.training and model.neck.deconv.deform_conv1.dcn_bn.training
    assert model.backbone.layer1[0].bn1.training != frozen and model.backbone.bn1.weight.requires_grad
    before = model.backbone.bn1.running_mean.clone()
    model(torch.rand(2, 3, 32, 32))
    assert torch.equal(before, model.backbone.bn1.running_mean) == frozen
    assert not model.eval().neck.deconv.deform_conv1.dcn_bn.training and not model.backbone.bn1.training


def test_imagenet_weights_are_read_strictly(tmp_path):
    model, theirs = network(), torchvision.models.resnet18(weights=None)
    state = theirs.state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    model.load_imagenet(tmp_path / "resnet18.pth")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "old.pth")
    model.load_imagenet(tmp_path / "old.pth")
    torch.save({k: v for k, v in state.items() if k != "layer1.0.bn1.weight"}, tmp_path / "less.pth")
    with pytest.raises(UserError, match="missing layer1.0.bn1.weight"):
        model.load_imagenet(tmp_path / "less.pth")
    with pytest.raises(UserError, match="does not fit Backbone"):
        network(backbone="resnet34").load_imagenet(tmp_path / "resnet18.pth")


def test_the_released_model_takes_one_click_or_box():
    prompts = [{"points": torch.tensor([[[9.0, 5.0]]]), "point_labels": torch.tensor([[1]])},
               {"boxes": torch.tensor([[1.0, 2, 3, 4]])}]  # fmt: skip
    boxes, labels = released_prompts(PromptBatch.pad(prompts))
    assert boxes.tolist() == [[[6, 2, 12, 8]], [[1, 2, 3, 4]]] and labels.tolist() == [[1], [0]]
    with torch.no_grad():
        model = network(compat=True)
        f = model.encode(torch.rand(2, 3, 32, 64))
        torch.testing.assert_close(
            model.queries(PromptBatch.pad(prompts), f), model.head.box_queries(boxes, labels, (32, 64))
        )
    for wrong in ({"texts": torch.ones(1, 16)}, {"mask_prompts": torch.ones(1, 8, 8)}, {**prompts[0], **prompts[1]},
                  {**prompts[0], "point_labels": torch.tensor([[0]])}):  # fmt: skip
        with pytest.raises(ValueError, match="one positive click or one box"):
            released_prompts(PromptBatch.pad([wrong]))


def test_boxes_outside_the_image_are_encoded_at_its_border():
    inside = box_encoding(torch.tensor([[[0.0, 0, 1, 1]]]), 32)
    beyond = box_encoding(torch.tensor([[[-4.0, -4, 5, 5]]]), 32)  # same centre, larger than the image
    assert inside.shape == (1, 1, 64) and inside.isfinite().all()
    torch.testing.assert_close(beyond, inside)


def test_wrong_settings_are_named():
    for settings, said in (({"backbone": "vgg"}, "resnet18"), ({"classes": []}, "0 classes"), ({"queries": 0}, "0 q")):
        with pytest.raises(ValueError, match=said):
            network(**settings)
    with pytest.raises(ValueError, match="neither objects nor prompts"):
        head()(features(1, 32, 4, 4), None, objects=False)


# ---- memory

MEMORY = {"dim": 32, "heads": 4, "hidden": 24, "layers": 1, "kept": 2, "recent": 2}


def same_state(ours: FastSAM2, theirs: FastSAM2) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("maps", [0, 1], ids=["tokens", "maps"])
def test_the_memory_belongs_to_the_checkpoint(tmp_path, maps):
    model = network(memory=MemoryConfig(**MEMORY, maps=maps))
    assert {k for k in model.state_dict() if k.startswith("memory.")}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config_dict()))
    again = FastSAM2.from_checkpoint(tmp_path)
    assert again.cfg == model.cfg and again.cfg.memory == MemoryConfig(**MEMORY, maps=maps)
    assert same_state(again, model) and same_state(reconfigured(model, key_stride=8), model)
    model.set_vocabulary(["sea"], torch.randn(1, 1, 16), [False])
    assert model.cfg.memory == again.cfg.memory
    (tmp_path / "config.json").write_text(json.dumps(network().config_dict()))
    with pytest.raises(UserError, match=r"unexpected memory\."):
        FastSAM2.from_checkpoint(tmp_path)


def test_a_memory_of_other_sizes_is_refused():
    for wrong in ({"dim": 64}, {"heads": 8}):
        with pytest.raises(ValueError, match="expected those of the network, 32 and 4"):
            network(memory=MemoryConfig(**MEMORY | wrong))
    assert network().memory is None
    clip = torch.rand(1, 2, 3, 32, 32)
    with pytest.raises(ValueError, match="no memory"):
        network().follow(network().encode(clip), clicks(1))
    for model in (network(), network(memory=MEMORY)):
        with pytest.raises(ValueError, match="first are for task 'vos'"):
            model(clip, clicks(1), first=torch.zeros(1, 1))


@torch.no_grad()
def test_images_and_clips_are_as_without_memory():
    """To the bit, also in training, where the memory takes part with 0."""
    images = torch.rand(2, 3, 32, 64)
    for training in (False, True):
        plain, other = network().train(training), network(memory=MEMORY).train(training)
        other.load_state_dict({**other.state_dict(), **plain.state_dict()})
        for x, prompts in ((images, clicks(2, 1)), (images, None), (images[None], None)):
            a, b = plain(x, prompts), other(x, prompts)
            assert all(torch.equal(u, v) for u, v in zip(parts(a, 0, False), parts(b, 0, False), strict=True))


@pytest.mark.parametrize("maps", [0, 1], ids=["tokens", "maps"])
@pytest.mark.parametrize("task", ["panoptic", "interactive", "vis", "vos"])
@pytest.mark.parametrize("P", [0, 2])
def test_with_a_memory_no_task_leaves_a_parameter_without_gradient(task, P, maps):
    """Clips of one frame too, where nothing is remembered, and what is not finite is not carried over."""
    model = network(memory=MemoryConfig(**MEMORY, maps=maps)).train()
    with torch.no_grad():
        model.memory.presence_out.weight.fill_(float("inf") if task in ("panoptic", "vis") else 0.1)
    for T in (1, 3) if task == "vos" else (2,):
        images = torch.rand(2, T, 3, 32, 32) if task in ("vis", "vos") else torch.rand(2, 3, 32, 32)
        prompts = clicks(P, 0) if task in ("interactive", "vos") else None
        model.zero_grad()
        out = model(images, prompts, task=task)
        extra = [out["presence"]] if task == "vos" else []
        sum(v.float().square().sum() for v in [*parts(out, 0, False), *extra]).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        moved = {name for name, p in model.named_parameters() if p.grad.any()}
        assert ("memory.presence_out.bias" in moved) == (task == "vos" and P > 0)


@torch.no_grad()
def test_following_is_the_memory_step_by_step_from_each_objects_first_frame():
    model, clip = network(memory=MEMORY), torch.rand(2, 4, 3, 32, 64)
    prompts, first = clicks(3, 2), torch.tensor([[0, 2, 0], [1, 0, -1]])
    out = model(clip, prompts, task="vos", first=first)
    assert [m.shape for m in out["masks"]] == 4 * [(2, 3, 4, 8, 16)] and out["presence"].shape == (2, 3, 4)
    assert out["iou"][-1].shape == (2, 3, 4, 1) and out["queries"].shape == (2, 3, 4, 32)
    state = model.memory.start(2, 3)
    for t in range(4):
        f = model.encode(clip[:, t])
        state, found = model.memory.step(
            state, f, functools.partial(model.decode, objects=False), model.queries(prompts, f), first == t
        )
        same([out["masks"][-1][:, :, t]], [found.out["masks"][-1]])
        assert torch.equal(found.present, out["present"][:, :, t])
