"""The demo's detection half from end to end, on a few images, in each framework that is there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pskd_detection import load_dataset

ROOT = Path(__file__).resolve().parents[2]
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


def run(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "demo.detection", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module", params=INSTALLED)
def demo(request, tmp_path_factory):
    """The framework, the output folder, and what was printed."""
    out = tmp_path_factory.mktemp("demo")
    small = ["--num-train", 8, "--num-test", 4, "--framework", request.param, "--out", out]
    done = run(*small, "--", *FEW[request.param])
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, out, done.stdout


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


def test_the_step_and_log_that_failed_are_named(tmp_path):
    few = ["--num-train", 8, "--num-test", 4]
    done = run(*few, "--out", tmp_path / "out", "--", "--no-such-flag")
    assert done.returncode == 1
    assert "--no-such-flag" in done.stderr and "train.log" in done.stderr


def test_train_and_test_come_together(tmp_path):
    done = run("--train", "voc:somewhere:train")
    assert done.returncode == 2 and "--train and --test together" in done.stderr


def test_files_that_the_demo_did_not_make_are_not_deleted(tmp_path):
    mine = tmp_path / "pskd" / "loss.py"
    mine.parent.mkdir()
    mine.write_text("mine")
    done = run("--num-train", 8, "--num-test", 4, "--out", tmp_path)
    assert done.returncode == 1 and f"{mine.parent}: expected a folder that the demo made" in (
        done.stderr
    )
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine.parent]


def test_a_detectron2_that_does_not_load_is_not_used(monkeypatch):
    from demo import detection

    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert detection.default_framework() == "torchvision"
