"""Soft targets: the materialised mixture, and the sparse form of a teacher's prediction.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pskd.schedule import check_alpha

__all__ = [
    "TopK",
    "check_labels",
    "check_row_weights",
    "check_rows",
    "check_weights",
    "mix_targets",
]


class TopK(NamedTuple):
    """A teacher's distribution as its k largest classes; the rest of the mass is spread evenly.

    The classes that are not listed share ``1 - probs.sum()`` in equal parts, so the distribution
    sums to 1. With k = C there is nothing to share and ``probs`` is taken as it is.

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
        rest = 1.0 - _upcast(self.probs).sum(dim=1)
        return rest.clamp_min(0.0) / others if others else torch.zeros_like(rest)

    def dense(self, num_classes: int) -> Tensor:
        """Return the (N, C) distribution; for reference and plots, not for a training step."""
        tail = self.tail(num_classes)
        full = tail[:, None].expand(-1, num_classes).clone()
        return full.scatter_(1, self.indices.long(), _upcast(self.probs))


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_labels(target: Tensor, num_classes: int, ignore_index: int | None) -> None:
    """Raise ValueError unless each label is one of C classes, or ``ignore_index``."""
    labels = target if ignore_index is None else target[target != ignore_index]
    if not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"target: expected labels in [0, {num_classes - 1}], got [{low}, {high}]")


def check_rows(target: Tensor, num_classes: int, teacher: Tensor | TopK | None) -> None:
    """Raise ValueError unless labels and teacher are of the same N rows of C classes."""
    if target.dim() != 1 or target.dtype.is_floating_point or target.dtype == torch.bool:
        raise ValueError(
            f"target: expected integer labels of shape (N,), got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
    rows = target.size(0)
    if isinstance(teacher, TopK):
        indices, probs = teacher
        if indices.shape != probs.shape or indices.dim() != 2 or indices.size(0) != rows:
            raise ValueError(
                f"teacher_probs: expected TopK of two tensors of shape ({rows}, k), got "
                f"{tuple(indices.shape)} and {tuple(probs.shape)}"
            )
        if not 0 < indices.size(1) <= num_classes or indices.dtype.is_floating_point:
            raise ValueError(
                f"teacher_probs: expected 1 to {num_classes} integer classes a row, got "
                f"{indices.size(1)} of {indices.dtype}"
            )
        teacher = probs
    elif teacher is not None and tuple(teacher.shape) != (rows, num_classes):
        raise ValueError(
            f"teacher: expected shape ({rows}, {num_classes}) as the logits, got "
            f"{tuple(teacher.shape)}"
        )
    if teacher is not None and not teacher.dtype.is_floating_point:
        raise ValueError(f"teacher: expected a floating-point tensor, got {teacher.dtype}")


def check_weights(alpha: float | Tensor, label_smoothing: float, rows: int) -> float | Tensor:
    """Return alpha as a float, or as it is when it holds one weight a row.

    Raises:
        ValueError: if a weight is NaN or outside [0, 1], but for the rows of a tensor.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if not isinstance(alpha, Tensor) or alpha.dim() == 0:
        return check_alpha(alpha)
    if tuple(alpha.shape) != (rows,):
        raise ValueError(f"alpha: expected a number or shape ({rows},), got {tuple(alpha.shape)}")
    return alpha


def check_row_weights(alpha: float | Tensor) -> None:
    """Raise ValueError unless each row's alpha lies in [0, 1]; looked at on the CPU only."""
    if not isinstance(alpha, Tensor) or alpha.device.type != "cpu":
        return
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError("alpha: expected every row in [0, 1], got a row outside of it or NaN")


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
        target: (N,) integer labels.
        teacher_probs: (N, C) probabilities, `TopK`, or None for no past prediction.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row (0 for a row
            that has no past prediction).
        num_classes: C; needed where ``teacher_probs`` does not tell it.
        label_smoothing: eps in [0, 1], over all C classes.

    Returns:
        (N, C) distributions, float32 (float64 where the teacher is).

    Raises:
        ValueError: if a weight lies outside [0, 1], a label outside [0, C), or shapes disagree.

    Source: Kim et al. 2021, equation 5.
    """
    if isinstance(teacher_probs, Tensor) and teacher_probs.dim() == 2:
        num_classes = num_classes or teacher_probs.size(1)
    if num_classes is None:
        raise ValueError("num_classes: expected the number of classes, got None")
    check_rows(target, num_classes, teacher_probs)
    if target.device.type == "cpu":
        check_labels(target, num_classes, ignore_index=None)
    alpha = check_weights(alpha, label_smoothing, target.size(0))
    check_row_weights(alpha)
    hard = F.one_hot(target.long(), num_classes)
    if teacher_probs is None:
        return hard.float() * (1.0 - label_smoothing) + label_smoothing / num_classes
    if isinstance(teacher_probs, TopK):
        teacher_probs = teacher_probs.dense(num_classes)
    soft = _upcast(teacher_probs)
    hard = hard.to(soft.dtype) * (1.0 - label_smoothing) + label_smoothing / num_classes
    weight = alpha[:, None].to(soft.dtype) if isinstance(alpha, Tensor) else alpha
    return (1.0 - weight) * hard + weight * soft
