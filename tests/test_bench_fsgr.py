"""What smoke/bench_fsgr.py compares is comparable: the same captions with and without a cache, decoders of one size."""

import importlib.util
from pathlib import Path

import pytest
import torch

from models.fsgr import FSGRDecoder, preset


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[1] / "smoke" / "bench_fsgr.py"
    spec = importlib.util.spec_from_file_location("bench_fsgr", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_uncached_search_finds_the_same_captions(bench):
    torch.manual_seed(0)
    decoder = FSGRDecoder(40, 12, dim=32, heads=4, d_ff=48, layers=2).eval()
    decoder.fc.weight.mul_(4)
    decoder.fc.weight[decoder.pad] = 0  # padding inside a caption is nothing to compare
    memory = (torch.randn(3, 6, 32), torch.randn(1, 6, 32))
    for beam in (1, 4):
        ours, slow = (bench.beam_search(d, memory, beam, 10, out_size=beam) for d in (decoder, bench.Uncached(decoder)))
        assert torch.equal(ours.tokens, slow.tokens)
        assert torch.allclose(ours.logprobs, slow.logprobs, atol=1e-5)
        assert not (ours.tokens == decoder.pad).any() or (ours.lengths < 10).any()


def test_the_decoder_of_transformers_has_our_size(bench):
    words = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"word{i}" for i in range(996))]
    cfg = preset("tiny", words, ["a", "b"])
    ours = FSGRDecoder(len(words), cfg.max_len, cfg.dim, cfg.heads, cfg.d_ff, cfg.dec_layers)
    bart = bench.make_bart(cfg)
    sizes = [
        sum(p.numel() for m in modules for p in m.parameters())
        for modules in ([ours], [bart.model.decoder, bart.lm_head])
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02, sizes
    assert bench.generate(bart.eval(), (torch.randn(2, 9, cfg.dim),), 2, 5) == 5  # words
