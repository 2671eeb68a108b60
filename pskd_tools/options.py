"""Command lines: the ranges of their numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

__all__ = ["TRAINING_RANGES", "check_ranges"]

#: Of the options that every training has: (least, most), both allowed.
TRAINING_RANGES = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "lr": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "lr_steps": (0, math.inf),
    "lr_gamma": (0.0, math.inf),
    "workers": (0, math.inf),
    "seed": (0, 2**63 - 1),
}


def check_ranges(args: argparse.Namespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers that are not finite or out of range.

    Args:
        args: the command line.
        ranges: name of an option -> (least, most), both allowed; of a list every entry is looked
            at, None is left alone.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and not (least <= entry <= most and math.isfinite(entry)):
                upper = f" to {most:g}" if math.isfinite(most) else " or more"
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected {least:g}{upper}, got {entry}"
                )
