"""Tables of a training: a row per evaluation, and what a sweep of the learning rate found."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.run import write_text_atomic

COLUMNS = """time route stage epoch iter split classes mIoU mAcc AP AP50 AP25 mCov mWCov mPrec mRec n_scenes s_per_frame
peak_gpu_mb iter_time_s data_time_s lr fallback_count gate_mean""".split()


def write_evaluations(path: Path, step: int, rows: Sequence[dict]) -> None:
    """The rows of the table before `step`, then these, which may lack columns: a resumed run has each row once."""
    kept = []
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as f:
            kept = [row for row in csv.DictReader(f) if int(row["iter"]) < step]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text_atomic(path, text.getvalue())


def sweep_result(rates: Sequence[float], losses: Sequence[float]) -> str:
    """Where the loss, averaged over a twentieth of the steps, fell fastest per decade of the rate, and was lowest."""
    n = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(n) / n, "valid")
    x = np.log10(rates)[n - 1 :]
    if len(x) < 3:
        return f"{len(losses)} losses are too few to tell"
    low = max(2, int(smooth.argmin()) + 1)  # what comes after the lowest tells nothing
    fall = np.gradient(smooth, x)[:low]
    return (
        f"the loss fell fastest at rate {10 ** x[fall.argmin()]:.2g} and was lowest at {10 ** x[smooth.argmin()]:.2g}"
    )
