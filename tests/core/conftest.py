"""What tests of the core share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import loss_cases
import pytest
import torch

from pskd.kernels import native


@pytest.fixture(scope="module", params=["native", "torch"])
def backend(request) -> Iterator[str]:
    """Each form of the loss for CPUs: compiled, in float32; of torch's operators, in float64."""
    is_native = request.param == "native"
    if is_native and not native.is_built():
        pytest.skip("the compiled form was not built: it needs a C++ compiler at install")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_cases, "under_test", torch.float32 if is_native else torch.float64)
        if not is_native:
            patch.setattr(native, "is_built", lambda: False)
        yield request.param


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
