"""How far a classifier's confidence can be trusted: NLL, ECE, AURC and E-AURC.

Shapes: N rows (samples, tokens or boxes), C classes, B confidence bins.

All values are raw fractions or nats: the PS-KD paper prints ECE x100 and AURC x1000. A row's
*confidence* is the probability of its predicted class, and the row is *correct* if that class is
its label. Half precision is computed in float32, everything that is summed in float64.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "ConfidenceAccumulator",
    "ReliabilityBins",
    "aurc",
    "excess_aurc",
    "expected_calibration_error",
    "negative_log_likelihood",
    "optimal_risk_coverage_curve",
    "reliability_bins",
    "risk_coverage_curve",
]

Array = Tensor | np.ndarray
Booleans = NDArray[np.bool_]
Floats = NDArray[np.floating]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Kind = TypeVar("Kind", bound=np.generic)

# A float16 or bfloat16 softmax sums to 1 within half a unit in the last place (up to 0.002), plus,
# over a large vocabulary, what its smallest entries lost. Logits and log-probabilities lie far off.
_ROW_SUM_TOLERANCE = 0.01


def _as_tensor(name: str, values: Array) -> Tensor:
    """Return ``values`` as a detached tensor of real numbers, on the device where they are."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: expected real numbers, got dtype {array.dtype}")
        native = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        values = torch.from_numpy(np.require(array, native, ["C", "W"]))
    if values.is_complex():
        raise ValueError(f"{name}: expected real numbers, got dtype {values.dtype}")
    return values.detach()


def _check_vector(name: str, values: Tensor, rows: int | None = None) -> None:
    if values.dim() != 1 or rows not in (None, values.size(0)):
        expected = "(N,)" if rows is None else f"({rows},)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(values.shape)}")


def _float_rows(name: str, values: Array, rows: int | None = None) -> Floats:
    """Return a vector in the precision that is computed in: float64 kept, halves to float32."""
    values = _as_tensor(name, values)
    _check_vector(name, values, rows)
    # First to the CPU: not every device has float64.
    values = values.cpu()
    exact = torch.promote_types(values.dtype, torch.float32)
    return values.to(exact if values.is_floating_point() else torch.float64).numpy()


def _check_not_empty(count: int) -> None:
    if count == 0:
        raise ValueError(
            "expected at least one example, got none: a metric of zero examples is undefined"
        )


def _check_bins(bins: int) -> int:
    try:
        number = operator.index(bins)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"bins: expected an integer of at least 1, got {bins!r}")
    return number


def _check_probs(probs: Tensor) -> None:
    """Refuse what is no table of distributions, with one read-back from the device."""
    if probs.dim() != 2 or probs.size(1) == 0:
        raise ValueError(f"probs: expected shape (N, C) with C >= 1, got {tuple(probs.shape)}")
    if not probs.is_floating_point():
        raise ValueError(f"probs: expected a floating-point dtype, got {probs.dtype}")
    if probs.size(0) == 0:
        return
    totals = probs.sum(dim=1, dtype=torch.promote_types(probs.dtype, torch.float32))
    worst = totals[(totals - 1.0).abs().argmax()]
    low, high = probs.aminmax()
    low, high, worst = torch.stack([low.to(worst.dtype), high.to(worst.dtype), worst]).tolist()
    if not (low >= 0.0 and high <= 1.0):  # also true of NaN
        raise ValueError(f"probs: expected values in [0, 1], got values in [{low:g}, {high:g}]")
    if abs(worst - 1.0) > _ROW_SUM_TOLERANCE:
        raise ValueError(f"probs: expected rows that sum to 1, got a row that sums to {worst:g}")


def _check_target(target: Tensor, rows: int, classes: int) -> Tensor:
    """Return the labels as int64, or refuse them."""
    _check_vector("target", target, rows)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target: expected an integer dtype, got {target.dtype}")
    target = target.long()
    if rows:
        low, high = torch.stack(target.aminmax()).tolist()
        if low < 0 or high >= classes:
            raise ValueError(
                f"target: expected labels in [0, {classes}), got labels in [{low}, {high}]"
            )
    return target


def _check_pair(probs: Array, target: Array) -> tuple[Tensor, Tensor]:
    """Return probabilities (N, C) and int64 labels (N,) on the device of the probabilities."""
    probs = _as_tensor("probs", probs)
    _check_probs(probs)
    target = _as_tensor("target", target).to(probs.device)
    return probs, _check_target(target, probs.size(0), probs.size(1))


def _label_nll(probs: Tensor, target: Tensor) -> Tensor:
    """Return -ln of the label's probability, (N,) float64 on the CPU."""
    return -probs.gather(1, target[:, None]).squeeze(1).cpu().double().log()


def _top1(probs: Tensor, target: Tensor) -> tuple[Floats, Booleans]:
    """Return the confidence (N,) and whether the prediction is the label (N,)."""
    confidence, predicted = probs.max(dim=1)
    return _float_rows("probs", confidence), (predicted == target).cpu().numpy()


def _confidence_rows(
    confidence: Array, correct: Array, *, unit_range: bool
) -> tuple[Floats, Booleans]:
    """Return a confidence (N,) float and a correct (N,) bool array, checked."""
    confidence = _float_rows("confidence", confidence)
    correct = _correct_rows(correct, len(confidence))
    if np.isnan(confidence).any():
        raise ValueError("confidence: expected numbers, got NaN")
    if unit_range and not np.all((confidence >= 0.0) & (confidence <= 1.0)):
        raise ValueError(
            "confidence: expected values in [0, 1], got values in "
            f"[{confidence.min():g}, {confidence.max():g}]"
        )
    return confidence, correct


def _correct_rows(correct: Array, rows: int | None = None) -> Booleans:
    correct = _as_tensor("correct", correct)
    _check_vector("correct", correct, rows)
    if correct.dtype != torch.bool:
        strange = correct[(correct != 0) & (correct != 1)]
        if strange.numel():
            raise ValueError(f"correct: expected booleans or 0 and 1, got {strange[0].item()!r}")
    return correct.bool().cpu().numpy()


@dataclass(frozen=True)
class ReliabilityBins:
    """What falls into each of B equal-width confidence bins (lo, hi]; bin 0 also holds 0.0.

    Two of them over the same bins add up to the bins of both sets of rows together.

    Attributes:
        count: (B,) int64, rows in each bin.
        confidence_sum: (B,) float64, sum of their confidences.
        correct_sum: (B,) int64, how many of them are correct.
    """

    count: Integers
    confidence_sum: Doubles
    correct_sum: Integers

    @classmethod
    def empty(cls, bins: int) -> ReliabilityBins:
        """Return ``bins`` bins without a row."""
        bins = _check_bins(bins)
        return cls(np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins, np.int64))

    @property
    def edges(self) -> Doubles:
        """The bins' borders, (B + 1,) float64 from 0 to 1."""
        return np.arange(len(self.count) + 1) / len(self.count)

    @property
    def confidence(self) -> Doubles:
        """The mean confidence in each bin, (B,) float64; NaN where a bin is empty."""
        return self._mean(self.confidence_sum)

    @property
    def accuracy(self) -> Doubles:
        """The fraction of correct rows in each bin, (B,) float64; NaN where a bin is empty."""
        return self._mean(self.correct_sum)

    @property
    def expected_calibration_error(self) -> float:
        """``sum(count / N * |accuracy - confidence|)`` over the bins that are not empty.

        Raises:
            ValueError: there is no row in any bin.
        """
        total = int(self.count.sum())
        _check_not_empty(total)
        return float(np.abs(self.correct_sum - self.confidence_sum).sum() / total)

    def _mean(self, total: Doubles | Integers) -> Doubles:
        return np.where(self.count > 0, total / np.maximum(self.count, 1), np.nan)

    def __add__(self, other: ReliabilityBins) -> ReliabilityBins:
        if not isinstance(other, ReliabilityBins):
            return NotImplemented
        if len(self.count) != len(other.count):
            raise ValueError(
                f"bins: expected {len(self.count)} bins as on the left, got {len(other.count)}"
            )
        return ReliabilityBins(
            self.count + other.count,
            self.confidence_sum + other.confidence_sum,
            self.correct_sum + other.correct_sum,
        )


def _fill_bins(confidence: Floats, correct: Booleans, bins: int) -> ReliabilityBins:
    # Borders rounded to the data's own precision: a float32 0.6 belongs to the bin that ends at
    # 0.6, though as a float64 it lies above it.
    borders = (np.arange(1, bins) / bins).astype(confidence.dtype)
    index = np.searchsorted(borders, confidence, side="left")
    return ReliabilityBins(
        np.bincount(index, minlength=bins),
        # Of no rows they are whole numbers, whatever the weights.
        np.asarray(np.bincount(index, weights=confidence, minlength=bins), np.float64),
        np.bincount(index[correct], minlength=bins),
    )


def reliability_bins(confidence: Array, correct: Array, *, bins: int = 15) -> ReliabilityBins:
    """Sort rows into equal-width confidence bins (lo, hi].

    Row i enters bin ``max(ceil(confidence[i] * bins) - 1, 0)``: 1.0 the last, 0.0 the first.

    Args:
        confidence: (N,) tensor or array, in [0, 1].
        correct: (N,) boolean, or 0 and 1.
        bins: the number of bins.

    Returns:
        The bins' counters; all zero if N is 0.

    Raises:
        ValueError: shapes that do not match, confidences outside [0, 1] or NaN, ``correct`` other
            than 0 and 1, ``bins`` below 1.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    bins = _check_bins(bins)
    return _fill_bins(*_confidence_rows(confidence, correct, unit_range=True), bins)


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
    probs, target = _check_pair(probs, target)
    _check_not_empty(probs.size(0))
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
    bins = _check_bins(bins)
    return _fill_bins(*_top1(*_check_pair(probs, target)), bins).expected_calibration_error


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
    confidence, correct = _confidence_rows(confidence, correct, unit_range=False)
    _check_not_empty(len(confidence))
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
    correct = _correct_rows(correct)
    _check_not_empty(len(correct))
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
    return aurc(confidence, correct) - _optimal_aurc(correct)


def _optimal_aurc(correct: Array) -> float:
    return float(optimal_risk_coverage_curve(correct)[1].mean())


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
        probs, target = _check_pair(probs, target)
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
        confidence, correct = _confidence_rows(confidence, correct, unit_range=True)
        nll = _float_rows("nll", nll, len(confidence))
        if not np.all(nll >= 0.0):
            raise ValueError(f"nll: expected values of at least 0, got {nll.min():g}")
        # Copies, because the caller may fill the same buffers with the next batch.
        self._add(confidence.copy(), correct.copy(), float(nll.sum(dtype=np.float64)))

    def _add(self, confidence: Floats, correct: Booleans, nll_sum: float) -> None:
        if len(confidence) == 0:
            return
        self._bins = self._bins + _fill_bins(confidence, correct, len(self._bins.count))
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
        _check_not_empty(self.count)
        correct = self.correct
        area = aurc(self.confidence, correct)
        return {
            "nll": self._nll_sum / self.count,
            "ece": self._bins.expected_calibration_error,
            "aurc": area,
            "e_aurc": area - _optimal_aurc(correct),
            "accuracy": float(correct.mean()),
            "count": self.count,
        }
