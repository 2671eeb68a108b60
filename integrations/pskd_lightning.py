"""PS-KD for Lightning: a callback that gives the module its loss and follows the epochs.

      class Classifier(LightningModule):
          ...
          def training_step(self, batch, batch_idx):
    -         inputs, target = batch
    -         return F.cross_entropy(self(inputs), target)
    +         rows, inputs, target = batch
    +         return self.pskd(self(inputs), target, rows)

    - loader = DataLoader(dataset, batch_size=128, shuffle=True)
    - trainer = Trainer(max_epochs=300)
    + loader = DataLoader(pskd.WithRows(dataset), batch_size=128, shuffle=True)
    + trainer = Trainer(max_epochs=300, callbacks=[PSKDCallback(num_classes=100)])

With ``PSKDCallback(teacher="snapshot")`` (or ``"ema"``) the data set stays as it is and the loss is
``self.pskd(self(inputs), target, inputs)``: last epoch's weights are called as the module is.
"""

from lightning.pytorch import Callback

from pskd.criterion import MemoryCriterion, SnapshotCriterion, make_criterion
from pskd.criterion.base import cross_entropy

__all__ = ["PSKDCallback"]


def _plain(logits, target, *_, **__):
    return cross_entropy(logits, target)


class PSKDCallback(Callback):
    """Makes ``self.pskd`` of the module, a criterion of `pskd`, and begins its epochs.

    In a validation it is plain cross-entropy. Checkpoints hold what an exact resume needs, inside
    an epoch with a loader that has a ``state_dict``; ``pskd/alpha`` and the teacher's means are
    logged at each epoch's end.

    Args:
        num_classes: C; a snapshot needs none.
        options: ``teacher``, one of `pskd.teachers.TEACHERS`, and options of its criterion, such as
            ``alpha_final``.

    Raises:
        ValueError: before the first step, for options out of range, data without row numbers or no
            number of epochs.
    """

    def __init__(self, num_classes: int = 0, **options) -> None:
        self._num_classes, self._options = num_classes, options
        self.criterion: MemoryCriterion | SnapshotCriterion | None = None
        self._state: dict = {}  # of a checkpoint, until the training starts

    def setup(self, trainer, pl_module, stage: str) -> None:
        pl_module.pskd = _plain

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.max_epochs < 1:
            raise ValueError(f"max_epochs: expected 1 or more, got {trainer.max_epochs}")
        data = getattr(trainer.train_dataloader, "dataset", None)
        options = {"num_epochs": trainer.max_epochs} | self._options
        self.criterion = make_criterion(pl_module, data, self._num_classes, **options)
        if self._state:
            self.criterion.load_state_dict(self._state)
        pl_module.pskd, self._state = self.criterion, {}

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        assert self.criterion is not None
        if trainer.current_epoch >= self.criterion.epoch:  # else it resumes inside one
            self.criterion.begin_epoch(trainer.current_epoch + 1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # Lightning does not tell of the epoch after a checkpoint that an epoch's last batch made.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        assert self.criterion is not None
        self.log_dict(self.criterion.take_means(), sync_dist=True)

    def state_dict(self) -> dict:
        made = self.criterion
        return self._state if made is None else made.state_dict(inside_epoch=True)

    def load_state_dict(self, state_dict: dict) -> None:
        self._state = state_dict
