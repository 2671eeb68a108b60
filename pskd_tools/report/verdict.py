"""The verdict: in a few sentences, what changed against the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from pskd_tools.report.compare import Comparison, Difference
from pskd_tools.report.tables import Column

__all__ = ["LEADS", "sentences"]

#: What a sentence begins with, by the effect that it is about.
LEADS = {
    "better": "Better:",
    "worse": "Worse:",
    "unclear": "No difference beyond noise:",
    "unknown": "No interval, so no verdict:",
}
_UNITS = {"%": " percentage points", "nats": " nats", "points": " points"}


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
    title = column.title
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
