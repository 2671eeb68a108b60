"""What PS-KD did to each sample of the training set, summed over the epochs.

Shapes: N rows of a batch, M samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pskd.checks import check_keys
from pskd.distributed import is_first, sum_over_processes
from pskd.effect import gradient_on_label
from pskd.rows import check_count

__all__ = ["ExampleStats"]

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
        rescaling = 1.0 - sums[:, _REMOVED] / sums[:, _SOFTENED_ERROR]
        rescaling[sums[:, _SOFTENED_ERROR] == 0] = torch.nan
        return difficulty, rescaling

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
