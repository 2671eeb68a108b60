"""The one place that learns that an epoch began: there alpha is set and the teacher refreshed."""

from __future__ import annotations

import logging

from torch import nn

from pskd.driver import EpochDriver
from pskd.schedule import AlphaSchedule
from pskd.teachers import make_teacher
from pskd_torchvision.state import PSKDState

logger = logging.getLogger(__name__)


class PSKDEpochs:
    """Drives PS-KD in any training loop that says when an epoch begins.

    Checkpoints are written at an epoch's end, when the model *is* the next teacher: beside the
    model they need nothing but this object's state.

    Args:
        model: has gone through `add_pskd`; may be wrapped in DDP.
        num_epochs: of the whole training.
        alpha_final: weight of the teacher at the end of training (the paper's alpha_T); 0 trains as
            torchvision does.
        alpha_schedule: ``"linear"``, ``"constant"`` or ``"cosine"``.
        teacher: one of `pskd.teachers.MODEL_TEACHERS`.
        allow_schedule_change: resume with another alpha, schedule or length than the checkpoint's.

    Raises:
        ValueError: for an option out of range, or a model without PSKD heads or that cannot be
            copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_epochs: int,
        alpha_final: float = 0.7,
        alpha_schedule: str = "linear",
        teacher: str = "snapshot",
        allow_schedule_change: bool = False,
    ) -> None:
        self._model = getattr(model, "module", model)
        heads = getattr(self._model, "roi_heads", None)
        if heads is None or not isinstance(getattr(heads, "pskd", None), PSKDState):
            raise ValueError("model: expected one that has gone through add_pskd, got another")
        self._pskd: PSKDState = heads.pskd
        self._pskd.snapshot = make_teacher(teacher)
        self._allow_schedule_change = allow_schedule_change
        options: dict[str, object] = {"label_smoothing": self._pskd.label_smoothing}
        if alpha_final:
            options["foreground_only"] = self._pskd.foreground_only
            options["teacher"] = teacher
        # The RPN of the teacher is never asked for.
        parts = {name: self._model.get_submodule(name) for name in ("backbone", "roi_heads")}
        student = nn.ModuleDict(parts)
        schedule = AlphaSchedule(alpha_final, num_epochs, alpha_schedule)
        self._driver = EpochDriver(schedule, self._pskd.snapshot, student, options)
        if alpha_final:
            self._pskd.snapshot.check(student)

    def begin_epoch(self, epoch: int) -> None:
        """Set alpha, and take the present weights as the teacher's; in every process of DDP.

        Args:
            epoch: from 1 to the number of epochs.

        Raises:
            ValueError: if it is none of them, or not the one after the last.
        """
        driver = self._driver
        driver.begin_epoch(epoch)
        self._pskd.alpha = driver.alpha
        if driver.teacher is not None:
            total = driver.schedule.num_epochs
            logger.info("PS-KD: epoch %d of %d, alpha %.4f", epoch, total, driver.alpha)

    def take_means(self) -> dict[str, float]:
        """Return ``pskd/alpha`` and what the teacher did since the last call, for a log.

        ``pskd/teacher_nll`` (nats) and ``pskd/teacher_agreement`` (a fraction) are means over the
        ROIs that have a teacher, ``pskd/gradient_rescaling`` is the factor on their gradients. Of
        the baseline there is nothing to tell.
        """
        if self._driver.teacher is None:
            return {}
        return {"pskd/alpha": self._pskd.alpha} | self._pskd.means.take()

    def state_dict(self) -> dict:
        """Return what a run that is resumed after this epoch needs beside the model."""
        teacher = self._pskd.snapshot.state_dict(ended=True)
        kept = {} if teacher["model"] is None else {"teacher": teacher}
        return self._driver.state_dict() | kept

    def load_state_dict(self, state: dict, *, allowed_by: str = "allow_schedule_change") -> None:
        """Go on after the epoch of the state; the model's weights must be loaded too.

        Args:
            state: of `state_dict`.
            allowed_by: what the user sets to allow another schedule, for the message.

        Raises:
            ValueError: if the options changed, those of the schedule unless that is allowed.
        """
        self._driver.check_state_dict(
            state,
            "the epochs' state",
            allowed=self._allow_schedule_change,
            allowed_by=allowed_by,
        )
        self._driver.load_teacher(state)
        self._driver.epoch = state["epoch"]
