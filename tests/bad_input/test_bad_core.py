"""Bad input to a criterion: it stays as it was. The messages of the core are in tests/core."""

from __future__ import annotations

import copy

import torch
from bad_input import Part, check, every_case

import pskd
from pskd_tools.files import write_json

N, C = 4, 3
VALUES = torch.linspace(-1.0, 1.0, N * C).reshape(N, C)
TARGET = torch.tensor([0, 1, 2, 0])

CRITERIA = Part(
    "Criteria of a training loop",
    "Four samples, three classes, three epochs. A criterion that refuses is as it was.",
)


def memory_criterion(**options):
    return pskd.MemoryCriterion(N, C, **({"num_epochs": 3} | options))


def net(width: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(width, C)


def logits() -> torch.Tensor:
    return VALUES.clone().requires_grad_()


def asked(tried: str, says: str, *, ends=ValueError, epoch: int = 1, **call) -> None:
    """Add a case of a batch that a memory's criterion refuses."""

    def run():
        criterion = memory_criterion(examples=pskd.ExampleStats(N))
        for number in range(1, epoch + 1):
            criterion.begin_epoch(number)
        yield lambda: copy.deepcopy(criterion.state_dict())
        arguments = {"logits": logits(), "target": TARGET, "rows": torch.arange(N)} | call
        criterion(**arguments)

    CRITERIA.add(tried, run, says, ends=ends)


asked(
    "a batch before the first epoch",
    "expected begin_epoch(1) before the first batch",
    ends=RuntimeError,
    epoch=0,
)
asked(
    "a batch without row numbers",
    "rows: expected the row number of each sample of the batch, got none; pskd.WithRows(dataset) "
    "gives it",
    rows=None,
)
asked(
    "a row that the data set does not have",
    "rows: expected numbers in [0, 3], got [0, 4]",
    rows=torch.tensor([0, 1, 2, 4]),
)
asked(
    "a row twice",
    "rows: expected each sample once in a batch, got 1 more than once (1 such rows)",
    rows=torch.tensor([0, 1, 1, 2]),
)
asked(
    "rows as floats",
    "rows: expected integers of shape (4,), got torch.float32 of (4,)",
    rows=torch.arange(4.0),
)
for _epoch, _when in ((1, "the first epoch"), (2, "the second epoch")):
    asked(
        f"a label that is no class, in {_when}",
        "target: expected labels in [0, 2], got [0, 3]",
        epoch=_epoch,
        target=torch.tensor([0, 1, 2, 3]),
    )
asked(
    "logits of images in the first epoch",
    "logits: expected a floating-point tensor of shape (N, C), got torch.float32 of shape "
    "(4, 3, 2, 2)",
    logits=torch.zeros(N, C, 2, 2, requires_grad=True),
)
asked("three labels in the first epoch", "target: expected 4 labels, got 3", target=TARGET[:3])


@CRITERIA.case(
    "a snapshot's rows that the statistics do not have",
    "rows: expected numbers in [0, 3], got [0, 4]",
)
def _rows_of_statistics():
    model, seen = net(), pskd.ExampleStats(N)
    criterion = pskd.SnapshotCriterion(model, num_epochs=3, examples=seen)
    criterion.begin_epoch(1)
    inputs = torch.ones(N, 2)
    yield lambda: copy.deepcopy(seen.state_dict())
    criterion(model(inputs), TARGET, inputs, rows=torch.tensor([0, 1, 2, 4]))


@CRITERIA.case("an epoch left out", "epoch: expected 2 after the last, got 3")
def _epoch_left_out():
    criterion = memory_criterion()
    criterion.begin_epoch(1)
    yield criterion.state_dict
    criterion.begin_epoch(3)


@CRITERIA.case(
    "numbers that JSON cannot hold, over a file that is there",
    "Object of type complex is not JSON serializable",
    ends=TypeError,
)
def _not_json():
    write_json("results.json", {"ece": 0.1})
    yield None
    write_json("results.json", {"ece": 1j})


@every_case(CRITERIA)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
