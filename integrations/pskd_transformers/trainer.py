"""The mixin: what a Trainer's events mean to a criterion."""

import functools
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from pskd.rows import ROWS, RowsAside
from pskd.schedule import check_unchanged
from pskd_tools.checkpoint import read_checkpoint, write_archive
from pskd_transformers.loss import BatchLoss

__all__ = ["PSKDTrainerMixin"]


class PSKDTrainerMixin(TrainerCallback):
    """Trains by a criterion of `pskd`; evaluation is the Trainer's own. It hears its own events.

    Serves models whose logits have the shape of the labels, and C: those for samples or tokens, and
    masked, causal and encoder-decoder language models. Without a teacher the loss of each batch is
    the Trainer's. A memory has a row for each token whose label counts. Where a collator masks
    tokens anew in each epoch, a token has a past if it was masked in the last one too.

    Args:
        pskd_options: ``teacher``, one of `pskd.teachers.TEACHERS`, and options of its criterion. Of
            a memory also ``num_classes`` and ``lengths``, the tokens of each sequence, in place of
            the model's and the data's; of tokens it keeps ``top_k`` = 16 classes if not told else.

    Raises:
        ValueError: before the first step, for options, data or a model that do not serve, and for a
            ``compute_loss_func``, in whose place the criterion is.
    """

    def __init__(self, *args, pskd_options: dict | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._options = {"label_smoothing": self.args.label_smoothing_factor} | (pskd_options or {})
        self.add_callback(self)

    @property
    def criterion(self):
        """That of the training; what it told is in the log."""
        return self._batch_loss.criterion

    def _get_collator_with_removed_columns(self, data_collator, *args, **kwargs):
        return RowsAside(super()._get_collator_with_removed_columns(data_collator, *args, **kwargs))

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._resumed = resume_from_checkpoint  # True is the last one of the output folder
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        if (other := getattr(self, "compute_loss_func", None)) is not None:
            raise ValueError(f"compute_loss_func: expected none, the loss is PS-KD's, got {other}")
        if state.num_train_epochs == sys.maxsize:  # the Trainer's number for a stream
            raise ValueError("training data: expected a length, got a stream, which has no epochs")
        if args.n_gpu > 1:
            raise ValueError(f"expected one GPU a process (torchrun starts them), got {args.n_gpu}")
        options = {"num_epochs": state.num_train_epochs} | self._options
        shifts = getattr(self, "_loss_shifts_labels", False)
        self._batch_loss = BatchLoss(model, self.train_dataset, options, shifts, args)
        is_whole = args.max_steps <= 0 and args.num_train_epochs % 1 == 0
        self._max_steps = None if is_whole else state.max_steps  # alpha grows by updates then
        if self._resumed:
            last = Path(args.output_dir, f"checkpoint-{state.global_step}")
            path = (last if self._resumed is True else Path(self._resumed)) / "pskd.pt"
            saved = read_checkpoint(path, ["epoch"])
            check_unchanged(saved, {"max_steps": self._max_steps})
            self.criterion.load_state_dict(saved)
        self._is_inside = (state.epoch or 0) % 1 > 0  # a resumed run goes on inside an epoch

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if not self._is_inside:
            self.criterion.begin_epoch(self.criterion.epoch + 1)
        self._is_inside = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._max_steps is not None:
            share = (state.global_step + 1) / self._max_steps
            self.criterion.set_progress(share * self.criterion.num_epochs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        ids = inputs.pop(ROWS, None)
        stock = functools.partial(super().compute_loss, model, **kwargs)
        is_stock = not torch.is_grad_enabled()  # an evaluation, before a training too
        if is_stock or not (self.criterion.alpha_final or self.criterion.examples):
            return stock(inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = self._batch_loss(stock, model, inputs, ids, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs) -> None:
        super().log(logs | (self.criterion.take_means() if "loss" in logs else {}), *args, **kwargs)

    def on_save(self, args, state, control, **kwargs) -> None:
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", "pskd.pt")
        content = self.criterion.state_dict(inside_epoch=True) | {"max_steps": self._max_steps}
        if args.should_save:
            write_archive(path, content)
