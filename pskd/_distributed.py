"""The only file of the core that touches torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

__all__ = ["barrier", "is_distributed", "is_first", "on_first_process"]

Result = TypeVar("Result")


def is_distributed() -> bool:
    """Whether this is one of several processes of a running process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the only process or the one with rank 0."""
    return not is_distributed() or dist.get_rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if is_distributed():
        dist.barrier()


def on_first_process(function: Callable[[], Result]) -> Result:
    """Call a function on the first process and return its result, plain values, on all of them.

    A collective. What the function raises is raised everywhere: a process that waited for one that
    has stopped would wait for ever.

    Raises:
        RuntimeError: on the other processes, with the message of the first one's error.
    """
    if not is_distributed():
        return function()
    result, error = None, None
    if is_first():
        try:
            result = function()
        except Exception as caught:
            error = caught
    told = [result, None if error is None else f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise RuntimeError(f"the first process failed: {told[1]}")
    return told[0]
