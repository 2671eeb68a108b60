"""Tables of text, for a console or for a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["text_table"]


def text_table(
    head: Sequence[str],
    lines: Iterable[Sequence[str]],
    *,
    numbers: bool = True,
    markdown: bool = False,
) -> str:
    """Return a table with a rule below its head.

    Args:
        head: the titles of the columns.
        lines: the cells, as many in each line as there are titles.
        numbers: whether all columns but the first are flush right.
        markdown: whether to write it in Markdown, and not as aligned text.
    """
    flush_right = [numbers and column > 0 for column in range(len(head))]
    if markdown:
        rule = ["---:" if right else "---" for right in flush_right]
        return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
    lines = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, flush_right, strict=True)
        ).rstrip()
        for line in lines
    )
