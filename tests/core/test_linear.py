"""The loss from hidden states against the loss of the logits that they make.

Shapes: N rows, C classes, H hidden units.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from unittest import mock

import loss_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pskd.kernels.linear_chunks
from pskd import LinearTeacher, TopK, pskd_cross_entropy, pskd_linear_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

few = settings(max_examples=16, deadline=None, derandomize=True)
weights = st.sampled_from([0.0, 0.5, 1.0])
FORMS = ("none", "probs", "top_k", "linear", "biased")


class Batch(NamedTuple):
    """A student's hidden states and embedding, labels, a teacher, and logits to a chunk."""

    tensors: list[Tensor]  # hidden, weight, bias
    target: Tensor
    past: LinearTeacher
    chunk: int

    def teacher(self, form: str) -> LinearTeacher | TopK | Tensor | None:
        scores = F.linear(*self.past) if form == "biased" else F.linear(*self.past[:2])
        return {
            "none": None,
            "probs": scores.softmax(1),
            "top_k": TopK.from_logits(scores, (scores.size(1) + 1) // 2),
            "linear": self.past._replace(bias=None),
            "biased": self.past,
        }[form]

    def arguments(self, form: str) -> dict[str, object]:
        """Return a teacher as `pskd_cross_entropy` takes it."""
        if form in ("linear", "biased"):
            past = self.teacher(form)
            return {"teacher_probs": None, "teacher_logits": F.linear(*past)}
        return {"teacher_probs": self.teacher(form)}


def make(rows: int, classes: int, seed: int = 0, chunk: int = 40, dtype=None) -> Batch:
    generator, dtype = torch.Generator().manual_seed(seed), dtype or loss_cases.under_test

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    past = LinearTeacher(random(rows, 5), random(classes, 5), random(classes))
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.3] = -100
    return Batch([random(rows, 3), random(classes, 3), random(classes)], target, past, chunk)


@st.composite
def batches(draw) -> Batch:
    rows, classes = draw(st.sampled_from([0, 1, 2, 9])), draw(st.sampled_from([1, 2, 7, 33]))
    chunk = draw(st.sampled_from([1, 2 * classes + 1, 1 << 20]))
    return make(rows, classes, draw(st.integers(0, 2**20)), chunk)


def whole(batch: Batch, form: str, alpha, **options) -> list[Tensor]:
    """Return the loss and its gradients by way of the logits, under an upstream gradient of 3."""
    tensors = [tensor.clone().requires_grad_() for tensor in batch.tensors]
    teacher = batch.arguments(form)
    loss = pskd_cross_entropy(F.linear(*tensors), batch.target, alpha=alpha, **teacher, **options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, tensors)]


def fused(batch: Batch, form: str, alpha, **options) -> list[Tensor]:
    """Return the same without the logits."""
    hidden, weight, bias = tensors = [tensor.clone().requires_grad_() for tensor in batch.tensors]
    with mock.patch.object(pskd.kernels.linear_chunks, "_CHUNK_ELEMENTS", batch.chunk):
        loss = pskd_linear_cross_entropy(
            hidden, weight, batch.target, batch.teacher(form), alpha, bias=bias, **options
        )
    return [loss.detach(), *torch.autograd.grad(3 * loss, tensors)]


@pytest.mark.parametrize("form", FORMS)
@given(
    batch=batches(),
    alpha=weights,
    by_row=st.booleans(),
    eps=st.sampled_from([0.0, 0.1]),
    reduction=st.sampled_from(["mean", "sum"]),
)
@few
def test_it_is_the_loss_of_the_logits(form, batch, alpha, by_row, eps, reduction):
    if by_row:
        alpha = alpha * (torch.arange(len(batch.target)) % 2).double()
    options = {"label_smoothing": eps, "reduction": reduction}
    expected = whole(batch, form, alpha, **options)
    loss_cases.assert_same(fused(batch, form, alpha, **options), expected, times=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_of_lower_precision_it_errs_as_the_logits_do(form, dtype):
    batch = make(64, 50, chunk=200, dtype=dtype)
    exact = Batch(
        [tensor.double() for tensor in batch.tensors],
        batch.target,
        LinearTeacher(*(tensor.double() for tensor in batch.past)),
        batch.chunk,
    )
    expected = whole(exact, form, 0.5)
    for got, naive, value in zip(
        fused(batch, form, 0.5), whole(batch, form, 0.5), expected, strict=True
    ):
        assert got.dtype == naive.dtype
        error = (got.double() - value).abs().max()
        rounding = torch.finfo(dtype).eps * (1 + value.abs().max())
        assert error <= 2 * (naive.double() - value).abs().max() + rounding


def test_autocast_makes_logits_of_half_precision_and_gradients_of_the_weights():
    batch = make(8, 11, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *grads = fused(batch, "linear", 0.5)
    for got, value in zip([loss, *grads], whole(batch, "linear", 0.5), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_asks_for_a_gradient_gets_one(wanted):
    batch = make(6, 9)
    batch.tensors[wanted].requires_grad_()
    hidden, weight, bias = batch.tensors
    loss = pskd_linear_cross_entropy(hidden, weight, batch.target, batch.past, 0.5, bias=bias)
    loss.backward()
    given = [tensor.grad is not None for tensor in batch.tensors]
    assert given == [i == wanted for i in range(3)]
    torch.testing.assert_close(
        3 * batch.tensors[wanted].grad, whole(batch, "biased", 0.5)[1:][wanted]
    )


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_those_of_the_logits(form, needs_grad):
    batch = make(9, 12, chunk=30)
    hidden, weight, bias = batch.tensors
    hidden.requires_grad_(needs_grad)
    with mock.patch.object(pskd.kernels.linear_chunks, "_CHUNK_ELEMENTS", 30):
        loss, stats = pskd_linear_cross_entropy(
            hidden, weight, batch.target, batch.teacher(form), 0.5, bias=bias, stats_top_k=3
        )
    logits = F.linear(*batch.tensors).detach()
    expected = TopK.from_logits(logits, 3)
    assert torch.equal(stats.student_top_k.indices, expected.indices)
    torch.testing.assert_close(stats.student_top_k.probs, expected.probs)
    valid = batch.target != -100
    nll = F.cross_entropy(logits, batch.target, reduction="none")
    torch.testing.assert_close(stats.nll, nll)
    if form == "none":
        assert (stats.teacher_preferred == -1).all()
    else:
        past = F.linear(*batch.past) if form == "biased" else F.linear(*batch.past[:2])
        assert torch.equal(stats.teacher_preferred, past.argmax(1))
        _, told = pskd_cross_entropy(
            logits, batch.target, alpha=0.5, return_stats=True, **batch.arguments(form)
        )
        torch.testing.assert_close(stats.teacher_probs_at_label[valid], told[1][valid])
    assert loss.requires_grad == needs_grad
    assert not stats.nll.requires_grad


def test_the_teacher_gets_no_gradient():
    batch = make(4, 6)
    past = LinearTeacher(*(tensor.requires_grad_() for tensor in batch.past))
    hidden, weight, _ = batch.tensors
    pskd_linear_cross_entropy(hidden.requires_grad_(), weight, batch.target, past, 0.5).backward()
    assert hidden.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in past)


def test_a_second_derivative_is_refused():
    batch = make(4, 6)
    hidden, weight, _ = batch.tensors
    loss = pskd_linear_cross_entropy(hidden.requires_grad_(), weight, batch.target, None, 0.5)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), hidden)


def test_no_tensor_of_all_logits_is_made():
    batch = make(400, 50, chunk=5000, dtype=torch.float32)
    sizes = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, Tensor)
            )
            return out

    hidden, weight, bias = (tensor.requires_grad_() for tensor in batch.tensors)
    with Watch(), mock.patch.object(pskd.kernels.linear_chunks, "_CHUNK_ELEMENTS", batch.chunk):
        pskd_linear_cross_entropy(hidden, weight, batch.target, batch.past, 0.5, bias=bias)
    assert 5000 in sizes  # the logits of a chunk are seen
    assert max(sizes) == 5000  # and nothing larger, of 20,000 in all


HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3])
GOOD = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET, "teacher": None, "alpha": 0.5}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": HIDDEN[0]}, "hidden: expected a floating-point matrix, got torch.float32 of"),
        ({"weight": WEIGHT.long()}, "weight: expected a floating-point matrix, got torch.int64"),
        ({"bias": torch.zeros(3)}, "bias: expected shape (4,), got (3,)"),
        ({"target": TARGET[:1]}, "target: expected 2 labels, got 1"),
        ({"target": torch.tensor([0, 4])}, "target: expected labels in [0, 3], got [0, 4]"),
        ({"alpha": 1.5}, "alpha: expected a number in [0, 1], got 1.5"),
        ({"reduction": "none"}, "reduction: expected 'mean' or 'sum', got 'none'"),
        ({"stats_top_k": 5}, "stats_top_k: expected 0 to 4, got 5"),
        (
            {"teacher": torch.zeros(2, 3)},
            "teacher: expected shape (2, 4) as the logits, got (2, 3)",
        ),
        (
            {"teacher": LinearTeacher(HIDDEN, WEIGHT[:3])},
            "teacher: expected 2 hidden states and 4 classes, got 2 and 3",
        ),
    ],
)
def test_bad_input_is_refused_with_what_was_expected_and_got(changed, message):
    assert pskd_linear_cross_entropy(**GOOD).isfinite()
    with pytest.raises(ValueError, match=re.escape(message)):
        pskd_linear_cross_entropy(**{**GOOD, **changed})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_unsigned_label_is_not_the_ignored_one(reduction):
    """-100 as an unsigned integer of 8 bits is 156."""
    logits, target = torch.randn(4, 200), torch.tensor([156, 1, 2, 156])
    expected = F.cross_entropy(logits, target, reduction=reduction)
    options = {"teacher": None, "alpha": 0.0, "reduction": reduction}
    got = pskd_linear_cross_entropy(logits, torch.eye(200), target.to(torch.uint8), **options)
    torch.testing.assert_close(got, expected)
