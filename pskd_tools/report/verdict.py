"""The verdict: in a few sentences, what changed against the baseline; and the table behind it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pskd_tools.presets import Metric
from pskd_tools.report.columns import Column
from pskd_tools.report.compare import Comparison, Difference
from pskd_tools.report.tables import Row, Table

__all__ = ["difference_html", "metrics_table", "sentences", "title_of", "verdict_html"]

_ARROWS = {"lower": "↓", "higher": "↑", "": ""}
_UNITS = {"%": " percentage points", "nats": " nats", "points": " points"}


def title_of(column: Column) -> str:
    """Return a column's name, also of those after temperature scaling."""
    title = column.metric.title
    return f"{title} after scaling" if column.scaled and title != "T" else title


def sentences(pair: Comparison, columns: Sequence[Column]) -> dict[str, str]:
    """Return what to say of a method, by its effect.

    Returns:
        ``better``, ``worse``, ``unclear`` (the interval holds 0) and ``unknown`` (there is no
        interval), without those that no metric belongs to.
    """
    found: dict[str, list[Column]] = {}
    for column in columns:
        if (difference := pair.differences.get(column.key)) is not None:
            effect = difference.effect(column.metric.better)
            group = effect or ("unclear" if difference.interval else "unknown")
            found.setdefault(group, []).append(column)
    said = {}
    for group in ("better", "worse"):
        if group in found:
            said[group] = f"{pair.method.name} {_changes(pair, found[group])}."
    for group in ("unclear", "unknown"):
        if group in found:
            said[group] = f"{', '.join(_in_sentence(column) for column in found[group])}."
    return said


def _changes(pair: Comparison, columns: Sequence[Column]) -> str:
    """Return "lowers A by x [low, high] and B by y [low, high] and raises C by z [low, high]"."""
    verbs: dict[str, list[str]] = {}
    for column in columns:
        difference = pair.differences[column.key]
        verb = "lowers" if difference.value < 0 else "raises"
        verbs.setdefault(verb, []).append(f"{_in_sentence(column)} by {_size(column, difference)}")
    return _listed([f"{verb} {_listed(parts)}" for verb, parts in verbs.items()])


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _in_sentence(column: Column) -> str:
    title = title_of(column)
    word = title.partition("-")[0].partition(" ")[0]
    title = title[0].lower() + title[1:] if word[1:].islower() else title
    return title if column.metric.unit != "x 1000" else title.replace("AURC", "AURC x 1000")


def _size(column: Column, difference: Difference) -> str:
    """Return how large a clear difference is, without its sign."""
    metric = column.metric
    assert difference.interval is not None  # or it were not clear
    low, high = sorted(abs(end) for end in difference.interval)
    unit = _UNITS.get(metric.unit, "")
    return f"{metric.text(abs(difference.value))}{unit} [{metric.text(low)}, {metric.text(high)}]"


_LEADS = {
    "better": "Better:",
    "worse": "Worse:",
    "unclear": "No difference beyond noise:",
    "unknown": "No interval, so no verdict:",
}


def verdict_html(table: Table, pairs: Sequence[Comparison]) -> str:
    """Return the sentences on each method; empty if there is nothing to compare."""
    lines = []
    for pair in pairs:
        lines.append(f"<h3>{escape(pair.method.name)} against {escape(pair.baseline.name)}</h3>")
        lines.append('<ul class="verdict">')
        lines += [
            f'<li><b class="{effect}">{_LEADS[effect]}</b> {escape(sentence)}</li>'
            for effect, sentence in sentences(pair, table.columns).items()
        ]
        lines.append("</ul>")
        if pair is pairs[-1] or pair.basis != pairs[-1].basis:
            lines.append(f'<p class="soft">{escape(pair.basis)}</p>')
    return "\n".join(lines)


def metrics_table(table: Table, pairs: Sequence[Comparison]) -> str:
    """Return every metric of every method, with the differences from the first."""
    heads = "".join(_method_head(row, row is table.rows[0] and bool(pairs)) for row in table.rows)
    lines = ['<div class="wide"><table class="metrics">', "<thead>"]
    lines += [f'<tr><th class="text" scope="col">metric</th>{heads}</tr>', "</thead>", "<tbody>"]
    by_method: dict[str, Comparison] = {pair.method.name: pair for pair in pairs}
    # A metric after temperature scaling stands below those before it.
    for column in sorted(table.columns, key=lambda column: column.scaled):
        metric = column.metric
        unit = f"{escape(metric.unit)} {_ARROWS[metric.better]}".strip()
        cells = [_cell(row, column, by_method.get(row.name)) for row in table.rows]
        head = f'<th scope="row">{escape(title_of(column))} <small>{unit}</small></th>'
        lines.append(f"<tr>{head}{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _method_head(row: Row, is_baseline: bool) -> str:
    notes = ["baseline"] if is_baseline else []
    notes += [f"{len(row.runs)} runs"] if len(row.runs) > 1 else []
    small = f"<small>{', '.join(notes)}</small>" if notes else ""
    return f'<th scope="col" class="name">{escape(row.name)}{small}</th>'


def _cell(row: Row, column: Column, pair: Comparison | None) -> str:
    metric = column.metric
    mean, deviation = row.mean(column.key), row.deviation(column.key)
    if mean is None:
        return "<td>-</td>"
    shown = metric.text(mean)
    if deviation is not None and (metric.better or column.scaled):
        shown += f" ± {metric.text(deviation)}"
    difference = pair.differences.get(column.key) if pair else None
    if difference is None:
        return f"<td>{shown}</td>"
    return f"<td>{shown}{difference_html(metric, difference)}</td>"


def difference_html(metric: Metric, difference: Difference) -> str:
    """Return a difference and its interval, coloured where the interval leaves 0 out."""
    effect = difference.effect(metric.better)
    mark = f' class="{effect}"' if effect else ""
    return f"<small{mark}>{_signed_difference(metric, difference)}</small>"


def _signed_difference(metric: Metric, difference: Difference) -> str:
    text = _signed(metric, difference.value)
    if difference.interval is None:
        return text
    low, high = (_signed(metric, end) for end in difference.interval)
    return f"{text} <span>[{low}, {high}]</span>"


def _signed(metric: Metric, raw: float) -> str:
    text = metric.text(abs(raw))
    sign = "" if float(text) == 0 else "\u2212" if raw < 0 else "+"
    return sign + text
