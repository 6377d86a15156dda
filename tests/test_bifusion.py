"""models/bifusion.py: CLIP's patch convolution, sampling at source pixels, gradients on both paths, step-0 identity."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from models.bifusion import (
    BiFusion,
    ImageBranch,
    geometric_code,
    load_clip_patch_weights,
    random_patch_weights,
    sample,
    seen,
)
from models.clip import CLIP, PRESETS, save_tiny_snapshot
from utils.posed_views import View
from utils.run import UserError

FRAMES = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data/esam/rgbd_7scenes"
WIDE = replace(PRESETS["tiny"], width=768, layers=1, heads=12, mlp=16)  # ViT-B/16's patch convolution, little else
C = 24


def branch(seed: int = 0) -> ImageBranch:
    torch.manual_seed(seed)
    made = ImageBranch()
    random_patch_weights(made, seed)
    return made


def fusion(seed: int = 0, trained: bool = False, **options) -> BiFusion:
    torch.manual_seed(seed)
    made = BiFusion(C, **options)
    random_patch_weights(made.image, seed)
    if trained:
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return made


def view(n: int = 200, size: tuple[int, int] = (96, 128), seed: int = 0) -> View:
    """Random points, all of them seen, and a smooth picture."""
    g = torch.Generator().manual_seed(seed)
    H, W = size
    uv = torch.stack([torch.randint(W, (n,), generator=g), torch.randint(H, (n,), generator=g)], 1).float()
    camera = torch.rand((n, 3), generator=g) * 3 + 0.2
    turn, _ = torch.linalg.qr(torch.randn((3, 3), generator=g))
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, torch.randn(3, generator=g)
    picture = F.interpolate(torch.rand((1, 3, 6, 8), generator=g), size, mode="bilinear")[0]
    zeros = torch.zeros(n, 3)
    picture = (255 * picture).byte()
    return View(zeros, zeros, torch.zeros(n).long(), uv=uv, size=size, camera=camera, pose=pose, picture=picture)


def offline(v: View, image: ImageBranch) -> View:
    return replace(v, features=image.encode(v.picture[None])[0][0].half(), picture=None)


def points(*views: View) -> list[torch.Tensor]:
    return [torch.randn((len(v), C), generator=torch.Generator().manual_seed(i)) for i, v in enumerate(views)]


# ---- the patch convolution


def test_equals_transformers(tmp_path):
    """Its processor's normalisation, then its patch embedding; sub-pixel (a, b) of channel 4 j + 2 a + b. 1e-5."""
    config = transformers.CLIPVisionConfig(hidden_size=768, num_hidden_layers=1, intermediate_size=8, patch_size=16)
    model = transformers.CLIPVisionModel(config)
    model.save_pretrained(tmp_path / "clip")
    ours = ImageBranch()
    load_clip_patch_weights(ours, tmp_path / "clip")
    v = view()
    process = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    pixels = process(Image.fromarray(v.picture.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    weight = next(p for name, p in model.named_parameters() if name.endswith("patch_embedding.weight"))
    want = F.conv2d(pixels, weight, stride=16)[0].detach()  # (768, 6, 8)
    pix, whole = ours.encode(v.picture[None])
    got = pix[0].unflatten(1, (6, 2)).unflatten(3, (8, 2)).permute(0, 2, 4, 1, 3).flatten(0, 2)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (whole[0] - want.mean((1, 2))).abs().max() < 1e-5


def test_weights_of_every_layout(tmp_path):
    save_tiny_snapshot(tmp_path / "clip", WIDE)
    torch.manual_seed(1)
    clip = CLIP(WIDE)
    torch.save({k: v.half() for k, v in clip.state_dict().items()}, tmp_path / "openai.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path / "open_clip.pt")
    prints = set()
    for name in ("clip", "openai.pt", "open_clip.pt"):
        ours = ImageBranch()
        load_clip_patch_weights(ours, tmp_path / name)
        prints.add(ours.fingerprint())
        if name != "clip":
            assert (ours.conv1_weight - clip.visual.conv1.weight).abs().max() < 1e-3
    assert len(prints) == 3


def test_refused_weights(tmp_path):
    save_tiny_snapshot(tmp_path / "narrow")
    torch.save({"a": torch.zeros(2)}, tmp_path / "none.pt")
    torch.save({"visual.conv1.weight": torch.full((768, 3, 16, 16), torch.inf)}, tmp_path / "inf.pt")
    (tmp_path / "empty").mkdir()
    for name, words in (("narrow", "(64, 3, 16, 16)"), ("none.pt", "holds none of visual.conv1.weight"), ("inf.pt", "not finite"),
                        ("empty", "is missing"), ("absent", "no such weight file")):  # fmt: skip
        ours = ImageBranch()
        with pytest.raises(UserError) as e:
            load_clip_patch_weights(ours, tmp_path / name)
        assert words in str(e.value) and ours.conv1_weight.isnan().all()


def test_without_weights_nothing_passes_silently():
    model, v = BiFusion(C), view()
    assert model(points(v), [v])[0][0].isnan().any()
    with pytest.raises(ValueError, match="not set"):
        model.image.fingerprint()


def test_fingerprint_knows_weights():
    assert branch(0).fingerprint() == branch(0).fingerprint() != branch(1).fingerprint()


def test_real_frames_in_half_precision():
    """Check 7.7.1: relative L2 behind conv_reduce below 1e-3; features of 0..255 pictures are far off."""
    names = sorted(FRAMES.glob("*.color.*"))[::10]
    if not names:
        pytest.skip(f"no frames in {FRAMES}")
    image, worst = branch(), 0.0
    for name in names:
        picture = torch.from_numpy(np.array(Image.open(name).convert("RGB"))).permute(2, 0, 1)[None]
        with torch.no_grad():
            online = image.encode(picture)[0]
            a, b = image.conv_reduce(online.half().float()), image.conv_reduce(online)
            raw = F.pixel_shuffle(F.conv2d(picture.float(), image.conv1_weight, stride=16), 2)
        worst = max(worst, float((a - b).norm() / b.norm()))
        assert (image.conv_reduce(raw) - b).norm() > 10 * b.norm()
    assert worst < 1e-3
    print(f"{len(names)} of {len(names)} frames, relative L2 at most {worst:.2g}")


# ---- sampling


@pytest.mark.parametrize("size", [(96, 128), (100, 130), (480, 640), (50, 40)])
def test_samples_at_the_source_pixel(size):
    """A map that holds the pixel coordinates of its cells' middles gives back each point's, between the outer middles."""
    H, W = size
    h, w = -(-H // 16) * 2, -(-W // 16) * 2
    v, u = torch.meshgrid(8 * torch.arange(h) + 3.5, 8 * torch.arange(w) + 3.5, indexing="ij")
    one = view(500, size)
    got = sample(torch.stack([u, v]), one, (W / (8 * w), H / (8 * h)), seen(one))
    inner = ((one.uv >= 3.5) & (one.uv <= torch.tensor([8.0 * w - 4.5, 8.0 * h - 4.5]))).all(1)
    assert inner.float().mean() > 0.6
    assert (got - one.uv)[inner].abs().max() < 1e-3
    low, high = torch.full((2,), 3.5), torch.tensor([8.0 * w - 4.5, 8.0 * h - 4.5])
    assert (got - one.uv.clamp(low, high)).abs().max() < 1e-3


def test_picture_of_another_size_shows_the_same():
    """A picture twice as large, padded or not, is looked up at the same places."""
    image, one = branch(), view(300, (100, 130))
    large = one.picture.repeat_interleave(2, 1).repeat_interleave(2, 2)
    _, ((px, py),), _ = image([replace(one, picture=large)])
    assert px == pytest.approx(260 / 272) and py == pytest.approx(200 / 208)
    with pytest.raises(ValueError, match="of a picture of 130x100 px"):  # precomputed ones must have the view's size
        image([offline(replace(one, picture=large), image)])


def test_neither_picture_nor_features():
    one = view()
    with pytest.raises(ValueError, match="neither a picture"):
        branch()([one, replace(one, picture=None)])
    with pytest.raises(ValueError, match="uint8"):
        branch()([replace(one, picture=one.picture.float())])


def test_code():
    """Every number of one point, written out."""
    one, model = view(3), fusion()
    code = geometric_code(one.camera, one.pose, model.waves, torch.tensor([True, False, True]))
    assert code.shape == (3, 64)
    R = one.pose[:3, :3].double().numpy()
    t = -R @ one.camera[[0, 2]].double().mean(0).numpy()  # from the middle of the valid points
    for i in range(3):
        p = one.camera[i].double().numpy()
        phase = [p[a] * 2 * np.pi * 2**k / 8 for a in range(3) for k in range(8)]
        want = [*p, *np.sin(phase), *np.cos(phase), *p / np.linalg.norm(p), *R[:, 0], *R[:, 1], *t, (R @ p + t)[2]]
        assert np.abs(code[i].numpy() - want).max() < 1e-4


# ---- fusion


@pytest.mark.parametrize("tiny_sa_2d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_nothing_at_first(tiny_sa_2d, dtype):
    model, views = fusion(tiny_sa_2d=tiny_sa_2d), [view(), view(150, seed=1)]
    views[1] = offline(views[1], model.image)
    x = points(*views)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, figures = model(x, views)
    assert all(torch.equal(a, b) for a, b in zip(out, x, strict=True))
    assert 0.2 < figures["gate_mean"] < 0.8 and figures["valid_ratio"] == 1 and figures["fallback_count"] == 1


@pytest.mark.parametrize("form", ["residual", "gate"])
def test_invalid_points(form):
    """Outside the picture, behind the camera, not finite: no picture in them, and finite gradients."""
    model, one = fusion(trained=True, fusion=form), view(8)
    bad = replace(one, uv=one.uv.clone(), camera=one.camera.clone())
    bad.uv[0, 0], bad.uv[1, 1], bad.uv[2] = -1, 95.5, torch.nan
    bad.camera[3, 2], bad.camera[4], bad.camera[5, 0] = 0.005, torch.nan, torch.inf
    assert seen(bad).tolist() == [False] * 6 + [True] * 2
    x = points(one)
    out, figures = model(x, [bad])
    other = model(x, [replace(bad, picture=255 - bad.picture)])[0][0]
    assert torch.equal(out[0][:6], other[:6]) and not torch.isclose(out[0][6:], other[6:]).any()
    if form == "residual":
        assert torch.equal(out[0][:6], x[0][:6]) and not torch.isclose(out[0][6:], x[0][6:]).any()
    assert figures["valid_ratio"] == 0.25
    out[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    lost = replace(one, pose=torch.full((4, 4), torch.nan))
    out, figures = model(x, [lost])
    assert out[0].isfinite().all() and figures["valid_ratio"] == figures["gate_mean"] == 0


def test_both_paths_train_conv_reduce():
    """Precomputed in half precision or computed here: the same loss within 1e-3, the same gradients, not zero."""
    losses, grads = [], []
    for prepared in (False, True):
        model, views = fusion(trained=True), [view(), view(seed=1)]
        views = [offline(v, model.image) for v in views] if prepared else views
        out, figures = model(points(*views), views)
        loss = torch.cat(out).square().mean()
        loss.backward()
        losses.append(loss.item())
        grads.append(model.image.conv_reduce.weight.grad)
        assert figures["fallback_count"] == 0 and not model.image.conv1_weight.requires_grad
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    assert grads[0].norm() > 0 and (grads[0] - grads[1]).norm() < 5e-3 * grads[0].norm()
    assert "conv1_weight" not in dict(model.image.named_parameters()) and "image.conv1_weight" in model.state_dict()


def test_fallback_is_counted():
    """Check 7.7.2: none with all files there; each view without, beside others, or where features are expected."""
    model, views = fusion(trained=True), [view(seed=i) for i in range(3)]
    full = [offline(v, model.image) for v in views]
    x = points(*views)
    whole, figures = model(x, full)
    assert figures["fallback_count"] == 0
    mixed, figures = model(x, [full[0], *views[1:]])
    assert figures["fallback_count"] == 2
    loss = [sum(o.square().mean() for o in out).item() for out in (whole, mixed)]
    assert abs(loss[0] - loss[1]) < 1e-3 * loss[0]
    assert model(x, views)[1]["fallback_count"] == 0
    model.expects_features = True
    assert model(x[:1], views[:1])[1]["fallback_count"] == 1


@pytest.mark.parametrize("options", [{}, {"fusion": "gate"}, {"tiny_sa_2d": True}])
def test_items_and_order_of_points_do_not_matter(options):
    """A batch of two of unlike sizes is two singles; points may come in any order. 1e-5."""
    model, views = fusion(trained=True, **options), [view(200), view(150, (50, 70), seed=1)]
    x = points(*views)
    both, _ = model(x, views)
    for i in range(2):
        (alone,), _ = model(x[i : i + 1], views[i : i + 1])
        assert (alone - both[i]).abs().max() < 1e-5
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    (shuffled,), _ = model([x[0][order]], [replace(views[0], uv=views[0].uv[order], camera=views[0].camera[order])])
    assert (shuffled - both[0][order]).abs().max() < 1e-5


def test_gate_mixes_convexly():
    """The published form lies between what the picture says and what the points say, channel by channel."""
    model, one = fusion(trained=True, fusion="gate"), view()
    heads = []
    for head in (model.image_head, model.point_head):
        head.register_forward_hook(lambda module, inputs, out: heads.append(out))
    out = model(points(one), [one])[0][0]
    low, high = torch.minimum(*heads), torch.maximum(*heads)
    assert (out >= low - 1e-6).all() and (out <= high + 1e-6).all()


def test_wrong_use():
    one = view()
    with pytest.raises(ValueError, match="expected one of"):
        BiFusion(C, fusion="sum")
    with pytest.raises(ValueError, match="views of"):
        fusion()([torch.zeros(3, C)], [one])
