"""The teachers: what an `EpochDriver` asks of one, and those that are past weights.

A teacher is a model, which an adapter calls on the student's batch, or a memory, which it reads and
writes by row. The driver sees neither: it turns the teacher at an epoch's end and saves its state.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

from pskd.distributed import take_buffers_of_first_process
from pskd.files import shown

__all__ = [
    "MODEL_TEACHERS",
    "TEACHERS",
    "EMATeacher",
    "SnapshotTeacher",
    "Teacher",
    "load_into",
    "make_teacher",
]


class Teacher(Protocol):
    """What a training asks of a teacher, whatever it is."""

    @property
    def available(self) -> bool:
        """Whether there is a past to learn from; in the first epoch there is none."""

    def turn(self, ended: int, student: nn.Module | None) -> None:
        """Make what an epoch left the past; a collective of all processes.

        Args:
            ended: the epoch that ended, 0 before the first.
            student: the bare module, as that epoch left it.
        """

    def state_dict(self, *, ended: bool = False) -> dict[str, Any]:
        """Return what a checkpoint needs; ``ended`` tells that `turn` comes next."""

    def load_state_dict(self, state_dict: dict[str, Any], student: nn.Module | None) -> None:
        """Restore what `state_dict` returned, or change nothing and raise ValueError."""


class SnapshotTeacher:
    """Holds a frozen copy of the student that scores this epoch's batches.

    Deliberately not an `nn.Module`: kept as an attribute of a model or a loss it adds nothing to
    the owner's parameters, state dict, optimizer or DDP buckets, and the owner's ``train()`` does
    not switch its dropout back on.

    Source: Kim et al. 2021, section 3.1, the form that keeps last epoch's weights in place of all
    of last epoch's predictions.
    """

    #: Whether the teacher is the student of one moment, and not a mean over several.
    _model_is_copy = True

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    @property
    def available(self) -> bool:
        """Whether a past model exists; in the first epoch there is none."""
        return self._model is not None

    @property
    def model(self) -> nn.Module:
        """The frozen copy, in eval mode, on the student's device and in its dtype.

        Raises:
            RuntimeError: if there is none yet.
        """
        if self._model is None:
            raise RuntimeError("the teacher has no model: expected refresh() at an epoch's end")
        return self._model

    def check(self, student: nn.Module) -> None:
        """Raise ValueError if `refresh` could not copy a student; makes a copy and frees it.

        For the start of a training: the first `refresh` comes an epoch later.
        """
        self._frozen_copy(student)

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> None:
        """Take the student's present weights and buffers as the teacher's.

        The first call copies the module, later ones its state only, so the teacher's memory is
        allocated once and an ever longer chain of copies cannot arise. A student whose tensors have
        since changed their names, shapes, dtype or device is copied anew.

        Args:
            student: the bare module; unwrap DDP first (``model.module``).

        Raises:
            ValueError: if it cannot be copied; the message names the attribute that prevents it.
        """
        if self._model is None or _kinds(self._model) != _kinds(student):
            self._model = self._frozen_copy(student)
            return
        self._model.load_state_dict(student.state_dict())
        for own, new in zip(self._model.buffers(), student.buffers(), strict=True):
            own.copy_(new)  # a state dict leaves out those that are not persistent

    def refresh_in_all(self, student: nn.Module) -> None:
        """As `refresh`, with the same teacher in every process of a training; a collective.

        The statistics of batch norm differ between processes: the teacher's are the first's.
        """
        self.refresh(student)
        take_buffers_of_first_process(self.model)

    def turn(self, ended: int, student: nn.Module | None) -> None:
        """As `refresh_in_all` after each epoch."""
        if ended and student is not None:  # before the first epoch the weights are random
            self.refresh_in_all(student)

    def state_dict(self, *, ended: bool = False) -> dict[str, dict[str, Tensor] | None]:
        """Return the weights on the CPU, in their own dtype; None in their place if none.

        Args:
            ended: whether the epoch is over: the student's weights, which a checkpoint has anyway,
                are the next teacher's then, and None is returned.
        """
        if self._model is None or (ended and self._model_is_copy):
            return {"model": None}
        state = self._model.state_dict()
        return {
            "model": {
                name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for name, value in state.items()
            }
        }

    def load_state_dict(
        self, state_dict: dict[str, dict[str, Tensor] | None], student: nn.Module | None = None
    ) -> None:
        """Restore the teacher that `state_dict` saved, bit for bit.

        Args:
            state_dict: what `state_dict` returned.
            student: gives the architecture to a teacher that holds no copy yet: a state holds
                weights only. Its own weights are not used.

        Raises:
            ValueError: if the state is no teacher's, there is no architecture to load it into, or
                names or shapes of the weights do not match; the teacher is what it was then.
        """
        if not isinstance(state_dict, dict) or "model" not in state_dict:
            got = shown(state_dict)
            raise ValueError(f"expected a teacher's state with the key 'model', got {got}")
        weights = state_dict["model"]
        if weights is None:
            self._model = None
            return
        source = self._model if student is None else student
        if source is None:
            raise ValueError("expected a student to take the architecture from, got none")
        # torch loads what fits before it raises: a mismatch must leave the teacher that was.
        model = self._frozen_copy(source)
        try:
            load_into(model, weights)
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from error
        self._model = model

    @torch.no_grad()  # TorchScript copies by operators
    def _frozen_copy(self, student: nn.Module) -> nn.Module:
        # A student that carries this teacher does not take the old copy into the new one.
        memo: dict[int, Any] = {id(self): type(self)()}
        try:
            with _CopiesComputed():
                model = copy.deepcopy(student, memo)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # what a module keeps may raise anything
            reason = str(error).partition("\n")[0].rstrip(".")
            raise _refused(f"got {_what_fails(student)}: {reason}") from error
        own = set(map(id, model.modules()))
        for name, module in student.named_modules():
            if id(module) in own:  # to freeze it would freeze the student
                raise _refused(f"got {_named(student, name)}, whose copy is itself")
        for (
            parameter
        ) in model.parameters():  # requires_grad_() serves no TorchScript, no LazyLinear
            parameter.requires_grad = False
        return model.eval()


class _CopiesComputed(TorchFunctionMode):
    """Lets `copy.deepcopy` copy the values of tensors that were computed, which torch refuses.

    Modules keep such tensors: the weight of `torch.nn.utils.weight_norm` or of pruning, which is
    computed anew in each forward, or an output for a later look.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _refused(got: str) -> ValueError:
    return ValueError(
        f"model: the teacher is a copy of it: expected one that copy.deepcopy copies, {got}; leave "
        "what cannot be copied out of the module (or of its __getstate__), or train with a memory"
    )


def _what_fails(student: nn.Module) -> str:
    """Name the first attribute that cannot be copied, or the class if no single one fails."""
    modules = {id(module): module for module in student.modules()}  # each is looked at by itself
    for name, module in student.named_modules():
        try:
            # Parametrized modules have a way of their own, and no state.
            state = vars(module) if hasattr(module, "__deepcopy__") else module.__getstate__()
        except Exception:
            return _named(student, name)
        for key, value in (state if isinstance(state, dict) else vars(module)).items():
            try:
                with _CopiesComputed():
                    copy.deepcopy(value, dict(modules))
            except Exception:
                return f"{_named(student, name)} with the attribute {key!r}"
    return type(student).__name__


def _named(student: nn.Module, name: str) -> str:
    kind = type(student.get_submodule(name)).__name__
    return f"{kind} {name!r}" if name else kind


def load_into(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a module's state, and tell of a mismatch in a line.

    Raises:
        ValueError: naming the first weight of another shape, or else those that are missing or
            too many.
    """
    try:
        module.load_state_dict(weights)
    except (TypeError, AttributeError) as error:  # it is no state dict
        raise ValueError(f"expected the weights of this model: {error}") from error
    except RuntimeError as error:
        # Below a line with the class one for all names that do not fit, then one for each shape.
        lines = str(error).split("\n\t")
        shapes = [line for line in lines if line.startswith("size mismatch")]
        first = (shapes + lines[1:] + lines)[0].strip()
        raise ValueError(f"expected the weights of this model: {first}") from error


def _kinds(module: nn.Module) -> list[tuple[str, torch.dtype, torch.device, torch.Size | None]]:
    """Return what copying values into a module leaves as it is: its tensors, but for the values."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return [
        (name, tensor.dtype, tensor.device, None if is_lazy(tensor) else tensor.shape)
        for name, tensor in tensors
    ]


class EMATeacher(SnapshotTeacher):
    """The exponential mean of the weights that the epochs ended with: half the last, half the mean.

    Steadier than the last epoch's weights alone where these jump, as at a high learning rate.
    Statistics of batch norm are the last epoch's.

    Source: Tarvainen and Valpola 2017 (mean teacher), by the epoch in place of the step.
    """

    _model_is_copy = False
    decay = 0.5

    @torch.no_grad()
    def refresh(self, student: nn.Module) -> None:
        if self._model is None or _kinds(self._model) != _kinds(student):
            return super().refresh(student)
        mean = [own.clone() for own in self._model.parameters()]
        super().refresh(student)
        pairs = [
            pair
            for pair in zip(mean, self._model.parameters(), strict=True)
            if pair[0].is_floating_point()
        ]
        average = get_ema_multi_avg_fn(self.decay)
        average([past for past, _ in pairs], [own.clone() for _, own in pairs], 1)
        for past, own in pairs:
            own.copy_(past)


#: The teachers that are past weights, by the name that configs and flags use.
MODEL_TEACHERS: dict[str, type[SnapshotTeacher]] = {
    "snapshot": SnapshotTeacher,
    "ema": EMATeacher,
}

#: All of them.
TEACHERS = ("memory", *MODEL_TEACHERS)


def make_teacher(name: str) -> SnapshotTeacher:
    """Return a teacher of `MODEL_TEACHERS`; raise ValueError for another name."""
    if name not in list(MODEL_TEACHERS):  # which may be compared with anything
        expected = ", ".join(map(repr, MODEL_TEACHERS))
        raise ValueError(f"teacher: expected one of {expected}, got {name!r}")
    return MODEL_TEACHERS[name]()
