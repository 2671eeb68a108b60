"""The fairseq criterion ``pskd``: label-smoothed cross-entropy with a teacher of one epoch ago.

Shapes: B sentences, T target positions, V types in the target dictionary, N = B * T rows, H
features of the decoder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from torch import Tensor

from pskd import LinearTeacher, pskd_linear_cross_entropy
from pskd.loss import loss_and_stats
from pskd.targets import row_alphas
from pskd_fairseq.config import PSKDCriterionConfig
from pskd_fairseq.epoch import EpochState, Schedule
from pskd_fairseq.fused import FeaturesOnly
from pskd_fairseq.memory import KeptRows, TokenMemory
from pskd_fairseq.past import Past
from pskd_fairseq.resume import check_resume
from pskd_fairseq.step_statistics import COMPARED, log_statistics, no_statistics, step_statistics

logger = logging.getLogger(__name__)


@register_criterion("pskd", dataclass=PSKDCriterionConfig)
class PSKDCriterion(LabelSmoothedCrossEntropyCriterion):
    """Cross-entropy whose target is softened by the model's own prediction of one epoch ago.

    In training the loss of a token is ``(1 - alpha) * label_smoothed + alpha * CE(teacher)``, with
    fairseq's label smoothing on the hard part. With alpha 0, in the first epoch, and in validation
    it is `LabelSmoothedCrossEntropyCriterion` to the bit.

    Raises:
        ValueError: if an option is out of its range, or two exclude each other.
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
        schedule = Schedule.build(
            str(cfg.pskd_alpha_schedule),
            cfg.pskd_alpha_final,
            cfg.max_epoch,
            cfg.max_update,
            cfg.pskd_start_epoch,
        )
        _check_options(cfg, types=len(task.target_dictionary))
        memory = _build_memory(cfg, task) if str(cfg.pskd_teacher) == "memory" else None
        self.epoch_state = EpochState(schedule, cfg.train_subset, memory, _fixed_options(cfg))
        self._skip_wrong_teacher = cfg.pskd_skip_wrong_teacher
        self._fused_linear = cfg.pskd_fused_linear
        self._step_statistics: Mapping[str, float | Tensor] = {}
        self._output_is_logits: bool | None = None  # known from the first batch

    @classmethod
    def build_criterion(cls, cfg: PSKDCriterionConfig, task):
        """Build the criterion; for a training, let the task tell it of epochs and checkpoints.

        Raises:
            ValueError: as the constructor, or if training cannot go on from the checkpoint that
                fairseq would read (`resume.check_resume`).
            FileNotFoundError: if ``--restore-file`` names a file that is not there.
        """
        criterion = super().build_criterion(cfg, task)
        if cfg.path is None:  # of a model to evaluate
            schedule = criterion.epoch_state.schedule
            check_resume(cfg, task, schedule.options(), _fixed_options(cfg))
            _warn_of_an_early_end(cfg, schedule)
            criterion.epoch_state.attach(task, cfg)
        return criterion

    def forward(self, model, sample, reduce=True):
        """As `LabelSmoothedCrossEntropyCriterion.forward`, with PS-KD's sums in the log output.

        Args:
            model: the student.
            sample: with ``id`` (B,), ``net_input``, ``target`` (B, T) and ``ntokens``.
            reduce: sum the losses of all tokens; else there are (N, 1), one each.

        Returns:
            loss, sample size (tokens, or sentences with ``--sentence-avg``), log output.

        Raises:
            ValueError: with ``--pskd-fused-linear``, if it cannot serve the model.
        """
        # A loss a token is made of logits; fairseq's own training does not ask for it.
        if self._fused_linear and self.training and reduce:
            model = FeaturesOnly(model)
        loss, sample_size, logging_output = super().forward(model, sample, reduce=reduce)
        if self.training:
            # Every rank logs the same keys in every step: fairseq concatenates them by position.
            logging_output.update(self._step_statistics)
        return loss, sample_size, logging_output

    def compute_loss(self, model, net_output, sample, reduce=True):
        """Return the loss that is trained and the hard NLL, sums over tokens (or (N, 1) each).

        Raises:
            ValueError: as `forward`.
        """
        state, fused = self.epoch_state, isinstance(model, FeaturesOnly)
        self._step_statistics = no_statistics() if self.training else {}
        if not fused and not (self.training and (state.active or state.records)):
            return super().compute_loss(model, net_output, sample, reduce=reduce)

        scores, target = self._scores_and_target(model, net_output, sample)
        kept = self._kept_rows(model, net_output, sample)
        past = self._past(model, sample, target, kept) if state.active else None
        recorded = kept if state.records else None
        if fused:
            return self._fused_loss(model, scores, target, past, recorded)
        if past is None:
            if recorded is not None:
                recorded.write(scores)
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        assert not isinstance(past.scores, LinearTeacher)  # those are of the fused loss
        records = None if recorded is None else recorded.records(scores)
        loss, stats = loss_and_stats(
            scores,
            target,
            past.top_k,
            past.alpha,
            teacher_logits=past.scores,
            ignore_index=self.padding_idx,
            label_smoothing=self._smoothing(scores.size(-1)),
            reduction="sum" if reduce else "none",
            return_stats=True,
            records=records,
        )
        assert stats is not None
        scores = scores.detach()
        if recorded is not None and records is None:
            recorded.write(scores, stats.nll + scores.gather(1, target[:, None]).squeeze(1))
        self._log(past, target, stats, scores[COMPARED].argmax(1), past.preferred(COMPARED))
        return (loss, stats.nll.sum()) if reduce else (loss[:, None], stats.nll[:, None])

    def _fused_loss(
        self,
        model: FeaturesOnly,
        hidden: Tensor,
        target: Tensor,
        past: Past | None,
        recorded: KeptRows | None,
    ) -> tuple[Tensor, Tensor]:
        """As `compute_loss` in training, of features (N, H) in place of logits."""
        projection = model.projection
        loss, stats = pskd_linear_cross_entropy(
            hidden,
            projection.weight,
            target,
            None if past is None else past.top_k or past.scores,
            0.0 if past is None else past.alpha,
            bias=projection.bias,
            ignore_index=self.padding_idx,
            label_smoothing=self._smoothing(len(projection.weight)),
            reduction="sum",
            stats_top_k=1 if recorded is None else recorded.memory.top_k,
        )
        if recorded is not None:
            recorded.memory.write(recorded.rows, stats.student_top_k)
        if past is not None:
            prefers = stats.student_top_k.indices[COMPARED, 0], stats.teacher_preferred[COMPARED]
            self._log(past, target, stats, *prefers)
        return loss, stats.nll.sum()

    # ---- the teacher ---------------------------------------------------------------------------

    def _kept_rows(self, model, net_output, sample) -> KeptRows | None:
        """Return where the memory keeps a batch's tokens, if it is read or written."""
        memory = self.epoch_state.memory
        if memory is None or not (self.epoch_state.active or self.epoch_state.records):
            return None
        target = model.get_targets(sample, net_output)
        return KeptRows(memory, *self._rows(*memory.rows(sample, target, self.padding_idx)))

    def _past(self, model, sample, target: Tensor, kept: KeptRows | None) -> Past:
        """Return what the teacher says of a batch, and which tokens learn from it."""
        alpha = self.epoch_state.alpha
        if kept is None:
            scores = self._snapshot_scores(model, sample)
            past = Past(scores, None, target != self.padding_idx, alpha)
        else:
            past = Past(None, *kept.memory.read(kept.rows, kept.valid), alpha)
        if self._skip_wrong_teacher:
            past = past._replace(taught=past.taught & (past.preferred(slice(None)) == target))
        if kept is not None or self._skip_wrong_teacher:
            past = past._replace(alpha=row_alphas(alpha, past.taught))
        return past

    # In eval mode it draws no random number: the student's dropout is the same with and without.
    @torch.no_grad()
    def _snapshot_scores(self, model, sample) -> Tensor | LinearTeacher:
        """Return a batch's scores, (N, V), by the model's teacher; of features what they are of."""
        if isinstance(model, FeaturesOnly):
            bare = FeaturesOnly(self.epoch_state.teacher_of(model.model))
            (hidden,) = self._rows(bare(**sample["net_input"])[0])
            return LinearTeacher(hidden, bare.projection.weight, bare.projection.bias)
        teacher = self.epoch_state.teacher_of(model)
        scores, _ = self._scores_and_target(teacher, teacher(**sample["net_input"]), sample)
        return scores

    # ---- rows, scores and sums -----------------------------------------------------------------

    def _rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors of (B, T, ...) as rows, (N, ...), without the ignored prefixes."""
        return tuple(tensor[:, self.ignore_prefix_size :].flatten(0, 1) for tensor in tensors)

    def _scores_and_target(self, model, net_output, sample) -> tuple[Tensor, ...]:
        """Return scores whose softmax is the model's distribution, (N, V), and labels, (N,).

        These are the decoder's logits, which spares a normalisation forward and backward, or where
        a model makes its distribution in another way (adaptive softmax, pointer-generator), its
        log-probabilities. Of `FeaturesOnly` they are the features, (N, H).

        Raises:
            ValueError: if features do not make the model's distribution.
        """
        if not self._has_logits(model, net_output, sample):
            if isinstance(model, FeaturesOnly):
                raise model.refused_distribution()
            return self.get_lprobs_and_target(model, net_output, sample)
        return self._rows(net_output[0], model.get_targets(sample, net_output))

    @torch.no_grad()
    def _has_logits(self, model, net_output, sample) -> bool:
        """Whether the distribution is the softmax of the first output, as on the first batch."""
        if self._output_is_logits is None:
            if isinstance(model, FeaturesOnly):
                model, net_output = model.model, model.logits_of_first(net_output)
            output = net_output[0]
            lprobs = model.get_normalized_probs(net_output, log_probs=True, sample=sample)
            self._output_is_logits = output.shape == lprobs.shape and torch.allclose(
                output.float().log_softmax(dim=-1), lprobs.float(), atol=1e-3
            )
        return self._output_is_logits

    def _smoothing(self, types: int) -> float:
        # fairseq spreads epsilon over the other V - 1 types, torch over all V.
        return self.eps * types / (types - 1)

    def _log(self, past: Past, target: Tensor, stats, said: Tensor, teacher_said: Tensor) -> None:
        """Keep what a step adds to the log; of preferred types those of the `COMPARED` rows."""
        self._step_statistics = step_statistics(
            past,
            stats,
            target,
            target != self.padding_idx,
            said,
            teacher_said,
            self.epoch_state.alpha,
        )

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate the log outputs, fairseq's and PS-KD's."""
        super().reduce_metrics(logging_outputs)
        log_statistics(logging_outputs)


def _check_options(cfg: PSKDCriterionConfig, types: int) -> None:
    """Raise ValueError where an option is out of its range or excludes another."""
    prefix, smoothing, top_k = cfg.ignore_prefix_size, cfg.label_smoothing, cfg.pskd_top_k
    is_memory, is_fused = str(cfg.pskd_teacher) == "memory", cfg.pskd_fused_linear
    is_sharded = cfg.ddp_backend == "fully_sharded"
    backend = "expected --ddp-backend legacy_ddp or pytorch_ddp, got fully_sharded"
    for is_wrong, message in (
        # It would cut tokens off the end of the target, and others off the end of the scores.
        (prefix < 0, f"--ignore-prefix-size: expected a number of at least 0, got {prefix}"),
        # From there on fairseq's smoothing would make the label the least likely type.
        (
            not 0.0 <= smoothing <= 1.0 - 1.0 / types,
            f"--label-smoothing: expected a number in [0, 1 - 1/{types}], got {smoothing}",
        ),
        (
            is_memory and not 1 <= top_k <= types,
            f"--pskd-top-k: expected 1 to {types}, got {top_k}",
        ),
        (
            is_sharded and not is_memory,
            f"--pskd-teacher {cfg.pskd_teacher} copies the whole model: {backend}",
        ),
        (
            is_sharded and is_fused,
            f"--pskd-fused-linear reads the output embedding outside of the model: {backend}",
        ),
        (
            is_fused and cfg.pskd_skip_wrong_teacher,
            "--pskd-fused-linear knows what the teacher prefers only with the loss: expected no "
            "--pskd-skip-wrong-teacher, got both",
        ),
        (
            is_fused and cfg.report_accuracy,
            "--pskd-fused-linear leaves no logits to measure accuracy on: expected no "
            "--report-accuracy, got both",
        ),
    ):
        if is_wrong:
            raise ValueError(message)


def _fixed_options(cfg: PSKDCriterionConfig) -> dict[str, object]:
    """Return, by flag, what a resumed training must have as its checkpoint, beside the schedule."""
    options: dict[str, object] = {"--label-smoothing": cfg.label_smoothing}
    if cfg.pskd_alpha_final:
        options["--pskd-teacher"] = str(cfg.pskd_teacher)
        options["--pskd-skip-wrong-teacher"] = cfg.pskd_skip_wrong_teacher
    return options


def _warn_of_an_early_end(cfg: PSKDCriterionConfig, schedule: Schedule) -> None:
    """Say so where training may end before alpha has grown to what was asked for."""
    may_end = {
        f"--patience {cfg.patience}": cfg.patience > 0,
        f"--stop-min-lr {cfg.stop_min_lr}": cfg.stop_min_lr > 0,
        f"--max-update {cfg.max_update}": schedule.unit == "epoch" and cfg.max_update > 0,
    }
    flags = [flag for flag, given in may_end.items() if given]
    if flags and schedule.alpha_final > 0 and schedule.alpha_schedule != "constant":
        logger.warning(
            "PS-KD: %s may end the training early, with alpha below --pskd-alpha-final %s: it "
            "grows until %s %d (%s); give --max-%s about where training will end, or "
            "--pskd-alpha-schedule constant",
            " or ".join(flags), schedule.alpha_final, schedule.unit, schedule.num_epochs,
            schedule.alpha_schedule, schedule.unit,
        )  # fmt: skip


def _build_memory(cfg: PSKDCriterionConfig, task) -> TokenMemory:
    shards = utils.split_paths(getattr(task.cfg, "data", None) or "")
    folder = cfg.pskd_memory or os.path.join(cfg.save_dir, "pskd_memory")
    return TokenMemory(folder, len(task.target_dictionary), cfg.pskd_top_k, max(1, len(shards)))
