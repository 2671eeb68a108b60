"""The benchmark of a training step: its forms compute the same thing, and its figures are there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from pskd_classification import build_model

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CLASSES, BATCH = 10, 8
PSKD = ("memory", "snapshot", "published")


@pytest.fixture(scope="module")
def benchmark():
    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("classification_step")
    finally:
        sys.path.remove(str(FOLDER))


def weights(bench, name: str) -> torch.Tensor:
    """Return all weights and statistics of a form's model in one row."""
    return torch.cat([value.flatten() for value in bench.models[name].state_dict().values()])


@pytest.mark.parametrize("with_past", [False, True])
def test_all_forms_train_alike(benchmark, with_past):
    torch.manual_seed(0)
    model = build_model("preact_resnet10_tiny", CLASSES)
    bench = benchmark.Bench(model, torch.randn(BATCH, 3, 32, 32), CLASSES, num_rows=20)
    if with_past:
        bench.begin_second_epoch()
    losses = {name: torch.stack([bench.step(name), bench.step(name)]) for name in benchmark.FORMS}
    trained = weights(bench, "published")
    # Sums in another order are rounded differently, and steps widen that. The memory's
    # probabilities are rounded to float16 too: to a part in 2,000 of themselves.
    for name in ("snapshot", "memory"):
        loss_off, weight_off = (1e-4, 1e-3) if name == "memory" else (1e-5, 1e-4)
        torch.testing.assert_close(losses[name], losses["published"], rtol=loss_off, atol=1e-5)
        torch.testing.assert_close(weights(bench, name), trained, rtol=1e-4, atol=weight_off)
    differs = (losses[benchmark.BASE] - losses["published"]).abs()
    assert (differs > 0.01).all() if with_past else (differs < 1e-5).all()


@pytest.mark.parametrize(("limit", "status"), [(1e9, 0), (0.0, 1)])
def test_tells_all_figures_and_ends_with_the_limit(
    benchmark, monkeypatch, capsys, tmp_path, limit, status
):
    monkeypatch.setattr(benchmark, "LIMIT", limit)
    monkeypatch.setattr(benchmark, "PART_CALLS", 2)
    file, rows = tmp_path / "figures.json", 300
    flags = ["--model", "preact_resnet10_tiny", "--classes", str(CLASSES), "--rows", str(rows)]
    flags += ["--batch-size", str(BATCH), "--steps", "1", "--rounds", "2", "--json", str(file)]
    assert benchmark.main(flags) == status
    result = json.loads(file.read_text())
    assert (result["limit"], result["within_limit"]) == (limit, status == 0)
    assert (result["model"], result["rows"], result["rounds"]) == ("preact_resnet10_tiny", rows, 2)
    for part in ("step", "alone_128x100", "alone_256x1000"):
        found = result[part]
        assert found["seconds"].keys() == {benchmark.BASE, *PSKD}
        assert found["ratio_median"].keys() == found["ratio_quartiles"].keys() == set(PSKD)
        for name, ratio in found["ratio_median"].items():
            low, high = found["ratio_quartiles"][name]
            assert ratio > 0 and low <= ratio <= high
    sizes = result["teacher_bytes"]
    assert sizes["memory"] == 2 * rows * (2 * CLASSES + 1)  # float16 and a byte, two epochs
    assert sizes["published"] == rows * 4 * CLASSES
    printed = capsys.readouterr().out
    assert f"limit of {limit}" in printed
    assert printed.count("| cross-entropy |") == 3
