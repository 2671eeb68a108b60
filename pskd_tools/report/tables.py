"""Tables of runs: a row a method, its seeds as mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pskd_tools.presets import Preset
from pskd_tools.report.columns import Column, columns_of, raw_values
from pskd_tools.report.runs import TASKS, Run

__all__ = ["Row", "Table", "make_tables"]


@dataclass(frozen=True)
class Row:
    """The runs of one name.

    Attributes:
        runs: a seed each.
        values: raw, for each run in order.
    """

    name: str
    runs: list[Run]
    values: list[dict[str, float]]

    def mean(self, key: str) -> float | None:
        """Return the mean over the runs; None unless all have the quantity."""
        found = [values[key] for values in self.values if key in values]
        return float(np.mean(found)) if len(found) == len(self.runs) else None

    def deviation(self, key: str) -> float | None:
        """Return the sample standard deviation over the runs; None for a single one."""
        if len(self.runs) == 1 or self.mean(key) is None:
            return None
        return float(np.std([values[key] for values in self.values], ddof=1))


@dataclass(frozen=True)
class Table:
    """The rows of a task, and the columns that at least one of them has."""

    task: str
    columns: list[Column]
    rows: list[Row]


def make_tables(runs: Sequence[Run], preset: Preset) -> list[Table]:
    """Return a table for each task that has runs, rows in the order in which they were given.

    Raises:
        ValueError: a run without a single number to show, or as `raw_values`.
    """
    tables = []
    for task in TASKS:
        rows: dict[str, Row] = {}
        for run in runs:
            if run.task == task:
                row = rows.setdefault(run.name, Row(run.name, [], []))
                row.runs.append(run)
                row.values.append(_values(run, preset))
        known = {key for row in rows.values() for values in row.values for key in values}
        if rows:
            columns = [column for column in columns_of(task, preset) if column.key in known]
            tables.append(Table(task, columns, list(rows.values())))
    return tables


def _values(run: Run, preset: Preset) -> dict[str, float]:
    values = raw_values(run, preset)
    if not values:
        raise ValueError(
            f"{run.folder}: expected numbers of a {run.task} run, got none that are known"
        )
    return values
