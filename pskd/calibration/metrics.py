"""How far a classifier's confidence can be trusted: NLL, ECE, AURC and E-AURC.

Shapes: N rows (samples, tokens or boxes), C classes, B confidence bins.

All values are raw fractions or nats: the PS-KD paper prints ECE x100 and AURC x1000. A row's
*confidence* is the probability of its predicted class, and the row is *correct* if that class is
its label. Half precision is computed in float32, everything that is summed in float64.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pskd.calibration.bins import ReliabilityBins, fill_bins
from pskd.calibration.inputs import (
    Array,
    Booleans,
    Floats,
    check_bins,
    check_not_empty,
    check_pair,
    confidence_rows,
    float_rows,
    nll_rows,
)
from pskd.calibration.risk_coverage import aurc, optimal_aurc

__all__ = [
    "ConfidenceAccumulator",
    "confidence_metrics",
    "expected_calibration_error",
    "negative_log_likelihood",
]

Kind = TypeVar("Kind", bound=np.generic)


def _label_nll(probs: Tensor, target: Tensor) -> Tensor:
    """Return -ln of the label's probability, (N,) float64 on the CPU."""
    label = probs.gather(1, target[:, None]).squeeze(1).cpu().double()
    return -label.clamp(0.0, 1.0).log()


def _top1(probs: Tensor, target: Tensor) -> tuple[Floats, Booleans]:
    """Return the confidence (N,) and whether the prediction is the label (N,)."""
    confidence, predicted = probs.max(dim=1)
    return float_rows("probs", confidence).clip(0.0, 1.0), (predicted == target).cpu().numpy()


def negative_log_likelihood(probs: Array, target: Array) -> float:
    """How surprised the model is, on average, by the labels.

    Equals ``-probs[arange(N), target].log().mean()``. A label of probability 0 gives ``inf``, and
    nothing is clamped; float16 rounds to 0 below 3e-8, so take the softmax in float32.

    Args:
        probs: (N, C) float tensor or array; rows in [0, 1] that sum to 1.
        target: (N,) integer labels in [0, C).

    Returns:
        The mean negative log-likelihood in nats.

    Raises:
        ValueError: shapes that do not match, ``probs`` outside [0, 1], NaN or with rows that do not
            sum to 1 (within 0.01), labels that are no integers or out of range, no row at all.

    Source: Guo et al. 2017, section 2.
    """
    probs, target = check_pair(probs, target)
    check_not_empty(probs.size(0))
    return float(_label_nll(probs, target).mean())


def expected_calibration_error(probs: Array, target: Array, *, bins: int = 15) -> float:
    """By how much the confidence misses the accuracy, on average over the rows' bins.

    Equals ``sum(n_b / N * |accuracy_b - confidence_b|)`` over equal-width bins (lo, hi] of the
    top-1 probability, with 1.0 in the last bin and 0.0 in the first. The PS-KD paper's figures are
    100 times this value with ``bins=10``.

    Args:
        probs: (N, C) float tensor or array; rows in [0, 1] that sum to 1.
        target: (N,) integer labels in [0, C).
        bins: the number of bins.

    Returns:
        The error as a fraction in [0, 1].

    Raises:
        ValueError: as `negative_log_likelihood`, and ``bins`` below 1.

    Source: Guo et al. 2017, section 2 (top-1, L1); Kim et al. 2021 report it.
    """
    bins = check_bins(bins)
    return fill_bins(*_top1(*check_pair(probs, target)), bins).expected_calibration_error


def confidence_metrics(
    filled: ReliabilityBins, confidence: Array, correct: Array
) -> dict[str, float]:
    """Return ``ece``, ``aurc`` and ``e_aurc`` of N rows, of which ``filled`` are the bins."""
    area = aurc(confidence, correct)
    return {
        "ece": filled.expected_calibration_error,
        "aurc": area,
        "e_aurc": area - optimal_aurc(correct),
    }


def _joined(parts: list[NDArray[Kind]]) -> NDArray[Kind]:
    """Return the parts as one array, and leave them joined for the next call."""
    if len(parts) > 1:
        parts[:] = [np.concatenate(parts)]
    return parts[0]


class ConfidenceAccumulator:
    """The metrics of this module over a data set that comes in batches.

    ``compute()`` equals the one-shot functions on all batches together, up to the rounding of
    float64 sums. NLL and ECE are counters; AURC needs every row's confidence, held on the CPU: five
    bytes a row, nine if the probabilities are float64.

    Args:
        bins: the number of confidence bins of the ECE.

    Raises:
        ValueError: ``bins`` below 1.
    """

    def __init__(self, *, bins: int = 15) -> None:
        self._bins = ReliabilityBins.empty(bins)
        self._nll_sum = 0.0
        # An empty float32 part in front, so that there is always something to join.
        self._confidence: list[Floats] = [np.empty(0, np.float32)]
        self._correct: list[Booleans] = [np.empty(0, bool)]

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return int(self._bins.count.sum())

    @property
    def confidence(self) -> Floats:
        """All confidences so far, (N,) float32 (float64 if some came as float64)."""
        return _joined(self._confidence)

    @property
    def correct(self) -> Booleans:
        """Whether each row so far is correct, (N,) bool."""
        return _joined(self._correct)

    @property
    def bins(self) -> ReliabilityBins:
        """The confidence bins of all rows so far."""
        return self._bins

    def update(self, probs: Array, target: Array) -> None:
        """Add a batch of predictions; a batch without rows adds nothing.

        Only vectors of N values leave the device of ``probs``.

        Args:
            probs: (N, C) float tensor or array; rows in [0, 1] that sum to 1.
            target: (N,) integer labels in [0, C).

        Raises:
            ValueError: as `negative_log_likelihood`, save that N may be 0.
        """
        probs, target = check_pair(probs, target)
        self._add(*_top1(probs, target), float(_label_nll(probs, target).sum()))

    def update_from(self, confidence: Array, correct: Array, nll: Array) -> None:
        """Add a batch whose probabilities are gone; a batch without rows adds nothing.

        Equals ``update(probs, target)`` for ``confidence = probs.max(1).values``,
        ``correct = probs.argmax(1) == target`` and ``nll = -probs[arange(N), target].log()``.

        Args:
            confidence: (N,) tensor or array, in [0, 1].
            correct: (N,) boolean, or 0 and 1.
            nll: (N,) tensor or array, in nats, at least 0; ``inf`` is allowed.

        Raises:
            ValueError: shapes that do not match, confidences outside [0, 1] or NaN, ``correct``
                other than 0 and 1, ``nll`` negative or NaN.
        """
        confidence, correct = confidence_rows(confidence, correct, unit_range=True)
        nll = nll_rows(nll, len(confidence))
        # Copies, because the caller may fill the same buffers with the next batch.
        self._add(confidence.copy(), correct.copy(), float(nll.sum(dtype=np.float64)))

    def _add(self, confidence: Floats, correct: Booleans, nll_sum: float) -> None:
        if len(confidence) == 0:
            return
        self._bins = self._bins + fill_bins(confidence, correct, len(self._bins.count))
        self._nll_sum += nll_sum
        self._confidence.append(confidence)
        self._correct.append(correct)

    def compute(self) -> dict[str, float | int]:
        """The metrics of all rows so far; more rows may follow.

        Returns:
            ``nll`` in nats, ``ece``, ``aurc``, ``e_aurc`` and ``accuracy`` as fractions, and
            ``count``, the number of rows.

        Raises:
            ValueError: there was no row yet.
        """
        check_not_empty(self.count)
        return {
            "nll": self._nll_sum / self.count,
            **confidence_metrics(self._bins, self.confidence, self.correct),
            "accuracy": float(self.correct.mean()),
            "count": self.count,
        }
