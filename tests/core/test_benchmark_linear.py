"""The benchmark of the loss from hidden states: its forms agree, and its figures are there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
BASE, OURS = "cross-entropy", ("pskd_cross_entropy, in place", "pskd_linear_cross_entropy")


def test_the_benchmark_tells_all_figures(monkeypatch, capsys, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("linear_loss")
    file = tmp_path / "figures.json"
    flags = ["--rows", "40", "--classes", "70", "--hidden", "8", "--rounds", "2"]
    assert benchmark.main([*flags, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (result["rows"], result["classes"], result["hidden"]) == (40, 70, 8)
    assert list(result["seconds"]) == list(result["memory"]) == [BASE, *OURS]
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["ratio_median"].keys() == result["ratio_quartiles"].keys() == set(OURS)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in (BASE, *OURS))
    other = torch.full((), 2.0, requires_grad=True)
    monkeypatch.setattr(benchmark, "pskd_linear_cross_entropy", lambda *_: other)
    with pytest.raises(AssertionError, match="not close"):
        benchmark.main(flags)
