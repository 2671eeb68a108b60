"""The criteria do what a loop written out by hand does, and a resumed run is the straight one."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pskd

torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other

M, C, BATCH, EPOCHS = 22, 5, 6, 4
_made = torch.Generator().manual_seed(0)
INPUTS = torch.randn(M, 3, generator=_made)
TARGET = torch.randint(C, (M,), generator=_made)

LossOfBatch = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def net() -> nn.Module:
    """A net whose predictions differ between train and eval mode."""
    torch.manual_seed(3)
    layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, C)
    return nn.Sequential(*layers)


class Run:
    """A training by one of the criteria or by hand, whose state is that of a checkpoint."""

    def __init__(self) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.losses: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []

    def epoch(self, epoch: int, loss_of: LossOfBatch) -> None:
        torch.manual_seed(epoch)  # order and dropout
        self.model.train()
        data = pskd.WithRows(TensorDataset(INPUTS, TARGET))
        for batch in DataLoader(data, batch_size=BATCH, shuffle=True):
            self.step(loss_of(self.model, *batch))

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.optimizer.step()
        self.losses.append(loss.detach())

    def state(self) -> dict:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, state: tuple[dict, dict]) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


def same(one: Run, other: Run) -> bool:
    """Whether all losses and gradients are equal to the last bit."""
    pairs = [*zip(one.losses, other.losses, strict=True)]
    pairs += zip(one.gradients, other.gradients, strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def equal(one: object, other: object) -> bool:
    """Compare two states, tensors to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def memory_of(_model: nn.Module, **options) -> pskd.MemoryCriterion:
    return pskd.MemoryCriterion(M, C, **({"num_epochs": EPOCHS} | options))


def snapshot_of(model: nn.Module, **options) -> pskd.SnapshotCriterion:
    return pskd.SnapshotCriterion(model, **({"num_epochs": EPOCHS} | options))


FORMS = pytest.mark.parametrize("form", [memory_of, snapshot_of])


def loss_by(criterion) -> LossOfBatch:
    """Return how a loop calls a criterion."""
    if isinstance(criterion, pskd.MemoryCriterion):
        return lambda model, rows, inputs, target: criterion(model(inputs), target, rows)
    return lambda model, rows, inputs, target: criterion(model(inputs), target, inputs, rows=rows)


def train(run: Run, criterion, epochs=range(1, EPOCHS + 1)) -> Run:
    for epoch in epochs:
        criterion.begin_epoch(epoch)
        run.epoch(epoch, loss_by(criterion))
    return run


def logits(rows: int = 4, seed: int = 0) -> torch.Tensor:
    made = torch.randn(rows, C, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def taught(**options) -> pskd.MemoryCriterion:
    """A criterion in its second epoch that knows a prediction of each row."""
    criterion = memory_of(None, **options)
    criterion.begin_epoch(1)
    criterion(logits(M, seed=9), TARGET, torch.arange(M))
    criterion.begin_epoch(2)
    return criterion


# ---- the method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"momentum": 0.5}], ids=str)
def test_the_memory_form_is_the_loop_written_out(options, smoothing):
    """Epochs 1 to 4, shuffled: value and gradient of each step."""
    criterion = train(Run(), memory_of(None, alpha_final=0.7, label_smoothing=smoothing, **options))
    by_hand, memory = Run(), pskd.PredictionMemory(M, C, **options)

    def loss_of(model, rows, inputs, target):
        made = model(inputs)
        past, seen = memory.read(rows)
        alpha = pskd.linear_alpha(epoch, EPOCHS, 0.7) * seen
        memory.write(rows, made.detach().softmax(dim=1))
        return pskd.pskd_cross_entropy(made, target, past, alpha, label_smoothing=smoothing)

    for epoch in range(1, EPOCHS + 1):
        memory.next_epoch()
        by_hand.epoch(epoch, loss_of)
    torch.testing.assert_close(criterion.losses, by_hand.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(criterion.gradients, by_hand.gradients, rtol=1e-4, atol=1e-5)


def test_the_snapshot_form_is_a_copy_of_the_model_an_epoch():
    run, by_hand, teacher = Run(), Run(), None
    train(run, snapshot_of(run.model, alpha_final=0.7))

    def loss_of(model, _rows, inputs, target):
        made, soft = model(inputs), F.one_hot(target, C).float()
        if teacher is not None:
            with torch.no_grad():
                alpha = pskd.linear_alpha(epoch, EPOCHS, 0.7)
                soft = (1 - alpha) * soft + alpha * teacher(inputs).softmax(dim=1)
        return F.cross_entropy(made, soft)

    for epoch in range(1, EPOCHS + 1):
        by_hand.epoch(epoch, loss_of)
        teacher = copy.deepcopy(by_hand.model).eval()
    torch.testing.assert_close(run.losses, by_hand.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run.gradients, by_hand.gradients, rtol=1e-4, atol=1e-5)


@FORMS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_alpha_it_is_cross_entropy_to_the_last_bit(form, smoothing):
    run, plain = Run(), Run()
    criterion = form(run.model, alpha_final=0.0, label_smoothing=smoothing)
    train(run, criterion)
    for epoch in range(1, EPOCHS + 1):
        plain.epoch(
            epoch,
            lambda model, _rows, inputs, target: F.cross_entropy(
                model(inputs), target, label_smoothing=smoothing
            ),
        )
    assert same(run, plain)
    assert criterion.take_means() == {}
    if form is memory_of:
        assert criterion.memory is None and criterion.state_dict()["memory"] is None
    else:
        assert not criterion.teacher.available


@FORMS
def test_the_first_epoch_is_cross_entropy_to_the_last_bit(form):
    run, plain = Run(), Run()
    criterion = train(run, form(run.model, alpha_final=1.0, schedule="constant"), [1])
    plain.epoch(1, lambda model, _rows, inputs, target: F.cross_entropy(model(inputs), target))
    assert same(criterion, plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [[2], [0, 1, 2, 3]])
def test_ignored_rows_neither_count_nor_spoil_the_first_epoch(ignored, smoothing):
    """torch's mean is NaN if all rows are ignored, and its gradient if one of them holds NaN."""
    criterion = memory_of(None, label_smoothing=smoothing)
    criterion.begin_epoch(1)
    values, target = logits().detach(), TARGET[:4].clone()
    values[ignored], target[ignored] = torch.nan, -100
    loss = criterion(made := values.clone().requires_grad_(), target, torch.arange(4))
    loss.backward()
    expected = torch.zeros(())
    if kept := [row for row in range(4) if row not in ignored]:
        expected = F.cross_entropy(values[kept], target[kept], label_smoothing=smoothing)
    torch.testing.assert_close(loss.detach(), expected)
    assert made.grad.isfinite().all() and not made.grad[ignored].any()
    with torch.no_grad():
        assert criterion(values, target).isfinite()


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_alpha_is_the_schedules_from_the_second_epoch_on(schedule):
    criterion = memory_of(None, alpha_final=0.6, schedule=schedule)
    of = {"linear": pskd.linear_alpha, "constant": pskd.constant_alpha, "cosine": pskd.cosine_alpha}
    for epoch in range(1, EPOCHS + 1):
        criterion.begin_epoch(epoch)
        expected = of[schedule](epoch, EPOCHS, 0.6) if epoch > 1 else 0.0
        assert criterion.alpha == criterion.take_means()["pskd/alpha"] == expected


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_autograd_it_is_plain_cross_entropy_and_keeps_nothing(form, dtype):
    """Before the first epoch too: a framework may look at the validation data first."""
    run, seen = Run(), pskd.ExampleStats(M)
    criterion = form(run.model, alpha_final=0.9, label_smoothing=0.1, examples=seen)
    made = logits().detach().to(dtype)
    exact = made if dtype == torch.float64 else made.float()
    plain = F.cross_entropy(exact, TARGET[:4])
    for epochs in ([], [1, 2]):
        train(run, criterion, epochs)
        before, sums = copy.deepcopy(criterion.state_dict()), seen.state_dict()
        criterion.take_means()
        with torch.no_grad():
            assert torch.equal(criterion(made, TARGET[:4]), plain)
            assert torch.equal(criterion(made, TARGET[:4], torch.arange(4)), plain)
        assert criterion.take_means().keys() == {"pskd/alpha"}
        assert torch.equal(seen.state_dict()["sums"], sums["sums"])
        assert equal(criterion.state_dict(), before)


def test_the_loss_of_a_mixed_image_is_that_of_its_mixed_target():
    """One forward, two rows, each softened by its own memory."""
    criterion, weight = taught(alpha_final=0.8), 0.3
    rows, partner = torch.tensor([3, 8, 1, 20]), torch.tensor([2, 3, 0, 1])
    a, b = logits(seed=1), logits(seed=1)
    loss = weight * criterion.loss(a, TARGET[rows], rows)
    loss = loss + (1 - weight) * criterion.loss(b, TARGET[rows[partner]], rows[partner])

    mixed = logits(seed=1)
    targets = [
        pskd.mix_targets(TARGET[r], criterion.memory.read(r)[0], criterion.alpha)
        for r in (rows, rows[partner])
    ]
    expected = F.cross_entropy(mixed, weight * targets[0] + (1 - weight) * targets[1])
    torch.testing.assert_close(loss, expected)
    (loss + expected).backward()
    torch.testing.assert_close(a.grad + b.grad, mixed.grad)


def test_loss_keeps_nothing():
    criterion = taught(examples=(seen := pskd.ExampleStats(M)))
    before, sums = copy.deepcopy(criterion.memory.state_dict()), seen.state_dict()["sums"]
    criterion.loss(logits(), TARGET[:4], torch.arange(4), recorded=False)
    assert equal(criterion.memory.state_dict(), before)
    assert torch.equal(seen.state_dict()["sums"], sums)
    assert criterion.take_means().keys() == {"pskd/alpha"}


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("in_file", [False, True], ids=["ram", "file"])
def test_rows_that_are_carried_over_keep_their_bits(options, in_file, tmp_path):
    criterion = taught(path=tmp_path if in_file else None, **options)
    rows, unseen = torch.tensor([4, 0, 17]), torch.tensor([5])
    before, _ = criterion.memory.read(rows)
    criterion.carry_over(rows)
    for epoch in (3, 4):
        criterion.begin_epoch(epoch)
        after, seen = criterion.memory.read(rows)
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)
        assert seen.all() and not criterion.memory.read(unseen)[1].any()
        criterion.carry_over(rows)


def test_what_is_told_is_of_the_rows_that_have_a_teacher():
    criterion = taught(alpha_final=0.8, examples=(seen := pskd.ExampleStats(M)))
    past, _ = criterion.memory.read(torch.arange(4))
    made = logits(seed=2)
    criterion(made, TARGET[:4], torch.arange(4))
    told = criterion.take_means()
    at_label = past[torch.arange(4), TARGET[:4]]
    assert told["pskd/alpha"] == 0.4
    assert told["pskd/teacher_nll"] == pytest.approx(-float(at_label.log().mean()))
    agree = (past.argmax(dim=1) == made.argmax(dim=1)).float().mean()
    assert told["pskd/teacher_agreement"] == pytest.approx(float(agree))
    error = 1 - made.detach().softmax(dim=1)[torch.arange(4), TARGET[:4]]
    rescaling = 1 - float((0.4 * (1 - at_label)).sum() / error.sum())
    assert told["pskd/gradient_rescaling"] == pytest.approx(rescaling, rel=1e-4)
    assert criterion.take_means() == {"pskd/alpha": 0.4}
    _, of_each = seen.compute()
    torch.testing.assert_close(of_each[:4], 1 - 0.4 * (1 - at_label) / error)
    assert of_each[4:].isnan().all()


class Output(nn.Module):
    """A model that takes and returns more than tensors of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs, *, scale):
        return {"logits": scale * self.net(inputs)}


def test_the_snapshot_is_called_as_the_student():
    model = Output()
    criterion = snapshot_of(model, logits_of=lambda output: output["logits"])
    for epoch in (1, 2):
        criterion.begin_epoch(epoch)
    expected = (2.0 * copy.deepcopy(model).eval().net(INPUTS)).softmax(dim=1)
    past = criterion.score(INPUTS, scale=2.0)
    torch.testing.assert_close(past, expected)
    made = model(INPUTS, scale=2.0)["logits"]
    loss = criterion(made, TARGET, INPUTS, scale=2.0)
    torch.testing.assert_close(loss, pskd.pskd_cross_entropy(made, TARGET, past, criterion.alpha))


def test_the_snapshot_is_of_the_model_below_its_wrappers():
    model = net()
    criterion = snapshot_of(nn.DataParallel(torch.compile(model)))
    for epoch in (1, 2):
        criterion.begin_epoch(epoch)
    assert type(criterion.teacher.model) is nn.Sequential


# ---- stop and resume -----------------------------------------------------------------------------


@FORMS
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
        ({"schedule": "cosine"}, "schedule: expected 'linear', .* got 'cosine'"),
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
    state = taught(examples=pskd.ExampleStats(M)).state_dict()
    other = pskd.MemoryCriterion(
        rows, classes, num_epochs=EPOCHS, examples=pskd.ExampleStats(rows), **options
    )
    refused(other, state, message)


@pytest.mark.parametrize("state", [None, {}, {"epoch": 1}, {"memory": None}])
def test_what_is_no_state_is_refused(state):
    refused(taught(), state, "expected a criterion's state with 'epoch' and 'options', got")


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


# ---- bad input -----------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "num_epochs: expected 1 or more, got 0"),
        ({"alpha_final": 1.5}, r"alpha_final: expected a number in \[0, 1\], got 1.5"),
        ({"alpha_final": float("nan")}, "alpha_final: expected a number"),
        ({"schedule": "square"}, "schedule: expected one of linear, constant, cosine, got 'squ"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_options_out_of_range_are_refused(form, options, message):
    with pytest.raises(ValueError, match=message):
        form(net(), **options)


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


# ---- processes -----------------------------------------------------------------------------------


def predictions(epoch: int) -> torch.Tensor:
    return logits(M, seed=epoch).detach()


def epoch_of(criterion: pskd.MemoryCriterion, epoch: int, rows: torch.Tensor) -> None:
    made = predictions(epoch)[rows].requires_grad_()
    criterion(made, TARGET[rows], rows)


def one_process(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=size)

    def own(epoch: int) -> torch.Tensor:  # another process has the row in every epoch
        return (torch.arange(M - 1) + epoch)[rank::size] % (M - 1)

    criterion = memory_of(None)
    for epoch in (1, 2):
        criterion.begin_epoch(epoch)
        epoch_of(criterion, epoch, own(epoch))
    told = criterion.take_means()
    state = criterion.state_dict()
    if rank == 0:
        torch.save(state, folder / "two.pt")
    dist.barrier()
    # Each process loads the first one's state; rows of this epoch are written again by another.
    criterion = memory_of(None)
    criterion.load_state_dict(torch.load(folder / "two.pt", weights_only=True))
    epoch_of(criterion, 7, own(3))
    criterion.begin_epoch(3)
    of_two = criterion.memory.read(torch.arange(M))
    # The state of one process, in two.
    criterion = memory_of(None)
    criterion.load_state_dict(torch.load(folder / "one.pt", weights_only=True))
    criterion.begin_epoch(3)
    of_one = criterion.memory.read(torch.arange(M))
    left = {"told": told, "of_two": of_two, "of_one": of_one, "past": snapshot_past(rank)}
    torch.save(left, folder / f"{rank}.pt")
    dist.destroy_process_group()


def snapshot_past(rank: int) -> torch.Tensor:
    """Return what a teacher says whose student normalised other rows in each process."""
    model = net()
    criterion = snapshot_of(model)
    criterion.begin_epoch(1)
    model(INPUTS[rank::2])
    criterion.begin_epoch(2)
    return criterion.score(INPUTS)


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """Return what two processes left in a folder, and the means of one that did all alone."""
    folder = tmp_path_factory.mktemp("processes")
    alone = memory_of(None)
    for epoch in (1, 2):
        alone.begin_epoch(epoch)
        epoch_of(alone, epoch, torch.arange(M - 1))
    told = alone.take_means()
    torch.save(alone.state_dict(), folder / "one.pt")
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=one_process, args=(rank, 2, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return folder, told


def read_after(file: Path, again: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what one process that resumes reads in the third epoch, of all rows.

    ``again`` is an epoch whose predictions are written over those of the second.
    """
    criterion = memory_of(None)
    criterion.load_state_dict(torch.load(file, weights_only=True))
    assert criterion.epoch == 2
    if again:
        epoch_of(criterion, again, torch.arange(M - 1))
    criterion.begin_epoch(3)
    return criterion.memory.read(torch.arange(M))


def test_the_first_processes_state_is_whole_and_serves_one_process(processes):
    folder, _ = processes
    past, seen = read_after(folder / "two.pt")
    expected, _ = read_after(folder / "one.pt")
    assert torch.equal(past, expected) and seen[:-1].all() and not seen[-1]
    probs = predictions(2).softmax(dim=1)
    torch.testing.assert_close(past[:-1], probs[:-1], rtol=0, atol=1e-3)


def test_the_snapshot_is_the_first_processes_in_all(processes):
    folder, _ = processes
    for rank in (0, 1):
        left = torch.load(folder / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(left["past"], snapshot_past(0))


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_read_what_was_written_last_wherever_that_was(processes, rank):
    folder, told = processes
    left = torch.load(folder / f"{rank}.pt", weights_only=True)
    assert left["told"] == pytest.approx(told, rel=1e-5)
    for one, expected in zip(left["of_one"], read_after(folder / "one.pt"), strict=True):
        assert torch.equal(one, expected)
    for one, expected in zip(left["of_two"], read_after(folder / "one.pt", 7), strict=True):
        assert torch.equal(one, expected)
