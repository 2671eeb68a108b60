"""The options of the criterion ``pskd``, with those of fairseq that it reads."""

from dataclasses import dataclass, field
from typing import Optional

from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from omegaconf import II

from pskd.schedule import SCHEDULES
from pskd.teachers import TEACHERS


@dataclass
class PSKDCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    pskd_alpha_final: float = field(
        default=0.7,
        metadata={"help": "weight of the teacher at the end of training (alpha_T), in [0, 1]"},
    )
    # fairseq's way to name the choices is no type.
    pskd_alpha_schedule: ChoiceEnum(list(SCHEDULES)) = field(  # type: ignore[valid-type]
        default="linear",
        metadata={
            "help": "how alpha grows with the epochs of --max-epoch (or, with --max-update "
            "alone, with the updates)"
        },
    )
    pskd_teacher: ChoiceEnum(list(TEACHERS)) = field(  # type: ignore[valid-type]  # as above
        default="snapshot",
        metadata={
            "help": "where last epoch's predictions come from; snapshot: a frozen copy of "
            "the model as the last epoch ended scores the same batch; memory: what the model said "
            "of each target token when it was trained on, kept in a file"
        },
    )
    pskd_top_k: int = field(
        default=16,
        metadata={"help": "types that the memory keeps of a prediction; the others share the rest"},
    )
    pskd_memory: str = field(
        default="",
        metadata={"help": "folder of the memory's files (default: SAVE_DIR/pskd_memory)"},
    )
    pskd_start_epoch: int = field(
        default=1, metadata={"help": "the first epoch with a teacher; before it alpha is 0"}
    )
    pskd_skip_wrong_teacher: bool = field(
        default=False,
        metadata={"help": "keep the hard target of tokens where the teacher prefers another type"},
    )
    pskd_fused_linear: bool = field(
        default=False,
        metadata={
            "help": "make the training loss of decoder features and output embedding, without the "
            "logits of a whole batch; for a Transformer that shares the decoder's embeddings"
        },
    )
    pskd_allow_schedule_change: bool = field(
        default=False,
        metadata={"help": "resume with another alpha, schedule or length than the checkpoint's"},
    )
    max_epoch: int = II("optimization.max_epoch")
    max_update: int = II("optimization.max_update")
    save_dir: str = II("checkpoint.save_dir")
    restore_file: str = II("checkpoint.restore_file")
    reset_dataloader: bool = II("checkpoint.reset_dataloader")
    continue_once: Optional[str] = II("checkpoint.continue_once")
    checkpoint_suffix: str = II("checkpoint.checkpoint_suffix")
    keep_best_checkpoints: int = II("checkpoint.keep_best_checkpoints")
    keep_last_epochs: int = II("checkpoint.keep_last_epochs")
    keep_interval_updates: int = II("checkpoint.keep_interval_updates")
    patience: int = II("checkpoint.patience")
    stop_min_lr: float = II("optimization.stop_min_lr")
    train_subset: str = II("dataset.train_subset")
    ddp_backend: str = II("distributed_training.ddp_backend")
    # The model to evaluate: fairseq-validate, which builds the criterion too, writes it here.
    path: Optional[str] = II("common_eval.path")
