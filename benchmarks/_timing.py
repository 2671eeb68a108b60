"""What the benchmarks of a training step share: the machine, the clock, ratios to one of the forms.

A figure belongs to a form, one of what is compared; forms take turns, so that a machine whose speed
drifts slows all.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["machine", "medians", "quartiles", "ratios_to", "seconds"]

Figures = dict[str, list[float]]  # of each form, in the order in which they were taken


def machine(device: torch.device | str) -> str:
    """Return what a figure was taken on."""
    return f"{platform.machine()} {device}, {torch.get_num_threads()} thread(s)"


def seconds(function: Callable[[], object], device: torch.device | str) -> float:
    """Return the seconds until the device has done what a call asks."""
    start = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(figures: Figures) -> dict[str, float]:
    """Return the median of each form."""
    return {name: statistics.median(values) for name, values in figures.items()}


def quartiles(figures: Figures) -> dict[str, list[float]]:
    """Return the first and the third quartile of each form."""
    return {name: statistics.quantiles(values, n=4)[::2] for name, values in figures.items()}


def ratios_to(base: str, figures: Figures) -> Figures:
    """Return each other form's figures over those of one form that were taken beside them."""
    return {
        name: [b / a for a, b in zip(figures[base], values, strict=True)]
        for name, values in figures.items()
        if name != base
    }
