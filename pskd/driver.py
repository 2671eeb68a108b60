"""The one place that knows epoch, alpha, when a teacher turns, and what a resume may change."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn

from pskd.checks import check_epoch, check_keys
from pskd.schedule import SCHEDULE_OPTIONS, AlphaSchedule, check_unchanged
from pskd.teachers import Teacher

__all__ = ["EpochDriver"]


class EpochDriver:
    """Drives alpha and the teacher through a training; a framework's events are translated to it.

    Args:
        schedule: alpha.
        teacher: is not asked where ``alpha_final`` is 0.
        student: the bare module, which a teacher may copy.
        options: what else makes two trainings different ones: a checkpoint of others is refused.
    """

    def __init__(
        self,
        schedule: AlphaSchedule,
        teacher: Teacher | None,
        student: nn.Module | None,
        options: Mapping[str, object],
    ) -> None:
        self.schedule, self._student, self._options = schedule, student, options
        self.teacher = teacher if schedule.alpha_final else None
        #: The epoch that is trained, from 1; 0 before the first.
        self.epoch = 0
        #: Weight of the teacher now; 0 in the first epoch, which has none.
        self.alpha = 0.0

    def begin_epoch(self, epoch: int) -> None:
        """Turn the teacher and set alpha; in every process.

        Args:
            epoch: from 1 to the number of epochs.

        Raises:
            ValueError: if it is none of them, or not the one after the last; as the teacher's turn.
        """
        try:
            epoch = operator.index(epoch)  # of numpy or torch too; a state has plain values
        except TypeError:
            raise ValueError(f"epoch: expected an integer, got {epoch!r}") from None
        self.schedule.check_next(epoch, self.epoch)
        if self.teacher is not None:
            self.teacher.turn(self.epoch, self._student)
        self.enter(epoch)

    def enter(self, epoch: int, progress: float | None = None) -> None:
        """Set epoch and alpha alone, where the teacher has turned or was restored.

        Args:
            epoch: that is trained.
            progress: in the unit of the schedule, if that is not epochs.
        """
        self.epoch, self.alpha = epoch, self.schedule.at(epoch, progress)

    def options(self) -> dict[str, object]:
        """Return what makes two trainings different ones."""
        return self.schedule.options() | dict(self._options)

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and options, for a checkpoint; the teacher's state is its own."""
        return {"epoch": self.epoch, "options": self.options()}

    def check_state_dict(
        self, state: object, name: str, *, allowed: bool = False, allowed_by: str = ""
    ) -> None:
        """Raise ValueError unless a state is that of a training of these options.

        Args:
            state: of `state_dict`.
            name: of it, for the message.
            allowed: whether the schedule may be another.
            allowed_by: the option that allows it, for the message.
        """
        check_keys(name, state, ("epoch", "options"))
        assert isinstance(state, dict)
        check_unchanged(
            state["options"],
            self.options(),
            changeable=SCHEDULE_OPTIONS if allowed_by else (),
            allowed=allowed,
            allowed_by=allowed_by,
        )
        check_epoch(state["epoch"], None if allowed_by else int(self.schedule.num_epochs))

    def load_teacher(self, state: Mapping[str, Any], key: str = "teacher") -> None:
        """Restore the teacher from a checkpoint that holds it, or change nothing and raise."""
        if self.teacher is not None and key in state:
            self.teacher.load_state_dict(state[key], self._student)
