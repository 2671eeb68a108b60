"""The benchmark of an update in fairseq: its figures are there, on a model of a toy's size."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

from fairseq_toys import PLUGIN, ROOT  # noqa: E402


def test_the_benchmark_tells_all_figures(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("translation_step")
    # This process has imported fairseq.
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, *args: function(*args))
    flags = "--vocabulary 50 --tokens 40 --length 5 --updates 2 --warmup 1 --cpu".split()
    flags += ["--user-dir", str(PLUGIN)]
    monkeypatch.setattr(sys, "argv", ["translation_step.py", *flags])
    benchmark.main()
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    assert (result["vocabulary"], result["tokens"], result["updates"]) == (50, 40, 2)
    names = {"stock", "snapshot", "memory"}
    assert result["seconds"].keys() == result["peak_mb"].keys() == names
    assert all(seconds > 0 for seconds in result["seconds"].values())
    for name in names - {"stock"}:
        low, high = result[f"{name}_ratio_quartiles"]
        assert low <= result[f"{name}_ratio"] <= high
