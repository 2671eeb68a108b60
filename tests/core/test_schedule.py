"""Alpha as a function of progress: its formula, its ends, its direction and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pskd
from pskd.schedule import SCHEDULES, check_alpha

few = settings(max_examples=30, deadline=None, derandomize=True)
weights = st.floats(0.0, 1.0)
lengths = st.integers(1, 200)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

NO_WEIGHTS = [-0.1, -1e-9, 1.0000001, 2, math.nan, math.inf, -math.inf, "x", None, [0.5], 1j]


def over_training(schedule, length: int, alpha_final: float) -> list[float]:
    return [schedule(epoch, length, alpha_final) for epoch in range(1, length + 1)]


@given(length=lengths, alpha_final=weights)
@few
def test_linear_is_alpha_final_times_the_fraction_of_epochs(length, alpha_final):
    expected = [alpha_final * epoch / length for epoch in range(1, length + 1)]
    assert over_training(pskd.linear_alpha, length, alpha_final) == pytest.approx(expected)


@given(length=lengths, alpha_final=weights)
@few
def test_cosine_is_half_a_cosine(length, alpha_final):
    expected = [alpha_final * math.sin(math.pi * t / length / 2) ** 2 for t in range(1, length + 1)]
    got = over_training(pskd.cosine_alpha, length, alpha_final)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(length=lengths, alpha_final=weights)
@few
def test_constant_is_alpha_final_in_every_epoch(length, alpha_final):
    assert set(over_training(pskd.constant_alpha, length, alpha_final)) == {alpha_final}


@every_schedule
@given(length=lengths, alpha_final=weights)
@few
def test_last_epoch_has_alpha_final_exactly(schedule, length, alpha_final):
    assert schedule(length, length, alpha_final) == alpha_final


@every_schedule
@given(length=lengths, alpha_final=weights)
@few
def test_alpha_never_falls_and_stays_within_zero_and_alpha_final(schedule, length, alpha_final):
    alphas = [0.0, *over_training(schedule, length, alpha_final), alpha_final]
    assert alphas == sorted(alphas)


@pytest.mark.parametrize("schedule", [pskd.linear_alpha, pskd.cosine_alpha])
def test_growing_schedules_start_from_zero(schedule):
    assert schedule(0, 7, 0.8) == 0.0
    assert 0.0 < schedule(1, 7, 0.8) < schedule(2, 7, 0.8)


def test_cosine_is_slower_at_first_and_faster_in_the_middle():
    assert pskd.cosine_alpha(1, 10, 0.8) < pskd.linear_alpha(1, 10, 0.8)
    assert pskd.cosine_alpha(5, 10, 0.8) == pytest.approx(pskd.linear_alpha(5, 10, 0.8))
    assert pskd.cosine_alpha(9, 10, 0.8) > pskd.linear_alpha(9, 10, 0.8)


@every_schedule
@given(step=st.integers(0, 1000), alpha_final=weights)
@few
def test_only_the_fraction_of_training_counts(schedule, step, alpha_final):
    in_epochs = schedule(step / 100, 10, alpha_final)
    assert schedule(step, 1000, alpha_final) == pytest.approx(in_epochs)


@every_schedule
@pytest.mark.parametrize("alpha_final", NO_WEIGHTS)
def test_alpha_final_that_is_no_weight_is_refused_by_name_and_value(schedule, alpha_final):
    with pytest.raises(ValueError, match=r"alpha_final: expected .*\[0, 1\], got") as error:
        schedule(1, 2, alpha_final)
    assert str(alpha_final) in str(error.value)


@every_schedule
@pytest.mark.parametrize("num_epochs", [0, -3, math.inf, math.nan])
def test_a_training_without_a_length_is_refused(schedule, num_epochs):
    with pytest.raises(ValueError, match=f"num_epochs: expected .*above 0, got {num_epochs}"):
        schedule(0, num_epochs, 0.5)


@every_schedule
@pytest.mark.parametrize("epoch", [-1, -1e-9, 8, 7.001, math.inf, math.nan])
def test_an_epoch_outside_the_training_is_refused(schedule, epoch):
    with pytest.raises(ValueError, match=rf"epoch: expected .*\[0, 7\], got {epoch}"):
        schedule(epoch, 7, 0.5)


@pytest.mark.parametrize("alpha", [0, 1, 0.25, True, torch.tensor(0.25)])
def test_check_alpha_returns_a_float(alpha):
    checked = check_alpha(alpha)
    assert type(checked) is float
    assert checked == float(alpha)


@pytest.mark.parametrize("alpha", NO_WEIGHTS)
def test_check_alpha_names_the_argument_that_it_was_told(alpha):
    with pytest.raises(ValueError, match=r"^weight: expected"):
        check_alpha(alpha, "weight")


def test_schedules_are_found_by_the_name_of_their_function():
    assert set(SCHEDULES) == {"linear", "constant", "cosine"}
    assert all(getattr(pskd, f"{name}_alpha") is found for name, found in SCHEDULES.items())
