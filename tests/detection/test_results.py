"""Files of results: strict JSON, whole or not there; and the table for the console."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pskd_detection import format_table, write_results

from pskd.run.files import write_json


def strict(path: Path) -> object:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_json_lacks_becomes_null_or_plain(tmp_path):
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), -np.inf, np.float32("nan")],
        "numpy": (np.float32(0.5), np.int64(3), np.bool_(True)),
        "array": np.array([[1.0, np.nan]]),
        "path": tmp_path,
        "none": None,
        "text": "ä",
        7: True,
    }
    path = write_json(tmp_path / "x.json", value)
    assert strict(path) == {
        "nan": None,
        "inf": [None, None, None],
        "numpy": [0.5, 3, True],
        "array": [[1.0, None]],
        "path": str(tmp_path),
        "none": None,
        "text": "ä",
        "7": True,
    }


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def full(*_args, **_kwargs):
        raise OSError("no space")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr("os.replace", full)
        write_json(path, {"new": 1})
    assert strict(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_results_go_to_their_place(tmp_path):
    write_results(tmp_path / "a" / "b", {"AP": 1.0})
    path = write_results(tmp_path / "a" / "b", {"AP": np.float64(2.5), "d_ece": None})
    assert path == tmp_path / "a" / "b" / "results.json"
    assert strict(path) == {"AP": 2.5, "d_ece": None}
    assert list(path.parent.iterdir()) == [path]


def test_an_evaluation_leaves_the_trainings_numbers(tmp_path):
    write_results(tmp_path, {"AP": 1.0, "seconds_per_iteration": 0.5})
    write_results(tmp_path, {"AP": 3.0}, evaluation=True)
    assert strict(tmp_path / "results.json") == {"AP": 1.0, "seconds_per_iteration": 0.5}
    assert strict(tmp_path / "evaluation.json") == {"AP": 3.0}
    # A finished training that is resumed has nothing left to time.
    write_results(tmp_path, {"AP": 2.0, "seconds_per_iteration": None})
    assert strict(tmp_path / "results.json") == {"AP": 2.0, "seconds_per_iteration": 0.5}


def test_the_table_tells_what_the_confidence_was_measured_on():
    run = {"AP": 12.345, "AP50": 30.0, "d_ece": 0.12345, "aurc": None}
    run |= {"iou_threshold": 0.5, "score_threshold": 0.05, "num_detections": 321}
    head, rule, row = format_table({"baseline": run}).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    cells = dict(
        zip(*([c.strip() for c in line.split("|")[1:-1]] for line in (head, row)), strict=True)
    )
    assert cells == {
        "run": "baseline",
        "AP": "12.3",
        "AP50": "30.0",
        "AP75": "-",
        "D-ECE": "0.1235",
        "LaECE": "-",
        "AURC": "-",
        "IoU >=": "0.5",
        "score >=": "0.05",
        "detections": "321",
    }
