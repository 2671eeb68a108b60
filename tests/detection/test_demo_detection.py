"""The demo's detection part from end to end, on a few images, in each framework that is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from pskd_detection import load_dataset

ROOT = Path(__file__).resolve().parents[2]
#: What both trainings take, of detection/train_net.py and detection/train_torchvision.py.
FEW = {
    "detectron2": ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2",
                   "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.01"],
    "torchvision": ["--epochs", "1", "--batch-size", "4"],
}  # fmt: skip
INSTALLED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(name) is None,
            reason=f"needs {name}: https://detectron2.readthedocs.io/tutorials/install.html",
        ),
    )
    for name in FEW
]


@pytest.fixture
def program(monkeypatch):
    """The demo, as a module; its trainings have processes of their own."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("demo.detection")


@pytest.mark.parametrize("framework", INSTALLED)
def test_the_table_is_that_of_the_results(program, framework, tmp_path, capsys):
    words = ["--num-train", "8", "--num-test", "4", "--framework", framework]
    status = program.main([*words, "--out", str(tmp_path), "--", *FEW[framework]])
    printed, error = capsys.readouterr()
    assert status == 0, printed + error
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["baseline", "PS-KD"]
    assert f"detection, {program.NAMES[framework]}" in printed
    for name, result in results.items():
        row = next(line.split() for line in printed.splitlines() if line.split()[:1] == [name]
                   and "iteration" not in line)  # fmt: skip
        expected = [result["bbox"]["AP"], result["bbox"]["AP50"]]
        expected += [result["confidence"][key] for key in ("d_ece", "aurc", "num_detections")]
        for text, value in zip(row[1:], expected, strict=False):
            assert text == "-" if value is None else float(text) == pytest.approx(value, abs=6e-3)
        assert result["seed"] == 1
    for run_name in ("baseline", "pskd"):
        log = tmp_path / run_name / "train.log"
        assert log.stat().st_size and str(log) in printed
    images = tmp_path / "images"
    clean, test = (load_dataset(f"coco:{images}/{p}.json:{images}/{p}") for p in ("train", "test"))
    noisy = load_dataset(f"coco:{tmp_path}/wrong_classes.json:{images}/train")
    assert [len(part.coco["images"]) for part in (noisy, test)] == [8, 4]
    classes = [[box["category_id"] for box in p.coco["annotations"]] for p in (clean, noisy)]
    wrong = sum(a != b for a, b in zip(*classes, strict=True))
    assert wrong == round(0.4 * len(classes[0]))


def test_progress_is_a_line_in_so_many_iterations(program):
    records = [{"iteration": i, "total_loss": 1.0, "pskd/alpha": 0.5} for i in range(19, 600, 20)]
    pairs = zip([{}, *records], records, strict=False)
    shown = [line for last, record in pairs if (line := program.progress(record, last))]
    assert shown == [
        "iteration  260  loss 1.000  alpha 0.50",
        "iteration  500  loss 1.000  alpha 0.50",
    ]


def test_the_step_and_log_that_failed_are_named(program, tmp_path, monkeypatch, capsys):
    refusal = [sys.executable, "-S", "-c", "import sys; sys.exit('unknown: a word')"]
    monkeypatch.setattr(program, "training", lambda *_: refusal)
    few = ["--num-train", "1", "--num-test", "1"]
    assert program.main([*few, "--out", str(tmp_path / "out")]) == 1
    assert "train.log: unknown: a word" in capsys.readouterr().err


def test_a_detectron2_that_does_not_load_is_not_used(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert program.default_framework() == "torchvision"
