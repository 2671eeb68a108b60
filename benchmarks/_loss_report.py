"""How benchmarks/loss.py tells its figures: tables in Markdown, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from _loss_forms import BASE

from pskd_tools.drawing import INK, RUN_COLORS, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bandwidth_table", "markdown", "memory_table", "plot", "ratio", "time_table"]

IN_PLACE = " in place"
MISSING = "-"
SPREAD = 0.3  # of the points of one shape
LOOK: dict[str, Any] = {"marker": "o", "linewidth": 1.4, "markersize": 4, "elinewidth": 1.0}


def _names(shapes: list[dict], key: str) -> list[str]:
    """Return all forms, in order: one that does not work for a shape is not among its figures."""
    found = [name for shape in shapes for times in shape["threads"].values() for name in times[key]]
    return list(dict.fromkeys(found))


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Return a table whose first column is text."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def _head(shapes: list[dict]) -> list[str]:
    return ["rows x classes"] + [f"{shape['rows']} x {shape['classes']:,}" for shape in shapes]


def time_table(shapes: list[dict], threads: str) -> str:
    """Return cross-entropy's milliseconds and the others' ratios to it, of a number of threads."""
    times = [shape["threads"][threads] for shape in shapes]
    base = [f"{found['seconds'][BASE] * 1e3:,.2f} ms" for found in times]
    lines = [[BASE, *base]]
    for name in _names(shapes, "ratio_median"):
        lines.append([name, *(ratio(found, name) for found in times)])
    return markdown(_head(shapes), lines)


def ratio(times: dict, name: str) -> str:
    """Return a form's ratio to cross-entropy with its quartiles."""
    if name not in times["ratio_median"]:
        return MISSING
    low, high = times["ratio_quartiles"][name]
    return f"{times['ratio_median'][name]:.2f} ({low:.2f} to {high:.2f})"


def memory_table(shapes: list[dict]) -> str:
    """Return the extra peak memory of each form over the size of the logits."""
    found = [shape["memory"] or {} for shape in shapes]
    lines = []
    for name in _names(shapes, "seconds"):
        lines.append([name, *(f"{of[name]:.2f}" if name in of else MISSING for of in found)])
    return markdown(_head(shapes), lines)


def bandwidth_table(shapes: list[dict]) -> str:
    """Return the share of a copy's bandwidth at which pskd's forms move what they have to."""
    lines = []
    for name in dict.fromkeys(name for shape in shapes for name in shape["of_copy"]):
        lines.append([name, *(f"{shape['of_copy'][name]:.2f}" for shape in shapes)])
    return markdown(_head(shapes), lines)


def plot(result: dict, path: Path) -> Path:
    """Draw the ratios to cross-entropy against the shapes, a panel a number of threads."""
    shapes, panels = result["shapes"], list(result["shapes"][0]["threads"])
    figure = new_figure(1.5 + 5.2 * len(panels), 5.4)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = _names(shapes, "ratio_median")
    for axes, threads in zip(grid, panels, strict=True):
        _draw(axes, [shape["threads"][threads] for shape in shapes], names)
        axes.set_xticks(range(len(shapes)), [f"{s['rows']}\n× {s['classes']:,}" for s in shapes])
        axes.set_title(f"{result['device']}, {threads} thread(s)", fontsize=11, color=INK)
        axes.set_xlabel("rows × classes", color=INK)
    grid[0].set_ylabel(f"time over {BASE}'s, forward and backward", color=INK)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 * len(panels),
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    return save(figure, path)


def _draw(axes: Axes, times: list[dict], names: list[str]) -> None:
    plain = [name for name in names if not name.endswith(IN_PLACE)]
    for number, name in enumerate(names):
        # A form in place has the colour of its other self, with a broken line.
        color = RUN_COLORS[plain.index(name.removesuffix(IN_PLACE)) % len(RUN_COLORS)]
        there = [place for place, found in enumerate(times) if name in found["ratio_median"]]
        medians = [times[place]["ratio_median"][name] for place in there]
        quartiles = [times[place]["ratio_quartiles"][name] for place in there]
        off = [
            [abs(m - q[side]) for m, q in zip(medians, quartiles, strict=True)] for side in (0, 1)
        ]
        # Side by side, so that no range hides another.
        places = [place + SPREAD * (number / len(names) - 0.5) for place in there]
        line = "--" if name.endswith(IN_PLACE) else "-"
        axes.errorbar(places, medians, off, color=color, label=name, linestyle=line, **LOOK)
    axes.axhline(1.0, color=INK, linewidth=1.1, linestyle=":", label=BASE)
    _log_scale(axes)
    style(axes)


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
