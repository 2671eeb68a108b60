"""Command lines: the ranges of their numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

__all__ = ["check_ranges"]


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
