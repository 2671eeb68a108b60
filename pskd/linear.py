"""The PS-KD loss from hidden states: the logits of student and teacher never exist whole.

Shapes: N rows (tokens), C classes (types of a vocabulary), H hidden units of the student, k kept
classes of a prediction.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from pskd.checks import check_ignore_index, check_label_form, check_tensors, check_weights
from pskd.kernels.linear_chunks import (
    LinearCrossEntropy,
    LinearStats,
    LinearTeacher,
    Problem,
    Teacher,
    by_chunks,
)
from pskd.targets import TopK, check_teacher

__all__ = ["LinearStats", "LinearTeacher", "pskd_linear_cross_entropy"]


@overload
def pskd_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: Teacher,
    alpha: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    stats_top_k: int,
) -> tuple[Tensor, LinearStats]: ...


@overload
def pskd_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: Teacher,
    alpha: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    stats_top_k: Literal[0] = 0,
) -> Tensor: ...


def pskd_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: Teacher,
    alpha: float | Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    stats_top_k: int = 0,
) -> Tensor | tuple[Tensor, LinearStats]:
    """`pskd.pskd_cross_entropy` of ``hidden @ weight.T + bias``, which never exists whole.

    Equals ``pskd_cross_entropy(F.linear(hidden, weight, bias), target, teacher, alpha, ...)``, with
    memory for some rows of logits instead of all, of student and teacher. The gradients on hidden
    states, weight and bias are made in the forward pass.

    Args:
        hidden: (N, H) float; the student's last hidden states.
        weight: (C, H) float; the output embedding, as of `torch.nn.Linear`.
        target: (N,) integer labels in [0, C), or ``ignore_index``; probabilities are not served.
        teacher: the past prediction: `LinearTeacher`, `TopK`, (N, C) probabilities, or None.
            Receives no gradient.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row.
        bias: (C,) float, or None.
        ignore_index: label of rows that add neither loss nor gradient nor count.
        label_smoothing: eps in [0, 1] on the hard part, torch's: spread over all C classes.
        reduction: ``"sum"``, or ``"mean"`` over the rows that are not ignored.
        stats_top_k: if above 0, return `LinearStats` too, with so many of the student's classes.

    Returns:
        The loss in nats, float32 (float64 for float64 logits); with ``stats_top_k`` a pair of the
        loss and the statistics, which carry no gradient.

    Raises:
        ValueError: as `pskd.pskd_cross_entropy`, and for a reduction that keeps the rows.
        RuntimeError: if a second derivative is asked.

    Source: the chunked form is that of Liger-Kernel's and ml-cross-entropy's fused linear losses;
    the loss is Kim et al. 2021, section 3.1.
    """
    _check(hidden, weight, bias, target, teacher, reduction, stats_top_k)
    alpha = check_weights(alpha, label_smoothing, len(hidden))
    if teacher is None:
        alpha = 0.0
    ignore_index = check_ignore_index(ignore_index)
    target = target.long()  # an unsigned one may equal a negative ignore_index
    problem = Problem(
        target, _constant(teacher), alpha, ignore_index, float(label_smoothing), stats_top_k
    )
    tensors = (hidden, weight, bias)
    loss: Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        loss, *stats = LinearCrossEntropy.apply(*tensors, problem)
    else:
        loss, stats = by_chunks(*tensors, problem, None)
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum().clamp_min(1)
    if not stats_top_k:
        return loss
    nll, at_label, indices, probs, preferred = stats
    return loss, LinearStats(nll, at_label, TopK(indices, probs), preferred)


def _constant(teacher: Teacher) -> Teacher:
    if teacher is None or isinstance(teacher, Tensor):
        return None if teacher is None else teacher.detach()
    if isinstance(teacher, TopK):
        return TopK(teacher.indices, teacher.probs.detach())
    hidden, weight, bias = teacher
    return LinearTeacher(hidden.detach(), weight.detach(), None if bias is None else bias.detach())


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    teacher: Teacher,
    reduction: str,
    stats_top_k: int,
) -> None:
    check_tensors(target=target)
    _check_linear("", hidden, weight, bias)
    rows, classes = len(hidden), len(weight)
    if target.dim() == 1 and len(target) != rows:
        raise ValueError(f"target: expected {rows} labels, got {len(target)}")
    if isinstance(teacher, LinearTeacher):
        _check_linear("teacher.", *teacher)
        if (len(teacher.hidden), len(teacher.weight)) != (rows, classes):
            raise ValueError(
                f"teacher: expected {rows} hidden states and {classes} classes, got "
                f"{len(teacher.hidden)} and {len(teacher.weight)}"
            )
    check_label_form(target)
    check_teacher(None if isinstance(teacher, LinearTeacher) else teacher, rows, classes)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if not 0 <= stats_top_k <= classes:
        raise ValueError(f"stats_top_k: expected 0 to {classes}, got {stats_top_k}")


def _check_linear(owner: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in ((f"{owner}hidden", hidden), (f"{owner}weight", weight)):
        check_tensors(**{name: tensor})
        if tensor.dim() != 2 or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a floating-point matrix, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    if bias is None:
        return
    check_tensors(**{f"{owner}bias": bias})
    if tuple(bias.shape) != (len(weight),):
        raise ValueError(f"{owner}bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")
