"""AURC and its excess as torchmetrics, for whoever logs through them.

    metrics = MetricCollection([AURC(), ExcessAURC()])
    metrics.update(probs, target)  # each batch
    metrics.compute()              # of the batches of all processes

The other figures of `pskd.calibration` are torchmetrics' own: `MulticlassCalibrationError` is its
expected calibration error. Shapes: N rows, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pskd.calibration import aurc, excess_aurc
from pskd.calibration.inputs import check_pair

__all__ = ["AURC", "ExcessAURC"]


class _RiskCoverage(Metric):
    """Keeps each row's confidence and whether it is correct: five bytes a row."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0

    area: Callable[..., float]
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("confidence", default=[], dist_reduce_fx="cat")
        self.add_state("correct", default=[], dist_reduce_fx="cat")

    def update(self, probs: Tensor, target: Tensor) -> None:
        """Add a batch: (N, C) probabilities, rows that sum to 1, and (N,) integer labels.

        Raises:
            ValueError: as `pskd.calibration.ConfidenceAccumulator.update`.
        """
        probs, target = check_pair(probs, target)
        confidence, predicted = probs.max(dim=1)
        self.confidence.append(confidence.float().clamp(0.0, 1.0))
        self.correct.append(predicted == target)

    def compute(self) -> Tensor:
        """Return the area as a fraction, a float32 number; ValueError if there was no row."""
        area = type(self).area(dim_zero_cat(self.confidence), dim_zero_cat(self.correct))
        return torch.tensor(area, dtype=torch.float32, device=self.device)


class AURC(_RiskCoverage):
    """`pskd.calibration.aurc` of all rows: how badly confidence ranks right above wrong.

    Args:
        options: of `torchmetrics.Metric`.

    Source: Geifman & El-Yaniv 2019; Kim et al. 2021 report it, times 1000.
    """

    area = staticmethod(aurc)


class ExcessAURC(_RiskCoverage):
    """`pskd.calibration.excess_aurc` of all rows: what a better ranking would remove of `AURC`.

    Args:
        options: of `torchmetrics.Metric`.

    Source: Geifman & El-Yaniv 2019; Kim et al. 2021 report it, times 1000.
    """

    area = staticmethod(excess_aurc)
