"""The gradient that the loss leaves on its way: made, traced, and scaled by what comes from above.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pskd.checks import is_traced
from pskd.kernels import Rows, RowValues, compute, has_triton

__all__ = ["scaled", "values_and_gradient", "values_only"]

_CHUNK_ELEMENTS = 1 << 16  # of half precision, so many are converted at a time


def values_and_gradient(
    rows: Rows, reduction: str, *, with_stats: bool, inplace: bool
) -> tuple[RowValues, Tensor]:
    """Return what `pskd.kernels.compute` does, and the gradient; over the logits if ``inplace``."""
    logits = rows.logits
    if is_traced(logits):
        return _traced(rows, reduction, wants_grad=True)
    grad = logits
    if not inplace:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    values = compute(rows, reduction, grad, with_stats)
    if inplace:
        torch.autograd.graph.increment_version(logits)  # shared with what they are detached from
    return values, grad


def values_only(rows: Rows, reduction: str, *, with_stats: bool) -> RowValues:
    """Return what `pskd.kernels.compute` does."""
    if is_traced(rows.logits):
        return _traced(rows, reduction, wants_grad=False)[0]
    return compute(rows, reduction, None, with_stats)


def _traced(rows: Rows, reduction: str, wants_grad: bool) -> tuple[RowValues, Tensor]:
    from pskd.kernels.operator import cross_entropy  # registered when it is first needed

    return cross_entropy(rows, reduction, wants_grad)


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor * grad``, written over the gradient where nobody asks for it again.

    The product is made in the precision of the factor, which is one number or (N,): a loss scale
    can exceed float16.
    """
    if factor.is_cpu and factor.dim() == 0 and not is_traced(grad) and factor.item() == 1.0:
        return grad  # the usual case: nothing to scale
    matrix = grad if grad.dim() == 2 else grad[:, None]
    factor = factor.reshape(-1, 1)
    if is_traced(grad):
        return (matrix * factor).to(grad.dtype).view_as(grad)
    # Only a graph that is kept is asked for the saved gradient again.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if not grad.is_cpu:
        return _scaled_on_device(matrix.clone() if kept else matrix, factor).view_as(grad)
    product = torch.empty_like(matrix) if kept else matrix
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.size(1)))
    parts = (part.split(step) for part in (matrix, factor.expand(len(matrix), 1), product))
    for part, by, out in zip(*parts, strict=True):
        torch.mul(part, by, out=out)  # by rows: half precision is converted on the way
    return product.view_as(grad)


def _scaled_on_device(matrix: Tensor, factor: Tensor) -> Tensor:
    if not (matrix.is_cuda and has_triton()):
        return torch.mul(matrix, factor, out=matrix)
    from pskd.kernels.triton_rows import triton_scale

    triton_scale(matrix, factor)
    return matrix
