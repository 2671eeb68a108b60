"""Means that are collected on the device and read now and then."""

from __future__ import annotations

import torch
from torch import Tensor

from pskd.distributed import sum_over_processes
from pskd.effect import agreement, teacher_effect
from pskd.loss import PSKDStats
from pskd.targets import TopK

__all__ = ["Means"]


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

    @torch.no_grad()
    def add_teacher(
        self, logits: Tensor, past: Tensor | TopK, alpha: Tensor, stats: PSKDStats
    ) -> None:
        """Add what the teacher did, over the rows that have one.

        ``pskd/teacher_nll`` in nats, ``pskd/teacher_agreement`` as a fraction, and
        ``pskd/gradient_rescaling`` as of `TeacherEffect`.

        Args:
            logits: (N, C) the student's.
            past: (N, C) probabilities or `TopK`, the teacher's.
            alpha: (N,) weight of the teacher; 0 for a row that has none.
            stats: of the loss.
        """
        effect = teacher_effect(stats.nll, stats.teacher_probs_at_label, alpha)
        # Of a row that is not finite NaN has the best score, which equals nothing.
        agree = ((alpha > 0) & agreement(logits, past)).sum()
        self.add("pskd/teacher_nll", effect.teacher_nll, effect.rows)
        self.add("pskd/teacher_agreement", agree, effect.rows)
        self.add("pskd/gradient_rescaling", effect.error - effect.removed, effect.error)

    def take(self) -> dict[str, float]:
        """Return the means over all processes and start anew; a mean of nothing is left out.

        Every process must have added to the same names.
        """
        names, sums = sorted(self._sums), self._sums
        self._sums = {}
        if not names:
            return {}
        totals = sum_over_processes(torch.stack([sums[name] for name in names])).tolist()
        pairs = zip(names, totals, strict=True)
        return {name: top / bottom for name, (top, bottom) in pairs if bottom}
