"""The report for machines: report.json and report.csv, raw values under the columns' keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from pskd_tools.files import csv_text
from pskd_tools.presets import Preset
from pskd_tools.report.compare import Comparison
from pskd_tools.report.runs import Run
from pskd_tools.report.tables import Column, Row, Table

__all__ = ["as_csv", "as_json"]


def as_json(
    tables: Sequence[Table], pairs: Mapping[str, Sequence[Comparison]], preset: Preset
) -> dict[str, object]:
    """Return report.json: every run's raw values, what each means, and what the verdict is."""
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
        "verdict": {
            table.task: [_verdict(table, pair) for pair in pairs[table.task]] for table in tables
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


def _verdict(table: Table, pair: Comparison) -> dict[str, object]:
    compared = [
        (column, pair.differences[column.key])
        for column in table.columns
        if column.key in pair.differences
    ]
    return {
        "name": pair.method.name,
        "baseline": pair.baseline.name,
        "basis": pair.basis,
        "differences": {
            column.key: {
                "difference": difference.value,
                "interval": difference.interval,
                "effect": difference.effect(column.metric.better) or None,
            }
            for column, difference in compared
        },
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
    lines = []
    for table, row, run, values in _each(tables):
        finite = {key: value for key, value in values.items() if not math.isnan(value)}
        lines.append(_identity(table, row, run) | finite)
    return csv_text(["name", "task", "seed", "folder", *keys], lines)


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
