"""The figures of a report, as images that stand in the page itself."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pskd_tools.plots import reliability_diagram, risk_coverage_plot
from pskd_tools.presets import Preset
from pskd_tools.report.plots import hard_example_plot, teacher_plot
from pskd_tools.report.runs import Run
from pskd_tools.report.tables import Row, Table

__all__ = ["Figure", "confidence_figures", "hard_example_figures", "teacher_figures"]


@dataclass(frozen=True)
class Figure:
    """An image and what it shows.

    Attributes:
        uri: the image as a data URI.
        caption: as plain text.
    """

    uri: str
    caption: str


def confidence_figures(table: Table, preset: Preset) -> list[Figure]:
    """Return a reliability diagram of each method, and the risk-coverage curves of all."""
    firsts = {_label(row): row.runs[0].rows for row in table.rows if row.runs[0].rows}
    runs = {name: (rows["confidence"], rows["correct"]) for name, rows in firsts.items()}
    if not runs:
        return []
    ece, area = preset.metrics["ece"], preset.metrics["aurc"]
    unit = "" if ece.unit == "fraction" else f" {ece.unit}"
    figures = [
        _figure(
            f"Reliability of {name}, {preset.bins} bins.",
            reliability_diagram,
            {name: pair},
            bins=preset.bins,
            text=lambda value: ece.text(value) + unit,
        )
        for name, pair in runs.items()
    ]
    caption = (
        "Risk against coverage: the error rate if only the most confident rows are kept. Dashed, "
        "the best ranking of the same predictions; the area between is the E-AURC."
    )
    if area.unit != "fraction":
        caption += f" Areas {area.unit}."
    return [*figures, _figure(caption, risk_coverage_plot, runs, text=area.text)]


def _label(row: Row) -> str:
    """Return the name of a row's first run, whose seed or place tells it from the others."""
    if len(row.runs) == 1:
        return row.name
    seed = row.runs[0].numbers.get("seed")
    return f"{row.name}, first run" if seed is None else f"{row.name}, seed {seed}"


def teacher_figures(table: Table) -> list[Figure]:
    """Return what the teachers of a task's runs did, over epochs or, for some, iterations."""
    figures = []
    caption = (
        "What PS-KD did in the course of the training: alpha, and the factor on the gradient of "
        "the label's logit against plain cross-entropy, 1 without a teacher."
    )
    for unit in ("epoch", "iteration"):
        drawn = {}
        for row in table.rows:
            records = [record for record in row.runs[0].epochs if unit in record]
            taught = any(record.get("alpha", 0.0) > 0.0 for record in records)
            drawn[row.name] = records if taught else []
        if any(drawn.values()):
            figures.append(_figure(caption, teacher_plot, drawn))
    return figures


def hard_example_figures(table: Table) -> list[Figure]:
    """Return, for each PS-KD run with a baseline of the same examples, factor by difficulty."""
    firsts = [row.runs[0] for row in table.rows if row.runs[0].examples]
    baselines = [run for run in firsts if not run.has_teacher]
    figures = []
    for run in firsts:
        ids, rescaling = _by_id(run, "rescaling")
        for baseline in baselines:
            others, difficulty = _by_id(baseline, "difficulty")
            if np.array_equal(ids, others):
                break
        else:
            continue
        if np.isfinite([difficulty, rescaling]).all(axis=0).any():
            caption = (
                f"How {run.name} rescaled the gradient of each training example, by how hard it "
                f"was for {baseline.name}. At 1 (dotted) it is that of plain training, at 0 "
                "nothing is left of it, below 0 the label's probability is pushed down."
            )
            figures.append(_figure(caption, hard_example_plot, difficulty, rescaling))
    return figures


def _by_id(run: Run, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a run's examples in order, and a quantity of these."""
    order = np.argsort(run.examples["ids"])
    return run.examples["ids"][order], run.examples[quantity][order]


def _figure(caption: str, draw: Callable[..., object], *what: object, **options: object) -> Figure:
    """Return what a function draws into an SVG file.

    An image of its own, not SVG among the page's elements: the ids in two drawings would clash.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        draw(*what, path, **options)
        image = base64.b64encode(path.read_bytes()).decode()
    return Figure(f"data:image/svg+xml;base64,{image}", caption)
