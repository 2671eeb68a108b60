"""What the metrics are given, checked and brought into one form.

What cannot be is a ValueError that names the argument, what was expected and what came.

Shapes: N rows (samples, tokens or boxes), C classes.
"""

from __future__ import annotations

import operator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pskd.checks import check_tensors, check_unit_range, rounding

Array = Tensor | np.ndarray
Booleans = NDArray[np.bool_]
Floats = NDArray[np.floating]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

# A float16 or bfloat16 softmax sums to 1 within half a unit in the last place (up to 0.002), plus,
# over a large vocabulary, what its smallest entries lost. Logits and log-probabilities lie far off.
_ROW_SUM_TOLERANCE = 0.01


def as_tensor(name: str, values: Array) -> Tensor:
    """Return ``values`` as a detached tensor of real numbers, on the device where they are."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: expected real numbers, got dtype {array.dtype}")
        native = np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
        values = torch.from_numpy(np.require(array, native, ["C", "W"]))
    if values.is_complex():
        raise ValueError(f"{name}: expected real numbers, got dtype {values.dtype}")
    check_tensors(**{name: values})
    return values.detach().resolve_neg()  # numpy takes none that is lazily negated


def check_vector(name: str, values: Tensor, rows: int | None = None) -> None:
    if values.dim() != 1 or rows not in (None, values.size(0)):
        expected = "(N,)" if rows is None else f"({rows},)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(values.shape)}")


def float_rows(name: str, values: Array, rows: int | None = None) -> Floats:
    """Return a vector in the precision that is computed in: float64 kept, halves to float32."""
    values = as_tensor(name, values)
    check_vector(name, values, rows)
    # First to the CPU: not every device has float64.
    values = values.cpu()
    exact = torch.promote_types(values.dtype, torch.float32)
    return values.to(exact if values.is_floating_point() else torch.float64).numpy()


def check_not_empty(count: int) -> None:
    if count == 0:
        raise ValueError(
            "expected at least one example, got none: a metric of zero examples is undefined"
        )


def check_bins(bins: int) -> int:
    try:
        number = operator.index(bins)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"bins: expected an integer of at least 1, got {bins!r}")
    return number


def check_probs(probs: Tensor) -> None:
    """Refuse what is no table of distributions, with one read-back from the device.

    Values may exceed [0, 1] by the rounding of their dtype.
    """
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
    check_unit_range("probs", low, high, rounding(probs.dtype))
    if abs(worst - 1.0) > _ROW_SUM_TOLERANCE:
        raise ValueError(f"probs: expected rows that sum to 1, got a row that sums to {worst:g}")


def _rounding_of(name: str, values: Array) -> float:
    """Return the `rounding` of the dtype that values come in."""
    dtype = as_tensor(name, values).dtype
    return rounding(dtype if dtype.is_floating_point else torch.float64)


def check_target(target: Tensor, rows: int, classes: int) -> Tensor:
    """Return the labels as int64, or refuse them."""
    check_vector("target", target, rows)
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


def check_pair(probs: Array, target: Array) -> tuple[Tensor, Tensor]:
    """Return probabilities (N, C) and int64 labels (N,) on the device of the probabilities."""
    probs = as_tensor("probs", probs)
    check_probs(probs)
    target = as_tensor("target", target).to(probs.device)
    return probs, check_target(target, probs.size(0), probs.size(1))


def confidence_rows(
    confidence: Array, correct: Array, *, unit_range: bool
) -> tuple[Floats, Booleans]:
    """Return a confidence (N,) float and a correct (N,) bool array, checked.

    With ``unit_range`` what rounding left outside [0, 1] is brought back.
    """
    tolerance = _rounding_of("confidence", confidence)
    confidence = float_rows("confidence", confidence)
    correct = correct_rows(correct, len(confidence))
    if np.isnan(confidence).any():
        raise ValueError("confidence: expected numbers, got NaN")
    if unit_range and len(confidence):
        low, high = float(confidence.min()), float(confidence.max())
        check_unit_range("confidence", low, high, tolerance)
        confidence = confidence.clip(0.0, 1.0)
    return confidence, correct


def nll_rows(nll: Array, rows: int) -> Floats:
    """Return a negative log-likelihood (N,) of at least 0; of a probability above 1, 0."""
    tolerance, values = _rounding_of("nll", nll), float_rows("nll", nll, rows)
    if len(values) and not values.min() >= -tolerance:  # also true of NaN
        raise ValueError(f"nll: expected values of at least 0, got {values.min():.9g}")
    return values.clip(0.0)


def correct_rows(correct: Array, rows: int | None = None, name: str = "correct") -> Booleans:
    correct = as_tensor(name, correct)
    check_vector(name, correct, rows)
    if correct.dtype != torch.bool:
        strange = correct[(correct != 0) & (correct != 1)]
        if strange.numel():
            raise ValueError(f"{name}: expected booleans or 0 and 1, got {strange[0].item()!r}")
    return correct.bool().cpu().numpy()
