"""Outputs of a module inside a model's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def captured(module: nn.Module) -> Iterator[list]:
    """Yield a list to which every output of ``module`` is added until the block ends."""
    outputs: list = []
    handle = module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
