"""Pictures of what PS-KD did in a training: over its epochs, and to easy and hard examples.

Shapes: M training examples, G groups of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pskd_tools.drawing import INK, RUN_COLORS, curves, legend, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

__all__ = ["grouped_quartiles", "hard_example_plot", "teacher_plot"]

_GROUPS = 10
# A quartile of fewer examples is one of them.
_LEAST_IN_A_GROUP = 4
# What is plotted of the factors: below this quantile a few examples would flatten all others.
_LOWEST_SHOWN = 0.01
# More points than that cover each other.
_MOST_POINTS = 8000


def teacher_plot(
    runs: Mapping[str, Sequence[Mapping[str, float]]], path: str | os.PathLike[str]
) -> Path:
    """Draw the teacher's weight and the gradient rescaling of several runs over their epochs.

    Args:
        runs: name -> records with ``epoch`` (or ``iteration``) and any of ``alpha`` and
            ``gradient_rescaling``. A run without them keeps its colour and is not drawn.
        path: where to write; the suffix (.png, .pdf, .svg) is the format.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no run has anything to draw, or a suffix that matplotlib cannot write.

    Source: Kim et al. 2021, section 3.2, whose factor the rescaling is.
    """
    figure = new_figure(4.8, 4.6 + 0.11 * len(runs))
    upper, lower = figure.subplots(2, 1, sharex=True)
    drawn: dict[str, Line2D] = {}
    for axes, quantity in ((upper, "alpha"), (lower, "gradient_rescaling")):
        told = {name: [r for r in own if quantity in r] for name, own in runs.items()}
        drawn |= curves(
            axes,
            {
                name: [(r["epoch"] if "epoch" in r else r["iteration"], r[quantity]) for r in own]
                for name, own in told.items()
            },
        )
    if not drawn:
        raise ValueError("runs: expected one with alpha or gradient_rescaling, got none")
    upper.set_ylim(bottom=0.0)
    lower.axhline(1.0, color=INK, linewidth=1.0, linestyle=":")
    lower.xaxis.get_major_locator().set_params(integer=True)
    epochs = any("epoch" in record for records in runs.values() for record in records)
    style(upper, y="alpha,\nweight of the teacher")
    style(lower, "epoch" if epochs else "iteration", "gradient rescaling")
    legend(figure, 2, [drawn[name] for name in runs if name in drawn])
    return save(figure, path)


def grouped_quartiles(
    difficulty: np.ndarray, rescaling: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the factors are among examples of like difficulty.

    The groups are ten equal intervals of the difficulty; one of fewer than four examples is left
    out.

    Args:
        difficulty: (M,) float in [0, 1].
        rescaling: (M,) float.

    Returns:
        center: (G,) the median difficulty in each group.
        quartiles: (3, G) the lower quartile, median and upper quartile of the factor.
    """
    group = np.minimum((difficulty * _GROUPS).astype(int), _GROUPS - 1)
    members = [np.flatnonzero(group == g) for g in range(_GROUPS)]
    members = [rows for rows in members if len(rows) >= _LEAST_IN_A_GROUP]
    center = np.array([np.median(difficulty[rows]) for rows in members])
    quartiles = [np.quantile(rescaling[rows], [0.25, 0.5, 0.75]) for rows in members]
    return center, np.array(quartiles).reshape(-1, 3).T


def hard_example_plot(
    difficulty: np.ndarray, rescaling: np.ndarray, path: str | os.PathLike[str]
) -> Path:
    """Draw by how much PS-KD rescaled each example's gradient against how hard the example is.

    Faint points are examples, the line is the median among those of like difficulty, the band
    reaches from the lower to the upper quartile (`grouped_quartiles`). The lowest hundredth of the
    factors may lie below the axis. Take the difficulty from a run without PS-KD: then it is no
    part of the factor.

    Args:
        difficulty: (M,) float in [0, 1], the mean of ``1 - p[label]`` over a baseline's training.
        rescaling: (M,) float at most 1, the same examples' factor under PS-KD; NaN is left out.
        path: where to write; the suffix (.png, .pdf, .svg) is the format.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: vectors that do not match, a difficulty outside [0, 1], no example with both,
            or a suffix that matplotlib cannot write.

    Source: Kim et al. 2021, section 3.2 (hard example mining).
    """
    difficulty, rescaling = np.asarray(difficulty, float), np.asarray(rescaling, float)
    both = np.isfinite(difficulty) & np.isfinite(rescaling)
    difficulty, rescaling = difficulty[both], rescaling[both]
    if not len(difficulty):
        raise ValueError("rescaling: expected an example with a difficulty and a factor, got none")
    low, high = difficulty.min(), difficulty.max()
    if low < 0.0 or high > 1.0:
        raise ValueError(
            f"difficulty: expected values in [0, 1], got values in [{low:g}, {high:g}]"
        )
    figure = new_figure(4.8, 4.4)
    axes = figure.add_subplot()
    shown = np.linspace(0, len(difficulty) - 1, min(len(difficulty), _MOST_POINTS)).astype(int)
    # As one image within the file: thousands of circles make a vector file slow to open.
    axes.scatter(
        difficulty[shown],
        rescaling[shown],
        s=5,
        alpha=0.18,
        color="#555555",
        linewidths=0,
        rasterized=True,
        label="example",
    )
    center, quartiles = grouped_quartiles(difficulty, rescaling)
    if len(center):
        low, median, high = quartiles
        color = RUN_COLORS[0]
        axes.fill_between(
            center, low, high, color=color, alpha=0.25, linewidth=0, label="quartiles"
        )
        axes.plot(
            center, median, color=color, linewidth=2, marker="o", markersize=4, label="median"
        )
    axes.axhline(1.0, color=INK, linewidth=1.0, linestyle=":")
    bottom = np.quantile(rescaling, _LOWEST_SHOWN)
    room = max(0.05 * (1.0 - bottom), 0.01)
    axes.set(xlim=(-0.01, 1.01), ylim=(bottom - room, 1.0 + room))
    style(axes, "difficulty for the baseline, mean of 1 - p[label]", "gradient rescaling by PS-KD")
    for handle in filter(None, legend(figure, 3).legend_handles[:1]):
        handle.set(alpha=0.8, sizes=[20])
    return save(figure, path)
