"""train/train_fsgr.py on rendered shapes: both stages, exact resume, two ranks, and the recorded failures' guards."""

import functools
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data.caption_files import load_captions
from data.caption_vocab import NEVER_SAID, PAD, CaptionVocab
from data.coco_captions import CaptionCollate, ImageItems, ImageReader
from data.shape_captions import write_shapes
from models.caption_decoding import beam_search
from models.clip import load_clip, save_tiny_snapshot
from models.fsgr import FSGR
from utils import run
from utils.caption_metrics import CiderReward, DocumentFrequencies, score_captions
from utils.ptb_tokenizer import tokenize

ROOT = Path(__file__).resolve().parents[1]
SPEEDS = {"items_per_s", "decode_s", "reward_s", "backward_s"}  # what is not repeatable


@functools.cache
def script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "root"
    write_shapes(root, train=12, val=4, size=32)
    (root / "names.txt").write_text("circle\nsquare\ntriangle\nbar\n")
    return root


def flags(data: Path, out: Path, /, **more) -> list[str]:
    """Arguments of a small run: 3 steps an epoch. more: flags that are added or replaced, as seed=1; None: left out."""
    options = {"data": data, "out": out, "device": "cpu", "preset": "tiny", "image_size": 64, "min_freq": 1}
    options |= {"batch_size": 4, "captions_per_image": 2, "epochs": 2, "print_every": 1, "val_beam": 2, "lr": "2e-3"}
    words = []
    for name, value in (options | more).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(data: Path, out: Path, /, **more) -> Path:
    assert run.cli(script("train/train_fsgr.py").main, flags(data, out, **more)) == 0
    return out


def refused(capsys, data: Path, out: Path, /, **more) -> str:
    """The sentence of a run that must be refused."""
    capsys.readouterr()
    assert run.cli(script("train/train_fsgr.py").main, flags(data, out, **more)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs without curves.png and val.png, which take longer than a few steps."""
    for name in ("curves", "draw_progress"):
        monkeypatch.setattr(script("train/train_fsgr.py"), name, lambda *_: None)


def metrics(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in run.read_metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


RL = {"stage": "rl", "preset": None, "image_size": None, "min_freq": None, "captions_per_image": None, "beam": 3}
RL |= {"lr": "1e-4", "max_len": 12}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A short run of stage xe that says more than one sentence."""
    return train(data, tmp_path_factory.mktemp("xe") / "run", epochs=24, val_epochs=12, dropout=0, lr="3e-3",
                 backbone_lr=1, train_backbone=True)  # fmt: skip


# ---- a run


def test_first_stage(data, trained):
    rows = metrics(trained)
    losses = [row["xe"] for row in rows if "xe" in row]
    assert losses[-1] < 0.5 * losses[0] and len(losses) == 72
    assert [row["epoch"] for row in rows if "epoch" in row] == [12, 24]
    said = json.loads((trained / "val_captions.json").read_text())
    assert [x["image_id"] for x in said] == [13, 14, 15, 16] and all(x["caption"] for x in said)
    for name in ("curves.png", "val.png", "metrics.csv", "run.json", "last/state.pt", "best/config.json"):
        assert (trained / name).stat().st_size > 100, name
    model = FSGR.from_checkpoint(trained / "last")
    assert "above" in model.cfg.vocab and model.cfg.codebook_names[0] == "person"


@pytest.mark.parametrize("estimator", ["beam", "sample", "greedy"])
def test_second_stage(data, trained, tmp_path, estimator, monkeypatch, no_pictures):
    module, told = script("train/train_fsgr.py"), []

    def noted(*args, **kw):
        told.append(inspect.signature(loss).bind(*args, **kw).arguments)
        return loss(*args, **kw)

    loss = module.self_critical_loss
    monkeypatch.setattr(module, "self_critical_loss", noted)
    more = {"m2_norm": True, "idf": "caption"} if estimator == "beam" else {"no_eos_reward": True}
    out = train(data, tmp_path / "rl", init=trained / "last", estimator=estimator, epochs=1, **RL, **more)
    rows = [row for row in run.read_metrics(out) if "reward" in row]
    assert len(rows) == 3 and all(math.isfinite(row["reward"]) and row["grad"] > 0 for row in rows)
    assert all(row["decode_s"] > 0 and row["reward_s"] > 0 and row["backward_s"] > 0 for row in rows)
    m2 = estimator == "beam"
    wanted = {"estimator": estimator, "k": 3, "max_len": 12, "end": m2, "m2_norm": m2, "never": NEVER_SAID}
    assert len(told) == 3 and all({k: x[k] for k in wanted} == wanted for x in told)
    assert told[0]["reward"].frequencies.documents == (12 * 5 if m2 else 12), "--idf"
    before, after = weights(trained), weights(out)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert FSGR.from_checkpoint(out / "last").cfg.vocab == FSGR.from_checkpoint(trained / "last").cfg.vocab


@pytest.mark.parametrize(
    "more",
    [
        {"arch": "m2", "label_smoothing": 0.1, "schedule": "noam", "warmup": 10},
        {"no_semantic": True, "tie_weights": True, "schedule": "rst"},
        {"dense_loss": "supcon", "dense": "maskclip", "prompts": 2, "dtype": "bf16"},
        {"dense_loss": "ce", "codebook": "names", "adapter": "parallel", "train_backbone": True},
        {"adapter": "none", "dense": "plain", "captions_per_image": 0, "accum": 2, "batch_size": 2},
        {"arch": "m2", "train_backbone": True},
        {"prototypes": 8, "bank": 64, "prototype_every": 1, "epochs": 2},
    ],
    ids=str,
)
def test_variants_train_every_parameter_that_they_say(data, tmp_path, monkeypatch, more):
    """Under DDP a trainable parameter without gradient is an error, so none may be left out."""
    module, without = script("train/train_fsgr.py"), []

    def looked_at(parameters, limit):
        without.extend(i for i, p in enumerate(parameters) if p.grad is None)
        return clip(parameters, limit)

    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(module.torch.nn.utils, "clip_grad_norm_", looked_at)
    more = {k: data / "names.txt" if v == "names" else v for k, v in more.items()}
    out = train(data, tmp_path / "run", **{"epochs": 1, **more})
    assert without == []
    assert all(math.isfinite(row["xe"]) and row["grad"] > 0 for row in metrics(out) if "xe" in row)


def test_tower_codebook_and_words_come_from_a_local_clip(data, tmp_path):
    save_tiny_snapshot(tmp_path / "clip")
    more = {"clip": tmp_path / "clip", "word_init": "random", "dense_loss": "supcon", "dense_labels": "maskclip"}
    out = train(data, tmp_path / "run", epochs=1, image_size=None, batch_size=6, **more)
    clip, model = load_clip(tmp_path / "clip"), FSGR.from_checkpoint(out / "last")
    frozen = clip.visual.state_dict()
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items() if k in frozen)
    assert model.cfg.codebook_source == str(tmp_path / "clip") and len(model.cfg.codebook_names) == 80
    torch.testing.assert_close(model.head.log_scale, clip.logit_scale.detach())


def test_overfit_flag_trains_and_validates_on_the_same_pictures(data, tmp_path):
    out = train(data, tmp_path / "run", overfit=4, captions_per_image=0, epochs=3)
    assert [x["image_id"] for x in json.loads((out / "val_captions.json").read_text())] == [1, 2, 3, 4]
    assert metrics(out)[-1]["step"] == 3, "one caption of each: a step an epoch"


# ---- its parts


def test_optimizer_betas_rates_and_what_decays(data, tmp_path, monkeypatch, no_pictures):
    """A matrix or kernel of any layer decays; norms, biases, tables, prompts and position embeddings do not."""
    module, made = script("train/train_fsgr.py"), []

    def kept(name):
        make = getattr(module if name == "new_captioner" else torch.optim, name)
        return lambda *a, **kw: made.append(make(*a, **kw)) or made[-1]

    monkeypatch.setattr(module, "new_captioner", kept("new_captioner"))
    monkeypatch.setattr(torch.optim, "AdamW", kept("AdamW"))
    more = {"weight_decay": 0.03, "backbone_lr": 0.5, "train_backbone": True, "prompts": 2, "lr": "1e-3"}
    out = train(data, tmp_path / "run", stop_at=1, schedule="constant", overfit=4, **more)
    model, opt = made
    assert opt.defaults["betas"] == (0.9, 0.98) and all(g["betas"] == (0.9, 0.98) for g in opt.param_groups)
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    names = {id(p): name for name, p in model.named_parameters()}
    kernels |= {i for i, name in names.items() if name.endswith("in_proj_weight")}
    of = {names[id(p)]: (g, id(p) in kernels) for g in opt.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in opt.param_groups) == len(of)
    assert set(of) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (group, kernel) in of.items():
        assert group["lr"] == (0.5e-3 if name.startswith("backbone.") else 1e-3), name
        assert group["weight_decay"] == (0.03 if kernel else 0.0), name
    assert {"backbone.positional_embedding", "decoder.word_emb.weight", "encoder.layer_norm.weight"} <= set(of)
    row = metrics(out)[0]
    assert (row["lr"], row["lr_backbone"]) == (1e-3, 0.5e-3)


def test_micro_batches_are_averaged(data, tmp_path, no_pictures):
    """Twice the same item: loss and gradient of once."""
    rows = []
    for accum in (1, 2):
        more = {"overfit": 1, "captions_per_image": 0, "batch_size": 1, "dropout": 0, "no_semantic": True}
        out = train(data, tmp_path / str(accum), accum=accum, epochs=1, val_beam=1, **more)
        rows.append(metrics(out)[0])
    assert rows[0]["step"] == 1 and [rows[1][k] for k in ("xe", "grad")] == pytest.approx(
        [rows[0][k] for k in ("xe", "grad")], rel=1e-4
    )


class Fixed(nn.Module):
    """A net that answers what it was told."""

    def __init__(self, **out: torch.Tensor):
        super().__init__()
        self.out = out

    def forward(self, images, tokens):
        return self.out


CPU = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, main=True, ddp=False)


@pytest.mark.parametrize("kind", ["none", "supcon", "ce"])
def test_loss_of_the_first_stage(kind):
    """Cross-entropy, smoothed in training, plus beta times the loss of --dense-loss on the patches."""
    torch.manual_seed(0)
    module, e, beta, V = script("train/train_fsgr.py"), 0.1, 0.7, 9
    tokens = torch.tensor([[2, 5, 6, 3], [2, 7, 3, PAD]])
    logits, dense_logits = torch.randn(2, 3, V, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    features = F.normalize(torch.randn(2, 6, 8), dim=-1).requires_grad_()
    batch = {"image": torch.zeros(2, 3, 8, 8), "tokens": tokens, "patch_labels": torch.randint(-1, 4, (2, 6))}
    net = Fixed(logits=logits, dense_logits=dense_logits, features=features)
    args = SimpleNamespace(label_smoothing=e, dense_loss=kind, beta=beta)
    target = torch.full((2, 3, V), e / (V - 1)).scatter(-1, tokens[:, 1:, None], 1 - e)
    kept = tokens[:, 1:] != PAD
    smoothed = -(target * logits.log_softmax(-1)).sum(-1)[kept].mean()
    plain = F.cross_entropy(logits[kept], tokens[:, 1:][kept])
    if kind == "ce":
        dense = F.cross_entropy(dense_logits.flatten(0, 1), batch["patch_labels"].flatten(), ignore_index=-1)
    else:
        dense = module.supcon_loss(features.flatten(0, 1), batch["patch_labels"].flatten())
    for training, xe in ((True, smoothed), (False, plain)):
        loss, values = module.xe_loss(net.train(training), None, None, batch, args, CPU)
        torch.testing.assert_close(loss, xe if kind == "none" else xe + beta * dense)
        assert values["xe"].item() == pytest.approx(xe.item())
        assert ("dense" in values) == (kind != "none")
    loss.backward()
    assert (dense_logits.grad is not None) == (kind == "ce") and (features.grad is not None) == (kind == "supcon")
    assert kind == "none" or values["dense"].item() == pytest.approx(dense.item()) and dense > 0.1


def test_validation_says_of_every_picture_what_the_model_says_of_it_alone(data, trained):
    module, model, modes = script("train/train_fsgr.py"), FSGR.from_checkpoint(trained / "last"), set()
    vocab = CaptionVocab(model.cfg.vocab)
    likes_unk = 9.0 * F.one_hot(torch.tensor(0), len(vocab))  # so that a search that may say <unk> does

    def hook(layer, given, out):
        modes.add(model.training)
        return out + likes_unk

    model.decoder.fc.register_forward_hook(hook)
    items = ImageItems(load_captions(data, "train")[0], ImageReader(64))
    batches = [CaptionCollate(len(vocab))([items[i] for i in part]) for part in ((0, 1, 2), (3, 4))]
    args = SimpleNamespace(val_beam=2, max_len=12)
    values, captions = module.validate(model.train(), batches, args, CPU, vocab)
    assert modes == {False} and model.training, "in eval mode, and back"
    alone, references = {}, {}
    model.eval()
    for batch in (CaptionCollate(len(vocab))([items[i]]) for i in range(5)):
        with torch.no_grad():
            memory, _ = model.encode(batch["image"])
        found = beam_search(model.decoder, memory, 2, 12, never=NEVER_SAID).tokens[0, 0]
        alone[batch["image_id"][0]], references[batch["image_id"][0]] = vocab.decode(found), batch["references"][0]
    assert captions == alone and list(captions) == [1, 2, 3, 4, 5] and len(set(alone.values())) > 1
    assert all(words and set(words.split()) <= set(vocab.itos[4:]) for words in captions.values())
    with torch.no_grad():
        said = beam_search(model.decoder, memory, 2, 12).tokens
    assert (said == 0).any(), "else <unk> was never near"
    corpus = score_captions(references, alone)["corpus"]
    assert values == {k: corpus[k] for k in ("CIDEr-D", "BLEU-4", "ROUGE-L")} | {
        "distinct": len(set(alone.values())),
        "n": 5,
    }


@pytest.mark.parametrize("idf", ["image", "caption"])
@pytest.mark.parametrize("no_eos", [False, True])
def test_reward_counts_and_compares_as_the_flags_say(tmp_path, idf, no_eos):
    texts = {1: ["A dog runs.", "The dog is running home."], 2: ["A cat sleeps.", "A cat on a mat.", "Cats sleep."]}
    images = [{"image_id": i, "captions": list(enumerate(of))} for i, of in texts.items()]
    args = SimpleNamespace(idf=idf, no_eos_reward=no_eos)
    reward = script("train/train_fsgr.py").make_reward(SimpleNamespace(images=images), tmp_path, args, CPU)
    end = "" if no_eos else " <eos>"
    references = {i: [tokenize(text) + end for text in of] for i, of in texts.items()}
    documents = list(references.values()) if idf == "image" else [[text] for of in references.values() for text in of]
    oracle = CiderReward(DocumentFrequencies.of_images(documents), references)
    assert reward.frequencies == oracle.frequencies and reward.frequencies.documents == (2 if idf == "image" else 5)
    ids, said = [2, 1, 1, 2], ["a cat sleeps", "a dog runs", "a dog runs <eos>", "a cat sleeps <eos>"]
    assert reward(ids, said) == pytest.approx(oracle(ids, said))
    ended, unended = reward([1, 1], said[2:0:-1])
    assert (ended < unended) if no_eos else (ended > unended)


# ---- the same again


def test_prototypes_are_clustered_after_the_first_epoch_and_saved(data, tmp_path, monkeypatch):
    module, steps = script("train/train_fsgr.py"), []

    def noted(model, seed, step, r):
        steps.append(step)
        refresh(model, seed, step, r)

    refresh = module.refresh_prototypes
    monkeypatch.setattr(module, "refresh_prototypes", noted)
    out = train(data, tmp_path / "run", prototypes=8, bank=256, prototype_every=2)
    assert steps == [4, 6], "an epoch is 3 steps"
    found = weights(out)
    for k in range(4):
        at = f"decoder.layers.{k}.self_att.attention."
        assert found[at + "ready"] and found[at + "noted"] == 6 * 64 and found[at + "prototype_k"].any()
    assert FSGR.from_checkpoint(out / "last").cfg.prototypes == 8
    early = train(data, tmp_path / "early", prototypes=8, bank=256, prototype_every=1, stop_at=2)
    assert not any(v for k, v in weights(early).items() if k.endswith("ready"))


@pytest.mark.parametrize("stage", ["xe", "rl"])
def test_resume_is_exact(data, trained, tmp_path, stage):
    more = {"epochs": 2, **(RL | {"init": trained / "last", "estimator": "sample"} if stage == "rl" else {})}
    more |= {} if stage == "rl" else {"prototypes": 8, "bank": 256, "prototype_every": 1}
    whole = train(data, tmp_path / "whole", **more)
    part = train(data, tmp_path / "part", stop_at=4, **more)
    train(data, part, resume="auto", **more)
    assert_same(whole, part)
    assert [row for row in metrics(whole) if row.get("epoch") != 1] == [
        row for row in metrics(part) if row.get("epoch") != 1
    ]
    state = [torch.load(out / "last" / "state.pt", weights_only=True) for out in (whole, part)]
    assert state[0]["stopper"] == state[1]["stopper"]


def test_workers_do_not_change_numbers(data, tmp_path):
    assert_same(train(data, tmp_path / "a", epochs=1), train(data, tmp_path / "b", epochs=1, workers=2))


def test_a_finished_run_and_a_stopped_stage_stay_as_they_are(data, tmp_path, monkeypatch):
    """The same command again, as a queue gives it."""
    out = train(data, tmp_path / "run", epochs=1)
    before = weights(out)
    train(data, out, epochs=1, resume="auto")
    assert all(torch.equal(v, before[k]) for k, v in weights(out).items())
    values = {"CIDEr-D": 0.0, "BLEU-4": 0.0, "ROUGE-L": 0.0}
    monkeypatch.setattr(script("train/train_fsgr.py"), "score_captions", lambda *_: {"corpus": values})
    out = train(data, tmp_path / "stopped", epochs=4, patience=1)
    assert metrics(out)[-1]["step"] == 6
    train(data, out, epochs=4, patience=1, resume="auto")
    assert metrics(out)[-1]["step"] == 6, "a stage that has ended must not go on"


def test_a_first_batch_of_equal_rewards_is_no_error(data, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(
        script("train/train_fsgr.py").CiderReward, "__call__", lambda self, ids, texts: [1.0] * len(ids)
    )
    train(data, tmp_path / "rl", init=trained / "last", epochs=1, **RL)


def test_codebook_from_stored_embeddings(data, tmp_path):
    table = torch.randn(4, 32)
    torch.save({"clip_embeds": table}, tmp_path / "table.pt")
    more = {"codebook": data / "names.txt", "codebook_table": tmp_path / "table.pt", "count_norm": True}
    model = FSGR.from_checkpoint(train(data, tmp_path / "run", epochs=1, **more) / "last")
    torch.testing.assert_close(model.head.codebook, torch.nn.functional.normalize(table, dim=-1))
    assert model.cfg.count_norm and model.cfg.codebook_source.endswith("table.pt")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["xe", "rl"])
def test_two_ranks_are_one_process_with_accum(data, trained, tmp_path, stage):
    more = {"batch_size": 2, "epochs": 1, "dropout": 0.1, **(RL | {"init": trained / "last"} if stage == "rl" else {})}
    if stage == "rl":
        del more["dropout"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, str(ROOT / "train" / "train_fsgr.py"), *flags(data, tmp_path / "two", **more)]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    one = train(data, tmp_path / "one", accum=2, **more)
    key = "xe" if stage == "xe" else "reward"
    a, b = ([row[key] for row in metrics(out) if key in row] for out in (one, tmp_path / "two"))
    assert a == pytest.approx(b, rel=1e-5) and len(a) == 3
    w, v = weights(one), weights(tmp_path / "two")
    assert max((w[k].float() - v[k].float()).abs().max().item() for k in w) < 1e-3


# ---- the recorded failures


@pytest.mark.parametrize("schedule", ["noam", "rst", "cosine", "constant"])
def test_a_learning_rate_of_zero_is_refused(data, tmp_path, capsys, schedule):
    assert "learning rate 0" in refused(capsys, data, tmp_path / "run", lr=0, schedule=schedule)


def test_a_multiplier_taken_for_a_rate_is_refused(data, tmp_path, capsys):
    assert "learning rate 0.25" in refused(capsys, data, tmp_path / "run", lr=0.25, schedule="constant")


def test_the_first_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys, monkeypatch):
    module, calls = script("train/train_fsgr.py"), []

    def second_is_nan(logits, words, pad, smoothing):
        calls.append(words)
        return loss(logits, words, pad, smoothing) * (math.nan if len(calls) == 2 else 1.0)

    loss = module.caption_loss
    monkeypatch.setattr(module, "caption_loss", second_is_nan)
    assert "step 2: loss is nan" in refused(capsys, data, tmp_path / "run")
    (saved,) = (tmp_path / "run").glob("bad_batch_*.pt")
    assert torch.equal(torch.load(saved, weights_only=True)["tokens"][:, 1:], calls[1])
    assert not (tmp_path / "run" / "last").exists(), "weights after a broken step are not saved"


@pytest.mark.parametrize("ending", ["stop_at", "save_every", "SIGTERM"])
def test_the_loss_of_the_last_step_is_looked_at_before_weights_are_saved(data, tmp_path, capsys, monkeypatch, ending):
    module, calls = script("train/train_fsgr.py"), []

    def second_is_nan(*args):
        calls.append(args)
        return loss(*args) * (math.nan if len(calls) == 2 else 1.0)

    loss = module.caption_loss
    monkeypatch.setattr(module, "caption_loss", second_is_nan)
    if ending == "SIGTERM":
        monkeypatch.setattr(run, "should_stop", lambda r: len(calls) == 2)
    more = {} if ending == "SIGTERM" else {ending: 2}
    assert "step 2: loss is nan" in refused(capsys, data, tmp_path / "run", **more)
    assert not (tmp_path / "run" / "last").exists() and len(calls) == 2


def test_the_stage_ends_after_patience_validations_without_a_better_score(data, tmp_path, monkeypatch, capsys):
    module = script("train/train_fsgr.py")
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    values = {"BLEU-4": 0.0, "ROUGE-L": 0.0}
    monkeypatch.setattr(module, "score_captions", lambda *_: {"corpus": {"CIDEr-D": next(scores), **values}})
    out = train(data, tmp_path / "run", epochs=9, patience=2)
    assert [row["CIDEr-D"] for row in metrics(out) if "CIDEr-D" in row] == [0.1, 0.5, 0.4, 0.3]
    assert (out / "best").resolve().name == "step_000006" and "stage ends" in capsys.readouterr().out


def test_least_epochs_are_epochs_however_many_lie_between_validations(data, tmp_path, monkeypatch, no_pictures):
    module, scores = script("train/train_fsgr.py"), iter([0.5, 0.4, 0.3, 0.2, 0.1])
    values = {"BLEU-4": 0.0, "ROUGE-L": 0.0}
    monkeypatch.setattr(module, "score_captions", lambda *_: {"corpus": {"CIDEr-D": next(scores), **values}})
    more = {"overfit": 2, "captions_per_image": 0, "batch_size": 2}  # a step is an epoch
    out = train(data, tmp_path / "run", epochs=9, val_epochs=2, patience=1, least_epochs=5, **more)
    assert [row["epoch"] for row in metrics(out) if "CIDEr-D" in row] == [2, 4, 6]


def test_output_depends_on_the_picture_and_on_nothing_else_of_the_batch(data, trained):
    """The recorded placeholder: a random tensor stood where the picture belonged."""
    module, model = script("train/train_fsgr.py"), FSGR.from_checkpoint(trained / "last").eval()
    captions = module.load_captions(data, "val")[0]
    vocab = module.CaptionVocab(model.cfg.vocab)
    items = module.ImageItems(captions, module.ImageReader(64), 0, None, 2, vocab)
    batch = module.CaptionCollate(len(vocab))([items[i] for i in range(4)])
    with torch.no_grad():
        memory, _ = model.encode(batch["image"])
        found = module.beam_search(model.decoder, memory, beam=2, max_len=12).tokens[:, 0]
        logits = model(batch["image"], batch["tokens"])["logits"]
        other = model(batch["image"].flip(0), batch["tokens"])["logits"]
    assert not torch.allclose(logits, other, atol=1e-3)
    assert len({tuple(row) for row in found.tolist()}) > 1, "pictures differ, captions must"


# ---- bad input


def test_bad_input_is_one_sentence_and_writes_nothing(data, trained, tmp_path, capsys):
    out = tmp_path / "run"
    foreign = tmp_path / "foreign.json"
    CaptionVocab.build(["ein rotes viereck"], 1).save(foreign)
    (tmp_path / "twice.txt").write_text("dog\ncat\ndog\n")
    cases = [
        ({"stage": "rl"}, "needs --init"),
        ({"data": tmp_path / "no"}, "no"),
        ({"vocab": tmp_path / "no.json"}, "no.json"),
        ({"codebook": tmp_path / "no.txt"}, "no.txt: cannot be read"),
        ({"codebook": tmp_path / "twice.txt"}, "dog stands in it twice"),
        ({"dense_loss": "ce"}, "4 classes"),
        ({"dense_loss": "ce", "arch": "m2"}, "needs the semantic head"),
        ({"dense_loss": "supcon", "dense_labels": "maskclip"}, "needs --clip"),
        ({"clip": tmp_path / "no"}, "no"),
        ({"word_init": "clip"}, "no CLIP weights are given"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"init": trained / "last"}, "comes from the checkpoint"),
        ({"estimator": "sample"}, "has no effect in stage xe"),
        ({**RL, "init": trained / "last", "beam": 1}, "--beam 1"),
        ({**RL, "init": trained / "last", "label_smoothing": 0.1}, "has no effect in stage rl"),
        ({"prototypes": 5, "arch": "m2"}, "--prototypes"),
        ({"tie_weights": True, "arch": "m2"}, "--tie-weights"),
        ({"bank": 100}, "without --prototypes"),
        ({"beta": 1}, "without --dense-loss"),
        ({"clip_tokenizer": "x"}, "without --clip"),
        ({"codebook_table": "x"}, "--codebook-table"),
        ({**RL, "init": trained / "last", "dropout": 0.5}, "--dropout: comes from"),
        ({**RL, "init": trained / "last", "captions_per_image": 2}, "has no effect in stage rl"),
        ({**RL, "init": trained / "last", "estimator": "sample", "m2_norm": True}, "--m2-norm"),
        ({**RL, "init": trained / "last", "beam": 60}, "--beam 60: the vocabulary has"),
        ({"val_beam": 60}, "--val-beam 60: the vocabulary has"),
        ({"warmup": -5}, "--warmup -5"),
        ({"stop_at": -3}, "--stop-at -3"),
        ({"vocab": foreign}, "words of the training captions are not in"),
        ({"prototypes": 65, "bank": 64}, "--prototypes 65"),
        ({"image_size": 50}, "multiple of the patch"),
        ({"lr": 0, "schedule": "constant"}, "learning rate 0"),
    ]
    for more, expected in cases:
        assert expected in refused(capsys, data, out, **more), more
        assert not out.exists() or not list(out.iterdir()), more


def test_resume_refuses_other_flags(data, trained, capsys):
    same = {"epochs": 24, "val_epochs": 12, "dropout": 0, "backbone_lr": 1, "train_backbone": True}
    said = refused(capsys, data, trained, resume=trained / "last", **{**same, "lr": "1e-3"})
    assert "that run had --lr 0.003" in said
