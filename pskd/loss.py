"""The PS-KD loss: cross-entropy against a mixture that never exists in memory.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.

One pass makes the loss and, on the way, the gradient on the logits, the only tensor of their size
(`pskd.kernels.chunked` has the arithmetic).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pskd.checks import (
    check_batch,
    check_class_weights,
    check_ignore_index,
    check_listed_once,
    check_weights,
    is_soft,
    is_traced,
)
from pskd.kernels import Records, Rows, gradient_is_of_mean, native, sum_dtype
from pskd.kernels.gradient import scaled, values_and_gradient, values_only
from pskd.kernels.rows import check_values, readable
from pskd.targets import TopK, check_teacher, mixture

__all__ = ["PSKDStats", "computed", "in_one_pass", "loss_and_stats", "pskd_cross_entropy"]

_TINY = torch.finfo(torch.float32).tiny


class PSKDStats(NamedTuple):
    """What the loss learns of each row on its way, for logs; 0 and 1 in ignored rows.

    Attributes:
        nll: (N,) the student's negative log-likelihood of the label in nats, without any softening.
        teacher_probs_at_label: (N,) the past prediction's probability of the label; of rows whose
            alpha is 0 it need not have been looked at.
    """

    nll: Tensor
    teacher_probs_at_label: Tensor


class _CrossEntropy(torch.autograd.Function):
    """The reduced loss, NLL and teacher's probability of the label; leaves the gradient."""

    @staticmethod
    def forward(
        ctx: Any, _logits: Tensor, rows: Rows, reduction: str, with_stats: bool, inplace: bool
    ) -> Any:  # one tensor or three
        values, grad = values_and_gradient(rows, reduction, with_stats=with_stats, inplace=inplace)
        late_mean = reduction == "mean" and not gradient_is_of_mean(rows.logits, reduction)
        ctx.late_mean, ctx.ignore_index = late_mean, rows.ignore_index
        ctx.save_for_backward(grad, rows.target if late_mean else None)
        ctx.set_materialize_grads(False)
        if not with_stats:
            return values.loss
        ctx.mark_non_differentiable(*values[1:])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_stats: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, None
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            # create_graph=True: the saved gradient is a constant to it
            raise RuntimeError("pskd_cross_entropy has no second derivative: expected none asked")
        grad, target = ctx.saved_tensors
        if ctx.late_mean:
            upstream = upstream / (target != ctx.ignore_index).sum().clamp_min(1)
        return scaled(grad, upstream), None, None, None, None


def _check(
    logits: Tensor,
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    teacher_logits: Tensor | None,
    reduction: str,
) -> None:
    check_batch(logits, target)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if teacher_probs is not None and teacher_logits is not None:
        raise ValueError("expected teacher_probs or teacher_logits, got both")
    if isinstance(teacher_logits, TopK):
        raise ValueError("teacher_logits: expected a tensor, got TopK (give it as teacher_probs)")
    check_teacher(teacher_probs if teacher_logits is None else teacher_logits, *logits.shape)


@overload
def pskd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    alpha: float | Tensor,
    *,
    teacher_logits: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: Literal[False] = False,
    inplace: bool = False,
) -> Tensor: ...


@overload
def pskd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    alpha: float | Tensor,
    *,
    teacher_logits: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: Literal[True],
    inplace: bool = False,
) -> tuple[Tensor, PSKDStats]: ...


def pskd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    alpha: float | Tensor,
    *,
    teacher_logits: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, PSKDStats]:
    """Cross-entropy against labels softened by the model's own past prediction.

    Equals ``F.cross_entropy(logits, mix_targets(target, teacher_probs, alpha, ...))`` without the
    mixture; with ``alpha=0`` or without a teacher, ``F.cross_entropy(logits, target)``.

    Args:
        logits: (N, C) float; the student's scores. Half precision is summed in float32.
        target: (N,) integer labels in [0, C), or ``ignore_index``; or (N, C) probabilities, as from
            Mixup, which take the place of the one-hot. Receives no gradient.
        teacher_probs: the past prediction: (N, C) probabilities, `TopK`, or None. Rows are expected
            to sum to 1. Receives no gradient.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row (0 for a row that
            has no past prediction).
        teacher_logits: (N, C) scores in place of ``teacher_probs``, of which they give the softmax.
        weight: (C,) float, how much a row counts by its label, as in torch; not with probabilities
            or label smoothing, which torch weighs class by class.
        ignore_index: label of rows that add neither loss nor gradient nor count; may be a class.
        label_smoothing: eps in [0, 1] on the hard part, torch's: spread over all C classes.
        reduction: ``"none"`` (N,), ``"sum"``, or ``"mean"`` over the rows that are not ignored.
        return_stats: return `PSKDStats` of the rows too; needs a teacher. Where targets are
            probabilities, its likelihoods are those that the target expects.
        inplace: write the gradient over the logits, which are lost: then nothing of their size is
            made. They may not be a leaf, nor kept by what made them (autograd refuses the backward
            pass then). Without effect where no gradient is asked, and under ``torch.compile``.

    Returns:
        The loss in nats, float32 (float64 for float64 logits). Where no row counts, ``"mean"`` is 0
        with a zero gradient, as object detectors need it, and not NaN as in torch. With
        ``return_stats`` a pair of the loss and the statistics, which carry no gradient.

    Raises:
        ValueError: if a weight lies outside [0, 1] or is NaN, a label is out of range (checked on
            the CPU; elsewhere such a row's loss is NaN or an assertion of the device), shapes or
            dtypes disagree, both forms of a teacher are given, or logits cannot be overwritten.
        RuntimeError: if a second or a forward-mode derivative, or a ``torch.func`` transform of it
            is asked.

    Source: Kim et al. 2021, section 3.1; the contract is that of
    `torch.nn.functional.cross_entropy`.
    """
    loss, stats = loss_and_stats(
        logits,
        target,
        teacher_probs,
        alpha,
        teacher_logits=teacher_logits,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        return_stats=return_stats,
        inplace=inplace,
    )
    return loss if stats is None else (loss, stats)


def loss_and_stats(
    logits: Tensor,
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    alpha: float | Tensor,
    *,
    teacher_logits: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
    inplace: bool = False,
    effect: Tensor | None = None,
    records: Records | None = None,
) -> tuple[Tensor, PSKDStats | None]:
    """As `pskd_cross_entropy`, and None in place of statistics that are not wanted.

    Args:
        effect: (5,) float64, to which `pskd.stats.teacher_sums` are added; needs `in_one_pass`.
        records: where the predictions of the rows are kept; needs `in_one_pass`.
    """
    _check(logits, target, teacher_probs, teacher_logits, reduction)
    given = teacher_probs if teacher_logits is None else teacher_logits
    alpha = _weights(alpha, label_smoothing, logits)
    if given is None:
        alpha = 0.0
    if return_stats and given is None:
        raise ValueError("return_stats: expected a teacher, got none")
    indices = None
    if isinstance(teacher_probs, TopK):
        indices, teacher_probs = teacher_probs
    rows = Rows(
        logits.detach(),
        # As int64: an unsigned label would never equal a negative ignore_index.
        target.detach() if is_soft(target) else target.long(),
        _constant(teacher_probs),
        _constant(teacher_logits),
        indices,
        alpha.detach() if isinstance(alpha, Tensor) else alpha,
        check_ignore_index(ignore_index),
        float(label_smoothing),
        records=records,
        effect=effect,
    )
    if weight is not None:
        check_class_weights(weight, logits, target, label_smoothing)
        loss, stats = computed(logits, rows, "none", return_stats, inplace)
        loss = _weighted(loss, rows, weight, reduction)
    elif is_soft(target):
        rows = _checked_values(rows)
        past = rows.past()
        stats = None
        if return_stats and past is not None:
            stats = _expected_stats(rows, past)  # before logits are written over
        loss, _ = computed(logits, _mixed(rows, past), reduction, False, inplace)
    else:
        loss, stats = computed(logits, rows, reduction, return_stats, inplace)
    return loss, stats


def in_one_pass(
    logits: Tensor, target: Tensor, teacher: Tensor | TopK | None, weight: Tensor | None = None
) -> bool:
    """Return whether the compiled loss computes these, which sums and keeps what else is asked.

    Args:
        logits, target, weight: as of `pskd_cross_entropy`.
        teacher: probabilities or logits.
    """
    if weight is not None or is_soft(target) or is_traced(logits):
        return False
    probs = teacher.probs if isinstance(teacher, TopK) else teacher
    return native.serves(Rows(logits, target, probs, None, None, 0.0, 0, 0.0))


def computed(
    logits: Tensor, rows: Rows, reduction: str, with_stats: bool, inplace: bool
) -> tuple[Tensor, PSKDStats | None]:
    """Return the reduced loss and, if they are wanted, the statistics."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "pskd_cross_entropy: expected plain autograd, got a torch.func transform"
        )
    if (torch.is_grad_enabled() and logits.requires_grad) or forward_ad._current_level >= 0:
        if inplace:
            _check_overwritable(logits)
        made = _CrossEntropy.apply(logits, rows, reduction, with_stats, inplace)
        loss, *stats = made if with_stats else (made,)
    else:
        loss, *stats = values_only(rows, reduction, with_stats=with_stats)
    return loss, PSKDStats(*stats) if with_stats else None


def _weighted(loss: Tensor, rows: Rows, weight: Tensor, reduction: str) -> Tensor:
    """Return the (N,) loss times its label's weight, reduced as torch does."""
    counts = rows.target != rows.ignore_index
    weight = weight.detach().to(loss)[torch.where(counts, rows.target, 0)] * counts
    if reduction == "none":
        return loss * weight
    total = (loss * weight).sum()
    return total if reduction == "sum" else total / weight.sum().clamp_min(_TINY)


def _checked_values(rows: Rows) -> Rows:
    """Look at what the kernels look at, of rows whose targets are probabilities."""
    if is_traced(rows.logits):
        return rows
    rows = readable(rows)
    check_values(rows)
    if rows.indices is not None:
        check_listed_once("teacher_probs", rows.indices, rows.alpha)
    return rows


def _mixed(rows: Rows, past: Tensor | None) -> Rows:
    """Return rows whose targets are probabilities in the form of a teacher without labels."""
    mixed = mixture(rows.target, past, rows.alpha, rows.logits.size(1), rows.label_smoothing)
    no_label = rows.target.new_zeros(len(rows.target), dtype=torch.int64)
    return Rows(rows.logits, no_label, mixed, None, None, 1.0, -100, 0.0)


def _expected_stats(rows: Rows, past: Tensor) -> PSKDStats:
    """Return the statistics of targets that are probabilities: what they expect of each."""
    target = rows.target.to(sum_dtype(rows.logits))
    lprobs = rows.logits.to(target.dtype).log_softmax(dim=1)
    nll = -torch.where(target == 0, 0.0, target * lprobs).sum(dim=1)
    return PSKDStats(nll, (target * past).sum(dim=1))


def _constant(teacher: Tensor | None) -> Tensor | None:
    return None if teacher is None else teacher.detach()


def _weights(alpha: float | Tensor, label_smoothing: float, logits: Tensor) -> float | Tensor:
    if isinstance(alpha, Tensor) and alpha.dim() == 0 and is_traced(alpha):
        return alpha.expand(logits.size(0))  # a number would have to be waited for
    return check_weights(alpha, label_smoothing, logits.size(0))


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "inplace: expected logits that were computed, got a leaf, whose value stays"
        )
    if torch.compiler.is_compiling():  # then nothing is written over
        return
    if logits._base is not None and logits._base.is_leaf:
        raise ValueError("inplace: expected logits that were computed, got a view of a leaf")
    if logits.is_neg():
        raise ValueError("inplace: expected plain logits, got ones that are lazily negated")
    rows, classes = logits.shape
    if (classes > 1 and logits.stride(1) != 1) or (rows > 1 and logits.stride(0) < classes):
        raise ValueError(
            f"inplace: expected rows that lie side by side, got strides {logits.stride()} of shape "
            f"{tuple(logits.shape)}"
        )
