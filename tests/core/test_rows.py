"""Row numbers: the number is the sample's, whatever orders, splits or loads the samples."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import pskd
from pskd.rows import RowsAside, check_distinct, check_given, check_range

M = 11
INPUTS, TARGET = 10.0 * torch.arange(M)[:, None], torch.arange(M) % 3


class Mappings(Dataset):
    def __len__(self):
        return M

    def __getitem__(self, row):
        return {"inputs": INPUTS[row], "labels": TARGET[row]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(M))


class CountedStream(Stream):
    def __len__(self):
        return M


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tuples_row_comes_first_and_is_its_own(workers):
    data = pskd.WithRows(TensorDataset(INPUTS, TARGET))
    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)
    seen = []
    for rows, inputs, target in loader:
        assert rows.dtype == torch.int64
        assert torch.equal(inputs, INPUTS[rows]) and torch.equal(target, TARGET[rows])
        seen += rows.tolist()
    assert seen != sorted(seen) and sorted(seen) == list(range(M)) and len(data) == M


class Batched(Mappings):
    """Takes a batch at a time, counts its calls, and tells its classes."""

    classes = ("one", "two", "three")

    def __init__(self):
        self.calls, self.targets = 0, TARGET.tolist()

    def __getitem__(self, row):
        raise AssertionError("a batch is taken by one call")

    def __getitems__(self, rows):
        self.calls += 1
        return [(INPUTS[row], TARGET[row]) for row in rows]


def test_a_data_set_that_takes_batches_is_called_once_for_each():
    data = Batched()
    for rows, inputs, target in DataLoader(pskd.WithRows(data), batch_size=4, shuffle=True):
        assert torch.equal(inputs, INPUTS[rows]) and torch.equal(target, TARGET[rows])
    assert data.calls == 3
    subset = DataLoader(Subset(pskd.WithRows(data), [7, 2]), batch_size=2)
    assert next(iter(subset))[0].tolist() == [7, 2] and data.calls == 4


def test_other_attributes_are_the_data_sets_also_of_copies():
    data = pskd.WithRows(pskd.WithRows(Batched()))
    for one in (data, copy.copy(data), copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert one.classes == Batched.classes and one.targets == TARGET.tolist()
        assert len(one) == M
        with pytest.raises(AttributeError, match="'Batched' object has no attribute 'imgs'"):
            _ = one.imgs
        assert not hasattr(one, "__array__")


def test_a_mapping_gets_a_key():
    batches = list(DataLoader(pskd.WithRows(Mappings()), batch_size=4, shuffle=True))
    for batch in batches:
        assert batch.keys() == {"inputs", "labels", "pskd_rows"}
        assert torch.equal(batch["inputs"], INPUTS[batch["pskd_rows"]])
    assert sorted(torch.cat([b["pskd_rows"] for b in batches]).tolist()) == list(range(M))


def test_the_data_set_below_is_left_as_it_is():
    sample = {"labels": 1}
    assert pskd.WithRows([sample])[0] == {"labels": 1, "pskd_rows": 0}
    assert sample == {"labels": 1}


def test_a_part_of_the_data_keeps_the_numbers_of_the_whole():
    part = Subset(pskd.WithRows(TensorDataset(INPUTS, TARGET)), [7, 2])
    assert [row for row, _, _ in part] == [7, 2]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "dataset: expected one with indices, got the iterable Stream"),
        (CountedStream(), "dataset: expected one with indices, got the iterable CountedStream"),
        (iter([]), "dataset: expected one with a length, got list_iterator"),
        ([], "dataset: expected at least one sample, got none"),
    ],
)
def test_what_has_no_row_numbers_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        pskd.WithRows(dataset)


def test_a_sample_that_is_neither_tuple_nor_mapping_is_refused():
    with pytest.raises(ValueError, match="expected a sample to be a tuple or a mapping, got int"):
        pskd.WithRows([3, 4])[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_row_numbers_of_any_integer_type_are_taken(dtype):
    rows = check_given(torch.tensor([2, 0], dtype=dtype), 2)
    assert rows.dtype == torch.int64 and rows.tolist() == [2, 0]
    assert check_given([2, 0], 2).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"expected the row number of each sample .* got none; pskd.WithRows\(dataset\)"),
        (torch.tensor([0.0, 1.0]), r"expected integers of shape \(2,\), got torch.float32 of \(2,"),
        (torch.tensor([True, False]), r"got torch.bool of \(2,\)"),
        (torch.tensor([0]), r"expected integers of shape \(2,\), got torch.int64 of \(1,\)"),
        (torch.tensor([[0], [1]]), r"of \(2, 1\)"),
    ],
)
def test_what_are_no_row_numbers_is_refused(rows, message):
    with pytest.raises(ValueError, match=f"rows: .*{message}"):
        check_given(rows, 2)


def test_a_sample_twice_in_a_batch_is_refused():
    check_distinct(torch.tensor([4, 1, 2]))
    with pytest.raises(ValueError, match=r"each sample once in a batch, got 1 more .* \(2 such"):
        check_distinct(torch.tensor([4, 1, 4, 1, 2]))


@pytest.mark.parametrize("rows", [[-1, 3], [0, M]])
def test_a_row_beyond_the_data_is_refused(rows):
    check_range(torch.tensor([0, M - 1]), M)
    check_range(torch.tensor([], dtype=torch.int64), M)
    with pytest.raises(ValueError, match=r"rows: expected numbers in \[0, 10\], got \[") as error:
        check_range(torch.tensor(rows), M)
    assert str(rows) in str(error.value)


def padded(samples):
    """Pad as tokenizers do, which fail at what is no text."""
    assert all(set(sample) == {"inputs", "labels"} for sample in samples)
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collator_that_does_not_know_rows_keeps_them(workers):
    options = {"batch_size": 4, "shuffle": True, "num_workers": workers}
    loader = DataLoader(pskd.WithRows(Mappings()), collate_fn=RowsAside(padded), **options)
    batches = list(loader)
    for batch in batches:
        assert torch.equal(INPUTS[batch["pskd_rows"]], batch["inputs"])
    assert torch.cat([b["pskd_rows"] for b in batches]).sort()[0].tolist() == list(range(M))
    without = next(iter(DataLoader(Mappings(), collate_fn=RowsAside(padded), **options)))
    assert set(without) == {"inputs", "labels"}
