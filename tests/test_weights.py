"""utils/weights.py: local snapshots, safe reading, strict loading, hashes and the provenance sidecar."""

import hashlib
import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from utils import run
from utils.run import UserError
from utils.weights import compare, file_sha256, load_strict, read_tensors, resolve_snapshot, write_sidecar


class Payload:
    """Unpickling this would run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


# ---- snapshots


def test_resolve_snapshot(tmp_path, monkeypatch):
    monkeypatch.delenv("SOME_DIR", raising=False)
    with pytest.raises(UserError, match="set SOME_DIR="):
        resolve_snapshot(None, "SOME_DIR")
    with pytest.raises(UserError, match="nowhere: no such folder; .*config.json"):
        resolve_snapshot(str(tmp_path / "nowhere"), "SOME_DIR")
    with pytest.raises(UserError, match="config.json is missing"):
        resolve_snapshot(str(tmp_path), "SOME_DIR")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_snapshot(str(tmp_path), "SOME_DIR") == tmp_path
    needs = ("config.json", "*.safetensors")
    with pytest.raises(UserError, match=r"\*.safetensors is missing"):
        resolve_snapshot(str(tmp_path), "SOME_DIR", needs)
    (tmp_path / "model-00001.safetensors").touch()
    monkeypatch.setenv("SOME_DIR", str(tmp_path))
    assert resolve_snapshot(None, "SOME_DIR", needs) == tmp_path
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    assert resolve_snapshot(str(other), "SOME_DIR") == other, "the flag goes before the environment"


# ---- reading


def test_read_tensors(tmp_path):
    state = make_model().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pth")
    torch.save({"model": state, "lr": 0.1}, tmp_path / "c.pth")
    for name in ("a.safetensors", "a.pt", "b.pth", "c.pth"):
        assert same(read_tensors(tmp_path / name), state), name
        assert same(read_tensors(str(tmp_path / name)), state), name


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_cut_file_is_refused(tmp_path, suffix):
    path, state = tmp_path / f"a.{suffix}", {"a": torch.randn(300)}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not readable as weights"):
            read_tensors(path)


@pytest.mark.parametrize(
    "text", ["version https://git-lfs.github.com/spec/v1\n", "hello", "a", ".", "0", "Xy", "<html>"]
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_text_file_is_refused(tmp_path, suffix, text):
    path = tmp_path / f"a.{suffix}"
    path.write_text(text)
    with pytest.raises(UserError, match=f"a.{suffix}: not readable as weights"):
        read_tensors(path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"a": Payload(tmp_path / "was_run")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not readable as weights"):
        read_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "was_run").exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such weight file"):
        read_tensors(tmp_path / "a.pt")
    for content in ([torch.ones(2)], {"a": torch.ones(2), "epoch": 3}, torch.ones(2), {"state_dict": [1]}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match="holds no plain state dict"):
            read_tensors(tmp_path / "a.pt")


# ---- loading


def spoilt(how: str) -> dict[str, torch.Tensor]:
    """The state dict of another model of the same kind, with one fault."""
    state = dict(make_model(seed=1).state_dict())
    if how == "missing":
        del state["0.bias"]
    elif how == "unexpected":
        state["2.weight"] = torch.ones(2)
    elif how == "reshaped":
        state["0.weight"] = state["0.weight"].T.contiguous()
    else:
        state["1.running_var"] = state["1.running_var"].clone().fill_(float(how))
    return state


FAULTS = {
    "missing": "missing 0.bias (3,)",
    "unexpected": "unexpected 2.weight (2,)",
    "reshaped": "0.weight is (4, 3), not (3, 4)",
    "nan": "1.running_var is not finite",
    "inf": "1.running_var is not finite",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_faulty_state_changes_nothing(how):
    model, state = make_model(), spoilt(how)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert compare(state, model) == [FAULTS[how]]
    with pytest.raises(UserError) as error:
        load_strict(model, state, "weights.pt")
    assert "weights.pt: does not fit Sequential" in str(error.value) and FAULTS[how] in str(error.value)
    assert same(model.state_dict(), before)


def test_a_fitting_state_is_loaded():
    model, state = make_model(), make_model(seed=1).state_dict()
    assert compare(state, model) == []
    load_strict(model, state, "weights.pt")
    assert same(model.state_dict(), state)


def test_many_faults_make_a_short_sentence():
    with pytest.raises(UserError, match="and 3 more; use weights of the same configuration"):
        load_strict(make_model(), {}, "weights.pt")


# ---- provenance


def test_file_sha256(tmp_path):
    for size in (0, 5, 1 << 20, (1 << 20) + 1):
        content = os.urandom(size)
        (tmp_path / "a").write_bytes(content)
        assert file_sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_sidecar(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval/infer_peaks.py", "a b.mp4"])
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/model.safetensors").write_bytes(b"weights")
    (tmp_path / "a b.mp4").write_bytes(b"pictures")
    target = tmp_path / "peaks.json"
    write_sidecar(target, tmp_path / "ckpt", {"dim": 3}, [tmp_path / "a b.mp4"], seconds=1.5, out=tmp_path)
    about = json.loads((tmp_path / "peaks.json.meta.json").read_text())
    assert about["checkpoint_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert about["inputs"] == [{"path": str(tmp_path / "a b.mp4"), "sha256": hashlib.sha256(b"pictures").hexdigest()}]
    assert about["config"] == {"dim": 3} and about["seconds"] == 1.5 and about["out"] == str(tmp_path)
    assert about["command"] == "eval/infer_peaks.py 'a b.mp4'" and about["commit"] == run.commit()
    assert about["time_utc"].startswith("20") and about["time_utc"].endswith("Z") and not target.exists()
