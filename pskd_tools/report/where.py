"""Where a method differs from the baseline: by class, and by how sure the baseline is.

Shapes: N rows, G groups of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pskd.calibration.inputs import Doubles, Integers
from pskd_tools.presets import Metric, Preset
from pskd_tools.report.compare import Comparison, Difference
from pskd_tools.report.intervals import grouped_interval
from pskd_tools.report.tables import columns_of

__all__ = ["Group", "Groups", "by_class", "by_confidence", "class_name", "most_changed"]

_PARTS = 5
_MOST_GROUPS = 20


@dataclass(frozen=True)
class Group:
    """Some of the test set.

    Attributes:
        count: of its rows; None if not known.
        baseline, differences: raw values, one for each metric of `Groups`.
    """

    name: str
    count: int | None
    baseline: list[float]
    differences: list[Difference]


@dataclass(frozen=True)
class Groups:
    """Groups of rows, and what is measured of each.

    Attributes:
        unit: what a row is, in the plural.
    """

    metrics: list[Metric]
    groups: list[Group]
    unit: str


def by_confidence(pair: Comparison, preset: Preset) -> Groups | None:
    """Return fifths of the test set, from those that the baseline is least sure of to the surest.

    With several seeds the confidence is their mean. None if rows do not match.
    """
    if pair.tests is None or not pair.tests.matched:
        return None
    runs = pair.tests.rows[: len(pair.baseline.runs)]
    sure = np.mean([rows["confidence"].astype(np.float64) for rows in runs], axis=0)
    borders = np.quantile(sure, np.arange(1, _PARTS) / _PARTS)
    # Of equal confidences none is alone, so there may be fewer than five.
    _, group = np.unique(np.searchsorted(borders, sure), return_inverse=True)
    parts = [sure[group == g] for g in range(int(group.max()) + 1)]
    return _groups(pair, preset, group, [f"{p.min():.3f} to {p.max():.3f}" for p in parts])


def by_class(pair: Comparison, preset: Preset) -> Groups | None:
    """Return the classes; None if labels, or a detector's AP of each class, are not known."""
    if pair.baseline.runs[0].task == "detection":
        return _ap_by_class(pair, preset)
    if pair.tests is None or not pair.tests.matched or "label" not in pair.tests.rows[0]:
        return None
    rows = pair.tests.rows[0]
    labels, group = np.unique(rows["label"], return_inverse=True)
    return _groups(pair, preset, group, [class_name(rows, label) for label in labels])


def class_name(rows: Mapping[str, np.ndarray], label: int) -> str:
    """Return the name of a class, or its number where the rows of a run do not know it."""
    names = rows.get("class_names", np.empty(0))
    return str(names[label]) if 0 <= label < len(names) else str(label)


def most_changed(groups: Groups) -> list[Group]:
    """Return groups, those that gained most in the first metric first: all, or a list's ends."""
    falls = groups.metrics[0].better == "higher"
    ordered = sorted(groups.groups, key=lambda g: g.differences[0].value, reverse=falls)
    if len(ordered) <= _MOST_GROUPS:
        return ordered
    return ordered[: _MOST_GROUPS // 2] + ordered[-_MOST_GROUPS // 2 :]


def _groups(pair: Comparison, preset: Preset, group: Integers, names: list[str]) -> Groups:
    assert pair.tests is not None  # its rows are what is grouped
    rows, task = pair.tests.rows, pair.baseline.runs[0].task
    measured = {"top1_error": [~arrays["correct"].astype(bool) for arrays in rows]}
    if all("nll" in arrays for arrays in rows):
        measured["nll"] = [arrays["nll"] for arrays in rows]
    found = [
        _measured(pair, np.array(values, dtype=np.float64), group) for values in measured.values()
    ]
    counts = np.bincount(group).tolist()
    groups = [
        Group(name, count, *map(list, zip(*of, strict=True)))
        for name, count, *of in zip(names, counts, *found, strict=True)
    ]
    metrics = [_metric(key, task, preset) for key in measured]
    return Groups(metrics, groups, "tokens" if task == "translation" else "examples")


def _metric(key: str, task: str, preset: Preset) -> Metric:
    return next(column.metric for column in columns_of(task, preset) if column.key == key)


def _measured(pair: Comparison, values: Doubles, group: Integers) -> list[tuple[float, Difference]]:
    """Return the baseline's mean and the difference from it in each group; values are (runs, N)."""
    assert pair.tests is not None
    split, counts = len(pair.baseline.runs), np.bincount(group)
    intervals: list[tuple[float, float] | None] = [None] * len(counts)
    with np.errstate(invalid="ignore"):  # an infinite NLL in both
        means = np.array([np.bincount(group, run) / counts for run in values])
        if not pair.over_seeds:
            change = values[split:].mean(axis=0) - values[:split].mean(axis=0)
            intervals = grouped_interval(change, group, pair.tests.unit[0], len(counts))
        return [
            pair.difference(run, interval) for run, interval in zip(means.T, intervals, strict=True)
        ]


def _ap_by_class(pair: Comparison, preset: Preset) -> Groups | None:
    boxes, prefix = [run.numbers.get("bbox", {}) for run in pair.runs], "AP-"
    groups = []
    for key in boxes[0]:
        values = [of[key] for of in boxes if isinstance(of.get(key), int | float)]
        if key.startswith(prefix) and len(values) == len(boxes):
            start, change = pair.difference(values)
            groups.append(Group(key.removeprefix(prefix), None, [start], [change]))
    return Groups([_metric("AP", "detection", preset)], groups, "boxes") if groups else None
