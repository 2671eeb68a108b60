"""The fairseq criterion ``pskd``: label-smoothed cross-entropy with a teacher of one epoch ago.

Shapes: B sentences, T target positions, V types in the target dictionary, N = B * T rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from torch import Tensor

from pskd import LinearTeacher, PSKDStats, pskd_cross_entropy, pskd_linear_cross_entropy
from pskd.targets import row_alphas
from pskd_fairseq import fused
from pskd_fairseq.checkpoint import SavePlan
from pskd_fairseq.config import PSKDCriterionConfig
from pskd_fairseq.epoch import EpochState, Schedule
from pskd_fairseq.fused import FeaturesOnly
from pskd_fairseq.memory import KeptRows, TokenMemory
from pskd_fairseq.past import Past
from pskd_fairseq.resume import ResumePlan, check_resume
from pskd_fairseq.step_statistics import COMPARED, log_statistics, no_statistics, step_statistics


@register_criterion("pskd", dataclass=PSKDCriterionConfig)
class PSKDCriterion(LabelSmoothedCrossEntropyCriterion):
    """Cross-entropy whose target is softened by the model's own prediction of one epoch ago.

    In training the loss of a token is ``(1 - alpha) * label_smoothed + alpha * CE(teacher)``, with
    fairseq's label smoothing on the hard part. With alpha 0, in the first epoch, and in validation
    it is `LabelSmoothedCrossEntropyCriterion` to the bit.

    Raises:
        ValueError: if an option is out of its range, two exclude each other, or training cannot
            go on from the checkpoint that fairseq would read (`resume.check_resume`).
        FileNotFoundError: if ``--restore-file`` names a file that is not there.
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
        types = len(task.target_dictionary)
        _check_options(cfg, types, label_smoothing, ignore_prefix_size, report_accuracy)
        memory = _build_memory(cfg, task) if str(cfg.pskd_teacher) == "memory" else None
        options: dict[str, object] = {"--label-smoothing": label_smoothing}
        if cfg.pskd_alpha_final:
            options["--pskd-teacher"] = str(cfg.pskd_teacher)
            options["--pskd-skip-wrong-teacher"] = cfg.pskd_skip_wrong_teacher
        self.epoch_state = EpochState(schedule, cfg.train_subset, memory, options)
        self._skip_wrong_teacher = cfg.pskd_skip_wrong_teacher
        self._fused_linear = cfg.pskd_fused_linear
        self._step_statistics: Mapping[str, float | Tensor] = {}
        self._output_is_logits: bool | None = None  # known from the first batch
        if cfg.path is None:
            suffix = cfg.checkpoint_suffix
            plan = ResumePlan(
                cfg.save_dir, cfg.restore_file, cfg.reset_dataloader, cfg.continue_once, suffix
            )
            allow_change = cfg.pskd_allow_schedule_change
            check_resume(plan, task, schedule.options(), allow_change, options)
            self.epoch_state.attach(task, SavePlan(cfg.save_dir, suffix, cfg.keep_best_checkpoints))

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
        state = self.epoch_state
        self._step_statistics = no_statistics() if self.training else {}
        if isinstance(model, FeaturesOnly):
            return self._fused_loss(model, net_output, sample)
        if not self.training or not (state.active or state.records):
            return super().compute_loss(model, net_output, sample, reduce=reduce)

        scores, target = self._scores_and_target(model, net_output, sample)
        is_token = target != self.padding_idx
        kept = self._token_rows(model, net_output, sample)
        recorded = kept if state.records else None
        ask = partial(self._teacher_scores, model, sample)
        past = self._past(sample, target, is_token, kept, ask)
        if past is None:
            if recorded is not None:
                recorded.write(scores)
            return super().compute_loss(model, net_output, sample, reduce=reduce)
        assert not isinstance(past.scores, LinearTeacher)  # those are of the fused loss
        loss, stats = pskd_cross_entropy(
            scores,
            target,
            past.top_k,
            past.alpha,
            teacher_logits=past.scores,
            ignore_index=self.padding_idx,
            label_smoothing=self._smoothing(scores.size(-1)),
            reduction="sum" if reduce else "none",
            return_stats=True,
        )
        if recorded is not None:
            label = scores.detach().gather(1, target[:, None]).squeeze(1)
            recorded.write(scores, stats.nll + label)
        self._step_statistics = _statistics(
            scores.detach(), target, past, is_token, stats, state.alpha
        )
        return (loss, stats.nll.sum()) if reduce else (loss[:, None], stats.nll[:, None])

    def _fused_loss(self, model: FeaturesOnly, net_output, sample) -> tuple[Tensor, Tensor]:
        """As `compute_loss` in training, of features (B, T, H) in place of logits."""
        if self._output_is_logits is None:
            logits = model.logits_of_first(net_output)
            self._output_is_logits = _is_logits(model.model, logits, sample)
        if not self._output_is_logits:
            raise fused.refuse_distribution(model)
        state, projection = self.epoch_state, model.projection
        hidden, target = self._rows(net_output[0], model.get_targets(sample, net_output))
        is_token = target != self.padding_idx
        kept = self._token_rows(model, net_output, sample)
        recorded = kept if state.records else None
        ask = partial(self._teacher_features, model.model, sample)
        past = self._past(sample, target, is_token, kept, ask)
        teacher = None
        if past is not None:
            teacher = past.scores if past.top_k is None else past.top_k
        loss, stats = pskd_linear_cross_entropy(
            hidden,
            projection.weight,
            target,
            teacher,
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
            self._step_statistics = step_statistics(
                target=target,
                is_token=is_token,
                taught=past.taught,
                nll=stats.nll,
                teacher_at_label=stats.teacher_probs_at_label,
                student_prefers=stats.student_top_k.indices[COMPARED, 0],
                teacher_prefers=stats.teacher_preferred[COMPARED],
                top_k_mass=past.top_k_mass(),
                alpha=state.alpha,
            )
        return loss, stats.nll.sum()

    def _smoothing(self, types: int) -> float:
        # fairseq spreads epsilon over the other V - 1 types, torch over all V.
        return self.eps * types / (types - 1)

    def _token_rows(self, model, net_output, sample) -> KeptRows | None:
        """Return where the memory keeps a batch's tokens, if it is read or written."""
        memory = self.epoch_state.memory
        if memory is None or not (self.epoch_state.active or self.epoch_state.records):
            return None
        target = model.get_targets(sample, net_output)
        return KeptRows(memory, *self._rows(*memory.rows(sample, target, self.padding_idx)))

    def _past(
        self,
        sample,
        target: Tensor,
        is_token: Tensor,
        kept: KeptRows | None,
        ask_snapshot: Callable[[], Tensor | LinearTeacher],
    ) -> Past | None:
        """Return what the teacher says of a batch, and which tokens learn from it, if any do."""
        if not self.epoch_state.active:
            return None
        scores, top_k, taught = None, None, is_token
        if kept is None:
            scores = ask_snapshot()
        else:
            top_k, taught = kept.memory.read(kept.rows, kept.valid)
        past = Past(scores, top_k, taught, self.epoch_state.alpha)
        if self._skip_wrong_teacher:
            past = past._replace(taught=taught & (past.preferred(slice(None)) == target))
        if kept is not None or self._skip_wrong_teacher:
            past = past._replace(alpha=row_alphas(self.epoch_state.alpha, past.taught))
        return past

    def _rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors of (B, T, ...) as rows, (N, ...), without the ignored prefixes."""
        return tuple(tensor[:, self.ignore_prefix_size :].flatten(0, 1) for tensor in tensors)

    def _scores_and_target(self, model, net_output, sample) -> tuple[Tensor, ...]:
        """Return scores whose softmax is the model's distribution, (N, V), and labels, (N,).

        These are the decoder's logits, which spares a normalisation forward and backward, or where
        a model makes its distribution in another way (adaptive softmax, pointer-generator), its
        log-probabilities.
        """
        if self._output_is_logits is None:
            self._output_is_logits = _is_logits(model, net_output, sample)
        if not self._output_is_logits:
            return self.get_lprobs_and_target(model, net_output, sample)
        return self._rows(net_output[0], model.get_targets(sample, net_output))

    # The teacher is in eval mode, so it draws no random number and the student's dropout is the
    # same with and without it.
    @torch.no_grad()
    def _teacher_scores(self, model, sample) -> Tensor:
        """Return the scores on the batch, (N, V), of a model's teacher."""
        teacher = self.epoch_state.teacher_of(model)
        scores, _ = self._scores_and_target(teacher, teacher(**sample["net_input"]), sample)
        return scores

    @torch.no_grad()
    def _teacher_features(self, model, sample) -> LinearTeacher:
        """Return the features on the batch, (N, H), of a model's teacher, with its embedding."""
        teacher = FeaturesOnly(self.epoch_state.teacher_of(model))
        (hidden,) = self._rows(teacher(**sample["net_input"])[0])
        return LinearTeacher(hidden, teacher.projection.weight, teacher.projection.bias)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate the log outputs, fairseq's and PS-KD's."""
        super().reduce_metrics(logging_outputs)
        log_statistics(logging_outputs)


def _check_options(
    cfg: PSKDCriterionConfig,
    types: int,
    label_smoothing: float,
    ignore_prefix_size: int,
    report_accuracy: bool,
) -> None:
    """Raise ValueError where an option is out of its range or excludes another."""
    # It would cut tokens off the end of the target, and others off the end of the scores.
    if ignore_prefix_size < 0:
        raise ValueError(
            f"--ignore-prefix-size: expected a number of at least 0, got {ignore_prefix_size}"
        )
    # From there on fairseq's smoothing would make the label the least likely type.
    if not 0.0 <= label_smoothing <= 1.0 - 1.0 / types:
        raise ValueError(
            f"--label-smoothing: expected a number in [0, 1 - 1/{types}], got {label_smoothing}"
        )
    if cfg.ddp_backend == "fully_sharded" and str(cfg.pskd_teacher) == "snapshot":
        raise ValueError(
            "--pskd-teacher snapshot copies the whole model: expected --ddp-backend "
            "legacy_ddp or pytorch_ddp, got fully_sharded"
        )
    if cfg.pskd_fused_linear:
        fused.check_options(cfg.pskd_skip_wrong_teacher, report_accuracy, cfg.ddp_backend)


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
    past: Past,
    is_token: Tensor,
    stats: PSKDStats,
    alpha: float,
) -> dict[str, Tensor]:
    """Return what one step adds to the log, of the (N, V) student's scores."""
    return step_statistics(
        target=target,
        is_token=is_token,
        taught=past.taught,
        nll=stats.nll,
        teacher_at_label=stats.teacher_probs_at_label,
        student_prefers=scores[COMPARED].argmax(1),
        teacher_prefers=past.preferred(COMPARED),
        top_k_mass=past.top_k_mass(),
        alpha=alpha,
    )


@torch.no_grad()
def _is_logits(model, net_output, sample) -> bool:
    """Whether the model's distribution on a batch is the plain softmax of its first output."""
    output = net_output[0]
    lprobs = model.get_normalized_probs(net_output, log_probs=True, sample=sample)
    return output.shape == lprobs.shape and torch.allclose(
        output.float().log_softmax(dim=-1), lprobs.float(), atol=1e-3
    )
