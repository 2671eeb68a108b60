"""Soft targets: the materialised mixture, and the sparse form of a teacher's prediction.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pskd.checks import (
    check_label_form,
    check_labels,
    check_listed,
    check_listed_once,
    check_row_weights,
    check_tensors,
    check_top_k,
    check_weights,
    is_soft,
    is_traced,
)

__all__ = ["TopK", "check_teacher", "mix_targets", "mixture", "row_alphas"]


class TopK(NamedTuple):
    """A teacher's distribution as its k largest classes; the rest of the mass is spread evenly.

    The classes that are not listed share ``1 - probs.sum()`` in equal parts, so the distribution
    sums to 1. With k = C there is nothing to share and ``probs`` is taken as it is. In the loss,
    classes that the student excludes (logits of -inf) have no share: the others have theirs too.

    Attributes:
        indices: (N, k) integer classes, distinct within a row.
        probs: (N, k) floating-point probabilities of those classes.
    """

    indices: Tensor
    probs: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, *, logsumexp: Tensor | None = None) -> TopK:
        """Return the k largest of ``softmax(logits)``, of (N, C) logits, in falling order.

        ``logsumexp`` is the (N,) ``logits.logsumexp(dim=1)``, for whom it is known already.
        """
        values, indices = logits.topk(k, dim=1)
        if logsumexp is None:
            logsumexp = _upcast(logits).logsumexp(dim=1)
        return cls(indices, (_upcast(values) - logsumexp[:, None]).exp())

    def tail(self, num_classes: int) -> Tensor:
        """Return the (N,) float32 or float64 probability of each class that is not listed."""
        others = num_classes - self.indices.size(1)
        return self._rest() / others if others else torch.zeros_like(self._rest())

    def dense(self, num_classes: int, allowed: Tensor | None = None) -> Tensor:
        """Return the (N, C) distribution; for reference and plots, not for a training step.

        Args:
            num_classes: C.
            allowed: (N, C) bool, the classes that may have a share of the tail, such as ``logits !=
                -inf``; None for all.

        Raises:
            ValueError: if there are not 1 to C integer classes a row, of [0, C).
        """
        check_top_k("dense", self, len(self.indices), num_classes)
        if not is_traced(self.indices):
            check_listed("dense", self.indices, num_classes)
        if allowed is None:
            shares = self.tail(num_classes)[:, None].expand(-1, num_classes).clone()
        else:
            unlisted = allowed.scatter(1, self.indices.long(), False)
            shares = unlisted * (self._rest() / unlisted.sum(dim=1).clamp_min(1))[:, None]
        return shares.scatter_(1, self.indices.long(), _upcast(self.probs))

    def _rest(self) -> Tensor:
        return (1.0 - _upcast(self.probs).sum(dim=1)).clamp_min(0.0)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_teacher(teacher: Tensor | TopK | None, rows: int, num_classes: int) -> None:
    """Raise ValueError unless a teacher is of N rows of C classes."""
    if teacher is None:
        return
    if isinstance(teacher, TopK):
        check_top_k("teacher_probs", teacher, rows, num_classes)
        teacher = teacher.probs
    else:
        check_tensors(teacher=teacher)
        if tuple(teacher.shape) != (rows, num_classes):
            raise ValueError(
                f"teacher: expected shape ({rows}, {num_classes}) as the logits, got "
                f"{tuple(teacher.shape)}"
            )
    if not teacher.dtype.is_floating_point:
        raise ValueError(f"teacher: expected a floating-point tensor, got {teacher.dtype}")


def row_alphas(alpha: float, taught: Tensor) -> Tensor:
    """Return (N,) float32 weights: alpha for the rows that have a teacher, 0 for the others.

    Multiplied by a number, a mask would become torch's default dtype, which may be a half.
    """
    return taught.float().mul_(alpha)


def mix_targets(
    target: Tensor,
    teacher_probs: Tensor | TopK | None,
    alpha: float | Tensor,
    *,
    num_classes: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the PS-KD target: the label's distribution mixed with the model's own past prediction.

    Equals ``(1 - alpha) * smooth(one_hot(target)) + alpha * teacher_probs`` where ``smooth`` is
    torch's label smoothing, ``(1 - eps) * one_hot + eps / C``. Training does not need this matrix:
    `pskd.pskd_cross_entropy` computes the same loss without it.

    Args:
        target: (N,) integer labels; or (N, C) probabilities in place of their one-hot.
        teacher_probs: (N, C) probabilities, `TopK`, or None for no past prediction.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row (0 for a row
            that has no past prediction, whatever ``teacher_probs`` holds there).
        num_classes: C; needed where neither ``target`` nor ``teacher_probs`` tells it.
        label_smoothing: eps in [0, 1], over all C classes.

    Returns:
        (N, C) distributions, float32 (float64 where the teacher is).

    Raises:
        ValueError: if a weight lies outside [0, 1], a label or a listed class outside [0, C), a
            class is listed twice, or shapes disagree.

    Source: Kim et al. 2021, equation 5.
    """
    check_tensors(target=target)
    for known in (target, teacher_probs):
        if isinstance(known, Tensor) and known.dim() == 2:
            num_classes = num_classes or known.size(1)
    if num_classes is None:
        raise ValueError("num_classes: expected the number of classes, got None")
    if not is_soft(target):
        check_label_form(target)
        if target.device.type == "cpu":
            check_labels(target, num_classes, ignore_index=None)
    elif target.size(1) != num_classes:
        raise ValueError(f"target: expected {num_classes} classes, got {target.size(1)}")
    check_teacher(teacher_probs, target.size(0), num_classes)
    alpha = check_weights(alpha, label_smoothing, target.size(0))
    check_row_weights(alpha)
    if isinstance(teacher_probs, TopK):
        check_listed("teacher_probs", teacher_probs.indices, num_classes)
        check_listed_once("teacher_probs", teacher_probs.indices, alpha)
        teacher_probs = teacher_probs.dense(num_classes)
    return mixture(target, teacher_probs, alpha, num_classes, label_smoothing)


def mixture(
    target: Tensor,
    teacher_probs: Tensor | None,
    alpha: float | Tensor,
    num_classes: int,
    label_smoothing: float,
) -> Tensor:
    """Return `mix_targets` of what was checked."""
    soft = None if teacher_probs is None else _upcast(teacher_probs)
    if is_soft(target):
        hard = _upcast(target)
    else:
        hard = F.one_hot(target.long(), num_classes).to(
            torch.float32 if soft is None else soft.dtype
        )
    if label_smoothing:
        hard = hard * (1.0 - label_smoothing) + label_smoothing / num_classes
    if soft is None:
        return hard
    if not isinstance(alpha, Tensor):
        return (1.0 - alpha) * hard + (alpha * soft if alpha else 0.0)
    weight = alpha[:, None].to(soft.dtype)
    # A row without a past may hold anything, NaN included: not multiplied by 0.
    return (1.0 - weight) * hard + torch.where(weight == 0, 0.0, weight * soft)
