"""The fairseq criterion ``pskd``: label-smoothed cross-entropy with a teacher of one epoch ago.

Shapes: B sentences, T target positions, V types in the target dictionary, N = B * T rows.
"""

import math
import os
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Optional, Union

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor

from pskd import PSKDStats, TopK, pskd_cross_entropy
from pskd.schedule import SCHEDULES
from pskd_fairseq.checkpoint import ResumePlan, SavePlan, check_resume
from pskd_fairseq.epoch import AlphaSchedule, EpochState
from pskd_fairseq.memory import TokenMemory


@dataclass
class PSKDCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    pskd_alpha_final: float = field(
        default=0.7,
        metadata={"help": "weight of the teacher at the end of training (alpha_T), in [0, 1]"},
    )
    pskd_alpha_schedule: ChoiceEnum(list(SCHEDULES)) = field(
        default="linear",
        metadata={
            "help": "how alpha grows with the epochs of --max-epoch (or, with --max-update "
            "alone, with the updates)"
        },
    )
    pskd_teacher: ChoiceEnum(["snapshot", "memory"]) = field(
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
    train_subset: str = II("dataset.train_subset")
    ddp_backend: str = II("distributed_training.ddp_backend")
    # The model to evaluate: fairseq-validate, which builds the criterion too, writes it here.
    path: Optional[str] = II("common_eval.path")


@register_criterion("pskd", dataclass=PSKDCriterionConfig)
class PSKDCriterion(LabelSmoothedCrossEntropyCriterion):
    """Cross-entropy whose target is softened by the model's own prediction of one epoch ago.

    In training the loss of a token is ``(1 - alpha) * label_smoothed + alpha * CE(teacher)``, with
    fairseq's label smoothing on the hard part. With alpha 0, in the first epoch, and in validation
    it is `LabelSmoothedCrossEntropyCriterion` to the bit.
    """

    def __init__(
        self,
        cfg: PSKDCriterionConfig,
        task,
        sentence_avg,
        label_smoothing,
        ignore_prefix_size=0,
        report_accuracy=False,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        schedule = AlphaSchedule.build(
            str(cfg.pskd_alpha_schedule),
            cfg.pskd_alpha_final,
            cfg.max_epoch,
            cfg.max_update,
            cfg.pskd_start_epoch,
        )
        # It would cut tokens off the end of the target, and others off the end of the scores.
        if ignore_prefix_size < 0:
            raise ValueError(
                f"--ignore-prefix-size: expected a number of at least 0, got {ignore_prefix_size}"
            )
        # From there on fairseq's smoothing would make the label the least likely type.
        types = len(task.target_dictionary)
        if not 0.0 <= label_smoothing <= 1.0 - 1.0 / types:
            raise ValueError(
                f"--label-smoothing: expected a number in [0, 1 - 1/{types}], got {label_smoothing}"
            )
        has_memory = str(cfg.pskd_teacher) == "memory"
        if cfg.ddp_backend == "fully_sharded" and not has_memory:
            raise ValueError(
                "--pskd-teacher snapshot copies the whole model: expected --ddp-backend "
                "legacy_ddp or pytorch_ddp, got fully_sharded"
            )
        memory = _build_memory(cfg, task) if has_memory else None
        self.epoch_state = EpochState(schedule, cfg.train_subset, memory)
        self._skip_wrong_teacher = cfg.pskd_skip_wrong_teacher
        self._step_statistics: dict[str, Tensor] = {}
        self._output_is_logits: Optional[bool] = None  # known from the first batch
        if cfg.path is None:
            suffix = cfg.checkpoint_suffix
            plan = ResumePlan(
                cfg.save_dir, cfg.restore_file, cfg.reset_dataloader, cfg.continue_once, suffix
            )
            check_resume(plan, task, asdict(schedule), cfg.pskd_allow_schedule_change)
            self.epoch_state.attach(task, SavePlan(cfg.save_dir, suffix, cfg.keep_best_checkpoints))

    def forward(self, model, sample, reduce=True):
        """As `LabelSmoothedCrossEntropyCriterion.forward`, with PS-KD's sums in the log output."""
        loss, sample_size, logging_output = super().forward(model, sample, reduce=reduce)
        if self.training:
            # Every rank logs the same keys in every step: fairseq concatenates them by position.
            logging_output.update(self._step_statistics)
        return loss, sample_size, logging_output

    def compute_loss(self, model, net_output, sample, reduce=True):
        """Return the loss that is trained and the hard NLL, sums over tokens (or (N, 1) each)."""
        state = self.epoch_state
        self._step_statistics = _no_statistics() if self.training else {}
        if not self.training or not (state.active or state.records):
            return super().compute_loss(model, net_output, sample, reduce=reduce)

        scores, target = self._scores_and_target(model, net_output, sample)
        is_token = target != self.padding_idx
        rows = None
        if state.memory is not None:
            rows = self._token_rows(model, net_output, sample)
        past = self._past(sample, target, is_token, rows) if state.active else None
        if past is None:
            if state.records:
                state.memory.write(rows[0], scores)
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        types = scores.size(-1)
        loss, stats = pskd_cross_entropy(
            scores,
            target,
            past.top_k,
            past.alpha,
            teacher_logits=past.scores,
            ignore_index=self.padding_idx,
            # fairseq spreads epsilon over the other V - 1 types, torch over all V.
            label_smoothing=self.eps * types / (types - 1),
            reduction="sum" if reduce else "none",
            return_stats=True,
        )
        if state.records:
            label = scores.detach().gather(1, target[:, None]).squeeze(1)
            state.memory.write(rows[0], scores, stats.nll + label)
        self._step_statistics = _statistics(
            scores.detach(), target, past, is_token, stats, state.alpha
        )
        return (loss, stats.nll.sum()) if reduce else (loss[:, None], stats.nll[:, None])

    def _token_rows(self, model, net_output, sample) -> tuple[Tensor, Tensor]:
        """Return the memory's rows of a batch's tokens, (N,), and the mask of those that count."""
        target = model.get_targets(sample, net_output)
        parts = self.epoch_state.memory.rows(sample, target, self.padding_idx)
        rows, valid = (part[:, self.ignore_prefix_size :].reshape(-1) for part in parts)
        return rows, valid

    def _past(
        self, sample, target: Tensor, is_token: Tensor, rows: tuple[Tensor, Tensor] | None
    ) -> "_Past":
        """Return what the teacher says of a batch, and which tokens learn from it."""
        scores, top_k, taught = None, None, is_token
        if rows is None:
            scores = self._teacher_scores(sample)
        else:
            top_k, taught = self.epoch_state.memory.read(*rows)
        past = _Past(scores, top_k, taught, self.epoch_state.alpha)
        if self._skip_wrong_teacher:
            past = past._replace(taught=taught & (past.preferred(slice(None)) == target))
        if rows is not None or self._skip_wrong_teacher:
            past = past._replace(alpha=past.taught * self.epoch_state.alpha)
        return past

    def _scores_and_target(self, model, net_output, sample) -> tuple[Tensor, Tensor]:
        """Return scores whose softmax is the model's distribution, (N, V), and labels, (N,).

        These are the decoder's logits, which spares a normalisation forward and backward, or where
        a model makes its distribution in another way (adaptive softmax, pointer-generator), its
        log-probabilities.
        """
        if self._output_is_logits is None:
            self._output_is_logits = _is_logits(model, net_output, sample)
        if not self._output_is_logits:
            return self.get_lprobs_and_target(model, net_output, sample)
        logits, target = net_output[0], model.get_targets(sample, net_output)
        logits = logits[:, self.ignore_prefix_size :]
        target = target[:, self.ignore_prefix_size :]
        return logits.reshape(-1, logits.size(-1)), target.reshape(-1)

    @torch.no_grad()
    def _teacher_scores(self, sample) -> Tensor:
        """Return the teacher's scores on the batch, (N, V).

        The teacher is in eval mode, so it draws no random number and the student's dropout is the
        same with and without it.
        """
        teacher = self.epoch_state.teacher.model
        scores, _ = self._scores_and_target(teacher, teacher(**sample["net_input"]), sample)
        return scores

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate the log outputs; the teacher's NLL is in bits, as fairseq's ``nll_loss``."""
        super().reduce_metrics(logging_outputs)
        if not logging_outputs or "pskd_tokens" not in logging_outputs[0]:
            return
        total = {key: utils.item(sum(log[key] for log in logging_outputs)) for key in _STATISTICS}
        tokens, error = total["pskd_tokens"], max(total["pskd_student_error"], 1e-12)
        if tokens == 0:  # no teacher yet
            metrics.log_scalar("alpha", 0.0, 1, round=4)
            return
        metrics.log_scalar("alpha", total["pskd_alpha"] / tokens, tokens, round=4)
        taught = total["pskd_taught"]
        metrics.log_scalar("teacher_coverage", taught / tokens, tokens, round=4)
        if taught == 0:  # no token of these batches has a past
            return
        metrics.log_scalar(
            "teacher_nll", total["pskd_teacher_nll"] / taught / math.log(2), taught, round=3
        )
        if total["pskd_top_k_mass"] > 0:  # of a memory
            metrics.log_scalar("top_k_mass", total["pskd_top_k_mass"] / taught, taught, round=4)
        compared = max(total["pskd_compared"], 1.0)
        metrics.log_scalar("teacher_agreement", total["pskd_agree"] / compared, compared, round=4)
        metrics.log_scalar(
            "gradient_rescaling", 1.0 - total["pskd_teacher_error"] / error, error, round=4
        )
        hard = total["pskd_hard_student_error"]
        if hard > 0:
            rescaling = 1.0 - total["pskd_hard_teacher_error"] / hard
            metrics.log_scalar("gradient_rescaling_hard", rescaling, hard, round=4)


_STATISTICS = (
    "pskd_tokens",
    "pskd_alpha",
    "pskd_taught",
    "pskd_teacher_nll",
    "pskd_top_k_mass",
    "pskd_compared",
    "pskd_agree",
    "pskd_student_error",
    "pskd_teacher_error",
    "pskd_hard_student_error",
    "pskd_hard_teacher_error",
)


def _no_statistics() -> dict[str, float]:
    return dict.fromkeys(_STATISTICS, 0.0)


class _Past(NamedTuple):
    """What the teacher says of a batch's tokens, in one of two forms.

    Attributes:
        scores: (N, V) a snapshot's scores, or None.
        top_k: a memory's predictions, or None.
        taught: (N,) bool, the tokens that learn from the teacher.
        alpha: its weight, one for all or (N,).
    """

    scores: Optional[Tensor]
    top_k: Optional[TopK]
    taught: Tensor
    alpha: Union[float, Tensor]

    def preferred(self, part: slice) -> Tensor:
        """Return the most likely type of some tokens."""
        if self.top_k is not None:
            return self.top_k.indices[part, 0]
        return self.scores[part].argmax(1)

    def top_k_mass(self) -> Tensor:
        """Return the sum over the tokens of the probability that a memory's types hold, else 0."""
        if self.top_k is None:
            return self.taught.new_zeros((), dtype=torch.float32)
        return (self.top_k.probs.sum(dim=1) * self.taught).sum()


def _build_memory(cfg: PSKDCriterionConfig, task) -> TokenMemory:
    types = len(task.target_dictionary)
    if not 1 <= cfg.pskd_top_k <= types:
        raise ValueError(f"--pskd-top-k: expected 1 to {types}, got {cfg.pskd_top_k}")
    shards = utils.split_paths(getattr(task.cfg, "data", None) or "")
    folder = cfg.pskd_memory or os.path.join(cfg.save_dir, "pskd_memory")
    return TokenMemory(folder, types, cfg.pskd_top_k, max(1, len(shards)))


def _statistics(
    scores: Tensor,
    target: Tensor,
    past: _Past,
    is_token: Tensor,
    stats: PSKDStats,
    alpha: float,
) -> dict[str, Tensor]:
    """Return what one step adds to the log, as sums over tokens, so that ranks can be summed.

    The mean gradient rescaling weights each token by its plain gradient on the label's logit,
    1 - p[y]: the factor itself divides by it and has no finite mean over well-learned tokens. Hard
    tokens are those on which the teacher preferred another type than the label.

    Args:
        scores: (N, V) the student's scores.
        target: (N,) labels.
        past: what the teacher says.
        is_token: (N,) False in padding.
        stats: what the loss says of each row.
        alpha: weight of the teacher.
    """
    tokens, taught = is_token.sum(), past.taught
    # A float32 softmax rounds what is very unlikely to 0, and its logarithm would spoil the sum.
    teacher_at_label = stats.teacher_probs_at_label.clamp_min(torch.finfo(torch.float32).tiny)
    # Finding the largest of V scores costs as much as a softmax: every eighth token tells enough.
    part = slice(None, None, 8)
    preferred = past.preferred(part)
    agree = (scores[part].argmax(1) == preferred) & taught[part]
    hard = (preferred != target[part]) & taught[part]
    student_error = 1.0 - stats.nll.neg().exp()
    teacher_error = alpha * (1.0 - teacher_at_label)
    sums = {
        "pskd_tokens": tokens,
        "pskd_alpha": alpha * tokens,
        "pskd_taught": taught.sum(),
        "pskd_teacher_nll": -(teacher_at_label.log() * taught).sum(),
        "pskd_top_k_mass": past.top_k_mass(),
        "pskd_compared": taught[part].sum(),
        "pskd_agree": agree.sum(),
        "pskd_student_error": (student_error * taught).sum(),
        "pskd_teacher_error": (teacher_error * taught).sum(),
        "pskd_hard_student_error": (student_error[part] * hard).sum(),
        "pskd_hard_teacher_error": (teacher_error[part] * hard).sum(),
    }
    return {key: sums[key].float() for key in _STATISTICS}


@torch.no_grad()
def _is_logits(model, net_output, sample) -> bool:
    """Whether the model's distribution on a batch is the plain softmax of its first output."""
    output = net_output[0]
    lprobs = model.get_normalized_probs(net_output, log_probs=True, sample=sample)
    return output.shape == lprobs.shape and torch.allclose(
        output.float().log_softmax(dim=-1), lprobs.float(), atol=1e-3
    )
