"""Means that are collected on the device and read now and then."""

from __future__ import annotations

import pytest
import torch

import pskd
from pskd.stats import Means, TeacherMeans


def test_a_mean_is_the_ratio_of_two_sums_and_starts_anew():
    means = Means()
    means.add("loss", torch.tensor(1.0))
    means.add("loss", torch.tensor(2.0))
    means.add("nll", torch.tensor(3.0), torch.tensor(2))
    means.add("nll", torch.tensor(1.0), 6)
    means.add("nothing", torch.tensor(0.0), torch.tensor(0))
    assert means.take() == {"loss": 1.5, "nll": 0.5}
    assert means.take() == {}


def test_a_teacher_is_told_over_the_rows_that_have_one():
    logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1])
    past, alpha = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5]]), torch.tensor([0.4, 0.4, 0.0])
    _, stats = pskd.pskd_cross_entropy(logits, target, past, alpha, return_stats=True)
    means = TeacherMeans()
    means.add(logits, past, alpha, stats)
    told = means.take()
    rows = past[:2, 0]
    error = 1.0 - logits.softmax(1)[:2, 0]
    assert told["pskd/teacher_nll"] == pytest.approx(float(-rows.log().mean()))
    assert told["pskd/teacher_agreement"] == 0.5
    rescaling = 1.0 - float((0.4 * (1.0 - rows)).sum() / error.sum())
    assert told["pskd/gradient_rescaling"] == pytest.approx(rescaling, rel=1e-5)


def test_of_no_row_with_a_teacher_nothing_is_told():
    logits, past = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    alpha = torch.zeros(2)
    target = torch.tensor([0, 1])
    _, stats = pskd.pskd_cross_entropy(logits, target, past, alpha, return_stats=True)
    means = TeacherMeans()
    means.add(logits, past, alpha, stats)
    assert means.take() == {}
