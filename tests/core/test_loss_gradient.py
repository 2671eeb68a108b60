"""The gradient of the loss, as autograd may ask for it."""

from __future__ import annotations

import pytest
import torch
from loss_cases import every_form, loss_of, make, value_and_grad
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("backend")


@every_form
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_gradcheck(form, eps):
    batch = make(5, 4, scale=1.0, chunk=9)
    target = torch.tensor([0, 3, -100, 2, 2])
    batch = batch._replace(target=target, dtype=torch.float64)  # finite differences
    loss = loss_of(batch, form, torch.linspace(0, 1, 5), label_smoothing=eps, reduction="none")
    assert torch.autograd.gradcheck(loss, batch.logits.requires_grad_())


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [[1.0] * 5, [1.0, 0.0, 1.0, 1.0, 1.0], [0.0] * 5, [-1.0] * 5])
def test_the_gradient_is_linear_in_the_upstream_gradient(upstream, dtype, form):
    batch = make(5, 4, chunk=9)._replace(target=torch.tensor([0, 3, -100, 2, 2]))
    batch = batch._replace(dtype=max(dtype, torch.float32, key=lambda kind: kind.itemsize))
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
    loss = loss_of(batch, None, 0.5, **teacher)
    loss(logits).backward()
    assert logits.grad.abs().sum() > 0
    assert leaves[0].grad is None
    assert not loss(logits.detach()).requires_grad


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
