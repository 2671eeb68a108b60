"""PS-KD for timm: a training task for its train script, or for a loop of one's own.

    - task = ClassificationTask(model, criterion=train_loss_fn, device=device)
    + task = PSKDTask(model, num_epochs=num_epochs, task_options={"device": device})

      for epoch in range(start_epoch, num_epochs):
    +     task.begin_epoch(epoch + 1)

With ``teacher="memory"`` the training set is ``RowsInTargets(dataset_train, num_classes)``, from
before it is given to ``create_loader``, and the task is given it as ``dataset``.
"""

import operator
from typing import Any

from timm.task import ClassificationTask

from pskd.criterion import MemoryCriterion, make_criterion
from pskd.criterion.base import cross_entropy
from pskd.distributed import is_distributed
from pskd.rows import WithRows, check_count

__all__ = ["PSKDTask", "RowsInTargets"]


class RowsInTargets(WithRows):
    """A data set whose targets tell which sample it is, too: ``row * num_classes + label``.

    So a row's number passes timm's collating and prefetching, which know targets of one integer
    only. Mixup and CutMix take targets for labels, so they need a snapshot.

    Args:
        dataset: of timm, torchvision or one's own, with indices; its transforms are set through it.
        num_classes: C.

    Raises:
        ValueError: as `pskd.WithRows`; for a sample whose label is no class.
    """

    def __init__(self, dataset, num_classes: int) -> None:
        super().__init__(dataset)
        self.num_classes = check_count("num_classes", num_classes)

    def __setattr__(self, name: str, value: object) -> None:
        owner = vars(self).get("dataset")
        if owner is not None and name in ("transform", "target_transform"):  # of create_loader
            setattr(owner, name, value)
        else:
            super().__setattr__(name, value)

    def _numbered(self, row: int, sample: Any) -> tuple[Any, int]:
        image, label = sample
        try:
            number = operator.index(label)
        except TypeError:  # a class is of no other kind
            number = -1
        if not 0 <= number < self.num_classes:
            expected = f"integer labels in [0, {self.num_classes - 1}]"
            raise ValueError(f"target: expected {expected}, got {label} in sample {row}")
        return image, row * self.num_classes + number


class PSKDTask(ClassificationTask):
    """Trains by a criterion of `pskd`; without gradients it is plain cross-entropy.

    Its state is in timm's checkpoints, and is restored by ``--resume``.

    Args:
        model: gives (N, C) logits.
        num_epochs: of the whole training, those of a cool-down too.
        dataset: the training's, a `RowsInTargets`; a memory needs it.
        teacher: ``"snapshot"``, ``"ema"`` or ``"memory"``.
        task_options: ``device``, ``dtype`` and ``verbose`` of `ClassificationTask`.
        options: of the criterion: ``alpha_final``, ``label_smoothing``, ...; a memory in several
            processes needs ``path``.

    Raises:
        ValueError: for an option out of range, or data that do not serve.
    """

    def __init__(
        self, model, *, num_epochs, dataset=None, teacher="snapshot", task_options=None, **options
    ) -> None:
        name, classes = type(dataset).__name__, getattr(dataset, "num_classes", 0)
        if teacher == "memory" and not isinstance(dataset, RowsInTargets):
            raise ValueError(f"dataset: expected RowsInTargets(dataset, num_classes), got {name}")
        if teacher == "memory" and is_distributed() and options.get("path") is None:
            raise ValueError("path: expected a folder for a memory of several processes, got none")
        options |= {"teacher": teacher, "num_epochs": num_epochs}
        criterion = make_criterion(model, dataset, classes, **options)
        super().__init__(model, cross_entropy, **(task_options or {}))
        self.pskd, self.num_classes = criterion, classes

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, from 1; in every process."""
        self.pskd.begin_epoch(epoch)

    def forward(self, input, target) -> dict:
        """Return loss and output; ``target`` is (N,) labels, or (N, C) probabilities of Mixup."""
        output = self.trainable_module(input)
        if not isinstance(self.pskd, MemoryCriterion):
            return {"loss": self.pskd(output, target, input), "output": output}
        if target.is_floating_point():
            raise ValueError("target: expected labels, got probabilities: Mixup needs a snapshot")
        rows, labels = target // self.num_classes, target % self.num_classes
        return {"loss": self.pskd(output, labels, rows), "output": output}

    def get_task_state(self, module=None, ema: bool = False) -> dict:
        return {} if ema else self.pskd.state_dict()

    def load_task_state(self, state, strict: bool = True, module=None, ema: bool = False) -> None:
        if state is None and not ema:
            raise ValueError("checkpoint: expected one of a PSKDTask, got one without task_state")
        if not ema:
            self.pskd.load_state_dict(state)
