"""What the criterions of both teachers share: the schedule, the loss and what is told of it.

Shapes: N rows of a batch, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pskd.checks import (
    check_batch,
    check_class_weights,
    check_labels,
    is_soft,
    is_traced,
)
from pskd.driver import EpochDriver
from pskd.kernels import sum_dtype
from pskd.loss import in_one_pass, loss_and_stats, pskd_cross_entropy
from pskd.schedule import AlphaSchedule
from pskd.stats import ExampleStats, TeacherMeans
from pskd.targets import TopK
from pskd.teachers import Teacher

__all__ = ["IGNORED", "Criterion", "cross_entropy"]

IGNORED = -100  # torch's label of rows that do not count


class Criterion(ABC):
    """What both forms of the teacher share: the schedule, the loss and what is told of it."""

    def __init__(
        self,
        num_epochs: int,
        alpha_final: float,
        alpha_schedule: str,
        label_smoothing: float,
        examples: ExampleStats | None,
        weight: Tensor | None,
    ) -> None:
        self._schedule = AlphaSchedule(alpha_final, num_epochs, alpha_schedule)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        if weight is not None and label_smoothing:
            raise ValueError("weight: expected labels without smoothing, got label_smoothing")
        self.num_epochs, self.alpha_schedule = num_epochs, alpha_schedule
        self.alpha_final = self._schedule.alpha_final
        self.label_smoothing = float(label_smoothing)
        self.weight, self.examples = weight, examples
        #: What the teacher did, under names ``pskd/...``, until they are taken.
        self.means = TeacherMeans()

    def _drive(
        self, teacher: Teacher | None, student: nn.Module | None, named: dict[str, object]
    ) -> None:
        """Make the driver, whose options tell this training from others."""
        options: dict[str, object] = {"label_smoothing": self.label_smoothing}
        if self.weight is not None:
            options["weight"] = self.weight.tolist()
        if self.alpha_final:
            options["criterion"] = type(self).__name__
            options |= named
        self._driver = EpochDriver(self._schedule, teacher, student, options)

    @property
    def epoch(self) -> int:
        """The epoch that is trained, from 1; 0 before the first."""
        return self._driver.epoch

    @property
    def alpha(self) -> float:
        """Weight of the teacher in this epoch; 0 in the first, which has none."""
        return self._driver.alpha

    def begin_epoch(self, epoch: int) -> None:
        """Set alpha, and make the epoch that ended the teacher's; in every process.

        Args:
            epoch: from 1 to the number of epochs.

        Raises:
            ValueError: if it is none of them, or not the one after the last; as
                `PredictionMemory.next_epoch`.
            OSError: as `PredictionMemory.next_epoch`.
        """
        self._driver.begin_epoch(epoch)

    def set_progress(self, progress: float) -> None:
        """Set alpha within an epoch that was begun, for a schedule by updates in place of epochs.

        Args:
            progress: how much of the training is done with this update, in epochs: in (0, T].

        Raises:
            ValueError: if it lies outside the training.
        """
        self._driver.enter(self.epoch, progress)

    def take_means(self) -> dict[str, float]:
        """Return ``pskd/alpha`` and the means since the last call, for a log; a collective.

        ``pskd/teacher_nll`` (nats) and ``pskd/teacher_agreement`` (a fraction) are means over the
        rows that have a teacher, ``pskd/gradient_rescaling`` is the factor on their gradients.
        Of cross-entropy there is nothing to tell.
        """
        return {"pskd/alpha": self.alpha} | self.means.take() if self.alpha_final else {}

    def _loss(
        self,
        logits: Tensor,
        target: Tensor,
        past: Tensor | TopK | None,
        alpha: Tensor | None,
        rows: Tensor | None,
        *,
        recorded: bool = True,
    ) -> Tensor:
        """Return the mean loss; ``alpha`` is (N,), ``rows`` is where `examples` may be told."""
        if past is None or alpha is None:
            loss = cross_entropy(logits, target, self.label_smoothing, self.weight)
            if recorded and rows is not None and self.examples is not None:
                nll = pskd_cross_entropy(logits.detach(), target, None, 0.0, reduction="none")
                self.examples.add(rows, nll, None, torch.zeros_like(nll))
            return loss
        is_added = recorded and in_one_pass(logits, target, past)
        examples = self.examples if recorded else None
        loss, stats = loss_and_stats(
            logits,
            target,
            past,
            alpha,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            return_stats=examples is not None or not is_added,
            effect=self.means.sums_on_cpu() if is_added else None,
        )
        if stats is not None and recorded and not is_added:
            taught = alpha if is_soft(target) else alpha.masked_fill(target == IGNORED, 0.0)
            self.means.add(logits, past, taught, stats)
        if stats is not None and examples is not None and rows is not None:
            examples.add(rows, *stats, alpha)
        return loss

    def state_dict(self, *, inside_epoch: bool = False) -> dict[str, Any]:
        """Return what a run that goes on after this epoch needs beside the model.

        Plain values and tensors on the CPU; a collective in several processes.

        Args:
            inside_epoch: for a run that goes on with the batches that are left of this epoch, and
                not with `begin_epoch`. A snapshot's weights are in the state then, those of
                ``ema`` always.
        """
        state = self._driver.state_dict()
        if self.examples is not None:
            state["examples"] = self.examples.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the epoch of the state; the model's weights must be loaded too.

        Raises:
            ValueError: if the options or the data changed; nothing is changed then.
        """
        self._driver.check_state_dict(state, "a criterion's state")
        if self.examples is not None and "examples" in state:
            self.examples.check_state_dict(state["examples"])  # nothing may fail after the teacher
        self._load_teacher(state)
        if self.examples is not None and "examples" in state:
            self.examples.load_state_dict(state["examples"])
        self._driver.enter(state["epoch"])

    @abstractmethod
    def _load_teacher(self, state: dict[str, Any]) -> None:
        """Load the teacher from `state_dict`, or change nothing and raise ValueError."""


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Return the mean loss without a teacher, on the CPU torch's to the last bit.

    Not where rows are ignored: torch's is NaN if all of them are, or if one of them holds NaN. Nor
    with probabilities and classes that the student excludes, where torch's is NaN.

    Raises:
        ValueError: as `pskd_cross_entropy`.
    """
    check_batch(logits, target)
    if weight is not None:
        check_class_weights(weight, logits, target, label_smoothing)
        weight = weight.to(logits.device, sum_dtype(logits))
    if not _torch_serves(logits, target):
        return pskd_cross_entropy(
            logits, target, None, 0.0, weight=weight, label_smoothing=label_smoothing
        )
    if not is_soft(target):
        check_labels(target, logits.size(1), ignore_index=None)
        target = target.long()
    scores = logits.to(sum_dtype(logits))
    return F.cross_entropy(scores, target, weight, label_smoothing=label_smoothing)


def _torch_serves(logits: Tensor, target: Tensor) -> bool:
    if is_traced(logits) or is_traced(target):  # to look at values would end the graph
        return False
    if not len(target) or target.device.type != "cpu" or logits.device.type != "cpu":
        return False
    if is_soft(target):  # torch's is NaN where a class is excluded, whatever its probability
        return not bool((logits == -torch.inf).any())
    return not bool((target == IGNORED).any())
