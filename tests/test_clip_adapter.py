"""Adapters and prompts on CLIP's image tower: nothing changes at step 0, only they learn, dense features per patch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.clip import PRESETS, CLIPConfig, CLIPVision
from models.clip_adapter import AdaptedCLIP, AdapterConfig, added
from utils.run import UserError

CLIP = CLIPConfig(image_size=32, patch=8, width=64, layers=3, heads=2, mlp=128, embed_dim=24)
CFG = AdapterConfig(first=1, last=2)
N = (CLIP.image_size // CLIP.patch) ** 2
WITH_PROMPTS = replace(CFG, prompts=4)


def vision(cfg: CLIPConfig = CLIP) -> CLIPVision:
    """A tower whose biases and norms are random too."""
    torch.manual_seed(0)
    tower = CLIPVision(cfg).eval()
    with torch.no_grad():
        for p in tower.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return tower


def adapted(cfg: AdapterConfig = CFG, clip_cfg: CLIPConfig = CLIP, trained: bool = False) -> AdaptedCLIP:
    """That tower with adapters; `trained`: what starts at zero no longer is."""
    model = AdaptedCLIP(clip_cfg, cfg).eval()
    model.load_vision(vision(clip_cfg).state_dict())
    if trained:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if added(name):
                    p.add_(torch.randn_like(p) * 0.1)
    return model


def pictures(rows: int = 2, h: int = 32, w: int = 32) -> torch.Tensor:
    return torch.randn(rows, 3, h, w, generator=torch.Generator().manual_seed(1))


# ---- step 0


@pytest.mark.parametrize("kind", ["sequential", "parallel", "none"])
@torch.no_grad()
def test_equals_clip_at_step_0(kind):
    tower, images = vision(), pictures()
    tokens = tower(images)
    want = F.normalize(tower.project(tokens), dim=-1)
    out = adapted(replace(CFG, kind=kind, output_norm=False))(images)
    assert out["patches"].shape == (2, N, 64) and out["grid"] == (4, 4)
    assert (out["patches"] - tokens[:, 1:]).abs().max() <= 1e-6
    assert (out["global"] - want[:, 0]).abs().max() <= 1e-6 and (out["align"] - want[:, 1:]).abs().max() <= 1e-6
    normed = adapted(replace(CFG, kind=kind))(images)  # a LayerNorm before another one changes no direction
    assert (normed["patches"] - F.layer_norm(tokens, (64,), eps=1e-6)[:, 1:]).abs().max() <= 1e-6
    assert (normed["global"] - want[:, 0]).abs().max() <= 1e-4


@torch.no_grad()
def test_trained_adapters_and_prompts_change_the_tokens():
    images = pictures()
    plain = adapted(replace(CFG, kind="none"))(images)["patches"]
    changes = [replace(CFG), replace(CFG, kind="parallel"), replace(CFG, kind="none", prompts=4), WITH_PROMPTS]
    outs = [plain, *(adapted(cfg, trained=True)(images)["patches"] for cfg in changes)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


def test_prompts_are_fresh_in_every_layer_and_patches_stay_in_place():
    model = adapted(WITH_PROMPTS)
    lengths, seen = [], []
    for block in model.transformer.resblocks:
        block.ln_1.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]) or seen.append(x[0][:, 1:5]))
    out = model(pictures())
    assert lengths == [1 + 4 + N] * 3 and out["patches"].shape == (2, N, 64)
    want = model.prompt_proj(torch.cat([model.prompt_embeddings, model.deep_prompt_embeddings]))  # (layers, 4, W)
    assert all(torch.equal(a, b.expand(2, -1, -1)) for a, b in zip(seen, want, strict=True))
    model.train()
    assert not torch.equal(model(pictures())["patches"], out["patches"]), "prompts are dropped out in training"


# ---- what is trained


@pytest.mark.parametrize(
    ("cfg", "count"),
    [(AdapterConfig(output_norm=False), 1_775_232), (AdapterConfig(prompts=100), 3_288_960),
     (AdapterConfig(kind="none"), 1_536)],
)  # fmt: skip
def test_trainable_parameters_of_vit_b16(cfg, count):
    with torch.device("meta"):
        model = AdaptedCLIP(PRESETS["vit_b16"], cfg)
    model.freeze_backbone()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("cfg", [CFG, WITH_PROMPTS, replace(WITH_PROMPTS, kind="parallel", dense="csa")])
def test_gradients_reach_adapters_and_prompts_only(cfg):
    model = adapted(cfg, trained=True).train()
    model.freeze_backbone()
    out = model(pictures())
    sum(out[key].float().square().sum() + out[key].float().sum() for key in ("patches", "global", "align")).backward()
    grads = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
    assert grads == {name: "S_Adapter" in name or "prompt" in name for name in grads}


def test_load_vision_is_strict():
    model, state = AdaptedCLIP(CLIP, WITH_PROMPTS), vision().state_dict()
    own = {k: v.clone() for k, v in model.state_dict().items() if added(k)}
    model.load_vision(state)
    assert all(torch.equal(v, (own | state)[k]) for k, v in model.state_dict().items())
    for wrong, says in (
        ({k: v for k, v in state.items() if k != "ln_post.bias"}, "missing ln_post.bias"),
        (state | {"extra": torch.ones(1)}, "unexpected extra"),
        (state | {"proj": state["proj"].T}, r"proj is \(24, 64\)"),
        (model.state_dict(), "without adapters and prompts"),
    ):
        with pytest.raises(UserError, match=says):
            model.load_vision(wrong, "file")


@pytest.mark.parametrize(
    ("cfg", "says"),
    [(AdapterConfig(), "0..2"), (replace(CFG, first=2, last=1), "layers 2..1"), (replace(CFG, kind="lora"), "'lora'"),
     (replace(CFG, dense="sclip"), "'sclip'"), (replace(CFG, residual=False), "plain"),
     (replace(CFG, compat=True, dense="csa"), "compat"), (replace(CFG, ratio=0.01), "ratio")],
)  # fmt: skip
def test_settings_that_are_refused(cfg, says):
    with pytest.raises(ValueError, match=says):
        AdaptedCLIP(CLIP, cfg)


# ---- dense features

DENSE = [
    ("plain", True), ("maskclip", True), ("maskclip", False), ("csa", True), ("csa", False),
]  # fmt: skip


@torch.no_grad()
def test_dense_modes_differ_and_only_in_align():
    cfgs = [replace(WITH_PROMPTS, dense=dense, residual=residual) for dense, residual in DENSE]
    torch.manual_seed(2)
    state = adapted(WITH_PROMPTS, trained=True).state_dict()
    outs = []
    for cfg in cfgs:
        model = AdaptedCLIP(CLIP, cfg).eval()
        model.load_state_dict(state, strict=True)
        outs.append(model(pictures()))
    for i, out in enumerate(outs):
        assert (out["align"].norm(dim=-1) - 1).abs().max() <= 1e-5 and out["align"].shape == (2, N, 24)
        assert torch.equal(out["patches"], outs[0]["patches"])
        assert (out["global"] - outs[0]["global"]).abs().max() <= 1e-6
        assert all((out["align"] - other["align"]).abs().max() > 1e-2 for other in outs[:i])


@pytest.mark.parametrize(("dense", "residual"), DENSE)
@torch.no_grad()
def test_align_is_what_the_formula_says(dense, residual):
    model, images = adapted(replace(CFG, dense=dense, residual=residual), trained=True), pictures()
    x = model.embed(images)[0]
    *blocks, last = model.transformer.resblocks
    for block in blocks:
        x = block(x)
    x = x if dense == "plain" else x[:, 1:]
    q, k, v = (F.linear(last.ln_1(x), w, b).unflatten(-1, (2, 32)) for w, b in zip(
        last.attn.in_proj_weight.chunk(3), last.attn.in_proj_bias.chunk(3), strict=True))  # fmt: skip

    def weights(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bihd,bjhd->bhij", a, b).div(32**0.5).softmax(-1)

    if dense != "maskclip":
        mix = weights(q, k) if dense == "plain" else weights(q, q) + weights(k, k)
        v = torch.einsum("bhij,bjhd->bihd", mix, v)
    a = last.attn.out_proj(v.flatten(2))
    if residual:
        x = x + a + last.S_Adapter.D_fc2(F.gelu(last.S_Adapter.D_fc1(a)))
        a = x + last.mlp(last.ln_2(x))
    want = F.normalize(model.ln_post(model.prompt_norm(a)) @ model.proj, dim=-1)
    assert (model(images)["align"] - want[:, -N:]).abs().max() <= 1e-5


@torch.no_grad()
def test_parallel_adapter_is_what_the_formula_says():
    block = adapted(replace(CFG, kind="parallel"), trained=True).transformer.resblocks[-1]
    x = torch.randn(2, 5, 64)
    y = x + block.attn(block.ln_1(x))
    z = block.ln_2(y)
    want = y + block.mlp(z) + 0.1 * block.S_Adapter.D_fc2(F.relu(block.S_Adapter.D_fc1(z)))
    assert (block(x) - want).abs().max() <= 1e-5


@torch.no_grad()
def test_maskclip_does_not_mix_patches():
    images, one = pictures(), replace(CLIP, layers=1)
    other = images.clone()
    other[:, :, :8, :8] += 1  # the first patch
    for dense, mixes in (("plain", True), ("maskclip", False), ("csa", True)):
        model = adapted(AdapterConfig(first=0, last=0, prompts=2, dense=dense), one, trained=True)
        a, b = model(images), model(other)
        assert (a["align"][:, 0] - b["align"][:, 0]).abs().max() > 1e-3
        assert ((a["align"][:, 1:] - b["align"][:, 1:]).abs().max() > 1e-4) == mixes
        assert (a["global"] - b["global"]).abs().max() > 1e-4


# ---- sizes, precision


@torch.no_grad()
def test_other_image_sizes():
    model = adapted(replace(WITH_PROMPTS, dense="csa"), trained=True)
    assert torch.equal(model.positions(4, 4), model.positional_embedding)
    out = model(pictures(2, 48, 64))
    assert out["grid"] == (6, 8) and out["patches"].shape == (2, 48, 64) and out["align"].shape == (2, 48, 24)
    model.positional_embedding[1:] = torch.arange(4.0).repeat_interleave(4)[:, None]  # the row's number
    grid = model.positions(8, 6)[1:].unflatten(0, (8, 6))  # (8, 6, W)
    assert (grid.diff(dim=0) > 0).all() and (grid.diff(dim=1).abs() < 1e-5).all()
    assert torch.equal(model.positions(8, 6)[0], model.positional_embedding[0])


@pytest.mark.parametrize("dense", ["plain", "maskclip", "csa"])
@torch.no_grad()
def test_batch_equals_single_images_and_bf16_is_close(dense):
    model, images = adapted(replace(WITH_PROMPTS, dense=dense), trained=True), pictures(3)
    batch = model(images)
    for i in range(3):
        single = model(images[i : i + 1])
        assert all((batch[k][i] - single[k][0]).abs().max() <= 1e-5 for k in ("patches", "global", "align"))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    for key in ("patches", "global", "align"):
        assert low[key].dtype == torch.float32
        assert F.cosine_similarity(low[key], batch[key], dim=-1).min() > 0.995, key
