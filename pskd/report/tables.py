"""Tables of runs: a row a method, its seeds as mean and deviation, the best value of a column."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pskd.presets import Preset
from pskd.report.columns import Column, columns_of, raw_values
from pskd.report.runs import TASKS, Run

__all__ = ["Row", "Table", "as_csv", "as_json", "make_tables"]


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

    def best(self, column: Column) -> list[Row]:
        """Return the rows with the best mean as it is shown; none where all are equal."""
        means = [(row, row.mean(column.key)) for row in self.rows]
        shown = [(row, float(column.metric.text(mean))) for row, mean in means if mean is not None]
        if len(shown) < 2 or not column.metric.better:
            return []
        choose = min if column.metric.better == "lower" else max
        best = choose(value for _, value in shown)
        rows = [row for row, value in shown if value == best]
        return rows if len(rows) < len(shown) else []


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


def as_json(tables: Sequence[Table], preset: Preset) -> dict[str, object]:
    """Return report.json: every run's raw values, and what each of them means."""
    return {
        "preset": {"name": preset.name, "source": preset.source, "bins": preset.bins},
        "metrics": {
            table.task: {column.key: _described(column) for column in table.columns}
            for table in tables
        },
        "tables": {
            table.task: [
                {
                    "name": row.name,
                    "runs": len(row.runs),
                    "mean": {c.key: row.mean(c.key) for c in table.columns},
                    "deviation": {c.key: row.deviation(c.key) for c in table.columns},
                }
                for row in table.rows
            ]
            for table in tables
        },
        "runs": [
            {
                **_identity(table, row, run),
                "command": run.numbers.get("command"),
                "values": values,
            }
            for table, row, run, values in _each(tables)
        ],
    }


def _described(column: Column) -> dict[str, object]:
    metric = column.metric
    return {
        "title": metric.title,
        "meaning": metric.meaning,
        "raw_unit": column.raw_unit,
        "shown_unit": metric.unit,
        "better": metric.better or None,
        "scaled": column.scaled,
    }


def as_csv(tables: Sequence[Table]) -> str:
    """Return report.csv: one row a run, raw values under the names of report.json."""
    keys = dict.fromkeys(column.key for table in tables for column in table.columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", "task", "seed", "folder", *keys], lineterminator="\n")
    writer.writeheader()
    for table, row, run, values in _each(tables):
        finite = {key: value for key, value in values.items() if not math.isnan(value)}
        writer.writerow(_identity(table, row, run) | finite)
    return text.getvalue()


def _identity(table: Table, row: Row, run: Run) -> dict[str, object]:
    return {
        "name": row.name,
        "task": table.task,
        "seed": run.numbers.get("seed"),
        "folder": str(run.folder),
    }


def _each(tables: Sequence[Table]) -> Iterator[tuple[Table, Row, Run, dict[str, float]]]:
    for table in tables:
        for row in table.rows:
            for run, values in zip(row.runs, row.values, strict=True):
                yield table, row, run, values
