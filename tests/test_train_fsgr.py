"""train/train_fsgr.py on rendered shapes: both stages, exact resume, two ranks, and the recorded failures' guards."""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.caption_vocab import CaptionVocab
from data.shape_captions import write_shapes
from models.clip import load_clip, save_tiny_snapshot
from models.fsgr import FSGR
from utils import run

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
def test_second_stage(data, trained, tmp_path, estimator):
    more = {"m2_norm": True, "idf": "caption"} if estimator == "beam" else {"no_eos_reward": True}
    out = train(data, tmp_path / "rl", init=trained / "last", estimator=estimator, epochs=1, **RL, **more)
    rows = [row for row in run.read_metrics(out) if "reward" in row]
    assert len(rows) == 3 and all(math.isfinite(row["reward"]) and row["grad"] > 0 for row in rows)
    assert all(row["decode_s"] > 0 and row["reward_s"] > 0 and row["backward_s"] > 0 for row in rows)
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


# ---- the same again


def test_prototypes_are_clustered_after_the_first_epoch_and_saved(data, tmp_path):
    out = train(data, tmp_path / "run", prototypes=8, bank=256, prototype_every=1)
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


def test_the_stage_ends_after_patience_validations_without_a_better_score(data, tmp_path, monkeypatch, capsys):
    module = script("train/train_fsgr.py")
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    values = {"BLEU-4": 0.0, "ROUGE-L": 0.0}
    monkeypatch.setattr(module, "score_captions", lambda *_: {"corpus": {"CIDEr-D": next(scores), **values}})
    out = train(data, tmp_path / "run", epochs=9, patience=2)
    assert [row["CIDEr-D"] for row in metrics(out) if "CIDEr-D" in row] == [0.1, 0.5, 0.4, 0.3]
    assert (out / "best").resolve().name == "step_000006" and "stage ends" in capsys.readouterr().out


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
