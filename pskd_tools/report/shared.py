"""Which test examples several runs share, and in what units these are drawn by a bootstrap.

Shapes: N rows of a run, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pskd.calibration.inputs import Integers
from pskd_tools.report.files import ROW_ARRAYS
from pskd_tools.report.runs import Run

__all__ = ["SharedTestSet", "shared_test_set"]

_Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class SharedTestSet:
    """The rows of several runs, and the units that they belong to.

    Attributes:
        rows: of each run; in one order if ``matched``.
        unit: the unit of each row, (N,) of each run.
        units: U of each run.
        name: what a unit is, in the plural.
        joint: whether unit u is the same in all runs.
        matched: whether row i is the same test example, or token, in all runs.
        note: a sentence on what could not be verified; empty without.
    """

    rows: list[_Rows]
    unit: list[Integers]
    units: list[int]
    name: str
    joint: bool = True
    matched: bool = True
    note: str = ""


def shared_test_set(runs: Sequence[Run]) -> SharedTestSet | None:
    """Return what runs of one task were tested on; None if one has no rows.

    Raises:
        ValueError: runs that were tested on other examples than the first, naming the folder.
    """
    rows, task = [run.rows for run in runs], runs[0].task
    if not all(rows):
        return None
    if not all("ids" in arrays for arrays in rows):
        return _by_position(runs)
    if task == "detection":
        ids = [arrays["ids"].astype(str) for arrays in rows]
        names = np.unique(np.concatenate(ids))
        name, matched, note = "images with detections", False, ""
    else:
        rows = [_in_order_of_ids(arrays) for arrays in rows]
        ids = [arrays["ids"] for arrays in rows]
        names = np.unique(ids[0])
        for run, own in zip(runs[1:], ids[1:], strict=True):
            if not np.array_equal(np.unique(own), names):
                raise _other_examples(run, runs[0], "other ids")
        name, note = "sentences" if task == "translation" else "test examples", ""
        matched = all(np.array_equal(ids[0], own) for own in ids[1:])
        if task == "classification":
            _check_labels(runs, rows)
        elif not matched:
            note = (
                "The runs cut their sentences into different tokens, so metrics over tokens have "
                "no interval."
            )
    unit = [np.searchsorted(names, own) for own in ids]
    units = [len(names)] * len(rows)
    return SharedTestSet(rows, unit, units, name, matched=matched, note=note)


def _in_order_of_ids(arrays: _Rows) -> _Rows:
    order = np.argsort(arrays["ids"], kind="stable")  # tokens stay in order within a sentence
    return arrays | {key: arrays[key][order] for key in ROW_ARRAYS if key in arrays}


def _by_position(runs: Sequence[Run]) -> SharedTestSet | None:
    rows, task = [run.rows for run in runs], runs[0].task
    counts = [len(arrays["confidence"]) for arrays in rows]
    unit = [np.arange(count) for count in counts]
    if task == "detection":
        note = (
            "The files do not say which image a detection is of, so each run's detections are "
            "drawn on their own."
        )
        return SharedTestSet(
            rows, unit, counts, "detections", joint=False, matched=False, note=note
        )
    for run, count in zip(runs, counts, strict=True):
        if count != counts[0]:
            if task == "translation":  # the same sentences, perhaps, in other tokens
                return None
            raise _other_examples(run, runs[0], f"{count:,} rows instead of {counts[0]:,}")
    _check_labels(runs, rows)
    note = "The files do not name their rows: row i is taken to be the same in all runs."
    if task == "classification":
        return SharedTestSet(rows, unit, counts, "test examples", note=note)
    note += " Tokens are drawn one by one, not by sentence, so intervals are too narrow."
    return SharedTestSet(rows, unit, counts, "tokens", note=note)


def _check_labels(runs: Sequence[Run], rows: list[_Rows]) -> None:
    labels = [arrays.get("label") for arrays in rows]
    for run, own in zip(runs, labels, strict=True):
        if own is not None and labels[0] is not None and not np.array_equal(own, labels[0]):
            raise _other_examples(run, runs[0], "other labels")


def _other_examples(run: Run, first: Run, got: str) -> ValueError:
    return ValueError(f"{run.folder}: expected the test examples of {first.folder}, got {got}")
