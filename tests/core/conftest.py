"""What tests of the core share."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="module")
def in_processes(forkserver) -> Callable[..., None]:
    """Call ``function(rank, size, *others)`` in so many processes, and wait for them."""

    def run(function: Callable[..., None], size: int, *others: object) -> None:
        started = [
            forkserver.Process(target=function, args=(rank, size, *others)) for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            assert process.exitcode == 0

    return run
