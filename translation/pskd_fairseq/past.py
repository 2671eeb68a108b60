"""What the teacher says of a batch: a snapshot's scores, or a memory's kept predictions.

Shapes: N rows (target positions), V types in the target dictionary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pskd import LinearTeacher, TopK


class Past(NamedTuple):
    """What the teacher says of a batch's tokens, in one of two forms.

    Attributes:
        scores: (N, V) a snapshot's scores, or what they are made of in the fused loss, or None.
        top_k: a memory's predictions, or None.
        taught: (N,) bool, the tokens that learn from the teacher.
        alpha: its weight, one for all or (N,).
    """

    scores: Tensor | LinearTeacher | None
    top_k: TopK | None
    taught: Tensor
    alpha: float | Tensor

    def preferred(self, part: slice) -> Tensor:
        """Return the most likely type of some tokens."""
        if self.top_k is not None:
            return self.top_k.indices[part, 0]
        assert isinstance(self.scores, Tensor)
        return self.scores[part].argmax(1)

    def top_k_mass(self) -> Tensor:
        """Return the sum over the tokens of the probability that a memory's types hold, else 0."""
        if self.top_k is None:
            return self.taught.new_zeros((), dtype=torch.float32)
        return torch.where(self.taught, self.top_k.probs.sum(dim=1), 0.0).sum()
