"""The loss as an operator of torch, for whoever traces: ``torch.ops.pskd.cross_entropy``.

Shapes: N rows, C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pskd.checks import check_memory
from pskd.kernels import Rows, RowValues, compute, sum_dtype

__all__ = ["cross_entropy"]

_NAME = "pskd::cross_entropy"

torch.library.define(
    _NAME,
    "(Tensor logits, Tensor target, Tensor? probs, Tensor? teacher_logits, Tensor? indices, "
    "Tensor? alpha_rows, float alpha, int ignore_index, float label_smoothing, str reduction, "
    "bool wants_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl(_NAME, "default")
def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    probs: Tensor | None,
    teacher_logits: Tensor | None,
    indices: Tensor | None,
    alpha_rows: Tensor | None,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    wants_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = alpha if alpha_rows is None else alpha_rows
    rows = Rows(
        logits, target, probs, teacher_logits, indices, weight, ignore_index, label_smoothing
    )
    for name, value in zip(rows._fields, rows, strict=True):
        if isinstance(value, Tensor):  # nobody has looked at what a graph hands on
            check_memory(name, value)
    grad = torch.empty(logits.shape if wants_grad else 0, dtype=logits.dtype, device=logits.device)
    loss, nll, at_label = compute(rows, reduction, grad if wants_grad else None, with_stats=True)
    return loss, nll.clone(), at_label.clone(), grad  # results may not share their memory


def _shapes(
    logits: Tensor, target: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_cross_entropy` does, without values."""
    *_, reduction, wants_grad = others
    nll, at_label = (logits.new_empty(logits.size(0), dtype=sum_dtype(logits)) for _ in range(2))
    loss = nll.new_empty(logits.size(0) if reduction == "none" else ())
    grad = torch.empty(logits.shape if wants_grad else 0, dtype=logits.dtype, device=logits.device)
    return loss, nll, at_label, grad


torch.library.register_fake(_NAME, _shapes)


def cross_entropy(rows: Rows, reduction: str, wants_grad: bool) -> tuple[RowValues, Tensor]:
    """As `pskd.kernels.compute` with statistics, and the gradient, if it is wanted."""
    by_row = isinstance(rows.alpha, Tensor)
    loss, nll, at_label, grad = torch.ops.pskd.cross_entropy(
        *rows[:5],
        rows.alpha if by_row else None,
        0.0 if by_row else rows.alpha,
        rows.ignore_index,
        rows.label_smoothing,
        reduction,
        wants_grad,
    )
    return RowValues(loss, nll, at_label), grad
