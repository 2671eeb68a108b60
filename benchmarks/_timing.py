"""What the benchmarks share: the machine, the clock, ratios to one of the forms, types of options.

A figure belongs to a form, one of what is compared; forms take turns, so that a machine whose speed
drifts slows all.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["at_least", "machine", "medians", "new_file", "quartiles", "ratios_to", "seconds"]

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


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of options: integers from ``least`` on."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text}")
        return int(text)

    return number


def new_file(text: str) -> Path:
    """A type of options: a file that can be written when all is measured."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, got {text}")
    return path
