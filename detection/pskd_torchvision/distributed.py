"""One process or several (torchrun): who this one is, and what all of them share."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "World",
    "gather",
    "join",
    "leave",
    "sum_over_processes",
    "take_buffers_of_first_process",
]


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
    if _together():
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of every process's tensor; may overwrite it."""
    if _together():
        dist.all_reduce(values)
    return values


def gather(value: object) -> list | None:
    """Return every process's value in the first process, in the order of ranks; None elsewhere."""
    if not _together():
        return [value]
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, parts)
    return parts


@torch.no_grad()
def take_buffers_of_first_process(model: nn.Module) -> None:
    """Give every process the buffers of the first, as DDP does before each training step."""
    if _together():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
