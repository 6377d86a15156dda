"""The folder of a script's results: all of a run's files come at once, or none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def results_into(out: Path, last: str | None = None) -> Iterator[Path]:
    """A folder whose files and folders go to `out` when all are written, and nowhere when they are not.

    They replace files of the same name, one by one in the order of names; the one named `last` comes last, so where it
    lies, all lie. `out` is made; if it did not exist and something fails, it goes again.
    """
    staging, existed = out / ".tmp-infer", out.exists()
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a killed run
        staging.mkdir(parents=True)
        yield staging
        for file in sorted(staging.iterdir(), key=lambda path: (path.name == last, path.name)):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and out.exists() and not any(out.iterdir()):
            out.rmdir()
