"""Where the loss is computed: compiled C++ (CPU), Triton (CUDA), or torch's operators (anywhere).

Shapes: N rows, C classes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pskd.kernels import native
from pskd.kernels.chunked import torch_rows
from pskd.kernels.rows import Records, Rows, RowValues, readable, sum_dtype

__all__ = [
    "Records",
    "RowValues",
    "Rows",
    "backend_of",
    "compute",
    "gradient_is_of_mean",
    "has_triton",
    "sum_dtype",
]


def backend_of(rows: Rows) -> str:
    """Return what computes these rows: ``"native"``, ``"triton"`` or ``"torch"``."""
    if native.serves(rows):
        return "native"
    if rows.logits.is_cuda and rows.logits.dtype != torch.float64 and has_triton():
        return "triton"
    return "torch"


@cache
def has_triton() -> bool:
    """Return whether Triton can be imported; asked for on a GPU only."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def gradient_is_of_mean(logits: Tensor, reduction: str) -> bool:
    """Return whether `compute` divides the gradient by the number of rows.

    Of half precision it does not: what a loss scale is there to save would be lost before it comes.
    """
    return reduction == "mean" and logits.dtype == sum_dtype(logits)


def compute(rows: Rows, reduction: str, grad: Tensor | None, with_stats: bool) -> RowValues:
    """Return the values of each row, with the loss reduced.

    Args:
        rows: what is computed.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the rows that are not ignored.
        grad: (N, C) as the logits, which it may be; is given the gradient of the sum, or of the
            mean where `gradient_is_of_mean`. None: not wanted.
        with_stats: whether more than the loss is wanted; without, the others may be empty.

    Raises:
        ValueError: if tensors are on several devices; on the CPU, if a label, a class of a sparse
            prediction or an alpha is out of range; nothing has been written then.
    """
    rows = readable(rows)
    of_mean = gradient_is_of_mean(rows.logits, reduction)
    if native.serves(rows):
        return native.native_rows(rows, reduction, grad, of_mean=of_mean, with_stats=with_stats)
    assert rows.records is None, "the compiled form alone reads and writes records"
    return _by_rows(rows, reduction, grad, of_mean)


def _by_rows(rows: Rows, reduction: str, grad: Tensor | None, of_mean: bool) -> RowValues:
    share = None
    if reduction == "mean":
        count = (rows.target != rows.ignore_index).sum().clamp_min(1)
        share = count.to(sum_dtype(rows.logits)).reciprocal()
    scale = share if of_mean and share is not None else 1.0
    if backend_of(rows) == "triton":
        from pskd.kernels.triton_rows import triton_rows as some_rows
    else:
        some_rows = torch_rows
    values = some_rows(rows, scale, grad)
    if reduction == "none":
        return values
    loss = values.loss.sum()
    return values._replace(loss=loss if share is None else loss * share)
