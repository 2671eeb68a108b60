"""PS-KD for a training loop: alpha, teacher and loss in one object.

Shapes: N rows of a batch, M samples of the data set, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pskd.examples import ExampleStats
from pskd.loss import pskd_cross_entropy
from pskd.means import Means
from pskd.memory import PredictionMemory
from pskd.rows import WithRows, check_distinct, check_given, check_range
from pskd.schedule import AlphaSchedule, check_unchanged
from pskd.targets import TopK, check_labels, check_rows
from pskd.teacher import SnapshotTeacher

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.11

__all__ = ["MemoryCriterion", "SnapshotCriterion", "make_criterion"]

_IGNORED = -100  # torch's label of rows that do not count


class _MemoryOptions(TypedDict, total=False):
    """Options of `PredictionMemory`."""

    top_k: int | None
    dtype: torch.dtype
    path: str | Path | None
    momentum: float
    fingerprint: str
    device: torch.device | str


class _Criterion(ABC):
    """What both forms of the teacher share: the schedule, the loss and what is told of it."""

    def __init__(
        self,
        num_epochs: int,
        alpha_final: float,
        schedule: str,
        label_smoothing: float,
        examples: ExampleStats | None,
    ) -> None:
        self._schedule = AlphaSchedule(alpha_final, num_epochs, schedule)
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        self.num_epochs, self.schedule = num_epochs, schedule
        self.alpha_final = self._schedule.alpha_final
        self.label_smoothing = float(label_smoothing)
        self.examples = examples
        #: The epoch that is trained, from 1; 0 before the first.
        self.epoch = 0
        #: Weight of the teacher in this epoch; 0 in the first, which has none.
        self.alpha = 0.0
        #: What the teacher did, under names ``pskd/...``, until they are taken.
        self.means = Means()

    def begin_epoch(self, epoch: int) -> None:
        """Set alpha, and make the epoch that ended the teacher's; in every process.

        Args:
            epoch: from 1 to the number of epochs.

        Raises:
            ValueError: if it is none of them, or not the one after the last.
        """
        self._schedule.check_next(epoch, self.epoch)
        if self.alpha_final:
            self._turn()
        self._set_epoch(epoch)

    def _set_epoch(self, epoch: int) -> None:
        self.epoch, self.alpha = epoch, self._schedule.at(epoch)

    @abstractmethod
    def _turn(self) -> None:
        """Make what the epoch that ended left the teacher's."""

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
            loss = _cross_entropy(logits, target, self.label_smoothing)
            if recorded and rows is not None and self.examples is not None:
                nll = F.cross_entropy(logits.detach().float(), target, reduction="none")
                self.examples.add(rows, nll, None, torch.zeros_like(nll))
            return loss
        loss, stats = pskd_cross_entropy(
            logits, target, past, alpha, label_smoothing=self.label_smoothing, return_stats=True
        )
        if recorded:
            self.means.add_teacher(logits, past, alpha, stats)
            if rows is not None and self.examples is not None:
                self.examples.add(rows, stats.nll, stats.teacher_probs_at_label, alpha)
        return loss

    def _options(self) -> dict[str, object]:
        """Return what makes two trainings different ones."""
        options = self._schedule.options() | {"label_smoothing": self.label_smoothing}
        return options | ({"criterion": type(self).__name__} if self.alpha_final else {})

    def state_dict(self, *, inside_epoch: bool = False) -> dict[str, Any]:
        """Return what a run that goes on after this epoch needs beside the model.

        Plain values and tensors on the CPU; a collective in several processes.

        Args:
            inside_epoch: for a run that goes on with the batches that are left of this epoch, and
                not with `begin_epoch`. A snapshot teacher's weights are in the state then.
        """
        state: dict[str, Any] = {"epoch": self.epoch, "options": self._options()}
        if self.examples is not None:
            state["examples"] = self.examples.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the epoch of the state; the model's weights must be loaded too.

        Raises:
            ValueError: if the options or the data changed; nothing is changed then.
        """
        if not isinstance(state, dict) or not {"epoch", "options"} <= state.keys():
            got = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"expected a criterion's state with 'epoch' and 'options', got {got}")
        check_unchanged(state["options"], self._options())
        if not 0 <= state["epoch"] <= self.num_epochs:
            raise ValueError(
                f"epoch: expected a state of epoch 0 to {self.num_epochs}, got {state['epoch']}"
            )
        self._load_teacher(state)
        if self.examples is not None and "examples" in state:
            self.examples.load_state_dict(state["examples"])
        self._set_epoch(state["epoch"])

    @abstractmethod
    def _load_teacher(self, state: dict[str, Any]) -> None:
        """Load the teacher from `state_dict`, or change nothing and raise ValueError."""


class MemoryCriterion(_Criterion):
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
        schedule: ``"linear"`` (the paper), ``"constant"`` or ``"cosine"``.
        label_smoothing: torch's, of the hard part of the target, over all C classes.
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
        schedule: str = "linear",
        label_smoothing: float = 0.0,
        examples: ExampleStats | None = None,
        **memory: Unpack[_MemoryOptions],
    ) -> None:
        super().__init__(num_epochs, alpha_final, schedule, label_smoothing, examples)
        if examples is not None and examples.num_rows != num_rows:
            raise ValueError(f"examples: expected {num_rows} samples, got {examples.num_rows}")
        self.num_rows = num_rows
        #: Last epoch's predictions; None for cross-entropy.
        self.memory = (
            PredictionMemory(num_rows, num_classes, **memory) if self.alpha_final else None
        )

    def __call__(self, logits: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the mean loss of a batch, and keep its predictions for the next epoch.

        Args:
            logits: (N, C) float, of the training forward.
            target: (N,) integer labels.
            rows: (N,) which samples they are, integers in [0, M), distinct; without autograd they
                may be missing.

        Raises:
            ValueError: without rows, or with rows that are none of the data set's; labels or
                shapes that the loss refuses.
            RuntimeError: if no epoch was begun.
        """
        if not torch.is_grad_enabled():
            return _cross_entropy(logits, target)
        rows = check_given(rows, len(logits))
        check_distinct(rows)
        loss = self.loss(logits, target, rows)
        if self.memory is not None:
            self.memory.write(rows.to(logits.device), logits.detach().float().softmax(dim=1))
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
        """
        if not self.epoch:
            raise RuntimeError("expected begin_epoch(1) before the first batch")
        rows = check_given(rows, len(logits))
        check_range(rows, self.num_rows)
        rows = rows.to(logits.device)
        past, alpha = None, None
        if self.memory is not None and self.epoch > 1:
            past, seen = self.memory.read(rows)
            alpha = self.alpha * seen
        return self._loss(logits, target, past, alpha, rows, recorded=recorded)

    def carry_over(self, rows: Tensor) -> None:
        """Keep last epoch's predictions of some rows for another epoch.

        For samples whose view of this epoch tells nothing of them alone, such as mixed images.
        """
        if self.memory is not None:
            self.memory.carry_over(rows)

    def _turn(self) -> None:
        if self.memory is not None:
            self.memory.next_epoch()

    def state_dict(self, *, inside_epoch: bool = False) -> dict[str, Any]:
        memory = None if self.memory is None else self.memory.state_dict()
        return super().state_dict(inside_epoch=inside_epoch) | {"memory": memory}

    def _load_teacher(self, state: dict[str, Any]) -> None:
        if self.memory is not None:
            self.memory.load_state_dict(state.get("memory", {}))


class SnapshotCriterion(_Criterion):
    """Cross-entropy softened by what last epoch's weights say of the same batch.

        criterion = pskd.SnapshotCriterion(model, num_epochs=300)
        for epoch in range(1, 301):
            criterion.begin_epoch(epoch)
            for inputs, target in loader:
                loss = criterion(model(inputs), target, inputs)

    One more forward a step, in eval mode, and no need to know which sample a row is. Without
    autograd (``torch.no_grad()``, a validation) it is the plain cross-entropy.

    Args:
        model: the student; may be wrapped in DDP or compiled.
        num_epochs, alpha_final, schedule, label_smoothing, examples: as of `MemoryCriterion`.
        logits_of: takes what the model returns and gives its (N, C) logits; if not given, they are
            what it returns or the attribute ``logits`` of it.

    Raises:
        ValueError: for an option out of range.

    Source: Kim et al. 2021, section 3.1, the form that keeps last epoch's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_epochs: int,
        alpha_final: float = 0.8,
        schedule: str = "linear",
        label_smoothing: float = 0.0,
        examples: ExampleStats | None = None,
        logits_of: Callable[[Any], Tensor] = lambda output: getattr(output, "logits", output),
    ) -> None:
        super().__init__(num_epochs, alpha_final, schedule, label_smoothing, examples)
        self._student = _bare(model)
        self._logits_of = logits_of
        self.teacher = SnapshotTeacher()

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        *inputs: object,
        rows: Tensor | None = None,
        **named_inputs: object,
    ) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            logits: (N, C) float, of the training forward.
            target: (N,) integer labels.
            inputs, named_inputs: what the student was called with.
            rows: (N,) which samples they are, for `examples`; may be missing.

        Raises:
            ValueError: without inputs, which the teacher is called with; labels or shapes that the
                loss refuses.
            RuntimeError: if no epoch was begun.
        """
        if not torch.is_grad_enabled():
            return _cross_entropy(logits, target)
        if self.alpha_final and not (inputs or named_inputs):  # in the first epoch too
            raise ValueError("inputs: expected what the model was called with, got none")
        return self.loss(logits, target, self.score(*inputs, **named_inputs), rows)

    @torch.no_grad()
    def score(self, *inputs: object, **named_inputs: object) -> Tensor | None:
        """Return the teacher's (N, C) probabilities of a batch; None in the first epoch."""
        if not self.epoch:
            raise RuntimeError("expected begin_epoch(1) before the first batch")
        if not self.alpha:
            return None
        if not self.teacher.available:
            raise RuntimeError(
                f"expected begin_epoch({self.epoch + 1}): the state that was loaded is that of an "
                "epoch's end (inside one, save state_dict(inside_epoch=True))"
            )
        logits = self._logits_of(self.teacher.model(*inputs, **named_inputs))
        return logits.float().softmax(dim=1)

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        past: Tensor | None,
        rows: Tensor | None = None,
        *,
        recorded: bool = True,
    ) -> Tensor:
        """Return the mean loss against what `score` returned of the same inputs."""
        alpha = None
        if past is not None:
            alpha = torch.full((len(logits),), self.alpha, device=logits.device)
        if rows is not None:
            rows = check_given(rows, len(logits))
            if self.examples is not None:
                check_range(rows, self.examples.num_rows)
        return self._loss(logits, target, past, alpha, rows, recorded=recorded)

    def _turn(self) -> None:
        if self.epoch:  # the weights that an epoch left; before the first they are random
            self.teacher.refresh_in_all(self._student)

    def state_dict(self, *, inside_epoch: bool = False) -> dict[str, Any]:
        state = super().state_dict(inside_epoch=inside_epoch)
        # At an epoch's end the model is the next teacher.
        return state | ({"teacher": self.teacher.state_dict()} if inside_epoch else {})

    def _load_teacher(self, state: dict[str, Any]) -> None:
        if self.examples is not None and "examples" in state:
            self.examples.check_state_dict(state["examples"])  # nothing may fail after the teacher
        self.teacher.load_state_dict(state.get("teacher", {"model": None}), self._student)


def make_criterion(
    model: nn.Module,
    dataset: object,
    num_classes: int,
    *,
    teacher: str = "memory",
    **options: Any,
) -> MemoryCriterion | SnapshotCriterion:
    """Return the criterion of either teacher, for a framework that knows model and data.

    Args:
        model: the student.
        dataset: of the training; a memory needs a `pskd.WithRows`.
        num_classes: C; a snapshot does not ask.
        teacher: ``"memory"`` or ``"snapshot"``.
        options: of the criterion.

    Raises:
        ValueError: for a teacher that is none, data without row numbers, an option out of range.
    """
    if teacher == "snapshot":
        return SnapshotCriterion(model, **options)
    if teacher != "memory":
        raise ValueError(f"teacher: expected 'memory' or 'snapshot', got {teacher!r}")
    if not isinstance(dataset, WithRows):
        name = type(dataset).__name__
        raise ValueError(f"training data: expected pskd.WithRows(dataset), got {name}")
    return MemoryCriterion(len(dataset), num_classes, **options)


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean loss without a teacher, on the CPU torch's to the last bit.

    Not where rows are ignored: torch's is NaN if all of them are, or if one of them holds NaN.
    """
    fits = logits.dim() == 2 and logits.shape[:1] == target.shape and len(target) > 0
    if not fits or target.device.type != "cpu" or bool((target == _IGNORED).any()):
        return pskd_cross_entropy(logits, target, None, 0.0, label_smoothing=label_smoothing)
    check_rows(target, logits.size(1), None)
    check_labels(target, logits.size(1), ignore_index=None)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


def _bare(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DDP and torch.compile, in any nesting."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner
