"""The benchmark of reading images: its forms train on the same data, and its figures are there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FORMS = {"loader", "on device", "network"}
FLAGS = ["--batch-size", "4", "--steps", "2", "--rounds", "2"]


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("classification_throughput")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize(("limit", "status"), [(1e9, 0), (0.0, 1)])
def test_tells_images_a_second_and_ends_with_the_limit(
    benchmark, monkeypatch, capsys, tmp_path, limit, status
):
    monkeypatch.setattr(benchmark, "LIMIT", limit)
    file = tmp_path / "figures.json"
    assert benchmark.main([*FLAGS, "--json", str(file)]) == status
    result = json.loads(file.read_text())
    assert (result["limit"], result["within_limit"]) == (limit, status == 0)
    assert (result["batch_size"], result["steps"], result["amp"]) == (4, 2, False)
    assert result["images_per_second"].keys() == result["ms_per_step"].keys() == FORMS
    for name, rate in result["images_per_second"].items():
        assert rate * result["ms_per_step"][name] == pytest.approx(4e3)
    for name in FORMS - {"network"}:
        low, high = result["ratio_quartiles"][name]
        assert 0 < low <= result["ratio_median"][name] <= high
    printed = capsys.readouterr().out
    assert f"limit of {limit}" in printed and all(name in printed for name in FORMS)


def test_an_epoch_of_each_form_makes_as_many_steps(benchmark, monkeypatch):
    counts = {}

    class Counted(benchmark.SGD):
        def step(self, *args):
            counts[id(self)] = counts.get(id(self), 0) + 1
            return super().step(*args)

    monkeypatch.setattr(benchmark, "SGD", Counted)
    benchmark.main([*FLAGS, "--cpu-time"])
    assert list(counts.values()) == [6, 6, 6]  # an epoch that is not counted, and two rounds


@pytest.mark.parametrize("flags", [["--workers", "1"], ["--device", "cuda"]])
def test_refuses_to_time_the_process_where_another_computes(benchmark, flags, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--cpu-time", *flags])
    assert "--cpu-time: expected --device cpu and --workers 0" in capsys.readouterr().err


def test_refuses_a_model_that_is_none(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--model", "resnet19"])
    assert "got 'resnet19'" in capsys.readouterr().err
