"""What a training step adds to the log: sums over tokens, so that those of ranks can be summed.

Shapes: N rows (target positions), M those of them on which preferred types are compared.
"""

from __future__ import annotations

import math

import torch
from fairseq import utils
from fairseq.logging import metrics
from torch import Tensor

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
    "pskd_student_error",
    "pskd_teacher_error",
    "pskd_hard_student_error",
    "pskd_hard_teacher_error",
)


def no_statistics() -> dict[str, float]:
    """Return the sums of a step without a teacher."""
    return dict.fromkeys(_NAMES, 0.0)


def step_statistics(
    *,
    target: Tensor,
    is_token: Tensor,
    taught: Tensor,
    nll: Tensor,
    teacher_at_label: Tensor,
    student_prefers: Tensor,
    teacher_prefers: Tensor,
    top_k_mass: Tensor,
    alpha: float,
) -> dict[str, Tensor]:
    """Return the sums of a step with a teacher.

    The mean gradient rescaling weights each token by its plain gradient on the label's logit,
    1 - p[y]: the factor itself divides by it and has no finite mean over well-learned tokens. Hard
    tokens are those on which the teacher preferred another type than the label.

    Args:
        target: (N,) labels.
        is_token: (N,) False in padding.
        taught: (N,) bool, the tokens that learn from the teacher.
        nll: (N,) of the student, in nats.
        teacher_at_label: (N,) the teacher's probability of the label.
        student_prefers: (M,) the student's most likely type of the `COMPARED` rows.
        teacher_prefers: (M,) the teacher's.
        top_k_mass: the sum over taught tokens of the probability that a memory's types hold.
        alpha: weight of the teacher.
    """
    tokens = is_token.sum()
    # A float32 softmax rounds what is very unlikely to 0, and its logarithm would spoil the sum.
    teacher_at_label = teacher_at_label.clamp_min(torch.finfo(torch.float32).tiny)
    agree = (student_prefers == teacher_prefers) & taught[COMPARED]
    hard = (teacher_prefers != target[COMPARED]) & taught[COMPARED]
    student_error = 1.0 - nll.neg().exp()
    teacher_error = alpha * (1.0 - teacher_at_label)
    sums = {
        "pskd_tokens": tokens,
        "pskd_alpha": alpha * tokens,
        "pskd_taught": taught.sum(),
        "pskd_teacher_nll": -(teacher_at_label.log() * taught).sum(),
        "pskd_top_k_mass": top_k_mass,
        "pskd_compared": taught[COMPARED].sum(),
        "pskd_agree": agree.sum(),
        "pskd_student_error": (student_error * taught).sum(),
        "pskd_teacher_error": (teacher_error * taught).sum(),
        "pskd_hard_student_error": (student_error[COMPARED] * hard).sum(),
        "pskd_hard_teacher_error": (teacher_error[COMPARED] * hard).sum(),
    }
    return {name: sums[name].float() for name in _NAMES}


def log_statistics(logging_outputs: list[dict]) -> None:
    """Log the means of steps and ranks; the teacher's NLL in bits, as fairseq's ``nll_loss``."""
    if not logging_outputs or "pskd_tokens" not in logging_outputs[0]:
        return
    total = {name: utils.item(sum(log[name] for log in logging_outputs)) for name in _NAMES}
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
