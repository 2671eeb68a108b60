"""The temperature that fits best, against a fine grid; the order of a row's classes stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from pskd.calibration import temperature as module
from pskd.calibration.temperature import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, fit_temperature


def drawn(seed: int, rows: int, classes: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from their own softmax: the best temperature is about 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def nll(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> float:
    return float(cross_entropy(logits.double() / temperature, target))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 40),
    classes=st.integers(1, 6),
    spread=st.floats(0.05, 30.0),
    factor=st.sampled_from([0.05, 0.5, 1.0, 4.0, 30.0]),
)
def test_no_temperature_of_a_fine_grid_is_better(seed, rows, classes, spread, factor):
    logits, target = drawn(seed, rows, classes, spread)
    logits = logits * factor
    best = nll(logits, target, fit_temperature(logits, target))
    grid = np.geomspace(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, 600)
    least = min(nll(logits, target, value) for value in grid)
    assert best <= least + 1e-9 * (1.0 + least)


@pytest.mark.parametrize("factor", [0.1, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_of_scaled_logits_is_found_again(factor, dtype):
    logits, target = drawn(0, 20_000, 10, 2.0)
    found = fit_temperature((factor * logits).to(dtype), target)
    assert found == pytest.approx(factor, rel=0.03)
    again = fit_temperature(factor * logits / found, target)
    assert again == pytest.approx(1.0, rel=1e-5)


def test_the_predicted_classes_stay():
    logits, target = drawn(1, 500, 7, 3.0)
    scaled = logits / fit_temperature(5.0 * logits, target)
    assert torch.equal(scaled.argmax(1), logits.argmax(1))


def test_arrays_halves_and_rows_in_pieces_give_the_same(monkeypatch):
    logits, target = drawn(2, 300, 5, 2.0)
    half = logits.half()
    whole = fit_temperature(half, target)
    assert fit_temperature(half.double().numpy(), target.numpy()) == pytest.approx(whole, 1e-9)
    monkeypatch.setattr(module, "_PIECE", 64)
    assert fit_temperature(half, target.int()) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([[3.0, 0.0], [0.0, 2.0]], [0, 1], LOWEST_TEMPERATURE),  # all correct
        ([[3.0, 0.0], [0.0, 2.0]], [1, 0], HIGHEST_TEMPERATURE),  # all wrong
        ([[2.0, 2.0], [1.0, 1.0]], [0, 1], 1.0),  # nothing to scale
        ([[7.0]], [0], 1.0),  # one class
        ([[1e4, 0.0], [0.0, 1e4]], [0, 1], LOWEST_TEMPERATURE),
    ],
)
def test_rows_without_a_best_temperature_give_an_end_or_one(logits, target, expected):
    assert fit_temperature(torch.tensor(logits), torch.tensor(target)) == expected


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"logits: expected shape \(N, C\)"),
        (torch.zeros(2, 0), torch.zeros(2).long(), r"logits: expected shape \(N, C\)"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), "logits: expected a floating-point"),
        (torch.full((2, 3), torch.nan), torch.zeros(2).long(), "logits: expected finite values"),
        (torch.full((2, 3), -torch.inf), torch.zeros(2).long(), "logits: expected finite values"),
        (torch.zeros(2, 3), torch.zeros(3).long(), r"target: expected shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2), "target: expected an integer dtype"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"target: expected labels in \[0, 3\)"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "at least one example"),
    ],
)
def test_bad_input_is_refused(logits, target, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, target)
