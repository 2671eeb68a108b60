"""Trainings of a tiny net by either criterion."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
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
