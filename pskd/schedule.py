"""Alpha, the weight of the teacher, as a pure function of training progress; and what a resume may
change of it.

``epoch`` counts from 1 to ``num_epochs``; any other unit of progress (updates, iterations) can be
given in its place, as long as both arguments use the same one.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import SupportsFloat

from pskd.files import same_value, shown

__all__ = [
    "SCHEDULES",
    "SCHEDULE_OPTIONS",
    "AlphaSchedule",
    "check_alpha",
    "check_unchanged",
    "constant_alpha",
    "cosine_alpha",
    "linear_alpha",
]


def check_alpha(alpha: SupportsFloat, name: str = "alpha") -> float:
    """Return ``alpha`` as a float if it is a weight, that is a number in [0, 1].

    Raises:
        ValueError: if it is not a number, NaN, or outside [0, 1].
    """
    try:
        value = float(alpha)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a number in [0, 1], got {shown(alpha)}") from None
    if not 0.0 <= value <= 1.0:  # NaN fails the comparison too
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def _check_progress(epoch: float, num_epochs: float) -> float:
    if not num_epochs > 0 or math.isinf(num_epochs):
        raise ValueError(f"num_epochs: expected a finite number above 0, got {num_epochs}")
    if not 0 <= epoch <= num_epochs:
        raise ValueError(f"epoch: expected a number in [0, {num_epochs}], got {epoch}")
    return epoch / num_epochs


def linear_alpha(epoch: float, num_epochs: float, alpha_final: float) -> float:
    """Alpha grows in proportion to progress: ``alpha_final * epoch / num_epochs``.

    Args:
        epoch: the current epoch, counted from 1.
        num_epochs: the number of epochs of the whole training.
        alpha_final: alpha of the last epoch, the paper's alpha_T, in [0, 1].

    Returns:
        alpha of this epoch, in [0, alpha_final].

    Raises:
        ValueError: if ``alpha_final`` is no weight or ``epoch`` lies outside the training.

    Source: Kim et al. 2021, section 3.1 (the published schedule).
    """
    return check_alpha(alpha_final, "alpha_final") * _check_progress(epoch, num_epochs)


def constant_alpha(epoch: float, num_epochs: float, alpha_final: float) -> float:
    """Alpha is ``alpha_final`` in every epoch.

    Args and Raises are those of `linear_alpha`.
    """
    _check_progress(epoch, num_epochs)
    return check_alpha(alpha_final, "alpha_final")


def cosine_alpha(epoch: float, num_epochs: float, alpha_final: float) -> float:
    """Alpha rises along half a cosine: ``alpha_final * (1 - cos(pi * epoch / num_epochs)) / 2``.

    Slower than `linear_alpha` while predictions are poor and faster in the middle of training.
    Args and Raises are those of `linear_alpha`.
    """
    progress = _check_progress(epoch, num_epochs)
    return check_alpha(alpha_final, "alpha_final") * (1.0 - math.cos(math.pi * progress)) / 2.0


#: The schedules by the name that configs and flags use.
SCHEDULES = {"linear": linear_alpha, "constant": constant_alpha, "cosine": cosine_alpha}


@dataclass(frozen=True)
class AlphaSchedule:
    """Alpha of a whole training: 0 while there is no teacher, then the schedule's.

    Attributes:
        alpha_final: alpha at the end of training (the paper's alpha_T), in [0, 1].
        num_epochs: of the whole training; or its number of updates, see `at`.
        alpha_schedule: ``"linear"``, ``"constant"`` or ``"cosine"``.
        start_epoch: before it alpha is 0. It is 0 in the first epoch whatever this says, for there
            is nothing to learn from.

    Raises:
        ValueError: for a value out of range, by the name of its attribute.
    """

    alpha_final: float
    num_epochs: float
    alpha_schedule: str = "linear"
    start_epoch: int = 1

    def __post_init__(self) -> None:
        # A frozen dataclass has no other way to keep the checked value.
        object.__setattr__(self, "alpha_final", check_alpha(self.alpha_final, "alpha_final"))
        if not self.num_epochs >= 1 or math.isinf(self.num_epochs):
            raise ValueError(f"num_epochs: expected 1 or more, got {self.num_epochs}")
        if self.alpha_schedule not in SCHEDULES:
            expected, got = ", ".join(SCHEDULES), self.alpha_schedule
            raise ValueError(f"alpha_schedule: expected one of {expected}, got {got!r}")
        if self.start_epoch < 1:
            raise ValueError(f"start_epoch: expected 1 or more, got {self.start_epoch}")

    def at(self, epoch: int, progress: float | None = None) -> float:
        """Return alpha of an epoch, counted from 1.

        Args:
            epoch: tells whether there is a teacher.
            progress: how far training has come, in the unit of ``num_epochs``, if that is not
                epochs.

        Raises:
            ValueError: if the progress lies outside the training.
        """
        if epoch <= 1 or epoch < self.start_epoch:
            return 0.0
        progress = epoch if progress is None else progress
        return SCHEDULES[self.alpha_schedule](progress, self.num_epochs, self.alpha_final)

    def check_next(self, epoch: int, last: int) -> None:
        """Raise ValueError unless an epoch is of this training and the one after the last.

        Args:
            epoch: that is to begin.
            last: that was begun before it, or that a resumed run goes on after; 0 if none was.
        """
        if not 1 <= epoch <= self.num_epochs:
            raise ValueError(f"epoch: expected one of 1 to {self.num_epochs}, got {epoch}")
        if epoch != last + 1:
            raise ValueError(f"epoch: expected {last + 1} after the last, got {epoch}")

    def options(self) -> dict[str, object]:
        """Return what makes two trainings different ones; without a teacher the rest is unused."""
        return asdict(self) if self.alpha_final else {"alpha_final": self.alpha_final}


#: The names of `AlphaSchedule.options`.
SCHEDULE_OPTIONS = frozenset(AlphaSchedule.__dataclass_fields__)


def check_unchanged(
    saved: Mapping[str, object],
    now: Mapping[str, object],
    *,
    changeable: Collection[str] = (),
    allowed: bool = False,
    allowed_by: str = "",
) -> None:
    """Refuse to go on with other options than those of a checkpoint.

    Args:
        saved: the options in the checkpoint. What it lacks, as older ones do, may be anything.
        now: those of the run that would go on.
        changeable: the names of those that may change if that is allowed.
        allowed: whether it is.
        allowed_by: the option that allows it, for the message.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"options: expected a mapping, got {shown(saved)}")
    for name, value in now.items():
        expected = saved.get(name, value)
        if same_value(value, expected) or (allowed and name in changeable):
            continue
        hint = f" ({allowed_by} allows it)" if allowed_by and name in changeable else ""
        raise ValueError(
            f"{name}: expected {shown(expected)}, with which the checkpoint was trained, got "
            f"{value!r}{hint}"
        )
