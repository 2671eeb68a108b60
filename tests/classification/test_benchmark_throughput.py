"""The benchmark of reading images: its forms make as many steps, and its figures are there."""

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
    counts: dict[int, int] = {}

    class Counted(benchmark.SGD):
        def step(self, *args):
            counts[id(self)] = counts.get(id(self), 0) + 1
            return super().step(*args)

    monkeypatch.setattr(benchmark, "SGD", Counted)
    monkeypatch.setattr(benchmark, "LIMIT", limit)
    file = tmp_path / "figures.json"
    assert benchmark.main([*FLAGS, "--cpu-time", "--json", str(file)]) == status
    assert list(counts.values()) == [6, 6, 6]  # an epoch that is not counted, and two rounds
    result = json.loads(file.read_text())
    assert (result["limit"], result["within_limit"]) == (limit, status == 0)
    assert (result["batch_size"], result["steps"], result["amp"]) == (4, 2, False)
    assert result["images_per_second"].keys() == result["ms_per_step"].keys() == FORMS
    for name, rate in result["images_per_second"].items():
        assert rate * result["ms_per_step"][name] == pytest.approx(4e3)
    for name in FORMS - {"network"}:
        low, high = result["ratio_quartiles"][name]
        assert low <= result["ratio_median"][name] <= high
    printed = capsys.readouterr().out
    assert f"limit of {limit}" in printed and all(f"| {name} |" in printed for name in FORMS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cpu-time", "--workers", "1"], "--cpu-time: expected --device cpu and --workers 0"),
        (["--cpu-time", "--device", "cuda"], "--cpu-time: expected --device cpu and --workers 0"),
        (["--model", "resnet19"], "got 'resnet19'"),
    ],
)
def test_refuses_what_it_cannot_time(benchmark, flags, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(flags)
    assert message in capsys.readouterr().err
