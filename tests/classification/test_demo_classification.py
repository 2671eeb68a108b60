"""The demo's classification part from end to end, in two epochs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("sklearn", reason="needs pip install '.[classification]'")
sys.path[:0] = [str(ROOT)]

from demo import classification  # noqa: E402


def test_the_table_is_that_of_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classification, "PRINT_EVERY", 1)
    assert classification.main(["--out", str(tmp_path), "--", "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["cross-entropy", "smoothing", "PS-KD"]
    for name, result in results.items():
        (row,) = [line.split() for line in printed.splitlines() if line.split()[:1] == [name]
                  and "epoch" not in line and "against" not in line]  # fmt: skip
        shown = [float(cell) for cell in row[1:]]
        keys = ("top1_error", "nll", "ece", "aurc", "scaled_nll", "scaled_ece")
        assert shown == pytest.approx([result[key] for key in keys], abs=6e-5)
    assert printed.count("training loss") == 6 and "PS-KD against cross-entropy:" in printed
    for plot in ("reliability.png", "risk_coverage.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    # The methods differ in what they are called, and share their data.
    options = {}
    for run in ("crossentropy", "smoothing", "pskd"):
        assert str(tmp_path / run / "train.log") in printed
        options[run] = json.loads((tmp_path / run / "results.json").read_text())["options"]
        assert options[run]["label_noise"] == "0.4:symmetric"
        assert options[run]["train_per_class"] == 50
        last = json.loads((tmp_path / run / "metrics.json").read_text().splitlines()[-1])
        assert last.get("pskd/alpha", 0.0) == (0.8 if run == "pskd" else 0.0)
    assert [options[run]["label_smoothing"] for run in options] == [0.0, 0.1, 0.0]
