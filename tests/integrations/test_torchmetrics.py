"""AURC and its excess in torchmetrics' own loop: batches, a reset, two processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes

pytest.importorskip("torchmetrics", reason="needs torchmetrics: pip install torchmetrics")

from pskd_torchmetrics import AURC, ExcessAURC  # noqa: E402
from torchmetrics import MetricCollection  # noqa: E402

from pskd import calibration  # noqa: E402

PRELOADED = ["pskd_torchmetrics", "torch.distributed"]


def predictions(rows: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(rows, 5, generator=generator).softmax(dim=1)
    return probs.to(dtype), torch.randint(5, (rows,), generator=generator)


def expected(probs, target) -> dict[str, float]:
    rows = calibration.ConfidenceAccumulator()
    rows.update(probs, target)
    found = rows.compute()
    return {"AURC": found["aurc"], "ExcessAURC": found["e_aurc"]}


def fractions(metrics: MetricCollection) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.compute().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [[50], [1, 0, 30, 19]])
def test_batches_are_the_whole(dtype, sizes):
    probs, target = predictions(50, dtype)
    metrics = MetricCollection([AURC(), ExcessAURC()])
    for _ in range(2):
        for batch in zip(probs.split(sizes), target.split(sizes), strict=True):
            metrics.update(*batch)
        assert fractions(metrics) == pytest.approx(expected(probs, target), rel=1e-6)
        metrics.reset()


def test_a_step_gives_the_batchs_value_and_keeps_its_rows():
    probs, target = predictions(50)
    metric = AURC()
    first = metric(probs[:20], target[:20])
    assert first.item() == pytest.approx(expected(probs[:20], target[:20])["AURC"])
    metric(probs[20:], target[20:])
    assert metric.compute().item() == pytest.approx(expected(probs, target)["AURC"])


def test_logits_are_refused_and_leave_no_trace():
    probs, target = predictions(50)
    metric = AURC()
    metric.update(probs, target)
    with pytest.raises(ValueError, match=r"probs: expected values in \[0, 1\]"):
        metric.update(probs.log(), target)
    assert metric.compute().item() == pytest.approx(expected(probs, target)["AURC"])


def of_both() -> None:
    dist.init_process_group("gloo")
    probs, target = predictions(50)
    mine = slice(0, 33) if dist.get_rank() else slice(33, 50)
    metrics = MetricCollection([AURC(), ExcessAURC()])
    metrics.update(probs[mine], target[mine])
    assert fractions(metrics) == pytest.approx(expected(probs, target), rel=1e-6)
    dist.destroy_process_group()


def test_two_processes_give_the_value_of_all_rows(forkserver):
    in_two_processes(of_both)
