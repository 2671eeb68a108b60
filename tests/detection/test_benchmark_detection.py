"""The benchmark of an iteration in Detectron2: its figures are there, on a toy model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "detectron2",
    reason="needs Detectron2: https://detectron2.readthedocs.io/tutorials/install.html",
)

import detectron2_tiny as tiny  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_benchmark_tells_all_figures(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = importlib.import_module("detection_step")
    flags = ["--config-file", str(tiny.CONFIGS / "bccd_pskd.yaml"), "--warmup", "1"]
    flags += ["--iterations", "2", "--boxes", "3", *tiny.TINY]
    monkeypatch.setattr(sys, "argv", ["detection_step.py", *flags])
    benchmark.main()
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["size"], result["iterations"]) == (2, [64, 85], 2)
    assert result["seconds"].keys() == {"stock", "snapshot", "memory"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    ratios, quartiles = result["ratio_median"], result["ratio_quartiles"]
    assert ratios.keys() == quartiles.keys() == {"snapshot", "memory"}
    assert all(low <= ratios[name] <= high for name, (low, high) in quartiles.items())
