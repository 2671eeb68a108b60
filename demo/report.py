"""What a part of the demo ends with: its table, and a verdict on PS-KD."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from demo.steps import StepFailed
from pskd_tools.presets import PRESETS
from pskd_tools.report.compare import Comparison, compare
from pskd_tools.report.runs import read_run
from pskd_tools.report.tables import Table, make_tables

__all__ = ["Report", "show"]

_WIDTH = 10
_NAME_WIDTH = 15


class Report(NamedTuple):
    """The results of one part.

    Attributes:
        title: names the task, the framework and the test set.
        columns: key of a result -> title and format of its column.
        results: run -> its numbers by key; None where there is none.
        note: what the columns are.
        folders: run -> its folder, as `pskd report` reads it; the first is the baseline.
    """

    title: str
    columns: Mapping[str, tuple[str, str]]
    results: Mapping[str, Mapping]
    note: str
    folders: Mapping[str, Path]

    def table(self) -> str:
        """Return the table as text, a row a run."""
        rows = [["", *(title for title, _ in self.columns.values())]]
        for name, result in self.results.items():
            values = [(result[key], form) for key, (_, form) in self.columns.items()]
            rows.append([name, *("-" if v is None else format(v, form) for v, form in values)])
        lines = [
            f"{row[0]:>{_NAME_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in row[1:])
            for row in rows
        ]
        return "\n".join([self.title, *lines, self.note])

    def text(self) -> str:
        """Return the table and the verdict."""
        return f"{self.table()}\n\n{self.verdict()}"

    def verdict(self) -> str:
        """Return a sentence on each run but the baseline: what is better, worse or noise."""
        runs = [read_run(folder, name) for name, folder in self.folders.items()]
        (table,) = make_tables(runs, PRESETS["guo"])
        pairs = compare(table, PRESETS["guo"])
        return "\n".join(_sentence(table, pair) for pair in pairs)


def _sentence(table: Table, pair: Comparison) -> str:
    groups: dict[str, list[str]] = {}
    for column in table.columns:
        difference = pair.differences.get(column.key)
        if difference is not None and difference.interval is not None:
            effect = difference.effect(column.metric.better) or "within noise"
            groups.setdefault(effect, []).append(column.title)
    parts = [
        f"{effect} in {', '.join(groups[effect])}"
        for effect in ("better", "worse", "within noise")
        if effect in groups
    ]
    said = "; ".join(parts) or "too few test examples to tell"
    return f"{pair.method.name} against {pair.baseline.name}: {said}."


def show(run: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> int:
    """Run a part by itself, print what it ends with, and return the exit status."""
    try:
        print(f"\n{run(args).text()}")
    except (StepFailed, OSError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0
