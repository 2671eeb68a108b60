"""TokenRows: a token keeps its row whatever the batch, its order and the side of its padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pskd


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
