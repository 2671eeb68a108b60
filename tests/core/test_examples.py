"""ExampleStats: what each sample went through, the same in one process or several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import pskd

PRELOADED = ["pskd.stats", "pytest", "torch.distributed"]

torch.set_num_threads(1)

M, C = 6, 4


def visits(epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the student's and the teacher's probability of the label, and alpha, of all rows."""
    generator = torch.Generator().manual_seed(epoch)
    student, teacher = 0.1 + 0.8 * torch.rand(2, M, generator=generator)
    alpha = torch.full((M,), 0.3 * epoch)
    alpha[1] = 0.0  # a row without a teacher
    return student, teacher, alpha


def tell(stats: pskd.ExampleStats, epoch: int, rows: torch.Tensor) -> None:
    student, teacher, alpha = (values[rows] for values in visits(epoch))
    stats.add(rows, -student.log(), teacher if epoch > 1 else None, alpha * (epoch > 1))


def test_the_sums_are_those_worked_out_by_hand():
    stats = pskd.ExampleStats(M)
    for epoch in (1, 2, 3):
        for rows in torch.randperm(M - 1).split(2):  # the last row is never visited
            tell(stats, epoch, rows)
    difficulty, rescaling = stats.compute()
    told = [visits(epoch) for epoch in (1, 2, 3)]
    error = torch.stack([1 - student for student, _, _ in told])
    torch.testing.assert_close(difficulty[:-1], error.mean(dim=0)[:-1])
    removed = sum(alpha * (1 - teacher) for _, teacher, alpha in told[1:])
    expected = 1 - removed / error[1:].sum(dim=0)
    torch.testing.assert_close(rescaling[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])
    assert rescaling[1].isnan(), "no teacher"
    assert rescaling[-1].isnan() and difficulty[-1].isnan(), "no visit"


def test_of_one_visit_it_is_the_rescaling_of_the_gradient():
    logits = torch.randn(M, C, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target, rows = torch.arange(M) % C, torch.arange(M)
    past = torch.randn(M, C, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    loss, told = pskd.pskd_cross_entropy(
        logits, target, past, 0.6, reduction="sum", return_stats=True
    )
    loss.backward()
    stats = pskd.ExampleStats(M)
    stats.add(rows, told.nll, told.teacher_probs_at_label, torch.full((M,), 0.6))
    plain = 1 - logits.detach().softmax(dim=1)[rows, target]
    torch.testing.assert_close(stats.compute()[1], -logits.grad[rows, target] / plain)


def test_it_goes_on_where_it_was_saved():
    straight, stopped, resumed = (pskd.ExampleStats(M) for _ in range(3))
    for epoch in (1, 2):
        for stats in (straight, stopped):
            tell(stats, epoch, torch.arange(M))
    tell(resumed, 3, torch.arange(M))  # of another run, forgotten
    resumed.load_state_dict(stopped.state_dict())
    for stats in (straight, resumed):
        tell(stats, 3, torch.arange(M))
    assert torch.equal(straight.state_dict()["sums"], resumed.state_dict()["sums"])


def test_a_state_does_not_change_with_what_is_added_later():
    stats = pskd.ExampleStats(M)
    state = stats.state_dict()
    tell(stats, 1, torch.arange(M))
    assert not state["sums"].any()


def test_the_state_of_other_data_is_refused():
    stats = pskd.ExampleStats(M)
    tell(stats, 1, torch.arange(M))
    before = stats.state_dict()
    with pytest.raises(ValueError, match="examples: expected 6 samples, got 7"):
        stats.load_state_dict(pskd.ExampleStats(M + 1).state_dict())
    assert torch.equal(stats.state_dict()["sums"], before["sums"])


def one_process(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=size)
    stats = pskd.ExampleStats(M)
    for epoch in (1, 2, 3):
        tell(stats, epoch, torch.arange(M - 1)[rank::size])
        if epoch == 2:  # stop and go on
            state = stats.state_dict()
            stats = pskd.ExampleStats(M)
            stats.load_state_dict(state)
    torch.save(stats.compute(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_add_up(tmp_path, in_processes):
    in_processes(one_process, 2, tmp_path)
    alone = pskd.ExampleStats(M)
    for epoch in (1, 2, 3):
        tell(alone, epoch, torch.arange(M - 1))
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(told, alone.compute(), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_visit_that_is_not_finite_is_none(broken):
    """Under a loss scale a step overflows now and then and is left out by the optimizer too."""
    clean, stats = pskd.ExampleStats(M), pskd.ExampleStats(M)
    rows = torch.arange(M)
    for epoch in (1, 2):
        tell(clean, epoch, rows)
        tell(stats, epoch, rows)
    nll, past = torch.full((M,), 0.5), torch.full((M,), 0.5)
    (nll if broken == "student" else past)[:] = torch.nan
    stats.add(rows, nll, past, torch.full((M,), 0.5))
    for got, expected in zip(stats.compute(), clean.compute(), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
