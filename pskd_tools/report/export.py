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
        "tables": {table.task: [_means(table, row) for row in table.rows] for table in tables},
        "verdict": {
            table.task: [_verdict(table, pair) for pair in pairs[table.task]] for table in tables
        },
        "runs": [
            identity | {"command": run.numbers.get("command"), "values": values}
            for run, identity, values in _each(tables)
        ],
    }


def _means(table: Table, row: Row) -> dict[str, object]:
    keys = [column.key for column in table.columns]
    return {
        "name": row.name,
        "runs": len(row.runs),
        "mean": {key: row.mean(key) for key in keys},
        "deviation": {key: row.deviation(key) for key in keys},
    }


def _verdict(table: Table, pair: Comparison) -> dict[str, object]:
    better = {column.key: column.metric.better for column in table.columns}
    return {
        "name": pair.method.name,
        "baseline": pair.baseline.name,
        "basis": pair.basis,
        "differences": {
            key: {
                "difference": difference.value,
                "interval": difference.interval,
                "effect": difference.effect(better[key]) or None,
            }
            for key, difference in pair.differences.items()
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
    for _, identity, values in _each(tables):
        finite = {key: value for key, value in values.items() if not math.isnan(value)}
        lines.append(identity | finite)
    return csv_text(["name", "task", "seed", "folder", *keys], lines)


def _each(tables: Sequence[Table]) -> Iterator[tuple[Run, dict[str, object], dict[str, float]]]:
    """Give each run, what names it, and its values."""
    for table in tables:
        for row in table.rows:
            for run, values in zip(row.runs, row.values, strict=True):
                seed, folder = run.numbers.get("seed"), str(run.folder)
                named = {"name": row.name, "task": table.task, "seed": seed, "folder": folder}
                yield run, named, values
