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
CLASSES, BATCH, STEPS = 10, 8, 2
PSKD = ("memory", "snapshot", "published")


@pytest.fixture(scope="module")
def benchmark():
    torch.set_num_threads(1)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("classification_step")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def bench(benchmark):
    torch.manual_seed(0)
    model = build_model("preact_resnet10_tiny", CLASSES)
    return benchmark.Bench(model, torch.randn(BATCH, 3, 32, 32), CLASSES, num_rows=20)


def train(benchmark, bench) -> dict[str, torch.Tensor]:
    """Return each form's losses of an epoch."""
    assert len(bench.rows) == STEPS
    calls = benchmark.training_steps(bench)
    return {
        name: torch.stack([call(number) for number in range(STEPS)]) for name, call in calls.items()
    }


def weights(bench, name: str) -> torch.Tensor:
    """Return all weights and statistics of a form's model in one row."""
    return torch.cat([value.flatten() for value in bench.models[name].state_dict().values()])


def test_without_a_past_all_four_train_alike(benchmark, bench):
    start = weights(bench, benchmark.BASE)
    losses = train(benchmark, bench)
    assert losses.keys() == {benchmark.BASE, *PSKD}
    trained = weights(bench, benchmark.BASE)
    assert (trained - start).abs().max() > 0.01
    for name in PSKD:
        torch.testing.assert_close(losses[name], losses[benchmark.BASE], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights(bench, name), trained, rtol=1e-4, atol=1e-5)


def test_with_the_same_past_the_three_teachers_train_alike(benchmark, bench):
    bench.begin_second_epoch()
    losses = train(benchmark, bench)
    trained = weights(bench, "published")
    # Sums in another order are rounded otherwise, and steps widen that. The memory's probabilities
    # are rounded to float16 too: to a part in 2,000 of themselves.
    for name, loss_off, weight_off in (("snapshot", 1e-5, 1e-4), ("memory", 1e-4, 1e-3)):
        torch.testing.assert_close(losses[name], losses["published"], rtol=loss_off, atol=1e-6)
        torch.testing.assert_close(weights(bench, name), trained, rtol=1e-4, atol=weight_off)
    assert ((losses[benchmark.BASE] - losses["published"]).abs() > 0.01).all()
    assert (weights(bench, benchmark.BASE) - trained).abs().max() > 0.01


def test_memory_and_bank_keep_the_same_predictions(benchmark, bench):
    bench.begin_second_epoch()
    before = bench.published.bank.clone()
    train(benchmark, bench)
    shown = bench.rows.flatten()
    assert shown.unique().numel() == STEPS * BATCH
    bench.memory.memory.next_epoch()
    kept, seen = bench.memory.memory.read(shown)
    assert seen.all()
    torch.testing.assert_close(kept, bench.published.bank[shown], rtol=2e-3, atol=1e-3)
    assert (bench.published.bank[shown] - before[shown]).abs().amax(dim=1).min() > 0.01


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
        assert all(value > 0 for value in found["seconds"].values())
        assert found["ratio_median"].keys() == found["ratio_quartiles"].keys() == set(PSKD)
        for name, ratio in found["ratio_median"].items():
            low, high = found["ratio_quartiles"][name]
            assert 0 < ratio and low <= ratio <= high
    sizes = result["teacher_bytes"]
    assert sizes["memory"] == 2 * rows * (2 * CLASSES + 1)  # float16 and a byte, two epochs
    assert sizes["published"] == rows * 4 * CLASSES
    model = build_model("preact_resnet10_tiny", CLASSES)
    assert sizes["snapshot"] == sum(value.nbytes for value in model.state_dict().values())
    printed = capsys.readouterr().out
    assert f"limit of {limit}" in printed
    assert printed.count("cross-entropy  ") == 3


def test_refuses_a_data_set_smaller_than_a_batch(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--rows", "100"])
    assert "--rows 256 or more" in capsys.readouterr().err
