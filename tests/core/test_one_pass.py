"""The memory's criterion in one pass, against reading, loss and writing one after the other."""

from __future__ import annotations

import contextlib
import re
import threading
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import few

import pskd
from pskd.criterion import MemoryCriterion
from pskd.kernels import native
from pskd.loss import loss_and_stats

pytestmark = pytest.mark.skipif(not native.is_built(), reason="needs the compiled loss")

ROWS, CLASSES, IGNORED = 11, 23, -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class InThreePasses(MemoryCriterion):
    """Reads, computes, sums and writes one after the other."""

    def _records(self, logits, target, rows):
        return None

    def _loss(self, *args, **kwargs):
        with mock.patch("pskd.criterion.base.in_one_pass", return_value=False):
            return super()._loss(*args, **kwargs)


@dataclass
class Step:
    logits: torch.Tensor
    target: torch.Tensor
    rows: torch.Tensor


def steps(seed: int, dtype: torch.dtype, count: int = 3) -> list[Step]:
    """Return batches that meet again in each epoch, with what a training may hold."""
    numbers = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        logits = 4.0 * torch.randn(5, CLASSES, generator=numbers)
        logits[0, 3:9] = -torch.inf  # classes that the model excludes
        if number == 0:
            logits[3] = torch.nan  # a step that overflowed
        target = torch.randint(9, CLASSES, (5,), generator=numbers)
        target[1] = IGNORED
        rows = torch.randperm(ROWS, generator=numbers)[:5]
        found.append(Step(logits.to(dtype), target, rows))
    return found


def train_epoch(criterion: MemoryCriterion, epoch: int, dtype: torch.dtype, seed: int):
    """Return each step's loss and gradient."""
    criterion.begin_epoch(epoch)
    made = []
    for step in steps(seed + epoch, dtype):
        logits = step.logits.clone().requires_grad_()
        loss = criterion(logits, step.target, step.rows)
        loss.backward()
        made.append((loss.detach(), logits.grad))
    return made


def trained(kind, epochs: int = 3, **options):
    """Return a criterion after some epochs, and all losses and gradients."""
    criterion = kind(ROWS, CLASSES, num_epochs=epochs, alpha_final=0.9, **options)
    epochs_made = [train_epoch(criterion, e, torch.float32, 1) for e in range(1, epochs + 1)]
    return criterion, [step for made in epochs_made for step in made]


@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    kept=st.sampled_from((torch.float16, torch.float32)),
    top_k=st.sampled_from((None, 1, 4, CLASSES)),
    smoothing=st.sampled_from((0.0, 0.1)),
)
@few
def test_one_pass_is_three(seed, dtype, kept, top_k, smoothing):
    """Each epoch both begin with the same records, so that these are all that rounding changes."""
    options = {"dtype": kept, "top_k": top_k, "label_smoothing": smoothing, "alpha_final": 0.9}
    one, three = (
        kind(ROWS, CLASSES, num_epochs=3, **options) for kind in (MemoryCriterion, InThreePasses)
    )
    for epoch in (1, 2, 3):
        made = train_epoch(one, epoch, dtype, seed)
        expected = train_epoch(three, epoch, dtype, seed)
        half = {"rtol": 2e-2, "atol": 1e-3}  # of a gradient of half precision
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else half
        torch.testing.assert_close(made, expected, equal_nan=True, **near)
        assert one.take_means() == pytest.approx(three.take_means(), rel=1e-5)
        state, wanted = one.memory.state_dict(), three.memory.state_dict()
        same_records(state["present"], wanted["present"], one.memory)
        three.memory.load_state_dict(state)


def same_records(records, wanted, memory) -> None:
    """Check that records hold the same predictions, but for the last bit of float16."""
    layout = memory._layout
    (past, seen), (past_wanted, seen_wanted) = layout.decode(records), layout.decode(wanted)
    assert torch.equal(seen, seen_wanted)
    if isinstance(past, pskd.TopK):
        past, past_wanted = past.dense(CLASSES), past_wanted.dense(CLASSES)
    near = {"rtol": 2e-3, "atol": 1e-4} if layout.dtype == torch.float16 else {}
    torch.testing.assert_close(past, past_wanted, **near)


def test_it_is_what_the_criterion_computes_by(monkeypatch):
    calls = []
    monkeypatch.setattr(pskd.PredictionMemory, "read", lambda *_: calls.append("read"))
    monkeypatch.setattr(pskd.PredictionMemory, "write", lambda *_: calls.append("write"))
    _, made = trained(MemoryCriterion)
    assert len(made) == 9
    assert not calls


def test_examples_are_told_the_same():
    told = []
    for kind in (MemoryCriterion, InThreePasses):
        examples = pskd.ExampleStats(ROWS)
        trained(kind, examples=examples)
        told.append(examples.compute())
    torch.testing.assert_close(*told, rtol=1e-3, atol=1e-5, equal_nan=True)


def test_a_memory_in_files_keeps_the_same(tmp_path):
    _, in_files = trained(MemoryCriterion, path=tmp_path)
    _, in_ram = trained(MemoryCriterion)
    torch.testing.assert_close(in_files, in_ram, rtol=0, atol=0, equal_nan=True)


def test_many_threads_keep_the_same_to_the_last_bit():
    threads, states = torch.get_num_threads(), []
    numbers = torch.Generator().manual_seed(1)
    logits = torch.randn(512, 200, generator=numbers)
    target = torch.randint(200, (512,), generator=numbers)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            criterion = MemoryCriterion(512, 200, num_epochs=2)
            for epoch in (1, 2):
                criterion.begin_epoch(epoch)
                loss = criterion(logits.clone().requires_grad_(), target, torch.arange(512))
            records = criterion.memory.state_dict()["present"]
            states.append((loss.detach(), records, criterion.take_means()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]


@pytest.mark.parametrize("order", ["falling", "rising", "equal", "random"])
@pytest.mark.parametrize(("classes", "k"), [(40, 7), (1000, 16), (5000, 3), (70_000, 16)])
def test_the_largest_classes_are_kept(order, classes, k):
    logits = torch.linspace(8.0, -8.0, classes).expand(2, -1).clone()
    if order == "rising":
        logits = logits.flip(1)
    elif order == "equal":
        logits.zero_()
    elif order == "random":
        logits = logits[:, torch.randperm(classes, generator=torch.Generator().manual_seed(1))]
    criterion = MemoryCriterion(2, classes, num_epochs=2, top_k=k, dtype=torch.float32)
    criterion.begin_epoch(1)
    criterion(logits.requires_grad_(), torch.tensor([0, 1]), torch.arange(2))
    criterion.begin_epoch(2)
    past, _ = criterion.memory.read(torch.arange(2))
    expected = logits.detach().softmax(1).topk(k)
    torch.testing.assert_close(past.probs, expected.values)
    torch.testing.assert_close(logits.detach().softmax(1).gather(1, past.indices), past.probs)
    assert all(len(set(row)) == k for row in past.indices.tolist())
    if order != "equal":
        assert torch.equal(past.indices, expected.indices)


@pytest.mark.parametrize(
    ("target", "rows", "message"),
    [
        ([0, CLASSES], [0, 1], "target: expected labels in [0, 22], got [0, 23]"),
        ([0, 1], [0, ROWS], "rows: expected numbers in [0, 10], got [0, 11]"),
        ([0, 1], [-1, 0], "rows: expected numbers in [0, 10], got [-1, 0]"),
        ([0, 1], [-2, -2], "rows: expected numbers in [0, 10], got [-2, -2]"),
        ([0, 1], [4, 4], "rows: expected each sample once in a batch, got 4 more than once"),
    ],
)
@pytest.mark.parametrize("epoch", [1, 2])
def test_what_is_refused_leaves_the_records_as_they_were(target, rows, message, epoch):
    criterion = MemoryCriterion(ROWS, CLASSES, num_epochs=2)
    for running in range(1, epoch + 1):
        criterion.begin_epoch(running)
        good = torch.zeros(2, CLASSES, requires_grad=True)
        criterion(good, torch.tensor([0, 1]), torch.tensor([0, 1]))
    before = criterion.memory.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        criterion(torch.ones(2, CLASSES, requires_grad=True), torch.tensor(target), rows)
    after = criterion.memory.state_dict()
    assert torch.equal(after["present"], before["present"])


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("classes", [CLASSES - 1, CLASSES + 1])
def test_another_number_of_classes_is_refused(classes, top_k, epoch):
    examples = pskd.ExampleStats(ROWS)
    criterion = MemoryCriterion(ROWS, CLASSES, num_epochs=2, top_k=top_k, examples=examples)
    rows, target = torch.tensor([0, 1]), torch.tensor([0, 1])
    for running in range(1, epoch + 1):
        criterion.begin_epoch(running)
        if running < epoch:
            criterion(torch.zeros(2, CLASSES, requires_grad=True), target, rows)
    examples = criterion.examples.compute()
    with pytest.raises(ValueError, match=f"logits: expected {CLASSES} classes.*, got {classes}"):
        criterion(torch.zeros(2, classes, requires_grad=True), target, rows)
    torch.testing.assert_close(criterion.examples.compute(), examples, equal_nan=True)


def test_a_damaged_record_is_refused():
    criterion = MemoryCriterion(ROWS, CLASSES, num_epochs=2, top_k=4)
    logits, rows = torch.zeros(2, CLASSES, requires_grad=True), torch.tensor([0, 1])
    criterion.begin_epoch(1)
    criterion(logits, torch.tensor([0, 1]), rows)
    criterion.begin_epoch(2)
    state = criterion.state_dict(inside_epoch=True)
    state["memory"]["past"][1, 0] = CLASSES  # an index
    criterion.load_state_dict(state)
    with pytest.raises(ValueError, match=r"memory: expected records of classes in \[0, 22\]"):
        criterion(logits, torch.tensor([0, 1]), rows)


@pytest.mark.parametrize("top_k", [None, 4])
def test_what_a_given_teacher_softens_is_kept_too_but_for_rows_without_a_record(top_k):
    """As a memory does that reads by itself, with a number for rows that have no record."""
    numbers = torch.Generator().manual_seed(1)
    logits = torch.randn(6, CLASSES, generator=numbers)
    target, past = torch.tensor([3, 1, IGNORED, 4, IGNORED, 6]), logits.flip(0).softmax(1)
    memory = pskd.PredictionMemory(ROWS, CLASSES, top_k=top_k, dtype=torch.float32)
    memory.next_epoch()
    rows = torch.tensor([5, ROWS - 1, 2, ROWS - 1, ROWS - 1, 0])
    records = memory.records(rows, CLASSES)._replace(past=None, spare=ROWS - 1)
    loss, stats = loss_and_stats(
        logits, target, past, 0.4, reduction="none", return_stats=True, records=records
    )
    expected = pskd.pskd_cross_entropy(
        logits, target, past, 0.4, reduction="none", return_stats=True
    )
    assert torch.equal(loss, expected[0]) and torch.equal(stats.nll, expected[1].nll)
    memory.next_epoch()
    read, seen = memory.read(torch.arange(ROWS))
    assert seen.nonzero()[:, 0].tolist() == [0, 2, 5]
    wanted = logits.softmax(1)
    if top_k is not None:
        read = read.dense(CLASSES)
        wanted = pskd.TopK.from_logits(logits, top_k).dense(CLASSES)
    torch.testing.assert_close(read[[5, 2, 0]], wanted[[0, 2, 5]])


def test_rows_that_another_thread_writes_to_are_those_that_were_checked():
    criterion = MemoryCriterion(200, 20, num_epochs=2, top_k=5)
    logits, target = torch.zeros(200, 20), torch.zeros(200, dtype=torch.int64)
    rows, good = torch.arange(200), torch.arange(200)
    criterion.begin_epoch(1)
    criterion(logits, target, rows)
    criterion.begin_epoch(2)
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            rows.fill_(10**9)
            rows.copy_(good)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(500):  # a process that reads elsewhere does not come back
            with contextlib.suppress(ValueError):
                criterion(logits, target, rows)
    finally:
        ended.set()
        thread.join()
    criterion(logits, target, good)
