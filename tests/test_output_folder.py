"""utils/output_folder.py: all files of a run or none, whatever ends it."""

import os
from pathlib import Path

import pytest

from utils.output_folder import results_into


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_files_and_folders_come_when_all_are_written(tmp_path):
    out = tmp_path / "new" / "out"
    with results_into(out) as staging:
        (staging / "a.json").write_text("a")
        (staging / "pngs").mkdir()
        (staging / "pngs" / "1.png").write_text("1")
        assert contents(out).keys() == {".tmp-infer/a.json", ".tmp-infer/pngs/1.png"}
    assert contents(out) == {"a.json": "a", "pngs/1.png": "1"} and not staging.exists()


def test_what_lies_there_stays_but_for_files_of_the_same_name(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "a.json").write_text("old")
    stale = tmp_path / ".tmp-infer" / "half.json"  # of a killed run
    stale.parent.mkdir()
    stale.touch()
    with results_into(tmp_path) as staging:
        (staging / "a.json").write_text("new")
        assert not stale.exists()
    assert contents(tmp_path) == {"notes.txt": "mine", "a.json": "new"}


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_nothing_comes_when_something_ends_it(tmp_path, end, existed):
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(end), results_into(out) as staging:
        (staging / "a.json").write_text("half")
        raise end
    assert out.exists() == existed and not contents(tmp_path)


@pytest.mark.parametrize("last, order", [(None, ["a", "b", "c"]), ("a", ["b", "c", "a"]), ("b", ["a", "c", "b"])])
def test_the_one_named_last_comes_last(tmp_path, monkeypatch, last, order):
    came, replace = [], os.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: came.append(path.name) or replace(path, to))
    with results_into(tmp_path, last) as staging:
        for name in "cab":
            (staging / name).touch()
    assert came == order
