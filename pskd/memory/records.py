"""The records of a memory: one prediction as bytes.

A record is the k indices (none where all C classes are kept), the probabilities, and a byte that
says whether the row was written, here (1) or by another peer (2).

Shapes: N rows of a call, C classes, k kept classes, B bytes a record.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pskd.checks import check_listed, check_listed_once, check_tensors, check_top_k
from pskd.targets import TopK

__all__ = ["WRITTEN_ELSEWHERE", "WRITTEN_HERE", "RecordLayout", "bytes_as"]

# The last byte of a record; 0 is a row that nobody wrote.
WRITTEN_HERE, WRITTEN_ELSEWHERE = 1, 2


@dataclass(frozen=True)
class RecordLayout:
    """How a prediction is kept.

    Attributes:
        num_classes: C.
        top_k: k, the classes that are kept; None keeps all.
        dtype: of the probabilities, float16 or float32.

    Raises:
        ValueError: for a number of classes that cannot be kept, or another dtype.
    """

    num_classes: int
    top_k: int | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.top_k is not None and not 1 <= self.top_k <= self.num_classes:
            raise ValueError(f"top_k: expected 1 to {self.num_classes} classes, got {self.top_k}")
        if self.dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype: expected torch.float16 or torch.float32, got {self.dtype}")

    @property
    def width(self) -> int:
        """The number of probabilities of a record."""
        return self.num_classes if self.top_k is None else self.top_k

    @property
    def index_dtype(self) -> torch.dtype:
        """The type of the indices, 16 bits where these suffice."""
        # Read back without their sign; torch has few operations on unsigned integers of 16 bits.
        return torch.int16 if self.num_classes <= 1 << 16 else torch.int32

    @property
    def record(self) -> np.dtype[np.void]:
        """A record's fields, as which numpy reads one: indices of a sparse one, probs, written."""
        probs = np.dtype(str(self.dtype).removeprefix("torch."))
        fields: list[tuple[Any, ...]] = [("probs", probs, self.width), ("written", np.uint8)]
        if self.top_k is not None:
            index = np.uint16 if self.index_dtype is torch.int16 else np.int32
            fields.insert(0, ("indices", index, self.width))
        return np.dtype(fields)

    @cached_property
    def record_bytes(self) -> int:
        """B."""
        return self.record.itemsize

    @cached_property
    def form(self) -> tuple[int, torch.dtype, int]:
        """Width, dtype and bytes of an index, as `pskd.kernels.rows.Records` has them."""
        return self.width, self.dtype, 0 if self.top_k is None else self.index_dtype.itemsize

    def kept_form(self, probs: Tensor | TopK, rows: int) -> Tensor | TopK:
        """Return predictions with as many classes as are kept, float32.

        Raises:
            ValueError: if they are not of so many rows, or of other classes, or a sparse one does
                not list distinct ones.
        """
        if isinstance(probs, TopK):
            check_top_k("probs", probs, rows, self.num_classes)
            shape, width = tuple(probs.probs.shape), self.top_k
        else:
            check_tensors(probs=probs)
            shape, width = tuple(probs.shape), self.num_classes
        if shape != (rows, width):
            form = f"({rows}, {self.num_classes}) probabilities"
            if self.top_k is not None:
                form += f" or TopK of ({rows}, {self.width})"
            raise ValueError(f"probs: expected {form}, got {type(probs).__name__} of {shape}")
        values = probs.probs if isinstance(probs, TopK) else probs
        if not values.dtype.is_floating_point:
            raise ValueError(f"probs: expected a floating-point tensor, got {values.dtype}")
        if isinstance(probs, TopK):
            check_listed("probs", probs.indices, self.num_classes)
            check_listed_once("probs", probs.indices)
            return TopK(probs.indices.detach().long(), probs.probs.detach().float())
        if self.top_k is None:
            return probs.detach().float()
        values, indices = probs.detach().topk(self.width, dim=1)
        return TopK(indices, values.float())

    def average(self, new: Tensor | TopK, past: Tensor | TopK, weight: Tensor) -> Tensor | TopK:
        """Return the mean of two predictions in the kept form, the past with an (N, 1) weight."""
        if isinstance(new, Tensor) and isinstance(past, Tensor):
            return new.lerp(past, weight)
        assert isinstance(new, TopK) and isinstance(past, TopK)  # both in the kept form
        # Where there is no past, class 0 stands in its list k times.
        past = past._replace(indices=torch.where(weight == 0, new.indices, past.indices))
        # No class outside of both lists can be larger in the mean than one of the k.
        indices = torch.cat([new.indices, past.indices], dim=1)
        mean = self._lookup(new, indices).lerp(self._lookup(past, indices), weight)
        mean[:, self.width :][_listed(past.indices, new.indices)] = -1.0  # counted already
        values, order = mean.topk(self.width, dim=1)
        return TopK(indices.gather(1, order), values)

    def _lookup(self, past: TopK, indices: Tensor) -> Tensor:
        """Return the (N, j) probabilities of some classes."""
        hit = indices[:, :, None] == past.indices[:, None, :]
        listed = (hit * past.probs[:, None, :]).sum(dim=2)
        # Where even a listed class has 0, the others can have nothing: they may be masked.
        is_whole = past.probs.amin(dim=1) == 0
        tail = past.tail(self.num_classes).masked_fill(is_whole, 0.0)
        return torch.where(hit.any(dim=2), listed, tail[:, None])

    def encode(self, probs: Tensor | TopK) -> Tensor:
        """Return (N, B) uint8 records."""
        values = (probs.probs if isinstance(probs, TopK) else probs).to(self.dtype)
        mass = values.sum(dim=1, keepdim=True, dtype=torch.float32)  # not finite if one of them is
        kept = mass.isfinite() & (mass > 0)
        parts = [torch.where(kept, values, 0.0), kept]
        if isinstance(probs, TopK):
            parts.insert(0, probs.indices.to(self.index_dtype))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def decode(self, records: Tensor) -> tuple[Tensor | TopK, Tensor]:
        """Return the predictions of (N, B) uint8 records and whether there are any, else zeros."""
        seen = records[:, -1] != 0
        start = self.record_bytes - 1 - self.width * self.dtype.itemsize
        values = bytes_as(records[:, start:-1], self.dtype).float()
        values.masked_fill_(~seen[:, None], 0.0)  # may be torn, or not finite
        # Rounded to half precision the parts of a whole may be a little more than that.
        is_whole = self.width == self.num_classes
        least = torch.finfo(torch.float32).tiny if is_whole else 1.0
        values /= values.sum(dim=1, keepdim=True).clamp_min(least)
        if self.top_k is None:
            return values, seen
        indices = bytes_as(records[:, :start], self.index_dtype).long()
        indices *= seen[:, None]
        if self.index_dtype is torch.int16:
            indices &= 0xFFFF
        return TopK(indices, values), seen


def bytes_as(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some columns of numbers with their bytes read as another type."""
    # A single row counts as contiguous whatever its stride; a clone has the one that is needed.
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _listed(indices: Tensor, others: Tensor) -> Tensor:
    """Return the (N, j) mask of the indices that are among a row's others."""
    return (indices[:, :, None] == others[:, None, :]).any(dim=2)
