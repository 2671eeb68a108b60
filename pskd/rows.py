"""Row numbers: which sample of the data set each row of a batch is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pskd.checks import check_tensors, is_traced

__all__ = [
    "ROWS",
    "RowsAside",
    "WithRows",
    "check_count",
    "check_distinct",
    "check_given",
    "check_range",
]

#: The key of the row numbers where a sample is a mapping.
ROWS = "pskd_rows"


class _MapStyle(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> object: ...


class WithRows(Dataset[tuple[Any, ...] | dict[str, Any]]):
    """A map-style data set that tells with each sample which one it is.

    A tuple ``(inputs, target)`` becomes ``(row, inputs, target)``, a mapping gets the key
    ``"pskd_rows"``. Any sampler, shuffling or worker may follow: the number stays the sample's.
    Other attributes, such as ``classes``, are the data set's.

    Args:
        dataset: any with ``len()`` and indices from 0; its samples are tuples or mappings.

    Raises:
        ValueError: for a data set without a length, such as an iterable one, or without samples.
    """

    def __init__(self, dataset: _MapStyle) -> None:
        name = type(dataset).__name__
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"dataset: expected one with indices, got the iterable {name}")
        try:
            size = len(dataset)
        except TypeError:
            raise ValueError(f"dataset: expected one with a length, got {name}") from None
        if size < 1:
            raise ValueError("dataset: expected at least one sample, got none")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Python's own protocols are not the data set's, and without one there is nobody to ask.
        if name.startswith("__") or "dataset" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __getitem__(self, row: int) -> tuple[Any, ...] | dict[str, Any]:
        return self._numbered(row, self.dataset[row])

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Any, ...] | dict[str, Any]]:
        """Return the samples of a batch, by one call where the data set takes one."""
        of_batch = getattr(self.dataset, "__getitems__", None)
        samples = of_batch(rows) if of_batch else [self.dataset[row] for row in rows]
        return [self._numbered(*pair) for pair in zip(rows, samples, strict=True)]

    def _numbered(self, row: int, sample: object) -> tuple[Any, ...] | dict[str, Any]:
        if isinstance(sample, Mapping):
            return {**sample, ROWS: row}
        if isinstance(sample, (tuple, list)):
            return (row, *sample)
        raise ValueError(
            f"dataset: expected a sample to be a tuple or a mapping, got {type(sample).__name__}"
        )


class RowsAside:
    """A collator that shows another the samples without row numbers, and adds these to its batch.

    For collators that pad, or refuse, what they do not know.

    Args:
        collate: makes a mapping of a list of mappings.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        if not (isinstance(samples[0], Mapping) and ROWS in samples[0]):
            return self.collate(samples)
        batch = self.collate([{k: v for k, v in s.items() if k != ROWS} for s in samples])
        batch[ROWS] = torch.tensor([sample[ROWS] for sample in samples])
        return batch


def check_count(name: str, value: int) -> int:
    """Return a number of rows or classes as an int; raise ValueError unless it is at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
    return count


def check_given(rows: object, count: int) -> Tensor:
    """Return the row numbers of a batch as int64.

    Raises:
        ValueError: if there are none, or they are not ``count`` integers.
    """
    if rows is None:
        raise ValueError(
            "rows: expected the row number of each sample of the batch, got none; "
            "pskd.WithRows(dataset) gives it"
        )
    if not isinstance(rows, Tensor):
        rows = torch.as_tensor(rows, device="cpu")
    check_tensors(rows=rows)
    if rows.dtype.is_floating_point or rows.dtype == torch.bool or tuple(rows.shape) != (count,):
        raise ValueError(
            f"rows: expected integers of shape ({count},), got {rows.dtype} of {tuple(rows.shape)}"
        )
    return rows.long()


def check_range(rows: Tensor, size: int) -> None:
    """Raise ValueError unless the rows lie in [0, size); not looked at on a GPU or in a graph."""
    if rows.device.type == "cpu" and len(rows) and not is_traced(rows):
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= size:
            raise ValueError(f"rows: expected numbers in [0, {size - 1}], got [{low}, {high}]")


def check_distinct(rows: Tensor) -> None:
    """Raise ValueError if a sample is twice among the rows; looked at as by `check_range`."""
    if is_traced(rows):
        return
    if rows.device.type == "cpu" and len(rows.unique()) != len(rows):
        values, counts = rows.unique(return_counts=True)
        twice = values[counts > 1].tolist()
        raise ValueError(
            f"rows: expected each sample once in a batch, got {twice[0]} more than once "
            f"({len(twice)} such rows)"
        )
