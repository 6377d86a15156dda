"""Does ESAM run here?  A step of single views and of a clip with memory for every route, what a route adds, evaluation.

python smoke/smoke_esam.py                                             # small network, rendered rooms, 20 s on a CPU
python smoke/smoke_esam.py --network full --points 20000 --device cuda --dtype bf16      # Res16UNet34C, 2 cm voxels
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.esam_items import room_items
from data.rgbd_frames import Augmentation
from models.bifusion import random_patch_weights
from models.esam import ESAM, ROUTES, ESAMConfig
from models.esam_losses import ESAMCriterion, clip_loss
from models.res16unet import Res16UNetConfig
from models.scene_validation import evaluate
from utils import run
from utils.partial_weights import partial_load

SMALL = {
    "backbone": Res16UNetConfig(stem=16, planes=(16, 32, 48, 64, 64, 48, 32, 32), layers=(1,) * 8),
    "voxel": 0.05, "dim": 64, "heads": 4, "ffn": 128, "merge_hidden": 64, "tsa_cell": 4,
}  # fmt: skip
FRAMES, LEAST = 3, 10  # of a clip; points of an instance that counts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--network", default="small", choices=["small", "full"], help="full: the published sizes")
    p.add_argument("--points", type=int, default=1500, help="of a frame")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    p.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    p.add_argument("--batch-size", type=int, default=2, help="items per process and step")
    p.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    return p.parse_args(argv)


def make(route: str, stage: str, classes: tuple[str, ...], sizes: dict, r) -> ESAM:
    torch.manual_seed(0)
    model = ESAM(ESAMConfig(classes, route=route, stage=stage, **sizes))
    if model.bi_encoder is not None:
        random_patch_weights(model.bi_encoder.image, 0)
    return model.to(r.device)


def step(model: ESAM, clips: list, labels: list, r) -> str:
    """Forward, loss and backward of a batch: a finite gradient on every parameter. Returns losses and time."""
    model.train()
    began = time.perf_counter()
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        outputs = model(clips)
    losses = clip_loss(outputs, clips, labels, ESAMCriterion(len(model.cfg.classes), model.cfg.n_stuff))
    losses["loss"].backward()
    values = {k: v.item() for k, v in losses.items()}
    wrong = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not wrong, f"{model.cfg.route} {model.cfg.stage}: no finite gradient on {wrong[:4]}"
    assert all(v == v and v >= 0 for v in values.values()), f"{model.cfg.route} {model.cfg.stage}: losses {values}"
    wanted = {"class", "mask", "dice", "semantic"} | ({"box", "merge"} if model.cfg.stage == "mv" else set())
    assert wanted <= set(values), f"losses {sorted(values)}: expected {sorted(wanted)}"
    milliseconds = 1e3 * (time.perf_counter() - began)
    return " | ".join(f"{k} {v:.2f}" for k, v in values.items() if k != "instance") + f" | {milliseconds:.0f} ms"


def answers(model: ESAM, clips: list) -> torch.Tensor:
    """Class and mask logits of the first frame, flat, in eval mode: a route or stage that adds a part changes none."""
    with torch.no_grad():
        out = model.eval()([clip[:1] for clip in clips])[0]
    return torch.cat([x.flatten() for stage in out.stages for x in (*stage.cls, *stage.masks)])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    run.check_ranges(args, points=(100, 10**6), batch_size=(1, 64))
    r = run.start(args, argv)
    sizes = SMALL if args.network == "small" else {}
    data = {"points": args.points, "seed": args.seed, "augment": Augmentation(), "pictures": True}
    items, unseen, classes = room_items(args.batch_size, 2, FRAMES, size=(96, 128), exact=True, **data)
    batch = [items[0, k] for k in range(args.batch_size)]
    clips, labels = ([[x.to(r.device) for x in item[i]] for item in batch] for i in (0, 1))
    print(f"# {args.batch_size} clips of {FRAMES} frames of {args.points} points, network {args.network}")

    # ---- every route and stage takes a training step, and adds nothing to the one before at first
    exact = 0.0 if r.device.type == "cpu" else 1e-3  # sums on a GPU have no fixed order
    earlier = None
    for route in ROUTES:
        single, clip = make(route, "sv", classes, sizes, r), make(route, "mv", classes, sizes, r)
        for old, new in ((earlier, single), (single, clip)):
            if old is None:
                continue
            found = partial_load(new, old.state_dict())
            what = f"{old.cfg.route} {old.cfg.stage} -> {new.cfg.route} {new.cfg.stage}"
            assert not found.unexpected and not found.mismatched, f"{what}: {found.lines()}"
            far = (answers(old, clips) - answers(new, clips)).abs().max().item()
            assert far <= exact, f"{what}: answers differ by {far:.1e}; a part adds something before it has learned"
        earlier = make(route, "sv", classes, sizes, r)
        earlier.load_state_dict(single.state_dict())
        print(f"{route:5s} sv | {step(single, [c[:1] for c in clips], [x[:1] for x in labels], r)}", flush=True)
        print(f"{route:5s} mv | {step(clip, clips, labels, r)}", flush=True)

    # ---- evaluation: clips of unseen rooms merged online
    model = make("bif", "mv", classes, sizes, r)
    scores, n, seconds = evaluate(model, (unseen[k] for k in range(len(unseen))), LEAST, dtype=r.dtype)
    assert all(v != v or 0 <= v <= 1 for x in scores.values() for v in x.values()), scores
    print(f"{n} scenes, untrained: AP {scores['classes']['AP']:.3f}, mIoU {scores['classes']['mIoU']:.3f}, "
          f"{1e3 * seconds:.0f} ms a frame")  # fmt: skip
    run.finish(r, args, "ESAM", f"PASS {args.network}: {', '.join(ROUTES)}, sv and mv, each adds nothing at first")


if __name__ == "__main__":
    sys.exit(run.cli(main))
