"""Runs of any task, compared on one page: what `pskd report` does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pskd_tools.files import write_json, written_together
from pskd_tools.presets import PRESETS
from pskd_tools.report.compare import compare
from pskd_tools.report.export import as_csv, as_json
from pskd_tools.report.page import make_page
from pskd_tools.report.runs import read_runs
from pskd_tools.report.tables import make_tables

__all__ = ["write_report"]


def write_report(
    runs: Sequence[str], out: str | os.PathLike[str], *, preset: str = "paper"
) -> Path:
    """Read runs and write report.html, report.json and report.csv.

    Args:
        runs: each ``FOLDER``, ``NAME=FOLDER`` or ``NAME=FOLDER,FOLDER``; runs of one name are seeds
            of one method. The first name of a task is the baseline of the others.
        out: the folder to write to, made if there is none.
        preset: one of `pskd_tools.presets.PRESETS`.

    Returns:
        The path of report.html.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a folder that holds no run, files that are not what docs/report.md says, or runs
            that were tested on different examples; nothing is written then.
        OSError: a file that cannot be read or written, or is in the place of ``out``.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    chosen, folder = PRESETS[preset], Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to write to, got a file")
    tables = make_tables(read_runs(runs), chosen)
    pairs = {table.task: compare(table, chosen) for table in tables}
    page = make_page(tables, pairs, chosen)
    _write_all(
        folder,
        {
            "report.json": as_json(tables, pairs, chosen),
            "report.csv": as_csv(tables),
            "report.html": page,
        },
    )
    return folder / "report.html"


def _write_all(folder: Path, files: Mapping[str, str | dict[str, object]]) -> None:
    """Write all files or none, and make no folder for none."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with written_together([folder / name for name in files]) as asides:
            for aside, content in zip(asides, files.values(), strict=True):
                if isinstance(content, str):
                    # File names need not be UTF-8.
                    aside.write_text(content, encoding="utf-8", errors="backslashreplace")
                else:
                    write_json(aside, content, indent=2)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
