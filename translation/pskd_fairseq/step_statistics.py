"""What a training step adds to the log: sums over tokens, so that those of ranks can be summed.

Shapes: N rows (target positions), M those of them on which preferred types are compared.
"""

from __future__ import annotations

import math

from fairseq import utils
from fairseq.logging import metrics
from torch import Tensor

from pskd.linear import LinearStats
from pskd.loss import PSKDStats
from pskd.stats import rescaling, teacher_effect
from pskd.targets import row_alphas
from pskd_fairseq.past import Past

#: Finding the largest of V scores costs as much as a softmax: every eighth token tells enough.
COMPARED = slice(None, None, 8)

_NAMES = (
    "pskd_tokens",
    "pskd_alpha",
    "pskd_taught",
    "pskd_teacher_nll",
    "pskd_top_k_mass",
    "pskd_compared",
    "pskd_agree",
    "pskd_error",
    "pskd_removed",
    "pskd_hard_error",
    "pskd_hard_removed",
)


def no_statistics() -> dict[str, float]:
    """Return the sums of a step without a teacher."""
    return dict.fromkeys(_NAMES, 0.0)


def step_statistics(
    past: Past,
    stats: PSKDStats | LinearStats,
    target: Tensor,
    is_token: Tensor,
    student_prefers: Tensor,
    teacher_prefers: Tensor,
    alpha: float,
) -> dict[str, Tensor]:
    """Return the sums of a step with a teacher.

    Hard tokens are those on which the teacher preferred another type than the label.

    Args:
        past: what the teacher said.
        stats: of the loss.
        target: (N,) labels.
        is_token: (N,) False in padding.
        student_prefers, teacher_prefers: (M,) the most likely types of the `COMPARED` rows.
        alpha: weight of the teacher, above 0.
    """
    taught, nll, at_label = past.taught, stats.nll, stats.teacher_probs_at_label
    tokens, compared = is_token.sum(), taught[COMPARED]
    hard = (teacher_prefers != target[COMPARED]) & compared
    effect = teacher_effect(nll, at_label, row_alphas(alpha, taught))
    hard_effect = teacher_effect(nll[COMPARED], at_label[COMPARED], row_alphas(alpha, hard))
    sums = (
        tokens,
        alpha * tokens,
        effect.rows,
        effect.teacher_nll,
        past.top_k_mass(),
        compared.sum(),
        ((student_prefers == teacher_prefers) & compared).sum(),
        effect.error,
        effect.removed,
        hard_effect.error,
        hard_effect.removed,
    )
    return {name: value.float() for name, value in zip(_NAMES, sums, strict=True)}


def log_statistics(logging_outputs: list[dict]) -> None:
    """Log the means of steps and ranks; the teacher's NLL in bits, as fairseq's ``nll_loss``."""
    if not logging_outputs or "pskd_tokens" not in logging_outputs[0]:
        return
    total = {name: utils.item(sum(log[name] for log in logging_outputs)) for name in _NAMES}
    tokens, taught = total["pskd_tokens"], total["pskd_taught"]
    if tokens == 0:  # no teacher yet
        metrics.log_scalar("alpha", 0.0, 1, round=4)
        return
    metrics.log_scalar("alpha", total["pskd_alpha"] / tokens, tokens, round=4)
    metrics.log_scalar("teacher_coverage", taught / tokens, tokens, round=4)
    if taught == 0:  # no token of these batches has a past
        return
    teacher_nll = total["pskd_teacher_nll"] / taught
    metrics.log_scalar("teacher_nll_loss", teacher_nll / math.log(2), taught, round=3)
    if total["pskd_top_k_mass"] > 0:  # of a memory
        metrics.log_scalar("top_k_mass", total["pskd_top_k_mass"] / taught, taught, round=4)
    compared = max(total["pskd_compared"], 1.0)
    metrics.log_scalar("teacher_agreement", total["pskd_agree"] / compared, compared, round=4)
    _log_rescaling("gradient_rescaling", total["pskd_error"], total["pskd_removed"])
    _log_rescaling("gradient_rescaling_hard", total["pskd_hard_error"], total["pskd_hard_removed"])


def _log_rescaling(name: str, error: float, removed: float) -> None:
    if error > 0:
        metrics.log_scalar(name, rescaling(error, removed), error, round=4)
