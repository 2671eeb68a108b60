"""What a teacher does to the rows of a batch."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import assume, given
from loss_cases import HALVES, batches, few, forms, loss_of, torch_loss, value_and_grad, weights

from pskd import TopK, gradient_rescaling
from pskd.stats import agreement, gradient_on_label, teacher_effect


@given(batch=batches(min_rows=1, min_classes=2), form=forms, alpha=weights)
@few
def test_rescaling_is_the_ratio_of_the_label_logits_gradients(batch, form, alpha):
    _, soft = value_and_grad(loss_of(batch, form, alpha, reduction="sum"), batch.logits)
    _, hard = value_and_grad(torch_loss(batch, reduction="sum"), batch.logits)
    _, stats = loss_of(batch, form, alpha, return_stats=True)(batch.logits)
    label = batch.target[:, None]
    assume(hard.gather(1, label).abs().min() > 1e-3)
    expected = (soft / hard).gather(1, label)[:, 0]
    factors = gradient_rescaling((-stats.nll).exp(), stats.teacher_probs_at_label, alpha)
    torch.testing.assert_close(factors, expected, rtol=1e-9, atol=1e-9)
    rows = torch.full_like(factors, alpha)
    in_rows = gradient_rescaling((-stats.nll).exp(), stats.teacher_probs_at_label, rows)
    assert torch.equal(in_rows, factors)


# 0 and 1 among them: a float32 softmax reaches both.
PROBS = torch.tensor([0.0, 1e-8, 0.3, 1 - 1e-7, 1.0])


@pytest.mark.parametrize("alpha", [0.0, torch.zeros(25)])
def test_rescaling_by_alpha_zero_is_one(alpha):
    student, teacher = torch.cartesian_prod(PROBS, PROBS).unbind(1)
    assert torch.equal(gradient_rescaling(student, teacher, alpha), torch.ones(25))


@given(alpha=weights)
@few
def test_rescaling_by_an_equal_teacher_is_one_minus_alpha(alpha):
    expected = torch.full_like(PROBS, 1 - alpha)
    torch.testing.assert_close(gradient_rescaling(PROBS, PROBS, alpha), expected)


def test_rescaling_is_one_for_a_sure_teacher_and_smallest_where_it_was_unsure():
    student = torch.full((4,), 0.4)
    factors = gradient_rescaling(student, torch.tensor([1.0, 0.9, 0.4, 0.0]), 0.5)
    torch.testing.assert_close(factors, torch.tensor([1.0, 11 / 12, 0.5, 1 / 6]))


def test_rescaling_of_a_sure_student_is_the_limit():
    one = torch.ones(1)
    assert gradient_rescaling(one, one, 0.25) == 0.75
    assert gradient_rescaling(one, 0.5 * one, 0.25) == -math.inf


@pytest.mark.parametrize("student", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("teacher", [*HALVES, torch.float32, torch.float64])
def test_rescaling_is_at_least_float32(student, teacher):
    factors = gradient_rescaling(PROBS[2:3].to(student), PROBS[2:3].to(teacher), 0.5)
    assert factors.dtype == (torch.float64 if student == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("teacher", "alpha", "message"),
    [
        (torch.ones(4), 0.5, "teacher_probs_at_label: expected shape (5,), got (4,)"),
        (PROBS, 1.5, "alpha: expected a number in [0, 1], got 1.5"),
        (PROBS, math.nan, "alpha: expected a number in [0, 1], got nan"),
        (PROBS, torch.zeros(4), "alpha: expected a number or shape (5,), got (4,)"),
        (PROBS, torch.tensor([0, 0, 0, 0, 2.0]), "alpha: expected every row in [0, 1], got"),
    ],
)
def test_rescaling_refuses_bad_input(teacher, alpha, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_rescaling(PROBS, teacher, alpha)


# -- A batch ---------------------------------------------------------------------------------------


def test_the_effect_is_summed_over_the_rows_that_have_a_teacher():
    student, teacher = torch.tensor([0.5, 0.9, 0.2]), torch.tensor([0.25, 0.5, 0.0])
    alpha = torch.tensor([0.5, 0.0, 0.4])
    effect = teacher_effect(-student.log(), teacher, alpha)
    tiny = torch.finfo(torch.float32).tiny  # of a probability that was rounded to 0
    assert int(effect.rows) == 2
    assert float(effect.teacher_nll) == pytest.approx(math.log(4) - math.log(tiny))
    assert float(effect.error) == pytest.approx(0.5 + 0.8)
    assert float(effect.removed) == pytest.approx(0.5 * 0.75 + 0.4 * 1.0)


@given(batch=batches(min_rows=1, min_classes=2), form=forms, alpha=weights)
@few
def test_the_effects_ratio_is_the_factor_on_the_summed_gradients(batch, form, alpha):
    _, stats = loss_of(batch, form, alpha, return_stats=True)(batch.logits)
    rows = torch.full(batch.target.shape, max(alpha, 0.1))
    effect = teacher_effect(*stats, rows)
    error, removed = gradient_on_label(*stats, rows)
    assume(error.min() > 1e-3)
    factors = gradient_rescaling((-stats.nll).exp(), stats.teacher_probs_at_label, rows)
    expected = (factors * error).sum() / error.sum()
    torch.testing.assert_close(1.0 - effect.removed / effect.error, expected.float())
    torch.testing.assert_close(effect.removed, removed.sum())


def test_an_empty_batch_has_no_effect():
    effect = teacher_effect(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert [float(value) for value in effect] == [0.0] * 4


@pytest.mark.parametrize("sparse", [False, True])
def test_agreement_is_that_of_the_most_likely_classes(sparse):
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0], [0.0, 0.0, 4.0]])
    past = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.3, 0.2, 0.5]])
    if sparse:
        past = TopK(
            torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.tensor([[0.2, 0.7]] * 2 + [[0.5, 0.3]])
        )
    assert agreement(scores, past).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_past_that_is_not_finite_has_no_effect(bad):
    nll, past, alpha = torch.tensor([0.5, 0.7, 0.9]), torch.tensor([0.5, bad, 0.3]), torch.ones(3)
    got = teacher_effect(nll, past, 0.6 * alpha)
    expected = teacher_effect(nll[[0, 2]], past[[0, 2]], 0.6 * alpha[[0, 2]])
    torch.testing.assert_close(got, expected)
    unseen = teacher_effect(nll, past, torch.tensor([0.6, 0.0, 0.6]))
    torch.testing.assert_close(unseen, expected)


def test_a_student_that_is_not_finite_is_left_out():
    past, alpha = torch.tensor([0.5, 0.4]), torch.full((2,), 0.6)
    got = teacher_effect(torch.tensor([0.5, math.nan]), past, alpha)
    torch.testing.assert_close(got, teacher_effect(torch.tensor([0.5]), past[:1], alpha[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_that_rounding_left_above_1_are_1(dtype):
    above = 1.0 + torch.finfo(dtype).eps
    student, teacher = torch.tensor([[above, above, 0.5], [0.5, above, above]], dtype=dtype)
    factors = gradient_rescaling(student, teacher, 0.5)
    assert factors.tolist() == [-math.inf, 0.5, 1.0]


@pytest.mark.parametrize("given", [[0.5], 0.5, None])
def test_rescaling_refuses_what_is_no_tensor(given):
    with pytest.raises(ValueError, match="student_probs_at_label: expected a tensor, got"):
        gradient_rescaling(given, PROBS, 0.5)
