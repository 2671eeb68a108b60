"""Where alpha is set and the teacher refreshed: the one file that learns that an epoch began.

fairseq tells a criterion nothing of epochs or updates, but its trainer calls the task:
``begin_epoch`` at the start of every epoch and once more after a resume in the middle of one,
``train_step`` for every micro-batch, ``get_checkpoint_dict`` and ``set_checkpoint_dict`` around a
checkpoint. These four are extended on the task's instance; any task keeps its class and its own
versions, which are called first.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from torch import nn

from pskd.distributed import is_first
from pskd.driver import EpochDriver
from pskd.schedule import AlphaSchedule, check_alpha
from pskd.teachers import make_teacher
from pskd_fairseq import checkpoint
from pskd_fairseq.config import PSKDCriterionConfig
from pskd_fairseq.memory import TokenMemory
from pskd_fairseq.resume import kept_memories

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule(AlphaSchedule):
    """Alpha as a function of the epoch, or of the update where only their number is known.

    Attributes:
        unit: of ``num_epochs``, ``epoch`` or ``update``.
    """

    unit: str = "epoch"

    @classmethod
    def build(
        cls, name: str, alpha_final: float, max_epoch: int, max_update: int, start_epoch: int = 1
    ) -> Schedule:
        """Choose the unit of progress from fairseq's two limits, of which 0 means none.

        Raises:
            ValueError: if alpha is no weight or training has no end to make progress towards.
        """
        check_alpha(alpha_final, "--pskd-alpha-final")
        if start_epoch < 1 or (0 < max_epoch < start_epoch):
            end = f" to --max-epoch {max_epoch}" if max_epoch > 0 else " or more"
            raise ValueError(f"--pskd-start-epoch: expected 1{end}, got {start_epoch}")
        if max_epoch > 0:
            return cls(alpha_final, max_epoch, name, start_epoch, "epoch")
        if max_update > 0:
            return cls(alpha_final, max_update, name, start_epoch, "update")
        raise ValueError(
            "PS-KD grows alpha towards the end of training: expected --max-epoch or --max-update, "
            f"got --max-epoch {max_epoch} --max-update {max_update} (no end)"
        )

    def at(self, epoch: int, progress: float | None = None) -> float:
        """As `AlphaSchedule.at`; past the end alpha stays final."""
        # A finished run that is started again makes one more step before fairseq stops it.
        return super().at(epoch, min(epoch if progress is None else progress, self.num_epochs))

    def options(self) -> dict[str, object]:
        """Return what a checkpoint keeps of it, and a resumed run is compared with."""
        return {
            "name": self.alpha_schedule,
            "alpha_final": self.alpha_final,
            "unit": self.unit,
            "total": self.num_epochs,
            "start_epoch": self.start_epoch,
        }


class EpochState:
    """The alpha and the teacher of the running epoch, kept true by the task's own calls.

    Args:
        schedule: alpha.
        train_subset: the name of the training data.
        memory: in place of the snapshot.
        options: what beside the schedule makes two trainings different ones, for the checkpoint.
    """

    def __init__(
        self,
        schedule: Schedule,
        train_subset: str,
        memory: TokenMemory | None,
        options: Mapping[str, object],
    ) -> None:
        self.schedule, self.memory = schedule, memory
        name = str(options.get("--pskd-teacher", "snapshot"))
        self.teacher = make_teacher("snapshot" if memory is not None else name)
        self.is_dummy = False  # a batch that stands in where a process has none left
        # The teacher turns here: a memory needs the data set, a snapshot the model of the call.
        self._driver = EpochDriver(schedule, None, None, {})
        self._train_subset, self._options = train_subset, dict(options)
        self._checkpoint_bytes = 0
        self._restored: dict | None = None
        self._parts: dict[int, str] = {}

    def attach(self, task: FairseqTask, plan: PSKDCriterionConfig) -> None:
        """Let the task's calls from fairseq's trainer reach this object."""
        _extend(task, "begin_epoch", after=partial(self._begin_epoch, task, plan))
        _extend(task, "set_checkpoint_dict", after=self._set_checkpoint_dict)
        _extend(task, "train_step", before=self._before_train_step)
        original = getattr(task, "get_checkpoint_dict", dict)
        task.get_checkpoint_dict = lambda: self._get_checkpoint_dict(task, plan, original())

    @property
    def alpha(self) -> float:
        """Weight of the teacher in this step."""
        return self._driver.alpha

    @property
    def active(self) -> bool:
        """Whether this step has a teacher to learn from."""
        teacher = self.teacher if self.memory is None else self.memory
        return teacher.available and self.alpha > 0.0

    @property
    def records(self) -> bool:
        """Whether this step's predictions are kept for the next epoch."""
        has_teacher = self.schedule.alpha_final > 0.0
        return self.memory is not None and has_teacher and not self.is_dummy

    def _enter(self, unit: str, epoch: int, progress: int) -> None:
        if self.schedule.unit == unit:
            self._driver.enter(epoch, progress)

    def _begin_epoch(
        self, task: FairseqTask, plan: PSKDCriterionConfig, epoch: int, model: BaseFairseqModel
    ) -> None:
        restored, self._restored = self._restored, None
        # fairseq saves the model, and Adam its two averages, in float32.
        self._checkpoint_bytes = 3 * 4 * sum(p.numel() for p in model.parameters())
        self._driver.epoch = epoch
        self._enter("epoch", epoch, epoch)
        if not self.schedule.alpha_final:
            return
        if self.memory is not None:
            if state := (restored or {}).get("memory"):
                self.memory.load_state_dict(state)
            kept = kept_memories(plan, task) if is_first() else []
            self.memory.begin_epoch(epoch, task.dataset(self._train_subset), kept)
            return
        self._parts = {id(part): name for name, part in model.named_modules()}
        if restored is not None:
            self.teacher.load_state_dict(restored["teacher"], student=model)
            # In the middle of an epoch the model is no longer the one that ended the last.
            if self.teacher.available and restored["epoch"] == epoch:
                logger.info("PS-KD: restored the teacher of epoch %d", epoch)
                return
        if epoch > 1:
            self.teacher.refresh(model)
        else:
            self.teacher.check(model)

    def teacher_of(self, model: nn.Module) -> nn.Module:
        """Return the teacher of the model that a batch is given to.

        A multilingual task trains the parts of its model in turns; each has its own part of the
        teacher. What wraps the model for several processes is no part of it.
        """
        return self.teacher.model.get_submodule(self._parts.get(id(model), ""))

    def _before_train_step(
        self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **_
    ) -> None:
        self.is_dummy = ignore_grad
        self._enter("update", self._driver.epoch, update_num + 1)

    def _get_checkpoint_dict(
        self, task: FairseqTask, plan: PSKDCriterionConfig, state: dict
    ) -> dict:
        # At an epoch's end the model in the checkpoint is the next teacher. Sharded data has no
        # cached iterator; the teacher is then always saved.
        iterator = task.dataset_to_epoch_iter.get(task.datasets.get(self._train_subset))
        ended = iterator is not None and iterator.end_of_epoch()
        teacher = self.teacher.state_dict(ended=ended)
        checkpoint.check_free_space(
            plan, first=self._checkpoint_bytes, growth=checkpoint.size_of(teacher)
        )
        entry = checkpoint.make_entry(
            epoch=self._driver.epoch,
            schedule=self.schedule.options(),
            options=self._options,
            vocabulary=checkpoint.vocabulary_sizes(task),
            teacher=teacher,
            memory=None if self.memory is None else self.memory.state_dict(ended=ended),
        )
        name = type(task).__name__
        return {**state, name: {**state.get(name, {}), checkpoint.ENTRY: entry}}

    def _set_checkpoint_dict(self, state: dict) -> None:
        self._restored = state.get(checkpoint.ENTRY)


def _nothing(*_args, **_kwargs) -> None: ...


def _extend(owner: object, name: str, before=_nothing, after=_nothing) -> None:
    """Call a function before or after a method of one object, and keep the method's result."""
    original = getattr(owner, name, _nothing)

    def extended(*args, **kwargs):
        before(*args, **kwargs)
        result = original(*args, **kwargs)
        after(*args, **kwargs)
        return result

    setattr(owner, name, extended)
