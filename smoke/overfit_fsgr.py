"""Overfit 16 pictures with a random backbone: cross-entropy to 0 and captions by heart; then more reward by SCST.

python smoke/overfit_fsgr.py                                  # rendered shapes: XE < 0.1 and 16 captions, a minute
python smoke/overfit_fsgr.py --data ROOT                      # COCO layout, Flickr8k or a csv (data/caption_files.py)
python smoke/overfit_fsgr.py --data ROOT --scst-steps 100     # and 100 steps on the CIDEr reward of 64 captions

The batch is made once, before the loop; no dropout and no label smoothing, so the loss can reach 0. With --scst-steps
a second model is trained halfway on 64 captions, to --scst-from, then on the reward of all captions of its pictures.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.caption_files import CaptionSet, load_captions
from data.caption_vocab import PAD, CaptionVocab
from data.coco_captions import CaptionCollate, CaptionItems, ImageItems, ImageReader
from data.coco_classes import COCO_80
from data.shape_captions import write_shapes
from models.caption_decoding import greedy
from models.caption_losses import caption_loss
from models.fsgr import FSGR, expected_loss, preset
from models.self_critical import END, self_critical_loss, spell
from utils import run
from utils.caption_metrics import CiderReward, DocumentFrequencies
from utils.run import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--data", default=None, metavar="ROOT", help="folder of pictures and captions (default: rendered)")
    p.add_argument("--arch", default="fsgr", choices=["fsgr", "m2"], help="m2: meshed-memory baseline on the patches")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=16, help="items per process and step")
    p.add_argument("--steps", type=int, default=400, help="most optimizer steps; stops early below --target")
    p.add_argument("--target", type=float, default=0.05, help="loss that counts as overfitted")
    p.add_argument("--lr", type=float, default=2e-3, help="constant learning rate")
    p.add_argument("--scst-steps", type=int, default=0, help="steps on the CIDEr reward afterwards (0: none)")
    p.add_argument("--scst-from", type=float, default=2.2, help="loss at which the reward takes over")
    p.add_argument("--scst-lr", type=float, default=3e-4, help="constant learning rate on the reward")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def read_data(root: str | None, seed: int) -> CaptionSet:
    """The training split of `root`, or of rendered shapes, whose pictures are read before their folder goes."""
    if root is None:
        root = tempfile.mkdtemp()
        write_shapes(Path(root), 32, 1, seed=seed)
    return load_captions(root, "train")[0]


def train_xe(model, batch: dict, steps: int, target: float, lr: float, r) -> tuple[float, float, int]:
    """The loop on one batch -> first loss, last loss, steps."""
    images, tokens = batch["image"].to(r.device), batch["tokens"].to(r.device)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    scaler, first = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16), None
    for step in range(1, steps + 1):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            loss = caption_loss(model(images, tokens[:, :-1])["logits"], tokens[:, 1:], PAD)
        opt.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        value = loss.item()
        first = value if first is None else first
        if step % 25 == 0 or step == 1 or value < target:
            print(f"step {step:4d} | xe {value:.4f}", flush=True)
        if value < target:
            break
    return first, value, step


def mean_reward(model, images: torch.Tensor, ids: list, reward: CiderReward) -> float:
    """Of the greedy captions."""
    model.eval()
    with torch.no_grad():
        tokens = greedy(model.decoder, model.encode(images)[0], 20).tokens.flatten(0, 1).cpu()
    model.train()
    scores = reward(ids, spell(tokens, model.cfg.vocab, model.decoder.eos, True))
    return sum(scores) / len(scores)


def raise_reward(model, batch: dict, steps: int, lr: float, r) -> tuple[float, float]:
    """SCST on one batch of pictures -> mean reward of their greedy captions before and after."""
    images, ids = batch["image"].to(r.device), batch["image_id"]
    references = {i: [f"{text} {END}" for text in texts] for i, texts in zip(ids, batch["references"], strict=True)}
    reward = CiderReward(DocumentFrequencies.of_images(references.values()), references)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    before = mean_reward(model, images, ids, reward)
    for step in range(1, steps + 1):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            loss, info = self_critical_loss(model, model, images, ids, reward)
        opt.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        if step % 25 == 0 or step == 1:
            print(f"scst step {step:4d} | mean reward of 5 beams {info['reward']:.3f}", flush=True)
    return before, mean_reward(model, images, ids, reward)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, batch_size=(1, 10**4), steps=(1, 10**6), scst_steps=(0, 10**6), lr=(1e-8, 1e-2))
    r = run.start(args, argv)

    # ---- data: one batch, made once
    captions = read_data(args.data, args.seed)
    captions.images = captions.images[: args.batch_size]
    n = len(captions)
    vocab = CaptionVocab.build(captions.captions(), min_freq=1)
    reader, collate = ImageReader(224, cache_gb=1), CaptionCollate(len(vocab))
    every = CaptionItems(captions, vocab, reader)  # all captions, image-major
    firsts = [i for i, (_, j) in enumerate(every.at) if j == 0]
    batch = collate([every[i] for i in firsts])
    fourfold = collate([ImageItems(captions, reader, 0, None, 4, vocab)[i] for i in range(n)])

    # ---- model
    cfg = preset("tiny", vocab.itos, COCO_80 if args.arch == "fsgr" else [], args.arch, dropout=0.0)
    model = FSGR(cfg).to(r.device)
    halfway = copy.deepcopy(model)
    print(f"# {n} pictures, {len(vocab)} words; first loss should be about {expected_loss(model):.2f}")

    # ---- loops, result
    first, last, steps = train_xe(model, batch, args.steps, args.target, args.lr, r)
    model.eval()
    with torch.no_grad():
        found = greedy(model.decoder, model.encode(batch["image"].to(r.device))[0], 50).tokens[:, 0].cpu()
    said = [vocab.decode(row, collapse_repeats=False) for row in found]
    meant = [vocab.decode(row, collapse_repeats=False) for row in batch["tokens"]]
    right = sum(a == b for a, b in zip(said, meant, strict=True))
    print(f"'{said[0]}'")
    result = f"XE {first:.3f} -> {last:.4f} in {steps} steps, {right}/{n} captions reproduced"
    before, after = 0.0, 1.0
    if args.scst_steps:
        train_xe(halfway, fourfold, args.steps, args.scst_from, args.lr, r)
        before, after = raise_reward(halfway, fourfold, args.scst_steps, args.scst_lr, r)
        result += f"; SCST {args.scst_steps} steps on {4 * n} captions' pictures: reward {before:.3f} -> {after:.3f}"
    run.finish(r, args, "FSGR", result)
    if last >= 0.1 or right < n - 1 or after < 1.2 * before:
        raise UserError(f"did not overfit: {result}; wanted XE < 0.1, all captions but one, 1.2 times the reward")


if __name__ == "__main__":
    sys.exit(run.cli(main))
