"""PS-KD for trl's SFTTrainer, with or without LoRA: a memory of last epoch's predicted tokens.

    - trainer = SFTTrainer(model, args, train_dataset=dataset)
    + trainer = PSKDSFTTrainer(model, args, train_dataset=dataset)

Each checkpoint gets a file ``pskd.pt``, without which it cannot be resumed.
"""

from typing import Any

import torch
from pskd_transformers import PSKDTrainerMixin
from trl import SFTTrainer

from pskd import WithRows
from pskd.rows import ROWS

__all__ = ["PSKDSFTTrainer"]


class PSKDSFTTrainer(PSKDTrainerMixin, SFTTrainer):
    """An SFTTrainer that trains by `pskd.MemoryCriterion`; its metrics and evaluation are its own.

    A memory has a row for each token whose label counts: of the completions alone with
    ``completion_only_loss``. SFTTrainer's loss needs no logits, PS-KD's does: its metrics of a
    training batch cost one more forward, as those of SFTTrainer with label smoothing do.

    Args:
        pskd_options: as of `PSKDTrainerMixin`, without a ``teacher`` of weights: SFTTrainer's fused
            head cannot be copied with the model.

    Raises:
        ValueError: for a packed, padding-free or streamed data set, whose tokens have no rows, for
            images, and for a teacher of weights.
    """

    train_dataset: Any

    def __init__(self, *args, pskd_options: dict | None = None, **kwargs) -> None:
        super().__init__(*args, pskd_options=pskd_options, **kwargs)
        teacher = (pskd_options or {}).get("teacher", "memory")
        if teacher != "memory":
            raise ValueError(f"teacher: expected 'memory' with an SFTTrainer, got {teacher!r}")
        for name in ("packing", "padding_free"):
            if getattr(self.args, name):
                raise ValueError(f"{name}: expected False, its tokens have no rows, got True")
        self.train_dataset = WithRows(self.train_dataset)  # as SFTTrainer filtered and shuffled it
        if "input_ids" not in self.train_dataset[0]:
            raise ValueError(
                "training data: expected text, got what has no tokens before the batch"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        if torch.is_grad_enabled() and self.criterion.alpha_final:
            given = {name: value for name, value in inputs.items() if name != ROWS}
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices):  # for the metrics; same dropout
                SFTTrainer.compute_loss(self, model, given, num_items_in_batch=num_items_in_batch)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if torch.is_grad_enabled():
            self._metrics["eval"].clear()  # of the trial of the first batch
        return loss
