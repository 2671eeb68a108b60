"""PS-KD for Hugging Face's Trainer and Seq2SeqTrainer: a mixin, for a label a sample or a token.

    - trainer = Trainer(model, args, train_dataset=dataset)
    + class PSKDTrainer(PSKDTrainerMixin, Trainer): ...
    + trainer = PSKDTrainer(model, args, train_dataset=pskd.WithRows(dataset))

Each checkpoint gets a file ``pskd.pt``, without which it cannot be resumed.
"""

from pskd_transformers.trainer import PSKDTrainerMixin

__all__ = ["PSKDTrainerMixin"]
