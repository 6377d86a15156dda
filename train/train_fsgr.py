"""Train an image captioner, FSGR or the M2 baseline: cross-entropy first, then the CIDEr reward (self-critical).

python train/train_fsgr.py --data ROOT --preset tiny --out runs/xe                       # small set, random backbone, CPU
torchrun --nproc_per_node=8 train/train_fsgr.py --data coco --ids ids --clip weights/clip-vit-base-patch16 \\
    --batch-size 64 --dtype bf16 --workers 12 --schedule noam --out runs/xe
torchrun --nproc_per_node=8 train/train_fsgr.py --stage rl --data coco --ids ids --init runs/xe/best --batch-size 12 \\
    --dtype bf16 --workers 12 --lr 5e-6 --out runs/rl

ROOT is a COCO 2014 or 2017 folder, a Flickr8k folder or pictures with a csv of captions (data/coco_captions.py). Each
epoch ends with the CIDEr-D of the validation split; `best` is the highest, and --patience epochs without a higher one
end the stage. Stage rl starts from --init, whose vocabulary, codebook and architecture it keeps.
"""

import argparse
import gc
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repo root, so our packages import from anywhere
from data.caption_files import CaptionSet, load_captions
from data.caption_vocab import NEVER_SAID, PAD, CaptionVocab
from data.coco_captions import CaptionCollate, CaptionItems, ImageItems, ImageReader, PatchLabels
from data.coco_classes import COCO_80, read_names
from models.caption_decoding import beam_search
from models.caption_losses import ESTIMATORS, caption_loss
from models.clip import load_clip
from models.clip_adapter import AdaptedCLIP, AdapterConfig
from models.fsgr import FSGR, expected_loss
from models.fsgr_from_clip import new_captioner
from models.self_critical import END, self_critical_loss
from models.semantic_head import dense_ce_loss, supcon_loss
from utils import overlay, run, schedules
from utils.caption_metrics import CiderReward, DocumentFrequencies, score_captions
from utils.plots import curves
from utils.ptb_tokenizer import tokenize
from utils.run import UserError
from utils.training_guards import EarlyStopping, LossGuard, check_changed, check_rate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    g = p.add_argument_group("run")
    g.add_argument("--stage", default="xe", choices=["xe", "rl"], help="xe: cross-entropy; rl: CIDEr reward")
    g.add_argument("--out", default="runs/fsgr", help="run folder: checkpoints, metrics.jsonl, curves.png, run.json")
    g.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="autocast type; weights stay fp32")
    g.add_argument("--seed", type=int, default=0, help="seeds weights, batch order and augmentation")
    g.add_argument("--resume", default=None, help="checkpoint to continue bit for bit; auto: OUT/last if any")
    g.add_argument("--init", default=None, help="checkpoint whose weights to start from, with a fresh optimizer")
    g.add_argument("--epochs", type=int, default=20, help="epochs at most")
    g.add_argument("--least-epochs", type=int, default=0, help="epochs before --patience may end the stage")
    g.add_argument("--patience", type=int, default=5, help="validations without a higher CIDEr-D that end the stage")
    g.add_argument("--stop-at", type=int, default=None, help="stop and save here; the schedule still spans --steps")
    g.add_argument("--batch-size", type=int, default=32, help="items per process and step")
    g.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--workers", type=int, default=0, help="loader processes; does not change the numbers")
    g.add_argument("--print-every", type=int, default=20, help="steps between printed lines")
    g.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints; the newest 3 are kept")
    g.add_argument("--val-epochs", type=int, default=1, help="epochs between validations, each with a checkpoint")
    g.add_argument("--overfit", type=int, default=0, help="train and evaluate on the first N items only (0: off)")
    g.add_argument("--log", default=None, metavar="WHY", help="reason for this run; appends the result row to LOG.md")
    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, metavar="ROOT", help="folder of the pictures and captions")
    g.add_argument("--ids", default=None, help="folder of coco_{train,restval,dev,test}_ids.npy: annotation ids")
    g.add_argument("--karpathy", default=None, metavar="JSON", help="dataset_coco.json of the Karpathy splits")
    g.add_argument("--vocab", default=None, metavar="JSON", help="vocabulary file (default: words of the train split)")
    g.add_argument("--min-freq", type=int, default=5, help="a word of a new vocabulary occurs at least so often")
    g.add_argument("--captions-per-image", type=int, default=0, metavar="K",
                   help="xe: items are images with K captions each (0: items are captions)")  # fmt: skip
    g.add_argument("--cache-gb", type=float, default=0.0, help="decoded pictures kept in memory, GB per loader process")
    g = p.add_argument_group("model")
    g.add_argument("--arch", default="fsgr", choices=["fsgr", "m2"], help="m2: meshed-memory baseline on the patches")
    g.add_argument("--preset", default="vit_b16", choices=["vit_b16", "tiny"], help="sizes; tiny is for laptops")
    g.add_argument("--clip", default=None, help="CLIP weights: transformers snapshot or OpenAI .pt (default: random)")
    g.add_argument(
        "--clip-tokenizer", default=None, metavar="DIR", help="vocab.json and merges.txt, where --clip has none"
    )
    g.add_argument("--image-size", type=int, default=224, help="pixels of a side; positions of --clip are interpolated")
    g.add_argument("--train-backbone", action="store_true", help="train all of CLIP's vision tower, not only adapters")
    g.add_argument(
        "--adapter", default="sequential", choices=["sequential", "parallel", "none"], help="in CLIP's blocks"
    )
    g.add_argument("--prompts", type=int, default=0, help="learned tokens before every block (0: none; the paper: 100)")
    g.add_argument("--dense", default="csa", choices=["plain", "maskclip", "csa"], help="patch features for the texts")
    g.add_argument("--no-semantic", action="store_true", help="fsgr: no semantic head, self-attention on patches")
    g.add_argument("--codebook", default=None, metavar="TXT", help="texts of the semantic head, one a line")
    g.add_argument(
        "--codebook-table", default=None, metavar="FILE", help="their embeddings (K, E) (default: of --clip)"
    )
    g.add_argument("--count-norm", action="store_true", help="divide a patch's text by its frequency, as the source")
    g.add_argument("--word-init", default="random", choices=["random", "clip"], help="start of the word table")
    g.add_argument("--tie-weights", action="store_true", help="output layer shares the word table")
    g.add_argument("--prototypes", type=int, default=0, help="memory of the decoder's self-attention (PMA-Net: 1024)")
    g.add_argument("--bank", type=int, default=16384, help="words of earlier steps from which --prototypes are made")
    g.add_argument("--prototype-every", type=int, default=10, help="xe: steps between two clusterings, after epoch 1")
    g.add_argument("--dropout", type=float, default=0.1, help="in encoder and decoder")
    g = p.add_argument_group("loss and optimizer")
    g.add_argument("--label-smoothing", type=float, default=0.0, help="xe: mass on the other words (PureT: 0.1)")
    g.add_argument("--dense-loss", default="none", choices=["none", "supcon", "ce"], help="xe: on the patches' labels")
    g.add_argument("--dense-labels", default="masks", choices=["masks", "maskclip"],
                   help="of --dense-loss: COCO instance masks, or what frozen --clip takes each patch for")  # fmt: skip
    g.add_argument("--beta", type=float, default=0.25, help="weight of --dense-loss")
    g.add_argument("--schedule", default=None, choices=schedules.NAMES, help="default: cosine for xe, constant for rl")
    g.add_argument("--lr", type=float, default=None, help="peak learning rate (default: the schedule's own)")
    g.add_argument("--warmup", type=int, default=None, help="steps (default: noam 10000, cosine 1/20 of the run)")
    g.add_argument("--backbone-lr", type=float, default=0.1, help="factor on the rate of CLIP, adapters and prompts")
    g.add_argument("--weight-decay", type=float, default=0.0, help="AdamW decay of matrices and kernels")
    g.add_argument("--clip-grad", type=float, default=1.0, help="gradient norm is clipped here")
    g = p.add_argument_group("decoding and reward")
    g.add_argument("--beam", type=int, default=5, help="beams, or samples of an image in stage rl")
    g.add_argument("--val-beam", type=int, default=5, help="beams of the validation; 1: greedy")
    g.add_argument("--max-len", type=int, default=20, help="words of a generated caption, its end included")
    g.add_argument("--estimator", default="beam", choices=ESTIMATORS, help="rl: what is drawn, and its baseline")
    g.add_argument("--idf", default="image", choices=["image", "caption"], help="rl: what a document of CIDEr is")
    g.add_argument("--no-eos-reward", action="store_true", help="rl: the reward does not see where captions end")
    g.add_argument("--m2-norm", action="store_true", help="rl, beam: divide by --max-len as M2, not by the length")
    return p.parse_args(argv)


# flags that may differ between a run and its continuation: they do not change the numbers
FREE = {
    "out",
    "resume",
    "stop_at",
    "log",
    "workers",
    "print_every",
    "save_every",
    "device",
    "data",
    "cache_gb",
    "clip",
    "init",
}
# flags whose answer lies in the checkpoint of --init
BUILT = """arch preset clip clip_tokenizer image_size adapter prompts dense no_semantic codebook codebook_table count_norm
    word_init tie_weights prototypes bank dropout vocab min_freq""".split()
XE_ONLY = "dense_loss dense_labels beta label_smoothing captions_per_image prototype_every".split()
RL_ONLY = "estimator idf no_eos_reward m2_norm beam".split()


def check_flags(args, defaults) -> None:
    """UserError for what no run can have, before anything is written."""
    counts = "save_every epochs patience batch_size accum print_every val_epochs min_freq beam val_beam".split()
    run.check_ranges(args, **dict.fromkeys(counts, (1, 10**9)), workers=(0, 256), overfit=(0, 10**9))
    run.check_ranges(args, dropout=(0, 0.999), label_smoothing=(0, 0.999), beta=(0, 100), clip_grad=(1e-6, 1e6))
    run.check_ranges(args, weight_decay=(0, 10), backbone_lr=(0, 10), max_len=(2, 54), prompts=(0, 1000))
    run.check_ranges(args, least_epochs=(0, 10**9), cache_gb=(0, 1000), captions_per_image=(0, 100))
    run.check_ranges(args, image_size=(16, 2048), prototype_every=(1, 10**9), bank=(64, 10**8))
    run.check_ranges(args, prototypes=(0, min(args.bank, 10**6)))
    for name in ("warmup", "stop_at"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more steps")
    if args.stage == "rl" and args.init is None and args.resume is None:
        raise UserError("--stage rl needs --init, a checkpoint of stage xe: random captions earn no reward")
    if args.stage == "rl" and args.estimator != "greedy" and args.beam < 2:
        raise UserError(f"--beam {args.beam}: --estimator {args.estimator} compares captions; give 2 or more")
    teacher = args.dense_labels == "maskclip"  # it is read from --clip, whatever the model is made from
    idle = [(args.init, [n for n in BUILT if n != "clip" or not teacher], "comes from the checkpoint of --init")]
    idle += [(args.stage == "rl", XE_ONLY, "has no effect in stage rl")]
    idle += [(args.stage == "xe", RL_ONLY, "has no effect in stage xe")]
    idle += [(args.dense_loss == "none", ["beta", "dense_labels"], "has no effect without --dense-loss")]
    idle += [(args.estimator != "beam", ["m2_norm"], f"has no effect on --estimator {args.estimator}")]
    idle += [(not args.prototypes, ["bank", "prototype_every"], "has no effect without --prototypes")]
    idle += [(not args.clip, ["clip_tokenizer"], "has no effect without --clip")]
    idle += [(not args.codebook, ["codebook_table"], "needs --codebook, the texts of its rows")]
    idle += [(args.arch == "m2", ["prototypes", "tie_weights"], "is not to be had with --arch m2")]
    idle += [(args.arch == "m2" or args.no_semantic, ["dense_loss", "codebook", "count_norm"],
              "needs the semantic head of --arch fsgr")]  # fmt: skip
    for condition, names, why in idle:
        for name in names if condition else []:
            if getattr(args, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')}: {why}; leave it out")


def xe_loss(net, model, teacher, batch: dict, args, r) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of the captions; with --dense-loss also a loss on the patches, whose labels come from instance
    masks or from `teacher`, the frozen CLIP."""
    images, tokens = (batch[k].to(r.device, non_blocking=True) for k in ("image", "tokens"))
    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
        out = net(images, tokens[:, :-1])
    loss = caption_loss(out["logits"], tokens[:, 1:], PAD, args.label_smoothing if net.training else 0.0)
    values = {"xe": loss.detach()}
    if args.dense_loss != "none":
        if teacher is None:
            labels = batch["patch_labels"].to(r.device, non_blocking=True)  # (B, N)
        else:
            with torch.no_grad():
                labels = (teacher(images)["align"] @ model.head.codebook.T).argmax(-1)
        if args.dense_loss == "ce":
            dense = dense_ce_loss(out["dense_logits"], labels)
        else:
            dense = supcon_loss(out["features"].flatten(0, 1), labels.flatten())
        loss = loss + args.beta * dense
        values["dense"] = dense.detach()
    return loss, values


@torch.no_grad()
def validate(model, loader, args, r, vocab) -> tuple[dict, dict]:
    """Captions of the validation pictures and their scores -> (values, {image_id: caption})."""
    model.eval()
    captions, references = {}, {}
    for batch in loader:
        with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
            memory, _ = model.encode(batch["image"].to(r.device))
            found = beam_search(model.decoder, memory, args.val_beam, args.max_len, never=NEVER_SAID).tokens
        for i, row, texts in zip(batch["image_id"], found[:, 0].tolist(), batch["references"], strict=True):
            captions[i], references[i] = vocab.decode(row), texts
    model.train()
    corpus = score_captions(references, captions)["corpus"]
    values = {k: corpus[k] for k in ("CIDEr-D", "BLEU-4", "ROUGE-L")}
    return values | {"distinct": len(set(captions.values())), "n": len(captions)}, captions


def make_model(args, train: CaptionSet) -> tuple[FSGR, CaptionVocab]:
    """The checkpoint's model and words, or new ones of the flags' sizes."""
    if args.resume or args.init:
        model = FSGR.from_checkpoint(args.resume or args.init)
        vocab = CaptionVocab(model.cfg.vocab)
    else:
        vocab = CaptionVocab.load(args.vocab) if args.vocab else CaptionVocab.build(train.captions(), args.min_freq)
        model = new_captioner(
            args.preset, vocab.itos, read_names(args.codebook) if args.codebook else list(COCO_80), args.arch,
            args.clip, args.clip_tokenizer, {"kind": args.adapter, "prompts": args.prompts, "dense": args.dense},
            args.word_init, args.codebook_table, image_size=args.image_size, dropout=args.dropout, semantic=not args.no_semantic,
            count_norm=args.count_norm, tie_weights=args.tie_weights, prototypes=args.prototypes, bank=args.bank,
        )  # fmt: skip
    return model, vocab


def make_items(args, train: CaptionSet, reader: ImageReader, patches: PatchLabels | None, vocab: CaptionVocab):
    """Stage xe: captions, or pictures with --captions-per-image of them; stage rl: pictures with all references."""
    if args.stage == "rl":
        return ImageItems(train, reader, args.seed)
    if args.captions_per_image:
        return ImageItems(train, reader, args.seed, patches, args.captions_per_image, vocab)
    return CaptionItems(train, vocab, reader, seed=args.seed, patches=patches)


def make_groups(model: FSGR, args) -> tuple[dict[str, torch.nn.Parameter], list[dict]]:
    """What is trained by name, and AdamW's groups of it: a group's factor multiplies the rate. Tables, norms, biases
    and prompts do not decay."""
    if args.train_backbone:
        model.backbone.requires_grad_(True)
        if model.cfg.arch == "m2":  # these lead to the image's embedding only, which M2 does not look at
            model.backbone.proj.requires_grad_(False)
            model.backbone.ln_post.requires_grad_(False)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups: dict[tuple, dict] = {}  # (backbone?, decayed?) -> group
    for name, p in params.items():
        slow, matrix = name.startswith("backbone."), name.endswith("weight") and p.ndim > 1 and "_emb." not in name
        group = {"params": [], "factor": args.backbone_lr if slow else 1.0}
        group["weight_decay"] = args.weight_decay if matrix else 0.0
        groups.setdefault((slow, matrix), group)["params"].append(p)
    return params, list(groups.values())


def check_vocab(args, vocab: CaptionVocab, train: CaptionSet) -> None:
    """UserError for a vocabulary that the captions do not use, or that has fewer words than beams."""
    unknown, total = vocab.count_unknown(train.captions())
    if unknown > total / 2:
        raise UserError(
            f"{args.vocab or args.init or args.data}: {unknown} of {total} words of the training captions are not in "
            "this vocabulary; give the one that belongs to the data"
        )
    for name in ("beam", "val_beam"):
        if getattr(args, name) > len(vocab) - len(NEVER_SAID):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: the vocabulary has {len(vocab)} words")


def make_dense_labels(args, model: FSGR, train: CaptionSet, reader: ImageReader, r):
    """(labels from instance masks, None) or (None, a frozen CLIP that gives them)."""
    if args.dense_labels == "maskclip":
        if not args.clip:
            raise UserError("--dense-labels maskclip needs --clip: a random tower takes patches for anything")
        weights, clip = load_clip(args.clip), model.cfg.clip
        if (weights.cfg.embed_dim, weights.cfg.patch) != (clip["embed_dim"], clip["patch"]):
            raise UserError(f"--clip {args.clip}: of another size than the model's own; give the CLIP it was made from")
        teacher = AdaptedCLIP(weights.cfg, AdapterConfig(kind="none", dense="maskclip"))
        teacher.load_vision(weights.visual.state_dict(), args.clip)
        return None, teacher.to(r.device).eval().requires_grad_(False)
    if not train.instances:
        raise UserError(
            f"--dense-loss {args.dense_loss}: {args.data} has no annotations/instances_*.json of its images"
        )
    side = model.cfg.image_size // model.cfg.clip["patch"]
    patches = PatchLabels(train.instances, reader, (side, side), {x["image_id"] for x in train.images})
    if args.dense_loss == "ce" and patches.classes != model.cfg.codebook_names:
        raise UserError(
            f"--dense-loss ce: the masks have {len(patches.classes)} classes ({patches.classes[0]}, ..), the codebook "
            f"{len(model.cfg.codebook_names)} texts; give their names with --codebook, or take --dense-loss supcon"
        )
    return patches, None


def refresh_prototypes(model: FSGR, seed: int, step: int, r) -> None:
    """Rank 0 clusters its own bank of words and sends the prototypes to the others."""
    for k, attention in enumerate(getattr(model.decoder, "prototypes", [])):
        if r.main:
            attention.refresh(torch.Generator().manual_seed(run.step_seed(seed, step, k)))
        if r.ddp:
            for buffer in (attention.prototype_k, attention.prototype_v, attention.ready):
                dist.broadcast(buffer, 0)


def make_reward(train: CaptionSet, out: Path, args, r) -> CiderReward:
    """CIDEr-D against the training captions. Their document frequencies are counted by rank 0, into OUT."""

    def prepare(text: str) -> str:
        return tokenize(text) + ("" if args.no_eos_reward else f" {END}")

    references = {x["image_id"]: [text for _, text in x["captions"]] for x in train.images}
    path = out / f"document_frequencies_{args.idf}{'' if args.no_eos_reward else '_eos'}.json"
    if r.main and not path.exists():
        run.say(r, f"# counting the n-grams of {len(references)} images")
        count = DocumentFrequencies.of_images if args.idf == "image" else DocumentFrequencies.of_captions
        count([prepare(text) for text in texts] for texts in references.values()).save(path)
    if r.ddp:
        dist.barrier(group=r.control)
    return CiderReward(DocumentFrequencies.load(path), references, prepare)


def draw_progress(out: Path, captions: dict, val_set: ImageItems, show: int = 12) -> None:
    """OUT/val_captions.json, a COCO results file of all of them, and OUT/val.png with the first pictures."""
    results = [{"image_id": i, "caption": text} for i, text in captions.items()]
    run.write_text_atomic(out / "val_captions.json", json.dumps(results) + "\n")
    items = val_set.captions.images[:show]
    squares = [val_set.reader.square(x["file"]) for x in items]
    overlay.save_png(out / "val.png", overlay.grid(squares, 4, [captions[x["image_id"]] for x in items]))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args, vars(parse_args(["--data", "."])))
    anew = run.find_resume(args)
    r = run.start(args, argv)

    # ---- data, model
    train, val = load_captions(args.data, "train", "val", ids=args.ids, karpathy=args.karpathy)
    if args.overfit:
        train.images = [{**x, "captions": x["captions"][:1]} for x in train.images[: args.overfit]]
        val = train
    for part in (train, val):
        run.say(r, f"# {part.summary()}")
    model, vocab = make_model(args, train)
    model.to(r.device)
    cfg = model.cfg
    check_vocab(args, vocab, train)
    reader = ImageReader(cfg.image_size, cfg.resize, cfg.mean, cfg.std, cache_gb=args.cache_gb)
    patches, teacher = None, None
    if args.dense_loss != "none":
        patches, teacher = make_dense_labels(args, model, train, reader, r)
    train_set = make_items(args, train, reader, patches, vocab)
    val_set, collate = ImageItems(val, reader), CaptionCollate(len(vocab))

    # ---- optimizer
    params, groups = make_groups(model, args)
    opt = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    scaler = torch.amp.GradScaler(r.device.type, enabled=r.dtype == torch.float16)
    stopper, step = EarlyStopping(args.patience, -(-args.least_epochs // args.val_epochs)), 0
    if args.resume:
        state = run.load_state(args.resume)
        run.check_continuation(r, args, state, FREE - {"clip"} if teacher else FREE)
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        stopper.load_state_dict(state["stopper"])
        step = state["step"]
    per_epoch = max(1, len(train_set) // (args.batch_size * r.world * args.accum))
    steps = args.epochs * per_epoch
    schedule = args.schedule or ("cosine" if args.stage == "xe" else "constant")
    warmup = args.warmup if args.warmup is not None else 10_000 if schedule == "noam" else steps // 20

    def rate(step: int) -> float:
        return schedules.learning_rate(schedule, step, steps=steps, per_epoch=per_epoch, lr=args.lr, warmup=warmup,
                                       dim=model.cfg.dim)  # fmt: skip

    stop = steps if args.stop_at is None else min(args.stop_at, steps)
    if step < stop:
        check_rate(rate(step), step)
    out = run.open_folder(r, args, anew)
    if r.main:
        run.rewind_metrics(out, step)
    reward = make_reward(train, out, args, r) if args.stage == "rl" else None
    net = model
    if r.ddp:
        ids = [r.device.index] if r.device.type == "cuda" else None
        net = DDP(net, device_ids=ids, broadcast_buffers=False)  # all are constants, or `refresh_prototypes` sends them
    batches = run.StepBatches(len(train_set), args.batch_size, step, stop, args.seed, r.rank, r.world, args.accum)
    load = {"collate_fn": collate, "num_workers": args.workers, "worker_init_fn": run.ignore_sigterm}
    loader = iter(DataLoader(train_set, batch_sampler=batches, pin_memory=r.device.type == "cuda", **load))
    val_loader = DataLoader(val_set, batch_size=args.batch_size, **load)
    run.say(r, f"# {sum(p.numel() for p in params.values()):,} trainable parameters of "
               f"{sum(p.numel() for p in model.parameters()):,} | {per_epoch} steps an epoch")  # fmt: skip
    if args.stage == "xe" and not (args.resume or args.init):
        run.say(r, f"# image tower: {args.clip or 'random weights, for lack of --clip'}")
        run.say(r, f"# first loss should be {expected_loss(model):.3f}")

    def save(is_best: bool = False) -> None:
        if r.main:
            if not all(p.isfinite().all() for p in params.values()):
                raise UserError(f"step {step}: weights are not finite; try a lower --lr or --dtype fp32")
            state = {"optimizer": opt.state_dict(), "scaler": scaler.state_dict(), "stopper": stopper.state_dict()}
            state |= {"args": vars(args), "world": r.world}
            run.save_checkpoint(out, step, model, model.config_dict(), state, best=is_best)

    # ---- loop
    run.watch_sigterm(r)
    model.train()
    model.decoder.noting = args.stage == "xe" and args.prototypes > 0
    guard = LossGuard(out, patience=300 if args.stage == "xe" else 0, rank=r.rank)
    bar = tqdm(total=steps, initial=step, disable=not (r.main and sys.stderr.isatty()), leave=False)
    began, since, saved, val = time.perf_counter(), step, step if args.resume else -1, {}
    clock = {"decode_s": 0.0, "reward_s": 0.0}
    while step < stop and not stopper.stop and not run.should_stop(r):
        lr = rate(step)
        for group in opt.param_groups:
            group["lr"] = check_rate(lr * group["factor"], step) if group["factor"] else 0.0
        before = [p.detach().clone() for p in params.values()] if step == 0 else None
        total = {}
        for a in range(args.accum):
            run.seed_all(run.step_seed(args.seed, step, a * r.world + r.rank))
            batch = next(loader)
            with net.no_sync() if r.ddp and a < args.accum - 1 else nullcontext():
                if args.stage == "xe":
                    loss, values = xe_loss(net, model, teacher, batch, args, r)
                else:
                    images = batch["image"].to(r.device, non_blocking=True)
                    with torch.autocast(r.device.type, r.dtype, enabled=r.dtype != torch.float32):
                        loss, values = self_critical_loss(
                            net, model, images, batch["image_id"], reward, args.estimator, args.beam, args.max_len,
                            not args.no_eos_reward, args.m2_norm, NEVER_SAID,
                        )  # fmt: skip
                    clock = {k: clock[k] + values.pop(k) for k in clock}
                scaler.scale(loss / args.accum).backward()
            total = {k: total.get(k, 0.0) + v / args.accum for k, v in values.items()}
            warning = guard.note(step + 1, loss.detach(), batch)
            if warning:
                run.say(r, warning)
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(list(params.values()), args.clip_grad)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        step += 1
        bar.update()
        # fp16 may skip steps until its scale fits; captions that all earn the same reward give no gradient
        if before is not None and not scaler.is_enabled() and norm > 0:
            check_changed(before, list(params.values()), step)
        if step % args.print_every == 0 or step == 1:  # .item() waits for the GPU, so only here
            seconds, n = time.perf_counter() - began, step - since
            values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=r.device) for v in total.values()])
            if r.ddp:
                dist.all_reduce(values)
            shown = dict(zip(total, (values / r.world).tolist(), strict=True))
            if args.stage == "rl":
                shown |= {k: v / n for k, v in clock.items()}
                shown["backward_s"] = seconds / n - sum(clock.values()) / n
            speed = n * args.batch_size * args.accum * r.world / seconds
            run.report(r, out, step, steps, **shown, lr=lr, lr_backbone=lr * args.backbone_lr, grad=norm.item(),
                       items_per_s=speed)  # fmt: skip
            began, since, clock = time.perf_counter(), step, dict.fromkeys(clock, 0.0)
        epoch, rest = divmod(step, per_epoch)
        if args.stage == "xe" and epoch >= 1 and step % args.prototype_every == 0:
            refresh_prototypes(model, args.seed, step, r)
        due = step == steps or (rest == 0 and epoch % args.val_epochs == 0)
        if due or step == stop:
            guard.check()
            score = torch.zeros((), dtype=torch.float64)
            if r.main:
                val, captions = validate(model, val_loader, args, r, vocab)
                run.report(r, out, step, steps, epoch=epoch, **val)
                score.fill_(val["CIDEr-D"])
                draw_progress(out, captions, val_set)
            if r.ddp:  # all ranks count alike, so that all end alike
                dist.broadcast(score, 0, group=r.control)
            save(is_best=due and stopper.update(score.item()))  # --stop-at within an epoch must not count
            saved, began, since, clock = step, time.perf_counter(), step, dict.fromkeys(clock, 0.0)
            if stopper.stop:
                run.say(
                    r, f"# {args.patience} validations without a higher CIDEr-D than {stopper.best:.4f}: stage ends"
                )
                break
        elif step % args.save_every == 0:
            guard.check()
            saved = step
            save()
    bar.close()
    guard.check()

    # ---- result
    if saved != step:
        save()
    if r.main and run.read_metrics(out):
        run.write_metrics_csv(out)
        curves(out / "metrics.jsonl", out / "curves.png")
    if r.stop_asked:
        run.say(r, f"# SIGTERM: saved step {step} in {out}/last; continue with --resume {out}/last")
    del net  # DDP holds the process group; freed after it, its destructor can wait for ever for gloo's thread
    gc.collect()
    last = ", ".join(f"{k} {v:.4g}" for k, v in val.items())
    run.finish(r, args, "FSGR", f"step {step}: best CIDEr-D {stopper.best:.4f}; last {last or 'not validated'}")


if __name__ == "__main__":
    sys.exit(run.cli(main))
