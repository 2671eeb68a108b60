"""PS-KD for Hugging Face's Trainer: a mixin, for models that give a sample one label.

    - trainer = Trainer(model, args, train_dataset=dataset)
    + class PSKDTrainer(PSKDTrainerMixin, Trainer): ...
    + trainer = PSKDTrainer(model, args, train_dataset=pskd.WithRows(dataset))

Each checkpoint gets a file ``pskd.pt``, without which it cannot be resumed.
"""

from pathlib import Path

import torch
from transformers import TrainerCallback

from pskd.criterion import MemoryCriterion, make_criterion
from pskd.rows import ROWS
from pskd.teachers import MODEL_TEACHERS
from pskd_tools.checkpoint import read_checkpoint, write_archive

__all__ = ["PSKDTrainerMixin"]


def _logits(outputs):
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]  # of return_dict=False


class PSKDTrainerMixin(TrainerCallback):
    """Trains by a criterion of `pskd`; evaluation is the Trainer's own. It hears its own events.

    Args:
        pskd_options: ``teacher``, one of `pskd.teachers.TEACHERS`, and options of its criterion.

    Raises:
        ValueError: before the first step, for options, data or epochs that do not serve, and for a
            ``compute_loss_func``, in whose place the criterion is.
    """

    _signature_columns: list[str]

    def __init__(self, *args, pskd_options: dict | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._options = {"label_smoothing": self.args.label_smoothing_factor} | (pskd_options or {})
        self.model_accepts_loss_kwargs = False  # the loss is the mean of a batch
        self.add_callback(self)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, ROWS]

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._resumed = resume_from_checkpoint  # True is the last one of the output folder
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        epochs, limit = args.num_train_epochs, args.max_steps
        if limit > 0 or epochs % 1:
            raise ValueError(f"num_train_epochs: expected whole, got {epochs} (max_steps {limit})")
        if (other := getattr(self, "compute_loss_func", None)) is not None:
            raise ValueError(f"compute_loss_func: expected none, the loss is PS-KD's, got {other}")
        data = self.train_dataset, model.config.num_labels
        options: dict = {"num_epochs": int(epochs)} | self._options
        self._logits_of = options.get("logits_of", _logits)  # of the student and of a snapshot
        if options.get("teacher") in MODEL_TEACHERS:
            options["logits_of"] = self._logits_of
        self.criterion = make_criterion(model, *data, **options)
        if self._resumed:
            last = Path(args.output_dir, f"checkpoint-{state.global_step}")
            path = (last if self._resumed is True else Path(self._resumed)) / "pskd.pt"
            self.criterion.load_state_dict(read_checkpoint(path, ["epoch"]))
        self._inside = state.global_step if state.global_step % (state.max_steps // epochs) else -1

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step != self._inside:  # where a resumed run goes on inside an epoch
            self.criterion.begin_epoch(self.criterion.epoch + 1)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        rows = inputs.pop(ROWS, None)
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        target = inputs.pop("labels")
        outputs = model(**inputs)
        seen = {} if isinstance(self.criterion, MemoryCriterion) else inputs
        loss = self.criterion(self._logits_of(outputs), target, rows=rows, **seen)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs) -> None:
        super().log(logs | (self.criterion.take_means() if "loss" in logs else {}), *args, **kwargs)

    def on_save(self, args, state, control, **kwargs) -> None:
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", "pskd.pt")
        content = self.criterion.state_dict(inside_epoch=True)
        if args.should_save:
            write_archive(path, content)
