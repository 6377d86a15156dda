"""utils/run.py: batch order, exit codes, device choice, checkpoints, run folder, metrics, notebook, SIGTERM."""

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import types
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from utils import run
from utils.run import StepBatches, UserError

LOG = """# LOG

## First

| figure | value |
|---|---|
| a | 1 |

| when (UTC) | why | result |
|---|---|---|
| 2026-01-01 | old | fine |

**Conclusions.**

## Second

| when (UTC) | why | result |
|---|---|---|

the end
"""


def on_cpu(**more) -> SimpleNamespace:
    about = {"device": torch.device("cpu"), "rank": 0, "world": 1, "main": True, "ddp": False, "t0": 0.0}
    return SimpleNamespace(**{**about, "command": "python train/train.py", "stop_asked": False, **more})


def raiser(error: BaseException):
    def main(argv):
        raise error

    return main


# ---- batches


def test_batches_from_step_k_are_the_tail_of_the_whole():
    whole = list(StepBatches(23, 4, 0, 20, seed=5, accum=2))
    for k in (0, 1, 7, 19, 20):
        part = StepBatches(23, 4, k, 20, seed=5, accum=2)
        assert list(part) == whole[2 * k :] and len(part) == 2 * (20 - k)
    assert list(StepBatches(23, 4, 0, 20, seed=6, accum=2)) != whole


@pytest.mark.parametrize("n", [3, 8, 50])
@pytest.mark.parametrize("world, accum", [(2, 1), (2, 2), (4, 1)])
def test_ranks_together_are_one_process_with_accum(n, world, accum):
    alone = list(StepBatches(n, 3, 0, 9, seed=1, accum=world * accum))
    ranks = [list(StepBatches(n, 3, 0, 9, seed=1, rank=k, world=world, accum=accum)) for k in range(world)]
    for step in range(9):
        for a in range(accum):
            for rank in range(world):
                slot = a * world + rank  # as in run.step_seed
                assert ranks[rank][step * accum + a] == alone[step * world * accum + slot]


def test_every_epoch_is_a_permutation():
    batches = list(StepBatches(12, 4, 0, 9, seed=0))  # 3 steps an epoch
    orders = []
    for epoch in range(3):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch} and sorted(i for _, i in keys) == list(range(12))
        orders.append([i for _, i in keys])
    assert orders[0] != orders[1] != orders[2] != list(range(12))


def test_the_incomplete_batch_is_left_out():
    batches = list(StepBatches(11, 4, 0, 6, seed=0))
    assert [{e for e, _ in batch} for batch in batches] == [{0}, {0}, {1}, {1}, {2}, {2}]
    assert [len(set(batch)) for batch in batches] == [4] * 6


@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_small_set_repeats_within_a_step_under_other_epochs(n):
    batches = list(StepBatches(n, 8, 0, 6, seed=2))
    assert [len(b) for b in batches] == [8] * 6
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == 48, "an item would be augmented alike twice"
    for batch in batches:
        counts = Counter(i for _, i in batch)
        assert set(counts) == set(range(n)) and max(counts.values()) - min(counts.values()) <= 1


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="no items; check --data"):
        StepBatches(0, 4, 0, 2, seed=0)


# ---- exit codes


def test_cli_says_one_sentence_and_returns_2(capsys):
    assert run.cli(raiser(UserError("--size 3: expected WxH"))) == 2
    assert capsys.readouterr().err == "error: --size 3: expected WxH\n"
    assert run.cli(raiser(OSError(errno.ENOSPC, "No space left on device", "runs/a/x.mp4"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: runs/a/x.mp4: no space left") and err.count("\n") == 1


def test_cli_and_argparse(capsys):
    def main(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--steps", type=int)
        parser.parse_args(argv)

    assert run.cli(main, ["--help"]) == 0
    assert run.cli(main, ["--steps", "3"]) == 0
    assert run.cli(main, ["--steps", "three"]) == 2
    assert run.cli(main, ["--stop"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("bug", [ValueError("a bug"), KeyError("x"), OSError(errno.ENOENT, "gone"), AssertionError()])
def test_cli_lets_bugs_through(bug):
    with pytest.raises(type(bug)):
        run.cli(raiser(bug))


# ---- device, seeds, header


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run.choose_device("auto") == run.choose_device("cpu") == torch.device("cpu")
    for name, what in (
        ("cuda", "sees no GPU"),
        ("cuda:0", "sees no GPU"),
        ("mps", "no Metal"),
        ("tpu", "not a device"),
    ):
        with pytest.raises(UserError, match=f"--device {name}: .*{what}"):
            run.choose_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert run.choose_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.choose_device("auto") == run.choose_device("cuda") == torch.device("cuda:0")  # a bare "cuda" is refused
    assert run.choose_device("auto", local_rank=1) == run.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:2: only 2 GPUs"):
        run.choose_device("cuda:2")


def test_start(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    args = SimpleNamespace(device="cpu", dtype="bf16", seed=3)
    r = run.start(args, ["--steps", "5", "--log", "two words"])
    assert (r.device, r.dtype, r.rank, r.world, r.main, r.ddp) == (
        torch.device("cpu"),
        torch.bfloat16,
        0,
        1,
        True,
        False,
    )
    assert r.command.startswith("python ") and r.command.endswith("--steps 5 --log 'two words'")
    out = capsys.readouterr().out
    assert run.commit() in out and torch.__version__ in out and "bf16 | seed 3" in out
    drawn = torch.rand(3)
    run.seed_all(3)
    assert torch.equal(drawn, torch.rand(3))
    with pytest.raises(UserError, match="--dtype fp16 on --device cpu"):
        run.start(SimpleNamespace(device="cpu", dtype="fp16", seed=0), [])


def test_seed_all_covers_every_generator():
    draws = []
    for seed in (4, 4, 5):
        run.seed_all(seed)
        draws.append((random.random(), float(np.random.rand()), torch.rand(1).item()))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[1], draws[2], strict=True))


def test_step_seed_never_repeats_nearby():
    seeds = [run.step_seed(s, step, slot) for s in range(5) for step in range(50) for slot in range(16)]
    assert len(set(seeds)) == len(seeds)
    run.seed_all(run.step_seed(2**31, 10**7, 4095))  # large, but still a seed


def test_sigterm_sets_a_flag():
    before, r = signal.getsignal(signal.SIGTERM), on_cpu()
    try:
        run.watch_sigterm(r)
        assert not run.should_stop(r)
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.should_stop(r)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small git repository in the place of ours, with one committed script and a notebook."""
    root = tmp_path / "checkout"
    root.mkdir()
    monkeypatch.setattr(run, "ROOT", root)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (root / "a.py").write_text("x = 1\n")
    (root / "LOG.md").write_text(LOG)
    return root


def git(root, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_ignores_the_notebook(checkout):
    assert run.commit() == "no-git"
    git(checkout, "init", "-q")
    assert run.commit() == "no-git"  # a repository without a commit
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    sha = git(checkout, "rev-parse", "--short", "HEAD")
    assert run.commit() == sha
    (checkout / "LOG.md").write_text(LOG + "more\n")
    (checkout / "new.txt").write_text("not tracked\n")
    assert run.commit() == sha
    (checkout / "a.py").write_text("x = 2\n")
    assert run.commit() == f"{sha}+dirty"


# ---- run folder


def folder_args(out, **more) -> SimpleNamespace:
    return SimpleNamespace(**{"out": str(out), "resume": None, "seed": 0, **more})


def test_open_folder(checkout, tmp_path):
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    (checkout / "a.py").write_text("x = 2\n")
    out = tmp_path / "runs/one"
    (out / ".tmp-step_000003").mkdir(parents=True)
    (out / ".tmp-step_000003/model.safetensors").write_text("half")
    assert run.open_folder(on_cpu(), folder_args(out, size=[3, 4])) == out
    about = json.loads((out / "run.json").read_text())
    assert about["args"]["size"] == [3, 4] and about["command"] == "python train/train.py"
    assert about["commit"].endswith("+dirty") and {"torch", "python", "machine", "world"} <= set(about)
    assert "+x = 2" in (out / "code.diff").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["code.diff", "run.json"], "the half-written checkpoint stays"


def test_open_folder_on_another_rank_writes_nothing(tmp_path):
    assert not run.open_folder(on_cpu(rank=1, main=False), folder_args(tmp_path / "a")).exists()


def test_open_folder_refuses_another_run(tmp_path):
    run.report(on_cpu(), tmp_path, 1, 5, loss=1.0)
    with pytest.raises(UserError, match="holds another run already; .* --resume"):
        run.open_folder(on_cpu(), folder_args(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    run.open_folder(on_cpu(), folder_args(tmp_path, resume=str(tmp_path / "last")))


def test_open_folder_refuses_to_resume_into_another_run(tmp_path):
    run.report(on_cpu(), tmp_path, 1, 5, loss=1.0)
    with pytest.raises(UserError, match="another run"):
        run.open_folder(on_cpu(), folder_args(tmp_path, resume=str(tmp_path.parent / "elsewhere/last")))


# ---- metrics


def test_metrics(tmp_path, capsys):
    for step, values in enumerate(({"loss": 4.16}, {"loss": 3.5, "lr": 0.001}, {"val_loss": float("nan")}), 1):
        run.report(on_cpu(), tmp_path, step, 3, **values)
        run.report(on_cpu(main=False), tmp_path, step, 3, **values)
    assert "step      2/3 | loss 3.5 | lr 0.001" in capsys.readouterr().out
    assert [row["step"] for row in run.read_metrics(tmp_path)] == [1, 2, 3]
    run.write_metrics_csv(tmp_path)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == ["step,loss,lr,val_loss", "1,4.16,,", "2,3.5,0.001,", "3,,,nan"]
    assert not list(tmp_path.glob(".*"))


def test_rewind_metrics_drops_later_and_cut_lines(tmp_path):
    run.rewind_metrics(tmp_path, 3)  # nothing to do
    for step in range(1, 6):
        run.report(on_cpu(), tmp_path, step, 9, loss=step / 2)
    whole = (tmp_path / "metrics.jsonl").read_text()
    for cut in range(len(whole.rstrip()) - 20, len(whole)):
        (tmp_path / "metrics.jsonl").write_text(whole[:cut])
        run.rewind_metrics(tmp_path, 3)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole.splitlines(True)[:3])
    run.report(on_cpu(), tmp_path, 4, 9, loss=7.0)
    assert [row["loss"] for row in run.read_metrics(tmp_path)] == [0.5, 1.0, 1.5, 7.0]


# ---- checkpoints


def save(out, step, best=False, state=None, **more):
    torch.manual_seed(step)
    return run.save_checkpoint(out, step, torch.nn.Linear(3, 2), {"model": {"dim": 3}}, state or {}, best=best, **more)


def steps_in(out) -> list[int]:
    return sorted(int(p.name[5:]) for p in out.glob("step_*"))


def test_checkpoint_is_a_folder_that_reads_back(tmp_path):
    opt = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    args = {"out": "x", "size": [3, 4], "lr": 1e-3, "resume": None}
    folder = save(tmp_path, 7, state={"optimizer": opt.state_dict(), "best": 0.5, "args": args})
    assert folder == tmp_path / "step_000007"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "state.pt"]
    torch.manual_seed(7)
    want = torch.nn.Linear(3, 2).state_dict()
    got = load_file(folder / "model.safetensors")
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state["step"] == 7 and state["args"] == args and state == run.load_state(folder)
    config = run.read_config(tmp_path / "last")
    assert config["model"] == {"dim": 3} and set(config["made_by"]) == {"commit", "torch", "command"}


def test_last_best_and_the_newest_three(tmp_path):
    for step in (10, 20, 30, 40, 50, 60):
        save(tmp_path, step, best=step == 20)
        assert (tmp_path / "last").resolve().name == f"step_{step:06d}"
    assert steps_in(tmp_path) == [20, 40, 50, 60]
    assert (tmp_path / "best").resolve().name == "step_000020"
    assert os.readlink(tmp_path / "last") == "step_000060", "a relative link: the run folder may be moved"
    save(tmp_path, 70, best=True)
    assert steps_in(tmp_path) == [50, 60, 70] and (tmp_path / "best").resolve().name == "step_000070"
    save(tmp_path, 70)  # the same step again
    assert steps_in(tmp_path) == [50, 60, 70] and not list(tmp_path.glob(".tmp-*"))


def test_newest_goes_by_number_beyond_a_million_steps(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001, 1_000_002):
        save(tmp_path, step)
    assert steps_in(tmp_path) == [1_000_000, 1_000_001, 1_000_002]


@pytest.mark.parametrize("where", ["disk", "state", "config"])
def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, where):
    save(tmp_path, 1, best=True)
    config, state, error = {"model": {}}, {}, (TypeError, AttributeError, RuntimeError)
    if where == "config":
        config["bad"] = object()  # json cannot write it
    elif where == "state":
        state["bad"] = lambda: 0  # pickle cannot write it
    else:
        error = OSError

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device", "x")

        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(error):
        run.save_checkpoint(tmp_path, 2, torch.nn.Linear(3, 2), config, state, best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "step_000001"]
    assert (tmp_path / "last").resolve().name == (tmp_path / "best").resolve().name == "step_000001"


def test_a_new_folder_gives_way_only_to_a_complete_one(tmp_path):
    folder = tmp_path / "run"
    with run.new_folder(folder) as tmp:
        (tmp / "a").write_text("old")
        assert not folder.exists()
    with pytest.raises(UserError, match="exists already"), run.new_folder(folder):
        pass
    with pytest.raises(KeyError), run.new_folder(folder, replace=True) as tmp:
        (tmp / "a").write_text("half")
        assert (folder / "a").read_text() == "old"
        raise KeyError
    assert (folder / "a").read_text() == "old", "what fails half way leaves the old folder as it was"
    with run.new_folder(folder, replace=True) as tmp:
        (tmp / "a").write_text("new")
    assert (folder / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("part", ["weights", "state"])
def test_a_disk_that_fills_up_is_one_sentence(tmp_path, monkeypatch, capsys, part):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setitem(run.NO_WRITE, errno.EFBIG, "no space left")  # what a file beyond the limit gives
    model = torch.nn.Linear(3, 10_000 if part == "weights" else 10)
    state = {"optimizer": torch.zeros(10_000 if part == "state" else 10)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = run.cli(lambda argv: run.save_checkpoint(tmp_path, 1, model, {"model": {}}, state))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path) in err, err
    assert not list(tmp_path.iterdir())


def test_resume_auto_finds_the_last_checkpoint_or_begins_anew(tmp_path):
    def found(out):
        args = SimpleNamespace(resume="auto", out=str(out))
        return run.find_resume(args), args.resume

    assert found(tmp_path / "new") == (True, None)
    save(tmp_path / "run", 3)
    assert found(tmp_path / "run") == (False, str(tmp_path / "run" / "last"))
    (tmp_path / "run" / "last").unlink()  # half a folder is not thrown away
    assert found(tmp_path / "run") == (False, None)
    args = SimpleNamespace(resume="elsewhere/last", out=str(tmp_path))
    assert not run.find_resume(args) and args.resume == "elsewhere/last"


def test_a_continuation_has_the_same_flags_and_processes():
    r, args = SimpleNamespace(world=2), SimpleNamespace(resume="x", lr=1e-3, batch_size=4, log="now")
    state = {"world": 2, "args": {"lr": 1e-3, "batch_size": 4, "log": None}}
    run.check_continuation(r, args, state, {"log", "resume"})
    with pytest.raises(UserError, match="that run had --batch-size 8"):
        run.check_continuation(r, args, {**state, "args": {"lr": 1e-3, "batch_size": 8}}, {"log", "resume"})
    with pytest.raises(UserError, match="made by 4 processes, these are 2"):
        run.check_continuation(r, args, {**state, "world": 4}, {"log", "resume"})


def test_a_folder_without_checkpoint_names_those_nearby(tmp_path):
    tmp_path = tmp_path / "runs" / "a"  # not beside the folders of other tests, which may hold checkpoints
    tmp_path.mkdir(parents=True)
    with pytest.raises(UserError, match="config.json is missing.*expected a folder that train/ wrote"):
        run.read_config(tmp_path)
    folder = save(tmp_path, 5)
    with pytest.raises(UserError, match="checkpoints nearby: .*last"):
        run.read_config(tmp_path)
    with pytest.raises(UserError, match="checkpoints nearby: .*last"):
        run.read_config(tmp_path / "lst")
    (folder / "config.json").write_text('{"model"')
    with pytest.raises(UserError, match="config.json: not readable as JSON"):
        run.read_config(folder)
    (folder / "state.pt").unlink()
    with pytest.raises(UserError, match="state.pt is missing.*--init"):
        run.load_state(folder)


def test_a_damaged_state_is_a_user_error(tmp_path):
    folder = save(tmp_path, 5)
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:100])
    with pytest.raises(UserError, match="state.pt"):
        run.load_state(folder)


# ---- text files and the notebook


def test_write_text_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    run.write_text_atomic(path, "första\n")
    run.write_text_atomic(str(path), "second\n")
    assert path.read_text(encoding="utf-8") == "second\n"

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        run.write_text_atomic(path, "third\n")
    assert path.read_text() == "second\n" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_append_row_goes_to_the_end_of_its_table(tmp_path):
    log = tmp_path / "LOG.md"
    log.write_text(LOG)
    run.append_row(log, "First", "| now | new | good |")
    run.append_row(log, "Second", "| now | other | bad |")
    run.append_row(log, "First", "| later | newer | better |")
    old = "| 2026-01-01 | old | fine |\n"
    want = LOG.replace(old, old + "| now | new | good |\n| later | newer | better |\n")
    want = want.replace("|---|---|---|\n\nthe end", "|---|---|---|\n| now | other | bad |\n\nthe end")
    assert log.read_text() == want


@pytest.mark.parametrize("text", [LOG.replace("## First", "## Other"), "# LOG\n", "## First\n\nno table\n"])
def test_append_row_needs_its_heading_and_table(tmp_path, text):
    log = tmp_path / "LOG.md"
    log.write_text(text)
    with pytest.raises(UserError, match="no heading '## First' with a table"):
        run.append_row(log, "First", "| row |")
    assert log.read_text() == text


def test_append_row_does_not_fall_into_the_next_system(tmp_path):
    log = tmp_path / "LOG.md"
    text = "## First\n\nno table yet\n\n## Second\n\n| when (UTC) | why |\n|---|---|\n"
    log.write_text(text)
    with pytest.raises(UserError, match="## First"):
        run.append_row(log, "First", "| row | x |")
    assert log.read_text() == text


def test_a_missing_notebook_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="LOG.md"):
        run.append_row(tmp_path / "LOG.md", "First", "| row |")


def test_finish_prints_the_row_and_appends_it_when_asked(checkout, capsys):
    args = SimpleNamespace(log=None)
    run.finish(on_cpu(), args, "Second", "loss 4.16 | 0.00\nfine")
    row = capsys.readouterr().out.strip()
    assert row.startswith("| 20") and row.endswith("| loss 4.16 / 0.00 fine |") and "`python train/train.py`" in row
    assert row.count("|") == 7 and (checkout / "LOG.md").read_text() == LOG
    args.log = "does it hold"
    run.finish(on_cpu(main=False), args, "Second", "nothing")
    run.finish(on_cpu(), args, "Second", "acc 1.0")
    added = [line for line in (checkout / "LOG.md").read_text().splitlines() if line not in LOG.splitlines()]
    assert len(added) == 1 and "| does it hold |" in added[0] and added[0].endswith("| acc 1.0 |")


def test_a_signal_during_the_agreement_is_not_lost(monkeypatch):
    """SIGTERM mostly arrives while a rank waits for the others: it must count at the next step, on every rank."""
    r = types.SimpleNamespace(ddp=True, control=None, stop_asked=False)
    sent = []

    def all_reduce(flag, op, group):
        sent.append(int(flag))
        r.stop_asked = True  # what the handler does, after the flag has been sent

    monkeypatch.setattr(run.dist, "all_reduce", all_reduce)
    assert run.should_stop(r) is False and r.stop_asked
    assert run.should_stop(r) is True and sent == [0, 1]
