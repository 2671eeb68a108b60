"""What a teacher does to the rows of a batch.

Cross-entropy's gradient on a row's label is ``1 - p[y]``, the student's error, and the teacher
takes ``alpha * (1 - p_past[y])`` of it away.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pskd.checks import check_row_weights, check_tensors, check_weights
from pskd.targets import TopK

__all__ = [
    "TeacherEffect",
    "agreement",
    "gradient_on_label",
    "gradient_rescaling",
    "teacher_effect",
]


class TeacherEffect(NamedTuple):
    """Sums over the rows that have a teacher, so that those of steps and processes can be added.

    A row that is not finite, in a step that overflowed, is left out.

    ``1 - removed / error`` is the mean gradient rescaling, each row weighted by its plain gradient:
    the factor itself divides by that and has no finite mean over well-learned rows.

    Attributes:
        rows: () int64, their number.
        teacher_nll: () float32, of the past prediction's negative log-likelihood of the label, in
            nats.
        error: () float32, of the student's ``1 - p[y]``.
        removed: () float32, of ``alpha * (1 - p_past[y])``.
    """

    rows: Tensor
    teacher_nll: Tensor
    error: Tensor
    removed: Tensor


@torch.no_grad()
def teacher_effect(nll: Tensor, teacher_probs_at_label: Tensor, alpha: Tensor) -> TeacherEffect:
    """Return what the teacher did to a batch; does not wait for the device.

    Args:
        nll: (N,) the student's negative log-likelihood of the label, in nats.
        teacher_probs_at_label: (N,) the past prediction's probability of the label.
        alpha: (N,) weight of the teacher; 0 for a row that has none.
    """
    error, removed = gradient_on_label(nll, teacher_probs_at_label, alpha)
    rows = (alpha > 0) & error.isfinite() & removed.isfinite()
    # A float32 softmax rounds what is very unlikely to 0, whose logarithm would spoil the sum.
    tiny = torch.finfo(torch.float32).tiny
    teacher_nll = -teacher_probs_at_label.float().clamp_min(tiny).log()
    sums = (torch.where(rows, value, 0.0).sum() for value in (teacher_nll, error, removed))
    return TeacherEffect(rows.sum(), *sums)


def gradient_on_label(
    nll: Tensor, teacher_probs_at_label: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each row's plain gradient on its label, and what the teacher takes of it away.

    Args:
        nll, teacher_probs_at_label, alpha: as of `teacher_effect`.

    Returns:
        Two of (N,) float32, ``1 - p[y]`` and ``alpha * (1 - p_past[y])``; the latter 0 where alpha
        is, whatever the past prediction.
    """
    removed = alpha.float() * (1.0 - teacher_probs_at_label.float())
    return -torch.expm1(-nll.float()), torch.where(alpha == 0, 0.0, removed)


def agreement(scores: Tensor, past: Tensor | TopK) -> Tensor:
    """Return whether the student and its past prediction prefer the same class.

    Args:
        scores: (N, C) the student's logits or probabilities.
        past: (N, C) probabilities or `TopK`.

    Returns:
        (N,) bool.
    """
    if isinstance(past, TopK):
        preferred = past.indices.gather(1, past.probs.argmax(dim=1, keepdim=True))
    else:
        preferred = past.argmax(dim=1, keepdim=True)
    # Of one argmax less than comparing two: the student's best score is on the teacher's class.
    return scores.gather(1, preferred).squeeze(1) == scores.amax(dim=1)


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
    check_tensors(
        student_probs_at_label=student_probs_at_label,
        teacher_probs_at_label=teacher_probs_at_label,
    )
    if student_probs_at_label.shape != teacher_probs_at_label.shape:
        raise ValueError(
            f"teacher_probs_at_label: expected shape {tuple(student_probs_at_label.shape)}, got "
            f"{tuple(teacher_probs_at_label.shape)}"
        )
    alpha = check_weights(alpha, 0.0, student_probs_at_label.numel())
    check_row_weights(alpha)
    if student_probs_at_label.dtype != torch.float64:
        student_probs_at_label = student_probs_at_label.float()
    # Rounded, a probability may exceed 1: to divide by a negative error would make no factor.
    student_error = (1.0 - student_probs_at_label).clamp_min(0.0)
    teacher_error = (1.0 - teacher_probs_at_label.to(student_error.dtype)).clamp_min(0.0)
    both_certain = (student_error == 0) & (teacher_error == 0)
    ratio = torch.where(both_certain, 1.0, teacher_error / student_error)
    weight = torch.as_tensor(alpha, dtype=ratio.dtype, device=ratio.device)
    return torch.where(weight == 0, 1.0, 1.0 - weight * ratio)  # not NaN from 0 * inf
