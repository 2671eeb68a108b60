"""The one place that learns that an epoch began: there alpha is set and the teacher refreshed."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.modeling import ROIHeads
from detectron2.utils import comm
from torch import nn

from pskd.checks import check_keys
from pskd.driver import EpochDriver
from pskd.schedule import SCHEDULE_OPTIONS, AlphaSchedule, check_unchanged
from pskd.teachers import make_teacher
from pskd_detectron2.config import check_options
from pskd_detectron2.memory import AnnotationMemory
from pskd_detectron2.state import PSKDState
from pskd_tools.checkpoint import load_archive, naming

logger = logging.getLogger("detectron2." + __name__)

# What ALLOW_SCHEDULE_CHANGE allows to be another after a resume.
_CHANGEABLE = SCHEDULE_OPTIONS | {"epoch_iters"}
_LOGGED = ("pskd/teacher_nll", "pskd/teacher_agreement", "pskd/gradient_rescaling")


class PSKDHook(HookBase):
    """Drives PS-KD in a Detectron2 trainer of any kind; register it before a checkpoint is loaded.

    An epoch is ``epoch_iters`` iterations: Detectron2's stream of images has no epochs of its own.
    The teacher travels in the checkpoint, under this hook's state; at an epoch's last iteration the
    model in the checkpoint *is* the next snapshot.

    Args:
        model: holds ``backbone`` and PSKD ``roi_heads``; may be wrapped in DDP.
        epoch_iters: iterations of an epoch, at least 1.
        alpha_final: weight of the teacher at the end of training (the paper's alpha_T); 0 trains as
            Detectron2 does and keeps no teacher.
        alpha_schedule: ``"linear"``, ``"constant"`` or ``"cosine"``.
        teacher: one of `pskd.teachers.TEACHERS`.
        output_dir: where older checkpoints have their memory, in a file of its own.
        num_annotations: of the training set, one memory row each; needed with the memory.
        fingerprint: names the training set; a checkpoint of another one is refused. Empty: unknown.
        checkpoint_period: iterations between checkpoints, before which the processes' parts of the
            memory are brought together.
        allow_schedule_change: resume with another alpha, schedule or length (of an epoch or of the
            training) than the checkpoint's.
        log_period: iterations between two lines in the log.

    Raises:
        ValueError: for an option out of range, a model without PSKD heads, or with the snapshot one
            that cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epoch_iters: int,
        alpha_final: float = 0.7,
        alpha_schedule: str = "linear",
        teacher: str = "snapshot",
        output_dir: str | os.PathLike = ".",
        num_annotations: int = 0,
        fingerprint: str = "",
        checkpoint_period: int = 0,
        allow_schedule_change: bool = False,
        log_period: int = 20,
    ) -> None:
        check_options(alpha_final, alpha_schedule, teacher)
        if epoch_iters < 1:
            raise ValueError(f"epoch_iters: expected 1 or more, got {epoch_iters}")
        self._model = getattr(model, "module", model)
        heads = getattr(self._model, "roi_heads", None)
        if heads is None or not isinstance(getattr(heads, "pskd", None), PSKDState):
            raise ValueError(f"expected a model with PSKD ROI heads, got {type(heads).__name__}")
        self._pskd: PSKDState = heads.pskd
        self._pskd.is_driven = True
        if not self._pskd.enabled:
            raise ValueError("PSKDHook: expected heads with MODEL.PSKD.ENABLED True, got False")
        _check_predictors(heads)
        self._options: dict[str, Any] = {
            "epoch_iters": epoch_iters,
            "alpha_final": float(alpha_final),
            "alpha_schedule": alpha_schedule,
            "teacher": teacher,
            "num_classes": heads.num_classes,
            "training_set": fingerprint,
            "label_smoothing": self._pskd.label_smoothing,
            "foreground_only": self._pskd.foreground_only,
        }
        self._loaded_options: dict[str, object] = {}
        self._memory_loaded = False
        self._allow_schedule_change = allow_schedule_change
        self._output_dir = Path(output_dir)
        self._checkpoint_period, self._log_period = checkpoint_period, log_period
        # The RPN and the losses of the teacher are never asked for.
        student = {name: self._model.get_submodule(name) for name in ("backbone", "roi_heads")}
        self.student = nn.ModuleDict(student)
        self._pskd.memory = None
        if teacher != "memory":
            self._pskd.snapshot = make_teacher(teacher)
            if alpha_final:
                self._pskd.snapshot.check(self.student)
        elif alpha_final:
            self._pskd.memory = _new_memory(heads, num_annotations, fingerprint)
            self._pskd.rows_per_stage = num_annotations
        self._driver: EpochDriver | None = None  # until the number of epochs is known

    def before_train(self) -> None:
        """Fix the number of epochs.

        Raises:
            ValueError: if it is not the checkpoint's, or the teacher that there must be is missing.
        """
        options, start = self._options, self.trainer.start_iter
        num_epochs = math.ceil(self.trainer.max_iter / options["epoch_iters"])
        self._check_unchanged({"num_epochs": num_epochs})
        options["num_epochs"] = num_epochs
        schedule = AlphaSchedule(options["alpha_final"], num_epochs, options["alpha_schedule"])
        teacher = self._pskd.memory or self._pskd.snapshot
        self._driver = EpochDriver(schedule, teacher, self.student, {})
        logger.info("PS-KD: %s", ", ".join(f"{name} {value}" for name, value in options.items()))
        if num_epochs == 1:
            logger.warning("PS-KD: the training is one epoch long, and the first has no teacher")
        if options["alpha_final"] and not self._has_teacher(start):
            raise ValueError(
                f"iteration {start} is in epoch {start // options['epoch_iters'] + 1}: expected a "
                f"checkpoint with the {options['teacher']} of its last epoch, got one without"
            )

    def _has_teacher(self, start: int) -> bool:
        if start < self._options["epoch_iters"]:
            return True  # in the first epoch there is none to have
        if self._pskd.memory is not None:
            return self._memory_loaded
        # At an epoch's start the model itself is the teacher.
        return start % self._options["epoch_iters"] == 0 or self._pskd.snapshot.available

    def before_step(self) -> None:
        past, inside = divmod(self.trainer.iter, self._options["epoch_iters"])
        driver = self._driver
        assert driver is not None  # before_train made it
        if driver.epoch == past + 1:
            return
        # A resumed run goes on after an epoch, or inside one with the teacher that was saved.
        driver.enter(past + 1 if inside else past)
        if not inside:
            driver.begin_epoch(past + 1)
        self._pskd.alpha = driver.alpha
        total = driver.schedule.num_epochs
        logger.info("PS-KD: epoch %d of %d, alpha %.4f", driver.epoch, total, driver.alpha)

    def after_step(self) -> None:
        if self._pskd.memory is not None and self._checkpoint_follows():
            self._pskd.memory.collect()
        storage = self.trainer.storage
        storage.put_scalar("pskd/alpha", self._pskd.alpha, smoothing_hint=False)
        if (self.trainer.iter + 1) % self._log_period or not self._pskd.alpha:
            return
        latest = storage.latest()
        shown = [
            f"{name}: {latest[name][0]:.4f}"
            for name in sorted(latest)
            if name.endswith(_LOGGED)  # a cascade's stages have a prefix
        ]
        logger.info("pskd/alpha: %.4f  %s", self._pskd.alpha, "  ".join(shown))

    def _checkpoint_follows(self) -> bool:
        done = self.trainer.iter + 1
        periodic = self._checkpoint_period > 0 and done % self._checkpoint_period == 0
        return periodic or done == self.trainer.max_iter

    def state_dict(self) -> dict:
        """Return what a run that is resumed after this iteration needs."""
        state: dict = {"options": dict(self._options)}
        ended = (self.trainer.iter + 1) % self._options["epoch_iters"] == 0
        if self._pskd.memory is not None:
            state["memory"] = self._pskd.memory.state_dict()
        elif (snapshot := self._pskd.snapshot.state_dict(ended=ended))["model"] is not None:
            state["snapshot"] = snapshot
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore the teacher.

        Raises:
            ValueError: if the options changed, the teacher is another model's, or the memory is
                missing, damaged or that of another training set.
        """
        check_keys("the hook's state", state, ())
        self._loaded_options = state.get("options", {})
        self._check_unchanged(dict(self._options))
        memory = self._pskd.memory
        if memory is None:
            if self._options["alpha_final"] and "snapshot" in state:
                self._pskd.snapshot.load_state_dict(state["snapshot"], self.student)
            return
        if "memory_file" in state:
            self._read_memory(memory, state["memory_file"])
        elif "memory" in state:
            memory.load_state_dict(state["memory"])
        else:
            raise ValueError("expected a checkpoint with a memory, got one without")
        self._memory_loaded = True
        if not comm.is_main_process():
            # The sums that were saved are those of all processes: they are added up once.
            memory.forget_unfinished_epoch()

    def _check_unchanged(self, options: dict[str, object]) -> None:
        check_unchanged(
            self._loaded_options,
            options,
            changeable=_CHANGEABLE,
            allowed=self._allow_schedule_change,
            allowed_by="MODEL.PSKD.ALLOW_SCHEDULE_CHANGE True",
        )

    def _read_memory(self, memory: AnnotationMemory, name: object) -> None:
        """Load the file in which older checkpoints have their memory."""
        path = self._output_dir / str(name)
        with naming(path):
            memory.load_state_dict(load_archive(path, "the memory of the checkpoint"))


def _check_predictors(heads: ROIHeads) -> None:
    """Refuse predictors that were set after the heads were built: no teacher would reach them."""
    predictors = heads.get_submodule("box_predictor")
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else (predictors,):
        if getattr(predictor, "pskd", None) is not heads.pskd:
            raise ValueError(
                f"box_predictor: expected that of {type(heads).__name__}'s arguments, got "
                f"{type(predictor).__name__}, which was set afterwards"
            )


def _new_memory(heads: ROIHeads, num_annotations: int, fingerprint: str) -> AnnotationMemory:
    if num_annotations < 1:
        raise ValueError(f"num_annotations: expected 1 or more, got {num_annotations}")
    stages = getattr(heads, "num_cascade_stages", 1)
    device = next(heads.parameters()).device
    return AnnotationMemory(num_annotations * stages, heads.num_classes + 1, fingerprint, device)
