"""Two processes train as one would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from criterion_runs import INPUTS, TARGET, M, logits, memory_of, net, snapshot_of

import pskd

PRELOADED = ["pskd.criterion", "pytest", "torch.distributed"]


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
def processes(tmp_path_factory, in_processes) -> tuple[Path, dict[str, float]]:
    """Return what two processes left in a folder, and the means of one that did all alone."""
    folder = tmp_path_factory.mktemp("processes")
    alone = memory_of(None)
    for epoch in (1, 2):
        alone.begin_epoch(epoch)
        epoch_of(alone, epoch, torch.arange(M - 1))
    told = alone.take_means()
    torch.save(alone.state_dict(), folder / "one.pt")
    in_processes(one_process, 2, folder)
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
