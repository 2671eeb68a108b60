"""How benchmarks/loss.py tells its figures: tables in Markdown, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from _loss_forms import BASE, IN_PLACE
from _measuring import markdown, ratio

from pskd_tools.drawing import INK, RUN_COLORS, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPREAD = 0.3  # of the points of one shape
LOOK: dict[str, Any] = {"marker": "o", "linewidth": 1.4, "markersize": 4, "elinewidth": 1.0}


def told(result: dict) -> str:
    """Return all that is printed of the figures."""
    shapes, by = result["shapes"], f"pskd by {result['backend']}"
    parts = [f"{result['machine']}, torch {result['torch']}, {result['dtype']}, {by}"]
    for threads in shapes[0]["threads"]:
        times = [shape["threads"][threads] for shape in shapes]
        lines = [[BASE, *(f"{found['seconds'][BASE] * 1e3:,.2f} ms" for found in times)]]
        for name in _names(found["ratio_median"] for found in times):
            lines.append([name, *(ratio(found, name) for found in times)])
        parts.append(f"{threads} thread(s): time over {BASE}'s (quartiles over the rounds)")
        parts.append(_table(shapes, lines))
    if result.get("copy_bandwidth"):
        copied = result["copy_bandwidth"] / 1e12
        parts.append(f"Share of the bandwidth of a copy ({copied:.2f} TB/s)")
        parts.append(_table(shapes, _lines([shape["of_copy"] for shape in shapes])))
    parts.append("Extra peak memory over the logits' size")
    parts.append(_table(shapes, _lines([shape["memory"] or {} for shape in shapes])))
    within = ["All of pskd's figures are within the limits."]
    return "\n\n".join([*parts, "\n".join(result["missed"] or within)])


def _names(figures) -> list[str]:
    """Return all forms, in order: one that does not work for a shape is not among its figures."""
    return list(dict.fromkeys(name for found in figures for name in found))


def _lines(figures: list[dict[str, float]]) -> list[list[str]]:
    return [
        [name, *(f"{found[name]:.2f}" if name in found else "-" for found in figures)]
        for name in _names(figures)
    ]


def _table(shapes: list[dict], lines: list[list[str]]) -> str:
    head = ["rows x classes"] + [f"{shape['rows']} x {shape['classes']:,}" for shape in shapes]
    return markdown(head, lines)


def plot(result: dict, path: Path) -> Path:
    """Draw the ratios to cross-entropy against the shapes, a panel a number of threads."""
    shapes, panels = result["shapes"], list(result["shapes"][0]["threads"])
    figure = new_figure(1.5 + 5.2 * len(panels), 5.4)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, threads in zip(grid, panels, strict=True):
        _draw(axes, [shape["threads"][threads] for shape in shapes])
        axes.set_xticks(range(len(shapes)), [f"{s['rows']}\n× {s['classes']:,}" for s in shapes])
        axes.set_title(f"{result['device']}, {threads} thread(s)", fontsize=11, color=INK)
        axes.set_xlabel("rows × classes", color=INK)
    grid[0].set_ylabel(f"time over {BASE}'s, forward and backward", color=INK)
    figure.legend(
        *grid[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3 * len(panels),
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    return save(figure, path)


def _draw(axes: Axes, times: list[dict]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names = _names(found["ratio_median"] for found in times)
    plain = [name for name in names if not name.endswith(IN_PLACE)]
    for number, name in enumerate(names):
        there = [(place, found) for place, found in enumerate(times) if name in found["seconds"]]
        medians = [found["ratio_median"][name] for _, found in there]
        quartiles = [found["ratio_quartiles"][name] for _, found in there]
        off = [
            [abs(m - q[side]) for m, q in zip(medians, quartiles, strict=True)] for side in (0, 1)
        ]
        # Side by side, so that no range hides another.
        places = [place + SPREAD * (number / len(names) - 0.5) for place, _ in there]
        # A form in place has the colour of its other self, with a broken line.
        color = RUN_COLORS[plain.index(name.removesuffix(IN_PLACE)) % len(RUN_COLORS)]
        line = "--" if name.endswith(IN_PLACE) else "-"
        axes.errorbar(places, medians, off, color=color, label=name, linestyle=line, **LOOK)
    axes.axhline(1.0, color=INK, linewidth=1.1, linestyle=":", label=BASE)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    style(axes)
