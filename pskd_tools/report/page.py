"""report.html: tables, figures and examples on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from pskd.version import __version__
from pskd_tools.presets import Preset
from pskd_tools.report.compare import Comparison
from pskd_tools.report.figures import (
    Figure,
    confidence_figures,
    hard_example_figures,
    teacher_figures,
)
from pskd_tools.report.files import Example
from pskd_tools.report.runs import Run
from pskd_tools.report.tables import Table
from pskd_tools.report.template import PAGE
from pskd_tools.report.verdict import metrics_table, title_of, verdict_html
from pskd_tools.report.where_section import where_section

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
_MOST_EXAMPLES = 12


def make_page(
    tables: Sequence[Table], pairs: Mapping[str, Sequence[Comparison]], preset: Preset
) -> str:
    """Return the page as HTML.

    Args:
        pairs: the comparisons of each task.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as the plots.
    """
    tasks = ", ".join(_TITLES[table.task].lower() for table in tables)
    title = f"pskd report: {tasks}"
    body = [f"<h1>{escape(title)}</h1>"]
    for table in tables:
        body += [f"<h2>{_TITLES[table.task]}</h2>"] if len(tables) > 1 else []
        body.append(_section(table, pairs[table.task], preset))
    body.append(_sources(tables))
    return PAGE.substitute(title=escape(title), body="\n".join(body))


def _section(table: Table, pairs: Sequence[Comparison], preset: Preset) -> str:
    parts = [
        "<section>",
        verdict_html(table, pairs),
        metrics_table(table, pairs),
        _definitions(table, bool(pairs), preset),
        *(where_section(pair, preset) for pair in pairs),
        _figures("Confidence", confidence_figures(table, preset)),
        _figures("What PS-KD did", [*teacher_figures(table), *hard_example_figures(table)]),
        _all_examples(table),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _definitions(table: Table, compared: bool, preset: Preset) -> str:
    lines = ["<details>\n<summary>What the metrics mean</summary>"]
    lines += [f'<p class="soft">{escape(note)}</p>' for note in _notes(table, compared, preset)]
    return "\n".join([*lines, _meanings(table), "</details>"])


def _notes(table: Table, compared: bool, preset: Preset) -> list[str]:
    """Return how to read the table."""
    notes = [
        f"Preset {preset.name}: {preset.source}; ECE over {preset.bins} bins, in the table and in "
        f"the figures. Confidence is measured over {_ROWS[table.task]}."
    ]
    if compared:
        notes.append(
            "Below a value stands its difference from the baseline, the run that was named first, "
            "with its 95 % interval; it is coloured where the interval leaves 0 out. One in twenty "
            "such intervals misses the truth."
        )
    if any(len(row.runs) > 1 for row in table.rows):
        notes.append(
            "Runs of one name are seeds of one method: mean ± sample standard deviation. Figures "
            "and examples are those of the first run."
        )
    if any(column.scaled for column in table.columns):
        notes.append(
            "After scaling: logits are divided by one number T, fitted on validation data only; "
            '"-" where a run has none.'
        )
    return notes


def _meanings(table: Table) -> str:
    lines = ['<div class="wide"><table class="meaning">', "<tbody>"]
    for column in table.columns:
        metric = column.metric
        unit = ", ".join(part for part in (metric.unit, _BETTER[metric.better]) if part)
        lines.append(
            f'<tr><th scope="row">{escape(title_of(column))}</th><td class="text">'
            f'{escape(metric.meaning)} <span class="soft">{escape(unit)}</span></td></tr>'
        )
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _figures(title: str, figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    lines = [f'<h3>{escape(title)}</h3>\n<div class="figures">']
    lines += [
        f'<figure><img src="{figure.uri}" alt="{escape(figure.caption)}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        for figure in figures
    ]
    return "\n".join([*lines, "</div>"])


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
