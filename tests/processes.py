"""Two processes as torchrun starts them, forked from that of the fixture ``forkserver``."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch.multiprocessing


def in_two_processes(function: Callable, *args) -> None:
    """Call a function in each of two processes; an error in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, (port, function, args), nprocs=2, start_method="forkserver"
    )


def _process(rank: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    function(*args)
