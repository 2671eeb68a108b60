"""Command lines of trainings: the options that all of them have, and the ranges of numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pskd.schedule import SCHEDULES

__all__ = ["add_pskd_options", "add_run_options", "add_training_options", "in_range"]

OPTIMIZERS = ("sgd", "adamw")


def in_range(
    kind: type[int] | type[float], least: float, most: float = math.inf
) -> Callable[[str], float]:
    """Return a ``type`` of argparse: finite numbers from ``least`` to ``most``."""

    def convert(text: str) -> float:
        value = kind(text)
        if not (least <= value <= most and math.isfinite(value)):
            upper = f" to {most:g}" if math.isfinite(most) else " or more"
            raise argparse.ArgumentTypeError(f"expected {least:g}{upper}, got {value}")
        return value

    convert.__name__ = kind.__name__  # argparse tells it of text that is no number
    return convert


#: Numbers of every training: their type, and what they are.
_NUMBERS = {
    "--epochs": (in_range(int, 1), ""),
    "--batch-size": (in_range(int, 1), "images a process; "),
    "--lr": (in_range(float, 0.0), ""),
    "--momentum": (in_range(float, 0.0, 1.0), "of sgd; "),
    "--weight-decay": (in_range(float, 0.0), ""),
    "--lr-gamma": (in_range(float, 0.0), ""),
    "--workers": (in_range(int, 0), "reading images, a process; "),
    "--seed": (in_range(int, 0, 2**63 - 1), ""),
}


def add_run_options(
    parser: argparse.ArgumentParser, output_dir: str, *aliases: str, test_only: Sequence[str]
) -> None:
    """Add where a run writes, what it does with what lies there, and whether it trains at all.

    Args:
        parser: of the program.
        output_dir: the default.
        aliases: other names of ``--output-dir``.
        test_only: the help of ``--test-only``, and its other names.
    """
    add = parser.add_argument
    add("--output-dir", *aliases, default=output_dir, help="default: %(default)s")
    add("--resume", action="store_true", help="go on from OUTPUT_DIR/checkpoint.pth, if it exists")
    add("--overwrite", action="store_true", help="replace a training that lies in OUTPUT_DIR")
    add("--check-images", action="store_true", help="read every image once before the first step")
    add("--test-only", *test_only[1:], action="store_true", help=test_only[0])


def add_training_options(
    group: argparse._ArgumentGroup,
    defaults: Mapping[str, object],
    *,
    aliases: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Add the optimizer, the numbers of a training, and the device.

    Args:
        group: of the parser.
        defaults: flag -> default; without one of ``--lr-steps`` it is None.
        aliases: flag -> another name.
        notes: flag -> what follows its default in the help.
    """
    aliases, notes = aliases or {}, notes or {}

    def add(flag: str, told: str = "", **options: Any) -> None:
        names = [flag, aliases[flag]] if flag in aliases else [flag]
        default = f"{told}default: " + ("%(default)s" if flag in defaults else "")
        told = default + notes.get(flag, "")
        group.add_argument(*names, default=defaults.get(flag), help=told, **options)

    for flag, (kind, told) in _NUMBERS.items():
        add(flag, told, type=kind)
    add("--opt", choices=OPTIMIZERS)
    steps = "epochs after which the rate is multiplied by --lr-gamma; "
    add("--lr-steps", steps, type=in_range(int, 0), nargs="*")
    group.add_argument("--device", help="cpu or cuda; default: cuda if there is one")


def add_pskd_options(group: argparse._ArgumentGroup, *aliases: str) -> None:
    """Add alpha and its schedule; ``aliases`` are other names of ``--pskd-alpha-final``."""
    group.add_argument(
        "--pskd-alpha-final", *aliases, type=in_range(float, 0.0, 1.0), default=0.0,
        help="weight of the teacher at the end of training (the paper's alpha_T); default: 0, off",
    )  # fmt: skip
    group.add_argument(
        "--pskd-alpha-schedule", choices=list(SCHEDULES), default="linear", help="default: linear"
    )
