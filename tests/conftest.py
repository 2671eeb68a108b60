"""What tests of several parts share."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest
import setuptools  # noqa: F401  fails where it comes after the distutils that it replaces


@pytest.fixture(scope="module")
def forkserver(request) -> Iterator[ForkServerContext]:
    """The context of processes that are forked from one with the modules of ``PRELOADED``.

    An interpreter imports a framework for seconds and trains a tiny model in a fraction of one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(request.module.PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # tiny models are faster so
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        multiprocessing.forkserver.ensure_running()
    yield context
    # Another file's has other modules. Left alone it would wait for the workers of data loaders.
    server = multiprocessing.forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGTERM)
    server._stop()
