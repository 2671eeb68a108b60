"""Alpha as a function of progress: its formula, its ends, its direction and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pskd
from pskd.schedule import (
    SCHEDULE_OPTIONS,
    SCHEDULES,
    AlphaSchedule,
    check_alpha,
    check_unchanged,
)

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


# ---- alpha of a whole training -------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("start", [1, 2, 3, 6])
def test_alpha_is_0_without_a_teacher_and_then_the_schedules(name, start):
    alphas = AlphaSchedule(0.7, 6, name, start)
    expected = [SCHEDULES[name](epoch, 6, 0.7) for epoch in range(1, 7)]
    first = max(2, start)  # the first epoch has none
    assert [alphas.at(epoch) for epoch in range(1, first)] == [0.0] * (first - 1)
    assert [alphas.at(epoch) for epoch in range(first, 7)] == expected[first - 1 :]


def test_progress_may_be_counted_in_updates():
    alphas = AlphaSchedule(0.8, 1000)
    assert alphas.at(1, 100) == 0.0
    assert alphas.at(2, 250) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"epoch: expected .*\[0, 1000\], got 1001"):
        alphas.at(3, 1001)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_final": 1.5}, r"alpha_final: expected a number in \[0, 1\], got 1.5"),
        ({"num_epochs": 0}, "num_epochs: expected 1 or more, got 0"),
        ({"num_epochs": math.nan}, "num_epochs: expected 1 or more, got nan"),
        ({"num_epochs": math.inf}, "num_epochs: expected 1 or more, got inf"),
        (
            {"alpha_schedule": "step"},
            "alpha_schedule: expected one of linear, constant, cosine, got 'step'",
        ),
        ({"start_epoch": 0}, "start_epoch: expected 1 or more, got 0"),
    ],
)
def test_a_schedule_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AlphaSchedule(**({"alpha_final": 0.5, "num_epochs": 4} | changes))


@pytest.mark.parametrize(
    ("epoch", "last", "message"),
    [(0, 0, "of 1 to 4, got 0"), (5, 4, "of 1 to 4, got 5"), (3, 0, "1 after the last, got 3"),
     (2, 2, "3 after the last, got 2")],
)  # fmt: skip
def test_epochs_come_in_order(epoch, last, message):
    alphas = AlphaSchedule(0.5, 4)
    with pytest.raises(ValueError, match=f"epoch: expected .*{message}"):
        alphas.check_next(epoch, last)
    alphas.check_next(1, 0)
    alphas.check_next(4, 3)


def test_the_options_of_a_schedule():
    assert AlphaSchedule(1, 4).options().keys() == SCHEDULE_OPTIONS
    assert AlphaSchedule(0, 4, "cosine").options() == {"alpha_final": 0.0}


def test_changed_options_are_refused_unless_they_may_change():
    saved, now = {"alpha_final": 0.5, "smoothing": 0.1}, {"alpha_final": 0.5, "smoothing": 0.1}
    rules = {"changeable": {"alpha_final"}, "allowed_by": "--allow"}
    check_unchanged(saved, now, **rules)
    check_unchanged({}, now, **rules)  # an older checkpoint
    check_unchanged(saved | {"dropped": 1}, now, **rules)
    message = r"^alpha_final: expected 0.5, with which .*, got 0.6 \(--allow allows it\)$"
    with pytest.raises(ValueError, match=message):
        check_unchanged(saved, now | {"alpha_final": 0.6}, **rules)
    check_unchanged(saved, now | {"alpha_final": 0.6}, allowed=True, **rules)
    for allowed in (False, True):
        with pytest.raises(ValueError, match="^smoothing: expected 0.1, with which .*, got 0.2$"):
            check_unchanged(saved, now | {"smoothing": 0.2}, allowed=allowed, **rules)
