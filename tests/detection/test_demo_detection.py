"""The demo's detection half from end to end, on a few images, in each framework that is there."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import subprocess
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


@pytest.fixture(scope="module")
def program():
    """The demo, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("demo.detection")


def run(program, *words: object) -> tuple[int, str, str]:
    """Run the demo here; its trainings have processes of their own.

    Returns:
        The exit status, the standard output and the standard error.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module", params=INSTALLED)
def demo(request, program, tmp_path_factory):
    """The framework, the output folder, and what was printed."""
    out = tmp_path_factory.mktemp("demo")
    small = ["--num-train", 8, "--num-test", 4, "--framework", request.param, "--out", out]
    status, printed, error = run(program, *small, "--", *FEW[request.param])
    assert status == 0, printed + error
    return request.param, out, printed


def test_the_table_is_that_of_the_results(demo):
    framework, out, printed = demo
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["baseline", "PS-KD"]
    names = {"detectron2": "Detectron2", "torchvision": "torchvision"}
    assert f"detection, {names[framework]}" in printed
    for name, result in results.items():
        row = next(line.split() for line in printed.splitlines() if line.split()[:1] == [name]
                   and "iteration" not in line)  # fmt: skip
        shown = row[1:]
        expected = [result["bbox"]["AP"], result["bbox"]["AP50"]]
        expected += [result["confidence"][key] for key in ("d_ece", "aurc", "num_detections")]
        for text, value in zip(shown, expected, strict=False):
            assert text == "-" if value is None else float(text) == pytest.approx(value, abs=6e-3)
        assert result["seed"] == 1


def test_pictures_and_logs_are_there_and_named(demo):
    _, out, printed = demo
    assert (out / "detections.png").read_bytes().startswith(b"\x89PNG")
    for run_name in ("baseline", "pskd"):
        log = out / run_name / "train.log"
        assert log.stat().st_size and str(log) in printed


def test_both_train_and_test_on_the_same_images_of_disjoint_scans(demo):
    _, out, _ = demo
    parts = [load_dataset(f"coco:{out}/images/{part}.json:{out}/images/{part}")
             for part in ("train", "test")]  # fmt: skip
    assert [len(part.coco["images"]) for part in parts] == [8, 4]
    assert parts[0].class_names == parts[1].class_names == tuple("0123456789")


def test_the_step_and_log_that_failed_are_named(program, tmp_path, monkeypatch):
    """It gets the words after the dashes, as its last ones."""
    refusal = [sys.executable, "-S", "-c", "import sys; sys.exit('unknown: ' + sys.argv[-1])"]
    monkeypatch.setattr(program, "command", lambda *_: refusal)
    few = ["--num-train", 1, "--num-test", 1]
    status, _, error = run(program, *few, "--out", tmp_path / "out", "--", "--no-such-flag")
    assert status == 1
    assert "train.log: unknown: --no-such-flag" in error


def test_train_and_test_come_together():
    command = [sys.executable, "-m", "demo.detection", "--train", "voc:somewhere:train"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--train and --test together" in done.stderr


def test_files_that_the_demo_did_not_make_are_not_deleted(program, tmp_path):
    mine = tmp_path / "pskd" / "loss.py"
    mine.parent.mkdir()
    mine.write_text("mine")
    status, _, error = run(program, "--num-train", 8, "--num-test", 4, "--out", tmp_path)
    assert status == 1 and f"{mine.parent}: expected a folder that the demo made" in error
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine.parent]


def test_a_detectron2_that_does_not_load_is_not_used(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert program.default_framework() == "torchvision"
