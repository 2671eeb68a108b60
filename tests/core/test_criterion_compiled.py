"""A criterion in one graph of ``torch.compile`` does what it does without."""

from __future__ import annotations

import copy

import pytest
import torch
from criterion_runs import FORMS, TARGET, C, M, Run, loss_by, memory_of, train

import pskd

OPTIONS = {
    "without a teacher, smoothed": {"alpha_final": 0.0, "label_smoothing": 0.1},
    "average of top_k in files": {"top_k": 2, "momentum": 0.5, "path": "memory"},
    "weighted": {"weight": torch.linspace(0.5, 1.5, C)},
}


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()


def compiled(criterion, backend: str):
    """Return how a loop calls a criterion, in one graph."""
    call = torch.compile(criterion, fullgraph=True, backend=backend)
    if isinstance(criterion, pskd.MemoryCriterion):
        return lambda model, rows, inputs, target: call(model(inputs), target, rows)
    return lambda model, rows, inputs, target: call(model(inputs), target, inputs, rows=rows)


def assert_same(form, backend: str, epochs: int, **options) -> None:
    """Compare losses, gradients, means, examples and a validation of two trainings."""
    results = []
    for call in (loss_by, lambda criterion: compiled(criterion, backend)):
        run, examples = Run(), pskd.ExampleStats(M)
        criterion = form(run.model, num_epochs=epochs, examples=examples, **copy.copy(options))
        loss_of, told = call(criterion), []
        for epoch in range(1, epochs + 1):
            criterion.begin_epoch(epoch)
            run.epoch(epoch, loss_of)
            told += [torch.tensor(mean) for mean in criterion.take_means().values()]
        with torch.no_grad():
            told.append(loss_of(run.model, torch.arange(M), torch.ones(M, 3), TARGET))
        results.append([*run.losses, *run.gradients, *told, *examples.compute()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_compiled_memory_trains_as_it_does_without(name, tmp_path):
    options = dict(OPTIONS[name])
    if "path" in options:
        options = [options | {"path": tmp_path / str(number)} for number in range(2)]
        forms = iter(options)
        assert_same(lambda model, **more: memory_of(model, **more, **next(forms)), "aot_eager", 2)
    else:
        assert_same(memory_of, "aot_eager", 2, **options)


@FORMS
def test_a_compiled_criterion_is_not_compiled_anew_each_epoch(form):
    """In one graph torch refuses the ninth time. It does what it does without, too."""
    assert_same(form, "aot_eager", 10)


def test_a_compiled_step_with_its_model_fills_the_memory():
    run = Run()
    criterion = memory_of(run.model)
    step = torch.compile(loss_by(criterion), fullgraph=True, backend="aot_eager")
    for epoch in (1, 2):
        criterion.begin_epoch(epoch)
        run.epoch(epoch, step)
    assert criterion.memory.read(torch.arange(M))[1].all()


def test_a_compiled_copy_has_a_memory_of_its_own():
    criterion = memory_of(None)
    criterion.begin_epoch(1)
    train(Run(), criterion, range(2, 3))
    other = copy.deepcopy(criterion)
    made = torch.ones(M, C, requires_grad=True)
    torch.compile(other, fullgraph=True, backend="eager")(made, TARGET, torch.arange(M))
    criterion.begin_epoch(3), other.begin_epoch(3)
    one, uniform = (c.memory.read(torch.arange(M))[0] for c in (criterion, other))
    assert not torch.equal(one, uniform)
    torch.testing.assert_close(uniform, torch.full((M, C), 1 / C), rtol=1e-3, atol=0)
