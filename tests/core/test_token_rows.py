"""TokenRows: a token keeps its row whatever the batch, its order and the side of its padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pskd
from pskd.criterion.tokens import CountedLabels


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    seed=st.integers(0, 99),
    on_left=st.booleans(),
)
def test_each_token_has_its_row_once_in_an_epoch(lengths, seed, on_left):
    token_rows = pskd.TokenRows(lengths)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    place = torch.arange(6)
    seen = []
    for ids in order.split(3):
        sizes = torch.tensor(lengths)[ids]
        is_token = place >= 6 - sizes[:, None] if on_left else place < sizes[:, None]
        rows, valid = token_rows.rows(ids, is_token)
        assert torch.equal(valid, is_token)
        assert (rows[~valid] == token_rows.num_rows - 1).all()
        for one, own, size in zip(ids, rows, sizes, strict=True):
            first = sum(lengths[:one])
            assert own[own < token_rows.num_rows - 1].tolist() == [*range(first, first + size)]
        seen.append(rows[valid])
    assert torch.cat(seen).sort()[0].tolist() == list(range(sum(lengths)))
    assert token_rows.num_rows == sum(lengths) + 1


def test_tokens_between_others_are_counted_alone():
    is_token = torch.tensor([[False, True, False, True, True, False]])
    rows, valid = pskd.TokenRows([2, 3]).rows(torch.tensor([1]), is_token)
    assert rows.tolist() == [[5, 2, 5, 3, 4, 5]] and torch.equal(valid, is_token)


def test_a_sequence_of_another_length_or_of_no_place_has_no_row():
    ids, is_token = torch.tensor([0, 1, 2, -1]), torch.ones(4, 3, dtype=torch.bool)
    rows, valid = pskd.TokenRows([3, 2]).rows(ids, is_token)
    assert rows.tolist() == [[0, 1, 2], *[[5, 5, 5]] * 3] and valid.sum(dim=1).tolist() == [
        3,
        0,
        0,
        0,
    ]


def test_the_fingerprint_names_the_lengths_and_their_order():
    made = [
        pskd.TokenRows(lengths).fingerprint for lengths in ([2, 3], torch.tensor([2, 3]), [3, 2])
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("lengths", [[], [1, -1], [1.5], [[1, 2]]])
def test_lengths_that_count_nothing_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths: expected a count for each sequence, got"):
        pskd.TokenRows(lengths)


def test_a_batch_that_does_not_fit_is_refused():
    token_rows, is_token = pskd.TokenRows([3, 2]), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"is_token: expected bool .* got torch.int64"):
        token_rows.rows(torch.arange(2), is_token.long())
    with pytest.raises(ValueError, match=r"rows: expected integers of shape \(2,\)"):
        token_rows.rows(torch.arange(3), is_token)


# ---- rows of labels, and the loss of those that count --------------------------------------------


def test_labels_that_do_not_count_have_no_row():
    labels = [[1, -100, 2], [-100, -100], torch.tensor([0, 0, 0])]
    made = pskd.TokenRows.of_labels(iter(labels), 3)
    assert made.num_rows == 6 and made.fingerprint == pskd.TokenRows([2, 0, 3]).fingerprint
    of_masks = pskd.TokenRows.of_labels([[1, 1, 0], [0, 1, 1]], ignore_index=0)
    assert of_masks.fingerprint == pskd.TokenRows([2, 2]).fingerprint


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_refused_with_its_place(label):
    message = f"labels: expected classes of 0 to 2 or -100, got {label} in sequence 1"
    with pytest.raises(ValueError, match=message):
        pskd.TokenRows.of_labels([[0, -100], [2, label, -100]], 3)


LOGITS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[0, 1, -100, -100], [2, -100, 1, 0]])


@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_of_tokens_is_that_of_their_rows_alone(shifted):
    is_token = LABELS != -100
    rows, has_row = pskd.TokenRows([2, 3]).rows(torch.arange(2), is_token)
    made, expected = (pskd.MemoryCriterion(6, 3, num_epochs=2) for _ in range(2))
    for epoch in (1, 2):
        logits = (epoch * LOGITS).requires_grad_()
        made.begin_epoch(epoch), expected.begin_epoch(epoch)
        labels = CountedLabels(LABELS, rows, has_row, shifted=shifted)
        loss = labels.loss(made, labels.logits(logits))
        # The first position of a shifted sequence is nobody's next.
        kept = is_token.clone()
        kept[:, 0] &= not shifted
        at = logits[:, :-1][kept[:, 1:]] if shifted else logits[kept]
        assert len(labels) == kept.sum()
        assert torch.equal(loss, expected(at, LABELS[kept], rows[kept]))
    assert made.take_means() == expected.take_means() and made.alpha > 0


def test_tokens_without_a_row_have_the_hard_target():
    rows, has_row = pskd.TokenRows([2, 9]).rows(torch.arange(2), LABELS != -100)
    criterion = pskd.MemoryCriterion(12, 3, num_epochs=2, label_smoothing=0.1)
    criterion.begin_epoch(1)
    labels = CountedLabels(LABELS, rows, has_row)
    assert labels.has_row is not None and labels.has_row.tolist() == [True] * 2 + [False] * 3
    logits = labels.logits(LOGITS)
    loss = labels.loss(criterion, logits)
    expected = torch.nn.functional.cross_entropy(logits, labels.target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    criterion.memory.next_epoch()
    assert criterion.memory.read(torch.arange(12))[1].nonzero().flatten().tolist() == [0, 1]


def test_no_label_that_counts_is_a_loss_of_0_in_the_graph():
    criterion = pskd.MemoryCriterion(6, 3, num_epochs=2)
    criterion.begin_epoch(1)
    labels = CountedLabels(torch.full((2, 4), -100), torch.zeros(2, 4, dtype=torch.long))
    logits = LOGITS.clone().requires_grad_()
    loss = labels.loss(criterion, labels.logits(logits))
    loss.backward()
    assert loss == 0.0 and not logits.grad.any()


def test_logits_of_another_shape_than_the_labels_are_refused():
    with pytest.raises(ValueError, match=r"logits: expected shape \(2, 4, C\) as the labels, got"):
        CountedLabels(LABELS).logits(LOGITS[:, :3])


def test_lengths_may_be_unsigned():
    assert pskd.TokenRows(np.array([2, 0, 3], dtype=np.uint16)).num_rows == 6
