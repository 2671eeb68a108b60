"""Bad input to the criterions is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from criterion_runs import (
    EPOCHS,
    FORMS,
    INPUTS,
    TARGET,
    C,
    M,
    logits,
    loss_by,
    memory_of,
    net,
    snapshot_of,
)
from torch import nn

import pskd
from pskd.criterion import make_criterion


@FORMS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs: expected 1 or more, got 0"),
        ({"alpha_final": 1.5}, r"alpha_final: expected a number in \[0, 1\], got 1.5"),
        ({"alpha_final": float("nan")}, "alpha_final: expected a number"),
        (
            {"alpha_schedule": "square"},
            "alpha_schedule: expected one of linear, constant, cosine, got 'squ",
        ),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(form, options, message):
    with pytest.raises(ValueError, match=message):
        form(net(), **options)


@FORMS
def test_an_epoch_is_an_integer_of_any_library(form):
    criterion = form(net())
    criterion.begin_epoch(np.int64(1))
    assert type(criterion.state_dict()["epoch"]) is int
    with pytest.raises(ValueError, match="epoch: expected an integer, got 2.0"):
        criterion.begin_epoch(2.0)


@pytest.mark.parametrize("alpha_final", [0.0, 0.8])
def test_examples_of_other_data_are_refused(alpha_final):
    with pytest.raises(ValueError, match="examples: expected 22 samples, got 23"):
        memory_of(None, alpha_final=alpha_final, examples=pskd.ExampleStats(M + 1))


@FORMS
def test_epochs_come_one_after_the_other(form):
    criterion = form(net())
    with pytest.raises(ValueError, match="epoch: expected one of 1 to 4, got 0"):
        criterion.begin_epoch(0)
    with pytest.raises(ValueError, match="epoch: expected 1 after the last, got 2"):
        criterion.begin_epoch(2)
    for epoch in range(1, EPOCHS + 1):
        criterion.begin_epoch(epoch)
        with pytest.raises(ValueError, match="epoch: expected"):
            criterion.begin_epoch(epoch)
    with pytest.raises(ValueError, match="epoch: expected one of 1 to 4, got 5"):
        criterion.begin_epoch(5)
    assert criterion.epoch == EPOCHS


WRONG = [None, "1", [1], 1.5, -1, 10**400, torch.ones(3)]
INSIDE = {"alpha_final": "options", "sums": "examples", "model": "teacher"}


@FORMS
@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("key", ["epoch", "options", "examples", "memory", "teacher", *INSIDE])
def test_a_state_of_other_types_is_refused(form, key, wrong):
    criterion = form(net(), examples=pskd.ExampleStats(M))
    criterion.begin_epoch(1)
    state = criterion.state_dict(inside_epoch=True)
    outer = INSIDE.get(key, key)
    if outer not in state or (key == "model" and wrong is None):
        return  # the other form's, or no teacher yet
    state[outer] = wrong if outer == key else state[outer] | {key: wrong}
    with pytest.raises(ValueError, match="expected"):
        criterion.load_state_dict(state)
    assert (criterion.epoch, criterion.alpha) == (1, 0.0)


@FORMS
def test_a_batch_before_the_first_epoch_is_refused(form):
    model = net()
    with pytest.raises(RuntimeError, match=r"expected begin_epoch\(1\) before the first batch"):
        loss_by(form(model))(model, torch.arange(4), INPUTS[:4], TARGET[:4])


def test_a_snapshot_that_is_given_no_inputs_says_so_in_the_first_epoch():
    model = net()
    criterion = snapshot_of(model)
    criterion.begin_epoch(1)
    with pytest.raises(ValueError, match="inputs: expected what the model was called with, got no"):
        criterion(model(INPUTS), TARGET)
    criterion(model(INPUTS), TARGET, input=INPUTS)
    plain = snapshot_of(model, alpha_final=0.0)
    plain.begin_epoch(1)
    plain(model(INPUTS), TARGET)  # without a teacher nobody asks for them


def test_a_snapshot_of_a_model_that_cannot_be_copied_is_refused_when_it_is_made():
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="model: .*got Sequential with the attribute 'lock': .*"):
        snapshot_of(model)
    assert snapshot_of(model, alpha_final=0.0).alpha_final == 0.0  # which keeps no teacher


class Returns(nn.Module):
    """Returns something of its logits, in eval mode something else."""

    def __init__(self, made, in_eval=None) -> None:
        super().__init__()
        self.net, self.made, self.in_eval = net(), made, in_eval or made

    def forward(self, inputs):
        return (self.made if self.training else self.in_eval)(self.net(inputs))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Returns(lambda z: (z, z)),
            "model: expected .* in eval mode, got tuple; logits_of",
        ),
        (lambda: Returns(lambda z: {"scores": z}), "eval mode, got dict; logits_of= takes"),
        (lambda: Returns(lambda z: z, lambda z: z[0]), r"got a tensor of shape \(5,\)"),
        (lambda: Returns(lambda z: z, lambda z: z[:, :2]), r"expected shape \(6, 5\).*\(6, 2\)"),
    ],
)
def test_a_model_whose_copy_gives_no_logits_is_refused_at_the_first_batch(model, message):
    model = model()
    criterion = snapshot_of(model)
    criterion.begin_epoch(1)
    output = model(INPUTS[:6])
    made = output if isinstance(output, torch.Tensor) else logits(6)
    for _ in range(2):  # also if somebody goes on
        with pytest.raises(ValueError, match=message):
            criterion(made, TARGET[:6], INPUTS[:6])


@pytest.mark.parametrize("alpha_final", [0.0, 0.8])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"rows: expected the row number of each .* pskd.WithRows\(dataset\) gives it"),
        (torch.arange(4.0), r"rows: expected integers of shape \(4,\), got torch.float32"),
        (torch.arange(3), r"rows: expected integers of shape \(4,\), got torch.int64 of \(3,\)"),
        (torch.tensor([0, 1, 1, 2]), "rows: expected each sample once in a batch, got 1"),
        (torch.tensor([0, 1, 2, M]), r"rows: expected numbers in \[0, 21\], got \[0, 22\]"),
        (torch.tensor([0, 1, 2, -1]), r"rows: expected numbers in \[0, 21\], got \[-1, 2\]"),
    ],
)
def test_rows_that_are_none_of_the_data_sets_are_refused(alpha_final, rows, message):
    """In the first epoch, in which the memory is not read yet; nothing is kept of the batch."""
    criterion = memory_of(None, alpha_final=alpha_final, examples=(seen := pskd.ExampleStats(M)))
    criterion.begin_epoch(1)
    with pytest.raises(ValueError, match=message):
        criterion(logits(), TARGET[:4], rows)
    assert not seen.state_dict()["sums"].any()
    if "once in a batch" not in message:  # of one part of a mixed image it may be
        with pytest.raises(ValueError, match=message):
            criterion.loss(logits(), TARGET[:4], rows)


@FORMS
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 2, C]), r"target: expected labels in \[0, 4\], got \[0, 5\]"),
        (torch.rand(4), r"target: expected integer labels of shape \(N,\), got torch.float32"),
    ],
)
def test_labels_that_are_none_are_refused(form, target, message):
    model = net()
    criterion = form(model)
    for epoch in (1, 2):
        criterion.begin_epoch(epoch)
        with pytest.raises(ValueError, match=message):
            loss_by(criterion)(model, torch.arange(4), INPUTS[:4], target)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        criterion(logits(), target)


def test_a_framework_is_given_the_criterion_of_the_teacher_that_it_names():
    data, model = pskd.WithRows([(1.0, 0)] * M), net()
    memory = make_criterion(model, data, C, num_epochs=EPOCHS, alpha_final=0.5)
    assert isinstance(memory, pskd.MemoryCriterion)
    assert (memory.num_rows, memory.memory.num_classes, memory.alpha_final) == (M, C, 0.5)
    snapshot = make_criterion(model, data, C, teacher="snapshot", num_epochs=EPOCHS)
    assert isinstance(snapshot, pskd.SnapshotCriterion)
    with pytest.raises(ValueError, match="teacher: expected 'memory' or .*, got 'oracle'"):
        make_criterion(model, data, C, teacher="oracle", num_epochs=EPOCHS)
    with pytest.raises(ValueError, match=r"expected pskd.WithRows\(dataset\), got list"):
        make_criterion(model, [(1.0, 0)], C, num_epochs=EPOCHS)


@FORMS
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": [[0.0] * C] * 4}, "logits: expected a tensor, got list"),
        ({"target": [0, 1, 2, 3]}, "target: expected a tensor, got list"),
        ({"target": TARGET[:4].numpy()}, "target: expected a tensor, got ndarray"),
        ({"target": TARGET[:3]}, "target: expected 4 labels, got 3"),
        (
            {"target": TARGET[:4].float()},
            r"expected integer labels of shape \(N,\), got torch.f",
        ),
        ({"target": torch.ones(4, C + 1)}, r"target: expected probabilities of shape \(4, 5\) as"),
        ({"target": TARGET[:4] + C}, r"target: expected labels in \[0, 4\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_in_every_epoch(form, epoch, grad, changed, message):
    model = net()
    criterion, rows = form(model), torch.arange(4)
    for number in range(1, epoch + 1):
        criterion.begin_epoch(number)
    batch = {"logits": model(INPUTS[:4]), "target": TARGET[:4]} | changed
    seen = rows if isinstance(criterion, pskd.MemoryCriterion) else INPUTS[:4]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        criterion(batch["logits"], batch["target"], seen)


@FORMS
@pytest.mark.parametrize("epoch", [1, 2])
def test_class_weights_that_do_not_fit_are_refused(form, epoch):
    with pytest.raises(ValueError, match="weight: expected labels without smoothing, got label_"):
        form(net(), weight=torch.ones(C), label_smoothing=0.1)
    model = net()
    criterion = form(model, weight=torch.ones(C + 1))
    for number in range(1, epoch + 1):
        criterion.begin_epoch(number)
    with pytest.raises(ValueError, match=r"weight: expected a floating-point tensor of shape"):
        loss_by(criterion)(model, torch.arange(4), INPUTS[:4], TARGET[:4])
