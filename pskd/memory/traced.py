"""A memory's read and write as operators of torch, for ``torch.compile``.

A graph cannot hold a memory: it takes a handle in its place, a tensor with the memory's number.
Shapes: N rows, C classes, k kept classes of a sparse prediction.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from pskd.memory import PredictionMemory
from pskd.targets import TopK

__all__ = ["handle_of", "read", "write"]

_READ, _WRITE = "pskd::memory_read", "pskd::memory_write"
_memories: weakref.WeakValueDictionary[int, PredictionMemory] = weakref.WeakValueDictionary()
_numbers = itertools.count()

torch.library.define(
    _READ, "(Tensor handle, Tensor rows, int width, bool sparse) -> (Tensor, Tensor, Tensor)"
)
# The handle is said to change: who optimises a graph keeps such an operator, and in its place.
torch.library.define(_WRITE, "(Tensor(a!) handle, Tensor rows, Tensor probs) -> ()")


def handle_of(memory: PredictionMemory) -> Tensor:
    """Return the () int64 tensor by which `read` and `write` find a memory while it lives."""
    number = next(_numbers)
    _memories[number] = memory
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def read(
    memory: PredictionMemory, handle: Tensor | None, rows: Tensor
) -> tuple[Tensor | TopK, Tensor]:
    """As `PredictionMemory.read`; in a graph as one operator."""
    if handle is None or not torch.compiler.is_compiling():
        return memory.read(rows)
    width = memory.num_classes if memory.top_k is None else memory.top_k
    sparse = memory.top_k is not None
    probs, indices, seen = torch.ops.pskd.memory_read(handle, rows, width, sparse)
    return TopK(indices, probs) if sparse else probs, seen


def write(memory: PredictionMemory, handle: Tensor | None, rows: Tensor, probs: Tensor) -> None:
    """As `PredictionMemory.write`; in a graph as one operator."""
    if handle is None or not torch.compiler.is_compiling():
        memory.write(rows, probs)
    else:
        torch.ops.pskd.memory_write(handle, rows, probs)


@torch.library.impl(_READ, "default")
def _read(handle: Tensor, rows: Tensor, width: int, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    past, seen = _memories[int(handle)].read(rows)
    if isinstance(past, TopK):
        return past.probs, past.indices, seen
    return past, rows.new_empty(0), seen


def _read_shapes(
    handle: Tensor, rows: Tensor, width: int, sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    probs = rows.new_empty(rows.size(0), width, dtype=torch.float32)
    indices = rows.new_empty(probs.shape if sparse else 0)
    return probs, indices, rows.new_empty(rows.size(0), dtype=torch.bool)


torch.library.register_fake(_READ, _read_shapes)


@torch.library.impl(_WRITE, "default")
def _write(handle: Tensor, rows: Tensor, probs: Tensor) -> None:
    _memories[int(handle)].write(rows, probs)


torch.library.register_fake(_WRITE, lambda handle, rows, probs: None)
