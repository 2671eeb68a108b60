"""Torch's default dtype and device change nothing: the core's tests, run under others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LOSSES = ["test_linear", "test_loss_gradient"]
ALL = [
    *LOSSES,
    "test_loss",
    "test_criterion",
    "test_effect",
    "test_examples",
    "test_means",
    "test_memory",
    "test_targets",
    "test_teacher",
]


@pytest.mark.parametrize(
    ("dtype", "device", "files"),
    [("bfloat16", "meta", ALL), ("float64", "cpu", LOSSES)],
)
def test_defaults_of_torch_change_nothing(dtype, device, files):
    paths = [str(HERE / f"{name}.py") for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "surroundings", "-p", "no:xdist"]
    # What is compiled is not called through the plugin; processes of a test have no plugin.
    others = "compiled process kill training folder resident hold".replace(" ", " or ")
    command += ["-p", "no:cacheprovider", "-k", f"not ({others})"]
    done = subprocess.run(
        [*command, "--dtype", dtype, "--device", device, *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.getenv("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 100, done.stdout[-400:]
