"""PS-KD for a training loop: alpha, teacher and loss in one object, with either teacher."""

from __future__ import annotations

from typing import Any

from torch import nn

from pskd.criterion.memory import MemoryCriterion
from pskd.criterion.snapshot import SnapshotCriterion
from pskd.rows import WithRows
from pskd.teachers import TEACHERS

__all__ = ["MemoryCriterion", "SnapshotCriterion", "make_criterion"]


def make_criterion(
    model: nn.Module,
    dataset: object,
    num_classes: int,
    *,
    teacher: str = "memory",
    num_rows: int | None = None,
    **options: Any,
) -> MemoryCriterion | SnapshotCriterion:
    """Return the criterion of either teacher, for a framework that knows model and data.

    Args:
        model: the student.
        dataset: of the training; a memory needs a `pskd.WithRows`.
        num_classes: C; a snapshot does not ask.
        teacher: one of `pskd.teachers.TEACHERS`.
        num_rows: M, for a memory of something else than samples, such as tokens.
        options: of the criterion.

    Raises:
        ValueError: for an unknown teacher, data without row numbers, an option out of range.
    """
    if teacher not in TEACHERS:
        expected = " or ".join(map(repr, TEACHERS))
        raise ValueError(f"teacher: expected {expected}, got {teacher!r}")
    if teacher != "memory":
        return SnapshotCriterion(model, teacher=teacher, **options)
    if not isinstance(dataset, WithRows):
        name = type(dataset).__name__
        raise ValueError(f"training data: expected pskd.WithRows(dataset), got {name}")
    return MemoryCriterion(num_rows or len(dataset), num_classes, **options)
