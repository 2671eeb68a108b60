"""The loss of tokens by a criterion: which positions of a batch count, and which have a row.

Shapes: B sequences, T positions, N labels that count, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pskd.criterion.base import IGNORED, cross_entropy
from pskd.criterion.memory import MemoryCriterion
from pskd.criterion.snapshot import SnapshotCriterion

__all__ = ["CountedLabels"]


class CountedLabels:
    """The labels of a batch that count, in one line, with their rows.

    Args:
        labels: (B,) of samples or (B, T) of tokens, -100 where none counts.
        rows: of the shape of the labels; None for a snapshot.
        has_row: as the rows, where they are some; None if they all are.
        shifted: whether the logits of a position are for the label of the next, as in a decoder.
    """

    def __init__(
        self,
        labels: Tensor,
        rows: Tensor | None = None,
        has_row: Tensor | None = None,
        *,
        shifted: bool = False,
    ) -> None:
        if shifted:
            labels = labels.roll(-1, dims=-1)
            labels[..., -1] = IGNORED
            rows = None if rows is None else rows.roll(-1, dims=-1)
            has_row = None if has_row is None else has_row.roll(-1, dims=-1)
        self._shape = labels.shape
        self._places = (labels != IGNORED).flatten().nonzero()[:, 0]
        self.target = self._at_places(labels)
        self._rows = None if rows is None else self._at_places(rows)
        #: (N,) bool; None if all have one.
        self.has_row = None if has_row is None else self._at_places(has_row)

    def __len__(self) -> int:
        return len(self.target)

    def _at_places(self, values: Tensor) -> Tensor:
        return values.flatten()[self._places]

    def logits(self, logits: Tensor) -> Tensor:
        """Return the (N, C) logits for these labels, of (B, C) or (B, T, C).

        Raises:
            ValueError: if their shape is not that of the labels.
        """
        if logits.shape[:-1] != self._shape:
            sizes = ", ".join(map(str, self._shape))
            raise ValueError(
                f"logits: expected shape ({sizes}, C) as the labels, got {tuple(logits.shape)}"
            )
        return logits.flatten(0, -2)[self._places]

    def loss(
        self, criterion: MemoryCriterion | SnapshotCriterion, logits: Tensor, **inputs: object
    ) -> Tensor:
        """Return the mean loss; of what has no row the cross-entropy.

        Args:
            criterion: of the training.
            logits: (N, C), as of `logits`.
            inputs: what the student was called with, for a snapshot, which may only know the
                places through `logits`.
        """
        target, rows, known = self.target, self._rows, self.has_row
        if isinstance(criterion, SnapshotCriterion):
            return criterion(logits, target, rows=rows, **inputs)
        if known is None or rows is None or bool(known.all()):
            return criterion(logits, target, rows)
        share = known.to(torch.float32).mean()
        smoothing, weight = criterion.label_smoothing, criterion.weight
        hard = cross_entropy(logits[~known], target[~known], smoothing, weight)
        return share * criterion(logits[known], target[known], rows[known]) + (1 - share) * hard
