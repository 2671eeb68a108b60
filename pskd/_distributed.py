"""The only file of the core that touches torch.distributed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["Machines", "barrier", "is_distributed", "is_first", "on_first_process"]

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
    result, error = _attempt(function) if is_first() else (None, None)
    told = [result, _message(error)]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[1] is not None:
        raise RuntimeError(f"the first process failed: {told[1]}")
    return told[0]


class Machines:
    """The machines that the processes run on, told apart by their host names.

    Making one is a collective.

    Attributes:
        count: how many there are.
        number: which one this is, from 0, in the order of ranks.
        is_first: whether this process is the first of its machine.
    """

    def __init__(self) -> None:
        self.count, self.number, self.is_first = 1, 0, True
        if not is_distributed():
            return
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        names = list(dict.fromkeys(hosts))
        own = hosts[dist.get_rank()]
        self.count, self.number = len(names), names.index(own)
        self.is_first = hosts.index(own) == dist.get_rank()
        if self.count > 1:  # gloo: what is exchanged lies in host memory
            self._firsts = dist.new_group([hosts.index(name) for name in names], backend="gloo")

    def on_each(self, function: Callable[[], None]) -> None:
        """Call a function on the first process of each machine, and wait for all.

        A collective, which raises everywhere what is raised anywhere.

        Raises:
            RuntimeError: on the other processes, with the message of the first error.
        """
        _, error = _attempt(function) if self.is_first else (None, None)
        told = [_message(error)]
        if is_distributed():
            told *= dist.get_world_size()
            dist.all_gather_object(told, _message(error))
        if error is not None:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise RuntimeError(f"process {rank} failed: {message}")

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """Return each machine's tensor, of any size; called by the first process of each."""
        parts: list[Tensor] = [part] * self.count
        dist.all_gather_object(parts, part, group=self._firsts)
        return parts


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _message(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
