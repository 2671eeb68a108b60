"""Temperature scaling: the one number, fitted after training, that PS-KD is compared with.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pskd.calibration.inputs import Array, as_tensor, check_not_empty, check_target

__all__ = ["HIGHEST_TEMPERATURE", "LOWEST_TEMPERATURE", "fit_temperature"]

#: What `fit_temperature` returns lies between these: the best temperature of rows that are all
#: correct is 0, and that of rows worse than chance infinite.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0

_MOST_STEPS = 100
_PRECISION = 1e-10

# Rows are widened to float64 a piece at a time: 32 MiB, however many there are.
_PIECE = 1 << 22


def fit_temperature(logits: Array, target: Array) -> float:
    """Find the temperature at which the softmax is least surprised by the labels.

    Equals the minimum over ``temperature`` of ``cross_entropy(logits / temperature, target)``,
    in float64. Dividing by it leaves each row's order, so accuracy and risk at full coverage stay
    as they are. Fit it on rows that are neither trained on nor reported.

    Args:
        logits: (N, C) float tensor or array, finite; log-probabilities serve as well.
        target: (N,) integer labels in [0, C).

    Returns:
        The temperature, in [0.01, 100]; 1.0 if no temperature changes anything, because each row's
        logits are all equal.

    Raises:
        ValueError: shapes that do not match, logits that are no floating-point numbers or not
            finite, labels that are no integers or out of range, no row at all.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.
    """
    logits = _check_logits(logits)
    target = check_target(as_tensor("target", target).cpu(), *logits.shape)
    pieces = _pieces(logits, target)
    low, high = 1.0 / HIGHEST_TEMPERATURE, 1.0 / LOWEST_TEMPERATURE
    if bool((logits.amax(dim=1) == logits.amin(dim=1)).all()):
        return 1.0
    # The mean NLL is convex in 1 / temperature: at most one root of its slope, or an end.
    if _derivatives(pieces, high)[0] <= 0.0:
        return LOWEST_TEMPERATURE
    if _derivatives(pieces, low)[0] >= 0.0:
        return HIGHEST_TEMPERATURE
    return 1.0 / _root(pieces, low, high)


def _check_logits(logits: Array) -> Tensor:
    logits = as_tensor("logits", logits).cpu()
    if logits.dim() != 2 or logits.size(1) == 0:
        raise ValueError(f"logits: expected shape (N, C) with C >= 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits: expected a floating-point dtype, got {logits.dtype}")
    check_not_empty(logits.size(0))
    low, high = logits.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):  # also true of NaN
        raise ValueError(
            f"logits: expected finite values, got values in [{low.item():g}, {high.item():g}]"
        )
    return logits


def _pieces(logits: Tensor, target: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    rows = max(_PIECE // logits.size(1), 1)
    return list(zip(logits.split(rows), target.split(rows), strict=True))


def _derivatives(pieces: Sequence[tuple[Tensor, Tensor]], inverse: float) -> tuple[float, float]:
    """Return the slope and the curvature of the summed NLL in 1 / temperature.

    They are the rows' ``mean(z) - z[y]`` and ``variance(z)`` under softmax(inverse * z).
    """
    slope = curvature = 0.0
    for logits, target in pieces:
        logits = logits.double()
        logits = logits - logits.amax(dim=1, keepdim=True)
        probs = torch.softmax(inverse * logits, dim=1)
        mean = (probs * logits).sum(dim=1, keepdim=True)
        slope += float((mean - logits.gather(1, target[:, None])).sum())
        curvature += float((probs * (logits - mean).square()).sum())
    return slope, curvature


def _root(pieces: Sequence[tuple[Tensor, Tensor]], low: float, high: float) -> float:
    """Return where the slope, which rises from below 0 to above 0, is 0: Newton, kept inside."""
    inverse = math.sqrt(low * high)
    for _ in range(_MOST_STEPS):
        slope, curvature = _derivatives(pieces, inverse)
        low, high = (low, inverse) if slope > 0.0 else (inverse, high)
        before = inverse
        inverse = before - slope / curvature if curvature > 0.0 else math.inf
        if not low <= inverse <= high:
            inverse = math.sqrt(low * high)
        if abs(inverse - before) <= _PRECISION * before:
            break
    return inverse
