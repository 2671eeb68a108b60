"""How well confidence ranks: the risk-coverage curve and the area under it.

Shapes: N rows (samples, tokens or boxes).
"""

from __future__ import annotations

import numpy as np

from pskd.calibration.inputs import Array, Doubles, check_not_empty, confidence_rows, correct_rows

__all__ = [
    "aurc",
    "excess_aurc",
    "optimal_aurc",
    "optimal_risk_coverage_curve",
    "risk_coverage_curve",
]


def risk_coverage_curve(confidence: Array, correct: Array) -> tuple[Doubles, Doubles]:
    """The error rate among the most confident rows, at every number of rows kept.

    Without ties equals ``coverage = arange(1, N + 1) / N`` and ``risk = cumsum(~correct[order]) /
    arange(1, N + 1)`` with ``order = argsort(-confidence)``. Rows of equal confidence have no
    order of their own: within such a group the risk is its expectation over all orders, that is,
    the number of errors grows evenly, so the order of the input changes nothing.

    Args:
        confidence: (N,) tensor or array; any score that rises with confidence, without NaN.
        correct: (N,) boolean, or 0 and 1.

    Returns:
        coverage: (N,) float64, the fraction of rows kept, rising to 1.
        risk: (N,) float64, the error rate among the rows kept; the last is the error rate of all.

    Raises:
        ValueError: shapes that do not match, NaN, ``correct`` other than 0 and 1, no row at all.

    Source: Geifman & El-Yaniv 2019, "Bias-Reduced Uncertainty Estimation for Deep Neural
    Classifiers".
    """
    confidence, correct = confidence_rows(confidence, correct, unit_range=False)
    check_not_empty(len(confidence))
    order = np.argsort(confidence)[::-1]
    confidence, errors = confidence[order], np.cumsum(~correct[order])
    ends = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True))
    kept = np.arange(1, len(confidence) + 1)
    # The counts at the groups' ends do not depend on the order inside; between them they are even.
    even = np.interp(kept, np.append(0, ends + 1), np.append(0, errors[ends]))
    return kept / len(kept), even / kept


def optimal_risk_coverage_curve(correct: Array) -> tuple[Doubles, Doubles]:
    """The curve of a confidence that ranks every correct row above every wrong one.

    Equals ``risk_coverage_curve(correct, correct)``.

    Args:
        correct: (N,) boolean, or 0 and 1.

    Returns:
        coverage, risk: as `risk_coverage_curve`.

    Raises:
        ValueError: ``correct`` is no vector or other than 0 and 1, no row at all.

    Source: Geifman & El-Yaniv 2019.
    """
    correct = correct_rows(correct)
    check_not_empty(len(correct))
    kept = np.arange(1, len(correct) + 1)
    return kept / len(kept), np.maximum(kept - np.count_nonzero(correct), 0) / kept


def aurc(confidence: Array, correct: Array) -> float:
    """Area under the risk-coverage curve: how badly confidence ranks, and how many rows are wrong.

    Equals ``risk_coverage_curve(confidence, correct)[1].mean()``, the mean over all N coverages.
    The PS-KD paper's figures are 1000 times this value, but there the order of tied rows decides;
    here ties count as their expectation over all orders.

    Args:
        confidence: (N,) tensor or array; any score that rises with confidence, without NaN. For
            probabilities, ``probs.max(1).values``.
        correct: (N,) boolean, or 0 and 1. For probabilities, ``probs.argmax(1) == target``.

    Returns:
        The area as a fraction in [0, 1]; a constant confidence gives the error rate.

    Raises:
        ValueError: as `risk_coverage_curve`.

    Source: Geifman & El-Yaniv 2019; Kim et al. 2021 report it.
    """
    return float(risk_coverage_curve(confidence, correct)[1].mean())


def excess_aurc(confidence: Array, correct: Array) -> float:
    """E-AURC: the part of the AURC that a better ranking of the same predictions would remove.

    Equals ``aurc(confidence, correct) - aurc(correct, correct)``. The optimum is that of these N
    rows; with r the error rate, it approaches ``r + (1 - r) * ln(1 - r)`` as N grows.

    Args:
        confidence: (N,) tensor or array; any score that rises with confidence, without NaN.
        correct: (N,) boolean, or 0 and 1.

    Returns:
        The excess as a fraction in [0, 1]; 0 if no wrong row ranks above a correct one.

    Raises:
        ValueError: as `risk_coverage_curve`.

    Source: Geifman & El-Yaniv 2019; Kim et al. 2021 report it.
    """
    return aurc(confidence, correct) - optimal_aurc(correct)


def optimal_aurc(correct: Array) -> float:
    """Return the area under `optimal_risk_coverage_curve`."""
    return float(optimal_risk_coverage_curve(correct)[1].mean())
