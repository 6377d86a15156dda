"""Overfit one batch of rendered shapes with a tiny random Sa2VA: it must answer by heart and draw what it was asked for.

python smoke/overfit_sa2va.py                                   # 150 steps of 4 questions, 30 s on a CPU
python smoke/overfit_sa2va.py --arch qwen3_vl
python smoke/overfit_sa2va.py --device cuda --dtype bf16

Questions about the same picture differ: one object, another object, both, one that is not there. Everything is trained,
the random picture encoders too. Afterwards `predict` generates the answers. Bars: mask BCE at most a fifth of the first
and language loss below 0.01, both by --steps; every answer word for word; mean Dice 0.7 (one and the same mask for both
objects of a picture has about 0.65). Telling them apart to the pixel takes some seeds 250 steps.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.moving_shapes import CLASSES, LEAST, SHAPES, MovingShapes
from data.vessel_questions import answer, question
from models.sa2va import Sa2VA
from models.sa2va_names import GROUPS
from models.sa2va_processor import ARCHS, END
from models.sa2va_sizes import tiny_sa2va
from utils import run
from utils.run import UserError

BCE_FALLS, LM_BAR, DICE_BAR = 5.0, 0.01, 0.7
KINDS = ("one", "another", "both", "absent")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--arch", default="internvl", choices=ARCHS, help="line of the language model")
    p.add_argument("--size", type=int, default=96, help="side of the pictures in px")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=4, help="items per process and step")
    p.add_argument("--steps", type=int, default=150, help="optimizer steps")
    p.add_argument(
        "--lr",
        type=float,
        default=4e-3,
        help="learning rate after 10 steps, of SAM 2 a quarter; falls to 0 in the last 30 %%",
    )
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def make_questions(n: int, size: int, seed: int) -> list[dict]:
    """n questions about rendered pictures, four about each: image (S, S, 3) uint8, text, answer, masks (k, S, S)."""
    source, found = MovingShapes(400, seed, size, crowds=0, voids=0), []
    for index in range(len(source)):
        scene = source.scene(0, index)
        kinds = [CLASSES[label] for label in scene.labels]
        masks = {
            k: scene.masks == i for k, i in zip(kinds, scene.ids, strict=True) if k in SHAPES and kinds.count(k) == 1
        }
        seen = [k for k in sorted(masks) if masks[k].sum() > 4 * LEAST]
        absent = sorted(set(SHAPES) - set(kinds))
        if len(seen) < 2 or not absent:
            continue
        asked = {"one": seen[:1], "another": seen[1:2], "both": seen[1::-1], "absent": []}
        for kind in KINDS:
            text = question([f"the {name}" for name in asked[kind] or absent[:1]])
            drawn = np.stack([masks[k] for k in asked[kind]]) if asked[kind] else None
            found.append({"image": scene.image, "text": text, "answer": answer(len(asked[kind])), "masks": drawn})
        if len(found) >= n:
            return found[:n]
    raise UserError(f"--size {size}: too few pictures show two shapes and lack one; take a larger one or fewer items")


def check_answers(model: Sa2VA, asked: list[dict]) -> tuple[int, float]:
    """How many answers are word for word right, and the mean Dice of their masks; a wrong number of masks counts 0."""
    right, scores = 0, []
    said = model.predict_many([(x["image"], x["text"]) for x in asked], max_new_tokens=40)
    for x, found in zip(asked, said, strict=True):
        right += found["text"] == x["answer"] + END
        if x["masks"] is None:
            continue
        masks, truth = found["masks"].numpy(), x["masks"]
        fits = len(masks) == len(truth)
        scores += (
            [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in zip(masks, truth, strict=True)] if fits else [0.0]
        )
    return right, float(np.mean(scores))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, size=(32, 1024), batch_size=(1, 64), steps=(1, 10**6), lr=(1e-8, 1.0))
    r = run.start(args, argv)

    # ---- model, everything trained
    words = tuple(f"the {name}" for name in SHAPES)
    model = tiny_sa2va(args.seed, args.arch, sam_size=128, max_tiles=1, words=words).to(r.device).train()
    counts = model.set_trainable([group for _, group in GROUPS])

    # ---- data: one batch, made once
    asked = make_questions(args.batch_size, args.size, args.seed)
    encode = model.processor.encode
    batch = model.processor.collate([encode(x["image"], x["text"], x["answer"], x["masks"]) for x in asked])
    trained = [(name.startswith("sam."), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for sam, p in trained if sam], "lr": args.lr / 4},
              {"params": [p for sam, p in trained if not sam], "lr": args.lr}]  # fmt: skip
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    falls = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: min(1, (s + 1) / 10, (args.steps - s) / (0.3 * args.steps))
    )
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    print(f"# {len(asked)} questions, {sum(counts.values()) / 1e6:.2f} M trained parameters")

    # ---- loop
    first = {}
    for step in range(1, args.steps + 1):
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            losses = model(batch)
        opt.zero_grad(set_to_none=True)
        scaler.scale(losses["loss"]).backward()
        scaler.step(opt)
        scaler.update()
        falls.step()
        values = {k: losses[k].item() for k in ("lm", "bce", "dice")}
        first = first or values
        if step % 20 == 0 or step == 1:
            print(f"step {step:4d} | " + " | ".join(f"{k} {v:.4f}" for k, v in values.items()), flush=True)

    # ---- result
    model.eval()
    right, dice = check_answers(model, asked)
    for x in itertools.islice(asked, 4):
        print(f"'{x['text']}' -> '{model.predict(x['image'], x['text'], max_new_tokens=40)['answer']}'")
    falls_by = first["bce"] / max(values["bce"], 1e-9)
    result = (f"{args.arch}: {args.steps} steps, mask BCE {first['bce']:.3f} -> {values['bce']:.4f} ({falls_by:.1f} x), "
              f"LM {first['lm']:.2f} -> {values['lm']:.4f}, {right}/{len(asked)} answers, Dice {dice:.3f}")  # fmt: skip
    run.finish(r, args, "Sa2VA", result)
    if falls_by < BCE_FALLS or values["lm"] >= LM_BAR or right < len(asked) or dice < DICE_BAR:
        raise UserError(f"did not overfit: {result}; wanted BCE down {BCE_FALLS:g} x, LM < {LM_BAR}, all answers, Dice "
                        f"{DICE_BAR}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(run.cli(main))
