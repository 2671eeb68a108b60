"""What all pictures share: a figure without a display, colours, and a file that is whole."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pskd_tools.files import written_aside

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

__all__ = ["INK", "RUN_COLORS", "curves", "legend", "new_figure", "save", "short", "style"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale here.
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
INK, GRID = "#333333", "#DDDDDD"
_LONGEST_NAME = 28
_MOST_MARKERS = 60
_DPI = 160


def new_figure(width: float, height: float) -> Figure:
    """Return a figure in inches that belongs to no window and to no global state.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which could not be imported: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write the figure under another name, then rename: ``path`` is old or whole, never half.

    Raises:
        ValueError: for a suffix that matplotlib does not write.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(
            f"path: expected a name that ends in one of {', '.join(sorted(known))}, got {path}"
        )
    with written_aside(path) as aside:
        figure.savefig(aside, format=suffix)
    return path


def short(name: str) -> str:
    """Return a name that fits; a legend would drop one that starts with an underscore."""
    name = str(name)
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 1] + "…"
    return f" {name}" if name.startswith("_") else name


def style(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Label the axes, as far as labels are given, and draw them light."""
    if x:
        axes.set_xlabel(x, color=INK)
    if y:
        axes.set_ylabel(y, color=INK)
    if title:
        _literal([axes.set_title(title, fontsize=11, color=INK)])
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.6)
    axes.tick_params(labelsize=9, color=GRID, labelcolor=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color("#999999")


def curves(axes: Axes, points: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Line2D]:
    """Draw a line through the points of each name, in its colour; return those that have any."""
    lines = {}
    for (name, own), color in zip(points.items(), itertools.cycle(RUN_COLORS), strict=False):
        if own:
            # Between the many iterations of a log a marker at each hides the line.
            marker = "o" if len(own) <= _MOST_MARKERS else ""
            (lines[name],) = axes.plot(
                *zip(*own, strict=True),
                label=short(name),
                color=color,
                linewidth=1.8,
                marker=marker,
                markersize=3,
            )
    return lines


def legend(figure: Figure, columns: int, handles: Sequence[Artist] | None = None) -> Legend:
    """Add a legend below all axes, where it hides nothing: of these handles, or of all labels."""
    made = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    _literal(made.get_texts())
    return made


def _literal(texts: Iterable[Text]) -> None:
    # A run called "$lr$" is a name, not a formula.
    for text in texts:
        text.set_parse_math(False)
