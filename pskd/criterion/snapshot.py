"""PS-KD for a training loop, with last epoch's weights as the teacher.

Shapes: N rows of a batch, C classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pskd.checks import check_batch
from pskd.criterion.base import Criterion, cross_entropy
from pskd.rows import check_given, check_range
from pskd.stats import ExampleStats
from pskd.targets import check_teacher, row_alphas
from pskd.teachers import SnapshotTeacher, make_teacher

__all__ = ["SnapshotCriterion"]


def _logits_of(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


class SnapshotCriterion(Criterion):
    """Cross-entropy softened by what last epoch's weights say of the same batch.

        criterion = pskd.SnapshotCriterion(model, num_epochs=300)
        for epoch in range(1, 301):
            criterion.begin_epoch(epoch)
            for inputs, target in loader:
                loss = criterion(model(inputs), target, inputs)

    One more forward a step, in eval mode, and no need to know which sample a row is. Without
    autograd (``torch.no_grad()``, a validation) it is the plain cross-entropy. In the first epoch,
    which has no teacher, a copy of the model scores the first batch, so that what the second epoch
    would refuse is refused then.

    Args:
        model: the student; may be wrapped in DDP or compiled.
        num_epochs, alpha_final, alpha_schedule, label_smoothing, weight, examples: as of
            `MemoryCriterion`.
        logits_of: takes what the model returns and gives its (N, C) logits; if not given, they are
            what it returns or the attribute or key ``logits`` of it. A function of a module can
            be pickled, a lambda cannot.
        teacher: one of `pskd.teachers.MODEL_TEACHERS`.

    Raises:
        ValueError: for an option out of range, or a model that cannot be copied.

    Source: Kim et al. 2021, section 3.1, the form that keeps last epoch's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_epochs: int,
        alpha_final: float = 0.8,
        alpha_schedule: str = "linear",
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        examples: ExampleStats | None = None,
        logits_of: Callable[[Any], Tensor] = _logits_of,
        teacher: str = "snapshot",
    ) -> None:
        super().__init__(num_epochs, alpha_final, alpha_schedule, label_smoothing, examples, weight)
        self._student = _bare(model)
        self._logits_of = logits_of
        self.teacher = make_teacher(teacher)
        self._tried: Tensor | None = None  # what the first epoch's copy said of the first batch
        self._is_tried = not self.alpha_final
        self._drive(self.teacher, self._student, {"teacher": teacher})
        if self.alpha_final:
            self.teacher.check(self._student)

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
            target: (N,) integer labels, or (N, C) probabilities.
            inputs, named_inputs: what the student was called with.
            rows: (N,) which samples they are, for `examples`; may be missing.

        Raises:
            ValueError: without inputs, which the teacher is called with; labels or shapes that the
                loss refuses.
            RuntimeError: if no epoch was begun.
        """
        if not torch.is_grad_enabled():
            return cross_entropy(logits, target, weight=self.weight)
        if self.alpha_final and not (inputs or named_inputs):  # in the first epoch too
            raise ValueError("inputs: expected what the model was called with, got none")
        return self.loss(logits, target, self.score(*inputs, **named_inputs), rows)

    @torch.no_grad()
    def score(self, *inputs: object, **named_inputs: object) -> Tensor | None:
        """Return the teacher's (N, C) probabilities of a batch; None in the first epoch.

        Args:
            inputs, named_inputs: what the student is called with.

        Raises:
            RuntimeError: if no epoch was begun, or none since a state was loaded that has no
                teacher.
        """
        if not self.epoch:
            raise RuntimeError("expected begin_epoch(1) before the first batch")
        if not self.alpha:
            if not (self._is_tried or torch.compiler.is_compiling()):
                self._try(inputs, named_inputs)
            return None
        if not self.teacher.available:
            raise RuntimeError(
                f"expected begin_epoch({self.epoch + 1}): the state that was loaded is that of an "
                "epoch's end (inside one, save state_dict(inside_epoch=True))"
            )
        return self._probs(self.teacher.model, inputs, named_inputs)

    def _probs(
        self, model: nn.Module, inputs: tuple[object, ...], named: dict[str, object]
    ) -> Tensor:
        logits = self._logits_of(model(*inputs, **named))
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = type(logits).__name__
            if isinstance(logits, Tensor):
                got = f"a tensor of shape {tuple(logits.shape)}"
            raise ValueError(
                f"model: expected it to return (N, C) logits in eval mode, got {got}; logits_of= "
                "takes a function that gives them, such as operator.itemgetter(0)"
            )
        return logits.float().softmax(dim=1)

    def _try(self, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        """Score the first batch, as the second epoch will, and leave no trace."""
        teacher = SnapshotTeacher()
        teacher.refresh(self._student)
        devices = {p.device for p in self._student.parameters() if p.is_cuda}
        # A model may draw numbers in eval mode too.
        with torch.random.fork_rng(devices), _not_called(self._student):
            self._tried = self._probs(teacher.model, inputs, named)
        self._is_tried = True

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        past: Tensor | None,
        rows: Tensor | None = None,
        *,
        recorded: bool = True,
    ) -> Tensor:
        """Return the mean loss against what `score` returned of the same inputs.

        Args:
            logits, target, rows: as of the call.
            past: (N, C) probabilities, or None.
            recorded: whether the means and the examples are told.

        Raises:
            ValueError: labels, shapes or rows that do not fit.
        """
        check_batch(logits, target)
        check_teacher(self._tried, *logits.shape)
        alpha, self._tried = None, None
        if past is not None:
            # By a product: a graph takes other numbers as its factor, not as a size or filling.
            alpha = row_alphas(self.alpha, logits.new_ones(len(logits), dtype=torch.bool))
        if rows is not None:
            rows = check_given(rows, len(logits))
            if self.examples is not None:
                check_range(rows, self.examples.num_rows)
        return self._loss(logits, target, past, alpha, rows, recorded=recorded)

    def state_dict(self, *, inside_epoch: bool = False) -> dict[str, Any]:
        state = super().state_dict(inside_epoch=inside_epoch)
        teacher = self.teacher.state_dict(ended=not inside_epoch)
        return state if teacher["model"] is None else state | {"teacher": teacher}

    def _load_teacher(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state.get("teacher", {"model": None}), self._student)


@contextlib.contextmanager
def _not_called(student: nn.Module) -> Iterator[None]:
    """Raise ValueError if the student computes: its copy would then be no past of it."""

    def refuse(module: nn.Module, inputs: object) -> None:
        raise ValueError(
            f"model: expected a copy that computes by itself, got one that calls the model's own "
            f"{type(module).__name__}: a closure over the model, in its forward or a hook, is not "
            "copied; make it a method, or take MemoryCriterion"
        )

    modules = (m for m in student.modules() if not isinstance(m, torch.jit.ScriptModule))
    hooks = [module.register_forward_pre_hook(refuse) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
