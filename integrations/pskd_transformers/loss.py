"""The loss of a batch in place of the model's own, normalised as the Trainer would."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pskd import WithRows
from pskd.criterion import make_criterion
from pskd.criterion.base import cross_entropy
from pskd.criterion.tokens import CountedLabels
from pskd.teachers import MODEL_TEACHERS
from pskd_transformers.data import DataTokens, classes_of, shifts_labels, without_labels

__all__ = ["BatchLoss"]

logger = logging.getLogger(__name__)
_MISCOUNT = 1.37  # of labels in a trial; no ratio of small numbers of processes


def _logits(outputs):
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]  # of return_dict=False


class _Normalisation(NamedTuple):
    """How the Trainer's loss of a batch follows from the mean over its labels."""

    is_over_all: bool  # whether it is a share of that over all accumulated batches and processes
    factor: int  # the number of processes, where their gradients are averaged


class BatchLoss:
    """A criterion, and how it is called by a Trainer's model.

    Args:
        model: bare.
        data: of the training.
        options: of `pskd.criterion.make_criterion`, and ``num_classes``, ``lengths``.
        shifts: whether the Trainer knows the model's loss to shift the labels.
        args: the Trainer's.
    """

    def __init__(self, model, data, options: dict[str, Any], shifts: bool, args) -> None:
        self._model, self._args = model, args
        self._shifts = shifts or shifts_labels(model)
        options = {"num_classes": classes_of(model)} | options
        classes, lengths = options.pop("num_classes"), options.pop("lengths", None)
        self._logits_of = options.get("logits_of", _logits)
        self._tokens: DataTokens | None = None
        self._normalisation: _Normalisation | None = None
        if options.get("teacher") in MODEL_TEACHERS:
            options["logits_of"] = self._chosen
        elif isinstance(data, WithRows):
            self._tokens = DataTokens.found(data.dataset, classes, lengths)
        if self._tokens is not None:
            rows, own = self._tokens.rows, {"top_k": min(16, classes)}
            options = own | {"fingerprint": rows.fingerprint, "num_rows": rows.num_rows} | options
        self.criterion = make_criterion(model, data, classes, **options)

    def _chosen(self, outputs) -> Tensor:
        return self._labels.logits(self._logits_of(outputs))  # of the student or of a snapshot

    def __call__(self, stock: Callable, model, inputs: dict[str, Any], ids, count):
        """Return the loss and the model's outputs.

        Args:
            stock: returns the Trainer's own loss of inputs.
            model: as wrapped for training.
            inputs: of the batch, with labels.
            ids: (B,) row numbers of the samples, or None.
            count: of the labels of all accumulated batches, or None where nobody counts them.
        """
        labels = inputs["labels"]
        rows, has_row = (ids if labels.dim() == 1 else None), None
        if self._tokens is not None:
            rows, has_row = self._tokens.of_batch(ids, inputs)
        self._labels = CountedLabels(labels, rows, has_row, shifted=self._shifts)
        given = without_labels(self._model, inputs)
        if self._normalisation is None and len(self._labels):
            self._normalisation = self._measured(stock, model, inputs, given, count)
        outputs = model(**given)
        loss = self._labels.loss(self.criterion, self._chosen(outputs), **given)
        is_over_all, factor = self._normalisation or (False, 1)
        share = len(self._labels) / torch.as_tensor(count).clamp(min=1) if is_over_all else 1
        return loss * (factor * share), outputs

    def _measured(self, stock: Callable, model, inputs, given, count) -> _Normalisation:
        """Try the first batch, and leave no trace.

        The Trainer takes it that a model which takes keywords divides by the count. T5 and BERT do
        not, and nobody divides their plain mean by the number of accumulated batches. That is
        imitated: a learning rate shall mean the same with and without a teacher.
        """
        labels, memory = self._labels, getattr(self.criterion, "memory", None)
        if labels.has_row is not None and not labels.has_row.any():
            logger.warning("PS-KD: no sequence of the first batch is as long as in the data set")
        model.eval()
        devices = {p.device for p in self._model.parameters() if p.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices):
            logits = self._chosen(model(**given))
            if memory is not None and (n := memory.num_classes) != logits.size(1):
                raise ValueError(f"num_classes: expected {logits.size(1)} as the logits, got {n}")
            mean = cross_entropy(logits, labels.target, self._args.label_smoothing_factor)
            wrong = None if count is None else mean.new_tensor(_MISCOUNT * len(labels))
            own = stock(dict(inputs), num_items_in_batch=wrong)
        model.train()
        if own.numel() != 1:  # the model has none
            return _Normalisation(count is not None, 1)
        tolerance = 1e-3 if own.dtype == torch.float32 == logits.dtype else 2e-2
        for is_over_all in (False,) if count is None else (True, False):
            ratio = float(own / mean) * (_MISCOUNT if is_over_all else 1)
            factor = max(1, round(ratio))
            if self._args.world_size % factor == 0 and abs(ratio / factor - 1) < tolerance:
                return _Normalisation(is_over_all, factor)
        raise ValueError(
            f"model: expected the cross-entropy of its labels, {mean:.4g} in the first batch, got "
            f"{own:.4g} as its own loss: PS-KD would train another one"
        )
