"""The processes of a run; the only file of the core that touches torch.distributed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "Machines",
    "Processes",
    "World",
    "barrier",
    "gather",
    "is_distributed",
    "is_first",
    "join",
    "leave",
    "on_first_process",
    "sum_over_processes",
    "take_buffers_of_first_process",
]

Result = TypeVar("Result")


class World(NamedTuple):
    """The processes of a training.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: on which this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


def join(device: str | None = None) -> World:
    """Join the processes that torchrun started; without torchrun there is one.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None takes a GPU if there is one. Under
            torchrun each process takes the GPU of its local rank.

    Raises:
        ValueError: for a device that torch does not have here.
    """
    chosen = _checked_device(device)
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # Objects are gathered by gloo, whatever the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def _checked_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:NUMBER, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise ValueError(f"--device: expected one that torch finds, got {name} of {count} GPUs")
    return device


def leave() -> None:
    """End what `join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of every process's tensor; may overwrite it."""
    if not is_distributed():
        return values
    shared = values.to(_meeting_place(values))
    dist.all_reduce(shared)
    return shared.to(values.device)


def gather(value: Result) -> list[Result] | None:
    """Return every process's value in the first process, in the order of ranks; None elsewhere."""
    if not is_distributed():
        return [value]
    parts = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, parts)
    return parts


@torch.no_grad()
def take_buffers_of_first_process(model: nn.Module) -> None:
    """Give every process the buffers of the first, as DDP does before each training step."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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
    told: list[Any] = [result, _message(error)]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    first: Result
    first, message = told
    if message is not None:
        raise RuntimeError(f"the first process failed: {message}")
    return first


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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_firsts"}

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
        """Return each machine's (n, B) tensor, of any n; called by the first process of each."""
        assert isinstance(self._firsts, dist.ProcessGroup)  # as whoever belongs to the group has it
        return _all_gather(part, self._firsts, part.device)


class Processes:
    """All processes, as peers of one another.

    Attributes:
        count: how many there are.
        number: which one this is, from 0, its rank.
    """

    def __init__(self) -> None:
        self.count, self.number = 1, 0
        if is_distributed():
            self.count, self.number = dist.get_world_size(), dist.get_rank()

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """Return each process's (n, B) tensor, of any n, on this one's device; a collective."""
        return _all_gather(part, None, _meeting_place(part))


def _meeting_place(values: Tensor) -> torch.device:
    """Return on which device all processes exchange such a tensor.

    NCCL alone has no way between tensors on a CPU: they travel by the GPUs then.
    """
    by_gpu = dist.get_backend() == dist.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if by_gpu else values.device


def _all_gather(
    part: Tensor, group: dist.ProcessGroup | None, device: torch.device
) -> list[Tensor]:
    """Gather tensors of different length in one collective after that of their lengths."""
    count = dist.get_world_size(group)
    own = torch.tensor([len(part)], dtype=torch.int64, device=device)
    all_lengths = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(all_lengths, own, group=group)
    lengths = [int(length) for length in all_lengths]
    sent = part.new_zeros(max(lengths), *part.shape[1:], device=device)
    sent[: len(part)] = part
    received = [torch.empty_like(sent) for _ in range(count)]
    dist.all_gather(received, sent, group=group)
    cut = zip(received, lengths, strict=True)
    return [tensor[:length].to(part.device) for tensor, length in cut]


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _message(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
