"""What every form of the loss is given and returns: rows of logits, labels, and a past prediction.

Shapes: N rows (samples, tokens or boxes), C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pskd.checks import (
    PLAIN,
    check_labels,
    check_listed,
    check_memory,
    check_row_weights,
    is_soft,
)
from pskd.targets import TopK

__all__ = ["Records", "RowValues", "Rows", "check_values", "readable", "sum_dtype"]


class Records(NamedTuple):
    """A memory's tables, which are read and written in the same pass; by the compiled form alone.

    Attributes:
        numbers: (N,) int64, contiguous, the record of each row; distinct, but for ``spare``.
        past: (M, B) uint8 records of `pskd.memory.records` in place of a past prediction: a row
            without one has alpha 0. None: the past prediction is given, or there is none.
        present: (M, B) uint8, takes what the rows predict now.
        width: probabilities of a record.
        dtype: of these, float16 or float32.
        index_bytes: of each index, 2 or 4; 0 where all classes are kept.
        alphas: (N,) float32, takes each row's alpha; None: not wanted.
        spare: the number of rows that have no record, if there may be such.
    """

    numbers: Tensor
    past: Tensor | None
    present: Tensor
    width: int
    dtype: torch.dtype
    index_bytes: int
    alphas: Tensor | None = None
    spare: int | None = None


class Rows(NamedTuple):
    """The rows of one call, with ``probs``, ``teacher_logits`` or ``records``, or without a past.

    Attributes:
        logits: (N, C) float16, bfloat16, float32 or float64; the student's scores.
        target: (N,) int64 labels in [0, C), or ``ignore_index``.
        probs: (N, C) the past prediction, or with ``indices`` (N, k); any floating-point dtype.
        teacher_logits: (N, C) scores, of which the softmax is the past prediction.
        indices: (N, k) integer classes of ``probs``, distinct within a row; the others share
            ``max(0, 1 - sum(probs))`` evenly (see `pskd.TopK`).
        alpha: weight of the past prediction, one number or (N,) of any floating-point dtype.
        ignore_index: label of rows whose loss, gradient and NLL are 0, whatever they hold.
        label_smoothing: eps of the hard part, spread over all C classes.
        records: of a memory, on the CPU.
        effect: (5,) float64 on the CPU, to which `pskd.stats.teacher_sums` are added; None: not
            wanted. Like ``records`` for the compiled form only.
    """

    logits: Tensor
    target: Tensor
    probs: Tensor | None
    teacher_logits: Tensor | None
    indices: Tensor | None
    alpha: Tensor | float
    ignore_index: int
    label_smoothing: float
    records: Records | None = None
    effect: Tensor | None = None

    def part(self, some: slice) -> Rows:
        """Return some of the rows."""
        fields = zip(self._fields, self, strict=True)
        cut: dict[str, Any] = {n: value[some] for n, value in fields if isinstance(value, Tensor)}
        return self._replace(**cut)

    def past(self) -> Tensor | None:
        """Return the past prediction as (N, C) probabilities, in `sum_dtype` of the logits."""
        dtype = sum_dtype(self.logits)
        if self.teacher_logits is not None:
            return self.teacher_logits.to(dtype).softmax(dim=1)
        if self.probs is None:
            return None
        probs = self.probs.to(dtype)
        if self.indices is None:
            return probs
        return TopK(self.indices, probs).dense(self.logits.size(1), self.logits != -torch.inf)


class RowValues(NamedTuple):
    """What is learned of each row; `sum_dtype` of the logits.

    Attributes:
        loss: (N,) in nats, 0 in ignored rows; or reduced.
        nll: (N,) the student's negative log-likelihood of the label in nats, 0 in ignored rows.
        teacher_at_label: (N,) the past prediction's probability of the label, 1 in ignored rows.

    The last two may be empty where they are not wanted.
    """

    loss: Tensor
    nll: Tensor
    teacher_at_label: Tensor


def sum_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype that sums over classes are made in: half precision is raised to float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def readable(rows: Rows) -> Rows:
    """Return rows whose tensors, all of them in memory, can be read by address.

    Raises:
        ValueError: unless all tensors are on the logits' device, and have an address.
    """
    device = rows.logits.device
    lazy: dict[str, Any] = {}
    for name, value in zip(rows._fields, rows, strict=True):
        if not isinstance(value, Tensor):
            continue
        if value.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
        if type(value) not in PLAIN:  # the callers have looked at these
            check_memory(name, value)
        if value.is_neg():  # the sign is not in the memory
            lazy[name] = value.resolve_neg()
    return rows._replace(**lazy) if lazy else rows


def check_values(rows: Rows) -> None:
    """Raise ValueError if a label, a listed class or an alpha is out of range.

    Looked at on the CPU only: on another device that would wait for it in every step.
    """
    if rows.logits.device.type != "cpu" or not len(rows.target):
        return
    classes = rows.logits.size(1)
    if not is_soft(rows.target):
        check_labels(rows.target, classes, rows.ignore_index)
    check_row_weights(rows.alpha)
    if rows.indices is not None:
        check_listed("teacher_probs", rows.indices, classes)
