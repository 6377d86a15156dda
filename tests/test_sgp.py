"""SGP blocks, head and displacement decoding: equal to stored outputs of T-DEED; any T, padding, gradients.

Reads LAB_SHARED/data/tempopeak/module_cases/tdeed_*.npz, whatever is there; sizes stand in the names, as d32_ks5_k2.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.sgp import SGPBlock, SGPHead, SGPMixer, group_norm, halve, move_scores, real_frames, stretch

SHARED = Path(os.environ.get("LAB_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data" / "tempopeak"
BUILDERS = {  # kind of case -> module from the numbers in its name
    "tdeed_sgpblock": lambda n: SGPBlock(int(n["d"]), int(n["ks"]), n["k"]),
    "tdeed_edsgpmixer": lambda n: SGPHead(int(n["d"]), int(n["l"]), int(n["ks"]), n["r"]),
}
TOLERANCE = 1e-5  # of the largest output: float32 sums in another order


def of_kind(kind: str) -> list[Path]:
    files = sorted((SHARED / "module_cases").glob(f"{kind}*.npz"))
    if not files:
        pytest.skip(f"no reference cases {kind}*.npz in {SHARED / 'module_cases'}; set LAB_SHARED")
    return files


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dict, and the other tensors of a case."""
    with np.load(path) as z:
        tensors = {k: torch.from_numpy(z[k]) for k in z.files}
    state = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    return state, {k: v for k, v in tensors.items() if not k.startswith("sd.")}


def build(kind: str, path: Path) -> nn.Module:
    parts = [re.fullmatch(r"([a-z]+)([\d.]+)", part) for part in path.stem.split("_")]
    module = BUILDERS[kind]({p[1]: float(p[2]) for p in parts if p}).eval()
    module.load_state_dict(read(path)[0], strict=True)
    return module


def head(dim: int = 32, **sizes) -> SGPHead:
    torch.manual_seed(0)
    return SGPHead(dim, **{"levels": 2, "kernel": 5, "factor": 2, **sizes}).eval()


# ---- stored cases


@torch.no_grad()
@pytest.mark.parametrize("kind", BUILDERS)
def test_module_equals_the_original(kind, capsys):
    files, worst = of_kind(kind), 0.0
    for path in files:
        case = read(path)[1]
        got, want = build(kind, path)(case["in_x"]), case["out"]
        assert got.shape == want.shape, f"{path.name}: shape {tuple(got.shape)}, reference {tuple(want.shape)}"
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCE, f"{path.name}: error {error:.1e} of the largest output"
        worst = max(worst, error)
    with capsys.disabled():
        print(f"\n{kind}: {len(files)} of {len(files)} cases equal the original, {worst:.1e} of the largest output")


@torch.no_grad()
def test_stored_clips_beside_longer_ones():
    """The stored clips give the stored output with padding behind them too, whatever the padding holds."""
    for path in of_kind("tdeed_edsgpmixer"):
        case, module = read(path)[1], build("tdeed_edsgpmixer", path)
        x, want = case["in_x"], case["out"]
        B, T, D = x.shape
        for extra in (1, 2, 7):
            padded = torch.cat([x, torch.full((B, extra, D), 1e4)], dim=1)
            longer = torch.randn(1, T + extra, D)
            got = module(torch.cat([padded, longer]), lengths=torch.tensor([T] * B + [T + extra]))[:B, :T]
            assert (got - want).abs().max() <= TOLERANCE * want.abs().max(), (path.name, extra)


def test_moved_scores_equal_the_original(capsys):
    files = of_kind("tdeed_process_prediction")
    for path in files:
        case = read(path)[1]
        got = move_scores(case["in_logits"], case["in_displ"])
        torch.testing.assert_close(got, case["out"], rtol=0, atol=1e-6, msg=lambda m, n=path.name: f"{n}: {m}")
    with capsys.disabled():
        print(f"\nmove_scores: {len(files)} of {len(files)} cases equal the original")


# ---- parts that the stored cases reach only at even lengths


@pytest.mark.parametrize("T", range(1, 14))
def test_pooling_upsampling_and_norm_equal_torch_at_each_clips_length(T):
    torch.manual_seed(T)
    half, x, gn = (T + 1) // 2, torch.randn(2, 32, T) + 3, nn.GroupNorm(16, 32)
    nn.init.normal_(gn.weight)
    for extra in (0, 1, 4):
        lengths = torch.tensor([T, T])
        padded = F.pad(x, (0, extra), value=9.0)
        pooled, halves = halve(padded, lengths)
        assert halves.tolist() == [half, half] and pooled.shape[-1] == (T + extra + 1) // 2
        assert torch.equal(pooled[..., :half], F.adaptive_max_pool1d(x, half))
        assert not pooled[..., half:].any()
        want = F.interpolate(x[..., :half], T, mode="linear", align_corners=True)
        short = F.pad(x[..., :half], (0, (T + extra + 1) // 2 - half), value=9.0)
        torch.testing.assert_close(stretch(short, lengths, T + extra)[..., :T], want, rtol=0, atol=2e-6)
        got = group_norm(gn, padded, real_frames(padded, lengths))[..., :T]
        torch.testing.assert_close(got, gn(x), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_any_length_alone_equals_padded(levels):
    module, lengths = head(levels=levels), torch.tensor([17, 1, 2, 3, 8, 11, 16])
    x = torch.randn(len(lengths), 17, 32)
    x[real_frames(x.transpose(1, 2), lengths)[:, 0].logical_not()] = torch.nan  # padding must not even be looked at
    together = module(x, lengths=lengths)
    for i, T in enumerate(lengths.tolist()):
        alone = module(x[i : i + 1, :T])[0]  # (T, D)
        assert alone.shape == (T, 32) and alone.isfinite().all()
        torch.testing.assert_close(together[i, :T], alone, rtol=0, atol=TOLERANCE * alone.abs().max().item())


@torch.no_grad()
def test_block_and_mixer_alone_equal_padded():
    torch.manual_seed(0)
    block, mixer = SGPBlock(32, 5, 2).eval(), SGPMixer(32, 5, 2).eval()
    x, deep, lengths = torch.randn(2, 32, 9), torch.randn(2, 32, 5), torch.tensor([6, 9])
    for together, alone in (
        (block(x, lengths), block(x[:1, :, :6])),
        (mixer(x, deep, lengths), mixer(x[:1, :, :6], deep[:1, :, :3])),
    ):
        torch.testing.assert_close(together[:1, :, :6], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_frame_sees_both_sides():
    module, x = head(), torch.randn(1, 13, 32)
    for t in range(13):
        other = x.clone()
        other[:, t] += 1
        moved = (module(other) - module(x)).abs().amax(-1)[0]  # (T,)
        assert (moved > 1e-5).all(), f"frame {t} does not reach {(moved <= 1e-5).nonzero().flatten().tolist()}"


def test_gradients_are_finite_and_padding_gets_none():
    module, lengths = head().train(), torch.tensor([13, 6, 1])
    x = torch.randn(3, 13, 32)
    real = real_frames(x.transpose(1, 2), lengths)[:, 0]  # (B, T)
    x[~real] = torch.nan
    x.requires_grad_()
    module(x, lengths=lengths)[real].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())
    assert x.grad.isfinite().all() and x.grad[real].abs().sum(-1).all() and not x.grad[~real].any()


@torch.no_grad()
def test_bf16_autocast_is_near_fp32():
    module, x, lengths = head(), torch.randn(2, 13, 32), torch.tensor([13, 6])
    want = module(x, lengths=lengths)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x, lengths=lengths)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    assert (got - want)[0].abs().max() < 0.03 * want.abs().max()


def test_state_dict_is_strict_and_sizes_are_checked():
    state = head().state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        head().load_state_dict({k: v for k, v in state.items() if k != "_sgp.0.psi.bias"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        head(kernel=7).load_state_dict(state)
    with pytest.raises(ValueError, match="kernel 4"):
        SGPBlock(32, 4, 2)
    with pytest.raises(ValueError, match="divisible"):
        SGPBlock(24, 5, 2)


# ---- displacement


def test_scores_move_to_the_event_and_not_out_of_padding():
    logits = torch.full((1, 6, 2), -9.0)
    logits[..., 0] = 9.0
    logits[0, 1:4, 1] = torch.tensor([10.0, 12.0, 11.0])  # three frames around an event at frame 2
    logits[0, 5, 1] = 30.0  # padding
    displacement = torch.tensor([[0.0, -1.2, 0.3, 0.8, -7.0, 1.0]])
    moved = move_scores(logits, displacement, lengths=torch.tensor([5]))
    assert moved[0, :, 1].argmax() == 2 and moved[0, 2, 1] == logits.softmax(-1)[0, 2, 1]
    assert not moved[0, [1, 3, 5]].any() and moved[0, 4, 0] > 0.99  # all left frames 1 and 3; frame 4 stays inside
    torch.testing.assert_close(moved[:, :5], move_scores(logits[:, :5], displacement[:, :5]))
