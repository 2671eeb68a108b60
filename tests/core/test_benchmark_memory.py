"""The benchmark of the prediction memory: a row for each form and number of rows."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_benchmark_tells_all_figures(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = runpy.run_path(str(FOLDER / "prediction_memory.py"))
    flags = ["--rows", "300", "5000", "--batches", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["prediction_memory.py", *flags])
    benchmark["main"]()
    _, *table = capsys.readouterr().out.splitlines()
    head, _, *lines = [line.strip("|").split("|") for line in table]
    told = [(cells[0].strip(), cells[1].strip()) for cells in lines]
    assert told == [(rows, form) for rows in ("300", "5,000") for form in benchmark["FORMS"]]
    assert all(len(cells) == len(head) == 8 for cells in lines)
    sizes = [int(cells[2]) for cells in lines[:3]]
    assert sizes == [201, 65, 65]  # float16 or 16 pairs of it and an index, and a byte
    assert all(float(cells[4]) > 0 and float(cells[5]) > 0 for cells in lines)
    assert list(tmp_path.iterdir()) == []
