"""What chance does to a metric: over test examples drawn with replacement, and over seeds.

Shapes: N rows of a run (samples, tokens or boxes), U units that are drawn (samples, sentences or
images, each with all its rows), R resamples, K sums, G groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from pskd.calibration.bins import bin_index
from pskd.calibration.inputs import Booleans, Doubles, Floats, Integers, confidence_rows, float_rows

__all__ = [
    "RESAMPLES",
    "Measured",
    "RowMetrics",
    "draws",
    "grouped_interval",
    "interval_over_seeds",
    "percentile_interval",
    "resampled",
]

RESAMPLES = 1000
_SEED = 20061
_LEVEL = 0.95

#: Metrics of a run as a function of how often each unit counts.
Measured = Callable[[Integers], dict[str, float]]


def draws(units: int, seed: int = _SEED) -> Iterator[Integers]:
    """Give R times how often each unit, (U,) int64, is among U drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(rng.integers(units, size=units), minlength=units)


def resampled(
    runs: Sequence[Sequence[Measured]], units: Sequence[int], *, joint: bool
) -> list[dict[str, Doubles]]:
    """Return each run's metrics of R resamples, by key, (R,) each.

    Args:
        runs: what measures each run.
        units: U of each run.
        joint: whether all runs are measured on the same draw, which then have the same U.
    """
    streams = [draws(count, _SEED if joint else _SEED + i) for i, count in enumerate(units)]
    found: list[list[dict[str, float]]] = [[] for _ in runs]
    for weights in zip(*streams, strict=True):
        for run, own, kept in zip(runs, weights, found, strict=True):
            kept.append({key: value for part in run for key, value in part(own).items()})
    return [{key: np.array([v[key] for v in values]) for key in values[0]} for values in found]


def percentile_interval(
    difference: float, resamples: Doubles, *, centred: bool = False
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a difference; None where a value is not finite.

    Args:
        difference: of the whole test set.
        resamples: (R,), the same difference of each resample; a NaN, of a draw without any row, is
            left out.
        centred: whether to move the interval so that the mean of the resamples is the difference
            itself. An ECE is too large by chance, in a resample of chance more so; without this a
            difference could lie outside its own interval.
    """
    known = resamples[~np.isnan(resamples)]
    if not len(known) or not np.isfinite(difference) or not np.isfinite(known).all():
        return None
    tail = (1 - _LEVEL) / 2
    shift = difference - known.mean() if centred else 0.0
    low, high = np.quantile(known, [tail, 1 - tail]) + shift
    return float(low), float(high)


def grouped_interval(
    difference: Doubles, group: Integers, unit: Integers, groups: int
) -> list[tuple[float, float] | None]:
    """Return the 95 % interval of the mean difference in each group of rows.

    Args:
        difference: (N,) of two runs on each row.
        group: (N,) in [0, G).
        unit: (N,) in [0, U), which rows are drawn together.
        groups: G.
    """
    totals = []
    with np.errstate(invalid="ignore"):  # an infinite NLL; a group that was not drawn
        for weights in draws(int(unit.max()) + 1):
            drawn = weights[unit]
            count = np.bincount(group, drawn, groups)
            totals.append(np.bincount(group, drawn * difference, groups) / count)
        means = np.bincount(group, difference, groups) / np.bincount(group, minlength=groups)
    return [
        percentile_interval(mean, values)
        for mean, values in zip(means, np.array(totals).T, strict=True)
    ]


def interval_over_seeds(
    first: Sequence[float], second: Sequence[float], *, paired: bool
) -> tuple[float, float] | None:
    """Return the 95 % interval of ``mean(second) - mean(first)``; None if a value is not finite.

    Args:
        first: a value of each seed, two at least.
        second: likewise.
        paired: whether the i-th values are of the same seed: then Student's t over the
            differences, or else Welch's t.

    Raises:
        ImportError: scipy is missing.
    """
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError(
            "intervals over seeds need scipy, which could not be imported: pip install scipy"
        ) from error
    one, other = np.asarray(first, float), np.asarray(second, float)
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return None
    middle = other.mean() - one.mean()
    parts = [other - one] if paired else [one, other]
    variances = np.array([part.var(ddof=1) / len(part) for part in parts])
    total = variances.sum()
    if total == 0.0:
        return float(middle), float(middle)
    within = sum(v**2 / (len(part) - 1) for v, part in zip(variances, parts, strict=True))
    reach = stdtrit(total**2 / within, 0.975) * np.sqrt(total)
    return float(middle - reach), float(middle + reach)


class RowMetrics:
    """The metrics of `pskd_tools.presets.measure` of rows that count several times or not at all.

    With ``weights`` from `draws` equals ``measure`` of the rows repeated by ``weights[unit]``.

    Args:
        rows: the arrays of confidence.npz.
        unit: (N,) in [0, U), the unit of each row.
        units: U.
        bins: of the ECE.
    """

    def __init__(
        self, rows: Mapping[str, np.ndarray], unit: Integers, units: int, bins: int
    ) -> None:
        confidence, correct = confidence_rows(rows["confidence"], rows["correct"], unit_range=True)
        terms = {"count": np.ones(len(unit)), "top1_error": ~correct}
        if "in_top5" in rows:
            terms["top5_error"] = ~np.asarray(rows["in_top5"], dtype=bool)
        terms |= {key: rows[key] for key in ("nll", "scaled_nll") if key in rows}
        self._means = list(terms)
        sums = [_by_unit(values, unit, units)[:, None] for values in terms.values()]
        scored = {"": confidence}
        if "scaled_confidence" in rows:
            scored["scaled_"] = float_rows("scaled_confidence", rows["scaled_confidence"])
        self._bins = bins
        self._ranking = {}
        for prefix, scores in scored.items():
            gap: Doubles = correct - scores.astype(np.float64)
            cell = unit * bins + bin_index(scores, bins)
            sums.append(_by_unit(gap, cell, units * bins).reshape(units, bins))
            self._ranking[prefix] = _Ranking(scores, correct, unit)
        self._sums = np.concatenate(sums, axis=1)  # (U, K)

    def __call__(self, weights: Integers) -> dict[str, float]:
        with np.errstate(invalid="ignore"):  # 0 times an infinite NLL; no row at all
            sums = weights.astype(np.float64) @ self._sums
            count, means = sums[0], sums[: len(self._means)] / sums[0]
            values = dict(zip(self._means[1:], means[1:].tolist(), strict=True))
            gaps = sums[len(self._means) :].reshape(-1, self._bins)
            eces = np.abs(gaps).sum(axis=1) / count
        for (prefix, ranking), ece in zip(self._ranking.items(), eces.tolist(), strict=True):
            area, excess = ranking(weights)
            values |= {f"{prefix}ece": ece, f"{prefix}aurc": area, f"{prefix}e_aurc": excess}
        return values


def _by_unit(values: np.ndarray, unit: Integers, units: int) -> Doubles:
    # Of no rows they are whole numbers, whatever the weights.
    return np.asarray(np.bincount(unit, weights=values, minlength=units), dtype=np.float64)


class _Ranking:
    """AURC and E-AURC of rows that are sorted once.

    In a group of k rows of one confidence, after K rows with E errors, the errors grow evenly to
    E + e. The sum of the risks there is ``e + (E - e / k * K) * (H(K + k) - H(K))`` with the
    harmonic numbers H, so that a row that is drawn k times costs no more than one.
    """

    def __init__(self, confidence: Floats, correct: Booleans, unit: Integers) -> None:
        order = np.argsort(confidence)[::-1]
        ordered = confidence[order]
        self._unit, self._wrong = unit[order], ~correct[order]
        self._starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))

    def __call__(self, weights: Integers) -> tuple[float, float]:
        drawn = weights[self._unit]
        errors = drawn * self._wrong
        if len(self._starts) < len(drawn):
            drawn, errors = (np.add.reduceat(v, self._starts) for v in (drawn, errors))
        kept, wrong = np.cumsum(drawn), np.cumsum(errors)
        count, total = int(kept[-1]), int(wrong[-1])
        if not count:
            return np.nan, np.nan
        harmonic = _harmonic(count)
        steps = harmonic[kept]
        steps[1:] -= harmonic[kept[:-1]]
        before, wrong_before = kept - drawn, wrong - errors
        risks = total + ((wrong_before - errors / np.maximum(drawn, 1) * before) * steps).sum()
        right = count - total
        optimum = total - right * (harmonic[count] - harmonic[right])
        return float(risks / count), float((risks - optimum) / count)


_harmonics = np.zeros(1)


def _harmonic(count: int) -> Doubles:
    """Return H(0) to at least H(count)."""
    global _harmonics
    if len(_harmonics) <= count:
        _harmonics = np.append(0.0, np.cumsum(1.0 / np.arange(1, 2 * count + 1)))
    return _harmonics
