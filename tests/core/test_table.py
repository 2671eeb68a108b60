"""Tables of text: aligned, and in Markdown."""

from __future__ import annotations

from pskd_tools.table import text_table

HEAD, LINES = ("run", "ECE"), [("baseline", "11.84"), ("PS-KD", "1.77")]


def test_numbers_are_flush_right():
    aligned = ["run         ECE", "--------  -----", "baseline  11.84", "PS-KD      1.77"]
    assert text_table(HEAD, LINES).splitlines() == aligned
    assert text_table(HEAD, LINES, numbers=False).splitlines()[-1] == "PS-KD     1.77"


def test_a_table_in_markdown():
    markdown = ["| run | ECE |", "| --- | ---: |", "| baseline | 11.84 |", "| PS-KD | 1.77 |"]
    assert text_table(HEAD, LINES, markdown=True).splitlines() == markdown


def test_a_table_may_have_no_line():
    assert text_table(HEAD, []).splitlines() == ["run  ECE", "---  ---"]
