"""Does FSGR run here?  Shapes, first loss ln V + s^2/2, gradients on just what is trained, a caption of noise.

python smoke/smoke_fsgr.py                                       # tiny, FSGR and M2, 5 s on a CPU, no data
python smoke/smoke_fsgr.py --preset vit_b16 --device cuda --dtype bf16
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from models.caption_decoding import beam_search, greedy
from models.caption_losses import caption_loss
from models.fsgr import BOS, FSGR, PAD, SPECIALS, FSGRConfig, expected_loss, preset
from utils import run

V, K, L, CAPTIONS = 10_201, 80, 14, 5  # words, texts, length of a caption, captions of an image


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--preset", default="tiny", choices=["vit_b16", "tiny"], help="sizes; tiny is for laptops")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def agree(cfg: FSGRConfig, model: FSGR, images: torch.Tensor, tokens: torch.Tensor) -> str:
    """CPU = GPU on the same weights, in float32; AssertionError unless to 1e-3 of the largest logit."""
    on_cpu = FSGR(cfg).eval()
    on_cpu.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here, there = model(images, tokens)["logits"].cpu(), on_cpu(images.cpu(), tokens.cpu())["logits"]
    error = (here - there).abs().max().item() / there.abs().max().item()
    assert error < 1e-3, f"CPU and GPU differ by {error:.1e} of the largest logit"
    return f" | CPU = GPU within {error:.1e}"


def check(cfg: FSGRConfig, images: torch.Tensor, tokens: torch.Tensor, r) -> str:
    """One training step's forward and backward, then decoding: shapes, first loss, gradients. Returns the result."""
    B, N = len(images), (cfg.image_size // cfg.clip["patch"]) ** 2
    model = FSGR(cfg).to(r.device)
    autocast = torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32)
    t0 = time.perf_counter()
    with autocast:
        out = model(images, tokens[:, :-1])
    assert out["logits"].shape == (B * CAPTIONS, L - 1, V), out["logits"].shape
    if cfg.arch == "fsgr":
        assert out["index"].shape == (B, N) and out["dense_logits"].shape == (B, N, K)
        assert out["features"].shape == (B, N, cfg.dim)
    loss, want = caption_loss(out["logits"], tokens[:, 1:], PAD), expected_loss(model)
    assert abs(loss.item() - want) < 0.1, f"first loss {loss.item():.4f}, expected ln V + s^2/2 = {want:.4f}"
    loss.backward()
    t1 = time.perf_counter()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
    assert with_gradient == trained, f"gradient or none, against expectation: {sorted(with_gradient ^ trained)[:4]}"
    clip_trained = {n for n in trained if n.startswith("backbone.") and not ("S_Adapter" in n or "prompt" in n)}
    assert not clip_trained, f"CLIP's own weights are trained: {sorted(clip_trained)[:4]}"

    model.eval()
    t2 = time.perf_counter()
    with torch.no_grad(), autocast:
        memory, _ = model.encode(images)
        one, many = greedy(model.decoder, memory), beam_search(model.decoder, memory, beam=5)
    t3 = time.perf_counter()
    assert one.tokens.shape == many.tokens.shape == (B, 1, 20) and many.logprobs.isfinite().all()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{cfg.arch:4s} | {count / 1e6:.2f} M trained of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M | "
          f"logits {tuple(out['logits'].shape)} | loss {loss.item():.4f} (want {want:.4f}) | gradients on "
          f"{len(trained)} tensors{agree(cfg, model, images, tokens) if r.device.type == 'cuda' else ''}")  # fmt: skip
    for name, found in (("greedy", one), ("beam 5", many)):
        words = " ".join(cfg.vocab[i] for i in found.tokens[0, 0].tolist()[:8])
        print(f"     | {name}: {words} .. | log-probability {found.logprobs[0, 0].sum().item():.1f}")
    return f"{cfg.arch}: first loss {loss.item():.3f}, step {1e3 * (t1 - t0):.0f} ms, decoding {1e3 * (t3 - t2):.0f} ms"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, batch_size=(1, 4096))
    r = run.start(args, argv)
    vocab, names = [*SPECIALS, *(f"w{i}" for i in range(4, V))], [f"text {i}" for i in range(K)]
    tokens = torch.randint(4, V, (args.batch_size * CAPTIONS, L), device=r.device)
    tokens[:, 0] = BOS
    tokens[::3, -4:] = PAD
    results = []
    for arch in ("fsgr", "m2"):
        cfg = preset(args.preset, vocab, names, arch)
        images = torch.randn(args.batch_size, 3, cfg.image_size, cfg.image_size, device=r.device)
        results.append(check(cfg, images, tokens, r))
    run.finish(r, args, "FSGR", f"PASS {args.preset}, {args.batch_size} images; {'; '.join(results)}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
