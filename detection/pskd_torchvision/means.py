"""Means that are collected on the device and read now and then."""

from __future__ import annotations

import torch
from torch import Tensor

from pskd_torchvision.distributed import sum_over_processes

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
        is_tensor = isinstance(denominator, Tensor)
        bottom = denominator.float() if is_tensor else torch.full_like(top, denominator)
        pair = torch.stack([top, bottom])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

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
