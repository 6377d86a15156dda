"""FastSAM2's options: queries left out, fewer and narrower keys, another fusion, learning from averaged weights."""

import functools
import importlib.util
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.fastsam2 import DynamicDecoder, FastSAM2, FastSAM2Config, build_vocabulary, hash_texts
from models.fastsam2_options import best_queries, carry_over, coarse_pixels, low_rank, reconfigured
from models.mask_losses import WEIGHTS
from models.prompt_fusion import Attention, PromptBatch, PromptFusion
from models.segment_losses import TEMPERATURE, distill_losses, segment_losses
from utils import run
from utils.run import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"classes": ["cat", "sky", "car"], "queries": 6, "dim": 32, "heads": 4, "hidden": 48, "embed_dim": 16}
OPTIONS = {"keep_queries": 4, "prune_after": 2, "key_rank": 8, "key_stride": 16, "fusion": "mean"}


def head(**settings) -> DynamicDecoder:
    """Of any settings the same weights, but for those that a setting reshapes."""
    torch.manual_seed(0)
    return DynamicDecoder(FastSAM2Config(**{**SMALL, **settings})).eval()


def network(**settings) -> FastSAM2:
    torch.manual_seed(0)
    return FastSAM2(FastSAM2Config(**{**SMALL, "backbone": "resnet18", **settings})).eval()


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clicks(*numbers: int) -> PromptBatch:
    """So many objects of each image, a click on each."""
    rows = [{"points": 30 * random(n, 1, 2).sigmoid(), "point_labels": torch.ones(n, 1).long()} for n in numbers]
    return PromptBatch.pad(rows)


def flat(out: dict) -> list[torch.Tensor]:
    return [*out["classes"], *out["masks"], *out["iou"], out["queries"]]


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to 1e-5 of the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


# ---- queries left out


def test_the_best_queries_are_those_most_surely_an_object():
    """Also where every probability rounds to 1; in their old order, all prompts behind."""
    sure = torch.tensor([[3.0, -1, 2, 900, 905, 0, -5, -9]])  # of 6 objects and 2 prompts
    classes = torch.stack([sure, torch.full_like(sure, -2000), torch.zeros_like(sure)], -1)  # (1, 8, 3)
    assert (1 - classes[0, 3:5].softmax(-1)[:, -1]).tolist() == [1, 1]
    assert best_queries(classes, 6, 1).tolist() == [[4, 6, 7]]
    swapped = classes[:, [0, 1, 2, 4, 3, 5, 6, 7]]
    assert best_queries(swapped, 6, 1).tolist() == [[3, 6, 7]]
    assert best_queries(classes, 6, 4).tolist() == [[0, 2, 3, 4, 6, 7]]
    assert best_queries(classes, 6, 6).tolist() == [[*range(8)]]
    both = torch.cat([classes, classes.flip(1)])
    assert best_queries(both, 8, 2).tolist() == [[3, 4], [3, 4]], "each image has its own"


@torch.no_grad()
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 32, 6, 8), (2, 3, 32, 4, 5)], ids=["image", "clip"])
def test_left_out_queries_are_gone_for_the_rest_and_prompts_never(shape, stage):
    whole, pruned, f, p = head(), head(keep_queries=4, prune_after=stage), random(*shape), random(2, 3, 32)
    a, b, alone = whole(f, p), pruned(f, p), pruned(f)
    for s in range(4):
        n = 6 if s < stage else 4
        assert b["masks"][s].shape[:2] == (2, n + 3) and b["classes"][s].shape[1] == b["iou"][s].shape[1] == n + 3
        near(alone["masks"][s], b["masks"][s][:, :n])
        near(b["masks"][s][:, n:], a["masks"][s][:, 6:])
        near(b["classes"][s][:, n:], a["classes"][s][:, 6:])
        if s < stage:
            near(b["masks"][s], a["masks"][s])
    assert b["queries"].shape == (2, 7, 32)
    if stage == 3:  # nothing else changes: the adaptor looks at each query alone
        best = best_queries(a["classes"][2], 6, 4)
        for name in ("classes", "masks", "iou"):
            for image in range(2):
                near(b[name][3][image], a[name][3][image, best[image]])


@torch.no_grad()
def test_all_queries_kept_is_the_same_network_bit_for_bit():
    f, p = random(2, 32, 6, 8), random(2, 3, 32)
    want = flat(head()(f, p))
    for settings in ({"keep_queries": 6}, {"keep_queries": 6, "prune_after": 3}, {"key_rank": 32}, {"key_stride": 4}):
        assert all(torch.equal(a, b) for a, b in zip(flat(head(**settings)(f, p)), want, strict=True)), settings


def test_training_goes_on_with_the_queries_that_are_left():
    model = network(**OPTIONS).train()
    batch = {"task": "panoptic", "masks": [torch.rand(5, 32, 32) > 0.5, torch.rand(0, 32, 32) > 0.5]}
    batch |= {"labels": [torch.arange(5) % 3, torch.zeros(0).long()], "ignore": torch.zeros(2, 32, 32).bool()}
    losses = segment_losses(model(torch.rand(2, 3, 32, 32), task="panoptic"), batch, points=64)
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


# ---- keys


def test_coarse_pixels_are_means_of_each_frame():
    f = random(2, 3, 4, 5, 7)  # (B, T, D, h, w)
    pixels = f.permute(0, 1, 3, 4, 2).reshape(2, 3 * 35, 4)
    assert coarse_pixels(pixels, (3, 5, 7), 1) is pixels
    coarse = coarse_pixels(pixels, (3, 5, 7), 2).reshape(2, 3, 3, 4, 4)
    near(coarse[1, 2, 0, 1], f[1, 2, :, 0:2, 2:4].mean((1, 2)))
    near(coarse[0, 1, 2, 3], f[0, 1, :, 4, 6])
    near(coarse[0, 1, 2, 0], f[0, 1, :, 4, 0:2].mean(1))


@torch.no_grad()
def test_coarse_keys_change_what_prompts_see_only_in_their_adaptor():
    f, p = random(2, 32, 8, 8), random(2, 3, 32)
    fine, coarse = head()(f, p), head(key_stride=16)(f, p)
    for s in range(3):
        near(coarse["masks"][s], fine["masks"][s])
    near(coarse["masks"][3][:, :6], fine["masks"][3][:, :6])
    assert (coarse["masks"][3] - fine["masks"][3])[:, 6:].abs().max() > 1e-3
    block = random(2, 32, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)  # alike within 16 px: nothing is lost
    near(head(key_stride=16)(block, p)["masks"][3], head()(block, p)["masks"][3])


def attention(width: int | None = None) -> Attention:
    torch.manual_seed(0)
    module = Attention(32, 4, width)
    module.in_proj_bias.data.normal_()
    module.out_proj.bias.data.normal_()
    return module


@torch.no_grad()
def test_low_rank_attention_is_the_nearest_and_equal_where_nothing_is_lost():
    x, memory, whole = random(2, 3, 32), random(2, 40, 32, seed=2), attention()
    want, apart = whole(x, memory), []
    for rank in (4, 8, 16, 32):
        small = attention(rank)
        small.load_state_dict(low_rank(whole.state_dict(), 4, rank))
        apart.append((small(x, memory) - want).square().mean().item())
    assert apart == sorted(apart, reverse=True) and apart[0] > 1e-4 > 1e-9 > apart[-1]
    narrow = attention(16)  # of lower rank than the width it is brought to
    wide = attention(32)
    wide.load_state_dict(low_rank(narrow.state_dict(), 4, 32))
    near(wide(x, memory), narrow(x, memory))


@pytest.mark.parametrize("rank, parameters", [(0, 263_168), (64, 65_984)])
def test_parameters_of_the_keys(rank, parameters):
    with torch.device("meta"):
        decoder = DynamicDecoder(FastSAM2Config(key_rank=rank))
    assert sum(p.numel() for p in decoder.prompt_attn.parameters()) == parameters


# ---- fusion


@pytest.mark.parametrize("numbers", [(0, 0), (2, 0)])
def test_the_mean_of_tokens_counts_what_is_known_and_reaches_every_parameter(numbers):
    torch.manual_seed(0)
    fusion, f = PromptFusion(32, 4, 16, "mean"), random(2, 32, 8, 8)
    q = fusion(clicks(*numbers), f)
    assert q.shape == (2, max(numbers), 32) and q.isfinite().all()
    q.square().sum().backward()
    assert not [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    with torch.no_grad():
        tokens, known = random(2, 3, 32), torch.tensor([[True, False, True], [False, True, False]])[:, None, None]
        found = fusion.attn(random(2, 1, 32), tokens, known)
        near(found[0, 0], fusion.attn.norm(fusion.attn.layers(tokens[0, [0, 2]]).mean(0)))
        near(found[1, 0], fusion.attn.norm(fusion.attn.layers(tokens[1, 1])))


@torch.no_grad()
def test_padded_clicks_do_not_count_in_the_mean():
    torch.manual_seed(0)
    fusion, f = PromptFusion(32, 4, 16, "mean").eval(), random(1, 32, 8, 8)
    one = {"points": torch.tensor([[[9.0, 5.0]]]), "point_labels": torch.tensor([[1]])}
    more = {"points": torch.tensor([[[9.0, 5.0], [3, 3]]]), "point_labels": torch.tensor([[1, -1]])}
    near(fusion(PromptBatch.pad([more]), f), fusion(PromptBatch.pad([one]), f))
    more["point_labels"][0, 1] = 0
    assert (fusion(PromptBatch.pad([more]), f) - fusion(PromptBatch.pad([one]), f)).abs().max() > 1e-3


# ---- checkpoints


def test_a_checkpoint_from_before_the_options_loads_and_one_with_them_too(tmp_path):
    for settings in ({}, OPTIONS):
        model, images = network(**settings), torch.rand(1, 3, 32, 32)
        config = model.config_dict()
        if not settings:
            config["model"] = {k: v for k, v in config["model"].items() if k not in OPTIONS}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        again = FastSAM2.from_checkpoint(tmp_path).eval()
        assert again.cfg == model.cfg
        with torch.no_grad():
            ours, theirs = model(images, clicks(2)), again(images, clicks(2))
        assert all(torch.equal(a, b) for a, b in zip(flat(ours), flat(theirs), strict=True))


def test_weights_go_from_one_choice_to_another():
    model, images = network(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for changes in ({"key_rank": 32}, {"keep_queries": 6}, {}):
            for a, b in zip(flat(reconfigured(model, **changes)(images, clicks(2))), flat(model(images, clicks(2))),
                            strict=True):  # fmt: skip
                near(a, b)
        other = reconfigured(model, **OPTIONS)
    assert asdict(other.cfg) == asdict(model.cfg) | OPTIONS and not other.training
    ours, theirs = model.state_dict(), other.state_dict()
    new = {k for k, v in theirs.items() if k not in ours or v.shape != ours[k].shape or not torch.equal(v, ours[k])}
    assert {k.rsplit(".attn.", 1)[0] for k in new} == {"head.prompt_attn", "prompt_fusion"}
    state = model.state_dict()
    del state["prompt_fusion.attn.out_proj.bias"]
    assert carry_over(state, model).keys() == state.keys(), "a damaged checkpoint is not repaired"


@pytest.mark.parametrize("wrong, said", [
    ({"keep_queries": 7}, "keep_queries 7 after stage 1: expected 0..6"), ({"prune_after": 4}, "stage 1..3"),
    ({"key_rank": 6}, "a multiple of 4"), ({"key_rank": 64}, "0..32"), ({"key_stride": 5}, "key_stride 5"),
    ({"fusion": "sum"}, "fusion 'sum'"), ({"compat": True, "fusion": "mean"}, "no prompt fusion"),
])  # fmt: skip
def test_options_that_no_network_has(wrong, said):
    with pytest.raises(ValueError, match=said):
        FastSAM2Config(**SMALL, **wrong)
    with pytest.raises(UserError, match=said):
        reconfigured(network(), **wrong)


# ---- learning from averaged weights


def outputs(seed: int, *shape: int, N: int = 4) -> dict:
    """B images, N queries, 3 classes."""
    classes, masks = 3 * random(2, N, 4, seed=seed), 4 * random(2, N, *shape, seed=seed + 1)
    return {"classes": [classes.requires_grad_()], "masks": [masks.requires_grad_()]}


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8)], ids=["image", "clip"])
def test_queries_of_teacher_and_student_are_matched(shape):
    """In another order they agree as well, only the teacher's objects count, and it learns nothing."""
    teacher = outputs(0, *shape)
    teacher["classes"][0].data[:, 1, 3] = 20  # the second is no object
    teacher["masks"][0].data *= 10
    order = [2, 0, 3, 1]
    student = {k: [v[0].detach()[:, order].requires_grad_()] for k, v in teacher.items()}
    batch = {"task": "panoptic", "masks": [torch.zeros(0, *shape)] * 2}
    g = torch.Generator().manual_seed(0)
    losses = distill_losses(student, teacher, batch, points=256, generator=g)
    assert losses["class"].item() == pytest.approx(0, abs=1e-5), "equal classes: no divergence"
    pull = torch.autograd.grad(losses["mask"], student["masks"][0], retain_graph=True)[0]
    assert pull.abs().max() < 1e-6, "equal masks: nothing to learn"
    sum(losses.values()).backward()
    assert teacher["masks"][0].grad is None and teacher["classes"][0].grad is None
    sure = teacher["classes"][0].argmax(-1)[:, order] < 3  # (B, N)
    assert sure.any() and not sure.all()
    assert torch.equal(student["masks"][0].grad.flatten(2).any(-1), sure)
    far = distill_losses(outputs(7, *shape), teacher, batch, points=256, generator=g)
    assert all(far[k] > losses[k] + 0.3 for k in losses)


def test_the_divergence_by_hand():
    teacher, student = outputs(0, 4, 4, N=1), outputs(5, 4, 4, N=1)
    teacher["classes"][0].data[..., 0] = 6
    batch = {"task": "semantic", "masks": [torch.zeros(0, 16, 16)] * 2}
    found = distill_losses(student, teacher, batch, points=16)["class"].item()
    want = 0.0
    for b in range(2):
        p, q = ((x["classes"][0][b, 0] / TEMPERATURE).softmax(-1).tolist() for x in (teacher, student))
        want += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 2
    assert found == pytest.approx(WEIGHTS["class"] * TEMPERATURE**2 * want, rel=1e-5)


def test_prompts_are_compared_one_to_one_without_classes():
    teacher, student = outputs(0, 8, 8), outputs(3, 8, 8)
    batch = {"task": "interactive", "masks": [torch.zeros(3, 32, 32), torch.zeros(1, 32, 32)]}
    losses = distill_losses(student, teacher, batch, points=64)
    assert set(losses) == {"mask", "dice"}
    sum(losses.values()).backward()
    counted = student["masks"][0].grad.flatten(2).any(-1)
    assert counted.tolist() == [[True, True, True, False], [True, False, False, False]], "padding does not count"


@pytest.mark.parametrize("task", ["panoptic", "referring"])
def test_nothing_to_learn_is_zero_and_not_nan(task):
    teacher, student = outputs(0, 8, 8), outputs(3, 8, 8)
    teacher["classes"][0].data[..., 3] = 50
    losses = distill_losses(student, teacher, {"task": task, "masks": [torch.zeros(0, 32, 32)] * 2}, points=64)
    assert all(v == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert not student["masks"][0].grad.any()


# ---- scripts


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(out: Path, **more) -> list[str]:
    options = {"out": out, "device": "cpu", "backbone": "resnet18", "dim": 16, "queries": 6, "size": "32x32"}
    options |= {"batch_size": 2, "steps": 3, "print_every": 1, "val_items": 1, "points": 64, "prompts": 3, "lr": "1e-3"}
    return [word for k, v in (options | more).items() for word in (f"--{k.replace('_', '-')}", str(v))]


def train(out: Path, **more) -> Path:
    assert run.cli(script("train/train_fastsam2.py").main, flags(out, **more)) == 0
    return out


DISTILLED = {"ema": 0.9, "distill": 1.0, "keep_queries": 4, "key_rank": 8, "key_stride": 8, "fusion": "mean"}


def test_a_run_with_every_option_resumes_exactly(tmp_path):
    whole, part = train(tmp_path / "whole", **DISTILLED), train(tmp_path / "part", stop_at=2, **DISTILLED)
    train(part, resume="auto", **DISTILLED)
    a, b = (load_file(out / "last" / "model.safetensors") for out in (whole, part))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    trained = [torch.load(out / "last" / "state.pt", weights_only=True)["trained"] for out in (whole, part)]
    assert all(torch.equal(v, trained[1][k]) for k, v in trained[0].items())
    taught = ["distill loss" in row for row in run.read_metrics(whole) if "lr" in row]
    assert taught == [False, True, True], "from the end of the warm-up on"
    cfg = FastSAM2.from_checkpoint(whole / "last").cfg
    assert {k: getattr(cfg, k) for k in OPTIONS} == {**OPTIONS, "prune_after": 1, "key_stride": 8}


def test_a_run_begins_with_the_weights_of_other_options(tmp_path):
    first = train(tmp_path / "first", steps=1)
    out = train(tmp_path / "second", steps=1, init=first / "last", lr="1e-12", key_rank=8, fusion="mean")
    a, b = (load_file(folder / "last" / "model.safetensors") for folder in (first, out))
    name = "head.prompt_attn.attn."
    want = low_rank({k.removeprefix(name): v for k, v in a.items() if k.startswith(name)}, 8, 8)
    for key, value in want.items():
        near(b[name + key], value)
    assert "prompt_fusion.attn.layers.0.weight" in b and "prompt_fusion.attn.in_proj_weight" not in b
    near(b["prompt_fusion.seed"], a["prompt_fusion.seed"])


@pytest.mark.parametrize("more, said", [
    ({"distill": 1}, "--distill 1.0: the averaged weights teach"), ({"keep_queries": 7}, "--keep-queries 7"),
    ({"prune_after": 4}, "--prune-after 4: expected 1..3"),
    ({"key_rank": 12}, "--key-rank 12: expected a multiple of 8"), ({"key_rank": 24}, "--key-rank 24"), ({"ema": 0.9, "distill": -1}, "--distill -1.0"),
])  # fmt: skip
def test_bad_flags_are_one_sentence(tmp_path, capsys, more, said):
    assert run.cli(script("train/train_fastsam2.py").main, flags(tmp_path / "run", **more)) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ") and said in err and "\n" not in err
    assert not (tmp_path / "run").exists()


def test_the_teacher_sees_the_same_picture_in_other_light():
    module, images = script("train/train_fastsam2.py"), torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    seen = module.other_light(images) * 255
    assert seen.flatten(2).std(-1).max() < 1e-4 and seen[..., 0, 0].unique().numel() == 6
    assert seen.min() >= 80 and seen.max() <= 120
    assert module.other_light(images + 155).max() <= 1


def test_inference_takes_options_that_the_checkpoint_was_not_trained_with(tmp_path, capsys):
    model = network(queries=6, text="hash")
    embed = functools.partial(hash_texts, width=16)
    model.set_vocabulary(SMALL["classes"], build_vocabulary(SMALL["classes"], embed, ("{}",)), [True] * 3)
    data = {"data": {"category_ids": [1, 2, 3], "image_size": [64, 64]}}
    run.save_checkpoint(tmp_path / "run", 1, model, {**model.config_dict(), **data}, {})
    module = script("eval/infer_segment.py")
    module.overlay.save_png(tmp_path / "photo.png", torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy())
    words = [
        str(tmp_path / "photo.png"),
        "--ckpt",
        str(tmp_path / "run" / "last"),
        "--task",
        "instance",
        "--device",
        "cpu",
    ]
    number = {}
    for name, more in (("all", []), ("few", ["--keep-queries", "2", "--prune-after", "3"])):
        assert run.cli(module.main, [*words, "--out", str(tmp_path / name), *more]) == 0
        meta = json.loads((tmp_path / name / "instance.json.meta.json").read_text())
        assert f'"keep_queries": {2 if more else 0}' in json.dumps(meta) and '"key_stride": 4' in json.dumps(meta)
        number[name] = len(json.loads((tmp_path / name / "instance.json").read_text()))
    assert number["few"] <= 6 < number["all"] <= 18, "pairs of query and class"
    capsys.readouterr()
    assert run.cli(module.main, [*words, "--out", str(tmp_path / "bad"), "--keep-queries", "9"]) == 2
    err = capsys.readouterr().err.strip()
    assert "keep_queries 9 after stage 1: expected 0..6" in err and "\n" not in err and not (tmp_path / "bad").exists()


@torch.no_grad()
def test_rows_of_the_benchmark_run_the_options():
    path = ROOT / "smoke" / "bench_fastsam2.py"
    spec = importlib.util.spec_from_file_location("bench_fastsam2_options", path)
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench  # dataclass looks its module up
    spec.loader.exec_module(bench)
    del sys.modules[spec.name]
    torch.manual_seed(0)
    model = FastSAM2(FastSAM2Config(["a", "b"], "resnet18", dim=64, hidden=64)).eval()
    rows = bench.option_calls(model, torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), bench.as_it_is)
    assert rows["objects, 50 kept"]()["masks"][-1].shape == (1, 50, 16, 16)
    for name in bench.PROMPT_OPTIONS:
        assert rows[f"100 prompts, {name}"]()["masks"][-1].shape == (1, 100, 16, 16)
    assert len(rows["post-processing, 50 kept"]()["value"]) <= 50
