"""PS-KD for a training loop, with a memory of last epoch's predictions.

Shapes: N rows of a batch, M samples of the data set, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from pskd.checks import check_batch
from pskd.criterion.base import IGNORED, Criterion, cross_entropy
from pskd.kernels import Records, Rows
from pskd.loss import computed, in_one_pass
from pskd.memory import PredictionMemory, traced
from pskd.rows import check_distinct, check_given, check_range
from pskd.stats import ExampleStats
from pskd.targets import row_alphas

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11

__all__ = ["MemoryCriterion"]


class _MemoryOptions(TypedDict, total=False):
    """Options of `PredictionMemory`."""

    top_k: int | None
    dtype: torch.dtype
    path: str | Path | None
    momentum: float
    fingerprint: str
    device: torch.device | str


class MemoryCriterion(Criterion):
    """Cross-entropy softened by what the model said of each sample one epoch ago.

        criterion = pskd.MemoryCriterion(len(dataset), num_classes, num_epochs=300)
        loader = DataLoader(pskd.WithRows(dataset), batch_size=128, shuffle=True)
        for epoch in range(1, 301):
            criterion.begin_epoch(epoch)
            for rows, inputs, target in loader:
                loss = criterion(model(inputs), target, rows)

    The prediction that is kept is that of the training forward, as in the published code. Without
    autograd (``torch.no_grad()``, a validation) it is the plain cross-entropy and keeps nothing.

    Args:
        num_rows: M, the size of the data set.
        num_classes: C.
        num_epochs: of the whole training.
        alpha_final: weight of the teacher at the end of training (the paper's alpha_T); 0 is
            cross-entropy and keeps no memory.
        alpha_schedule: ``"linear"`` (the paper), ``"constant"`` or ``"cosine"``.
        label_smoothing: torch's, of the hard part of the target, over all C classes.
        weight: (C,) float, how much a sample counts by its label, as of `pskd.pskd_cross_entropy`;
            without label smoothing, and labels only.
        examples: is told of every row, if given.
        memory: options of `PredictionMemory`: ``top_k``, ``dtype``, ``path``, ``momentum``,
            ``fingerprint``, ``device``.

    Raises:
        ValueError: for an option out of range, or examples of another number of samples.

    Source: Kim et al. 2021, section 3.1, and its published code's form of the teacher.
    """

    def __init__(
        self,
        num_rows: int,
        num_classes: int,
        *,
        num_epochs: int,
        alpha_final: float = 0.8,
        alpha_schedule: str = "linear",
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        examples: ExampleStats | None = None,
        **memory: Unpack[_MemoryOptions],
    ) -> None:
        super().__init__(num_epochs, alpha_final, alpha_schedule, label_smoothing, examples, weight)
        if examples is not None and examples.num_rows != num_rows:
            raise ValueError(f"examples: expected {num_rows} samples, got {examples.num_rows}")
        self.num_rows = num_rows
        #: Last epoch's predictions; None for cross-entropy.
        self.memory = (
            PredictionMemory(num_rows, num_classes, **memory) if self.alpha_final else None
        )
        self._handle = None if self.memory is None else traced.handle_of(self.memory)
        self._drive(self.memory, None, {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._handle = None if self.memory is None else traced.handle_of(self.memory)

    def __call__(self, logits: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch, and keep its predictions for the next epoch.

        Args:
            logits: (N, C) float, of the training forward.
            target: (N,) integer labels, or (N, C) probabilities.
            rows: (N,) which samples they are, integers in [0, M), distinct; without autograd they
                may be missing.

        Raises:
            ValueError: without rows, or with rows outside the data set; labels or shapes that the
                loss refuses.
            RuntimeError: if no epoch was begun.
        """
        if not torch.is_grad_enabled():
            return cross_entropy(logits, target, weight=self.weight)
        self._check_batch(logits, target)
        rows = check_given(rows, logits.size(0))
        records = self._records(logits, target, rows)
        if records is not None:
            return self._loss_in_one_pass(logits, target, rows, records)
        check_distinct(rows)
        loss = self.loss(logits, target, rows)
        if self.memory is not None:
            probs = logits.detach().float().softmax(dim=1)
            traced.write(self.memory, self._handle, rows.to(logits.device), probs)
        return loss

    def _check_batch(self, logits: Tensor, target: Tensor) -> None:
        check_batch(logits, target)
        if self.memory is not None and logits.size(1) != self.memory.num_classes:
            expected = f"{self.memory.num_classes} classes, as num_classes of the criterion"
            raise ValueError(f"logits: expected {expected}, got {logits.size(1)}")

    def _records(self, logits: Tensor, target: Tensor, rows: Tensor) -> Records | None:
        """Return the memory's tables where the compiled loss reads and writes them itself."""
        if self.memory is None or not self.epoch:
            return None
        if not in_one_pass(logits, target, None, self.weight):
            return None
        alphas = None
        if self.examples is not None:
            alphas = torch.empty(rows.size(0), dtype=torch.float32, device="cpu")
        return self.memory.records(rows, logits.size(1), alphas)

    def _loss_in_one_pass(
        self, logits: Tensor, target: Tensor, rows: Tensor, records: Records
    ) -> Tensor:
        """Return what the call does: what is kept is of the same softmax as the loss."""
        is_taught, alphas = records.past is not None, records.alphas
        given = Rows(
            logits.detach(),
            target.long(),
            None,
            None,
            None,
            self.alpha if is_taught else 0.0,
            IGNORED,
            self.label_smoothing,
            records,
            self.means.sums_on_cpu() if is_taught else None,
        )
        if is_taught:
            loss, stats = computed(logits, given, "mean", alphas is not None, False)
        else:  # torch's loss to the last bit, as without a teacher
            loss = cross_entropy(logits, target, self.label_smoothing)
            _, stats = computed(given.logits, given, "none", alphas is not None, False)
        if alphas is not None and stats is not None and self.examples is not None:
            self.examples.add(rows, *stats, alphas)
        return loss

    def loss(
        self, logits: Tensor, target: Tensor, rows: Tensor, *, recorded: bool = True
    ) -> Tensor:
        """Return the mean loss and keep nothing; of a mixed image one of its two parts.

        The loss is linear in the target: that of an image mixed of two by lambda is ``lambda *
        loss(logits, target_a, rows_a) + (1 - lambda) * loss(logits, target_b, rows_b)``.

        Args:
            logits, target, rows: as of the call.
            recorded: whether the means and the examples are told.

        Raises:
            ValueError: as the call, but that a sample may be there twice.
            RuntimeError: if no epoch was begun.
        """
        if not self.epoch:
            raise RuntimeError("expected begin_epoch(1) before the first batch")
        self._check_batch(logits, target)
        rows = check_given(rows, len(logits))
        check_range(rows, self.num_rows)
        rows = rows.to(logits.device)
        past, alpha = None, None
        if self.memory is not None and self.epoch > 1:
            past, seen = traced.read(self.memory, self._handle, rows)
            alpha = row_alphas(self.alpha, seen)
        return self._loss(logits, target, past, alpha, rows, recorded=recorded)

    def carry_over(self, rows: Tensor) -> None:
        """Keep last epoch's predictions of some rows for another epoch.

        For samples whose view of this epoch tells nothing of them alone, such as mixed images.

        Args:
            rows: (N,) int64 in [0, M).

        Raises:
            ValueError: if a row is none of the data set's.
        """
        if self.memory is not None:
            self.memory.carry_over(rows)

    def state_dict(self, *, inside_epoch: bool = False) -> dict[str, Any]:
        memory = None if self.memory is None else self.memory.state_dict(ended=not inside_epoch)
        return super().state_dict(inside_epoch=inside_epoch) | {"memory": memory}

    def _load_teacher(self, state: dict[str, Any]) -> None:
        if self.memory is not None:
            self.memory.load_state_dict(state.get("memory", {}))
