"""Confidence in bins: what reliability diagrams and the calibration error are made of.

Shapes: N rows (samples, tokens or boxes), B confidence bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pskd.calibration.inputs import (
    Array,
    Booleans,
    Doubles,
    Floats,
    Integers,
    check_bins,
    check_not_empty,
    confidence_rows,
)

__all__ = ["ReliabilityBins", "bin_index", "fill_bins", "reliability_bins"]


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
        """Return ``bins`` bins without a row.

        Raises:
            ValueError: ``bins`` below 1.
        """
        bins = check_bins(bins)
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
        check_not_empty(total)
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


def bin_index(confidence: Floats, bins: int) -> Integers:
    """Return the bin of each row, (N,) int64 in [0, bins)."""
    # Borders rounded to the data's own precision: a float32 0.6 belongs to the bin that ends at
    # 0.6, though as a float64 it lies above it.
    borders = (np.arange(1, bins) / bins).astype(confidence.dtype)
    return np.searchsorted(borders, confidence, side="left")


def fill_bins(confidence: Floats, correct: Booleans, bins: int) -> ReliabilityBins:
    index = bin_index(confidence, bins)
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
    bins = check_bins(bins)
    return fill_bins(*confidence_rows(confidence, correct, unit_range=True), bins)
