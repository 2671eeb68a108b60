"""Runs of any task, compared on one page: what `pskd report` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pskd.presets import PRESETS
from pskd.report.page import make_page
from pskd.report.runs import read_runs
from pskd.report.tables import as_csv, as_json, make_tables
from pskd.run.files import write_json, written_aside

__all__ = ["write_report"]


def write_report(
    runs: Sequence[str], out: str | os.PathLike[str], *, preset: str = "paper"
) -> Path:
    """Read runs and write report.html, report.json and report.csv.

    Args:
        runs: each ``FOLDER`` or ``NAME=FOLDER``; runs of one name are seeds of one method.
        out: the folder to write to, made if there is none.
        preset: one of `pskd.presets.PRESETS`.

    Returns:
        The path of report.html.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a folder that holds no run or files that are not what docs/report.md says;
            nothing is written then.
        OSError: a file that cannot be read or written, or is in the place of ``out``.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    chosen, folder = PRESETS[preset], Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to write to, got a file")
    tables = make_tables(read_runs(runs), chosen)
    page = make_page(tables, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", as_json(tables, chosen), indent=2)
    _write_text(folder / "report.csv", as_csv(tables))
    _write_text(folder / "report.html", page)
    return folder / "report.html"


def _write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
