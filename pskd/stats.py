"""What a teacher does to the rows of a batch, and its means over batches, processes and samples.

Cross-entropy's gradient on a row's label is ``1 - p[y]``, the student's error, and the teacher
takes ``alpha * (1 - p_past[y])`` of it away.

Shapes: N rows of a batch, M samples of the data set, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pskd.checks import check_keys, check_row_weights, check_tensors, check_weights
from pskd.distributed import is_first, sum_over_processes
from pskd.loss import PSKDStats
from pskd.rows import check_count
from pskd.targets import TopK

__all__ = [
    "ExampleStats",
    "Means",
    "TeacherEffect",
    "TeacherMeans",
    "agreement",
    "gradient_on_label",
    "gradient_rescaling",
    "ratios",
    "rescaling",
    "teacher_effect",
    "teacher_means",
    "teacher_sums",
]


class TeacherEffect(NamedTuple):
    """Sums over the rows that have a teacher, so that those of steps and processes can be added.

    A row that is not finite, in a step that overflowed, is left out.

    Attributes:
        rows: () int64, their number.
        teacher_nll: () float32, of the past prediction's negative log-likelihood of the label, in
            nats.
        error: () float32, of the student's ``1 - p[y]``.
        removed: () float32, of ``alpha * (1 - p_past[y])``.
    """

    rows: Tensor
    teacher_nll: Tensor
    error: Tensor
    removed: Tensor


@torch.no_grad()
def teacher_effect(nll: Tensor, teacher_probs_at_label: Tensor, alpha: Tensor) -> TeacherEffect:
    """Return what the teacher did to a batch; does not wait for the device.

    Args:
        nll: (N,) the student's negative log-likelihood of the label, in nats.
        teacher_probs_at_label: (N,) the past prediction's probability of the label.
        alpha: (N,) weight of the teacher; 0 for a row that has none.
    """
    error, removed = gradient_on_label(nll, teacher_probs_at_label, alpha)
    rows = (alpha > 0) & error.isfinite() & removed.isfinite()
    # A float32 softmax rounds what is very unlikely to 0, whose logarithm would spoil the sum.
    tiny = torch.finfo(torch.float32).tiny
    teacher_nll = -teacher_probs_at_label.float().clamp_min(tiny).log()
    sums = (torch.where(rows, value, 0.0).sum() for value in (teacher_nll, error, removed))
    return TeacherEffect(rows.sum(), *sums)


def gradient_on_label(
    nll: Tensor, teacher_probs_at_label: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each row's plain gradient on its label, and what the teacher takes of it away.

    Args:
        nll, teacher_probs_at_label, alpha: as of `teacher_effect`.

    Returns:
        Two of (N,) float32, ``1 - p[y]`` and ``alpha * (1 - p_past[y])``; the latter 0 where alpha
        is, whatever the past prediction.
    """
    removed = alpha.float() * (1.0 - teacher_probs_at_label.float())
    return -torch.expm1(-nll.float()), torch.where(alpha == 0, 0.0, removed)


def agreement(scores: Tensor, past: Tensor | TopK) -> Tensor:
    """Return whether the student and its past prediction prefer the same class.

    Args:
        scores: (N, C) the student's logits or probabilities.
        past: (N, C) probabilities or `TopK`.

    Returns:
        (N,) bool.
    """
    if isinstance(past, TopK):
        preferred = past.indices.gather(1, past.probs.argmax(dim=1, keepdim=True))
    else:
        preferred = past.argmax(dim=1, keepdim=True)
    # Of one argmax less than comparing two: the student's best score is on the teacher's class.
    return scores.gather(1, preferred).squeeze(1) == scores.amax(dim=1)


def rescaling(error: Tensor | float, removed: Tensor | float) -> Tensor | float:
    """Return the mean factor on gradients, each row weighted by its plain gradient.

    The factor of a single row divides by that, and has no finite mean over well-learned rows.

    Args:
        error, removed: sums as of `TeacherEffect`; the factor of no error is NaN or an error.
    """
    return 1.0 - removed / error


@torch.no_grad()
def teacher_sums(logits: Tensor, past: Tensor | TopK, alpha: Tensor, stats: PSKDStats) -> Tensor:
    """Return the (5,) float32 sums of a batch that `teacher_means` divides.

    They are those of `TeacherEffect`, in order, and the number of rows that agree with their
    teacher on the best class.

    Args:
        logits: (N, C) the student's.
        past: (N, C) probabilities or `TopK`, the teacher's.
        alpha: (N,) weight of the teacher; 0 for a row that has none.
        stats: of the loss.
    """
    effect = teacher_effect(stats.nll, stats.teacher_probs_at_label, alpha)
    # Of a row that is not finite NaN has the best score, which equals nothing.
    agreed = ((alpha > 0) & agreement(logits, past)).sum()
    return torch.stack([value.float() for value in (*effect, agreed)])


def teacher_means(sums: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the means that a log shows, as two sums each, over the rows that have a teacher.

    ``pskd/teacher_nll`` is in nats, ``pskd/teacher_agreement`` a fraction,
    ``pskd/gradient_rescaling`` as of `rescaling`.

    Args:
        sums: (5,) of `teacher_sums`.
    """
    rows, teacher_nll, error, removed, agreed = sums.unbind()
    return {
        "pskd/teacher_nll": (teacher_nll, rows),
        "pskd/teacher_agreement": (agreed, rows),
        "pskd/gradient_rescaling": (error - removed, error),
    }


def ratios(sums: Mapping[str, tuple[Tensor, Tensor] | Tensor], *, shared: bool) -> dict[str, float]:
    """Return each mean, by one transfer from the device; a mean of nothing is left out.

    Args:
        sums: name -> numerator and denominator.
        shared: over all processes, a collective; each must have the same names.
    """
    names = sorted(sums)
    if not names:
        return {}
    pairs = [torch.stack([value.float() for value in sums[name]]) for name in names]
    stacked = torch.stack(pairs)
    totals = (sum_over_processes(stacked) if shared else stacked).tolist()
    named = zip(names, totals, strict=True)
    return {name: top / bottom for name, (top, bottom) in named if bottom}


def gradient_rescaling(
    student_probs_at_label: Tensor, teacher_probs_at_label: Tensor, alpha: float | Tensor
) -> Tensor:
    """The factor by which PS-KD rescales each row's gradient on the label's logit.

    Equals ``1 - alpha * (1 - p_teacher[y]) / (1 - p_student[y])``: below 1 where the model used to
    be unsure of the label, near 1 where the past prediction was already right. A row on which the
    student is certain has no gradient to rescale and gets the limit for an equal teacher,
    ``1 - alpha``, if the teacher is certain too, else ``-inf``.

    Args:
        student_probs_at_label: (N,) the student's probability of the label now.
        teacher_probs_at_label: (N,) the past prediction's probability of the label.
        alpha: weight of the teacher in [0, 1]; one number, or (N,) with one a row.

    Returns:
        (N,) factors, unitless, at most 1; float32, or float64 for float64 input.

    Raises:
        ValueError: if a weight lies outside [0, 1] or shapes disagree.

    Source: Kim et al. 2021, section 3.2 (hard example mining).
    """
    check_tensors(
        student_probs_at_label=student_probs_at_label,
        teacher_probs_at_label=teacher_probs_at_label,
    )
    if student_probs_at_label.shape != teacher_probs_at_label.shape:
        raise ValueError(
            f"teacher_probs_at_label: expected shape {tuple(student_probs_at_label.shape)}, got "
            f"{tuple(teacher_probs_at_label.shape)}"
        )
    alpha = check_weights(alpha, 0.0, student_probs_at_label.numel())
    check_row_weights(alpha)
    if student_probs_at_label.dtype != torch.float64:
        student_probs_at_label = student_probs_at_label.float()
    # Rounded, a probability may exceed 1: to divide by a negative error would make no factor.
    student_error = (1.0 - student_probs_at_label).clamp_min(0.0)
    teacher_error = (1.0 - teacher_probs_at_label.to(student_error.dtype)).clamp_min(0.0)
    both_certain = (student_error == 0) & (teacher_error == 0)
    ratio = torch.where(both_certain, 1.0, teacher_error / student_error)
    weight = torch.as_tensor(alpha, dtype=ratio.dtype, device=ratio.device)
    return torch.where(weight == 0, 1.0, 1.0 - weight * ratio)  # not NaN from 0 * inf


class Means:
    """Named ratios of two sums, such as a loss over iterations or a likelihood over ROIs.

    Adding to them does not wait for the device; reading them does.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # name: (2,) float32, numerator and denominator

    def add(self, name: str, numerator: Tensor, denominator: Tensor | float = 1.0) -> None:
        """Add to both sums of a mean."""
        top = numerator.detach().float()
        if not isinstance(denominator, Tensor):
            denominator = torch.full_like(top, denominator)
        pair = torch.stack([top, denominator.float()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def take(self) -> dict[str, float]:
        """Return the means over all processes and start anew; a mean of nothing is left out.

        Every process must have added to the same names.
        """
        sums, self._sums = self._sums, {}
        return ratios(sums, shared=True)


class TeacherMeans:
    """What the teacher did to the rows since the means were last taken.

    Adding does not wait for the device; taking does.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, logits: Tensor, past: Tensor | TopK, alpha: Tensor, stats: PSKDStats) -> None:
        """Add a batch; the arguments are those of `teacher_sums`."""
        sums = teacher_sums(logits, past, alpha, stats)
        sums = sums.double() if sums.is_cpu else sums  # not every device has float64
        self._sums = sums if self._sums is None else self._sums + sums

    def sums_on_cpu(self) -> Tensor:
        """Return the (5,) float64 sums, for the compiled loss to add to."""
        if self._sums is None or not self._sums.is_cpu:
            first = torch.zeros(5, dtype=torch.float64, device="cpu")
            self._sums = first if self._sums is None else self._sums.to(first)
        return self._sums

    def take(self) -> dict[str, float]:
        """Return `teacher_means` over all processes and start anew; a mean of nothing is left out.

        Either every process has added batches or none has.
        """
        sums, self._sums = self._sums, None
        return {} if sums is None else ratios(teacher_means(sums), shared=True)


_VISITS, _ERROR, _SOFTENED_ERROR, _REMOVED = range(4)


class ExampleStats:
    """How hard each sample was, and by which factor PS-KD rescaled its gradient.

    The plain gradient on a label's logit is ``1 - p[y]``, and PS-KD removes ``alpha * (1 -
    p_past[y])`` of it. Both are summed over a sample's visits before they are divided: the factor
    of a single visit has no finite mean over well-learned samples.

    Args:
        num_rows: M.
        device: where the sums lie, 16 bytes a sample.

    Raises:
        ValueError: for a number of samples below 1.

    Source: Kim et al. 2021, section 3.2 (hard example mining).
    """

    def __init__(self, num_rows: int, device: torch.device | str = "cpu") -> None:
        self.num_rows = check_count("num_rows", num_rows)
        self._sums = torch.zeros(self.num_rows, 4, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(
        self, rows: Tensor, nll: Tensor, teacher_probs_at_label: Tensor | None, alpha: Tensor
    ) -> None:
        """Add a batch; a row that is not finite, in a step that overflowed, is no visit.

        Args:
            rows: (N,) int64 in [0, M).
            nll: (N,) the student's, in nats.
            teacher_probs_at_label: (N,) the past prediction's probability of the label; None
                without a teacher.
            alpha: (N,) weight of the teacher, 0 for a row that has none.
        """
        if teacher_probs_at_label is None:
            teacher_probs_at_label = torch.ones_like(nll)  # takes nothing away
        error, removed = gradient_on_label(nll, teacher_probs_at_label, alpha)
        softened = error * (alpha > 0)
        added = torch.stack([torch.ones_like(error), error, softened, removed], dim=1)
        added = torch.where(added.isfinite().all(dim=1, keepdim=True), added, 0.0)
        rows, added = rows.to(self._sums.device), added.to(self._sums.device)
        self._sums.index_add_(0, rows, added)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return what all processes added; a collective.

        Returns:
            difficulty: (M,) float32 on the CPU, the mean of ``1 - p[y]`` over a sample's visits.
            rescaling: (M,) float32 on the CPU, the factor on the sample's gradient, at most 1.
            Both are NaN for a sample without a visit, the factor also without a teacher.
        """
        sums = self._total()
        difficulty = sums[:, _ERROR] / sums[:, _VISITS]
        factor = rescaling(sums[:, _SOFTENED_ERROR], sums[:, _REMOVED])
        assert isinstance(factor, Tensor)
        factor[sums[:, _SOFTENED_ERROR] == 0] = torch.nan
        return difficulty, factor

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of all processes, on the CPU; a collective."""
        return {"sums": self._total()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the sums of `state_dict`, in any number of processes.

        Raises:
            ValueError: for the sums of another number of samples.
        """
        self.check_state_dict(state)
        self._sums.zero_()
        if is_first():
            self._sums.copy_(state["sums"])

    def check_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raise ValueError where `load_state_dict` would."""
        check_keys("the state of examples", state, ("sums",))
        sums, width = state["sums"], self._sums.size(1)
        shape = tuple(sums.shape) if isinstance(sums, Tensor) else None
        if shape is None or len(shape) != 2 or shape[1] != width:
            got = type(sums).__name__ if shape is None else shape
            raise ValueError(f"examples: expected sums of shape (samples, {width}), got {got}")
        if shape[0] != self.num_rows:
            raise ValueError(f"examples: expected {self.num_rows} samples, got {shape[0]}")

    def _total(self) -> Tensor:
        return sum_over_processes(self._sums.clone()).cpu()
