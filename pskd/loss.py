"""The PS-KD loss: cross-entropy against a mixture that never exists in memory.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.

With z the logits, y the label, p the teacher's distribution, eps the label smoothing and
``hard = (1 - eps) * one_hot(y) + eps / C``, the loss of a row is

    -(1 - alpha) * <hard, log_softmax(z)> - alpha * <p, log_softmax(z)>

and its gradient on z ``mass * softmax(z) - (1 - alpha) * hard - alpha * p`` with
``mass = 1 - alpha + alpha * sum(p)``: neither a one-hot nor a mixture is built, and the gradient,
made on the way, is the only tensor of the logits' size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pskd.targets import TopK, check_rows, check_weights

__all__ = ["PSKDStats", "gradient_rescaling", "pskd_cross_entropy"]

# Rows are worked on in chunks of about this many logits (2 MiB of float32): the passes over a chunk
# find it in cache, and temporaries are small and reused where one of the logits' size would be
# mapped anew, page by page, in every step.
_CHUNK_ELEMENTS = 1 << 19


class PSKDStats(NamedTuple):
    """What the loss learns of each row on its way, for logs; 0 and 1 in ignored rows.

    Attributes:
        nll: (N,) the student's negative log-likelihood of the label in nats, without any softening.
        teacher_probs_at_label: (N,) the past prediction's probability of the label.
    """

    nll: Tensor
    teacher_probs_at_label: Tensor


class _Past(NamedTuple):
    """A past prediction in one of its three forms: probabilities, logits, or the k largest."""

    probs: Tensor | None
    logits: Tensor | None
    top_k: TopK | None

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor | TopK:
        """Return the distribution of some rows, dense or sparse."""
        if self.top_k is not None:
            indices, probs = self.top_k
            return TopK(indices[part].long(), probs[part].to(dtype))
        if self.logits is not None:
            return self.logits[part].to(dtype).softmax(dim=1)
        return self.probs[part].to(dtype)

    def mass(self, p: Tensor | TopK, classes: int) -> Tensor | float:
        """Return ``sum(p)`` a row: what is given as probabilities may sum to a little off 1."""
        if self.logits is not None:
            return 1.0
        if self.probs is not None:
            return p.sum(dim=1)
        return p.probs.sum(dim=1) + p.tail(classes) * (classes - p.indices.size(1))


def _expectation(p: Tensor | TopK, lprobs: Tensor) -> Tensor:
    """Return ``<p, lprobs>`` a row; of a sparse p from its classes and the sum over all."""
    if isinstance(p, Tensor):
        return (p * lprobs).sum(dim=1)  # a dot product would be of half precision under autocast
    listed = lprobs.gather(1, p.indices)
    rest = lprobs.sum(dim=1) - listed.sum(dim=1)
    return (p.probs * listed).sum(dim=1) + p.tail(lprobs.size(1)) * rest


def _at_label(p: Tensor | TopK, label: Tensor, classes: int) -> Tensor:
    """Return ``p[y]`` a row; ``label`` is (n, 1)."""
    if isinstance(p, Tensor):
        return p.gather(1, label).squeeze(1)
    hit = p.indices == label
    return torch.where(hit.any(dim=1), (p.probs * hit).sum(dim=1), p.tail(classes))


def _subtract(grad: Tensor, p: Tensor | TopK, weight: Tensor) -> None:
    """Subtract ``weight * p`` from ``grad`` in place; ``weight`` is (n, 1)."""
    if isinstance(p, Tensor):
        grad.addcmul_(p, weight, value=-1.0)
        return
    tail = p.tail(grad.size(1))[:, None]
    grad.sub_(weight * tail)
    grad.scatter_add_(1, p.indices, weight * (tail - p.probs))


class _PSKDCrossEntropy(torch.autograd.Function):
    """Loss, NLL and teacher's probability of the label a row; leaves the gradient on the way."""

    @staticmethod
    def forward(ctx, logits, target, valid, alpha, smoothing: float, past: _Past):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        classes = logits.size(1)
        loss = logits.new_empty(logits.size(0), dtype=dtype)
        nll, teacher_at_label = torch.empty_like(loss), torch.empty_like(loss)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK_ELEMENTS // max(1, classes))
        for start in range(0, logits.size(0), step):
            part = slice(start, start + step)
            label, weight = target[part, None], alpha[part]
            p = past.rows(part, dtype)
            # Log-probabilities: with large logits the terms of the loss would cancel otherwise.
            lprobs = logits[part].to(dtype).log_softmax(dim=1)
            teacher_at_label[part] = _at_label(p, label, classes)
            student_at_label = lprobs.gather(1, label).squeeze(1)
            hard = student_at_label
            if smoothing:
                hard = (1.0 - smoothing) * hard + smoothing * lprobs.mean(dim=1)
            nll[part] = -student_at_label
            loss[part] = (weight - 1.0) * hard - weight * _expectation(p, lprobs)
            if grad is None:
                continue
            g = torch.exp(lprobs, out=grad[part] if grad.dtype == dtype else lprobs)
            g.mul_((1.0 - weight + weight * past.mass(p, classes))[:, None])
            _subtract(g, p, weight[:, None])
            if smoothing:
                g.add_((weight[:, None] - 1.0) * (smoothing / classes))
            g.scatter_add_(1, label, (weight[:, None] - 1.0) * (1.0 - smoothing))
            if _may_be_ignored(valid[part]):
                # Such a row may hold anything, NaN included: filled, not multiplied by 0.
                g.masked_fill_(~valid[part, None], 0.0)
            if grad.dtype != dtype:
                grad[part] = g
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, teacher_at_label)
        invalid = ~valid
        return (
            loss.masked_fill_(invalid, 0.0),
            nll.masked_fill_(invalid, 0.0),
            teacher_at_label.masked_fill_(invalid, 1.0),
        )

    @staticmethod
    def backward(ctx, grad_loss, _grad_nll, _grad_teacher):
        if torch.is_grad_enabled():  # create_graph=True: the saved gradient is a constant to it
            raise RuntimeError("pskd_cross_entropy has no second derivative: expected none asked")
        (grad,) = ctx.saved_tensors
        if grad_loss.device.type == "cpu" and bool((grad_loss == 1.0).all()):
            return grad, None, None, None, None, None  # the usual case of a sum: nothing to scale
        scaled = torch.empty_like(grad)
        # The product is made in the precision of the loss: a loss scale can exceed float16.
        torch.mul(grad, grad_loss[:, None], out=scaled)
        return scaled, None, None, None, None, None


def _may_be_ignored(valid: Tensor) -> bool:
    # Only the CPU can tell without waiting for the device.
    return valid.device.type != "cpu" or not bool(valid.all())


def _check(logits: Tensor, teacher_probs, teacher_logits, reduction: str) -> None:
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits: expected a floating-point tensor of shape (N, C), got {logits.dtype} of "
            f"shape {tuple(logits.shape)}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    if teacher_probs is not None and teacher_logits is not None:
        raise ValueError("expected teacher_probs or teacher_logits, got both")
    if isinstance(teacher_logits, TopK):
        raise ValueError("teacher_logits: expected a tensor, got TopK (give it as teacher_probs)")


def pskd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    alpha: float | Tensor,
    *,
    teacher_logits: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PSKDStats]:
    """Cross-entropy against labels softened by the model's own past prediction.

    Equals ``F.cross_entropy(logits, mix_targets(target, teacher_probs, alpha, ...))`` without the
    mixture; with ``alpha=0`` or without a teacher, ``F.cross_entropy(logits, target)``.

    Args:
        logits: (N, C) float; the student's scores. Half precision is summed in float32.
        target: (N,) integer labels in [0, C), or ``ignore_index``.
        teacher_probs: the past prediction: (N, C) probabilities, `TopK`, or None. Rows are expected
            to sum to 1. Receives no gradient.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row (0 for a row that
            has no past prediction).
        teacher_logits: (N, C) scores in place of ``teacher_probs``, of which they give the softmax.
        ignore_index: label of rows that add neither loss nor gradient nor count; may be a class.
        label_smoothing: eps in [0, 1] on the hard part, torch's: spread over all C classes.
        reduction: ``"none"`` (N,), ``"sum"``, or ``"mean"`` over the rows that are not ignored.
        return_stats: return `PSKDStats` of the rows too; needs a teacher.

    Returns:
        The loss in nats, float32 (float64 for float64 logits). Where no row counts, ``"mean"`` is 0
        with a zero gradient, as object detectors need it, and not NaN as in torch. With
        ``return_stats`` a pair of the loss and the statistics, which carry no gradient.

    Raises:
        ValueError: if a weight lies outside [0, 1] or is NaN, a label is out of range (checked on
            the CPU), shapes or dtypes disagree, or both forms of a teacher are given.

    Source: Kim et al. 2021, section 3.1; the contract is that of
    `torch.nn.functional.cross_entropy`.
    """
    _check(logits, teacher_probs, teacher_logits, reduction)
    given = teacher_probs if teacher_logits is None else teacher_logits
    if target.dim() == 1 and target.size(0) != logits.size(0):
        raise ValueError(f"target: expected {logits.size(0)} labels, got {target.size(0)}")
    check_rows(target, logits.size(1), given, ignore_index)
    alpha = check_weights(alpha, label_smoothing, logits.size(0))
    target = target.long()  # an unsigned label would never equal a negative ignore_index
    if return_stats and given is None:
        raise ValueError("return_stats: expected a teacher, got none")
    valid = target != ignore_index

    stats = None
    if given is None or (not return_stats and not isinstance(alpha, Tensor) and alpha == 0.0):
        loss = _hard_cross_entropy(logits, target, ignore_index, label_smoothing)
    else:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss, *rows = _PSKDCrossEntropy.apply(
            logits if torch.is_grad_enabled() else logits.detach(),  # no gradient is made then
            torch.where(valid, target, 0),
            valid,
            torch.as_tensor(alpha, dtype=dtype, device=logits.device).expand(logits.size(0)),
            float(label_smoothing),
            _as_past(teacher_probs, teacher_logits),
        )
        stats = PSKDStats(*rows)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / valid.sum().clamp_min(1)
    return (loss, stats) if return_stats else loss


def _hard_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    # Half precision is raised first, so that the sum over classes is one of float32.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        # torch multiplies an ignored row's gradient by 0, and NaN stays NaN.
        logits.masked_fill((target == ignore_index)[:, None], 0.0),
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )


def _as_past(teacher_probs: Tensor | TopK | None, teacher_logits: Tensor | None) -> _Past:
    if isinstance(teacher_probs, TopK):
        sparse = TopK(teacher_probs.indices, teacher_probs.probs.detach())
        return _Past(None, None, sparse)
    if teacher_probs is not None:
        return _Past(teacher_probs.detach(), None, None)
    return _Past(None, teacher_logits.detach(), None)


def gradient_rescaling(
    student_probs_at_label: Tensor, teacher_probs_at_label: Tensor, alpha: float | Tensor
) -> Tensor:
    """The factor by which PS-KD rescales each row's gradient on the label's logit.

    Equals ``1 - alpha * (1 - p_teacher[y]) / (1 - p_student[y])``: below 1 where the model used to
    be unsure of the label, near 1 where the past prediction was already right. A row on which the
    student is certain has no gradient to rescale and gets the limit for an equal teacher,
    ``1 - alpha``, if the teacher is certain too, else ``-inf``.

    Args:
        student_probs_at_label: (N,) the student's probability of the label now.
        teacher_probs_at_label: (N,) the past prediction's probability of the label.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row.

    Returns:
        (N,) factors, unitless, at most 1; float32, or float64 for float64 input.

    Raises:
        ValueError: if a weight lies outside [0, 1] or shapes disagree.

    Source: Kim et al. 2021, section 3.2 (hard example mining).
    """
    if student_probs_at_label.shape != teacher_probs_at_label.shape:
        raise ValueError(
            f"teacher_probs_at_label: expected shape {tuple(student_probs_at_label.shape)}, got "
            f"{tuple(teacher_probs_at_label.shape)}"
        )
    alpha = check_weights(alpha, 0.0, student_probs_at_label.numel())
    if student_probs_at_label.dtype != torch.float64:
        student_probs_at_label = student_probs_at_label.float()
    student_error = 1.0 - student_probs_at_label
    teacher_error = 1.0 - teacher_probs_at_label.to(student_error.dtype)
    both_certain = (student_error == 0) & (teacher_error == 0)
    ratio = torch.where(both_certain, 1.0, teacher_error / student_error)
    weight = torch.as_tensor(alpha, dtype=ratio.dtype, device=ratio.device)
    return torch.where(weight == 0, 1.0, 1.0 - weight * ratio)  # not NaN from 0 * inf
