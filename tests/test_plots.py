"""utils/plots.py: PNG files with the right things in them, closed figures, refusals."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from utils import plots
from utils.run import UserError


@pytest.fixture(autouse=True)
def figures_are_closed_and_nothing_is_left(tmp_path):
    yield
    assert plt.get_fignums() == [] and not list(tmp_path.glob(".*"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures in the order they are saved, to look at their axes after they are closed."""
    seen, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (seen.append(figure), save(figure, path)))
    return seen


def is_picture(path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and min(image.size) > 100 and len(set(image.convert("L").tobytes())) > 10


def rows() -> list[dict]:
    rows = [{"step": s, "loss": 4.0 / s, "lr": 1e-3 / s, "grad": 3.0 + s} for s in range(1, 60)]
    rows[20] |= {"val_loss": 0.5, "val_mAP1": 0.7, "note": "text is left out"}
    rows[40] |= {"val_loss": 0.3, "val_mAP1": float("nan")}
    return rows


def test_curves_from_rows_and_file(tmp_path, drawn):
    plots.curves(rows(), tmp_path / "rows.png")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    plots.curves(tmp_path / "metrics.jsonl", tmp_path / "file.png")
    assert is_picture(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes() == (tmp_path / "file.png").read_bytes()
    panels = {a.get_title(): [x.get_label() for x in a.lines] for a in drawn[0].axes}
    assert panels == {
        "loss": ["loss", "val_loss"], "learning rate": ["lr"], "share in [0, 1]": ["val_mAP1"], "grad": ["grad"]
    }  # fmt: skip
    assert drawn[0].axes[0].get_yscale() == "log" and list(drawn[0].axes[0].lines[1].get_xdata()) == [21, 41]


def test_curves_refuses_what_it_cannot_draw(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"step": 1, "loss": 2}\n{"step"')
    with pytest.raises(UserError, match="bad.jsonl: holds a line that is not json"):
        plots.curves(tmp_path / "bad.jsonl", tmp_path / "x.png")
    with pytest.raises(UserError, match="none.jsonl: cannot be read"):
        plots.curves(tmp_path / "none.jsonl", tmp_path / "x.png")
    with pytest.raises(UserError, match="no numbers over 'step'"):
        plots.curves([{"loss": 1.0}], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_timeline_draws_every_event_once(tmp_path, drawn):
    events = [{"frame": f, "label": "hit", "score": 0.9} for f in (0, 300, 1499)]
    truth = [{"frame": 299, "label": "hit", "lo": 298, "hi": 300}, {"frame": 750, "label": "bounce"}]
    scores = {"hit": np.linspace(0, 1, 1500), "bounce": np.zeros(1500)}
    plots.timeline(tmp_path / "t.png", 1500, 25.0, scores, events, truth)
    assert is_picture(tmp_path / "t.png") and len(drawn[0].axes) == 2  # 60 s in strips of 30 s
    lines = [x for a in drawn[0].axes for x in a.lines]
    found = sorted(float(x.get_xdata()[0]) for x in lines if x.get_marker() == "v")
    true = sorted(float(x.get_xdata()[0]) for x in lines if x.get_marker() == "|")
    assert found == [0.0, 12.0, 1499 / 25] and true == [299 / 25, 30.0]
    drawn_points = sum(len(x.get_xdata()) for x in lines if len(x.get_xdata()) > 1)
    assert drawn_points == 2 * 1500  # every frame of both curves


def test_timeline_without_fps_truth_or_events_and_wrong_length(tmp_path, drawn):
    plots.timeline(tmp_path / "t.png", 40, -1, {"hit": np.zeros(40)}, [])
    assert is_picture(tmp_path / "t.png") and drawn[0].axes[-1].get_xlabel() == "frame"
    plots.timeline(tmp_path / "one.png", 1, 25.0, {"hit": np.ones(1)}, [{"frame": 0, "label": "hit"}])
    plots.timeline(tmp_path / "long.png", 4000, 25.0, {"hit": np.zeros(4000)}, [], seconds_per_row=1)
    assert len(drawn[-1].axes) == 30
    with pytest.raises(ValueError, match=r"shape \(39,\), expected \(40,\)"):
        plots.timeline(tmp_path / "w.png", 40, 25.0, {"hit": np.zeros(39)}, [])


def test_error_histogram_counts(tmp_path, drawn):
    plots.error_histogram(tmp_path / "h.png", [0, 0, 1, -2, 0.4, 30])
    assert is_picture(tmp_path / "h.png")
    bars = {round(b.get_x() + b.get_width() / 2): b.get_height() for b in drawn[0].axes[0].patches if b.get_height()}
    assert bars == {0: 3, 1: 1, -2: 1, 30: 1}
    assert "n = 6" in drawn[0].axes[0].get_title()
    plots.error_histogram(tmp_path / "none.png", [])
    assert is_picture(tmp_path / "none.png") and "n = 0" in drawn[1].axes[0].get_title()
