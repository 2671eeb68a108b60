"""Each method against the baseline, the first of its task: differences and their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pskd.calibration.inputs import Doubles
from pskd_tools.presets import Preset
from pskd_tools.report.intervals import (
    RESAMPLES,
    Measured,
    RowMetrics,
    interval_over_seeds,
    percentile_interval,
    resampled,
)
from pskd_tools.report.runs import Run
from pskd_tools.report.sentences import SentenceMetrics
from pskd_tools.report.shared import SharedTestSet, shared_test_set
from pskd_tools.report.tables import Column, Row, Table

__all__ = ["Comparison", "Difference", "compare", "way_of"]

# Of fewer a resample tells too little.
_LEAST_UNITS = 10


@dataclass(frozen=True)
class Difference:
    """Of a method's mean from the baseline's, raw.

    Attributes:
        interval: of 95 %; None where there is none.
    """

    value: float
    interval: tuple[float, float] | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]

    def effect(self, better: str) -> str:
        """Return "better" or "worse" of a clear difference of a metric, or else ""."""
        if not self.is_clear:
            return ""
        return "better" if (self.value < 0) == (better == "lower") else "worse"


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline.

    Attributes:
        differences: by the keys of their columns.
        basis: what the intervals are over, as sentences.
        tests: the test set that the runs share; None if not known.
        paired: whether the i-th runs of both have the same seed.
    """

    baseline: Row
    method: Row
    differences: dict[str, Difference]
    basis: str
    tests: SharedTestSet | None
    paired: bool

    @property
    def over_seeds(self) -> bool:
        """Whether intervals are over seeds, and not over test examples."""
        return len(self.baseline.runs) > 1 and len(self.method.runs) > 1

    @property
    def runs(self) -> list[Run]:
        """The runs of the baseline, then those of the method."""
        return [*self.baseline.runs, *self.method.runs]

    def difference(
        self, values: Sequence[float], interval: tuple[float, float] | None = None
    ) -> tuple[float, Difference]:
        """Return the baseline's mean of a quantity, and the method's difference from it.

        Args:
            values: of each of the `runs`.
            interval: where there is none over seeds.
        """
        split = len(self.baseline.runs)
        first, second = values[:split], values[split:]
        if self.over_seeds:
            interval = interval_over_seeds(first, second, paired=self.paired)
        start = float(np.mean(first))
        return start, Difference(float(np.mean(second)) - start, interval)


def compare(table: Table, preset: Preset) -> list[Comparison]:
    """Compare every other row of a table with the first.

    Raises:
        ValueError: runs that were tested on different examples, naming the folder.
    """
    baseline, *others = table.rows
    if len(baseline.runs) > 1:
        shared_test_set(baseline.runs)  # refuses a seed of another test set, also without others
    return [_compared(baseline, method, table.columns, preset) for method in others]


def _compared(baseline: Row, method: Row, columns: Sequence[Column], preset: Preset) -> Comparison:
    tests = shared_test_set([*baseline.runs, *method.runs])
    paired = _seeds(baseline) == _seeds(method) is not None
    bare = Comparison(baseline, method, {}, "", tests, paired)
    redrawn = {} if bare.over_seeds else _redrawn(bare, preset)
    differences, basis = {}, [_basis(bare)]
    for column in columns:
        key, title = column.key, column.metric.title
        ways = {way for run in bare.runs if (way := way_of(run.numbers, key)) is not None}
        if len(ways) > 1:
            basis.append(
                f"{title} is not compared: it was computed in different ways, "
                f"{' and '.join(sorted(ways))}."
            )
            continue
        values = [v[key] for v in (*baseline.values, *method.values) if key in v]
        if not column.metric.better or len(values) < len(bare.runs):
            continue
        _, change = bare.difference(values)
        if key in redrawn:
            centred = key.endswith("ece")
            interval = percentile_interval(change.value, redrawn[key], centred=centred)
            change = replace(change, interval=interval)
        differences[key] = change
    return replace(bare, differences=differences, basis=" ".join(basis))


def way_of(numbers: Mapping[str, Any], key: str) -> str | None:
    """Return how a run's score was computed, if sacreBLEU's signature or COMET's model tells it.

    Scores that were computed in different ways cannot be compared.
    """
    told = numbers.get(f"{key}_signature", numbers.get(f"{key}_model"))
    # sacreBLEU keeps scores comparable from version to version.
    return None if told is None else str(told).partition("|version:")[0]


def _seeds(row: Row) -> list[object] | None:
    """Return the seeds of a row's runs, in order; None unless all are known and differ."""
    seeds = [run.numbers.get("seed") for run in row.runs]
    return None if None in seeds or len(set(map(str, seeds))) < len(seeds) else seeds


def _basis(pair: Comparison) -> str:
    counts, tests = (len(pair.baseline.runs), len(pair.method.runs)), pair.tests
    if pair.over_seeds:
        over = (
            f"Student's t over {counts[0]} seeds, paired by seed"
            if pair.paired
            else f"Welch's t over {counts[0]} and {counts[1]} runs, not paired by seed"
        )
        return f"95 % intervals: {over}. They cover chance in the training, on this test set."
    if tests is None:
        without = [str(run.folder) for run in pair.runs if not run.rows]
        if without:
            places = ", ".join(without)
            return f"No 95 % intervals: there is no confidence.npz with rows in {places}."
        return (
            "No 95 % intervals: the runs scored different numbers of tokens and do not say of "
            "which sentences these are."
        )
    drawn = "paired bootstrap" if tests.joint else "bootstrap, not paired,"
    size = " and ".join(f"{count:,}" for count in dict.fromkeys(tests.units))
    if min(tests.units) < _LEAST_UNITS:
        return f"No 95 % intervals: {size} {tests.name} are too few for a bootstrap."
    text = (
        f"95 % intervals: {drawn} over the {size} {tests.name}, {RESAMPLES:,} resamples. They "
        "cover chance in the test set; another training seed may change more."
    )
    return f"{text} {tests.note}".strip()


def _redrawn(pair: Comparison, preset: Preset) -> dict[str, Doubles]:
    """Return the difference of each metric in each resample, (R,) by key."""
    tests, runs = pair.tests, pair.runs
    if tests is None or min(tests.units) < _LEAST_UNITS:
        return {}
    parts: list[list[Measured]] = [[] for _ in runs]
    texts = [run.sentences for run in runs if run.sentences is not None]
    # BLEU and chrF, if the sentences that are drawn are those that were translated.
    if tests.name == "sentences" and len(texts) == len(runs):
        drawn = [np.unique(rows["ids"]).tolist() for rows in tests.rows]
        if drawn == [list(range(len(text.translation))) for text in texts]:
            parts = [[SentenceMetrics(text.bleu, text.chrf)] for text in texts]
    if tests.matched or tests.name != "sentences":
        for part, rows, unit, units in zip(parts, tests.rows, tests.unit, tests.units, strict=True):
            part.append(RowMetrics(rows, unit, units, preset.bins))
    if not parts[0]:
        return {}
    found = resampled(parts, tests.units, joint=tests.joint)
    first, second = found[: len(pair.baseline.runs)], found[len(pair.baseline.runs) :]
    keys = [key for key in found[0] if all(key in values for values in found)]
    return {
        key: np.mean([v[key] for v in second], axis=0) - np.mean([v[key] for v in first], axis=0)
        for key in keys
    }
