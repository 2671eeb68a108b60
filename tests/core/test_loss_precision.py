"""The loss in half and single precision against float64."""

from __future__ import annotations

import pytest
import torch
from loss_cases import (
    FORMS,
    HALVES,
    Batch,
    assert_same,
    every_form,
    loss_of,
    make,
    mixture_loss,
    value_and_grad,
)
from torch import Tensor

from pskd import mix_targets

pytestmark = pytest.mark.usefixtures("backend")


def naive(batch: Batch, form: str, dtype: torch.dtype, reduction: str):
    """Return the textbook form of the loss with everything in ``dtype``; alpha is 0.6."""
    soft = mix_targets(batch.target, batch.dense(form), 0.6).to(dtype)

    def loss(logits: Tensor) -> Tensor:
        rows = -(soft * logits.log_softmax(1)).sum(1)
        return getattr(rows, reduction)() if reduction != "none" else rows

    return loss


def rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch of values that ``dtype`` has; the loss is given its teacher in float32."""
    logits, past = batch.logits.to(dtype).double(), batch.teacher_logits.to(dtype).double()
    return batch._replace(logits=logits, teacher_logits=past, dtype=torch.float32)


def assert_errs_at_most(factors, batch: Batch, form: str, dtype: torch.dtype, reduction: str):
    """Compare the worst errors of value and gradient, against float64, with the naive form's."""
    exact = mixture_loss(batch, batch.dense(form), 0.6, reduction=reduction)
    expected = value_and_grad(exact, batch.logits)
    ours = value_and_grad(loss_of(batch, form, 0.6, reduction=reduction), batch.logits.to(dtype))
    theirs = value_and_grad(naive(batch, form, dtype, reduction), batch.logits.to(dtype))
    for factor, one, other, true in zip(factors, ours, theirs, expected, strict=True):
        error, allowed = (float((part.double() - true).abs().max()) for part in (one, other))
        assert error <= factor * allowed


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("classes", [2, 33, 3000])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@every_form
def test_half_precision_errs_at_most_as_the_naive_form(form, reduction, classes, dtype):
    batch = rounded(make(48, classes, seed=classes, chunk=5 * classes), dtype)
    # The gradient is rounded twice, before and after its product with the upstream gradient.
    assert_errs_at_most((0.5, 1.5), batch, form, dtype, reduction)


@pytest.mark.parametrize("offset", [0.0, 100.0, 10_000.0])
@pytest.mark.parametrize("classes", [2, 33, 3000])
@every_form
def test_single_precision_errs_at_most_a_few_times_as_the_naive_form(form, classes, offset):
    batch = make(48, classes, seed=classes, chunk=5 * classes)
    batch = rounded(batch._replace(logits=batch.logits + offset), torch.float32)
    assert_errs_at_most((4, 4), batch, form, torch.float32, "none")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_loss_is_at_least_float32_and_the_gradient_of_the_logits_type(alpha, form, dtype):
    batch = make(4, 5)._replace(dtype=dtype)
    for reduction in ("none", "mean", "sum"):
        loss = loss_of(batch, form, alpha, reduction=reduction)
        value, grad = value_and_grad(loss, batch.logits.to(dtype))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_autocast_changes_nothing(form, dtype):
    batch = make(16, 33, chunk=70)._replace(dtype=torch.float32)
    loss = loss_of(batch, form, 0.5, label_smoothing=0.1, reduction="none")

    def under_autocast(logits: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(logits)

    logits = batch.logits.to(dtype)
    assert_same(value_and_grad(under_autocast, logits), value_and_grad(loss, logits))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_loss_scale_beyond_float16_does_not_overflow_the_gradient(form, dtype):
    batch = rounded(make(4, 5, scale=1.0), dtype)
    loss = loss_of(batch, form, 0.5, reduction="sum")
    _, exact = value_and_grad(lambda z: 32768.0 * loss(z), batch.logits)
    assert exact.abs().max() < 65504  # twice 32768 upstream: beyond float16, its products are not
    _, scaled = value_and_grad(lambda z: 32768.0 * loss(z), batch.logits.to(dtype))
    torch.testing.assert_close(scaled.double(), exact, rtol=0.02, atol=65536 * 1e-7)


@every_form
def test_a_large_vocabulary_with_huge_logits_does_not_overflow(form):
    batch = rounded(make(3, 32_000, scale=1.0, chunk=32_000)._replace(kept=8), torch.float32)
    huge = batch.logits.clamp(-2, 2) * 5e3
    assert huge.abs().max() == 1e4
    expected = value_and_grad(mixture_loss(batch, batch.dense(form), 0.6), huge)
    got = value_and_grad(loss_of(batch, form, 0.6), huge.float())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
