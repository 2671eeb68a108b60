"""The PS-KD loss: cross-entropy against a mixture that never exists in memory.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.

With z the logits, y the label, p the teacher's distribution, eps the label smoothing and
``hard = (1 - eps) * one_hot(y) + eps / C``, the loss of a row is

    lse(z) * mass - (1 - alpha) * <hard, z> - alpha * <p, z>,    mass = 1 - alpha + alpha * sum(p)

and its gradient ``mass * softmax(z) - (1 - alpha) * hard - alpha * p``: only the softmax
statistics of the student enter, so neither a one-hot nor a mixture is built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pskd.targets import TopK, check_rows, check_weights

__all__ = ["gradient_rescaling", "pskd_cross_entropy"]

# Rows are worked on in chunks of about this many logits (float32: 2 MiB), so that the passes over
# a chunk find it in cache and the temporaries stay far below the size of the logits.
_CHUNK_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class _Teacher:
    """One of the three forms of a past prediction, cut and read by rows."""

    probs: Tensor | None = None
    logits: Tensor | None = None
    top_k: TopK | None = None

    def rows(self, part: slice, like: Tensor) -> Tensor | TopK:
        """Return dense probabilities, or the sparse form, of some rows in the dtype of ``like``."""
        if self.top_k is not None:
            indices, probs = self.top_k
            return TopK(indices[part].long(), probs[part].to(like.dtype))
        if self.logits is not None:
            return self.logits[part].to(like.dtype).softmax(dim=1)
        return self.probs[part].to(like.dtype)


def _expected_logit(teacher: Tensor | TopK, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``<p, z>`` and ``sum(p)`` a row."""
    if isinstance(teacher, Tensor):
        return torch.einsum("nc,nc->n", teacher, z), teacher.sum(dim=1)
    tail = teacher.tail(z.size(1))
    listed = z.gather(1, teacher.indices)
    dot = (teacher.probs * listed).sum(dim=1) + tail * (z.sum(dim=1) - listed.sum(dim=1))
    return dot, teacher.probs.sum(dim=1) + tail * (z.size(1) - listed.size(1))


def _subtract_teacher(grad: Tensor, teacher: Tensor | TopK, weight: Tensor) -> None:
    """Subtract ``weight * p`` from ``grad`` in place; ``weight`` is (n, 1)."""
    if isinstance(teacher, Tensor):
        grad.addcmul_(teacher, weight, value=-1.0)
        return
    tail = teacher.tail(grad.size(1))[:, None]
    grad.sub_(weight * tail)
    grad.scatter_add_(1, teacher.indices, weight * (tail - teacher.probs))


def _chunks(rows: int, classes: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, classes))
    return [slice(start, start + step) for start in range(0, rows, step)]


class _PSKDCrossEntropy(torch.autograd.Function):
    """Loss a row; the backward pass recomputes the softmax from the saved log-sum-exp."""

    @staticmethod
    def forward(ctx, logits, target, valid, alpha, smoothing, teacher: _Teacher):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = logits.new_empty(logits.size(0), dtype=dtype)
        lse, mass = torch.empty_like(loss), torch.empty_like(loss)
        for part in _chunks(*logits.shape):
            z, weight = logits[part].to(dtype), alpha[part]
            dot, total = _expected_logit(teacher.rows(part, z), z)
            hard = z.gather(1, target[part, None]).squeeze(1)
            if smoothing:
                hard = (1.0 - smoothing) * hard + smoothing * z.mean(dim=1)
            lse[part] = z.logsumexp(dim=1)
            mass[part] = 1.0 - weight + weight * total
            loss[part] = lse[part] * mass[part] - (1.0 - weight) * hard - weight * dot
        ctx.save_for_backward(logits, target, valid, alpha, lse, mass)
        ctx.smoothing, ctx.teacher = smoothing, teacher
        return loss.masked_fill_(~valid, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        logits, target, valid, alpha, lse, mass = ctx.saved_tensors
        grad_loss = grad_loss.masked_fill(~valid, 0.0)
        grad = torch.empty_like(logits)
        for part in _chunks(*logits.shape):
            z, weight = logits[part].to(lse.dtype), alpha[part, None]
            g = (z - lse[part, None]).exp_().mul_(mass[part, None])
            _subtract_teacher(g, ctx.teacher.rows(part, z), weight)
            hard = weight - 1.0
            if ctx.smoothing:
                g.add_(hard, alpha=ctx.smoothing / g.size(1))
            g.scatter_add_(1, target[part, None], hard * (1.0 - ctx.smoothing))
            grad[part] = g.mul_(grad_loss[part, None])
        # A row of weight 0 must not spread the NaN that its own (ignored) logits may hold.
        grad.masked_fill_(~valid[:, None], 0.0)
        return grad, None, None, None, None, None


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
) -> Tensor:
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
        teacher_logits: (N, C) scores in place of ``teacher_probs``; their softmax is the prediction.
        ignore_index: label of rows that add neither loss nor gradient nor count; may be a class.
        label_smoothing: eps in [0, 1] on the hard part, torch's: spread over all C classes.
        reduction: ``"none"`` (N,), ``"sum"``, or ``"mean"`` over the rows that are not ignored.

    Returns:
        The loss in nats, float32 (float64 for float64 logits). Where no row counts, ``"mean"`` is 0
        with a zero gradient, as object detectors need it, and not NaN as in torch.

    Raises:
        ValueError: if a weight lies outside [0, 1] or is NaN, a label is out of range (checked on
            the CPU), shapes or dtypes disagree, or both forms of a teacher are given.

    Source: Kim et al. 2021, section 3.1; the contract is that of `torch.nn.functional.cross_entropy`.
    """
    _check(logits, teacher_probs, teacher_logits, reduction)
    given = teacher_probs if teacher_logits is None else teacher_logits
    if target.dim() == 1 and target.size(0) != logits.size(0):
        raise ValueError(f"target: expected {logits.size(0)} labels, got {target.size(0)}")
    check_rows(target, logits.size(1), given, ignore_index)
    alpha = check_weights(alpha, label_smoothing, logits.size(0))
    valid = target != ignore_index

    if given is None or (not isinstance(alpha, Tensor) and alpha == 0.0):
        # Half precision is raised first, so that the sum over classes is one of float32.
        scores = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(
            scores,
            target.long(),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
    else:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = torch.as_tensor(alpha, dtype=dtype, device=logits.device)
        loss = _PSKDCrossEntropy.apply(
            logits,
            torch.where(valid, target, 0).long(),
            valid,
            weights.expand(logits.size(0)),
            float(label_smoothing),
            _as_teacher(teacher_probs, teacher_logits),
        )
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum().clamp_min(1)


def _as_teacher(teacher_probs: Tensor | TopK | None, teacher_logits: Tensor | None) -> _Teacher:
    if isinstance(teacher_probs, TopK):
        return _Teacher(top_k=TopK(teacher_probs.indices, teacher_probs.probs.detach()))
    if teacher_probs is not None:
        return _Teacher(probs=teacher_probs.detach())
    return _Teacher(logits=teacher_logits.detach())


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
    return 1.0 - alpha * torch.where(both_certain, 1.0, teacher_error / student_error)
