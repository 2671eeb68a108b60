"""Pictures of the metrics in `pskd.calibration`, drawn to a file without a display.

Shapes: N rows (samples, tokens or boxes) of one run, B confidence bins.

A *run* is a name and its ``(confidence, correct)`` vectors, as `ConfidenceAccumulator` keeps them.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pskd.calibration import (
    ReliabilityBins,
    optimal_risk_coverage_curve,
    reliability_bins,
    risk_coverage_curve,
)
from pskd.calibration.inputs import Array
from pskd_tools.drawing import INK, RUN_COLORS, curves, legend, new_figure, save, short, style

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["epoch_plot", "reliability_diagram", "risk_coverage_plot"]

Runs = Mapping[str, tuple[Array, Array]]
Look = dict[str, Any]  # keywords of an artist

# How each thing in a reliability diagram looks, in its panel and in the legend.
_ACCURACY: Look = dict(label="accuracy", facecolor="#5B9BC8", edgecolor="white", linewidth=0.7)
_OVERCONFIDENT: Look = dict(
    label="gap, overconfident",
    facecolor="#FBE3D3",
    edgecolor="#D55E00",
    hatch="////",
    linewidth=0.7,
)
_UNDERCONFIDENT: Look = dict(
    label="gap, underconfident",
    facecolor="#D2EFE4",
    edgecolor="#009E73",
    hatch="\\\\\\\\",
    linewidth=0.7,
)
_PERFECT: Look = dict(label="perfect calibration", color=INK, linewidth=1.1, linestyle="--")
_MEAN_ACCURACY: Look = dict(label="mean accuracy", color="#0072B2", linewidth=1.8)
_MEAN_CONFIDENCE: Look = dict(label="mean confidence", color=INK, linewidth=1.8, linestyle=":")
_OPTIMAL = (0, (4, 2))
_PANELS_A_ROW = 4
# More points than a page has pixels only make a vector file slow to open.
_MOST_POINTS = 4000
# Below this coverage the risk is that of a handful of rows and jumps between 0 and 1.
_STEADY_COVERAGE = 0.05


def _check_runs(runs: Runs) -> None:
    if not runs:
        raise ValueError("runs: expected at least one name with (confidence, correct), got none")


def _draw_reliability(axes: Axes, title: str, bins: ReliabilityBins) -> None:
    """Accuracy as bars, and on each the gap to the mean confidence."""
    filled = bins.count > 0
    left, width = bins.edges[:-1][filled], 1.0 / len(bins.count)
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    axes.bar(left, accuracy, width, align="edge", **_ACCURACY)
    for chosen, look in (
        (confidence > accuracy, _OVERCONFIDENT),
        (confidence < accuracy, _UNDERCONFIDENT),
    ):
        gap = (confidence - accuracy)[chosen]
        axes.bar(left[chosen], gap, width, accuracy[chosen], align="edge", **look)
    axes.plot([0, 1], [0, 1], **_PERFECT)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.tick_params(labelbottom=False)
    style(axes, title=title)


def _draw_histogram(axes: Axes, bins: ReliabilityBins, top: float) -> None:
    """The share of rows in each bin, with the means that a calibrated run would have equal."""
    count = bins.count.sum()
    share, width = bins.count / count, 1.0 / len(bins.count)
    axes.bar(bins.edges[:-1], share, width, align="edge", color="#BBBBBB", edgecolor="white")
    axes.axvline(bins.correct_sum.sum() / count, **_MEAN_ACCURACY)
    axes.axvline(bins.confidence_sum.sum() / count, **_MEAN_CONFIDENCE)
    axes.set(xlim=(0, 1), ylim=(0, top))
    axes.locator_params(axis="y", nbins=4)
    style(axes, "confidence")


def _reliability_legend(figure: Figure, columns: int) -> None:
    """One legend below all panels, where it hides no bar."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(**look) for look in (_ACCURACY, _OVERCONFIDENT, _UNDERCONFIDENT)]
    handles += [Line2D([], [], **look) for look in (_PERFECT, _MEAN_ACCURACY, _MEAN_CONFIDENCE)]
    legend(figure, 2 if columns == 1 else 3, handles)


def reliability_diagram(
    runs: Runs,
    path: str | os.PathLike[str],
    *,
    bins: int = 15,
    text: Callable[[float], str] = "{:.4f}".format,
) -> Path:
    """Draw accuracy against confidence, a panel a run, with the confidence histogram beneath.

    The bars are ``reliability_bins(confidence, correct, bins=bins)``: a run is calibrated where
    they meet the diagonal. The gap bars reach from a bin's accuracy to its mean confidence.

    Args:
        runs: name -> (confidence, correct), each as `reliability_bins` takes them.
        path: where to write; the suffix (.png, .pdf, .svg) is the format.
        bins: the number of confidence bins.
        text: writes the ECE above a panel, from the fraction.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no run, a run without rows or that `reliability_bins` refuses, or a suffix that
            matplotlib cannot write.

    Source: Guo et al. 2017, figure 1.
    """
    _check_runs(runs)
    filled = {name: reliability_bins(*run, bins=bins) for name, run in runs.items()}
    columns = min(len(filled), _PANELS_A_ROW)
    rows = math.ceil(len(filled) / columns)
    figure = new_figure(0.5 + 3.5 * columns, 0.8 + 4.8 * rows)
    top = 1.1 * max((b.count / max(b.count.sum(), 1)).max() for b in filled.values())
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.6, 1.0] * rows)
    for place, (name, run_bins) in enumerate(filled.items()):
        row, column = divmod(place, columns)
        upper = figure.add_subplot(grid[2 * row, column])
        lower = figure.add_subplot(grid[2 * row + 1, column], sharex=upper)
        ece = text(run_bins.expected_calibration_error)
        _draw_reliability(upper, f"{short(name)}\nECE {ece}", run_bins)
        _draw_histogram(lower, run_bins, top)
        if column == 0:
            upper.set_ylabel("accuracy", color=INK)
            lower.set_ylabel("share of rows", color=INK)
    _reliability_legend(figure, columns)
    return save(figure, path)


def _thinned(coverage: np.ndarray, risk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the curve at no more points than can be seen."""
    last = len(coverage) - 1
    if last < _MOST_POINTS:
        return coverage, risk
    chosen = np.linspace(0, last, _MOST_POINTS).round().astype(int)
    return coverage[chosen], risk[chosen]


def _draw_risk(
    axes: Axes, name: str, run: tuple[Array, Array], color: str, text: Callable[[float], str]
) -> float:
    """Draw a run and its optimum; return the highest risk where the curve is steady."""
    coverage, risk = risk_coverage_curve(*run)
    optimum = optimal_risk_coverage_curve(run[1])[1]
    # The means are `aurc` and `excess_aurc`, without sorting the rows again.
    area, excess = risk.mean(), risk.mean() - optimum.mean()
    label = f"{short(name)}: AURC {text(area)}, E-AURC {text(excess)}"
    axes.plot(*_thinned(coverage, risk), color=color, linewidth=1.8, label=label)
    axes.plot(*_thinned(coverage, optimum), color=color, linewidth=1.1, linestyle=_OPTIMAL)
    axes.plot([1.0], risk[-1:], color=color, marker="o", markersize=4, clip_on=False)
    return float(risk[coverage >= _STEADY_COVERAGE].max())


def risk_coverage_plot(
    runs: Runs,
    path: str | os.PathLike[str],
    *,
    text: Callable[[float], str] = "{:.4f}".format,
) -> Path:
    """Draw the error rate among the most confident rows against the fraction of rows kept.

    The curves are ``risk_coverage_curve(confidence, correct)``, dashed the optimum of the same
    predictions; the area between the two is the E-AURC. The risk axis ends above the highest risk
    from 5% coverage on, so a first few wrong rows may leave it at the top.

    Args:
        runs: name -> (confidence, correct), each as `risk_coverage_curve` takes them.
        path: where to write; the suffix (.png, .pdf, .svg) is the format.
        text: writes an area in the legend, from the fraction.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no run, a run that `risk_coverage_curve` refuses, or a suffix that matplotlib
            cannot write.

    Source: Geifman & El-Yaniv 2019.
    """
    _check_runs(runs)
    figure = new_figure(4.2, 4.2 + 0.22 * len(runs))
    axes = figure.add_subplot()
    colored = zip(runs.items(), itertools.cycle(RUN_COLORS), strict=False)
    highest = [_draw_risk(axes, *item, color, text) for item, color in colored]
    axes.plot([], [], color=INK, linewidth=1.1, linestyle=_OPTIMAL, label="optimal ranking")
    # Without an error anywhere the axis still needs a height.
    axes.set(xlim=(0, 1), ylim=(0, 1.08 * max(highest) or 1.0))
    kept = "coverage (fraction of rows kept, most confident first)"
    style(axes, kept, "selective risk (error rate)")
    legend(figure, 1)
    return save(figure, path)


#: What `epoch_plot` draws of a record, and how it is called.
_EPOCH_CURVES = {
    "alpha": "alpha, weight of the teacher",
    "teacher_agreement": "teacher agreement",
    "gradient_rescaling": "gradient rescaling, all rows",
    "gradient_rescaling_hard": "gradient rescaling, rows the teacher had wrong",
}


def epoch_plot(records: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> Path:
    """Draw what PS-KD did in each epoch of a run: alpha, teacher agreement, gradient rescaling.

    Args:
        records: one an epoch, with ``epoch`` and any of ``alpha``, ``teacher_agreement``,
            ``gradient_rescaling`` and ``gradient_rescaling_hard``; an epoch without a teacher has
            only some of them.
        path: where to write; the suffix (.png, .pdf, .svg) is the format.

    Returns:
        ``path``.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no record has a quantity to draw, or a suffix that matplotlib cannot write.

    Source: Kim et al. 2021, section 3.2, whose factor the rescaling is.
    """
    points = {
        title: [(record["epoch"], record[name]) for record in records if name in record]
        for name, title in _EPOCH_CURVES.items()
    }
    if not any(points.values()):
        names = list(_EPOCH_CURVES)
        raise ValueError(f"records: expected an epoch with one of {names}, got none")
    figure = new_figure(6.4, 4.8)
    axes = figure.add_subplot()
    curves(axes, points)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(top=1.0)
    style(axes, "epoch")
    legend(figure, 2)
    return save(figure, path)
