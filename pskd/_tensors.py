"""Tensors whose values are read or written by address: are they tensors, and in memory?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["PLAIN", "check_memory", "check_tensors", "is_traced"]

#: The types of tensors that are no more than what is in their memory.
PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(tensor: Tensor) -> bool:
    """Return whether operators are watched, or computed without values: of these memory tells none.

    Whoever watches would not see what is written into memory, and on the meta device there is none.
    """
    return _is_watched() or tensor.is_meta or type(tensor) not in PLAIN


def _is_watched() -> bool:
    return bool(torch.compiler.is_compiling() or is_in_torch_dispatch_mode())


def check_tensors(**values: object) -> None:
    """Raise ValueError unless each named argument is a tensor, dense and in memory if any is."""
    # Not every operator of torch looks before it reads.
    looks = not (_is_watched() or torch._C._are_functorch_transforms_active())
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
        if looks and type(value) in PLAIN and not value.is_meta:
            check_memory(name, value)


def check_memory(name: str, tensor: Tensor) -> None:
    """Raise ValueError if a tensor is not dense, or its memory was freed, as sharding does."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got the layout {tensor.layout}")
    needed, storage = _extent(tensor), tensor.untyped_storage()
    is_fake = type(tensor) not in PLAIN and storage.device.type == "meta"
    if storage.nbytes() < needed or (needed and (is_fake or not tensor.data_ptr())):
        raise ValueError(f"{name}: expected a tensor in memory ({needed} bytes), got a freed one")


def _extent(tensor: Tensor) -> int:
    """Return up to which byte of its storage a tensor reaches."""
    count = tensor.numel()
    if count and not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((size - 1) * step for size, step in steps)
    return int(tensor.storage_offset() + count) * tensor.itemsize if count else 0
