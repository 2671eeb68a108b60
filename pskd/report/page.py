"""report.html: tables, figures and examples on one page that needs nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from pskd.presets import Preset
from pskd.report.columns import Column
from pskd.report.figures import (
    Figure,
    confidence_figures,
    hard_example_figures,
    teacher_figures,
)
from pskd.report.files import Example
from pskd.report.runs import Run
from pskd.report.tables import Row, Table
from pskd.report.template import PAGE
from pskd.version import __version__

__all__ = ["make_page"]

_TITLES = {
    "classification": "Classification",
    "detection": "Detection",
    "translation": "Translation",
}
_ROWS = {
    "classification": "the test examples",
    "detection": "the detections that were kept, correct if matched to an object of their class; "
    "what is left after overlapping boxes are suppressed are scores and no logits, so there is no "
    "temperature to fit",
    "translation": "the reference tokens, each predicted from those before it",
}
_BETTER = {"lower": "lower is better", "higher": "higher is better", "": ""}
_ARROWS = {"lower": "↓", "higher": "↑", "": ""}
_MOST_EXAMPLES = 12


def make_page(tables: Sequence[Table], preset: Preset) -> str:
    """Return the page as HTML.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as the plots.
    """
    tasks = ", ".join(_TITLES[table.task].lower() for table in tables)
    title = f"pskd report: {tasks}"
    body = [_head(title, tables, preset)]
    body += [_section(table, preset) for table in tables]
    body.append(_sources(tables))
    return PAGE.substitute(title=escape(title), body="\n".join(body))


def _head(title: str, tables: Sequence[Table], preset: Preset) -> str:
    lines = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Preset <b>{escape(preset.name)}</b>: {escape(preset.source)}; '
        f"ECE over {preset.bins} bins. ↓ lower is better, ↑ higher is better; the best value of a "
        "column is marked. Figures show raw fractions.</p>",
    ]
    if any(len(row.runs) > 1 for table in tables for row in table.rows):
        lines.append(
            '<p class="soft">Runs of one name are seeds of one method: mean ± sample standard '
            "deviation over them; the best mean is marked, whatever the deviations. Figures and "
            "examples are those of the first.</p>"
        )
    return "\n".join(lines)


def _section(table: Table, preset: Preset) -> str:
    parts = [
        f"<section>\n<h2>{_TITLES[table.task]}</h2>",
        _table(table),
        f'<p class="soft">{escape(_notes(table))}</p>',
        "<h3>What the columns mean</h3>",
        _meanings(table),
        _figures("Confidence", confidence_figures(table, preset)),
        _figures("What PS-KD did", [*teacher_figures(table), *hard_example_figures(table)]),
        _all_examples(table),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _table(table: Table) -> str:
    plain = [column for column in table.columns if not column.scaled]
    scaled = [column for column in table.columns if column.scaled]
    # The group stands last, whatever the order in which the columns are told.
    columns = plain + scaled
    seeds = any(len(row.runs) > 1 for row in table.rows)
    lines = ['<div class="wide"><table>', "<thead>"]
    if scaled:
        lines.append(
            f'<tr class="groups"><td colspan="{len(plain) + 1 + seeds}"></td><th scope="colgroup" '
            f'colspan="{len(scaled)}">after temperature scaling</th></tr>'
        )
    heads = "".join(_column_head(column, column in scaled[:1]) for column in columns)
    runs = '<th scope="col">runs</th>' if seeds else ""
    lines += [f'<tr><th scope="col" class="text">run</th>{runs}{heads}</tr>', "</thead>", "<tbody>"]
    best = {column.key: table.best(column) for column in columns}
    for row in table.rows:
        cells = [
            _cell(row, column, row in best[column.key], column in scaled[:1]) for column in columns
        ]
        count = f"<td>{len(row.runs)}</td>" if seeds else ""
        lines.append(f'<tr><th scope="row">{escape(row.name)}</th>{count}{"".join(cells)}</tr>')
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _column_head(column: Column, first: bool) -> str:
    metric = column.metric
    title = f"{metric.title}\u00a0{_ARROWS[metric.better]}".strip()
    # A head of two words on two lines, or the column would be as wide as both.
    shown = "<br>".join(map(escape, title.rsplit(" ", 1)))
    mark = ' class="first"' if first else ""
    return f'<th scope="col"{mark}>{shown}<small>{escape(metric.unit)}</small></th>'


def _cell(row: Row, column: Column, best: bool, first: bool) -> str:
    classes = " ".join(name for name, holds in (("best", best), ("first", first)) if holds)
    mark = f' class="{classes}"' if classes else ""
    mean, deviation = row.mean(column.key), row.deviation(column.key)
    if mean is None:
        return f"<td{mark}>-</td>"
    shown = column.metric.text(mean)
    if deviation is not None and (column.metric.better or column.scaled):
        shown += f"<small>± {column.metric.text(deviation)}</small>"
    return f"<td{mark}>{shown}</td>"


def _notes(table: Table) -> str:
    """Return what the confidence was measured over, and what its scaling is."""
    notes = [f"Confidence is measured over {_ROWS[table.task]}."]
    if any(column.scaled for column in table.columns):
        notes.append(
            "After temperature scaling: one number T, fitted on validation data only, by which the "
            'logits are divided; "-" where a run has none.'
        )
    return " ".join(notes)


def _meanings(table: Table) -> str:
    lines = ['<div class="wide"><table class="meaning">', "<tbody>"]
    for column in table.columns:
        metric = column.metric
        name = f"{metric.title}, scaled" if column.scaled and metric.title != "T" else metric.title
        told = ", ".join(part for part in (metric.unit, _BETTER[metric.better]) if part)
        lines.append(
            f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(metric.meaning)}'
            f' <span class="soft">{escape(told)}</span></td></tr>'
        )
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _figures(title: str, figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    lines = [f"<h3>{escape(title)}</h3>"]
    for columns, group in itertools.groupby(figures, key=lambda figure: figure.columns):
        shape = "narrow" if columns == 1 else "broad"
        lines.append('<div class="figures">')
        lines += [
            f'<figure class="{shape}"><img src="{figure.uri}" alt="{escape(figure.caption)}">'
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
            for figure in group
        ]
        lines.append("</div>")
    return "\n".join(lines)


def _all_examples(table: Table) -> str:
    lines = []
    for row in table.rows:
        found = row.runs[0].reweighted
        for key, told in (("most", "lowest"), ("least", "highest")):
            if found.get(key):
                lines.append(
                    f"<h3>{escape(row.name)}: examples of {told} gradient rescaling</h3>\n"
                    '<p class="soft">× is the factor on the gradient of the label\'s logit, '
                    "difficulty the mean of 1 - p[label] over this training.</p>\n"
                    + _examples(found[key][:_MOST_EXAMPLES])
                )
    return "\n".join(lines)


def _examples(examples: Sequence[Example]) -> str:
    lines = ['<ul class="examples">']
    for example in examples:
        image = f'<img src="{escape(example.image)}" alt="">' if example.image else ""
        told = f"<b>{escape(example.label)}</b><br>× {example.rescaling:.2f}"
        if example.difficulty is not None:
            told += f"<br>difficulty {example.difficulty:.2f}"
        lines.append(f'<li>{image}{told}<br><span class="soft">{escape(example.id)}</span></li>')
    return "\n".join([*lines, "</ul>"])


def _sources(tables: Sequence[Table]) -> str:
    lines = ["<section>", "<h2>Where the numbers come from</h2>", "<dl>"]
    for row in (row for table in tables for row in table.rows):
        lines.append(f"<dt>{escape(row.name)}</dt>")
        lines += [_source(run) for run in row.runs]
    lines += ["</dl>", f'<p class="soft">pskd {escape(__version__)}</p>', "</section>"]
    return "\n".join(lines)


def _source(run: Run) -> str:
    told = [f"folder {run.folder}"]
    told += [
        f"{key} {run.numbers[key]}"
        for key in ("dataset", "model", "split", "seed")
        if run.numbers.get(key) is not None
    ]
    if run.rows:
        told.append(f"{len(run.rows['confidence']):,} rows")
    command = run.numbers.get("command")
    words = command if isinstance(command, str) else " ".join(map(str, command or ()))
    shown = f"<br><code>{escape(words)}</code>" if words else ""
    return f"<dd>{escape(', '.join(told))}{shown}</dd>"
