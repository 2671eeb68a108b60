"""What a half of the demo ends with: its part of the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Report"]

_WIDTH = 10
_NAME_WIDTH = 15


class Report(NamedTuple):
    """The results of one half.

    Attributes:
        title: names the task, the framework and the test set.
        columns: key of a result -> title and format of its column.
        results: run -> its numbers by key; None where there is none.
        note: what the columns are.
    """

    title: str
    columns: Mapping[str, tuple[str, str]]
    results: Mapping[str, Mapping]
    note: str

    def table(self) -> str:
        """Return the table as text, a row a run."""
        rows = [["", *(title for title, _ in self.columns.values())]]
        for name, result in self.results.items():
            values = [(result[key], form) for key, (_, form) in self.columns.items()]
            rows.append([name, *("-" if v is None else format(v, form) for v, form in values)])
        lines = [
            f"{row[0]:>{_NAME_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in row[1:])
            for row in rows
        ]
        return "\n".join([self.title, *lines, self.note])
