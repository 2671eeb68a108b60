"""The loss by what must hold for any batch: its value, its gradient, its memory, its errors.

Shapes: N rows, C classes, k kept classes. Every comparison is one of values *and* gradients, under
an upstream gradient that is not 1, in chunks of one row, of two rows and a rest, and of all rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pskd.kernels.chunked
import pskd.kernels.gradient
from pskd import TopK, gradient_rescaling, mix_targets, pskd_cross_entropy
from pskd.kernels import native

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other

few = settings(max_examples=16, deadline=None, derandomize=True)
weights = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.0, 1.0)
smoothings = st.sampled_from([0.0, 0.1, 1.0])
reductions = st.sampled_from(["none", "mean", "sum"])

FORMS = ("probs", "logits", "top_k")
forms = st.sampled_from(FORMS)
every_form = pytest.mark.parametrize("form", FORMS)
HALVES = [torch.bfloat16, torch.float16]


# -- Batches, and what they are compared with ------------------------------------------------------


class Batch(NamedTuple):
    """Student and teacher of one batch in float64, and how many logits make a chunk."""

    logits: Tensor
    target: Tensor
    teacher_logits: Tensor
    chunk: int
    kept: int
    ignore_index: int = -100

    def rows(self, index) -> Batch:
        """Return the batch of some rows."""
        names = ("logits", "target", "teacher_logits")
        return self._replace(**{name: getattr(self, name)[index] for name in names})

    @property
    def classes(self) -> int:
        return self.logits.size(1)

    @property
    def valid(self) -> Tensor:
        return self.target != self.ignore_index

    def teacher(self, form: str) -> dict[str, Tensor | TopK | None]:
        """Return the arguments that give the teacher in one of its forms."""
        probs = self.teacher_logits.softmax(1)
        if form == "logits":
            return {"teacher_probs": None, "teacher_logits": self.teacher_logits}
        if form == "top_k":
            values, indices = probs.topk(self.kept, dim=1)
            return {"teacher_probs": TopK(indices, values)}
        return {"teacher_probs": probs}

    def dense(self, form: str) -> Tensor:
        """Return the same teacher as the matrix of its probabilities."""
        given_probs = self.teacher(form)["teacher_probs"]
        if isinstance(given_probs, TopK):
            return given_probs.dense(self.classes)
        return self.teacher_logits.softmax(1)


def make(rows: int, classes: int, seed=0, scale=3.0, chunk=1 << 18) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    student, past = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(classes, (rows,), generator=generator)
    return Batch(student, target, past, chunk, kept=(classes + 1) // 2)


@st.composite
def batches(draw, min_rows: int = 0, min_classes: int = 1) -> Batch:
    """Batches of awkward shapes; a chunk is one row, two rows (and a rest), or everything."""
    rows = draw(st.sampled_from([n for n in (0, 1, 2, 5, 8) if n >= min_rows]))
    classes = draw(st.sampled_from([c for c in (1, 2, 3, 7, 130) if c >= min_classes]))
    chunk = draw(st.sampled_from([1, classes, 2 * classes + 1, 1 << 18]))
    made = make(rows, classes, draw(st.integers(0, 2**20)), chunk=chunk)
    return made._replace(kept=draw(st.integers(1, classes)))


@st.composite
def padded_batches(draw, **sizes) -> Batch:
    """Batches with ignored rows, by torch's default label or by a label that is a class."""
    made = draw(batches(**sizes))
    ignore_index = draw(st.sampled_from([-100] if made.classes == 1 else [-100, 1]))
    rows = len(made.target)
    ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=bool)
    target = made.target.masked_fill(ignored, ignore_index)
    return made._replace(target=target, ignore_index=ignore_index)


def loss_of(batch: Batch, form: str | None, alpha, **options) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of the logits; ``form`` None gives no teacher."""
    teacher = {"teacher_probs": None} if form is None else batch.teacher(form)
    options = {"ignore_index": batch.ignore_index, **teacher, **options}

    def loss(logits: Tensor) -> Tensor:
        with mock.patch.object(pskd.kernels.chunked, "_CHUNK_ELEMENTS", batch.chunk):
            return pskd_cross_entropy(logits, batch.target, alpha=alpha, **options)

    return loss


def torch_loss(batch: Batch, label_smoothing=0.0, reduction="mean") -> Callable[[Tensor], Tensor]:
    """Return F.cross_entropy of the labels, but 0 for the mean of no row."""

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            batch.target,
            ignore_index=batch.ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction if batch.valid.any() or reduction == "none" else "sum",
        )

    return loss


def mixture_loss(
    batch: Batch, soft: Tensor, alpha, label_smoothing=0.0, reduction="mean"
) -> Callable[[Tensor], Tensor]:
    """Return F.cross_entropy against the materialised mixture, of the rows that count."""
    valid = batch.valid
    alpha = alpha[valid] if isinstance(alpha, Tensor) and alpha.dim() else alpha
    mixed = mix_targets(batch.target[valid], soft[valid], alpha, label_smoothing=label_smoothing)

    def loss(logits: Tensor) -> Tensor:
        rows = logits.new_zeros(len(logits))
        rows[valid] = -(mixed * logits[valid].log_softmax(1)).sum(1)
        if reduction == "none":
            return rows
        return rows.sum() / (max(int(valid.sum()), 1) if reduction == "mean" else 1)

    return loss


def value_and_grad(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and the logits' gradient under an upstream gradient of 2, 3, 4, ..."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    upstream = torch.arange(2, 2 + value.numel(), dtype=value.dtype).reshape(value.shape)
    value.backward(upstream)
    return value.detach(), logits.grad


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], **kwargs) -> None:
    tolerance = {"rtol": 1e-12, "atol": 1e-12, **kwargs}
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# -- What it equals --------------------------------------------------------------------------------


@given(batch=padded_batches(), form=forms, eps=smoothings, reduction=reductions)
@few
def test_alpha_zero_is_cross_entropy(batch, form, eps, reduction):
    options = {"label_smoothing": eps, "reduction": reduction}
    got = value_and_grad(loss_of(batch, form, 0.0, **options), batch.logits)
    assert_same(got, value_and_grad(torch_loss(batch, **options), batch.logits))


@given(batch=padded_batches(), alpha=weights, eps=smoothings, reduction=reductions)
@few
def test_no_teacher_is_cross_entropy_for_any_alpha(batch, alpha, eps, reduction):
    options = {"label_smoothing": eps, "reduction": reduction}
    got = value_and_grad(loss_of(batch, None, alpha, **options), batch.logits)
    assert_same(got, value_and_grad(torch_loss(batch, **options), batch.logits))


@given(batch=padded_batches(), alpha=weights, reduction=reductions, top_k=st.booleans())
@few
def test_one_hot_teacher_is_cross_entropy_for_any_alpha(batch, alpha, reduction, top_k):
    label = batch.target.clamp_min(0)
    sure = TopK(label[:, None], torch.ones(len(label), 1).double())
    teacher = sure if top_k else F.one_hot(label, batch.classes).double()
    loss = loss_of(batch, None, alpha, teacher_probs=teacher, reduction=reduction)
    expected = value_and_grad(torch_loss(batch, reduction=reduction), batch.logits)
    assert_same(value_and_grad(loss, batch.logits), expected)


@given(batch=padded_batches(), alpha=weights, form=forms, reduction=reductions)
@few
def test_uniform_teacher_is_label_smoothing_by_alpha(batch, alpha, form, reduction):
    uniform = batch._replace(teacher_logits=torch.zeros_like(batch.logits))
    got = value_and_grad(loss_of(uniform, form, alpha, reduction=reduction), batch.logits)
    expected = torch_loss(batch, label_smoothing=alpha, reduction=reduction)
    assert_same(got, value_and_grad(expected, batch.logits))


@every_form
@given(batch=padded_batches(), alpha=weights, eps=smoothings, reduction=reductions)
@few
def test_it_is_cross_entropy_against_the_mixture(form, batch, alpha, eps, reduction):
    options = {"label_smoothing": eps, "reduction": reduction}
    got = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
    expected = mixture_loss(batch, batch.dense(form), alpha, **options)
    assert_same(got, value_and_grad(expected, batch.logits))


@pytest.mark.parametrize("form", ["probs", "top_k"])
@given(batch=padded_batches(), alpha=weights, eps=smoothings, mass=st.sampled_from([0, 0.6, 1.5]))
@few
def test_it_is_the_mixture_even_of_a_teacher_that_does_not_sum_to_one(
    form, batch, alpha, eps, mass
):
    teacher = batch.teacher(form)["teacher_probs"]
    if form == "top_k":
        teacher = TopK(teacher.indices, mass * teacher.probs)
        dense = teacher.dense(batch.classes)
    else:
        teacher = dense = mass * teacher
    loss = loss_of(batch, None, alpha, teacher_probs=teacher, label_smoothing=eps)
    expected = mixture_loss(batch, dense, alpha, label_smoothing=eps)
    assert_same(value_and_grad(loss, batch.logits), value_and_grad(expected, batch.logits))


@given(batch=batches(min_rows=1), alpha=weights)
@few
def test_torch_agrees_on_the_mixture(batch, alpha):
    mixed = mix_targets(batch.target, batch.dense("probs"), alpha)
    expected = value_and_grad(lambda z: F.cross_entropy(z, mixed), batch.logits)
    assert_same(value_and_grad(loss_of(batch, "probs", alpha), batch.logits), expected)


@given(batch=padded_batches(), alpha=weights, eps=smoothings, reduction=reductions)
@few
def test_teacher_logits_are_their_softmax(batch, alpha, eps, reduction):
    options = {"label_smoothing": eps, "reduction": reduction}
    got = value_and_grad(loss_of(batch, "logits", alpha, **options), batch.logits)
    assert_same(got, value_and_grad(loss_of(batch, "probs", alpha, **options), batch.logits))


@given(batch=padded_batches(), alpha=weights, reduction=reductions)
@few
def test_top_k_of_all_classes_is_the_dense_teacher(batch, alpha, reduction):
    batch = batch._replace(kept=batch.classes)
    got = value_and_grad(loss_of(batch, "top_k", alpha, reduction=reduction), batch.logits)
    expected = loss_of(batch, "probs", alpha, reduction=reduction)
    assert_same(got, value_and_grad(expected, batch.logits))


@given(batch=padded_batches(), alpha=weights)
@few
def test_top_k_lists_its_classes_in_any_order(batch, alpha):
    listed = batch.teacher("top_k")["teacher_probs"]
    turned = TopK(listed.indices.flip(1).to(torch.int32), listed.probs.flip(1))
    got = value_and_grad(loss_of(batch, None, alpha, teacher_probs=turned), batch.logits)
    assert_same(got, value_and_grad(loss_of(batch, "top_k", alpha), batch.logits))


@given(batch=padded_batches(), form=forms, eps=smoothings, reduction=reductions)
@few
def test_one_alpha_a_row_is_the_mixture_of_each_row(batch, form, eps, reduction):
    alpha = torch.linspace(0, 1, len(batch.target), dtype=torch.float64)
    options = {"label_smoothing": eps, "reduction": reduction}
    got = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
    expected = mixture_loss(batch, batch.dense(form), alpha, **options)
    assert_same(got, value_and_grad(expected, batch.logits))


@given(batch=padded_batches(), form=forms, alpha=weights)
@few
def test_the_same_alpha_in_every_row_is_one_alpha(batch, form, alpha):
    expected = value_and_grad(loss_of(batch, form, alpha), batch.logits)
    exact = torch.tensor(alpha, dtype=torch.float64)
    for same in (exact, exact.expand(len(batch.target))):
        assert_same(value_and_grad(loss_of(batch, form, same), batch.logits), expected)


@given(batch=padded_batches(), eps=smoothings, seen=st.integers(0, 255))
@few
def test_rows_of_alpha_zero_are_hard_whatever_lies_in_the_teachers_row(batch, eps, seen):
    seen = torch.tensor([bool(seen >> i & 1) for i in range(len(batch.target))], dtype=bool)
    teacher = batch.dense("probs")
    teacher[~seen] = 0.0  # what a memory of predictions holds before the first is written
    alpha = 0.7 * seen.double()
    options = {"label_smoothing": eps, "reduction": "none"}
    loss, grad = value_and_grad(
        loss_of(batch, None, alpha, teacher_probs=teacher, **options), batch.logits
    )
    soft = value_and_grad(loss_of(batch, "probs", 0.7, **options), batch.logits)
    hard = value_and_grad(torch_loss(batch, **options), batch.logits)
    assert_same((loss[seen], grad[seen]), [part[seen] for part in soft])
    assert_same((loss[~seen], grad[~seen]), [part[~seen] for part in hard])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@every_form
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_labels_may_be_of_any_integer_type(dtype, form, alpha):
    batch = make(4, 200)._replace(target=torch.tensor([0, 127, 42, 3]))
    narrow = batch._replace(target=batch.target.to(dtype))
    got = value_and_grad(loss_of(narrow, form, alpha), batch.logits)
    assert_same(got, value_and_grad(loss_of(batch, form, alpha), batch.logits))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_an_unsigned_label_is_not_taken_for_a_negative_ignore_index(alpha):
    batch = make(2, 200)._replace(target=torch.tensor([156, 3]))  # -100 as an unsigned byte: 156
    narrow = batch._replace(target=batch.target.to(torch.uint8))
    got = value_and_grad(loss_of(narrow, "probs", alpha), batch.logits)
    assert_same(got, value_and_grad(loss_of(batch, "probs", alpha), batch.logits))


@every_form
def test_strides_change_nothing(form):
    batch = make(6, 7, chunk=15)
    expected = value_and_grad(loss_of(batch, form, 0.5), batch.logits)
    column_major = batch.logits.t().contiguous().t()
    assert not column_major.is_contiguous()
    assert_same(value_and_grad(loss_of(batch, form, 0.5), column_major), expected)
    one_row = batch._replace(logits=batch.logits[:1].expand(6, 7))
    got = loss_of(one_row, form, 0.5)(one_row.logits)
    torch.testing.assert_close(got, loss_of(one_row, form, 0.5)(one_row.logits.contiguous()))


# -- Ignored rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize(
    ("form", "alpha"), [(None, 0.5), ("probs", 0.0), *((form, 0.5) for form in FORMS)]
)
def test_ignored_rows_may_hold_anything(form, alpha, eps, ignore_index, poison):
    ignored = torch.tensor([False, True, False, True, True])
    batch = make(5, 4, chunk=9)
    target = torch.tensor([0, 1, 2, 1, 1]).masked_fill(ignored, ignore_index)
    batch = batch._replace(target=target, ignore_index=ignore_index)
    options = {"label_smoothing": eps, "reduction": "none"}
    expected = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)

    options |= {} if form is None else batch.teacher(form)
    if form == "top_k":
        options["teacher_probs"].probs[ignored] = poison
    elif form is not None:
        options["teacher_logits" if form == "logits" else "teacher_probs"][ignored] = poison
    poisoned = batch.logits.index_fill(0, ignored.nonzero()[:, 0], poison)
    loss, grad = value_and_grad(loss_of(batch, None, alpha, **options), poisoned)

    assert_same((loss, grad), expected)
    assert not loss[ignored].any()
    assert not grad[ignored].any()


@given(batch=padded_batches(), form=forms, alpha=weights, eps=smoothings, reduction=reductions)
@few
def test_a_batch_is_its_valid_rows(batch, form, alpha, eps, reduction):
    valid = batch.valid
    rest = batch.rows(valid)._replace(ignore_index=-100)
    options = {"label_smoothing": eps, "reduction": reduction}
    loss, grad = value_and_grad(
        lambda z: loss_of(batch, form, alpha, **options)(z)[valid if reduction == "none" else ...],
        batch.logits,
    )
    expected = value_and_grad(loss_of(rest, form, alpha, **options), rest.logits)
    assert_same((loss, grad[valid]), expected)
    assert not grad[~valid].any()


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    form=forms,
    alpha=weights,
    eps=smoothings,
)
@few
def test_a_padded_batch_is_the_sum_of_its_sentences(lengths, form, alpha, eps):
    positions, classes, pad = 4, 9, 1
    whole = make(len(lengths) * positions, classes, chunk=2 * classes)
    inside = torch.tensor([t < length for length in lengths for t in range(positions)])
    labels = torch.where(whole.target == pad, pad + 1, whole.target)
    whole = whole._replace(target=labels.where(inside, pad), ignore_index=pad)
    options = {"label_smoothing": eps, "reduction": "sum"}
    loss, grad = value_and_grad(loss_of(whole, form, alpha, **options), whole.logits)

    sentences = []
    for i, length in enumerate(lengths):
        sentence = whole.rows(slice(i * positions, i * positions + length))
        sentences.append(value_and_grad(loss_of(sentence, form, alpha, **options), sentence.logits))
    losses, grads = zip(*sentences, strict=True)
    assert_same((loss, grad[inside]), (torch.stack(losses).sum(), torch.cat(grads)))


@given(
    form=st.none() | forms,
    alpha=weights,
    reduction=reductions,
    rows=st.sampled_from([0, 1, 5]),
    classes=st.sampled_from([1, 2, 7]),
)
@few
def test_where_no_row_counts_the_loss_is_zero_and_so_is_the_gradient(
    form, alpha, reduction, rows, classes
):
    batch = make(rows, classes, chunk=1)
    batch = batch._replace(target=torch.full_like(batch.target, -100))
    loss, grad = value_and_grad(loss_of(batch, form, alpha, reduction=reduction), batch.logits)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(batch.logits))


# -- What changes nothing --------------------------------------------------------------------------


@given(batch=padded_batches(), form=forms, eps=smoothings, data=st.data())
@few
def test_the_order_of_rows_changes_nothing(batch, form, eps, data):
    order = torch.tensor(data.draw(st.permutations(range(len(batch.target)))), dtype=torch.long)
    alpha = torch.linspace(0, 1, len(order), dtype=torch.float64)
    turned = batch.rows(order)
    for reduction in ("mean", "sum"):
        options = {"label_smoothing": eps, "reduction": reduction}
        loss, grad = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
        got = value_and_grad(loss_of(turned, form, alpha[order], **options), turned.logits)
        assert_same(got, (loss, grad[order]))


@given(batch=padded_batches(), form=forms, alpha=weights, eps=smoothings)
@few
def test_a_constant_added_to_a_rows_logits_changes_nothing(batch, form, alpha, eps):
    shift = torch.linspace(-50, 50, len(batch.target), dtype=torch.float64)[:, None]
    shifted = batch._replace(teacher_logits=batch.teacher_logits - shift)
    options = {"label_smoothing": eps, "reduction": "none"}
    got = value_and_grad(loss_of(shifted, form, alpha, **options), batch.logits + shift)
    expected = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
    assert_same(got, expected, atol=1e-11)


@given(batch=padded_batches(), form=forms, alpha=weights, eps=smoothings, data=st.data())
@few
def test_the_numbering_of_classes_changes_nothing(batch, form, alpha, eps, data):
    names = torch.tensor(data.draw(st.permutations(range(batch.classes))), dtype=torch.long)
    old = names.argsort()  # class c is called names[c] now, so column j holds class old[j]
    valid, ignore_index = batch.valid, -100
    turned = batch._replace(
        logits=batch.logits[:, old],
        target=torch.where(valid, names[batch.target.clamp_min(0)], ignore_index),
        teacher_logits=batch.teacher_logits[:, old],
        ignore_index=ignore_index,
    )
    options = {"label_smoothing": eps}
    loss, grad = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
    got = value_and_grad(loss_of(turned, form, alpha, **options), turned.logits)
    assert_same(got, (loss, grad[:, old]))


@given(batch=padded_batches(), form=forms, alpha=weights, eps=smoothings)
@few
def test_the_size_of_chunks_changes_nothing(batch, form, alpha, eps):
    whole = batch._replace(chunk=1 << 30)
    options = {"label_smoothing": eps, "reduction": "none"}
    got = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
    assert_same(got, value_and_grad(loss_of(whole, form, alpha, **options), batch.logits))


# -- Gradients -------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_gradcheck(form, eps):
    batch = make(5, 4, scale=1.0, chunk=9)
    batch = batch._replace(target=torch.tensor([0, 3, -100, 2, 2]))
    loss = loss_of(batch, form, torch.linspace(0, 1, 5), label_smoothing=eps, reduction="none")
    assert torch.autograd.gradcheck(loss, batch.logits.requires_grad_())


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [[1.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0], [0.0] * 5, [-1.0] * 5])
def test_the_gradient_is_linear_in_the_upstream_gradient(upstream, dtype, form):
    batch = make(5, 4, chunk=9)._replace(target=torch.tensor([0, 3, -100, 2, 2]))
    logits = batch.logits.to(dtype).requires_grad_()
    loss = loss_of(batch, form, 0.5, reduction="none")(logits)
    row_weights = torch.tensor(upstream, dtype=loss.dtype)
    (whole,) = torch.autograd.grad(loss, logits, 2 * torch.ones_like(loss), retain_graph=True)
    (got,) = torch.autograd.grad(loss, logits, row_weights)
    assert torch.equal(got, (row_weights[:, None] * whole / 2).to(dtype))


@every_form
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_backward_twice_gives_the_same_gradient_twice(form, factor):
    batch = make(5, 4, chunk=9)
    logits = batch.logits.requires_grad_()
    loss = factor * loss_of(batch, form, 0.5, reduction="sum")(logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert first.abs().sum() > 0
    assert torch.equal(first, second)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, times * first)


@every_form
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_gradient_changed_in_place_never_spoils_the_next_one_silently(form, factor):
    batch = make(5, 4, chunk=9)
    logits = batch.logits.requires_grad_()
    loss = factor * loss_of(batch, form, 0.5, reduction="sum")(logits)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    before = first.clone()
    first.zero_()
    try:
        (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(second, before)


@every_form
@pytest.mark.parametrize("outer", [lambda loss: loss, lambda loss: loss**2], ids=["loss", "square"])
def test_a_second_derivative_is_refused_and_never_silently_left_out(form, outer):
    batch = make(5, 4)
    logits = batch.logits.requires_grad_()
    loss = outer(loss_of(batch, form, 0.5)(logits))
    with pytest.raises(RuntimeError, match="twice|derivative|create_graph"):
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        torch.autograd.grad(loss + grad.pow(2).sum(), logits)


@every_form
def test_no_gradient_reaches_the_teacher(form):
    batch = make(5, 4, chunk=9)
    teacher = batch.teacher(form)
    leaves = [t for t in tree_leaves(teacher) if t is not None and t.is_floating_point()]
    assert len(leaves) == 1
    leaves[0].requires_grad_()
    logits = batch.logits.requires_grad_()
    pskd_cross_entropy(logits, batch.target, alpha=0.5, **teacher).backward()
    assert logits.grad.abs().sum() > 0
    assert leaves[0].grad is None
    frozen = pskd_cross_entropy(logits.detach(), batch.target, alpha=0.5, **teacher)
    assert not frozen.requires_grad


@every_form
def test_inputs_are_left_as_they_were(form):
    batch = make(5, 4, chunk=9)
    batch = batch._replace(target=torch.tensor([0, 3, -100, 2, 2]))
    alpha, teacher = torch.linspace(0, 1, 5), batch.teacher(form)
    inputs = [batch.logits, batch.target, alpha, *filter(torch.is_tensor, tree_leaves(teacher))]
    before = [t.clone() for t in inputs]
    loss = loss_of(batch, None, alpha, label_smoothing=0.1, **teacher)
    value_and_grad(loss, batch.logits)
    assert all(map(torch.equal, inputs, before))


# -- Precision -------------------------------------------------------------------------------------


def naive(batch: Batch, form: str, dtype: torch.dtype, reduction: str):
    """Return the textbook form of the loss with everything in ``dtype``; alpha is 0.6."""
    soft = mix_targets(batch.target, batch.dense(form), 0.6).to(dtype)

    def loss(logits: Tensor) -> Tensor:
        rows = -(soft * logits.log_softmax(1)).sum(1)
        return getattr(rows, reduction)() if reduction != "none" else rows

    return loss


def rounded(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch with logits and teacher as ``dtype`` knows them, still in float64."""
    logits, past = batch.logits.to(dtype).double(), batch.teacher_logits.to(dtype).double()
    return batch._replace(logits=logits, teacher_logits=past)


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
    batch = make(4, 5)
    for reduction in ("none", "mean", "sum"):
        loss = loss_of(batch, form, alpha, reduction=reduction)
        value, grad = value_and_grad(loss, batch.logits.to(dtype))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_autocast_changes_nothing(form, dtype):
    batch = make(16, 33, chunk=70)
    loss = loss_of(batch, form, 0.5, label_smoothing=0.1, reduction="none")

    def under_autocast(logits: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(logits)

    logits = batch.logits.to(dtype)
    assert_same(value_and_grad(under_autocast, logits), value_and_grad(loss, logits))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_loss_scale_beyond_float16_does_not_overflow_the_gradient(form, dtype):
    batch = make(4, 5, scale=1.0)
    loss = loss_of(batch, form, 0.5, reduction="sum")
    _, exact = value_and_grad(lambda z: 32768.0 * loss(z), batch.logits.to(dtype).double())
    assert exact.abs().max() < 65504  # twice 32768 upstream: beyond float16, its products are not
    _, scaled = value_and_grad(lambda z: 32768.0 * loss(z), batch.logits.to(dtype))
    torch.testing.assert_close(scaled.double(), exact, rtol=0.02, atol=65536 * 1e-7)


@every_form
@pytest.mark.parametrize("chunk", [1, 32_000, 1 << 18])
def test_a_large_vocabulary_with_huge_logits_does_not_overflow(form, chunk):
    batch = rounded(make(3, 32_000, scale=1.0, chunk=chunk)._replace(kept=8), torch.float32)
    huge = batch.logits.clamp(-2, 2) * 5e3
    assert huge.abs().max() == 1e4
    expected = value_and_grad(mixture_loss(batch, batch.dense(form), 0.6), huge)
    got = value_and_grad(loss_of(batch, form, 0.6), huge.float())
    assert_same([part.double() for part in got], expected, rtol=1e-5, atol=1e-5)


# -- Memory ----------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records the bytes of every new storage that an operation returns."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's documented way not to import its compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self._known = {}  # keeps the storages alive, so that no address is used twice

    def _learn(self, values) -> list[int]:
        storages = [t.untyped_storage() for t in tree_leaves(values) if torch.is_tensor(t)]
        new = {s.data_ptr(): s for s in storages if s.nbytes() and s.data_ptr() not in self._known}
        self._known |= new
        return [storage.nbytes() for storage in new.values()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._learn((args, kwargs))  # what an operation is given, and may return a view of
        out = func(*args, **kwargs)
        self.bytes += self._learn(out)
        return out


def allocations(loss, logits: Tensor) -> tuple[list[int], list[int], int]:
    """Return the new storages of forward and backward, and the bytes saved in between."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    log = Allocations()
    with log, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(logits)
    made = len(log.bytes)
    with log:
        if value.requires_grad:
            value.backward()
    return log.bytes[:made], log.bytes[made:], sum(saved)


@pytest.fixture(params=["native", "torch"])
def backend(request, monkeypatch) -> str:
    """Each form of the loss for CPUs, with what it allocates in the open."""
    if request.param == "torch":
        monkeypatch.setattr(native, "is_built", lambda: False)
    elif not native.is_built():
        pytest.skip("the compiled form was not built: it needs a C++ compiler at install")
    # A mode that watches allocations is no tracer.
    monkeypatch.setattr(pskd.kernels.gradient, "is_in_torch_dispatch_mode", lambda: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
@every_form
def test_nothing_of_the_logits_size_is_made_but_the_gradient(form, inplace, dtype, backend):
    rows, classes, chunk = 64, 500, 2000
    batch = make(rows, classes, chunk=chunk)._replace(kept=8)
    leaf = batch.logits.to(dtype).requires_grad_()
    logits = leaf * 1
    matrix = logits.numel() * logits.element_size()
    alpha = torch.full((rows,), 0.5)
    loss = loss_of(batch, form, alpha, label_smoothing=0.1, inplace=inplace)
    with mock.patch.object(pskd.kernels.gradient, "_CHUNK_ELEMENTS", chunk):
        forward, backward, saved = allocations(lambda z: 3 * loss(z), logits)
    assert [size for size in forward if size > 4 * chunk] == [matrix] * (not inplace)
    # The product with the upstream gradient is made over it; the other is the leaf's, of `* 1`.
    assert [size for size in backward if size > 4 * chunk] == [matrix]
    assert saved <= matrix + 8 * 8 * rows


@every_form
def test_without_a_gradient_nothing_of_the_logits_size_is_made(form, backend):
    batch = make(64, 500, chunk=2000)._replace(kept=8)
    forward, _, saved = allocations(loss_of(batch, form, 0.5), batch.logits.float())
    assert max(forward) <= 4 * 2000
    assert saved == 0


def test_the_memory_check_sees_what_the_mixture_costs():
    batch = make(64, 500)
    logits = batch.logits.float().requires_grad_()

    def mixture(z: Tensor) -> Tensor:
        return F.cross_entropy(z, mix_targets(batch.target, batch.dense("probs").float(), 0.5))

    forward, backward, saved = allocations(mixture, logits)
    matrix = logits.numel() * 4
    assert sum(size >= matrix for size in forward) > 2
    assert sum(size >= matrix for size in backward) >= 1
    assert saved >= 2 * matrix


# -- Statistics ------------------------------------------------------------------------------------


@every_form
@given(
    batch=padded_batches(), alpha=weights, eps=smoothings, reduction=reductions, row=st.booleans()
)
@few
def test_stats_are_the_hard_nll_and_the_teachers_probability_of_the_label(
    form, batch, alpha, eps, reduction, row
):
    alpha = torch.full(batch.target.shape, alpha, dtype=torch.float64) if row else alpha
    options = {"label_smoothing": eps, "reduction": reduction}
    logits = batch.logits.requires_grad_()
    loss, stats = loss_of(batch, form, alpha, return_stats=True, **options)(logits)

    nll = torch_loss(batch, reduction="none")(batch.logits).detach()
    at_label = batch.dense(form).gather(1, batch.target.clamp_min(0)[:, None])[:, 0]
    assert_same(stats, (nll, at_label.masked_fill(~batch.valid, 1.0)))
    assert not stats.nll.requires_grad
    assert not stats.teacher_probs_at_label.requires_grad

    silent = value_and_grad(loss_of(batch, form, alpha, **options), batch.logits)
    heard = value_and_grad(
        lambda z: loss_of(batch, form, alpha, return_stats=True, **options)(z)[0], batch.logits
    )
    assert_same(heard, silent)
    assert_same((loss.detach(),), silent[:1])


def test_stats_of_top_k_tell_listed_labels_from_others():
    sparse = TopK(torch.tensor([[3, 1], [3, 1], [1, 3]]), torch.tensor([[0.6, 0.2]] * 3))
    target = torch.tensor([1, 0, 1])
    _, stats = pskd_cross_entropy(torch.zeros(3, 6), target, sparse, 0.5, return_stats=True)
    torch.testing.assert_close(stats.teacher_probs_at_label, torch.tensor([0.2, 0.05, 0.6]))
    torch.testing.assert_close(stats.nll, torch.full((3,), math.log(6)))


@every_form
def test_stats_of_ignored_rows_are_zero_and_one_whatever_they_hold(form):
    batch = make(3, 4)._replace(target=torch.tensor([0, -100, 2]))
    batch.logits[1] = math.nan
    batch.teacher_logits[1] = math.nan
    _, stats = loss_of(batch, form, 0.5, return_stats=True)(batch.logits)
    assert stats.nll[1] == 0
    assert stats.teacher_probs_at_label[1] == 1
    assert torch.stack(stats).isfinite().all()


def test_stats_without_a_teacher_are_refused():
    with pytest.raises(ValueError, match="return_stats: expected a teacher, got none"):
        pskd_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), None, 0.5, return_stats=True)


# -- Gradient rescaling ----------------------------------------------------------------------------


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


# -- Errors ----------------------------------------------------------------------------------------

LOGITS, THIRDS = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
INDICES = torch.tensor([[0, 1], [1, 2]])
GOOD = {
    "logits": LOGITS,
    "target": torch.tensor([0, 2]),
    "teacher_probs": THIRDS,
    "teacher_logits": None,
    "alpha": 0.5,
}

# What is changed of the good arguments -> what the error says.
REFUSED = [
    ({"alpha": -0.1}, "alpha: expected a number in [0, 1], got -0.1"),
    ({"alpha": 1.0001}, "alpha: expected a number in [0, 1], got 1.0001"),
    ({"alpha": math.nan}, "alpha: expected a number in [0, 1], got nan"),
    ({"alpha": math.nan, "teacher_probs": None}, "alpha: expected a number in [0, 1], got nan"),
    ({"alpha": None}, "alpha: expected a number in [0, 1], got None"),
    ({"alpha": torch.tensor(math.nan)}, "alpha: expected a number in [0, 1], got nan"),
    ({"alpha": torch.zeros(1)}, "alpha: expected a number or shape (2,), got (1,)"),
    ({"alpha": torch.zeros(2, 1)}, "alpha: expected a number or shape (2,), got (2, 1)"),
    ({"alpha": torch.tensor([0.5, math.nan])}, "alpha: expected every row in [0, 1], got"),
    ({"alpha": torch.tensor([0.5, 1.5])}, "alpha: expected every row in [0, 1], got"),
    ({"alpha": torch.tensor([-0.5, 0.5])}, "alpha: expected every row in [0, 1], got"),
    ({"label_smoothing": -0.1}, "label_smoothing: expected a number in [0, 1], got -0.1"),
    ({"label_smoothing": 1.1}, "label_smoothing: expected a number in [0, 1], got 1.1"),
    ({"label_smoothing": math.nan}, "label_smoothing: expected a number in [0, 1], got nan"),
    ({"reduction": "avg"}, "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
    ({"reduction": None}, "reduction: expected 'none', 'mean' or 'sum', got None"),
    ({"teacher_logits": LOGITS}, "expected teacher_probs or teacher_logits, got both"),
    ({"logits": (LOGITS,)}, "logits: expected a tensor, got tuple"),
    ({"target": [0, 2]}, "target: expected a tensor, got list"),
    (
        {"logits": torch.zeros(3)},
        "logits: expected a floating-point tensor of shape (N, C), got torch.float32 of shape (3,)",
    ),
    ({"logits": LOGITS[None]}, "tensor of shape (N, C), got torch.float32 of shape (1, 2, 3)"),
    (
        {"logits": LOGITS.long()},
        "expected a floating-point tensor of shape (N, C), got torch.int64",
    ),
    ({"target": torch.tensor([0, 3])}, "target: expected labels in [0, 2], got [0, 3]"),
    ({"target": torch.tensor([-1, 2])}, "target: expected labels in [0, 2], got [-1, 2]"),
    ({"target": torch.tensor([156, 2]).byte()}, "expected labels in [0, 2], got [2, 156]"),
    ({"ignore_index": 0, "target": torch.tensor([0, -100])}, "labels in [0, 2], got [-100, -100]"),
    ({"target": torch.zeros(2)}, "expected integer labels of shape (N,), got torch.float32"),
    ({"target": THIRDS}, "labels of shape (N,), got torch.float32 of shape (2, 3)"),
    ({"target": torch.ones(2) > 0}, "expected integer labels of shape (N,), got torch.bool"),
    ({"target": INDICES}, "integer labels of shape (N,), got torch.int64 of shape (2, 2)"),
    ({"target": torch.tensor(1)}, "integer labels of shape (N,), got torch.int64 of shape ()"),
    ({"target": torch.tensor([0, 1, 2])}, "target: expected 2 labels, got 3"),
    ({"teacher_probs": THIRDS[:1]}, "teacher: expected shape (2, 3) as the logits, got (1, 3)"),
    ({"teacher_probs": THIRDS[:, :2]}, "teacher: expected shape (2, 3) as the logits, got (2, 2)"),
    ({"teacher_probs": THIRDS[0]}, "teacher: expected shape (2, 3) as the logits, got (3,)"),
    ({"teacher_probs": LOGITS.long()}, "expected a floating-point tensor, got torch.int64"),
    (
        {"teacher_probs": None, "teacher_logits": LOGITS.t()},
        "teacher: expected shape (2, 3) as the logits, got (3, 2)",
    ),
    (
        {"teacher_probs": None, "teacher_logits": TopK(INDICES, THIRDS[:, :2])},
        "teacher_logits: expected a tensor, got TopK",
    ),
    (
        {"teacher_probs": TopK(torch.zeros(2, 4).long(), torch.zeros(2, 4))},
        "teacher_probs: expected 1 to 3 integer classes a row, got 4",
    ),
    (
        {"teacher_probs": TopK(INDICES[:, :0], THIRDS[:, :0])},
        "teacher_probs: expected 1 to 3 integer classes a row, got 0",
    ),
    (
        {"teacher_probs": TopK(INDICES.float(), THIRDS[:, :2])},
        "teacher_probs: expected 1 to 3 integer classes a row, got 2 of torch.float32",
    ),
    (
        {"teacher_probs": TopK(INDICES, INDICES)},
        "teacher: expected a floating-point tensor, got torch.int64",
    ),
    (
        {"teacher_probs": TopK(INDICES, THIRDS)},
        "teacher_probs: expected TopK of two tensors of shape (2, k), got (2, 2) and (2, 3)",
    ),
    (
        {"teacher_probs": TopK(INDICES[:1], THIRDS[:1, :2])},
        "teacher_probs: expected TopK of two tensors of shape (2, k), got (1, 2) and (1, 2)",
    ),
    (
        {"teacher_probs": TopK(INDICES[0], THIRDS[0, :2])},
        "teacher_probs: expected TopK of two tensors of shape (2, k), got (2,) and (2,)",
    ),
]


def test_the_arguments_that_the_refused_ones_change_are_good():
    torch.testing.assert_close(pskd_cross_entropy(**GOOD), torch.tensor(math.log(3)))


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_bad_input_is_refused_with_what_was_expected_and_got(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pskd_cross_entropy(**{**GOOD, **changed})


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_label_out_of_range_is_no_error_where_it_is_ignored(alpha):
    changed = {**GOOD, "target": torch.tensor([7, 2]), "alpha": alpha, "ignore_index": 7}
    torch.testing.assert_close(pskd_cross_entropy(**changed), torch.tensor(math.log(3)))
