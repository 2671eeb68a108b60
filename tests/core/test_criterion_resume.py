"""A resumed run is the straight one, and the state of another is refused."""

from __future__ import annotations

import copy
import io
import pickle
import shutil

import pytest
import torch
from criterion_runs import (
    BATCH,
    EPOCHS,
    FORMS,
    INPUTS,
    TARGET,
    C,
    M,
    Run,
    equal,
    logits,
    loss_by,
    memory_of,
    net,
    same,
    snapshot_of,
    taught,
    train,
)

import pskd


def ema_of(model, **options):
    return snapshot_of(model, teacher="ema", **options)


@pytest.mark.parametrize("form", [memory_of, snapshot_of, ema_of])
@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("in_file", [False, True], ids=["ram", "file"])
def test_a_resumed_run_is_the_straight_one(form, stop, in_file, tmp_path):
    options = {"alpha_final": 0.9, "examples": pskd.ExampleStats(M)}
    if form is memory_of and in_file:
        options["path"] = tmp_path / "memory"
    straight = Run()
    train(straight, form(straight.model, alpha_final=0.9, examples=(seen := pskd.ExampleStats(M))))

    stopped = Run()
    criterion = train(stopped, first := form(stopped.model, **options), range(1, stop + 1))
    torch.save((criterion.state(), first.state_dict()), tmp_path / "checkpoint")

    resumed = Run()
    run_state, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load(run_state)
    again = form(resumed.model, **(options | {"examples": pskd.ExampleStats(M)}))
    again.load_state_dict(state)
    assert (again.epoch, again.alpha) == (first.epoch, first.alpha)
    train(resumed, again, range(stop + 1, EPOCHS + 1))
    resumed.losses, resumed.gradients = (
        stopped.losses + resumed.losses,
        stopped.gradients + resumed.gradients,
    )
    assert same(straight, resumed)
    assert torch.equal(again.examples.state_dict()["sums"], seen.state_dict()["sums"])


@FORMS
def test_a_run_resumed_inside_an_epoch_is_the_straight_one(form, tmp_path):
    run = Run()
    train(run, criterion := form(run.model, alpha_final=0.9), [1, 2])
    criterion.begin_epoch(3)
    batches = torch.randperm(M, generator=torch.Generator().manual_seed(0)).split(BATCH)

    def step(run, criterion, rows):
        torch.manual_seed(int(rows[0]))
        run.step(loss_by(criterion)(run.model, rows, INPUTS[rows], TARGET[rows]))

    step(run, criterion, batches[0])
    torch.save((run.state(), criterion.state_dict(inside_epoch=True)), tmp_path / "checkpoint")
    resumed = Run()
    run_state, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load(run_state)
    again = form(resumed.model, alpha_final=0.9)
    again.load_state_dict(state)
    taken = len(run.losses)
    for one, of in ((run, criterion), (resumed, again)):
        for rows in batches[1:]:
            step(one, of, rows)
        train(one, of, [4])
    run.losses, run.gradients = run.losses[taken:], run.gradients[taken:]
    assert same(run, resumed)


def test_a_snapshot_that_was_not_saved_is_missed():
    run = Run()
    train(run, criterion := snapshot_of(run.model), [1, 2])
    again = snapshot_of(run.model)
    again.load_state_dict(criterion.state_dict())
    with pytest.raises(RuntimeError, match=r"expected begin_epoch\(3\).*inside_epoch=True"):
        again(run.model(INPUTS), TARGET, INPUTS)


@FORMS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_final": 0.5}, "alpha_final: expected 0.9, with which the checkpoint was trained"),
        ({"alpha_final": 0.0}, "alpha_final: expected 0.9, .* got 0.0"),
        ({"num_epochs": 9}, "num_epochs: expected 4, .* got 9"),
        ({"alpha_schedule": "cosine"}, "alpha_schedule: expected 'linear', .* got 'cosine'"),
        ({"label_smoothing": 0.1}, "label_smoothing: expected 0.0, .* got 0.1"),
    ],
)
def test_the_state_of_another_training_is_refused(form, changes, message):
    run = Run()
    train(run, criterion := form(run.model, alpha_final=0.9), [1, 2])
    refused(form(run.model, **({"alpha_final": 0.9} | changes)), criterion.state_dict(), message)


@pytest.mark.parametrize(
    ("rows", "classes", "options", "message"),
    [
        (M + 1, C, {}, "memory: expected rows 23, got 22"),
        (M, C + 1, {}, "memory: expected classes 6, got 5"),
        (M, C, {"top_k": 2}, "memory: expected top_k 2, got None"),
        (M, C, {"fingerprint": "other"}, "memory: expected fingerprint 'other', got ''"),
    ],
)
def test_the_state_of_other_data_is_refused(rows, classes, options, message):
    state = taught().state_dict()
    other = pskd.MemoryCriterion(rows, classes, num_epochs=EPOCHS, **options)
    refused(other, state, message)


def test_the_examples_of_other_data_are_refused_before_the_teacher_is_loaded():
    run = Run()
    train(run, criterion := snapshot_of(run.model, examples=pskd.ExampleStats(M)), [1, 2])
    state = criterion.state_dict(inside_epoch=True)
    other = snapshot_of(run.model, examples=pskd.ExampleStats(M + 1))
    refused(other, state, "examples: expected 23 samples, got 22")
    assert not other.teacher.available


@pytest.mark.parametrize("state", [None, {}, {"epoch": 1}, {"memory": None}])
def test_what_is_no_state_is_refused(state):
    refused(taught(), state, "expected a criterion's state with 'epoch' and 'options', got")


@pytest.mark.parametrize("epoch", [-1, EPOCHS + 1])
@FORMS
def test_the_state_of_an_epoch_that_is_none_is_refused(form, epoch):
    criterion = form(Run().model)
    state = criterion.state_dict() | {"epoch": epoch}
    refused(criterion, state, f"epoch: expected a state of epoch 0 to 4, got {epoch}")


def test_the_state_of_the_other_form_is_refused():
    run = Run()
    snapshot, memory = snapshot_of(run.model), taught()
    state = memory.state_dict()
    refused(snapshot, state, "criterion: expected 'MemoryCriterion', .* got 'SnapshotCriterion'")
    refused(memory, snapshot.state_dict(), "criterion: expected 'SnapshotCriterion', .* got 'Mem")


def refused(criterion, state, message: str) -> None:
    """See that a state is refused and changes nothing."""
    before, alpha = copy.deepcopy(criterion.state_dict()), criterion.alpha
    with pytest.raises(ValueError, match=message):
        criterion.load_state_dict(state)
    assert equal(criterion.state_dict(), before)
    assert criterion.alpha == alpha


# -- Copies ----------------------------------------------------------------------------------------


def saved_whole(criterion):
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda criterion: pickle.loads(pickle.dumps(criterion)),
    "torch.save": saved_whole,
}


@FORMS
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("in_file", [False, True], ids=["ram", "file"])
def test_a_copy_inside_an_epoch_goes_on_as_the_original(form, how, in_file, tmp_path):
    model = net().eval()
    options = {"path": tmp_path / "memory"} if in_file and form is memory_of else {}
    criterion = form(model, examples=pskd.ExampleStats(M), **options)
    rows = torch.arange(M)
    for epoch in (1, 2):
        criterion.begin_epoch(epoch)
        loss_by(criterion)(model, rows, INPUTS, TARGET)
    other = COPIES[how](criterion)
    one, same_one = (loss_by(c)(model, rows, INPUTS, TARGET) for c in (criterion, other))
    assert torch.equal(one, same_one) and criterion.epoch == other.epoch == 2
    assert criterion.take_means() == other.take_means()


def test_a_copy_of_a_memory_in_files_shares_them_as_another_process_does(tmp_path):
    memory = pskd.PredictionMemory(M, C, path=tmp_path / "memory")
    early = copy.deepcopy(memory)
    assert early.epoch == 0 and not list(tmp_path.iterdir())
    memory.next_epoch()
    other = pickle.loads(pickle.dumps(memory))
    probs = logits(M).softmax(dim=1)
    memory.write(torch.arange(0, 5), probs[:5])
    other.write(torch.arange(5, M), probs[5:])
    memory.next_epoch()
    past, seen = memory.read(torch.arange(M))
    assert seen.all()
    torch.testing.assert_close(past, probs, atol=1e-3, rtol=0)
    late = pickle.dumps(memory)
    memory.close()
    shutil.rmtree(tmp_path / "memory")
    restored = pickle.loads(late)  # as in a later process
    assert restored.epoch == 2
    with pytest.raises(FileNotFoundError, match="memory"):
        restored.read(torch.arange(M))
