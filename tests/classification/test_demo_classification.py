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


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's output folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda text="", **_: lines.append(str(text)))
        patch.setattr(classification.EpochPrinter, "EVERY", 1)
        assert classification.main(["--out", str(out), "--", "--epochs", "2"]) == 0
    return out, "\n".join(lines)


def test_the_table_is_that_of_the_results(demo):
    out, printed = demo
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["cross-entropy", "smoothing", "PS-KD"]
    for name, result in results.items():
        (row,) = [line.split() for line in printed.splitlines() if line.split()[:1] == [name]
                  and "epoch" not in line and "against" not in line]  # fmt: skip
        shown = [float(cell) for cell in row[1:]]
        keys = ("top1_error", "nll", "ece", "aurc", "scaled_nll", "scaled_ece")
        assert shown == pytest.approx([result[key] for key in keys], abs=6e-5)


def test_methods_differ_in_what_they_are_called_and_share_their_data(demo):
    out, printed = demo
    options = {}
    for run in ("crossentropy", "smoothing", "pskd"):
        assert str(out / run / "train.log") in printed
        options[run] = json.loads((out / run / "results.json").read_text())["options"]
        assert options[run]["label_noise"] == "0.4:symmetric"
        assert options[run]["train_per_class"] == 50
        last = json.loads((out / run / "metrics.json").read_text().splitlines()[-1])
        assert last.get("pskd/alpha", 0.0) == (0.8 if run == "pskd" else 0.0)
    assert [options[run]["label_smoothing"] for run in options] == [0.0, 0.1, 0.0]
    assert printed.count("training loss") == 6


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    mine = tmp_path / "pskd" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert classification.main(["--out", str(tmp_path)]) == 1
    assert "expected a folder that the demo made" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["pskd", "mine.txt"]
