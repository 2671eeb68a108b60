"""The loss by what must hold for any batch, and what it tells of each row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import (
    FORMS,
    assert_same,
    batches,
    every_form,
    few,
    forms,
    loss_of,
    make,
    mixture_loss,
    padded_batches,
    reductions,
    smoothings,
    torch_loss,
    value_and_grad,
    weights,
)

from pskd import TopK, mix_targets, pskd_cross_entropy

pytestmark = pytest.mark.usefixtures("backend")

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
    logits = batch.logits.to(batch.dtype)
    for strided in (logits.t().contiguous().t(), torch.cat([logits, logits], dim=1)[:, :7]):
        assert not strided.is_contiguous()
        leaf = strided.detach().requires_grad_()
        loss = loss_of(batch, form, 0.5)(leaf)
        assert_same((loss, *torch.autograd.grad(2 * loss, leaf)), expected)
    one_row = batch._replace(logits=batch.logits[:1].expand(6, 7))
    got = loss_of(one_row, form, 0.5)(one_row.logits)
    torch.testing.assert_close(got, loss_of(one_row, form, 0.5)(one_row.logits.contiguous()))


# -- Ignored rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize(
    ("form", "alpha"), [(None, 0.5), ("probs", 0.0), *((form, 0.5) for form in FORMS)]
)
def test_ignored_rows_may_hold_anything(form, alpha, ignore_index, poison):
    ignored = torch.tensor([False, True, False, True, True])
    batch = make(5, 4, chunk=9)
    target = torch.tensor([0, 1, 2, 1, 1]).masked_fill(ignored, ignore_index)
    batch = batch._replace(target=target, ignore_index=ignore_index)
    options = {"label_smoothing": 0.1, "reduction": "none"}
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
    assert_same(got, expected, times=10)


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


# -- Targets that are probabilities, class weights -------------------------------------------------


@given(batch=batches(min_rows=1), alpha=weights, form=forms, eps=smoothings, reduction=reductions)
@few
def test_probabilities_as_targets_are_the_mixture_with_them(batch, alpha, form, eps, reduction):
    target = (batch.logits.flip(0) / 2).softmax(1)
    mixed = (1 - alpha) * ((1 - eps) * target + eps / batch.classes) + alpha * batch.dense(form)
    loss = loss_of(batch, form, alpha, target=target, label_smoothing=eps, reduction=reduction)
    expected = value_and_grad(
        lambda z: F.cross_entropy(z, mixed, reduction=reduction), batch.logits
    )
    assert_same(value_and_grad(loss, batch.logits), expected)


@given(batch=batches(), eps=smoothings, reduction=reductions)
@few
def test_probabilities_without_a_teacher_are_torchs(batch, eps, reduction):
    target = batch.logits.flip(0).softmax(1)
    options = {"label_smoothing": eps, "reduction": reduction}
    got = value_and_grad(loss_of(batch, None, 0.7, target=target, **options), batch.logits)
    if len(target):
        assert_same(
            got, value_and_grad(lambda z: F.cross_entropy(z, target, **options), batch.logits)
        )
    else:
        assert got[0].sum() == 0 and got[1].shape == batch.logits.shape


@given(batch=batches(min_rows=1), alpha=weights, form=forms)
@few
def test_statistics_of_one_hot_probabilities_are_those_of_the_labels(batch, alpha, form):
    onehot = F.one_hot(batch.target, batch.classes).double()
    options = {"form": form, "alpha": alpha, "return_stats": True}
    loss, stats = loss_of(batch, target=onehot, **options)(batch.logits)
    expected_loss, expected = loss_of(batch, **options)(batch.logits)
    assert_same((loss, stats.nll), (expected_loss, expected.nll))
    if alpha:
        assert_same(stats[1:], expected[1:])


def test_probabilities_receive_no_gradient_and_may_be_written_over():
    batch = make(4, 5)
    target = batch.logits.flip(0).softmax(1).requires_grad_()
    leaf = batch.logits.clone().requires_grad_()
    options = {"target": target, "ignore_index": 0}
    loss, stats = loss_of(batch, "probs", 0.5, return_stats=True, inplace=True, **options)(leaf * 1)
    loss.backward()
    assert target.grad is None and not stats.nll.requires_grad
    plain = batch.logits.clone().requires_grad_()
    loss_of(batch, "probs", 0.5, **options)(plain).backward()
    assert_same((leaf.grad,), (plain.grad,))


@given(batch=padded_batches(min_rows=1), reduction=reductions)
@few
def test_class_weights_are_torchs(batch, reduction):
    weight = torch.linspace(0.5, 2.0, batch.classes, dtype=torch.float64)
    got = value_and_grad(
        loss_of(batch, None, 0.0, weight=weight, reduction=reduction), batch.logits
    )
    if not batch.valid.any() and reduction == "mean":
        assert got[0] == 0 and not got[1].any()
        return
    options = {"ignore_index": batch.ignore_index, "reduction": reduction}
    expected = lambda z: F.cross_entropy(z, batch.target, weight, **options)  # noqa: E731
    assert_same(got, value_and_grad(expected, batch.logits))


@given(batch=padded_batches(min_rows=1), alpha=weights, form=forms)
@few
def test_class_weights_count_rows_by_their_label(batch, alpha, form):
    weight = torch.linspace(0.5, 2.0, batch.classes, dtype=torch.float64)
    by_row = weight[batch.target.clamp_min(0)] * batch.valid
    each = loss_of(batch, form, alpha, reduction="none")

    def by_hand(logits):
        return (each(logits) * by_row).sum() / by_row.sum().clamp_min(1e-30)

    got = value_and_grad(loss_of(batch, form, alpha, weight=weight), batch.logits)
    assert_same(got, value_and_grad(by_hand, batch.logits))
